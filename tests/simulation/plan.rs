//! What a seed does: the size it begins with, and what goes wrong when. Pure.

use std::time::Duration;

use rand::{
    RngExt, SeedableRng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};

/// Stores there are, whether or not they are used.
pub const STORES: usize = 6;
/// Machines with callers.
pub const CALLERS: usize = 3;

/// Something that is done to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    Scale {
        shards: u32,
        factor: u32,
    },
    Replace(String),
    /// The machine is gone at once, and with it some of what was not synced.
    Crash(String),
    /// The process is killed; the machine and its disk go on.
    Kill(String),
    /// It is asked to stop.
    Stop(String),
    Start(String),
    /// The operator's folder is lost while it is away.
    LoseState,
    /// Nothing gets through between these two.
    Cut(String, String),
    /// Nothing gets from the one to the other.
    CutOneWay(String, String),
    Mend(String, String),
    /// A message takes up to so many ms.
    Latency(u64),
    Skew(String, i64),
    Slow(String, u64),
    /// Its next sync fails.
    FailSync(String),
}

/// A seed's whole story.
#[derive(Clone, Debug)]
pub struct Plan {
    pub shards: u32,
    pub factor: u32,
    pub synced: bool,
    /// One in so many messages of a stream between stores comes twice, late or never; 0: none does.
    pub unruly: u32,
    pub document: String,
    /// By time since the keyspace was first ready.
    pub acts: Vec<(Duration, Act)>,
    /// How long all this lasts.
    pub lasts: Duration,
}

pub fn store(i: usize) -> String {
    format!("store-{i}")
}

/// All machines.
pub fn machines() -> Vec<String> {
    let callers = (0..CALLERS).map(|i| format!("caller-{i}"));
    (0..STORES).map(store).chain(["operator".into(), "manager".into()]).chain(callers).collect()
}

fn size(random: &mut StdRng) -> (u32, u32) {
    let shards = random.random_range(1..=STORES as u32 - 1);
    (shards, random.random_range(1..=shards.min(3)))
}

/// The story of this seed.
pub fn plan(seed: u64) -> Plan {
    let mut random = StdRng::seed_from_u64(seed);
    let (shards, factor) = size(&mut random);
    let synced = random.random_ratio(2, 3);
    let crashes = synced || random.random_ratio(1, 2);
    let grace = ["2s", "10s", "24h"][random.random_range(0..3)];
    let skew = ["10s", "2m"][random.random_range(0..2)];
    let lost = ["10m", "15s"][random.random_range(0..2)];
    let unruly = if random.random_ratio(1, 3) { random.random_range(2..40) } else { 0 };
    let durability = if synced { "Synced" } else { "Periodic" };
    let document = format!(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: sim\nspec:\n  shards: {shards}\n  \
         replicationFactor: {factor}\n  durability: {durability}\n  collectionGrace: {grace}\n  maxClockSkew: {skew}\n  \
         storeLostAfter: {lost}\n"
    );
    let lasts = Duration::from_millis(random.random_range(8_000..25_000));
    let mut acts = Vec::new();
    // Some seeds have few kinds of faults, so that those meet one another often.
    let kinds: Vec<u32> = (0..11).filter(|_| random.random_ratio(2, 3)).collect();
    let mut at = Duration::ZERO;
    loop {
        at += Duration::from_millis(random.random_range(100..2_500));
        if at >= lasts {
            break;
        }
        // Sizes change all the time: every fault is to meet a change.
        if kinds.is_empty() || random.random_ratio(1, 3) {
            let (shards, factor) = size(&mut random);
            acts.push((at, Act::Scale { shards, factor }));
            continue;
        }
        let kind = *kinds.choose(&mut random).unwrap_or(&0);
        fault(kind, at, crashes, &mut random, &mut acts);
    }
    acts.sort_by_key(|(at, _)| *at);
    Plan { shards, factor, synced, unruly, document, acts, lasts }
}

fn fault(kind: u32, at: Duration, crashes: bool, random: &mut StdRng, acts: &mut Vec<(Duration, Act)>) {
    let ms = |ms: u64| Duration::from_millis(ms);
    let one = store(random.random_range(0..STORES));
    let away = ms(random.random_range(10..4_000));
    let end = |name: String| if crashes { Act::Crash(name) } else { Act::Kill(name) };
    match kind {
        0 => acts.push((at, Act::Replace(one))),
        1 => acts.extend([(at, end(one.clone())), (at + away, Act::Start(one))]),
        2 => {
            // Some, or all, at almost the same time.
            let mut all: Vec<usize> = (0..STORES).collect();
            all.shuffle(random);
            all.truncate(random.random_range(2..=STORES));
            for i in all {
                let (begin, back) = (ms(random.random_range(0..50)), ms(random.random_range(50..3_000)));
                acts.extend([(at + begin, end(store(i))), (at + back, Act::Start(store(i)))]);
            }
        }
        3 => acts.extend([(at, Act::Kill("operator".into())), (at + away, Act::Start("operator".into()))]),
        4 => {
            let name = || "operator".to_owned();
            acts.extend([(at, Act::Kill(name())), (at, Act::LoseState), (at + away, Act::Start(name()))]);
        }
        5 => {
            // Swizzled: some machines are cut off one by one, and come back in another order.
            let mut all = machines();
            all.shuffle(random);
            let cut: Vec<String> = all[..random.random_range(1..=4)].to_vec();
            let mut back = cut.clone();
            back.shuffle(random);
            let mut when = at;
            for name in &cut {
                acts.extend(pairs(name).map(|(a, b)| (when, Act::Cut(a, b))));
                when += ms(random.random_range(0..500));
            }
            when += away;
            for name in &back {
                acts.extend(pairs(name).map(|(a, b)| (when, Act::Mend(a, b))));
                when += ms(random.random_range(0..500));
            }
        }
        6 => {
            let all = machines();
            let other = all[random.random_range(0..all.len())].clone();
            if other != one {
                let (a, b) = if random.random_ratio(1, 2) { (one, other) } else { (other, one) };
                acts.extend([(at, Act::CutOneWay(a.clone(), b.clone())), (at + away, Act::Mend(a, b))]);
            }
        }
        7 => acts.extend([(at, Act::Latency(random.random_range(20..400))), (at + away, Act::Latency(10))]),
        // The replica takes no more writes then, until its store is started anew.
        8 if crashes => {
            let end = if random.random_ratio(1, 2) { Act::Crash(one.clone()) } else { Act::Kill(one.clone()) };
            let back = at + away + ms(random.random_range(10..2_000));
            acts.extend([(at, Act::FailSync(one.clone())), (at + away, end), (back, Act::Start(one))]);
        }
        8 | 9 => acts.push((at, Act::Skew(one, random.random_range(-60_000..=60_000)))),
        _ => {
            if random.random_ratio(1, 2) {
                acts.extend([
                    (at, Act::Slow(one.clone(), random.random_range(5..300))),
                    (at + away, Act::Slow(one, 0)),
                ]);
            } else {
                acts.extend([(at, Act::Stop(one.clone())), (at + away, Act::Start(one))]);
            }
        }
    }
}

/// A machine and each other one.
fn pairs(name: &str) -> impl Iterator<Item = (String, String)> + use<> {
    let name = name.to_owned();
    machines().into_iter().filter_map(move |other| (other != name).then(|| (name.clone(), other)))
}
