//! What a store says of itself while it runs: whether it is ready, what it has
//! done (counted as it happens, once a batch), and how it stands (looked up when
//! somebody asks). As OpenMetrics text, for Prometheus.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use vasto_client::v1::{FailureCode, StoreReport, operation};

use crate::dir;
use crate::engine::Usage;
use crate::host::Host;

/// Seconds; the upper bounds of the latency histograms' buckets.
const BUCKETS: [f64; 15] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// A window on one store: made before it runs, and valid after it has stopped.
#[derive(Clone)]
pub struct Monitor(Arc<Inner>);

struct Inner {
    registry: Registry,
    counts: Arc<Counts>,
    host: Arc<OnceLock<Weak<Host>>>,
}

impl Monitor {
    /// Of a store that does not run yet.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("vasto");
        let counts = Arc::new(Counts::register(&mut registry));
        let host = Arc::new(OnceLock::new());
        registry.register_collector(Box::new(Standing(host.clone())));
        Self(Arc::new(Inner { registry, counts, host }))
    }

    /// Whether the store serves all that the topology assigns to it; if not, why.
    pub fn ready(&self) -> Result<(), String> {
        match self.0.host.get().map(Weak::upgrade) {
            None => Err("the store is starting".to_owned()),
            Some(None) => Err("the store has stopped".to_owned()),
            Some(Some(host)) => host.ready(),
        }
    }

    /// All metrics, as OpenMetrics text. Asks RocksDB, so it may block for a moment.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.0.registry);
        text
    }

    pub(crate) fn counts(&self) -> Arc<Counts> {
        self.0.counts.clone()
    }

    pub(crate) fn watch(&self, host: &Arc<Host>) {
        let _ = self.0.host.set(Arc::downgrade(host));
    }
}

impl Default for Monitor {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

/// What clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Operation {
    Get,
    Put,
    Delete,
    Merge,
    Append,
    Expire,
    Scan,
}

impl Operation {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Get, "get"),
        (Self::Put, "put"),
        (Self::Delete, "delete"),
        (Self::Merge, "merge"),
        (Self::Append, "append"),
        (Self::Expire, "expire"),
        (Self::Scan, "scan"),
    ];

    /// Which one a message asks for.
    pub fn of(kind: &operation::Kind) -> Self {
        match kind {
            operation::Kind::Get(_) => Self::Get,
            operation::Kind::Put(_) => Self::Put,
            operation::Kind::Delete(_) => Self::Delete,
            operation::Kind::Merge(_) => Self::Merge,
            operation::Kind::Append(_) => Self::Append,
            operation::Kind::Expire(_) => Self::Expire,
        }
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Done.
    Ok,
    /// Not executed: the client tries again, elsewhere, or never.
    Refused,
    /// The store failed at it.
    Failed,
}

impl Ending {
    const ALL: [(Self, &'static str); 3] = [(Self::Ok, "ok"), (Self::Refused, "refused"), (Self::Failed, "failed")];

    /// Of an operation that ended with this code.
    pub fn of(code: FailureCode) -> Self {
        match code {
            FailureCode::Internal | FailureCode::Unspecified => Self::Failed,
            _ => Self::Refused,
        }
    }
}

/// Counted on the way, then added to the counters together.
#[derive(Debug, Default)]
pub struct Tally([[u64; Ending::ALL.len()]; Operation::ALL.len()]);

impl Tally {
    /// One more.
    pub fn add(&mut self, operation: Operation, ending: Ending) {
        self.0[operation as usize][ending as usize] += 1;
    }
}

/// A part of a batch: what one replica reads or writes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// On a blocking thread.
    Read,
    /// Through the writer.
    Write,
}

/// What is counted as it happens.
pub struct Counts {
    operations: [[Counter; Ending::ALL.len()]; Operation::ALL.len()],
    read: Histogram,
    write: Histogram,
    /// Ranges of a replica compared with another's.
    pub ranges_compared: Counter,
    /// Those in which the replica lacked something.
    pub ranges_divergent: Counter,
    /// Records joined in since a comparison found them missing or old.
    pub records_repaired: Counter,
    /// Replicas closed since their files are damaged.
    pub quarantines: Counter,
}

impl Counts {
    fn register(registry: &mut Registry) -> Self {
        let operations = Family::<[(&'static str, &'static str); 2], Counter>::default();
        registry.register(
            "store_operations",
            "Operations of clients by how they ended; refused ones were not executed",
            operations.clone(),
        );
        let latency = Family::<[(&'static str, &'static str); 1], Histogram, _>::new_with_constructor(
            (|| Histogram::new(BUCKETS)) as fn() -> Histogram,
        );
        registry.register_with_unit(
            "store_batch_duration",
            "Time that one replica took for its part of a client's batch",
            Unit::Seconds,
            latency.clone(),
        );
        let mut counter = |name, help| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        Self {
            ranges_compared: counter("store_ranges_compared", "Ranges of a replica compared with another's"),
            ranges_divergent: counter(
                "store_ranges_divergent",
                "Compared ranges in which the replica lacked something",
            ),
            records_repaired: counter(
                "store_records_repaired",
                "Records joined in since a comparison found a difference",
            ),
            quarantines: counter("store_quarantines", "Replicas closed since their files are damaged"),
            operations: Operation::ALL.map(|(_, operation)| {
                Ending::ALL
                    .map(|(_, result)| operations.get_or_create_owned(&[("operation", operation), ("result", result)]))
            }),
            read: latency.get_or_create_owned(&[("kind", "read")]),
            write: latency.get_or_create_owned(&[("kind", "write")]),
        }
    }

    /// Adds what was counted.
    pub fn add(&self, tally: &Tally) {
        for (counters, counted) in self.operations.iter().zip(&tally.0) {
            for (counter, more) in counters.iter().zip(counted).filter(|(_, more)| **more > 0) {
                counter.inc_by(*more);
            }
        }
    }

    /// One part of a batch took so long.
    pub fn took(&self, part: Part, time: Duration) {
        let histogram = match part {
            Part::Read => &self.read,
            Part::Write => &self.write,
        };
        histogram.observe(time.as_secs_f64());
    }
}

/// What is looked up when somebody asks.
struct Standing(Arc<OnceLock<Weak<Host>>>);

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standing").finish_non_exhaustive()
    }
}

impl Collector for Standing {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Some(host) = self.0.get().and_then(Weak::upgrade) else { return Ok(()) };
        let mut usage = BTreeMap::<(String, u32), Usage>::new();
        let mut compared = Shards::<u64>::new();
        for keyspace in host.all() {
            let name = keyspace.name();
            for replica in keyspace.replicas() {
                compared.insert((name.clone(), replica.shard), replica.progress.compared_ms() / 1_000);
                let more = replica.engine.usage();
                let sum = usage.entry((name.clone(), replica.shard)).or_default();
                sum.memtable_bytes += more.memtable_bytes;
                sum.sst_bytes += more.sst_bytes;
                sum.pending_compaction_bytes += more.pending_compaction_bytes;
                sum.l0_files += more.l0_files;
                sum.running_compactions += more.running_compactions;
                sum.running_flushes += more.running_flushes;
            }
        }
        let compared = Gauges {
            name: "store_compared_timestamp",
            help: "When the replica was last compared with all others of its shard; 0: not since it was opened.",
            unit: Some(Unit::Seconds),
            rows: by_shard(&compared, |seconds| *seconds),
        };
        let rows = host.row_cache_usage();
        let kept = Gauges {
            name: "store_row_cache_usage",
            help: "Rows that are kept in memory, with their keys.",
            unit: Some(Unit::Bytes),
            rows: vec![(Vec::new(), rows.bytes)],
        };
        let families = families(&host.report(), host.is_connected(), host.cache_bytes(), &usage);
        for family in families.into_iter().chain([compared, kept]) {
            let mut metric =
                encoder.encode_descriptor(family.name, family.help, family.unit.as_ref(), MetricType::Gauge)?;
            for (labels, value) in &family.rows {
                metric.encode_family(labels)?.encode_gauge(value)?;
            }
        }
        let counters = [
            ("store_row_cache_hits", "Rows of which the row cache had what was asked.", rows.hits),
            ("store_row_cache_misses", "Rows that were looked for in RocksDB.", rows.misses),
        ];
        for (name, help, count) in counters {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        Ok(())
    }
}

type Labels = Vec<(&'static str, String)>;

/// One metric with a row for each set of labels.
struct Gauges {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    rows: Vec<(Labels, u64)>,
}

/// By keyspace and shard: a store has one replica of a shard, or for a moment two.
type Shards<V> = BTreeMap<(String, u32), V>;

fn by_shard<V>(of: &Shards<V>, value: impl Fn(&V) -> u64) -> Vec<(Labels, u64)> {
    let labels = |(keyspace, shard): &(String, u32)| vec![("keyspace", keyspace.clone()), ("shard", shard.to_string())];
    of.iter().map(|(key, row)| (labels(key), value(row))).collect()
}

/// All gauges, from what the store would report now.
fn families(report: &StoreReport, connected: bool, cache: (u64, u64), usage: &Shards<Usage>) -> Vec<Gauges> {
    let mut versions = Vec::new();
    let (mut sizes, mut lags) = (Shards::<(u64, u64)>::new(), BTreeMap::<(String, u32, String), u64>::new());
    let mut faults = 0;
    for keyspace in &report.keyspaces {
        let topology = keyspace.topology.as_ref();
        let name = topology.map(|t| &t.name).filter(|n| !n.is_empty()).unwrap_or(&keyspace.uid);
        versions.push((vec![("keyspace", name.clone())], keyspace.version));
        // By store: replica ids are drawn anew again and again.
        let store =
            |id| topology.into_iter().flat_map(|t| t.views()).find_map(|v| Some(v.place(id)?.assignment.store.clone()));
        for replica in &keyspace.replicas {
            faults += u64::from(!replica.fault.is_empty());
            if !replica.born {
                continue;
            }
            let size = sizes.entry((name.clone(), replica.shard)).or_default();
            *size = (size.0 + replica.records, size.1 + replica.bytes);
            // Of a source that has not been heard yet nothing is known.
            for source in replica.sources.iter().filter(|s| s.lag != u64::MAX) {
                if let Some(store) = store(source.replica) {
                    let lag = lags.entry((name.clone(), replica.shard, store)).or_default();
                    *lag = (*lag).max(source.lag);
                }
            }
        }
    }
    let lags = lags.into_iter().map(|((keyspace, shard, source), lag)| {
        (vec![("keyspace", keyspace), ("shard", shard.to_string()), ("source", source)], lag)
    });
    let one = |value: u64| vec![(Labels::new(), value)];
    let disk = |value: fn(&vasto_client::v1::Disk) -> u64| {
        report.disk.iter().map(|disk| (Labels::new(), value(disk))).collect::<Vec<_>>()
    };
    let bytes = Some(Unit::Bytes);
    let mut all = Vec::new();
    let mut add = |name, help, unit: &Option<Unit>, rows| all.push(Gauges { name, help, unit: unit.clone(), rows });

    add(
        "store_replica_lag_records",
        "Changes of a source that the replica has not applied yet.",
        &None,
        lags.collect(),
    );
    add("store_replica_records", "Records, estimated.", &None, by_shard(&sizes, |s| s.0));
    add("store_replica", "Bytes of a replica's files and memtables, estimated.", &bytes, by_shard(&sizes, |s| s.1));
    add("store_replica_faults", "Replicas that take no more writes.", &None, one(faults));
    add("store_disk_free", "What the store can still write to its data folder's disk.", &bytes, disk(|d| d.free_bytes));
    add("store_disk_size", "Size of the data folder's disk.", &bytes, disk(|d| d.size_bytes));
    let full = disk(|d| u64::from(!dir::has_room(d)));
    add("store_disk_full", "1 while writes are refused since the disk is nearly full.", &None, full);
    add("store_topology_version", "The newest topology that the store has persisted.", &None, versions);
    let connected = one(u64::from(connected));
    add("store_operator_connected", "1 while an operator takes the store's reports.", &None, connected);

    add("rocksdb_block_cache_usage", "The store's whole block cache.", &bytes, one(cache.0));
    add("rocksdb_block_cache_pinned", "What of the block cache is in use at the moment.", &bytes, one(cache.1));
    add("rocksdb_memtable", "Memtables, those being flushed included.", &bytes, by_shard(usage, |u| u.memtable_bytes));
    add("rocksdb_sst", "Sorted files in use.", &bytes, by_shard(usage, |u| u.sst_bytes));
    let pending = by_shard(usage, |u| u.pending_compaction_bytes);
    add("rocksdb_estimated_pending_compaction", "What compaction still has to rewrite.", &bytes, pending);
    add("rocksdb_l0_files", "Files of level 0; many slow writes down.", &None, by_shard(usage, |u| u.l0_files));
    let compactions = by_shard(usage, |u| u.running_compactions);
    add("rocksdb_running_compactions", "Compactions under way.", &None, compactions);
    add("rocksdb_running_flushes", "Flushes under way.", &None, by_shard(usage, |u| u.running_flushes));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_client::v1::{Assignment, Disk, KeyspaceReport, ReplicaReport, Shard, SourceReport, Topology, View};

    fn value(text: &str, series: &str) -> Option<f64> {
        let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    #[test]
    fn a_tally_is_added_to_the_counters() {
        let monitor = Monitor::new();
        let mut tally = Tally::default();
        tally.add(Operation::Put, Ending::Ok);
        tally.add(Operation::Put, Ending::Ok);
        tally.add(Operation::Scan, Ending::Failed);
        monitor.counts().add(&tally);
        monitor.counts().add(&tally);
        monitor.counts().took(Part::Write, Duration::from_micros(300));
        let text = monitor.encode();
        let operations = |labels: &str| value(&text, &format!("vasto_store_operations_total{{{labels}}}"));
        assert_eq!(operations(r#"operation="put",result="ok""#), Some(4.0), "{text}");
        assert_eq!(operations(r#"operation="scan",result="failed""#), Some(2.0));
        assert_eq!(operations(r#"operation="get",result="refused""#), Some(0.0), "each is there from the start");
        let bucket =
            |le| value(&text, &format!(r#"vasto_store_batch_duration_seconds_bucket{{le="{le}",kind="write"}}"#));
        assert_eq!((bucket("0.00025"), bucket("0.0005")), (Some(0.0), Some(1.0)), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_operation_and_ending_has_its_own_counter() {
        for (i, (operation, _)) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, i);
        }
        for (i, (ending, _)) in Ending::ALL.into_iter().enumerate() {
            assert_eq!(ending as usize, i);
        }
        assert_eq!(Ending::of(FailureCode::NoSpace), Ending::Refused);
        assert_eq!(Ending::of(FailureCode::Internal), Ending::Failed);
    }

    #[test]
    fn each_set_of_labels_comes_once_and_the_unknown_is_left_out() {
        let place = |store: &str, replica| Assignment { store: store.into(), replica, serving: true };
        let shards = [[1, 2], [3, 4]]
            .map(|ids| Shard { replicas: ids.map(|id| place(["a", "b"][id as usize % 2], id)).to_vec() });
        let topology =
            Topology { name: "shop/p".into(), current: Some(View { shards: shards.to_vec() }), ..Topology::default() };
        let source = |replica, lag| SourceReport { replica, lag, ..SourceReport::default() };
        let replica = ReplicaReport {
            born: true,
            records: 7,
            // 2 and 4 stand on one store.
            sources: vec![source(2, 5), source(4, 9), source(3, u64::MAX)],
            ..ReplicaReport::default()
        };
        // Not born: of what it has nothing is known.
        let sources = vec![source(2, 0)];
        let broken = ReplicaReport { shard: 1, fault: "torn".into(), sources, ..ReplicaReport::default() };
        let report = StoreReport {
            keyspaces: vec![KeyspaceReport {
                version: 3,
                topology: Some(topology),
                replicas: vec![replica, broken],
                ..KeyspaceReport::default()
            }],
            disk: Some(Disk { size_bytes: 1 << 30, free_bytes: 1 << 20 }),
            ..StoreReport::default()
        };
        let all = families(&report, true, (8, 2), &Shards::new());
        let rows = |name: &str| &all.iter().find(|f| f.name == name).unwrap().rows;
        let labels =
            |labels: &[(&'static str, &str)]| labels.iter().map(|(k, v)| (*k, (*v).to_owned())).collect::<Labels>();
        let shard = [("keyspace", "shop/p"), ("shard", "0")];
        assert_eq!(*rows("store_replica_lag_records"), [(labels(&[shard[0], shard[1], ("source", "a")]), 9)]);
        assert_eq!(*rows("store_replica_records"), [(labels(&shard), 7)]);
        assert_eq!(*rows("store_topology_version"), [(labels(&shard[..1]), 3)]);
        assert_eq!((rows("store_replica_faults")[0].1, rows("store_disk_full")[0].1), (1, 1));
        let mut names: Vec<&str> = all.iter().map(|f| f.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }
}
