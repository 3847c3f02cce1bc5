//! `vasto up` as a user runs it: everything is there again after SIGKILL, edits of
//! the file are followed, a dump loads back to the same map.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vasto_tests::cluster::{run, vasto};

struct Up {
    folder: tempfile::TempDir,
    port: u16,
    processes: bool,
    child: Option<Child>,
}

impl Up {
    fn new(processes: bool) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut up = Self { folder: tempfile::tempdir().unwrap(), port, processes, child: None };
        up.write(2);
        up.start();
        up
    }

    fn write(&self, shards: u32) {
        let document = format!(
            "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: words\nspec:\n  shards: {shards}\n  replicationFactor: 1\n"
        );
        std::fs::write(self.folder.path().join("words.yaml"), document).unwrap();
    }

    fn start(&mut self) {
        let log = std::fs::File::create(self.folder.path().join("up.log")).unwrap();
        let mut command = Command::new(vasto());
        command.current_dir(self.folder.path()).args(["up", "-f", "words.yaml", "--listen", &self.address()]);
        // Tests run beside one another, and beside whatever this machine has on the usual ports.
        command.args(["--redis", "off", "--http", "off", "--grpc", "off", "--console", "off"]);
        if self.processes {
            command.arg("--processes");
        }
        self.child = Some(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        self.until("a write is taken", |up| up.vasto(&["put", "words", "probe", "x"]).0 == 0);
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn vasto(&self, args: &[&str]) -> (i32, String, String) {
        run(&[&["--operator", &self.address(), "--timeout", "5s"], args].concat())
    }

    fn good(&self, args: &[&str]) -> String {
        let (code, out, err) = self.vasto(args);
        assert_eq!(code, 0, "{args:?}: {out}{err}\n{}", self.log());
        out
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("up.log")).unwrap_or_default()
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !done(self) {
            assert!(Instant::now() < deadline, "{what}: not within 30 s\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.kill();
    }
}

fn everything_is_there_after_a_kill(processes: bool) {
    let mut up = Up::new(processes);
    up.good(&["put", "words", "kept", "through a kill"]);
    up.good(&["add", "words", "count", "2"]);
    up.good(&["add", "words", "count", "3"]);
    up.good(&["append", "words", "list", "a"]);
    up.good(&["append", "words", "list", "b"]);
    up.good(&["put", "words", "gone", "x"]);
    up.good(&["delete", "words", "gone"]);
    up.kill();
    up.start();
    assert_eq!(up.good(&["get", "words", "kept"]).trim_end(), "through a kill");
    assert_eq!(up.good(&["get", "words", "count"]).trim_end(), "5");
    assert_eq!(up.good(&["get", "words", "list"]).trim_end(), "ab");
    assert_eq!(up.vasto(&["get", "words", "gone"]).0, 3);
}

#[test]
fn after_a_kill_everything_is_there() {
    everything_is_there_after_a_kill(false);
}

#[test]
fn after_a_kill_everything_is_there_with_a_process_for_each_store() {
    everything_is_there_after_a_kill(true);
}

#[test]
fn an_edit_of_the_file_is_followed_and_what_was_scaled_survives_a_restart() {
    let mut up = Up::new(false);
    let shards = |up: &Up, n: u32| {
        let out = up.vasto(&["--output", "json", "keyspace", "describe", "words"]).1;
        let resource: serde_json::Value = serde_json::from_str(&out).unwrap_or_default();
        resource.pointer("/status/shards").and_then(serde_json::Value::as_u64) == Some(u64::from(n))
            && resource.pointer("/status/phase").and_then(serde_json::Value::as_str) == Some("Ready")
    };
    up.write(3);
    up.until("three shards after the edit", |up| shards(up, 3));
    up.good(&["keyspace", "scale", "words", "--shards", "4"]);
    up.until("four shards after scaling", |up| shards(up, 4));
    up.kill();
    up.start();
    up.until("still four shards", |up| shards(up, 4));
}

#[test]
fn a_dump_loads_back_to_the_same_map() {
    let up = Up::new(false);
    let folder = up.folder.path();
    let lines = "{\"key\":\"a\",\"value\":\"1\"}\n{\"key\":\"tab\\there\",\"value\":\"line\\nfeed \\\\ back\"}\n{\"key_base64\":\"/wA=\",\"value_base64\":\"gP8=\"}\n";
    std::fs::write(folder.join("in.jsonl"), lines).unwrap();
    up.good(&["load", "words", &folder.join("in.jsonl").display().to_string()]);
    up.good(&["add", "words", "number", "1.5"]);
    let first = up.good(&["scan", "words"]);
    for format in ["jsonl", "tsv"] {
        let dump = folder.join(format!("dump.{format}"));
        // Bytes, not text: keys and values are what they are.
        let mut command = Command::new(vasto());
        command.args(["--operator", &up.address(), "dump", "words", "--format", format]);
        let status = command.stdout(std::fs::File::create(&dump).unwrap()).status().unwrap();
        assert!(status.success());
        for key in ["a", "tab\there", "number"] {
            up.good(&["delete", "words", key]);
        }
        up.good(&["load", "words", &dump.display().to_string()]);
        assert_eq!(up.good(&["scan", "words"]), first, "{format}");
    }
}

#[test]
fn a_full_disk_refuses_writes_serves_what_it_has_and_is_cured_by_growing() {
    // A small tmpfs of its own, in a mount namespace of its own: needs no root where user namespaces are allowed.
    let folder = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    std::fs::write(
        folder.path().join("words.yaml"),
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata:\n  name: words\nspec:\n  shards: 1\n  replicationFactor: 1\n",
    )
    .unwrap();
    let script = "mkdir -p data && mount -t tmpfs -o size=96m tmpfs data && exec \"$0\" up -f words.yaml --data data --listen \"$1\"";
    let flags = if nix::unistd::Uid::effective().is_root() { "-m" } else { "-rm" };
    let mut child = Command::new("unshare")
        .args([flags, "sh", "-c", script])
        .arg(vasto())
        .arg(&address)
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let operator = ["--operator", &address, "--timeout", "5s"];
    let vasto = |args: &[&str]| run(&[&operator[..], args].concat());
    let deadline = Instant::now() + Duration::from_secs(30);
    while vasto(&["put", "words", "probe", "x"]).0 != 0 {
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        assert!(Instant::now() < deadline, "{log}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let value = folder.path().join("value");
    // Not compressible, so that the disk does fill.
    let noise: Vec<u8> =
        (0u64..1 << 17).flat_map(|i| vasto_client::hash::partition_hash(&i.to_be_bytes()).to_be_bytes()).collect();
    std::fs::write(&value, &noise).unwrap();
    let mut kept = 0;
    let refused = loop {
        let mut put = Command::new(vasto_tests::cluster::vasto());
        put.args(operator).args(["put", "words", &format!("key-{kept}"), "-"]);
        let output = put.stdin(std::fs::File::open(&value).unwrap()).output().unwrap();
        if !output.status.success() {
            break output;
        }
        kept += 1;
        assert!(kept < 500, "a disk of 96 MB took {kept} MB");
    };
    let err = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(err.contains("full"), "{err}");
    assert!(kept > 5, "only {kept} writes were taken: {err}");
    for i in 0..kept {
        let (code, out, err) = vasto(&["get", "words", &format!("key-{i}"), "--output", "json"]);
        assert!(code == 0 && !out.is_empty(), "key-{i}: {err}");
    }
    // The volume grows under the running store, as Kubernetes does it.
    let mut grow = Command::new("nsenter");
    grow.args(["-t", &child.id().to_string(), "-m"]);
    if !nix::unistd::Uid::effective().is_root() {
        grow.args(["-U", "--preserve-credentials"]);
    }
    grow.args(["mount", "-o", "remount,size=256m"]).arg(folder.path().join("data"));
    assert!(grow.status().unwrap().success());
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (code, _, err) = vasto(&["put", "words", "after", "x"]);
        if code == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "writes are still refused: {err}");
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
