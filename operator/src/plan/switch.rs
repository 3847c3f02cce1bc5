//! SWITCH: clients learn the new owners, while the old ones still accept.

use vasto_client::v1::{Phase, Topology};

use super::Call;
use super::health::places;
use super::wait::Wait;

/// The fence follows once watchers know, and each shard has a living new owner that knows
/// itself to be one: at no instant does nobody accept a key's writes.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    let seen = call.seen;
    let mut done = true;
    if seen.watchers_behind {
        call.wait(Wait::Watchers { version: t.switch_version });
        done = false;
    }
    for shard in 0..t.size() {
        let knows = |store: &str| seen.persisted(store) >= t.switch_version;
        let mut owners = t.current.iter().flat_map(|v| places(v, shard));
        if !owners.any(|a| seen.sound(a).is_some() && knows(&a.store)) {
            call.wait(Wait::NoOwner { shard });
            done = false;
        }
    }
    if done {
        t.set_phase(Phase::Fence);
    }
}
