//! Vasto beside its peers, in turn in one run: ratios with their spread, what an operation costs, latencies, memory.
//! `./dev bench` builds and runs it; it starts and stops everything itself, on loopback, in a temporary folder.

mod compare;
mod data;
mod db_bench;
mod embedded;
mod etcd;
mod files;
mod flame;
mod growth;
mod load;
mod peers;
mod process;
mod redis;
mod report;
mod sample;
mod vasto;
mod watchers;
mod ycsb;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand, ValueEnum};

use compare::Row;
use load::{Load, Work};
use peers::Peer;
use report::{Machine, Measured, Report};
use vasto::{Setup, Vasto};

/// The store's, so that RocksDB embedded differs from it in nothing else; redis-benchmark has one of its own too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Needed for a full run, with room for compaction.
const FREE_DISK: u64 = 6 << 30;
/// The parts of a run that are no comparisons of rates.
const FILES: &str = "files";
const YCSB: &str = "ycsb";
const GROWTH: &str = "growth";
const WATCHERS: &str = "watchers";

/// Runs Vasto and its peers in turn and prints ratios.
#[derive(Parser, Debug)]
#[command(name = "vasto-bench", args_conflicts_with_subcommands = true)]
struct Args {
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each measurement takes.
    #[arg(long, value_name = "S", default_value_t = 4.0, value_parser = seconds)]
    seconds: f64,
    /// Only these comparisons, or groups of them; files, ycsb, growth and watchers are groups too.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Topology watchers of one operator (10,000 unless given).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(10..=50_000))]
    watchers: Option<u32>,
    /// For a look: 2 rounds of 2 s, less data to move, and 1,000 watchers.
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// The regression bench: few short rounds, and it fails if the best ratio of the rounds is below its floor.
    #[arg(long, conflicts_with_all = ["rounds", "seconds", "only", "quick", "write"])]
    check: bool,
    /// Write all that was measured to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Rewrite docs/performance.md's generated part and docs/performance.svg.
    #[arg(long, conflicts_with = "only")]
    write: bool,
    /// Draw a flame graph of Vasto's server at each of its comparisons into this folder (needs perf and inferno).
    #[arg(long, value_name = "DIR", conflicts_with_all = ["check", "write"])]
    flame: Option<PathBuf>,
    /// Leave these peers out.
    #[arg(long, value_name = "PEERS", value_delimiter = ',')]
    without: Vec<Peer>,
    /// Where the temporary folder is made: on the disk that is to be measured.
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// The day, for the report.
    #[arg(long, value_name = "DATE", default_value = "undated")]
    date: String,
    #[command(subcommand)]
    child: Option<Child>,
}

/// What it runs as children of its own.
#[derive(Subcommand, Debug)]
enum Child {
    #[command(hide = true)]
    Load(Load),
    #[command(hide = true)]
    Embedded(embedded::Embedded),
    #[command(hide = true)]
    EtcdLoad(etcd::EtcdLoad),
    #[command(hide = true)]
    Resize(files::Resize),
    #[command(hide = true)]
    TopologyServer(watchers::Serve),
}

/// A choice as the command line has it.
pub fn word(choice: &impl ValueEnum) -> String {
    choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.5..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err("it must be a number from 0.5 to 60".into()),
    }
}

/// What all parts of a run share.
pub struct Bench {
    folder: PathBuf,
    rounds: u32,
    seconds: f64,
    quick: bool,
    /// Where flame graphs go.
    flame: Option<PathBuf>,
}

impl Bench {
    /// For parts that take long.
    fn few_rounds(&self) -> u32 {
        self.rounds.min(3)
    }

    /// A line for whoever waits.
    fn say(&self, line: &str) {
        eprintln!("bench: {line}");
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.child {
        Some(Child::Load(load)) => load::run(load).map(|()| true),
        Some(Child::Embedded(embedded)) => embedded::run(embedded).map(|()| true),
        Some(Child::EtcdLoad(load)) => etcd::run(load).map(|()| true),
        Some(Child::Resize(resize)) => files::run_resize(resize).map(|()| true),
        Some(Child::TopologyServer(serve)) => watchers::serve(serve).map(|()| true),
        None => bench(args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vasto-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing is below its floor.
fn bench(args: Args) -> anyhow::Result<bool> {
    let (rows, parts) = chosen(&args)?;
    let left_out: BTreeSet<Peer> = args.without.iter().copied().collect();
    let rows: Vec<Row> = rows.into_iter().filter(|row| compare::without(row, &left_out)).collect();
    let missing = peers::missing(&compare::needs(&rows))?;
    let rows: Vec<Row> = rows.into_iter().filter(|row| compare::without(row, &missing)).collect();
    if rows.is_empty() && parts.is_empty() {
        bail!("nothing is left to be measured: all that --only names needs a peer that is missing or left out");
    }
    if !rows.is_empty() || parts.iter().any(|part| *part != WATCHERS) {
        vasto::binary()?;
    }

    let parent = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    check_disk(&parent)?;
    let folder = tempfile::Builder::new()
        .prefix("vasto-bench-")
        .tempdir_in(&parent)
        .with_context(|| format!("can't make a folder in {}; choose another with --folder", parent.display()))?;
    process::end_children_on_signals(folder.path())?;
    let (rounds, seconds) = match (args.quick, args.check) {
        (true, _) => (2, 2.0),
        (_, true) => (3, 1.0),
        _ => (args.rounds, args.seconds),
    };
    let bench =
        Bench { folder: folder.path().to_owned(), rounds, seconds, quick: args.quick, flame: args.flame.clone() };

    let mut report = Report {
        machine: Machine::here(args.date.clone()),
        rounds,
        seconds,
        ratios: Vec::new(),
        measured: Vec::new(),
        ycsb: Vec::new(),
        growth: Vec::new(),
        watchers: None,
        notes: Vec::new(),
    };
    if !left_out.is_empty() {
        let names: Vec<String> = left_out.iter().map(word).collect();
        report.notes.push(format!("Left out: {}.", names.join(", ")));
    }
    if !missing.is_empty() {
        report.notes.push("etcd is not there, so it was not measured.".to_owned());
    }
    (report.ratios, report.measured) = compare::run(&bench, &rows)?;
    if parts.contains(FILES) {
        let (ratios, measured) = files::run(&bench)?;
        report.ratios.extend(ratios);
        report.measured.extend(measured);
    }
    if parts.contains(YCSB) {
        report.ycsb = run_ycsb(&bench)?;
    }
    if parts.contains(GROWTH) {
        report.growth = growth::run(&bench)?;
    }
    if parts.contains(WATCHERS) {
        bench.say("watchers of one operator");
        let size = args.watchers.unwrap_or(if args.quick { 1_000 } else { 10_000 });
        report.watchers = Some(watchers::run(&watchers::Size::of(size as usize))?);
    }

    print!("{}", report.text());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(file, text + "\n").with_context(|| format!("can't write {}", file.display()))?;
    }
    if args.write {
        report.write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs"))?;
    }
    if !args.check {
        return Ok(true);
    }
    let (text, passed, failed) = report.check();
    println!("\n{text}{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// The comparisons that were asked for, and the other parts.
fn chosen(args: &Args) -> anyhow::Result<(Vec<Row>, BTreeSet<&'static str>)> {
    let mut rows = compare::rows();
    let mut parts = BTreeSet::from([FILES, YCSB, GROWTH, WATCHERS]);
    if args.check {
        rows.retain(|row| row.floor.is_some());
        parts.clear();
    }
    if !args.only.is_empty() {
        let mut known: Vec<&str> = rows.iter().flat_map(|row| [row.group, row.name]).chain(parts.clone()).collect();
        known.sort_unstable();
        known.dedup();
        if let Some(unknown) = args.only.iter().find(|name| !known.contains(&name.as_str())) {
            bail!("--only {unknown}: no such comparison; there are {}", known.join(", "));
        }
        let wanted = |name: &str| args.only.iter().any(|only| only == name);
        rows.retain(|row| wanted(row.group) || wanted(row.name));
        parts.retain(|part| wanted(part));
    }
    Ok((rows, parts))
}

fn check_disk(folder: &Path) -> anyhow::Result<()> {
    use nix::sys::statfs::{TMPFS_MAGIC, statfs};
    let disk = statfs(folder).with_context(|| format!("can't look at {}", folder.display()))?;
    if disk.filesystem_type() == TMPFS_MAGIC {
        bail!("{} is in memory, where a sync costs nothing; name a folder on a disk with --folder", folder.display());
    }
    let free = disk.blocks_available() * u64::try_from(disk.block_size()).unwrap_or(1);
    if free < FREE_DISK {
        let gib = |bytes: u64| bytes >> 30;
        bail!("{} has {} GiB free; it must be {} at least", folder.display(), gib(free), gib(FREE_DISK));
    }
    Ok(())
}

fn run_ycsb(bench: &Bench) -> anyhow::Result<Vec<Measured>> {
    let vasto = Vasto::start(&bench.folder, YCSB, Setup::ONE)?;
    vasto.run(&vasto.load(Work::Fill, ycsb::RECORDS, ycsb::RECORD))?;
    let measured = ycsb::Workload::ALL.into_iter().map(|workload| {
        let load = vasto.load(workload.into(), ycsb::RECORDS, ycsb::RECORD);
        let load = Load { callers: ycsb::CALLERS, seconds: bench.seconds, ..load };
        let samples = vasto.measure(&load, bench.few_rounds())?;
        let measured = Measured::new(workload.words().to_owned(), samples);
        bench.say(&format!("YCSB {}: {}/s", measured.name, report::count(measured.rate())));
        Ok(measured)
    });
    measured.collect()
}
