//! The load's pods. They run beside the control plane, which no step drains.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::base::OPERATOR;
use crate::cluster::SHARED;
use crate::kube::{Kube, Seen, ready, restarts, until};

/// How long the load may take to read and compare every key.
const VERIFY: u64 = 120;

/// A running load.
pub struct Load {
    kube: Kube,
    pod: String,
}

/// A pod beside the control plane with the shared files.
pub fn pod(name: &str, command: &str, args: &[&str], restart: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "vasto-load"}},
        "spec": {
            "nodeSelector": {"node-role.kubernetes.io/control-plane": ""},
            "tolerations": [{"operator": "Exists"}],
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": VERIFY,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "fsGroup": 65532},
            "containers": [{
                "name": "load",
                "image": "vasto-load:dev",
                "imagePullPolicy": "Never",
                "command": [command],
                "args": args,
                "securityContext": {"readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false},
                "volumeMounts": [
                    {"name": "shared", "mountPath": SHARED, "readOnly": true},
                    {"name": "tmp", "mountPath": "/tmp"},
                ],
            }],
            "volumes": [
                {"name": "shared", "hostPath": {"path": SHARED, "type": "DirectoryOrCreate"}},
                // It stays when the container is restarted, and the ledger in it.
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    })
}

impl Load {
    /// Starts one on a keyspace, and waits until it has written every key once.
    pub fn start(kube: &Kube, name: &str, keyspace: &str, settings: &[&str]) -> anyhow::Result<Self> {
        let load = Self { kube: kube.clone(), pod: name.to_owned() };
        let args = [&[keyspace, "--operator", OPERATOR, "--ledger", "/tmp/ledger"], settings].concat();
        kube.apply(&pod(name, "vasto-load", &args, "Always").to_string())?;
        until(&format!("a load on {keyspace}"), 120, || {
            let counts = load.ask("counts", 20)?;
            Ok(Seen::when(counts["operations"].as_u64() > Some(0), || counts.to_string()))
        })?;
        Ok(load)
    }

    /// Its pod's name.
    pub fn pod(&self) -> &str {
        &self.pod
    }

    fn ask(&self, question: &str, seconds: u64) -> anyhow::Result<Value> {
        let text = self.kube.ctl_within(seconds, &["exec", &self.pod, "--", "vasto-load", "ask", question])?;
        serde_json::from_str(&text).with_context(|| format!("the load answers {text:?}"))
    }

    /// What happened since the last mark.
    pub fn mark(&self) -> anyhow::Result<Value> {
        self.ask("mark", 30)
    }

    /// Holds the load still and reads every key.
    pub fn verify(&self) -> anyhow::Result<Value> {
        self.ask("verify", VERIFY)
    }

    /// Waits for so many more operations.
    pub fn more(&self, operations: u64) -> anyhow::Result<()> {
        let done = |counts: &Value| counts["operations"].as_u64().unwrap_or_default();
        let before = done(&self.ask("counts", 30)?);
        until(&format!("{operations} more operations"), 120, || {
            let now = done(&self.ask("counts", 30)?);
            Ok(Seen::when(now >= before + operations, || format!("{} more", now.saturating_sub(before))))
        })
    }

    /// How often it was restarted.
    pub fn restarts(&self) -> anyhow::Result<u64> {
        let pod = self.kube.get(&["pod", &self.pod])?.context("the load's pod is gone")?;
        ensure!(ready(&pod), "the load's pod is not ready");
        Ok(restarts(&pod))
    }

    /// What it complained of.
    pub fn words(&self) -> anyhow::Result<String> {
        let log = self.kube.ctl(&["logs", &self.pod])?;
        let told =
            |line: &&str| ["{\"failed\"", "{\"lost\"", "{\"unknown\""].iter().any(|start| line.starts_with(start));
        Ok(log.lines().filter(told).take(10).collect::<Vec<_>>().join("\n"))
    }

    /// Ends it by SIGTERM: it reads every key once more, and its last words are its verdict.
    pub fn end(self) -> anyhow::Result<()> {
        // The log goes with the pod, so it is read while that ends.
        let mut log = self.kube.follow(VERIFY + 60, &["logs", "-f", "--tail=1", &self.pod])?;
        log.next().context("the load's log is empty")?;
        let grace = VERIFY.to_string();
        self.kube.ctl_within(VERIFY + 60, &["delete", "pod", &self.pod, "--grace-period", &grace])?;
        let log: Vec<String> = log.collect();
        let last: Value = log.iter().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        ensure!(last["verified"].is_object(), "the load's last words are no verdict: {last}");
        ensure!(last["failed"] == 0 && last["lost"] == 0, "the load's last words: {last}");
        Ok(())
    }
}
