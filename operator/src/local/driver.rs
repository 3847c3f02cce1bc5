//! The reconcile loop: one task that observes, asks the planner, commits to the
//! folder, and then tells stores, clients and the runner. Level-triggered: whatever
//! woke it, it looks at what is, and a step that failed is taken again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use vasto_client::env::Env;
use vasto_client::v1::{Phase, Topology, View};
use vasto_crds::Keyspace;

use super::folder::{Content, Deleted, Error, Folder};
use super::handle::{Answer, Command, Handle, Resources};
use super::runner::{StoreRunner, Wanted};
use crate::edit::{self, Change, Refusal, Standing};
use crate::hub::{Dirty, Hub, Seen};
use crate::observe::{Expected, Watchers, observe, spec};
use crate::plan::{self, Observation, Outcome};
use crate::status::{self, Pace, Sources};

const TICK: Duration = Duration::from_millis(500);
/// The planner takes small steps; this many in a row are taken before anything else is looked at.
const STEPS: usize = 32;
/// Deleted keyspaces that are remembered.
const REMEMBERED: usize = 1_000;
/// A keyspace that the operator has lost, of which no majority of stores comes back, is
/// taken from the minority after this long.
const MINORITY: Duration = Duration::from_secs(60);

/// One keyspace.
struct Entry {
    resource: Arc<Keyspace>,
    topology: Option<Arc<Topology>>,
    /// The topology as a status has it.
    text: Option<String>,
    /// Stores that must run for it.
    wanted: BTreeSet<String>,
    /// It is waiting for something, so each tick looks at it again.
    restless: bool,
    watchers: Watchers,
    expected: Expected,
    pace: Pace,
    trouble: Option<String>,
}

impl Entry {
    fn new(resource: Keyspace) -> Self {
        Self {
            resource: Arc::new(resource),
            topology: None,
            text: None,
            wanted: BTreeSet::new(),
            restless: true,
            watchers: Watchers::default(),
            expected: Expected::default(),
            pace: Pace::default(),
            trouble: None,
        }
    }
}

/// See the module.
pub(crate) struct Driver {
    env: Env,
    hub: Hub,
    folder: Arc<Folder>,
    settle: Duration,
    fence_wait: Duration,
    entries: BTreeMap<String, Entry>,
    deleted: Vec<Deleted>,
    /// Uid -> when it was first heard of: reported by stores, and no resource here.
    strangers: BTreeMap<String, Instant>,
    /// Names to look at, beside what the hub says.
    dirty: BTreeSet<String>,
    living: BTreeSet<String>,
    /// Stores that have data here and so must be heard before anything is new. `None`: not known.
    existing: Option<BTreeSet<String>>,
    started: Instant,
    commands: mpsc::Receiver<Command>,
    resources: watch::Sender<Resources>,
    settled: watch::Sender<bool>,
    wanted: watch::Sender<Wanted>,
}

/// How long the driver waits for what.
pub(crate) struct Waits {
    /// For stores that nobody here knows to report, before a keyspace is called new or missing.
    pub(crate) settle: Duration,
    /// For watchers to learn of a switch, before the fence.
    pub(crate) fence: Duration,
}

impl Driver {
    /// A driver for what the folder holds.
    pub(crate) fn new(
        env: Env,
        hub: Hub,
        folder: Folder,
        content: Content,
        waits: &Waits,
    ) -> Result<(Self, Handle, watch::Receiver<Wanted>), Error> {
        let mut entries = BTreeMap::new();
        for (name, resource) in content.keyspaces {
            let mut entry = Entry::new(resource);
            entry.text = entry.resource.status.as_ref().and_then(|s| s.topology.clone());
            if let Some(text) = &entry.text {
                let topology = status::from_text(text).map_err(|e| folder.unreadable(&name, e))?;
                entry.topology = Some(Arc::new(topology));
            }
            hub.claim(&name);
            entry.topology.iter().for_each(|t| hub.commit(t.clone()));
            entries.insert(name, entry);
        }
        for deleted in &content.deleted {
            let topology = deleted.topology().map_err(|e| folder.unreadable(&deleted.name, e))?;
            hub.commit(Arc::new(topology));
        }
        let (sender, commands) = mpsc::channel(64);
        let (settled, is_settled) = watch::channel(false);
        let (resources, all) = watch::channel(Resources::default());
        let (wanted, wishes) = watch::channel(Wanted::default());
        let driver = Self {
            env,
            hub,
            folder: Arc::new(folder),
            settle: waits.settle,
            fence_wait: waits.fence,
            dirty: entries.keys().cloned().collect(),
            entries,
            deleted: content.deleted,
            strangers: BTreeMap::new(),
            living: BTreeSet::new(),
            existing: None,
            started: Instant::now(),
            commands,
            resources,
            settled,
            wanted,
        };
        driver.show();
        Ok((driver, Handle { commands: sender, resources: all, settled: is_settled }, wishes))
    }

    /// Runs until stopped.
    pub(crate) async fn run(mut self, runner: Arc<dyn StoreRunner>, stop: CancellationToken) {
        self.existing = match runner.existing().await {
            Ok(existing) => existing,
            Err(error) => {
                tracing::error!(error, "can't tell which stores have data here");
                None
            }
        };
        let hub = self.hub.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.pass().await;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(command) = self.commands.recv() => self.obey(command).await,
                _ = tick.tick() => self.tick(),
                () = hub.wait() => {}
            }
        }
    }

    fn tick(&mut self) {
        self.hub.sweep_stores();
        let living = self.hub.living();
        let all = living != self.living;
        self.living = living;
        let names = self.entries.iter().filter(|(_, e)| all || e.restless).map(|(name, _)| name.clone());
        self.dirty.extend(names);
    }

    async fn pass(&mut self) {
        let dirty = self.hub.take_dirty();
        let names: BTreeMap<&str, &str> =
            self.entries.iter().map(|(name, e)| (e.resource.uid(), name.as_str())).collect();
        let (touched, unknown): (BTreeSet<String>, bool) = match &dirty {
            Dirty::All => (self.entries.keys().cloned().collect(), true),
            Dirty::Some(uids) => (
                uids.iter().filter_map(|uid| names.get(uid.as_str())).map(|name| (*name).to_owned()).collect(),
                uids.iter().any(|uid| !names.contains_key(uid.as_str())),
            ),
        };
        self.dirty.extend(touched);
        if unknown || !self.strangers.is_empty() {
            self.recover().await;
        }
        if !*self.settled.borrow() && self.may_settle() {
            self.hub.settle();
            self.settled.send_replace(true);
        }
        for name in std::mem::take(&mut self.dirty) {
            self.reconcile(&name).await;
        }
        self.want();
        self.show();
    }

    /// Stores that are known to have data here are worth more patience than those that may be elsewhere.
    fn may_settle(&self) -> bool {
        match &self.existing {
            Some(stores) => self.hub.all_living(stores) || self.started.elapsed() >= MINORITY,
            None => self.started.elapsed() >= self.settle,
        }
    }

    fn is_deleted(&self, uid: &str) -> bool {
        self.deleted.iter().any(|d| d.uid == uid)
    }

    /// Keyspaces that stores report and the folder doesn't have: their files were lost.
    async fn recover(&mut self) {
        let mut reported = self.hub.reported_keyspaces();
        reported.retain(|uid, _| !self.is_deleted(uid) && self.entries.values().all(|e| e.resource.uid() != uid));
        self.strangers.retain(|uid, _| reported.contains_key(uid));
        for (uid, name) in reported {
            let first = !self.strangers.contains_key(&uid);
            let since = *self.strangers.entry(uid.clone()).or_insert_with(Instant::now);
            if let Some(entry) = self.entries.get(&name) {
                if first {
                    tracing::warn!(
                        keyspace = name,
                        uid,
                        known = entry.resource.uid(),
                        "stores have another keyspace of this name; it is left alone"
                    );
                }
                continue;
            }
            self.hub.claim(&name);
            let reports = self.hub.reported(&uid);
            let Some(topology) = plan::adopt(None, reports.iter().map(|t| &**t)) else { continue };
            if !self.has_majority(&topology) && since.elapsed() < MINORITY {
                continue;
            }
            match edit::recover(&topology, self.env.now_ms()) {
                Ok(resource) => {
                    tracing::info!(
                        keyspace = name,
                        uid,
                        version = topology.version,
                        "recovered from what stores report"
                    );
                    let mut entry = Entry::new(resource);
                    let done = self.commit(&mut entry, topology).await;
                    self.note(&mut entry, done.err());
                    self.strangers.remove(&uid);
                    self.dirty.insert(name.clone());
                    self.entries.insert(name, entry);
                }
                Err(reason) if first => {
                    tracing::error!(keyspace = name, uid, reason, "stores report a keyspace whose spec can't be read");
                }
                Err(_) => {}
            }
        }
    }

    /// Whether a majority of the stores that clients use report the keyspace.
    fn has_majority(&self, topology: &Topology) -> bool {
        let seen = self.hub.look(&topology.uid);
        let view = topology.current.as_ref().filter(|v| v.size() > 0).or(topology.next.as_ref());
        let stores: BTreeSet<&str> =
            view.into_iter().flat_map(View::places).map(|p| p.assignment.store.as_str()).collect();
        let here = stores.iter().filter(|s| seen.get(**s).is_some_and(|s| s.living && s.report.is_some())).count();
        2 * here > stores.len() || stores.is_empty()
    }

    /// Takes this keyspace as far as it can be taken now.
    async fn reconcile(&mut self, name: &str) {
        let Some(mut entry) = self.entries.remove(name) else { return };
        let mut gone = false;
        let was_restless = std::mem::replace(&mut entry.restless, true);
        for _ in 0..STEPS {
            let trouble = self.adopt(&mut entry).await.err();
            let seen = self.hub.look(entry.resource.uid());
            let state = entry.topology.clone();
            let observation = self.observe(&mut entry, &seen);
            let spec = spec(&entry.resource, entry.resource.name().to_owned());
            let outcome = plan::plan(&spec, state.as_deref(), &observation);
            if let Some(state) = state.as_deref().filter(|s| outcome.publish || s.phase() == Phase::Deleting) {
                self.hub.publish(&state.uid);
                entry.watchers.told(state);
            }
            entry.wanted.clone_from(&outcome.stores_wanted);
            let trouble = match outcome.next.clone().filter(|_| trouble.is_none()) {
                Some(next) => match self.commit(&mut entry, next).await {
                    Ok(()) => continue,
                    Err(error) => Some(error),
                },
                None => trouble,
            };
            self.note(&mut entry, trouble);
            gone = outcome.gone;
            self.conclude(&mut entry, &outcome, &seen);
            if was_restless && !entry.restless {
                // Come to rest: the file says so too. It would do no harm if it didn't.
                let saved = self.save(entry.resource.clone()).await.err();
                self.note(&mut entry, saved);
            }
            break;
        }
        if gone && self.finish_deletion(&entry).await {
            return;
        }
        self.entries.insert(name.to_owned(), entry);
    }

    /// Takes over a topology that is newer than the committed one, from a store.
    async fn adopt(&self, entry: &mut Entry) -> Result<(), Error> {
        let reported = self.hub.reported(entry.resource.uid());
        let version = entry.topology.as_ref().map_or(0, |t| t.version);
        if reported.iter().all(|t| t.version <= version) {
            return Ok(());
        }
        let Some(newer) = plan::adopt(entry.topology.as_deref(), reported.iter().map(|t| &**t)) else { return Ok(()) };
        tracing::info!(keyspace = entry.resource.name(), version = newer.version, "took over a topology from a store");
        let mut resource = (*entry.resource).clone();
        match edit::take_over(&mut resource, &newer, self.env.now_ms()) {
            Ok(()) => entry.resource = Arc::new(resource),
            Err(reason) => {
                tracing::error!(keyspace = resource.name(), reason, "the spec in a store's topology can't be read")
            }
        }
        self.commit(entry, newer).await
    }

    fn observe(&self, entry: &mut Entry, seen: &BTreeMap<String, Seen>) -> Observation {
        let lost_after = entry.resource.spec.store_lost_after.as_duration();
        let state = entry.topology.as_deref();
        let mut observation = observe(state, seen, lost_after, &mut entry.expected);
        observation.watchers_behind = entry.watchers.behind(&self.hub, state, self.fence_wait);
        observation
    }

    /// Makes this topology the committed one: first on disk, then for stores.
    async fn commit(&self, entry: &mut Entry, topology: Topology) -> Result<(), Error> {
        let text = status::to_text(&topology);
        let mut resource = (*entry.resource).clone();
        let phase = status::phase(&resource, Some(&topology));
        let status = resource.status.get_or_insert_default();
        status.topology = Some(text.clone());
        status.topology_version = Some(topology.version);
        status.phase = Some(phase);
        if edit::replacement(&resource).is_some_and(|r| r.request == topology.replaced) {
            edit::without_replacement(&mut resource);
        }
        let resource = Arc::new(resource);
        self.save(resource.clone()).await?;
        let before = entry.topology.as_ref().map(|t| t.phase());
        tracing::debug!(keyspace = topology.name, version = topology.version, phase = ?topology.phase(), "committed");
        if before != Some(topology.phase()) {
            tracing::info!(keyspace = topology.name, version = topology.version, phase = phase.as_str(), "a new phase");
        }
        let topology = Arc::new(topology);
        (entry.resource, entry.text, entry.topology) = (resource, Some(text), Some(topology.clone()));
        self.hub.commit(topology);
        Ok(())
    }

    async fn save(&self, resource: Arc<Keyspace>) -> Result<(), Error> {
        self.on_disk(move |folder| folder.save(&resource)).await
    }

    async fn on_disk(&self, work: impl FnOnce(&Folder) -> Result<(), Error> + Send + 'static) -> Result<(), Error> {
        let folder = self.folder.clone();
        let done = self.env.blocking(move || work(&folder)).await;
        done.unwrap_or_else(|e| Err(self.folder.broken(std::io::Error::other(e))))
    }

    fn note(&self, entry: &mut Entry, trouble: Option<Error>) {
        let trouble = trouble.map(|e| e.to_string());
        if let Some(error) = trouble.as_ref().filter(|_| trouble != entry.trouble) {
            tracing::error!(keyspace = entry.resource.name(), error, "can't go on; trying again");
        }
        entry.trouble = trouble;
    }

    /// Writes the status, when there is no more to do for now.
    fn conclude(&self, entry: &mut Entry, outcome: &Outcome, seen: &BTreeMap<String, Seen>) {
        let sources = Sources {
            keyspace: &entry.resource,
            topology: entry.topology.as_deref(),
            text: entry.text.as_deref(),
            outcome,
            seen,
            trouble: entry.trouble.as_deref(),
            findings: &[],
            now_ms: self.env.now_ms(),
        };
        let status = status::build(&sources, &mut entry.pace);
        let all_there = status.stores.iter().all(|s| seen.get(&s.name).is_some_and(|s| s.living));
        let ready = status.phase == Some(vasto_crds::Phase::Ready);
        let restless = !ready || !all_there || !outcome.waits.is_empty() || entry.trouble.is_some();
        if entry.resource.status.as_ref() != Some(&status) {
            let mut resource = (*entry.resource).clone();
            resource.status = Some(status);
            entry.resource = Arc::new(resource);
        }
        self.hub.describe(entry.resource.clone());
        entry.restless = restless;
    }

    /// Forgets a keyspace that every living store has let go. True once that is on disk.
    async fn finish_deletion(&mut self, entry: &Entry) -> bool {
        let name = entry.resource.name().to_owned();
        let mut deleted = self.deleted.clone();
        if let Some(topology) = entry.topology.as_deref() {
            let stores = topology.stores().into_iter().map(str::to_owned).collect();
            deleted.retain(|d| d.uid != topology.uid);
            deleted.push(Deleted::new(topology, stores));
        }
        let excess = deleted.len().saturating_sub(REMEMBERED);
        let forgotten: Vec<Deleted> = deleted.drain(..excess).collect();
        let (remembered, file) = (deleted.clone(), name.clone());
        let done = self.on_disk(move |folder| {
            folder.save_deleted(&remembered)?;
            folder.remove(&file)
        });
        if let Err(error) = done.await {
            tracing::error!(keyspace = name, %error, "can't finish the deletion; trying again");
            return false;
        }
        forgotten.iter().for_each(|d| self.hub.forget(&d.uid));
        self.deleted = deleted;
        self.hub.release(&name);
        self.hub.undescribe(entry.resource.uid());
        tracing::info!(keyspace = name, uid = entry.resource.uid(), "deleted");
        true
    }

    /// Tells the runner which stores must run and which need not.
    fn want(&self) {
        let mut ensure: BTreeSet<String> = self.entries.values().flat_map(|e| e.wanted.iter().cloned()).collect();
        let settled = *self.settled.borrow();
        if !settled {
            ensure.extend(self.existing.iter().flatten().cloned());
        }
        let mut remove = if settled { self.hub.idle_stores() } else { BTreeSet::new() };
        // What was deleted with the policy Retain lies in these stores' folders.
        let retained = self.deleted.iter().filter(|d| d.retain).flat_map(|d| &d.stores);
        let retained: BTreeSet<&String> = retained.collect();
        remove.retain(|name| !ensure.contains(name) && !retained.contains(name));
        let wanted = Wanted { ensure, remove };
        self.wanted.send_if_modified(|old| {
            *old != wanted && {
                *old = wanted;
                true
            }
        });
    }

    fn show(&self) {
        self.resources.send_if_modified(|old| {
            let same = old.len() == self.entries.len()
                && self.entries.iter().all(|(name, e)| old.get(name).is_some_and(|o| Arc::ptr_eq(o, &e.resource)));
            if !same {
                *old = Arc::new(self.entries.iter().map(|(name, e)| (name.clone(), e.resource.clone())).collect());
            }
            !same
        });
    }

    async fn obey(&mut self, command: Command) {
        let answer = self.change(&command.change).await;
        if let Err(refusal) = &answer {
            tracing::debug!(keyspace = command.change.name(), %refusal, "refused");
        }
        // Whoever is answered may ask for what was made at once.
        self.show();
        // Who asked may have gone.
        let _ = command.answer.send(answer);
    }

    async fn change(&mut self, change: &Change) -> Answer {
        let name = change.name();
        let entry = self.entries.get(name);
        if entry.is_none() {
            if !change.creates() {
                let existing = self.entries.keys().cloned().collect();
                return Err(Refusal::Missing { name: name.to_owned(), existing });
            }
            let reported = self.hub.reported_keyspaces();
            if let Some((uid, _)) = reported.iter().find(|(uid, n)| *n == name && !self.is_deleted(uid)) {
                return Err(Refusal::Unavailable(format!(
                    "stores report a keyspace {name} (uid {uid}), which the operator recovers once a majority of its stores \
                     is back; try again then"
                )));
            }
        }
        let living = self.hub.living();
        let standing = Standing {
            topology: entry.and_then(|e| e.topology.as_deref()),
            living: &living,
            now_ms: self.env.now_ms(),
            fresh: fresh_id(&self.env),
        };
        let Some(new) = edit::change(entry.map(|e| &*e.resource), change, &standing)? else {
            return entry
                .map(|e| e.resource.clone())
                .ok_or_else(|| Refusal::Unavailable("nothing was changed".to_owned()));
        };
        let new = Arc::new(new);
        self.save(new.clone()).await.map_err(|e| Refusal::Unavailable(e.to_string()))?;
        tracing::info!(keyspace = name, generation = new.metadata.generation, "a keyspace was changed");
        self.hub.claim(name);
        let entry = self.entries.entry(name.to_owned()).or_insert_with(|| Entry::new((*new).clone()));
        entry.resource = new.clone();
        self.dirty.insert(name.to_owned());
        Ok(new)
    }
}

/// A random UUID.
fn fresh_id(env: &Env) -> String {
    let random = u128::from(env.random_id()) << 64 | u128::from(env.random_id());
    uuid::Builder::from_random_bytes(random.to_be_bytes()).into_uuid().to_string()
}
