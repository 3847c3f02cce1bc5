//! Fuzzing on stable Rust: entries of a kept corpus are mutated by a seeded generator
//! and given to what reads bytes from disks, peers and people. Nothing may panic, and
//! what is read must be written as it was read.

use std::path::Path;
use std::time::{Duration, Instant};

// The binary has no library that it could be taken from.
#[allow(dead_code)]
#[path = "../../cli/src/codec.rs"]
mod codec;

use bytes::Bytes;
use prost::Message;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use vasto_client::v1::{Batch, FollowBatch, FollowResponse, SnapshotResponse, Topology};
use vasto_store::join::join;
use vasto_store::record::{Record, glance};

/// What is given bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A store's records.
    Record,
    /// Messages between clients, stores and the operator.
    Wire,
    /// Keyspaces in YAML.
    Spec,
    /// Lines of files that `dump` writes and `load` reads.
    Dump,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Record, Self::Wire, Self::Spec, Self::Dump];

    /// Its name, and its folder in the corpus.
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Wire => "wire",
            Self::Spec => "spec",
            Self::Dump => "dump",
        }
    }

    /// Reads these bytes. Panics where what was read isn't written as it was.
    fn try_bytes(self, bytes: &[u8]) {
        match self {
            Self::Record => record(bytes),
            Self::Wire => {
                same::<Batch>(bytes);
                same::<FollowBatch>(bytes);
                same::<FollowResponse>(bytes);
                same::<SnapshotResponse>(bytes);
                same::<Topology>(bytes);
                // As a follower does with what it is shipped.
                if let Ok(batch) = FollowBatch::decode(bytes) {
                    batch.records.iter().for_each(|shipped| record(&shipped.record));
                }
            }
            Self::Spec => spec(&String::from_utf8_lossy(bytes)),
            Self::Dump => bytes.split(|b| *b == b'\n').for_each(line),
        }
    }
}

fn record(bytes: &[u8]) {
    let Ok(record) = Record::decode(Bytes::copy_from_slice(bytes)) else { return };
    assert_eq!(record.encoded(), bytes, "a record is written as it was read");
    assert_eq!(record.size(), bytes.len(), "its size is that of its encoding");
    let seen = glance(bytes).unwrap();
    assert_eq!(seen.partition_hash, record.partition_hash(), "a glance sees what decoding sees");
    assert_eq!(join(record.clone(), record.clone()), record, "join is idempotent");
    for now in [0, 1_700_000_000_000, u64::MAX] {
        let _ = (record.read(now), record.load(now), record.may_be_collected(now, 0));
    }
    let parts = record.clone().parts(64).into_iter().reduce(join);
    assert_eq!(parts, Some(record), "parts are joined to the whole");
}

fn same<M: Message + Default + PartialEq>(bytes: &[u8]) {
    let Ok(message) = M::decode(bytes) else { return };
    let written = message.encode_to_vec();
    // By bytes: a NaN is not equal to itself.
    assert_eq!(M::decode(written.as_slice()).unwrap().encode_to_vec(), written, "a message is written as it was read");
}

fn spec(text: &str) {
    match vasto_crds::parse(text, "fuzz") {
        Ok(keyspaces) => {
            for keyspace in keyspaces {
                let json = keyspace.to_json();
                let again = vasto_crds::Keyspace::from_json(&json).unwrap();
                assert_eq!(again.to_json(), json, "a keyspace is written as it was read");
                let _ = vasto_crds::check(&keyspace, None);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty(), "a refusal has words"),
    }
}

fn line(bytes: &[u8]) {
    for format in [codec::Format::Tsv, codec::Format::Jsonl] {
        match codec::decode(format, bytes) {
            Ok(record) => {
                let written = codec::encode(format, &record);
                let line = written.strip_suffix(b"\n").unwrap();
                assert!(!line.contains(&b'\n'), "a record is one line");
                assert_eq!(codec::decode(format, line), Ok(record), "a record is read as it was written");
            }
            Err(error) => assert!(!error.is_empty(), "a refusal has words"),
        }
    }
}

/// Numbers at which lengths, counts and varints turn over.
const EDGES: [&[u8]; 8] = [
    &[0],
    &[0x7f],
    &[0xff],
    &[0x80, 0x01],
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0x7f, 0xf0, 0, 0, 0, 0, 0, 0],
    &[0x7f, 0xf8, 0, 0, 0, 0, 0, 0],
];
/// No input is longer.
const MOST: usize = 16 << 10;

fn mutate(random: &mut StdRng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus.choose(random).cloned().unwrap_or_default();
    for _ in 0..random.random_range(0..6) {
        let at = random.random_range(0..=bytes.len());
        let to = random.random_range(at..=bytes.len().min(at + 40));
        match random.random_range(0..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = random.next_u64() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..to)),
            4 => {
                let copy = bytes[at..to].to_vec();
                let into = random.random_range(0..=bytes.len());
                bytes.splice(into..into, copy);
            }
            5 => {
                let edge = EDGES[random.random_range(0..EDGES.len())];
                let end = (at + edge.len()).min(bytes.len());
                bytes.splice(at..end, edge.iter().copied());
            }
            _ => {
                let other = corpus.choose(random).cloned().unwrap_or_default();
                let from = random.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes.truncate(MOST);
    bytes
}

/// The entries of a target's corpus.
pub fn corpus(folder: &Path, target: Target) -> std::io::Result<Vec<Vec<u8>>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder.join(target.name()))? {
        files.push(entry?.path());
    }
    files.sort();
    files.into_iter().map(std::fs::read).collect()
}

/// Tries the corpus as it is, then mutations of it for this long; says how many. `fresh` is told of
/// each input before it is tried, so that one that ends the process is known.
pub fn run(target: Target, corpus: &[Vec<u8>], seed: u64, time: Duration, mut fresh: impl FnMut(&[u8])) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let start = Instant::now();
    for entry in corpus {
        fresh(entry);
        target.try_bytes(entry);
    }
    let mut tried = corpus.len() as u64;
    while start.elapsed() < time {
        let bytes = mutate(&mut random, corpus);
        fresh(&bytes);
        target.try_bytes(&bytes);
        tried += 1;
    }
    tried
}
