//! A whole cluster on one thread, under one seed: an operator, stores and callers over a
//! simulated network, with everything going wrong while sizes change. In the end what was
//! promised is held against what is there.
//!
//! `vasto-sim --seeds 1000` runs seeds on all cores; `vasto-sim --seed 7 --trace` replays one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check;
mod disk;
mod entropy;
mod many;
mod net;
mod plan;
mod world;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use serde_json::json;

use plan::{Act, CALLERS, Plan, STORES, machines, plan};
use world::{Book, Machine, Shared, Wish, book, settled};

/// How long the cluster has to come up, and to come to rest once all is mended.
const READY_WITHIN: Duration = Duration::from_secs(60);
const RESTS_WITHIN: Duration = Duration::from_secs(180);
/// What was acknowledged so long before a machine crashed is synced, where writes are synced each second.
const PERIOD: Duration = Duration::from_secs(3);

#[derive(Parser)]
#[command(about = "Simulates whole clusters, one for each seed, and checks what Vasto promises.", version)]
struct Args {
    /// Run this one seed, here.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, value_name = "N", default_value_t = 200, conflicts_with = "seed")]
    seeds: u64,
    /// The first of them.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "seed")]
    from: u64,
    /// Run each twice: both must leave the same trace.
    #[arg(long, conflicts_with = "seed")]
    twice: bool,
    /// How many at once; all cores unless given.
    #[arg(long, value_name = "N", conflicts_with = "seed")]
    jobs: Option<usize>,
    /// Print all that happens.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Print what each replica holds of this key in the end.
    #[arg(long, requires = "trace")]
    key: Option<String>,
    /// End after so many simulated seconds, to look at that moment.
    #[arg(long, requires = "trace", value_name = "SECONDS")]
    until: Option<f64>,
    /// Print one line of JSON.
    #[arg(long, requires = "seed", hide = true)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let Some(seed) = args.seed else { return many::run(args.from, args.seeds, args.twice, args.jobs) };
    if args.trace && std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_ansi(false).init();
    }
    entropy::sow(seed);
    // A thread of its own, so that nothing that was done before has drawn on its hash maps' seeds.
    let report = std::thread::scope(|scope| scope.spawn(|| simulate(seed, &args)).join()).expect("no panic");
    if args.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    let clean = report["violations"].as_array().is_some_and(Vec::is_empty);
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A simulation under way.
struct World<'a> {
    sim: turmoil::Sim<'a>,
    shared: Shared,
    machines: Vec<Arc<Machine>>,
    plan: &'a Plan,
    down: BTreeSet<String>,
    latency: u64,
    until: Duration,
}

impl World<'_> {
    fn machine(&self, name: &str) -> &Arc<Machine> {
        self.machines.iter().find(|m| m.name == name).expect("a machine of the plan")
    }

    fn note(&self, line: &str) {
        book(&self.shared).note(line);
    }

    fn step(&mut self) -> Result<(), String> {
        if self.sim.elapsed() > self.until {
            return Err("it was to end here".to_owned());
        }
        book(&self.shared).at = self.sim.elapsed();
        self.sim.step().map(|_| ()).map_err(|e| e.to_string())
    }

    /// Steps until `done`; whether that came in time.
    fn until(&mut self, within: Duration, done: impl Fn(&Book) -> bool) -> Result<bool, String> {
        let deadline = self.sim.elapsed() + within;
        while self.sim.elapsed() < deadline {
            if done(&book(&self.shared)) {
                return Ok(true);
            }
            self.step()?;
        }
        Ok(done(&book(&self.shared)))
    }

    fn act(&mut self, act: &Act) {
        self.note(&format!("{act:?}"));
        match act {
            Act::Scale { shards, factor } => {
                book(&self.shared).wishes.push_back(Wish::Scale { shards: *shards, factor: *factor });
            }
            Act::Replace(store) => book(&self.shared).wishes.push_back(Wish::Replace(store.clone())),
            Act::Crash(name) | Act::Kill(name) => {
                if !self.down.insert(name.clone()) {
                    return;
                }
                self.sim.crash(name.as_str());
                let mut since = self.machine(name).storage.failed();
                if matches!(act, Act::Crash(_)) {
                    let lost = self.machine(name).storage.crash();
                    self.note(&format!("{name} has lost {lost} writes"));
                    if lost > 0 {
                        since.get_or_insert(self.sim.elapsed());
                    }
                }
                if let Some(since) = since {
                    self.lost(name, since);
                }
            }
            Act::Stop(name) => {
                if !self.down.contains(name) {
                    self.machine(name).stop.lock().unwrap().cancel();
                    self.down.insert(name.clone());
                }
            }
            Act::Start(name) => {
                if self.down.remove(name) {
                    self.sim.bounce(name.as_str());
                }
            }
            Act::LoseState => {
                if self.down.contains("operator") {
                    let folder = &self.machine("operator").folder;
                    let _ = std::fs::remove_dir_all(folder);
                }
            }
            Act::Cut(a, b) => self.sim.partition(a.as_str(), b.as_str()),
            Act::CutOneWay(a, b) => self.sim.partition_oneway(a.as_str(), b.as_str()),
            Act::Mend(a, b) => self.mend(a, b),
            Act::Latency(ms) => {
                self.latency = *ms;
                self.sim.set_max_message_latency(Duration::from_millis(*ms));
            }
            Act::Skew(name, ms) => {
                self.machine(name).quirks.lock().unwrap().skew_ms = *ms;
                book(&self.shared).skewed = true;
            }
            Act::FailSync(name) => self.machine(name).storage.fail(),
            Act::Slow(name, ms) => self.machine(name).quirks.lock().unwrap().slow_ms = *ms,
        }
    }

    /// What this machine had not synced at this time is gone, and what it wrote since.
    fn lost(&self, name: &str, at: Duration) {
        let now = self.sim.elapsed();
        let mut book = book(&self.shared);
        *book.lives.entry(name.to_owned()).or_default() += 1;
        if !self.plan.synced {
            book.forgive(at.saturating_sub(PERIOD), now);
        }
    }

    fn mend(&self, a: &str, b: &str) {
        self.sim.repair(a, b);
        self.sim.repair_oneway(a, b);
        self.sim.repair_oneway(b, a);
    }

    /// Everything works again.
    fn heal(&mut self) {
        self.note("all is mended");
        book(&self.shared).look_again();
        let names = machines();
        for (i, a) in names.iter().enumerate() {
            for b in &names[i + 1..] {
                self.mend(a, b);
            }
        }
        for name in &names {
            if let Some(at) = self.machine(name).storage.failed() {
                self.lost(name, at);
                self.act(&Act::Kill(name.clone()));
            }
            if self.down.contains(name) {
                self.act(&Act::Start(name.clone()));
            }
        }
        self.act(&Act::Latency(10));
        for machine in &self.machines {
            let mut quirks = machine.quirks.lock().unwrap();
            (quirks.slow_ms, quirks.unruly) = (0, 0);
        }
    }

    fn run(&mut self) -> Result<(), String> {
        book(&self.shared).wishes.push_back(Wish::Apply(self.plan.document.clone()));
        if !self.until(READY_WITHIN, |book| settled(&book.resource))? {
            return Err(format!("it is not ready after {READY_WITHIN:?}: {}", self.resource()));
        }
        book(&self.shared).load = true;
        let begun = self.sim.elapsed();
        for (at, act) in &self.plan.acts {
            while self.sim.elapsed() < begun + *at {
                self.step()?;
            }
            self.act(act);
        }
        while self.sim.elapsed() < begun + self.plan.lasts {
            self.step()?;
        }
        self.heal();
        // Wishes may not have got through yet, and what was seen before all was mended is of no use.
        let rests = |book: &Book| book.wishes.is_empty() && settled(&book.resource);
        if !self.until(RESTS_WITHIN, rests)? {
            return Err(format!("it has not come to rest after {RESTS_WITHIN:?}: {}", self.resource()));
        }
        book(&self.shared).load = false;
        if !self.until(Duration::from_secs(10), |book| book.busy == 0)? {
            return Err("operations go on that should have ended".to_owned());
        }
        book(&self.shared).check = true;
        if !self.until(Duration::from_secs(120), |book| book.checked.is_some())? {
            return Err("the check does not end".to_owned());
        }
        let checked = book(&self.shared).checked.take();
        checked.unwrap_or(Ok(()))
    }

    fn resource(&self) -> String {
        let book = book(&self.shared);
        let mut status = book.resource["status"].clone();
        status.as_object_mut().map(|s| s.remove("topology"));
        format!("{}; wishes {:?}; {status}", world::brief(&book.resource), book.wishes)
    }
}

fn simulate(seed: u64, args: &Args) -> serde_json::Value {
    let plan = plan(seed);
    let shared: Shared = Arc::new(Mutex::new(Book::new(args.trace)));
    // In memory, where there is such a folder: syncing files to a disk would be most of the work.
    let here = std::path::Path::new("/dev/shm");
    let folder = if here.is_dir() { tempfile::tempdir_in(here) } else { tempfile::tempdir() }.unwrap();
    let sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(5))
        .simulation_duration(Duration::from_secs(3_600))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(10))
        .tcp_capacity(1 << 16)
        .enable_random_order()
        .build();
    let all: Vec<Arc<Machine>> = machines()
        .into_iter()
        .enumerate()
        .map(|(i, name)| Machine::new(name.clone(), folder.path().join(name), seed.wrapping_mul(1_000_003) + i as u64))
        .collect();
    let until = args.until.map_or(Duration::MAX, Duration::from_secs_f64);
    all.iter().for_each(|machine| machine.quirks.lock().unwrap().unruly = plan.unruly);
    let mut world = World {
        sim,
        shared: shared.clone(),
        machines: all.clone(),
        plan: &plan,
        down: BTreeSet::new(),
        latency: 10,
        until,
    };
    for (i, machine) in all.into_iter().enumerate() {
        let (name, shared) = (machine.name.clone(), shared.clone());
        match name.as_str() {
            "operator" => world.sim.host(name, move || machine.clone().operator(shared.clone())),
            "manager" => world.sim.host(name, move || machine.clone().manager(shared.clone())),
            _ if i < STORES => world.sim.host(name, move || machine.clone().store(shared.clone())),
            _ => world.sim.host(name, move || machine.clone().caller(shared.clone(), i as u32 * 4, 4)),
        }
    }
    world.note(&format!(
        "seed {seed}: {} shards x {}, synced {}, unruly {}, {} acts in {:?}, {CALLERS} callers",
        plan.shards,
        plan.factor,
        plan.synced,
        plan.unruly,
        plan.acts.len(),
        plan.lasts
    ));
    let ended = world.run();
    let lasted = world.sim.elapsed();
    if let Err(error) = ended {
        book(&shared).violation(error);
    }
    if let Some(key) = &args.key {
        world.machines[..STORES].iter().for_each(|m| println!("{}", m.storage.describe(key.as_bytes())));
    }
    let book = book(&shared);
    let tally = book.history.tally();
    let (hash, lines) = book.trace();
    json!({
        "seed": seed,
        "trace": format!("{hash:016x}"),
        "lines": lines,
        "seconds": lasted.as_secs_f64(),
        "acts": plan.acts.len(),
        "acknowledged": tally.acknowledged,
        "unknown": tally.unknown,
        "refused": tally.refused,
        "reads": tally.reads,
        "pinned": book.pinned,
        "longest_ms": tally.longest.as_millis() as u64,
        "violations": book.violations,
    })
}
