//! A keyspace grows, shrinks, changes its replication factor and has a store
//! replaced while it is written and read: nothing fails, nothing is lost.

use std::time::{Duration, Instant};

use vasto_client::hash::{jump_hash, partition_hash};
use vasto_tests::cluster::{Cluster, topology};
use vasto_tests::oracle::Load;
use vasto_tests::packages;

fn document(shards: u32, replication_factor: u32) -> String {
    format!(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: packages\n\
         spec:\n  shards: {shards}\n  replicationFactor: {replication_factor}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_keyspace_grows_and_shrinks() {
    let cluster = Cluster::start(5, &document(3, 2));
    cluster.settled("packages", 3, 2, 30).await;
    let keys = (0..2_000).map(|i| (format!("key-{i}"), format!("text-{i}"))).collect();
    let mut load = Load::fill(cluster.keyspace("packages").await, keys, true).await;
    load.run(4, 4);
    // Through one shard and back: what a shard deleted as foreign must come back to it.
    for (shards, rf) in [(5, 2), (2, 2), (4, 2), (4, 3), (4, 1), (1, 1), (3, 1), (1, 1), (4, 2)] {
        let start = Instant::now();
        cluster.scale("packages", shards, rf).await;
        cluster.settled("packages", shards, rf, 60).await;
        println!("to {shards} shards, factor {rf}: {:?}", start.elapsed());
    }
    replace(&cluster, 4, 2).await;
    cluster.scale("packages", 4, 1).await;
    cluster.settled("packages", 4, 1, 60).await;
    replace(&cluster, 4, 1).await;
    load.stop().await;
    load.verify().await;
    let (code, out, err) = cluster.run(&["check", "packages"]);
    assert_eq!(code, 0, "{out}{err}");
}

/// Copies that must be made at the least: for each key, the stores that hold it in
/// the new placement and not in the old one.
fn ideal(keys: &[String], from: (u32, u32), to: (u32, u32)) -> usize {
    let stores = |hash, (shards, rf): (u32, u32)| {
        let shard = jump_hash(hash, shards);
        (0..rf).map(move |i| (shard, (shard + i) % shards))
    };
    keys.iter()
        .map(|key| {
            let hash = partition_hash(key.as_bytes());
            let old: Vec<_> = stores(hash, from).collect();
            stores(hash, to).filter(|place| !old.contains(place)).count()
        })
        .sum()
}

/// The replicas on a store, by id.
fn replicas_on(resource: &serde_json::Value, store: &str) -> Vec<String> {
    let topology = topology(resource);
    let places = topology.current.unwrap_or_default();
    places.places().filter(|p| p.assignment.store == store).map(|p| format!("{:016x}", p.assignment.replica)).collect()
}

/// Empties store-1 and fills it anew: its replicas are others afterwards.
async fn replace(cluster: &Cluster, shards: u32, replication_factor: u32) -> f64 {
    let start = Instant::now();
    let before = replicas_on(&cluster.describe("packages").await.unwrap(), "store-1");
    cluster.replace("packages", "store-1").await;
    cluster
        .wait_for("packages", "store-1 with other replicas", 180, |resource| {
            let now = replicas_on(resource, "store-1");
            now.len() == before.len() && now.iter().all(|id| !before.contains(id) && id != "0000000000000000")
        })
        .await;
    cluster.settled("packages", shards, replication_factor, 60).await;
    start.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_debian_package_index_stays_whole_through_every_change() {
    let packages = packages::debian();
    let cluster = Cluster::start(6, &document(3, 2));
    cluster.settled("packages", 3, 2, 30).await;
    let start = Instant::now();
    let bytes: usize = packages.iter().map(|(k, v)| k.len() + v.len()).sum();
    let count = packages.len();
    let names: Vec<String> = packages.iter().map(|(key, _)| key.clone()).collect();
    let mut load = Load::fill(cluster.keyspace("packages").await, packages, true).await;
    println!("loaded {count} records, {} MB, in {:?}", bytes >> 20, start.elapsed());
    load.run(8, 8);
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!(
        "{:<20} {:>7} {:>8} {:>8} {:>6} {:>10} {:>10}",
        "step", "seconds", "moved", "ideal", "MB/s", "p99 before", "p99 during"
    );
    let mut from = (3, 2);
    for to in [(5, 2), (2, 2), (4, 2), (4, 3), (4, 1), (4, 2)] {
        let _ = load.p99_ms();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = load.p99_ms();
        let start = Instant::now();
        cluster.scale("packages", to.0, to.1).await;
        let watched = cluster.copied_until_settled("packages", to.0, to.1, 180).await;
        println!(
            "{:<20} {:>7.1} {:>8} {:>8} {:>6.0} {before:>10.1} {:>10.1}",
            format!("{} shards, factor {}", to.0, to.1),
            start.elapsed().as_secs_f64(),
            watched.records,
            ideal(&names, from, to),
            watched.bytes as f64 / 1e6 / watched.seconds.max(0.01),
            load.p99_ms()
        );
        from = to;
    }
    for rf in [2, 1] {
        cluster.scale("packages", 4, rf).await;
        cluster.settled("packages", 4, rf, 180).await;
        let before = load.p99_ms();
        let seconds = replace(&cluster, 4, rf).await;
        println!("{:<22} {seconds:>8.1} {before:>10.1} {:>10.1}", format!("replace at factor {rf}"), load.p99_ms());
    }
    load.stop().await;
    load.verify().await;
    let (code, out, err) = cluster.run(&["check", "packages"]);
    assert_eq!(code, 0, "{out}{err}");
}
