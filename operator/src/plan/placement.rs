//! Which stores hold which shard: from a spec to the stores' names, and from
//! those to a view that keeps every replica that may stay.

use vasto_client::hash::shards_meet;
use vasto_client::v1::{Assignment, Shard, View};

/// The stores of each shard, in order of preference.
pub type Lists = Vec<Vec<String>>;

/// n shards on n stores: shard i on stores i, i+1, … i+rf-1 (mod n). `None`: it can't be placed.
pub fn placement(shards: u32, replication_factor: u32, name: fn(u32) -> String) -> Option<Lists> {
    if shards == 0 || replication_factor == 0 || replication_factor > shards {
        return None;
    }
    let stores = |shard| (0..replication_factor).map(|k| name((shard + k) % shards)).collect();
    Some((0..shards).map(stores).collect())
}

/// The same without one store; where it is alone, `surge` stands in.
pub(super) fn without(lists: Lists, store: &str, surge: &str) -> Lists {
    let leave = |mut stores: Vec<String>| {
        stores.retain(|s| s != store);
        if stores.is_empty() {
            stores.push(surge.to_owned());
        }
        stores
    };
    lists.into_iter().map(leave).collect()
}

/// The stores that a view names.
pub(super) fn lists(view: &View) -> Lists {
    view.shards.iter().map(|s| s.replicas.iter().map(|a| a.store.clone()).collect()).collect()
}

/// A view over these stores. Who holds the same shard on the same store now goes on, unless it is to gain keys of
/// other shards: its place, as all others, is empty until a majority of stores knows of the change. Candidates that a
/// forgotten change leaves behind are dropped; what one who stays had copied for it would be left among its own keys.
pub(super) fn view(lists: &Lists, current: &View) -> View {
    let shards = lists.len() as u32;
    let gains = |shard| (0..current.size()).any(|i| i != shard && shards_meet(i, current.size(), shard, shards));
    let place = |shard: u32, store: &String| {
        let stays = current.on(shard, store).filter(|_| !gains(shard));
        stays.cloned().unwrap_or_else(|| Assignment { store: store.clone(), replica: 0, serving: false })
    };
    let shard = |(i, stores): (u32, &Vec<String>)| Shard { replicas: stores.iter().map(|s| place(i, s)).collect() };
    View { shards: (0..).zip(lists).map(shard).collect() }
}

/// What must be copied to come from one view to the other, as a share of the
/// keyspace's records (each counted once): jump hash moves no more than this.
pub fn expected_share(from: &View, to: &View) -> f64 {
    let (n, m) = (f64::from(from.size()), f64::from(to.size()));
    if from.size() == 0 || to.size() == 0 {
        return 0.0;
    }
    let holds = |shard: u32, store: &str| {
        from.places().any(|p| p.shard == shard && p.assignment.store == store && p.assignment.replica != 0)
    };
    to.places().map(|p| if holds(p.shard, &p.assignment.store) { (1.0 / m - 1.0 / n).max(0.0) } else { 1.0 / m }).sum()
}
