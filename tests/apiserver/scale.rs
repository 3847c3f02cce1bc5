//! Many keyspaces amid much that is not Vasto's: at rest nothing is written, and the
//! operator's memory follows its own keyspaces, not the cluster.
//!
//! `VASTO_SCALE_KEYSPACES` (of which a tenth have stores), `VASTO_SCALE_FOREIGN`: how many.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::json;
use vasto_crds::{Keyspace, Phase};
use vasto_operator::kube::Timings;
use vasto_tests::control_plane::{create, mebibytes, resident};
use vasto_tests::fleet::Fleet;

use crate::bench::{Bench, Manner, fresh_namespace, own_plane};
use crate::tap::Strike;

/// Requests at once.
const AT_ONCE: usize = 32;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keyspaces_amid_foreign_objects() {
    let (keyspaces, foreign) = (number("VASTO_SCALE_KEYSPACES", 1_000), number("VASTO_SCALE_FOREIGN", 10_000));
    let with_stores = keyspaces / 10;
    let plane = own_plane().await;
    let namespace = fresh_namespace("scale");
    plane.namespace(&namespace).await;
    let client = plane.client();
    let me = std::process::id();

    let began = Instant::now();
    strew(&client, &namespace, foreign).await;
    println!("{foreign} foreign objects after {:.1} s", began.elapsed().as_secs_f64());

    let fleet = Arc::new(Fleet::start(&client, &namespace));
    let bench = Bench::over(plane.clone(), namespace.clone(), client.clone(), fleet);
    let before = resident(me);
    // With a lease as in earnest: the machine is busy.
    let manner = Manner { cluster: true, timings: Timings::default(), ..Manner::default() };
    let operator = bench.operator_as(manner.clone());
    let began = Instant::now();
    futures::stream::iter(0..keyspaces)
        .for_each_concurrent(AT_ONCE, |n| {
            let (client, namespace) = (client.clone(), namespace.clone());
            async move {
                // Those without stores wait: paused, nothing is made for them.
                let spec = json!({"shards": 1, "replicationFactor": 1, "paused": n >= with_stores});
                create::<Keyspace>(
                    &client,
                    Some(&namespace),
                    json!({"metadata": {"name": format!("ks-{n}")}, "spec": spec}),
                )
                .await;
            }
        })
        .await;
    println!("{keyspaces} keyspaces made after {:.1} s", began.elapsed().as_secs_f64());
    let deadline = Instant::now() + Duration::from_secs(number("VASTO_SCALE_SECONDS", 300) as u64);
    let mut said = Instant::now();
    loop {
        let all = bench.keyspaces().list(&ListParams::default()).await.unwrap();
        let count = |phase| all.iter().filter(|k| k.status.as_ref().and_then(|s| s.phase) == Some(phase)).count();
        let (ready, pending) = (count(Phase::Ready), count(Phase::Pending));
        if ready == with_stores && pending == keyspaces - with_stores {
            break;
        }
        if Instant::now() > deadline {
            let stuck = |k: &&Keyspace| !k.spec.paused && k.status.as_ref().and_then(|s| s.phase) != Some(Phase::Ready);
            for keyspace in all.iter().filter(stuck).take(3) {
                println!("{:#}", serde_json::to_value(keyspace).unwrap());
                let pod = bench.pods().get_opt(&format!("{}-store-0", keyspace.name_any())).await.unwrap();
                println!("{:#}", serde_json::to_value(pod).unwrap());
            }
            panic!("{ready} of {with_stores} ready, {pending} pending\n{}", bench.fleet.describe());
        }
        if said.elapsed() > Duration::from_secs(10) {
            println!("{ready} of {with_stores} ready, {pending} pending after {:.0} s", began.elapsed().as_secs_f64());
            said = Instant::now();
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!("{with_stores} ready, the others pending, after {:.1} s", began.elapsed().as_secs_f64());

    // At rest: ten seconds without a write but the lease's.
    let quiet = Duration::from_secs(10);
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        operator.tap.reset(Strike::Never);
        let processor = processor_seconds();
        tokio::time::sleep(quiet).await;
        let writes = operator.tap.writes();
        let spent = processor_seconds() - processor;
        if writes.is_empty() {
            println!(
                "at rest: no write in {quiet:?}; this process (operator and {with_stores} stores) took {spent:.2} s of processor time"
            );
            break;
        }
        let first: Vec<String> = writes.iter().take(5).map(crate::tap::Write::brief).collect();
        assert!(Instant::now() < deadline, "{} writes in {quiet:?} though nothing changes: {first:#?}", writes.len());
    }
    let memory = resident(me).saturating_sub(before);
    println!(
        "memory of this process grew by {} for the operator and {with_stores} stores; {} a keyspace; the API server has {}",
        mebibytes(memory),
        mebibytes(memory / keyspaces as u64),
        mebibytes(plane.apiserver_memory())
    );

    // One more is as quick as the first.
    let began = Instant::now();
    create::<Keyspace>(
        &client,
        Some(&namespace),
        json!({"metadata": {"name": "packages"}, "spec": {"shards": 2, "replicationFactor": 2}}),
    )
    .await;
    bench.settled(2, 2).await;
    println!("one more was ready after {:?}", began.elapsed());

    // A new operator has to learn all of it again, and changes nothing.
    operator.kill();
    let before = resident(me);
    let began = Instant::now();
    let operator = bench.operator_as(manner);
    bench.scale(3, None).await;
    bench.settled(3, 2).await;
    println!(
        "a new operator led and had grown a keyspace after {:?}; memory {}",
        began.elapsed(),
        mebibytes(resident(me).saturating_sub(before))
    );
    let others: Vec<String> = operator
        .tap
        .writes()
        .iter()
        .filter(|w| w.path.contains("/ks-") && !w.path.ends_with("/status"))
        .map(crate::tap::Write::brief)
        .collect();
    assert_eq!(others, Vec::<String>::new(), "a takeover changes nothing");
    operator.tap.clean();
}

/// What others have in the cluster, some of it in the very namespace.
async fn strew(client: &kube::Client, namespace: &str, count: usize) {
    let (client, namespace) = (client.clone(), namespace.to_owned());
    futures::stream::iter(0..count)
        .for_each_concurrent(AT_ONCE, |n| {
            let (client, namespace) = (client.clone(), namespace.clone());
            async move {
                let namespace = if n % 3 == 0 { "default" } else { &namespace };
                let meta = json!({"name": format!("foreign-{n}"), "labels": {"app": "other"}});
                let text = "x".repeat(2_000);
                match n % 10 {
                    0 => {
                        let spec = json!({"containers": [{"name": "other", "image": "other"}], "automountServiceAccountToken": false});
                        drop(create::<Pod>(&client, Some(namespace), json!({"metadata": meta, "spec": spec})).await);
                    }
                    1..=4 => {
                        let secret = json!({"metadata": meta, "stringData": {"text": text}});
                        drop(create::<Secret>(&client, Some(namespace), secret).await);
                    }
                    _ => {
                        let map = json!({"metadata": meta, "data": {"text": text}});
                        drop(create::<ConfigMap>(&client, Some(namespace), map).await);
                    }
                }
            }
        })
        .await;
    let pods: Api<Pod> = Api::all(client);
    assert!(!pods.list(&ListParams::default().limit(1)).await.unwrap().items.is_empty());
}

/// Processor time of this process so far, in seconds.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
