//! An operation as a caller states it, checked against the limits and turned
//! into what goes over the wire.

use std::time::Duration;

use bytes::Bytes;

use crate::error::{Error, show};
use crate::hash::partition_hash;
use crate::route::Kind;
use crate::v1::{self, operation};
use crate::value::{Data, Stamp, Value};

/// The longest key and partition key.
pub const MAX_KEY: usize = 32 << 10;
/// The longest value.
pub const MAX_VALUE: usize = 8 << 20;

/// What may be said about an operation besides its key and value. All of it is optional.
///
/// ```
/// use std::time::Duration;
/// use vasto_client::Options;
///
/// let options = Options::new().ttl(Duration::from_secs(60)).partition_key("user-7");
/// assert_eq!(options.ttl, Some(Duration::from_secs(60)));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// For a put: the value reads as nothing after this long.
    pub ttl: Option<Duration>,
    /// For a put or delete: the caller's own event time in unix milliseconds. The
    /// write with the latest time wins, in whatever order they arrive.
    pub time_ms: Option<u64>,
    /// What the shard is chosen by, where that isn't the key. A key belongs to
    /// one partition key: name the same one each time.
    pub partition_key: Option<Bytes>,
    /// How long to try, in place of the client's own (10 seconds unless set).
    pub deadline: Option<Duration>,
    /// For a put: the value reads as nothing when what it replaces would have.
    pub keep_ttl: bool,
    /// For what changes a key: to be answered with what the key held or holds.
    pub returning: Option<Returning>,
    /// Of the value that is answered only the head: all but its bytes.
    pub head: bool,
}

/// What the answer to a change tells of the key, as the replica that took it had it. Another
/// replica may have taken changes that this one has not heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returning {
    /// What the key held just before.
    Before,
    /// What the key holds just after.
    After,
}

impl From<Option<Returning>> for v1::Returning {
    fn from(returning: Option<Returning>) -> Self {
        match returning {
            None => Self::Nothing,
            Some(Returning::Before) => Self::Before,
            Some(Returning::After) => Self::After,
        }
    }
}

/// The options of a put. The same as those of every operation.
pub type PutOptions = Options;

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`Options::ttl`].
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Sets [`Options::time_ms`].
    #[must_use]
    pub fn time_ms(mut self, time_ms: u64) -> Self {
        self.time_ms = Some(time_ms);
        self
    }

    /// Sets [`Options::partition_key`].
    #[must_use]
    pub fn partition_key(mut self, key: impl Into<Bytes>) -> Self {
        self.partition_key = Some(key.into());
        self
    }

    /// Sets [`Options::deadline`].
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Sets [`Options::keep_ttl`].
    #[must_use]
    pub fn keep_ttl(mut self) -> Self {
        self.keep_ttl = true;
        self
    }

    /// Sets [`Options::returning`].
    #[must_use]
    pub fn returning(mut self, what: Returning) -> Self {
        self.returning = Some(what);
        self
    }

    /// Sets [`Options::head`].
    #[must_use]
    pub fn head(mut self) -> Self {
        self.head = true;
        self
    }
}

/// An operation that combines with what the key holds. A key that holds
/// nothing takes the first one as it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Merge {
    /// Adds to the number.
    Add(f64),
    /// Keeps the greater number.
    Max(f64),
    /// Keeps the lesser number.
    Min(f64),
    /// Appends to the bytes.
    Append(Bytes),
}

#[derive(Clone, Debug, PartialEq)]
enum Action {
    Get,
    Put(Data),
    Delete,
    Merge(Merge),
    Expire(Option<Duration>),
}

/// One operation of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    key: Bytes,
    action: Action,
    options: Options,
}

impl Op {
    fn new(key: impl Into<Bytes>, action: Action) -> Self {
        Self { key: key.into(), action, options: Options::default() }
    }

    /// Reads a key.
    pub fn get(key: impl Into<Bytes>) -> Self {
        Self::new(key, Action::Get)
    }

    /// The key that it is about.
    pub fn key(&self) -> &Bytes {
        &self.key
    }

    /// Whether it changes nothing.
    pub fn is_read(&self) -> bool {
        self.action == Action::Get
    }

    /// Reads of a key all but its bytes.
    pub fn head(key: impl Into<Bytes>) -> Self {
        Self::get(key).with(Options::new().head())
    }

    /// Puts bytes or a number under a key.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Data>) -> Self {
        Self::new(key, Action::Put(value.into()))
    }

    /// Deletes a key.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self::new(key, Action::Delete)
    }

    /// Combines with what the key holds.
    pub fn merge(key: impl Into<Bytes>, merge: Merge) -> Self {
        Self::new(key, Action::Merge(merge))
    }

    /// Adds to the number under a key.
    pub fn add(key: impl Into<Bytes>, number: f64) -> Self {
        Self::merge(key, Merge::Add(number))
    }

    /// Keeps the greater number under a key.
    pub fn max(key: impl Into<Bytes>, number: f64) -> Self {
        Self::merge(key, Merge::Max(number))
    }

    /// Keeps the lesser number under a key.
    pub fn min(key: impl Into<Bytes>, number: f64) -> Self {
        Self::merge(key, Merge::Min(number))
    }

    /// Appends to the bytes under a key.
    pub fn append(key: impl Into<Bytes>, bytes: impl Into<Bytes>) -> Self {
        Self::merge(key, Merge::Append(bytes.into()))
    }

    /// Lets a key read as nothing after this long; `None`: never. What the key holds is put again for it, so it
    /// outdates what other replicas took and the one that it is sent to has not got yet; it is never repeated. Of a key that
    /// holds nothing, or ends so already: does nothing.
    pub fn expire(key: impl Into<Bytes>, ttl: Option<Duration>) -> Self {
        Self::new(key, Action::Expire(ttl))
    }

    /// The same operation with these options.
    #[must_use]
    pub fn with(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Checks the limits and makes it ready to be sent any number of times.
    pub(crate) fn prepare(self, now_ms: u64, deadline: Duration) -> Result<Prepared, Error> {
        let Self { key, action, options } = self;
        check_key("key", &key)?;
        if let Some(partition_key) = &options.partition_key {
            check_key("partition key", partition_key)?;
        }
        let (verb, kind) = match &action {
            Action::Get => ("get", Kind::Read),
            Action::Put(_) => ("put", Kind::Write),
            Action::Delete => ("delete", Kind::Write),
            Action::Merge(Merge::Add(_)) => ("add", Kind::Merge),
            Action::Merge(Merge::Max(_)) => ("max", Kind::Merge),
            Action::Merge(Merge::Min(_)) => ("min", Kind::Merge),
            Action::Merge(Merge::Append(_)) => ("append", Kind::Merge),
            Action::Expire(_) => ("expire", Kind::Write),
        };
        let returning = options.returning;
        if returning.is_some() && kind == Kind::Read {
            return Err(Error::Invalid(format!("get {} was told what to return; only a change is", show(&key))));
        }
        // Repeated, it would answer what its own first execution left; or, at a replica that lags, put an older value
        // once more.
        let once = returning.is_some() || options.keep_ttl || matches!(action, Action::Expire(_));
        let kind = if once { Kind::Merge } else { kind };
        if options.keep_ttl && (verb != "put" || options.ttl.is_some()) {
            let words = "was told to keep the key's ttl; only a put without one of its own is";
            return Err(Error::Invalid(format!("{verb} {} {words}", show(&key))));
        }
        if options.ttl.is_some() && verb != "put" {
            return Err(Error::Invalid(format!("{verb} {} was given a ttl; only put takes one", show(&key))));
        }
        if options.time_ms.is_some() && !matches!(verb, "put" | "delete") {
            let words = "was given an event time; only put and delete take one";
            return Err(Error::Invalid(format!("{verb} {} {words}", show(&key))));
        }
        if options.time_ms == Some(0) {
            let words = "was given the event time 0; it must be in unix milliseconds, above 0";
            return Err(Error::Invalid(format!("{verb} {} {words}", show(&key))));
        }
        let time_ms = options.time_ms.unwrap_or(0);
        let wire = match action {
            Action::Get => operation::Kind::Get(v1::Get {}),
            Action::Put(data) => {
                check_value(verb, &key, data.len())?;
                let expiry_ms = expiry(verb, &key, options.ttl, now_ms)?;
                let value = Some(match data {
                    Data::Bytes(bytes) => v1::put::Value::Bytes(bytes),
                    Data::Number(number) => v1::put::Value::Number(number),
                });
                operation::Kind::Put(v1::Put { value, expiry_ms, time_ms, keep_expiry: options.keep_ttl })
            }
            Action::Delete => operation::Kind::Delete(v1::Delete { time_ms }),
            Action::Merge(Merge::Add(n)) => number(verb, &key, v1::MergeKind::Sum, n)?,
            Action::Merge(Merge::Max(n)) => number(verb, &key, v1::MergeKind::Max, n)?,
            Action::Merge(Merge::Min(n)) => number(verb, &key, v1::MergeKind::Min, n)?,
            Action::Merge(Merge::Append(bytes)) => {
                check_value(verb, &key, bytes.len())?;
                operation::Kind::Append(v1::Append { bytes })
            }
            Action::Expire(ttl) => operation::Kind::Expire(v1::Expire { expiry_ms: expiry(verb, &key, ttl, now_ms)? }),
        };
        let hash = partition_hash(options.partition_key.as_ref().unwrap_or(&key));
        let deadline = options.deadline.unwrap_or(deadline);
        let returning = returning.into();
        let (partition_key, head) = (options.partition_key, options.head);
        Ok(Prepared { key, partition_key, hash, wire, kind, verb, deadline, returning, head })
    }
}

fn check_key(which: &str, key: &[u8]) -> Result<(), Error> {
    if key.is_empty() {
        return Err(Error::Invalid(format!("the {which} is empty; it must have 1 to {MAX_KEY} bytes")));
    }
    if key.len() > MAX_KEY {
        return Err(Error::Invalid(format!(
            "the {which} {} is over the limit; it must have 1 to {MAX_KEY} bytes",
            show(key)
        )));
    }
    Ok(())
}

fn check_value(verb: &str, key: &[u8], len: usize) -> Result<(), Error> {
    if len > MAX_VALUE {
        return Err(Error::Invalid(format!(
            "{verb} {}: the value has {len} bytes; it must have at most {MAX_VALUE} (8 MiB)",
            show(key)
        )));
    }
    Ok(())
}

fn expiry(verb: &str, key: &[u8], ttl: Option<Duration>, now_ms: u64) -> Result<u64, Error> {
    let Some(ttl) = ttl else { return Ok(0) };
    let ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 {
        return Err(Error::Invalid(format!("{verb} {}: the ttl is {ttl:?}; it must be at least 1 ms", show(key))));
    }
    now_ms.checked_add(ms).ok_or_else(|| {
        Error::Invalid(format!("{verb} {}: the ttl of {ttl:?} ends beyond all time; leave it out for never", show(key)))
    })
}

fn number(verb: &str, key: &[u8], kind: v1::MergeKind, number: f64) -> Result<operation::Kind, Error> {
    if number.is_nan() {
        return Err(Error::Invalid(format!("{verb} {}: NaN is no number to {verb}; give a number", show(key))));
    }
    Ok(operation::Kind::Merge(v1::Merge { kind: kind.into(), number }))
}

/// A checked operation.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    key: Bytes,
    partition_key: Option<Bytes>,
    /// The hash of the partition key.
    pub(crate) hash: u64,
    wire: operation::Kind,
    pub(crate) kind: Kind,
    verb: &'static str,
    pub(crate) deadline: Duration,
    pub(crate) returning: v1::Returning,
    head: bool,
}

impl Prepared {
    /// The operation on the wire; the pipe gives it its id.
    pub(crate) fn operation(&self, keyspace: &Bytes, shard: u32, shards: u32, after: Option<Stamp>) -> v1::Operation {
        v1::Operation {
            id: 0,
            keyspace: keyspace.clone(),
            shard,
            shards,
            key: self.key.clone(),
            partition_key: self.partition_key.clone(),
            after: after.map(v1::Stamp::from),
            kind: Some(self.wire.clone()),
            returning: self.returning.into(),
            head: self.head,
        }
    }

    /// What it is, for an error: `put "key" in keyspace "name"`.
    pub(crate) fn what(&self, keyspace: &str) -> String {
        format!("{} {} in keyspace {keyspace:?}", self.verb, show(&self.key))
    }

    /// Roughly its size on the wire.
    pub(crate) fn size(&self) -> usize {
        size(&self.key, self.partition_key.as_ref(), Some(&self.wire))
    }
}

/// Roughly an operation's size on the wire.
pub(crate) fn size(key: &Bytes, partition_key: Option<&Bytes>, kind: Option<&operation::Kind>) -> usize {
    let value = match kind {
        Some(operation::Kind::Put(v1::Put { value: Some(v1::put::Value::Bytes(bytes)), .. }))
        | Some(operation::Kind::Append(v1::Append { bytes })) => bytes.len(),
        _ => 0,
    };
    // Ids, uid, stamps and tags.
    128 + key.len() + partition_key.map_or(0, Bytes::len) + value
}

/// What an operation of a batch came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A get found this.
    Found(Value),
    /// A get found nothing.
    Nothing,
    /// A write was taken, with this stamp.
    Written(Stamp),
    /// The same, with what [`Options::returning`] asked for; `None`: the key held nothing.
    Returned(Stamp, Option<Value>),
}

impl Outcome {
    /// What a get found, or what a change was to return.
    pub fn value(self) -> Option<Value> {
        match self {
            Self::Found(value) => Some(value),
            Self::Returned(_, value) => value,
            Self::Nothing | Self::Written(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEN: Duration = Duration::from_secs(10);

    fn refusal(op: Op) -> String {
        match op.prepare(1_000, TEN) {
            Err(Error::Invalid(words)) => words,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn limits_are_refused_with_words() {
        let long = vec![b'k'; MAX_KEY + 1];
        assert!(refusal(Op::get("")).contains("the key is empty; it must have 1 to 32768 bytes"));
        assert!(refusal(Op::get(long.clone())).contains("(32769 bytes) is over the limit"));
        let options = Options::new().partition_key(long);
        assert!(refusal(Op::get("k").with(options)).contains("the partition key"));
        let options = Options::new().partition_key("");
        assert!(refusal(Op::get("k").with(options)).contains("the partition key is empty"));
        let big = vec![0u8; MAX_VALUE + 1];
        assert!(refusal(Op::put("k", big.clone())).contains("8388609 bytes"));
        assert!(refusal(Op::append("k", big)).contains("append \"k\""));
        assert!(refusal(Op::add("k", f64::NAN)).contains("NaN"));
        assert!(Op::put(vec![0; MAX_KEY], vec![0; MAX_VALUE]).prepare(0, TEN).is_ok());
    }

    #[test]
    fn options_that_do_not_apply_are_refused() {
        let ttl = Options::new().ttl(Duration::from_secs(1));
        assert!(refusal(Op::delete("k").with(ttl.clone())).contains("only put takes one"));
        assert!(refusal(Op::add("k", 1.0).with(ttl)).contains("only put takes one"));
        let time = Options::new().time_ms(5);
        assert!(refusal(Op::get("k").with(time.clone())).contains("only put and delete"));
        assert!(Op::delete("k").with(time).prepare(0, TEN).is_ok());
        assert!(refusal(Op::put("k", "v").with(Options::new().time_ms(0))).contains("above 0"));
        assert!(refusal(Op::put("k", "v").with(Options::new().ttl(Duration::ZERO))).contains("at least 1 ms"));
        assert!(refusal(Op::put("k", "v").with(Options::new().ttl(Duration::MAX))).contains("beyond all time"));
        assert!(refusal(Op::expire("k", Some(Duration::ZERO))).contains("at least 1 ms"));
        let keep = Options::new().keep_ttl();
        assert!(refusal(Op::delete("k").with(keep.clone())).contains("only a put"));
        assert!(refusal(Op::put("k", "v").with(keep.ttl(Duration::from_secs(1)))).contains("without one of its own"));
        assert!(refusal(Op::get("k").with(Options::new().returning(Returning::After))).contains("only a change"));
    }

    #[test]
    fn what_tells_or_keeps_what_was_there_is_never_repeated() {
        let kind = |op: Op| op.prepare(0, TEN).unwrap().kind;
        assert_eq!(kind(Op::delete("k")), Kind::Write);
        assert_eq!(kind(Op::delete("k").with(Options::new().returning(Returning::Before))), Kind::Merge);
        assert_eq!(kind(Op::expire("k", None)), Kind::Merge);
        assert_eq!(kind(Op::put("k", "v").with(Options::new().keep_ttl())), Kind::Merge);
    }

    #[test]
    fn a_ttl_becomes_an_expiry_and_the_partition_key_gives_the_hash() {
        let options = Options::new().ttl(Duration::from_secs(2)).partition_key("p");
        let prepared = Op::put("k", "v").with(options).prepare(1_000, TEN).unwrap();
        assert_eq!(prepared.hash, partition_hash(b"p"));
        let wire = prepared.operation(&Bytes::from("uid"), 1, 3, None);
        assert_eq!(wire.partition_key.as_deref(), Some(&b"p"[..]));
        let Some(operation::Kind::Put(put)) = wire.kind else { panic!("{wire:?}") };
        assert_eq!(put.expiry_ms, 3_000);
    }
}
