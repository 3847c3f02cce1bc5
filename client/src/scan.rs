//! A scan over all shards in key order: one stream from one replica of each
//! shard, merged. Nothing is fetched that the caller doesn't take, but for what
//! the connections' windows hold. A shard whose stream breaks goes on at another
//! replica; when the number of shards changes, all start again after the last key yielded.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use crate::error::{Error, describe};
use crate::keyspace::{Keyspace, Wired};
use crate::route::{Attempt, Kind, Next, Trouble, decide};
use crate::v1::{FailureCode, ScanRequest, ScanResponse};
use crate::value::Entry;

/// What to scan. Everything, unless narrowed.
///
/// ```
/// use vasto_client::ScanOptions;
/// let options = ScanOptions::new().prefix("lib").after("libc6").limit(10);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanOptions {
    /// Only keys that begin so.
    pub prefix: Bytes,
    /// Only keys after this one.
    pub after: Option<Bytes>,
    /// At most this many.
    pub limit: Option<u64>,
    /// Values without their bytes.
    pub head: bool,
}

impl ScanOptions {
    /// Everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`ScanOptions::prefix`].
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<Bytes>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets [`ScanOptions::after`].
    #[must_use]
    pub fn after(mut self, key: impl Into<Bytes>) -> Self {
        self.after = Some(key.into());
        self
    }

    /// Sets [`ScanOptions::limit`].
    #[must_use]
    pub fn limit(mut self, limit: u64) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Sets [`ScanOptions::head`].
    #[must_use]
    pub fn head(mut self) -> Self {
        self.head = true;
        self
    }
}

/// Entries in key order; see [`Keyspace::scan`].
pub struct Scan {
    entries: Pin<Box<dyn Stream<Item = Result<Entry, Error>> + Send>>,
}

impl Scan {
    /// The next entry, for those who have no `StreamExt` at hand.
    pub async fn next(&mut self) -> Option<Result<Entry, Error>> {
        self.entries.next().await
    }
}

impl Stream for Scan {
    type Item = Result<Entry, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.entries.as_mut().poll_next(cx)
    }
}

impl Keyspace {
    /// The entries of all shards in key order, as a stream. It ends after an
    /// error. Writes during a scan may or may not be seen.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// use vasto_client::ScanOptions;
    /// let mut scan = map.scan(ScanOptions::new().prefix("lib").limit(10));
    /// while let Some(entry) = scan.next().await {
    ///     println!("{:?}", entry?.key);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn scan(&self, options: ScanOptions) -> Scan {
        let merge = Box::new(Merge {
            keyspace: self.clone(),
            prefix: options.prefix,
            last: options.after,
            left: options.limit,
            head: options.head,
            size: 0,
            shards: Vec::new(),
            heads: BinaryHeap::new(),
            hungry: false,
        });
        let entries = futures::stream::unfold(Some(merge), |merge| async move {
            let mut merge = merge?;
            match merge.next().await {
                Ok(entry) => entry.map(|entry| (Ok(entry), Some(merge))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Scan { entries: Box::pin(entries) }
    }
}

/// The merge of all shards' streams.
struct Merge {
    keyspace: Keyspace,
    prefix: Bytes,
    /// The last key yielded; where all start again.
    last: Option<Bytes>,
    left: Option<u64>,
    head: bool,
    /// The number of shards that the streams were begun under.
    size: u32,
    shards: Vec<Cursor>,
    /// The first buffered key of each shard that has one.
    heads: BinaryHeap<Reverse<(Bytes, usize)>>,
    /// A shard may have to be asked for more.
    hungry: bool,
}

/// Where one shard stands.
#[derive(Default)]
struct Cursor {
    shard: u32,
    stream: Option<Streaming<ScanResponse>>,
    /// Who serves the stream.
    replica: u64,
    address: String,
    buffer: VecDeque<Entry>,
    /// The last key received.
    after: Option<Bytes>,
    /// How many more may be received.
    left: Option<u64>,
    ended: bool,
    /// Its first buffered key stands in the heap.
    raised: bool,
}

/// Why a shard has no more entries to give now.
enum Halt {
    /// The number of shards changed.
    Restart,
    Error(Error),
}

impl Merge {
    async fn next(&mut self) -> Result<Option<Entry>, Error> {
        loop {
            if self.left == Some(0) {
                return Ok(None);
            }
            if self.shards.is_empty() {
                self.start().await?;
            }
            match self.fill().await {
                Ok(()) => {}
                Err(Halt::Restart) => {
                    tracing::debug!(
                        keyspace = self.keyspace.name(),
                        "the shards changed; scanning on under the new ones"
                    );
                    self.shards.clear();
                    self.heads.clear();
                    continue;
                }
                Err(Halt::Error(error)) => return Err(error),
            }
            let Some(Reverse((_, index))) = self.heads.pop() else { return Ok(None) };
            let cursor = &mut self.shards[index];
            cursor.raised = false;
            let entry = cursor.buffer.pop_front();
            self.raise(index);
            let Some(entry) = entry else { continue };
            // Two shards may hold a key for a moment while it moves.
            if self.last.as_ref().is_some_and(|last| *last >= entry.key) {
                continue;
            }
            self.last = Some(entry.key.clone());
            self.left = self.left.map(|left| left - 1);
            return Ok(Some(entry));
        }
    }

    /// Places a cursor on each shard, waiting where the keyspace is still being made.
    async fn start(&mut self) -> Result<(), Error> {
        let shared = &self.keyspace.shared;
        let deadline = Instant::now() + self.keyspace.deadline;
        let mut attempt = Attempt::default();
        loop {
            let wired = shared.wired()?;
            self.size = wired.route.size();
            if self.size > 0 {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Unavailable { what: what(&self.keyspace), last: wired.nobody(None) });
            }
            shared.newer(&wired, shared.jitter(attempt.pause()).min(left)).await;
        }
        self.hungry = true;
        self.shards = (0..self.size)
            .map(|shard| Cursor { shard, after: self.last.clone(), left: self.left, ..Default::default() })
            .collect();
        Ok(())
    }

    /// Sees that each shard has its first key in the heap or has ended.
    async fn fill(&mut self) -> Result<(), Halt> {
        if !self.hungry {
            return Ok(());
        }
        let (keyspace, prefix, size, head) = (&self.keyspace, &self.prefix, self.size, self.head);
        let empty = self.shards.iter_mut().filter(|c| c.buffer.is_empty() && !c.ended);
        let fills = empty.map(|cursor| cursor.fill(keyspace, prefix, size, head));
        futures::future::try_join_all(fills).await?;
        self.hungry = false;
        for index in 0..self.shards.len() {
            self.raise(index);
        }
        Ok(())
    }

    /// Puts a shard's first key into the heap.
    fn raise(&mut self, index: usize) {
        let cursor = &mut self.shards[index];
        match cursor.buffer.front() {
            Some(_) if cursor.raised => {}
            Some(entry) => {
                self.heads.push(Reverse((entry.key.clone(), index)));
                cursor.raised = true;
            }
            None => self.hungry |= !cursor.ended,
        }
    }
}

fn what(keyspace: &Keyspace) -> String {
    format!("scan keyspace {:?}", keyspace.name())
}

impl Cursor {
    /// Receives until there is an entry or the end, from one replica after another.
    async fn fill(&mut self, keyspace: &Keyspace, prefix: &Bytes, size: u32, head: bool) -> Result<(), Halt> {
        let shared = &keyspace.shared;
        let mut deadline = Instant::now() + keyspace.deadline;
        let mut attempt = Attempt::default();
        loop {
            let wired = shared.wired().map_err(Halt::Error)?;
            if wired.route.size() != size {
                return Err(Halt::Restart);
            }
            let others = wired.route.candidates(self.shard).len() > 1;
            let until = if others { deadline.min(Instant::now() + keyspace.deadline / 2) } else { deadline };
            let (trouble, words) = match timeout_at(until, self.receive(&wired, &attempt, prefix, head)).await {
                Ok(Ok(true)) => return Ok(()),
                // Nothing found yet, but it is at work.
                Ok(Ok(false)) => {
                    (deadline, attempt) = (Instant::now() + keyspace.deadline, Attempt::default());
                    continue;
                }
                Ok(Err(Stumble::Refused(response))) => {
                    let failure = response.failure.unwrap_or_default();
                    let code = failure.code();
                    let words = format!("the store at {}: {}", self.address, failure.message);
                    shared.learn(failure.topology);
                    (Trouble::Refused(code), words)
                }
                Ok(Err(Stumble::Broken(words))) => (Trouble::Broken { sent: true }, words),
                Ok(Err(Stumble::Nobody)) => (Trouble::Nobody, wired.nobody(Some(self.shard))),
                Err(_) => {
                    (Trouble::Late { sent: true }, format!("the store at {} did not answer in time", self.address))
                }
            };
            self.stream = None;
            attempt.tried(self.replica);
            let others = wired.others(self.shard, &attempt);
            let pause = match decide(Kind::Read, trouble, others) {
                Next::Fail => {
                    let words = format!("{}: {words}", what(keyspace));
                    return Err(Halt::Error(match trouble {
                        Trouble::Refused(FailureCode::Mismatch) => Error::Mismatch(words),
                        Trouble::Refused(FailureCode::NoSpace) => Error::NoSpace(words),
                        _ => Error::Invalid(words),
                    }));
                }
                Next::Elsewhere if others => None,
                _ => Some(attempt.pause()),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Halt::Error(Error::Unavailable { what: what(keyspace), last: words }));
            }
            if let Some(pause) = pause {
                shared.newer(&wired, shared.jitter(pause).min(left)).await;
            }
        }
    }

    /// The next message of the stream, opened where there is none. False: it was empty.
    async fn receive(
        &mut self,
        wired: &Arc<Wired>,
        attempt: &Attempt,
        prefix: &Bytes,
        head: bool,
    ) -> Result<bool, Stumble> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let (candidate, link) = wired.pick(self.shard, attempt).ok_or(Stumble::Nobody)?;
                (self.replica, self.address) = (candidate.replica, candidate.address.clone());
                let request = ScanRequest {
                    keyspace: wired.uid(),
                    shard: self.shard,
                    shards: wired.route.size(),
                    prefix: prefix.clone(),
                    after: self.after.clone(),
                    limit: self.left.unwrap_or(0),
                    head,
                };
                let mut store = link.bulk().map_err(Stumble::Broken)?;
                let opened = store.scan(request).await;
                let opened =
                    opened.map_err(|s| Stumble::Broken(format!("the store at {}: {}", self.address, describe(&s))))?;
                self.stream.insert(opened.into_inner())
            }
        };
        let response = stream.message().await;
        match response.map_err(|s| Stumble::Broken(format!("the store at {}: {}", self.address, describe(&s))))? {
            None => {
                self.ended = true;
                Ok(true)
            }
            Some(response) if response.failure.is_some() => Err(Stumble::Refused(Box::new(response))),
            Some(response) => {
                let Some(last) = response.entries.last() else { return Ok(false) };
                self.after = Some(last.key.clone());
                let received = response.entries.len() as u64;
                self.left = self.left.map(|left| left.saturating_sub(received));
                // 0 would ask for all.
                self.ended = self.left == Some(0);
                self.buffer.extend(response.entries.into_iter().map(Entry::from));
                Ok(true)
            }
        }
    }
}

/// Why a message was not received.
enum Stumble {
    Refused(Box<ScanResponse>),
    Broken(String),
    Nobody,
}
