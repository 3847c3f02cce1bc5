//! When tombstones and expired records may go, and which lines of `changes`
//! nobody needs: decided from what every replica of the shard has confirmed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vasto_client::topology::Place;
use vasto_client::v1::{Phase, Topology, View};

use crate::keyspace::Keyspace;
use crate::replica::Replica;

/// Lines kept for a follower that is away; beyond this it must copy a snapshot.
const LINES_KEPT: u64 = 4 << 20;
/// Lines left untrimmed, so that trimming is rare.
const LINES_SLACK: u64 = 4_096;

/// Remembers since when which changes are confirmed by all.
#[derive(Debug, Default)]
pub struct Collector {
    /// At that time everything up to seq was confirmed by all.
    samples: VecDeque<Sample>,
    /// Nothing above this may be collected.
    horizon: u64,
    /// The clock when that was sampled: no row below the horizon has a greater stamp.
    time: u64,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at_ms: u64,
    seq: u64,
    /// The replica's clock, read after `seq`.
    time: u64,
}

impl Collector {
    /// Looks once; called about every second.
    pub async fn step(&mut self, keyspace: &Arc<Keyspace>, replica: &Arc<Replica>) {
        // Read before the topology: a target that is named after this begins at or above it.
        let last_seq = replica.progress.last_seq();
        let topology = keyspace.topology();
        let now = keyspace.env().now_ms();
        let settings = replica.settings();

        let confirmed = confirmed_by_all(&topology, replica.id, last_seq, |id| replica.progress.confirmed_by(id));
        let horizon = self.horizon_at(confirmed, now, settings.grace_ms, replica.progress.clock());
        // Synced before anything goes: what a returned replica has from before it is then not believed.
        if self.time > replica.progress.horizon() && replica.set_horizon(self.time).await.is_err() {
            return;
        }
        let collection = &replica.engine.collection;
        collection.expired_before_ms.store(now.saturating_sub(settings.limits.max_clock_skew_ms), Ordering::Release);
        collection.horizon.store(horizon, Ordering::Release);

        let trimmed = replica.progress.trimmed();
        let needless = needless(&topology, replica.id, last_seq, |id| replica.progress.confirmed_by(id));
        let trim = needless.max(last_seq.saturating_sub(LINES_KEPT));
        if trim > trimmed + LINES_SLACK {
            replica.trim(trim).await;
        }
    }

    /// The seq up to which collection is allowed, given what all have confirmed now.
    fn horizon_at(&mut self, confirmed: Option<u64>, now_ms: u64, grace_ms: u64, time: u64) -> u64 {
        let Some(confirmed) = confirmed else {
            self.samples.clear();
            self.horizon = 0;
            return 0;
        };
        // A sample each sixteenth of the grace time is fine enough, and bounds the list.
        if self.samples.back().is_none_or(|s| now_ms >= s.at_ms + grace_ms / 16 && s.seq != confirmed) {
            self.samples.push_back(Sample { at_ms: now_ms, seq: confirmed, time });
        }
        while let Some(sample) = self.samples.pop_front_if(|s| s.at_ms + grace_ms <= now_ms) {
            (self.horizon, self.time) = (sample.seq, sample.time);
        }
        self.horizon
    }
}

/// The seq up to which every other replica of the shard has confirmed. `None`:
/// a change is under way, or some replica hasn't spoken: it has a veto.
fn confirmed_by_all(
    topology: &Topology,
    replica: u64,
    last_seq: u64,
    confirmed: impl Fn(u64) -> Option<u64>,
) -> Option<u64> {
    if topology.phase() != Phase::Stable {
        return None;
    }
    let view: &View = topology.current.as_ref()?;
    let place = view.place(replica)?;
    let mut least = last_seq;
    for other in view.places().filter(|p: &Place<'_>| p.shard == place.shard) {
        let id = other.assignment.replica;
        if id != 0 && id != replica {
            least = least.min(confirmed(id)?);
        }
    }
    Some(least)
}

/// The seq up to which every follower has confirmed, so that nobody asks for the lines below. 0: someone hasn't spoken.
fn needless(topology: &Topology, replica: u64, last_seq: u64, confirmed: impl Fn(u64) -> Option<u64>) -> u64 {
    // A target may be named at any moment of these phases, and begins where its snapshot was pinned.
    if topology.views().flat_map(View::places).any(|p| p.assignment.replica == 0) {
        return 0;
    }
    topology.followers(replica).iter().map(|p| confirmed(p.assignment.replica).unwrap_or(0)).fold(last_seq, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_client::v1::{Assignment, Shard};

    fn topology(phase: Phase) -> Topology {
        let replicas = [1, 2].map(|id| Assignment { store: format!("store-{id}"), replica: id, serving: true });
        Topology {
            phase: phase.into(),
            current: Some(View { shards: vec![Shard { replicas: replicas.to_vec() }] }),
            ..Topology::default()
        }
    }

    #[test]
    fn one_silent_replica_or_a_change_under_way_vetoes_collection() {
        let stable = topology(Phase::Stable);
        assert_eq!(confirmed_by_all(&stable, 1, 10, |_| None), None);
        assert_eq!(confirmed_by_all(&stable, 1, 10, |_| Some(7)), Some(7));
        assert_eq!(confirmed_by_all(&topology(Phase::Prepare), 1, 10, |_| Some(7)), None);
    }

    #[test]
    fn the_grace_time_runs_from_the_confirmation() {
        let mut collector = Collector::default();
        assert_eq!(collector.horizon_at(Some(5), 1_000, 100, 1), 0);
        assert_eq!(collector.horizon_at(Some(9), 1_050, 100, 1), 0);
        assert_eq!(collector.horizon_at(Some(9), 1_100, 100, 1), 5);
        assert_eq!(collector.horizon_at(Some(9), 1_149, 100, 1), 5);
        assert_eq!(collector.horizon_at(Some(9), 1_150, 100, 1), 9);
        assert_eq!(collector.horizon_at(None, 1_151, 100, 1), 0);
    }

    #[test]
    fn lines_stay_while_a_follower_has_not_spoken() {
        let stable = topology(Phase::Stable);
        assert_eq!(needless(&stable, 1, 10, |_| None), 0);
        assert_eq!(needless(&stable, 1, 10, |_| Some(4)), 4);
    }
}
