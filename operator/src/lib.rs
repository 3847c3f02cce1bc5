//! The operator: Vasto's master. It plans which stores hold which shards, commits
//! that as one topology per keyspace, and streams it to stores and clients. It is
//! never in the way of data, and has no state that it can't afford to lose.

pub mod console;
mod edit;
pub mod hub;
mod keyspaces;
pub mod kube;
pub mod local;
mod observe;
pub mod plan;
mod status;

pub use edit::{Refusal, replace_annotation, restart_annotation};
pub use status::topology_of;
