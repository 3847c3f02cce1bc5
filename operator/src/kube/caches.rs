//! What the operator sees of the cluster: watches of Keyspaces and of what carries its
//! own label, never of everything; and of nodes, where it may.

use std::fmt::Debug;
use std::hash::Hash;

use futures::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::NamespaceResourceScope;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use vasto_crds::Keyspace;

use super::objects::{KEYSPACE_LABEL, MANAGED_BY};

/// The objects that keyspaces own, by kind, and the nodes.
pub(crate) struct Stores {
    pub(crate) statefulsets: Store<StatefulSet>,
    pub(crate) services: Store<Service>,
    pub(crate) accounts: Store<ServiceAccount>,
    pub(crate) budgets: Store<PodDisruptionBudget>,
    pub(crate) pods: Store<Pod>,
    pub(crate) claims: Store<PersistentVolumeClaim>,
    /// `None` where only one namespace is served: nodes are not to be seen from there.
    pub(crate) nodes: Option<Store<Node>>,
    /// One for each of these: cancelled once the first list has come.
    listed: Vec<CancellationToken>,
}

/// Set once the watches have begun.
pub(crate) struct Caches(OnceCell<Stores>);

/// Names which keyspaces an event concerns.
pub(crate) type Touched = futures::stream::BoxStream<'static, ObjectRef<Keyspace>>;

impl Caches {
    pub(crate) fn new() -> Self {
        Self(OnceCell::new())
    }

    /// What is seen; `None` until the first lists have come.
    pub(crate) fn get(&self) -> Option<&Stores> {
        self.0.get()
    }

    /// Begins the watches. The stream says which keyspaces have changed under it; polling it keeps all up to date.
    pub(crate) fn begin(&self, client: &Client, namespace: Option<&str>) -> Touched {
        let mut listed = Vec::new();
        let (statefulsets, a) = owned::<StatefulSet>(client, namespace, &mut listed);
        let (services, b) = owned::<Service>(client, namespace, &mut listed);
        let (accounts, c) = owned::<ServiceAccount>(client, namespace, &mut listed);
        let (budgets, d) = owned::<PodDisruptionBudget>(client, namespace, &mut listed);
        let (pods, e) = owned::<Pod>(client, namespace, &mut listed);
        let (claims, f) = owned::<PersistentVolumeClaim>(client, namespace, &mut listed);
        let (nodes, g) = match namespace {
            Some(_) => (None, futures::stream::pending().boxed()),
            None => {
                let (nodes, touched) = nodes(client, pods.clone(), &mut listed);
                (Some(nodes), touched)
            }
        };
        let stores = Stores { statefulsets, services, accounts, budgets, pods, claims, nodes, listed };
        // Begun once.
        let _ = self.0.set(stores);
        futures::stream::select_all([a, b, c, d, e, f, g]).boxed()
    }
}

impl Stores {
    /// Waits until each watch has seen what there is. Any number may wait, unlike on a kube store, which wakes
    /// only the last one.
    pub(crate) async fn ready(&self) {
        for listed in &self.listed {
            listed.cancelled().await;
        }
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Watches every Keyspace; `listed` is cancelled once all have been seen.
pub(crate) fn keyspaces(
    client: &Client,
    namespace: Option<&str>,
    listed: CancellationToken,
) -> (Store<Keyspace>, impl Stream<Item = Result<Keyspace, watcher::Error>> + Send + use<>) {
    let (reader, writer) = reflector::store();
    let stream = watcher(api::<Keyspace>(client, namespace), watcher::Config::default())
        .default_backoff()
        .modify(|k| k.metadata.managed_fields = None)
        .reflect(writer)
        .inspect(move |event| tell(event, &listed))
        .touched_objects();
    (reader, stream)
}

/// Cancels `listed` at the end of a first list.
fn tell<K>(event: &Result<watcher::Event<K>, watcher::Error>, listed: &CancellationToken) {
    if matches!(event, Ok(watcher::Event::InitDone)) {
        listed.cancel();
    }
}

fn owned<K>(client: &Client, namespace: Option<&str>, listed: &mut Vec<CancellationToken>) -> (Store<K>, Touched)
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let config = watcher::Config::default().labels(&format!("{}={},{KEYSPACE_LABEL}", MANAGED_BY.0, MANAGED_BY.1));
    let (reader, stream) = seen(api::<K>(client, namespace), config, listed);
    let touched = stream.filter_map(|object: K| async move {
        let name = object.labels().get(KEYSPACE_LABEL)?.clone();
        Some(ObjectRef::new(&name).within(&object.namespace()?))
    });
    (reader, touched.boxed())
}

/// Nodes, and the keyspaces whose pods stand on one that has changed.
fn nodes(client: &Client, pods: Store<Pod>, listed: &mut Vec<CancellationToken>) -> (Store<Node>, Touched) {
    let (reader, stream) = seen(Api::<Node>::all(client.clone()), watcher::Config::default(), listed);
    // Heartbeats change nothing that matters here.
    let mut known = std::collections::BTreeMap::new();
    let touched = stream.flat_map(move |node: Node| {
        let name = node.name_any();
        let state = (node.uid(), cordoned(&node));
        let news = known.insert(name.clone(), state.clone()).is_none_or(|before| before != state);
        let on = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(name.as_str());
        let concerned: Vec<ObjectRef<Keyspace>> = pods
            .state()
            .iter()
            .filter(|pod| news && (on(pod) || super::pods::unschedulable(pod).is_some()))
            .filter_map(|pod| Some(ObjectRef::new(pod.labels().get(KEYSPACE_LABEL)?).within(&pod.namespace()?)))
            .collect();
        futures::stream::iter(concerned)
    });
    (reader, touched.boxed())
}

/// Whether pods are to leave this node.
pub(crate) fn cordoned(node: &Node) -> bool {
    let Some(spec) = &node.spec else { return false };
    let leaving = |t: &k8s_openapi::api::core::v1::Taint| t.key == "ToBeDeletedByClusterAutoscaler";
    spec.unschedulable == Some(true) || spec.taints.iter().flatten().any(leaving)
}

fn seen<K>(
    api: Api<K>,
    config: watcher::Config,
    listed: &mut Vec<CancellationToken>,
) -> (Store<K>, impl Stream<Item = K> + Send + use<K>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    let (reader, writer) = reflector::store();
    let first = CancellationToken::new();
    listed.push(first.clone());
    let stream = watcher(api, config)
        .default_backoff()
        .modify(|o: &mut K| o.managed_fields_mut().clear())
        .reflect(writer)
        .inspect(move |event| tell(event, &first))
        .touched_objects()
        .filter_map(|event| async {
            event
                .inspect_err(|error| tracing::warn!(%error, kind = %K::kind(&()), "a watch failed; it is begun anew"))
                .ok()
        });
    (reader, stream)
}
