//! A crude fleet in memory: stores that persist topologies, make candidates, copy,
//! follow, fence, clean and drop as the protocol says; clients that write by topologies
//! fresh or stale; and what must hold after every step.

use std::collections::{BTreeMap, BTreeSet};

use vasto_client::hash::{jump_hash, partition_hash, shards_meet};
use vasto_client::topology::Place;
use vasto_client::v1::{KeyspaceReport, Phase, ReplicaReport, SourceReport, Topology, View};

use super::super::health::hollow;
use super::super::placement::{lists, placement};
use super::super::{Observation, Outcome, Presence, ReplaceRequest, Spec, Wait, adopt, plan};

/// Different keys that clients write.
pub(super) const KEYS: u64 = 40;
/// What one change of the model counts for as lag: two are near, three are not.
const LAG: u64 = 400;
/// Changes of a source that count as ahead before it was first heard.
const UNHEARD: usize = 1_000;
/// A clean-up begins when a store has acted so many times: some rounds later.
const CLEANING: u32 = 8;

pub(super) fn store_name(ordinal: u32) -> String {
    format!("store-{ordinal}")
}

fn hash(key: u64) -> u64 {
    partition_hash(&key.to_be_bytes())
}

#[derive(Clone, Default)]
pub(super) struct Replica {
    pub(super) shard: u32,
    pub(super) born: bool,
    epoch: u64,
    /// The write learnt at each seq.
    log: Vec<u32>,
    pub(super) has: BTreeSet<u32>,
    /// Of whom it has a copy.
    copied: BTreeSet<u64>,
    /// Of each source: epoch, position, its last seq as last heard.
    positions: BTreeMap<u64, (u64, usize, usize)>,
    fence: (u64, usize),
    cleaned: u64,
    /// So many times it was about to clean up.
    cleaning: u32,
    served: bool,
    /// Given-up replicas whose records are taken over here.
    taken_over: BTreeSet<u64>,
    pub(super) fault: String,
    pub(super) quarantined: bool,
}

#[derive(Clone, Default)]
pub(super) struct Store {
    pub(super) alive: bool,
    pub(super) linked: bool,
    pub(super) lost: bool,
    pub(super) topology: Option<Topology>,
    installed: u64,
    pub(super) replicas: BTreeMap<u64, Replica>,
    unnamed: BTreeSet<u64>,
    /// The keyspace was deleted here.
    pub(super) empty_since_deletion: bool,
}

pub(super) struct Sim {
    pub(super) spec: Spec,
    pub(super) stores: BTreeMap<String, Store>,
    pub(super) status: Option<Topology>,
    /// Former statuses, for stale leaders.
    former: Vec<Topology>,
    heard: BTreeMap<String, Option<Topology>>,
    published: Vec<Topology>,
    ids: u64,
    /// The key of each write; acknowledged ones are in `acked`.
    writes: Vec<u64>,
    pub(super) acked: BTreeSet<u32>,
    /// Writes that were only where the environment (not the planner) destroyed them.
    pub(super) excused: BTreeSet<u32>,
    ever_given_up: BTreeSet<u64>,
    /// Nothing has died, so no key may be without an acceptor.
    pub(super) peaceful: bool,
    pub(super) last: Option<Outcome>,
    pub(super) phases: Vec<Phase>,
    /// Writes copied to replicas that hadn't them, since the last reset.
    pub(super) copied: usize,
    /// A person accepts every loss that the planner asks about.
    pub(super) person: bool,
}

impl Sim {
    pub(super) fn new(shards: u32, replication_factor: u32) -> Self {
        let store = Store { alive: true, linked: true, ..Store::default() };
        Self {
            spec: Spec {
                name: "n".into(),
                uid: "u".into(),
                shards,
                replication_factor,
                paused: false,
                deleting: false,
                retain: false,
                spec_json: format!("{shards}/{replication_factor}"),
                replace: None,
            },
            stores: (0..9).map(|i| (store_name(i), store.clone())).collect(),
            status: None,
            former: vec![],
            heard: BTreeMap::new(),
            published: vec![],
            ids: 100,
            writes: vec![0],
            acked: BTreeSet::new(),
            excused: BTreeSet::new(),
            ever_given_up: BTreeSet::new(),
            peaceful: true,
            last: None,
            phases: vec![],
            copied: 0,
            person: false,
        }
    }

    /// A keyspace in use, at rest.
    pub(super) fn in_use(shards: u32, replication_factor: u32) -> Self {
        let mut sim = Self::new(shards, replication_factor);
        sim.settle();
        for key in 0..KEYS {
            assert!(sim.write(key, 0, key as usize), "a key without an acceptor");
        }
        sim.round();
        sim
    }

    pub(super) fn scale(&mut self, shards: u32, replication_factor: u32) {
        self.spec.shards = shards;
        self.spec.replication_factor = replication_factor;
        self.spec.spec_json = format!("{shards}/{replication_factor}");
    }

    pub(super) fn replace(&mut self, store: &str, request: &str, accept_data_loss: bool) {
        self.spec.replace =
            Some(ReplaceRequest { store: store.into(), request: request.into(), hold: false, accept_data_loss });
    }

    pub(super) fn store(&mut self, name: &str) -> &mut Store {
        self.stores.get_mut(name).expect("a store of the fleet")
    }

    pub(super) fn phase(&self) -> Phase {
        self.status.as_ref().map_or(Phase::Stable, Topology::phase)
    }

    fn id(&mut self) -> u64 {
        self.ids += 1;
        // Not in order, as random ids aren't.
        (self.ids * 7919) % 10007 + 1
    }

    // ---- what happens to stores ----

    pub(super) fn die(&mut self, name: &str) {
        self.peaceful = false;
        self.store(name).alive = false;
    }

    pub(super) fn lose(&mut self, name: &str) {
        self.peaceful = false;
        let store = self.store(name);
        store.lost = !(store.alive && store.linked);
    }

    pub(super) fn back(&mut self, name: &str) {
        let store = self.store(name);
        store.alive = true;
        store.linked = true;
        store.lost = false;
        store.unnamed.clear();
        store.installed = 0;
        self.act(name);
    }

    /// The store's volume is another one, and it runs.
    pub(super) fn wipe(&mut self, name: &str) {
        if self.status.is_none() {
            return; // With the status lost as well, nobody may be left who knows of the keyspace.
        }
        self.peaceful = false;
        let truth = self.truth();
        let gone = std::mem::take(&mut self.store(name).replicas);
        let store = self.store(name);
        *store = Store { alive: true, linked: true, ..Store::default() };
        let lost: BTreeSet<u32> = gone.into_values().flat_map(|r| r.has).collect();
        self.excuse(&lost, truth.as_ref());
    }

    /// Excuses those of these writes that no owner holds any more. What only a candidate holds
    /// counts as long as it is the best that is left: while its shard has no other replica.
    fn excuse(&mut self, writes: &BTreeSet<u32>, truth: Option<&Topology>) {
        let lost = |w: &u32| {
            let Some(t) = truth else { return true };
            let key = hash(self.writes[*w as usize]);
            let owner =
                |view: &Option<View>, id| view.as_ref().is_some_and(|v| v.place(id).is_some_and(|p| p.owns(key)));
            let left = self.stores.values().flat_map(|s| s.replicas.keys()).any(|id| owner(&t.current, *id));
            !self.held(*w, t, |id| owner(&t.current, id) || owner(&t.previous, id) || !left)
        };
        let lost: Vec<u32> = writes.iter().copied().filter(lost).collect();
        self.excused.extend(lost);
    }

    pub(super) fn lose_status(&mut self) -> bool {
        let Some(truth) = self.truth() else { return false };
        let named = |v: &View| v.places().map(|p| p.assignment.store.clone()).collect::<Vec<_>>();
        let all = truth.views().flat_map(named).all(|s| self.stores[&s].topology.is_some());
        if !all || !truth.given_up.is_empty() {
            return false;
        }
        self.status = None;
        self.heard.clear();
        true
    }

    // ---- the operator ----

    pub(super) fn observe(&mut self, behind: bool) -> Observation {
        let mut seen = Observation::new(store_name);
        for (name, store) in &self.stores {
            if store.alive && store.linked {
                self.heard.insert(name.clone(), store.topology.clone());
            }
        }
        for (name, store) in &self.stores {
            let presence = if store.alive && store.linked {
                Presence::Living(store.report().map(Box::new))
            } else if store.lost {
                Presence::Lost
            } else if self.heard.contains_key(name) {
                Presence::Away
            } else {
                continue;
            };
            seen.stores.insert(name.clone(), presence);
        }
        seen.heard = self.heard.keys().cloned().collect();
        let told = self.published.last().map_or(0, |t| t.version);
        seen.watchers_behind = behind || self.status.as_ref().is_some_and(|s| told < s.switch_version);
        seen
    }

    /// One turn of the operator. True: it committed something.
    pub(super) fn tick(&mut self, behind: bool) -> bool {
        let seen = self.observe(behind);
        let state = adopt(self.status.as_ref(), self.heard.values().flatten());
        let outcome = plan(&self.spec, state.as_ref(), &seen);
        assert_eq!(outcome, plan(&self.spec, state.as_ref(), &seen), "two answers to one question");
        if let (Some(status), Some(state)) = (&self.status, &state) {
            assert!(state.version >= status.version, "the state went back");
        }
        for (stale, _) in self.former.iter().rev().take(2).zip(0..) {
            let newer = seen.reports().any(|(_, r)| r.version > stale.version);
            let deposed = plan(&self.spec, Some(stale), &seen);
            assert!(!newer || deposed.next.is_none(), "a leader with an old state commits");
        }
        if let Some(state) = &state {
            let named = state.stores();
            assert!(named.iter().all(|s| outcome.stores_wanted.contains(*s)), "a store in use isn't wanted");
            if outcome.publish && self.published.last().is_none_or(|p| p.version < state.version) && state.size() > 0 {
                self.published.push(state.clone());
            }
        }
        self.status = state.clone();
        let committed = outcome.next.is_some();
        if let Some(next) = &outcome.next {
            assert_eq!(next.version, state.as_ref().map_or(1, |s| s.version + 1));
            self.sane(next);
            if let Some(state) = &state {
                self.earned(state, next, &seen);
            }
            self.note_given_up(state.as_ref(), next, &seen);
            if self.phases.last() != Some(&next.phase()) {
                self.phases.push(next.phase());
            }
            self.former.extend(state);
            self.status = Some(next.clone());
        }
        self.last = Some(outcome);
        self.check();
        committed
    }

    /// What holds of every committed topology by itself.
    fn sane(&self, t: &Topology) {
        for view in t.views() {
            let ids: Vec<u64> = view.places().map(|p| p.assignment.replica).filter(|id| *id != 0).collect();
            assert_eq!(ids.len(), ids.iter().collect::<BTreeSet<_>>().len(), "a replica twice in a view: {t:?}");
            for p in view.places() {
                assert!(p.assignment.replica != 0 || !p.assignment.serving, "a vacant place serves: {t:?}");
                assert!(
                    t.phase() == Phase::Deleting || t.drops.iter().all(|d| d.replica != p.assignment.replica),
                    "dropped and in use: {t:?}"
                );
            }
        }
        match t.phase() {
            Phase::Stable => assert!(t.next.is_none() && t.previous.is_none() && t.clean.is_empty(), "{t:?}"),
            Phase::Prepare => assert!(t.next.is_some() && t.previous.is_none(), "{t:?}"),
            _ => {}
        }
    }

    /// A step is taken only once what it stands on is so.
    fn earned(&self, state: &Topology, next: &Topology, seen: &Observation) {
        let (Some(before), Some(after)) = (&state.current, &next.current) else { return };
        let switched = next.switch_version != state.switch_version && next.phase() != Phase::Cleanup;
        // Who begins to be served has what its living sources had, but for the last of it.
        for place in after.places().filter(|p| p.assignment.serving) {
            let served = before.place(place.assignment.replica).is_some_and(|p| p.assignment.serving);
            let Some(replica) = self.alive(&place.assignment.store, place.assignment.replica).filter(|_| !served)
            else {
                assert!(served || seen.is_living(&place.assignment.store), "it is away and begins to be served");
                continue;
            };
            assert!(replica.born);
            let of = if switched { before } else { after };
            for source in state.sources(place.assignment.replica) {
                let id = source.assignment.replica;
                let Some(from) = self.linked(&source.assignment.store, id).filter(|r| r.born && of.place(id).is_some())
                else {
                    continue;
                };
                let (epoch, at, heard) = replica.positions.get(&id).expect("it follows");
                assert!(*epoch == from.epoch && heard - at <= 2, "served too early: {next:?}");
            }
        }
        if switched && before.size() > 0 {
            let stores: BTreeSet<&str> = after
                .places()
                .filter(|p| state.next.as_ref().is_some_and(|v| v.place(p.assignment.replica).is_some()))
                .map(|p| p.assignment.store.as_str())
                .collect();
            let have = stores.iter().filter(|s| seen.persisted(s) >= state.version).count();
            assert!(have * 2 > stores.len(), "switched to stores that don't know it: {next:?}");
        }
        if (state.phase(), next.phase()) == (Phase::Switch, Phase::Fence) {
            for key in (0..KEYS).map(hash) {
                let ready = after.places().filter(|p| p.owns(key)).any(|p| {
                    let store = &self.stores[&p.assignment.store];
                    let knows = store.topology.as_ref().is_some_and(|t| t.version >= next.switch_version);
                    store.alive && store.linked && knows && p.assignment.serving
                });
                assert!(ready, "fenced before a new owner knows: {next:?}");
            }
        }
        if (state.phase(), next.phase()) == (Phase::Fence, Phase::Drain) {
            for old in state.previous.iter().flat_map(View::places) {
                let fence = self.linked(&old.assignment.store, old.assignment.replica).map(|r| r.fence.0);
                assert!(fence.is_none_or(|version| version == next.switch_version), "not fenced: {next:?}");
            }
        }
        if (state.phase(), next.phase()) == (Phase::Drain, Phase::Cleanup) {
            for shard in 0..after.size() {
                let owners = after.places().filter(|p| p.shard == shard && p.assignment.serving);
                let living = owners.filter(|p| self.linked(&p.assignment.store, p.assignment.replica).is_some());
                assert!(living.count() > 0, "nobody serves shard {shard}: {next:?}");
            }
            for new in after.places().filter(|p| p.assignment.serving) {
                let Some(replica) = self.linked(&new.assignment.store, new.assignment.replica) else { continue };
                let others = |p: &Place<'_>| {
                    p.assignment.replica != new.assignment.replica
                        && shards_meet(p.shard, p.shards, new.shard, new.shards)
                };
                for old in state.previous.iter().flat_map(View::places).filter(others) {
                    let Some(from) = self.linked(&old.assignment.store, old.assignment.replica) else { continue };
                    assert_eq!(from.fence.0, next.switch_version, "not fenced: {next:?}");
                    for write in from.log[..from.fence.1].iter().filter(|w| **w != 0 && from.has.contains(w)) {
                        let owns = new.owns(hash(self.writes[*write as usize]));
                        assert!(!owns || replica.has.contains(write), "not drained, but served: {next:?}");
                    }
                }
            }
        }
    }

    fn alive(&self, store: &str, id: u64) -> Option<&Replica> {
        self.stores.get(store).filter(|s| s.alive).and_then(|s| s.replicas.get(&id))
    }

    fn linked(&self, store: &str, id: u64) -> Option<&Replica> {
        self.stores.get(store).filter(|s| s.linked).and_then(|_| self.alive(store, id))
    }

    /// Without a person, only where another living copy serves is a replica given up.
    fn note_given_up(&mut self, state: Option<&Topology>, next: &Topology, seen: &Observation) {
        let Some(state) = state else { return };
        let new: Vec<_> = next.given_up.iter().filter(|g| !state.is_given_up(g.replica)).cloned().collect();
        for g in &new {
            let by_person = self.spec.replace.as_ref().is_some_and(|r| r.accept_data_loss && r.store == g.store);
            let dropped = state.drops.iter().any(|d| d.replica == g.replica);
            if !by_person && !dropped {
                for key in (0..KEYS).map(hash) {
                    let views = || [state.current.as_ref(), state.previous.as_ref()].into_iter().flatten();
                    let owned = views().any(|v| v.place(g.replica).is_some_and(|p| p.owns(key)));
                    let copy = views().flat_map(View::places).any(|p| {
                        p.owns(key) && p.assignment.replica != g.replica && seen.sound(p.assignment).is_some()
                    });
                    assert!(!owned || copy, "given up though the last copy: {g:?}");
                }
            }
            self.ever_given_up.insert(g.replica);
            let has = self.stores[&g.store].replicas.get(&g.replica).map(|r| r.has.clone()).unwrap_or_default();
            self.excuse(&has, Some(next));
        }
    }

    // ---- stores ----

    /// The store gets the committed topology from the operator.
    pub(super) fn deliver(&mut self, name: &str) {
        let Some(status) = self.status.clone() else { return };
        let store = self.store(name);
        if store.alive && store.linked && (status.stores().contains(&name) || store.topology.is_some()) {
            self.take(name, &status);
        }
    }

    /// A leader that was deposed sends what it knows.
    pub(super) fn deliver_stale(&mut self, name: &str, which: usize) {
        if let Some(stale) = self.former.get(which % self.former.len().max(1)).cloned() {
            let before = self.stores[name].topology.as_ref().map_or(0, |t| t.version);
            if self.stores[name].alive && before > 0 {
                self.take(name, &stale);
                assert!(self.stores[name].topology.as_ref().is_some_and(|t| t.version >= before));
            }
        }
    }

    fn take(&mut self, name: &str, topology: &Topology) {
        let store = self.store(name);
        if !store.empty_since_deletion && store.topology.as_ref().is_none_or(|t| t.version < topology.version) {
            store.topology = Some(topology.clone());
        }
    }

    /// The store does what its topology asks for.
    pub(super) fn act(&mut self, name: &str) {
        let mut store = self.stores[name].clone();
        let Some(t) = store.topology.clone().filter(|_| store.alive) else { return };
        if t.phase() == Phase::Deleting {
            *self.store(name) =
                Store { alive: true, linked: store.linked, empty_since_deletion: true, ..Store::default() };
            return;
        }
        let named: BTreeSet<u64> = t.views().flat_map(View::places).map(|p| p.assignment.replica).collect();
        let mut dropped = Vec::new();
        for drop in t.drops.iter().filter(|d| d.store == name && !named.contains(&d.replica)) {
            dropped.extend(store.replicas.remove(&drop.replica).map(|r| (drop.replica, r)));
        }
        store.unnamed.retain(|id| !named.contains(id) && t.next.is_some() && store.replicas.contains_key(id));
        for place in t.next.iter().flat_map(View::places) {
            let stays = t.current.as_ref().is_some_and(|v| v.on(place.shard, name).is_some());
            let waiting = place.assignment.store == name && place.assignment.replica == 0 && !stays;
            if waiting && store.unnamed.iter().all(|id| store.replicas[id].shard != place.shard) {
                let id = self.id();
                store.unnamed.insert(id);
                store.replicas.insert(id, Replica { shard: place.shard, ..Replica::default() });
            }
        }
        let births: Vec<u64> = store
            .replicas
            .iter()
            .filter(|(id, r)| !r.born && t.origins(**id).is_some_and(|g| g.is_empty()))
            .map(|(id, _)| *id)
            .collect();
        for id in births {
            let epoch = self.id();
            let replica = store.replicas.get_mut(&id).expect("listed");
            (replica.born, replica.epoch) = (true, epoch);
        }
        for (id, replica) in &mut store.replicas {
            if !named.contains(id) {
                replica.positions.clear();
                replica.copied.clear();
            }
            replica.served |= t.current.as_ref().is_some_and(|v| v.place(*id).is_some());
            let old = t.previous.as_ref().is_some_and(|v| v.place(*id).is_some());
            let fencing = matches!(t.phase(), Phase::Fence | Phase::Drain | Phase::Cleanup);
            if old && fencing && replica.fence.0 != t.switch_version {
                replica.fence = (t.switch_version, replica.log.len());
                replica.log.push(0);
            }
            if t.clean.contains(id) && replica.cleaned != t.switch_version {
                // That takes its time.
                if replica.cleaning < CLEANING {
                    replica.cleaning += 1;
                    continue;
                }
                replica.cleaning = 0;
                let place = t.current.as_ref().and_then(|v| v.place(*id)).expect("only owners are cleaned");
                replica.has.retain(|w| place.owns(hash(self.writes[*w as usize])));
                let mate = |id| t.current.as_ref().and_then(|v| v.place(id)).is_some_and(|p| p.shard == place.shard);
                replica.positions.retain(|id, _| mate(*id));
                replica.cleaned = t.switch_version;
            }
        }
        self.take_over(&mut store, &t);
        store.installed = t.version;
        *self.store(name) = store;
        for (id, replica) in dropped {
            self.check_dropped(id, &replica);
        }
        self.check();
    }

    /// All that follow and whom, in order.
    /// What given-up replicas that came back alone have goes to the owners of its keys.
    fn take_over(&self, store: &mut Store, t: &Topology) {
        for (id, replica) in store.replicas.iter_mut().filter(|(_, r)| r.born) {
            for g in t.handing_over(*id) {
                let Some(from) = self.stores.get(&g.store).filter(|s| s.alive) else { continue };
                let Some(source) = from.replicas.get(&g.replica).filter(|_| !replica.taken_over.contains(&g.replica))
                else {
                    continue;
                };
                let wanted = |w: &&u32| **w != 0 && t.hands_over(g.replica, *id, hash(self.writes[**w as usize]));
                for write in source.has.iter().filter(wanted) {
                    if replica.has.insert(*write) {
                        replica.log.push(*write);
                    }
                }
                replica.taken_over.insert(g.replica);
            }
        }
    }

    pub(super) fn pairs(&self) -> Vec<(String, u64, String, u64)> {
        let mut pairs = Vec::new();
        for (name, store) in self.stores.iter().filter(|(_, s)| s.alive) {
            let Some(t) = &store.topology else { continue };
            for id in store.replicas.keys() {
                for place in t.sources(*id) {
                    pairs.push((name.clone(), *id, place.assignment.store.clone(), place.assignment.replica));
                }
            }
        }
        pairs
    }

    /// One follower copies or follows from one source, at most `most` changes.
    pub(super) fn follow(&mut self, pair: &(String, u64, String, u64), most: usize) {
        let (name, id, from, source_id) = pair;
        if !self.stores[from].alive || !self.stores[name].alive {
            return;
        }
        // Either takes in the newer topology first.
        let (mine, theirs) = (self.stores[name].topology.clone(), self.stores[from].topology.clone());
        let Some(t) = [mine, theirs].into_iter().flatten().max_by_key(|t| t.version) else { return };
        self.take(name, &t);
        self.take(from, &t);
        if !t.sources(*id).iter().any(|p| p.assignment.replica == *source_id) {
            return;
        }
        let Some(source) = self.stores[from].replicas.get(source_id).filter(|r| r.born).cloned() else { return };
        let epoch = self.id();
        let writes = self.writes.clone();
        let mut copied = 0;
        let Some(replica) = self.store(name).replicas.get_mut(id) else { return };
        let ships = |w: &u32| *w != 0 && t.ships(*source_id, *id, hash(writes[*w as usize]));
        let mut learn = |replica: &mut Replica, w: u32| {
            if replica.has.insert(w) {
                replica.log.push(w);
                copied += 1;
            }
        };
        let groups = t.origins(*id);
        let end = source.log.len();
        let position = replica.positions.get(source_id).filter(|p| p.0 == source.epoch).map(|p| p.1);
        match position {
            Some(at) if replica.born => {
                let to = at.saturating_add(most).min(end);
                for w in source.log[at..to].iter().filter(|w| source.has.contains(w) && ships(w)) {
                    learn(replica, *w);
                }
                replica.positions.insert(*source_id, (source.epoch, to, end));
            }
            _ => {
                let Some(groups) = groups else { return };
                if !replica.born && !groups.iter().flatten().any(|a| a.replica == *source_id) {
                    return;
                }
                for w in source.has.iter().filter(|w| ships(w)) {
                    learn(replica, *w);
                }
                replica.positions.insert(*source_id, (source.epoch, end, end));
                replica.copied.insert(*source_id);
                for (peer, (epoch, at, _)) in source.positions.iter().filter(|(p, _)| t.passes_on(*source_id, **p, *id))
                {
                    // Its own is as good. How far it lags is known once it follows.
                    if replica.positions.get(peer).is_none_or(|mine| mine.0 != *epoch) {
                        replica.positions.insert(*peer, (*epoch, *at, at + UNHEARD));
                    }
                }
                let complete = groups.iter().all(|g| g.iter().any(|a| replica.copied.contains(&a.replica)));
                if !replica.born && complete {
                    (replica.born, replica.epoch) = (true, epoch);
                }
            }
        }
        self.copied += copied;
    }

    pub(super) fn follow_all(&mut self) {
        for pair in self.pairs() {
            self.follow(&pair, usize::MAX);
        }
    }

    // ---- clients ----

    /// A client writes a key by the last topology that it got, or one `stale` versions before. True: acknowledged.
    pub(super) fn write(&mut self, key: u64, stale: usize, which: usize) -> bool {
        let Some(known) = self.published.len().checked_sub(1 + stale).map(|i| self.published[i].clone()) else {
            return false;
        };
        let shard = jump_hash(hash(key), known.size());
        let view = known.current.as_ref().expect("published");
        let places: Vec<_> = view.places().filter(|p| p.shard == shard && p.assignment.serving).collect();
        let Some(place) = places.get(which % places.len().max(1)) else { return false };
        let (name, id) = (place.assignment.store.clone(), place.assignment.replica);
        if !self.accepts(&name, id, hash(key)) {
            return false;
        }
        let write = self.writes.len() as u32;
        self.writes.push(key);
        let replica = self.store(&name).replicas.get_mut(&id).expect("it accepts");
        replica.has.insert(write);
        replica.log.push(write);
        self.acked.insert(write);
        // Nobody waits for what a given-up replica still accepts.
        if self.ever_given_up.contains(&id) {
            self.excused.insert(write);
        }
        true
    }

    fn accepts(&self, name: &str, id: u64, hash: u64) -> bool {
        let store = &self.stores[name];
        let known = store.topology.as_ref().is_some_and(|t| t.accepts_write(id, hash));
        store.alive && known && store.replicas.get(&id).is_some_and(|r| r.born)
    }

    // ---- what must hold ----

    /// The greatest topology anywhere.
    pub(super) fn truth(&self) -> Option<Topology> {
        let disks = self.stores.values().filter_map(|s| s.topology.as_ref());
        self.status.iter().chain(disks).rev_max()
    }

    /// Whether some replica that `t` counts on holds this write.
    fn held(&self, write: u32, t: &Topology, counts: impl Fn(u64) -> bool) -> bool {
        let key = hash(self.writes[write as usize]);
        self.stores
            .values()
            .flat_map(|s| &s.replicas)
            .any(|(id, r)| r.has.contains(&write) && counts(*id) && t.holds(*id, key))
    }

    fn check(&self) {
        let Some(truth) = self.truth().filter(|t| t.phase() != Phase::Deleting) else { return };
        for write in self.acked.difference(&self.excused) {
            assert!(
                self.held(*write, &truth, |_| true),
                "write {write} of key {} is nowhere, under {truth:?}",
                self.writes[*write as usize]
            );
        }
        if self.peaceful
            && let Some(known) = self.published.last()
        {
            for key in (0..KEYS).map(hash) {
                let taken = self.stores.iter().any(|(n, s)| s.replicas.keys().any(|id| self.accepts(n, *id, key)));
                assert!(taken, "nobody accepts a key's writes, under {known:?} and {truth:?}");
            }
        }
    }

    /// A replica was dropped: owners that clients use must hold all it had.
    fn check_dropped(&self, id: u64, replica: &Replica) {
        let Some(truth) = self.truth().filter(|t| t.size() > 0) else { return };
        let current = truth.current.as_ref().expect("it has a size");
        for write in replica.has.iter().filter(|w| self.acked.contains(w) && !self.excused.contains(w)) {
            let key = hash(self.writes[*write as usize]);
            let owner = |id| current.place(id).is_some_and(|p| p.owns(key));
            let left = self.stores.values().flat_map(|s| s.replicas.keys()).any(|id| owner(*id));
            assert!(
                self.held(*write, &truth, |id| !left || owner(id)),
                "replica {id} dropped undrained, with write {write}: {truth:?}"
            );
        }
    }

    // ---- time passes ----

    /// Everyone does all there is to do, once.
    pub(super) fn round(&mut self) -> bool {
        let committed = self.tick(false);
        let names: Vec<String> = self.stores.keys().cloned().collect();
        for name in &names {
            self.deliver(name);
            self.act(name);
        }
        self.follow_all();
        for name in &names {
            self.act(name);
        }
        committed
    }

    /// Rounds until the operator commits this phase; false if it doesn't.
    pub(super) fn until(&mut self, phase: Phase) -> bool {
        (0..60).any(|_| {
            self.round();
            self.phase() == phase
        })
    }

    /// Rounds until nothing is left to do.
    pub(super) fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..400 {
            if self.round() {
                quiet = 0;
                continue;
            }
            quiet += 1;
            if quiet < 6 {
                continue;
            }
            let lost = self.last.iter().flat_map(|o| &o.waits).find_map(|w| match w {
                Wait::NoCopy { store, .. } => Some(store.clone()),
                _ => None,
            });
            match lost.filter(|_| self.person) {
                Some(store) => {
                    let request = format!("accept-{}", self.ids);
                    self.id();
                    self.replace(&store, &request, true);
                    quiet = 0;
                }
                None => return,
            }
        }
        panic!("it does not come to rest: {:?} {:?}", self.last, self.status);
    }

    /// At rest, where the spec wants it, with every acknowledged write everywhere it belongs and nowhere else.
    pub(super) fn settled(&mut self) {
        self.settle();
        let waits = format!("{:?}", self.last.as_ref().map(|o| (&o.waits, &o.conditions)));
        let t = self.status.clone().expect("it was made");
        assert_eq!(t.phase(), Phase::Stable, "{waits} {t:?}");
        let current = t.current.as_ref().expect("it was made");
        let wanted = placement(self.spec.shards, self.spec.replication_factor, store_name).expect("a spec in bounds");
        assert_eq!(lists(current), wanted, "{waits} {t:?}");
        assert!(t.drops.is_empty(), "{waits} {t:?}");
        assert_eq!(t.spec, self.spec.spec_json);
        assert!((0..current.size()).all(|s| !hollow(current, s)));
        let mut named = BTreeSet::new();
        for place in current.places() {
            let (a, shard) = (place.assignment, place.shard);
            assert!(a.replica != 0 && a.serving, "shard {shard} isn't whole: {waits} {t:?}");
            let replica = &self.stores[&a.store].replicas[&a.replica];
            assert!(replica.born && replica.shard == shard);
            for write in self.acked.difference(&self.excused) {
                let owns = place.owns(hash(self.writes[*write as usize]));
                assert_eq!(replica.has.contains(write), owns, "write {write}, shard {shard}, on {}", a.store);
            }
            named.insert(a.replica);
        }
        for (name, store) in self.stores.iter().filter(|(_, s)| s.alive) {
            for (id, replica) in &store.replicas {
                assert!(named.contains(id) || replica.served, "{name} still has the candidate {id}: {t:?}");
            }
        }
    }
}

impl Store {
    fn report(&self) -> Option<KeyspaceReport> {
        let t = self.topology.as_ref()?;
        let report = |(id, r): (&u64, &Replica)| ReplicaReport {
            id: *id,
            shard: r.shard,
            born: r.born,
            epoch: r.epoch,
            last_seq: r.log.len() as u64,
            fence_version: r.fence.0,
            fence_seq: r.fence.1 as u64,
            cleaned_version: r.cleaned,
            candidate: !r.served,
            fault: r.fault.clone(),
            quarantined: r.quarantined,
            taken_over: r.taken_over.iter().copied().collect(),
            records: r.has.len() as u64,
            sources: t
                .sources(*id)
                .iter()
                .map(|p| match r.positions.get(&p.assignment.replica) {
                    Some((epoch, at, heard)) => SourceReport {
                        replica: p.assignment.replica,
                        epoch: *epoch,
                        confirmed: *at as u64,
                        lag: (heard - at.min(heard)) as u64 * LAG,
                        ..SourceReport::default()
                    },
                    None => SourceReport { replica: p.assignment.replica, lag: u64::MAX, ..SourceReport::default() },
                })
                .collect(),
            ..ReplicaReport::default()
        };
        Some(KeyspaceReport {
            uid: "u".into(),
            version: self.installed,
            topology: Some(t.clone()),
            replicas: self.replicas.iter().map(report).collect(),
        })
    }
}

trait RevMax<'a> {
    fn rev_max(self) -> Option<Topology>;
}
impl<'a, I: Iterator<Item = &'a Topology>> RevMax<'a> for I {
    /// The greatest version; of equals the first.
    fn rev_max(self) -> Option<Topology> {
        let mut best: Option<&Topology> = None;
        for t in self {
            if best.is_none_or(|b| t.version > b.version) {
                best = Some(t);
            }
        }
        best.cloned()
    }
}

impl Sim {
    /// A new operator: what was heard is forgotten, status isn't.
    pub(super) fn forget(&mut self) {
        self.heard.clear();
    }
}
