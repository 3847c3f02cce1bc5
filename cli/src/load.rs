//! `vasto load`: reads a file of records and puts them, many at a time. Each
//! key has its lane, so that of two lines for one key the later one wins.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use vasto_client::Env;
use vasto_client::hash::partition_hash;
use vasto_client::{Client, Data, Keyspace, Op, Options};

use crate::codec::{self, Datum, Format, Record};
use crate::context::Context;
use crate::exit::{Code, code_of, fault, one_line};
use crate::output::{byte_bar, count, counted, emit_json, size, span};

/// Lanes, and so batches under way at once.
const LANES: usize = 16;
/// A batch is sent when it has so many records, or so many bytes.
const BATCH_RECORDS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;
/// Longer than any line that a store would take (8 MiB, each byte as \u00xx).
const LONGEST_LINE: u64 = 64 << 20;

/// Arguments of `vasto load`.
#[derive(Args, Debug)]
pub(crate) struct Load {
    /// The keyspace's name.
    keyspace: String,
    /// The file; left out or -: standard input.
    file: Option<PathBuf>,
    /// The file's format; by its extension (.tsv, .jsonl) unless given.
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Skip the lines before this one, to go on after an error.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from_line: u64,
}

/// A file's format: what was asked for, else what its name says.
pub(crate) fn format_of(format: Option<Format>, file: Option<&Path>) -> anyhow::Result<Format> {
    if let Some(format) = format {
        return Ok(format);
    }
    let extension = file.and_then(Path::extension).and_then(|e| e.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "tsv" | "tab" => Ok(Format::Tsv),
        "jsonl" | "ndjson" => Ok(Format::Jsonl),
        _ => {
            let what = match file {
                Some(file) => format!("the name {} does not end in .tsv or .jsonl", file.display()),
                None => "there is no file name to tell the format by".to_string(),
            };
            Err(fault(Code::Usage, format!("{what}; say --format tsv or --format jsonl")))
        }
    }
}

/// One put, and the line that it came from.
struct Job {
    line: u64,
    op: Op,
    key: Bytes,
    bytes: usize,
}

/// Why it stopped, and at which line.
struct Stop {
    line: u64,
    error: anyhow::Error,
}

/// What lanes share with the reader: how much is in, and the first line that failed.
struct Progress {
    bar: ProgressBar,
    records: std::sync::atomic::AtomicU64,
    failed: tokio::sync::watch::Sender<Option<u64>>,
}

impl Progress {
    fn loaded(&self) -> u64 {
        self.records.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn add(&self, records: u64) {
        self.records.fetch_add(records, std::sync::atomic::Ordering::Relaxed);
    }

    fn fail(&self, line: u64) {
        self.failed.send_if_modified(|first| {
            let earlier = first.is_none_or(|at| line < at);
            if earlier {
                *first = Some(line);
            }
            earlier
        });
    }
}

pub(crate) async fn run(context: &Context, args: Load) -> anyhow::Result<()> {
    let file = args.file.as_deref().filter(|f| *f != Path::new("-"));
    let format = format_of(args.format, file)?;
    let (input, total): (Box<dyn Read + Send>, Option<u64>) = match file {
        Some(path) => {
            let open = std::fs::File::open(path).with_context(|| format!("can't open {}", path.display()))?;
            let meta = open.metadata()?;
            if meta.is_dir() {
                return Err(fault(Code::Failure, format!("{} is a folder; give a file", path.display())));
            }
            (Box::new(open), meta.is_file().then_some(meta.len()))
        }
        None if context.in_shell => return Err(fault(Code::Usage, "in the shell, FILE must be given")),
        None => (Box::new(std::io::stdin()), None),
    };
    let keyspace = at_the_epoch(context).keyspace(&args.keyspace).await?;
    let start = Instant::now();
    let now_ms = context.env.now_ms();
    let progress = std::sync::Arc::new(Progress {
        bar: byte_bar(total),
        records: 0.into(),
        failed: tokio::sync::watch::Sender::new(None),
    });

    let mut senders = Vec::with_capacity(LANES);
    let mut lanes = JoinSet::new();
    for _ in 0..LANES {
        // Bounded in batches: what is read ahead of the stores is at most some tens of megabytes.
        let (sender, jobs) = mpsc::channel(1);
        senders.push(sender);
        lanes.spawn(lane(keyspace.clone(), jobs, progress.clone()));
    }
    let reader = {
        let progress = progress.clone();
        let first = args.from_line;
        tokio::task::spawn_blocking(move || read(input, format, first, now_ms, &senders, &progress))
    };
    let read = reader.await?;
    let mut stop: Option<Stop> = None;
    while let Some(ended) = lanes.join_next().await {
        if let Some(failed) = ended?
            && stop.as_ref().is_none_or(|s| failed.line < s.line)
        {
            stop = Some(failed);
        }
    }
    progress.bar.finish_and_clear();
    let Outcome { bytes, expired, stop: unread } = read;
    if let Some(unread) = unread
        && stop.as_ref().is_none_or(|s| unread.line < s.line)
    {
        stop = Some(unread);
    }

    let records = progress.loaded();
    if let Some(Stop { line, error }) = stop {
        let before = match line - args.from_line {
            0 => "nothing before it was to be loaded".to_string(),
            _ => format!("all lines before it are loaded ({} in all)", counted(records, "record")),
        };
        let message = format!("line {line}: {}; {before}; go on with --from-line {line}", one_line(&error));
        return Err(fault(code_of(&error), message));
    }
    let time = start.elapsed();
    if context.json() {
        return emit_json(&json!({
            "records": records, "expired": expired, "bytes": bytes, "seconds": time.as_secs_f64(),
        }));
    }
    let skipped =
        if expired > 0 { format!(" ({} had expired and were left out)", count(expired)) } else { String::new() };
    eprintln!(
        "loaded {}, {} in {}: {}{skipped}",
        counted(records, "record"),
        size(bytes),
        span(time),
        rates(records, bytes, time)
    );
    Ok(())
}

/// "12,345 records/s, 1.2 MiB/s".
pub(crate) fn rates(records: u64, bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(0.001);
    format!("{} records/s, {}/s", count((records as f64 / seconds) as u64), size((bytes as f64 / seconds) as u64))
}

/// What the reader has to tell at its end.
struct Outcome {
    bytes: u64,
    expired: u64,
    stop: Option<Stop>,
}

/// Reads lines and deals them out to the lanes by key, a batch at a time. Blocking.
fn read(
    input: Box<dyn Read + Send>,
    format: Format,
    from_line: u64,
    now_ms: u64,
    lanes: &[mpsc::Sender<Vec<Job>>],
    progress: &Progress,
) -> Outcome {
    let mut input = BufReader::with_capacity(256 << 10, input);
    let mut pending: Vec<Pending> = lanes.iter().map(|_| Pending::default()).collect();
    let mut done = Outcome { bytes: 0, expired: 0, stop: None };
    let failed = progress.failed.subscribe();
    let mut line = Vec::new();
    let mut number = 0;
    let start = Instant::now();
    // One failed line is enough: nothing after it is begun.
    while failed.borrow().is_none() {
        line.clear();
        number += 1;
        match input.by_ref().take(LONGEST_LINE + 1).read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                done.stop = Some(Stop { line: number, error: error.into() });
                break;
            }
        }
        done.bytes += line.len() as u64;
        progress.bar.inc(line.len() as u64);
        if number % 512 == 0 {
            let records = progress.loaded();
            let rate = records as f64 / start.elapsed().as_secs_f64().max(0.001);
            progress.bar.set_message(format!("{} records, {} records/s", count(records), count(rate as u64)));
        }
        if line.len() as u64 > LONGEST_LINE {
            let message = format!("it is longer than {}; a value has at most 8 MiB", size(LONGEST_LINE));
            done.stop = Some(Stop { line: number, error: fault(Code::Refused, message) });
            break;
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if number < from_line || text.is_empty() {
            continue;
        }
        if format == Format::Tsv && text == b"\\." {
            break; // COPY's own end of data
        }
        let record = match codec::decode(format, text) {
            Ok(record) => record,
            Err(error) => {
                done.stop = Some(Stop { line: number, error: fault(Code::Refused, error) });
                break;
            }
        };
        if record.expiry_ms != 0 && record.expiry_ms <= now_ms {
            done.expired += 1;
            continue;
        }
        let job = job(number, record, text.len());
        let at = (partition_hash(&job.key) % lanes.len() as u64) as usize;
        let lane = &mut pending[at];
        // Within a batch the order of two puts of one key is nobody's promise.
        if lane.keys.contains(&job.key) && !lane.send(&lanes[at]) {
            break;
        }
        lane.push(job);
        if lane.full() && !lane.send(&lanes[at]) {
            break;
        }
    }
    for (lane, sender) in pending.iter_mut().zip(lanes) {
        lane.send(sender);
    }
    done
}

/// A batch being filled.
#[derive(Default)]
struct Pending {
    jobs: Vec<Job>,
    keys: HashSet<Bytes>,
    bytes: usize,
}

impl Pending {
    fn push(&mut self, job: Job) {
        self.bytes += job.bytes;
        self.keys.insert(job.key.clone());
        self.jobs.push(job);
    }

    fn full(&self) -> bool {
        self.jobs.len() >= BATCH_RECORDS || self.bytes >= BATCH_BYTES
    }

    /// Hands the batch over; false if its lane is gone.
    fn send(&mut self, lane: &mpsc::Sender<Vec<Job>>) -> bool {
        let batch = std::mem::take(self).jobs;
        batch.is_empty() || lane.blocking_send(batch).is_ok()
    }
}

/// A client by whose clock it is 1970, so that the ttl of a put is its expiry, to the millisecond.
/// Clients need a clock for nothing else.
fn at_the_epoch(context: &Context) -> Client {
    let env = Env::new(|| 0, rand::random::<u64>, |endpoint| endpoint.connect_lazy());
    Client::with(env, context.global.operator.clone()).deadline(context.global.timeout)
}

fn job(line: u64, record: Record, bytes: usize) -> Job {
    let data = match record.value {
        Datum::Bytes(bytes) => Data::Bytes(bytes.into()),
        Datum::Number(number) => Data::Number(number),
    };
    let options = Options {
        ttl: (record.expiry_ms != 0).then(|| Duration::from_millis(record.expiry_ms)),
        partition_key: record.partition.map(|p| p.into_key().into()),
        ..Options::default()
    };
    let key: Bytes = record.key.into();
    Job { line, op: Op::put(key.clone(), data).with(options), key, bytes }
}

/// Sends batches one after the other; after a failure it only takes the rest in.
async fn lane(
    keyspace: Keyspace,
    mut jobs: mpsc::Receiver<Vec<Job>>,
    progress: std::sync::Arc<Progress>,
) -> Option<Stop> {
    let mut stop: Option<Stop> = None;
    while let Some(batch) = jobs.recv().await {
        // What stands before the first failed line is still to be loaded, wherever it failed.
        let first_failed = *progress.failed.borrow();
        let batch: Vec<Job> = batch.into_iter().filter(|j| first_failed.is_none_or(|at| j.line < at)).collect();
        let lines: Vec<u64> = batch.iter().map(|j| j.line).collect();
        let answers = keyspace.batch(batch.into_iter().map(|j| j.op)).await;
        let mut loaded = 0;
        for (line, answer) in lines.into_iter().zip(answers) {
            match answer {
                Ok(_) => loaded += 1,
                Err(error) => {
                    progress.fail(line);
                    if stop.as_ref().is_none_or(|s| line < s.line) {
                        stop = Some(Stop { line, error: error.into() });
                    }
                }
            }
        }
        progress.add(loaded);
    }
    stop
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_told_or_named() {
        assert_eq!(format_of(None, Some(Path::new("a.TSV"))).unwrap(), Format::Tsv);
        assert_eq!(format_of(None, Some(Path::new("a.jsonl"))).unwrap(), Format::Jsonl);
        assert_eq!(format_of(Some(Format::Tsv), Some(Path::new("a.jsonl"))).unwrap(), Format::Tsv);
        assert!(format_of(None, Some(Path::new("a.csv"))).is_err());
        assert!(format_of(None, None).is_err());
    }

    /// Runs the reader over a text with one lane; what it dealt out, and its end.
    fn dealt(format: Format, text: &str) -> (Vec<Vec<u64>>, Outcome) {
        let progress =
            Progress { bar: ProgressBar::hidden(), records: 0.into(), failed: tokio::sync::watch::Sender::new(None) };
        let (sender, mut batches) = mpsc::channel(100);
        let input = Box::new(std::io::Cursor::new(text.as_bytes().to_vec()));
        let done = read(input, format, 1, 1000, &[sender], &progress);
        let mut lines = Vec::new();
        while let Some(batch) = batches.blocking_recv() {
            lines.push(batch.iter().map(|j| j.line).collect());
        }
        (lines, done)
    }

    #[test]
    fn a_bad_line_is_named_and_those_before_it_are_loaded() {
        let (lines, done) =
            dealt(Format::Jsonl, "{\"key\":\"a\",\"value\":\"1\"}\n\nnonsense\n{\"key\":\"b\",\"value\":\"1\"}\n");
        assert_eq!(lines, [[1]]);
        let stop = done.stop.unwrap();
        assert_eq!((stop.line, code_of(&stop.error)), (3, Code::Refused));
    }

    #[test]
    fn a_key_that_comes_again_waits_for_the_next_batch() {
        let (lines, done) = dealt(Format::Tsv, "a\t1\nb\t1\na\t2\r\n\\.\nc\t3\n");
        assert_eq!(lines, [vec![1, 2], vec![3]]);
        assert!(done.stop.is_none());
    }

    #[test]
    fn what_has_expired_is_left_out() {
        let (lines, done) = dealt(Format::Tsv, "a\t1\texpiry_ms=999\nb\t1\texpiry_ms=1001\n");
        assert_eq!(lines, [[2]]);
        assert_eq!(done.expired, 1);
    }
}
