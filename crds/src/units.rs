//! Lengths of time and sizes as people write them (`1h30m`, `10Gi`), with the
//! rules that hold wherever a Keyspace has one.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const PERIOD: &str =
    "a length of time above zero, such as 90s, 10m, 24h or 1h30m (units h, m, s and ms, in this order)";
const SIZE: &str = "a whole number with a unit, such as 10Gi (units Mi, Gi, Ti, M, G and T)";

/// A length of time, to the millisecond: `10m`, `1h30m`, `500ms`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Period(Duration);

/// As many hours as nine digits can write, so that what was written can be read.
const MOST_MS: u64 = 999_999_999 * 3_600_000;

impl Period {
    /// A length of time of so many milliseconds, or the longest that there is.
    pub const fn from_ms(ms: u64) -> Self {
        Self(Duration::from_millis(if ms < MOST_MS { ms } else { MOST_MS }))
    }

    /// A length of time of so many seconds, or the longest that there is.
    pub const fn from_secs(secs: u64) -> Self {
        Self::from_ms(secs.saturating_mul(1000))
    }

    /// In milliseconds.
    pub fn as_ms(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// As the standard library's type.
    pub fn as_duration(self) -> Duration {
        self.0
    }
}

impl From<Period> for Duration {
    fn from(period: Period) -> Self {
        period.0
    }
}

/// A [`Period`] or a [`Size`] that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} must be {wanted}")]
pub struct UnitError {
    text: String,
    wanted: &'static str,
}

impl FromStr for Period {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = || UnitError { text: text.to_owned(), wanted: PERIOD };
        let mut rest = text;
        let mut ms: u64 = 0;
        // Each unit at most once, the great ones first; "ms" before "m" can't be mistaken,
        // since a number must stand before the unit and the whole text must be used up.
        for (unit, factor) in [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, tail) = rest.split_at(digits);
            let Some(tail) = tail.strip_prefix(unit) else { continue };
            if unit == "m" && tail.starts_with('s') {
                continue;
            }
            if digits == 0 || digits > 9 {
                return Err(error());
            }
            ms += number.parse::<u64>().map_err(|_| error())? * factor;
            rest = tail;
        }
        if !rest.is_empty() || ms == 0 {
            return Err(error());
        }
        Ok(Self::from_ms(ms))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ms = self.as_ms();
        if ms == 0 {
            return f.write_str("0s");
        }
        for (unit, factor) in [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            if ms >= factor {
                write!(f, "{}{unit}", ms / factor)?;
                ms %= factor;
            }
        }
        Ok(())
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for Period {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Period".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 40,
            "x-kubernetes-validations": [{
                "rule": "self.matches('^([0-9]{1,9}h)?([0-9]{1,9}m)?([0-9]{1,9}s)?([0-9]{1,9}ms)?$') && self.matches('[1-9]')",
                "message": format!("must be {PERIOD}"),
            }],
        })
    }
}

/// An amount of storage, as Kubernetes writes it: `10Gi`. Keeps its own words.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Size(String);

impl Size {
    /// In bytes.
    pub fn bytes(&self) -> u64 {
        size_bytes(&self.0).unwrap_or(0)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The bytes of a size, or none if it isn't one.
pub(crate) fn size_bytes(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    if number.starts_with('0') || digits > 6 {
        return None;
    }
    Some(number.parse::<u64>().ok()? * factor)
}

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        match size_bytes(text) {
            Some(_) => Ok(Self(text.to_owned())),
            None => Err(UnitError { text: text.to_owned(), wanted: SIZE }),
        }
    }
}

impl Default for Size {
    fn default() -> Self {
        Self("10Gi".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 8,
            "x-kubernetes-validations": [
                {
                    "rule": "self.matches('^[1-9][0-9]{0,5}(Mi|Gi|Ti|M|G|T)$')",
                    "message": format!("must be {SIZE}"),
                },
                {
                    // The first rule says what is wrong with a text that isn't a size.
                    "rule": "!isQuantity(self) || !isQuantity(oldSelf) || quantity(self).compareTo(quantity(oldSelf)) >= 0",
                    "messageExpression": "'must not shrink, since a volume can only grow: it was ' + oldSelf + '; write ' + oldSelf + ' or more'",
                },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn periods() {
        for (text, ms, canonical) in [
            ("10m", 600_000, "10m"),
            ("24h", 86_400_000, "24h"),
            ("1h30m", 5_400_000, "1h30m"),
            ("90m", 5_400_000, "1h30m"),
            ("5ms", 5, "5ms"),
            ("1m5ms", 60_005, "1m5ms"),
            ("1s500ms", 1500, "1s500ms"),
            ("0h1s", 1000, "1s"),
            ("999999999h999999999m", MOST_MS, "999999999h"),
        ] {
            let period: Period = text.parse().unwrap();
            assert_eq!((period.as_ms(), period.to_string()), (ms, canonical.to_owned()), "{text}");
        }
        for text in
            ["", "0s", "0h0m", "10", "m", "-1m", "1d", "1m1h", "1s1s", "1.5h", " 1m", "1m ", "9999999999h", "1hm"]
        {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
        assert_eq!(
            "1d".parse::<Period>().unwrap_err().to_string(),
            "\"1d\" must be a length of time above zero, such as 90s, 10m, 24h or 1h30m (units h, m, s and ms, in this order)"
        );
    }

    #[test]
    fn sizes() {
        assert_eq!("10Gi".parse::<Size>().unwrap().bytes(), 10 << 30);
        assert_eq!("500M".parse::<Size>().unwrap().bytes(), 500_000_000);
        assert_eq!("999999Ti".parse::<Size>().unwrap().bytes(), 999_999 << 40);
        for text in ["", "10", "Gi", "0Gi", "1.5Gi", "10GB", "1000000Ti", "-1Gi", "1Ei"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn periods_come_back(ms in prop_oneof![1u64..1_000_000_000_000, 1..=u64::MAX]) {
            let period = Period::from_ms(ms);
            prop_assert_eq!(period.to_string().parse::<Period>().unwrap(), period);
        }

        /// What Rust reads and what the rule of the schema accepts is the same.
        #[test]
        fn rules_agree_with_readers(text in "[0-9hms]{0,6}|[0-9]{1,3}[MGTi]{0,3}") {
            for (name, ok) in [("period", text.parse::<Period>().is_ok()), ("size", text.parse::<Size>().is_ok())] {
                let generator = &mut SchemaGenerator::default();
                let schema = if name == "period" { Period::json_schema(generator) } else { Size::json_schema(generator) };
                let rule = schema.get("x-kubernetes-validations").unwrap()[0]["rule"].as_str().unwrap();
                let mut context = cel::Context::default();
                context.add_variable_from_value("self", text.as_str());
                let verdict = cel::Program::compile(rule).unwrap().execute(&context);
                prop_assert_eq!(verdict, Ok(cel::Value::Bool(ok)), "{} {:?}", name, text);
            }
        }
    }
}
