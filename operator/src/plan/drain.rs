//! DRAIN: new owners take over all that old owners accepted before their fences.

use vasto_client::hash::shards_meet;
use vasto_client::v1::{Phase, ReplicaReport, Topology, View};

use super::health::{passed, places};
use super::wait::Wait;
use super::{Call, Observation};

/// Done once each shard has a living new owner that has passed the fence of every
/// living old owner of its keys. The others are not served until they have caught up.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    let seen = call.seen;
    let Some(mut current) = t.current.clone() else { return };
    let mut done = true;
    for shard in 0..current.size() {
        let mut one = false;
        for place in &mut current.shards[shard as usize].replicas {
            let behind = match seen.sound(place) {
                Some(new) => first_not_passed(t, seen, shard, new),
                None => Some(String::new()),
            };
            one |= behind.is_none();
            place.serving &= behind.is_none();
        }
        if !one {
            done = false;
            let mut stores = places_behind(t, seen, shard);
            if stores.is_empty() {
                call.wait(Wait::NoOwner { shard });
            }
            stores.drain(..).for_each(|store| call.wait(Wait::Drain { shard, store }));
        }
    }
    if done {
        t.current = Some(current);
        t.set_phase(Phase::Cleanup);
    }
}

/// The store of the first living old owner whose fence this new owner has not passed.
fn first_not_passed(t: &Topology, seen: &Observation, shard: u32, new: &ReplicaReport) -> Option<String> {
    t.previous
        .iter()
        .flat_map(View::places)
        .filter(|old| shards_meet(old.shard, old.shards, shard, t.size()) && old.assignment.replica != new.id)
        .filter_map(|old| seen.living(old.assignment).map(|r| (old.assignment, r)))
        .find(|(_, old)| !passed(new, old, t.switch_version))
        .map(|(old, _)| old.store.clone())
}

/// Whom this shard's living new owners have yet to drain.
fn places_behind(t: &Topology, seen: &Observation, shard: u32) -> Vec<String> {
    let Some(current) = &t.current else { return vec![] };
    places(current, shard)
        .filter_map(|a| seen.sound(a))
        .filter_map(|new| first_not_passed(t, seen, shard, new))
        .collect()
}

/// Whether this fenced old owner may lose its keys of `shard`: a living owner serves it, and every one that
/// does has all that the old owner accepted. (One would do; but then its death would count as that of a
/// copy like the others, though it alone had the last writes.)
pub(super) fn drained(t: &Topology, seen: &Observation, shard: u32, old: &ReplicaReport) -> bool {
    let Some(current) = &t.current else { return false };
    let owners: Vec<_> = places(current, shard).filter_map(|a| seen.sound(a)).collect();
    !owners.is_empty() && owners.iter().all(|new| new.id == old.id || passed(new, old, t.switch_version))
}
