//! Gateways as the chart runs them, and the console behind whichever operator answers.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::base::{PACKAGES, Run, SYSTEM};
use crate::install::{operators, release};
use crate::kube::{Seen, name, until};

fn service(path: &str) -> String {
    format!("/api/v1/namespaces/{SYSTEM}/services/vasto-gateway:http/proxy{path}")
}

/// HTTP through the API server, Redis' protocol through a forwarded port: one map.
pub fn serves(run: &mut Run) -> anyhow::Result<()> {
    release(run, "dev", &["gateway.enabled=true", &format!("gateway.keyspace={PACKAGES}")])?;
    let status = ["-n", SYSTEM, "rollout", "status", "deployment/vasto-gateway", "--timeout=120s"];
    run.kube.ctl_within(130, &status)?;
    let word = run.kube.folder.join("word");
    std::fs::write(&word, "a word")?;
    let key = service(&format!("/v1/{PACKAGES}/e2e-gateway"));
    run.kube.ctl(&["create", "--raw", &format!("{key}?op=append"), "-f", &word.display().to_string()])?;
    until("what was written is read", 20, || {
        let read = run.kube.ctl(&["get", "--raw", &key])?;
        Ok(Seen::when(read == "a word", || read.clone()))
    })?;

    let mut lines = run.kube.follow(60, &["-n", SYSTEM, "port-forward", "service/vasto-gateway", ":6379"])?;
    let line = lines.next().context("kubectl port-forward said nothing")?;
    let address = line.split_whitespace().find(|word| word.starts_with("127.0.0.1:"));
    let mut redis = TcpStream::connect(address.with_context(|| format!("no address in {line:?}"))?)?;
    redis.set_read_timeout(Some(Duration::from_secs(20)))?;
    redis.write_all(b"GET e2e-gateway\r\nDEL e2e-gateway\r\n")?;
    let answers: Vec<String> = BufReader::new(redis).lines().take(3).collect::<Result<_, _>>()?;
    ensure!(answers == ["$6", "a word", ":1"], "{answers:?}");
    drop(lines);

    // The one that leads draws all there is; the others ask it.
    for pod in operators(run)? {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{}:8282/proxy/console.json", name(&pod));
        let state: serde_json::Value = serde_json::from_str(&run.kube.ctl(&["get", "--raw", &path])?)?;
        let names: Vec<&str> =
            state["keyspaces"].as_array().into_iter().flatten().filter_map(|k| k["name"].as_str()).collect();
        ensure!(names.iter().any(|n| n.ends_with(PACKAGES)), "{} shows {names:?}", name(&pod));
    }
    release(run, "dev", &[])?;
    until("no gateway", 60, || {
        let left = run.kube.get(&["-n", SYSTEM, "deployment", "vasto-gateway"])?;
        Ok(Seen::when(left.is_none(), || "its Deployment is there".to_owned()))
    })
}
