//! The workloads A to F of YCSB (Cooper et al., "Benchmarking Cloud Serving Systems with YCSB", SoCC 2010) on Vasto
//! alone. A record of ten fields is one value here.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;
use rand::RngExt;
use rand::rngs::SmallRng;

/// As YCSB has it: the share of the most popular key falls with this power of the rank.
const THETA: f64 = 0.99;
/// The longest scan of workload E.
const LONGEST_SCAN: u64 = 100;
/// 10 fields of 100 bytes.
pub const RECORD: usize = 1000;
/// How many records are there at the start.
pub const RECORDS: u64 = 100_000;
/// Callers at once.
pub const CALLERS: u32 = 16;

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Session store: half reads, half updates.
    A,
    /// Photo tagging: 95% reads, 5% updates.
    B,
    /// Profile cache: reads only.
    C,
    /// Status updates: 95% reads of what is new, 5% inserts.
    D,
    /// Threaded conversations: 95% short scans, 5% inserts.
    E,
    /// User database: half reads, half reads followed by a write of the same record.
    F,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::A, Self::B, Self::C, Self::D, Self::E, Self::F];

    /// What it does.
    pub fn words(self) -> &'static str {
        match self {
            Self::A => "A: 50% read, 50% update",
            Self::B => "B: 95% read, 5% update",
            Self::C => "C: read",
            Self::D => "D: 95% read latest, 5% insert",
            Self::E => "E: 95% scan of up to 100, 5% insert",
            Self::F => "F: 50% read, 50% read-modify-write",
        }
    }
}

/// One operation on records by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read(u64),
    Update(u64),
    Insert(u64),
    /// From this record on, so many.
    Scan(u64, u64),
    ReadModifyWrite(u64),
}

/// Chooses operations; shared by all callers.
pub struct Chooser {
    workload: Workload,
    zipfian: Zipfian,
    /// The next record to be inserted; what is below may not be there yet.
    next: AtomicU64,
    /// All below this have been inserted.
    there: AtomicU64,
    /// Those above it that have been, too: inserts are answered in any order.
    ahead: Mutex<BTreeSet<u64>>,
}

impl Chooser {
    /// Over so many records, all there.
    pub fn new(workload: Workload, records: u64) -> Self {
        let (next, there) = (AtomicU64::new(records), AtomicU64::new(records));
        Self { workload, zipfian: Zipfian::new(records), next, there, ahead: Mutex::default() }
    }

    /// The next operation.
    pub fn choose(&self, random: &mut SmallRng) -> Action {
        let percent = random.random_range(0..100);
        let popular = |random: &mut SmallRng| scramble(self.zipfian.rank(random)) % self.zipfian.items;
        match self.workload {
            Workload::A if percent < 50 => Action::Update(popular(random)),
            Workload::B if percent < 5 => Action::Update(popular(random)),
            Workload::D | Workload::E if percent < 5 => Action::Insert(self.next.fetch_add(1, Ordering::Relaxed)),
            // The latest are the most popular.
            Workload::D => {
                let there = self.there.load(Ordering::Relaxed);
                Action::Read(there.saturating_sub(1 + self.zipfian.rank(random)))
            }
            Workload::E => Action::Scan(popular(random), random.random_range(1..=LONGEST_SCAN)),
            Workload::F if percent < 50 => Action::ReadModifyWrite(popular(random)),
            _ => Action::Read(popular(random)),
        }
    }

    /// The insert of this record has been answered.
    pub fn inserted(&self, number: u64) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        ahead.insert(number);
        while ahead.remove(&self.there.load(Ordering::Relaxed)) {
            self.there.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Spreads the popular records over all keys: FNV-1a, as YCSB does.
fn scramble(rank: u64) -> u64 {
    rank.to_le_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Ranks by Zipf's law. The method is that of Gray et al., "Quickly Generating Billion-Record Synthetic Databases"
/// (SIGMOD 1994), figure 6, which YCSB uses too.
struct Zipfian {
    items: u64,
    alpha: f64,
    zeta: f64,
    eta: f64,
}

impl Zipfian {
    fn new(items: u64) -> Self {
        let zeta = |n: u64| (1..=n).map(|i| 1.0 / (i as f64).powf(THETA)).sum::<f64>();
        let all = zeta(items);
        let eta = (1.0 - (2.0 / items as f64).powf(1.0 - THETA)) / (1.0 - zeta(2) / all);
        Self { items, alpha: 1.0 / (1.0 - THETA), zeta: all, eta }
    }

    /// From 0, the most popular, to `items - 1`.
    fn rank(&self, random: &mut SmallRng) -> u64 {
        let u: f64 = random.random();
        let uz = u * self.zeta;
        if uz < 1.0 {
            return 0;
        }
        if uz < 1.0 + 0.5f64.powf(THETA) {
            return 1;
        }
        let rank = self.items as f64 * (self.eta * u - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.items - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn ranks_follow_zipfs_law() {
        let zipfian = Zipfian::new(1000);
        let mut random = SmallRng::seed_from_u64(1);
        let mut counts = vec![0u32; 1000];
        (0..200_000).for_each(|_| counts[zipfian.rank(&mut random) as usize] += 1);
        let expected = |rank: usize| 200_000.0 / zipfian.zeta / ((rank + 1) as f64).powf(THETA);
        for rank in [0, 1] {
            let off = f64::from(counts[rank]) / expected(rank);
            assert!((0.97..1.03).contains(&off), "rank {rank}: {off}");
        }
        let (tail, wanted): (u32, f64) = (counts[100..].iter().sum(), (100..1000).map(expected).sum());
        assert!((0.9..1.1).contains(&(f64::from(tail) / wanted)), "{tail} of {wanted}");
    }

    #[test]
    fn only_what_has_been_inserted_is_read() {
        let chooser = Chooser::new(Workload::D, 10);
        chooser.inserted(11);
        assert_eq!(chooser.there.load(Ordering::Relaxed), 10);
        chooser.inserted(10);
        assert_eq!(chooser.there.load(Ordering::Relaxed), 12);
    }

    #[test]
    fn workloads_keep_their_shares() {
        for (workload, share) in [(Workload::A, 0.5), (Workload::B, 0.05), (Workload::C, 0.0), (Workload::E, 0.05)] {
            let chooser = Chooser::new(workload, 1000);
            let mut random = SmallRng::seed_from_u64(2);
            let writes = (0..20_000)
                .filter(|_| matches!(chooser.choose(&mut random), Action::Update(_) | Action::Insert(_)))
                .count();
            assert!((writes as f64 / 20_000.0 - share).abs() < 0.02, "{workload:?}: {writes}");
        }
    }
}
