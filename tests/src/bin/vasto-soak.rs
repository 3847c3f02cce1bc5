//! Kills, freezes and resizes a cluster of real processes for as long as asked,
//! under clients that know what they wrote: see `vasto_tests::soak`. It prints a line
//! for each cycle and a table in the end, and ends with 1 if anything was lost or wrong.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use vasto_tests::soak::{Settings, run};

const USAGE: &str = "\
vasto-soak [SETTINGS]
  --cycles N        how many cycles of change, strike, heal and judgement (10, unless --minutes says when to end)
  --minutes M       begins no cycle after that
  --seed S          what all choices come from (random, and printed)
  --output json     one line of JSON in the end; what it tells meanwhile goes to stderr";

fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<(Settings, bool)> {
    let mut settings = Settings { seed: rand::random_range(0..1_000_000), cycles: None, time: None };
    let mut json = false;
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        let number = || value.parse::<u64>().with_context(|| format!("{word} {value}: not a number"));
        match word.as_str() {
            "--cycles" => settings.cycles = Some(number()?),
            "--minutes" => settings.time = Some(Duration::from_secs(60 * number()?)),
            "--seed" => settings.seed = number()?,
            "--output" if value == "json" => json = true,
            _ => bail!("{word} {value}: no such setting"),
        }
    }
    if settings.cycles.is_none() && settings.time.is_none() {
        settings.cycles = Some(10);
    }
    Ok((settings, json))
}

#[tokio::main]
async fn main() -> ExitCode {
    let (settings, json) = match parse(std::env::args().skip(1)) {
        Ok(parsed) => parsed,
        Err(error) => {
            eprintln!("{error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    eprintln!("seed {}", settings.seed);
    let report = match Box::pin(run(&settings, |line| eprintln!("{line}"))).await {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    if json {
        println!("{}", report.json());
    } else {
        println!("{report}");
    }
    if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
