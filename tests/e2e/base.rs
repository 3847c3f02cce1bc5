//! What every step stands on: the cluster, the operator, the keyspace `packages` with
//! the Debian package index in it, and a load; and what holds after every step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::kube::{Kube, Seen, name, ready, restarts, uid, until};
use crate::load::Load;
use crate::{cluster, install};

/// The keyspace that the steps are about.
pub const PACKAGES: &str = "packages";
/// Where the operator runs.
pub const SYSTEM: &str = "vasto-system";
/// How clients in the cluster reach it.
pub const OPERATOR: &str = "vasto-operator.vasto-system.svc:8278";

/// The checkout that this was built from.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// One run of the tier.
pub struct Run {
    pub kube: Kube,
    load: Option<Load>,
    loads: u32,
    said: Vec<String>,
}

/// A store's pod, as it must stay while nobody has a reason to restart it.
pub type Life = (String, u64);

/// Where the files of a run are, in the target folder.
pub fn folder() -> anyhow::Result<PathBuf> {
    let target = std::env::var("CARGO_TARGET_DIR").context("CARGO_TARGET_DIR is not set: start this by ./dev e2e")?;
    let folder = PathBuf::from(target).join("e2e");
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

impl Run {
    /// Makes the cluster and what is to be put into it.
    pub fn begin(kube: Kube, reuse: bool) -> anyhow::Result<Self> {
        install::put_the_plugin(&kube)?;
        cluster::make(&kube, reuse)?;
        let mut run = Self { kube, load: None, loads: 0, said: Vec::new() };
        run.give_up_the_load();
        install::package_the_chart(&run)?;
        Ok(run)
    }

    /// Something for the line of the step.
    pub fn say(&mut self, words: String) {
        self.said.push(words);
    }

    /// What the step said.
    pub fn said(&mut self) -> String {
        std::mem::take(&mut self.said).iter().map(|words| format!(", {words}")).collect()
    }

    /// Ends the cluster.
    pub fn end(&self) {
        if let Err(error) = cluster::delete(&self.kube) {
            println!("the cluster is left: {error:#}");
        }
    }

    /// Puts right what a failed step may have left, and starts what is missing.
    pub fn as_it_should_be(&mut self) -> anyhow::Result<()> {
        for node in self.kube.list(&["nodes"])? {
            if node["spec"]["unschedulable"] == true {
                self.kube.ctl(&["uncordon", name(&node)])?;
            }
        }
        until("all nodes ready", 120, || cluster::all_ready(&self.kube))?;
        install::be_installed(self)?;
        for other in self.kube.list(&["keyspaces"])?.iter().map(name).filter(|name| *name != PACKAGES) {
            self.kube.ctl(&["delete", "keyspace", other])?;
            self.kube
                .ctl_within(90, &["delete", "persistentvolumeclaims", "-l", &format!("vasto.io/keyspace={other}")])?;
        }
        if self.kube.get(&["keyspace", PACKAGES])?.is_none() {
            install::apply_the_example(self)?;
        }
        self.scale(3)?;
        self.settled(PACKAGES, 3, 2, 180)?;
        install::be_loaded(self)?;
        if self.load.is_none() {
            self.start_load(&[])?;
        }
        Ok(())
    }

    /// The load on `packages`.
    pub fn load(&self) -> anyhow::Result<&Load> {
        self.load.as_ref().context("there is no load")
    }

    /// Starts a load on `packages`, on keys that none had before, with these settings.
    pub fn start_load(&mut self, settings: &[&str]) -> anyhow::Result<()> {
        self.loads += 1;
        let range = format!("{}-{}", std::process::id(), self.loads);
        // A pod that is still ending has its name to itself.
        let pod = format!("load-{range}");
        let given = format!("{}/{}", cluster::SHARED, install::INDEX);
        let settings = [settings, &["--range", &range, "--given", &given]].concat();
        let load = Load::start(&self.kube, &pod, PACKAGES, &settings)?;
        self.load = Some(load);
        Ok(())
    }

    /// Ends the load, which has to find every key as it should be.
    pub fn end_load(&mut self) -> anyhow::Result<()> {
        match self.load.take() {
            Some(load) => load.end(),
            None => Ok(()),
        }
    }

    /// What a failed step lost is no news in the next one: that begins with a new load.
    pub fn give_up_the_load(&mut self) {
        self.load = None;
        let args = ["delete", "pod", "-l", "app=vasto-load", "--force", "--grace-period=0", "--ignore-not-found"];
        // If that fails, the next load can't be started, and says why.
        let _ = self.kube.try_ctl(60, &args);
    }

    /// After a step: nothing failed, every key is as it should be, all copies are equal. In words.
    pub fn is_whole(&mut self) -> anyhow::Result<String> {
        self.settled(PACKAGES, 3, 2, 120)?;
        let load = self.load()?;
        let verdict = load.verify()?;
        ensure!(verdict["lost"] == 0, "lost: {verdict}");
        self.check(PACKAGES)?;
        self.every_operator_serves()?;
        let counts = load.mark()?;
        ensure!(counts["failed"] == 0 && counts["lost"] == 0, "the load: {counts}; it says:\n{}", load.words()?);
        ensure!(counts["operations"].as_u64() > Some(0), "the load stood still: {counts}");
        Ok(format!(
            "  ({} operations, {} unknown, p99 {:.0} ms, longest {:.0} ms)",
            counts["operations"],
            counts["unknown"],
            counts["p99_ms"].as_f64().unwrap_or_default(),
            counts["longest_ms"].as_f64().unwrap_or_default()
        ))
    }

    /// Each of the operators tells clients where the data is, whether it leads or not.
    fn every_operator_serves(&self) -> anyhow::Result<()> {
        install::rolled_out(self)?;
        for pod in install::operators(self)? {
            let address = format!("{}:8278", pod["status"]["podIP"].as_str().unwrap_or_default());
            let exec = ["exec", self.load()?.pod(), "--", "vasto", "--operator", &address, "get", PACKAGES, "bash"];
            self.kube.ctl(&exec).with_context(|| format!("by the operator {}", name(&pod)))?;
        }
        Ok(())
    }

    /// Compares all copies of a keyspace, as `vasto check` does.
    pub fn check(&self, keyspace: &str) -> anyhow::Result<()> {
        self.vasto(&["check", keyspace]).map(drop)
    }

    /// Runs the binary in a pod.
    pub fn vasto(&self, args: &[&str]) -> anyhow::Result<String> {
        let exec = ["exec", self.load()?.pod(), "--", "vasto", "--operator", OPERATOR];
        self.kube.ctl_within(120, &[&exec, args].concat())
    }

    /// A keyspace of the default namespace.
    pub fn keyspace(&self, keyspace: &str) -> anyhow::Result<Value> {
        self.kube.get(&["keyspace", keyspace])?.with_context(|| format!("there is no keyspace {keyspace}"))
    }

    /// kubectl scale, where it isn't asked for already.
    pub fn scale(&self, shards: u32) -> anyhow::Result<()> {
        let shards = shards.to_string();
        self.kube.ctl(&["scale", "keyspace", PACKAGES, "--replicas", &shards]).map(drop)
    }

    /// Waits until nothing is changing, the committed size is this, and so are pods and volumes.
    pub fn settled(&self, keyspace: &str, shards: u64, copies: u64, seconds: u64) -> anyhow::Result<Value> {
        let what = format!("{keyspace} settled at {shards} shards of {copies}");
        until(&what, seconds, || {
            let object = self.keyspace(keyspace)?;
            let status = &object["status"];
            let fine = status["phase"] == "Ready"
                && status["shards"] == shards
                && status["replicas"] == shards * copies
                && status["readyReplicas"] == status["replicas"]
                && status["observedGeneration"] == object["metadata"]["generation"]
                && object.pointer("/metadata/annotations/vasto.io~1replace").is_none();
            if !fine {
                let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
                let told = |c: &Value| format!("{}={} {}: {}", c["type"], c["status"], c["reason"], c["message"]);
                let conditions: Vec<String> = conditions.iter().map(told).collect();
                let (phase, ready) = (&status["phase"], &status["ready"]);
                return Ok(Seen::No(format!("phase {phase}, ready {ready}, {}", conditions.join("; "))));
            }
            let pods = self.pods(keyspace)?;
            let volumes = self.volumes(keyspace)?;
            let all = pods.len() as u64 == shards && pods.iter().all(ready) && volumes.len() as u64 == shards;
            let pods: Vec<String> = pods.iter().map(|p| format!("{} ready {}", name(p), ready(p))).collect();
            Ok(if all { Seen::Yes(object) } else { Seen::No(format!("pods {pods:?}, volumes {:?}", volumes.keys())) })
        })
    }

    /// The stores' pods of a keyspace.
    pub fn pods(&self, keyspace: &str) -> anyhow::Result<Vec<Value>> {
        self.kube.list(&["pods", "-l", &format!("vasto.io/keyspace={keyspace},app.kubernetes.io/component=store")])
    }

    /// Name and uid of each volume claim of a keyspace.
    pub fn volumes(&self, keyspace: &str) -> anyhow::Result<BTreeMap<String, String>> {
        let claims = self.kube.list(&["persistentvolumeclaims", "-l", &format!("vasto.io/keyspace={keyspace}")])?;
        Ok(claims.iter().map(|claim| (name(claim).to_owned(), uid(claim).to_owned())).collect())
    }

    /// Each store's pod by name, so that a restart is seen.
    pub fn lives(&self, keyspace: &str) -> anyhow::Result<BTreeMap<String, Life>> {
        let pods = self.pods(keyspace)?;
        Ok(pods.iter().map(|pod| (name(pod).to_owned(), (uid(pod).to_owned(), restarts(pod)))).collect())
    }

    /// A pod of the default namespace.
    pub fn pod(&self, pod: &str) -> anyhow::Result<Value> {
        self.kube.get(&["pod", pod])?.with_context(|| format!("there is no pod {pod}"))
    }

    /// Waits until there is a ready pod of this name that isn't the one with this uid.
    pub fn another(&self, pod: &str, old: &str, seconds: u64) -> anyhow::Result<()> {
        until(&format!("another {pod}, ready"), seconds, || {
            let now = self.pod(pod)?;
            Ok(Seen::when(uid(&now) != old && ready(&now), || {
                let mine = if uid(&now) == old { "the old one" } else { "the new one" };
                format!("{mine}, ready {}, {}", ready(&now), now["status"]["phase"])
            }))
        })
    }

    /// The node that a pod is on.
    pub fn node_of(&self, pod: &str) -> anyhow::Result<String> {
        let pod = self.pod(pod)?;
        pod["spec"]["nodeName"].as_str().map(str::to_owned).context("the pod is on no node")
    }

    /// The ids of the replicas that clients use, by store and shard.
    pub fn replicas(&self, keyspace: &str) -> anyhow::Result<Vec<(String, u32, u64)>> {
        let topology = vasto_tests::cluster::topology(&self.keyspace(keyspace)?);
        let Some(current) = topology.current else { bail!("{keyspace} has no placement") };
        let mut replicas: Vec<(String, u32, u64)> =
            current.places().map(|p| (p.assignment.store.clone(), p.shard, p.assignment.replica)).collect();
        replicas.sort();
        Ok(replicas)
    }
}
