//! The topology server: what stores report comes together here, and committed
//! topologies go out from here, to the stores they concern and to every client that
//! watches. It decides nothing; a driver does, by what it sees here.

mod serve;
mod service;
mod streams;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use prost::bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vasto_client::topology::short;
use vasto_client::v1::watch_response::Event;
use vasto_client::v1::{
    Disk, KeyspaceReport, KeyspaceUpdate, Phase, StoreAddress, StoreReport, StoreUpdate, Topology, WatchRequest,
    WatchResponse,
};
use vasto_crds::Keyspace;

pub use serve::server;
pub use service::OperatorService;

/// A store that has said nothing for this long is away.
pub const SILENCE: Duration = Duration::from_secs(5);

const MAX_WATCHERS: usize = 50_000;
const MAX_STORES: usize = 8_192;
/// Of one watcher.
const MAX_NAMES: usize = 1_024;
/// How much later receipts are due for each watcher that there is. The first come after half of it: two cores have told
/// most by then.
const RECEIPT_EACH: Duration = Duration::from_micros(30);
/// A SWITCH waits for receipts only so long.
const MAX_RECEIPT: Duration = Duration::from_secs(1);
/// An update for a store is cut after this many bytes; the rest follows in another.
const UPDATE_BYTES: usize = 1 << 20;

/// The topology server's state. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Hub(Arc<Inner>);

struct Inner {
    index: Mutex<Index>,
    /// The index's serial: wakes the streams of stores.
    changed: watch::Sender<u64>,
    wake: Notify,
    leader: watch::Sender<Leader>,
    address_of: Option<AddressOf>,
    stop: CancellationToken,
}

/// Where a store of a keyspace (by the topology's name of it) can be reached, where a rule says so.
pub type AddressOf = fn(keyspace: &str, store: &str) -> String;

/// Who takes the stores' reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leader {
    /// This operator.
    Here,
    /// Another one: at this address (`host:port`), if it is known.
    Elsewhere(Option<String>),
}

#[derive(Default)]
struct Index {
    /// Rises with everything that a store may have to be told.
    serial: u64,
    last_id: u64,
    /// Whether a name that nobody claimed is really missing.
    settled: bool,
    names: BTreeMap<String, Name>,
    /// By uid.
    committed: BTreeMap<String, Committed>,
    /// The resources with their statuses, by uid: for people to look at.
    described: BTreeMap<String, Arc<Keyspace>>,
    stores: BTreeMap<StoreKey, Store>,
    watchers: BTreeMap<u64, Watcher>,
    /// By uid, for what a driver has asked since the last commit.
    waits: BTreeMap<String, Wait>,
    dirty: Dirty,
}

/// The uid of the one keyspace that the store serves (empty: any), and its name.
type StoreKey = (String, String);

/// The stores that serve this keyspace, or any.
fn serving<'a>(stores: &'a BTreeMap<StoreKey, Store>, uid: &'a str) -> impl Iterator<Item = (&'a str, &'a Store)> {
    let of = |only: &'a str| {
        let first = (only.to_owned(), String::new());
        stores.range(first..).take_while(move |((o, _), _)| o == only).map(|((_, name), store)| (name.as_str(), store))
    };
    of(uid).chain(of("").filter(move |_| !uid.is_empty()))
}

/// A keyspace's name, as watchers see it.
struct Name {
    claimed: bool,
    shown: Shown,
    /// By the watcher's id, and how it asked for the name.
    watching: BTreeMap<(u64, Arc<str>), Arc<Inbox>>,
}

impl Name {
    fn needed(&self) -> bool {
        self.claimed || !self.watching.is_empty()
    }

    fn show(&mut self, shown: Shown) {
        self.watching.iter().for_each(|((_, asked), inbox)| inbox.put(asked.clone(), shown.clone()));
        self.shown = shown;
    }
}

/// What a watcher is still to be told: of each name the latest, so that nothing queues up behind a slow one.
#[derive(Default)]
struct Inbox {
    news: Mutex<News>,
    come: Notify,
}

#[derive(Default)]
struct News {
    /// By name, as the watcher asked for it.
    latest: BTreeMap<Arc<str>, Shown>,
    last: Option<Arc<str>>,
}

impl News {
    /// Names take turns: one that changes all the time keeps no other from being told.
    fn take(&mut self) -> Option<(Arc<str>, Shown)> {
        let later = |last: &Arc<str>| self.latest.range::<str, _>((Excluded(&**last), Unbounded)).next();
        let (name, _) = self.last.as_ref().and_then(later).or_else(|| self.latest.first_key_value())?;
        let (name, shown) = self.latest.remove_entry(&name.clone())?;
        self.last = Some(name.clone());
        Some((name, shown))
    }
}

impl Inbox {
    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, name: Arc<str>, shown: Shown) {
        self.news().latest.insert(name, shown);
        self.come.notify_one();
    }

    /// The next of what has come; nothing is lost if this is dropped while it waits.
    async fn next(&self) -> (Arc<str>, Shown) {
        loop {
            let next = self.news().take();
            if let Some(next) = next {
                return next;
            }
            self.come.notified().await;
        }
    }
}

/// What a watcher is to be told of a name.
#[derive(Clone)]
enum Shown {
    /// Nothing yet.
    Pending,
    Missing,
    Update(Arc<Published>),
}

/// One encoding for all watchers.
struct Published {
    uid: String,
    version: u64,
    bytes: Bytes,
}

struct Committed {
    topology: Arc<Topology>,
    /// What clients may act on: the committed one, or one before it.
    published: Option<Arc<Topology>>,
    stores: BTreeSet<String>,
    serial: u64,
    /// One encoding for all stores: a `StoreUpdate` with this keyspace only. Several
    /// of them put together are again a `StoreUpdate`.
    update: Bytes,
}

struct Store {
    address: String,
    incarnation: u64,
    stopping: bool,
    /// The stream that speaks for it.
    stream: Option<u64>,
    heard: Instant,
    /// By uid, without topologies.
    reports: BTreeMap<String, Arc<KeyspaceReport>>,
    /// By uid.
    topologies: BTreeMap<String, Arc<Topology>>,
    disk: Option<Disk>,
    foreign: Vec<String>,
}

#[derive(Default)]
struct Watcher {
    inbox: Arc<Inbox>,
    /// As it asked for them.
    names: BTreeSet<Arc<str>>,
    /// Uid -> version.
    known: BTreeMap<String, u64>,
}

impl Watcher {
    fn knows(&self, uid: &str, version: u64) -> bool {
        self.known.get(uid).is_some_and(|known| *known >= version)
    }
}

/// A driver waits until all who watch a keyspace know a version of it. Their acknowledgements come by the thousand;
/// only the last one is worth waking it.
struct Wait {
    name: String,
    version: u64,
    behind: HashSet<u64>,
}

impl Wait {
    /// This watcher has acknowledged, or has gone; says whether that was the last one.
    fn done(&mut self, id: u64) -> bool {
        self.behind.remove(&id) && self.behind.is_empty()
    }
}

/// Keyspaces (by uid) that a driver should look at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// Every one: a store came or went.
    All,
    /// These.
    Some(BTreeSet<String>),
}

impl Default for Dirty {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

impl Dirty {
    fn add(&mut self, uid: &str) {
        if let Self::Some(uids) = self {
            uids.insert(uid.to_owned());
        }
    }

    /// A store came or went that serves this keyspace only, or (empty) any.
    fn touch(&mut self, only: &str) {
        if only.is_empty() { *self = Self::All } else { self.add(only) }
    }
}

/// A store, as a driver sees it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Where it listens, as last heard.
    pub address: String,
    /// It has a stream and was heard on it lately.
    pub living: bool,
    /// How long ago it was heard.
    pub silent: Duration,
    /// What it last said of the keyspace in question; none if it does not have it.
    pub report: Option<Arc<KeyspaceReport>>,
    /// The topology of it that the store has.
    pub topology: Option<Arc<Topology>>,
    /// Its disk, as last heard.
    pub disk: Option<Disk>,
    /// Other keyspaces, by uid, whose data lies in its folder, so that it does nothing there.
    pub foreign: Vec<String>,
}

impl Store {
    fn living(&self) -> bool {
        self.stream.is_some() && !self.stopping && self.heard.elapsed() < SILENCE
    }
}

impl Hub {
    /// A hub that knows nothing yet and takes reports. Its streams end when `stop` is cancelled.
    pub fn new(stop: CancellationToken) -> Self {
        Self::with(stop, Leader::Here, None)
    }

    /// The same, where others may lead, and where stores are found by a rule.
    pub fn with(stop: CancellationToken, leader: Leader, address_of: Option<AddressOf>) -> Self {
        let (index, changed, leader) = (Mutex::default(), watch::Sender::new(0), watch::Sender::new(leader));
        Self(Arc::new(Inner { index, changed, wake: Notify::new(), leader, address_of, stop }))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change of the index: wakes the streams of stores.
    fn tell_stores(&self, index: &Index) {
        self.0.changed.send_replace(index.serial);
    }

    // What a driver does.

    /// Waits until there is something new to look at.
    pub async fn wait(&self) {
        self.0.wake.notified().await;
    }

    /// Takes what there is to look at again.
    pub fn take_dirty(&self) -> Dirty {
        std::mem::take(&mut self.index().dirty)
    }

    /// From now on reports are taken here, or refused with the address of who takes them. Streams of
    /// stores end when another leads.
    pub fn set_leader(&self, leader: Leader) {
        if leader != Leader::Here {
            self.index().described.clear();
        }
        self.0.leader.send_if_modified(|now| {
            *now != leader && {
                *now = leader;
                true
            }
        });
    }

    /// This name belongs to a keyspace, of which watchers will be told in time.
    pub fn claim(&self, name: &str) {
        let mut index = self.index();
        let entry = index.name(name);
        entry.claimed = true;
        if matches!(entry.shown, Shown::Missing) {
            entry.show(Shown::Pending);
        }
    }

    /// This name belongs to no keyspace any longer.
    pub fn release(&self, name: &str) {
        self.index().release(name);
    }

    /// Whether [`Hub::settle`] was called.
    pub fn settled(&self) -> bool {
        self.index().settled
    }

    /// From now on a name that nobody has claimed is answered as missing.
    pub fn settle(&self) {
        let mut index = self.index();
        index.settled = true;
        for name in index.names.values_mut().filter(|n| !n.claimed) {
            name.show(Shown::Missing);
        }
        index.names.retain(|_, name| name.needed());
    }

    /// Hands a committed topology to the stores that it concerns. What is older
    /// than what was committed before is ignored.
    pub fn commit(&self, topology: Arc<Topology>) {
        let mut index = self.index();
        let old = index.committed.get(&topology.uid);
        if old.is_some_and(|old| old.topology.version >= topology.version) {
            return;
        }
        let published = old.and_then(|old| old.published.clone());
        index.serial += 1;
        let committed = Committed {
            stores: topology.stores().into_iter().map(str::to_owned).collect(),
            published,
            serial: index.serial,
            update: self.encode_for_stores(&index, &topology),
            topology,
        };
        // Whoever still waits asks again.
        index.waits.remove(&committed.topology.uid);
        index.committed.insert(committed.topology.uid.clone(), committed);
        self.tell_stores(&index);
    }

    /// Hands the committed topology of this keyspace to those who watch its name. One
    /// that is being deleted is missing to them.
    pub fn publish(&self, uid: &str) {
        let mut index = self.index();
        let Some(committed) = index.committed.get_mut(uid) else { return };
        let topology = committed.topology.clone();
        if topology.phase() == Phase::Deleting {
            committed.published = None;
            index.release(&topology.name);
            return;
        }
        if committed.published.as_ref().is_some_and(|p| p.version >= topology.version) {
            return;
        }
        committed.published = Some(topology.clone());
        self.show(&mut index, &topology);
    }

    /// Forgets a keyspace, so that stores are told nothing more of it.
    pub fn forget(&self, uid: &str) {
        let mut index = self.index();
        index.committed.remove(uid);
        index.waits.remove(uid);
        index.described.remove(uid);
    }

    /// Keeps a resource, as it is now, for whoever wants to look at it.
    pub fn describe(&self, keyspace: Arc<Keyspace>) {
        self.index().described.insert(keyspace.uid().to_owned(), keyspace);
    }

    /// There is nothing to look at any more.
    pub fn undescribe(&self, uid: &str) {
        self.index().described.remove(uid);
    }

    /// What was described, in the order of names.
    pub fn described(&self) -> Vec<Arc<Keyspace>> {
        let mut all: Vec<_> = self.index().described.values().cloned().collect();
        all.sort_by(|a, b| (&a.metadata.namespace, &a.metadata.name).cmp(&(&b.metadata.namespace, &b.metadata.name)));
        all
    }

    /// The committed topology of this keyspace.
    pub fn committed(&self, uid: &str) -> Option<Arc<Topology>> {
        self.index().committed.get(uid).map(|committed| committed.topology.clone())
    }

    /// Who leads.
    pub fn leads(&self) -> Leader {
        self.0.leader.borrow().clone()
    }

    /// Whether someone who watches this keyspace has not said yet that it knows this version. If so, the driver is
    /// woken once nobody is behind any more.
    pub fn watchers_behind(&self, name: &str, uid: &str, version: u64) -> bool {
        let Index { names, watchers, waits, .. } = &mut *self.index();
        if let Some(wait) = waits.get(uid).filter(|w| w.version == version && w.name == name) {
            return !wait.behind.is_empty();
        }
        let watching = names.get(name).into_iter().flat_map(|name| name.watching.keys().map(|(id, _)| *id));
        let knows = |id: &u64| watchers.get(id).is_some_and(|watcher| watcher.knows(uid, version));
        let wait = Wait { name: name.to_owned(), version, behind: watching.filter(|id| !knows(id)).collect() };
        let any = !wait.behind.is_empty();
        waits.insert(uid.to_owned(), wait);
        any
    }

    /// Every store that was heard of, with what it says of this keyspace.
    pub fn look(&self, uid: &str) -> BTreeMap<String, Seen> {
        let index = self.index();
        let seen = |store: &Store| Seen {
            address: store.address.clone(),
            living: store.living(),
            silent: store.heard.elapsed(),
            report: store.reports.get(uid).cloned(),
            topology: store.topologies.get(uid).cloned(),
            disk: store.disk,
            foreign: store.foreign.clone(),
        };
        serving(&index.stores, uid).map(|(name, store)| (name.to_owned(), seen(store))).collect()
    }

    /// The topologies of this keyspace that stores have reported.
    pub fn reported(&self, uid: &str) -> Vec<Arc<Topology>> {
        serving(&self.index().stores, uid).filter_map(|(_, s)| s.topologies.get(uid).cloned()).collect()
    }

    /// The uid and name of every keyspace of which a store has reported a topology.
    pub fn reported_keyspaces(&self) -> BTreeMap<String, String> {
        let index = self.index();
        let all = index.stores.values().flat_map(|s| s.topologies.values());
        all.map(|t| (t.uid.clone(), t.name.clone())).collect()
    }

    /// Living stores of any keyspace that hold no replica of anything, and that no committed topology names.
    pub fn idle_stores(&self) -> BTreeSet<String> {
        let index = self.index();
        let idle = serving(&index.stores, "").filter(|(name, store)| {
            store.living()
                && store.reports.values().all(|r| r.replicas.is_empty())
                && index.committed.values().all(|c| !c.stores.contains(*name))
        });
        idle.map(|(name, _)| name.to_owned()).collect()
    }

    /// Stores of any keyspace that live.
    pub fn living(&self) -> BTreeSet<String> {
        let index = self.index();
        serving(&index.stores, "").filter(|(_, s)| s.living()).map(|(name, _)| name.to_owned()).collect()
    }

    /// Whether all these stores of any keyspace live.
    pub fn all_living(&self, names: &BTreeSet<String>) -> bool {
        let index = self.index();
        names.iter().all(|name| index.store("", name).is_some_and(Store::living))
    }

    /// Stores and watchers that have a stream.
    pub fn counts(&self) -> (usize, usize) {
        let index = self.index();
        (index.stores.values().filter(|s| s.stream.is_some()).count(), index.watchers.len())
    }

    /// Forgets stores that are gone and that no committed topology names.
    pub fn sweep_stores(&self) {
        let Index { stores, committed, .. } = &mut *self.index();
        stores.retain(|(only, name), store| {
            let named = |c: &Committed| c.stores.contains(name);
            store.stream.is_some()
                || if only.is_empty() { committed.values().any(named) } else { committed.get(only).is_some_and(named) }
        });
    }

    // What streams do.

    fn stop(&self) -> &CancellationToken {
        &self.0.stop
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    fn leader(&self) -> watch::Receiver<Leader> {
        self.0.leader.subscribe()
    }

    fn next_id(&self) -> u64 {
        self.index().next_id()
    }

    /// A new watcher's id, and where it finds what it is to be told.
    fn enter(&self) -> Result<(u64, Arc<Inbox>), Status> {
        let mut index = self.index();
        if index.watchers.len() >= MAX_WATCHERS {
            return Err(Status::resource_exhausted(format!(
                "{MAX_WATCHERS} clients are watching, which is the most that one operator serves; try again later"
            )));
        }
        let (id, watcher) = (index.next_id(), Watcher::default());
        let inbox = watcher.inbox.clone();
        index.watchers.insert(id, watcher);
        Ok((id, inbox))
    }

    /// Takes in what a watcher asks for and knows. A name that is asked for again is answered again.
    fn heard_from_watcher(&self, id: u64, request: WatchRequest) -> Result<(), Status> {
        let mut index = self.index();
        let index = &mut *index;
        let Some(watcher) = index.watchers.get_mut(&id) else { return Ok(()) };
        let mut wake = false;
        for known in request.known {
            let wait = index.waits.get_mut(&known.uid).filter(|wait| wait.version <= known.version);
            if wait.is_some_and(|wait| wait.done(id)) {
                index.dirty.add(&known.uid);
                wake = true;
            }
            let version = watcher.known.entry(known.uid).or_default();
            *version = known.version.max(*version);
        }
        let asked: Vec<Arc<str>> = request.keyspaces.into_iter().map(Arc::from).collect();
        for asked in &asked {
            watcher.names.insert(asked.clone());
            let name = short(asked);
            for (uid, wait) in index.waits.iter_mut().filter(|(_, wait)| wait.name == name) {
                if !watcher.knows(uid, wait.version) {
                    wait.behind.insert(id);
                }
            }
        }
        if wake {
            self.0.wake.notify_one();
        }
        if watcher.names.len() > MAX_NAMES || watcher.known.len() > 4 * MAX_NAMES {
            return Err(Status::resource_exhausted(format!(
                "one stream watches at most {MAX_NAMES} keyspaces; open another for the rest"
            )));
        }
        let inbox = watcher.inbox.clone();
        for asked in asked {
            let name = index.name(short(&asked));
            inbox.put(asked.clone(), name.shown.clone());
            name.watching.insert((id, asked), inbox.clone());
        }
        Ok(())
    }

    fn leave(&self, id: u64) {
        let mut index = self.index();
        let index = &mut *index;
        let watcher = index.watchers.remove(&id).unwrap_or_default();
        let mut wake = false;
        for (uid, wait) in &mut index.waits {
            if wait.done(id) {
                index.dirty.add(uid);
                wake = true;
            }
        }
        for asked in watcher.names {
            if let Some(name) = index.names.get_mut(short(&asked)) {
                name.watching.remove(&(id, asked.clone()));
            }
            index.sweep(short(&asked));
        }
        if wake {
            self.0.wake.notify_one();
        }
    }

    /// The first report of a stream: from now on this stream speaks for the store.
    fn register(&self, id: u64, report: StoreReport) -> Result<(), Status> {
        let mut index = self.index();
        let name = &report.store;
        if name.is_empty() || name.len() > 253 {
            return Err(Status::invalid_argument(format!(
                "the store's name {name:?} has {} bytes; it must have 1 to 253",
                name.len()
            )));
        }
        let full = index.stores.len() >= MAX_STORES;
        let key = (report.only.clone(), name.clone());
        match index.stores.get_mut(&key) {
            Some(old) if old.living() && old.incarnation != report.incarnation => {
                return Err(Status::already_exists(format!(
                    "a store named {name} is connected already, from {}: two processes can't be one store; \
                     stop one of them, or give this one another name",
                    old.address
                )));
            }
            Some(old) => {
                old.stream = Some(id);
                old.incarnation = report.incarnation;
            }
            None if full => {
                return Err(Status::resource_exhausted(format!(
                    "{MAX_STORES} stores are known, which is the most that one operator serves"
                )));
            }
            None => {
                let store = Store {
                    address: String::new(),
                    incarnation: report.incarnation,
                    stopping: false,
                    stream: Some(id),
                    heard: Instant::now(),
                    reports: BTreeMap::new(),
                    topologies: BTreeMap::new(),
                    disk: None,
                    foreign: Vec::new(),
                };
                index.stores.insert(key, store);
            }
        }
        tracing::info!(store = name, keyspace = report.only, address = report.address, "a store has connected");
        index.dirty.touch(&report.only);
        // A stream that spoke for it before learns that it no longer does.
        self.tell_stores(&index);
        drop(index);
        self.heard_from_store(id, report)
    }

    fn heard_from_store(&self, id: u64, report: StoreReport) -> Result<(), Status> {
        let mut index = self.index();
        let index = &mut *index;
        let key = (report.only, report.store);
        let name = key.1.as_str();
        let store = speaker(&mut index.stores, &key, id)?;
        if store.incarnation != report.incarnation {
            return Err(Status::invalid_argument(format!(
                "the incarnation of {} changed within one stream: a store that starts anew must connect anew",
                name
            )));
        }
        let was_living = store.living();
        store.heard = Instant::now();
        store.stopping = report.stopping;
        store.disk = report.disk;
        let disturbed = store.foreign != report.foreign;
        store.foreign = report.foreign;
        let moved = store.address != report.address;
        store.address = report.address;

        let mut changed = Vec::new();
        let mut before = std::mem::take(&mut store.reports);
        for mut keyspace in report.keyspaces {
            let uid = keyspace.uid.clone();
            if let Some(topology) = keyspace.topology.take() {
                store.topologies.insert(uid.clone(), Arc::new(topology));
            }
            let old = before.remove(&uid);
            let same = old.filter(|old| **old == keyspace);
            if same.is_none() {
                changed.push(uid.clone());
            }
            store.reports.insert(uid, same.unwrap_or_else(|| Arc::new(keyspace)));
        }
        changed.extend(before.into_keys());
        let Store { reports, topologies, .. } = store;
        topologies.retain(|uid, _| reports.contains_key(uid));

        if was_living != store.living() || disturbed {
            index.dirty.touch(&key.0);
        }
        changed.iter().for_each(|uid| index.dirty.add(uid));
        if moved {
            self.readdress(index, &key);
            self.tell_stores(index);
        }
        self.0.wake.notify_one();
        Ok(())
    }

    /// What this store has to be told beyond what was `sent` (uid -> serial).
    fn updates_for(&self, key: &StoreKey, id: u64, sent: &mut BTreeMap<String, u64>) -> Result<Option<Bytes>, Status> {
        let mut index = self.index();
        let index = &mut *index;
        let store = speaker(&mut index.stores, key, id)?;
        sent.retain(|uid, _| index.committed.contains_key(uid));
        let (only, name) = key;
        let mut bytes = BytesMut::new();
        let own = index.committed.get_key_value(only).filter(|_| !only.is_empty());
        let any = index.committed.iter().filter(|_| only.is_empty());
        for (uid, committed) in own.into_iter().chain(any) {
            let concerned = committed.stores.contains(name) || store.reports.contains_key(uid);
            if concerned && bytes.len() < UPDATE_BYTES && sent.get(uid) != Some(&committed.serial) {
                bytes.extend_from_slice(&committed.update);
                sent.insert(uid.clone(), committed.serial);
            }
        }
        Ok((!bytes.is_empty()).then(|| bytes.freeze()))
    }

    /// The stream that speaks for the store is there, but nothing has come on it for [`SILENCE`].
    fn fell_silent(&self, key: &StoreKey, id: u64) {
        let mut index = self.index();
        if speaker(&mut index.stores, key, id).is_ok() {
            index.dirty.touch(&key.0);
            tracing::info!(store = key.1, keyspace = key.0, "a store says nothing any more");
            self.0.wake.notify_one();
        }
    }

    /// The stream that spoke for the store has ended.
    fn silent(&self, key: &StoreKey, id: u64) {
        let mut index = self.index();
        if let Ok(store) = speaker(&mut index.stores, key, id) {
            store.stream = None;
            index.dirty.touch(&key.0);
            tracing::info!(store = key.1, keyspace = key.0, "a store has disconnected");
            self.0.wake.notify_one();
        }
    }

    fn update(&self, index: &Index, topology: &Topology) -> KeyspaceUpdate {
        let address = |store: &str| {
            let heard = index.store(&topology.uid, store).map(|s| s.address.clone()).filter(|a| !a.is_empty());
            let ruled = || self.0.address_of.map(|of| of(&topology.name, store));
            Some(StoreAddress { store: store.to_owned(), address: heard.or_else(ruled)? })
        };
        let addresses = topology.stores().into_iter().filter_map(address).collect();
        KeyspaceUpdate { topology: Some(topology.clone()), addresses }
    }

    fn encode_for_stores(&self, index: &Index, topology: &Topology) -> Bytes {
        StoreUpdate { keyspaces: vec![self.update(index, topology)] }.encode_to_vec().into()
    }

    fn show(&self, index: &mut Index, topology: &Topology) {
        let event = Some(Event::Update(self.update(index, topology)));
        let receipt = (RECEIPT_EACH * index.watchers.len() as u32).min(MAX_RECEIPT);
        let bytes = WatchResponse { event, receipt_ms: receipt.as_millis() as u32 }.encode_to_vec().into();
        let published = Published { uid: topology.uid.clone(), version: topology.version, bytes };
        let name = index.name(&topology.name);
        name.claimed = true;
        name.show(Shown::Update(Arc::new(published)));
    }

    /// The address of a store has changed: everyone who was told of it is told again.
    fn readdress(&self, index: &mut Index, (only, store): &StoreKey) {
        let told = |uid: &str, c: &Committed| (only.is_empty() || only == uid) && c.stores.contains(store);
        let uids: Vec<String> =
            index.committed.iter().filter(|(uid, c)| told(uid, c)).map(|(uid, _)| uid.clone()).collect();
        for uid in uids {
            index.serial += 1;
            let Some(committed) = index.committed.get(&uid) else { continue };
            let update = self.encode_for_stores(index, &committed.topology);
            let (serial, published) = (index.serial, committed.published.clone());
            if let Some(committed) = index.committed.get_mut(&uid) {
                (committed.serial, committed.update) = (serial, update);
            }
            if let Some(topology) = published
                && index.names.get(&topology.name).is_some_and(|n| n.claimed)
            {
                self.show(index, &topology);
            }
        }
    }
}

impl Index {
    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn name(&mut self, name: &str) -> &mut Name {
        let settled = self.settled;
        self.names.entry(name.to_owned()).or_insert_with(|| {
            let shown = if settled { Shown::Missing } else { Shown::Pending };
            Name { claimed: false, shown, watching: BTreeMap::new() }
        })
    }

    fn release(&mut self, name: &str) {
        let shown = if self.settled { Shown::Missing } else { Shown::Pending };
        if let Some(entry) = self.names.get_mut(name)
            && entry.claimed
        {
            entry.claimed = false;
            entry.show(shown);
        }
        self.sweep(name);
    }

    /// Forgets a name that is no keyspace's and that nobody watches.
    fn sweep(&mut self, name: &str) {
        if self.names.get(name).is_some_and(|name| !name.needed()) {
            self.names.remove(name);
        }
    }

    /// The store of this name that serves this keyspace.
    fn store(&self, uid: &str, name: &str) -> Option<&Store> {
        let find = |only: &str| self.stores.get(&(only.to_owned(), name.to_owned()));
        find(uid).or_else(|| find(""))
    }
}

/// The store, if this stream speaks for it.
fn speaker<'a>(stores: &'a mut BTreeMap<StoreKey, Store>, key: &StoreKey, id: u64) -> Result<&'a mut Store, Status> {
    stores
        .get_mut(key)
        .filter(|s| s.stream == Some(id))
        .ok_or_else(|| Status::aborted(format!("another stream speaks for {} now; this one has been given up", key.1)))
}
