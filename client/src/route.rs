//! Where an operation goes and what to do when a try fails, as pure functions:
//! key -> shard -> replicas in order, and failure -> the next step.

use std::time::Duration;

use crate::hash::jump_hash;
use crate::v1::{FailureCode, KeyspaceUpdate};

/// A replica that may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) store: String,
    pub(crate) address: String,
    pub(crate) replica: u64,
}

/// For each shard, the serving replicas whose address is known, in order of preference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Route {
    shards: Vec<Vec<Candidate>>,
}

impl Route {
    /// What a topology says to clients.
    pub(crate) fn new(update: &KeyspaceUpdate) -> Self {
        let address = |store: &str| update.addresses.iter().find(|a| a.store == store && !a.address.is_empty());
        let view = update.topology.as_ref().and_then(|t| t.current.as_ref());
        let shards = view.map_or(&[][..], |v| &v.shards).iter().map(|shard| {
            let serving = shard.replicas.iter().filter(|a| a.serving && a.replica != 0);
            serving
                .filter_map(|a| {
                    let address = address(&a.store)?.address.clone();
                    Some(Candidate { store: a.store.clone(), address, replica: a.replica })
                })
                .collect()
        });
        Self { shards: shards.collect() }
    }

    /// The number of shards. 0: the keyspace is being made.
    pub(crate) fn size(&self) -> u32 {
        self.shards.len() as u32
    }

    /// The shard of a partition key's hash; `None` while there are no shards.
    pub(crate) fn shard(&self, partition_hash: u64) -> Option<u32> {
        (self.size() > 0).then(|| jump_hash(partition_hash, self.size()))
    }

    /// Whom to ask, in order of preference.
    pub(crate) fn candidates(&self, shard: u32) -> &[Candidate] {
        self.shards.get(shard as usize).map_or(&[], Vec::as_slice)
    }
}

/// How an operation bears being repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Repeats freely.
    Read,
    /// A put or delete: repeats safely.
    Write,
    /// Counts twice when executed twice: never repeated once it may have been executed.
    Merge,
}

/// Why one try gave no answer that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The store said so.
    Refused(FailureCode),
    /// The queue to the store is full.
    Full,
    /// The connection could not be made, or broke.
    Broken {
        /// Whether the operation may have left this process.
        sent: bool,
    },
    /// No answer within the try's time.
    Late {
        /// Whether the operation may have left this process.
        sent: bool,
    },
    /// The topology names no serving replica.
    Nobody,
}

/// What to do after a failed try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The same replica again, after a pause.
    Retry,
    /// Another replica at once; after a pause where all have been tried.
    Elsewhere,
    /// When a newer topology has come, or after a pause.
    Refresh,
    /// It will not get better.
    Fail,
    /// It may have been executed and must not be repeated.
    Unknown,
}

/// The tries of one operation so far.
#[derive(Debug, Default)]
pub(crate) struct Attempt {
    /// Replicas tried since the last pause.
    tried: Vec<u64>,
    /// Pauses so far.
    pauses: u32,
}

impl Attempt {
    /// Notes that this replica was tried.
    pub(crate) fn tried(&mut self, replica: u64) {
        self.tried.push(replica);
    }

    /// The next replica to try: the first untried one that isn't suspect, then the
    /// first untried one. `None`: all have been tried.
    pub(crate) fn pick(&self, candidates: impl Iterator<Item = (u64, bool)>) -> Option<usize> {
        let mut fallback = None;
        for (index, (replica, suspect)) in candidates.enumerate() {
            if self.tried.contains(&replica) {
                continue;
            }
            if !suspect {
                return Some(index);
            }
            fallback = fallback.or(Some(index));
        }
        fallback
    }

    /// Goes on with this round after a pause; returns how long (to be jittered).
    pub(crate) fn rest(&mut self) -> Duration {
        let pause = backoff(self.pauses);
        self.pauses += 1;
        pause
    }

    /// Starts another round over all replicas; returns how long to pause first (to be jittered).
    pub(crate) fn pause(&mut self) -> Duration {
        self.tried.clear();
        self.rest()
    }
}

/// 5 ms, doubling, to 500 ms.
fn backoff(pauses: u32) -> Duration {
    Duration::from_millis((5u64 << pauses.min(7)).min(500))
}

/// What to do after a failed try; `others` says whether an untried replica is left in this round.
pub(crate) fn decide(kind: Kind, trouble: Trouble, others: bool) -> Next {
    let executed_perhaps = if kind == Kind::Merge { Next::Unknown } else { Next::Elsewhere };
    match trouble {
        Trouble::Nobody | Trouble::Refused(FailureCode::WrongShard) => Next::Refresh,
        Trouble::Refused(FailureCode::NotReady) => Next::Elsewhere,
        // Reads spread; a write would burden all replicas wherever it is taken.
        Trouble::Full | Trouble::Refused(FailureCode::ResourceExhausted) if kind == Kind::Read => Next::Elsewhere,
        Trouble::Full | Trouble::Refused(FailureCode::ResourceExhausted) => Next::Retry,
        Trouble::Refused(FailureCode::Invalid | FailureCode::Mismatch) => Next::Fail,
        Trouble::Refused(FailureCode::NoSpace) if others => Next::Elsewhere,
        Trouble::Refused(FailureCode::NoSpace) => Next::Fail,
        Trouble::Refused(FailureCode::Internal | FailureCode::Unspecified) => executed_perhaps,
        Trouble::Broken { sent: true } | Trouble::Late { sent: true } => executed_perhaps,
        Trouble::Broken { sent: false } | Trouble::Late { sent: false } => Next::Elsewhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Assignment, Shard, StoreAddress, Topology, View};
    use proptest::prelude::*;

    fn assignment(store: &str, replica: u64, serving: bool) -> Assignment {
        Assignment { store: store.into(), replica, serving }
    }

    #[test]
    fn a_route_has_the_serving_replicas_in_order() {
        let replicas = vec![
            assignment("a", 1, false),
            assignment("b", 2, true),
            assignment("c", 0, true),
            assignment("nowhere", 4, true),
            assignment("a", 5, true),
        ];
        let current = Some(View { shards: vec![Shard { replicas }, Shard::default()] });
        let address = |store: &str, address: &str| StoreAddress { store: store.into(), address: address.into() };
        let update = KeyspaceUpdate {
            topology: Some(Topology { current, ..Default::default() }),
            addresses: vec![address("a", "h:1"), address("b", "h:2"), address("c", "h:3"), address("nowhere", "")],
        };
        let route = Route::new(&update);
        assert_eq!(route.size(), 2);
        let replicas: Vec<u64> = route.candidates(0).iter().map(|c| c.replica).collect();
        assert_eq!(replicas, [2, 5]);
        assert_eq!(route.candidates(0)[1].address, "h:1");
        assert!(route.candidates(1).is_empty());
        assert!(route.candidates(9).is_empty());
        assert_eq!(Route::new(&KeyspaceUpdate::default()).shard(7), None);
    }

    #[test]
    fn suspects_are_asked_last_and_nobody_twice() {
        let candidates = [(1, true), (2, false), (3, true)];
        let mut attempt = Attempt::default();
        let mut order = Vec::new();
        while let Some(index) = attempt.pick(candidates.into_iter()) {
            order.push(candidates[index].0);
            attempt.tried(candidates[index].0);
        }
        assert_eq!(order, [2, 1, 3]);
        assert_eq!(attempt.pause(), Duration::from_millis(5));
        assert_eq!(attempt.pick(candidates.into_iter()), Some(1));
    }

    #[test]
    fn pauses_double_up_to_half_a_second() {
        let mut attempt = Attempt::default();
        let pauses: Vec<u64> = (0..9).map(|_| attempt.pause().as_millis() as u64).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 320, 500, 500]);
    }

    fn trouble() -> impl Strategy<Value = Trouble> {
        prop_oneof![
            (0i32..8).prop_map(|c| Trouble::Refused(FailureCode::try_from(c).unwrap())),
            any::<bool>().prop_map(|sent| Trouble::Broken { sent }),
            any::<bool>().prop_map(|sent| Trouble::Late { sent }),
            Just(Trouble::Full),
            Just(Trouble::Nobody),
        ]
    }

    /// Whether the operation may have been executed although the try failed.
    fn perhaps_executed(trouble: Trouble) -> bool {
        matches!(
            trouble,
            Trouble::Broken { sent: true }
                | Trouble::Late { sent: true }
                | Trouble::Refused(FailureCode::Internal | FailureCode::Unspecified)
        )
    }

    proptest! {
        #[test]
        fn a_merge_is_unknown_exactly_when_it_may_have_been_executed(trouble in trouble(), others: bool) {
            let next = decide(Kind::Merge, trouble, others);
            prop_assert_eq!(next == Next::Unknown, perhaps_executed(trouble));
        }

        #[test]
        fn what_repeats_safely_fails_only_for_its_own_fault(trouble in trouble(), others: bool, read: bool) {
            let kind = if read { Kind::Read } else { Kind::Write };
            let next = decide(kind, trouble, others);
            prop_assert_ne!(next, Next::Unknown);
            let hopeless = match trouble {
                Trouble::Refused(FailureCode::Invalid | FailureCode::Mismatch) => true,
                Trouble::Refused(FailureCode::NoSpace) => !others,
                _ => false,
            };
            prop_assert_eq!(next == Next::Fail, hopeless);
        }
    }

    #[test]
    fn a_wrong_shard_waits_for_the_topology() {
        for kind in [Kind::Read, Kind::Write, Kind::Merge] {
            assert_eq!(decide(kind, Trouble::Refused(FailureCode::WrongShard), true), Next::Refresh);
            assert_eq!(decide(kind, Trouble::Nobody, false), Next::Refresh);
        }
    }
}
