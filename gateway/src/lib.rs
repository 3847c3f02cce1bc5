//! Stateless servers for programs that have no Vasto client: Redis' protocol, HTTP and gRPC, all over the client
//! library and nothing else. Any number of them may run, beside a store or on a machine of their own.

mod batch;
mod door;
mod grpc;
mod http;
mod maps;
mod metrics;
mod number;
mod resp;

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use vasto_client::{Client, Env};

use crate::maps::Maps;
use crate::metrics::Counts;

/// What all servers of a gateway share.
pub struct Gateway {
    env: Env,
    maps: Maps,
    counts: Counts,
    redis: resp::Shared,
    http: http::Shared,
}

/// How a gateway is to serve.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The keyspace of Redis clients that have selected none; none: the only one that there is.
    pub keyspace: Option<String>,
}

impl Gateway {
    /// A gateway to the cluster of this client.
    pub fn new(env: Env, client: Client, options: Options) -> Arc<Self> {
        let maps = Maps::new(env.clone(), client, options.keyspace);
        Arc::new(Self { maps, counts: Counts::new(), redis: resp::Shared::new(&env), http: http::Shared::new(), env })
    }

    /// Speaks Redis' protocol until `stop`; what has been read by then is still answered.
    pub async fn serve_redis(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        resp::serve(self, listener, stop).await;
    }

    /// Serves HTTP until `stop`.
    pub async fn serve_http(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        http::serve(self, listener, stop).await;
    }

    /// Serves gRPC until `stop`.
    pub async fn serve_grpc(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        grpc::serve(self, listener, stop).await;
    }

    /// Whether it can serve: the operator answers, or has told of the keyspaces in use. If not, why.
    pub async fn ready(&self) -> Result<(), String> {
        self.maps.ready().await
    }

    /// All metrics as OpenMetrics text.
    pub fn metrics(&self) -> String {
        self.counts.encode()
    }
}
