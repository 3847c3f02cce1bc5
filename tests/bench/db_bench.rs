//! db_bench, RocksDB's own benchmark, as Debian's rocksdb-tools has it: built with assertions (it says so itself), so
//! it is slower than RocksDB is. The embedded loop is the stricter peer.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;

use crate::process::run;
use crate::sample::Sample;

/// One of its benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DbBench {
    pub work: Work,
    pub threads: u32,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Read,
    /// Puts of keys that are there.
    Overwrite,
    /// Puts into a new database, each synced; those of other threads that wait are synced with it.
    SyncedFill,
}

impl DbBench {
    /// What it calls this.
    pub fn name(self) -> &'static str {
        match self.work {
            Work::Read => "readrandom",
            Work::Overwrite => "overwrite",
            Work::SyncedFill => "fillrandom",
        }
    }

    /// Puts each key once, in the order of keys.
    pub fn fill(folder: &Path, keys: u64, value_size: usize) -> anyhow::Result<()> {
        let mut command = command("fillseq", &folder.join("db_bench"), keys, value_size);
        run("db_bench", folder, Duration::from_secs(120), &mut command).map(drop)
    }

    /// Runs it, over the database that has been filled in where it wants one.
    pub fn measure(self, folder: &Path, keys: u64, value_size: usize, seconds: f64) -> anyhow::Result<Sample> {
        let (name, synced) = (self.name(), self.work == Work::SyncedFill);
        let db = folder.join(if synced { "db_bench-synced" } else { "db_bench" });
        let mut command = command(name, &db, keys, value_size);
        command.arg(format!("--threads={}", self.threads)).arg(format!("--duration={}", seconds.ceil() as u64));
        // It refuses to fill in a database that is there.
        command.arg(format!("--sync={}", u8::from(synced))).arg(format!("--use_existing_db={}", u8::from(!synced)));
        let (text, cpu) = run("db_bench", folder, Duration::from_secs_f64(seconds * 3.0 + 60.0), &mut command)?;
        let mut sample = parse(&text, name)?;
        sample.client_cpu = Some(cpu.as_secs_f64());
        Ok(sample)
    }
}

/// With the store's settings where it has the same ones.
fn command(benchmark: &str, db: &Path, keys: u64, value_size: usize) -> Command {
    let mut command = Command::new("db_bench");
    command.arg(format!("--benchmarks={benchmark}")).arg(format!("--db={}", db.display()));
    command.arg(format!("--num={keys}")).arg(format!("--value_size={value_size}")).arg("--key_size=16");
    command.args(["--compression_type=lz4", "--bloom_bits=10", "--histogram=1"]);
    command.args(["--write_buffer_size=16777216", "--cache_size=67108864"]);
    command
}

/// Reads `fillrandom : 1574.044 micros/op 39872 ops/sec 3.209 seconds 127936 operations; 4.4 MB/s` and its percentiles.
fn parse(text: &str, name: &str) -> anyhow::Result<Sample> {
    let line = text.lines().find(|line| line.starts_with(name) && line.contains("ops/sec"));
    let line = line.with_context(|| format!("db_bench printed no line of {name}: {text:?}"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let before = |unit: &str| {
        let at = words.iter().position(|word| word.trim_end_matches(';') == unit)?;
        words.get(at.checked_sub(1)?)?.parse::<f64>().ok()
    };
    let rate = before("ops/sec").with_context(|| format!("no rate in db_bench's line {line:?}"))?;
    // Older versions print the rate alone.
    let seconds = before("seconds").unwrap_or(1.0);
    let percentiles = text.lines().find_map(|line| line.strip_prefix("Percentiles:")).unwrap_or_default();
    let words: Vec<&str> = percentiles.split_whitespace().collect();
    let percentile = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1)?.parse::<f64>().ok()
    };
    Ok(Sample {
        operations: before("operations").unwrap_or(rate * seconds),
        seconds,
        p50: percentile("P50:"),
        p99: percentile("P99:"),
        p999: percentile("P99.9:"),
        ..Sample::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_line_is_read() {
        let text = "fillrandom   :    1574.044 micros/op 39872 ops/sec 3.209 seconds 127936 operations;    4.4 MB/s\n\
                    Percentiles: P50: 1424.84 P75: 1817.82 P99: 4364.91 P99.9: 39701.48 P99.99: 91344.00\n";
        let sample = parse(text, "fillrandom").unwrap();
        assert_eq!((sample.operations, sample.seconds, sample.p999), (127_936.0, 3.209, Some(39_701.48)));
        assert!(parse("", "fillrandom").is_err());
    }
}
