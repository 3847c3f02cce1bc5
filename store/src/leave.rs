//! How a store leaves: it takes no more writes, so that clients go to the next
//! replicas at once, goes on serving all else, and waits a while for its
//! followers to have, synced, what only it may have.

use std::time::Duration;

use tokio::time::Instant;

use crate::host::Host;

/// A follower that takes longer than this is not waited for: what it lacks, it gets when the store is back.
const LONGEST: Duration = Duration::from_secs(5);

/// Refuses writes from here on, then waits until every follower with an open stream has confirmed
/// what there was until then. Takes no time where nobody follows or nobody is behind.
pub async fn hand_over(host: &Host) {
    host.leave();
    let begin = Instant::now();
    let replicas = host.replicas();
    let all = async {
        // Later changes come from peers, which have them themselves.
        let ends = futures::future::join_all(replicas.iter().map(|r| r.refuse_writes())).await;
        let waits = replicas.iter().zip(ends).map(|(replica, end)| replica.progress.handed_on(end));
        futures::future::join_all(waits).await;
    };
    if tokio::time::timeout(LONGEST, all).await.is_err() {
        tracing::warn!("not all followers have confirmed what this store has within {LONGEST:?}; it stops now");
    }
    tracing::info!(took = ?begin.elapsed(), "handed over");
}
