//! One measurement, as the children that measure print it: a line of JSON.

use std::time::Duration;

use anyhow::Context as _;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// What one measurement found. Latencies are a call's, in microseconds; a call may hold many operations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Operations, or bytes where files are copied.
    pub operations: f64,
    /// How long it took.
    pub seconds: f64,
    /// Latency of a call.
    pub p50: Option<f64>,
    /// Latency of a call.
    pub p99: Option<f64>,
    /// Latency of a call.
    pub p999: Option<f64>,
    /// CPU seconds of whoever asked; where there is no server, of all.
    pub client_cpu: Option<f64>,
    /// CPU seconds of the server, the background work within the time included.
    pub server_cpu: Option<f64>,
    /// The most bytes of memory that the server has held (where there is none: the one process).
    pub memory: Option<u64>,
    /// How long after it the servers were still at work: compaction, and followers that had not caught up.
    pub quiet_after: Option<f64>,
}

impl Sample {
    /// From a loop's latencies; each call was `batch` operations.
    pub fn new(latencies: &Histogram<u64>, batch: u32, time: Duration) -> Self {
        let quantile = |q| Some(latencies.value_at_quantile(q) as f64);
        Self {
            operations: latencies.len() as f64 * f64::from(batch),
            seconds: time.as_secs_f64(),
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            ..Self::default()
        }
    }

    /// Reads the line that a child printed.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        serde_json::from_str(text.trim()).with_context(|| format!("no measurement in what it printed: {text:?}"))
    }

    /// Prints the line.
    pub fn print(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }

    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations / self.seconds.max(1e-9)
    }

    /// CPU microseconds of the server for each operation.
    pub fn server_micros(&self) -> Option<f64> {
        self.server_cpu.map(|seconds| seconds * 1e6 / self.operations.max(1.0))
    }

    /// CPU microseconds of the client for each operation.
    pub fn client_micros(&self) -> Option<f64> {
        self.client_cpu.map(|seconds| seconds * 1e6 / self.operations.max(1.0))
    }
}

/// 1 µs to 10 minutes, to three digits.
pub fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 600_000_000, 3).context("the bounds of a histogram")
}

/// Records a latency.
pub fn record(latencies: &mut Histogram<u64>, latency: Duration) {
    latencies.saturating_record((latency.as_micros() as u64).max(1));
}

/// The middle one of these, or `None` of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}
