//! The planner by example: each kind of change, a change of mind and a dead store in each
//! phase, and what people are told.

use vasto_client::v1::{Phase, Topology, View};

use super::super::placement::view;
use super::super::{Condition, NEAR, Observation, Presence, Room, Wait, adopt, expected_share, placement, plan};
use super::sim::{KEYS, Sim, store_name};

const CHANGE: [Phase; 5] = [Phase::Prepare, Phase::Switch, Phase::Fence, Phase::Drain, Phase::Cleanup];

fn condition(sim: &Sim, kind: &str) -> Condition {
    let conditions = &sim.last.as_ref().expect("it has planned").conditions;
    conditions.iter().find(|c| c.kind == kind).expect("a known kind").clone()
}

fn views(from: (u32, u32), to: (u32, u32)) -> (View, View) {
    let lists = |(n, rf)| placement(n, rf, store_name).expect("in bounds");
    let mut before = view(&lists(from), &View::default());
    for (id, place) in before.shards.iter_mut().flat_map(|s| &mut s.replicas).enumerate() {
        place.replica = id as u64 + 1;
    }
    let after = view(&lists(to), &before);
    (before, after)
}

#[test]
fn the_first_topology_waits_for_its_stores() {
    let mut sim = Sim::new(3, 2);
    sim.store("store-2").linked = false;
    sim.round();
    let outcome = sim.last.clone().expect("planned");
    assert_eq!(outcome.next, None);
    assert_eq!(outcome.waits, [Wait::Store { store: "store-2".into() }]);
    assert_eq!(outcome.stores_wanted, (0..3).map(store_name).collect());
    sim.store("store-2").linked = true;
    sim.settled();
    assert_eq!(sim.phases, [Phase::Prepare, Phase::Stable]);
    assert_eq!(sim.status.as_ref().map(|t| t.version), Some(3));
    assert!(condition(&sim, "Ready").status && !condition(&sim, "Degraded").status);
    assert!(!condition(&sim, "Progressing").status);
}

#[test]
fn sizes_and_factors_change_online() {
    let mut sim = Sim::in_use(3, 2);
    for (shards, rf) in [(5, 2), (2, 2), (4, 2), (4, 3), (4, 1), (4, 2), (1, 1), (6, 3)] {
        sim.phases.clear();
        sim.scale(shards, rf);
        while sim.phases.last() != Some(&Phase::Stable) {
            sim.round();
            (0..KEYS).for_each(|key| assert!(sim.write(key, 0, 0), "key {key} is refused"));
        }
        assert_eq!(sim.phases, [&CHANGE[..], &[Phase::Stable]].concat(), "to {shards}/{rf}");
        sim.settled();
        assert!(sim.excused.is_empty());
    }
}

#[test]
fn a_change_copies_what_jump_hash_must_move() {
    for (from, to, share) in [
        ((3, 1), (5, 1), 0.4),
        // Shards 3 and 4 twice, and shard 2 once: it leaves store-0 for store-3.
        ((3, 2), (5, 2), 1.0),
        ((5, 1), (2, 1), 0.6),
        ((4, 2), (4, 3), 1.0),
        ((4, 3), (4, 1), 0.0),
    ] {
        let (before, after) = views(from, to);
        let expected = expected_share(&before, &after);
        assert!((expected - share).abs() < 1e-9, "{from:?} to {to:?}: {expected}");
    }
    // And the fleet copies no more than that, but for chance.
    let mut sim = Sim::in_use(3, 1);
    (0..KEYS * 4).for_each(|key| assert!(sim.write(key % KEYS, 0, 0)));
    sim.copied = 0;
    sim.scale(5, 1);
    sim.settled();
    let (copied, all) = (sim.copied as f64, sim.acked.len() as f64);
    assert!((copied / all - 0.4).abs() < 0.2, "{copied} of {all}");
}

#[test]
fn replace_at_factor_2_empties_the_store_and_fills_it_anew() {
    let mut sim = Sim::in_use(3, 2);
    let before: Vec<u64> = sim.stores["store-1"].replicas.keys().copied().collect();
    sim.replace("store-1", "r", false);
    assert!(sim.until(Phase::Stable) && sim.until(Phase::Prepare));
    assert!(sim.status.as_ref().and_then(|t| t.replace.as_ref()).is_some_and(|r| r.emptied));
    sim.settled();
    let t = sim.status.clone().expect("committed");
    assert_eq!((t.replace.clone(), t.replaced.as_str()), (None, "r"));
    let after = &sim.stores["store-1"].replicas;
    assert!(after.len() == 2 && before.iter().all(|id| !after.contains_key(id)));
    // The request stays in the spec; it is not repeated.
    sim.phases.clear();
    sim.settled();
    assert!(sim.phases.is_empty());
}

#[test]
fn replace_at_factor_1_makes_a_surge_replica_first() {
    let mut sim = Sim::in_use(3, 1);
    sim.replace("store-1", "r", false);
    assert!(sim.until(Phase::Switch));
    let current = sim.status.clone().and_then(|t| t.current).expect("committed");
    assert_eq!(current.shards[1].replicas[0].store, "store-3");
    assert!(sim.last.as_ref().is_some_and(|o| o.stores_wanted.contains("store-3")));
    sim.settled();
    assert_eq!(sim.status.as_ref().map(|t| t.replaced.as_str()), Some("r"));
    sim.round();
    assert_eq!(sim.last.as_ref().map(|o| o.stores_wanted.clone()), Some((0..3).map(store_name).collect()));
}

#[test]
fn a_held_store_stays_empty_until_it_is_let_go() {
    let mut sim = Sim::in_use(3, 1);
    sim.replace("store-1", "r", false);
    if let Some(request) = &mut sim.spec.replace {
        request.hold = true;
    }
    assert!(sim.until(Phase::Cleanup) && sim.until(Phase::Stable));
    for _ in 0..30 {
        sim.round();
        let t = sim.status.clone().expect("committed");
        let named = t.views().flat_map(View::places).any(|p| p.assignment.store == "store-1");
        assert!(!named && sim.stores["store-1"].replicas.is_empty(), "its volume may go at any moment: {t:?}");
    }
    let t = sim.status.clone().expect("committed");
    assert!(t.phase() == Phase::Stable && t.replace.is_some_and(|r| r.emptied));
    sim.spec.replace = None;
    sim.settled();
}

#[test]
fn a_shrink_waits_for_room() {
    let mut sim = Sim::in_use(4, 1);
    let state = sim.status.clone().expect("committed");
    sim.scale(2, 1);
    let mut seen = sim.observe(false);
    for (name, presence) in &mut seen.stores {
        if let Presence::Living(Some(report)) = presence {
            report.replicas.iter_mut().for_each(|r| r.bytes = 1 << 30);
            let free = if name == "store-1" { 1 << 30 } else { 8 << 30 };
            seen.room.insert(name.clone(), Room { free, size: 16 << 30 });
        }
    }
    // 4 GiB on 4 stores become 2 GiB on each of 2: one more each, and 64 MiB stay free.
    let outcome = plan(&sim.spec, Some(&state), &seen);
    let wait = Wait::NoRoom { store: "store-1".into(), need: 1 << 30, free: (1 << 30) - (64 << 20) };
    assert_eq!((outcome.next.map(|t| t.phase()), outcome.waits), (Some(Phase::Stable), vec![wait]));
    seen.room.insert("store-1".into(), Room { free: 2 << 30, size: 16 << 30 });
    let outcome = plan(&sim.spec, Some(&state), &seen);
    assert_eq!(outcome.next.map(|t| t.phase()), Some(Phase::Prepare));
}

#[test]
fn a_replace_is_withdrawn_in_each_phase() {
    for rf in [1, 2] {
        for phase in CHANGE {
            let mut sim = Sim::in_use(3, rf);
            sim.replace("store-0", "r", false);
            assert!(sim.until(phase));
            sim.spec.replace = None;
            sim.settled();
            assert!(sim.status.as_ref().is_some_and(|t| t.replace.is_none() && t.replaced.is_empty()));
        }
    }
}

#[test]
fn a_replace_of_a_store_that_is_no_longer_there_is_over() {
    let mut sim = Sim::in_use(3, 1);
    sim.replace("store-7", "r", false);
    sim.settled();
    assert_eq!(sim.status.as_ref().map(|t| t.replaced.as_str()), Some("r"));
    assert_eq!(sim.last.as_ref().map(|o| o.waits.clone()), Some(Vec::new()));
}

#[test]
fn a_change_of_mind_in_each_phase() {
    for (from, to, back) in
        [((5, 2), (8, 2), (5, 2)), ((5, 1), (2, 1), (5, 1)), ((3, 2), (5, 2), (4, 3)), ((4, 3), (4, 1), (4, 2))]
    {
        for phase in CHANGE {
            let mut sim = Sim::in_use(from.0, from.1);
            sim.scale(to.0, to.1);
            assert!(sim.until(phase));
            let switched = sim.status.as_ref().is_some_and(|t| t.size() == to.0);
            (0..KEYS).for_each(|key| assert!(sim.write(key, 0, 0)));
            sim.phases.clear();
            sim.scale(back.0, back.1);
            sim.settled();
            let cancelled = sim.phases.first() == Some(&Phase::Cleanup) && phase == Phase::Prepare;
            assert!(cancelled || switched || from.0 == to.0, "{phase:?} {:?}", sim.phases);
            assert!(sim.excused.is_empty());
        }
    }
}

#[test]
fn a_cancelled_shrink_leaves_no_foreign_keys() {
    let mut sim = Sim::in_use(4, 1);
    sim.scale(1, 1);
    while sim.copied == 0 {
        sim.round();
    }
    assert_eq!(sim.phase(), Phase::Prepare);
    sim.scale(4, 1);
    sim.tick(false);
    let t = sim.status.clone().expect("committed");
    assert_eq!((t.phase(), t.clean.len(), t.switch_version), (Phase::Cleanup, 1, t.version));
    sim.settled();
}

/// One store alone hears that a shrink has begun, and goes; so does the status. What the operator finds with the
/// others is from before, and it goes on from there: what that store has done is heard of no more. So it may be with the
/// shrink's first version, and with the one that names its replicas.
#[test]
fn a_shrink_that_is_forgotten_leaves_no_foreign_keys() {
    for heard_by_all in 0..2 {
        let mut sim = Sim::in_use(3, 2);
        sim.scale(2, 2);
        for _ in 0..heard_by_all {
            sim.round();
        }
        sim.tick(false);
        assert_eq!(sim.phase(), Phase::Prepare);
        sim.deliver("store-0");
        sim.act("store-0");
        // From others it would copy nothing before they know of the shrink.
        for pair in sim.pairs().into_iter().filter(|(by, _, of, _)| by == "store-0" && of == "store-0") {
            sim.follow(&pair, usize::MAX);
        }
        sim.die("store-0");
        assert!(sim.lose_status());
        sim.scale(3, 2);
        // So that it is not the store that has the newest version.
        sim.spec.spec_json = "another".into();
        for _ in 0..3 {
            sim.round();
        }
        sim.back("store-0");
        sim.settled();
    }
}

#[test]
fn a_store_that_is_away_is_waited_for_in_each_phase() {
    for rf in [1, 2] {
        for phase in CHANGE {
            for store in ["store-0", "store-2", "store-3"] {
                let mut sim = Sim::in_use(3, rf);
                sim.scale(5, rf);
                assert!(sim.until(phase));
                sim.die(store);
                sim.settle();
                (0..KEYS).for_each(|key| {
                    sim.write(key, 0, 1);
                });
                assert!(condition(&sim, "Degraded").status || (store == "store-3" && phase == Phase::Prepare));
                sim.back(store);
                sim.settled();
                assert!(sim.excused.is_empty(), "{store} in {phase:?}");
            }
        }
    }
}

/// Rounds in which some followers do nothing.
fn round_without(sim: &mut Sim, lazy: &str) {
    sim.tick(false);
    let names: Vec<String> = sim.stores.keys().cloned().collect();
    for name in &names {
        sim.deliver(name);
        sim.act(name);
    }
    for pair in sim.pairs().into_iter().filter(|(follower, ..)| follower != lazy) {
        sim.follow(&pair, usize::MAX);
    }
}

fn serving(sim: &Sim, store: &str) -> Vec<bool> {
    let current = sim.status.clone().and_then(|t| t.current).expect("committed");
    current.places().filter(|p| p.assignment.store == store).map(|p| p.assignment.serving).collect()
}

#[test]
fn who_has_not_drained_the_old_owners_is_not_served_until_it_has() {
    let mut sim = Sim::in_use(3, 2);
    sim.scale(5, 2);
    assert!(sim.until(Phase::Switch));
    // Clients that don't know the new owners yet.
    (0..KEYS).for_each(|key| assert!(sim.write(key, 0, 0)));
    while sim.phase() != Phase::Cleanup {
        round_without(&mut sim, "store-4");
    }
    assert_eq!(serving(&sim, "store-4"), [false, false]);
    assert!(serving(&sim, "store-3").contains(&true));
    sim.settled();
    assert_eq!(serving(&sim, "store-4"), [true, true]);
}

#[test]
fn who_is_away_when_an_old_owner_goes_is_not_served_until_it_has_caught_up() {
    let mut sim = Sim::in_use(4, 2);
    sim.scale(3, 2);
    while sim.phase() != Phase::Cleanup {
        sim.round();
    }
    sim.die("store-0");
    sim.settle();
    assert!(sim.stores["store-3"].replicas.is_empty());
    assert_eq!(serving(&sim, "store-0"), [false, false]);
    sim.back("store-0");
    sim.settled();
    assert_eq!(serving(&sim, "store-0"), [true, true]);
}

#[test]
fn a_lost_store_is_given_up_in_each_phase_where_others_have_its_shards() {
    for phase in CHANGE {
        for store in ["store-0", "store-2", "store-3"] {
            let mut sim = Sim::in_use(3, 2);
            sim.scale(5, 2);
            assert!(sim.until(phase));
            sim.round();
            sim.die(store);
            sim.lose(store);
            sim.settle();
            assert_eq!(sim.phase(), Phase::Stable, "without {store} since {phase:?}: {:?}", sim.last);
            assert!(sim.status.as_ref().is_some_and(|t| t.size() == 5));
            // It comes back with its volume: emptied, then filled anew.
            sim.back(store);
            sim.settled();
        }
    }
}

#[test]
fn a_lost_store_without_another_copy_waits_for_a_person() {
    for phase in CHANGE {
        let mut sim = Sim::in_use(3, 1);
        sim.scale(5, 1);
        assert!(sim.until(phase));
        sim.round();
        sim.wipe("store-1");
        sim.settle();
        let degraded = condition(&sim, "Degraded");
        assert_eq!(degraded.reason, "DataLost", "{phase:?} {degraded:?}");
        assert!(degraded.message.contains("data lost for shard 1"), "{degraded:?}");
        let before = sim.status.clone();
        assert_eq!(before.map(|t| t.given_up.len()), Some(0));
        sim.replace("store-1", "accept", true);
        sim.settled();
    }
}

#[test]
fn after_the_switch_a_lost_new_owner_is_made_anew_from_the_old_ones() {
    for phase in [Phase::Switch, Phase::Fence, Phase::Drain] {
        let mut sim = Sim::in_use(3, 1);
        sim.scale(5, 1);
        assert!(sim.until(Phase::Prepare));
        while sim.phase() != phase {
            sim.tick(false);
            let names: Vec<String> = sim.stores.keys().cloned().collect();
            names.iter().for_each(|s| {
                sim.deliver(s);
                sim.act(s);
            });
            sim.follow_all();
        }
        // Nothing was written by the new view only, so its loss costs nothing.
        sim.wipe("store-4");
        assert!(sim.excused.is_empty());
        sim.settle();
        assert_ne!(sim.phase(), Phase::Stable, "old owners may not go before new ones have all");
        sim.replace("store-4", "accept", true);
        sim.settled();
        assert!(sim.excused.is_empty());
    }
}

#[test]
fn a_given_up_replica_that_is_the_last_one_is_taken_back() {
    let mut sim = Sim::in_use(1, 1);
    sim.die("store-0");
    sim.lose("store-0");
    sim.replace("store-0", "accept", true);
    sim.settle();
    assert_eq!(sim.status.as_ref().map(|t| t.given_up.len()), Some(1));
    sim.back("store-0");
    sim.settled();
    assert_eq!(sim.status.as_ref().map(|t| t.given_up.len()), Some(0));
    assert_eq!(sim.stores["store-0"].replicas.values().map(|r| r.has.len()).sum::<usize>(), KEYS as usize);
}

#[test]
fn a_replica_that_nobody_knows_is_left_alone_and_reported() {
    let mut sim = Sim::in_use(2, 1);
    let mut stray = sim.stores["store-0"].replicas.values().next().expect("one").clone();
    stray.shard = 1;
    sim.store("store-1").replicas.insert(9, stray);
    sim.settled();
    assert!(sim.stores["store-1"].replicas.contains_key(&9));
    assert_eq!(condition(&sim, "Degraded").reason, "StrayReplica");
}

#[test]
fn a_candidate_that_is_gone_is_made_again() {
    let mut sim = Sim::in_use(2, 1);
    sim.scale(3, 1);
    while sim.status.as_ref().and_then(|t| t.next.as_ref()).is_none_or(|v| v.shards[2].replicas[0].replica == 0) {
        sim.tick(false);
        for store in ["store-0", "store-1", "store-2"] {
            sim.deliver(store);
            sim.act(store);
        }
    }
    sim.wipe("store-2");
    sim.settled();
}

#[test]
fn a_faulty_replica_is_replaced_when_a_person_says_so() {
    let mut sim = Sim::in_use(2, 2);
    for replica in sim.store("store-0").replicas.values_mut() {
        replica.fault = "checksum mismatch".into();
    }
    sim.settle();
    assert_eq!(condition(&sim, "Degraded").reason, "ReplicaFault");
    sim.replace("store-0", "r", true);
    sim.settled();
    assert!(sim.stores["store-0"].replicas.values().all(|r| r.fault.is_empty()));
}

/// Its store can't rely on what it has.
fn damage(sim: &mut Sim, store: &str) -> Vec<u64> {
    let replicas = &mut sim.store(store).replicas;
    for replica in replicas.values_mut() {
        (replica.fault, replica.quarantined) = ("checksum mismatch".into(), true);
    }
    replicas.keys().copied().collect()
}

#[test]
fn a_damaged_replica_is_made_anew_where_another_copy_serves() {
    let mut sim = Sim::in_use(2, 2);
    let before = damage(&mut sim, "store-0");
    assert_eq!(before.len(), 2);
    sim.settled();
    assert!(sim.stores["store-0"].replicas.iter().all(|(id, r)| r.born && !before.contains(id)));
}

#[test]
fn the_last_copy_is_never_dropped_however_damaged() {
    let mut sim = Sim::in_use(2, 1);
    let before = damage(&mut sim, "store-0");
    sim.settle();
    let degraded = condition(&sim, "Degraded");
    assert_eq!(degraded.reason, "ReplicaFault");
    assert!(degraded.message.contains("checksum mismatch; no other copy"), "{}", degraded.message);
    assert!(sim.stores["store-0"].replicas.keys().eq(&before));
}

#[test]
fn a_damaged_candidate_is_made_again() {
    let mut sim = Sim::in_use(2, 2);
    sim.scale(3, 2);
    let is_candidate = |sim: &Sim| {
        let t = sim.status.as_ref().expect("committed");
        t.next.iter().flat_map(View::places).any(|p| p.assignment.store == "store-2" && p.assignment.replica != 0)
    };
    while !is_candidate(&sim) {
        sim.round();
    }
    let before = damage(&mut sim, "store-2");
    assert!(!before.is_empty());
    sim.settled();
    assert!(sim.stores["store-2"].replicas.iter().all(|(id, r)| r.born && !before.contains(id)));
}

#[test]
fn a_paused_keyspace_stands_still_but_keeps_its_spec() {
    let mut sim = Sim::in_use(2, 1);
    sim.spec.paused = true;
    sim.scale(4, 1);
    sim.settle();
    let t = sim.status.clone().expect("committed");
    assert_eq!((t.phase(), t.size(), t.spec.as_str()), (Phase::Stable, 2, "4/1"));
    assert_eq!(condition(&sim, "Progressing").reason, "Paused");
    sim.spec.paused = false;
    sim.settled();
}

#[test]
fn a_spec_that_changes_nothing_of_the_placement_reaches_the_stores() {
    let mut sim = Sim::in_use(2, 1);
    sim.phases.clear();
    sim.spec.spec_json = "durability: Synced".into();
    sim.settled();
    assert!(sim.phases.iter().all(|p| *p == Phase::Stable));
    assert_eq!(sim.stores["store-1"].topology.as_ref().map(|t| t.spec.as_str()), Some("durability: Synced"));
}

#[test]
fn deletion_from_each_phase_takes_everything() {
    for phase in CHANGE {
        let mut sim = Sim::in_use(3, 2);
        sim.scale(5, 2);
        assert!(sim.until(phase));
        sim.die("store-1");
        sim.spec.deleting = true;
        sim.settle();
        let outcome = sim.last.clone().expect("planned");
        assert!(outcome.gone && !outcome.publish);
        assert_eq!(outcome.left, ["store-1".to_owned()].into());
        assert!(sim.stores.iter().all(|(name, s)| name == "store-1" || s.replicas.is_empty()));
        // What was away is told when it comes back.
        sim.back("store-1");
        sim.settle();
        assert!(sim.last.as_ref().is_some_and(|o| o.gone && o.left.is_empty()));
    }
}

#[test]
fn a_fresh_operator_takes_everything_from_the_stores_but_waits_for_a_majority() {
    for phase in CHANGE {
        let mut sim = Sim::in_use(3, 2);
        sim.scale(5, 2);
        assert!(sim.until(phase));
        let before = sim.truth();
        assert!(sim.lose_status());
        for store in ["store-1", "store-2", "store-3", "store-4"] {
            sim.store(store).linked = false;
        }
        assert!(!sim.tick(false), "store-0 alone is no majority");
        for store in ["store-1", "store-2", "store-3", "store-4"] {
            sim.store(store).linked = true;
        }
        sim.tick(false);
        assert!(sim.status.as_ref().map(|t| t.version) >= before.map(|t| t.version));
        sim.settled();
    }
}

#[test]
fn lost_stores_that_were_never_heard_do_not_free_the_way() {
    let mut sim = Sim::in_use(3, 3);
    sim.forget();
    for store in ["store-1", "store-2"] {
        sim.die(store);
        sim.lose(store);
    }
    sim.settle();
    assert_eq!(sim.status.as_ref().map(|t| t.given_up.len()), Some(0));
    // A person says so.
    sim.replace("store-1", "r", true);
    sim.settle();
    assert!(sim.status.as_ref().is_some_and(|t| t.given_up.len() == 6), "{:?}", sim.status);
    sim.back("store-1");
    sim.back("store-2");
    sim.settled();
}

#[test]
fn the_greatest_version_is_adopted_and_status_wins_ties() {
    let with = |version, name: &str| Topology { version, name: name.into(), ..Topology::default() };
    let (a, b, c) = (with(4, "a"), with(4, "b"), with(5, "c"));
    assert_eq!(adopt(None, []), None);
    assert_eq!(adopt(Some(&a), [&b, &b]), Some(a.clone()));
    assert_eq!(adopt(Some(&a), [&b, &c]), Some(c.clone()));
    assert_eq!(adopt(None, [&a, &b, &b]), Some(b));
}

#[test]
fn what_another_operator_left_under_the_same_version_is_overruled() {
    let mut sim = Sim::in_use(2, 1);
    let version = sim.status.as_ref().map_or(0, |t| t.version);
    if let Some(t) = &mut sim.store("store-1").topology {
        t.spec = "from elsewhere".into();
    }
    sim.settled();
    assert_eq!(sim.status.as_ref().map(|t| t.version), Some(version + 1));
    assert_eq!(sim.stores["store-1"].topology, sim.status);
}

#[test]
fn clients_are_told_of_a_switch_only_once_a_majority_has_it() {
    let mut sim = Sim::in_use(3, 1);
    sim.scale(5, 1);
    assert!(sim.until(Phase::Prepare));
    while sim.phase() != Phase::Switch {
        sim.round();
        if sim.phase() != Phase::Switch {
            assert!(sim.last.as_ref().is_some_and(|o| o.publish));
        }
    }
    // `round` has delivered it; a fleet that has not:
    let state = sim.status.clone().expect("committed");
    let seen = Observation::new(store_name);
    let outcome = plan(&sim.spec, Some(&state), &seen);
    assert!(!outcome.publish && outcome.next.is_none());
    assert!(matches!(outcome.waits.as_slice(), [Wait::Majority { have: 0, .. }]), "{:?}", outcome.waits);
    sim.settled();
}

#[test]
fn waits_are_sentences() {
    let behind = Wait::Behind {
        store: "store-1".into(),
        replica: 0x7f,
        shard: 1,
        source: "store-0".into(),
        lag: Some(NEAR + 1),
    };
    assert_eq!(behind.to_string(), "replica 000000000000007f of shard 1 on store-1 is 1001 records behind store-0");
    let mut seen = Observation::new(store_name);
    seen.stores.insert("store-0".into(), Presence::Living(None));
    let sim = Sim::new(2, 3);
    let outcome = plan(&sim.spec, None, &seen);
    assert_eq!(
        outcome.waits.first().map(ToString::to_string).as_deref(),
        Some(
            "2 shards with replication factor 3 can't be placed: both must be at least 1, and the factor not more than the shards"
        )
    );
}
