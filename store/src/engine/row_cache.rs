//! Rows in memory, of all databases of a process together: what is read again and again is found by its key's hash,
//! without a search through memtables and blocks, and without a copy.

use std::cell::Cell;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use foldhash::fast::FixedState;
use quick_cache::unsync::Cache;
use quick_cache::{Equivalent, Weighter};

use super::Row;

/// Locked one by one.
const PARTS: usize = 64;
/// Longer rows stay out: few of them would take the room of many.
const LONGEST: usize = 4 << 10;
/// What a row takes besides its key and record.
const OVERHEAD: usize = 128;
/// A row that was written so often since it was last read goes with the next write: by then, to keep it has cost about as
/// much as to read it once more from the database would.
const WRITES_UNREAD: u8 = 16;
/// What rows have on the whole, for the length of the list of those that were there once.
const USUAL: usize = 256;

/// Up to so many bytes of rows. Which stay is decided by S3-FIFO (Yang et al., 2023): one that is read but once goes
/// soon.
///
/// A row is always what the database holds, or was held when the reader asked: `wrote` follows each write before its
/// answer, and a row that was read meanwhile is not taken in. Only what compaction has dropped may be here for a while: it
/// reads as nothing, here as there.
pub struct RowCache {
    parts: Vec<Mutex<Part>>,
    hasher: FixedState,
    databases: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
}

struct Part {
    /// Counts writes.
    writes: u64,
    rows: Cache<Key, Kept, Weight, BuildHasherDefault<Same>>,
}

struct Kept {
    row: Row,
    /// How often it was written since it was last read.
    writes: Cell<u8>,
}

/// A row that was not there, as it was looked for.
#[derive(Clone, Copy, Debug)]
pub struct Miss {
    hash: u64,
    writes: u64,
}

/// What all of it takes, and how it was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCacheUsage {
    /// Of rows and their keys.
    pub bytes: u64,
    /// Rows that were found.
    pub hits: u64,
    /// Rows that RocksDB was asked for, and answered.
    pub misses: u64,
}

impl RowCache {
    /// For `bytes` in all. The seed makes it unknown which keys have equal hashes.
    pub fn new(bytes: u64, seed: u64) -> Self {
        let share = bytes / PARTS as u64;
        let part = || {
            let rows =
                Cache::with(share as usize / USUAL, share, Weight, BuildHasherDefault::default(), Default::default());
            Mutex::new(Part { writes: 0, rows })
        };
        Self {
            parts: (0..PARTS).map(|_| part()).collect(),
            hasher: FixedState::with_seed(seed),
            databases: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// A number for a database, which none had before.
    pub fn database(&self) -> u64 {
        self.databases.fetch_add(1, Ordering::Relaxed)
    }

    /// What it takes now, and how it was asked so far.
    pub fn usage(&self) -> RowCacheUsage {
        let bytes = self.parts.iter().map(|part| lock(part).rows.weight()).sum();
        RowCacheUsage { bytes, hits: self.hits.load(Ordering::Relaxed), misses: self.misses.load(Ordering::Relaxed) }
    }

    /// Counts what was found here, and what the database had to answer.
    pub fn count(&self, hits: usize, misses: usize) {
        self.hits.fetch_add(hits as u64, Ordering::Relaxed);
        self.misses.fetch_add(misses as u64, Ordering::Relaxed);
    }

    /// The row of a key, if it is here.
    pub fn look(&self, database: u64, key: &[u8]) -> Result<Row, Miss> {
        let wanted = self.wanted(database, key);
        let part = self.part(wanted.hash);
        let kept = part.rows.get(&wanted).ok_or(Miss { hash: wanted.hash, writes: part.writes })?;
        kept.writes.set(0);
        Ok(kept.row.clone())
    }

    /// The row that the database had after `look` had missed it. Kept, if nothing was written since that might have been it.
    pub fn fill(&self, database: u64, key: &[u8], miss: Miss, seq: u64, record: &[u8]) -> Row {
        let row = Row { seq, record: Bytes::copy_from_slice(record) };
        if fits(key, record) {
            let mut part = self.part(miss.hash);
            if part.writes == miss.writes {
                let kept = Kept { row: row.clone(), writes: Cell::new(0) };
                part.rows.insert(Key { hash: miss.hash, database, key: key.into() }, kept);
            }
        }
        row
    }

    /// Takes note of what was written, after it was: the row, or that there is none. A key that is not here stays out, as
    /// nobody has asked for it, and a row that is written and written and not read goes.
    pub fn wrote(&self, database: u64, key: &[u8], row: Option<(u64, &[u8])>) {
        let wanted = self.wanted(database, key);
        let mut part = self.part(wanted.hash);
        part.writes += 1;
        let Some(mut kept) = part.rows.peek_mut(&wanted) else { return };
        let writes = kept.writes.get() + 1;
        match row.filter(|(_, record)| fits(key, record) && writes <= WRITES_UNREAD) {
            Some((seq, record)) if record.len() == kept.row.record.len() => {
                let before = std::mem::take(&mut kept.row.record);
                kept.row = Row { seq, record: in_place_of(before, record) };
                kept.writes.set(writes);
            }
            Some((seq, record)) => {
                drop(kept);
                let row = Row { seq, record: Bytes::copy_from_slice(record) };
                // The cache makes room for it; or drops it, with what was there.
                let key = Key { hash: wanted.hash, database, key: key.into() };
                let _ = part.rows.replace(key, Kept { row, writes: Cell::new(writes) }, true);
            }
            None => {
                drop(kept);
                part.rows.remove(&wanted);
            }
        }
    }

    fn wanted<'a>(&self, database: u64, key: &'a [u8]) -> Wanted<'a> {
        Wanted { hash: self.hasher.hash_one((database, key)), database, key }
    }

    fn part(&self, hash: u64) -> MutexGuard<'_, Part> {
        lock(&self.parts[(hash >> 32) as usize % PARTS])
    }
}

fn lock(part: &Mutex<Part>) -> MutexGuard<'_, Part> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fits(key: &[u8], record: &[u8]) -> bool {
    key.len() + record.len() <= LONGEST
}

/// The record, in the memory of the one before, which is as long, unless a reader still has that.
fn in_place_of(before: Bytes, record: &[u8]) -> Bytes {
    match before.try_into_mut() {
        Ok(mut memory) => {
            memory.copy_from_slice(record);
            memory.freeze()
        }
        Err(_) => Bytes::copy_from_slice(record),
    }
}

struct Key {
    hash: u64,
    database: u64,
    key: Box<[u8]>,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        (self.hash, self.database, &self.key) == (other.hash, other.database, &other.key)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// A key as it is looked for.
struct Wanted<'a> {
    hash: u64,
    database: u64,
    key: &'a [u8],
}

impl Hash for Wanted<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Equivalent<Key> for Wanted<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        (self.hash, self.database, self.key) == (key.hash, key.database, &*key.key)
    }
}

/// Hashes what is a hash already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        debug_assert!(false, "keys write a u64");
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[derive(Clone)]
struct Weight;

impl Weighter<Key, Kept> for Weight {
    fn weight(&self, key: &Key, kept: &Kept) -> u64 {
        (key.key.len() + kept.row.record.len() + OVERHEAD) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(rows: &RowCache, database: u64, key: &str) -> Option<Row> {
        rows.look(database, key.as_bytes()).ok()
    }

    fn fill(rows: &RowCache, database: u64, key: &str, seq: u64, record: &[u8]) -> Row {
        let miss = rows.look(database, key.as_bytes()).unwrap_err();
        rows.fill(database, key.as_bytes(), miss, seq, record)
    }

    fn row(seq: u64, record: &[u8]) -> Row {
        Row { seq, record: Bytes::copy_from_slice(record) }
    }

    #[test]
    fn what_was_read_is_there_and_what_is_written_replaces_it() {
        let rows = RowCache::new(1 << 20, 7);
        let (one, other) = (rows.database(), rows.database());
        assert_eq!(fill(&rows, one, "key", 1, b"a"), row(1, b"a"));
        assert_eq!((look(&rows, one, "key"), look(&rows, other, "key")), (Some(row(1, b"a")), None));
        rows.wrote(one, b"key", Some((2, b"b")));
        rows.wrote(other, b"key", Some((9, b"z")));
        assert_eq!((look(&rows, one, "key"), look(&rows, other, "key")), (Some(row(2, b"b")), None));
        rows.wrote(one, b"key", None);
        assert_eq!(look(&rows, one, "key"), None);
        fill(&rows, one, "key", 3, b"c");
        rows.wrote(one, b"key", Some((4, &[0; LONGEST])));
        assert_eq!(look(&rows, one, "key"), None, "it has become too long");
        assert!(fill(&rows, one, "key", 4, &[0; LONGEST]).record.len() == LONGEST && look(&rows, one, "key").is_none());
    }

    #[test]
    fn what_was_read_before_a_write_is_not_taken_in_after_it() {
        let rows = RowCache::new(1 << 20, 7);
        let miss = rows.look(0, b"key").unwrap_err();
        rows.wrote(0, b"key", Some((2, b"new")));
        assert_eq!(rows.fill(0, b"key", miss, 1, b"old"), row(1, b"old"));
        assert_eq!(look(&rows, 0, "key"), None);
        fill(&rows, 0, "key", 2, b"new");
        assert_eq!(look(&rows, 0, "key"), Some(row(2, b"new")));
    }

    #[test]
    fn what_a_reader_has_stays_as_it_was() {
        let rows = RowCache::new(1 << 20, 7);
        let filled = fill(&rows, 0, "key", 1, b"one");
        rows.wrote(0, b"key", Some((2, b"two")));
        let read = look(&rows, 0, "key");
        // Nobody has this one: its memory is used again.
        rows.wrote(0, b"key", Some((3, b"333")));
        rows.wrote(0, b"key", Some((4, b"444")));
        assert_eq!((filled, read), (row(1, b"one"), Some(row(2, b"two"))));
        rows.wrote(0, b"key", Some((5, b"longer")));
        assert_eq!(look(&rows, 0, "key"), Some(row(5, b"longer")));
    }

    #[test]
    fn what_is_written_again_and_again_and_never_read_goes() {
        let rows = RowCache::new(1 << 20, 7);
        fill(&rows, 0, "read", 0, b"a");
        fill(&rows, 0, "unread", 0, b"a");
        for seq in 1..=u64::from(WRITES_UNREAD) {
            rows.wrote(0, b"read", Some((seq, b"b")));
            rows.wrote(0, b"unread", Some((seq, b"b")));
        }
        assert_eq!(look(&rows, 0, "read"), Some(row(u64::from(WRITES_UNREAD), b"b")));
        for key in [&b"read"[..], b"unread"] {
            rows.wrote(0, key, Some((99, b"c")));
        }
        assert_eq!((look(&rows, 0, "read"), look(&rows, 0, "unread")), (Some(row(99, b"c")), None));
    }

    #[test]
    fn it_holds_no_more_than_it_may() {
        let rows = RowCache::new(1 << 20, 7);
        for n in 0..100_000 {
            fill(&rows, 0, &format!("key-{n}"), n, &[0; 100]);
        }
        let bytes = rows.usage().bytes;
        assert!((1 << 19..=1 << 20).contains(&bytes), "{bytes}");
        for n in 0..100_000 {
            rows.wrote(0, format!("key-{n}").as_bytes(), Some((n, &[0; 3_000])));
        }
        let bytes = rows.usage().bytes;
        assert!((1 << 18..=1 << 20).contains(&bytes), "{bytes} after rows have grown");
    }
}
