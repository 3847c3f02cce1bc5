//! The operator as a whole, over real connections, with stores that pretend.

mod fleet;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;
use vasto_client::env::Env;
use vasto_client::v1::keyspaces_client::KeyspacesClient;
use vasto_client::v1::operator_client::OperatorClient;
use vasto_client::v1::{
    ApplyRequest, DeleteRequest, DescribeRequest, ListRequest, Phase as Step, ReplaceRequest, ScaleRequest, Topology,
    View, WatchRequest,
};
use vasto_crds::{Keyspace, KeyspaceSpec, Phase};

use super::{Error, External, Operator, Options, StoreRunner};
use fleet::Fleet;

/// An operator, its folder, and a client of it.
struct Cluster {
    dir: TempDir,
    /// Kept, so that nobody else takes the port while the operator is down.
    port: std::net::TcpListener,
    fleet: Arc<Fleet>,
    stop: CancellationToken,
    served: JoinHandle<Result<(), Error>>,
    client: KeyspacesClient<Channel>,
}

impl Cluster {
    async fn start() -> Self {
        Self::start_with(|fleet| fleet).await
    }

    /// With stores that nobody starts but the test.
    async fn start_external() -> Self {
        Self::start_with(|_| Arc::new(External)).await
    }

    async fn start_with(runner: impl FnOnce(Arc<Fleet>) -> Arc<dyn StoreRunner>) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        port.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(port.try_clone().unwrap()).unwrap();
        let address = port.local_addr().unwrap().to_string();
        let dir = tempfile::tempdir().unwrap();
        let (fleet, stop) = (Fleet::new(&address), CancellationToken::new());
        let served = serve(&dir.path().join("operator"), &[], listener, runner(fleet.clone()), &stop);
        let client = KeyspacesClient::new(Env::real().dial(&address).unwrap());
        Self { dir, port, fleet, stop, served, client }
    }

    async fn end(&mut self) {
        self.stop.cancel();
        (&mut self.served).await.unwrap().unwrap();
    }

    /// Starts the operator again, after `meanwhile` with its folder.
    async fn restart(&mut self, files: &[&Path], meanwhile: impl FnOnce(&Path)) {
        self.end().await;
        let dir = self.dir.path().join("operator");
        meanwhile(&dir);
        let listener = TcpListener::from_std(self.port.try_clone().unwrap()).unwrap();
        self.stop = CancellationToken::new();
        self.served = serve(&dir, files, listener, self.fleet.clone(), &self.stop);
        self.client = KeyspacesClient::new(Env::real().dial(&self.port.local_addr().unwrap().to_string()).unwrap());
    }

    async fn apply(&mut self, shards: u32, copies: u32) -> Keyspace {
        let document = Keyspace::new("packages", KeyspaceSpec::new(shards, copies)).to_json();
        let made = self.client.apply(ApplyRequest { document }).await.unwrap().into_inner();
        Keyspace::from_json(&made.json).unwrap()
    }

    async fn scale(&mut self, shards: u32, replication_factor: u32) {
        let request = ScaleRequest { name: "packages".to_owned(), shards, replication_factor };
        self.client.scale(request).await.unwrap();
    }

    async fn replace(&mut self, store: &str) -> Result<Keyspace, tonic::Status> {
        let (name, store) = ("packages".to_owned(), store.to_owned());
        let request = ReplaceRequest { name, store, accept_data_loss: false };
        let resource = self.client.replace(request).await?.into_inner();
        Ok(Keyspace::from_json(&resource.json).unwrap())
    }

    /// Follows the keyspace until it is as wanted; gives every phase that was seen on the way.
    async fn until(&mut self, wanted: impl Fn(&Keyspace, &Topology) -> bool) -> (Keyspace, Topology) {
        let mut last = String::new();
        let follow = async {
            let request = DescribeRequest { name: "packages".to_owned(), watch: true };
            loop {
                // An operator that was just started may not know of the keyspace yet.
                let Ok(stream) = self.client.describe(request.clone()).await else {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                let mut stream = stream.into_inner();
                while let Ok(Some(resource)) = stream.message().await {
                    last.clone_from(&resource.json);
                    let keyspace = Keyspace::from_json(&resource.json).unwrap();
                    let text = keyspace.status.as_ref().and_then(|s| s.topology.clone());
                    let topology = text.map(|t| crate::status::from_text(&t).unwrap()).unwrap_or_default();
                    if wanted(&keyspace, &topology) {
                        return (keyspace, topology);
                    }
                }
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(20), follow).await;
        found.unwrap_or_else(|_| panic!("not in time; last seen: {last}"))
    }

    async fn until_ready(&mut self, shards: u32, copies: u32) -> (Keyspace, Topology) {
        self.until(|k, _| reached(k, shards, copies)).await
    }
}

fn serve(
    dir: &Path,
    files: &[&Path],
    listener: TcpListener,
    runner: Arc<dyn StoreRunner>,
    stop: &CancellationToken,
) -> JoinHandle<Result<(), Error>> {
    let mut options = Options::new(dir.to_owned(), Env::real());
    options.files = files.iter().map(|f| (*f).to_owned()).collect();
    (options.settle, options.fence_wait) = (Duration::from_millis(50), Duration::from_secs(1));
    tokio::spawn(Operator::open(options).unwrap().serve(listener, runner, stop.clone()))
}

fn reached(keyspace: &Keyspace, shards: u32, copies: u32) -> bool {
    keyspace.status.as_ref().is_some_and(|s| {
        s.phase == Some(Phase::Ready)
            && s.observed_generation == keyspace.metadata.generation
            && (s.shards, s.replication_factor) == (Some(shards), Some(copies))
            && (s.ready_replicas, s.replicas) == (Some(shards * copies), Some(shards * copies))
    })
}

fn replicas(topology: &Topology) -> Vec<(String, u64)> {
    let places = topology.current.iter().flat_map(View::places);
    places.map(|p| (p.assignment.store.clone(), p.assignment.replica)).collect()
}

#[tokio::test]
async fn a_keyspace_grows_shrinks_and_outlives_the_operators_files() {
    let mut cluster = Cluster::start().await;
    let made = cluster.apply(3, 2).await;
    assert_eq!(made.status.as_ref().unwrap().phase, Some(Phase::Pending));
    let (three, _) = cluster.until_ready(3, 2).await;
    let status = three.status.unwrap();
    assert!(status.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"), "{:?}", status.conditions);
    assert_eq!(status.stores.len(), 3);
    assert_eq!(status.stores[1].address.as_deref(), Some("store-1:1"));
    assert_eq!(status.progress, None);

    cluster.scale(5, 0).await;
    let (moving, _) = cluster.until(|_, t| t.phase() != Step::Stable).await;
    assert!(moving.status.unwrap().progress.unwrap().started_at.is_some());
    let (five, _) = cluster.until_ready(5, 2).await;
    assert_eq!(five.status.unwrap().stores.len(), 5);

    cluster.scale(3, 1).await;
    let (_, before) = cluster.until_ready(3, 1).await;
    cluster.fleet.wait_running(&["store-0", "store-1", "store-2"]).await;

    cluster.restart(&[], |dir| std::fs::remove_dir_all(dir).unwrap()).await;
    let (back, after) = cluster.until_ready(3, 1).await;
    assert_eq!((back.uid(), back.spec.clone()), (made.uid(), KeyspaceSpec::new(3, 1)));
    assert_eq!(replicas(&after), replicas(&before));
    assert!(after.version >= before.version);

    cluster.scale(4, 2).await;
    cluster.until_ready(4, 2).await;
    cluster.end().await;
}

#[tokio::test]
async fn files_lost_in_the_middle_of_a_change_and_of_a_replace() {
    let mut cluster = Cluster::start().await;
    cluster.apply(3, 2).await;
    cluster.until_ready(3, 2).await;
    cluster.scale(5, 0).await;
    cluster.until(|_, t| t.phase() != Step::Stable).await;
    cluster.restart(&[], |dir| std::fs::remove_dir_all(dir).unwrap()).await;
    let (_, before) = cluster.until(|k, _| reached(k, 5, 2) || reached(k, 3, 2)).await;
    // If the spec had not reached a store yet, it is as it was.
    let shards = before.size();
    cluster.replace("store-1").await.unwrap();
    let (_, _) = cluster.until(|_, t| t.replace.is_some()).await;
    cluster.restart(&[], |dir| std::fs::remove_dir_all(dir).unwrap()).await;
    let (_, after) = cluster.until(|k, t| reached(k, shards, 2) && t.replace.is_none() && !t.replaced.is_empty()).await;
    let moved = |t: &Topology| {
        replicas(t).into_iter().filter(|(store, _)| store == "store-1").map(|(_, id)| id).collect::<Vec<_>>()
    };
    assert_eq!(moved(&after).len(), 2);
    assert!(moved(&after).iter().all(|id| !moved(&before).contains(id)), "made anew");
    cluster.end().await;
}

#[tokio::test]
async fn with_one_copy_a_store_is_replaced_over_a_surge_store() {
    let mut cluster = Cluster::start().await;
    cluster.apply(2, 1).await;
    let (_, before) = cluster.until_ready(2, 1).await;
    let asked = cluster.replace("store-1").await.unwrap();
    assert!(asked.metadata.annotations.unwrap().contains_key("vasto.io/replace"));
    let again = cluster.replace("store-0").await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    let (done, after) = cluster.until(|k, t| reached(k, 2, 1) && !t.replaced.is_empty()).await;
    assert!(!done.metadata.annotations.unwrap().contains_key("vasto.io/replace"));
    assert_eq!(replicas(&after)[0], replicas(&before)[0]);
    assert_ne!(replicas(&after)[1], replicas(&before)[1]);
    cluster.fleet.wait_running(&["store-0", "store-1"]).await;
    cluster.end().await;
}

#[tokio::test]
async fn a_deletion_reaches_a_store_that_was_away() {
    let mut cluster = Cluster::start().await;
    let uid = cluster.apply(3, 2).await.uid().to_owned();
    cluster.until_ready(3, 2).await;
    // Nobody starts it again before it is told to.
    cluster.restart(&[], |_| {}).await;
    cluster.until_ready(3, 2).await;
    let away = cluster.fleet.topology("store-2", &uid).unwrap();
    cluster.fleet.kill("store-2");
    let request = DescribeRequest { name: "packages".to_owned(), watch: true };
    let mut states = cluster.client.describe(request).await.unwrap().into_inner();
    cluster.client.delete(DeleteRequest { name: "packages".to_owned() }).await.unwrap();
    let gone = async { while states.message().await.unwrap().is_some() {} };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("gone in time");
    assert_eq!(cluster.client.list(ListRequest {}).await.unwrap().into_inner().items, []);
    assert_eq!(away.phase(), Step::Stable);

    // It is not taken for a lost keyspace, neither now nor by the next operator.
    cluster.restart(&[], |_| {}).await;
    cluster.fleet.start("store-2");
    let told = async {
        while cluster.fleet.topology("store-2", &uid).is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), told).await.expect("told in time");
    let (name, watch) = ("packages".to_owned(), false);
    let missing = cluster.client.describe(DescribeRequest { name, watch }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    assert_ne!(cluster.apply(1, 1).await.uid(), uid);
    cluster.until_ready(1, 1).await;
    cluster.end().await;
}

#[tokio::test]
async fn a_wiped_store_is_healed_from_the_other_copy() {
    let mut cluster = Cluster::start().await;
    cluster.apply(3, 2).await;
    let (_, before) = cluster.until_ready(3, 2).await;
    cluster.fleet.kill("store-1");
    cluster.fleet.wipe("store-1");
    cluster.fleet.start("store-1");
    let (_, after) = cluster.until(|k, t| reached(k, 3, 2) && t.version > before.version).await;
    let kept = replicas(&before).into_iter().filter(|r| replicas(&after).contains(r)).count();
    assert_eq!(kept, 4);
    cluster.end().await;
}

#[tokio::test]
async fn nothing_is_told_to_anyone_before_it_is_on_disk() {
    let mut cluster = Cluster::start_external().await;
    let uid = cluster.apply(2, 1).await.uid().to_owned();
    let (waiting, _) = cluster.until(|k, _| k.status.as_ref().is_some_and(|s| s.progress.is_some())).await;
    let said = waiting.status.unwrap().progress.unwrap().waiting.unwrap();
    assert_eq!(said, "waits for store-0 to report");

    let keyspaces = cluster.dir.path().join("operator/keyspaces");
    let aside = cluster.dir.path().join("aside");
    std::fs::rename(&keyspaces, &aside).unwrap();
    cluster.fleet.start("store-0");
    cluster.fleet.start("store-1");
    let failing = |k: &Keyspace| {
        let conditions = k.status.as_ref().map(|s| s.conditions.clone()).unwrap_or_default();
        conditions
            .iter()
            .any(|c| c.reason == "OperatorFailure" && c.message.contains("folder that this user may write"))
    };
    let (_, topology) = cluster.until(|k, _| failing(k)).await;
    assert_eq!((topology.version, cluster.fleet.topology("store-0", &uid)), (0, None));
    let request = ScaleRequest { name: "packages".to_owned(), shards: 3, replication_factor: 0 };
    assert_eq!(cluster.client.scale(request).await.unwrap_err().code(), Code::Unavailable);

    std::fs::rename(&aside, &keyspaces).unwrap();
    let (ready, _) = cluster.until_ready(2, 1).await;
    assert!(!failing(&ready));
    cluster.end().await;
}

#[tokio::test]
async fn a_fence_waits_for_watchers_but_not_for_ever() {
    let mut cluster = Cluster::start().await;
    cluster.apply(2, 1).await;
    cluster.until_ready(2, 1).await;
    // One that never says what it knows.
    let address = cluster.port.local_addr().unwrap().to_string();
    let mut watcher = OperatorClient::new(Env::real().dial(&address).unwrap());
    let (requests, receiver) = mpsc::channel(1);
    requests.send(WatchRequest { keyspaces: vec!["packages".to_owned()], known: vec![] }).await.unwrap();
    let mut updates = watcher.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    assert!(updates.message().await.unwrap().is_some());
    cluster.scale(3, 0).await;
    let waiting =
        |k: &Keyspace| k.status.as_ref().and_then(|s| s.progress.as_ref()?.waiting.clone()).unwrap_or_default();
    let (_, switched) = cluster.until(|k, _| waiting(k).starts_with("waits for clients to learn version")).await;
    assert_eq!(switched.phase(), Step::Switch);
    cluster.until_ready(3, 1).await;
    cluster.end().await;
}

#[tokio::test]
async fn refusals_say_what_would_be_right() {
    let mut cluster = Cluster::start().await;
    let name = || "packages".to_owned();
    let missing =
        cluster.client.scale(ScaleRequest { name: name(), shards: 2, replication_factor: 0 }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    assert!(missing.message().contains("there are none yet"), "{}", missing.message());
    cluster.apply(2, 1).await;
    cluster.until_ready(2, 1).await;
    let missing = cluster.client.delete(DeleteRequest { name: "other".to_owned() }).await.unwrap_err();
    assert_eq!(
        (missing.code(), missing.message()),
        (Code::NotFound, "keyspace \"other\" does not exist; these do: packages")
    );
    for (shards, copies, words) in [(0, 0, "from 1 to 1024"), (1, 2, "lower replicationFactor or raise shards")] {
        let request = ScaleRequest { name: name(), shards, replication_factor: copies };
        let refused = cluster.client.scale(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(words), "{}", refused.message());
    }
    for (document, words) in [("kind: Pod", "Keyspace"), ("{", "YAML")] {
        let refused = cluster.client.apply(ApplyRequest { document: document.to_owned() }).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(words), "{}", refused.message());
    }
    let unknown = cluster.replace("store-9").await.unwrap_err();
    assert_eq!(unknown.code(), Code::FailedPrecondition);
    assert!(unknown.message().contains("it has them on store-0, store-1"), "{}", unknown.message());
    cluster.end().await;
}

#[tokio::test]
async fn a_followed_file_counts_when_it_is_edited() {
    let mut cluster = Cluster::start().await;
    let path = cluster.dir.path().join("keyspaces.yaml");
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    let document = |shards: u32| {
        format!(
            "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {{name: packages}}\n\
             spec: {{shards: {shards}, replicationFactor: 1}}\n"
        )
    };
    write(&document(2));
    cluster.restart(&[&path], |_| {}).await;
    cluster.until_ready(2, 1).await;
    cluster.scale(3, 0).await;
    cluster.until_ready(3, 1).await;

    // Neither a bad edit nor a restart changes what was scaled.
    write("spec: {shards: x");
    cluster.end().await;
    let options = || {
        let mut options = Options::new(cluster.dir.path().join("operator"), Env::real());
        options.files = vec![path.clone()];
        options
    };
    let refused = Operator::open(options()).err().unwrap().to_string();
    assert!(refused.contains("keyspaces.yaml: document 1: can't be read as YAML"), "{refused}");
    write(&document(2));
    cluster.served = tokio::spawn(async { Ok(()) });
    cluster.restart(&[&path], |_| {}).await;
    let (kept, _) = cluster.until_ready(3, 1).await;
    assert_eq!(kept.metadata.generation, Some(2));

    write(&document(4));
    cluster.until_ready(4, 1).await;
    cluster.end().await;
}

#[tokio::test]
async fn what_is_in_use_is_refused_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let first = Operator::open(Options::new(dir.path().to_owned(), Env::real())).unwrap();
    let second = Operator::open(Options::new(dir.path().to_owned(), Env::real())).err().unwrap();
    assert!(second.to_string().contains("in use by another process"), "{second}");
    // An operator without stores stops at once when it is told to.
    let stop = CancellationToken::new();
    stop.cancel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    first.serve(listener, Arc::new(External), stop).await.unwrap();
}
