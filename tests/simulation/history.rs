//! What callers did and what came of it, and what must then be so: nothing acknowledged is
//! lost, nothing counts twice, nothing comes from nowhere. Pure.

use std::collections::{BTreeMap, BTreeSet};

use vasto_client::Stamp;

/// What a write does; each is told from all others by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Puts its number.
    Put,
    /// Deletes.
    Delete,
    /// Adds one.
    Add,
    /// Appends its number.
    Append,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Acknowledged, with this stamp.
    Acknowledged(Stamp),
    /// It may have been executed, or may be yet.
    Unknown,
    /// Not executed.
    Refused,
}

/// A write and its end.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub number: u64,
    pub action: Action,
    pub ended: Ended,
}

/// What a key reads as.
#[derive(Clone, Debug, PartialEq)]
pub enum Read {
    Nothing,
    /// A register, with the stamp of its value.
    Put(u64, Stamp),
    Sum(f64),
    Set(Vec<u64>),
}

/// All writes of all keys, in the order of their ends.
#[derive(Clone, Debug, Default)]
pub struct History {
    keys: BTreeMap<String, Vec<Write>>,
    /// Begun and not ended; they may be seen already.
    begun: BTreeMap<String, BTreeSet<u64>>,
}

impl History {
    pub fn begin(&mut self, key: &str, number: u64) {
        self.begun.entry(key.to_owned()).or_default().insert(number);
    }

    pub fn end(&mut self, key: &str, write: Write) {
        self.keys.entry(key.to_owned()).or_default().push(write);
    }

    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.begun.keys()
    }

    /// (acknowledged, unknown, refused)
    pub fn counts(&self) -> (u64, u64, u64) {
        let all = || self.keys.values().flatten();
        let count = |is: fn(&Ended) -> bool| all().filter(|w| is(&w.ended)).count() as u64;
        (
            count(|e| matches!(e, Ended::Acknowledged(_))),
            count(|e| *e == Ended::Unknown),
            count(|e| *e == Ended::Refused),
        )
    }

    /// Acknowledged writes with these numbers may be lost after all: a machine lost them before they were to be safe.
    pub fn forgive(&mut self, may_be_lost: impl Fn(u64) -> bool) {
        for write in self.keys.values_mut().flatten() {
            if matches!(write.ended, Ended::Acknowledged(_)) && may_be_lost(write.number) {
                write.ended = Ended::Unknown;
            }
        }
    }

    /// What is wrong with a read in the middle of everything; `None`: nothing.
    pub fn impossible(&self, key: &str, read: &Read) -> Option<String> {
        let begun = |number: &u64| self.begun.get(key).is_some_and(|all| all.contains(number));
        match read {
            Read::Nothing => None,
            Read::Put(number, _) => (!begun(number)).then(|| format!("{key} reads {number}, which nobody has put")),
            Read::Sum(sum) => {
                let most = self.begun.get(key).map_or(0, BTreeSet::len) as f64;
                (*sum > most || sum.fract() != 0.0).then(|| format!("{key} reads {sum}, and {most} were added"))
            }
            Read::Set(found) => {
                let unique: BTreeSet<_> = found.iter().collect();
                if unique.len() < found.len() {
                    return Some(format!("{key} has something twice: {found:?}"));
                }
                let stray = found.iter().find(|n| !begun(n));
                stray.map(|n| format!("{key} has {n}, which nobody has appended"))
            }
        }
    }

    /// What is wrong with what a key reads as once all is over; `None`: nothing.
    pub fn wrong(&self, key: &str, read: &Read) -> Option<String> {
        if let Some(impossible) = self.impossible(key, read) {
            return Some(impossible);
        }
        let writes = self.keys.get(key).map(Vec::as_slice).unwrap_or_default();
        let stamp = |w: &Write| match w.ended {
            Ended::Acknowledged(stamp) => Some(stamp),
            _ => None,
        };
        let unknown = || writes.iter().filter(|w| w.ended == Ended::Unknown);
        let acknowledged = || writes.iter().filter(|w| stamp(w).is_some());
        match read {
            Read::Put(..) | Read::Nothing
                if writes.iter().all(|w| matches!(w.action, Action::Put | Action::Delete)) =>
            {
                let last = acknowledged().max_by_key(|w| stamp(w));
                let by = |w: &Write| match read {
                    Read::Put(number, _) => w.action == Action::Put && w.number == *number,
                    _ => w.action == Action::Delete,
                };
                let never = *read == Read::Nothing && last.is_none();
                if never || last.is_some_and(by) {
                    return None;
                }
                let newer = match (read, last.and_then(stamp)) {
                    (Read::Put(_, found), Some(last)) => *found > last,
                    _ => true,
                };
                (!(newer && unknown().any(by))).then(|| {
                    format!(
                        "{key} reads {read:?}; the last that was acknowledged is {last:?}, unknown are {:?}",
                        unknown().collect::<Vec<_>>()
                    )
                })
            }
            Read::Sum(_) | Read::Set(_) | Read::Nothing | Read::Put(..) => {
                let least = acknowledged().count();
                let most = least + unknown().count();
                match read {
                    Read::Set(found) => {
                        let lost = acknowledged().find(|w| !found.contains(&w.number));
                        if let Some(lost) = lost {
                            return Some(format!("{key} has lost {}, which was acknowledged: {found:?}", lost.number));
                        }
                        let refused = writes.iter().find(|w| w.ended == Ended::Refused && found.contains(&w.number));
                        refused.map(|w| format!("{key} has {}, which was refused", w.number))
                    }
                    Read::Sum(sum) => (*sum < least as f64 || *sum > most as f64)
                        .then(|| format!("{key} reads {sum}; {least} were acknowledged, {most} with the unknown")),
                    _ => (least > 0).then(|| format!("{key} reads {read:?}; {least} were acknowledged")),
                }
            }
        }
    }
}
