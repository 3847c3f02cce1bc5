//! Bad input: each is refused with words that say what was wrong and what would
//! be right, with the right exit code, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use std::path::Path;

use common::{Cluster, PACKAGES, vasto};

/// `vasto up -f` with this file: it must be refused before anything is made.
#[track_caller]
fn refused(document: &str, words: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (file, data) = (folder.path().join("keyspace.yaml"), folder.path().join("data"));
    std::fs::write(&file, document).unwrap();
    let (file, data) = (file.display().to_string(), data.display().to_string());
    let done = vasto(&["up", "-f", &file, "--data", &data, "--listen", "127.0.0.1:0"]);
    done.fails(4, words);
    assert!(!Path::new(&data).exists(), "something was made");
}

#[test]
fn a_bad_file_changes_nothing() {
    refused(&PACKAGES.replace("shards:", "shard:"), "spec.shard is not a field: did you mean shards?");
    refused(&PACKAGES.replace("shards: 3", "shards: 0"), "spec.shards is 0: must be a whole number from 1 to 1024");
    refused(&PACKAGES.replace("Factor: 2", "Factor: 4"), "must not be more than shards");
    refused(&PACKAGES.replace("name: packages", "name: Packages"), "metadata.name");
    refused(&PACKAGES.replace("kind: Keyspace", "kind: Table"), "Keyspace");
    refused(&PACKAGES.replace("v1alpha1", "v9"), "vasto.io/v1alpha1");
    refused(&format!("{PACKAGES}---{PACKAGES}"), "document 1 has a keyspace of this name");

    let cluster = Cluster::start(PACKAGES, &[]);
    let bad = cluster.file("bad.yaml", &PACKAGES.replace("shards: 3", "shards: 0"));
    cluster.run(&["keyspace", "apply", "-f", &bad]).fails(4, "spec.shards is 0");
    cluster.run(&["keyspace", "scale", "packages", "--shards", "1"]).fails(4, "must not be more than shards");
    cluster.run(&["keyspace", "replace", "packages", "store-9"]).fails(4, "no replica on a store named \"store-9\"");
    cluster.run(&["keyspace", "describe", "nope"]).fails(3, "keyspace \"nope\" does not exist");
    cluster.run(&["get", "nope", "key"]).fails(3, "keyspace \"nope\" does not exist");
    assert!(cluster.run(&["keyspace", "list"]).ok().contains("packages  3"));
}

#[test]
fn keys_values_and_lines_have_limits() {
    let cluster = Cluster::start(PACKAGES, &[]);
    cluster.run(&["put", "packages", "", "value"]).fails(4, "the key is empty");
    cluster.run(&["put", "packages", &"k".repeat(32_769), "v"]).fails(4, "must have 1 to 32768 bytes");
    let big = vec![b'v'; (8 << 20) + 1];
    cluster.run_with(&["put", "packages", "big"], &big).fails(4, "8388608 bytes (8 MiB)");
    cluster.run_with(&["put", "packages", "big"], &big[1..]).ok();

    let file = cluster
        .file("bad.jsonl", "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"b\"}\n{\"key\":\"c\",\"value\":\"1\"}\n");
    let done = cluster.run(&["load", "packages", &file]);
    done.fails(4, "line 2: there is no \"value\"; a line is an object like {\"key\":\"k\",\"value\":\"v\"}");
    done.fails(4, "all lines before it are loaded (1 record in all)");
    assert_eq!(cluster.run(&["scan", "packages", "--keys"]).ok(), "a\nbig\n");
    // A line that is well formed, but that no store would take.
    let long = format!("{{\"key\":\"b\",\"value\":\"1\"}}\n{{\"key\":\"{}\",\"value\":\"1\"}}\n", "k".repeat(32_769));
    let file = cluster.file("long.jsonl", &long);
    cluster.run(&["load", "packages", &file]).fails(4, "line 2: the key");
    assert_eq!(cluster.run(&["get", "packages", "b"]).ok(), "1");
}

#[test]
fn what_can_not_be_reached_or_used_is_named() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let away = ["--operator", &free, "--timeout", "1s"];
    vasto(&[&["get", "packages", "bash"], &away[..]].concat()).fails(5, &free);
    vasto(&[&["keyspace", "list"], &away[..]].concat()).fails(5, "can't be reached");

    let cluster = Cluster::start(PACKAGES, &[]);
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().display().to_string();
    let done = vasto(&["up", "--data", &data, "--listen", &cluster.operator]);
    done.fails(1, &format!("can't listen on {}: the port is in use; stop what listens there", cluster.operator));

    let used = cluster.path("data").display().to_string();
    vasto(&["up", "--data", &used, "--listen", "127.0.0.1:0"]).fails(1, "in use by another process");
    let store = cluster.path("data/store-0").display().to_string();
    let run_store = |data: &str| {
        vasto(&["store", "--name", "store-0", "--data", data, "--listen", "127.0.0.1:0", "--log", "error"])
    };
    run_store(&store).fails(1, "in use by another process");

    let file = cluster.file("a-file", "");
    vasto(&["up", "--data", &file, "--listen", "127.0.0.1:0"]).fails(1, "must be a folder that this user may write");
    run_store(&file).fails(1, "must be a folder that this user may write");

    std::fs::write(folder.path().join("store.json"), "{\"format\":99,\"store\":\"store-0\"}").unwrap();
    run_store(&data).fails(1, "has format 99");
    std::fs::create_dir(folder.path().join("operator")).unwrap();
    std::fs::write(folder.path().join("operator/operator.json"), "{\"format\":99}").unwrap();
    vasto(&["up", "--data", &data, "--listen", "127.0.0.1:0"]).fails(1, "has format 99");
}
