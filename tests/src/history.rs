//! What clients did to some keys and what became of it, as plain data, and the
//! oracle over it: a pure function that knows of each key what may stand there
//! and what may have been read. Whoever records uses it: real processes, a simulation.
//!
//! A key is of one kind, by what is written to it: a *register* (puts and deletes; each
//! put's value is written once), a *counter* (adds of numbers above 0) or a *list* (appends
//! of elements that end with a line feed; each is appended once).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use vasto_client::{Data, Stamp};

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A put of a value that nobody else ever puts.
    Put(Data),
    /// A delete.
    Delete,
    /// An add of a number above 0; whole numbers, so that sums are exact.
    Add(f64),
    /// An append of an element that ends with a line feed, has none before, and that nobody else ever appends.
    Append(Bytes),
    /// A read.
    Get,
}

/// What a key was seen to hold. `None`: nothing.
pub type Seen = Option<(Data, Stamp)>;

/// What the caller was told.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A write was taken, with this stamp.
    Acknowledged(Stamp),
    /// A read was answered.
    Read(Seen),
    /// Nobody can say whether it was done (a read: it was not answered).
    Unknown,
    /// It was not done, and never will be.
    Refused,
}

/// One operation on one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Whose it is. A client waits for each answer on a key before it asks anew, and all its operations are one session.
    pub client: u32,
    /// What was asked.
    pub op: Op,
    /// When, on a clock that all clients share.
    pub invoked_at: Duration,
    /// When it was answered or given up, on the same clock.
    pub returned_at: Duration,
    /// The replica that answered, where the client is pinned to one and so must see its own writes, and never less than
    /// it saw. `None`: whichever answered, so a read may be older than another.
    pub replica: Option<u64>,
    /// What the caller was told.
    pub outcome: Outcome,
}

/// What clients did, key by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The longest that an operation may take: its deadline, and what the machine adds to it. Zero: not judged.
    pub longest: Duration,
    /// The events of each key in any order.
    pub keys: BTreeMap<Bytes, Vec<Event>>,
}

/// What each key holds once all is quiet, as one replica or the keyspace itself tells. What is left out was not read.
pub type Finals = BTreeMap<Bytes, Seen>;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// An acknowledged write is not there: an older one is, or nothing.
    Lost,
    /// A write counts although its client wrote later and was acknowledged: an earlier try of it was
    /// executed after the one that was acknowledged.
    Undone,
    /// More is there than was asked for: an element twice, a sum too great.
    Twice,
    /// What nobody wrote, what was refused, or what was asked for only after it was read.
    Invented,
    /// A client's later write got no later stamp.
    Disorder,
    /// A client pinned to a replica didn't see its own write, or less than it had seen.
    Backwards,
    /// An operation took longer than its deadline.
    Late,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Lost, Self::Undone, Self::Twice, Self::Invented, Self::Disorder, Self::Backwards, Self::Late];
}

/// One thing that is wrong with one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Violation {
    /// The key.
    pub key: Bytes,
    /// The kind.
    pub fault: Fault,
    /// What was found and what would be right.
    pub words: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: key \"{}\": {}", self.fault, self.key.escape_ascii(), self.words)
    }
}

/// What is told of the writes of a history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Acknowledged writes.
    pub acknowledged: u64,
    /// Writes of which nobody knows whether they were done.
    pub unknown: u64,
    /// Writes that were refused.
    pub refused: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// The longest operation.
    pub longest: Duration,
}

impl Tally {
    /// Takes in one more.
    pub fn count(&mut self, event: &Event) {
        match event.outcome {
            Outcome::Acknowledged(_) => self.acknowledged += 1,
            Outcome::Unknown => self.unknown += u64::from(event.is_write()),
            Outcome::Refused => self.refused += u64::from(event.is_write()),
            Outcome::Read(_) => self.reads += 1,
        }
        self.longest = self.longest.max(event.returned_at.saturating_sub(event.invoked_at));
    }
}

impl Event {
    fn is_write(&self) -> bool {
        self.op != Op::Get
    }

    /// Its stamp, where it is an acknowledged write.
    fn stamp(&self) -> Option<Stamp> {
        match self.outcome {
            Outcome::Acknowledged(stamp) if self.is_write() => Some(stamp),
            _ => None,
        }
    }

    /// Whether it may have an effect.
    fn may_count(&self) -> bool {
        self.is_write() && self.outcome != Outcome::Refused
    }
}

impl History {
    /// A history of operations that may take this long.
    pub fn new(longest: Duration) -> Self {
        Self { longest, keys: BTreeMap::new() }
    }

    /// Takes in one more.
    pub fn record(&mut self, key: Bytes, event: Event) {
        self.keys.entry(key).or_default().push(event);
    }

    /// How many there are of each kind.
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        self.keys.values().flatten().for_each(|event| tally.count(event));
        tally
    }

    /// Forgets what has been judged, so that a history can go on for ever: keeps of each key one event for what
    /// it holds, and the writes of unknown outcome that may yet come to count.
    pub fn settle(&mut self, finals: &Finals) {
        for (key, events) in &mut self.keys {
            let Some(found) = finals.get(key) else { continue };
            let at = events.iter().map(|e| e.returned_at).max().unwrap_or_default();
            let mut kept: Vec<Event> = Vec::new();
            let unknown = |e: &Event| e.is_write() && e.outcome == Outcome::Unknown;
            let mut stand = |op, stamp| {
                let outcome = Outcome::Acknowledged(stamp);
                let client = u32::MAX; // nobody's: it is in no one's order
                kept.push(Event { client, op, invoked_at: at, returned_at: at, replica: None, outcome });
            };
            match Kind::of(events) {
                Some(Kind::Register) => {
                    match found {
                        Some((data, stamp)) => stand(Op::Put(data.clone()), *stamp),
                        None => {
                            let stamps = events.iter().filter_map(Event::stamp).max();
                            if let Some(stamp) = stamps {
                                stand(Op::Delete, stamp);
                            }
                        }
                    }
                    // What stands there counted; it can't come a second time with a later effect.
                    let stands = |e: &Event| matches!((&e.op, found), (Op::Put(put), Some((data, _))) if put == data);
                    kept.extend(events.drain(..).filter(|e| unknown(e) && !stands(e)));
                }
                Some(Kind::Counter) => {
                    let (least, most) = bounds(events);
                    if let Some((Data::Number(sum), stamp)) = found {
                        stand(Op::Add(*sum), *stamp);
                        // All that may still come, as one.
                        let left = (most - sum).min(most - least);
                        if left > 0.0 {
                            let mut event = kept[0].clone();
                            (event.op, event.outcome) = (Op::Add(left), Outcome::Unknown);
                            kept.push(event);
                        }
                    } else {
                        kept.extend(events.drain(..).filter(unknown));
                    }
                }
                Some(Kind::List) => {
                    let there = found.as_ref().map(|(data, stamp)| (elements(data), *stamp));
                    if let Some((there, stamp)) = &there {
                        there.iter().for_each(|element| stand(Op::Append(element.clone()), *stamp));
                    }
                    let there: BTreeSet<Bytes> = there.into_iter().flat_map(|(there, _)| there).collect();
                    let counted = |e: &Event| matches!(&e.op, Op::Append(element) if there.contains(element));
                    kept.extend(events.drain(..).filter(|e| unknown(e) && !counted(e)));
                }
                None => {}
            }
            *events = kept;
        }
        self.keys.retain(|_, events| !events.is_empty());
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Register,
    Counter,
    List,
}

impl Kind {
    /// By the first write. `None`: nothing is written.
    fn of(events: &[Event]) -> Option<Self> {
        events.iter().find_map(|event| match event.op {
            Op::Put(_) | Op::Delete => Some(Self::Register),
            Op::Add(_) => Some(Self::Counter),
            Op::Append(_) => Some(Self::List),
            Op::Get => None,
        })
    }
}

/// Everything that is wrong: with what was read on the way, and with what stands there in the end.
pub fn check(history: &History, finals: &Finals) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (key, events) in &history.keys {
        let mut judge = Judge { key, events, violations: &mut violations };
        judge.late(history.longest);
        judge.order();
        match Kind::of(events) {
            Some(Kind::Register) => judge.register(finals.get(key)),
            Some(Kind::Counter) => judge.counter(finals.get(key)),
            Some(Kind::List) => judge.list(finals.get(key)),
            None => judge.untouched(finals.get(key)),
        }
    }
    violations
}

/// One key before the oracle.
struct Judge<'a> {
    key: &'a Bytes,
    events: &'a [Event],
    violations: &'a mut Vec<Violation>,
}

impl<'a> Judge<'a> {
    fn wrong(&mut self, fault: Fault, words: String) {
        self.violations.push(Violation { key: self.key.clone(), fault, words });
    }

    /// Reads that were answered, each with what it found.
    fn reads(&self) -> impl Iterator<Item = (&'a Event, &'a Seen)> + use<'a> {
        self.events.iter().filter_map(|event| match &event.outcome {
            Outcome::Read(seen) => Some((event, seen)),
            _ => None,
        })
    }

    fn late(&mut self, longest: Duration) {
        for event in self.events {
            let took = event.returned_at.saturating_sub(event.invoked_at);
            if !longest.is_zero() && took > longest {
                let words =
                    format!("{} took {took:?}; with its deadline it must end within {longest:?}", describe(event));
                self.wrong(Fault::Late, words);
            }
        }
    }

    /// Puts and deletes of one client must have rising stamps.
    fn order(&mut self) {
        let mut clients: BTreeMap<u32, Vec<(&Event, Stamp)>> = BTreeMap::new();
        for event in self.events {
            if let (Some(stamp), Op::Put(_) | Op::Delete) = (event.stamp(), &event.op) {
                clients.entry(event.client).or_default().push((event, stamp));
            }
        }
        for mut writes in clients.into_values() {
            writes.sort_by_key(|(event, _)| event.invoked_at);
            for pair in writes.windows(2) {
                let ((before, first), (after, second)) = (pair[0], pair[1]);
                if before.returned_at <= after.invoked_at && second <= first {
                    let words = format!(
                        "{} got no later stamp than {}, which the same client had finished before",
                        describe(after),
                        describe(before)
                    );
                    self.wrong(Fault::Disorder, words);
                }
            }
        }
    }

    fn untouched(&mut self, found: Option<&Seen>) {
        let seen = self.reads().map(|(_, seen)| seen).chain(found).find(|seen| seen.is_some());
        if let Some(seen) = seen {
            let words = format!("{} was read, but nothing was ever written", show(seen));
            self.wrong(Fault::Invented, words);
        }
    }

    fn register(&mut self, found: Option<&Seen>) {
        for (read, seen) in self.reads() {
            self.register_read(read, seen);
        }
        let Some(found) = found else { return };
        let newest = self.events.iter().filter(|e| e.stamp().is_some()).max_by_key(|e| e.stamp());
        let mut unknown = self.events.iter().filter(|e| e.is_write() && e.outcome == Outcome::Unknown);
        match found {
            Some((data, stamp)) => {
                let put = self.events.iter().find(|e| matches!(&e.op, Op::Put(put) if put == data));
                match (put, newest) {
                    (None, _) => self.wrong(Fault::Invented, format!("{} is there, which nobody put", show(found))),
                    (Some(put), _) if put.outcome == Outcome::Unknown => {}
                    (Some(put), _) if put.outcome == Outcome::Refused => {
                        let words = format!("{} is there, but {}", show(found), describe(put));
                        self.wrong(Fault::Invented, words);
                    }
                    (Some(put), Some(newest)) if !std::ptr::eq(put, newest) => {
                        // Its stamp isn't the one that was told: it was executed twice, and the other time later.
                        let again = put.stamp() != Some(*stamp) && Some(*stamp) > newest.stamp();
                        let fault = if again { Fault::Undone } else { Fault::Lost };
                        let words =
                            format!("{} is there, but {} is the newest acknowledged", show(found), describe(newest));
                        self.wrong(fault, words);
                    }
                    _ => {}
                }
            }
            None => match newest {
                Some(newest) if newest.op != Op::Delete && !unknown.any(|e| e.op == Op::Delete) => {
                    let words = format!("nothing is there, but {} is the newest acknowledged", describe(newest));
                    self.wrong(Fault::Lost, words);
                }
                _ => {}
            },
        }
    }

    fn register_read(&mut self, read: &Event, seen: &Seen) {
        if let Some((data, _)) = seen {
            let put = self.events.iter().find(|e| matches!(&e.op, Op::Put(put) if put == data) && e.may_count());
            match put {
                Some(put) if put.invoked_at <= read.returned_at => {}
                Some(put) => {
                    let words = format!("{} found what only later {}", describe(read), describe(put));
                    self.wrong(Fault::Invented, words);
                }
                None => self.wrong(Fault::Invented, format!("{} found what nobody put", describe(read))),
            }
        }
        let Some(replica) = read.replica else { return };
        // What this replica had shown or taken before: nothing older may follow.
        let newest = self.events.iter().filter(|e| e.replica == Some(replica) && e.returned_at <= read.invoked_at);
        let newest = newest.filter_map(|e| match &e.outcome {
            Outcome::Acknowledged(stamp) => Some((e, *stamp)),
            Outcome::Read(Some((_, stamp))) => Some((e, *stamp)),
            _ => None,
        });
        let Some((before, floor)) = newest.max_by_key(|(_, stamp)| *stamp) else { return };
        let fine = match seen {
            Some((_, stamp)) => *stamp >= floor,
            // A deletion has no stamp for the reader: one that is not older must be possible.
            None => self.events.iter().any(|e| {
                e.op == Op::Delete
                    && e.invoked_at <= read.returned_at
                    && (e.outcome == Outcome::Unknown || e.stamp().is_some_and(|stamp| stamp >= floor))
            }),
        };
        if !fine {
            let words = format!("{} came after {}", describe(read), describe(before));
            self.wrong(Fault::Backwards, words);
        }
    }

    fn counter(&mut self, found: Option<&Seen>) {
        for (read, seen) in self.reads() {
            let number = match seen {
                None => 0.0,
                Some((Data::Number(number), _)) => *number,
                Some(_) => {
                    self.wrong(Fault::Invented, format!("{} found no number", describe(read)));
                    continue;
                }
            };
            let begun = self.events.iter().filter(|e| e.may_count() && e.invoked_at <= read.returned_at);
            let most: f64 = begun.map(added).sum();
            if number > most {
                self.wrong(Fault::Twice, format!("{} found more than the {most} asked for so far", describe(read)));
            }
            let Some(replica) = read.replica else { continue };
            let before =
                || self.events.iter().filter(|e| e.replica == Some(replica) && e.returned_at <= read.invoked_at);
            let own: f64 = before().filter(|e| e.stamp().is_some()).map(added).sum();
            let shown = before().filter_map(|e| match e.outcome {
                Outcome::Read(Some((Data::Number(number), _))) => Some(number),
                _ => None,
            });
            let least = shown.fold(own, f64::max);
            if number < least {
                let words = format!("{} found less than the {least} of before", describe(read));
                self.wrong(Fault::Backwards, words);
            }
        }
        let Some(found) = found else { return };
        let (least, most) = bounds(self.events);
        let number = match found {
            None => 0.0,
            Some((Data::Number(number), _)) => *number,
            Some(_) => return self.wrong(Fault::Invented, format!("{} is there, no number", show(found))),
        };
        if number < least || number > most {
            let fault = if number < least { Fault::Lost } else { Fault::Twice };
            let unknown = most - least;
            let words =
                format!("the sum is {number}; {least} were acknowledged, and {unknown} more are of unknown outcome");
            self.wrong(fault, words);
        }
    }

    fn list(&mut self, found: Option<&Seen>) {
        let mut asked: BTreeMap<&Bytes, &Event> = BTreeMap::new();
        for event in self.events {
            if let Op::Append(element) = &event.op {
                asked.insert(element, event);
            }
        }
        // Elements of earlier reads of each replica.
        let mut reads: Vec<(&Event, Vec<Bytes>)> = self
            .reads()
            .map(|(read, seen)| (read, seen.iter().flat_map(|(data, _)| elements(data)).collect()))
            .collect();
        reads.sort_by_key(|(read, _)| read.invoked_at);
        for (at, (read, there)) in reads.iter().enumerate() {
            self.elements(&asked, there, Some(read));
            let Some(replica) = read.replica else { continue };
            let there: BTreeSet<&Bytes> = there.iter().collect();
            let own = self.events.iter().filter(|e| e.replica == Some(replica) && e.stamp().is_some());
            let own = own.filter(|e| e.returned_at <= read.invoked_at).filter_map(|e| match &e.op {
                Op::Append(element) => Some(element),
                _ => None,
            });
            let shown =
                reads[..at].iter().filter(|(r, _)| r.replica == read.replica && r.returned_at <= read.invoked_at);
            let shown = shown.flat_map(|(_, elements)| elements);
            if let Some(missing) = own.chain(shown).find(|element| !there.contains(element)) {
                let words = format!("{} lacks \"{}\" of before", describe(read), missing.escape_ascii());
                self.wrong(Fault::Backwards, words);
            }
        }
        let Some(found) = found else { return };
        let there: Vec<Bytes> = found.iter().flat_map(|(data, _)| elements(data)).collect();
        self.elements(&asked, &there, None);
        let there: BTreeSet<&Bytes> = there.iter().collect();
        for (element, event) in asked {
            if event.stamp().is_some() && !there.contains(element) {
                self.wrong(Fault::Lost, format!("{} is not there", describe(event)));
            }
        }
    }

    /// Whether each element was asked for and is there once.
    fn elements(&mut self, asked: &BTreeMap<&Bytes, &Event>, there: &[Bytes], read: Option<&Event>) {
        let place = read.map_or("in the end".to_owned(), |read| format!("for a read at {:?}", read.invoked_at));
        let mut once = BTreeSet::new();
        for element in there {
            let words = format!("\"{}\" is there {place}", element.escape_ascii());
            match asked.get(element) {
                None => self.wrong(Fault::Invented, format!("{words}, which nobody appended")),
                Some(event) if !event.may_count() => {
                    self.wrong(Fault::Invented, format!("{words}, but {}", describe(event)));
                }
                Some(event) if read.is_some_and(|read| event.invoked_at > read.returned_at) => {
                    self.wrong(Fault::Invented, format!("{words}, but only later {}", describe(event)));
                }
                Some(_) if !once.insert(element) => self.wrong(Fault::Twice, format!("{words} more than once")),
                Some(_) => {}
            }
        }
    }
}

fn added(event: &Event) -> f64 {
    match event.op {
        Op::Add(number) => number,
        _ => 0.0,
    }
}

/// The sum of what was acknowledged, and of that and what is unknown.
fn bounds(events: &[Event]) -> (f64, f64) {
    let least: f64 = events.iter().filter(|e| e.stamp().is_some()).map(added).sum();
    let most: f64 = events.iter().filter(|e| e.may_count()).map(added).sum();
    (least, most)
}

/// The elements of a list. The last one may lack its line feed: then nobody appended it.
fn elements(data: &Data) -> Vec<Bytes> {
    match data {
        Data::Bytes(bytes) => bytes.split_inclusive(|b| *b == b'\n').map(|element| bytes.slice_ref(element)).collect(),
        Data::Number(number) => vec![Bytes::from(format!("the number {number}"))],
    }
}

fn data(data: &Data) -> String {
    const MOST: usize = 40;
    match data {
        Data::Number(number) => format!("{number}"),
        Data::Bytes(bytes) if bytes.len() <= MOST => format!("\"{}\"", bytes.escape_ascii()),
        Data::Bytes(bytes) => format!("\"{}...\" ({} bytes)", bytes[..MOST].escape_ascii(), bytes.len()),
    }
}

fn at(stamp: Stamp) -> String {
    format!("{}+{}@{:016x}", stamp.ms(), stamp.time & 0xffff, stamp.origin)
}

fn show(seen: &Seen) -> String {
    seen.as_ref().map_or("nothing".to_owned(), |(value, stamp)| format!("{} of {}", data(value), at(*stamp)))
}

/// An event in words: `a put of "x" by client 3 at 1.2s, acknowledged with 17+0@00..`.
fn describe(event: &Event) -> String {
    let op = match &event.op {
        Op::Put(value) => format!("a put of {}", data(value)),
        Op::Delete => "a delete".to_owned(),
        Op::Add(number) => format!("an add of {number}"),
        Op::Append(element) => format!("an append of \"{}\"", element.escape_ascii()),
        Op::Get => "a read".to_owned(),
    };
    let outcome = match &event.outcome {
        Outcome::Acknowledged(stamp) => format!("acknowledged with {}", at(*stamp)),
        Outcome::Read(seen) => format!("which found {}", show(seen)),
        Outcome::Unknown => "of unknown outcome".to_owned(),
        Outcome::Refused => "which was refused".to_owned(),
    };
    let replica = event.replica.map_or(String::new(), |id| format!(" through replica {id:016x}"));
    format!("{op} by client {} at {:?}{replica}, {outcome}", event.client, event.invoked_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"key";

    fn stamp(time: u64) -> Stamp {
        Stamp { time, origin: 1 }
    }

    fn put(text: &str) -> Op {
        Op::Put(text.into())
    }

    fn append(text: &'static str) -> Op {
        Op::Append(Bytes::from_static(text.as_bytes()))
    }

    fn seen(value: impl Into<Data>, time: u64) -> Seen {
        Some((value.into(), stamp(time)))
    }

    /// One client's events, each a millisecond long, one after another.
    fn history(events: &[(Op, Outcome)]) -> History {
        let mut history = History::new(Duration::from_millis(1));
        for (ms, (op, outcome)) in (0..).step_by(2).zip(events.iter().cloned()) {
            let (invoked_at, returned_at) = (Duration::from_millis(ms), Duration::from_millis(ms + 1));
            let event = Event { client: 1, op, invoked_at, returned_at, replica: Some(7), outcome };
            history.record(Bytes::from_static(KEY), event);
        }
        history
    }

    fn faults(history: &History, found: Seen) -> Vec<Fault> {
        let finals = Finals::from([(Bytes::from_static(KEY), found)]);
        check(history, &finals).into_iter().map(|v| v.fault).collect()
    }

    fn acknowledged(time: u64) -> Outcome {
        Outcome::Acknowledged(stamp(time))
    }

    #[test]
    fn a_register_ends_with_its_newest_acknowledged_or_an_unknown_write() {
        let two = history(&[(put("a"), acknowledged(1)), (put("b"), acknowledged(2))]);
        assert_eq!(faults(&two, seen("b", 2)), []);
        assert_eq!(faults(&two, seen("a", 1)), [Fault::Lost]);
        assert_eq!(faults(&two, None), [Fault::Lost]);
        assert_eq!(faults(&two, seen("c", 3)), [Fault::Invented]);
        assert_eq!(faults(&two, seen("a", 3)), [Fault::Undone]);
        for (outcome, fault) in [(Outcome::Unknown, &[][..]), (Outcome::Refused, &[Fault::Invented])] {
            let third = history(&[(put("a"), acknowledged(1)), (put("b"), acknowledged(2)), (put("c"), outcome)]);
            assert_eq!(faults(&third, seen("c", 3)), fault);
            assert_eq!(faults(&third, seen("b", 2)), []);
            assert_eq!(faults(&third, seen("a", 1)), [Fault::Lost]);
        }
    }

    #[test]
    fn what_was_deleted_stays_so() {
        let gone = history(&[(put("a"), acknowledged(1)), (Op::Delete, acknowledged(2))]);
        assert_eq!(faults(&gone, None), []);
        assert_eq!(faults(&gone, seen("a", 1)), [Fault::Lost]);
        let perhaps = history(&[(put("a"), acknowledged(1)), (Op::Delete, Outcome::Unknown)]);
        assert_eq!(faults(&perhaps, None), []);
        assert_eq!(faults(&perhaps, seen("a", 1)), []);
    }

    #[test]
    fn a_sum_is_between_the_acknowledged_and_the_unknown() {
        let sum = history(&[
            (Op::Add(1.0), acknowledged(1)),
            (Op::Add(2.0), Outcome::Unknown),
            (Op::Add(4.0), acknowledged(2)),
            (Op::Add(8.0), Outcome::Refused),
        ]);
        for (number, fault) in [(5.0, None), (7.0, None), (4.0, Some(Fault::Lost)), (8.0, Some(Fault::Twice))] {
            assert_eq!(faults(&sum, seen(number, 2)), Vec::from_iter(fault), "{number}");
        }
        assert_eq!(faults(&sum, None), [Fault::Lost]);
        assert_eq!(faults(&sum, seen("text", 2)), [Fault::Invented]);
    }

    #[test]
    fn each_acknowledged_element_is_there_once() {
        let list = history(&[
            (append("a\n"), acknowledged(1)),
            (append("b\n"), Outcome::Unknown),
            (append("c\n"), Outcome::Refused),
        ]);
        for (text, fault) in [
            ("a\n", None),
            ("a\nb\n", None),
            ("b\n", Some(Fault::Lost)),
            ("a\na\n", Some(Fault::Twice)),
            ("a\nc\n", Some(Fault::Invented)),
            ("a\nx\n", Some(Fault::Invented)),
            ("a\nb", Some(Fault::Invented)),
        ] {
            assert_eq!(faults(&list, seen(text, 1)), Vec::from_iter(fault), "{text:?}");
        }
    }

    #[test]
    fn a_client_pinned_to_a_replica_never_sees_less() {
        let read = |seen| (Op::Get, Outcome::Read(seen));
        for (events, fault) in [
            (vec![(put("a"), acknowledged(1)), read(seen("a", 1))], None),
            (vec![(put("a"), acknowledged(1)), read(None)], Some(Fault::Backwards)),
            (vec![(put("a"), acknowledged(1)), (Op::Delete, Outcome::Unknown), read(None)], None),
            (vec![(put("a"), acknowledged(1)), read(seen("x", 2))], Some(Fault::Invented)),
            (vec![(put("a"), Outcome::Unknown), read(seen("a", 1)), read(None)], Some(Fault::Backwards)),
            (
                vec![(put("a"), acknowledged(1)), (put("b"), acknowledged(2)), read(seen("a", 1))],
                Some(Fault::Backwards),
            ),
            (vec![read(seen("a", 1)), (put("a"), acknowledged(1))], Some(Fault::Invented)),
            (vec![(Op::Add(1.0), acknowledged(1)), read(None)], Some(Fault::Backwards)),
            (vec![(Op::Add(1.0), acknowledged(1)), read(seen(2.0, 1))], Some(Fault::Twice)),
            (vec![(append("a\n"), acknowledged(1)), read(None)], Some(Fault::Backwards)),
            (vec![(append("a\n"), Outcome::Unknown), read(seen("a\n", 1)), read(None)], Some(Fault::Backwards)),
        ] {
            let mut history = history(&events);
            let found = check(&history, &Finals::new()).into_iter().map(|v| v.fault).collect::<Vec<_>>();
            assert_eq!(found, Vec::from_iter(fault), "{events:?}");
            // Whichever replica answered: it may be behind, but it can't invent.
            history.keys.values_mut().flatten().for_each(|event| event.replica = None);
            let found = check(&history, &Finals::new()).into_iter().map(|v| v.fault).collect::<Vec<_>>();
            assert_eq!(found, Vec::from_iter(fault.filter(|f| *f != Fault::Backwards)), "{events:?}");
        }
    }

    #[test]
    fn a_clients_own_writes_have_rising_stamps() {
        let back = history(&[(put("a"), acknowledged(2)), (put("b"), acknowledged(1))]);
        assert_eq!(faults(&back, seen("a", 2)), [Fault::Disorder]);
    }

    #[test]
    fn what_takes_longer_than_it_may_is_told() {
        let mut late = history(&[(put("a"), Outcome::Unknown)]);
        late.longest = Duration::from_micros(10);
        let violations = check(&late, &Finals::new());
        assert_eq!(
            violations[0].to_string(),
            "Late: key \"key\": a put of \"a\" by client 1 at 0ns through replica 0000000000000007, of unknown outcome \
             took 1ms; with its deadline it must end within 10µs"
        );
    }

    #[test]
    fn what_was_judged_is_still_held_against_what_comes() {
        let key = Bytes::from_static(KEY);
        let mut register = history(&[
            (put("a"), acknowledged(1)),
            (put("b"), Outcome::Unknown),
            (Op::Get, Outcome::Read(seen("a", 1))),
            (put("c"), acknowledged(3)),
        ]);
        register.settle(&Finals::from([(key.clone(), seen("c", 3))]));
        assert_eq!(register.keys[&key].len(), 2);
        assert_eq!(faults(&register, seen("c", 3)), []);
        assert_eq!(faults(&register, seen("b", 4)), []);
        assert_eq!(faults(&register, None), [Fault::Lost]);
        let mut gone = history(&[(put("a"), acknowledged(1)), (Op::Delete, acknowledged(2))]);
        gone.settle(&Finals::from([(key.clone(), None)]));
        assert_eq!(faults(&gone, None), []);
        assert_eq!(faults(&gone, seen("a", 1)), [Fault::Invented]);
        let mut sum = history(&[(Op::Add(1.0), acknowledged(1)), (Op::Add(4.0), Outcome::Unknown)]);
        sum.settle(&Finals::from([(key.clone(), seen(1.0, 1))]));
        assert_eq!(faults(&sum, seen(5.0, 1)), []);
        assert_eq!(faults(&sum, seen(0.5, 1)), [Fault::Lost]);
        sum.settle(&Finals::from([(key.clone(), seen(5.0, 1))]));
        assert_eq!(faults(&sum, seen(6.0, 1)), [Fault::Twice]);
        let mut list = history(&[(append("a\n"), acknowledged(1)), (append("b\n"), Outcome::Unknown)]);
        list.settle(&Finals::from([(key, seen("a\n", 1))]));
        assert_eq!(faults(&list, seen("a\nb\n", 1)), []);
        assert_eq!(faults(&list, seen("b\n", 1)), [Fault::Lost]);
    }
}
