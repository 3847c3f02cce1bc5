//! A load that never stops, and that is its own oracle. Each key has one writer,
//! which numbers its writes, so a value says which of them it is. In the end what
//! was acknowledged stands there, or a later write whose outcome nobody knows. A
//! read in between may be older, since another replica answered it, but never newer
//! than what was tried, and never nothing where something was put for good.
//!
//! What it knows of each key is in a ledger, a file that outlives a killed load.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use futures::future::join_all;
use rand::{RngExt, rngs::StdRng};
use serde_json::{Value as Json, json};
use tokio::sync::RwLock;
use vasto_client::hash::partition_hash;
use vasto_client::{Error, Keyspace, Op, Outcome, Value};

/// How many operations travel together where a whole range is read or put.
const TOGETHER: usize = 500;
/// How many failures are told in words; all are counted.
const TOLD: u64 = 200;

/// What is written and how fast.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its keys begin with `load/RANGE/`.
    pub range: String,
    /// How many keys it writes.
    pub keys: usize,
    /// Tasks that write, each its own keys.
    pub writers: usize,
    /// Tasks that read any key.
    pub readers: usize,
    /// How long a task rests after each operation, at most.
    pub pause: Duration,
}

/// What happens to a key, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It is put again and again, and never deleted.
    Put,
    /// It is put and deleted by turns: odd versions are there, even ones aren't.
    Churn,
    /// One is added to it: its value is how often.
    Counter,
}

impl Kind {
    fn of(key: usize) -> Self {
        match key % 4 {
            0 | 1 => Self::Put,
            2 => Self::Churn,
            _ => Self::Counter,
        }
    }
}

/// What a read found, as the number of the write that left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Version(u64),
}

/// What a read may say of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    acknowledged: u64,
    attempted: u64,
}

impl Bounds {
    /// Whether this may stand there when all is quiet.
    fn hold(self, kind: Kind, found: Found) -> bool {
        match found {
            // A deletion is an even version, and two that follow one another have one.
            Found::Nothing if kind == Kind::Churn => {
                self.acknowledged.is_multiple_of(2) || self.attempted > self.acknowledged
            }
            Found::Nothing => self.acknowledged == 0,
            Found::Version(version) => {
                self.acknowledged <= version && version <= self.attempted && (kind != Kind::Churn || version % 2 == 1)
            }
        }
    }

    /// Whether a read under way may find this: also what was there before.
    fn allow(self, kind: Kind, found: Found) -> bool {
        match found {
            Found::Nothing => kind == Kind::Churn || self.acknowledged == 0,
            Found::Version(version) => version <= self.attempted && (kind != Kind::Churn || version % 2 == 1),
        }
    }
}

/// For each key how many writes were tried and how many were acknowledged.
///
/// In the file each key has a row of 16 bytes that is written at once, before a
/// write is sent and after it is answered: killed in between, the load knows on its
/// next start that the write may or may not have been taken.
struct Ledger {
    file: Option<File>,
    rows: Vec<[AtomicU64; 2]>,
}

const ROW: usize = 16;

impl Ledger {
    /// Takes up what the file has, or begins a new one of this many keys.
    fn open(path: Option<&Path>, keys: usize) -> io::Result<Self> {
        let mut rows = Vec::new();
        rows.resize_with(keys, Default::default);
        let Some(path) = path else { return Ok(Self { file: None, rows }) };
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let length = file.metadata()?.len();
        let whole = (keys * ROW) as u64;
        if length != 0 && length != whole {
            let message = format!("{} has {length} bytes, not {whole}: it is of another load", path.display());
            return Err(io::Error::other(message));
        }
        file.set_len(whole)?;
        let mut bytes = vec![0; keys * ROW];
        file.read_exact_at(&mut bytes, 0)?;
        for (row, bytes) in rows.iter().zip(bytes.chunks_exact(ROW)) {
            for (cell, bytes) in row.iter().zip(bytes.chunks_exact(ROW / 2)) {
                cell.store(u64::from_le_bytes(bytes.try_into().map_err(io::Error::other)?), Relaxed);
            }
        }
        Ok(Self { file: Some(file), rows })
    }

    fn bounds(&self, key: usize) -> Bounds {
        let [acknowledged, attempted] = &self.rows[key];
        // In this order: both only rise, and a writer raises `attempted` first.
        let acknowledged = acknowledged.load(Relaxed);
        Bounds { acknowledged, attempted: attempted.load(Relaxed) }
    }

    /// Only a key's one writer calls this, so nothing comes between.
    fn set(&self, key: usize, bounds: Bounds) -> io::Result<()> {
        let Bounds { acknowledged, attempted } = bounds;
        self.rows[key][1].store(attempted, Relaxed);
        self.rows[key][0].store(acknowledged, Relaxed);
        let Some(file) = &self.file else { return Ok(()) };
        let mut bytes = [0; ROW];
        bytes[..8].copy_from_slice(&acknowledged.to_le_bytes());
        bytes[8..].copy_from_slice(&attempted.to_le_bytes());
        file.write_all_at(&bytes, (key * ROW) as u64)
    }
}

/// Latencies are counted in buckets an eighth of a power of two wide.
const BUCKETS: usize = 8 * 40;

fn bucket(us: u64) -> usize {
    let us = us.max(8);
    let power = us.ilog2() - 3;
    (power as usize * 8 + ((us >> power) & 7) as usize).min(BUCKETS - 1)
}

/// The end of a bucket, ms.
fn bucket_ms(bucket: usize) -> f64 {
    ((bucket as u64 % 8 + 9) << (bucket / 8)) as f64 / 1e3
}

/// What happened so far, or between two moments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered operations.
    pub operations: u64,
    /// Operations that ended in an error although they could have been repeated.
    pub failed: u64,
    /// Additions whose outcome nobody knows.
    pub unknown: u64,
    /// Reads that found nothing, or what nobody wrote.
    pub lost: u64,
    /// Reads that were older than the newest acknowledged write.
    pub stale: u64,
    latencies: Vec<u64>,
}

impl Counts {
    /// What came after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |bucket: usize| earlier.latencies.get(bucket).copied().unwrap_or(0);
        Self {
            operations: self.operations - earlier.operations,
            failed: self.failed - earlier.failed,
            unknown: self.unknown - earlier.unknown,
            lost: self.lost - earlier.lost,
            stale: self.stale - earlier.stale,
            latencies: self.latencies.iter().enumerate().map(|(at, n)| n - before(at)).collect(),
        }
    }

    /// The latency that this part of the operations did not exceed, ms, an eighth too high at most.
    pub fn quantile_ms(&self, part: f64) -> f64 {
        let all: u64 = self.latencies.iter().sum();
        let wanted = (all as f64 * part).ceil() as u64;
        let mut seen = 0;
        let reached = |n: &u64| {
            seen += n;
            seen >= wanted
        };
        if all == 0 { 0.0 } else { self.latencies.iter().position(reached).map_or(0.0, bucket_ms) }
    }

    /// As it is printed.
    pub fn json(&self) -> Json {
        let Self { operations, failed, unknown, lost, stale, latencies: _ } = self;
        json!({
            "operations": operations, "failed": failed, "lost": lost, "unknown": unknown, "stale": stale,
            "p99_ms": self.quantile_ms(0.99), "longest_ms": self.quantile_ms(1.0),
        })
    }
}

#[derive(Default)]
struct Tally {
    operations: AtomicU64,
    failed: AtomicU64,
    unknown: AtomicU64,
    lost: AtomicU64,
    stale: AtomicU64,
    latencies: Vec<AtomicU64>,
}

impl Tally {
    fn new() -> Self {
        let mut latencies = Vec::new();
        latencies.resize_with(BUCKETS, AtomicU64::default);
        Self { latencies, ..Self::default() }
    }

    fn answered(&self, start: Instant) {
        self.operations.fetch_add(1, Relaxed);
        let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.latencies[bucket(us)].fetch_add(1, Relaxed);
    }

    fn tell(counter: &AtomicU64, what: &str, words: &str) {
        if counter.fetch_add(1, Relaxed) < TOLD {
            eprintln!("{}", json!({what: words}));
        }
    }

    fn counts(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        Counts {
            operations: of(&self.operations),
            failed: of(&self.failed),
            unknown: of(&self.unknown),
            lost: of(&self.lost),
            stale: of(&self.stale),
            latencies: self.latencies.iter().map(of).collect(),
        }
    }
}

/// A record that was there before the load and that nobody changes: its key and its value's hash.
pub type Given = (Bytes, u64);

/// The records of a file of JSON lines, as `vasto load` takes them.
///
/// # Errors
/// A file that can't be read, or a line without `key` and `value`.
pub fn given(path: &Path) -> anyhow::Result<Vec<(Bytes, Bytes)>> {
    let file = File::open(path).with_context(|| format!("can't open {}", path.display()))?;
    let mut records = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("{}", path.display()))?;
        let record: Json = serde_json::from_str(&line).unwrap_or_default();
        let field = |name: &str| record[name].as_str().map(|text| Bytes::copy_from_slice(text.as_bytes()));
        let (Some(key), Some(value)) = (field("key"), field("value")) else {
            anyhow::bail!("{}: line {} has no key and value of text", path.display(), number + 1);
        };
        records.push((key, value));
    }
    Ok(records)
}

/// What a verification of every key found.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Keys read.
    pub keys: usize,
    /// Those that were wrong to the end, in words.
    pub wrong: Vec<String>,
}

impl Verdict {
    /// As it is printed.
    pub fn json(&self) -> Json {
        json!({"keys": self.keys, "lost": self.wrong.len(), "first": self.wrong.iter().take(10).collect::<Vec<_>>()})
    }
}

/// The load on one keyspace.
pub struct Load {
    keyspace: Keyspace,
    settings: Settings,
    ledger: Ledger,
    given: Vec<Given>,
    tally: Tally,
    marked: Mutex<Counts>,
    /// Held by each operation, and alone by a verification.
    gate: RwLock<()>,
    stop: AtomicBool,
}

impl Load {
    /// A load that takes up its ledger, and watches over the given records too.
    ///
    /// # Errors
    /// A ledger that can't be opened, or is of another size.
    pub fn new(
        keyspace: Keyspace,
        settings: Settings,
        ledger: Option<&Path>,
        given: Vec<Given>,
    ) -> anyhow::Result<Arc<Self>> {
        let ledger = Ledger::open(ledger, settings.keys).context("the ledger")?;
        Ok(Arc::new(Self {
            keyspace,
            settings,
            ledger,
            given,
            tally: Tally::new(),
            marked: Mutex::default(),
            gate: RwLock::default(),
            stop: AtomicBool::default(),
        }))
    }

    /// Puts these records, all of them.
    ///
    /// # Errors
    /// The first that was refused.
    pub async fn put_given(keyspace: &Keyspace, records: &[(Bytes, Bytes)]) -> anyhow::Result<()> {
        for chunk in records.chunks(TOGETHER) {
            let puts: Vec<Op> = chunk.iter().map(|(key, value)| Op::put(key.clone(), value.clone())).collect();
            for answer in keyspace.batch(puts).await {
                answer?;
            }
        }
        Ok(())
    }

    /// Writes every key of its own that has not been written yet, once.
    pub async fn fill(&self) {
        let writer = |first: usize| async move {
            for key in self.keys_of(first).filter(|key| self.ledger.bounds(*key).attempted == 0) {
                self.write(key).await;
            }
        };
        join_all((0..self.settings.writers).map(writer)).await;
    }

    /// Writes and reads until [`Self::stop`].
    pub async fn run(self: &Arc<Self>) {
        let mut tasks = tokio::task::JoinSet::new();
        for first in 0..self.settings.writers {
            let load = self.clone();
            tasks.spawn(async move {
                let mut random: StdRng = rand::make_rng();
                let keys: Vec<usize> = load.keys_of(first).collect();
                while !keys.is_empty() && !load.stop.load(Relaxed) {
                    load.write(keys[random.random_range(0..keys.len())]).await;
                    load.rest(&mut random).await;
                }
            });
        }
        for _ in 0..self.settings.readers {
            let load = self.clone();
            tasks.spawn(async move {
                let mut random: StdRng = rand::make_rng();
                while !load.stop.load(Relaxed) {
                    // One half of the reads goes to each of what changes and what doesn't.
                    match load.given.len() {
                        0 => load.read(random.random_range(0..load.settings.keys)).await,
                        _ if random.random() => load.read(random.random_range(0..load.settings.keys)).await,
                        given => load.read_given(random.random_range(0..given)).await,
                    }
                    load.rest(&mut random).await;
                }
            });
        }
        tasks.join_all().await;
    }

    /// Ends [`Self::run`], once what is under way has been answered.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.tally.counts()
    }

    /// What happened since the last mark; this is the next one.
    pub fn mark(&self) -> Counts {
        let now = self.counts();
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.since(&marked);
        *marked = now;
        since
    }

    /// Holds the load still and reads every key. What is wrong is read again for this
    /// long: replicas become equal, and not at once.
    pub async fn verify(&self, settle: Duration) -> Verdict {
        let _alone = self.gate.write().await;
        let deadline = Instant::now() + settle;
        let keys = self.settings.keys + self.given.len();
        let mut left: Vec<usize> = (0..keys).collect();
        loop {
            let mut wrong = Vec::new();
            for chunk in left.chunks(TOGETHER) {
                let gets: Vec<Op> = chunk.iter().map(|key| Op::get(self.name(*key))).collect();
                let answers = self.keyspace.batch(gets).await;
                for (key, answer) in chunk.iter().zip(answers) {
                    if let Err(words) = self.judge(*key, answer.map(Outcome::value)) {
                        wrong.push((*key, words));
                    }
                }
            }
            if wrong.is_empty() || Instant::now() > deadline {
                return Verdict { keys, wrong: wrong.into_iter().map(|(_, words)| words).collect() };
            }
            left = wrong.into_iter().map(|(key, _)| key).collect();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn keys_of(&self, writer: usize) -> impl Iterator<Item = usize> + use<> {
        (writer..self.settings.keys).step_by(self.settings.writers.max(1))
    }

    async fn rest(&self, random: &mut StdRng) {
        let most = u64::try_from(self.settings.pause.as_micros()).unwrap_or(u64::MAX);
        tokio::time::sleep(Duration::from_micros(random.random_range(0..=most))).await;
    }

    /// The name of a key of its own, or, behind those, of a given one.
    fn name(&self, key: usize) -> Bytes {
        match key.checked_sub(self.settings.keys) {
            Some(given) => self.given[given].0.clone(),
            None => format!("load/{}/{key:06}", self.settings.range).into(),
        }
    }

    /// Version, line feed, and a text that belongs to the key: 0 to 3 KB of it.
    fn value(key: usize, version: u64) -> String {
        format!("{version}\n{}", format!("{key:06} ").repeat(key * 37 % 431))
    }

    /// Which write left this, or what is wrong with it in any case.
    fn found(key: usize, value: Option<&Value>) -> Result<Found, String> {
        let Some(value) = value else { return Ok(Found::Nothing) };
        if Kind::of(key) == Kind::Counter {
            let whole = value.number().filter(|n| *n >= 0.0 && n.fract() == 0.0);
            return whole.map(|n| Found::Version(n as u64)).ok_or_else(|| format!("{:?} is no count", value.data));
        }
        let text = value.bytes().and_then(|b| std::str::from_utf8(b).ok()).unwrap_or_default();
        let version = text.split('\n').next().and_then(|v| v.parse().ok()).unwrap_or(0);
        if version == 0 || text != Self::value(key, version) {
            return Err(format!("{} bytes that nobody wrote: {:.40?}", text.len(), text));
        }
        Ok(Found::Version(version))
    }

    /// Whether this may stand there when all is quiet.
    fn judge(&self, key: usize, answer: Result<Option<Value>, Error>) -> Result<(), String> {
        let name = String::from_utf8_lossy(&self.name(key)).into_owned();
        let value = answer.map_err(|error| format!("{name}: {error}"))?;
        if let Some(given) = key.checked_sub(self.settings.keys) {
            return self.judge_given(given, value.as_ref()).map_err(|words| format!("{name}: {words}"));
        }
        let bounds = self.ledger.bounds(key);
        let found = Self::found(key, value.as_ref()).map_err(|words| format!("{name}: {words}"))?;
        if bounds.hold(Kind::of(key), found) { Ok(()) } else { Err(format!("{name}: {found:?}, {bounds:?}")) }
    }

    fn judge_given(&self, given: usize, value: Option<&Value>) -> Result<(), String> {
        match value.map(Value::bytes) {
            Some(Some(bytes)) if partition_hash(bytes) == self.given[given].1 => Ok(()),
            Some(Some(bytes)) => Err(format!("{} bytes that are not what was given", bytes.len())),
            Some(None) => Err("a number instead of what was given".to_owned()),
            None => Err("nothing, instead of what was given".to_owned()),
        }
    }

    async fn write(&self, key: usize) {
        let _open = self.gate.read().await;
        let before = self.ledger.bounds(key);
        let next = before.attempted + 1;
        self.note(key, Bounds { attempted: next, ..before });
        let (name, kind) = (self.name(key), Kind::of(key));
        let start = Instant::now();
        let result = match kind {
            Kind::Counter => self.keyspace.add(&name, 1.0).await,
            Kind::Churn if next.is_multiple_of(2) => self.keyspace.delete(&name).await,
            Kind::Put | Kind::Churn => self.keyspace.put(&name, Self::value(key, next)).await,
        };
        match result {
            Ok(()) => {
                self.tally.answered(start);
                let acknowledged = if kind == Kind::Counter { before.acknowledged + 1 } else { next };
                self.note(key, Bounds { acknowledged, attempted: next });
            }
            Err(error @ Error::Unknown(_)) => Tally::tell(&self.tally.unknown, "unknown", &error.to_string()),
            Err(error) => {
                // A merge that ends in another error was not executed.
                if kind == Kind::Counter {
                    self.note(key, before);
                }
                Tally::tell(&self.tally.failed, "failed", &error.to_string());
            }
        }
    }

    fn note(&self, key: usize, bounds: Bounds) {
        if let Err(error) = self.ledger.set(key, bounds) {
            Tally::tell(&self.tally.failed, "failed", &format!("the ledger: {error}"));
        }
    }

    async fn read(&self, key: usize) {
        let _open = self.gate.read().await;
        let name = self.name(key);
        let before = self.ledger.bounds(key);
        let start = Instant::now();
        let value = match self.keyspace.get(&name).await {
            Ok(value) => value,
            Err(error) => return Tally::tell(&self.tally.failed, "failed", &error.to_string()),
        };
        self.tally.answered(start);
        // What was acknowledged before it began, what was tried when it ended.
        let bounds = Bounds { acknowledged: before.acknowledged, attempted: self.ledger.bounds(key).attempted };
        let name = String::from_utf8_lossy(&name);
        match Self::found(key, value.as_ref()) {
            Ok(found) if !bounds.allow(Kind::of(key), found) => {
                Tally::tell(&self.tally.lost, "lost", &format!("{name}: {found:?}, {bounds:?}"));
            }
            Ok(Found::Version(version)) if version < bounds.acknowledged => {
                self.tally.stale.fetch_add(1, Relaxed);
            }
            Ok(_) => {}
            Err(words) => Tally::tell(&self.tally.lost, "lost", &format!("{name}: {words}")),
        }
    }

    async fn read_given(&self, given: usize) {
        let _open = self.gate.read().await;
        let name = &self.given[given].0;
        let start = Instant::now();
        match self.keyspace.get(name).await {
            Ok(value) => {
                self.tally.answered(start);
                if let Err(words) = self.judge_given(given, value.as_ref()) {
                    Tally::tell(&self.tally.lost, "lost", &format!("{}: {words}", String::from_utf8_lossy(name)));
                }
            }
            Err(error) => Tally::tell(&self.tally.failed, "failed", &error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn bounds(acknowledged: u64, attempted: u64) -> Bounds {
        Bounds { acknowledged, attempted }
    }

    #[test]
    fn in_the_end_only_the_acknowledged_or_an_unknown_later_one_stands() {
        let version = Found::Version;
        for (kind, bounds, found, holds) in [
            (Kind::Put, bounds(3, 3), version(3), true),
            (Kind::Put, bounds(3, 3), version(2), false),
            (Kind::Put, bounds(3, 5), version(5), true),
            (Kind::Put, bounds(3, 5), version(6), false),
            (Kind::Put, bounds(3, 5), Found::Nothing, false),
            (Kind::Put, bounds(0, 1), Found::Nothing, true),
            (Kind::Counter, bounds(7, 9), version(8), true),
            (Kind::Counter, bounds(7, 9), version(10), false),
            (Kind::Churn, bounds(4, 4), Found::Nothing, true),
            (Kind::Churn, bounds(5, 5), Found::Nothing, false),
            (Kind::Churn, bounds(5, 6), Found::Nothing, true),
            (Kind::Churn, bounds(5, 5), version(5), true),
            (Kind::Churn, bounds(4, 4), version(3), false),
            (Kind::Churn, bounds(4, 5), version(4), false),
        ] {
            assert_eq!(bounds.hold(kind, found), holds, "{kind:?} {bounds:?} {found:?}");
        }
    }

    #[test]
    fn a_read_may_be_old_but_not_from_the_future_and_not_empty() {
        let version = Found::Version;
        for (kind, bounds, found, allowed) in [
            (Kind::Put, bounds(3, 3), version(1), true),
            (Kind::Put, bounds(3, 3), version(4), false),
            (Kind::Put, bounds(3, 3), Found::Nothing, false),
            (Kind::Put, bounds(0, 1), Found::Nothing, true),
            (Kind::Churn, bounds(5, 5), Found::Nothing, true),
            (Kind::Churn, bounds(5, 5), version(2), false),
        ] {
            assert_eq!(bounds.allow(kind, found), allowed, "{kind:?} {bounds:?} {found:?}");
        }
    }

    #[test]
    fn a_value_says_which_write_it_is() {
        let value =
            |text: &str| Value { data: text.into(), expiry_ms: None, stamp: vasto_client::Stamp::default(), size: 1 };
        let good = Load::value(5, 12);
        assert_eq!(Load::found(5, Some(&value(&good))), Ok(Found::Version(12)));
        assert_eq!(Load::found(5, None), Ok(Found::Nothing));
        assert!(Load::found(5, Some(&value(&good[..good.len() - 1]))).is_err(), "cut");
        assert!(Load::found(6, Some(&value(&good))).is_err(), "of another key");
        assert!(Load::found(3, Some(&value(&good))).is_err(), "bytes where a number is");
    }

    #[test]
    fn a_ledger_is_taken_up_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let ledger = Ledger::open(Some(&path), 3).unwrap();
        ledger.set(1, bounds(4, 5)).unwrap();
        drop(ledger);
        let ledger = Ledger::open(Some(&path), 3).unwrap();
        assert_eq!((ledger.bounds(0), ledger.bounds(1)), (bounds(0, 0), bounds(4, 5)));
        assert!(Ledger::open(Some(&path), 4).is_err(), "of another load");
    }

    #[test]
    fn latencies_are_told_an_eighth_too_high_at_most() {
        for us in [1, 9, 100, 1_000, 12_345, 999_999, 60_000_000] {
            let told = bucket_ms(bucket(us)) * 1e3;
            assert!(told >= us as f64 && told <= us.max(8) as f64 * 1.126 + 1.0, "{us}: {told}");
        }
        let tally = Tally::new();
        for _ in 0..98 {
            tally.latencies[bucket(1_000)].fetch_add(1, Relaxed);
        }
        tally.latencies[bucket(50_000)].fetch_add(2, Relaxed);
        let counts = tally.counts();
        assert!((1.0..1.2).contains(&counts.quantile_ms(0.98)), "{}", counts.quantile_ms(0.98));
        assert!((50.0..57.0).contains(&counts.quantile_ms(0.99)), "{}", counts.quantile_ms(0.99));
        assert_eq!(counts.since(&counts).quantile_ms(1.0), 0.0);
    }
}
