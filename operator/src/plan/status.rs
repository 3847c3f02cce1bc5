//! What people see: conditions, progress, the stores that must run; all derived
//! from the committed state and the reports.

use std::collections::BTreeSet;

use vasto_client::v1::{Phase, Topology, View};

use super::health::{Fate, hollow};
use super::placement::{expected_share, lists};
use super::wait::Wait;
use super::{Call, Observation, Outcome, deleting, keep, quorum, start};

/// One condition of the keyspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Ready, Progressing or Degraded.
    pub kind: &'static str,
    /// Whether it holds.
    pub status: bool,
    /// One word for machines.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// How far the change under way has come. Counts are estimates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// The committed phase.
    pub phase: Phase,
    /// Records that new replicas have copied.
    pub records: u64,
    /// Records that they have to copy in all, as far as their sources have said.
    pub records_total: u64,
    /// Bytes that they have copied.
    pub bytes: u64,
    /// Records still to be looked at by replicas that delete keys.
    pub todo_records: u64,
    /// The changes by which new replicas are behind, the greatest for each, summed.
    pub lag: u64,
    /// The least that this change must copy, as a share of all records (1: each record once).
    pub share: f64,
    /// Replicas that clients can be sent to and that live.
    pub ready_replicas: u32,
    /// Replicas that there should be for what clients route by.
    pub replicas: u32,
}

/// Everything but the next topology.
pub(super) fn outcome(state: Option<&Topology>, next: Option<Topology>, call: Call<'_>) -> Outcome {
    let seen = call.seen;
    let deleting = state.is_some_and(|s| s.phase() == Phase::Deleting);
    let gone = match state {
        None => call.spec.deleting,
        Some(state) => deleting && next.is_none() && deleting::holders(state, seen).is_empty(),
    };
    let left = state.filter(|_| gone).map_or_else(BTreeSet::new, |s| {
        s.stores().into_iter().filter(|s| !seen.is_living(s)).map(str::to_owned).collect()
    });
    Outcome {
        publish: state.is_some_and(|s| publish(s, seen)),
        gone,
        left,
        stores_wanted: stores_wanted(state, next.as_ref(), &call),
        conditions: conditions(state, next.as_ref(), &call),
        progress: state.map_or_else(Progress::default, |s| progress(s, seen)),
        next,
        waits: call.waits,
    }
}

/// What clients route by changes only with the switch; every later version was
/// committed after a majority had that one.
fn publish(state: &Topology, seen: &Observation) -> bool {
    let switching = state.phase() == Phase::Switch || state.version == state.switch_version;
    state.phase() != Phase::Deleting && (!switching || quorum::reached(state, seen).is_ok())
}

/// Every store that a view or a drop names, before and after the next commit, and those of the target.
fn stores_wanted(state: Option<&Topology>, next: Option<&Topology>, call: &Call<'_>) -> BTreeSet<String> {
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for topology in state.into_iter().chain(next) {
        wanted.extend(topology.stores().into_iter().map(str::to_owned));
    }
    if !call.spec.deleting && state.is_none_or(|s| s.phase() != Phase::Deleting) {
        let of = next.or(state).cloned().unwrap_or_default();
        wanted.extend(start::desired(&of, call).into_iter().flatten().flatten());
        let target = start::desired(&Topology { replace: None, ..of }, call);
        wanted.extend(target.into_iter().flatten().flatten());
    }
    wanted
}

fn conditions(state: Option<&Topology>, next: Option<&Topology>, call: &Call<'_>) -> Vec<Condition> {
    vec![ready(state, call.seen), progressing(state, next, call), degraded(state, call)]
}

fn ready(state: Option<&Topology>, seen: &Observation) -> Condition {
    let kind = "Ready";
    let Some(view) = state.and_then(|s| s.current.as_ref()).filter(|v| v.size() > 0) else {
        let message = "the keyspace is being made".to_owned();
        return Condition { kind, status: false, reason: "Creating", message };
    };
    if state.is_some_and(|s| s.phase() == Phase::Deleting) {
        let message = "the keyspace is being deleted".to_owned();
        return Condition { kind, status: false, reason: "Deleting", message };
    }
    let unserved: Vec<String> =
        (0..view.size()).filter(|s| !seen.has_copy(view, *s, 0)).map(|s| s.to_string()).collect();
    if unserved.is_empty() {
        let message = format!("all {} shards are served", view.size());
        Condition { kind, status: true, reason: "AllShardsServed", message }
    } else {
        let message = format!("no living replica serves shard {}", unserved.join(", "));
        Condition { kind, status: false, reason: "ShardsUnavailable", message }
    }
}

/// The reason that the condition Progressing has in a phase.
pub fn reason(phase: Phase) -> &'static str {
    match phase {
        Phase::Stable => "Stable",
        Phase::Prepare => "Preparing",
        Phase::Switch => "Switching",
        Phase::Fence => "Fencing",
        Phase::Drain => "Draining",
        Phase::Cleanup => "CleaningUp",
        Phase::Deleting => "Deleting",
    }
}

fn progressing(state: Option<&Topology>, next: Option<&Topology>, call: &Call<'_>) -> Condition {
    let kind = "Progressing";
    let reason = state.map_or("Creating", |s| reason(s.phase()));
    let reason = if call.waits.contains(&Wait::Paused) { "Paused" } else { reason };
    let placed = state.is_some_and(|s| {
        let wanted = start::desired(&Topology { replace: None, ..s.clone() }, call);
        s.phase() == Phase::Stable && s.replace.is_none() && s.current.as_ref().map(lists) == wanted
    });
    let message = match call.waits.as_slice() {
        [] if placed => "at the spec's placement".to_owned(),
        [] => "the next step is being taken".to_owned(),
        [first] => first.to_string(),
        [first, rest @ ..] => format!("{first}; and {} more", rest.len()),
    };
    Condition { kind, status: !placed || next.is_some_and(|n| n.phase() != Phase::Stable), reason, message }
}

/// The worst first.
fn degraded(state: Option<&Topology>, call: &Call<'_>) -> Condition {
    let (kind, seen) = ("Degraded", call.seen);
    let mut found: Vec<(u8, &'static str, String)> = Vec::new();
    // What has left the previous view was dropped on purpose.
    let views = state.into_iter().flat_map(|s| [(&s.current, true), (&s.previous, false)]);
    for (view, is_current) in views.filter_map(|(view, is_current)| Some((view.as_ref()?, is_current))) {
        for shard in (0..view.size()).filter(|s| is_current && hollow(view, *s)) {
            found.push((1, "ShardUnavailable", format!("nobody has shard {shard}: it is made anew")));
        }
        for place in view.places() {
            let (store, shard) = (&place.assignment.store, place.shard);
            match seen.fate(place.assignment) {
                Fate::Living(r) if !r.fault.is_empty() => {
                    let then = match (r.born || r.quarantined, seen.has_copy(view, shard, r.id)) {
                        (true, true) => "it is made anew from another copy",
                        (true, false) => {
                            "no other copy of the shard serves, so nothing is dropped: bring one back if there is one, \
                             or save what can be read with `vasto dump`, then replace the store and accept the loss"
                        }
                        (false, _) => "it stays as it is: mend that and restart the store, or replace the store",
                    };
                    found.push((2, "ReplicaFault", format!("shard {shard} on {store}: {}; {then}", r.fault)));
                }
                Fate::Living(r) if r.full => {
                    found.push((3, "DiskFull", format!("{store} refuses writes: its disk is full")));
                }
                Fate::Living(_) if !place.assignment.serving => {
                    found.push((6, "CatchingUp", format!("shard {shard} on {store} has to catch up")));
                }
                Fate::Living(_) => {}
                Fate::Vacant if !is_current => {}
                Fate::Vacant => found.push((5, "ReplicaMissing", format!("shard {shard} has no replica on {store}"))),
                Fate::Away => found.push((4, "StoreAway", format!("{store} is away"))),
                Fate::Gone | Fate::Lost => {
                    let lost = Wait::NoCopy { store: store.clone(), shard };
                    if call.waits.contains(&lost) {
                        found.push((0, "DataLost", format!("data lost for shard {shard}: {lost}")));
                    } else {
                        found.push((5, "ReplicaLost", format!("shard {shard} on {store} is lost")));
                    }
                }
            }
        }
    }
    for (store, stray) in state.into_iter().flat_map(|s| keep::strays(s, seen)).filter(|(_, r)| !r.candidate) {
        let (id, shard) = (stray.id, stray.shard);
        let text = format!(
            "{store} has replica {id:016x} of shard {shard}, which the keyspace does not know; it is left alone"
        );
        found.push((7, "StrayReplica", text));
    }
    found.sort();
    found.dedup();
    let reason = found.first().map_or("None", |(_, reason, _)| *reason);
    let more = found.len().saturating_sub(5);
    let mut message = found.iter().take(5).map(|(_, _, text)| text.as_str()).collect::<Vec<_>>().join("; ");
    if more > 0 {
        message.push_str(&format!("; and {more} more"));
    }
    Condition { kind, status: !found.is_empty(), reason, message }
}

fn progress(state: &Topology, seen: &Observation) -> Progress {
    let mut p = Progress { phase: state.phase(), ..Progress::default() };
    let fresh = fresh(state);
    for (_, report) in seen.reports() {
        for replica in &report.replicas {
            p.todo_records += replica.todo_records;
            let copied = replica.sources.iter().filter(|s| fresh.contains(&(replica.id, s.replica)));
            for source in copied.clone() {
                p.records += source.records;
                p.records_total += source.records_total;
                p.bytes += source.bytes;
            }
            p.lag += copied.map(|s| s.lag).filter(|l| *l != u64::MAX).max().unwrap_or(0);
        }
    }
    let (from, to) = match (&state.previous, &state.current, &state.next) {
        (_, Some(current), Some(next)) if state.phase() == Phase::Prepare => (Some(current), Some(next)),
        (Some(previous), current, _) => (Some(previous), current.as_ref()),
        _ => (None, None),
    };
    if let (Some(from), Some(to)) = (from, to) {
        p.share = expected_share(from, to);
    }
    for place in state.current.iter().flat_map(View::places) {
        p.replicas += 1;
        p.ready_replicas += u32::from(seen.sound(place.assignment).is_some());
    }
    p
}

/// Who copies from whom in this change: (follower, source).
fn fresh(state: &Topology) -> BTreeSet<(u64, u64)> {
    let (from, to) = match (&state.previous, &state.current, &state.next) {
        (_, Some(current), Some(next)) if state.phase() == Phase::Prepare => (current, next),
        (Some(previous), Some(current), _) => (previous, current),
        _ => return BTreeSet::new(),
    };
    let mut pairs = BTreeSet::new();
    for place in to.places().filter(|p| p.assignment.replica != 0) {
        let follower = place.assignment.replica;
        let stays = from.place(follower).is_some();
        for source in state.sources(follower) {
            if let Some(old) = from.place(source.assignment.replica).filter(|old| !stays || old.shard != place.shard) {
                pairs.insert((follower, old.assignment.replica));
            }
        }
    }
    pairs
}
