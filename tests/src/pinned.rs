//! A caller of one store by hand, over the wire and without the client library: so
//! a test knows which replica answers, and can ask each one for what it holds.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::store_client::StoreClient;
use vasto_client::v1::{
    Append, Batch, Delete, FailureCode, Get, Merge, MergeKind, Operation, Put, Value, answer, operation, put, value,
};
use vasto_client::{Data, Env, Keyspace, Stamp};

use crate::history::{Event, Op, Outcome, Seen};

/// How many operations one message carries.
const TOGETHER: usize = 200;

/// Where a replica is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// The keyspace's uid.
    pub uid: String,
    /// The replica's shard.
    pub shard: u32,
    /// Of so many.
    pub shards: u32,
    /// Its id.
    pub replica: u64,
    /// `host:port` of its store.
    pub address: String,
}

/// A stream to one store.
pub struct Pinned {
    at: At,
    sender: mpsc::Sender<Batch>,
    answers: Streaming<Batch>,
    next: u64,
    /// How long an answer may take.
    patience: Duration,
}

impl Pinned {
    /// Connects.
    pub async fn connect(env: &Env, at: At, patience: Duration) -> anyhow::Result<Self> {
        let (sender, receiver) = mpsc::channel(4);
        let opened = async {
            let channel = env.dial(&at.address)?;
            Ok::<_, anyhow::Error>(StoreClient::new(channel).pipe(ReceiverStream::new(receiver)).await?.into_inner())
        };
        let opened = tokio::time::timeout(patience, opened).await;
        let answers = opened.with_context(|| format!("{} does not answer", at.address))??;
        Ok(Self { at, sender, answers, next: 1, patience })
    }

    /// Asks for these operations on keys, and waits for all answers.
    pub async fn ask(
        &mut self,
        operations: Vec<(Bytes, operation::Kind)>,
        after: Option<Stamp>,
    ) -> anyhow::Result<Vec<answer::Result>> {
        let first = self.next;
        let count = operations.len();
        self.next += count as u64;
        let operations = (first..).zip(operations).map(|(id, (key, kind))| Operation {
            id,
            keyspace: self.at.uid.clone().into(),
            shard: self.at.shard,
            shards: self.at.shards,
            key,
            after: after.map(Into::into),
            kind: Some(kind),
            ..Operation::default()
        });
        let batch = Batch { operations: operations.collect(), answers: Vec::new() };
        let exchange = async {
            self.sender.send(batch).await.ok().context("the stream has ended")?;
            let mut results: Vec<Option<answer::Result>> = vec![None; count];
            let mut missing = count;
            while missing > 0 {
                let batch = self.answers.message().await?.context("the stream has ended")?;
                for answer in batch.answers {
                    let at = answer.id.checked_sub(first).and_then(|at| results.get_mut(at as usize));
                    let Some(place) = at else { bail!("an answer to {}, which wasn't asked", answer.id) };
                    missing -= usize::from(place.is_none());
                    *place = answer.result;
                }
            }
            Ok(results.into_iter().flatten().collect())
        };
        let waited = tokio::time::timeout(self.patience, exchange).await;
        waited.with_context(|| format!("{} does not answer", self.at.address))?
    }

    /// What the replica holds under these keys.
    pub async fn read(&mut self, keys: &[Bytes]) -> anyhow::Result<Vec<Seen>> {
        let mut found = Vec::with_capacity(keys.len());
        for keys in keys.chunks(TOGETHER) {
            let gets = keys.iter().map(|key| (key.clone(), operation::Kind::Get(Get {}))).collect();
            for (result, key) in self.ask(gets, None).await?.into_iter().zip(keys) {
                match result {
                    answer::Result::Found(value) => found.push(Some(seen(value)?)),
                    answer::Result::Missing(_) => found.push(None),
                    other => bail!("get \"{}\": {other:?}", key.escape_ascii()),
                }
            }
        }
        Ok(found)
    }
}

/// Where a key's writes can go now.
pub struct Place {
    /// Whom to ask.
    pub at: At,
    /// The store that hosts it.
    pub store: String,
}

/// One of the replicas that serve this key now, by chance.
pub fn place(keyspace: &Keyspace, key: &[u8], random: &mut StdRng) -> Option<Place> {
    let update = keyspace.topology();
    let topology = update.topology.as_ref()?;
    let view = topology.current.as_ref()?;
    let shards = view.size();
    let shard = jump_hash(partition_hash(key), shards);
    let serving: Vec<_> =
        view.shards.get(shard as usize)?.replicas.iter().filter(|a| a.serving && a.replica != 0).collect();
    let replica = serving.choose(random)?;
    let address = update.addresses.iter().find(|a| a.store == replica.store)?.address.clone();
    let at = At { uid: topology.uid.clone(), shard, shards, replica: replica.replica, address };
    Some(Place { at, store: replica.store.clone() })
}

/// Three keys of one shard under this name: a register's, a counter's and a list's.
pub fn keys_of(name: &str, at: &At) -> [Bytes; 3] {
    let owned = |key: &Bytes| jump_hash(partition_hash(key), at.shards) == at.shard;
    ["register", "counter", "list"].map(|kind| {
        let mut named = (0..).map(|i| Bytes::from(format!("{name}/{kind}/{i}")));
        named.find(owned).unwrap_or_default()
    })
}

/// A client that speaks to one replica for as long as it can, on keys that only it writes: it must see its own
/// writes, and never less than it has seen.
pub struct Turn<'a> {
    pinned: Pinned,
    client: u32,
    /// The session's greatest stamp.
    after: &'a mut Option<Stamp>,
    now: &'a (dyn Fn() -> Duration + Sync),
    record: &'a (dyn Fn(Bytes, Event) + Sync),
    /// Reads since their key's last write. A read isn't told which replica answered it, a write is; and a store
    /// that hosts several shards asks the one that a key belongs to by now.
    reads: Vec<(Bytes, Event)>,
    /// Keys whose last write the pinned replica took.
    sure: BTreeSet<Bytes>,
    /// Answers that should not be.
    pub problems: Vec<String>,
}

impl<'a> Turn<'a> {
    /// `after`: outlives the turn, as sessions do.
    pub fn new(
        pinned: Pinned,
        client: u32,
        after: &'a mut Option<Stamp>,
        now: &'a (dyn Fn() -> Duration + Sync),
        record: &'a (dyn Fn(Bytes, Event) + Sync),
    ) -> Self {
        Self { pinned, client, after, now, record, reads: Vec::new(), sure: BTreeSet::new(), problems: Vec::new() }
    }

    /// Whether it went well; if not, it is better to go elsewhere.
    pub async fn write(&mut self, key: &Bytes, op: Op) -> bool {
        let kind = match op.clone() {
            Op::Put(Data::Bytes(bytes)) => {
                operation::Kind::Put(Put { value: Some(put::Value::Bytes(bytes)), ..Put::default() })
            }
            Op::Put(Data::Number(number)) => {
                operation::Kind::Put(Put { value: Some(put::Value::Number(number)), ..Put::default() })
            }
            Op::Delete => operation::Kind::Delete(Delete { time_ms: 0 }),
            Op::Add(number) => operation::Kind::Merge(Merge { kind: MergeKind::Sum.into(), number }),
            Op::Append(bytes) => operation::Kind::Append(Append { bytes }),
            Op::Get => operation::Kind::Get(Get {}),
        };
        let invoked_at = (self.now)();
        let answer = self.pinned.ask(vec![(key.clone(), kind)], *self.after).await;
        let mut replica = None;
        let outcome = match answer.as_deref() {
            Ok([answer::Result::Written(written)]) => {
                replica = Some(written.replica);
                let stamp = written.stamp.map(Stamp::from).unwrap_or_default();
                *self.after = (*self.after).max(Some(stamp));
                Outcome::Acknowledged(stamp)
            }
            Ok([answer::Result::Failure(failure)]) if failure.code() != FailureCode::Internal => Outcome::Refused,
            _ => Outcome::Unknown,
        };
        let good = replica == Some(self.pinned.at.replica);
        if good {
            self.settle(Some((key, replica)));
        }
        let returned_at = (self.now)();
        let client = self.client;
        (self.record)(key.clone(), Event { client, op, invoked_at, returned_at, replica, outcome });
        good
    }

    /// Whether it went well, as with `write`.
    pub async fn read(&mut self, keys: &[Bytes]) -> bool {
        let invoked_at = (self.now)();
        let gets = keys.iter().map(|key| (key.clone(), operation::Kind::Get(Get {}))).collect();
        let Ok(answers) = self.pinned.ask(gets, None).await else { return false };
        let returned_at = (self.now)();
        for (key, answer) in keys.iter().zip(answers) {
            let found = match answer {
                answer::Result::Found(value) => match seen(value) {
                    Ok(found) => Some(found),
                    Err(error) => {
                        self.problems.push(error.to_string());
                        return false;
                    }
                },
                answer::Result::Missing(_) => None,
                _ => return false,
            };
            let outcome = Outcome::Read(found);
            let (client, replica) = (self.client, None);
            self.reads.push((key.clone(), Event { client, op: Op::Get, invoked_at, returned_at, replica, outcome }));
        }
        true
    }

    /// Records the reads after the last write: whoever answered them.
    pub fn end(mut self) {
        self.settle(None);
    }

    /// Records reads: those of a key between two writes that the same replica took were answered by it too;
    /// without a key all that are left, whoever answered.
    fn settle(&mut self, written: Option<(&Bytes, Option<u64>)>) {
        let reads = std::mem::take(&mut self.reads);
        for (key, event) in reads {
            match written {
                Some((of, _)) if *of != key => self.reads.push((key, event)),
                Some((_, replica)) if self.sure.contains(&key) => (self.record)(key, Event { replica, ..event }),
                _ => (self.record)(key, event),
            }
        }
        self.sure.extend(written.map(|(key, _)| key.clone()));
    }
}

/// A value as the history has it.
pub fn seen(found: Value) -> anyhow::Result<(Data, Stamp)> {
    let stamp = found.stamp.context("a value without a stamp")?.into();
    match found.value {
        Some(value::Value::Bytes(bytes)) => Ok((Data::Bytes(bytes), stamp)),
        Some(value::Value::Number(number)) => Ok((Data::Number(number), stamp)),
        None => bail!("a value of no kind"),
    }
}
