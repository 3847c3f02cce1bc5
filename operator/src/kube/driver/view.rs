//! One keyspace's pods and volumes, as the watches have them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::runtime::reflector::{ObjectRef, Store};

use super::super::api::Writer;
use super::super::caches::{Caches, cordoned};
use super::super::objects::{KEYSPACE_LABEL, claim_name, stores_name};
use super::super::pods::{ready, store_of, unschedulable};
use super::super::volumes::{Reach, bound, lost, reach};
use super::entry::{Entry, version};
use crate::plan::ReplaceRequest;

/// See the module.
#[derive(Default)]
pub(crate) struct Cluster {
    /// The StatefulSet, if it is this keyspace's own.
    pub(crate) stores: Option<Arc<StatefulSet>>,
    /// By store.
    pub(crate) pods: BTreeMap<String, Arc<Pod>>,
    /// By store.
    pub(crate) claims: BTreeMap<String, Arc<PersistentVolumeClaim>>,
    /// Stores whose volume can't be used where it is, or soon can't.
    reach: BTreeMap<String, Reach>,
    /// Stores whose pods stand on nodes that they are to leave.
    pub(crate) draining: BTreeSet<String>,
}

/// The object of this name that is in the cache.
pub(crate) fn cached<K>(store: &Store<K>, namespace: &str, name: &str) -> Option<Arc<K>>
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

impl Cluster {
    /// Looks at the caches; and at a volume itself, where its pod can't run.
    pub(crate) async fn look(caches: &Caches, writer: &Writer, entry: &Entry) -> Self {
        let Some(all) = caches.get() else { return Self::default() };
        let keyspace = &entry.resource;
        let (namespace, name) = (keyspace.namespace().unwrap_or_default(), keyspace.name());
        let own = |o: &StatefulSet| o.owner_references().iter().any(|r| r.uid == keyspace.uid());
        let found = cached(&all.statefulsets, &namespace, &stores_name(name)).filter(|s| own(s));
        let stores = match (found, entry.stores.clone()) {
            (Some(cached), Some(written)) if version(&*written) > version(&*cached) => Some(written),
            (Some(cached), _) => Some(cached),
            // The cache hasn't come to it yet, or it has been deleted since.
            (None, written) => written.filter(|_| entry.written.is_some_and(|at| at.elapsed().as_secs() < 2)),
        };
        let Some(owner) = stores.as_ref().and_then(|s| s.uid()) else { return Self { stores, ..Self::default() } };
        let mine = |labels: &BTreeMap<String, String>| labels.get(KEYSPACE_LABEL).is_some_and(|k| k == name);
        let pods: BTreeMap<String, Arc<Pod>> = all
            .pods
            .state()
            .into_iter()
            .filter(|p| p.namespace().as_deref() == Some(&namespace) && mine(p.labels()))
            .filter(|p| p.owner_references().iter().any(|r| r.uid == owner))
            .filter_map(|p| Some((store_of(name, &p.name_any())?, p)))
            .collect();
        let claims = all
            .claims
            .state()
            .into_iter()
            .filter(|c| c.namespace().as_deref() == Some(&namespace) && mine(c.labels()))
            .filter_map(|c| {
                let pod = c.name_any().strip_prefix("data-")?.to_owned();
                let store = store_of(name, &pod)?;
                (claim_name(name, &store) == c.name_any()).then_some((store, c))
            })
            .collect();
        let mut cluster = Self { stores, pods, claims, ..Self::default() };
        if let Some(nodes) = &all.nodes {
            cluster.place(writer, &nodes.state(), entry).await;
        }
        cluster
    }

    async fn place(&mut self, writer: &Writer, nodes: &[Arc<Node>], entry: &Entry) {
        let node_of = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.clone());
        let find = |name: &str| nodes.iter().find(|n| n.name_any() == name);
        for (store, pod) in &self.pods {
            if node_of(pod).and_then(|name| find(&name).map(|n| cordoned(n))).unwrap_or(false) {
                self.draining.insert(store.clone());
            }
        }
        let named = entry.topology.as_ref().map(|t| t.stores().into_iter().map(str::to_owned).collect());
        let named: BTreeSet<String> = named.unwrap_or_default();
        let suspects: BTreeSet<String> = named
            .into_iter()
            .chain(self.pods.keys().cloned())
            .filter(|store| match self.pods.get(store) {
                Some(pod) if ready(pod) => self.draining.contains(store),
                Some(pod) => {
                    let homeless = node_of(pod).is_some_and(|name| find(&name).is_none());
                    unschedulable(pod).is_some() || homeless || self.draining.contains(store)
                }
                None => true,
            })
            .collect();
        for store in suspects {
            let Some(claim) = self.claims.get(&store).filter(|c| bound(c)) else { continue };
            let Some(volume) = claim.spec.as_ref().and_then(|s| s.volume_name.clone()) else { continue };
            match writer.cluster::<PersistentVolume>(&volume).await {
                Ok(Some(volume)) => {
                    self.reach.insert(store, reach(&volume, nodes));
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, store, "a volume can't be looked at"),
            }
        }
    }

    /// Where a store's volume can be used, if that was looked at.
    pub(crate) fn reach(&self, store: &str) -> Option<Reach> {
        self.reach.get(store).copied()
    }

    /// Whether a store's volume is gone for good: its claim says so, or the only nodes that have it are not there.
    pub(crate) fn is_gone(&self, store: &str) -> bool {
        self.reach(store) == Some(Reach::Gone) || self.claims.get(store).is_some_and(|c| lost(c))
    }

    /// With one copy of each shard: the store that must be emptied since its node is being drained, and kept
    /// empty, so that its pod and volume can go. The request bears the name of the pod's life, so that it ends
    /// with that, and the store is filled anew on another node.
    pub(crate) fn leaving(&self, entry: &Entry) -> Option<ReplaceRequest> {
        if entry.resource.spec.replication_factor > 1 {
            return None;
        }
        let request = |store: &String| {
            let uid = self.pods.get(store)?.uid()?;
            Some(ReplaceRequest {
                store: store.clone(),
                request: drain_request(&uid),
                hold: true,
                accept_data_loss: false,
            })
        };
        let under_way = entry.topology.as_ref().and_then(|t| t.replace.as_ref()).map(|r| r.store.clone());
        let first = under_way.filter(|store| self.draining.contains(store));
        let all = first.iter().chain(self.draining.iter());
        let replaced = entry.topology.as_ref().map(|t| t.replaced.as_str());
        all.filter_map(request).find(|r| Some(r.request.as_str()) != replaced)
    }
}

/// Names the emptying of a pod whose node is drained.
pub(crate) fn drain_request(pod_uid: &str) -> String {
    format!("drain-{pod_uid}")
}
