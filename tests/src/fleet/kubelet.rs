//! What nodes, scheduler and volume controller do to pods and claims. Level-triggered: an
//! event, or a change of the world, makes a pod be looked at, and one thing is done to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Inner, Store, store};

/// What failed, or waits for something that has no event, is looked at again this often.
const AGAIN: Duration = Duration::from_millis(300);
/// Only these are the fleet's.
const OURS: &str = "app.kubernetes.io/name=vasto";

#[derive(Default)]
struct Seen {
    pods: BTreeMap<String, Pod>,
    claims: BTreeMap<String, PersistentVolumeClaim>,
}

/// A process, by its pod's uid: asked to end when the guard is dropped.
type Processes = BTreeMap<String, (CancellationToken, DropGuard)>;

/// Takes care of a namespace until stopped.
pub(super) async fn run(inner: Arc<Inner>, stop: CancellationToken) {
    let pods: Api<Pod> = Api::namespaced(inner.client.clone(), &inner.namespace);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(inner.client.clone(), &inner.namespace);
    let config = watcher::Config::default().labels(OURS);
    let mut pods = watcher(pods, config).default_backoff().boxed();
    let mut claims = watcher(claims, watcher::Config::default()).default_backoff().boxed();
    let mut again = tokio::time::interval(AGAIN);
    let mut kubelet = Kubelet::new(inner.clone());
    let mut changed = inner.changes();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(event) = pods.next() => if let Ok(event) = event { kubelet.pod_event(event) },
            Some(event) = claims.next() => if let Ok(event) = event { kubelet.claim_event(event) },
            Some(done) = kubelet.tasks.join_next() => kubelet.done(done.ok()),
            _ = again.tick() => kubelet.look_at_all(),
            Ok(()) = changed.changed() => kubelet.look_at_ready(),
        }
        kubelet.go_on();
    }
}

struct Kubelet {
    inner: Arc<Inner>,
    seen: Seen,
    /// Listed since a watch began anew.
    listed_pods: BTreeSet<String>,
    listed_claims: BTreeSet<String>,
    processes: Processes,
    /// To be looked at.
    dirty: BTreeSet<String>,
    /// Being looked at.
    busy: BTreeSet<String>,
    tasks: JoinSet<(String, Option<Started>)>,
}

/// A pod that is bound and whose volume is there: its process may start.
struct Started {
    uid: String,
    store: Store,
    operator: String,
}

impl Kubelet {
    fn new(inner: Arc<Inner>) -> Self {
        Self {
            inner,
            seen: Seen::default(),
            listed_pods: BTreeSet::new(),
            listed_claims: BTreeSet::new(),
            processes: Processes::new(),
            dirty: BTreeSet::new(),
            busy: BTreeSet::new(),
            tasks: JoinSet::new(),
        }
    }

    fn pod_event(&mut self, event: Event<Pod>) {
        match event {
            Event::Apply(pod) => self.pod(pod),
            Event::InitApply(pod) => {
                self.listed_pods.insert(pod.name_any());
                self.pod(pod);
            }
            Event::Delete(pod) => self.pod_gone(&pod.name_any()),
            Event::Init => self.listed_pods.clear(),
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed_pods);
                let gone: Vec<String> = self.seen.pods.keys().filter(|n| !listed.contains(*n)).cloned().collect();
                gone.iter().for_each(|name| self.pod_gone(name));
            }
        }
    }

    fn pod(&mut self, pod: Pod) {
        let name = pod.name_any();
        let other = self.seen.pods.get(&name).is_some_and(|old| old.uid() != pod.uid());
        if other {
            self.pod_gone(&name);
        }
        self.dirty.insert(name.clone());
        self.seen.pods.insert(name, pod);
    }

    /// Without a word: whoever deleted it did not wait for its process.
    fn pod_gone(&mut self, name: &str) {
        if let Some(uid) = self.seen.pods.remove(name).and_then(|pod| pod.uid()) {
            self.processes.remove(&uid);
            self.inner.change(|w| w.end(&uid));
        }
        // Others may have waited for its claim.
        self.dirty.extend(self.seen.pods.keys().cloned());
    }

    fn claim_event(&mut self, event: Event<PersistentVolumeClaim>) {
        match event {
            Event::Apply(claim) => self.claim(claim),
            Event::InitApply(claim) => {
                self.listed_claims.insert(claim.name_any());
                self.claim(claim);
            }
            Event::Delete(claim) => self.claim_gone(&claim.name_any()),
            Event::Init => self.listed_claims.clear(),
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed_claims);
                let gone: Vec<String> = self.seen.claims.keys().filter(|n| !listed.contains(*n)).cloned().collect();
                gone.iter().for_each(|name| self.claim_gone(name));
            }
        }
    }

    fn claim(&mut self, claim: PersistentVolumeClaim) {
        let name = claim.name_any();
        if self.seen.claims.get(&name).is_some_and(|old| old.uid() != claim.uid()) {
            self.claim_gone(&name);
        }
        let users = self.seen.pods.values().filter(|pod| claim_of(pod).as_deref() == Some(&name));
        self.dirty.extend(users.map(ResourceExt::name_any));
        self.seen.claims.insert(name, claim);
    }

    fn claim_gone(&mut self, name: &str) {
        if let Some(uid) = self.seen.claims.remove(name).and_then(|claim| claim.uid()) {
            self.inner.change(|w| w.remove_volume(&uid));
        }
    }

    fn look_at_all(&mut self) {
        self.dirty.extend(self.seen.pods.keys().cloned());
    }

    /// A process has become ready, or is no longer.
    fn look_at_ready(&mut self) {
        let inner = &self.inner;
        let differs = |pod: &&Pod| {
            let uid = pod.uid().unwrap_or_default();
            inner.with(|w| w.stores.contains_key(&uid) && w.is_ready(&uid) != is_ready(pod))
        };
        let names: Vec<String> = self.seen.pods.values().filter(differs).map(ResourceExt::name_any).collect();
        self.dirty.extend(names);
    }

    /// Looks at what is to be looked at, one task for each pod at most.
    fn go_on(&mut self) {
        let all = std::mem::take(&mut self.dirty).into_iter();
        let (free, busy): (BTreeSet<String>, BTreeSet<String>) = all.partition(|name| !self.busy.contains(name));
        self.dirty = busy;
        for name in free {
            let Some(pod) = self.seen.pods.get(&name).cloned() else { continue };
            if pod.metadata.deletion_timestamp.is_some() {
                // Its process is asked to end, and does so in its own time.
                if let Some((stop, _)) = pod.uid().and_then(|uid| self.processes.remove(&uid)) {
                    stop.cancel();
                }
            }
            let claim = claim_of(&pod).and_then(|claim| self.seen.claims.get(&claim).cloned());
            self.busy.insert(name.clone());
            let inner = self.inner.clone();
            self.tasks.spawn(async move {
                let started = look(&inner, &pod, claim.as_ref()).await;
                (name, started.unwrap_or_default())
            });
        }
    }

    fn done(&mut self, done: Option<(String, Option<Started>)>) {
        let Some((name, started)) = done else {
            self.busy.clear();
            return;
        };
        self.busy.remove(&name);
        let Some(Started { uid, store, operator }) = started else { return };
        let still = self
            .seen
            .pods
            .get(&name)
            .is_some_and(|pod| pod.uid().as_ref() == Some(&uid) && pod.metadata.deletion_timestamp.is_none());
        if still && !self.processes.contains_key(&uid) {
            let stop = CancellationToken::new();
            self.inner.change(|w| w.start(&uid, store));
            tokio::spawn(store::run(self.inner.clone(), uid.clone(), operator, stop.clone()));
            self.processes.insert(uid, (stop.clone(), stop.drop_guard()));
            self.dirty.insert(name);
        }
    }
}

fn claim_of(pod: &Pod) -> Option<String> {
    let volumes = pod.spec.as_ref()?.volumes.as_ref()?;
    volumes.iter().find_map(|v| v.persistent_volume_claim.as_ref()).map(|c| c.claim_name.clone())
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// The value of an argument, as `--name=value` or `--name value`.
fn argument(pod: &Pod, name: &str) -> Option<String> {
    let args = pod.spec.as_ref()?.containers.first()?.args.clone()?;
    let flag = format!("--{name}");
    args.iter().enumerate().find_map(|(i, arg)| match arg.strip_prefix(&flag)? {
        "" => args.get(i + 1).cloned(),
        rest => rest.strip_prefix('=').map(str::to_owned),
    })
}

type Result<T> = std::result::Result<T, kube::Error>;

/// Does the one thing that is to be done to this pod now.
async fn look(inner: &Inner, pod: &Pod, claim: Option<&PersistentVolumeClaim>) -> Result<Option<Started>> {
    let pods: Api<Pod> = Api::namespaced(inner.client.clone(), &inner.namespace);
    let (name, uid) = (pod.name_any(), pod.uid().unwrap_or_default());
    let faults = inner.faults();
    if pod.metadata.deletion_timestamp.is_some() {
        if !faults.stuck.contains(&name) {
            inner.change(|w| w.end(&uid));
            let preconditions = Preconditions { uid: Some(uid), resource_version: None };
            let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
            pods.delete(&name, &now.preconditions(preconditions)).await?;
        }
        return Ok(None);
    }
    let bound = pod.spec.as_ref().is_some_and(|s| s.node_name.is_some());
    let Some(claim) = claim.filter(|c| c.metadata.deletion_timestamp.is_none() || bound) else {
        return refuse(&pods, pod, "its claim is missing or is being deleted").await;
    };
    if !bound {
        if let Some(why) = faults.unschedulable.get(&name) {
            return refuse(&pods, pod, why).await;
        }
        let node = match node_for(inner, claim).await? {
            Ok(node) => node,
            Err(why) => return refuse(&pods, pod, &why).await,
        };
        provide(inner, claim, &node).await?;
        let binding = json!({"metadata": {"name": name}, "target": {"kind": "Node", "name": node}});
        let _: serde_json::Value = pods.create_subresource("binding", &name, &PostParams::default(), &binding).await?;
        return Ok(None);
    }
    resize(inner, claim, &faults.unresizable).await?;
    if inner.with(|w| !w.stores.contains_key(&uid)) {
        return Ok(started(inner, pod, claim, faults.silent.contains(&name)));
    }
    let ready = inner.with(|w| w.is_ready(&uid));
    if ready != is_ready(pod) || pod.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Running") {
        let status = running(pod, ready);
        pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&status)).await?;
    }
    Ok(None)
}

/// Says that no node takes the pod.
async fn refuse(pods: &Api<Pod>, pod: &Pod, why: &str) -> Result<Option<Started>> {
    let said = pod
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten())
        .any(|c| c.type_ == "PodScheduled" && c.status == "False" && c.message.as_deref() == Some(why));
    if !said {
        let condition = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why});
        let status = json!({"status": {"conditions": [condition]}});
        pods.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(&status)).await?;
    }
    Ok(None)
}

fn running(pod: &Pod, ready: bool) -> serde_json::Value {
    let container = pod.spec.as_ref().and_then(|s| s.containers.first());
    let image = container.and_then(|c| c.image.clone()).unwrap_or_default();
    let truth = if ready { "True" } else { "False" };
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
    json!({"status": {
        "phase": "Running",
        "conditions": [
            condition("PodScheduled", "True"), condition("Initialized", "True"),
            condition("ContainersReady", truth), condition("Ready", truth),
        ],
        "containerStatuses": [{
            "name": container.map(|c| c.name.clone()).unwrap_or_default(), "image": image, "imageID": image,
            "ready": ready, "started": true, "restartCount": 0, "state": {"running": {}},
        }],
    }})
}

fn started(inner: &Inner, pod: &Pod, claim: &PersistentVolumeClaim, silent: bool) -> Option<Started> {
    let keyspace = argument(pod, "keyspace")?;
    let keyspace = keyspace.rsplit('/').next()?.to_owned();
    let (name, uid) = (pod.name_any(), pod.uid()?);
    let claim_uid = claim.uid()?;
    let store = Store {
        name: name.strip_prefix(&format!("{keyspace}-"))?.to_owned(),
        only: argument(pod, "uid")?,
        volume: claim_uid.clone(),
        address: format!("{name}.{keyspace}-store.{}.svc:8279", inner.namespace),
        incarnation: 0,
        silent,
        stopping: false,
        pod: name,
    };
    inner.change(|w| w.volume(&claim_uid, &claim.name_any(), capacity(claim)));
    Some(Started { uid, store, operator: argument(pod, "operator")? })
}

fn requested(claim: &PersistentVolumeClaim) -> Option<String> {
    Some(claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?.get("storage")?.0.clone())
}

fn provided(claim: &PersistentVolumeClaim) -> Option<String> {
    Some(claim.status.as_ref()?.capacity.as_ref()?.get("storage")?.0.clone())
}

fn capacity(claim: &PersistentVolumeClaim) -> u64 {
    let text = provided(claim).or_else(|| requested(claim)).unwrap_or_default();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => 1,
    };
    digits.parse::<u64>().unwrap_or(0) * unit
}

/// The volume of a claim.
fn volume_name(claim: &PersistentVolumeClaim) -> String {
    format!("pv-{}", claim.uid().unwrap_or_default())
}

/// A node that takes pods and where the claim's volume is, or why there is none.
async fn node_for(inner: &Inner, claim: &PersistentVolumeClaim) -> Result<std::result::Result<String, String>> {
    if !inner.nodes {
        return Ok(Ok("somewhere".to_owned()));
    }
    let nodes: Api<Node> = Api::all(inner.client.clone());
    let prefix = format!("{}-node-", inner.namespace);
    let all: Vec<Node> =
        nodes.list(&ListParams::default()).await?.into_iter().filter(|n| n.name_any().starts_with(&prefix)).collect();
    let cordoned = |n: &&Node| n.spec.as_ref().is_some_and(|s| s.unschedulable == Some(true));
    let volumes: Api<PersistentVolume> = Api::all(inner.client.clone());
    if let Some(volume) = volumes.get_opt(&volume_name(claim)).await? {
        let node = volume.annotations().get("vasto.test/node").cloned().unwrap_or_default();
        return Ok(match all.iter().find(|n| n.name_any() == node) {
            None => Err(format!(
                "0/{} nodes are available: node(s) didn't match PersistentVolume's node affinity",
                all.len()
            )),
            Some(n) if cordoned(&n) => Err("node(s) were unschedulable".to_owned()),
            Some(_) => Ok(node),
        });
    }
    let pods: Api<Pod> = Api::namespaced(inner.client.clone(), &inner.namespace);
    let pods = pods.list(&ListParams::default().labels(OURS)).await?;
    let load = |n: &Node| {
        let on = |p: &&Pod| p.spec.as_ref().and_then(|s| s.node_name.as_ref()) == n.metadata.name.as_ref();
        pods.iter().filter(on).count()
    };
    // Stores are spread: each has a node of its own where that is possible.
    let ordinal = claim.name_any().rsplit('-').next().and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
    let own = format!("{prefix}{}", ordinal % super::NODES);
    let best = all.iter().filter(|n| !cordoned(n)).min_by_key(|n| (n.name_any() != own, load(n), n.name_any()));
    Ok(best.map(ResourceExt::name_any).ok_or_else(|| "0 nodes are available".to_owned()))
}

/// Gives a claim its volume.
async fn provide(inner: &Inner, claim: &PersistentVolumeClaim, node: &str) -> Result<()> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(inner.client.clone(), &inner.namespace);
    let (name, volume) = (claim.name_any(), volume_name(claim));
    let size = requested(claim).unwrap_or_default();
    let bound = claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
    if bound {
        return Ok(());
    }
    if inner.nodes {
        make_volume(&inner.client, &volume, &size, node, claim).await?;
    }
    let preconditions = json!({"uid": claim.uid()});
    if claim.spec.as_ref().is_some_and(|s| s.volume_name.is_none()) {
        let patch = json!({"metadata": preconditions, "spec": {"volumeName": volume}});
        claims.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    }
    let status = json!({"phase": "Bound", "capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"]});
    let patch = json!({"metadata": preconditions, "status": status});
    claims.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(())
}

async fn make_volume(client: &Client, name: &str, size: &str, node: &str, claim: &PersistentVolumeClaim) -> Result<()> {
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let expression = json!({"key": "kubernetes.io/hostname", "operator": "In", "values": [node]});
    let volume = json!({
        "apiVersion": PersistentVolume::api_version(&()), "kind": PersistentVolume::kind(&()),
        "metadata": {"name": name, "annotations": {"vasto.test/node": node}},
        "spec": {
            "capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"],
            "storageClassName": claim.spec.as_ref().and_then(|s| s.storage_class_name.clone()),
            "claimRef": {"kind": "PersistentVolumeClaim", "namespace": claim.namespace(), "name": claim.name_any(), "uid": claim.uid()},
            "local": {"path": "/somewhere"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}},
        },
    });
    let volume: PersistentVolume = serde_json::from_value(volume).map_err(kube::Error::SerdeError)?;
    match volumes.create(&PostParams::default(), &volume).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        made => made.map(|_| ()),
    }
}

/// Makes the volume as large as the claim asks for.
async fn resize(inner: &Inner, claim: &PersistentVolumeClaim, unresizable: &[String]) -> Result<()> {
    let (name, wanted) = (claim.name_any(), requested(claim));
    if wanted.is_none() || provided(claim) == wanted || unresizable.contains(&name) {
        return Ok(());
    }
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(inner.client.clone(), &inner.namespace);
    let patch = json!({"metadata": {"uid": claim.uid()}, "status": {"capacity": {"storage": wanted}}});
    let larger = claims.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    let uid = larger.uid().unwrap_or_default();
    inner.change(|w| {
        w.volume(&uid, &name, capacity(&larger));
        // There is room again.
        w.volumes.get_mut(&uid).into_iter().for_each(|v| v.full = false);
        w.work("a volume has grown");
    });
    Ok(())
}
