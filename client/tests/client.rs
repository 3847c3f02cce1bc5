//! The client against a fake operator and fake stores: what it sends, where it
//! goes when something breaks, and what it never repeats.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use std::time::{Duration, Instant};

use fake::{Cluster, Held, Mode, UID, replica};
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::{FailureCode, Phase, StoreAddress, operation};
use vasto_client::{Code, Data, Entry, Error, Merge, Op, Options, Outcome, ScanOptions};

/// A key of this shard.
fn key_of(shard: u32, shards: u32) -> String {
    (0..).map(|n| format!("key-{n}")).find(|k| jump_hash(partition_hash(k.as_bytes()), shards) == shard).unwrap()
}

fn short(millis: u64) -> Options {
    Options::new().deadline(Duration::from_millis(millis))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_a_map() {
    let cluster = Cluster::start(3, 3, 2);
    let map = cluster.map().await;
    assert_eq!(map.get("a").await.unwrap(), None);
    map.put("a", "1").await.unwrap();
    let value = map.get(b"a").await.unwrap().unwrap();
    assert_eq!((value.data, value.expiry_ms), (Data::Bytes("1".into()), None));
    map.append("a", "2").await.unwrap();
    assert_eq!(map.get("a").await.unwrap().unwrap().bytes().unwrap(), "12");
    map.delete("a").await.unwrap();
    assert_eq!(map.get("a").await.unwrap(), None);
    map.put("n", 1.5).await.unwrap();
    map.add("n", 2.0).await.unwrap();
    map.max("n", 3.0).await.unwrap();
    map.min("n", 3.25).await.unwrap();
    assert_eq!(map.get("n").await.unwrap().unwrap().number(), Some(3.25));
    map.put_with("t", "x", Options::new().ttl(Duration::from_secs(60))).await.unwrap();
    assert!(map.get("t").await.unwrap().unwrap().expiry_ms.is_some());
    let owned = Options::new().partition_key("p");
    map.put_with("k", "v", owned.clone()).await.unwrap();
    assert!(map.get_with("k", owned).await.unwrap().is_some());
    let all: Vec<_> = (0..3).flat_map(|s| cluster.gauge(s).operations()).collect();
    let sent = all.iter().find(|o| o.partition_key.is_some()).unwrap();
    assert_eq!((sent.shard, sent.shards, &sent.keyspace[..]), (jump_hash(partition_hash(b"p"), 3), 3, UID.as_bytes()));
    assert_eq!(map.get("").await.unwrap_err().code(), Code::Invalid);
    let error = map.add("t", 1.0).await.unwrap_err();
    assert_eq!(error.code(), Code::Mismatch, "{error}");
    assert!(error.to_string().contains("add \"t\" in keyspace \"map\""), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_goes_in_as_few_messages_as_it_takes_and_is_answered_in_order() {
    let cluster = Cluster::start(1, 1, 1);
    let map = cluster.map().await;
    let mut ops: Vec<Op> = (0..1000).map(|n| Op::put(format!("k{n}"), f64::from(n))).collect();
    ops.insert(7, Op::get(""));
    let answers = map.batch(ops).await;
    assert_eq!(answers.len(), 1001);
    assert_eq!(answers[7].as_ref().unwrap_err().code(), Code::Invalid);
    assert_eq!(answers.iter().filter(|a| matches!(a, Ok(Outcome::Written(_)))).count(), 1000);
    assert_eq!(
        cluster.gauge(0).messages.lock().unwrap().iter().map(Vec::len).collect::<Vec<_>>(),
        [128, 128, 128, 128, 128, 128, 128, 104]
    );
    let answers = map.batch((0..1000).map(|n| Op::get(format!("k{n}")))).await;
    for (n, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap().value().unwrap().number(), Some(n as f64));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_batch_of_great_values_goes_through() {
    let cluster = Cluster::start(2, 2, 1);
    let map = cluster.map().await;
    let answers = map.batch((0..12).map(|n| Op::put(format!("k{n}"), vec![n; 8 << 20]))).await;
    assert!(answers.iter().all(Result::is_ok), "{:?}", answers.iter().find(|a| a.is_err()));
    let answers = map.batch((0..20_000).map(|n| Op::put(format!("s{n}"), "v"))).await;
    assert_eq!(answers.iter().filter(|a| a.is_ok()).count(), 20_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_shares_messages() {
    let cluster = Cluster::start(1, 1, 1);
    let map = cluster.map().await;
    let callers = (0..400).map(|caller| {
        let map = map.clone();
        tokio::spawn(async move {
            for n in 0..50 {
                map.put(format!("{caller}-{n}"), "v").await.unwrap();
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    let messages = cluster.gauge(0).messages.lock().unwrap().len();
    assert!(messages < 10_000, "20000 operations took {messages} messages");
    assert_eq!(*cluster.gauge(0).streams.borrow(), 2, "two streams, and no more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_caller_needs_one_stream() {
    let cluster = Cluster::start(1, 1, 1);
    let map = cluster.map().await;
    for n in 0..100 {
        map.put(format!("k{n}"), "v").await.unwrap();
    }
    assert_eq!(*cluster.gauge(0).streams.borrow(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_store_dies_another_replica_is_asked() {
    let mut cluster = Cluster::start(2, 1, 2);
    let map = cluster.map().await;
    map.put("a", "1").await.unwrap();
    assert_eq!(cluster.gauge(1).operations().len(), 0);
    let stamp = match map.batch([Op::put("b", "2")]).await.remove(0).unwrap() {
        Outcome::Written(stamp) => stamp,
        other => panic!("{other:?}"),
    };
    cluster.stores[0].0.kill().await;
    let start = Instant::now();
    assert!(map.get("a").await.unwrap().is_some());
    map.put("a", "3").await.unwrap();
    map.add("n", 1.0).await.unwrap();
    assert!(map.batch([Op::get("a"), Op::add("n", 1.0)]).await.iter().all(Result::is_ok));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // The session tells the second replica what the first one gave.
    let put = cluster.gauge(1).operations().into_iter().find(|o| matches!(o.kind, Some(operation::Kind::Put(_))));
    assert_eq!(put.unwrap().after.unwrap().time, stamp.time);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_store_does_not_answer_another_replica_is_asked_then_and_after() {
    let cluster = Cluster::start(2, 1, 2);
    let map = cluster.map().await;
    cluster.gauge(0).set(Mode::Silent);
    let start = Instant::now();
    assert_eq!(map.get("a").await.unwrap(), None);
    let first = start.elapsed();
    assert!(first > Duration::from_millis(900) && first < Duration::from_secs(3), "{first:?}");
    for n in 0..10 {
        map.put(format!("{n}"), "v").await.unwrap();
    }
    assert!(start.elapsed() - first < Duration::from_millis(500), "{:?}", start.elapsed());
    let batch = map.batch((0..10).map(|n| Op::get(format!("{n}")))).await;
    assert!(batch.iter().all(|a| matches!(a, Ok(Outcome::Found(_)))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_whose_answer_is_lost_is_unknown_and_not_repeated() {
    let cluster = Cluster::start(2, 1, 2);
    let map = cluster.map().await;
    map.put("n", 1.0).await.unwrap();
    cluster.gauge(0).set(Mode::Break);
    let error = map.add("n", 1.0).await.unwrap_err();
    assert_eq!(error.code(), Code::Unknown, "{error}");
    cluster.gauge(0).set(Mode::Normal);
    let merges = |store: usize| {
        let operations = cluster.gauge(store).operations();
        operations.into_iter().filter(|o| matches!(o.kind, Some(operation::Kind::Merge(_)))).count()
    };
    assert_eq!((merges(0), merges(1)), (1, 0));
    // In a batch as well, while the puts beside it are repeated.
    cluster.gauge(0).set(Mode::Break);
    // The first store is suspect and asked last until it has answered again.
    cluster.gauge(1).set(Mode::Break);
    let answers = map.batch([Op::put("a", "1").with(short(300)), Op::add("n", 1.0)]).await;
    assert_eq!(answers[1].as_ref().unwrap_err().code(), Code::Unknown);
    let put = answers[0].as_ref().unwrap_err().code();
    assert!(matches!(put, Code::Unavailable | Code::Deadline), "{put:?}");
    assert_eq!(merges(0) + merges(1), 2);
    assert_eq!(cluster.world.data.lock().unwrap()[&b"n"[..]].0, Held::Number(1.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_that_was_sent_waits_to_its_deadline_and_is_unknown() {
    let cluster = Cluster::start(2, 1, 2);
    let map = cluster.map().await;
    cluster.gauge(0).set(Mode::Silent);
    let error = map.merge_with("n", Merge::Add(1.0), short(1500)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unknown, "{error}");
    assert_eq!(cluster.gauge(1).operations().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_that_was_never_sent_is_unavailable() {
    let mut cluster = Cluster::start(1, 1, 1);
    let map = cluster.map().await;
    cluster.stores[0].0.kill().await;
    let error = map.merge_with("n", Merge::Add(1.0), short(300)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(error.to_string().contains(&cluster.stores[0].0.address), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_shard_brings_the_newer_topology() {
    let cluster = Cluster::start(3, 1, 1);
    let map = cluster.map().await;
    let key = key_of(2, 3);
    map.put(&key, "1").await.unwrap();
    // The operator hears what the client acts on.
    let acts = async |version| {
        let mut told = cluster.world.told.subscribe();
        let heard = told.wait_for(|told: &Vec<_>| {
            told.iter().any(|r: &vasto_client::v1::WatchRequest| r.known.iter().any(|k| k.version == version))
        });
        tokio::time::timeout(Duration::from_secs(10), heard).await.unwrap().unwrap();
    };
    acts(1).await;
    // The stores know more than the operator has said.
    let newer = cluster.view(2, 3, 1);
    for store in 0..3 {
        *cluster.gauge(store).knows.lock().unwrap() = Some(newer.clone());
    }
    map.add("n", 1.0).await.unwrap();
    map.put(&key, "2").await.unwrap();
    assert_eq!(map.topology().topology.as_ref().unwrap().version, 2);
    let located = map.locate(&key).unwrap();
    assert_eq!((located.shard, located.shards, located.stores[0].replica), (2, 3, replica(2, 2)));
    let put = cluster.gauge(2).operations().pop().unwrap();
    // What the old shard gave is told to the new one.
    assert!(put.after.is_some());
    acts(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_shard_without_news_waits_for_the_operator() {
    let cluster = Cluster::start(2, 1, 1);
    let map = cluster.map().await;
    cluster.gauge(0).set(Mode::Refuse(FailureCode::WrongShard));
    let put = tokio::spawn({
        let map = map.clone();
        async move { map.put(key_of(1, 2), "1").await }
    });
    // It is refused before the news come.
    let (_, gauge) = &cluster.stores[0];
    gauge.streams.subscribe().wait_for(|n| *n == 1).await.unwrap();
    cluster.say(cluster.view(2, 2, 1));
    put.await.unwrap().unwrap();
    assert_eq!(cluster.gauge(1).operations().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_go_elsewhere_or_become_their_errors() {
    let cluster = Cluster::start(2, 1, 2);
    let map = cluster.map().await;
    for code in [FailureCode::NotReady, FailureCode::NoSpace] {
        cluster.gauge(0).set(Mode::Refuse(code));
        map.put("a", "1").await.unwrap();
        map.add("n", 1.0).await.unwrap();
    }
    cluster.gauge(1).set(Mode::Refuse(FailureCode::NoSpace));
    let error = map.put("a", "1").await.unwrap_err();
    assert_eq!(error.code(), Code::NoSpace, "{error}");
    for store in 0..2 {
        cluster.gauge(store).set(Mode::Refuse(FailureCode::ResourceExhausted));
    }
    let error = map.put_with("a", "1", short(200)).await.unwrap_err();
    assert_eq!(error.code(), Code::Overloaded, "{error}");
    for store in 0..2 {
        cluster.gauge(store).set(Mode::Refuse(FailureCode::Internal));
    }
    assert_eq!(map.add("n", 1.0).await.unwrap_err().code(), Code::Unknown);
    assert_eq!(map.get_with("n", short(200)).await.unwrap_err().code(), Code::Unavailable);
    cluster.gauge(0).set(Mode::Refuse(FailureCode::Invalid));
    assert_eq!(map.get("n").await.unwrap_err().code(), Code::Invalid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_operator_it_goes_on_with_what_it_knows() {
    let mut cluster = Cluster::start(2, 2, 1);
    let map = cluster.map().await;
    cluster.operator.kill().await;
    map.put("a", "1").await.unwrap();
    assert!(map.get("a").await.unwrap().is_some());
    assert!(cluster.client.keyspace("map").await.is_ok());
    let quick = cluster.client.clone().deadline(Duration::from_millis(300));
    let error = quick.keyspace("other").await.err().unwrap();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(error.to_string().contains(&cluster.operator.address), "{error}");
    // Back with news: the stream resumes by what the client has.
    cluster.say(cluster.view(2, 1, 1));
    let mut watch = map.watch();
    cluster.restart_operator();
    watch.wait_for(|update| update.topology.as_ref().unwrap().version == 2).await.unwrap();
    let told = cluster.world.told.borrow().clone();
    assert!(told.iter().any(|r| !r.keyspaces.is_empty() && r.known.iter().any(|k| k.uid == UID)), "{told:?}");
    map.put("a", "2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyspace_that_is_missing_or_goes_says_so() {
    let cluster = Cluster::start(1, 1, 1);
    let error = cluster.client.keyspace("nope").await.err().unwrap();
    assert_eq!(error, Error::Missing { keyspace: "nope".into() });
    let map = cluster.map().await;
    let mut going = cluster.view(2, 1, 1);
    if let Some(topology) = &mut going.topology {
        topology.set_phase(Phase::Deleting);
    }
    let mut watch = map.watch();
    cluster.say(going);
    watch.wait_for(|update| update.topology.as_ref().unwrap().version == 2).await.unwrap();
    assert_eq!(map.get("a").await.unwrap_err().code(), Code::Missing);
    cluster.world.said.send_replace(None);
    // Made again under the same name.
    assert_eq!(cluster.client.keyspace("other").await.err().unwrap().code(), Code::Missing);
    assert_eq!(map.batch([Op::get("a")]).await[0].as_ref().unwrap_err().code(), Code::Missing);
    let mut again = cluster.view(1, 1, 1);
    if let Some(topology) = &mut again.topology {
        topology.uid = "uid-2".into();
    }
    cluster.say(again);
    watch.wait_for(|update| update.topology.as_ref().unwrap().uid == "uid-2").await.unwrap();
    let map = cluster.map().await;
    map.put("a", "1").await.unwrap();
    assert_eq!(cluster.gauge(0).operations().pop().unwrap().keyspace, "uid-2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyspace_that_is_being_made_is_waited_for() {
    let cluster = Cluster::start(1, 0, 1);
    let map = cluster.map().await;
    let error = map.put_with("a", "1", short(100)).await.unwrap_err();
    assert!(error.to_string().contains("still being made"), "{error}");
    let put = tokio::spawn({
        let map = map.clone();
        async move { map.batch([Op::put("a", "1")]).await.remove(0) }
    });
    cluster.say(cluster.view(2, 1, 1));
    put.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_moved_is_found_by_its_new_address() {
    let cluster = Cluster::start(2, 1, 1);
    let map = cluster.map().await;
    map.put("a", "1").await.unwrap();
    let mut moved = cluster.view(1, 1, 1);
    let elsewhere = cluster.stores[1].0.address.clone();
    moved.addresses = vec![StoreAddress { store: "store-0".into(), address: elsewhere }];
    let mut watch = map.watch();
    cluster.say(moved);
    watch.changed().await.unwrap();
    // The store there is another one and refuses; what counts is that it was asked.
    let _ = map.put_with("a", "2", short(100)).await;
    assert!(!cluster.gauge(1).operations().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_handle_dropped_ends_the_connections() {
    let cluster = Cluster::start(1, 1, 1);
    let client = vasto_client::Client::connect(&cluster.operator.address).unwrap();
    let map = client.keyspace("map").await.unwrap();
    map.put("a", "1").await.unwrap();
    let mut streams = cluster.gauge(0).streams.subscribe();
    assert_eq!(*streams.borrow_and_update(), 1);
    drop(client);
    map.put("a", "1").await.unwrap();
    assert_eq!(*streams.borrow_and_update(), 1);
    drop(map);
    streams.wait_for(|n| *n == 0).await.unwrap();
}

async fn all(map: &vasto_client::Keyspace, options: ScanOptions) -> Vec<String> {
    let mut scan = map.scan(options);
    let mut keys = Vec::new();
    while let Some(entry) = scan.next().await {
        keys.push(key(&entry.unwrap()));
    }
    keys
}

fn key(entry: &Entry) -> String {
    String::from_utf8(entry.key.to_vec()).unwrap()
}

fn numbered(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| format!("{n:04}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_is_in_order_over_all_shards() {
    let cluster = Cluster::start(3, 5, 2);
    let map = cluster.map().await;
    map.batch(numbered(0..500).into_iter().map(|k| Op::put(k, "v"))).await;
    assert_eq!(all(&map, ScanOptions::new()).await, numbered(0..500));
    assert_eq!(all(&map, ScanOptions::new().prefix("01")).await, numbered(100..200));
    assert_eq!(all(&map, ScanOptions::new().after("0490")).await, numbered(491..500));
    assert_eq!(all(&map, ScanOptions::new().after("0100").limit(7)).await, numbered(101..108));
    assert_eq!(all(&map, ScanOptions::new().limit(0)).await, numbered(0..0));
    assert_eq!(all(&map, ScanOptions::new().prefix("x")).await, numbered(0..0));
    let scans = (0..3).flat_map(|s| cluster.gauge(s).scans.lock().unwrap().clone());
    assert!(scans.into_iter().any(|s| s.limit == 7 && s.after.as_deref() == Some(b"0100")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_goes_on_at_another_replica() {
    let cluster = Cluster::start(2, 2, 2);
    let map = cluster.map().await;
    map.batch(numbered(0..200).into_iter().map(|k| Op::put(k, "v"))).await;
    *cluster.gauge(0).scan_pause.lock().unwrap() = Some(20);
    cluster.gauge(0).scan_on.send_replace(true);
    assert_eq!(all(&map, ScanOptions::new()).await, numbered(0..200));
    let resumed = cluster.gauge(1).scans.lock().unwrap().clone();
    assert!(resumed.iter().any(|s| s.shard == 0 && s.after.is_some()), "{resumed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_outlives_a_change_of_shards() {
    for (from, to) in [(2, 5), (5, 2)] {
        let cluster = Cluster::start(3, from, 1);
        let map = cluster.map().await;
        map.batch(numbered(0..300).into_iter().map(|k| Op::put(k, "v"))).await;
        for store in 0..3 {
            *cluster.gauge(store).scan_pause.lock().unwrap() = Some(30);
        }
        let mut scan = map.scan(ScanOptions::new());
        let mut keys = Vec::new();
        for _ in 0..25 {
            keys.push(key(&scan.next().await.unwrap().unwrap()));
        }
        let mut watch = map.watch();
        cluster.say(cluster.view(2, to, 1));
        watch.wait_for(|update| update.topology.as_ref().unwrap().version == 2).await.unwrap();
        for store in 0..3 {
            *cluster.gauge(store).scan_pause.lock().unwrap() = None;
            cluster.gauge(store).scan_on.send_replace(true);
        }
        while let Some(entry) = scan.next().await {
            keys.push(key(&entry.unwrap()));
        }
        assert_eq!(keys, numbered(0..300));
        let scans: Vec<_> = (0..3).flat_map(|s| cluster.gauge(s).scans.lock().unwrap().clone()).collect();
        assert!(scans.iter().any(|s| s.shards == to as u32 && s.after.is_some()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_that_gets_nowhere_fails_in_time() {
    let mut cluster = Cluster::start(1, 1, 1);
    cluster.client = cluster.client.clone().deadline(Duration::from_millis(300));
    let map = cluster.map().await;
    cluster.stores[0].0.kill().await;
    let mut scan = map.scan(ScanOptions::new());
    assert_eq!(scan.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert!(scan.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_are_located_inspected_repaired_and_compacted() {
    let cluster = Cluster::start(3, 3, 2);
    let map = cluster.map().await;
    map.put("a", "1").await.unwrap();
    let located = map.locate("a").unwrap();
    assert_eq!(located.hash, partition_hash(b"a"));
    assert_eq!(located.stores.len(), 2);
    assert!(located.stores.iter().all(|s| s.serving && s.address.is_some()));
    let mut records = map.inspect(located.stores[1].replica, None).await.unwrap();
    assert_eq!(records.next().await.unwrap().unwrap().entries[0].hash, located.stores[1].replica);
    assert!(records.next().await.is_none());
    assert_eq!(map.inspect(99_999, None).await.err().unwrap().code(), Code::Invalid);
    let id = located.stores[1].replica;
    assert_eq!(map.content_hash(id, 0).await.unwrap().hash, id);
    let mut told = Vec::new();
    assert_eq!(map.repair(id, |totals| told.push(totals.ranges)).await.unwrap().ranges, 2);
    assert_eq!(told, [1, 2]);
    let mut done = map.compact().await.unwrap();
    done.sort_by(|a, b| a.store.cmp(&b.store));
    assert_eq!(done.len(), 3);
    assert_eq!((done[2].bytes_before, done[2].bytes_after), (100, 2));
}
