//! Local operations: what a client's put, delete, merge or append makes of a
//! record, or the words in which it is refused. Pure: stamps and the time are passed in.

use bytes::Bytes;
use vasto_client::v1;
use vasto_client::v1::operation::Kind as Wire;

use crate::join::join;
use crate::record::{Base, Chunk, Content, Kind, NotFinite, Number, Op, Record, Slot, Stamp, time_of};

#[cfg(test)]
mod tests;

/// What callers are held to (peers never are: replicas must converge).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a key, at most.
    pub key_bytes: usize,
    /// Bytes of a value, at most, appended chunks included.
    pub value_bytes: usize,
    /// Slots of a key, at most.
    pub slots: usize,
    /// Chunks of a key, at most.
    pub chunks: usize,
    /// How far ahead of the store's clock a caller's own time may be.
    pub max_clock_skew_ms: u64,
    /// How old a caller's own time may be: tombstones are kept this long.
    pub grace_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            key_bytes: 32 << 10,
            value_bytes: 8 << 20,
            slots: 256,
            chunks: 4096,
            max_clock_skew_ms: 10_000,
            grace_ms: 24 * 60 * 60 * 1000,
        }
    }
}

impl Limits {
    /// Refuses a key that no store keeps.
    pub fn check_key(&self, key: &[u8]) -> Result<(), Refusal> {
        match key.len() {
            0 => Err(Refusal::EmptyKey),
            size if size > self.key_bytes => Err(Refusal::KeyTooLong { size, max: self.key_bytes }),
            _ => Ok(()),
        }
    }
}

/// A write as a client asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalOp {
    /// xxh64 of the key's partition key.
    pub partition_hash: u64,
    /// What to do.
    pub change: Change,
}

/// What a write does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Replaces whatever is there; with nothing: deletes it.
    Set {
        /// The new content.
        content: Content,
        /// When it is to read as nothing.
        expiry: Expiry,
        /// The caller's own event time in Unix ms; none: the store's clock.
        time_ms: Option<u64>,
    },
    /// Folds a number into what is there.
    Merge(Op, Number),
    /// Appends bytes to what is there.
    Append(Bytes),
    /// Sets again what is there, with this expiry (Unix ms; 0: never). Like every put it outdates what other
    /// replicas merged meanwhile.
    Expire(u64),
}

/// When what is set is to read as nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// From then on, in Unix ms; 0: never.
    At(u64),
    /// When what it replaces would have.
    Kept,
}

impl LocalOp {
    /// What the wire's operation asks for; `None` for a get.
    pub fn from_wire(kind: Wire, partition_hash: u64) -> Result<Option<Self>, Refusal> {
        let given = |time_ms| (time_ms != 0).then_some(time_ms);
        let change = match kind {
            Wire::Get(_) => return Ok(None),
            Wire::Put(put) => Change::Set {
                content: match put.value.ok_or(Refusal::Incomplete("a put without a value"))? {
                    v1::put::Value::Bytes(bytes) => Content::Bytes(bytes),
                    v1::put::Value::Number(number) => Content::Number(Number::try_from(number)?),
                },
                expiry: if put.keep_expiry { Expiry::Kept } else { Expiry::At(put.expiry_ms) },
                time_ms: given(put.time_ms),
            },
            Wire::Delete(delete) => {
                Change::Set { content: Content::Nothing, expiry: Expiry::At(0), time_ms: given(delete.time_ms) }
            }
            Wire::Merge(merge) => {
                let op = v1::MergeKind::try_from(merge.kind)
                    .map_err(|_| Refusal::Incomplete("a merge of a kind that is none of sum, max, min"))?;
                Change::Merge(op.into(), Number::try_from(merge.number)?)
            }
            Wire::Append(append) => Change::Append(append.bytes),
            Wire::Expire(expire) => Change::Expire(expire.expiry_ms),
        };
        Ok(Some(LocalOp { partition_hash, change }))
    }

    /// About how many bytes it takes while it waits.
    pub fn size(&self) -> usize {
        64 + match &self.change {
            Change::Set { content: Content::Bytes(bytes), .. } | Change::Append(bytes) => bytes.len(),
            _ => 0,
        }
    }

    /// Whether it may be applied without what the key holds: a put or delete by
    /// the store's own clock is newer than all there is, and needs no read. (Then another
    /// partition key is not seen.)
    pub fn is_blind(&self) -> bool {
        matches!(self.change, Change::Set { time_ms: None, expiry: Expiry::At(_), .. })
    }
}

/// Where and when an operation is applied.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The replica's origin: only its own slots may be changed.
    pub origin: u64,
    /// The greatest stamp of the caller's session from other replicas.
    pub after: Option<Stamp>,
    /// The wall clock, Unix ms.
    pub now_ms: u64,
    /// What the caller is held to.
    pub limits: &'a Limits,
}

/// What a local operation made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The key's record from now on; unchanged if the operation changes nothing
    /// (a max below what its slot holds already).
    pub record: Record,
    /// What the caller is answered: of all that a later put or delete must pass to come after
    /// this operation, the greatest. For a merge that is its slot's start, not
    /// the time of the merge: what resets a slot is a base stamp from its start
    /// on, so a session that goes on elsewhere and passes the start resets the
    /// whole slot; and coming back with an equal stamp it goes on in its own slot.
    pub stamp: Stamp,
}

/// Why a local operation was not executed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No key.
    #[error("the key is empty; a key has at least 1 byte")]
    EmptyKey,
    /// A key over the limit.
    #[error("the key has {size} bytes; at most {max} are accepted")]
    KeyTooLong {
        /// Its size.
        size: usize,
        /// The limit.
        max: usize,
    },
    /// A value over the limit.
    #[error("the value would have {size} bytes; at most {max} are accepted for one key")]
    ValueTooLong {
        /// The size it would have.
        size: usize,
        /// The limit.
        max: usize,
    },
    /// The wire's message lacks something.
    #[error("the operation is incomplete: {0}")]
    Incomplete(&'static str),
    /// NaN or infinite.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// The sum leaves what an f64 holds.
    #[error("adding {operand} to {number} leaves the range of a 64-bit float; put a smaller number first")]
    OutOfRange {
        /// The slot's number.
        number: f64,
        /// What was to be added.
        operand: f64,
    },
    /// No more slots.
    #[error(
        "the key has been merged into by {0} replica starts since its last put, the most that are kept; put its present number to go on"
    )]
    TooManySlots(usize),
    /// No more chunks.
    #[error("the key has {0} appended chunks, the most that are kept; put its present value whole to go on")]
    TooManyChunks(usize),
    /// The caller's time is in the future.
    #[error(
        "the given time {time_ms} (Unix ms) is {ahead_ms} ms ahead of this store's clock; at most {max_ms} ms are accepted"
    )]
    TooFarAhead {
        /// The caller's.
        time_ms: u64,
        /// How far.
        ahead_ms: u64,
        /// The limit.
        max_ms: u64,
    },
    /// The caller's time is older than tombstones are kept.
    #[error(
        "the given time {time_ms} (Unix ms) is {behind_ms} ms ago; at most the grace time, {max_ms} ms, is accepted"
    )]
    TooOld {
        /// The caller's.
        time_ms: u64,
        /// How far.
        behind_ms: u64,
        /// The limit.
        max_ms: u64,
    },
    /// The clock can't pass what the record holds.
    #[error("the key holds a stamp of time {0}, which this store's clock cannot pass; use another key")]
    EndOfTime(u64),
    /// A number merged into bytes.
    #[error("the key holds bytes; numbers merge only into a number or an absent key (append takes bytes)")]
    HoldsBytes,
    /// Bytes appended to a number.
    #[error(
        "the key holds a number; bytes are appended only to bytes or an absent key (add, max and min take numbers)"
    )]
    HoldsNumber,
    /// It lives under another partition key.
    #[error(
        "the key lives under another partition key (hash {held:#018x}, not {given:#018x}); use that one, or delete the key under it first"
    )]
    OtherPartition {
        /// The record's.
        held: u64,
        /// The operation's.
        given: u64,
    },
}

impl Refusal {
    /// How the wire names it.
    pub fn code(&self) -> v1::FailureCode {
        match self {
            Refusal::HoldsBytes | Refusal::HoldsNumber | Refusal::OtherPartition { .. } => v1::FailureCode::Mismatch,
            _ => v1::FailureCode::Invalid,
        }
    }
}

/// Applies one operation to what the key holds.
///
/// `existing` may be left out for a key that has no record, and for a
/// [blind](LocalOp::is_blind) operation. `stamps` gives stamps of this origin, each greater
/// than all before it, than all that the replica holds, and than `after`: so before, the
/// clock must have observed `after`; and it must observe `Applied::stamp` afterwards, which
/// a caller's own time may put ahead of it.
pub fn apply(
    existing: Option<Record>,
    op: LocalOp,
    context: &Context<'_>,
    stamps: &mut impl FnMut() -> Stamp,
) -> Result<Applied, Refusal> {
    let LocalOp { partition_hash, change } = op;
    let record = existing.unwrap_or_else(|| Record::unwritten(partition_hash));
    let kind = record.kind(context.now_ms);
    let held = record.partition_hash();
    if held != partition_hash && kind != Kind::Nothing {
        return Err(Refusal::OtherPartition { held, given: partition_hash });
    }
    match change {
        Change::Set { content, expiry, time_ms } => {
            if let Content::Bytes(bytes) = &content {
                check_value(bytes.len(), context.limits)?;
            }
            let stamp = match time_ms {
                Some(time_ms) => own_time(time_ms, context)?,
                None => fresh(stamps, &record)?,
            };
            let expiry_ms = match expiry {
                Expiry::At(ms) => ms,
                Expiry::Kept => record.read(context.now_ms).expiry_ms,
            };
            let base = Base { stamp, expiry_ms, partition_hash, content };
            Ok(Applied { record: join(record, base.into()), stamp })
        }
        Change::Expire(_) if kind == Kind::Nothing => Ok(Applied { stamp: record.greatest_stamp(), record }),
        Change::Expire(expiry_ms) => {
            let crate::record::View { content, expiry_ms: present, .. } = record.read(context.now_ms);
            if expiry_ms == present {
                return Ok(Applied { stamp: record.greatest_stamp(), record });
            }
            // Appends through several replicas may have made more of it than one value may have.
            if let Content::Bytes(bytes) = &content {
                check_value(bytes.len(), context.limits)?;
            }
            let stamp = fresh(stamps, &record)?;
            let base = Base { stamp, expiry_ms, partition_hash, content };
            Ok(Applied { record: join(record, base.into()), stamp })
        }
        Change::Merge(_, _) if kind == Kind::Bytes => Err(Refusal::HoldsBytes),
        Change::Merge(op, number) => fold(under(record, partition_hash), op, number, context, stamps),
        Change::Append(_) if kind == Kind::Number => Err(Refusal::HoldsNumber),
        Change::Append(bytes) => append(under(record, partition_hash), bytes, context, stamps),
    }
}

fn fold(
    record: Record,
    op: Op,
    number: Number,
    context: &Context<'_>,
    stamps: &mut impl FnMut() -> Stamp,
) -> Result<Applied, Refusal> {
    let after = context.after.unwrap_or_default();
    let load = record.load(context.now_ms);
    // The slot must be one that a put or delete of this session cannot have
    // reset (not before `after`) and that counts (not from before an expiry).
    let own = |slot: &&Slot| {
        slot.start.origin == context.origin
            && slot.op == op
            && slot.start >= after
            && slot.seq < u64::MAX
            && record.counts(slot.start, context.now_ms)
    };
    let slot = match record.slots().iter().rfind(own) {
        Some(slot) => {
            let (number, stamp) = (folded(op, slot.number, number)?, slot.start);
            if number == slot.number {
                return Ok(Applied { record, stamp });
            }
            Slot { seq: slot.seq + 1, number, ..*slot }
        }
        None if load.slots >= context.limits.slots => {
            return Err(Refusal::TooManySlots(load.slots));
        }
        None => Slot { start: fresh(stamps, &record)?, op, seq: 1, number },
    };
    let (base, mut slots, chunks) = record.into_parts();
    slots.push(slot);
    Ok(Applied { record: Record::new(base, slots, chunks), stamp: slot.start })
}

fn folded(op: Op, number: Number, operand: Number) -> Result<Number, Refusal> {
    let (a, b) = (number.get(), operand.get());
    let folded = match op {
        Op::Sum => a + b,
        Op::Max => a.max(b),
        Op::Min => a.min(b),
    };
    Number::try_from(folded).map_err(|_| Refusal::OutOfRange { number: a, operand: b })
}

fn append(
    record: Record,
    bytes: Bytes,
    context: &Context<'_>,
    stamps: &mut impl FnMut() -> Stamp,
) -> Result<Applied, Refusal> {
    let load = record.load(context.now_ms);
    check_value(load.bytes.saturating_add(bytes.len()), context.limits)?;
    if load.chunks >= context.limits.chunks {
        return Err(Refusal::TooManyChunks(load.chunks));
    }
    let stamp = fresh(stamps, &record)?;
    let (base, slots, mut chunks) = record.into_parts();
    chunks.push(Chunk { stamp, bytes });
    Ok(Applied { record: Record::new(base, slots, chunks), stamp })
}

/// The record, under this partition key. Only of a record that reads as nothing may that be
/// another than its own: then its base becomes the next greater one there can be, so that
/// replicas that do this at once do the same, and lose none of each other's deltas.
fn under(record: Record, partition_hash: u64) -> Record {
    if record.partition_hash() == partition_hash {
        return record;
    }
    let (base, slots, chunks) = record.into_parts();
    let stamp = base.stamp.successor();
    // The expiry stays: it is what hides the deltas from before it.
    let base = Base { stamp, partition_hash, content: Content::Nothing, ..base };
    Record::new(base, slots, chunks)
}

fn fresh(stamps: &mut impl FnMut() -> Stamp, record: &Record) -> Result<Stamp, Refusal> {
    let (stamp, greatest) = (stamps(), record.greatest_stamp());
    // Only a peer's lie about the time gets here; what is refused is at least not lost in silence.
    if stamp > greatest { Ok(stamp) } else { Err(Refusal::EndOfTime(greatest.time)) }
}

fn own_time(time_ms: u64, context: &Context<'_>) -> Result<Stamp, Refusal> {
    let Limits { max_clock_skew_ms, grace_ms, .. } = *context.limits;
    let ahead_ms = time_ms.saturating_sub(context.now_ms);
    let behind_ms = context.now_ms.saturating_sub(time_ms);
    if ahead_ms > max_clock_skew_ms {
        return Err(Refusal::TooFarAhead { time_ms, ahead_ms, max_ms: max_clock_skew_ms });
    }
    if behind_ms > grace_ms {
        return Err(Refusal::TooOld { time_ms, behind_ms, max_ms: grace_ms });
    }
    Ok(Stamp { time: time_of(time_ms), origin: context.origin })
}

fn check_value(size: usize, limits: &Limits) -> Result<(), Refusal> {
    if size > limits.value_bytes {
        return Err(Refusal::ValueTooLong { size, max: limits.value_bytes });
    }
    Ok(())
}
