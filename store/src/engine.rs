//! One replica's files: a RocksDB with the column families `records` (each row
//! with its local seq), `changes` (seq -> key, no value) and `meta`. It knows
//! bytes and rows, nothing of joins, peers or topologies.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, DBRawIterator, DBRecoveryMode, ErrorKind, IngestExternalFileOptions, Options, ReadOptions,
    Snapshot, SstFileWriter, WriteBatch, WriteBufferManager, WriteOptions, compaction_filter::Decision,
};

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::record::Record;

const RECORDS: &str = "records";
const CHANGES: &str = "changes";
const META: &str = "meta";

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

/// What all replicas of a process share: memory bounds.
#[derive(Clone)]
pub struct Shared {
    cache: Cache,
    write_buffers: WriteBufferManager,
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

impl Shared {
    /// `cache_bytes` for blocks and `write_buffer_bytes` for memtables, over all replicas together.
    pub fn new(cache_bytes: usize, write_buffer_bytes: usize) -> Self {
        Self {
            cache: Cache::new_lru_cache(cache_bytes),
            write_buffers: WriteBufferManager::new_write_buffer_manager(write_buffer_bytes, false),
        }
    }

    /// Bytes of the block cache: all, and those in use at this moment.
    pub fn cache_bytes(&self) -> (u64, u64) {
        (self.cache.get_usage() as u64, self.cache.get_pinned_usage() as u64)
    }
}

/// What RocksDB says of itself, for metrics.
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
    /// Rows up to this local seq have been confirmed by every replica, and the grace time has passed. 0: none.
    pub horizon: AtomicU64,
    /// Expired records are dropped only before this time, unix ms (wall clock less the skew limit).
    pub expired_before_ms: AtomicU64,
}

impl Collection {
    fn decide(&self, row: &[u8]) -> Decision {
        let horizon = self.horizon.load(Ordering::Acquire);
        let Some((seq, record)) = split_row(row) else { return Decision::Keep };
        if horizon == 0 || seq > horizon {
            return Decision::Keep;
        }
        let expired_before = self.expired_before_ms.load(Ordering::Acquire);
        match Record::decode(Bytes::copy_from_slice(record)) {
            Ok(record) if record.may_be_collected(expired_before, 0) => Decision::Remove,
            _ => Decision::Keep,
        }
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

fn split_row(row: &[u8]) -> Option<(u64, &[u8])> {
    let (seq, record) = row.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*seq), record))
}

/// A line of `changes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its place in the order of this replica's changes.
    pub seq: u64,
    /// The origin of the peer that it came from; 0: a client.
    pub from: u64,
    /// The changed key.
    pub key: Bytes,
}

/// An open RocksDB. All calls block; none waits for the writer.
pub struct Engine {
    db: DB,
    path: PathBuf,
    options: Options,
    /// What compaction may drop.
    pub collection: Arc<Collection>,
    /// Tells that the database is closed: the last field, so dropped after it.
    closed: DropGuard,
}

/// Changes to be written together.
pub struct Batch<'a> {
    engine: &'a Engine,
    batch: WriteBatch,
}

impl Batch<'_> {
    /// A record's row and its line in `changes`.
    pub fn put_record(&mut self, key: &[u8], seq: u64, from: u64, encoded: &[u8]) {
        let mut row = Vec::with_capacity(8 + encoded.len());
        row.extend_from_slice(&seq.to_be_bytes());
        row.extend_from_slice(encoded);
        self.batch.put_cf(self.engine.cf(RECORDS), key, row);
        let mut line = Vec::with_capacity(8 + key.len());
        line.extend_from_slice(&from.to_be_bytes());
        line.extend_from_slice(key);
        self.batch.put_cf(self.engine.cf(CHANGES), seq.to_be_bytes(), line);
    }

    /// Deletes a row for good, without a line in `changes`.
    pub fn delete_row(&mut self, key: &[u8]) {
        self.batch.delete_cf(self.engine.cf(RECORDS), key);
    }

    /// A row of `meta`.
    pub fn put_meta(&mut self, key: &[u8], value: &[u8]) {
        self.batch.put_cf(self.engine.cf(META), key, value);
    }

    /// Removes a row of `meta`.
    pub fn delete_meta(&mut self, key: &[u8]) {
        self.batch.delete_cf(self.engine.cf(META), key);
    }

    /// Removes the lines of `changes` up to and with `seq`.
    pub fn trim_changes(&mut self, seq: u64) {
        let end = seq.saturating_add(1).to_be_bytes();
        self.batch.delete_range_cf(self.engine.cf(CHANGES), 0u64.to_be_bytes(), end);
    }

    /// Bytes so far.
    pub fn size(&self) -> usize {
        self.batch.size_in_bytes()
    }

    /// Whether nothing was put.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }
}

impl Engine {
    /// Opens or makes the database in `path`.
    pub fn open(path: &Path, shared: &Shared) -> Result<Self, Error> {
        let collection = Arc::new(Collection::default());
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        // The log may end in a torn write; what comes before it is whole.
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_write_buffer_manager(&shared.write_buffers);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(128 << 20);
        options.set_keep_log_file_num(2);
        options.set_max_log_file_size(4 << 20);
        options.set_bytes_per_sync(1 << 20);
        options.set_max_open_files(512);
        options.set_stats_dump_period_sec(0);

        let records = Self::records_options(shared, Some(collection.clone()));
        let mut changes = Options::default();
        changes.set_write_buffer_size(8 << 20);
        changes.set_compression_type(DBCompressionType::Lz4);
        changes.set_block_based_table_factory(&table(shared, false));
        let mut meta = Options::default();
        meta.set_write_buffer_size(1 << 20);
        meta.set_block_based_table_factory(&table(shared, false));

        let families = [
            // Unused; but the log's files are allocated ahead by the greatest write buffer of all.
            ColumnFamilyDescriptor::new("default", meta.clone()),
            ColumnFamilyDescriptor::new(RECORDS, records),
            ColumnFamilyDescriptor::new(CHANGES, changes),
            ColumnFamilyDescriptor::new(META, meta),
        ];
        let db = DB::open_cf_descriptors(&options, path, families)
            .map_err(|source| Error::Rocks { path: path.to_owned(), source })?;
        let options = Self::records_options(shared, None);
        Ok(Self { db, path: path.to_owned(), options, collection, closed: CancellationToken::new().drop_guard() })
    }

    fn records_options(shared: &Shared, collection: Option<Arc<Collection>>) -> Options {
        let mut records = Options::default();
        records.set_write_buffer_size(16 << 20);
        records.set_max_write_buffer_number(3);
        records.set_level_compaction_dynamic_level_bytes(true);
        records.set_compression_type(DBCompressionType::Lz4);
        records.set_bottommost_compression_type(DBCompressionType::Zstd);
        records.set_block_based_table_factory(&table(shared, true));
        if let Some(collection) = collection {
            records.set_compaction_filter("vasto.collection", move |_, _, row| collection.decide(row));
        }
        records
    }

    fn cf(&self, name: &'static str) -> &ColumnFamily {
        // The families are made when the database is opened and never dropped.
        #[allow(clippy::expect_used)]
        self.db.cf_handle(name).expect("a column family made at open")
    }

    fn rocks(&self) -> impl Fn(rocksdb::Error) -> Error + use<> {
        let path = self.path.clone();
        move |source| Error::Rocks { path: path.clone(), source }
    }

    /// An empty batch.
    pub fn batch(&self) -> Batch<'_> {
        Batch { engine: self, batch: WriteBatch::default() }
    }

    /// Writes all of the batch or nothing; `sync`: and syncs the log before it returns.
    pub fn write(&self, batch: Batch<'_>, sync: bool) -> Result<(), Error> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(batch.batch, &options).map_err(self.rocks())
    }

    /// Syncs the log: all that was written before survives the machine.
    pub fn sync(&self) -> Result<(), Error> {
        self.db.flush_wal(true).map_err(self.rocks())
    }

    /// A record's row.
    pub fn row(&self, key: &[u8]) -> Result<Option<Row>, Error> {
        let Some(row) = self.db.get_pinned_cf(self.cf(RECORDS), key).map_err(self.rocks())? else {
            return Ok(None);
        };
        self.to_row(&row).map(Some)
    }

    fn to_row(&self, row: &[u8]) -> Result<Row, Error> {
        match split_row(row) {
            Some((seq, record)) => Ok(Row { seq, record: Bytes::copy_from_slice(record) }),
            None => Err(Error::Row { path: self.path.clone(), what: RECORDS, len: row.len() }),
        }
    }

    /// The rows of `meta` whose key begins with `prefix`, in order.
    pub fn metas(&self, prefix: &[u8]) -> Result<Vec<MetaRow>, Error> {
        self.metas_at(prefix, None)
    }

    fn metas_at(&self, prefix: &[u8], at: Option<&Snapshot<'_>>) -> Result<Vec<MetaRow>, Error> {
        let mut options = ReadOptions::default();
        if let Some(at) = at {
            options.set_snapshot(at);
        }
        let mut found = Vec::new();
        let mut rows = self.db.raw_iterator_cf_opt(self.cf(META), options);
        rows.seek(prefix);
        while let Some((key, value)) = rows.item() {
            if !key.starts_with(prefix) {
                break;
            }
            found.push((key.to_vec(), value.to_vec()));
            rows.next();
        }
        rows.status().map_err(self.rocks())?;
        Ok(found)
    }

    /// Up to `limit` lines of `changes` after `seq`, in order.
    pub fn changes(&self, seq: u64, limit: usize) -> Result<Vec<Change>, Error> {
        let mut lines = self.db.raw_iterator_cf(self.cf(CHANGES));
        lines.seek(seq.saturating_add(1).to_be_bytes());
        let mut found = Vec::new();
        while found.len() < limit {
            let Some((key, value)) = lines.item() else { break };
            found.push(self.to_change(key, value)?);
            lines.next();
        }
        lines.status().map_err(self.rocks())?;
        Ok(found)
    }

    fn to_change(&self, key: &[u8], value: &[u8]) -> Result<Change, Error> {
        match (<[u8; 8]>::try_from(key), value.split_first_chunk::<8>()) {
            (Ok(seq), Some((from, changed))) => Ok(Change {
                seq: u64::from_be_bytes(seq),
                from: u64::from_be_bytes(*from),
                key: Bytes::copy_from_slice(changed),
            }),
            _ => Err(Error::Row { path: self.path.clone(), what: CHANGES, len: value.len() }),
        }
    }

    /// The last line's seq.
    pub fn last_change(&self) -> Result<Option<u64>, Error> {
        let mut lines = self.db.raw_iterator_cf(self.cf(CHANGES));
        lines.seek_to_last();
        let last = lines.item().map(|(key, value)| self.to_change(key, value)).transpose()?;
        lines.status().map_err(self.rocks())?;
        Ok(last.map(|c| c.seq))
    }

    /// Walks the rows after `after` (or from `start`) in key order as they are now, until `visit` says false.
    pub fn rows(
        &self,
        start: &[u8],
        after: Option<&[u8]>,
        visit: impl FnMut(&[u8], u64, &[u8]) -> bool,
    ) -> Result<(), Error> {
        let mut options = ReadOptions::default();
        options.set_readahead_size(1 << 20);
        self.walk(self.db.raw_iterator_cf_opt(self.cf(RECORDS), options), start, after, visit)
    }

    fn walk(
        &self,
        mut rows: DBRawIterator<'_>,
        start: &[u8],
        after: Option<&[u8]>,
        mut visit: impl FnMut(&[u8], u64, &[u8]) -> bool,
    ) -> Result<(), Error> {
        rows.seek(after.unwrap_or(start));
        if after.is_some() && rows.key() == after {
            rows.next();
        }
        while let Some((key, row)) = rows.item() {
            let Some((seq, record)) = split_row(row) else {
                return Err(Error::Row { path: self.path.clone(), what: RECORDS, len: row.len() });
            };
            if !visit(key, seq, record) {
                return Ok(());
            }
            rows.next();
        }
        rows.status().map_err(self.rocks())
    }

    /// A view of all column families at this instant.
    pub fn pin(&self) -> Pin<'_> {
        Pin { engine: self, snapshot: self.db.snapshot() }
    }

    /// A copy of the files in the new folder `path`, by hard links where it can.
    pub fn checkpoint(&self, path: &Path) -> Result<(), Error> {
        rocksdb::checkpoint::Checkpoint::new(&self.db).and_then(|c| c.create_checkpoint(path)).map_err(self.rocks())
    }

    /// Starts a sorted file for `ingest`; keys must come in order.
    pub fn sorted_file(&self, path: PathBuf) -> Result<SortedFile<'_>, Error> {
        let writer = SstFileWriter::create(&self.options);
        writer.open(&path).map_err(self.rocks())?;
        Ok(SortedFile { engine: self, writer, path })
    }

    /// Moves sorted files of rows in; they take effect together.
    pub fn ingest(&self, files: Vec<PathBuf>) -> Result<(), Error> {
        if files.is_empty() {
            return Ok(());
        }
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        self.db.ingest_external_file_cf_opts(self.cf(RECORDS), &options, files).map_err(self.rocks())
    }

    /// Compacts all, so that what may be collected goes now.
    pub fn compact(&self) -> Result<(), Error> {
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for name in [RECORDS, CHANGES] {
            self.db.compact_range_cf_opt(self.cf(name), None::<&[u8]>, None::<&[u8]>, &options);
        }
        Ok(())
    }

    /// Estimates: records, and bytes of files.
    pub fn estimate(&self) -> (u64, u64) {
        let cf = self.cf(RECORDS);
        let int = |name: &str| self.db.property_int_value_cf(cf, name).ok().flatten().unwrap_or(0);
        (int("rocksdb.estimate-num-keys"), int("rocksdb.live-sst-files-size") + int("rocksdb.cur-size-all-mem-tables"))
    }

    /// What RocksDB says of itself, over all column families.
    pub fn usage(&self) -> Usage {
        let families = [RECORDS, CHANGES, META].map(|name| self.cf(name));
        let sum = |property: &str| -> u64 {
            families.iter().filter_map(|cf| self.db.property_int_value_cf(*cf, property).ok().flatten()).sum()
        };
        let whole = |property: &str| self.db.property_int_value(property).ok().flatten().unwrap_or(0);
        Usage {
            memtable_bytes: sum("rocksdb.cur-size-all-mem-tables"),
            sst_bytes: sum("rocksdb.live-sst-files-size"),
            pending_compaction_bytes: sum("rocksdb.estimate-pending-compaction-bytes"),
            l0_files: sum("rocksdb.num-files-at-level0"),
            running_compactions: whole("rocksdb.num-running-compactions"),
            running_flushes: whole("rocksdb.num-running-flushes"),
        }
    }

    /// Cancelled once the database is closed, when nobody uses this any more.
    pub fn closed(&self) -> CancellationToken {
        self.closed.token().clone()
    }

    /// Stops background work, before the files are deleted.
    pub fn cancel(&self) {
        self.db.cancel_all_background_work(true);
    }
}

/// A view of the database at one instant.
pub struct Pin<'a> {
    engine: &'a Engine,
    snapshot: Snapshot<'a>,
}

impl Pin<'_> {
    /// As `Engine::rows`, at this instant.
    pub fn rows(&self, after: Option<&[u8]>, visit: impl FnMut(&[u8], u64, &[u8]) -> bool) -> Result<(), Error> {
        let mut options = ReadOptions::default();
        options.set_readahead_size(1 << 20);
        options.fill_cache(false);
        options.set_snapshot(&self.snapshot);
        let rows = self.engine.db.raw_iterator_cf_opt(self.engine.cf(RECORDS), options);
        self.engine.walk(rows, b"", after, visit)
    }

    /// As `Engine::metas`, at this instant.
    pub fn metas(&self, prefix: &[u8]) -> Result<Vec<MetaRow>, Error> {
        self.engine.metas_at(prefix, Some(&self.snapshot))
    }
}

/// A sorted file of rows, outside the database until it is ingested.
pub struct SortedFile<'a> {
    engine: &'a Engine,
    writer: SstFileWriter<'a>,
    path: PathBuf,
}

impl SortedFile<'_> {
    /// The next row, in key order.
    pub fn put(&mut self, key: &[u8], seq: u64, encoded: &[u8]) -> Result<(), Error> {
        let mut row = Vec::with_capacity(8 + encoded.len());
        row.extend_from_slice(&seq.to_be_bytes());
        row.extend_from_slice(encoded);
        self.writer.put(key, row).map_err(self.engine.rocks())
    }

    /// Bytes written so far.
    pub fn size(&self) -> u64 {
        self.writer.file_size()
    }

    /// Ends the file, synced.
    pub fn finish(mut self) -> Result<PathBuf, Error> {
        self.writer.finish().map_err(self.engine.rocks())?;
        Ok(self.path)
    }
}

fn table(shared: &Shared, filter: bool) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&shared.cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(5);
    if filter {
        table.set_bloom_filter(10.0, false);
        table.set_optimize_filters_for_memory(true);
    }
    table
}
