//! The hub over real connections.

use std::time::Duration;

use futures::{FutureExt, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Code, Streaming};
use vasto_client::env::Env;
use vasto_client::v1::operator_client::OperatorClient;
use vasto_client::v1::{Assignment, Known, Shard, View};

use super::*;

struct Bench {
    hub: Hub,
    stop: CancellationToken,
    address: String,
    client: OperatorClient<tonic::transport::Channel>,
}

/// Both halves of a stream.
struct Talk<Q, A> {
    requests: mpsc::Sender<Q>,
    answers: Streaming<A>,
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), what).await.expect("in time")
}

impl<Q, A> Talk<Q, A> {
    async fn say(&self, request: Q) {
        assert!(self.requests.send(request).await.is_ok(), "the stream has ended");
    }

    async fn hear(&mut self) -> A {
        within(self.answers.message()).await.unwrap().expect("an answer")
    }

    async fn refused(&mut self) -> Status {
        within(self.answers.message()).await.err().expect("a refusal")
    }
}

impl Talk<WatchRequest, WatchResponse> {
    /// Says that it knows this, and waits until that was heard: a question that comes with it is answered after.
    async fn acknowledge(&mut self, uid: &str, version: u64) {
        self.say(request(&["missing"], &[(uid, version)])).await;
        assert_eq!(self.hear().await.event, Some(Event::Missing("missing".to_owned())));
    }

    async fn version(&mut self) -> u64 {
        match self.hear().await.event {
            Some(Event::Update(update)) => update.topology.unwrap().version,
            other => panic!("an update, not {other:?}"),
        }
    }
}

impl Bench {
    async fn new() -> Self {
        let stop = CancellationToken::new();
        let hub = Hub::new(stop.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder().add_service(OperatorService::new(hub.clone()));
        tokio::spawn(
            server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned()),
        );
        let client = OperatorClient::new(Env::real().dial(&address).unwrap());
        Self { hub, stop, address, client }
    }

    async fn watch(&self, names: &[&str], known: &[(&str, u64)]) -> Talk<WatchRequest, WatchResponse> {
        let (requests, receiver) = mpsc::channel(8);
        requests.send(request(names, known)).await.unwrap();
        let answers = self.client.clone().watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Talk { requests, answers }
    }

    async fn report(&self, first: StoreReport) -> Talk<StoreReport, StoreUpdate> {
        let (requests, receiver) = mpsc::channel(8);
        requests.send(first).await.unwrap();
        let answers = self.client.clone().report(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Talk { requests, answers }
    }

    fn publish(&self, topology: Topology) {
        self.hub.commit(Arc::new(topology.clone()));
        self.hub.publish(&topology.uid);
    }

    /// Waits until the hub, as it is told, is as wanted.
    async fn until(&self, wanted: impl Fn(&Hub) -> bool) {
        within(async {
            while !wanted(&self.hub) {
                self.hub.wait().await;
            }
        })
        .await;
    }

    /// What the driver was woken for; nothing if it was not.
    fn woken(&self) -> Option<Dirty> {
        self.hub.wait().now_or_never().map(|()| self.hub.take_dirty())
    }
}

fn dirty(uid: &str) -> Dirty {
    Dirty::Some(BTreeSet::from([uid.to_owned()]))
}

fn request(names: &[&str], known: &[(&str, u64)]) -> WatchRequest {
    let known = known.iter().map(|(uid, version)| Known { uid: (*uid).to_owned(), version: *version });
    WatchRequest { keyspaces: names.iter().map(|n| (*n).to_owned()).collect(), known: known.collect() }
}

fn topology(name: &str, version: u64, stores: &[&str]) -> Topology {
    let shard =
        |store: &&str| Shard { replicas: vec![Assignment { store: (*store).to_owned(), replica: 7, serving: true }] };
    let current = Some(View { shards: stores.iter().map(shard).collect() });
    Topology { uid: format!("{name}-uid"), name: name.to_owned(), version, current, ..Topology::default() }
}

fn report(store: &str, incarnation: u64, keyspaces: &[(&str, u64)]) -> StoreReport {
    let keyspace = |(uid, version): &(&str, u64)| KeyspaceReport {
        uid: (*uid).to_owned(),
        version: *version,
        ..KeyspaceReport::default()
    };
    StoreReport {
        store: store.to_owned(),
        address: format!("{store}:{incarnation}"),
        incarnation,
        keyspaces: keyspaces.iter().map(keyspace).collect(),
        ..StoreReport::default()
    }
}

#[tokio::test]
async fn watchers_get_the_latest_and_say_what_they_know() {
    let bench = Bench::new().await;
    bench.publish(topology("a", 1, &["s"]));
    let mut watcher = bench.watch(&["a"], &[]).await;
    assert_eq!(watcher.version().await, 1);
    assert!(bench.hub.watchers_behind("a", "a-uid", 1));
    watcher.say(request(&[], &[("a-uid", 1)])).await;
    bench.until(|hub| !hub.watchers_behind("a", "a-uid", 1)).await;
    assert_eq!(bench.hub.take_dirty(), dirty("a-uid"));

    // Committed is not yet published.
    bench.hub.commit(Arc::new(topology("a", 2, &["s"])));
    bench.publish(topology("a", 3, &["s"]));
    bench.hub.commit(Arc::new(topology("a", 2, &["old"])));
    assert_eq!(watcher.version().await, 3);
    assert!(bench.hub.watchers_behind("a", "a-uid", 3));
    assert!(!bench.hub.watchers_behind("b", "b-uid", 3), "nobody watches it");
    drop(watcher);
    bench.until(|hub| !hub.watchers_behind("a", "a-uid", 3)).await;
}

#[tokio::test]
async fn only_the_last_acknowledgement_that_is_waited_for_wakes_the_driver() {
    let bench = Bench::new().await;
    bench.hub.settle();
    bench.publish(topology("a", 1, &["s"]));
    let (mut first, mut second) = (bench.watch(&["a"], &[]).await, bench.watch(&["a"], &[]).await);
    for watcher in [&mut first, &mut second] {
        assert_eq!(watcher.version().await, 1);
        watcher.acknowledge("a-uid", 1).await;
    }
    assert_eq!(bench.woken(), None, "nobody waits");
    assert_eq!(bench.hub.take_dirty(), Dirty::default());

    bench.publish(topology("a", 2, &["s"]));
    assert!(bench.hub.watchers_behind("a", "a-uid", 2));
    assert_eq!((first.version().await, second.version().await), (2, 2));
    first.acknowledge("a-uid", 1).await;
    first.acknowledge("a-uid", 2).await;
    first.acknowledge("another-uid", 2).await;
    assert_eq!(bench.woken(), None, "the second is behind");
    second.acknowledge("a-uid", 2).await;
    assert_eq!(bench.woken(), Some(dirty("a-uid")));
    assert!(!bench.hub.watchers_behind("a", "a-uid", 2));

    // What was asked of an older version counts no more.
    bench.publish(topology("a", 3, &["s"]));
    assert!(bench.hub.watchers_behind("a", "a-uid", 3));
    assert_eq!((first.version().await, second.version().await), (3, 3));
    first.acknowledge("a-uid", 3).await;
    second.acknowledge("a-uid", 2).await;
    assert_eq!(bench.woken(), None);
    assert!(bench.hub.watchers_behind("a", "a-uid", 3));
}

#[tokio::test]
async fn who_comes_and_goes_while_watchers_are_waited_for_counts() {
    let bench = Bench::new().await;
    bench.hub.settle();
    bench.publish(topology("a", 1, &["s"]));
    let mut first = bench.watch(&["a"], &[]).await;
    assert_eq!(first.version().await, 1);
    assert!(bench.hub.watchers_behind("a", "a-uid", 1));

    let mut second = bench.watch(&["a"], &[]).await;
    assert_eq!(second.version().await, 1);
    // Whoever comes with the version is not waited for.
    let mut knows = bench.watch(&["a"], &[("a-uid", 1)]).await;
    assert_eq!(knows.version().await, 1);
    first.acknowledge("a-uid", 1).await;
    assert_eq!(bench.woken(), None, "the second came meanwhile");
    assert!(bench.hub.watchers_behind("a", "a-uid", 1));
    second.acknowledge("a-uid", 1).await;
    assert_eq!(bench.woken(), Some(dirty("a-uid")));

    // Someone else comes, and goes without a word.
    let mut third = bench.watch(&["a"], &[]).await;
    assert_eq!(third.version().await, 1);
    assert!(bench.hub.watchers_behind("a", "a-uid", 1));
    drop(third);
    within(bench.hub.wait()).await;
    assert_eq!(bench.hub.take_dirty(), dirty("a-uid"));
    assert!(!bench.hub.watchers_behind("a", "a-uid", 1));
    // Those who are not waited for may go unnoticed.
    drop(second);
    within(async {
        while bench.hub.counts().1 > 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(bench.woken(), None);
}

#[tokio::test]
async fn a_client_that_was_dropped_is_waited_for_no_more() {
    let bench = Bench::new().await;
    bench.publish(topology("k", 1, &["a"]));
    let client = vasto_client::Client::connect(&bench.address).unwrap();
    client.keyspace("k").await.unwrap();
    assert_eq!(bench.hub.counts().1, 1);
    drop(client);
    // Its process goes on, and so do its runtime and what that still has to send.
    bench.publish(topology("k", 2, &["a"]));
    bench.until(|hub| !hub.watchers_behind("k", "k-uid", 2)).await;
    assert_eq!(bench.hub.counts().1, 0);
}

#[tokio::test]
async fn a_store_that_says_nothing_more_is_noticed_before_its_stream_ends() {
    let bench = Bench::new().await;
    let _store = bench.report(report("s", 1, &[])).await;
    bench.until(|hub| hub.living().contains("s")).await;
    while bench.woken().is_some() {}
    within(bench.hub.wait()).await;
    assert_eq!(bench.hub.take_dirty(), Dirty::All);
    assert_eq!((bench.hub.living().len(), bench.hub.counts().0), (0, 1));
}

#[tokio::test]
async fn a_slow_watcher_skips_versions() {
    let bench = Bench::new().await;
    // More than the windows of a connection hold, so that what isn't read stays here.
    let large = |version| Topology { spec: "x".repeat(1 << 20), ..topology("a", version, &["s"]) };
    bench.publish(large(1));
    let mut watcher = bench.watch(&["a"], &[]).await;
    for version in 2..=64 {
        bench.publish(large(version));
        tokio::task::yield_now().await;
    }
    let mut seen = vec![watcher.version().await];
    while seen.last() != Some(&64) {
        seen.push(watcher.version().await);
    }
    assert!(seen.len() < 64 && seen.is_sorted(), "{seen:?}");
}

#[tokio::test]
async fn names_take_turns_and_only_the_latest_of_each_is_told() {
    let (inbox, a, b) = (Inbox::default(), Arc::<str>::from("a"), Arc::<str>::from("b"));
    inbox.put(b.clone(), Shown::Missing);
    let mut told = Vec::new();
    for _ in 0..3 {
        inbox.put(a.clone(), Shown::Missing);
        inbox.put(a.clone(), Shown::Pending);
        let (name, shown) = within(inbox.next()).await;
        told.push((name, matches!(shown, Shown::Pending)));
    }
    assert_eq!(told, [(a.clone(), true), (b.clone(), false), (a.clone(), true)]);
    {
        let mut waiting = std::pin::pin!(inbox.next());
        assert!(futures::poll!(&mut waiting).is_pending(), "nothing is told twice");
        inbox.put(a.clone(), Shown::Missing);
        inbox.put(b.clone(), Shown::Missing);
        assert_eq!(within(waiting).await.0, b, "it was a's turn last");
    }
    assert_eq!(within(inbox.next()).await.0, a);
}

#[tokio::test]
async fn who_watches_too_much_is_refused_and_forgotten() {
    let bench = Bench::new().await;
    let names: Vec<String> = (0..MAX_NAMES).map(|number| format!("k{number:04}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut watcher = bench.watch(&names, &[]).await;
    bench.publish(topology("k1023", 1, &["s"]));
    assert_eq!(watcher.version().await, 1, "so many are watched");
    assert!(bench.hub.watchers_behind("k1023", "k1023-uid", 1));
    watcher.say(request(&["one-more"], &[])).await;
    assert_eq!(watcher.refused().await.code(), Code::ResourceExhausted);
    bench.until(|hub| !hub.watchers_behind("k1023", "k1023-uid", 1)).await;
    let left: Vec<String> = bench.hub.index().names.keys().cloned().collect();
    assert_eq!(left, ["k1023"], "a keyspace's");
}

#[tokio::test]
async fn a_name_may_be_asked_for_with_its_namespace() {
    let bench = Bench::new().await;
    bench.hub.settle();
    let mut both = bench.watch(&["a", "default/a"], &[]).await;
    let told = [both.hear().await.event, both.hear().await.event];
    assert_eq!(told, ["a", "default/a"].map(|name| Some(Event::Missing(name.to_owned()))));
    drop(both);
    let mut watcher = bench.watch(&["default/a"], &[]).await;
    assert_eq!(watcher.hear().await.event, Some(Event::Missing("default/a".to_owned())), "as it asked");
    bench.publish(topology("a", 1, &["s"]));
    assert_eq!(watcher.version().await, 1);
    assert!(bench.hub.watchers_behind("a", "a-uid", 1), "it has not said that it knows");
    watcher.say(request(&[], &[("a-uid", 1)])).await;
    bench.until(|hub| !hub.watchers_behind("a", "a-uid", 1)).await;
    bench.hub.release("a");
    assert_eq!(watcher.hear().await.event, Some(Event::Missing("default/a".to_owned())));
    drop(watcher);
    // It is waited for until it has gone.
    bench.until(|hub| !hub.watchers_behind("a", "a-uid", 2) && hub.index().names.is_empty()).await;
}

#[tokio::test]
async fn missing_names_are_told_of_when_they_appear_and_go() {
    let bench = Bench::new().await;
    let mut watcher = bench.watch(&["a", "b"], &[]).await;
    bench.hub.claim("b");
    bench.hub.settle();
    assert_eq!(watcher.hear().await.event, Some(Event::Missing("a".to_owned())));
    bench.publish(topology("b", 4, &["s"]));
    assert_eq!(watcher.version().await, 4);
    bench.publish(topology("a", 1, &["s"]));
    assert_eq!(watcher.version().await, 1);
    let mut deleted = topology("a", 2, &[]);
    deleted.set_phase(Phase::Deleting);
    bench.publish(deleted);
    assert_eq!(watcher.hear().await.event, Some(Event::Missing("a".to_owned())));
    // Another of the same name.
    bench.publish(Topology { uid: "second".to_owned(), ..topology("a", 1, &["s"]) });
    assert_eq!(watcher.version().await, 1);
    // Asked again, told again.
    watcher.say(request(&["b", "c"], &[])).await;
    let (first, second) = (watcher.hear().await.event.unwrap(), watcher.hear().await.event.unwrap());
    assert!([first, second].contains(&Event::Missing("c".to_owned())));
}

#[tokio::test]
async fn a_watcher_that_knows_more_is_not_set_back() {
    let bench = Bench::new().await;
    bench.hub.settle();
    bench.publish(topology("a", 5, &["s"]));
    let mut watcher = bench.watch(&["a"], &[("a-uid", 7)]).await;
    bench.until(|hub| !hub.watchers_behind("a", "a-uid", 7)).await;
    watcher.acknowledge("a-uid", 7).await;
    bench.publish(topology("a", 6, &["s"]));
    watcher.acknowledge("a-uid", 7).await;
    bench.publish(topology("a", 8, &["s"]));
    assert_eq!(watcher.version().await, 8);
}

#[tokio::test]
async fn stores_get_what_concerns_them_and_are_seen() {
    let bench = Bench::new().await;
    bench.hub.commit(Arc::new(topology("a", 1, &["s"])));
    bench.hub.commit(Arc::new(topology("b", 1, &["other"])));
    bench.publish(topology("c", 1, &["s"]));
    let mut watcher = bench.watch(&["c"], &[]).await;
    watcher.version().await;
    let mut store = bench.report(report("s", 1, &[("b-uid", 1)])).await;
    let names = |update: &StoreUpdate| -> Vec<String> {
        update.keyspaces.iter().map(|k| k.topology.as_ref().unwrap().name.clone()).collect()
    };
    let first = store.hear().await;
    assert_eq!(names(&first), ["a", "b", "c"], "named by a and c, and it has b");
    assert_eq!(first.keyspaces[0].addresses, [StoreAddress { store: "s".to_owned(), address: "s:1".to_owned() }]);
    // Clients learn the address as well.
    let Some(Event::Update(update)) = watcher.hear().await.event else { panic!("an update") };
    assert_eq!(update.addresses.len(), 1);

    bench.hub.commit(Arc::new(topology("a", 2, &["s"])));
    assert_eq!(names(&store.hear().await), ["a"]);
    store.say(report("s", 1, &[("a-uid", 2), ("b-uid", 1)])).await;
    bench.until(|hub| hub.look("a-uid")["s"].report.as_ref().is_some_and(|r| r.version == 2)).await;
    assert!(bench.hub.look("a-uid")["s"].living);
    assert!(bench.hub.look("c-uid")["s"].report.is_none());

    let last = StoreReport { stopping: true, ..report("s", 1, &[("a-uid", 2)]) };
    store.say(last).await;
    bench.until(|hub| !hub.look("a-uid")["s"].living).await;
    bench.hub.sweep_stores();
    assert!(bench.hub.look("a-uid").contains_key("s"), "a topology names it");
}

#[tokio::test]
async fn one_name_is_one_store() {
    let bench = Bench::new().await;
    let mut first = bench.report(report("s", 1, &[])).await;
    bench.until(|hub| hub.living().contains("s")).await;
    let refused = bench.report(report("s", 2, &[])).await.refused().await;
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(refused.message().contains("connected already, from s:1"), "{}", refused.message());
    // The same process on a new connection takes over from its old one.
    let second = bench.report(report("s", 1, &[])).await;
    assert_eq!(first.refused().await.code(), Code::Aborted);
    assert!(bench.hub.living().contains("s"));
    drop(second);
    bench.until(|hub| hub.living().is_empty()).await;
    let third = bench.report(report("s", 3, &[])).await;
    bench.until(|hub| hub.living().contains("s")).await;
    third.say(report("other", 3, &[])).await;
    let mut third = third;
    assert_eq!(third.refused().await.code(), Code::InvalidArgument);
    assert_eq!(bench.report(report("", 3, &[])).await.refused().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn streams_end_when_the_operator_stops() {
    let bench = Bench::new().await;
    let mut watcher = bench.watch(&["a"], &[]).await;
    let mut store = bench.report(report("s", 1, &[])).await;
    bench.stop.cancel();
    assert_eq!(watcher.refused().await.code(), Code::Unavailable);
    assert_eq!(store.refused().await.code(), Code::Unavailable);
    assert!(within(watcher.answers.next()).await.is_none());
}
