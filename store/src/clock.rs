//! A replica's hybrid logical clock: every stamp it gives is greater than all
//! that the replica has seen, through restarts too. Pure: told the time, tells when to sync.

use crate::record::{Stamp, time_of};

/// How far ahead of need a ceiling is synced: while it writes, a replica syncs one this often.
const STEP_MS: u64 = 3_000;
/// The same while the clock is ahead of the wall clock, so that a crash adds little: else stores that crash
/// again and again, each beginning above its ceiling and drawing the others along, would run ahead for ever.
const AHEAD_STEP_MS: u64 = 50;

/// Gives stamps.
///
/// The ceiling law: what a batch has ticked and observed may be stored, shown or answered only
/// once the ceiling that [`Clock::needs_ceiling`] asks for is synced ([`Clock::set_ceiling`]).
#[derive(Clone, Debug)]
pub struct Clock {
    last: u64,
    stored: u64,
    origin: u64,
    ceiling: u64,
}

impl Clock {
    /// A new replica's clock.
    pub fn new(origin: u64) -> Self {
        Clock::after_restart(0, origin)
    }

    /// The clock of a replica that comes back and finds this ceiling synced:
    /// no stamp that it gave or stored before is above that.
    pub fn after_restart(ceiling: u64, origin: u64) -> Self {
        Clock { last: ceiling, stored: ceiling, origin, ceiling }
    }

    /// Who gives its stamps.
    pub fn origin(&self) -> u64 {
        self.origin
    }

    /// The synced ceiling.
    pub fn ceiling(&self) -> u64 {
        self.ceiling
    }

    /// The greatest stamp time that it has given or seen.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// At or above every stamp time that is stored here, whatever it has heard of.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// A stamp greater than all that it has given or seen, and not before the wall clock.
    /// A counter that is full carries into the milliseconds.
    ///
    /// At the end of time (in the year 10889, or once a peer has lied about it) it
    /// stands still, and stamps repeat: joins still converge, in no meaningful order.
    pub fn tick(&mut self, now_ms: u64) -> Stamp {
        self.last = self.last.saturating_add(1).max(time_of(now_ms));
        Stamp { time: self.last, origin: self.origin }
    }

    /// Passes a stamp time that it hears of.
    pub fn observe(&mut self, time: u64) {
        self.last = self.last.max(time);
    }

    /// Passes one that is stored here.
    pub fn store(&mut self, time: u64) {
        self.observe(time);
        self.stored = self.stored.max(time);
    }

    /// Passes a stamp time that a caller names (its session's `after`), unless that is more than
    /// `max_skew_ms` ahead of both the wall clock and this one: a caller can't push the
    /// clocks of a whole shard to the end of time. False: not passed, so not yet to be
    /// executed; an honest stamp's own replica will soon have brought this clock near.
    pub fn pass(&mut self, time: u64, now_ms: u64, max_skew_ms: u64) -> bool {
        let near = self.last.max(time_of(now_ms)).saturating_add(time_of(max_skew_ms));
        if time <= near {
            self.observe(time);
        }
        time <= near
    }

    /// The ceiling to sync before anything that it has given or seen is
    /// stored; none if the present one covers it.
    pub fn needs_ceiling(&self, now_ms: u64) -> Option<u64> {
        let soon = self.last.saturating_add(time_of(AHEAD_STEP_MS));
        (self.last > self.ceiling).then(|| soon.max(time_of(now_ms.saturating_add(STEP_MS))))
    }

    /// A ceiling to write soon, so that it is synced by the time it is needed, and nobody waits for that: once the wall
    /// clock has come halfway to the present one.
    pub fn wants_ceiling(&self, now_ms: u64) -> Option<u64> {
        (self.ceiling < time_of(now_ms.saturating_add(STEP_MS / 2))).then(|| time_of(now_ms.saturating_add(STEP_MS)))
    }

    /// This ceiling is synced.
    pub fn set_ceiling(&mut self, ceiling: u64) {
        self.ceiling = self.ceiling.max(ceiling);
    }

    /// How many milliseconds a stamp time is ahead of the wall clock: more than
    /// `max_clock_skew` is accepted from a peer, but a person should know.
    pub fn ahead_ms(time: u64, now_ms: u64) -> u64 {
        Stamp { time, origin: 0 }.ms().saturating_sub(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tick_takes_the_wall_clock_when_that_is_ahead() {
        let mut clock = Clock::new(7);
        assert_eq!(clock.tick(5), Stamp { time: time_of(5), origin: 7 });
        assert_eq!(clock.tick(5), Stamp { time: time_of(5) + 1, origin: 7 });
        assert_eq!(clock.tick(4), Stamp { time: time_of(5) + 2, origin: 7 });
        assert_eq!(clock.tick(6), Stamp { time: time_of(6), origin: 7 });
    }

    #[test]
    fn what_it_only_hears_of_is_not_stored() {
        let mut clock = Clock::after_restart(time_of(4), 7);
        assert_eq!(clock.stored(), time_of(4), "any stamp up to the ceiling may be");
        clock.observe(time_of(6));
        assert!(clock.pass(time_of(7), 7, 0));
        assert_eq!((clock.stored(), clock.last()), (time_of(4), time_of(7)));
        clock.store(time_of(5));
        assert_eq!((clock.stored(), clock.last()), (time_of(5), time_of(7)));
        clock.store(time_of(8));
        assert_eq!((clock.stored(), clock.last()), (time_of(8), time_of(8)));
    }

    #[test]
    fn a_full_counter_carries_into_the_milliseconds() {
        let mut clock = Clock::new(7);
        clock.observe(time_of(5) + 0xffff);
        assert_eq!(clock.tick(5).time, time_of(6));
    }

    #[test]
    fn no_stamp_is_the_zero_one() {
        assert!(Clock::new(0).tick(0) > Stamp::ZERO);
    }

    #[test]
    fn at_the_end_of_time_it_stands_still() {
        let mut clock = Clock::new(7);
        clock.observe(u64::MAX);
        assert_eq!(clock.needs_ceiling(0), Some(u64::MAX));
        clock.set_ceiling(u64::MAX);
        assert_eq!(clock.tick(u64::MAX).time, u64::MAX);
        assert_eq!(clock.needs_ceiling(0), None);
    }

    #[test]
    fn a_caller_can_push_the_clock_no_further_than_the_skew_limit() {
        let mut clock = Clock::new(7);
        assert!(!clock.pass(u64::MAX, 100, 10));
        assert!(!clock.pass(time_of(110) + 1, 100, 10));
        assert!(clock.last() < time_of(100));
        assert!(clock.pass(time_of(110), 100, 10));
        assert_eq!(clock.last(), time_of(110));
        // Where peers are ahead of the wall clock, so may their callers be.
        clock.observe(time_of(5_000));
        assert!(clock.pass(time_of(5_010), 100, 10));
        assert!(clock.pass(3, 100, 10));
        assert_eq!(clock.last(), time_of(5_010));
    }

    #[test]
    fn a_busy_clock_asks_for_a_ceiling_once_in_three_seconds() {
        let mut clock = Clock::new(7);
        let mut synced = Vec::new();
        for ms in 10_000..20_000 {
            clock.tick(ms);
            clock.tick(ms);
            if let Some(ceiling) = clock.needs_ceiling(ms) {
                clock.set_ceiling(ceiling);
                synced.push(ms);
            }
        }
        assert_eq!(synced, [10_000, 13_000, 16_000, 19_000]);
    }

    #[test]
    fn who_writes_the_ceiling_that_is_wanted_never_needs_one() {
        let mut clock = Clock::new(7);
        clock.set_ceiling(time_of(10_000 + STEP_MS));
        let mut written = Vec::new();
        for ms in 10_000..20_000 {
            clock.tick(ms);
            assert_eq!(clock.needs_ceiling(ms), None, "{ms}");
            if let Some(ceiling) = clock.wants_ceiling(ms) {
                written.push((ms, ceiling));
                clock.set_ceiling(ceiling);
            }
        }
        let expected = [11_501, 13_002, 14_503, 16_004, 17_505, 19_006].map(|ms| (ms, time_of(ms + STEP_MS)));
        assert_eq!(written, expected);
        // Of a clock that is ahead of the wall clock a crash must add little.
        let mut ahead = Clock::after_restart(time_of(22_000), 7);
        ahead.tick(20_000);
        assert_eq!(ahead.wants_ceiling(20_000), None);
    }

    #[test]
    fn clocks_that_crash_all_the_time_do_not_run_ahead() {
        let mut clocks = [Clock::new(1), Clock::new(2)];
        for round in 0..1_000 {
            let now_ms = 10_000 + round * 100;
            let [one, other] = &mut clocks;
            let (one, other) = if round % 2 == 0 { (one, other) } else { (other, one) };
            one.tick(now_ms);
            one.observe(other.last());
            if let Some(ceiling) = one.needs_ceiling(now_ms) {
                one.set_ceiling(ceiling);
            }
            *one = Clock::after_restart(one.ceiling(), round);
            let ahead_ms = Clock::ahead_ms(one.last(), now_ms);
            assert!(ahead_ms <= STEP_MS + 2 * AHEAD_STEP_MS, "{ahead_ms} ms ahead after {round} crashes");
        }
    }

    #[test]
    fn how_far_a_stamp_is_ahead_is_told_in_milliseconds() {
        assert_eq!(Clock::ahead_ms(time_of(12) + 9, 10), 2);
        assert_eq!(Clock::ahead_ms(time_of(9), 10), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Tick(u64),
        Observe(u64),
        Commit,
        Crash,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u64..10_000).prop_map(Step::Tick),
            2 => (0u64..20_000).prop_map(|ms| Step::Observe(time_of(ms) + 0xfffe)),
            3 => Just(Step::Commit),
            1 => Just(Step::Crash),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn stamps_rise_past_all_that_was_seen_and_stored_through_crashes_too(steps in steps()) {
            let mut clock = Clock::new(7);
            // In memory, and what a crash can't take back.
            let (mut seen, mut stored, mut synced) = (0, 0, 0);
            for step in steps {
                match step {
                    Step::Tick(now_ms) => {
                        let time = clock.tick(now_ms).time;
                        prop_assert!(time > seen && time >= time_of(now_ms));
                        seen = time;
                    }
                    Step::Observe(time) => {
                        clock.observe(time);
                        seen = seen.max(time);
                    }
                    Step::Commit => {
                        if let Some(ceiling) = clock.needs_ceiling(0) {
                            synced = ceiling;
                            clock.set_ceiling(ceiling);
                        }
                        stored = seen;
                    }
                    Step::Crash => {
                        clock = Clock::after_restart(synced, 8);
                        seen = stored;
                    }
                }
                prop_assert!(clock.last() >= seen);
            }
        }
    }
}
