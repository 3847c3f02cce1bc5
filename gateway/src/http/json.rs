//! Operations, outcomes and entries as JSON. Bytes that are text stand in the plain field, others in the one marked
//! base64; the lines of a scan are such as `vasto load --format jsonl` takes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use vasto_client::{Data, Entry, Error, Op, Options, Outcome};

use super::Problem;
use crate::number;

/// What a batch asks for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Batch {
    pub(super) operations: Vec<Operation>,
}

/// One operation of a batch.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Operation {
    op: Verb,
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<serde_json::Value>,
    value_base64: Option<String>,
    ttl_ms: Option<u64>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Verb {
    Get,
    Put,
    Delete,
    Add,
    Max,
    Min,
    Append,
}

impl Operation {
    /// What the client library takes, or why that can't be.
    pub(super) fn op(self) -> std::result::Result<Op, String> {
        let Self { op, key, key_base64, value, value_base64, ttl_ms } = self;
        let key = match (key, key_base64) {
            (Some(key), None) => key.into_bytes(),
            (None, Some(key)) => BASE64.decode(key).map_err(|error| format!("key_base64: {error}"))?,
            _ => return Err("it must have either key or key_base64".to_owned()),
        };
        let data = match (value, value_base64) {
            (None, None) => None,
            (Some(serde_json::Value::String(text)), None) => Some(Data::from(text)),
            (Some(serde_json::Value::Number(number)), None) => match number.as_f64().filter(|n| n.is_finite()) {
                Some(number) => Some(Data::Number(number)),
                None => return Err(format!("the value {number} is no 64-bit float")),
            },
            (Some(other), None) => return Err(format!("the value {other} is neither a string nor a number")),
            (None, Some(value)) => Some(BASE64.decode(value).map_err(|error| format!("value_base64: {error}"))?.into()),
            (Some(_), Some(_)) => return Err("it must have either value or value_base64".to_owned()),
        };
        if matches!(op, Verb::Get | Verb::Delete) && data.is_some() {
            return Err("get and delete take no value".to_owned());
        }
        if ttl_ms.is_some() && op != Verb::Put {
            return Err("only put takes ttl_ms".to_owned());
        }
        let number = |data: Option<Data>| match data {
            Some(Data::Number(number)) => Ok(number),
            _ => Err("add, max and min take a number as value".to_owned()),
        };
        Ok(match op {
            Verb::Get => Op::get(key),
            Verb::Delete => Op::delete(key),
            Verb::Put => {
                let data = data.ok_or("a put must have a value or value_base64")?;
                let ttl = ttl_ms.map(std::time::Duration::from_millis);
                Op::put(key, data).with(Options { ttl, ..Options::new() })
            }
            Verb::Add => Op::add(key, number(data)?),
            Verb::Max => Op::max(key, number(data)?),
            Verb::Min => Op::min(key, number(data)?),
            Verb::Append => match data {
                Some(Data::Bytes(bytes)) => Op::append(key, bytes),
                _ => return Err("append takes bytes as value or value_base64".to_owned()),
            },
        })
    }
}

/// Why something was not done.
#[derive(Serialize)]
pub(super) struct Trouble<'a> {
    pub(super) code: &'static str,
    pub(super) message: &'a str,
}

/// What an operation of a batch came to.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Result {
    Found {
        found: bool,
        #[serde(flatten)]
        held: Held,
    },
    Nothing {
        found: bool,
    },
    Done {
        done: bool,
    },
    Failed {
        error: Failure,
    },
}

#[derive(Serialize)]
pub(super) struct Failure {
    code: &'static str,
    message: String,
}

impl From<std::result::Result<Outcome, Error>> for Result {
    fn from(outcome: std::result::Result<Outcome, Error>) -> Self {
        match outcome {
            Ok(Outcome::Found(value)) => Self::Found { found: true, held: Held::new(value.data, value.expiry_ms) },
            Ok(Outcome::Nothing) => Self::Nothing { found: false },
            Ok(Outcome::Written(_) | Outcome::Returned(..)) => Self::Done { done: true },
            Err(error) => {
                let Problem { code, message, .. } = Problem::from(error);
                Self::Failed { error: Failure { code, message } }
            }
        }
    }
}

/// What a key holds.
#[derive(Serialize)]
pub(super) struct Held {
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry_ms: Option<u64>,
}

impl Held {
    fn new(data: Data, expiry_ms: Option<u64>) -> Self {
        let (value, value_base64) = match data {
            Data::Number(number) => (Some(json_number(number)), None),
            Data::Bytes(bytes) => match std::str::from_utf8(&bytes) {
                Ok(text) => (Some(text.into()), None),
                Err(_) => (None, Some(BASE64.encode(&bytes))),
            },
        };
        Self { value, value_base64, expiry_ms }
    }
}

/// Whole numbers without a point.
fn json_number(number: f64) -> serde_json::Value {
    if number.fract() == 0.0 && number.abs() <= 2f64.powi(53) {
        return (number as i64).into();
    }
    serde_json::Number::from_f64(number).map_or_else(|| number::show(number).into(), serde_json::Value::Number)
}

#[derive(Serialize)]
struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(flatten)]
    held: Held,
    #[serde(skip_serializing_if = "Option::is_none")]
    partition_hash: Option<String>,
}

/// A line of a scan, without its end; `head`: without what the key holds.
pub(super) fn line(entry: std::result::Result<Entry, Error>, head: bool) -> Vec<u8> {
    let line = match entry {
        Ok(Entry { key, value, partition_hash }) => {
            let (key, key_base64) = match std::str::from_utf8(&key) {
                Ok(text) => (Some(text.to_owned()), None),
                Err(_) => (None, Some(BASE64.encode(&key))),
            };
            let mut held = Held::new(value.data, value.expiry_ms);
            if head {
                (held.value, held.value_base64) = (None, None);
            }
            let partition_hash = partition_hash.map(|hash| format!("{hash:016x}"));
            serde_json::to_vec(&Line { key, key_base64, held, partition_hash })
        }
        Err(error) => {
            let Problem { code, message, .. } = Problem::from(error);
            serde_json::to_vec(&serde_json::json!({ "error": Trouble { code, message: &message } }))
        }
    };
    // Strings and numbers can always be written down.
    line.unwrap_or_default()
}
