//! The topologies that a client knows: one Watch stream to the operator for
//! all its keyspaces, and what stores attach to their refusals. While the
//! operator is away the client goes on with what it knows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::env::Env;
use crate::error::{describe, describe_transport};
use crate::pipe::MAX_MESSAGE;
use crate::v1::operator_client::OperatorClient;
use crate::v1::{KeyspaceUpdate, Known, WatchRequest, WatchResponse, watch_response::Event};

/// Whatever the operator asks for, it is told after this long that a topology came.
const MAX_RECEIPT: Duration = Duration::from_secs(2);

/// Who sent a topology: the operator knows names, a store only what it was asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Operator,
    Store,
}

/// What is known about a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The operator has not answered yet.
    Asked,
    /// It does not exist.
    Missing,
    /// `Subscription::latest` holds it.
    Known,
}

/// One keyspace that the client watches.
pub(crate) struct Subscription {
    pub(crate) name: String,
    pub(crate) status: watch::Sender<Status>,
    /// Empty until known.
    pub(crate) latest: watch::Sender<Arc<KeyspaceUpdate>>,
}

impl Subscription {
    /// Takes in a topology if it is newer than what is known; says whether it was.
    fn offer(&self, update: KeyspaceUpdate, source: Source) -> bool {
        let taken = self.latest.send_if_modified(|known| match newer(known, update, source) {
            Some(newer) => {
                *known = Arc::new(newer);
                true
            }
            None => false,
        });
        if source == Source::Operator {
            self.status.send_if_modified(|status| std::mem::replace(status, Status::Known) != Status::Known);
        }
        taken
    }
}

/// What to know after `offered` came, where that changes anything.
fn newer(known: &KeyspaceUpdate, mut offered: KeyspaceUpdate, source: Source) -> Option<KeyspaceUpdate> {
    let new = offered.topology.as_ref()?;
    let old = known.topology.as_ref();
    let same = old.is_some_and(|old| old.uid == new.uid);
    let (had, has) = (old.map_or(0, |t| t.version), new.version);
    match source {
        // Another uid: deleted and made again. A store can't tell which came later.
        Source::Operator if !same => return Some(offered),
        Source::Store if !same => return None,
        Source::Operator if has < had => return None,
        Source::Store if has <= had => return None,
        _ => {}
    }
    // A store that has not been heard of lately may still be where it was.
    let stores = new.stores().into_iter().map(str::to_string);
    let unnamed: Vec<String> =
        stores.filter(|s| offered.addresses.iter().all(|a| a.store != *s || a.address.is_empty())).collect();
    let kept = known.addresses.iter().filter(|a| unnamed.contains(&a.store)).cloned();
    offered.addresses.extend(kept);
    offered.addresses.retain(|a| !a.address.is_empty());
    offered.addresses.sort_by(|a, b| a.store.cmp(&b.store));
    (has > had || offered.addresses != known.addresses).then_some(offered)
}

/// What one stream has told the operator.
#[derive(Clone, Default)]
struct Told {
    /// Name -> how often it had been asked for.
    names: BTreeMap<String, u64>,
    /// Uid -> version.
    known: BTreeMap<String, u64>,
}

#[derive(Default)]
struct State {
    subscriptions: BTreeMap<String, (Arc<Subscription>, u64)>,
    obstacle: String,
    /// About so long after a topology came the operator wants to be told that it did.
    receipt: Duration,
}

/// Every keyspace that a client watches.
pub(crate) struct Topologies {
    state: Mutex<State>,
    /// Marks that there may be something to tell the operator.
    changed: watch::Sender<()>,
}

impl Topologies {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a name to what is watched. One that was missing is asked for again.
    pub(crate) fn subscribe(&self, name: &str) -> Arc<Subscription> {
        let mut state = self.state();
        let (subscription, asked) = state.subscriptions.entry(name.to_string()).or_insert_with(|| {
            let subscription = Subscription {
                name: name.to_string(),
                status: watch::Sender::new(Status::Asked),
                latest: watch::Sender::new(Arc::default()),
            };
            (Arc::new(subscription), 0)
        });
        let again = subscription
            .status
            .send_if_modified(|s| *s == Status::Missing && std::mem::replace(s, Status::Asked) != Status::Asked);
        if again || *asked == 0 {
            *asked += 1;
        }
        let subscription = subscription.clone();
        drop(state);
        self.changed.send_replace(());
        subscription
    }

    /// Why the operator could not be reached last; empty when it can be.
    pub(crate) fn obstacle(&self) -> String {
        self.state().obstacle.clone()
    }

    /// Takes in a topology that a store attached to a refusal; says whether it was newer.
    pub(crate) fn offer(&self, subscription: &Subscription, update: KeyspaceUpdate) -> bool {
        let taken = subscription.offer(update, Source::Store);
        if taken {
            self.changed.send_replace(());
        }
        taken
    }

    fn event(&self, response: WatchResponse) {
        match response.event {
            Some(Event::Update(update)) => {
                let Some(topology) = &update.topology else { return };
                let found = self.state().subscriptions.get(&topology.name).map(|(s, _)| s.clone());
                let Some(subscription) = found else { return };
                self.state().receipt = Duration::from_millis(response.receipt_ms.into()).min(MAX_RECEIPT);
                let (name, version) = (topology.name.clone(), topology.version);
                if subscription.offer(update, Source::Operator) {
                    tracing::debug!(keyspace = name, version, "took in a topology");
                    self.changed.send_replace(());
                }
            }
            Some(Event::Missing(name)) => {
                if let Some((subscription, _)) = self.state().subscriptions.get(&name) {
                    subscription.status.send_replace(Status::Missing);
                }
            }
            None => {}
        }
    }

    /// What the operator has not been told on this stream yet, and what it has been told then.
    fn untold(&self, told: &Told) -> (WatchRequest, Told) {
        let mut told = told.clone();
        let mut request = WatchRequest::default();
        for (name, (subscription, asked)) in &self.state().subscriptions {
            if told.names.insert(name.clone(), *asked) != Some(*asked) {
                request.keyspaces.push(name.clone());
            }
            let latest = subscription.latest.borrow();
            if let Some(t) = &latest.topology
                && told.known.insert(t.uid.clone(), t.version) != Some(t.version)
            {
                request.known.push(Known { uid: t.uid.clone(), version: t.version });
            }
        }
        (request, told)
    }

    /// The request side of one stream: the latest that the operator has not been told, never a queue of what was.
    /// Names are asked for at once; that a version has come is said when the operator wants to hear it.
    fn requests(self: Arc<Self>, env: Env) -> impl Stream<Item = WatchRequest> + Send + 'static {
        let changed = self.changed.subscribe();
        futures::stream::unfold((self, env, changed, Told::default()), |(all, env, mut changed, told)| async move {
            let mut due = None;
            loop {
                changed.borrow_and_update();
                let (request, now_told) = all.untold(&told);
                if !request.keyspaces.is_empty() || due.is_some_and(|due| due <= Instant::now()) {
                    return Some((request, (all, env, changed, now_told)));
                }
                if !request.known.is_empty() && due.is_none() {
                    due = Some(Instant::now() + env.jitter(all.state().receipt));
                }
                tokio::select! {
                    changed = changed.changed() => changed.ok()?,
                    () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                }
            }
        })
    }

    /// One stream from its making to its end; returns why it ended.
    async fn stream(self: &Arc<Self>, env: &Env, operator: &str, failures: &mut u32) -> String {
        let channel = match env.dial(operator) {
            Ok(channel) => channel,
            Err(error) => return describe_transport(&error),
        };
        let mut client =
            OperatorClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        // HTTP/2 keeps a stream for as long as its requests may go on: the operator would wait for a client that has gone.
        let here = CancellationToken::new();
        let _gone_with_this = here.clone().drop_guard();
        let requests = self.clone().requests(env.clone()).take_until(here.cancelled_owned());
        let mut responses = match client.watch(requests).await {
            Ok(response) => response.into_inner(),
            Err(status) => return describe(&status),
        };
        self.state().obstacle = "it has not answered yet".into();
        loop {
            match responses.message().await {
                Ok(Some(response)) => {
                    *failures = 0;
                    self.state().obstacle.clear();
                    self.event(response);
                }
                Ok(None) => return "it closed the stream".into(),
                Err(status) => return describe(&status),
            }
        }
    }

    /// Keeps a stream to the operator until dropped.
    pub(crate) async fn run(self: Arc<Self>, env: Env, operator: String) {
        let mut failures = 0u32;
        loop {
            let reason = self.stream(&env, &operator, &mut failures).await;
            tracing::debug!(operator, reason, "lost the operator; going on with what is known");
            self.state().obstacle = reason;
            let pause = Duration::from_millis((50u64 << failures.min(6)).min(2_000));
            failures += 1;
            tokio::time::sleep(env.jitter(pause)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Assignment, Shard, StoreAddress, Topology, View};

    fn update(uid: &str, version: u64, addresses: &[(&str, &str)]) -> KeyspaceUpdate {
        let replicas = ["a", "b"].map(|s| Assignment { store: s.into(), replica: 1, serving: true }).into();
        let current = Some(View { shards: vec![Shard { replicas }] });
        let topology = Topology { uid: uid.into(), name: "k".into(), version, current, ..Default::default() };
        let address = |&(store, address): &(&str, &str)| StoreAddress { store: store.into(), address: address.into() };
        KeyspaceUpdate { topology: Some(topology), addresses: addresses.iter().map(address).collect() }
    }

    #[test]
    fn only_newer_topologies_are_taken() {
        let known = update("u", 5, &[("a", "h:1")]);
        let took = |version, source| newer(&known, update("u", version, &[("a", "h:1")]), source).is_some();
        assert!(took(6, Source::Operator) && took(6, Source::Store));
        assert!(!took(5, Source::Operator) && !took(5, Source::Store));
        assert!(!took(4, Source::Operator) && !took(4, Source::Store));
        // Of another uid, only the operator can tell that it is the one of that name now.
        assert!(newer(&known, update("w", 1, &[]), Source::Operator).is_some());
        assert!(newer(&known, update("w", 9, &[]), Source::Store).is_none());
        assert!(newer(&known, KeyspaceUpdate::default(), Source::Operator).is_none());
    }

    #[test]
    fn a_store_that_moved_is_found_and_one_not_heard_of_is_kept() {
        let known = update("u", 5, &[("a", "h:1"), ("b", "h:2")]);
        let moved = newer(&known, update("u", 5, &[("a", "h:3"), ("b", "")]), Source::Operator).unwrap();
        assert_eq!(moved.addresses, update("u", 5, &[("a", "h:3"), ("b", "h:2")]).addresses);
        assert!(newer(&known, update("u", 5, &[("b", "h:2")]), Source::Operator).is_none());
        assert!(newer(&known, update("u", 5, &[("a", "h:3")]), Source::Store).is_none());
    }

    /// What a stream that was told this far would be told next.
    fn tell(all: &Topologies, told: &mut Told) -> (Vec<String>, Vec<Known>) {
        let (request, now_told) = all.untold(told);
        *told = now_told;
        (request.keyspaces, request.known)
    }

    fn known(version: u64) -> Vec<Known> {
        vec![Known { uid: "u".into(), version }]
    }

    #[test]
    fn the_operator_is_told_each_thing_once_a_stream() {
        let all = Topologies::new();
        let mut told = Told::default();
        assert_eq!(tell(&all, &mut told), (vec![], vec![]));
        all.subscribe("k");
        assert_eq!(tell(&all, &mut told), (vec!["k".to_string()], vec![]));
        all.event(WatchResponse { event: Some(Event::Update(update("u", 5, &[]))), receipt_ms: 0 });
        assert_eq!(tell(&all, &mut told), (vec![], known(5)));
        all.subscribe("k");
        assert_eq!(tell(&all, &mut told), (vec![], vec![]));
        // A new stream is told all of it.
        assert_eq!(tell(&all, &mut Told::default()), (vec!["k".to_string()], known(5)));
    }

    #[tokio::test]
    async fn receipts_wait_as_long_as_was_asked_for_and_names_do_not() {
        const RECEIPT: Duration = Duration::from_millis(200);
        let all = Arc::new(Topologies::new());
        let mut requests = Box::pin(all.clone().requests(Env::real()));
        let mut next = async || {
            let begun = Instant::now();
            let request = requests.next().await.unwrap();
            (request.keyspaces.len(), request.known, begun.elapsed())
        };
        let after = |receipt: Duration, version| {
            let event = Some(Event::Update(update("u", version, &[])));
            all.event(WatchResponse { event, receipt_ms: receipt.as_millis() as u32 });
        };
        let offer = |version| after(RECEIPT, version);
        all.subscribe("k");
        let (names, versions, waited) = next().await;
        assert_eq!((names, versions), (1, vec![]));
        assert!(waited < RECEIPT / 2, "{waited:?}");
        offer(5);
        let (names, versions, waited) = next().await;
        assert_eq!((names, versions), (0, known(5)));
        assert!(waited >= RECEIPT / 2, "{waited:?}");
        // The latest only.
        (6..9).for_each(offer);
        all.subscribe("another");
        let (names, versions, waited) = next().await;
        assert_eq!((names, versions), (1, known(8)));
        assert!(waited < RECEIPT / 2, "{waited:?}");
        // At once, where the operator has few to listen to.
        after(Duration::ZERO, 9);
        let (names, versions, waited) = next().await;
        assert_eq!((names, versions), (0, known(9)));
        assert!(waited < RECEIPT / 2, "{waited:?}");
    }

    #[test]
    fn a_missing_name_is_asked_for_again() {
        let all = Topologies::new();
        let mut told = Told::default();
        let subscription = all.subscribe("k");
        tell(&all, &mut told);
        all.event(WatchResponse { event: Some(Event::Missing("k".into())), receipt_ms: 0 });
        assert_eq!(*subscription.status.borrow(), Status::Missing);
        all.subscribe("k");
        assert_eq!(*subscription.status.borrow(), Status::Asked);
        assert_eq!(tell(&all, &mut told).0, ["k"]);
    }
}
