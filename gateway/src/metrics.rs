//! What a gateway counts, as OpenMetrics text for Prometheus.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Seconds; the upper bounds of the latency histograms' buckets.
const BUCKETS: [f64; 15] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// What clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Redis,
    Http,
    Grpc,
}

impl Protocol {
    const ALL: [(Self, &'static str); 3] = [(Self::Redis, "redis"), (Self::Http, "http"), (Self::Grpc, "grpc")];
}

/// Of one protocol.
pub(crate) struct Traffic {
    /// Connections that are open.
    pub(crate) connections: Gauge<u64, AtomicU64>,
    /// Connections that there was no room for.
    pub(crate) turned_away: Counter,
    ok: Counter,
    failed: Counter,
    duration: Histogram,
}

impl Traffic {
    /// Requests of which so many failed; together they took so long.
    pub(crate) fn answered(&self, requests: usize, failed: usize, time: Duration) {
        self.ok.inc_by((requests - failed) as u64);
        self.failed.inc_by(failed as u64);
        self.duration.observe(time.as_secs_f64());
    }

    /// All requests so far.
    pub(crate) fn requests(&self) -> u64 {
        self.ok.get() + self.failed.get()
    }
}

pub(crate) struct Counts {
    registry: Registry,
    traffic: [Traffic; 3],
}

impl Counts {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("vasto");
        let connections = Family::<[(&'static str, &'static str); 1], Gauge<u64, AtomicU64>>::default();
        registry.register("gateway_connections", "Connections of clients that are open", connections.clone());
        let turned_away = Family::<[(&'static str, &'static str); 1], Counter>::default();
        registry.register("gateway_turned_away", "Connections that there was no room for", turned_away.clone());
        let requests = Family::<[(&'static str, &'static str); 2], Counter>::default();
        registry.register("gateway_requests", "Requests of clients by how they ended", requests.clone());
        let duration = Family::<[(&'static str, &'static str); 1], Histogram, _>::new_with_constructor(
            (|| Histogram::new(BUCKETS)) as fn() -> Histogram,
        );
        registry.register_with_unit(
            "gateway_batch_duration",
            "Time from the reading of requests that came together to their answers",
            Unit::Seconds,
            duration.clone(),
        );
        let traffic = Protocol::ALL.map(|(_, name)| Traffic {
            connections: connections.get_or_create_owned(&[("protocol", name)]),
            turned_away: turned_away.get_or_create_owned(&[("protocol", name)]),
            ok: requests.get_or_create_owned(&[("protocol", name), ("result", "ok")]),
            failed: requests.get_or_create_owned(&[("protocol", name), ("result", "failed")]),
            duration: duration.get_or_create_owned(&[("protocol", name)]),
        });
        Self { registry, traffic }
    }

    pub(crate) fn of(&self, protocol: Protocol) -> &Traffic {
        &self.traffic[protocol as usize]
    }

    pub(crate) fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}
