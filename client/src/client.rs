//! The handle that everything hangs on: it knows the operator, watches the
//! topologies of the keyspaces in use and shares connections among them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

use crate::env::{self, Env};
use crate::error::{Error, describe_transport};
use crate::keyspace::{self, Keyspace};
use crate::pipe::MAX_MESSAGE;
use crate::pool::Pool;
use crate::topology::short;
use crate::v1::keyspaces_client::KeyspacesClient;
use crate::watch::{Status, Topologies};

/// Where the operator listens unless told otherwise.
const OPERATOR_PORT: u16 = 8278;
/// How long an operation is tried unless told otherwise.
const DEADLINE: Duration = Duration::from_secs(10);

/// A client of one Vasto cluster. Cheap to clone; all clones share their
/// connections, and the last one dropped (with its keyspaces) ends them.
///
/// ```no_run
/// # async fn example() -> Result<(), vasto_client::Error> {
/// use vasto_client::Client;
///
/// let client = Client::connect("127.0.0.1:8278")?;
/// let packages = client.keyspace("packages").await?;
/// packages.put("bash", "the shell").await?;
/// let found = packages.get("bash").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    deadline: Duration,
}

struct Inner {
    env: Env,
    operator: String,
    topologies: Arc<Topologies>,
    pool: Pool,
    keyspaces: Mutex<HashMap<String, Weak<keyspace::Shared>>>,
    watching: AtomicBool,
    stop: CancellationToken,
    _stop: DropGuard,
}

impl Client {
    /// A client of the cluster whose operator listens at `host:port` (8278 unless
    /// named). It connects when first used, so this fails only for what can be no address.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), vasto_client::Error> {
    /// let client = vasto_client::Client::connect("127.0.0.1:8278")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn connect(operator: &str) -> Result<Self, Error> {
        let bare = operator.strip_prefix("http://").unwrap_or(operator).trim_end_matches('/');
        let address = if bare.contains(':') { bare.to_string() } else { format!("{bare}:{OPERATOR_PORT}") };
        let port = address.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
        if bare.is_empty() || port.is_none() || env::endpoint(&address).is_err() {
            return Err(Error::Invalid(format!(
                "{operator:?} is no address of an operator; it must be host:port, such as 127.0.0.1:{OPERATOR_PORT}"
            )));
        }
        Ok(Self::with(Env::real(), address))
    }

    /// A client with its own clock, randomness and network, such as a simulation's.
    pub fn with(env: Env, operator: String) -> Self {
        let stop = CancellationToken::new();
        let inner = Inner {
            pool: Pool::new(env.clone()),
            env,
            operator,
            topologies: Arc::new(Topologies::new()),
            keyspaces: Mutex::default(),
            watching: AtomicBool::new(false),
            _stop: stop.clone().drop_guard(),
            stop,
        };
        Self { inner: Arc::new(inner), deadline: DEADLINE }
    }

    /// The same client with another default deadline, for the keyspaces opened
    /// through the handle that this returns.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), vasto_client::Error> {
    /// use std::time::Duration;
    /// let client = vasto_client::Client::connect("127.0.0.1:8278")?.deadline(Duration::from_secs(2));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Opens a keyspace: waits until the operator has said where its shards are. On Kubernetes one of
    /// another namespace than `default` is called `namespace/name`.
    ///
    /// ```no_run
    /// # async fn example(client: vasto_client::Client) -> Result<(), vasto_client::Error> {
    /// let packages = client.keyspace("packages").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Missing`] when it does not exist, [`Error::Unavailable`] when the
    /// operator can't be reached within the deadline.
    pub async fn keyspace(&self, name: &str) -> Result<Keyspace, Error> {
        let name = short(name);
        let inner = &self.inner;
        if !inner.watching.swap(true, Ordering::AcqRel) {
            let (stop, topologies) = (inner.stop.clone(), inner.topologies.clone());
            let run = topologies.run(inner.env.clone(), inner.operator.clone());
            tokio::spawn(async move { stop.run_until_cancelled(run).await });
        }
        let subscription = inner.topologies.subscribe(name);
        let mut status = subscription.status.subscribe();
        let answer = tokio::time::timeout(self.deadline, status.wait_for(|s| *s != Status::Asked)).await;
        match answer {
            Ok(Ok(status)) if *status == Status::Known => {}
            Ok(_) => return Err(Error::Missing { keyspace: name.to_string() }),
            Err(_) => {
                return Err(Error::Unavailable {
                    what: format!("open keyspace {name:?}"),
                    last: format!("the operator at {}: {}", inner.operator, inner.topologies.obstacle()),
                });
            }
        }
        let mut keyspaces = inner.keyspaces.lock().unwrap_or_else(PoisonError::into_inner);
        // One session for all handles of a name.
        let shared = keyspaces.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
            let shared = Arc::new(keyspace::Shared::new(self.clone(), subscription));
            keyspaces.insert(name.to_string(), Arc::downgrade(&shared));
            shared
        });
        Ok(Keyspace::new(shared, self.deadline))
    }

    /// The verbs on keyspaces as resources: apply, list, describe, scale, replace, delete.
    ///
    /// ```no_run
    /// # async fn example(client: vasto_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let list = client.keyspaces()?.list(vasto_client::v1::ListRequest {}).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] when the operator's address can be no address.
    pub fn keyspaces(&self) -> Result<KeyspacesClient<Channel>, Error> {
        let channel = self.inner.env.dial(&self.inner.operator).map_err(|error| {
            Error::Invalid(format!("the operator's address {:?}: {}", self.inner.operator, describe_transport(&error)))
        })?;
        Ok(KeyspacesClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
    }

    /// The operator's address.
    pub fn operator(&self) -> &str {
        &self.inner.operator
    }

    pub(crate) fn env(&self) -> &Env {
        &self.inner.env
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.inner.pool
    }

    pub(crate) fn topologies(&self) -> &Topologies {
        &self.inner.topologies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_and_gets_its_port() {
        assert_eq!(Client::connect("localhost").unwrap().operator(), "localhost:8278");
        assert_eq!(Client::connect("http://127.0.0.1:9/").unwrap().operator(), "127.0.0.1:9");
        for bad in ["", "a b:1", "host:", "host:99999", "host:http"] {
            let Err(Error::Invalid(words)) = Client::connect(bad) else { panic!("{bad:?} was taken") };
            assert!(words.contains("host:port"), "{words}");
        }
    }
}
