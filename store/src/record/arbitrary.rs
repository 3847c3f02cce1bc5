//! Records for property tests.

use bytes::Bytes;
use proptest::prelude::*;

use super::{Base, Chunk, Content, Number, Op, Record, Slot, Stamp, time_of};

/// Milliseconds that matter to each other as stamps and as expiries.
const FEW_MS: u64 = 4;

fn few_stamps() -> impl Strategy<Value = Stamp> {
    (0..FEW_MS, 0u64..2, 0u64..3).prop_map(|(ms, counter, origin)| Stamp { time: time_of(ms) + counter, origin })
}

fn few_numbers() -> impl Strategy<Value = Number> {
    prop::sample::select(vec![-1e300, -1.5, 0.0, 0.1, 0.2, 3.0, 1e300, f64::MAX])
        .prop_map(|n| Number::try_from(n).unwrap())
}

fn few_bytes() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "a", "b", "ab"]).prop_map(Bytes::from)
}

fn ops() -> impl Strategy<Value = Op> {
    prop::sample::select(vec![Op::Sum, Op::Max, Op::Min])
}

fn record_of(
    stamps: impl Strategy<Value = Stamp> + Clone,
    numbers: impl Strategy<Value = Number> + Clone,
    bytes: impl Strategy<Value = Bytes> + Clone,
    small: impl Strategy<Value = u64> + Clone,
    deltas: usize,
) -> impl Strategy<Value = Record> {
    let content = prop_oneof![
        Just(Content::Nothing),
        numbers.clone().prop_map(Content::Number),
        bytes.clone().prop_map(Content::Bytes),
    ];
    let base = (stamps.clone(), prop_oneof![Just(0), small.clone()], small.clone(), content)
        .prop_map(|(stamp, expiry_ms, partition_hash, content)| Base { stamp, expiry_ms, partition_hash, content });
    // Often unwritten, so that deltas survive.
    let base = prop_oneof![
        2 => base,
        1 => small.clone().prop_map(|partition_hash| Base { partition_hash, ..Base::default() }),
    ];
    let slot =
        (stamps.clone(), ops(), small, numbers).prop_map(|(start, op, seq, number)| Slot { start, op, seq, number });
    let chunk = (stamps, bytes).prop_map(|(stamp, bytes)| Chunk { stamp, bytes });
    (base, prop::collection::vec(slot, 0..deltas), prop::collection::vec(chunk, 0..deltas))
        .prop_map(|(base, slots, chunks)| Record::new(base, slots, chunks))
}

/// Drawn to collide: few stamps, origins, seqs, expiries and partition hashes, and
/// equal ones with different contents, as no honest replica makes them.
pub(crate) fn colliding() -> impl Strategy<Value = Record> {
    record_of(few_stamps().boxed(), few_numbers().boxed(), few_bytes().boxed(), (0..FEW_MS).boxed(), 6)
}

/// Drawn from all there are, the greatest stamps, seqs and numbers too.
pub(crate) fn any_record() -> impl Strategy<Value = Record> {
    let word = prop_oneof![any::<u64>(), 0u64..300, Just(u64::MAX), (0..64u32).prop_map(|n| 1 << n)].boxed();
    let stamps = (word.clone(), word.clone()).prop_map(|(time, origin)| Stamp { time, origin });
    let numbers = any::<f64>().prop_filter_map("finite", |n| Number::try_from(n).ok());
    let bytes = prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
    record_of(stamps.boxed(), numbers.boxed(), bytes.boxed(), word, 12)
}
