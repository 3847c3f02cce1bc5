//! How a candidate is made: from nothing, where there is nothing to copy; from
//! one replica of each source shard, merged into sorted files and ingested; or
//! from a whole replica's own files. Until its birth is written it begins anew
//! after any fault.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use vasto_client::env::Env;
use vasto_client::v1::{Position, SnapshotFile, SnapshotRequired};

use crate::engine::{self, Batch, Engine, Storage};
use crate::join::join;
use crate::keyspace::Keyspace;
use crate::meta;
use crate::record::Record;
use crate::replica::SourceProgress;
use crate::snapshot::{self, Origin, Part, Reader};

/// A sorted file is ended when it has this many bytes.
const FILE_BYTES: u64 = 64 << 20;
/// A file that is copied is synced each time so many bytes have come: whoever else syncs meanwhile waits for no more.
const SYNC_BYTES: u64 = 8 << 20;
/// So much of it is written in one call: where the system does not interrupt that, whoever is to have the core waits for
/// its end.
const WRITE_BYTES: usize = 16 << 10;
/// Messages of a stream that may wait for who takes them.
const AHEAD: usize = 4;
/// The seq of every row that a replica is born with, when it is born of records.
const BIRTH_SEQ: u64 = 1;

/// A candidate on its way.
pub struct Building {
    /// Drawn when its folder was made.
    pub id: u64,
    /// Its shard.
    pub shard: u32,
    /// Its folder.
    pub dir: PathBuf,
    progress: Mutex<BTreeMap<u64, SourceProgress>>,
}

impl Building {
    /// For the folder of a candidate.
    pub fn new(id: u64, shard: u32, dir: PathBuf) -> Self {
        Self { id, shard, dir, progress: Mutex::default() }
    }

    /// What is reported of its sources.
    pub fn sources(&self) -> BTreeMap<u64, SourceProgress> {
        self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn update(&self, source: u64, change: impl FnOnce(&mut SourceProgress)) {
        let mut progress = self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(progress.entry(source).or_default());
    }

    /// Builds until the candidate is born. `false`: the topology doesn't name it (any more).
    pub async fn run(&self, keyspace: &Arc<Keyspace>, storage: &Arc<dyn Storage>) -> bool {
        let mut updates = keyspace.updates();
        for attempt in 0u32.. {
            let topology = keyspace.topology();
            let Some(groups) = topology.origins(self.id) else {
                // Not named yet; or never again, then the topology drops it.
                if updates.changed().await.is_err() {
                    return false;
                }
                continue;
            };
            // Another replica of each shard each time one fails.
            let chosen = groups.iter().map(|members| members[attempt as usize % members.len()]);
            let from = chosen.map(|a| Origin { replica: a.replica, store: a.store.clone() }).collect();
            self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
            match self.attempt(keyspace, storage, from).await {
                Ok(()) => return true,
                Err(error) => {
                    tracing::info!(replica = self.id, shard = self.shard, %error, "the copy begins anew");
                    tokio::time::sleep(keyspace.env().jitter(Duration::from_millis(150))).await;
                }
            }
        }
        false
    }

    async fn attempt(
        &self,
        keyspace: &Arc<Keyspace>,
        storage: &Arc<dyn Storage>,
        from: Vec<Origin>,
    ) -> Result<(), snapshot::Error> {
        let (db, ingest) = (self.dir.join("db"), self.dir.join("ingest"));
        for folder in [&db, &ingest] {
            crate::dir::remove(folder).map_err(|e| store(folder, e))?;
        }
        if let [only] = from.as_slice() {
            let mut reader = Reader::new(keyspace.clone(), only.clone(), self.id, true);
            if reader.begin().await?.files {
                return self.copy_files(keyspace, storage, reader).await;
            }
            return self.copy_records(keyspace, storage, vec![reader]).await;
        }
        let mut readers = Vec::new();
        for source in from {
            let mut reader = Reader::new(keyspace.clone(), source, self.id, false);
            reader.begin().await?;
            readers.push(reader);
        }
        self.copy_records(keyspace, storage, readers).await
    }

    async fn copy_records(
        &self,
        keyspace: &Arc<Keyspace>,
        storage: &Arc<dyn Storage>,
        readers: Vec<Reader>,
    ) -> Result<(), snapshot::Error> {
        let ingest = self.dir.join("ingest");
        std::fs::create_dir_all(&ingest).map_err(|e| store(&ingest, e))?;
        for reader in &readers {
            let total = reader.start.as_ref().map_or(0, |s| s.records_total);
            self.update(reader.from().replica, |s| s.records_total = total);
        }
        // Each stream has a task of its own; the merger on a blocking thread
        // takes the least key of all, so that the files never overlap.
        let (mut streams, mut tasks) = (Vec::new(), Vec::new());
        for reader in readers {
            let source = reader.from().replica;
            let (receive, reading) = read_ahead(keyspace.env(), reader, |part| match part {
                Part::Records(records) => Some(records),
                Part::File(_) | Part::End => None,
            });
            let keyspace = keyspace.clone();
            streams.push(Stream { keyspace, source, receive, waiting: Vec::new().into_iter() });
            tasks.push(reading);
        }
        let (count, counted) = mpsc::unbounded_channel();
        if keyspace.env().is_on_one_thread() {
            // Nobody could fill the streams while the merger waits.
            for stream in &mut streams {
                stream.take_all().await;
            }
        }
        let (path, dir, storage) = (self.dir.join("db"), ingest.clone(), storage.clone());
        let opened = keyspace.env().blocking_behind(move || Engine::open(&path, &*storage)).await;
        let engine = opened.map_err(|e| snapshot::Error::Store(e.to_string()))??;
        let merging = keyspace.env().blocking_behind(move || {
            let files = merge_into_files(&engine, &dir, streams, &count)?;
            Ok::<_, engine::Error>((engine, files))
        });
        let counting = self.count(counted);
        let (merged, ()) = tokio::join!(merging, counting);
        let mut done = Vec::new();
        for task in tasks {
            done.push(task.await.map_err(|e| snapshot::Error::Store(e.to_string()))??);
        }
        let (engine, files) = merged.map_err(|e| snapshot::Error::Store(e.to_string()))??;

        let positions = done.iter().flat_map(Reader::positions).map(|p| (p.replica, p)).collect();
        let births = done
            .iter()
            .filter_map(|r| {
                let start = r.start.as_ref()?;
                Some(Position { replica: r.from().replica, epoch: start.epoch, seq: r.last_seq })
            })
            .collect();
        let clock = done.iter().map(|r| r.clock).max().unwrap_or(0);
        let horizon = done.iter().filter_map(|r| r.start.as_ref()).map(|s| s.horizon).max().unwrap_or(0);
        let birth = Birth { births, positions, clock, seq: BIRTH_SEQ, epoch: keyspace.env().random_id(), horizon };
        let id = self.id;
        let born = keyspace.env().blocking_behind(move || {
            engine.ingest(files)?;
            birth.write(&engine, id)
        });
        born.await.map_err(|e| snapshot::Error::Store(e.to_string()))??;
        std::fs::remove_dir_all(&ingest).map_err(|e| store(&ingest, e))
    }

    async fn count(&self, mut counted: mpsc::UnboundedReceiver<(u64, u64, u64)>) {
        while let Some((source, records, bytes)) = counted.recv().await {
            self.update(source, |s| {
                s.records += records;
                s.bytes += bytes;
            });
        }
    }

    async fn copy_files(
        &self,
        keyspace: &Arc<Keyspace>,
        storage: &Arc<dyn Storage>,
        reader: Reader,
    ) -> Result<(), snapshot::Error> {
        let db = self.dir.join("db");
        std::fs::create_dir_all(&db).map_err(|e| store(&db, e))?;
        let source = reader.from().replica;
        let total = reader.start.as_ref().map_or((0, 0), |s| (s.records_total, s.bytes_total));
        self.update(source, |s| s.records_total = total.0);
        let (mut parts, reading) = read_ahead(keyspace.env(), reader, |part| match part {
            Part::File(part) => Some(part),
            Part::Records(_) | Part::End => None,
        });
        let mut come = Vec::new();
        while parts.recv_many(&mut come, AHEAD).await > 0 {
            let bytes: u64 = come.iter().map(|part| part.data.len() as u64).sum();
            let (folder, come) = (db.clone(), std::mem::take(&mut come));
            let append = move || come.iter().try_for_each(|part| append(&folder, part));
            let written = keyspace.env().piece_behind(append).await;
            written.map_err(|e| snapshot::Error::Store(e.to_string()))?.map_err(|e| store(&db, e))?;
            keyspace.rest_after(bytes).await;
            self.update(source, |s| {
                s.bytes += bytes;
                s.records = (total.0 as f64 * s.bytes as f64 / total.1.max(1) as f64) as u64;
            });
        }
        let reader = reading.await.map_err(|e| snapshot::Error::Store(e.to_string()))??;
        let start = reader.start.clone().unwrap_or_default();
        let (id, epoch, storage, clock) = (self.id, keyspace.env().random_id(), storage.clone(), reader.clock);
        let born = keyspace.env().blocking_behind(move || {
            let engine = Engine::open(&db, &*storage)?;
            let theirs = meta::read(&engine)?;
            // All that the files hold, the source had at this seq.
            let last = engine.last_change()?.unwrap_or(0).max(start.pin);
            let mut batch = Batch::default();
            batch.forget_life();
            theirs.positions.iter().for_each(|p| batch.delete_position(p.replica));
            batch.trim_changes(last);
            engine.write(&batch, false)?;
            let here = Position { replica: source, epoch: start.epoch, seq: last };
            let positions = start.positions.into_iter().chain([here]).map(|p| (p.replica, p)).collect();
            let birth = Birth {
                births: vec![here],
                positions,
                clock: clock.max(theirs.clock),
                seq: last.max(1),
                epoch,
                horizon: theirs.horizon.max(start.horizon),
            };
            birth.write(&engine, id)
        });
        born.await.map_err(|e| snapshot::Error::Store(e.to_string()))??;
        Ok(())
    }
}

/// Reads a stream to its end in the background, a little ahead of who takes what it brings.
fn read_ahead<T: Send + 'static>(
    env: &Env,
    mut reader: Reader,
    wanted: impl Fn(Part) -> Option<T> + Send + 'static,
) -> (mpsc::Receiver<T>, AbortOnDropHandle<Result<Reader, snapshot::Error>>) {
    let (send, receive) = mpsc::channel(AHEAD);
    let reading = env.background().spawn(async move {
        loop {
            let part = match reader.next().await? {
                Part::End => return Ok(reader),
                part => wanted(part).ok_or_else(|| snapshot::Error::Store("what was sent was not asked for".into()))?,
            };
            send.send(part).await.map_err(|_| snapshot::Error::Cut)?;
        }
    });
    (receive, AbortOnDropHandle::new(reading))
}

fn store(path: &Path, source: std::io::Error) -> snapshot::Error {
    snapshot::Error::Store(format!("{}: {source}", path.display()))
}

fn append(folder: &Path, part: &SnapshotFile) -> std::io::Result<()> {
    // A name from the wire must stay within the folder.
    let name = Path::new(&part.name);
    if name.components().count() != 1 || name.file_name().is_none() {
        return Err(std::io::Error::other(format!("{:?} is no file name", part.name)));
    }
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(folder.join(name))?;
    for some in part.data.chunks(WRITE_BYTES) {
        std::io::Write::write_all(&mut file, some)?;
    }
    let length = file.metadata()?.len();
    if part.last {
        file.sync_all()?;
    } else if length / SYNC_BYTES != (length - part.data.len() as u64) / SYNC_BYTES {
        file.sync_data()?;
    }
    Ok(())
}

/// What a replica begins with.
pub(crate) struct Birth {
    pub births: Vec<Position>,
    pub positions: BTreeMap<u64, Position>,
    /// Not behind any stamp in what was copied.
    pub clock: u64,
    pub seq: u64,
    pub epoch: u64,
    pub horizon: u64,
}

impl Birth {
    pub(crate) fn write(self, engine: &Engine, id: u64) -> Result<(), engine::Error> {
        let mut batch = Batch::default();
        batch.put_id(id);
        batch.put_ceilings(self.clock, self.seq);
        batch.put_horizon(self.horizon);
        for position in self.positions.values() {
            batch.put_position(position);
        }
        batch.put_birth(&SnapshotRequired {
            reason: String::new(),
            epoch: self.epoch,
            birth_seq: self.seq,
            births: self.births,
        });
        engine.write(&batch, true)
    }
}

struct Stream {
    keyspace: Arc<Keyspace>,
    source: u64,
    receive: mpsc::Receiver<Vec<(Bytes, Record)>>,
    waiting: std::vec::IntoIter<(Bytes, Record)>,
}

impl Stream {
    /// Waits until all has come.
    async fn take_all(&mut self) {
        let mut all = Vec::new();
        while let Some(records) = self.receive.recv().await {
            all.extend(records);
        }
        self.waiting = all.into_iter();
    }

    /// The next record; `None` once the stream has ended. Blocks.
    fn next(&mut self, count: &mpsc::UnboundedSender<(u64, u64, u64)>) -> Option<(Bytes, Record)> {
        loop {
            if let Some(next) = self.waiting.next() {
                return Some(next);
            }
            let records = match self.receive.try_recv() {
                Ok(records) => records,
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => self.receive.blocking_recv()?,
            };
            let bytes = snapshot::bytes_of(&records);
            let _ = count.send((self.source, records.len() as u64, bytes));
            std::thread::sleep(self.keyspace.rest(bytes));
            self.waiting = records.into_iter();
        }
    }
}

/// Merges streams that are each in key order into files that don't overlap; a key that
/// comes from several is joined. Blocks.
fn merge_into_files(
    engine: &Engine,
    dir: &Path,
    mut streams: Vec<Stream>,
    count: &mpsc::UnboundedSender<(u64, u64, u64)>,
) -> Result<Vec<PathBuf>, engine::Error> {
    let mut heads: BTreeMap<Bytes, Vec<(usize, Record)>> = BTreeMap::new();
    for (i, stream) in streams.iter_mut().enumerate() {
        if let Some((key, record)) = stream.next(count) {
            heads.entry(key).or_default().push((i, record));
        }
    }
    let mut files = Vec::new();
    let mut file: Option<engine::SortedFile<'_>> = None;
    while let Some((key, met)) = heads.pop_first() {
        let mut joined: Option<Record> = None;
        for (i, record) in met {
            joined = Some(match joined {
                Some(other) => join(other, record),
                None => record,
            });
            if let Some((key, record)) = streams[i].next(count) {
                heads.entry(key).or_default().push((i, record));
            }
        }
        let Some(record) = joined else { continue };
        let out = match file.as_mut() {
            Some(out) => out,
            None => file.insert(engine.sorted_file(dir.join(format!("{:06}.sst", files.len())))?),
        };
        out.put(&key, BIRTH_SEQ, &record.encoded())?;
        if out.size() >= FILE_BYTES
            && let Some(full) = file.take()
        {
            files.push(full.finish()?);
        }
    }
    if let Some(last) = file {
        files.push(last.finish()?);
    }
    Ok(files)
}
