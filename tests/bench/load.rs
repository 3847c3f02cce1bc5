//! `vasto-bench load`: callers of Vasto's client in a process of their own, so that their CPU time is told apart from
//! the server's. Prints one line of JSON.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use vasto_client::{Client, Keyspace, Op, ScanOptions};

use crate::data::{self, Data};
use crate::process::own_cpu;
use crate::sample::{Sample, histogram, record};
use crate::word;
use crate::ycsb::{Action, Chooser, Workload};

/// Puts in one batch while keys are filled in, and batches at once.
const FILL_BATCH: u64 = 256;
const FILL_AT_ONCE: usize = 8;
/// How long a backlog of the open loop is worked off after the end.
const BACKLOG: Duration = Duration::from_secs(10);

/// An open loop's first calls are not counted: they meet a client that has just begun.
const WARM_UP: Duration = Duration::from_secs(1);

/// What a load that runs until it is told to end says when it counts.
pub const RUNNING: &str = "the load runs";

/// What callers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Put each key once.
    Fill,
    Put,
    Get,
    /// Half puts, half gets.
    Mixed,
    A,
    B,
    C,
    D,
    E,
    F,
}

impl Work {
    fn workload(self) -> Option<Workload> {
        Workload::ALL.into_iter().find(|workload| Self::from(*workload) == self)
    }
}

impl From<Workload> for Work {
    fn from(workload: Workload) -> Self {
        match workload {
            Workload::A => Self::A,
            Workload::B => Self::B,
            Workload::C => Self::C,
            Workload::D => Self::D,
            Workload::E => Self::E,
            Workload::F => Self::F,
        }
    }
}

/// Arguments of `vasto-bench load`.
#[derive(Args, Clone, Debug)]
pub struct Load {
    #[arg(long)]
    pub operator: String,
    #[arg(long)]
    pub keyspace: String,
    #[arg(long)]
    pub work: Work,
    #[arg(long, default_value_t = 16)]
    pub callers: u32,
    #[arg(long, default_value_t = 1)]
    pub batch: u32,
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    #[arg(long)]
    pub keys: u64,
    #[arg(long)]
    pub value_size: usize,
    #[arg(long)]
    pub incompressible: bool,
    /// Calls a second, whether or not earlier ones are answered.
    #[arg(long)]
    pub rate: Option<u64>,
    /// End before the time is over when standard input ends.
    #[arg(long)]
    pub until_input_ends: bool,
}

impl Load {
    /// The command line that means this.
    pub fn command_line(&self) -> Vec<String> {
        let mut line: Vec<String> = ["load", "--operator", &self.operator, "--keyspace", &self.keyspace]
            .iter()
            .map(|word| (*word).to_owned())
            .collect();
        let settings = [
            ("--work", word(&self.work)),
            ("--callers", self.callers.to_string()),
            ("--batch", self.batch.to_string()),
            ("--seconds", self.seconds.to_string()),
            ("--keys", self.keys.to_string()),
            ("--value-size", self.value_size.to_string()),
        ];
        line.extend(settings.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        line.extend(self.rate.into_iter().flat_map(|rate| ["--rate".to_owned(), rate.to_string()]));
        line.extend(self.incompressible.then(|| "--incompressible".to_owned()));
        line.extend(self.until_input_ends.then(|| "--until-input-ends".to_owned()));
        line
    }
}

/// Runs the load and prints its measurement.
pub fn run(args: &Load) -> anyhow::Result<()> {
    // One thread, as redis-benchmark has.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(load(args))?.print()
}

async fn load(args: &Load) -> anyhow::Result<Sample> {
    let data = Arc::new(Data::new(args.keys, args.value_size, !args.incompressible));
    let client = Client::connect(&args.operator)?;
    let keyspace = client.keyspace(&args.keyspace).await?;
    // Connections to all stores are made before the clock starts.
    let mut first = keyspace.scan(ScanOptions::new().limit(1));
    if let Some(Err(error)) = first.next().await {
        return Err(error).context("the first scan");
    }
    let gets = || keyspace.batch((0..256).map(|n| Op::get(data::key(n))));
    // Two at once, since there are two connections to a store.
    let (one, other) = futures::join!(gets(), gets());
    for answer in one.into_iter().chain(other) {
        answer.context("the first gets")?;
    }
    match args.work {
        Work::Fill => fill(&keyspace, &data).await,
        _ => measure(args, &keyspace, &data).await,
    }
}

async fn fill(keyspace: &Keyspace, data: &Data) -> anyhow::Result<Sample> {
    let (start, cpu) = (Instant::now(), own_cpu());
    let mut random = SmallRng::seed_from_u64(0);
    let batches = (0..data.keys().div_ceil(FILL_BATCH)).map(|batch| {
        let numbers = batch * FILL_BATCH..((batch + 1) * FILL_BATCH).min(data.keys());
        let ops: Vec<Op> = numbers.map(|n| Op::put(data::key(n), data.value(&mut random))).collect();
        let keyspace = keyspace.clone();
        async move { keyspace.batch(ops).await }
    });
    let mut running = stream::iter(batches).buffer_unordered(FILL_AT_ONCE);
    while let Some(answers) = running.next().await {
        for answer in answers {
            answer.context("filling in keys")?;
        }
    }
    let client_cpu = Some((own_cpu() - cpu).as_secs_f64());
    Ok(Sample {
        operations: data.keys() as f64,
        seconds: start.elapsed().as_secs_f64(),
        client_cpu,
        ..Sample::default()
    })
}

async fn measure(args: &Load, keyspace: &Keyspace, data: &Arc<Data>) -> anyhow::Result<Sample> {
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let warm_up = if args.rate.is_some() { WARM_UP } else { Duration::ZERO };
    let counted = start + warm_up;
    let end = counted + Duration::from_secs_f64(args.seconds);
    let schedule = args.rate.map(|rate| Arc::new(Schedule { start, rate, next: AtomicU64::new(0) }));
    let chooser = args.work.workload().map(|workload| Arc::new(Chooser::new(workload, args.keys)));
    let mut callers = JoinSet::new();
    for number in 0..args.callers {
        let caller = Caller {
            keyspace: keyspace.clone(),
            data: data.clone(),
            work: args.work,
            batch: args.batch,
            chooser: chooser.clone(),
            random: SmallRng::seed_from_u64(u64::from(number) ^ rand::random::<u64>()),
        };
        callers.spawn(caller.run(counted, end, schedule.clone(), stop.clone()));
    }
    if !warm_up.is_zero() {
        tokio::time::sleep_until(counted.into()).await;
    }
    let cpu = own_cpu();
    if args.until_input_ends {
        eprintln!("{RUNNING}");
        tokio::spawn(async move {
            let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
            stop.store(true, Ordering::Relaxed);
        });
    }
    let mut all = histogram()?;
    while let Some(done) = callers.join_next().await {
        all.add(done.context("a caller panicked")??)?;
    }
    let client_cpu = Some((own_cpu() - cpu).as_secs_f64());
    Ok(Sample { client_cpu, ..Sample::new(&all, args.batch, counted.elapsed()) })
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
        self.start + Duration::from_secs_f64(number as f64 / self.rate as f64)
    }
}

struct Caller {
    keyspace: Keyspace,
    data: Arc<Data>,
    work: Work,
    batch: u32,
    chooser: Option<Arc<Chooser>>,
    random: SmallRng,
}

impl Caller {
    async fn run(
        mut self,
        counted: Instant,
        end: Instant,
        schedule: Option<Arc<Schedule>>,
        stop: Arc<AtomicBool>,
    ) -> anyhow::Result<Histogram<u64>> {
        let mut latencies = histogram()?;
        while !stop.load(Ordering::Relaxed) {
            let mut from = Instant::now();
            if let Some(schedule) = &schedule {
                let due = schedule.next();
                if due >= end {
                    break;
                }
                if from < due {
                    // Timers are exact to a millisecond; that is not the keyspace's latency.
                    tokio::time::sleep_until(due.into()).await;
                    from = Instant::now();
                } else {
                    from = due;
                }
                if Instant::now() >= end + BACKLOG {
                    bail!("the open loop's backlog is not worked off {} s after its end", BACKLOG.as_secs());
                }
            } else if from >= end {
                break;
            }
            self.call().await?;
            if from >= counted {
                record(&mut latencies, from.elapsed());
            }
        }
        Ok(latencies)
    }

    async fn call(&mut self) -> anyhow::Result<()> {
        if let Some(chooser) = self.chooser.clone() {
            let action = chooser.choose(&mut self.random);
            return self.act(action, &chooser).await;
        }
        let put = match self.work {
            Work::Mixed => self.random.random(),
            work => work == Work::Put,
        };
        if self.batch > 1 {
            let ops: Vec<Op> = (0..self.batch).map(|_| self.op(put)).collect();
            for answer in self.keyspace.batch(ops).await {
                let answer = answer?;
                if !put && answer.value().is_none() {
                    bail!("a get found nothing, though all keys were filled in");
                }
            }
            return Ok(());
        }
        let key = self.data.random_key(&mut self.random);
        if put {
            self.keyspace.put(key, self.data.value(&mut self.random)).await?;
        } else {
            found(&self.keyspace, &key).await?;
        }
        Ok(())
    }

    fn op(&mut self, put: bool) -> Op {
        let key = self.data.random_key(&mut self.random);
        if put { Op::put(key, self.data.value(&mut self.random)) } else { Op::get(key) }
    }

    async fn act(&mut self, action: Action, chooser: &Chooser) -> anyhow::Result<()> {
        let value = self.data.value(&mut self.random);
        match action {
            Action::Read(number) => found(&self.keyspace, &data::key(number)).await?,
            Action::Update(number) => self.keyspace.put(data::key(number), value).await?,
            Action::Insert(number) => {
                self.keyspace.put(data::key(number), value).await?;
                chooser.inserted(number);
            }
            Action::ReadModifyWrite(number) => {
                let key = data::key(number);
                found(&self.keyspace, &key).await?;
                self.keyspace.put(key, value).await?;
            }
            Action::Scan(number, most) => {
                let mut entries = self.keyspace.scan(ScanOptions::new().after(data::key(number)).limit(most));
                while let Some(entry) = entries.next().await {
                    entry?;
                }
            }
        }
        Ok(())
    }
}

async fn found(keyspace: &Keyspace, key: &[u8]) -> anyhow::Result<()> {
    match keyspace.get(key).await? {
        Some(_) => Ok(()),
        None => bail!("{} is not there, though all keys were filled in", String::from_utf8_lossy(key)),
    }
}
