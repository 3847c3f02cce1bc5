//! A Kubernetes control plane as processes on loopback: etcd, kube-apiserver and, of
//! kube-controller-manager, the controllers that are asked for. No nodes: what a kubelet
//! does is the tests' own affair (see `fleet`).

use std::fmt::Write as _;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, Config};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tonic::codegen::http::{HeaderName, HeaderValue};

/// Waits for all of it to be ready.
const PATIENCE: Duration = Duration::from_secs(120);
const TOKEN: &str = "the-token-of-the-admin";

/// What StatefulSets need to live, and objects with owners to die.
pub const CONTROLLERS: [&str; 6] = [
    "statefulset-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "persistentvolumeclaim-protection-controller",
    "disruption-controller",
    "serviceaccount-controller",
];

/// The service account of the operator, as the chart names it.
pub const OPERATOR: &str = "vasto-operator";

/// Where the binaries are.
pub fn tools() -> PathBuf {
    let home = std::env::var_os("HOME").unwrap_or_default();
    let folder = std::env::var_os("KUBE_TOOLS").map(PathBuf::from);
    folder.unwrap_or_else(|| Path::new(&home).join(".cache/kube-tools")).join("bin")
}

fn tool(name: &str) -> PathBuf {
    let path = tools().join(name);
    assert!(
        path.exists(),
        "{} is missing: this tier runs a real control plane. Build it once with tests/kube/build (12 minutes on two \
         cores), or set KUBE_TOOLS to a folder whose bin/ has etcd, kube-apiserver, kube-controller-manager, kubeadm \
         and kubectl",
        path.display()
    );
    path
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A process that ends when this value does, or this process, however that comes about: a shell
/// kills it once its own standard input ends.
struct Process {
    name: &'static str,
    log: PathBuf,
    shell: Child,
    /// Dropped, it ends the process.
    input: Option<ChildStdin>,
}

const GUARD: &str = r#"
trap '' INT TERM HUP
log=$1 remove=$2; shift 2
"$@" </dev/null >"$log" 2>&1 &
child=$!
echo $child >"$log.pid"
cat >/dev/null
kill -KILL $child 2>/dev/null
wait $child 2>/dev/null
[ -z "$remove" ] || rm -rf "$remove"
"#;

impl Process {
    /// `remove`: a folder that goes once the process is gone.
    fn start(folder: &Path, name: &'static str, args: &[String], remove: Option<&Path>) -> Self {
        let log = folder.join(format!("{name}.log"));
        let remove = remove.map(|p| p.display().to_string()).unwrap_or_default();
        let mut shell = Command::new("sh")
            .args(["-c", GUARD, "guard"])
            .arg(&log)
            .arg(remove)
            .arg(tool(name))
            .args(args)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let input = shell.stdin.take();
        Self { name, log, shell, input }
    }

    fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.log.with_extension("log.pid")).ok()?.trim().parse().ok()
    }

    fn ended(&self) -> bool {
        self.pid().is_some_and(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
        })
    }

    fn tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("--- {}\n{}\n", self.name, lines[lines.len().saturating_sub(30)..].join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.input.take();
        let _ = self.shell.wait();
    }
}

/// Who speaks to the API server.
#[derive(Clone, Debug)]
pub enum Who {
    /// May do everything.
    Admin,
    /// A service account, with what it was bound to.
    Account {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// The processes, which end with this value.
pub struct ControlPlane {
    url: String,
    folder: PathBuf,
    /// The last one removes the folder.
    processes: Vec<Process>,
}

impl ControlPlane {
    /// Starts etcd, the API server and these controllers, and installs what every cluster has that
    /// runs Vasto: storage classes, the Keyspace resource, the operator's roles.
    pub async fn start(controllers: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap().keep();
        let started = Instant::now();
        let key = Command::new(tool("kubeadm"))
            .args(["init", "phase", "certs", "sa", "--cert-dir"])
            .arg(folder.join("keys"))
            .output()
            .unwrap();
        assert!(key.status.success(), "kubeadm made no key: {}", String::from_utf8_lossy(&key.stderr));
        let (port, etcd, peer) = (free_port(), free_port(), free_port());
        let mut plane = Self { url: format!("https://127.0.0.1:{port}"), folder, processes: Vec::new() };
        plane.start_etcd(etcd, peer);
        plane.start_apiserver(port, etcd);
        plane.ready().await;
        plane.install().await;
        if !controllers.is_empty() {
            plane.start_controllers(controllers);
        }
        println!("control plane: {:.1} s until it was ready, with {}", started.elapsed().as_secs_f64(), plane.url);
        plane
    }

    fn run(&mut self, name: &'static str, args: &[String], remove: bool) {
        let remove = remove.then_some(self.folder.as_path());
        let process = Process::start(&self.folder, name, args, remove);
        // Ended in this order: etcd, which removes the folder, last.
        self.processes.insert(0, process);
    }

    fn start_etcd(&mut self, port: u16, peer: u16) {
        let args = [
            format!("--data-dir={}", self.folder.join("etcd").display()),
            format!("--listen-client-urls=http://127.0.0.1:{port}"),
            format!("--advertise-client-urls=http://127.0.0.1:{port}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        self.run("etcd", &args, true);
    }

    fn start_apiserver(&mut self, port: u16, etcd: u16) {
        let path = |name: &str| self.folder.join(name).display().to_string();
        std::fs::write(self.folder.join("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n")).unwrap();
        let args = [
            format!("--etcd-servers=http://127.0.0.1:{etcd}"),
            "--etcd-compaction-interval=0".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", path("tls")),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--anonymous-auth=false".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("keys/sa.pub")),
            format!("--service-account-signing-key-file={}", path("keys/sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            // Many tests at once are not to be slowed down for one another's sake.
            "--enable-priority-and-fairness=false".to_owned(),
            "--max-requests-inflight=0".to_owned(),
            "--max-mutating-requests-inflight=0".to_owned(),
        ];
        self.run("kube-apiserver", &args, false);
    }

    fn start_controllers(&mut self, controllers: &[&str]) {
        let args = [
            format!("--kubeconfig={}", self.kubeconfig().display()),
            format!("--cert-dir={}", self.folder.join("controller-tls").display()),
            format!("--controllers={}", controllers.join(",")),
            "--secure-port=0".to_owned(),
            "--leader-elect=false".to_owned(),
            "--use-service-account-credentials=false".to_owned(),
            "--kube-api-qps=2000".to_owned(),
            "--kube-api-burst=4000".to_owned(),
            "--concurrent-statefulset-syncs=20".to_owned(),
            "--concurrent-namespace-syncs=20".to_owned(),
        ];
        self.run("kube-controller-manager", &args, false);
    }

    /// A kubeconfig of the admin, for kubectl.
    pub fn kubeconfig(&self) -> PathBuf {
        let path = self.folder.join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.url, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
        });
        std::fs::write(&path, text.to_string()).unwrap();
        path
    }

    /// Runs kubectl as the admin: (exit code, stdout, stderr).
    pub fn kubectl(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(tool("kubectl"))
            .env("KUBECONFIG", self.kubeconfig())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// How to reach it.
    pub fn config(&self, who: &Who) -> Config {
        let mut config = Config::new(self.url.parse().unwrap());
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(TOKEN.to_owned().into());
        if let Who::Account { namespace, name } = who {
            let mut header = |name: &'static str, value: &str| {
                config.headers.push((HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
            };
            header("impersonate-user", &format!("system:serviceaccount:{namespace}:{name}"));
            header("impersonate-group", "system:serviceaccounts");
            header("impersonate-group", &format!("system:serviceaccounts:{namespace}"));
            header("impersonate-group", "system:authenticated");
        }
        config
    }

    /// A client of this runtime.
    pub fn client(&self) -> Client {
        Client::try_from(self.config(&Who::Admin)).unwrap()
    }

    async fn ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        let client = self.client();
        loop {
            let request = tonic::codegen::http::Request::get("/readyz").body(Vec::new()).unwrap();
            let answer = client.request_text(request).await;
            if answer.as_ref().is_ok_and(|text| text == "ok") {
                return;
            }
            if let Some(dead) = self.processes.iter().find(|p| p.ended()) {
                panic!("{} has ended before the control plane was ready\n{}", dead.name, self.tail());
            }
            assert!(Instant::now() < deadline, "not ready within {PATIENCE:?}: {answer:?}\n{}", self.tail());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The ends of all logs, for a failed test.
    pub fn tail(&self) -> String {
        self.processes.iter().map(Process::tail).collect()
    }

    /// Bytes that the API server's process has in memory.
    pub fn apiserver_memory(&self) -> u64 {
        let pid = self.processes.iter().find(|p| p.name == "kube-apiserver").and_then(Process::pid);
        pid.map_or(0, resident)
    }

    async fn install(&self) {
        let client = self.client();
        for (name, expand) in [("standard", true), ("fixed", false)] {
            let default = (name == "standard").to_string();
            create::<StorageClass>(
                &client,
                None,
                json!({
                    "metadata": {"name": name, "annotations": {"storageclass.kubernetes.io/is-default-class": default}},
                    "provisioner": "vasto.test/none", "allowVolumeExpansion": expand,
                }),
            )
            .await;
        }
        let class = json!({"metadata": {"name": "high-priority"}, "value": 1000});
        create::<PriorityClass>(&client, None, class).await;
        let system = json!({"metadata": {"name": OPERATOR_NAMESPACE}});
        create::<Namespace>(&client, None, system).await;
        self.install_keyspaces(&client).await;
        let role = |name: &str, rules: Value| json!({"metadata": {"name": name}, "rules": rules});
        let cluster = rules(&[namespaced_rules(), cluster_rules()]);
        create::<ClusterRole>(&client, None, role(OPERATOR, cluster)).await;
        let account = json!({"metadata": {"name": OPERATOR}});
        create::<ServiceAccount>(&client, Some(OPERATOR_NAMESPACE), account).await;
        let lease = rules(&[lease_rules()]);
        create::<Role>(&client, Some(OPERATOR_NAMESPACE), role(OPERATOR, lease)).await;
        let binding = binding("Role", OPERATOR_NAMESPACE);
        create::<RoleBinding>(&client, Some(OPERATOR_NAMESPACE), binding).await;
        let binding = self::binding("ClusterRole", OPERATOR_NAMESPACE);
        create::<ClusterRoleBinding>(&client, None, binding).await;
    }

    async fn install_keyspaces(&self, client: &Client) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/keyspace.yaml");
        let crd: CustomResourceDefinition = serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let api: Api<CustomResourceDefinition> = Api::all(client.clone());
        let made = api.create(&PostParams::default(), &crd).await;
        let name = made.unwrap_or_else(|e| panic!("the API server refuses crds/keyspace.yaml: {e}")).metadata.name;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let crd = api.get(name.as_deref().unwrap()).await.unwrap();
            let conditions = crd.status.and_then(|s| s.conditions).unwrap_or_default();
            if conditions.iter().any(|c| c.type_ == "Established" && c.status == "True") {
                return;
            }
            assert!(Instant::now() < deadline, "the Keyspace resource is not established: {conditions:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A namespace with an operator's account that may work in it, and in it only, as the chart's
    /// namespaced mode gives it.
    pub async fn namespace(&self, name: &str) {
        let client = self.client();
        create::<Namespace>(&client, None, json!({"metadata": {"name": name}})).await;
        create::<ServiceAccount>(&client, Some(name), json!({"metadata": {"name": OPERATOR}})).await;
        let rules = rules(&[namespaced_rules(), lease_rules()]);
        create::<Role>(&client, Some(name), json!({"metadata": {"name": OPERATOR}, "rules": rules})).await;
        create::<RoleBinding>(&client, Some(name), binding("Role", name)).await;
        // The API server comes to know of a role a little later than it has it.
        let account = Who::Account { namespace: name.to_owned(), name: OPERATOR.to_owned() };
        let claims: Api<PersistentVolumeClaim> =
            Api::namespaced(Client::try_from(self.config(&account)).unwrap(), name);
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = claims.list(&ListParams::default().limit(1)).await {
            assert!(Instant::now() < deadline, "the operator's account has no rights: {error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// The namespace of an operator that serves the whole cluster.
pub const OPERATOR_NAMESPACE: &str = "vasto-system";

/// Makes an object of a test's own.
pub async fn create<K>(client: &Client, namespace: Option<&str>, object: Value) -> K
where
    K: kube::Resource<DynamicType = ()> + DeserializeOwned + serde::Serialize + Clone + std::fmt::Debug,
{
    let path = K::url_path(&(), namespace);
    let mut object = object;
    object["apiVersion"] = K::api_version(&()).into();
    object["kind"] = K::kind(&()).into();
    let request = tonic::codegen::http::Request::post(path)
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&object).unwrap())
        .unwrap();
    client.request(request).await.unwrap_or_else(|e| panic!("{e}: {object}"))
}

fn binding(kind: &str, namespace: &str) -> Value {
    json!({
        "metadata": {"name": OPERATOR},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": OPERATOR},
        "subjects": [{"kind": "ServiceAccount", "name": OPERATOR, "namespace": namespace}],
    })
}

type Rule = (&'static str, &'static [&'static str], &'static [&'static str]);

fn namespaced_rules() -> Vec<Rule> {
    vec![
        ("vasto.io", &["keyspaces"], &["get", "list", "watch", "patch"]),
        ("vasto.io", &["keyspaces/status"], &["get", "patch"]),
        ("apps", &["statefulsets"], &["get", "list", "watch", "create", "patch"]),
        ("", &["services", "serviceaccounts"], &["get", "list", "watch", "create", "patch"]),
        ("policy", &["poddisruptionbudgets"], &["get", "list", "watch", "create", "patch"]),
        ("", &["pods"], &["get", "list", "watch", "delete"]),
        ("", &["persistentvolumeclaims"], &["get", "list", "watch", "patch", "delete"]),
        ("events.k8s.io", &["events"], &["create", "patch"]),
    ]
}

fn cluster_rules() -> Vec<Rule> {
    vec![("", &["nodes"], &["get", "list", "watch"]), ("", &["persistentvolumes"], &["get"])]
}

fn lease_rules() -> Vec<Rule> {
    vec![("coordination.k8s.io", &["leases"], &["get", "create", "patch", "update"])]
}

fn rules(all: &[Vec<Rule>]) -> Value {
    let rule = |(group, resources, verbs): &Rule| json!({"apiGroups": [group], "resources": resources, "verbs": verbs});
    all.iter().flatten().map(rule).collect()
}

/// Bytes that a process has in memory.
pub fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Bytes as people read them.
pub fn mebibytes(bytes: u64) -> String {
    let mut text = String::new();
    let _ = write!(text, "{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    text
}
