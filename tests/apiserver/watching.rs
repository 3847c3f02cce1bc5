//! A client's stream of one keyspace.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use vasto_client::env::Env;
use vasto_client::v1::operator_client::OperatorClient;
use vasto_client::v1::watch_response::Event;
use vasto_client::v1::{KeyspaceUpdate, Known, Topology, WatchRequest, WatchResponse};

use crate::bench::PATIENCE;

/// An open stream.
pub struct Watching {
    requests: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
}

impl Watching {
    /// Watches a keyspace at this operator.
    pub async fn open(address: &str, keyspace: &str) -> Self {
        let mut client = OperatorClient::new(Env::real().dial(address).unwrap());
        let (requests, receiver) = mpsc::channel(8);
        requests.send(WatchRequest { keyspaces: vec![keyspace.to_owned()], known: vec![] }).await.unwrap();
        let answers = client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests, answers }
    }

    /// The next topology; `None`: there is no such keyspace.
    pub async fn next(&mut self) -> Option<KeyspaceUpdate> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer in time");
        match answer.expect("the stream goes on").expect("an answer").event {
            Some(Event::Update(update)) => Some(update),
            Some(Event::Missing(_)) | None => None,
        }
    }

    /// Says that it acts by this topology.
    pub async fn confirm(&self, topology: &Topology) {
        let known = Known { uid: topology.uid.clone(), version: topology.version };
        self.requests.send(WatchRequest { keyspaces: vec![], known: vec![known] }).await.unwrap();
    }

    /// Follows, confirming all, until a topology is as wanted.
    pub async fn until(&mut self, wanted: impl Fn(&Topology) -> bool) -> Topology {
        loop {
            let Some(topology) = self.next().await.and_then(|u| u.topology) else { continue };
            self.confirm(&topology).await;
            if wanted(&topology) {
                return topology;
            }
        }
    }
}
