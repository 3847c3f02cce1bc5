//! One replica's files: a database with the families `records` (each row with its
//! local seq), `changes` (seq -> key, no value; many to a row) and `meta`. It knows bytes and rows,
//! nothing of joins, peers or topologies.
//!
//! The database itself stands behind a small trait: RocksDB, or one in memory that a
//! simulation can crash.

mod changes;
mod recent;
mod rocks;
mod row_cache;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rocksdb::ErrorKind;
use tokio_util::sync::{CancellationToken, DropGuard};
use vasto_client::v1::Disk;

use crate::record::Record;
pub use changes::Change;
pub use recent::Latest;
use recent::Recent;
pub use rocks::RocksStorage;
pub use row_cache::{RowCache, RowCacheUsage};

/// A key and a value of `meta`.
pub type MetaRow = (Vec<u8>, Vec<u8>);

/// What went wrong with the files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// RocksDB refused or failed.
    #[error("RocksDB in {path}: {source}")]
    Rocks {
        /// The replica's folder.
        path: PathBuf,
        /// RocksDB's own words.
        source: rocksdb::Error,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A row that this version cannot read.
    #[error("RocksDB in {path}: a {what} row is {len} bytes, which is not its form; the replica must be rebuilt")]
    Row {
        /// The replica's folder.
        path: PathBuf,
        /// Which kind of row.
        what: &'static str,
        /// Its length.
        len: usize,
    },
}

impl Error {
    /// Whether the files are damaged, so that what they held can't be relied on.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Rocks { source, .. } => match source.kind() {
                ErrorKind::Corruption => true,
                // EIO: the disk can't read (or write) a block any more. Others, such as too many open files, pass.
                ErrorKind::IOError => source.as_ref().contains("Input/output error"),
                _ => false,
            },
            Self::Row { .. } => true,
            Self::Io { .. } => false,
        }
    }
}

/// What a database says of itself, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memtables, those that are being flushed included.
    pub memtable_bytes: u64,
    /// Sorted files in use.
    pub sst_bytes: u64,
    /// What compaction still has to rewrite, estimated.
    pub pending_compaction_bytes: u64,
    /// Files of level 0: many slow writes down.
    pub l0_files: u64,
    /// Compactions under way.
    pub running_compactions: u64,
    /// Flushes under way.
    pub running_flushes: u64,
}

/// What compaction may drop, decided elsewhere and read at each row.
#[derive(Default)]
pub struct Collection {
    /// RowCache up to this local seq have been confirmed by every replica, and the grace time has passed. 0: none.
    pub horizon: AtomicU64,
    /// Expired records are dropped only before this time, unix ms (wall clock less the skew limit).
    pub expired_before_ms: AtomicU64,
}

impl Collection {
    /// Whether compaction may drop this row of `records`.
    pub fn drops(&self, row: &[u8]) -> bool {
        let horizon = self.horizon.load(Ordering::Acquire);
        let Some((seq, record)) = split_row(row) else { return false };
        if horizon == 0 || seq > horizon {
            return false;
        }
        let expired_before = self.expired_before_ms.load(Ordering::Acquire);
        Record::decode(Bytes::copy_from_slice(record)).is_ok_and(|r| r.may_be_collected(expired_before, 0))
    }
}

/// A row of `records`: its local seq and the encoded record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The seq of the change that wrote it.
    pub seq: u64,
    /// The record's encoding.
    pub record: Bytes,
}

/// How many rows to read next, for who reads many for one purpose, after so many had so many bytes: many at once cost
/// less, as long as they are small.
pub fn rows_at_once(before: usize, bytes: usize) -> usize {
    const MOST: usize = 32;
    const SMALL: usize = 128 << 10;
    if bytes < SMALL { MOST.min(before * 4) } else { 1 }
}

fn split_row(row: &[u8]) -> Option<(u64, &[u8])> {
    let (seq, record) = row.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*seq), record))
}

/// Which family a row is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// Key -> seq and record.
    Records,
    /// Seq -> where it came from and key, in pages.
    Changes,
    /// What the replica is and where it stands.
    Meta,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Records, Self::Changes, Self::Meta];

    /// Its name in the files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Records => "records",
            Self::Changes => "changes",
            Self::Meta => "meta",
        }
    }
}

/// One write of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write<'a> {
    /// This row has this value.
    Put(Family, &'a [u8], &'a [u8]),
    /// There is no such row.
    Delete(Family, &'a [u8]),
    /// There is no row from the first key on up to the second, which is left.
    DeleteRange(Family, &'a [u8], &'a [u8]),
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A record that came from the peer of this origin.
    Record(u64),
    Put,
    Delete,
    DeleteRange,
}

/// A batch that had more does not keep its memory for the next one.
const KEPT_BYTES: usize = 1 << 20;

/// Changes to be written together.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Keys and values, one after the other.
    bytes: Vec<u8>,
    /// Of each write: what, where, and where its key and its value end.
    writes: Vec<(Kind, Family, usize, usize)>,
    /// The lines of the records.
    changes: changes::Pages,
}

impl Batch {
    fn add(&mut self, kind: Kind, family: Family, key: &[&[u8]], value: &[&[u8]]) {
        key.iter().for_each(|part| self.bytes.extend_from_slice(part));
        let middle = self.bytes.len();
        value.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self.writes.push((kind, family, middle, self.bytes.len()));
    }

    /// A record's row and its line in `changes`; `encode` appends the record's encoding.
    pub fn put_record(&mut self, key: &[u8], seq: u64, from: u64, encode: impl FnOnce(&mut Vec<u8>)) {
        self.bytes.extend_from_slice(key);
        let middle = self.bytes.len();
        self.bytes.extend_from_slice(&seq.to_be_bytes());
        encode(&mut self.bytes);
        self.writes.push((Kind::Record(from), Family::Records, middle, self.bytes.len()));
        self.changes.add(seq, from, key);
    }

    /// Deletes a row for good, without a line in `changes`.
    pub fn delete_row(&mut self, key: &[u8]) {
        self.add(Kind::Delete, Family::Records, &[key], &[]);
    }

    /// A row of `meta`.
    pub fn put_meta(&mut self, key: &[u8], value: &[u8]) {
        self.add(Kind::Put, Family::Meta, &[key], &[value]);
    }

    /// Removes a row of `meta`.
    pub fn delete_meta(&mut self, key: &[u8]) {
        self.add(Kind::Delete, Family::Meta, &[key], &[]);
    }

    /// Removes the lines of `changes` up to and with `seq`.
    pub fn trim_changes(&mut self, seq: u64) {
        let end = seq.saturating_add(1).to_be_bytes();
        self.add(Kind::DeleteRange, Family::Changes, &[&0u64.to_be_bytes()], &[&end]);
    }

    /// All writes, in their order; those of `changes` are the last.
    pub fn writes(&self) -> impl Iterator<Item = Write<'_>> {
        let mut begin = 0;
        let pages = self.changes.rows().map(|(key, page)| Write::Put(Family::Changes, key, page));
        let writes = self.writes.iter().map(move |(kind, family, middle, end)| {
            let (key, value) = (&self.bytes[begin..*middle], &self.bytes[*middle..*end]);
            begin = *end;
            match kind {
                Kind::Record(_) | Kind::Put => Write::Put(*family, key, value),
                Kind::Delete => Write::Delete(*family, key),
                Kind::DeleteRange => Write::DeleteRange(*family, key, value),
            }
        });
        writes.chain(pages)
    }

    /// The records, in their order, in memory of their own.
    fn latest(&self) -> Vec<Latest> {
        let bytes = Bytes::copy_from_slice(&self.bytes);
        let mut begin = 0;
        let latest = self.writes.iter().filter_map(|(kind, _, middle, end)| {
            let (key, row) = (begin..*middle, *middle..*end);
            begin = *end;
            let Kind::Record(from) = kind else { return None };
            let (seq, record) = split_row(&bytes[row])?;
            Some(Latest { seq, from: *from, key: bytes.slice(key), record: bytes.slice_ref(record) })
        });
        latest.collect()
    }

    /// How many those are.
    fn len(&self) -> usize {
        self.writes.len() + self.changes.len()
    }

    /// Bytes so far.
    pub fn size(&self) -> usize {
        self.bytes.len() + self.changes.size()
    }

    /// Begins anew, in the memory that it has, unless that is more than most batches need.
    pub fn clear(&mut self) {
        if self.size() > KEPT_BYTES {
            *self = Self::default();
        }
        self.bytes.clear();
        self.writes.clear();
        self.changes.clear();
    }

    /// Whether nothing was put.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}

/// How far a read goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// No further than memory, so that it does not block.
    Memory,
    /// To the disk.
    Disk,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// The row's value.
    Value(&'a [u8]),
    /// There is no such row.
    Nothing,
    /// It is not in memory, and the read was not to go further.
    NotInMemory,
}

/// How databases are opened, and what all of a process share: memory bounds, and the disk.
pub trait Storage: Send + Sync {
    /// Opens or makes the database in the folder `path`; it asks `collection` what compaction may drop.
    fn open(&self, path: &Path, collection: Arc<Collection>) -> Result<Box<dyn Database>, Error>;

    /// The disk of `path`; `None` where it can't be told.
    fn disk(&self, path: &Path) -> Option<Disk>;

    /// Bytes of the block cache: all, and those in use at this moment.
    fn cache_bytes(&self) -> (u64, u64);

    /// Where rows are kept in memory.
    fn row_cache(&self) -> &Arc<RowCache>;

    /// Bytes of its last changes that a database keeps in memory for followers.
    fn recent_bytes(&self) -> usize;
}

/// RowCache at one instant, or as they are now.
pub trait View {
    /// Walks the rows of a family from the key `from` on, in key order, until `visit` says false.
    fn walk(&self, family: Family, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error>;
}

/// An open database. All calls block; no two that write are made at once but `sync`.
pub trait Database: View + Send + Sync {
    /// Writes all of the batch or nothing; `sync`: and all that was written so far is on the disk when it returns.
    fn write(&self, batch: &Batch, sync: bool) -> Result<(), Error>;

    /// As `write`, not synced, unless the database would have it wait until the background has caught up: false, and
    /// nothing is written.
    fn try_write(&self, batch: &Batch) -> Result<bool, Error>;

    /// What was written before this is on the disk when it returns.
    fn sync(&self) -> Result<(), Error>;

    /// A row's value.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// The values of rows of `records`: hands `found` each key's index with what there is, in any order.
    fn get_many(&self, keys: &[&[u8]], reach: Reach, found: &mut dyn FnMut(usize, Result<Found<'_>, Error>));

    /// The last row.
    fn last(&self, family: Family) -> Result<Option<MetaRow>, Error>;

    /// All families at this instant.
    fn pin(&self) -> Box<dyn View + '_>;

    /// A copy of the files in the new folder `path`, by hard links where it can.
    fn checkpoint(&self, path: &Path) -> Result<(), Error>;

    /// Starts a sorted file for `ingest`.
    fn sorted_file(&self, path: PathBuf) -> Result<Box<dyn Sorted + '_>, Error>;

    /// Moves sorted files in as rows of `records`; they take effect together, and are on the disk when it returns.
    fn ingest(&self, files: Vec<PathBuf>) -> Result<(), Error>;

    /// Drops now what may be dropped.
    fn compact(&self);

    /// Estimates: records, and bytes of files.
    fn estimate(&self) -> (u64, u64);

    /// What it says of itself.
    fn usage(&self) -> Usage;

    /// Stops background work, before the files are deleted.
    fn cancel(&self);
}

/// A sorted file of rows, outside the database until it is ingested.
pub trait Sorted {
    /// The next row; keys come in order.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error>;

    /// Bytes written so far.
    fn size(&self) -> u64;

    /// Ends the file, synced.
    fn finish(self: Box<Self>) -> Result<PathBuf, Error>;
}

/// An open replica's database, and the form of its rows. All calls block; none waits for the writer.
pub struct Engine {
    db: Box<dyn Database>,
    path: PathBuf,
    cache: Arc<RowCache>,
    /// Its number there.
    number: u64,
    recent: Recent,
    /// What compaction may drop.
    pub collection: Arc<Collection>,
    /// Tells that the database is closed: the last field, so dropped after it.
    closed: DropGuard,
}

/// Somebody follows; see `Engine::follow`.
pub struct Following(Arc<Engine>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.recent.end();
    }
}

impl Engine {
    /// Opens or makes the database in `path`.
    pub fn open(path: &Path, storage: &dyn Storage) -> Result<Self, Error> {
        let collection = Arc::new(Collection::default());
        let db = storage.open(path, collection.clone())?;
        let cache = storage.row_cache().clone();
        let (path, number, recent) = (path.to_owned(), cache.database(), Recent::new(storage.recent_bytes()));
        Ok(Self { db, path, cache, number, recent, collection, closed: CancellationToken::new().drop_guard() })
    }

    /// Writes all of the batch or nothing; `sync`: and syncs the log before it returns.
    pub fn write(&self, batch: &Batch, sync: bool) -> Result<(), Error> {
        let latest = self.recent.wants(batch.size()).then(|| batch.latest());
        let written = self.db.write(batch, sync);
        self.wrote(batch, latest, written.is_ok());
        written
    }

    /// As `write`, not synced, unless it would have to wait for the background: false, and nothing is written.
    pub fn try_write(&self, batch: &Batch) -> Result<bool, Error> {
        let latest = self.recent.wants(batch.size()).then(|| batch.latest());
        let written = self.db.try_write(batch);
        if !matches!(written, Ok(false)) {
            self.wrote(batch, latest, written.is_ok());
        }
        written
    }

    /// Tells memory of a batch that was written, or failed to be.
    fn wrote(&self, batch: &Batch, latest: Option<Vec<Latest>>, done: bool) {
        let mut deleted = false;
        for write in batch.writes() {
            match write {
                // What a failed write has left is for a read to find out.
                Write::Put(Family::Records, key, row) => {
                    self.cache.wrote(self.number, key, split_row(row).filter(|_| done));
                }
                Write::Delete(Family::Records, key) => {
                    deleted = true;
                    self.cache.wrote(self.number, key, None);
                }
                _ => {}
            }
        }
        match latest.filter(|_| done && !deleted) {
            Some(latest) => self.recent.wrote(latest),
            None => self.recent.lost(),
        }
    }

    /// From now on the last changes are kept in memory, until this is dropped.
    pub fn follow(self: &Arc<Self>) -> Following {
        self.recent.begin();
        Following(self.clone())
    }

    /// The changes after `seq`, up to and with `last`, in order, but only the last of each key; no more once they have
    /// `bytes`. With them, how far they reach. `None`: they are not in memory, or nobody follows.
    pub fn recent(&self, seq: u64, last: u64, bytes: usize) -> Option<(Vec<Latest>, u64)> {
        self.recent.read(seq, last, bytes)
    }

    /// Syncs the log: all that was written before survives the machine.
    pub fn sync(&self) -> Result<(), Error> {
        self.db.sync()
    }

    /// A record's row.
    pub fn row(&self, key: &[u8]) -> Result<Option<Row>, Error> {
        self.rows_of(&[key], Reach::Disk).pop().flatten().unwrap_or(Ok(None))
    }

    /// The rows of many records, in the order of their keys; `None`: the row is not in memory, and the read was not to
    /// go further.
    pub fn rows_of(&self, keys: &[&[u8]], reach: Reach) -> Vec<Option<Result<Option<Row>, Error>>> {
        self.read(keys, reach, true)
    }

    /// As `rows_of`; `keep`: what was not in the row cache is taken in, and what was asked counts.
    fn read(&self, keys: &[&[u8]], reach: Reach, keep: bool) -> Vec<Option<Result<Option<Row>, Error>>> {
        let (mut missed, mut asked) = (Vec::new(), Vec::new());
        let mut rows = Vec::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            rows.push(match self.cache.look(self.number, key) {
                Ok(row) => Some(Ok(Some(row))),
                Err(miss) => {
                    missed.push((index, miss));
                    asked.push(*key);
                    None
                }
            });
        }
        if !missed.is_empty() {
            self.db.get_many(&asked, reach, &mut |place, found| {
                let (index, miss) = missed[place];
                rows[index] = match found {
                    Ok(Found::NotInMemory) => None,
                    Ok(Found::Nothing) => Some(Ok(None)),
                    Ok(Found::Value(row)) => Some(match split_row(row) {
                        Some((seq, record)) if keep => {
                            Ok(Some(self.cache.fill(self.number, asked[place], miss, seq, record)))
                        }
                        Some((seq, record)) => Ok(Some(Row { seq, record: Bytes::copy_from_slice(record) })),
                        None => Err(self.malformed(Family::Records, row.len())),
                    }),
                    Err(error) => Some(Err(error)),
                };
            });
        }
        if keep {
            // What is not in memory is looked for once more, and counts then.
            let answered = missed.iter().filter(|(index, _)| rows[*index].is_some()).count();
            self.cache.count(keys.len() - missed.len(), answered);
        }
        rows
    }

    /// The rows of many records, in the order of their keys, for who needs them but once: none of them is taken into the
    /// row cache.
    pub fn rows_once(&self, keys: &[&[u8]]) -> Result<Vec<Option<Row>>, Error> {
        self.read(keys, Reach::Disk, false).into_iter().map(|row| row.unwrap_or(Ok(None))).collect()
    }

    fn malformed(&self, family: Family, len: usize) -> Error {
        Error::Row { path: self.path.clone(), what: family.name(), len }
    }

    /// The rows of `meta` whose key begins with `prefix`, in order.
    pub fn metas(&self, prefix: &[u8]) -> Result<Vec<MetaRow>, Error> {
        metas(&*self.db, prefix)
    }

    /// Up to `limit` lines of `changes` after `seq`, in order.
    pub fn changes(&self, seq: u64, limit: usize) -> Result<Vec<Change>, Error> {
        let (mut found, mut malformed) = (Vec::new(), None);
        let next = seq.saturating_add(1);
        // The first page that ends there or later.
        self.db.walk(Family::Changes, &next.to_be_bytes(), &mut |key, page| {
            match changes::lines(key, page) {
                Some(lines) => found.extend(lines.into_iter().filter(|line| line.seq >= next)),
                None => malformed = Some(page.len()),
            }
            malformed.is_none() && found.len() < limit
        })?;
        found.truncate(limit);
        malformed.map_or(Ok(found), |len| Err(self.malformed(Family::Changes, len)))
    }

    /// The last line's seq.
    pub fn last_change(&self) -> Result<Option<u64>, Error> {
        let Some((key, page)) = self.db.last(Family::Changes)? else { return Ok(None) };
        changes::last_seq(&key).map(Some).ok_or_else(|| self.malformed(Family::Changes, page.len()))
    }

    /// Walks the rows after `after` (or from `start`) in key order as they are now, until `visit` says false.
    pub fn rows(
        &self,
        start: &[u8],
        after: Option<&[u8]>,
        visit: impl FnMut(&[u8], u64, &[u8]) -> bool,
    ) -> Result<(), Error> {
        self.walk(&*self.db, start, after, visit)
    }

    fn walk(
        &self,
        view: &(impl View + ?Sized),
        start: &[u8],
        after: Option<&[u8]>,
        mut visit: impl FnMut(&[u8], u64, &[u8]) -> bool,
    ) -> Result<(), Error> {
        let mut malformed = None;
        view.walk(Family::Records, after.unwrap_or(start), &mut |key, row| {
            if after == Some(key) {
                return true;
            }
            let Some((seq, record)) = split_row(row) else {
                malformed = Some(row.len());
                return false;
            };
            visit(key, seq, record)
        })?;
        malformed.map_or(Ok(()), |len| Err(self.malformed(Family::Records, len)))
    }

    /// A view of all families at this instant.
    pub fn pin(&self) -> Pin<'_> {
        Pin { engine: self, view: self.db.pin() }
    }

    /// A copy of the files in the new folder `path`, by hard links where it can.
    pub fn checkpoint(&self, path: &Path) -> Result<(), Error> {
        self.db.checkpoint(path)
    }

    /// Starts a sorted file for `ingest`; keys must come in order.
    pub fn sorted_file(&self, path: PathBuf) -> Result<SortedFile<'_>, Error> {
        Ok(SortedFile { file: self.db.sorted_file(path)?, row: Vec::new() })
    }

    /// Moves sorted files of rows in, before anything was read; they take effect together.
    pub fn ingest(&self, files: Vec<PathBuf>) -> Result<(), Error> {
        if files.is_empty() { Ok(()) } else { self.db.ingest(files) }
    }

    /// Compacts all, so that what may be collected goes now.
    pub fn compact(&self) {
        self.db.compact();
    }

    /// Estimates: records, and bytes of files.
    pub fn estimate(&self) -> (u64, u64) {
        self.db.estimate()
    }

    /// What the database says of itself, over all families.
    pub fn usage(&self) -> Usage {
        self.db.usage()
    }

    /// Cancelled once the database is closed, when nobody uses this any more.
    pub fn closed(&self) -> CancellationToken {
        self.closed.token().clone()
    }

    /// Stops background work, before the files are deleted.
    pub fn cancel(&self) {
        self.db.cancel();
    }
}

fn metas(view: &(impl View + ?Sized), prefix: &[u8]) -> Result<Vec<MetaRow>, Error> {
    let mut found = Vec::new();
    view.walk(Family::Meta, prefix, &mut |key, value| {
        let within = key.starts_with(prefix);
        if within {
            found.push((key.to_vec(), value.to_vec()));
        }
        within
    })?;
    Ok(found)
}

/// A view of the database at one instant.
pub struct Pin<'a> {
    engine: &'a Engine,
    view: Box<dyn View + 'a>,
}

impl Pin<'_> {
    /// As `Engine::rows`, at this instant.
    pub fn rows(&self, after: Option<&[u8]>, visit: impl FnMut(&[u8], u64, &[u8]) -> bool) -> Result<(), Error> {
        self.engine.walk(&*self.view, b"", after, visit)
    }

    /// As `Engine::metas`, at this instant.
    pub fn metas(&self, prefix: &[u8]) -> Result<Vec<MetaRow>, Error> {
        metas(&*self.view, prefix)
    }
}

/// A sorted file of records' rows.
pub struct SortedFile<'a> {
    file: Box<dyn Sorted + 'a>,
    row: Vec<u8>,
}

impl SortedFile<'_> {
    /// The next row, in key order.
    pub fn put(&mut self, key: &[u8], seq: u64, encoded: &[u8]) -> Result<(), Error> {
        self.row.clear();
        self.row.extend_from_slice(&seq.to_be_bytes());
        self.row.extend_from_slice(encoded);
        self.file.put(key, &self.row)
    }

    /// Bytes written so far.
    pub fn size(&self) -> u64 {
        self.file.size()
    }

    /// Ends the file, synced.
    pub fn finish(self) -> Result<PathBuf, Error> {
        self.file.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_back_what_was_put() {
        let mut batch = Batch::default();
        assert!(batch.is_empty());
        batch.put_record(b"key", 7, 3, |out| out.extend_from_slice(b"record"));
        batch.put_meta(b"", b"");
        batch.delete_row(b"gone");
        batch.trim_changes(4);
        let (seq, from) = (7u64.to_be_bytes(), 3u64.to_be_bytes());
        let (row, page) = ([&seq[..], b"record"].concat(), [b"\x01", &from[..], b"\0\0\0\x03key"].concat());
        let expected = [
            Write::Put(Family::Records, b"key", &row),
            Write::Put(Family::Meta, b"", b""),
            Write::Delete(Family::Records, b"gone"),
            Write::DeleteRange(Family::Changes, &[0; 8], &5u64.to_be_bytes()),
            Write::Put(Family::Changes, &seq, &page),
        ];
        assert_eq!(batch.writes().collect::<Vec<_>>(), expected);
    }
}
