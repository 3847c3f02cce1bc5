//! Objects as they are compared: without what differs from run to run.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, ListParams};
use kube::{Resource, ResourceExt};
use serde_json::{Map, Value, json};
use vasto_crds::Keyspace;

use crate::bench::{Bench, placement, topology};

/// Only what Vasto made.
const OURS: &str = "vasto.io/keyspace";

/// Every object that the keyspaces of a namespace own, by kind and name, with pods and claims.
pub async fn objects(bench: &Bench) -> Map<String, Value> {
    let mut all = Map::new();
    list::<StatefulSet>(bench, &mut all).await;
    list::<Service>(bench, &mut all).await;
    list::<ServiceAccount>(bench, &mut all).await;
    list::<PodDisruptionBudget>(bench, &mut all).await;
    list::<PersistentVolumeClaim>(bench, &mut all).await;
    list::<Pod>(bench, &mut all).await;
    all
}

async fn list<K>(bench: &Bench, all: &mut Map<String, Value>)
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(bench.client.clone(), &bench.namespace);
    for object in api.list(&ListParams::default().labels(OURS)).await.unwrap() {
        let name = format!("{} {}", K::kind(&()), object.name_any());
        let mut value = serde_json::to_value(&object).unwrap();
        value["apiVersion"] = K::api_version(&()).into();
        value["kind"] = K::kind(&()).into();
        all.insert(name, normal(value, &bench.namespace));
    }
}

fn drop_all(value: &mut Value, keys: &[&str]) {
    if let Some(object) = value.as_object_mut() {
        keys.iter().for_each(|key| drop(object.remove(*key)));
    }
}

/// One object without what the API server adds, in an order of its own.
fn normal(mut value: Value, namespace: &str) -> Value {
    let owner = value.pointer("/metadata/ownerReferences/0/uid").and_then(Value::as_str).map(str::to_owned);
    drop_all(&mut value, &["status"]);
    let server = ["uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "generateName"];
    drop_all(&mut value["metadata"], &server);
    // Claims that go with the StatefulSet get owners of their own, in no order.
    if let Some(owners) = value.pointer_mut("/metadata/ownerReferences").and_then(Value::as_array_mut) {
        owners.sort_by_key(|o| o["kind"].to_string() + &o["name"].to_string());
        owners.iter_mut().for_each(|o| o["uid"] = "UID".into());
    }
    if let Some(annotations) = value.pointer_mut("/metadata/annotations") {
        drop_all(annotations, &["vasto.io/term"]);
        if let Some(hash) = annotations.get_mut("vasto.io/template") {
            *hash = "HASH".into();
        }
    }
    for annotations in ["/metadata/annotations", "/spec/volumeClaimTemplates/0/metadata/annotations"] {
        if let Some(uid) = value.pointer_mut(annotations).and_then(|a| a.get_mut("vasto.io/made-for")) {
            *uid = "UID".into();
        }
    }
    match value["kind"].as_str().unwrap_or_default() {
        "Service" => {
            if value["spec"]["clusterIP"] != "None" {
                drop_all(&mut value["spec"], &["clusterIP"]);
            }
            drop_all(&mut value["spec"], &["clusterIPs"]);
        }
        "PersistentVolumeClaim" => drop_all(&mut value["spec"], &["volumeName"]),
        "Pod" => value = pod(&value),
        _ => {}
    }
    let mut text = value.to_string().replace(namespace, "NAMESPACE");
    if let Some(uid) = owner.or_else(|| argument_uid(&text)) {
        text = text.replace(&uid, "UID");
    }
    if let Some(uid) = argument_uid(&text) {
        text = text.replace(&uid, "UID");
    }
    sorted(serde_json::from_str(&text).unwrap())
}

fn argument_uid(text: &str) -> Option<String> {
    let rest = text.split("--uid=").nth(1)?;
    rest.split('"').next().map(str::to_owned)
}

/// Of a pod only what the operator decides on.
fn pod(value: &Value) -> Value {
    let mut labels = value["metadata"]["labels"].clone();
    drop_all(&mut labels, &["controller-revision-hash"]);
    let container = &value["spec"]["containers"][0];
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": value["metadata"]["name"], "labels": labels, "annotations": value["metadata"]["annotations"],
        },
        "spec": {"image": container["image"], "args": container["args"], "resources": container["resources"]},
    })
}

/// With the keys of all mappings in order.
pub fn sorted(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut entries: Vec<_> = object.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// A keyspace without versions, times and ids: what it says of itself at rest, and where its shards are.
pub fn keyspace(keyspace: &Keyspace) -> Value {
    let status = keyspace.status.clone().unwrap_or_default();
    let topology = topology(keyspace);
    let mut conditions: Vec<Value> = status.conditions.iter().map(|c| json!([c.type_, c.status, c.reason])).collect();
    // Their order is that in which they were first said.
    conditions.sort_by_key(ToString::to_string);
    let stores: Vec<Value> = status
        .stores
        .iter()
        .map(|s| json!([s.name, s.address, s.state.map(|s| format!("{s:?}")), s.replicas, s.message]))
        .collect();
    let value = json!({
        "spec": keyspace.spec,
        "annotations": keyspace.metadata.annotations,
        "finalizers": keyspace.metadata.finalizers,
        "status": {
            "phase": status.phase, "shards": status.shards, "replicationFactor": status.replication_factor,
            "ready": status.ready, "selector": status.selector, "image": status.image, "progress": status.progress,
            "conditions": conditions, "stores": stores,
        },
        "topology": {
            "name": topology.name, "phase": topology.phase().as_str_name(), "placement": placement(&topology),
            "drops": topology.drops.len(), "clean": topology.clean.len(), "next": topology.next.is_some(),
            "previous": topology.previous.is_some(), "replace": topology.replace.is_some(), "spec": topology.spec,
        },
    });
    let namespace = keyspace.metadata.namespace.as_deref().unwrap_or_default();
    sorted(serde_json::from_str(&value.to_string().replace(namespace, "NAMESPACE")).unwrap())
}
