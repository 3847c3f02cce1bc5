//! The map: one operation at a time or a batch of them, each driven through
//! tries, failovers and topology changes until its answer or its deadline.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::client::Client;
use crate::error::Error;
use crate::op::{Merge, Op, Options, Outcome, Prepared, Returning};
use crate::pipe::{Broken, Full, Reply, Ticket};
use crate::pool::Link;
use crate::route::{Attempt, Candidate, Kind, Next, Route, Trouble, decide};
use crate::session::Session;
use crate::v1::{self, FailureCode, KeyspaceUpdate, Operation, Phase, answer};
use crate::value::{Data, Value};
use crate::watch::{Status, Subscription};

/// Operations and bytes of a batch that are put in together; a longer batch goes window by window.
const WINDOW_OPERATIONS: usize = 8192;
const WINDOW_BYTES: usize = 16 << 20;

/// A map of keys to values, spread over the stores of a cluster. Cheap to
/// clone; clones share a session, so that what one wrote before, all write after.
///
/// Each operation is tried until its deadline: on other replicas, after
/// pauses, under newer topologies. Gets, puts and deletes are repeated freely;
/// a merge that may have been executed is answered [`Error::Unknown`] instead.
#[derive(Clone)]
pub struct Keyspace {
    pub(crate) shared: Arc<Shared>,
    pub(crate) deadline: Duration,
}

/// What all handles of a keyspace share.
pub(crate) struct Shared {
    pub(crate) client: Client,
    subscription: Arc<Subscription>,
    wired: RwLock<Option<Arc<Wired>>>,
    session: Mutex<Session>,
}

impl Shared {
    pub(crate) fn new(client: Client, subscription: Arc<Subscription>) -> Self {
        Self { client, subscription, wired: RwLock::default(), session: Mutex::default() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.subscription.name
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latest topology and the links to its stores.
    pub(crate) fn wired(&self) -> Result<Arc<Wired>, Error> {
        let missing = || Error::Missing { keyspace: self.name().to_string() };
        if *self.subscription.status.borrow() == Status::Missing {
            return Err(missing());
        }
        {
            let wired = self.wired.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(wired) = &*wired
                && Arc::ptr_eq(&wired.update, &self.subscription.latest.borrow())
            {
                return if wired.deleting { Err(missing()) } else { Ok(wired.clone()) };
            }
        }
        let mut slot = self.wired.write().unwrap_or_else(PoisonError::into_inner);
        let latest = self.subscription.latest.borrow().clone();
        // Built while the old one still holds its links, so that they are taken over.
        let wired = Arc::new(Wired::new(latest, &self.client));
        let mut session = self.session();
        if slot.as_ref().is_some_and(|old| old.uid != wired.uid) {
            *session = Session::default();
        }
        if wired.route.size() > 0 {
            session.resize(wired.route.size());
            for shard in 0..wired.route.size() {
                session.retain(shard, &wired.replicas(shard));
            }
        }
        *slot = Some(wired.clone());
        if wired.deleting { Err(missing()) } else { Ok(wired) }
    }

    /// Waits until the topology isn't this one any more, but no longer than this.
    pub(crate) async fn newer(&self, wired: &Wired, at_most: Duration) {
        let mut latest = self.subscription.latest.subscribe();
        let changed = latest.wait_for(|latest| !Arc::ptr_eq(latest, &wired.update));
        // Whether it changed or the time is over: the caller looks again.
        let _ = tokio::time::timeout(at_most, changed).await;
    }

    /// Takes in what a store attached to a refusal.
    pub(crate) fn learn(&self, topology: Option<KeyspaceUpdate>) {
        if let Some(update) = topology {
            self.client.topologies().offer(&self.subscription, update);
        }
    }

    /// The time of a pause, so that retries of many callers don't march in step.
    pub(crate) fn jitter(&self, pause: Duration) -> Duration {
        self.client.env().jitter(pause)
    }
}

/// A topology with the links to its stores.
pub(crate) struct Wired {
    pub(crate) update: Arc<KeyspaceUpdate>,
    /// As operations carry it.
    uid: Bytes,
    pub(crate) route: Route,
    /// Beside the route's candidates.
    links: Vec<Vec<Arc<Link>>>,
    deleting: bool,
}

impl Wired {
    fn new(update: Arc<KeyspaceUpdate>, client: &Client) -> Self {
        let route = Route::new(&update);
        let links = |shard| route.candidates(shard).iter().map(|c| client.pool().link(&c.address)).collect();
        let links = (0..route.size()).map(links).collect();
        let topology = update.topology.as_ref();
        let uid = topology.map(|t| t.uid.clone()).unwrap_or_default().into();
        let deleting = topology.is_some_and(|t| t.phase() == Phase::Deleting);
        Self { uid, route, links, deleting, update }
    }

    /// The keyspace's uid.
    pub(crate) fn uid(&self) -> String {
        self.update.topology.as_ref().map(|t| t.uid.clone()).unwrap_or_default()
    }

    fn replicas(&self, shard: u32) -> Vec<u64> {
        let shard = self.update.topology.as_ref().and_then(|t| t.current.as_ref()?.shards.get(shard as usize));
        shard.map(|s| s.replicas.iter().map(|a| a.replica).collect()).unwrap_or_default()
    }

    /// The next replica of this shard to ask.
    pub(crate) fn pick(&self, shard: u32, attempt: &Attempt) -> Option<(&Candidate, &Arc<Link>)> {
        let candidates = self.route.candidates(shard);
        let links = self.links.get(shard as usize)?;
        let index = attempt.pick(candidates.iter().zip(links).map(|(c, l)| (c.replica, l.suspect())))?;
        Some((&candidates[index], &links[index]))
    }

    /// Whether a replica of this shard has not been asked yet in this round.
    pub(crate) fn others(&self, shard: u32, attempt: &Attempt) -> bool {
        attempt.pick(self.route.candidates(shard).iter().map(|c| (c.replica, false))).is_some()
    }

    /// Why nobody can be asked.
    pub(crate) fn nobody(&self, shard: Option<u32>) -> String {
        let version = self.update.topology.as_ref().map_or(0, |t| t.version);
        match shard {
            None => format!("the keyspace is still being made (topology version {version} has no shards)"),
            Some(shard) => format!("topology version {version} names no serving store for shard {shard}"),
        }
    }
}

/// What goes to one store together: each operation with its index, shard and replica.
struct Group {
    link: Arc<Link>,
    places: Vec<(usize, u32, u64)>,
    /// Each one's id is its place here; a pipe gives it another.
    operations: Vec<Operation>,
}

/// What a store of this process was asked without a connection.
struct Asked {
    wired: Arc<Wired>,
    link: Arc<Link>,
    /// Each operation's index, shard and replica; its id is its place here.
    places: Vec<(usize, u32, u64)>,
    answers: BoxFuture<'static, Vec<v1::Answer>>,
}

/// What it answered to each.
struct Came {
    wired: Arc<Wired>,
    link: Arc<Link>,
    replies: Vec<((usize, u32, u64), Reply)>,
}

impl Asked {
    /// Waits for the answers, as long as the first of the operations may take.
    async fn answer(self, ops: &[Result<Prepared, Error>], start: Instant) -> Came {
        let Self { wired, link, places, answers } = self;
        let deadline = |(index, ..): &(usize, u32, u64)| Some(ops.get(*index)?.as_ref().ok()?.deadline);
        let patience = places.iter().filter_map(deadline).min().unwrap_or_default();
        let came = timeout_at(start + patience, answers).await;
        let late = came.is_err();
        let silence = || if late { Err(Broken::late()) } else { Ok(None) };
        let mut replies: Vec<_> = places.into_iter().map(|place| (place, silence())).collect();
        for v1::Answer { id, result } in came.unwrap_or_default() {
            if let Some((_, reply)) = usize::try_from(id).ok().and_then(|id| replies.get_mut(id)) {
                *reply = Ok(result);
            }
        }
        Came { wired, link, replies }
    }
}

/// One try of an operation at one replica.
struct Try {
    wired: Arc<Wired>,
    shard: u32,
    replica: u64,
    link: Arc<Link>,
    ticket: Result<Ticket, Full>,
    /// Set where the answer has been taken from the ticket already.
    reply: Option<Reply>,
    /// When to ask another replica.
    until: Instant,
}

/// Why a try failed, with words.
struct Fault {
    trouble: Trouble,
    words: String,
}

impl Fault {
    /// The error where no more can be done.
    fn error(self, what: String) -> Error {
        let Self { trouble, words } = self;
        match trouble {
            Trouble::Refused(FailureCode::Invalid) => Error::Invalid(format!("{what}: {words}")),
            Trouble::Refused(FailureCode::Mismatch) => Error::Mismatch(format!("{what}: {words}")),
            Trouble::Refused(FailureCode::NoSpace) => Error::NoSpace(format!("{what}: {words}")),
            Trouble::Full | Trouble::Refused(FailureCode::ResourceExhausted) => {
                Error::Overloaded(format!("{what}: {words}"))
            }
            Trouble::Late { sent: true } => Error::Deadline { what, last: words },
            _ => Error::Unavailable { what, last: words },
        }
    }
}

impl Keyspace {
    pub(crate) fn new(shared: Arc<Shared>, deadline: Duration) -> Self {
        Self { shared, deadline }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// The client that it was opened with.
    pub fn client(&self) -> &Client {
        &self.shared.client
    }

    /// The latest topology that the client knows.
    pub fn topology(&self) -> Arc<KeyspaceUpdate> {
        self.shared.subscription.latest.borrow().clone()
    }

    /// Each later topology too; a slow reader skips versions.
    pub fn watch(&self) -> watch::Receiver<Arc<KeyspaceUpdate>> {
        self.shared.subscription.latest.subscribe()
    }

    /// Whether it has been deleted, as far as this client has heard.
    pub fn is_gone(&self) -> bool {
        self.shared.wired().is_err()
    }

    /// Reads a key. `None`: it holds nothing.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// if let Some(value) = map.get("bash").await? {
    ///     println!("{:?}", value.data);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Value>, Error> {
        self.get_with(key, Options::default()).await
    }

    /// Reads a key that has a partition key of its own.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// use vasto_client::Options;
    /// let cart = map.get_with("user-7/cart", Options::new().partition_key("user-7")).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_with(&self, key: impl AsRef<[u8]>, options: Options) -> Result<Option<Value>, Error> {
        Ok(self.one(Op::get(copy(key)).with(options)).await?.value())
    }

    /// Puts bytes or a number under a key.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.put("bash", "the shell").await?;
    /// map.put("downloads", 42.0).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put(&self, key: impl AsRef<[u8]>, value: impl Into<Data>) -> Result<(), Error> {
        self.put_with(key, value, Options::default()).await
    }

    /// Puts with a time to live, an event time of the caller's or a partition key.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// use std::time::Duration;
    /// use vasto_client::Options;
    /// map.put_with("session", "token", Options::new().ttl(Duration::from_secs(3600))).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put_with(&self, key: impl AsRef<[u8]>, value: impl Into<Data>, options: Options) -> Result<(), Error> {
        self.one(Op::put(copy(key), value).with(options)).await.map(drop)
    }

    /// Deletes a key; one that holds nothing stays so.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.delete("bash").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<(), Error> {
        self.delete_with(key, Options::default()).await
    }

    /// Deletes as of an event time of the caller's, or with a partition key.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// use vasto_client::Options;
    /// map.delete_with("bash", Options::new().time_ms(1_700_000_000_000)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delete_with(&self, key: impl AsRef<[u8]>, options: Options) -> Result<(), Error> {
        self.one(Op::delete(copy(key)).with(options)).await.map(drop)
    }

    /// Adds to the number under a key; nothing counts as 0.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.add("downloads", 1.0).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn add(&self, key: impl AsRef<[u8]>, number: f64) -> Result<(), Error> {
        self.merge_with(key, Merge::Add(number), Options::default()).await
    }

    /// Keeps the greater of the number under a key and this one.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.max("highest", 97.5).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn max(&self, key: impl AsRef<[u8]>, number: f64) -> Result<(), Error> {
        self.merge_with(key, Merge::Max(number), Options::default()).await
    }

    /// Keeps the lesser of the number under a key and this one.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.min("lowest", 2.5).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn min(&self, key: impl AsRef<[u8]>, number: f64) -> Result<(), Error> {
        self.merge_with(key, Merge::Min(number), Options::default()).await
    }

    /// Appends to the bytes under a key.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.append("log", "one more line\n").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn append(&self, key: impl AsRef<[u8]>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
        self.merge_with(key, Merge::Append(copy(bytes)), Options::default()).await
    }

    /// Lets a key read as nothing after this long; `None`: never. Whether it held anything to expire.
    /// What the key holds is put again for it, so what other replicas took at the same time is outdated.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// map.expire("session", Some(std::time::Duration::from_secs(60))).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn expire(&self, key: impl AsRef<[u8]>, ttl: Option<Duration>) -> Result<bool, Error> {
        let options = Options::new().returning(Returning::Before).head();
        Ok(self.one(Op::expire(copy(key), ttl).with(options)).await?.value().is_some())
    }

    /// Any merge, with options.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// use vasto_client::{Merge, Options};
    /// map.merge_with("user-7/visits", Merge::Add(1.0), Options::new().partition_key("user-7")).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Unknown`] when it was sent and its answer was lost: it may count
    /// or not, and repeating it could count it twice.
    pub async fn merge_with(&self, key: impl AsRef<[u8]>, merge: Merge, options: Options) -> Result<(), Error> {
        self.one(Op::merge(copy(key), merge).with(options)).await.map(drop)
    }

    /// Many operations at once, answered in their order, each with its own
    /// answer. They don't wait for one another: what must come after something
    /// else belongs in a later batch.
    ///
    /// ```no_run
    /// # async fn example(map: vasto_client::Keyspace) -> Result<(), vasto_client::Error> {
    /// use vasto_client::Op;
    /// let answers = map.batch([Op::put("a", "1"), Op::add("n", 1.0), Op::get("b")]).await;
    /// for answer in answers {
    ///     answer?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn batch(&self, ops: impl IntoIterator<Item = Op>) -> Vec<Result<Outcome, Error>> {
        let now_ms = self.shared.client.env().now_ms();
        let ops = ops.into_iter();
        let mut answers = Vec::new();
        let mut window = Vec::with_capacity(ops.size_hint().0.min(WINDOW_OPERATIONS));
        let mut bytes = 0;
        for op in ops {
            let op = op.prepare(now_ms, self.deadline);
            bytes += op.as_ref().map_or(0, Prepared::size);
            window.push(op);
            if window.len() == WINDOW_OPERATIONS || bytes >= WINDOW_BYTES {
                answers.extend(self.window(std::mem::take(&mut window)).await);
                bytes = 0;
            }
        }
        let last = self.window(window).await;
        if answers.is_empty() {
            return last;
        }
        answers.extend(last);
        answers
    }

    /// One operation by itself.
    async fn one(&self, op: Op) -> Result<Outcome, Error> {
        let op = op.prepare(self.shared.client.env().now_ms(), self.deadline)?;
        let deadline = Instant::now() + op.deadline;
        self.drive(&op, deadline, None).await
    }

    /// Puts operations in together, then sees to those that were not answered at the first try.
    async fn window(&self, ops: Vec<Result<Prepared, Error>>) -> Vec<Result<Outcome, Error>> {
        let start = Instant::now();
        let refused = |op: &Result<Prepared, Error>| op.as_ref().err().cloned().map(Err);
        let mut answers: Vec<Option<Result<Outcome, Error>>> = ops.iter().map(refused).collect();
        let (mut tries, near) = self.begin_all(&ops);
        for came in futures::future::join_all(near.into_iter().map(|asked| asked.answer(&ops, start))).await {
            self.settle(&ops, came, &mut answers, &mut tries);
        }
        let mut left = HashMap::new();
        for (index, mut tried) in tries {
            let Some(Ok(op)) = ops.get(index) else { continue };
            match self.first(op, &mut tried, start + op.deadline).await {
                Some(outcome) => answers[index] = Some(Ok(outcome)),
                None => drop(left.insert(index, tried)),
            }
        }
        let mut driven = Vec::new();
        for (index, op) in ops.iter().enumerate() {
            if let (None, Ok(op)) = (&answers[index], op) {
                let tried = left.remove(&index);
                driven.push(async move { (index, self.drive(op, start + op.deadline, tried).await) });
            }
        }
        for (index, outcome) in futures::future::join_all(driven).await {
            answers[index] = Some(outcome);
        }
        answers.into_iter().flatten().collect()
    }

    /// The first tries of a window by its indices, those to one store queued in one go; and what stores of this process
    /// were asked.
    fn begin_all(&self, ops: &[Result<Prepared, Error>]) -> (Vec<(usize, Try)>, Vec<Asked>) {
        let (mut tries, mut near) = (Vec::new(), Vec::new());
        // Where there is no topology to go by, each operation finds out for itself.
        let Ok(wired) = self.shared.wired() else { return (tries, near) };
        let mut groups: Vec<Group> = Vec::new();
        {
            let session = self.shared.session();
            let fresh = Attempt::default();
            for (index, op) in ops.iter().enumerate() {
                let Ok(op) = op else { continue };
                let Some(shard) = wired.route.shard(op.hash) else { continue };
                let Some((candidate, link)) = wired.pick(shard, &fresh) else { continue };
                let after = session.after(shard, candidate.replica);
                let operation = op.operation(&wired.uid, shard, wired.route.size(), after);
                let known = groups.iter().position(|g| Arc::ptr_eq(&g.link, link));
                let group = known.unwrap_or_else(|| {
                    let link = link.clone();
                    let (places, operations) = (Vec::with_capacity(ops.len()), Vec::with_capacity(ops.len()));
                    groups.push(Group { link, places, operations });
                    groups.len() - 1
                });
                groups[group].places.push((index, shard, candidate.replica));
                let operations = &mut groups[group].operations;
                operations.push(Operation { id: operations.len() as u64, ..operation });
            }
        }
        for Group { link, places, operations } in groups {
            let operations = match link.near(operations) {
                Ok(answers) => {
                    near.push(Asked { wired: wired.clone(), link, places, answers });
                    continue;
                }
                Err(operations) => operations,
            };
            let until = Instant::now() + link.patience();
            let tickets = link.pipe().submit(operations);
            for ((index, shard, replica), ticket) in places.into_iter().zip(tickets) {
                let (wired, link) = (wired.clone(), link.clone());
                tries.push((index, Try { wired, shard, replica, link, ticket, reply: None, until }));
            }
        }
        (tries, near)
    }

    /// Takes in what a store of this process answered. What was not done is left as a first try that failed.
    fn settle(
        &self,
        ops: &[Result<Prepared, Error>],
        came: Came,
        answers: &mut [Option<Result<Outcome, Error>>],
        tries: &mut Vec<(usize, Try)>,
    ) {
        let Came { wired, link, replies } = came;
        let now = Instant::now();
        let mut session = self.shared.session();
        for ((index, shard, replica), reply) in replies {
            let Some(Ok(op)) = ops.get(index) else { continue };
            let reply = match reply {
                Ok(Some(result)) if !matches!(result, answer::Result::Failure(_)) => {
                    match meaning(op, wired.route.size(), shard, replica, result, &mut session) {
                        Some(outcome) => {
                            answers[index] = Some(Ok(outcome));
                            continue;
                        }
                        // `drive` says that it does not fit.
                        None => Ok(None),
                    }
                }
                failed => failed,
            };
            let (wired, link) = (wired.clone(), link.clone());
            let (ticket, reply) = (Err(Full), Some(reply));
            tries.push((index, Try { wired, shard, replica, link, ticket, reply, until: now }));
        }
    }

    /// Waits for the answer of a first try; `None`: it needs more than that.
    async fn first(&self, op: &Prepared, tried: &mut Try, deadline: Instant) -> Option<Outcome> {
        let ticket = tried.ticket.as_mut().ok()?;
        // The answers of a message come together: only the first of them needs a timer.
        let reply = match ticket.now_or_never() {
            Some(reply) => reply,
            None => timeout_at(tried.until.min(deadline), ticket).await.ok()?,
        };
        match reply {
            Ok(Some(result)) if !matches!(result, answer::Result::Failure(_)) => {
                let outcome = self.outcome(op, tried, result);
                // `drive` says that it does not fit.
                tried.reply = Some(Ok(None));
                outcome
            }
            trouble => {
                tried.reply = Some(trouble);
                None
            }
        }
    }

    /// Starts a try at the next replica; `Err`: nobody can be asked.
    fn begin(&self, op: &Prepared, wired: &Arc<Wired>, attempt: &Attempt) -> Result<Try, Fault> {
        let shard = wired.route.shard(op.hash);
        let nobody = || Fault { trouble: Trouble::Nobody, words: wired.nobody(shard) };
        let shard = shard.ok_or_else(nobody)?;
        let (candidate, link) = wired.pick(shard, attempt).ok_or_else(nobody)?;
        let after = self.shared.session().after(shard, candidate.replica);
        let operation = op.operation(&wired.uid, shard, wired.route.size(), after);
        let until = Instant::now() + link.patience();
        let ticket = link.pipe().submit_one(operation);
        let (replica, link) = (candidate.replica, link.clone());
        Ok(Try { wired: wired.clone(), shard, replica, link, ticket, reply: None, until })
    }

    /// Waits for the answer of a try.
    async fn finish(&self, op: &Prepared, tried: &mut Try, deadline: Instant) -> Result<Outcome, Fault> {
        let address = &tried.link.address;
        let reply = match (&mut tried.ticket, tried.reply.take()) {
            (_, Some(reply)) => reply,
            (Err(Full), None) => {
                let words = format!("this client's queue to the store at {address} is full");
                return Err(Fault { trouble: Trouble::Full, words });
            }
            (Ok(ticket), None) => {
                // A shard's only replica is given all the time there is.
                let only = tried.wired.route.candidates(tried.shard).len() == 1;
                let until = if only { deadline } else { tried.until.min(deadline) };
                match wait(op.kind, ticket, until, deadline).await {
                    Some(reply) => reply,
                    None => {
                        let sent = ticket.is_pending();
                        let how = if sent { "did not answer" } else { "could not be sent to" };
                        let words = format!("the store at {address} {how} in time");
                        return Err(Fault { trouble: Trouble::Late { sent }, words });
                    }
                }
            }
        };
        let address = &tried.link.address;
        match reply {
            Err(Broken { sent, reason }) => Err(Fault { trouble: Trouble::Broken { sent }, words: reason.to_string() }),
            Ok(Some(answer::Result::Failure(failure))) => {
                let words = match failure.message.as_str() {
                    "" => format!("the store at {address} answered {}", failure.code().as_str_name()),
                    message => message.to_string(),
                };
                let code = failure.code();
                self.shared.learn(failure.topology);
                Err(Fault { trouble: Trouble::Refused(code), words })
            }
            Ok(result) => result.and_then(|result| self.outcome(op, tried, result)).ok_or_else(|| {
                let words = format!("the store at {} gave an answer that does not fit", tried.link.address);
                Fault { trouble: Trouble::Refused(FailureCode::Internal), words }
            }),
        }
    }

    fn outcome(&self, op: &Prepared, tried: &Try, result: answer::Result) -> Option<Outcome> {
        meaning(op, tried.wired.route.size(), tried.shard, tried.replica, result, &mut self.shared.session())
    }

    /// Tries an operation until its answer or its deadline.
    async fn drive(&self, op: &Prepared, deadline: Instant, mut first: Option<Try>) -> Result<Outcome, Error> {
        let what = || op.what(self.name());
        let mut attempt = Attempt::default();
        loop {
            let (wired, begun) = match first.take() {
                Some(tried) => (tried.wired.clone(), Ok(tried)),
                None => {
                    let wired = self.shared.wired()?;
                    let begun = self.begin(op, &wired, &attempt);
                    (wired, begun)
                }
            };
            let fault = match begun {
                Ok(mut tried) => {
                    attempt.tried(tried.replica);
                    match self.finish(op, &mut tried, deadline).await {
                        Ok(outcome) => return Ok(outcome),
                        Err(fault) => fault,
                    }
                }
                Err(fault) => fault,
            };
            let others = wired.route.shard(op.hash).is_some_and(|shard| wired.others(shard, &attempt));
            let pause = match decide(op.kind, fault.trouble, others) {
                Next::Fail => return Err(fault.error(what())),
                Next::Unknown => return Err(Error::Unknown(format!("{}: {}", what(), fault.words))),
                Next::Elsewhere if others => None,
                // The store may be the one that is behind: the next try is another's.
                Next::Refresh if others => Some(attempt.rest()),
                Next::Elsewhere | Next::Retry | Next::Refresh => Some(attempt.pause()),
            };
            let now = Instant::now();
            if now >= deadline {
                return Err(fault.error(what()));
            }
            if let Some(pause) = pause {
                let pause = self.shared.jitter(pause).min(deadline - now);
                self.shared.newer(&wired, pause).await;
                if Instant::now() >= deadline {
                    return Err(fault.error(what()));
                }
            }
        }
    }
}

/// What the answer of a replica means; the stamp goes into the session. `None`: it does not fit.
fn meaning(
    op: &Prepared,
    shards: u32,
    shard: u32,
    replica: u64,
    result: answer::Result,
    session: &mut Session,
) -> Option<Outcome> {
    match (op.kind, result) {
        (Kind::Read, answer::Result::Found(value)) => Some(Outcome::Found(value.into())),
        (Kind::Read, answer::Result::Missing(_)) => Some(Outcome::Nothing),
        (Kind::Write | Kind::Merge, answer::Result::Written(written)) => {
            let stamp = written.stamp.map(Into::into).unwrap_or_default();
            let giver = if written.replica == 0 { replica } else { written.replica };
            session.saw(shards, shard, giver, stamp);
            Some(match op.returning {
                v1::Returning::Nothing => Outcome::Written(stamp),
                _ => Outcome::Returned(stamp, written.value.map(|value| Value::from(*value))),
            })
        }
        _ => None,
    }
}

/// Waits for a reply until it is time to go elsewhere. `None`: it is. What has been
/// sent and changes the key waits on to the deadline, while its connection holds: a merge would count
/// twice, and a put that is executed late would come after, and undo, what its
/// caller has written elsewhere since.
async fn wait(
    kind: Kind,
    ticket: &mut Ticket,
    until: Instant,
    deadline: Instant,
) -> Option<Result<Option<answer::Result>, Broken>> {
    if let Ok(reply) = timeout_at(until, &mut *ticket).await {
        return Some(reply);
    }
    if ticket.take_back() {
        return None;
    }
    ticket.late();
    if kind != Kind::Read
        && until < deadline
        && let Ok(reply) = timeout_at(deadline, &mut *ticket).await
    {
        return Some(reply);
    }
    // It may have come at this very moment.
    ticket.now_or_never()
}

fn copy(bytes: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(bytes.as_ref())
}
