//! `vasto bench`: throughput and latency of a keyspace. In the open loop
//! (`--rate`) operations have times at which they are due, and latency counts
//! from there, so that a stall shows in every operation that it held up.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::json;
use tokio::task::JoinSet;
use vasto_client::{Error, Keyspace, Op};

use crate::context::{Context, parse_duration};
use crate::exit::{Code, client_code, fault};
use crate::output::{count, count_bar, emit, emit_json, size, table, time_bar};

/// Operations in one batch while keys are filled in or removed, and batches at once.
const FILL_BATCH: u64 = 256;
const FILL_AT_ONCE: usize = 8;
/// Workers share this many recorders: enough that they seldom meet.
const RECORDERS: usize = 16;

/// Arguments of `vasto bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Bench {
    /// The keyspace's name.
    keyspace: String,
    /// Shares of get, put, add and delete.
    #[arg(long, value_name = "MIX", default_value = "get=50,put=50")]
    mix: Mix,
    /// How many keys.
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Bytes of a key.
    #[arg(long, value_name = "BYTES", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=32_768))]
    key_size: u32,
    /// Bytes of a value, or a range of them such as 100-2000.
    #[arg(long, value_name = "BYTES", default_value = "100")]
    value_size: Sizes,
    /// Callers at once.
    #[arg(short, long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    concurrency: u32,
    /// Threads that they share.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Operations in each call.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch: u32,
    /// How long to measure.
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Calls a second, whether or not earlier ones are answered (open loop). Without it each caller
    /// waits for its answer before it calls again (closed loop).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    rate: Option<u64>,
    /// What keys begin with.
    #[arg(long, value_name = "TEXT", default_value = "bench:")]
    prefix: String,
    /// The keys are there from an earlier run: don't put them first.
    #[arg(long)]
    no_fill: bool,
    /// Delete the keys at the end.
    #[arg(long)]
    clean: bool,
    /// Makes the same choices each time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl Bench {
    /// How many threads the runtime is to have.
    pub(crate) fn threads(&self) -> usize {
        self.threads.into()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Get,
    Put,
    Add,
    Delete,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Get, Self::Put, Self::Add, Self::Delete];

    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Add => "add",
            Self::Delete => "delete",
        }
    }
}

/// How often each kind of operation comes, in parts of the sum.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mix([u32; 4]);

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut shares = [0; 4];
        for part in text.split(',') {
            let right = || format!("{part:?} is no share; write the mix like get=90,put=9,add=1");
            let (name, share) = part.trim().split_once('=').ok_or_else(right)?;
            let at = Kind::ALL.iter().position(|k| k.name() == name).ok_or_else(right)?;
            shares[at] = share.parse::<u32>().ok().filter(|s| *s <= 1_000_000).ok_or_else(right)?;
        }
        if shares.iter().sum::<u32>() == 0 {
            return Err("all shares are 0; write the mix like get=50,put=50".into());
        }
        Ok(Self(shares))
    }
}

impl Mix {
    fn pick(&self, random: &mut SmallRng) -> Kind {
        let mut at = random.random_range(0..self.0.iter().sum::<u32>());
        for (kind, share) in Kind::ALL.into_iter().zip(self.0) {
            if at < share {
                return kind;
            }
            at -= share;
        }
        Kind::Get
    }
}

/// From so many bytes to so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes(usize, usize);

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        match (low.trim().parse(), high.trim().parse()) {
            (Ok(low), Ok(high)) if low <= high && high <= 8 << 20 => Ok(Self(low, high)),
            _ => Err("it must be a number of bytes up to 8388608, or two like 100-2000".into()),
        }
    }
}

/// Makes keys and values.
struct Data {
    prefix: String,
    digits: usize,
    keys: u64,
    sizes: Sizes,
    /// Random bytes; a value is a piece of them, so that making it costs nothing.
    pool: Bytes,
}

impl Data {
    fn new(args: &Bench) -> anyhow::Result<Self> {
        let least = args.prefix.len() + (args.keys - 1).to_string().len();
        let size = args.key_size as usize;
        if size < least {
            let message = format!(
                "--key-size is {size}; {} keys that begin with {:?} need {least} at least",
                args.keys, args.prefix
            );
            return Err(fault(Code::Usage, message));
        }
        let mut pool = vec![0; args.value_size.1 + (1 << 16)];
        SmallRng::seed_from_u64(args.seed).fill_bytes(&mut pool);
        let digits = size - args.prefix.len();
        Ok(Self { prefix: args.prefix.clone(), digits, keys: args.keys, sizes: args.value_size, pool: pool.into() })
    }

    fn key(&self, number: u64) -> Bytes {
        format!("{}{number:0digits$}", self.prefix, digits = self.digits).into()
    }

    /// Keys that hold numbers are others than those that hold bytes.
    fn counter(&self, number: u64) -> Bytes {
        format!("{}+{number:0digits$}", self.prefix, digits = self.digits.saturating_sub(1)).into()
    }

    fn value(&self, random: &mut SmallRng) -> Bytes {
        let length = random.random_range(self.sizes.0..=self.sizes.1);
        let start = random.random_range(0..=self.pool.len() - length);
        self.pool.slice(start..start + length)
    }

    fn op(&self, kind: Kind, random: &mut SmallRng) -> Op {
        let number = random.random_range(0..self.keys);
        match kind {
            Kind::Get => Op::get(self.key(number)),
            Kind::Put => Op::put(self.key(number), self.value(random)),
            Kind::Add => Op::add(self.counter(number), 1.0),
            Kind::Delete => Op::delete(self.key(number)),
        }
    }
}

/// Latencies in microseconds by kind, and failures by what they were.
struct Stats {
    latencies: BTreeMap<Kind, Histogram<u64>>,
    errors: BTreeMap<String, u64>,
    last: Option<Error>,
}

impl Stats {
    fn new() -> Self {
        Self { latencies: BTreeMap::new(), errors: BTreeMap::new(), last: None }
    }

    fn add(&mut self, kind: Kind, latency: Duration) {
        let histogram = match self.latencies.get_mut(&kind) {
            Some(histogram) => histogram,
            None => match histogram() {
                Some(new) => self.latencies.entry(kind).or_insert(new),
                None => return,
            },
        };
        histogram.saturating_record((latency.as_micros() as u64).max(1));
    }

    fn fail(&mut self, error: Error) {
        *self.errors.entry(format!("{:?}", error.code())).or_default() += 1;
        self.last = Some(error);
    }

    fn merge(&mut self, other: &Self) {
        for (kind, theirs) in &other.latencies {
            if let Some(mine) = self.latencies.get_mut(kind) {
                // Same bounds on both sides: it can't fail.
                let _ = mine.add(theirs);
            } else {
                self.latencies.insert(*kind, theirs.clone());
            }
        }
        for (name, number) in &other.errors {
            *self.errors.entry(name.clone()).or_default() += number;
        }
        self.last = self.last.take().or_else(|| other.last.clone());
    }

    fn all(&self) -> Option<Histogram<u64>> {
        let mut all = histogram()?;
        for one in self.latencies.values() {
            let _ = all.add(one);
        }
        Some(all)
    }

    fn failures(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// 1 µs to 10 minutes, to three digits.
fn histogram() -> Option<Histogram<u64>> {
    Histogram::new_with_bounds(1, 600_000_000, 3).ok()
}

fn locked(stats: &Mutex<Stats>) -> MutexGuard<'_, Stats> {
    stats.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) async fn run(context: &Context, args: Bench) -> anyhow::Result<()> {
    let data = Arc::new(Data::new(&args)?);
    let keyspace = context.keyspace(&args.keyspace).await?;
    if !args.no_fill {
        let mut random = SmallRng::seed_from_u64(args.seed);
        each_key(&keyspace, args.keys, "keys put", |n| Op::put(data.key(n), data.value(&mut random))).await?;
    }
    let (stats, time) = measure(&args, &keyspace, &data).await;
    if args.clean {
        each_key(&keyspace, args.keys, "keys deleted", |n| Op::delete(data.key(n))).await?;
        if args.mix.0[2] > 0 {
            each_key(&keyspace, args.keys, "counters deleted", |n| Op::delete(data.counter(n))).await?;
        }
    }
    if context.json() {
        emit_json(&json_report(&args, &stats, time))?;
    } else {
        emit(text_report(&args, &stats, time))?;
    }
    match &stats.last {
        Some(error) => {
            let kinds: Vec<String> = stats.errors.iter().map(|(name, n)| format!("{name} {}", count(*n))).collect();
            Err(fault(
                client_code(error.code()),
                format!("{} operations failed ({}), such as: {error}", count(stats.failures()), kinds.join(", ")),
            ))
        }
        None => Ok(()),
    }
}

/// One operation on each key, in batches.
async fn each_key(keyspace: &Keyspace, keys: u64, noun: &str, mut op: impl FnMut(u64) -> Op) -> anyhow::Result<()> {
    let bar = count_bar(Some(keys), noun);
    let batches: Vec<u64> = (0..keys.div_ceil(FILL_BATCH)).collect();
    let mut running = stream::iter(batches)
        .map(|batch| {
            let numbers = batch * FILL_BATCH..((batch + 1) * FILL_BATCH).min(keys);
            let ops: Vec<Op> = numbers.map(&mut op).collect();
            let keyspace = keyspace.clone();
            async move { keyspace.batch(ops).await }
        })
        .buffer_unordered(FILL_AT_ONCE);
    while let Some(answers) = running.next().await {
        bar.inc(answers.len() as u64);
        for answer in answers {
            answer?;
        }
    }
    bar.finish_and_clear();
    Ok(())
}

async fn measure(args: &Bench, keyspace: &Keyspace, data: &Arc<Data>) -> (Stats, Duration) {
    let recorders: Arc<Vec<Mutex<Stats>>> = Arc::new((0..RECORDERS).map(|_| Mutex::new(Stats::new())).collect());
    let bar = time_bar(args.duration);
    let start = Instant::now();
    let end = start + args.duration;
    let due = args.rate.map(|rate| Arc::new(Schedule { start, rate, next: AtomicU64::new(0) }));
    let mut workers = JoinSet::new();
    for number in 0..args.concurrency {
        let worker = Worker {
            keyspace: keyspace.clone(),
            data: data.clone(),
            mix: args.mix.clone(),
            batch: args.batch as usize,
            random: SmallRng::seed_from_u64(args.seed ^ (u64::from(number) << 32)),
        };
        let (recorders, due) = (recorders.clone(), due.clone());
        let at = number as usize % RECORDERS;
        workers.spawn(async move { worker.run(end, due.as_deref(), &recorders[at]).await });
    }
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    let mut shown = (start, 0);
    loop {
        tokio::select! {
            ended = workers.join_next() => if ended.is_none() { break },
            _ = tick.tick() => {
                bar.set_position(start.elapsed().as_millis() as u64);
                let stats = sum(&recorders);
                if let Some(all) = stats.all() {
                    let (now, done) = (Instant::now(), all.len());
                    let rate = (done - shown.1) as f64 / (now - shown.0).as_secs_f64().max(0.001);
                    shown = (now, done);
                    let p99 = millis(all.value_at_quantile(0.99));
                    bar.set_message(format!("{} operations/s  p99 {p99} ms  {} failed", count(rate as u64), stats.failures()));
                }
            }
        }
    }
    let time = start.elapsed();
    bar.finish_and_clear();
    (sum(&recorders), time)
}

fn sum(recorders: &[Mutex<Stats>]) -> Stats {
    let mut sum = Stats::new();
    for recorder in recorders {
        sum.merge(&locked(recorder));
    }
    sum
}

/// When calls are due in the open loop.
struct Schedule {
    start: Instant,
    rate: u64,
    next: AtomicU64,
}

impl Schedule {
    fn next(&self) -> Instant {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let nanos = u128::from(number) * 1_000_000_000 / u128::from(self.rate);
        self.start + Duration::from_nanos(nanos as u64)
    }
}

struct Worker {
    keyspace: Keyspace,
    data: Arc<Data>,
    mix: Mix,
    batch: usize,
    random: SmallRng,
}

impl Worker {
    async fn run(mut self, end: Instant, schedule: Option<&Schedule>, recorder: &Mutex<Stats>) {
        loop {
            let from = match schedule {
                Some(schedule) => {
                    let due = schedule.next();
                    if due >= end {
                        return;
                    }
                    if Instant::now() < due {
                        tokio::time::sleep_until(due.into()).await;
                        // Timers are exact to a millisecond; that is not the keyspace's latency.
                        Instant::now()
                    } else {
                        due
                    }
                }
                None => Instant::now(),
            };
            // A backlog is worked off after the end too, but not for ever.
            if Instant::now() >= end + Duration::from_secs(if schedule.is_some() { 10 } else { 0 }) {
                return;
            }
            let kinds: Vec<Kind> = (0..self.batch).map(|_| self.mix.pick(&mut self.random)).collect();
            let ops: Vec<Op> = kinds.iter().map(|kind| self.data.op(*kind, &mut self.random)).collect();
            let answers = self.keyspace.batch(ops).await;
            let latency = from.elapsed();
            let mut stats = locked(recorder);
            for (kind, answer) in kinds.into_iter().zip(answers) {
                match answer {
                    Ok(_) => stats.add(kind, latency),
                    Err(error) => stats.fail(error),
                }
            }
        }
    }
}

fn millis(micros: u64) -> String {
    format!("{:.3}", micros as f64 / 1000.0)
}

fn text_report(args: &Bench, stats: &Stats, time: Duration) -> String {
    let Sizes(low, high) = args.value_size;
    let values = if low == high { size(low as u64) } else { format!("{} to {}", size(low as u64), size(high as u64)) };
    let calls = match args.rate {
        Some(rate) => format!("open loop at {} calls/s with at most {} at once", count(rate), args.concurrency),
        None => format!("closed loop, {} at once", args.concurrency),
    };
    let mut text = format!(
        "{}: {} keys of {} B, values of {values}, {calls}, {} in a call, {:.1} s\n",
        args.keyspace,
        count(args.keys),
        args.key_size,
        args.batch,
        time.as_secs_f64()
    );
    let mut rows: Vec<(&str, Histogram<u64>)> =
        stats.latencies.iter().map(|(kind, h)| (kind.name(), h.clone())).collect();
    if rows.len() > 1 {
        rows.extend(stats.all().map(|all| ("all", all)));
    }
    text += &table(
        &["OPERATION", "COUNT", "PER SECOND", "MEAN ms", "P50 ms", "P90 ms", "P99 ms", "P99.9 ms", "MAX ms"],
        rows.iter().map(|(name, h)| {
            let quantile = |q| millis(h.value_at_quantile(q));
            [
                name.to_string(),
                count(h.len()),
                count((h.len() as f64 / time.as_secs_f64()) as u64),
                format!("{:.3}", h.mean() / 1000.0),
                quantile(0.5),
                quantile(0.9),
                quantile(0.99),
                quantile(0.999),
                millis(h.max()),
            ]
        }),
    );
    text
}

fn json_report(args: &Bench, stats: &Stats, time: Duration) -> serde_json::Value {
    let one = |h: &Histogram<u64>| {
        json!({
            "count": h.len(),
            "perSecond": h.len() as f64 / time.as_secs_f64(),
            "microseconds": {
                "mean": h.mean(), "p50": h.value_at_quantile(0.5), "p90": h.value_at_quantile(0.9),
                "p99": h.value_at_quantile(0.99), "p99.9": h.value_at_quantile(0.999), "max": h.max(),
            },
        })
    };
    let mut operations: serde_json::Map<String, serde_json::Value> =
        stats.latencies.iter().map(|(kind, h)| (kind.name().to_string(), one(h))).collect();
    operations.extend(stats.all().map(|all| ("all".to_string(), one(&all))));
    json!({
        "keyspace": args.keyspace,
        "loop": if args.rate.is_some() { "open" } else { "closed" },
        "rate": args.rate,
        "concurrency": args.concurrency,
        "batch": args.batch,
        "keys": args.keys,
        "keySize": args.key_size,
        "valueSize": [args.value_size.0, args.value_size.1],
        "seconds": time.as_secs_f64(),
        "operations": operations,
        "errors": stats.errors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixes_and_sizes_are_read() {
        assert_eq!("get=90,put=10".parse(), Ok(Mix([90, 10, 0, 0])));
        assert!("get=0".parse::<Mix>().unwrap_err().contains("all shares are 0"));
        assert!("scan=5".parse::<Mix>().unwrap_err().contains("get=90"));
        assert_eq!("100".parse(), Ok(Sizes(100, 100)));
        assert_eq!("100-2000".parse(), Ok(Sizes(100, 2000)));
        assert!("2000-100".parse::<Sizes>().is_err());
    }

    #[test]
    fn a_mix_is_kept() {
        let mix: Mix = "get=3,add=1".parse().unwrap();
        let mut random = SmallRng::seed_from_u64(7);
        let adds = (0..10_000).filter(|_| mix.pick(&mut random) == Kind::Add).count();
        assert!((2_000..3_000).contains(&adds), "{adds}");
    }

    #[test]
    fn calls_are_due_at_the_rate() {
        let start = Instant::now();
        let schedule = Schedule { start, rate: 1000, next: AtomicU64::new(0) };
        assert_eq!(schedule.next(), start);
        assert_eq!(schedule.next(), start + Duration::from_millis(1));
    }
}
