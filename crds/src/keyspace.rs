//! What a person declares: the Keyspace and its spec. The comments on fields
//! are what `kubectl explain keyspace.spec` says; the rules stand beside them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, ResourceRequirements, Toleration, TopologySpreadConstraint};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::status::KeyspaceStatus;
use crate::units::{Period, Size};

/// The apiVersion of a Keyspace document.
pub const API_VERSION: &str = "vasto.io/v1alpha1";
/// The kind of a Keyspace document.
pub const KIND: &str = "Keyspace";
/// The most shards that a keyspace may have.
pub const MAX_SHARDS: u32 = 1024;
/// The most copies that a shard may have.
pub const MAX_REPLICATION: u32 = 7;
/// The longest name: what is named after a keyspace adds up to 23 characters
/// (`-store-1023` to a pod, and a StatefulSet's revision hash to a label), and
/// Kubernetes allows 63.
pub const MAX_NAME: usize = 40;

/// A named map of bytes to values, cut into shards, each kept in several copies.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "vasto.io",
    version = "v1alpha1",
    kind = "Keyspace",
    namespaced,
    doc = "A named map of bytes to values, cut into shards, each kept in several copies. \
           Vasto makes its stores, and moves its data online when shards or replicationFactor change.",
    status = "KeyspaceStatus",
    derive = "PartialEq",
    shortname = "ks",
    category = "vasto",
    scale(
        spec_replicas_path = ".spec.shards",
        status_replicas_path = ".status.shards",
        label_selector_path = ".status.selector"
    ),
    printcolumn(
        name = "Shards",
        type_ = "integer",
        json_path = ".spec.shards",
        description = "Shards asked for"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.ready",
        description = "Replicas that serve, of all that should"
    ),
    printcolumn(
        name = "Replication",
        type_ = "integer",
        json_path = ".spec.replicationFactor",
        description = "Copies of each shard asked for"
    ),
    printcolumn(
        name = "Phase",
        type_ = "string",
        json_path = ".status.phase",
        description = "Where the change under way stands; Ready: none is"
    ),
    printcolumn(
        name = "Version",
        type_ = "integer",
        json_path = ".status.topologyVersion",
        description = "The committed topology's version"
    ),
    printcolumn(
        name = "Progress",
        type_ = "string",
        json_path = ".status.progress.summary",
        description = "How far the phase has come",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(
        "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
    )
    .message(
        "metadata.name must be at most 40 characters, only lower-case letters, digits and '-', \
         beginning with a letter and ending with a letter or digit: pods, services and labels are \
         named after it with something added, and Kubernetes allows those 63"
    )
)]
// A shard count below 1 has its own message; this one would only add "at most 0".
#[x_kube(validation = Rule::new("self.shards < 1 || self.replicationFactor <= self.shards")
    .message(
        "must not be more than shards: each copy of a shard stands on a store of its own and there is \
         one store per shard; lower replicationFactor or raise shards"
    )
    .field_path(".replicationFactor"))]
#[serde(rename_all = "camelCase")]
pub struct KeyspaceSpec {
    /// How many shards the keyspace is cut into, and so how many stores it runs on. May be changed
    /// at any time: data moves online, and only as much as must.
    #[schemars(with = "i32", range(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self >= 1 && self <= 1024").message("must be a whole number from 1 to 1024"))]
    pub shards: u32,

    /// How many copies of each shard are kept, each on a store of its own. 1 keeps no spare: what
    /// is on a store that dies is gone. May be changed at any time.
    #[schemars(with = "i32", range(min = 1, max = 7))]
    #[x_kube(validation = Rule::new("self >= 1 && self <= 7").message("must be a whole number from 1 to 7"))]
    pub replication_factor: u32,

    /// The volume of each store. Under `vasto up` stores use the data folder instead.
    #[serde(default)]
    #[x_kube(validation = Rule::new(
            "has(self.storageClassName) == has(oldSelf.storageClassName) && \
             (!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName)"
        )
        .message("must not change, since volumes stay in the class they were made in: make another keyspace and copy the data with vasto dump and vasto load")
        .field_path(".storageClassName"))]
    pub storage: Storage,

    /// What an answered write has been through. Periodic: stores sync their logs to disk every
    /// second, so a machine's crash may take the last second of its own writes that no other
    /// replica has yet. Synced: a write is on disk before it is answered, which is slower.
    #[serde(default)]
    pub durability: Durability,

    /// The compute resources of each store's container, as in a pod.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resources: ResourceRequirements,

    /// Where the stores' pods may run, as in a pod.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scheduling: Scheduling,

    /// The stores' container image. Unset: the one that was current when the keyspace was made, so
    /// that a newer operator restarts no store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new("self.matches('^[^ \\t\\r\\n]+$')").message("must be an image reference without spaces, such as ghcr.io/vasto-io/vasto:0.1.0; leave the field out for the image that was current when the keyspace was made"))]
    pub image: Option<String>,

    /// What becomes of the data when the Keyspace is deleted. Delete: it goes with it. Retain: the
    /// stores' volumes (under `vasto up`: their folders) are kept, served by nobody.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,

    /// True: the operator begins no change of this keyspace, and a change under way stands still.
    /// Reads and writes go on.
    #[serde(default)]
    pub paused: bool,

    /// How long a store may be away before its replicas are made anew elsewhere, provided that
    /// each of its shards has another living copy.
    #[serde(default = "store_lost_after")]
    pub store_lost_after: Period,

    /// How long a deletion is remembered after every replica has confirmed it. A write that brings
    /// its own time is refused when older than this.
    #[serde(default = "collection_grace")]
    pub collection_grace: Period,

    /// How far ahead of a store's clock a write may set its own time before it is refused.
    #[serde(default = "max_clock_skew")]
    pub max_clock_skew: Period,
}

impl KeyspaceSpec {
    /// A spec of so many shards and copies, and everything else as by default.
    pub fn new(shards: u32, replication_factor: u32) -> Self {
        Self {
            shards,
            replication_factor,
            storage: Storage::default(),
            durability: Durability::default(),
            resources: ResourceRequirements::default(),
            scheduling: Scheduling::default(),
            image: None,
            deletion_policy: DeletionPolicy::default(),
            paused: false,
            store_lost_after: store_lost_after(),
            collection_grace: collection_grace(),
            max_clock_skew: max_clock_skew(),
        }
    }

    /// As JSON in one line, as a topology carries it.
    pub fn to_json(&self) -> String {
        json(self).to_string()
    }

    /// The spec that [`Self::to_json`] wrote. It does not check the rules.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(|e| Error::unreadable("spec", &e))
    }
}

/// One shard, one copy.
impl Default for KeyspaceSpec {
    fn default() -> Self {
        Self::new(1, 1)
    }
}

impl Keyspace {
    /// The keyspace's name. Every Keyspace that was parsed or checked has one.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// The keyspace's uid; empty before it was created.
    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    /// The whole resource as JSON in one line, as Kubernetes would give it.
    pub fn to_json(&self) -> String {
        json(self).to_string()
    }

    /// The resource that [`Self::to_json`] wrote, status and all. It does not check the rules:
    /// that is for what people write, by [`crate::parse`].
    pub fn from_json(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(|e| Error::unreadable("", &e))
    }
}

/// What a store writes to.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// How much each store's volume holds. It may grow, if its storage class allows that; it can't
    /// shrink.
    #[serde(default)]
    pub size: Size,

    /// The storage class of the volumes; unset: the cluster's default one. It can't be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub storage_class_name: Option<String>,
}

/// What an answered write has been through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Durability {
    /// Logs are synced every second.
    #[default]
    Periodic,
    /// Logs are synced before a write is answered.
    Synced,
}

/// What becomes of the data when the Keyspace is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It goes with it.
    #[default]
    Delete,
    /// It is kept, served by nobody.
    Retain,
}

/// Where the stores' pods may run, in a pod's own terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scheduling {
    /// Labels that a node must have to run a store.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,

    /// Which nodes and neighbours the pods want or avoid. Unset: stores of one keyspace prefer
    /// different nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,

    /// Which taints of nodes the pods put up with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,

    /// How the pods are spread over zones, nodes or other domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,

    /// The pods' priority class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub priority_class_name: Option<String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn store_lost_after() -> Period {
    Period::from_secs(10 * 60)
}

fn collection_grace() -> Period {
    Period::from_secs(24 * 3600)
}

fn max_clock_skew() -> Period {
    Period::from_secs(10)
}

/// As a JSON value.
#[expect(clippy::expect_used, reason = "types of this crate, whose maps have string keys, always serialise")]
pub(crate) fn json<T: Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).expect("the resource's types serialise")
}
