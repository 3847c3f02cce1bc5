//! The store's gRPC services: the pipe, scans, inspection, and what peers ask for.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use vasto_client::env::Env;
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::{
    Answer, Batch, CompactRequest, CompactResponse, CompareRequest, CompareResponse, Entry, Failure, FailureCode,
    FollowRequest, FollowResponse, HashRequest, HashResponse, InspectEntry, InspectRequest, InspectResponse,
    KeyspaceUpdate, LearnRequest, Missing, Operation, RepairRequest, RepairResponse, ScanRequest, ScanResponse,
    SnapshotRequest, SnapshotResponse, SoundRequest, SoundResponse, Value, Written, answer, follow_request,
    follow_response, peer_server, store_server, value,
};
use xxhash_rust::xxh64::xxh64;

use crate::follow;
use crate::host::Host;
use crate::keyspace::{Keyspace, readable};
use crate::merge::{Limits, LocalOp};
use crate::metrics::{Counts, Ending, Operation as Kind, Part, Tally};
use crate::record::{Content, Record, Stamp, View, glance};
use crate::repair;
use crate::replica::Replica;
use crate::snapshot;
use crate::writer::{LocalWrite, Refused, Taken};

/// Messages of one pipe that are worked on at once; more wait in the connection.
const MESSAGES: usize = 64;
/// Bytes of entries in one message of a scan.
const PAGE_BYTES: usize = 256 << 10;
/// The largest value that one answer holds.
const VALUE_BYTES: usize = 15 << 20;
/// How often whoever waits for a repair hears of it.
const TELL: Duration = Duration::from_millis(500);
/// Rows looked at in one step of a scan.
const PAGE_ROWS: usize = 2_000;

/// All services of a store.
#[derive(Clone)]
pub struct Server {
    host: Arc<Host>,
    env: Env,
    counts: Arc<Counts>,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Server {
    /// Serves what the host holds.
    pub fn new(host: Arc<Host>, env: Env, counts: Arc<Counts>) -> Self {
        Self { host, env, counts }
    }

    fn keyspace(&self, uid: &str) -> Result<Arc<Keyspace>, Status> {
        self.host.keyspace(uid).ok_or_else(|| Status::not_found(format!("keyspace {uid} is not on this store")))
    }

    fn replica(&self, uid: &str, id: u64) -> Result<(Arc<Keyspace>, Arc<Replica>), Status> {
        let keyspace = self.keyspace(uid)?;
        let replica = keyspace
            .replica(id)
            .ok_or_else(|| Status::not_found(format!("replica {id:016x} is not on this store, or not ready yet")))?;
        Ok((keyspace, replica))
    }

    /// Answers one message: writes go to their replicas' writers, reads to a blocking thread, both at once.
    pub async fn answer(&self, batch: Batch) -> Vec<Answer> {
        let mut work: BTreeMap<(String, u64), Work> = BTreeMap::new();
        let mut answers = Vec::with_capacity(batch.operations.len());
        let mut refused = Tally::default();
        for operation in batch.operations {
            let id = operation.id;
            let kind = operation.kind.as_ref().map(Kind::of);
            match self.place(operation) {
                Ok((keyspace, replica, placed)) => {
                    let work = work.entry((keyspace.uid().to_owned(), replica.id)).or_insert_with(|| Work {
                        keyspace,
                        replica,
                        reads: Vec::new(),
                        ids: Vec::new(),
                        writes: Vec::new(),
                    });
                    match placed {
                        Placed::Read(read) => work.reads.push((id, read)),
                        Placed::Write(kind, write) => {
                            work.ids.push((id, kind));
                            work.writes.push(write);
                        }
                    }
                }
                Err(failure) => {
                    if let Some(kind) = kind {
                        refused.add(kind, Ending::of(failure.code()));
                    }
                    answers.push(Answer { id, result: Some(answer::Result::Failure(*failure)) });
                }
            }
        }
        self.counts.add(&refused);
        let now = self.env.now_ms();
        for work in work.values().filter(|work| !work.writes.is_empty()) {
            // A caller tells the greatest stamp of others than the replica that it takes for the shard's. It may know
            // an older topology than this store, and have its stamps from another replica here.
            work.replica.progress.pass(work.keyspace.clock_beside(work.replica.id));
        }
        let done = futures::future::join_all(work.into_values().map(|w| w.run(now, &self.counts))).await;
        answers.extend(done.into_iter().flatten());
        answers
    }

    fn place(&self, operation: Operation) -> Result<(Arc<Keyspace>, Arc<Replica>, Placed), Box<Failure>> {
        let Some(keyspace) = self.host.keyspace(&operation.keyspace) else {
            return Err(failure(FailureCode::WrongShard, "this store has nothing of the keyspace", None));
        };
        let hash = partition_hash(operation.partition_key.as_ref().unwrap_or(&operation.key));
        let named_partition = operation.partition_key.as_ref().is_some_and(|p| *p != operation.key);
        if let Err(refusal) = Limits::default().check_key(&operation.key) {
            return Err(failure(refusal.code(), refusal.to_string(), None));
        }
        let Some(replica) = keyspace.route(hash) else {
            let message = format!("by topology version {} this key's shard is not on this store", keyspace.version());
            // A place that is not ready yet is one in the topology.
            let newer = Some(keyspace.update());
            return Err(failure(FailureCode::WrongShard, message, newer));
        };
        let after = operation.after.map(Stamp::from);
        let (head, returning) = (operation.head, operation.returning());
        let key = operation.key;
        let Some(kind) = operation.kind else {
            let message = "the operation has no kind: say get, put, delete, merge, append or expire";
            return Err(failure(FailureCode::Invalid, message, None));
        };
        let asked = Kind::of(&kind);
        let op = match LocalOp::from_wire(kind, hash) {
            Ok(None) => return Ok((keyspace, replica, Placed::Read(Read { key, hash, head }))),
            Ok(Some(op)) => op,
            Err(refusal) => return Err(failure(refusal.code(), refusal.to_string(), None)),
        };
        if self.host.is_leaving() {
            let refused = Refused::leaving();
            return Err(failure(refused.code, refused.message, None));
        }
        if !keyspace.is_confirmed() {
            let message = "the store has restarted and waits to learn the current topology";
            return Err(failure(FailureCode::NotReady, message, None));
        }
        let write = LocalWrite { key, op, after, named_partition, returning, head };
        Ok((keyspace, replica, Placed::Write(asked, write)))
    }
}

enum Placed {
    Read(Read),
    Write(Kind, LocalWrite),
}

struct Read {
    key: Bytes,
    hash: u64,
    head: bool,
}

struct Work {
    keyspace: Arc<Keyspace>,
    replica: Arc<Replica>,
    reads: Vec<(u64, Read)>,
    /// Of the writes, in their order.
    ids: Vec<(u64, Kind)>,
    writes: Vec<LocalWrite>,
}

impl Work {
    async fn run(self, now: u64, counts: &Counts) -> Vec<Answer> {
        let Self { keyspace, replica, reads, ids, writes } = self;
        let reading = async {
            if reads.is_empty() {
                return Vec::new();
            }
            let begin = Instant::now();
            let from = replica.clone();
            let ids: Vec<u64> = reads.iter().map(|(id, ..)| *id).collect();
            let read = keyspace.env().blocking(move || {
                reads.into_iter().map(|(id, asked)| read(&from, id, &asked, now)).collect::<Vec<_>>()
            });
            let answers = read.await.unwrap_or_else(|_| {
                ids.into_iter().map(|id| failed(id, failure(FailureCode::Internal, "the read failed", None))).collect()
            });
            counts.took(Part::Read, begin.elapsed());
            answers
        };
        let writing = async {
            if writes.is_empty() {
                return Vec::new();
            }
            let begin = Instant::now();
            let results = replica.write(writes).await;
            counts.took(Part::Write, begin.elapsed());
            let answers = results.into_iter().zip(&ids);
            let answers = answers.map(|(result, (id, _))| written(&keyspace, &replica, *id, result));
            answers.collect()
        };
        let (mut answers, more): (Vec<Answer>, Vec<Answer>) = tokio::join!(reading, writing);
        let mut tally = Tally::default();
        answers.iter().for_each(|answer| tally.add(Kind::Get, ending(answer)));
        more.iter().zip(&ids).for_each(|(answer, (_, kind))| tally.add(*kind, ending(answer)));
        counts.add(&tally);
        answers.extend(more);
        answers
    }
}

fn ending(answer: &Answer) -> Ending {
    match &answer.result {
        Some(answer::Result::Failure(failure)) => Ending::of(failure.code()),
        _ => Ending::Ok,
    }
}

fn read(replica: &Replica, id: u64, asked: &Read, now: u64) -> Answer {
    let row = replica.engine.row(&asked.key).inspect_err(|e| replica.progress.failed(e));
    let found = row.map_err(|e| e.to_string()).and_then(|row| match row {
        Some(row) => Record::decode(row.record).map(Some).map_err(|e| e.to_string()),
        None => Ok(None),
    });
    let result = match found {
        // Under another partition key it is another key's.
        Ok(Some(record)) if record.partition_hash() == asked.hash => match to_value(record.read(now), asked.head) {
            Some(value) if value_len(&value) > VALUE_BYTES => answer::Result::Failure(*too_large(value_len(&value))),
            Some(value) => answer::Result::Found(value),
            None => answer::Result::Missing(Missing {}),
        },
        Ok(_) => answer::Result::Missing(Missing {}),
        Err(error) => {
            tracing::error!(replica = replica.id, error, "a record can't be read");
            answer::Result::Failure(*failure(FailureCode::Internal, error, None))
        }
    };
    Answer { id, result: Some(result) }
}

fn value_len(value: &Value) -> usize {
    match &value.value {
        Some(value::Value::Bytes(bytes)) => bytes.len(),
        _ => 8,
    }
}

/// Callers are held to less, but appends through different replicas add up.
fn too_large(len: usize) -> Box<Failure> {
    let message = format!(
        "the value has grown to {len} bytes by appends through several stores, more than one message holds: put or delete the key"
    );
    failure(FailureCode::Invalid, message, None)
}

/// What is answered of what a key holds, or of its head; none if that is nothing.
fn to_value(view: View, head: bool) -> Option<Value> {
    let (value, size) = match view.content {
        Content::Nothing => return None,
        Content::Bytes(bytes) if head => (value::Value::Bytes(Bytes::new()), Some(bytes.len() as u64)),
        Content::Bytes(bytes) => (value::Value::Bytes(bytes), None),
        Content::Number(number) => (value::Value::Number(number.get()), None),
    };
    Some(Value { value: Some(value), expiry_ms: view.expiry_ms, stamp: Some(view.stamp.into()), size })
}

fn written(keyspace: &Keyspace, replica: &Replica, id: u64, result: Result<Taken, Refused>) -> Answer {
    match result {
        Ok(Taken { stamp, view, left_out }) => {
            let head = matches!(&view, Some(View { content: Content::Bytes(b), .. }) if b.len() > VALUE_BYTES);
            let value = view.and_then(|view| to_value(view, head));
            let value = value.map(|value| Value { size: left_out.or(value.size), ..value });
            let written = Written { stamp: Some(stamp.into()), replica: replica.id, value };
            Answer { id, result: Some(answer::Result::Written(written)) }
        }
        Err(refused) => {
            let topology = (refused.code == FailureCode::WrongShard).then(|| keyspace.update());
            failed(id, failure(refused.code, refused.message, topology))
        }
    }
}

fn failed(id: u64, failure: Box<Failure>) -> Answer {
    Answer { id, result: Some(answer::Result::Failure(*failure)) }
}

fn failure(code: FailureCode, message: impl Into<String>, topology: Option<Arc<KeyspaceUpdate>>) -> Box<Failure> {
    Box::new(Failure { code: code.into(), message: message.into(), topology: topology.map(|t| (*t).clone()) })
}

#[tonic::async_trait]
impl store_server::Store for Server {
    type PipeStream = Out<Batch>;

    async fn pipe(&self, request: Request<Streaming<Batch>>) -> Result<Response<Self::PipeStream>, Status> {
        let mut requests = request.into_inner();
        let (send, receive) = mpsc::channel::<Result<Batch, Status>>(MESSAGES);
        let server = self.clone();
        tokio::spawn(async move {
            let room = Arc::new(Semaphore::new(MESSAGES));
            while let Some(Ok(batch)) = requests.next().await {
                // While all places are taken the connection itself holds the client back.
                let Ok(place) = room.clone().acquire_owned().await else { return };
                let (server, send) = (server.clone(), send.clone());
                tokio::spawn(async move {
                    for answers in in_messages(server.answer(batch).await) {
                        if send.send(Ok(Batch { operations: Vec::new(), answers })).await.is_err() {
                            break;
                        }
                    }
                    drop(place);
                });
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    type ScanStream = Out<ScanResponse>;

    async fn scan(&self, request: Request<ScanRequest>) -> Result<Response<Self::ScanStream>, Status> {
        let request = request.into_inner();
        let (send, receive) = mpsc::channel(4);
        let keyspace = self.host.keyspace(&request.keyspace);
        let (env, counts) = (self.env.clone(), self.counts.clone());
        tokio::spawn(async move {
            let scanned = scan(keyspace, &env, request, &send).await;
            let mut tally = Tally::default();
            tally.add(Kind::Scan, scanned.as_ref().map_or_else(|failure| Ending::of(failure.code()), |()| Ending::Ok));
            counts.add(&tally);
            if let Err(failure) = scanned {
                let _ = send.send(Ok(ScanResponse { entries: Vec::new(), failure: Some(*failure) })).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    type InspectStream = Out<InspectResponse>;

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<Self::InspectStream>, Status> {
        let request = request.into_inner();
        let (keyspace, replica) = self.replica(&request.keyspace, request.replica)?;
        let (send, receive) = mpsc::channel(4);
        let now = self.env.now_ms();
        let topology = keyspace.topology();
        let env = self.env.clone();
        let sending = async move {
            let _ = env
                .produce(send, move |send| {
                    let mut entries = Vec::new();
                    let walked = replica.engine.rows(b"", request.after.as_deref(), |key, _, encoded| {
                        let Ok(seen) = glance(encoded) else { return true };
                        if topology.holds(replica.id, seen.partition_hash) {
                            let collectable = Record::decode(Bytes::copy_from_slice(encoded))
                                .is_ok_and(|record| record.may_be_collected(now, 0));
                            entries.push(InspectEntry {
                                key: Bytes::copy_from_slice(key),
                                hash: xxh64(encoded, 0),
                                collectable,
                            });
                        }
                        let full = entries.len() >= PAGE_ROWS;
                        !full || send(Ok(InspectResponse { entries: std::mem::take(&mut entries) }))
                    });
                    let last = match walked {
                        Ok(()) => Ok(InspectResponse { entries }),
                        Err(error) => {
                            replica.progress.failed(&error);
                            Err(Status::data_loss(error.to_string()))
                        }
                    };
                    send(last);
                })
                .await;
        };
        tokio::spawn(sending);
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn compact(&self, request: Request<CompactRequest>) -> Result<Response<CompactResponse>, Status> {
        let keyspace = self.keyspace(&request.into_inner().keyspace)?;
        let done = self.env.blocking(move || {
            let (mut before, mut after) = (0, 0);
            for replica in keyspace.replicas() {
                before += replica.engine.estimate().1;
                replica.engine.compact();
                after += replica.engine.estimate().1;
            }
            CompactResponse { bytes_before: before, bytes_after: after }
        });
        done.await.map(Response::new).map_err(|e| Status::internal(e.to_string()))
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let request = request.into_inner();
        let (keyspace, replica) = self.replica(&request.keyspace, request.replica)?;
        let (topology, reading) = (keyspace.topology(), replica.clone());
        let now_ms = if request.now_ms == 0 { self.env.now_ms() } else { request.now_ms };
        let read = self.env.blocking(move || repair::content(&reading, &topology, now_ms)).await;
        let read = read.map_err(|e| Status::internal(e.to_string()))?;
        let (records, hash) = read.map_err(|error| {
            replica.progress.failed(&error);
            Status::data_loss(error.to_string())
        })?;
        Ok(Response::new(HashResponse { records, hash }))
    }

    type RepairStream = Out<RepairResponse>;

    async fn repair(&self, request: Request<RepairRequest>) -> Result<Response<Self::RepairStream>, Status> {
        let request = request.into_inner();
        let (keyspace, replica) = self.replica(&request.keyspace, request.replica)?;
        let (send, receive) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut told = Instant::now();
            let tell = |totals: &RepairResponse| {
                if told.elapsed() >= TELL {
                    told = Instant::now();
                    // Whoever reads slowly skips some.
                    let _ = send.try_send(Ok(totals.clone()));
                }
            };
            let round = repair::round(&keyspace, &replica, repair::WAITED_FOR, tell);
            tokio::select! {
                totals = round => { let _ = send.send(Ok(totals)).await; }
                () = send.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

/// Answers may be larger than one message: values up to 8 MiB each.
fn in_messages(answers: Vec<Answer>) -> Vec<Vec<Answer>> {
    let size = |a: &Answer| match &a.result {
        Some(
            answer::Result::Found(Value { value: Some(value::Value::Bytes(b)), .. })
            | answer::Result::Written(Written { value: Some(Value { value: Some(value::Value::Bytes(b)), .. }), .. }),
        ) => b.len() + 64,
        _ => 64,
    };
    let mut messages = vec![Vec::with_capacity(answers.len())];
    let mut bytes = 0;
    for answer in answers {
        let more = size(&answer);
        if bytes > 0 && bytes + more > 4 << 20 {
            messages.push(Vec::new());
            bytes = 0;
        }
        bytes += more;
        if let Some(last) = messages.last_mut() {
            last.push(answer);
        }
    }
    messages
}

async fn scan(
    keyspace: Option<Arc<Keyspace>>,
    env: &Env,
    request: ScanRequest,
    send: &mpsc::Sender<Result<ScanResponse, Status>>,
) -> Result<(), Box<Failure>> {
    let Some(keyspace) = keyspace else {
        return Err(failure(FailureCode::WrongShard, "this store has nothing of the keyspace", None));
    };
    let mut after = request.after.clone();
    let mut left = if request.limit == 0 { u64::MAX } else { request.limit };
    loop {
        // Each page asks anew: once the view is no longer read by, another store goes on.
        let Some(replica) = keyspace.reader(request.shard, request.shards) else {
            let known = keyspace.with_topology(|t| readable(t).any(|v| v.size() == request.shards)).unwrap_or(false);
            let code = if known { FailureCode::NotReady } else { FailureCode::WrongShard };
            let message = format!(
                "shard {} of {} is not read here by topology version {}",
                request.shard,
                request.shards,
                keyspace.version()
            );
            return Err(failure(code, message, Some(keyspace.update())));
        };
        let (prefix, from, now) = (request.prefix.clone(), after.clone(), env.now_ms());
        let (shard, shards) = (request.shard, request.shards);
        let head = request.head;
        let page =
            env.blocking(move || scan_page(&replica, (shard, shards), &prefix, from.as_deref(), left, head, now));
        let page = page.await.map_err(|e| failure(FailureCode::Internal, e.to_string(), None))??;
        left -= page.entries.len() as u64;
        let end = page.next.is_none() || left == 0;
        let message = ScanResponse { entries: page.entries, failure: None };
        // An empty page is sent too: a long stretch without a live key must not look like death.
        if send.send(Ok(message)).await.is_err() || end {
            return Ok(());
        }
        after = page.next;
    }
}

struct Page {
    entries: Vec<Entry>,
    /// Where to go on; `None`: the end.
    next: Option<Bytes>,
}

fn scan_page(
    replica: &Replica,
    (shard, shards): (u32, u32),
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: u64,
    head: bool,
    now: u64,
) -> Result<Page, Box<Failure>> {
    let mut page = Page { entries: Vec::new(), next: None };
    let (mut bytes, mut looked, mut large) = (0, 0, None);
    let after = after.filter(|a| *a >= prefix);
    let walked = replica.engine.rows(prefix, after, |key, _, encoded| {
        if !key.starts_with(prefix) {
            return false;
        }
        looked += 1;
        let hash = glance(encoded).map(|seen| seen.partition_hash);
        if let Ok(hash) = hash
            && jump_hash(hash, shards) == shard
            && let Ok(record) = Record::decode(Bytes::copy_from_slice(encoded))
            && let Some(value) = to_value(record.read(now), head)
        {
            if value_len(&value) > VALUE_BYTES {
                large = Some(value_len(&value));
                return false;
            }
            bytes += key.len() + if head { 64 } else { encoded.len() };
            let partition_hash = if hash == partition_hash(key) { 0 } else { hash };
            page.entries.push(Entry { key: Bytes::copy_from_slice(key), value: Some(value), partition_hash });
        }
        let more = bytes < PAGE_BYTES && looked < PAGE_ROWS && (page.entries.len() as u64) < limit;
        if !more {
            page.next = Some(Bytes::copy_from_slice(key));
        }
        more
    });
    walked
        .inspect_err(|e| replica.progress.failed(e))
        .map_err(|e| failure(FailureCode::Internal, e.to_string(), None))?;
    match large {
        // What comes before it is still worth sending.
        Some(len) if page.entries.is_empty() => Err(too_large(len)),
        Some(_) => {
            page.next = page.entries.last().map(|e| e.key.clone());
            Ok(page)
        }
        None => Ok(page),
    }
}

#[tonic::async_trait]
impl peer_server::Peer for Server {
    type FollowStream = Out<FollowResponse>;

    async fn follow(&self, request: Request<Streaming<FollowRequest>>) -> Result<Response<Self::FollowStream>, Status> {
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(Duration::from_secs(5), requests.next()).await;
        let start = match first {
            Ok(Some(Ok(FollowRequest { message: Some(follow_request::Message::Start(start)) }))) => start,
            _ => return Err(Status::invalid_argument("a Follow begins with a start")),
        };
        let (send, receive) = mpsc::channel(4);
        match self.replica(&start.keyspace, start.source) {
            Ok((keyspace, replica)) => {
                tokio::spawn(follow::serve(keyspace, replica, start, requests, send));
            }
            Err(status) => {
                let message = Some(follow_response::Message::NotReady(status.message().to_owned()));
                let _ = send.try_send(Ok(FollowResponse { message, topology: None }));
            }
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    type SnapshotStream = Out<SnapshotResponse>;

    async fn snapshot(&self, request: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let request = request.into_inner();
        let (keyspace, replica) = self.replica(&request.keyspace, request.source)?;
        let (send, receive) = mpsc::channel(4);
        tokio::spawn(snapshot::serve(keyspace, replica, request, send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn learn(&self, request: Request<LearnRequest>) -> Result<Response<KeyspaceUpdate>, Status> {
        let keyspace = self.keyspace(&request.into_inner().keyspace)?;
        Ok(Response::new((*keyspace.update()).clone()))
    }

    async fn sound(&self, request: Request<SoundRequest>) -> Result<Response<SoundResponse>, Status> {
        let request = request.into_inner();
        let sound = self
            .replica(&request.keyspace, request.replica)
            .is_ok_and(|(_, replica)| replica.progress.fault().is_none() && !self.host.is_leaving());
        Ok(Response::new(SoundResponse { sound }))
    }

    type CompareStream = Out<CompareResponse>;

    async fn compare(&self, request: Request<CompareRequest>) -> Result<Response<Self::CompareStream>, Status> {
        let request = request.into_inner();
        let (keyspace, replica) = self.replica(&request.keyspace, request.source)?;
        let (send, receive) = mpsc::channel(4);
        tokio::spawn(repair::serve(keyspace, replica, request, send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}
