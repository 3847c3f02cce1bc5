//! Redis' protocol, versions 2 and 3: what came together is worked on together, what can go in one batch to the
//! map goes in one, and answers stay in order and leave in one go.
//!
//! Everything is bounded: connections; bytes of requests that have not come whole, over all connections; the time
//! that a request that has begun, or a reader of answers, may take; bytes of the answers that wait.

mod command;
mod cursors;
mod pattern;
mod reply;
mod request;
mod session;
mod table;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::ready;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vasto_client::Env;

use crate::Gateway;
use crate::door::Door;
use crate::metrics::Protocol;
use command::{Command, Parser};
use reply::Reply;
use request::{Malformed, Reader};
use session::Session;

/// Bytes of a request that each connection may hold before it has come whole.
const FREE: usize = 16 << 10;
/// Beyond that all connections share this many, in units of `FREE`.
const ROOM: usize = (256 << 20) / FREE;
/// How long the rest of a request, or the taking of answers, may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of answers that are gathered before they are sent.
const ANSWERS: usize = 1 << 20;
/// Bytes that are read at once.
const READ: usize = 64 << 10;
/// Commands that are worked on together.
const COMMANDS: usize = 1024;

/// What all connections share.
pub(crate) struct Shared {
    cursors: Mutex<cursors::Cursors>,
    door: Door,
    room: Arc<Semaphore>,
    last_id: AtomicU64,
    started_ms: u64,
}

impl Shared {
    pub(crate) fn new(env: &Env) -> Self {
        Self {
            cursors: Mutex::default(),
            door: Door::new(Protocol::Redis),
            room: Arc::new(Semaphore::new(ROOM)),
            last_id: AtomicU64::new(0),
            started_ms: env.now_ms(),
        }
    }
}

/// Serves until `stop`.
pub(crate) async fn serve(gateway: Arc<Gateway>, listener: TcpListener, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let (stream, place) = tokio::select! {
            next = gateway.redis.door.next(&gateway, &listener, b"-ERR max number of clients reached\r\n") => next,
            () = stop.cancelled() => break,
        };
        let id = gateway.redis.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let (serving, stop) = (gateway.clone(), stop.clone());
        let serve = async move |stream: io::Result<TcpStream>| {
            let _place = place;
            let ended = match stream {
                Ok(stream) => Connection::new(&serving, stream, id).run(&stop).await,
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                tracing::debug!(connection = id, %error, "a connection ended");
            }
        };
        match gateway.env.threads() {
            Some(threads) => {
                let stream = stream.into_std();
                tasks.spawn_on(async move { serve(stream.and_then(TcpStream::from_std)).await }, threads.next())
            }
            None => tasks.spawn(async move { serve(Ok(stream)).await }),
        };
    }
    tasks.close();
    tasks.wait().await;
}

struct Connection<'a> {
    gateway: &'a Gateway,
    stream: TcpStream,
    reader: Reader,
    incoming: BytesMut,
    outgoing: BytesMut,
    parser: Parser,
    session: Session<'a>,
    /// Room for what `FREE` does not hold.
    held: Option<OwnedSemaphorePermit>,
    /// When the request that has begun must have come whole.
    due: Option<Instant>,
}

impl<'a> Connection<'a> {
    fn new(gateway: &'a Gateway, stream: TcpStream, id: u64) -> Self {
        Self {
            gateway,
            stream,
            reader: Reader::default(),
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
            parser: Parser::default(),
            session: Session::new(gateway, id),
            held: None,
            due: None,
        }
    }

    async fn run(&mut self, stop: &CancellationToken) -> io::Result<()> {
        loop {
            let (mut commands, malformed) = self.take();
            if commands.is_empty() && malformed.is_none() {
                if let Err(why) = self.hold() {
                    return self.refuse(why).await;
                }
                match self.read(stop).await {
                    Ok(true) => continue,
                    Ok(false) => return Ok(()),
                    Err(error) if error.kind() == ErrorKind::TimedOut => return self.refuse(error).await,
                    Err(error) => return Err(error),
                }
            }
            self.due = None;
            let begun = Instant::now();
            let (count, mut failed) = (commands.len(), 0);
            while !commands.is_empty() && !self.session.has_quit() {
                failed += self.session.step(&mut commands, &mut self.outgoing).await;
                if self.outgoing.len() >= ANSWERS {
                    self.send().await?;
                }
            }
            if count > 0 {
                self.gateway.counts.of(Protocol::Redis).answered(count, failed, begun.elapsed());
            }
            if let Some(error) = malformed {
                return self.refuse(error).await;
            }
            self.send().await?;
            if self.session.has_quit() {
                return self.stream.shutdown().await;
            }
        }
    }

    /// What has come whole, and why no more can be told apart, if so.
    fn take(&mut self) -> (VecDeque<Result<Command, Reply>>, Option<Malformed>) {
        let now_ms = self.gateway.env.now_ms();
        let mut commands = VecDeque::new();
        while commands.len() < COMMANDS {
            match self.reader.next(&mut self.incoming) {
                // A web page that was told to ask here: its lines are no commands.
                Ok(Some(words)) if words.first().is_some_and(|w| [&b"POST"[..], b"Host:"].contains(&&w[..])) => {
                    return (commands, Some(Malformed::of("this is Redis' protocol, not HTTP")));
                }
                Ok(Some(words)) => commands.push_back(self.parser.parse(words, now_ms)),
                Ok(None) => break,
                Err(error) => return (commands, Some(error)),
            }
        }
        (commands, None)
    }

    /// Takes as much of the common room as what has not come whole needs.
    fn hold(&mut self) -> Result<(), &'static str> {
        let bytes = self.reader.taken() + self.incoming.len();
        let needed = bytes.saturating_sub(FREE).div_ceil(FREE);
        let had = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        if needed < had {
            self.held = self.held.take().and_then(|mut held| held.split(needed)).filter(|_| needed > 0);
        } else if needed > had {
            let more = u32::try_from(needed - had).unwrap_or(u32::MAX);
            let Ok(more) = self.gateway.redis.room.clone().try_acquire_many_owned(more) else {
                return Err("the gateway has no room for so long a request now: try again, or send less at a time");
            };
            match &mut self.held {
                Some(held) => held.merge(more),
                none => *none = Some(more),
            }
        }
        Ok(())
    }

    /// Waits for more; false: there will be none.
    async fn read(&mut self, stop: &CancellationToken) -> io::Result<bool> {
        if self.reader.is_inside() || !self.incoming.is_empty() {
            self.due.get_or_insert_with(|| Instant::now() + PATIENCE);
        } else {
            // Whoever is idle holds nothing.
            (self.incoming, self.due) = (BytesMut::new(), None);
        }
        let due = self.due;
        let (stream, incoming) = (&mut self.stream, &mut self.incoming);
        // Room is made once there is something to read, and goes again if there was not.
        let read = poll_fn(|context| {
            ready!(stream.poll_read_ready(context))?;
            incoming.reserve(READ);
            let read = poll_read_buf(Pin::new(&mut *stream), context, incoming);
            if incoming.is_empty() {
                *incoming = BytesMut::new();
            }
            read
        });
        tokio::select! {
            count = read => Ok(count? > 0),
            () = stop.cancelled() => Ok(false),
            () = async { tokio::time::sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                let words = format!("the rest of the request did not come within {} s", PATIENCE.as_secs());
                Err(io::Error::new(ErrorKind::TimedOut, words))
            }
        }
    }

    /// Sends all answers so far.
    async fn send(&mut self) -> io::Result<()> {
        if self.outgoing.is_empty() {
            return Ok(());
        }
        let sent = timeout(PATIENCE, self.stream.write_all(&self.outgoing)).await;
        self.outgoing.clear();
        if self.outgoing.capacity() > READ {
            self.outgoing = BytesMut::new();
        }
        sent.unwrap_or_else(|_| Err(io::Error::new(ErrorKind::TimedOut, "the client does not take its answers")))
    }

    /// Says why the connection can't go on, and ends it.
    async fn refuse(&mut self, why: impl std::fmt::Display) -> io::Result<()> {
        Reply::error(why).encode(self.session.version(), &mut self.outgoing);
        self.send().await?;
        self.stream.shutdown().await
    }
}
