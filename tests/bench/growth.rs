//! What an operation costs as there is more data, and as there are more shards on one machine. Vasto alone.

use std::time::Duration;

use crate::Bench;
use crate::compare::{KEYS, VALUE};
use crate::load::{Load, Work};
use crate::report::Measured;
use crate::sample::Sample;
use crate::vasto::{Setup, Vasto};
use crate::word;

/// A store's caches, of rows and of blocks; there is no flag for others, so the data is what grows.
const CACHE: u64 = 64 << 20;
/// Bytes of a value while data grows.
const ROW: usize = 1000;
/// Data in parts of the cache. The last is 6.4 GB, too much for a look.
const TENTHS: [u64; 4] = [1, 10, 100, 1000];
/// How long compacting all of it may take.
const COMPACTED_WITHIN: Duration = Duration::from_secs(600);
const SHARDS: [u32; 4] = [1, 4, 16, 64];

/// Measures both ways of growing. The first row of each kind of work is what the others are told relative to.
pub fn run(bench: &Bench) -> anyhow::Result<Vec<Measured>> {
    let mut all: Vec<Measured> = Vec::new();
    for tenths in &TENTHS[..if bench.quick { 3 } else { 4 }] {
        let keys = CACHE * tenths / 10 / (ROW as u64 + 16);
        let vasto = Vasto::start(&bench.folder, &format!("growth-{tenths}"), Setup::ONE)?;
        vasto.run(&vasto.load(Work::Fill, keys, ROW))?;
        vasto.command(&["keyspace", "compact", crate::vasto::KEYSPACE], COMPACTED_WITHIN)?;
        for work in [Work::Get, Work::Put] {
            let name = format!("data {:>4} × caches: {}", *tenths as f64 / 10.0, word(&work));
            let load = Load { seconds: bench.seconds, ..vasto.load(work, keys, ROW) };
            let samples = vasto.measure(&load, bench.few_rounds())?;
            push(bench, &mut all, name, samples, if work == Work::Get { "data get" } else { "data put" });
        }
        vasto.process.stop();
        std::fs::remove_dir_all(bench.folder.join(format!("growth-{tenths}")))?;
    }
    for shards in SHARDS {
        let setup = Setup { shards, ..Setup::ONE };
        let vasto = Vasto::start(&bench.folder, &format!("shards-{shards}"), setup)?;
        vasto.run(&vasto.load(Work::Fill, KEYS, VALUE))?;
        for (work, callers, batch) in [(Work::Get, 16, 1), (Work::Put, 16, 1), (Work::Get, 4, 100), (Work::Put, 4, 100)]
        {
            let times = if batch > 1 { format!(" × {batch}") } else { String::new() };
            let name = format!("shards {shards:>2}: {}, {callers} callers{times}", word(&work));
            let load = Load { seconds: bench.seconds, callers, batch, ..vasto.load(work, KEYS, VALUE) };
            let samples = vasto.measure(&load, bench.few_rounds())?;
            let kind = match (work, batch) {
                (Work::Get, 1) => "shards get",
                (Work::Get, _) => "shards get batch",
                (_, 1) => "shards put",
                _ => "shards put batch",
            };
            push(bench, &mut all, name, samples, kind);
        }
        vasto.process.stop();
    }
    Ok(all)
}

fn push(bench: &Bench, all: &mut Vec<Measured>, name: String, samples: Vec<Sample>, kind: &'static str) {
    let mut measured = Measured::new(name, samples);
    measured.kind = kind;
    let first = all.iter().find(|other| other.kind == kind).map_or(measured.rate(), Measured::rate);
    measured.relative = Some(measured.rate() / first);
    bench.say(&format!("{}: {}/s", measured.name, crate::report::count(measured.rate())));
    all.push(measured);
}
