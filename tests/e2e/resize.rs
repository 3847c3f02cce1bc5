//! More stores, fewer stores, and a change of mind in the middle.

use std::time::Instant;

use anyhow::ensure;

use crate::base::{PACKAGES, Run};
use crate::kube::{Seen, until};

/// The phases of a change, in order.
const PHASES: [&str; 5] = ["Prepare", "Switch", "Fence", "Drain", "Cleanup"];
/// How long a change may take.
const CHANGE: u64 = 180;

fn change(run: &mut Run, shards: u32) -> anyhow::Result<()> {
    let start = Instant::now();
    run.scale(shards)?;
    // Surplus stores go, and their volumes with them: settled() counts both.
    run.settled(PACKAGES, shards.into(), 2, CHANGE)?;
    run.say(format!("to {shards}: {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

pub fn grow_and_shrink(run: &mut Run) -> anyhow::Result<()> {
    change(run, 5)?;
    run.check(PACKAGES)?;
    let verdict = run.load()?.verify()?;
    ensure!(verdict["lost"] == 0, "lost: {verdict}");
    change(run, 3)
}

/// Asks for this many shards, and waits for this phase of the change, or a later one:
/// some are over in milliseconds.
fn reach(run: &mut Run, shards: u32, phase: &str) -> anyhow::Result<()> {
    run.scale(shards)?;
    let at = PHASES.iter().position(|p| *p == phase);
    let met = until(&format!("{phase} on the way to {shards}"), CHANGE, || {
        let object = run.keyspace(PACKAGES)?;
        let now = object["status"]["phase"].as_str().unwrap_or_default().to_owned();
        // It may even be through before anybody looks.
        let through = now == "Ready" && object["status"]["shards"] == shards;
        let reached = through || PHASES.iter().position(|p| *p == now) >= at;
        Ok(if reached { Seen::Yes(now) } else { Seen::No(now) })
    })?;
    run.say(format!("in {met}"));
    Ok(())
}

/// Cancelled: the candidates go, and nothing else has happened.
pub fn change_of_mind_before_switch(run: &mut Run) -> anyhow::Result<()> {
    reach(run, 5, "Prepare")?;
    change(run, 3)
}

/// Finished, and then gone back from.
pub fn change_of_mind_after_switch(run: &mut Run) -> anyhow::Result<()> {
    reach(run, 5, "Switch")?;
    change(run, 3)
}

/// The way on which others have destroyed what was to be handed over.
pub fn change_of_mind_while_shrinking(run: &mut Run) -> anyhow::Result<()> {
    for phase in ["Prepare", "Switch"] {
        change(run, 5)?;
        reach(run, 3, phase)?;
        change(run, 5)?;
    }
    change(run, 3)
}
