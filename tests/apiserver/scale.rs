//! Many keyspaces amid much that is not Vasto's: at rest nothing is written, and the
//! operator's memory follows its own keyspaces, not the cluster.
//!
//! How many: `VASTO_SCALE_KEYSPACES`, of which `VASTO_SCALE_STORES` have a store (the others are paused before
//! anything is made for them), `VASTO_SCALE_FOREIGN`; for at most `VASTO_SCALE_SECONDS`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::json;
use vasto_crds::{Keyspace, Phase};
use vasto_operator::kube::Timings;
use vasto_tests::cluster::vasto;
use vasto_tests::control_plane::{create, mebibytes, resident};
use vasto_tests::fleet::Fleet;

use crate::bench::{Bench, IMAGE, Manner, SERVICE, fresh_namespace, own_plane};
use crate::tap::Strike;

/// Requests at once.
const AT_ONCE: usize = 32;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keyspaces_amid_foreign_objects() {
    let (keyspaces, foreign) = (number("VASTO_SCALE_KEYSPACES", 1_000), number("VASTO_SCALE_FOREIGN", 10_000));
    let with_stores = number("VASTO_SCALE_STORES", 300).min(keyspaces);
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
    println!("reconciling: {}", reconciling(&operator.monitor.encode()));

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
    operator.stop().await;
    alone(&bench, keyspaces + 1, foreign).await;
}

/// The same as a process of its own, as it runs in a pod: what it takes.
async fn alone(bench: &Bench, keyspaces: usize, foreign: usize) {
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (listen, http) = (port(), port());
    let process = Command::new(vasto())
        .args(["operator", "--listen", &listen.to_string(), "--http", &http.to_string()])
        .env("KUBECONFIG", bench.plane.kubeconfig())
        .envs([
            ("VASTO_IMAGE", IMAGE),
            ("VASTO_SERVICE", SERVICE),
            ("POD_NAME", "alone"),
            ("POD_NAMESPACE", "vasto-system"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let process = Killed(process);
    bench.found_at(&listen.to_string());
    let began = Instant::now();
    let mut seen = String::new();
    bench
        .wait("the process has looked at every keyspace", async || {
            seen = get(http, "/metrics").unwrap_or_default();
            measure(&seen, "vasto_operator_leader") == 1.0
                && measure(&seen, "vasto_operator_reconcile_duration_seconds_count") >= keyspaces as f64
        })
        .await;
    let memory = resident(process.0.id());
    println!(
        "`vasto operator` with {keyspaces} keyspaces amid {foreign} foreign objects: all looked at after {:.1} s, {}; \
         {} resident",
        began.elapsed().as_secs_f64(),
        reconciling(&seen),
        mebibytes(memory)
    );
    assert!(memory < 256 << 20, "its memory is to follow its own keyspaces: {}", mebibytes(memory));
}

/// Killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The sum of all series of this name.
fn measure(metrics: &str, name: &str) -> f64 {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?.trim_start();
        let rest = if rest.starts_with('{') { rest.split_once('}')?.1 } else { rest };
        rest.trim().parse::<f64>().ok()
    };
    metrics.lines().filter_map(value).sum()
}

fn reconciling(metrics: &str) -> String {
    let name = "vasto_operator_reconcile_duration_seconds";
    let (count, sum) = (measure(metrics, &format!("{name}_count")), measure(metrics, &format!("{name}_sum")));
    format!("{count:.0} looks of {:.2} ms each", 1_000.0 * sum / count.max(1.0))
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
