//! What a run found, as a table, as JSON, and as docs/performance.md with its plot.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde::Serialize;

use crate::sample::{Sample, median};
use crate::watchers::{self, Figure};

/// Between these the file is written by `--write`; the rest of it is a person's.
const BEGIN: &str = "<!-- generated: begin -->";
const END: &str = "<!-- generated: end -->";

/// A comparison's ratios, one a round.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    pub name: String,
    pub what: String,
    pub subject: String,
    pub peer: String,
    pub ratios: Vec<f64>,
    pub target: Option<f64>,
    pub floor: Option<f64>,
}

impl Ratio {
    pub fn median(&self) -> f64 {
        median(self.ratios.iter().copied()).unwrap_or(f64::NAN)
    }

    pub fn min(&self) -> f64 {
        self.ratios.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub fn max(&self) -> f64 {
        self.ratios.iter().copied().fold(0.0, f64::max)
    }

    fn verdict(&self) -> &'static str {
        match self.target {
            None => "-",
            Some(target) if self.median() >= target => "ok",
            Some(_) => "below",
        }
    }

    fn cells(&self) -> Vec<String> {
        let target = self.target.map_or("-".to_owned(), |target| format!("{target}"));
        vec![
            self.name.clone(),
            self.what.clone(),
            format!("{:.2}", self.median()),
            format!("{:.2}..{:.2}", self.min(), self.max()),
            target,
            self.verdict().to_owned(),
        ]
    }
}

const RATIO_TITLES: [&str; 6] = ["NAME", "VASTO: PEER", "RATIO", "MIN..MAX", "TARGET", ""];

/// What was measured in one way, in all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub name: String,
    /// Operations, or bytes.
    pub unit: &'static str,
    pub samples: Vec<Sample>,
    /// The rate as a part of the first one's of this kind.
    pub relative: Option<f64>,
    /// Those that are told relative to one another.
    #[serde(skip)]
    pub kind: &'static str,
}

impl Measured {
    pub fn new(name: String, samples: Vec<Sample>) -> Self {
        Self { name, unit: "operations", samples, relative: None, kind: "" }
    }

    /// The middle one of the rounds, a second.
    pub fn rate(&self) -> f64 {
        median(self.samples.iter().map(Sample::rate)).unwrap_or(f64::NAN)
    }

    fn middle(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        median(self.samples.iter().filter_map(of))
    }

    fn cells(&self) -> Vec<String> {
        let number = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
        let memory = self.middle(|s| s.memory.map(|bytes| bytes as f64 / f64::from(1 << 20)));
        let rate = if self.unit == "bytes" { format!("{:.0} MB", self.rate() / 1e6) } else { count(self.rate()) };
        vec![
            self.name.clone(),
            rate,
            number(self.relative, 2),
            number(self.middle(Sample::server_micros).filter(|_| self.unit != "bytes"), 1),
            number(self.middle(Sample::client_micros).filter(|_| self.unit != "bytes"), 1),
            number(self.middle(|s| s.p50), 0),
            number(self.middle(|s| s.p99), 0),
            number(self.middle(|s| s.p999), 0),
            number(memory, 0),
            number(self.middle(|s| s.quiet_after), 1),
        ]
    }

    /// All rows, without the columns that none of them has anything in.
    fn rows(all: &[Self]) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let rows: Vec<Vec<String>> = all.iter().map(Self::cells).collect();
        let used: Vec<usize> = (0..MEASURED_TITLES.len()).filter(|at| rows.iter().any(|row| row[*at] != "-")).collect();
        let titles = used.iter().map(|at| MEASURED_TITLES[*at]).collect();
        (titles, rows.iter().map(|row| used.iter().map(|at| row[*at].clone()).collect()).collect())
    }
}

const MEASURED_TITLES: [&str; 10] = [
    "MEASURED",
    "PER SECOND",
    "RELATIVE",
    "SERVER µs/op",
    "CLIENT µs/op",
    "P50 µs",
    "P99 µs",
    "P99.9 µs",
    "MEMORY MiB",
    "QUIET AFTER s",
];

/// Where it ran.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub commit: String,
    pub date: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    pub profile: &'static str,
}

impl Machine {
    /// This one.
    pub fn here(date: String) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kilobytes = memory.and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
        Self {
            commit: said("git", &["describe", "--always", "--dirty"]).unwrap_or_else(|| "unknown".to_owned()),
            date,
            cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: kilobytes.unwrap_or(0) * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            profile: if cfg!(debug_assertions) { "dev" } else { "release" },
        }
    }

    fn line(&self) -> String {
        let Self { commit, date, cpu, cores, memory_bytes, kernel, profile } = self;
        let memory = *memory_bytes as f64 / f64::from(1 << 30);
        format!("commit {commit} ({profile}), {date}; {cores} cores of {cpu}, {memory:.0} GiB, Linux {kernel}")
    }
}

/// What a command prints, where it succeeds.
fn said(program: &str, args: &[&str]) -> Option<String> {
    // In the checkout that this was built from, wherever it is run.
    let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// All that a run found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: u32,
    pub seconds: f64,
    pub ratios: Vec<Ratio>,
    pub measured: Vec<Measured>,
    pub ycsb: Vec<Measured>,
    pub growth: Vec<Measured>,
    pub watchers: Option<watchers::Report>,
    pub notes: Vec<String>,
}

impl Report {
    /// The tables for people.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n{} rounds of {} s each\n", self.machine.line(), self.rounds, self.seconds);
        if !self.ratios.is_empty() {
            text += &format!("\n{}", table(&RATIO_TITLES, &self.ratios.iter().map(Ratio::cells).collect::<Vec<_>>()));
        }
        for measured in [&self.measured, &self.ycsb, &self.growth] {
            if !measured.is_empty() {
                let (titles, rows) = Measured::rows(measured);
                text += &format!("\n{}", table(&titles, &rows));
            }
        }
        if let Some(watchers) = &self.watchers {
            let rows: Vec<_> = watchers.figures.iter().map(Figure::cells).collect();
            text += &format!("\n{}\n{}", watchers.line(), table(&Figure::TITLES, &rows));
        }
        for note in &self.notes {
            text += &format!("\n{note}\n");
        }
        text
    }

    /// Rewrites the generated part of docs/performance.md, and the plot beside it.
    pub fn write(&self, docs: &Path) -> anyhow::Result<()> {
        let (page, plot) = (docs.join("performance.md"), docs.join("performance.svg"));
        let old = match std::fs::read_to_string(&page) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                format!("# Performance\n\n{BEGIN}\n{END}\n")
            }
            Err(error) => return Err(error).with_context(|| format!("can't read {}", page.display())),
        };
        let (Some(begin), Some(end)) = (old.find(BEGIN), old.find(END)) else {
            bail!("{} lacks the lines {BEGIN} and {END}; they must stand round the generated part", page.display());
        };
        let new = format!("{}{BEGIN}\n{}{}", &old[..begin], self.markdown(), &old[end..]);
        std::fs::write(&page, new).with_context(|| format!("can't write {}", page.display()))?;
        std::fs::write(&plot, self.svg()).with_context(|| format!("can't write {}", plot.display()))
    }

    fn markdown(&self) -> String {
        let mut text = format!(
            "{}.\n{} rounds of {} s each; a ratio is the median of the rounds' own ratios.\n\n",
            self.machine.line(),
            self.rounds,
            self.seconds
        );
        text += "![Ratios with their spread, and the targets](performance.svg)\n\n";
        text += &markdown_table(&RATIO_TITLES, &self.ratios.iter().map(Ratio::cells).collect::<Vec<_>>());
        let sections = [
            (
                "What was measured",
                "These figures are this machine's; only ratios say something of others. Latencies are a call's. Where there \
                 is no server, the client's CPU time is that of all. *Quiet after*: how long background work went on.",
                &self.measured,
            ),
            (
                "YCSB",
                "Records of 1,000 bytes, 100,000 at the start, 16 callers, Vasto alone; the figures are this machine's.",
                &self.ycsb,
            ),
            (
                "Growth",
                "*Relative*: to the first row of its kind. Rows of 1,000 bytes while the data grows, of 100 bytes while \
                 shards do. The caches of rows and blocks have 64 MiB.",
                &self.growth,
            ),
        ];
        for (title, words, measured) in sections {
            if !measured.is_empty() {
                let (titles, rows) = Measured::rows(measured);
                text += &format!("\n## {title}\n\n{words}\n\n{}", markdown_table(&titles, &rows));
            }
        }
        if let Some(watchers) = &self.watchers {
            let rows: Vec<_> = watchers.figures.iter().map(Figure::cells).collect();
            text += &format!(
                "\n## Watchers of one operator\n\n{}. The operator's topology server in a process of its own, its watchers \
                 in another on the same cores. All of them watch one keyspace, each one or two others too.\n\n{}",
                watchers.line(),
                markdown_table(&Figure::TITLES, &rows)
            );
        }
        for note in &self.notes {
            text += &format!("\n{note}\n");
        }
        text
    }

    /// A bar a comparison, from 1 (as fast as the peer) to the median, on a logarithmic scale.
    fn svg(&self) -> String {
        const WIDTH: f64 = 960.0;
        const LEFT: f64 = 430.0;
        const RIGHT: f64 = 900.0;
        const ROW: f64 = 26.0;
        const TOP: f64 = 44.0;
        const LINES: [f64; 10] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
        let ends = self.ratios.iter().flat_map(|r| [r.min(), r.max(), r.target.unwrap_or(1.0)]);
        let (low, high) = ends.fold((0.5f64, 2.0f64), |(low, high), x| (low.min(x), high.max(x)));
        let (low, high) = ((low * 0.8).max(0.005), (high * 1.25).min(200.0));
        let x = |ratio: f64| LEFT + (RIGHT - LEFT) * (ratio.clamp(low, high) / low).ln() / (high / low).ln();
        let height = TOP + ROW * self.ratios.len() as f64 + 40.0;
        let bottom = height - 36.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<style>text{{fill:#57606a}} .grid{{stroke:#8c959f;stroke-opacity:.35}} \
             .one{{stroke:#57606a}} .bar{{fill:#2f81f7;fill-opacity:.75}} .whisker{{stroke:#57606a;stroke-width:1.5}} \
             .target{{stroke:#57606a;stroke-width:3}} @media (prefers-color-scheme:dark){{text{{fill:#9ea7b3}} \
             .one,.whisker,.target{{stroke:#9ea7b3}}}}</style>\n<title>Vasto's rates as parts of its peers'</title>\n"
        );
        for line in LINES.into_iter().filter(|line| (low..=high).contains(line)) {
            let (at, class) = (x(line), if line == 1.0 { "one" } else { "grid" });
            svg += &format!("<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\n");
            svg += &format!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{line}</text>\n", bottom + 18.0);
        }
        svg += &format!(
            "<text x=\"{LEFT}\" y=\"22\">ratio, median of rounds; whiskers: least and greatest; thick tick: target</text>\n"
        );
        for (index, ratio) in self.ratios.iter().enumerate() {
            let top = TOP + ROW * index as f64;
            let (middle, median) = (top + ROW / 2.0, ratio.median());
            let (from, to) = (x(median.min(1.0)), x(median.max(1.0)));
            svg += &format!(
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
                LEFT - 12.0,
                middle + 4.5,
                escape(&ratio.what)
            );
            svg += &format!(
                "<rect class=\"bar\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\n",
                top + 5.0,
                (to - from).max(1.0),
                ROW - 10.0
            );
            let (least, most) = (x(ratio.min()), x(ratio.max()));
            svg += &format!(
                "<path class=\"whisker\" fill=\"none\" d=\"M{least:.1} {middle:.1}H{most:.1}M{least:.1} {0:.1}v8M{most:.1} {0:.1}v8\"/>\n",
                middle - 4.0
            );
            if let Some(target) = ratio.target {
                let at = x(target);
                svg += &format!(
                    "<line class=\"target\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\n",
                    top + 2.0,
                    top + ROW - 2.0
                );
            }
            svg += &format!("<text x=\"{}\" y=\"{:.1}\">{median:.2}</text>\n", RIGHT + 12.0, middle + 4.5);
        }
        svg + "</svg>\n"
    }

    /// Compares with the floors: lines for people, and how many passed and failed.
    pub fn check(&self) -> (String, usize, usize) {
        let (mut text, mut passed, mut failed) = (String::new(), 0, 0);
        for ratio in &self.ratios {
            let Some(floor) = ratio.floor else { continue };
            if ratio.max() >= floor {
                passed += 1;
            } else {
                failed += 1;
                text += &format!(
                    "{} ({}): the best of {} rounds is {:.3}; it must be {floor} at least\n",
                    ratio.name,
                    ratio.what,
                    ratio.ratios.len(),
                    ratio.max()
                );
            }
        }
        (text, passed, failed)
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A number with commas.
pub fn count(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Columns of the same width; all but words stand to the right.
fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let width = |text: &str| text.chars().count();
    let widths: Vec<usize> = titles
        .iter()
        .enumerate()
        .map(|(column, title)| rows.iter().map(|row| width(&row[column])).fold(width(title), usize::max))
        .collect();
    let mut text = String::new();
    let right: Vec<bool> = (0..titles.len()).map(|column| is_number(rows, column)).collect();
    let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let fill = " ".repeat(widths[column] - width(cell));
            line += &if right[column] { format!("{fill}{cell}  ") } else { format!("{cell}{fill}  ") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn is_number(rows: &[Vec<String>], column: usize) -> bool {
    rows.iter().all(|row| row[column] == "-" || row[column].starts_with(|c: char| c.is_ascii_digit()))
        && rows.iter().any(|row| row[column] != "-")
        && column > 0
}

fn markdown_table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = format!("| {} |\n|", titles.join(" | ").to_lowercase().replace("mib", "MiB"));
    for column in 0..titles.len() {
        text += if is_number(rows, column) { "--:|" } else { "---|" };
    }
    text.push('\n');
    for row in rows {
        text += &format!("| {} |\n", row.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_commas() {
        assert_eq!([count(7.0), count(1234.4), count(1_234_567.0)], ["7", "1,234", "1,234,567"]);
    }

    #[test]
    fn the_best_round_counts_against_the_floor() {
        let ratio = |ratios: &[f64]| Ratio {
            name: "put".into(),
            what: "put".into(),
            subject: "a".into(),
            peer: "b".into(),
            ratios: ratios.to_vec(),
            target: Some(1.0),
            floor: Some(0.4),
        };
        let report = Report {
            machine: Machine::here("today".into()),
            rounds: 2,
            seconds: 1.0,
            ratios: vec![ratio(&[0.1, 0.5]), ratio(&[0.1, 0.3])],
            measured: Vec::new(),
            ycsb: Vec::new(),
            growth: Vec::new(),
            watchers: None,
            notes: Vec::new(),
        };
        let (text, passed, failed) = report.check();
        assert_eq!((passed, failed), (1, 1));
        assert!(text.contains("is 0.300; it must be 0.4"), "{text}");
    }
}
