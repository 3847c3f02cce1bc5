//! The one function that decides what comes of data that moves. Whoever knows that it gives what came, as for a put newer
//! than all that is there, need not call it.

use crate::record::Record;

/// The least record that knows all that both know: commutative, associative and
/// idempotent for every record there can be, also those of a peer that lies.
///
/// The greater base wins; slots unite by (start with its origin, op), the greater seq wins;
/// chunks unite by stamp; where those are equal the greater encoding wins.
/// Then what is not after the base's stamp is dropped ([`Record::new`]). Each
/// step is a maximum in a total order or a union of such, and the drop depends on the greatest
/// base alone: so the order and number of joins change nothing.
pub fn join(a: Record, b: Record) -> Record {
    let (a_base, mut slots, mut chunks) = a.into_parts();
    let (b_base, b_slots, b_chunks) = b.into_parts();
    slots.extend(b_slots);
    chunks.extend(b_chunks);
    Record::new(a_base.max(b_base), slots, chunks)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::record::arbitrary::{any_record, colliding};
    use crate::record::{Base, Chunk, Content, Number, Op, Slot, Stamp};

    fn records() -> impl Strategy<Value = Record> {
        prop_oneof![9 => colliding(), 1 => any_record()]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn join_is_commutative(a in records(), b in records()) {
            prop_assert_eq!(join(a.clone(), b.clone()), join(b, a));
        }

        #[test]
        fn join_is_associative(a in records(), b in records(), c in records()) {
            let left = join(join(a.clone(), b.clone()), c.clone());
            prop_assert_eq!(left, join(a, join(b, c)));
        }

        #[test]
        fn join_is_idempotent(a in records(), b in records()) {
            prop_assert_eq!(join(a.clone(), a.clone()), a.clone());
            let joined = join(a.clone(), b);
            prop_assert_eq!(join(joined.clone(), a), joined);
        }

        #[test]
        fn an_unwritten_record_of_the_partition_changes_nothing(a in records()) {
            prop_assert_eq!(join(a.clone(), Record::unwritten(a.partition_hash())), a);
        }

        #[test]
        fn what_was_put_after_all_that_a_record_has_seen_is_the_join(a in records(), b in records()) {
            let (base, slots, chunks) = b.into_parts();
            let stamp = Stamp { time: a.greatest_stamp().time.saturating_add(1), ..base.stamp };
            prop_assume!(stamp.time > a.greatest_stamp().time);
            let newest = Record::new(Base { stamp, ..base }, slots, chunks);
            prop_assert_eq!(join(a, newest.clone()), newest);
        }

        #[test]
        fn replicas_that_get_the_same_records_in_any_order_hold_the_same(
            (records, again) in prop::collection::vec(records(), 1..6)
                .prop_flat_map(|all| {
                    let mut twice = all.clone();
                    twice.extend(all.clone());
                    (Just(all), Just(twice).prop_shuffle())
                })
        ) {
            let here = records.into_iter().reduce(join).unwrap();
            let there = again.into_iter().reduce(join).unwrap();
            prop_assert_eq!(here.encoded(), there.encoded());
        }

        #[test]
        fn a_join_drops_a_delta_only_for_a_base_from_its_start_on(a in records(), b in records()) {
            let joined = join(a.clone(), b.clone());
            for slot in a.slots().iter().chain(b.slots()) {
                let kept = joined.slots().iter().any(|s| (s.start, s.op) == (slot.start, slot.op) && s >= slot);
                prop_assert_eq!(kept, slot.start > joined.base().stamp);
            }
            for chunk in a.chunks().iter().chain(b.chunks()) {
                let kept = joined.chunks().iter().any(|c| c.stamp == chunk.stamp && c >= chunk);
                prop_assert_eq!(kept, chunk.stamp > joined.base().stamp);
            }
        }
    }

    fn stamp(time: u64) -> Stamp {
        Stamp { time, origin: 1 }
    }

    fn put(time: u64, bytes: &'static str) -> Record {
        let content = Content::Bytes(Bytes::from_static(bytes.as_bytes()));
        Record::from(Base { stamp: stamp(time), content, ..Base::default() })
    }

    #[test]
    fn the_newer_put_wins_whichever_comes_first() {
        assert_eq!(join(put(2, "new"), put(1, "old")), put(2, "new"));
        assert_eq!(join(put(1, "old"), put(2, "new")), put(2, "new"));
    }

    #[test]
    fn an_older_put_that_comes_late_does_not_resurrect_what_was_deleted() {
        let deleted = Record::from(Base { stamp: stamp(2), ..Base::default() });
        assert_eq!(join(deleted.clone(), put(1, "old")), deleted);
    }

    #[test]
    fn equal_stamps_settle_on_one_value_for_ever() {
        let (a, b) = (put(1, "a"), put(1, "b"));
        let settled = join(a.clone(), b.clone());
        assert_eq!(settled, b);
        assert_eq!(join(settled.clone(), a), settled);
    }

    #[test]
    fn the_greater_seq_of_a_slot_wins_and_slots_of_two_origins_both_stay() {
        let slot = |origin, seq, n| Slot {
            start: Stamp { time: 1, origin },
            op: Op::Sum,
            seq,
            number: Number::try_from(n).unwrap(),
        };
        let of = |slots| Record::new(Base::default(), slots, vec![]);
        // The greater seq, not the greater number.
        assert_eq!(join(of(vec![slot(1, 2, 5.0)]), of(vec![slot(1, 1, 9.0)])), of(vec![slot(1, 2, 5.0)]));
        let both = vec![slot(1, 1, 5.0), slot(2, 1, 9.0)];
        assert_eq!(join(of(vec![both[0]]), of(vec![both[1]])), of(both));
    }

    #[test]
    fn chunks_of_two_replicas_all_stay_in_the_order_of_their_stamps() {
        let of = |times: &[u64]| {
            let chunk = |&time| Chunk { stamp: stamp(time), bytes: Bytes::from(time.to_string()) };
            Record::new(Base::default(), vec![], times.iter().map(chunk).collect())
        };
        assert_eq!(join(of(&[1, 3]), of(&[4, 2, 3])), of(&[1, 2, 3, 4]));
    }
}
