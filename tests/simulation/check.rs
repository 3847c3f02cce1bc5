//! The look at the end: what each key reads as, and whether all replicas are the same.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use vasto_client::{Client, Op};
use vasto_tests::history::{self, Fault, Finals, History};

use crate::world::{NAME, seen};

/// How long replicas have to become the same.
const EQUAL_WITHIN: Duration = Duration::from_secs(30);

/// Reads everything; what is wrong with it, or with what was read before. `skewed`: clocks are apart.
pub async fn check(client: &Client, history: &History, skewed: bool) -> Result<(), String> {
    let keyspace = client.keyspace(NAME).await.map_err(|e| e.to_string())?;
    let deadline = tokio::time::Instant::now() + EQUAL_WITHIN;
    loop {
        match equal(&keyspace).await {
            Ok(()) => break,
            Err(differs) if tokio::time::Instant::now() > deadline => {
                return Err(format!("replicas do not become the same: {differs}"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
    let mut finals = Finals::new();
    let answers = keyspace.batch(history.keys.keys().map(|key| Op::get(key.clone()))).await;
    for (key, answer) in history.keys.keys().zip(answers) {
        finals.insert(key.clone(), seen(answer.map_err(|e| e.to_string())?));
    }
    let violations = history::check(history, &finals).into_iter();
    // A put that was tried again may have been executed before, by a clock that was ahead: not promised.
    let violations = violations.filter(|violation| !skewed || violation.fault != Fault::Undone);
    let violations: Vec<String> = violations.map(|violation| violation.to_string()).collect();
    if violations.is_empty() { Ok(()) } else { Err(violations.join("\n")) }
}

/// Whether all replicas of each shard hold the same, but for what each may drop when it likes.
async fn equal(keyspace: &vasto_client::Keyspace) -> Result<(), String> {
    let update = keyspace.topology();
    let view = update.topology.as_ref().and_then(|t| t.current.as_ref()).ok_or("no topology")?;
    for (shard, places) in view.shards.iter().enumerate() {
        let mut copies: BTreeMap<Bytes, Vec<Option<(u64, bool)>>> = BTreeMap::new();
        let count = places.replicas.len();
        for (at, place) in places.replicas.iter().enumerate() {
            let what = |e: vasto_client::Error| format!("shard {shard} on {}: {e}", place.store);
            let mut inspection = keyspace.inspect(place.replica, None).await.map_err(what)?;
            while let Some(part) = inspection.next().await {
                for entry in part.map_err(what)?.entries {
                    copies.entry(entry.key).or_insert_with(|| vec![None; count])[at] =
                        Some((entry.hash, entry.collectable));
                }
            }
        }
        for (key, copies) in copies {
            if copies.iter().flatten().all(|(_, collectable)| *collectable) {
                continue;
            }
            if copies.iter().any(|copy| *copy != copies[0]) {
                return Err(format!("shard {shard}: {} is {copies:?}", key.escape_ascii()));
            }
        }
    }
    Ok(())
}
