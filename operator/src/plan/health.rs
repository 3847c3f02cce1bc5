//! What is known of stores and replicas: who lives, who is gone, who is sound
//! enough to be counted as a copy, and how far one has followed another.

use vasto_client::v1::{Assignment, KeyspaceReport, Phase, ReplicaReport, Topology, View};

use super::wait::Wait;
use super::{NEAR, Observation, Presence};

/// What is known of the replica at one place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate<'a> {
    /// There is none.
    Vacant,
    /// Its store reports it.
    Living(&'a ReplicaReport),
    /// Its store reports, but not this replica: its volume is another, or was emptied.
    Gone,
    /// Its store is not heard at the moment, or has not been heard yet.
    Away,
    /// Its store has been away for too long.
    Lost,
}

impl Observation {
    /// What each living store reports of this keyspace.
    pub(super) fn reports(&self) -> impl Iterator<Item = (&str, &KeyspaceReport)> {
        self.stores.iter().filter_map(|(name, presence)| match presence {
            Presence::Living(Some(report)) => Some((name.as_str(), &**report)),
            _ => None,
        })
    }

    pub(super) fn report(&self, store: &str) -> Option<&KeyspaceReport> {
        match self.stores.get(store) {
            Some(Presence::Living(Some(report))) => Some(report),
            _ => None,
        }
    }

    /// The version that a living store has persisted; 0: none.
    pub(super) fn persisted(&self, store: &str) -> u64 {
        self.report(store).map_or(0, |r| r.version)
    }

    pub(super) fn is_living(&self, store: &str) -> bool {
        matches!(self.stores.get(store), Some(Presence::Living(_)))
    }

    pub(super) fn is_lost(&self, store: &str) -> bool {
        matches!(self.stores.get(store), Some(Presence::Lost))
    }

    /// Whether a living store reports this replica.
    pub(super) fn has(&self, store: &str, replica: u64) -> bool {
        self.replica(store, replica).is_some()
    }

    pub(super) fn replica(&self, store: &str, replica: u64) -> Option<&ReplicaReport> {
        self.report(store).and_then(|r| r.replicas.iter().find(|r| r.id == replica && replica != 0))
    }

    pub(super) fn fate(&self, place: &Assignment) -> Fate<'_> {
        match self.stores.get(&place.store) {
            _ if place.replica == 0 => Fate::Vacant,
            Some(Presence::Living(_)) => self.replica(&place.store, place.replica).map_or(Fate::Gone, Fate::Living),
            Some(Presence::Lost) => Fate::Lost,
            Some(Presence::Away) | None => Fate::Away,
        }
    }

    pub(super) fn living(&self, place: &Assignment) -> Option<&ReplicaReport> {
        match self.fate(place) {
            Fate::Living(report) => Some(report),
            _ => None,
        }
    }

    /// A copy to rely on: it lives, is whole, and clients may be sent to it.
    pub(super) fn sound(&self, place: &Assignment) -> Option<&ReplicaReport> {
        self.living(place).filter(|r| place.serving && r.born && r.fault.is_empty())
    }

    /// Whether some replica of this shard, other than `except`, is a copy to rely on.
    pub(super) fn has_copy(&self, view: &View, shard: u32, except: u64) -> bool {
        places(view, shard).any(|a| a.replica != except && self.sound(a).is_some())
    }
}

/// The assignments of one shard.
pub(super) fn places(view: &View, shard: u32) -> impl Iterator<Item = &Assignment> {
    view.shards.get(shard as usize).into_iter().flat_map(|s| &s.replicas)
}

/// Whether a shard has only vacant places: nobody has it, or its loss was accepted.
pub(super) fn hollow(view: &View, shard: u32) -> bool {
    places(view, shard).all(|a| a.replica == 0)
}

/// Whether `follower` is no more than [`NEAR`] behind `source`; otherwise by how much
/// (`None`: it has no position there).
pub(super) fn near(follower: &ReplicaReport, source: &ReplicaReport) -> Result<(), Option<u64>> {
    let position = follower.sources.iter().find(|s| s.replica == source.id && s.epoch == source.epoch);
    match position {
        Some(s) if s.confirmed == 0 && source.last_seq != 0 => Err(None),
        Some(s) if s.lag <= NEAR => Ok(()),
        Some(s) => Err(Some(s.lag).filter(|lag| *lag != u64::MAX)),
        None => Err(None),
    }
}

/// Whether `new` has all that `old` accepted before its fence of this change, synced.
pub(super) fn passed(new: &ReplicaReport, old: &ReplicaReport, switch_version: u64) -> bool {
    let position = new.sources.iter().find(|s| s.replica == old.id && s.epoch == old.epoch);
    old.fence_version == switch_version && position.is_some_and(|s| s.confirmed >= old.fence_seq)
}

/// Whether the replica at `place` is whole and near every living, whole replica that
/// it follows and that `counts`.
pub(super) fn caught_up(
    t: &Topology,
    seen: &Observation,
    shard: u32,
    place: &Assignment,
    counts: impl Fn(u64) -> bool,
) -> Result<(), Wait> {
    let store = || place.store.clone();
    let replica = place.replica;
    let Some(report) = seen.living(place) else { return Err(Wait::Away { store: store(), shard }) };
    if !report.born {
        return Err(Wait::NotBorn { store: store(), replica, shard });
    }
    for source in t.sources(replica) {
        let Some(of) = seen.living(source.assignment).filter(|r| r.born && counts(r.id)) else { continue };
        near(report, of).map_err(|lag| {
            let source = source.assignment.store.clone();
            Wait::Behind { store: store(), replica, shard, source, lag }
        })?;
    }
    Ok(())
}

/// Whether any one store may be restarted now: no change is under way, and every replica serves and is near the
/// others of its shard. Otherwise why not.
pub fn in_sync(t: &Topology, seen: &Observation) -> Result<(), String> {
    if t.phase() != Phase::Stable || t.replace.is_some() {
        return Err("a change is under way".to_owned());
    }
    for place in t.current.iter().flat_map(View::places) {
        let store = &place.assignment.store;
        if seen.sound(place.assignment).is_none() {
            return Err(format!("shard {} on {store} does not serve", place.shard));
        }
        caught_up(t, seen, place.shard, place.assignment, |_| true).map_err(|wait| wait.to_string())?;
    }
    Ok(())
}
