//! The chart from its package, the example, the package index; and the chart's going and coming.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::base::{OPERATOR, PACKAGES, Run, SYSTEM, checkout};
use crate::cluster::{self, SHARED};
use crate::kube::{Kube, Seen, name, until};
use crate::load::pod;

/// The file with the Debian package index, as JSON lines.
pub const INDEX: &str = "debian.jsonl";
/// The mark on the Keyspace that it is in it.
const LOADED: &str = "vasto.io~1e2e-loaded";

/// kubectl's plugin is the binary under another name.
pub fn put_the_plugin(kube: &Kube) -> anyhow::Result<()> {
    let bin = kube.folder.join("bin");
    std::fs::create_dir_all(&bin)?;
    let plugin = bin.join("kubectl-vasto");
    if plugin.symlink_metadata().is_ok() {
        std::fs::remove_file(&plugin)?;
    }
    let vasto = std::env::current_exe()?.with_file_name("vasto");
    std::os::unix::fs::symlink(vasto, plugin).map_err(Into::into)
}

/// helm package: what is installed is what would be published.
pub fn package_the_chart(run: &Run) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(&run.kube.folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "tgz") {
            std::fs::remove_file(path)?;
        }
    }
    let chart = checkout().join("charts/vasto");
    let (chart, folder) = (chart.display().to_string(), run.kube.folder.display().to_string());
    run.kube.helm(&["package", &chart, "--destination", &folder]).map(drop)
}

fn package(run: &Run) -> anyhow::Result<String> {
    let found = std::fs::read_dir(&run.kube.folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let package = found.into_iter().find(|path| path.extension().is_some_and(|e| e == "tgz"));
    Ok(package.context("helm package left no .tgz")?.display().to_string())
}

/// Installs the chart, or changes what is installed, to this image and these values; waits for it.
pub fn release(run: &Run, tag: &str, values: &[&str]) -> anyhow::Result<()> {
    let package = package(run)?;
    let tag = format!("image.tag={tag}");
    let mut args =
        vec!["upgrade", "--install", "vasto", &package, "-n", SYSTEM, "--create-namespace", "--reset-values"];
    args.extend(["--set", "image.repository=vasto", "--set", &tag]);
    for value in values {
        args.extend(["--set", value]);
    }
    args.extend(["--wait", "--timeout", "180s"]);
    run.kube.helm(&args)?;
    rolled_out(run)
}

/// Waits until only pods of the newest template are there, and all of them are ready.
pub fn rolled_out(run: &Run) -> anyhow::Result<()> {
    let args = ["-n", SYSTEM, "rollout", "status", "deployment/vasto-operator", "--timeout=170s"];
    run.kube.ctl_within(180, &args)?;
    let deployment = || run.kube.get(&["-n", SYSTEM, "deployment", "vasto-operator"]);
    let wanted = deployment()?.unwrap_or_default()["spec"]["replicas"].as_u64();
    until("no operator of before", 60, || {
        let there = operators(run)?.len() as u64;
        Ok(Seen::when(Some(there) == wanted, || format!("{there} pods, {wanted:?} wanted")))
    })
}

/// The operator's pods.
pub fn operators(run: &Run) -> anyhow::Result<Vec<Value>> {
    run.kube.list(&["-n", SYSTEM, "pods", "-l", "app.kubernetes.io/name=vasto,app.kubernetes.io/component=operator"])
}

/// Sets the number of operators, and waits for it.
pub fn operators_wanted(run: &Run, number: usize) -> anyhow::Result<()> {
    let replicas = format!("--replicas={number}");
    run.kube.ctl(&["-n", SYSTEM, "scale", "deployment/vasto-operator", &replicas])?;
    if number > 0 {
        return rolled_out(run);
    }
    until("no operator", 90, || {
        let there = operators(run)?;
        Ok(Seen::when(there.is_empty(), || format!("{:?}", there.iter().map(name).collect::<Vec<_>>())))
    })
}

/// Two operators of the image under test, whatever there was.
pub fn be_installed(run: &Run) -> anyhow::Result<()> {
    let there = operators(run)?;
    let fine = |pod: &Value| crate::kube::ready(pod) && pod["spec"]["containers"][0]["image"] == "vasto:dev";
    if there.len() == 2 && there.iter().all(fine) { Ok(()) } else { release(run, "dev", &[]) }
}

pub fn install(run: &mut Run) -> anyhow::Result<()> {
    release(run, "dev", &[])?;
    let tested = run.kube.helm(&["test", "vasto", "-n", SYSTEM, "--timeout", "120s"])?;
    ensure!(tested.contains("Succeeded"), "helm test: {tested}");
    Ok(())
}

/// As the README has it.
pub fn apply_the_example(run: &mut Run) -> anyhow::Result<()> {
    let file = checkout().join("examples/keyspace.yaml").display().to_string();
    run.kube.ctl(&["apply", "-f", &file])?;
    run.kube.ctl_within(190, &["wait", "ks/packages", "--for=condition=Ready", "--timeout=180s"])?;
    run.settled(PACKAGES, 3, 2, 60)?;
    let columns = run.kube.ctl(&["get", "ks"])?;
    let head = columns.lines().next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(head == "NAME SHARDS READY REPLICATION PHASE VERSION AGE", "kubectl get ks shows {head}");
    Ok(())
}

/// apt's own index as JSON lines, in the folder of the run.
fn index(run: &Run) -> anyhow::Result<()> {
    let path = run.kube.folder.join(INDEX);
    if path.exists() {
        return Ok(());
    }
    let half = path.with_extension("half");
    let dump = Command::new("apt-cache").arg("dumpavail").stdout(Stdio::piped()).spawn().context("apt-cache")?;
    let filter = Command::new(checkout().join("examples/debian-packages"))
        .stdin(dump.stdout.context("apt-cache gives nothing")?)
        .stdout(std::fs::File::create(&half)?)
        .status()?;
    ensure!(filter.success(), "examples/debian-packages failed; run apt-get update first");
    std::fs::rename(half, path).map_err(Into::into)
}

pub fn load_the_index(run: &mut Run) -> anyhow::Result<()> {
    be_loaded(run)
}

/// Loads the index, where that has not been done.
pub fn be_loaded(run: &Run) -> anyhow::Result<()> {
    index(run)?;
    let mark = format!("/metadata/annotations/{LOADED}");
    if run.keyspace(PACKAGES)?.pointer(&mark).is_some() {
        return Ok(());
    }
    cluster::share(&run.kube.folder.join(INDEX))?;
    let file = format!("{SHARED}/{INDEX}");
    run.kube.ctl(&["delete", "pod", "index", "--ignore-not-found"])?;
    let args = ["--operator", OPERATOR, "load", PACKAGES, &file];
    run.kube.apply(&pod("index", "vasto", &args, "Never").to_string())?;
    until("the index loaded", 180, || {
        let pod = run.pod("index")?;
        let phase = &pod["status"]["phase"];
        ensure!(phase != "Failed", "vasto load failed");
        Ok(Seen::when(phase == "Succeeded", || phase.to_string()))
    })?;
    let said = run.kube.ctl(&["logs", "index"])?;
    ensure!(said.contains("loaded"), "vasto load says {said}");
    run.kube.ctl(&["delete", "pod", "index"])?;
    let mark = format!("{}=true", LOADED.replace("~1", "/"));
    run.kube.ctl(&["annotate", "keyspace", PACKAGES, &mark]).map(drop)
}

/// Nothing of Vasto's but its operator goes; the next operator takes up what there is.
pub fn uninstall_and_return(run: &mut Run) -> anyhow::Result<()> {
    let (lives, replicas) = (run.lives(PACKAGES)?, run.replicas(PACKAGES)?);
    run.kube.helm(&["uninstall", "vasto", "-n", SYSTEM, "--wait", "--timeout", "120s"])?;
    until("no operator", 90, || Ok(Seen::when(operators(run)?.is_empty(), || "there still is one".to_owned())))?;
    run.kube.ctl(&["get", "customresourcedefinition", "keyspaces.vasto.io"]).context("helm uninstall took the CRD")?;
    run.keyspace(PACKAGES).context("helm uninstall took a keyspace")?;
    run.load()?.more(3_000)?;
    release(run, "dev", &[])?;
    crate::operator::works(run)?;
    run.settled(PACKAGES, 3, 2, 120)?;
    ensure!(run.lives(PACKAGES)? == lives, "a store was restarted: {:?}, before {lives:?}", run.lives(PACKAGES)?);
    ensure!(
        run.replicas(PACKAGES)? == replicas,
        "replicas are made anew: {:?}, before {replicas:?}",
        run.replicas(PACKAGES)?
    );
    Ok(())
}
