//! What the operator says of a keyspace. Nothing of it is asked for by people,
//! and every field may be absent; the operator can write all of it anew.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator says of a keyspace.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyspaceStatus {
    /// The metadata.generation that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Where the change under way stands; Ready when none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// The version of the committed topology, which rises with every change of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology_version: Option<u64>,

    /// The newest version of the topology that clients are told of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published_version: Option<u64>,

    /// How many shards clients use now; spec.shards is reached when the change is through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<u32>,

    /// How many copies of each shard clients use now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication_factor: Option<u32>,

    /// How many replicas the committed topology has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,

    /// How many of them serve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<u32>,

    /// readyReplicas of replicas, as the READY column shows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,

    /// The label selector of the stores' pods, for autoscalers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,

    /// The image that the stores run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,

    /// How far the phase has come; absent when no change is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,

    /// Ready: every shard is served. Progressing: a change is under way. Degraded: something needs
    /// attention, the message says what. RequiresUpdate: stores would be restarted with what this
    /// operator would give them, and wait for a change of yours or for kubectl vasto restart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// Each store, as last heard of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub stores: Vec<StoreStatus>,

    /// The whole committed topology, for the operator's own use. Its form may change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<String>,
}

impl KeyspaceStatus {
    /// Sets `replicas`, `readyReplicas` and `ready`.
    pub fn set_replicas(&mut self, ready: u32, all: u32) {
        self.replicas = Some(all);
        self.ready_replicas = Some(ready);
        self.ready = Some(format!("{ready}/{all}"));
    }
}

/// Where a keyspace stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Its first stores are being made.
    Pending,
    /// No change is under way.
    Ready,
    /// New replicas are made and catch up.
    Prepare,
    /// Clients turn to the new replicas.
    Switch,
    /// Old owners refuse what they no longer own.
    Fence,
    /// New owners take over what old ones still accepted.
    Drain,
    /// What is no longer needed is deleted.
    Cleanup,
    /// The keyspace is being deleted.
    Deleting,
}

impl Phase {
    /// As the PHASE column shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Ready => "Ready",
            Self::Prepare => "Prepare",
            Self::Switch => "Switch",
            Self::Fence => "Fence",
            Self::Drain => "Drain",
            Self::Cleanup => "Cleanup",
            Self::Deleting => "Deleting",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// How far a phase has come. Totals are estimates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// The phase that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// In one line, as the PROGRESS column shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,

    /// Records done in this phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,

    /// Records to do in this phase, done ones included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records_total: Option<u64>,

    /// Bytes done in this phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,

    /// Bytes to do in this phase, done ones included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<u64>,

    /// Changes that new replicas have still to take from old ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<u64>,

    /// When the change began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,

    /// Seconds left in this phase at the present pace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,

    /// What the phase waits for, in words, where it waits for something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

/// One store, as last heard of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StoreStatus {
    /// Its name, such as store-0.
    pub name: String,

    /// Where it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,

    /// Whether it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<StoreState>,

    /// The topology version that it has persisted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology_version: Option<u64>,

    /// How many replicas of this keyspace it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,

    /// How many records they hold, estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,

    /// How many bytes they hold, estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,

    /// What is wrong with it, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Whether a store is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StoreState {
    /// It reports.
    Ready,
    /// It has not reported for a while; its replicas wait for it.
    Away,
    /// It was away for too long; its replicas were given up.
    Lost,
    /// This operator has not heard of it yet.
    Unknown,
    /// It is leaving; its data has moved or is moving away.
    Leaving,
}

/// Sets one condition, keyed by its type; a status of none is Unknown. The time of transition moves
/// only when the status does.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: Option<bool>,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now_ms: u64,
) {
    let status = status.map_or("Unknown", |status| if status { "True" } else { "False" });
    let mut new = Condition {
        last_transition_time: time(now_ms),
        message: message.to_owned(),
        observed_generation: generation,
        reason: reason.to_owned(),
        status: status.to_owned(),
        type_: type_.to_owned(),
    };
    match conditions.iter_mut().find(|c| c.type_ == type_) {
        Some(old) => {
            if old.status == status {
                new.last_transition_time = old.last_transition_time.clone();
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

/// A time in the resource's form, from milliseconds since 1970. Whole seconds, as Kubernetes keeps.
pub fn time(ms: u64) -> Time {
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    Time(Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_keep_the_time_of_their_transition() {
        let mut conditions = vec![];
        set_condition(&mut conditions, "Ready", None, "Preparing", "0/6", Some(1), 1_000);
        set_condition(&mut conditions, "Ready", None, "Preparing", "3/6", Some(2), 5_000);
        assert_eq!((conditions.len(), &conditions[0].last_transition_time), (1, &time(1_000)));
        assert_eq!((conditions[0].message.as_str(), conditions[0].observed_generation), ("3/6", Some(2)));
        set_condition(&mut conditions, "Ready", Some(true), "AllServing", "6/6", Some(2), 9_000);
        assert_eq!(conditions[0].last_transition_time, time(9_000));
    }

    #[test]
    fn an_empty_status_is_empty() {
        assert_eq!(serde_json::to_string(&KeyspaceStatus::default()).unwrap(), "{}");
    }
}
