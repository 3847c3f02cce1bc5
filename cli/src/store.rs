//! `vasto store`: one store on its own, or as a child of `vasto up --processes`.

use std::io::Read;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::context::{Context, parse_address};
use crate::listen::{listen, listen_as_before, stop_on_signals};
use crate::output::emit_line;

/// Arguments of `vasto store`.
#[derive(Args, Debug)]
pub(crate) struct Store {
    /// Its name in the topology, such as store-0; a data folder belongs to one name.
    #[arg(long)]
    name: String,
    /// Its data folder, made if it isn't there.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where to listen.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8279", value_parser = parse_address)]
    listen: String,
    /// Where others reach it, if that is not where it listens.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    advertise: Option<String>,
    /// Listen on the port that this file names, else on any, and keep it there.
    #[arg(long, value_name = "FILE", hide = true)]
    keep_port: Option<PathBuf>,
    /// Stop when standard input ends: so a child goes with its parent, however that went.
    #[arg(long, hide = true)]
    until_input_ends: bool,
}

pub(crate) async fn run(context: &Context, args: Store) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let what = format!("store {}", args.name);
    let listener = match &args.keep_port {
        Some(file) => listen_as_before(&what, file).await?,
        None => listen(&what, &args.listen, "--listen").await?,
    };
    let address = listener.local_addr()?;
    if args.until_input_ends {
        stop_when_input_ends(stop.clone());
    }
    let mut options = vasto_store::Options::new(args.name.clone(), args.data, context.global.operator.clone());
    options.advertise = args.advertise;
    emit_line(format!("{what} listens on {address}, operator {}", context.global.operator))?;
    vasto_store::serve(options, context.env.clone(), listener, stop).await.context(what)
}

fn stop_when_input_ends(stop: CancellationToken) {
    // Not a task: a read of standard input can't be interrupted, and must not hold up the end.
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut sink = [0; 64];
        while !matches!(input.read(&mut sink), Ok(0) | Err(_)) {}
        info!("the parent has gone: stopping");
        stop.cancel();
    });
}
