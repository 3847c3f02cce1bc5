//! Time, randomness, the network and threads, passed in from outside so that a
//! simulation can own them. `tokio::time` serves for waiting; this is for
//! wall clocks, ids, jitter, connections and work that blocks.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use futures::{Stream, StreamExt, stream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

use crate::background::Background;
use crate::threads::Threads;
use crate::v1::{Answer, Operation};

/// Answers operations, in any order.
type Answers = dyn Fn(Vec<Operation>) -> BoxFuture<'static, Vec<Answer>> + Send + Sync;
/// The stores of one process by their addresses.
type Near = Arc<RwLock<HashMap<String, Arc<Answers>>>>;
type Dial = dyn Fn(Endpoint) -> Channel + Send + Sync;
/// How long the next piece of work takes.
type Pace = dyn Fn() -> Duration + Send + Sync;
/// What becomes of the next message of a stream.
type Fate = dyn Fn() -> Delivery + Send + Sync;

/// How a message of a stream comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// Once, in its turn.
    #[default]
    InTurn,
    /// A second time.
    Twice,
    /// Behind the next one.
    Late,
    /// Not at all.
    Never,
}

/// What a part of Vasto takes from the world. Cheap to clone.
#[derive(Clone)]
pub struct Env {
    now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    random: Arc<dyn Fn() -> u64 + Send + Sync>,
    dial: Arc<Dial>,
    /// Where set, all is done on the caller's own thread, and takes so long.
    inline: Option<Arc<Pace>>,
    /// Where set, streams between stores are not as TCP would have them.
    unruly: Option<Arc<Fate>>,
    /// Where set, stores of this process are asked without a connection.
    near: Option<Near>,
    /// Where set, connections are served there.
    threads: Option<Threads>,
    /// Started when first needed; without it, there are only threads like all others.
    background: Arc<OnceLock<Option<Background>>>,
}

/// Work that blocked did not end: it panicked.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("work on another thread has panicked")]
pub struct Panicked;

impl Env {
    /// The machine's own clock, random numbers and TCP.
    pub fn real() -> Self {
        Self::new(
            || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            rand::random::<u64>,
            |endpoint| endpoint.connect_lazy(),
        )
    }

    /// `now_ms`: unix milliseconds. `random`: 64 uniform bits. `dial`: a lazy channel.
    pub fn new(
        now_ms: impl Fn() -> u64 + Send + Sync + 'static,
        random: impl Fn() -> u64 + Send + Sync + 'static,
        dial: impl Fn(Endpoint) -> Channel + Send + Sync + 'static,
    ) -> Self {
        Self {
            now_ms: Arc::new(now_ms),
            random: Arc::new(random),
            dial: Arc::new(dial),
            inline: None,
            unruly: None,
            near: None,
            threads: None,
            background: Arc::default(),
        }
    }

    /// The same on one thread: work that blocks is done where it is asked for, after a wait of `pace`.
    pub fn on_one_thread(self, pace: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { inline: Some(Arc::new(pace)), ..self }
    }

    /// The same where messages of streams are delivered so.
    pub fn unruly(self, fate: impl Fn() -> Delivery + Send + Sync + 'static) -> Self {
        Self { unruly: Some(Arc::new(fate)), ..self }
    }

    /// The same, where clients ask the stores of their own process, which share this or a clone of it, by a call.
    pub fn with_near_stores(self) -> Self {
        Self { near: Some(Near::default()), ..self }
    }

    /// The same, where connections are served on threads of their own.
    pub fn with_threads(self, threads: Threads) -> Self {
        Self { threads: Some(threads), ..self }
    }

    /// Where connections are served; `None`: wherever the caller runs.
    pub fn threads(&self) -> Option<&Threads> {
        self.threads.as_ref()
    }

    /// Offers this store's answers to the clients of its process, until the guard goes.
    pub fn offer(
        &self,
        address: &str,
        answers: impl Fn(Vec<Operation>) -> BoxFuture<'static, Vec<Answer>> + Send + Sync + 'static,
    ) -> Option<Offer> {
        let stores = self.near.clone()?;
        let answers: Arc<Answers> = Arc::new(answers);
        stores.write().unwrap_or_else(PoisonError::into_inner).insert(address.to_owned(), answers.clone());
        Some(Offer { stores, address: address.to_owned(), answers })
    }

    /// Asks the store at this address, where it is one of this process.
    pub(crate) fn near(&self, address: &str) -> Option<Arc<Answers>> {
        self.near.as_ref()?.read().unwrap_or_else(PoisonError::into_inner).get(address).cloned()
    }

    /// What comes of a stream between stores. No network repeats, reorders or loses a stream's messages, but a
    /// receiver is not to rely on that: a simulation does all of it.
    pub fn deliver<T: Clone + Send>(&self, stream: impl Stream<Item = T> + Send) -> impl Stream<Item = T> + Send {
        let fate = self.unruly.clone();
        let mut held = None;
        stream.flat_map(move |message| {
            let delivery = fate.as_ref().map_or(Delivery::InTurn, |fate| fate());
            let out = match (delivery, held.take()) {
                (Delivery::Late, None) => {
                    held = Some(message);
                    [None, None]
                }
                (Delivery::Never, late) => [None, late],
                (Delivery::Twice, None) => [Some(message.clone()), Some(message)],
                (_, late) => [Some(message), late],
            };
            stream::iter(out.into_iter().flatten())
        })
    }

    /// Whether everything is to run on the caller's thread.
    pub fn is_on_one_thread(&self) -> bool {
        self.inline.is_some()
    }

    /// Waits as long as the next piece of work that is done on the caller's own thread takes.
    pub async fn pace(&self) {
        let wait = self.inline.as_ref().map_or(Duration::ZERO, |pace| pace());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Does work that blocks where it holds up nobody.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
        if self.is_on_one_thread() {
            self.pace().await;
            return Ok(work());
        }
        tokio::task::spawn_blocking(work).await.map_err(|_| Panicked)
    }

    fn behind(&self) -> Option<&Background> {
        if self.is_on_one_thread() {
            return None;
        }
        self.background.get_or_init(|| Background::start().ok()).as_ref()
    }

    /// Where to do what takes long and nobody waits for: the system runs it behind all else.
    pub fn background(&self) -> Handle {
        self.behind().map_or_else(Handle::current, |background| background.tasks().clone())
    }

    /// As `blocking`, in the background.
    pub async fn blocking_behind<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Panicked> {
        match self.behind() {
            Some(background) => background.blocking(work).await.map_err(|_| Panicked),
            None => self.blocking(work).await,
        }
    }

    /// The same for what takes a millisecond or two: whoever else wants a core goes before it.
    pub async fn piece_behind<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Panicked> {
        match self.behind() {
            Some(background) => background.piece(work).await.map_err(|_| Panicked),
            None => self.blocking(work).await,
        }
    }

    /// Does, in the background, work that blocks and gives out one thing after another, no faster than `out` takes
    /// them. What it is handed returns false once nobody takes them any more.
    pub async fn produce<T: Send + 'static, R: Send + 'static>(
        &self,
        out: mpsc::Sender<T>,
        work: impl FnOnce(&mut dyn FnMut(T) -> bool) -> R + Send + 'static,
    ) -> Result<R, Panicked> {
        if self.is_on_one_thread() {
            self.pace().await;
            let mut all = Vec::new();
            let result = work(&mut |item| {
                all.push(item);
                true
            });
            for item in all {
                if out.send(item).await.is_err() {
                    break;
                }
            }
            return Ok(result);
        }
        self.blocking_behind(move || work(&mut |item| out.blocking_send(item).is_ok())).await
    }

    /// Unix milliseconds by the wall clock.
    pub fn now_ms(&self) -> u64 {
        (self.now_ms)()
    }

    /// 64 random bits that are not 0, for ids.
    pub fn random_id(&self) -> u64 {
        loop {
            let id = (self.random)();
            if id != 0 {
                return id;
            }
        }
    }

    /// `base` times a random factor in 0.5..1.5, for retries that must not march in step.
    pub fn jitter(&self, base: Duration) -> Duration {
        let unit = (self.random)() as f64 / u64::MAX as f64;
        base.mul_f64(0.5 + unit)
    }

    /// A channel to `host:port` that connects when first used.
    pub fn dial(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        Ok((self.dial)(endpoint(address)?))
    }

    /// The same for what comes in bulk and may take its time: it is received in the background, and who serves it knows
    /// by the window to send it so.
    pub fn dial_bulk(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let endpoint = endpoint(address)?.initial_stream_window_size(BULK_WINDOW);
        let background = self.background();
        let _here = background.enter();
        Ok((self.dial)(endpoint))
    }
}

/// A store's offer to its process; it ends when this is dropped.
pub struct Offer {
    stores: Near,
    address: String,
    answers: Arc<Answers>,
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut stores = self.stores.write().unwrap_or_else(PoisonError::into_inner);
        // The address may be the next store's already.
        if stores.get(&self.address).is_some_and(|answers| Arc::ptr_eq(answers, &self.answers)) {
            stores.remove(&self.address);
        }
    }
}

/// Bytes of a stream that may be under way.
const WINDOW: u32 = 4 << 20;
/// The same where data moves in bulk; no other connection announces just as many.
pub const BULK_WINDOW: u32 = WINDOW / 4 * 3;

/// The settings every connection shares: keep-alive that notices a dead peer within seconds.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(16 << 20)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3))
        .keep_alive_while_idle(true))
}
