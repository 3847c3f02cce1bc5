//! The map over gRPC, for generated clients: `proto/vasto/v1/kv.proto`, with reflection and health.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};
use vasto_client::{Code, Data, Entry, Error, Keyspace, Merge, Op, Options, Outcome, Returning, ScanOptions, Value};

use crate::Gateway;
use crate::door::{Door, Place};
use crate::http::version;
use crate::metrics::Protocol;
use v1::kv_server::{Kv, KvServer};
use v1::*;

/// The wire, generated from `proto`.
#[allow(missing_docs, clippy::large_enum_variant, clippy::doc_markdown)]
mod v1 {
    tonic::include_proto!("vasto.v1");
    pub(super) const DESCRIPTION: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kv.bin"));
}

/// The most bytes of a message: a batch, or a value with its key.
const MAX_MESSAGE: usize = 16 << 20;
/// The most bytes of answers, after which no read is answered: what is left is for the answers of what changes something.
const MAX_ANSWERS: usize = MAX_MESSAGE - (4 << 20);
/// Bytes around each answer of a batch, at most.
const FRAME: usize = 8;
/// Requests at once on one of them.
const STREAMS: u32 = 64;
/// How long a client may not take what is sent to it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests at once, over all connections.
const REQUESTS: usize = 1_024;
/// Bytes of entries that go in one message.
const PAGE: usize = 256 << 10;
/// A connection that says nothing is asked whether it lives.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Serves until `stop`.
pub(crate) async fn serve(gateway: Arc<Gateway>, listener: TcpListener, stop: CancellationToken) {
    let (health, healthy) = tonic_health::server::health_reporter();
    health.set_serving::<KvServer<Service>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::DESCRIPTION)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // What was compiled with this program can be read.
    let (newest, old) = match (reflection().build_v1(), reflection().build_v1alpha()) {
        (Ok(newest), Ok(old)) => (newest, old),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "gRPC is not served: its description can't be read");
            return;
        }
    };
    let connections = connections(gateway.clone(), listener);
    let service = Service { gateway, places: Arc::new(Semaphore::new(REQUESTS)) };
    let kv = KvServer::new(service).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS)
        .add_service(kv)
        .add_service(healthy)
        .add_service(newest)
        .add_service(old)
        .serve_with_incoming_shutdown(connections, stop.cancelled())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "gRPC is served no more");
    }
}

/// Those that there is room for. The others hear nothing: their protocol has no word for it yet.
fn connections(gateway: Arc<Gateway>, listener: TcpListener) -> impl Stream<Item = io::Result<Connection>> {
    let door = Door::new(Protocol::Grpc);
    futures::stream::unfold((gateway, door, listener), |(gateway, door, listener)| async {
        let (stream, place) = door.next(&gateway, &listener, b"").await;
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(PATIENCE));
        Some((Ok(Connection { stream: Box::pin(stream), _place: place }), (gateway, door, listener)))
    })
}

/// A connection, counted until it ends.
struct Connection {
    stream: Pin<Box<TimeoutStream<TcpStream>>>,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

struct Service {
    gateway: Arc<Gateway>,
    places: Arc<Semaphore>,
}

impl Service {
    /// A place among those that are worked on.
    fn place(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.places
            .clone()
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted(format!("{REQUESTS} requests are being worked on: try again")))
    }

    async fn open(&self, name: &str) -> Result<Keyspace, Status> {
        self.gateway.maps.open(name).await.map_err(status)
    }

    /// One operation, counted.
    async fn one(&self, keyspace: &str, op: Op) -> Result<Outcome, Status> {
        let begun = Instant::now();
        let done = async {
            let _place = self.place()?;
            let keyspace = self.open(keyspace).await?;
            let outcome = keyspace.batch([op]).await.pop();
            outcome.unwrap_or_else(|| Err(Error::Invalid("nothing was asked".to_owned()))).map_err(status)
        };
        let outcome = done.await;
        self.gateway.counts.of(Protocol::Grpc).answered(1, usize::from(outcome.is_err()), begun.elapsed());
        outcome
    }
}

fn code(error: &Error) -> tonic::Code {
    match error.code() {
        Code::Missing => tonic::Code::NotFound,
        Code::Invalid => tonic::Code::InvalidArgument,
        Code::Mismatch => tonic::Code::FailedPrecondition,
        Code::Overloaded | Code::NoSpace => tonic::Code::ResourceExhausted,
        Code::Unknown => tonic::Code::Unknown,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::Deadline => tonic::Code::DeadlineExceeded,
    }
}

fn status(error: Error) -> Status {
    Status::new(code(&error), error.to_string())
}

fn value(value: Value) -> KvValue {
    let version = version(value.stamp, &value.data);
    let data = match value.data {
        Data::Bytes(bytes) => kv_value::Data::Bytes(bytes),
        Data::Number(number) => kv_value::Data::Number(number),
    };
    KvValue { data: Some(data), expiry_ms: value.expiry_ms.unwrap_or(0), version }
}

fn options(partition_key: Option<Bytes>) -> Options {
    Options { partition_key, ..Options::new() }
}

fn get(request: KvGetRequest) -> Op {
    Op::get(request.key).with(options(request.partition_key))
}

/// The put, and what is put.
fn put(request: KvPutRequest) -> Result<(Op, Data), Status> {
    let data = match request.data {
        Some(kv_put_request::Data::Bytes(bytes)) => Data::Bytes(bytes),
        Some(kv_put_request::Data::Number(number)) => Data::Number(number),
        None => return Err(Status::invalid_argument("the put has no data: set bytes (which may be empty) or number")),
    };
    let ttl = (request.ttl_ms != 0).then(|| Duration::from_millis(request.ttl_ms));
    let op = Op::put(request.key, data.clone()).with(Options { ttl, ..options(request.partition_key) });
    Ok((op, data))
}

fn delete(request: KvDeleteRequest) -> Op {
    Op::delete(request.key).with(options(request.partition_key))
}

fn merge(request: KvMergeRequest) -> Result<Op, Status> {
    use kv_merge_request::Operand;
    let merge = match request.operand {
        Some(Operand::Add(number)) => Merge::Add(number),
        Some(Operand::Max(number)) => Merge::Max(number),
        Some(Operand::Min(number)) => Merge::Min(number),
        Some(Operand::Append(bytes)) => Merge::Append(bytes),
        None => return Err(Status::invalid_argument("the merge has no operand: set add, max, min or append")),
    };
    let options = options(request.partition_key).returning(Returning::After).head();
    Ok(Op::merge(request.key, merge).with(options))
}

fn got(outcome: Outcome) -> KvGetResponse {
    KvGetResponse { value: outcome.value().map(value) }
}

fn was_put(outcome: Outcome, data: &Data) -> KvPutResponse {
    match outcome {
        Outcome::Written(stamp) | Outcome::Returned(stamp, _) => KvPutResponse { version: version(stamp, data) },
        Outcome::Found(_) | Outcome::Nothing => KvPutResponse::default(),
    }
}

fn was_merged(outcome: Outcome) -> KvMergeResponse {
    KvMergeResponse { number: outcome.value().and_then(|value| value.number()) }
}

/// What an operation of a batch is answered with.
enum Kind {
    Get,
    Put(Data),
    Delete,
    Merge,
}

#[tonic::async_trait]
impl Kv for Service {
    async fn get(&self, request: Request<KvGetRequest>) -> Result<Response<KvGetResponse>, Status> {
        let request = request.into_inner();
        let keyspace = request.keyspace.clone();
        Ok(Response::new(got(self.one(&keyspace, get(request)).await?)))
    }

    async fn put(&self, request: Request<KvPutRequest>) -> Result<Response<KvPutResponse>, Status> {
        let request = request.into_inner();
        let keyspace = request.keyspace.clone();
        let (op, data) = put(request)?;
        Ok(Response::new(was_put(self.one(&keyspace, op).await?, &data)))
    }

    async fn delete(&self, request: Request<KvDeleteRequest>) -> Result<Response<KvDeleteResponse>, Status> {
        let request = request.into_inner();
        let keyspace = request.keyspace.clone();
        self.one(&keyspace, delete(request)).await?;
        Ok(Response::new(KvDeleteResponse {}))
    }

    async fn merge(&self, request: Request<KvMergeRequest>) -> Result<Response<KvMergeResponse>, Status> {
        let request = request.into_inner();
        let keyspace = request.keyspace.clone();
        Ok(Response::new(was_merged(self.one(&keyspace, merge(request)?).await?)))
    }

    async fn batch(&self, request: Request<KvBatchRequest>) -> Result<Response<KvBatchResponse>, Status> {
        use kv_operation::Operation;
        let _place = self.place()?;
        let begun = Instant::now();
        let KvBatchRequest { keyspace, operations } = request.into_inner();
        let keyspace = self.open(&keyspace).await?;
        let (mut kinds, mut ops) = (Vec::with_capacity(operations.len()), Vec::with_capacity(operations.len()));
        for (index, operation) in operations.into_iter().enumerate() {
            let at = |status: Status| Status::new(status.code(), format!("operations[{index}]: {}", status.message()));
            let (kind, op) = match operation.operation {
                Some(Operation::Get(request)) => (Kind::Get, get(request)),
                Some(Operation::Put(request)) => {
                    let (op, data) = put(request).map_err(at)?;
                    (Kind::Put(data), op)
                }
                Some(Operation::Delete(request)) => (Kind::Delete, delete(request)),
                Some(Operation::Merge(request)) => (Kind::Merge, merge(request).map_err(at)?),
                None => return Err(at(Status::invalid_argument("it is none of get, put, delete and merge"))),
            };
            kinds.push(kind);
            ops.push(op);
        }
        let mut reads = crate::batch::FIRST_READS;
        let outcomes = crate::batch::carry_out(&keyspace, ops, MAX_MESSAGE, &mut reads).await;
        let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        self.gateway.counts.of(Protocol::Grpc).answered(outcomes.len(), failed, begun.elapsed());
        let results = outcomes.into_iter().zip(kinds).map(|(outcome, kind)| {
            let result = match (outcome, kind) {
                (Err(error), _) => {
                    kv_result::Result::Error(KvError { code: code(&error) as i32, message: error.to_string() })
                }
                (Ok(outcome), Kind::Get) => kv_result::Result::Get(got(outcome)),
                (Ok(outcome), Kind::Put(data)) => kv_result::Result::Put(was_put(outcome, &data)),
                (Ok(_), Kind::Delete) => kv_result::Result::Delete(KvDeleteResponse {}),
                (Ok(outcome), Kind::Merge) => kv_result::Result::Merge(was_merged(outcome)),
            };
            KvResult { result: Some(result) }
        });
        // All of it was done: what there is no room for is told of each read by itself.
        let mut bytes = 0;
        let fitting = results.map(|result| {
            let length = prost::Message::encoded_len(&result);
            if !matches!(result.result, Some(kv_result::Result::Get(_))) || bytes + length <= MAX_ANSWERS {
                bytes += length + FRAME;
                return result;
            }
            let message = format!("the answers have more than {} MiB: ask for fewer keys at a time", MAX_ANSWERS >> 20);
            let error = KvError { code: tonic::Code::OutOfRange as i32, message };
            KvResult { result: Some(kv_result::Result::Error(error)) }
        });
        Ok(Response::new(KvBatchResponse { results: fitting.collect() }))
    }

    type ScanStream = Pin<Box<dyn Stream<Item = Result<KvScanResponse, Status>> + Send>>;

    async fn scan(&self, request: Request<KvScanRequest>) -> Result<Response<Self::ScanStream>, Status> {
        let place = self.place()?;
        let request = request.into_inner();
        let keyspace = self.open(&request.keyspace).await?;
        let options = ScanOptions {
            prefix: request.prefix,
            after: request.after,
            limit: (request.limit != 0).then_some(request.limit),
            head: request.keys_only,
        };
        let head = request.keys_only;
        let entries = keyspace.scan(options).ready_chunks(1024);
        // Those that are there go together; the place is held until the last one has been taken.
        let pages = entries.flat_map(move |entries| {
            let _held = &place;
            futures::stream::iter(pages(entries, head))
        });
        Ok(Response::new(Box::pin(pages)))
    }
}

/// Entries in messages that are not too large; an error ends them.
fn pages(entries: Vec<Result<Entry, Error>>, head: bool) -> Vec<Result<KvScanResponse, Status>> {
    let (mut pages, mut page, mut bytes) = (Vec::new(), Vec::new(), 0);
    for entry in entries {
        match entry {
            Ok(entry) => {
                bytes += entry.key.len() + entry.value.bytes().map_or(8, Bytes::len) + 64;
                let mut value = value(entry.value);
                if head {
                    // The bytes are a part of it, and are not there.
                    value.version.clear();
                }
                page.push(KvEntry { key: entry.key, value: Some(value) });
            }
            Err(error) => {
                pages.push(Ok(KvScanResponse { entries: std::mem::take(&mut page) }));
                pages.push(Err(status(error)));
            }
        }
        if bytes > PAGE {
            bytes = 0;
            pages.push(Ok(KvScanResponse { entries: std::mem::take(&mut page) }));
        }
    }
    if !page.is_empty() {
        pages.push(Ok(KvScanResponse { entries: page }));
    }
    pages
}
