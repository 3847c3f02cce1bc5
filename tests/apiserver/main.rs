//! The apiserver tier: a real etcd, kube-apiserver and StatefulSet controller, the operator
//! in this process, and a fleet of stores that pretend. Not part of a plain `cargo test`, since
//! it needs the binaries that tests/kube/build makes:
//!
//! ```text
//! ./dev cargo test --workspace --locked --test apiserver
//! ```
//!
//! `VASTO_TEST_LOG=vasto_operator=debug` shows what operators say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bench;
mod crash;
mod nodes;
mod normal;
mod objects;
mod reconcile;
mod scale;
mod schema;
mod stale;
mod tap;
mod watching;
