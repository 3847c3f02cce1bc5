//! Databases in memory that keep synced and unsynced writes apart: a crash of the machine
//! takes some of what was not synced, always from the end, and so does a sync that fails.
//!
//! Small files are real ones (a topology, a replica's name): they are written durably.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use vasto_client::v1;
use vasto_store::engine::{
    Batch, Collection, Database, Error, Family, Found, MetaRow, Reach, RowCache, Sorted, Storage, Usage, View, Write,
};

use crate::net::elapsed;

/// What a failed sync says.
pub const CANT_WRITE: &str = "the simulated disk can't write";

/// Room for a few of the last changes: some followers are close enough behind to be served from there, others aren't.
const RECENT_BYTES: usize = 600;

type Rows = BTreeMap<Bytes, Bytes>;

/// What a database holds.
#[derive(Clone, Default)]
struct Tables([Arc<Rows>; 3]);

impl Tables {
    fn apply(&mut self, batch: &Batch) {
        for write in batch.writes() {
            match write {
                Write::Put(family, key, value) => {
                    let rows = Arc::make_mut(&mut self.0[family as usize]);
                    rows.insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
                }
                Write::Delete(family, key) => {
                    Arc::make_mut(&mut self.0[family as usize]).remove(key);
                }
                Write::DeleteRange(family, from, to) => {
                    Arc::make_mut(&mut self.0[family as usize]).retain(|key, _| &key[..] < from || &key[..] >= to);
                }
            }
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for rows in &self.0 {
            encode_rows(rows, &mut out);
        }
        out
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
        let mut tables = Self::default();
        for rows in &mut tables.0 {
            *rows = Arc::new(decode_rows(&mut bytes)?);
        }
        bytes.is_empty().then_some(tables)
    }
}

fn encode_rows(rows: &Rows, out: &mut Vec<u8>) {
    out.extend((rows.len() as u64).to_be_bytes());
    for part in rows.iter().flat_map(|(key, value)| [key, value]) {
        out.extend((part.len() as u64).to_be_bytes());
        out.extend_from_slice(part);
    }
}

fn decode_rows(bytes: &mut &[u8]) -> Option<Rows> {
    let number = |bytes: &mut &[u8]| {
        let (number, rest) = bytes.split_first_chunk::<8>()?;
        *bytes = rest;
        usize::try_from(u64::from_be_bytes(*number)).ok()
    };
    let part = |bytes: &mut &[u8]| {
        let length = number(bytes)?;
        let (part, rest) = bytes.split_at_checked(length)?;
        *bytes = rest;
        Some(Bytes::copy_from_slice(part))
    };
    (0..number(bytes)?).map(|_| Some((part(bytes)?, part(bytes)?))).collect()
}

#[derive(Default)]
struct State {
    live: Tables,
    durable: Tables,
    /// Written since the last sync, in order.
    unsynced: Vec<Batch>,
    /// A sync has failed since it was opened: what was to be synced may never get to the disk, whatever later
    /// syncs say.
    failed: bool,
}

impl State {
    fn sync(&mut self) {
        for batch in std::mem::take(&mut self.unsynced) {
            self.durable.apply(&batch);
        }
    }

    /// Of what was not synced a part from the end is lost, be it nothing or all. How many writes that is.
    fn lose(&mut self, random: &mut StdRng) -> usize {
        let mut unsynced = std::mem::take(&mut self.unsynced);
        let kept = random.random_range(0..=unsynced.len());
        let lost = unsynced.len() - kept;
        unsynced.truncate(kept);
        for batch in &unsynced {
            self.durable.apply(batch);
        }
        lost
    }

    /// What a process finds that opens it.
    fn reopen(&mut self) {
        if std::mem::take(&mut self.failed) {
            self.unsynced.clear();
            self.live = self.durable.clone();
        }
    }
}

/// Of rows that are kept beside the databases.
const ROWS_BYTES: u64 = 64 << 10;

/// One machine's databases, by their folders. They outlive the process.
pub struct MemoryStorage {
    databases: Mutex<BTreeMap<PathBuf, Arc<Mutex<State>>>>,
    rows: Arc<RowCache>,
    disk: Arc<Disk>,
}

/// What the databases of a machine share.
struct Disk {
    random: Mutex<StdRng>,
    /// The next sync fails.
    fails: AtomicBool,
    /// When one failed.
    failed: Mutex<Option<Duration>>,
}

impl Disk {
    /// Whether this sync is the one to fail.
    fn fails(&self) -> bool {
        let fails = self.fails.swap(false, Ordering::Relaxed);
        if fails {
            *self.failed.lock().unwrap() = Some(elapsed());
        }
        fails
    }
}

impl MemoryStorage {
    pub fn new(seed: u64) -> Self {
        let random = Mutex::new(StdRng::seed_from_u64(seed));
        let disk = Disk { random, fails: AtomicBool::default(), failed: Mutex::default() };
        // So few that some go.
        let rows = Arc::new(RowCache::new(ROWS_BYTES, seed));
        Self { databases: Mutex::default(), rows, disk: Arc::new(disk) }
    }

    /// The next sync fails, as where the disk can't write.
    pub fn fail(&self) {
        self.disk.fails.store(true, Ordering::Relaxed);
    }

    /// When a sync failed, if one did since this was last asked; the next one does not, then.
    pub fn failed(&self) -> Option<Duration> {
        self.disk.fails.store(false, Ordering::Relaxed);
        self.disk.failed.lock().unwrap().take()
    }

    /// What each database holds of a key, for people who look for what went wrong.
    pub fn describe(&self, key: &[u8]) -> String {
        let mut text = String::new();
        for (path, database) in self.databases.lock().unwrap().iter().filter(|(path, _)| path.exists()) {
            let state = database.lock().unwrap();
            let [records, changes, meta] = &state.live.0;
            let _ = writeln!(text, "{}", path.display());
            for (name, value) in meta.iter() {
                let name = String::from_utf8_lossy(name);
                match v1::Position::decode(&value[..]) {
                    Ok(position) if name.starts_with("position/") => {
                        let _ = writeln!(text, "  at {position:?}");
                    }
                    _ => {
                        let _ = writeln!(text, "  {name} = {}", value.escape_ascii());
                    }
                }
            }
            if let Some(row) = records.get(key) {
                let record = vasto_store::record::Record::decode(row.slice(8..));
                let _ = writeln!(text, "  seq {} {record:?}", seq(row));
            }
            for (line, value) in changes.iter().filter(|(_, value)| &value[8..] == key) {
                let _ = writeln!(text, "  changed at {} by {}", seq(line), seq(value));
            }
        }
        text
    }

    /// The machine has crashed. How many writes were lost.
    pub fn crash(&self) -> usize {
        let mut lost = 0;
        for database in self.databases.lock().unwrap().values() {
            let mut state = database.lock().unwrap();
            lost += state.lose(&mut self.disk.random.lock().unwrap());
            state.live = state.durable.clone();
        }
        lost
    }
}

fn seq(bytes: &[u8]) -> u64 {
    bytes.first_chunk::<8>().map_or(0, |seq| u64::from_be_bytes(*seq))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { path: path.clone(), source }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    std::fs::write(path, bytes).map_err(io_error(path))
}

impl Storage for MemoryStorage {
    fn open(&self, path: &Path, collection: Arc<Collection>) -> Result<Box<dyn Database>, Error> {
        let (current, data) = (path.join("CURRENT"), path.join("DATA"));
        let mut databases = self.databases.lock().unwrap();
        // What the folder held goes with it.
        if !current.exists() {
            databases.remove(path);
        }
        let state = match databases.get(path) {
            Some(state) => {
                state.lock().unwrap().reopen();
                state.clone()
            }
            None => {
                let mut state = State::default();
                if data.exists() {
                    let bytes = std::fs::read(&data).map_err(io_error(&data))?;
                    let invalid = || io_error(&data)(io::Error::from(io::ErrorKind::InvalidData));
                    state.live = Tables::decode(&bytes).ok_or_else(invalid)?;
                }
                state.durable = state.live.clone();
                std::fs::create_dir_all(path).map_err(io_error(path))?;
                write(&current, b"")?;
                let state = Arc::new(Mutex::new(state));
                databases.insert(path.to_owned(), state.clone());
                state
            }
        };
        Ok(Box::new(Memory { state, collection, disk: self.disk.clone(), syncs: Mutex::new(0) }))
    }

    fn disk(&self, _: &Path) -> Option<v1::Disk> {
        Some(v1::Disk { size_bytes: 1 << 40, free_bytes: 1 << 39 })
    }

    fn cache_bytes(&self) -> (u64, u64) {
        (0, 0)
    }

    fn row_cache(&self) -> &Arc<RowCache> {
        &self.rows
    }

    fn recent_bytes(&self) -> usize {
        RECENT_BYTES
    }
}

struct Memory {
    state: Arc<Mutex<State>>,
    collection: Arc<Collection>,
    disk: Arc<Disk>,
    syncs: Mutex<u64>,
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What was written since the last sync, and now `last`, should have been synced, and it failed.
    fn fail(&self, last: Option<&Batch>) -> Error {
        let mut state = self.state();
        state.failed = true;
        state.unsynced.extend(last.cloned());
        state.lose(&mut self.disk.random.lock().unwrap());
        // Not the real folder, whose name is another one each time.
        io_error(Path::new("db"))(io::Error::other(CANT_WRITE))
    }

    /// Compacts now and then, as RocksDB would.
    fn synced(&self) {
        let mut syncs = self.syncs.lock().unwrap();
        *syncs += 1;
        if syncs.is_multiple_of(8) {
            self.compact();
        }
    }
}

fn walk(rows: &Rows, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) {
    for (key, value) in rows.range::<[u8], _>((Bound::Included(from), Bound::Unbounded)) {
        if !visit(key, value) {
            return;
        }
    }
}

impl View for Memory {
    fn walk(&self, family: Family, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        let rows = self.state().live.0[family as usize].clone();
        walk(&rows, from, visit);
        Ok(())
    }
}

struct Pinned(Tables);

impl View for Pinned {
    fn walk(&self, family: Family, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        walk(&self.0.0[family as usize], from, visit);
        Ok(())
    }
}

impl Database for Memory {
    fn write(&self, batch: &Batch, sync: bool) -> Result<(), Error> {
        if sync && self.disk.fails() {
            return Err(self.fail(Some(batch)));
        }
        let mut state = self.state();
        state.live.apply(batch);
        state.unsynced.push(batch.clone());
        if sync {
            state.sync();
            drop(state);
            self.synced();
        }
        Ok(())
    }

    /// Half of all that is written would have to wait.
    fn try_write(&self, batch: &Batch) -> Result<bool, Error> {
        let waits = self.disk.random.lock().unwrap().random_bool(0.5);
        if !waits {
            self.write(batch, false)?;
        }
        Ok(!waits)
    }

    fn sync(&self) -> Result<(), Error> {
        if self.disk.fails() {
            return Err(self.fail(None));
        }
        self.state().sync();
        self.synced();
        Ok(())
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.state().live.0[family as usize].get(key).cloned())
    }

    /// Nothing is in memory: each read takes the time that work takes.
    fn get_many(&self, keys: &[&[u8]], reach: Reach, found: &mut dyn FnMut(usize, Result<Found<'_>, Error>)) {
        let state = self.state();
        for (index, key) in keys.iter().enumerate() {
            let row = state.live.0[Family::Records as usize].get(*key).map_or(Found::Nothing, |v| Found::Value(v));
            found(index, Ok(if reach == Reach::Memory { Found::NotInMemory } else { row }));
        }
    }

    fn last(&self, family: Family) -> Result<Option<MetaRow>, Error> {
        let state = self.state();
        Ok(state.live.0[family as usize].last_key_value().map(|(key, value)| (key.to_vec(), value.to_vec())))
    }

    fn pin(&self) -> Box<dyn View + '_> {
        Box::new(Pinned(self.state().live.clone()))
    }

    fn checkpoint(&self, path: &Path) -> Result<(), Error> {
        std::fs::create_dir(path).map_err(io_error(path))?;
        write(&path.join("DATA"), &self.state().live.encode())
    }

    fn sorted_file(&self, path: PathBuf) -> Result<Box<dyn Sorted + '_>, Error> {
        Ok(Box::new(SortedRows { path, rows: Rows::new(), size: 0 }))
    }

    fn ingest(&self, files: Vec<PathBuf>) -> Result<(), Error> {
        let mut guard = self.state();
        let state = &mut *guard;
        state.sync();
        for path in files {
            let bytes = std::fs::read(&path).map_err(io_error(&path))?;
            let invalid = || io_error(&path)(io::Error::from(io::ErrorKind::InvalidData));
            let rows = decode_rows(&mut &bytes[..]).ok_or_else(invalid)?;
            for tables in [&mut state.live, &mut state.durable] {
                Arc::make_mut(&mut tables.0[Family::Records as usize]).extend(rows.clone());
            }
        }
        Ok(())
    }

    fn compact(&self) {
        let mut state = self.state();
        let State { live, durable, .. } = &mut *state;
        let records = Family::Records as usize;
        let gone: Vec<Bytes> = live.0[records]
            .iter()
            .filter(|(key, row)| durable.0[records].get(*key) == Some(row) && self.collection.drops(row))
            .map(|(key, _)| key.clone())
            .collect();
        for tables in [live, durable] {
            for key in &gone {
                Arc::make_mut(&mut tables.0[records]).remove(key);
            }
        }
    }

    fn estimate(&self) -> (u64, u64) {
        let state = self.state();
        let rows = &state.live.0[Family::Records as usize];
        (rows.len() as u64, rows.iter().map(|(key, row)| (key.len() + row.len()) as u64).sum())
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }

    fn cancel(&self) {}
}

struct SortedRows {
    path: PathBuf,
    rows: Rows,
    size: u64,
}

impl Sorted for SortedRows {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        assert!(self.rows.last_key_value().is_none_or(|(last, _)| &last[..] < key), "keys come in order");
        self.size += (key.len() + value.len()) as u64;
        self.rows.insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        Ok(())
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn finish(self: Box<Self>) -> Result<PathBuf, Error> {
        let mut bytes = Vec::new();
        encode_rows(&self.rows, &mut bytes);
        write(&self.path, &bytes)?;
        Ok(self.path)
    }
}
