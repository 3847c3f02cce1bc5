//! `kubectl vasto`: this same binary under the name kubectl-vasto, for what kubectl
//! alone does not do: a readable status, replacing a store, restarting stores. It
//! speaks to the API server only, as the user.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use futures::StreamExt;
use kube::api::{ListParams, Patch, PatchParams};
use kube::config::KubeConfigOptions;
use kube::runtime::watcher;
use kube::{Api, Client, Config};
use serde_json::json;
use vasto_client::env::Env;
use vasto_crds::Keyspace;

use crate::context::{Context, Global};
use crate::exit::{Code, fault};
use crate::keyspace_view::{self as view, Tracker};
use crate::output::{Output, emit, emit_json, emit_line};
use crate::{Cli, Command};

/// What kubectl does not do by itself for Vasto's keyspaces.
#[derive(Parser, Debug)]
#[command(name = "kubectl-vasto", bin_name = "kubectl vasto", version, max_term_width = 100)]
pub(crate) struct Plugin {
    /// How to print.
    #[arg(short, long, global = true, value_name = "FORMAT")]
    output: Option<Output>,
    #[command(flatten)]
    args: Kubectl,
}

impl From<Plugin> for Cli {
    fn from(plugin: Plugin) -> Self {
        let global = Global { operator: String::new(), output: plugin.output, timeout: Duration::ZERO, log: None };
        Self { global, command: Command::Kubectl(plugin.args) }
    }
}

/// Arguments of `kubectl vasto`.
#[derive(Args, Debug)]
pub(crate) struct Kubectl {
    /// The namespace; by default the one of the kubeconfig's context.
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// The kubeconfig's context; by default the current one.
    #[arg(long, global = true)]
    context: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Show a keyspace: its phase and progress, conditions, stores and shards; without a name, all of them in a list.
    Status {
        /// The keyspace.
        name: Option<String>,
        /// Go on showing each change until the keyspace is Ready.
        #[arg(short, long, requires = "name")]
        watch: bool,
    },
    /// Empty a store and fill it anew, online.
    Replace {
        /// The keyspace.
        name: String,
        /// The store, such as store-1 (its pod's name will do).
        store: String,
        /// Go on although no other copy of a shard lives: its data is lost.
        #[arg(long)]
        accept_data_loss: bool,
    },
    /// Restart the stores one at a time, with what the operator would give them now.
    Restart {
        /// The keyspace.
        name: String,
    },
}

pub(crate) async fn run(context: &Context, args: Kubectl) -> anyhow::Result<()> {
    let env = &context.env;
    let options = KubeConfigOptions { context: args.context.clone(), ..KubeConfigOptions::default() };
    let config = match args.context {
        Some(_) => Config::from_kubeconfig(&options).await.map_err(anyhow::Error::new),
        None => Config::infer().await.map_err(anyhow::Error::new),
    };
    let config = config.context("no Kubernetes cluster is known: a kubeconfig that works for kubectl will do")?;
    let namespace = args.namespace.unwrap_or_else(|| config.default_namespace.clone());
    let api: Api<Keyspace> = Api::namespaced(Client::try_from(config)?, &namespace);
    let json = context.json();
    match args.verb {
        Verb::Status { name: None, .. } => list(&api, &namespace, env, json).await,
        Verb::Status { name: Some(name), watch: false } => {
            let keyspace = get(&api, &namespace, &name).await?;
            if json {
                return emit_json(&serde_json::from_str(&keyspace.to_json())?);
            }
            let topology = vasto_operator::topology_of(&keyspace).ok().flatten();
            emit(view::describe(&keyspace, topology.as_ref(), env.now_ms()))
        }
        Verb::Status { name: Some(name), watch: true } => follow(&api, &namespace, &name, json).await,
        Verb::Replace { name, store, accept_data_loss } => {
            let keyspace = get(&api, &namespace, &name).await?;
            let store = store.strip_prefix(&format!("{name}-")).unwrap_or(&store);
            let fresh = format!("{:016x}", env.random_id());
            let asked = vasto_operator::replace_annotation(&keyspace, store, accept_data_loss, fresh)
                .map_err(|refusal| fault(Code::Refused, refusal.to_string()))?;
            annotate(&api, &keyspace, asked).await?;
            emit_line(format!("keyspace {name} replacing {store}; kubectl vasto status -w {name} shows how far it is"))
        }
        Verb::Restart { name } => {
            let keyspace = get(&api, &namespace, &name).await?;
            let fresh = format!("{:016x}", env.random_id());
            annotate(&api, &keyspace, vasto_operator::restart_annotation(fresh)).await?;
            emit_line(format!(
                "keyspace {name} restarting, one store at a time; kubectl vasto status -w {name} shows how far it is"
            ))
        }
    }
}

async fn list(api: &Api<Keyspace>, namespace: &str, env: &Env, json: bool) -> anyhow::Result<()> {
    let all = api.list(&ListParams::default()).await.context("keyspaces can't be listed")?;
    if json {
        let items: Vec<serde_json::Value> =
            all.items.iter().map(|k| serde_json::from_str(&k.to_json())).collect::<Result<_, _>>()?;
        return emit_json(&json!({"apiVersion": "v1", "kind": "List", "items": items}));
    }
    if all.items.is_empty() {
        return emit_line(format!("no keyspaces in namespace {namespace}; make one with kubectl apply -f FILE"));
    }
    emit(view::list(all.items.iter(), env.now_ms()))
}

async fn get(api: &Api<Keyspace>, namespace: &str, name: &str) -> anyhow::Result<Keyspace> {
    let found = api.get_opt(name).await.with_context(|| format!("keyspace {name} can't be read"))?;
    found.ok_or_else(|| {
        let message =
            format!("keyspace {name} does not exist in namespace {namespace}; kubectl get keyspaces -A lists all");
        fault(Code::NotFound, message)
    })
}

async fn annotate(api: &Api<Keyspace>, keyspace: &Keyspace, (key, text): (&str, String)) -> anyhow::Result<()> {
    let version = keyspace.metadata.resource_version.clone();
    let change = json!({"metadata": {"resourceVersion": version, "annotations": {key: text}}});
    let params = PatchParams { field_manager: Some("kubectl-vasto".to_owned()), ..PatchParams::default() };
    api.patch(keyspace.name(), &params, &Patch::Merge(&change))
        .await
        .with_context(|| format!("keyspace {} can't be changed", keyspace.name()))?;
    Ok(())
}

/// Prints each new line about the keyspace until no change is under way.
async fn follow(api: &Api<Keyspace>, namespace: &str, name: &str, json: bool) -> anyhow::Result<()> {
    get(api, namespace, name).await?;
    let mut tracker = Tracker::default();
    let mut states = std::pin::pin!(watcher::watch_object(api.clone(), name));
    while let Some(state) = states.next().await {
        let Some(keyspace) = state.with_context(|| format!("keyspace {name} can't be watched"))? else {
            return Err(fault(Code::NotFound, format!("keyspace {name} is gone")));
        };
        if json {
            emit_line(keyspace.to_json())?;
        } else {
            let now = Instant::now();
            if let Some(line) = tracker.next(&keyspace, now) {
                emit_line(line)?;
            }
            let line = tracker.line(&keyspace);
            if tracker.is_news(&line, now) {
                emit_line(&line)?;
            }
        }
        if settled(&keyspace) {
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the operator has come to what the spec says, and nothing is under way.
fn settled(keyspace: &Keyspace) -> bool {
    let Some(status) = &keyspace.status else { return false };
    let progressing = status.conditions.iter().any(|c| c.type_ == "Progressing" && c.status == "True");
    crate::keyspace::is_ready(keyspace)
        && !progressing
        && status.observed_generation == keyspace.metadata.generation
        && status.shards == Some(keyspace.spec.shards)
}
