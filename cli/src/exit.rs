//! Exit codes, and which failure gets which. The list is a promise to scripts.

use std::fmt;
use std::io::ErrorKind;

/// The codes, as `vasto --help` prints them.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  another failure
  2  wrong use of the command line
  3  not found: the key or the keyspace
  4  refused: not valid, over a limit, no room for it, or it does not fit what is there
  5  unavailable: the operator or the stores did not answer in time
  6  unknown: whether an add, append, max or min took place
  7  differences found (check)";

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Ok = 0,
    Failure = 1,
    Usage = 2,
    NotFound = 3,
    Refused = 4,
    Unavailable = 5,
    Unknown = 6,
    Differences = 7,
}

impl From<Code> for std::process::ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// A failure that the command line itself finds, with its code.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) code: Code,
    pub(crate) message: String,
}

impl Fault {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// An `anyhow` error with this code.
pub(crate) fn fault(code: Code, message: impl Into<String>) -> anyhow::Error {
    Fault::new(code, message).into()
}

/// The code for an error: that of the first cause in its chain that has one.
pub(crate) fn code_of(error: &anyhow::Error) -> Code {
    for cause in error.chain() {
        if let Some(fault) = cause.downcast_ref::<Fault>() {
            return fault.code;
        }
        if let Some(error) = cause.downcast_ref::<vasto_client::Error>() {
            return client_code(error.code());
        }
        if let Some(status) = cause.downcast_ref::<tonic::Status>() {
            return status_code(status.code());
        }
        if cause.is::<vasto_crds::Error>() {
            return Code::Refused;
        }
        if let Some(error) = cause.downcast_ref::<vasto_operator::local::Error>() {
            use vasto_operator::local::Error as E;
            return if matches!(error, E::Keyspace(_) | E::Twice { .. }) { Code::Refused } else { Code::Failure };
        }
        // `vasto scan | head` is no failure.
        if cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) {
            return Code::Ok;
        }
    }
    Code::Failure
}

/// The error and its causes in one line; a cause that the text before it repeats is left out.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.trim().split('\n').map(str::trim).collect::<Vec<_>>().join("; ");
        if text.is_empty() || line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

/// The code for an error of the client library.
pub(crate) fn client_code(code: vasto_client::Code) -> Code {
    use vasto_client::Code as C;
    match code {
        C::Missing => Code::NotFound,
        C::Invalid | C::Mismatch | C::NoSpace => Code::Refused,
        C::Unknown => Code::Unknown,
        C::Overloaded | C::Unavailable | C::Deadline => Code::Unavailable,
    }
}

/// The code for a gRPC status.
pub(crate) fn status_code(code: tonic::Code) -> Code {
    use tonic::Code as S;
    match code {
        S::Ok => Code::Ok,
        S::NotFound => Code::NotFound,
        S::InvalidArgument | S::FailedPrecondition | S::AlreadyExists | S::OutOfRange | S::PermissionDenied => {
            Code::Refused
        }
        S::Unavailable | S::DeadlineExceeded | S::ResourceExhausted => Code::Unavailable,
        _ => Code::Failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn the_cause_with_a_code_decides() {
        let error = anyhow::Error::new(Fault::new(Code::NotFound, "no such key")).context("get");
        assert_eq!(code_of(&error), Code::NotFound);
        assert_eq!(one_line(&error), "get: no such key");
        let status = anyhow::Error::new(tonic::Status::invalid_argument("shards is 0"));
        assert_eq!(code_of(&status), Code::Refused);
        assert_eq!(code_of(&anyhow::anyhow!("x")), Code::Failure);
    }

    #[test]
    fn a_repeated_cause_is_said_once() {
        let io = std::io::Error::other("disk on fire");
        let error = Err::<(), _>(io).context("write: disk on fire").unwrap_err();
        assert_eq!(one_line(&error), "write: disk on fire");
    }

    #[test]
    fn a_closed_pipe_is_quiet() {
        let error = anyhow::Error::new(std::io::Error::from(ErrorKind::BrokenPipe)).context("write");
        assert_eq!(code_of(&error), Code::Ok);
    }
}
