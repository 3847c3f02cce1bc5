//! Writers and readers that never stop while a cluster changes, and the oracle
//! that knows for each key what may be read at the end: what was acknowledged,
//! or a write whose outcome nobody knows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use vasto_client::{Keyspace, Op, Outcome};

/// How long replicas that are served have to get the last changes.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(10);

/// A key's value is its writer's version, a line feed, and the package's own text.
fn value(version: u64, text: &str) -> String {
    format!("{version}\n{text}")
}

fn version(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|v| v.lines().next()).and_then(|v| v.parse().ok()).unwrap_or(0)
}

#[derive(Clone, Copy, Debug, Default)]
struct Expected {
    acknowledged: u64,
    attempted: u64,
}

/// What happened while the load ran.
#[derive(Default)]
pub struct Counts {
    /// Acknowledged writes.
    pub writes: AtomicU64,
    /// Answered reads.
    pub reads: AtomicU64,
    /// Operations that ended in an error.
    pub failed: Mutex<Vec<String>>,
    latencies_us: Mutex<Vec<u32>>,
}

/// A load on some keys; each writer has its own, so that the oracle knows the order.
pub struct Load {
    keyspace: Keyspace,
    keys: Arc<Vec<(String, String)>>,
    expected: Vec<Arc<Mutex<BTreeMap<usize, Expected>>>>,
    /// What happened.
    pub counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    /// Whether an error is a failure (else it is just an unknown outcome).
    strict: bool,
}

impl Load {
    /// Puts every key once, in batches.
    pub async fn fill(keyspace: Keyspace, keys: Vec<(String, String)>, strict: bool) -> Self {
        for chunk in keys.chunks(500) {
            let ops: Vec<Op> = chunk.iter().map(|(k, text)| Op::put(k.clone(), value(1, text))).collect();
            for (result, (key, _)) in keyspace.batch(ops).await.into_iter().zip(chunk) {
                assert!(matches!(result, Ok(Outcome::Written { .. })), "{key}: {result:?}");
            }
        }
        Self {
            keyspace,
            keys: Arc::new(keys),
            expected: Vec::new(),
            counts: Arc::default(),
            stop: Arc::default(),
            tasks: Vec::new(),
            strict,
        }
    }

    /// Starts this many writers and readers.
    pub fn run(&mut self, writers: usize, readers: usize) {
        for i in 0..writers {
            let expected = Arc::new(Mutex::new(BTreeMap::new()));
            self.expected.push(expected.clone());
            let (keyspace, keys, counts, stop) =
                (self.keyspace.clone(), self.keys.clone(), self.counts.clone(), self.stop.clone());
            self.tasks.push(tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(i as u64);
                while !stop.load(Ordering::Relaxed) {
                    let key = random.random_range(0..keys.len() / writers) * writers + i;
                    let next = {
                        let mut expected = expected.lock().unwrap();
                        let e: &mut Expected =
                            expected.entry(key).or_insert(Expected { acknowledged: 1, attempted: 1 });
                        e.attempted += 1;
                        e.attempted
                    };
                    let (name, text) = &keys[key];
                    let start = Instant::now();
                    match keyspace.put(name, value(next, text)).await {
                        Ok(()) => {
                            counts.done(start, &counts.writes);
                            expected.lock().unwrap().get_mut(&key).unwrap().acknowledged = next;
                        }
                        Err(error) => counts.failed.lock().unwrap().push(format!("put {name}: {error}")),
                    }
                    tokio::time::sleep(Duration::from_millis(random.next_u64() % 4)).await;
                }
            }));
        }
        for i in 0..readers {
            let (keyspace, keys, counts, stop) =
                (self.keyspace.clone(), self.keys.clone(), self.counts.clone(), self.stop.clone());
            self.tasks.push(tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(1_000 + i as u64);
                while !stop.load(Ordering::Relaxed) {
                    let (name, _) = &keys[random.random_range(0..keys.len())];
                    let start = Instant::now();
                    match keyspace.get(name).await {
                        Ok(Some(_)) => counts.done(start, &counts.reads),
                        Ok(None) => counts.failed.lock().unwrap().push(format!("get {name}: not found")),
                        Err(error) => counts.failed.lock().unwrap().push(format!("get {name}: {error}")),
                    }
                    tokio::time::sleep(Duration::from_millis(random.next_u64() % 4)).await;
                }
            }));
        }
    }

    /// The p99 since the last call, ms.
    pub fn p99_ms(&self) -> f64 {
        let mut all = std::mem::take(&mut *self.counts.latencies_us.lock().unwrap());
        all.sort_unstable();
        all.get(all.len().saturating_sub(1).min(all.len() * 99 / 100)).map_or(0.0, |us| f64::from(*us) / 1e3)
    }

    /// Ends the load.
    pub async fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks.drain(..) {
            task.await.unwrap();
        }
    }

    /// Reads every key and holds it against what may be there. A replica that has just been served again may be some
    /// changes behind: it has a while to get them.
    pub async fn verify(&self) {
        let failed = self.counts.failed.lock().unwrap().clone();
        assert!(
            !self.strict || failed.is_empty(),
            "{} operations failed, first: {:?}",
            failed.len(),
            &failed[..failed.len().min(5)]
        );
        let mut expected: BTreeMap<usize, Expected> = BTreeMap::new();
        for map in &self.expected {
            expected.extend(map.lock().unwrap().iter().map(|(k, e)| (*k, *e)));
        }
        let deadline = Instant::now() + CATCHES_UP_WITHIN;
        let mut wrong = self.wrong(&expected).await;
        while !wrong.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
            wrong = self.wrong(&expected).await;
        }
        assert!(wrong.is_empty(), "{} keys are wrong, first: {:?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    }

    /// The keys that do not hold what may be there.
    async fn wrong(&self, expected: &BTreeMap<usize, Expected>) -> Vec<String> {
        let mut wrong = Vec::new();
        for (chunk_index, chunk) in self.keys.chunks(500).enumerate() {
            let results = self.keyspace.batch(chunk.iter().map(|(k, _)| Op::get(k.clone()))).await;
            for (i, (result, (key, text))) in results.into_iter().zip(chunk).enumerate() {
                let may = expected
                    .get(&(chunk_index * 500 + i))
                    .copied()
                    .unwrap_or(Expected { acknowledged: 1, attempted: 1 });
                match result.map(Outcome::value) {
                    Ok(Some(found)) => {
                        let bytes = found.bytes().cloned().unwrap_or_default();
                        let version = version(&bytes);
                        if version < may.acknowledged || version > may.attempted || bytes != value(version, text) {
                            wrong.push(format!("{key}: version {version}, {may:?}"));
                        }
                    }
                    other => wrong.push(format!("{key}: {other:?}")),
                }
            }
        }
        wrong
    }
}

impl Counts {
    fn done(&self, start: Instant, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
        self.latencies_us.lock().unwrap().push(start.elapsed().as_micros() as u32);
    }
}
