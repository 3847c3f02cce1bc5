//! The cluster tier: real processes on loopback, real RocksDB, SIGKILL.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod changes;
mod damage;
mod faults;
mod fuzz;
mod gateway;
mod redis;
mod soak;
mod up;
