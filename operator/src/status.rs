//! A Keyspace's status, from the committed topology, what the planner says, what
//! stores report, and what a driver has found beside that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use tokio::time::Instant;
use vasto_client::v1::{self, Topology, View};
use vasto_crds::{Keyspace, KeyspaceStatus, Phase, Progress, StoreState, StoreStatus, set_condition, time};

use crate::hub::Seen;
use crate::plan::{Condition, Outcome};

/// A topology as text, for a status.
pub(crate) fn to_text(topology: &Topology) -> String {
    STANDARD.encode(topology.encode_to_vec())
}

/// The topology that [`to_text`] wrote.
pub(crate) fn from_text(text: &str) -> Result<Topology, String> {
    let bytes = STANDARD.decode(text).map_err(|e| format!("the topology is not base64: {e}"))?;
    Topology::decode(bytes.as_slice()).map_err(|e| format!("the topology can't be decoded: {e}"))
}

/// The committed topology as a Keyspace's status has it; `None` where there is none yet.
pub fn topology_of(keyspace: &Keyspace) -> Result<Option<Topology>, String> {
    keyspace.status.as_ref().and_then(|s| s.topology.as_deref()).map(from_text).transpose()
}

/// Something that a driver has found and that needs attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// One word for machines, as a reason of Degraded.
    pub(crate) reason: &'static str,
    /// A sentence for people.
    pub(crate) message: String,
    /// The store that it is about.
    pub(crate) store: Option<String>,
}

/// What a status is made from.
pub(crate) struct Sources<'a> {
    /// The resource, with its last status.
    pub(crate) keyspace: &'a Keyspace,
    pub(crate) topology: Option<&'a Topology>,
    /// The topology as a status has it.
    pub(crate) text: Option<&'a str>,
    pub(crate) outcome: &'a Outcome,
    pub(crate) seen: &'a BTreeMap<String, Seen>,
    /// Why the operator itself can't go on, if it can't.
    pub(crate) trouble: Option<&'a str>,
    pub(crate) findings: &'a [Finding],
    pub(crate) now_ms: u64,
}

/// How fast a phase goes.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    phase: Option<Phase>,
    began: Option<Instant>,
    /// Done when it began.
    first: u64,
    /// The most that was ever seen left to do.
    most: u64,
}

/// The phase that people see.
pub(crate) fn phase(keyspace: &Keyspace, topology: Option<&Topology>) -> Phase {
    match topology {
        _ if keyspace.metadata.deletion_timestamp.is_some() => Phase::Deleting,
        None => Phase::Pending,
        Some(t) => match t.phase() {
            v1::Phase::Prepare if t.size() == 0 => Phase::Pending,
            v1::Phase::Stable => Phase::Ready,
            v1::Phase::Prepare => Phase::Prepare,
            v1::Phase::Switch => Phase::Switch,
            v1::Phase::Fence => Phase::Fence,
            v1::Phase::Drain => Phase::Drain,
            v1::Phase::Cleanup => Phase::Cleanup,
            v1::Phase::Deleting => Phase::Deleting,
        },
    }
}

/// The status as it is now.
pub(crate) fn build(from: &Sources<'_>, pace: &mut Pace) -> KeyspaceStatus {
    let Sources { keyspace, topology, outcome, now_ms, .. } = *from;
    let old = keyspace.status.clone().unwrap_or_default();
    let spec = &keyspace.spec;
    let phase = phase(keyspace, topology);
    let current = topology.and_then(|t| t.current.as_ref()).filter(|v| v.size() > 0);
    let mut status = KeyspaceStatus {
        observed_generation: keyspace.metadata.generation,
        phase: Some(phase),
        topology_version: topology.map(|t| t.version),
        shards: current.map(View::size),
        replication_factor: current.map(|v| v.shards.iter().map(|s| s.replicas.len()).max().unwrap_or(0) as u32),
        conditions: old.conditions,
        stores: stores(from),
        topology: from.text.map(str::to_owned),
        progress: (phase != Phase::Ready).then(|| progress(from, phase, old.progress, pace)),
        published_version: topology.filter(|_| outcome.publish).map(|t| t.version).or(old.published_version),
        selector: old.selector,
        image: old.image,
        ..KeyspaceStatus::default()
    };
    match current {
        Some(_) => status.set_replicas(outcome.progress.ready_replicas, outcome.progress.replicas),
        None => status.set_replicas(0, spec.shards * spec.replication_factor),
    }
    let unheard: Vec<&str> =
        status.stores.iter().filter(|s| s.state == Some(StoreState::Unknown)).map(|s| s.name.as_str()).collect();
    for condition in &outcome.conditions {
        let (holds, reason, message) = match condition.kind {
            // What hasn't been seen is neither there nor gone.
            "Ready" if !condition.status && !unheard.is_empty() && current.is_some() => {
                (None, "NotObserved", format!("{} has not been heard yet", unheard.join(", ")))
            }
            "Degraded" => {
                let (holds, reason, message) = degraded(condition, from);
                (Some(holds), reason, message)
            }
            _ => (Some(condition.status), condition.reason, condition.message.clone()),
        };
        let generation = keyspace.metadata.generation;
        set_condition(&mut status.conditions, condition.kind, holds, reason, &message, generation, now_ms);
    }
    status
}

/// Degraded by what the planner says, what the driver has found, and what keeps the operator from going on.
fn degraded(condition: &Condition, from: &Sources<'_>) -> (bool, &'static str, String) {
    let trouble = from.trouble.map(|trouble| ("OperatorFailure", trouble.to_owned()));
    let planner = condition.status.then(|| (condition.reason, condition.message.clone()));
    let findings = from.findings.iter().map(|f| (f.reason, f.message.clone()));
    // A loss of data is worse than whatever else there is.
    let (worst, other): (Vec<_>, Vec<_>) = planner.into_iter().partition(|(reason, _)| *reason == "DataLost");
    let all: Vec<_> = worst.into_iter().chain(trouble).chain(findings).chain(other).collect();
    let reason = all.first().map_or(condition.reason, |(reason, _)| *reason);
    let message = all.iter().map(|(_, message)| message.as_str()).collect::<Vec<_>>().join("; ");
    (!all.is_empty(), reason, message)
}

fn progress(from: &Sources<'_>, phase: Phase, old: Option<Progress>, pace: &mut Pace) -> Progress {
    let now = Instant::now();
    let p = &from.outcome.progress;
    if pace.phase != Some(phase) {
        *pace = Pace { phase: Some(phase), began: None, first: 0, most: 0 };
    }
    let (done, total) = match phase {
        Phase::Cleanup | Phase::Deleting => {
            pace.most = pace.most.max(p.todo_records);
            (pace.most - p.todo_records, pace.most)
        }
        _ => (p.records, p.records_total.max(p.records)),
    };
    if pace.began.is_none() && total > 0 {
        (pace.began, pace.first) = (Some(now), done);
    }
    let left = total - done;
    let elapsed = pace.began.map_or(Duration::ZERO, |began| now - began);
    let seconds_left = (left > 0 && done > pace.first && elapsed >= Duration::from_secs(1))
        .then(|| (left as f64 * elapsed.as_secs_f64() / (done - pace.first) as f64).ceil() as u64);
    let bytes_total = (p.records > 0).then(|| (p.bytes as f64 / p.records as f64 * total as f64) as u64);
    let waiting = from.outcome.waits.first().map(ToString::to_string).filter(|w| !w.is_empty());
    let waiting = from.trouble.map(str::to_owned).or(waiting);
    let copies = !matches!(phase, Phase::Cleanup | Phase::Deleting);
    let share = (total > 0).then(|| format!("{}% of {total} records", 100 * u128::from(done) / u128::from(total)));
    Progress {
        phase: Some(phase),
        summary: share.or_else(|| waiting.clone()),
        records: (total > 0).then_some(done),
        records_total: (total > 0).then_some(total),
        bytes: (copies && p.bytes > 0).then_some(p.bytes),
        bytes_total: bytes_total.filter(|_| copies && p.bytes > 0),
        lag: (p.lag > 0).then_some(p.lag),
        started_at: old.and_then(|old| old.started_at).or_else(|| Some(time(from.now_ms))),
        seconds_left,
        waiting,
    }
}

/// Every store that the topology names or that has replicas of the keyspace.
fn stores(from: &Sources<'_>) -> Vec<StoreStatus> {
    let named = from.topology.map(Topology::stores).unwrap_or_default();
    let holding =
        from.seen.iter().filter(|(_, s)| s.living && s.report.as_ref().is_some_and(|r| !r.replicas.is_empty()));
    let names: BTreeSet<&str> = named.into_iter().chain(holding.map(|(name, _)| name.as_str())).collect();
    names.into_iter().map(|name| store(name, from)).collect()
}

fn store(name: &str, from: &Sources<'_>) -> StoreStatus {
    let mut status = reported(name, from);
    let found = from.findings.iter().filter(|f| f.store.as_deref() == Some(name)).map(|f| f.message.clone());
    let all: Vec<String> = found.chain(status.message.take()).collect();
    status.message = (!all.is_empty()).then(|| all.join("; "));
    status
}

fn reported(name: &str, from: &Sources<'_>) -> StoreStatus {
    let lost_after = from.keyspace.spec.store_lost_after.as_duration();
    let Some(seen) = from.seen.get(name) else {
        return StoreStatus { name: name.to_owned(), state: Some(StoreState::Unknown), ..StoreStatus::default() };
    };
    let stays = from.topology.is_some_and(|t| {
        let target = t.next.as_ref().or(t.current.as_ref());
        target.is_some_and(|v| v.places().any(|p| p.assignment.store == name))
    });
    let state = match seen.living {
        true if stays => StoreState::Ready,
        true => StoreState::Leaving,
        false if seen.silent > lost_after => StoreState::Lost,
        false => StoreState::Away,
    };
    let mut status = StoreStatus { name: name.to_owned(), state: Some(state), ..StoreStatus::default() };
    status.address = (!seen.address.is_empty()).then(|| seen.address.clone());
    if let Some(report) = &seen.report {
        status.topology_version = Some(report.version);
        status.replicas = Some(report.replicas.len() as u32);
        status.records = Some(report.replicas.iter().map(|r| r.records).sum());
        status.bytes = Some(report.replicas.iter().map(|r| r.bytes).sum());
        let faults =
            report.replicas.iter().filter(|r| !r.fault.is_empty()).map(|r| format!("shard {}: {}", r.shard, r.fault));
        let full = report.replicas.iter().any(|r| r.full).then(|| "its disk is full: it refuses writes".to_owned());
        let message = faults.chain(full).collect::<Vec<_>>().join("; ");
        status.message = (!message.is_empty()).then_some(message);
    }
    status
}
