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

/// Waits until the replica must be closed: it has a fault, and it is time.
pub async fn due(keyspace: &Arc<Keyspace>, replica: &Arc<Replica>) {
    replica.progress.faulted().await;
    let mut since = None;
    loop {
        let confirmed: Vec<Option<u64>> =
            others(keyspace, replica.id).await.into_iter().map(|id| replica.progress.confirmed_by(id)).collect();
        if !confirmed.is_empty() {
            let waited = since.get_or_insert_with(Instant::now).elapsed();
            // No write comes after the fault.
            if is_time(&confirmed, replica.progress.last_seq(), waited) {
                return;
            }
        }
        tokio::time::sleep(keyspace.env().jitter(LOOK)).await;
    }
}

/// Whether to close a faulty replica, by what each sound copy has confirmed: one must be there, and have all
/// that there is, or have had the time to get it.
fn is_time(confirmed: &[Option<u64>], last_seq: u64, waited: Duration) -> bool {
    let has_all = |seq: &Option<u64>| seq.is_some_and(|seq| seq >= last_seq);
    !confirmed.is_empty() && (confirmed.iter().any(has_all) || waited >= HAND_OVER)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_copy_stays_and_another_gets_the_time_to_have_all() {
        let soon = Duration::from_secs(1);
        assert!(!is_time(&[], 7, HAND_OVER));
        assert!(!is_time(&[None, Some(6)], 7, soon));
        assert!(is_time(&[None, Some(7)], 7, soon));
        assert!(is_time(&[None], 7, HAND_OVER));
    }
}
