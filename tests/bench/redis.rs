//! Redis: a redis-server with an append-only file that is synced every second, and redis-benchmark, which measures
//! Vasto's gateway too.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::data::{self, Data};
use crate::process::{Process, run, wait_for};
use crate::sample::Sample;
use vasto_tests::cluster::free_port;

/// Keys in one pipeline while they are filled in.
const FILL_BATCH: u64 = 500;
/// Requests of the run that finds out how many there are to be.
const CALIBRATION: u64 = 20_000;

/// A server that ends with this value.
pub struct Redis {
    /// The process.
    pub process: Process,
    /// Where it listens.
    pub port: u16,
}

impl Redis {
    /// Starts it in a new folder, and waits until it answers.
    pub fn start(parent: &Path) -> anyhow::Result<Self> {
        let folder = parent.join("redis");
        std::fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
        let port = free_port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
        command.args(["--appendonly", "yes", "--appendfsync", "everysec", "--daemonize", "no"]);
        command.arg("--dir").arg(&folder);
        let mut process = Process::start("redis-server", &folder, &mut command)?;
        wait_for("redis-server answers", Duration::from_secs(20), || {
            process.check()?;
            Ok(ask(port, b"PING\r\n").ok().filter(|answer| answer == "+PONG"))
        })?;
        Ok(Self { process, port })
    }
}

fn ask(port: u16, request: &[u8]) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(request)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// Sets each key once.
pub fn fill(port: u16, data: &Data) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).context("filling in keys")?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut random = SmallRng::seed_from_u64(0);
    let (mut next, mut line) = (0, String::new());
    while next < data.keys() {
        let numbers = next..(next + FILL_BATCH).min(data.keys());
        next = numbers.end;
        let mut request = Vec::new();
        for number in numbers.clone() {
            let value = data.value(&mut random);
            write!(request, "*3\r\n$3\r\nSET\r\n$16\r\n")?;
            request.extend_from_slice(&data::key(number));
            write!(request, "\r\n${}\r\n", value.len())?;
            request.extend_from_slice(&value);
            request.extend_from_slice(b"\r\n");
        }
        stream.write_all(&request)?;
        for _ in numbers {
            line.clear();
            answers.read_line(&mut line).context("filling in keys")?;
            if line.trim_end() != "+OK" {
                bail!("SET was answered {line:?}; it must be +OK");
            }
        }
    }
    Ok(())
}

/// How redis-benchmark is to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asking {
    /// GET instead of SET.
    pub get: bool,
    pub clients: u32,
    pub pipeline: u32,
}

/// Measures whoever listens on this port. `rate` is what an earlier run found, so that this one takes as long as it shall.
pub fn measure(
    folder: &Path,
    port: u16,
    asking: Asking,
    keys: u64,
    value_size: usize,
    seconds: f64,
    rate: Option<f64>,
) -> anyhow::Result<Sample> {
    let bench = |requests: u64, within: f64| -> anyhow::Result<Sample> {
        let test = if asking.get { "get" } else { "set" };
        let mut command = Command::new("redis-benchmark");
        for (flag, value) in [
            ("-p", u64::from(port)),
            ("-n", requests),
            ("-r", keys),
            ("-d", value_size as u64),
            ("-c", asking.clients.into()),
            ("-P", asking.pipeline.into()),
        ] {
            command.args([flag, &value.to_string()]);
        }
        command.args(["-h", "127.0.0.1", "-t", test, "--csv", "-q"]);
        let (text, cpu) = run("redis-benchmark", folder, Duration::from_secs_f64(within), &mut command)?;
        let mut sample = parse(&text, requests)?;
        sample.client_cpu = Some(cpu.as_secs_f64());
        Ok(sample)
    };
    let rate = match rate {
        Some(rate) => rate,
        None => {
            let first = bench(CALIBRATION, 60.0)?.rate();
            // The first one is short; a second one is near enough, whatever the first one said.
            bench((first * 0.5) as u64 + 1000, 60.0)?.rate()
        }
    };
    bench(((rate * seconds) as u64).max(1000), seconds * 10.0 + 30.0)
}

/// Reads the table that `redis-benchmark --csv` prints.
fn parse(text: &str, requests: u64) -> anyhow::Result<Sample> {
    let mut rows = text.lines().map(|line| line.split(',').map(|cell| cell.trim_matches('"')).collect::<Vec<_>>());
    let titles = rows.find(|row| row.first() == Some(&"test"));
    let (titles, values) = titles.zip(rows.next()).with_context(|| format!("no table of redis-benchmark: {text:?}"))?;
    let cell = |title: &str| {
        let at = titles.iter().position(|t| *t == title)?;
        values.get(at)?.parse::<f64>().ok()
    };
    let micros = |title: &str| cell(title).map(|millis| millis * 1000.0);
    let rate = cell("rps").with_context(|| format!("no rps in redis-benchmark's table: {text:?}"))?;
    Ok(Sample {
        operations: requests as f64,
        seconds: requests as f64 / rate.max(1.0),
        p50: micros("p50_latency_ms"),
        p99: micros("p99_latency_ms"),
        // This tool knows none.
        p999: None,
        ..Sample::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                    \"p99_latency_ms\",\"max_latency_ms\"\n\"SET\",\"80000.00\",\"0.117\",\"0.032\",\"0.111\",\"0.199\",\
                    \"0.271\",\"0.591\"\n";
        let sample = parse(text, 20_000).unwrap();
        assert_eq!((sample.seconds, sample.p50, sample.p99, sample.p999), (0.25, Some(111.0), Some(271.0), None));
        assert!(parse("WARNING: no server", 1).is_err());
    }
}
