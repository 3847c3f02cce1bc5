//! What a topology implies, as pure functions: who owns a key, who accepts its
//! writes, who follows whom and for which keys. Stores, clients and the
//! operator's planner ask here, so that they can't disagree.

use crate::hash::{jump_hash, shards_meet};
use crate::v1::{Assignment, GivenUp, Phase, Topology, View};

/// The namespace whose keyspaces are called by their names alone.
pub const DEFAULT_NAMESPACE: &str = "default";

/// What topologies and watchers call a keyspace of a Kubernetes namespace: `packages` in `default`,
/// `shop/packages` in `shop`.
pub fn qualified(namespace: &str, name: &str) -> String {
    if namespace == DEFAULT_NAMESPACE { name.to_owned() } else { format!("{namespace}/{name}") }
}

/// A name as topologies have it: `default/packages` is `packages`.
pub fn short(name: &str) -> &str {
    name.strip_prefix(DEFAULT_NAMESPACE).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name)
}

/// One replica's place in one view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The shard's index in its view.
    pub shard: u32,
    /// The number of shards in its view.
    pub shards: u32,
    /// The store and the replica's id.
    pub assignment: &'a Assignment,
}

impl Place<'_> {
    /// Whether a key with this partition hash belongs to this place's shard.
    pub fn owns(&self, partition_hash: u64) -> bool {
        jump_hash(partition_hash, self.shards) == self.shard
    }

    /// Whether both may own the same key.
    fn meets(&self, other: &Self) -> bool {
        shards_meet(self.shard, self.shards, other.shard, other.shards)
    }

    /// Whether both own the same keys.
    fn same(&self, other: &Self) -> bool {
        (self.shard, self.shards) == (other.shard, other.shards)
    }
}

/// What a follower wants of a source, to be asked for many keys: the follower's shard wants them in `current` or
/// `next`, and the source's shard owns them in the same view or in the one before.
pub struct Wanted<'a>(Vec<(Place<'a>, Place<'a>)>);

impl Wanted<'_> {
    /// Whether a key with this hash is wanted.
    pub fn has(&self, partition_hash: u64) -> bool {
        self.0.iter().any(|(want, has)| want.owns(partition_hash) && has.owns(partition_hash))
    }
}

impl View {
    /// The number of shards.
    pub fn size(&self) -> u32 {
        self.shards.len() as u32
    }

    /// Every assignment of this view, shard by shard.
    pub fn places(&self) -> impl Iterator<Item = Place<'_>> {
        let shards = self.size();
        self.shards.iter().enumerate().flat_map(move |(shard, s)| {
            s.replicas.iter().map(move |assignment| Place { shard: shard as u32, shards, assignment })
        })
    }

    /// Where the replica with this id stands (a replica has one shard in a view). 0 finds nothing.
    pub fn place(&self, replica: u64) -> Option<Place<'_>> {
        self.places().find(|p| replica != 0 && p.assignment.replica == replica)
    }

    /// The shard of a replica, and how many there are: by these two one knows whose the keys are.
    pub fn shard_of(&self, replica: u64) -> Option<(u32, u32)> {
        self.place(replica).map(|p| (p.shard, p.shards))
    }

    /// The replica of this shard that stands on this store.
    pub fn on(&self, shard: u32, store: &str) -> Option<&Assignment> {
        let replicas = self.shards.get(shard as usize).map_or(&[][..], |s| &s.replicas);
        replicas.iter().find(|a| a.store == store && a.replica != 0)
    }
}

impl Topology {
    /// `current`, `next` and `previous`, where present.
    pub fn views(&self) -> impl Iterator<Item = &View> {
        [&self.current, &self.next, &self.previous].into_iter().flatten()
    }

    /// Whether any view names this replica.
    pub fn names(&self, replica: u64) -> bool {
        self.views().any(|v| v.place(replica).is_some())
    }

    /// Every store that any view, drop or replace names; sorted, each once.
    pub fn stores(&self) -> Vec<&str> {
        let mut stores: Vec<&str> = self
            .views()
            .flat_map(View::places)
            .map(|p| p.assignment.store.as_str())
            .chain(self.drops.iter().map(|d| d.store.as_str()))
            .filter(|s| !s.is_empty())
            .collect();
        stores.sort_unstable();
        stores.dedup();
        stores
    }

    /// Number of shards that clients route by.
    pub fn size(&self) -> u32 {
        self.current.as_ref().map_or(0, View::size)
    }

    /// Whether this replica takes a client's write of a key with this hash.
    ///
    /// Owners under `current` do (serving or not yet: a client is only sent to
    /// the serving ones); until the fence, owners under `previous` do as well.
    pub fn accepts_write(&self, replica: u64, partition_hash: u64) -> bool {
        self.accepting(replica).any(|place| place.owns(partition_hash))
    }

    /// The places for which this replica may take a client's write.
    pub fn accepting(&self, replica: u64) -> impl Iterator<Item = Place<'_>> {
        self.served().filter_map(move |view| view.place(replica))
    }

    /// The views by which clients read and write: `current`, until the fence `previous` as well, and none of a
    /// keyspace that is being deleted.
    pub fn served(&self) -> impl Iterator<Item = &View> {
        let previous = self.previous.as_ref().filter(|_| self.phase() == Phase::Switch);
        self.current.as_ref().filter(|_| self.phase() != Phase::Deleting).into_iter().chain(previous)
    }

    /// Whether this replica holds a key with this hash for good under any view: what it owns now, is being prepared
    /// for, or has yet to hand over. What it was told to delete, it has handed over.
    pub fn holds(&self, replica: u64, partition_hash: u64) -> bool {
        let previous = self.previous.as_ref().filter(|_| !self.clean.contains(&replica));
        let views = [self.current.as_ref(), self.next.as_ref(), previous];
        views.into_iter().flatten().filter_map(|v| v.place(replica)).any(|p| p.owns(partition_hash))
    }

    /// The views that `follower` gathers data for, each with the view before it.
    fn wants(&self) -> [(Option<&View>, Option<&View>); 2] {
        [(self.next.as_ref(), self.current.as_ref()), (self.current.as_ref(), self.previous.as_ref())]
    }

    /// What `source` must ship to `follower`.
    pub fn wanted(&self, source: u64, follower: u64) -> Wanted<'_> {
        let pairs = self.wants().into_iter().flat_map(|(view, before)| {
            let want = view.and_then(|v| v.place(follower));
            let has = [view, before].into_iter().flatten().filter_map(|v| v.place(source));
            want.into_iter().flat_map(move |want| has.clone().map(move |has| (want, has)))
        });
        Wanted(pairs.filter(|(want, has)| want.meets(has)).collect())
    }

    /// Whether `source` must ship a key with this hash to `follower`. For many keys, ask `wanted` once.
    pub fn ships(&self, source: u64, follower: u64, partition_hash: u64) -> bool {
        self.wanted(source, follower).has(partition_hash)
    }

    /// Whether `source`'s position at `peer` holds for `target` as well, once that has a copy of what `source` ships
    /// to it: each key that `target` wants of `peer`, `source` wants of it too, and ships to `target`. An old owner of
    /// a shard has passed, at its sibling, what it itself no longer wants, so after the switch it passes none on.
    pub fn passes_on(&self, source: u64, peer: u64, target: u64) -> bool {
        let (of_peer, by_source, from_source) =
            (self.wanted(peer, target), self.wanted(peer, source), self.wanted(source, target));
        // One shard of two that meet has all that they have in common.
        let passed = |(want, has): &(Place<'_>, Place<'_>)| {
            by_source.0.iter().any(|(w, h)| h.same(has) && (w.same(want) || w.same(has)))
                && from_source.0.iter().any(|(w, h)| w.same(want) && (h.same(want) || h.same(has)))
        };
        // A position where nothing is wanted would stand for what is wanted there later.
        peer != source && peer != target && !of_peer.0.is_empty() && of_peer.0.iter().all(passed)
    }

    /// Every replica that `follower` must follow: those that may hold a key it
    /// wants. Vacant assignments (id 0) and the follower itself are left out; each once. So are replicas of
    /// other shards that delete what they have handed over: their changes and copies no longer hold it, and a
    /// position there would say that it has come.
    pub fn sources(&self, follower: u64) -> Vec<Place<'_>> {
        let mut found: Vec<Place<'_>> = Vec::new();
        for (view, before) in self.wants() {
            let Some(mine) = view.and_then(|v| v.place(follower)) else { continue };
            let same = view.into_iter().flat_map(View::places).filter(|p| p.shard == mine.shard);
            let old = before
                .into_iter()
                .flat_map(View::places)
                .filter(|p| mine.meets(p))
                .filter(|p| !self.clean.contains(&p.assignment.replica));
            for place in same.chain(old) {
                let id = place.assignment.replica;
                if id != 0 && id != follower && found.iter().all(|f| f.assignment.replica != id) {
                    found.push(place);
                }
            }
        }
        found
    }

    /// Whom a candidate copies before it is born: of each shard that must be copied, those of its replicas that
    /// are sources, serving ones first; one of them will do. `None`: neither `next` nor `current` names the
    /// candidate. Empty: there is nothing to copy. A shard without any is left out: its loss was accepted, or all
    /// that is left of it was told to delete what it had handed over, and the loss of those who had got it was.
    pub fn origins(&self, candidate: u64) -> Option<Vec<Vec<&Assignment>>> {
        let (place, before) =
            self.wants().into_iter().find_map(|(view, before)| Some((view?.place(candidate)?, before)))?;
        let sources = self.sources(candidate);
        // After the change ended there is no view before: its shard's others have all of it.
        let Some(view) = before.or(self.current.as_ref()) else { return Some(Vec::new()) };
        let needed = (0..view.size()).filter(|shard| shards_meet(*shard, view.size(), place.shard, place.shards));
        let groups = needed.map(|shard| {
            let mut group: Vec<_> = view.places().filter(|p| p.shard == shard).map(|p| p.assignment).collect();
            group.retain(|a| sources.iter().any(|s| s.assignment.replica == a.replica));
            group.sort_by_key(|a| !a.serving);
            group
        });
        Some(groups.filter(|group| !group.is_empty()).collect())
    }

    /// Whether `follower` must follow `source`.
    pub fn is_source(&self, source: u64, follower: u64) -> bool {
        self.sources(follower).iter().any(|p| p.assignment.replica == source)
    }

    /// Every replica that follows `source`: those whose `sources` name it.
    pub fn followers(&self, source: u64) -> Vec<Place<'_>> {
        let mut found: Vec<Place<'_>> = Vec::new();
        for place in self.views().flat_map(View::places) {
            let id = place.assignment.replica;
            if id != 0 && found.iter().all(|f| f.assignment.replica != id) && self.is_source(source, id) {
                found.push(place);
            }
        }
        found
    }

    /// Whether `target` must take over this key from `returned`, a replica that came
    /// back after it was given up: the target owns it under `current`.
    pub fn hands_over(&self, returned: u64, target: u64, partition_hash: u64) -> bool {
        self.given_up.iter().any(|g| g.replica == returned && g.returned)
            && self.current.as_ref().and_then(|v| v.place(target)).is_some_and(|p| p.owns(partition_hash))
    }

    /// Every given-up replica that came back with something for `target`.
    pub fn handing_over(&self, target: u64) -> Vec<&GivenUp> {
        let Some(place) = self.current.as_ref().and_then(|v| v.place(target)) else { return Vec::new() };
        self.given_up
            .iter()
            .filter(|g| g.returned && g.replica != target && shards_meet(g.shard, g.shards, place.shard, place.shards))
            .collect()
    }

    /// Whether this replica was given up.
    pub fn is_given_up(&self, replica: u64) -> bool {
        self.given_up.iter().any(|g| g.replica == replica)
    }
}

#[cfg(test)]
mod tests {
    use crate::v1::{Assignment, Phase, Shard, Topology, View};

    fn view(shards: &[&[u64]]) -> Option<View> {
        let place = |id: &u64| Assignment { store: format!("store-{id}"), replica: *id, serving: true };
        Some(View { shards: shards.iter().map(|s| Shard { replicas: s.iter().map(place).collect() }).collect() })
    }

    #[test]
    fn who_deletes_what_it_handed_over_is_a_source_for_its_own_shard_alone() {
        let mut topology = Topology {
            phase: Phase::Cleanup.into(),
            previous: view(&[&[1, 2]]),
            current: view(&[&[1, 2], &[3, 4]]),
            ..Topology::default()
        };
        let sources = |t: &Topology| {
            let mut ids: Vec<u64> = t.sources(3).iter().map(|p| p.assignment.replica).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(sources(&topology), [1, 2, 4]);
        topology.clean = vec![1];
        assert_eq!(sources(&topology), [2, 4]);
        assert!(!topology.is_source(1, 3));
        assert!(topology.is_source(1, 2) && topology.is_source(2, 1), "of what they still own they are copies");
        topology.clean = vec![1, 2];
        assert_eq!(sources(&topology), [4]);
    }

    #[test]
    fn a_position_holds_for_who_wants_no_more_than_who_has_it() {
        // Shard 2 of 3 is 5 and 6; of 4 it is 5 alone, and 8 gets the keys that move.
        let old = || view(&[&[1, 2], &[3, 4], &[5, 6]]);
        let new = || view(&[&[1], &[3], &[5], &[8]]);
        let mut topology =
            Topology { phase: Phase::Prepare.into(), current: old(), next: new(), ..Topology::default() };
        assert!(topology.passes_on(5, 6, 8), "until the switch 5 wants all that is 6's");
        assert!(topology.passes_on(6, 5, 8));
        assert!(!topology.passes_on(1, 6, 8), "1 wants nothing of 6");
        assert!(!topology.passes_on(5, 6, 1), "nor does 1 for good");
        topology = Topology { phase: Phase::Switch.into(), previous: old(), current: new(), ..Topology::default() };
        assert!(!topology.passes_on(5, 6, 8), "what moves to 8, 5 no longer wants of 6");
        assert!(!topology.passes_on(6, 5, 8));
        // Shards of four in two copies each become three.
        topology = Topology {
            phase: Phase::Prepare.into(),
            current: view(&[&[1, 2], &[3, 4], &[5, 6], &[8, 9]]),
            next: view(&[&[1, 2], &[3, 4], &[5, 7]]),
            ..Topology::default()
        };
        assert!(topology.passes_on(8, 9, 7) && topology.passes_on(9, 8, 5));
        assert!(topology.passes_on(5, 6, 7));
        assert!(!topology.passes_on(6, 5, 7), "5 gathers the keys of shard 3 as well, which 6 does not want");
        topology = Topology { phase: Phase::Stable.into(), current: view(&[&[1, 2, 3]]), ..Topology::default() };
        assert!(topology.passes_on(1, 2, 3), "they are of one shard");
        assert!(!topology.passes_on(1, 3, 3) && !topology.passes_on(1, 1, 3), "nobody has a position at itself");
    }

    #[test]
    fn a_candidate_copies_each_shard_from_who_still_has_it() {
        let mut topology = Topology {
            phase: Phase::Cleanup.into(),
            previous: view(&[&[1, 2], &[3, 4], &[5]]),
            current: view(&[&[1], &[3], &[5], &[6]]),
            ..Topology::default()
        };
        if let Some(place) = topology.previous.iter_mut().flat_map(|v| &mut v.shards[0].replicas).next() {
            place.serving = false;
        }
        let origins = |t: &Topology, id| {
            let ids = |group: &Vec<&Assignment>| group.iter().map(|a| a.replica).collect::<Vec<_>>();
            t.origins(id).map(|groups| groups.iter().map(ids).collect::<Vec<_>>())
        };
        assert_eq!(origins(&topology, 6), Some(vec![vec![2, 1], vec![3, 4], vec![5]]), "serving ones first");
        assert_eq!(origins(&topology, 7), None);
        topology.clean = vec![3, 5];
        let left = Some(vec![vec![2, 1], vec![4]]);
        assert_eq!(origins(&topology, 6), left, "who deletes what it handed over has nothing to give");
        topology = Topology { phase: Phase::Stable.into(), current: view(&[&[1], &[3, 7]]), ..Topology::default() };
        assert_eq!(origins(&topology, 7), Some(vec![vec![3]]), "late");
        assert_eq!(origins(&topology, 1), Some(vec![]));
    }
}
