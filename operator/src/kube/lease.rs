//! Who leads: the operator that holds the Lease. A leader acts only while its own
//! clock says that nobody else can hold it yet; the address in the Lease's annotation
//! tells stores where to report.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vasto_client::env::Env;

use super::Options;
use super::api::{FIELD_MANAGER, within};
use crate::hub::{Hub, Leader};

/// The Lease's name.
const NAME: &str = "vasto-operator";
/// The annotation with the leader's `host:port`.
const ADDRESS: &str = "vasto.io/address";

/// One time of leading.
#[derive(Clone, Debug)]
pub(crate) struct Term {
    /// How often the lead has changed: a later leader has a greater one.
    pub(crate) number: i32,
    /// Cancelled when it ends.
    pub(crate) ended: CancellationToken,
    pub(crate) since: Instant,
}

/// This operator's part in the election.
pub(crate) struct Election {
    api: Api<Lease>,
    identity: String,
    address: String,
    lease: Duration,
    renew: Duration,
    env: Env,
    term: watch::Sender<Option<Term>>,
    /// The Lease as last seen to change, and when: clocks of others are not compared with ours.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Election {
    pub(crate) fn new(options: &Options) -> Self {
        let client: Client = options.client.clone();
        Self {
            api: Api::namespaced(client, &options.pod_namespace),
            identity: options.pod.clone(),
            address: options.advertise.clone(),
            lease: options.timings.lease,
            renew: options.timings.renew,
            env: options.env.clone(),
            term: watch::Sender::new(None),
            seen: None,
        }
    }

    /// The time of leading that is going on here, if one is.
    pub(crate) fn leadership(&self) -> watch::Receiver<Option<Term>> {
        self.term.subscribe()
    }

    /// Takes part until stopped; then lets go of the Lease.
    pub(crate) async fn run(mut self, hub: Hub, stop: CancellationToken) {
        let mut renewed = Instant::now();
        loop {
            let began = Instant::now();
            match within(self.renew, self.attempt()).await {
                Ok(Ok(Holder::Here { transitions })) => {
                    renewed = began;
                    if self.term.borrow().as_ref().is_none_or(|t| t.number != transitions) {
                        self.begin(transitions, &hub);
                    }
                }
                Ok(Ok(Holder::Other { address })) => {
                    self.end("another operator holds the lease");
                    hub.set_leader(Leader::Elsewhere(address));
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the lease can't be read or written; trying again");
                }
                Err(late) => tracing::warn!(error = %late, "the lease can't be read or written; trying again"),
            }
            // Two thirds: whoever takes over waits for the whole of it.
            if self.term.borrow().is_some() && renewed.elapsed() >= self.lease * 2 / 3 {
                self.end("the lease could not be renewed in time");
                hub.set_leader(Leader::Elsewhere(None));
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(self.env.jitter(self.renew * 2 / 3)) => {}
            }
        }
        if self.term.borrow().is_some() {
            self.end("stopping");
            if let Err(error) = within(self.renew, self.release()).await {
                tracing::warn!(%error, "the lease is not released: another operator takes over when it has run out");
            }
        }
    }

    fn begin(&self, number: i32, hub: &Hub) {
        self.end("a new term");
        tracing::info!(identity = self.identity, term = number, "leading");
        let term = Term { number, ended: CancellationToken::new(), since: Instant::now() };
        hub.set_leader(Leader::Here);
        self.term.send_replace(Some(term));
    }

    fn end(&self, why: &str) {
        if let Some(term) = self.term.send_replace(None) {
            tracing::info!(identity = self.identity, term = term.number, why, "no longer leading");
            term.ended.cancel();
        }
    }

    /// Takes or renews the Lease if that is possible now.
    async fn attempt(&mut self) -> Result<Holder, kube::Error> {
        let Some(found) = self.api.get_opt(NAME).await? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
                spec: Some(self.held(0, None)),
            };
            let created = self.api.create(&params(), &self.addressed(lease)).await;
            return self.written(created);
        };
        let spec = found.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or(0);
        let now = Instant::now();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != spec) {
            self.seen = Some((spec.clone(), now));
        }
        let unchanged = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| now - *since);
        let duration = Duration::from_secs(spec.lease_duration_seconds.unwrap_or(0).max(0).unsigned_abs().into());
        let here = holder == self.identity;
        if !here && !holder.is_empty() && unchanged < duration.max(self.lease) {
            let address = found.metadata.annotations.as_ref().and_then(|a| a.get(ADDRESS)).cloned();
            return Ok(Holder::Other { address });
        }
        // One of ours from a life before is taken as another's: what that life began may still be on its way.
        let new_term = !here || self.term.borrow().is_none();
        let number = if new_term { transitions.saturating_add(1) } else { transitions };
        let mut lease = found;
        lease.spec = Some(self.held(number, spec.acquire_time.filter(|_| !new_term)));
        // It carries the resourceVersion that was read: of two that take it, one does.
        let replaced = self.api.replace(NAME, &params(), &self.addressed(lease)).await;
        self.written(replaced)
    }

    fn written(&mut self, result: Result<Lease, kube::Error>) -> Result<Holder, kube::Error> {
        match result {
            Ok(lease) => {
                let spec = lease.spec.unwrap_or_default();
                let transitions = spec.lease_transitions.unwrap_or(0);
                self.seen = Some((spec, Instant::now()));
                Ok(Holder::Here { transitions })
            }
            // Another was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Holder::Other { address: None }),
            Err(error) => Err(error),
        }
    }

    fn held(&self, number: i32, since: Option<MicroTime>) -> LeaseSpec {
        let now = MicroTime(self.now());
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.lease.as_secs()).unwrap_or(i32::MAX).max(1)),
            lease_transitions: Some(number),
            acquire_time: Some(since.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }
    }

    fn addressed(&self, mut lease: Lease) -> Lease {
        lease.metadata.managed_fields = None;
        lease.metadata.annotations.get_or_insert_default().insert(ADDRESS.to_owned(), self.address.clone());
        lease
    }

    fn now(&self) -> Timestamp {
        i64::try_from(self.env.now_ms()).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok()).unwrap_or_default()
    }

    async fn release(&self) -> Result<(), kube::Error> {
        let mut lease = self.api.get(NAME).await?;
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(&self.identity) {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
            self.api.replace(NAME, &params(), &lease).await?;
        }
        Ok(())
    }
}

enum Holder {
    Here { transitions: i32 },
    Other { address: Option<String> },
}

fn params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}
