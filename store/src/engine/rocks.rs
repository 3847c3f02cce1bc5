//! The database on a disk: RocksDB.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor,
    CompactOptions, DB, DBCompressionType, DBPinnableSlice, DBRawIterator, DBRecoveryMode, DataBlockIndexType, Env,
    ErrorKind, IngestExternalFileOptions, Options, ReadOptions, ReadTier, Snapshot, SstFileWriter, WriteBatch,
    WriteBufferManager, WriteOptions, compaction_filter::Decision,
};
use vasto_client::threads::a_little_behind;
use vasto_client::v1::Disk;

use super::{
    Batch, Collection, Database, Error, Family, Found, MetaRow, Reach, RowCache, Sorted, Storage, Usage, View, Write,
};

/// Some ten milliseconds of all that a replica can take.
const RECENT_BYTES: usize = 1 << 20;

/// RocksDB in folders, with memory bounds for all of a process's databases together.
pub struct RocksStorage {
    cache: Cache,
    rows: Arc<RowCache>,
    write_buffers: WriteBufferManager,
}

impl RocksStorage {
    /// `cache_bytes` for what was read, half of it for rows and half for blocks, and `write_buffer_bytes` for memtables,
    /// over all replicas together.
    pub fn new(cache_bytes: usize, write_buffer_bytes: usize) -> Self {
        a_little_behind(start_threads);
        Self {
            // Many threads read at once; 0: it finds out for itself how large its entries are.
            cache: Cache::new_hyper_clock_cache(cache_bytes / 2, 0),
            rows: Arc::new(RowCache::new(cache_bytes as u64 / 2, rand::random())),
            write_buffers: WriteBufferManager::new_write_buffer_manager(write_buffer_bytes, false),
        }
    }

    fn table(&self, filter: bool) -> BlockBasedOptions {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.cache);
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);
        // In parts: else a read of more data than fits takes in the whole index of a file, and drives out as much.
        table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
        table.set_partition_filters(true);
        table.set_pin_top_level_index_and_filter(true);
        table.set_format_version(5);
        if filter {
            // Keys are looked up one by one more often than walked through.
            table.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);
            table.set_bloom_filter(10.0, false);
            table.set_optimize_filters_for_memory(true);
        }
        table
    }

    fn records(&self) -> Options {
        let mut records = Options::default();
        // Small ones that are merged into one file would make puts a fifth cheaper; but with
        // `min_write_buffer_number_to_merge` above 1 a flush that somebody waits for may never come (RocksDB 11.8).
        records.set_write_buffer_size(16 << 20);
        records.set_bytes_per_sync(1 << 20);
        records.set_max_write_buffer_number(3);
        // So that a key that is not in a memtable is not looked for in it.
        records.set_memtable_whole_key_filtering(true);
        records.set_memtable_prefix_bloom_ratio(0.02);
        records.set_level_compaction_dynamic_level_bytes(true);
        records.set_compression_type(DBCompressionType::Lz4);
        records.set_bottommost_compression_type(DBCompressionType::Zstd);
        records.set_block_based_table_factory(&self.table(true));
        records
    }
}

/// Starts RocksDB's own threads, unless they are there: one flushes and one compacts, for all databases of the process.
fn start_threads() {
    if let Ok(mut env) = Env::new() {
        env.set_high_priority_background_threads(1);
        env.set_background_threads(1);
    }
}

impl Storage for RocksStorage {
    fn open(&self, path: &Path, collection: Arc<Collection>) -> Result<Box<dyn Database>, Error> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        // The log may end in a torn write; what comes before it is whole.
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_write_buffer_manager(&self.write_buffers);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(128 << 20);
        options.set_keep_log_file_num(2);
        options.set_max_log_file_size(4 << 20);
        options.set_bytes_per_sync(1 << 20);
        options.set_max_open_files(512);
        options.set_stats_dump_period_sec(0);

        let mut records = self.records();
        records.set_compaction_filter("vasto.collection", move |_, _, row| {
            if collection.drops(row) { Decision::Remove } else { Decision::Keep }
        });
        let mut changes = Options::default();
        changes.set_write_buffer_size(8 << 20);
        changes.set_compression_type(DBCompressionType::Lz4);
        changes.set_block_based_table_factory(&self.table(false));
        let mut meta = Options::default();
        meta.set_write_buffer_size(1 << 20);
        meta.set_block_based_table_factory(&self.table(false));

        let families = [
            // Unused; but the log's files are allocated ahead by the greatest write buffer of all.
            ColumnFamilyDescriptor::new("default", meta.clone()),
            ColumnFamilyDescriptor::new(Family::Records.name(), records),
            ColumnFamilyDescriptor::new(Family::Changes.name(), changes),
            ColumnFamilyDescriptor::new(Family::Meta.name(), meta),
        ];
        let db = DB::open_cf_descriptors(&options, path, families)
            .map_err(|source| Error::Rocks { path: path.to_owned(), source })?;
        Ok(Box::new(Rocks { db, path: path.to_owned(), sorted: self.records() }))
    }

    fn disk(&self, path: &Path) -> Option<Disk> {
        let disk = nix::sys::statvfs::statvfs(path).ok()?;
        let bytes = |blocks: u64| blocks * disk.fragment_size();
        Some(Disk { size_bytes: bytes(disk.blocks()), free_bytes: bytes(disk.blocks_available()) })
    }

    fn cache_bytes(&self) -> (u64, u64) {
        (self.cache.get_usage() as u64, self.cache.get_pinned_usage() as u64)
    }

    fn row_cache(&self) -> &Arc<RowCache> {
        &self.rows
    }

    fn recent_bytes(&self) -> usize {
        RECENT_BYTES
    }
}

struct Rocks {
    db: DB,
    path: PathBuf,
    /// Of sorted files.
    sorted: Options,
}

impl Rocks {
    fn cf(&self, family: Family) -> &ColumnFamily {
        // The families are made when the database is opened and never dropped.
        #[allow(clippy::expect_used)]
        self.db.cf_handle(family.name()).expect("a column family made at open")
    }

    fn failed(&self) -> impl Fn(rocksdb::Error) -> Error + use<> {
        let path = self.path.clone();
        move |source| Error::Rocks { path: path.clone(), source }
    }

    fn encode(&self, batch: &Batch) -> WriteBatch {
        let families = Family::ALL.map(|family| self.cf(family));
        let cf = |family: Family| families[family as usize];
        let mut all = WriteBatch::with_capacity_bytes(batch.size() + 32 * batch.len());
        for write in batch.writes() {
            match write {
                Write::Put(family, key, value) => all.put_cf(cf(family), key, value),
                Write::Delete(family, key) => all.delete_cf(cf(family), key),
                Write::DeleteRange(family, from, to) => all.delete_range_cf(cf(family), from, to),
            }
        }
        all
    }

    fn visit(
        &self,
        mut rows: DBRawIterator<'_>,
        from: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        rows.seek(from);
        while let Some((key, value)) = rows.item() {
            if !visit(key, value) {
                return Ok(());
            }
            rows.next();
        }
        rows.status().map_err(self.failed())
    }
}

fn reading(family: Family) -> ReadOptions {
    let mut options = ReadOptions::default();
    if family == Family::Records {
        options.set_readahead_size(1 << 20);
    }
    options
}

impl View for Rocks {
    fn walk(&self, family: Family, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        self.visit(self.db.raw_iterator_cf_opt(self.cf(family), reading(family)), from, visit)
    }
}

struct Pinned<'a> {
    rocks: &'a Rocks,
    snapshot: Snapshot<'a>,
}

impl View for Pinned<'_> {
    fn walk(&self, family: Family, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        let mut options = reading(family);
        options.fill_cache(false);
        options.set_snapshot(&self.snapshot);
        let rows = self.rocks.db.raw_iterator_cf_opt(self.rocks.cf(family), options);
        self.rocks.visit(rows, from, visit)
    }
}

impl Database for Rocks {
    fn write(&self, batch: &Batch, sync: bool) -> Result<(), Error> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(self.encode(batch), &options).map_err(self.failed())
    }

    fn try_write(&self, batch: &Batch) -> Result<bool, Error> {
        let mut options = WriteOptions::default();
        options.set_no_slowdown(true);
        match self.db.write_opt(self.encode(batch), &options) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Incomplete => Ok(false),
            Err(error) => Err(self.failed()(error)),
        }
    }

    fn sync(&self) -> Result<(), Error> {
        self.db.flush_wal(true).map_err(self.failed())
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Error> {
        let found = self.db.get_pinned_cf(self.cf(family), key).map_err(self.failed())?;
        Ok(found.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn get_many(&self, keys: &[&[u8]], reach: Reach, found: &mut dyn FnMut(usize, Result<Found<'_>, Error>)) {
        let mut options = ReadOptions::default();
        if reach == Reach::Memory {
            options.set_read_tier(ReadTier::BlockCache);
        }
        let cf = self.cf(Family::Records);
        let mut tell = |index, row: Result<Option<DBPinnableSlice<'_>>, rocksdb::Error>| match row {
            Ok(Some(row)) => found(index, Ok(Found::Value(&row))),
            Ok(None) => found(index, Ok(Found::Nothing)),
            Err(error) if reach == Reach::Memory && error.kind() == ErrorKind::Incomplete => {
                found(index, Ok(Found::NotInMemory));
            }
            Err(error) => found(index, Err(self.failed()(error))),
        };
        if reach == Reach::Memory || keys.len() == 1 {
            // One by one: by memory alone, MultiGet tells of a block that is not there as of an empty value.
            for (index, key) in keys.iter().enumerate() {
                tell(index, self.db.get_pinned_cf_opt(cf, key, &options));
            }
            return;
        }
        let rows = self.db.batched_multi_get_cf_opt(cf, keys.iter().copied(), false, &options);
        rows.into_iter().enumerate().for_each(|(index, row)| tell(index, row));
    }

    fn last(&self, family: Family) -> Result<Option<MetaRow>, Error> {
        let mut rows = self.db.raw_iterator_cf(self.cf(family));
        rows.seek_to_last();
        let last = rows.item().map(|(key, value)| (key.to_vec(), value.to_vec()));
        rows.status().map_err(self.failed())?;
        Ok(last)
    }

    fn pin(&self) -> Box<dyn View + '_> {
        Box::new(Pinned { rocks: self, snapshot: self.db.snapshot() })
    }

    fn checkpoint(&self, path: &Path) -> Result<(), Error> {
        let made = rocksdb::checkpoint::Checkpoint::new(&self.db).and_then(|c| c.create_checkpoint(path));
        made.map_err(self.failed())
    }

    fn sorted_file(&self, path: PathBuf) -> Result<Box<dyn Sorted + '_>, Error> {
        let writer = SstFileWriter::create(&self.sorted);
        writer.open(&path).map_err(self.failed())?;
        Ok(Box::new(SstFile { rocks: self, writer, path }))
    }

    fn ingest(&self, files: Vec<PathBuf>) -> Result<(), Error> {
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        self.db.ingest_external_file_cf_opts(self.cf(Family::Records), &options, files).map_err(self.failed())
    }

    fn compact(&self) {
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for family in [Family::Records, Family::Changes] {
            self.db.compact_range_cf_opt(self.cf(family), None::<&[u8]>, None::<&[u8]>, &options);
        }
    }

    fn estimate(&self) -> (u64, u64) {
        let cf = self.cf(Family::Records);
        let int = |name: &str| self.db.property_int_value_cf(cf, name).ok().flatten().unwrap_or(0);
        (int("rocksdb.estimate-num-keys"), int("rocksdb.live-sst-files-size") + int("rocksdb.cur-size-all-mem-tables"))
    }

    fn usage(&self) -> Usage {
        let families = Family::ALL.map(|family| self.cf(family));
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

    fn cancel(&self) {
        self.db.cancel_all_background_work(true);
    }
}

struct SstFile<'a> {
    rocks: &'a Rocks,
    writer: SstFileWriter<'a>,
    path: PathBuf,
}

impl Sorted for SstFile<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.writer.put(key, value).map_err(self.rocks.failed())
    }

    fn size(&self) -> u64 {
        self.writer.file_size()
    }

    fn finish(mut self: Box<Self>) -> Result<PathBuf, Error> {
        self.writer.finish().map_err(self.rocks.failed())?;
        Ok(self.path)
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// The threads of RocksDB by name, with how nice each is.
    fn threads() -> Vec<(String, i32)> {
        let mut found = Vec::new();
        for thread in std::fs::read_dir("/proc/self/task").unwrap() {
            // "1234 (rocksdb:low) S ...": niceness is the 19th field, the 17th behind the name.
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default();
            if let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'))
                && name.starts_with("rocksdb:")
            {
                found.push((name.to_owned(), rest.split_whitespace().nth(16).unwrap().parse().unwrap()));
            }
        }
        found.sort();
        found
    }

    #[test]
    fn what_it_does_in_the_background_goes_a_little_behind_clients() {
        let dir = tempfile::tempdir().unwrap();
        let _open = RocksStorage::new(1 << 20, 1 << 20).open(dir.path(), Arc::default()).unwrap();
        assert_eq!(threads(), [("rocksdb:high".to_owned(), 5), ("rocksdb:low".to_owned(), 5)]);
    }
}
