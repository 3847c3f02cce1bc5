//! The form of the rows of `changes`: lines that are written together share a row, a *page*, since a row costs RocksDB
//! far more than a line in it. Pure.
//!
//! A page's key is the seq of its last line (8 bytes, big-endian); the lines' seqs follow one another. Its value:
//!
//! ```text
//! form           1 byte, 1
//! from           8: the origin of the peer that all of its lines came from; 0: clients
//! lines          each: length of the key 4, key
//! ```

use bytes::{Buf, Bytes};

/// Whoever follows reads a page whole, however little of it is news.
const LINES: u64 = 128;
const FORM: u8 = 1;

/// A line of `changes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its place in the order of this replica's changes.
    pub seq: u64,
    /// The origin of the peer that it came from; 0: a client.
    pub from: u64,
    /// The changed key.
    pub key: Bytes,
}

/// The pages of one batch.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages {
    /// Their values, one after the other.
    bytes: Vec<u8>,
    pages: Vec<Page>,
}

#[derive(Clone, Debug)]
struct Page {
    from: u64,
    lines: u64,
    key: [u8; 8],
    /// Where its value ends.
    end: usize,
}

impl Pages {
    /// A line after those before.
    pub fn add(&mut self, seq: u64, from: u64, key: &[u8]) {
        match self.pages.last_mut() {
            Some(page) if page.from == from && u64::from_be_bytes(page.key) + 1 == seq && page.lines < LINES => {
                (page.lines, page.key) = (page.lines + 1, seq.to_be_bytes());
            }
            _ => {
                self.bytes.push(FORM);
                self.bytes.extend_from_slice(&from.to_be_bytes());
                self.pages.push(Page { from, lines: 1, key: seq.to_be_bytes(), end: 0 });
            }
        }
        self.bytes.extend_from_slice(&(key.len() as u32).to_be_bytes());
        self.bytes.extend_from_slice(key);
        if let Some(page) = self.pages.last_mut() {
            page.end = self.bytes.len();
        }
    }

    /// Keys and values.
    pub fn rows(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut begin = 0;
        self.pages.iter().map(move |page| {
            let value = &self.bytes[begin..page.end];
            begin = page.end;
            (&page.key[..], value)
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Bytes of all values.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.pages.clear();
    }
}

/// The seq of a page's last line.
pub(super) fn last_seq(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

/// The lines of a page, in order; `None`: it has not this form.
pub(super) fn lines(key: &[u8], value: &[u8]) -> Option<Vec<Change>> {
    let last = last_seq(key)?;
    let mut value = Bytes::copy_from_slice(value);
    if value.try_get_u8().ok()? != FORM {
        return None;
    }
    let from = value.try_get_u64().ok()?;
    let mut lines = Vec::new();
    while !value.is_empty() {
        let length = value.try_get_u32().ok()? as usize;
        if length > value.len() {
            return None;
        }
        lines.push(Change { seq: 0, from, key: value.split_to(length) });
    }
    // A seq is never 0, and there is no page without a line.
    let before = last.checked_sub(lines.len() as u64).filter(|_| !lines.is_empty())?;
    for (line, seq) in lines.iter_mut().zip(before + 1..) {
        line.seq = seq;
    }
    Some(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(pages: &Pages) -> Vec<Change> {
        pages.rows().flat_map(|(key, value)| lines(key, value).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn pages_give_back_their_lines_in_order(
            steps in prop::collection::vec((1u64..3, 0u64..2, 1usize..200, prop::collection::vec(any::<u8>(), 0..20)), 0..6)
        ) {
            let (mut pages, mut expected, mut seq) = (Pages::default(), Vec::new(), 0);
            for (step, from, count, key) in steps {
                seq += step;
                for _ in 0..count {
                    pages.add(seq, from, &key);
                    expected.push(Change { seq, from, key: key.clone().into() });
                    seq += 1;
                }
            }
            prop_assert_eq!(read(&pages), expected);
        }

        #[test]
        fn what_is_no_page_is_refused(key in prop::collection::vec(any::<u8>(), 0..10), value in any::<Vec<u8>>()) {
            if let Some(lines) = lines(&key, &value) {
                prop_assert!(lines.iter().all(|line| line.seq > 0) && lines.last().map(|l| l.seq) == last_seq(&key));
            }
        }
    }

    #[test]
    fn a_page_holds_no_more_than_it_may_and_a_torn_one_is_refused() {
        let mut pages = Pages::default();
        for seq in 1..=LINES * 2 + 1 {
            pages.add(seq, 7, b"key");
        }
        assert_eq!(pages.len(), 3);
        let (key, value) = pages.rows().next().unwrap();
        assert_eq!(last_seq(key), Some(LINES));
        for end in [0, 1, 8, 9, 12, value.len() - 1] {
            assert_eq!(lines(key, &value[..end]), None, "cut at {end}");
        }
        assert_eq!(lines(&0u64.to_be_bytes(), value), None, "no room for its seqs");
        // As lines were written before they shared a row: who it came from, and the key.
        assert_eq!(lines(key, b"\0\0\0\0\0\0\0\0key"), None);
    }
}
