//! What is done to a keyspace's objects: made and kept as wanted, volumes enlarged,
//! dead volumes let go, pods restarted one at a time. Each write is bound to what it
//! was decided on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::runtime::reflector::Store;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use tokio::time::Instant;
use vasto_client::v1::{Phase, Topology, View};

use super::super::api::{Error, Object};
use super::super::lease::Term;
use super::super::objects::{self, MADE_FOR, Objects, SURPLUS, Wanted, claim_name};
use super::super::pods::{self, Roll};
use super::super::volumes::{self, Reach};
use super::Driver;
use super::entry::{Applied, Entry};
use super::view::{Cluster, cached, drain_request};
use crate::hub::Seen;
use crate::observe::{ordinal, store_name};
use crate::plan::{Outcome, in_sync};
use crate::status::Finding;

/// A write that somebody else's field refuses is tried again after so long.
const CONFLICT_AGAIN: Duration = Duration::from_secs(30);

/// What came of it.
#[derive(Default)]
pub(crate) struct Acted {
    pub(crate) error: Option<Error>,
    pub(crate) findings: Vec<Finding>,
    /// What a roll-out does or waits for.
    pub(crate) rolling: Option<String>,
    /// This operator would give the pods another template.
    pub(crate) outdated: bool,
    /// The image of the stores.
    pub(crate) image: String,
}

impl Acted {
    /// A surplus volume that may not be touched holds up nothing else; it is reported.
    fn unless_refused(&mut self, store: &str, what: &str, done: Result<(), Error>) -> Result<(), Error> {
        let Err(error @ Error::Refused { .. }) = done else { return done };
        let message = format!("the volume of {store} is not needed any more and can't be {what}: {error}");
        self.findings.push(Finding { reason: "VolumeNotDeleted", message, store: Some(store.to_owned()) });
        Ok(())
    }
}

impl Driver {
    /// Brings what the keyspace owns one step nearer to what is wanted.
    pub(super) async fn act(
        &self,
        entry: &mut Entry,
        outcome: &Outcome,
        seen: &BTreeMap<String, Seen>,
        cluster: &Cluster,
        term: &Term,
    ) -> Acted {
        let image = self.image_of(entry, cluster);
        let mut acted = Acted { findings: found(entry, seen, cluster), image, ..Acted::default() };
        if entry.resource.spec.paused {
            return acted;
        }
        let done = self.carry_out(entry, outcome, seen, cluster, term, &mut acted).await;
        if let Err(error) = done {
            match error.reason() {
                reason @ ("FieldConflict" | "NameTaken" | "Former") => {
                    let reason = if reason == "Former" { "NameTaken" } else { reason };
                    acted.findings.insert(0, Finding { reason, message: error.to_string(), store: None });
                }
                _ => acted.error = Some(error),
            }
        }
        acted
    }

    /// The one that was asked for, or else the one that was current when the keyspace was made.
    fn image_of(&self, entry: &Entry, cluster: &Cluster) -> String {
        let running = || {
            let spec = cluster.stores.as_ref()?.spec.template.spec.as_ref()?;
            spec.containers.iter().find(|c| c.name == "store")?.image.clone()
        };
        let spec = entry.resource.spec.image.clone();
        let kept = || entry.resource.status.as_ref().and_then(|s| s.image.clone());
        spec.or_else(kept).or_else(running).unwrap_or_else(|| self.image.clone())
    }

    async fn carry_out(
        &self,
        entry: &mut Entry,
        outcome: &Outcome,
        seen: &BTreeMap<String, Seen>,
        cluster: &Cluster,
        term: &Term,
        acted: &mut Acted,
    ) -> Result<(), Error> {
        let keyspace = entry.resource.clone();
        let state = entry.topology.clone();
        let resting = state.as_ref().is_some_and(|s| s.phase() == Phase::Stable && s.replace.is_none());
        let changing = !resting || outcome.next.is_some();
        let live = cluster.stores.clone();
        let has = live.as_ref().and_then(|s| s.spec.replicas).map(i32::unsigned_abs);
        let lost_after = keyspace.spec.store_lost_after.as_duration();
        let surplus = Surplus { outcome, state: state.as_deref(), lost_after, seen, cluster };
        let replicas = surplus.replicas(has);
        let term_number = changing.then_some(term.number);
        let wanted = Wanted { replicas, image: acted.image.clone(), term: term_number };
        acted.outdated =
            live.as_ref().is_some_and(|live| objects::is_outdated(&keyspace, &self.site, &acted.image, live));
        let Objects { account, headless, client, budget, stores } =
            objects::objects(&keyspace, &self.site, &wanted, live.as_deref());
        let Some(caches) = self.caches.get() else { return Ok(()) };
        self.keep(entry, cluster, has.unwrap_or(0), replicas).await?;
        self.condemn(entry, &surplus, replicas, acted).await?;
        let written = self.put_live(entry, live.as_deref(), stores).await;
        if let Ok(Some(written)) = &written {
            entry.stores = Some(Arc::new(written.clone()));
            entry.written = Some(Instant::now());
        }
        entry.guarded = (written.is_ok() && changing).then_some(term.number);
        // One that is somebody else's does not hold up the others.
        let others = [
            self.put(entry, &caches.accounts, account).await,
            self.put(entry, &caches.services, headless).await,
            self.put(entry, &caches.services, client).await,
            self.put(entry, &caches.budgets, budget).await,
        ];
        written?;
        others.into_iter().collect::<Result<(), Error>>()?;
        self.enlarge(entry, cluster, acted).await?;
        self.clear(entry, cluster, replicas, acted).await?;
        self.let_go(entry, seen, cluster).await?;
        self.roll(entry, cluster, acted).await
    }

    async fn put<K: Object + 'static>(&self, entry: &mut Entry, cache: &Store<K>, desired: K) -> Result<(), Error> {
        let live = cached(cache, &desired.namespace().unwrap_or_default(), &desired.name_any());
        self.put_live(entry, live.as_deref(), desired).await.map(|_| ())
    }

    /// Applies `desired` where it isn't so already; what came of it, if it was written.
    async fn put_live<K: Object>(&self, entry: &mut Entry, live: Option<&K>, desired: K) -> Result<Option<K>, Error> {
        let key = format!("{} {}", K::kind(&()), desired.name_any());
        let hash = objects::hash(&desired);
        let owned = live.filter(|l| l.owner_references().iter().any(|o| o.uid == entry.resource.uid()));
        let before = entry.applied.get(&key).filter(|a| a.hash == hash);
        if let Some(before) = before {
            let same = live.is_some_and(|live| mark(live) == before.mark);
            // The cache may not have come to it yet.
            let fresh = before.at.elapsed() < Duration::from_secs(2);
            match &before.conflict {
                Some(text) if same && before.at.elapsed() < CONFLICT_AGAIN => {
                    return Err(Error::FieldConflict { what: key, text: text.clone() });
                }
                None if same || fresh => return Ok(None),
                _ => {}
            }
        } else if let Some(live) = owned.filter(|live| is_in(&desired, *live)) {
            let (mark, at) = (mark(live), Instant::now());
            entry.applied.insert(key, Applied { hash, mark, at, conflict: None });
            return Ok(None);
        }
        let seen = live.map(mark).unwrap_or_default();
        let written = self.writer.apply(live, desired, entry.resource.uid()).await;
        let at = Instant::now();
        match written {
            Ok(written) => {
                entry.applied.insert(key, Applied { hash, mark: mark(&written), at, conflict: None });
                Ok(Some(written))
            }
            Err(Error::FieldConflict { what, text }) => {
                let conflict = Some(text.clone());
                entry.applied.insert(key, Applied { hash, mark: seen, at, conflict });
                Err(Error::FieldConflict { what, text })
            }
            Err(error) => Err(error),
        }
    }

    /// Takes the marks off volumes of pods that are to stay, or to come: before the StatefulSet says so, so that a deletion
    /// that was decided before is refused.
    async fn keep(&self, entry: &Entry, cluster: &Cluster, has: u32, replicas: u32) -> Result<(), Error> {
        let uid = entry.resource.uid();
        let off = json!({"metadata": {"annotations": {SURPLUS: null}}});
        let kept = |store: &str| ordinal(store).is_some_and(|n| n < has.min(replicas));
        let here = cluster.claims.iter().filter(|(store, _)| kept(store));
        for (_, claim) in here.filter(|(_, claim)| names(claim, SURPLUS, uid)) {
            self.writer.merge(&**claim, off.clone()).await?;
        }
        // Of those to come the cache may not have seen a mark yet, which a leader before this one has set.
        let namespace = entry.resource.namespace().unwrap_or_default();
        for n in has..replicas {
            let name = claim_name(entry.resource.name(), &store_name(n));
            let claim = self.writer.get::<PersistentVolumeClaim>(&namespace, &name).await?;
            if let Some(claim) = claim.filter(|claim| names(claim, SURPLUS, uid)) {
                self.writer.merge(&claim, off.clone()).await?;
            }
        }
        Ok(())
    }

    /// Marks the volumes of pods that are about to go, or have gone: before the StatefulSet says so, so that whoever leads
    /// next knows what was decided.
    async fn condemn(
        &self,
        entry: &Entry,
        surplus: &Surplus<'_>,
        replicas: u32,
        acted: &mut Acted,
    ) -> Result<(), Error> {
        let uid = entry.resource.uid();
        for (store, claim) in &surplus.cluster.claims {
            let marked = names(claim, SURPLUS, uid);
            // A leader before this one may have let the pod go; what was made for another keyspace nobody has looked at.
            let left = !surplus.cluster.pods.contains_key(store) && names(claim, MADE_FOR, uid);
            let may_go = surplus.may_go(store) || left && surplus.is_needless(store);
            if ordinal(store).is_some_and(|n| n >= replicas) && may_go && !marked {
                let mark = json!({"metadata": {"annotations": {SURPLUS: uid}}});
                let marked = self.writer.merge(&**claim, mark).await;
                acted.unless_refused(store, "marked as surplus", marked.map(drop))?;
            }
        }
        Ok(())
    }

    /// Deletes the volumes that are marked, once their pods are gone. The StatefulSet's own `whenScaled` would only
    /// do it for pods that it finds, and takes it back where the size changes again meanwhile.
    async fn clear(&self, entry: &Entry, cluster: &Cluster, replicas: u32, acted: &mut Acted) -> Result<(), Error> {
        for (store, claim) in &cluster.claims {
            let surplus = ordinal(store).is_some_and(|n| n >= replicas) && !cluster.pods.contains_key(store);
            let marked = names(claim, SURPLUS, entry.resource.uid());
            if surplus && marked && claim.metadata.deletion_timestamp.is_none() {
                acted.unless_refused(store, "deleted", self.writer.delete(&**claim).await)?;
            }
        }
        Ok(())
    }

    /// Volumes grow, where their class lets them.
    async fn enlarge(&self, entry: &mut Entry, cluster: &Cluster, acted: &mut Acted) -> Result<(), Error> {
        let keyspace = &*entry.resource;
        let size = &keyspace.spec.storage.size;
        for (store, claim) in &cluster.claims {
            let small = volumes::requested(claim).is_some_and(|has| has < size.bytes());
            if !small || claim.metadata.deletion_timestamp.is_some() || !cluster.pods.contains_key(store) {
                continue;
            }
            let (key, hash) = (format!("claim {store}"), size.to_string());
            let before = entry.applied.get(&key).filter(|a| a.hash == hash && a.mark == mark(&**claim));
            let refused = before.filter(|a| a.at.elapsed() < CONFLICT_AGAIN).and_then(|a| a.conflict.clone());
            let refused = match refused {
                Some(refused) => refused,
                None => {
                    let change = json!({"spec": {"resources": {"requests": {"storage": hash}}}});
                    match self.writer.merge(&**claim, change).await {
                        Ok(_) => {
                            let text = format!("{} grows to {size}", claim.name_any());
                            self.crier.note(keyspace, "VolumeGrowing", &text);
                            continue;
                        }
                        Err(error @ Error::Refused { .. }) => {
                            let (mark, at, conflict) = (mark(&**claim), Instant::now(), Some(error.to_string()));
                            entry.applied.insert(key, Applied { hash, mark, at, conflict });
                            error.to_string()
                        }
                        Err(error) => return Err(error),
                    }
                }
            };
            acted.findings.push(Finding {
                reason: "VolumeNotGrown",
                message: format!("the volume of {store} can't grow to {size}: {refused}"),
                store: Some(store.clone()),
            });
        }
        Ok(())
    }

    /// Volumes that hold nothing any more and can't be used where they are: a new one is made elsewhere.
    async fn let_go(&self, entry: &Entry, seen: &BTreeMap<String, Seen>, cluster: &Cluster) -> Result<(), Error> {
        let Some(state) = entry.topology.as_deref() else { return Ok(()) };
        let lost_after = entry.resource.spec.store_lost_after.as_duration();
        for (store, pod) in &cluster.pods {
            if holds(state, store) {
                continue;
            }
            let living = seen.get(store).filter(|s| s.living);
            let reach = cluster.reach(store);
            let why = match living {
                // What it held was given up, or it never had anything.
                None if cluster.is_gone(store) => "its volume is gone",
                None if reach == Some(Reach::Cordoned)
                    && seen.get(store).is_some_and(|s| s.silent > lost_after)
                    && pods::unschedulable(pod).is_some() =>
                {
                    "its volume is bound to a node that is drained, and was away for too long"
                }
                Some(s) if drained(state, pod, store) && cluster.draining.contains(store) && is_empty(s) => {
                    "it has handed over its data, and its node is drained"
                }
                _ => continue,
            };
            let claim = cluster.claims.get(store);
            let bound_here = cluster.is_gone(store) || reach == Some(Reach::Cordoned);
            // The pod first: bound to what was seen of it, so that one that runs by now keeps its volume.
            if pod.metadata.deletion_timestamp.is_none() {
                self.writer.delete(&**pod).await?;
                self.crier.note(&entry.resource, "PodReplaced", &format!("{} is deleted: {why}", pod.name_any()));
            }
            if let Some(claim) = claim.filter(|c| bound_here && c.metadata.deletion_timestamp.is_none()) {
                let text = format!("{} is deleted: {why}", claim.name_any());
                self.writer.delete(&**claim).await?;
                self.crier.note(&entry.resource, "VolumeReplaced", &text);
            }
        }
        Ok(())
    }

    async fn roll(&self, entry: &Entry, cluster: &Cluster, acted: &mut Acted) -> Result<(), Error> {
        let (Some(stores), Some(state), Some(observation)) = (&entry.stores, &entry.topology, &entry.observation)
        else {
            return Ok(());
        };
        let newest = match &cluster.stores {
            Some(cached) if super::entry::version(&**cached) >= super::entry::version(&**stores) => cached,
            _ => stores,
        };
        let pods: Vec<&Pod> = cluster.pods.values().map(|p| &**p).collect();
        acted.rolling = match pods::next(newest, &pods, in_sync(state, observation)) {
            Roll::Done => None,
            Roll::Wait(why) => Some(why),
            Roll::Next(pod) => {
                let name = pod.name_any();
                self.writer.delete(pod).await?;
                self.crier.note(&entry.resource, "Rolling", &format!("{name} is restarted with what is wanted now"));
                Some(format!("{name} is being restarted"))
            }
        };
        Ok(())
    }
}

/// What needs attention, as pods, volumes and stores say themselves.
fn found(entry: &Entry, seen: &BTreeMap<String, Seen>, cluster: &Cluster) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut say = |reason, store: &String, message| {
        all.push(Finding { reason, message, store: Some(store.clone()) });
    };
    for (store, s) in seen.iter().filter(|(_, s)| !s.foreign.is_empty()) {
        let uids = s.foreign.join(", ");
        say(
            "ForeignVolume",
            store,
            format!(
                "the volume of {store} has data of another keyspace (uid {uids}), which is neither served nor deleted: \
                 delete the claim {} if nobody needs it, or give this keyspace another name",
                objects::claim_name(entry.resource.name(), store)
            ),
        );
    }
    let named = entry.topology.as_ref().map(|t| t.stores().into_iter().map(str::to_owned).collect::<Vec<_>>());
    for store in named.unwrap_or_default().iter().filter(|store| cluster.is_gone(store)) {
        say(
            "VolumeLost",
            store,
            format!("the volume of {store} is gone: the node that had it does not exist any more"),
        );
    }
    for (store, pod) in cluster.pods.iter().filter(|(_, p)| p.metadata.deletion_timestamp.is_none()) {
        let name = pod.name_any();
        if let Some(why) = pods::unschedulable(pod) {
            say("PodUnschedulable", store, format!("{name} can't be scheduled: {why}"));
        }
        if let Some(why) = pods::failing(pod) {
            say("PodFailing", store, format!("{name} does not run: {why}"));
        }
    }
    all
}

/// What is known of stores that are too many.
struct Surplus<'a> {
    outcome: &'a Outcome,
    state: Option<&'a Topology>,
    lost_after: Duration,
    seen: &'a BTreeMap<String, Seen>,
    cluster: &'a Cluster,
}

impl Surplus<'_> {
    /// How many pods there are to be.
    fn replicas(&self, live: Option<u32>) -> u32 {
        let target = self.outcome.stores_wanted.iter().filter_map(|s| ordinal(s)).max().map_or(0, |n| n + 1);
        // Where the StatefulSet is not seen, what stores report is.
        let reporting = self.seen.keys().filter_map(|s| ordinal(s)).max().map_or(0, |n| n + 1);
        let mut wanted = live.unwrap_or(target.max(reporting)).max(target);
        while wanted > target && self.may_go(&store_name(wanted - 1)) {
            wanted -= 1;
        }
        wanted
    }

    /// Whether nothing names this store, and nothing is to.
    fn is_needless(&self, store: &str) -> bool {
        let named = |state: &Topology| state.stores().contains(&store);
        self.state.is_some_and(|state| !named(state)) && !self.outcome.stores_wanted.contains(store)
    }

    /// A pod goes, and its volume, only when its store itself reports that it holds nothing, or can never report
    /// anything.
    fn may_go(&self, store: &str) -> bool {
        let claim = || self.cluster.claims.get(store).is_some_and(|c| volumes::bound(c));
        self.is_needless(store)
            && match self.seen.get(store) {
                Some(s) if s.living => is_empty(s) && s.foreign.is_empty(),
                // It was given up, and that was written down; or its volume is gone.
                Some(s) => s.silent > self.lost_after || self.cluster.is_gone(store),
                // Never heard: it has nothing if it never had a volume.
                None => !claim(),
            }
    }
}

/// Whether this annotation of a claim names the keyspace with this uid.
fn names(claim: &PersistentVolumeClaim, annotation: &str, uid: &str) -> bool {
    claim.annotations().get(annotation).is_some_and(|named| named == uid)
}

/// Whether a store reports that it holds no replica of anything.
fn is_empty(seen: &Seen) -> bool {
    seen.report.as_ref().is_none_or(|r| r.replicas.is_empty())
}

/// Whether the topology has a replica on this store.
fn holds(state: &Topology, store: &str) -> bool {
    let here = |view: &View| view.places().any(|p| p.assignment.store == store && p.assignment.replica != 0);
    state.views().any(here) || state.drops.iter().any(|d| d.store == store)
}

/// Whether this pod's store was emptied because its node is drained.
fn drained(state: &Topology, pod: &Pod, store: &str) -> bool {
    let asked = pod.uid().map(|uid| drain_request(&uid));
    state.replace.as_ref().is_some_and(|r| r.emptied && r.store == store && Some(&r.request) == asked.as_ref())
}

/// Changes whenever something that the operator sets may have changed.
fn mark<K: Resource>(object: &K) -> String {
    let meta = object.meta();
    let counted = meta.generation.filter(|g| *g > 0).map(|g| g.to_string());
    let version = counted.or_else(|| meta.resource_version.clone()).unwrap_or_default();
    format!("{}/{version}", meta.uid.as_deref().unwrap_or_default())
}

/// Whether everything that `desired` says is so in `live`.
fn is_in<K: Object>(desired: &K, live: &K) -> bool {
    fn within(desired: &Value, live: &Value) -> bool {
        match (desired, live) {
            (Value::Null, _) => true,
            (Value::Object(d), Value::Object(l)) => {
                d.iter().all(|(key, value)| l.get(key).is_some_and(|found| within(value, found)))
            }
            (Value::Array(d), Value::Array(l)) => d.len() == l.len() && d.iter().zip(l).all(|(d, l)| within(d, l)),
            _ => desired == live,
        }
    }
    match (serde_json::to_value(desired), serde_json::to_value(live)) {
        (Ok(desired), Ok(live)) => within(&desired, &live),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::StatefulSet;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_so_already_is_not_written_again() {
        let set = |replicas: i32, more: Value| -> StatefulSet {
            let mut value = json!({"metadata": {"name": "a", "namespace": "n"}, "spec": {"replicas": replicas, "serviceName": "a",
                "selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": [{"name": "store"}]}}}});
            value["spec"]["template"]["spec"]["containers"][0]["image"] = more;
            serde_json::from_value(value).unwrap()
        };
        assert!(is_in(&set(3, Value::Null), &set(3, json!("x"))), "what the API server adds does not count");
        assert!(!is_in(&set(3, json!("y")), &set(3, json!("x"))));
        assert!(!is_in(&set(4, Value::Null), &set(3, Value::Null)));
    }
}
