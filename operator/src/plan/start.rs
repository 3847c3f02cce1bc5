//! Where changes begin: a new keyspace, and from STABLE whatever the spec wants
//! that isn't so: more or fewer shards or replicas, a vacant place healed, a store replaced.

use std::collections::BTreeMap;

use vasto_client::v1::{Phase, Replace, Topology, View};

use super::Call;
use super::health::places;
use super::placement::{self, Lists, lists, placement};
use super::wait::Wait;

/// Bytes that a store leaves free on its disk (of a small one: a third).
const KEPT_FREE: u64 = 64 << 20;

/// The first topology, once every store of its placement lives.
pub(super) fn create(call: &mut Call<'_>) -> Option<Topology> {
    let (spec, seen) = (call.spec, call.seen);
    if spec.deleting {
        return None;
    }
    if let Some((store, report)) = seen.reports().find(|(_, r)| r.version > 0 || !r.replicas.is_empty()) {
        call.wait(Wait::Newer { store: store.to_owned(), version: report.version });
        return None;
    }
    let Some(lists) = wanted(call) else {
        call.wait(Wait::Spec { shards: spec.shards, replication_factor: spec.replication_factor });
        return None;
    };
    if spec.paused {
        call.wait(Wait::Paused);
        return None;
    }
    let missing: Vec<String> = lists.iter().flatten().filter(|s| !seen.is_living(s)).cloned().collect();
    if !missing.is_empty() {
        missing.into_iter().for_each(|store| call.wait(Wait::Store { store }));
        return None;
    }
    let empty = View::default();
    Some(Topology {
        uid: spec.uid.clone(),
        name: spec.name.clone(),
        phase: Phase::Prepare as i32,
        next: Some(placement::view(&lists, &empty)),
        current: Some(empty),
        retain: spec.retain,
        ..Topology::default()
    })
}

/// Begins the next change, if one is wanted.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    withdraw(t, call);
    ask(t, call);
    let Some(desired) = desired(t, call) else {
        let spec = call.spec;
        call.wait(Wait::Spec { shards: spec.shards, replication_factor: spec.replication_factor });
        return;
    };
    let current = t.current.clone().unwrap_or_default();
    let seen = call.seen;
    let healable = |v: &View| v.places().any(|p| p.assignment.replica == 0 && seen.is_living(&p.assignment.store));
    if lists(&current) != desired || healable(&current) {
        if let Some(wait) = without_room(&current, &desired, call) {
            call.wait(wait);
            return;
        }
        t.next = Some(placement::view(&desired, &current));
        t.previous = None;
        t.clean.clear();
        t.set_phase(Phase::Prepare);
    }
}

/// The first store whose disk can't take what it would get, by what replicas report of their size. A heal
/// is never held up: it brings a store what it had before.
fn without_room(current: &View, desired: &Lists, call: &Call<'_>) -> Option<Wait> {
    let seen = call.seen;
    let bytes = |shard| places(current, shard).filter_map(|a| seen.living(a)).map(|r| r.bytes).max().unwrap_or(0);
    let total: u64 = (0..current.size()).map(bytes).sum();
    let (before, after) = (total / u64::from(current.size()).max(1), total / (desired.len() as u64).max(1));
    let mut needs: BTreeMap<&str, u64> = BTreeMap::new();
    for (shard, stores) in desired.iter().enumerate() {
        for store in stores {
            let stays = places(current, shard as u32).any(|a| a.store == *store);
            *needs.entry(store).or_default() += if stays { after.saturating_sub(before) } else { after };
        }
    }
    needs.into_iter().find_map(|(store, need)| {
        let room = seen.room.get(store)?;
        let free = room.free.saturating_sub(KEPT_FREE.min(room.size / 3));
        (need > free).then(|| Wait::NoRoom { store: store.to_owned(), need, free })
    })
}

/// The placement that the spec asks for.
fn wanted(call: &Call<'_>) -> Option<Lists> {
    placement(call.spec.shards, call.spec.replication_factor, call.seen.store_name)
}

/// The stores that each shard should have now: the spec's placement, less
/// the store that is being emptied. `None`: the spec can't be placed.
pub(super) fn desired(t: &Topology, call: &Call<'_>) -> Option<Lists> {
    let wanted = wanted(call)?;
    Some(match &t.replace {
        Some(replace) if !replace.emptied || held(replace, call) => {
            let surge = (call.seen.store_name)(t.size().max(call.spec.shards));
            placement::without(wanted, &replace.store, &surge)
        }
        _ => wanted,
    })
}

/// Whether the store is to stay empty for now.
fn held(replace: &Replace, call: &Call<'_>) -> bool {
    call.spec.replace.as_ref().is_some_and(|q| q.hold && q.request == replace.request)
}

/// A replace that is no longer asked for ends where it stands: its store gets its
/// replicas back as the spec's placement wants them.
pub(super) fn withdraw(t: &mut Topology, call: &Call<'_>) {
    let asked = |r: &Replace| call.spec.replace.as_ref().is_some_and(|q| q.request == r.request);
    if t.replace.as_ref().is_some_and(|r| !asked(r)) {
        t.replace = None;
    }
}

/// Takes up a replace that is asked for, notes how far it has come, and that it is finished.
fn ask(t: &mut Topology, call: &mut Call<'_>) {
    let Some(request) = call.spec.replace.as_ref().filter(|r| r.request != t.replaced) else { return };
    let Some(wanted) = wanted(call) else { return };
    let current = t.current.clone().unwrap_or_default();
    let at_store = |p: &vasto_client::topology::Place<'_>| p.assignment.store == request.store;
    if t.replace.is_none() {
        if !current.places().any(|p| at_store(&p)) && !wanted.iter().flatten().any(|s| *s == request.store) {
            // Another change has taken the store away before its turn came. Left standing, the wish would hit
            // whoever bears the name later.
            t.replaced.clone_from(&request.request);
            return;
        }
        let (store, request) = (request.store.clone(), request.request.clone());
        t.replace = Some(Replace { store, request, emptied: false });
    }
    let Some(replace) = &mut t.replace else { return };
    if !replace.emptied {
        replace.emptied = !current.places().any(|p| at_store(&p) && p.assignment.replica != 0);
    } else if lists(&current) == wanted && !current.places().any(|p| at_store(&p) && p.assignment.replica == 0) {
        t.replaced.clone_from(&replace.request);
        t.replace = None;
    }
}
