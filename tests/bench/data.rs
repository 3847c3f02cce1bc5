//! The same keys and values for all that are measured, made at next to no cost for each operation.

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

/// Far more than a block of a sorted file, so that a block seldom holds the same piece twice.
const POOL: usize = 4 << 20;
/// Values compress to about half, as db_bench's do: random bytes, each piece of them twice.
const PIECE: usize = 50;

/// Makes keys and values.
pub struct Data {
    keys: u64,
    value_size: usize,
    pool: Bytes,
}

impl Data {
    /// So many keys, and values of this size.
    pub fn new(keys: u64, value_size: usize, compressible: bool) -> Self {
        let mut pool = vec![0; POOL.max(2 * value_size)];
        SmallRng::seed_from_u64(1).fill_bytes(&mut pool);
        if compressible {
            for two in pool.chunks_exact_mut(2 * PIECE) {
                two.copy_within(..PIECE, PIECE);
            }
        }
        Self { keys, value_size, pool: pool.into() }
    }

    /// How many keys there are.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// Any key.
    pub fn random_key(&self, random: &mut SmallRng) -> Bytes {
        key(random.random_range(0..self.keys))
    }

    /// Any value.
    pub fn value(&self, random: &mut SmallRng) -> Bytes {
        let start = random.random_range(0..=self.pool.len() - self.value_size);
        self.pool.slice(start..start + self.value_size)
    }
}

/// Key number `number` as redis-benchmark writes it: 16 bytes.
pub fn key(number: u64) -> Bytes {
    let mut key = *b"key:000000000000";
    let mut rest = number;
    for digit in key[4..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    Bytes::copy_from_slice(&key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_redis_benchmark() {
        assert_eq!(key(68248), "key:000000068248");
    }
}
