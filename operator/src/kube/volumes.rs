//! What becomes of volumes: which must grow, and which can't come back because they
//! are bound to nodes that are gone. Pure.

use std::str::FromStr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use kube::ResourceExt;
use vasto_crds::Size;

use super::caches::cordoned;

const HOSTNAME: &str = "kubernetes.io/hostname";

/// Bytes that a claim asks for.
pub(crate) fn requested(claim: &PersistentVolumeClaim) -> Option<u64> {
    let quantity = claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?.get("storage")?;
    bytes(&quantity.0)
}

fn bytes(quantity: &str) -> Option<u64> {
    quantity.parse().ok().or_else(|| Size::from_str(quantity).ok().map(|size| size.bytes()))
}

/// Whether a volume ever stood behind this claim.
pub(crate) fn bound(claim: &PersistentVolumeClaim) -> bool {
    claim.spec.as_ref().is_some_and(|s| s.volume_name.as_ref().is_some_and(|v| !v.is_empty()))
}

/// Whether the volume behind the claim is gone, and Kubernetes says so itself.
pub(crate) fn lost(claim: &PersistentVolumeClaim) -> bool {
    claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Lost")
}

/// Where a volume can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// On a node that takes pods, or on any.
    Here,
    /// Only on nodes that pods are to leave.
    Cordoned,
    /// Only on nodes that are not there any more.
    Gone,
}

/// Where this volume can be used, among these nodes.
pub(crate) fn reach(volume: &PersistentVolume, nodes: &[Arc<Node>]) -> Reach {
    let terms = volume.spec.as_ref().and_then(|s| s.node_affinity.as_ref()?.required.as_ref());
    let names: Vec<&String> = terms
        .into_iter()
        .flat_map(|t| &t.node_selector_terms)
        .flat_map(|t| t.match_expressions.iter().flatten())
        .filter(|e| e.key == HOSTNAME && e.operator == "In")
        .flat_map(|e| e.values.iter().flatten())
        .collect();
    if names.is_empty() {
        return Reach::Here;
    }
    let host = |node: &Node| node.labels().get(HOSTNAME).cloned().unwrap_or_else(|| node.name_any());
    let found: Vec<&Arc<Node>> = nodes.iter().filter(|node| names.contains(&&host(node))).collect();
    match found.as_slice() {
        [] => Reach::Gone,
        all if all.iter().all(|node| cordoned(node)) => Reach::Cordoned,
        _ => Reach::Here,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, unschedulable: bool) -> Arc<Node> {
        let node =
            json!({"metadata": {"name": name, "labels": {HOSTNAME: name}}, "spec": {"unschedulable": unschedulable}});
        Arc::new(serde_json::from_value(node).unwrap())
    }

    #[test]
    fn a_volume_is_reached_on_the_nodes_that_it_names() {
        let local: PersistentVolume = serde_json::from_value(json!({"spec": {"nodeAffinity": {"required": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": HOSTNAME, "operator": "In", "values": ["a"]}]}]
        }}}}))
        .unwrap();
        assert_eq!(reach(&local, &[node("a", false), node("b", false)]), Reach::Here);
        assert_eq!(reach(&local, &[node("a", true), node("b", false)]), Reach::Cordoned);
        assert_eq!(reach(&local, &[node("b", false)]), Reach::Gone);
        assert_eq!(reach(&PersistentVolume::default(), &[]), Reach::Here);
    }

    #[test]
    fn sizes_are_read_as_they_are_written() {
        let claim = |size: &str| -> PersistentVolumeClaim {
            serde_json::from_value(json!({"spec": {"resources": {"requests": {"storage": size}}}})).unwrap()
        };
        assert_eq!(requested(&claim("1Gi")), Some(1 << 30));
        assert_eq!(requested(&claim("1073741824")), Some(1 << 30));
    }
}
