//! The programs that Vasto is measured beside, and what to do where one is missing.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::bail;
use clap::ValueEnum;

use crate::word;

/// Someone else's program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Peer {
    Redis,
    #[value(name = "db_bench")]
    DbBench,
    Etcd,
}

impl Peer {
    fn binaries(self) -> &'static [&'static str] {
        match self {
            Self::Redis => &["redis-server", "redis-benchmark"],
            Self::DbBench => &["db_bench"],
            Self::Etcd => &["etcd"],
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Redis => "redis-server",
            Self::DbBench => "rocksdb-tools",
            Self::Etcd => "etcd-server",
        }
    }
}

/// Where a program is.
pub fn find(binary: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    // What tests/kube/build makes.
    folders.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/kube-tools/bin")));
    folders.into_iter().map(|folder| folder.join(binary)).find(|file| file.is_file())
}

/// Those that are not there. One that is wanted must be, unless it is only measured where it is.
pub fn missing(wanted: &BTreeSet<Peer>) -> anyhow::Result<BTreeSet<Peer>> {
    let gone = |peer: &Peer| peer.binaries().iter().any(|binary| find(binary).is_none());
    let missing: BTreeSet<Peer> = wanted.iter().copied().filter(gone).collect();
    let needed: Vec<Peer> = missing.iter().copied().filter(|peer| *peer != Peer::Etcd).collect();
    if !needed.is_empty() {
        bail!(
            "missing: {}; run: apt-get install {}, or leave them out: --without {}",
            needed.iter().flat_map(|peer| peer.binaries()).copied().collect::<Vec<_>>().join(", "),
            needed.iter().map(|peer| peer.package()).collect::<Vec<_>>().join(" "),
            needed.iter().map(word).collect::<Vec<_>>().join(",")
        );
    }
    Ok(missing)
}
