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
    pub(crate) pipe: Pipe,
    /// Scans and the like go beside the pipe, so that their bulk never stands before an operation.
    bulk: Mutex<Option<Channel>>,
    env: Env,
}

impl Link {
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
            pipe: Pipe::new(&self.env, address),
            bulk: Mutex::default(),
            env: self.env.clone(),
        });
        links.insert(address.to_string(), Arc::downgrade(&link));
        link
    }
}
