//! How `load` and `dump` write a record as one line: tsv, escaped as
//! PostgreSQL's COPY does, and jsonl. Pure: bytes in, bytes out, and each
//! complaint says what would be right.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A file's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Key, tab, value; tab, newline, return and backslash escaped by a backslash.
    Tsv,
    /// One JSON object a line: {"key":"k","value":"v"}.
    Jsonl,
}

/// One record of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Datum,
    /// Unix ms; 0: never.
    pub(crate) expiry_ms: u64,
    /// `None`: the key is its own partition key.
    pub(crate) partition: Option<Partition>,
}

/// What a key holds.
#[derive(Clone, Debug)]
pub(crate) enum Datum {
    Bytes(Vec<u8>),
    Number(f64),
}

impl PartialEq for Datum {
    // Numbers by their bits, so that NaN and the two zeros come through a dump as they were.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Number(a), Self::Number(b)) => a.to_bits() == b.to_bits(),
            _ => false,
        }
    }
}

/// What decides the shard of a key that is not its own partition key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Partition {
    Key(Vec<u8>),
    /// Stores keep only the hash, so this is what a dump has.
    Hash(u64),
}

impl Partition {
    /// A partition key that goes where this one went.
    pub(crate) fn into_key(self) -> Vec<u8> {
        match self {
            Self::Key(key) => key,
            Self::Hash(hash) => key_with_hash(hash).to_vec(),
        }
    }
}

/// A number as text that reads back to the same bits.
pub(crate) fn number_text(number: f64) -> String {
    format!("{number:?}").trim_end_matches(".0").to_string()
}

/// The line for this record, newline included.
pub(crate) fn encode(format: Format, record: &Record) -> Vec<u8> {
    let mut line = match format {
        Format::Tsv => encode_tsv(record),
        Format::Jsonl => encode_json(record).into_bytes(),
    };
    line.push(b'\n');
    line
}

/// The record in a line (without its newline), or what is wrong with it.
pub(crate) fn decode(format: Format, line: &[u8]) -> Result<Record, String> {
    let record = match format {
        Format::Tsv => decode_tsv(line),
        Format::Jsonl => decode_json(line),
    }?;
    if record.key.is_empty() {
        return Err("the key is empty; a key has at least one byte".into());
    }
    Ok(record)
}

// ---- tsv ----

fn encode_tsv(record: &Record) -> Vec<u8> {
    let mut line = escape(&record.key);
    line.push(b'\t');
    match &record.value {
        Datum::Bytes(bytes) => line.extend(escape(bytes)),
        Datum::Number(number) => {
            line.extend(number_text(*number).into_bytes());
            line.extend(b"\tnumber");
        }
    }
    if record.expiry_ms != 0 {
        line.extend(format!("\texpiry_ms={}", record.expiry_ms).into_bytes());
    }
    match &record.partition {
        None => {}
        Some(Partition::Hash(hash)) => line.extend(format!("\tpartition_hash={hash:016x}").into_bytes()),
        Some(Partition::Key(key)) => {
            line.extend(b"\tpartition_key=");
            line.extend(escape(key));
        }
    }
    line
}

fn decode_tsv(line: &[u8]) -> Result<Record, String> {
    const RIGHT: &str =
        "a line is key, tab, value; a tab, newline, return or backslash inside is written \\t \\n \\r \\\\";
    let mut fields = line.split(|b| *b == b'\t');
    let key = unescape(fields.next().unwrap_or_default()).map_err(|e| format!("key: {e}; {RIGHT}"))?;
    let Some(value) = fields.next() else {
        return Err(format!("there is no tab; {RIGHT}"));
    };
    let value = unescape(value).map_err(|e| format!("value: {e}; {RIGHT}"))?;
    let mut record = Record { key, value: Datum::Bytes(value), expiry_ms: 0, partition: None };
    for field in fields {
        let (name, argument) = match field.iter().position(|b| *b == b'=') {
            Some(at) => (&field[..at], Some(&field[at + 1..])),
            None => (field, None),
        };
        match (name, argument) {
            (b"number", None) => {
                if let Datum::Bytes(text) = &record.value {
                    record.value = Datum::Number(parse_number(&String::from_utf8_lossy(text))?);
                }
            }
            (b"expiry_ms", Some(ms)) => {
                let ms = String::from_utf8_lossy(ms);
                record.expiry_ms =
                    ms.parse().map_err(|_| format!("expiry_ms is {ms:?}; it must be unix milliseconds"))?;
            }
            (b"partition_hash", Some(hash)) => {
                record.partition = Some(Partition::Hash(parse_hash(&String::from_utf8_lossy(hash))?));
            }
            (b"partition_key", Some(key)) => {
                record.partition = Some(Partition::Key(unescape(key).map_err(|e| format!("partition_key: {e}"))?));
            }
            _ => {
                return Err(format!(
                    "the field {:?} after the value is unknown; {RIGHT}; after the value may stand number, \
                     expiry_ms=N, partition_hash=HEX and partition_key=KEY",
                    String::from_utf8_lossy(field)
                ));
            }
        }
    }
    Ok(record)
}

/// Escapes tab, newline, return and backslash by a backslash.
pub(crate) fn escape(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 8);
    for byte in bytes {
        match byte {
            b'\t' => out.extend(b"\\t"),
            b'\n' => out.extend(b"\\n"),
            b'\r' => out.extend(b"\\r"),
            b'\\' => out.extend(b"\\\\"),
            other => out.push(*other),
        }
    }
    out
}

/// Undoes `escape`, and takes all else that COPY writes: \b \f \v, \ooo, \xHH.
pub(crate) fn unescape(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let Some((&code, after)) = rest.split_first() else {
            return Err("it ends in a lone backslash; a backslash is written \\\\".into());
        };
        rest = after;
        match code {
            b't' => out.push(b'\t'),
            b'n' => out.push(b'\n'),
            b'r' => out.push(b'\r'),
            b'b' => out.push(8),
            b'f' => out.push(12),
            b'v' => out.push(11),
            b'N' => return Err("\\N (null) has no meaning here; leave the line out".into()),
            b'0'..=b'7' => {
                let mut number = u32::from(code - b'0');
                for _ in 0..2 {
                    match rest.split_first() {
                        Some((&digit @ b'0'..=b'7', after)) => {
                            number = number * 8 + u32::from(digit - b'0');
                            rest = after;
                        }
                        _ => break,
                    }
                }
                out.push((number & 0xff) as u8);
            }
            b'x' => {
                let digits = rest.iter().take(2).take_while(|d| d.is_ascii_hexdigit()).count();
                let (hex, after) = rest.split_at(digits);
                rest = after;
                match u8::from_str_radix(&String::from_utf8_lossy(hex), 16) {
                    Ok(byte) => out.push(byte),
                    // As COPY: \x without digits is an x.
                    Err(_) => out.push(b'x'),
                }
            }
            other => out.push(other),
        }
    }
    Ok(out)
}

// ---- jsonl ----

/// A line as it stands. Bytes that are text are in the plain field, others in the one marked base64.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    /// A number that JSON can't say, or not to the last bit.
    #[serde(skip_serializing_if = "Option::is_none")]
    value_number: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partition_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partition_key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partition_hash: Option<String>,
}

fn text_or_base64(bytes: &[u8]) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.to_string()), None),
        Err(_) => (None, Some(BASE64.encode(bytes))),
    }
}

/// The record as one JSON object, without a newline.
pub(crate) fn encode_json(record: &Record) -> String {
    let mut json = Json::default();
    (json.key, json.key_base64) = text_or_base64(&record.key);
    match &record.value {
        Datum::Bytes(bytes) => {
            let (text, base64) = text_or_base64(bytes);
            (json.value, json.value_base64) = (text.map(serde_json::Value::String), base64);
        }
        Datum::Number(number) => match json_number(*number) {
            Some(exact) => json.value = Some(exact),
            None => json.value_number = Some(number_text(*number)),
        },
    }
    json.expiry_ms = (record.expiry_ms != 0).then_some(record.expiry_ms);
    match &record.partition {
        None => {}
        Some(Partition::Key(key)) => (json.partition_key, json.partition_key_base64) = text_or_base64(key),
        Some(Partition::Hash(hash)) => json.partition_hash = Some(format!("{hash:016x}")),
    }
    // Strings and numbers alone: this can't fail.
    serde_json::to_string(&json).unwrap_or_default()
}

/// The number as JSON, if a JSON reader gives the same bits back.
pub(crate) fn json_number(number: f64) -> Option<serde_json::Value> {
    let whole = number as i64;
    let value = if whole.unsigned_abs() < 1 << 53 && (whole as f64).to_bits() == number.to_bits() {
        whole.into()
    } else {
        serde_json::Value::Number(serde_json::Number::from_f64(number)?)
    };
    let back: f64 = serde_json::from_str(&value.to_string()).ok()?;
    (back.to_bits() == number.to_bits()).then_some(value)
}

fn decode_json(line: &[u8]) -> Result<Record, String> {
    const RIGHT: &str = r#"a line is an object like {"key":"k","value":"v"}"#;
    let json: Json = serde_json::from_slice(line).map_err(|e| {
        let text = e.to_string();
        let what = text.split(" at line ").next().unwrap_or_default();
        format!("{what} (column {}); {RIGHT}", e.column())
    })?;
    let key = one_of("key", json.key, json.key_base64)?.ok_or_else(|| format!("there is no \"key\"; {RIGHT}"))?;
    let values = [json.value.is_some(), json.value_base64.is_some(), json.value_number.is_some()];
    if values.into_iter().filter(|v| *v).count() > 1 {
        return Err("there is more than one of \"value\", \"value_base64\" and \"value_number\"; give one".into());
    }
    let value = if let Some(text) = json.value_base64 {
        Datum::Bytes(base64("value", &text)?)
    } else if let Some(text) = json.value_number {
        Datum::Number(parse_number(&text)?)
    } else {
        match json.value {
            Some(serde_json::Value::String(text)) => Datum::Bytes(text.into_bytes()),
            Some(serde_json::Value::Number(number)) => Datum::Number(exact_number(&number)?),
            Some(other) => {
                let kind = match other {
                    serde_json::Value::Bool(_) => "true or false",
                    serde_json::Value::Array(_) => "an array",
                    _ => "an object",
                };
                return Err(format!(
                    "\"value\" is {kind}; it must be a string or a number (JSON itself may be stored as a string)"
                ));
            }
            None => return Err(format!("there is no \"value\"; {RIGHT}")),
        }
    };
    let partition = match (one_of("partition_key", json.partition_key, json.partition_key_base64)?, json.partition_hash)
    {
        (Some(_), Some(_)) => return Err("there are both a partition key and a \"partition_hash\"; give one".into()),
        (Some(key), None) => Some(Partition::Key(key)),
        (None, Some(hash)) => Some(Partition::Hash(parse_hash(&hash)?)),
        (None, None) => None,
    };
    Ok(Record { key, value, expiry_ms: json.expiry_ms.unwrap_or(0), partition })
}

fn one_of(name: &str, text: Option<String>, encoded: Option<String>) -> Result<Option<Vec<u8>>, String> {
    match (text, encoded) {
        (Some(_), Some(_)) => Err(format!("there are both \"{name}\" and \"{name}_base64\"; give one")),
        (Some(text), None) => Ok(Some(text.into_bytes())),
        (None, Some(text)) => base64(name, &text).map(Some),
        (None, None) => Ok(None),
    }
}

fn base64(name: &str, text: &str) -> Result<Vec<u8>, String> {
    BASE64.decode(text).map_err(|e| format!("\"{name}_base64\" is not base64 (standard alphabet, padded): {e}"))
}

/// Refuses an integer that a 64-bit float can't hold, rather than changing it silently.
fn exact_number(number: &serde_json::Number) -> Result<f64, String> {
    let float = number.as_f64().ok_or_else(|| format!("{number} is not a 64-bit float"))?;
    let integer = number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
    if integer.is_some_and(|i| i != float as i128) {
        return Err(format!(
            "{number} does not fit a 64-bit float exactly; write it as a string, \"{number}\", to keep its digits"
        ));
    }
    Ok(float)
}

/// A number as a person or a dump writes it.
pub(crate) fn parse_number(text: &str) -> Result<f64, String> {
    let text = text.trim();
    // There is one NaN: what is written as one has no sign.
    let one = |number: f64| if number.is_nan() { f64::NAN } else { number };
    text.parse().map(one).map_err(|_| format!("{text:?} is not a number; write it like 5, -2.5 or 1e9"))
}

fn parse_hash(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16)
        .map_err(|_| format!("the partition hash is {text:?}; it must be up to 16 hexadecimal digits"))
}

// ---- partition hashes ----

/// The 8 bytes whose partition hash (xxh64, seed 0) is `hash`.
///
/// xxh64 is a bijection on inputs of 8 bytes, so each step has an inverse.
/// Stores keep hashes of partition keys, not the keys: with this a dump loads
/// back to where its records were, and readers by the true partition key find them.
fn key_with_hash(hash: u64) -> [u8; 8] {
    const P1: u64 = 0x9E37_79B1_85EB_CA87;
    const P2: u64 = 0xC2B2_AE3D_27D4_EB4F;
    const P3: u64 = 0x1656_67B1_9E37_79F9;
    const P4: u64 = 0x85EB_CA77_C2B2_AE63;
    const P5: u64 = 0x27D4_EB2F_1656_67C5;
    let mut h = hash;
    h ^= h >> 32;
    h = h.wrapping_mul(inverse(P3));
    h ^= (h >> 29) ^ (h >> 58);
    h = h.wrapping_mul(inverse(P2));
    h ^= h >> 33;
    h = h.wrapping_sub(P4).wrapping_mul(inverse(P1)).rotate_right(27);
    h ^= P5.wrapping_add(8);
    h.wrapping_mul(inverse(P1)).rotate_right(31).wrapping_mul(inverse(P2)).to_le_bytes()
}

/// The inverse of an odd number modulo 2^64 (Newton's iteration doubles the right bits each time).
fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    for _ in 0..6 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vasto_client::hash::partition_hash;

    fn record(key: &[u8], value: &[u8]) -> Record {
        Record { key: key.to_vec(), value: Datum::Bytes(value.to_vec()), expiry_ms: 0, partition: None }
    }

    #[test]
    fn tsv_is_what_copy_writes() {
        let line = encode(Format::Tsv, &record(b"a\tb", b"c\\d\ne\r"));
        assert_eq!(line, b"a\\tb\tc\\\\d\\ne\\r\n");
        assert_eq!(unescape(br"\x41\101\v\q\x").unwrap(), b"AA\x0bqx");
    }

    #[test]
    fn jsonl_marks_base64_and_keeps_numbers() {
        assert_eq!(encode_json(&record(b"k", b"v")), r#"{"key":"k","value":"v"}"#);
        assert_eq!(encode_json(&record(&[0xff], &[0xfe])), r#"{"key_base64":"/w==","value_base64":"/g=="}"#);
        let number = Record { value: Datum::Number(2.5), expiry_ms: 7, ..record(b"n", b"") };
        assert_eq!(encode_json(&number), r#"{"key":"n","value":2.5,"expiry_ms":7}"#);
        let plain = decode(Format::Jsonl, br#"{"key":"n","value":5}"#).unwrap();
        assert_eq!(plain.value, Datum::Number(5.0));
    }

    #[test]
    fn what_is_wrong_and_what_would_be_right() {
        for (format, line, words) in [
            (Format::Jsonl, &b"bash 5.2"[..], "expected value (column 1); a line is an object like"),
            (Format::Jsonl, br#"{"key":"a"}"#, "there is no \"value\"; a line is an object like"),
            (Format::Jsonl, br#"{"value":"a"}"#, "there is no \"key\""),
            (Format::Jsonl, br#"{"key":"","value":"a"}"#, "the key is empty"),
            (Format::Jsonl, br#"{"key":"a","value":{}}"#, "is an object; it must be a string or a number"),
            (Format::Jsonl, br#"{"key":"a","value":"b","ttl":3}"#, "unknown field `ttl`"),
            (Format::Jsonl, br#"{"key":"a","value_base64":"*"}"#, "is not base64"),
            (Format::Jsonl, br#"{"key":"a","value":9007199254740993}"#, "does not fit a 64-bit float"),
            (Format::Jsonl, br#"{"key":"a","value":"b"} {}"#, "trailing characters"),
            (Format::Tsv, b"bash", "there is no tab; a line is key, tab, value"),
            (Format::Tsv, b"\tv", "the key is empty"),
            (Format::Tsv, b"a\tb\\", "lone backslash"),
            (Format::Tsv, b"a\t\\N", "(null)"),
            (Format::Tsv, b"a\tb\tc", "the field \"c\" after the value is unknown"),
        ] {
            let message = decode(format, line).unwrap_err();
            assert!(message.contains(words), "{message:?} should contain {words:?}");
        }
    }

    fn records() -> impl Strategy<Value = Record> {
        let datum = prop_oneof![
            any::<Vec<u8>>().prop_map(Datum::Bytes),
            ".*".prop_map(|text| Datum::Bytes(text.into_bytes())),
            any::<u64>().prop_map(f64::from_bits).prop_filter("one NaN", |n| !n.is_nan()).prop_map(Datum::Number),
            Just(Datum::Number(f64::NAN)),
        ];
        let partition = prop_oneof![
            Just(None),
            any::<u64>().prop_map(|hash| Some(Partition::Hash(hash))),
            any::<Vec<u8>>().prop_map(|key| Some(Partition::Key(key))),
        ];
        let key = prop_oneof![proptest::collection::vec(any::<u8>(), 1..20), ".+".prop_map(String::into_bytes)];
        (key, datum, any::<u64>(), partition).prop_map(|(key, value, expiry_ms, partition)| Record {
            key,
            value,
            expiry_ms,
            partition,
        })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(record in records()) {
            for format in [Format::Tsv, Format::Jsonl] {
                let line = encode(format, &record);
                let (newline, line) = line.split_last().unwrap();
                prop_assert_eq!(*newline, b'\n');
                prop_assert!(!line.contains(&b'\n') && !line.contains(&b'\r'));
                prop_assert_eq!(decode(format, line).unwrap(), record.clone());
            }
        }

        #[test]
        fn no_line_makes_it_panic(line: Vec<u8>, text in ".*") {
            for line in [&line[..], text.as_bytes()] {
                let _ = (decode(Format::Tsv, line), decode(Format::Jsonl, line));
            }
        }

        #[test]
        fn a_partition_hash_has_its_key(hash: u64) {
            prop_assert_eq!(partition_hash(&Partition::Hash(hash).into_key()), hash);
        }
    }
}
