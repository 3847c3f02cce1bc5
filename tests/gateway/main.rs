//! Clients that nobody here wrote, each in its own language, against a gateway: they check what they can do, then
//! write and read while the keyspace grows and shrinks, and at last read back all that they wrote.
//! `./dev gateways` installs them first.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use redis::{Commands, FromRedisValue};
use vasto_tests::cluster::{Cluster, Gateway};

const KEYSPACE: &str = "
apiVersion: vasto.io/v1alpha1
kind: Keyspace
metadata: {name: gateway}
spec: {shards: 3, replicationFactor: 2}
";
/// How long a client may need until it is ready, and to look at what it wrote.
const PATIENCE: Duration = Duration::from_secs(120);

fn clients() -> PathBuf {
    let folder =
        std::env::var_os("CLIENTS").expect("CLIENTS is not set: run ./dev gateways, which installs the clients");
    PathBuf::from(folder)
}

fn source(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("gateway/clients").join(name).display().to_string()
}

/// A client under way: what it says, line by line.
struct Client {
    name: &'static str,
    process: Child,
    said: Receiver<String>,
}

impl Client {
    fn start(name: &'static str, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Self {
        let mut command = Command::new(program);
        Self::of(name, command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()))
    }

    fn of(name: &'static str, command: &mut Command) -> Self {
        let mut process = command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let (tell, said) = mpsc::channel();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(tell.send(line))));
        Self { name, process, said }
    }

    fn line(&mut self) -> Option<String> {
        self.said.recv_timeout(PATIENCE).ok()
    }

    fn ready(&mut self) {
        let line = self.line();
        assert_eq!(line.as_deref(), Some("ready"), "{}", self.name);
    }

    /// Closes its input, and waits for its verdict.
    fn end(mut self) -> String {
        let said_before: Vec<String> = self.said.try_iter().collect();
        drop(self.process.stdin.take());
        let verdict = self.line();
        let rest: Vec<String> = self.said.iter().collect();
        let ended = self.process.wait().unwrap();
        assert!(ended.success(), "{}: {ended}: {said_before:?} {verdict:?} {rest:?}", self.name);
        verdict.unwrap_or_default()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The Rust client, in a process of its own as the others are: this test's program, asked for it by name.
#[test]
#[ignore = "a client of the other test"]
fn redis_rs() {
    let Ok(address) = std::env::var("VASTO_REDIS") else { return };
    let client = redis::Client::open(format!("redis://{address}/")).unwrap();
    let mut connection = client.get_connection().unwrap();
    let prefix = format!("redis_rs:{:016x}:", rand::random::<u64>());
    let key = |name: &str| format!("{prefix}{name}");
    let binary: Vec<u8> = (0..=255).collect();
    let _: () = connection.set(key("bytes"), &binary).unwrap();
    becomes(&binary, || connection.get(key("bytes")).unwrap());
    let big = vec![b'x'; 4 << 20];
    let _: () = connection.set(key("big"), &big).unwrap();
    becomes(&big.len(), || connection.strlen(key("big")).unwrap());
    let _: () = connection.set_ex(key("short"), "x", 100).unwrap();
    becomes(&true, || (98..=100).contains(&connection.ttl::<_, i64>(key("short")).unwrap()));
    let sum: i64 = connection.incr(key("n"), 41).unwrap();
    assert_eq!(sum, 41);
    let all: (String, i64, Vec<u8>) = redis::pipe()
        .cmd("SET")
        .arg(key("p"))
        .arg("v")
        .incr(key("n"), 1)
        .cmd("ECHO")
        .arg("x")
        .query(&mut connection)
        .unwrap();
    assert_eq!(all, ("OK".to_owned(), 42, b"x".to_vec()));
    for i in 0..100 {
        let _: () = connection.set(key(&format!("scan:{i:03}")), i).unwrap();
    }
    let mut pattern_connection = client.get_connection().unwrap();
    becomes(&100, || pattern_connection.scan_match::<_, String>(key("scan:*")).unwrap().count());
    let refused = connection.set_nx::<_, _, bool>(key("p"), "x").unwrap_err();
    assert!(refused.to_string().contains("not served"), "{refused}");
    let refused = redis::pipe().atomic().set(key("p"), "other").exec(&mut connection);
    assert!(refused.is_err());
    let mut again = client.get_connection().unwrap();
    becomes(&"v".to_owned(), || again.get(key("p")).unwrap());
    println!("\nready");

    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = ended.send(());
    });
    let mut rounds = 0_u64;
    while end.try_recv().is_err() {
        let _: () = again.set(key(&format!("k{}", rounds % 300)), rounds).unwrap();
        let _: i64 = again.incr(key("counter"), 1).unwrap();
        rounds += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    for i in rounds.saturating_sub(300)..rounds {
        becomes(&i, || again.get(key(&format!("k{}", i % 300))).unwrap());
    }
    becomes(&rounds, || again.get(key("counter")).unwrap());
    println!("\n{rounds} rounds, all as written");
    std::io::stdout().flush().unwrap();
}

/// A read may be older than the newest write for a moment.
fn becomes<T: FromRedisValue + PartialEq + std::fmt::Debug>(wanted: &T, mut read: impl FnMut() -> T) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let got = read();
        if got == *wanted {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "got {got:?}, wanted {wanted:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_all_kinds_see_no_error_while_the_keyspace_grows_and_shrinks() {
    let clients = clients();
    let cluster = Cluster::start(5, KEYSPACE);
    cluster.settled("gateway", 3, 2, 60).await;
    let gateway = Gateway::start(&cluster.operator_address(), &cluster.path().join("gateway.log"));
    let python = clients.join("python/bin/python");
    let (stubs, node) = (clients.join("stubs").display().to_string(), clients.join("node/ioredis.mjs"));
    let start = |name: &'static str| match name {
        "redis-cli" => Client::start(name, "bash", &[&source("cli.sh"), &gateway.redis]),
        "curl" => Client::start(name, "bash", &[&source("http.sh"), &gateway.http]),
        "redis-py" => Client::start(name, &python, &[&source("redis_py.py"), &gateway.redis]),
        "ioredis" => Client::start(name, "node", &[&node.display().to_string(), &gateway.redis]),
        "go-redis" => Client::start(name, clients.join("goredis"), &[&gateway.redis]),
        "grpc by reflection" => Client::start(name, &python, &[&source("grpc_py.py"), &gateway.grpc]),
        "grpc, generated" => Client::start(name, &python, &[&source("grpc_generated.py"), &gateway.grpc, &stubs]),
        other => panic!("{other}"),
    };
    let names = ["redis-cli", "curl", "redis-py", "ioredis", "go-redis", "grpc by reflection", "grpc, generated"];
    let mut running: Vec<Client> = names.into_iter().map(start).collect();
    for client in &mut running {
        client.ready();
        println!("{}: its checks pass", client.name);
    }
    // Only the test harness stands around the Rust one: what it says comes between empty lines.
    let mut rust = Command::new(std::env::current_exe().unwrap());
    rust.args(["--exact", "redis_rs", "--ignored", "--nocapture"]).env("VASTO_REDIS", &gateway.redis);
    let mut rust = rust.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(rust.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line == "ready"), "redis-rs: its checks fail");
    println!("redis-rs: its checks pass");

    for shards in [5, 2] {
        cluster.scale("gateway", shards, 2).await;
        let took = cluster.settled("gateway", shards, 2, 120).await;
        println!("at {shards} shards after {:.1} s", took.as_secs_f64());
    }
    for client in running {
        let name = client.name;
        println!("{name}: {}", client.end());
    }
    drop(rust.stdin.take());
    let last = said.find(|line| line.ends_with("all as written"));
    assert!(rust.wait().unwrap().success(), "redis-rs: what it wrote is not there");
    println!("redis-rs: {}", last.unwrap_or_default());
}

/// In a real browser: what it shows of a keyspace that grows. With SCREENSHOTS=DIR the pictures are left there.
#[test]
fn the_console_draws_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let ports = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string());
    let [listen, console] = ports;
    std::fs::write(folder.path().join("keyspace.yaml"), KEYSPACE).unwrap();
    let mut command = Command::new(vasto_tests::cluster::vasto());
    command.current_dir(folder.path()).args(["up", "-f", "keyspace.yaml", "--listen", &listen, "--console", &console]);
    command.args(["--redis", "off", "--http", "off", "--grpc", "off"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut up = Client::of("vasto up", command.stdin(Stdio::piped()));
    while !up.line().expect("vasto up is not ready").contains("is ready") {}
    let pictures = std::env::var_os("SCREENSHOTS").map_or_else(|| folder.path().to_owned(), PathBuf::from);
    let draw = |name: &str, args: &[&str]| {
        let picture = pictures.join(name).display().to_string();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("gateway/screenshot");
        let mut command = Command::new(script);
        command.args([&format!("http://{console}/"), &picture]).args(args);
        let drawn = command.output().unwrap();
        let words = String::from_utf8_lossy(&drawn.stdout).into_owned() + &String::from_utf8_lossy(&drawn.stderr);
        assert!(drawn.status.success(), "{name}: {words}");
        words
    };
    let text = ["--eval", "document.body.innerText"];
    let shown = draw("console.png", &[&["1280x720"], &text[..]].concat());
    for word in ["gateway", "store-0", "store-2"] {
        assert!(shown.contains(word), "{word:?} is not in {shown}");
    }
    let records: Vec<u8> = (0..200_000)
        .flat_map(|i| format!("{{\"key\":\"k{i:06}\",\"value\":\"{}\"}}\n", "x".repeat(300)).into_bytes())
        .collect();
    std::fs::write(folder.path().join("some.jsonl"), records).unwrap();
    let vasto = |args: &[&str]| {
        let (code, out, err) = vasto_tests::cluster::run(&[&["--operator", &listen], args].concat());
        assert_eq!(code, 0, "{args:?}: {out}{err}");
    };
    let file = folder.path().join("some.jsonl").display().to_string();
    vasto(&["load", "gateway", &file]);
    vasto(&["keyspace", "scale", "gateway", "--shards", "5"]);
    let wide = draw("console-growing.png", &[&["1280x720"], &text[..]].concat());
    draw("console-phone.png", &["390x844", "--dark"]);
    assert!(wide.contains("5 shards"), "the wish is not in {wide}");
}

#[test]
fn the_description_of_the_service_passes_bufs_lint() {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/proto");
    let buf = clients().join("node/node_modules/.bin/buf");
    let linted = Command::new(&buf).arg("lint").current_dir(proto).output().unwrap();
    assert!(linted.status.success(), "{}", String::from_utf8_lossy(&linted.stdout));
}
