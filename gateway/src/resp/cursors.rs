//! Where scans are. Redis' cursors are numbers, and a position here is a key: so the gateway remembers, for as many
//! scans as there is room for, which key each number stands for. Any connection of this gateway may go on with one.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

/// Scans that are remembered.
const MOST: usize = 16_384;
/// Bytes of keys that are remembered.
const BYTES: usize = 16 << 20;

#[derive(Debug, Default)]
pub(super) struct Cursors {
    keys: HashMap<u64, Bytes>,
    /// In the order of their making.
    order: VecDeque<u64>,
    bytes: usize,
}

impl Cursors {
    /// The key behind which this cursor goes on; none: it is not remembered.
    pub(super) fn get(&self, cursor: u64) -> Option<Bytes> {
        self.keys.get(&cursor).cloned()
    }

    /// Remembers a position. `random`: 64 uniform bits, so that no cursor is taken for another gateway's.
    pub(super) fn add(&mut self, key: Bytes, random: u64) -> u64 {
        // Not 0, which ends a scan; and within what clients of languages with only floats and signed integers can hold.
        let mut cursor = (random >> 11).max(1);
        while self.keys.contains_key(&cursor) {
            cursor = (cursor + 1) & (u64::MAX >> 11);
            cursor = cursor.max(1);
        }
        self.bytes += key.len();
        // Its own copy: the key may be a part of a message.
        self.keys.insert(cursor, Bytes::copy_from_slice(&key));
        self.order.push_back(cursor);
        while self.order.len() > MOST || self.bytes > BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            self.bytes -= self.keys.remove(&oldest).map_or(0, |key| key.len());
        }
        cursor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_and_none_is_zero() {
        let mut cursors = Cursors::default();
        let first = cursors.add("a".into(), 0);
        assert_eq!(first, 1);
        assert_eq!(cursors.add("b".into(), 0), 2, "another one");
        assert_eq!(cursors.get(first), Some("a".into()));
        for number in 0..MOST as u64 {
            cursors.add("x".into(), (number + 10) << 11);
        }
        assert_eq!(cursors.get(first), None);
        assert_eq!(cursors.keys.len(), MOST);
        let key = Bytes::from(vec![b'k'; 32 << 10]);
        (0..1000).for_each(|number| assert!(cursors.add(key.clone(), (number + 1) << 40) > 0));
        assert!(cursors.bytes <= BYTES && cursors.keys.len() <= BYTES / key.len() + 1);
    }
}
