//! Ten thousand watchers of one operator: its hub in a process of its own, and this one full of Watch streams.
//! What a change costs until the last watcher has it, what a watcher costs in memory, what stalled ones do to the
//! others, and how long it takes until all are back after the operator was killed.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _};
use h2::client::ResponseFuture;
use h2::{Ping, SendStream};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prost::Message as _;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::codegen::http;
use vasto_client::accept::connections;
use vasto_client::hash::partition_hash;
use vasto_client::v1::{Assignment, Known, Shard, Topology, View, WatchRequest};
use vasto_client::{Client, Env};
use vasto_operator::hub::{self, Hub, Leader, OperatorService};
use vasto_operator::kube::address_of;
use vasto_tests::cluster::free_port;

use crate::process::{cpu_of, memory_of, own_cpu};

/// What the binary is called with to be the server.
const SUBCOMMAND: &str = "topology-server";
const WATCH: &str = "/vasto.v1.Operator/Watch";

/// The keyspace that everybody watches.
const HOT: u32 = 0;
const COPIES: u32 = 3;
const SHARDS: u32 = 3;
/// Of the large topology: with its addresses about 12 kB.
const MANY_SHARDS: u32 = 64;
/// As long as a spec is that says more than it must.
const SPEC: &str = r#"{"shards":3,"replicationFactor":3,"storage":{"size":"100Gi","storageClassName":"fast-local-ssd"},"durability":"Synced","resources":{"limits":{"memory":"4Gi"},"requests":{"cpu":"2","memory":"4Gi"}},"image":"ghcr.io/vasto-io/vasto:0.1.0","deletionPolicy":"Retain","paused":false,"storeLostAfter":"10m"}"#;

/// The stream window of those that stall: so small that what they don't read stays with the server.
const STALLED_WINDOW: u32 = 4 << 10;
/// As a client has them; a ping, where nothing has come for so long.
const CONNECT: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_secs(2);
const PONG: Duration = Duration::from_secs(3);
/// Streams that are opened at once where that is not what is measured.
const OPENING: usize = 256;
/// Files that a process has beside its connections.
const OTHER_FILES: usize = 500;

/// How long a change may take to come to all, before the run is given up.
const ROUND: Duration = Duration::from_secs(15);
/// The same for what is done once: to connect all, to be back after a storm.
const ONCE: Duration = Duration::from_secs(90);
/// How long the server process may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// A series ends early after so long.
const SERIES: Duration = Duration::from_secs(120);
/// Between two changes where some never acknowledge: the others' acknowledgements are through by then.
const PAUSE: Duration = Duration::from_millis(400);
/// For so long the server's load is sampled while nothing changes.
const IDLE: Duration = Duration::from_secs(10);

const MAX_WATCHER_KB: f64 = 40.0;
const MAX_CHANGE_MS: f64 = 250.0;
const MAX_STORM_MS: f64 = 10e3;
/// What stalled ones may do to the others' p99.
const MAX_STALL_RATIO: f64 = 1.5;
/// What may be held for one that stalls: its window, a chunk of tonic's that was cut before, and what these lie in.
const STALLED_MB: f64 = 0.065;
/// What an allocator may make of 200 rounds.
const GROWTH_MB: f64 = 8.0;

/// How much of everything.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    /// Watch streams, each on a connection of its own.
    pub watchers: usize,
    pub keyspaces: u32,
    /// Changes in each series; the first tenth is a warm-up.
    pub rounds: usize,
    /// Clients as the product has them, beside the watchers.
    pub clients: usize,
}

impl Size {
    /// So many watchers, and the rest in proportion.
    pub fn of(watchers: usize) -> Self {
        let keyspaces = (watchers / 10).clamp(10, 1_000) as u32;
        Self { watchers, keyspaces, rounds: 200, clients: (watchers / 50).max(2) }
    }

    /// One in a hundred.
    fn stalled(&self) -> usize {
        (self.watchers / 100).max(1)
    }
}

/// One thing that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub what: &'static str,
    pub value: f64,
    pub unit: &'static str,
    /// What it shall not exceed.
    pub most: Option<f64>,
}

impl Figure {
    pub const TITLES: [&str; 4] = ["WATCHERS", "MEASURED", "AT MOST", ""];

    pub fn cells(&self) -> Vec<String> {
        let Self { what, value, unit, most } = self;
        let told = |value: f64| format!("{value:.1} {unit}").trim_end().to_owned();
        let verdict = most.map_or("-", |most| if *value <= most { "ok" } else { "above" });
        vec![(*what).to_owned(), told(*value), most.map_or("-".to_owned(), told), verdict.to_owned()]
    }
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub size: Size,
    pub figures: Vec<Figure>,
    /// Why the last stream ended that nobody ended.
    pub ended: String,
}

impl Report {
    /// How much was measured.
    pub fn line(&self) -> String {
        let Size { watchers, keyspaces, .. } = self.size;
        let ended = if self.ended.is_empty() { "" } else { &format!("; a stream ended: {}", self.ended) };
        format!("{watchers} watchers on a connection each, {keyspaces} keyspaces{ended}")
    }
}

/// Of 100 of these, `share` are at most so long; ms.
fn percentile(took: &mut [Duration], share: usize) -> f64 {
    took.sort_unstable();
    let place = (took.len() * share).div_ceil(100).max(1) - 1;
    took.get(place).map_or(f64::NAN, |took| ms(*took))
}

fn ms(took: Duration) -> f64 {
    1e3 * took.as_secs_f64()
}

/// Runs everything. The binary must answer to `topology-server` with [`serve`].
pub fn run(size: &Size) -> anyhow::Result<Report> {
    tokio::runtime::Runtime::new()?.block_on(measure(*size))
}

async fn measure(size: Size) -> anyhow::Result<Report> {
    let mut bench = Bench::begin(size).await?;
    bench.connect().await?;
    bench.idle().await?;
    bench.small().await?;
    bench.stall().await?;
    bench.each().await?;
    let mut followers = Followers::open(&bench.board.address, &size).await?;
    bench.clients(&mut followers).await?;
    let (ended, why) = bench.board.ends().clone();
    bench.storm(&mut followers).await?;
    bench.note("streams that ended by themselves", ended as f64, "", Some(0.0));
    Ok(Report { size: bench.size, figures: bench.figures, ended: why })
}

struct Bench {
    size: Size,
    port: u16,
    hosted: Hosted,
    board: Arc<Board>,
    /// They end with this value.
    watchers: JoinSet<()>,
    /// The version of the keyspace that all watch.
    version: u64,
    /// That of all others.
    others: u64,
    figures: Vec<Figure>,
    /// The server's memory before the first watcher.
    empty: u64,
}

/// A change again and again, until the last watcher has it.
struct Series {
    took: Vec<Duration>,
    /// Until the hub knew that all know, where all do.
    acknowledged: Vec<Duration>,
    /// CPU µs of the server, and of this process, for each update that came to a watcher.
    server_us: f64,
    watcher_us: f64,
}

impl Bench {
    async fn begin(size: Size) -> anyhow::Result<Self> {
        let needed = size.watchers + size.clients + OTHER_FILES;
        let limit = open_files()?;
        ensure!(limit >= needed as u64, "the limit of open files is {limit}: raise it to {needed} (ulimit -Hn)");
        let port = free_port();
        let hosted = Hosted::start(port, size.keyspaces, 1).await?;
        let (empty, board) = (hosted.memory()?, Arc::new(Board::new(format!("127.0.0.1:{port}"))));
        let (watchers, figures) = (JoinSet::new(), Vec::new());
        Ok(Self { size, port, hosted, board, watchers, version: 1, others: 1, figures, empty })
    }

    fn note(&mut self, what: &'static str, value: f64, unit: &'static str, most: Option<f64>) {
        eprintln!("bench: {what}: {value:.1} {unit}");
        self.figures.push(Figure { what, value, unit, most });
    }

    fn note_memory(&mut self, what: &'static str) -> anyhow::Result<()> {
        let bytes = self.hosted.memory()?.saturating_sub(self.empty) as f64;
        self.note(what, bytes / 1e3 / self.size.watchers as f64, "kB", Some(MAX_WATCHER_KB));
        Ok(())
    }

    /// Opens all streams.
    async fn connect(&mut self) -> anyhow::Result<()> {
        self.board.hot.begin(self.version, self.size.watchers);
        let at = self.board.now();
        for number in 0..self.size.watchers {
            let keyspaces = watched(number, self.size.keyspaces);
            let watcher = Watcher {
                known: vec![0; keyspaces.len()],
                have: vec![0; keyspaces.len()],
                keyspaces,
                storm: 0,
                stalls: number < self.size.stalled(),
                stalled: self.board.stalled.subscribe(),
                permit: None,
                board: self.board.clone(),
            };
            self.watchers.spawn(watcher.run());
        }
        let last = self.board.all("the first answer", &self.board.hot, ONCE).await?;
        self.note("all connected, by and by", ms(last.saturating_sub(at)), "ms", None);
        Ok(())
    }

    /// The server while nothing changes.
    async fn idle(&mut self) -> anyhow::Result<()> {
        sleep(Duration::from_secs(1)).await;
        let (before, at) = (self.hosted.cpu()?, Instant::now());
        sleep(IDLE).await;
        let used = self.hosted.cpu()?.saturating_sub(before).as_secs_f64() / at.elapsed().as_secs_f64();
        self.note_memory("memory of a watcher, connected")?;
        self.note("server while nothing changes", 100.0 * used, "% of a core", None);
        Ok(())
    }

    /// One change of the keyspace that all watch; so many are to see it.
    async fn change(&mut self, shards: u32, watching: usize) -> anyhow::Result<Duration> {
        self.version += 1;
        self.board.hot.begin(self.version, watching);
        let at = self.board.now();
        self.hosted.tell(&format!("{HOT} {shards}\n")).await?;
        let what = format!("version {} of the keyspace that all watch", self.version);
        let last = self.board.all(&what, &self.board.hot, ROUND).await?;
        Ok(last.saturating_sub(at))
    }

    async fn series(&mut self, shards: u32, watching: usize) -> anyhow::Result<Series> {
        let (before, own, began) = (self.hosted.cpu()?, own_cpu(), Instant::now());
        let (mut took, mut acknowledged) = (Vec::new(), Vec::new());
        while took.len() < self.size.rounds && (took.len() < 10 || began.elapsed() < SERIES) {
            took.push(self.change(shards, watching).await?);
            // Acknowledgements of this change are not to be in the way of the next one.
            if watching == self.size.watchers {
                acknowledged.push(self.hosted.acknowledged(HOT, self.version).await?);
            } else {
                sleep(PAUSE).await;
            }
        }
        let each = |used: Duration| 1e6 * used.as_secs_f64() / (took.len() * watching) as f64;
        let server_us = each(self.hosted.cpu()?.saturating_sub(before));
        let watcher_us = each(own_cpu().saturating_sub(own));
        let warm_up = took.len().div_ceil(10);
        let acknowledged = acknowledged.split_off(warm_up.min(acknowledged.len()));
        Ok(Series { took: took.split_off(warm_up), acknowledged, server_us, watcher_us })
    }

    async fn small(&mut self) -> anyhow::Result<()> {
        let mut series = self.series(SHARDS, self.size.watchers).await?;
        self.note("change to last watcher, p50", percentile(&mut series.took, 50), "ms", None);
        self.note("change to last watcher, p99", percentile(&mut series.took, 99), "ms", Some(MAX_CHANGE_MS));
        self.note("change to last watcher, all", percentile(&mut series.took, 100), "ms", None);
        self.note("change acknowledged by all, p99", percentile(&mut series.acknowledged, 99), "ms", None);
        self.note("server's CPU an update", series.server_us, "µs", None);
        self.note("watcher's CPU an update", series.watcher_us, "µs", None);
        self.note_memory("memory of a watcher, after changes")
    }

    async fn stall(&mut self) -> anyhow::Result<()> {
        let (all, stalled) = (self.size.watchers, self.size.stalled());
        // Of the same size, and so that every buffer has had it before growth is measured.
        let mut without = self.series(MANY_SHARDS, all).await?;
        let before = self.hosted.memory()?;
        self.board.stalled.send_replace(true);
        let mut parked = self.board.parked.subscribe();
        let still = timeout(ROUND, parked.wait_for(|n| *n == stalled)).await.map(drop);
        still.with_context(|| format!("not all of {stalled} watchers stopped reading in {ROUND:?}"))?;
        let mut with = self.series(MANY_SHARDS, all - stalled).await?;
        let growth = (self.hosted.memory()? as f64 - before as f64) / 1e6;
        self.board.hot.begin(self.version, stalled);
        let at = self.board.now();
        self.board.stalled.send_replace(false);
        let last = self.board.all("the latest, for those that had stalled", &self.board.hot, ONCE).await?;
        let (without, with) = (percentile(&mut without.took, 99), percentile(&mut with.took, 99));
        self.note("change of 64 shards to last watcher, p99", without, "ms", None);
        self.note("the same while 1% stall, p99", with, "ms", None);
        self.note("the same, ratio of the two", with / without, "", Some(MAX_STALL_RATIO));
        let most = stalled as f64 * STALLED_MB + GROWTH_MB;
        self.note("server's growth meanwhile", growth, "MB", Some(most));
        self.note("stalled ones have the latest after", ms(last.saturating_sub(at)), "ms", None);
        Ok(())
    }

    /// A change of each keyspace.
    async fn each(&mut self) -> anyhow::Result<()> {
        let keyspaces = self.size.keyspaces;
        let updates: usize = (0..self.size.watchers).map(|n| watched(n, keyspaces).len() - 1).sum();
        let before = self.hosted.cpu()?;
        self.others += 1;
        self.board.rest.begin(self.others, updates);
        let lines: String = (HOT + 1..keyspaces).map(|n| format!("{n} {SHARDS}\n")).collect();
        let at = self.board.now();
        self.hosted.tell(&lines).await?;
        let last = self.board.all("a change of each keyspace", &self.board.rest, ONCE).await?;
        self.hosted.acknowledged(keyspaces - 1, self.others).await?;
        let server = self.hosted.cpu()?.saturating_sub(before).as_secs_f64();
        self.note("every keyspace changed, last update", ms(last.saturating_sub(at)), "ms", None);
        self.note("server's CPU an update then", 1e6 * server / updates as f64, "µs", None);
        Ok(())
    }

    async fn clients(&mut self, followers: &mut Followers) -> anyhow::Result<()> {
        let mut took = Vec::new();
        for round in 0..self.size.rounds / 4 {
            let at = Instant::now();
            self.change(SHARDS, self.size.watchers).await?;
            let seen = followers.all(self.version, ROUND).await?;
            if round > 0 {
                took.extend(seen.into_iter().map(|when| when.saturating_duration_since(at)));
            }
            sleep(PAUSE).await;
        }
        self.note("change to the product's client, p50", percentile(&mut took, 50), "ms", None);
        self.note("change to the product's client, p99", percentile(&mut took, 99), "ms", Some(MAX_CHANGE_MS));
        Ok(())
    }

    async fn storm(&mut self, followers: &mut Followers) -> anyhow::Result<()> {
        // A real operator comes back with all that it had committed.
        self.version = self.version.max(self.others);
        self.board.storms.fetch_add(1, SeqCst);
        self.board.hot.begin(self.version, self.size.watchers);
        let (at, killed) = (self.board.now(), Instant::now());
        self.hosted.kill().await?;
        self.hosted = Hosted::start(self.port, self.size.keyspaces, self.version).await?;
        let listening = killed.elapsed();
        let last = self.board.all("an answer after the storm", &self.board.hot, ONCE).await?;
        self.change(SHARDS, self.size.watchers).await?;
        let seen = followers.all(self.version, ONCE).await?;
        let clients = seen.into_iter().map(|when| when.saturating_duration_since(killed)).max().unwrap_or_default();
        self.note("killed, listens again", ms(listening), "ms", None);
        self.note("killed, last watcher answered", ms(last.saturating_sub(at)), "ms", Some(MAX_STORM_MS));
        self.note("killed, all clients see a change", ms(clients), "ms", Some(MAX_STORM_MS));
        Ok(())
    }
}

// Watchers.

/// What the watchers have come to.
struct Board {
    /// Of the server.
    address: String,
    began: Instant,
    env: Env,
    hot: Round,
    rest: Round,
    /// Servers that were killed: what a watcher has from before counts no more.
    storms: AtomicU64,
    /// Streams that ended, and why the last did.
    ends: Mutex<(u64, String)>,
    connecting: Arc<Semaphore>,
    stalled: watch::Sender<bool>,
    /// Watchers that do not read.
    parked: watch::Sender<usize>,
}

/// Watchers count themselves off as something comes to them, each once.
struct Round {
    version: AtomicU64,
    left: AtomicUsize,
    /// When the last one came: microseconds since the board's beginning.
    last: AtomicU64,
    done: Notify,
}

impl Round {
    fn new() -> Self {
        let version = AtomicU64::new(u64::MAX);
        Self { version, left: AtomicUsize::new(0), last: AtomicU64::new(0), done: Notify::new() }
    }

    /// Before the version that is waited for can come to anyone.
    fn begin(&self, version: u64, expected: usize) {
        self.left.store(expected, SeqCst);
        self.version.store(version, SeqCst);
    }

    fn came(&self, began: Instant, had: u64, has: u64) {
        let version = self.version.load(SeqCst);
        if had < version && version <= has && self.left.fetch_sub(1, SeqCst) == 1 {
            self.last.store(began.elapsed().as_micros() as u64, SeqCst);
            self.done.notify_one();
        }
    }
}

impl Board {
    fn new(address: String) -> Self {
        Self {
            address,
            began: Instant::now(),
            env: Env::real(),
            hot: Round::new(),
            rest: Round::new(),
            storms: AtomicU64::new(0),
            ends: Mutex::default(),
            connecting: Arc::new(Semaphore::new(OPENING)),
            stalled: watch::Sender::new(false),
            parked: watch::Sender::new(0),
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Waits until the last of a round has come; says when that was.
    async fn all(&self, what: &str, round: &Round, patience: Duration) -> anyhow::Result<Duration> {
        let done = timeout(patience, round.done.notified()).await;
        round.version.store(u64::MAX, SeqCst);
        if done.is_err() {
            let (left, (ended, why)) = (round.left.load(SeqCst), self.ends().clone());
            bail!("{what}: {left} have not come in {patience:?}; {ended} streams ended so far, the last: {why:?}");
        }
        Ok(Duration::from_micros(round.last.load(SeqCst)))
    }

    fn ends(&self) -> MutexGuard<'_, (u64, String)> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The keyspaces that a watcher watches: the one that all do, and one or two at random, the same in every run.
fn watched(watcher: usize, keyspaces: u32) -> Vec<u32> {
    let mut all = vec![HOT];
    for turn in 0..=u32::from(watcher.is_multiple_of(3)) {
        let random = partition_hash(format!("{watcher}/{turn}").as_bytes());
        let other = HOT + 1 + (random % u64::from(keyspaces - 1)) as u32;
        if !all.contains(&other) {
            all.push(other);
        }
    }
    all
}

/// One stream, opened again whenever it ends, as the product's client does.
struct Watcher {
    keyspaces: Vec<u32>,
    /// By keyspace, the version that it has, and has told.
    known: Vec<u64>,
    /// By keyspace, the version that it got since the last storm.
    have: Vec<u64>,
    storm: u64,
    /// Whether it stops reading when `stalled` says so.
    stalls: bool,
    stalled: watch::Receiver<bool>,
    /// Held until its first answer, so that not all connect at once to begin with.
    permit: Option<OwnedSemaphorePermit>,
    board: Arc<Board>,
}

impl Watcher {
    async fn run(mut self) {
        self.permit = self.board.connecting.clone().acquire_owned().await.ok();
        let mut failures = 0u32;
        loop {
            let why = self.stream(&mut failures).await.err().map_or_else(String::new, |error| format!("{error:#}"));
            {
                let mut ends = self.board.ends();
                *ends = (ends.0 + 1, why);
            }
            // As `Topologies::run` in client/src/watch.rs.
            let pause = Duration::from_millis((50u64 << failures.min(6)).min(2_000));
            failures += 1;
            sleep(self.board.env.jitter(pause)).await;
        }
    }

    fn first(&self) -> WatchRequest {
        let known = self.keyspaces.iter().zip(&self.known).filter(|(_, version)| **version > 0);
        WatchRequest {
            keyspaces: self.keyspaces.iter().map(|keyspace| name(*keyspace)).collect(),
            known: known.map(|(keyspace, version)| Known { uid: uid(*keyspace), version: *version }).collect(),
        }
    }

    /// One connection and its stream, from their making to their end, in one task: with all that tonic's channel does
    /// beside, half of what is measured would be the watchers'.
    async fn stream(&mut self, failures: &mut u32) -> anyhow::Result<()> {
        let socket = timeout(CONNECT, TcpStream::connect(&self.board.address)).await??;
        socket.set_nodelay(true)?;
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(if self.stalls { STALLED_WINDOW } else { 4 << 20 });
        builder.initial_connection_window_size(16 << 20);
        let (mut operator, mut connection) = builder.handshake::<_, Bytes>(socket).await?;
        let mut pings = connection.ping_pong().context("pings are taken")?;
        let heard = Heard::new(&self.board);
        let alive = async {
            loop {
                let due = heard.last() + PING;
                if Instant::now() < due {
                    sleep_until(due.into()).await;
                    continue;
                }
                timeout(PONG, pings.ping(Ping::opaque())).await.context("no answer to a ping")??;
                heard.now();
            }
        };
        let request = http::Request::post(format!("http://{}{WATCH}", self.board.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (answers, requests) = operator.send_request(request, false)?;
        tokio::select! {
            biased;
            ended = &mut connection => Ok(ended?),
            ended = self.talk(answers, requests, &heard, failures) => ended,
            ended = alive => ended,
        }
    }

    async fn talk(
        &mut self,
        answers: ResponseFuture,
        mut requests: SendStream<Bytes>,
        heard: &Heard,
        failures: &mut u32,
    ) -> anyhow::Result<()> {
        requests.send_data(framed(&self.first()), false)?;
        let mut answers = answers.await?.into_body();
        let storm = self.board.storms.load(SeqCst);
        if self.storm != storm {
            self.storm = storm;
            self.have.fill(0);
        }
        let mut come = BytesMut::new();
        // What it has and has not told yet, and when it will.
        let (mut known, mut due) = (Vec::new(), Instant::now());
        loop {
            if self.stalls && *self.stalled.borrow_and_update() {
                self.board.parked.send_modify(|parked| *parked += 1);
                self.stalled.wait_for(|stalled| !stalled).await?;
                self.board.parked.send_modify(|parked| *parked -= 1);
            }
            let bytes = tokio::select! {
                biased;
                changed = self.stalled.changed(), if self.stalls => {
                    changed?;
                    continue;
                }
                bytes = answers.data() => bytes,
                () = sleep_until(due.into()), if !known.is_empty() => {
                    let known = std::mem::take(&mut known);
                    requests.send_data(framed(&WatchRequest { keyspaces: Vec::new(), known }), false)?;
                    continue;
                }
            };
            let Some(bytes) = bytes else { bail!("it ended: {:?}", answers.trailers().await?) };
            let bytes = bytes?;
            heard.now();
            answers.flow_control().release_capacity(bytes.len())?;
            come.put(bytes);
            while let Some(message) = unframed(&mut come) {
                *failures = 0;
                self.permit = None;
                let answer = Peek::decode(message)?;
                let receipt = Duration::from_millis(answer.receipt_ms.into());
                if let Some(news) = self.take(answer)? {
                    if known.is_empty() {
                        due = Instant::now() + self.board.env.jitter(receipt);
                    }
                    known.push(news);
                }
            }
        }
    }

    /// Takes in an answer; gives what is to be told of it.
    fn take(&mut self, answer: Peek) -> anyhow::Result<Option<Known>> {
        let topology = answer.update.and_then(|update| update.topology);
        let topology = topology.with_context(|| format!("no keyspace {:?} is there", answer.missing))?;
        let (uid, version) = (topology.uid, topology.version);
        let keyspace = uid.get(24..).and_then(|number| u32::from_str_radix(number, 16).ok());
        let place = self.keyspaces.iter().position(|k| Some(*k) == keyspace);
        let place = place.with_context(|| format!("a topology of {uid:?} came, which nobody asked for"))?;
        let had = std::mem::replace(&mut self.have[place], version);
        let round = if place == 0 { &self.board.hot } else { &self.board.rest };
        round.came(self.board.began, had, version);
        let news = version > self.known[place];
        self.known[place] = version.max(self.known[place]);
        Ok(news.then_some(Known { uid, version }))
    }
}

/// When a connection brought something last: as hyper has it, one that did lately needs no ping.
struct Heard {
    began: Instant,
    /// Microseconds since then.
    last: AtomicU64,
}

impl Heard {
    fn new(board: &Board) -> Self {
        let heard = Self { began: board.began, last: AtomicU64::new(0) };
        heard.now();
        heard
    }

    fn now(&self) {
        self.last.store(self.began.elapsed().as_micros() as u64, SeqCst);
    }

    fn last(&self) -> Instant {
        self.began + Duration::from_micros(self.last.load(SeqCst))
    }
}

/// As much of a `WatchResponse` as a watcher must know here; the rest is skipped, since it would cost time that is
/// no operator's.
#[derive(Clone, PartialEq, prost::Message)]
struct Peek {
    #[prost(message, optional, tag = "1")]
    update: Option<PeekUpdate>,
    #[prost(string, tag = "2")]
    missing: String,
    #[prost(uint32, tag = "3")]
    receipt_ms: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PeekUpdate {
    #[prost(message, optional, tag = "1")]
    topology: Option<PeekTopology>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PeekTopology {
    #[prost(string, tag = "1")]
    uid: String,
    #[prost(uint64, tag = "3")]
    version: u64,
}

/// A message as gRPC has it on the wire: neither compressed nor longer than 4 GiB.
fn framed(request: &WatchRequest) -> Bytes {
    let mut bytes = BytesMut::from(&[0; 5][..]);
    bytes.put(request.encode_to_vec().as_slice());
    let length = (bytes.len() - 5) as u32;
    bytes[1..5].copy_from_slice(&length.to_be_bytes());
    bytes.freeze()
}

/// The next whole message of what has come.
fn unframed(come: &mut BytesMut) -> Option<BytesMut> {
    let length = u32::from_be_bytes(come.get(1..5)?.try_into().ok()?) as usize;
    (come.len() >= 5 + length).then(|| {
        come.advance(5);
        come.split_to(length)
    })
}

/// Clients as applications have them; each says when it has seen a version of the keyspace that all watch.
struct Followers {
    clients: usize,
    seen: mpsc::UnboundedReceiver<(usize, u64, Instant)>,
    _following: JoinSet<()>,
}

impl Followers {
    async fn open(operator: &str, size: &Size) -> anyhow::Result<Self> {
        let (sender, seen) = mpsc::unbounded_channel();
        let opened: Vec<_> = futures::stream::iter(0..size.clients)
            .map(|number| async move {
                let client = Client::connect(operator)?.deadline(ROUND);
                let mut keyspaces = Vec::new();
                // Every third watcher has three.
                for keyspace in watched(3 * number, size.keyspaces) {
                    keyspaces.push(client.keyspace(&name(keyspace)).await?);
                }
                anyhow::Ok((number, keyspaces))
            })
            .buffer_unordered(32)
            .try_collect()
            .await
            .context("a client can't open its keyspaces")?;
        let mut following = JoinSet::new();
        for (number, keyspaces) in opened {
            let sender = sender.clone();
            following.spawn(async move {
                let Some(hot) = keyspaces.first() else { return };
                let mut updates = hot.watch();
                loop {
                    let version = updates.borrow_and_update().topology.as_ref().map_or(0, |t| t.version);
                    if sender.send((number, version, Instant::now())).is_err() || updates.changed().await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { clients: size.clients, seen, _following: following })
    }

    /// When each had this version.
    async fn all(&mut self, version: u64, patience: Duration) -> anyhow::Result<Vec<Instant>> {
        let mut when = vec![None; self.clients];
        let all = async {
            while when.iter().any(Option::is_none) {
                let (number, has, at) = self.seen.recv().await.context("no client follows any more")?;
                if has >= version {
                    when[number].get_or_insert(at);
                }
            }
            anyhow::Ok(())
        };
        let done = timeout(patience, all).await;
        done.with_context(|| format!("not all clients have seen version {version} in {patience:?}"))??;
        Ok(when.into_iter().flatten().collect())
    }
}

// The server process, as the bench sees it.

/// Ends with this value.
struct Hosted {
    child: Child,
    pid: u32,
    stdin: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
}

impl Hosted {
    /// Starts it and waits until it listens.
    async fn start(port: u16, keyspaces: u32, version: u64) -> anyhow::Result<Self> {
        let exe = std::env::current_exe().context("can't tell which binary this is")?;
        let mut child = Command::new(&exe)
            .args([SUBCOMMAND, &port.to_string(), &keyspaces.to_string(), &version.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("can't start {} {SUBCOMMAND}", exe.display()))?;
        let pid = child.id().context("the server process has ended")?;
        let stdin = child.stdin.take().context("the server process has no stdin")?;
        let stdout = child.stdout.take().context("the server process has no stdout")?;
        let mut hosted = Self { child, pid, stdin, said: BufReader::new(stdout).lines() };
        hosted.hear("ready").await?;
        Ok(hosted)
    }

    fn memory(&self) -> anyhow::Result<u64> {
        memory_of(self.pid)
    }

    fn cpu(&self) -> anyhow::Result<Duration> {
        cpu_of(self.pid)
    }

    async fn tell(&mut self, lines: &str) -> anyhow::Result<()> {
        let told = timeout(ANSWER, self.stdin.write_all(lines.as_bytes())).await;
        told.context("the server process reads nothing any more")?.context("the server process can't be told anything")
    }

    /// What follows these words, the first time that it says them.
    async fn hear(&mut self, words: &str) -> anyhow::Result<String> {
        let heard = async {
            while let Some(line) = self.said.next_line().await? {
                if let Some(rest) = line.strip_prefix(words) {
                    return anyhow::Ok(rest.trim().to_owned());
                }
            }
            bail!("the server process ended before it said {words}")
        };
        let heard = timeout(ANSWER, heard).await;
        heard.with_context(|| format!("the server process has not said {words} in {ANSWER:?}"))?
    }

    /// Waits until no watcher is behind; says how long that took since it was published.
    async fn acknowledged(&mut self, keyspace: u32, version: u64) -> anyhow::Result<Duration> {
        let micros = self.hear(&format!("acknowledged {keyspace} {version} ")).await?;
        Ok(Duration::from_micros(micros.parse()?))
    }

    /// SIGKILL, and waits for its end.
    async fn kill(&mut self) -> anyhow::Result<()> {
        let killed = timeout(ANSWER, self.child.kill()).await;
        killed.context("the server process does not die")?.context("the server process can't be killed")
    }
}

// The server process itself.

/// How the server process is begun: it hosts a hub until its input ends, and publishes what lines of it name: a
/// keyspace's number, and how many shards its next version has.
#[derive(clap::Args, Clone, Debug)]
pub struct Serve {
    port: u16,
    keyspaces: u32,
    /// That each keyspace has.
    version: u64,
}

pub fn serve(args: &Serve) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let served = runtime.block_on(host(args));
    // It may still read its input.
    runtime.shutdown_background();
    served
}

async fn host(args: &Serve) -> anyhow::Result<()> {
    open_files()?;
    let stop = CancellationToken::new();
    let _ends = stop.clone().drop_guard();
    let hub = Hub::with(stop.clone(), Leader::Here, Some(address_of));
    for keyspace in 0..args.keyspaces {
        hub.claim(&name(keyspace));
        hub.commit(Arc::new(topology(keyspace, args.version, SHARDS)));
        hub.publish(&uid(keyspace));
    }
    hub.settle();

    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], args.port).into()).with_context(|| format!("can't use port {}", args.port))?;
    let listener = socket.listen(BACKLOG)?;
    let serving = hub::server()
        .add_service(OperatorService::new(hub.clone()))
        .serve_with_incoming_shutdown(connections(listener), stop.clone().cancelled_owned());
    let mut serving = tokio::spawn(serving);
    let awaited = watch::Sender::new(None);
    tokio::spawn(attend(hub.clone(), awaited.subscribe()));
    say("ready");
    let mut versions = vec![args.version; args.keyspaces as usize];
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            served = &mut serving => return served?.context("the server ended"),
            line = lines.next_line() => {
                let Some(line) = line.context("stdin can't be read")? else { return Ok(()) };
                let (keyspace, shards) = line.split_once(' ').context("not KEYSPACE SHARDS")?;
                let (keyspace, shards): (u32, u32) = (keyspace.parse()?, shards.parse()?);
                let version = versions.get_mut(keyspace as usize).context("no such keyspace")?;
                *version += 1;
                let topology = Arc::new(topology(keyspace, *version, shards));
                let since = Instant::now();
                hub.commit(topology);
                hub.publish(&uid(keyspace));
                awaited.send_replace(Some((keyspace, *version, since)));
            }
        }
    }
}

/// A change of which it is to be said when all have acknowledged it: keyspace, version, and when it was published.
type Awaited = Option<(u32, u64, Instant)>;

/// What a driver does while a switch waits for its watchers: whatever wakes it, it looks whether any is behind.
async fn attend(hub: Hub, mut awaited: watch::Receiver<Awaited>) {
    let mut now = None;
    loop {
        if let Some((keyspace, version, since)) = now
            && !hub.watchers_behind(&name(keyspace), &uid(keyspace), version)
        {
            let since: Instant = since;
            say(&format!("acknowledged {keyspace} {version} {}", since.elapsed().as_micros()));
            now = None;
        }
        tokio::select! {
            biased;
            changed = awaited.changed() => {
                if changed.is_err() {
                    return;
                }
                now = *awaited.borrow_and_update();
            }
            () = hub.wait() => drop(hub.take_dirty()),
        }
    }
}

fn say(line: &str) {
    // Who has gone hears nothing; stdin ends too, then.
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

// What both need.

/// As the operator has it: cli/src/listen.rs.
const BACKLOG: u32 = 4_096;

fn name(keyspace: u32) -> String {
    if keyspace == HOT { "hot".to_owned() } else { format!("keyspace-{keyspace:04}") }
}

fn uid(keyspace: u32) -> String {
    format!("5eed5eed-0000-4000-8000-{keyspace:012x}")
}

/// As a keyspace at rest has it.
fn topology(keyspace: u32, version: u64, shards: u32) -> Topology {
    let place = |shard: u32, copy: u32| Assignment {
        store: format!("store-{}", (shard + copy) % shards),
        replica: partition_hash(format!("{keyspace}/{shard}/{copy}").as_bytes()) | 1,
        serving: true,
    };
    let shard = |shard| Shard { replicas: (0..COPIES).map(|copy| place(shard, copy)).collect() };
    let current = Some(View { shards: (0..shards).map(shard).collect() });
    let (uid, name, spec) = (uid(keyspace), name(keyspace), SPEC.to_owned());
    Topology { uid, name, version, current, spec, ..Topology::default() }
}

/// As many files as may be, not as many as are usual; says how many.
fn open_files() -> anyhow::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("the limit of open files can't be read")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        .with_context(|| format!("the limit of open files can't be raised to {hard}"))?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let mut took: Vec<Duration> = (1..=180).rev().map(Duration::from_millis).collect();
        assert_eq!([50, 99, 100].map(|share| percentile(&mut took, share)), [90.0, 179.0, 180.0]);
        assert!(percentile(&mut [], 99).is_nan());
    }

    #[test]
    fn each_comes_once_to_a_round() {
        let (round, began) = (Round::new(), Instant::now());
        round.came(began, 0, 5);
        round.begin(5, 2);
        for (had, has, left) in [(4, 5, 1), (5, 5, 1), (3, 4, 1), (0, 6, 0)] {
            round.came(began, had, has);
            assert_eq!(round.left.load(SeqCst), left);
        }
    }
}
