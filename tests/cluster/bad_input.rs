//! Bad input of every kind: a message that says what was wrong and what would be
//! right, the exit code that was promised, and nothing lost.

use std::process::Command;

use vasto_tests::cluster::{Cluster, run, vasto};

const GOOD: &str = "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: good\nspec:\n  shards: 2\n  replicationFactor: 1\n";

/// Runs `vasto up` on this document; it must refuse it.
fn refused(document: &str) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("k.yaml");
    std::fs::write(&file, document).unwrap();
    let data = folder.path().join("data").display().to_string();
    let (code, _, err) = run(&["up", "-f", &file.display().to_string(), "--data", &data, "--listen", "127.0.0.1:0"]);
    (code, err)
}

#[test]
fn a_bad_keyspace_file_is_refused_in_words() {
    let table = [
        (GOOD.replace("shards: 2", "shards: 0"), vec!["shards", "0", "1 to 1024"]),
        (GOOD.replace("shards: 2", "shard: 2"), vec!["shard", "shards"]),
        (GOOD.replace("replicationFactor: 1", "replicationFactor: 3"), vec!["replicationFactor", "3"]),
        (GOOD.replace("name: good", "name: Bad_Name"), vec!["Bad_Name", "lower"]),
        (format!("{GOOD}---\n{GOOD}"), vec!["good", "document 2"]),
        (GOOD.replace("kind: Keyspace", "kind: Keyspaces"), vec!["Keyspaces", "Keyspace"]),
        (GOOD.replace("v1alpha1", "v9"), vec!["v9", "vasto.io/v1alpha1"]),
        ("{".to_owned(), vec!["k.yaml"]),
        (String::new(), vec!["no Keyspace"]),
    ];
    for (document, words) in table {
        let (code, err) = refused(&document);
        assert_eq!(code, 4, "{document}\n{err}");
        for word in words {
            assert!(err.contains(word), "{word:?} is not in {err:?}, for\n{document}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_operations_are_refused_in_words_and_lose_nothing() {
    let cluster = Cluster::start(2, GOOD);
    cluster.settled("good", 2, 1, 30).await;
    let keyspace = cluster.keyspace("good").await;
    keyspace.put("kept", "value").await.unwrap();
    keyspace.put("bytes", "value").await.unwrap();

    let long = "k".repeat(40_000);
    let table: &[(&[&str], i32, &[&str])] = &[
        (&["get", "good", "nothing"], 3, &["nothing", "good"]),
        (&["get", "absent", "key"], 3, &["absent"]),
        (&["put", "good", "", "value"], 4, &["empty"]),
        (&["put", "good", &long, "value"], 4, &["40,000", "32"]),
        (&["add", "good", "bytes", "1"], 4, &["bytes"]),
        (&["put", "good", "kept", "value", "--time", "9999999999999"], 4, &["ahead"]),
        (&["keyspace", "replace", "good", "store-77"], 4, &["store-77"]),
        (&["keyspace", "scale", "good", "--shards", "0"], 4, &["shards"]),
        (&["keyspace", "scale", "absent", "--shards", "3"], 3, &["absent"]),
        (&["frobnicate"], 2, &["frobnicate"]),
    ];
    for (args, want, words) in table {
        let (code, out, err) = cluster.run(args);
        assert_eq!(code, *want, "{:?}: {out}{err}", args.iter().map(|a| &a[..a.len().min(30)]).collect::<Vec<_>>());
        for word in *words {
            assert!(
                err.to_lowercase().contains(&word.to_lowercase())
                    || err.replace(',', "").contains(&word.replace(',', "")),
                "{word:?} is not in {err:?}"
            );
        }
    }

    let file = cluster.path().join("bad.jsonl");
    std::fs::write(&file, "{\"key\":\"first\",\"value\":\"1\"}\nnot json\n").unwrap();
    let (code, _, err) = cluster.run(&["load", "good", &file.display().to_string()]);
    assert_eq!(code, 4, "{err}");
    assert!(err.contains("line 2"), "{err}");

    let too_large = cluster.path().join("large");
    std::fs::write(&too_large, vec![b'x'; (8 << 20) + 1]).unwrap();
    let mut put = Command::new(vasto());
    put.args(["--operator", &cluster.operator_address(), "put", "good", "large", "-"]);
    let output = put.stdin(std::fs::File::open(&too_large).unwrap()).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{err}");
    assert!(err.contains("8 MiB") || err.replace(',', "").contains("8388608"), "{err}");

    assert_eq!(keyspace.get("kept").await.unwrap().unwrap().bytes().unwrap(), "value");
    assert_eq!(keyspace.get("bytes").await.unwrap().unwrap().bytes().unwrap(), "value");
}

#[test]
fn a_missing_operator_is_unavailable() {
    let (code, _, err) = run(&["--operator", "127.0.0.1:1", "--timeout", "1s", "get", "good", "key"]);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("127.0.0.1:1"), "{err}");
}

#[test]
fn a_port_in_use_names_the_port() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data").display().to_string();
    let (code, _, err) = run(&["up", "--data", &data, "--listen", &address]);
    assert_ne!(code, 0);
    assert!(err.contains(&address) && err.contains("in use"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_in_use_newer_or_not_writable_is_refused() {
    let cluster = Cluster::start(2, GOOD);
    cluster.settled("good", 2, 1, 30).await;
    let folder = |name: &str| cluster.path().join(name).display().to_string();
    let store = |data: &str| {
        run(&[
            "--operator",
            &cluster.operator_address(),
            "store",
            "--name",
            "store-0",
            "--data",
            data,
            "--listen",
            "127.0.0.1:0",
        ])
    };
    let (code, _, err) = store(&folder("store-0"));
    assert_ne!(code, 0);
    assert!(err.contains("in use by another process"), "{err}");
    let (code, _, err) = run(&["operator", "--local", &folder("operator"), "--listen", "127.0.0.1:0"]);
    assert_ne!(code, 0);
    assert!(err.contains("in use by another process"), "{err}");

    std::fs::create_dir(cluster.path().join("newer")).unwrap();
    std::fs::write(cluster.path().join("newer/store.json"), r#"{"format":99,"store":"store-0"}"#).unwrap();
    let (code, _, err) = store(&folder("newer"));
    assert_ne!(code, 0);
    assert!(err.contains("format 99"), "{err}");

    // Not a folder at all: not even root may write there.
    std::fs::write(cluster.path().join("file"), "").unwrap();
    let (code, _, err) = store(&folder("file"));
    assert_ne!(code, 0);
    assert!(err.contains("can't be used"), "{err}");
}
