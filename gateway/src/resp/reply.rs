//! What is answered, and how the protocol's two versions write it down.

use bytes::{BufMut, Bytes, BytesMut};

/// The protocol's version that a client has asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Version {
    /// As every client begins.
    #[default]
    Two,
    /// After `HELLO 3`.
    Three,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Reply {
    /// `+OK` and the like: one line.
    Simple(&'static str),
    /// A code such as `ERR`, then words.
    Error(String),
    Integer(i64),
    Bulk(Bytes),
    Null,
    Array(Vec<Reply>),
    /// In version 2 an array of keys and values in turn.
    Map(Vec<(Reply, Reply)>),
}

impl Reply {
    pub(super) const OK: Self = Self::Simple("OK");

    /// The general kind of error.
    pub(super) fn error(words: impl std::fmt::Display) -> Self {
        Self::Error(format!("ERR {words}"))
    }

    /// Text as a bulk string.
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Bulk(text.into().into())
    }

    /// 1 or 0.
    pub(super) fn flag(yes: bool) -> Self {
        Self::Integer(yes.into())
    }

    /// Writes it down.
    pub(super) fn encode(&self, version: Version, out: &mut BytesMut) {
        match self {
            Self::Simple(line) => put_line(out, b'+', line.as_bytes()),
            Self::Error(words) => {
                // One line whatever it quotes.
                let line: Vec<u8> = words.bytes().map(|b| if b == b'\r' || b == b'\n' { b' ' } else { b }).collect();
                put_line(out, b'-', &line);
            }
            Self::Integer(number) => put_number(out, b':', *number),
            Self::Bulk(bytes) => {
                put_number(out, b'$', bytes.len());
                out.put_slice(bytes);
                out.put_slice(b"\r\n");
            }
            Self::Null if version == Version::Two => out.put_slice(b"$-1\r\n"),
            Self::Null => out.put_slice(b"_\r\n"),
            Self::Array(replies) => {
                put_number(out, b'*', replies.len());
                replies.iter().for_each(|reply| reply.encode(version, out));
            }
            Self::Map(pairs) => {
                match version {
                    Version::Two => put_number(out, b'*', pairs.len() * 2),
                    Version::Three => put_number(out, b'%', pairs.len()),
                }
                for (key, value) in pairs {
                    key.encode(version, out);
                    value.encode(version, out);
                }
            }
        }
    }
}

fn put_number(out: &mut BytesMut, kind: u8, number: impl itoa::Integer) {
    put_line(out, kind, itoa::Buffer::new().format(number).as_bytes());
}

fn put_line(out: &mut BytesMut, kind: u8, line: &[u8]) {
    out.put_u8(kind);
    out.put_slice(line);
    out.put_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions() {
        let reply = Reply::Map(vec![
            (Reply::text("a"), Reply::Array(vec![Reply::Null, Reply::Integer(-1)])),
            (Reply::OK, Reply::error("two\r\nlines")),
        ]);
        let encode = |version| {
            let mut out = BytesMut::new();
            reply.encode(version, &mut out);
            String::from_utf8(out.to_vec()).unwrap()
        };
        let rest = |null: &str| format!("$1\r\na\r\n*2\r\n{null}:-1\r\n+OK\r\n-ERR two  lines\r\n");
        assert_eq!(encode(Version::Two), format!("*4\r\n{}", rest("$-1\r\n")));
        assert_eq!(encode(Version::Three), format!("%2\r\n{}", rest("_\r\n")));
    }
}
