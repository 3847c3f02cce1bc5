//! What people do to a keyspace and what becomes of it: in each case the data is where it
//! must be at the end, and was somewhere at every moment.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;
use vasto_client::v1;
use vasto_crds::{DeletionPolicy, Keyspace, KeyspaceSpec, Phase, StoreState};

use crate::bench::{
    Bench, Manner, OTHER_SERVICE, Operator, condition, message, placement, replicas, settled, timings, topology,
};
use crate::tap::Strike;
use crate::watching::Watching;

/// Keys that a keyspace has before something happens to it.
const KEYS: u64 = 64;

/// A keyspace with data, at rest.
async fn in_use(bench: &Bench, shards: u32, copies: u32) -> Keyspace {
    in_use_spec(bench, KeyspaceSpec::new(shards, copies)).await
}

async fn in_use_spec(bench: &Bench, spec: KeyspaceSpec) -> Keyspace {
    let (shards, copies) = (spec.shards, spec.replication_factor);
    let uid = bench.create_spec(spec).await.uid().to_owned();
    let version = topology(&bench.settled(shards, copies).await).version;
    // The status is written before the stores are told, and a write is tried but once.
    bench.wait("stores that know it", async || bench.fleet.with(|world| world.knows(&uid, version))).await;
    bench.fleet.write(&uid, KEYS);
    bench.keyspaces().get("packages").await.unwrap()
}

async fn pod_uids(bench: &Bench) -> BTreeMap<String, String> {
    let pods = bench.pods().list(&ListParams::default().labels("vasto.io/keyspace")).await.unwrap();
    pods.iter().map(|p| (p.name_any(), p.uid().unwrap_or_default())).collect()
}

/// At rest, with all data in place, and nothing was ever wrong.
async fn good(bench: &Bench, operators: &[&Operator], uid: &str) {
    bench.fleet.at_rest(uid).await;
    operators.iter().for_each(|o| o.tap.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn create_grow_shrink_and_delete() {
    let bench = Bench::new("life").await;
    let operator = bench.operator();
    let began = Instant::now();
    let made = in_use(&bench, 2, 2).await;
    let uid = made.uid().to_owned();
    println!("created after {:?}", began.elapsed());
    let status = made.status.clone().unwrap();
    assert_eq!((status.ready.as_deref(), status.phase), (Some("4/4"), Some(Phase::Ready)));
    assert_eq!(status.image.as_deref(), Some(crate::bench::IMAGE));
    assert!(status.selector.is_some_and(|s| s.contains("app.kubernetes.io/instance=packages")));
    assert_eq!(condition(&made, "Ready"), ("True".to_owned(), "AllShardsServed".to_owned()));
    assert_eq!(condition(&made, "Degraded"), ("False".to_owned(), "None".to_owned()));
    assert!(made.metadata.finalizers.is_none(), "no finalizer holds up a deletion");
    let stores: Vec<_> = status.stores.iter().map(|s| (s.name.as_str(), s.state)).collect();
    assert_eq!(stores, [("store-0", Some(StoreState::Ready)), ("store-1", Some(StoreState::Ready))]);
    let address = format!("packages-store-1.packages-store.{}.svc:8279", bench.namespace);
    assert_eq!(status.stores[1].address.as_deref(), Some(address.as_str()));

    let writer = bench.fleet.writer(&uid);
    let began = Instant::now();
    bench.scale(4, None).await;
    bench.settled(4, 2).await;
    println!("grown after {:?}", began.elapsed());
    bench.until_claims(0..4).await;
    let began = Instant::now();
    bench.scale(2, None).await;
    bench.settled(2, 2).await;
    println!("shrunk after {:?}", began.elapsed());
    drop(writer);
    // What is not needed any more is gone, volumes and all.
    bench.until_claims(0..2).await;
    bench.wait("two pods", async || bench.names::<Pod>().await.len() == 2).await;
    good(&bench, &[&operator], &uid).await;

    bench.delete().await;
    bench.until_claims(0..0).await;
    all_gone(&bench).await;
    operator.tap.clean();
}

async fn all_gone(bench: &Bench) {
    bench
        .wait("everything is gone", async || {
            bench.names::<Pod>().await.is_empty()
                && bench.names::<StatefulSet>().await.is_empty()
                && bench.names::<Service>().await.is_empty()
                && bench.names::<ServiceAccount>().await.is_empty()
                && bench.names::<PodDisruptionBudget>().await.is_empty()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_each_phase() {
    let bench = Bench::new("events").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 2, 2).await.uid().to_owned();
    bench.scale(3, None).await;
    bench.settled(3, 2).await;
    let wanted = ["Preparing", "Switching", "Fencing", "Draining", "CleaningUp", "Ready"];
    bench
        .wait("an Event for each phase", async || {
            let said = bench.events().await;
            wanted.iter().all(|reason| said.iter().any(|(r, _)| r == reason))
        })
        .await;
    for (reason, note) in bench.events().await {
        println!("{reason}: {note}");
    }
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_and_fewer_copies() {
    let bench = Bench::new("factor").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 3, 1).await.uid().to_owned();
    let writer = bench.fleet.writer(&uid);
    for copies in [3, 2, 1, 2] {
        bench.scale(3, Some(copies)).await;
        bench.settled(3, copies).await;
    }
    bench.scale(5, Some(3)).await;
    bench.settled(5, 3).await;
    drop(writer);
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_replaced_by_an_annotation() {
    let bench = Bench::new("replace").await;
    let operator = bench.operator();
    let before = in_use(&bench, 3, 2).await;
    let uid = before.uid().to_owned();
    let writer = bench.fleet.writer(&uid);
    bench.replace("store-1").await;
    let after = bench.settled(3, 2).await;
    drop(writer);
    assert!(!topology(&after).replaced.is_empty());
    let (before, after) = (replicas(&topology(&before)), replicas(&topology(&after)));
    for (shard, store, id) in &after {
        let kept = before.contains(&(*shard, store.clone(), *id));
        assert_eq!(kept, store != "store-1", "shard {shard} on {store}");
    }
    // A wish that can't be met is answered, and taken back.
    bench.replace("store-9").await;
    bench.wait("an Event that says no", async || bench.events().await.iter().any(|(r, _)| r == "ReplaceRefused")).await;
    bench.settled(3, 2).await;
    good(&bench, &[&operator], &uid).await;
}

/// With one copy, the copy is made elsewhere first.
#[tokio::test(flavor = "multi_thread")]
async fn with_one_copy_a_store_is_replaced_over_a_surge_store() {
    let bench = Bench::new("surge").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 2, 1).await.uid().to_owned();
    let writer = bench.fleet.writer(&uid);
    bench.replace("store-1").await;
    bench.until("a third store", |k| topology(k).stores().contains(&"store-2")).await;
    bench.settled(2, 1).await;
    drop(writer);
    bench.until_claims(0..2).await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_keeps_volumes_where_they_are_to_be_kept() {
    let bench = Bench::new("retain").await;
    let operator = bench.operator();
    let spec = KeyspaceSpec { deletion_policy: DeletionPolicy::Retain, ..KeyspaceSpec::new(2, 2) };
    let uid = in_use_spec(&bench, spec).await.uid().to_owned();
    // The policy may be changed as long as the keyspace is there.
    let policy = |policy: &str| json!({"spec": {"deletionPolicy": policy}});
    bench.patch(policy("Delete")).await;
    bench.patch(policy("Retain")).await;
    // Until that is observed, the StatefulSet may still be about to get the policy of before.
    bench.settled(2, 2).await;
    bench
        .wait("the StatefulSet keeps volumes", async || {
            let set = stores(&bench).await;
            let policy = set.spec.persistent_volume_claim_retention_policy;
            policy.is_some_and(|p| p.when_deleted.as_deref() == Some("Retain"))
        })
        .await;
    bench.delete().await;
    all_gone(&bench).await;
    assert_eq!(bench.names::<PersistentVolumeClaim>().await.len(), 2);
    let kept = bench.fleet.with(|w| w.volumes.values().filter(|v| v.keyspaces.contains_key(&uid)).count());
    assert_eq!(kept, 2, "the data is still there");

    // A keyspace of the same name does not take what a former one has left for its own.
    let new = bench.create(2, 2).await;
    let degraded = bench.until("it says whose data that is", |k| condition(k, "Degraded").1 == "ForeignVolume").await;
    assert!(message(&degraded, "Degraded").contains(&uid), "{}", message(&degraded, "Degraded"));
    assert_eq!(degraded.uid(), new.uid());
    let kept = bench.fleet.with(|w| w.volumes.values().filter(|v| v.keyspaces.contains_key(&uid)).count());
    assert_eq!(kept, 2, "it was neither served nor deleted");
    // A person does as the message says.
    for claim in bench.names::<PersistentVolumeClaim>().await {
        bench.claims().delete(&claim, &DeleteParams::default()).await.unwrap();
    }
    for pod in bench.names::<Pod>().await {
        bench.pods().delete(&pod, &DeleteParams::default()).await.unwrap();
    }
    bench.settled(2, 2).await;
    operator.tap.clean();
}

async fn stores(bench: &Bench) -> StatefulSet {
    let api: Api<StatefulSet> = Api::namespaced(bench.client.clone(), &bench.namespace);
    api.get("packages-store").await.unwrap()
}

// ---- a change of mind ----

/// Holds stores up so that the change under way stays in this phase; says how to let go.
async fn reach(bench: &Bench, operator: &Operator, phase: Phase, shards: u32) -> Option<Watching> {
    let watching = match phase {
        Phase::Prepare => {
            bench.fleet.hold(|h| h.births = true);
            None
        }
        Phase::Switch => Some(Watching::open(&operator.address, &bench.qualified("packages")).await),
        Phase::Fence | Phase::Drain => {
            bench.fleet.hold(|h| h.fences = true);
            None
        }
        _ => {
            bench.fleet.hold(|h| (h.cleaning, h.drops) = (true, true));
            None
        }
    };
    bench.scale(shards, None).await;
    if phase == Phase::Drain {
        bench.until("Fence", |k| k.status.as_ref().and_then(|s| s.phase) == Some(Phase::Fence)).await;
        bench.fleet.hold(|h| (h.fences, h.following) = (false, true));
    }
    bench.until(phase.as_str(), |k| k.status.as_ref().and_then(|s| s.phase) == Some(phase)).await;
    watching
}

async fn change_of_mind(label: &str, from: u32, to: u32) {
    let bench = Bench::new(label).await;
    let manner = Manner {
        timings: vasto_operator::kube::Timings { fence: Duration::from_secs(600), ..timings() },
        ..Manner::default()
    };
    let operator = bench.operator_as(manner);
    let uid = in_use(&bench, from, 2).await.uid().to_owned();
    for phase in [Phase::Prepare, Phase::Switch, Phase::Fence, Phase::Drain, Phase::Cleanup] {
        let watching = reach(&bench, &operator, phase, to).await;
        let began = Instant::now();
        bench.scale(from, None).await;
        bench.fleet.write(&uid, 5);
        drop(watching);
        bench.fleet.hold(|h| *h = vasto_tests::fleet::Holds::default());
        bench.settled(from, 2).await;
        bench.until_claims(0..from).await;
        println!("{from} → {to}, and back in {phase}: at rest after {:?}", began.elapsed());
        bench.fleet.at_rest(&uid).await;
    }
    // And it still can be what it was to become.
    bench.scale(to, None).await;
    bench.settled(to, 2).await;
    bench.until_claims(0..to).await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_growth_is_called_off_in_each_phase() {
    change_of_mind("mind-grow", 2, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shrink_is_called_off_in_each_phase() {
    change_of_mind("mind-shrink", 4, 2).await;
}

/// Pods that are to go are still ending when they are wanted again: their volumes stay, and are used again. When they
/// go in the end, so do the volumes.
#[tokio::test(flavor = "multi_thread")]
async fn volumes_of_pods_that_are_wanted_again_stay() {
    const LAST: &str = "packages-store-3";
    let bench = Bench::new("again").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 4, 2).await.uid().to_owned();
    let claim = async || bench.claims().get(&format!("data-{LAST}")).await.unwrap();
    let marked = async || claim().await.annotations().get("vasto.io/surplus") == Some(&uid);
    let volume = claim().await.uid();
    bench.fleet.stuck(LAST, true);
    bench.scale(2, None).await;
    bench
        .wait("a pod that ends", async || bench.pods().get(LAST).await.unwrap().metadata.deletion_timestamp.is_some())
        .await;
    assert!(marked().await, "whoever leads next must know that it may go");
    bench.scale(4, None).await;
    bench.wait("a volume that is to stay", async || !marked().await).await;
    bench.fleet.stuck(LAST, false);
    bench.settled(4, 2).await;
    bench.until_claims(0..4).await;
    let kept = claim().await;
    assert_eq!((kept.uid(), kept.metadata.deletion_timestamp), (volume, None));
    bench.fleet.at_rest(&uid).await;
    bench.scale(2, None).await;
    bench.settled(2, 2).await;
    bench.until_claims(0..2).await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_in_each_phase_ends() {
    for phase in [Phase::Prepare, Phase::Fence, Phase::Drain, Phase::Cleanup] {
        let bench = Bench::new("delete").await;
        let operator = bench.operator();
        in_use(&bench, 2, 2).await;
        reach(&bench, &operator, phase, 3).await;
        bench.delete().await;
        all_gone(&bench).await;
        bench.wait("all volumes with data are gone", async || nothing_left(&bench).await).await;
        operator.tap.clean();
    }
}

/// Whether no volume is left but such as the StatefulSet's controller forgot: it makes a claim in one look and
/// gives it the owner with which it goes in the next, and the StatefulSet was deleted in between.
async fn nothing_left(bench: &Bench) -> bool {
    let claims = bench.claims().list(&ListParams::default()).await.unwrap();
    let forgotten = |claim: &PersistentVolumeClaim| {
        let uid = claim.uid().unwrap_or_default();
        let empty = bench.fleet.with(|w| w.volumes.get(&uid).is_none_or(|v| v.keyspaces.is_empty()));
        claim.owner_references().is_empty() && claim.metadata.deletion_timestamp.is_none() && empty
    };
    let only_forgotten = claims.iter().all(forgotten);
    if only_forgotten {
        claims.iter().for_each(|c| println!("Kubernetes left {} behind, empty and without an owner", c.name_any()));
    }
    only_forgotten
}

#[tokio::test(flavor = "multi_thread")]
async fn while_paused_nothing_is_done() {
    let bench = Bench::new("paused").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 2, 2).await.uid().to_owned();
    bench.patch(json!({"spec": {"paused": true}})).await;
    bench.scale(4, None).await;
    let paused = bench.until("it says so", |k| condition(k, "Progressing").1 == "Paused").await;
    assert_eq!(condition(&paused, "Ready").0, "True", "it is served nevertheless");
    // Whatever wakes the operator.
    operator.tap.reset(Strike::Never);
    bench.fleet.write(&uid, 5);
    bench.fleet.crash("packages-store-1");
    bench.patch(json!({"metadata": {"labels": {"touched": "yes"}}})).await;
    bench.until("it has looked again", |k| k.labels().contains_key("touched")).await;
    tokio::time::sleep(timings().tick * 8).await;
    let touched: Vec<_> = operator.tap.writes().into_iter().filter(|w| !w.path.ends_with("/status")).collect();
    assert_eq!(touched, [], "something was written while paused");
    assert_eq!(stores(&bench).await.spec.replicas, Some(2));

    bench.patch(json!({"spec": {"paused": false}})).await;
    bench.settled(4, 2).await;

    // In the middle of a change as well.
    bench.fleet.hold(|h| h.births = true);
    bench.scale(5, None).await;
    bench.until("Prepare", |k| k.status.as_ref().and_then(|s| s.phase) == Some(Phase::Prepare)).await;
    bench.patch(json!({"spec": {"paused": true}})).await;
    bench.until("it says so", |k| condition(k, "Progressing").1 == "Paused").await;
    bench.fleet.hold(|h| h.births = false);
    tokio::time::sleep(timings().tick * 8).await;
    let still = bench.keyspaces().get("packages").await.unwrap();
    assert_eq!(still.status.and_then(|s| s.phase), Some(Phase::Prepare));
    bench.patch(json!({"spec": {"paused": false}})).await;
    bench.settled(5, 2).await;
    good(&bench, &[&operator], &uid).await;
}

// ---- several operators ----

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_serves_the_stream_and_takes_over() {
    let bench = Bench::new("two").await;
    let first = bench.operator_named("operator-a", Strike::Never);
    let uid = in_use(&bench, 2, 2).await.uid().to_owned();
    let second = bench.operator_named("operator-b", Strike::Never);
    let mut watching = Watching::open(&second.address, &bench.qualified("packages")).await;
    let known = watching.until(|t| t.size() == 2).await;
    assert_eq!(known.uid, uid);
    // Stores that ask the follower are sent to the leader; and a switch is shown there too.
    let writer = bench.fleet.writer(&uid);
    bench.fleet.crash("packages-store-0");
    bench.fleet.crash("packages-store-1");
    bench.scale(3, None).await;
    bench.settled(3, 2).await;
    watching.until(|t| t.size() == 3 && t.phase() == v1::Phase::Stable).await;
    assert_eq!(second.tap.writes(), [], "a follower writes nothing");

    let began = Instant::now();
    first.kill();
    bench.scale(4, None).await;
    bench.settled(4, 2).await;
    println!("failed over and grown after {:?}", began.elapsed());
    // The client's stream never broke.
    watching.until(|t| t.size() == 4 && t.phase() == v1::Phase::Stable).await;

    // One that is stopped as it should be lets go at once.
    let third = bench.operator_named("operator-c", Strike::Never);
    let began = Instant::now();
    second.stop().await;
    bench.scale(2, None).await;
    bench.settled(2, 2).await;
    println!("handed over and shrunk after {:?}", began.elapsed());
    drop(writer);
    good(&bench, &[&third], &uid).await;
}

async fn wipe_status(bench: &Bench) {
    let nothing = json!({"status": null});
    let wiped = bench.keyspaces().patch_status("packages", &PatchParams::default(), &Patch::Merge(&nothing)).await;
    assert_eq!(wiped.unwrap().status, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_status_comes_back_from_the_stores() {
    let bench = Bench::new("wiped").await;
    let operator = bench.operator();
    let before = in_use(&bench, 3, 2).await;
    let uid = before.uid().to_owned();
    let (pods, copied) = (pod_uids(&bench).await, bench.fleet.copied());
    operator.kill();
    // As a reinstallation does: the status is gone, and the lease.
    wipe_status(&bench).await;
    let leases: Api<Lease> = Api::namespaced(bench.client.clone(), &bench.namespace);
    leases.delete("vasto-operator", &DeleteParams::default()).await.unwrap();

    let operator = bench.operator_named("another", Strike::Never);
    let after = bench.settled(3, 2).await;
    assert_eq!(replicas(&topology(&after)), replicas(&topology(&before)), "the same replicas");
    assert!(topology(&after).version >= topology(&before).version, "versions never go back");
    assert_eq!((pod_uids(&bench).await, bench.fleet.copied()), (pods, copied), "no store was restarted, no data moved");

    // In the middle of a change, and while the operator works.
    for phase in [Phase::Prepare, Phase::Fence, Phase::Cleanup] {
        let shards = if stores(&bench).await.spec.replicas == Some(3) { 4 } else { 3 };
        reach(&bench, &operator, phase, shards).await;
        wipe_status(&bench).await;
        bench.fleet.hold(|h| *h = vasto_tests::fleet::Holds::default());
        bench.settled(shards, 2).await;
        bench.until_claims(0..shards).await;
    }
    good(&bench, &[&operator], &uid).await;
}

/// What hasn't been seen is unknown: a new operator says neither that all is well nor that all is lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_observed_is_unknown() {
    let bench = Bench::new("unseen").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 2, 2).await.uid().to_owned();
    operator.kill();
    let version = topology(&bench.keyspaces().get("packages").await.unwrap()).version;
    for pod in ["packages-store-0", "packages-store-1"] {
        bench.fleet.silent(pod, true);
    }
    let operator = bench.operator();
    let unseen = bench.until("Ready is unknown", |k| condition(k, "Ready").0 == "Unknown").await;
    assert_eq!(condition(&unseen, "Ready").1, "NotObserved");
    let status = unseen.status.clone().unwrap();
    assert!(status.stores.iter().all(|s| s.state == Some(StoreState::Unknown)), "{:?}", status.stores);
    assert_eq!(topology(&unseen).version, version, "nothing is changed on no knowledge");
    for pod in ["packages-store-0", "packages-store-1"] {
        bench.fleet.silent(pod, false);
    }
    bench.settled(2, 2).await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_at_once_starts_anew_and_moves_nothing() {
    let bench = Bench::new("cold").await;
    let operator = bench.operator();
    let before = in_use(&bench, 3, 2).await;
    let uid = before.uid().to_owned();
    let copied = bench.fleet.copied();
    bench.fleet.expect_outage(&uid, true);
    operator.kill();
    let pods = pod_uids(&bench).await;
    for pod in pods.keys() {
        bench.pods().delete(pod, &DeleteParams::default()).await.unwrap();
    }
    let operator = bench.operator();
    // What the status says meanwhile is of before.
    bench
        .wait("all stores run again", async || {
            let now = pod_uids(&bench).await;
            pods.iter().all(|(name, uid)| now.get(name).is_some_and(|u| u != uid))
                && bench.fleet.with(|w| w.stores.len() == pods.len())
        })
        .await;
    let after = bench.settled(3, 2).await;
    bench.fleet.expect_outage(&uid, false);
    assert_eq!(replicas(&topology(&after)), replicas(&topology(&before)));
    assert_eq!(bench.fleet.copied(), copied, "nothing was copied");
    good(&bench, &[&operator], &uid).await;
}

/// More than it works on at once.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_starts_amid_many_keyspaces_serves_them_all() {
    let bench = Bench::new("many").await;
    let count = 24;
    for number in 0..count {
        let object =
            json!({"metadata": {"name": format!("ks-{number}")}, "spec": {"shards": 1, "replicationFactor": 1}});
        vasto_tests::control_plane::create::<Keyspace>(&bench.client, Some(&bench.namespace), object).await;
    }
    let served = async || {
        let all = bench.keyspaces().list(&ListParams::default()).await.unwrap();
        all.iter().filter(|k| settled(k, 1, 1)).count() == count
    };
    let operator = bench.operator_named("operator-a", Strike::Never);
    bench.wait("all are served", served).await;
    operator.kill();
    // And again, by one that finds them as they are.
    let operator = bench.operator_named("operator-a", Strike::Never);
    for number in 0..count {
        let shards = json!({"spec": {"shards": 2}});
        let name = format!("ks-{number}");
        bench.keyspaces().patch(&name, &PatchParams::default(), &Patch::Merge(&shards)).await.unwrap();
    }
    bench
        .wait("all have grown", async || {
            let all = bench.keyspaces().list(&ListParams::default()).await.unwrap();
            all.iter().filter(|k| settled(k, 2, 1)).count() == count
        })
        .await;
    operator.tap.clean();
}

// ---- others ----

#[tokio::test(flavor = "multi_thread")]
async fn another_field_manager_is_reported_and_not_fought() {
    let bench = Bench::new("fields").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 2, 2).await.uid().to_owned();
    let budgets: Api<PodDisruptionBudget> = Api::namespaced(bench.client.clone(), &bench.namespace);
    let wish = |most: u32| {
        json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "packages-store"},
               "spec": {"maxUnavailable": most}})
    };
    operator.tap.reset(Strike::Never);
    let theirs = PatchParams::apply("somebody-else").force();
    budgets.patch("packages-store", &theirs, &Patch::Apply(wish(2))).await.unwrap();
    let told = bench.until("it is reported", |k| condition(k, "Degraded").1 == "FieldConflict").await;
    let said = message(&told, "Degraded");
    assert!(said.contains("somebody-else") && said.contains("maxUnavailable"), "{said}");
    bench.fleet.write(&uid, 5);
    tokio::time::sleep(timings().tick * 12).await;
    let left = budgets.get("packages-store").await.unwrap().spec.unwrap().max_unavailable;
    assert_eq!(serde_json::to_value(left).unwrap(), json!(2), "it is theirs");
    let tried = operator.tap.writes().into_iter().filter(|w| w.path.contains("poddisruptionbudgets")).count();
    assert!(tried <= 2, "it was tried {tried} times");

    // As the message says.
    let ours = PatchParams::apply("vasto-operator").force();
    let mut own = budgets.get("packages-store").await.unwrap();
    own.metadata.managed_fields = None;
    own.metadata.resource_version = None;
    own.status = None;
    own.spec.as_mut().unwrap().max_unavailable =
        Some(k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(1));
    budgets.patch("packages-store", &ours, &Patch::Apply(own)).await.unwrap();
    bench.until("it is well", |k| condition(k, "Degraded").0 == "False").await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_somebody_elses_is_left_alone() {
    let bench = Bench::new("taken").await;
    let theirs = json!({"metadata": {"name": "packages"}, "spec": {"ports": [{"port": 80}], "clusterIP": "None"}});
    let before: Service = vasto_tests::control_plane::create(&bench.client, Some(&bench.namespace), theirs).await;
    let operator = bench.operator();
    bench.create(1, 1).await;
    let told = bench.until("it is reported", |k| condition(k, "Degraded").1 == "NameTaken").await;
    assert!(message(&told, "Degraded").contains("Service packages exists"), "{}", message(&told, "Degraded"));
    let services: Api<Service> = Api::namespaced(bench.client.clone(), &bench.namespace);
    assert_eq!(services.get("packages").await.unwrap(), before);
    services.delete("packages", &DeleteParams::default()).await.unwrap();
    bench.settled(1, 1).await;
    operator.tap.clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_changed_or_deleted_by_hand_comes_back() {
    let bench = Bench::new("hand").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 3, 2).await.uid().to_owned();
    let pods = pod_uids(&bench).await;
    let services: Api<Service> = Api::namespaced(bench.client.clone(), &bench.namespace);
    services.delete("packages", &DeleteParams::default()).await.unwrap();
    bench.wait("the service is back", async || services.get_opt("packages").await.unwrap().is_some()).await;
    // Somebody scales the StatefulSet itself down: no data may be lost by that, and it comes back.
    let sets: Api<StatefulSet> = Api::namespaced(bench.client.clone(), &bench.namespace);
    let scale = json!({"spec": {"replicas": 2}});
    sets.patch_scale("packages-store", &PatchParams::default(), &Patch::Merge(&scale)).await.unwrap();
    bench
        .wait("three pods again, or a report", async || {
            let keyspace = bench.keyspaces().get("packages").await.unwrap();
            stores(&bench).await.spec.replicas == Some(3) || condition(&keyspace, "Degraded").1 == "FieldConflict"
        })
        .await;
    bench.until_claims(0..3).await;
    if stores(&bench).await.spec.replicas != Some(3) {
        println!("somebody else's number of pods was reported, not fought");
        sets.patch_scale("packages-store", &PatchParams::default(), &Patch::Merge(&json!({"spec": {"replicas": 3}})))
            .await
            .unwrap();
    }
    bench.settled(3, 2).await;
    let kept = pod_uids(&bench).await;
    assert_eq!(
        (&kept["packages-store-0"], &kept["packages-store-1"]),
        (&pods["packages-store-0"], &pods["packages-store-1"])
    );
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_goes_without_an_operator() {
    let bench = Bench::new("namespace").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 2, 2).await.uid().to_owned();
    bench.fleet.forget(&uid);
    operator.kill();
    let namespaces: Api<Namespace> = Api::all(bench.client.clone());
    let began = Instant::now();
    namespaces.delete(&bench.namespace, &DeleteParams::default()).await.unwrap();
    bench.wait("the namespace is gone", async || namespaces.get_opt(&bench.namespace).await.unwrap().is_none()).await;
    println!("a namespace with a keyspace was gone {:?} after it was deleted", began.elapsed());
}

// ---- pods and volumes ----

#[tokio::test(flavor = "multi_thread")]
async fn stores_are_restarted_one_at_a_time_and_only_for_a_reason() {
    let bench = Bench::new("roll").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 3, 2).await.uid().to_owned();
    let first = pod_uids(&bench).await;
    // What is no pod's affair restarts none.
    bench.patch(json!({"spec": {"collectionGrace": "48h", "durability": "Synced", "storage": {"size": "11Gi"}}})).await;
    bench.settled(3, 2).await;
    // Another operator, with another image and another idea of a pod, restarts none either.
    operator.stop().await;
    let newer = Manner {
        image: "registry.test/vasto:2".to_owned(),
        service: OTHER_SERVICE.to_owned(),
        pod: "operator-b".to_owned(),
        ..Manner::default()
    };
    let operator = bench.operator_as(newer);
    let waiting = bench.until("it says that it would", |k| condition(k, "RequiresUpdate").0 == "True").await;
    println!("{}", message(&waiting, "RequiresUpdate"));
    bench.settled(3, 2).await;
    assert_eq!(pod_uids(&bench).await, first);

    // Asked to, it restarts each, and every shard is served all the while (the ledger sees to that).
    let writer = bench.fleet.writer(&uid);
    bench.patch(json!({"metadata": {"annotations": {"vasto.io/restart": "2026-01-01T00:00:00Z"}}})).await;
    let another = async |before: &BTreeMap<String, String>| {
        let now = pod_uids(&bench).await;
        now.len() == before.len() && before.iter().all(|(name, uid)| now.get(name).is_some_and(|u| u != uid))
    };
    bench.wait("all pods are others", async || another(&first).await).await;
    bench.until("up to date", |k| condition(k, "RequiresUpdate").0 == "False" && settled(k, 3, 2)).await;
    let second = pod_uids(&bench).await;
    let pod = bench.pods().get("packages-store-0").await.unwrap();
    assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some(crate::bench::IMAGE), "the image stays");

    for change in [
        json!({"spec": {"resources": {"limits": {"memory": "1Gi"}}}}),
        json!({"spec": {"image": "registry.test/vasto:2"}}),
    ] {
        let before = pod_uids(&bench).await;
        bench.patch(change).await;
        bench.wait("all pods are others", async || another(&before).await).await;
        bench.settled(3, 2).await;
    }
    drop(writer);
    assert_ne!(second, first);
    let pod = bench.pods().get("packages-store-2").await.unwrap();
    assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some("registry.test/vasto:2"));
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_roll_out_waits_while_a_copy_is_missing() {
    let bench = Bench::new("gate").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 3, 2).await.uid().to_owned();
    bench.fleet.silent("packages-store-0", true);
    let away = |k: &Keyspace| k.status.iter().flat_map(|s| &s.stores).any(|s| s.state == Some(StoreState::Away));
    bench.until("store-0 is away", away).await;
    let before = pod_uids(&bench).await;
    bench.patch(json!({"spec": {"resources": {"limits": {"memory": "1Gi"}}}})).await;
    bench.until("it waits", |k| condition(k, "Progressing").1 == "Rolling").await;
    tokio::time::sleep(timings().tick * 8).await;
    assert_eq!(pod_uids(&bench).await, before, "a store was restarted while another was away");
    bench.fleet.silent("packages-store-0", false);
    bench
        .wait("all pods are others", async || {
            let now = pod_uids(&bench).await;
            now.len() == 3 && before.iter().all(|(name, uid)| now.get(name).is_some_and(|u| u != uid))
        })
        .await;
    bench.settled(3, 2).await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_grow_and_a_full_disk_is_cured_by_it() {
    let bench = Bench::new("volumes").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 3, 2).await.uid().to_owned();
    bench.fleet.full("data-packages-store-1", true);
    let full = bench.until("a disk is full", |k| condition(k, "Degraded").1 == "DiskFull").await;
    assert!(message(&full, "Degraded").contains("store-1 refuses writes"), "{}", message(&full, "Degraded"));
    assert_eq!(condition(&full, "Ready").0, "True", "it is still read");
    // A shrink would have to go there: it waits and says why.
    bench.scale(2, None).await;
    let waits = bench.until("it waits for room", |k| message(k, "Progressing").contains("store-1")).await;
    println!("{}", message(&waits, "Progressing"));
    assert_eq!(waits.status.as_ref().and_then(|s| s.phase), Some(Phase::Ready));
    bench.patch(json!({"spec": {"storage": {"size": "20Gi"}}})).await;
    bench.settled(2, 2).await;
    bench.until("it is well", |k| condition(k, "Degraded").0 == "False").await;
    bench
        .wait("all claims have grown", async || {
            let claims = bench.claims().list(&ListParams::default()).await.unwrap();
            claims.iter().all(|c| {
                let capacity = c.status.as_ref().and_then(|s| s.capacity.as_ref()?.get("storage").cloned());
                capacity.is_some_and(|c| c.0 == "20Gi")
            })
        })
        .await;
    // Stores that come later have the size at once... or grow to it.
    bench.scale(3, None).await;
    bench.settled(3, 2).await;
    bench
        .wait("the new one too", async || {
            let claim = bench.claims().get("data-packages-store-2").await.unwrap();
            let capacity = claim.status.and_then(|s| s.capacity?.get("storage").cloned());
            capacity.is_some_and(|c| c.0 == "20Gi")
        })
        .await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_that_can_not_grow_is_reported() {
    let bench = Bench::new("fixed").await;
    let operator = bench.operator();
    let mut spec = KeyspaceSpec::new(2, 2);
    spec.storage.storage_class_name = Some("fixed".to_owned());
    let uid = in_use_spec(&bench, spec).await.uid().to_owned();
    bench.patch(json!({"spec": {"storage": {"size": "20Gi"}}})).await;
    let told = bench.until("it is reported", |k| condition(k, "Degraded").1 == "VolumeNotGrown").await;
    println!("{}", message(&told, "Degraded"));
    operator.tap.reset(Strike::Never);
    tokio::time::sleep(timings().tick * 8).await;
    let tried = operator.tap.writes().into_iter().filter(|w| w.path.contains("persistentvolumeclaims")).count();
    assert!(tried <= 4, "what can't be is tried {tried} times in {:?}", timings().tick * 8);
    // All else goes on.
    bench.scale(3, None).await;
    bench
        .until("three shards", |k| {
            k.status.as_ref().is_some_and(|s| s.shards == Some(3) && s.phase == Some(Phase::Ready))
        })
        .await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_finds_no_node_is_named_and_holds_up_nothing_else() {
    let bench = Bench::new("pending").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 5, 2).await.uid().to_owned();
    // store-2 is gone from its node and finds no other.
    bench.fleet.unschedulable("packages-store-2", Some("0/3 nodes are available: 3 Insufficient memory."));
    bench.pods().delete("packages-store-2", &DeleteParams::default()).await.unwrap();
    let told = bench.until("the pod is named", |k| condition(k, "Degraded").1 == "PodUnschedulable").await;
    let said = message(&told, "Degraded");
    assert!(said.contains("packages-store-2") && said.contains("Insufficient memory"), "{said}");
    assert_eq!(condition(&told, "Ready").0, "True", "other copies serve");
    // Another store's volume is lost: its shards are refilled all the same.
    let before = replicas(&topology(&told));
    bench.fleet.wipe("data-packages-store-0");
    bench.fleet.crash("packages-store-0");
    bench
        .until("store-0 is refilled", |k| {
            let t = topology(k);
            let now = replicas(&t);
            let mine =
                |all: &[(u32, String, u64)]| all.iter().filter(|r| r.1 == "store-0").cloned().collect::<Vec<_>>();
            t.phase() == v1::Phase::Stable
                && mine(&now).len() == 2
                && mine(&now).iter().all(|r| r.2 != 0 && !before.contains(r))
        })
        .await;
    // A growth whose new pod finds no node can be called off.
    bench.fleet.unschedulable("packages-store-2", None);
    bench.settled(5, 2).await;
    bench.fleet.unschedulable("packages-store-5", Some("0/3 nodes are available: 3 Insufficient memory."));
    bench.scale(6, None).await;
    bench.until("the new pod is named", |k| message(k, "Degraded").contains("packages-store-5")).await;
    bench.scale(5, None).await;
    bench.settled(5, 2).await;
    bench.until_claims(0..5).await;
    good(&bench, &[&operator], &uid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_volume_is_refilled_and_a_lost_only_copy_is_reported() {
    let bench = Bench::new("lost").await;
    let operator = bench.operator();
    let uid = in_use(&bench, 3, 2).await.uid().to_owned();
    // The pod with its volume.
    let before = topology(&bench.keyspaces().get("packages").await.unwrap());
    bench.claims().delete("data-packages-store-1", &DeleteParams::default()).await.unwrap();
    bench.pods().delete("packages-store-1", &DeleteParams::default()).await.unwrap();
    bench.until("it is made anew", |k| settled(k, 3, 2) && topology(k).version > before.version).await;
    bench.fleet.at_rest(&uid).await;

    // The same with one copy: nobody can bring it back, and it says so.
    bench.scale(3, Some(1)).await;
    bench.settled(3, 1).await;
    bench.fleet.expect_outage(&uid, true);
    bench.claims().delete("data-packages-store-1", &DeleteParams::default()).await.unwrap();
    bench.pods().delete("packages-store-1", &DeleteParams::default()).await.unwrap();
    let lost = bench.until("it is reported", |k| condition(k, "Degraded").1 == "DataLost").await;
    let said = message(&lost, "Degraded");
    println!("{said}");
    assert!(said.contains("data lost for shard 1"), "{said}");
    assert_eq!(condition(&lost, "Ready"), ("False".to_owned(), "ShardsUnavailable".to_owned()));
    tokio::time::sleep(timings().tick * 8).await;
    let still = bench.keyspaces().get("packages").await.unwrap();
    assert_eq!(condition(&still, "Degraded").1, "DataLost", "never silently an empty shard");
    assert_eq!(placement(&topology(&still))[0], [("store-0".to_owned(), true)], "the others serve");
    // The complaint of the ledger is what the test did.
    let complaints = bench.fleet.with(|w| w.complaints());
    assert!(complaints.iter().all(|c| c.contains("shard 1")), "{complaints:?}");
    bench.fleet.excuse_lost(&uid);
    let wish = json!({"store": "store-1", "request": "a-person", "acceptDataLoss": true}).to_string();
    bench.patch(json!({"metadata": {"annotations": {"vasto.io/replace": wish}}})).await;
    bench.settled(3, 1).await;
    operator.tap.clean();
}
