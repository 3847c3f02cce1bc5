//! Anti-entropy: a replica compares what it holds with what each other of its
//! shard holds, range by range, by hash, and joins in what it lacks. Positions
//! prove what was replicated; this finds what was lost or spoilt all the same.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;
use vasto_client::topology::Place;
use vasto_client::v1::peer_client::PeerClient;
use vasto_client::v1::{CompareRequest, CompareResponse, Phase, RepairResponse, Shipped, Topology, View};
use xxhash_rust::xxh64::Xxh64;

use crate::engine::{self, Engine};
use crate::follow::{self, in_messages, shipped};
use crate::join::join;
use crate::keyspace::Keyspace;
use crate::record::{Record, glance};
use crate::replica::Replica;
use crate::writer::PeerBatch;

/// About how long after one round the next begins (jittered).
const EVERY: Duration = Duration::from_secs(3_600);
/// Bytes a second that a round in the background reads.
pub const BACKGROUND: u64 = 4 << 20;
/// Bytes a second that a round reads that somebody waits for.
pub const WAITED_FOR: u64 = 64 << 20;
/// What a follower puts into one range.
const RANGE: Limit = Limit { rows: 1_024, bytes: 1 << 20 };
/// What a source looks at for one range: more than a follower that lacks little would ask about.
const ANSWER: Limit = Limit { rows: 4_096, bytes: 4 << 20 };
/// How long replication may take to bring what is on its way, before a range is left to the next round.
const SETTLE: Duration = Duration::from_secs(10);
/// The longest silence of a source.
const SILENCE: Duration = Duration::from_secs(30);

/// Compares the replica with its peers again and again, for as long as it is open.
pub async fn run(keyspace: &Arc<Keyspace>, replica: &Arc<Replica>) {
    loop {
        tokio::time::sleep(keyspace.env().jitter(EVERY)).await;
        let done = round(keyspace, replica, BACKGROUND, |_| ()).await;
        tracing::info!(
            keyspace = keyspace.uid(),
            replica = format!("{:016x}", replica.id),
            ranges = done.ranges,
            divergent = done.divergent,
            records = done.records,
            troubles = ?done.troubles,
            "compared with the other replicas of the shard"
        );
    }
}

// ---- what a range holds

/// Where a walk stops at the latest.
#[derive(Clone, Copy)]
struct Limit {
    rows: usize,
    bytes: u64,
}

impl Limit {
    const NONE: Self = Self { rows: usize::MAX, bytes: u64::MAX };
}

/// A hash over records in key order.
struct Digest {
    records: u64,
    hash: Xxh64,
}

impl Digest {
    fn new() -> Self {
        Self { records: 0, hash: Xxh64::new(0) }
    }

    fn add(&mut self, key: &[u8], encoded: &[u8]) {
        self.records += 1;
        // With their lengths, so that no two lists of records are the same bytes.
        for part in [key, encoded] {
            self.hash.update(&(part.len() as u64).to_be_bytes());
            self.hash.update(part);
        }
    }

    fn value(&self) -> (u64, u64) {
        (self.records, self.hash.digest())
    }
}

/// A part of a replica's keys: after `after`, up to and with `last`.
#[derive(Clone, Default)]
struct Range {
    after: Option<Bytes>,
    last: Option<Bytes>,
    /// When it is looked at: what has expired by then does not count.
    now_ms: u64,
}

/// What was found in a range.
struct Found {
    /// How many records count, and their hash.
    value: (u64, u64),
    /// What was read.
    bytes: u64,
    /// The limit was met at this key; `None`: all of the range was looked at.
    reached: Option<Bytes>,
}

/// Walks a range. What may be collected does not count, since it may be gone from one replica and not
/// yet from another; neither does what is not of the place's shard, since Clean up deletes it. `each` is given every
/// record of the shard, with its seq. Blocks.
fn walk(
    engine: &Engine,
    place: &Place<'_>,
    range: &Range,
    limit: Limit,
    mut each: impl FnMut(&[u8], u64, &[u8]),
) -> Result<Found, engine::Error> {
    let mut digest = Digest::new();
    let (mut rows, mut bytes, mut reached) = (0, 0, None);
    // A pin, so that a walk over everything does not push what clients read out of the cache.
    engine.pin().rows(range.after.as_deref(), |key, seq, encoded| {
        if range.last.as_deref().is_some_and(|last| key > last) {
            return false;
        }
        rows += 1;
        bytes += (key.len() + encoded.len()) as u64;
        if glance(encoded).is_ok_and(|seen| place.owns(seen.partition_hash)) {
            each(key, seq, encoded);
            if !may_be_collected(encoded, range.now_ms) {
                digest.add(key, encoded);
            }
        }
        let more = rows < limit.rows && bytes < limit.bytes;
        if !more {
            reached = Some(Bytes::copy_from_slice(key));
        }
        more
    })?;
    // The end of the range was met exactly.
    if reached == range.last {
        reached = None;
    }
    Ok(Found { value: digest.value(), bytes, reached })
}

fn may_be_collected(encoded: &[u8], now_ms: u64) -> bool {
    Record::decode(Bytes::copy_from_slice(encoded)).is_ok_and(|record| record.may_be_collected(now_ms, 0))
}

/// How many records of its shard the replica holds (such as may be collected by `now_ms` left out), and
/// their hash: equal on replicas that have converged. Blocks, and reads everything.
pub fn content(replica: &Replica, topology: &Topology, now_ms: u64) -> Result<(u64, u64), engine::Error> {
    let Some(place) = topology.current.as_ref().and_then(|v| v.place(replica.id)) else {
        return Ok(Digest::new().value());
    };
    let range = Range { now_ms, ..Range::default() };
    walk(&replica.engine, &place, &range, Limit::NONE, |_, _, _| ()).map(|found| found.value)
}

/// Whether two replicas can be compared: nothing is changing, and both have the same shard.
fn comparable(topology: &Topology, a: u64, b: u64) -> bool {
    let place = |id| topology.current.as_ref().and_then(|v| v.place(id)).map(|p| p.shard);
    topology.phase() == Phase::Stable && place(a).is_some() && place(a) == place(b)
}

// ---- the source's side

/// Answers one comparison.
pub async fn serve(
    keyspace: Arc<Keyspace>,
    replica: Arc<Replica>,
    request: CompareRequest,
    out: mpsc::Sender<Result<CompareResponse, Status>>,
) {
    let topology = keyspace.topology();
    let refused = if topology.version != request.version {
        Some(format!("version {} is compared here, not {}", topology.version, request.version))
    } else if !comparable(&topology, request.source, request.follower) {
        Some("a change is under way, or they are not of one shard".to_owned())
    } else {
        replica.progress.fault().map(|_| replica.progress.fault_text())
    };
    if let Some(why) = refused {
        let _ = out.send(Err(Status::failed_precondition(why))).await;
        return;
    }
    let reading = replica.clone();
    let answered = keyspace.env().blocking(move || answer(&reading, &topology, &request)).await;
    match answered {
        Ok(Ok(messages)) => {
            for message in messages {
                if out.send(Ok(message)).await.is_err() {
                    return;
                }
            }
        }
        Ok(Err(error)) => {
            replica.progress.failed(&error);
            let _ = out.send(Err(Status::data_loss(error.to_string()))).await;
        }
        Err(_) => {}
    }
}

fn answer(
    replica: &Replica,
    topology: &Topology,
    request: &CompareRequest,
) -> Result<Vec<CompareResponse>, engine::Error> {
    let Some(place) = topology.current.as_ref().and_then(|v| v.place(replica.id)) else { return Ok(Vec::new()) };
    let range = Range { after: request.after.clone(), last: request.last.clone(), now_ms: request.now_ms };
    let (mut records, mut newest) = (Vec::new(), 0);
    let found = walk(&replica.engine, &place, &range, ANSWER, |key, seq, encoded| {
        newest = newest.max(seq);
        records.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(encoded)));
    })?;
    if found.reached.is_none() && found.value == (request.records, request.hash) {
        return Ok(vec![CompareResponse { equal: true, ..CompareResponse::default() }]);
    }
    let records = records.into_iter().flat_map(|(key, encoded)| shipped(key, encoded)).collect();
    let whole = CompareResponse {
        equal: false,
        records: Vec::new(),
        reached: found.reached,
        epoch: replica.progress.birth().epoch,
        // A row may be seen before its seq is told.
        seq: newest.max(replica.progress.last_seq()),
        clock: replica.progress.clock(),
        origin: replica.origin,
    };
    Ok(in_messages(records).into_iter().map(|records| CompareResponse { records, ..whole.clone() }).collect())
}

// ---- the follower's side

/// Why a peer was not compared to the end.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("a change is under way")]
    Changing,
    #[error("this replica takes no more writes")]
    Faulty,
    #[error("no address of {0} is known")]
    NoAddress(String),
    #[error(transparent)]
    Connect(#[from] tonic::transport::Error),
    #[error("{0}")]
    Status(#[from] Status),
    #[error("silent for {SILENCE:?}")]
    Silent,
    #[error("a record can't be read: {0}")]
    Record(#[from] crate::record::DecodeError),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error("can't join in what is missing: {0}")]
    Apply(String),
    #[error("replication has not brought what was on its way within {SETTLE:?}: some ranges were left out")]
    Unsettled,
    #[error("the store is stopping")]
    Stopping,
}

/// Compares a replica with each other of its shard, once, reading `rate` bytes a second, and joins in
/// what it lacks. Returns the totals, which `tell` is told on the way.
pub async fn round(
    keyspace: &Arc<Keyspace>,
    replica: &Arc<Replica>,
    rate: u64,
    mut tell: impl FnMut(&RepairResponse),
) -> RepairResponse {
    let _turn = replica.repair_turn.lock().await;
    let mut totals = RepairResponse::default();
    let topology = keyspace.topology();
    let places = topology.current.iter().flat_map(View::places);
    for place in places.filter(|p| comparable(&topology, replica.id, p.assignment.replica)) {
        let (source, store) = (place.assignment.replica, &place.assignment.store);
        if source == replica.id {
            continue;
        }
        let mut pass = Pass { keyspace, replica, source, store, rate };
        if let Err(trouble) = pass.run(&mut totals, &mut tell).await {
            totals.troubles.push(format!("{store}: {trouble}"));
        }
        tell(&totals);
    }
    if topology.phase() != Phase::Stable {
        totals.troubles.push(Trouble::Changing.to_string());
    }
    if totals.troubles.is_empty() {
        replica.progress.set_compared_ms(keyspace.env().now_ms());
    }
    totals
}

/// One replica's way along all ranges with one peer.
struct Pass<'a> {
    keyspace: &'a Arc<Keyspace>,
    replica: &'a Arc<Replica>,
    source: u64,
    store: &'a str,
    rate: u64,
}

/// What the peer has in a range that differs.
struct Theirs {
    records: Vec<Shipped>,
    /// Everything that the records hold came before this.
    end: CompareResponse,
}

impl Pass<'_> {
    async fn run(
        &mut self,
        totals: &mut RepairResponse,
        tell: &mut impl FnMut(&RepairResponse),
    ) -> Result<(), Trouble> {
        let (counts, mut after, mut unsettled) = (self.keyspace.counts(), None, false);
        loop {
            let begin = Instant::now();
            let now_ms = self.keyspace.env().now_ms();
            let topology = self.keyspace.topology();
            if !comparable(&topology, self.replica.id, self.source) {
                return Err(Trouble::Changing);
            }
            let mut range = Range { after, last: None, now_ms };
            let mine = self.mine(&topology, range.clone()).await?;
            range.last = mine.reached.clone();
            let theirs = self.ask(&topology, &range, &mine).await?;
            totals.ranges += 1;
            counts.ranges_compared.inc();
            let mut bytes = mine.bytes;
            after = mine.reached.clone();
            if let Some(theirs) = theirs {
                bytes += theirs.records.iter().map(follow::size).sum::<usize>() as u64;
                after = theirs.end.reached.clone().or(after);
                match self.mend(theirs, &topology, &range, &mine).await {
                    Ok(0) => {}
                    Ok(records) => {
                        totals.divergent += 1;
                        totals.records += records;
                        counts.ranges_divergent.inc();
                        counts.records_repaired.inc_by(records);
                    }
                    Err(Trouble::Unsettled) => unsettled = true,
                    Err(trouble) => return Err(trouble),
                }
            }
            tell(totals);
            if after.is_none() {
                return if unsettled { Err(Trouble::Unsettled) } else { Ok(()) };
            }
            let pace = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            tokio::time::sleep_until(begin + pace).await;
        }
    }

    /// What this replica has in the next range.
    async fn mine(&self, topology: &Arc<Topology>, range: Range) -> Result<Found, Trouble> {
        if self.replica.progress.fault().is_some() {
            return Err(Trouble::Faulty);
        }
        let (replica, topology) = (self.replica.clone(), topology.clone());
        let found = self.keyspace.env().blocking(move || {
            let place = topology.current.as_ref().and_then(|v| v.place(replica.id)).ok_or(Trouble::Changing)?;
            Ok(walk(&replica.engine, &place, &range, RANGE, |_, _, _| ())?)
        });
        self.read(found.await.unwrap_or(Err(Trouble::Stopping)))
    }

    /// Damage that a walk meets is noted.
    fn read<T>(&self, result: Result<T, Trouble>) -> Result<T, Trouble> {
        result.inspect_err(|trouble| {
            if let Trouble::Engine(error) = trouble {
                self.replica.progress.failed(error);
            }
        })
    }

    /// Asks the peer about a range; `None`: it has the same.
    async fn ask(&self, topology: &Topology, range: &Range, mine: &Found) -> Result<Option<Theirs>, Trouble> {
        let address = self.keyspace.address(self.store).ok_or_else(|| Trouble::NoAddress(self.store.to_owned()))?;
        let mut client =
            PeerClient::new(self.keyspace.env().dial(&address)?).max_decoding_message_size(crate::MESSAGE_LIMIT);
        let request = CompareRequest {
            keyspace: self.keyspace.uid().to_owned(),
            source: self.source,
            follower: self.replica.id,
            version: topology.version,
            after: range.after.clone(),
            last: range.last.clone(),
            now_ms: range.now_ms,
            records: mine.value.0,
            hash: mine.value.1,
        };
        let asked = tokio::time::timeout(SILENCE, client.compare(request)).await;
        let mut responses = asked.map_err(|_| Trouble::Silent)??.into_inner();
        let mut theirs: Option<Theirs> = None;
        while let Some(response) = tokio::time::timeout(SILENCE, responses.next()).await.map_err(|_| Trouble::Silent)? {
            let mut response = response?;
            if response.equal {
                return Ok(None);
            }
            let records = std::mem::take(&mut response.records);
            match &mut theirs {
                Some(theirs) => theirs.records.extend(records),
                None => theirs = Some(Theirs { records, end: response }),
            }
        }
        theirs.map(Some).ok_or(Trouble::Stopping)
    }

    /// Joins in what this replica lacks of what the peer has; says how many records that were.
    ///
    /// What is merely on its way is no divergence. Whoever has passed the peer's position was sent every row as it
    /// was then, but for those that have changed since: their later change carries them. So the peer is asked
    /// again after that, and what stands there as before should be here.
    async fn mend(&self, theirs: Theirs, topology: &Topology, range: &Range, mine: &Found) -> Result<u64, Trouble> {
        let Theirs { records, end } = theirs;
        let maybe = self.lacking(decoded(records)?, range.now_ms).await?;
        if maybe.is_empty() {
            return Ok(0);
        }
        let until = Instant::now() + SETTLE;
        while !self.replica.progress.position(self.source).is_some_and(|p| p.epoch == end.epoch && p.seq >= end.seq) {
            if Instant::now() >= until {
                return Err(Trouble::Unsettled);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut records = self.lacking(maybe, range.now_ms).await?;
        if records.is_empty() {
            return Ok(0);
        }
        let Some(again) = self.ask(topology, range, mine).await? else { return Ok(0) };
        let again: BTreeSet<(Bytes, Bytes)> = again.records.into_iter().map(|s| (s.key, s.record)).collect();
        records.retain(|(key, record)| again.contains(&(key.clone(), record.encoded().into())));
        let keys: BTreeSet<&Bytes> = records.iter().map(|(key, _)| key).collect();
        let count = keys.len() as u64;
        if count == 0 {
            return Ok(0);
        }
        tracing::warn!(
            keyspace = self.keyspace.uid(),
            replica = format!("{:016x}", self.replica.id),
            source = self.store,
            records = count,
            first = %keys.first().map(|key| key.escape_ascii().to_string()).unwrap_or_default(),
            "records were lost or altered here; they are joined in from another replica"
        );
        let batch = PeerBatch { from: end.origin, records, positions: Vec::new(), clock: end.clock, asked: None };
        self.replica.apply(batch).await.map_err(|refused| Trouble::Apply(refused.message))?;
        Ok(count)
    }

    async fn lacking(&self, records: Vec<(Bytes, Record)>, now_ms: u64) -> Result<Vec<(Bytes, Record)>, Trouble> {
        let replica = self.replica.clone();
        let found = self.keyspace.env().blocking(move || lacking(&replica.engine, records, now_ms));
        self.read(found.await.unwrap_or(Err(Trouble::Stopping)))
    }
}

fn decoded(records: Vec<Shipped>) -> Result<Vec<(Bytes, Record)>, Trouble> {
    records.into_iter().map(|s| Ok((s.key, Record::decode(s.record)?))).collect()
}

/// Which of these would change what the replica holds, other than by what may be collected.
fn lacking(engine: &Engine, records: Vec<(Bytes, Record)>, now_ms: u64) -> Result<Vec<(Bytes, Record)>, Trouble> {
    let mut found = Vec::new();
    for (key, theirs) in records {
        let mine = engine.row(&key)?.map(|row| Record::decode(row.record)).transpose()?;
        // Both read as nothing, and may go at any time.
        let nothing = |record: &Record| record.may_be_collected(now_ms, 0);
        if nothing(&theirs) && mine.as_ref().is_none_or(nothing) {
            continue;
        }
        if mine.clone().is_none_or(|mine| join(mine.clone(), theirs.clone()) != mine) {
            found.push((key, theirs));
        }
    }
    Ok(found)
}
