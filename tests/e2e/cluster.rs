//! The kind cluster: a control plane and three workers, each a zone of its own. What
//! must outlive the workers' drains, the load above all, runs beside the control plane.

use std::path::Path;

use anyhow::Context as _;

use crate::base::checkout;
use crate::kube::{Kube, Seen, condition, name, uid, until};
use crate::process::{command, succeed};

const CLUSTER: &str = "vasto-e2e";
const CONTROL: &str = "vasto-e2e-control-plane";
const NODE_IMAGE: &str = "kube-tools/node:v1.34.4";
/// Where the control plane's node has what pods may read.
pub const SHARED: &str = "/e2e";

/// Everything that a container of this cluster is named.
fn nodes() -> anyhow::Result<Vec<String>> {
    let mut kind = command("kind", 60);
    kind.args(["get", "nodes", "--name", CLUSTER]);
    let mut nodes: Vec<String> = succeed(kind, "")?.lines().map(str::to_owned).collect();
    nodes.sort();
    Ok(nodes)
}

/// Makes the cluster, unless it is there and may be used again; puts the images into it.
pub fn make(kube: &Kube, reuse: bool) -> anyhow::Result<()> {
    let there = !nodes()?.is_empty();
    if !(reuse && there) {
        delete(kube)?;
        let mut kind = command("kind", 300);
        let config = checkout().join("tests/kube/cluster.yaml");
        kind.args(["create", "cluster", "--name", CLUSTER, "--image", NODE_IMAGE, "--wait", "180s", "--quiet"]);
        kind.arg("--config").arg(config).arg("--kubeconfig").arg(kube.config());
        succeed(kind, "")?;
    }
    // The same content under another name is another image to Kubernetes.
    docker(&["tag", "vasto:dev", "vasto:dev2"])?;
    let archive = kube.folder.join("images.tar").display().to_string();
    docker(&["save", "-o", &archive, "vasto:dev", "vasto:dev2"])?;
    load(&["image-archive", &archive])?;
    load(&["docker-image", "vasto-load:dev", "--nodes", CONTROL])?;
    until("all nodes ready", 120, || all_ready(kube))
}

/// Puts images into nodes.
fn load(what: &[&str]) -> anyhow::Result<()> {
    let mut kind = command("kind", 240);
    kind.arg("load").args(what).args(["--name", CLUSTER]);
    succeed(kind, "").map(drop)
}

/// Ends the cluster.
pub fn delete(kube: &Kube) -> anyhow::Result<()> {
    let mut kind = command("kind", 120);
    kind.args(["delete", "cluster", "--name", CLUSTER]).arg("--kubeconfig").arg(kube.config());
    succeed(kind, "").map(drop)
}

fn docker(args: &[&str]) -> anyhow::Result<String> {
    let mut docker = command("docker", 120);
    docker.args(args);
    succeed(docker, "")
}

/// Gives the pods beside the control plane a file to read.
pub fn share(file: &Path) -> anyhow::Result<()> {
    docker(&["exec", CONTROL, "mkdir", "-p", SHARED])?;
    let to = format!("{CONTROL}:{SHARED}/");
    docker(&["cp", "-q", file.to_str().context("a path of UTF-8")?, &to]).map(drop)
}

/// A power cut: every node is killed, and starts again in another order, so that
/// docker gives each the address of another.
pub fn restart_every_node() -> anyhow::Result<()> {
    let mut nodes = nodes()?;
    let all: Vec<&str> = nodes.iter().map(String::as_str).collect();
    docker(&[&["kill"], all.as_slice()].concat())?;
    nodes.rotate_left(1);
    let all: Vec<&str> = nodes.iter().map(String::as_str).collect();
    docker(&[&["start"], all.as_slice()].concat()).map(drop)
}

/// One node's power is cut.
pub fn kill_node(node: &str) -> anyhow::Result<()> {
    docker(&["kill", node]).map(drop)
}

/// A node that Kubernetes had struck off comes back as a new one.
pub fn start_node(node: &str) -> anyhow::Result<()> {
    docker(&["start", node])?;
    // It may get another range of addresses for its pods, which its network agent then writes anew.
    docker(&["exec", node, "rm", "-f", "/etc/cni/net.d/10-node-net.conflist"]).map(drop)
}

/// Sends a signal to the vasto process of a pod, as its node's kernel might.
pub fn signal(pod: &serde_json::Value, signal: &str) -> anyhow::Result<()> {
    let node = pod["spec"]["nodeName"].as_str().context("the pod is on no node")?;
    let uid = uid(pod);
    // The kubelet writes a pod's uid into its cgroup with underscores.
    let script = format!(
        "for p in $(pgrep -x vasto); do grep -qE '{uid}|{}' /proc/$p/cgroup && kill -{signal} $p && n=1; done; [ $n ]",
        uid.replace('-', "_")
    );
    docker(&["exec", node, "sh", "-c", &script]).map(drop)
}

/// Whether every node is ready and takes pods.
pub fn all_ready(kube: &Kube) -> anyhow::Result<Seen<()>> {
    let nodes = kube.list(&["nodes"])?;
    let fine = |node: &serde_json::Value| condition(node, "Ready") && node["spec"]["unschedulable"] != true;
    let not: Vec<&str> = nodes.iter().filter(|node| !fine(node)).map(name).collect();
    Ok(Seen::when(nodes.len() == 4 && not.is_empty(), || format!("{} nodes, not ready: {not:?}", nodes.len())))
}
