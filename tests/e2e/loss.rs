//! Pods, volumes and nodes that go away.

use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use crate::base::{PACKAGES, Run};
use crate::cluster;
use crate::kube::{Seen, ready, restarts, uid, until};
use crate::load::Load;

const POD: &str = "packages-store-1";
const STORE: &str = "store-1";
const CLAIM: &str = "data-packages-store-1";

pub fn delete_a_pod(run: &mut Run) -> anyhow::Result<()> {
    let old = uid(&run.pod(POD)?).to_owned();
    let replicas = run.replicas(PACKAGES)?;
    run.kube.ctl_within(120, &["delete", "pod", POD])?;
    run.another(POD, &old, 120)?;
    run.settled(PACKAGES, 3, 2, 60)?;
    ensure!(run.replicas(PACKAGES)? == replicas, "a store with its volume made its replicas anew");
    Ok(())
}

/// The ids of the replicas of one store.
fn replicas_of(run: &Run, store: &str) -> anyhow::Result<Vec<u64>> {
    Ok(run.replicas(PACKAGES)?.into_iter().filter(|(name, ..)| name == store).map(|(.., id)| id).collect())
}

/// Waits until a store serves as many replicas as before, all of them others.
fn filled_anew(run: &Run, store: &str, before: &[u64]) -> anyhow::Result<()> {
    until(&format!("{store} with other replicas"), 180, || {
        let now = replicas_of(run, store)?;
        let fine = now.len() == before.len() && now.iter().all(|id| *id != 0 && !before.contains(id));
        Ok(Seen::when(fine, || format!("replicas {now:x?}, before {before:x?}")))
    })?;
    run.settled(PACKAGES, 3, 2, 60).map(drop)
}

pub fn delete_a_pod_with_its_volume(run: &mut Run) -> anyhow::Result<()> {
    let old = uid(&run.pod(POD)?).to_owned();
    let volumes = run.volumes(PACKAGES)?;
    let before = replicas_of(run, STORE)?;
    run.kube.ctl(&["delete", "persistentvolumeclaim", CLAIM, "--wait=false"])?;
    run.kube.ctl_within(120, &["delete", "pod", POD])?;
    run.another(POD, &old, 120)?;
    ensure!(run.volumes(PACKAGES)?.get(CLAIM) != volumes.get(CLAIM), "the volume is still the old one");
    filled_anew(run, STORE, &before)
}

/// As a person asks for it: kubectl's plugin, which is the same binary.
pub fn replace_a_store(run: &mut Run) -> anyhow::Result<()> {
    let before = replicas_of(run, STORE)?;
    run.kube.ctl(&["vasto", "replace", PACKAGES, STORE])?;
    filled_anew(run, STORE, &before)?;
    let told = run.kube.ctl(&["vasto", "status", PACKAGES])?;
    ensure!(told.contains(STORE), "kubectl vasto status says: {told}");
    Ok(())
}

/// What a person types before a node is worked on.
fn drain(run: &mut Run, node: &str, seconds: u64) -> anyhow::Result<()> {
    let start = Instant::now();
    let timeout = format!("--timeout={seconds}s");
    let args = ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", &timeout];
    let drained = run.kube.try_ctl(seconds + 20, &args)?;
    if !drained.ok {
        bail!("the node could not be drained: {}", drained.words());
    }
    run.say(format!("drained in {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

pub fn drain_a_node(run: &mut Run) -> anyhow::Result<()> {
    let node = run.node_of(POD)?;
    drain(run, &node, 120)?;
    run.load()?.more(3_000)?;
    run.kube.ctl(&["uncordon", &node])?;
    run.settled(PACKAGES, 3, 2, 120).map(drop)
}

/// At replication factor 1 the only copy moves before the node lets go of it.
pub fn drain_a_node_with_the_only_copy(run: &mut Run) -> anyhow::Result<()> {
    run.kube.apply(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {name: single}\n\
         spec: {shards: 2, replicationFactor: 1}\n",
    )?;
    run.settled("single", 2, 1, 120)?;
    let pod = format!("{}-single", run.load()?.pod());
    let load = Load::start(&run.kube, &pod, "single", &["--keys", "400", "--pause-ms", "80"])?;
    let node = run.node_of("single-store-0")?;
    drain(run, &node, 240)?;
    load.more(500)?;
    let verdict = load.verify()?;
    ensure!(verdict["lost"] == 0, "with the node drained: {verdict}");
    run.kube.ctl(&["uncordon", &node])?;
    run.settled("single", 2, 1, 180)?;
    run.check("single")?;
    load.end().context("the load on the only copy")?;
    run.kube.ctl(&["delete", "keyspace", "single"]).map(drop)
}

/// Its power is cut, it is struck off, and a volume goes with it: the store is made anew on
/// another node. In the end the node is there again, as a new one.
pub fn lose_a_node(run: &mut Run) -> anyhow::Result<()> {
    let (node, volumes) = (run.node_of(POD)?, run.volumes(PACKAGES)?);
    let before = replicas_of(run, STORE)?;
    cluster::kill_node(&node)?;
    run.kube.ctl(&["delete", "node", &node])?;
    let start = Instant::now();
    let lost = until("another volume", 240, || {
        let now = run.volumes(PACKAGES)?;
        Ok(Seen::when(now.get(CLAIM).is_some_and(|uid| volumes.get(CLAIM) != Some(uid)), || format!("{now:?}")))
    });
    let filled = lost.and_then(|()| filled_anew(run, STORE, &before));
    run.say(format!("filled anew after {:.1} s", start.elapsed().as_secs_f64()));
    cluster::start_node(&node)?;
    until("all nodes ready", 120, || cluster::all_ready(&run.kube))?;
    filled
}

/// A power cut of everything. The load waits for as long as that takes: it knows from
/// its ledger what was acknowledged before.
pub fn restart_every_node(run: &mut Run) -> anyhow::Result<()> {
    run.end_load()?;
    run.start_load(&["--timeout-s", "180"])?;
    run.load()?.more(2_000)?;
    let counts = run.load()?.mark()?;
    ensure!(counts["failed"] == 0, "before: {counts}");
    let before = run.pods(PACKAGES)?;
    let address = |pod: &serde_json::Value| pod["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    let addresses: Vec<String> = before.iter().map(address).collect();
    let lives: u64 = before.iter().map(restarts).sum();
    let start = Instant::now();
    cluster::restart_every_node()?;
    until("the nodes are back", 180, || {
        run.kube.ctl(&["get", "--raw", "/readyz", "--request-timeout=5s"])?;
        cluster::all_ready(&run.kube)
    })?;
    run.say(format!("nodes back after {:.1} s", start.elapsed().as_secs_f64()));
    // What the API server shows may still be from before the cut.
    until("every store is back", 240, || {
        let pods = run.pods(PACKAGES)?;
        let back = pods.iter().map(restarts).sum::<u64>() >= lives + 3 && pods.iter().all(ready);
        Ok(Seen::when(back, || {
            pods.iter().map(|p| format!("{} {}", restarts(p), ready(p))).collect::<Vec<_>>().join(", ")
        }))
    })?;
    let after: Vec<String> = run.pods(PACKAGES)?.iter().map(address).collect();
    run.say(format!("stores back after {:.1} s, {addresses:?} are {after:?}", start.elapsed().as_secs_f64()));
    run.settled(PACKAGES, 3, 2, 180)?;
    until("the load goes on", 240, || {
        let load = run.load()?;
        let counts = load.more(1_000).and_then(|()| load.restarts())?;
        Ok(Seen::when(counts > 0, || "it was not restarted".to_owned()))
    })
}
