//! Every object that a keyspace is made of, as it stands in the API server, against what is
//! written in golden/: `VASTO_BLESS=1` writes it anew.

use std::path::Path;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, ListParams};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use tonic::codegen::http::Request;
use vasto_crds::{Keyspace, parse};
use vasto_tests::control_plane::create;

use crate::bench::Bench;
use crate::normal;

fn example(name: &str) -> Keyspace {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
    parse(&std::fs::read_to_string(path).unwrap(), name).unwrap().remove(0)
}

async fn compare(label: &str, keyspace: Keyspace) {
    let bench = Bench::new(label).await;
    let operator = bench.operator();
    let name = keyspace.name().to_owned();
    create::<Keyspace>(
        &bench.client,
        Some(&bench.namespace),
        json!({"metadata": {"name": name}, "spec": keyspace.spec}),
    )
    .await;
    let (shards, copies) = (keyspace.spec.shards, keyspace.spec.replication_factor);
    bench
        .wait("the keyspace is ready", async || {
            crate::bench::settled(&bench.keyspaces().get(&name).await.unwrap(), shards, copies)
        })
        .await;
    let objects = normal::objects(&bench).await;
    // One pod and one claim stand for all.
    let mut kept = objects.clone();
    kept.retain(|key, _| !["Pod ", "PersistentVolumeClaim "].iter().any(|k| key.starts_with(k)) || key.ends_with("-0"));
    let count = |kind: &str| objects.keys().filter(|k| k.starts_with(kind)).count() as u32;
    assert_eq!((count("Pod "), count("PersistentVolumeClaim ")), (shards, shards));
    let text: String = kept.values().map(|o| format!("---\n{}", serde_yaml::to_string(o).unwrap())).collect();
    let text = format!("# Made by tests/apiserver/objects.rs; VASTO_BLESS=1 writes it anew.\n{text}");

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("apiserver/golden/{label}.yaml"));
    if std::env::var_os("VASTO_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = written.lines().zip(text.lines()).find(|(a, b)| a != b);
    assert!(
        written == text,
        "{} is not what the operator makes; first at {differs:?}. If it is meant, run the test with VASTO_BLESS=1",
        path.display()
    );
    managed::<StatefulSet>(&bench).await;
    managed::<Service>(&bench).await;
    managed::<ServiceAccount>(&bench).await;
    managed::<PodDisruptionBudget>(&bench).await;
    dry_run(&bench, &kept).await;
    operator.tap.clean();
    println!("{label}: {} objects", objects.len());
}

/// One field manager, by server-side apply; and each is owned by the keyspace, as its controller.
async fn managed<K>(bench: &Bench)
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(bench.client.clone(), &bench.namespace);
    let all = api.list(&ListParams::default().labels("vasto.io/keyspace")).await.unwrap();
    assert!(!all.items.is_empty());
    for object in all {
        let name = format!("{} {}", K::kind(&()), object.name_any());
        let ours = object.managed_fields().iter().filter(|m| m.subresource.is_none());
        for entry in ours {
            let said = (entry.manager.as_deref(), entry.operation.as_deref());
            assert_eq!(said, (Some("vasto-operator"), Some("Apply")), "{name}");
        }
        let [owner] = object.owner_references() else { panic!("{name} has not one owner") };
        assert_eq!((owner.kind.as_str(), owner.controller), ("Keyspace", Some(true)), "{name}");
    }
}

/// A fresh API server would take each of them, and knows all of their fields.
async fn dry_run(bench: &Bench, objects: &serde_json::Map<String, Value>) {
    let elsewhere = format!("{}-dry", bench.namespace);
    bench.plane.namespace(&elsewhere).await;
    for (name, object) in objects.iter().filter(|(name, _)| !name.starts_with("Pod ")) {
        let text = object.to_string().replace("NAMESPACE", &elsewhere);
        let mut object: Value = serde_json::from_str(&text).unwrap();
        object["metadata"].as_object_mut().unwrap().remove("ownerReferences");
        object["metadata"].as_object_mut().unwrap().remove("finalizers");
        let namespace = Some(elsewhere.as_str());
        let path = match object["kind"].as_str().unwrap() {
            "StatefulSet" => StatefulSet::url_path(&(), namespace),
            "Service" => Service::url_path(&(), namespace),
            "ServiceAccount" => ServiceAccount::url_path(&(), namespace),
            "PodDisruptionBudget" => PodDisruptionBudget::url_path(&(), namespace),
            "PersistentVolumeClaim" => k8s_openapi::api::core::v1::PersistentVolumeClaim::url_path(&(), namespace),
            other => panic!("{other} is new: it needs a dry run too"),
        };
        let request = Request::post(format!("{path}?dryRun=All&fieldValidation=Strict"))
            .header("content-type", "application/json")
            .body(serde_json::to_vec(&object).unwrap())
            .unwrap();
        let made: Result<Value, _> = bench.client.request(request).await;
        made.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_small_example() {
    compare("small", example("keyspace.yaml")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_example_with_every_field() {
    let mut keyspace = example("keyspace-full.yaml");
    // A class of this cluster's.
    keyspace.spec.storage.storage_class_name = Some("standard".to_owned());
    compare("full", keyspace).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_keyspace_without_spare_copies() {
    let mut keyspace = example("keyspace.yaml");
    (keyspace.spec.shards, keyspace.spec.replication_factor) = (2, 1);
    keyspace.spec.deletion_policy = vasto_crds::DeletionPolicy::Retain;
    compare("one", keyspace).await;
}
