//! What is looked after in every phase: drops that are done, replicas that come
//! back after they were given up, strays, and replicas that have caught up again.

use vasto_client::hash::shards_meet;
use vasto_client::v1::{Drop, GivenUp, ReplicaReport, Topology, View};

use super::health::{caught_up, hollow, places};
use super::{Call, Observation};

/// One round of it.
pub(super) fn keep(t: &mut Topology, call: &mut Call<'_>) {
    drops(t, call.seen);
    returned(t, call.seen);
    for (store, stray) in strays(t, call.seen) {
        // One that never stood in a `current` view has accepted nothing: the candidate of a cancelled
        // change. Of any other nothing is known here, so it stays until a person has looked (see status.rs).
        if stray.candidate {
            t.drops.push(Drop { store, replica: stray.id, shard: stray.shard });
        }
    }
    promote(t, call.seen);
}

/// Drops end when the store no longer reports the replica. Where the store is lost
/// nobody waits for it, but what it must drop is remembered.
fn drops(t: &mut Topology, seen: &Observation) {
    for drop in std::mem::take(&mut t.drops) {
        if seen.is_living(&drop.store) && !seen.has(&drop.store, drop.replica) {
            t.given_up.retain(|g| g.replica != drop.replica);
        } else if seen.is_lost(&drop.store) {
            let Drop { store, replica, shard } = drop;
            if !t.is_given_up(replica) {
                // It was drained, or never served.
                t.given_up.push(GivenUp { store, replica, shard, ..GivenUp::default() });
            }
        } else {
            t.drops.push(drop);
        }
    }
}

/// A given-up replica that comes back hands over what it alone has, then is emptied; as soon as every
/// shard has a living copy that serves: until then it may be the best that is left.
fn returned(t: &mut Topology, seen: &Observation) {
    let Some(current) = t.current.clone().filter(|v| v.size() > 0) else { return };
    if !(0..current.size()).all(|shard| seen.has_copy(&current, shard, 0)) {
        return;
    }
    let mut given_up = std::mem::take(&mut t.given_up);
    for g in &mut given_up {
        let Some(report) = seen.replica(&g.store, g.replica).filter(|_| !t.names(g.replica)) else { continue };
        g.returned = true;
        // A faulty one can't be read; a person gave it up, or others have its shard.
        let nothing = g.shards == 0 || !report.born || report.candidate || !report.fault.is_empty();
        if (nothing || taken_over(&current, seen, g)) && t.drops.iter().all(|d| d.replica != g.replica) {
            t.drops.push(Drop { store: g.store.clone(), replica: g.replica, shard: g.shard });
        }
    }
    t.given_up = given_up;
}

/// Whether each shard that shares keys with this replica has a copy that took over its records.
fn taken_over(current: &View, seen: &Observation, g: &GivenUp) -> bool {
    (0..current.size())
        .filter(|j| shards_meet(g.shard, g.shards, *j, current.size()))
        .all(|j| places(current, j).any(|a| seen.sound(a).is_some_and(|r| r.taken_over.contains(&g.replica))))
}

/// Whether nothing in the topology names this replica.
pub(super) fn unknown(t: &Topology, replica: u64) -> bool {
    !t.names(replica) && t.drops.iter().all(|d| d.replica != replica) && !t.is_given_up(replica)
}

/// Replicas that living stores report and nothing names; candidates that a place
/// in `next` waits for are none.
pub(super) fn strays(t: &Topology, seen: &Observation) -> Vec<(String, ReplicaReport)> {
    let awaited = |store: &str, shard| {
        let next = t.next.as_ref();
        next.is_some_and(|v| places(v, shard).any(|a| a.store == store && a.replica == 0))
    };
    seen.reports()
        .flat_map(|(store, report)| report.replicas.iter().map(move |r| (store, r)))
        .filter(|(store, r)| unknown(t, r.id) && !(r.candidate && awaited(store, r.shard)))
        .map(|(store, r)| (store.to_owned(), r.clone()))
        .collect()
}

/// The candidate that a store has made for a place in `next`. Once the store has
/// acted on this version it has made one for it, so a leftover is not taken
/// in its stead; one still to be copied is preferred for the same reason. Where
/// nobody has the shard any more, a given-up replica that came back is the best copy left.
pub(super) fn candidate(t: &Topology, seen: &Observation, store: &str, shard: u32) -> Option<u64> {
    let report = seen.report(store).filter(|r| r.version >= t.version)?;
    let here = || report.replicas.iter().filter(|r| r.shard == shard);
    let nobody = t.current.as_ref().is_some_and(|v| shard < v.size() && hollow(v, shard));
    let best = here().filter(|r| {
        let dropped = t.drops.iter().any(|d| d.replica == r.id);
        nobody && r.born && r.fault.is_empty() && t.is_given_up(r.id) && !t.names(r.id) && !dropped
    });
    let made = here().filter(|r| r.candidate && !r.quarantined && unknown(t, r.id));
    best.map(|r| r.id).min().or_else(|| made.map(|r| (r.born, r.id)).min().map(|(_, id)| id))
}

/// A replica that clients are not sent to since it had missed something is served
/// again once it has caught up with one that serves, or with all the old owners
/// where it is all that its shard has.
fn promote(t: &mut Topology, seen: &Observation) {
    let Some(current) = &t.current else { return };
    let ready: Vec<u64> = current
        .places()
        .filter(|p| p.assignment.replica != 0 && !p.assignment.serving)
        .filter(|p| {
            let (shard, id) = (p.shard, p.assignment.replica);
            let alone = places(current, shard).all(|a| a.replica == id || a.replica == 0 || !a.serving);
            let fed = seen.has_copy(current, shard, id) || (alone && fed_by_previous(t, seen, shard));
            let healthy = seen.living(p.assignment).is_some_and(|r| r.fault.is_empty());
            fed && healthy && caught_up(t, seen, shard, p.assignment, |_| true).is_ok()
        })
        .map(|p| p.assignment.replica)
        .collect();
    for view in [&mut t.current, &mut t.next].into_iter().flatten() {
        for place in view.shards.iter_mut().flat_map(|s| &mut s.replicas) {
            place.serving |= ready.contains(&place.replica);
        }
    }
}

/// Whether each old shard that this one takes keys from has a living, whole replica, or nobody at all.
fn fed_by_previous(t: &Topology, seen: &Observation, shard: u32) -> bool {
    let Some(previous) = &t.previous else { return true };
    let living = |view: &View, i| places(view, i).any(|a| seen.living(a).is_some_and(|r| r.born));
    (0..previous.size())
        .filter(|i| shards_meet(*i, previous.size(), shard, t.size()))
        .all(|i| hollow(previous, i) || living(previous, i))
}
