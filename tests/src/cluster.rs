//! A cluster of real processes on loopback: an operator and its stores, each of
//! which can be killed and started again on its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine as _;
use prost::Message as _;
use serde_json::Value;
use vasto_client::v1::keyspaces_client::KeyspacesClient;
use vasto_client::v1::{DescribeRequest, ReplaceRequest, ScaleRequest, Topology};
use vasto_client::{Client, Keyspace};

/// The binary that `cargo build --workspace` made beside this test.
pub fn vasto() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    if folder.ends_with("deps") {
        folder.pop();
    }
    let vasto = folder.join("vasto");
    assert!(vasto.exists(), "{} is missing: run `cargo build --workspace` first (./dev test does)", vasto.display());
    vasto
}

/// A port that nobody listens on, below those that the system gives to outgoing connections: a process that is
/// killed and started again must find its port free, whatever others connect to meanwhile.
pub fn free_port() -> u16 {
    /// Those that were given out, where nobody may listen yet, and those that were in use.
    static TRIED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(10_000..32_000);
        if TRIED.lock().unwrap().insert(port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Processes that end with this value.
pub struct Cluster {
    folder: tempfile::TempDir,
    operator_port: u16,
    ports: BTreeMap<String, u16>,
    operator: Option<Child>,
    stores: BTreeMap<String, Child>,
}

impl Cluster {
    /// Starts an operator for this Keyspace document, and `store-0` to `store-(stores-1)`.
    pub fn start(stores: u32, document: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("keyspace.yaml"), document).unwrap();
        let ports = (0..stores).map(|i| (format!("store-{i}"), free_port())).collect();
        let mut cluster = Self { folder, operator_port: free_port(), ports, operator: None, stores: BTreeMap::new() };
        cluster.start_operator();
        for name in cluster.store_names() {
            cluster.start_store(&name);
        }
        cluster
    }

    /// The folder of everything.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// All stores, running or not.
    pub fn store_names(&self) -> Vec<String> {
        self.ports.keys().cloned().collect()
    }

    /// `host:port` of the operator.
    pub fn operator_address(&self) -> String {
        format!("127.0.0.1:{}", self.operator_port)
    }

    fn spawn(&self, name: &str, args: &[&str]) -> Child {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("{name}.log")))
            .unwrap();
        Command::new(vasto())
            .args(args)
            .env("RUST_LOG", std::env::var("VASTO_TEST_LOG").unwrap_or_else(|_| "info".into()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Starts the operator where it isn't running.
    pub fn start_operator(&mut self) {
        if self.operator.is_none() {
            let folder = self.folder.path().join("operator").display().to_string();
            let file = self.folder.path().join("keyspace.yaml");
            let listen = self.operator_address();
            let mut args = vec!["operator", "--local", &folder, "--listen", &listen];
            let name = file.display().to_string();
            if file.exists() {
                args.extend(["-f", &name]);
            }
            self.operator = Some(self.spawn("operator", &args));
        }
    }

    /// Starts a store where it isn't running.
    pub fn start_store(&mut self, name: &str) {
        if !self.stores.contains_key(name) {
            let data = self.folder.path().join(name).display().to_string();
            let listen = self.store_address(name);
            let operator = self.operator_address();
            let args = ["--operator", &operator, "store", "--name", name, "--data", &data, "--listen", &listen];
            let child = self.spawn(name, &args);
            self.stores.insert(name.to_owned(), child);
        }
    }

    /// SIGKILL.
    pub fn kill_operator(&mut self) {
        if let Some(mut child) = self.operator.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGKILL.
    pub fn kill_store(&mut self, name: &str) {
        if let Some(mut child) = self.stores.remove(name) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Holds a store still, as SIGSTOP does, until it is thawed or killed.
    pub fn freeze_store(&self, name: &str) {
        self.signal_store(name, nix::sys::signal::Signal::SIGSTOP);
    }

    /// Lets a frozen store go on.
    pub fn thaw_store(&self, name: &str) {
        self.signal_store(name, nix::sys::signal::Signal::SIGCONT);
    }

    fn signal_store(&self, name: &str, signal: nix::sys::signal::Signal) {
        if let Some(child) = self.stores.get(name) {
            let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
            nix::sys::signal::kill(pid, signal).unwrap();
        }
    }

    /// Those that ended although nobody ended them, each with how.
    pub fn ended(&mut self) -> Vec<String> {
        let stores = self.stores.iter_mut().map(|(name, child)| (name.as_str(), child));
        let all = stores.chain(self.operator.iter_mut().map(|child| ("operator", child)));
        all.filter_map(|(name, child)| child.try_wait().unwrap().map(|status| format!("{name} ended with {status}")))
            .collect()
    }

    /// `host:port` of a store.
    pub fn store_address(&self, name: &str) -> String {
        format!("127.0.0.1:{}", self.ports[name])
    }

    /// Leaves the folder with all data and logs where it is.
    pub fn keep(&mut self) {
        self.folder.disable_cleanup(true);
    }

    /// SIGTERM, and waits for its end; says how long that took.
    pub fn stop_store(&mut self, name: &str) -> Duration {
        let start = Instant::now();
        let mut child = self.stores.remove(name).unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let ended = child.wait().unwrap();
        assert!(ended.success(), "{name} ended with {ended}\n{}", self.tail());
        start.elapsed()
    }

    /// SIGKILL of all, then a start of all.
    pub fn crash(&mut self) {
        self.kill_operator();
        for name in self.store_names() {
            self.kill_store(&name);
        }
        self.start_operator();
        for name in self.store_names() {
            self.start_store(&name);
        }
    }

    /// A new client of this cluster.
    pub fn client(&self) -> Client {
        Client::connect(&self.operator_address()).unwrap()
    }

    /// The keyspace, once it is there.
    pub async fn keyspace(&self, name: &str) -> Keyspace {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match self.client().keyspace(name).await {
                Ok(keyspace) => return keyspace,
                Err(error) => assert!(Instant::now() < deadline, "keyspace {name}: {error}\n{}", self.tail()),
            }
        }
    }

    async fn admin(&self) -> KeyspacesClient<tonic::transport::Channel> {
        self.client().keyspaces().unwrap()
    }

    /// The resource, spec and status.
    pub async fn describe(&self, name: &str) -> Option<Value> {
        let mut admin = self.admin().await;
        let request = DescribeRequest { name: name.to_owned(), watch: false };
        let mut stream = admin.describe(request).await.ok()?.into_inner();
        let resource = stream.message().await.ok()??;
        serde_json::from_str(&resource.json).ok()
    }

    /// Asks for another size, again while the operator is away.
    pub async fn scale(&self, name: &str, shards: u32, replication_factor: u32) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let request = ScaleRequest { name: name.to_owned(), shards, replication_factor };
            match self.admin().await.scale(request).await {
                Ok(_) => return,
                Err(status) => assert!(Instant::now() < deadline, "scale: {status}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks for a store to be emptied and filled anew.
    pub async fn replace(&self, name: &str, store: &str) {
        self.try_replace(name, store).await.unwrap();
    }

    /// As `replace`, or why the operator refuses.
    pub async fn try_replace(&self, name: &str, store: &str) -> Result<(), tonic::Status> {
        let request = ReplaceRequest { name: name.to_owned(), store: store.to_owned(), accept_data_loss: false };
        self.admin().await.replace(request).await.map(drop)
    }

    /// The phase that status names, such as `Ready`.
    pub async fn phase(&self, name: &str) -> Option<String> {
        let resource = self.describe(name).await?;
        resource.pointer("/status/phase")?.as_str().map(str::to_owned)
    }

    /// Waits until the resource is as wanted.
    pub async fn wait_for(&self, name: &str, what: &str, seconds: u64, wanted: impl Fn(&Value) -> bool) -> Duration {
        let start = Instant::now();
        match self.reached(name, what, seconds, wanted).await {
            Ok(_) => start.elapsed(),
            Err(words) => panic!("{words}\n{}", self.tail()),
        }
    }

    /// The resource once it is as wanted, or why it isn't after this long.
    async fn reached(
        &self,
        name: &str,
        what: &str,
        seconds: u64,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, String> {
        let start = Instant::now();
        let mut last = Value::Null;
        loop {
            if let Some(resource) = self.describe(name).await {
                if wanted(&resource) {
                    return Ok(resource);
                }
                last = resource;
            }
            if start.elapsed() > Duration::from_secs(seconds) {
                let status = last.pointer("/status").cloned().unwrap_or_default();
                return Err(format!("{what}: not within {seconds} s; status {status:#}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until nothing is changing and the committed size is this.
    pub async fn settled(&self, name: &str, shards: u32, replication_factor: u32, seconds: u64) -> Duration {
        self.settled_watching(name, shards, replication_factor, seconds, |_| ()).await
    }

    async fn settled_watching(
        &self,
        name: &str,
        shards: u32,
        replication_factor: u32,
        seconds: u64,
        watch: impl Fn(&Value),
    ) -> Duration {
        let what = format!("{name} at {shards} shards, replication factor {replication_factor}");
        self.wait_for(name, &what, seconds, |resource| {
            watch(resource);
            is_settled(resource, shards, replication_factor)
        })
        .await
    }

    /// The resource once nothing is changing and the committed size is this, or why it isn't after this long.
    pub async fn settles(
        &self,
        name: &str,
        shards: u32,
        replication_factor: u32,
        seconds: u64,
    ) -> Result<Value, String> {
        let what = format!("{name} at {shards} shards, replication factor {replication_factor}");
        self.reached(name, &what, seconds, |resource| is_settled(resource, shards, replication_factor)).await
    }

    /// As `settled`, and says how much was copied on the way.
    pub async fn copied_until_settled(&self, name: &str, shards: u32, replication_factor: u32, seconds: u64) -> Copied {
        let watched = std::sync::Mutex::new((Copied::default(), None::<Instant>));
        let done = self.settled_watching(name, shards, replication_factor, seconds, |resource| {
            let number = |path: &str| resource.pointer(path).and_then(Value::as_u64).unwrap_or(0);
            if resource.pointer("/status/phase").and_then(Value::as_str) == Some("Prepare") {
                let (copied, begun) = &mut *watched.lock().unwrap();
                copied.seconds = begun.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
                copied.records = copied.records.max(number("/status/progress/records"));
                copied.bytes = copied.bytes.max(number("/status/progress/bytes"));
            }
        });
        done.await;
        watched.into_inner().unwrap().0
    }

    /// The ends of all logs, for a failed test.
    pub fn tail(&self) -> String {
        let mut text = String::new();
        for name in self.store_names().into_iter().chain(["operator".to_owned()]) {
            let log = std::fs::read_to_string(self.folder.path().join(format!("{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        text
    }

    /// Runs the binary against this cluster: (exit code, stdout, stderr).
    pub fn run(&self, args: &[&str]) -> (i32, String, String) {
        run(&[&["--operator", &self.operator_address()], args].concat())
    }
}

/// What a change copied, as its status told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Copied {
    /// Records.
    pub records: u64,
    /// Bytes.
    pub bytes: u64,
    /// How long it copied.
    pub seconds: f64,
}

fn is_settled(resource: &Value, shards: u32, replication_factor: u32) -> bool {
    let status = |path: &str| resource.pointer(&format!("/status/{path}"));
    let generation = resource.pointer("/metadata/generation");
    let replacing = resource.pointer("/metadata/annotations/vasto.io~1replace").is_some();
    !replacing
        && status("phase").and_then(Value::as_str) == Some("Ready")
        && status("shards").and_then(Value::as_u64) == Some(u64::from(shards))
        && status("replicas").and_then(Value::as_u64) == Some(u64::from(shards * replication_factor))
        && status("readyReplicas") == status("replicas")
        && status("observedGeneration") == generation
}

/// The topology that a resource's status holds.
pub fn topology(resource: &Value) -> Topology {
    let text = resource.pointer("/status/topology").and_then(Value::as_str).unwrap();
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    Topology::decode(bytes.as_slice()).unwrap()
}

/// Runs the binary: (exit code, stdout, stderr).
pub fn run(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(vasto()).args(args).stdin(Stdio::null()).output().unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// A gateway that ends with this value.
pub struct Gateway {
    child: Child,
    /// `host:port` of the Redis side.
    pub redis: String,
    /// `host:port` of the HTTP side.
    pub http: String,
    /// `host:port` of the gRPC side.
    pub grpc: String,
}

impl Gateway {
    /// To the cluster whose operator listens there; says what it does in `log`.
    pub fn start(operator: &str, log: &Path) -> Self {
        let [redis, http, grpc] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let child = Command::new(vasto())
            .args(["gateway", "--operator", operator, "--redis", &redis, "--http", &http, "--grpc", &grpc])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let gateway = Self { child, redis, http, grpc };
        let deadline = Instant::now() + Duration::from_secs(20);
        for address in [&gateway.redis, &gateway.http, &gateway.grpc] {
            while TcpStream::connect(address).is_err() {
                assert!(Instant::now() < deadline, "the gateway does not listen at {address}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        gateway
    }

    /// Bytes that it holds in memory.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Asks it to stop, and waits until it has; its exit code.
    pub fn stop(&mut self) -> i32 {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_operator();
        for name in self.store_names() {
            self.kill_store(&name);
        }
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
    }
}
