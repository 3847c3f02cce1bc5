//! `vasto-bench embedded`: RocksDB in this process, with no Vasto around it, over the same keys and values; in a child
//! of its own. What a store can't surpass.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, Options, WriteBatch, WriteOptions,
};

use crate::data::{self, Data};
use crate::process::{own_cpu, peak_memory_of, run as run_process};
use crate::sample::{Sample, histogram, record};
use crate::word;

/// As a store's.
const CACHE: usize = 64 << 20;
const WRITE_BUFFER: usize = 16 << 20;
/// The one column family.
const FAMILY: &str = "default";

/// What the threads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Put each key once.
    Fill,
    /// Put in batches.
    Put,
    /// Get one by one.
    Get,
    /// Get many at once.
    MultiGet,
}

/// Arguments of `vasto-bench embedded`.
#[derive(Args, Clone, Debug)]
pub struct Embedded {
    #[arg(long)]
    pub folder: PathBuf,
    #[arg(long)]
    pub work: Work,
    #[arg(long, default_value_t = 1)]
    pub threads: u32,
    #[arg(long, default_value_t = 1)]
    pub batch: u32,
    /// Sync each write; those of other threads that wait are synced with it.
    #[arg(long)]
    pub sync: bool,
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    #[arg(long)]
    pub keys: u64,
    #[arg(long)]
    pub value_size: usize,
}

impl Embedded {
    /// Runs it as a child.
    pub fn measure(&self, logs: &Path) -> anyhow::Result<Sample> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("embedded").arg("--folder").arg(&self.folder);
        for (flag, value) in [
            ("--work", word(&self.work)),
            ("--threads", self.threads.to_string()),
            ("--batch", self.batch.to_string()),
            ("--seconds", self.seconds.to_string()),
            ("--keys", self.keys.to_string()),
            ("--value-size", self.value_size.to_string()),
        ] {
            command.args([flag, &value]);
        }
        command.args(self.sync.then_some("--sync"));
        let within = Duration::from_secs_f64(self.seconds + 60.0);
        Sample::parse(&run_process("embedded", logs, within, &mut command)?.0)
    }
}

fn open(folder: &Path) -> anyhow::Result<DB> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_max_background_jobs(2);
    options.set_max_open_files(512);
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(CACHE));
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(5);
    table.set_bloom_filter(10.0, false);
    let mut rows = Options::default();
    rows.set_write_buffer_size(WRITE_BUFFER);
    rows.set_max_write_buffer_number(3);
    rows.set_level_compaction_dynamic_level_bytes(true);
    rows.set_compression_type(DBCompressionType::Lz4);
    rows.set_bottommost_compression_type(DBCompressionType::Zstd);
    rows.set_block_based_table_factory(&table);
    DB::open_cf_descriptors(&options, folder, [ColumnFamilyDescriptor::new(FAMILY, rows)])
        .with_context(|| format!("RocksDB in {}", folder.display()))
}

/// Runs it and prints its measurement.
pub fn run(args: &Embedded) -> anyhow::Result<()> {
    let data = Data::new(args.keys, args.value_size, true);
    let db = open(&args.folder)?;
    let (start, before) = (Instant::now(), own_cpu());
    let batch = if matches!(args.work, Work::Put | Work::MultiGet) { args.batch } else { 1 };
    let mut sample = if args.work == Work::Fill {
        fill(&db, &data)?;
        let operations = args.keys as f64;
        Sample { operations, seconds: start.elapsed().as_secs_f64(), ..Sample::default() }
    } else {
        let end = start + Duration::from_secs_f64(args.seconds);
        let mut all = histogram()?;
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let threads: Vec<_> =
                (0..args.threads).map(|_| scope.spawn(|| measure(&db, &data, args, batch, end))).collect();
            for thread in threads {
                let Ok(latencies) = thread.join() else { bail!("a thread panicked") };
                all.add(latencies?)?;
            }
            Ok(())
        })?;
        Sample::new(&all, batch, start.elapsed())
    };
    sample.client_cpu = Some((own_cpu() - before).as_secs_f64());
    sample.memory = Some(peak_memory_of(std::process::id())?);
    sample.print()
}

fn fill(db: &DB, data: &Data) -> anyhow::Result<()> {
    let mut random = SmallRng::seed_from_u64(0);
    for number in 0..data.keys() {
        db.put(data::key(number), data.value(&mut random))?;
    }
    db.flush()?;
    Ok(())
}

fn measure(db: &DB, data: &Data, args: &Embedded, batch: u32, end: Instant) -> anyhow::Result<Histogram<u64>> {
    let mut random = SmallRng::seed_from_u64(rand::random());
    let mut latencies = histogram()?;
    let family = db.cf_handle(FAMILY).context("no column family")?;
    let mut options = WriteOptions::default();
    options.set_sync(args.sync);
    let missing = "a get found nothing, though all keys were filled in";
    loop {
        let from = Instant::now();
        if from >= end {
            return Ok(latencies);
        }
        match args.work {
            Work::Put => {
                let mut writes = WriteBatch::default();
                for _ in 0..batch {
                    writes.put(data.random_key(&mut random), data.value(&mut random));
                }
                db.write_opt(writes, &options)?;
            }
            Work::Get => {
                db.get_pinned(data.random_key(&mut random))?.context(missing)?;
            }
            Work::MultiGet => {
                let keys: Vec<_> = (0..batch).map(|_| data.random_key(&mut random)).collect();
                for found in db.batched_multi_get_cf(family, &keys, false) {
                    found?.context(missing)?;
                }
            }
            Work::Fill => bail!("filling in is not measured by time"),
        }
        record(&mut latencies, from.elapsed());
    }
}
