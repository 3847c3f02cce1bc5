//! What goes with a Keyspace and what stays, and a namespace that ends without an operator.

use anyhow::ensure;
use serde_json::Value;

use crate::base::Run;
use crate::install::operators_wanted;
use crate::kube::{Seen, condition, until};

fn document(name: &str, namespace: &str, policy: &str) -> String {
    format!(
        "apiVersion: vasto.io/v1alpha1\nkind: Keyspace\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{shards: 2, replicationFactor: 1, deletionPolicy: {policy}}}\n"
    )
}

/// Deletes a keyspace, and waits until no pod and no Service of it is there.
fn delete(run: &Run, keyspace: &str) -> anyhow::Result<()> {
    run.kube.ctl_within(90, &["delete", "keyspace", keyspace, "--timeout=60s"])?;
    let labels = format!("vasto.io/keyspace={keyspace}");
    until(&format!("nothing of {keyspace} runs"), 120, || {
        let left =
            run.kube.ctl(&["get", "pods,statefulsets,services,poddisruptionbudgets", "-l", &labels, "-o", "name"])?;
        Ok(Seen::when(left.trim().is_empty(), || left.replace('\n', " ")))
    })
}

/// Deletes with Delete: everything goes. With Retain the volumes stay; a keyspace that
/// is made anew under the name says that they aren't its own, and leaves them alone.
pub fn both_policies(run: &mut Run) -> anyhow::Result<()> {
    for (name, policy) in [("gone", "Delete"), ("kept", "Retain")] {
        run.kube.apply(&document(name, "default", policy))?;
        run.settled(name, 2, 1, 120)?;
        run.vasto(&["put", name, "hello", "from the first life"])?;
    }
    delete(run, "gone")?;
    until("the volumes go with Delete", 90, || {
        let left = run.volumes("gone")?;
        Ok(Seen::when(left.is_empty(), || format!("{left:?}")))
    })?;
    let kept = run.volumes("kept")?;
    ensure!(kept.len() == 2, "volumes before the deletion: {kept:?}");
    delete(run, "kept")?;
    ensure!(run.volumes("kept")? == kept, "with Retain there is left {:?}, of {kept:?}", run.volumes("kept")?);

    run.kube.apply(&document("kept", "default", "Retain"))?;
    until("ForeignVolume is said", 120, || {
        let object = run.keyspace("kept")?;
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let said = conditions.iter().any(|c: &Value| c["reason"] == "ForeignVolume");
        Ok(Seen::when(said && !condition(&object, "Ready"), || object["status"].to_string()))
    })?;
    let answer = run.vasto(&["--timeout", "3s", "get", "kept", "hello"]);
    ensure!(answer.is_err(), "what was retained is served by another keyspace: {answer:?}");
    ensure!(
        run.volumes("kept")? == kept,
        "the retained volumes were touched: {:?}, before {kept:?}",
        run.volumes("kept")?
    );

    // The remedy: whoever doesn't want them deletes them.
    delete(run, "kept")?;
    ensure!(run.volumes("kept")? == kept, "the retained volumes went with the second keyspace");
    run.kube.ctl_within(90, &["delete", "persistentvolumeclaims", "-l", "vasto.io/keyspace=kept"])?;
    run.kube.apply(&document("kept", "default", "Delete"))?;
    run.settled("kept", 2, 1, 120)?;
    delete(run, "kept")
}

/// No finalizer waits for an operator that isn't there.
pub fn a_namespace(run: &mut Run) -> anyhow::Result<()> {
    // Of a step that failed.
    run.kube.ctl_within(90, &["delete", "namespace", "shop", "--ignore-not-found"])?;
    run.kube.ctl(&["create", "namespace", "shop"])?;
    run.kube.apply(&document("cart", "shop", "Delete"))?;
    run.kube.ctl_within(190, &["-n", "shop", "wait", "ks/cart", "--for=condition=Ready", "--timeout=180s"])?;
    // Its own name leads to it.
    run.vasto(&["put", "shop/cart", "hello", "world"])?;
    operators_wanted(run, 0)?;
    run.kube.ctl_within(190, &["delete", "namespace", "shop", "--timeout=180s"])?;
    operators_wanted(run, 2)
}
