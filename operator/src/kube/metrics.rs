//! What the operator measures, in Prometheus's names and units; docs/metrics.md says
//! what each is good for.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use vasto_crds::{Keyspace, KeyspaceStatus, Phase};

use crate::console::Console;
use crate::hub::Hub;

type Whole = Gauge<i64, AtomicI64>;
type Part = Gauge<f64, AtomicU64>;

const PHASES: [Phase; 8] = [
    Phase::Pending,
    Phase::Ready,
    Phase::Prepare,
    Phase::Switch,
    Phase::Fence,
    Phase::Drain,
    Phase::Cleanup,
    Phase::Deleting,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Write {
    kind: String,
    verb: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    namespace: String,
    keyspace: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    namespace: String,
    keyspace: String,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Holds {
    namespace: String,
    keyspace: String,
    r#type: String,
    reason: String,
}

/// The operator's measures. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Monitor(Arc<Inner>);

struct Inner {
    registry: Registry,
    hub: Mutex<Option<Hub>>,
    console: Console,
    serving: AtomicBool,
    duration: Family<Outcome, Histogram>,
    errors: Family<Reason, Counter>,
    writes: Family<Write, Counter>,
    leader: Whole,
    watchers: Whole,
    stores: Whole,
    version: Family<Of, Whole>,
    shards: Family<Of, Whole>,
    replicas: Family<Of, Whole>,
    ready: Family<Of, Whole>,
    progress: Family<Of, Part>,
    phase: Family<InPhase, Whole>,
    condition: Family<Holds, Whole>,
    /// Conditions that were shown, to be taken back.
    shown: Mutex<std::collections::BTreeMap<(String, String), Vec<Holds>>>,
}

impl Default for Monitor {
    fn default() -> Self {
        Self::new()
    }
}

impl Monitor {
    /// Nothing measured yet.
    pub fn new() -> Self {
        let duration =
            Family::<Outcome, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 14)));
        let (errors, writes) = (Family::<Reason, Counter>::default(), Family::<Write, Counter>::default());
        let (leader, watchers, stores) = (Whole::default(), Whole::default(), Whole::default());
        let [version, shards, replicas, ready]: [Family<Of, Whole>; 4] = Default::default();
        let (progress, phase, condition) =
            (Family::<Of, Part>::default(), Family::<InPhase, Whole>::default(), Family::<Holds, Whole>::default());
        let mut registry = Registry::with_prefix("vasto");
        let r = registry.sub_registry_with_prefix("operator");
        r.register("reconcile_duration_seconds", "Time of one look at a keyspace", duration.clone());
        r.register("reconcile_errors", "Looks that failed, by reason", errors.clone());
        r.register("api_writes", "Writes to the API server", writes.clone());
        r.register("leader", "1 while this operator leads", leader.clone());
        r.register("watchers", "Clients that watch topologies here", watchers.clone());
        r.register("stores", "Stores that report here", stores.clone());
        let r = registry.sub_registry_with_prefix("keyspace");
        r.register("topology_version", "The committed topology's version", version.clone());
        r.register("shards", "Shards that clients use", shards.clone());
        r.register("replicas", "Replicas of the committed topology", replicas.clone());
        r.register("ready_replicas", "Replicas that serve", ready.clone());
        r.register("progress_ratio", "How far the phase under way has come, 0 to 1", progress.clone());
        r.register("phase", "1 for the phase that the keyspace is in", phase.clone());
        r.register("condition", "1 for each condition that is True", condition.clone());
        Self(Arc::new(Inner {
            registry,
            hub: Mutex::default(),
            console: Console::default(),
            serving: AtomicBool::new(false),
            duration,
            errors,
            writes,
            leader,
            watchers,
            stores,
            version,
            shards,
            replicas,
            ready,
            progress,
            phase,
            condition,
            shown: Mutex::default(),
        }))
    }

    /// Shows this hub's streams.
    pub(crate) fn attach(&self, hub: Hub) {
        self.0.console.attach(hub.clone());
        *self.0.hub.lock().unwrap_or_else(PoisonError::into_inner) = Some(hub);
    }

    pub(crate) fn serving(&self, serving: bool) {
        self.0.serving.store(serving, Ordering::Release);
    }

    /// The operator for people to look at.
    pub fn console(&self) -> &Console {
        &self.0.console
    }

    /// Whether the topology stream is served; else why not.
    pub fn ready(&self) -> Result<(), String> {
        let hub = self.0.hub.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.0.serving.load(Ordering::Acquire) {
            Err("the stream is not served (yet)".to_owned())
        } else if hub.as_ref().is_none_or(|hub| !hub.settled()) {
            Err("the API server has not yet listed the keyspaces".to_owned())
        } else {
            Ok(())
        }
    }

    /// Everything, as Prometheus reads it.
    pub fn encode(&self) -> String {
        if let Some(hub) = &*self.0.hub.lock().unwrap_or_else(PoisonError::into_inner) {
            let (stores, watchers) = hub.counts();
            self.0.stores.set(stores as i64);
            self.0.watchers.set(watchers as i64);
        }
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.0.registry) {
            Ok(()) => text,
            Err(_) => String::new(),
        }
    }

    pub(crate) fn leader(&self, leads: bool) {
        self.0.leader.set(i64::from(leads));
        if !leads {
            self.clear();
        }
    }

    pub(crate) fn write(&self, kind: &str, verb: &'static str) {
        self.0.writes.get_or_create(&Write { kind: kind.to_owned(), verb }).inc();
    }

    pub(crate) fn reconciled(&self, took: Duration, ok: bool) {
        let result = if ok { "ok" } else { "error" };
        self.0.duration.get_or_create(&Outcome { result }).observe(took.as_secs_f64());
    }

    pub(crate) fn failed(&self, reason: &'static str) {
        self.0.errors.get_or_create(&Reason { reason }).inc();
    }

    /// Shows a keyspace as its status has it.
    pub(crate) fn keyspace(&self, namespace: &str, keyspace: &Keyspace, status: &KeyspaceStatus) {
        let (namespace, name) = (namespace.to_owned(), keyspace.name().to_owned());
        let of = Of { namespace: namespace.clone(), keyspace: name.clone() };
        let inner = &*self.0;
        inner.version.get_or_create(&of).set(status.topology_version.unwrap_or(0) as i64);
        inner.shards.get_or_create(&of).set(i64::from(status.shards.unwrap_or(0)));
        inner.replicas.get_or_create(&of).set(i64::from(status.replicas.unwrap_or(0)));
        inner.ready.get_or_create(&of).set(i64::from(status.ready_replicas.unwrap_or(0)));
        let share = status.progress.as_ref().map_or(1.0, |p| match (p.records, p.records_total) {
            (Some(done), Some(all)) if all > 0 => done as f64 / all as f64,
            _ => 0.0,
        });
        inner.progress.get_or_create(&of).set(share);
        for phase in PHASES {
            let of = InPhase { namespace: namespace.clone(), keyspace: name.clone(), phase: phase.as_str() };
            inner.phase.get_or_create(&of).set(i64::from(status.phase == Some(phase)));
        }
        let holds = status.conditions.iter().filter(|c| c.status == "True").map(|c| Holds {
            namespace: namespace.clone(),
            keyspace: name.clone(),
            r#type: c.type_.clone(),
            reason: c.reason.clone(),
        });
        let holds: Vec<Holds> = holds.collect();
        let mut shown = inner.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shown.insert((namespace, name), holds.clone()).unwrap_or_default();
        before.iter().filter(|h| !holds.contains(h)).for_each(|h| {
            inner.condition.remove(h);
        });
        holds.iter().for_each(|h| {
            inner.condition.get_or_create(h).set(1);
        });
    }

    /// A keyspace that is gone is shown no more.
    pub(crate) fn forget(&self, namespace: &str, keyspace: &str) {
        let inner = &*self.0;
        let of = Of { namespace: namespace.to_owned(), keyspace: keyspace.to_owned() };
        for family in [&inner.version, &inner.shards, &inner.replicas, &inner.ready] {
            family.remove(&of);
        }
        inner.progress.remove(&of);
        for phase in PHASES {
            let (namespace, keyspace) = (of.namespace.clone(), of.keyspace.clone());
            inner.phase.remove(&InPhase { namespace, keyspace, phase: phase.as_str() });
        }
        let mut shown = inner.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for holds in shown.remove(&(of.namespace, of.keyspace)).unwrap_or_default() {
            inner.condition.remove(&holds);
        }
    }

    /// Only the leader shows keyspaces.
    fn clear(&self) {
        let all: Vec<(String, String)> =
            self.0.shown.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        for (namespace, keyspace) in all {
            self.forget(&namespace, &keyspace);
        }
    }
}

pub(crate) fn log_event_failure(reason: &str, error: &str) {
    tracing::warn!(reason, error, "an Event could not be published");
}
