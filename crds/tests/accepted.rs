//! What is accepted: the examples, every field, every form; and that what is
//! written out comes back.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::path::Path;

use proptest::prelude::*;
use vasto_crds::{
    DeletionPolicy, Durability, Keyspace, KeyspaceSpec, KeyspaceStatus, Period, Phase, check, parse, set_condition,
};

fn example(name: &str) -> Vec<Keyspace> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
    parse(&std::fs::read_to_string(path).unwrap(), name).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn every_example_is_accepted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".yaml") {
            assert!(!example(&name).is_empty());
            seen += 1;
        }
    }
    assert!(seen >= 2);
}

#[test]
fn the_small_example_has_the_defaults() {
    let [packages] = &example("keyspace.yaml")[..] else { panic!("one keyspace") };
    assert_eq!((packages.name(), packages.uid()), ("packages", ""));
    assert_eq!(packages.spec, KeyspaceSpec::new(3, 2));
    assert_eq!(packages.spec.store_lost_after, Period::from_secs(600));
    assert_eq!(packages.spec.collection_grace, Period::from_secs(86_400));
    assert_eq!(packages.spec.max_clock_skew, Period::from_secs(10));
    assert_eq!(packages.spec.storage.size.bytes(), 10 << 30);
}

#[test]
fn the_full_example_has_every_field() {
    let [keyspace] = &example("keyspace-full.yaml")[..] else { panic!("one keyspace") };
    let spec = serde_json::to_value(&keyspace.spec).unwrap();
    let schema = vasto_crds::crd().spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
    let fields = &schema.properties.unwrap()["spec"];
    for (name, field) in fields.properties.as_ref().unwrap() {
        assert!(spec.get(name).is_some(), "examples/keyspace-full.yaml lacks {name}");
        if ["storage", "scheduling"].contains(&name.as_str()) {
            for inner in field.properties.as_ref().unwrap().keys() {
                assert!(spec[name].get(inner).is_some(), "examples/keyspace-full.yaml lacks {name}.{inner}");
            }
        }
    }
    let defaults = serde_json::to_value(KeyspaceSpec::default()).unwrap();
    for name in ["durability", "deletionPolicy", "paused", "storeLostAfter", "collectionGrace", "maxClockSkew"] {
        assert_eq!(spec[name], defaults[name], "{name} is said to be the default");
    }
}

#[test]
fn forms() {
    // Several documents, empty ones between, anchors and merges, JSON, nulls, a status that is not for people to say.
    let text = r#"
---
apiVersion: vasto.io/v1alpha1
kind: Keyspace
metadata: {name: a, creationTimestamp: null}
spec: &spec
  shards: 4
  replicationFactor: 2
  image: null
  storage: {size: 1Ti}
status: {phase: Nonsense, shards: 9}
---
---
apiVersion: vasto.io/v1alpha1
kind: Keyspace
metadata: {name: b, namespace: prod, annotations: {note: "1"}}
spec:
  <<: *spec
  storage: null
---
{"apiVersion": "vasto.io/v1alpha1", "kind": "Keyspace", "metadata": {"name": "c"},
 "spec": {"shards": 1, "replicationFactor": 1, "durability": "Synced", "deletionPolicy": "Retain"}}
"#;
    // An anchor lives in its own document only, as YAML has it.
    assert!(parse(text, "t").is_err());
    let text = text.replace("  <<: *spec\n", "  <<: {shards: 4, replicationFactor: 2}\n");
    let [a, b, c] = &parse(&text, "t").unwrap_or_else(|e| panic!("{e}"))[..] else { panic!("three keyspaces") };
    assert_eq!((a.name(), b.name(), c.name()), ("a", "b", "c"));
    assert_eq!((a.spec.storage.size.as_str(), b.spec.storage.size.as_str()), ("1Ti", "10Gi"));
    assert_eq!((&a.status, &a.spec.image, b.spec.shards), (&None, &None, 4));
    assert_eq!((c.spec.durability, c.spec.deletion_policy), (Durability::Synced, DeletionPolicy::Retain));
    assert_eq!(b.metadata.namespace.as_deref(), Some("prod"));
}

#[test]
fn the_whole_resource_comes_back() {
    let mut keyspace = Keyspace::new("packages", KeyspaceSpec::new(3, 2));
    keyspace.metadata.uid = Some("f00d".to_owned());
    keyspace.metadata.generation = Some(7);
    let mut status = KeyspaceStatus {
        phase: Some(Phase::Prepare),
        topology_version: Some(12),
        topology: Some("AAECAw==".to_owned()),
        ..KeyspaceStatus::default()
    };
    status.set_replicas(5, 6);
    set_condition(
        &mut status.conditions,
        "Ready",
        Some(false),
        "Preparing",
        "5 of 6 replicas serve",
        Some(7),
        1_700_000_000_000,
    );
    keyspace.status = Some(status);

    let text = keyspace.to_json();
    assert_eq!(Keyspace::from_json(&text).unwrap(), keyspace);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["apiVersion"], "vasto.io/v1alpha1");
    assert_eq!(json["kind"], "Keyspace");
    assert_eq!(json["metadata"], serde_json::json!({"name": "packages", "uid": "f00d", "generation": 7}));
    assert_eq!(json["status"]["ready"], "5/6");
    assert_eq!(json["status"]["conditions"][0]["lastTransitionTime"], "2023-11-14T22:13:20Z");
    // It can be applied again: what the operator said of it is left out.
    let again = parse(&text, "t").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((&again[0].spec, &again[0].status), (&keyspace.spec, &None));
    check(&keyspace, Some(&keyspace)).unwrap();
}

fn specs() -> impl Strategy<Value = KeyspaceSpec> {
    let period = (1u64..1_000_000_000).prop_map(Period::from_ms);
    (
        (1u32..=1024).prop_flat_map(|shards| (Just(shards), 1..=shards.min(7))),
        ("[1-9][0-9]{0,5}(Mi|Gi|Ti|M|G|T)", proptest::option::of("[a-z]{1,9}")),
        (any::<bool>(), any::<bool>(), any::<bool>()),
        proptest::option::of("[a-z/:.0-9]{1,40}"),
        (period.clone(), period.clone(), period),
        proptest::collection::btree_map("[a-z./]{1,9}", "[a-z0-9]{0,9}", 0..3),
    )
        .prop_map(|((shards, factor), (size, class), (synced, retain, paused), image, periods, selector)| {
            let mut spec = KeyspaceSpec::new(shards, factor);
            spec.storage.size = size.parse().unwrap();
            spec.storage.storage_class_name = class;
            spec.durability = if synced { Durability::Synced } else { Durability::Periodic };
            spec.deletion_policy = if retain { DeletionPolicy::Retain } else { DeletionPolicy::Delete };
            (spec.paused, spec.image) = (paused, image);
            (spec.store_lost_after, spec.collection_grace, spec.max_clock_skew) = periods;
            spec.scheduling.node_selector = selector;
            spec
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// What is in bounds is accepted, as JSON and as YAML, and comes back as it was.
    #[test]
    fn specs_come_back(spec in specs()) {
        prop_assert_eq!(&KeyspaceSpec::from_json(&spec.to_json()).unwrap(), &spec);
        let keyspace = Keyspace::new("packages", spec.clone());
        check(&keyspace, None).unwrap();
        check(&keyspace, Some(&keyspace)).unwrap();
        let yaml = serde_yaml::to_string(&keyspace).unwrap();
        for text in [keyspace.to_json(), yaml] {
            prop_assert_eq!(&parse(&text, "t").unwrap()[0].spec, &spec);
        }
    }

    /// Whatever the text, it is answered, never panicked over.
    #[test]
    fn garbage_is_answered(text in "(apiVersion: vasto.io/v1alpha1\nkind: Keyspace\n)?[-a-z:{}\\[\\],&*!|> \n0-9'\"]{0,80}") {
        let _ = parse(&text, "t");
    }
}
