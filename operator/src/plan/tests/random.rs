//! Random lives of a keyspace: whatever happens, no acknowledged write is lost by
//! the planner's doing, and once all stores are back, all comes to rest where the spec wants it.

use proptest::prelude::*;
use vasto_client::v1::Phase;

use super::sim::{KEYS, Sim};

#[derive(Clone, Debug)]
enum Event {
    Tick { behind: bool },
    Deliver(usize),
    Act(usize),
    Follow(usize, usize),
    Round,
    Rounds(u8),
    Write { key: u64, stale: usize, which: usize },
    Burst(u64),
    Die(usize),
    Unlink(usize),
    Back(usize),
    Lose(usize),
    Wipe(usize),
    LoseStatus,
    NewOperator,
    Scale(u32, u32),
    Replace(usize, bool),
    Withdraw,
    Pause(bool),
    Stale(usize, usize),
}

fn peaceful() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any::<bool>().prop_map(|behind| Event::Tick { behind }),
        5 => (0..7usize).prop_map(Event::Deliver),
        5 => (0..7usize).prop_map(Event::Act),
        8 => (0..60usize, 0..4usize).prop_map(|(i, n)| Event::Follow(i, n)),
        6 => Just(Event::Round),
        3 => (2..12u8).prop_map(Event::Rounds),
        8 => (0..KEYS, 0..4usize, 0..3usize).prop_map(|(key, stale, which)| Event::Write { key, stale, which }),
        3 => (0..KEYS).prop_map(Event::Burst),
        3 => (1..7u32, 1..4u32).prop_map(|(n, rf)| Event::Scale(n, rf)),
        1 => (0..6usize).prop_map(|s| Event::Replace(s, false)),
        1 => Just(Event::Withdraw),
        1 => any::<bool>().prop_map(Event::Pause),
        1 => (0..7usize, any::<usize>()).prop_map(|(s, w)| Event::Stale(s, w)),
        1 => Just(Event::NewOperator),
    ]
}

fn rough() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => peaceful(),
        1 => (0..7usize).prop_map(Event::Die),
        1 => (0..7usize).prop_map(Event::Unlink),
        2 => (0..7usize).prop_map(Event::Back),
        2 => (0..7usize).prop_map(Event::Lose),
        1 => (0..7usize).prop_map(Event::Wipe),
        1 => Just(Event::LoseStatus),
        1 => (0..6usize).prop_map(|s| Event::Replace(s, true)),
    ]
}

fn play(sim: &mut Sim, events: &[Event]) {
    let name = |s: &usize| format!("store-{s}");
    for (at, event) in events.iter().enumerate() {
        match event {
            Event::Tick { behind } => {
                sim.tick(*behind);
            }
            Event::Deliver(s) => sim.deliver(&name(s)),
            Event::Act(s) => sim.act(&name(s)),
            Event::Follow(i, most) => {
                let pairs = sim.pairs();
                if let Some(pair) = pairs.get(i % pairs.len().max(1)) {
                    sim.follow(pair, *most);
                }
            }
            Event::Round => {
                sim.round();
            }
            Event::Rounds(n) => (0..*n).for_each(|_| {
                sim.round();
            }),
            Event::Write { key, stale, which } => {
                sim.write(*key, *stale, *which);
            }
            Event::Burst(key) => (0..4).for_each(|i| {
                sim.write((key + i) % KEYS, 0, i as usize);
            }),
            Event::Die(s) => sim.die(&name(s)),
            Event::Unlink(s) => {
                sim.peaceful = false;
                sim.store(&name(s)).linked = false;
            }
            Event::Back(s) => sim.back(&name(s)),
            Event::Lose(s) => sim.lose(&name(s)),
            Event::Wipe(s) => sim.wipe(&name(s)),
            Event::LoseStatus => {
                sim.lose_status();
            }
            Event::NewOperator => sim.forget(),
            Event::Scale(n, rf) => sim.scale(*n, (*rf).min(*n)),
            Event::Replace(s, accept) => sim.replace(&name(s), &format!("r{at}"), *accept),
            Event::Withdraw => sim.spec.replace = None,
            Event::Pause(paused) => sim.spec.paused = *paused,
            Event::Stale(s, which) => sim.deliver_stale(&name(s), *which),
        }
    }
}

/// Everyone comes back, and a person answers the questions that only they can.
fn rest(sim: &mut Sim) {
    for s in 0..9 {
        let name = format!("store-{s}");
        let store = sim.store(&name);
        if !store.alive || !store.linked || store.lost {
            sim.back(&name);
        }
    }
    sim.spec.paused = false;
    sim.person = true;
    sim.settled();
}

/// Three shards in two copies become four in one. While old owners are drained the only owner of the new shard
/// loses its volume, though others have deleted what they had handed over to it.
#[test]
fn the_sole_owner_dies_when_some_have_cleaned() {
    use Event::{Die, Round, Rounds, Scale, Tick, Unlink, Wipe, Write};
    let mut sim = Sim::in_use(3, 2);
    let tick = || Tick { behind: false };
    let write = Write { key: 0, stale: 0, which: 0 };
    play(&mut sim, &[tick(), Scale(4, 1), write, Round, Rounds(5), tick(), Unlink(4), Round, Die(0), Round, Wipe(3)]);
    rest(&mut sim);
}

/// A candidate of a change that was called off comes back when nobody has its shard any more, of another size: what
/// it had copied for the one change says nothing of what the other moves.
#[test]
fn a_candidate_that_comes_back_copies_anew() {
    let mut sim = Sim::in_use(2, 2);
    sim.scale(5, 1);
    sim.tick(false);
    sim.wipe("store-0");
    sim.tick(false);
    // So that it does not come to a switch.
    sim.die("store-3");
    play(&mut sim, &[Event::Rounds(3)]);
    sim.die("store-0");
    sim.scale(3, 3);
    play(&mut sim, &[Event::Rounds(2)]);
    sim.lose("store-0");
    assert!(sim.until(Phase::Switch) && sim.until(Phase::Stable));
    sim.replace("store-1", "r", true);
    assert!(sim.until(Phase::Switch));
    sim.wipe("store-2");
    rest(&mut sim);
}

/// Two shards in two copies become four in one. After the switch a store is away that was told of no topology since,
/// the sole owner of a new shard loses its volume, and clients write through old owners: a new owner made anew copies
/// replicas that followed those writers, but no longer for what moves.
#[test]
fn what_an_old_owner_took_reaches_a_new_owner_made_anew() {
    use Event::{Burst, LoseStatus, Round, Scale, Tick, Unlink, Wipe};
    let mut sim = Sim::in_use(2, 2);
    let tick = || Tick { behind: false };
    play(&mut sim, &[Scale(4, 1), Round, Round, tick(), Unlink(0), Round, LoseStatus, tick(), Wipe(3), Burst(38)]);
    rest(&mut sim);
}

/// A replaced store's new replica copies one that has been another's source, and wants of that one what it did not
/// want before: no position may have come with the copy for it.
#[test]
fn a_position_where_nothing_was_wanted_is_not_taken_over() {
    use Event::{Replace, Rounds, Scale, Tick};
    let mut sim = Sim::in_use(1, 1);
    let events = [
        Scale(2, 1),
        Rounds(8),
        Replace(0, false),
        Scale(4, 1),
        Rounds(14),
        Scale(2, 1),
        Rounds(7),
        Scale(1, 1),
        Tick { behind: false },
    ];
    play(&mut sim, &events);
    rest(&mut sim);
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changes_of_mind_lose_nothing(
        (shards, rf) in (1..6u32, 1..4u32),
        events in prop::collection::vec(peaceful(), 10..120),
    ) {
        let mut sim = Sim::in_use(shards, rf.min(shards));
        play(&mut sim, &events);
        rest(&mut sim);
        prop_assert!(sim.excused.is_empty());
    }

    #[test]
    fn deaths_lose_nothing_that_a_living_disk_has(
        (shards, rf) in (1..6u32, 1..4u32),
        events in prop::collection::vec(rough(), 10..120),
    ) {
        let mut sim = Sim::in_use(shards, rf.min(shards));
        play(&mut sim, &events);
        rest(&mut sim);
    }

    #[test]
    fn a_keyspace_is_made_whatever_happens(
        (shards, rf) in (1..6u32, 1..4u32),
        events in prop::collection::vec(rough(), 0..60),
    ) {
        let mut sim = Sim::new(shards, rf.min(shards));
        play(&mut sim, &events);
        rest(&mut sim);
    }
}
