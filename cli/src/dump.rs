//! `vasto dump`: writes every record of a keyspace, so that `load` makes the same map.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use futures::TryStreamExt;
use vasto_client::{Keyspace, ScanOptions};

use crate::codec::{self, Format};
use crate::context::Context;
use crate::data::entry_record;
use crate::load::{format_of, rates};
use crate::output::{Output, count, counted, size, span};

/// Arguments of `vasto dump`.
#[derive(Args, Debug)]
pub(crate) struct Dump {
    /// The keyspace's name.
    keyspace: String,
    /// The file, replaced when the dump is complete; left out or -: standard output.
    file: Option<PathBuf>,
    /// The format; by the file's extension (.tsv, .jsonl) unless given.
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Only keys that begin so.
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
}

pub(crate) async fn run(context: &Context, args: Dump) -> anyhow::Result<()> {
    let file = args.file.as_deref().filter(|f| *f != Path::new("-"));
    let format = match (args.format, context.output()) {
        (None, Some(Output::Json)) if file.is_none() => Format::Jsonl,
        (None, _) if file.is_none() => Format::Tsv,
        (format, _) => format_of(format, file)?,
    };
    let keyspace = context.keyspace(&args.keyspace).await?;
    let options = ScanOptions::new().prefix(args.prefix.unwrap_or_default());
    let Some(path) = file else {
        write(&keyspace, options, format, std::io::stdout()).await?;
        return Ok(());
    };

    // Under another name until it is complete, so that half a dump is never taken for a whole one.
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Partial(PathBuf::from(partial));
    let start = Instant::now();
    let out = std::fs::File::create(&partial.0).with_context(|| format!("can't write {}", partial.0.display()))?;
    let (records, bytes) = write(&keyspace, options, format, &out).await?;
    out.sync_all()?;
    std::fs::rename(&partial.0, path).with_context(|| format!("can't write {}", path.display()))?;
    let time = start.elapsed();
    let rates = rates(records, bytes, time);
    eprintln!("dumped {}, {} in {}: {rates}", counted(records, "record"), size(bytes), span(time));
    Ok(())
}

/// A file that goes, however the dump ends; complete, it has another name by then.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn write(
    keyspace: &Keyspace,
    options: ScanOptions,
    format: Format,
    out: impl Write,
) -> anyhow::Result<(u64, u64)> {
    let bar = crate::output::byte_bar(None);
    let mut out = BufWriter::with_capacity(256 << 10, out);
    let (mut records, mut bytes) = (0u64, 0u64);
    let mut entries = keyspace.scan(options);
    while let Some(entry) = entries.try_next().await? {
        let line = codec::encode(format, &entry_record(entry));
        out.write_all(&line).context("can't write the dump")?;
        records += 1;
        bytes += line.len() as u64;
        bar.inc(line.len() as u64);
        if records.is_multiple_of(512) {
            bar.set_message(format!("{} records", count(records)));
        }
    }
    out.flush().context("can't write the dump")?;
    bar.finish_and_clear();
    Ok((records, bytes))
}
