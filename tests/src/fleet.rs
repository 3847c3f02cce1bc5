//! Kubelets, scheduler, volumes and stores in one, for a control plane without nodes: it
//! runs a fake store for each pod of a namespace, and does to pods and claims what nodes do.
//! Faults strike where a test says, and a ledger of keys written knows what was lost.

mod kubelet;
mod store;
mod world;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams};
use kube::{Client, ResourceExt};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use vasto_client::env::Env;
use vasto_client::v1::Topology;

pub use world::{Held, Holds, Replica, Store, Volume, World};

use crate::control_plane::create;

/// What strikes pods and claims, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// Pods that no node takes, and why.
    unschedulable: BTreeMap<String, String>,
    /// Pods whose node never says that they have ended.
    stuck: Vec<String>,
    /// Claims that aren't made larger.
    unresizable: Vec<String>,
    /// Pods whose process does not speak to the operator.
    silent: Vec<String>,
}

pub(crate) struct Inner {
    client: Client,
    namespace: String,
    env: Env,
    /// Volumes are tied to the nodes that they were first used on, and nodes are objects.
    nodes: bool,
    /// What names of Services resolve to.
    endpoints: Mutex<BTreeMap<String, Vec<String>>>,
    world: Mutex<World>,
    faults: Mutex<Faults>,
    changed: watch::Sender<u64>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn with<T>(&self, look: impl FnOnce(&World) -> T) -> T {
        look(&locked(&self.world))
    }

    /// Changes the world; everyone looks at it again.
    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let done = change(&mut locked(&self.world));
        self.changed.send_modify(|serial| *serial += 1);
        done
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn resolve(&self, service: &str) -> Vec<String> {
        locked(&self.endpoints).get(service).cloned().unwrap_or_default()
    }

    fn faults(&self) -> Faults {
        locked(&self.faults).clone()
    }
}

/// The nodes and stores of one namespace, which end with this value.
pub struct Fleet {
    inner: Arc<Inner>,
    _ends: DropGuard,
}

/// The nodes of a fleet that has them.
pub const NODES: u32 = 4;

impl Fleet {
    /// Takes care of the pods of this namespace.
    pub fn start(client: &Client, namespace: &str) -> Self {
        Self::begin(client, namespace, false)
    }

    /// The same, with nodes as objects and volumes that are tied to them.
    pub async fn start_with_nodes(client: &Client, namespace: &str) -> Self {
        for number in 0..NODES {
            let name = format!("{namespace}-node-{number}");
            let labels = serde_json::json!({"kubernetes.io/hostname": name});
            create::<Node>(client, None, serde_json::json!({"metadata": {"name": name, "labels": labels}})).await;
        }
        Self::begin(client, namespace, true)
    }

    fn begin(client: &Client, namespace: &str, nodes: bool) -> Self {
        let seed = namespace.bytes().fold(7, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(b.into()));
        let inner = Arc::new(Inner {
            client: client.clone(),
            namespace: namespace.to_owned(),
            env: Env::real(),
            nodes,
            endpoints: Mutex::default(),
            world: Mutex::new(World::new(seed << 20)),
            faults: Mutex::default(),
            changed: watch::Sender::new(0),
        });
        let stop = CancellationToken::new();
        tokio::spawn(kubelet::run(inner.clone(), stop.clone()));
        Self { inner, _ends: stop.drop_guard() }
    }

    /// What this name of a Service resolves to from now on.
    pub fn resolve_to(&self, service: &str, addresses: Vec<String>) {
        locked(&self.inner.endpoints).insert(service.to_owned(), addresses);
        self.inner.change(|_| ());
    }

    /// Looks at the volumes and processes.
    pub fn with<T>(&self, look: impl FnOnce(&World) -> T) -> T {
        self.inner.with(look)
    }

    // ---- clients ----

    /// Writes so many new keys, one after another. Each must be taken.
    pub fn write(&self, uid: &str, count: u64) {
        for _ in 0..count {
            let taken = self.inner.change(|w| {
                let number = w.id();
                w.write(uid, number)
            });
            assert!(taken, "nobody takes a write: {:#?}", self.with(|w| w.truth(uid).cloned()));
        }
    }

    /// A client that writes a key now and then, until the guard is dropped.
    pub fn writer(&self, uid: &str) -> DropGuard {
        let stop = CancellationToken::new();
        let (inner, uid, ended) = (self.inner.clone(), uid.to_owned(), stop.clone());
        tokio::spawn(async move {
            for _ in 0..500 {
                inner.change(|w| {
                    let number = w.id();
                    w.write(&uid, number)
                });
                tokio::select! {
                    () = ended.cancelled() => return,
                    () = tokio::time::sleep(Duration::from_millis(40)) => {}
                }
            }
        });
        stop.drop_guard()
    }

    // ---- what must hold ----

    /// Panics if anything was wrong at any moment.
    pub fn clean(&self) {
        let complaints = self.with(World::complaints);
        assert!(complaints.is_empty(), "the ledger of {}: {complaints:#?}", self.inner.namespace);
    }

    /// Panics if anything was wrong, or if replicas don't hold just what they must by this topology's keys.
    pub async fn at_rest(&self, uid: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let complaints = self.with(|w| w.at_rest(uid));
            if complaints.is_empty() {
                return;
            }
            let now = self.with(|w| w.truth(uid).cloned());
            assert!(
                Instant::now() < deadline && self.with(World::complaints).is_empty(),
                "the ledger of {}: {complaints:#?}\n{now:#?}",
                self.inner.namespace
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Keys copied so far.
    pub fn copied(&self) -> u64 {
        self.with(|w| w.copied)
    }

    /// The newest topology that a volume has.
    pub fn topology(&self, uid: &str) -> Option<Topology> {
        self.with(|w| w.truth(uid).cloned())
    }

    /// A test is about to delete this keyspace.
    pub fn forget(&self, uid: &str) {
        self.inner.change(|w| w.forget(uid));
    }

    /// A test has destroyed copies: what is nowhere any more is not missed.
    pub fn excuse_lost(&self, uid: &str) {
        self.inner.change(|w| w.excuse_lost(uid));
    }

    /// A test is about to take stores away: writes need not be taken meanwhile.
    pub fn expect_outage(&self, uid: &str, outage: bool) {
        self.inner.change(|w| w.expect_outage(uid, outage));
    }

    // ---- faults ----

    fn fault(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut locked(&self.inner.faults));
        self.inner.change(|_| ());
    }

    /// Holds stores up.
    pub fn hold(&self, change: impl FnOnce(&mut Holds)) {
        self.inner.change(|w| {
            change(&mut w.holds);
            w.work("stores are held up otherwise");
        });
    }

    /// No node takes this pod (`None`: one does).
    pub fn unschedulable(&self, pod: &str, why: Option<&str>) {
        self.fault(|f| match why {
            Some(why) => drop(f.unschedulable.insert(pod.to_owned(), why.to_owned())),
            None => drop(f.unschedulable.remove(pod)),
        });
    }

    /// The node of this pod never says that it has ended, as one that can't be reached.
    pub fn stuck(&self, pod: &str, stuck: bool) {
        self.fault(|f| set(&mut f.stuck, pod, stuck));
    }

    /// The claim is not made larger, whatever it asks for.
    pub fn unresizable(&self, claim: &str, unresizable: bool) {
        self.fault(|f| set(&mut f.unresizable, claim, unresizable));
    }

    /// The process of this pod does not speak to the operator, though it lives.
    pub fn silent(&self, pod: &str, silent: bool) {
        self.fault(|f| set(&mut f.silent, pod, silent));
        self.inner.change(|w| {
            w.stores.values_mut().filter(|s| s.pod == pod).for_each(|s| s.silent = silent);
        });
    }

    /// The disk of a claim is full.
    pub fn full(&self, claim: &str, full: bool) {
        self.inner.change(|w| {
            w.volumes.values_mut().filter(|v| v.claim == claim).for_each(|v| v.full = full);
            w.work("a disk is full, or no longer");
        });
    }

    /// The replicas on a claim need a person (an empty text: no longer).
    pub fn broken(&self, claim: &str, fault: &str) {
        self.inner.change(|w| {
            let volumes = w.volumes.values_mut().filter(|v| v.claim == claim);
            for replica in volumes.flat_map(|v| v.keyspaces.values_mut()).flat_map(|k| k.replicas.values_mut()) {
                fault.clone_into(&mut replica.fault);
            }
            w.work("a replica is broken, or no longer");
        });
    }

    /// Data of another keyspace turns up on a claim.
    pub fn foreign(&self, claim: &str, uid: &str) {
        self.inner.change(|w| {
            for volume in w.volumes.values_mut().filter(|v| v.claim == claim) {
                let held =
                    Held { topology: Topology { uid: uid.to_owned(), ..Topology::default() }, ..Held::default() };
                volume.keyspaces.insert(uid.to_owned(), held);
            }
        });
    }

    /// The volume of a claim is empty from now on.
    pub fn wipe(&self, claim: &str) {
        self.inner.change(|w| w.wipe(claim));
    }

    /// The process of this pod ends without a word, and starts again.
    pub fn crash(&self, pod: &str) {
        self.inner.change(|w| {
            let found = w.stores.iter().find(|(_, s)| s.pod == pod).map(|(uid, s)| (uid.clone(), s.clone()));
            if let Some((uid, store)) = found {
                w.end(&uid);
                w.start(&uid, store);
            }
        });
    }

    /// A node goes for good, with what ran and what lay on it.
    pub async fn lose_node(&self, node: &str) {
        let pods: Api<Pod> = Api::namespaced(self.inner.client.clone(), &self.inner.namespace);
        let nodes: Api<Node> = Api::all(self.inner.client.clone());
        nodes.delete(node, &DeleteParams::default()).await.unwrap();
        for pod in pods.list(&kube::api::ListParams::default()).await.unwrap() {
            if pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node) {
                // As the pod garbage collector does.
                let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
                let _ = pods.delete(&pod.name_any(), &now).await;
            }
        }
    }

    /// The node that a pod runs on; empty if none does, or there is no such pod.
    pub async fn node_of(&self, pod: &str) -> String {
        let pods: Api<Pod> = Api::namespaced(self.inner.client.clone(), &self.inner.namespace);
        pods.get_opt(pod).await.unwrap().and_then(|p| p.spec).and_then(|s| s.node_name).unwrap_or_default()
    }

    /// What is there, for a failed test.
    pub fn describe(&self) -> String {
        self.with(|w| {
            let mut text = String::new();
            for (uid, volume) in &w.volumes {
                let held: Vec<String> = volume
                    .keyspaces
                    .iter()
                    .map(|(uid, k)| {
                        let replicas = k.replicas.iter().map(|(id, r)| {
                            format!(
                                "{id:016x} shard {} born {} served {} keys {}",
                                r.shard,
                                r.born,
                                r.served,
                                r.has.len()
                            )
                        });
                        let (version, phase) = (k.topology.version, k.topology.phase().as_str_name());
                        format!("{uid} v{version} {phase} [{}]", replicas.collect::<Vec<_>>().join(", "))
                    })
                    .collect();
                text += &format!("volume {uid} of {}: {}\n", volume.claim, held.join("; "));
            }
            for store in w.stores.values() {
                text += &format!("running: {} as {} of {}\n", store.pod, store.name, store.only);
            }
            text
        })
    }
}

fn set(list: &mut Vec<String>, name: &str, on: bool) {
    list.retain(|n| n != name);
    if on {
        list.push(name.to_owned());
    }
}
