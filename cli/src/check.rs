//! `vasto check`: reads every replica of every shard and reports what differs.
//! What is compared is the hash of each record, so that values don't travel.
//! With `--repair` the replicas first compare themselves, and join in what they lack.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use serde_json::json;
use vasto_client::hash::{jump_hash, partition_hash};
use vasto_client::v1::{InspectEntry, KeyspaceUpdate, Phase, RepairResponse, View};
use vasto_client::{Inspection, Keyspace, ScanOptions};

use crate::context::{Context, parse_duration};
use crate::exit::{Code, fault};
use crate::output::{count, count_bar, counted, emit, emit_json, quoted, table};

/// How many keys are remembered by name; more are only counted.
const REMEMBERED: usize = 10_000;

/// Arguments of `vasto check`.
#[derive(Args, Debug)]
pub(crate) struct Check {
    /// The keyspace's name.
    keyspace: String,
    /// How long what differs may take to become equal (writes under way do differ for a moment).
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    settle: Duration,
    /// How many differing keys to print.
    #[arg(long, value_name = "N", default_value_t = 20)]
    show: usize,
    /// First have every replica compare itself with the others of its shard, and join in what it lacks.
    #[arg(long)]
    repair: bool,
}

/// A replica to read, and what was found in it.
#[derive(Clone, Debug)]
struct Replica {
    shard: u32,
    shards: u32,
    store: String,
    id: u64,
    serving: bool,
    records: u64,
    collectable: u64,
    /// Why it could not be read to its end.
    unread: Option<String>,
}

impl Replica {
    /// Whether its records count: it serves (one that doesn't has yet to catch up), and could be read.
    fn compared(&self) -> bool {
        self.serving && self.unread.is_none()
    }
}

/// What a repair did on one replica.
#[derive(Debug)]
struct Repaired {
    shard: u32,
    store: String,
    id: u64,
    /// What it came to; or why it did not come about.
    done: Result<RepairResponse, String>,
}

impl Repaired {
    fn troubles(&self) -> Vec<String> {
        self.done.as_ref().map_or_else(|why| vec![why.clone()], |done| done.troubles.clone())
    }
}

/// Has every serving replica repair itself, all at once.
async fn repair(keyspace: &Keyspace) -> Vec<Repaired> {
    let update = keyspace.topology();
    let bar = count_bar(None, "ranges");
    bar.set_message("repairing");
    let places = update.topology.iter().flat_map(|t| &t.current).flat_map(View::places);
    let repairs = places.filter(|p| p.assignment.replica != 0).map(|p| {
        let (shard, store, id) = (p.shard, p.assignment.store.clone(), p.assignment.replica);
        let bar = &bar;
        async move {
            let mut ranges = 0;
            let done = keyspace.repair(id, |totals| {
                bar.inc(totals.ranges.saturating_sub(ranges));
                ranges = totals.ranges;
            });
            let done = done.await.map_err(|error| error.to_string());
            Repaired { shard, store, id, done }
        }
    });
    let repaired = futures::future::join_all(repairs).await;
    bar.finish_and_clear();
    repaired
}

/// One replica's copy of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    hash: u64,
    collectable: bool,
}

/// What is wrong with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wrong {
    /// The replicas at these places of the shard's list lack it.
    Missing(Vec<usize>),
    /// The replicas hold different records.
    Differs,
    /// It belongs to another shard.
    Foreign,
}

#[derive(Debug)]
struct Finding {
    shard: u32,
    key: Bytes,
    wrong: Wrong,
}

/// What is wrong with one key's copies in the replicas of a shard.
///
/// What may be collected may be gone from one replica and not yet from
/// another, so where all copies may be, nothing is wrong.
fn verdict(copies: &[Option<Held>]) -> Option<Wrong> {
    let present = || copies.iter().flatten();
    if present().all(|c| c.collectable) {
        return None;
    }
    let missing: Vec<usize> = (0..copies.len()).filter(|at| copies[*at].is_none()).collect();
    if !missing.is_empty() {
        return Some(Wrong::Missing(missing));
    }
    let mut hashes = present().map(|c| c.hash);
    let first = hashes.next();
    hashes.any(|hash| Some(hash) != first).then_some(Wrong::Differs)
}

/// The next key over all cursors' heads, in order.
fn least(heads: &[Option<&InspectEntry>]) -> Option<Bytes> {
    heads.iter().flatten().map(|e| &e.key).min().cloned()
}

/// A key right before this one or a little further ahead: where to begin to see this one soon.
fn before(key: &[u8]) -> Option<Vec<u8>> {
    let (last, rest) = key.split_last()?;
    let mut start = rest.to_vec();
    if let Some(less) = last.checked_sub(1) {
        start.extend([less, 0xff, 0xff]);
    }
    (!start.is_empty()).then_some(start)
}

/// A replica's records, read in key order, with a few tries after a cut.
struct Cursor<'a> {
    context: &'a Context,
    keyspace: &'a Keyspace,
    replica: u64,
    stream: Option<Inspection>,
    waiting: VecDeque<InspectEntry>,
    after: Option<Bytes>,
    ended: bool,
}

impl<'a> Cursor<'a> {
    fn new(context: &'a Context, keyspace: &'a Keyspace, replica: u64, after: Option<Bytes>) -> Self {
        Self { context, keyspace, replica, stream: None, waiting: VecDeque::new(), after, ended: false }
    }

    /// Makes `head` show the next record, if there is one.
    async fn fill(&mut self) -> anyhow::Result<()> {
        const TRIES: u32 = 4;
        let mut tries = 0;
        while self.waiting.is_empty() && !self.ended {
            if let Err(error) = self.read().await {
                self.stream = None;
                tries += 1;
                if tries == TRIES {
                    return Err(error);
                }
                tokio::time::sleep(Duration::from_millis(250) * tries).await;
            }
        }
        Ok(())
    }

    async fn read(&mut self) -> anyhow::Result<()> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(self.keyspace.inspect(self.replica, self.after.clone()).await?),
        };
        match tokio::time::timeout(self.context.global.timeout, stream.next()).await?.transpose()? {
            Some(message) => {
                if let Some(last) = message.entries.last() {
                    self.after = Some(last.key.clone());
                }
                self.waiting.extend(message.entries);
            }
            None => self.ended = true,
        }
        Ok(())
    }

    fn head(&self) -> Option<&InspectEntry> {
        self.waiting.front()
    }

    /// Takes the record if it is this key's.
    fn take(&mut self, key: &[u8]) -> Option<Held> {
        if self.head()?.key != key {
            return None;
        }
        self.waiting.pop_front().map(|e| Held { hash: e.hash, collectable: e.collectable })
    }
}

pub(crate) async fn run(context: &Context, args: Check) -> anyhow::Result<()> {
    const TRIES: u32 = 5;
    let keyspace = context.keyspace(&args.keyspace).await?;
    let repaired = if args.repair { repair(&keyspace).await } else { Vec::new() };
    let mut tries = 1;
    let mut report = loop {
        let report = read(context, &keyspace, args.settle).await?;
        // Replicas that a change has retired meanwhile stand still: that is no fault of theirs.
        let current = |update: &KeyspaceUpdate| update.topology.as_ref().and_then(|t| t.current.clone());
        let moved = current(&keyspace.topology()) != current(&report.update);
        if !moved || report.is_clean() || tries == TRIES {
            break report;
        }
        tries += 1;
        tracing::warn!(keyspace = args.keyspace, "a change moved replicas during the check: it begins anew");
    };
    report.repaired = repaired;
    if context.json() {
        emit_json(&report.json())?;
    } else {
        emit(report.text(args.show))?;
    }
    let wrong = report.wrong();
    if wrong > 0 {
        return Err(fault(Code::Differences, format!("{} wrong in {:?}", counted(wrong, "key"), args.keyspace)));
    }
    let unread = report.replicas.iter().filter(|r| r.unread.is_some()).count() as u64;
    if unread > 0 {
        return Err(fault(Code::Unavailable, format!("{} could not be read", counted(unread, "replica"))));
    }
    let troubled = report.repaired.iter().filter(|r| !r.troubles().is_empty()).count() as u64;
    if troubled > 0 {
        let what = format!("{} could not be repaired to the end", counted(troubled, "replica"));
        return Err(fault(Code::Unavailable, what));
    }
    Ok(())
}

/// Reads all replicas once, and what differs again until it agrees or `settle` is over.
async fn read(context: &Context, keyspace: &Keyspace, settle: Duration) -> anyhow::Result<Report> {
    let update = keyspace.topology();
    let Some((topology, view)) = update.topology.as_ref().and_then(|t| Some((t, t.current.as_ref()?))) else {
        return Err(fault(Code::Unavailable, format!("keyspace {:?} has no topology yet", keyspace.name())));
    };
    let mut replicas: Vec<Replica> = view
        .places()
        .filter(|p| p.assignment.replica != 0)
        .map(|p| Replica {
            shard: p.shard,
            shards: p.shards,
            store: p.assignment.store.clone(),
            id: p.assignment.replica,
            serving: p.assignment.serving,
            records: 0,
            collectable: 0,
            unread: None,
        })
        .collect();
    let mut checker = Checker { context, keyspace, bar: count_bar(None, "records"), findings: Vec::new(), more: 0 };
    for shard in 0..view.size() {
        checker.bar.set_message(format!("shard {} of {}", shard + 1, view.size()));
        let mut here: Vec<&mut Replica> = replicas.iter_mut().filter(|r| r.shard == shard).collect();
        checker.shard(&mut here).await?;
    }
    // Keys that belong elsewhere are deleted by a change's last phase; before it, they are no fault.
    if topology.phase() != Phase::Stable {
        checker.findings.retain(|f| f.wrong != Wrong::Foreign);
    }
    checker.bar.set_message("looking again at what differs");
    checker.settle(&replicas, settle).await;
    checker.bar.finish_and_clear();
    let Checker { findings, more, .. } = checker;
    Ok(Report { update, replicas, findings, more, repaired: Vec::new() })
}

struct Checker<'a> {
    context: &'a Context,
    keyspace: &'a Keyspace,
    bar: ProgressBar,
    findings: Vec<Finding>,
    /// Wrong keys beyond those remembered.
    more: u64,
}

impl Checker<'_> {
    /// Reads the replicas of one shard side by side.
    async fn shard(&mut self, replicas: &mut [&mut Replica]) -> anyhow::Result<()> {
        let Some((shard, shards)) = replicas.first().map(|r| (r.shard, r.shards)) else { return Ok(()) };
        let (context, keyspace) = (self.context, self.keyspace);
        let mut cursors: Vec<Cursor<'_>> =
            replicas.iter().map(|r| Cursor::new(context, keyspace, r.id, None)).collect();
        let mut strangers = Vec::new();
        loop {
            for (cursor, replica) in cursors.iter_mut().zip(replicas.iter_mut()) {
                if replica.unread.is_none()
                    && let Err(error) = cursor.fill().await
                {
                    replica.unread = Some(crate::exit::one_line(&error));
                    cursor.waiting.clear();
                }
            }
            let Some(key) = least(&cursors.iter().map(Cursor::head).collect::<Vec<_>>()) else { break };
            let mut found = Vec::with_capacity(cursors.len());
            for (cursor, replica) in cursors.iter_mut().zip(replicas.iter_mut()) {
                let copy = cursor.take(&key);
                if let Some(copy) = copy {
                    replica.records += 1;
                    replica.collectable += u64::from(copy.collectable);
                    self.bar.inc(1);
                }
                if replica.compared() {
                    found.push(copy);
                }
            }
            if let Some(wrong) = verdict(&found) {
                self.note(Finding { shard, key: key.clone(), wrong });
            }
            let live = found.iter().flatten().any(|c| !c.collectable);
            if live && strangers.len() < REMEMBERED && jump_hash(partition_hash(&key), shards) != shard {
                strangers.push(key);
            }
        }
        drop(cursors);
        self.strangers(shard, shards, strangers).await
    }

    fn note(&mut self, finding: Finding) {
        if self.findings.len() < REMEMBERED {
            self.findings.push(finding);
        } else {
            self.more += 1;
        }
    }

    /// Keys whose own hash names another shard: fine if they have a partition key of their own that
    /// names this one. A scan tells, since it shows nothing that does not belong to its shard.
    async fn strangers(&mut self, shard: u32, shards: u32, keys: Vec<Bytes>) -> anyhow::Result<()> {
        let keyspace = self.keyspace;
        let foreign: Vec<Option<Bytes>> = stream::iter(keys)
            .map(|key| async move {
                let mut scan = keyspace.scan(ScanOptions::new().prefix(key.clone()).limit(1));
                let entry = scan.next().await.transpose()?.filter(|e| e.key == key);
                let hash = entry.and_then(|e| e.partition_hash);
                let home = hash.is_some_and(|hash| jump_hash(hash, shards) == shard);
                Ok::<_, vasto_client::Error>((!home).then_some(key))
            })
            .buffered(16)
            .try_collect()
            .await?;
        for key in foreign.into_iter().flatten() {
            self.note(Finding { shard, key, wrong: Wrong::Foreign });
        }
        Ok(())
    }

    /// Looks again at what differed, until it agrees or the time is over; only what lasts is kept.
    ///
    /// Under writes, copies are apart for an instant again and again: so a few
    /// looks are taken however long they take, unless there is plainly much wrong.
    async fn settle(&mut self, replicas: &[Replica], time: Duration) {
        const LOOKS: u32 = 4;
        const MUCH: usize = 1_000;
        let until = Instant::now() + time;
        let mut looks = 0;
        loop {
            let (foreign, differing): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.findings).into_iter().partition(|f| f.wrong == Wrong::Foreign);
            let over = Instant::now() >= until && (looks >= LOOKS || differing.len() > MUCH);
            if differing.is_empty() || over {
                self.findings = foreign;
                self.findings.extend(differing);
                return;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            let looked: Vec<Option<Finding>> = {
                let this = &*self;
                let again = differing.into_iter().map(|finding| this.again(replicas, finding));
                stream::iter(again).buffered(8).collect().await
            };
            self.findings = foreign;
            self.findings.extend(looked.into_iter().flatten());
            looks += 1;
        }
    }

    /// The finding as it is now, if it still is one.
    async fn again(&self, replicas: &[Replica], mut finding: Finding) -> Option<Finding> {
        let mut copies = Vec::new();
        for replica in replicas.iter().filter(|r| r.shard == finding.shard && r.compared()) {
            match self.look(replica, &finding.key).await {
                Some(copy) => copies.push(copy),
                // What can't be read now is as wrong as it was.
                None => return Some(finding),
            }
        }
        finding.wrong = verdict(&copies)?;
        Some(finding)
    }

    /// One replica's copy of a key now; the outer `None`: it can't be read.
    async fn look(&self, replica: &Replica, key: &Bytes) -> Option<Option<Held>> {
        let mut cursor = Cursor::new(self.context, self.keyspace, replica.id, before(key).map(Bytes::from));
        loop {
            cursor.fill().await.ok()?;
            match cursor.head() {
                Some(head) if head.key < *key => {
                    cursor.waiting.pop_front();
                }
                _ => return Some(cursor.take(key)),
            }
        }
    }
}

fn wrong_text(wrong: &Wrong, shard: u32, replicas: &[Replica]) -> String {
    match wrong {
        Wrong::Differs => "its replicas hold different records".to_string(),
        Wrong::Foreign => "belongs to another shard".to_string(),
        Wrong::Missing(places) => {
            let here: Vec<&Replica> = replicas.iter().filter(|r| r.shard == shard && r.compared()).collect();
            let names: Vec<&str> = places.iter().filter_map(|at| here.get(*at)).map(|r| r.store.as_str()).collect();
            format!("missing on {}", names.join(", "))
        }
    }
}

/// What a check found.
struct Report {
    update: Arc<KeyspaceUpdate>,
    replicas: Vec<Replica>,
    findings: Vec<Finding>,
    more: u64,
    /// What a repair did before.
    repaired: Vec<Repaired>,
}

impl Report {
    fn wrong(&self) -> u64 {
        self.findings.len() as u64 + self.more
    }

    fn is_clean(&self) -> bool {
        self.wrong() == 0 && self.replicas.iter().all(|r| r.unread.is_none())
    }

    fn phase(&self) -> Phase {
        self.update.topology.as_ref().map_or(Phase::Stable, |t| t.phase())
    }

    fn vacant(&self) -> u64 {
        let view = self.update.topology.as_ref().and_then(|t| t.current.as_ref());
        view.map_or(0, |v| v.places().filter(|p| p.assignment.replica == 0).count() as u64)
    }

    fn text(&self, show: usize) -> String {
        let mut text = self.repaired_text();
        text += &table(
            &["SHARD", "STORE", "REPLICA", "RECORDS", "COLLECTABLE", "STATE"],
            self.replicas.iter().map(|r| {
                let state = match (&r.unread, r.serving) {
                    (Some(why), _) => format!("not read: {why}"),
                    (None, true) => "read".to_string(),
                    (None, false) => "catches up, not compared".to_string(),
                };
                let id = format!("{:016x}", r.id);
                [r.shard.to_string(), r.store.clone(), id, count(r.records), count(r.collectable), state]
            }),
        );
        let phase = self.phase();
        if phase != Phase::Stable {
            text += &format!("a change is under way ({}): foreign keys were not looked for\n", short(phase));
        }
        if self.vacant() > 0 {
            text += &format!("{} not made yet\n", counted(self.vacant(), "replica"));
        }
        for finding in self.findings.iter().take(show) {
            let wrong = wrong_text(&finding.wrong, finding.shard, &self.replicas);
            text += &format!("shard {}: {}: {wrong}\n", finding.shard, quoted(&finding.key));
        }
        let rest = self.wrong().saturating_sub(show as u64);
        if rest > 0 {
            text += &format!("and {} more (--show prints more)\n", count(rest));
        }
        if self.is_clean() {
            text += "all replicas agree\n";
        }
        text
    }

    fn repaired_text(&self) -> String {
        if self.repaired.is_empty() {
            return String::new();
        }
        let rows = self.repaired.iter().map(|r| {
            let done = r.done.as_ref().ok();
            let number = |of: fn(&RepairResponse) -> u64| done.map_or("-".to_owned(), |done| count(of(done)));
            let troubles = r.troubles();
            let state = if troubles.is_empty() { "compared".to_owned() } else { troubles.join("; ") };
            let id = format!("{:016x}", r.id);
            let (ranges, divergent) = (number(|d| d.ranges), number(|d| d.divergent));
            [r.shard.to_string(), r.store.clone(), id, ranges, divergent, number(|d| d.records), state]
        });
        table(&["SHARD", "STORE", "REPLICA", "RANGES", "DIFFERED", "MENDED", "REPAIR"], rows) + "\n"
    }

    fn repaired_json(&self) -> Vec<serde_json::Value> {
        let row = |r: &Repaired| {
            let number = |of: fn(&RepairResponse) -> u64| r.done.as_ref().ok().map(of);
            json!({
                "shard": r.shard, "store": r.store, "replica": format!("{:016x}", r.id),
                "ranges": number(|d| d.ranges), "differed": number(|d| d.divergent),
                "mended": number(|d| d.records), "troubles": r.troubles(),
            })
        };
        self.repaired.iter().map(row).collect()
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "repaired": self.repaired_json(),
            "phase": short(self.phase()),
            "wrong": self.wrong(),
            "vacant": self.vacant(),
            "replicas": self.replicas.iter().map(|r| json!({
                "shard": r.shard, "store": r.store, "replica": format!("{:016x}", r.id), "serving": r.serving,
                "records": r.records, "collectable": r.collectable, "unread": r.unread,
            })).collect::<Vec<_>>(),
            "findings": self.findings.iter().map(|f| json!({
                "shard": f.shard, "key": String::from_utf8_lossy(&f.key),
                "wrong": wrong_text(&f.wrong, f.shard, &self.replicas),
            })).collect::<Vec<_>>(),
        })
    }
}

/// PHASE_PREPARE → "PREPARE".
fn short(phase: Phase) -> &'static str {
    phase.as_str_name().trim_start_matches("PHASE_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Option<Held> = Some(Held { hash: 1, collectable: false });
    const B: Option<Held> = Some(Held { hash: 2, collectable: false });
    const GONE: Option<Held> = Some(Held { hash: 3, collectable: true });
    const GONE_TOO: Option<Held> = Some(Held { hash: 4, collectable: true });

    #[test]
    fn what_counts_as_wrong() {
        assert_eq!(verdict(&[A, A]), None);
        assert_eq!(verdict(&[A]), None);
        assert_eq!(verdict(&[A, B]), Some(Wrong::Differs));
        assert_eq!(verdict(&[A, None, A]), Some(Wrong::Missing(vec![1])));
        assert_eq!(verdict(&[GONE, None]), None);
        assert_eq!(verdict(&[GONE, GONE_TOO]), None);
        assert_eq!(verdict(&[A, GONE]), Some(Wrong::Differs));
    }

    proptest! {
        #[test]
        fn a_look_begins_before_its_key(key in proptest::collection::vec(any::<u8>(), 1..6)) {
            prop_assert!(before(&key).unwrap_or_default() < key);
        }
    }
}
