//! How fast a replica's data moves: a new copy (snapshot to ingested) beside a copy of the same files, the filtered copy
//! of a resize, and what a move does to the latency of a steady load.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vasto_client::Client;
use vasto_client::v1::{DescribeRequest, ScaleRequest};

use crate::Bench;
use crate::load::{Load, Work};
use crate::process::run as run_process;
use crate::report::{Measured, Ratio};
use crate::sample::Sample;
use crate::vasto::{KEYSPACE, Setup, Vasto};

/// 1 GB that doesn't compress; for a look, 300 MB.
const KEYS: u64 = 1_000_000;
const FEWER_KEYS: u64 = 300_000;
const VALUE: usize = 1000;
/// How long a change may take.
const CHANGE_WITHIN: Duration = Duration::from_secs(300);
/// The steady load, as a part of what 16 callers get.
const STEADY: f64 = 0.2;

/// Arguments of `vasto-bench resize`: changes a keyspace's size and says how long the copying took.
#[derive(Args, Clone, Debug)]
pub struct Resize {
    #[arg(long)]
    operator: String,
    #[arg(long)]
    shards: u32,
    #[arg(long)]
    replication_factor: u32,
}

/// What it prints.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Resized {
    /// From the call until the last candidate had everything: the end of Prepare.
    copied: f64,
    /// Until nothing was changing any more.
    settled: f64,
}

/// Runs the change and prints how long it took.
pub fn run_resize(args: &Resize) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let resized = runtime.block_on(async { tokio::time::timeout(CHANGE_WITHIN, change(args)).await });
    println!("{}", serde_json::to_string(&resized.context("the change took too long")??)?);
    Ok(())
}

async fn change(args: &Resize) -> anyhow::Result<Resized> {
    let client = Client::connect(&args.operator)?;
    let mut admin = client.keyspaces()?;
    let start = Instant::now();
    let (shards, replication_factor) = (args.shards, args.replication_factor);
    admin.scale(ScaleRequest { name: KEYSPACE.to_owned(), shards, replication_factor }).await?;
    let request = DescribeRequest { name: KEYSPACE.to_owned(), watch: true };
    let mut updates = admin.describe(request).await?.into_inner();
    let (mut preparing, mut copied) = (false, None);
    while let Some(resource) = updates.message().await? {
        let resource: Value = serde_json::from_str(&resource.json)?;
        let status = |path: &str| resource.pointer(&format!("/status/{path}"));
        let number = |path: &str| status(path).and_then(Value::as_u64);
        let phase = status("phase").and_then(Value::as_str).unwrap_or_default();
        if phase == "Prepare" {
            preparing = true;
        } else if preparing && copied.is_none() {
            copied = Some(start.elapsed().as_secs_f64());
        }
        let replicas = Some(u64::from(shards * replication_factor));
        let done = phase == "Ready"
            && number("shards") == Some(shards.into())
            && number("replicas") == replicas
            && number("readyReplicas") == replicas
            && status("observedGeneration") == resource.pointer("/metadata/generation");
        if done {
            let settled = start.elapsed().as_secs_f64();
            return Ok(Resized { copied: copied.unwrap_or(settled), settled });
        }
    }
    bail!("the operator's stream ended before the change was done")
}

fn resize(vasto: &Vasto, shards: u32, replication_factor: u32) -> anyhow::Result<Resized> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["resize", "--operator", &vasto.operator, "--shards", &shards.to_string()]);
    command.args(["--replication-factor", &replication_factor.to_string()]);
    let within = CHANGE_WITHIN + Duration::from_secs(10);
    let (text, _) = run_process("resize", vasto.folder(), within, &mut command)?;
    serde_json::from_str(text.trim()).with_context(|| format!("resize printed {text:?}"))
}

/// All sorted files under a folder.
fn sorted_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("can't read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "sst") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// The same under names of the run's own: the store may replace its files at any time.
fn held(data: &Path, own: &Path) -> anyhow::Result<Vec<PathBuf>> {
    'again: for _ in 0..10 {
        if own.exists() {
            std::fs::remove_dir_all(own)?;
        }
        std::fs::create_dir_all(own)?;
        let mut files = Vec::new();
        for (number, path) in sorted_files(data)?.iter().enumerate() {
            let name = own.join(number.to_string());
            match std::fs::hard_link(path, &name) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue 'again,
                linked => linked.with_context(|| format!("can't link {}", path.display()))?,
            }
            files.push(name);
        }
        return Ok(files);
    }
    bail!("the files in {} were replaced again and again", data.display())
}

fn bytes_of(files: &[PathBuf]) -> u64 {
    files.iter().filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Copies files by reading and writing them, each synced: a clone of a file's blocks would be no copy.
fn copy(files: &[PathBuf], target: &Path) -> anyhow::Result<f64> {
    std::fs::create_dir_all(target)?;
    let start = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    for (number, path) in files.iter().enumerate() {
        let mut from = File::open(path).with_context(|| format!("can't read {}", path.display()))?;
        let mut to = File::create(target.join(number.to_string()))?;
        loop {
            let read = from.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            to.write_all(&buffer[..read])?;
        }
        to.sync_all()?;
    }
    File::open(target)?.sync_all()?;
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_dir_all(target)?;
    Ok(seconds)
}

fn moved(bytes: u64, seconds: f64) -> Sample {
    Sample { operations: bytes as f64, seconds, ..Sample::default() }
}

/// Runs all three.
pub fn run(bench: &Bench) -> anyhow::Result<(Vec<Ratio>, Vec<Measured>)> {
    // A keyspace has at least as many shards as copies.
    let setup = Setup { shards: 2, ..Setup::ONE };
    let (keys, rounds) = (if bench.quick { FEWER_KEYS } else { KEYS }, bench.few_rounds());
    let vasto = Vasto::start(&bench.folder, "files", setup)?;
    let load = |work| Load { incompressible: true, ..vasto.load(work, keys, VALUE) };
    vasto.run(&load(Work::Fill))?;
    vasto.command(&["keyspace", "compact", KEYSPACE], CHANGE_WITHIN)?;
    let (mut ingested, mut plain, mut quiet, mut busy) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let capacity = vasto.run(&Load { seconds: bench.seconds, ..load(Work::Mixed) })?.rate();
    let rate = Some(((capacity * STEADY) as u64).max(1));
    let mut settled = Vec::new();
    for round in 0..rounds {
        vasto.command(&["keyspace", "compact", KEYSPACE], CHANGE_WITHIN)?;
        let files = held(&vasto.data, &bench.folder.join("held"))?;
        let bytes = bytes_of(&files);
        let copy_plainly = || copy(&files, &bench.folder.join("copy")).map(|seconds| moved(bytes, seconds));
        if round % 2 == 1 {
            plain.push(copy_plainly()?);
        }
        let resized = resize(&vasto, 2, 2)?;
        if round % 2 == 0 {
            plain.push(copy_plainly()?);
        }
        ingested.push(moved(bytes, resized.copied));
        settled.push(format!("{:.1}", resized.settled));
        resize(&vasto, 2, 1)?;
        bench.say(&format!("round {}/{rounds}: {} MB in {:.1} s", round + 1, bytes / 1_000_000, resized.copied));

        // The same again under a steady load.
        quiet.push(vasto.run(&Load { rate, seconds: bench.seconds, callers: 64, ..load(Work::Mixed) })?);
        let steady = Load { rate, seconds: 300.0, callers: 64, until_input_ends: true, ..load(Work::Mixed) };
        let background = vasto.run_in_background(&steady)?;
        let resized = resize(&vasto, 2, 2)?;
        busy.push(Sample::parse(&background.finish(Duration::from_secs(30))?)?);
        resize(&vasto, 2, 1)?;
        bench.say(&format!("round {}/{rounds}: the same under load in {:.1} s", round + 1, resized.copied));
    }
    vasto.process.stop();
    std::fs::remove_dir_all(bench.folder.join("files"))?;

    let (mut filtered, mut whole) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let name = format!("split-{round}");
        let vasto = Vasto::start(&bench.folder, &name, Setup::ONE)?;
        vasto.run(&Load { incompressible: true, ..vasto.load(Work::Fill, keys, VALUE) })?;
        vasto.command(&["keyspace", "compact", KEYSPACE], CHANGE_WITHIN)?;
        let files = held(&vasto.data, &bench.folder.join("held"))?;
        // Half of the keys go to the new shard.
        let bytes = bytes_of(&files) / 2;
        filtered.push(moved(bytes, resize(&vasto, 2, 1)?.copied));
        whole.push(moved(bytes_of(&files), copy(&files, &bench.folder.join("copy"))?));
        vasto.process.stop();
        std::fs::remove_dir_all(bench.folder.join(&name))?;
    }

    let each = |subject: &[Sample], peer: &[Sample], of: fn(&Sample) -> f64| -> Vec<f64> {
        subject.iter().zip(peer).map(|(s, p)| of(s) / of(p)).collect()
    };
    let p99 = |sample: &Sample| sample.p99.unwrap_or(f64::NAN);
    let ratio = |name: &str, what: &str, subject: &str, peer: &str, ratios, target| Ratio {
        name: name.to_owned(),
        what: what.to_owned(),
        subject: subject.to_owned(),
        peer: peer.to_owned(),
        ratios,
        target,
        floor: None,
    };
    let copying = "a copy of the same files, synced";
    let ratios = vec![
        ratio(
            "move",
            "snapshot to ingested: a copy of the same files",
            "a second copy of each shard",
            copying,
            each(&ingested, &plain, Sample::rate),
            Some(0.5),
        ),
        ratio(
            "split",
            "filtered copy to a new shard: a copy of files",
            "from 1 shard to 2",
            copying,
            each(&filtered, &whole, Sample::rate),
            None,
        ),
        ratio(
            "move-p99",
            "foreground p99 when quiet: during a move",
            "a steady load, quiet",
            "the same during a move",
            each(&quiet, &busy, p99),
            Some(0.5),
        ),
    ];
    let bytes = |name: &str, samples| Measured { unit: "bytes", ..Measured::new(name.to_owned(), samples) };
    let measured = vec![
        bytes(&format!("second copy of 2 shards (settled after {} s)", settled.join(", ")), ingested),
        bytes("new shard, half of the keys", filtered),
        bytes("copy of the same files", plain),
        Measured::new("steady load of 64 callers, quiet".to_owned(), quiet),
        Measured::new("steady load of 64 callers, during a move".to_owned(), busy),
    ];
    Ok((ratios, measured))
}
