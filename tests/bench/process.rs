//! Children: each is started with its output in a log and ended by its own pid on every way out; and what they
//! cost, in CPU time and memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use crate::sample::Sample;

/// A tick of /proc/PID/stat: Linux says 100 a second to all programs.
const TICK: Duration = Duration::from_millis(10);
/// How long a server may take to stop when asked.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// Pids of children that run.
static LIVE: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
/// What is removed when a signal ends this process.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

fn live() -> MutexGuard<'static, BTreeSet<u32>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `look` until it has something, or says what did not come within this time.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", within.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A signal that ends this process ends its children and removes its folder too, which a destructor would not.
pub fn end_children_on_signals(folder: &Path) -> anyhow::Result<()> {
    let _ = FOLDER.set(folder.to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
            let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = signals else { return };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        // Kept locked: nothing is started any more.
        let live = live();
        live.iter().for_each(|pid| send(*pid, Signal::SIGKILL));
        if let Some(folder) = FOLDER.get() {
            let _ = std::fs::remove_dir_all(folder);
        }
        std::process::exit(130);
    });
    Ok(())
}

fn send(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        // One that is gone already needs no signal.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// CPU time of a process, of all its threads and of the children it has waited for.
pub fn cpu_of(pid: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    // The name before it, in brackets, may hold anything.
    let rest = text.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: Option<u32> = fields.get(11..15).map(|times| times.iter().filter_map(|t| t.parse::<u32>().ok()).sum());
    Ok(TICK * ticks.with_context(|| format!("{path} has no times: {text:?}"))?)
}

/// The most memory that a process has held, in bytes.
pub fn peak_memory_of(pid: u32) -> anyhow::Result<u64> {
    memory(pid, "VmHWM")
}

/// The memory that a process holds, in bytes.
pub fn memory_of(pid: u32) -> anyhow::Result<u64> {
    memory(pid, "VmRSS")
}

fn memory(pid: u32, field: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kilobytes.with_context(|| format!("{path} has no {field}"))? * 1024)
}

/// Runs a measurement and adds what it cost the server with this pid.
pub fn at_cost(pid: u32, measure: impl FnOnce() -> anyhow::Result<Sample>) -> anyhow::Result<Sample> {
    let before = cpu_of(pid)?;
    let mut sample = measure()?;
    sample.server_cpu = Some(cpu_of(pid)?.saturating_sub(before).as_secs_f64());
    sample.memory = Some(peak_memory_of(pid)?);
    Ok(sample)
}

/// CPU time that this process has used.
pub fn own_cpu() -> Duration {
    usage(UsageWho::RUSAGE_SELF)
}

fn usage(who: UsageWho) -> Duration {
    let micros = getrusage(who).map(|u| (u.user_time() + u.system_time()).num_microseconds()).unwrap_or(0);
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// A child that ends with this value.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with nothing to read; what it prints goes to `NAME.log` in the folder.
    pub fn start(name: &str, folder: &Path, command: &mut Command) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("can't write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Self::spawn(name, log, command)
    }

    /// Starts it with what it prints on standard output to be read by `finish`, and its input open until then.
    fn piped(name: &str, folder: &Path, command: &mut Command) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("can't write {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        Self::spawn(name, log, command)
    }

    fn spawn(name: &str, log: PathBuf, command: &mut Command) -> anyhow::Result<Self> {
        let mut live = live();
        let child = command.spawn().with_context(|| format!("can't start {:?}", command.get_program()))?;
        live.insert(child.id());
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed, where that goes to a log.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// An error if it has ended, with the end of its log.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}; its last words:\n{}", self.name, self.last_words()),
        }
    }

    fn last_words(&self) -> String {
        let text = self.printed();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Asks it to stop and waits until it has; one that does not is killed.
    pub fn stop(mut self) {
        send(self.pid(), Signal::SIGTERM);
        let _ = wait_for("its end", STOP_WITHIN, || Ok(self.child.try_wait()?));
    }

    /// Closes its input, waits for its end, and returns what it printed and the CPU time that it used.
    fn finish(mut self, within: Duration) -> anyhow::Result<(String, Duration)> {
        drop(self.child.stdin.take());
        let mut out = self.child.stdout.take().context("its output has been read")?;
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let read = out.read_to_string(&mut text);
            let _ = sender.send(read.map(|_| text));
        });
        let Ok(text) = receiver.recv_timeout(within) else {
            bail!("{} did not end within {} s", self.name, within.as_secs());
        };
        let before = usage(UsageWho::RUSAGE_CHILDREN);
        let status = self.child.wait()?;
        let cpu = usage(UsageWho::RUSAGE_CHILDREN).saturating_sub(before);
        let text = text?;
        if !status.success() {
            bail!("{} ended with {status}; its last words:\n{text}{}", self.name, self.last_words());
        }
        Ok((text, cpu))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Only while it has not been waited for is the pid surely its own; std knows.
        let _ = self.child.kill();
        let _ = self.child.wait();
        live().remove(&self.pid());
    }
}

/// Runs a command to its end: what it printed, and the CPU time that it used.
pub fn run(name: &str, folder: &Path, within: Duration, command: &mut Command) -> anyhow::Result<(String, Duration)> {
    Process::piped(name, folder, command)?.finish(within)
}

/// A child that goes on until its input ends.
pub struct Background(Process);

impl Background {
    /// Starts it.
    pub fn start(name: &str, folder: &Path, command: &mut Command) -> anyhow::Result<Self> {
        Process::piped(name, folder, command).map(Self)
    }

    /// Waits for this on its standard error.
    pub fn wait_until_it_says(&mut self, words: &str) -> anyhow::Result<()> {
        wait_for(words, Duration::from_secs(20), || {
            self.0.check()?;
            Ok(self.0.printed().contains(words).then_some(()))
        })
    }

    /// Tells it to end, and returns what it printed.
    pub fn finish(self, within: Duration) -> anyhow::Result<String> {
        Ok(self.0.finish(within)?.0)
    }
}
