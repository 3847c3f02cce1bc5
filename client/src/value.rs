//! What a key holds, as callers see it: bytes or a number, when it expires,
//! and the stamp of its last write.

use bytes::Bytes;

use crate::v1;

/// When a write was taken and by whom; a later write has a greater stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// 48 bits of unix milliseconds, 16 bits of counter.
    pub time: u64,
    /// Who gave it: a random number that a replica draws.
    pub origin: u64,
}

impl Stamp {
    /// The wall clock part, in unix milliseconds.
    pub fn ms(&self) -> u64 {
        self.time >> 16
    }
}

impl From<v1::Stamp> for Stamp {
    fn from(stamp: v1::Stamp) -> Self {
        Self { time: stamp.time, origin: stamp.origin }
    }
}

impl From<Stamp> for v1::Stamp {
    fn from(stamp: Stamp) -> Self {
        Self { time: stamp.time, origin: stamp.origin }
    }
}

/// What can be put under a key: bytes or a number. Both convert with `into`.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Any bytes, up to 8 MiB.
    Bytes(Bytes),
    /// A number, for add, max and min.
    Number(f64),
}

impl Data {
    /// Its size on the wire.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Number(_) => 8,
        }
    }
}

impl From<Bytes> for Data {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}
impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}
impl From<String> for Data {
    fn from(text: String) -> Self {
        Self::Bytes(text.into())
    }
}
impl From<&str> for Data {
    fn from(text: &str) -> Self {
        Self::Bytes(Bytes::copy_from_slice(text.as_bytes()))
    }
}
impl From<&[u8]> for Data {
    fn from(bytes: &[u8]) -> Self {
        Self::Bytes(Bytes::copy_from_slice(bytes))
    }
}
impl<const N: usize> From<&[u8; N]> for Data {
    fn from(bytes: &[u8; N]) -> Self {
        Self::Bytes(Bytes::copy_from_slice(bytes))
    }
}
impl From<f64> for Data {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

/// What a key holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// The bytes or the number.
    pub data: Data,
    /// When it expires, in unix milliseconds; `None`: never.
    pub expiry_ms: Option<u64>,
    /// The greatest stamp of what it was made from.
    pub stamp: Stamp,
    /// Bytes of the value; 8 for a number. Of a head the bytes themselves are left out, this is not.
    pub size: u64,
}

impl Value {
    /// The bytes, or `None` where it is a number.
    pub fn bytes(&self) -> Option<&Bytes> {
        match &self.data {
            Data::Bytes(bytes) => Some(bytes),
            Data::Number(_) => None,
        }
    }

    /// The number, or `None` where it is bytes.
    pub fn number(&self) -> Option<f64> {
        match self.data {
            Data::Number(number) => Some(number),
            Data::Bytes(_) => None,
        }
    }
}

impl From<v1::Value> for Value {
    fn from(value: v1::Value) -> Self {
        let data = match value.value {
            Some(v1::value::Value::Bytes(bytes)) => Data::Bytes(bytes),
            Some(v1::value::Value::Number(number)) => Data::Number(number),
            None => Data::Bytes(Bytes::new()),
        };
        let expiry_ms = (value.expiry_ms != 0).then_some(value.expiry_ms);
        let size = value.size.unwrap_or(data.len() as u64);
        Self { data, expiry_ms, stamp: value.stamp.map(Stamp::from).unwrap_or_default(), size }
    }
}

/// One key and its value, as a scan yields them.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: Bytes,
    /// What it holds.
    pub value: Value,
    /// The hash of its partition key, where that isn't the key itself.
    pub partition_hash: Option<u64>,
}

impl From<v1::Entry> for Entry {
    fn from(entry: v1::Entry) -> Self {
        Self {
            key: entry.key,
            value: entry.value.unwrap_or_default().into(),
            partition_hash: (entry.partition_hash != 0).then_some(entry.partition_hash),
        }
    }
}
