//! The cluster tier: real processes on loopback, real RocksDB, SIGKILL.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bad_input;
mod changes;
mod faults;
mod up;
