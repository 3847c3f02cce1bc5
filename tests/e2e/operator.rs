//! The operator dies, or is away.

use std::time::Instant;

use anyhow::{Context as _, ensure};

use crate::base::{PACKAGES, Run, SYSTEM};
use crate::cluster;
use crate::install::{operators, operators_wanted, rolled_out};
use crate::kube::{Seen, name, restarts, uid, until};

/// The pod that holds the Lease.
fn leader(run: &Run) -> anyhow::Result<String> {
    let lease = run.kube.get(&["-n", SYSTEM, "lease", "vasto-operator"])?.context("there is no Lease")?;
    Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
}

/// Waits until a pod that is there leads and acts on a change of the spec.
pub fn works(run: &Run) -> anyhow::Result<()> {
    until("a leader", 90, || {
        let (leader, pods) = (leader(run)?, operators(run)?);
        Ok(Seen::when(pods.iter().any(|pod| name(pod) == leader), || format!("{leader:?} holds the Lease")))
    })?;
    let object = run.keyspace(PACKAGES)?;
    let skew = if object["spec"]["maxClockSkew"] == "11s" { "10s" } else { "11s" };
    let patch = format!("{{\"spec\": {{\"maxClockSkew\": \"{skew}\"}}}}");
    run.kube.ctl(&["patch", "keyspace", PACKAGES, "--type=merge", "-p", &patch])?;
    until("the operator sees a change", 60, || {
        let object = run.keyspace(PACKAGES)?;
        let (wanted, seen) = (&object["metadata"]["generation"], &object["status"]["observedGeneration"]);
        Ok(Seen::when(wanted == seen, || format!("generation {wanted}, observed {seen}")))
    })
}

/// The pod of this name.
fn operator(run: &Run, pod: &str) -> anyhow::Result<serde_json::Value> {
    operators(run)?.into_iter().find(|p| name(p) == pod).with_context(|| format!("there is no operator {pod}"))
}

/// Without a farewell: nothing lets go of the Lease.
pub fn kill_the_leader(run: &mut Run) -> anyhow::Result<()> {
    let pod = operator(run, &leader(run)?)?;
    let lives = run.lives(PACKAGES)?;
    let start = Instant::now();
    cluster::signal(&pod, "KILL")?;
    until("the operator's end is seen", 60, || {
        let now = restarts(&operator(run, name(&pod))?);
        Ok(Seen::when(now > restarts(&pod), || format!("{now} restarts")))
    })?;
    works(run)?;
    run.say(format!("a leader acts after {:.1} s", start.elapsed().as_secs_f64()));
    run.load()?.more(1_000)?;
    ensure!(run.lives(PACKAGES)? == lives, "a store was restarted");
    rolled_out(run)
}

/// It stands still until another leads, and then believes for a moment that it still does.
pub fn freeze_the_leader(run: &mut Run) -> anyhow::Result<()> {
    let pod = operator(run, &leader(run)?)?;
    let lives = run.lives(PACKAGES)?;
    let start = Instant::now();
    cluster::signal(&pod, "STOP")?;
    let led = until("another leader", 60, || {
        let now = leader(run)?;
        Ok(if now != name(&pod) && !now.is_empty() { Seen::Yes(now) } else { Seen::No(now) })
    });
    run.say(format!("another led after {:.1} s", start.elapsed().as_secs_f64()));
    let works = led.and_then(|_| works(run));
    cluster::signal(&pod, "CONT")?;
    works?;
    run.load()?.more(1_000)?;
    ensure!(run.lives(PACKAGES)? == lives, "a store was restarted");
    rolled_out(run)
}

/// A store dies and comes back, and serves again, with nobody there to ask.
pub fn death_in_its_absence(run: &mut Run) -> anyhow::Result<()> {
    operators_wanted(run, 0)?;
    let pod = "packages-store-2";
    let old = uid(&run.pod(pod)?).to_owned();
    run.kube.ctl_within(120, &["delete", "pod", pod])?;
    run.another(pod, &old, 120)?;
    run.load()?.more(1_000)?;
    operators_wanted(run, 2)?;
    works(run)
}

/// What a pod says of itself at /metrics.
fn metrics(run: &Run, pod: &serde_json::Value) -> anyhow::Result<String> {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    run.kube.ctl(&["get", "--raw", &format!("/api/v1/namespaces/{namespace}/pods/{}:8282/proxy/metrics", name(pod))])
}

/// The values of a metric, whatever its labels.
fn values(text: &str, metric: &str) -> Vec<f64> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(metric));
    let own = lines.filter(|rest| rest.starts_with(['{', ' ']));
    own.filter_map(|rest| rest.rsplit(' ').next()?.parse().ok()).collect()
}

/// What alerts are made of is there, and true.
pub fn metrics_are_true(run: &mut Run) -> anyhow::Result<()> {
    let mut leaders = 0.0;
    for pod in operators(run)? {
        let text = metrics(run, &pod)?;
        let leads: f64 = values(&text, "vasto_operator_leader").iter().sum();
        leaders += leads;
        if leads > 0.0 {
            ensure!(values(&text, "vasto_operator_stores") == [3.0], "stores of {}: {text}", name(&pod));
            ensure!(values(&text, "vasto_keyspace_ready_replicas").contains(&6.0), "ready replicas: {text}");
        }
    }
    ensure!(leaders == 1.0, "{leaders} operators say that they lead");
    for pod in run.pods(PACKAGES)? {
        let text = metrics(run, &pod)?;
        ensure!(values(&text, "vasto_store_operator_connected") == [1.0], "{} and its operator: {text}", name(&pod));
        let lag = values(&text, "vasto_store_replica_lag_records");
        ensure!(!lag.is_empty() && lag.iter().all(|lag| *lag < 10_000.0), "the lags of {}: {lag:?}", name(&pod));
        let done: f64 = values(&text, "vasto_store_operations_total").iter().sum();
        ensure!(done > 0.0, "{} has done nothing: {text}", name(&pod));
    }
    Ok(())
}
