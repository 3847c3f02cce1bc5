//! How a keyspace looks to people. Pure: a resource in, text out.

use std::fmt::Write;
use std::time::{Duration, Instant};

use crossterm::style::Color;
use vasto_client::v1::Topology;
use vasto_crds::{Keyspace, KeyspaceStatus, Phase, Progress};

use crate::output::{count, counted, paint, size, span, table};

/// The columns that `kubectl get keyspaces` has.
pub(crate) fn list<'a>(keyspaces: impl Iterator<Item = &'a Keyspace>, now_ms: u64) -> String {
    table(
        &["NAME", "SHARDS", "READY", "REPLICATION", "PHASE", "VERSION", "AGE"],
        keyspaces.map(|k| {
            let status = k.status.clone().unwrap_or_default();
            [
                k.name().to_string(),
                k.spec.shards.to_string(),
                status.ready.clone().unwrap_or_else(|| "-".into()),
                k.spec.replication_factor.to_string(),
                status.phase.map_or_else(|| "-".into(), |p| p.to_string()),
                status.topology_version.map_or_else(|| "-".into(), |v| v.to_string()),
                age(k, now_ms).unwrap_or_else(|| "-".into()),
            ]
        }),
    )
}

fn age(keyspace: &Keyspace, now_ms: u64) -> Option<String> {
    let made = keyspace.metadata.creation_timestamp.as_ref()?.0.as_millisecond();
    Some(span(Duration::from_millis(now_ms.saturating_sub(made.max(0) as u64))))
}

/// Everything about one keyspace.
pub(crate) fn describe(keyspace: &Keyspace, topology: Option<&Topology>, now_ms: u64) -> String {
    let spec = &keyspace.spec;
    let status = keyspace.status.clone().unwrap_or_default();
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{:<14}{value}", format!("{name}:"));
    };
    line("Name", keyspace.name().to_string());
    line("Uid", keyspace.uid().to_string());
    if let Some(age) = age(keyspace, now_ms) {
        line("Age", age);
    }
    line("Shards", changing(spec.shards, status.shards));
    line("Replication", changing(spec.replication_factor, status.replication_factor));
    line("Durability", format!("{:?}", spec.durability));
    line("Deletion", format!("{:?}", spec.deletion_policy));
    if spec.paused {
        line("Paused", "yes: changes wait until spec.paused is false".to_string());
    }
    let phase = status.phase.map_or_else(|| "-".to_string(), painted);
    line("Phase", format!("{phase} (topology version {})", status.topology_version.unwrap_or(0)));
    if let Some(progress) = &status.progress {
        line("Progress", progress_text(progress));
    }
    line("Ready", format!("{} replicas", status.ready.as_deref().unwrap_or("-")));
    if !status.conditions.is_empty() {
        text += "\n";
        text += &table(
            &["CONDITION", "STATUS", "REASON", "MESSAGE"],
            status.conditions.iter().map(|c| [c.type_.clone(), c.status.clone(), c.reason.clone(), c.message.clone()]),
        );
    }
    text += &stores(&status);
    if let Some(topology) = topology {
        text += &shards(topology);
    }
    text
}

fn changing(wanted: u32, now: Option<u32>) -> String {
    match now {
        Some(now) if now != wanted => format!("{now} (changing to {wanted})"),
        _ => wanted.to_string(),
    }
}

fn painted(phase: Phase) -> String {
    let color = match phase {
        Phase::Ready => Color::Green,
        Phase::Deleting => Color::Red,
        _ => Color::Yellow,
    };
    paint(phase.as_str(), color)
}

fn stores(status: &KeyspaceStatus) -> String {
    if status.stores.is_empty() {
        return String::new();
    }
    let dash = || "-".to_string();
    let rows = status.stores.iter().map(|s| {
        [
            s.name.clone(),
            s.state.map_or_else(dash, |s| format!("{s:?}")),
            s.address.clone().unwrap_or_else(dash),
            s.replicas.map_or_else(dash, |n| n.to_string()),
            s.records.map_or_else(dash, count),
            s.bytes.map_or_else(dash, size),
            s.topology_version.map_or_else(dash, |v| v.to_string()),
            s.message.clone().unwrap_or_default(),
        ]
    });
    let headings = ["STORE", "STATE", "ADDRESS", "REPLICAS", "RECORDS", "BYTES", "VERSION", "MESSAGE"];
    format!("\n{}", table(&headings, rows))
}

/// Which stores have which shard; those that don't serve yet in brackets.
fn shards(topology: &Topology) -> String {
    let Some(view) = topology.current.as_ref().filter(|v| v.size() > 0) else { return String::new() };
    let rows = view.shards.iter().enumerate().map(|(at, shard)| {
        let names = shard.replicas.iter().map(|r| match (r.replica, r.serving) {
            (0, _) => format!("({}: vacant)", r.store),
            (_, false) => format!("({})", r.store),
            (_, true) => r.store.clone(),
        });
        [at.to_string(), names.collect::<Vec<_>>().join(", ")]
    });
    format!("\n{}", table(&["SHARD", "STORES"], rows))
}

/// "12,000 of 60,000 records, 9.0 MiB of 45.0 MiB, 12 s left".
fn progress_text(progress: &Progress) -> String {
    let mut parts = Vec::new();
    let mut share =
        |done: Option<u64>, total: Option<u64>, show: &dyn Fn(u64) -> String, noun: &str| match (done, total) {
            (Some(done), Some(total)) if total > 0 => {
                parts.push(format!("{} of {}{noun}", show(done), show(total.max(done))));
            }
            (Some(done), _) if done > 0 => parts.push(format!("{}{noun}", show(done))),
            _ => {}
        };
    share(progress.records, progress.records_total, &count, " records");
    share(progress.bytes, progress.bytes_total, &size, "");
    if let Some(lag) = progress.lag.filter(|lag| *lag > 0) {
        parts.push(format!("{} changes behind", count(lag)));
    }
    if let Some(seconds) = progress.seconds_left {
        parts.push(format!("{} left", span(Duration::from_secs(seconds))));
    }
    if let Some(waiting) = &progress.waiting {
        parts.push(waiting.clone());
    }
    if parts.is_empty()
        && let Some(summary) = &progress.summary
    {
        parts.push(summary.clone());
    }
    parts.join(", ")
}

/// Follows a keyspace through the phases of its changes.
#[derive(Default)]
pub(crate) struct Tracker {
    phase: Option<(Phase, Instant)>,
    /// The most records and bytes that were seen done in this phase: as stores finish, they no longer report them.
    records: u64,
    bytes: u64,
    printed: Option<(String, Phase, Instant)>,
}

impl Tracker {
    /// Takes a state in; gives a line for a phase that has just ended.
    pub(crate) fn next(&mut self, keyspace: &Keyspace, now: Instant) -> Option<String> {
        let status = keyspace.status.as_ref()?;
        let phase = status.phase?;
        let (before, since) = *self.phase.get_or_insert((phase, now));
        let mut ended = None;
        if before != phase {
            // A time of rest is no step of a change.
            if before != Phase::Ready {
                let mut line = format!("{before} took {}", span(now - since));
                if self.records > 0 {
                    let _ = write!(line, ": {}", counted(self.records, "record"));
                }
                if self.bytes > 0 {
                    let _ = write!(line, ", {}", size(self.bytes));
                }
                ended = Some(line);
            }
            (self.phase, self.records, self.bytes) = (Some((phase, now)), 0, 0);
        }
        if let Some(progress) = &status.progress {
            self.records = self.records.max(progress.records.unwrap_or(0));
            self.bytes = self.bytes.max(progress.bytes.unwrap_or(0));
        }
        ended
    }

    /// The present state in one line.
    pub(crate) fn line(&self, keyspace: &Keyspace) -> String {
        let status = keyspace.status.clone().unwrap_or_default();
        let phase = status.phase.map_or("-", Phase::as_str);
        let mut line = format!("{phase}  version {}", status.topology_version.unwrap_or(0));
        let shards = changing(keyspace.spec.shards, status.shards);
        let _ = write!(line, "  shards {shards}  ready {}", status.ready.as_deref().unwrap_or("-"));
        let progress = status.progress.as_ref().map(progress_text).unwrap_or_default();
        if !progress.is_empty() {
            let _ = write!(line, "  {progress}");
        }
        let degraded = status.conditions.iter().find(|c| c.type_ == "Degraded" && c.status == "True");
        if let Some(condition) = degraded {
            let _ = write!(line, "  degraded: {}", condition.message);
        }
        line
    }

    /// Whether a list of states should have this line: a new phase at once, progress once a second.
    pub(crate) fn is_news(&mut self, line: &str, now: Instant) -> bool {
        let Some((phase, _)) = self.phase else { return false };
        let news = match &self.printed {
            Some((last, before, at)) => *before != phase || (last != line && now - *at >= Duration::from_secs(1)),
            None => true,
        };
        if news {
            self.printed = Some((line.to_string(), phase, now));
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_client::v1::{Assignment, Shard, View};
    use vasto_crds::KeyspaceSpec;

    fn keyspace(phase: Phase, progress: Option<Progress>) -> Keyspace {
        let mut keyspace = Keyspace::new("packages", KeyspaceSpec::new(5, 2));
        let mut status = KeyspaceStatus {
            phase: Some(phase),
            shards: Some(3),
            topology_version: Some(7),
            progress,
            ..Default::default()
        };
        status.set_replicas(6, 6);
        keyspace.status = Some(status);
        keyspace
    }

    fn moving() -> Progress {
        Progress {
            records: Some(12_000),
            records_total: Some(60_000),
            bytes: Some(9 << 20),
            bytes_total: Some(45 << 20),
            seconds_left: Some(12),
            ..Default::default()
        }
    }

    #[test]
    fn a_change_reads_well() {
        let state = keyspace(Phase::Prepare, Some(moving()));
        let mut tracker = Tracker::default();
        let start = Instant::now();
        assert_eq!(tracker.next(&state, start), None);
        assert!(tracker.is_news("a", start));
        assert!(!tracker.is_news("b", start) && tracker.is_news("b", start + Duration::from_secs(1)));
        assert_eq!(
            tracker.line(&state),
            "Prepare  version 7  shards 3 (changing to 5)  ready 6/6  \
             12,000 of 60,000 records, 9.0 MiB of 45.0 MiB, 12 s left"
        );
        let ended = tracker.next(&keyspace(Phase::Switch, None), start + Duration::from_secs(20));
        assert_eq!(ended.unwrap(), "Prepare took 20 s: 12,000 records, 9.0 MiB");
    }

    #[test]
    fn describe_shows_what_does_not_serve() {
        let replica = |store: &str, replica, serving| Assignment { store: store.into(), replica, serving };
        let shard = Shard {
            replicas: vec![replica("store-0", 1, true), replica("store-1", 2, false), replica("store-2", 0, false)],
        };
        let topology = Topology { current: Some(View { shards: vec![shard] }), ..Default::default() };
        let text = describe(&keyspace(Phase::Ready, None), Some(&topology), 0);
        assert!(text.contains("store-0, (store-1), (store-2: vacant)"), "{text}");
        assert!(text.contains("Shards:       3 (changing to 5)"), "{text}");
    }
}
