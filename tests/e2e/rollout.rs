//! New images: of the stores, one at a time; of the operator, which restarts no store.

use anyhow::ensure;
use serde_json::Value;

use crate::base::{PACKAGES, Run};
use crate::install::release;
use crate::kube::{Seen, name, ready, uid, until};
use crate::operator;

/// Waits until every store's pod is as wanted; one store at a time may be away meanwhile.
fn one_at_a_time(run: &Run, what: &str, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
    let mut together = Vec::new();
    until(what, 240, || {
        let pods = run.pods(PACKAGES)?;
        let serving = pods.iter().filter(|pod| ready(pod)).count();
        if serving < 2 {
            together = pods.iter().filter(|pod| !ready(pod)).map(|pod| name(pod).to_owned()).collect();
        }
        let rolled = pods.iter().filter(|pod| wanted(pod)).count();
        Ok(Seen::when(rolled == 3 && serving == 3, || format!("{rolled} are so, {serving} serve")))
    })?;
    ensure!(together.is_empty(), "only one store served: not ready together were {together:?}");
    Ok(())
}

pub fn image(run: &mut Run) -> anyhow::Result<()> {
    let object = run.keyspace(PACKAGES)?;
    let to = if object["status"]["image"] == "vasto:dev2" { "vasto:dev" } else { "vasto:dev2" };
    let patch = format!("{{\"spec\": {{\"image\": \"{to}\"}}}}");
    run.kube.ctl(&["patch", "keyspace", PACKAGES, "--type=merge", "-p", &patch])?;
    one_at_a_time(run, &format!("all stores run {to}"), |pod| pod["spec"]["containers"][0]["image"] == to)
}

pub fn restart(run: &mut Run) -> anyhow::Result<()> {
    let lives = run.lives(PACKAGES)?;
    run.kube.ctl(&["vasto", "restart", PACKAGES])?;
    one_at_a_time(run, "all stores restarted", |pod| lives.get(name(pod)).is_some_and(|(old, _)| old != uid(pod)))
}

/// Another operator, another image for new stores: the old ones don't notice.
fn operator(run: &mut Run, tag: &str, values: &[&str]) -> anyhow::Result<()> {
    let lives = run.lives(PACKAGES)?;
    release(run, tag, values)?;
    operator::works(run)?;
    run.load()?.more(2_000)?;
    let now = run.lives(PACKAGES)?;
    ensure!(now == lives, "a store was restarted: {now:?}, before {lives:?}");
    Ok(())
}

pub fn upgrade_the_operator(run: &mut Run) -> anyhow::Result<()> {
    operator(run, "dev2", &["storeImage=vasto:dev2", "log=debug"])
}

pub fn downgrade_the_operator(run: &mut Run) -> anyhow::Result<()> {
    // Where only this step is run, there is something to come down from.
    release(run, "dev2", &["storeImage=vasto:dev2", "log=debug"])?;
    operator(run, "dev", &[])
}
