//! Clean up: deleting the keys that a replica no longer owns, once they have
//! been drained. Plain deletes, without lines in `changes`, at a bounded rate.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use vasto_client::v1::Topology;

use crate::engine;
use crate::keyspace::Keyspace;
use crate::record::glance;
use crate::replica::Replica;

/// Keys deleted in one batch.
const BATCH: usize = 1_000;
/// Rows looked at before the thread is given back.
const LOOK: usize = 50_000;
/// Rest between batches: at most 100,000 deletes a second.
const REST: Duration = Duration::from_millis(10);

/// Deletes every foreign key, then notes that this change is cleaned.
pub async fn run(keyspace: &Arc<Keyspace>, replica: &Arc<Replica>, topology: &Arc<Topology>) {
    let mut after: Option<Bytes> = None;
    replica.progress.set_todo(replica.engine.estimate().0);
    loop {
        // A later change may have given the replica other keys: this clean-up is then over.
        if keyspace.with_topology(|t| t.switch_version != topology.switch_version).unwrap_or(true) {
            return;
        }
        let (reading, topology_now, from) = (replica.clone(), topology.clone(), after.clone());
        let found = keyspace.env().blocking_behind(move || foreign(&reading, &topology_now, from.as_deref())).await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::error!(replica = replica.id, %error, "clean-up can't read");
                replica.progress.poison(error.to_string());
                return;
            }
            Err(_) => return,
        };
        replica.progress.set_todo(replica.progress.todo().saturating_sub(found.looked as u64));
        if !found.keys.is_empty()
            && let Err(refused) = replica.clean(found.keys).await
        {
            tracing::info!(replica = replica.id, why = refused.message, "clean-up waits");
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        match found.last {
            Some(last) => after = Some(last),
            None => break,
        }
        tokio::time::sleep(REST).await;
    }
    replica.progress.set_todo(0);
    replica.cleaned(topology.switch_version).await;
}

struct Found {
    keys: Vec<Bytes>,
    looked: usize,
    /// Where to go on; `None`: the end.
    last: Option<Bytes>,
}

fn foreign(replica: &Replica, topology: &Topology, after: Option<&[u8]>) -> Result<Found, engine::Error> {
    let mut found = Found { keys: Vec::new(), looked: 0, last: None };
    let place = topology.current.as_ref().and_then(|v| v.place(replica.id));
    // A pin, so that a walk over everything does not push what clients read out of the cache.
    replica.engine.pin().rows(after, |key, _, encoded| {
        found.looked += 1;
        let foreign = match (glance(encoded), place) {
            (Ok(seen), Some(place)) => !place.owns(seen.partition_hash),
            _ => false,
        };
        if foreign {
            found.keys.push(Bytes::copy_from_slice(key));
        }
        let more = found.keys.len() < BATCH && found.looked < LOOK;
        if !more {
            found.last = Some(Bytes::copy_from_slice(key));
        }
        more
    })?;
    Ok(found)
}
