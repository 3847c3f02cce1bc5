//! The kube driver: the operator on Kubernetes. Keyspaces are custom resources, the
//! committed topology stands in their status, stores are the pods of one StatefulSet
//! each. Several operators may run: one leads and writes, all serve the stream.

#![allow(clippy::large_futures, reason = "an API call's future holds a whole object; each keyspace has one at a time")]

mod api;
mod caches;
mod driver;
mod lease;
mod metrics;
mod objects;
mod pods;
mod volumes;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ::kube::Client;
use futures::{Stream, future};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use vasto_client::accept::connections;
use vasto_client::env::Env;

pub use metrics::Monitor;
pub use objects::{RESTART_REASON, Site, address_of};

use crate::hub::{self, Hub, Leader, OperatorService};
use caches::Caches;
use driver::Driver;
use lease::Election;

/// How long open streams have to end when the operator stops.
const FAREWELL: Duration = Duration::from_secs(2);

/// How to run the operator on Kubernetes.
pub struct Options {
    /// Speaks to the API server.
    pub client: Client,
    /// Only Keyspaces of this namespace; `None`: of all.
    pub namespace: Option<String>,
    /// The image of the stores of new keyspaces.
    pub image: String,
    /// `host:port` under which stores reach the operators.
    pub service: String,
    /// This operator's pod: its identity in the election.
    pub pod: String,
    /// The namespace of the Lease.
    pub pod_namespace: String,
    /// `host:port` under which stores reach this very operator.
    pub advertise: String,
    /// Time, randomness and the network.
    pub env: Env,
    /// How long is waited for what.
    pub timings: Timings,
    /// Measures; made before, so that it can be shown elsewhere.
    pub monitor: Monitor,
}

/// How long is waited for what.
#[derive(Clone, Copy, Debug)]
pub struct Timings {
    /// Another takes the lead when the leader has not renewed it for so long.
    pub lease: Duration,
    /// How often the leader renews it, and others look.
    pub renew: Duration,
    /// How long a new leader waits for stores before it says in a status what it sees.
    pub settle: Duration,
    /// How long a fence waits for clients that haven't said that they know the switch.
    pub fence: Duration,
    /// At least so far apart are two writes of a status in which only numbers of progress differ.
    pub progress: Duration,
    /// How often what waits is looked at again.
    pub tick: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew: Duration::from_secs(3),
            settle: Duration::from_secs(10),
            fence: Duration::from_secs(3),
            progress: Duration::from_secs(2),
            tick: Duration::from_secs(1),
        }
    }
}

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server ended.
    #[error("the operator's server ended: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// Serves until stopped.
pub async fn serve(options: Options, listener: TcpListener, stop: CancellationToken) -> Result<(), Error> {
    serve_on(options, connections(listener), stop).await
}

/// The same for connections of any kind.
pub async fn serve_on<C>(
    options: Options,
    connections: impl Stream<Item = io::Result<C>>,
    stop: CancellationToken,
) -> Result<(), Error>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    // Its tasks end with this call, however it ends.
    let stop = stop.child_token();
    let _ends = stop.clone().drop_guard();
    let hub = Hub::with(stop.clone(), Leader::Elsewhere(None), Some(address_of));
    options.monitor.attach(hub.clone());
    let election = Election::new(&options);
    let leadership = election.leadership();
    let caches = Arc::new(Caches::new());
    let driver = Arc::new(Driver::new(&options, hub.clone(), caches.clone(), leadership.clone()));
    let tasks = [
        tokio::spawn(election.run(hub.clone(), stop.clone())),
        tokio::spawn(driver.run(options.client.clone(), options.namespace.clone(), stop.clone())),
    ];
    options.monitor.serving(true);
    let served = hub::server()
        .add_service(OperatorService::new(hub))
        .serve_with_incoming_shutdown(connections, stop.clone().cancelled_owned());
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(FAREWELL).await;
    };
    let served = tokio::select! {
        served = served => served,
        () = late => Ok(()),
    };
    stop.cancel();
    options.monitor.serving(false);
    // The leader lets go of its lease, so that another needn't wait for its end.
    future::join_all(tasks).await;
    served.map_err(Error::from)
}
