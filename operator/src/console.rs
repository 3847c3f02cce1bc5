//! What the operator's console draws: each keyspace with its views, the replicas as their stores last reported
//! them, and its status, as one JSON value. `console.html` is the page; it asks for the value each second.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use vasto_client::v1::{ReplicaReport, Topology, View};
use vasto_crds::Keyspace;

use crate::hub::{Hub, Leader, Seen};

/// The page: whole, without anything to be fetched from elsewhere.
pub const PAGE: &str = include_str!("console.html");

/// The console of an operator, which may not run yet. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Console(Arc<OnceLock<Hub>>);

impl Console {
    pub(crate) fn attach(&self, hub: Hub) {
        let _ = self.0.set(hub);
    }

    /// The operator that leads (`host:port`, if it is known), where this one doesn't.
    pub fn leader_elsewhere(&self) -> Option<Option<String>> {
        match self.0.get()?.leads() {
            Leader::Here => None,
            Leader::Elsewhere(address) => Some(address),
        }
    }

    /// All that there is to draw; `None`: the operator does not run yet.
    pub fn state(&self) -> Option<Value> {
        let hub = self.0.get()?;
        let keyspace = |keyspace: &Arc<Keyspace>| {
            let uid = keyspace.uid();
            shown(keyspace, hub.committed(uid).as_deref(), &hub.look(uid))
        };
        let leader = self.leader_elsewhere().map(|address| address.unwrap_or_else(|| "an unknown place".to_owned()));
        Some(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "leader": leader,
            "keyspaces": hub.described().iter().map(keyspace).collect::<Vec<_>>(),
        }))
    }
}

fn shown(keyspace: &Keyspace, topology: Option<&Topology>, seen: &BTreeMap<String, Seen>) -> Value {
    let status = keyspace.status.clone().unwrap_or_default();
    let own = seen.iter().filter_map(|(store, s)| Some((store, s.report.as_ref()?)));
    let replicas = own.flat_map(|(store, report)| report.replicas.iter().map(move |r| replica(store, r)));
    let stores = status.stores.iter().map(|store| {
        let disk = seen.get(&store.name).and_then(|s| s.disk);
        let mut value = json!(store);
        value["disk"] = json!(disk.map(|d| json!({ "sizeBytes": d.size_bytes, "freeBytes": d.free_bytes })));
        value
    });
    json!({
        "name": topology.map_or_else(|| full_name(keyspace), |t| t.name.clone()),
        "uid": keyspace.uid(),
        "spec": { "shards": keyspace.spec.shards, "replicationFactor": keyspace.spec.replication_factor },
        "phase": crate::status::phase(keyspace, topology).as_str(),
        "topologyVersion": topology.map(|t| t.version),
        "progress": status.progress,
        "conditions": status.conditions,
        "previous": topology.and_then(|t| t.previous.as_ref()).map(view),
        "current": topology.and_then(|t| t.current.as_ref()).map(view),
        "next": topology.and_then(|t| t.next.as_ref()).map(view),
        "replicas": replicas.collect::<Vec<_>>(),
        "stores": stores.collect::<Vec<_>>(),
    })
}

fn full_name(keyspace: &Keyspace) -> String {
    let namespace = keyspace.metadata.namespace.as_deref().unwrap_or_default();
    vasto_client::topology::qualified(namespace, keyspace.name())
}

fn view(view: &View) -> Value {
    let shards: Vec<Vec<Value>> = view
        .shards
        .iter()
        .map(|shard| {
            let place = |a: &vasto_client::v1::Assignment| {
                let id = (a.replica != 0).then(|| format!("{:016x}", a.replica));
                json!({ "store": a.store, "replica": id, "serving": a.serving })
            };
            shard.replicas.iter().map(place).collect()
        })
        .collect();
    json!({ "shards": shards })
}

fn replica(store: &str, r: &ReplicaReport) -> Value {
    // Of those it follows, the one it is furthest behind: its lag is what a client may miss there.
    let lag = r.sources.iter().map(|s| s.lag).filter(|lag| *lag != u64::MAX).max().unwrap_or_default();
    let copied: u64 = r.sources.iter().map(|s| s.records).sum();
    let to_copy: u64 = r.sources.iter().map(|s| s.records_total.max(s.records)).sum();
    json!({
        "id": format!("{:016x}", r.id),
        "store": store,
        "shard": r.shard,
        "born": r.born,
        "fault": r.fault,
        "full": r.full,
        "records": r.records,
        "bytes": r.bytes,
        "lag": lag,
        "copied": copied,
        "copyTotal": to_copy,
        "todo": r.todo_records,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::sync::CancellationToken;
    use vasto_client::v1::{Assignment, Phase, Shard};

    #[test]
    fn all_that_is_committed_and_described_is_shown() {
        let console = Console::default();
        assert_eq!(console.state(), None);
        let hub = Hub::new(CancellationToken::new());
        console.attach(hub.clone());
        assert_eq!(console.state().unwrap()["keyspaces"], json!([]));

        let document = "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {name: orders}\n\
                        spec: {shards: 2, replicationFactor: 1}\n";
        let mut keyspace = vasto_crds::parse(document, "here").unwrap().remove(0);
        keyspace.metadata.uid = Some("u".to_owned());
        hub.describe(Arc::new(keyspace.clone()));
        let place = |store: &str, replica| Shard {
            replicas: vec![Assignment { store: store.to_owned(), replica, serving: true }],
        };
        let topology = Topology {
            uid: "u".to_owned(),
            name: "orders".to_owned(),
            version: 7,
            phase: Phase::Prepare.into(),
            current: Some(View { shards: vec![place("store-0", 0xab)] }),
            next: Some(View { shards: vec![place("store-0", 0xab), place("store-1", 0)] }),
            ..Topology::default()
        };
        hub.commit(Arc::new(topology));
        let state = console.state().unwrap();
        let shown = &state["keyspaces"][0];
        assert_eq!((&shown["name"], &shown["phase"]), (&json!("orders"), &json!("Prepare")));
        assert_eq!(shown["current"]["shards"][0][0]["replica"], "00000000000000ab");
        assert_eq!(shown["next"]["shards"][1][0], json!({ "store": "store-1", "replica": null, "serving": true }));
        assert_eq!(shown["previous"], Value::Null);
        assert_eq!(state["leader"], Value::Null);

        // Who doesn't lead knows nothing of it that is still true.
        hub.set_leader(Leader::Elsewhere(Some("10.0.0.7:8278".to_owned())));
        let state = console.state().unwrap();
        assert_eq!((&state["leader"], &state["keyspaces"]), (&json!("10.0.0.7:8278"), &json!([])));
        hub.set_leader(Leader::Here);
        hub.describe(Arc::new(keyspace));
        hub.forget("u");
        assert_eq!(console.state().unwrap()["keyspaces"], json!([]));
    }
}
