//! Many seeds, each in a process of its own, on all cores.

use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::Value;

/// A seed that takes longer than this has hung.
const PATIENCE_SECONDS: &str = "120";

/// What all seeds came to.
#[derive(Default)]
struct Sum {
    seeds: u64,
    seconds: f64,
    acknowledged: u64,
    unknown: u64,
    reads: u64,
    pinned: u64,
    longest_ms: u64,
    failed: Vec<u64>,
}

fn one(seed: u64) -> Result<Value, String> {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let output = Command::new("timeout")
        .args(["--kill-after=5", PATIENCE_SECONDS])
        .arg(this)
        .args(["--seed", &seed.to_string(), "--json"])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.lines().last().unwrap_or_default();
    serde_json::from_str(last).map_err(|_| {
        let error = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = error.lines().rev().take(12).collect();
        format!("it ended with {}: {}", output.status, tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
    })
}

fn check(seed: u64, twice: bool) -> Result<Value, String> {
    let report = one(seed)?;
    let violations = report["violations"].as_array().cloned().unwrap_or_default();
    if !violations.is_empty() {
        return Err(violations.iter().filter_map(Value::as_str).take(5).collect::<Vec<_>>().join("\n"));
    }
    if twice {
        let again = one(seed)?;
        if again["trace"] != report["trace"] {
            return Err(format!(
                "it left another trace the second time: {} of {} lines, then {} of {}",
                report["trace"], report["lines"], again["trace"], again["lines"]
            ));
        }
    }
    Ok(report)
}

/// Runs `count` seeds from `from` on.
pub fn run(from: u64, count: u64, twice: bool, jobs: Option<usize>) -> ExitCode {
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    let (next, sum, began) = (AtomicU64::new(from), Mutex::new(Sum::default()), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    let result = check(seed, twice);
                    let mut sum = sum.lock().unwrap();
                    sum.seeds += 1;
                    match result {
                        Ok(report) => {
                            let number = |name: &str| report[name].as_u64().unwrap_or(0);
                            sum.seconds += report["seconds"].as_f64().unwrap_or(0.0);
                            sum.acknowledged += number("acknowledged");
                            sum.unknown += number("unknown");
                            sum.reads += number("reads");
                            sum.pinned += number("pinned");
                            sum.longest_ms = sum.longest_ms.max(number("longest_ms"));
                        }
                        Err(why) => {
                            println!("seed {seed} FAILED: {why}\n  replay it: vasto-sim --seed {seed} --trace");
                            sum.failed.push(seed);
                        }
                    }
                    if sum.seeds.is_multiple_of(100) {
                        println!(
                            "{} seeds, {} failed, {:.0} s",
                            sum.seeds,
                            sum.failed.len(),
                            began.elapsed().as_secs_f64()
                        );
                    }
                }
            });
        }
    });
    let sum = sum.into_inner().unwrap();
    println!(
        "{} seeds, {:.1} h of simulated time in {:.0} s: {} writes acknowledged, {} unknown, {} reads ({} of a known replica), the longest operation {} ms; {} failed {:?}",
        sum.seeds,
        sum.seconds / 3_600.0,
        began.elapsed().as_secs_f64(),
        sum.acknowledged,
        sum.unknown,
        sum.reads,
        sum.pinned,
        sum.longest_ms,
        sum.failed.len(),
        sum.failed
    );
    if sum.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
