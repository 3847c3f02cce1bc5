//! What the leader keeps in mind of one keyspace between two looks; all of it can be
//! lost.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::StatefulSet;
use kube::ResourceExt;
use tokio::time::Instant;
use vasto_client::v1::Topology;
use vasto_crds::Keyspace;

use super::super::lease::Term;
use crate::observe::{Expected, Watchers};
use crate::plan::Observation;
use crate::status::Pace;

/// One keyspace.
pub(crate) struct Entry {
    /// As last read or written, whichever is newer.
    pub(crate) resource: Arc<Keyspace>,
    pub(crate) topology: Option<Arc<Topology>>,
    pub(crate) watchers: Watchers,
    pub(crate) expected: Expected,
    pub(crate) pace: Pace,
    /// What the planner was told last.
    pub(crate) observation: Option<Observation>,
    /// The StatefulSet as last written.
    pub(crate) stores: Option<Arc<StatefulSet>>,
    /// The term in which the StatefulSet was written for the change under way.
    pub(crate) guarded: Option<i32>,
    /// By kind and name: what was applied last.
    pub(crate) applied: HashMap<String, Applied>,
    /// When the StatefulSet was written last.
    pub(crate) written: Option<Instant>,
    /// When the status was written last.
    pub(crate) said: Option<Instant>,
    term: Option<i32>,
}

/// An object as it was applied last.
pub(crate) struct Applied {
    /// Of what was asked for.
    pub(crate) hash: String,
    /// Of the object that came of it.
    pub(crate) mark: String,
    pub(crate) at: Instant,
    /// Why it was refused, if it was.
    pub(crate) conflict: Option<String>,
}

impl Default for Entry {
    fn default() -> Self {
        let nothing = Keyspace::new("", vasto_crds::KeyspaceSpec::default());
        Self {
            resource: Arc::new(nothing),
            topology: None,
            watchers: Watchers::default(),
            expected: Expected::default(),
            pace: Pace::default(),
            observation: None,
            stores: None,
            guarded: None,
            applied: HashMap::new(),
            written: None,
            said: None,
            term: None,
        }
    }
}

impl Entry {
    /// Takes in the resource as the cache has it, unless a newer one is known; begins anew with a new term.
    pub(crate) fn take(&mut self, keyspace: Arc<Keyspace>, term: &Term) {
        if self.term != Some(term.number) {
            // What an earlier term has seen may have been changed by others meanwhile.
            *self = Self { resource: keyspace.clone(), term: Some(term.number), ..Self::default() };
        }
        if version(&*keyspace) > version(&*self.resource) || self.resource.uid() != keyspace.uid() {
            self.resource = keyspace;
        }
    }

    /// Forgets everything but the resource: another leads.
    pub(crate) fn stand_by(&mut self, keyspace: Arc<Keyspace>) {
        *self = Self { resource: keyspace, ..Self::default() };
    }
}

/// A resource version as a number: of one object the greater is the newer.
pub(crate) fn version<K: ResourceExt>(object: &K) -> u64 {
    object.resource_version().and_then(|v| v.parse().ok()).unwrap_or(0)
}
