//! Flame graphs of a server at work, by `perf` and inferno: where the CPU time of an operation goes. Taken in rounds of
//! their own, since the profiler slows down what it looks at.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use crate::process::{Process, run};

/// Samples a second of each core: no divisor of a timer's frequency, so that nothing is in step with it.
const FREQUENCY: &str = "199";
/// Of each stack so many bytes are kept, to be unwound later: libraries and the release have no frame pointers.
const STACK: &str = "dwarf,16384";
/// Unwinding takes far longer than the profile did.
const DRAWN_WITHIN: Duration = Duration::from_secs(300);

/// A profile that is being taken.
pub struct Profile {
    perf: Process,
    data: PathBuf,
}

impl Profile {
    /// Begins to look at all threads of the process with this pid.
    pub fn start(pid: u32, folder: &Path) -> anyhow::Result<Self> {
        let data = folder.join("perf.data");
        let mut command = Command::new("perf");
        command.args(["record", "--no-buildid-cache", "--freq", FREQUENCY, "--call-graph", STACK]);
        command.args(["--pid", &pid.to_string(), "--output"]);
        let perf = Process::start("perf", folder, command.arg(&data)).context("is perf (linux-perf) installed?")?;
        Ok(Self { perf, data })
    }

    /// Ends it, and draws it as an SVG with this title.
    pub fn draw(mut self, title: &str, svg: &Path, folder: &Path) -> anyhow::Result<()> {
        self.perf.check()?;
        self.perf.stop();
        let script = "timeout 280 perf script --no-inline --input \"$1\" | inferno-collapse-perf | \
                      inferno-flamegraph --title \"$3\" --minwidth 0.2 >\"$2\"";
        let mut command = Command::new("bash");
        command.args(["-o", "pipefail", "-c", script, "flame"]).arg(&self.data).arg(svg).arg(title);
        run("draw", folder, DRAWN_WITHIN, &mut command)?;
        std::fs::remove_file(&self.data).with_context(|| format!("can't remove {}", self.data.display()))
    }
}
