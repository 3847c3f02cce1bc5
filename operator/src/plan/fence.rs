//! FENCE: old owners refuse what they no longer own.

use vasto_client::v1::{Phase, Topology, View};

use super::Call;
use super::wait::Wait;

/// Done once every living old owner has fenced. One that is away fences when it comes
/// back, and is waited for in CLEANUP.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    let seen = call.seen;
    let mut done = true;
    for place in t.previous.iter().flat_map(View::places) {
        if seen.living(place.assignment).is_some_and(|r| r.fence_version != t.switch_version) {
            call.wait(Wait::Fence { store: place.assignment.store.clone(), shard: place.shard });
            done = false;
        }
    }
    if done {
        t.set_phase(Phase::Drain);
    }
}
