//! The one writer of a replica: a loop that drains a queue, stamps and joins
//! all that waits into one batch, writes it, and answers. Everything that
//! changes a replica's rows passes here, so that the order is one.

mod turn;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use vasto_client::env::Env;
use vasto_client::hash::jump_hash;
use vasto_client::v1::{self, FailureCode, Phase, Position, Returning, Topology};

use crate::clock::Clock;
use crate::engine::{Batch, Engine, rows_at_once};
use crate::join::join;
use crate::merge::{self, Limits, LocalOp};
use crate::meta::Fence;
use crate::record::{Content, Record, Stamp, View};
use crate::replica::Progress;
pub use turn::{Queued, Stalls, Turn};

/// A batch is written when it holds this many bytes, however much more waits: clients make use of the answers to one
/// while the next is written.
const BATCH_BYTES: usize = 16 << 10;
/// The same where each batch is synced, which costs far more than what is in it.
const SYNCED_BATCH_BYTES: usize = 4 << 20;
/// A batch that had more keys does not keep its memory for the next one.
const KEPT_KEYS: usize = 8 << 10;
/// Seqs reserved ahead with one sync.
const SEQ_STEP: u64 = 1 << 20;

/// A client's write of one key.
#[derive(Debug)]
pub struct LocalWrite {
    /// The key.
    pub key: Bytes,
    /// What to do, and the partition that it belongs to.
    pub op: LocalOp,
    /// The session's greatest stamp from other replicas.
    pub after: Option<Stamp>,
    /// The caller named a partition key, so that the row must be looked at.
    pub named_partition: bool,
    /// What the answer tells of the key.
    pub returning: Returning,
    /// Of that without its bytes.
    pub head: bool,
}

impl LocalWrite {
    /// It is done without a look at the row: a put with the store's own clock is newer than all that its replica has
    /// seen. The partition check wants a look.
    pub fn is_blind(&self) -> bool {
        self.op.is_blind() && !self.named_partition && self.returning != Returning::Before
    }
}

/// A write that was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// What the session remembers.
    pub stamp: Stamp,
    /// What the key held before or holds after it, if that was asked for.
    pub view: Option<View>,
    /// How many bytes were left out of that, where only its head was asked for.
    pub left_out: Option<u64>,
}

/// Why a write was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For programs.
    pub code: FailureCode,
    /// For people: what was wrong, with which value, and what would be right.
    pub message: String,
}

impl Refused {
    /// A refusal in words.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The store is leaving. Not executed; another replica takes it at once.
    pub fn leaving() -> Self {
        Self::new(FailureCode::NotReady, "the store is stopping and takes no more writes: write to another replica")
    }
}

/// Records from a peer, in the order of its changes (or of a snapshot).
#[derive(Debug, Default)]
pub struct PeerBatch {
    /// The origin of the peer in its present life.
    pub from: u64,
    /// Whole or partial records.
    pub records: Vec<(Bytes, Record)>,
    /// What has been applied with this batch.
    pub positions: Vec<Position>,
    /// The peer's clock.
    pub clock: u64,
    /// What was known when all this was asked for; `None`: of the replica's own shard, whatever is known.
    pub asked: Option<Asked>,
}

/// What a replica knew, and had deleted, when it began to ask a peer for its changes or a copy.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The topology. A writer that knows only an older one would drop, as foreign, what its replica is about to own.
    pub version: u64,
    /// How often positions had been forgotten until then, with what was copied from other shards or was meant for
    /// another place: what goes on from there would leave a gap.
    pub cleanups: u64,
}

impl Asked {
    /// For what was sent by a topology of this version, if that is newer.
    pub fn by(self, version: u64) -> Self {
        Self { version: self.version.max(version), ..self }
    }
}

/// What the queue holds.
pub enum Command {
    /// Clients' writes for this replica; answered one by one, in order.
    Local(Vec<LocalWrite>, oneshot::Sender<Vec<Result<Taken, Refused>>>, OwnedSemaphorePermit),
    /// A peer's records and the positions they bring, in one batch.
    Peer(PeerBatch, oneshot::Sender<Result<(), Refused>>),
    /// From here on this topology decides what is accepted; a fence if it asks for one.
    Topology(Arc<Topology>, oneshot::Sender<()>),
    /// Deletes foreign keys.
    Clean(Vec<Bytes>, oneshot::Sender<Result<(), Refused>>),
    /// All foreign keys of this change are gone.
    Cleaned(u64),
    /// Tombstones up to this stamp time may be collected, once this is synced.
    Horizon(u64, oneshot::Sender<Result<(), Refused>>),
    /// Lines of `changes` up to this seq are needed by nobody.
    Trim(u64),
    /// From here on clients' writes are refused, since the store is stopping; peers' go on.
    Refuse(oneshot::Sender<()>),
    /// A batch has been held back.
    Held,
    /// A clean stop.
    Stop(oneshot::Sender<()>),
}

/// The writer's own state; nobody else sees it.
pub struct Writer {
    replica: u64,
    engine: Arc<Engine>,
    env: Env,
    progress: Arc<Progress>,
    clock: Clock,
    seq: u64,
    seq_ceiling: u64,
    /// Ceilings that are written ahead of need and not known to be synced yet.
    ahead: Option<Ceilings>,
    topology: Arc<Topology>,
    /// By the topology, the shard and the number of shards whose keys clients may write here; looked up once, not
    /// with each write.
    accepting: Vec<(u32, u32)>,
    /// The memory of the last batch, for the next one.
    batch: Batch,
    overlay: Overlay,
    /// What has to wait, for the disk or the background, and was not made by who may. It goes before all else.
    held: Option<(Batch, Box<Pending>)>,
    limits: Limits,
    positions: BTreeMap<u64, Position>,
    served: bool,
    full: bool,
    alarmed: bool,
    refusing: bool,
    disk_free: Box<dyn FnMut() -> bool + Send>,
}

/// What `Writer::new` takes.
pub struct Start {
    /// The replica's id.
    pub replica: u64,
    /// Its files.
    pub engine: Arc<Engine>,
    /// Time.
    pub env: Env,
    /// What others may see.
    pub progress: Arc<Progress>,
    /// At or above every stamp given before.
    pub clock: Clock,
    /// At or above every seq given before.
    pub seq: u64,
    /// What decides until a newer one comes.
    pub topology: Arc<Topology>,
    /// Bounds for callers.
    pub limits: Limits,
    /// As read from `meta`.
    pub positions: Vec<Position>,
    /// As read from `meta`.
    pub served: bool,
    /// Whether the disk has room for another batch.
    pub disk_free: Box<dyn FnMut() -> bool + Send>,
}

/// What a batch has made of keys so far.
#[derive(Default)]
struct Overlay {
    /// `None`: deleted.
    rows: HashMap<Bytes, Option<Record>, foldhash::fast::RandomState>,
    /// What is not in `rows` yet, in its order: most batches are never asked.
    later: Vec<(Bytes, Option<Record>)>,
}

impl Overlay {
    fn insert(&mut self, key: Bytes, row: Option<Record>) {
        self.later.push((key, row));
    }

    fn get(&mut self, key: &[u8]) -> Option<&Option<Record>> {
        self.rows.extend(self.later.drain(..));
        self.rows.get(key)
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.rows.shrink_to(KEPT_KEYS);
        self.later.clear();
        self.later.shrink_to(KEPT_KEYS);
    }
}

type LocalReply = (oneshot::Sender<Vec<Result<Taken, Refused>>>, Vec<Result<Taken, Refused>>);

/// What a batch will answer once it is written.
#[derive(Default)]
struct Pending {
    local: Vec<LocalReply>,
    done: Vec<oneshot::Sender<Result<(), Refused>>>,
    fences: Vec<oneshot::Sender<()>>,
    positions: Vec<Position>,
    fence: Option<Fence>,
    cleaned: Option<u64>,
    trimmed: Option<u64>,
    horizon: Option<u64>,
    sync: bool,
}

/// Ceilings of clock and seq, counted from the first that the writer wrote ahead.
#[derive(Clone, Copy)]
struct Ceilings {
    number: u64,
    clock: u64,
    seq: u64,
}

impl Writer {
    /// A writer that has written nothing yet.
    pub fn new(start: Start) -> Self {
        let Start { replica, engine, env, progress, clock, seq, topology, limits, positions, served, disk_free } =
            start;
        Self {
            replica,
            engine,
            env,
            progress,
            clock,
            seq,
            seq_ceiling: seq,
            ahead: None,
            accepting: accepting(&topology, replica),
            topology,
            batch: Batch::default(),
            overlay: Overlay::default(),
            held: None,
            limits,
            positions: positions.into_iter().map(|p| (p.replica, p)).collect(),
            served,
            full: false,
            alarmed: false,
            refusing: false,
            disk_free,
        }
    }

    /// Takes all commands, in as many batches as their size asks for.
    pub fn take(&mut self, commands: &mut Vec<Command>) -> Option<oneshot::Sender<()>> {
        let mut stop = None;
        self.commit_what_is_held();
        let mut commands = commands.drain(..).peekable();
        while commands.peek().is_some() {
            let (mut batch, mut overlay, mut pending) = self.begin();
            let enough = if self.progress.synced_writes() { SYNCED_BATCH_BYTES } else { BATCH_BYTES };
            while batch.size() < enough {
                match commands.next() {
                    None => break,
                    Some(Command::Stop(done)) => stop = Some(done),
                    Some(command) => self.add(command, &mut batch, &mut overlay, &mut pending),
                }
            }
            self.commit(&mut batch, pending);
            self.keep(batch, overlay);
        }
        stop
    }

    /// Takes a command where nothing may wait. False: its batch is held back.
    fn take_at_once(&mut self, command: Command) -> bool {
        let (mut batch, mut overlay, mut pending) = self.begin();
        self.add(command, &mut batch, &mut overlay, &mut pending);
        self.held = self.try_commit(&mut batch, pending).err().map(|pending| (std::mem::take(&mut batch), pending));
        self.keep(batch, overlay);
        self.held.is_none()
    }

    fn commit_what_is_held(&mut self) {
        if let Some((mut batch, pending)) = self.held.take() {
            self.commit(&mut batch, *pending);
        }
    }

    fn begin(&mut self) -> (Batch, Overlay, Pending) {
        self.full = !(self.disk_free)();
        self.progress.full.store(self.full, Ordering::Relaxed);
        (std::mem::take(&mut self.batch), std::mem::take(&mut self.overlay), Pending::default())
    }

    fn keep(&mut self, mut batch: Batch, mut overlay: Overlay) {
        batch.clear();
        overlay.clear();
        (self.batch, self.overlay) = (batch, overlay);
    }

    fn add(&mut self, command: Command, batch: &mut Batch, overlay: &mut Overlay, pending: &mut Pending) {
        match command {
            Command::Local(writes, reply, _room) => {
                self.clock.observe(self.progress.passed());
                let now = self.env.now_ms();
                let results = writes.into_iter().map(|write| self.local(write, now, batch, overlay)).collect();
                // `Synced`: the log is synced before the batch is answered.
                pending.sync |= self.progress.synced_writes();
                pending.local.push((reply, results));
            }
            Command::Peer(peer, reply) => match self.peer(peer, batch, overlay, pending) {
                Ok(()) => pending.done.push(reply),
                Err(refused) => {
                    let _ = reply.send(Err(refused));
                }
            },
            Command::Topology(topology, done) => {
                self.install(topology, batch, pending);
                pending.fences.push(done);
            }
            Command::Clean(keys, reply) => {
                for key in keys {
                    overlay.insert(key.clone(), None);
                    batch.delete_row(&key);
                }
                pending.done.push(reply);
            }
            Command::Cleaned(version) => {
                batch.put_cleaned(version);
                self.forget_strangers(batch, pending);
                pending.cleaned = Some(version);
                pending.sync = true;
            }
            Command::Horizon(time, reply) => {
                batch.put_horizon(time);
                pending.horizon = Some(time);
                pending.sync = true;
                pending.done.push(reply);
            }
            Command::Trim(seq) => {
                batch.trim_changes(seq);
                batch.put_trimmed(seq);
                pending.trimmed = Some(seq);
            }
            Command::Refuse(done) => {
                self.refusing = true;
                pending.fences.push(done);
            }
            // Handled by the caller.
            Command::Stop(_) | Command::Held => {}
        }
    }

    /// What came from replicas of other shards has been deleted with the foreign
    /// keys, or may have been: a position there would claim that it is still held.
    fn forget_strangers(&mut self, batch: &mut Batch, pending: &mut Pending) {
        let topology = self.topology.clone();
        let Some(view) = &topology.current else { return };
        let Some(shard) = view.place(self.replica).map(|p| p.shard) else { return };
        self.forget(batch, pending, |id| view.place(id).is_none_or(|p| p.shard != shard));
    }

    /// Forgets the positions at these replicas, also those of this batch: what comes from them has to be asked for anew.
    fn forget(&mut self, batch: &mut Batch, pending: &mut Pending, which: impl Fn(u64) -> bool) {
        pending.positions.retain(|position| !which(position.replica));
        for (id, _) in self.positions.extract_if(.., |id, _| which(*id)) {
            batch.delete_position(id);
            self.progress.forget_position(id);
        }
        self.progress.count_cleanup();
    }

    fn install(&mut self, topology: Arc<Topology>, batch: &mut Batch, pending: &mut Pending) {
        if topology.version < self.topology.version {
            return;
        }
        let fenced = matches!(topology.phase(), Phase::Fence | Phase::Drain | Phase::Cleanup)
            && topology.previous.as_ref().is_some_and(|v| v.place(self.replica).is_some())
            && self.progress.fence().version != topology.switch_version;
        if fenced {
            // Writes under the old view are refused from here on, since the
            // topology below decides; what came before has a seq up to this.
            let fence = Fence { version: topology.switch_version, seq: self.seq };
            batch.put_fence(fence);
            pending.fence = Some(fence);
            pending.sync = true;
        }
        if !self.served && topology.current.as_ref().is_some_and(|v| v.place(self.replica).is_some()) {
            self.served = true;
            batch.put_served();
            pending.sync = true;
        }
        // No view names it. If one does again, it may be for other keys, and a position would claim those as well.
        if !topology.names(self.replica) {
            self.forget(batch, pending, |_| true);
            pending.sync = true;
        }
        // It was to gain keys, and is no more, by a topology that knows nothing of that: what comes for it from now on is
        // dropped, and a position behind that would claim it when it is to gain them again.
        let shard = |view: &Option<v1::View>| view.as_ref().and_then(|v| v.shard_of(self.replica));
        let gained = shard(&self.topology.next);
        let lost = gained.is_some() && ![shard(&topology.current), shard(&topology.next)].contains(&gained);
        self.accepting = accepting(&topology, self.replica);
        self.topology = topology;
        if lost {
            self.forget_strangers(batch, pending);
            pending.sync = true;
        }
    }

    fn existing(&self, key: &Bytes, overlay: &mut Overlay) -> Result<Option<Record>, Refused> {
        if let Some(record) = overlay.get(key) {
            return Ok(record.clone());
        }
        let row = self.engine.row(key).inspect_err(|error| self.progress.failed(error)).map_err(internal)?;
        row.map(|row| Record::decode(row.record)).transpose().map_err(internal)
    }

    /// What the database has of records' keys, for those that the batch has not, and how many bytes that took.
    fn known(
        &self,
        records: &[(Bytes, Record)],
        overlay: &mut Overlay,
    ) -> Result<(Vec<Option<Record>>, usize), Refused> {
        let asked: Vec<usize> = (0..records.len()).filter(|index| overlay.get(&records[*index].0).is_none()).collect();
        let keys: Vec<&[u8]> = asked.iter().map(|index| &records[*index].0[..]).collect();
        let rows = self.engine.rows_once(&keys).inspect_err(|error| self.progress.failed(error)).map_err(internal)?;
        let (mut known, mut bytes) = (vec![None; records.len()], 0);
        for (index, row) in asked.into_iter().zip(rows) {
            bytes += row.as_ref().map_or(0, |row| row.record.len());
            known[index] = row.map(|row| Record::decode(row.record)).transpose().map_err(internal)?;
        }
        Ok((known, bytes))
    }

    fn put(&mut self, key: Bytes, record: Record, from: u64, batch: &mut Batch, overlay: &mut Overlay) {
        self.clock.store(record.greatest_stamp().time);
        self.seq += 1;
        batch.put_record(&key, self.seq, from, |out| record.encode(out));
        overlay.insert(key, Some(record));
    }

    fn local(
        &mut self,
        write: LocalWrite,
        now: u64,
        batch: &mut Batch,
        overlay: &mut Overlay,
    ) -> Result<Taken, Refused> {
        if self.progress.fault().is_some() {
            return Err(Refused::new(FailureCode::NotReady, self.progress.fault_text()));
        }
        if self.refusing {
            return Err(Refused::leaving());
        }
        if self.full {
            return Err(Refused::new(
                FailureCode::NoSpace,
                "the store's disk is full: it refuses writes and serves reads; give it more space".to_string(),
            ));
        }
        let hash = write.op.partition_hash;
        if !self.accepting.iter().any(|(shard, shards)| jump_hash(hash, *shards) == *shard) {
            return Err(Refused::new(
                FailureCode::WrongShard,
                format!(
                    "the key is not (or no longer) of a shard served here, by topology version {}",
                    self.topology.version
                ),
            ));
        }
        if let Some(after) = write.after
            && !self.clock.pass(after.time, now, self.limits.max_clock_skew_ms)
        {
            let message = "the session's last stamp is too far ahead of this store's clock".to_string();
            return Err(Refused::new(FailureCode::NotReady, message));
        }
        let existing = if write.is_blind() { None } else { self.existing(&write.key, overlay)? };
        let before = existing.unwrap_or_else(|| Record::unwritten(write.op.partition_hash));
        let clock = &mut self.clock;
        let context = merge::Context { origin: clock.origin(), after: write.after, now_ms: now, limits: &self.limits };
        let applied = merge::apply(Some(before.clone()), write.op, &context, &mut || clock.tick(now))
            .map_err(|refusal| Refused::new(refusal.code(), refusal.to_string()))?;
        // A caller's own time may lie ahead of the clock.
        self.clock.observe(applied.stamp.time);
        let view = match write.returning {
            Returning::Nothing => None,
            Returning::Before => Some(before.read(now)),
            Returning::After => Some(applied.record.read(now)),
        };
        // A max below what is there changes nothing, and is no change.
        if before != applied.record {
            self.put(write.key, applied.record, 0, batch, overlay);
        }
        let (mut view, mut left_out) = (view, None);
        if let (true, Some(View { content: Content::Bytes(bytes), .. })) = (write.head, &mut view) {
            left_out = Some(bytes.len() as u64);
            *bytes = Bytes::new();
        }
        Ok(Taken { stamp: applied.stamp, view, left_out })
    }

    /// Whether it was put after all that this replica holds: its join with whatever the key has is the record itself, so
    /// that nothing needs to be read, as with a client's put.
    fn is_newest(&self, record: &Record) -> bool {
        record.base().stamp.time > self.clock.stored()
    }

    fn peer(
        &mut self,
        peer: PeerBatch,
        batch: &mut Batch,
        overlay: &mut Overlay,
        pending: &mut Pending,
    ) -> Result<(), Refused> {
        if self.progress.fault().is_some() {
            return Err(Refused::new(FailureCode::NotReady, self.progress.fault_text()));
        }
        if self.full {
            return Err(Refused::new(FailureCode::NoSpace, "the disk is full".to_string()));
        }
        if let Some(asked) = peer.asked {
            if asked.version > self.topology.version {
                let message = format!(
                    "topology version {} is not known to the writer yet, only {}",
                    asked.version, self.topology.version
                );
                return Err(Refused::new(FailureCode::NotReady, message));
            }
            if asked.cleanups != self.progress.cleanups() {
                let message = "what this goes on from has been forgotten since: it has to be asked for anew";
                return Err(Refused::new(FailureCode::NotReady, message));
            }
        }
        self.clock.observe(peer.clock);
        let ahead_ms = Clock::ahead_ms(self.clock.last(), self.env.now_ms());
        if ahead_ms > self.limits.max_clock_skew_ms && !self.alarmed {
            // Accepted all the same, else replicas would not converge.
            tracing::error!(
                replica = self.replica,
                ahead_ms,
                "a peer's clock is far ahead of this one: set the machines' clocks"
            );
        }
        self.alarmed = ahead_ms > self.limits.max_clock_skew_ms;
        let (topology, replica) = (self.topology.clone(), self.replica);
        // Not ours under any view: drained long ago, and deleted by Clean up.
        let holds = |(_, record): &(Bytes, Record)| topology.holds(replica, record.partition_hash());
        let mut records = peer.records.into_iter().filter(holds).peekable();
        let mut at_once = 1;
        while let Some((key, record)) = records.next() {
            if self.is_newest(&record) {
                self.put(key, record, peer.from, batch, overlay);
                continue;
            }
            let mut some = vec![(key, record)];
            while some.len() < at_once
                && let Some(next) = records.next_if(|(_, record)| !self.is_newest(record))
            {
                some.push(next);
            }
            let (known, bytes) = self.known(&some, overlay)?;
            at_once = rows_at_once(at_once, bytes);
            for ((key, record), known) in some.into_iter().zip(known) {
                self.clock.observe(record.greatest_stamp().time);
                // The batch may have it by now.
                let Some(mine) = overlay.get(&key).cloned().unwrap_or(known) else {
                    self.put(key, record, peer.from, batch, overlay);
                    continue;
                };
                let joined = join(mine.clone(), record.clone());
                // What changes nothing is no change: else two replicas would send it to and fro.
                if joined != mine {
                    // The line replaces those of this replica's own changes, which the peer may not have got yet: it
                    // is one that the peer needn't get only where that has all of it.
                    let from = if joined == record { peer.from } else { 0 };
                    self.put(key, joined, from, batch, overlay);
                }
            }
        }
        for position in peer.positions {
            batch.put_position(&position);
            self.positions.insert(position.replica, position);
            pending.positions.push(position);
        }
        Ok(())
    }

    fn commit(&mut self, batch: &mut Batch, pending: Pending) {
        if batch.is_empty() && !pending.sync {
            return self.answer(pending, Ok(()));
        }
        self.adopt_what_is_synced();
        let now_ms = self.env.now_ms();
        let (mut sync, mut written) = (pending.sync, None);
        if self.is_below_ceilings(now_ms) {
            written = self.write_ahead(batch, now_ms);
        } else {
            // They take the place of those ahead.
            self.ahead = None;
            if self.seq > self.seq_ceiling {
                self.seq_ceiling = self.seq + SEQ_STEP;
            }
            if let Some(ceiling) = self.clock.needs_ceiling(now_ms) {
                self.clock.set_ceiling(ceiling);
            }
            batch.put_ceilings(self.clock.ceiling(), self.seq_ceiling);
            sync = true;
        }
        let result = self.sound().and_then(|()| self.engine.write(batch, sync).map_err(|error| self.failed(error)));
        self.settle(pending, result, sync, written);
    }

    /// As `commit`, if nothing has to be waited for; else the batch is as good for `commit` as before.
    fn try_commit(&mut self, batch: &mut Batch, pending: Pending) -> Result<(), Box<Pending>> {
        if batch.is_empty() && !pending.sync {
            self.answer(pending, Ok(()));
            return Ok(());
        }
        self.adopt_what_is_synced();
        let now_ms = self.env.now_ms();
        if pending.sync || !self.is_below_ceilings(now_ms) {
            return Err(Box::new(pending));
        }
        let written = self.write_ahead(batch, now_ms);
        let result = match self.sound().map(|()| self.engine.try_write(batch)) {
            Ok(Ok(false)) => return Err(Box::new(pending)),
            Ok(Ok(true)) => Ok(()),
            Ok(Err(error)) => Err(self.failed(error)),
            Err(refused) => Err(refused),
        };
        self.settle(pending, result, false, written);
        Ok(())
    }

    /// Ceilings are synced before anything under them is: those that were written ahead by now, as a rule; else with
    /// the same sync where there is one.
    fn adopt_what_is_synced(&mut self) {
        if let Some(ceilings) = self.ahead.take_if(|ceilings| self.progress.ceilings_synced() >= ceilings.number) {
            self.adopt(ceilings);
        }
    }

    /// Whether all that it has given or seen may be stored without another sync.
    fn is_below_ceilings(&self, now_ms: u64) -> bool {
        self.clock.needs_ceiling(now_ms).is_none() && self.seq <= self.seq_ceiling
    }

    /// Has the batch write the next ceilings, where those are near.
    fn write_ahead(&self, batch: &mut Batch, now_ms: u64) -> Option<Ceilings> {
        if self.ahead.is_some() {
            return None;
        }
        let clock = self.clock.wants_ceiling(now_ms);
        let near = self.seq + SEQ_STEP / 2 > self.seq_ceiling;
        if clock.is_none() && !near {
            return None;
        }
        let clock = clock.unwrap_or(0).max(self.clock.ceiling());
        let seq = if near { self.seq + SEQ_STEP } else { self.seq_ceiling };
        batch.put_ceilings(clock, seq);
        Some(Ceilings { number: self.progress.ceilings_written() + 1, clock, seq })
    }

    fn sound(&self) -> Result<(), Refused> {
        match self.progress.fault() {
            None => Ok(()),
            Some(_) => Err(Refused::new(FailureCode::Internal, self.progress.fault_text())),
        }
    }

    /// After a failed write or sync the log's end is unknown: nothing more is written by this process.
    fn failed(&self, error: crate::engine::Error) -> Refused {
        tracing::error!(replica = self.replica, %error, "a write failed; the replica takes no more writes");
        self.progress.poison(error.to_string());
        internal(error)
    }

    /// Tells of a batch that was written, or failed to be.
    fn settle(&mut self, pending: Pending, result: Result<(), Refused>, sync: bool, written: Option<Ceilings>) {
        if result.is_ok() {
            if let Some(ceilings) = written {
                self.progress.set_ceilings_written(ceilings.number);
                match sync {
                    true => self.adopt(ceilings),
                    false => self.ahead = Some(ceilings),
                }
            }
            if sync {
                for position in self.positions.values() {
                    self.progress.apply_position(*position);
                }
            }
            for position in &pending.positions {
                self.progress.apply_position(*position);
            }
            if sync {
                self.progress.positions_synced();
            }
            if let Some(fence) = pending.fence {
                self.progress.set_fence(fence);
            }
            if let Some(version) = pending.cleaned {
                self.progress.set_cleaned(version);
            }
            if let Some(time) = pending.horizon {
                self.progress.set_horizon(time);
            }
            if let Some(seq) = pending.trimmed {
                self.progress.set_trimmed(seq);
            }
            self.progress.set_served(self.served);
            self.progress.set_clock(self.clock.last());
            self.progress.set_last_seq(self.seq);
        }
        self.answer(pending, result);
    }

    /// These are synced.
    fn adopt(&mut self, ceilings: Ceilings) {
        self.clock.set_ceiling(ceilings.clock);
        self.seq_ceiling = self.seq_ceiling.max(ceilings.seq);
    }

    fn answer(&self, pending: Pending, result: Result<(), Refused>) {
        for (reply, mut results) in pending.local {
            if let Err(refused) = &result {
                for r in results.iter_mut().filter(|r| r.is_ok()) {
                    *r = Err(refused.clone());
                }
            }
            let _ = reply.send(results);
        }
        for reply in pending.done {
            let _ = reply.send(result.clone());
        }
        for done in pending.fences {
            let _ = done.send(());
        }
    }

    fn stop(&mut self) {
        self.commit_what_is_held();
        if self.progress.fault().is_some() {
            return;
        }
        let mut batch = Batch::default();
        batch.put_ceilings(self.clock.last(), self.seq);
        batch.put_clean(true);
        if let Err(error) = self.engine.write(&batch, true) {
            tracing::warn!(replica = self.replica, %error, "the stop was not clean");
        }
    }
}

fn accepting(topology: &Topology, replica: u64) -> Vec<(u32, u32)> {
    topology.accepting(replica).map(|place| (place.shard, place.shards)).collect()
}

fn internal(error: impl std::fmt::Display) -> Refused {
    Refused::new(FailureCode::Internal, error.to_string())
}
