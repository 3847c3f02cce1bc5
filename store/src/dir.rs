//! A store's data folder: who may use it, which version wrote it, and writing
//! small files so that a crash leaves the old or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vasto_client::env::Env;
use vasto_client::v1::Disk;

use crate::engine::Storage;

/// The layout that this version writes; it reads no newer one.
const FORMAT: u32 = 1;

/// Why a data folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("the data folder {path} can't be used: {source}; it must be a folder that this user may write")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the data folder {0} is in use by another process: stop that one, or choose another folder with --data")]
    InUse(PathBuf),
    /// Written by a newer version.
    #[error(
        "the data folder {path} has format {found}, and this version reads up to {FORMAT}: run the newer version that wrote it"
    )]
    Newer {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It is another store's.
    #[error(
        "the data folder {path} belongs to {found}, not to {wanted}: start the store under its own name, or give it its own folder"
    )]
    OtherStore {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Who wants it.
        wanted: String,
    },
}

/// `store.json`.
#[derive(Debug, Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    store: String,
}

/// A data folder that this process holds alone, while this lives.
#[derive(Debug)]
pub struct Dir {
    path: PathBuf,
    _lock: File,
}

impl Dir {
    /// Takes the folder for the store of this name, making it where it isn't.
    pub fn open(path: &Path, store: &str) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        fs::create_dir_all(path.join("keyspaces")).map_err(io)?;
        let lock = File::create(path.join("LOCK")).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(Error::InUse(path.to_owned())),
            Err(fs::TryLockError::Error(source)) => return Err(io(source)),
        }
        let file = path.join("store.json");
        match fs::read(&file) {
            Ok(text) => {
                let found: StoreFile =
                    serde_json::from_slice(&text).map_err(|e| Error::Io { path: file, source: e.into() })?;
                if found.format > FORMAT {
                    return Err(Error::Newer { path: path.to_owned(), found: found.format });
                }
                if found.store != store {
                    return Err(Error::OtherStore {
                        path: path.to_owned(),
                        found: found.store,
                        wanted: store.to_owned(),
                    });
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let text = serde_json::to_vec(&StoreFile { format: FORMAT, store: store.to_owned() })
                    .map_err(|e| io(e.into()))?;
                write_durably(&file, &text).map_err(io)?;
            }
            Err(source) => return Err(Error::Io { path: file, source }),
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The folder of all keyspaces.
    pub fn keyspaces(&self) -> PathBuf {
        self.path.join("keyspaces")
    }

    /// A keyspace's folder.
    pub fn keyspace(&self, uid: &str) -> PathBuf {
        self.keyspaces().join(uid)
    }

    /// A replica's folder.
    pub fn replica(&self, uid: &str, replica: u64) -> PathBuf {
        self.keyspace(uid).join("replicas").join(format!("{replica:016x}"))
    }
}

/// Writes a file so that after a crash the old or the new content is there, whole.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Removes a folder with all that is in it, where it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    if path.exists() { fs::remove_dir_all(path) } else { Ok(()) }
}

/// What is in a folder, in the order of the names.
pub fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = fs::read_dir(path)?.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
    found.sort();
    Ok(found)
}

/// Whether a disk has room for more writes.
///
/// Writes stop while there still is room for what RocksDB itself must write
/// (memtables, compactions), so that it never meets the end of the disk.
pub fn has_room(disk: &Disk) -> bool {
    disk.free_bytes > (64 << 20).min(disk.size_bytes / 3)
}

/// Says whether the disk of `path` has room for more writes; looks at most each 100 ms.
pub fn disk_watch(path: PathBuf, storage: Arc<dyn Storage>, env: Env) -> impl FnMut() -> bool + Send {
    let (mut looked, mut free) = (0, true);
    move || {
        let now = env.now_ms();
        if now.abs_diff(looked) >= 100 {
            looked = now;
            free = storage.disk(&path).is_none_or(|disk| has_room(&disk));
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_use_newer_or_of_another_store_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let held = Dir::open(dir.path(), "store-0").unwrap();
        let error = Dir::open(dir.path(), "store-0").unwrap_err().to_string();
        assert!(error.contains("in use by another process"), "{error}");
        drop(held);
        let error = Dir::open(dir.path(), "store-1").unwrap_err().to_string();
        assert!(error.contains("belongs to store-0, not to store-1"), "{error}");
        fs::write(dir.path().join("store.json"), r#"{"format":9,"store":"store-0"}"#).unwrap();
        let error = Dir::open(dir.path(), "store-0").unwrap_err().to_string();
        assert!(error.contains("has format 9"), "{error}");
    }
}
