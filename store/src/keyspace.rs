//! One keyspace on this store: its topology, and the replicas that it makes,
//! opens, feeds, fences, cleans and drops because the topology says so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use prost::Message;
use serde::Deserialize;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_client::env::Env;
use vasto_client::topology::Place;
use vasto_client::v1::{KeyspaceReport, KeyspaceUpdate, Phase, ReplicaReport, SourceReport, Topology, View};

use crate::build::Building;
use crate::collect::Collector;
use crate::dir::{self, Dir, write_durably};
use crate::merge::Limits;
use crate::metrics::Counts;
use crate::replica::{Context, Replica, Settings, SourceProgress};
use crate::{clean, follow, quarantine, repair, snapshot};

/// How often a replica syncs its log, unless each write is synced by itself...
const SYNC_EACH: Duration = Duration::from_secs(1);
/// ... and where others wait for what is confirmed as synced.
const SYNC_SOON: Duration = Duration::from_millis(50);

/// Whether a log is to be synced so long after the last time. In a change others wait for that; while copies are made, only
/// if there is a source of which nothing is confirmed yet: copies may take long, and whoever writes waits for each sync.
fn is_sync_due(phase: Option<Phase>, unconfirmed: bool, since: Duration) -> bool {
    let awaited = match phase {
        Some(Phase::Stable) => false,
        Some(Phase::Prepare) => unconfirmed,
        _ => true,
    };
    awaited || since >= SYNC_EACH
}

/// Why a keyspace's folder can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}")]
pub struct Error {
    path: PathBuf,
    why: String,
}

/// The parts of a Keyspace's spec that bind a store, as the topology carries it (JSON).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    durability: Option<String>,
    collection_grace: Option<String>,
    max_clock_skew: Option<String>,
}

/// A replica in one of its two states.
#[derive(Clone)]
pub enum Slot {
    /// A candidate being built.
    Building(Arc<Building>),
    /// Born and open.
    Open(Arc<Replica>),
    /// It can't be opened, or was closed since its files are damaged; the operator or a person must act.
    Broken(Broken),
}

/// A replica that is here and not open.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Its shard.
    pub shard: u32,
    /// Why.
    pub fault: String,
    /// It stays closed: only another copy helps.
    pub quarantined: bool,
    /// It has never stood in a `current` view.
    pub candidate: bool,
}

struct Member {
    slot: Slot,
    /// Ends the tasks that build or feed it.
    stop: CancellationToken,
    tasks: TaskTracker,
    /// A candidate made in this life for the change under way, which no view names yet.
    unnamed: bool,
    /// The change whose clean-up was last begun in this life.
    cleaning: AtomicU64,
}

/// One keyspace on this store.
pub struct Keyspace {
    uid: String,
    store: String,
    dir: Arc<Dir>,
    context: Context,
    update: watch::Sender<Arc<KeyspaceUpdate>>,
    /// Persisted, and known to every writer.
    installed: AtomicU64,
    installing: Mutex<()>,
    /// What the operator said last and nobody has acted on yet.
    heard: std::sync::Mutex<Option<KeyspaceUpdate>>,
    members: RwLock<BTreeMap<u64, Member>>,
    /// Whether the operator (or a majority of peers) has said what is current since this process started.
    confirmed: AtomicBool,
    /// Other keyspaces' data lies beside it, so that somebody has mixed up volumes: it serves what
    /// it has as it was left, takes in no topology, makes nothing, and is never confirmed.
    frozen: bool,
    stop: CancellationToken,
    gone: AtomicBool,
}

impl Keyspace {
    /// A keyspace of which this store hears for the first time.
    pub fn create(store: &str, dir: Arc<Dir>, context: Context, uid: &str) -> Arc<Self> {
        Arc::new(Self::new(store, dir, context, uid, false))
    }

    fn new(store: &str, dir: Arc<Dir>, context: Context, uid: &str, frozen: bool) -> Self {
        Self {
            uid: uid.to_owned(),
            store: store.to_owned(),
            dir,
            context,
            update: watch::Sender::new(Arc::default()),
            installed: AtomicU64::new(0),
            installing: Mutex::new(()),
            heard: std::sync::Mutex::new(None),
            members: RwLock::default(),
            // It has accepted nothing under any older version.
            confirmed: AtomicBool::new(true),
            frozen,
            stop: CancellationToken::new(),
            gone: AtomicBool::new(false),
        }
    }

    /// A keyspace as this store left it: the topology that it had persisted, and its replicas.
    pub fn open(store: &str, dir: Arc<Dir>, context: Context, uid: &str, frozen: bool) -> Result<Arc<Self>, Error> {
        let keyspace = Arc::new(Self::new(store, dir, context, uid, frozen));
        keyspace.confirmed.store(false, Ordering::Release);
        let path = keyspace.file();
        let fail = |why: String| Error { path: path.clone(), why };
        match std::fs::read(&path) {
            Ok(bytes) => {
                let update =
                    KeyspaceUpdate::decode(bytes.as_slice()).map_err(|e| fail(format!("not a topology: {e}")))?;
                keyspace.installed.store(version_of(&update), Ordering::Release);
                keyspace.update.send_replace(Arc::new(update));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(fail(e.to_string())),
        }
        let replicas = keyspace.dir.keyspace(uid).join("replicas");
        for dir in dir::entries(&replicas).unwrap_or_default() {
            match Replica::name(&dir) {
                Ok((id, shard, _)) => keyspace.take_up(id, shard, dir),
                // Its making or its dropping was cut short: nothing in it was ever used, or is any longer.
                Err(error) => {
                    tracing::info!(%error, "removing a replica's folder without a name");
                    let _ = std::fs::remove_dir_all(&dir);
                }
            }
        }
        Ok(keyspace)
    }

    fn file(&self) -> PathBuf {
        self.dir.keyspace(&self.uid).join("topology.pb")
    }

    /// The keyspace's uid.
    pub fn uid(&self) -> &str {
        &self.uid
    }
    /// What is counted as it happens.
    pub fn counts(&self) -> &Counts {
        &self.context.counts
    }
    /// Time, randomness, network.
    pub fn env(&self) -> &Env {
        &self.context.env
    }

    /// A client is served here at this time (Unix ms).
    pub fn serves(&self, now_ms: u64) {
        self.context.throttle.served(now_ms);
    }

    /// How long to rest once so many bytes of a copy have been sent or taken in here, for clients' sake.
    pub fn rest(&self, bytes: u64) -> Duration {
        self.context.throttle.rest(bytes, Instant::now(), self.env().now_ms())
    }

    /// Does so.
    pub async fn rest_after(&self, bytes: u64) {
        let rest = self.rest(bytes);
        // No sleep is shorter than a tick.
        if !rest.is_zero() {
            tokio::time::sleep(rest).await;
        }
    }
    /// The newest topology known, with addresses.
    pub fn updates(&self) -> watch::Receiver<Arc<KeyspaceUpdate>> {
        self.update.subscribe()
    }
    /// The newest update.
    pub fn update(&self) -> Arc<KeyspaceUpdate> {
        self.update.borrow().clone()
    }
    /// The newest topology.
    pub fn topology(&self) -> Arc<Topology> {
        Arc::new(self.update.borrow().topology.clone().unwrap_or_default())
    }
    /// Runs `read` on the newest topology, without copying it.
    pub fn with_topology<T>(&self, read: impl FnOnce(&Topology) -> T) -> Option<T> {
        self.update.borrow().topology.as_ref().map(read)
    }
    /// Its version.
    pub fn version(&self) -> u64 {
        version_of(&self.update.borrow())
    }
    /// Where a store was last heard of.
    pub fn address(&self, store: &str) -> Option<String> {
        self.update.borrow().addresses.iter().find(|a| a.store == store).map(|a| a.address.clone())
    }
    /// Whether writes may be taken: since this process started, somebody who knows has said what is current.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Acquire)
    }
    /// Somebody who knows has said that nothing newer than `version` is committed.
    pub fn confirm(&self, version: u64) {
        if version >= self.version() && !self.frozen {
            self.confirmed.store(true, Ordering::Release);
        }
    }
    /// Deleted, files and all.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    fn members(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<u64, Member>> {
        self.members.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
    fn members_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<u64, Member>> {
        self.members.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The open replica with this id.
    pub fn replica(&self, id: u64) -> Option<Arc<Replica>> {
        match self.members().get(&id).map(|m| &m.slot) {
            Some(Slot::Open(replica)) => Some(replica.clone()),
            _ => None,
        }
    }

    /// All open replicas.
    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        self.members()
            .values()
            .filter_map(|m| match &m.slot {
                Slot::Open(replica) => Some(replica.clone()),
                _ => None,
            })
            .collect()
    }

    /// Where operations go, as it is now: held for no longer than it takes to look.
    pub fn routes(&self) -> Routes<'_> {
        Routes { store: &self.store, update: self.update.borrow(), members: self.members() }
    }

    /// The greatest clock of the replicas here other than this one.
    pub fn clock_beside(&self, id: u64) -> u64 {
        let members = self.members();
        let others = members.iter().filter(|(other, _)| **other != id);
        let clock = |member: &Member| match &member.slot {
            Slot::Open(replica) => Some(replica.progress.clock()),
            _ => None,
        };
        others.filter_map(|(_, member)| clock(member)).max().unwrap_or_default()
    }

    /// The replica here that serves this shard in a readable view of that size.
    pub fn reader(&self, shard: u32, shards: u32) -> Option<Arc<Replica>> {
        let update = self.update.borrow();
        let topology = update.topology.as_ref()?;
        topology
            .served()
            .filter(|v| v.size() == shards)
            .flat_map(View::places)
            .filter(|p| p.shard == shard && p.assignment.store == self.store)
            .find_map(|p| self.replica(p.assignment.replica))
    }

    fn settings(&self, topology: &Topology) -> Settings {
        let spec: Spec = serde_json::from_str(&topology.spec).unwrap_or_default();
        let ms = |text: &Option<String>, default: u64| text.as_deref().and_then(duration_ms).unwrap_or(default);
        let grace_ms = ms(&spec.collection_grace, 24 * 3_600_000);
        Settings {
            synced: spec.durability.as_deref() == Some("Synced"),
            limits: Limits { max_clock_skew_ms: ms(&spec.max_clock_skew, 10_000), grace_ms, ..Limits::default() },
            grace_ms,
        }
    }

    /// Keeps what the operator says until it is obeyed. What it said before is of no use any more.
    pub fn hear(&self, update: KeyspaceUpdate) {
        *self.heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(update);
    }

    /// Takes in what the operator said last: in its order, whoever comes first.
    pub async fn obey(self: &Arc<Self>) {
        let _turn = self.installing.lock().await;
        let heard = self.heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(update) = heard {
            let said = update.topology.clone();
            self.take_in(update).await;
            // Not where another topology of the same version is kept: neither is known to hold.
            if self.update().topology == said {
                self.confirm(said.map_or(0, |t| t.version));
            }
        }
    }

    /// Takes in what a peer knows. Where a store is, the operator has said last: a peer adds only what is not known.
    pub async fn install(self: &Arc<Self>, mut update: KeyspaceUpdate) {
        let _turn = self.installing.lock().await;
        let known = self.update();
        update.addresses.retain(|a| known.addresses.iter().all(|k| k.store != a.store));
        update.addresses.splice(0..0, known.addresses.iter().cloned());
        self.take_in(update).await;
    }

    /// Takes in an update, in one's turn: persists it, lets every writer know (fenced, if it
    /// asks for that), then acts on it. Older versions are refused, so that a deposed
    /// leader does no harm; the same version may bring new addresses.
    async fn take_in(self: &Arc<Self>, update: KeyspaceUpdate) {
        if self.frozen {
            return;
        }
        let Some(topology) = update.topology.clone() else { return };
        let known = self.update();
        if topology.uid != self.uid || topology.version < version_of(&known) {
            return;
        }
        if topology.version == version_of(&known)
            && (update.addresses == known.addresses || Some(&topology) != known.topology.as_ref())
        {
            // Another topology under the same version is another operator's: which one holds, a greater version will
            // say, and until then the operator must see that there are two.
            return;
        }
        let path = self.file();
        let encoded = update.encode_to_vec();
        let persisted = self.env().blocking(move || {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            write_durably(&path, &encoded)
        });
        let persisted = persisted.await;
        match persisted {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(keyspace = self.uid, %error, "a topology can't be persisted; it is not acted on");
                return;
            }
            Err(_) => return,
        }
        let changed = topology.version != version_of(&known);
        let topology = Arc::new(topology);
        if changed {
            tracing::debug!(
                keyspace = self.uid,
                version = topology.version,
                phase = topology.phase().as_str_name(),
                "topology"
            );
            let settings = self.settings(&topology);
            for replica in self.replicas() {
                replica.set_settings(settings.clone());
                replica.install(topology.clone()).await;
            }
        }
        // After the writers know: who follows by it must find them ready for what comes.
        self.update.send_replace(Arc::new(update));
        if changed {
            self.reconcile(&topology).await;
            self.installed.store(topology.version, Ordering::Release);
        }
        self.context.changed.notify_one();
    }

    /// Makes, drops and cleans what the topology asks for. Level-triggered: safe to repeat.
    async fn reconcile(self: &Arc<Self>, topology: &Arc<Topology>) {
        if topology.phase() == Phase::Deleting {
            let all: Vec<u64> = self.members().keys().copied().collect();
            for id in all {
                self.remove(id, topology.retain).await;
            }
            self.delete_folder(topology.retain);
            return;
        }
        let named: BTreeSet<u64> =
            topology.views().flat_map(View::places).map(|p| p.assignment.replica).filter(|id| *id != 0).collect();
        for drop in topology.drops.iter().filter(|d| d.store == self.store && !named.contains(&d.replica)) {
            self.remove(drop.replica, false).await;
        }
        for member in self.members_mut().iter_mut().filter(|(id, _)| named.contains(id) || topology.next.is_none()) {
            member.1.unnamed = false;
        }
        // Where a replica of the shard stands here already, it will have the place: a shrink names it a version later.
        let stays = |shard| topology.current.iter().any(|v| v.on(shard, &self.store).is_some());
        let wanted: Vec<u32> = topology
            .next
            .iter()
            .flat_map(View::places)
            .filter(|p| p.assignment.store == self.store && p.assignment.replica == 0 && !stays(p.shard))
            .map(|p| p.shard)
            .collect();
        for shard in wanted {
            let made = self.members().values().any(|m| m.unnamed && m.shard() == shard);
            if !made {
                self.make(shard);
            }
        }
        for id in &topology.clean {
            if let Some(replica) = self.replica(*id).filter(|r| r.progress.cleaned() != topology.switch_version) {
                self.with_member(*id, |m| {
                    if m.cleaning.swap(topology.switch_version, Ordering::AcqRel) == topology.switch_version {
                        return;
                    }
                    let (keyspace, topology) = (self.clone(), topology.clone());
                    m.spawn(async move { clean::run(&keyspace, &replica, &topology).await });
                });
            }
        }
    }

    /// Goes on, after a start, with what the persisted topology asks for.
    pub async fn resume(self: &Arc<Self>) {
        let _turn = self.installing.lock().await;
        let topology = self.topology();
        if topology.version == 0 {
            return;
        }
        for replica in self.replicas() {
            replica.install(topology.clone()).await;
        }
        if !self.frozen {
            self.reconcile(&topology).await;
        }
    }

    fn with_member(&self, id: u64, act: impl FnOnce(&Member)) {
        if let Some(member) = self.members().get(&id) {
            act(member);
        }
    }

    /// Makes a candidate for a shard.
    fn make(self: &Arc<Self>, shard: u32) {
        let id = self.env().random_id();
        let dir = self.dir.replica(&self.uid, id);
        if let Err(error) = Replica::create(&dir, id, shard) {
            tracing::error!(keyspace = self.uid, shard, %error, "a candidate can't be made");
            return;
        }
        self.take_up(id, shard, dir);
        if let Some(member) = self.members_mut().get_mut(&id) {
            member.unnamed = true;
        }
        tracing::info!(keyspace = self.uid, shard, replica = format!("{id:016x}"), "a candidate");
    }

    /// Opens the replica in a folder, or builds it if it isn't born.
    fn take_up(self: &Arc<Self>, id: u64, shard: u32, dir: PathBuf) {
        let slot = match self.open_replica(&dir) {
            Ok(Some(replica)) => Slot::Open(replica),
            Ok(None) => Slot::Building(Arc::new(Building::new(id, shard, dir))),
            Err(error) => {
                tracing::error!(keyspace = self.uid, shard, replica = format!("{id:016x}"), %error, "a replica can't be opened");
                if error.is_damage() {
                    self.context.counts.quarantines.inc();
                }
                let (fault, quarantined) = (error.to_string(), error.is_damage());
                Slot::Broken(Broken { shard, fault, quarantined, candidate: false })
            }
        };
        let member = self.member(slot.clone());
        match slot {
            Slot::Open(replica) => self.feed(&member, replica),
            Slot::Building(building) => {
                let keyspace = self.clone();
                member.spawn(async move { keyspace.build(building).await });
            }
            Slot::Broken(_) => {}
        }
        self.members_mut().insert(id, member);
        self.context.changed.notify_one();
    }

    fn member(&self, slot: Slot) -> Member {
        let (stop, tasks) = (self.stop.child_token(), TaskTracker::new());
        Member { slot, stop, tasks, unnamed: false, cleaning: AtomicU64::new(0) }
    }

    fn open_replica(&self, dir: &std::path::Path) -> Result<Option<Arc<Replica>>, crate::replica::Error> {
        let topology = self.topology();
        match Replica::open(dir, topology.clone(), self.settings(&topology), &self.context) {
            Ok(replica) => Ok(Some(replica)),
            Err(crate::replica::Error::NotBorn(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn build(self: Arc<Self>, building: Arc<Building>) {
        if !building.run(&self, &self.context.storage).await {
            return;
        }
        let (keyspace, dir) = (self.clone(), building.dir.clone());
        let opened = self.env().blocking(move || keyspace.open_replica(&dir)).await;
        // A topology may come in between opening and inserting: with its turn taken, none does.
        let _turn = self.installing.lock().await;
        let broken =
            |fault, quarantined| Slot::Broken(Broken { shard: building.shard, fault, quarantined, candidate: true });
        let slot = match opened {
            Ok(Ok(Some(replica))) => {
                for (source, built) in building.sources() {
                    replica.progress.update_source(source, |s| *s = SourceProgress { lag: u64::MAX, ..built });
                }
                replica.install(self.topology()).await;
                Slot::Open(replica)
            }
            Ok(Ok(None)) => broken("built, but not born".into(), false),
            Ok(Err(error)) => broken(error.to_string(), error.is_damage()),
            Err(_) => return,
        };
        let mut members = self.members_mut();
        if let Some(member) = members.get_mut(&building.id).filter(|m| !m.stop.is_cancelled()) {
            member.slot = slot.clone();
            if let Slot::Open(replica) = slot {
                tracing::info!(
                    keyspace = self.uid,
                    shard = building.shard,
                    replica = format!("{:016x}", building.id),
                    "born"
                );
                self.feed(member, replica);
            }
        }
        self.context.changed.notify_one();
    }

    /// Starts what keeps an open replica alive: following, syncing, collecting, comparing; and what closes a damaged one.
    fn feed(self: &Arc<Self>, member: &Member, replica: Arc<Replica>) {
        let (keyspace, compared) = (self.clone(), replica.clone());
        member.spawn(async move { repair::run(&keyspace, &compared).await });
        let (keyspace, watched, stop) = (self.clone(), replica.clone(), member.stop.clone());
        // Not one of the member's own tasks: it outlives the member that it ends.
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = quarantine::due(&keyspace, &watched) => keyspace.quarantine(&watched).await,
            }
        });
        let (keyspace, follower) = (self.clone(), replica.clone());
        member.spawn(async move {
            let mut updates = keyspace.updates();
            let mut following: BTreeMap<(u64, String), tokio_util::task::AbortOnDropHandle<()>> = BTreeMap::new();
            let mut taking = BTreeMap::new();
            loop {
                let topology = keyspace.topology();
                updates.mark_unchanged();
                for returned in topology.handing_over(follower.id) {
                    let task = (returned.replica, returned.store.clone());
                    taking.entry(task.clone()).or_insert_with(|| {
                        let task = snapshot::take_over(keyspace.clone(), follower.clone(), task.0, task.1);
                        tokio_util::task::AbortOnDropHandle::new(tokio::spawn(task))
                    });
                }
                taking.retain(|(id, _), _| topology.is_given_up(*id));
                let wanted: BTreeSet<(u64, String)> = topology
                    .sources(follower.id)
                    .iter()
                    .map(|p| (p.assignment.replica, p.assignment.store.clone()))
                    .collect();
                following.retain(|source, _| wanted.contains(source));
                for (source, store) in wanted {
                    following.entry((source, store.clone())).or_insert_with(|| {
                        let task = follow::follow(keyspace.clone(), follower.clone(), source, store);
                        tokio_util::task::AbortOnDropHandle::new(tokio::spawn(task))
                    });
                }
                if keyspace.version() != topology.version {
                    continue;
                }
                if updates.changed().await.is_err() {
                    return;
                }
            }
        });
        let keyspace = self.clone();
        member.spawn(async move {
            let mut collector = Collector::default();
            let (mut last, mut told) = (Instant::now(), BTreeMap::new());
            loop {
                let phase = keyspace.with_topology(Topology::phase);
                tokio::time::sleep(if phase == Some(Phase::Stable) { SYNC_EACH } else { SYNC_SOON }).await;
                if !is_sync_due(phase, replica.progress.is_unconfirmed(), last.elapsed()) {
                    // How far it has come is waited for all the same.
                    let positions = replica.progress.positions();
                    if positions != told {
                        told = positions;
                        replica.progress.tell();
                    }
                    continue;
                }
                last = Instant::now();
                let synced = replica.clone();
                let _ = keyspace.env().blocking(move || synced.sync()).await;
                collector.step(&keyspace, &replica).await;
            }
        });
    }

    /// Closes a damaged replica; its files stay until the topology drops it.
    async fn quarantine(&self, replica: &Replica) {
        let (shard, fault) = (replica.shard, replica.progress.fault().unwrap_or_default().to_owned());
        let id = format!("{:016x}", replica.id);
        let _turn = self.installing.lock().await;
        let candidate = !replica.progress.served();
        let broken = Broken { shard, fault: fault.clone(), quarantined: true, candidate };
        let open = {
            let mut members = self.members_mut();
            if members.get(&replica.id).is_none_or(|m| m.stop.is_cancelled()) {
                return;
            }
            members.insert(replica.id, self.member(Slot::Broken(broken)))
        };
        if let Some(open) = open {
            open.end(self.env()).await;
        }
        self.context.counts.quarantines.inc();
        tracing::error!(
            keyspace = self.uid,
            shard,
            replica = id,
            fault,
            "a damaged replica is closed; it is made anew from another copy"
        );
        self.context.changed.notify_one();
    }

    /// Stops a replica and deletes (or keeps, unserved) its files.
    async fn remove(&self, id: u64, retain: bool) {
        let Some(member) = self.members_mut().remove(&id) else { return };
        tracing::info!(keyspace = self.uid, replica = format!("{id:016x}"), retain, "dropping a replica");
        member.end(self.env()).await;
        let dir = self.dir.replica(&self.uid, id);
        if !retain {
            // Its name first: a folder without one is removed at the next start.
            let _ = std::fs::remove_file(dir.join("replica.json"));
            let _ = self.env().blocking(move || std::fs::remove_dir_all(dir)).await;
        }
        self.context.changed.notify_one();
    }

    fn delete_folder(&self, retain: bool) {
        let folder = self.dir.keyspace(&self.uid);
        let done = if retain {
            std::fs::rename(&folder, folder.with_extension("retained"))
        } else {
            std::fs::remove_dir_all(&folder)
        };
        if let Err(error) = done {
            tracing::warn!(keyspace = self.uid, %error, "the keyspace's folder is left");
        }
        self.gone.store(true, Ordering::Release);
        self.context.changed.notify_one();
    }

    /// The name that people know it by; the uid until a topology has said.
    pub fn name(&self) -> String {
        let name = self.with_topology(|t| t.name.clone()).unwrap_or_default();
        if name.is_empty() { self.uid.clone() } else { name }
    }

    /// Whether it serves here all that the topology's `current` view assigns to this store; if not, why.
    pub fn ready(&self) -> Result<(), String> {
        let update = self.update.borrow().clone();
        let Some(topology) = update.topology.as_ref().filter(|t| t.phase() != Phase::Deleting) else { return Ok(()) };
        let mut assigned = false;
        let places = topology.current.iter().flat_map(View::places);
        for place in places.filter(|p| p.assignment.store == self.store && p.assignment.replica != 0) {
            assigned = true;
            let members = self.members();
            let trouble = match members.get(&place.assignment.replica).map(|m| &m.slot) {
                Some(Slot::Open(replica)) if place.assignment.serving => {
                    replica.progress.fault().map(|_| replica.progress.fault_text())
                }
                Some(Slot::Open(_)) => None,
                Some(Slot::Building(_)) => Some("its replica is still being built".to_owned()),
                Some(Slot::Broken(broken)) => Some(format!("its replica is not open: {}", broken.fault)),
                None => Some(format!("its replica {:016x} is not here", place.assignment.replica)),
            };
            if let Some(trouble) = trouble {
                return Err(format!("keyspace {}, shard {}: {trouble}", self.name(), place.shard));
            }
        }
        if assigned && !self.is_confirmed() {
            let version = topology.version;
            return Err(format!(
                "keyspace {} waits to learn whether topology version {version} is the current one",
                self.name()
            ));
        }
        Ok(())
    }

    /// Stops everything cleanly.
    pub async fn stop(&self) {
        self.stop.cancel();
        let members = std::mem::take(&mut *self.members_mut());
        for (_, member) in members {
            member.end(self.env()).await;
        }
    }

    /// The state of all replicas here.
    pub fn report(&self) -> KeyspaceReport {
        let topology = self.topology();
        let members = self.members();
        let replicas = members
            .iter()
            .map(|(id, member)| match &member.slot {
                Slot::Open(replica) => report_open(&topology, replica),
                Slot::Building(building) => ReplicaReport {
                    id: *id,
                    shard: building.shard,
                    candidate: true,
                    sources: building.sources().into_iter().map(|(id, s)| source(id, s, None)).collect(),
                    ..ReplicaReport::default()
                },
                Slot::Broken(broken) => ReplicaReport {
                    id: *id,
                    shard: broken.shard,
                    fault: broken.fault.clone(),
                    quarantined: broken.quarantined,
                    candidate: broken.candidate,
                    ..ReplicaReport::default()
                },
            })
            .collect();
        KeyspaceReport {
            uid: self.uid.clone(),
            version: self.installed.load(Ordering::Acquire),
            topology: Some((*topology).clone()),
            replicas,
        }
    }
}

/// The replicas here by what belongs to them.
pub struct Routes<'a> {
    store: &'a str,
    update: watch::Ref<'a, Arc<KeyspaceUpdate>>,
    members: std::sync::RwLockReadGuard<'a, BTreeMap<u64, Member>>,
}

impl Routes<'_> {
    /// The replica here that reads and writes of a key with this hash go to.
    pub fn route(&self, partition_hash: u64) -> Option<&Arc<Replica>> {
        let topology = self.update.topology.as_ref()?;
        for view in topology.served() {
            let shard = vasto_client::hash::jump_hash(partition_hash, view.size());
            let Some(shard) = view.shards.get(shard as usize) else { continue };
            for assignment in shard.replicas.iter().filter(|a| a.store == self.store) {
                if let Some(Slot::Open(replica)) = self.members.get(&assignment.replica).map(|m| &m.slot) {
                    return Some(replica);
                }
            }
        }
        None
    }

    /// The topology's version.
    pub fn version(&self) -> u64 {
        version_of(&self.update)
    }

    /// The topology, with addresses.
    pub fn update(&self) -> Arc<KeyspaceUpdate> {
        self.update.clone()
    }
}

impl Member {
    fn shard(&self) -> u32 {
        match &self.slot {
            Slot::Open(replica) => replica.shard,
            Slot::Building(building) => building.shard,
            Slot::Broken(broken) => broken.shard,
        }
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    async fn end(self, env: &Env) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        if let Slot::Open(replica) = &self.slot {
            replica.stop().await;
            let engine = replica.engine.clone();
            let _ = env.blocking(move || engine.cancel()).await;
        }
    }
}

fn source(replica: u64, s: SourceProgress, confirmed: Option<vasto_client::v1::Position>) -> SourceReport {
    SourceReport {
        replica,
        epoch: confirmed.map_or(s.epoch, |p| p.epoch),
        confirmed: confirmed.map_or(0, |p| p.seq),
        lag: s.lag,
        records: s.records,
        bytes: s.bytes,
        records_total: s.records_total,
    }
}

fn report_open(topology: &Topology, replica: &Replica) -> ReplicaReport {
    let progress = &replica.progress;
    let fence = progress.fence();
    let (records, bytes) = replica.engine.estimate();
    let mut known = progress.sources();
    let sources = topology
        .sources(replica.id)
        .iter()
        .map(|p: &Place<'_>| {
            let id = p.assignment.replica;
            let seen = known.remove(&id).unwrap_or_default();
            let confirmed = progress.synced_position(id);
            // A lag heard in another epoch says nothing of this one.
            let seen = match confirmed {
                Some(position) if position.epoch != seen.epoch => SourceProgress { lag: u64::MAX, ..seen },
                None => SourceProgress { lag: u64::MAX, ..seen },
                _ => seen,
            };
            source(id, seen, confirmed)
        })
        .collect();
    ReplicaReport {
        id: replica.id,
        shard: replica.shard,
        born: true,
        epoch: progress.birth().epoch,
        last_seq: progress.last_seq(),
        fence_version: fence.version,
        fence_seq: fence.seq,
        cleaned_version: progress.cleaned(),
        sources,
        records,
        bytes,
        fault: progress.fault().unwrap_or_default().to_owned(),
        todo_records: progress.todo(),
        full: progress.full.load(Ordering::Relaxed),
        candidate: !progress.served(),
        taken_over: progress.taken_over(),
        quarantined: false,
    }
}

fn version_of(update: &KeyspaceUpdate) -> u64 {
    update.topology.as_ref().map_or(0, |t| t.version)
}

/// A duration such as `250ms`, `10s` or `1h30m`, in ms.
fn duration_ms(text: &str) -> Option<u64> {
    let mut total = 0u64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let ms = match &rest[..unit] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(ms)?)?;
        rest = &rest[unit..];
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_synced_at_once_only_where_somebody_waits_for_it() {
        let due = |phase, unconfirmed| is_sync_due(phase, unconfirmed, SYNC_SOON);
        assert!(!due(Some(Phase::Stable), true));
        assert!(!due(Some(Phase::Prepare), false), "copies may take long");
        assert!(due(Some(Phase::Prepare), true), "a candidate is not ready before its first confirmation");
        assert!([Phase::Switch, Phase::Fence, Phase::Drain, Phase::Cleanup].into_iter().all(|p| due(Some(p), false)));
        assert!(
            is_sync_due(Some(Phase::Prepare), false, SYNC_EACH) && is_sync_due(Some(Phase::Stable), false, SYNC_EACH)
        );
    }

    #[test]
    fn durations_read_as_the_spec_writes_them() {
        assert_eq!(duration_ms("1h30m"), Some(5_400_000));
        assert_eq!(duration_ms("250ms"), Some(250));
        assert_eq!(duration_ms("10d"), Some(864_000_000));
        assert_eq!(duration_ms("10"), None);
        assert_eq!(duration_ms("x"), None);
    }
}
