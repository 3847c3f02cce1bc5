//! A constant load on a keyspace that knows what it wrote: see `vasto_tests::load`.
//! It prints a line of JSON each second and answers on a socket; at SIGTERM it reads
//! every key, prints a last line, and ends with 1 if anything failed or was lost.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use vasto_client::hash::partition_hash;
use vasto_client::{Client, Keyspace};
use vasto_tests::load::{Counts, Load, Settings, given};

const USAGE: &str = "\
vasto-load KEYSPACE [SETTINGS]   writes and reads until SIGTERM
vasto-load ask QUESTION          asks a running one: counts, mark (what came since the last mark), or
                                 verify (holds the load still, reads every key, goes on)
Settings:
  --operator HOST:PORT   127.0.0.1:8278
  --range NAME           its keys begin with load/NAME/ (a)
  --keys N               how many keys it writes (2000)
  --writers N            (6)
  --readers N            (6)
  --pause-ms N           the longest rest after an operation (40)
  --timeout-s N          an operation that takes longer has failed (10)
  --settle-s N           how long replicas may take to become equal (10)
  --given FILE           JSON lines with key and value that nobody changes: they are read and verified too
  --fill                 and put first
  --ledger FILE          what it knows of its keys, so that a killed load goes on where it was
  --socket FILE          where it answers (/tmp/vasto-load)";

struct Args {
    keyspace: String,
    question: Option<String>,
    operator: String,
    settings: Settings,
    timeout: Duration,
    settle: Duration,
    given: Option<PathBuf>,
    fill: bool,
    ledger: Option<PathBuf>,
    socket: PathBuf,
}

fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Args> {
    let pause = Duration::from_millis(40);
    let mut args = Args {
        keyspace: String::new(),
        question: None,
        operator: "127.0.0.1:8278".to_owned(),
        settings: Settings { range: "a".to_owned(), keys: 2000, writers: 6, readers: 6, pause },
        timeout: Duration::from_secs(10),
        settle: Duration::from_secs(10),
        given: None,
        fill: false,
        ledger: None,
        socket: PathBuf::from("/tmp/vasto-load"),
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        let number = |text: String| text.parse::<u32>().with_context(|| format!("{word} {text}: not a number"));
        match word.as_str() {
            "--operator" => args.operator = value()?,
            "--range" => args.settings.range = value()?,
            "--keys" => args.settings.keys = number(value()?)?.max(1) as usize,
            "--writers" => args.settings.writers = number(value()?)?.max(1) as usize,
            "--readers" => args.settings.readers = number(value()?)? as usize,
            "--pause-ms" => args.settings.pause = Duration::from_millis(number(value()?)?.into()),
            "--timeout-s" => args.timeout = Duration::from_secs(number(value()?)?.into()),
            "--settle-s" => args.settle = Duration::from_secs(number(value()?)?.into()),
            "--given" => args.given = Some(value()?.into()),
            "--fill" => args.fill = true,
            "--ledger" => args.ledger = Some(value()?.into()),
            "--socket" => args.socket = value()?.into(),
            "ask" if args.keyspace.is_empty() => args.question = Some(value()?),
            name if args.keyspace.is_empty() && !name.starts_with('-') => args.keyspace = name.to_owned(),
            other => bail!("{other}: no such setting"),
        }
    }
    if args.keyspace.is_empty() && args.question.is_none() {
        bail!("which keyspace?");
    }
    Ok(args)
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{error:#}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match &args.question {
        Some(question) => Box::pin(ask(&args.socket, question)).await,
        None => Box::pin(run(args)).await,
    };
    done.unwrap_or_else(|error| {
        println!("{}", json!({"error": format!("{error:#}")}));
        ExitCode::FAILURE
    })
}

/// Puts a question to a running load and prints the answer.
async fn ask(socket: &Path, question: &str) -> anyhow::Result<ExitCode> {
    let stream =
        UnixStream::connect(socket).await.with_context(|| format!("no load answers at {}", socket.display()))?;
    let mut stream = BufReader::new(stream);
    stream.write_all(format!("{question}\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_line(&mut answer).await?;
    print!("{answer}");
    Ok(if answer.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The keyspace, once it is there and answers; says each second what it waits for.
async fn open(client: &Client, name: &str) -> Keyspace {
    loop {
        let waiting = match client.keyspace(name).await {
            Ok(keyspace) => match keyspace.get("load").await {
                Ok(_) => return keyspace,
                Err(error) => error,
            },
            Err(error) => error,
        };
        println!("{}", json!({"waiting": waiting.to_string()}));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let client = Client::connect(&args.operator)?.deadline(args.timeout);
    let keyspace = tokio::select! {
        keyspace = open(&client, &args.keyspace) => keyspace,
        _ = term.recv() => bail!("ended before the keyspace was there"),
        _ = int.recv() => bail!("ended before the keyspace was there"),
    };
    let records = args.given.as_deref().map(given).transpose()?.unwrap_or_default();
    if args.fill {
        Load::put_given(&keyspace, &records).await?;
    }
    let hashes = records.into_iter().map(|(key, value)| (key, partition_hash(&value))).collect();
    let load = Load::new(keyspace, args.settings, args.ledger.as_deref(), hashes)?;
    Box::pin(load.fill()).await;
    // From now on every replica has every key, so a read that finds nothing is a loss.
    let verdict = Box::pin(load.verify(args.settle)).await;
    println!("{}", json!({"begun": verdict.json()}));

    // A socket that a killed load left behind.
    let _ = std::fs::remove_file(&args.socket);
    let listener =
        UnixListener::bind(&args.socket).with_context(|| format!("can't listen at {}", args.socket.display()))?;
    tokio::spawn(answer(load.clone(), listener, args.settle));
    let running = load.clone();
    let mut running = tokio::spawn(async move { running.run().await });
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut last = Counts::default();
    loop {
        tokio::select! {
            _ = tick.tick() => {
                let now = load.counts();
                let second = now.since(&last);
                println!("{}", line(&now, &second));
                last = now;
            }
            _ = term.recv() => load.stop(),
            _ = int.recv() => load.stop(),
            ended = &mut running => {
                ended?;
                break;
            }
        }
    }
    let end = Box::pin(load.verify(args.settle)).await;
    let counts = load.counts();
    let mut line = counts.json();
    let lost = counts.lost + (verdict.wrong.len() + end.wrong.len()) as u64;
    line["lost"] = lost.into();
    line["verified"] = end.json();
    println!("{line}");
    Ok(if counts.failed == 0 && lost == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The counts of the whole run with the latencies of one second.
fn line(all: &Counts, second: &Counts) -> Json {
    let mut line = all.json();
    for name in ["p99_ms", "longest_ms"] {
        line[name] = second.json()[name].take();
    }
    line
}

/// Answers one question a connection.
async fn answer(load: Arc<Load>, listener: UnixListener, settle: Duration) {
    while let Ok((stream, _)) = listener.accept().await {
        let load = load.clone();
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut question = String::new();
            if stream.read_line(&mut question).await.is_err() {
                return;
            }
            let answer = match question.trim() {
                "counts" => load.counts().json(),
                "mark" => load.mark().json(),
                "verify" => load.verify(settle).await.json(),
                other => json!({"error": format!("no such question: {other}")}),
            };
            // Who has gone away needs no answer.
            let _ = stream.write_all(format!("{answer}\n").as_bytes()).await;
        });
    }
}
