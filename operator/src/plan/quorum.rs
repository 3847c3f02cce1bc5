//! When the next step may be taken: once a majority of the stores concerned has
//! the committed version on disk. So a fresh operator that has heard a majority
//! has heard the newest topology, and what clients route by outlives the status.

use std::collections::BTreeSet;

use vasto_client::v1::{Phase, Topology, View};

use super::wait::Wait;
use super::{Call, Observation};

/// The stores that a view's replicas stand on; `all`: also those of vacant places.
fn stores(view: Option<&View>, all: bool) -> BTreeSet<&str> {
    let places = view.into_iter().flat_map(View::places).map(|p| p.assignment);
    places.filter(|a| all || a.replica != 0).map(|a| a.store.as_str()).collect()
}

/// The sets of stores of which each must have a majority. In PREPARE, those that
/// clients use (a cancel must not wait for new stores that can't start); while the
/// first view is being made, all of its stores.
fn concerned(t: &Topology, seen: &Observation) -> Vec<BTreeSet<String>> {
    let own = |set: BTreeSet<&str>| set.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    match t.phase() {
        Phase::Prepare if t.size() == 0 => {
            let mut first = own(stores(t.next.as_ref(), true));
            first.retain(|s| !(seen.is_lost(s) && seen.heard.contains(s)));
            vec![first]
        }
        Phase::Prepare => vec![own(stores(t.current.as_ref(), false))],
        _ => vec![own(stores(t.current.as_ref(), false)), own(stores(t.previous.as_ref(), false))],
    }
}

fn majority(t: &Topology, seen: &Observation, stores: &BTreeSet<String>) -> Result<(), Wait> {
    let (have, missing): (Vec<_>, Vec<_>) = stores.iter().cloned().partition(|s| seen.persisted(s) >= t.version);
    let need = stores.len() / 2 + 1;
    if have.len() >= need || stores.is_empty() {
        return Ok(());
    }
    Err(Wait::Majority { version: t.version, have: have.len(), need, missing })
}

/// Whether a majority of each set of stores concerned has persisted this version.
pub(super) fn reached(t: &Topology, seen: &Observation) -> Result<(), Wait> {
    concerned(t, seen).iter().try_for_each(|stores| majority(t, seen, stores))
}

/// The same for the stores of `next`: clients are about to be sent there.
pub(super) fn reached_by_next(t: &Topology, seen: &Observation) -> Result<(), Wait> {
    let stores = stores(t.next.as_ref(), false).into_iter().map(str::to_owned).collect();
    majority(t, seen, &stores)
}

/// The same, lost stores left out: what it takes to give up the dead, since otherwise
/// the death of a majority would leave no way on. A lost store is left out only if this
/// operator has heard it (what it knew was adopted) or a person has accepted the loss.
pub(super) fn without_lost(t: &Topology, call: &Call<'_>) -> bool {
    let person = call
        .spec
        .replace
        .as_ref()
        .is_some_and(|r| r.accept_data_loss && r.request != t.replaced && call.seen.is_lost(&r.store));
    concerned(t, call.seen).into_iter().all(|mut stores| {
        stores.retain(|s| !(call.seen.is_lost(s) && (person || call.seen.heard.contains(s))));
        majority(t, call.seen, &stores).is_ok()
    })
}
