//! Runs the binary: a cluster of `vasto up` on a free port, and commands against it.
#![allow(dead_code, reason = "each test file uses its own part of it")]
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Three stores, two copies.
pub const PACKAGES: &str = "
apiVersion: vasto.io/v1alpha1
kind: Keyspace
metadata: {name: packages}
spec: {shards: 3, replicationFactor: 2}
";

/// What a command printed, and its exit code.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Done {
    /// Fails unless the exit code is this and standard error has these words.
    #[track_caller]
    pub fn fails(&self, code: i32, words: &str) {
        assert!(self.code == code && self.err.contains(words), "wanted {code} and {words:?}: {self:?}");
        assert!(self.err.starts_with("error: ") && self.err.lines().count() == 1, "not one line of error: {self:?}");
    }

    /// What it printed, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "{self:?}");
        self.out
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vasto"));
    command.args(args).env_remove("VASTO_OPERATOR").env_remove("RUST_LOG");
    command
}

/// Runs a command with nothing on standard input.
pub fn vasto(args: &[&str]) -> Done {
    command(args).stdin(Stdio::null()).output().unwrap().into()
}

/// A cluster in a folder of its own; it is killed with this value.
pub struct Cluster {
    pub folder: tempfile::TempDir,
    pub operator: String,
    up: Child,
}

impl Cluster {
    /// Starts a cluster and waits until its keyspace is ready.
    pub fn start(document: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("keyspace.yaml"), document).unwrap();
        let data = folder.path().join("data");
        Self::start_in(folder, &data, more)
    }

    /// The same with data elsewhere.
    pub fn start_in(folder: tempfile::TempDir, data: &Path, more: &[&str]) -> Self {
        let (up, operator) = up(&folder.path().join("keyspace.yaml"), data, more);
        Self { folder, operator, up }
    }

    /// SIGKILL, then a start with these arguments beside.
    pub fn crash(&mut self, more: &[&str]) {
        self.up.kill().unwrap();
        self.up.wait().unwrap();
        (self.up, self.operator) = up(&self.path("keyspace.yaml"), &self.path("data"), more);
    }

    /// A file of the cluster's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into the cluster's folder; its path.
    pub fn file(&self, name: &str, content: &str) -> String {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name).display().to_string()
    }

    /// Runs a command against this cluster.
    pub fn run(&self, args: &[&str]) -> Done {
        vasto(&[args, &["--operator", &self.operator]].concat())
    }

    /// The same with standard input.
    pub fn run_with(&self, args: &[&str], input: &[u8]) -> Done {
        let mut command = command(args);
        command.args(["--operator", &self.operator]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A command that refuses may not read to the end.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap().into()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

/// Starts `vasto up` and reads what it prints until its keyspaces are ready.
fn up(file: &Path, data: &Path, more: &[&str]) -> (Child, String) {
    let (file, data) = (file.display().to_string(), data.display().to_string());
    let args = ["up", "-f", &file, "--data", &data, "--listen", "127.0.0.1:0", "--log", "warn"];
    // Tests run beside one another, and beside whatever this machine has on the usual ports.
    let alone = ["--redis", "off", "--http", "off", "--grpc", "off", "--console", "off"];
    let mut child =
        command(&[&args, &alone[..], more].concat()).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let operator = first.split("listens on ").nth(1).unwrap().split(',').next().unwrap().to_string();
    let ready = lines.next().unwrap().unwrap();
    assert!(ready.contains("is ready"), "{ready}");
    (child, operator)
}
