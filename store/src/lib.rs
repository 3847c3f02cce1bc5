//! A Vasto store: a process that hosts replicas, each one RocksDB with one
//! writer, that follow one another and do what the topology says.
//! It meets the operator and its peers only through the wire in `client/proto`.

pub mod clock;
pub mod dir;
pub mod join;
pub mod merge;
pub mod record;

mod answer;
mod build;
mod clean;
mod collect;
mod cut;
pub mod engine;
mod follow;
mod host;
mod keyspace;
mod lanes;
mod leave;
mod meta;
mod metrics;
mod quarantine;
mod repair;
mod replica;
mod report;
mod server;
mod snapshot;
mod throttle;
mod writer;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, Router};
use vasto_client::accept::connections;
use vasto_client::env::Env;
use vasto_client::v1::{peer_server::PeerServer, store_server::StoreServer};

use engine::Storage;
pub use metrics::Monitor;

/// No message is larger, either way.
pub(crate) const MESSAGE_LIMIT: usize = 16 << 20;
/// How long a store that stops waits for what still reads its files.
const CLOSED_WITHIN: Duration = Duration::from_secs(2);

/// Splits what is to be sent so that a message has at most so many bytes by `size`; one item may go beyond. At least one
/// message, possibly empty.
pub(crate) fn in_messages<T>(items: Vec<T>, most: usize, size: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut messages = vec![Vec::with_capacity(items.len())];
    let mut bytes = 0;
    for item in items {
        let more = size(&item);
        if bytes > 0 && bytes + more > most {
            messages.push(Vec::new());
            bytes = 0;
        }
        bytes += more;
        if let Some(last) = messages.last_mut() {
            last.push(item);
        }
    }
    messages
}

/// How a store runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name in topologies, such as `store-0`.
    pub name: String,
    /// Its folder; made where it isn't.
    pub data: PathBuf,
    /// `host:port` of the operator.
    pub operator: String,
    /// `host:port` by which others reach it; the listener's own address where unset.
    pub advertise: Option<String>,
    /// The uid of the one keyspace that it serves, on a volume of that keyspace; any where unset.
    pub only: Option<String>,
    /// Tells whether it is ready, and what it does.
    pub monitor: Monitor,
    /// Bytes of what was read, rows and blocks, for all replicas together.
    pub cache_bytes: usize,
    /// Bytes of memtables for all replicas together.
    pub write_buffer_bytes: usize,
}

impl Options {
    /// A store of this name in this folder, with a 64 MiB cache and 128 MiB of write buffers.
    pub fn new(name: impl Into<String>, data: impl Into<PathBuf>, operator: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            data: data.into(),
            operator: operator.into(),
            advertise: None,
            only: None,
            monitor: Monitor::new(),
            cache_bytes: 64 << 20,
            write_buffer_bytes: 128 << 20,
        }
    }
}

/// Why a store does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its folder.
    #[error(transparent)]
    Dir(#[from] dir::Error),
    /// Its listener.
    #[error("the store can't listen: {0}")]
    Listen(#[from] std::io::Error),
    /// Its server.
    #[error("the store's server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs a store until `stop`; then hands on what only it may have, and stops cleanly.
///
/// A folder that is in use, of a newer format, another store's or not writable
/// is an error before anything is served.
pub async fn serve(options: Options, env: Env, listener: TcpListener, stop: CancellationToken) -> Result<(), Error> {
    let storage = Arc::new(engine::RocksStorage::new(options.cache_bytes, options.write_buffer_bytes));
    let address = listener.local_addr()?.to_string();
    let options = Options { advertise: options.advertise.or(Some(address)), ..options };
    let lanes = env.threads().map(|threads| (threads.clone(), env.background()));
    let serving = |router: Router, cut: CancellationToken| async move {
        match lanes {
            Some((threads, behind)) => lanes::serve(listener, threads, &behind, router, cut).await,
            None => router.serve_with_incoming(cut_by(connections(listener), cut)).await,
        }
    };
    serve_by(options, env, storage, serving, stop).await
}

/// Connections that end when `cut` says so.
fn cut_by<C>(
    connections: impl Stream<Item = io::Result<C>>,
    cut: CancellationToken,
) -> impl Stream<Item = io::Result<cut::Cut<C>>> {
    connections.map(move |c| c.map(|connection| cut::Cut::new(connection, &cut)))
}

/// The same for connections of any kind, and databases of any kind; `options.advertise` says where it is reached.
pub async fn serve_on<C>(
    options: Options,
    env: Env,
    storage: Arc<dyn Storage>,
    connections: impl Stream<Item = io::Result<C>>,
    stop: CancellationToken,
) -> Result<(), Error>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let serving = |router: Router, cut| router.serve_with_incoming(cut_by(connections, cut));
    serve_by(options, env, storage, serving, stop).await
}

/// The same however connections come in: `serve` serves them until it is dropped, and those that are there until they
/// are cut.
async fn serve_by<F>(
    options: Options,
    env: Env,
    storage: Arc<dyn Storage>,
    serve: impl FnOnce(Router, CancellationToken) -> F,
    stop: CancellationToken,
) -> Result<(), Error>
where
    F: Future<Output = Result<(), tonic::transport::Error>>,
{
    let dir = dir::Dir::open(&options.data, &options.name)?;
    let address = options.advertise.clone().unwrap_or_default();
    let cores = if env.is_on_one_thread() { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let context = replica::Context {
        storage,
        env: env.clone(),
        counts: options.monitor.counts(),
        changed: Arc::new(tokio::sync::Notify::new()),
        stalls: Arc::default(),
        throttle: Arc::new(throttle::Throttle::new(cores)),
    };
    let host = host::Host::open(&options.name, options.only.as_deref(), address.clone(), dir, context);
    tracing::info!(store = options.name, address, data = %options.data.display(), "serving");
    host.resume().await;
    options.monitor.watch(&host);

    // It reports, answers and follows on while it hands over.
    let leave = CancellationToken::new();
    let reporting = tokio::spawn(report::run(host.clone(), env.clone(), options.operator, leave.clone()));
    let learning = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(host.clone().learn_from_peers()));
    let answerer = answer::Answerer::new(host.clone(), env.clone(), options.monitor.counts());
    let offer = env.offer(&address, {
        let answerer = answerer.clone();
        move |operations| Box::pin(answerer.clone().answer(operations))
    });
    let server = server::Server::new(host.clone(), env, answerer, options.monitor.counts());
    let cut = CancellationToken::new();
    let router = tonic::transport::Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(
            StoreServer::new(server.clone())
                .max_decoding_message_size(MESSAGE_LIMIT)
                .max_encoding_message_size(MESSAGE_LIMIT),
        )
        .add_service(
            PeerServer::new(server).max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT),
        );
    let handed_over = async {
        stop.cancelled().await;
        leave::hand_over(&host).await;
    };
    let served = tokio::select! {
        served = serve(router, cut.clone()) => served.map_err(Error::from),
        () = handed_over => Ok(()),
    };
    stop.cancel();
    drop(offer);
    host.leave();
    leave.cancel();
    drop(learning);
    let _ = reporting.await;
    let files: Vec<_> = host.replicas().iter().map(|r| r.engine.closed()).collect();
    host.stop().await;
    // Once all that was accepted is answered.
    cut.cancel();
    // A process must not end while RocksDB is in use: the end of its globals would abort it.
    let closed = futures::future::join_all(files.iter().map(|f| f.cancelled()));
    if tokio::time::timeout(CLOSED_WITHIN, closed).await.is_err() {
        tracing::warn!(store = options.name, "not all files are closed within {CLOSED_WITHIN:?}; it stops now");
    }
    tracing::info!(store = options.name, "stopped");
    served
}
