//! The store's gRPC services: the pipe, scans, inspection, and what peers ask for.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use vasto_client::env::Env;
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::{
    Batch, CompactRequest, CompactResponse, CompareRequest, CompareResponse, Entry, Failure, FailureCode,
    FollowRequest, FollowResponse, HashRequest, HashResponse, InspectEntry, InspectRequest, InspectResponse,
    KeyspaceUpdate, LearnRequest, RepairRequest, RepairResponse, ScanRequest, ScanResponse, SnapshotRequest,
    SnapshotResponse, SoundRequest, SoundResponse, follow_request, follow_response, peer_server, store_server,
};
use xxhash_rust::xxh64::xxh64;

use crate::answer::{Answerer, VALUE_BYTES, failure, to_value, too_large, value_len};
use crate::follow;
use crate::host::Host;
use crate::keyspace::Keyspace;
use crate::metrics::{Counts, Ending, Operation as Kind, Tally};
use crate::record::{Record, glance};
use crate::repair;
use crate::replica::Replica;
use crate::snapshot;

/// Bytes of entries in one message of a scan.
const PAGE_BYTES: usize = 256 << 10;
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
    answerer: Answerer,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Server {
    /// Serves what the host holds.
    pub fn new(host: Arc<Host>, env: Env, answerer: Answerer, counts: Arc<Counts>) -> Self {
        Self { host, env, counts, answerer }
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
}

#[tonic::async_trait]
impl store_server::Store for Server {
    type PipeStream = Out<Batch>;

    async fn pipe(&self, request: Request<Streaming<Batch>>) -> Result<Response<Self::PipeStream>, Status> {
        Ok(Response::new(Box::pin(self.answerer.clone().pipe(request.into_inner()))))
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
            let known = keyspace.with_topology(|t| t.served().any(|v| v.size() == request.shards)).unwrap_or(false);
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
        keyspace.serves(now);
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
