//! Other programs, each with a time limit.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// What a program left.
pub struct Output {
    pub ok: bool,
    pub out: String,
    pub err: String,
}

impl Output {
    /// Both streams, as a person would see them.
    pub fn words(&self) -> String {
        format!("{}{}", self.out, self.err).trim().to_owned()
    }
}

/// A program that is ended after so many seconds.
pub fn command(program: &str, seconds: u64) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", &seconds.to_string(), program]);
    command
}

/// As one would type it.
fn shown(command: &Command) -> String {
    command.get_args().skip(2).map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs it to its end, with this on its standard input.
pub fn finish(mut command: Command, input: &str) -> anyhow::Result<Output> {
    let shown = shown(&command);
    let piped = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    command.stdin(piped).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("can't start {shown}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading it all says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| shown)?;
    Ok(Output {
        ok: output.status.success(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs it; an error with its words unless it succeeds.
pub fn succeed(command: Command, input: &str) -> anyhow::Result<String> {
    let shown = shown(&command);
    let output = finish(command, input)?;
    if !output.ok {
        bail!("{shown}: {}", output.words());
    }
    Ok(output.out)
}
