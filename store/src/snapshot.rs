//! A copy of what a replica holds, at a pinned instant: streamed as records in
//! key order, filtered for the target, or as the checkpoint's own files where
//! the target wants all of it. The target then follows from the pin.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use vasto_client::env::Panicked;
use vasto_client::v1::peer_client::PeerClient;
use vasto_client::v1::snapshot_response::Message;
use vasto_client::v1::{
    Phase, Position, SnapshotEnd, SnapshotFile, SnapshotRecords, SnapshotRequest, SnapshotResponse, SnapshotStart,
    Topology, View,
};

use crate::engine;
use crate::follow::{self, shipped};
use crate::join::join;
use crate::keyspace::Keyspace;
use crate::meta;
use crate::record::{Record, glance};
use crate::replica::Replica;
use crate::writer::PeerBatch;

/// So few that whoever is served on the same thread as the stream waits but shortly.
const MESSAGE_BYTES: usize = 256 << 10;
/// So many pieces of files are read in one go: where cores are busy, each go waits for one.
const AT_ONCE: usize = 4;
/// The longest rest; each is as long as what was done before it took.
pub const LONGEST_REST: Duration = Duration::from_millis(5);
/// Cuts of one stream that are mended by resuming, before the copy begins anew.
const RESUMES: u32 = 5;

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source's words.
    #[error("the source is not ready: {0}")]
    NotReady(String),
    /// Nobody to copy from.
    #[error("no address of {0} is known")]
    NoAddress(String),
    /// The connection.
    #[error(transparent)]
    Connect(#[from] tonic::transport::Error),
    /// The stream.
    #[error("{0}")]
    Status(#[from] Status),
    /// It ended too soon.
    #[error("the stream ended before the snapshot did")]
    Cut,
    /// The source is not what it was at the first pin.
    #[error("the source has begun a new life since the copy began; the copy begins anew")]
    Restart,
    /// What came can't be read or stored.
    #[error("{0}")]
    Store(String),
}

impl From<engine::Error> for Error {
    fn from(error: engine::Error) -> Self {
        Self::Store(error.to_string())
    }
}

/// Whether the target wants all that the source has, so that its files serve as they are.
fn whole(topology: &Topology, source: u64, target: u64) -> bool {
    let shard = |view: &Option<View>, id| view.as_ref().and_then(|v| v.shard_of(id));
    // Only while nothing foreign can be there: a change is being prepared, none is being cleaned up.
    if topology.phase() != Phase::Prepare {
        return false;
    }
    let has = shard(&topology.current, source);
    let wants = shard(&topology.next, target);
    has.is_some() && has == wants && shard(&topology.current, target).is_none()
}

/// The part of the source's records that jump hash gives to the target.
fn share(topology: &Topology, source: u64, target: u64) -> f64 {
    let shard = |view: &Option<View>, id| view.as_ref().and_then(|v| v.shard_of(id));
    let pairs = [(&topology.next, &topology.current), (&topology.current, &topology.previous)];
    let found = pairs.into_iter().find_map(|(to, from)| shard(to, target).zip(shard(from, source)));
    match found {
        Some(((j, m), (i, n))) if i == j => (f64::from(n) / f64::from(m)).min(1.0),
        Some(((_, m), _)) => 1.0 / f64::from(m),
        None => 1.0,
    }
}

/// Why a source that knows this topology can't serve who asks under that version: by an older one it would leave
/// out keys that are wanted now, and the position that it gives would say that they have come.
pub fn outdated(topology: &Topology, version: u64) -> Option<String> {
    (topology.version < version)
        .then(|| format!("topology version {version} has not come here yet, only {}", topology.version))
}

/// Where a source's messages go.
type Out = mpsc::Sender<Result<SnapshotResponse, Status>>;

fn respond(message: Message) -> Result<SnapshotResponse, Status> {
    Ok(SnapshotResponse { message: Some(message) })
}

/// Bytes of records in it.
fn size(message: &Message) -> u64 {
    match message {
        Message::Records(some) => some.records.iter().map(follow::size).sum::<usize>() as u64,
        _ => 0,
    }
}

/// Leaves half of the time to others, so the busier the machine, the slower this goes.
fn rest_since(begun: Instant) {
    std::thread::sleep(begun.elapsed().min(LONGEST_REST));
}

/// The source's side of `Snapshot`.
pub async fn serve(keyspace: Arc<Keyspace>, replica: Arc<Replica>, request: SnapshotRequest, out: Out) {
    let topology = keyspace.topology();
    let birth = replica.progress.birth();
    if let Some(why) = outdated(&topology, request.version) {
        let _ = out.send(respond(Message::NotReady(why))).await;
        return;
    }
    // Only a target that the topology names holds back what it has yet to confirm.
    if let Some(why) = stranger(&topology, replica.id, request.target) {
        let _ = out.send(respond(Message::NotReady(why))).await;
        return;
    }
    let resume_elsewhere = request.after.is_some() && request.epoch != birth.epoch;
    let files = request.files_welcome && whole(&topology, replica.id, request.target);
    let source = Source { keyspace: keyspace.clone(), replica: replica.clone(), request, epoch: birth.epoch };
    if resume_elsewhere {
        let start = SnapshotStart { epoch: birth.epoch, restart: true, ..SnapshotStart::default() };
        let _ = out.send(respond(Message::Start(start))).await;
        return;
    }
    let sent = if files {
        source.files(&out).await
    } else {
        let records = move |send: &mut dyn FnMut(_) -> bool| {
            let mut begun = Instant::now();
            source.records(&mut |message| {
                let bytes = size(&message);
                let sent = send(respond(message));
                if !source.keyspace.env().is_on_one_thread() {
                    rest_since(begun);
                    std::thread::sleep(source.keyspace.rest(bytes));
                    begun = Instant::now();
                }
                sent
            })
        };
        keyspace.env().produce(out.clone(), records).await.unwrap_or(Ok(()))
    };
    if let Err(error) = sent {
        tracing::warn!(replica = replica.id, %error, "a snapshot was not sent whole");
        replica.progress.failed(&error);
        let _ = out.send(Err(Status::internal(error.to_string()))).await;
    }
}

/// Why by this topology there is nothing to be sent to the target.
fn stranger(topology: &Topology, source: u64, target: u64) -> Option<String> {
    let returned = topology.handing_over(target).iter().any(|g| g.replica == source);
    (!returned && !topology.is_source(source, target))
        .then(|| format!("replica {target:016x} is no target of this one by topology version {}", topology.version))
}

/// Why a replica with a fault can't be copied, in words.
fn faulty(replica: &Replica) -> Option<String> {
    replica.progress.fault().map(|_| format!("it can't be copied: {}", replica.progress.fault_text()))
}

struct Source {
    keyspace: Arc<Keyspace>,
    replica: Arc<Replica>,
    request: SnapshotRequest,
    epoch: u64,
}

/// Gives a message out; false: the target has gone.
type Send<'a> = &'a mut dyn FnMut(Message) -> bool;

impl Source {
    /// Syncs what is about to be sent; why it can't be sent, if so. A copy says of itself where it came from, and
    /// whoever has passed that is taken to hold all of it: so none may be made of what this replica may yet lose.
    /// Nor of one that may have begun, before the snapshot was taken and `topology` read, to delete what it has
    /// handed over.
    fn secure(&self, topology: &Topology) -> Result<Option<String>, engine::Error> {
        self.replica.sync_engine()?;
        Ok(faulty(&self.replica).or_else(|| stranger(topology, self.replica.id, self.request.target)))
    }

    /// Those of this replica's positions that hold for the target as well. `topology` was read after them: by a newer
    /// one they may have passed what the target wants and this replica no longer does.
    fn passed_on(&self, topology: &Topology, positions: impl IntoIterator<Item = Position>) -> Vec<Position> {
        let (source, target) = (self.replica.id, self.request.target);
        positions.into_iter().filter(|p| topology.passes_on(source, p.replica, target)).collect()
    }

    fn records(&self, send: Send<'_>) -> Result<(), engine::Error> {
        let engine = &self.replica.engine;
        // Before the snapshot is taken: following from here misses nothing.
        let pin_seq = self.replica.progress.last_seq();
        let pin = engine.pin();
        // After it: nothing in it is newer.
        let last_seq = self.replica.progress.last_seq();
        let topology = self.keyspace.topology();
        if let Some(why) = self.secure(&topology)? {
            send(Message::NotReady(why));
            return Ok(());
        }
        let clock = self.replica.progress.clock();
        let (records, bytes) = engine.estimate();
        let share = share(&topology, self.replica.id, self.request.target);
        let (records_total, bytes_total) = ((records as f64 * share) as u64, (bytes as f64 * share) as u64);
        let start = SnapshotStart {
            epoch: self.epoch,
            pin: pin_seq,
            positions: self.passed_on(&topology, meta::positions_at(&pin)?),
            files: false,
            records_total,
            bytes_total,
            restart: false,
            horizon: self.replica.progress.horizon(),
            version: topology.version,
        };
        if !send(Message::Start(start)) {
            return Ok(());
        }
        let (mut batch, mut bytes, mut gone) = (Vec::new(), 0, false);
        let (source, target) = (self.replica.id, self.request.target);
        let wanted = topology.wanted(source, target);
        pin.rows(self.request.after.as_deref(), |key, _, encoded| {
            let Ok(seen) = glance(encoded) else { return true };
            let hash = seen.partition_hash;
            if !wanted.has(hash) && !topology.hands_over(source, target, hash) {
                return true;
            }
            for part in shipped(Bytes::copy_from_slice(key), Bytes::copy_from_slice(encoded)) {
                bytes += follow::size(&part);
                batch.push(part);
                if bytes >= MESSAGE_BYTES && !gone {
                    bytes = 0;
                    gone = !send(Message::Records(SnapshotRecords { records: std::mem::take(&mut batch) }));
                }
            }
            !gone
        })?;
        if gone {
            return Ok(());
        }
        if !batch.is_empty() {
            send(Message::Records(SnapshotRecords { records: batch }));
        }
        send(Message::End(SnapshotEnd { clock: clock.max(self.replica.progress.clock()), last_seq }));
        Ok(())
    }

    /// Sends a checkpoint's own files, piece by piece.
    async fn files(self, out: &Out) -> Result<(), engine::Error> {
        let keyspace = self.keyspace.clone();
        let env = keyspace.env();
        let path = self.replica.dir.join(format!("checkpoint-{:016x}", self.request.target));
        let folder = path.clone();
        let made = env.blocking_behind(move || self.checkpoint(&folder)).await;
        let sent = match made {
            Ok(Ok(Ok(checkpoint))) => checkpoint.send(&keyspace, out).await,
            Ok(Ok(Err(why))) => {
                let _ = out.send(respond(Message::NotReady(why))).await;
                Ok(())
            }
            Ok(Err(error)) => Err(error),
            Err(Panicked) => Ok(()),
        };
        let remove = move || crate::dir::remove(&path).map_err(|source| engine::Error::Io { path, source });
        let removed = env.blocking_behind(remove).await;
        sent.and(removed.unwrap_or(Ok(())))
    }

    /// Makes one there: what is sent of it, or why nothing can be. Blocks.
    fn checkpoint(&self, path: &Path) -> Result<Result<Checkpoint, String>, engine::Error> {
        let (pin, positions) = (self.replica.progress.last_seq(), self.replica.progress.positions());
        crate::dir::remove(path).map_err(|source| engine::Error::Io { path: path.to_owned(), source })?;
        self.replica.engine.checkpoint(path)?;
        let topology = self.keyspace.topology();
        if let Some(why) = self.secure(&topology)? {
            return Ok(Err(why));
        }
        let positions = self.passed_on(&topology, positions.into_values());
        let last_seq = self.replica.progress.last_seq();
        let clock = self.replica.progress.clock();
        let files = Files::of(path)?;
        let (records_total, _) = self.replica.engine.estimate();
        let start = SnapshotStart {
            epoch: self.epoch,
            pin,
            positions,
            files: true,
            records_total,
            bytes_total: files.bytes,
            restart: false,
            horizon: self.replica.progress.horizon(),
            version: topology.version,
        };
        Ok(Ok(Checkpoint { start, files, end: SnapshotEnd { clock, last_seq } }))
    }
}

/// What is sent of a checkpoint, in this order.
struct Checkpoint {
    start: SnapshotStart,
    files: Files,
    end: SnapshotEnd,
}

impl Checkpoint {
    /// Sends it, or as much as is taken.
    async fn send(self, keyspace: &Keyspace, out: &Out) -> Result<(), engine::Error> {
        let Self { start, mut files, end } = self;
        if out.send(respond(Message::Start(start))).await.is_err() {
            return Ok(());
        }
        let env = keyspace.env();
        let rests = !env.is_on_one_thread();
        loop {
            let read = move || {
                let begun = Instant::now();
                let parts = files.next();
                if rests {
                    rest_since(begun);
                }
                (files, parts)
            };
            let Ok((left, parts)) = env.piece_behind(read).await else { return Ok(()) };
            files = left;
            let parts = parts?;
            let over = parts.is_empty();
            let bytes = parts.iter().map(|part| part.data.len() as u64).sum();
            let messages = parts.into_iter().map(Message::File).chain(over.then_some(Message::End(end)));
            for message in messages {
                if out.send(respond(message)).await.is_err() {
                    return Ok(());
                }
            }
            if over {
                return Ok(());
            }
            keyspace.rest_after(bytes).await;
        }
    }
}

/// The files of a folder, one after the other.
struct Files {
    path: PathBuf,
    waiting: std::vec::IntoIter<PathBuf>,
    open: Option<(String, File)>,
    /// Of all.
    bytes: u64,
}

impl Files {
    fn of(path: &Path) -> Result<Self, engine::Error> {
        let io = |source| engine::Error::Io { path: path.to_owned(), source };
        let waiting = crate::dir::entries(path).map_err(io)?;
        let sizes = waiting.iter().map(|file| Ok(std::fs::metadata(file)?.len()));
        let bytes = sizes.sum::<std::io::Result<u64>>().map_err(io)?;
        Ok(Self { path: path.to_owned(), waiting: waiting.into_iter(), open: None, bytes })
    }

    /// The next pieces, as many as are read in one go; none behind the last. Blocks.
    fn next(&mut self) -> Result<Vec<SnapshotFile>, engine::Error> {
        let parts = (0..AT_ONCE).map_while(|_| self.read().transpose()).collect::<std::io::Result<_>>();
        parts.map_err(|source| engine::Error::Io { path: self.path.clone(), source })
    }

    fn read(&mut self) -> std::io::Result<Option<SnapshotFile>> {
        let (name, mut file) = match self.open.take() {
            Some(open) => open,
            None => {
                let Some(path) = self.waiting.next() else { return Ok(None) };
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                (name, File::open(path)?)
            }
        };
        let mut data = Vec::with_capacity(MESSAGE_BYTES);
        let last = file.by_ref().take(MESSAGE_BYTES as u64).read_to_end(&mut data)? < MESSAGE_BYTES;
        if !last {
            self.open = Some((name.clone(), file));
        }
        Ok(Some(SnapshotFile { name, data: data.into(), last }))
    }
}

/// A source replica and the store it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The replica.
    pub replica: u64,
    /// Its store.
    pub store: String,
}

/// One source's stream, as the target reads it; resumes after a cut.
pub struct Reader {
    keyspace: Arc<Keyspace>,
    from: Origin,
    target: u64,
    files_welcome: bool,
    stream: Option<Streaming<SnapshotResponse>>,
    /// The last key that has come whole; its successor may still be missing parts.
    after: Option<Bytes>,
    held: Option<(Bytes, Record)>,
    ended: bool,
    resumes: u32,
    /// What the first message said; its pin is where following begins.
    pub start: Option<SnapshotStart>,
    /// The greatest seq in anything that was sent.
    pub last_seq: u64,
    /// The greatest stamp time of all that was sent.
    pub clock: u64,
    /// The newest topology by which a source chose what to send: a target that knows only an older one would take some
    /// of it for foreign.
    pub version: u64,
}

/// What a reader yields.
pub enum Part {
    /// In key order.
    Records(Vec<(Bytes, Record)>),
    /// A piece of a file.
    File(SnapshotFile),
    /// All has come.
    End,
}

impl Reader {
    /// Nothing is asked for yet.
    pub fn new(keyspace: Arc<Keyspace>, from: Origin, target: u64, files_welcome: bool) -> Self {
        Self {
            keyspace,
            from,
            target,
            files_welcome,
            stream: None,
            after: None,
            held: None,
            ended: false,
            resumes: 0,
            start: None,
            last_seq: 0,
            clock: 0,
            version: 0,
        }
    }

    /// Whom it reads.
    pub fn from(&self) -> &Origin {
        &self.from
    }

    async fn open(&self) -> Result<Streaming<SnapshotResponse>, Error> {
        let address =
            self.keyspace.address(&self.from.store).ok_or_else(|| Error::NoAddress(self.from.store.clone()))?;
        let channel = self.keyspace.env().dial_bulk(&address)?;
        let mut client = PeerClient::new(channel)
            .max_decoding_message_size(crate::MESSAGE_LIMIT)
            .max_encoding_message_size(crate::MESSAGE_LIMIT);
        let request = SnapshotRequest {
            keyspace: self.keyspace.uid().to_owned(),
            source: self.from.replica,
            target: self.target,
            version: self.keyspace.version(),
            files_welcome: self.files_welcome && self.after.is_none(),
            after: self.after.clone(),
            epoch: self.start.as_ref().map_or(0, |s| s.epoch),
        };
        Ok(client.snapshot(request).await?.into_inner())
    }

    /// Asks, and waits for the source's first word.
    pub async fn begin(&mut self) -> Result<&SnapshotStart, Error> {
        let mut stream = self.open().await?;
        let first = stream.next().await.ok_or(Error::Cut)??;
        match first.message {
            Some(Message::Start(start)) => {
                self.stream = Some(stream);
                self.version = start.version;
                Ok(self.start.insert(start))
            }
            Some(Message::NotReady(why)) => Err(Error::NotReady(why)),
            _ => Err(Error::Store("the source did not begin with a start".into())),
        }
    }

    /// The next part. After a cut it resumes behind the last key, at the same epoch only.
    pub async fn next(&mut self) -> Result<Part, Error> {
        loop {
            match self.step().await {
                Ok(part) => return Ok(part),
                Err(error @ (Error::Cut | Error::Status(_))) => {
                    let files = self.start.as_ref().is_some_and(|s| s.files);
                    if files || self.resumes >= RESUMES {
                        return Err(error);
                    }
                    self.resumes += 1;
                    tracing::info!(source = self.from.replica, %error, "resuming a snapshot");
                    tokio::time::sleep(self.keyspace.env().jitter(Duration::from_millis(200))).await;
                    match self.resume().await {
                        Err(Error::Restart) => return Err(Error::Restart),
                        Err(error) => tracing::info!(source = self.from.replica, %error, "not yet"),
                        Ok(()) => {}
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn resume(&mut self) -> Result<(), Error> {
        self.stream = None;
        // It comes again, whole.
        self.held = None;
        let mut stream = self.open().await?;
        let first = stream.next().await.ok_or(Error::Cut)??;
        match first.message {
            Some(Message::Start(again))
                if !again.restart && self.start.as_ref().is_some_and(|s| s.epoch == again.epoch) =>
            {
                // Following still begins at the first pin: what changed before the
                // second one at keys already passed comes from there.
                self.stream = Some(stream);
                self.version = self.version.max(again.version);
                Ok(())
            }
            Some(Message::Start(_)) => Err(Error::Restart),
            Some(Message::NotReady(why)) => Err(Error::NotReady(why)),
            _ => Err(Error::Restart),
        }
    }

    async fn step(&mut self) -> Result<Part, Error> {
        if self.ended {
            return Ok(Part::End);
        }
        let stream = self.stream.as_mut().ok_or(Error::Cut)?;
        let message = stream.next().await.ok_or(Error::Cut)??.message;
        match message {
            Some(Message::Records(SnapshotRecords { records })) => {
                let mut whole: Vec<(Bytes, Record)> = Vec::with_capacity(records.len());
                for shipped in records {
                    let record = Record::decode(shipped.record).map_err(|e| Error::Store(e.to_string()))?;
                    match self.held.take() {
                        Some((key, part)) if key == shipped.key => self.held = Some((key, join(part, record))),
                        done => {
                            whole.extend(done);
                            self.held = Some((shipped.key, record));
                        }
                    }
                }
                if let Some((key, _)) = whole.last() {
                    self.after = Some(key.clone());
                }
                Ok(Part::Records(whole))
            }
            Some(Message::File(file)) => Ok(Part::File(file)),
            Some(Message::End(end)) => {
                self.clock = self.clock.max(end.clock);
                self.last_seq = self.last_seq.max(end.last_seq);
                self.ended = true;
                Ok(self.held.take().map_or(Part::End, |last| Part::Records(vec![last])))
            }
            Some(Message::NotReady(why)) => Err(Error::NotReady(why)),
            _ => Err(Error::Cut),
        }
    }

    /// Where the target stands once all has come: at the source, and where the source passes its own positions on.
    pub fn positions(&self) -> Vec<Position> {
        let Some(start) = &self.start else { return Vec::new() };
        let here = Position { replica: self.from.replica, epoch: start.epoch, seq: start.pin };
        start.positions.iter().copied().chain([here]).collect()
    }
}

/// What they take.
pub fn bytes_of(records: &[(Bytes, Record)]) -> u64 {
    records.iter().map(|(key, record)| (key.len() + record.size()) as u64).sum()
}

/// Takes over what a replica that came back after it was given up alone has: its records
/// newer than the collection horizon. (An older one may be what a tombstone that is
/// gone by now had deleted.) Tries until it is done; the caller cancels by dropping.
pub async fn take_over(keyspace: Arc<Keyspace>, replica: Arc<Replica>, source: u64, store: String) {
    loop {
        let from = Origin { replica: source, store: store.clone() };
        match take_over_once(&keyspace, &replica, from).await {
            Ok(taken) => {
                tracing::info!(replica = replica.id, source, store, taken, "took over what a returned replica had");
                return replica.progress.set_taken_over(source);
            }
            Err(error) => tracing::info!(replica = replica.id, source, store, %error, "taking over waits"),
        }
        tokio::time::sleep(keyspace.env().jitter(Duration::from_secs(1))).await;
    }
}

async fn take_over_once(keyspace: &Arc<Keyspace>, replica: &Arc<Replica>, from: Origin) -> Result<usize, Error> {
    let asked = replica.asked(keyspace.version());
    let mut reader = Reader::new(keyspace.clone(), from, replica.id, false);
    reader.begin().await?;
    let mut taken = 0;
    loop {
        match reader.next().await? {
            Part::Records(mut records) => {
                records.retain(|(_, record)| record.greatest_stamp().time > replica.progress.horizon());
                taken += records.len();
                let bytes = bytes_of(&records);
                let asked = Some(asked.by(reader.version));
                let batch = PeerBatch { records, clock: reader.clock, asked, ..PeerBatch::default() };
                replica.apply(batch).await.map_err(|refused| Error::Store(refused.message))?;
                keyspace.rest_after(bytes).await;
            }
            Part::File(_) => return Err(Error::Store("files were sent unasked".into())),
            Part::End => break,
        }
    }
    let synced = replica.clone();
    let _ = keyspace.env().blocking(move || synced.sync()).await;
    match replica.progress.fault() {
        Some(fault) => Err(Error::Store(fault.to_owned())),
        None => Ok(taken),
    }
}

/// Joins one source's snapshot into a replica that holds something already.
pub async fn join_from(
    keyspace: &Arc<Keyspace>,
    replica: &Arc<Replica>,
    source: u64,
    store: &str,
) -> Result<(), Error> {
    let from = Origin { replica: source, store: store.to_owned() };
    let asked = replica.asked(keyspace.version());
    let mut reader = Reader::new(keyspace.clone(), from, replica.id, false);
    let total = reader.begin().await?.records_total;
    replica.progress.update_source(source, |s| s.records_total = total);
    let store_error = |refused: crate::writer::Refused| Error::Store(refused.message);
    loop {
        match reader.next().await? {
            Part::Records(records) => {
                let count = records.len() as u64;
                let bytes = bytes_of(&records);
                let asked = Some(asked.by(reader.version));
                replica.apply(PeerBatch { records, asked, ..PeerBatch::default() }).await.map_err(store_error)?;
                replica.progress.update_source(source, |s| {
                    s.records += count;
                    s.bytes += bytes;
                });
                keyspace.rest_after(bytes).await;
            }
            Part::File(_) => return Err(Error::Store("files were sent unasked".into())),
            Part::End => break,
        }
    }
    let positions = reader
        .positions()
        .into_iter()
        // An own position is as good or better, unless it is of a past epoch.
        .filter(|p| {
            p.replica == source || replica.progress.position(p.replica).is_none_or(|mine| mine.epoch != p.epoch)
        })
        .collect();
    let asked = Some(asked.by(reader.version));
    let batch = PeerBatch { positions, clock: reader.clock, asked, ..PeerBatch::default() };
    replica.apply(batch).await.map_err(store_error)
}
