//! The CustomResourceDefinition, generated from the types. `crds/keyspace.yaml`
//! is this, written down for `kubectl apply` and the Helm chart.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::keyspace::Keyspace;

/// The Keyspace's CustomResourceDefinition.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = Keyspace::crd();
    for version in &mut crd.spec.versions {
        if let Some(schema) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) {
            tidy(schema);
            schema.title = None;
        }
    }
    crd
}

/// The CustomResourceDefinition as YAML.
#[expect(clippy::expect_used, reason = "JSON can always be written as YAML")]
pub fn crd_yaml() -> String {
    let body = serde_yaml::to_string(&crate::keyspace::json(&crd())).expect("JSON is YAML");
    format!(
        "# Generated from crds/src by `VASTO_BLESS=1 cargo test -p vasto-crds`. Edit the types there instead.\n{body}"
    )
}

/// An absent field is absent, never null; Kubernetes knows no unsigned formats; texts stay short.
pub(crate) fn tidy(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if matches!(schema.format.as_deref(), Some("uint32" | "uint64")) {
        schema.format = Some("int64".to_owned());
    }
    if schema.x_kubernetes_int_or_string == Some(true) {
        // The upstream text is a grammar of 2.5 KB, at each place.
        schema.description = Some("An amount, such as 2, 500m or 4Gi.".to_owned());
    }
    for property in schema.properties.iter_mut().flat_map(|p| p.values_mut()) {
        tidy(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        tidy(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        tidy(values);
    }
}
