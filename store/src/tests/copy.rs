//! Copying from a peer that is cut off, and goes on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};
use vasto_client::v1::peer_server::{Peer, PeerServer};
use vasto_client::v1::snapshot_response::Message;
use vasto_client::v1::{
    CompareRequest, CompareResponse, FollowRequest, FollowResponse, KeyspaceUpdate, LearnRequest, Shipped, SnapshotEnd,
    SnapshotRecords, SnapshotRequest, SnapshotResponse, SnapshotStart, SoundRequest, SoundResponse, StoreAddress,
    Topology,
};

use super::{ME, PEER, context, open, record, stable};
use crate::dir::Dir;
use crate::host::Host;
use crate::record::Content;
use crate::snapshot::{Origin, Part, Reader, join_from};

/// Sends one record and is cut; goes on, when asked again, from a later pin.
#[derive(Default)]
struct Cut {
    asked: AtomicUsize,
    /// Of its topology, with each piece.
    versions: [u64; 2],
}

type Out<T> = Result<Response<BoxStream<'static, Result<T, Status>>>, Status>;

#[tonic::async_trait]
impl Peer for Cut {
    type FollowStream = BoxStream<'static, Result<FollowResponse, Status>>;
    type SnapshotStream = BoxStream<'static, Result<SnapshotResponse, Status>>;
    type CompareStream = BoxStream<'static, Result<CompareResponse, Status>>;

    async fn snapshot(&self, request: Request<SnapshotRequest>) -> Out<SnapshotResponse> {
        let request = request.into_inner();
        let [first, second] = self.versions;
        let start = |pin, version| Message::Start(SnapshotStart { epoch: 1, pin, version, ..SnapshotStart::default() });
        let records = |keys: &[&'static str]| {
            let shipped = |key: &&'static str| Shipped {
                key: Bytes::from_static(key.as_bytes()),
                record: record(key, 1, Content::Nothing).encoded().into(),
            };
            Message::Records(SnapshotRecords { records: keys.iter().map(shipped).collect() })
        };
        let messages = match self.asked.fetch_add(1, Ordering::SeqCst) {
            0 => vec![start(10, first), records(&["a", "b"])],
            _ => {
                assert_eq!((request.after.as_deref(), request.epoch), (Some(&b"a"[..]), 1));
                vec![start(20, second), records(&["b", "c"]), Message::End(SnapshotEnd::default())]
            }
        };
        Ok(Response::new(stream::iter(messages).map(|m| Ok(SnapshotResponse { message: Some(m) })).boxed()))
    }

    async fn follow(&self, _: Request<Streaming<FollowRequest>>) -> Out<FollowResponse> {
        Err(Status::unimplemented(""))
    }

    async fn learn(&self, _: Request<LearnRequest>) -> Result<Response<KeyspaceUpdate>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn sound(&self, _: Request<SoundRequest>) -> Result<Response<SoundResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn compare(&self, _: Request<CompareRequest>) -> Out<CompareResponse> {
        Err(Status::unimplemented(""))
    }
}

fn host(dir: &Path) -> Arc<Host> {
    Host::open("store-0", None, "here:1".into(), Dir::open(dir, "store-0").unwrap(), context())
}

/// A store that knows of one shard, version 1, and of this peer.
async fn beside(dir: &Path, peer: Cut) -> (Arc<Host>, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tonic::transport::Server::builder().add_service(PeerServer::new(peer));
    let serving = tokio::spawn(async { serving.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
    let host = host(dir);
    let topology = Topology { name: "k".into(), ..Topology::clone(&stable(1, &[&[ME, PEER]])) };
    let addresses = vec![StoreAddress { store: "store-8".into(), address }];
    host.install(KeyspaceUpdate { topology: Some(topology), addresses }).await;
    (host, serving)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_chosen_by_a_newer_topology_is_not_taken_under_an_older_one() {
    for versions in [[2, 2], [1, 2]] {
        let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (host, serving) = beside(dir.path(), Cut { versions, ..Cut::default() }).await;
        let replica = open(files.path(), &stable(1, &[&[ME, PEER]]));
        let keyspace = host.keyspace("u").unwrap();
        let why = join_from(&keyspace, &replica, PEER, "store-8").await.unwrap_err().to_string();
        assert!(why.contains("topology version 2 is not known to the writer yet, only 1"), "{why}");
        assert_eq!(replica.progress.position(PEER), None);
        serving.abort();
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_copied_in_two_pieces_follows_from_the_first_pin() {
    let dir = tempfile::tempdir().unwrap();
    let (host, serving) = beside(dir.path(), Cut::default()).await;
    let from = Origin { replica: PEER, store: "store-8".into() };
    let mut reader = Reader::new(host.keyspace("u").unwrap(), from, ME, false);
    reader.begin().await.unwrap();
    let mut keys = Vec::new();
    loop {
        match reader.next().await.unwrap() {
            Part::Records(records) => keys.extend(records.into_iter().map(|(key, _)| key)),
            Part::File(file) => panic!("{file:?}"),
            Part::End => break,
        }
    }
    assert_eq!(keys, ["a", "b", "c"]);
    // What changed between the pins at keys already passed is in neither piece.
    assert_eq!(reader.positions().iter().map(|p| p.seq).collect::<Vec<_>>(), [10]);
    serving.abort();
    host.stop().await;
}
