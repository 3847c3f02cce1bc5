//! The one binary: servers (`up`, `operator`, `store`), the verbs of the map,
//! keyspaces as resources, and what helps to look inside.

mod bench;
mod check;
mod codec;
mod context;
mod data;
mod dump;
mod exit;
mod gateway;
mod http;
mod keyspace;
mod keyspace_view;
mod kubectl;
mod listen;
mod load;
mod locate;
mod operator;
mod output;
mod probe;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod processor;
mod runner;
mod shell;
mod store;
mod up;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

use crate::context::{Context, Global};
use crate::exit::{Code, code_of, fault, one_line};

/// A distributed, persistent key-value map whose clusters grow, shrink and heal while in use.
#[derive(Parser, Debug)]
#[command(name = "vasto", version, after_help = exit::HELP, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Every command; each has a file of its name.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine: operator and stores.
    Up(up::Up),
    /// Run an operator alone.
    Operator(operator::Operator),
    /// Run a store alone.
    Store(store::Store),
    /// Run a gateway: Redis' protocol, HTTP and gRPC, for programs without a Vasto client.
    Gateway(gateway::Gateway),
    /// Put a value under a key.
    Put(data::Put),
    /// Print the value of a key.
    Get(data::Get),
    /// Delete a key.
    Delete(data::Delete),
    /// Print keys and values in order of the keys.
    Scan(data::Scan),
    /// Add to the number under a key.
    Add(data::Merge),
    /// Append to the bytes under a key.
    Append(data::Append),
    /// Keep the greater of a number and what the key holds.
    Max(data::Merge),
    /// Keep the lesser of a number and what the key holds.
    Min(data::Merge),
    /// Put every record of a file.
    Load(load::Load),
    /// Write every record to a file.
    Dump(dump::Dump),
    /// Apply, list, describe, scale, replace, compact and delete keyspaces.
    #[command(alias = "ks", subcommand)]
    Keyspace(keyspace::Verb),
    /// What kubectl lacks for keyspaces; also as `kubectl vasto`, by a link named kubectl-vasto to this binary.
    Kubectl(kubectl::Kubectl),
    /// Compare all replicas of all shards, record by record.
    Check(check::Check),
    /// Print which shard and stores a key belongs to.
    Locate(locate::Locate),
    /// Measure throughput and latency.
    Bench(bench::Bench),
    /// Ask a server over HTTP whether it is well.
    #[command(hide = true)]
    Probe(probe::Probe),
    /// Commands at a prompt, with history and completion.
    Shell,
}

/// A fifth of what a read costs is memory that one thread asks for and another gives back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

impl Command {
    fn is_server(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Operator(_) | Self::Store(_) | Self::Gateway(_))
    }

    /// A runtime for it. Whoever only asks has one thread: with more, each answer wakes one thread by way of another.
    fn runtime(&self) -> io::Result<Runtime> {
        let mut builder = Builder::new_multi_thread();
        match self {
            Self::Bench(bench) => _ = builder.worker_threads(bench.threads()),
            server if server.is_server() => {}
            _ => _ = builder.worker_threads(1),
        }
        builder.enable_all().build()
    }
}

/// The command line; under the name kubectl-vasto it is that of the plugin.
fn parse() -> Cli {
    let name = std::env::args_os().next().map(std::path::PathBuf::from);
    let plugin = name.as_deref().and_then(std::path::Path::file_name).is_some_and(|n| n == "kubectl-vasto");
    if plugin { kubectl::Plugin::parse().into() } else { Cli::parse() }
}

fn main() -> ExitCode {
    let Cli { global, command } = parse();
    if let Err(error) = logs(&global, &command) {
        return report(&Err(error)).into();
    }
    let runtime = match command.runtime() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Err(anyhow::Error::new(error).context("can't start"))).into(),
    };
    let code = match command {
        Command::Shell => match shell::run(&runtime, global) {
            Ok(code) => code,
            Err(error) => report(&Err(error)),
        },
        server if server.is_server() => {
            listen::raise_open_files();
            report(&Context::serving(global).and_then(|c| runtime.block_on(run(&c, server))))
        }
        verb => report(&runtime.block_on(run_until_interrupted(&Context::new(global, false), verb))),
    };
    // A thread that still reads standard input must not hold up the end.
    runtime.shutdown_background();
    code.into()
}

/// Prints what went wrong, if anything did; the code to exit with.
pub(crate) fn report(result: &anyhow::Result<()>) -> Code {
    let Err(error) = result else { return Code::Ok };
    let code = code_of(error);
    if code != Code::Ok {
        eprintln!("error: {}", one_line(error));
    }
    code
}

/// Logs go to standard error: what servers do, and what goes wrong in one-shot commands.
fn logs(global: &Global, command: &Command) -> anyhow::Result<()> {
    let usual = if command.is_server() { "info" } else { "warn" };
    let from_environment = || std::env::var("RUST_LOG").ok().filter(|f| !f.is_empty());
    let filter = global.log.clone().or_else(from_environment).unwrap_or_else(|| usual.to_string());
    let filter = EnvFilter::try_new(&filter).map_err(|e| {
        fault(Code::Usage, format!("the log filter {filter:?}: {e}; write it like info or vasto_store=debug"))
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && output::no_color_unset())
        .init();
    Ok(())
}

/// Runs a one-shot command; Ctrl-C ends it, after what it made half is put away.
pub(crate) async fn run_until_interrupted(context: &Context, command: Command) -> anyhow::Result<()> {
    tokio::select! {
        result = run(context, command) => result,
        _ = tokio::signal::ctrl_c() => Err(fault(Code::Failure, "interrupted")),
    }
}

async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    use vasto_client::Merge;
    match command {
        Command::Up(args) => Box::pin(up::run(context, args)).await,
        Command::Operator(args) => Box::pin(operator::run(context, args)).await,
        Command::Store(args) => Box::pin(store::run(context, args)).await,
        Command::Gateway(args) => Box::pin(gateway::run(context, args)).await,
        Command::Put(args) => Box::pin(data::put(context, args)).await,
        Command::Get(args) => Box::pin(data::get(context, args)).await,
        Command::Delete(args) => Box::pin(data::delete(context, args)).await,
        Command::Scan(args) => Box::pin(data::scan(context, args)).await,
        Command::Add(args) => Box::pin(data::merge(context, args, Merge::Add)).await,
        Command::Max(args) => Box::pin(data::merge(context, args, Merge::Max)).await,
        Command::Min(args) => Box::pin(data::merge(context, args, Merge::Min)).await,
        Command::Append(args) => Box::pin(data::append(context, args)).await,
        Command::Load(args) => Box::pin(load::run(context, args)).await,
        Command::Dump(args) => Box::pin(dump::run(context, args)).await,
        Command::Keyspace(verb) => Box::pin(keyspace::run(context, verb)).await,
        Command::Check(args) => Box::pin(check::run(context, args)).await,
        Command::Locate(args) => Box::pin(locate::run(context, args)).await,
        Command::Bench(args) => Box::pin(bench::run(context, args)).await,
        Command::Kubectl(args) => Box::pin(kubectl::run(context, args)).await,
        Command::Probe(args) => Box::pin(probe::run(args)).await,
        // Main runs it: a prompt needs a thread that is not the runtime's.
        Command::Shell => Err(fault(Code::Usage, "the shell is running already")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
        for (line, fits) in [
            ("keyspace scale p", false),
            ("keyspace scale p --shards 5", true),
            ("keyspace scale p --replication-factor 2", true),
            ("add p k -5", true),
            ("put p k", true),
            ("scan p --limit 3 --output json", true),
            ("get p k --operator nowhere", false),
            ("put p k v --ttl 0s", false),
            ("operator --local x --namespace y", false),
            ("kubectl status", true),
            ("kubectl replace packages store-1 --accept-data-loss -n shop", true),
        ] {
            let parsed = Cli::try_parse_from(std::iter::once("vasto").chain(line.split(' ')));
            assert_eq!(parsed.is_ok(), fits, "{line}");
        }
    }
}
