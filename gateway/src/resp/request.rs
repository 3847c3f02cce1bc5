//! Takes commands out of what a client sends: arrays of bulk strings, or a line of words.
//!
//! Our own, as crates for this protocol read what servers answer: they recurse into nested arrays, know no
//! bounds and begin anew with each byte that comes. Here nothing is made room for before it has come.

use bytes::{Buf, Bytes, BytesMut};

/// The longest argument: a value of 8 MiB, and some room to say in words that one is too long.
const MAX_BULK: usize = 16 << 20;
/// The most arguments of a command.
const MAX_WORDS: usize = 1 << 20;
/// The longest line: an inline command, or the head of an array or of a bulk string.
const MAX_LINE: usize = 64 << 10;
/// The most bytes of a command, with what each argument takes besides its own.
pub(super) const MAX_REQUEST: usize = 64 << 20;
/// What an argument takes besides its bytes.
const WORD_OVERHEAD: usize = 64;

/// A command's name and its arguments; never empty.
pub(super) type Words = Vec<Bytes>;

/// Why what came is no command. The connection can't go on: where the next one begins is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Protocol error: {0}")]
pub(super) struct Malformed(String);

impl Malformed {
    pub(super) fn of(why: &str) -> Self {
        Self(why.to_owned())
    }
}

fn malformed<T>(why: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(why.into()))
}

/// Where in a command the reader is.
#[derive(Debug, Default)]
pub(super) struct Reader {
    words: Words,
    /// Arguments that are still to come.
    left: usize,
    /// The length of the argument that is coming.
    bulk: Option<usize>,
    /// What `words` takes.
    taken: usize,
}

impl Reader {
    /// Whether a command has begun and not ended.
    pub(super) fn is_inside(&self) -> bool {
        self.left > 0
    }

    /// What the command that has begun takes so far.
    pub(super) fn taken(&self) -> usize {
        self.taken
    }

    /// The next whole command in the buffer, if there is one.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Words>, Malformed> {
        loop {
            if self.left == 0 {
                match buffer.first() {
                    None => return Ok(None),
                    Some(b'*') => {
                        let Some(line) = line(buffer, "too big mbulk count string")? else { return Ok(None) };
                        let count = number(&buffer[1..line.end]).filter(|n| *n <= MAX_WORDS as i64);
                        let Some(count) = count else { return malformed("invalid multibulk length") };
                        buffer.advance(line.next);
                        // None at all is no command.
                        self.left = usize::try_from(count).unwrap_or(0);
                        continue;
                    }
                    Some(_) => {
                        let Some(line) = line(buffer, "too big inline request")? else { return Ok(None) };
                        let words = split(&buffer[..line.end]);
                        let Some(words) = words else { return malformed("unbalanced quotes in request") };
                        buffer.advance(line.next);
                        if words.is_empty() {
                            continue;
                        }
                        return Ok(Some(words));
                    }
                }
            }
            let length = match self.bulk {
                Some(length) => length,
                None => {
                    match buffer.first() {
                        None => return Ok(None),
                        Some(b'$') => {}
                        Some(other) => {
                            return malformed(format!("expected '$', got '{}'", other.escape_ascii()));
                        }
                    }
                    let Some(line) = line(buffer, "too big bulk count string")? else { return Ok(None) };
                    let length = number(&buffer[1..line.end]).and_then(|n| usize::try_from(n).ok());
                    let Some(length) = length.filter(|n| *n <= MAX_BULK) else {
                        return malformed("invalid bulk length");
                    };
                    if self.taken + length + WORD_OVERHEAD > MAX_REQUEST {
                        return malformed(format!("a command has at most {MAX_REQUEST} bytes"));
                    }
                    buffer.advance(line.next);
                    self.bulk = Some(length);
                    length
                }
            };
            if buffer.len() < length + 2 {
                return Ok(None);
            }
            if &buffer[length..length + 2] != b"\r\n" {
                return malformed("expected CRLF after a bulk string");
            }
            self.words.push(buffer.split_to(length).freeze());
            buffer.advance(2);
            self.bulk = None;
            self.left -= 1;
            self.taken += length + WORD_OVERHEAD;
            if self.left == 0 {
                self.taken = 0;
                return Ok(Some(std::mem::take(&mut self.words)));
            }
        }
    }
}

/// Where the line that a buffer begins with ends, and where the next begins.
struct Line {
    end: usize,
    next: usize,
}

/// The line that the buffer begins with; a shared piece of memory for each would cost more than all of its reading.
fn line(buffer: &[u8], too_long: &str) -> Result<Option<Line>, Malformed> {
    let Some(end) = buffer.iter().take(MAX_LINE).position(|byte| *byte == b'\n') else {
        return if buffer.len() >= MAX_LINE { malformed(too_long) } else { Ok(None) };
    };
    let next = end + 1;
    let end = if buffer[..end].ends_with(b"\r") { end - 1 } else { end };
    Ok(Some(Line { end, next }))
}

fn number(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The words of a line; in double quotes with the escapes that redis-cli knows, in single quotes as they are.
/// None: a quote does not end, or something follows right behind it.
fn split(line: &[u8]) -> Option<Words> {
    let mut words = Vec::new();
    let mut rest = line.iter().copied().peekable();
    loop {
        while rest.next_if(u8::is_ascii_whitespace).is_some() {}
        let Some(first) = rest.peek().copied() else { return Some(words) };
        let mut word = Vec::new();
        if first == b'"' || first == b'\'' {
            rest.next();
            loop {
                match rest.next()? {
                    byte if byte == first => break,
                    b'\\' if first == b'\'' => match rest.next_if_eq(&b'\'') {
                        Some(quote) => word.push(quote),
                        None => word.push(b'\\'),
                    },
                    b'\\' => word.push(match rest.next()? {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'b' => 8,
                        b'a' => 7,
                        b'x' => hex(&mut rest).unwrap_or(b'x'),
                        other => other,
                    }),
                    byte => word.push(byte),
                }
            }
            if rest.peek().is_some_and(|byte| !byte.is_ascii_whitespace()) {
                return None;
            }
        } else {
            while let Some(byte) = rest.next_if(|byte| !byte.is_ascii_whitespace()) {
                word.push(byte);
            }
        }
        words.push(word.into());
    }
}

/// The byte that two hex digits give; nothing is taken where there are none.
fn hex(rest: &mut std::iter::Peekable<impl Iterator<Item = u8> + Clone>) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut ahead = rest.clone();
    let (high, low) = (digit(ahead.next()?)?, digit(ahead.next()?)?);
    *rest = ahead;
    u8::try_from(high * 16 + low).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(reader: &mut Reader, sent: &[u8]) -> Result<Vec<Vec<String>>, Malformed> {
        let mut buffer = BytesMut::from(sent);
        let mut commands = Vec::new();
        while let Some(words) = reader.next(&mut buffer)? {
            commands.push(words.iter().map(|w| String::from_utf8_lossy(w).into_owned()).collect());
        }
        Ok(commands)
    }

    fn read(sent: &str) -> Result<Vec<Vec<String>>, Malformed> {
        all(&mut Reader::default(), sent.as_bytes())
    }

    #[test]
    fn arrays_lines_and_quotes() {
        for (sent, commands) in [
            ("*2\r\n$3\r\nGET\r\n$1\r\na\r\n*1\r\n$4\r\nPING\r\n", vec![vec!["GET", "a"], vec!["PING"]]),
            ("*1\r\n$0\r\n\r\n", vec![vec![""]]),
            ("*0\r\n*-1\r\n\r\n  \r\nPING\r\n", vec![vec!["PING"]]),
            ("set a \"b \\x41\\n\"\nget 'it\\'s'\r\n", vec![vec!["set", "a", "b A\n"], vec!["get", "it's"]]),
            ("*2\r\n$3\r\nGET\r\n", vec![]),
            ("PIN", vec![]),
        ] {
            assert_eq!(read(sent).unwrap(), commands, "{sent:?}");
        }
    }

    #[test]
    fn what_is_no_command_is_said_in_redis_own_words() {
        let long = "x".repeat(MAX_LINE);
        for (sent, words) in [
            ("*9999999999\r\n", "invalid multibulk length"),
            ("*abc\r\n", "invalid multibulk length"),
            ("*1\r\nPING\r\n", "expected '$', got 'P'"),
            ("*1\r\n$-1\r\n", "invalid bulk length"),
            ("*1\r\n$999999999999\r\n", "invalid bulk length"),
            ("*1\r\n$1\r\nabc\r\n", "expected CRLF"),
            ("get \"a\r\n", "unbalanced quotes"),
            ("get \"a\"b\r\n", "unbalanced quotes"),
            (&long, "too big inline request"),
            (&format!("*{long}"), "too big mbulk count string"),
            (&format!("*1\r\n${long}"), "too big bulk count string"),
        ] {
            let error = read(sent).unwrap_err().to_string();
            assert!(error.starts_with("Protocol error: ") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_command_has_a_bound_in_all() {
        let mut reader = Reader::default();
        let one = format!("${MAX_BULK}\r\n{}\r\n", "x".repeat(MAX_BULK));
        assert_eq!(all(&mut reader, b"*9\r\n"), Ok(vec![]));
        for _ in 0..3 {
            assert_eq!(all(&mut reader, one.as_bytes()), Ok(vec![]));
        }
        assert!(reader.taken() > 3 * MAX_BULK);
        assert!(all(&mut reader, one.as_bytes()).unwrap_err().to_string().contains("at most 67108864 bytes"));
    }

    proptest! {
        #[test]
        fn however_it_is_cut_the_same_commands_come(
            commands in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..5), 0..5),
            cuts in prop::collection::vec(1usize..40, 0..20),
        ) {
            let mut sent = Vec::new();
            for words in &commands {
                sent.extend(format!("*{}\r\n", words.len()).bytes());
                for word in words {
                    sent.extend(format!("${}\r\n", word.len()).bytes());
                    sent.extend(word);
                    sent.extend(b"\r\n");
                }
            }
            let (mut reader, mut buffer, mut got) = (Reader::default(), BytesMut::new(), Vec::new());
            let mut rest = &sent[..];
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                buffer.extend_from_slice(now);
                rest = later;
                while let Some(words) = reader.next(&mut buffer).unwrap() {
                    got.push(words.iter().map(|w| w.to_vec()).collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(got, commands);
            prop_assert!(!reader.is_inside());
        }

        #[test]
        fn nothing_that_is_sent_makes_it_panic(sent in prop::collection::vec(any::<u8>(), 0..200)) {
            let (mut reader, mut buffer) = (Reader::default(), BytesMut::from(&sent[..]));
            while let Ok(Some(words)) = reader.next(&mut buffer) {
                prop_assert!(!words.is_empty());
            }
        }
    }
}
