//! The hot path to one store: a `Pipe` stream that carries as many operations
//! a message as were waiting. The connection itself pulls from the queue when it
//! can send, so what queues meanwhile is the next message, and a lone caller
//! waits for nothing. An operation that still stands in the queue was provably
//! not sent; that is what makes a merge safe to take elsewhere.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::hash::{BuildHasherDefault, Hasher};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::env::Env;
use crate::error::{describe, describe_transport};
use crate::op;
use crate::v1::store_client::StoreClient;
use crate::v1::{Answer, Batch, Operation, answer};

/// Message limit of every connection.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;
/// A message is closed at this size or number of operations; one operation may go beyond. So few that the store works on
/// one while the next is made, and answers the first while it works on the second.
const MESSAGE_BYTES: usize = 1 << 20;
const MESSAGE_OPERATIONS: usize = 128;
/// What may wait to be sent. The greatest operation alone always fits.
const QUEUE_BYTES: usize = 32 << 20;
const QUEUE_OPERATIONS: usize = 32 << 10;
/// How long without an answer is too long, at the least and at the most.
const TRY_LEAST: Duration = Duration::from_secs(1);
const TRY_MOST: Duration = Duration::from_secs(4);
/// How long a store that did not answer in time is asked last.
const SUSPECT: Duration = Duration::from_secs(1);

/// The queue is full: nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// The connection could not be made or broke before the answer came.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    /// Whether the operation may have left this process.
    pub(crate) sent: bool,
    pub(crate) reason: Arc<str>,
}

impl Broken {
    /// It was sent, and no answer came in time.
    pub(crate) fn late() -> Self {
        Self { sent: true, reason: "the store did not answer in time".into() }
    }
}

/// The answer to an operation, if it has one at all.
pub(crate) type Reply = Result<Option<answer::Result>, Broken>;

/// A store's hot path. Its task ends when it is dropped.
pub(crate) struct Pipe {
    shared: Arc<Shared>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the task that connects.
    work: Notify,
    /// False: `State::suspect_until` is none. Spares each operation a lock.
    suspect: AtomicBool,
    /// Smoothed time to an answer, in microseconds.
    pace: AtomicU64,
    /// `State::load`, as it was last; read without a lock.
    load: AtomicUsize,
    /// A connection serves.
    up: AtomicBool,
}

struct Queued {
    operation: Operation,
    size: usize,
    flight: Flight,
}

struct Flight {
    reply: oneshot::Sender<Reply>,
    since: Instant,
}

/// Ids count up, so one multiplication spreads them.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }
    fn write_u64(&mut self, id: u64) {
        self.0 = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[derive(Default)]
struct State {
    /// Not sent yet, ids rising.
    queue: VecDeque<Queued>,
    queued_bytes: usize,
    /// Sent and not answered yet.
    flights: HashMap<u64, Flight, BuildHasherDefault<IdHasher>>,
    last_id: u64,
    /// Counts connections, so that what is left of an old one finds nothing here.
    connection: u64,
    /// A connection is up or being made.
    connected: bool,
    /// Connect although nothing is queued.
    probe: bool,
    closed: bool,
    /// The connection's, when it waits for operations.
    sender: Option<Waker>,
    /// Until then other replicas are preferred.
    suspect_until: Option<Instant>,
    failures: u32,
}

impl State {
    fn push(&mut self, mut operation: Operation, since: Instant) -> Result<(u64, oneshot::Receiver<Reply>), Full> {
        let size = op::size(&operation.key, operation.partition_key.as_ref(), operation.kind.as_ref());
        let fits = self.queue.len() < QUEUE_OPERATIONS && self.queued_bytes + size <= QUEUE_BYTES;
        if !fits || self.closed {
            return Err(Full);
        }
        self.last_id += 1;
        operation.id = self.last_id;
        let (reply, receiver) = oneshot::channel();
        self.queued_bytes += size;
        self.queue.push_back(Queued { operation, size, flight: Flight { reply, since } });
        Ok((self.last_id, receiver))
    }

    /// The next message: what waits, up to the limits of one message.
    fn drain(&mut self) -> Vec<Operation> {
        let mut operations = Vec::with_capacity(self.queue.len().min(MESSAGE_OPERATIONS));
        let mut bytes = 0;
        while let Some(next) = self.queue.front() {
            let full = operations.len() == MESSAGE_OPERATIONS || bytes + next.size > MESSAGE_BYTES;
            if full && !operations.is_empty() {
                break;
            }
            bytes += next.size;
            if let Some(queued) = self.queue.pop_front() {
                self.queued_bytes -= queued.size;
                self.flights.insert(queued.operation.id, queued.flight);
                operations.push(queued.operation);
            }
        }
        operations
    }

    /// How many operations are queued or on their way.
    fn load(&self) -> usize {
        self.queue.len() + self.flights.len()
    }

    /// Forgets an operation; says whether it may have been sent.
    fn withdraw(&mut self, id: u64) -> bool {
        match self.queue.binary_search_by_key(&id, |q| q.operation.id) {
            Ok(index) => {
                if let Some(queued) = self.queue.remove(index) {
                    self.queued_bytes -= queued.size;
                }
                false
            }
            Err(_) => {
                self.flights.remove(&id);
                true
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn withdraw(&self, state: &mut State, id: u64) {
        state.withdraw(id);
        self.load.store(state.load(), Relaxed);
    }

    fn suspect_until(&self, state: &mut State, until: Option<Instant>) {
        state.suspect_until = until;
        self.suspect.store(until.is_some(), Relaxed);
    }

    fn answered(&self, answers: Vec<Answer>) {
        let mut done = Vec::with_capacity(answers.len());
        {
            let mut state = self.state();
            for answer in answers {
                // None: given up by its caller.
                if let Some(flight) = state.flights.remove(&answer.id) {
                    done.push((flight, answer.result));
                }
            }
            self.suspect_until(&mut state, None);
            self.load.store(state.load(), Relaxed);
        }
        if let Some((first, _)) = done.first() {
            // Only this connection's task writes it.
            let took = first.since.elapsed().as_micros() as u64;
            self.pace.store((self.pace.load(Relaxed) * 7 + took) / 8, Relaxed);
        }
        for (flight, result) in done {
            let _ = flight.reply.send(Ok(result));
        }
    }

    /// Ends the connection: nothing of it will be answered.
    fn broke(&self, reason: &str, closed: bool, pause: Duration) {
        let (queue, flights, sender) = {
            let mut state = self.state();
            state.connection += 1;
            state.connected = false;
            state.closed = closed;
            state.queued_bytes = 0;
            self.suspect_until(&mut state, Some(Instant::now() + pause));
            self.load.store(0, Relaxed);
            self.up.store(false, Relaxed);
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.flights), state.sender.take())
        };
        // So that it sees that it is over, and lets go of the connection.
        if let Some(sender) = sender {
            sender.wake();
        }
        let reason: Arc<str> = reason.into();
        for queued in queue {
            let _ = queued.flight.reply.send(Err(Broken { sent: false, reason: reason.clone() }));
        }
        for (_, flight) in flights {
            let _ = flight.reply.send(Err(Broken { sent: true, reason: reason.clone() }));
        }
    }

    /// Waits until there is a reason to connect, and takes it.
    async fn wanted(&self) -> u64 {
        loop {
            {
                let mut state = self.state();
                if state.probe || !state.queue.is_empty() {
                    state.probe = false;
                    state.connected = true;
                    return state.connection;
                }
            }
            self.work.notified().await;
        }
    }

    /// One connection from its making to its end; returns why it ended.
    async fn connection(self: &Arc<Self>, env: &Env, address: &str, connection: u64) -> String {
        let channel = match env.dial(address) {
            Ok(channel) => channel,
            Err(error) => return describe_transport(&error),
        };
        let mut client =
            StoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
        let (alive, mut stopped_reading) = oneshot::channel();
        let mut answers =
            match client.pipe(Outgoing { shared: self.clone(), connection, let_others: true, _alive: alive }).await {
                Ok(response) => response.into_inner(),
                Err(status) => return describe(&status),
            };
        {
            let mut state = self.state();
            self.suspect_until(&mut state, None);
            state.failures = 0;
            self.up.store(true, Relaxed);
        }
        tracing::debug!(address, "connected to a store");
        let read = async {
            loop {
                match answers.message().await {
                    Ok(Some(batch)) => self.answered(batch.answers),
                    Ok(None) => return "the store closed the connection".into(),
                    Err(status) => return describe(&status),
                }
            }
        };
        tokio::pin!(read);
        tokio::select! {
            reason = &mut read => reason,
            // Nothing can be sent any more: wait for what is on its way, not for more.
            _ = &mut stopped_reading => {
                tokio::time::timeout(TRY_LEAST, read).await.unwrap_or_else(|_| "the store stopped reading".into())
            }
        }
    }
}

/// Connects when there is something to send, until told to stop.
async fn run(shared: Arc<Shared>, env: Env, address: String, stop: CancellationToken) {
    let connections = async {
        loop {
            let connection = shared.wanted().await;
            let reason = shared.connection(&env, &address, connection).await;
            tracing::debug!(address, reason, "lost a store");
            let failures = {
                let mut state = shared.state();
                state.failures += 1;
                state.failures
            };
            let pause = Duration::from_millis((50u64 << failures.min(6)).min(2_000));
            shared.broke(&format!("the store at {address}: {reason}"), false, env.jitter(pause));
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = connections => {}
    }
    shared.broke("the client was closed", true, Duration::ZERO);
}

/// The request side of one connection: what the connection pulls when it can send.
struct Outgoing {
    shared: Arc<Shared>,
    connection: u64,
    /// It has waited: the first that is queued then may have others right behind it.
    let_others: bool,
    /// Tells, by being dropped, that nothing pulls any more.
    _alive: oneshot::Sender<()>,
}

impl Stream for Outgoing {
    type Item = Batch;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Batch>> {
        let this = self.get_mut();
        let mut state = this.shared.state();
        if state.connection != this.connection || state.closed {
            return Poll::Ready(None);
        }
        if state.queue.is_empty() {
            this.let_others = true;
            state.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if std::mem::take(&mut this.let_others) {
            // Whoever is about to queue more, since the last answers woke them together, goes first.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Some(Batch { operations: state.drain(), answers: Vec::new() }))
    }
}

impl Pipe {
    /// A pipe to the store at this address; it connects when first used.
    pub(crate) fn new(env: &Env, address: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let stop = CancellationToken::new();
        tokio::spawn(run(shared.clone(), env.clone(), address.to_string(), stop.clone()));
        Self { shared, _stop: stop.drop_guard() }
    }

    /// Queues operations, all in one go, so that they leave in as few messages
    /// as may be. Those that find no room are refused at once.
    pub(crate) fn submit(&self, operations: impl IntoIterator<Item = Operation>) -> Vec<Result<Ticket, Full>> {
        let mut state = self.shared.state();
        let now = Instant::now();
        let tickets = operations.into_iter().map(|operation| {
            let (id, reply) = state.push(operation, now)?;
            Ok(Ticket { shared: self.shared.clone(), id, reply: Some(reply) })
        });
        let tickets = tickets.collect();
        self.wake(state);
        tickets
    }

    /// Queues one operation.
    pub(crate) fn submit_one(&self, operation: Operation) -> Result<Ticket, Full> {
        let mut state = self.shared.state();
        let pushed = state.push(operation, Instant::now());
        self.wake(state);
        let (id, reply) = pushed?;
        Ok(Ticket { shared: self.shared.clone(), id, reply: Some(reply) })
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        self.shared.load.store(state.load(), Relaxed);
        let (sender, connected) = (state.sender.take(), state.connected);
        drop(state);
        match sender {
            Some(sender) => sender.wake(),
            None if !connected => self.shared.work.notify_one(),
            None => {}
        }
    }

    /// How many operations are queued or on their way.
    pub(crate) fn load(&self) -> usize {
        self.shared.load.load(Relaxed)
    }

    /// Whether there is a connection that serves.
    pub(crate) fn is_up(&self) -> bool {
        self.shared.up.load(Relaxed)
    }

    /// Connects although nothing is queued, unless that has failed a moment ago.
    pub(crate) fn connect(&self) {
        let state = self.shared.state();
        if state.suspect_until.is_none_or(|until| Instant::now() >= until) {
            self.probe(state);
        }
    }

    /// Connects, unless there is a connection or one is being made.
    fn probe(&self, mut state: MutexGuard<'_, State>) {
        if !state.connected {
            state.probe = true;
            self.wake(state);
        }
    }

    /// Whether other replicas should be asked first, since this store lately could not be
    /// reached or did not answer. Where it may be back, this starts to find out.
    pub(crate) fn suspect(&self) -> bool {
        if !self.shared.suspect.load(Relaxed) {
            return false;
        }
        let mut state = self.shared.state();
        let Some(until) = state.suspect_until else { return false };
        if Instant::now() < until {
            return true;
        }
        if state.connected && state.failures == 0 {
            // Only late: ask it again.
            self.shared.suspect_until(&mut state, None);
            return false;
        }
        self.probe(state);
        true
    }

    /// How long to wait for an answer before another replica is asked:
    /// about a second, longer where the store is known to take longer.
    pub(crate) fn patience(&self) -> Duration {
        Duration::from_micros(self.shared.pace.load(Relaxed) * 8).clamp(TRY_LEAST, TRY_MOST)
    }
}

/// An operation on its way. Dropped before the answer, it is withdrawn.
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    id: u64,
    /// `None`: over.
    reply: Option<oneshot::Receiver<Reply>>,
}

impl Ticket {
    /// Takes the operation back where it still waits in the queue. False: it was sent
    /// (or answered this instant), and its answer can still be awaited.
    pub(crate) fn take_back(&mut self) -> bool {
        let mut state = self.shared.state();
        let waiting = state.queue.binary_search_by_key(&self.id, |q| q.operation.id).is_ok();
        if waiting {
            self.shared.withdraw(&mut state, self.id);
            self.reply = None;
        }
        waiting
    }
}

impl Ticket {
    /// Notes that its store did not answer in time.
    pub(crate) fn late(&self) {
        let mut state = self.shared.state();
        let until = state.suspect_until.max(Some(Instant::now() + SUSPECT));
        self.shared.suspect_until(&mut state, until);
    }

    /// Whether it was sent and its answer can still come.
    pub(crate) fn is_pending(&self) -> bool {
        self.reply.is_some()
    }
}

impl Future for Ticket {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Reply> {
        let lost = || Broken { sent: true, reason: "the client was closed".into() };
        let Some(reply) = &mut self.reply else { return Poll::Ready(Err(lost())) };
        let polled = Pin::new(reply).poll(cx);
        if polled.is_ready() {
            self.reply = None;
        }
        polled.map(|received| received.unwrap_or_else(|_| Err(lost())))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.reply.is_some() {
            self.shared.withdraw(&mut self.shared.state(), self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::operation;
    use bytes::Bytes;

    fn put(len: usize) -> Operation {
        let value = Some(crate::v1::put::Value::Bytes(Bytes::from(vec![0; len])));
        let kind = operation::Kind::Put(crate::v1::Put { value, ..Default::default() });
        Operation { kind: Some(kind), ..Default::default() }
    }

    fn fill(state: &mut State, count: usize, len: usize) -> usize {
        let now = Instant::now();
        (0..count).filter(|_| state.push(put(len), now).is_ok()).count()
    }

    #[test]
    fn a_message_takes_what_waits_up_to_its_limits() {
        let mut state = State::default();
        fill(&mut state, 10, 100);
        assert_eq!(state.drain().len(), 10);
        fill(&mut state, MESSAGE_OPERATIONS + 1, 10);
        assert_eq!(state.drain().len(), MESSAGE_OPERATIONS);
        assert_eq!(state.drain().len(), 1);
        fill(&mut state, 5, 400 << 10);
        assert_eq!([state.drain().len(), state.drain().len(), state.drain().len()], [2, 2, 1]);
        // One that is beyond the limit of a message goes alone.
        fill(&mut state, 2, crate::op::MAX_VALUE);
        assert_eq!(state.drain().len(), 1);
        assert_eq!(state.drain().len(), 1);
        assert_eq!((state.queued_bytes, state.queue.len()), (0, 0));
        assert_eq!(state.flights.len(), 10 + MESSAGE_OPERATIONS + 1 + 5 + 2);
    }

    #[test]
    fn a_full_queue_refuses_at_once() {
        let mut state = State::default();
        assert_eq!(fill(&mut state, QUEUE_OPERATIONS + 7, 1), QUEUE_OPERATIONS);
        let mut state = State::default();
        assert_eq!(fill(&mut state, 10, crate::op::MAX_VALUE), 3);
    }

    #[test]
    fn what_is_withdrawn_says_whether_it_was_sent() {
        let mut state = State::default();
        fill(&mut state, 1, 1);
        state.drain();
        fill(&mut state, 2, 1);
        assert!(state.withdraw(1));
        assert!(!state.withdraw(2));
        let left: Vec<u64> = state.drain().iter().map(|o| o.id).collect();
        assert_eq!(left, [3]);
        assert_eq!(state.queued_bytes, 0);
    }
}
