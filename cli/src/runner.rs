//! Runs the stores of `vasto up`, as tasks of this process or as children of
//! it, and starts one anew when it fails.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use vasto_client::Env;
use vasto_operator::local::{BoxError, StoreRunner};

use crate::exit::one_line;
use crate::listen::listen_as_before;

/// How long a store that fails again and again rests at most.
const LONGEST_REST: Duration = Duration::from_secs(5);
/// After so long a run, a failure is a new one.
const LONG_RUN: Duration = Duration::from_secs(30);
/// How long a child may take to stop before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// What a store needs to run.
#[derive(Clone)]
pub(crate) struct Setting {
    /// The folder that holds a folder for each store.
    pub(crate) data: PathBuf,
    /// The operator's address.
    pub(crate) operator: String,
    pub(crate) env: Env,
    /// Each store a process of its own.
    pub(crate) processes: bool,
    /// The log filter that children get.
    pub(crate) log: Option<String>,
}

impl Setting {
    fn folder(&self, store: &str) -> PathBuf {
        self.data.join(store)
    }

    /// Beside the store's folder, which is the store's own.
    fn port_file(&self, store: &str) -> PathBuf {
        self.data.join(format!("{store}.port"))
    }
}

/// The stores that run.
pub(crate) struct Runner {
    setting: Setting,
    stores: Mutex<BTreeMap<String, Running>>,
    stop: CancellationToken,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Runner {
    pub(crate) fn new(setting: Setting) -> Arc<Self> {
        Arc::new(Self { setting, stores: Mutex::default(), stop: CancellationToken::new() })
    }

    /// Stops all stores, and starts no more.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        for (_, running) in std::mem::take(&mut *self.stores.lock().await) {
            let _ = running.task.await;
        }
    }
}

impl StoreRunner for Runner {
    fn existing(&self) -> BoxFuture<'_, Result<Option<BTreeSet<String>>, BoxError>> {
        Box::pin(async {
            let folder = &self.setting.data;
            let found = std::fs::read_dir(folder).map_err(|e| format!("can't read {}: {e}", folder.display()))?;
            let stores = found.flatten().filter(|entry| entry.path().join("store.json").is_file());
            Ok(Some(stores.filter_map(|entry| entry.file_name().into_string().ok()).collect()))
        })
    }

    fn ensure(&self, names: BTreeSet<String>) -> BoxFuture<'_, Result<(), BoxError>> {
        Box::pin(async {
            let mut stores = self.stores.lock().await;
            if self.stop.is_cancelled() {
                return Ok(());
            }
            for name in names {
                stores.entry(name).or_insert_with_key(|name| {
                    let stop = self.stop.child_token();
                    let task = tokio::spawn(supervise(name.clone(), self.setting.clone(), stop.clone()));
                    Running { stop, task }
                });
            }
            Ok(())
        })
    }

    fn remove(&self, name: String) -> BoxFuture<'_, Result<(), BoxError>> {
        Box::pin(async move {
            let mut stores = self.stores.lock().await;
            if let Some(running) = stores.remove(&name) {
                running.stop.cancel();
                let _ = running.task.await;
            }
            let folder = self.setting.folder(&name);
            let entries = std::fs::read_dir(folder.join("keyspaces")).into_iter().flatten().flatten();
            if entries.into_iter().any(|e| e.path().extension().is_some_and(|e| e == "retained")) {
                // A deleted keyspace whose policy is to keep its files.
                info!(store = name, folder = %folder.display(), "not needed, but its folder keeps a retained keyspace");
                return Ok(());
            }
            match std::fs::remove_dir_all(&folder) {
                Ok(()) => info!(store = name, "removed"),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(format!("can't delete {}: {error}", folder.display()).into()),
            }
            let _ = std::fs::remove_file(self.setting.port_file(&name));
            Ok(())
        })
    }
}

/// Runs a store until it is to stop; after a failure, again.
async fn supervise(name: String, setting: Setting, stop: CancellationToken) {
    let mut rest = Duration::from_millis(100);
    loop {
        let start = Instant::now();
        let ended =
            if setting.processes { child(&name, &setting, &stop).await } else { task(&name, &setting, &stop).await };
        if stop.is_cancelled() {
            if let Err(error) = ended {
                warn!(store = name, error = one_line(&error), "did not stop cleanly");
            }
            return;
        }
        if start.elapsed() > LONG_RUN {
            rest = Duration::from_millis(100);
        }
        match ended {
            Ok(()) => warn!(store = name, "ended by itself; it is started again"),
            Err(error) => error!(store = name, error = one_line(&error), again_in = ?rest, "failed"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(rest) => rest = (rest * 2).min(LONGEST_REST),
        }
    }
}

async fn task(name: &str, setting: &Setting, stop: &CancellationToken) -> anyhow::Result<()> {
    let listener = listen_as_before(&format!("store {name}"), &setting.port_file(name)).await?;
    let options = vasto_store::Options::new(name, setting.folder(name), setting.operator.clone());
    // A task of its own, so that a panic in it is one more failure; a token of
    // its own, since a store cancels its token when it fails.
    let serving = vasto_store::serve(options, setting.env.clone(), listener, stop.child_token());
    tokio::spawn(serving).await.context("panicked")??;
    Ok(())
}

async fn child(name: &str, setting: &Setting, stop: &CancellationToken) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("can't tell where this program is")?;
    let mut command = Command::new(&program);
    command.arg("store").args(["--name", name, "--operator", &setting.operator, "--until-input-ends"]);
    command.arg("--data").arg(setting.folder(name)).arg("--keep-port").arg(setting.port_file(name));
    if let Some(log) = &setting.log {
        command.args(["--log", log]);
    }
    // The pipe closes when this process ends, however it ends, and the child with it. A group
    // of its own keeps the terminal's Ctrl-C from reaching it before this process says so.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true).process_group(0);
    let mut child = command.spawn().with_context(|| format!("can't start {}", program.display()))?;
    let input = child.stdin.take();
    info!(store = name, pid = child.id(), "started");
    let ended = tokio::select! {
        ended = child.wait() => ended?,
        () = stop.cancelled() => {
            drop(input);
            match tokio::time::timeout(STOP_WITHIN, child.wait()).await {
                Ok(ended) => ended?,
                Err(_) => {
                    child.kill().await?;
                    anyhow::bail!("it did not stop within {STOP_WITHIN:?} and was killed");
                }
            }
        }
    };
    anyhow::ensure!(ended.success(), "it ended with {ended}");
    Ok(())
}
