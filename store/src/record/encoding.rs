//! How a record is written down, and split for a message.
//!
//! The encoding, version 1 (integers big-endian, varints LEB128 in their shortest form):
//!
//! ```text
//! header     1   version << 6 | chunks? << 4 | slots? << 3 | expiry? << 2 | content kind
//! stamp     16   the base's: time, origin
//! hash       8   partition hash
//! expiry         varint, if there is one
//! slots          varint count, then each: start 16, op 1, seq varint, number 8
//! chunks         varint count, then each: stamp 16, length varint, bytes
//! content        a number's 8 bytes, or bytes up to the end
//! ```
//!
//! Equal records encode equally, and nothing else decodes: `decode` refuses
//! whatever `encode` would not have written.

use bytes::Bytes;

use super::{Base, Chunk, Content, Number, Op, Record, Slot, Stamp};

const VERSION: u8 = 1;
const HAS_EXPIRY: u8 = 1 << 2;
const HAS_SLOTS: u8 = 1 << 3;
const HAS_CHUNKS: u8 = 1 << 4;
const UNUSED: u8 = 1 << 5;
const KIND: u8 = 0b11;
/// Header, stamp and partition hash: always there, always at the same place.
const FIXED: usize = 1 + 16 + 8;

impl Record {
    /// How many bytes it encodes to.
    pub fn size(&self) -> usize {
        let expiry = match self.base.expiry_ms {
            0 => 0,
            expiry => varint_size(expiry),
        };
        let slots: usize = self.slots.iter().map(slot_size).sum();
        let chunks: usize = self.chunks.iter().map(chunk_size).sum();
        let content = match &self.base.content {
            Content::Nothing => 0,
            Content::Number(_) => 8,
            Content::Bytes(bytes) => bytes.len(),
        };
        FIXED + expiry + count_size(self.slots.len()) + slots + count_size(self.chunks.len()) + chunks + content
    }

    /// Appends its encoding.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(self.size());
        let Base { stamp, expiry_ms, partition_hash, content } = &self.base;
        let flag = |bit, set| if set { bit } else { 0 };
        let kind = match content {
            Content::Nothing => 0,
            Content::Number(_) => 1,
            Content::Bytes(_) => 2,
        };
        out.push(
            VERSION << 6
                | flag(HAS_CHUNKS, !self.chunks.is_empty())
                | flag(HAS_SLOTS, !self.slots.is_empty())
                | flag(HAS_EXPIRY, *expiry_ms != 0)
                | kind,
        );
        put_stamp(out, *stamp);
        out.extend_from_slice(&partition_hash.to_be_bytes());
        if *expiry_ms != 0 {
            put_varint(out, *expiry_ms);
        }
        if !self.slots.is_empty() {
            put_varint(out, self.slots.len() as u64);
            self.slots.iter().for_each(|slot| put_slot(out, slot));
        }
        if !self.chunks.is_empty() {
            put_varint(out, self.chunks.len() as u64);
            self.chunks.iter().for_each(|chunk| put_chunk(out, chunk));
        }
        match content {
            Content::Nothing => {}
            Content::Number(number) => out.extend_from_slice(&number.bits().to_be_bytes()),
            Content::Bytes(bytes) => out.extend_from_slice(bytes),
        }
    }

    /// Its encoding.
    pub fn encoded(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }

    /// The record that encodes to exactly these bytes; its values are slices of them.
    pub fn decode(encoded: Bytes) -> Result<Record, DecodeError> {
        let mut input = Input { bytes: encoded, at: 0 };
        let header = input.byte("header")?;
        if header >> 6 != VERSION || header & UNUSED != 0 {
            return Err(DecodeError::Version(header));
        }
        let stamp = input.stamp("base stamp")?;
        let partition_hash = input.u64("partition hash")?;
        let expiry_ms = if header & HAS_EXPIRY == 0 { 0 } else { input.positive("expiry")? };
        let mut slots: Vec<Slot> = Vec::new();
        if header & HAS_SLOTS != 0 {
            for _ in 0..input.positive("count of slots")? {
                let slot = input.slot()?;
                let last = slots.last().map(Slot::key);
                if slot.start <= stamp || last.is_some_and(|last| slot.key() <= last) {
                    return Err(input.malformed("slot's place"));
                }
                slots.push(slot);
            }
        }
        let mut chunks: Vec<Chunk> = Vec::new();
        if header & HAS_CHUNKS != 0 {
            for _ in 0..input.positive("count of chunks")? {
                let chunk = input.chunk()?;
                if chunk.stamp <= chunks.last().map_or(stamp, |last| last.stamp) {
                    return Err(input.malformed("chunk's place"));
                }
                chunks.push(chunk);
            }
        }
        let content = match header & KIND {
            0 => Content::Nothing,
            1 => Content::Number(input.number("number")?),
            2 => Content::Bytes(input.take(input.left(), "bytes")?),
            _ => return Err(DecodeError::Version(header)),
        };
        if input.left() != 0 {
            return Err(DecodeError::Trailing { at: input.at, left: input.left() });
        }
        let base = Base { stamp, expiry_ms, partition_hash, content };
        Ok(Record { base, slots, chunks })
    }

    /// Records whose join is this one, each of at most `max_bytes` encoded
    /// unless a single base or chunk alone is more than that.
    ///
    /// The base comes first, so that who joins them in order never shows deltas without it.
    pub fn parts(self, max_bytes: usize) -> Vec<Record> {
        if self.size() <= max_bytes {
            return vec![self];
        }
        let (base, slots, chunks) = self.into_parts();
        let mut parts = Vec::new();
        // A zero base is the least of its partition hash, so it gives way to the true one.
        let unwritten = Record::unwritten(base.partition_hash);
        let mut part = Record::from(base);
        // What both counts can grow to; near enough.
        let counts = count_size(slots.len()) + count_size(chunks.len());
        let mut size = part.size() + counts;
        let mut place = |delta: usize, part: &mut Record| {
            if size + delta > max_bytes {
                parts.push(std::mem::replace(part, unwritten.clone()));
                size = FIXED + counts;
            }
            size += delta;
        };
        for slot in slots {
            place(slot_size(&slot), &mut part);
            part.slots.push(slot);
        }
        for chunk in chunks {
            place(chunk_size(&chunk), &mut part);
            part.chunks.push(chunk);
        }
        parts.push(part);
        parts
    }
}

/// What an encoded record shows at a glance: enough to filter by shard, or to see
/// which of two bases is newer, without decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// The base's stamp.
    pub stamp: Stamp,
    /// The partition hash.
    pub partition_hash: u64,
    /// Whether it has slots or chunks.
    pub deltas: bool,
}

/// The fixed part of an encoded record.
pub fn glance(encoded: &[u8]) -> Result<Glance, DecodeError> {
    let short = || DecodeError::Malformed { what: "fixed part", at: 0, size: encoded.len() };
    let (&[header], rest) = encoded.split_first_chunk::<1>().ok_or_else(short)?;
    let (time, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (origin, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (hash, _) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    if header >> 6 != VERSION || header & UNUSED != 0 {
        return Err(DecodeError::Version(header));
    }
    Ok(Glance {
        stamp: Stamp { time: u64::from_be_bytes(*time), origin: u64::from_be_bytes(*origin) },
        partition_hash: u64::from_be_bytes(*hash),
        deltas: header & (HAS_SLOTS | HAS_CHUNKS) != 0,
    })
}

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not this version's header.
    #[error("a record can't begin with byte {0:#04x}: it is corrupt, or of a newer version")]
    Version(u8),
    /// Cut short, or not as it would have been written.
    #[error("corrupt record: no valid {what} before byte {at} of {size}")]
    Malformed {
        /// What should have stood there.
        what: &'static str,
        /// Where reading it stopped.
        at: usize,
        /// The size of the whole.
        size: usize,
    },
    /// It goes on after its end.
    #[error("corrupt record: {left} bytes left over after its end at byte {at}")]
    Trailing {
        /// Where it ended.
        at: usize,
        /// How much follows.
        left: usize,
    },
}

fn varint_size(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn count_size(count: usize) -> usize {
    if count == 0 { 0 } else { varint_size(count as u64) }
}

fn slot_size(slot: &Slot) -> usize {
    16 + 1 + varint_size(slot.seq) + 8
}

fn chunk_size(chunk: &Chunk) -> usize {
    16 + varint_size(chunk.bytes.len() as u64) + chunk.bytes.len()
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_stamp(out: &mut Vec<u8>, stamp: Stamp) {
    out.extend_from_slice(&stamp.time.to_be_bytes());
    out.extend_from_slice(&stamp.origin.to_be_bytes());
}

fn put_slot(out: &mut Vec<u8>, slot: &Slot) {
    put_stamp(out, slot.start);
    out.push(match slot.op {
        Op::Sum => 0,
        Op::Max => 1,
        Op::Min => 2,
    });
    put_varint(out, slot.seq);
    out.extend_from_slice(&slot.number.bits().to_be_bytes());
}

pub(super) fn put_chunk(out: &mut Vec<u8>, chunk: &Chunk) {
    put_stamp(out, chunk.stamp);
    put_varint(out, chunk.bytes.len() as u64);
    out.extend_from_slice(&chunk.bytes);
}

/// What is left to decode.
struct Input {
    bytes: Bytes,
    at: usize,
}

impl Input {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn malformed(&self, what: &'static str) -> DecodeError {
        DecodeError::Malformed { what, at: self.at, size: self.bytes.len() }
    }

    fn take(&mut self, size: usize, what: &'static str) -> Result<Bytes, DecodeError> {
        if size > self.left() {
            return Err(self.malformed(what));
        }
        let taken = self.bytes.slice(self.at..self.at + size);
        self.at += size;
        Ok(taken)
    }

    fn byte(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        let byte = *self.bytes.get(self.at).ok_or_else(|| self.malformed(what))?;
        self.at += 1;
        Ok(byte)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let eight = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<8>());
        let value = u64::from_be_bytes(*eight.ok_or_else(|| self.malformed(what))?);
        self.at += 8;
        Ok(value)
    }

    fn varint(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(what)?;
            let bits = u64::from(byte & 0x7f);
            // The last byte has room for one bit only, and only 0 may be written as 0.
            if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
                return Err(self.malformed(what));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed(what))
    }

    fn positive(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        match self.varint(what)? {
            0 => Err(self.malformed(what)),
            value => Ok(value),
        }
    }

    fn stamp(&mut self, what: &'static str) -> Result<Stamp, DecodeError> {
        Ok(Stamp { time: self.u64(what)?, origin: self.u64(what)? })
    }

    fn number(&mut self, what: &'static str) -> Result<Number, DecodeError> {
        let bits = self.u64(what)?;
        match Number::try_from(f64::from_bits(bits)) {
            Ok(number) if number.bits() == bits => Ok(number),
            _ => Err(self.malformed(what)),
        }
    }

    fn slot(&mut self) -> Result<Slot, DecodeError> {
        Ok(Slot {
            start: self.stamp("slot's start")?,
            op: match self.byte("slot's operation")? {
                0 => Op::Sum,
                1 => Op::Max,
                2 => Op::Min,
                _ => return Err(self.malformed("slot's operation")),
            },
            seq: self.varint("slot's seq")?,
            number: self.number("slot's number")?,
        })
    }

    fn chunk(&mut self) -> Result<Chunk, DecodeError> {
        let stamp = self.stamp("chunk's stamp")?;
        let size = self.varint("chunk's length")?;
        let size = usize::try_from(size).map_err(|_| self.malformed("chunk's length"))?;
        Ok(Chunk { stamp, bytes: self.take(size, "chunk's bytes")? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::join::join;
    use crate::record::arbitrary::{any_record, colliding};

    /// What the law asks of any bytes: an error, or the very record that encodes to them.
    fn decodes_to_itself_or_not_at_all(bytes: Vec<u8>) -> Result<(), TestCaseError> {
        if let Ok(record) = Record::decode(Bytes::from(bytes.clone())) {
            prop_assert_eq!(record.encoded(), bytes);
            let (base, slots, chunks) = record.clone().into_parts();
            prop_assert_eq!(Record::new(base, slots, chunks), record);
        }
        Ok(())
    }

    fn decode(bytes: &[u8]) -> Result<Record, DecodeError> {
        Record::decode(Bytes::copy_from_slice(bytes))
    }

    fn edited(record: &Record, edit: impl FnOnce(&mut Vec<u8>)) -> Result<Record, DecodeError> {
        let mut bytes = record.encoded();
        edit(&mut bytes);
        Record::decode(bytes.into())
    }

    fn slot(time: u64, seq: u64) -> Slot {
        let number = Number::try_from(1.0).unwrap();
        Slot { start: Stamp { time, origin: 1 }, op: Op::Sum, seq, number }
    }

    #[test]
    fn a_put_of_bytes_takes_25_bytes_and_itself() {
        let stamp = Stamp { time: 0x0102_0304_0506_0708, origin: 9 };
        let content = Content::Bytes(Bytes::from_static(b"value"));
        let record = Record::from(Base { stamp, expiry_ms: 0, partition_hash: 5, content });
        let mut expected = vec![0x42, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 9];
        expected.extend([0, 0, 0, 0, 0, 0, 0, 5]);
        expected.extend(b"value");
        assert_eq!(record.encoded(), expected);
    }

    #[test]
    fn a_decoded_value_is_a_slice_of_what_it_was_decoded_from() {
        let content = Content::Bytes(Bytes::from_static(b"value"));
        let whole = Bytes::from(Record::from(Base { content, ..Base::default() }).encoded());
        let Content::Bytes(value) = Record::decode(whole.clone()).unwrap().into_parts().0.content else {
            panic!("bytes");
        };
        assert_eq!(value.as_ptr(), whole[FIXED..].as_ptr());
    }

    #[test]
    fn garbage_is_refused_in_words() {
        let bare = Record::unwritten(1);
        let error = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
        assert_eq!(error(b""), "corrupt record: no valid header before byte 0 of 0");
        assert_eq!(error(b"\x00"), "a record can't begin with byte 0x00: it is corrupt, or of a newer version");
        assert_eq!(
            error(b"\x43aaaaaaaabbbbbbbbcccccccc"),
            "a record can't begin with byte 0x43: it is corrupt, or of a newer version"
        );
        assert_eq!(error(&bare.encoded()[..9]), "corrupt record: no valid base stamp before byte 9 of 9");
        assert_eq!(edited(&bare, |bytes| bytes.push(0)), Err(DecodeError::Trailing { at: FIXED, left: 1 }));
    }

    #[test]
    fn other_ways_to_write_the_same_are_refused() {
        let record = Record::new(Base::default(), vec![slot(5, 3), slot(6, 3)], vec![]);
        let first = FIXED + 1;
        let size = slot_size(&slot(5, 3));
        assert!(edited(&record, |_| ()).is_ok());
        // A longer varint for the same seq; for the count.
        assert!(edited(&record, |b| drop(b.splice(first + 17..first + 18, [0x83, 0]))).is_err());
        assert!(edited(&record, |b| drop(b.splice(FIXED..FIXED + 1, [0x82, 0]))).is_err());
        // The same slot twice; the slots in the other order.
        assert!(edited(&record, |b| b.copy_within(first..first + size, first + size)).is_err());
        assert!(edited(&record, |b| b[first..].rotate_left(size)).is_err());
        // A slot that the base has reset.
        assert!(edited(&record, |b| b[8] = 4).is_ok());
        assert!(edited(&record, |b| b[8] = 5).is_ok(), "a greater origin, at the same time, is later");
        assert!(edited(&record, |b| (b[8], b[16]) = (5, 1)).is_err());
        // The same chunk twice; one that the base has reset.
        let chunk = |time| Chunk { stamp: Stamp { time, origin: 1 }, bytes: Bytes::from_static(b"c") };
        let chunks = Record::new(Base::default(), vec![], vec![chunk(5), chunk(6)]);
        let size = chunk_size(&chunk(5));
        assert!(edited(&chunks, |b| b.copy_within(first..first + size, first + size)).is_err());
        assert!(edited(&chunks, |b| (b[8], b[16]) = (5, 1)).is_err());
        // No slots, said with a flag and a count; an expiry of 0.
        let bare = Record::unwritten(1);
        for flag in [HAS_SLOTS, HAS_CHUNKS, HAS_EXPIRY] {
            assert!(
                edited(&bare, |b| {
                    b[0] |= flag;
                    b.push(0)
                })
                .is_err()
            );
        }
        // Minus zero, NaN, infinity.
        for number in [-0.0, f64::NAN, f64::INFINITY] {
            let bits = f64::to_bits(number).to_be_bytes();
            assert!(
                edited(&record, |b| {
                    let end = b.len() - 8;
                    b[end..].copy_from_slice(&bits)
                })
                .is_err()
            );
        }
        // A varint of more than 64 bits.
        let many = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        assert!(edited(&record, |b| drop(b.splice(first + 17..first + 18, many))).is_err());
    }

    #[test]
    fn a_count_beyond_the_input_is_refused_without_room_being_made_for_it() {
        let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        for flag in [HAS_SLOTS, HAS_CHUNKS] {
            let refused = edited(&Record::unwritten(1), |b| {
                b[0] |= flag;
                b.extend(huge)
            });
            assert!(refused.is_err());
        }
    }

    #[test]
    fn a_record_that_fits_is_one_part() {
        let record = Record::new(Base::default(), vec![slot(1, 1), slot(2, 1)], vec![]);
        assert_eq!(record.clone().parts(record.size()), vec![record.clone()]);
        assert_eq!(record.clone().parts(record.size() - 1).len(), 2);
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(record in any_record()) {
            let encoded = record.encoded();
            prop_assert_eq!(encoded.len(), record.size());
            prop_assert_eq!(decode(&encoded), Ok(record));
        }

        #[test]
        fn equal_records_and_only_they_encode_equally(a in colliding(), b in colliding()) {
            prop_assert_eq!(a == b, a.encoded() == b.encoded());
        }

        #[test]
        fn a_glance_shows_what_decoding_does(record in any_record()) {
            let seen = glance(&record.encoded()).unwrap();
            prop_assert_eq!(seen.stamp, record.base().stamp);
            prop_assert_eq!(seen.partition_hash, record.partition_hash());
            prop_assert_eq!(seen.deltas, !record.slots().is_empty() || !record.chunks().is_empty());
        }

        #[test]
        fn random_bytes_are_refused_or_canonical(mut bytes in prop::collection::vec(any::<u8>(), 0..120), header: u8) {
            // Half of them get past the header.
            if header & 1 == 0 && let Some(first) = bytes.first_mut() {
                *first = VERSION << 6 | (header >> 1) & 0b11111;
            }
            let _ = glance(&bytes);
            decodes_to_itself_or_not_at_all(bytes)?;
        }

        #[test]
        fn mutated_records_are_refused_or_canonical(
            record in prop_oneof![any_record(), colliding()],
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4), 1..4),
        ) {
            let mut bytes = record.encoded();
            for (index, byte, how) in edits {
                if bytes.is_empty() {
                    break;
                }
                let at = index.index(bytes.len());
                match how {
                    0 => bytes[at] = byte,
                    1 => bytes[at] ^= 1 << (byte % 8),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, byte),
                }
            }
            decodes_to_itself_or_not_at_all(bytes)?;
        }

        #[test]
        fn truncated_records_are_refused_or_canonical(record in any_record(), cut in any::<prop::sample::Index>()) {
            let mut bytes = record.encoded();
            bytes.truncate(cut.index(bytes.len()));
            decodes_to_itself_or_not_at_all(bytes)?;
        }

        #[test]
        fn parts_join_to_the_whole_in_any_order(
            record in prop_oneof![any_record(), colliding()], max in 0usize..400, rotate in any::<prop::sample::Index>()
        ) {
            let mut parts = record.clone().parts(max);
            prop_assert_eq!(parts[0].base(), record.base());
            for part in &parts {
                prop_assert_eq!(part.partition_hash(), record.partition_hash());
                let deltas = part.slots().len() + part.chunks().len();
                let has_base = part.base() != Record::unwritten(record.partition_hash()).base();
                prop_assert!(part.size() <= max || deltas + usize::from(has_base) <= 1);
            }
            let at = rotate.index(parts.len());
            parts.rotate_left(at);
            prop_assert_eq!(parts.into_iter().reduce(join), Some(record));
        }
    }
}
