
use std::pin::Pin;
use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use vasto_client::v1::{self, *};
use vasto_client::{Client, Env, Op};
struct S;
type R<T> = Result<Response<Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>>, Status>;
#[tonic::async_trait]
impl v1::store_server::Store for S {
    type PipeStream = Pin<Box<dyn Stream<Item = Result<Batch, Status>> + Send>>;
    type ScanStream = Pin<Box<dyn Stream<Item = Result<ScanResponse, Status>> + Send>>;
    type InspectStream = Pin<Box<dyn Stream<Item = Result<InspectResponse, Status>> + Send>>;
    async fn pipe(&self, r: Request<Streaming<Batch>>) -> R<Batch> {
        Ok(Response::new(Box::pin(r.into_inner().map(|b| b.map(|b| Batch { operations: vec![], answers: b.operations.into_iter().map(|o| Answer { id: o.id, result: Some(match o.kind { Some(operation::Kind::Get(_)) => answer::Result::Found(Value { value: Some(value::Value::Bytes(vec![7u8; 100].into())), expiry_ms: 0, stamp: Some(Stamp{time:1,origin:1})}), _ => answer::Result::Written(Written { stamp: Some(Stamp { time: 5, origin: 1 }), replica: 1 })}) }).collect() })))))
    }
    async fn scan(&self, _: Request<ScanRequest>) -> R<ScanResponse> { Err(Status::unimplemented("")) }
    async fn inspect(&self, _: Request<InspectRequest>) -> R<InspectResponse> { Err(Status::unimplemented("")) }
    async fn compact(&self, _: Request<CompactRequest>) -> Result<Response<CompactResponse>, Status> { Err(Status::unimplemented("")) }
}
struct O(KeyspaceUpdate);
#[tonic::async_trait]
impl v1::operator_server::Operator for O {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;
    type ReportStream = Pin<Box<dyn Stream<Item = Result<StoreUpdate, Status>> + Send>>;
    async fn watch(&self, r: Request<Streaming<WatchRequest>>) -> R<WatchResponse> {
        let u = self.0.clone();
        Ok(Response::new(Box::pin(r.into_inner().map(move |_| Ok(WatchResponse { event: Some(watch_response::Event::Update(u.clone())) })))))
    }
    async fn report(&self, _: Request<Streaming<StoreReport>>) -> R<StoreUpdate> { Err(Status::unimplemented("")) }
}
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bench() {
    let l = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let a = l.local_addr().unwrap().to_string();
    let update = KeyspaceUpdate { topology: Some(Topology { uid: "0b7c1b0a-0000-4000-8000-000000000000".into(), name: "m".into(), version: 1, current: Some(View { shards: vec![Shard { replicas: vec![Assignment { store: "s".into(), replica: 1, serving: true }] }; 3] }), ..Default::default() }), addresses: vec![StoreAddress { store: "s".into(), address: a.clone() }] };
    tokio::spawn(tonic::transport::Server::builder().initial_stream_window_size(4<<20).initial_connection_window_size(16<<20).tcp_nodelay(true).add_service(v1::store_server::StoreServer::new(S)).add_service(v1::operator_server::OperatorServer::new(O(update))).serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(l)));
    let map = Client::with(Env::real(), a).keyspace("m").await.unwrap();
    for callers in [1, 16, 50, 400] {
        let start = std::time::Instant::now();
        let n = if callers == 1 { 20_000 } else { 1_000_000 / callers };
        let t: Vec<_> = (0..callers).map(|c| { let map = map.clone(); tokio::spawn(async move { for i in 0..n { if i % 2 == 0 { map.put(format!("key-{c}-{i}"), &[1u8; 100]).await.unwrap(); } else { map.get(format!("key-{c}-{i}")).await.unwrap(); } } }) }).collect();
        for t in t { t.await.unwrap(); }
        println!("{callers} callers: {:.0} ops/s, {:.1} us", (n * callers) as f64 / start.elapsed().as_secs_f64(), start.elapsed().as_secs_f64() * 1e6 / n as f64);
    }
    let start = std::time::Instant::now();
    for _ in 0..100 { let r = map.batch((0..10_000).map(|i| Op::put(format!("k{i}"), vec![1u8; 100]))).await; assert!(r.iter().all(|r| r.is_ok())); }
    println!("batch: {:.0} ops/s", 1e6 / start.elapsed().as_secs_f64());
}
