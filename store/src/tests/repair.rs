//! Two replicas of a shard, each on a store with a real wire: what one has lost or altered under the
//! engine comes back; what may be collected, is another shard's or is on its way is no difference;
//! and a damaged one is closed once another copy serves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use vasto_client::env::Env;
use vasto_client::hash::partition_hash;
use vasto_client::v1::peer_server::PeerServer;
use vasto_client::v1::store_server::StoreServer;
use vasto_client::v1::{
    Assignment, HashRequest, KeyspaceUpdate, Phase, RepairRequest, RepairResponse, ReplicaReport, Shard, StoreAddress,
    Topology, View, store_server::Store,
};

use super::{context, kind, one, put, record, set};
use crate::answer::Answerer;
use crate::dir::Dir;
use crate::engine::Batch;
use crate::host::Host;
use crate::metrics::Monitor;
use crate::record::{Base, Content, Kind, Record, Stamp};
use crate::repair;
use crate::replica::Replica;
use crate::server::Server;
use crate::writer::PeerBatch;

const UID: &str = "77aa";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two stores with a replica each of the one shard.
struct Pair {
    hosts: [Arc<Host>; 2],
    servers: [Server; 2],
    ids: [u64; 2],
    addresses: Vec<StoreAddress>,
    _dirs: [tempfile::TempDir; 2],
}

impl Pair {
    async fn new() -> Self {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (mut hosts, mut servers, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
        for (i, dir) in dirs.iter().enumerate() {
            let name = format!("store-{i}");
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let host = Host::open(&name, None, address.clone(), Dir::open(dir.path(), &name).unwrap(), context());
            let counts = Monitor::new().counts();
            let answerer = Answerer::new(host.clone(), Env::real(), counts.clone());
            let server = Server::new(host.clone(), Env::real(), answerer, counts);
            let serving = tonic::transport::Server::builder()
                .add_service(PeerServer::new(server.clone()))
                .add_service(StoreServer::new(server.clone()))
                .serve_with_incoming(TcpListenerStream::new(listener));
            tokio::spawn(serving);
            addresses.push(StoreAddress { store: name, address });
            hosts.push(host);
            servers.push(server);
        }
        let hosts: [Arc<Host>; 2] = hosts.try_into().ok().unwrap();
        let servers: [Server; 2] = servers.try_into().ok().unwrap();
        let mut pair = Self { hosts, servers, ids: [0; 2], addresses, _dirs: dirs };
        pair.install(1, Phase::Prepare, None, Some(pair.view())).await;
        pair.ids = [0, 1].map(|i| pair.report(i).id);
        pair.install(2, Phase::Prepare, None, Some(pair.view())).await;
        pair.until("both are born", |pair| (0..2).all(|i| pair.report(i).born)).await;
        pair.install(3, Phase::Stable, Some(pair.view()), None).await;
        pair.until("each follows the other", |pair| {
            (0..2).all(|i| pair.report(i).sources.first().is_some_and(|s| s.lag == 0 && s.confirmed > 0))
        })
        .await;
        pair
    }

    fn view(&self) -> View {
        let place = |i: usize| Assignment { store: format!("store-{i}"), replica: self.ids[i], serving: true };
        View { shards: vec![Shard { replicas: vec![place(0), place(1)] }] }
    }

    async fn install(&self, version: u64, phase: Phase, current: Option<View>, next: Option<View>) {
        let topology = Topology { uid: UID.into(), version, phase: phase.into(), current, next, ..Topology::default() };
        for host in &self.hosts {
            let (topology, addresses) = (Some(topology.clone()), self.addresses.clone());
            host.install(KeyspaceUpdate { topology, addresses }).await;
        }
    }

    fn report(&self, store: usize) -> ReplicaReport {
        self.hosts[store].report().keyspaces.into_iter().flat_map(|k| k.replicas).next().unwrap()
    }

    fn replica(&self, store: usize) -> Arc<Replica> {
        self.hosts[store].keyspace(UID).unwrap().replica(self.ids[store]).unwrap()
    }

    async fn until(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !wanted(self) {
            assert!(begin.elapsed() < PATIENCE, "{what}: {:?} {:?}", self.report(0), self.report(1));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Until each has all that the other has changed.
    async fn level(&self) {
        let has_all =
            |a: &Replica, b: &Replica| a.progress.position(b.id).is_some_and(|p| p.seq >= b.progress.last_seq());
        let (a, b) = (self.replica(0), self.replica(1));
        self.until("both have the same", |_| has_all(&a, &b) && has_all(&b, &a)).await;
    }

    async fn round(&self, store: usize) -> RepairResponse {
        let keyspace = self.hosts[store].keyspace(UID).unwrap();
        repair::round(&keyspace, &self.replica(store), u64::MAX, |_| ()).await
    }

    /// Ranges that differ and records mended, of a round on each; nothing may have been left out.
    async fn rounds(&self) -> [(u64, u64); 2] {
        let mut done = [(0, 0); 2];
        for (store, done) in done.iter_mut().enumerate() {
            let round = self.round(store).await;
            assert_eq!(round.troubles, [""; 0]);
            assert!(round.ranges > 0);
            *done = (round.divergent, round.records);
        }
        done
    }

    async fn hashes(&self) -> [(u64, u64); 2] {
        let now_ms = Env::real().now_ms();
        let mut hashes = [(0, 0); 2];
        for (store, hash) in hashes.iter_mut().enumerate() {
            let request = HashRequest { keyspace: UID.into(), replica: self.ids[store], now_ms };
            let found = self.servers[store].hash(tonic::Request::new(request)).await.unwrap().into_inner();
            *hash = (found.records, found.hash);
        }
        hashes
    }

    /// Each as many keys as there are, half of them through each store.
    async fn fill(&self, keys: usize) {
        for i in 0..keys {
            put(&self.replica(i % 2), &format!("key-{i:06}")).await.unwrap();
        }
        self.level().await;
    }

    async fn stop(self) {
        for host in &self.hosts {
            host.stop().await;
        }
    }
}

/// Deletes rows behind the writer's back, as a disk or a bug would.
fn lose(replica: &Replica, keys: &[&str]) {
    let mut batch = Batch::default();
    keys.iter().for_each(|key| batch.delete_row(key.as_bytes()));
    replica.engine.write(&batch, true).unwrap();
}

fn row(replica: &Replica, key: &str) -> Option<Bytes> {
    replica.engine.row(key.as_bytes()).unwrap().map(|row| row.record)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_or_altered_under_the_engine_comes_back() {
    let pair = Pair::new().await;
    // More than one range.
    pair.fill(3_000).await;
    assert_eq!(pair.rounds().await, [(0, 0); 2]);
    let whole = pair.hashes().await;
    assert_eq!((whole[0], whole[0].0), (whole[1], 3_000));

    let (a, b) = (pair.replica(0), pair.replica(1));
    lose(&a, &["key-000000", "key-000001", "key-002999"]);
    lose(&b, &["key-001500"]);
    let older = record("key-000700", 1, Content::Bytes(Bytes::from_static(b"spoilt"))).encoded();
    let mut batch = Batch::default();
    batch.put_record(b"key-000700", b.progress.last_seq(), 0, |out| out.extend_from_slice(&older));
    b.engine.write(&batch, true).unwrap();
    let spoilt = pair.hashes().await;
    assert!(spoilt[0] != spoilt[1] && spoilt[0] != whole[0] && spoilt[1] != whole[1]);

    // Three records in the first and the last of the ranges.
    assert_eq!(pair.rounds().await, [(2, 3), (2, 2)]);
    assert_eq!(pair.hashes().await, whole);
    assert_eq!(row(&a, "key-000700"), row(&b, "key-000700"));
    assert_eq!(pair.rounds().await, [(0, 0); 2], "once is enough");
    assert!(a.progress.compared_ms() > 0);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_lost_everything_gets_it_back_in_steps() {
    let pair = Pair::new().await;
    pair.fill(6_000).await;
    let whole = pair.hashes().await;
    let keys: Vec<String> = (0..6_000).map(|i| format!("key-{i:06}")).collect();
    lose(&pair.replica(1), &keys.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(pair.hashes().await[1].0, 0);
    let round = pair.round(1).await;
    assert_eq!((round.divergent, round.records), (2, 6_000), "4,096 of them in the first step");
    assert_eq!(pair.hashes().await, whole);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_that_one_has_collected_is_no_difference_and_comes_not_back() {
    let pair = Pair::new().await;
    pair.fill(100).await;
    let (a, b) = (pair.replica(0), pair.replica(1));
    one(&a, set("key-000007", Content::Nothing)).await.unwrap();
    one(&a, set("key-000008", Content::Nothing)).await.unwrap();
    pair.level().await;
    // As compaction would, on one of the two.
    lose(&b, &["key-000007"]);
    assert_eq!(pair.hashes().await[0], pair.hashes().await[1]);
    // A difference beside it, so that the source ships the range with its tombstones.
    lose(&b, &["key-000050"]);
    assert_eq!(pair.rounds().await, [(0, 0), (1, 1)]);
    assert_eq!(row(&b, "key-000007"), None);
    assert!(row(&a, "key-000007").is_some());

    // But a tombstone that was lost while the value came back is one.
    let (seq, old) = (b.progress.last_seq(), record("key-000008", 1, Content::Bytes(Bytes::from_static(b"old"))));
    let mut batch = Batch::default();
    batch.put_record(b"key-000008", seq, 0, |out| old.encode(out));
    b.engine.write(&batch, true).unwrap();
    assert_eq!(kind(&b, "key-000008"), Kind::Bytes);
    assert_eq!(pair.rounds().await, [(0, 0), (1, 1)]);
    assert_eq!(kind(&b, "key-000008"), Kind::Nothing);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_other_shards_are_left_out() {
    let pair = Pair::new().await;
    pair.fill(100).await;
    let whole = pair.hashes().await[0];
    // The shard becomes the first of two, and one replica has cleaned up already.
    let mut view = pair.view();
    view.shards.push(Shard { replicas: vec![Assignment::default()] });
    let keys: Vec<String> = (0..100).map(|i| format!("key-{i:06}")).collect();
    let foreign: Vec<&str> = keys
        .iter()
        .filter(|key| vasto_client::hash::jump_hash(partition_hash(key.as_bytes()), 2) == 1)
        .map(String::as_str)
        .collect();
    pair.install(4, Phase::Stable, Some(view), None).await;
    lose(&pair.replica(1), &foreign);
    let hashes = pair.hashes().await;
    assert_eq!((hashes[0], hashes[0].0), (hashes[1], 100 - foreign.len() as u64));
    assert_ne!(hashes[0], whole);
    lose(&pair.replica(1), &[keys.iter().find(|k| !foreign.contains(&k.as_str())).unwrap()]);
    assert_eq!(pair.rounds().await, [(0, 0), (1, 1)]);
    assert!(foreign.iter().all(|key| row(&pair.replica(1), key).is_none()));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_its_way_is_no_difference() {
    let pair = Pair::new().await;
    let a = pair.replica(0);
    // Much at once, so that it is on its way for a while.
    let writing = tokio::spawn(async move {
        for i in 0..80_u8 {
            let value = || Content::Bytes(vec![i; 8 << 10].into());
            let writes = (0..500).map(|key| set(&format!("key-{key:06}"), value())).collect();
            assert!(a.write(writes).await.iter().all(Result::is_ok));
        }
    });
    let mut rounds = 0;
    while !writing.is_finished() {
        let round = pair.round(1).await;
        assert_eq!((round.divergent, round.records), (0, 0));
        rounds += 1;
    }
    writing.await.unwrap();
    assert!(rounds > 0);
    pair.level().await;
    assert_eq!(pair.rounds().await, [(0, 0); 2]);
    assert_eq!(pair.hashes().await[0], pair.hashes().await[1]);
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_outgrew_a_message_comes_back_in_parts() {
    let pair = Pair::new().await;
    let (a, b) = (pair.replica(0), pair.replica(1));
    let chunk =
        |n: u64| crate::record::Chunk { stamp: Stamp { time: n, origin: 5 }, bytes: vec![n as u8; 4 << 20].into() };
    let base = Base { partition_hash: partition_hash(b"big"), ..Base::default() };
    let big = Record::new(base, Vec::new(), (1..=6).map(chunk).collect());
    let batch = PeerBatch { records: vec![(Bytes::from_static(b"big"), big)], ..PeerBatch::default() };
    a.apply(batch).await.unwrap();
    pair.level().await;
    let whole = row(&b, "big").unwrap();
    lose(&b, &["big"]);
    assert_eq!(pair.rounds().await, [(0, 0), (1, 1)]);
    assert_eq!(row(&b, "big"), Some(whole));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_for_a_repair_is_told_what_it_mended_and_a_damaged_one_has_none() {
    let pair = Pair::new().await;
    pair.fill(100).await;
    lose(&pair.replica(0), &["key-000001", "key-000002"]);
    let asked = || {
        let request = RepairRequest { keyspace: UID.into(), replica: pair.ids[0] };
        let server = pair.servers[0].clone();
        async move {
            use futures::StreamExt;
            let stream = server.repair(tonic::Request::new(request)).await.unwrap().into_inner();
            stream.collect::<Vec<_>>().await.pop().unwrap().unwrap()
        }
    };
    let totals = asked().await;
    assert_eq!((totals.ranges, totals.divergent, totals.records), (1, 1, 2));
    // Its peer is no copy to compare with.
    pair.replica(1).progress.poison("a sync failed".into());
    let totals = asked().await;
    assert!(totals.troubles[0].contains("a sync failed"), "{totals:?}");
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_replica_is_closed_once_another_has_all_and_never_where_there_is_none() {
    let pair = Pair::new().await;
    pair.fill(100).await;
    let (a, b) = (pair.replica(0), pair.replica(1));
    a.progress.poison("a sync failed".into());
    // Whatever made the fault known: no write is taken after it.
    assert!(put(&a, "late").await.unwrap_err().message.contains("a sync failed"));
    pair.until("it is closed", |pair| pair.report(0).quarantined).await;
    assert_eq!(pair.report(0).fault, "a sync failed");
    assert!(pair.hosts[0].keyspace(UID).unwrap().replica(pair.ids[0]).is_none());
    assert!(pair.hosts[0].ready().unwrap_err().contains("a sync failed"));
    // The other is the last: it is read on.
    b.progress.poison("checksum mismatch".into());
    let looks = tokio::time::timeout(Duration::from_secs(1), pair.until("never", |pair| pair.report(1).quarantined));
    assert!(looks.await.is_err());
    assert_eq!((pair.report(1).quarantined, kind(&b, "key-000001")), (false, Kind::Bytes));
    pair.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_noticed_by_whoever_reads_there() {
    let pair = Pair::new().await;
    pair.fill(3_000).await;
    let b = pair.replica(1);
    b.engine.compact();
    let largest = std::fs::read_dir(b.dir.join("db"))
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "sst"))
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    // In the first block of its data.
    bytes[100] ^= 0x40;
    std::fs::write(&largest, bytes).unwrap();
    assert_eq!(b.progress.fault(), None);
    let round = pair.round(1).await;
    assert!(round.troubles[0].contains("Corruption"), "{round:?}");
    assert!(b.progress.fault().unwrap().contains("Corruption"));
    drop(b);
    pair.until("it is closed", |pair| pair.report(1).quarantined).await;
    pair.stop().await;
}
