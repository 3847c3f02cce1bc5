//! How the rest of the process speaks to the driver: changes go to it one by one,
//! resources come from it as one shared map.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use vasto_crds::Keyspace;

use crate::edit::{Change, Refusal};

/// How long a look at the resources waits for stores that may bring lost ones back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Every resource, by name.
pub(crate) type Resources = Arc<BTreeMap<String, Arc<Keyspace>>>;

pub(super) type Answer = Result<Arc<Keyspace>, Refusal>;

/// A wish, and where to answer.
pub(super) struct Command {
    pub(super) change: Change,
    pub(super) answer: oneshot::Sender<Answer>,
}

/// How the rest of the process speaks to the driver.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) resources: watch::Receiver<Resources>,
    /// Whether a keyspace that is not among the resources really is not there.
    pub(super) settled: watch::Receiver<bool>,
}

impl Handle {
    /// All resources as they are now, and as they change.
    pub(crate) fn resources(&self) -> watch::Receiver<Resources> {
        self.resources.clone()
    }

    /// Waits until what is not among the resources is not there; not for ever, since
    /// for a mere look that is not worth it.
    pub(crate) async fn settled(&self) {
        let mut settled = self.settled.clone();
        let _ = tokio::time::timeout(PATIENCE, settled.wait_for(|settled| *settled)).await;
    }

    /// Makes a change; answers once it is on disk.
    pub(crate) async fn change(&self, change: Change) -> Answer {
        let gone = || Refusal::Unavailable("the operator is stopping; try again".to_owned());
        if !self.resources.borrow().contains_key(change.name()) {
            // Stores may be about to say that there is such a keyspace.
            self.settled.clone().wait_for(|settled| *settled).await.map_err(|_| gone())?;
        }
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command { change, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}
