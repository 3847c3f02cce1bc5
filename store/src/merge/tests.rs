//! What operations make, what is refused, and what sessions see over several replicas.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::clock::Clock;
use crate::record::arbitrary::colliding;

const HASH: u64 = 7;

fn number(n: f64) -> Number {
    Number::try_from(n).unwrap()
}

fn under(partition_hash: u64, change: Change) -> LocalOp {
    LocalOp { partition_hash, change }
}

fn set(content: Content) -> Change {
    Change::Set { content, expiry: Expiry::At(0), time_ms: None }
}

fn put(n: f64) -> Change {
    set(Content::Number(number(n)))
}

fn text(text: &'static str) -> Content {
    Content::Bytes(Bytes::from(text))
}

fn delete() -> Change {
    set(Content::Nothing)
}

fn add(n: f64) -> Change {
    Change::Merge(Op::Sum, number(n))
}

fn append(text: &'static str) -> Change {
    Change::Append(Bytes::from(text))
}

fn at(time_ms: u64, content: Content) -> Change {
    Change::Set { content, expiry: Expiry::At(0), time_ms: Some(time_ms) }
}

fn until(expiry_ms: u64, content: Content) -> Change {
    Change::Set { content, expiry: Expiry::At(expiry_ms), time_ms: None }
}

/// One key on one replica, as the writer keeps it.
struct Replica {
    clock: Clock,
    record: Option<Record>,
    limits: Limits,
}

impl Replica {
    fn new(origin: u64) -> Self {
        Replica { clock: Clock::new(origin), record: None, limits: Limits::default() }
    }

    fn holding(record: &Record, origin: u64) -> Self {
        let mut replica = Replica::new(origin);
        replica.learn(record);
        replica
    }

    fn write_after(&mut self, after: Stamp, now_ms: u64, op: LocalOp) -> Result<Stamp, Refusal> {
        self.clock.observe(after.time);
        let origin = self.clock.origin();
        let context = Context { origin, after: Some(after), now_ms, limits: &self.limits };
        let existing = if op.is_blind() { None } else { self.record.clone() };
        let applied = apply(existing, op, &context, &mut || self.clock.tick(now_ms))?;
        self.clock.observe(applied.stamp.time);
        // What is blind is newer than all there is, so it is what a join would have made.
        if let Some(there) = self.record.take() {
            assert_eq!(join(there, applied.record.clone()), applied.record);
        }
        self.record = Some(applied.record);
        Ok(applied.stamp)
    }

    fn write(&mut self, now_ms: u64, change: Change) -> Result<Stamp, Refusal> {
        self.write_after(Stamp::ZERO, now_ms, under(HASH, change))
    }

    fn learn(&mut self, record: &Record) {
        self.clock.observe(record.greatest_stamp().time);
        self.record = Some(match self.record.take() {
            Some(mine) => join(mine, record.clone()),
            None => record.clone(),
        });
    }

    /// Ends as a crash does, with nothing lost, and comes back as another origin.
    fn restart(&mut self, origin: u64) {
        let ceiling = self.clock.needs_ceiling(0).unwrap_or(self.clock.ceiling());
        self.clock = Clock::after_restart(ceiling, origin);
    }

    fn read(&self, now_ms: u64) -> Content {
        self.record.as_ref().map_or(Content::Nothing, |record| record.read(now_ms).content)
    }

    fn record(&self) -> &Record {
        self.record.as_ref().unwrap()
    }
}

fn exchange(a: &mut Replica, b: &mut Replica) {
    let (of_a, of_b) = (a.record.clone(), b.record.clone());
    of_b.iter().for_each(|record| a.learn(record));
    of_a.iter().for_each(|record| b.learn(record));
}

fn words(result: Result<Stamp, Refusal>) -> String {
    result.unwrap_err().to_string()
}

// ---- what each operation makes

#[test]
fn merges_go_on_in_one_slot_and_a_put_or_delete_begins_anew() {
    let mut replica = Replica::new(1);
    let first = replica.write(5, add(1.0)).unwrap();
    assert_eq!(replica.write(6, add(2.0)), Ok(first), "the answer is the slot's start");
    assert_eq!(replica.record().slots().len(), 1);
    assert_eq!(replica.read(6), Content::Number(number(3.0)));
    let deleted = replica.write(6, delete()).unwrap();
    assert!(deleted > first);
    assert_eq!(replica.read(6), Content::Nothing);
    assert!(replica.write(6, add(5.0)).unwrap() > deleted);
    assert_eq!(replica.read(6), Content::Number(number(5.0)));
    replica.write(6, put(10.0)).unwrap();
    replica.write(6, add(5.0)).unwrap();
    assert_eq!(replica.read(6), Content::Number(number(15.0)));
}

#[test]
fn each_operation_has_its_own_slot() {
    let mut replica = Replica::new(1);
    for change in [add(4.0), Change::Merge(Op::Max, number(9.0)), Change::Merge(Op::Min, number(7.0))] {
        replica.write(5, change).unwrap();
    }
    assert_eq!(replica.record().slots().len(), 3);
    assert_eq!(replica.read(5), Content::Number(number(7.0)));
}

#[test]
fn a_merge_that_changes_nothing_changes_no_record() {
    let mut replica = Replica::new(1);
    let first = replica.write(5, Change::Merge(Op::Max, number(9.0))).unwrap();
    let before = replica.record().clone();
    assert_eq!(replica.write(6, Change::Merge(Op::Max, number(8.0))), Ok(first));
    assert_eq!(replica.record(), &before);
}

#[test]
fn another_origins_slot_is_left_alone() {
    let mut first = Replica::new(1);
    first.write(5, add(1.0)).unwrap();
    let mut second = Replica::holding(first.record(), 2);
    second.write(5, add(2.0)).unwrap();
    assert_eq!(second.record().slots()[0], first.record().slots()[0]);
    assert_eq!(second.read(5), Content::Number(number(3.0)));
}

#[test]
fn an_expiry_is_given_to_what_is_there_merges_included_and_taken_away_again() {
    let mut replica = Replica::new(1);
    replica.write(5, put(10.0)).unwrap();
    replica.write(5, add(5.0)).unwrap();
    let expired = replica.write(6, Change::Expire(9)).unwrap();
    assert_eq!(replica.read(8), Content::Number(number(15.0)));
    assert_eq!(replica.record().read(8).expiry_ms, 9);
    assert_eq!(replica.read(9), Content::Nothing);
    assert!(replica.write(8, Change::Expire(0)).unwrap() > expired);
    assert_eq!(replica.read(9), Content::Number(number(15.0)));
}

#[test]
fn an_expiry_that_is_there_already_changes_nothing() {
    let mut replica = Replica::new(1);
    replica.write(5, until(9, text("a"))).unwrap();
    let before = replica.record().clone();
    assert_eq!(replica.write(6, Change::Expire(9)), Ok(before.greatest_stamp()));
    assert_eq!(replica.record(), &before);
    assert!(replica.write(6, Change::Expire(0)).unwrap() > before.greatest_stamp());
}

#[test]
fn nothing_is_made_of_a_key_that_holds_nothing_by_giving_it_an_expiry() {
    let mut replica = Replica::new(1);
    replica.write(5, until(7, text("a"))).unwrap();
    let before = replica.record().clone();
    assert_eq!(replica.write(7, Change::Expire(100)), Ok(before.greatest_stamp()));
    assert_eq!(replica.record(), &before, "what has expired does not come back");
    let stamp = Replica::new(1).write(7, Change::Expire(100)).unwrap();
    assert_eq!(stamp, Stamp::ZERO);
}

#[test]
fn a_put_may_keep_the_expiry_that_is_there() {
    let keep = |content| Change::Set { content, expiry: Expiry::Kept, time_ms: None };
    let mut replica = Replica::new(1);
    replica.write(5, until(9, text("a"))).unwrap();
    replica.write(6, keep(text("b"))).unwrap();
    assert_eq!((replica.read(8), replica.read(9)), (text("b"), Content::Nothing));
    replica.write(9, keep(text("c"))).unwrap();
    assert_eq!(replica.record().read(99).expiry_ms, 0, "an expiry that has passed is none");
    assert_eq!(replica.read(99), text("c"));
}

#[test]
fn appends_go_on_from_a_put() {
    let mut replica = Replica::new(1);
    replica.write(5, set(text("a"))).unwrap();
    replica.write(5, append("b")).unwrap();
    replica.write(4, append("c")).unwrap();
    assert_eq!(replica.read(5), text("abc"));
}

#[test]
fn an_own_time_puts_a_value_where_it_belongs_in_time() {
    let mut replica = Replica::new(1);
    replica.write(100, at(50, text("at 50"))).unwrap();
    replica.write(100, at(40, text("at 40"))).unwrap();
    assert_eq!(replica.read(100), text("at 50"));
    replica.write(100, at(60, Content::Nothing)).unwrap();
    replica.write(100, at(55, text("at 55"))).unwrap();
    assert_eq!(replica.read(100), Content::Nothing);
    // One ahead of the clock is passed by it.
    replica.write(100, at(200, text("at 200"))).unwrap();
    replica.write(100, set(text("now"))).unwrap();
    assert_eq!(replica.read(100), text("now"));
}

#[test]
fn an_own_time_between_merges_keeps_those_after_it() {
    let mut replica = Replica::new(1);
    replica.write(10, add(1.0)).unwrap();
    replica.restart(2);
    replica.write(5_000, add(10.0)).unwrap();
    replica.write(5_000, at(20, Content::Number(number(100.0)))).unwrap();
    assert_eq!(replica.read(5_000), Content::Number(number(110.0)));
}

#[test]
fn a_slot_from_before_the_expiry_is_not_gone_on_with_after_it() {
    let mut replica = Replica::new(1);
    replica.write(1, until(10, Content::Number(number(1.0)))).unwrap();
    replica.write(5, add(10.0)).unwrap();
    assert_eq!(replica.read(9), Content::Number(number(11.0)));
    replica.write(10, add(100.0)).unwrap();
    assert_eq!(replica.read(10), Content::Number(number(100.0)));
    replica.write(11, add(1_000.0)).unwrap();
    assert_eq!(replica.read(11), Content::Number(number(1_100.0)));
    assert_eq!(replica.record().slots().len(), 2);
}

#[test]
fn merges_after_an_expiry_on_two_replicas_at_once_all_count() {
    let mut a = Replica::new(1);
    a.write(1, until(10, text("old"))).unwrap();
    let mut b = Replica::holding(a.record(), 2);
    a.write(11, add(1.0)).unwrap();
    b.write(15, add(2.0)).unwrap();
    a.write(20, add(4.0)).unwrap();
    exchange(&mut a, &mut b);
    assert_eq!(a.record(), b.record());
    assert_eq!(a.read(20), Content::Number(number(7.0)));
}

// ---- refusals

#[test]
fn what_does_not_fit_is_refused_as_a_mismatch_and_changes_nothing() {
    let mut bytes = Replica::new(1);
    bytes.write(5, set(text("a"))).unwrap();
    let refusal = bytes.write(5, add(1.0)).unwrap_err();
    assert_eq!((refusal.clone(), refusal.code()), (Refusal::HoldsBytes, v1::FailureCode::Mismatch));
    assert_eq!(bytes.read(5), text("a"));

    let mut sum = Replica::new(1);
    sum.write(5, add(1.0)).unwrap();
    let refusal = sum.write(5, append("a")).unwrap_err();
    assert_eq!((refusal.clone(), refusal.code()), (Refusal::HoldsNumber, v1::FailureCode::Mismatch));
    assert_eq!(sum.read(5), Content::Number(number(1.0)));
}

#[test]
fn what_has_expired_or_been_deleted_fits_anything() {
    for gone in [until(10, text("a")), delete()] {
        let mut replica = Replica::new(1);
        replica.write(5, set(text("a"))).unwrap();
        replica.write(5, gone).unwrap();
        replica.write(10, add(1.0)).unwrap();
        assert_eq!(replica.read(10), Content::Number(number(1.0)));
    }
}

#[test]
fn a_live_key_is_refused_under_another_partition_key() {
    let mut replica = Replica::new(1);
    replica.write(5, add(1.0)).unwrap();
    let own_time = at(5, text("b"));
    for change in [add(1.0), append("a"), own_time] {
        let refusal = replica.write_after(Stamp::ZERO, 5, under(8, change)).unwrap_err();
        assert_eq!(refusal, Refusal::OtherPartition { held: HASH, given: 8 });
        assert_eq!(refusal.code(), v1::FailureCode::Mismatch);
    }
    // A put of the store's own time is, where what is there is shown to it.
    let context = Context { origin: 1, after: None, now_ms: 5, limits: &Limits::default() };
    let mut stamps = || replica.clock.tick(5);
    let refusal = apply(replica.record.clone(), under(8, put(1.0)), &context, &mut stamps);
    assert_eq!(refusal.unwrap_err(), Refusal::OtherPartition { held: HASH, given: 8 });
}

#[test]
fn a_dead_key_goes_over_to_another_partition_key_on_two_replicas_at_once_and_loses_no_merge() {
    // The second is hidden with a merge that must stay so.
    let expired = [until(10, Content::Number(number(1.0))), add(50.0)];
    for gone in [vec![put(1.0), delete()], expired.to_vec()] {
        let mut a = Replica::new(1);
        for change in gone {
            a.write(5, change).unwrap();
        }
        let mut b = Replica::holding(a.record(), 2);
        assert_eq!(a.read(20), Content::Nothing);
        a.write_after(Stamp::ZERO, 20, under(8, add(1.0))).unwrap();
        b.write_after(Stamp::ZERO, 30, under(8, add(2.0))).unwrap();
        exchange(&mut a, &mut b);
        assert_eq!(a.record(), b.record());
        assert_eq!(a.record().partition_hash(), 8);
        assert_eq!(a.read(30), Content::Number(number(3.0)));
    }
}

#[test]
fn values_keys_slots_and_chunks_over_their_limits_are_refused_in_words() {
    let mut replica = Replica::new(1);
    replica.limits = Limits { key_bytes: 3, value_bytes: 4, slots: 2, chunks: 2, ..replica.limits };
    assert_eq!(replica.limits.check_key(b""), Err(Refusal::EmptyKey));
    assert_eq!(replica.limits.check_key(b"abc"), Ok(()));
    assert_eq!(
        replica.limits.check_key(b"abcd").unwrap_err().to_string(),
        "the key has 4 bytes; at most 3 are accepted"
    );
    replica.write(5, set(text("abcd"))).unwrap();
    let too_long = "the value would have 5 bytes; at most 4 are accepted for one key";
    assert_eq!(words(replica.write(5, set(text("abcde")))), too_long);
    assert_eq!(words(replica.write(5, append("e"))), too_long);
    replica.write(5, set(text("a"))).unwrap();
    replica.write(5, append("b")).unwrap();
    replica.write(5, append("c")).unwrap();
    assert_eq!(replica.write(5, append("d")), Err(Refusal::TooManyChunks(2)));
    replica.write(5, delete()).unwrap();
    for origin in [2, 3] {
        replica.restart(origin);
        replica.write(5, add(1.0)).unwrap();
    }
    replica.write(5, add(1.0)).unwrap();
    replica.restart(4);
    assert_eq!(replica.write(5, add(1.0)), Err(Refusal::TooManySlots(2)));
    assert_eq!(replica.read(5), Content::Number(number(3.0)));
}

#[test]
fn what_has_expired_is_not_held_against_the_limits() {
    let mut replica = Replica::new(1);
    replica.limits = Limits { value_bytes: 4, slots: 1, chunks: 1, ..replica.limits };
    replica.write(1, until(10, text("abc"))).unwrap();
    replica.write(1, append("d")).unwrap();
    replica.write(10, append("efgh")).unwrap();
    assert_eq!(replica.read(10), text("efgh"));
}

#[test]
fn times_too_far_ahead_or_older_than_the_grace_time_are_refused_in_words() {
    let mut replica = Replica::new(1);
    replica.limits = Limits { max_clock_skew_ms: 10, grace_ms: 100, ..replica.limits };
    assert!(replica.write(1_000, at(1_010, text("a"))).is_ok());
    assert!(replica.write(1_000, at(900, text("a"))).is_ok());
    assert_eq!(
        words(replica.write(1_000, at(1_011, text("a")))),
        "the given time 1011 (Unix ms) is 11 ms ahead of this store's clock; at most 10 ms are accepted"
    );
    assert_eq!(
        words(replica.write(1_000, at(899, Content::Nothing))),
        "the given time 899 (Unix ms) is 101 ms ago; at most the grace time, 100 ms, is accepted"
    );
}

#[test]
fn a_sum_that_leaves_the_floats_is_refused() {
    let mut replica = Replica::new(1);
    replica.write(5, add(f64::MAX)).unwrap();
    assert!(matches!(replica.write(5, add(f64::MAX)), Err(Refusal::OutOfRange { .. })));
    assert_eq!(replica.read(5), Content::Number(number(f64::MAX)));
}

#[test]
fn after_a_lie_about_the_time_a_write_that_would_be_lost_is_refused() {
    let base = Base { stamp: Stamp { time: u64::MAX, origin: 9 }, partition_hash: HASH, ..Base::default() };
    let mut replica = Replica::holding(&base.into(), 1);
    assert_eq!(replica.write(5, add(1.0)), Err(Refusal::EndOfTime(u64::MAX)));
    assert_eq!(replica.write(5, append("a")), Err(Refusal::EndOfTime(u64::MAX)));
}

#[test]
fn a_slot_whose_seq_a_lie_has_used_up_is_followed_by_another() {
    let start = Stamp { time: 1, origin: 1 };
    let slot = Slot { start, op: Op::Sum, seq: u64::MAX, number: number(1.0) };
    let lie = Record::new(Record::unwritten(HASH).base().clone(), vec![slot], vec![]);
    let mut replica = Replica::holding(&lie, 1);
    replica.write(5, add(2.0)).unwrap();
    assert_eq!(replica.read(5), Content::Number(number(3.0)));
}

#[test]
fn the_wires_operations_are_taken_as_they_are_meant() {
    let from = |kind| LocalOp::from_wire(kind, HASH);
    assert_eq!(from(Wire::Get(v1::Get {})), Ok(None));
    let value = Some(v1::put::Value::Number(-0.0));
    let wire = v1::Put { value, expiry_ms: 3, ..v1::Put::default() };
    let change = Change::Set { content: Content::Number(number(0.0)), expiry: Expiry::At(3), time_ms: None };
    assert_eq!(from(Wire::Put(wire)), Ok(Some(under(HASH, change))));
    assert_eq!(from(Wire::Delete(v1::Delete { time_ms: 4 })), Ok(Some(under(HASH, at(4, Content::Nothing)))));
    let wire = v1::Merge { kind: v1::MergeKind::Min.into(), number: 2.0 };
    assert_eq!(from(Wire::Merge(wire)), Ok(Some(under(HASH, Change::Merge(Op::Min, number(2.0))))));
    let wire = v1::Append { bytes: Bytes::from("x") };
    assert_eq!(from(Wire::Append(wire)), Ok(Some(under(HASH, append("x")))));

    assert!(matches!(from(Wire::Put(v1::Put::default())), Err(Refusal::Incomplete(_))));
    assert!(matches!(from(Wire::Merge(v1::Merge { kind: 9, number: 1.0 })), Err(Refusal::Incomplete(_))));
    let refusal = from(Wire::Merge(v1::Merge { kind: 0, number: f64::NAN })).unwrap_err();
    assert_eq!(refusal.to_string(), "NaN is not a finite number");
    assert_eq!(refusal.code(), v1::FailureCode::Invalid);
}

// ---- replicas and sessions

#[test]
fn a_merge_lost_in_a_crash_and_found_at_a_peer_counts_beside_the_new_origins() {
    let mut a = Replica::new(1);
    a.write(5, add(1.0)).unwrap();
    let synced = a.record.clone();
    a.write(5, add(10.0)).unwrap();
    let peer = Replica::holding(a.record(), 2);
    a.record = synced;
    a.restart(3);
    a.write(5, add(100.0)).unwrap();
    a.learn(peer.record());
    assert_eq!(a.read(5), Content::Number(number(111.0)));
}

#[test]
fn a_sessions_put_delete_and_add_through_replicas_with_skewed_clocks_keep_their_order() {
    // `ahead` is an hour before `behind`, and neither hears of the other until the end.
    let (mut behind, mut ahead) = (Replica::new(1), Replica::new(2));
    let (early, late) = (1_000, 3_601_000);
    behind.write(early, add(1.0)).unwrap();
    let put = ahead.write(late, put(10.0)).unwrap();
    let deleted = behind.write_after(put, early, under(HASH, delete())).unwrap();
    let added = ahead.write_after(deleted, late, under(HASH, add(5.0))).unwrap();
    let again = behind.write_after(added, early, under(HASH, add(6.0))).unwrap();
    assert!(put < deleted && deleted < added && added < again);
    exchange(&mut behind, &mut ahead);
    assert_eq!(behind.record(), ahead.record());
    assert_eq!(ahead.read(late), Content::Number(number(11.0)));
}

#[test]
fn a_session_that_stays_goes_on_in_its_slot_and_one_that_comes_back_opens_one_only() {
    let (mut a, mut b) = (Replica::new(1), Replica::new(2));
    let at_a = a.write(5, add(1.0)).unwrap();
    assert_eq!(a.write_after(at_a, 6, under(HASH, add(1.0))), Ok(at_a), "an equal stamp is its own slot's");
    let at_b = b.write_after(at_a, 5, under(HASH, add(1.0))).unwrap();
    let back = a.write_after(at_b, 6, under(HASH, add(1.0))).unwrap();
    assert!(back > at_b);
    assert_eq!(a.write_after(at_b, 7, under(HASH, add(1.0))), Ok(back));
    assert_eq!(a.record().slots().len(), 2);
}

/// What one session does, and what the network does meanwhile.
#[derive(Clone, Debug)]
enum Step {
    Write {
        session: usize,
        replica: usize,
        change: Change,
    },
    /// The source's record as it was `age` changes ago arrives.
    Ship {
        from: usize,
        to: usize,
        age: usize,
    },
    Restart {
        replica: usize,
    },
    Wait {
        ms: u64,
    },
}

const REPLICAS: usize = 3;

fn steps(changes: impl Strategy<Value = Change>, sessions: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..sessions, 0..REPLICAS, changes)
            .prop_map(|(session, replica, change)| Step::Write { session, replica, change }),
        4 => (0..REPLICAS, 0..REPLICAS, 0usize..4).prop_map(|(from, to, age)| Step::Ship { from, to, age }),
        1 => (0..REPLICAS).prop_map(|replica| Step::Restart { replica }),
        1 => (0u64..3_000).prop_map(|ms| Step::Wait { ms }),
    ];
    prop::collection::vec(step, 0..40)
}

fn whole_numbers() -> impl Strategy<Value = f64> {
    (-100i32..100).prop_map(f64::from)
}

fn number_changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => whole_numbers().prop_map(put),
        1 => Just(delete()),
        3 => whole_numbers().prop_map(add),
        1 => whole_numbers().prop_map(|n| Change::Merge(Op::Max, number(n))),
        1 => whole_numbers().prop_map(|n| Change::Merge(Op::Min, number(n))),
    ]
}

/// Runs the steps on replicas with skewed clocks, lets them exchange all they have, and
/// returns what they then all hold.
fn settled(steps: &[Step], skews: [u64; REPLICAS]) -> Result<Content, TestCaseError> {
    let mut now = 1_000_000;
    let mut origins = 1..;
    let mut origin = move || origins.next().unwrap();
    let mut replicas: Vec<Replica> = skews.iter().map(|_| Replica::new(origin())).collect();
    let mut histories: Vec<Vec<Record>> = vec![Vec::new(); REPLICAS];
    let mut sessions: BTreeMap<(usize, usize), Stamp> = BTreeMap::new();
    for step in steps {
        match step.clone() {
            Step::Write { session, replica, change } => {
                let others = sessions.iter().filter(|((s, r), _)| *s == session && *r != replica);
                let after = others.map(|(_, stamp)| *stamp).max().unwrap_or_default();
                let stamp = replicas[replica]
                    .write_after(after, now + skews[replica], under(HASH, change))
                    .map_err(|refusal| TestCaseError::fail(refusal.to_string()))?;
                let greatest = sessions.entry((session, replica)).or_default();
                *greatest = stamp.max(*greatest);
                histories[replica].push(replicas[replica].record().clone());
            }
            Step::Ship { from, to, age } => {
                let at = histories[from].len().checked_sub(age + 1);
                if let Some(record) = at.map(|at| histories[from][at].clone()) {
                    replicas[to].learn(&record);
                    histories[to].push(replicas[to].record().clone());
                }
            }
            Step::Restart { replica } => replicas[replica].restart(origin()),
            Step::Wait { ms } => now += ms,
        }
    }
    let all: Vec<Record> = replicas.iter().filter_map(|replica| replica.record.clone()).collect();
    for replica in &mut replicas {
        all.iter().for_each(|record| replica.learn(record));
    }
    for replica in &replicas {
        prop_assert_eq!(&replica.record, &replicas[0].record);
    }
    Ok(replicas[0].read(now))
}

/// What one map in one place would hold.
fn in_one_place(steps: &[Step]) -> Content {
    let (mut base, mut sum, mut floor, mut ceiling) = (None, None, None, None);
    for step in steps {
        let Step::Write { change, .. } = step else { continue };
        match change {
            Change::Set { content, .. } => {
                (sum, floor, ceiling) = (None, None, None);
                base = match content {
                    Content::Number(number) => Some(number.get()),
                    _ => None,
                };
            }
            Change::Merge(Op::Sum, n) => sum = Some(sum.unwrap_or(0.0) + n.get()),
            Change::Merge(Op::Max, n) => floor = Some(floor.unwrap_or(f64::MIN).max(n.get())),
            Change::Merge(Op::Min, n) => ceiling = Some(ceiling.unwrap_or(f64::MAX).min(n.get())),
            Change::Append(_) | Change::Expire(_) => {}
        }
    }
    let mut value: Option<f64> = base;
    value = sum.map(|sum| value.unwrap_or(0.0) + sum).or(value);
    value = floor.map(|floor| value.map_or(floor, |v: f64| v.max(floor))).or(value);
    value = ceiling.map(|ceiling| value.map_or(ceiling, |v: f64| v.min(ceiling))).or(value);
    value.map_or(Content::Nothing, |value| Content::Number(number(value)))
}

fn skews() -> impl Strategy<Value = [u64; REPLICAS]> {
    prop::array::uniform3(prop_oneof![Just(0), 0u64..20_000])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn one_sessions_writes_through_any_replicas_end_as_in_one_place(
        steps in steps(number_changes(), 1), skews in skews()
    ) {
        prop_assert_eq!(settled(&steps, skews)?, in_one_place(&steps));
    }

    #[test]
    fn merges_of_many_sessions_count_once_however_they_are_shipped(
        steps in steps(whole_numbers().prop_map(add), 4), skews in skews()
    ) {
        prop_assert_eq!(settled(&steps, skews)?, in_one_place(&steps));
    }

    #[test]
    fn one_sessions_appends_through_any_replicas_keep_their_order(
        steps in steps(prop::sample::select(vec!["a", "b", "c"]).prop_map(append), 1), skews in skews()
    ) {
        let appended: Vec<u8> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Write { change: Change::Append(bytes), .. } => Some(bytes.to_vec()),
                _ => None,
            })
            .collect::<Vec<_>>()
            .concat();
        let expected = match steps.iter().any(|step| matches!(step, Step::Write { .. })) {
            true => Content::Bytes(appended.into()),
            false => Content::Nothing,
        };
        prop_assert_eq!(settled(&steps, skews)?, expected);
    }

    #[test]
    fn a_local_operation_only_ever_adds_to_what_is_known(
        existing in colliding(), change in number_changes(), append in any::<bool>(),
        hash in 0u64..4, after in 0u64..6, now_ms in 0u64..6, own in prop::option::of(0u64..6),
    ) {
        let change = match change {
            _ if append => Change::Append(Bytes::from("x")),
            Change::Set { content, expiry, .. } => Change::Set { content, expiry, time_ms: own },
            change => change,
        };
        let mut replica = Replica::holding(&existing, 1);
        let after = Stamp { time: time_of(after), origin: 2 };
        let op = under(hash, change);
        let blind = op.is_blind();
        if let Ok(stamp) = replica.write_after(after, now_ms, op) {
            // Peers that hear of it and of what was there before end with the same.
            let written = replica.record();
            prop_assert_eq!(&join(existing, written.clone()), written);
            prop_assert!(stamp >= after || own.is_some());
            prop_assert!(!blind || written.base().stamp == stamp);
            prop_assert!(written.greatest_stamp() >= stamp);
        }
    }

    #[test]
    fn a_merge_shows_in_what_is_read_at_once(
        existing in colliding(), n in whole_numbers(), append in any::<bool>(), now_ms in 0u64..6
    ) {
        let mut replica = Replica::holding(&existing, 1);
        let hash = existing.partition_hash();
        let before = replica.read(now_ms);
        let change = if append { Change::Append(Bytes::from("x")) } else { add(n) };
        if replica.write_after(Stamp::ZERO, now_ms, under(hash, change)).is_ok() {
            match (before, replica.read(now_ms)) {
                (Content::Bytes(before), Content::Bytes(now)) => {
                    prop_assert_eq!(now, [&before[..], b"x"].concat());
                }
                (Content::Nothing, Content::Bytes(now)) => prop_assert_eq!(now, "x"),
                (Content::Nothing, Content::Number(now)) => prop_assert_eq!(now.get(), n),
                (Content::Number(_), Content::Number(_)) => {}
                (before, now) => prop_assert!(false, "{before:?} became {now:?}"),
            }
        }
    }
}
