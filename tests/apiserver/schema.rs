//! The Keyspace resource on a real API server: what it takes, what it refuses and in which
//! words, and what kubectl makes of it.

use std::path::Path;
use std::sync::Arc;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use tonic::codegen::http::Request;
use vasto_crds::{Keyspace, KeyspaceSpec};
use vasto_tests::control_plane::ControlPlane;

use crate::bench::{fresh_namespace, plane};

/// A namespace without an operator.
struct Place {
    plane: Arc<ControlPlane>,
    namespace: String,
}

impl Place {
    async fn new(label: &str) -> Self {
        let plane = plane().await;
        let namespace = fresh_namespace(label);
        plane.namespace(&namespace).await;
        Self { plane, namespace }
    }

    fn api(&self) -> Api<Keyspace> {
        Api::namespaced(self.plane.client(), &self.namespace)
    }

    /// Creates it as kubectl does, with unknown fields refused; or says why not.
    async fn post(&self, object: &Value) -> Result<Value, String> {
        let path = format!("/apis/vasto.io/v1alpha1/namespaces/{}/keyspaces?fieldValidation=Strict", self.namespace);
        let request = Request::post(path).header("content-type", "application/json");
        let request = request.body(serde_json::to_vec(object).unwrap()).unwrap();
        self.plane.client().request(request).await.map_err(|e| e.to_string())
    }

    async fn change(&self, name: &str, patch: Value) -> Result<Keyspace, String> {
        self.api().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(|e| e.to_string())
    }

    fn kubectl(&self, args: &[&str]) -> (i32, String, String) {
        self.plane.kubectl(&[&["-n", &self.namespace], args].concat())
    }
}

fn document(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "vasto.io/v1alpha1", "kind": "Keyspace", "metadata": {"name": name}, "spec": spec})
}

/// A spec in YAML's short form, as people write it.
fn spec(text: &str) -> Value {
    serde_yaml::from_str(&format!("{{{text}}}")).unwrap()
}

const PERIOD: &str = "must be a length of time above zero, such as 90s, 10m, 24h or 1h30m";
const SIZE: &str = "must be a whole number with a unit, such as 10Gi";

/// What is refused, and what the API server says.
const REFUSED: [(&str, &str); 36] = [
    // Bounds.
    ("shards: 0, replicationFactor: 1", "must be a whole number from 1 to 1024"),
    ("shards: 1025, replicationFactor: 1", "spec.shards"),
    ("shards: -3, replicationFactor: 1", "spec.shards"),
    ("shards: 9, replicationFactor: 0", "must be a whole number from 1 to 7"),
    ("shards: 9, replicationFactor: 8", "spec.replicationFactor"),
    ("shards: 2, replicationFactor: 3", "lower replicationFactor or raise shards"),
    // Types.
    ("shards: three, replicationFactor: 1", "spec.shards in body must be of type integer"),
    ("shards: '3', replicationFactor: 1", "spec.shards in body must be of type integer"),
    ("shards: 2.5, replicationFactor: 1", "spec.shards"),
    ("shards: [3], replicationFactor: 1", "spec.shards in body must be of type integer"),
    ("shards: 9999999999, replicationFactor: 1", "spec.shards"),
    ("shards: 3, replicationFactor: 2, paused: 1", "spec.paused in body must be of type boolean"),
    ("shards: 3, replicationFactor: 2, paused: 'yes'", "spec.paused in body must be of type boolean"),
    ("shards: 3, replicationFactor: 2, storage: 10Gi", "spec.storage in body must be of type object"),
    ("shards: 3, replicationFactor: 2, durability: Always", "supported values: \"Periodic\", \"Synced\""),
    ("shards: 3, replicationFactor: 2, deletionPolicy: keep", "supported values: \"Delete\", \"Retain\""),
    // Missing.
    ("replicationFactor: 2", "spec.shards: Required value"),
    ("shards: 3", "spec.replicationFactor: Required value"),
    // Unknown.
    ("shards: 3, replicationFactor: 2, shrads: 3", "unknown field \"spec.shrads\""),
    ("shards: 3, replicationFactor: 2, replication_factor: 3", "unknown field \"spec.replication_factor\""),
    ("shards: 3, replicationFactor: 2, name: x", "unknown field \"spec.name\""),
    ("shards: 3, replicationFactor: 2, storage: {sise: 1Gi}", "unknown field \"spec.storage.sise\""),
    (
        "shards: 3, replicationFactor: 2, scheduling: {tolerations: [{keys: a}]}",
        "unknown field \"spec.scheduling.tolerations[0].keys\"",
    ),
    // Lengths of time.
    ("shards: 3, replicationFactor: 2, storeLostAfter: 0s", PERIOD),
    ("shards: 3, replicationFactor: 2, collectionGrace: 1d", PERIOD),
    ("shards: 3, replicationFactor: 2, maxClockSkew: -5s", PERIOD),
    ("shards: 3, replicationFactor: 2, maxClockSkew: ''", PERIOD),
    ("shards: 3, replicationFactor: 2, storeLostAfter: 600", "spec.storeLostAfter in body must be of type string"),
    // Sizes.
    ("shards: 3, replicationFactor: 2, storage: {size: 10GB}", SIZE),
    ("shards: 3, replicationFactor: 2, storage: {size: '10'}", SIZE),
    ("shards: 3, replicationFactor: 2, storage: {size: 0Gi}", SIZE),
    // In a pod's own terms.
    ("shards: 3, replicationFactor: 2, resources: {limits: {memory: true}}", "spec.resources.limits.memory"),
    ("shards: 3, replicationFactor: 2, scheduling: {nodeSelector: {zone: 1}}", "spec.scheduling.nodeSelector.zone"),
    (
        "shards: 3, replicationFactor: 2, scheduling: {topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone}]}",
        "whenUnsatisfiable: Required value",
    ),
    ("shards: 3, replicationFactor: 2, image: 'a b'", "must be an image reference without spaces"),
    ("shards: 3, replicationFactor: 2, image: ''", "must be an image reference without spaces"),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_refused_in_words_that_help() {
    let place = Place::new("refused").await;
    for (text, words) in REFUSED {
        let object = document("packages", spec(text));
        let said = place.post(&object).await.expect_err(text);
        assert!(said.contains(words), "{text}\n{said}\nshould say\n{words}");
        // The same rules stand where there is no API server.
        assert!(vasto_crds::parse(&object.to_string(), "t").is_err(), "`vasto up` takes {text}");
    }
    println!("{} specs were refused here and by the rules that run without a cluster", REFUSED.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_others_are_built_from_are_checked() {
    let place = Place::new("names").await;
    let good = || json!({"shards": 1, "replicationFactor": 1});
    let long = "a".repeat(41);
    for name in ["1st", "a.b", long.as_str()] {
        let said = place.post(&document(name, good())).await.expect_err(name);
        assert!(said.contains("metadata.name must be at most 40 characters"), "{name}: {said}");
    }
    place.post(&document(&"a".repeat(40), good())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_are_filled_in() {
    let place = Place::new("defaults").await;
    let made = place.post(&document("packages", json!({"shards": 3, "replicationFactor": 2}))).await.unwrap();
    let made: Keyspace = serde_json::from_value(made).unwrap();
    assert_eq!(made.spec, KeyspaceSpec::new(3, 2));
    assert_eq!(made.metadata.generation, Some(1));
    let stored = place.api().get("packages").await.unwrap();
    let value = serde_json::to_value(&stored).unwrap();
    for (path, wanted) in [
        ("/spec/storage/size", "10Gi"),
        ("/spec/durability", "Periodic"),
        ("/spec/deletionPolicy", "Delete"),
        ("/spec/storeLostAfter", "10m"),
        ("/spec/collectionGrace", "24h"),
        ("/spec/maxClockSkew", "10s"),
    ] {
        assert_eq!(value.pointer(path), Some(&json!(wanted)), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_change_may_not_change() {
    let place = Place::new("changes").await;
    let mut text =
        json!({"shards": 3, "replicationFactor": 2, "storage": {"size": "10Gi", "storageClassName": "standard"}});
    place.post(&document("packages", text.clone())).await.unwrap();
    let change = |spec: Value| place.change("packages", json!({"spec": spec}));
    let refused = [
        (
            json!({"storage": {"size": "10239Mi"}}),
            "must not shrink, since a volume can only grow: it was 10Gi; write 10Gi or more",
        ),
        (json!({"storage": {"storageClassName": "fixed"}}), "must not change, since volumes stay in the class"),
        (json!({"storage": {"storageClassName": null}}), "must not change, since volumes stay in the class"),
        (json!({"storage": null}), "must not change, since volumes stay in the class"),
        (json!({"shards": 1}), "lower replicationFactor or raise shards"),
        (json!({"replicationFactor": 4}), "lower replicationFactor or raise shards"),
        (json!({"maxClockSkew": "0s"}), PERIOD),
    ];
    for (spec, words) in refused {
        let said = change(spec.clone()).await.expect_err(&spec.to_string());
        assert!(said.contains(words), "{spec}\n{said}\nshould say\n{words}");
    }
    let accepted = [
        json!({"storage": {"size": "10240Mi"}}),
        json!({"storage": {"size": "20Gi"}}),
        json!({"shards": 5, "replicationFactor": 3}),
        json!({"shards": 2, "replicationFactor": 2}),
        json!({"durability": "Synced", "paused": true, "image": "vasto:2"}),
        json!({"image": null, "deletionPolicy": "Retain"}),
    ];
    for spec in accepted {
        change(spec.clone()).await.unwrap_or_else(|e| panic!("{spec}: {e}"));
    }
    // A class can't be named afterwards either.
    text["storage"] = json!({});
    place.post(&document("other", text)).await.unwrap();
    let named = json!({"spec": {"storage": {"storageClassName": "standard"}}});
    let said = place.change("other", named).await.expect_err("a class named later");
    assert!(said.contains("must not change, since volumes stay in the class"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_a_subresource() {
    let place = Place::new("status").await;
    let mut object = document("packages", json!({"shards": 3, "replicationFactor": 2}));
    object["status"] = json!({"phase": "Ready", "shards": 9});
    place.post(&object).await.unwrap();
    let made = place.api().get("packages").await.unwrap();
    assert!(made.status.as_ref().is_none_or(|s| s.phase.is_none()), "{:?}", made.status);
    // A status changes no generation, and nothing of the spec.
    let patch = json!({"spec": {"shards": 7}, "status": {"phase": "Prepare", "shards": 3, "topologyVersion": 12}});
    let said = place.api().patch_status("packages", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    assert_eq!((said.spec.shards, said.metadata.generation), (3, Some(1)));
    let wrong = json!({"status": {"phase": "Nonsense"}});
    let said = place.api().patch_status("packages", &PatchParams::default(), &Patch::Merge(&wrong)).await.unwrap_err();
    assert!(said.to_string().contains("status.phase"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_scale_and_an_autoscaler_resize_it() {
    let place = Place::new("scale").await;
    place.post(&document("packages", json!({"shards": 3, "replicationFactor": 2}))).await.unwrap();
    let patch = json!({"status": {"shards": 3, "selector": "app.kubernetes.io/instance=packages"}});
    place.api().patch_status("packages", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    let scale = place.api().get_scale("packages").await.unwrap();
    assert_eq!(scale.spec.and_then(|s| s.replicas), Some(3));
    let status = scale.status.unwrap();
    assert_eq!((status.replicas, status.selector.as_deref()), (3, Some("app.kubernetes.io/instance=packages")));
    let patch = json!({"spec": {"replicas": 5}});
    place.api().patch_scale("packages", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    assert_eq!(place.api().get("packages").await.unwrap().spec.shards, 5);
    let (code, out, err) = place.kubectl(&["scale", "ks/packages", "--replicas", "4"]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(place.api().get("packages").await.unwrap().spec.shards, 4);
    // The rules stand on this way too.
    let (code, _, err) = place.kubectl(&["scale", "keyspace/packages", "--replicas", "1"]);
    assert!(code != 0 && err.contains("lower replicationFactor or raise shards"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_shows_its_columns() {
    let place = Place::new("columns").await;
    place.post(&document("packages", json!({"shards": 3, "replicationFactor": 2}))).await.unwrap();
    let patch = json!({"status": {
        "phase": "Prepare", "ready": "5/6", "topologyVersion": 12, "progress": {"summary": "40% of 1000 records"},
    }});
    place.api().patch_status("packages", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();

    let path = format!("/apis/vasto.io/v1alpha1/namespaces/{}/keyspaces", place.namespace);
    let request = Request::get(path).header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io");
    let table: Value = place.plane.client().request(request.body(Vec::new()).unwrap()).await.unwrap();
    let columns: Vec<(&str, i64)> = table["columnDefinitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["name"].as_str().unwrap(), c["priority"].as_i64().unwrap()))
        .collect();
    let expected = [
        ("Name", 0),
        ("Shards", 0),
        ("Ready", 0),
        ("Replication", 0),
        ("Phase", 0),
        ("Version", 0),
        ("Progress", 1),
        ("Age", 0),
    ];
    assert_eq!(columns, expected);
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    let shown = json!(["packages", 3, "5/6", 2, "Prepare", 12, "40% of 1000 records"]);
    assert_eq!(cells[..7], shown.as_array().unwrap()[..]);

    let (code, out, err) = place.kubectl(&["get", "ks"]);
    assert_eq!(code, 0, "{err}");
    let lines: Vec<Vec<&str>> = out.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "SHARDS", "READY", "REPLICATION", "PHASE", "VERSION", "AGE"]);
    assert_eq!(lines[1][..6], ["packages", "3", "5/6", "2", "Prepare", "12"]);
    let (_, out, _) = place.kubectl(&["get", "vasto", "-o", "wide"]);
    assert!(out.contains("PROGRESS") && out.contains("40% of 1000 records"), "{out}");
    let (code, out, err) = place.kubectl(&["explain", "ks.spec.shards"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("How many shards the keyspace is cut into"), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_apply_and_apply_again() {
    let place = Place::new("examples").await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut applied = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            let file = path.display().to_string();
            for (manner, word) in [(&[][..], "created"), (&[][..], "unchanged"), (&["--server-side"][..], "applied")] {
                let (code, out, err) = place.kubectl(&[&["apply", "-f", &file], manner].concat());
                assert!(code == 0 && err.is_empty(), "{file}: {out}{err}");
                assert!(out.contains(word), "{file}: {out}");
            }
            applied += 1;
        }
    }
    assert!(applied >= 2);
}

/// kubectl apply keeps the whole of what it applied in an annotation, which holds 256 KiB.
#[tokio::test(flavor = "multi_thread")]
async fn the_resource_itself_fits_kubectl_apply() {
    let place = Place::new("crd").await;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/keyspace.yaml").display().to_string();
    let (code, out, err) = place.kubectl(&["apply", "-f", &path]);
    assert_eq!(code, 0, "{out}{err}");
    let crd: CustomResourceDefinition = Api::all(place.plane.client()).get("keyspaces.vasto.io").await.unwrap();
    let kept = &crd.metadata.annotations.unwrap()["kubectl.kubernetes.io/last-applied-configuration"];
    println!("the resource as kubectl apply keeps it: {} bytes of 262144", kept.len());
    assert!(kept.len() < 256 << 10);
}
