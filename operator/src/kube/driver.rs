//! The reconcile loop on Kubernetes. For each Keyspace: observe, ask the planner,
//! commit to the status, tell stores and clients, then bring what the keyspace owns
//! to what is wanted. Whoever does not lead only passes on what the status says.

mod act;
mod entry;
mod say;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::runtime::controller::{self, Action};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Config, Controller};
use kube::{Client, ResourceExt};
use tokio::sync::{Notify, watch};
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use vasto_client::env::Env;
use vasto_client::v1::{Phase, Topology};
use vasto_crds::{Keyspace, set_condition};

use super::api::{Error, Writer};
use super::caches::{self, Caches};
use super::lease::Term;
use super::metrics::Monitor;
use super::objects::{Site, topology_name};
use super::{Options, Timings};
use crate::edit;
use crate::hub::{Dirty, Hub, Seen};
use crate::observe::{observe, spec};
use crate::plan::{self, Observation, Presence};
use crate::status::{from_text, to_text};
use entry::Entry;
use say::Crier;
use view::Cluster;

/// Keyspaces that are worked on at once.
const AT_ONCE: u16 = 16;
/// The planner takes small steps; this many in a row are taken before anything else is looked at.
const STEPS: usize = 32;

type Key = ObjectRef<Keyspace>;

/// Keyspaces under which something has changed, each once.
#[derive(Default)]
struct Touched {
    keys: Mutex<HashSet<Key>>,
    bell: Notify,
}

impl Touched {
    async fn collect(self: Arc<Self>, mut events: caches::Touched) {
        while let Some(key) = events.next().await {
            self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
            self.bell.notify_one();
        }
    }

    fn stream(self: Arc<Self>) -> impl Stream<Item = Key> + Send {
        let batches = futures::stream::unfold(self, |touched| async move {
            touched.bell.notified().await;
            let keys = std::mem::take(&mut *touched.keys.lock().unwrap_or_else(PoisonError::into_inner));
            Some((futures::stream::iter(keys), touched))
        });
        batches.flatten()
    }
}

/// See the module.
pub(crate) struct Driver {
    writer: Writer,
    hub: Hub,
    caches: Arc<Caches>,
    site: Site,
    image: String,
    timings: Timings,
    env: Env,
    monitor: Monitor,
    crier: Crier,
    leadership: watch::Receiver<Option<Term>>,
    /// Uid -> where it is.
    known: Mutex<BTreeMap<String, Key>>,
    entries: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Entry>>>>,
}

impl Driver {
    pub(crate) fn new(
        options: &Options,
        hub: Hub,
        caches: Arc<Caches>,
        leadership: watch::Receiver<Option<Term>>,
    ) -> Self {
        Self {
            writer: Writer::new(options.client.clone(), options.monitor.clone()),
            hub,
            caches,
            site: Site { service: options.service.clone(), sees_nodes: options.namespace.is_none() },
            image: options.image.clone(),
            timings: options.timings,
            env: options.env.clone(),
            monitor: options.monitor.clone(),
            crier: Crier::new(options),
            leadership,
            known: Mutex::default(),
            entries: Mutex::default(),
        }
    }

    /// Runs until stopped.
    pub(crate) async fn run(self: Arc<Self>, client: Client, namespace: Option<String>, stop: CancellationToken) {
        // Beside the controller: at its limit it looks at nothing, and what it works on waits for these.
        let touched = Arc::new(Touched::default());
        let watching = touched.clone().collect(self.caches.begin(&client, namespace.as_deref()));
        let _watching = AbortOnDropHandle::new(tokio::spawn(watching));
        let listed = CancellationToken::new();
        let (reader, keyspaces) = caches::keyspaces(&client, namespace.as_deref(), listed.clone());
        let store = reader.clone();
        let heard = futures::stream::unfold(self.clone(), |driver| async move {
            driver.hub.wait().await;
            let concerned = driver.take_dirty();
            Some((futures::stream::iter(concerned), driver))
        });
        let driver = self.clone();
        let terms = WatchStream::from_changes(self.leadership.clone()).map(move |term| {
            driver.monitor.leader(term.is_some());
        });
        let settled = {
            let (driver, store) = (self.clone(), store.clone());
            async move {
                // Nobody is told that a keyspace is missing before all have been seen.
                listed.cancelled().await;
                for keyspace in store.state() {
                    driver.hub.claim(&topology_name(&keyspace));
                }
                driver.hub.settle();
            }
        };
        let controller = Controller::for_stream(keyspaces, reader)
            .with_config(Config::default().concurrency(AT_ONCE))
            .reconcile_on(touched.stream())
            .reconcile_on(heard.flatten())
            .reconcile_all_on(terms)
            .graceful_shutdown_on(stop.clone().cancelled_owned())
            .run(
                |keyspace, driver: Arc<Self>| async move { driver.reconcile(keyspace).await },
                |keyspace, error, driver| driver.again(&keyspace, error),
                self.clone(),
            )
            .for_each(|outcome| {
                match outcome {
                    Err(controller::Error::ObjectNotFound(gone)) => self.gone(&gone.name, gone.namespace.as_deref()),
                    Err(controller::Error::QueueError(error)) => {
                        tracing::warn!(%error, "the watch of keyspaces failed; it is begun anew");
                    }
                    Err(_) | Ok(_) => {}
                }
                futures::future::ready(())
            });
        tokio::select! {
            () = async { tokio::join!(controller, settled); } => {}
            () = async { stop.cancelled().await; tokio::time::sleep(super::FAREWELL).await } => {}
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Key>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_dirty(&self) -> Vec<Key> {
        self.hub.sweep_stores();
        let known = self.known();
        match self.hub.take_dirty() {
            Dirty::All => known.values().cloned().collect(),
            Dirty::Some(uids) => uids.iter().filter_map(|uid| known.get(uid).cloned()).collect(),
        }
    }

    /// The keyspace of this name is deleted: what it owned goes by Kubernetes's own hand.
    fn gone(&self, name: &str, namespace: Option<&str>) {
        let found: Vec<String> = {
            let known = self.known();
            let here = known.iter().filter(|(_, k)| k.name == name && k.namespace.as_deref() == namespace);
            here.map(|(uid, _)| uid.clone()).collect()
        };
        for uid in found {
            self.forget(&uid);
        }
        self.hub.release(&vasto_client::topology::qualified(namespace.unwrap_or_default(), name));
        self.monitor.forget(namespace.unwrap_or_default(), name);
    }

    fn forget(&self, uid: &str) {
        tracing::info!(uid, "a keyspace is gone");
        self.known().remove(uid);
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.hub.forget(uid);
    }

    fn entry(&self, uid: &str) -> Arc<tokio::sync::Mutex<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).entry(uid.to_owned()).or_default().clone()
    }

    fn again(&self, keyspace: &Keyspace, error: &Error) -> Action {
        self.monitor.failed(error.reason());
        match error {
            // The cache comes to it by itself, soon.
            Error::Stale { .. } => {
                tracing::debug!(keyspace = keyspace.name(), %error, "looking again");
                Action::requeue(self.env.jitter(Duration::from_millis(100)))
            }
            _ => {
                tracing::warn!(keyspace = keyspace.name(), namespace = keyspace.namespace(), %error, "can't go on; trying again");
                Action::requeue(self.env.jitter(self.timings.tick * 2))
            }
        }
    }

    async fn reconcile(&self, keyspace: Arc<Keyspace>) -> Result<Action, Error> {
        let (name, uid) = (topology_name(&keyspace), keyspace.uid().to_owned());
        if keyspace.metadata.deletion_timestamp.is_some() {
            // Nothing is done for it any more; what it owns goes by Kubernetes's own hand.
            self.gone(keyspace.name(), keyspace.namespace().as_deref());
            return Ok(Action::await_change());
        }
        let key = ObjectRef::from_obj(&*keyspace);
        let former: Vec<String> = {
            let mut known = self.known();
            let same = |k: &Key| k.name == key.name && k.namespace == key.namespace;
            let former = known.iter().filter(|(u, k)| **u != uid && same(k)).map(|(u, _)| u.clone()).collect();
            known.insert(uid.clone(), key.clone());
            former
        };
        for uid in former {
            self.forget(&uid);
            self.hub.release(&name);
        }
        self.hub.claim(&name);
        if let Some(stores) = self.caches.get() {
            stores.ready().await;
        }
        let term = self.leadership.borrow().clone();
        let entry = self.entry(&uid);
        let mut entry = entry.lock().await;
        let Some(term) = term else { return self.follow(&keyspace, &mut entry) };
        let began = tokio::time::Instant::now();
        let ended = term.ended.clone();
        let led = ended.run_until_cancelled(self.lead(keyspace, &term, &mut entry)).await;
        let Some(result) = led else { return Ok(Action::requeue(self.timings.tick)) };
        self.monitor.reconciled(began.elapsed(), result.is_ok());
        result
    }

    /// Passes on what the status says.
    fn follow(&self, keyspace: &Arc<Keyspace>, entry: &mut Entry) -> Result<Action, Error> {
        entry.stand_by(keyspace.clone());
        let status = keyspace.status.as_ref();
        let Some(text) = status.and_then(|s| s.topology.as_deref()) else { return Ok(Action::await_change()) };
        let topology = from_text(text).map_err(Error::Topology)?;
        let uid = topology.uid.clone();
        // Whether a switch may be acted on is for the leader to say.
        let switching = topology.phase() == Phase::Switch || topology.version == topology.switch_version;
        let published = status.and_then(|s| s.published_version).unwrap_or(0) >= topology.version;
        self.hub.commit(Arc::new(topology));
        if !switching || published {
            self.hub.publish(&uid);
        }
        Ok(Action::await_change())
    }

    async fn lead(&self, keyspace: Arc<Keyspace>, term: &Term, entry: &mut Entry) -> Result<Action, Error> {
        entry.take(keyspace, term);
        self.answer_plain_wish(entry).await?;
        let mut steps = 0;
        let (outcome, seen, cluster) = loop {
            steps += 1;
            self.adopt(entry).await?;
            self.end_granted_wish(entry).await?;
            let cluster = Cluster::look(&self.caches, &self.writer, entry).await;
            let seen = self.hub.look(entry.resource.uid());
            let observation = self.observe(entry, &seen, &cluster);
            let mut spec = spec(&entry.resource, topology_name(&entry.resource));
            if spec.replace.is_none() {
                spec.replace = cluster.leaving(entry);
            }
            let state = entry.topology.clone();
            let outcome = plan::plan(&spec, state.as_deref(), &observation);
            if let Some(state) = state.as_deref().filter(|_| outcome.publish) {
                self.hub.publish(&state.uid);
                entry.watchers.told(state);
            }
            let next = outcome.next.clone().filter(|next| {
                // A leader before this one may have a write on its way that takes pods away; none can be
                // taken any more once the StatefulSet has been written in this term.
                next.phase() != Phase::Switch || entry.guarded == Some(term.number)
            });
            match next {
                Some(next) if steps < STEPS => self.commit(entry, next).await?,
                _ => {
                    entry.observation = Some(observation);
                    break (outcome, seen, cluster);
                }
            }
        };
        let acted = self.act(entry, &outcome, &seen, &cluster, term).await;
        let restless = self.conclude(entry, &outcome, &seen, &cluster, &acted, term).await?;
        // Reports and watches wake it as well; this is for what only time changes.
        let again = match acted.error {
            Some(error) => return Err(error),
            None if outcome.next.is_some() && entry.guarded.is_some() => self.timings.tick / 50,
            None if !restless => self.timings.tick * 60,
            None if acted.rolling.is_some() || outcome.progress.phase == Phase::Switch => self.timings.tick,
            None => self.timings.tick * 3,
        };
        Ok(Action::requeue(self.env.jitter(again)))
    }

    /// `kubectl annotate ks packages vasto.io/replace=store-1` is a wish too: it is given a request's name, so
    /// that the same wish can be made again later.
    async fn answer_plain_wish(&self, entry: &mut Entry) -> Result<(), Error> {
        let annotations = entry.resource.annotations();
        let Some(text) = annotations.get(edit::REPLACE).filter(|text| !text.starts_with('{')) else { return Ok(()) };
        let fresh = format!("{:016x}", self.env.random_id());
        let value = match edit::replace_annotation(&entry.resource, text.trim(), false, fresh) {
            Ok((_, value)) => serde_json::Value::String(value),
            Err(refusal) => {
                self.crier.warn(&entry.resource, "ReplaceRefused", &refusal.to_string());
                serde_json::Value::Null
            }
        };
        let change = serde_json::json!({"metadata": {"annotations": {edit::REPLACE: value}}});
        let changed = self.writer.merge(&*entry.resource, change).await?;
        entry.resource = Arc::new(changed);
        Ok(())
    }

    /// A replace that is through is asked for no longer.
    async fn end_granted_wish(&self, entry: &mut Entry) -> Result<(), Error> {
        let replaced = entry.topology.as_ref().map_or("", |t| t.replaced.as_str());
        if edit::replacement(&entry.resource).is_none_or(|r| r.request != replaced) {
            return Ok(());
        }
        let change = serde_json::json!({"metadata": {"annotations": {edit::REPLACE: null}}});
        let changed = self.writer.merge(&*entry.resource, change).await?;
        entry.resource = Arc::new(changed);
        Ok(())
    }

    /// Takes over a topology that is newer than the committed one, or that the status has lost.
    async fn adopt(&self, entry: &mut Entry) -> Result<(), Error> {
        let status = entry.resource.status.as_ref().and_then(|s| s.topology.as_deref());
        let written = status.map(from_text).transpose().map_err(Error::Topology)?;
        let written = written.filter(|t| t.uid == entry.resource.uid());
        let version = written.as_ref().map_or(0, |t| t.version);
        let reported = self.hub.reported(entry.resource.uid());
        let own = entry.topology.clone();
        let all = reported.iter().chain(&own).map(|t| &**t);
        match plan::adopt(written.as_ref(), all) {
            Some(newest) if newest.version > version => {
                tracing::info!(
                    keyspace = entry.resource.name(),
                    version = newest.version,
                    "took over a topology that the status does not have"
                );
                self.commit(entry, newest).await
            }
            Some(newest) => {
                let newest = Arc::new(newest);
                entry.topology = Some(newest.clone());
                self.hub.commit(newest);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn observe(&self, entry: &mut Entry, seen: &BTreeMap<String, Seen>, cluster: &Cluster) -> Observation {
        let lost_after = entry.resource.spec.store_lost_after.as_duration();
        let state = entry.topology.as_deref();
        let mut observation = observe(state, seen, lost_after, &mut entry.expected);
        observation.watchers_behind = entry.watchers.behind(&self.hub, state, self.timings.fence);
        for (store, presence) in &mut observation.stores {
            if matches!(presence, Presence::Living(_)) {
                // What lies there of another keyspace keeps it from doing anything.
                if seen.get(store).is_some_and(|s| !s.foreign.is_empty()) {
                    *presence = Presence::Away;
                }
            } else if cluster.is_gone(store) {
                *presence = Presence::Lost;
            }
        }
        let named = state.map(Topology::stores).unwrap_or_default();
        for store in named.into_iter().filter(|store| cluster.is_gone(store)) {
            observation.stores.entry(store.to_owned()).or_insert(Presence::Lost);
        }
        observation
    }

    /// Makes this topology the committed one: first in the status, then for stores.
    async fn commit(&self, entry: &mut Entry, topology: Topology) -> Result<(), Error> {
        let mut status = entry.resource.status.clone().unwrap_or_default();
        let phase = crate::status::phase(&entry.resource, Some(&topology));
        status.topology = Some(to_text(&topology));
        status.topology_version = Some(topology.version);
        status.phase = Some(phase);
        let before = entry.topology.as_ref().map(|t| t.phase());
        if topology.phase() != Phase::Stable {
            // Counts and the rest follow at once; nobody must take a change for its end meanwhile.
            let (generation, now) = (entry.resource.metadata.generation, self.env.now_ms());
            let message = format!("version {} is committed", topology.version);
            let reason = crate::plan::reason(topology.phase());
            set_condition(&mut status.conditions, "Progressing", Some(true), reason, &message, generation, now);
        }
        self.write_status(entry, status).await?;
        tracing::debug!(keyspace = topology.name, version = topology.version, phase = ?topology.phase(), "committed");
        if before != Some(topology.phase()) {
            tracing::info!(keyspace = topology.name, version = topology.version, phase = phase.as_str(), "a new phase");
            self.crier.phase(&entry.resource, &topology);
        }
        let topology = Arc::new(topology);
        entry.topology = Some(topology.clone());
        self.hub.commit(topology);
        Ok(())
    }
}
