//! One link to each store address, shared by all keyspaces of a client, for as
//! long as somebody's routes name it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

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
    /// The pipe for what comes next; see `choose`.
    pub(crate) fn pipe(&self) -> &Pipe {
        let (load, up) = (self.pipes.each_ref().map(Pipe::load), self.pipes.each_ref().map(Pipe::is_up));
        let chosen = choose(load, up);
        let other = 1 - chosen;
        if load[other] < load[chosen] {
            self.pipes[other].connect();
        }
        &self.pipes[chosen]
    }

    /// Whether other replicas should be asked first; see `Pipe::suspect`. A pipe that has to connect does not count
    /// while the other serves.
    pub(crate) fn suspect(&self) -> bool {
        let serves = self.pipes.iter().any(Pipe::is_up);
        self.pipes.iter().filter(|pipe| pipe.is_up() || !serves).any(Pipe::suspect)
    }

    /// How long to wait for an answer; see `Pipe::patience`.
    pub(crate) fn patience(&self) -> Duration {
        let [first, second] = self.pipes.each_ref().map(Pipe::patience);
        first.max(second)
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

/// Which of two pipes: the one that has less to do, but none that has to connect first while the other serves.
fn choose(load: [usize; 2], up: [bool; 2]) -> usize {
    let less = usize::from(load[1] < load[0]);
    if up[1 - less] && !up[less] { 1 - less } else { less }
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

    #[test]
    fn a_pipe_that_has_to_connect_is_not_chosen_while_the_other_serves() {
        let all = [[false, false], [true, true], [true, false], [false, true]];
        let chosen = |load| all.map(|up| choose(load, up));
        assert_eq!(chosen([0, 0]), [0, 0, 0, 1]);
        assert_eq!(chosen([2, 1]), [1, 1, 0, 1]);
        assert_eq!(chosen([1, 2]), [0, 0, 0, 1]);
    }

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
