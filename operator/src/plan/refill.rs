//! When, after the switch, a shard of `current` has nobody left (its loss was
//! accepted), the change can't end: nobody could drain the old owners. So its
//! places are filled anew in the middle of the change, from the old owners where
//! they still are.

use vasto_client::v1::{Shard, Topology, View};

use super::health::hollow;
use super::wait::Wait;
use super::{Call, keep};

/// Fills shards that nobody has. True: the topology changed, or the change has to wait for it.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) -> bool {
    // After a cancelled change there is nothing to end; the next one fills them.
    let Some(current) = t.current.clone().filter(|_| t.previous.is_some()) else { return false };
    let empty: Vec<u32> = (0..current.size()).filter(|shard| hollow(&current, *shard)).collect();
    if empty.is_empty() {
        return t.next.take().is_some();
    }
    let asked = request(&current);
    if t.next.as_ref() != Some(&asked) {
        t.next = Some(asked);
        return true;
    }
    let mut filled = current.clone();
    for shard in &empty {
        // One each: two that begin from nothing would wait for one another.
        for place in &mut filled.shards[*shard as usize].replicas {
            place.replica = keep::candidate(t, call.seen, &place.store, *shard).unwrap_or(0);
            if place.replica != 0 {
                break;
            }
            call.wait(Wait::NotMade { store: place.store.clone(), shard: *shard });
        }
    }
    let taken: Vec<u64> = filled.places().map(|p| p.assignment.replica).filter(|id| *id != 0).collect();
    let back: Vec<u64> = taken.iter().copied().filter(|id| t.is_given_up(*id)).collect();
    t.clean.extend(back);
    t.given_up.retain(|g| !taken.contains(&g.replica));
    t.next = (0..filled.size()).any(|shard| hollow(&filled, shard)).then(|| request(&filled));
    t.current = Some(filled);
    true
}

/// What stores are to make. It names the empty shards alone, and never an id: stores make candidates
/// for its places; once an id stands in `current`, with `previous` before it, its sources are the old owners.
fn request(current: &View) -> View {
    let only =
        |shard: u32| if hollow(current, shard) { current.shards[shard as usize].clone() } else { Shard::default() };
    View { shards: (0..current.size()).map(only).collect() }
}
