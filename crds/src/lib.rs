//! The Keyspace resource: what people declare, on Kubernetes and in a file for
//! `vasto up`. Its types, the CustomResourceDefinition generated from them, and
//! one set of rules that refuses a bad Keyspace in the same words in both places.
//!
//! ```
//! let text = "
//! apiVersion: vasto.io/v1alpha1
//! kind: Keyspace
//! metadata: {name: packages}
//! spec: {shards: 2, replicationFactor: 3}
//! ";
//! let error = vasto_crds::parse(text, "keyspace.yaml").unwrap_err();
//! assert_eq!(
//!     error.to_string(),
//!     "keyspace.yaml: document 1, keyspace packages: spec.replicationFactor is 3: must not be \
//!      more than shards: each copy of a shard stands on a store of its own and there is one store \
//!      per shard; lower replicationFactor or raise shards"
//! );
//! ```

mod crd;
mod error;
mod file;
#[expect(unreachable_pub, reason = "KubeSchema copies each struct into a function")]
mod keyspace;
mod rules;
mod schema;
#[expect(unreachable_pub, reason = "KubeSchema copies each struct into a function")]
mod status;
mod units;

pub use crd::{crd, crd_yaml};
pub use error::{Error, Problem};
pub use file::parse;
pub use k8s_openapi::api::core::v1::{Affinity, ResourceRequirements, Toleration, TopologySpreadConstraint};
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, Time};
pub use keyspace::{
    API_VERSION, DeletionPolicy, Durability, KIND, Keyspace, KeyspaceSpec, MAX_NAME, MAX_REPLICATION, MAX_SHARDS,
    Scheduling, Storage,
};
pub use rules::check;
pub use status::{KeyspaceStatus, Phase, Progress, StoreState, StoreStatus, set_condition, time};
pub use units::{Period, Size};
