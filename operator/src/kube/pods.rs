//! What pods say of themselves, and which one is restarted next. Pure.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::ResourceExt;

use crate::observe::ordinal;

/// The store that a pod of this keyspace is.
pub(crate) fn store_of(keyspace: &str, pod: &str) -> Option<String> {
    let store = pod.strip_prefix(keyspace)?.strip_prefix('-')?;
    ordinal(store).map(|_| store.to_owned())
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

/// Why no node takes the pod, if none does.
pub(crate) fn unschedulable(pod: &Pod) -> Option<&str> {
    let scheduled = condition(pod, "PodScheduled")?;
    // The scheduler's own troubles pass.
    (scheduled.status == "False" && scheduled.reason.as_deref() == Some("Unschedulable"))
        .then(|| scheduled.message.as_deref().unwrap_or("no node takes it"))
}

/// Whether its store serves what it is assigned, as its own probe says.
pub(crate) fn ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && condition(pod, "Ready").is_some_and(|c| c.status == "True")
}

fn revision(pod: &Pod) -> Option<&str> {
    pod.labels().get("controller-revision-hash").map(String::as_str)
}

fn running(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.as_ref());
    statuses.into_iter().flatten().any(|c| c.state.as_ref().is_some_and(|s| s.running.is_some()))
}

/// Why the pod's container does not run, if it can't.
pub(crate) fn failing(pod: &Pod) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find_map(|c| {
        let waiting = c.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref()?;
        let usual = ["ContainerCreating", "PodInitializing"].contains(&reason);
        let last = c.last_state.as_ref().and_then(|s| s.terminated.as_ref()).and_then(|t| t.message.clone());
        let why = last.or_else(|| waiting.message.clone()).map_or_else(String::new, |m| format!(": {m}"));
        (!usual).then(|| format!("{reason}{why}"))
    })
}

/// How a roll-out goes on.
#[derive(Debug, PartialEq)]
pub(crate) enum Roll<'a> {
    /// Every pod is as the template says.
    Done,
    /// This one is restarted now.
    Next(&'a Pod),
    /// Something must come first.
    Wait(String),
}

/// The next pod to restart: first those that don't run anyway, then the greatest ordinal, one at a time, and only
/// while `safe` says that every shard has its other replicas in sync.
pub(crate) fn next<'a>(stores: &StatefulSet, pods: &[&'a Pod], safe: Result<(), String>) -> Roll<'a> {
    let status = stores.status.as_ref();
    let observed = status.and_then(|s| s.observed_generation) >= stores.metadata.generation;
    let Some(wanted) = status.and_then(|s| s.update_revision.as_deref()).filter(|_| observed) else {
        return Roll::Wait("the StatefulSet's new revision is not known yet".to_owned());
    };
    let number = |pod: &Pod| pod.name_any().rsplit('-').next().and_then(|n| n.parse::<u32>().ok());
    let mut outdated: Vec<&'a Pod> =
        pods.iter().copied().filter(|p| revision(p).is_some_and(|r| r != wanted)).collect();
    outdated.sort_by_key(|pod| std::cmp::Reverse(number(pod)));
    let Some(first) = outdated.first().copied() else { return Roll::Done };
    if let Some(stopping) = pods.iter().find(|p| p.metadata.deletion_timestamp.is_some()) {
        return Roll::Wait(format!("{} is stopping", stopping.name_any()));
    }
    if let Some(dead) = outdated.iter().find(|pod| !running(pod)) {
        return Roll::Next(dead);
    }
    // One that was just restarted may be gone from here before its store's end has been heard of.
    let all = stores.spec.replicas.and_then(|n| usize::try_from(n).ok()).unwrap_or_default();
    if pods.len() < all {
        return Roll::Wait(format!("{} of {all} pods are there", pods.len()));
    }
    if let Some(unready) = pods.iter().find(|p| revision(p) == Some(wanted) && !ready(p)) {
        return Roll::Wait(format!("{} is not ready yet", unready.name_any()));
    }
    match safe {
        Ok(()) => Roll::Next(first),
        Err(why) => Roll::Wait(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, revision: &str, ready: bool, running: bool) -> Pod {
        let state = if running { json!({"running": {}}) } else { json!({"waiting": {"reason": "ImagePullBackOff"}}) };
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"controller-revision-hash": revision}},
            "status": {
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
                "containerStatuses": [{"name": "store", "image": "", "imageID": "", "ready": ready, "restartCount": 0, "state": state}],
            },
        }))
        .unwrap()
    }

    fn stores(observed: i64) -> StatefulSet {
        serde_json::from_value(json!({
            "metadata": {"generation": 2},
            "spec": {"replicas": 3, "selector": {}, "serviceName": "a-store", "template": {}},
            "status": {"replicas": 3, "observedGeneration": observed, "updateRevision": "new"},
        }))
        .unwrap()
    }

    #[test]
    fn one_store_at_a_time_is_restarted_and_only_while_it_is_safe() {
        let (a, b, c) = (
            pod("a-store-0", "old", true, true),
            pod("a-store-2", "old", true, true),
            pod("a-store-10", "old", true, true),
        );
        let pods = [&a, &b, &c];
        assert_eq!(next(&stores(2), &pods, Ok(())), Roll::Next(&c));
        assert_eq!(next(&stores(2), &pods, Err("no".to_owned())), Roll::Wait("no".to_owned()));
        assert!(matches!(next(&stores(1), &pods, Ok(())), Roll::Wait(_)), "the revision is not known yet");
        let done = pod("a-store-10", "new", false, true);
        assert_eq!(next(&stores(2), &[&a, &b, &done], Ok(())), Roll::Wait("a-store-10 is not ready yet".to_owned()));
        let done = pod("a-store-10", "new", true, true);
        assert_eq!(next(&stores(2), &[&a, &b, &done], Ok(())), Roll::Next(&b));
        assert_eq!(next(&stores(2), &[&done], Ok(())), Roll::Done);
        assert_eq!(next(&stores(2), &[&a, &b], Ok(())), Roll::Wait("2 of 3 pods are there".to_owned()));
        let mut stopping = a.clone();
        stopping.metadata.deletion_timestamp = Some(vasto_crds::time(0));
        assert!(matches!(next(&stores(2), &[&stopping, &b, &done], Ok(())), Roll::Wait(_)));
    }

    #[test]
    fn one_that_does_not_run_is_replaced_first() {
        let (a, b) = (pod("a-store-0", "old", false, false), pod("a-store-1", "old", true, true));
        assert_eq!(next(&stores(2), &[&a, &b], Err("degraded".to_owned())), Roll::Next(&a));
        assert_eq!(failing(&a).as_deref(), Some("ImagePullBackOff"));
    }

    #[test]
    fn pods_are_stores() {
        assert_eq!(store_of("a-store", "a-store-store-1").as_deref(), Some("store-1"));
        assert_eq!(store_of("a", "a-store-1").as_deref(), Some("store-1"));
        for other in ["b-store-1", "a-store-", "a-store-01", "a-1"] {
            assert_eq!(store_of("a", other), None, "{other}");
        }
    }
}
