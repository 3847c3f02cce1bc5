//! What the command line's `locate`, `check` and `compact` look at: where a key
//! lives, what a replica holds and lacks, and the files below.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tonic::transport::Channel;

use crate::error::{Error, describe};
use crate::hash::{jump_hash, partition_hash};
use crate::keyspace::Keyspace;
use crate::v1::store_client::StoreClient;
use crate::v1::{
    CompactRequest, HashRequest, HashResponse, InspectRequest, InspectResponse, RepairRequest, RepairResponse,
};

/// Where a key lives; see [`Keyspace::locate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// xxh64 of the partition key.
    pub hash: u64,
    /// The key's shard.
    pub shard: u32,
    /// The number of shards.
    pub shards: u32,
    /// Who holds the shard, in order of preference.
    pub stores: Vec<LocatedStore>,
}

/// A store that holds a key's shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatedStore {
    /// The store's name.
    pub store: String,
    /// `host:port`, where it is known.
    pub address: Option<String>,
    /// The replica's id. 0: vacant.
    pub replica: u64,
    /// Whether clients are sent there.
    pub serving: bool,
}

/// What compacting came to on one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// The store's name.
    pub store: String,
    /// Bytes of its files before.
    pub bytes_before: u64,
    /// Bytes of its files after.
    pub bytes_after: u64,
}

/// Every record of a replica with its hash; see [`Keyspace::inspect`].
pub struct Inspection {
    responses: Pin<Box<dyn Stream<Item = Result<InspectResponse, Error>> + Send>>,
}

impl Inspection {
    /// The next records, for those who have no `StreamExt` at hand.
    pub async fn next(&mut self) -> Option<Result<InspectResponse, Error>> {
        self.responses.next().await
    }
}

impl Stream for Inspection {
    type Item = Result<InspectResponse, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.responses.as_mut().poll_next(cx)
    }
}

/// The store that has a replica.
struct Whose<R> {
    client: StoreClient<Channel>,
    keyspace: String,
    /// What a refusal of it means.
    refused: R,
}

impl Keyspace {
    /// The shard of a partition key (a key, unless it has one of its own) and the stores that hold it.
    ///
    /// ```no_run
    /// # fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// println!("bash is in shard {}", map.locate("bash")?.shard);
    /// # Ok(())
    /// # }
    /// ```
    pub fn locate(&self, partition_key: impl AsRef<[u8]>) -> Result<Located, Error> {
        let wired = self.shared.wired()?;
        let hash = partition_hash(partition_key.as_ref());
        let view = wired.update.topology.as_ref().and_then(|t| t.current.as_ref());
        let shards = view.map_or(0, |view| view.size());
        let shard = jump_hash(hash, shards);
        let Some(replicas) = view.and_then(|view| view.shards.get(shard as usize)) else {
            let what = format!("locate a key in keyspace {:?}", self.name());
            return Err(Error::Unavailable { what, last: wired.nobody(None) });
        };
        let stores = replicas.replicas.iter().map(|a| LocatedStore {
            store: a.store.clone(),
            address: self.address(&a.store),
            replica: a.replica,
            serving: a.serving,
        });
        Ok(Located { hash, shard, shards, stores: stores.collect() })
    }

    /// Every record of one replica with its hash, in key order, for comparing replicas.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// for store in map.locate("bash")?.stores {
    ///     let mut records = map.inspect(store.replica, None).await?;
    ///     while let Some(some) = records.next().await {
    ///         println!("{} more on {}", some?.entries.len(), store.store);
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn inspect(&self, replica: u64, after: Option<Bytes>) -> Result<Inspection, Error> {
        let Whose { mut client, keyspace, refused } = self.whose("inspect", replica)?;
        let request = InspectRequest { keyspace, replica, after };
        let responses = client.inspect(request).await.map_err(&refused)?.into_inner();
        Ok(Inspection { responses: Box::pin(responses.map(move |r| r.map_err(&refused))) })
    }

    /// How many records of its shard one replica holds, and their hash: equal on all replicas of a shard
    /// once nothing is on its way. What has expired by `now_ms` or is deleted does not count. Reads all of it.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace, now_ms: u64) -> Result<(), vasto_client::Error> {
    /// for store in map.locate("bash")?.stores {
    ///     println!("{}: {:016x}", store.store, map.content_hash(store.replica, now_ms).await?.hash);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn content_hash(&self, replica: u64, now_ms: u64) -> Result<HashResponse, Error> {
        let Whose { mut client, keyspace, refused } = self.whose("hash", replica)?;
        let hashed = client.hash(HashRequest { keyspace, replica, now_ms }).await;
        hashed.map(tonic::Response::into_inner).map_err(refused)
    }

    /// Compares one replica with each other of its shard now, and has it join in what it lacks. Answers when
    /// that is done; `tell` is told the totals on the way.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// for store in map.locate("bash")?.stores {
    ///     let done = map.repair(store.replica, |_| ()).await?;
    ///     println!("{}: {} records mended", store.store, done.records);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn repair(&self, replica: u64, mut tell: impl FnMut(&RepairResponse)) -> Result<RepairResponse, Error> {
        let Whose { mut client, keyspace, refused } = self.whose("repair", replica)?;
        let responses = client.repair(RepairRequest { keyspace, replica }).await;
        let mut responses = responses.map_err(&refused)?.into_inner();
        let mut last = None;
        while let Some(totals) = responses.next().await {
            tell(last.insert(totals.map_err(&refused)?));
        }
        last.ok_or_else(|| refused(tonic::Status::unavailable("it ended before it answered")))
    }

    /// A client of the store that has this replica.
    fn whose(
        &self,
        verb: &str,
        replica: u64,
    ) -> Result<Whose<impl Fn(tonic::Status) -> Error + Send + 'static>, Error> {
        let wired = self.shared.wired()?;
        let what = format!("{verb} replica {replica:016x} of keyspace {:?}", self.name());
        let unavailable = |last: String| Error::Unavailable { what: what.clone(), last };
        let place = wired.update.topology.as_ref().and_then(|t| t.views().find_map(|view| view.place(replica)));
        let store = match place {
            Some(place) => place.assignment.store.clone(),
            None => return Err(Error::Invalid(format!("{what}: the topology names no such replica"))),
        };
        let address = self.address(&store);
        let address = address.ok_or_else(|| unavailable(format!("the address of {store} is not known")))?;
        let client = self.client().pool().link(&address).bulk().map_err(unavailable)?;
        let refused = move |status: tonic::Status| Error::Unavailable {
            what: what.clone(),
            last: format!("{store}: {}", describe(&status)),
        };
        Ok(Whose { client, keyspace: wired.uid(), refused })
    }

    /// Compacts the keyspace's files on all its stores; answers when all are done.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// for done in map.compact().await? {
    ///     println!("{}: {} -> {} bytes", done.store, done.bytes_before, done.bytes_after);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn compact(&self) -> Result<Vec<Compacted>, Error> {
        let wired = self.shared.wired()?;
        let stores = wired.update.topology.iter().flat_map(|t| t.stores());
        let compactions = stores.map(|store| {
            let wired = &wired;
            async move {
                let what = format!("compact keyspace {:?} on {store}", self.name());
                let unavailable = |last: String| Error::Unavailable { what: what.clone(), last };
                let address = self.address(store);
                let address = address.ok_or_else(|| unavailable("its address is not known".into()))?;
                let mut client = self.client().pool().link(&address).bulk().map_err(unavailable)?;
                let request = CompactRequest { keyspace: wired.uid() };
                let done = client.compact(request).await.map_err(|s| unavailable(describe(&s)))?.into_inner();
                let (bytes_before, bytes_after) = (done.bytes_before, done.bytes_after);
                Ok(Compacted { store: store.to_string(), bytes_before, bytes_after })
            }
        });
        futures::future::try_join_all(compactions).await
    }

    fn address(&self, store: &str) -> Option<String> {
        let latest = self.topology();
        let found = latest.addresses.iter().find(|a| a.store == store && !a.address.is_empty());
        found.map(|a| a.address.clone())
    }
}
