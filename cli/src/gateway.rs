//! `vasto gateway`: Redis' protocol, HTTP and gRPC, for programs that have no Vasto client. `vasto up` serves them too.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;
use vasto_gateway::Options;

use crate::context::{Context, parse_address};
use crate::exit::one_line;
use crate::listen::{listen, stop_on_signals};
use crate::output::emit_line;

/// How long clients have to take the answers to what they have asked.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Arguments of `vasto gateway`.
#[derive(Args, Debug)]
pub(crate) struct Gateway {
    #[command(flatten)]
    ports: Ports,
    /// The keyspace of Redis clients that have selected none; not needed where there is only one.
    #[arg(long, value_name = "NAME")]
    keyspace: Option<String>,
}

/// Where a gateway listens.
#[derive(Args, Clone, Debug)]
pub(crate) struct Ports {
    /// Where to speak Redis' protocol (127.0.0.1:6379 unless given), or off.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_place)]
    redis: Option<Place>,
    /// Where to serve HTTP (127.0.0.1:8280 unless given), or off.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_place)]
    http: Option<Place>,
    /// Where to serve gRPC (127.0.0.1:8281 unless given), or off.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_place)]
    grpc: Option<Place>,
}

/// A place to listen at, if any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Off,
    At(String),
}

pub(crate) fn parse_place(text: &str) -> Result<Place, String> {
    if text == "off" {
        return Ok(Place::Off);
    }
    parse_address(text).map(Place::At).map_err(|why| format!("{why}, or off"))
}

/// What to do where a port that nobody asked for by name is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Fail,
    /// Say so, and serve the rest.
    GoOn,
}

/// A gateway that serves.
pub(crate) struct Running {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Running {
    /// Answers what has been read, then ends; whoever takes longer is cut off.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(STOP_WITHIN, self.tasks.wait()).await.is_err() {
            warn!("clients of the gateway are cut off: they did not take their answers in time");
        }
    }
}

pub(crate) async fn run(context: &Context, args: Gateway) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let running = start(context, args.ports, args.keyspace, Taken::Fail).await?;
    stop.cancelled().await;
    running.stop().await;
    Ok(())
}

/// Starts what is wanted, and says where it listens.
pub(crate) async fn start(
    context: &Context,
    ports: Ports,
    keyspace: Option<String>,
    taken: Taken,
) -> anyhow::Result<Running> {
    let gateway = vasto_gateway::Gateway::new(context.env.clone(), context.client().clone(), Options { keyspace });
    let running = Running { tasks: TaskTracker::new(), stop: CancellationToken::new() };
    if let Some(listener) = open("the gateway for Redis", ports.redis, "127.0.0.1:6379", "--redis", taken).await? {
        emit_line(format!("gateway: Redis on {}", listener.local_addr()?))?;
        running.tasks.spawn(Arc::clone(&gateway).serve_redis(listener, running.stop.clone()));
    }
    if let Some(listener) = open("the gateway for HTTP", ports.http, "127.0.0.1:8280", "--http", taken).await? {
        emit_line(format!("gateway: HTTP on {}", listener.local_addr()?))?;
        running.tasks.spawn(Arc::clone(&gateway).serve_http(listener, running.stop.clone()));
    }
    if let Some(listener) = open("the gateway for gRPC", ports.grpc, "127.0.0.1:8281", "--grpc", taken).await? {
        emit_line(format!("gateway: gRPC on {}", listener.local_addr()?))?;
        running.tasks.spawn(Arc::clone(&gateway).serve_grpc(listener, running.stop.clone()));
    }
    Ok(running)
}

/// Listens where that is wanted.
pub(crate) async fn open(
    what: &str,
    wanted: Option<Place>,
    usual: &str,
    flag: &str,
    taken: Taken,
) -> anyhow::Result<Option<TcpListener>> {
    let (address, by_name) = match &wanted {
        Some(Place::Off) => return Ok(None),
        Some(Place::At(address)) => (address.as_str(), true),
        None => (usual, false),
    };
    match listen(what, address, flag).await {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if taken == Taken::GoOn && !by_name => {
            warn!("{}; going on without", one_line(&error));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
