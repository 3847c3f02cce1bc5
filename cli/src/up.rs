//! `vasto up`: a whole cluster on this machine, operator and stores, over one data folder.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use vasto_client::ScanOptions;
use vasto_operator::local::{Operator, Options};

use crate::context::{Context, parse_address};
use crate::gateway::{self, Place, Ports, Taken};
use crate::http;
use crate::listen::{listen, stop_on_signals};
use crate::output::{counted, emit_line, span};
use crate::runner::{Runner, Setting};

/// Arguments of `vasto up`.
#[derive(Args, Debug)]
pub(crate) struct Up {
    /// Apply the keyspaces of this YAML file, and follow its edits. May be given several times.
    #[arg(short, long, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// The folder for everything that is kept, made if it isn't there.
    #[arg(long, value_name = "DIR", default_value = "./vasto-data")]
    data: PathBuf,
    /// Where the operator listens; stores get free ports of this machine.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8278", value_parser = parse_address)]
    listen: String,
    /// Run each store as a process of its own.
    #[arg(long)]
    processes: bool,
    /// Where to show the console, a page for people (127.0.0.1:8282 unless given), or off.
    #[arg(long, value_name = "HOST:PORT", value_parser = gateway::parse_place)]
    console: Option<Place>,
    #[command(flatten)]
    gateway: Ports,
    /// The keyspace of Redis clients that have selected none; not needed where there is only one.
    #[arg(long, value_name = "NAME")]
    keyspace: Option<String>,
}

pub(crate) async fn run(context: &Context, args: Up) -> anyhow::Result<()> {
    let start = Instant::now();
    let stop = stop_on_signals()?;
    let listener = listen("the operator", &args.listen, "--listen").await?;
    let address = listener.local_addr()?;
    let mut options = Options::new(args.data.join("operator"), context.env.clone());
    options.files = args.file;
    let console = options.console.clone();
    // What is wrong with a file or a folder is told before anything runs.
    let operator = Operator::open(options)?;
    let names = operator.keyspaces().map(|k| k.name().to_string()).collect();
    let runner = Runner::new(Setting {
        data: args.data.clone(),
        operator: reachable(address).to_string(),
        env: context.env.clone(),
        processes: args.processes,
        log: context.global.log.clone(),
    });
    let stop_operator = CancellationToken::new();
    let mut serving = tokio::spawn(operator.serve(listener, runner.clone(), stop_operator.clone()));
    emit_line(format!("vasto is up: the operator listens on {address}, data is in {}", args.data.display()))?;
    if let Some(listener) =
        gateway::open("the console", args.console, "127.0.0.1:8282", "--console", Taken::GoOn).await?
    {
        emit_line(format!("console: http://{}/", listener.local_addr()?))?;
        tokio::spawn(http::serve(listener, Arc::new(console), stop.clone()));
    }
    let here = context.at(reachable(address).to_string());
    let gateway = gateway::start(&here, args.gateway, args.keyspace, Taken::GoOn).await?;
    let announcing = AbortOnDropHandle::new(tokio::spawn(announce(here, names, start)));

    let ended = tokio::select! {
        ended = &mut serving => Some(ended),
        () = stop.cancelled() => None,
    };
    drop(announcing);
    gateway.stop().await;
    // Stores first, so that they can tell the operator that they leave on purpose.
    runner.stop().await;
    stop_operator.cancel();
    let ended = match ended {
        Some(ended) => ended,
        None => serving.await,
    };
    Ok(ended.context("the operator panicked")??)
}

/// Where stores of this machine reach a listener.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        let own = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        address.set_ip(own);
    }
    address
}

/// Says when each keyspace that is there at the start, or is in its files, serves.
async fn announce(context: Context, mut waiting: BTreeSet<String>, start: Instant) {
    let mut known = false;
    while !known || !waiting.is_empty() {
        if let Ok(keyspaces) = crate::keyspace::all(&context).await {
            if !known {
                waiting.extend(keyspaces.iter().map(|k| k.name().to_string()));
                known = true;
            }
            for keyspace in keyspaces.iter().filter(|k| crate::keyspace::is_ready(k)) {
                let name = keyspace.name();
                if waiting.contains(name) && answers(&context, name).await {
                    waiting.remove(name);
                    let (shards, time) = (counted(keyspace.spec.shards.into(), "shard"), span(start.elapsed()));
                    let _ = emit_line(format!("keyspace {name} is ready: {shards}, {time} after the start"));
                }
            }
        }
        // Often while it may be any moment.
        let pause = if start.elapsed() < Duration::from_secs(10) { 50 } else { 1000 };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Whether every shard answers: after a restart, a status may be from before it. A scan asks them all.
async fn answers(context: &Context, name: &str) -> bool {
    let Ok(keyspace) = context.keyspace(name).await else { return false };
    let first = keyspace.scan(ScanOptions::new().limit(1)).next().await;
    !matches!(first, Some(Err(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_find_an_operator_that_listens_everywhere() {
        for (listening, reached) in
            [("0.0.0.0:8278", "127.0.0.1:8278"), ("[::]:8278", "[::1]:8278"), ("10.0.0.7:1", "10.0.0.7:1")]
        {
            assert_eq!(reachable(listening.parse().unwrap()).to_string(), reached);
        }
    }
}
