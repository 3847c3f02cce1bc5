//! What records hold and read as.

use proptest::prelude::*;

use super::*;

fn number(n: f64) -> Number {
    Number::try_from(n).unwrap()
}

fn at(ms: u64) -> Stamp {
    Stamp { time: time_of(ms), origin: 1 }
}

fn slot(ms: u64, op: Op, n: f64) -> Slot {
    Slot { start: at(ms), op, seq: 1, number: number(n) }
}

fn chunk(ms: u64, bytes: &'static str) -> Chunk {
    Chunk { stamp: at(ms), bytes: Bytes::from_static(bytes.as_bytes()) }
}

fn base(ms: u64, expiry_ms: u64, content: Content) -> Base {
    Base { stamp: at(ms), expiry_ms, partition_hash: 7, content }
}

fn bytes(bytes: &'static str) -> Content {
    Content::Bytes(Bytes::from_static(bytes.as_bytes()))
}

fn read(record: &Record, now_ms: u64) -> Content {
    record.read(now_ms).content
}

#[test]
fn nan_and_infinities_are_refused_and_there_is_one_zero() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert!(Number::try_from(bad).is_err());
    }
    assert_eq!(number(-0.0).bits(), number(0.0).bits());
    assert_eq!(Number::try_from(f64::NAN).unwrap_err().to_string(), "NaN is not a finite number");
}

#[test]
fn a_put_resets_the_deltas_up_to_its_stamp_and_keeps_the_later_ones() {
    let slots = vec![slot(1, Op::Sum, 1.0), slot(2, Op::Sum, 10.0), slot(3, Op::Sum, 100.0)];
    let chunks = vec![chunk(2, "a"), chunk(3, "b")];
    let record = Record::new(base(2, 0, Content::Nothing), slots, chunks);
    assert_eq!(record.slots(), [slot(3, Op::Sum, 100.0)]);
    assert_eq!(record.chunks(), [chunk(3, "b")]);
}

#[test]
fn sums_add_to_the_base_then_maxes_are_a_floor_and_mins_a_ceiling() {
    let base = base(1, 0, Content::Number(number(1.0)));
    let with = |slots: Vec<Slot>| read(&Record::new(base.clone(), slots, vec![]), 0);
    let (sum, max, min) = (slot(4, Op::Sum, 5.0), slot(3, Op::Max, 8.0), slot(2, Op::Min, 2.0));
    assert_eq!(with(vec![]), Content::Number(number(1.0)));
    assert_eq!(with(vec![sum]), Content::Number(number(6.0)));
    assert_eq!(with(vec![sum, max]), Content::Number(number(8.0)));
    assert_eq!(with(vec![sum, max, min]), Content::Number(number(2.0)));
    assert_eq!(with(vec![sum, min]), Content::Number(number(2.0)));
}

#[test]
fn without_a_base_a_max_or_min_stands_alone() {
    for op in [Op::Max, Op::Min] {
        let record = Record::new(Base::default(), vec![slot(1, op, -5.0)], vec![]);
        assert_eq!(read(&record, 0), Content::Number(number(-5.0)));
    }
}

#[test]
fn a_sum_beyond_all_floats_reads_as_the_greatest() {
    let slots = vec![slot(1, Op::Sum, f64::MAX), slot(2, Op::Sum, f64::MAX)];
    let record = Record::new(Base::default(), slots, vec![]);
    assert_eq!(read(&record, 0), Content::Number(number(f64::MAX)));
}

#[test]
fn chunks_append_to_the_base_by_stamp() {
    let chunks = vec![chunk(3, "c"), chunk(2, "b")];
    let record = Record::new(base(1, 0, bytes("a")), vec![], chunks.clone());
    assert_eq!(read(&record, 0), bytes("abc"));
    assert_eq!(read(&Record::new(Base::default(), vec![], chunks), 0), bytes("bc"));
}

#[test]
fn appending_nothing_to_nothing_is_an_empty_value_and_not_a_missing_one() {
    let record = Record::new(Base::default(), vec![], vec![chunk(1, "")]);
    assert_eq!(read(&record, 0), bytes(""));
}

#[test]
fn where_kinds_met_the_base_decides_else_the_first_delta() {
    let (sum, text) = (slot(2, Op::Sum, 5.0), chunk(3, "x"));
    let of = |content, slot: Slot, chunk: Chunk| read(&Record::new(base(1, 0, content), vec![slot], vec![chunk]), 0);
    assert_eq!(of(bytes("a"), sum, text.clone()), bytes("ax"));
    assert_eq!(of(Content::Number(number(1.0)), sum, text.clone()), Content::Number(number(6.0)));
    assert_eq!(of(Content::Nothing, sum, text.clone()), Content::Number(number(5.0)));
    assert_eq!(of(Content::Nothing, slot(3, Op::Sum, 5.0), chunk(2, "x")), bytes("x"));
    assert_eq!(of(Content::Nothing, slot(3, Op::Sum, 5.0), text), Content::Number(number(5.0)));
}

#[test]
fn an_expired_base_reads_as_nothing_with_what_was_merged_before_and_later_deltas_count() {
    let slots = vec![slot(5, Op::Sum, 10.0), slot(9, Op::Sum, 100.0), slot(10, Op::Sum, 1000.0)];
    let record = Record::new(base(1, 10, Content::Number(number(1.0))), slots, vec![]);
    assert_eq!(read(&record, 9), Content::Number(number(1111.0)));
    assert_eq!(read(&record, 10), Content::Number(number(1000.0)));
    assert_eq!((record.read(9).expiry_ms, record.read(10).expiry_ms), (10, 0));

    let record = Record::new(base(1, 10, bytes("a")), vec![], vec![chunk(9, "b"), chunk(10, "c")]);
    assert_eq!(read(&record, 9), bytes("abc"));
    assert_eq!(read(&record, 10), bytes("c"));

    let record = Record::new(base(1, 10, bytes("a")), vec![], vec![chunk(9, "b")]);
    assert_eq!(read(&record, 10), Content::Nothing);
}

#[test]
fn after_bytes_expire_numbers_may_follow() {
    let record = Record::new(base(1, 10, bytes("a")), vec![slot(11, Op::Sum, 2.0)], vec![]);
    assert_eq!(read(&record, 9), bytes("a"));
    assert_eq!(read(&record, 11), Content::Number(number(2.0)));
}

#[test]
fn what_may_be_collected_is_a_bare_tombstone_or_expired_by_every_clock() {
    let tombstone = Record::from(base(1, 0, Content::Nothing));
    assert!(tombstone.is_tombstone_without_later_deltas());
    assert!(tombstone.may_be_collected(0, 0));
    let revived = Record::new(base(1, 0, Content::Nothing), vec![slot(2, Op::Sum, 1.0)], vec![]);
    assert!(!revived.is_tombstone_without_later_deltas());
    assert!(!revived.may_be_collected(u64::MAX, 0));

    let expiring = Record::new(base(1, 10, bytes("a")), vec![], vec![chunk(9, "b")]);
    assert!(!expiring.may_be_collected(9, 0));
    assert!(expiring.may_be_collected(10, 0));
    assert!(!expiring.may_be_collected(14, 5));
    assert!(expiring.may_be_collected(15, 5));
    let revived = Record::new(base(1, 10, bytes("a")), vec![], vec![chunk(10, "b")]);
    assert!(!revived.may_be_collected(u64::MAX, 0));
    assert!(!Record::from(base(1, 0, bytes("a"))).may_be_collected(u64::MAX, 0));
}

#[test]
fn a_stamps_successor_is_the_next_greater() {
    let stamp = |time, origin| Stamp { time, origin };
    assert_eq!(stamp(1, 2).successor(), stamp(1, 3));
    assert_eq!(stamp(1, u64::MAX).successor(), stamp(2, 0));
    assert_eq!(stamp(u64::MAX, u64::MAX).successor(), stamp(u64::MAX, u64::MAX));
}

proptest! {
    #[test]
    fn an_unwritten_base_is_the_least_of_its_partition(record in arbitrary::colliding()) {
        let unwritten = Record::unwritten(record.partition_hash());
        prop_assert!(unwritten.base() <= record.base());
    }

    #[test]
    fn the_order_of_equal_stamps_is_that_of_encodings(
        a in arbitrary::colliding(), b in arbitrary::colliding()
    ) {
        let (a, b) = (a.base().clone(), Base { stamp: a.base().stamp, ..b.base().clone() });
        let encoded = |base: &Base| Record::from(base.clone()).encoded();
        prop_assert_eq!(a.cmp(&b), encoded(&a).cmp(&encoded(&b)));
    }

    #[test]
    fn before_its_expiry_a_record_reads_as_if_it_had_none(
        record in arbitrary::colliding(), now_ms in 0u64..6
    ) {
        let (base, slots, chunks) = record.clone().into_parts();
        let expiry = base.expiry_ms;
        let forever = Record::new(Base { expiry_ms: 0, ..base }, slots, chunks);
        if expiry == 0 || now_ms < expiry {
            prop_assert_eq!(record.read(now_ms).content, forever.read(now_ms).content);
        }
    }

    #[test]
    fn from_its_expiry_on_a_record_reads_as_its_later_deltas_alone(
        record in arbitrary::colliding(), now_ms in 0u64..6
    ) {
        let expiry = record.base().expiry_ms;
        if expiry != 0 && now_ms >= expiry {
            let (_, mut slots, mut chunks) = record.clone().into_parts();
            slots.retain(|slot| slot.start.time >= time_of(expiry));
            chunks.retain(|chunk| chunk.stamp.time >= time_of(expiry));
            let later = Record::new(Base::default(), slots, chunks);
            prop_assert_eq!(record.read(now_ms).content, later.read(0).content);
        }
    }

    #[test]
    fn kind_load_and_read_agree(record in arbitrary::colliding(), now_ms in 0u64..6) {
        let (view, load) = (record.read(now_ms), record.load(now_ms));
        prop_assert_eq!(view.content.kind(), record.kind(now_ms));
        if let Content::Bytes(bytes) = view.content {
            prop_assert_eq!(bytes.len(), load.bytes);
        }
        prop_assert!(view.stamp >= record.base().stamp);
    }

    #[test]
    fn what_may_be_collected_reads_as_nothing_ever_after(
        record in arbitrary::colliding(), now_ms in 0u64..6, later in 0u64..6
    ) {
        if record.may_be_collected(now_ms, 1) {
            prop_assert_eq!(record.kind((now_ms + later).saturating_sub(1)), Kind::Nothing);
        }
        if record.is_tombstone_without_later_deltas() {
            prop_assert!(record.may_be_collected(now_ms, 1));
        }
    }

    #[test]
    fn no_stamp_of_a_record_is_above_its_greatest(record in arbitrary::any_record()) {
        let greatest = record.greatest_stamp();
        let deltas = record.slots().iter().map(|slot| slot.start);
        let all: Vec<Stamp> = deltas
            .chain(record.chunks().iter().map(|chunk| chunk.stamp))
            .chain([record.base().stamp])
            .collect();
        prop_assert_eq!(all.into_iter().max(), Some(greatest));
    }
}
