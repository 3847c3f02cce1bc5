//! What the tiers share: clusters of real processes, and the oracle that knows
//! for each key what may be read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod cluster;
pub mod control_plane;
pub mod fleet;
pub mod fuzz;
pub mod history;
pub mod load;
pub mod oracle;
pub mod packages;
pub mod pinned;
pub mod soak;
