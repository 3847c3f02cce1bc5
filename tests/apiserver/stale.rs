//! What the operator sees may be old: of another keyspace of the same name, of pods and
//! volumes that are others by now. It touches nothing that is not what it decided on.

use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, PropagationPolicy};
use serde_json::json;
use vasto_crds::KeyspaceSpec;

use crate::bench::{Bench, settled, timings};
use crate::tap::Strike;

/// Deleted and made again under the same name, while pods of the old one are still ending.
#[tokio::test(flavor = "multi_thread")]
async fn a_keyspace_made_again_while_the_old_one_is_still_going() {
    let bench = Bench::new("again").await;
    let operator = bench.operator();
    let old = bench.create(2, 2).await;
    bench.settled(2, 2).await;
    bench.fleet.write(old.uid(), 40);
    // The nodes of the old pods can't be reached: they stay.
    for pod in ["packages-store-0", "packages-store-1"] {
        bench.fleet.stuck(pod, true);
    }
    bench.delete().await;
    let new = bench.create(2, 2).await;
    assert_ne!(new.uid(), old.uid());
    tokio::time::sleep(timings().tick * 8).await;
    // Nothing of the old one was deleted or changed by the operator.
    let deletes: Vec<_> = operator.tap.writes().into_iter().filter(|w| w.method == "DELETE").collect();
    assert_eq!(deletes, [], "it is not the operator's to delete");
    let now = bench.keyspaces().get("packages").await.unwrap();
    assert!(now.status.as_ref().is_none_or(|s| s.topology.is_none()), "nothing was committed over the old stores");
    for pod in ["packages-store-0", "packages-store-1"] {
        bench.fleet.stuck(pod, false);
    }
    bench.settled(2, 2).await;
    bench.fleet.write(new.uid(), 40);
    bench.fleet.at_rest(new.uid()).await;
    // The volumes of the old one went with it, and what there is belongs to the new one.
    let set: Api<StatefulSet> = Api::namespaced(bench.client.clone(), &bench.namespace);
    let owner = set.get("packages-store").await.unwrap();
    assert_eq!(owner.owner_references()[0].uid, new.uid());
    let of_old = bench.fleet.with(|w| w.volumes.values().filter(|v| v.keyspaces.contains_key(old.uid())).count());
    assert_eq!(of_old, 0);
    operator.tap.clean();
}

/// Deleted with its dependents first, and made again at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreground_deletion_and_a_new_one_behind_it() {
    let bench = Bench::new("foreground").await;
    let operator = bench.operator();
    let old = bench.create(2, 2).await;
    bench.settled(2, 2).await;
    bench.fleet.write(old.uid(), 40);
    bench.fleet.forget(old.uid());
    bench.fleet.stuck("packages-store-1", true);
    let foreground =
        DeleteParams { propagation_policy: Some(PropagationPolicy::Foreground), ..DeleteParams::default() };
    bench.keyspaces().delete("packages", &foreground).await.unwrap();
    operator.tap.reset(Strike::Never);
    tokio::time::sleep(timings().tick * 4).await;
    assert_eq!(operator.tap.writes(), [], "nothing is written for what is being deleted");
    bench.fleet.stuck("packages-store-1", false);
    bench.wait("it is gone", async || bench.keyspaces().get_opt("packages").await.unwrap().is_none()).await;
    let new = bench.create(3, 2).await;
    bench.settled(3, 2).await;
    bench.fleet.write(new.uid(), 40);
    bench.fleet.at_rest(new.uid()).await;
    operator.tap.clean();
}

/// The watches bring nothing while pods and volumes are replaced by others of the same names.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_view_of_pods_and_volumes_deletes_nothing_new() {
    let bench = Bench::new("oldview").await;
    let operator = bench.operator();
    let made =
        bench.create_spec(KeyspaceSpec { store_lost_after: "2s".parse().unwrap(), ..KeyspaceSpec::new(4, 2) }).await;
    bench.settled(4, 2).await;
    bench.fleet.write(made.uid(), 40);

    operator.tap.hold_watches(true);
    // Pods are others by now, and one volume too; the operator does not see it.
    for pod in ["packages-store-1", "packages-store-3"] {
        bench.pods().delete(pod, &DeleteParams::default()).await.unwrap();
    }
    bench.claims().delete("data-packages-store-3", &DeleteParams::default()).await.unwrap();
    bench
        .wait("new pods run", async || {
            bench.fleet.with(|w| w.stores.values().filter(|s| s.only == made.uid()).count() == 4)
        })
        .await;
    // What it would do now it decides on what was.
    bench.patch(json!({"spec": {"resources": {"limits": {"memory": "1Gi"}}, "shards": 2}})).await;
    tokio::time::sleep(timings().tick * 12).await;
    let volumes: Vec<String> = uids::<PersistentVolumeClaim>(&bench).await;
    operator.tap.hold_watches(false);
    bench.until("two shards", |k| settled(k, 2, 2)).await;
    bench.until_claims(0..2).await;
    let left = uids::<PersistentVolumeClaim>(&bench).await;
    assert!(left.iter().all(|uid| volumes.contains(uid)), "the volumes of the two that stay are the same");
    bench.fleet.at_rest(made.uid()).await;
    operator.tap.clean();
}

async fn uids<K>(bench: &Bench) -> Vec<String>
where
    K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(bench.client.clone(), &bench.namespace);
    let listed = api.list(&ListParams::default().labels("vasto.io/keyspace")).await.unwrap();
    listed.iter().filter_map(ResourceExt::uid).collect()
}

/// A leader that was cut off goes on believing that it leads: nothing of what it does reaches anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_leader_does_no_harm() {
    let bench = Bench::new("deposed").await;
    let first = bench.operator_named("operator-a", Strike::Never);
    let made = bench.create(2, 2).await;
    bench.settled(2, 2).await;
    bench.fleet.write(made.uid(), 40);
    let writer = bench.fleet.writer(made.uid());
    // It can't reach the API server any more; stores still speak to it.
    first.tap.cut_off();
    let second = bench.operator_named("operator-b", Strike::Never);
    bench.scale(4, None).await;
    bench.settled(4, 2).await;
    bench.scale(2, None).await;
    bench.settled(2, 2).await;
    drop(writer);
    drop(first);
    tokio::time::sleep(Duration::from_millis(100)).await;
    bench.fleet.at_rest(made.uid()).await;
    second.tap.clean();
}
