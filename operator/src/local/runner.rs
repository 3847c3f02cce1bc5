//! Who runs store processes under the local driver: the driver says which must run,
//! a runner sees to it.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long to wait before a runner that failed is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Any error, for people to read.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Starts and removes stores. Each call may be repeated.
pub trait StoreRunner: Send + Sync + 'static {
    /// The stores that have data here and so may know keyspaces that the operator
    /// doesn't; they are started first of all. `None`: stores are run by others, who knows.
    fn existing(&self) -> BoxFuture<'_, Result<Option<BTreeSet<String>>, BoxError>>;

    /// Starts those of these stores that don't run. Ends no others.
    fn ensure(&self, names: BTreeSet<String>) -> BoxFuture<'_, Result<(), BoxError>>;

    /// Ends a store that holds no replica of anything, and deletes its folder.
    fn remove(&self, name: String) -> BoxFuture<'_, Result<(), BoxError>>;
}

/// Stores are started and stopped by others.
#[derive(Clone, Copy, Debug, Default)]
pub struct External;

impl StoreRunner for External {
    fn existing(&self) -> BoxFuture<'_, Result<Option<BTreeSet<String>>, BoxError>> {
        Box::pin(async { Ok(None) })
    }

    fn ensure(&self, _: BTreeSet<String>) -> BoxFuture<'_, Result<(), BoxError>> {
        Box::pin(async { Ok(()) })
    }

    fn remove(&self, name: String) -> BoxFuture<'_, Result<(), BoxError>> {
        tracing::info!(store = name, "a store is not needed (any more): it holds nothing and may be stopped");
        Box::pin(async { Ok(()) })
    }
}

/// What the driver wants of a runner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) ensure: BTreeSet<String>,
    pub(crate) remove: BTreeSet<String>,
}

/// Carries out the latest wish, again and again until it could be.
pub(crate) async fn run(runner: Arc<dyn StoreRunner>, mut wanted: watch::Receiver<Wanted>, stop: CancellationToken) {
    let mut complaint = String::new();
    loop {
        let wish = wanted.borrow_and_update().clone();
        let done = tokio::select! {
            () = stop.cancelled() => return,
            done = carry_out(&*runner, wish) => done,
        };
        let again = done.is_err();
        let said = done.err().map(|e| e.to_string()).unwrap_or_default();
        if !said.is_empty() && said != complaint {
            tracing::error!(error = said, "a store could not be started or removed; trying again");
        }
        complaint = said;
        tokio::select! {
            () = stop.cancelled() => return,
            changed = wanted.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if again => {}
        }
    }
}

async fn carry_out(runner: &dyn StoreRunner, wish: Wanted) -> Result<(), BoxError> {
    runner.ensure(wish.ensure).await?;
    for name in wish.remove {
        runner.remove(name).await?;
    }
    Ok(())
}
