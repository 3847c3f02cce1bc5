//! Files of a stopped store are damaged: the replica is refused, rebuilt or
//! recovered, and never wrong. At replication factor 2 nothing that was acknowledged is lost.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vasto_client::v1::{Append, Get, Merge, Put, answer, operation, put};
use vasto_client::{Op, Outcome, Stamp};
use vasto_tests::cluster::{Cluster, topology, vasto};
use vasto_tests::history::{self, Event, Fault, Finals, History, Violation, check};
use vasto_tests::pinned::{At, Pinned, seen};

const NAME: &str = "damage";
const PATIENCE: Duration = Duration::from_secs(10);

fn document() -> String {
    format!(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: {NAME}\n\
         spec:\n  shards: 2\n  replicationFactor: 2\n  durability: Periodic\n"
    )
}

/// Two stores, each with both shards, and what was written to them.
struct Damage {
    cluster: Cluster,
    history: History,
    number: u32,
}

impl Damage {
    async fn new() -> Self {
        let cluster = Cluster::start(2, &document());
        cluster.settled(NAME, 2, 2, 30).await;
        Self { cluster, history: History::default(), number: 0 }
    }

    /// Writes as many registers, adds and appends through whichever replicas take them.
    async fn write(&mut self, count: u32) {
        let keyspace = self.cluster.keyspace(NAME).await;
        for _ in 0..count.div_ceil(500) {
            let mut asked = Vec::new();
            for _ in 0..500 {
                self.number += 1;
                let n = self.number;
                let (key, op) = operation(n);
                let library = match &op {
                    history::Op::Put(data) => Op::put(key.clone(), data.clone()),
                    history::Op::Delete => Op::delete(key.clone()),
                    history::Op::Add(number) => Op::add(key.clone(), *number),
                    history::Op::Append(element) => Op::append(key.clone(), element.clone()),
                    history::Op::Get => Op::get(key.clone()),
                };
                asked.push((key, op, library));
            }
            let answers = keyspace.batch(asked.iter().map(|(_, _, op)| op.clone())).await;
            for ((key, op, _), answer) in asked.into_iter().zip(answers) {
                let outcome = match answer {
                    Ok(Outcome::Written(stamp)) => history::Outcome::Acknowledged(stamp),
                    other => panic!("{op:?}: {other:?}: with another replica alive every write is taken"),
                };
                self.record(key, op, outcome);
            }
        }
    }

    fn record(&mut self, key: Bytes, op: history::Op, outcome: history::Outcome) {
        let at = Duration::from_millis(self.history.keys.len() as u64);
        // All the same client's, but the keys' order is not judged here: batches write a key once.
        let event = Event { client: 1, op, invoked_at: at, returned_at: at, replica: None, outcome };
        self.history.record(key, event);
    }

    /// Every replica of a store, by the topology that the operator tells.
    async fn replicas(&self, store: &str) -> Vec<At> {
        let topology = topology(&self.cluster.describe(NAME).await.unwrap());
        let view = topology.current.clone().unwrap();
        let address = self.cluster.store_address(store);
        let places = view.places().filter(|p| p.assignment.store == store);
        places
            .map(|p| At {
                uid: topology.uid.clone(),
                shard: p.shard,
                shards: p.shards,
                replica: p.assignment.replica,
                address: address.clone(),
            })
            .collect()
    }

    /// Adds and appends that only this store takes: their slots and chunks bear its replicas' origins.
    async fn write_through(&mut self, store: &str, count: u32) {
        for at in self.replicas(store).await {
            let mut pinned = connected(&at).await;
            for _ in 0..count {
                self.number += 1;
                let n = self.number;
                let key = owned(&format!("through/{store}/{}", n % 5), &at);
                let (op, kind) = match n % 5 {
                    0 => {
                        let element = Bytes::from(format!("{n}\n"));
                        (history::Op::Append(element.clone()), operation::Kind::Append(Append { bytes: element }))
                    }
                    1 => {
                        let value = Bytes::from(format!("value {n}"));
                        let kind = Put { value: Some(put::Value::Bytes(value.clone())), ..Put::default() };
                        (history::Op::Put(value.into()), operation::Kind::Put(kind))
                    }
                    _ => (history::Op::Add(f64::from(n)), operation::Kind::Merge(Merge { kind: 0, number: n.into() })),
                };
                let stamp = taken(&mut pinned, key.clone(), kind).await;
                self.record(key, op, history::Outcome::Acknowledged(stamp));
            }
        }
    }

    /// Waits until all replicas are equal by `vasto check`.
    async fn equal(&self) {
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            let (code, out, err) = self.cluster.run(&["check", NAME]);
            if code == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "the replicas don't become equal: {out}{err}\n{}", self.cluster.tail());
        }
    }

    /// The folders of all databases of a store.
    fn databases(&self, store: &str) -> Vec<PathBuf> {
        let folders = |path: &Path| -> Vec<PathBuf> {
            fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect()
        };
        let keyspaces = folders(&self.cluster.path().join(store).join("keyspaces"));
        let replicas = keyspaces.iter().flat_map(|k| folders(&k.join("replicas")));
        let found: Vec<PathBuf> = replicas.map(|r| r.join("db")).filter(|db| db.is_dir()).collect();
        assert!(!found.is_empty(), "no database of {store}");
        found
    }

    /// What may be read in the end through the library, which goes to whoever answers.
    async fn violations(&self) -> Vec<Violation> {
        let keyspace = self.cluster.keyspace(NAME).await;
        let keys: Vec<Bytes> = self.history.keys.keys().cloned().collect();
        let mut finals = Finals::new();
        for keys in keys.chunks(500) {
            let answers = keyspace.batch(keys.iter().map(|key| Op::get(key.clone()))).await;
            for (key, answer) in keys.iter().zip(answers) {
                let answer = answer.unwrap_or_else(|error| panic!("{error}\n{}", self.cluster.tail()));
                finals.insert(key.clone(), answer.value().map(|value| (value.data, value.stamp)));
            }
        }
        check(&self.history, &finals)
    }

    /// What a damaged store itself says: an answer may be old, or an error, but never what nobody wrote.
    async fn never_wrong(&self, store: &str) -> (usize, usize) {
        let (mut answered, mut failed) = (0, 0);
        let mut reads = self.history.clone();
        for at in self.replicas(store).await {
            let Ok(mut pinned) = Pinned::connect(&vasto_client::Env::real(), at.clone(), PATIENCE).await else {
                continue;
            };
            let keys: Vec<Bytes> = self.history.keys.keys().filter(|key| is_of(key, &at)).cloned().collect();
            let gets = keys.iter().map(|key| (key.clone(), operation::Kind::Get(Get {}))).collect();
            let Ok(answers) = pinned.ask(gets, None).await else { continue };
            for (key, answer) in keys.into_iter().zip(answers) {
                let found = match answer {
                    answer::Result::Found(value) => Some(seen(value).unwrap()),
                    answer::Result::Missing(_) => None,
                    answer::Result::Failure(_) => {
                        failed += 1;
                        continue;
                    }
                    other => panic!("{other:?}"),
                };
                answered += 1;
                let (op, outcome, at) = (history::Op::Get, history::Outcome::Read(found), Duration::MAX);
                let event = Event { client: 2, op, invoked_at: at, returned_at: at, replica: None, outcome };
                reads.record(key, event);
            }
        }
        let wrong: Vec<String> = check(&reads, &Finals::new())
            .iter()
            .filter(|v| matches!(v.fault, Fault::Invented | Fault::Twice))
            .map(ToString::to_string)
            .collect();
        assert!(wrong.is_empty(), "{} answers of {store} are wrong, first: {}", wrong.len(), wrong[0]);
        (answered, failed)
    }

    /// Waits until the store's replicas are whole again, or the operator is told what is wrong with one; says which.
    async fn outcome(&self, store: &str) -> String {
        let mut unread = 0;
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            let resource = self.cluster.describe(NAME).await.unwrap_or_default();
            let stores = resource.pointer("/status/stores").and_then(serde_json::Value::as_array).cloned();
            let mine = stores.into_iter().flatten().find(|s| s["name"] == store).unwrap_or_default();
            let message = mine["message"].as_str().unwrap_or_default();
            if !message.is_empty() {
                return format!("reported: {message}");
            }
            if self.cluster.run(&["check", NAME, "--settle", "1s"]).0 == 0 {
                return "recovered".to_owned();
            }
            // A block that is only met when it is read: the answer is an error, and `vasto check` names the replica.
            let (_, out, err) = self.cluster.run(&["check", NAME, "--settle", "1s"]);
            unread = if (out + &err).contains("could not be read") { unread + 1 } else { 0 };
            if unread == 3 {
                return format!("unreadable: {err}");
            }
            assert!(Instant::now() < deadline, "{store} neither recovers nor reports; {mine}\n{}", self.cluster.tail());
        }
    }
}

/// The n-th write: puts, deletes, adds and appends over some thousand keys, each written once in a batch of 500.
fn operation(n: u32) -> (Bytes, history::Op) {
    let (kind, key) = (n % 4, (n / 4) % 250);
    match kind {
        0 => (format!("counter/{key}").into(), history::Op::Add(f64::from(1 + n % 9))),
        1 => (format!("list/{key}").into(), history::Op::Append(format!("{n}\n").into())),
        _ if n.is_multiple_of(11) => (format!("register/{}", n % 2000).into(), history::Op::Delete),
        _ => {
            (format!("register/{}", n % 2000).into(), history::Op::Put(Bytes::from(format!("{n};").repeat(50)).into()))
        }
    }
}

fn is_of(key: &[u8], at: &At) -> bool {
    use vasto_client::hash::{jump_hash, partition_hash};
    jump_hash(partition_hash(key), at.shards) == at.shard
}

/// A key of this replica's shard.
fn owned(base: &str, at: &At) -> Bytes {
    (0..).map(|i| Bytes::from(format!("{base}/{i}"))).find(|key| is_of(key, at)).unwrap()
}

async fn connected(at: &At) -> Pinned {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Pinned::connect(&vasto_client::Env::real(), at.clone(), PATIENCE).await {
            Ok(pinned) => return pinned,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error:#}", at.address),
        }
    }
}

/// Writes until the store, which may have to learn the topology first, takes it.
async fn taken(pinned: &mut Pinned, key: Bytes, kind: operation::Kind) -> Stamp {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let answers = pinned.ask(vec![(key.clone(), kind.clone())], None).await.unwrap();
        match &answers[..] {
            [answer::Result::Written(written)] => return written.stamp.map(Stamp::from).unwrap_or_default(),
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn files(database: &Path, ending: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(database).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<PathBuf> = all.filter(|p| p.extension().is_some_and(|e| e == ending)).collect();
    found.sort_by_key(|p| fs::metadata(p).unwrap().len());
    found
}

fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..].iter_mut().take(64).for_each(|b| *b ^= 0x5a);
    fs::write(file, bytes).unwrap();
}

/// Both stores have all, partly in sorted files if `sorted`; store-1 is killed, `harm` strikes its databases, it starts again, and writers never notice.
async fn survives(sorted: bool, harm: impl Fn(&Path)) -> String {
    let mut damage = Damage::new().await;
    damage.write(3_000).await;
    if sorted {
        let (code, out, err) = damage.cluster.run(&["keyspace", "compact", NAME]);
        assert_eq!(code, 0, "{out}{err}");
    }
    // From here on the log has what no sorted file has yet.
    damage.write(1_500).await;
    damage.write_through("store-1", 100).await;
    damage.equal().await;
    damage.cluster.kill_store("store-1");
    damage.databases("store-1").iter().for_each(|database| harm(database));
    damage.cluster.start_store("store-1");
    damage.write(1_000).await;
    let (answered, failed) = damage.never_wrong("store-1").await;
    let outcome = damage.outcome("store-1").await;
    damage.never_wrong("store-1").await;
    damage.write(1_000).await;
    if outcome == "recovered" {
        // Another replica may have been found damaged since, and `check` compares only those that serve.
        damage.cluster.settled(NAME, 2, 2, 40).await;
        damage.write_through("store-1", 50).await;
        damage.equal().await;
    }
    let violations = damage.violations().await;
    assert!(violations.is_empty(), "{} wrong, first: {}", violations.len(), violations[0]);
    println!("{outcome}; at once {answered} answers and {failed} failures");
    outcome
}

fn tear(database: &Path) {
    for log in files(database, "log") {
        let length = fs::metadata(&log).unwrap().len();
        fs::File::options().write(true).open(&log).unwrap().set_len(length / 2).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bytes_in_a_sorted_file_are_never_read_as_data() {
    survives(true, |database| files(database, "sst").last().into_iter().for_each(|file| flip(file))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_sorted_file_is_noticed() {
    let remove = |file: &PathBuf| fs::remove_file(file).unwrap();
    survives(true, |database| files(database, "sst").last().into_iter().for_each(remove)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_torn_log_lost_comes_back_from_the_peer() {
    assert_eq!(survives(false, tear).await, "recovered");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_log_lost_after_flipped_bytes_comes_back_from_the_peer() {
    assert_eq!(survives(false, |database| files(database, "log").iter().for_each(|log| flip(log))).await, "recovered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_ends_before_the_sorted_files_is_noticed() {
    survives(true, tear).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_manifest_is_noticed() {
    survives(true, |database| {
        for file in fs::read_dir(database).unwrap().map(|e| e.unwrap().path()) {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            if name == "CURRENT" || name.starts_with("MANIFEST") {
                fs::remove_file(file).unwrap();
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_folder_is_refused_and_harms_nothing() {
    let mut damage = Damage::new().await;
    damage.write(1_000).await;
    damage.equal().await;
    damage.cluster.kill_store("store-1");
    let data = damage.cluster.path().join("store-1");
    // In a mount namespace of its own; needs no root where user namespaces are allowed.
    let script = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && \
                  exec \"$0\" --operator \"$2\" store --name store-1 --data \"$1\" --listen \"$3\"";
    let flags = if nix::unistd::Uid::effective().is_root() { "-m" } else { "-rm" };
    let mut child = Command::new("unshare")
        .args([flags, "sh", "-c", script])
        .arg(vasto())
        .arg(&data)
        .args([damage.cluster.operator_address(), damage.cluster.store_address("store-1")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(damage.cluster.path().join("read-only.log")).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("a store on a read-only folder goes on\n{}", damage.cluster.tail());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let words = fs::read_to_string(damage.cluster.path().join("read-only.log")).unwrap();
    assert!(!ended.success() && words.contains("ead-only"), "{ended}: {words}");
    damage.write(500).await;
    damage.cluster.start_store("store-1");
    damage.equal().await;
    let violations = damage.violations().await;
    assert!(violations.is_empty(), "{} wrong, first: {}", violations.len(), violations[0]);
}
