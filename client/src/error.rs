//! What can go wrong for a caller, in words that say what would be right, and
//! a code for each kind so that programs can tell them apart.

use std::fmt::Write;

/// Why an operation was not done, or why nobody can say whether it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The keyspace does not exist, or has been deleted.
    #[error("keyspace {keyspace:?} does not exist; `vasto keyspace list` shows those that do")]
    Missing {
        /// Its name.
        keyspace: String,
    },
    /// The request can never succeed: a limit, an empty key, a bad time.
    #[error("{0}")]
    Invalid(String),
    /// It does not fit what the key holds: a number added to bytes, another partition key.
    #[error("{0}")]
    Mismatch(String),
    /// The store, or this client's queue to it, was full until the deadline. Not executed.
    #[error("{0}; try again later, or with fewer operations at a time")]
    Overloaded(String),
    /// The disks of all stores of the shard are full. Not executed.
    #[error("{0}; make room on the store's disk, or add shards")]
    NoSpace(String),
    /// A merge was sent, and no answer came: it may have been executed. It is
    /// never repeated on its own, since it would then count twice.
    #[error("{0}: whether this was executed is unknown; read the key before repeating it")]
    Unknown(String),
    /// No store took it in time. A merge was not executed; a put or delete
    /// of which an earlier try was cut off may still be seen.
    #[error("{what}: not done in time: {last}")]
    Unavailable {
        /// What was tried.
        what: String,
        /// The last obstacle.
        last: String,
    },
    /// It was sent, and no answer came in time. A put or delete may still be seen.
    #[error("{what}: no answer in time: {last}")]
    Deadline {
        /// What was tried.
        what: String,
        /// The last obstacle.
        last: String,
    },
}

/// The kind of an [`Error`], for exit codes and protocol mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// [`Error::Missing`].
    Missing,
    /// [`Error::Invalid`].
    Invalid,
    /// [`Error::Mismatch`].
    Mismatch,
    /// [`Error::Overloaded`].
    Overloaded,
    /// [`Error::NoSpace`].
    NoSpace,
    /// [`Error::Unknown`].
    Unknown,
    /// [`Error::Unavailable`].
    Unavailable,
    /// [`Error::Deadline`].
    Deadline,
}

impl Error {
    /// Which kind of error this is.
    pub fn code(&self) -> Code {
        match self {
            Self::Missing { .. } => Code::Missing,
            Self::Invalid(_) => Code::Invalid,
            Self::Mismatch(_) => Code::Mismatch,
            Self::Overloaded(_) => Code::Overloaded,
            Self::NoSpace(_) => Code::NoSpace,
            Self::Unknown(_) => Code::Unknown,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::Deadline { .. } => Code::Deadline,
        }
    }
}

/// A status with its causes, which tonic leaves out of its own message.
pub(crate) fn describe(status: &tonic::Status) -> String {
    let mut text = if status.message().is_empty() {
        status.code().description().to_string()
    } else {
        status.message().to_string()
    };
    causes(status, &mut text);
    text
}

/// Why a channel could not be made, with its causes.
pub(crate) fn describe_transport(error: &tonic::transport::Error) -> String {
    let mut text = error.to_string();
    causes(error, &mut text);
    text
}

fn causes(error: &dyn std::error::Error, text: &mut String) {
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.contains(&words) {
            let _ = write!(text, ": {words}");
        }
        cause = next.source();
    }
}

/// A key as people can read it, cut where it is long.
pub(crate) fn show(key: &[u8]) -> String {
    const MOST: usize = 60;
    let cut = &key[..key.len().min(MOST)];
    match std::str::from_utf8(cut) {
        Ok(text) if key.len() <= MOST => format!("{text:?}"),
        _ if key.len() <= MOST => format!("\"{}\"", cut.escape_ascii()),
        _ => format!("\"{}...\" ({} bytes)", cut.escape_ascii(), key.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_shown_short_and_readable() {
        assert_eq!(show("grün".as_bytes()), "\"grün\"");
        assert_eq!(show(&[0xff, b'a']), "\"\\xffa\"");
        let long = show(&[b'x'; 100]);
        assert!(long.ends_with("...\" (100 bytes)"), "{long}");
    }
}
