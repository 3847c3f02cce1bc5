//! CLEANUP: what has been drained goes: retired replicas whole, of the others the
//! keys that moved away. Also the end of a cancelled change.

use vasto_client::hash::shards_meet;
use vasto_client::topology::Place;
use vasto_client::v1::{Drop, Phase, ReplicaReport, Topology, View};

use super::drain::drained;
use super::givenup::vacate_in;
use super::health::Fate;
use super::wait::Wait;
use super::{Call, Observation};

/// One step of it.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    let seen = call.seen;
    let mut done = true;
    for place in t.previous.clone().iter().flat_map(View::places) {
        let (store, replica) = (place.assignment.store.clone(), place.assignment.replica);
        let retired = t.current.as_ref().is_none_or(|v| v.place(replica).is_none());
        match seen.fate(place.assignment) {
            Fate::Vacant => {}
            Fate::Living(old) => {
                let losing = lost_shards(t, &place, retired);
                // One that was told to delete already is nobody's source any more.
                let told = t.clean.contains(&replica);
                if let Some(shard) = losing.iter().copied().find(|j| !told && !ripe(t, seen, *j, old)) {
                    call.wait(Wait::Drain { shard, store });
                    done = false;
                } else if old.fence_version != t.switch_version {
                    call.wait(Wait::Fence { store, shard: place.shard });
                    done = false;
                } else if retired {
                    unserve_absent(t, seen, &losing);
                    if let Some(previous) = &mut t.previous {
                        vacate_in(previous, replica);
                    }
                    t.drops.push(Drop { store, replica, shard: place.shard });
                } else if !losing.is_empty() && old.cleaned_version != t.switch_version {
                    // Else it owns all that it owned: a walk through its rows would find nothing.
                    if !told {
                        unserve_absent(t, seen, &losing);
                        t.clean.push(replica);
                    }
                    call.wait(Wait::Clean { store, shard: place.shard });
                    done = false;
                }
            }
            // Where nothing of it moves away, it has nothing to hand over that it wouldn't as a member.
            Fate::Gone | Fate::Away | Fate::Lost if lost_shards(t, &place, retired).is_empty() => {}
            Fate::Gone | Fate::Away | Fate::Lost => {
                call.wait(Wait::Away { store, shard: place.shard });
                done = false;
            }
        }
    }
    done &= others_are_clean(t, call);
    for drop in &t.drops {
        if seen.has(&drop.store, drop.replica) {
            let (store, replica) = (drop.store.clone(), drop.replica);
            call.wait(Wait::Drop { store, replica });
            done = false;
        }
    }
    if done {
        t.previous = None;
        t.clean.clear();
        t.set_phase(Phase::Stable);
    }
}

/// The shards of `current` that take keys from this place.
fn lost_shards(t: &Topology, place: &Place<'_>, retired: bool) -> Vec<u32> {
    (0..t.size())
        .filter(|j| shards_meet(place.shard, place.shards, *j, t.size()) && (retired || *j != place.shard))
        .collect()
}

/// Whether the old owner has fenced and `shard` has all of it.
fn ripe(t: &Topology, seen: &Observation, shard: u32, old: &ReplicaReport) -> bool {
    old.fence_version == t.switch_version && drained(t, seen, shard, old)
}

/// New owners that are away may not have what is deleted now: they are served
/// again, and counted as copies, when they have caught up.
fn unserve_absent(t: &mut Topology, seen: &Observation, shards: &[u32]) {
    let Some(current) = &mut t.current else { return };
    for shard in shards {
        for place in current.shards.iter_mut().skip(*shard as usize).take(1).flat_map(|s| &mut s.replicas) {
            place.serving &= seen.living(place).is_some();
        }
    }
}

/// Whether those that clean without leaving anything have done so: who had copied keys for a
/// shrink that was cancelled, and who came back after it was given up.
fn others_are_clean(t: &Topology, call: &mut Call<'_>) -> bool {
    let leaves = |id| t.previous.as_ref().is_some_and(|v| v.place(id).is_some());
    let mut done = true;
    for place in t.current.iter().flat_map(View::places) {
        let report = call.seen.living(place.assignment);
        let cleaned = report.is_some_and(|r| r.cleaned_version == t.switch_version);
        let id = place.assignment.replica;
        if t.clean.contains(&id) && !leaves(id) && !cleaned {
            call.wait(Wait::Clean { store: place.assignment.store.clone(), shard: place.shard });
            done = false;
        }
    }
    done
}
