//! The store's line to the operator: its whole state up, the topologies that
//! concern it down. Everything goes on while the operator is away.

use std::collections::BTreeMap;
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

/// The pause after a first failure; each further one doubles it.
const SHORTEST: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(1);
/// How long a store that stops waits for an operator to hear of it.
const LAST_WORD: Duration = Duration::from_millis(500);
/// Where an operator that does not lead sends its stores: `host:port`.
const LEADER: &str = "vasto-leader";

/// Which operator is called next, and when.
struct Line {
    operator: String,
    /// Where the last one called, which does not lead, has sent this store.
    leader: Option<String>,
    wait: Duration,
}

impl Line {
    fn new(operator: String) -> Self {
        Self { operator, leader: None, wait: SHORTEST }
    }

    fn address(&self) -> &str {
        self.leader.as_deref().unwrap_or(&self.operator)
    }

    /// A call has ended. `taken`: reports were taken on it; `leader`: where it sent this store.
    /// Returns how long to pause (to be jittered) before the next one; zero: call at once.
    ///
    /// A leader is called at once, but one that sends on only after a pause: two that take each other
    /// for the leader must not keep a store busy. Whatever else goes wrong, the next call is to the
    /// operator's own address.
    fn ended(&mut self, taken: bool, leader: Option<String>) -> Duration {
        let sent_before = std::mem::replace(&mut self.leader, leader).is_some();
        if taken {
            self.wait = SHORTEST;
        }
        if self.leader.is_some() && !sent_before {
            return Duration::ZERO;
        }
        let pause = self.wait;
        self.wait = (self.wait * 2).min(LONGEST);
        pause
    }
}

fn leader(status: &Status) -> Option<String> {
    let address = status.metadata().get(LEADER).filter(|_| status.code() == tonic::Code::Unavailable)?;
    address.to_str().ok().map(str::to_owned)
}

/// Reports until the process stops.
pub async fn run(host: Arc<Host>, env: Env, operator: String, stop: CancellationToken) {
    let mut line = Line::new(operator);
    let mut away = false;
    while !stop.is_cancelled() {
        let ended = once(&host, &env, line.address(), &stop).await;
        let taken = host.is_connected();
        host.set_connected(false);
        if stop.is_cancelled() {
            return;
        }
        let operator = line.address().to_owned();
        away &= !taken;
        let status = ended.err().unwrap_or_else(|| Status::unavailable("it ended the stream"));
        let sent_to = leader(&status);
        if matches!(status.code(), tonic::Code::AlreadyExists | tonic::Code::InvalidArgument) {
            tracing::error!(operator, message = status.message(), "the operator refuses this store");
        }
        match &sent_to {
            Some(leader) => tracing::info!(operator, leader, "this operator does not lead"),
            None if !away => {
                tracing::warn!(operator, error = status.message(), "the operator is away; going on with what is known");
                away = true;
            }
            None => {}
        }
        let pause = line.ended(taken, sent_to);
        if !pause.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(env.jitter(pause)) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

/// One call to an operator, from its making to its end; the host knows while reports are taken.
async fn once(host: &Arc<Host>, env: &Env, operator: &str, stop: &CancellationToken) -> Result<(), Status> {
    let channel = env.dial(operator).map_err(|e| Status::unavailable(e.to_string()))?;
    let mut client = OperatorClient::new(channel)
        .max_decoding_message_size(crate::MESSAGE_LIMIT)
        .max_encoding_message_size(crate::MESSAGE_LIMIT);
    let (send, receive) = mpsc::channel(1);
    let mut told = BTreeMap::new();
    let first = strip(host.report(), &mut told);
    let _ = send.send(first).await;
    let given_up = async {
        stop.cancelled().await;
        tokio::time::sleep(LAST_WORD).await;
    };
    let mut updates = tokio::select! {
        taken = client.report(ReceiverStream::new(receive)) => taken?.into_inner(),
        () = given_up => return Ok(()),
    };
    tracing::info!(operator, "reporting");
    host.set_connected(true);
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
                // The operator ends its side once it has heard; what it says until then comes too late.
                let heard = async { while let Some(Ok(_)) = updates.next().await {} };
                let _ = tokio::time::timeout(LAST_WORD, heard).await;
                return Ok(());
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
fn strip(mut report: StoreReport, told: &mut BTreeMap<String, u64>) -> StoreReport {
    for keyspace in &mut report.keyspaces {
        let version = keyspace.topology.as_ref().map_or(0, |t| t.version);
        if told.insert(keyspace.uid.clone(), version) == Some(version) {
            keyspace.topology = None;
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_is_called_at_once_and_whatever_fails_leads_back() {
        let mut line = Line::new("service:1".into());
        assert_eq!(line.address(), "service:1");
        assert_eq!(line.ended(false, Some("a:1".into())), Duration::ZERO);
        assert_eq!(line.address(), "a:1");
        assert_eq!(line.ended(false, None), SHORTEST);
        assert_eq!(line.address(), "service:1");
    }

    #[test]
    fn two_that_send_a_store_to_and_fro_are_called_with_pauses() {
        let mut line = Line::new("service:1".into());
        let to = |address: &str| Some(address.to_owned());
        assert_eq!(line.ended(false, to("a:1")), Duration::ZERO);
        assert_eq!(line.ended(false, to("b:1")), SHORTEST);
        assert_eq!(line.address(), "b:1");
        assert_eq!(line.ended(false, to("a:1")), 2 * SHORTEST);
    }

    #[test]
    fn pauses_grow_to_a_second_and_a_call_that_was_taken_ends_that() {
        let mut line = Line::new("service:1".into());
        let pauses: Vec<u128> = (0..7).map(|_| line.ended(false, None).as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1_000, 1_000]);
        assert_eq!(line.ended(true, None), SHORTEST);
    }

    #[test]
    fn only_an_operator_that_does_not_lead_sends_elsewhere() {
        let with = |code, address: &'static str| {
            let mut status = Status::new(code, "not the leader");
            status.metadata_mut().insert(LEADER, address.parse().unwrap());
            leader(&status)
        };
        assert_eq!(with(tonic::Code::Unavailable, "10.0.0.7:8278").as_deref(), Some("10.0.0.7:8278"));
        assert_eq!(with(tonic::Code::InvalidArgument, "10.0.0.7:8278"), None);
        assert_eq!(leader(&Status::unavailable("away")), None);
    }
}
