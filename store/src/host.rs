//! All keyspaces of one store process: opened at the start, fed with the
//! topologies that the operator (or, while it is away, a peer) brings, and
//! reported as a whole.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::sync::Notify;
use vasto_client::v1::peer_client::PeerClient;
use vasto_client::v1::{KeyspaceReport, KeyspaceUpdate, LearnRequest, ReplicaReport, StoreReport};

use crate::dir::Dir;
use crate::keyspace::Keyspace;
use crate::replica::Context;

/// The store as a whole.
pub struct Host {
    name: String,
    address: String,
    incarnation: u64,
    dir: Arc<Dir>,
    context: Context,
    keyspaces: RwLock<BTreeMap<String, Arc<Keyspace>>>,
    /// Folders that can't be read, with the reason: reported, so that nobody takes the store for empty.
    unopened: Vec<(String, String)>,
}

impl Host {
    /// Opens every keyspace that the data folder holds.
    pub fn open(name: &str, address: String, dir: Dir, context: Context) -> Arc<Self> {
        let dir = Arc::new(dir);
        let mut keyspaces = BTreeMap::new();
        let mut unopened = Vec::new();
        for entry in std::fs::read_dir(dir.keyspaces()).into_iter().flatten().flatten() {
            let Ok(uid) = entry.file_name().into_string() else { continue };
            if uid.contains('.') {
                // Retained after a deletion, or a file half written.
                continue;
            }
            match Keyspace::open(name, dir.clone(), context.clone(), &uid) {
                Ok(keyspace) => {
                    keyspaces.insert(uid, keyspace);
                }
                Err(error) => {
                    tracing::error!(uid, %error, "a keyspace can't be opened; it is left as it is");
                    unopened.push((uid, error.to_string()));
                }
            }
        }
        let incarnation = context.env.random_id();
        Arc::new(Self {
            name: name.to_owned(),
            address,
            incarnation,
            dir,
            context,
            keyspaces: RwLock::new(keyspaces),
            unopened,
        })
    }

    fn all(&self) -> Vec<Arc<Keyspace>> {
        self.keyspaces.read().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// A keyspace by its uid.
    pub fn keyspace(&self, uid: &str) -> Option<Arc<Keyspace>> {
        self.keyspaces.read().unwrap_or_else(std::sync::PoisonError::into_inner).get(uid).cloned()
    }

    /// Rung when something that is reported has changed.
    pub fn changed(&self) -> Arc<Notify> {
        self.context.changed.clone()
    }

    /// Goes on with what the persisted topologies ask for.
    pub async fn resume(&self) {
        for keyspace in self.all() {
            keyspace.resume().await;
        }
    }

    /// Takes in what the operator says of one keyspace.
    pub async fn install(&self, update: KeyspaceUpdate) {
        let Some((uid, version)) = update.topology.as_ref().map(|t| (t.uid.clone(), t.version)) else { return };
        if self.unopened.iter().any(|(unopened, _)| *unopened == uid) {
            return;
        }
        let keyspace = self.keyspace(&uid).unwrap_or_else(|| {
            let keyspace = Keyspace::create(&self.name, self.dir.clone(), self.context.clone(), &uid);
            self.keyspaces
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .entry(uid.clone())
                .or_insert(keyspace)
                .clone()
        });
        keyspace.install(update).await;
        keyspace.confirm(version);
        if keyspace.is_gone() {
            self.keyspaces.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&uid);
        }
    }

    /// The store's whole state.
    pub fn report(&self) -> StoreReport {
        StoreReport {
            store: self.name.clone(),
            address: self.address.clone(),
            incarnation: self.incarnation,
            keyspaces: self.all().iter().map(|k| k.report()).chain(self.unopened()).collect(),
            stopping: false,
        }
    }

    fn unopened(&self) -> impl Iterator<Item = KeyspaceReport> {
        self.unopened.iter().map(|(uid, why)| KeyspaceReport {
            uid: uid.clone(),
            replicas: vec![ReplicaReport { fault: why.clone(), ..ReplicaReport::default() }],
            ..KeyspaceReport::default()
        })
    }

    /// Stops everything cleanly.
    pub async fn stop(&self) {
        futures::future::join_all(self.all().iter().map(|k| k.stop())).await;
    }

    /// While the operator is away, asks the other stores what is current: once a
    /// majority of the stores of the newest view has said that it knows nothing
    /// newer, this store may take writes again.
    pub async fn learn_from_peers(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.context.env.jitter(Duration::from_millis(500))).await;
            for keyspace in self.all().into_iter().filter(|k| !k.is_confirmed()) {
                self.learn(&keyspace).await;
            }
        }
    }

    async fn learn(&self, keyspace: &Arc<Keyspace>) {
        let topology = keyspace.topology();
        let mut stores: Vec<&str> =
            topology.current.iter().flat_map(|v| v.places()).map(|p| p.assignment.store.as_str()).collect();
        stores.sort_unstable();
        stores.dedup();
        let mut heard = usize::from(stores.contains(&self.name.as_str()));
        for store in stores.iter().filter(|s| **s != self.name) {
            let Some(update) = self.ask(keyspace, store).await else { continue };
            heard += 1;
            keyspace.install(update).await;
        }
        // A newer view may have another majority: then the next round counts that one.
        if heard * 2 > stores.len() {
            keyspace.confirm(topology.version);
        }
    }

    async fn ask(&self, keyspace: &Keyspace, store: &str) -> Option<KeyspaceUpdate> {
        let channel = self.context.env.dial(&keyspace.address(store)?).ok()?;
        let request = LearnRequest { keyspace: keyspace.uid().to_owned() };
        let mut client = PeerClient::new(channel);
        let answer = tokio::time::timeout(Duration::from_secs(1), client.learn(request)).await;
        answer.ok()?.ok().map(tonic::Response::into_inner)
    }
}
