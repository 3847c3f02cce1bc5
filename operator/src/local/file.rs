//! Follows files of Keyspaces: each document is applied when it differs from what
//! was last applied, so an edit takes effect, and a `keyspace scale` outlives a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio_util::sync::CancellationToken;
use vasto_crds::{Keyspace, parse};

use super::Error;
use super::handle::Handle;
use crate::edit::{Change, Refusal};

const POLL: Duration = Duration::from_millis(500);

/// When a file was written, and its size.
type Mark = Option<(SystemTime, u64)>;

/// A file and what it said last.
pub(super) struct Followed {
    path: PathBuf,
    mark: Mark,
    pub(super) keyspaces: Vec<Keyspace>,
}

/// Reads files that are to be followed.
pub(super) fn read_all(paths: &[PathBuf]) -> Result<Vec<Followed>, Error> {
    let mut names: BTreeMap<String, &Path> = BTreeMap::new();
    let mut all = Vec::new();
    for path in paths {
        let file = |source| Error::File { path: path.clone(), source };
        // Before it is read: an edit in between is then seen as one.
        let mark = mark(std::fs::metadata(path).map_err(file)?);
        let text = std::fs::read_to_string(path).map_err(file)?;
        let keyspaces = parse(&text, &path.display().to_string())?;
        for keyspace in &keyspaces {
            if let Some(first) = names.insert(keyspace.name().to_owned(), path) {
                let (first, second) = (first.to_owned(), path.clone());
                return Err(Error::Twice { name: keyspace.name().to_owned(), first, second });
            }
        }
        all.push(Followed { path: path.clone(), mark, keyspaces });
    }
    Ok(all)
}

fn mark(metadata: std::fs::Metadata) -> Mark {
    Some((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len()))
}

/// Applies what the files say, now and after each edit.
pub(super) async fn follow(files: Vec<Followed>, handle: Handle, stop: CancellationToken) {
    let follow = files.into_iter().map(|file| follow_one(file, handle.clone()));
    tokio::select! {
        () = stop.cancelled() => {}
        _ = futures::future::join_all(follow) => {}
    }
}

async fn follow_one(mut file: Followed, handle: Handle) {
    let mut again = apply(&file.keyspaces, &handle).await;
    loop {
        tokio::time::sleep(POLL).await;
        let found = tokio::fs::metadata(&file.path).await.ok().and_then(mark);
        // A file that is being replaced is absent for an instant; one that is gone changes nothing.
        if found.is_some() && found != file.mark {
            file.mark = found;
            again = take(&mut file, &handle).await;
        } else if !again.is_empty() {
            again = apply(&again, &handle).await;
        }
    }
}

/// Takes in an edit; gives what has to be tried again.
async fn take(file: &mut Followed, handle: &Handle) -> Vec<Keyspace> {
    let shown = file.path.display().to_string();
    let text = match tokio::fs::read_to_string(&file.path).await {
        Ok(text) => text,
        Err(error) => {
            tracing::error!(file = shown, %error, "the edited file can't be read; nothing is changed");
            return Vec::new();
        }
    };
    let keyspaces = match parse(&text, &shown) {
        Ok(keyspaces) => keyspaces,
        Err(error) => {
            tracing::error!(file = shown, %error, "the edited file is refused; nothing is changed");
            return Vec::new();
        }
    };
    let names: BTreeSet<&str> = keyspaces.iter().map(Keyspace::name).collect();
    for gone in file.keyspaces.iter().filter(|k| !names.contains(k.name())) {
        let keyspace = gone.name();
        tracing::warn!(
            keyspace,
            file = shown,
            "the keyspace is not in the file any more; it stays: `vasto keyspace delete {keyspace}` deletes it"
        );
    }
    let again = apply(&keyspaces, handle).await;
    file.keyspaces = keyspaces;
    again
}

/// Applies each; gives those that must be tried again.
async fn apply(keyspaces: &[Keyspace], handle: &Handle) -> Vec<Keyspace> {
    let mut again = Vec::new();
    for keyspace in keyspaces {
        let name = keyspace.name();
        match handle.change(Change::Follow(Box::new(keyspace.clone()))).await {
            Ok(_) => {}
            Err(Refusal::Unavailable(reason)) => {
                tracing::debug!(keyspace = name, reason, "can't be applied yet; trying again");
                again.push(keyspace.clone());
            }
            Err(refusal) => tracing::error!(keyspace = name, %refusal, "the keyspace stays as it is"),
        }
    }
    again
}
