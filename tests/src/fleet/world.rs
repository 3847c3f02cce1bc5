//! What the fake stores hold, and what must hold of it. Volumes outlive processes: a
//! replica is on a volume, a store is a process over one. Everything is copied at once, so a
//! phase lasts as long as the operator takes for it, unless a test holds it up.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::topology::Place;
use vasto_client::v1::{
    Disk, KeyspaceReport, Phase, ReplicaReport, SourceReport, StoreReport, StoreUpdate, Topology, View,
};

/// Bytes that one record counts for.
const RECORD: u64 = 1_000;
/// Complaints that are kept.
const COMPLAINTS: usize = 20;

/// One shard's copy.
#[derive(Clone, Debug, Default)]
pub struct Replica {
    /// Its shard.
    pub shard: u32,
    /// It has what its sources had.
    pub born: bool,
    /// It has stood in a `current` view.
    pub served: bool,
    /// The hashes of the keys that it has.
    pub has: BTreeSet<u64>,
    /// A person must look.
    pub fault: String,
    epoch: u64,
    /// The key learnt at each seq; 0 for a fence.
    log: Vec<u64>,
    /// Of each source: epoch and position.
    positions: BTreeMap<u64, (u64, usize)>,
    fence: (u64, usize),
    cleaned: u64,
    taken_over: BTreeSet<u64>,
}

/// One keyspace on a volume.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// The topology that is persisted there.
    pub topology: Topology,
    /// By id.
    pub replicas: BTreeMap<u64, Replica>,
    pub(super) unnamed: BTreeSet<u64>,
}

/// What a PersistentVolumeClaim stands for.
#[derive(Clone, Debug, Default)]
pub struct Volume {
    /// The claim's name.
    pub claim: String,
    /// By the keyspace's uid.
    pub keyspaces: BTreeMap<String, Held>,
    /// Keyspaces that were deleted with the policy Retain, by uid.
    pub retained: BTreeMap<String, Held>,
    /// Nothing more can be written.
    pub full: bool,
    /// Bytes.
    pub size: u64,
}

/// A running process.
#[derive(Clone, Debug)]
pub struct Store {
    /// Its pod.
    pub pod: String,
    /// As topologies call it.
    pub name: String,
    /// The uid of its keyspace.
    pub only: String,
    /// The uid of its claim.
    pub volume: String,
    /// Where others find it.
    pub address: String,
    pub(super) incarnation: u64,
    /// It does not speak to the operator.
    pub(super) silent: bool,
    /// It is going, and said so.
    pub(super) stopping: bool,
}

/// What stores are kept from doing, so that a phase lasts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Holds {
    /// PREPARE: candidates aren't born.
    pub births: bool,
    /// FENCE: old owners don't fence.
    pub fences: bool,
    /// DRAIN: nobody learns what was written since a fence.
    pub following: bool,
    /// CLEANUP: foreign keys stay.
    pub cleaning: bool,
    /// CLEANUP: what must be dropped stays.
    pub drops: bool,
}

/// The keys that were written to a keyspace, and what is expected of them.
#[derive(Debug, Default)]
struct Ledger {
    keys: BTreeSet<u64>,
    /// A test has taken copies away itself: keys may be without an acceptor for a while.
    outage: bool,
    /// Its last complaint, so that one cause complains once.
    last: String,
}

/// All volumes and processes of one namespace.
#[derive(Debug, Default)]
pub struct World {
    /// By the claim's uid.
    pub volumes: BTreeMap<String, Volume>,
    /// By the pod's uid.
    pub stores: BTreeMap<String, Store>,
    /// What is held up.
    pub holds: Holds,
    /// Keys that were copied to replicas that hadn't them.
    pub copied: u64,
    ledgers: BTreeMap<String, Ledger>,
    complaints: Vec<String>,
    random: u64,
}

impl World {
    /// Random ids, the same in each run for the same seed.
    pub fn new(seed: u64) -> Self {
        Self { random: seed, ..Self::default() }
    }

    pub(super) fn id(&mut self) -> u64 {
        self.random += 1;
        partition_hash(&self.random.to_be_bytes()).max(1)
    }

    // ---- processes and volumes ----

    pub(super) fn start(&mut self, pod_uid: &str, mut store: Store) {
        store.incarnation = self.id();
        if let Some(volume) = self.volumes.get_mut(&store.volume) {
            for held in volume.keyspaces.values_mut() {
                held.unnamed.clear();
            }
        }
        self.stores.insert(pod_uid.to_owned(), store);
        self.work("a store has started");
    }

    pub(super) fn end(&mut self, pod_uid: &str) -> Option<Store> {
        let ended = self.stores.remove(pod_uid);
        if let Some(store) = &ended {
            self.work(&format!("{} has ended", store.pod));
        }
        ended
    }

    pub(super) fn volume(&mut self, uid: &str, claim: &str, size: u64) {
        let volume = self.volumes.entry(uid.to_owned()).or_default();
        claim.clone_into(&mut volume.claim);
        volume.size = size;
    }

    pub(super) fn remove_volume(&mut self, uid: &str) {
        if let Some(volume) = self.volumes.remove(uid) {
            self.work(&format!("the volume of {} was deleted", volume.claim));
        }
    }

    /// Empties a volume, as a failed disk does.
    pub(super) fn wipe(&mut self, claim: &str) {
        for volume in self.volumes.values_mut().filter(|v| v.claim == claim) {
            volume.keyspaces.clear();
        }
        self.work(&format!("{claim} was wiped by the test"));
    }

    fn running(&self, uid: &str, store: &str) -> Option<&Store> {
        self.stores.values().find(|s| s.only == uid && s.name == store && !s.stopping)
    }

    /// A born replica of a running store.
    fn source(&self, uid: &str, store: &str, id: u64) -> Option<&Replica> {
        let volume = self.volumes.get(&self.running(uid, store)?.volume)?;
        volume.keyspaces.get(uid)?.replicas.get(&id).filter(|r| r.born && r.fault.is_empty())
    }

    /// Data of another keyspace lies there, so the store does nothing.
    fn foreign(&self, store: &Store) -> Vec<String> {
        let all = self.volumes.get(&store.volume).into_iter().flat_map(|v| v.keyspaces.keys());
        all.filter(|uid| **uid != store.only).cloned().collect()
    }

    // ---- what stores do ----

    /// Takes in what the operator says.
    pub(super) fn install(&mut self, pod_uid: &str, update: StoreUpdate) {
        let Some(store) = self.stores.get(pod_uid).cloned() else { return };
        if !self.foreign(&store).is_empty() {
            return;
        }
        for topology in update.keyspaces.into_iter().filter_map(|k| k.topology) {
            if topology.uid != store.only {
                continue;
            }
            let Some(volume) = self.volumes.get_mut(&store.volume) else { continue };
            let known = volume.keyspaces.get(&topology.uid).map_or(0, |k| k.topology.version);
            if topology.version > known {
                let uid = topology.uid.clone();
                volume.keyspaces.entry(uid).or_default().topology = topology;
            }
        }
        self.work(&format!("{} has taken in a topology", store.pod));
    }

    /// Everyone does all there is to do.
    pub(super) fn work(&mut self, cause: &str) {
        loop {
            let before = self.copied;
            let mut changed = false;
            for pod_uid in self.stores.keys().cloned().collect::<Vec<_>>() {
                changed |= self.act(&pod_uid);
                changed |= self.follow(&pod_uid);
            }
            if !changed && before == self.copied {
                break;
            }
        }
        self.check(cause);
    }

    /// What this store's topology asks of it. True: something was done.
    fn act(&mut self, pod_uid: &str) -> bool {
        let Some(store) = self.stores.get(pod_uid).filter(|s| !s.stopping).cloned() else { return false };
        let holds = self.holds;
        let Some(volume) = self.volumes.get_mut(&store.volume) else { return false };
        let Some(mut held) = volume.keyspaces.remove(&store.only) else { return false };
        let t = held.topology.clone();
        if t.phase() == Phase::Deleting {
            if holds.drops {
                volume.keyspaces.insert(store.only, held);
                return false;
            }
            if t.retain {
                volume.retained.insert(store.only, held);
            }
            return true;
        }
        let mut changed = false;
        let named: BTreeSet<u64> = t.views().flat_map(View::places).map(|p| p.assignment.replica).collect();
        for drop in t.drops.iter().filter(|d| d.store == store.name && !named.contains(&d.replica) && !holds.drops) {
            changed |= held.replicas.remove(&drop.replica).is_some();
        }
        let replicas = &held.replicas;
        held.unnamed.retain(|id| !named.contains(id) && t.next.is_some() && replicas.contains_key(id));
        for place in t.next.iter().flat_map(View::places) {
            let waiting = place.assignment.store == store.name && place.assignment.replica == 0;
            if waiting && held.unnamed.iter().all(|id| held.replicas[id].shard != place.shard) {
                let id = self.id();
                held.unnamed.insert(id);
                held.replicas.insert(id, Replica { shard: place.shard, ..Replica::default() });
                changed = true;
            }
        }
        let empty: Vec<u64> = held.replicas.iter().filter(|(_, r)| !r.born).map(|(id, _)| *id).collect();
        for id in empty.into_iter().filter(|id| !holds.births && t.origins(*id).is_some_and(|g| g.is_empty())) {
            let epoch = self.id();
            if let Some(replica) = held.replicas.get_mut(&id) {
                (replica.born, replica.epoch) = (true, epoch);
                changed = true;
            }
        }
        for (id, replica) in &mut held.replicas {
            changed |= replica.obey(*id, &t, holds);
        }
        if let Some(volume) = self.volumes.get_mut(&store.volume) {
            volume.keyspaces.insert(store.only, held);
        }
        changed
    }

    /// This store's replicas learn what they lack from those that they follow.
    fn follow(&mut self, pod_uid: &str) -> bool {
        let Some(store) = self.stores.get(pod_uid).filter(|s| !s.stopping).cloned() else { return false };
        let uid = store.only.as_str();
        let mut changed = self.spread(&store);
        let Some(held) = self.volumes.get(&store.volume).and_then(|v| v.keyspaces.get(uid)) else { return changed };
        let t = held.topology.clone();
        for id in held.replicas.keys().copied().collect::<Vec<_>>() {
            for place in t.sources(id) {
                changed |= self.learn(&store, &t, id, &place);
            }
            for given_up in t.handing_over(id) {
                changed |= self.take_over(&store, &t, id, &given_up.store.clone(), given_up.replica);
            }
        }
        changed
    }

    /// Topologies spread among stores without the operator too.
    fn spread(&mut self, store: &Store) -> bool {
        let Some(held) = self.volumes.get(&store.volume).and_then(|v| v.keyspaces.get(&store.only)) else {
            return false;
        };
        let peers = self.stores.values().filter(|s| s.only == store.only && !s.stopping);
        let newest = peers
            .filter_map(|s| self.volumes.get(&s.volume)?.keyspaces.get(&s.only))
            .map(|k| &k.topology)
            .max_by_key(|t| t.version);
        let Some(newest) = newest.filter(|t| t.version > held.topology.version).cloned() else { return false };
        if let Some(held) = self.volumes.get_mut(&store.volume).and_then(|v| v.keyspaces.get_mut(&store.only)) {
            held.topology = newest;
        }
        true
    }

    fn replica(&mut self, store: &Store, id: u64) -> Option<&mut Replica> {
        self.volumes.get_mut(&store.volume)?.keyspaces.get_mut(&store.only)?.replicas.get_mut(&id)
    }

    fn learn(&mut self, store: &Store, t: &Topology, id: u64, place: &Place<'_>) -> bool {
        let source_id = place.assignment.replica;
        let holds = self.holds;
        let Some(source) = self.source(&store.only, &place.assignment.store, source_id).cloned() else { return false };
        let epoch = self.id();
        if self.volumes.get(&store.volume).is_none_or(|v| v.full) {
            return false;
        }
        let Some(replica) = self.replica(store, id) else { return false };
        if !replica.fault.is_empty() || (replica.born && holds.following) || (!replica.born && holds.births) {
            return false;
        }
        let position = (source.epoch, source.log.len());
        if replica.born && replica.positions.get(&source_id) == Some(&position) {
            return false;
        }
        let Some(groups) = t.origins(id).or_else(|| replica.born.then(Vec::new)) else { return false };
        if !replica.born && !groups.iter().flatten().any(|a| a.replica == source_id) {
            return false;
        }
        let mut copied = 0;
        for key in source.has.iter().filter(|key| t.ships(source_id, id, **key)) {
            if replica.has.insert(*key) {
                replica.log.push(*key);
                copied += 1;
            }
        }
        replica.positions.insert(source_id, position);
        let complete = groups.iter().all(|g| g.iter().any(|a| replica.positions.contains_key(&a.replica)));
        if !replica.born && complete {
            (replica.born, replica.epoch) = (true, epoch);
        }
        self.copied += copied;
        true
    }

    fn take_over(&mut self, store: &Store, t: &Topology, id: u64, from: &str, returned: u64) -> bool {
        let Some(source) = self.source(&store.only, from, returned).cloned() else { return false };
        let Some(replica) = self.replica(store, id).filter(|r| r.born) else { return false };
        if !replica.taken_over.insert(returned) {
            return false;
        }
        let mut copied = 0;
        for key in source.has.iter().filter(|key| t.hands_over(returned, id, **key)) {
            if replica.has.insert(*key) {
                replica.log.push(*key);
                copied += 1;
            }
        }
        self.copied += copied;
        true
    }

    // ---- what stores say ----

    /// The whole of what this store says; topologies only where `told` (uid -> version) is behind.
    pub(super) fn report(&self, pod_uid: &str, told: &mut HashMap<String, u64>) -> Option<StoreReport> {
        let store = self.stores.get(pod_uid)?;
        let volume = self.volumes.get(&store.volume)?;
        let foreign = self.foreign(store);
        let held = volume.keyspaces.iter().filter(|(uid, _)| **uid == store.only && foreign.is_empty());
        let mut keyspaces = Vec::new();
        for (uid, held) in held {
            let t = &held.topology;
            let known = told.insert(uid.clone(), t.version) == Some(t.version);
            keyspaces.push(KeyspaceReport {
                uid: uid.clone(),
                version: t.version,
                topology: (!known).then(|| t.clone()),
                replicas: held.replicas.iter().map(|(id, r)| self.report_replica(store, *id, r, t, volume)).collect(),
            });
        }
        told.retain(|uid, _| keyspaces.iter().any(|k| k.uid == *uid));
        let used: u64 = volume.keyspaces.values().flat_map(|k| k.replicas.values()).map(Replica::bytes).sum();
        let free_bytes = if volume.full { 0 } else { volume.size.saturating_sub(used) };
        Some(StoreReport {
            store: store.name.clone(),
            address: store.address.clone(),
            incarnation: store.incarnation,
            keyspaces,
            stopping: store.stopping,
            only: store.only.clone(),
            disk: Some(Disk { size_bytes: volume.size, free_bytes }),
            foreign,
        })
    }

    fn report_replica(&self, store: &Store, id: u64, r: &Replica, t: &Topology, volume: &Volume) -> ReplicaReport {
        let source = |p: &Place<'_>| {
            let replica = p.assignment.replica;
            let last = self.source(&store.only, &p.assignment.store, replica).map(|s| s.log.len());
            match r.positions.get(&replica) {
                Some((epoch, at)) => SourceReport {
                    replica,
                    epoch: *epoch,
                    confirmed: *at as u64,
                    lag: last.map_or(0, |last| last.saturating_sub(*at)) as u64,
                    records: r.has.len() as u64,
                    records_total: r.has.len() as u64,
                    bytes: r.bytes(),
                },
                None => SourceReport { replica, lag: u64::MAX, ..SourceReport::default() },
            }
        };
        ReplicaReport {
            id,
            shard: r.shard,
            born: r.born,
            epoch: r.epoch,
            last_seq: r.log.len() as u64,
            fence_version: r.fence.0,
            fence_seq: r.fence.1 as u64,
            cleaned_version: r.cleaned,
            sources: t.sources(id).iter().map(source).collect(),
            records: r.has.len() as u64,
            bytes: r.bytes(),
            fault: r.fault.clone(),
            full: volume.full && r.born,
            candidate: !r.served,
            taken_over: r.taken_over.iter().copied().collect(),
            ..ReplicaReport::default()
        }
    }

    /// Whether it serves all that its topology assigns it.
    pub(super) fn is_ready(&self, pod_uid: &str) -> bool {
        let Some(store) = self.stores.get(pod_uid) else { return false };
        if !self.foreign(store).is_empty() {
            return false;
        }
        let held = self.volumes.get(&store.volume).and_then(|v| v.keyspaces.get(&store.only));
        let Some(held) = held else { return true };
        let mine = held.topology.current.iter().flat_map(View::places).filter(|p| p.assignment.store == store.name);
        mine.filter(|p| p.assignment.serving)
            .all(|p| held.replicas.get(&p.assignment.replica).is_some_and(|r| r.born && r.fault.is_empty()))
    }

    // ---- clients ----

    /// A client writes one new key, to some replica that takes it. False: nobody does.
    pub(super) fn write(&mut self, uid: &str, number: u64) -> bool {
        let key = partition_hash(format!("key-{number}").as_bytes());
        let takers: Vec<(String, u64)> = self.acceptors(uid, key);
        let Some((volume, id)) = takers.get(number as usize % takers.len().max(1)) else {
            return false;
        };
        let held = self.volumes.get_mut(volume).and_then(|v| v.keyspaces.get_mut(uid));
        if let Some(replica) = held.and_then(|k| k.replicas.get_mut(id)) {
            replica.has.insert(key);
            replica.log.push(key);
        }
        self.ledgers.entry(uid.to_owned()).or_default().keys.insert(key);
        self.work("a client has written");
        true
    }

    /// The replicas of running stores that take a write of this key: (volume, id).
    fn acceptors(&self, uid: &str, key: u64) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        for store in self.stores.values().filter(|s| s.only == uid && !s.stopping) {
            let Some(volume) = self.volumes.get(&store.volume).filter(|v| !v.full) else { continue };
            let Some(held) = volume.keyspaces.get(uid) else { continue };
            let takes = |(id, r): &(&u64, &Replica)| r.born && held.topology.accepts_write(**id, key);
            found.extend(held.replicas.iter().filter(takes).map(|(id, _)| (store.volume.clone(), *id)));
        }
        found
    }

    // ---- what must hold ----

    /// The greatest topology on any volume.
    pub fn truth(&self, uid: &str) -> Option<&Topology> {
        let held = self.volumes.values().filter_map(|v| v.keyspaces.get(uid));
        held.map(|k| &k.topology).max_by_key(|t| t.version)
    }

    /// Whether all running stores of the keyspace have this version of its topology, or a later one.
    pub fn knows(&self, uid: &str, version: u64) -> bool {
        let held = |volume: &String| self.volumes.get(volume)?.keyspaces.get(uid);
        let mut stores = self.stores.values().filter(|s| s.only == uid && !s.stopping);
        stores.all(|store| held(&store.volume).is_some_and(|k| k.topology.version >= version))
    }

    fn check(&mut self, cause: &str) {
        let mut complaints = Vec::new();
        for (uid, ledger) in &self.ledgers {
            let mut said = String::new();
            match self.truth(uid) {
                None if ledger.keys.is_empty() => {}
                None => said = format!("no volume has anything of the keyspace {uid}"),
                Some(t) if t.phase() == Phase::Deleting => {
                    said = format!("the keyspace {uid} is being deleted unasked")
                }
                Some(t) => {
                    if let Some(key) = ledger.keys.iter().find(|key| !self.held(uid, t, **key)) {
                        said = format!("shard {} of {} has lost data", jump_hash(*key, t.size().max(1)), t.name);
                    } else if !ledger.outage
                        && let Some(key) = ledger.keys.iter().find(|key| self.acceptors(uid, **key).is_empty())
                    {
                        let (shard, phase) = (jump_hash(*key, t.size().max(1)), t.phase().as_str_name());
                        said = format!("nobody accepts writes of shard {shard} of {} in {phase}", t.name);
                    }
                }
            }
            complaints.push((uid.clone(), said));
        }
        for (uid, said) in complaints {
            let ledger = self.ledgers.entry(uid).or_default();
            if said != ledger.last && !said.is_empty() && self.complaints.len() < COMPLAINTS {
                self.complaints.push(format!("after: {cause}: {said}"));
            }
            ledger.last = said;
        }
    }

    /// Whether some volume has this key where the topology has a use for it.
    fn held(&self, uid: &str, t: &Topology, key: u64) -> bool {
        let held = self.volumes.values().filter_map(|v| v.keyspaces.get(uid));
        let has = |(id, r): (&u64, &Replica)| r.has.contains(&key) && (t.holds(*id, key) || t.is_given_up(*id));
        held.flat_map(|k| &k.replicas).any(has)
    }

    /// What was seen to be wrong, from the first moment on.
    pub fn complaints(&self) -> Vec<String> {
        self.complaints.clone()
    }

    /// Complains, where there are keys, of whatever is not as it must be at rest.
    pub fn at_rest(&self, uid: &str) -> Vec<String> {
        let mut complaints = self.complaints.clone();
        let Some(t) = self.truth(uid) else { return complaints };
        let keys = self.ledgers.get(uid).map(|l| l.keys.clone()).unwrap_or_default();
        let mut named = BTreeSet::new();
        for place in t.current.iter().flat_map(View::places) {
            let (store, id) = (&place.assignment.store, place.assignment.replica);
            named.insert(id);
            let Some(replica) = self.source(uid, store, id) else {
                complaints.push(format!("{store} has no sound replica {id:016x} of shard {}", place.shard));
                continue;
            };
            let owns = |key: &&u64| place.owns(**key);
            let wanted: BTreeSet<u64> = keys.iter().filter(owns).copied().collect();
            if replica.has != wanted {
                let (lacks, more) = (wanted.difference(&replica.has).count(), replica.has.difference(&wanted).count());
                complaints.push(format!("shard {} on {store} lacks {lacks} keys and has {more} more", place.shard));
            }
        }
        for volume in self.volumes.values() {
            for id in volume.keyspaces.get(uid).iter().flat_map(|k| k.replicas.keys()).filter(|id| !named.contains(id))
            {
                complaints.push(format!("{} still has replica {id:016x}", volume.claim));
            }
        }
        complaints
    }

    /// A test is about to delete the keyspace: no more is expected of it.
    pub(super) fn forget(&mut self, uid: &str) {
        self.ledgers.remove(uid);
    }

    /// A test takes copies away itself: keys that are nowhere any more are not missed.
    pub(super) fn excuse_lost(&mut self, uid: &str) {
        let truth = self.truth(uid).cloned();
        let keys = self.ledgers.get(uid).map(|l| l.keys.clone()).unwrap_or_default();
        let kept = keys.into_iter().filter(|key| truth.as_ref().is_some_and(|t| self.held(uid, t, *key))).collect();
        if let Some(ledger) = self.ledgers.get_mut(uid) {
            (ledger.keys, ledger.last) = (kept, String::new());
        }
    }

    /// Whether keys may be without anyone who takes their writes.
    pub(super) fn expect_outage(&mut self, uid: &str, outage: bool) {
        self.ledgers.entry(uid.to_owned()).or_default().outage = outage;
    }
}

impl Replica {
    fn bytes(&self) -> u64 {
        self.has.len() as u64 * RECORD
    }

    /// Begins to serve, fences and cleans as the topology says.
    fn obey(&mut self, id: u64, t: &Topology, holds: Holds) -> bool {
        let serves = t.current.as_ref().is_some_and(|v| v.place(id).is_some());
        let mut changed = serves && !self.served;
        self.served |= serves;
        let old = t.previous.as_ref().is_some_and(|v| v.place(id).is_some());
        let fencing = matches!(t.phase(), Phase::Fence | Phase::Drain | Phase::Cleanup);
        if old && fencing && self.fence.0 != t.switch_version && !holds.fences {
            self.log.push(0);
            self.fence = (t.switch_version, self.log.len());
            changed = true;
        }
        if !t.names(id) {
            self.positions.clear();
        }
        if t.clean.contains(&id) && self.cleaned != t.switch_version && !holds.cleaning {
            if let Some(place) = t.current.as_ref().and_then(|v| v.place(id)) {
                self.has.retain(|key| place.owns(*key));
            }
            let shard = |id| t.current.as_ref().and_then(|v| v.place(id)).map(|p| p.shard);
            self.positions.retain(|other, _| shard(*other) == shard(id));
            self.cleaned = t.switch_version;
            changed = true;
        }
        changed
    }
}
