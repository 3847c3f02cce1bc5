//! The last changes of a replica with their rows, in memory: whoever follows close behind is served from here, without a
//! search in memtables for what was written a moment ago. Only while somebody follows.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// A changed row, as it was after the change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latest {
    /// The change's place in the order of this replica's changes.
    pub seq: u64,
    /// The origin of the peer that it came from; 0: a client.
    pub from: u64,
    /// The changed key.
    pub key: Bytes,
    /// The record's encoding.
    pub record: Bytes,
}

impl Latest {
    fn size(&self) -> usize {
        size_of::<Self>() + self.key.len() + self.record.len()
    }
}

/// See the module.
pub(super) struct Recent {
    /// Bytes, at most.
    most: usize,
    followers: AtomicUsize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// Every change after this one is here; `None`: it is not known yet from where on.
    after: Option<u64>,
    batches: VecDeque<Written>,
    bytes: usize,
}

/// The changes of one batch.
struct Written {
    last: u64,
    bytes: usize,
    changes: Vec<Latest>,
}

impl Recent {
    pub fn new(most: usize) -> Self {
        Self { most, followers: AtomicUsize::new(0), kept: Mutex::default() }
    }

    /// Begins to keep what is written, if nobody else follows.
    pub fn begin(&self) {
        self.followers.fetch_add(1, Ordering::AcqRel);
    }

    /// Ends it with the last.
    pub fn end(&self) {
        if self.followers.fetch_sub(1, Ordering::AcqRel) == 1 {
            *self.kept() = Kept::default();
        }
    }

    /// Whether what is written, so many bytes, is to be kept. If not, it must be told as `lost`.
    pub fn wants(&self, bytes: usize) -> bool {
        bytes <= self.most && self.followers.load(Ordering::Acquire) > 0
    }

    /// These changes, in their order, have been written after all before.
    pub fn wrote(&self, changes: Vec<Latest>) {
        let (Some(first), Some(last)) = (changes.first(), changes.last()) else { return };
        let (before, last) = (first.seq.saturating_sub(1), last.seq);
        let bytes = changes.iter().map(Latest::size).sum();
        let mut kept = self.kept();
        kept.after.get_or_insert(before);
        kept.bytes += bytes;
        kept.batches.push_back(Written { last, bytes, changes });
        while kept.bytes > self.most
            && let Some(oldest) = kept.batches.pop_front()
        {
            kept.bytes -= oldest.bytes;
            kept.after = Some(oldest.last);
        }
    }

    /// Something was written that was not kept, or rows have gone without a change: what is here tells no longer all.
    pub fn lost(&self) {
        let mut kept = self.kept();
        if kept.after.is_some() {
            *kept = Kept::default();
        }
    }

    /// The changes after `seq`, up to and with `last`, in order, but only the last of each key; no more once they have
    /// `bytes`. With them, how far they reach. `None`: not all of them are here.
    pub fn read(&self, seq: u64, last: u64, bytes: usize) -> Option<(Vec<Latest>, u64)> {
        let kept = self.kept();
        if seq < kept.after? {
            return None;
        }
        let (mut found, mut size, mut reached) = (Vec::new(), 0, last);
        let begin = kept.batches.partition_point(|written| written.last <= seq);
        for change in kept.batches.range(begin..).flat_map(|written| &written.changes) {
            if change.seq <= seq {
                continue;
            }
            if change.seq > last {
                break;
            }
            if size >= bytes {
                reached = change.seq - 1;
                break;
            }
            size += change.size();
            found.push(change.clone());
        }
        drop(kept);
        let mut seen = HashSet::with_capacity_and_hasher(found.len(), foldhash::fast::RandomState::default());
        found.reverse();
        found.retain(|change| seen.insert(change.key.clone()));
        found.reverse();
        Some((found, reached.max(seq)))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latest(seq: u64, key: &'static str) -> Latest {
        Latest { seq, from: 0, key: Bytes::from_static(key.as_bytes()), record: Bytes::from(seq.to_string()) }
    }

    fn seqs(read: Option<(Vec<Latest>, u64)>) -> Option<(Vec<u64>, u64)> {
        read.map(|(changes, reached)| (changes.iter().map(|c| c.seq).collect(), reached))
    }

    fn three_batches(most: usize) -> Recent {
        let recent = Recent::new(most);
        recent.begin();
        recent.wrote(vec![latest(5, "a"), latest(6, "b")]);
        recent.wrote(vec![latest(8, "a")]);
        recent.wrote(vec![latest(9, "c"), latest(10, "b")]);
        recent
    }

    #[test]
    fn it_tells_the_last_change_of_each_key_from_where_on_it_has_all() {
        let recent = three_batches(1 << 20);
        let read = |seq, last| seqs(recent.read(seq, last, usize::MAX));
        assert_eq!(read(3, 10), None, "what was before the first batch is not known");
        assert_eq!(read(4, 10), Some((vec![8, 9, 10], 10)));
        assert_eq!(read(4, 8), Some((vec![6, 8], 8)), "what came later is not looked at");
        assert_eq!(read(6, 12), Some((vec![8, 9, 10], 12)));
        assert_eq!(read(9, 10), Some((vec![10], 10)));
        assert_eq!(read(10, 10), Some((vec![], 10)));
        assert_eq!(read(12, 10), Some((vec![], 12)), "nobody goes back");
        assert_eq!(seqs(recent.read(4, 10, 1)), Some((vec![5], 5)), "one message's worth");
        assert_eq!(seqs(recent.read(6, 10, 1)), Some((vec![8], 8)));
    }

    #[test]
    fn it_keeps_what_it_may_and_knows_what_it_has_not() {
        let two = latest(1, "a").size() * 2 + 2;
        let recent = three_batches(two);
        assert_eq!(seqs(recent.read(7, 10, usize::MAX)), None, "gone");
        assert_eq!(seqs(recent.read(8, 10, usize::MAX)), Some((vec![9, 10], 10)));
        assert!(recent.wants(two) && !recent.wants(two + 1));
        recent.lost();
        assert_eq!(recent.read(10, 10, usize::MAX), None, "something may have been written since");
        recent.wrote(vec![latest(20, "d")]);
        assert_eq!((recent.read(10, 20, 9), seqs(recent.read(19, 20, 9))), (None, Some((vec![20], 20))));
        recent.begin();
        recent.end();
        assert!(recent.wants(1) && recent.read(19, 20, 9).is_some(), "another still follows");
        recent.end();
        assert!(!recent.wants(1) && recent.read(19, 20, 9).is_none(), "nobody does");
    }
}
