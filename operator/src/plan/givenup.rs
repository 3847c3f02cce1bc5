//! Giving up the dead: a replica whose store was away too long, whose volume is gone, or
//! whose store has closed it since its files are damaged, is written off where another living copy serves, or where a person accepts
//! the loss. Its places become vacant, so that nobody waits for it.

use vasto_client::hash::shards_meet;
use vasto_client::v1::{Drop, GivenUp, Phase, Topology, View};

use super::health::Fate;
use super::wait::Wait;
use super::{Call, Observation};

/// How many given-up replicas are remembered. One that comes back after it was
/// forgotten is a stray: reported and left alone.
const REMEMBERED: usize = 256;

/// Gives up every replica that may be given up now.
pub(super) fn give_up(t: &mut Topology, call: &mut Call<'_>) {
    let seen = call.seen;
    let accepted = accepted(t, call).map(str::to_owned);
    let mut doomed: Vec<GivenUp> = Vec::new();
    for place in [&t.current, &t.previous].into_iter().flatten().flat_map(View::places) {
        let (store, replica) = (&place.assignment.store, place.assignment.replica);
        let by_person = accepted.as_ref() == Some(store);
        let dead = match seen.fate(place.assignment) {
            Fate::Lost | Fate::Gone => true,
            // One that is faulty and still open may have what others lack.
            Fate::Living(report) => report.quarantined || (by_person && !report.fault.is_empty()),
            Fate::Away | Fate::Vacant => false,
        };
        if !dead || doomed.iter().any(|d| d.replica == replica) {
            continue;
        }
        if by_person || covered(t, seen, replica) {
            let (shard, shards) = (place.shard, place.shards);
            doomed.push(GivenUp { store: store.clone(), replica, shard, shards, returned: false });
        } else {
            call.wait(Wait::NoCopy { store: store.clone(), shard: place.shard });
        }
    }
    for dead in doomed {
        vacate(t, dead.replica);
        t.given_up.push(dead);
    }
    // Candidates have never served: theirs is no loss, as long as what they copied has a living copy.
    let spare = |d: &Drop| {
        let (Some(current), Some(next)) = (&t.current, &t.next) else { return false };
        (0..current.size())
            .filter(|i| shards_meet(*i, current.size(), d.shard, next.size()))
            .all(|i| seen.has_copy(current, i, 0))
    };
    let stranded: Vec<Drop> = candidates(t).filter(|d| seen.is_lost(&d.store) && spare(d)).collect();
    for drop in stranded {
        vacate(t, drop.replica);
        if !t.is_given_up(drop.replica) {
            t.drops.push(drop);
        }
    }
    let excess = t.given_up.len().saturating_sub(REMEMBERED);
    t.given_up.drain(..excess);
}

/// The store whose loss a person has accepted, until it has been emptied: what
/// is made on it afterwards is not what they spoke of.
fn accepted<'a>(t: &Topology, call: &Call<'a>) -> Option<&'a str> {
    let request = call.spec.replace.as_ref().filter(|r| r.accept_data_loss && r.request != t.replaced)?;
    let emptied = t.replace.as_ref().is_some_and(|r| r.request == request.request && r.emptied);
    (!emptied).then_some(request.store.as_str())
}

/// Replicas that only `next` names.
pub(super) fn candidates(t: &Topology) -> impl Iterator<Item = Drop> {
    let named = |view: &Option<View>, id| view.as_ref().is_some_and(|v| v.place(id).is_some());
    t.next.iter().flat_map(View::places).filter_map(move |p| {
        let (store, replica) = (p.assignment.store.clone(), p.assignment.replica);
        let candidate = replica != 0 && !named(&t.current, replica) && !named(&t.previous, replica);
        candidate.then_some(Drop { store, replica, shard: p.shard })
    })
}

/// Whether others hold what this replica holds: under `current`, another of its shard;
/// under `previous`, until CLEANUP, another of its old shard; from then on the new
/// owners of all its keys, who have drained what its shard's living replicas accepted.
fn covered(t: &Topology, seen: &Observation, replica: u64) -> bool {
    let in_current = |view: &View| view.place(replica).is_none_or(|p| seen.has_copy(view, p.shard, replica));
    let in_previous = |view: &View| {
        view.place(replica).is_none_or(|p| {
            if t.phase() != Phase::Cleanup {
                // The new owners may lack the last writes that it accepted.
                return seen.has_copy(view, p.shard, replica);
            }
            t.current.as_ref().is_some_and(|current| {
                (0..current.size())
                    .filter(|j| shards_meet(p.shard, p.shards, *j, current.size()))
                    .all(|j| seen.has_copy(current, j, replica))
            })
        })
    };
    t.current.as_ref().is_none_or(in_current) && t.previous.as_ref().is_none_or(in_previous)
}

/// Empties every place of this replica.
pub(super) fn vacate(t: &mut Topology, replica: u64) {
    for view in [&mut t.current, &mut t.next, &mut t.previous].into_iter().flatten() {
        vacate_in(view, replica);
    }
    t.clean.retain(|id| *id != replica);
}

/// Empties this replica's place in one view.
pub(super) fn vacate_in(view: &mut View, replica: u64) {
    for place in view.shards.iter_mut().flat_map(|s| &mut s.replicas).filter(|a| a.replica == replica) {
        place.replica = 0;
        place.serving = false;
    }
}
