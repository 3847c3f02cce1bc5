//! The local driver's folder: one YAML file per Keyspace with spec and status, as
//! Kubernetes would keep it. Every write is there whole or not at all after a crash.
//! All of it can be lost: stores report what is needed to write it anew.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vasto_client::v1::Topology;
use vasto_crds::Keyspace;

use crate::status::{from_text, to_text};

/// The layout that this version writes; it reads no newer one.
const FORMAT: u32 = 1;

/// Why the operator's folder can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused.
    #[error(
        "the operator's folder {dir} can't be used: {path}: {source}; it must be a folder that this user may write"
    )]
    Io {
        /// The folder.
        dir: PathBuf,
        /// The file or folder in it.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the operator's folder {0} is in use by another process: stop that one, or choose another folder")]
    InUse(PathBuf),
    /// Written by a newer version.
    #[error(
        "the operator's folder {dir} has format {found}, and this version reads up to {FORMAT}: run the newer version that wrote it"
    )]
    Newer {
        /// The folder.
        dir: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A file of it can't be read.
    #[error("{path} can't be read: {reason}; mend it, or move it away: what stores know brings the keyspace back")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct FormatFile {
    format: u32,
}

/// A keyspace that was deleted. Remembered, so that a store that was away meanwhile is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Deleted {
    pub(crate) uid: String,
    pub(crate) name: String,
    /// The data was to be kept.
    pub(crate) retain: bool,
    /// Stores that had replicas of it.
    pub(crate) stores: Vec<String>,
    /// Its last topology, in the phase DELETING.
    topology: String,
}

impl Deleted {
    pub(crate) fn new(topology: &Topology, stores: Vec<String>) -> Self {
        let (uid, name) = (topology.uid.clone(), topology.name.clone());
        Self { uid, name, retain: topology.retain, stores, topology: to_text(topology) }
    }

    pub(crate) fn topology(&self) -> Result<Topology, String> {
        from_text(&self.topology)
    }
}

/// What a folder held.
#[derive(Debug, Default)]
pub(crate) struct Content {
    pub(crate) keyspaces: BTreeMap<String, Keyspace>,
    pub(crate) deleted: Vec<Deleted>,
}

/// The folder, which this process holds alone while this lives.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: PathBuf,
    _lock: File,
}

impl Folder {
    /// Takes the folder, making it where it isn't, and reads what it holds.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Content), Error> {
        let keyspaces = dir.join("keyspaces");
        fs::create_dir_all(&keyspaces).map_err(|e| io_error(dir, &keyspaces, e))?;
        let path = dir.join("LOCK");
        // Never truncated, never read: it is there to be locked.
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| io_error(dir, &path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse(dir.to_owned())),
            Err(TryLockError::Error(e)) => return Err(io_error(dir, &path, e)),
        }
        let folder = Self { dir: dir.to_owned(), _lock: lock };
        folder.format()?;
        let content = Content { keyspaces: folder.keyspaces()?, deleted: folder.deleted()? };
        Ok((folder, content))
    }

    fn format(&self) -> Result<(), Error> {
        let path = self.dir.join("operator.json");
        match fs::read(&path) {
            Ok(bytes) => {
                let found: FormatFile = serde_json::from_slice(&bytes).map_err(|e| unreadable(&path, e.to_string()))?;
                if found.format > FORMAT {
                    return Err(Error::Newer { dir: self.dir.clone(), found: found.format });
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.write(&path, format!("{{\"format\":{FORMAT}}}\n").as_bytes())
            }
            Err(e) => Err(io_error(&self.dir, &path, e)),
        }
    }

    fn keyspaces(&self) -> Result<BTreeMap<String, Keyspace>, Error> {
        let dir = self.dir.join("keyspaces");
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(|e| io_error(&self.dir, &dir, e))? {
            let path = entry.map_err(|e| io_error(&self.dir, &dir, e))?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("yaml") => {
                    let text = fs::read_to_string(&path).map_err(|e| io_error(&self.dir, &path, e))?;
                    let keyspace = read(&text).map_err(|reason| unreadable(&path, reason))?;
                    if path != self.path(keyspace.name()) {
                        return Err(unreadable(
                            &path,
                            format!(
                                "it holds the keyspace {:?}, and a file must be named after its keyspace",
                                keyspace.name()
                            ),
                        ));
                    }
                    found.insert(keyspace.name().to_owned(), keyspace);
                }
                // A write that a crash cut off.
                Some("new") => fs::remove_file(&path).map_err(|e| io_error(&self.dir, &path, e))?,
                _ => {}
            }
        }
        Ok(found)
    }

    fn deleted(&self) -> Result<Vec<Deleted>, Error> {
        let path = self.dir.join("deleted.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| unreadable(&path, e.to_string())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(io_error(&self.dir, &path, e)),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join("keyspaces").join(format!("{name}.yaml"))
    }

    /// Writes a keyspace, synced.
    pub(crate) fn save(&self, keyspace: &Keyspace) -> Result<(), Error> {
        let path = self.path(keyspace.name());
        let value: serde_json::Value =
            serde_json::from_str(&keyspace.to_json()).map_err(|e| unreadable(&path, e.to_string()))?;
        let text = serde_yaml::to_string(&value).map_err(|e| unreadable(&path, e.to_string()))?;
        self.write(&path, text.as_bytes())
    }

    /// Removes a keyspace, synced.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path(name);
        let done = match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => sync_parent(&path),
        };
        done.map_err(|e| io_error(&self.dir, &path, e))
    }

    /// Writes what was deleted, synced.
    pub(crate) fn save_deleted(&self, deleted: &[Deleted]) -> Result<(), Error> {
        let path = self.dir.join("deleted.json");
        let text = serde_json::to_vec_pretty(deleted).map_err(|e| unreadable(&path, e.to_string()))?;
        self.write(&path, &text)
    }

    /// What a keyspace's file says can't be used.
    pub(crate) fn unreadable(&self, name: &str, reason: String) -> Error {
        unreadable(&self.path(name), reason)
    }

    /// Work on the folder that failed as a whole.
    pub(crate) fn broken(&self, source: io::Error) -> Error {
        io_error(&self.dir, &self.dir, source)
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<(), Error> {
        write_durably(path, content).map_err(|e| io_error(&self.dir, path, e))
    }
}

fn io_error(dir: &Path, path: &Path, source: io::Error) -> Error {
    Error::Io { dir: dir.to_owned(), path: path.to_owned(), source }
}

fn unreadable(path: &Path, reason: String) -> Error {
    Error::Unreadable { path: path.to_owned(), reason }
}

fn read(text: &str) -> Result<Keyspace, String> {
    let value: serde_json::Value = serde_yaml::from_str(text).map_err(|e| e.to_string())?;
    let keyspace = Keyspace::from_json(&value.to_string()).map_err(|e| e.to_string())?;
    if keyspace.uid().is_empty() {
        return Err("metadata.uid is missing: this is not a file that the operator wrote; apply it instead".to_owned());
    }
    Ok(keyspace)
}

/// Writes a file so that after a crash the old or the new content is there, whole.
fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_parent(path)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_client::v1::Phase;
    use vasto_crds::{KeyspaceSpec, KeyspaceStatus};

    fn keyspace(name: &str) -> Keyspace {
        let mut keyspace = Keyspace::new(name, KeyspaceSpec::new(3, 2));
        keyspace.metadata.uid = Some("u-1".to_owned());
        let topology = Topology { uid: "u-1".to_owned(), version: 7, spec: "{}".to_owned(), ..Topology::default() };
        keyspace.status = Some(KeyspaceStatus { topology: Some(to_text(&topology)), ..KeyspaceStatus::default() });
        keyspace
    }

    #[test]
    fn a_keyspace_comes_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, content) = Folder::open(dir.path()).unwrap();
        assert!(content.keyspaces.is_empty());
        folder.save(&keyspace("packages")).unwrap();
        folder.save(&keyspace("gone")).unwrap();
        folder.remove("gone").unwrap();
        folder.remove("gone").unwrap();
        let topology = Topology { uid: "u-0".to_owned(), version: 4, retain: true, ..Topology::default() };
        let deleted = Deleted::new(&Topology { phase: Phase::Deleting.into(), ..topology }, vec!["store-1".to_owned()]);
        folder.save_deleted(std::slice::from_ref(&deleted)).unwrap();
        drop(folder);
        // A crash in the middle of a write leaves its beginning under another name.
        fs::write(dir.path().join("keyspaces/packages.new"), "apiVersion: va").unwrap();

        let (_folder, content) = Folder::open(dir.path()).unwrap();
        assert_eq!(content.keyspaces.keys().collect::<Vec<_>>(), ["packages"]);
        assert_eq!(content.keyspaces["packages"], keyspace("packages"));
        assert_eq!(content.deleted, [deleted]);
        assert_eq!(content.deleted[0].topology().unwrap().phase(), Phase::Deleting);
        assert!(!dir.path().join("keyspaces/packages.new").exists());
    }

    #[test]
    fn a_folder_has_one_user() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, _) = Folder::open(dir.path()).unwrap();
        let error = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another process: stop that one"), "{error}");
        drop(folder);
        Folder::open(dir.path()).unwrap();
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("operator.json"), r#"{"format":2}"#).unwrap();
        let error = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("has format 2, and this version reads up to 1"), "{error}");

        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Folder::open(&file).unwrap_err().to_string();
        assert!(error.contains("must be a folder that this user may write"), "{error}");

        let dir = tempfile::tempdir().unwrap();
        drop(Folder::open(dir.path()).unwrap());
        for (text, wanted) in [
            ("{", "can't be read"),
            (
                "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {name: x}\nspec: {shards: 1, replicationFactor: 1}",
                "apply it instead",
            ),
        ] {
            fs::write(dir.path().join("keyspaces/x.yaml"), text).unwrap();
            let error = Folder::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains("x.yaml"), "{error}");
        }
    }
}
