//! One stream each: a watcher's and a store's. A stream is polled only when its
//! receiver has room, and then takes the latest there is: nothing queues up behind
//! a slow one, and when it is dropped everything of it goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;
use prost::bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};
use vasto_client::v1::watch_response::Event;
use vasto_client::v1::{StoreReport, WatchRequest, WatchResponse};

use super::{Hub, Inbox, Leader, SILENCE, Shown, StoreKey};

/// The next message, or for ever nothing once the other side has closed its half.
async fn heard<T>(inbound: &mut Option<Streaming<T>>) -> Result<Option<T>, Status> {
    match inbound {
        Some(stream) => stream.message().await,
        None => std::future::pending().await,
    }
}

/// This instant, or never.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn stopping() -> Status {
    Status::unavailable("the operator is stopping; try again")
}

/// The refusal of a report, if another operator takes reports.
fn elsewhere(leader: &Leader) -> Option<Status> {
    let Leader::Elsewhere(address) = leader else { return None };
    let mut status = Status::unavailable("another operator leads: reports go there");
    if let Some(address) = address.as_ref().and_then(|a| a.parse().ok()) {
        status.metadata_mut().insert("vasto-leader", address);
    }
    Some(status)
}

/// A client's stream.
pub(super) struct Watching {
    hub: Hub,
    id: u64,
    inbound: Option<Streaming<WatchRequest>>,
    inbox: Arc<Inbox>,
    /// Uid -> the greatest version that the watcher said it knows.
    known: BTreeMap<String, u64>,
    ended: bool,
}

impl Watching {
    pub(super) fn begin(hub: Hub, inbound: Streaming<WatchRequest>) -> Result<Self, Status> {
        let (id, inbox) = hub.enter()?;
        Ok(Self { hub, id, inbound: Some(inbound), inbox, known: BTreeMap::new(), ended: false })
    }

    /// For `stream::unfold`: the next answer.
    pub(super) async fn next(mut self) -> Option<(Result<Bytes, Status>, Self)> {
        if self.ended {
            return None;
        }
        let answer = self.answer().await?;
        self.ended = answer.is_err();
        Some((answer, self))
    }

    async fn answer(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            tokio::select! {
                biased;
                () = self.hub.stop().cancelled() => return Some(Err(stopping())),
                request = heard(&mut self.inbound) => match request {
                    Ok(Some(request)) => {
                        if let Err(status) = self.take(request) {
                            return Some(Err(status));
                        }
                    }
                    Ok(None) => self.inbound = None,
                    // The watcher has gone.
                    Err(_) => return None,
                },
                (name, shown) = self.inbox.next() => {
                    if let Some(bytes) = self.encoded(&name, shown) {
                        return Some(Ok(bytes));
                    }
                }
            }
        }
    }

    fn take(&mut self, request: WatchRequest) -> Result<(), Status> {
        for known in &request.known {
            match self.known.get_mut(&known.uid) {
                Some(version) => *version = known.version.max(*version),
                None => _ = self.known.insert(known.uid.clone(), known.version),
            }
        }
        self.hub.heard_from_watcher(self.id, request)
    }

    fn encoded(&self, name: &str, shown: Shown) -> Option<Bytes> {
        match shown {
            Shown::Pending => None,
            Shown::Missing => {
                let event = Some(Event::Missing(name.to_owned()));
                Some(WatchResponse { event, receipt_ms: 0 }.encode_to_vec().into())
            }
            // Older than what the watcher has from elsewhere: of no use to it. The
            // same version is sent, since addresses may be news.
            Shown::Update(update) if self.known.get(&update.uid).is_some_and(|v| *v > update.version) => None,
            Shown::Update(update) => Some(update.bytes.clone()),
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.hub.leave(self.id);
    }
}

/// A store's stream.
pub(super) struct Reporting {
    hub: Hub,
    id: u64,
    inbound: Option<Streaming<StoreReport>>,
    /// Known from the first report.
    store: Option<StoreKey>,
    leader: watch::Receiver<Leader>,
    changed: watch::Receiver<u64>,
    /// Uid -> the serial of what was sent last.
    sent: BTreeMap<String, u64>,
    /// When the driver is told that the store is silent; `None` once it was.
    silent_at: Option<Instant>,
    ended: bool,
}

impl Reporting {
    pub(super) fn begin(hub: Hub, inbound: Streaming<StoreReport>) -> Result<Self, Status> {
        let (id, changed, mut leader) = (hub.next_id(), hub.changes(), hub.leader());
        if let Some(status) = elsewhere(&leader.borrow_and_update()) {
            return Err(status);
        }
        let (inbound, sent) = (Some(inbound), BTreeMap::new());
        Ok(Self { hub, id, inbound, store: None, leader, changed, sent, silent_at: None, ended: false })
    }

    /// For `stream::unfold`: the next answer.
    pub(super) async fn next(mut self) -> Option<(Result<Bytes, Status>, Self)> {
        if self.ended {
            return None;
        }
        let answer = self.answer().await?;
        self.ended = answer.is_err();
        Some((answer, self))
    }

    async fn answer(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            if let Some(store) = &self.store {
                self.changed.borrow_and_update();
                match self.hub.updates_for(store, self.id, &mut self.sent) {
                    Ok(Some(bytes)) => return Some(Ok(bytes)),
                    Ok(None) => {}
                    Err(status) => return Some(Err(status)),
                }
            }
            tokio::select! {
                biased;
                () = self.hub.stop().cancelled() => return Some(Err(stopping())),
                report = heard(&mut self.inbound) => match report {
                    Ok(Some(report)) => {
                        if let Err(status) = self.take(report) {
                            return Some(Err(status));
                        }
                    }
                    // A store that reports no more is not there.
                    Ok(None) | Err(_) => return None,
                },
                _ = self.leader.changed() => {
                    if let Some(status) = elsewhere(&self.leader.borrow_and_update()) {
                        return Some(Err(status));
                    }
                }
                _ = self.changed.changed() => {}
                () = until(self.silent_at) => {
                    self.silent_at = None;
                    if let Some(store) = &self.store {
                        self.hub.fell_silent(store, self.id);
                    }
                }
            }
        }
    }

    fn take(&mut self, report: StoreReport) -> Result<(), Status> {
        let taken = match &self.store {
            Some((only, name)) if *name != report.store || *only != report.only => {
                Err(Status::invalid_argument(format!(
                    "this stream is {name}'s, and the report is {:?}'s: each store reports on a stream of its own",
                    report.store
                )))
            }
            Some(_) => self.hub.heard_from_store(self.id, report),
            None => {
                let key = (report.only.clone(), report.store.clone());
                self.hub.register(self.id, report)?;
                self.store = Some(key);
                Ok(())
            }
        };
        self.silent_at = Some(Instant::now() + SILENCE);
        taken
    }
}

impl Drop for Reporting {
    fn drop(&mut self) {
        if let Some(store) = &self.store {
            self.hub.silent(store, self.id);
        }
    }
}
