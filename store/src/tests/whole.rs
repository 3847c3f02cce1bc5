//! A whole store: what it takes in and leaves alone, which operator it reports to, when it
//! is ready, and how it leaves.

use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use vasto_client::env::Env;
use vasto_client::hash::partition_hash;
use vasto_client::v1::operator_server::{self, OperatorServer};
use vasto_client::v1::peer_server::Peer;
use vasto_client::v1::store_client::StoreClient;
use vasto_client::v1::store_server::Store;
use vasto_client::v1::{
    self, Answer, Assignment, Batch, Delete, Expire, FailureCode, FollowStart, Get, KeyspaceUpdate, Merge, Operation,
    Phase, Position, Put, ReplicaReport, Returning, ScanRequest, Shard, SnapshotRequest, StoreAddress, StoreReport,
    StoreUpdate, Topology, Value, View, WatchRequest, WatchResponse, answer, follow_response, operation, put,
    snapshot_response, value,
};

use super::context;
use crate::answer::Answerer;
use crate::dir::Dir;
use crate::engine::Engine;
use crate::host::Host;
use crate::metrics::Monitor;
use crate::replica::Context;
use crate::server::Server;
use crate::writer::PeerBatch;
use crate::{Options, follow, leave, serve};

const UID: &str = "5f9a";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn host(dir: &Path, only: Option<&str>) -> Arc<Host> {
    Host::open("store-0", only, "here:1".into(), Dir::open(dir, "store-0").unwrap(), context())
}

fn answerer(host: &Arc<Host>) -> Answerer {
    Answerer::new(host.clone(), Env::real(), Monitor::new().counts())
}

fn server(host: &Arc<Host>) -> Server {
    Server::new(host.clone(), Env::real(), answerer(host), Monitor::new().counts())
}

/// One shard, on the first of these stores and so on; 0: to be made.
fn view(replicas: &[u64]) -> Option<View> {
    let place =
        |(i, replica): (usize, &u64)| Assignment { store: format!("store-{i}"), replica: *replica, serving: true };
    Some(View { shards: vec![Shard { replicas: replicas.iter().enumerate().map(place).collect() }] })
}

fn prepare(uid: &str, version: u64, replicas: &[u64]) -> Topology {
    let (uid, name) = (uid.to_owned(), "shop/orders".to_owned());
    Topology { uid, name, version, phase: Phase::Prepare.into(), next: view(replicas), ..Topology::default() }
}

fn stable(uid: &str, version: u64, replicas: &[u64]) -> Topology {
    let (uid, name) = (uid.to_owned(), "shop/orders".to_owned());
    Topology { uid, name, version, current: view(replicas), ..Topology::default() }
}

fn update(topology: Topology) -> KeyspaceUpdate {
    KeyspaceUpdate { topology: Some(topology), addresses: Vec::new() }
}

/// The id of the replica that a store reports.
fn candidate(report: &StoreReport) -> Option<u64> {
    report.keyspaces.iter().flat_map(|k| &k.replicas).map(|r| r.id).next()
}

/// The same, once it is born.
fn born(report: &StoreReport) -> Option<u64> {
    report.keyspaces.iter().flat_map(|k| &k.replicas).find(|r| r.born).map(|r| r.id)
}

/// Makes the one replica of the keyspace here, and has it serve.
async fn make(host: &Arc<Host>) -> u64 {
    host.install(update(prepare(UID, 1, &[0]))).await;
    let id = candidate(&host.report()).expect("a candidate is made");
    host.install(update(prepare(UID, 2, &[id]))).await;
    let changed = host.changed();
    let made = async {
        while born(&host.report()).is_none() {
            changed.notified().await;
        }
    };
    tokio::time::timeout(PATIENCE, made).await.expect("a candidate of an empty shard is born");
    host.install(update(stable(UID, 3, &[id]))).await;
    id
}

fn operation(id: u64, key: &str, kind: operation::Kind) -> Operation {
    let key = Bytes::copy_from_slice(key.as_bytes());
    Operation { id, keyspace: UID.into(), shards: 1, key, kind: Some(kind), ..Operation::default() }
}

fn putting(id: u64, key: &str) -> Operation {
    let value = Some(put::Value::Bytes(Bytes::from_static(b"value")));
    operation(id, key, operation::Kind::Put(Put { value, ..Put::default() }))
}

fn getting(id: u64, key: &str) -> Operation {
    operation(id, key, operation::Kind::Get(Get {}))
}

fn batch(operations: impl IntoIterator<Item = Operation>) -> Vec<Operation> {
    operations.into_iter().collect()
}

fn refusal(answer: &Answer) -> Option<(FailureCode, &str)> {
    match &answer.result {
        Some(answer::Result::Failure(failure)) => Some((failure.code(), &failure.message)),
        _ => None,
    }
}

fn found(answer: &Answer) -> bool {
    matches!(answer.result, Some(answer::Result::Found(_)))
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_rest_while_clients_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let wall = Arc::new(AtomicU64::new(1_000_000));
    let now = wall.clone();
    let env = Env::new(move || now.load(Ordering::SeqCst), rand::random, |_| unreachable!("nobody is called"));
    let context = Context { env: env.clone(), ..context() };
    let host = Host::open("store-0", Some(UID), "here:1".into(), Dir::open(dir.path(), "store-0").unwrap(), context);
    make(&host).await;
    let keyspace = host.keyspace(UID).unwrap();
    let rests = || !keyspace.rest(1 << 20).is_zero();
    assert!(!rests());
    let answerer = Answerer::new(host.clone(), env.clone(), Monitor::new().counts());
    answerer.clone().answer(batch([getting(1, "key")])).await;
    assert!(rests(), "a client has asked");
    wall.fetch_add(1_000, Ordering::SeqCst);
    assert!(!rests(), "it has gone");
    let server = Server::new(host.clone(), env, answerer, Monitor::new().counts());
    let scan = ScanRequest { keyspace: UID.into(), shards: 1, ..ScanRequest::default() };
    let mut entries = Store::scan(&server, Request::new(scan)).await.unwrap().into_inner();
    assert!(entries.next().await.unwrap().unwrap().failure.is_none());
    assert!(rests(), "a scan is a client's, too");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_tells_what_was_there_or_is_and_a_head_leaves_out_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), Some(UID));
    make(&host).await;
    let server = answerer(&host);
    let ask = async |operation: Operation| {
        let answer = server.clone().answer(batch([operation])).await.pop().unwrap().result.unwrap();
        match answer {
            answer::Result::Written(written) => written.value.map(|value| *value),
            answer::Result::Found(value) => Some(value),
            answer::Result::Missing(_) => None,
            answer::Result::Failure(failure) => panic!("{failure:?}"),
        }
    };
    let bytes = |value: Option<Value>| match value.unwrap().value.unwrap() {
        value::Value::Bytes(bytes) => bytes,
        value::Value::Number(number) => number.to_string().into(),
    };
    let before = Returning::Before.into();
    let after = Returning::After.into();
    let adding = || operation(1, "n", operation::Kind::Merge(Merge { kind: 0, number: 2.0 }));
    assert_eq!(ask(Operation { returning: before, ..putting(1, "k") }).await, None);
    assert_eq!(bytes(ask(Operation { returning: before, ..putting(1, "k") }).await), "value");
    assert_eq!(ask(putting(1, "k")).await, None, "nothing was asked for");
    assert_eq!(bytes(ask(Operation { returning: after, ..adding() }).await), "2");
    assert_eq!(bytes(ask(Operation { returning: after, ..adding() }).await), "4");
    let head = ask(Operation { head: true, ..getting(1, "k") }).await.unwrap();
    assert_eq!((head.size, head.value), (Some(5), Some(value::Value::Bytes(Bytes::new()))));
    assert_eq!(ask(getting(1, "k")).await.unwrap().size, None);
    let expire = |ms| operation(1, "k", operation::Kind::Expire(Expire { expiry_ms: ms }));
    let far = Env::real().now_ms() + 60_000;
    assert_eq!(ask(Operation { returning: before, ..expire(far) }).await.unwrap().expiry_ms, 0);
    assert_eq!(ask(getting(1, "k")).await.unwrap().expiry_ms, far);
    let deleting = operation(1, "k", operation::Kind::Delete(Delete::default()));
    let gone = ask(Operation { returning: before, head: true, ..deleting.clone() }).await.unwrap();
    assert_eq!((gone.size, gone.expiry_ms), (Some(5), far));
    assert_eq!(ask(Operation { returning: before, ..deleting }).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_knows_only_an_older_topology_than_who_asks_is_not_ready() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), Some(UID));
    let id = make(&host).await;
    let follower = 99;
    host.install(update(stable(UID, 4, &[id, follower]))).await;
    let server = server(&host);
    let said = async |version| {
        let keyspace = UID.to_owned();
        let ask = SnapshotRequest { keyspace, source: id, target: follower, version, ..SnapshotRequest::default() };
        let snapshot = server.snapshot(Request::new(ask)).await.unwrap().into_inner().next().await.unwrap().unwrap();
        let (keyspace, replica) = (host.keyspace(UID).unwrap(), host.keyspace(UID).unwrap().replica(id).unwrap());
        let start =
            FollowStart { follower, version, epoch: replica.progress.birth().epoch, seq: 1, ..FollowStart::default() };
        let (out, mut heard) = mpsc::channel(4);
        let sending = tokio::spawn(async move { follow::send(&keyspace, &replica, &start, &out).await });
        let follow = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap().unwrap();
        sending.abort();
        (snapshot.message.unwrap(), follow.message.unwrap())
    };
    let (snapshot, follow) = said(4).await;
    assert!(matches!(snapshot, snapshot_response::Message::Start(_)), "{snapshot:?}");
    assert!(matches!(follow, follow_response::Message::Batch(_)), "{follow:?}");
    let (snapshot, follow) = said(5).await;
    assert!(matches!(snapshot, snapshot_response::Message::NotReady(_)), "{snapshot:?}");
    assert!(matches!(follow, follow_response::Message::NotReady(_)), "{follow:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_passes_on_no_position_that_does_not_hold_for_the_target() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), Some(UID));
    let id = make(&host).await;
    let (sibling, target) = (98, 99);
    host.install(update(stable(UID, 4, &[id, sibling]))).await;
    let position = Position { replica: sibling, epoch: 5, seq: 6 };
    // The target may have been here before, as a sibling.
    let at_the_target = Position { replica: target, epoch: 7, seq: 8 };
    let batch = PeerBatch { positions: vec![position, at_the_target], ..PeerBatch::default() };
    host.keyspace(UID).unwrap().replica(id).unwrap().apply(batch).await.unwrap();

    // One shard becomes two, or gets a copy more.
    let (one, two) = (view(&[id, sibling]), [&[id][..], &[target]].map(|ids| view(ids).unwrap().shards).concat());
    let (two, three) = (Some(View { shards: two }), view(&[id, sibling, target]));
    let said = async |version, phase: Phase, current: &Option<View>, next: &Option<View>, previous: &Option<View>| {
        let (current, next, previous) = (current.clone(), next.clone(), previous.clone());
        let topology = Topology { phase: phase.into(), current, next, previous, ..stable(UID, version, &[]) };
        host.install(update(topology)).await;
        let (keyspace, files_welcome) = (UID.to_owned(), true);
        let ask =
            SnapshotRequest { keyspace, source: id, target, version, files_welcome, ..SnapshotRequest::default() };
        let said = server(&host).snapshot(Request::new(ask)).await.unwrap().into_inner().next().await.unwrap().unwrap();
        match said.message {
            Some(snapshot_response::Message::Start(start)) => (start.files, start.positions),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(said(5, Phase::Prepare, &one, &three, &None).await, (true, vec![position]));
    assert_eq!(said(6, Phase::Prepare, &one, &two, &None).await, (false, vec![position]));
    // What the sibling takes from here on for the target, this replica no longer wants, and passes.
    assert_eq!(said(7, Phase::Switch, &two, &None, &one).await, (false, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replicas_stamps_are_past_those_of_the_others_on_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), Some(UID));
    let both = |ids: [u64; 2]| {
        let shards = ids.iter().flat_map(|id| view(&[*id]).unwrap().shards).collect();
        Some(View { shards })
    };
    let reported = || -> Vec<ReplicaReport> {
        let mut replicas: Vec<_> = host.report().keyspaces.into_iter().flat_map(|k| k.replicas).collect();
        replicas.sort_by_key(|r| r.shard);
        replicas
    };
    host.install(update(Topology { next: both([0, 0]), ..prepare(UID, 1, &[]) })).await;
    let made = reported();
    let ids = [made[0].id, made[1].id];
    host.install(update(Topology { next: both(ids), ..prepare(UID, 2, &[]) })).await;
    let changed = host.changed();
    let born = async {
        while reported().iter().any(|r| !r.born) {
            changed.notified().await;
        }
    };
    tokio::time::timeout(PATIENCE, born).await.expect("candidates of empty shards are born");
    host.install(update(Topology { current: both(ids), ..stable(UID, 3, &[]) })).await;

    let server = answerer(&host);
    let stamp = |answer: &Answer| match &answer.result {
        Some(answer::Result::Written(written)) => written.stamp.unwrap().time,
        other => panic!("{other:?}"),
    };
    let shard = |key: &str| vasto_client::hash::jump_hash(partition_hash(key.as_bytes()), 2);
    let of = |wanted: u32| (0..).map(|i| format!("key-{i}")).find(|key| shard(key) == wanted).unwrap();
    // One's clock is ahead, as after a write of a caller that was elsewhere before.
    let ahead = v1::Stamp { time: crate::record::time_of(Env::real().now_ms() + 5_000), origin: 3 };
    let pulled = Operation { after: Some(ahead), ..putting(1, &of(0)) };
    let before = stamp(&server.clone().answer(batch([pulled])).await[0]);
    assert!(before > ahead.time);
    // The caller knows only of one shard yet, and takes the same replica for this key's: it need not tell its stamps.
    let after = stamp(&server.clone().answer(batch([putting(2, &of(1))])).await[0]);
    assert!(after > before, "{after} after {before}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_copied_of_what_a_failed_sync_may_have_lost() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), Some(UID));
    let id = make(&host).await;
    host.install(update(stable(UID, 4, &[id, 99]))).await;
    host.keyspace(UID).unwrap().replica(id).unwrap().progress.poison("the disk can't write".into());
    let ask =
        SnapshotRequest { keyspace: UID.into(), source: id, target: 99, version: 4, ..SnapshotRequest::default() };
    let said = server(&host).snapshot(Request::new(ask)).await.unwrap().into_inner().next().await.unwrap().unwrap();
    match said.message {
        Some(snapshot_response::Message::NotReady(why)) => assert!(why.contains("the disk can't write"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_a_former_life_is_neither_served_nor_deleted_nor_built_on() {
    let dir = tempfile::tempdir().unwrap();
    let keyspaces = dir.path().join("keyspaces");
    let marker = keyspaces.join("former/replicas/x/marker");
    std::fs::create_dir_all(marker.parent().unwrap()).unwrap();
    std::fs::write(&marker, "data").unwrap();
    std::fs::create_dir_all(keyspaces.join("older.retained")).unwrap();

    let with = host(dir.path(), Some(UID));
    with.set_connected(true);
    with.install(update(prepare(UID, 1, &[0]))).await;
    let report = with.report();
    assert_eq!((report.only.as_str(), report.foreign.as_slice()), (UID, &["former".to_owned()][..]));
    assert_eq!(report.keyspaces, []);
    assert!(!keyspaces.join(UID).exists(), "nothing is made beside it");
    assert!(marker.exists());
    let why = with.ready().unwrap_err();
    assert!(why.contains("former") && why.contains(UID), "{why}");
    with.stop().await;
    drop(with);

    // A person has looked, and moved it away.
    std::fs::remove_dir_all(keyspaces.join("former")).unwrap();
    let without = host(dir.path(), Some(UID));
    make(&without).await;
    assert_eq!(without.ready(), Ok(()));
    assert_eq!(without.report().foreign, [""; 0], "what is retained is not foreign");
    without.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_own_data_beside_anothers_is_reported_as_it_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let before = host(dir.path(), Some(UID));
    let id = make(&before).await;
    before.stop().await;
    drop(before);
    std::fs::create_dir_all(dir.path().join("keyspaces/other")).unwrap();

    let host = host(dir.path(), Some(UID));
    host.resume().await;
    host.install(update(stable(UID, 4, &[id]))).await;
    let report = host.report();
    assert_eq!((born(&report), report.keyspaces[0].version), (Some(id), 3), "nobody takes the store for empty");
    assert!(host.ready().unwrap_err().contains("other"));
    let keyspace = host.keyspace(UID).unwrap();
    // As a peer that it follows brings one.
    keyspace.install(update(stable(UID, 4, &[id]))).await;
    assert_eq!(keyspace.version(), 3);
    keyspace.confirm(9);
    assert!(!keyspace.is_confirmed(), "it may not know what is current");
    host.stop().await;
}

#[tokio::test]
async fn what_the_operator_said_last_of_an_address_holds() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), None);
    let of = |stores: &[(&str, &str)]| KeyspaceUpdate {
        topology: Some(prepare(UID, 1, &[0, 0])),
        addresses: stores
            .iter()
            .map(|(store, address)| StoreAddress { store: (*store).into(), address: (*address).into() })
            .collect(),
    };
    // Two come at once, and nobody says whose task runs first.
    let first = host.hear(of(&[("store-0", "a:1")])).unwrap();
    let second = host.hear(of(&[("store-0", "a:1"), ("store-1", "b:1")])).unwrap();
    host.obey(&second).await;
    host.obey(&first).await;
    assert_eq!(second.address("store-1").as_deref(), Some("b:1"));
    // A peer may not have heard yet where a store is now.
    second.install(of(&[("store-1", "old:1"), ("store-2", "c:1")])).await;
    let known = ["store-0", "store-1", "store-2"].map(|store| second.address(store).unwrap_or_default());
    assert_eq!(known, ["a:1", "b:1", "c:1"]);
    host.install(of(&[("store-1", "new:1")])).await;
    assert_eq!(second.address("store-1").as_deref(), Some("new:1"));
    host.stop().await;
}

/// A shrink names who stays and gains keys only once a majority of stores knows of it.
#[tokio::test]
async fn no_candidate_is_made_where_a_replica_of_the_shard_stands() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), None);
    let id = make(&host).await;
    let shrink = Topology { next: view(&[0, 0]), phase: Phase::Prepare.into(), ..stable(UID, 4, &[id]) };
    host.install(update(shrink)).await;
    let ids: Vec<u64> = host.report().keyspaces.iter().flat_map(|k| &k.replicas).map(|r| r.id).collect();
    assert_eq!(ids, [id]);
    host.stop().await;
}

/// Its writers would go by the one, and whoever asks it by the other; and the operator, who makes a greater version of
/// the one that holds, would not learn that there are two.
#[tokio::test]
async fn another_topology_under_the_same_version_is_not_taken_in() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), None);
    let of = |spec: &str, address: &str| KeyspaceUpdate {
        topology: Some(Topology { spec: spec.into(), ..prepare(UID, 1, &[0]) }),
        addresses: vec![StoreAddress { store: "store-0".into(), address: address.into() }],
    };
    host.install(of("one", "a:1")).await;
    host.install(of("another", "b:1")).await;
    let keyspace = host.keyspace(UID).unwrap();
    let known = || (keyspace.topology().spec.clone(), keyspace.address("store-0").unwrap_or_default());
    assert_eq!(known(), ("one".into(), "a:1".into()));
    host.install(of("one", "c:1")).await;
    assert_eq!(known(), ("one".into(), "c:1".into()));
    host.stop().await;
    drop(keyspace);
    drop(host);

    let host = self::host(dir.path(), None);
    host.install(of("another", "c:1")).await;
    assert!(!host.keyspace(UID).unwrap().is_confirmed(), "nobody has said which of the two holds");
    host.install(of("one", "c:1")).await;
    assert!(host.keyspace(UID).unwrap().is_confirmed());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_anothers_data_no_candidate_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let before = host(dir.path(), Some(UID));
    before.install(update(prepare(UID, 1, &[0]))).await;
    let id = candidate(&before.report());
    before.stop().await;
    drop(before);
    std::fs::create_dir_all(dir.path().join("keyspaces/other")).unwrap();
    let host = host(dir.path(), Some(UID));
    host.resume().await;
    let report = host.report();
    assert_eq!((report.keyspaces[0].replicas.len(), candidate(&report)), (1, id));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topology_of_another_keyspace_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), Some(UID));
    host.install(update(prepare("other", 1, &[0]))).await;
    assert!(host.keyspace("other").is_none());
    assert!(!dir.path().join("keyspaces/other").exists());
    assert_eq!(host.report().keyspaces, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let disk = host(dir.path(), None).report().disk.unwrap();
    assert!(disk.size_bytes > 0 && disk.free_bytes <= disk.size_bytes, "{disk:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_ready_when_it_serves_what_it_is_assigned() {
    let dir = tempfile::tempdir().unwrap();
    let empty = host(dir.path(), None);
    assert!(empty.ready().unwrap_err().contains("has not reached an operator"));
    empty.set_connected(true);
    empty.set_connected(false);
    assert_eq!(empty.ready(), Ok(()), "it is assigned nothing");
    // What it shall have in the next view, it has not been assigned.
    empty.install(update(prepare(UID, 1, &[0]))).await;
    assert_eq!(empty.ready(), Ok(()));
    let id = make(&empty).await;
    assert_eq!(empty.ready(), Ok(()));
    empty.install(update(stable(UID, 4, &[id ^ 1]))).await;
    assert!(empty.ready().unwrap_err().contains("is not here"));
    empty.install(update(stable(UID, 5, &[id]))).await;
    assert_eq!(empty.ready(), Ok(()));
    empty.stop().await;
    drop(empty);

    let again = host(dir.path(), None);
    again.resume().await;
    let why = again.ready().unwrap_err();
    assert!(why.contains("shop/orders") && why.contains("topology version 5"), "{why}");
    let answers = answerer(&again).answer(batch([putting(1, "key")])).await;
    let waits =
        |(code, words): (FailureCode, &str)| code == FailureCode::NotReady && words.contains("current topology");
    assert!(refusal(&answers[0]).is_some_and(waits), "what it knew may be long past: {answers:?}");
    again.install(update(stable(UID, 5, &[id]))).await;
    assert_eq!(again.ready(), Ok(()));
    again.keyspace(UID).unwrap().replica(id).unwrap().progress.poison("a sync failed".into());
    assert!(again.ready().unwrap_err().contains("a sync failed"));
    again.leave();
    assert!(again.ready().unwrap_err().contains("stopping"));
    // At once, whatever the writer is at.
    let answers = answerer(&again).answer(batch([putting(1, "key")])).await;
    assert!(
        refusal(&answers[0]).is_some_and(|(code, words)| code == FailureCode::NotReady && words.contains("stopping"))
    );
    again.stop().await;
    drop(again);

    std::fs::remove_dir_all(dir.path().join("keyspaces").join(UID).join(format!("replicas/{id:016x}/db"))).unwrap();
    let broken = host(dir.path(), None);
    assert!(broken.ready().unwrap_err().contains("gone or empty"));
    broken.stop().await;
    drop(broken);

    std::fs::write(dir.path().join("keyspaces").join(UID).join("topology.pb"), "torn").unwrap();
    let why = host(dir.path(), None).ready().unwrap_err();
    assert!(why.contains("can't be opened") && why.contains(UID), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaving_store_refuses_writes_answers_reads_and_waits_for_its_followers() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), None);
    let id = make(&host).await;
    let server = answerer(&host);
    assert_eq!(refusal(&server.clone().answer(batch([putting(1, "key")])).await[0]), None);
    let replica = host.keyspace(UID).unwrap().replica(id).unwrap();
    let (slow, gone) = (replica.progress.connected(7), replica.progress.connected(8));
    let connected_twice = replica.progress.connected(7);

    let leaving = host.clone();
    let mut handing_over = tokio::spawn(async move { leave::hand_over(&leaving).await });
    // The writer itself refuses, so that nothing that was on its way slips in behind.
    let refused = async {
        while refusal(&server.clone().answer(batch([putting(2, "late")])).await[0]).is_none() {}
        loop {
            let change = super::set("late", crate::record::Content::Nothing);
            if let Err(refused) = super::one(&replica, change).await {
                return refused;
            }
        }
    };
    let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap();
    assert!(host.ready().unwrap_err().contains("stopping"));
    assert_eq!(refused.code, FailureCode::NotReady);
    assert!(refused.message.contains("stopping"), "{refused:?}");
    let answers = server.clone().answer(batch([putting(3, "late"), getting(4, "key")])).await;
    let put = answers.iter().find(|a| a.id == 3).unwrap();
    assert_eq!(
        refusal(put).map(|(code, words)| (code, words.contains("stopping"))),
        Some((FailureCode::NotReady, true))
    );
    assert!(found(answers.iter().find(|a| a.id == 4).unwrap()));

    let last = replica.progress.last_seq();
    drop(gone);
    replica.progress.confirm(7, last - 1);
    assert_eq!(replica.progress.behind(last), [7]);
    // One of its streams: it has connected again.
    drop(connected_twice);
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut handing_over).await.is_err(), "it waits");
    replica.progress.confirm(7, last);
    tokio::time::timeout(PATIENCE, handing_over).await.unwrap().unwrap();
    drop(slow);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_nobody_follows_leaves_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), None);
    make(&host).await;
    answerer(&host).answer(batch((0..100).map(|i| putting(i, &format!("key-{i}"))))).await;
    let begin = Instant::now();
    leave::hand_over(&host).await;
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    host.stop().await;
}

/// An operator that says what the test says, and keeps what stores report.
#[derive(Clone)]
struct Operator {
    leader: Arc<Mutex<Option<String>>>,
    calls: watch::Sender<u32>,
    reports: mpsc::UnboundedSender<StoreReport>,
    says: watch::Sender<StoreUpdate>,
    stop: CancellationToken,
}

impl Operator {
    async fn start(leader: Option<String>) -> (Self, String, mpsc::UnboundedReceiver<StoreReport>) {
        let (reports, reported) = mpsc::unbounded_channel();
        let (calls, says, stop) = (watch::Sender::default(), watch::Sender::default(), CancellationToken::new());
        let operator = Self { leader: Arc::new(Mutex::new(leader)), calls, reports, says, stop };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = tonic::transport::Server::builder()
            .add_service(OperatorServer::new(operator.clone()))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), operator.stop.clone().cancelled_owned());
        tokio::spawn(serving);
        (operator, address, reported)
    }

    fn says(&self, topology: Topology, addresses: &[String]) {
        let address =
            |(i, address): (usize, &String)| StoreAddress { store: format!("store-{i}"), address: address.clone() };
        let addresses = addresses.iter().enumerate().map(address).collect();
        self.says.send_replace(StoreUpdate { keyspaces: vec![KeyspaceUpdate { topology: Some(topology), addresses }] });
    }

    async fn called(&self, times: u32) {
        let mut calls = self.calls.subscribe();
        tokio::time::timeout(PATIENCE, calls.wait_for(|n| *n >= times)).await.expect("it is called").unwrap();
    }
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl operator_server::Operator for Operator {
    type WatchStream = Out<WatchResponse>;

    async fn watch(&self, _: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("nobody watches here"))
    }

    type ReportStream = Out<StoreUpdate>;

    async fn report(&self, request: Request<Streaming<StoreReport>>) -> Result<Response<Self::ReportStream>, Status> {
        self.calls.send_modify(|n| *n += 1);
        if let Some(leader) = self.leader.lock().unwrap().clone() {
            let mut status = Status::unavailable("not the leader");
            status.metadata_mut().insert("vasto-leader", leader.parse().unwrap());
            return Err(status);
        }
        let (reports, mut incoming) = (self.reports.clone(), request.into_inner());
        let (ended, end) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(async move {
            while let Some(Ok(report)) = incoming.next().await {
                let _ = reports.send(report);
            }
            drop(ended);
        });
        let stop = self.stop.clone();
        let over = async move {
            tokio::select! {
                _ = end => {}
                () = stop.cancelled() => {}
            }
        };
        let updates = WatchStream::new(self.says.subscribe()).map(Ok).take_until(over);
        Ok(Response::new(Box::pin(updates)))
    }
}

/// The next report that is as wanted.
async fn until<T>(
    reported: &mut mpsc::UnboundedReceiver<StoreReport>,
    wanted: impl Fn(&StoreReport) -> Option<T>,
) -> T {
    let next = async {
        loop {
            let report = reported.recv().await.expect("the operator lives");
            if let Some(found) = wanted(&report) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("such a report")
}

struct Running {
    dir: tempfile::TempDir,
    address: String,
    monitor: Monitor,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), crate::Error>>,
}

impl Running {
    async fn start(name: &str, operator: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::new(name, dir.path(), operator);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (monitor, stop) = (options.monitor.clone(), CancellationToken::new());
        assert!(monitor.ready().unwrap_err().contains("starting"));
        let task = tokio::spawn(serve(options, Env::real(), listener, stop.clone()));
        Self { dir, address, monitor, stop, task }
    }

    async fn answers(&self, operations: impl IntoIterator<Item = Operation>) -> Vec<Answer> {
        let batch = Batch { operations: batch(operations), answers: Vec::new() };
        let count = batch.operations.len();
        let mut client = StoreClient::new(Env::real().dial(&self.address).unwrap());
        // Endless, as a client's own: the store ends with it.
        let requests = futures::stream::iter([batch]).chain(futures::stream::pending());
        let mut stream = client.pipe(requests).await.unwrap().into_inner();
        let mut answers = Vec::new();
        while answers.len() < count {
            answers.extend(stream.next().await.unwrap().unwrap().answers);
        }
        answers
    }

    async fn stopped(self) -> tempfile::TempDir {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
        self.dir
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_reports_to_the_leader_and_comes_back_when_that_is_gone() {
    let (leader, leads_at, mut reported) = Operator::start(None).await;
    let (other, address, mut later) = Operator::start(Some(leads_at)).await;
    let store = Running::start("store-0", &address).await;
    // The second says that the first was taken.
    for _ in 0..2 {
        until(&mut reported, |r| (r.store == "store-0").then_some(())).await;
    }
    assert_eq!(*other.calls.borrow(), 1);
    assert_eq!(store.monitor.ready(), Ok(()), "it has reported, and is assigned nothing");
    assert!(store.monitor.encode().contains("vasto_store_operator_connected 1\n"));

    leader.stop.cancel();
    other.called(2).await;
    // It still sends to the dead one; then it leads itself.
    other.called(3).await;
    *other.leader.lock().unwrap() = None;
    until(&mut later, |r| (r.store == "store-0").then_some(())).await;
    store.stopped().await;
    until(&mut later, |r| r.stopping.then_some(())).await;
}

/// What both stores say, as wanted.
async fn both(
    reported: &mut mpsc::UnboundedReceiver<StoreReport>,
    wanted: impl Fn(&StoreReport) -> Option<u64>,
) -> [u64; 2] {
    let mut said = [0; 2];
    while said.contains(&0) {
        let (store, id) = until(reported, |r| Some((r.store.clone(), wanted(r)?))).await;
        said[usize::from(store == "store-1")] = id;
    }
    said
}

/// Two stores with a replica each of the one shard, which follow one another.
async fn two() -> (Operator, mpsc::UnboundedReceiver<StoreReport>, [Running; 2], [u64; 2]) {
    let (operator, address, mut reported) = Operator::start(None).await;
    let stores = [Running::start("store-0", &address).await, Running::start("store-1", &address).await];
    let addresses = [stores[0].address.clone(), stores[1].address.clone()];
    operator.says(prepare(UID, 1, &[0, 0]), &addresses);
    let ids = both(&mut reported, candidate).await;
    operator.says(prepare(UID, 2, &ids), &addresses);
    both(&mut reported, born).await;
    operator.says(stable(UID, 3, &ids), &addresses);
    for store in ["store-0", "store-1"] {
        // Each follows the other, from where that began.
        let follows = |r: &StoreReport| {
            let sources = &r.keyspaces.first()?.replicas.first()?.sources;
            (r.store == store && sources.first()?.lag == 0 && sources.first()?.confirmed > 0).then_some(())
        };
        until(&mut reported, follows).await;
    }
    (operator, reported, stores, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_leaves_when_its_followers_have_all_that_it_took() {
    let (_operator, mut reported, [first, second], ids) = two().await;
    let keys: Vec<String> = (0..20_000).map(|i| format!("key-{i}")).collect();
    for part in keys.chunks(4_000) {
        let answers = first.answers(part.iter().zip(1..).map(|(key, id)| putting(id, key))).await;
        assert_eq!(answers.iter().find_map(refusal), None);
    }
    let text = first.monitor.encode();
    assert!(text.contains("vasto_store_operations_total{operation=\"put\",result=\"ok\"} 20000\n"), "{text}");
    let begin = Instant::now();
    first.stopped().await;
    assert!(begin.elapsed() < Duration::from_secs(4), "the whole bound has passed: {:?}", begin.elapsed());
    let last =
        until(&mut reported, |r| (r.stopping && r.store == "store-0").then(|| r.keyspaces[0].replicas[0].last_seq));
    let last = last.await;
    let synced = |r: &StoreReport| {
        let replica = r.keyspaces.first()?.replicas.iter().find(|r| r.id == ids[1])?;
        Some(replica.sources.iter().find(|s| s.replica == ids[0])?.confirmed)
    };
    let confirmed = until(&mut reported, |r| if r.store == "store-1" { synced(r) } else { None }).await;
    assert!(confirmed >= last, "confirmed {confirmed} of {last}");
    for part in keys.chunks(4_000) {
        let answers = second.answers(part.iter().zip(1..).map(|(key, id)| getting(id, key))).await;
        assert!(answers.iter().all(found));
    }
    second.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_that_leave_together_do_not_wait_for_one_another_for_long() {
    let (_operator, _reported, [first, second], _) = two().await;
    let (one, two) = tokio::join!(
        first.answers((0..1_000).map(|i| putting(i, &format!("a-{i}")))),
        second.answers((0..1_000).map(|i| putting(i, &format!("b-{i}")))),
    );
    assert_eq!(one.iter().chain(&two).find_map(refusal), None);
    let begin = Instant::now();
    tokio::join!(first.stopped(), second.stopped());
    assert!(begin.elapsed() < Duration::from_secs(4), "the whole bound has passed: {:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_has_stopped_has_closed_its_files_whoever_is_connected() {
    let (_operator, _reported, [first, second], [id, _]) = two().await;
    let mut client = StoreClient::new(Env::real().dial(&first.address).unwrap());
    let mut stream = client.pipe(futures::stream::pending::<Batch>()).await.unwrap().into_inner();
    let dir = first.stopped().await;
    // One process opens a database once.
    let db = dir.path().join("keyspaces").join(UID).join(format!("replicas/{id:016x}/db"));
    assert!(Engine::open(&db, &*context().storage).is_ok());
    let cut = tokio::time::timeout(PATIENCE, stream.next()).await.expect("the client hears of it");
    assert!(cut.is_none_or(|answer| answer.is_err()));
    second.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_stores_metrics_are_well_formed() {
    let (_operator, _reported, [first, second], _) = two().await;
    second.answers([putting(1, "key")]).await;
    let text = second.monitor.encode();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let series: Vec<&str> =
        text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.rsplit_once(' ')).map(|(s, _)| s).collect();
    let mut once = series.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), series.len(), "{text}");
    let shard = r#"{keyspace="shop/orders",shard="0"}"#;
    for wanted in [
        r#"vasto_store_replica_lag_records{keyspace="shop/orders",shard="0",source="store-0"}"#.to_owned(),
        format!("vasto_store_replica_records{shard}"),
        format!("vasto_store_replica_bytes{shard}"),
        "vasto_store_replica_faults".to_owned(),
        format!("vasto_store_compared_timestamp_seconds{shard}"),
        "vasto_store_ranges_compared_total".to_owned(),
        "vasto_store_ranges_divergent_total".to_owned(),
        "vasto_store_records_repaired_total".to_owned(),
        "vasto_store_quarantines_total".to_owned(),
        "vasto_store_disk_free_bytes".to_owned(),
        "vasto_store_disk_size_bytes".to_owned(),
        "vasto_store_disk_full".to_owned(),
        r#"vasto_store_topology_version{keyspace="shop/orders"}"#.to_owned(),
        "vasto_store_operator_connected".to_owned(),
        r#"vasto_store_batch_duration_seconds_count{kind="write"}"#.to_owned(),
        "vasto_store_row_cache_usage_bytes".to_owned(),
        "vasto_store_row_cache_hits_total".to_owned(),
        "vasto_store_row_cache_misses_total".to_owned(),
        "vasto_rocksdb_block_cache_usage_bytes".to_owned(),
        "vasto_rocksdb_block_cache_pinned_bytes".to_owned(),
        format!("vasto_rocksdb_memtable_bytes{shard}"),
        format!("vasto_rocksdb_estimated_pending_compaction_bytes{shard}"),
        format!("vasto_rocksdb_running_compactions{shard}"),
        format!("vasto_rocksdb_running_flushes{shard}"),
        format!("vasto_rocksdb_sst_bytes{shard}"),
        format!("vasto_rocksdb_l0_files{shard}"),
    ] {
        assert!(series.contains(&wanted.as_str()), "{wanted} is missing\n{text}");
    }
    first.stopped().await;
    second.stopped().await;
}
