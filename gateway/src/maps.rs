//! The keyspaces that have been asked for, each opened once and kept.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use vasto_client::v1::ListRequest;
use vasto_client::{Client, Code, Env, Error, Keyspace};

/// Names that are looked up at once before they are known to exist.
const LOOKUPS: usize = 8;
/// The longest name: a namespace's, a slash and a keyspace's.
const LONGEST: usize = 127;
/// How long the operator has to say which keyspaces there are.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long it is not asked again.
const FRESH: Duration = Duration::from_secs(1);
const ON_KUBERNETES: &str = "on Kubernetes this gateway needs --keyspace, or SELECT with a keyspace's name";

pub(crate) struct Maps {
    env: Env,
    client: Client,
    default: Option<String>,
    open: Mutex<HashMap<String, Keyspace>>,
    lookups: Semaphore,
    /// The names of all keyspaces, and when the operator told them.
    told: Mutex<Option<(Instant, Vec<String>)>>,
}

impl Maps {
    pub(crate) fn new(env: Env, client: Client, default: Option<String>) -> Self {
        Self { env, client, default, open: Mutex::default(), lookups: Semaphore::new(LOOKUPS), told: Mutex::default() }
    }

    /// The keyspace of this name.
    pub(crate) async fn open(&self, name: &str) -> Result<Keyspace, Error> {
        let known = self.kept().get(name).cloned();
        if let Some(known) = known {
            if !known.is_gone() {
                return Ok(known);
            }
            // It may have been made anew since.
            drop(known);
            let again = self.client.keyspace(name).await;
            if again.as_ref().is_err_and(|error| error.code() == Code::Missing) {
                self.kept().remove(name);
            }
            return again;
        }
        if !is_name(name) {
            let words = format!("{:?} is no name of a keyspace", name.chars().take(64).collect::<String>());
            return Err(Error::Invalid(format!("{words}; it has letters, digits and '-', or is namespace/name")));
        }
        let Ok(Ok(_turn)) = tokio::time::timeout(PATIENCE, self.lookups.acquire()).await else {
            return Err(Error::Overloaded(format!("keyspace {name:?}: too many unknown ones are being looked up")));
        };
        // Whoever had a turn before may have looked for the same one.
        let known = self.kept().get(name).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        // By a client that goes with the answer: one keeps for good whatever it was asked for, also what was never there.
        Client::with(self.env.clone(), self.client.operator().to_owned()).keyspace(name).await?;
        let keyspace = self.client.keyspace(name).await?;
        self.kept().insert(name.to_owned(), keyspace.clone());
        Ok(keyspace)
    }

    /// The keyspace of those who have named none.
    pub(crate) async fn default(&self) -> Result<Keyspace, Error> {
        if let Some(name) = &self.default {
            return self.open(name).await;
        }
        let what = "no keyspace is selected".to_owned();
        match self.names().await {
            Ok(names) => match names.as_slice() {
                [only] => self.open(only).await,
                [] => Err(Error::Invalid(format!("{what}, and there is none yet"))),
                some => Err(Error::Invalid(format!("{what}: SELECT one of {}", some.join(", ")))),
            },
            Err(last) => Err(Error::Unavailable { what, last }),
        }
    }

    /// The names of all keyspaces: as they were a moment ago, or when the operator last told them.
    async fn names(&self) -> Result<Vec<String>, String> {
        let known = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, names)) = &known
            && at.elapsed() < FRESH
        {
            return Ok(names.clone());
        }
        match (self.ask().await, known) {
            (Ok(names), _) => {
                let told = Some((Instant::now(), names.clone()));
                *self.told.lock().unwrap_or_else(PoisonError::into_inner) = told;
                Ok(names)
            }
            (Err(_), Some((_, names))) => Ok(names),
            (Err(words), None) => Err(words),
        }
    }

    /// The names of all keyspaces, where the operator tells them.
    async fn ask(&self) -> Result<Vec<String>, String> {
        let mut keyspaces = self.client.keyspaces().map_err(|error| error.to_string())?;
        match tokio::time::timeout(PATIENCE, keyspaces.list(ListRequest {})).await {
            Ok(Ok(answer)) => Ok(answer.into_inner().items.iter().filter_map(|item| name_of(&item.json)).collect()),
            Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => Err(ON_KUBERNETES.to_owned()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("the operator at {} does not answer", self.client.operator())),
        }
    }

    pub(crate) async fn ready(&self) -> Result<(), String> {
        match &self.default {
            Some(name) => tokio::time::timeout(PATIENCE, self.open(name)).await.map_or_else(
                |_| Err(format!("the operator at {} does not answer", self.client.operator())),
                |opened| opened.map(drop).map_err(|error| error.to_string()),
            ),
            None if !self.kept().is_empty() => Ok(()),
            // There the operator has answered, and whoever names a keyspace is served.
            None => self.names().await.map(drop).or_else(|why| if why == ON_KUBERNETES { Ok(()) } else { Err(why) }),
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, HashMap<String, Keyspace>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name in a Keyspace's JSON.
fn name_of(json: &str) -> Option<String> {
    let resource: serde_json::Value = serde_json::from_str(json).ok()?;
    Some(resource.get("metadata")?.get("name")?.as_str()?.to_owned())
}

fn is_name(name: &str) -> bool {
    let part = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.');
    name.len() <= LONGEST
        && match name.split_once('/') {
            Some((namespace, name)) => part(namespace) && part(name),
            None => part(name),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, fits) in
            [("packages", true), ("shop/orders-2", true), ("", false), ("a/b/c", false), ("a b", false), ("/a", false)]
        {
            assert_eq!(is_name(name), fits, "{name}");
        }
        assert!(!is_name(&"x".repeat(200)));
    }
}
