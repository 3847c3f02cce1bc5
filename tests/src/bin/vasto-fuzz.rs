//! Fuzzes what reads bytes: see `vasto_tests::fuzz`. An input that panics is written to
//! a file and named; so much memory at once as a length prefix can ask for ends it too.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::resource::{Resource, setrlimit};
use vasto_tests::fuzz::{Target, corpus, run};

const USAGE: &str = "\
vasto-fuzz [SETTINGS]
  --seconds N    for each target (10)
  --target T     record, wire, spec or dump (all)
  --seed S       what all mutations come from (random, and printed)";
/// What the process may have in all: far above what any input of 16 KiB needs.
const MEMORY: u64 = 1 << 30;

fn main() -> ExitCode {
    match fuzz() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}\n{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn fuzz() -> anyhow::Result<()> {
    let (mut seconds, mut targets, mut seed) = (10, Target::ALL.to_vec(), rand::random_range(0..1_000_000));
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().with_context(|| format!("{word} {value}: not a number"));
        match word.as_str() {
            "--seconds" => seconds = number()?,
            "--seed" => seed = number()?,
            "--target" => targets.retain(|target| target.name() == value),
            _ => bail!("{word} {value}: no such setting"),
        }
    }
    if targets.is_empty() {
        bail!("no such target");
    }
    setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY).context("limiting the memory")?;
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus"));
    println!("seed {seed}");
    for target in targets {
        let entries = corpus(&folder, target).with_context(|| format!("the corpus in {}", folder.display()))?;
        let time = Duration::from_secs(seconds);
        let mut last = Vec::new();
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(target, &entries, seed, time, |bytes| {
                last.clear();
                last.extend_from_slice(bytes);
            })
        }));
        match ran {
            Ok(tried) => println!("{}: {tried} inputs", target.name()),
            Err(_) => {
                let file = std::env::temp_dir().join(format!("vasto-fuzz-{}-{seed}", target.name()));
                std::fs::write(&file, &last)?;
                bail!("{}: an input failed; it is in {}: keep it in the corpus", target.name(), file.display());
            }
        }
    }
    Ok(())
}
