//! A fake operator and fake stores on loopback, each a process as far as the
//! client can tell: a runtime of its own, which can be killed. All stores share
//! one map, as if replication took no time; what is tested is the client.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnboundedReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::{self, *};
use vasto_client::{Client, Env, Keyspace};

pub const UID: &str = "uid-1";

type Reply<T> = Result<Response<Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>>, Status>;

/// How a store behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    Normal,
    /// Takes operations and never answers.
    Silent,
    /// Closes the stream on the first operation, without executing it.
    Break,
    Refuse(FailureCode),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Held {
    Bytes(Vec<u8>),
    Number(f64),
}

/// What all fakes share.
pub struct World {
    pub data: Mutex<BTreeMap<Bytes, (Held, u64)>>,
    /// What the operator says; `None`: the keyspace does not exist.
    pub said: watch::Sender<Option<KeyspaceUpdate>>,
    /// What the operator was told.
    pub told: watch::Sender<Vec<WatchRequest>>,
    clock: AtomicU64,
}

/// What is seen and set of one store.
pub struct Gauge {
    pub mode: Mutex<Mode>,
    /// Its own topology; `None`: what the operator says.
    pub knows: Mutex<Option<KeyspaceUpdate>>,
    /// Every message, as it came.
    pub messages: Mutex<Vec<Vec<Operation>>>,
    pub streams: watch::Sender<i64>,
    pub scans: Mutex<Vec<ScanRequest>>,
    /// Entries a scan sends before it waits for `scan_on`; then its stream breaks if told so.
    pub scan_pause: Mutex<Option<usize>>,
    pub scan_on: watch::Sender<bool>,
}

impl Gauge {
    pub fn operations(&self) -> Vec<Operation> {
        self.messages.lock().unwrap().iter().flatten().cloned().collect()
    }
    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

pub struct Server {
    pub address: String,
    runtime: Option<Runtime>,
}

impl Server {
    /// As SIGKILL does: all its connections break.
    pub async fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            let end = move || runtime.shutdown_timeout(Duration::from_secs(5));
            tokio::task::spawn_blocking(end).await.unwrap();
        }
    }
}

impl std::ops::Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub struct Cluster {
    pub world: Arc<World>,
    pub operator: Server,
    pub stores: Vec<(Server, Arc<Gauge>)>,
    pub client: Client,
}

fn serve(address: &str, build: impl FnOnce() -> tonic::transport::server::Router) -> Server {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind(address).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = build();
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        router.serve_with_incoming(TcpListenerStream::new(listener)).await
    });
    Server { address, runtime: Some(runtime) }
}

impl Cluster {
    /// `stores` stores; the keyspace `map` has `shards` shards, each on `rf` of them. Store s's
    /// replica of shard i has the id `s * 100 + i + 1`.
    pub fn start(stores: usize, shards: usize, rf: usize) -> Self {
        let world = Arc::new(World {
            data: Mutex::default(),
            said: watch::Sender::new(None),
            told: watch::Sender::new(Vec::new()),
            clock: AtomicU64::new(1),
        });
        let stores: Vec<_> = (0..stores).map(|s| start_store(&world, s, "127.0.0.1:0")).collect();
        let operator = start_operator(&world, "127.0.0.1:0");
        let client = Client::with(Env::real(), operator.address.clone()).deadline(Duration::from_secs(10));
        let cluster = Self { world, operator, stores, client };
        cluster.say(cluster.view(1, shards, rf));
        cluster
    }

    pub async fn map(&self) -> Keyspace {
        self.client.keyspace("map").await.unwrap()
    }

    pub fn gauge(&self, store: usize) -> &Gauge {
        &self.stores[store].1
    }

    pub fn say(&self, update: KeyspaceUpdate) {
        self.world.said.send_replace(Some(update));
    }

    /// A topology over the first stores.
    pub fn view(&self, version: u64, shards: usize, rf: usize) -> KeyspaceUpdate {
        let count = self.stores.len();
        let shards = (0..shards).map(|i| {
            let on = (0..rf).map(|r| (i + r) % count);
            let replicas =
                on.map(|s| Assignment { store: format!("store-{s}"), replica: replica(s, i), serving: true });
            Shard { replicas: replicas.collect() }
        });
        let current = Some(View { shards: shards.collect() });
        let addresses = self.stores.iter().enumerate();
        KeyspaceUpdate {
            topology: Some(Topology { uid: UID.into(), name: "map".into(), version, current, ..Default::default() }),
            addresses: addresses
                .map(|(s, (server, _))| StoreAddress { store: format!("store-{s}"), address: server.address.clone() })
                .collect(),
        }
    }

    pub fn restart_operator(&mut self) {
        self.operator = start_operator(&self.world, &self.operator.address.clone());
    }
}

pub fn replica(store: usize, shard: usize) -> u64 {
    (store * 100 + shard + 1) as u64
}

fn start_operator(world: &Arc<World>, address: &str) -> Server {
    let service = FakeOperator { world: world.clone() };
    let service = v1::operator_server::OperatorServer::new(service);
    serve(address, move || tonic::transport::Server::builder().add_service(service))
}

fn start_store(world: &Arc<World>, store: usize, address: &str) -> (Server, Arc<Gauge>) {
    let gauge = Arc::new(Gauge {
        mode: Mutex::new(Mode::Normal),
        knows: Mutex::default(),
        messages: Mutex::default(),
        streams: watch::Sender::new(0),
        scans: Mutex::default(),
        scan_pause: Mutex::default(),
        scan_on: watch::Sender::new(false),
    });
    let service = FakeStore { world: world.clone(), gauge: gauge.clone(), store };
    let service = v1::store_server::StoreServer::new(service)
        .max_decoding_message_size(16 << 20)
        .max_encoding_message_size(16 << 20);
    (serve(address, move || tonic::transport::Server::builder().add_service(service)), gauge)
}

struct FakeOperator {
    world: Arc<World>,
}

#[tonic::async_trait]
impl v1::operator_server::Operator for FakeOperator {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;
    type ReportStream = Pin<Box<dyn Stream<Item = Result<StoreUpdate, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Reply<WatchResponse> {
        let (sender, answers) = mpsc::unbounded_channel();
        let (world, mut requests) = (self.world.clone(), request.into_inner());
        let answer = |name: &str, said: &Option<KeyspaceUpdate>| match said {
            Some(update) if name == "map" => watch_response::Event::Update(update.clone()),
            _ => watch_response::Event::Missing(name.to_string()),
        };
        tokio::spawn(async move {
            let mut said = WatchStream::from_changes(world.said.subscribe());
            loop {
                tokio::select! {
                    request = requests.next() => {
                        let Some(Ok(request)) = request else { return };
                        for name in &request.keyspaces {
                            let event = Some(answer(name, &world.said.borrow()));
                            let _ = sender.send(Ok(WatchResponse { event, receipt_ms: 0 }));
                        }
                        world.told.send_modify(|told| told.push(request));
                    }
                    said = said.next() => {
                        let Some(said) = said else { return };
                        let _ = sender.send(Ok(WatchResponse { event: Some(answer("map", &said)), receipt_ms: 0 }));
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(answers))))
    }

    async fn report(&self, _: Request<Streaming<StoreReport>>) -> Reply<StoreUpdate> {
        Err(Status::unimplemented("fake"))
    }
}

#[derive(Clone)]
struct FakeStore {
    world: Arc<World>,
    gauge: Arc<Gauge>,
    store: usize,
}

impl FakeStore {
    fn topology(&self) -> KeyspaceUpdate {
        let knows = self.gauge.knows.lock().unwrap().clone();
        knows.or_else(|| self.world.said.borrow().clone()).unwrap()
    }

    fn wrong(&self, shard: u32, shards: u32) -> Option<Failure> {
        let update = self.topology();
        let view = update.topology.as_ref().unwrap().current.as_ref().unwrap();
        let mine = view.place(replica(self.store, shard as usize)).is_some();
        (view.size() != shards || !mine).then(|| Failure {
            code: FailureCode::WrongShard.into(),
            message: "not here".into(),
            topology: Some(update.clone()),
        })
    }

    fn refusal(code: FailureCode) -> answer::Result {
        answer::Result::Failure(Box::new(Failure {
            code: code.into(),
            message: format!("told to: {code:?}"),
            topology: None,
        }))
    }

    fn execute(&self, op: &Operation) -> answer::Result {
        if let Some(failure) = self.wrong(op.shard, op.shards) {
            return answer::Result::Failure(Box::new(failure));
        }
        let time = self.world.clock.fetch_add(1, SeqCst) << 16;
        let stamp = Some(Stamp { time, origin: self.store as u64 });
        let mut data = self.world.data.lock().unwrap();
        let held = data.get(&op.key).map(|(held, _)| held.clone());
        let returned = (op.returning() == Returning::Before).then(|| data.get(&op.key)).flatten();
        let written = answer::Result::Written(Written {
            stamp,
            replica: replica(self.store, op.shard as usize),
            value: returned.map(|(held, expiry_ms)| Box::new(value(held, *expiry_ms, stamp))),
        });
        match op.kind.clone().unwrap() {
            operation::Kind::Get(_) => match data.get(&op.key) {
                None => answer::Result::Missing(Missing {}),
                Some((held, expiry_ms)) => answer::Result::Found(value(held, *expiry_ms, stamp)),
            },
            operation::Kind::Put(put) => {
                let held = match put.value.unwrap() {
                    put::Value::Bytes(bytes) => Held::Bytes(bytes.to_vec()),
                    put::Value::Number(number) => Held::Number(number),
                };
                data.insert(op.key.clone(), (held, put.expiry_ms));
                written
            }
            operation::Kind::Delete(_) => {
                data.remove(&op.key);
                written
            }
            operation::Kind::Merge(merge) => {
                let held = match held {
                    Some(Held::Bytes(_)) => return Self::refusal(FailureCode::Mismatch),
                    Some(Held::Number(number)) => Some(number),
                    None => None,
                };
                let number = match (merge.kind(), held) {
                    (MergeKind::Sum, held) => held.unwrap_or(0.0) + merge.number,
                    (_, None) => merge.number,
                    (MergeKind::Max, Some(held)) => held.max(merge.number),
                    (MergeKind::Min, Some(held)) => held.min(merge.number),
                };
                data.insert(op.key.clone(), (Held::Number(number), 0));
                written
            }
            operation::Kind::Append(append) => {
                let mut bytes = match held {
                    Some(Held::Bytes(bytes)) => bytes,
                    _ => Vec::new(),
                };
                bytes.extend_from_slice(&append.bytes);
                data.insert(op.key.clone(), (Held::Bytes(bytes), 0));
                written
            }
            operation::Kind::Expire(expire) => {
                if let Some((_, expiry_ms)) = data.get_mut(&op.key) {
                    *expiry_ms = expire.expiry_ms;
                }
                written
            }
        }
    }
}

fn value(held: &Held, expiry_ms: u64, stamp: Option<Stamp>) -> Value {
    let value = match held {
        Held::Bytes(bytes) => value::Value::Bytes(bytes.clone().into()),
        Held::Number(number) => value::Value::Number(*number),
    };
    Value { value: Some(value), expiry_ms, stamp, size: None }
}

/// Counts a stream while it lives.
struct Counted(watch::Sender<i64>);

impl Counted {
    fn new(streams: &watch::Sender<i64>) -> Self {
        streams.send_modify(|n| *n += 1);
        Self(streams.clone())
    }
}

impl std::ops::Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

#[tonic::async_trait]
impl v1::store_server::Store for FakeStore {
    type PipeStream = Pin<Box<dyn Stream<Item = Result<Batch, Status>> + Send>>;
    type ScanStream = Pin<Box<dyn Stream<Item = Result<ScanResponse, Status>> + Send>>;
    type InspectStream = Pin<Box<dyn Stream<Item = Result<InspectResponse, Status>> + Send>>;

    async fn pipe(&self, request: Request<Streaming<Batch>>) -> Reply<Batch> {
        let (sender, answers) = mpsc::channel(16);
        let (this, mut batches) = (self.clone(), request.into_inner());
        let counted = Counted::new(&self.gauge.streams);
        tokio::spawn(async move {
            let _counted = counted;
            while let Some(Ok(batch)) = batches.next().await {
                this.gauge.messages.lock().unwrap().push(batch.operations.clone());
                let mode = *this.gauge.mode.lock().unwrap();
                let answer = |op: &Operation| {
                    let result = match mode {
                        Mode::Refuse(code) => FakeStore::refusal(code),
                        _ => this.execute(op),
                    };
                    Answer { id: op.id, result: Some(result) }
                };
                match mode {
                    Mode::Silent => continue,
                    Mode::Break => return,
                    // Out of order on purpose: answers are told apart by id.
                    _ => {
                        let mut answers: Vec<Answer> = batch.operations.iter().map(answer).collect();
                        answers.reverse();
                        let _ = sender.send(Ok(Batch { operations: vec![], answers })).await;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn scan(&self, request: Request<ScanRequest>) -> Reply<ScanResponse> {
        let request = request.into_inner();
        self.gauge.scans.lock().unwrap().push(request.clone());
        let (sender, answers) = mpsc::channel(1);
        let this = self.clone();
        tokio::spawn(async move {
            let mut after = request.after.clone();
            let mut sent = 0;
            loop {
                if let Some(failure) = this.wrong(request.shard, request.shards) {
                    let _ = sender.send(Ok(ScanResponse { entries: vec![], failure: Some(failure) })).await;
                    return;
                }
                let next = this.world.data.lock().unwrap().iter().find_map(|(key, (held, expiry_ms))| {
                    let mine = jump_hash(partition_hash(key), request.shards) == request.shard;
                    let wanted = key.starts_with(&request.prefix) && after.as_ref().is_none_or(|after| key > after);
                    (mine && wanted).then(|| Entry {
                        key: key.clone(),
                        value: Some(value(held, *expiry_ms, None)),
                        partition_hash: 0,
                    })
                });
                let Some(entry) = next else { return };
                if request.limit > 0 && sent == request.limit {
                    return;
                }
                let pause = *this.gauge.scan_pause.lock().unwrap();
                if pause == Some(sent as usize) {
                    let mut on = this.gauge.scan_on.subscribe();
                    let _ = on.wait_for(|on| *on).await;
                    let _ = sender.send(Err(Status::unavailable("told to break"))).await;
                    return;
                }
                after = Some(entry.key.clone());
                sent += 1;
                if sender.send(Ok(ScanResponse { entries: vec![entry], failure: None })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Reply<InspectResponse> {
        let request = request.into_inner();
        let keys: Vec<Bytes> = self.world.data.lock().unwrap().keys().cloned().collect();
        let entries = keys.into_iter().map(move |key| InspectEntry { key, hash: request.replica, collectable: false });
        let response = InspectResponse { entries: entries.collect() };
        Ok(Response::new(Box::pin(futures::stream::iter([Ok(response)]))))
    }

    async fn compact(&self, _: Request<CompactRequest>) -> Result<Response<CompactResponse>, Status> {
        Ok(Response::new(CompactResponse { bytes_before: 100, bytes_after: self.store as u64 }))
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        Ok(Response::new(HashResponse { records: 1, hash: request.into_inner().replica }))
    }

    type RepairStream = Pin<Box<dyn Stream<Item = Result<RepairResponse, Status>> + Send>>;

    async fn repair(&self, _: Request<RepairRequest>) -> Reply<RepairResponse> {
        let totals = [1, 2].map(|ranges| Ok(RepairResponse { ranges, ..RepairResponse::default() }));
        Ok(Response::new(Box::pin(futures::stream::iter(totals))))
    }
}
