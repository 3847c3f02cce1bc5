//! What a keyspace waits for, in words for people.

use std::fmt;

/// Something that stands in the way of the next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A store knows a newer topology than the operator: it must be adopted first.
    Newer {
        /// The store.
        store: String,
        /// The version that it has.
        version: u64,
    },
    /// Not enough stores have persisted the committed version.
    Majority {
        /// The committed version.
        version: u64,
        /// Stores that have it.
        have: usize,
        /// Stores that must have it.
        need: usize,
        /// Those that haven't.
        missing: Vec<String>,
    },
    /// The keyspace is paused.
    Paused,
    /// The spec can't be placed.
    Spec {
        /// Shards asked for.
        shards: u32,
        /// Replication factor asked for.
        replication_factor: u32,
    },
    /// A store must run before the keyspace can be made.
    Store {
        /// The store.
        store: String,
    },
    /// A store's disk can't take what the change would bring it.
    NoRoom {
        /// The store.
        store: String,
        /// Bytes that it would get, estimated.
        need: u64,
        /// Bytes that it can take.
        free: u64,
    },
    /// A store has yet to make a replica.
    NotMade {
        /// The store.
        store: String,
        /// The shard.
        shard: u32,
    },
    /// A replica's store does not report.
    Away {
        /// The store.
        store: String,
        /// The shard.
        shard: u32,
    },
    /// A replica is still copying.
    NotBorn {
        /// Its store.
        store: String,
        /// Its id.
        replica: u64,
        /// Its shard.
        shard: u32,
    },
    /// A replica is behind one that it follows.
    Behind {
        /// Its store.
        store: String,
        /// Its id.
        replica: u64,
        /// Its shard.
        shard: u32,
        /// The store of the one it follows.
        source: String,
        /// By how many changes; `None`: it has no position there yet.
        lag: Option<u64>,
    },
    /// No living replica serves this shard.
    NoOwner {
        /// The shard.
        shard: u32,
    },
    /// A replica is gone (its store lost, or its volume), and no living copy of its shard serves.
    NoCopy {
        /// The store that had it.
        store: String,
        /// The shard.
        shard: u32,
    },
    /// Clients have yet to learn the new owners.
    Watchers {
        /// The version they must have.
        version: u64,
    },
    /// An old owner has not fenced yet.
    Fence {
        /// Its store.
        store: String,
        /// Its shard in the old view.
        shard: u32,
    },
    /// No new owner of a shard has all that an old owner accepted.
    Drain {
        /// The new owner's shard.
        shard: u32,
        /// The old owner's store.
        store: String,
    },
    /// A replica still deletes keys that it doesn't own any more.
    Clean {
        /// Its store.
        store: String,
        /// Its shard.
        shard: u32,
    },
    /// A store still deletes a replica.
    Drop {
        /// The store.
        store: String,
        /// The replica.
        replica: u64,
    },
    /// A store still has the deleted keyspace.
    Deleting {
        /// The store.
        store: String,
    },
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newer { store, version } => {
                write!(f, "{store} knows version {version}, which is newer: the operator adopts it first")
            }
            Self::Majority { version, have, need, missing } => write!(
                f,
                "{have} of the {need} stores that must have synced version {version} have; it waits for {}",
                missing.join(", ")
            ),
            Self::Paused => f.write_str("paused: nothing is changed until spec.paused is false"),
            Self::Spec { shards, replication_factor } => write!(
                f,
                "{shards} shards with replication factor {replication_factor} can't be placed: \
                 both must be at least 1, and the factor not more than the shards"
            ),
            Self::Store { store } => write!(f, "waits for {store} to report"),
            Self::NoRoom { store, need, free } => write!(
                f,
                "{store} would get about {need} bytes and has room for {free}: enlarge its volume, or ask for more shards"
            ),
            Self::NotMade { store, shard } => write!(f, "waits for {store} to make a replica of shard {shard}"),
            Self::Away { store, shard } => write!(f, "waits for {store}, which has shard {shard} and is away"),
            Self::NotBorn { store, replica, shard } => {
                write!(f, "replica {replica:016x} of shard {shard} on {store} is still copying")
            }
            Self::Behind { store, replica, shard, source, lag: Some(lag) } => {
                write!(f, "replica {replica:016x} of shard {shard} on {store} is {lag} records behind {source}")
            }
            Self::Behind { store, replica, shard, source, lag: None } => {
                write!(f, "replica {replica:016x} of shard {shard} on {store} does not follow {source} yet")
            }
            Self::NoOwner { shard } => write!(f, "shard {shard} has no living replica that serves"),
            Self::NoCopy { store, shard } => write!(
                f,
                "{store} had shard {shard} and no other living copy of it serves: bring {store} back with its \
                 volume, or replace {store} and accept the loss of data"
            ),
            Self::Watchers { version } => write!(f, "waits for clients to learn version {version}"),
            Self::Fence { store, shard } => {
                write!(f, "waits for {store} to stop writes under the old owners of shard {shard}")
            }
            Self::Drain { shard, store } => {
                write!(f, "waits for shard {shard} to take over the last writes that {store} accepted")
            }
            Self::Clean { store, shard } => {
                write!(f, "{store} still deletes keys that moved away from its shard {shard}")
            }
            Self::Drop { store, replica } => write!(f, "{store} still deletes replica {replica:016x}"),
            Self::Deleting { store } => write!(f, "{store} still has the deleted keyspace"),
        }
    }
}
