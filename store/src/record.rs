//! What a store holds for one key: a base (put or deleted) and the deltas that
//! merges left after it; how that is read; in [`encoding`], how it is written down. Pure: no clock, no I/O.

use std::cmp::Ordering;

use bytes::Bytes;
use vasto_client::v1;

#[cfg(test)]
pub(crate) mod arbitrary;
pub mod encoding;
#[cfg(test)]
mod tests;

pub use encoding::{DecodeError, Glance, glance};

/// The bits of a stamp's time that count within one millisecond.
pub const COUNTER_BITS: u32 = 16;

/// The first stamp time of a millisecond (saturating: the last times of all
/// stand for every later millisecond).
pub fn time_of(ms: u64) -> u64 {
    ms.saturating_mul(1 << COUNTER_BITS)
}

/// A hybrid logical clock's time and the origin that gave it; ordered as a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// 48 bits of Unix milliseconds, then 16 of counter.
    pub time: u64,
    /// Who gave it: drawn by a replica at its start. 0 is nobody.
    pub origin: u64,
}

impl Stamp {
    /// Before every stamp that is given: never written.
    pub const ZERO: Stamp = Stamp { time: 0, origin: 0 };

    /// The Unix millisecond part of its time.
    pub fn ms(self) -> u64 {
        self.time >> COUNTER_BITS
    }

    /// The next greater one; itself if there is none.
    pub fn successor(self) -> Stamp {
        match (self.origin.checked_add(1), self.time.checked_add(1)) {
            (Some(origin), _) => Stamp { origin, ..self },
            (None, Some(time)) => Stamp { time, origin: 0 },
            (None, None) => self,
        }
    }
}

impl From<v1::Stamp> for Stamp {
    fn from(wire: v1::Stamp) -> Self {
        Stamp { time: wire.time, origin: wire.origin }
    }
}

impl From<Stamp> for v1::Stamp {
    fn from(stamp: Stamp) -> Self {
        v1::Stamp { time: stamp.time, origin: stamp.origin }
    }
}

/// A finite f64 with one zero, so that equal numbers have equal bits and no
/// sum of them is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number(f64);

impl Eq for Number {}

/// NaN or an infinity where a number is wanted.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{0} is not a finite number")]
pub struct NotFinite(pub f64);

impl TryFrom<f64> for Number {
    type Error = NotFinite;

    fn try_from(number: f64) -> Result<Self, NotFinite> {
        if number.is_finite() {
            // -0.0 + 0.0 is 0.0; nothing else changes.
            Ok(Number(number + 0.0))
        } else {
            Err(NotFinite(number))
        }
    }
}

impl Number {
    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// The nearest finite one to a sum of finite ones.
    fn clamped(number: f64) -> Self {
        Number(number.clamp(f64::MIN, f64::MAX) + 0.0)
    }

    fn bits(self) -> u64 {
        self.0.to_bits()
    }
}

/// What a put leaves, or what a read finds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Content {
    /// A tombstone; with the zero stamp: never written.
    #[default]
    Nothing,
    /// A number, that merges can go on from.
    Number(Number),
    /// Bytes, that chunks can be appended to.
    Bytes(Bytes),
}

impl Content {
    /// Which of the three it is.
    pub fn kind(&self) -> Kind {
        match self {
            Content::Nothing => Kind::Nothing,
            Content::Number(_) => Kind::Number,
            Content::Bytes(_) => Kind::Bytes,
        }
    }
}

/// What a key holds, without the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No value.
    Nothing,
    /// A number.
    Number,
    /// Bytes.
    Bytes,
}

/// The last put or delete, and what belongs to it.
///
/// Ordered by stamp; where stamps are equal (a caller's own times, or a peer
/// that lies) the greater encoding of the whole base is the greater, partition
/// hash included. So `max` is a join for all bases, zero ones too. A new version of
/// the encoding must keep version 1's order for this.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Base {
    /// When it was put or deleted; zero: only merges have been made.
    pub stamp: Stamp,
    /// Unix ms from which it reads as nothing; 0: never.
    pub expiry_ms: u64,
    /// xxh64 of the key's partition key.
    pub partition_hash: u64,
    /// What was put.
    pub content: Content,
}

impl Ord for Base {
    fn cmp(&self, other: &Self) -> Ordering {
        self.stamp.cmp(&other.stamp).then_with(|| {
            if self == other {
                return Ordering::Equal;
            }
            let whole = |base: &Base| {
                let mut out = Vec::new();
                Record::from(base.clone()).encode(&mut out);
                out
            };
            whole(self).cmp(&whole(other))
        })
    }
}

impl PartialOrd for Base {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// How a slot's numbers are folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Adds.
    Sum,
    /// At least this much.
    Max,
    /// At most this much.
    Min,
}

impl From<v1::MergeKind> for Op {
    fn from(kind: v1::MergeKind) -> Self {
        match kind {
            v1::MergeKind::Sum => Op::Sum,
            v1::MergeKind::Max => Op::Max,
            v1::MergeKind::Min => Op::Min,
        }
    }
}

/// All that one origin has merged into a key, by one operation, since `start`.
/// Only its origin changes it, and raises `seq` each time.
///
/// Ordered by (start, op), its key; then by seq; then by the number's encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// When it was opened and by whom: a put or delete from then on resets it.
    pub start: Stamp,
    /// The operation.
    pub op: Op,
    /// How many times it has been changed.
    pub seq: u64,
    /// The operands, folded.
    pub number: Number,
}

impl Slot {
    fn key(&self) -> (Stamp, Op) {
        (self.start, self.op)
    }
}

impl Ord for Slot {
    fn cmp(&self, other: &Self) -> Ordering {
        let whole = |slot: &Slot| (slot.key(), slot.seq, slot.number.bits());
        whole(self).cmp(&whole(other))
    }
}

impl PartialOrd for Slot {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Bytes appended at one moment.
///
/// Ordered by stamp, its key; then by its encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// When and by whom.
    pub stamp: Stamp,
    /// What was appended.
    pub bytes: Bytes,
}

impl Ord for Chunk {
    fn cmp(&self, other: &Self) -> Ordering {
        self.stamp.cmp(&other.stamp).then_with(|| {
            if self == other {
                return Ordering::Equal;
            }
            let whole = |chunk: &Chunk| {
                let mut out = Vec::new();
                encoding::put_chunk(&mut out, chunk);
                out
            };
            whole(self).cmp(&whole(other))
        })
    }
}

impl PartialOrd for Chunk {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What a store holds for one key.
///
/// Always normal: slots and chunks sorted by their keys, each key once, and
/// every one of them after the base's stamp (a put or delete resets what came before it).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Record {
    base: Base,
    slots: Vec<Slot>,
    chunks: Vec<Chunk>,
}

impl From<Base> for Record {
    fn from(base: Base) -> Self {
        Record { base, slots: Vec::new(), chunks: Vec::new() }
    }
}

/// What a read finds.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct View {
    /// The value; `Nothing` if the key is missing.
    pub content: Content,
    /// Unix ms at which the base will read as nothing; 0: never, or it does already.
    pub expiry_ms: u64,
    /// The record's greatest stamp.
    pub stamp: Stamp,
}

/// How much of what a record holds can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Load {
    /// Slots that count.
    pub slots: usize,
    /// Chunks that count.
    pub chunks: usize,
    /// Bytes of the base and of the chunks that count.
    pub bytes: usize,
}

impl Record {
    /// The normal record of these: where two deltas have one key the greater
    /// stays, and what is not after the base's stamp goes.
    pub fn new(base: Base, mut slots: Vec<Slot>, mut chunks: Vec<Chunk>) -> Self {
        slots.retain(|slot| slot.start > base.stamp);
        slots.sort_unstable();
        keep_last(&mut slots, |a, b| a.key() == b.key());
        chunks.retain(|chunk| chunk.stamp > base.stamp);
        chunks.sort_unstable();
        keep_last(&mut chunks, |a, b| a.stamp == b.stamp);
        Record { base, slots, chunks }
    }

    /// A record of a key under this partition key, never written.
    pub fn unwritten(partition_hash: u64) -> Self {
        Record::from(Base { partition_hash, ..Base::default() })
    }

    /// The last put or delete.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// What numbers were merged after it, by (start, op).
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// What bytes were appended after it, by stamp.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The base, slots and chunks it is made of.
    pub fn into_parts(self) -> (Base, Vec<Slot>, Vec<Chunk>) {
        (self.base, self.slots, self.chunks)
    }

    /// The hash that says which shard it belongs to.
    pub fn partition_hash(&self) -> u64 {
        self.base.partition_hash
    }

    /// The greatest stamp in it: the base's, a slot's start or a chunk's.
    pub fn greatest_stamp(&self) -> Stamp {
        let slot = self.slots.last().map(|slot| slot.start);
        let chunk = self.chunks.last().map(|chunk| chunk.stamp);
        self.base.stamp.max(slot.unwrap_or_default()).max(chunk.unwrap_or_default())
    }

    // ---- reading

    fn expired(&self, now_ms: u64) -> bool {
        self.base.expiry_ms != 0 && now_ms >= self.base.expiry_ms
    }

    /// Whether a delta that starts then counts: not if the base has expired
    /// and it started before that.
    pub fn counts(&self, start: Stamp, now_ms: u64) -> bool {
        !self.expired(now_ms) || start.time >= time_of(self.base.expiry_ms)
    }

    fn live_slots(&self, now_ms: u64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |slot| self.counts(slot.start, now_ms))
    }

    fn live_chunks(&self, now_ms: u64) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().filter(move |chunk| self.counts(chunk.stamp, now_ms))
    }

    fn live_base(&self, now_ms: u64) -> &Content {
        if self.expired(now_ms) { &Content::Nothing } else { &self.base.content }
    }

    /// What the key holds at this time.
    ///
    /// The base decides. If that is nothing: whichever was merged first of
    /// the deltas that count (numbers, at one and the same stamp). Kinds can only have
    /// met in a join, and what does not fit is kept, unread, until a put or delete.
    pub fn kind(&self, now_ms: u64) -> Kind {
        let base = self.live_base(now_ms).kind();
        if base != Kind::Nothing {
            return base;
        }
        let slot = self.live_slots(now_ms).next().map(|slot| slot.start);
        let chunk = self.live_chunks(now_ms).next().map(|chunk| chunk.stamp);
        match (slot, chunk) {
            (None, None) => Kind::Nothing,
            (Some(slot), Some(chunk)) if chunk < slot => Kind::Bytes,
            (Some(_), _) => Kind::Number,
            (None, Some(_)) => Kind::Bytes,
        }
    }

    /// What a read at this time finds.
    ///
    /// A number is the base plus all sums (in order of their slots, since
    /// floating addition depends on it; clamped to what is finite), then at
    /// least each max, then at most each min: a max is a floor under what the
    /// sums make, a min a ceiling over both. Bytes are the base, then the chunks
    /// by stamp. From `expiry_ms` on, the base reads as nothing, and so do the
    /// deltas that start before it.
    pub fn read(&self, now_ms: u64) -> View {
        let content = match self.kind(now_ms) {
            Kind::Nothing => Content::Nothing,
            Kind::Number => self.fold(now_ms).map_or(Content::Nothing, Content::Number),
            Kind::Bytes => Content::Bytes(self.concatenate(now_ms)),
        };
        let passed = content == Content::Nothing || self.expired(now_ms);
        View { content, expiry_ms: if passed { 0 } else { self.base.expiry_ms }, stamp: self.greatest_stamp() }
    }

    fn fold(&self, now_ms: u64) -> Option<Number> {
        let base = match self.live_base(now_ms) {
            Content::Number(number) => Some(number.get()),
            _ => None,
        };
        let of = |op| self.live_slots(now_ms).filter(move |slot| slot.op == op).map(|slot| slot.number.get());
        let number = of(Op::Sum).fold(base, |sum, number| Some(sum.unwrap_or(0.0) + number));
        let number = of(Op::Max).fold(number, |so_far, n| Some(so_far.map_or(n, |s| s.max(n))));
        let number = of(Op::Min).fold(number, |so_far, n| Some(so_far.map_or(n, |s| s.min(n))));
        number.map(Number::clamped)
    }

    fn concatenate(&self, now_ms: u64) -> Bytes {
        let base = match self.live_base(now_ms) {
            Content::Bytes(bytes) => bytes.clone(),
            _ => Bytes::new(),
        };
        let size: usize = self.live_chunks(now_ms).map(|chunk| chunk.bytes.len()).sum();
        if size == 0 {
            return base;
        }
        let mut whole = Vec::with_capacity(base.len() + size);
        whole.extend_from_slice(&base);
        for chunk in self.live_chunks(now_ms) {
            whole.extend_from_slice(&chunk.bytes);
        }
        whole.into()
    }

    /// How much of it can be seen at this time: what the limits are on.
    pub fn load(&self, now_ms: u64) -> Load {
        let base = match self.live_base(now_ms) {
            Content::Bytes(bytes) => bytes.len(),
            _ => 0,
        };
        self.live_chunks(now_ms).fold(
            Load { slots: self.live_slots(now_ms).count(), chunks: 0, bytes: base },
            |load, chunk| Load { chunks: load.chunks + 1, bytes: load.bytes.saturating_add(chunk.bytes.len()), ..load },
        )
    }

    /// Whether it is a tombstone (or was never written) and nothing was merged after it.
    pub fn is_tombstone_without_later_deltas(&self) -> bool {
        self.base.content == Content::Nothing && self.slots.is_empty() && self.chunks.is_empty()
    }

    /// Whether compaction may drop it, once every replica has confirmed it and
    /// the grace time has passed: a tombstone without later deltas, or all of it expired by
    /// every clock that is no more than `skew_ms` behind this one.
    pub fn may_be_collected(&self, now_ms: u64, skew_ms: u64) -> bool {
        // What reads as nothing goes on to, until something is joined to it.
        self.kind(now_ms.saturating_sub(skew_ms)) == Kind::Nothing
    }
}

/// Drops all but the last of neighbours that are the same.
fn keep_last<T>(sorted: &mut Vec<T>, same: impl Fn(&T, &T) -> bool) {
    sorted.dedup_by(|later, kept| {
        let same = same(later, kept);
        if same {
            std::mem::swap(later, kept);
        }
        same
    });
}
