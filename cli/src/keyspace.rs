//! `vasto keyspace`: what kubectl is on Kubernetes, and a few things beside.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};
use vasto_client::Compacted;
use vasto_client::v1::{
    ApplyRequest, DeleteRequest, DescribeRequest, ListRequest, Phase, ReplaceRequest, Resource, ScaleRequest, Topology,
};
use vasto_crds::{Keyspace, Phase as StatusPhase};

use crate::context::Context;
use crate::exit::{Code, fault, one_line};
use crate::keyspace_view::{self as view, Tracker};
use crate::output::{Output, emit, emit_json, emit_line, size, table};

/// The verbs of `vasto keyspace`.
#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Create or change the keyspaces of a YAML file.
    Apply {
        /// The file; -: standard input.
        #[arg(short, long, value_name = "FILE")]
        file: PathBuf,
        /// Wait until the keyspaces are as the file says.
        #[arg(short, long)]
        wait: bool,
    },
    /// List all keyspaces.
    List,
    /// Show one keyspace: spec, status, stores, shards.
    Describe {
        /// The keyspace's name.
        name: String,
        /// Go on showing each phase with records, bytes and time left, until interrupted.
        #[arg(short, long)]
        watch: bool,
    },
    /// Change the number of shards, or of copies, while it is being used.
    Scale(Scale),
    /// Empty a store and fill it anew; with one copy only, an extra store stands in meanwhile.
    Replace(Replace),
    /// Compact the files of all replicas.
    Compact {
        /// The keyspace's name.
        name: String,
    },
    /// Delete a keyspace, and its data unless its deletionPolicy is Retain.
    Delete {
        /// The keyspace's name.
        name: String,
        /// Wait until it is gone.
        #[arg(short, long)]
        wait: bool,
    },
}

/// Arguments of `vasto keyspace scale`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("sizes").required(true).multiple(true).args(["shards", "replication_factor"])))]
pub(crate) struct Scale {
    /// The keyspace's name.
    name: String,
    /// How many shards it shall have.
    #[arg(long, value_name = "N")]
    shards: Option<u32>,
    /// How many copies of each shard it shall have.
    #[arg(long, value_name = "R")]
    replication_factor: Option<u32>,
    /// Wait until it has them, showing each phase.
    #[arg(short, long)]
    wait: bool,
}

/// Arguments of `vasto keyspace replace`.
#[derive(Args, Debug)]
pub(crate) struct Replace {
    /// The keyspace's name.
    name: String,
    /// The store's name, such as store-1.
    store: String,
    /// Go on although no other copy of a shard lives: its data is lost.
    #[arg(long)]
    accept_data_loss: bool,
    /// Wait until it is done, showing each phase.
    #[arg(short, long)]
    wait: bool,
}

pub(crate) async fn run(context: &Context, verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Apply { file, wait } => apply(context, &file, wait).await,
        Verb::List => list(context).await,
        Verb::Describe { name, watch: false } => describe(context, &name).await,
        Verb::Describe { name, watch: true } => follow(context, &name, |_| false).await,
        Verb::Scale(args) => scale(context, args).await,
        Verb::Replace(args) => replace(context, args).await,
        Verb::Compact { name } => compact(context, &name).await,
        Verb::Delete { name, wait } => delete(context, &name, wait).await,
    }
}

/// Reads a file or, for `-`, standard input; the name to use in messages.
pub(crate) fn read_file(context: &Context, path: &Path) -> anyhow::Result<(String, String)> {
    if path == Path::new("-") {
        if context.in_shell {
            return Err(fault(Code::Usage, "in the shell a file must be named"));
        }
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("can't read standard input")?;
        return Ok((text, "standard input".to_string()));
    }
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("can't read {name}"))?;
    Ok((text, name))
}

async fn apply(context: &Context, file: &Path, wait: bool) -> anyhow::Result<()> {
    let (text, source) = read_file(context, file)?;
    // All are checked before the first is sent, so that a bad file changes nothing.
    let keyspaces = vasto_crds::parse(&text, &source)?;
    let mut applied = Vec::new();
    for keyspace in keyspaces {
        let request = ApplyRequest { document: keyspace.to_json() };
        let resource = context.ask(context.resources()?.apply(request)).await?;
        let (keyspace, _) = typed(&resource)?;
        done(context, keyspace.name(), "applied")?;
        applied.push(keyspace);
    }
    if wait {
        for keyspace in applied {
            follow(context, keyspace.name(), reached(&keyspace)).await?;
        }
    }
    Ok(())
}

async fn list(context: &Context) -> anyhow::Result<()> {
    let answer = context.ask(context.resources()?.list(ListRequest {})).await?;
    let items = answer.items.iter().map(typed).collect::<anyhow::Result<Vec<_>>>()?;
    match context.output() {
        Some(Output::Json) => {
            let items: Vec<Value> = items.into_iter().map(|(_, json)| json).collect();
            emit_json(&json!({"apiVersion": "v1", "kind": "List", "items": items}))
        }
        Some(Output::Raw) => emit(items.iter().map(|(k, _)| format!("{}\n", k.name())).collect::<String>()),
        _ if items.is_empty() => emit_line("no keyspaces; make one with \"vasto keyspace apply -f FILE\""),
        _ => emit(view::list(items.iter().map(|(k, _)| k), context.env.now_ms())),
    }
}

/// All keyspaces.
pub(crate) async fn all(context: &Context) -> anyhow::Result<Vec<Keyspace>> {
    let answer = context.ask(context.resources()?.list(ListRequest {})).await?;
    answer.items.iter().map(|resource| Ok(typed(resource)?.0)).collect()
}

/// Whether no change is under way and all replicas serve.
pub(crate) fn is_ready(keyspace: &Keyspace) -> bool {
    let status = keyspace.status.as_ref();
    status.is_some_and(|s| s.phase == Some(StatusPhase::Ready) && s.ready_replicas == s.replicas)
}

async fn describe(context: &Context, name: &str) -> anyhow::Result<()> {
    let (keyspace, json) = current(context, name).await?;
    if matches!(context.output(), Some(Output::Json | Output::Raw)) {
        return emit_json(&json);
    }
    // Which store has which shard is the topology's to say; without it there is still the rest.
    let handle = tokio::time::timeout(Duration::from_secs(1), context.keyspace(name)).await;
    let topology = handle.ok().and_then(Result::ok).and_then(|h| h.topology().topology.clone());
    emit(view::describe(&keyspace, topology.as_ref(), context.env.now_ms()))
}

async fn scale(context: &Context, args: Scale) -> anyhow::Result<()> {
    let Scale { name, shards, replication_factor, wait } = args;
    if replication_factor == Some(0) {
        // 0 means "as it is" on the wire.
        return Err(fault(Code::Refused, "--replication-factor is 0; it must be 1 at least"));
    }
    let shards = match shards {
        Some(shards) => shards,
        None => current(context, &name).await?.0.spec.shards,
    };
    let request = ScaleRequest { name: name.clone(), shards, replication_factor: replication_factor.unwrap_or(0) };
    let resource = context.ask(context.resources()?.scale(request)).await?;
    let (keyspace, _) = typed(&resource)?;
    done(context, &name, "scaled")?;
    if wait { follow(context, &name, reached(&keyspace)).await } else { Ok(()) }
}

async fn replace(context: &Context, args: Replace) -> anyhow::Result<()> {
    let Replace { name, store, accept_data_loss, wait } = args;
    // With a change of mind in between, only the topology's own words say that this request is through.
    let handle = if wait { Some(context.keyspace(&name).await?) } else { None };
    let topology = || handle.as_ref().and_then(|h| h.topology().topology.clone()).unwrap_or_default();
    let before = topology().replaced;
    let request = ReplaceRequest { name: name.clone(), store: store.clone(), accept_data_loss };
    context.ask(context.resources()?.replace(request)).await?;
    done(context, &name, &format!("replacing {store}"))?;
    if !wait {
        return Ok(());
    }
    follow(context, &name, |_| {
        let now: Topology = topology();
        now.replace.is_none() && now.replaced != before && now.phase() == Phase::Stable
    })
    .await
}

async fn delete(context: &Context, name: &str, wait: bool) -> anyhow::Result<()> {
    context.ask(context.resources()?.delete(DeleteRequest { name: name.to_owned() })).await?;
    done(context, name, "deleted")?;
    if !wait {
        return Ok(());
    }
    // One that is not being deleted has taken the name since.
    match follow(context, name, |now| now.metadata.deletion_timestamp.is_none()).await {
        Err(error) if crate::exit::code_of(&error) == Code::NotFound => Ok(()),
        ended => ended,
    }
}

async fn compact(context: &Context, name: &str) -> anyhow::Result<()> {
    let bar = crate::output::waiting_bar(format!("compacting {name}"));
    let done = context.keyspace(name).await?.compact().await?;
    bar.finish_and_clear();
    if context.json() {
        let row = |c: &Compacted| json!({"store": c.store, "bytesBefore": c.bytes_before, "bytesAfter": c.bytes_after});
        return emit_json(&Value::Array(done.iter().map(row).collect()));
    }
    let rows = done.into_iter().map(|c| [c.store, size(c.bytes_before), size(c.bytes_after)]);
    emit(table(&["STORE", "BEFORE", "AFTER"], rows))
}

/// Says what was done: the resource's name as kubectl does, or nothing where programs listen.
fn done(context: &Context, name: &str, what: &str) -> anyhow::Result<()> {
    match context.output() {
        None | Some(Output::Table) => emit_line(format!("keyspace {name} {what}")),
        Some(Output::Json) => emit_json(&json!({"keyspace": name, "result": what})),
        Some(Output::Raw) => Ok(()),
    }
}

/// The keyspace as it is now, typed and as it came.
async fn current(context: &Context, name: &str) -> anyhow::Result<(Keyspace, Value)> {
    let request = DescribeRequest { name: name.to_string(), watch: false };
    let mut stream = context.ask(context.resources()?.describe(request)).await?;
    let first = stream.message().await.map_err(|s| context.refusal(&s))?;
    let first = first.ok_or_else(|| fault(Code::Unavailable, "the operator's answer was cut off; try again"))?;
    typed(&first)
}

fn typed(resource: &Resource) -> anyhow::Result<(Keyspace, Value)> {
    const WHAT: &str = "the operator's answer is not a Keyspace that this version knows";
    let keyspace = Keyspace::from_json(&resource.json).context(WHAT)?;
    Ok((keyspace, serde_json::from_str(&resource.json).context(WHAT)?))
}

/// Whether a keyspace has become what this resource's spec says.
fn reached(wanted: &Keyspace) -> impl Fn(&Keyspace) -> bool + use<> {
    let generation = wanted.metadata.generation;
    move |now| {
        let Some(status) = &now.status else { return false };
        is_ready(now)
            && status.observed_generation >= generation
            && status.shards == Some(now.spec.shards)
            && status.replication_factor.is_none_or(|r| r == now.spec.replication_factor)
    }
}

/// Shows each state of a keyspace until `done` says so; goes on over an operator's restart.
async fn follow(context: &Context, name: &str, done: impl Fn(&Keyspace) -> bool) -> anyhow::Result<()> {
    let bars = std::io::stderr().is_terminal() && !context.json();
    let mut tracker = Tracker::default();
    let bar = crate::output::phase_bar();
    let mut said_away = false;
    let mut known = false;
    loop {
        let request = DescribeRequest { name: name.to_string(), watch: true };
        let opened = context.ask(context.resources()?.describe(request)).await;
        let mut stream = match opened {
            Ok(stream) => stream,
            // At first there must be an operator; later it may be restarting.
            Err(error) if known && crate::exit::code_of(&error) == Code::Unavailable => {
                if !said_away {
                    bar.suspend(|| eprintln!("waiting: {}", one_line(&error)));
                    said_away = true;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut last: Option<Keyspace> = None;
        loop {
            // What `done` looks at may change between two states of the resource.
            let next = tokio::time::timeout(Duration::from_millis(250), stream.message()).await;
            match next {
                Err(_) => {}
                Ok(Ok(Some(resource))) => {
                    let (keyspace, json) = typed(&resource)?;
                    (known, said_away) = (true, false);
                    if context.json() {
                        emit_line(json.to_string())?;
                    } else {
                        let now = Instant::now();
                        if let Some(line) = tracker.next(&keyspace, now) {
                            bar.suspend(|| emit_line(line))?;
                        }
                        let line = tracker.line(&keyspace);
                        if bars {
                            show(&bar, &keyspace, &line);
                        } else if tracker.is_news(&line, now) {
                            emit_line(&line)?;
                        }
                    }
                    last = Some(keyspace);
                }
                Ok(Err(status)) if status.code() == tonic::Code::NotFound => {
                    bar.finish_and_clear();
                    return Err(context.refusal(&status));
                }
                Ok(Ok(None) | Err(_)) => break,
            }
            if last.as_ref().is_some_and(&done) {
                bar.finish_and_clear();
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Puts a state on the bar: a share where totals are known.
fn show(bar: &indicatif::ProgressBar, keyspace: &Keyspace, line: &str) {
    let progress = keyspace.status.as_ref().and_then(|s| s.progress.as_ref());
    let share = progress.and_then(|p| match (p.records, p.records_total) {
        (Some(records), Some(total)) if total > 0 => Some((records as f64 / total as f64).min(1.0)),
        _ => None,
    });
    bar.set_position((share.unwrap_or(0.0) * 1000.0) as u64);
    bar.set_message(line.to_string());
}
