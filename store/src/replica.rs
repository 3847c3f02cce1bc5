//! A replica: its folder, its engine, its writer's queue, and what others may
//! see of how far it has come. Opening one decides its life: origin, clock and seq.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use vasto_client::env::Env;
use vasto_client::v1::{FailureCode, Position, SnapshotRequired, Topology};

use crate::clock::Clock;
use crate::engine::{self, Batch, Engine, Storage};
use crate::merge::Limits;
use crate::meta::{self, Fence};
use crate::metrics::Counts;
use crate::throttle::Throttle;
use crate::writer::{Asked, Command, LocalWrite, PeerBatch, Queued, Refused, Stalls, Start, Taken, Turn, Writer};

/// Commands that may wait for a writer.
const QUEUE: usize = 1024;
/// KiB of clients' writes that may wait for a writer.
const ROOM_KIB: usize = 64 << 10;
/// Clients' writes of up to so many bytes together are done on their own thread, where that waits for nobody.
const AT_ONCE_BYTES: usize = 4 << 10;

/// What went wrong with a replica's folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The folder.
    #[error("{path}: {source}")]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A candidate that is still being built.
    #[error("{0} holds a replica that was not built to its end")]
    NotBorn(PathBuf),
    /// A replica whose database is gone.
    #[error("{0} is gone or empty, though the replica was whole: put it back, or replace this store")]
    Emptied(PathBuf),
    /// The folder holds something else.
    #[error(
        "{path} says it holds replica {named:016x}, but its files are of {found:016x}: they were mixed up; put the right ones back or delete the folder"
    )]
    Mixed {
        /// The folder.
        path: PathBuf,
        /// By its name file.
        named: u64,
        /// By its database.
        found: u64,
    },
}

impl Error {
    /// Whether the replica's files are damaged or gone, so that only another copy helps. What a
    /// person has mixed up, or what may pass, is not.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Engine(error) => error.is_damage(),
            Self::Emptied(_) => true,
            Self::Io { .. } | Self::NotBorn(_) | Self::Mixed { .. } => false,
        }
    }
}

/// The file beside the database that says what it is.
#[derive(Debug, Serialize, Deserialize)]
struct NameFile {
    id: String,
    shard: u32,
    /// It was built to its end: without its database it is broken, not new.
    #[serde(default)]
    born: bool,
}

/// How a keyspace's spec binds its replicas.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Sync the log before a write is answered.
    pub synced: bool,
    /// Bounds for callers.
    pub limits: Limits,
    /// How long after the last confirmation a tombstone is kept, ms.
    pub grace_ms: u64,
}

/// How far a replica has applied one peer, as the follower's task knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceProgress {
    /// The source's last seq less the applied one, as last heard.
    pub lag: u64,
    /// The epoch that the lag belongs to.
    pub epoch: u64,
    /// Snapshot progress.
    pub records: u64,
    /// Snapshot progress.
    pub bytes: u64,
    /// Estimated; 0: unknown.
    pub records_total: u64,
}

struct State {
    birth: SnapshotRequired,
    applied: BTreeMap<u64, Position>,
    synced: BTreeMap<u64, Position>,
    /// By the followers of this replica, in its own seqs.
    confirmed_by: BTreeMap<u64, u64>,
    /// How many open `Follow` streams each follower has here.
    following: BTreeMap<u64, usize>,
    sources: BTreeMap<u64, SourceProgress>,
    fence: Fence,
    cleaned: u64,
    todo: u64,
    taken_over: BTreeSet<u64>,
}

/// What others may see of a replica, and what they tell it.
pub struct Progress {
    state: Mutex<State>,
    last_seq: watch::Sender<u64>,
    synced: watch::Sender<u64>,
    /// Rings when a follower has confirmed more, or has gone.
    heard: watch::Sender<()>,
    synced_seq: AtomicU64,
    /// How often the writer has written ceilings ahead of need.
    ceilings_written: AtomicU64,
    /// How many of those are synced.
    ceilings_synced: AtomicU64,
    clock: AtomicU64,
    passed: AtomicU64,
    horizon: AtomicU64,
    trimmed: AtomicU64,
    cleanups: AtomicU64,
    served: AtomicBool,
    /// The disk is full.
    pub full: AtomicBool,
    synced_writes: AtomicBool,
    /// So many sync the log at this moment: who writes meanwhile may have to wait.
    syncing: AtomicUsize,
    fault: OnceLock<String>,
    /// Cancelled once there is a fault.
    faulted: CancellationToken,
    /// When it was last compared with all others of its shard, unix ms.
    compared_ms: AtomicU64,
    /// Rung when something that is reported has changed.
    changed: Arc<tokio::sync::Notify>,
}

impl Progress {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Its epoch, and where all that it held at first came from.
    pub fn birth(&self) -> SnapshotRequired {
        self.state().birth.clone()
    }
    /// The last fence that passed.
    pub fn fence(&self) -> Fence {
        self.state().fence
    }
    /// A fence has passed, synced.
    pub fn set_fence(&self, fence: Fence) {
        self.state().fence = fence;
        self.changed.notify_one();
    }
    /// The last change that was cleaned up.
    pub fn cleaned(&self) -> u64 {
        self.state().cleaned
    }
    /// Foreign keys of this change are gone, synced.
    pub fn set_cleaned(&self, version: u64) {
        self.state().cleaned = version;
        self.changed.notify_one();
    }
    /// Rows still to be looked at in the work under way.
    pub fn set_todo(&self, records: u64) {
        self.state().todo = records;
    }
    /// As last set.
    pub fn todo(&self) -> u64 {
        self.state().todo
    }
    /// A position has been applied (not yet synced).
    pub fn apply_position(&self, position: Position) {
        self.state().applied.insert(position.replica, position);
    }
    /// The applied position in this source.
    pub fn position(&self, source: u64) -> Option<Position> {
        self.state().applied.get(&source).copied()
    }
    /// The position in this source is void.
    pub fn forget_position(&self, source: u64) {
        let mut state = self.state();
        state.applied.remove(&source);
        state.synced.remove(&source);
        state.sources.remove(&source);
    }
    /// How often positions have been forgotten since the start, by a clean-up or since no view named the replica.
    pub fn cleanups(&self) -> u64 {
        self.cleanups.load(Ordering::Acquire)
    }
    /// Counts one, after it has forgotten its positions.
    pub fn count_cleanup(&self) {
        self.cleanups.fetch_add(1, Ordering::AcqRel);
    }
    /// All applied positions.
    pub fn positions(&self) -> BTreeMap<u64, Position> {
        self.state().applied.clone()
    }
    /// The synced position in this source.
    pub fn synced_position(&self, source: u64) -> Option<Position> {
        self.state().synced.get(&source).copied()
    }
    /// All that is applied now is synced.
    pub fn positions_synced(&self) {
        let applied = self.positions();
        self.mark_synced(applied);
    }
    fn mark_synced(&self, mut positions: BTreeMap<u64, Position>) {
        let mut state = self.state();
        // What was forgotten while the log was synced stays so.
        let stands = |at: &Position, now: &Position| now.epoch == at.epoch && now.seq >= at.seq;
        positions.retain(|id, at| state.applied.get(id).is_some_and(|now| stands(at, now)));
        if state.synced != positions {
            state.synced = positions;
            drop(state);
            self.synced.send_modify(|n| *n += 1);
            self.changed.notify_one();
        }
    }
    /// Rings when a synced position has moved.
    pub fn synced(&self) -> watch::Receiver<u64> {
        self.synced.subscribe()
    }
    /// The last seq written.
    pub fn last_seq(&self) -> u64 {
        *self.last_seq.borrow()
    }
    /// Rings at each write.
    pub fn writes(&self) -> watch::Receiver<u64> {
        self.last_seq.subscribe()
    }
    /// By the writer, after a batch.
    pub fn set_last_seq(&self, seq: u64) {
        self.last_seq.send_if_modified(|last| std::mem::replace(last, seq) != seq);
    }
    /// The greatest stamp time seen.
    pub fn clock(&self) -> u64 {
        self.clock.load(Ordering::Acquire)
    }
    /// What is taken from callers from here on gets stamps past this time.
    pub fn pass(&self, time: u64) {
        self.passed.fetch_max(time, Ordering::AcqRel);
    }
    /// The greatest that was told so.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Acquire)
    }
    /// By the writer, after a batch.
    pub fn set_clock(&self, time: u64) {
        self.clock.store(time, Ordering::Release);
    }
    /// Stamp time up to which tombstones may have been collected.
    pub fn horizon(&self) -> u64 {
        self.horizon.load(Ordering::Acquire)
    }
    /// By the writer, once it is synced.
    pub fn set_horizon(&self, time: u64) {
        self.horizon.fetch_max(time, Ordering::AcqRel);
    }
    /// A given-up replica's records are taken over here.
    pub fn set_taken_over(&self, replica: u64) {
        self.state().taken_over.insert(replica);
        self.changed.notify_one();
    }
    /// The given-up replicas whose records are taken over.
    pub fn taken_over(&self) -> Vec<u64> {
        self.state().taken_over.iter().copied().collect()
    }
    /// Lines up to this are gone.
    pub fn trimmed(&self) -> u64 {
        self.trimmed.load(Ordering::Acquire)
    }
    /// By the writer.
    pub fn set_trimmed(&self, seq: u64) {
        self.trimmed.fetch_max(seq, Ordering::AcqRel);
    }
    /// Whether it ever stood in a `current` view.
    pub fn served(&self) -> bool {
        self.served.load(Ordering::Acquire)
    }
    /// By the writer.
    pub fn set_served(&self, served: bool) {
        self.served.fetch_or(served, Ordering::AcqRel);
    }
    /// How often the writer has written ceilings ahead of need.
    pub fn ceilings_written(&self) -> u64 {
        self.ceilings_written.load(Ordering::Acquire)
    }
    /// By the writer, after it did.
    pub fn set_ceilings_written(&self, number: u64) {
        self.ceilings_written.store(number, Ordering::Release);
    }
    /// How many of those are synced.
    pub fn ceilings_synced(&self) -> u64 {
        self.ceilings_synced.load(Ordering::Acquire)
    }
    fn set_ceilings_synced(&self, number: u64) {
        self.ceilings_synced.fetch_max(number, Ordering::AcqRel);
    }
    /// Whether a write is synced before it is answered.
    pub fn synced_writes(&self) -> bool {
        self.synced_writes.load(Ordering::Relaxed)
    }
    /// What a follower says that it has applied and synced, in this replica's seqs.
    pub fn confirm(&self, follower: u64, seq: u64) {
        let mut state = self.state();
        let confirmed = state.confirmed_by.entry(follower).or_default();
        *confirmed = (*confirmed).max(seq);
        drop(state);
        self.heard.send_replace(());
    }
    /// What this follower has confirmed in this life of the process.
    pub fn confirmed_by(&self, follower: u64) -> Option<u64> {
        self.state().confirmed_by.get(&follower).copied()
    }
    /// This follower has an open `Follow` stream, until the guard goes.
    pub fn connected(self: &Arc<Self>, follower: u64) -> Connected {
        *self.state().following.entry(follower).or_default() += 1;
        Connected { progress: self.clone(), follower }
    }
    /// The followers with an open stream that have not confirmed all up to `seq`.
    pub fn behind(&self, seq: u64) -> Vec<u64> {
        let state = self.state();
        let confirmed = |follower: &u64| state.confirmed_by.get(follower).copied().unwrap_or(0);
        state.following.keys().filter(|f| confirmed(f) < seq).copied().collect()
    }
    /// Waits until every follower has confirmed all up to `seq`, or has gone.
    pub async fn handed_on(&self, seq: u64) {
        let mut heard = self.heard.subscribe();
        while !self.behind(seq).is_empty() {
            if heard.changed().await.is_err() {
                return;
            }
        }
    }
    /// Whether there is a source of which nothing is synced yet.
    pub fn is_unconfirmed(&self) -> bool {
        let state = self.state();
        state.applied.iter().any(|(source, at)| state.synced.get(source).is_none_or(|synced| synced.epoch != at.epoch))
    }
    /// Has what is there reported soon.
    pub fn tell(&self) {
        self.changed.notify_one();
    }
    /// Changes what is reported of a source.
    pub fn update_source(&self, source: u64, change: impl FnOnce(&mut SourceProgress)) {
        change(self.state().sources.entry(source).or_default());
    }
    /// What is reported of the sources.
    pub fn sources(&self) -> BTreeMap<u64, SourceProgress> {
        self.state().sources.clone()
    }
    /// The replica takes no more writes; a rebuild or a person must mend it.
    pub fn poison(&self, fault: String) {
        let _ = self.fault.set(fault);
        self.faulted.cancel();
        self.changed.notify_one();
    }
    /// The files could not be read: if they are damaged, the replica takes no more writes.
    pub fn failed(&self, error: &engine::Error) {
        if error.is_damage() && self.fault().is_none() {
            tracing::error!(%error, "a replica's files are damaged; it takes no more writes");
            self.poison(error.to_string());
        }
    }
    /// Waits until it takes no more writes.
    pub async fn faulted(&self) {
        self.faulted.cancelled().await;
    }
    /// When it was last compared with all others of its shard, unix ms; 0: not since it was opened.
    pub fn compared_ms(&self) -> u64 {
        self.compared_ms.load(Ordering::Acquire)
    }
    /// It has been compared with all others of its shard.
    pub fn set_compared_ms(&self, ms: u64) {
        self.compared_ms.store(ms, Ordering::Release);
    }
    /// Why it takes no more writes.
    pub fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }
    /// As `fault`, as a sentence.
    pub fn fault_text(&self) -> String {
        format!("this replica takes no more writes since one failed: {}", self.fault().unwrap_or("unknown"))
    }
}

/// A follower's open `Follow` stream.
pub struct Connected {
    progress: Arc<Progress>,
    follower: u64,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.progress.state();
        if let Some(streams) = state.following.get_mut(&self.follower) {
            *streams -= 1;
            if *streams == 0 {
                state.following.remove(&self.follower);
            }
        }
        drop(state);
        self.progress.heard.send_replace(());
    }
}

/// An open replica. Cheap to share; dropping the last handle does not stop it: `stop` does.
pub struct Replica {
    /// Drawn when it was made.
    pub id: u64,
    /// The shard's index; the same in every view that names this replica.
    pub shard: u32,
    /// Its folder.
    pub dir: PathBuf,
    /// Its files.
    pub engine: Arc<Engine>,
    /// What others may see.
    pub progress: Arc<Progress>,
    /// Who takes writes here in this life.
    pub origin: u64,
    /// Held while a snapshot is joined in: one at a time.
    pub snapshot_turn: tokio::sync::Mutex<()>,
    /// Held while it is compared with its peers: one round at a time.
    pub repair_turn: tokio::sync::Mutex<()>,
    settings: Mutex<Settings>,
    turn: Arc<Turn>,
    commands: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
}

/// What opening a replica takes besides its folder.
#[derive(Clone)]
pub struct Context {
    /// Databases and the disk.
    pub storage: Arc<dyn Storage>,
    /// Time and randomness.
    pub env: Env,
    /// What is counted as it happens.
    pub counts: Arc<Counts>,
    /// Rung when something that is reported has changed.
    pub changed: Arc<tokio::sync::Notify>,
    /// Of the disk.
    pub stalls: Arc<Stalls>,
    /// Of what is moved.
    pub throttle: Arc<Throttle>,
}

impl Replica {
    /// Makes the folder of a new replica with this id.
    pub fn create(dir: &Path, id: u64, shard: u32) -> Result<(), Error> {
        Self::write_name(dir, id, shard, false)
    }

    fn write_name(dir: &Path, id: u64, shard: u32, born: bool) -> Result<(), Error> {
        let io = |source| Error::Io { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(io)?;
        let name = NameFile { id: format!("{id:016x}"), shard, born };
        let text = serde_json::to_vec(&name).map_err(|e| io(e.into()))?;
        crate::dir::write_durably(&dir.join("replica.json"), &text).map_err(io)
    }

    /// The id and shard that a folder says it holds, and whether it was built to its end.
    pub fn name(dir: &Path) -> Result<(u64, u32, bool), Error> {
        let path = dir.join("replica.json");
        let io = |source| Error::Io { path: path.clone(), source };
        let text = std::fs::read(&path).map_err(io)?;
        let name: NameFile = serde_json::from_slice(&text).map_err(|e| io(e.into()))?;
        let id = u64::from_str_radix(&name.id, 16)
            .map_err(|e| io(std::io::Error::new(std::io::ErrorKind::InvalidData, e)))?;
        Ok((id, name.shard, name.born))
    }

    /// Opens the born replica in `dir` and starts its writer.
    pub fn open(
        dir: &Path,
        topology: Arc<Topology>,
        settings: Settings,
        context: &Context,
    ) -> Result<Arc<Self>, Error> {
        let (id, shard, born) = Self::name(dir)?;
        let io = |source| Error::Io { path: dir.to_owned(), source };
        let db = dir.join("db");
        if !db.join("CURRENT").exists() {
            return Err(if born { Error::Emptied(db) } else { Error::NotBorn(dir.to_owned()) });
        }
        let engine = Engine::open(&db, &*context.storage)?;
        let found = meta::read(&engine)?;
        let Some(birth) = found.birth else {
            return Err(if born { Error::Emptied(db) } else { Error::NotBorn(dir.to_owned()) });
        };
        if found.id != id {
            // Files copied from another replica are that one's until the birth is written.
            let mixed = Error::Mixed { path: dir.to_owned(), named: id, found: found.id };
            return Err(if born { mixed } else { Error::NotBorn(dir.to_owned()) });
        }
        if !born {
            Self::write_name(dir, id, shard, true)?;
        }
        // A life whose unsynced writes may be lost is over: what its peers hold
        // of them must not be taken for this life's.
        let origin = if found.clean && found.origin != 0 { found.origin } else { context.env.random_id() };
        let seq = found.seq.max(engine.last_change()?.unwrap_or(0)).max(1);
        let clock = Clock::after_restart(found.clock, origin);
        let mut batch = Batch::default();
        batch.put_origin(origin);
        batch.put_ceilings(found.clock, seq);
        batch.put_clean(false);
        engine.write(&batch, true)?;

        let engine = Arc::new(engine);
        let applied: BTreeMap<u64, Position> = found.positions.iter().map(|p| (p.replica, *p)).collect();
        let progress = Arc::new(Progress {
            state: Mutex::new(State {
                birth,
                synced: applied.clone(),
                applied,
                fence: found.fence,
                cleaned: found.cleaned,
                confirmed_by: BTreeMap::new(),
                following: BTreeMap::new(),
                sources: BTreeMap::new(),
                todo: 0,
                taken_over: BTreeSet::new(),
            }),
            last_seq: watch::Sender::new(seq),
            synced: watch::Sender::new(0),
            heard: watch::Sender::new(()),
            synced_seq: AtomicU64::new(seq),
            ceilings_written: AtomicU64::new(0),
            ceilings_synced: AtomicU64::new(0),
            clock: AtomicU64::new(found.clock),
            passed: AtomicU64::new(0),
            horizon: AtomicU64::new(found.horizon),
            trimmed: AtomicU64::new(found.trimmed),
            cleanups: AtomicU64::new(0),
            served: AtomicBool::new(found.served),
            full: AtomicBool::new(false),
            synced_writes: AtomicBool::new(settings.synced),
            syncing: AtomicUsize::new(0),
            fault: OnceLock::new(),
            faulted: CancellationToken::new(),
            compared_ms: AtomicU64::new(0),
            changed: context.changed.clone(),
        });
        let writer = Writer::new(Start {
            replica: id,
            engine: engine.clone(),
            env: context.env.clone(),
            progress: progress.clone(),
            clock,
            seq,
            topology,
            limits: settings.limits,
            positions: found.positions,
            served: found.served,
            disk_free: Box::new(crate::dir::disk_watch(dir.to_owned(), context.storage.clone(), context.env.clone())),
        });
        let (commands, queue) = mpsc::channel(QUEUE);
        let turn = Arc::new(Turn::new(writer, context.stalls.clone()));
        let theirs = turn.clone();
        if context.env.is_on_one_thread() {
            tokio::spawn(async move { theirs.run_inline(queue).await });
        } else {
            let thread = std::thread::Builder::new().name(format!("writer-{shard}"));
            thread.spawn(move || theirs.run(queue)).map_err(io)?;
        }
        Ok(Arc::new(Self {
            id,
            shard,
            dir: dir.to_owned(),
            engine,
            progress,
            origin,
            snapshot_turn: tokio::sync::Mutex::new(()),
            repair_turn: tokio::sync::Mutex::new(()),
            settings: Mutex::new(settings),
            turn,
            commands,
            room: Arc::new(Semaphore::new(ROOM_KIB)),
        }))
    }

    /// As the keyspace's spec has it now.
    pub fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Takes in a changed spec. Limits bind from the next start.
    pub fn set_settings(&self, settings: Settings) {
        self.progress.synced_writes.store(settings.synced, Ordering::Relaxed);
        *self.settings.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = settings;
    }

    /// Does clients' writes: a few small ones here, if nobody is before them and nothing has to be waited for; the rest by
    /// the writer's queue, and refused at once when that is full.
    pub async fn write(&self, writes: Vec<LocalWrite>) -> Vec<Result<Taken, Refused>> {
        let count = writes.len();
        let bytes: usize = writes.iter().map(|w| w.key.len() + w.op.size()).sum();
        let refused = |code, text: &str| vec![Err(Refused::new(code, text)); count];
        let kib = (bytes.div_ceil(1024)).min(ROOM_KIB) as u32;
        let Ok(room) = self.room.clone().try_acquire_many_owned(kib) else {
            return refused(
                FailureCode::ResourceExhausted,
                "the shard's writer has 64 MiB waiting: slow down and try again",
            );
        };
        let (reply, answer) = oneshot::channel();
        let at_once = bytes <= AT_ONCE_BYTES
            && !self.progress.synced_writes()
            && self.progress.syncing.load(Ordering::Relaxed) == 0
            && writes.iter().all(LocalWrite::is_blind);
        let command = Command::Local(writes, reply, room);
        let left = if at_once { self.turn.try_take(command) } else { Some(command) };
        if let Some(command) = left {
            match self.commands.try_send(self.turn.queued(command)) {
                Ok(()) => {}
                // Its writer is at work anyway.
                Err(mpsc::error::TrySendError::Full(Queued { command: Command::Held, .. })) => {}
                Err(mpsc::error::TrySendError::Full(_)) => {
                    return refused(
                        FailureCode::ResourceExhausted,
                        "the shard's writer has 1,024 batches waiting: slow down and try again",
                    );
                }
                Err(mpsc::error::TrySendError::Closed(_)) => {
                    return refused(FailureCode::NotReady, "the replica is stopping");
                }
            }
        }
        answer.await.unwrap_or_else(|_| refused(FailureCode::Internal, "the writer stopped before it answered"))
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(self.turn.queued(command(reply))).await.ok()?;
        answer.await.ok()
    }

    fn stopping() -> Refused {
        Refused::new(FailureCode::NotReady, "the replica is stopping")
    }

    /// For what is asked of a peer from here on, under this topology.
    pub fn asked(&self, version: u64) -> Asked {
        Asked { version, cleanups: self.progress.cleanups() }
    }

    /// Applies a peer's records and positions; waits for room.
    pub async fn apply(&self, batch: PeerBatch) -> Result<(), Refused> {
        self.ask(|reply| Command::Peer(batch, reply)).await.unwrap_or_else(|| Err(Self::stopping()))
    }

    /// From the writer's next batch on, this topology decides. Returns once it does (fenced, if it asks for that).
    pub async fn install(&self, topology: Arc<Topology>) {
        self.ask(|reply| Command::Topology(topology, reply)).await;
    }

    /// Deletes foreign keys.
    pub async fn clean(&self, keys: Vec<bytes::Bytes>) -> Result<(), Refused> {
        self.ask(|reply| Command::Clean(keys, reply)).await.unwrap_or_else(|| Err(Self::stopping()))
    }

    /// Notes that the foreign keys of this change are gone.
    pub async fn cleaned(&self, version: u64) {
        let _ = self.commands.send(self.turn.queued(Command::Cleaned(version))).await;
    }

    /// Lets tombstones up to this stamp time be collected, from when this returns on.
    pub async fn set_horizon(&self, time: u64) -> Result<(), Refused> {
        self.ask(|reply| Command::Horizon(time, reply)).await.unwrap_or_else(|| Err(Self::stopping()))
    }

    /// Drops lines of `changes` that nobody needs.
    pub async fn trim(&self, seq: u64) {
        let _ = self.commands.send(self.turn.queued(Command::Trim(seq))).await;
    }

    /// Syncs what was written since the last time. Blocks.
    pub fn sync(&self) {
        let (seq, positions) = (self.progress.last_seq(), self.progress.positions());
        let synced_already = self.progress.synced_seq.load(Ordering::Acquire) == seq;
        if (synced_already && self.progress.state().synced == positions) || self.progress.fault().is_some() {
            return;
        }
        if self.sync_engine().is_ok() {
            self.progress.synced_seq.store(seq, Ordering::Release);
            self.progress.mark_synced(positions);
        }
    }

    /// Syncs all that the engine holds, also what the progress does not know of yet. A failure is the replica's last
    /// sync: what the disk then holds is unknown. Blocks.
    pub fn sync_engine(&self) -> Result<(), engine::Error> {
        let ceilings = self.progress.ceilings_written();
        self.progress.syncing.fetch_add(1, Ordering::Relaxed);
        let synced = self.engine.sync().inspect(|()| self.progress.set_ceilings_synced(ceilings));
        self.progress.syncing.fetch_sub(1, Ordering::Relaxed);
        synced.inspect_err(|error| {
            tracing::error!(replica = self.id, %error, "a sync failed; the replica takes no more writes");
            self.progress.poison(error.to_string());
        })
    }

    /// Takes no more clients' writes; returns the last seq that there is once those before are done.
    pub async fn refuse_writes(&self) -> u64 {
        self.ask(Command::Refuse).await;
        self.progress.last_seq()
    }

    /// Stops the writer cleanly.
    pub async fn stop(&self) {
        self.ask(Command::Stop).await;
    }
}
