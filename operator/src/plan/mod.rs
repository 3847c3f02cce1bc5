//! The planner: from what is wanted, what is committed and what stores report, to
//! the next topology to commit. Pure: no clock, no I/O, no randomness; the same
//! inputs give the same answer, and each call commits at most one small step.
//!
//! A driver loops: gather reports, [`adopt`] the greatest topology, [`plan`], write
//! [`Outcome::next`] to status, send the committed topology to its stores, and tell
//! clients of it once [`Outcome::publish`] is true.

mod cleanup;
mod deleting;
mod drain;
mod fence;
mod givenup;
mod health;
mod keep;
mod placement;
mod prepare;
mod quorum;
mod refill;
mod start;
mod status;
mod switch;
#[cfg(test)]
mod tests;
mod wait;

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use vasto_client::v1::{KeyspaceReport, Phase, Topology};

pub use health::in_sync;
pub use placement::{Lists, expected_share, placement};
pub use status::{Condition, Progress, reason};
pub use wait::Wait;

/// A replica this many changes behind a source, or fewer, counts as caught up.
pub const NEAR: u64 = 1_000;

/// What is wanted of one keyspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The keyspace's name.
    pub name: String,
    /// Its uid, under which stores keep it.
    pub uid: String,
    /// The number of shards wanted.
    pub shards: u32,
    /// The number of replicas wanted of each shard.
    pub replication_factor: u32,
    /// Commit no step (but deletion).
    pub paused: bool,
    /// The keyspace is to be deleted.
    pub deleting: bool,
    /// When deleting, keep the files.
    pub retain: bool,
    /// The whole spec as JSON; stores keep it with the topology.
    pub spec_json: String,
    /// A store to be emptied and filled anew. Stays here until [`Topology::replaced`] names the request.
    pub replace: Option<ReplaceRequest>,
}

/// Someone asks for a store to be emptied and filled anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplaceRequest {
    /// The store's name.
    pub store: String,
    /// Names the request, so that repeating it does nothing.
    pub request: String,
    /// Leave the store empty as long as this is asked for; it is filled anew once it isn't any more.
    pub hold: bool,
    /// Give up what only this store holds, if it is lost, wiped or faulty; and go on
    /// although other lost stores haven't been heard by this operator.
    pub accept_data_loss: bool,
}

/// What is known of a store's life.
#[derive(Clone, Debug, PartialEq)]
pub enum Presence {
    /// It reports. `None`: its report (whole, from the stream's first message on) says nothing of this keyspace.
    Living(Option<Box<KeyspaceReport>>),
    /// This operator has heard it; at the moment it does not report.
    Away,
    /// It has not reported for longer than `storeLostAfter`.
    Lost,
}

/// What stores report of one keyspace.
#[derive(Clone, Debug)]
pub struct Observation {
    /// By store name. A store that this operator has neither heard nor missed for
    /// `storeLostAfter` is absent: unknown.
    pub stores: BTreeMap<String, Presence>,
    /// Stores that have reported to this operator at least once since it started. (Living and
    /// away ones count without being named here: it is the lost ones that make a difference.)
    pub heard: BTreeSet<String>,
    /// Some watcher of this keyspace has not got `switch_version` yet, and the bound has not
    /// passed. A watcher is behind as long as it has not been told, so before [`Outcome::publish`] too.
    pub watchers_behind: bool,
    /// The disks of living stores, where they are known.
    pub room: BTreeMap<String, Room>,
    /// A store's name by its ordinal.
    pub store_name: fn(u32) -> String,
}

/// A store's disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What can still be written.
    pub free: u64,
    /// All of it.
    pub size: u64,
}

impl Observation {
    /// Nothing seen yet.
    pub fn new(store_name: fn(u32) -> String) -> Self {
        let (stores, heard, room) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        Self { stores, heard, watchers_behind: false, room, store_name }
    }
}

/// What the planner says.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The topology to commit now, one version above the state; `None`: nothing to commit.
    pub next: Option<Topology>,
    /// Whether clients may be told of the state (not of `next`): it, or what they route by in it, is
    /// synced on a majority of the stores concerned. False in DELETING: there is nothing to route by.
    pub publish: bool,
    /// The keyspace is deleted: every living store that had it says nothing of it any more.
    pub gone: bool,
    /// With `gone`: stores that may still have it, to be told when they come back.
    pub left: BTreeSet<String>,
    /// The stores that must run.
    pub stores_wanted: BTreeSet<String>,
    /// What stands in the way of the next step, for people.
    pub waits: Vec<Wait>,
    /// Ready, Progressing, Degraded.
    pub conditions: Vec<Condition>,
    /// How far the change has come.
    pub progress: Progress,
}

/// One call's inputs and what it gathers on its way.
struct Call<'a> {
    spec: &'a Spec,
    seen: &'a Observation,
    /// The version that a commit of this call gets.
    version: u64,
    waits: Vec<Wait>,
}

impl Call<'_> {
    fn wait(&mut self, wait: Wait) {
        if !self.waits.contains(&wait) {
            self.waits.push(wait);
        }
    }
}

/// The committed state among what is known: the greatest version wins. Of several with one version
/// (a commit that was lost with the status, and another in its place) the status wins, then what most
/// stores have, then the greatest phase.
///
/// `reported`: whole topologies of one uid as heard from stores, also from those that are away now.
pub fn adopt<'a>(status: Option<&'a Topology>, reported: impl IntoIterator<Item = &'a Topology>) -> Option<Topology> {
    let mut holders: BTreeMap<(u64, Vec<u8>), (usize, &Topology)> = BTreeMap::new();
    for topology in reported {
        holders.entry((topology.version, topology.encode_to_vec())).or_insert((0, topology)).0 += 1;
    }
    let best = holders
        .into_iter()
        .max_by_key(|((version, encoded), (count, t))| (*version, *count, t.phase, encoded.clone()))
        .map(|(_, (_, t))| t);
    match (status, best) {
        (Some(status), Some(best)) if best.version > status.version => Some(best.clone()),
        (Some(status), _) => Some(status.clone()),
        (None, best) => best.cloned(),
    }
}

/// Decides the next step. `state`: what is committed (status, or what [`adopt`] found).
pub fn plan(spec: &Spec, state: Option<&Topology>, seen: &Observation) -> Outcome {
    let mut call = Call { spec, seen, version: state.map_or(1, |s| s.version + 1), waits: Vec::new() };
    let next = match state {
        None => start::create(&mut call),
        Some(state) => advance(state, &mut call),
    };
    let next = next.map(|mut t| {
        t.version = call.version;
        if !spec.spec_json.is_empty() {
            t.spec.clone_from(&spec.spec_json);
        }
        t
    });
    status::outcome(state, next, call)
}

/// The state after one step, or `None` if there is nothing to change.
fn advance(state: &Topology, call: &mut Call<'_>) -> Option<Topology> {
    let known = |r: &KeyspaceReport| r.topology.as_ref().map_or(r.version, |t| t.version.max(r.version));
    if let Some((store, report)) = call.seen.reports().find(|(_, r)| known(r) > state.version) {
        call.wait(Wait::Newer { store: store.to_owned(), version: known(report) });
        return None;
    }
    let mut t = state.clone();
    if call.spec.deleting || state.phase() == Phase::Deleting {
        deleting::step(&mut t, call);
        return (t != *state || forked(state, call.seen)).then_some(t);
    }
    if forked(state, call.seen) {
        // The same under a greater version, so that all take it.
        return Some(t);
    }
    if !call.spec.paused && quorum::without_lost(state, call) {
        givenup::give_up(&mut t, call);
        if t != *state {
            return Some(t);
        }
    }
    if let Err(wait) = quorum::reached(state, call.seen) {
        call.wait(wait);
        return None;
    }
    if call.spec.paused {
        call.wait(Wait::Paused);
    } else {
        keep::keep(&mut t, call);
        match t.phase() {
            Phase::Stable => start::step(&mut t, call),
            Phase::Prepare => prepare::step(&mut t, call),
            phase => {
                if !refill::step(&mut t, call) {
                    match phase {
                        Phase::Switch => switch::step(&mut t, call),
                        Phase::Fence => fence::step(&mut t, call),
                        Phase::Drain => drain::step(&mut t, call),
                        _ => cleanup::step(&mut t, call),
                    }
                }
            }
        }
    }
    let spec_differs = !call.spec.spec_json.is_empty() && t.spec != call.spec.spec_json;
    (t != *state || spec_differs).then_some(t)
}

/// Whether a store has something else under the state's version: what was committed
/// by an operator whose status was lost before a majority had it.
fn forked(state: &Topology, seen: &Observation) -> bool {
    seen.reports().any(|(_, r)| r.topology.as_ref().is_some_and(|t| t.version == state.version && t != state))
}
