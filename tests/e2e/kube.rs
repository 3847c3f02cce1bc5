//! kubectl and helm, and waiting for a state by looking at it.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::process::{self, Output};

/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// The one cluster, by its own kubeconfig: nobody's `~/.kube/config` is touched.
#[derive(Clone)]
pub struct Kube {
    /// The run's files; its `bin` has kubectl's plugin.
    pub folder: PathBuf,
}

impl Kube {
    /// The kubeconfig of the cluster.
    pub fn config(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    fn command(&self, program: &str, seconds: u64, args: &[&str]) -> Command {
        let mut command = process::command(program, seconds);
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", self.folder.join("bin").display());
        command.env("KUBECONFIG", self.config()).env("PATH", path).args(args);
        command
    }

    /// kubectl with these arguments, ended after so many seconds: what it printed.
    pub fn ctl_within(&self, seconds: u64, args: &[&str]) -> anyhow::Result<String> {
        process::succeed(self.command("kubectl", seconds, args), "")
    }

    /// kubectl for what takes no time.
    pub fn ctl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.ctl_within(60, args)
    }

    /// kubectl, whether it succeeds or not.
    pub fn try_ctl(&self, seconds: u64, args: &[&str]) -> anyhow::Result<Output> {
        process::finish(self.command("kubectl", seconds, args), "")
    }

    /// kubectl's lines as they come.
    pub fn follow(&self, seconds: u64, args: &[&str]) -> anyhow::Result<impl Iterator<Item = String> + use<>> {
        let mut command = self.command("kubectl", seconds, args);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let out = child.stdout.context("no output to follow")?;
        Ok(BufReader::new(out).lines().map_while(Result::ok))
    }

    /// Applies this text.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        process::succeed(self.command("kubectl", 60, &["apply", "-f", "-"]), yaml).map(drop)
    }

    /// helm with these arguments.
    pub fn helm(&self, args: &[&str]) -> anyhow::Result<String> {
        process::succeed(self.command("helm", 240, args), "")
    }

    /// An object, or a list with `-l` or `-A`; `None` where it isn't there.
    pub fn get(&self, args: &[&str]) -> anyhow::Result<Option<Value>> {
        let args = [&["get", "--ignore-not-found", "--request-timeout=20s", "-o", "json"], args].concat();
        let text = self.ctl(&args)?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text).with_context(|| format!("kubectl {} gave no JSON", args.join(" ")))?))
    }

    /// The objects of a list.
    pub fn list(&self, args: &[&str]) -> anyhow::Result<Vec<Value>> {
        let list = self.get(args)?.unwrap_or_default();
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }
}

/// Looks until there is something to see. An error while looking is a state like any
/// other, and told where it is the last one.
pub fn until<T>(what: &str, seconds: u64, mut look: impl FnMut() -> anyhow::Result<Seen<T>>) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let found = match look() {
            Ok(Seen::Yes(found)) => return Ok(found),
            Ok(Seen::No(instead)) => instead,
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() > deadline {
            bail!("{what}: not within {seconds} s; last: {found}");
        }
        std::thread::sleep(LOOK);
    }
}

/// What a look found: the state, or in words what there is instead.
pub enum Seen<T> {
    Yes(T),
    No(String),
}

impl Seen<()> {
    /// Yes, if so.
    pub fn when(so: bool, instead: impl FnOnce() -> String) -> Self {
        if so { Self::Yes(()) } else { Self::No(instead()) }
    }
}

/// `metadata.name`.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// `metadata.uid`.
pub fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap_or_default()
}

/// Whether the status has this condition as True.
pub fn condition(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().any(|c| c["type"] == kind && c["status"] == "True")
}

/// Whether a pod is ready and is to stay.
pub fn ready(pod: &Value) -> bool {
    condition(pod, "Ready") && pod["metadata"]["deletionTimestamp"].is_null()
}

/// How often a pod's containers were restarted.
pub fn restarts(pod: &Value) -> u64 {
    let containers = pod["status"]["containerStatuses"].as_array().map(Vec::as_slice).unwrap_or_default();
    containers.iter().filter_map(|c| c["restartCount"].as_u64()).sum()
}
