//! One link to each store address, shared by all keyspaces of a client, for as
//! long as somebody's routes name it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::future::BoxFuture;
use tonic::transport::Channel;

use crate::env::Env;
use crate::error::describe_transport;
use crate::pipe::{MAX_MESSAGE, Pipe};
use crate::v1::store_client::StoreClient;
use crate::v1::{Answer, Operation};

/// The connections to one store.
pub(crate) struct Link {
    pub(crate) address: String,
    /// Two, so that the store works on the operations of one while this client takes in the answers of the other: by one
    /// alone all of its callers' operations go together and come back together, and either side waits for the other.
    pipes: [Pipe; 2],
    /// Scans and the like go beside the pipe, so that their bulk never stands before an operation.
    bulk: Mutex<Option<Channel>>,
    env: Env,
}

impl Link {
    /// The pipe that has less to do. The second connects only once there is something in the first.
    pub(crate) fn pipe(&self) -> &Pipe {
        let [first, second] = &self.pipes;
        if second.load() < first.load() { second } else { first }
    }

    /// Whether other replicas should be asked first; see `Pipe::suspect`.
    pub(crate) fn suspect(&self) -> bool {
        self.pipes.iter().any(Pipe::suspect)
    }

    /// A client for scans, inspection and compaction.
    pub(crate) fn bulk(&self) -> Result<StoreClient<Channel>, String> {
        let mut bulk = self.bulk.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match &*bulk {
            Some(channel) => channel.clone(),
            None => {
                let channel = self.env.dial(&self.address).map_err(|error| describe_transport(&error))?;
                bulk.insert(channel).clone()
            }
        };
        Ok(StoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
    }

    /// Starts to ask the store without a connection, where it is one of this process.
    pub(crate) fn near(&self, operations: Vec<Operation>) -> Result<BoxFuture<'static, Vec<Answer>>, Vec<Operation>> {
        match self.env.near(&self.address) {
            Some(answers) => Ok(answers(operations)),
            None => Err(operations),
        }
    }
}

/// All links of a client.
pub(crate) struct Pool {
    env: Env,
    links: Mutex<HashMap<String, Weak<Link>>>,
}

impl Pool {
    pub(crate) fn new(env: Env) -> Self {
        Self { env, links: Mutex::default() }
    }

    /// The link to this address.
    pub(crate) fn link(&self, address: &str) -> Arc<Link> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(address).and_then(Weak::upgrade) {
            return link;
        }
        links.retain(|_, link| link.strong_count() > 0);
        let link = Arc::new(Link {
            address: address.to_string(),
            pipes: [(); 2].map(|()| Pipe::new(&self.env, address)),
            bulk: Mutex::default(),
            env: self.env.clone(),
        });
        links.insert(address.to_string(), Arc::downgrade(&link));
        link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn operations_go_by_the_pipe_that_has_less_to_do() {
        // Nobody is asked before this task waits.
        let link = Pool::new(Env::real()).link("127.0.0.1:1");
        let is_first = || std::ptr::eq(link.pipe(), &link.pipes[0]);
        let submit = || link.pipe().submit_one(Operation::default()).unwrap();
        assert!(is_first());
        let one = submit();
        assert!(!is_first());
        let two = link.pipe().submit([Operation::default(), Operation::default()]);
        assert!(is_first());
        let three = submit();
        let loads = || link.pipes.each_ref().map(Pipe::load);
        assert_eq!((loads(), is_first()), ([2, 2], true));
        drop((one, three));
        assert_eq!((loads(), is_first()), ([0, 2], true));
        drop(two);
        assert_eq!(loads(), [0, 0]);
    }
}
