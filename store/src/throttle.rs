//! How fast data moves from and to a store: as its disk and cores allow while nobody else wants anything of it, and
//! while clients are served, so slowly that they hardly notice.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Who was served so long ago, in ms, may come again at any moment.
const SERVED_WITHIN: u64 = 100;
/// How long one core rests for 1 MiB that was moved.
const REST: Duration = Duration::from_millis(8);
const MIB: u64 = 1 << 20;

/// One for all copies that a store sends and takes in.
pub struct Throttle {
    /// For 1 MiB.
    rest: Duration,
    /// Unix ms.
    served: AtomicU64,
    /// Until when there is rest for what was moved so far.
    until: Mutex<Option<Instant>>,
}

impl Throttle {
    /// For a store that may use so many cores.
    pub fn new(cores: usize) -> Self {
        let rest = REST / u32::try_from(cores).unwrap_or(u32::MAX).max(1);
        Self { rest, served: AtomicU64::new(0), until: Mutex::default() }
    }

    /// Clients are served at this time (Unix ms).
    pub fn served(&self, now_ms: u64) {
        // Nearly always it says so already, and then no other core has to hear of it.
        if self.served.load(Relaxed) != now_ms {
            self.served.store(now_ms, Relaxed);
        }
    }

    /// How long who has moved so many bytes is to rest, from now on (the same moment twice). Those that ask meanwhile rest
    /// one after the other.
    pub fn rest(&self, bytes: u64, now: Instant, now_ms: u64) -> Duration {
        if now_ms.abs_diff(self.served.load(Relaxed)) > SERVED_WITHIN {
            return Duration::ZERO;
        }
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let from = until.map_or(now, |until| until.max(now));
        let over = from + self.rest.mul_f64(bytes as f64 / MIB as f64);
        *until = Some(over);
        over - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_moves_freely_until_clients_come_and_after_they_have_gone() {
        let (throttle, now) = (Throttle::new(2), Instant::now());
        assert_eq!(throttle.rest(MIB, now, 5_000), Duration::ZERO);
        throttle.served(5_000);
        assert_eq!(throttle.rest(MIB, now, 5_000), REST / 2);
        assert_eq!(throttle.rest(MIB, now + REST, 5_000 + SERVED_WITHIN), REST / 2);
        assert_eq!(throttle.rest(MIB, now + REST, 5_001 + SERVED_WITHIN), Duration::ZERO);
    }

    #[test]
    fn who_moves_beside_others_rests_after_them() {
        let (throttle, now) = (Throttle::new(1), Instant::now());
        throttle.served(5_000);
        let rests = [MIB, MIB / 4, 2 * MIB].map(|bytes| throttle.rest(bytes, now, 5_000));
        assert_eq!(rests, [REST, REST * 5 / 4, REST * 13 / 4]);
        assert_eq!(throttle.rest(MIB, now + REST * 13 / 4, 5_000), REST, "none of that is left");
    }
}
