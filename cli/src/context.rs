//! What every command is given: where the operator is, how to print, how long
//! to wait; and the connections, made when first used and kept (by the shell).

use std::future::Future;
use std::sync::OnceLock;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::Args;
use tonic::transport::Channel;
use vasto_client::env::Env;
use vasto_client::threads::Threads;
use vasto_client::v1::keyspaces_client::KeyspacesClient;
use vasto_client::{Client, Keyspace};

use crate::exit::{Code, fault, status_code};
use crate::output::Output;

/// Options that every command takes.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// Where the operator listens.
    #[arg(
        long, global = true, value_name = "HOST:PORT", env = "VASTO_OPERATOR",
        default_value = "127.0.0.1:8278", value_parser = parse_address, help_heading = "Global options"
    )]
    pub(crate) operator: String,
    /// How to print. By default for people; `get` prints bare bytes off a terminal.
    #[arg(long, global = true, value_name = "FORMAT", help_heading = "Global options")]
    pub(crate) output: Option<Output>,
    /// How long an operation may take.
    #[arg(
        long, global = true, value_name = "TIME", default_value = "10s",
        value_parser = parse_duration, help_heading = "Global options"
    )]
    pub(crate) timeout: Duration,
    /// Logs to print, as in RUST_LOG: error, warn, info, debug, or a filter like vasto_store=debug.
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Global options")]
    pub(crate) log: Option<String>,
}

/// See the module.
pub(crate) struct Context {
    pub(crate) global: Global,
    pub(crate) env: Env,
    /// Commands come from the shell, which has standard input for itself.
    pub(crate) in_shell: bool,
    client: OnceLock<Client>,
}

impl Context {
    pub(crate) fn new(global: Global, in_shell: bool) -> Self {
        Self { global, env: Env::real().with_near_stores(), in_shell, client: OnceLock::new() }
    }

    /// For a server: it has a thread for each core to serve connections.
    pub(crate) fn serving(global: Global) -> anyhow::Result<Self> {
        let threads = Threads::start(available_parallelism().map_or(1, usize::from))?;
        let context = Self::new(global, false);
        Ok(Self { env: context.env.clone().with_threads(threads), ..context })
    }

    /// The same with another operator.
    pub(crate) fn at(&self, operator: String) -> Self {
        let global = Global { operator, ..self.global.clone() };
        Self { global, env: self.env.clone(), in_shell: self.in_shell, client: OnceLock::new() }
    }

    /// The output that was asked for.
    pub(crate) fn output(&self) -> Option<Output> {
        self.global.output
    }

    /// Whether JSON was asked for.
    pub(crate) fn json(&self) -> bool {
        self.global.output == Some(Output::Json)
    }

    /// The client of all commands.
    pub(crate) fn client(&self) -> &Client {
        let (env, operator) = (&self.env, &self.global.operator);
        self.client.get_or_init(|| Client::with(env.clone(), operator.clone()).deadline(self.global.timeout))
    }

    /// The keyspace of this name.
    pub(crate) async fn keyspace(&self, name: &str) -> anyhow::Result<Keyspace> {
        Ok(self.client().keyspace(name).await?)
    }

    /// The operator's keyspaces, as resources.
    pub(crate) fn resources(&self) -> anyhow::Result<KeyspacesClient<Channel>> {
        Ok(self.client().keyspaces()?)
    }

    /// The operator's answer to a call, within the timeout.
    pub(crate) async fn ask<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> anyhow::Result<T> {
        match tokio::time::timeout(self.global.timeout, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.refusal(&status)),
            Err(_) => Err(fault(
                Code::Unavailable,
                format!(
                    "the operator at {} did not answer within {}; try again, or give it longer with --timeout",
                    self.global.operator,
                    humantime::format_duration(self.global.timeout)
                ),
            )),
        }
    }

    /// The error for what the operator answered.
    pub(crate) fn refusal(&self, status: &tonic::Status) -> anyhow::Error {
        if status.code() == tonic::Code::Unimplemented {
            let message = "this operator runs on Kubernetes, where keyspaces are resources: use kubectl (get, apply, scale, \
                           delete keyspaces) and kubectl vasto";
            return fault(Code::Refused, message);
        }
        let code = status_code(status.code());
        let message = if status.message().is_empty() { status.code().description() } else { status.message() };
        // A connection that fails has its causes with it; a refusal by the operator itself has none.
        let mut cause = std::error::Error::source(status);
        if code != Code::Unavailable || cause.is_none() {
            return fault(code, message);
        }
        let mut why = message.to_string();
        while let Some(next) = cause {
            why = next.to_string();
            cause = next.source();
        }
        let operator = &self.global.operator;
        fault(
            code,
            format!(
                "the operator at {operator} can't be reached: {why}; start one with \"vasto up\", \
                 or say where it is with --operator or VASTO_OPERATOR"
            ),
        )
    }
}

/// Takes HOST:PORT.
pub(crate) fn parse_address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok() => {
            Ok(text.to_string())
        }
        _ => Err("it must be HOST:PORT, for example 127.0.0.1:8278".into()),
    }
}

/// Takes a duration above zero: 500ms, 10s, 2h 30m, 7d.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time >= Duration::from_millis(1) => Ok(time),
        Ok(_) => Err("it must be 1ms at least".into()),
        Err(error) => Err(format!("{error}; write it like 500ms, 10s, 2h or 7d")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_durations() {
        assert!(parse_address("127.0.0.1:8278").is_ok());
        assert!(parse_address("[::1]:8278").is_ok());
        for bad in ["8278", ":8278", "localhost", "http://localhost:8278", "host:99999"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert!(parse_duration("0s").is_err());
        assert!(parse_duration("soon").is_err());
    }
}
