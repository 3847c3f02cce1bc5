//! What is wrong with a Keyspace: every problem at once, each with its place,
//! what was found there, and what would be right.

use std::fmt;

/// Why Keyspaces were refused. Its text has one line per problem.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    /// What is wrong; never empty.
    pub problems: Vec<Problem>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

/// One thing that is wrong, and what would be right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problem {
    /// The file it came from; none for a Keyspace that came otherwise.
    pub source: Option<String>,
    /// Which document of the file, from 1.
    pub document: Option<usize>,
    /// The Keyspace's name, if it has one.
    pub keyspace: Option<String>,
    /// The field's path, such as `spec.shards`; empty: the whole document or file.
    pub field: String,
    /// What was found, as in "is 0", "is missing", "is not a field".
    pub found: String,
    /// What would be right.
    pub wanted: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{source}: ")?;
        }
        match (self.document, &self.keyspace) {
            (Some(n), Some(name)) => write!(f, "document {n}, keyspace {name}: ")?,
            (Some(n), None) => write!(f, "document {n}: ")?,
            (None, Some(name)) => write!(f, "keyspace {name}: ")?,
            (None, None) => {}
        }
        if !self.field.is_empty() {
            write!(f, "{} ", self.field)?;
        }
        write!(f, "{}: {}", self.found, self.wanted)
    }
}

impl Error {
    /// What should have been this crate's own JSON isn't.
    pub(crate) fn unreadable(field: &str, error: &serde_json::Error) -> Self {
        Self { problems: vec![Problem::unreadable(field, error)] }
    }

    pub(crate) fn unless_empty(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self { problems }) }
    }
}

impl Problem {
    pub(crate) fn unreadable(field: &str, error: &serde_json::Error) -> Self {
        Self {
            field: field.to_owned(),
            found: format!("can't be read ({error})"),
            wanted: "must be as this version of vasto writes it".to_owned(),
            ..Self::default()
        }
    }
}
