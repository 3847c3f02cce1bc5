//! The local driver: the operator without Kubernetes. Keyspaces are files in a
//! folder, stores are whatever a runner starts, and what kubectl does is done over
//! gRPC or by editing a file.

mod driver;
mod file;
mod folder;
mod handle;
mod runner;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, future};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use vasto_client::accept::connections;
use vasto_client::env::Env;
use vasto_client::v1::keyspaces_server::KeyspacesServer;
use vasto_crds::Keyspace;

pub use folder::Error as FolderError;
pub(crate) use handle::{Handle, Resources};
pub use runner::{BoxError, External, StoreRunner};

use crate::console::Console;
use crate::hub::{self, Hub, OperatorService};
use crate::keyspaces::KeyspacesService;
use driver::{Driver, Waits};
use folder::{Content, Folder};

/// How long open streams have to end when the operator stops.
const FAREWELL: Duration = Duration::from_secs(2);

/// How to run the operator locally.
pub struct Options {
    /// The operator's folder.
    pub dir: PathBuf,
    /// Files whose Keyspaces are applied, now and whenever they are edited.
    pub files: Vec<PathBuf>,
    /// Time, randomness and the network.
    pub env: Env,
    /// Where stores are run by others: how long to wait for those that may still have to
    /// report, before a keyspace that the folder doesn't have is called new or missing.
    pub settle: Duration,
    /// How long a fence waits for clients that haven't said that they know the switch.
    pub fence_wait: Duration,
    /// Shows the operator, once it runs.
    pub console: Console,
}

impl Options {
    /// The usual ones.
    pub fn new(dir: PathBuf, env: Env) -> Self {
        let (settle, fence_wait) = (Duration::from_secs(3), Duration::from_secs(3));
        Self { dir, files: Vec::new(), env, settle, fence_wait, console: Console::default() }
    }
}

/// Why the operator could not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Its folder can't be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A file of Keyspaces can't be read.
    #[error("{path} can't be read: {source}; it must be a YAML file of Keyspaces")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A Keyspace breaks the rules.
    #[error(transparent)]
    Keyspace(#[from] vasto_crds::Error),
    /// Two files name one keyspace.
    #[error("{first} and {second} both have a keyspace {name}: give one of them another name")]
    Twice {
        /// The keyspace.
        name: String,
        /// The one file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// The server ended.
    #[error("the operator's server ended: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// An operator that holds its folder, and whose files have been read; it is not serving yet.
pub struct Operator {
    options: Options,
    folder: Folder,
    content: Content,
    keyspaces: Vec<file::Followed>,
}

impl Operator {
    /// Takes the folder and reads everything, so that what is wrong is known before anything is started.
    pub fn open(options: Options) -> Result<Self, Error> {
        let keyspaces = file::read_all(&options.files)?;
        let (folder, content) = Folder::open(&options.dir)?;
        Ok(Self { options, folder, content, keyspaces })
    }

    /// The Keyspaces that the files say.
    pub fn keyspaces(&self) -> impl Iterator<Item = &Keyspace> {
        self.keyspaces.iter().flat_map(|f| &f.keyspaces)
    }

    /// Serves until stopped.
    pub async fn serve(
        self,
        listener: TcpListener,
        runner: Arc<dyn StoreRunner>,
        stop: CancellationToken,
    ) -> Result<(), Error> {
        self.serve_on(connections(listener), runner, stop).await
    }

    /// The same for connections of any kind.
    pub async fn serve_on<C>(
        self,
        connections: impl Stream<Item = io::Result<C>>,
        runner: Arc<dyn StoreRunner>,
        stop: CancellationToken,
    ) -> Result<(), Error>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let Options { env, settle, fence_wait, console, .. } = self.options;
        // Its tasks end with this call, however it ends.
        let stop = stop.child_token();
        let _ends = stop.clone().drop_guard();
        let hub = Hub::new(stop.clone());
        console.attach(hub.clone());
        let waits = Waits { settle, fence: fence_wait };
        let (driver, handle, wanted) = Driver::new(env, hub.clone(), self.folder, self.content, &waits)?;
        let tasks = [
            tokio::spawn(driver.run(runner.clone(), stop.clone())),
            tokio::spawn(runner::run(runner, wanted, stop.clone())),
            tokio::spawn(file::follow(self.keyspaces, handle.clone(), stop.clone())),
        ];
        let served = hub::server()
            .add_service(OperatorService::new(hub))
            .add_service(KeyspacesServer::new(KeyspacesService::new(handle, stop.clone())))
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
        // The driver finishes the step that it is taking.
        future::join_all(tasks).await;
        served.map_err(Error::from)
    }
}

/// Opens and serves.
pub async fn serve(
    options: Options,
    listener: TcpListener,
    runner: Arc<dyn StoreRunner>,
    stop: CancellationToken,
) -> Result<(), Error> {
    Operator::open(options)?.serve(listener, runner, stop).await
}
