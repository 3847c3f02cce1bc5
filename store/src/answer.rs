//! Clients' operations, a message of them at a time: each goes to the replica here that its key belongs to, writes
//! by its writer, reads by memory at once where that has them, and answers leave in one go.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt};
use tokio::time::Instant;
use tonic::{Status, Streaming};
use vasto_client::env::Env;
use vasto_client::hash::partition_hash;
use vasto_client::v1::{
    Answer, Batch, Failure, FailureCode, KeyspaceUpdate, Missing, Operation, Value, Written, answer, value,
};

use crate::engine::{Reach, Row};
use crate::host::Host;
use crate::keyspace::{Keyspace, Routes};
use crate::merge::{Limits, LocalOp};
use crate::metrics::{Counts, Ending, Operation as Kind, Part, Tally};
use crate::record::{Content, Record, Stamp, View};
use crate::replica::Replica;
use crate::writer::{LocalWrite, Refused, Taken};

/// Messages of one pipe that are worked on at once; more wait in the connection.
const MESSAGES: usize = 64;
/// Answers of several messages leave together up to this many.
const TOGETHER: usize = 64;
/// Bytes of answers in one message; one answer may go beyond.
const ANSWER_BYTES: usize = 4 << 20;
/// The largest value that one answer holds.
pub(crate) const VALUE_BYTES: usize = 15 << 20;
/// After so many reads by memory alone, whoever else is served on the same thread has a turn.
const READ_AT_ONCE: usize = 256;
/// A message's reads beyond memory are shared out to so many threads at most, so that the disk has several of them at
/// once.
const READERS: u64 = 4;
/// There is a thread for each such part of what one of those reads takes. Small rows that come from the system's page
/// cache take less than two, and are best read by one thread.
const READ_PART: Duration = Duration::from_micros(25);

/// Answers operations. Cheap to clone.
#[derive(Clone)]
pub struct Answerer {
    host: Arc<Host>,
    env: Env,
    counts: Arc<Counts>,
    pace: Arc<Pace>,
}

impl Answerer {
    /// By what the host holds.
    pub fn new(host: Arc<Host>, env: Env, counts: Arc<Counts>) -> Self {
        Self { host, env, counts, pace: Arc::default() }
    }

    /// Answers one message, in any order.
    pub async fn answer(self, operations: Vec<Operation>) -> Vec<Answer> {
        let (work, mut answers) = self.sort(operations);
        let now = self.env.now_ms();
        if let Some(work) = work.first() {
            work.keyspace.serves(now);
        }
        for work in work.iter().filter(|work| !work.writes.is_empty()) {
            // A caller tells the greatest stamp of others than the replica that it takes for the shard's. It may know
            // an older topology than this store, and have its stamps from another replica here.
            work.replica.progress.pass(work.keyspace.clock_beside(work.replica.id));
        }
        let done = futures::future::join_all(work.into_iter().map(|w| w.run(now, &self.counts, &self.pace))).await;
        done.into_iter().for_each(|done| append(&mut answers, done));
        answers
    }

    /// What each replica has to do, and the answers to what is refused.
    fn sort(&self, operations: Vec<Operation>) -> (Vec<Work>, Vec<Answer>) {
        let (mut work, mut answers) = (Vec::<Work>::new(), Vec::new());
        let mut refused = Tally::default();
        let mut operations = operations.into_iter().peekable();
        while let Some(first) = operations.peek() {
            // Neighbours are nearly always of one keyspace.
            let uid = first.keyspace.clone();
            let keyspace = std::str::from_utf8(&uid).ok().and_then(|uid| self.host.keyspace(uid));
            let routes = keyspace.as_ref().map(|keyspace| (keyspace, keyspace.routes()));
            while let Some(operation) = operations.next_if(|next| next.keyspace == uid) {
                let id = operation.id;
                let kind = operation.kind.as_ref().map(Kind::of);
                let placed = match &routes {
                    Some((keyspace, routes)) => {
                        self.place(keyspace, routes, operation).map(|placed| (keyspace, placed))
                    }
                    None => Err(failure(FailureCode::WrongShard, "this store has nothing of the keyspace", None)),
                };
                match placed {
                    Ok((keyspace, (replica, Placed::Read(read)))) => {
                        here(&mut work, keyspace, replica).reads.push((id, read))
                    }
                    Ok((keyspace, (replica, Placed::Write(kind, write)))) => {
                        let work = here(&mut work, keyspace, replica);
                        work.ids.push((id, kind));
                        work.writes.push(write);
                    }
                    Err(failure) => {
                        if let Some(kind) = kind {
                            refused.add(kind, Ending::of(failure.code()));
                        }
                        answers.push(failed(id, failure));
                    }
                }
            }
        }
        if !answers.is_empty() {
            self.counts.add(&refused);
        }
        (work, answers)
    }

    /// The replica here that an operation belongs to, and what that has to do; or why it is refused.
    fn place<'a>(
        &self,
        keyspace: &Keyspace,
        routes: &'a Routes<'_>,
        operation: Operation,
    ) -> Result<(&'a Arc<Replica>, Placed), Box<Failure>> {
        let hash = partition_hash(operation.partition_key.as_ref().unwrap_or(&operation.key));
        let named_partition = operation.partition_key.as_ref().is_some_and(|p| *p != operation.key);
        if let Err(refusal) = Limits::default().check_key(&operation.key) {
            return Err(failure(refusal.code(), refusal.to_string(), None));
        }
        let Some(replica) = routes.route(hash) else {
            let message = format!("by topology version {} this key's shard is not on this store", routes.version());
            // A place that is not ready yet is one in the topology.
            let newer = Some(routes.update());
            return Err(failure(FailureCode::WrongShard, message, newer));
        };
        let after = operation.after.map(Stamp::from);
        let (head, returning) = (operation.head, operation.returning());
        let key = operation.key;
        let Some(kind) = operation.kind else {
            let message = "the operation has no kind: say get, put, delete, merge, append or expire";
            return Err(failure(FailureCode::Invalid, message, None));
        };
        let asked = Kind::of(&kind);
        let op = match LocalOp::from_wire(kind, hash) {
            Ok(None) => return Ok((replica, Placed::Read(Read { key, hash, head }))),
            Ok(Some(op)) => op,
            Err(refusal) => return Err(failure(refusal.code(), refusal.to_string(), None)),
        };
        if self.host.is_leaving() {
            let refused = Refused::leaving();
            return Err(failure(refused.code, refused.message, None));
        }
        if !keyspace.is_confirmed() {
            let message = "the store has restarted and waits to learn the current topology";
            return Err(failure(FailureCode::NotReady, message, None));
        }
        let write = LocalWrite { key, op, after, named_partition, returning, head };
        Ok((replica, Placed::Write(asked, write)))
    }
}

enum Placed {
    Read(Read),
    Write(Kind, LocalWrite),
}

struct Read {
    key: Bytes,
    hash: u64,
    head: bool,
}

/// What one replica has to do of a message.
struct Work {
    keyspace: Arc<Keyspace>,
    replica: Arc<Replica>,
    reads: Vec<(u64, Read)>,
    /// Of the writes, in their order.
    ids: Vec<(u64, Kind)>,
    writes: Vec<LocalWrite>,
}

/// The part of this replica.
fn here<'a>(work: &'a mut Vec<Work>, keyspace: &Arc<Keyspace>, replica: &Arc<Replica>) -> &'a mut Work {
    let known = work.iter().position(|work| Arc::ptr_eq(&work.replica, replica));
    let at = known.unwrap_or_else(|| {
        let (keyspace, replica) = (keyspace.clone(), replica.clone());
        work.push(Work { keyspace, replica, reads: Vec::new(), ids: Vec::new(), writes: Vec::new() });
        work.len() - 1
    });
    &mut work[at]
}

impl Work {
    async fn run(self, now: u64, counts: &Counts, pace: &Arc<Pace>) -> Vec<Answer> {
        let Self { keyspace, replica, reads, ids, writes } = self;
        let mut tally = Tally::default();
        let writing = async {
            if writes.is_empty() {
                return Vec::new();
            }
            let begin = Instant::now();
            let results = replica.write(writes).await;
            counts.took(Part::Write, begin.elapsed());
            let answers = results.into_iter().zip(&ids);
            let answers = answers.map(|(result, (id, _))| written(&keyspace, &replica, *id, result));
            answers.collect()
        };
        let reading = async {
            if reads.is_empty() {
                return Vec::new();
            }
            let begin = Instant::now();
            let answers = read(keyspace.env(), &replica, reads, now, pace).await;
            counts.took(Part::Read, begin.elapsed());
            answers
        };
        // The writes first: the writer works on them while memory is read here.
        let (written, read): (Vec<Answer>, Vec<Answer>) = tokio::join!(writing, reading);
        written.iter().zip(&ids).for_each(|(answer, (_, kind))| tally.add(*kind, ending(answer)));
        read.iter().for_each(|answer| tally.add(Kind::Get, ending(answer)));
        counts.add(&tally);
        let mut answers = written;
        append(&mut answers, read);
        answers
    }
}

/// Reads what memory has on the spot, and the rest on threads that may wait for the disk.
async fn read(env: &Env, replica: &Arc<Replica>, reads: Vec<(u64, Read)>, now: u64, pace: &Arc<Pace>) -> Vec<Answer> {
    let (mut answers, mut left) = (Vec::new(), Vec::new());
    let mut reads = reads;
    loop {
        let rest = reads.split_off(reads.len().min(READ_AT_ONCE));
        let (found, missed) = look(replica, reads, Reach::Memory, now);
        // Where memory has but little of it, the rest is not looked for there.
        let cold = missed.len() > found.len();
        append(&mut answers, found);
        append(&mut left, missed);
        if rest.is_empty() {
            break;
        }
        if cold {
            left.extend(rest);
            break;
        }
        tokio::task::yield_now().await;
        reads = rest;
    }
    if left.is_empty() {
        return answers;
    }
    let parts = in_parts(left, pace.readers());
    let looking = parts.into_iter().map(|part| look_further(env, replica, part, now, pace));
    futures::future::join_all(looking).await.into_iter().for_each(|more| append(&mut answers, more));
    answers
}

/// Reads on a thread that may wait for the disk.
async fn look_further(
    env: &Env,
    replica: &Arc<Replica>,
    reads: Vec<(u64, Read)>,
    now: u64,
    pace: &Arc<Pace>,
) -> Vec<Answer> {
    let ids: Vec<u64> = reads.iter().map(|(id, _)| *id).collect();
    let (replica, pace) = (replica.clone(), pace.clone());
    let looking = move || {
        let (begin, rows) = (Instant::now(), reads.len());
        let looked = look(&replica, reads, Reach::Disk, now);
        pace.took(rows, begin.elapsed());
        looked
    };
    match env.blocking(looking).await {
        Ok((answers, _)) => answers,
        Err(_) => {
            let failed = |id| failed(id, failure(FailureCode::Internal, "the read failed", None));
            ids.into_iter().map(failed).collect()
        }
    }
}

/// How long a store's reads beyond memory take.
#[derive(Default)]
struct Pace {
    /// Nanoseconds a row, smoothed.
    row: AtomicU64,
}

impl Pace {
    /// How many threads share those of a message.
    fn readers(&self) -> usize {
        (self.row.load(Relaxed) / READ_PART.as_nanos() as u64).clamp(1, READERS) as usize
    }

    /// So many rows took one thread so long.
    fn took(&self, rows: usize, time: Duration) {
        let row = time.as_nanos() as u64 / rows.max(1) as u64;
        // Those of two threads at the same time may count as one.
        self.row.store((self.row.load(Relaxed) * 7 + row) / 8, Relaxed);
    }
}

/// Shares out to so many at most, evenly.
fn in_parts<T>(mut all: Vec<T>, most: usize) -> Vec<Vec<T>> {
    let share = all.len().div_ceil(most);
    let mut parts = Vec::new();
    while !all.is_empty() {
        let rest = all.split_off(all.len().min(share));
        parts.push(std::mem::replace(&mut all, rest));
    }
    parts
}

/// All of `more` behind `all`; without a copy where there is nothing yet.
fn append<T>(all: &mut Vec<T>, mut more: Vec<T>) {
    if all.is_empty() {
        *all = more;
    } else {
        all.append(&mut more);
    }
}

/// The answers to reads, and the reads that have to go further.
fn look(replica: &Replica, reads: Vec<(u64, Read)>, reach: Reach, now: u64) -> (Vec<Answer>, Vec<(u64, Read)>) {
    let keys: Vec<&[u8]> = reads.iter().map(|(_, read)| &read.key[..]).collect();
    let rows = replica.engine.rows_of(&keys, reach);
    let (mut answers, mut left) = (Vec::with_capacity(reads.len()), Vec::new());
    for ((id, read), row) in reads.into_iter().zip(rows) {
        match row {
            None => left.push((id, read)),
            Some(row) => {
                let row = row.inspect_err(|e| replica.progress.failed(e)).map_err(|e| e.to_string());
                answers.push(Answer { id, result: Some(found(replica, row, &read, now)) });
            }
        }
    }
    (answers, left)
}

fn found(replica: &Replica, row: Result<Option<Row>, String>, asked: &Read, now: u64) -> answer::Result {
    let decoded = row.and_then(|row| match row {
        Some(row) => Record::decode(row.record).map(Some).map_err(|e| e.to_string()),
        None => Ok(None),
    });
    match decoded {
        // Under another partition key it is another key's.
        Ok(Some(record)) if record.partition_hash() == asked.hash => match to_value(record.read(now), asked.head) {
            Some(value) if value_len(&value) > VALUE_BYTES => answer::Result::Failure(too_large(value_len(&value))),
            Some(value) => answer::Result::Found(value),
            None => answer::Result::Missing(Missing {}),
        },
        Ok(_) => answer::Result::Missing(Missing {}),
        Err(error) => {
            tracing::error!(replica = replica.id, error, "a record can't be read");
            answer::Result::Failure(failure(FailureCode::Internal, error, None))
        }
    }
}

fn ending(answer: &Answer) -> Ending {
    match &answer.result {
        Some(answer::Result::Failure(failure)) => Ending::of(failure.code()),
        _ => Ending::Ok,
    }
}

pub(crate) fn value_len(value: &Value) -> usize {
    match &value.value {
        Some(value::Value::Bytes(bytes)) => bytes.len(),
        _ => 8,
    }
}

/// Callers are held to less, but appends through different replicas add up.
pub(crate) fn too_large(len: usize) -> Box<Failure> {
    let message = format!(
        "the value has grown to {len} bytes by appends through several stores, more than one message holds: put or delete the key"
    );
    failure(FailureCode::Invalid, message, None)
}

/// What is answered of what a key holds, or of its head; none if that is nothing.
pub(crate) fn to_value(view: View, head: bool) -> Option<Value> {
    let (value, size) = match view.content {
        Content::Nothing => return None,
        Content::Bytes(bytes) if head => (value::Value::Bytes(Bytes::new()), Some(bytes.len() as u64)),
        Content::Bytes(bytes) => (value::Value::Bytes(bytes), None),
        Content::Number(number) => (value::Value::Number(number.get()), None),
    };
    Some(Value { value: Some(value), expiry_ms: view.expiry_ms, stamp: Some(view.stamp.into()), size })
}

fn written(keyspace: &Keyspace, replica: &Replica, id: u64, result: Result<Taken, Refused>) -> Answer {
    match result {
        Ok(Taken { stamp, view, left_out }) => {
            let head = matches!(&view, Some(View { content: Content::Bytes(b), .. }) if b.len() > VALUE_BYTES);
            let value = view.and_then(|view| to_value(view, head));
            let value = value.map(|value| Box::new(Value { size: left_out.or(value.size), ..value }));
            let written = Written { stamp: Some(stamp.into()), replica: replica.id, value };
            Answer { id, result: Some(answer::Result::Written(written)) }
        }
        Err(refused) => {
            let topology = (refused.code == FailureCode::WrongShard).then(|| keyspace.update());
            failed(id, failure(refused.code, refused.message, topology))
        }
    }
}

fn failed(id: u64, failure: Box<Failure>) -> Answer {
    Answer { id, result: Some(answer::Result::Failure(failure)) }
}

pub(crate) fn failure(
    code: FailureCode,
    message: impl Into<String>,
    topology: Option<Arc<KeyspaceUpdate>>,
) -> Box<Failure> {
    Box::new(Failure { code: code.into(), message: message.into(), topology: topology.map(|t| (*t).clone()) })
}

/// Roughly an answer's bytes on the wire: values have up to 8 MiB each.
fn size(answer: &Answer) -> usize {
    let value = match &answer.result {
        Some(answer::Result::Found(value)) => Some(value),
        Some(answer::Result::Written(written)) => written.value.as_deref(),
        _ => None,
    };
    64 + value.map_or(0, value_len)
}

/// A pipe's answers: takes messages as they come, and tells together what is ready at the same time.
pub(crate) struct Answering<F, B> {
    answerer: Answerer,
    /// `None`: the client has said all.
    messages: Option<Streaming<Batch>>,
    begin: B,
    working: FuturesUnordered<F>,
    ready: std::vec::IntoIter<Vec<Answer>>,
}

impl Answerer {
    /// Answers the messages of one pipe. While all places are taken, the connection itself holds the client back.
    pub(crate) fn pipe(self, messages: Streaming<Batch>) -> impl Stream<Item = Result<Batch, Status>> + Send {
        let begin = |answerer: &Answerer, batch: Batch| answerer.clone().answer(batch.operations);
        Answering {
            answerer: self,
            messages: Some(messages),
            begin,
            working: FuturesUnordered::new(),
            ready: Vec::new().into_iter(),
        }
    }
}

impl<F, B> Stream for Answering<F, B>
where
    F: Future<Output = Vec<Answer>>,
    B: Fn(&Answerer, Batch) -> F + Unpin,
{
    type Item = Result<Batch, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(answers) = this.ready.next() {
            return Poll::Ready(Some(Ok(Batch { operations: Vec::new(), answers })));
        }
        let mut answers = Vec::new();
        loop {
            // What comes in small messages is answered together; large ones one by one, so that the client works on
            // one while the next is worked on here.
            while let Poll::Ready(Some(more)) = this.working.poll_next_unpin(context) {
                append(&mut answers, more);
                if answers.len() >= TOGETHER {
                    break;
                }
            }
            let Some(messages) =
                this.messages.as_mut().filter(|_| this.working.len() < MESSAGES && answers.len() < TOGETHER)
            else {
                break;
            };
            match messages.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(batch))) => this.working.push((this.begin)(&this.answerer, batch)),
                Poll::Ready(_) => this.messages = None,
                Poll::Pending => break,
            }
        }
        if !answers.is_empty() {
            this.ready = crate::in_messages(answers, ANSWER_BYTES, size).into_iter();
            let first = this.ready.next().unwrap_or_default();
            return Poll::Ready(Some(Ok(Batch { operations: Vec::new(), answers: first })));
        }
        if this.messages.is_none() && this.working.is_empty() { Poll::Ready(None) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_beyond_memory_are_shared_out_to_more_threads_the_longer_they_take() {
        let micros = |row: u64, rows: u64| Duration::from_micros(row * rows);
        let pace = Pace::default();
        let mut readers = Vec::new();
        for row in [20, 80, 1_000, 10] {
            (0..100).for_each(|_| pace.took(16, micros(row, 16)));
            readers.push(pace.readers());
        }
        assert_eq!(readers, [1, 3, 4, 1]);
    }

    #[tokio::test]
    async fn all_that_is_read_beyond_memory_is_answered_whoever_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let keys: Vec<Bytes> = (0..20).map(|n| Bytes::from(format!("key-{n}"))).collect();
        let replica = crate::tests::with_rows(dir.path(), &keys[..15]).await;
        let reads = keys
            .iter()
            .zip(0..)
            .map(|(key, id)| (id, Read { key: key.clone(), hash: partition_hash(key), head: false }));
        let pace = Arc::new(Pace { row: AtomicU64::new(1_000_000) });
        assert_eq!(pace.readers() as u64, READERS);
        let answers = read(&Env::real(), &replica, reads.collect(), 1, &pace).await;
        assert_ne!(pace.row.load(Relaxed), 1_000_000, "none was beyond memory");
        let mut found: Vec<_> =
            answers.iter().map(|a| (a.id, matches!(a.result, Some(answer::Result::Found(_))))).collect();
        found.sort();
        assert_eq!(found, (0..20).map(|id| (id, id < 15)).collect::<Vec<_>>());
    }

    #[test]
    fn each_is_in_one_part() {
        let lengths = |all: usize, most| {
            let parts = in_parts((0..all).collect(), most);
            assert_eq!(parts.concat(), (0..all).collect::<Vec<_>>());
            parts.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(lengths(0, 4), [0; 0]);
        assert_eq!(lengths(3, 4), [1, 1, 1]);
        assert_eq!(lengths(16, 4), [4, 4, 4, 4]);
        assert_eq!(lengths(9, 4), [3, 3, 3]);
        assert_eq!(lengths(5, 1), [5]);
    }
}
