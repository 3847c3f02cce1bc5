//! A soak: real processes that are killed, frozen and asked for other sizes at
//! random moments for as long as wanted, under clients that record all they do.
//! After each cycle everything heals, and the oracle of `history` judges.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Value as Json, json};
use tokio::sync::RwLock;
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1;
use vasto_client::{Client, Code, Env, Error, Keyspace, Outcome as Answer};

use crate::cluster::{Cluster, topology};
use crate::history::{Event, Fault, Finals, History, Op, Outcome, Seen, Tally, Violation, check};
use crate::pinned::{At, Pinned, Turn, keys_of, place};

const NAME: &str = "soak";
/// One more than the greatest size, for a surge replica.
const STORES: u32 = 5;
const MOST_SHARDS: u32 = 4;
const MOST_COPIES: u32 = 3;
/// How long an operation may try.
const DEADLINE: Duration = Duration::from_secs(5);
/// What two busy cores may add to that.
const SLACK: Duration = Duration::from_secs(3);
/// Within this a healed cluster must be Ready, and its replicas equal.
const HEAL_S: u64 = 90;
const CONVERGE: Duration = Duration::from_secs(30);
/// Clients that go through the library, and clients that each speak to one replica.
const WRITERS: u32 = 6;
const PINNED: u32 = 3;
/// Keys that are written in all cycles.
const LASTING: u64 = 200;
/// Keys that come and go with a cycle, of each kind.
const PASSING: u64 = 30;
/// After so many cycles counters are left alone: each start of a store takes one of a key's 256 slots.
const COUNTER_CYCLES: u64 = 8;
/// So often all keys that were ever written are judged, not only the recent ones.
const ALL_KEYS: u64 = 20;

/// What is asked of a soak.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What all random choices come from.
    pub seed: u64,
    /// How many cycles at the most.
    pub cycles: Option<u64>,
    /// When to begin no further one.
    pub time: Option<Duration>,
}

/// What happened to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strike {
    /// SIGKILL of one store.
    KillStore,
    /// SIGKILL of several stores.
    KillSome,
    /// SIGKILL of all stores.
    KillStores,
    /// SIGKILL of the operator.
    KillOperator,
    /// SIGKILL of all.
    KillAll,
    /// SIGSTOP of a store, SIGCONT later.
    Freeze,
    /// Another size is wanted.
    ChangeMind,
}

/// What a soak came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What the keyspace's writes were synced by.
    pub durability: String,
    /// Cycles done.
    pub cycles: u64,
    /// How long it took.
    pub took: Duration,
    /// How often what happened in which phase.
    pub strikes: BTreeMap<(Strike, String), u64>,
    /// What the clients did.
    pub tally: Tally,
    /// Reads that a pinned client did, and so were held against all it had seen.
    pub pinned_reads: u64,
    /// Changes of size or store that were finished.
    pub changes: u64,
    /// What the oracle found.
    pub violations: Vec<Violation>,
    /// What else went wrong: no healing, a process that ended by itself, an answer that should not be.
    pub problems: Vec<String>,
}

impl Report {
    /// Whether nothing was wrong.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty() && self.problems.is_empty()
    }

    fn of(&self, fault: Fault) -> usize {
        self.violations.iter().filter(|v| v.fault == fault).count()
    }

    /// Acknowledged writes that are not there.
    pub fn lost(&self) -> usize {
        self.of(Fault::Lost) + self.of(Fault::Undone)
    }

    /// For programs.
    pub fn json(&self) -> Json {
        let mut strikes = json!({});
        for ((strike, phase), count) in &self.strikes {
            strikes[format!("{strike:?}")][phase] = (*count).into();
        }
        let faults: BTreeMap<String, usize> = Fault::ALL.map(|f| (format!("{f:?}"), self.of(f))).into();
        json!({
            "seed": self.seed,
            "durability": self.durability,
            "cycles": self.cycles,
            "seconds": self.took.as_secs_f64(),
            "strikes": strikes,
            "changes": self.changes,
            "acknowledged": self.tally.acknowledged,
            "lost": self.lost(),
            "indeterminate": self.tally.unknown,
            "refused": self.tally.refused,
            "reads": self.tally.reads,
            "pinned_reads": self.pinned_reads,
            "longest_ms": self.tally.longest.as_millis() as u64,
            "faults": faults,
            "violations": self.violations.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "problems": self.problems,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases: BTreeSet<&String> = self.strikes.keys().map(|(_, phase)| phase).collect();
        write!(f, "{:<14}", "strike")?;
        phases.iter().try_for_each(|phase| write!(f, "{phase:>10}"))?;
        writeln!(f, "{:>10}", "all")?;
        let kinds: BTreeSet<Strike> = self.strikes.keys().map(|(strike, _)| *strike).collect();
        for strike in kinds {
            let count = |phase: &String| self.strikes.get(&(strike, phase.clone())).copied().unwrap_or(0);
            write!(f, "{:<14}", format!("{strike:?}"))?;
            phases.iter().try_for_each(|phase| write!(f, "{:>10}", count(phase)))?;
            writeln!(f, "{:>10}", phases.iter().map(|phase| count(phase)).sum::<u64>())?;
        }
        writeln!(f)?;
        for (name, value) in [
            ("seed", self.seed.to_string()),
            ("durability", self.durability.clone()),
            ("cycles", self.cycles.to_string()),
            ("time", format!("{:.1?}, {:.1?} a cycle", self.took, self.took / self.cycles.max(1) as u32)),
            ("changes finished", self.changes.to_string()),
            ("writes acknowledged", self.tally.acknowledged.to_string()),
            ("  lost", self.lost().to_string()),
            ("  indeterminate", self.tally.unknown.to_string()),
            ("  refused", self.tally.refused.to_string()),
            ("reads", format!("{}, of which {} pinned", self.tally.reads, self.pinned_reads)),
            ("longest operation", format!("{:.1?}", self.tally.longest)),
        ] {
            writeln!(f, "{name:<22}{value}")?;
        }
        for fault in Fault::ALL {
            writeln!(f, "{:<22}{}", format!("{fault:?}").to_lowercase(), self.of(fault))?;
        }
        self.violations.iter().take(50).try_for_each(|violation| writeln!(f, "{violation}"))?;
        self.problems.iter().take(50).try_for_each(|problem| writeln!(f, "{problem}"))
    }
}

/// What all clients share.
struct Shared {
    start: Instant,
    history: Mutex<History>,
    tally: Mutex<Tally>,
    pinned_reads: AtomicU64,
    problems: Mutex<Vec<String>>,
    cycle: AtomicU64,
    /// Clients hold it while they work; the controller takes it whole to look in peace.
    gate: RwLock<()>,
    stop: AtomicBool,
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn record(&self, key: Bytes, event: Event) {
        self.tally.lock().unwrap().count(&event);
        let pinned = event.replica.is_some() && event.op == Op::Get;
        self.pinned_reads.fetch_add(u64::from(pinned), Relaxed);
        self.history.lock().unwrap().record(key, event);
    }
}

/// Puts of one client; no two are equal, and sizes differ.
fn text(client: u32, number: u64) -> Bytes {
    let unique = format!("{client}/{number};");
    unique.repeat(1 + (number % 7) as usize * 8).into()
}

fn counter(cycle: u64, number: u64) -> Bytes {
    format!("counter/{:05}/{number}", cycle / COUNTER_CYCLES).into()
}

/// The next write of a client, or a read.
fn choose(random: &mut StdRng, client: u32, number: &mut u64, cycle: u64) -> (Bytes, Op) {
    *number += 1;
    let passing = random.random_range(0..PASSING);
    let lasting: Bytes = format!("lasting/{}", random.random_range(0..LASTING)).into();
    match random.random_range(0..100) {
        0..30 => (lasting, Op::Put(text(client, *number).into())),
        30..40 => (lasting, Op::Delete),
        40..52 => (counter(cycle, passing), Op::Add(random.random_range(1..10).into())),
        52..64 => (format!("list/{cycle:05}/{passing}").into(), Op::Append(format!("{client}/{number}\n").into())),
        64..70 => (format!("once/{cycle:05}/{passing}").into(), Op::Put(text(client, *number).into())),
        70..76 => (format!("once/{cycle:05}/{passing}").into(), Op::Delete),
        76..90 => (lasting, Op::Get),
        90..95 => (counter(cycle, passing), Op::Get),
        _ => (format!("list/{cycle:05}/{passing}").into(), Op::Get),
    }
}

fn library(key: &Bytes, op: &Op) -> vasto_client::Op {
    let key = key.clone();
    match op.clone() {
        Op::Put(data) => vasto_client::Op::put(key, data),
        Op::Delete => vasto_client::Op::delete(key),
        Op::Add(number) => vasto_client::Op::add(key, number),
        Op::Append(element) => vasto_client::Op::append(key, element),
        Op::Get => vasto_client::Op::get(key),
    }
}

/// What a client's error says of what was done; `Err` where it should not have come.
fn unanswered(op: &Op, error: &Error) -> Result<Outcome, String> {
    let merge = matches!(op, Op::Add(_) | Op::Append(_));
    match error.code() {
        Code::Unknown | Code::Deadline => Ok(Outcome::Unknown),
        // "A merge was not executed; a put or delete of which an earlier try was cut off may still be seen."
        Code::Unavailable | Code::Overloaded if merge => Ok(Outcome::Refused),
        Code::Unavailable | Code::Overloaded => Ok(Outcome::Unknown),
        _ => Err(format!("{op:?}: {error}")),
    }
}

/// A client as programs are: whichever replica answers.
async fn write(shared: Arc<Shared>, keyspace: Keyspace, client: u32, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed ^ u64::from(client));
    let mut number = 0;
    while !shared.stop.load(Relaxed) {
        let _open = shared.gate.read().await;
        let cycle = shared.cycle.load(Relaxed);
        let mut ops: BTreeMap<Bytes, Op> = BTreeMap::new();
        for _ in 0..random.random_range(1..8) {
            let (key, op) = choose(&mut random, client, &mut number, cycle);
            ops.insert(key, op);
        }
        let invoked_at = shared.now();
        let asked: Vec<vasto_client::Op> = ops.iter().map(|(key, op)| library(key, op)).collect();
        let answers = keyspace.batch(asked).await;
        let returned_at = shared.now();
        for ((key, op), answer) in ops.into_iter().zip(answers) {
            let outcome = match answer {
                Ok(Answer::Written(stamp) | Answer::Returned(stamp, _)) => Ok(Outcome::Acknowledged(stamp)),
                Ok(Answer::Found(value)) => Ok(Outcome::Read(Some((value.data, value.stamp)))),
                Ok(Answer::Nothing) => Ok(Outcome::Read(None)),
                Err(error) => unanswered(&op, &error),
            };
            let outcome = outcome.unwrap_or_else(|words| {
                shared.problems.lock().unwrap().push(words);
                Outcome::Unknown
            });
            shared.record(key, Event { client, op, invoked_at, returned_at, replica: None, outcome });
        }
        drop(_open);
        tokio::time::sleep(Duration::from_millis(random.random_range(0..6))).await;
    }
}

/// A client that speaks to one replica for as long as it can, on keys that only it writes: it must see its own
/// writes, and never less than it has seen.
async fn pin(shared: Arc<Shared>, keyspace: Keyspace, client: u32, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed ^ u64::from(client));
    let (env, mut number, mut after) = (Env::real(), 0, None);
    while !shared.stop.load(Relaxed) {
        // Never idle: where nobody can be asked, the topology soon says otherwise.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let cycle = shared.cycle.load(Relaxed);
        let base = format!("pinned/{client}/{cycle:05}/{}", random.random_range(0..4));
        let Some(place) = place(&keyspace, base.as_bytes(), &mut random) else { continue };
        let keys = keys_of(&base, &place.at);
        let Ok(pinned) = Pinned::connect(&env, place.at, DEADLINE).await else { continue };
        let (now, record) = (|| shared.now(), |key, event| shared.record(key, event));
        let mut turn = Turn::new(pinned, client, &mut after, &now, &record);
        for _ in 0..random.random_range(1..60) {
            let _open = shared.gate.read().await;
            if shared.cycle.load(Relaxed) != cycle {
                break;
            }
            number += 1;
            let (key, op) = match random.random_range(0..4) {
                0 => (&keys[0], Op::Put(text(client, number).into())),
                1 => (&keys[0], Op::Delete),
                2 => (&keys[1], Op::Add(random.random_range(1..10).into())),
                _ => (&keys[2], Op::Append(format!("{client}/{number}\n").into())),
            };
            if !turn.write(key, op).await || !turn.read(&keys).await {
                break;
            }
        }
        // Reads of a cycle that was judged are of no use.
        let _open = shared.gate.read().await;
        shared.problems.lock().unwrap().append(&mut turn.problems);
        if shared.cycle.load(Relaxed) == cycle {
            turn.end();
        }
    }
}

/// What a soak has at hand while it runs.
struct Soak {
    cluster: Cluster,
    random: StdRng,
    shared: Arc<Shared>,
    report: Report,
    /// What is wished for.
    wanted: (u32, u32),
    /// Keys that nobody writes any more, with what may stand there.
    old: History,
    phase: String,
}

/// Runs a soak; tells each cycle through `tell`.
pub async fn run(settings: &Settings, mut tell: impl FnMut(&str)) -> anyhow::Result<Report> {
    let mut random = StdRng::seed_from_u64(settings.seed);
    let durability = ["Synced", "Periodic"][random.random_range(0..2)];
    let document = format!(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: {NAME}\n\
         spec:\n  shards: 2\n  replicationFactor: 2\n  durability: {durability}\n"
    );
    let cluster = Cluster::start(STORES, &document);
    cluster.settles(NAME, 2, 2, HEAL_S).await.map_err(anyhow::Error::msg)?;
    let start = Instant::now();
    let shared = Arc::new(Shared {
        start,
        history: Mutex::new(History::new(DEADLINE + SLACK)),
        tally: Mutex::default(),
        pinned_reads: AtomicU64::new(0),
        problems: Mutex::default(),
        cycle: AtomicU64::new(0),
        gate: RwLock::new(()),
        stop: AtomicBool::new(false),
    });
    let mut clients = tokio::task::JoinSet::new();
    let mut handles = Vec::new();
    for client in 0..WRITERS + PINNED {
        // Three clients a session.
        if client % 3 == 0 {
            handles.push(Client::connect(&cluster.operator_address())?.deadline(DEADLINE).keyspace(NAME).await?);
        }
        let keyspace = handles.last().context("a client")?.clone();
        if client < WRITERS {
            clients.spawn(write(shared.clone(), keyspace, client, settings.seed));
        } else {
            clients.spawn(pin(shared.clone(), keyspace, client, settings.seed));
        }
    }
    let report = Report { seed: settings.seed, durability: durability.to_owned(), ..Report::default() };
    let (old, phase) = (History::default(), "Ready".to_owned());
    let mut soak = Soak { cluster, random, shared, report, wanted: (2, 2), old, phase };
    let over = |soak: &Soak| {
        settings.cycles.is_some_and(|cycles| soak.report.cycles >= cycles)
            || settings.time.is_some_and(|time| start.elapsed() >= time)
    };
    while !over(&soak) && soak.report.is_clean() {
        let begun = Instant::now();
        let told = match soak.cycle().await {
            Ok(told) => told,
            Err(error) => {
                soak.report.problems.push(format!("{error:#}"));
                break;
            }
        };
        let tally = *soak.shared.tally.lock().unwrap();
        tell(&format!(
            "cycle {:>4} {:>6.1?}  {told}; {} acknowledged, {} indeterminate",
            soak.report.cycles,
            begun.elapsed(),
            tally.acknowledged,
            tally.unknown
        ));
    }
    soak.shared.stop.store(true, Relaxed);
    if soak.report.is_clean()
        && let Err(error) = soak.judge_all().await
    {
        soak.report.problems.push(format!("{error:#}"));
    }
    clients.abort_all();
    soak.finish(start);
    Ok(soak.report)
}

impl Soak {
    async fn cycle(&mut self) -> anyhow::Result<String> {
        let (shards, copies) = self.wanted;
        let mut told = format!("{shards}x{copies}");
        self.change(&mut told).await;
        self.approach().await;
        let mut down = BTreeSet::new();
        for _ in 0..self.random.random_range(1..4) {
            let (strike, names) = self.strike(&mut down).await;
            told += &format!(", {strike:?} {names} in {}", self.phase);
            *self.report.strikes.entry((strike, self.phase.clone())).or_default() += 1;
            if self.random.random_bool(0.5) {
                self.start(&mut down);
            }
            self.rest(700).await;
        }
        self.start(&mut down);
        for name in self.cluster.store_names() {
            self.cluster.thaw_store(&name);
        }
        let resource = self.settled().await?;
        self.report.changes += u64::from((shards, copies) != self.wanted);
        self.judge(&resource, self.report.cycles.is_multiple_of(ALL_KEYS)).await?;
        self.report.cycles += 1;
        Ok(told)
    }

    /// Asks for another size or a store's replacement, most of the time.
    async fn change(&mut self, told: &mut String) {
        match self.random.random_range(0..10) {
            0..6 => {
                self.scale().await;
                *told += &format!(" to {}x{}", self.wanted.0, self.wanted.1);
            }
            6..8 => {
                let store = format!("store-{}", self.random.random_range(0..self.wanted.0));
                *told += &format!(", {store} replaced");
                // It may be under way already, or the operator may be busy: then it isn't.
                if let Err(status) = self.cluster.try_replace(NAME, &store).await {
                    *told += &format!(" (refused: {})", status.message());
                }
            }
            _ => {}
        }
    }

    async fn scale(&mut self) {
        let before = self.wanted;
        while self.wanted == before {
            let shards = self.random.random_range(1..=MOST_SHARDS);
            self.wanted = (shards, self.random.random_range(1..=shards.min(MOST_COPIES)));
        }
        self.cluster.scale(NAME, self.wanted.0, self.wanted.1).await;
    }

    async fn rest(&mut self, at_most_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.random.random_range(0..at_most_ms))).await;
    }

    /// Waits for a random phase where that comes soon, or for a random moment.
    async fn approach(&mut self) {
        let phases = ["Prepare", "Switch", "Fence", "Drain", "Cleanup"];
        if self.random.random_bool(0.6) {
            let phase = phases[self.random.random_range(0..phases.len())];
            let until = Instant::now() + Duration::from_secs(1);
            while Instant::now() < until && self.look().await != phase {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        } else {
            self.rest(400).await;
        }
    }

    async fn look(&mut self) -> &str {
        if let Some(phase) = self.cluster.phase(NAME).await {
            self.phase = phase;
        }
        &self.phase
    }

    async fn strike(&mut self, down: &mut BTreeSet<String>) -> (Strike, String) {
        self.look().await;
        let strike = match self.random.random_range(0..100) {
            0..35 => Strike::KillStore,
            35..50 => Strike::KillSome,
            50..60 => Strike::KillStores,
            60..70 => Strike::KillOperator,
            70..78 => Strike::KillAll,
            78..88 => Strike::Freeze,
            _ => Strike::ChangeMind,
        };
        let all = self.cluster.store_names();
        let some: Vec<String> = match strike {
            Strike::KillStore | Strike::Freeze => all.sample(&mut self.random, 1).cloned().collect(),
            Strike::KillSome => {
                let count = self.random.random_range(2..all.len());
                all.sample(&mut self.random, count).cloned().collect()
            }
            Strike::KillStores | Strike::KillAll => all.clone(),
            Strike::KillOperator | Strike::ChangeMind => Vec::new(),
        };
        let mut names = some.join(" ");
        match strike {
            Strike::Freeze => {
                some.iter().for_each(|name| self.cluster.freeze_store(name));
                self.rest(1_200).await;
                some.iter().for_each(|name| self.cluster.thaw_store(name));
            }
            Strike::ChangeMind => {
                // Whom nobody runs nobody can ask.
                self.start(down);
                self.scale().await;
                names = format!("to {}x{}", self.wanted.0, self.wanted.1);
            }
            _ => {
                if matches!(strike, Strike::KillOperator | Strike::KillAll) {
                    self.cluster.kill_operator();
                    down.insert("operator".to_owned());
                }
                some.iter().for_each(|name| self.cluster.kill_store(name));
                down.extend(some);
            }
        }
        (strike, names)
    }

    fn start(&mut self, down: &mut BTreeSet<String>) {
        for name in std::mem::take(down) {
            if name == "operator" {
                self.cluster.start_operator();
            } else {
                self.cluster.start_store(&name);
            }
        }
    }

    async fn settled(&mut self) -> anyhow::Result<Json> {
        let (shards, copies) = self.wanted;
        let settled = self.cluster.settles(NAME, shards, copies, HEAL_S).await;
        let ended = self.cluster.ended();
        if !ended.is_empty() {
            bail!("{}", ended.join(", "));
        }
        settled.map_err(anyhow::Error::msg)
    }

    /// Holds all clients still, waits until the replicas are equal, and asks the oracle.
    async fn judge(&mut self, resource: &Json, all_keys: bool) -> anyhow::Result<()> {
        let shared = self.shared.clone();
        let _closed = shared.gate.write().await;
        let history = std::mem::take(&mut *shared.history.lock().unwrap());
        let mut keys: Vec<Bytes> = history.keys.keys().cloned().collect();
        if all_keys {
            keys.extend(self.old.keys.keys().cloned());
        }
        let finals = self.converged(resource, &keys).await?;
        self.report.violations.extend(check(&history, &finals));
        if all_keys {
            self.report.violations.extend(check(&self.old, &finals));
        }
        self.report.problems.append(&mut shared.problems.lock().unwrap());
        let longest = history.longest;
        let mut history = history;
        history.settle(&finals);
        // What this cycle does not write any more: the next one's clients are asleep, so none of it is under way.
        let cycle = self.report.cycles + 1;
        let marks = [format!("/{cycle:05}/"), String::from_utf8_lossy(&counter(cycle, 0)[..14]).into_owned()];
        let (new, old) = history.keys.into_iter().partition(|(key, _)| {
            let key = String::from_utf8_lossy(key);
            key.starts_with("lasting/") || marks.iter().any(|mark| key.contains(mark.as_str()))
        });
        self.old.keys.append(&mut { old });
        *shared.history.lock().unwrap() = History { longest, keys: new };
        shared.cycle.store(cycle, Relaxed);
        Ok(())
    }

    /// What every replica says of these keys, once all say the same.
    async fn converged(&self, resource: &Json, keys: &[Bytes]) -> anyhow::Result<Finals> {
        let topology = topology(resource);
        let view = topology.current.clone().context("a topology without a view")?;
        let shards = view.size();
        let mut by_shard: BTreeMap<u32, Vec<Bytes>> = BTreeMap::new();
        for key in keys {
            by_shard.entry(jump_hash(partition_hash(key), shards)).or_default().push(key.clone());
        }
        let until = Instant::now() + CONVERGE;
        let mut finals = Finals::new();
        for (shard, keys) in by_shard {
            loop {
                match self.equal(&topology.uid, &view, shard, &keys).await {
                    Ok(found) => {
                        finals.extend(keys.into_iter().zip(found));
                        break;
                    }
                    Err(error) if Instant::now() > until => {
                        return Err(error.context(format!("shard {shard} of {shards}: not within {CONVERGE:?}")));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        }
        Ok(finals)
    }

    async fn equal(&self, uid: &str, view: &v1::View, shard: u32, keys: &[Bytes]) -> anyhow::Result<Vec<Seen>> {
        let mut told: Option<(u64, Vec<Seen>)> = None;
        for assignment in &view.shards[shard as usize].replicas {
            let at = At {
                uid: uid.to_owned(),
                shard,
                shards: view.size(),
                replica: assignment.replica,
                address: self.cluster.store_address(&assignment.store),
            };
            let found = Pinned::connect(&Env::real(), at, DEADLINE).await?.read(keys).await?;
            if let Some((other, before)) = &told {
                let differ = before.iter().zip(&found).position(|(a, b)| a != b);
                if let Some(at) = differ {
                    bail!(
                        "key \"{}\": replica {other:016x} has {:?}, replica {:016x} on {} has {:?}",
                        keys[at].escape_ascii(),
                        before[at],
                        assignment.replica,
                        assignment.store,
                        found[at]
                    );
                }
            } else {
                told = Some((assignment.replica, found));
            }
        }
        Ok(told.context("a shard without replicas")?.1)
    }

    /// In the end everything that was ever written is judged, and the whole of every replica compared.
    async fn judge_all(&mut self) -> anyhow::Result<()> {
        let resource = self.settled().await?;
        self.judge(&resource, true).await?;
        let (code, out, err) = self.cluster.run(&["check", NAME]);
        if code != 0 {
            bail!("vasto check: {out}{err}");
        }
        Ok(())
    }

    fn finish(&mut self, start: Instant) {
        self.report.problems.append(&mut self.shared.problems.lock().unwrap());
        self.report.tally = *self.shared.tally.lock().unwrap();
        self.report.pinned_reads = self.shared.pinned_reads.load(Relaxed);
        self.report.took = start.elapsed();
        if !self.report.is_clean() {
            self.cluster.keep();
            self.report.problems.push(format!("data and logs stay in {}", self.cluster.path().display()));
        }
    }
}
