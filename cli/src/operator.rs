//! `vasto operator`: an operator on its own, for stores that others start.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use vasto_operator::local::{self, External, Options};

use crate::context::{Context, parse_address};
use crate::listen::{listen, stop_on_signals};
use crate::output::emit_line;

/// Arguments of `vasto operator`.
#[derive(Args, Debug)]
pub(crate) struct Operator {
    /// Keep keyspaces as YAML files in this folder, made if it isn't there.
    #[arg(long, value_name = "DIR", required = true)]
    local: PathBuf,
    /// Apply the keyspaces of this YAML file, and follow its edits. May be given several times.
    #[arg(short, long, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Where to listen.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8278", value_parser = parse_address)]
    listen: String,
}

pub(crate) async fn run(context: &Context, args: Operator) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let listener = listen("the operator", &args.listen, "--listen").await?;
    let mut options = Options::new(args.local, context.env.clone());
    options.files = args.file;
    let operator = local::Operator::open(options)?;
    emit_line(format!("operator listens on {}", listener.local_addr()?))?;
    Ok(operator.serve(listener, Arc::new(External), stop).await?)
}
