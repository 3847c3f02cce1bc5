//! DELETING: every replica of the keyspace goes, wherever it is.

use vasto_client::v1::{Drop, Phase, Topology, View};

use super::wait::Wait;
use super::{Call, Observation, Presence};

/// Names everything that is to go. No majority is needed: there is nothing to keep apart any more.
pub(super) fn step(t: &mut Topology, call: &mut Call<'_>) {
    let seen = call.seen;
    t.set_phase(Phase::Deleting);
    t.retain = call.spec.retain;
    let mut all: Vec<Drop> = t
        .views()
        .flat_map(View::places)
        .filter(|p| p.assignment.replica != 0)
        .map(|p| Drop { store: p.assignment.store.clone(), replica: p.assignment.replica, shard: p.shard })
        .chain(t.given_up.iter().map(|g| Drop { store: g.store.clone(), replica: g.replica, shard: g.shard }))
        .collect();
    for (store, report) in seen.reports() {
        all.extend(report.replicas.iter().map(|r| Drop { store: store.to_owned(), replica: r.id, shard: r.shard }));
    }
    for drop in all {
        if t.drops.iter().all(|d| d.replica != drop.replica) {
            t.drops.push(drop);
        }
    }
    for store in holders(t, seen) {
        call.wait(Wait::Deleting { store });
    }
}

/// Living stores that still have the keyspace. Where files are kept, taking in
/// the deletion is all there is to do.
pub(super) fn holders(t: &Topology, seen: &Observation) -> Vec<String> {
    let has = |store: &str| match seen.stores.get(store) {
        Some(Presence::Living(Some(r))) => !(t.retain && t.phase() == Phase::Deleting && r.version >= t.version),
        _ => false,
    };
    seen.stores.keys().filter(|s| has(s)).cloned().collect()
}
