//! A fake store's line to the operator: its whole state up, topologies down, over real gRPC.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vasto_client::v1::operator_client::OperatorClient;

use super::Inner;

const HEARTBEAT: Duration = Duration::from_secs(1);
/// Changes that come together are told together.
const APART: Duration = Duration::from_millis(5);
const AGAIN: Duration = Duration::from_millis(25);
const LARGEST: usize = 64 << 20;

/// Why a stream ended.
enum End {
    /// The process is gone, or told to be silent.
    Gone,
    /// Another operator leads, perhaps this one.
    Elsewhere(Option<String>),
}

/// Reports for the process of this pod as long as it runs. `stop`: it is asked to end, and says so first.
pub(super) async fn run(inner: Arc<Inner>, pod_uid: String, operator: String, stop: CancellationToken) {
    let mut leader = None;
    let mut turn = 0;
    while let Some(silent) = inner.with(|w| w.stores.get(&pod_uid).map(|s| s.silent)) {
        let mut changed = inner.changes();
        if silent {
            let _ = tokio::time::timeout(HEARTBEAT, changed.changed()).await;
            continue;
        }
        let addresses = inner.resolve(&operator);
        let target = leader.take().or_else(|| addresses.get(turn % addresses.len().max(1)).cloned());
        turn += 1;
        if let Some(target) = target {
            match session(&inner, &pod_uid, &target, &stop).await {
                End::Gone if stop.is_cancelled() => return,
                End::Gone => {}
                End::Elsewhere(address) => leader = address,
            }
        }
        if leader.is_none() {
            tokio::time::sleep(AGAIN).await;
        }
    }
}

async fn session(inner: &Inner, pod_uid: &str, target: &str, stop: &CancellationToken) -> End {
    let Ok(channel) = inner.env.dial(target) else { return End::Elsewhere(None) };
    let mut client = OperatorClient::new(channel).max_decoding_message_size(LARGEST);
    let (send, receive) = mpsc::channel(1);
    let mut told = HashMap::new();
    let mut changed = inner.changes();
    let Some(mut last) = inner.with(|w| w.report(pod_uid, &mut told)) else { return End::Gone };
    let _ = send.send(last.clone()).await;
    let mut updates = match client.report(ReceiverStream::new(receive)).await {
        Ok(updates) => updates.into_inner(),
        Err(status) => return elsewhere(&status),
    };
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    loop {
        let mut beat = false;
        tokio::select! {
            update = updates.message() => match update {
                Ok(Some(update)) => inner.change(|w| w.install(pod_uid, update)),
                Ok(None) => return End::Elsewhere(None),
                Err(status) => return elsewhere(&status),
            },
            _ = changed.changed() => tokio::time::sleep(APART).await,
            _ = heartbeat.tick() => beat = true,
            () = stop.cancelled() => {
                inner.change(|w| if let Some(store) = w.stores.get_mut(pod_uid) { store.stopping = true });
                if let Some(report) = inner.with(|w| w.report(pod_uid, &mut told)) {
                    let _ = send.send(report).await;
                    drop(send);
                    // The operator ends its side once it has heard.
                    let _ = tokio::time::timeout(Duration::from_millis(300), async {
                        while let Ok(Some(_)) = updates.message().await {}
                    })
                    .await;
                }
                return End::Gone;
            }
        }
        changed.mark_unchanged();
        if inner.with(|w| w.stores.get(pod_uid).is_none_or(|s| s.silent)) {
            return End::Gone;
        }
        let Some(report) = inner.with(|w| w.report(pod_uid, &mut told)) else { return End::Gone };
        if beat || report != last {
            last = report.clone();
            if send.send(report).await.is_err() {
                return End::Elsewhere(None);
            }
        }
    }
}

fn elsewhere(status: &Status) -> End {
    let leader = status.metadata().get("vasto-leader").and_then(|address| address.to_str().ok());
    End::Elsewhere(leader.map(str::to_owned))
}
