//! Vasto: `vasto up` as a child (operator, stores and gateway in one process), and loads of its client against it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::load::{Load, RUNNING, Work};
use crate::process::{Background, Process, at_cost, run, wait_for};
use crate::sample::Sample;
use vasto_tests::cluster::free_port;

/// The keyspace's name.
pub const KEYSPACE: &str = "bench";
/// How long a cluster may take until it serves.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A keyspace's spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Setup {
    pub shards: u32,
    pub replication_factor: u32,
    /// `durability: Synced` instead of Periodic.
    pub synced: bool,
}

impl Setup {
    /// One shard in one copy.
    pub const ONE: Self = Self { shards: 1, replication_factor: 1, synced: false };

    fn document(self) -> String {
        let Self { shards, replication_factor, synced } = self;
        format!(
            "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {{name: {KEYSPACE}}}\nspec:\n  shards: {shards}\n  \
             replicationFactor: {replication_factor}\n  durability: {}\n",
            if synced { "Synced" } else { "Periodic" }
        )
    }
}

/// The binary that was built beside this one.
pub fn binary() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("where this program is")?;
    let vasto = own.with_file_name("vasto");
    if !vasto.exists() {
        bail!("{} is missing: build it with the same profile, as ./dev bench does", vasto.display());
    }
    Ok(vasto)
}

/// A cluster that serves; it ends with this value.
pub struct Vasto {
    /// The one process.
    pub process: Process,
    /// Where its operator listens.
    pub operator: String,
    /// Where its gateway speaks Redis' protocol.
    pub redis_port: u16,
    /// Where everything is kept.
    pub data: PathBuf,
    folder: PathBuf,
}

impl Vasto {
    /// Starts it in a new folder of this name, and waits until it serves.
    pub fn start(parent: &Path, name: &str, setup: Setup) -> anyhow::Result<Self> {
        let folder = parent.join(name);
        std::fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
        let (file, data) = (folder.join("keyspace.yaml"), folder.join("data"));
        std::fs::write(&file, setup.document()).with_context(|| format!("can't write {}", file.display()))?;
        let (operator, redis_port) = (format!("127.0.0.1:{}", free_port()), free_port());
        let mut command = Command::new(binary()?);
        command.arg("up").arg("-f").arg(&file).arg("--data").arg(&data).args(["--listen", &operator]);
        command.args(["--redis", &format!("127.0.0.1:{redis_port}")]);
        command.args(["--http", "off", "--grpc", "off", "--console", "off", "--log", "warn"]);
        let mut process = Process::start("vasto", &folder, &mut command)?;
        let ready = format!("keyspace {KEYSPACE} is ready");
        wait_for("vasto up serves", READY_WITHIN, || {
            process.check()?;
            Ok(process.printed().contains(&ready).then_some(()))
        })?;
        Ok(Self { process, operator, redis_port, data, folder })
    }

    /// A load of this keyspace: all but what it does is as usual.
    pub fn load(&self, work: Work, keys: u64, value_size: usize) -> Load {
        Load {
            operator: self.operator.clone(),
            keyspace: KEYSPACE.to_owned(),
            work,
            callers: 16,
            batch: 1,
            seconds: 1.0,
            keys,
            value_size,
            incompressible: false,
            rate: None,
            until_input_ends: false,
        }
    }

    /// Runs a load to its end.
    pub fn run(&self, load: &Load) -> anyhow::Result<Sample> {
        // Filling in takes as long as it takes: 10 minutes is for gigabytes.
        let within = Duration::from_secs_f64(load.seconds + if load.work == Work::Fill { 600.0 } else { 40.0 });
        let mut command = Command::new(std::env::current_exe()?);
        let (text, _) = run("load", &self.folder, within, command.args(load.command_line()))?;
        Sample::parse(&text)
    }

    /// Runs a load to its end so many times, with what each cost the server.
    pub fn measure(&self, load: &Load, rounds: u32) -> anyhow::Result<Vec<Sample>> {
        (0..rounds).map(|_| at_cost(self.process.pid(), || self.run(load))).collect()
    }

    /// Starts a load that runs until it is told to end, and waits until it does run.
    pub fn run_in_background(&self, load: &Load) -> anyhow::Result<Background> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut load = Background::start("background-load", &self.folder, command.args(load.command_line()))?;
        load.wait_until_it_says(RUNNING)?;
        Ok(load)
    }

    /// Runs a command of `vasto` against it.
    pub fn command(&self, args: &[&str], within: Duration) -> anyhow::Result<String> {
        let mut command = Command::new(binary()?);
        let timeout = format!("{}s", within.as_secs());
        command.args(["--operator", &self.operator, "--timeout", &timeout]).args(args);
        Ok(run("command", &self.folder, within, &mut command)?.0)
    }

    /// Where its children write their logs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}
