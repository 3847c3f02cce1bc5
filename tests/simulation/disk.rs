//! Databases in memory that keep synced and unsynced writes apart: a crash of the machine
//! takes some of what was not synced, always from the end.
//!
//! Small files are real ones (a topology, a replica's name): they are written durably.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use vasto_client::v1::Disk;
use vasto_store::engine::{Batch, Collection, Database, Error, Family, MetaRow, Sorted, Storage, Usage, View, Write};

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
}

impl State {
    fn sync(&mut self) {
        self.unsynced.clear();
        self.durable = self.live.clone();
    }
}

/// One machine's databases, by their folders. They outlive the process.
pub struct MemoryStorage {
    databases: Mutex<BTreeMap<PathBuf, Arc<Mutex<State>>>>,
    random: Mutex<StdRng>,
}

impl MemoryStorage {
    pub fn new(seed: u64) -> Self {
        Self { databases: Mutex::default(), random: Mutex::new(StdRng::seed_from_u64(seed)) }
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
                match vasto_client::v1::Position::decode(&value[..]) {
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

    /// The machine has crashed: of what was not synced, a part from the end is lost, be it nothing or all.
    /// How many writes were lost.
    pub fn crash(&self) -> usize {
        let mut lost = 0;
        for database in self.databases.lock().unwrap().values() {
            let mut state = database.lock().unwrap();
            let mut unsynced = std::mem::take(&mut state.unsynced);
            let kept = self.random.lock().unwrap().random_range(0..=unsynced.len());
            lost += unsynced.len() - kept;
            unsynced.truncate(kept);
            for batch in &unsynced {
                state.durable.apply(batch);
            }
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
            Some(state) => state.clone(),
            None => {
                let mut state = State::default();
                if data.exists() {
                    let bytes = std::fs::read(&data).map_err(io_error(&data))?;
                    let invalid = || io_error(&data)(io::Error::from(io::ErrorKind::InvalidData));
                    state.live = Tables::decode(&bytes).ok_or_else(invalid)?;
                }
                state.sync();
                std::fs::create_dir_all(path).map_err(io_error(path))?;
                write(&current, b"")?;
                let state = Arc::new(Mutex::new(state));
                databases.insert(path.to_owned(), state.clone());
                state
            }
        };
        Ok(Box::new(Memory { state, collection, syncs: Mutex::new(0) }))
    }

    fn disk(&self, _: &Path) -> Option<Disk> {
        Some(Disk { size_bytes: 1 << 40, free_bytes: 1 << 39 })
    }

    fn cache_bytes(&self) -> (u64, u64) {
        (0, 0)
    }
}

struct Memory {
    state: Arc<Mutex<State>>,
    collection: Arc<Collection>,
    syncs: Mutex<u64>,
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
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
        let mut state = self.state();
        state.live.apply(batch);
        if sync {
            state.sync();
            drop(state);
            self.synced();
        } else {
            state.unsynced.push(batch.clone());
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        self.state().sync();
        self.synced();
        Ok(())
    }

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.state().live.0[family as usize].get(key).cloned())
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
        let mut state = self.state();
        for path in files {
            let bytes = std::fs::read(&path).map_err(io_error(&path))?;
            let invalid = || io_error(&path)(io::Error::from(io::ErrorKind::InvalidData));
            let rows = decode_rows(&mut &bytes[..]).ok_or_else(invalid)?;
            Arc::make_mut(&mut state.live.0[Family::Records as usize]).extend(rows);
        }
        state.sync();
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
