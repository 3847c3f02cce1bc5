//! Nodes that go for good, and nodes that are drained: for an operator that serves the whole
//! cluster and so may see them.

use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, Pod};
use kube::api::{Api, EvictParams, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use vasto_tests::control_plane::Who;
use vasto_tests::fleet::Fleet;

use crate::bench::{Bench, Manner, Operator, condition, fresh_namespace, own_plane, replicas, settled, topology};

/// A control plane of its own, since its operator takes care of every namespace.
async fn cluster(label: &str) -> (Bench, Operator) {
    let plane = own_plane().await;
    let namespace = fresh_namespace(label);
    plane.namespace(&namespace).await;
    let client = plane.client();
    let fleet = Arc::new(Fleet::start_with_nodes(&client, &namespace).await);
    let bench = Bench::over(plane, namespace, client, fleet);
    let operator = bench.operator_as(Manner { cluster: true, ..Manner::default() });
    (bench, operator)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_and_one_that_is_drained() {
    let (bench, operator) = cluster("nodes").await;
    let uid = bench.create(3, 2).await.uid().to_owned();
    let before = bench.settled(3, 2).await;
    bench.fleet.write(&uid, 64);

    // Its volume was on that node only: it is recognised, and refilled from its peers.
    let began = Instant::now();
    let node = bench.fleet.node_of("packages-store-1").await;
    let claim = bench.claims().get("data-packages-store-1").await.unwrap().uid();
    bench.fleet.lose_node(&node).await;
    bench.until("the loss is seen", |k| condition(k, "Degraded").0 == "True").await;
    let after = bench
        .until("store-1 is refilled elsewhere", |k| settled(k, 3, 2) && topology(k).version > topology(&before).version)
        .await;
    println!("a lost node was made up for after {:?}", began.elapsed());
    assert_ne!(bench.claims().get("data-packages-store-1").await.unwrap().uid(), claim);
    let kept = replicas(&topology(&before)).into_iter().filter(|r| replicas(&topology(&after)).contains(r)).count();
    assert_eq!(kept, 4, "what was on other stores stays there");
    bench.fleet.at_rest(&uid).await;
    for (reason, note) in bench.events().await {
        println!("{reason}: {note}");
    }

    // With one copy, a drained node is emptied first, and then lets go of its pod.
    bench.scale(2, Some(1)).await;
    bench.settled(2, 1).await;
    bench.until_claims(0..2).await;
    let writer = bench.fleet.writer(&uid);
    // An eviction is answered 429, which clients take for a reason to ask again.
    let mut at_once = bench.plane.config(&Who::Admin);
    at_once.default_retry = false;
    let pods: Api<Pod> = Api::namespaced(Client::try_from(at_once).unwrap(), &bench.namespace);
    let refused = pods.evict("packages-store-1", &EvictParams::default()).await.expect_err("it has the only copy");
    println!("{refused}");
    let node = bench.fleet.node_of("packages-store-1").await;
    let nodes: Api<Node> = Api::all(bench.client.clone());
    let cordon = json!({"spec": {"unschedulable": true}});
    nodes.patch(&node, &PatchParams::default(), &Patch::Merge(&cordon)).await.unwrap();
    bench
        .wait("the pod is elsewhere", async || {
            let there = bench.fleet.node_of("packages-store-1").await;
            !there.is_empty() && there != node
        })
        .await;
    bench.settled(2, 1).await;
    bench.until_claims(0..2).await;
    drop(writer);
    bench.fleet.at_rest(&uid).await;
    operator.tap.clean();

    // No volume was left behind.
    let volumes: Api<PersistentVolume> = Api::all(bench.client.clone());
    let claims = bench.claims().list(&ListParams::default()).await.unwrap();
    let bound: Vec<String> = claims.iter().filter_map(|c| c.spec.as_ref()?.volume_name.clone()).collect();
    let all = volumes.list(&ListParams::default()).await.unwrap();
    println!("{} volumes, of which {} are in use", all.items.len(), bound.len());
    assert!(bound.iter().all(|name| all.iter().any(|v| v.name_any() == *name)));
}
