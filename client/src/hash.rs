//! Which shard a key belongs to: xxh64 of its partition key, then jump hash.

use xxhash_rust::xxh64::xxh64;

/// The hash of a partition key: xxh64 with seed 0.
pub fn partition_hash(partition_key: &[u8]) -> u64 {
    xxh64(partition_key, 0)
}

/// Jump consistent hash: the bucket in `0..buckets` for `key`.
///
/// When `buckets` grows, keys move only to the new buckets, and only
/// `1 - old/new` of them. `buckets` below 1 counts as 1.
/// Source: Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash
/// Algorithm", 2014.
pub fn jump_hash(mut key: u64, buckets: u32) -> u32 {
    let buckets = i64::from(buckets.max(1));
    let (mut bucket, mut next) = (-1i64, 0i64);
    while next < buckets {
        bucket = next;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        next = ((bucket + 1) as f64 * ((1u64 << 31) as f64 / ((key >> 33) + 1) as f64)) as i64;
    }
    bucket as u32
}

/// Whether some key can be in shard `i` of `n` and in shard `j` of `m`.
///
/// Jump hash moves a key, as shards are added, only to an added shard: so a
/// shard below the smaller size meets only itself, and one above it meets all.
pub fn shards_meet(i: u32, n: u32, j: u32, m: u32) -> bool {
    if i >= n || j >= m {
        return false;
    }
    let smaller = n.min(m);
    match (i < smaller, j < smaller) {
        (true, true) => i == j,
        // The one with the greater size took its keys from every smaller shard.
        (true, false) | (false, true) => true,
        (false, false) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn jump_hash_gives_the_published_vectors() {
        // From the reference implementation's users (Guava-independent lists of
        // the paper's function): key -> bucket for several sizes.
        let golden_100 = [0, 55, 62, 8, 45, 59, 86, 97, 82, 59, 73, 37, 17, 56, 86, 21, 90, 37, 38, 83];
        for (key, want) in golden_100.into_iter().enumerate() {
            assert_eq!(jump_hash(key as u64, 100), want, "key {key}");
        }
        assert_eq!(jump_hash(10_863_919_174_838_991, 11), 6);
        assert_eq!(jump_hash(2_016_238_256_797_177_309, 11), 3);
        assert_eq!(jump_hash(1_673_758_223_894_951_030, 11), 5);
    }

    proptest! {
        #[test]
        fn growing_moves_keys_only_to_new_shards(key: u64, n in 1u32..200, more in 0u32..50) {
            let (before, after) = (jump_hash(key, n), jump_hash(key, n + more));
            prop_assert!(after == before || after >= n);
            prop_assert!(shards_meet(before, n, after, n + more));
            prop_assert!(shards_meet(after, n + more, before, n));
        }
    }

    #[test]
    fn shards_meet_exactly_where_a_key_shows_it() {
        for n in 1u32..7 {
            for m in 1u32..7 {
                let mut met = std::collections::BTreeSet::new();
                for key in 0..4_000u64 {
                    let key = partition_hash(&key.to_be_bytes());
                    met.insert((jump_hash(key, n), jump_hash(key, m)));
                }
                for i in 0..n {
                    for j in 0..m {
                        assert_eq!(shards_meet(i, n, j, m), met.contains(&(i, j)), "{i} of {n}, {j} of {m}");
                    }
                }
            }
        }
    }
}
