//! Which stores hold which shard: from a spec to the stores' names, and from
//! those to a view that keeps every replica that may stay.

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

/// A view over these stores. Who holds the same shard on the same store now goes
/// on; other places are empty: candidates are made for them.
pub(super) fn view(lists: &Lists, current: &View) -> View {
    let place = |shard: usize, store: &String| {
        let stays = current.shards.get(shard).and_then(|s| s.replicas.iter().find(|a| a.store == *store));
        stays.cloned().unwrap_or_else(|| Assignment { store: store.clone(), replica: 0, serving: false })
    };
    let shard = |(i, stores): (usize, &Vec<String>)| Shard { replicas: stores.iter().map(|s| place(i, s)).collect() };
    View { shards: lists.iter().enumerate().map(shard).collect() }
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
