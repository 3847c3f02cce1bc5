//! The gRPC face of the hub. Answers leave as bytes that were encoded once, when a
//! topology was committed, and are shared by everyone who gets them; the generated
//! server would encode the same message again for each stream.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::marker::PhantomData;

use futures::stream::{BoxStream, StreamExt};
use prost::Message;
use prost::bytes::{BufMut, Bytes};
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{Body, BoxFuture, Context, Poll, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use vasto_client::v1::{StoreReport, WatchRequest};

use super::Hub;
use super::streams::{Reporting, Watching};

/// The most that a store may send in one message, and a watcher.
const LARGEST_REPORT: usize = 16 << 20;
const LARGEST_WATCH: usize = 1 << 20;
/// What is set aside for each half of a watcher's stream. There are thousands of them, and most of the time nothing
/// comes or goes; it grows to what does.
const WATCH_BUFFER: usize = 256;
/// A store's.
const REPORT_BUFFER: usize = 8 << 10;
/// Of messages that are ready, so many bytes are put together before they are sent.
const TOGETHER: usize = 32 << 10;

/// The service `vasto.v1.Operator`, for a tonic server.
#[derive(Clone)]
pub struct OperatorService(Hub);

impl OperatorService {
    /// Serves this hub.
    pub fn new(hub: Hub) -> Self {
        Self(hub)
    }
}

impl NamedService for OperatorService {
    const NAME: &'static str = "vasto.v1.Operator";
}

impl<B> Service<http::Request<B>> for OperatorService
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let hub = self.0.clone();
        match request.uri().path() {
            "/vasto.v1.Operator/Watch" => Box::pin(async move {
                let mut grpc = grpc(WATCH_BUFFER, LARGEST_WATCH);
                Ok(grpc.streaming(Watch(hub), request).await)
            }),
            "/vasto.v1.Operator/Report" => Box::pin(async move {
                let mut grpc = grpc(REPORT_BUFFER, LARGEST_REPORT);
                Ok(grpc.streaming(Report(hub), request).await)
            }),
            path => {
                let status = Status::unimplemented(format!("this version of vasto has no method {path}"));
                Box::pin(async move { Ok(status.into_http()) })
            }
        }
    }
}

fn grpc<D: Message + Default + Send + 'static>(buffer: usize, largest: usize) -> Grpc<Encoded<D>> {
    let codec = Encoded { buffers: BufferSettings::new(buffer, TOGETHER), decoded: PhantomData };
    Grpc::new(codec).apply_max_message_size_config(Some(largest), None)
}

type Answers = BoxStream<'static, Result<Bytes, Status>>;

struct Watch(Hub);

impl StreamingService<WatchRequest> for Watch {
    type Response = Bytes;
    type ResponseStream = Answers;
    type Future = Ready<Result<Response<Answers>, Status>>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let answers = Watching::begin(self.0.clone(), request.into_inner());
        ready(answers.map(|a| Response::new(futures::stream::unfold(a, Watching::next).boxed())))
    }
}

struct Report(Hub);

impl StreamingService<StoreReport> for Report {
    type Response = Bytes;
    type ResponseStream = Answers;
    type Future = Ready<Result<Response<Answers>, Status>>;

    fn call(&mut self, request: Request<Streaming<StoreReport>>) -> Self::Future {
        let answers = Reporting::begin(self.0.clone(), request.into_inner());
        ready(answers.map(|a| Response::new(futures::stream::unfold(a, Reporting::next).boxed())))
    }
}

/// Requests are decoded, answers are bytes already.
struct Encoded<D> {
    buffers: BufferSettings,
    decoded: PhantomData<fn() -> D>,
}

impl<D: Message + Default + Send + 'static> Codec for Encoded<D> {
    type Encode = Bytes;
    type Decode = D;
    type Encoder = Copy;
    type Decoder = Self;

    fn encoder(&mut self) -> Copy {
        Copy(self.buffers)
    }

    fn decoder(&mut self) -> Self {
        Self { buffers: self.buffers, decoded: PhantomData }
    }
}

impl<D: Message + Default + Send + 'static> Decoder for Encoded<D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        D::decode(source).map(Some).map_err(|e| Status::invalid_argument(format!("the message can't be read: {e}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.buffers
    }
}

struct Copy(BufferSettings);

impl Encoder for Copy {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put(item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0
    }
}
