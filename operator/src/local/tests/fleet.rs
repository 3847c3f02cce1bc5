//! Stores without data: they make, report, fence, clean and drop what topologies
//! ask for, over real connections, and keep it on a pretended disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use vasto_client::env::Env;
use vasto_client::v1::operator_client::OperatorClient;
use vasto_client::v1::{KeyspaceReport, Phase, ReplicaReport, SourceReport, StoreReport, StoreUpdate, Topology, View};

use crate::local::{BoxError, StoreRunner};

/// What every replica has written, and followed.
const SEQ: u64 = 10;

#[derive(Clone, Debug, Default)]
struct Replica {
    shard: u32,
    candidate: bool,
    fence_version: u64,
    cleaned_version: u64,
}

#[derive(Clone, Debug, Default)]
struct Keyspace {
    topology: Topology,
    replicas: BTreeMap<u64, Replica>,
}

/// A store's disk: keyspaces by uid.
type Disk = BTreeMap<String, Keyspace>;

/// A runner of such stores.
pub(super) struct Fleet {
    env: Env,
    operator: String,
    disks: Arc<Mutex<BTreeMap<String, Disk>>>,
    running: watch::Sender<BTreeMap<String, CancellationToken>>,
}

impl Fleet {
    pub(super) fn new(operator: &str) -> Arc<Self> {
        Arc::new(Self {
            env: Env::real(),
            operator: operator.to_owned(),
            disks: Arc::default(),
            running: watch::Sender::new(BTreeMap::new()),
        })
    }

    pub(super) fn start(&self, name: &str) {
        self.running.send_modify(|running| {
            running.entry(name.to_owned()).or_insert_with(|| {
                self.disks.lock().unwrap().entry(name.to_owned()).or_default();
                let stop = CancellationToken::new();
                let store = Store {
                    name: name.to_owned(),
                    env: self.env.clone(),
                    operator: self.operator.clone(),
                    disks: self.disks.clone(),
                };
                tokio::spawn(stop.clone().run_until_cancelled_owned(store.run()));
                stop
            });
        });
    }

    /// Ends a store without a word.
    pub(super) fn kill(&self, name: &str) {
        self.running.send_modify(|running| running.remove(name).unwrap().cancel());
    }

    pub(super) fn wipe(&self, name: &str) {
        self.disks.lock().unwrap().remove(name);
    }

    /// The topology that a store has.
    pub(super) fn topology(&self, name: &str, uid: &str) -> Option<Topology> {
        self.disks.lock().unwrap().get(name)?.get(uid).map(|k| k.topology.clone())
    }

    /// Waits until exactly these stores run.
    pub(super) async fn wait_running(&self, names: &[&str]) {
        let wanted: BTreeSet<&str> = names.iter().copied().collect();
        let mut running = self.running.subscribe();
        let done = running.wait_for(|r| r.keys().map(String::as_str).collect::<BTreeSet<_>>() == wanted);
        tokio::time::timeout(Duration::from_secs(20), done).await.expect("in time").expect("running");
    }
}

impl StoreRunner for Fleet {
    fn existing(&self) -> BoxFuture<'_, Result<Option<BTreeSet<String>>, BoxError>> {
        Box::pin(async { Ok(Some(self.disks.lock().unwrap().keys().cloned().collect())) })
    }

    fn ensure(&self, names: BTreeSet<String>) -> BoxFuture<'_, Result<(), BoxError>> {
        names.iter().for_each(|name| self.start(name));
        Box::pin(async { Ok(()) })
    }

    fn remove(&self, name: String) -> BoxFuture<'_, Result<(), BoxError>> {
        let disk = self.disks.lock().unwrap().remove(&name).unwrap_or_default();
        assert!(disk.values().all(|k| k.replicas.is_empty()), "{name} still had replicas");
        self.kill(&name);
        Box::pin(async { Ok(()) })
    }
}

struct Store {
    name: String,
    env: Env,
    operator: String,
    disks: Arc<Mutex<BTreeMap<String, Disk>>>,
}

impl Store {
    async fn run(self) {
        let incarnation = self.env.random_id();
        loop {
            let _ = self.session(incarnation).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn session(&self, incarnation: u64) -> Result<(), Box<dyn std::error::Error>> {
        let mut client = OperatorClient::new(self.env.dial(&self.operator)?);
        let (reports, receiver) = mpsc::channel(1);
        reports.send(self.report(incarnation)).await?;
        let mut updates = client.report(ReceiverStream::new(receiver)).await?.into_inner();
        loop {
            tokio::select! {
                update = updates.message() => match update? {
                    Some(update) => self.install(update),
                    None => return Ok(()),
                },
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            reports.send(self.report(incarnation)).await?;
        }
    }

    fn install(&self, update: StoreUpdate) {
        let mut disks = self.disks.lock().unwrap();
        let disk = disks.entry(self.name.clone()).or_default();
        for topology in update.keyspaces.into_iter().filter_map(|k| k.topology) {
            let keyspace = disk.entry(topology.uid.clone()).or_default();
            if topology.version > keyspace.topology.version {
                keyspace.topology = topology;
                self.act(keyspace);
                if keyspace.topology.phase() == Phase::Deleting && !keyspace.topology.retain {
                    let uid = keyspace.topology.uid.clone();
                    disk.remove(&uid);
                }
            }
        }
    }

    fn act(&self, keyspace: &mut Keyspace) {
        let Keyspace { topology: t, replicas } = keyspace;
        replicas.retain(|id, _| !t.drops.iter().any(|d| d.replica == *id));
        let mine = |view: &Option<View>| -> Vec<(u32, u64)> {
            let places = view.iter().flat_map(View::places).filter(|p| p.assignment.store == self.name);
            places.map(|p| (p.shard, p.assignment.replica)).collect()
        };
        for (shard, id) in mine(&t.next) {
            let named = |id: &u64| t.names(*id);
            if id == 0 && !replicas.iter().any(|(id, r)| r.shard == shard && r.candidate && !named(id)) {
                let candidate = Replica { shard, candidate: true, ..Replica::default() };
                replicas.insert(self.env.random_id(), candidate);
            }
        }
        for (shard, id) in mine(&t.current) {
            if let Some(replica) = replicas.get_mut(&id) {
                (replica.shard, replica.candidate) = (shard, false);
            }
        }
        let fenced = matches!(t.phase(), Phase::Fence | Phase::Drain | Phase::Cleanup);
        for (_, id) in mine(&t.previous).into_iter().filter(|_| fenced) {
            if let Some(replica) = replicas.get_mut(&id) {
                replica.fence_version = t.switch_version;
            }
        }
        for id in &t.clean {
            if let Some(replica) = replicas.get_mut(id) {
                replica.cleaned_version = t.switch_version;
            }
        }
    }

    fn report(&self, incarnation: u64) -> StoreReport {
        let disks = self.disks.lock().unwrap();
        let keyspaces = disks.get(&self.name).into_iter().flatten().map(|(uid, k)| KeyspaceReport {
            uid: uid.clone(),
            version: k.topology.version,
            topology: Some(k.topology.clone()),
            replicas: k.replicas.iter().map(|(id, r)| replica(*id, r, &k.topology)).collect(),
        });
        StoreReport {
            store: self.name.clone(),
            address: format!("{}:1", self.name),
            incarnation,
            keyspaces: keyspaces.collect(),
            ..StoreReport::default()
        }
    }
}

fn replica(id: u64, replica: &Replica, topology: &Topology) -> ReplicaReport {
    let sources = topology.sources(id).into_iter().map(|s| {
        let id = s.assignment.replica;
        SourceReport {
            replica: id,
            epoch: id,
            confirmed: SEQ,
            records: SEQ,
            records_total: SEQ,
            ..SourceReport::default()
        }
    });
    ReplicaReport {
        id,
        shard: replica.shard,
        born: true,
        epoch: id,
        last_seq: SEQ,
        fence_version: replica.fence_version,
        fence_seq: if replica.fence_version == 0 { 0 } else { SEQ },
        cleaned_version: replica.cleaned_version,
        sources: sources.collect(),
        records: SEQ,
        bytes: 100 * SEQ,
        candidate: replica.candidate,
        ..ReplicaReport::default()
    }
}
