//! A client's own order across replicas. Each replica's clock is past the
//! stamps that it gave itself, so a request tells it only the greatest that
//! *others* gave this client; without that, a write through a replica with a
//! slow clock could lose to an older one of the same caller.

use crate::value::Stamp;

/// The stamps that one client was given in one keyspace.
#[derive(Debug, Default)]
pub(crate) struct Session {
    shards: u32,
    /// The greatest stamp of all earlier sizes: whoever serves a key now may not have given it.
    floor: Stamp,
    /// For each shard, the greatest stamp that each replica gave; as far as any did.
    given: Vec<Vec<(u64, Stamp)>>,
}

impl Session {
    /// Takes in the size that the keyspace is routed by now. When it changes, keys
    /// change shards, so all stamps become the floor of every shard.
    pub(crate) fn resize(&mut self, shards: u32) {
        if shards == self.shards {
            return;
        }
        self.shards = shards;
        let given = self.given.drain(..).flatten();
        self.floor = given.map(|(_, stamp)| stamp).fold(self.floor, Ord::max);
    }

    /// Merges what was given by replicas that the shard no longer has, so that
    /// years of replacements leave no trace but one stamp.
    pub(crate) fn retain(&mut self, shard: u32, replicas: &[u64]) {
        let Some(given) = self.given.get_mut(shard as usize) else { return };
        let gone = given.iter().filter(|(id, _)| !replicas.contains(id)).map(|(_, s)| *s).max();
        given.retain(|(id, _)| replicas.contains(id));
        // No replica has the id 0, so this one counts for all.
        given.extend(gone.map(|stamp| (0, stamp)));
    }

    /// What a request to this replica must carry: the greatest stamp that it
    /// may not have seen. `None` when there is none.
    pub(crate) fn after(&self, shard: u32, replica: u64) -> Option<Stamp> {
        let others = self.given.get(shard as usize).into_iter().flatten();
        let greatest = others.filter(|(id, _)| *id != replica).map(|(_, s)| *s).fold(self.floor, Ord::max);
        (greatest != Stamp::default()).then_some(greatest)
    }

    /// Takes in a stamp that a replica gave under `shards` shards.
    pub(crate) fn saw(&mut self, shards: u32, shard: u32, replica: u64, stamp: Stamp) {
        if shards != self.shards {
            // An answer from before the size changed: it belongs to no shard of now.
            self.floor = self.floor.max(stamp);
            return;
        }
        let shard = shard as usize;
        if self.given.len() <= shard {
            self.given.resize_with(shard + 1, Vec::new);
        }
        let given = &mut self.given[shard];
        match given.iter_mut().find(|(id, _)| *id == replica) {
            Some((_, greatest)) => *greatest = stamp.max(*greatest),
            None => given.push((replica, stamp)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(time: u64) -> Stamp {
        Stamp { time, origin: 1 }
    }

    #[test]
    fn a_replica_is_not_told_its_own_stamps() {
        let mut session = Session::default();
        session.resize(3);
        session.saw(3, 0, 7, at(10));
        assert_eq!(session.after(0, 7), None);
        assert_eq!(session.after(0, 8), Some(at(10)));
        assert_eq!(session.after(1, 8), None);
        session.saw(3, 0, 8, at(5));
        assert_eq!(session.after(0, 7), Some(at(5)));
    }

    #[test]
    fn a_new_size_tells_everyone_everything() {
        let mut session = Session::default();
        session.resize(3);
        session.saw(3, 0, 7, at(10));
        session.resize(5);
        assert_eq!(session.after(4, 7), Some(at(10)));
        session.saw(3, 1, 7, at(20));
        assert_eq!(session.after(0, 7), Some(at(20)));
    }

    #[test]
    fn replicas_that_are_gone_leave_their_greatest_stamp() {
        let mut session = Session::default();
        session.resize(1);
        session.saw(1, 0, 7, at(10));
        session.saw(1, 0, 8, at(20));
        session.saw(1, 0, 9, at(15));
        session.retain(0, &[9, 10]);
        session.retain(0, &[9, 10]);
        assert_eq!(session.after(0, 9), Some(at(20)));
        assert_eq!(session.after(0, 10), Some(at(20)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Saw { shard: u32, replica: u64, time: u64 },
        Resize(u32),
        Retain { shard: u32, replicas: Vec<u64> },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u32..3, 1u64..5, 1u64..100).prop_map(|(shard, replica, time)| Step::Saw { shard, replica, time }),
            1 => (3u32..6).prop_map(Step::Resize),
            1 => (0u32..3, proptest::collection::vec(1u64..5, 0..3))
                .prop_map(|(shard, replicas)| Step::Retain { shard, replicas }),
        ]
    }

    proptest! {
        /// Whatever happened: a replica is told of each stamp of its shard that it did not give.
        #[test]
        fn no_stamp_of_another_replica_is_forgotten(steps in proptest::collection::vec(step(), 0..40)) {
            let mut session = Session::default();
            let mut shards = 3;
            session.resize(shards);
            let mut given: Vec<(u32, u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Saw { shard, replica, time } => {
                        session.saw(shards, shard, replica, at(time));
                        given.push((shard, replica, time));
                    }
                    Step::Resize(to) => {
                        shards = to;
                        session.resize(to);
                    }
                    Step::Retain { shard, replicas } => session.retain(shard, &replicas),
                }
                for &(shard, replica, time) in &given {
                    for other in (1..5).filter(|r| *r != replica) {
                        prop_assert!(session.after(shard, other) >= Some(at(time)));
                    }
                }
            }
        }
    }
}
