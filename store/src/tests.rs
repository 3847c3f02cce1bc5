//! What a replica promises, on real files: one batch for a record and its change,
//! no stamp, seq or merge used twice whatever a crash takes, fences that outlive a restart,
//! positions that never skip silently, tombstones that go only when all have confirmed.

mod copy;
mod repair;
mod whole;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use tokio::sync::Notify;
use vasto_client::env::Env;
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::{
    Assignment, FailureCode, FollowBatch, FollowStart, Phase, Position, Returning, Shard, Shipped, SnapshotRequired,
    Topology, View,
};

use crate::build::Birth;
use crate::engine::{Batch, Engine, RocksStorage};
use crate::follow;
use crate::merge::{Change, Expiry, Limits, LocalOp};
use crate::meta;
use crate::record::{Base, Chunk, Content, Kind, Number, Op, Record, Slot, Stamp, time_of};
use crate::replica::{Context, Replica, Settings};
use crate::throttle::Throttle;
use crate::writer::{Asked, LocalWrite, PeerBatch, Refused};

const ME: u64 = 7;
const PEER: u64 = 8;

/// All that a test has written.
const ALL: follow::Step = follow::Step { lines: 1_000, bytes: 1 << 20 };

fn context() -> Context {
    Context {
        storage: Arc::new(RocksStorage::new(8 << 20, 16 << 20)),
        env: Env::real(),
        counts: crate::metrics::Monitor::new().counts(),
        changed: Arc::new(Notify::new()),
        stalls: Arc::default(),
        throttle: Arc::new(Throttle::new(1)),
    }
}

fn settings() -> Settings {
    Settings { synced: false, limits: Limits::default(), grace_ms: 1 }
}

fn view(shards: &[&[u64]]) -> View {
    let place = |id: &u64| Assignment { store: format!("store-{id}"), replica: *id, serving: true };
    View { shards: shards.iter().map(|s| Shard { replicas: s.iter().map(place).collect() }).collect() }
}

fn stable(version: u64, shards: &[&[u64]]) -> Arc<Topology> {
    Arc::new(Topology { uid: "u".into(), version, current: Some(view(shards)), ..Topology::default() })
}

/// A born replica of shard 0 in this folder, as a candidate of an empty shard is born.
fn open(dir: &Path, topology: &Arc<Topology>) -> Arc<Replica> {
    if !dir.join("replica.json").exists() {
        Replica::create(dir, ME, 0).unwrap();
        let engine = Engine::open(&dir.join("db"), &*context().storage).unwrap();
        let mut batch = Batch::default();
        batch.put_id(ME);
        batch.put_ceilings(0, 1);
        batch.put_birth(&SnapshotRequired { epoch: 99, birth_seq: 1, ..SnapshotRequired::default() });
        engine.write(&batch, true).unwrap();
    }
    Replica::open(dir, topology.clone(), settings(), &context()).unwrap()
}

/// One that was opened with these keys in its files, and nothing in memory.
pub(crate) async fn with_rows(dir: &Path, keys: &[Bytes]) -> Arc<Replica> {
    let topology = stable(1, &[&[ME]]);
    let replica = open(dir, &topology);
    for key in keys {
        put(&replica, std::str::from_utf8(key).unwrap()).await.unwrap();
    }
    replica.stop().await;
    drop(replica);
    open(dir, &topology)
}

/// The files as SIGKILL would leave them now: what was written, nothing more.
fn crashed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("cp").arg("-r").arg(dir.join(".")).arg(copy.path()).status().unwrap();
    assert!(status.success());
    let _ = std::fs::remove_file(copy.path().join("db/LOCK"));
    copy
}

fn set(key: &str, content: Content) -> LocalWrite {
    let change = Change::Set { content, expiry: Expiry::At(0), time_ms: None };
    write(key, change)
}

fn write(key: &str, change: Change) -> LocalWrite {
    let op = LocalOp { partition_hash: partition_hash(key.as_bytes()), change };
    LocalWrite {
        key: Bytes::copy_from_slice(key.as_bytes()),
        op,
        after: None,
        named_partition: false,
        returning: Returning::Nothing,
        head: false,
    }
}

async fn put(replica: &Replica, key: &str) -> Result<Stamp, Refused> {
    one(replica, set(key, Content::Bytes(Bytes::from_static(b"value")))).await
}

async fn one(replica: &Replica, write: LocalWrite) -> Result<Stamp, Refused> {
    replica.write(vec![write]).await.pop().unwrap().map(|taken| taken.stamp)
}

fn kind(replica: &Replica, key: &str) -> Kind {
    match replica.engine.row(key.as_bytes()).unwrap() {
        Some(row) => Record::decode(row.record).unwrap().kind(Env::real().now_ms()),
        None => Kind::Nothing,
    }
}

fn record(key: &str, time: u64, content: Content) -> Record {
    let stamp = Stamp { time, origin: 5 };
    let base = Base { stamp, expiry_ms: 0, partition_hash: partition_hash(key.as_bytes()), content };
    Record::new(base, Vec::new(), Vec::new())
}

fn from_peer(key: &str, record: Record, seq: u64) -> PeerBatch {
    PeerBatch {
        from: 5,
        records: vec![(Bytes::copy_from_slice(key.as_bytes()), record)],
        positions: vec![Position { replica: PEER, epoch: 1, seq }],
        clock: 0,
        asked: Some(Asked { version: 1, cleanups: 0 }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_moves_only_once_all_pieces_of_its_batch_are_there() {
    const RECORDS: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    let key = |n: usize| format!("key-{n:03}");
    let large = Content::Bytes(vec![7; 32 << 10].into());
    let shipped = |n| {
        let record = record(&key(n), time_of(1_000), large.clone()).encoded().into();
        Shipped { key: key(n).into(), record }
    };
    let records = (0..RECORDS).map(shipped).collect();
    let batch = FollowBatch { records, seq: 300, last_seq: 400, clock: 0, origin: 5, number: 1 };
    let asked = Asked { version: 1, cleanups: 0 };
    let apply = async || follow::apply(&replica, PEER, 1, asked, batch.clone(), Some(&mut Duration::default())).await;
    let there = |n| kind(&replica, &key(n)) != Kind::Nothing;
    let first_is_there = async {
        while !there(0) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        () = first_is_there => {}
        applied = apply() => panic!("it was not cut: {applied:?}"),
    }
    // Behind what was on its way.
    put(&replica, "last").await.unwrap();
    assert!(there(0) && !there(RECORDS - 1));
    assert_eq!(replica.progress.position(PEER), None);
    apply().await.unwrap();
    assert!((0..RECORDS).all(there));
    assert_eq!(replica.progress.position(PEER), Some(Position { replica: PEER, epoch: 1, seq: 300 }));
}

#[test]
fn nothing_is_written_before_its_batch_is() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(dir.path(), &*context().storage).unwrap();
    let there = |engine: &Engine| (engine.row(b"key").unwrap().is_some(), engine.changes(0, 9).unwrap().len());
    let mut batch = Batch::default();
    batch.put_record(b"key", 2, 0, |out| out.extend_from_slice(b"x"));
    assert_eq!(there(&engine), (false, 0));
    engine.write(&batch, false).unwrap();
    assert_eq!(there(&engine), (true, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_and_its_change_are_written_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME]]));
    let writing = replica.clone();
    let task = tokio::spawn(async move {
        for i in 0..4_000 {
            put(&writing, &format!("key-{}", i % 50)).await.unwrap();
        }
    });
    let mut seen = 0;
    while !task.is_finished() {
        let copy = tempfile::tempdir().unwrap();
        replica.engine.checkpoint(&copy.path().join("db")).unwrap();
        let engine = Engine::open(&copy.path().join("db"), &*context().storage).unwrap();
        let changes = engine.changes(0, usize::MAX).unwrap();
        let mut rows = 0;
        let check = |key: &[u8], seq: u64, _: &[u8]| {
            let line = changes.iter().find(|c| c.seq == seq).unwrap_or_else(|| panic!("row {seq} has no change"));
            assert_eq!(line.key, key);
            rows += 1;
            true
        };
        engine.rows(b"", None, check).unwrap();
        for line in &changes {
            assert!(engine.row(&line.key).unwrap().unwrap().seq >= line.seq, "change {} has no row", line.seq);
        }
        seen += rows;
    }
    task.await.unwrap();
    assert!(seen > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_key_stays_deleted_when_an_older_put_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    put(&replica, "key").await.unwrap();
    one(&replica, set("key", Content::Nothing)).await.unwrap();
    let older = record("key", 1, Content::Bytes(Bytes::from_static(b"older")));
    replica.apply(from_peer("key", older, 10)).await.unwrap();
    assert_eq!(kind(&replica, "key"), Kind::Nothing);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_put_is_written_unread_only_if_nothing_here_is_as_new() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    let (first, now) = (put(&replica, "first").await.unwrap(), replica.progress.last_seq());
    let bytes = |what: &'static str| Content::Bytes(Bytes::from_static(what.as_bytes()));
    // By the same time as what is here, of the greater origin.
    let mut theirs = record("key", first.time + 9, bytes("theirs"));
    replica.apply(from_peer("key", theirs.clone(), 10)).await.unwrap();
    let others =
        Base { stamp: Stamp { origin: 4, ..theirs.base().stamp }, content: bytes("x"), ..theirs.base().clone() };
    replica.apply(from_peer("key", Record::from(others), 11)).await.unwrap();
    let row = replica.engine.row(b"key").unwrap().unwrap();
    assert_eq!((Record::decode(row.record).unwrap(), row.seq), (theirs, now + 1));

    // It has heard of later times, but holds nothing as new: what can't be read is in nobody's way.
    let mut broken = Batch::default();
    broken.put_record(b"key", now + 2, 0, |out| out.push(0xff));
    replica.engine.write(&broken, false).unwrap();
    theirs = record("key", first.time + 10, bytes("later"));
    let heard = PeerBatch { clock: first.time + 20, records: Vec::new(), ..from_peer("key", theirs.clone(), 12) };
    replica.apply(heard).await.unwrap();
    replica.apply(from_peer("key", record("key", first.time, bytes("older")), 13)).await.unwrap_err();
    replica.apply(from_peer("key", theirs.clone(), 13)).await.unwrap();
    let row = replica.engine.row(b"key").unwrap().unwrap();
    assert_eq!(Record::decode(row.record).unwrap(), theirs);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_sends_again_after_a_crash_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME, PEER]]);
    let replica = open(dir.path(), &topology);
    let slot =
        Slot { start: Stamp { time: 3, origin: 5 }, op: Op::Sum, seq: 4, number: Number::try_from(2.5).unwrap() };
    let merged = Record::new(Record::unwritten(partition_hash(b"key")).into_parts().0, vec![slot], Vec::new());
    replica.apply(from_peer("key", merged.clone(), 10)).await.unwrap();
    let seq = replica.progress.last_seq();
    replica.apply(from_peer("key", merged.clone(), 10)).await.unwrap();
    assert_eq!(replica.progress.last_seq(), seq, "what changes nothing is no change");

    let copy = crashed(dir.path());
    let again = open(copy.path(), &topology);
    assert_eq!(again.progress.position(PEER).map(|p| p.seq), Some(10), "the position is in the record's batch");
    again.apply(from_peer("key", merged, 10)).await.unwrap();
    let row = again.engine.row(b"key").unwrap().unwrap();
    let read = Record::decode(row.record).unwrap().read(Env::real().now_ms());
    assert_eq!(read.content, Content::Number(Number::try_from(2.5).unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stamp_seq_or_origin_is_used_twice_whatever_a_crash_takes() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME]]);
    let replica = open(dir.path(), &topology);
    // The first write syncs the ceilings; the later ones are only in the log's unsynced end.
    put(&replica, "first").await.unwrap();
    let early = crashed(dir.path());
    let mut last = Stamp::ZERO;
    for i in 0..100 {
        last = put(&replica, &format!("key-{i}")).await.unwrap();
    }
    // As if the machine had lost all that came after the last sync.
    let again = open(early.path(), &topology);
    assert!(again.engine.row(b"key-99").unwrap().is_none());
    assert_ne!(again.origin, replica.origin);
    assert!(again.progress.last_seq() >= replica.progress.last_seq());
    let next = put(&again, "next").await.unwrap();
    assert!(next.time > last.time, "{next:?} after {last:?}");
    assert!(again.progress.last_seq() > replica.progress.last_seq());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ceiling_that_was_written_ahead_counts_once_it_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME]]);
    open(dir.path(), &topology).stop().await;
    let wall = Arc::new(AtomicU64::new(1_000_000));
    let now = wall.clone();
    let env = Env::new(move || now.load(Ordering::SeqCst), || 5, |_| unreachable!("nobody is called"));
    let replica = Replica::open(dir.path(), topology, settings(), &Context { env, ..context() }).unwrap();
    let put_at = async |ms: u64| {
        wall.store(1_000_000 + ms, Ordering::SeqCst);
        put(&replica, "key").await.unwrap();
        (replica.progress.ceilings_written(), replica.progress.ceilings_synced())
    };
    assert_eq!(put_at(0).await, (0, 0), "the first is synced with the write, up to 3,000");
    assert_eq!(put_at(1_600).await, (1, 0), "up to 4,600");
    assert_eq!(put_at(2_000).await, (1, 0));
    assert_eq!(put_at(3_200).await, (1, 0), "not synced, so one is with the write, up to 6,200");
    assert_eq!(put_at(4_800).await, (2, 0), "up to 7,800");
    replica.sync();
    assert_eq!(put_at(6_400).await, (3, 2), "that counts, and the next is written");
}

/// A replica whose clock tells who looks at it.
struct Watched {
    replica: Arc<Replica>,
    wall: Arc<AtomicU64>,
    /// By how much each look moves the clock.
    step: Arc<AtomicU64>,
    /// Looks of the writer's own thread.
    by_thread: Arc<AtomicU64>,
}

impl Watched {
    async fn open(dir: &Path) -> Self {
        let topology = stable(1, &[&[ME]]);
        open(dir, &topology).stop().await;
        let (wall, step, by_thread) = (Arc::new(AtomicU64::new(1_000_000)), Arc::default(), Arc::default());
        let (now, by, looks) = (wall.clone(), Arc::clone(&step), Arc::clone(&by_thread));
        let tick = move || {
            let thread = std::thread::current().name().is_some_and(|name| name.starts_with("writer"));
            AtomicU64::fetch_add(&looks, thread.into(), Ordering::SeqCst);
            now.fetch_add(AtomicU64::load(&by, Ordering::SeqCst), Ordering::SeqCst)
        };
        let env = Env::new(tick, || 5, |_| unreachable!("nobody is called"));
        let replica = Replica::open(dir, topology, settings(), &Context { env, ..context() }).unwrap();
        let watched = Self { replica, wall, step, by_thread };
        assert!(!watched.write(set("key", Content::Nothing)).await, "the first needs a synced ceiling");
        watched
    }

    /// Whether it was done without the writer's thread.
    async fn write(&self, write: LocalWrite) -> bool {
        let before = self.by_thread.load(Ordering::SeqCst);
        self.replica.write(vec![write]).await[0].as_ref().unwrap();
        self.by_thread.load(Ordering::SeqCst) == before
    }

    /// How many of so many, one after the other, were.
    async fn count(&self, write: impl Fn() -> LocalWrite) -> usize {
        let mut count = 0;
        for _ in 0..100 {
            count += usize::from(self.write(write()).await);
        }
        count
    }

    /// Writes until one was.
    async fn at_once(&self) {
        let trying = async {
            // The thread may be about to leave still.
            while !self.write(small()).await {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), trying).await.expect("no write was done at once");
    }
}

fn small() -> LocalWrite {
    set("key", Content::Bytes(Bytes::from_static(b"value")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_put_waits_for_no_other_thread() {
    let dir = tempfile::tempdir().unwrap();
    let watched = Watched::open(dir.path()).await;
    watched.at_once().await;
    assert_eq!(watched.count(|| set("key", Content::Bytes(vec![7; 64 << 10].into()))).await, 0, "large");
    assert_eq!(watched.count(|| LocalWrite { returning: Returning::Before, ..small() }).await, 0, "it reads");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_write_that_the_disk_held_up_only_the_thread_writes_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let watched = Watched::open(dir.path()).await;
    // Later, and after the clock was set back.
    for set_to in [1_010_000, 500_000, 520_000] {
        watched.wall.store(set_to, Ordering::SeqCst);
        watched.at_once().await;
        // Each look at the clock takes 3 ms, so a write 6 at least.
        watched.step.store(3, Ordering::SeqCst);
        watched.at_once().await;
        watched.step.store(0, Ordering::SeqCst);
        assert_eq!(watched.count(small).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_write_of_a_message_sees_those_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME]]));
    let put = |bytes: &'static str| set("key", Content::Bytes(bytes.into()));
    let append = |bytes: &'static str| write("key", Change::Append(bytes.into()));
    let done = replica.write(vec![put("a"), append("b"), put("c"), append("d")]).await;
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    let row = replica.engine.row(b"key").unwrap().unwrap();
    let read = Record::decode(row.record).unwrap().read(Env::real().now_ms());
    assert_eq!(read.content, Content::Bytes("cd".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_take_effect_in_the_order_in_which_they_came_whoever_does_them() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME]]);
    let replica = open(dir.path(), &topology);
    for round in 0..200 {
        // A large write goes to the writer's thread, and so does a small one that needs a ceiling; a small one may be
        // done right here.
        let len = if round % 2 == 0 { 16 << 10 } else { 16 };
        if round % 20 == 1 {
            replica.progress.pass(time_of(Env::real().now_ms() + 10_000 * (round + 1)));
        }
        let first = replica.write(vec![set("key", Content::Bytes(vec![1; len].into()))]);
        let mut first = std::pin::pin!(first);
        let early = (&mut first).now_or_never();
        let last = replica.write(vec![set("key", Content::Bytes(vec![2; 16].into()))]).await.pop().unwrap().unwrap();
        let first = match early {
            Some(done) => done,
            None => first.await,
        };
        assert!(first[0].as_ref().unwrap().stamp < last.stamp);
        let row = replica.engine.row(b"key").unwrap().unwrap();
        let stored = Record::decode(row.record).unwrap();
        assert_eq!(stored.greatest_stamp(), last.stamp);
        assert_eq!(row.seq, replica.progress.last_seq());
    }
    // None was given out under a ceiling that was not synced.
    let last = replica.progress.clock();
    let again = crashed(dir.path());
    assert!(put(&open(again.path(), &topology), "next").await.unwrap().time > last);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_keeps_origin_and_seq_and_a_crash_after_it_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME]]);
    let replica = open(dir.path(), &topology);
    put(&replica, "key").await.unwrap();
    let (origin, seq) = (replica.origin, replica.progress.last_seq());
    replica.stop().await;
    drop(replica);
    let again = open(dir.path(), &topology);
    assert_eq!((again.origin, again.progress.last_seq()), (origin, seq));
    // The mark is gone before the first stamp: a crash right now is no clean stop.
    let copy = crashed(dir.path());
    assert_ne!(open(copy.path(), &topology).origin, origin);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_refuses_what_moved_away_and_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let key = (0..).map(|i| format!("key-{i}")).find(|k| jump_hash(partition_hash(k.as_bytes()), 2) == 1).unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME]]));
    put(&replica, &key).await.unwrap();
    let change = |version, phase: Phase| {
        Arc::new(Topology {
            version,
            phase: phase.into(),
            current: Some(view(&[&[ME], &[PEER]])),
            previous: Some(view(&[&[ME]])),
            switch_version: 2,
            ..Topology::default()
        })
    };
    replica.install(change(2, Phase::Switch)).await;
    put(&replica, &key).await.expect("until the fence old owners accept");
    replica.install(change(3, Phase::Fence)).await;
    let fence = replica.progress.fence();
    assert_eq!((fence.version, fence.seq), (2, replica.progress.last_seq()));
    let refused = put(&replica, &key).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::WrongShard);
    // A deposed leader's older word changes nothing.
    replica.install(change(2, Phase::Switch)).await;
    assert_eq!(put(&replica, &key).await.unwrap_err().code, FailureCode::WrongShard);

    let copy = crashed(dir.path());
    let again = open(copy.path(), &change(3, Phase::Fence));
    assert_eq!(again.progress.fence(), fence);
    assert_eq!(put(&again, &key).await.unwrap_err().code, FailureCode::WrongShard);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_no_longer_named_forgets_how_far_it_had_come() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    replica.apply(from_peer("key", record("key", 1, Content::Bytes("x".into())), 10)).await.unwrap();
    replica.install(stable(2, &[&[ME], &[PEER]])).await;
    assert!(replica.progress.position(PEER).is_some(), "of another shard now, but what came from there has come");
    // Given up. When it is named again it may be for other keys.
    replica.install(stable(3, &[&[PEER]])).await;
    assert_eq!(replica.progress.position(PEER), None);
    assert!(replica.engine.row(b"key").unwrap().is_some());
    let again = open(crashed(dir.path()).path(), &stable(4, &[&[ME, PEER]]));
    assert_eq!(again.progress.position(PEER), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_to_gain_keys_no_more_forgets_how_far_it_had_come_with_them() {
    const SIBLING: u64 = PEER + 1;
    let dir = tempfile::tempdir().unwrap();
    let shrink = |version, next: &[&[u64]]| {
        let phase = Phase::Prepare.into();
        let now = stable(version, &[&[ME, SIBLING], &[PEER]]);
        Arc::new(Topology { phase, next: Some(view(next)), ..(*now).clone() })
    };
    let replica = open(dir.path(), &shrink(1, &[&[ME, SIBLING]]));
    let gained = record("key", 1, Content::Bytes("x".into()));
    replica.apply(from_peer("key", gained.clone(), 10)).await.unwrap();
    let position = Position { replica: SIBLING, epoch: 1, seq: 5 };
    replica.apply(PeerBatch { positions: vec![position], ..from_peer("key", gained, 11) }).await.unwrap();
    // By the same shrink it goes on.
    replica.install(shrink(2, &[&[ME, SIBLING]])).await;
    assert!(replica.progress.position(PEER).is_some());
    // By one that knows nothing of what it has begun, as before a majority knows of the shrink.
    replica.install(shrink(3, &[&[0, 0]])).await;
    assert_eq!((replica.progress.position(PEER), replica.progress.position(SIBLING)), (None, Some(position)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_came_in_the_same_batch_is_forgotten_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME, PEER]]);
    open(dir.path(), &topology).stop().await;
    // While it is shut the writer looks at the clock in vain.
    let (shut, inside) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (closed, entered) = (shut.clone(), inside.clone());
    let now = move || {
        let writer = std::thread::current().name().is_some_and(|name| name.starts_with("writer"));
        while writer && closed.load(Ordering::SeqCst) {
            entered.store(true, Ordering::SeqCst);
            std::thread::yield_now();
        }
        Env::real().now_ms()
    };
    let env = Env::new(now, || 5, |_| unreachable!("nobody is called"));
    let context = Context { env, ..context() };
    let replica = Replica::open(dir.path(), topology, settings(), &context).unwrap();
    let peer = |key, seq| replica.apply(from_peer(key, record(key, 1, Content::Bytes("x".into())), seq));
    shut.store(true, Ordering::SeqCst);
    let mut first = std::pin::pin!(peer("first", 10));
    assert!((&mut first).now_or_never().is_none());
    let entering = async {
        while !inside.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), entering).await.expect("the writer does not begin");
    // It is in the middle of the first, so these wait together.
    let mut second = std::pin::pin!(peer("second", 20));
    let mut unnamed = std::pin::pin!(replica.install(stable(2, &[&[PEER]])));
    assert!((&mut second).now_or_never().is_none() && (&mut unnamed).now_or_never().is_none());
    shut.store(false, Ordering::SeqCst);
    assert_eq!(tokio::join!(first, second, unnamed), (Ok(()), Ok(()), ()));
    assert_eq!(replica.progress.position(PEER), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_for_under_a_topology_that_the_writer_does_not_know_is_refused_not_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let key = (0..).map(|i| format!("key-{i}")).find(|k| jump_hash(partition_hash(k.as_bytes()), 2) == 1).unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME], &[PEER]]));
    let gained = || PeerBatch {
        asked: Some(Asked { version: 2, cleanups: 0 }),
        ..from_peer(&key, record(&key, 1, Content::Bytes("x".into())), 10)
    };
    // It is about to own all keys, and its writer has not heard of that yet.
    assert_eq!(replica.apply(gained()).await.unwrap_err().code, FailureCode::NotReady);
    assert_eq!(replica.progress.position(PEER), None, "what was refused comes again");
    replica.install(stable(2, &[&[ME]])).await;
    replica.apply(gained()).await.unwrap();
    assert!(replica.engine.row(key.as_bytes()).unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_never_brings_back_what_moved_away() {
    let dir = tempfile::tempdir().unwrap();
    let key = (0..).map(|i| format!("key-{i}")).find(|k| jump_hash(partition_hash(k.as_bytes()), 2) == 1).unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME], &[PEER]]));
    let foreign = record(&key, 1, Content::Bytes(Bytes::from_static(b"foreign")));
    replica.apply(from_peer(&key, foreign, 10)).await.unwrap();
    assert!(replica.engine.row(key.as_bytes()).unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_was_told_to_delete_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let moved = |number| jump_hash(partition_hash(format!("key-{number}").as_bytes()), 2) == 1;
    let mut keys = (0..).filter(|number| moved(*number)).map(|number| format!("key-{number}"));
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    let cleanup = |version, clean: &[u64]| Topology {
        uid: "u".into(),
        version,
        phase: Phase::Cleanup.into(),
        previous: Some(view(&[&[ME, PEER]])),
        current: Some(view(&[&[ME, PEER], &[9]])),
        clean: clean.to_vec(),
        ..Topology::default()
    };
    for (version, clean, taken) in [(2, &[][..], true), (3, &[ME], false)] {
        replica.install(Arc::new(cleanup(version, clean))).await;
        let key = keys.next().unwrap();
        replica.apply(from_peer(&key, record(&key, 1, Content::Nothing), version)).await.unwrap();
        // What came behind the walk that deletes would stay.
        assert_eq!(replica.engine.row(key.as_bytes()).unwrap().is_some(), taken);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_ships_each_current_record_once_and_nothing_back() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME, PEER]]);
    let replica = open(dir.path(), &topology);
    let first = replica.progress.last_seq();
    let following = replica.engine.follow();
    put(&replica, "twice").await.unwrap();
    put(&replica, "once").await.unwrap();
    put(&replica, "twice").await.unwrap();
    let given = record("given", 9, Content::Bytes(Bytes::from_static(b"x")));
    replica.apply(from_peer("given", given, 10)).await.unwrap();
    let last = replica.progress.last_seq();
    let page = |origin| follow::page(&replica.engine, &topology.wanted(ME, PEER), origin, 1, last, &ALL).unwrap();
    let keys = |origin| page(origin).records.into_iter().map(|r| r.key).collect::<Vec<_>>();
    assert_eq!(keys(5), ["once", "twice"], "what its present life gave is not sent back");
    assert_eq!(keys(6), ["once", "twice", "given"], "what an earlier life gave is: it may have lost that");
    assert_eq!(page(5).seq, last);

    let recent = |origin| follow::recent_page(&replica.engine, &topology.wanted(ME, PEER), origin, first, last);
    for origin in [5, 6] {
        let (recent, page) = (recent(origin).unwrap(), page(origin));
        assert_eq!((recent.records, recent.seq), (page.records, page.seq), "memory tells the same");
    }
    // Rows that go without a change are in no page; memory doesn't know which those were.
    replica.clean(vec![Bytes::from_static(b"once")]).await.unwrap();
    assert_eq!(keys(5), ["twice"]);
    assert!(recent(5).is_none());
    drop(following);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_meets_a_peers_own_is_sent_to_that_peer() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME, PEER]]);
    let replica = open(dir.path(), &topology);
    one(&replica, write("both", Change::Append(Bytes::from_static(b"mine")))).await.unwrap();
    let chunk = Chunk { stamp: Stamp { time: 1 << 20, origin: 5 }, bytes: Bytes::from_static(b"theirs") };
    let unwritten = Base { partition_hash: partition_hash(b"both"), ..Base::default() };
    replica.apply(from_peer("both", Record::new(unwritten, Vec::new(), vec![chunk]), 10)).await.unwrap();
    put(&replica, "older").await.unwrap();
    replica.apply(from_peer("older", record("older", time_of(1 << 47), Content::Nothing), 11)).await.unwrap();
    let last = replica.progress.last_seq();
    let page = follow::page(&replica.engine, &topology.wanted(ME, PEER), 5, 1, last, &ALL).unwrap();
    let keys: Vec<_> = page.records.into_iter().map(|r| r.key).collect();
    assert_eq!(keys, ["both"], "the peer has not got what was appended here; what it put over the older it has");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_cannot_be_served_asks_for_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    for i in 0..10 {
        put(&replica, &format!("key-{i}")).await.unwrap();
    }
    replica.trim(5).await;
    put(&replica, "after the trim").await.unwrap();
    let asked = |epoch, seq| follow::required(&replica, &FollowStart { epoch, seq, ..FollowStart::default() });
    assert!(asked(99, 5).is_none());
    assert!(asked(99, 4).unwrap().reason.contains("are gone"));
    assert!(asked(98, 5).unwrap().reason.contains("not known"));
    assert!(asked(99, 1_000).unwrap().reason.contains("last change"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_goes_only_below_the_horizon() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    put(&replica, "key").await.unwrap();
    one(&replica, set("key", Content::Nothing)).await.unwrap();
    put(&replica, "kept").await.unwrap();
    // Not by the row cache, which may have for a while what compaction has dropped.
    let keys = || {
        let mut keys = Vec::new();
        let visit = |key: &[u8], _, _: &[u8]| {
            keys.push(String::from_utf8_lossy(key).into_owned());
            true
        };
        replica.engine.rows(b"", None, visit).unwrap();
        keys
    };
    replica.engine.compact();
    assert_eq!(keys(), ["kept", "key"], "nobody has confirmed it");
    replica.engine.collection.horizon.store(replica.progress.last_seq(), Ordering::Release);
    replica.engine.compact();
    assert_eq!(keys(), ["kept"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_passes_every_stamp_that_is_stored_and_every_sessions() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    let ahead = time_of(Env::real().now_ms() + 3_600_000);
    replica.apply(from_peer("key", record("key", ahead, Content::Nothing), 10)).await.unwrap();
    assert!(put(&replica, "key").await.unwrap().time > ahead, "a put comes after all that its replica has seen");
    let after = |time| LocalWrite { after: Some(Stamp { time, origin: 1 }), ..set("key", Content::Nothing) };
    let near = ahead + time_of(5_000);
    assert!(one(&replica, after(near)).await.unwrap().time > near);
    // But a caller can't push the shard's clocks to the end of time.
    assert_eq!(one(&replica, after(u64::MAX)).await.unwrap_err().code, FailureCode::NotReady);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_replicas_clock_is_not_behind_what_it_copied() {
    let dir = tempfile::tempdir().unwrap();
    Replica::create(dir.path(), ME, 0).unwrap();
    let clock = time_of(Env::real().now_ms() + 3_600_000);
    let birth = Birth { births: Vec::new(), positions: BTreeMap::new(), clock, seq: 5, epoch: 9, horizon: 0 };
    birth.write(&Engine::open(&dir.path().join("db"), &*context().storage).unwrap(), ME).unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME]]));
    // A put does not look at what is there: its stamp alone must make it the newest.
    assert!(put(&replica, "key").await.unwrap().time > clock);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_behind_the_copying_of_files_leaves_a_replica_that_is_not_born() {
    let dir = tempfile::tempdir().unwrap();
    Replica::create(dir.path(), ME, 0).unwrap();
    // Its files are still the source's: with its id and its birth.
    let birth = Birth { births: Vec::new(), positions: BTreeMap::new(), clock: 1, seq: 5, epoch: 9, horizon: 0 };
    birth.write(&Engine::open(&dir.path().join("db"), &*context().storage).unwrap(), PEER).unwrap();
    for _ in 0..2 {
        let error = Replica::open(dir.path(), stable(1, &[&[ME]]), settings(), &context()).err().unwrap();
        assert!(matches!(error, crate::replica::Error::NotBorn(_)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_gave_is_confirmed_only_once_it_is_synced() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    // The first write syncs the ceilings, and all else with them.
    put(&replica, "first").await.unwrap();
    replica.apply(from_peer("key", record("key", 1, Content::Nothing), 10)).await.unwrap();
    assert_eq!(replica.progress.position(PEER).map(|p| p.seq), Some(10));
    assert_eq!(replica.progress.synced_position(PEER), None, "a crash now would take it");
    replica.sync();
    assert_eq!(replica.progress.synced_position(PEER).map(|p| p.seq), Some(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_is_not_ahead_of_the_records_that_it_stands_for() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER]]));
    let mut damage = Batch::default();
    damage.put_record(b"damaged", 1, 0, |out| out.extend_from_slice(b"no record"));
    replica.engine.write(&damage, true).unwrap();
    let both = vec![
        (Bytes::from_static(b"fine"), record("fine", 1, Content::Nothing)),
        (Bytes::from_static(b"damaged"), record("damaged", 1, Content::Nothing)),
    ];
    let batch = PeerBatch { records: both, ..from_peer("fine", record("fine", 1, Content::Nothing), 10) };
    replica.apply(batch).await.unwrap_err();
    assert_eq!(replica.progress.position(PEER), None);
    assert_eq!(meta::read(&replica.engine).unwrap().positions, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_up_forgets_positions_in_other_shards() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME, PEER], &[9]]));
    let batch = PeerBatch {
        positions: vec![Position { replica: PEER, epoch: 1, seq: 4 }, Position { replica: 9, epoch: 1, seq: 4 }],
        ..PeerBatch::default()
    };
    replica.apply(batch).await.unwrap();
    replica.cleaned(3).await;
    put(&replica, "after it").await.ok();
    assert!(replica.progress.position(PEER).is_some());
    assert_eq!(replica.progress.position(9), None, "what was copied from there is deleted");
    let kept: Vec<u64> = meta::read(&replica.engine).unwrap().positions.iter().map(|p| p.replica).collect();
    assert_eq!(kept, [PEER]);
    // What was asked for before goes on behind what was deleted.
    let late = from_peer("key", record("key", 1, Content::Nothing), 5);
    assert_eq!(replica.apply(late).await.unwrap_err().code, FailureCode::NotReady);
    let anew = PeerBatch { asked: Some(replica.asked(1)), ..from_peer("key", record("key", 1, Content::Nothing), 5) };
    replica.apply(anew).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let replica = open(dir.path(), &stable(1, &[&[ME]]));
    let big = || set("key", Content::Bytes(vec![0; 8 << 20].into()));
    let all = futures::future::join_all((0..64).map(|_| one(&replica, big()))).await;
    let refused = all.iter().filter(|r| r.as_ref().is_err_and(|e| e.code == FailureCode::ResourceExhausted)).count();
    let accepted = all.iter().filter(|r| r.is_ok()).count();
    assert_eq!(refused + accepted, 64);
    assert!(refused > 0 && accepted > 0, "{refused} refused, {accepted} accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_replica_without_its_database_is_broken_not_new() {
    let dir = tempfile::tempdir().unwrap();
    let topology = stable(1, &[&[ME]]);
    let replica = open(dir.path(), &topology);
    replica.stop().await;
    drop(replica);
    std::fs::remove_dir_all(dir.path().join("db")).unwrap();
    let error = Replica::open(dir.path(), topology, settings(), &context()).err().unwrap();
    assert!(error.to_string().contains("gone or empty"), "{error}");
}

#[test]
fn a_disk_that_is_nearly_full_takes_no_writes() {
    let now = Arc::new(AtomicU64::new(1_000));
    let clock = now.clone();
    let env = Env::new(move || clock.load(Ordering::Relaxed), || 1, |_| unreachable!());
    let mut room = crate::dir::disk_watch(std::env::temp_dir(), context().storage, env);
    assert!(room());
}
