//! What a failed step leaves for whoever looks into it.

use std::path::{Path, PathBuf};

use crate::base::{Run, SYSTEM};
use crate::kube::{name, restarts};

/// Collects logs, events and descriptions into a folder of the step's name.
pub fn collect(run: &Run, step: &str, error: &str) -> PathBuf {
    let folder = std::env::var_os("VASTO_E2E_DIR").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| run.kube.folder.with_file_name("e2e-failure"));
    let folder = folder.join(step.replace(' ', "-").replace('\'', ""));
    if let Err(why) = std::fs::create_dir_all(&folder) {
        println!("        {} can't be made: {why}", folder.display());
        return folder;
    }
    keep(&folder, "error.txt", error);
    let all =
        "pods,statefulsets,services,persistentvolumeclaims,persistentvolumes,poddisruptionbudgets,deployments,leases";
    for (file, args) in [
        ("keyspaces.yaml", &["get", "keyspaces", "-A", "-o", "yaml"][..]),
        ("keyspaces.txt", &["describe", "keyspaces", "-A"]),
        ("nodes.txt", &["describe", "nodes"]),
        ("objects.txt", &["get", all, "-A", "-o", "wide"]),
        ("objects.yaml", &["get", "statefulsets,persistentvolumeclaims,poddisruptionbudgets", "-o", "yaml"]),
        ("pods.txt", &["describe", "pods"]),
        ("operators.txt", &["describe", "pods", "-n", SYSTEM]),
        ("events.txt", &["get", "events.events.k8s.io", "-A", "--sort-by=.metadata.creationTimestamp", "-o", "wide"]),
    ] {
        print(run, &folder, file, args);
    }
    for namespace in [SYSTEM, "default"] {
        let pods = run.kube.list(&["pods", "-n", namespace]).unwrap_or_default();
        for pod in &pods {
            print(run, &folder, &format!("{}.log", name(pod)), &["logs", "-n", namespace, name(pod)]);
            if restarts(pod) > 0 {
                let file = format!("{}.previous.log", name(pod));
                print(run, &folder, &file, &["logs", "-n", namespace, name(pod), "--previous"]);
            }
        }
    }
    folder
}

fn print(run: &Run, folder: &Path, file: &str, args: &[&str]) {
    let words = run.kube.try_ctl(60, args).map_or_else(|error| format!("{error:#}"), |output| output.words());
    keep(folder, file, &words);
}

fn keep(folder: &Path, file: &str, words: &str) {
    if let Err(why) = std::fs::write(folder.join(file), words) {
        println!("        {file} can't be written: {why}");
    }
}
