//! Death in every phase: of one store, of the operator, of everything at once;
//! and a change of mind in every phase. Each finishes, and no acknowledged write is lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vasto_client::Op;
use vasto_tests::cluster::{Cluster, topology};
use vasto_tests::oracle::Load;

const PHASES: [&str; 5] = ["Prepare", "Switch", "Fence", "Drain", "Cleanup"];

fn document(durability: &str) -> String {
    format!(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: faults\n\
         spec:\n  shards: 2\n  replicationFactor: 2\n  durability: {durability}\n"
    )
}

fn keys(count: usize) -> Vec<(String, String)> {
    (0..count).map(|i| (format!("key-{i:06}"), format!("{i}-").repeat(60))).collect()
}

/// Waits for this phase, or for a later one: some are over in milliseconds.
async fn reach(cluster: &Cluster, phase: &str) -> String {
    let at = PHASES.iter().position(|p| *p == phase).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = cluster.phase("faults").await.unwrap_or_default();
        if PHASES.iter().position(|p| *p == now).is_some_and(|p| p >= at) {
            return now;
        }
        assert!(Instant::now() < deadline, "{phase} was not reached; it is {now}\n{}", cluster.tail());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Grows and shrinks by turns; in each phase `fault` strikes while writers write.
async fn in_every_phase(durability: &str, strict: bool, fault: impl AsyncFn(&mut Cluster, usize)) {
    let mut cluster = Cluster::start(4, &document(durability));
    cluster.settled("faults", 2, 2, 30).await;
    let mut load = Load::fill(cluster.keyspace("faults").await, keys(5_000), strict).await;
    load.run(4, 2);
    for (round, phase) in PHASES.iter().enumerate() {
        let shards = if round % 2 == 0 { 4 } else { 2 };
        cluster.scale("faults", shards, 2).await;
        let met = reach(&cluster, phase).await;
        let start = Instant::now();
        fault(&mut cluster, round).await;
        cluster.settled("faults", shards, 2, 90).await;
        println!("{durability}: struck in {met}, settled after {:?}", start.elapsed());
    }
    load.stop().await;
    load.verify().await;
    let (code, out, err) = cluster.run(&["check", "faults"]);
    assert_eq!(code, 0, "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_killed_in_any_phase_loses_nothing() {
    in_every_phase("Periodic", false, async |cluster, round| {
        let store = format!("store-{}", round % 4);
        cluster.kill_store(&store);
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.start_store(&store);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_killed_in_any_phase_is_not_noticed() {
    in_every_phase("Periodic", true, async |cluster, _| {
        cluster.kill_operator();
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.start_operator();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_lost_files_come_back_from_the_stores_in_any_phase() {
    in_every_phase("Periodic", true, async |cluster, _| {
        // What no store has heard of is lost with the files, and may be.
        let now = topology(&cluster.describe("faults").await.unwrap()).version;
        let is_heard_of = |resource: &serde_json::Value| {
            let stores = resource["status"]["stores"].as_array();
            stores.into_iter().flatten().any(|store| store["topologyVersion"].as_u64() >= Some(now))
        };
        cluster.wait_for("faults", "a store that has heard of the change", 10, is_heard_of).await;
        cluster.kill_operator();
        std::fs::remove_dir_all(cluster.path().join("operator")).unwrap();
        // Nor is there the file any more: all that was asked for is with the stores.
        let _ = std::fs::remove_file(cluster.path().join("keyspace.yaml"));
        cluster.start_operator();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_killed_at_once_in_any_phase_loses_nothing() {
    in_every_phase("Synced", false, async |cluster, _| cluster.crash()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_mind_in_any_phase_ends_where_it_was_wished_last() {
    let cluster = Cluster::start(4, &document("Periodic"));
    cluster.settled("faults", 2, 2, 30).await;
    let mut load = Load::fill(cluster.keyspace("faults").await, keys(5_000), true).await;
    load.run(4, 2);
    for phase in PHASES {
        cluster.scale("faults", 4, 2).await;
        let met = reach(&cluster, phase).await;
        cluster.scale("faults", 2, 2).await;
        let took = cluster.settled("faults", 2, 2, 90).await;
        println!("2 to 4, and back in {met}: settled after {took:?}");
        cluster.scale("faults", 4, 2).await;
        cluster.settled("faults", 4, 2, 90).await;
        cluster.scale("faults", 2, 2).await;
        let met = reach(&cluster, phase).await;
        cluster.scale("faults", 4, 2).await;
        let took = cluster.settled("faults", 4, 2, 90).await;
        println!("4 to 2, and back in {met}: settled after {took:?}");
        cluster.scale("faults", 2, 2).await;
        cluster.settled("faults", 2, 2, 90).await;
    }
    load.stop().await;
    load.verify().await;
    let (code, out, err) = cluster.run(&["check", "faults"]);
    assert_eq!(code, 0, "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_volume_is_gone_is_filled_anew() {
    let mut cluster = Cluster::start(3, &document("Periodic"));
    cluster.settled("faults", 2, 2, 30).await;
    let load = Load::fill(cluster.keyspace("faults").await, keys(2_000), true).await;
    // What only the lost volume had can't come back: first everything is on both.
    let deadline = Instant::now() + Duration::from_secs(20);
    while cluster.run(&["check", "faults"]).0 != 0 {
        assert!(Instant::now() < deadline, "the replicas don't become equal\n{}", cluster.tail());
    }
    let before = topology(&cluster.describe("faults").await.unwrap());
    cluster.kill_store("store-1");
    std::fs::remove_dir_all(cluster.path().join("store-1")).unwrap();
    cluster.start_store("store-1");
    cluster
        .wait_for("faults", "new replicas on store-1", 60, |resource| {
            let now = topology(resource);
            let old = before.current.iter().flat_map(|v| v.places()).filter(|p| p.assignment.store == "store-1");
            old.into_iter().all(|p| !now.names(p.assignment.replica))
        })
        .await;
    cluster.settled("faults", 2, 2, 60).await;
    load.verify().await;
    let (code, out, err) = cluster.run(&["check", "faults"]);
    assert_eq!(code, 0, "{out}{err}");
}

/// Flips a bit in the largest sorted file of each replica in a store's folder; says how many.
fn damage(store: &Path) -> usize {
    let files = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let keyspace = files(&store.join("keyspaces")).into_iter().find(|path| path.join("replicas").exists()).unwrap();
    let replicas = files(&keyspace.join("replicas"));
    for replica in &replicas {
        let sorted = files(&replica.join("db")).into_iter().filter(|f| f.extension().is_some_and(|e| e == "sst"));
        let largest = sorted.max_by_key(|f| f.metadata().unwrap().len()).unwrap();
        let mut bytes = std::fs::read(&largest).unwrap();
        bytes[100] ^= 0x40;
        std::fs::write(&largest, bytes).unwrap();
    }
    replicas.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_files_are_damaged_is_closed_and_made_anew() {
    let mut cluster = Cluster::start(2, &document("Periodic"));
    cluster.settled("faults", 2, 2, 30).await;
    let load = Load::fill(cluster.keyspace("faults").await, keys(2_000), true).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while cluster.run(&["check", "faults"]).0 != 0 {
        assert!(Instant::now() < deadline, "the replicas don't become equal\n{}", cluster.tail());
    }
    let (code, out, err) = cluster.run(&["check", "faults", "--repair", "--output", "json"]);
    assert_eq!(code, 0, "{out}{err}");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let repaired = report["repaired"].as_array().unwrap();
    assert_eq!(repaired.len(), 4, "{out}");
    assert!(repaired.iter().all(|r| r["ranges"].as_u64() > Some(0) && r["mended"] == 0), "{out}");

    let (code, out, err) = cluster.run(&["keyspace", "compact", "faults"]);
    assert_eq!(code, 0, "{out}{err}");
    let before = topology(&cluster.describe("faults").await.unwrap());
    cluster.kill_store("store-1");
    assert_eq!(damage(&cluster.path().join("store-1")), 2);
    cluster.start_store("store-1");
    // Whoever reads everything meets it.
    let (damaged, operator) = (Arc::new(AtomicBool::new(true)), cluster.operator_address());
    let reading = std::thread::spawn({
        let damaged = damaged.clone();
        move || {
            while damaged.load(Ordering::Relaxed) {
                vasto_tests::cluster::run(&["--operator", &operator, "check", "faults", "--repair"]);
            }
        }
    });
    cluster
        .wait_for("faults", "new replicas on store-1", 60, |resource| {
            let now = topology(resource);
            let old = before.current.iter().flat_map(|v| v.places()).filter(|p| p.assignment.store == "store-1");
            old.into_iter().all(|p| !now.names(p.assignment.replica))
        })
        .await;
    damaged.store(false, Ordering::Relaxed);
    reading.join().unwrap();
    cluster.settled("faults", 2, 2, 60).await;
    load.verify().await;
    let (code, out, err) = cluster.run(&["check", "faults"]);
    assert_eq!(code, 0, "{out}{err}");
    let log = std::fs::read_to_string(cluster.path().join("store-1.log")).unwrap();
    assert_eq!(log.matches("a damaged replica is closed").count(), 2, "{}", cluster.tail());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_told_to_stop_hands_on_all_that_it_took() {
    let mut cluster = Cluster::start(2, &document("Periodic"));
    cluster.settled("faults", 2, 2, 30).await;
    let mut load = Load::fill(cluster.keyspace("faults").await, keys(5_000), true).await;
    load.run(4, 2);
    let counts = load.counts.clone();
    let more_writes = async || {
        let (before, deadline) = (counts.writes.load(Ordering::Relaxed), Instant::now() + Duration::from_secs(30));
        while counts.writes.load(Ordering::Relaxed) < before + 500 {
            assert!(Instant::now() < deadline, "no writes are taken");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    more_writes().await;
    println!("store-0 stopped within {:?}", cluster.stop_store("store-0"));
    // Nobody will ever ask it again.
    std::fs::remove_dir_all(cluster.path().join("store-0")).unwrap();
    more_writes().await;
    load.stop().await;
    load.verify().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_given_up_hands_over_what_it_alone_has() {
    let mut cluster = Cluster::start(2, &(document("Periodic") + "  storeLostAfter: 8s\n"));
    cluster.settled("faults", 2, 2, 30).await;
    let keyspace = cluster.keyspace("faults").await;
    // Once a write is taken the topology is published, so synced by both stores.
    keyspace.put("first", "on both").await.unwrap();
    cluster.kill_store("store-1");
    let start = Instant::now();
    let alone = (0..200).map(|i| Op::put(format!("alone-{i}"), "on store-0"));
    for result in keyspace.batch(alone).await {
        result.unwrap();
    }
    println!("with store-1 dead, 200 writes took {:?}", start.elapsed());
    cluster.kill_store("store-0");
    cluster.start_store("store-1");
    cluster
        .wait_for("faults", "store-0's replicas given up", 60, |resource| {
            let given_up = topology(resource).given_up;
            given_up.len() == 2 && given_up.iter().all(|g| g.store == "store-0")
        })
        .await;
    keyspace.put("later", "on store-1").await.unwrap();
    assert_eq!(keyspace.get("alone-0").await.unwrap(), None, "store-1 never had it");
    cluster.start_store("store-0");
    cluster.wait_for("faults", "store-0 filled anew", 60, |resource| topology(resource).given_up.is_empty()).await;
    cluster.settled("faults", 2, 2, 60).await;
    // One replica of each shard takes over; the others follow it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while cluster.run(&["check", "faults"]).0 != 0 {
        assert!(Instant::now() < deadline, "the replicas don't become equal\n{}", cluster.tail());
    }
    for i in 0..200 {
        assert!(keyspace.get(format!("alone-{i}")).await.unwrap().is_some(), "alone-{i} is lost");
    }
    assert!(keyspace.get("later").await.unwrap().is_some());
    let (code, out, err) = cluster.run(&["check", "faults"]);
    assert_eq!(code, 0, "{out}{err}");
}
