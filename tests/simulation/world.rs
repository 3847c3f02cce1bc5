//! The machines of a simulation and what runs on them: an operator, stores, callers and
//! one that manages. All is under one seed, on one thread.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use vasto_client::v1::{ApplyRequest, DescribeRequest, ReplaceRequest, ScaleRequest};
use vasto_client::{Client, Env, Error, Keyspace, Op, Options, Outcome, Stamp};
use vasto_operator::local;
use vasto_store::engine::Storage;
use vasto_tests::history::{self, Event, History, Seen};
use vasto_tests::pinned::{self, Pinned, Place, Turn};

use crate::disk::{self, MemoryStorage};
use crate::net::{self, Quirks, elapsed};

/// The keyspace's name.
pub const NAME: &str = "sim";
/// How long an operation is tried.
const DEADLINE: Duration = Duration::from_secs(5);
/// How much later than its deadline an operation may end: a machine looks at its clock every few ms.
const LATE: Duration = Duration::from_millis(250);
const OPERATOR: &str = "operator:8278";
const KEYS: u64 = 12;
/// The first number of clients that speak to one replica, and how long they wait for it.
const PINNED: u32 = 1_000;
const PINNED_PATIENCE: Duration = Duration::from_secs(2);

/// A wish of whoever manages.
#[derive(Clone, Debug)]
pub enum Wish {
    Apply(String),
    Scale { shards: u32, factor: u32 },
    Replace(String),
}

/// What everybody writes down.
#[derive(Default)]
pub struct Book {
    pub history: History,
    /// When machines lost what was not synced, and needn't have been.
    pub losses: Vec<Duration>,
    /// How often each machine lost what it had not synced: what it showed before, it may not show after.
    pub lives: BTreeMap<String, u64>,
    /// Reads of which the replica is known.
    pub pinned: u64,
    /// Whether a clock has ever been wrong.
    pub skewed: bool,
    pub violations: Vec<String>,
    /// Whether callers write.
    pub load: bool,
    /// Callers under way.
    pub busy: usize,
    pub wishes: VecDeque<Wish>,
    /// The resource as last seen since all was mended, and since the last wish was carried out.
    pub resource: Value,
    /// Counts what makes an earlier look at the resource tell nothing.
    looks: u64,
    /// What the check at the end has found.
    pub checked: Option<Result<(), String>>,
    pub check: bool,
    /// The time, for whoever is no machine.
    pub at: Duration,
    number: u64,
    hash: u64,
    lines: u64,
    print: bool,
}

impl Book {
    pub fn new(print: bool) -> Self {
        Self { print, history: History::new(DEADLINE + LATE), ..Self::default() }
    }

    /// A line of the trace.
    pub fn note(&mut self, line: &str) {
        let now = turmoil::sim_elapsed().unwrap_or(self.at);
        let mut hasher = DefaultHasher::new();
        (self.hash, now, line).hash(&mut hasher);
        self.hash = hasher.finish();
        self.lines += 1;
        if self.print {
            println!("{:9.3} {line}", now.as_secs_f64());
        }
    }

    /// What should never be.
    pub fn violation(&mut self, line: String) {
        self.note(&format!("VIOLATION {line}"));
        self.violations.push(line);
    }

    /// What was seen of the resource says nothing about what is to come.
    pub fn look_again(&mut self) {
        self.looks += 1;
        self.resource = Value::Null;
    }

    /// A number that nobody had.
    fn next(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn record(&mut self, key: bytes::Bytes, mut event: Event) {
        // The answer was on its way while a machine lost what it says.
        let lost = self.losses.iter().any(|at| *at >= event.invoked_at);
        if lost && matches!(event.outcome, history::Outcome::Acknowledged(_)) {
            event.outcome = history::Outcome::Unknown;
        }
        self.history.record(key, event);
    }

    /// A machine has lost what it was not yet bound to have synced: whether the writes that were answered since
    /// `since` count, nobody knows.
    pub fn forgive(&mut self, since: Duration, now: Duration) {
        self.losses.push(now);
        for event in self.history.keys.values_mut().flatten() {
            if matches!(event.outcome, history::Outcome::Acknowledged(_)) && event.returned_at >= since {
                event.outcome = history::Outcome::Unknown;
            }
        }
    }

    /// The hash of all lines, and how many there are.
    pub fn trace(&self) -> (u64, u64) {
        (self.hash, self.lines)
    }
}

/// Shared by all.
pub type Shared = Arc<Mutex<Book>>;

pub fn book(shared: &Shared) -> MutexGuard<'_, Book> {
    shared.lock().unwrap()
}

/// A machine that can crash: what outlives it.
pub struct Machine {
    pub name: String,
    pub folder: PathBuf,
    pub quirks: Arc<Mutex<Quirks>>,
    pub storage: Arc<MemoryStorage>,
    /// Ends what runs there, in good order.
    pub stop: Mutex<CancellationToken>,
    seeds: Mutex<StdRng>,
}

impl Machine {
    pub fn new(name: String, folder: PathBuf, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            name,
            folder,
            quirks: Arc::default(),
            storage: Arc::new(MemoryStorage::new(seed)),
            stop: Mutex::default(),
            seeds: Mutex::new(StdRng::seed_from_u64(seed)),
        })
    }

    fn env(&self) -> vasto_client::Env {
        net::env(self.seeds.lock().unwrap().next_u64(), self.quirks.clone())
    }

    fn begin(&self) -> CancellationToken {
        let stop = CancellationToken::new();
        *self.stop.lock().unwrap() = stop.clone();
        stop
    }

    /// A store, until the machine crashes or `stop`.
    pub async fn store(self: Arc<Self>, shared: Shared) -> turmoil::Result {
        let stop = self.begin();
        let options = vasto_store::Options {
            advertise: Some(format!("{}:8279", self.name)),
            ..vasto_store::Options::new(self.name.clone(), self.folder.clone(), OPERATOR)
        };
        let storage: Arc<dyn Storage> = self.storage.clone();
        let connections = net::listen(8279).await?;
        if let Err(error) = vasto_store::serve_on(options, self.env(), storage, connections, stop).await {
            let mut book = book(&shared);
            match error.to_string() {
                words if words.contains(disk::CANT_WRITE) => book.note(&format!("{} ended: {words}", self.name)),
                words => book.violation(format!("{} ended: {words}", self.name)),
            }
        }
        Ok(())
    }

    /// The operator, likewise.
    pub async fn operator(self: Arc<Self>, shared: Shared) -> turmoil::Result {
        let stop = self.begin();
        let options = local::Options::new(self.folder.clone(), self.env());
        let served = match local::Operator::open(options) {
            Ok(operator) => operator.serve_on(net::listen(8278).await?, Arc::new(local::External), stop).await,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            book(&shared).violation(format!("the operator ended: {error}"));
        }
        Ok(())
    }

    /// Carries out wishes, looks at the resource, and in the end at all replicas.
    pub async fn manager(self: Arc<Self>, shared: Shared) -> turmoil::Result {
        let client = Client::with(self.env(), OPERATOR.to_owned()).deadline(DEADLINE);
        loop {
            let wish = book(&shared).wishes.front().cloned();
            if let Some(wish) = wish {
                let done = tokio::time::timeout(Duration::from_secs(2), carry_out(&client, &wish)).await;
                let line = format!("{wish:?}: {done:?}");
                let mut book = book(&shared);
                book.note(&line);
                // Those that can't be reached are asked again; a refusal is an answer.
                if matches!(done, Ok(Ok(()) | Err(tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition))) {
                    book.wishes.pop_front();
                    book.look_again();
                }
            }
            let look = book(&shared).looks;
            if let Ok(Ok(resource)) = tokio::time::timeout(Duration::from_secs(1), describe(&client)).await {
                let mut book = book(&shared);
                let brief = brief(&resource);
                if brief != self::brief(&book.resource) {
                    book.note(&brief);
                }
                if let Some(orphan) = without_owner(&resource) {
                    book.violation(format!("nobody has shard {orphan}: {brief}"));
                }
                if book.looks == look {
                    book.resource = resource;
                }
            }
            let wanted = {
                let book = book(&shared);
                book.check && book.checked.is_none()
            };
            if wanted {
                let (history, skewed) = {
                    let book = book(&shared);
                    (book.history.clone(), book.skewed)
                };
                let found = crate::check::check(&client, &history, skewed).await;
                let mut book = book(&shared);
                book.note(&format!("checked: {found:?}"));
                book.checked = Some(found);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Tasks that write and read until they are told to rest; `first` is the first one's number.
    pub async fn caller(self: Arc<Self>, shared: Shared, first: u32, tasks: u64) -> turmoil::Result {
        let client = Client::with(self.env(), OPERATOR.to_owned()).deadline(DEADLINE);
        let keyspace = loop {
            match client.keyspace(NAME).await {
                Ok(keyspace) => break keyspace,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        for task in 0..tasks {
            let random = StdRng::seed_from_u64(self.seeds.lock().unwrap().next_u64() ^ task);
            tokio::spawn(call(keyspace.clone(), shared.clone(), random, first + task as u32));
        }
        let random = StdRng::seed_from_u64(self.seeds.lock().unwrap().next_u64());
        tokio::spawn(pin(self.env(), keyspace, shared, random, PINNED + first));
        std::future::pending().await
    }
}

async fn carry_out(client: &Client, wish: &Wish) -> Result<(), tonic::Code> {
    let mut admin = client.keyspaces().map_err(|_| tonic::Code::Unavailable)?;
    let name = NAME.to_owned();
    let done = match wish.clone() {
        Wish::Apply(document) => admin.apply(ApplyRequest { document }).await,
        Wish::Scale { shards, factor } => admin.scale(ScaleRequest { name, shards, replication_factor: factor }).await,
        Wish::Replace(store) => admin.replace(ReplaceRequest { name, store, accept_data_loss: false }).await,
    };
    done.map(|_| ()).map_err(|status| status.code())
}

async fn describe(client: &Client) -> Result<Value, tonic::Code> {
    let mut admin = client.keyspaces().map_err(|_| tonic::Code::Unavailable)?;
    let request = DescribeRequest { name: NAME.to_owned(), watch: false };
    let mut stream = admin.describe(request).await.map_err(|s| s.code())?.into_inner();
    let first = stream.message().await.map_err(|s| s.code())?.ok_or(tonic::Code::Unavailable)?;
    serde_json::from_str(&first.json).map_err(|_| tonic::Code::DataLoss)
}

/// A resource in a line.
pub fn brief(resource: &Value) -> String {
    let status = |path: &str| resource.pointer(&format!("/status/{path}")).cloned().unwrap_or_default();
    let spec = |path: &str| resource.pointer(&format!("/spec/{path}")).cloned().unwrap_or_default();
    format!(
        "wanted {} x {}; version {} {} {} shards, {} of {} replicas ready",
        spec("shards"),
        spec("replicationFactor"),
        status("topologyVersion"),
        status("phase"),
        status("shards"),
        status("readyReplicas"),
        status("replicas"),
    )
}

/// A shard that the committed topology gives to nobody, once there are any.
fn without_owner(resource: &Value) -> Option<usize> {
    resource.pointer("/status/topology")?;
    let topology = vasto_tests::cluster::topology(resource);
    let view = topology.current?;
    view.shards.iter().position(|shard| shard.replicas.iter().all(|a| a.replica == 0))
}

/// Whether nothing is changing any more, and all is as wished.
pub fn settled(resource: &Value) -> bool {
    let status = |path: &str| resource.pointer(&format!("/status/{path}"));
    let number = |value: Option<&Value>| value.and_then(Value::as_u64);
    let (shards, factor) =
        (number(resource.pointer("/spec/shards")), number(resource.pointer("/spec/replicationFactor")));
    resource.pointer("/metadata/annotations/vasto.io~1replace").is_none()
        && status("phase").and_then(Value::as_str) == Some("Ready")
        && number(status("shards")) == shards
        && number(status("replicas")) == shards.zip(factor).map(|(s, f)| s * f)
        && status("readyReplicas") == status("replicas")
        && status("observedGeneration") == resource.pointer("/metadata/generation")
}

/// `task` has a key that only it writes, beside those that all write.
async fn call(keyspace: Keyspace, shared: Shared, mut random: StdRng, task: u32) {
    loop {
        tokio::time::sleep(Duration::from_millis(random.random_range(5..120))).await;
        if !book(&shared).load {
            continue;
        }
        book(&shared).busy += 1;
        // Mostly one at a time, now and then some together.
        let together = if random.random_ratio(1, 6) { random.random_range(2..6) } else { 1 };
        let mut asked: Vec<(String, history::Op)> = Vec::new();
        for _ in 0..together {
            let kind = ["put", "sum", "set"][random.random_range(0..3)];
            let key = match kind {
                "put" if random.random_ratio(1, 3) => format!("put-own-{task}"),
                _ => format!("{kind}-{}", random.random_range(0..KEYS)),
            };
            // Of several that go together none has a key twice: their order would be nobody's.
            if asked.iter().any(|(other, _)| *other == key) {
                continue;
            }
            let number = book(&shared).next();
            let op = match kind {
                _ if random.random_ratio(1, 4) => history::Op::Get,
                "put" if random.random_ratio(1, 4) => history::Op::Delete,
                "put" => history::Op::Put(number.to_string().into()),
                "sum" => history::Op::Add(1.0),
                _ => history::Op::Append(format!("{number}\n").into()),
            };
            asked.push((key, op));
        }
        let ops: Vec<Op> = asked.iter().map(|(key, op)| to_client(key.clone(), op.clone())).collect();
        let invoked_at = elapsed();
        let results = keyspace.batch(ops).await;
        let returned_at = elapsed();
        let mut book = book(&shared);
        for ((key, op), result) in asked.into_iter().zip(results) {
            book.note(&format!("{key} {op:?} -> {result:?} after {:?}", returned_at - invoked_at));
            let outcome = outcome(&op, result);
            book.record(key.into(), Event { client: task, op, invoked_at, returned_at, replica: None, outcome });
        }
        book.busy -= 1;
    }
}

/// Speaks to one replica after another, to each for as long as it can.
async fn pin(env: Env, keyspace: Keyspace, shared: Shared, mut random: StdRng, client: u32) {
    let mut after = None;
    loop {
        tokio::time::sleep(Duration::from_millis(random.random_range(5..120))).await;
        if !book(&shared).load {
            continue;
        }
        let name = format!("pinned/{client}/{}", random.random_range(0..4));
        let Some(place) = pinned::place(&keyspace, name.as_bytes(), &mut random) else { continue };
        book(&shared).busy += 1;
        turn(&env, place, &name, &shared, &mut random, client, &mut after).await;
        book(&shared).busy -= 1;
    }
}

async fn turn(
    env: &Env,
    place: Place,
    name: &str,
    shared: &Shared,
    random: &mut StdRng,
    client: u32,
    after: &mut Option<Stamp>,
) {
    let life = book(shared).lives.get(&place.store).copied().unwrap_or_default();
    let keys = pinned::keys_of(name, &place.at);
    let Ok(pinned) = Pinned::connect(env, place.at, PINNED_PATIENCE).await else { return };
    let record = |key: bytes::Bytes, mut event: Event| {
        let mut book = book(shared);
        book.note(&format!("{} {:?} -> {:?}", key.escape_ascii(), event.op, event.outcome));
        book.pinned += u64::from(event.replica.is_some() && event.op == history::Op::Get);
        event.replica = event.replica.map(|replica| {
            let mut hasher = DefaultHasher::new();
            (replica, life).hash(&mut hasher);
            hasher.finish()
        });
        book.record(key, event);
    };
    let mut turn = Turn::new(pinned, client, after, &elapsed, &record);
    for _ in 0..random.random_range(1..20) {
        if !book(shared).load {
            break;
        }
        let number = book(shared).next();
        let (key, op) = match random.random_range(0..4) {
            0 => (&keys[0], history::Op::Put(number.to_string().into())),
            1 => (&keys[0], history::Op::Delete),
            2 => (&keys[1], history::Op::Add(1.0)),
            _ => (&keys[2], history::Op::Append(format!("{number}\n").into())),
        };
        if !turn.write(key, op).await || !turn.read(&keys).await {
            break;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
    }
    for problem in std::mem::take(&mut turn.problems) {
        book(shared).violation(problem);
    }
    turn.end();
}

fn to_client(key: String, op: history::Op) -> Op {
    let op = match op {
        history::Op::Put(value) => Op::put(key, value),
        history::Op::Delete => Op::delete(key),
        history::Op::Add(number) => Op::add(key, number),
        history::Op::Append(bytes) => Op::append(key, bytes),
        history::Op::Get => Op::get(key),
    };
    op.with(Options::new().deadline(DEADLINE))
}

fn outcome(op: &history::Op, result: Result<Outcome, Error>) -> history::Outcome {
    let merge = matches!(op, history::Op::Add(_) | history::Op::Append(_));
    match result {
        Ok(Outcome::Written(stamp)) => history::Outcome::Acknowledged(stamp),
        Ok(read) => history::Outcome::Read(seen(read)),
        Err(Error::Unknown(_) | Error::Deadline { .. }) => history::Outcome::Unknown,
        Err(Error::Unavailable { .. }) if !merge => history::Outcome::Unknown,
        Err(_) => history::Outcome::Refused,
    }
}

/// What a get's answer says.
pub fn seen(outcome: Outcome) -> Seen {
    outcome.value().map(|value| (value.data, value.stamp))
}
