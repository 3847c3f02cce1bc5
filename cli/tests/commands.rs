//! The verbs against a real cluster: what they print and how they end.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod common;

use common::{Cluster, PACKAGES, vasto};

#[test]
fn a_map_and_its_verbs() {
    let cluster = Cluster::start(PACKAGES, &[]);
    let run = |args: &[&str]| cluster.run(args);

    assert_eq!(run(&["put", "packages", "bash", "the shell"]).ok(), "");
    assert_eq!(run(&["get", "packages", "bash"]).ok(), "the shell");
    assert_eq!(run(&["get", "packages", "bash", "--output", "table"]).ok(), "the shell\n");
    assert_eq!(
        run(&["get", "packages", "bash", "--output", "json"]).ok(),
        "{\"key\":\"bash\",\"value\":\"the shell\"}\n"
    );
    run(&["get", "packages", "zsh"]).fails(3, "key \"zsh\" is not in keyspace \"packages\"");
    run(&["append", "packages", "bash", "!"]).ok();
    assert_eq!(run(&["get", "packages", "bash"]).ok(), "the shell!");
    run(&["delete", "packages", "bash"]).ok();
    run(&["get", "packages", "bash"]).fails(3, "is not in keyspace");

    for (verb, number) in [("add", "5"), ("add", "-2.5"), ("max", "10"), ("min", "4")] {
        run(&[verb, "packages", "visits", number]).ok();
    }
    assert_eq!(run(&["get", "packages", "visits"]).ok(), "4");
    run(&["put", "packages", "text", "x"]).ok();
    run(&["add", "packages", "text", "1"]).fails(4, "the key holds bytes");

    // Bytes come from standard input and go to standard output as they are.
    cluster.run_with(&["put", "packages", "lines"], b"a\n\0b\n").ok();
    assert_eq!(run(&["get", "packages", "lines"]).ok(), "a\n\0b\n");
    cluster.run_with(&["add", "packages", "total", "-"], b"2\n").ok();
    cluster.run_with(&["add", "packages", "total"], b"0.5").ok();
    assert_eq!(run(&["get", "packages", "total"]).ok(), "2.5");

    // A partition key is part of the address, and an older write changes nothing.
    run(&["put", "packages", "order", "1", "--partition-key", "user-7"]).ok();
    assert_eq!(run(&["get", "packages", "order", "--partition-key", "user-7"]).ok(), "1");
    run(&["put", "packages", "lines", "old", "--time", "1"]).fails(4, "");
    run(&["put", "packages", "a\\tb", "tab", "--escaped"]).ok();
    assert_eq!(run(&["scan", "packages", "--prefix", "a"]).ok(), "a\\tb\ttab\n");
    assert_eq!(run(&["scan", "packages", "--keys", "--limit", "2"]).ok(), "a\\tb\nlines\n");

    let located = run(&["locate", "packages", "order", "--partition-key", "user-7", "--output", "json"]).ok();
    assert!(located.contains("\"shards\":3") && located.contains("\"serving\":true"), "{located}");
    assert!(run(&["check", "packages"]).ok().contains("all replicas agree"));
    assert!(run(&["keyspace", "list"]).ok().contains("packages  3       6/6    2            Ready"));
    let bench = ["bench", "packages", "--keys", "100", "--duration", "200ms", "--clean", "--output", "json"];
    assert!(run(&bench).ok().contains("\"p99.9\""));
}

#[test]
fn a_dump_loads_back_to_the_same_map() {
    let cluster = Cluster::start(PACKAGES, &[]);
    let expiry = u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap() + 3_600_000;
    let lines = format!(
        "{{\"key\":\"a\",\"value\":\"tab\\tand\\nline\"}}\n\
         {{\"key_base64\":\"AP8=\",\"value_base64\":\"/wA=\"}}\n\
         {{\"key\":\"n\",\"value\":-2.5,\"expiry_ms\":{expiry}}}\n\
         {{\"key\":\"p\",\"value\":\"x\",\"partition_key\":\"user-7\"}}\n\
         {{\"key\":\"a\",\"value\":\"the later line wins\"}}\n"
    );
    let file = cluster.file("in.jsonl", &lines);
    cluster.run(&["load", "packages", &file]).ok();
    assert_eq!(cluster.run(&["get", "packages", "p", "--partition-key", "user-7"]).ok(), "x");
    let dumped = cluster.run(&["dump", "packages", "--format", "jsonl"]).ok();
    assert!(dumped.contains("the later line wins") && dumped.contains(&format!("\"expiry_ms\":{expiry}")), "{dumped}");

    for (copy, dump) in [("from-tsv", "dump.tsv"), ("from-jsonl", "dump.jsonl")] {
        let document = PACKAGES.replace("packages", copy).replace("shards: 3", "shards: 2");
        let document = cluster.file("copy.yaml", &document);
        cluster.run(&["keyspace", "apply", "-f", &document]).ok();
        let dump = cluster.path(dump).display().to_string();
        cluster.run(&["dump", "packages", &dump]).ok();
        cluster.run(&["load", copy, &dump]).ok();
        assert_eq!(cluster.run(&["dump", copy, "--format", "jsonl"]).ok(), dumped);
        assert_eq!(cluster.run(&["get", copy, "p", "--partition-key", "user-7"]).ok(), "x");
    }
}

#[test]
fn a_cluster_changes_while_someone_waits() {
    let cluster = Cluster::start(PACKAGES, &[]);
    cluster.run(&["put", "packages", "bash", "the shell"]).ok();
    let said = cluster.run(&["keyspace", "scale", "packages", "--shards", "4", "--wait"]).ok();
    assert!(said.contains("Prepare took") && said.contains("Cleanup took"), "{said}");
    let said = cluster.run(&["keyspace", "replace", "packages", "store-1", "--wait"]).ok();
    assert!(said.contains("replacing store-1"), "{said}");
    let described = cluster.run(&["keyspace", "describe", "packages"]).ok();
    assert!(described.contains("Shards:       4") && described.contains("store-3"), "{described}");
    assert_eq!(cluster.run(&["get", "packages", "bash"]).ok(), "the shell");
    cluster.run(&["check", "packages"]).ok();
    assert!(cluster.run(&["keyspace", "compact", "packages"]).ok().contains("store-0"));
    cluster.run(&["keyspace", "delete", "packages", "--wait"]).ok();
    assert!(cluster.run(&["keyspace", "list"]).ok().contains("no keyspaces"));
    cluster.run(&["get", "packages", "bash"]).fails(3, "keyspace \"packages\" does not exist");
}

#[test]
fn a_killed_cluster_has_everything_when_it_is_back() {
    let mut cluster = Cluster::start(PACKAGES, &["--processes"]);
    cluster.run(&["put", "packages", "bash", "the shell"]).ok();
    // Children go with their parent, else the next ones would find their folders in use.
    cluster.crash(&[]);
    assert_eq!(cluster.run(&["get", "packages", "bash"]).ok(), "the shell");
    cluster.crash(&["--processes"]);
    assert_eq!(cluster.run(&["get", "packages", "bash"]).ok(), "the shell");
}

#[test]
fn a_shell_reads_a_script_and_stops_at_its_first_failure() {
    let cluster = Cluster::start(PACKAGES, &[]);
    let done = cluster.run_with(
        &["shell"],
        b"use packages\nput 'a key' \"a value\" # a note\nget 'a key' --output json\nget nothing\nput b c\n",
    );
    assert_eq!((done.code, done.out.as_str()), (3, "{\"key\":\"a key\",\"value\":\"a value\"}\n"), "{done:?}");
    cluster.run(&["get", "packages", "b"]).fails(3, "is not in keyspace");
}

#[test]
fn wrong_use_is_told_apart() {
    assert_eq!(vasto(&["get"]).code, 2);
    assert_eq!(vasto(&["put", "p", "k", "v", "--ttl", "never"]).code, 2);
    assert_eq!(vasto(&["--help"]).code, 0);
}
