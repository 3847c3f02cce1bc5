//! All keyspaces of one store process: opened at the start, fed with the
//! topologies that the operator (or, while it is away, a peer) brings, and
//! reported as a whole.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use tokio::sync::Notify;
use vasto_client::v1::peer_client::PeerClient;
use vasto_client::v1::{Disk, KeyspaceReport, KeyspaceUpdate, LearnRequest, ReplicaReport, StoreReport};

use crate::dir::{self, Dir};
use crate::engine::RowCacheUsage;
use crate::keyspace::Keyspace;
use crate::replica::{Context, Replica};

/// The disk is looked at this often at most.
const DISK_MS: u64 = 1_000;

/// The store as a whole.
pub struct Host {
    name: String,
    address: String,
    incarnation: u64,
    /// The uid of the one keyspace that it serves; `None`: any.
    only: Option<String>,
    /// Uids of others that have folders here all the same: neither served nor deleted.
    foreign: Vec<String>,
    dir: Arc<Dir>,
    context: Context,
    /// When the disk was looked at, and what was seen.
    disk: Mutex<(u64, Option<Disk>)>,
    /// An operator has taken a report since the process started.
    reported: AtomicBool,
    /// One takes them now.
    connected: AtomicBool,
    leaving: AtomicBool,
    keyspaces: RwLock<BTreeMap<String, Arc<Keyspace>>>,
    /// Folders that can't be read, with the reason: reported, so that nobody takes the store for empty.
    unopened: Vec<(String, String)>,
}

impl Host {
    /// Opens every keyspace that the data folder holds; with `only`, none but that one.
    pub fn open(name: &str, only: Option<&str>, address: String, dir: Dir, context: Context) -> Arc<Self> {
        let dir = Arc::new(dir);
        let mut keyspaces = BTreeMap::new();
        let mut unopened = Vec::new();
        let entries = dir::entries(&dir.keyspaces()).unwrap_or_default();
        let names = entries.into_iter().filter_map(|entry| entry.file_name()?.to_str().map(str::to_owned));
        // With a dot: retained after a deletion, or a file half written.
        let (own, foreign): (Vec<_>, Vec<_>) =
            names.filter(|uid| !uid.contains('.')).partition(|uid| only.is_none_or(|only| only == uid));
        if let Some(only) = only.filter(|_| !foreign.is_empty()) {
            tracing::error!(
                ?foreign,
                only,
                folder = %dir.keyspaces().display(),
                "the data folder holds another keyspace's data: it is neither served nor deleted, and nothing new is made beside it"
            );
        }
        for uid in own {
            match Keyspace::open(name, dir.clone(), context.clone(), &uid, !foreign.is_empty()) {
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
            only: only.map(str::to_owned),
            foreign,
            dir,
            context,
            disk: Mutex::new((0, None)),
            reported: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            keyspaces: RwLock::new(keyspaces),
            unopened,
        })
    }

    /// All keyspaces here.
    pub fn all(&self) -> Vec<Arc<Keyspace>> {
        self.keyspaces.read().unwrap_or_else(std::sync::PoisonError::into_inner).values().cloned().collect()
    }

    /// A keyspace by its uid.
    pub fn keyspace(&self, uid: &str) -> Option<Arc<Keyspace>> {
        self.keyspaces.read().unwrap_or_else(std::sync::PoisonError::into_inner).get(uid).cloned()
    }

    /// All open replicas.
    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        self.all().iter().flat_map(|k| k.replicas()).collect()
    }

    /// From here on writes are refused, since the store is stopping.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    /// Whether writes are refused, since the store is stopping.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Whether an operator takes reports now.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
        self.reported.fetch_or(connected, Ordering::AcqRel);
    }

    /// As last set.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Bytes of the block cache: all, and those in use at this moment.
    pub fn cache_bytes(&self) -> (u64, u64) {
        self.context.storage.cache_bytes()
    }

    /// What the rows that are kept in memory take, and how they were asked.
    pub fn row_cache_usage(&self) -> RowCacheUsage {
        self.context.storage.row_cache().usage()
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
    #[cfg(test)]
    pub async fn install(&self, update: KeyspaceUpdate) {
        if let Some(keyspace) = self.hear(update) {
            self.obey(&keyspace).await;
        }
    }

    /// Keeps what the operator says of one keyspace until it is obeyed; what is said later replaces it.
    pub fn hear(&self, update: KeyspaceUpdate) -> Option<Arc<Keyspace>> {
        let uid = update.topology.as_ref()?.uid.clone();
        if let Some(only) = self.only.as_ref().filter(|only| **only != uid) {
            tracing::warn!(uid, only, "ignoring the topology of a keyspace that is not this store's");
            return None;
        }
        if !self.foreign.is_empty() || self.unopened.iter().any(|(unopened, _)| *unopened == uid) {
            return None;
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
        keyspace.hear(update);
        Some(keyspace)
    }

    /// Acts on what was heard last.
    pub async fn obey(&self, keyspace: &Arc<Keyspace>) {
        keyspace.obey().await;
        if keyspace.is_gone() {
            self.keyspaces.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(keyspace.uid());
        }
    }

    /// The store's whole state.
    pub fn report(&self) -> StoreReport {
        let disk = self.disk();
        let mut keyspaces: Vec<KeyspaceReport> = self.all().iter().map(|k| k.report()).chain(self.unopened()).collect();
        if let Some(disk) = &disk {
            // A writer that has nothing to write doesn't look.
            let full = !dir::has_room(disk);
            keyspaces.iter_mut().flat_map(|k| &mut k.replicas).filter(|r| r.born).for_each(|r| r.full = full);
        }
        StoreReport {
            store: self.name.clone(),
            address: self.address.clone(),
            incarnation: self.incarnation,
            keyspaces,
            stopping: false,
            only: self.only.clone().unwrap_or_default(),
            disk,
            foreign: self.foreign.clone(),
        }
    }

    /// The data folder's disk, as seen within the last second.
    pub fn disk(&self) -> Option<Disk> {
        let now = self.context.env.now_ms();
        let mut seen = self.disk.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if seen.1.is_none() || now.abs_diff(seen.0) >= DISK_MS {
            *seen = (now, self.context.storage.disk(&self.dir.keyspaces()));
        }
        seen.1
    }

    /// Whether the store serves all that it is assigned; if not, why.
    pub fn ready(&self) -> Result<(), String> {
        if self.is_leaving() {
            return Err("the store is stopping".to_owned());
        }
        if !self.foreign.is_empty() {
            let (foreign, folder) = (self.foreign.join(", "), self.dir.keyspaces());
            return Err(format!(
                "{} holds data of another keyspace (uid {foreign}), and this store serves only {}: move it away, or give the store an empty volume",
                folder.display(),
                self.only.as_deref().unwrap_or_default()
            ));
        }
        if let Some((uid, why)) = self.unopened.first() {
            return Err(format!("keyspace {uid} can't be opened: {why}"));
        }
        let keyspaces = self.all();
        keyspaces.iter().try_for_each(|k| k.ready())?;
        let knows = keyspaces.iter().any(|k| k.version() > 0);
        if !knows && !self.reported.load(Ordering::Acquire) {
            return Err("the store has never heard of any topology, and has not reached an operator yet".to_owned());
        }
        Ok(())
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
            for keyspace in self.all().into_iter().filter(|k| !k.is_confirmed() && self.foreign.is_empty()) {
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
            // Another topology under the same version: neither is known to hold.
            let agrees = update.topology.as_ref().is_none_or(|t| t.version != topology.version || *t == *topology);
            heard += usize::from(agrees);
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
