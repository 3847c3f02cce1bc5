//! From what the hub has seen to what the planner is told, for every driver.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use vasto_client::v1::{Phase, Topology};
use vasto_crds::{DeletionPolicy, Keyspace};

use crate::edit;
use crate::hub::{Hub, Seen};
use crate::plan::{Observation, Presence, ReplaceRequest, Room, Spec};

/// Stores are called alike under every driver: by their ordinal.
pub(crate) fn store_name(ordinal: u32) -> String {
    format!("store-{ordinal}")
}

/// The ordinal of a store of this name.
pub(crate) fn ordinal(store: &str) -> Option<u32> {
    store.strip_prefix("store-")?.parse().ok().filter(|n| store_name(*n) == store)
}

/// What is wanted of a keyspace that topologies call by `name`.
pub(crate) fn spec(keyspace: &Keyspace, name: String) -> Spec {
    Spec {
        name,
        uid: keyspace.uid().to_owned(),
        shards: keyspace.spec.shards,
        replication_factor: keyspace.spec.replication_factor,
        paused: keyspace.spec.paused,
        deleting: keyspace.metadata.deletion_timestamp.is_some(),
        retain: keyspace.spec.deletion_policy == DeletionPolicy::Retain,
        spec_json: keyspace.spec.to_json(),
        replace: edit::replacement(keyspace).map(|r| ReplaceRequest {
            store: r.store,
            request: r.request,
            hold: false,
            accept_data_loss: r.accept_data_loss,
        }),
    }
}

/// Since when the stores that the topology names have been waited for, of those never heard.
#[derive(Debug, Default)]
pub(crate) struct Expected(BTreeMap<String, Instant>);

/// What the planner is to know of this keyspace's stores. A store that was never heard is unknown, until
/// it has been waited for as long as one that fell silent.
pub(crate) fn observe(
    state: Option<&Topology>,
    seen: &BTreeMap<String, Seen>,
    lost_after: Duration,
    expected: &mut Expected,
) -> Observation {
    let mut observation = Observation::new(store_name);
    for (name, store) in seen {
        let presence = match store.living {
            true => Presence::Living(store.report.as_ref().map(|r| {
                let mut report = (**r).clone();
                // It matters to the planner only where it differs; it is large.
                let held = store.topology.as_ref().filter(|held| state.is_none_or(|state| ***held != *state));
                report.topology = held.map(|t| (**t).clone());
                Box::new(report)
            })),
            false if store.silent > lost_after => Presence::Lost,
            false => Presence::Away,
        };
        observation.stores.insert(name.clone(), presence);
        observation.heard.insert(name.clone());
        if let Some(disk) = store.disk.filter(|_| store.living) {
            observation.room.insert(name.clone(), Room { free: disk.free_bytes, size: disk.size_bytes });
        }
    }
    let named = state.map(Topology::stores).unwrap_or_default();
    expected.0.retain(|name, _| named.contains(&name.as_str()) && !seen.contains_key(name));
    for name in named.into_iter().filter(|name| !seen.contains_key(*name)) {
        let since = *expected.0.entry(name.to_owned()).or_insert_with(Instant::now);
        if since.elapsed() > lost_after {
            observation.stores.insert(name.to_owned(), Presence::Lost);
        }
    }
    observation
}

/// The last switch that watchers were told of, and when.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Option<(u64, Instant)>);

impl Watchers {
    /// Watchers are told of this state.
    pub(crate) fn told(&mut self, state: &Topology) {
        if state.phase() == Phase::Switch && self.0.is_none_or(|(version, _)| version != state.switch_version) {
            self.0 = Some((state.switch_version, Instant::now()));
        }
    }

    /// Whether some watcher has not said yet that it knows the switch, and `bound` has not passed.
    pub(crate) fn behind(&self, hub: &Hub, state: Option<&Topology>, bound: Duration) -> bool {
        state.filter(|t| t.phase() == Phase::Switch).is_some_and(|t| {
            let told = self.0.filter(|(version, _)| *version == t.switch_version);
            let in_time = told.is_none_or(|(_, at)| at.elapsed() < bound);
            in_time && hub.watchers_behind(&t.name, &t.uid, t.switch_version)
        })
    }
}
