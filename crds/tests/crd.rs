//! The CustomResourceDefinition: what stands in `crds/keyspace.yaml` is what
//! the types say, and it is one that an apiserver takes.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinitionVersion, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

fn version() -> CustomResourceDefinitionVersion {
    let mut versions = vasto_crds::crd().spec.versions;
    assert_eq!(versions.len(), 1);
    versions.remove(0)
}

fn schema() -> JSONSchemaProps {
    version().schema.unwrap().open_api_v3_schema.unwrap()
}

fn walk(path: &str, schema: &JSONSchemaProps, visit: &mut dyn FnMut(&str, &JSONSchemaProps)) {
    visit(path, schema);
    for (name, property) in schema.properties.iter().flatten() {
        walk(&format!("{path}.{name}"), property, visit);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        walk(&format!("{path}[]"), items, visit);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        walk(&format!("{path}.*"), values, visit);
    }
}

#[test]
fn the_written_crd_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("keyspace.yaml");
    let generated = vasto_crds::crd_yaml();
    if std::env::var_os("VASTO_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/vasto/files/keyspace-crd.yaml");
    if std::env::var_os("VASTO_BLESS").is_some() {
        std::fs::write(&chart, &generated).unwrap();
    }
    let shipped = std::fs::read_to_string(&chart).unwrap_or_default();
    assert!(
        written == generated && shipped == generated,
        "crds/keyspace.yaml or its copy in the chart is not what the types in crds/src say: run \
         `VASTO_BLESS=1 cargo test -p vasto-crds --test crd`"
    );
    // kubectl apply keeps the whole of it in an annotation, of which 256 KiB are allowed.
    assert!(generated.len() < 200_000, "{} bytes", generated.len());
}

#[test]
fn it_is_what_people_and_autoscalers_expect() {
    let crd = vasto_crds::crd();
    assert_eq!(crd.metadata.name.as_deref(), Some("keyspaces.vasto.io"));
    assert_eq!((crd.spec.group.as_str(), crd.spec.scope.as_str()), ("vasto.io", "Namespaced"));
    assert_eq!(crd.spec.names.short_names.unwrap(), ["ks"]);
    assert_eq!(crd.spec.names.categories.unwrap(), ["vasto"]);

    let version = version();
    let columns: Vec<_> = version
        .additional_printer_columns
        .unwrap()
        .into_iter()
        .map(|c| (c.name.to_uppercase(), c.json_path, c.priority.unwrap_or(0)))
        .collect();
    let expected = [
        ("SHARDS", ".spec.shards", 0),
        ("READY", ".status.ready", 0),
        ("REPLICATION", ".spec.replicationFactor", 0),
        ("PHASE", ".status.phase", 0),
        ("VERSION", ".status.topologyVersion", 0),
        ("PROGRESS", ".status.progress.summary", 1),
        ("AGE", ".metadata.creationTimestamp", 0),
    ]
    .map(|(name, path, priority)| (name.to_owned(), path.to_owned(), priority));
    assert_eq!(columns, expected);

    let subresources = version.subresources.unwrap();
    assert!(subresources.status.is_some());
    let scale = subresources.scale.unwrap();
    assert_eq!(
        (scale.spec_replicas_path.as_str(), scale.status_replicas_path.as_str(), scale.label_selector_path.as_deref()),
        (".spec.shards", ".status.shards", Some(".status.selector"))
    );
}

#[test]
fn every_field_is_explained_and_plain() {
    walk("", &schema(), &mut |path, s| {
        // Elements of lists and maps are explained by the list.
        assert!(s.description.is_some() || path.ends_with(['*', ']']), "{path} has no description");
        assert!(s.nullable.is_none(), "{path} may be null");
        assert!(
            !s.format.as_deref().is_some_and(|f| f.starts_with("uint")),
            "{path} has a format unknown to Kubernetes"
        );
        assert!(
            s.type_.is_some() || s.x_kubernetes_int_or_string == Some(true),
            "{path} has no type, so the schema isn't structural"
        );
    });
}

#[test]
fn bounds_and_defaults() {
    let spec = &schema().properties.unwrap()["spec"];
    assert_eq!(spec.required.as_deref(), Some(&["replicationFactor".to_owned(), "shards".to_owned()][..]));
    let fields = spec.properties.as_ref().unwrap();
    for (field, low, high) in
        [("shards", 1, vasto_crds::MAX_SHARDS), ("replicationFactor", 1, vasto_crds::MAX_REPLICATION)]
    {
        assert_eq!((fields[field].minimum, fields[field].maximum), (Some(f64::from(low)), Some(f64::from(high))));
        let said = format!("must be a whole number from {low} to {high}");
        assert!(fields[field].x_kubernetes_validations.iter().flatten().any(|r| r.message.as_ref() == Some(&said)));
    }
    let default = |field: &str| fields[field].default.as_ref().unwrap().0.to_string();
    assert_eq!(default("storage"), r#"{"size":"10Gi"}"#);
    assert_eq!(default("durability"), r#""Periodic""#);
    assert_eq!(default("deletionPolicy"), r#""Delete""#);
    assert_eq!(default("paused"), "false");
    assert_eq!(default("storeLostAfter"), r#""10m""#);
    assert_eq!(default("collectionGrace"), r#""24h""#);
    assert_eq!(default("maxClockSkew"), r#""10s""#);
}

/// kubectl apply keeps the whole of it in an annotation, which holds 256 KiB.
#[test]
fn it_is_small() {
    let size = vasto_crds::crd_yaml().len();
    assert!(size < 128 << 10, "{size} bytes");
}

/// An apiserver estimates what each rule may cost from the greatest length of what it reads, and
/// refuses what is unbounded; fieldPath must name a field.
#[test]
fn rules_are_bounded_and_point_at_fields() {
    let mut rules = 0;
    walk("", &schema(), &mut |path, s| {
        for rule in s.x_kubernetes_validations.iter().flatten() {
            rules += 1;
            assert!(s.type_.as_deref() != Some("string") || s.max_length.is_some(), "{path}: {}", rule.rule);
            assert!(rule.message.is_some() || rule.message_expression.is_some(), "{path}: {}", rule.rule);
            if let Some(field) = &rule.field_path {
                assert!(s.properties.as_ref().unwrap().contains_key(&field[1..]), "{path}{field}");
            }
        }
    });
    assert!(rules >= 10, "{rules}");
}
