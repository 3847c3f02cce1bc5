//! The store's line to the operator: its whole state up, the topologies that
//! concern it down. Everything goes on while the operator is away.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vasto_client::env::Env;
use vasto_client::v1::StoreReport;
use vasto_client::v1::operator_client::OperatorClient;

use crate::host::Host;

/// A report is sent at least this often.
const HEARTBEAT: Duration = Duration::from_millis(1_000);
/// Reports are at least this far apart.
const APART: Duration = Duration::from_millis(25);

/// Reports until the process stops.
pub async fn run(host: Arc<Host>, env: Env, operator: String, stop: CancellationToken) {
    let mut wait = Duration::from_millis(50);
    let mut away = false;
    while !stop.is_cancelled() {
        let error = match once(&host, &env, &operator, &stop).await {
            Ok(()) => "it ended the stream".to_owned(),
            Err(status) if status.code() == tonic::Code::Ok => return,
            Err(status) => {
                if matches!(status.code(), tonic::Code::AlreadyExists | tonic::Code::InvalidArgument) {
                    tracing::error!(operator, message = status.message(), "the operator refuses this store");
                }
                status.message().to_owned()
            }
        };
        if !away {
            tracing::warn!(operator, error, "the operator is away; going on with what is known");
        }
        away = true;
        tokio::select! {
            () = tokio::time::sleep(env.jitter(wait)) => {}
            () = stop.cancelled() => return,
        }
        wait = (wait * 2).min(Duration::from_secs(1));
    }
}

async fn once(host: &Arc<Host>, env: &Env, operator: &str, stop: &CancellationToken) -> Result<(), Status> {
    let channel = env.dial(operator).map_err(|e| Status::unavailable(e.to_string()))?;
    let mut client = OperatorClient::new(channel)
        .max_decoding_message_size(crate::MESSAGE_LIMIT)
        .max_encoding_message_size(crate::MESSAGE_LIMIT);
    let (send, receive) = mpsc::channel(1);
    let mut told = HashMap::new();
    let first = strip(host.report(), &mut told);
    let _ = send.send(first).await;
    let mut updates = client.report(ReceiverStream::new(receive)).await?.into_inner();
    tracing::info!(operator, "reporting");
    let changed = host.changed();
    loop {
        tokio::select! {
            update = updates.next() => match update {
                Some(update) => {
                    // Beside the reports: an install may take long, and silence would look like death.
                    for keyspace in update?.keyspaces {
                        let host = host.clone();
                        tokio::spawn(async move { host.install(keyspace).await });
                    }
                    continue;
                }
                None => return Ok(()),
            },
            () = changed.notified() => tokio::time::sleep(APART).await,
            () = tokio::time::sleep(HEARTBEAT) => {}
            () = stop.cancelled() => {
                let last = StoreReport { stopping: true, ..strip(host.report(), &mut told) };
                let _ = send.send(last).await;
                drop(send);
                // The operator ends its side once it has heard.
                let _ = tokio::time::timeout(Duration::from_millis(500), updates.next()).await;
                return Err(Status::ok("stopped"));
            }
        }
        let report = strip(host.report(), &mut told);
        tokio::select! {
            sent = send.send(report) => if sent.is_err() { return Ok(()) },
            () = stop.cancelled() => {}
        }
    }
}

/// Leaves out the topologies that the operator was sent before on this stream.
fn strip(mut report: StoreReport, told: &mut HashMap<String, u64>) -> StoreReport {
    for keyspace in &mut report.keyspaces {
        let version = keyspace.topology.as_ref().map_or(0, |t| t.version);
        if told.insert(keyspace.uid.clone(), version) == Some(version) {
            keyspace.topology = None;
        }
    }
    report
}
