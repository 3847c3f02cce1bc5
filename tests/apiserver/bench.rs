//! A namespace of its own for each test: its operators, its fleet, and what people do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::client::ClientBuilder;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vasto_client::env::Env;
use vasto_client::topology::qualified;
use vasto_client::v1::{self, Topology, View};
use vasto_crds::{Keyspace, KeyspaceSpec, Phase};
use vasto_operator::kube::{Error, Monitor, Options, Timings, serve};
use vasto_tests::control_plane::{CONTROLLERS, ControlPlane, OPERATOR, Who, create};
use vasto_tests::fleet::Fleet;

use crate::tap::{Strike, Tap};

/// The name under which stores look for operators.
pub const SERVICE: &str = "vasto-operator.vasto-system.svc:8278";
/// Another name of the same.
pub const OTHER_SERVICE: &str = "operator.vasto.svc:8278";
pub const IMAGE: &str = "registry.test/vasto:1";
/// What a change may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

static PLANE: OnceCell<Arc<ControlPlane>> = OnceCell::const_new();

/// The one control plane of this process.
pub async fn plane() -> Arc<ControlPlane> {
    PLANE.get_or_init(own_plane).await.clone()
}

/// One that no other test uses, for an operator that serves the whole cluster.
pub async fn own_plane() -> Arc<ControlPlane> {
    if let Ok(filter) = std::env::var("VASTO_TEST_LOG") {
        let filter = tracing_subscriber::EnvFilter::new(filter);
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    }
    Arc::new(ControlPlane::start(&CONTROLLERS).await)
}

/// Short ones, so that a takeover takes two seconds.
pub fn timings() -> Timings {
    Timings {
        lease: Duration::from_secs(2),
        renew: Duration::from_millis(500),
        settle: Duration::from_millis(700),
        fence: Duration::from_millis(500),
        progress: Duration::from_millis(100),
        tick: Duration::from_millis(250),
    }
}

/// Where operators are found, for a fleet.
#[derive(Clone)]
struct Endpoints {
    fleet: Arc<Fleet>,
    addresses: Arc<Mutex<Vec<String>>>,
}

impl Endpoints {
    fn change(&self, change: impl FnOnce(&mut Vec<String>)) {
        let mut addresses = self.addresses.lock().unwrap();
        change(&mut addresses);
        self.fleet.resolve_to(SERVICE, addresses.clone());
        self.fleet.resolve_to(OTHER_SERVICE, addresses.clone());
    }
}

/// A namespace with a fleet.
pub struct Bench {
    pub plane: Arc<ControlPlane>,
    pub namespace: String,
    pub client: Client,
    pub fleet: Arc<Fleet>,
    endpoints: Endpoints,
}

/// How an operator is run.
#[derive(Clone)]
pub struct Manner {
    /// Its pod's name.
    pub pod: String,
    pub strike: Strike,
    pub image: String,
    pub service: String,
    pub timings: Timings,
    /// It serves all namespaces.
    pub cluster: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            pod: "operator-a".to_owned(),
            strike: Strike::Never,
            image: IMAGE.to_owned(),
            service: SERVICE.to_owned(),
            timings: timings(),
            cluster: false,
        }
    }
}

/// An operator, in a runtime of its own so that it can be ended as a process is.
pub struct Operator {
    pub tap: Tap,
    pub address: String,
    pub monitor: Monitor,
    endpoints: Endpoints,
    runtime: Option<Runtime>,
    stop: CancellationToken,
    served: Option<JoinHandle<Result<(), Error>>>,
}

impl Operator {
    /// Ends it without a word.
    pub fn kill(mut self) {
        self.end_now();
    }

    fn end_now(&mut self) {
        self.tap.cut_off();
        self.endpoints.change(|all| all.retain(|a| *a != self.address));
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Ends it as SIGTERM does.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(served) = self.served.take() {
            served.await.unwrap().unwrap();
        }
        self.end_now();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.end_now();
    }
}

impl Bench {
    /// A namespace whose name begins with `label`, with the operator's rights in it and a fleet.
    pub async fn new(label: &str) -> Self {
        let plane = plane().await;
        let namespace = fresh_namespace(label);
        plane.namespace(&namespace).await;
        let client = plane.client();
        let fleet = Arc::new(Fleet::start(&client, &namespace));
        Self::over(plane, namespace, client, fleet)
    }

    /// On a given control plane.
    pub fn over(plane: Arc<ControlPlane>, namespace: String, client: Client, fleet: Arc<Fleet>) -> Self {
        let endpoints = Endpoints { fleet: fleet.clone(), addresses: Arc::default() };
        Self { plane, namespace, client, fleet, endpoints }
    }

    /// Starts an operator.
    pub fn operator(&self) -> Operator {
        self.operator_as(Manner::default())
    }

    /// Starts an operator under this pod's name.
    pub fn operator_named(&self, pod: &str, strike: Strike) -> Operator {
        self.operator_as(Manner { pod: pod.to_owned(), strike, ..Manner::default() })
    }

    /// Starts an operator in this manner.
    pub fn operator_as(&self, manner: Manner) -> Operator {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let guard = runtime.enter();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let tap = Tap::new(manner.strike);
        let home = if manner.cluster { "vasto-system" } else { &self.namespace };
        // With just the rights that the chart gives it.
        let who = Who::Account { namespace: home.to_owned(), name: OPERATOR.to_owned() };
        let client = ClientBuilder::try_from(self.plane.config(&who)).unwrap().with_layer(&tap).build();
        let monitor = Monitor::new();
        let options = Options {
            client,
            namespace: (!manner.cluster).then(|| self.namespace.clone()),
            image: manner.image,
            service: manner.service,
            pod: manner.pod,
            pod_namespace: home.to_owned(),
            advertise: address.clone(),
            env: Env::real(),
            timings: manner.timings,
            monitor: monitor.clone(),
        };
        let stop = CancellationToken::new();
        let served = runtime.spawn(serve(options, listener, stop.clone()));
        drop(guard);
        let endpoints = self.endpoints.clone();
        endpoints.change(|all| all.push(address.clone()));
        Operator { tap, address, monitor, endpoints, runtime: Some(runtime), stop, served: Some(served) }
    }

    /// Stores find an operator at this address too.
    pub fn found_at(&self, address: &str) {
        self.endpoints.change(|all| all.push(address.to_owned()));
    }

    // ---- what people do ----

    pub fn keyspaces(&self) -> Api<Keyspace> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn claims(&self) -> Api<PersistentVolumeClaim> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// What topologies and clients call a keyspace of here.
    pub fn qualified(&self, name: &str) -> String {
        qualified(&self.namespace, name)
    }

    /// Makes the keyspace `packages`.
    pub async fn create(&self, shards: u32, replication_factor: u32) -> Keyspace {
        self.create_spec(KeyspaceSpec::new(shards, replication_factor)).await
    }

    pub async fn create_spec(&self, spec: KeyspaceSpec) -> Keyspace {
        let object = json!({"metadata": {"name": "packages"}, "spec": spec});
        create::<Keyspace>(&self.client, Some(&self.namespace), object).await
    }

    /// Changes something of `packages`, as `kubectl patch --type merge` does.
    pub async fn patch(&self, change: Value) -> Keyspace {
        let params = PatchParams { field_manager: Some("kubectl".to_owned()), ..PatchParams::default() };
        self.keyspaces().patch("packages", &params, &Patch::Merge(&change)).await.unwrap()
    }

    /// `kubectl scale`, and the factor if it is given.
    pub async fn scale(&self, shards: u32, replication_factor: Option<u32>) -> Keyspace {
        let mut spec = json!({"shards": shards});
        if let Some(factor) = replication_factor {
            spec["replicationFactor"] = factor.into();
        }
        self.patch(json!({"spec": spec})).await
    }

    /// `kubectl annotate ks packages vasto.io/replace=STORE`.
    pub async fn replace(&self, store: &str) {
        self.patch(json!({"metadata": {"annotations": {"vasto.io/replace": store}}})).await;
    }

    /// `kubectl delete ks packages`. The ledger expects no more of it.
    pub async fn delete(&self) {
        let uid = self.keyspaces().get("packages").await.unwrap().uid().to_owned();
        self.fleet.forget(&uid);
        self.keyspaces().delete("packages", &DeleteParams::default()).await.unwrap();
    }

    // ---- what is waited for ----

    /// Follows `packages` until it is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&Keyspace) -> bool) -> Keyspace {
        self.until_within(PATIENCE, what, wanted).await
    }

    pub async fn until_within(&self, most: Duration, what: &str, wanted: impl Fn(&Keyspace) -> bool) -> Keyspace {
        let mut last = None;
        let follow = async {
            let mut states = kube::runtime::watcher::watch_object(self.keyspaces(), "packages").boxed();
            while let Some(state) = states.next().await {
                if let Ok(Some(keyspace)) = state {
                    if wanted(&keyspace) {
                        return keyspace;
                    }
                    last = Some(keyspace);
                }
            }
            panic!("the watch ended");
        };
        let found = tokio::time::timeout(most, follow).await;
        match found {
            Ok(keyspace) => keyspace,
            Err(_) => panic!("{what}: not within {most:?}; {}", self.describe(last.as_ref()).await),
        }
    }

    /// Waits until this many shards are there in so many copies, and nothing is changing.
    pub async fn settled(&self, shards: u32, replication_factor: u32) -> Keyspace {
        let what = format!("{shards} shards in {replication_factor} copies");
        self.until(&what, |k| settled(k, shards, replication_factor)).await
    }

    /// Waits until something holds that has no watch of its own.
    pub async fn wait(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds().await {
            if Instant::now() > deadline {
                let last = self.keyspaces().get_opt("packages").await.ok().flatten();
                panic!("{what}: not within {PATIENCE:?}; {}", self.describe(last.as_ref()).await);
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// The names of what is there of a kind.
    pub async fn names<K>(&self) -> Vec<String>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        let listed = api.list(&ListParams::default().labels("vasto.io/keyspace")).await.unwrap();
        let mut names: Vec<String> = listed.iter().map(ResourceExt::name_any).collect();
        names.sort();
        names
    }

    /// Waits until just these claims are there.
    pub async fn until_claims(&self, stores: std::ops::Range<u32>) {
        let wanted: Vec<String> = stores.map(|i| format!("data-packages-store-{i}")).collect();
        self.wait(&format!("the claims {wanted:?}"), async || self.names::<PersistentVolumeClaim>().await == wanted)
            .await;
    }

    /// The messages of all Events so far, with reasons.
    pub async fn events(&self) -> Vec<(String, String)> {
        let api: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut events = api.list(&ListParams::default()).await.unwrap().items;
        events.retain(|e| e.regarding.as_ref().is_some_and(|r| r.kind.as_deref() == Some("Keyspace")));
        let said = |e: k8s_openapi::api::events::v1::Event| (e.reason.unwrap_or_default(), e.note.unwrap_or_default());
        events.into_iter().map(said).collect()
    }

    /// All that may help, for a failed test.
    pub async fn describe(&self, keyspace: Option<&Keyspace>) -> String {
        let mut text = format!("namespace {}\n", self.namespace);
        if let Some(keyspace) = keyspace {
            let mut shown = keyspace.clone();
            let topology = shown.status.as_mut().and_then(|s| s.topology.take());
            shown.metadata.managed_fields = None;
            text += &format!("{:#}\n", serde_json::to_value(&shown).unwrap());
            text += &format!("{:#?}\n", topology.map(|t| decode(&t)));
        }
        for pod in self.pods().list(&ListParams::default()).await.unwrap() {
            let deleting = pod.metadata.deletion_timestamp.is_some();
            let phase = pod.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
            text += &format!("pod {} {phase} deleting {deleting}\n", pod.name_any());
        }
        for claim in self.claims().list(&ListParams::default()).await.unwrap() {
            let deleting = claim.metadata.deletion_timestamp.is_some();
            text += &format!("claim {} {} deleting {deleting}\n", claim.name_any(), claim.uid().unwrap_or_default());
        }
        text += &self.fleet.describe();
        text += &format!("{:#?}\n", self.fleet.with(|w| w.complaints()));
        for (reason, note) in self.events().await {
            text += &format!("event {reason}: {note}\n");
        }
        text
    }
}

static NAMESPACES: AtomicUsize = AtomicUsize::new(0);

/// A name that nothing else contains.
pub fn fresh_namespace(label: &str) -> String {
    format!("t{}-{label}", NAMESPACES.fetch_add(1, Ordering::Relaxed))
}

/// Whether it has come to rest at this size.
pub fn settled(keyspace: &Keyspace, shards: u32, replication_factor: u32) -> bool {
    let asked = keyspace.metadata.annotations.as_ref().is_some_and(|a| a.contains_key("vasto.io/replace"));
    let topology = topology(keyspace);
    let mut places = topology.current.iter().flat_map(View::places);
    let whole = places.all(|p| p.assignment.replica != 0 && p.assignment.serving);
    keyspace.status.as_ref().is_some_and(|s| {
        !asked
            && whole
            && topology.phase() == v1::Phase::Stable
            && s.phase == Some(Phase::Ready)
            && s.observed_generation == keyspace.metadata.generation
            && (s.shards, s.replication_factor) == (Some(shards), Some(replication_factor))
            && (s.ready_replicas, s.replicas) == (Some(shards * replication_factor), Some(shards * replication_factor))
            && condition(keyspace, "Progressing") == ("False".to_owned(), "Stable".to_owned())
    })
}

/// The status and reason of a condition.
pub fn condition(keyspace: &Keyspace, kind: &str) -> (String, String) {
    let found = keyspace.status.iter().flat_map(|s| &s.conditions).find(|c| c.type_ == kind);
    found.map(|c| (c.status.clone(), c.reason.clone())).unwrap_or_default()
}

/// The message of a condition.
pub fn message(keyspace: &Keyspace, kind: &str) -> String {
    let found = keyspace.status.iter().flat_map(|s| &s.conditions).find(|c| c.type_ == kind);
    found.map(|c| c.message.clone()).unwrap_or_default()
}

fn decode(text: &str) -> Topology {
    use base64::Engine;
    use prost::Message;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    Topology::decode(bytes.as_slice()).unwrap()
}

/// The committed topology.
pub fn topology(keyspace: &Keyspace) -> Topology {
    keyspace.status.as_ref().and_then(|s| s.topology.as_deref()).map(decode).unwrap_or_default()
}

/// Shard by shard, the stores and whether they serve.
pub fn placement(topology: &Topology) -> Vec<Vec<(String, bool)>> {
    let shards = topology.current.iter().flat_map(|v| &v.shards);
    shards.map(|s| s.replicas.iter().map(|a| (a.store.clone(), a.serving)).collect()).collect()
}

/// The ids of replicas in the current view, by shard and store.
pub fn replicas(topology: &Topology) -> Vec<(u32, String, u64)> {
    let places = topology.current.iter().flat_map(View::places);
    places.map(|p| (p.shard, p.assignment.store.clone(), p.assignment.replica)).collect()
}
