//! What people and scripts see: formats, tables, sizes, bars. Colours and bars
//! appear only on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::ValueEnum;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use crossterm::style::{Color, Stylize};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

/// `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs: one JSON document, or one a line where there may be many.
    Json,
    /// The bare bytes, without a newline of our own.
    Raw,
}

/// Writes all of it to standard output, at once.
pub(crate) fn emit(bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes.as_ref())?;
    out.flush()?;
    Ok(())
}

/// Writes one line to standard output.
pub(crate) fn emit_line(line: impl AsRef<str>) -> anyhow::Result<()> {
    emit(format!("{}\n", line.as_ref()))
}

/// Writes a JSON document to standard output: pretty on a terminal, else in one line.
pub(crate) fn emit_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let text = if std::io::stdout().is_terminal() { format!("{value:#}") } else { value.to_string() };
    emit_line(text)
}

/// Whether colours are welcome on standard output (<https://no-color.org>).
pub(crate) fn colours() -> bool {
    std::io::stdout().is_terminal() && no_color_unset()
}

/// Whether the user has not asked for plain text.
pub(crate) fn no_color_unset() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// The text in this colour, where colours are welcome.
pub(crate) fn paint(text: &str, color: Color) -> String {
    if colours() { text.with(color).to_string() } else { text.to_string() }
}

/// Columns under headings, as kubectl prints them; ends in a newline.
pub(crate) fn table<R: IntoIterator<Item = String>>(headings: &[&str], rows: impl IntoIterator<Item = R>) -> String {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(headings.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    let mut text = String::new();
    for line in table.to_string().lines() {
        text.push_str(line.strip_prefix(' ').unwrap_or(line).trim_end());
        text.push('\n');
    }
    text
}

/// 1536 → "1.5 KiB".
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// 1234567 → "1,234,567".
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// One with its noun: "1 record", "2 records".
pub(crate) fn counted(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

/// Seconds for people: "3.4 s", "2 min 5 s", "4 h 10 min".
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=9 => format!("{:.1} s", time.as_secs_f64()),
        10..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..=86_399 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Text that does a terminal no harm: control characters escaped, invalid UTF-8 marked.
pub(crate) fn visible(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() && c != '\n' && c != '\t' {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// A key or value within a sentence: on one line, and not too long.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    const LONGEST: usize = 100;
    let text = visible(bytes).replace('\n', "\\n").replace('\t', "\\t");
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("\"{}…\"", &text[..at]),
        None => format!("\"{text}\""),
    }
}

/// A bar on standard error that counts bytes; `None`: their number is unknown. Hidden off a terminal.
pub(crate) fn byte_bar(total: Option<u64>) -> ProgressBar {
    let template = match total {
        Some(_) => "{bar:30} {bytes}/{total_bytes}  {msg}  {bytes_per_sec}  {eta} left",
        None => "{spinner} {bytes}  {msg}  {bytes_per_sec}",
    };
    bar(total, template)
}

/// A bar on standard error over `total` of anything, with a message.
pub(crate) fn count_bar(total: Option<u64>, noun: &str) -> ProgressBar {
    let template = match total {
        Some(_) => format!("{{bar:30}} {{human_pos}}/{{human_len}} {noun}  {{per_second}}  {{msg}}  {{eta}} left"),
        None => format!("{{spinner}} {{human_pos}} {noun}  {{per_second}}  {{msg}}"),
    };
    bar(total, &template)
}

/// A bar over time: how much of `whole` has gone by.
pub(crate) fn time_bar(whole: Duration) -> ProgressBar {
    bar(Some(whole.as_millis() as u64), "{bar:30} {elapsed}  {msg}")
}

/// A bar for the phase of a change: a share in thousandths, and a line.
pub(crate) fn phase_bar() -> ProgressBar {
    bar(Some(1000), "{bar:20} {wide_msg}")
}

/// A sign of life while there is nothing to count.
pub(crate) fn waiting_bar(message: String) -> ProgressBar {
    let bar = bar(None, "{spinner} {msg}  {elapsed}");
    bar.set_message(message);
    bar
}

fn bar(total: Option<u64>, template: &str) -> ProgressBar {
    let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    // A template that can't be read would show as the plain bar: not worth failing for.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸ ").with_key(
            "per_second",
            |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = write!(out, "{}/s", count(state.per_sec() as u64));
            },
        ));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 << 30), "5.0 GiB");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(999), "999");
        assert_eq!(counted(1, "record"), "1 record");
        assert_eq!(span(Duration::from_millis(3_440)), "3.4 s");
        assert_eq!(span(Duration::from_secs(125)), "2 min 5 s");
    }

    #[test]
    fn a_terminal_is_not_harmed() {
        assert_eq!(visible(b"a\x1b[2J\xff\n"), "a\\u{1b}[2J\\xff\n");
        assert_eq!(quoted(b"a\nb"), "\"a\\nb\"");
        assert!(quoted(&[b'x'; 500]).chars().count() < 110);
    }

    #[test]
    fn tables_have_no_frame() {
        let text = table(&["NAME", "SHARDS"], [["packages".to_string(), "3".to_string()]]);
        assert_eq!(text, "NAME      SHARDS\npackages  3\n");
    }
}
