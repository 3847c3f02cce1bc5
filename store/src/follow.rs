//! How a replica keeps up with another: the source streams the current record
//! of each changed key; the follower joins them, saves its position in the same
//! batch, and confirms what is synced.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use vasto_client::topology::Wanted;
use vasto_client::v1::peer_client::PeerClient;
use vasto_client::v1::{
    FollowBatch, FollowRequest, FollowResponse, FollowStart, Position, Shipped, SnapshotRequired, Topology, View,
    follow_request, follow_response,
};

use crate::engine;
use crate::keyspace::Keyspace;
use crate::record::{Record, glance};
use crate::replica::Replica;
use crate::snapshot::{self, LONGEST_REST};
use crate::writer::{Asked, PeerBatch};

/// One step along `changes`.
pub struct Step {
    /// Lines looked at, at most.
    pub lines: usize,
    /// It ends when its records have so many bytes.
    pub bytes: usize,
}

/// A step that is done before anyone notices, and is what a follower's writer takes in one go.
const SMALL: Step = Step { lines: 250, bytes: 128 << 10 };
/// One that costs less for each record.
const LARGE: Step = Step { lines: 1_000, bytes: 1 << 20 };
/// Small steps go so many times as far as what is written meanwhile; else, the next are large.
const GAINS: u64 = 2;
/// A record longer than this travels in parts.
const PART_BYTES: usize = 8 << 20;
/// After a message that told all there was, the next comes no sooner: what is written meanwhile goes along, and a
/// message costs far more than a record in it. Whoever writes now and then does not wait for it.
const PAUSE: Duration = Duration::from_millis(1);
/// What brings no records is told no sooner after a message than this: a position alone costs the follower a write.
const NEWS: Duration = Duration::from_millis(20);
/// Of what a follower has to catch up on, so much is applied at once: whoever writes meanwhile waits but shortly...
const PIECE_BYTES: usize = 16 << 10;
/// ... unless it is more than so many pieces.
const PIECES: usize = 16;
/// Timers know no shorter time: shorter rests are taken together.
const SHORTEST_REST: Duration = Duration::from_millis(1);
/// The longest silence of a source.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Silence after which a follower takes its source for dead and connects again.
const SILENCE: Duration = Duration::from_secs(5);

/// Whether a follower at this position can be served, and if not, why.
pub fn required(replica: &Replica, start: &FollowStart) -> Option<SnapshotRequired> {
    let birth = replica.progress.birth();
    let (last, trimmed) = (replica.progress.last_seq(), replica.progress.trimmed());
    let reason = if start.epoch != birth.epoch {
        format!("epoch {:016x} is not known; it is {:016x}", start.epoch, birth.epoch)
    } else if start.seq < trimmed {
        format!("changes up to {trimmed} are gone, and {} was asked for", start.seq)
    } else if start.seq > last {
        format!("the last change is {last}, and {} was asked for", start.seq)
    } else {
        return None;
    };
    Some(SnapshotRequired { reason, ..birth })
}

/// What is to be shipped after a step, and how far that reaches.
pub struct Page {
    /// In the order of their changes.
    pub records: Vec<Shipped>,
    /// Everything up to here is shipped or skipped.
    pub seq: u64,
}

impl Page {
    /// A changed row, if the follower wants it. How many bytes it took.
    fn add(&mut self, wanted: &Wanted<'_>, key: Bytes, record: Bytes) -> usize {
        let Ok(seen) = glance(&record) else { return 0 };
        if !wanted.has(seen.partition_hash) {
            return 0;
        }
        let bytes = key.len() + record.len();
        self.records.extend(shipped(key, record));
        bytes
    }
}

/// As `page`, from memory alone; `None`: it is not there.
pub fn recent_page(
    engine: &engine::Engine,
    wanted: &Wanted<'_>,
    follower_origin: u64,
    seq: u64,
    last_seq: u64,
) -> Option<Page> {
    let (latest, seq) = engine.recent(seq, last_seq, SMALL.bytes)?;
    let mut page = Page { records: Vec::with_capacity(latest.len()), seq };
    for change in latest.into_iter().filter(|change| change.from != follower_origin) {
        page.add(wanted, change.key, change.record);
    }
    Some(page)
}

/// Reads on from `seq`. Blocks.
///
/// A line is skipped when it came from the follower in its present life, when
/// its row has moved on (a later line carries it), or when the follower does
/// not want the key.
pub fn page(
    engine: &engine::Engine,
    wanted: &Wanted<'_>,
    follower_origin: u64,
    seq: u64,
    last_seq: u64,
    step: &Step,
) -> Result<Page, engine::Error> {
    let mut page = Page { records: Vec::new(), seq };
    let mut bytes = 0;
    let mut lines = engine.changes(seq, step.lines)?;
    let all = lines.len() < step.lines;
    // A line beyond what was written when the topology was read may want a newer one.
    lines.truncate(lines.partition_point(|line| line.seq <= last_seq));
    let mut lines = lines.into_iter().peekable();
    let mut at_once = 1;
    while lines.peek().is_some() {
        if bytes >= step.bytes {
            return Ok(page);
        }
        let mut next = Vec::with_capacity(at_once);
        while next.len() < at_once
            && let Some(line) = lines.next()
        {
            page.seq = line.seq;
            if line.from != follower_origin {
                next.push(line);
            }
        }
        let keys: Vec<&[u8]> = next.iter().map(|line| &line.key[..]).collect();
        let rows = engine.rows_once(&keys)?;
        let before = bytes;
        for (line, row) in next.into_iter().zip(rows) {
            let Some(row) = row.filter(|row| row.seq == line.seq) else { continue };
            bytes += page.add(wanted, line.key, row.record);
        }
        at_once = engine::rows_at_once(at_once, bytes - before);
    }
    if all {
        // Seqs may have gaps (ceilings, trimmed lines): the end is the end.
        page.seq = page.seq.max(last_seq);
    }
    Ok(page)
}

/// How a follower that has fallen behind is served: behind all else, and from where it does not gain on what is written
/// that way, with all haste until it has everything.
struct Course {
    /// How far it was.
    seq: u64,
    /// What there was then.
    last_seq: u64,
    hurries: bool,
}

impl Course {
    /// It goes on from `seq`: whether in haste.
    fn hurries(&mut self, seq: u64, last_seq: u64) -> bool {
        let (taken, written) = (seq.saturating_sub(self.seq), last_seq.saturating_sub(self.last_seq));
        let had_everything = seq >= self.last_seq;
        let gains = taken == 0 || taken >= written.saturating_mul(GAINS);
        self.hurries = !had_everything && (self.hurries || !gains);
        (self.seq, self.last_seq) = (seq, last_seq);
        self.hurries
    }
}

/// A record as it travels: whole, or in parts whose join it is.
pub fn shipped(key: Bytes, encoded: Bytes) -> Vec<Shipped> {
    if encoded.len() <= PART_BYTES {
        return vec![Shipped { key, record: encoded }];
    }
    match Record::decode(encoded.clone()) {
        Ok(record) => record
            .parts(PART_BYTES)
            .into_iter()
            .map(|part| Shipped { key: key.clone(), record: part.encoded().into() })
            .collect(),
        Err(_) => vec![Shipped { key, record: encoded }],
    }
}

/// Splits a page so that no message outgrows its limit; at least one, possibly empty.
pub fn in_messages(records: Vec<Shipped>) -> Vec<Vec<Shipped>> {
    crate::in_messages(records, PART_BYTES, size)
}

/// Bytes of a record as it travels.
pub fn size(shipped: &Shipped) -> usize {
    shipped.key.len() + shipped.record.len()
}

/// The source's side of one `Follow` stream; ends when the follower goes or is no longer a follower.
pub async fn serve(
    keyspace: Arc<Keyspace>,
    replica: Arc<Replica>,
    start: FollowStart,
    mut requests: Streaming<FollowRequest>,
    out: mpsc::Sender<Result<FollowResponse, Status>>,
) {
    let follower = start.follower;
    let _connected = replica.progress.connected(follower);
    let confirms = replica.clone();
    let listen = async move {
        while let Some(Ok(request)) = requests.next().await {
            if let Some(follow_request::Message::Confirmed(seq)) = request.message {
                confirms.progress.confirm(follower, seq);
            }
        }
    };
    tokio::select! {
        () = listen => {}
        () = send(&keyspace, &replica, &start, &out) => {}
        () = out.closed() => {}
    }
}

pub(crate) async fn send(
    keyspace: &Keyspace,
    replica: &Arc<Replica>,
    start: &FollowStart,
    out: &mpsc::Sender<Result<FollowResponse, Status>>,
) {
    let _following = replica.engine.follow();
    let respond = |message, topology| FollowResponse { message: Some(message), topology };
    let mut updates = keyspace.updates();
    let mut writes = replica.progress.writes();
    let (mut seq, mut version) = (start.seq, start.version);
    let (mut told, mut number) = (None, 0);
    let mut sent = Instant::now();
    let mut course = Course { seq, last_seq: *writes.borrow(), hurries: false };
    loop {
        let last_seq = *writes.borrow_and_update();
        let update = updates.borrow_and_update().clone();
        let Some(topology) = update.topology.clone() else { return };
        if let Some(why) = snapshot::outdated(&topology, start.version) {
            let _ = out.send(Ok(respond(follow_response::Message::NotReady(why), None))).await;
            return;
        }
        if !topology.is_source(replica.id, start.follower) {
            let why = format!(
                "replica {:016x} does not follow this one by topology version {}",
                start.follower, topology.version
            );
            let _ = out.send(Ok(respond(follow_response::Message::NotReady(why), None))).await;
            return;
        }
        let mut newer = (topology.version > version).then(|| (*update).clone());
        if let Some(required) = required(replica, &FollowStart { seq, ..start.clone() }) {
            let message = follow_response::Message::SnapshotRequired(required);
            let _ = out.send(Ok(respond(message, newer))).await;
            return;
        }
        let (engine, source, follower, origin) = (replica.engine.clone(), replica.id, start.follower, start.origin);
        let hurries = course.hurries(seq, last_seq);
        let page = match recent_page(&engine, &topology.wanted(source, follower), origin, seq, last_seq) {
            Some(page) => page,
            None => {
                let step = if hurries { &LARGE } else { &SMALL };
                let read = move || page(&engine, &topology.wanted(source, follower), origin, seq, last_seq, step);
                // Not in the idle class: it takes locks that clients wait for.
                let read = match hurries {
                    true => keyspace.env().blocking(read).await,
                    false => keyspace.env().blocking_behind(read).await,
                };
                match read {
                    Ok(Ok(page)) => page,
                    Ok(Err(error)) => {
                        tracing::error!(replica = replica.id, %error, "changes can't be read");
                        replica.progress.poison(error.to_string());
                        return;
                    }
                    Err(_) => return,
                }
            }
        };
        // Rows may have been deleted, by a clean-up, while they were read.
        if updates.has_changed().unwrap_or(true) && !keyspace.topology().is_source(replica.id, start.follower) {
            continue;
        }
        // Lines may have been trimmed while they were read.
        if replica.progress.trimmed() > seq && page.seq > seq {
            continue;
        }
        let at_end = page.seq >= last_seq;
        let before = std::mem::replace(&mut seq, page.seq);
        let news = told != Some((seq, last_seq));
        let due = !page.records.is_empty() || told.is_none() || sent.elapsed() >= NEWS;
        if newer.is_some() || news && due {
            told = Some((seq, last_seq));
            sent = Instant::now();
            version = newer.as_ref().and_then(|update| update.topology.as_ref()).map_or(version, |t| t.version);
            let mut messages = in_messages(page.records).into_iter().peekable();
            while let Some(records) = messages.next() {
                number += 1;
                let batch = FollowBatch {
                    records,
                    // The position moves only once all of the page has come.
                    seq: if messages.peek().is_none() { seq } else { before },
                    last_seq: last_seq.max(seq),
                    clock: replica.progress.clock(),
                    origin: replica.origin,
                    number,
                };
                if out.send(Ok(respond(follow_response::Message::Batch(batch), newer.take()))).await.is_err() {
                    return;
                }
            }
        }
        if at_end {
            let read = Instant::now();
            tokio::select! {
                changed = writes.changed() => if changed.is_err() { return },
                changed = updates.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(sent + NEWS), if told != Some((seq, last_seq)) => {}
                () = tokio::time::sleep_until(sent + HEARTBEAT) => told = None,
            }
            tokio::time::sleep_until(read + PAUSE).await;
        }
    }
}

/// Follows one source for as long as it is one; the caller cancels by dropping.
pub async fn follow(keyspace: Arc<Keyspace>, replica: Arc<Replica>, source: u64, store: String) {
    let mut wait = Duration::from_millis(20);
    loop {
        match once(&keyspace, &replica, source, &store).await {
            Ok(()) => wait = Duration::from_millis(20),
            Err(error) => {
                tracing::debug!(replica = replica.id, source, store, %error, "follow again");
                wait = (wait * 2).min(Duration::from_secs(1));
            }
        }
        tokio::time::sleep(keyspace.env().jitter(wait)).await;
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("no address of {0} is known")]
    NoAddress(String),
    #[error(transparent)]
    Connect(#[from] tonic::transport::Error),
    #[error(transparent)]
    Status(#[from] Status),
    #[error("not ready: {0}")]
    NotReady(String),
    #[error("silent for {SILENCE:?}")]
    Silent,
    #[error("batch {0} came where {1} was due")]
    Gap(u64, u64),
    #[error("can't apply: {0}")]
    Apply(String),
    #[error("snapshot: {0}")]
    Snapshot(#[from] snapshot::Error),
}

async fn once(keyspace: &Arc<Keyspace>, replica: &Arc<Replica>, source: u64, store: &str) -> Result<(), Broken> {
    let address = keyspace.address(store).ok_or_else(|| Broken::NoAddress(store.to_owned()))?;
    let channel = keyspace.env().dial(&address)?;
    let mut client = PeerClient::new(channel)
        .max_decoding_message_size(crate::MESSAGE_LIMIT)
        .max_encoding_message_size(crate::MESSAGE_LIMIT);
    // Before the position: a clean-up in between is then noticed.
    let mut asked = replica.asked(keyspace.version());
    let position = replica.progress.position(source).unwrap_or_default();
    let (requests, stream) = mpsc::channel(16);
    let start = FollowStart {
        keyspace: keyspace.uid().to_owned(),
        source,
        follower: replica.id,
        epoch: position.epoch,
        seq: position.seq,
        version: asked.version,
        origin: replica.origin,
    };
    let _ = requests.send(FollowRequest { message: Some(follow_request::Message::Start(start)) }).await;
    let responses = client.follow(ReceiverStream::new(stream)).await?.into_inner();
    let mut responses = std::pin::pin!(keyspace.env().deliver(responses));
    let mut due = 1;
    let mut synced = replica.progress.synced();
    let mut confirmed = 0;
    let epoch = position.epoch;
    let mut lag = u64::MAX;
    let mut owed = Duration::ZERO;
    loop {
        if let Some(position) = replica.progress.synced_position(source)
            && position.seq != confirmed
            && position.epoch == epoch
        {
            confirmed = position.seq;
            let message = follow_request::Message::Confirmed(confirmed);
            let _ = requests.try_send(FollowRequest { message: Some(message) });
        }
        let response = tokio::select! {
            response = tokio::time::timeout(SILENCE, responses.next()) => response.map_err(|_| Broken::Silent)?,
            changed = synced.changed() => {
                if changed.is_err() { return Ok(()); }
                continue;
            }
        };
        let Some(response) = response else { return Ok(()) };
        let response = response?;
        if let Some(update) = response.topology {
            // What comes from here on was chosen by it, also if it can't be taken in.
            asked = asked.by(update.topology.as_ref().map_or(0, |t| t.version));
            // A task of its own: what it brings may end this one.
            let keyspace = keyspace.clone();
            let _ = tokio::spawn(async move { keyspace.install(update).await }).await;
        }
        match response.message {
            None => {}
            Some(follow_response::Message::NotReady(why)) => return Err(Broken::NotReady(why)),
            Some(follow_response::Message::SnapshotRequired(required)) => {
                return catch_up(keyspace, replica, source, store, required).await;
            }
            Some(follow_response::Message::Batch(batch)) => {
                // The position that a batch brings covers those before it.
                if batch.number > due {
                    return Err(Broken::Gap(batch.number, due));
                }
                due = due.max(batch.number + 1);
                let before = replica.progress.position(source).map_or(0, |p| p.seq);
                let lag_before = std::mem::replace(&mut lag, batch.last_seq.saturating_sub(batch.seq.max(before)));
                if batch.seq != before || !batch.records.is_empty() {
                    // Who falls back has no time to rest.
                    let owed = (lag > 0 && lag <= lag_before).then_some(&mut owed);
                    apply(replica, source, epoch, asked, batch, owed).await?;
                }
                replica.progress.update_source(source, |s| (s.lag, s.epoch) = (lag, epoch));
            }
        }
    }
}

/// Applies a batch. One that others wait behind is applied piece by piece, and what that takes is owed: rests as long
/// leave half of the time to clients.
pub(crate) async fn apply(
    replica: &Replica,
    source: u64,
    epoch: u64,
    asked: Asked,
    batch: FollowBatch,
    mut owed: Option<&mut Duration>,
) -> Result<(), Broken> {
    let bytes: usize = batch.records.iter().map(size).sum();
    let piece = if owed.is_some() { PIECE_BYTES.max(bytes / PIECES) } else { usize::MAX };
    let mut pieces = crate::in_messages(batch.records, piece, size).into_iter().peekable();
    while let Some(piece) = pieces.next() {
        let begun = Instant::now();
        let mut records = Vec::with_capacity(piece.len());
        for shipped in piece {
            let record = Record::decode(shipped.record).map_err(|e| Broken::Apply(e.to_string()))?;
            records.push((shipped.key, record));
        }
        // One that comes a second time takes nothing back. The position moves only once all of the batch is there.
        let known = replica.progress.position(source).is_some_and(|p| p.epoch == epoch && p.seq > batch.seq);
        let position =
            (!known && pieces.peek().is_none()).then_some(Position { replica: source, epoch, seq: batch.seq });
        let batch = PeerBatch {
            from: batch.origin,
            records,
            positions: position.into_iter().collect(),
            clock: batch.clock,
            asked: Some(asked),
        };
        replica.apply(batch).await.map_err(|r| Broken::Apply(r.message))?;
        if let Some(owed) = owed.as_deref_mut() {
            *owed += begun.elapsed();
            if *owed >= SHORTEST_REST {
                tokio::time::sleep(std::mem::take(owed).min(LONGEST_REST)).await;
            }
        }
    }
    Ok(())
}

/// What to do when the source can't go on from this replica's position.
///
/// All that the source held at its birth came from certain positions of other
/// replicas. A follower that has passed each of them holds all of that, so it
/// begins at the birth; it waits a while to get there before it copies anything.
async fn catch_up(
    keyspace: &Arc<Keyspace>,
    replica: &Arc<Replica>,
    source: u64,
    store: &str,
    required: SnapshotRequired,
) -> Result<(), Broken> {
    let begin = |seq, asked| PeerBatch {
        positions: vec![Position { replica: source, epoch: required.epoch, seq }],
        asked: Some(asked),
        ..PeerBatch::default()
    };
    let known = replica.progress.position(source).is_some_and(|p| p.epoch == required.epoch);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let topology = keyspace.topology();
        // Before the positions are looked at: they may be forgotten.
        let asked = replica.asked(topology.version);
        if known || !siblings(&topology, replica.id, source) {
            break;
        }
        if covers(replica, &required) {
            return replica.apply(begin(required.birth_seq, asked)).await.map_err(|r| Broken::Apply(r.message));
        }
        let reachable =
            required.births.iter().all(|b| b.replica == replica.id || topology.is_source(b.replica, replica.id));
        if !reachable || tokio::time::Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // One at a time: the first copy from a shard brings its positions in the shard's other replicas, where they hold
    // here as well, so that the next needs none.
    let _turn = replica.snapshot_turn.lock().await;
    if replica.progress.position(source).is_some_and(|p| p.epoch == required.epoch) && !known {
        return Ok(());
    }
    tracing::info!(replica = replica.id, source, store, reason = required.reason, "copying what was missed");
    snapshot::join_from(keyspace, replica, source, store).await?;
    Ok(())
}

/// Whether two replicas are of one shard. One of another shard may have deleted since,
/// as foreign, what the other was born with.
fn siblings(topology: &Topology, a: u64, b: u64) -> bool {
    let meet = |view: &View| view.place(a).zip(view.place(b)).is_some_and(|(a, b)| a.shard == b.shard);
    [&topology.current, &topology.next].into_iter().flatten().any(meet)
}

/// Whether this replica has passed every position that the source was born from.
fn covers(replica: &Replica, required: &SnapshotRequired) -> bool {
    required.births.iter().all(|birth| {
        birth.replica == replica.id
            || replica.progress.position(birth.replica).is_some_and(|p| p.epoch == birth.epoch && p.seq >= birth.seq)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course() -> Course {
        Course { seq: 0, last_seq: 10_000, hurries: false }
    }

    #[test]
    fn who_gains_on_what_is_written_is_served_without_haste() {
        let mut course = course();
        assert!(!course.hurries(0, 10_000), "nothing is known yet");
        for (seq, last_seq) in [(250, 10_000), (500, 10_125), (750, 10_250), (10_250, 10_400), (10_250, 20_000)] {
            assert!(!course.hurries(seq, last_seq), "{seq} of {last_seq}");
        }
    }

    #[test]
    fn who_does_not_is_served_in_haste_until_it_has_everything() {
        let mut course = course();
        assert!(course.hurries(250, 10_126));
        // Also where it gains in haste: without, it would not.
        for (seq, last_seq) in [(1_250, 10_200), (10_199, 10_201)] {
            assert!(course.hurries(seq, last_seq), "{seq} of {last_seq}");
        }
        assert!(!course.hurries(10_201, 12_000), "it had everything, and what came since is nothing that it lost");
        assert!(course.hurries(10_451, 20_000));
    }
}
