//! The verbs on single keys: put, get, delete, add, max, min, append; and scan.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use futures::TryStreamExt;
use vasto_client::{Data, Entry, MAX_VALUE, Options, ScanOptions, Value};

use crate::codec::{self, Datum, Format, Partition, Record, number_text};
use crate::context::{Context, parse_duration};
use crate::exit::{Code, fault};
use crate::output::{Output, emit, emit_line, quoted, visible};

/// A key on the command line.
#[derive(Args, Clone, Debug)]
pub(crate) struct KeyArg {
    /// The key.
    key: OsString,
    /// What decides the shard, where it is not the key itself. Readers must name the same.
    #[arg(long, value_name = "KEY")]
    partition_key: Option<OsString>,
    /// KEY, VALUE and partition key are escaped as in tsv: \t \n \\ \x00.
    #[arg(short, long)]
    escaped: bool,
}

impl KeyArg {
    /// The key, and the partition key if it is another.
    pub(crate) fn bytes(&self) -> anyhow::Result<(Bytes, Option<Bytes>)> {
        let partition_key = self.partition_key.as_deref().map(|k| self.plain("partition key", k)).transpose()?;
        Ok((self.plain("key", &self.key)?, partition_key))
    }

    fn plain(&self, what: &str, text: &OsStr) -> anyhow::Result<Bytes> {
        if !self.escaped {
            return Ok(Bytes::copy_from_slice(text.as_bytes()));
        }
        match codec::unescape(text.as_bytes()) {
            Ok(bytes) => Ok(bytes.into()),
            Err(error) => Err(fault(Code::Usage, format!("the {what} {:?}: {error}", text.to_string_lossy()))),
        }
    }
}

/// Arguments of `vasto get`.
#[derive(Args, Debug)]
pub(crate) struct Get {
    /// The keyspace's name.
    keyspace: String,
    #[command(flatten)]
    key: KeyArg,
}

/// Arguments of `vasto put`.
#[derive(Args, Debug)]
pub(crate) struct Put {
    /// The keyspace's name.
    keyspace: String,
    #[command(flatten)]
    key: KeyArg,
    /// The value; left out or -: standard input, to its end, byte by byte.
    value: Option<OsString>,
    /// Store VALUE as a number, which add, max and min take on from.
    #[arg(long)]
    number: bool,
    /// The key reads as missing after this time.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// The write's own time: an older write does not replace a newer one. Unix milliseconds or RFC 3339.
    #[arg(long, value_name = "WHEN", value_parser = parse_time)]
    time: Option<u64>,
}

/// Arguments of `vasto delete`.
#[derive(Args, Debug)]
pub(crate) struct Delete {
    /// The keyspace's name.
    keyspace: String,
    #[command(flatten)]
    key: KeyArg,
    /// The deletion's own time: it leaves newer writes alone. Unix milliseconds or RFC 3339.
    #[arg(long, value_name = "WHEN", value_parser = parse_time)]
    time: Option<u64>,
}

/// Arguments of `vasto add`, `max` and `min`.
#[derive(Args, Debug)]
pub(crate) struct Merge {
    /// The keyspace's name.
    keyspace: String,
    #[command(flatten)]
    key: KeyArg,
    /// The number; left out or -: standard input.
    #[arg(allow_negative_numbers = true)]
    number: Option<String>,
}

/// Arguments of `vasto append`.
#[derive(Args, Debug)]
pub(crate) struct Append {
    /// The keyspace's name.
    keyspace: String,
    #[command(flatten)]
    key: KeyArg,
    /// The bytes to add at the end; left out or -: standard input.
    value: Option<OsString>,
}

/// Arguments of `vasto scan`.
#[derive(Args, Debug)]
pub(crate) struct Scan {
    /// The keyspace's name.
    keyspace: String,
    /// Only keys that begin so.
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<OsString>,
    /// Only keys after this one.
    #[arg(long, value_name = "KEY")]
    after: Option<OsString>,
    /// At most this many.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Print keys without values.
    #[arg(long)]
    keys: bool,
}

pub(crate) async fn get(context: &Context, args: Get) -> anyhow::Result<()> {
    let (key, partition_key) = args.key.bytes()?;
    let keyspace = context.keyspace(&args.keyspace).await?;
    let Some(value) = keyspace.get_with(key.clone(), options(partition_key)).await? else {
        return Err(fault(Code::NotFound, format!("key {} is not in keyspace {:?}", quoted(&key), args.keyspace)));
    };
    let terminal = std::io::stdout().is_terminal();
    match context.output().unwrap_or(if terminal { Output::Table } else { Output::Raw }) {
        Output::Raw => emit(raw(&value.data)),
        Output::Json => emit_line(codec::encode_json(&record(key, value, None))),
        Output::Table => {
            let text = visible(&raw(&value.data));
            emit_line(text.strip_suffix('\n').unwrap_or(&text))
        }
    }
}

pub(crate) async fn put(context: &Context, args: Put) -> anyhow::Result<()> {
    let (key, partition_key) = args.key.bytes()?;
    let bytes = value(context, &args.key, args.value.as_deref())?;
    let data = if args.number { Data::Number(number(&String::from_utf8_lossy(&bytes))?) } else { Data::Bytes(bytes) };
    let keyspace = context.keyspace(&args.keyspace).await?;
    let options = Options { ttl: args.ttl, time_ms: args.time, ..options(partition_key) };
    keyspace.put_with(key, data, options).await?;
    Ok(())
}

pub(crate) async fn delete(context: &Context, args: Delete) -> anyhow::Result<()> {
    let (key, partition_key) = args.key.bytes()?;
    let keyspace = context.keyspace(&args.keyspace).await?;
    keyspace.delete_with(key, Options { time_ms: args.time, ..options(partition_key) }).await?;
    Ok(())
}

pub(crate) async fn merge(context: &Context, args: Merge, kind: fn(f64) -> vasto_client::Merge) -> anyhow::Result<()> {
    let (key, partition_key) = args.key.bytes()?;
    let text = match args.number {
        Some(text) if text != "-" => text,
        _ => String::from_utf8_lossy(&stdin(context, "NUMBER")?).into_owned(),
    };
    let number = number(&text)?;
    let keyspace = context.keyspace(&args.keyspace).await?;
    keyspace.merge_with(key, kind(number), options(partition_key)).await?;
    Ok(())
}

pub(crate) async fn append(context: &Context, args: Append) -> anyhow::Result<()> {
    let (key, partition_key) = args.key.bytes()?;
    let bytes = value(context, &args.key, args.value.as_deref())?;
    let keyspace = context.keyspace(&args.keyspace).await?;
    keyspace.merge_with(key, vasto_client::Merge::Append(bytes), options(partition_key)).await?;
    Ok(())
}

pub(crate) async fn scan(context: &Context, args: Scan) -> anyhow::Result<()> {
    let keyspace = context.keyspace(&args.keyspace).await?;
    let options = ScanOptions {
        prefix: args.prefix.unwrap_or_default().into_vec().into(),
        after: args.after.map(|k| k.into_vec().into()),
        limit: args.limit,
        head: false,
    };
    let mut entries = keyspace.scan(options);
    let terminal = std::io::stdout().is_terminal();
    let width = terminal.then(|| crossterm::terminal::size().map_or(80, |(columns, _)| usize::from(columns)));
    let mut out = std::io::BufWriter::new(std::io::stdout());
    while let Some(entry) = entries.try_next().await? {
        let record = entry_record(entry);
        let line = match context.output() {
            Some(Output::Json) if args.keys => {
                format!("{}\n", serde_json::json!({"key": String::from_utf8_lossy(&record.key)})).into_bytes()
            }
            Some(Output::Json) => codec::encode(Format::Jsonl, &record),
            Some(Output::Raw) if args.keys => [&record.key[..], b"\n"].concat(),
            _ if args.keys => [codec::escape(&record.key), b"\n".to_vec()].concat(),
            _ => codec::encode(Format::Tsv, &record),
        };
        match width.filter(|_| context.output().is_none()) {
            Some(width) => writeln!(out, "{}", cut(&visible(line.trim_ascii_end()), width))?,
            None => out.write_all(&line)?,
        }
        if terminal {
            out.flush()?;
        }
    }
    out.flush()?;
    Ok(())
}

/// One line's worth of text, so that a scan on a terminal stays a list.
fn cut(line: &str, width: usize) -> String {
    // A tab takes up to 8 columns; one is all that a line has before its value.
    let room = width.saturating_sub(9).max(20);
    match line.char_indices().nth(room) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line.to_string(),
    }
}

fn options(partition_key: Option<Bytes>) -> Options {
    Options { partition_key, ..Options::default() }
}

/// The bytes of VALUE, or of standard input.
fn value(context: &Context, key: &KeyArg, value: Option<&OsStr>) -> anyhow::Result<Bytes> {
    match value {
        Some(value) if value != "-" => key.plain("value", value),
        _ => stdin(context, "VALUE"),
    }
}

fn stdin(context: &Context, what: &str) -> anyhow::Result<Bytes> {
    if context.in_shell {
        return Err(fault(Code::Usage, format!("in the shell {what} must be given; quote it if it has spaces")));
    }
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().take(MAX_VALUE as u64 + 1).read_to_end(&mut bytes);
    read.context("can't read standard input")?;
    if bytes.len() > MAX_VALUE {
        let message = format!("standard input has more than {MAX_VALUE} bytes (8 MiB), the most that a value may have");
        return Err(fault(Code::Refused, message));
    }
    Ok(bytes.into())
}

fn number(text: &str) -> anyhow::Result<f64> {
    codec::parse_number(text).map_err(|error| fault(Code::Usage, error))
}

/// Takes unix milliseconds or RFC 3339.
fn parse_time(text: &str) -> Result<u64, String> {
    if let Ok(ms) = text.parse::<u64>() {
        return if ms > 0 { Ok(ms) } else { Err("it must be above 0".into()) };
    }
    humantime::parse_rfc3339_weak(text)
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map(|time| time.as_millis() as u64)
        .ok_or_else(|| "it must be unix milliseconds or like 2026-01-31T12:00:00Z".into())
}

/// A value's bytes as `get` prints them; a number in decimal.
fn raw(data: &Data) -> Vec<u8> {
    match data {
        Data::Bytes(bytes) => bytes.to_vec(),
        Data::Number(number) => number_text(*number).into_bytes(),
    }
}

/// A scanned entry as a dump writes it.
pub(crate) fn entry_record(entry: Entry) -> Record {
    let own = vasto_client::hash::partition_hash(&entry.key);
    let partition = entry.partition_hash.filter(|hash| *hash != own).map(Partition::Hash);
    record(entry.key, entry.value, partition)
}

fn record(key: Bytes, value: Value, partition: Option<Partition>) -> Record {
    let data = match value.data {
        Data::Bytes(bytes) => Datum::Bytes(bytes.to_vec()),
        Data::Number(number) => Datum::Number(number),
    };
    Record { key: key.to_vec(), value: data, expiry_ms: value.expiry_ms.unwrap_or(0), partition }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_milliseconds_or_dates() {
        assert_eq!(parse_time("1700000000000"), Ok(1_700_000_000_000));
        assert_eq!(parse_time("2023-11-14T22:13:20Z"), Ok(1_700_000_000_000));
        assert!(parse_time("yesterday").is_err());
        assert!(parse_time("0").is_err());
    }

    #[test]
    fn a_long_line_is_cut() {
        assert_eq!(cut(&"x".repeat(200), 80).chars().count(), 72);
        assert_eq!(cut("short", 80), "short");
    }
}
