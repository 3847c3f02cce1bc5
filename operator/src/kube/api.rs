//! Writing to the API server: server-side apply under one field manager, each write
//! bound to the object that it was decided on, each answer sorted by what it means.

use std::fmt::Debug;
use std::time::Duration;

use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::metrics::Monitor;

/// The one field manager.
pub(crate) const FIELD_MANAGER: &str = "vasto-operator";
/// No call takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// What it was decided on has changed: look again.
    #[error("{what}: it has changed meanwhile")]
    Stale { what: String },
    /// Somebody else manages a field and wants another value there.
    #[error(
        "{what}: {text}; Vasto does not fight over it: undo that change, or give the field back with kubectl apply --server-side --field-manager=vasto-operator --force-conflicts"
    )]
    FieldConflict { what: String, text: String },
    /// An object of this name exists and belongs to somebody else.
    #[error("{what} exists and belongs to {owner}: rename it, or give the keyspace another name")]
    NameTaken { what: String, owner: String },
    /// An object of a keyspace of the same name that was deleted is still there.
    #[error("{what} of a keyspace of this name that was deleted (uid {uid}) is still being deleted")]
    Former { what: String, uid: String },
    /// The API server refused, or could not be reached.
    #[error("{what}: {}", said(.source))]
    Refused { what: String, source: kube::Error },
    /// No answer.
    #[error(transparent)]
    Late(#[from] Late),
    /// A committed topology can't be read or written.
    #[error("the status: {0}")]
    Topology(String),
}

impl Error {
    /// One word for metrics and conditions.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Stale { .. } => "Stale",
            Self::FieldConflict { .. } => "FieldConflict",
            Self::NameTaken { .. } => "NameTaken",
            Self::Former { .. } => "Former",
            Self::Refused { .. } => "Refused",
            Self::Late(_) => "Late",
            Self::Topology(_) => "Topology",
        }
    }

    fn sorted(what: String, error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 409 => {
                let field = |c: &kube::core::response::StatusCause| c.reason == "FieldManagerConflict";
                if status.details.as_ref().is_some_and(|d| d.causes.iter().any(field)) {
                    Self::FieldConflict { what, text: status.message.clone() }
                } else {
                    Self::Stale { what }
                }
            }
            kube::Error::Api(status) if status.code == 404 => Self::Stale { what },
            _ => Self::Refused { what, source: error },
        }
    }
}

/// What the API server says of it, without the whole answer.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// The API server has not answered in time.
#[derive(Debug, thiserror::Error)]
#[error("the API server has not answered within {} s", .0.as_secs_f64())]
pub(crate) struct Late(Duration);

/// Waits for an answer, not for ever.
pub(crate) async fn within<T>(bound: Duration, call: impl Future<Output = T>) -> Result<T, Late> {
    tokio::time::timeout(bound, call).await.map_err(|_| Late(bound))
}

/// What every object that the operator writes can do.
pub(crate) trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}
impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

/// The API server, for writes in one namespace.
#[derive(Clone)]
pub(crate) struct Writer {
    client: Client,
    monitor: Monitor,
}

impl Writer {
    pub(crate) fn new(client: Client, monitor: Monitor) -> Self {
        Self { client, monitor }
    }

    fn api<K: Object>(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub(crate) async fn get<K: Object>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error> {
        let found = within(PATIENCE, self.api::<K>(namespace).get_opt(name)).await?;
        found.map_err(|source| Error::Refused { what: what::<K>(name), source })
    }

    pub(crate) async fn cluster<K>(&self, name: &str) -> Result<Option<K>, Error>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let found = within(PATIENCE, Api::<K>::all(self.client.clone()).get_opt(name)).await?;
        found.map_err(|source| Error::Refused { what: what::<K>(name), source })
    }

    /// Makes the object what `desired` says, which is owned by the keyspace with this uid. `live`: as last seen;
    /// the write fails if it is another by now.
    pub(crate) async fn apply<K: Object>(&self, live: Option<&K>, mut desired: K, owner: &str) -> Result<K, Error> {
        let (namespace, name) = (desired.namespace().unwrap_or_default(), desired.name_any());
        let fresh = match live {
            Some(_) => None,
            // Caches lag; what is there must never be taken for one's own.
            None => self.get::<K>(&namespace, &name).await?,
        };
        if let Some(live) = live.or(fresh.as_ref()) {
            owned(live, owner)?;
            desired.meta_mut().uid = live.uid();
            desired.meta_mut().resource_version = live.resource_version();
        }
        self.monitor.write(&K::kind(&()), if live.or(fresh.as_ref()).is_some() { "patch" } else { "create" });
        let params = PatchParams::apply(FIELD_MANAGER);
        let api = self.api::<K>(&namespace);
        let written = within(PATIENCE, api.patch(&name, &params, &Patch::Apply(&desired))).await?;
        written.map_err(|e| Error::sorted(what::<K>(&name), e))
    }

    /// Sets the status. `desired` carries name, namespace, uid, resourceVersion and the whole status.
    pub(crate) async fn apply_status<K: Object>(&self, desired: &K) -> Result<K, Error> {
        let (namespace, name) = (desired.namespace().unwrap_or_default(), desired.name_any());
        self.monitor.write(&K::kind(&()), "patch-status");
        // The status is the operator's alone.
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let api = self.api::<K>(&namespace);
        let written = within(PATIENCE, api.patch_status(&name, &params, &Patch::Apply(desired))).await?;
        written.map_err(|e| Error::sorted(what::<K>(&name), e))
    }

    /// Changes single fields of the very object that was seen.
    pub(crate) async fn merge<K: Object>(&self, live: &K, mut change: serde_json::Value) -> Result<K, Error> {
        let (namespace, name) = (live.namespace().unwrap_or_default(), live.name_any());
        change["metadata"]["uid"] = live.uid().into();
        change["metadata"]["resourceVersion"] = live.resource_version().into();
        self.monitor.write(&K::kind(&()), "patch");
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let api = self.api::<K>(&namespace);
        let written = within(PATIENCE, api.patch(&name, &params, &Patch::Merge(&change))).await?;
        written.map_err(|e| Error::sorted(what::<K>(&name), e))
    }

    /// Deletes the very object that was seen, and no other of its name.
    pub(crate) async fn delete<K: Object>(&self, live: &K) -> Result<(), Error> {
        let (namespace, name) = (live.namespace().unwrap_or_default(), live.name_any());
        self.monitor.write(&K::kind(&()), "delete");
        let preconditions = Preconditions { uid: live.uid(), resource_version: live.resource_version() };
        let params = DeleteParams::default().preconditions(preconditions);
        let api = self.api::<K>(&namespace);
        match within(PATIENCE, api.delete(&name, &params)).await? {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::sorted(what::<K>(&name), e)),
        }
    }
}

fn what<K: Resource<DynamicType = ()>>(name: &str) -> String {
    format!("{} {name}", K::kind(&()))
}

/// Whether this object is the keyspace's own.
fn owned<K: Object>(live: &K, owner: &str) -> Result<(), Error> {
    let what = what::<K>(&live.name_any());
    match live.owner_references().iter().find(|o| o.controller == Some(true)) {
        Some(o) if o.uid == owner => Ok(()),
        Some(o) if o.kind == vasto_crds::KIND => Err(Error::Former { what, uid: o.uid.clone() }),
        Some(o) => Err(Error::NameTaken { what, owner: format!("{} {}", o.kind, o.name) }),
        None => Err(Error::NameTaken { what, owner: "nobody".to_owned() }),
    }
}
