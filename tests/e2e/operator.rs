//! The operator dies, or is away.

use std::time::Instant;

use anyhow::{Context as _, ensure};

use crate::base::{PACKAGES, Run, SYSTEM};
use crate::install::{operators, operators_wanted};
use crate::kube::{Seen, name, uid, until};

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

pub fn kill_the_leader(run: &mut Run) -> anyhow::Result<()> {
    let old = leader(run)?;
    let lives = run.lives(PACKAGES)?;
    let start = Instant::now();
    // As if its node had gone: nothing lets go of the Lease.
    run.kube.ctl(&["-n", SYSTEM, "delete", "pod", &old, "--force", "--grace-period=0"])?;
    let new = until("another leader", 60, || {
        let now = leader(run)?;
        Ok(if now != old && !now.is_empty() { Seen::Yes(now) } else { Seen::No(now) })
    })?;
    run.say(format!("{new} led after {:.1} s", start.elapsed().as_secs_f64()));
    works(run)?;
    run.load()?.more(1_000)?;
    ensure!(run.lives(PACKAGES)? == lives, "a store was restarted");
    operators_wanted(run, 2)
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
