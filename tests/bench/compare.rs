//! What is compared with what, with the targets; and the rounds, in which subject and peer take turns.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::Bench;
use crate::data::Data;
use crate::db_bench::{self, DbBench};
use crate::embedded::{self, Embedded};
use crate::flame::Profile;
use crate::load::Work;
use crate::peers::Peer;
use crate::process::{at_cost, cpu_of};
use crate::redis::{self, Asking, Redis};
use crate::report::{Measured, Ratio};
use crate::sample::Sample;
use crate::vasto::{Setup, Vasto};
use crate::word;

/// Keys, and bytes of a value.
pub const KEYS: u64 = 100_000;
pub const VALUE: usize = 100;
/// How long servers may go on working after a measurement, and how much counts as being quiet.
const QUIET_WITHIN: Duration = Duration::from_secs(20);
const QUIET_WINDOW: Duration = Duration::from_millis(200);
const QUIET_SHARE: f64 = 0.06;

/// One thing that is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Case {
    /// Vasto's client, in a process of its own.
    Native { setup: Setup, work: Work, callers: u32, batch: u32 },
    /// redis-benchmark against Vasto's gateway.
    Gateway(Asking),
    /// redis-benchmark against Redis.
    Redis(Asking),
    /// RocksDB in one process.
    Embedded { work: embedded::Work, threads: u32, batch: u32, sync: bool },
    /// RocksDB's own benchmark.
    DbBench(DbBench),
    /// etcd's put over JSON.
    Etcd { callers: u32 },
}

impl Case {
    /// Its name in tables.
    pub fn name(self) -> String {
        let asking = |who: &str, Asking { get, clients, pipeline }: Asking| {
            let piped = if pipeline > 1 { format!(", pipeline {pipeline}") } else { String::new() };
            format!("{who} {}, {clients} clients{piped}", if get { "GET" } else { "SET" })
        };
        match self {
            Self::Native { setup, work, callers, batch } => {
                let mut name = format!("Vasto {}, {callers} callers", word(&work));
                if batch > 1 {
                    name += &format!(" × {batch}");
                }
                let Setup { shards, replication_factor, synced } = setup;
                if (shards, replication_factor) != (1, 1) {
                    let copies = counted(replication_factor, "copy", "copies");
                    name += &format!(", {} in {copies}", counted(shards, "shard", "shards"));
                }
                name += if synced { ", synced" } else { "" };
                name
            }
            Self::Gateway(how) => asking("Vasto's gateway", how),
            Self::Redis(how) => asking("Redis", how),
            Self::Embedded { work, threads, batch, sync } => {
                let what = match work {
                    embedded::Work::Fill => "fill",
                    embedded::Work::Put => "put",
                    embedded::Work::Get => "get",
                    embedded::Work::MultiGet => "MultiGet",
                };
                let times = if batch > 1 { format!(" × {batch}") } else { String::new() };
                format!(
                    "RocksDB {what}, {}{times}{}",
                    counted(threads, "thread", "threads"),
                    if sync { ", synced" } else { "" }
                )
            }
            Self::DbBench(bench) => {
                let synced = if bench.work == db_bench::Work::SyncedFill { ", synced" } else { "" };
                format!("db_bench {}, {}{synced}", bench.name(), counted(bench.threads, "thread", "threads"))
            }
            Self::Etcd { callers } => format!("etcd put, {callers} callers"),
        }
    }

    /// What has to be installed for it.
    fn needs(self) -> Option<Peer> {
        match self {
            Self::Gateway(_) | Self::Redis(_) => Some(Peer::Redis),
            Self::DbBench(_) => Some(Peer::DbBench),
            Self::Etcd { .. } => Some(Peer::Etcd),
            Self::Native { .. } | Self::Embedded { .. } => None,
        }
    }

    fn native(work: Work, callers: u32, batch: u32) -> Self {
        Self::Native { setup: Setup::ONE, work, callers, batch }
    }

    fn redis(get: bool, clients: u32, pipeline: u32) -> Self {
        Self::Redis(Asking { get, clients, pipeline })
    }
}

fn counted(number: u32, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// A comparison.
pub struct Row {
    /// Rows of a group share their servers.
    pub group: &'static str,
    pub name: &'static str,
    pub what: &'static str,
    pub subject: Case,
    pub peer: Case,
    /// What the ratio of the two rates is divided by.
    pub per: f64,
    /// The least that the ratio shall be.
    pub target: Option<f64>,
    /// What the regression bench fails below: about 40% of what two cores had when it was set.
    pub floor: Option<f64>,
}

/// The Go system's figures are known only beside Redis' on its machine, SET and GET by 16 clients, and by 4 clients with
/// a pipeline of 100. So what is compared is how much of Redis each of the two is.
const REDIS_SET: f64 = 60_500.0;
const REDIS_GET: f64 = 62_100.0;
const REDIS_PIPELINE_SET: f64 = 295_000.0;
const REDIS_PIPELINE_GET: f64 = 597_000.0;
const GO_2: f64 = 8_400.0;
const GO_16: f64 = 18_200.0;
const GO_4_BATCH: f64 = 83_500.0;

/// All comparisons.
pub fn rows() -> Vec<Row> {
    let row = |group, name, what, subject, peer, target: f64, floor| Row {
        group,
        name,
        what,
        subject,
        peer,
        per: 1.0,
        target: (target > 0.0).then_some(target),
        floor,
    };
    let (put, get) = (Work::Put, Work::Get);
    let (redis_set, redis_get) = (Case::redis(false, 16, 1), Case::redis(true, 16, 1));
    let (pipeline_set, pipeline_get) = (Case::redis(false, 4, 100), Case::redis(true, 4, 100));
    let (put_batch, get_batch) = (Case::native(put, 4, 100), Case::native(get, 4, 100));
    let embedded = |work, threads, batch| Case::Embedded { work, threads, batch, sync: false };
    let go = |name, what, subject, peer, per| Row { per, ..row("native", name, what, subject, peer, 5.0, None) };
    let gateway = |get| Asking { get, clients: 50, pipeline: 16 };
    let copies = |replication_factor, callers, batch| Case::Native {
        setup: Setup { shards: 2, replication_factor, synced: false },
        work: put,
        callers,
        batch,
    };
    let synced = Case::Native { setup: Setup { synced: true, ..Setup::ONE }, work: put, callers: 64, batch: 1 };
    let db_bench = |work, threads| Case::DbBench(DbBench { work, threads });
    vec![
        row("native", "put", "put, 16 callers: Redis", Case::native(put, 16, 1), redis_set, 1.0, Some(0.28)),
        row("native", "get", "get, 16 callers: Redis", Case::native(get, 16, 1), redis_get, 1.2, Some(0.5)),
        row(
            "native",
            "batch-put",
            "put, 4 callers × 100: embedded, same batches",
            put_batch,
            embedded(embedded::Work::Put, 2, 100),
            0.7,
            Some(0.13),
        ),
        row(
            "native",
            "batch-get",
            "get, 4 callers × 100: embedded, one by one",
            get_batch,
            embedded(embedded::Work::Get, 2, 1),
            0.7,
            Some(0.3),
        ),
        row(
            "native",
            "batch-multiget",
            "get, 4 callers × 100: embedded MultiGet",
            get_batch,
            embedded(embedded::Work::MultiGet, 2, 100),
            0.0,
            None,
        ),
        // There is no figure of Redis with 2 clients: the one with 16 is the yardstick.
        go("go-2-put", "put, 2 callers: the Go system", Case::native(put, 2, 1), redis_set, GO_2 / REDIS_SET),
        go("go-2-get", "get, 2 callers: the Go system", Case::native(get, 2, 1), redis_get, GO_2 / REDIS_GET),
        go("go-16-put", "put, 16 callers: the Go system", Case::native(put, 16, 1), redis_set, GO_16 / REDIS_SET),
        go("go-16-get", "get, 16 callers: the Go system", Case::native(get, 16, 1), redis_get, GO_16 / REDIS_GET),
        go(
            "go-batch-put",
            "put, 4 callers × 100: the Go system",
            put_batch,
            pipeline_set,
            GO_4_BATCH / REDIS_PIPELINE_SET,
        ),
        go(
            "go-batch-get",
            "get, 4 callers × 100: the Go system",
            get_batch,
            pipeline_get,
            GO_4_BATCH / REDIS_PIPELINE_GET,
        ),
        row(
            "gateway",
            "gateway-set",
            "gateway SET, 50 clients, pipeline 16: Redis",
            Case::Gateway(gateway(false)),
            Case::Redis(gateway(false)),
            0.8,
            Some(0.2),
        ),
        row(
            "gateway",
            "gateway-get",
            "gateway GET, 50 clients, pipeline 16: Redis",
            Case::Gateway(gateway(true)),
            Case::Redis(gateway(true)),
            0.6,
            Some(0.25),
        ),
        row(
            "replication",
            "copies-put",
            "put, 16 callers, 2 copies: 1 copy",
            copies(2, 16, 1),
            copies(1, 16, 1),
            0.5,
            Some(0.2),
        ),
        row(
            "replication",
            "copies-batch-put",
            "put, 4 callers × 100, 2 copies: 1 copy",
            copies(2, 4, 100),
            copies(1, 4, 100),
            0.5,
            Some(0.15),
        ),
        row(
            "synced",
            "synced-put",
            "Synced put, 64 callers: db_bench --sync, 64 threads",
            synced,
            db_bench(db_bench::Work::SyncedFill, 64),
            0.8,
            None,
        ),
        row(
            "synced",
            "synced-embedded",
            "Synced put, 64 callers: embedded sync, 64 threads",
            synced,
            Case::Embedded { work: embedded::Work::Put, threads: 64, batch: 1, sync: true },
            0.0,
            None,
        ),
        row("synced", "etcd-put", "Synced put, 64 callers: etcd", synced, Case::Etcd { callers: 64 }, 0.0, None),
        // How the two peers that are RocksDB compare.
        row(
            "embedded",
            "embedded-put",
            "embedded put, 1 thread: db_bench overwrite",
            embedded(embedded::Work::Put, 1, 1),
            db_bench(db_bench::Work::Overwrite, 1),
            0.0,
            None,
        ),
        row(
            "embedded",
            "embedded-get",
            "embedded get, 2 threads: db_bench readrandom",
            embedded(embedded::Work::Get, 2, 1),
            db_bench(db_bench::Work::Read, 2),
            0.0,
            None,
        ),
    ]
}

/// Whoever has been started for a group; all end with this value.
struct Servers<'a> {
    bench: &'a Bench,
    folder: PathBuf,
    vasto: BTreeMap<Setup, Vasto>,
    redis: Option<Redis>,
    etcd: Option<crate::etcd::Etcd>,
    filled: BTreeSet<&'static str>,
    /// What redis-benchmark found of each case.
    rates: BTreeMap<String, f64>,
}

impl<'a> Servers<'a> {
    fn new(bench: &'a Bench, group: &str) -> anyhow::Result<Self> {
        let folder = bench.folder.join(group);
        std::fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
        let (vasto, filled, rates) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        Ok(Self { bench, folder, vasto, redis: None, etcd: None, filled, rates })
    }

    fn vasto(&mut self, setup: Setup) -> anyhow::Result<&Vasto> {
        if !self.vasto.contains_key(&setup) {
            let name = format!("vasto-{}", self.vasto.len());
            let vasto = Vasto::start(&self.folder, &name, setup)?;
            vasto.run(&vasto.load(Work::Fill, KEYS, VALUE))?;
            self.vasto.insert(setup, vasto);
        }
        self.vasto.get(&setup).context("a cluster that was just started")
    }

    fn redis(&mut self) -> anyhow::Result<&Redis> {
        if self.redis.is_none() {
            let redis = Redis::start(&self.folder)?;
            redis::fill(redis.port, &Data::new(KEYS, VALUE, true))?;
            self.redis = Some(redis);
        }
        self.redis.as_ref().context("a server that was just started")
    }

    /// Starts whatever the case needs, filled in: its server's pid, if it has one.
    fn prepare(&mut self, case: Case) -> anyhow::Result<Option<u32>> {
        match case {
            Case::Native { setup, .. } => Ok(Some(self.vasto(setup)?.process.pid())),
            Case::Gateway(_) => Ok(Some(self.vasto(Setup::ONE)?.process.pid())),
            Case::Redis(_) => Ok(Some(self.redis()?.process.pid())),
            Case::Embedded { .. } => {
                if self.filled.insert("embedded") {
                    self.embedded(embedded::Work::Fill, 1, 1, false).measure(&self.folder)?;
                }
                Ok(None)
            }
            Case::DbBench(_) => {
                if self.filled.insert("db_bench") {
                    DbBench::fill(&self.folder, KEYS, VALUE)?;
                }
                Ok(None)
            }
            Case::Etcd { .. } => {
                if self.etcd.is_none() {
                    self.etcd = Some(crate::etcd::Etcd::start(&self.folder)?);
                }
                Ok(self.etcd.as_ref().map(|etcd| etcd.process.pid()))
            }
        }
    }

    fn embedded(&self, work: embedded::Work, threads: u32, batch: u32, sync: bool) -> Embedded {
        let (folder, seconds) = (self.folder.join("embedded"), self.bench.seconds);
        Embedded { folder, work, threads, batch, sync, seconds, keys: KEYS, value_size: VALUE }
    }

    fn measure(&mut self, case: Case) -> anyhow::Result<Sample> {
        let server = self.prepare(case)?;
        self.quiet()?;
        let mut sample = match server {
            Some(pid) => at_cost(pid, || self.run(case))?,
            None => self.run(case)?,
        };
        sample.quiet_after = Some(self.quiet()?);
        Ok(sample)
    }

    /// Draws where the server's CPU time goes, if it is Vasto.
    fn draw(&mut self, case: Case, into: &Path) -> anyhow::Result<()> {
        if !matches!(case, Case::Native { .. } | Case::Gateway(_)) {
            return Ok(());
        }
        let Some(pid) = self.prepare(case)? else { return Ok(()) };
        self.quiet()?;
        let profile = Profile::start(pid, &self.folder)?;
        self.run(case)?;
        let svg = into.join(format!("{}.svg", case.name().replace(|c: char| !c.is_ascii_alphanumeric(), "-")));
        profile.draw(&case.name(), &svg, &self.folder)?;
        self.bench.say(&format!("{} is drawn", svg.display()));
        Ok(())
    }

    fn run(&mut self, case: Case) -> anyhow::Result<Sample> {
        let seconds = self.bench.seconds;
        match case {
            Case::Native { setup, work, callers, batch } => {
                let vasto = self.vasto(setup)?;
                let load = vasto.load(work, KEYS, VALUE);
                vasto.run(&crate::load::Load { callers, batch, seconds, ..load })
            }
            Case::Gateway(asking) => {
                let port = self.vasto(Setup::ONE)?.redis_port;
                self.redis_benchmark(case, port, asking)
            }
            Case::Redis(asking) => {
                let port = self.redis()?.port;
                self.redis_benchmark(case, port, asking)
            }
            Case::Embedded { work, threads, batch, sync } => {
                self.embedded(work, threads, batch, sync).measure(&self.folder)
            }
            Case::DbBench(what) => what.measure(&self.folder, KEYS, VALUE, seconds),
            Case::Etcd { callers } => {
                let etcd = self.etcd.as_ref().context("etcd was not started")?;
                etcd.measure(callers, KEYS, VALUE, seconds, &self.folder)
            }
        }
    }

    fn redis_benchmark(&mut self, case: Case, port: u16, asking: Asking) -> anyhow::Result<Sample> {
        let name = case.name();
        let known = self.rates.get(&name).copied();
        let sample = redis::measure(&self.folder, port, asking, KEYS, VALUE, self.bench.seconds, known)?;
        self.rates.insert(name, sample.rate());
        Ok(sample)
    }

    /// Waits until no server works in the background any more: whoever is measured next has the machine for itself.
    /// Says how long that took.
    fn quiet(&mut self) -> anyhow::Result<f64> {
        let start = Instant::now();
        let share = QUIET_SHARE * self.vasto.len().max(1) as f64;
        let vasto = self.vasto.values_mut().map(|v| &mut v.process);
        let mut servers: Vec<_> = vasto.chain(self.redis.iter_mut().map(|redis| &mut redis.process)).collect();
        loop {
            let waited = start.elapsed();
            let mut cpu = || -> anyhow::Result<Duration> {
                servers.iter_mut().try_fold(Duration::ZERO, |sum, server| {
                    server.check()?;
                    Ok(sum + cpu_of(server.pid())?)
                })
            };
            let before = cpu()?;
            std::thread::sleep(QUIET_WINDOW);
            let used = cpu()?.saturating_sub(before).as_secs_f64() / QUIET_WINDOW.as_secs_f64();
            if used <= share || waited > QUIET_WITHIN {
                return Ok(waited.as_secs_f64());
            }
        }
    }
}

/// Runs these rows in rounds, group by group.
pub fn run(bench: &Bench, rows: &[Row]) -> anyhow::Result<(Vec<Ratio>, Vec<Measured>)> {
    let (mut ratios, mut measured) = (Vec::new(), Vec::new());
    let mut groups: Vec<&str> = Vec::new();
    rows.iter().for_each(|row| {
        if !groups.contains(&row.group) {
            groups.push(row.group);
        }
    });
    for group in groups {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.group == group).collect();
        let mut cases: Vec<Case> = Vec::new();
        for case in rows.iter().flat_map(|row| [row.subject, row.peer]) {
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); cases.len()];
        let mut servers = Servers::new(bench, group)?;
        for round in 0..bench.rounds {
            // The order is turned round each time, so that nobody always comes after the same one.
            let mut order: Vec<usize> = (0..cases.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                let sample = servers.measure(cases[at]).with_context(|| cases[at].name())?;
                let rate = crate::report::count(sample.rate());
                bench.say(&format!("round {}/{}: {}: {rate}/s", round + 1, bench.rounds, cases[at].name()));
                samples[at].push(sample);
            }
        }
        if let Some(into) = &bench.flame {
            std::fs::create_dir_all(into).with_context(|| format!("can't make {}", into.display()))?;
            cases.iter().try_for_each(|case| servers.draw(*case, into).with_context(|| case.name()))?;
        }
        for row in rows {
            let of = |case: Case| cases.iter().position(|c| *c == case).map_or(&[][..], |at| &samples[at]);
            let each = of(row.subject).iter().zip(of(row.peer)).map(|(s, p)| s.rate() / p.rate() / row.per).collect();
            ratios.push(Ratio {
                name: row.name.to_owned(),
                what: row.what.to_owned(),
                subject: row.subject.name(),
                peer: row.peer.name(),
                ratios: each,
                target: row.target,
                floor: row.floor,
            });
        }
        measured.extend(cases.iter().zip(samples).map(|(case, samples)| Measured::new(case.name(), samples)));
    }
    Ok((ratios, measured))
}

/// The peers that these rows need.
pub fn needs(rows: &[Row]) -> BTreeSet<Peer> {
    rows.iter().flat_map(|row| [row.subject, row.peer]).filter_map(Case::needs).collect()
}

/// Whether a row needs none of these peers.
pub fn without(row: &Row, left_out: &BTreeSet<Peer>) -> bool {
    [row.subject, row.peer].iter().filter_map(|case| case.needs()).all(|peer| !left_out.contains(&peer))
}
