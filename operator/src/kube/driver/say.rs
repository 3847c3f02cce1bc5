//! What the operator says of a keyspace: its status, written when there is something
//! new to say, and Events.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::ObjectMeta;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Resource, ResourceExt};
use tokio::time::Instant;
use vasto_client::v1::{self, Topology};
use vasto_crds::{Keyspace, KeyspaceStatus, Phase, Progress, StoreState, set_condition};

use super::super::api::{Error, within};
use super::super::lease::Term;
use super::super::objects::{RESTART_REASON, selector_text};
use super::super::{Options, metrics};
use super::Driver;
use super::act::Acted;
use super::entry::Entry;
use super::view::Cluster;
use crate::hub::Seen;
use crate::plan::Outcome;
use crate::status::{self, Sources};

/// While nothing happens, counts of records and bytes are brought up to date this often.
const AT_REST: Duration = Duration::from_secs(60);
/// An event is worth so much waiting.
const PATIENCE: Duration = Duration::from_secs(5);

impl Driver {
    /// Writes the status, if there is something to say. Whether the keyspace is to be looked at again soon.
    pub(super) async fn conclude(
        &self,
        entry: &mut Entry,
        outcome: &Outcome,
        seen: &BTreeMap<String, Seen>,
        cluster: &Cluster,
        acted: &Acted,
        term: &Term,
    ) -> Result<bool, Error> {
        let old = entry.resource.status.clone().unwrap_or_default();
        let trouble = acted.error.as_ref().filter(|e| !matches!(e, Error::Stale { .. })).map(ToString::to_string);
        let sources = Sources {
            keyspace: &entry.resource,
            topology: entry.topology.as_deref(),
            text: old.topology.as_deref(),
            outcome,
            seen,
            trouble: trouble.as_deref(),
            findings: &acted.findings,
            now_ms: self.env.now_ms(),
        };
        let mut status = status::build(&sources, &mut entry.pace);
        status.selector = Some(selector_text(entry.resource.name()));
        status.image = Some(acted.image.clone()).filter(|image| !image.is_empty());
        self.of_pods(&mut status, entry, acted);
        let namespace = entry.resource.namespace().unwrap_or_default();
        self.monitor.keyspace(&namespace, &entry.resource, &status);
        self.hub.describe(Arc::new(Keyspace { status: Some(status.clone()), ..(*entry.resource).clone() }));
        let unheard = status.stores.iter().any(|s| s.state == Some(StoreState::Unknown));
        let all_there = status.stores.iter().all(|s| s.state == Some(StoreState::Ready));
        let restless = status.phase != Some(Phase::Ready)
            || !all_there
            || !outcome.waits.is_empty()
            || acted.rolling.is_some()
            || !acted.findings.is_empty()
            || trouble.is_some()
            || cluster.pods.values().any(|p| !super::super::pods::ready(p));
        // A fresh leader says nothing before it knows.
        if unheard && term.since.elapsed() < self.timings.settle {
            return Ok(true);
        }
        let news = quiet(&old) != quiet(&status);
        let since = entry.said.map_or(Duration::MAX, |at| at.elapsed());
        let due = since >= if status.phase == Some(Phase::Ready) { AT_REST } else { self.timings.progress };
        if news || (due && old != status) {
            self.tell_degraded(entry, &old, &status);
            self.write_status(entry, status).await?;
        }
        Ok(restless)
    }

    /// Conditions of roll-outs.
    fn of_pods(&self, status: &mut KeyspaceStatus, entry: &Entry, acted: &Acted) {
        let (generation, now) = (entry.resource.metadata.generation, self.env.now_ms());
        let (reason, message) = match acted.outdated {
            true => (
                RESTART_REASON,
                format!(
                    "this operator would give the pods another template; they keep theirs until you change something about \
                     them, or ask with: kubectl vasto restart {}",
                    entry.resource.name()
                ),
            ),
            false => ("UpToDate", "the pods are as this operator makes them".to_owned()),
        };
        set_condition(
            &mut status.conditions,
            "RequiresUpdate",
            Some(acted.outdated),
            reason,
            &message,
            generation,
            now,
        );
        if let (Some(rolling), Some(Phase::Ready)) = (&acted.rolling, status.phase) {
            set_condition(&mut status.conditions, "Progressing", Some(true), "Rolling", rolling, generation, now);
        }
    }

    fn tell_degraded(&self, entry: &Entry, old: &KeyspaceStatus, new: &KeyspaceStatus) {
        let degraded = |s: &KeyspaceStatus| {
            s.conditions.iter().find(|c| c.type_ == "Degraded" && c.status == "True").map(|c| c.reason.clone())
        };
        if let Some(reason) = degraded(new).filter(|reason| Some(reason) != degraded(old).as_ref()) {
            let message = new.conditions.iter().find(|c| c.type_ == "Degraded").map(|c| c.message.clone());
            self.crier.warn(&entry.resource, &reason, &message.unwrap_or_default());
        }
    }

    pub(super) async fn write_status(&self, entry: &mut Entry, status: KeyspaceStatus) -> Result<(), Error> {
        let old = &entry.resource;
        let mut desired = Keyspace::new(old.name(), vasto_crds::KeyspaceSpec::default());
        desired.metadata = ObjectMeta {
            name: old.metadata.name.clone(),
            namespace: old.metadata.namespace.clone(),
            uid: old.metadata.uid.clone(),
            resource_version: old.metadata.resource_version.clone(),
            ..ObjectMeta::default()
        };
        // A write of the status changes nothing of the spec, but it must be a whole one.
        desired.spec = old.spec.clone();
        desired.status = Some(status);
        let written = self.writer.apply_status(&desired).await?;
        entry.resource = Arc::new(written);
        entry.said = Some(Instant::now());
        Ok(())
    }
}

/// A status without what changes all the time.
fn quiet(status: &KeyspaceStatus) -> KeyspaceStatus {
    let mut quiet = status.clone();
    quiet.progress = quiet.progress.map(|p| Progress { phase: p.phase, ..Progress::default() });
    for store in &mut quiet.stores {
        (store.records, store.bytes) = (None, None);
    }
    for condition in quiet.conditions.iter_mut().filter(|c| c.type_ == "Progressing") {
        condition.message.clear();
    }
    quiet
}

/// Publishes Events. One that can't be published is logged and forgotten.
pub(crate) struct Crier {
    recorder: Recorder,
}

impl Crier {
    pub(crate) fn new(options: &Options) -> Self {
        let reporter = Reporter { controller: "vasto-operator".to_owned(), instance: Some(options.pod.clone()) };
        Self { recorder: Recorder::new(options.client.clone(), reporter) }
    }

    /// A change has come to a phase.
    pub(crate) fn phase(&self, keyspace: &Keyspace, topology: &Topology) {
        let (from, to) = (topology.previous.as_ref().map(v1::View::size), topology.size());
        let (reason, note) = match topology.phase() {
            v1::Phase::Stable => ("Ready", format!("{to} shards, version {}", topology.version)),
            v1::Phase::Prepare => {
                let next = topology.next.as_ref().map_or(0, v1::View::size);
                ("Preparing", format!("new replicas are made: {to} shards now, {next} then"))
            }
            v1::Phase::Switch => ("Switching", format!("clients turn to {to} shards (from {})", from.unwrap_or(0))),
            v1::Phase::Fence => ("Fencing", "old owners refuse what they no longer own".to_owned()),
            v1::Phase::Drain => ("Draining", "new owners take over what old ones still accepted".to_owned()),
            v1::Phase::Cleanup => ("CleaningUp", "what is no longer needed is deleted".to_owned()),
            v1::Phase::Deleting => ("Deleting", "the keyspace is deleted".to_owned()),
        };
        self.publish(EventType::Normal, keyspace, reason, &note);
    }

    pub(crate) fn note(&self, keyspace: &Keyspace, reason: &str, note: &str) {
        tracing::info!(keyspace = keyspace.name(), namespace = keyspace.namespace(), reason, note);
        self.publish(EventType::Normal, keyspace, reason, note);
    }

    pub(crate) fn warn(&self, keyspace: &Keyspace, reason: &str, note: &str) {
        tracing::warn!(keyspace = keyspace.name(), namespace = keyspace.namespace(), reason, note);
        self.publish(EventType::Warning, keyspace, reason, note);
    }

    fn publish(&self, type_: EventType, keyspace: &Keyspace, reason: &str, note: &str) {
        let recorder = self.recorder.clone();
        let reference = keyspace.object_ref(&());
        // The API server takes no longer ones.
        let note = note.chars().take(1_000).collect();
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        tokio::spawn(async move {
            let published = within(PATIENCE, recorder.publish(&event, &reference)).await;
            let error = match published {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(late) => late.to_string(),
            };
            metrics::log_event_failure(&event.reason, &error);
        });
    }
}
