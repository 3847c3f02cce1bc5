//! A caller of one store by hand, over the wire and without the client library: so
//! a test knows which replica answers, and can ask each one for what it holds.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use vasto_client::v1::store_client::StoreClient;
use vasto_client::v1::{Batch, Get, Operation, Value, answer, operation, value};
use vasto_client::{Data, Stamp, env};

use crate::history::Seen;

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
    pub async fn connect(at: At, patience: Duration) -> anyhow::Result<Self> {
        let (sender, receiver) = mpsc::channel(4);
        let opened = async {
            let channel = env::endpoint(&at.address)?.connect().await?;
            Ok::<_, anyhow::Error>(StoreClient::new(channel).pipe(ReceiverStream::new(receiver)).await?.into_inner())
        };
        let opened = tokio::time::timeout(patience, opened).await;
        let answers = opened.with_context(|| format!("{} does not answer", at.address))??;
        Ok(Self { at, sender, answers, next: 1, patience })
    }

    /// Whom it asks.
    pub fn at(&self) -> &At {
        &self.at
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
            keyspace: self.at.uid.clone(),
            shard: self.at.shard,
            shards: self.at.shards,
            key,
            partition_key: None,
            after: after.map(Into::into),
            kind: Some(kind),
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

/// A value as the history has it.
pub fn seen(found: Value) -> anyhow::Result<(Data, Stamp)> {
    let stamp = found.stamp.context("a value without a stamp")?.into();
    match found.value {
        Some(value::Value::Bytes(bytes)) => Ok((Data::Bytes(bytes), stamp)),
        Some(value::Value::Number(number)) => Ok((Data::Number(number), stamp)),
        None => bail!("a value of no kind"),
    }
}
