//! What is refused, and in which words: a table of bad files and bad changes.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use vasto_crds::{Durability, Keyspace, KeyspaceSpec, check, parse};

/// A Keyspace document with this spec and the name packages.
fn document(spec: &str) -> String {
    named("packages", spec)
}

fn named(name: &str, spec: &str) -> String {
    format!("apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: {name}\nspec: {{{spec}}}\n")
}

fn refused(text: &str) -> String {
    match parse(text, "f.yaml") {
        Ok(keyspaces) => panic!("accepted:\n{text}\n{keyspaces:#?}"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn says(text: &str, message: &str) {
    assert_eq!(refused(text), message, "\n{text}");
}

#[test]
fn fields() {
    const PERIOD: &str =
        "must be a length of time above zero, such as 90s, 10m, 24h or 1h30m (units h, m, s and ms, in this order)";
    const SIZE: &str = "must be a whole number with a unit, such as 10Gi (units Mi, Gi, Ti, M, G and T)";
    let table: &[(&str, &str)] = &[
        // Bounds.
        ("shards: 0, replicationFactor: 1", "spec.shards is 0: must be a whole number from 1 to 1024"),
        ("shards: 1025, replicationFactor: 1", "spec.shards is 1025: must be a whole number from 1 to 1024"),
        ("shards: -3, replicationFactor: 1", "spec.shards is -3: must be a whole number from 1 to 1024"),
        ("shards: 9, replicationFactor: 0", "spec.replicationFactor is 0: must be a whole number from 1 to 7"),
        ("shards: 9, replicationFactor: 8", "spec.replicationFactor is 8: must be a whole number from 1 to 7"),
        (
            "shards: 2, replicationFactor: 3",
            "spec.replicationFactor is 3: must not be more than shards: each copy of a shard stands on a \
             store of its own and there is one store per shard; lower replicationFactor or raise shards",
        ),
        // Types.
        (
            "shards: three, replicationFactor: 1",
            "spec.shards is \"three\", a string: must be a whole number from 1 to 1024",
        ),
        ("shards: '3', replicationFactor: 1", "spec.shards is \"3\", a string: must be a whole number from 1 to 1024"),
        (
            "shards: 2.5, replicationFactor: 1",
            "spec.shards is 2.5, a number with a fraction: must be a whole number from 1 to 1024",
        ),
        ("shards: [3], replicationFactor: 1", "spec.shards is [3], a list: must be a whole number from 1 to 1024"),
        (
            "shards: 9999999999, replicationFactor: 1",
            "spec.shards is 9999999999: must be a whole number from 1 to 1024",
        ),
        ("shards: 3, replicationFactor: 2, paused: 1", "spec.paused is 1, a whole number: must be true or false"),
        ("shards: 3, replicationFactor: 2, paused: yes", "spec.paused is \"yes\", a string: must be true or false"),
        (
            "shards: 3, replicationFactor: 2, storage: 10Gi",
            "spec.storage is \"10Gi\", a string: must be a mapping with size, storageClassName",
        ),
        (
            "shards: 3, replicationFactor: 2, durability: Always",
            "spec.durability is \"Always\": must be Periodic or Synced",
        ),
        (
            "shards: 3, replicationFactor: 2, deletionPolicy: keep",
            "spec.deletionPolicy is \"keep\": must be Delete or Retain",
        ),
        // Missing.
        ("replicationFactor: 2", "spec.shards is missing: must be a whole number from 1 to 1024"),
        ("shards: 3", "spec.replicationFactor is missing: must be a whole number from 1 to 7"),
        ("shards: , replicationFactor: 2", "spec.shards is missing: must be a whole number from 1 to 1024"),
        // Unknown.
        ("shards: 3, replicationFactor: 2, shrads: 3", "spec.shrads is not a field: did you mean shards?"),
        (
            "shards: 3, replicationFactor: 2, replication_factor: 3",
            "spec.replication_factor is not a field: did you mean replicationFactor?",
        ),
        (
            "shards: 3, replicationFactor: 2, storelostafter: 1m",
            "spec.storelostafter is not a field: did you mean storeLostAfter?",
        ),
        ("shards: 3, replicationFactor: 2, name: x", "spec.name is not a field: it belongs at metadata.name"),
        ("shards: 3, replicationFactor: 2, size: 1Gi", "spec.size is not a field: it belongs at spec.storage.size"),
        (
            "shards: 3, replicationFactor: 2, tolerations: []",
            "spec.tolerations is not a field: it belongs at spec.scheduling.tolerations",
        ),
        (
            "shards: 3, replicationFactor: 2, storage: {sise: 1Gi}",
            "spec.storage.sise is not a field: did you mean size?",
        ),
        (
            "shards: 3, replicationFactor: 2, compression: zstd",
            "spec.compression is not a field: spec has collectionGrace, deletionPolicy, durability, image, maxClockSkew, \
             paused, replicationFactor, resources, scheduling, shards, storage, storeLostAfter",
        ),
        (
            "shards: 3, replicationFactor: 2, scheduling: {tolerations: [{keys: a}]}",
            "spec.scheduling.tolerations[0].keys is not a field: did you mean key?",
        ),
        // Lengths of time.
        ("shards: 3, replicationFactor: 2, storeLostAfter: 0s", &format!("spec.storeLostAfter is \"0s\": {PERIOD}")),
        ("shards: 3, replicationFactor: 2, collectionGrace: 1d", &format!("spec.collectionGrace is \"1d\": {PERIOD}")),
        ("shards: 3, replicationFactor: 2, maxClockSkew: -5s", &format!("spec.maxClockSkew is \"-5s\": {PERIOD}")),
        ("shards: 3, replicationFactor: 2, maxClockSkew: ''", &format!("spec.maxClockSkew is \"\": {PERIOD}")),
        (
            "shards: 3, replicationFactor: 2, storeLostAfter: 600",
            &format!("spec.storeLostAfter is 600, a whole number: {PERIOD} (in quotes, to make it a string)"),
        ),
        // Sizes.
        ("shards: 3, replicationFactor: 2, storage: {size: 10GB}", &format!("spec.storage.size is \"10GB\": {SIZE}")),
        ("shards: 3, replicationFactor: 2, storage: {size: '10'}", &format!("spec.storage.size is \"10\": {SIZE}")),
        ("shards: 3, replicationFactor: 2, storage: {size: 0Gi}", &format!("spec.storage.size is \"0Gi\": {SIZE}")),
        // In a pod's own terms.
        (
            "shards: 3, replicationFactor: 2, resources: {limits: {memory: true}}",
            "spec.resources.limits.memory is true, a boolean: must be a quantity such as 2, 500m or 4Gi",
        ),
        (
            "shards: 3, replicationFactor: 2, scheduling: {nodeSelector: {zone: 1}}",
            "spec.scheduling.nodeSelector.zone is 1, a whole number: must be a string (in quotes, to make it a string)",
        ),
        (
            "shards: 3, replicationFactor: 2, scheduling: {topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone}]}",
            "spec.scheduling.topologySpreadConstraints[0].whenUnsatisfiable is missing: must be a string",
        ),
        (
            "shards: 3, replicationFactor: 2, image: 'a b'",
            "spec.image is \"a b\": must be an image reference without spaces, such as ghcr.io/vasto-io/vasto:0.1.0; leave \
             the field out for the image that was current when the keyspace was made",
        ),
    ];
    for (spec, message) in table {
        says(&document(spec), &format!("f.yaml: document 1, keyspace packages: {message}"));
    }
}

#[test]
fn everything_at_once() {
    says(
        &format!(
            "{}---\n{}",
            document("shards: 0, replicationFactor: 9, maxClockSkew: soon"),
            named("other", "shards: 3, replicationFactor: 2, pause: true")
        ),
        "f.yaml: document 1, keyspace packages: spec.shards is 0: must be a whole number from 1 to 1024\n\
         f.yaml: document 1, keyspace packages: spec.replicationFactor is 9: must be a whole number from 1 to 7\n\
         f.yaml: document 1, keyspace packages: spec.maxClockSkew is \"soon\": must be a length of time above zero, such as \
         90s, 10m, 24h or 1h30m (units h, m, s and ms, in this order)\n\
         f.yaml: document 2, keyspace other: spec.pause is not a field: did you mean paused?",
    );
}

#[test]
fn names() {
    const RIGHT: &str = "must be at most 40 characters, only lower-case letters, digits and '-', beginning with a letter \
                         and ending with a letter or digit: pods, services and labels are named after it with something \
                         added, and Kubernetes allows those 63";
    let long = "a".repeat(41);
    for name in ["Packages", "my_packages", "1st", "-a", "a-", "a.b", "päckchen", long.as_str()] {
        says(
            &named(name, "shards: 3, replicationFactor: 2"),
            &format!("f.yaml: document 1, keyspace {name}: metadata.name is \"{name}\": {RIGHT}"),
        );
    }
    says(
        &named("''", "shards: 3, replicationFactor: 2"),
        &format!("f.yaml: document 1, keyspace : metadata.name is \"\": {RIGHT}"),
    );
    says(
        &named("7", "shards: 3, replicationFactor: 2"),
        &format!("f.yaml: document 1: metadata.name is 7, a whole number: {RIGHT} (in quotes, to make it a string)"),
    );
    says(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nspec: {shards: 3, replicationFactor: 2}",
        "f.yaml: document 1: metadata is missing: must be a mapping with at least name",
    );
    says(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {labels: {a: b}}\nspec: {shards: 3, replicationFactor: 2}",
        &format!("f.yaml: document 1: metadata.name is missing: {RIGHT}"),
    );
    assert!(parse(&named(&"a".repeat(40), "shards: 3, replicationFactor: 2"), "f.yaml").is_ok());
}

#[test]
fn documents() {
    let good = document("shards: 3, replicationFactor: 2");
    const EMPTY: &str = "f.yaml: holds no Keyspace: write at least one document with apiVersion: vasto.io/v1alpha1, kind: \
                         Keyspace, metadata.name, spec.shards and spec.replicationFactor";
    says("", EMPTY);
    says("# nothing but words\n---\n---\n", EMPTY);
    says(
        &format!("{good}---\n{good}"),
        "f.yaml: document 2, keyspace packages: metadata.name is \"packages\" again: document 1 has a keyspace of this name; \
         give one of them another name",
    );
    says(
        &good.replace("kind: Keyspace", "kind: Deployment"),
        "f.yaml: document 1, keyspace packages: kind is \"Deployment\": this version of vasto knows only Keyspace",
    );
    says(
        &good.replace("kind: Keyspace", "kind: keyspace"),
        "f.yaml: document 1, keyspace packages: kind is \"keyspace\": did you mean Keyspace?",
    );
    says(
        &good.replace("v1alpha1", "v2"),
        "f.yaml: document 1, keyspace packages: apiVersion is \"vasto.io/v2\": this version of vasto knows only vasto.io/v1alpha1",
    );
    says(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n",
        "f.yaml: document 1, keyspace x: apiVersion is \"apps/v1\": this version of vasto knows only vasto.io/v1alpha1\n\
         f.yaml: document 1, keyspace x: kind is \"Deployment\": this version of vasto knows only Keyspace",
    );
    says(
        "metadata: {name: x}",
        "f.yaml: document 1, keyspace x: apiVersion is missing: must be vasto.io/v1alpha1\n\
         f.yaml: document 1, keyspace x: kind is missing: must be Keyspace",
    );
    says(
        "shards: 3\n---\n- a\n",
        "f.yaml: document 1: apiVersion is missing: must be vasto.io/v1alpha1\n\
         f.yaml: document 1: kind is missing: must be Keyspace\n\
         f.yaml: document 2: is [\"a\"], a list: must be a mapping with apiVersion, kind, metadata and spec",
    );
    says(
        &format!("{good}shards: 3\n"),
        "f.yaml: document 1, keyspace packages: shards is not a field: it belongs at spec.shards",
    );
    says(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {name: x}\n",
        "f.yaml: document 1, keyspace x: spec is missing: must be a mapping with at least \
         replicationFactor, shards",
    );
    for (text, start) in [
        (
            "spec: {shards: 3, shards: 4}",
            "f.yaml: document 1: can't be read as YAML (spec: duplicate entry with key \"shards\"",
        ),
        (
            "a: b: c\n",
            "f.yaml: document 1: can't be read as YAML (mapping values are not allowed in this context at line 1 column 5",
        ),
        ("1: x\n", "f.yaml: document 1: has the key 1, which is not a string: "),
        ("a: !secret x\n", "f.yaml: document 1: has the tag !secret, which means nothing here: "),
        ("a: .nan\n", "f.yaml: document 1: holds .nan, which is not a number that JSON knows: "),
    ] {
        let said = refused(text);
        assert!(said.starts_with(start), "{said}\nshould start with\n{start}");
    }
}

fn keyspace(spec: KeyspaceSpec) -> Keyspace {
    Keyspace::new("packages", spec)
}

#[test]
fn changes() {
    let mut spec = KeyspaceSpec::new(3, 2);
    spec.storage.storage_class_name = Some("fast".to_owned());
    let old = keyspace(spec.clone());

    // What may change.
    let mut new = spec.clone();
    (new.shards, new.replication_factor, new.durability, new.paused) = (5, 3, Durability::Synced, true);
    new.storage.size = "20Gi".parse().unwrap();
    new.image = Some("vasto:2".to_owned());
    check(&keyspace(new), Some(&old)).unwrap();
    // 10240Mi is 10Gi.
    let mut new = spec.clone();
    new.storage.size = "10240Mi".parse().unwrap();
    check(&keyspace(new), Some(&old)).unwrap();

    let refused = |change: &dyn Fn(&mut KeyspaceSpec)| {
        let mut new = spec.clone();
        change(&mut new);
        check(&keyspace(new), Some(&old)).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&|s| s.storage.size = "10239Mi".parse().unwrap()),
        "keyspace packages: spec.storage.size is \"10239Mi\": must not shrink, since a volume can only grow: it was 10Gi; write \
         10Gi or more"
    );
    let class = "must not change, since volumes stay in the class they were made in: make another keyspace and copy the data \
                 with vasto dump and vasto load";
    assert_eq!(
        refused(&|s| s.storage.storage_class_name = Some("slow".to_owned())),
        format!("keyspace packages: spec.storage.storageClassName is \"slow\": {class}")
    );
    assert_eq!(
        refused(&|s| s.storage.storage_class_name = None),
        format!("keyspace packages: spec.storage.storageClassName is unset: {class}")
    );
    // And what may not stand at all, whatever was before.
    assert_eq!(
        refused(&|s| s.shards = 1),
        "keyspace packages: spec.replicationFactor is 2: must not be more than shards: each copy of a shard stands \
         on a store of its own and there is one store per shard; lower replicationFactor or raise shards"
    );
    assert_eq!(
        refused(&|s| s.max_clock_skew = vasto_crds::Period::from_ms(0)),
        "keyspace packages: spec.maxClockSkew is \"0s\": must be a length of time above zero, such as 90s, 10m, 24h or 1h30m \
         (units h, m, s and ms, in this order)"
    );
    assert!(check(&Keyspace::new("No", spec.clone()), None).is_err());
}

/// Rules are asked beside one another, as on an apiserver: one broken rule hides no other.
#[test]
fn parent_rules_are_asked_too() {
    let said = refused(&document("shards: 3, replicationFactor: 8"));
    assert_eq!(said.lines().count(), 2, "{said}");
}
