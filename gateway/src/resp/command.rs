//! What a command asks for: its words, checked and turned into operations on the map, and how their outcomes
//! become its answer. Pure.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use vasto_client::{Code, Data, Error, Op, Options, Outcome, Returning, Value};

use super::reply::Reply;
use super::request::Words;
use super::table;
use crate::number;

/// The greatest whole number up to which every one is kept exactly.
const EXACT: u64 = 1 << 53;
/// The most keys that one SCAN looks at.
const MAX_COUNT: u64 = 10_000;
/// The longest pattern: each key is held against all of it.
const MAX_PATTERN: usize = 4 << 10;
/// What begins, ends or gives up a transaction.
const TRANSACTIONAL: [&[u8]; 3] = [b"MULTI", b"EXEC", b"DISCARD"];
const NOT_AN_INTEGER: &str = "value is not an integer or out of range";
const SYNTAX: &str = "syntax error";

/// A command, ready to be carried out.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    /// Operations on the map.
    Map(Asked),
    /// Some keys from a cursor on.
    Scan(Scan),
    /// How many keys there are.
    Size,
    /// For the connection itself: its name in lower case and its arguments.
    Session(&'static str, Words),
}

/// What else may stand beside a command's operations in one batch without changing what any of them means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// Beside other reads of the key.
    Read,
    /// Beside other additions to the key.
    Add,
    /// Beside nothing else with the key.
    Write,
}

/// The operations of a command, and how they are answered.
#[derive(Debug, PartialEq)]
pub(super) struct Asked {
    pub(super) ops: Vec<Op>,
    pub(super) shape: Shape,
}

/// How a command's operations are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) touch: Touch,
    answer: Answer,
}

/// How outcomes become a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// `OK` once all are done.
    Ok,
    /// The one value.
    Value,
    /// All values in an array.
    Values,
    /// Of how many keys something was found, or was there before.
    Count,
    /// Bytes of the one value.
    Length,
    /// The one value, a whole number.
    Integer,
    /// The one value, a number.
    Float,
    /// When the one value ends.
    Expiry { absolute: bool, seconds: bool },
    /// Whether the one value had an end.
    Ended,
    /// Its type.
    Type,
    /// This part of the one value.
    Range(i64, i64),
}

/// One step of a scan.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// 0: from the beginning.
    pub(super) cursor: u64,
    pub(super) pattern: Option<Bytes>,
    /// How many keys to look at.
    pub(super) count: u64,
    /// No key is of the wanted type.
    pub(super) none: bool,
}

/// Reads the commands of one connection.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// The commands since a MULTI, of which none is done.
    transaction: Option<usize>,
}

impl Parser {
    /// Reads a command; `Err`: it is answered so.
    ///
    /// A transaction is begun as clients expect it, and then each command in it is refused: clients send them without
    /// waiting for the answer to MULTI, so that a refusal of that alone would have the others done.
    pub(super) fn parse(&mut self, words: Words, now_ms: u64) -> Result<Command, Reply> {
        let usual = |name: &Bytes| !TRANSACTIONAL.iter().any(|other| name.eq_ignore_ascii_case(other));
        if self.transaction.is_none() && words.first().is_some_and(usual) {
            return parse(words, now_ms);
        }
        let name = words.first().map(|name| name.to_ascii_uppercase()).unwrap_or_default();
        match (name.as_slice(), self.transaction.take(), words.len()) {
            (b"QUIT" | b"RESET", _, _) => parse(words, now_ms),
            (b"MULTI", None, 1) => {
                self.transaction = Some(0);
                Err(Reply::OK)
            }
            (b"EXEC", Some(0), 1) => Err(Reply::Array(Vec::new())),
            (b"EXEC", Some(_), 1) => {
                let words = "EXECABORT Transaction discarded because of previous errors: transactions are not served";
                Err(Reply::Error(words.into()))
            }
            (b"DISCARD", Some(_), 1) => Err(Reply::OK),
            (b"EXEC" | b"DISCARD", None, 1) => {
                Err(Reply::error(format!("{} without MULTI", String::from_utf8_lossy(&name))))
            }
            (b"MULTI" | b"EXEC" | b"DISCARD", inside, _) => {
                self.transaction = inside;
                let name = String::from_utf8_lossy(&name).to_ascii_lowercase();
                Err(match (inside, words.len()) {
                    (Some(_), 1) => Reply::error("MULTI calls can not be nested"),
                    _ => Reply::error(format!("wrong number of arguments for '{name}' command")),
                })
            }
            (_, Some(before), _) => {
                self.transaction = Some(before + 1);
                Err(Reply::error(
                    "transactions are not served: keys live on different stores, and each write counts by itself; \
                     EXEC or DISCARD ends this one, of which nothing is done",
                ))
            }
            (_, None, _) => parse(words, now_ms),
        }
    }
}

/// Reads a command; `Err`: it is answered so.
fn parse(words: Words, now_ms: u64) -> Result<Command, Reply> {
    let Some(name) = words.first() else { return Err(Reply::error("no command")) };
    let Some(entry) = table::find(name) else { return Err(unknown(name)) };
    if !entry.takes(words.len()) {
        return Err(Reply::error(format!("wrong number of arguments for '{}' command", entry.name)));
    }
    let mut words = words.into_iter();
    words.next();
    let rest: Words = words.collect();
    match entry.name {
        "scan" => Ok(Command::Scan(scan(&rest)?)),
        "dbsize" => Ok(Command::Size),
        name if entry.has_keys() => asked(name, rest, now_ms).map(Command::Map),
        name => Ok(Command::Session(name, rest)),
    }
}

fn unknown(name: &[u8]) -> Reply {
    let shown = name[..name.len().min(64)].escape_ascii().to_string();
    match table::refusal(name) {
        Some(why) => Reply::error(format!("{} is not served: {why}", shown.to_ascii_uppercase())),
        None => Reply::error(format!(
            "unknown command '{shown}': this is Vasto, which keeps strings and numbers; COMMAND LIST tells what it serves"
        )),
    }
}

fn many(ops: Vec<Op>, touch: Touch, answer: Answer) -> Result<Asked, Reply> {
    Ok(Asked { ops, shape: Shape { touch, answer } })
}

fn one(op: Op, touch: Touch, answer: Answer) -> Result<Asked, Reply> {
    many(vec![op], touch, answer)
}

fn asked(name: &'static str, rest: Words, now_ms: u64) -> Result<Asked, Reply> {
    let read = |rest: Words, answer| one(Op::head(first(rest)), Touch::Read, answer);
    let before = |op: Op| op.with(Options::new().returning(Returning::Before).head());
    match name {
        "get" => one(Op::get(first(rest)), Touch::Read, Answer::Value),
        "mget" => many(rest.into_iter().map(Op::get).collect(), Touch::Read, Answer::Values),
        "getrange" | "substr" => {
            let (start, end) = (integer(&rest[1])?, integer(&rest[2])?);
            one(Op::get(first(rest)), Touch::Read, Answer::Range(start, end))
        }
        "strlen" => read(rest, Answer::Length),
        "type" => read(rest, Answer::Type),
        "ttl" => read(rest, Answer::Expiry { absolute: false, seconds: true }),
        "pttl" => read(rest, Answer::Expiry { absolute: false, seconds: false }),
        "expiretime" => read(rest, Answer::Expiry { absolute: true, seconds: true }),
        "pexpiretime" => read(rest, Answer::Expiry { absolute: true, seconds: false }),
        "exists" | "touch" => many(rest.into_iter().map(Op::head).collect(), Touch::Read, Answer::Count),
        "set" => set(rest, now_ms),
        "setex" | "psetex" => {
            let [key, time, value] = three(rest);
            let unit = if name == "setex" { 1000 } else { 1 };
            let ttl = ttl(name, &time, unit, Since::Now, now_ms)?.ok_or_else(|| bad_time(name))?;
            one(Op::put(key, number::data(value)).with(Options::new().ttl(ttl)), Touch::Write, Answer::Ok)
        }
        "getset" => {
            let mut rest = rest.into_iter();
            let (key, value) = (rest.next().unwrap_or_default(), rest.next().unwrap_or_default());
            let options = Options::new().returning(Returning::Before);
            one(Op::put(key, number::data(value)).with(options), Touch::Write, Answer::Value)
        }
        "mset" => {
            if !rest.len().is_multiple_of(2) {
                return Err(Reply::error("wrong number of arguments for 'mset' command"));
            }
            // Of a key that is named twice the last value stays.
            let mut seen = HashSet::new();
            let pairs = rest.chunks_exact(2).rev().filter(|pair| seen.insert(pair[0].clone()));
            let ops = pairs.map(|pair| Op::put(pair[0].clone(), number::data(pair[1].clone()))).collect();
            many(ops, Touch::Write, Answer::Ok)
        }
        "del" | "unlink" => {
            let mut seen = HashSet::new();
            let keys = rest.into_iter().filter(|key| seen.insert(key.clone()));
            let ops = keys.map(|key| before(Op::delete(key))).collect();
            many(ops, Touch::Write, Answer::Count)
        }
        "getdel" => {
            let options = Options::new().returning(Returning::Before);
            one(Op::delete(first(rest)).with(options), Touch::Write, Answer::Value)
        }
        "getex" => getex(rest, now_ms),
        "append" => {
            let mut rest = rest.into_iter();
            let (key, bytes) = (rest.next().unwrap_or_default(), rest.next().unwrap_or_default());
            let options = Options::new().returning(Returning::After).head();
            one(Op::append(key, bytes).with(options), Touch::Write, Answer::Length)
        }
        "expire" | "pexpire" | "expireat" | "pexpireat" => {
            let unit = if name.starts_with('p') { 1 } else { 1000 };
            let since = if name.ends_with("at") { Since::Epoch } else { Since::Now };
            let ttl = ttl(name, &rest[1], unit, since, now_ms)?;
            if let Some(option) = rest.get(2) {
                return Err(match option.to_ascii_uppercase().as_slice() {
                    b"NX" | b"XX" | b"GT" | b"LT" => Reply::error(format!(
                        "{} with {} is not served: what is there may differ from replica to replica, and so would what \
                         it is compared with",
                        name.to_ascii_uppercase(),
                        String::from_utf8_lossy(option).to_ascii_uppercase()
                    )),
                    _ => Reply::error(format!("Unsupported option {}", option.escape_ascii())),
                });
            }
            let key = first(rest);
            let op = if ttl.is_some() { Op::expire(key, ttl) } else { Op::delete(key) };
            one(before(op), Touch::Write, Answer::Count)
        }
        "persist" => one(before(Op::expire(first(rest), None)), Touch::Write, Answer::Ended),
        "incr" => add(rest, 1),
        "decr" => add(rest, -1),
        "incrby" => {
            let by = integer(&rest[1])?;
            add(rest, by)
        }
        "decrby" => {
            let by = integer(&rest[1])?.checked_neg().ok_or_else(|| Reply::error("decrement would overflow"))?;
            add(rest, by)
        }
        "incrbyfloat" => {
            let by = std::str::from_utf8(&rest[1]).ok().and_then(|text| text.parse::<f64>().ok());
            let by = by.filter(|by| !by.is_nan()).ok_or_else(|| Reply::error("value is not a valid float"))?;
            if by.is_infinite() {
                return Err(Reply::error("increment would produce NaN or Infinity"));
            }
            let options = Options::new().returning(Returning::After);
            one(Op::add(first(rest), by).with(options), Touch::Add, Answer::Float)
        }
        other => Err(unknown(other.as_bytes())),
    }
}

fn add(rest: Words, by: i64) -> Result<Asked, Reply> {
    if by.unsigned_abs() > EXACT {
        return Err(Reply::error(NOT_AN_INTEGER));
    }
    let options = Options::new().returning(Returning::After);
    let op = Op::add(first(rest), by as f64).with(options);
    one(op, Touch::Add, Answer::Integer)
}

/// How a command says when a key is to end.
enum Ending {
    /// After this long; none: it has ended.
    In(Option<Duration>),
    /// As it does now.
    Kept,
    Never,
}

/// One of EX, PX, EXAT, PXAT with its number, KEEPTTL, PERSIST; `None`: another word.
fn ending(
    command: &str,
    word: &[u8],
    words: &mut std::vec::IntoIter<Bytes>,
    now_ms: u64,
) -> Result<Option<Ending>, Reply> {
    let (unit, since) = match word {
        b"EX" => (1000, Since::Now),
        b"PX" => (1, Since::Now),
        b"EXAT" => (1000, Since::Epoch),
        b"PXAT" => (1, Since::Epoch),
        b"KEEPTTL" => return Ok(Some(Ending::Kept)),
        b"PERSIST" => return Ok(Some(Ending::Never)),
        _ => return Ok(None),
    };
    let time = words.next().ok_or_else(|| Reply::error(SYNTAX))?;
    if integer(&time)? <= 0 {
        return Err(bad_time(command));
    }
    Ok(Some(Ending::In(ttl(command, &time, unit, since, now_ms)?)))
}

fn set(rest: Words, now_ms: u64) -> Result<Asked, Reply> {
    let mut words = rest.into_iter();
    let (key, value) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut end, mut said, mut get) = (None, Vec::new(), false);
    while let Some(word) = words.next() {
        let word = word.to_ascii_uppercase();
        match word.as_slice() {
            b"GET" => get = true,
            b"NX" | b"XX" => {
                return Err(Reply::error(format!(
                    "SET with {} is not served: two clients could both be told yes, on different replicas; an eventually \
                     consistent store can't promise it",
                    String::from_utf8_lossy(&word)
                )));
            }
            option => match ending("set", option, &mut words, now_ms)? {
                // The same one may come again; the last counts.
                Some(ending) if (end.is_none() || said == word) && !matches!(ending, Ending::Never) => {
                    (end, said) = (Some(ending), word);
                }
                _ => return Err(Reply::error(SYNTAX)),
            },
        }
    }
    let mut options = Options::new();
    if get {
        options = options.returning(Returning::Before);
    }
    let op = match end {
        None | Some(Ending::Never) => Op::put(key, number::data(value)).with(options),
        Some(Ending::Kept) => Op::put(key, number::data(value)).with(options.keep_ttl()),
        Some(Ending::In(Some(ttl))) => Op::put(key, number::data(value)).with(options.ttl(ttl)),
        // It has ended already.
        Some(Ending::In(None)) => Op::delete(key).with(options),
    };
    let answer = if get { Answer::Value } else { Answer::Ok };
    one(op, Touch::Write, answer)
}

fn getex(rest: Words, now_ms: u64) -> Result<Asked, Reply> {
    let mut words = rest.into_iter();
    let key = words.next().unwrap_or_default();
    let options = Options::new().returning(Returning::Before);
    let (mut end, mut said) = (None, Vec::new());
    while let Some(word) = words.next() {
        let word = word.to_ascii_uppercase();
        match ending("getex", &word, &mut words, now_ms)? {
            Some(ending) if (end.is_none() || said == word) && !matches!(ending, Ending::Kept) => {
                (end, said) = (Some(ending), word);
            }
            _ => return Err(Reply::error(SYNTAX)),
        }
    }
    let (op, touch) = match end {
        None | Some(Ending::Kept) => (Op::get(key), Touch::Read),
        Some(Ending::Never) => (Op::expire(key, None).with(options), Touch::Write),
        Some(Ending::In(Some(ttl))) => (Op::expire(key, Some(ttl)).with(options), Touch::Write),
        Some(Ending::In(None)) => (Op::delete(key).with(options), Touch::Write),
    };
    one(op, touch, Answer::Value)
}

fn scan(rest: &[Bytes]) -> Result<Scan, Reply> {
    let cursor = text(&rest[0]).and_then(|text| text.parse().ok()).ok_or_else(|| Reply::error("invalid cursor"))?;
    let mut scan = Scan { cursor, pattern: None, count: 10, none: false };
    for pair in rest[1..].chunks(2) {
        let [word, value] = pair else { return Err(Reply::error(SYNTAX)) };
        match word.to_ascii_uppercase().as_slice() {
            b"MATCH" if value.len() > MAX_PATTERN => {
                return Err(Reply::error(format!("the pattern has more than {MAX_PATTERN} bytes")));
            }
            b"MATCH" => scan.pattern = Some(value.clone()),
            b"COUNT" => {
                let count = integer(value)?;
                if count < 1 {
                    return Err(Reply::error(SYNTAX));
                }
                scan.count = (count as u64).min(MAX_COUNT);
            }
            b"TYPE" => scan.none = !value.eq_ignore_ascii_case(b"string"),
            _ => return Err(Reply::error(SYNTAX)),
        }
    }
    Ok(scan)
}

/// What a time is counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    Now,
    Epoch,
}

/// How long until `time`, of so many milliseconds a unit; `None`: that is not after now.
fn ttl(command: &str, time: &[u8], unit: i64, since: Since, now_ms: u64) -> Result<Option<Duration>, Reply> {
    let now_ms = i64::try_from(now_ms).unwrap_or(i64::MAX);
    let ms = integer(time)?.checked_mul(unit).ok_or_else(|| bad_time(command))?;
    let left = match since {
        Since::Now if ms.checked_add(now_ms).is_none() => return Err(bad_time(command)),
        Since::Now => ms,
        Since::Epoch => ms.saturating_sub(now_ms),
    };
    Ok(u64::try_from(left).ok().filter(|left| *left > 0).map(Duration::from_millis))
}

fn bad_time(command: &str) -> Reply {
    Reply::error(format!("invalid expire time in '{command}' command"))
}

fn text(word: &[u8]) -> Option<&str> {
    std::str::from_utf8(word).ok()
}

/// A whole number in its usual form.
fn integer(word: &[u8]) -> Result<i64, Reply> {
    let digits = word.strip_prefix(b"-").unwrap_or(word);
    // As servers in C read it: one form for each number.
    let usual = word == b"0" || digits.first().is_some_and(|first| (b'1'..=b'9').contains(first));
    let number = text(word).filter(|_| usual).and_then(|text| text.parse().ok());
    number.ok_or_else(|| Reply::error(NOT_AN_INTEGER))
}

fn first(words: Words) -> Bytes {
    words.into_iter().next().unwrap_or_default()
}

fn three(words: Words) -> [Bytes; 3] {
    let mut words = words.into_iter();
    std::array::from_fn(|_| words.next().unwrap_or_default())
}

impl Shape {
    /// Whether values may come as the answer, of whatever size.
    pub(super) fn holds_values(self) -> bool {
        matches!(self.answer, Answer::Value | Answer::Values | Answer::Range(..))
    }

    /// The reply, of the outcomes of all its operations in their order.
    pub(super) fn reply(self, outcomes: impl Iterator<Item = Result<Outcome, Error>>, now_ms: u64) -> Reply {
        let (mut done, mut count, mut found, mut failed) = (0, 0, 0, None);
        let (mut values, mut value) = (Vec::new(), None);
        for outcome in outcomes {
            count += 1;
            match outcome {
                Ok(outcome) => {
                    done += 1;
                    value = outcome.value();
                    found += i64::from(value.is_some());
                    if self.answer == Answer::Values {
                        values.push(value.take());
                    }
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if let Some(error) = failed {
            return self.refused(&error, (done, count));
        }
        match self.answer {
            Answer::Values => Reply::Array(values.into_iter().map(bulk).collect()),
            Answer::Count => Reply::Integer(found),
            Answer::Ok => Reply::OK,
            Answer::Length => Reply::Integer(value.as_ref().map_or(0, length)),
            Answer::Integer => whole(value),
            Answer::Expiry { absolute, seconds } => expiry(value.as_ref(), absolute, seconds, now_ms),
            Answer::Ended => Reply::flag(value.is_some_and(|value| value.expiry_ms.is_some())),
            Answer::Type => Reply::Simple(if value.is_some() { "string" } else { "none" }),
            Answer::Range(start, end) => {
                let bytes = value.map_or_else(Bytes::new, |value| number::bytes(value.data));
                Reply::Bulk(range(&bytes, start, end))
            }
            Answer::Value | Answer::Float => bulk(value),
        }
    }

    /// The reply where one operation of `count` failed so, and `done` did not.
    fn refused(self, error: &Error, (done, count): (usize, usize)) -> Reply {
        match (error, self.answer) {
            (Error::Mismatch(_), Answer::Integer) => return Reply::error(NOT_AN_INTEGER),
            (Error::Mismatch(_), Answer::Float) => return Reply::error("value is not a valid float"),
            _ => {}
        }
        match refused(error) {
            Reply::Error(words) if count > 1 && self.touch != Touch::Read => {
                Reply::Error(format!("{words} ({done} of the {count} keys were done)"))
            }
            reply => reply,
        }
    }
}

/// The reply that says why something was not done. What may safely be tried again has the code TRYAGAIN; what
/// may have been done or not, and would count twice, UNKNOWN.
pub(super) fn refused(error: &Error) -> Reply {
    let code = match error.code() {
        Code::Mismatch => "WRONGTYPE",
        Code::Overloaded | Code::Unavailable => "TRYAGAIN",
        Code::NoSpace => "OOM",
        Code::Unknown => "UNKNOWN",
        Code::Deadline => "TIMEOUT",
        Code::Missing | Code::Invalid => "ERR",
    };
    Reply::Error(format!("{code} {error}"))
}

fn bulk(value: Option<Value>) -> Reply {
    match value {
        None => Reply::Null,
        Some(Value { data: Data::Bytes(bytes), size, .. }) if bytes.len() as u64 != size => Reply::error(format!(
            "the key held {size} bytes, by appends through several stores, which is more than one answer has"
        )),
        Some(value) => Reply::Bulk(number::bytes(value.data)),
    }
}

/// Bytes of a value as it is shown.
fn length(value: &Value) -> i64 {
    match value.data {
        Data::Number(number) => number::show(number).len() as i64,
        Data::Bytes(_) => i64::try_from(value.size).unwrap_or(i64::MAX),
    }
}

/// A number as an integer; one that isn't whole (another command made it so) as it is.
fn whole(value: Option<Value>) -> Reply {
    match value.map(|value| value.data) {
        Some(Data::Number(number)) if number.fract() == 0.0 && number.abs() < 2f64.powi(63) => {
            Reply::Integer(number as i64)
        }
        Some(data) => Reply::Bulk(number::bytes(data)),
        None => Reply::Null,
    }
}

/// -2: there is nothing; -1: it never ends.
fn expiry(value: Option<&Value>, absolute: bool, seconds: bool, now_ms: u64) -> Reply {
    let Some(value) = value else { return Reply::Integer(-2) };
    let Some(end) = value.expiry_ms else { return Reply::Integer(-1) };
    let ms = if absolute { end } else { end.saturating_sub(now_ms) };
    let time = match seconds {
        false => ms,
        // To the nearest, as others do.
        true => ms.saturating_add(500) / 1000,
    };
    Reply::Integer(i64::try_from(time).unwrap_or(i64::MAX))
}

/// The bytes from `start` to `end`, both with; negative ones count from the end.
fn range(bytes: &Bytes, start: i64, end: i64) -> Bytes {
    let len = bytes.len() as i64;
    let place = |at: i64| if at < 0 { (len.saturating_add(at)).max(0) } else { at };
    if start < 0 && end < 0 && start > end {
        return Bytes::new();
    }
    let (start, end) = (place(start), place(end).min(len - 1));
    if start > end || len == 0 { Bytes::new() } else { bytes.slice(start as usize..=end as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_client::Stamp;

    const NOW: u64 = 1_700_000_000_000;

    fn read(line: &str) -> Result<Command, Reply> {
        parse(line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect(), NOW)
    }

    fn ops(line: &str) -> Vec<Op> {
        match read(line) {
            Ok(Command::Map(asked)) => asked.ops,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn error(line: &str) -> String {
        match read(line) {
            Err(Reply::Error(words)) => words,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn value(data: impl Into<Data>, expiry_ms: Option<u64>) -> Value {
        let data = data.into();
        let size = match &data {
            Data::Bytes(bytes) => bytes.len() as u64,
            Data::Number(_) => 8,
        };
        Value { data, expiry_ms, stamp: Stamp::default(), size }
    }

    #[test]
    fn sets_with_all_that_may_follow() {
        let put = |options: Options| vec![Op::put("k", "v").with(options)];
        let seconds = Duration::from_secs;
        for (line, wanted) in [
            ("SET k v", put(Options::new())),
            ("set k v ex 10", put(Options::new().ttl(seconds(10)))),
            ("set k v PX 1500", put(Options::new().ttl(Duration::from_millis(1500)))),
            ("set k v EXAT 1700000005", put(Options::new().ttl(seconds(5)))),
            (
                "set k v PXAT 1700000000250 GET",
                put(Options::new().ttl(Duration::from_millis(250)).returning(Returning::Before)),
            ),
            ("set k v EX 7 EX 10", put(Options::new().ttl(seconds(10)))),
            ("set k v KEEPTTL", put(Options::new().keep_ttl())),
            ("setex k 5 v", put(Options::new().ttl(seconds(5)))),
            ("set k v EXAT 5", vec![Op::delete("k").with(Options::new())]),
            ("set k 10", vec![Op::put("k", 10.0)]),
            ("mset a 1 b x a y", vec![Op::put("a", "y"), Op::put("b", "x")]),
        ] {
            assert_eq!(ops(line), wanted, "{line}");
        }
        for (line, words) in [
            ("set k v EX 0", "invalid expire time in 'set' command"),
            ("set k v EX x", NOT_AN_INTEGER),
            ("set k v EX 1 PX 1", SYNTAX),
            ("set k v EX", SYNTAX),
            ("set k v PERSIST", SYNTAX),
            ("set k v NX", "can't promise"),
            ("setnx k v", "can't promise NX"),
            ("set k v EX 9223372036854775807", "invalid expire time"),
            ("setex k 0 v", "invalid expire time in 'setex' command"),
            ("set k", "wrong number of arguments for 'set' command"),
            ("mset a 1 b", "wrong number of arguments for 'mset' command"),
        ] {
            assert!(error(line).contains(words), "{line}: {}", error(line));
        }
    }

    #[test]
    fn numbers_times_and_what_is_not_served() {
        assert_eq!(ops("incrby k -5"), vec![Op::add("k", -5.0).with(Options::new().returning(Returning::After))]);
        assert_eq!(ops("decrby k -5"), ops("incrby k 5"));
        for (line, words) in [
            ("incrby k 1.5", NOT_AN_INTEGER),
            ("incrby k +1", NOT_AN_INTEGER),
            ("incrby k 9223372036854775807", NOT_AN_INTEGER),
            ("decrby k -9223372036854775808", "overflow"),
            ("incrbyfloat k inf", "would produce NaN or Infinity"),
            ("incrbyfloat k nan", "not a valid float"),
            ("incrby k 007", NOT_AN_INTEGER),
            ("incrby k -9223372036854775808", NOT_AN_INTEGER),
            ("expire k -0", NOT_AN_INTEGER),
            ("expire k soon", NOT_AN_INTEGER),
            ("expire k 1 NX", "EXPIRE with NX is not served"),
            ("expire k 1 SOON", "Unsupported option SOON"),
            ("expire k 9223372036854775", "invalid expire time in 'expire' command"),
            ("lpush k v", "unknown command 'lpush'"),
            ("watch k", "no transactions"),
            ("keys *", "use SCAN"),
            ("scan x", "invalid cursor"),
            ("scan 0 COUNT 0", SYNTAX),
            ("scan 0 MATCH", SYNTAX),
        ] {
            assert!(error(line).contains(words), "{line}: {}", error(line));
        }
        let head = Options::new().returning(Returning::Before).head();
        assert_eq!(ops("expire k -1"), vec![Op::delete("k").with(head.clone())]);
        assert_eq!(ops("pexpireat k 1700000000007"), vec![Op::expire("k", Some(Duration::from_millis(7))).with(head)]);
        let scan = Scan { cursor: 7, pattern: Some("a*".into()), count: MAX_COUNT, none: false };
        assert_eq!(read("SCAN 7 match a* count 99999 type string"), Ok(Command::Scan(scan)));
    }

    #[test]
    fn nothing_of_a_transaction_is_done() {
        let mut parser = Parser::default();
        let mut say = |line: &str| {
            let words = line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
            match parser.parse(words, NOW) {
                Ok(_) => "done".to_owned(),
                Err(Reply::Error(words)) => words,
                Err(Reply::Simple(words)) => words.to_owned(),
                Err(reply) => format!("{reply:?}"),
            }
        };
        for (end, answer) in [("EXEC", "EXECABORT"), ("discard", "OK"), ("RESET", "done")] {
            assert_eq!(say("multi"), "OK");
            assert!(say("SET a 1").contains("transactions are not served"));
            assert!(say("multi").contains("nested"));
            assert!(say("exec now").contains("wrong number"));
            assert!(say("INCR a").contains("transactions are not served"));
            assert!(say(end).starts_with(answer), "{end}");
            assert_eq!(say("SET a 1"), "done", "after {end}");
        }
        assert!(say("EXEC").contains("EXEC without MULTI"));
        assert_eq!((say("MULTI"), say("EXEC")), ("OK".to_owned(), "Array([])".to_owned()));
    }

    #[test]
    fn outcomes_become_replies() {
        let reply = |line: &str, outcomes: Vec<Result<Outcome, Error>>| match read(line) {
            Ok(Command::Map(asked)) => asked.shape.reply(outcomes.into_iter(), NOW),
            other => panic!("{other:?}"),
        };
        let found = |data: Data, expiry| Ok(Outcome::Found(value(data, expiry)));
        let returned = |value| Ok(Outcome::Returned(Stamp::default(), value));
        let refusal = || Err(Error::Mismatch("the key holds bytes".into()));
        for (line, outcomes, wanted) in [
            ("get k", vec![found("v".into(), None)], Reply::text("v")),
            ("get k", vec![Ok(Outcome::Nothing)], Reply::Null),
            ("get k", vec![found(2.5.into(), None)], Reply::text("2.5")),
            (
                "mget a b",
                vec![Ok(Outcome::Nothing), found(1.0.into(), None)],
                Reply::Array(vec![Reply::Null, Reply::text("1")]),
            ),
            ("set k v", vec![Ok(Outcome::Written(Stamp::default()))], Reply::OK),
            ("set k v GET", vec![returned(None)], Reply::Null),
            ("incr k", vec![returned(Some(value(7.0, None)))], Reply::Integer(7)),
            ("incr k", vec![returned(Some(value(7.5, None)))], Reply::text("7.5")),
            ("incr k", vec![refusal()], Reply::error(NOT_AN_INTEGER)),
            ("incrbyfloat k 1", vec![returned(Some(value(7.5, None)))], Reply::text("7.5")),
            ("append k v", vec![refusal()], Reply::Error("WRONGTYPE the key holds bytes".into())),
            ("del a b", vec![returned(None), returned(Some(value("v", None)))], Reply::Integer(1)),
            (
                "mset a 1 b 2",
                vec![refusal(), Ok(Outcome::Written(Stamp::default()))],
                Reply::Error("WRONGTYPE the key holds bytes (1 of the 2 keys were done)".into()),
            ),
            ("strlen k", vec![found(2.5.into(), None)], Reply::Integer(3)),
            ("strlen k", vec![Ok(Outcome::Nothing)], Reply::Integer(0)),
            ("ttl k", vec![found("v".into(), Some(NOW + 9_600))], Reply::Integer(10)),
            ("pttl k", vec![found("v".into(), Some(NOW + 9_600))], Reply::Integer(9_600)),
            ("expiretime k", vec![found("v".into(), Some(NOW + 9_600))], Reply::Integer(1_700_000_010)),
            ("ttl k", vec![found("v".into(), None)], Reply::Integer(-1)),
            ("ttl k", vec![Ok(Outcome::Nothing)], Reply::Integer(-2)),
            ("persist k", vec![returned(Some(value("v", Some(NOW + 1))))], Reply::Integer(1)),
            ("persist k", vec![returned(Some(value("v", None)))], Reply::Integer(0)),
            ("type k", vec![Ok(Outcome::Nothing)], Reply::Simple("none")),
            ("getrange k -3 -1", vec![found("This is a string".into(), None)], Reply::text("ing")),
            ("getrange k 0 -1", vec![found("abc".into(), None)], Reply::text("abc")),
            ("getrange k 10 100", vec![found("abc".into(), None)], Reply::text("")),
            ("getrange k 0 0", vec![Ok(Outcome::Nothing)], Reply::text("")),
        ] {
            assert_eq!(reply(line, outcomes), wanted, "{line}");
        }
    }
}
