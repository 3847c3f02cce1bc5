//! When a damaged replica is closed: it takes no more writes already; it is read
//! and followed on until another copy has what can still be read of it, and
//! for good where there is no other copy.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vasto_client::v1::peer_client::PeerClient;
use vasto_client::v1::{SoundRequest, View};

use crate::keyspace::Keyspace;
use crate::replica::Replica;

/// How long others have to take what only this replica has: what they can't read by then, they never can.
const HAND_OVER: Duration = Duration::from_secs(10);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// The longest that one answer is waited for.
const ANSWER: Duration = Duration::from_secs(2);

/// Waits until the replica must be closed: it has a fault, another copy of its shard serves,
/// and one that does has all that this one has, or has had the time to get it.
pub async fn due(keyspace: &Arc<Keyspace>, replica: &Arc<Replica>) {
    replica.progress.faulted().await;
    let mut until = None;
    loop {
        let sound = others(keyspace, replica.id).await;
        // No write comes after the fault.
        let last = replica.progress.last_seq();
        let handed_over = |id: &u64| replica.progress.confirmed_by(*id).is_some_and(|seq| seq >= last);
        if !sound.is_empty() {
            let until = *until.get_or_insert_with(|| Instant::now() + HAND_OVER);
            if sound.iter().any(handed_over) || Instant::now() >= until {
                return;
            }
        }
        tokio::time::sleep(keyspace.env().jitter(LOOK)).await;
    }
}

/// The other serving replicas of this one's shard that say of themselves that they are sound.
async fn others(keyspace: &Keyspace, replica: u64) -> Vec<u64> {
    let topology = keyspace.topology();
    let shard = topology.current.as_ref().and_then(|v| v.place(replica)).map(|p| p.shard);
    let places = topology.current.iter().flat_map(View::places).filter(|p| {
        Some(p.shard) == shard && p.assignment.serving && p.assignment.replica != 0 && p.assignment.replica != replica
    });
    let mut sound = Vec::new();
    for place in places {
        if is_sound(keyspace, &place.assignment.store, place.assignment.replica).await {
            sound.push(place.assignment.replica);
        }
    }
    sound
}

async fn is_sound(keyspace: &Keyspace, store: &str, replica: u64) -> bool {
    let Some(Ok(channel)) = keyspace.address(store).map(|address| keyspace.env().dial(&address)) else { return false };
    let request = SoundRequest { keyspace: keyspace.uid().to_owned(), replica };
    let mut client = PeerClient::new(channel);
    let answer = tokio::time::timeout(ANSWER, client.sound(request)).await;
    matches!(answer, Ok(Ok(response)) if response.get_ref().sound)
}
