//! PREPARE: candidates are made, copy and catch up; then clients are switched to
//! them. Until then the change can be cancelled.

use vasto_client::hash::shards_meet;
use vasto_client::v1::{Assignment, Drop, Phase, Topology, View};

use super::health::{Fate, caught_up, hollow, places};
use super::wait::Wait;
use super::{Call, givenup, keep, placement, quorum, start};

/// One step of it.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    start::withdraw(t, call);
    let wanted = start::desired(t, call);
    let building = t.next.as_ref().map(placement::lists);
    if building.is_none() || (wanted.is_some() && wanted != building) {
        match rescuing(t, call) {
            None => return cancel(t, call),
            // What has been copied of this shard may be all that is left: it goes on, and back afterwards.
            Some(shard) => call.wait(Wait::NoOwner { shard }),
        }
    }
    if fill(t, call) {
        return;
    }
    match ready(t, call) {
        Ok(()) => switch(t, call),
        Err(waits) => waits.into_iter().for_each(|w| call.wait(w)),
    }
}

/// Writes down who stays and gains keys, and the candidates that stores have made; forgets those that are gone, and drops
/// those whose files are damaged. True if any.
fn fill(t: &mut Topology, call: &mut Call<'_>) -> bool {
    let seen = call.seen;
    let damaged = |d: &Drop| seen.replica(&d.store, d.replica).is_some_and(|r| r.quarantined);
    let missing = |d: &Drop| seen.is_living(&d.store) && !seen.has(&d.store, d.replica);
    let dropped: Vec<Drop> = givenup::candidates(t).filter(|d| damaged(d) && keep_out(t, d)).collect();
    let gone: Vec<u64> = givenup::candidates(t).filter(|d| missing(d) || damaged(d)).map(|d| d.replica).collect();
    t.drops.extend(dropped);
    let (Some(next), current) = (&t.next, t.current.clone().unwrap_or_default()) else { return false };
    let mut filled = next.clone();
    for shard in 0..next.size() {
        for (place, now) in filled.shards[shard as usize].replicas.iter_mut().zip(places(next, shard)) {
            if let Some(stays) = current.on(shard, &now.store) {
                place.clone_from(stays);
            } else if now.replica == 0 {
                place.replica = keep::candidate(t, seen, &now.store, shard).unwrap_or(0);
            } else if gone.contains(&now.replica) {
                place.replica = 0;
            }
        }
    }
    let changed = filled != *next;
    t.next = Some(filled);
    changed
}

/// Whether clients can be sent to `next`; otherwise all that stands in the way.
fn ready(t: &Topology, call: &Call<'_>) -> Result<(), Vec<Wait>> {
    let seen = call.seen;
    let empty = View::default();
    let (Some(next), current) = (&t.next, t.current.as_ref().unwrap_or(&empty)) else { return Err(vec![]) };
    let mut waits = Vec::new();
    // What is left must be whole, and what is copied must have a living copy.
    for place in current.places() {
        if let Some(report) = seen.living(place.assignment).filter(|r| !r.born) {
            let store = place.assignment.store.clone();
            waits.push(Wait::NotBorn { store, replica: report.id, shard: place.shard });
        }
    }
    for shard in 0..current.size() {
        if !hollow(current, shard) && !seen.has_copy(current, shard, 0) {
            waits.push(Wait::NoOwner { shard });
        }
    }
    for shard in 0..next.size() {
        let mut able = false;
        for place in places(next, shard) {
            match able_to_serve(t, current, call, shard, place) {
                Ok(able_here) => able |= able_here,
                Err(wait) => waits.push(wait),
            }
        }
        if !able {
            waits.push(Wait::NoOwner { shard });
        }
    }
    if let Err(wait) = quorum::reached_by_next(t, seen) {
        waits.push(wait);
    }
    if waits.is_empty() { Ok(()) } else { Err(waits) }
}

/// Whether this place of `next` can serve its whole shard at once. An error if it must
/// be waited for; `Ok(false)` if not.
fn able_to_serve(t: &Topology, current: &View, call: &Call<'_>, shard: u32, place: &Assignment) -> Result<bool, Wait> {
    let seen = call.seen;
    let next_size = t.next.as_ref().map_or(0, View::size);
    let stays = place.replica != 0 && current.place(place.replica).is_some();
    let gains = (0..current.size()).any(|i| i != shard && shards_meet(i, current.size(), shard, next_size));
    match seen.fate(place) {
        // Nobody waits for a lost store.
        Fate::Vacant if seen.is_lost(&place.store) => Ok(false),
        Fate::Vacant => Err(Wait::NotMade { store: place.store.clone(), shard }),
        Fate::Living(_) | Fate::Gone | Fate::Away | Fate::Lost if stays && !gains => Ok(seen.sound(place).is_some()),
        Fate::Lost => Ok(false),
        _ => {
            // Candidates of a shard that nobody has follow one another: one of them may be a copy that came back.
            let nobody = current.size() > shard && hollow(current, shard);
            let counts = |id| current.place(id).is_some() || nobody;
            caught_up(t, seen, shard, place, counts)?;
            let faulty = seen.living(place).is_some_and(|r| !r.fault.is_empty());
            Ok(!faulty && (!stays || place.serving))
        }
    }
}

/// Clients route by what was prepared.
fn switch(t: &mut Topology, call: &Call<'_>) {
    let (current, mut next) = (t.current.take().unwrap_or_default(), t.next.take().unwrap_or_default());
    for place in next.shards.iter_mut().flat_map(|s| &mut s.replicas) {
        let able = call.seen.living(place).is_some_and(|r| r.born && r.fault.is_empty());
        if place.replica != 0 && current.place(place.replica).is_none() {
            place.serving = able;
            // One that came back after it was given up belongs to the keyspace again; it may
            // have keys of another view.
            if t.is_given_up(place.replica) {
                t.given_up.retain(|g| g.replica != place.replica);
                t.clean.push(place.replica);
            }
        }
    }
    t.switch_version = call.version;
    t.current = Some(next);
    if current.size() == 0 {
        // There is nothing to leave.
        t.set_phase(Phase::Stable);
    } else {
        t.previous = Some(current);
        t.set_phase(Phase::Switch);
    }
}

/// A shard that nobody serves, of which something in `next` may have a copy.
fn rescuing(t: &Topology, call: &Call<'_>) -> Option<u32> {
    let (current, next) = (t.current.as_ref()?, t.next.as_ref()?);
    let copies = |i: u32| {
        next.places().filter(|p| p.assignment.replica != 0).any(|p| {
            let stays = current.place(p.assignment.replica).is_some();
            shards_meet(i, current.size(), p.shard, p.shards) && !(stays && p.shard == i)
        })
    };
    (0..current.size()).find(|i| !call.seen.has_copy(current, *i, 0) && copies(*i))
}

/// Gives up what is being prepared. Candidates go; replicas that stay but were
/// about to gain keys delete what they had already copied: left there it would be joined in
/// again, deletes forgotten, the next time.
fn cancel(t: &mut Topology, call: &Call<'_>) {
    let mut drops: Vec<Drop> = givenup::candidates(t).collect();
    for (store, stray) in keep::strays(&Topology { next: None, ..t.clone() }, call.seen) {
        if stray.candidate && drops.iter().all(|d| d.replica != stray.id) {
            drops.push(Drop { store, replica: stray.id, shard: stray.shard });
        }
    }
    drops.retain(|d| keep_out(t, d));
    if let (Some(next), Some(current)) = (t.next.take(), &t.current)
        && next.size() < current.size()
    {
        // Also those whose places are still empty: a commit that named them may have been forgotten.
        let stays = next.places().filter_map(|p| current.on(p.shard, &p.assignment.store));
        t.clean = stays.map(|a| a.replica).collect();
    }
    t.drops.extend(drops);
    // Names this clean-up; nothing was switched.
    t.switch_version = call.version;
    t.set_phase(Phase::Cleanup);
}

/// Whether a candidate of a cancelled change must go: not if it is a given-up replica that came back.
fn keep_out(t: &Topology, drop: &Drop) -> bool {
    !t.is_given_up(drop.replica) && t.drops.iter().all(|d| d.replica != drop.replica)
}
