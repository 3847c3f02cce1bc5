//! What a keyspace is made of on Kubernetes, as values: from the resource to its
//! StatefulSet, Services, account and budget. No clock, no I/O.

use std::collections::BTreeMap;
use std::hash::Hasher;

use k8s_openapi::api::apps::v1::{
    StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec, StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, Lifecycle, LifecycleHandler,
    ObjectFieldSelector, PersistentVolumeClaim, PersistentVolumeClaimSpec, PodSecurityContext, PodSpec,
    PodTemplateSpec, Probe, SeccompProfile, SecurityContext, Service, ServiceAccount, ServicePort, ServiceSpec,
    SleepAction, TopologySpreadConstraint, VolumeMount, VolumeResourceRequirements,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use vasto_client::topology::{DEFAULT_NAMESPACE, qualified};
use vasto_crds::{DeletionPolicy, Keyspace};

use crate::edit;

/// Says which keyspace an object belongs to.
pub(crate) const KEYSPACE_LABEL: &str = "vasto.io/keyspace";
/// On everything that the operator makes; its watches ask for it.
pub(crate) const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "vasto-operator");
/// On the StatefulSet: a hash of what the user says about pods. While it stays, so do the pods.
pub(crate) const INPUTS: &str = "vasto.io/inputs";
/// On the StatefulSet: a hash of the pod template as the operator that applied it made it.
pub(crate) const TEMPLATE: &str = "vasto.io/template";
/// On the StatefulSet: the term of the leader that changed it last for a change of the keyspace.
pub(crate) const TERM: &str = "vasto.io/term";
/// On a volume's claim: the uid of the keyspace whose store there is being taken away, and left nothing there.
pub(crate) const SURPLUS: &str = "vasto.io/surplus";
/// On a volume's claim: the uid of the keyspace that it was made for.
pub(crate) const MADE_FOR: &str = "vasto.io/made-for";
/// The reason under which a waiting template is shown.
pub const RESTART_REASON: &str = "NewerTemplate";

const STORE_PORT: i32 = 8279;
const HTTP_PORT: i32 = 8282;
/// The user and group in the image.
const NOBODY: i64 = 65532;
/// The claim template's name: claims are called data-POD.
const CLAIM: &str = "data";

/// What is the same for all keyspaces of this operator.
#[derive(Clone, Debug)]
pub struct Site {
    /// `host:port` under which stores reach the operators.
    pub service: String,
    /// Whether it sees when a node is drained.
    pub sees_nodes: bool,
}

/// What the driver has decided.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Pods: one above the greatest ordinal.
    pub(crate) replicas: u32,
    pub(crate) image: String,
    /// The leader's term, where a change is under way.
    pub(crate) term: Option<i32>,
}

/// Everything that a keyspace owns.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    pub(crate) account: ServiceAccount,
    pub(crate) headless: Service,
    pub(crate) client: Service,
    pub(crate) budget: PodDisruptionBudget,
    pub(crate) stores: StatefulSet,
}

/// The name of the StatefulSet, and of all else that is there for its pods.
pub(crate) fn stores_name(keyspace: &str) -> String {
    format!("{keyspace}-store")
}

/// The pod of a store.
pub(crate) fn pod_name(keyspace: &str, store: &str) -> String {
    format!("{keyspace}-{store}")
}

/// The claim of a store's volume.
pub(crate) fn claim_name(keyspace: &str, store: &str) -> String {
    format!("{CLAIM}-{keyspace}-{store}")
}

/// Where a store of a keyspace (by the topology's name of it) is reached: by name, whatever its pod's address is.
pub fn address_of(keyspace: &str, store: &str) -> String {
    let (namespace, name) = keyspace.split_once('/').unwrap_or((DEFAULT_NAMESPACE, keyspace));
    format!("{}.{}.{namespace}.svc:{STORE_PORT}", pod_name(name, store), stores_name(name))
}

/// What topologies call this keyspace.
pub(crate) fn topology_name(keyspace: &Keyspace) -> String {
    qualified(&keyspace.namespace().unwrap_or_default(), keyspace.name())
}

/// By which the pods of a keyspace are found; it never changes.
fn selector(keyspace: &str) -> BTreeMap<String, String> {
    let pairs = [
        ("app.kubernetes.io/name", "vasto"),
        ("app.kubernetes.io/instance", keyspace),
        ("app.kubernetes.io/component", "store"),
    ];
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// The selector as a status shows it to autoscalers.
pub(crate) fn selector_text(keyspace: &str) -> String {
    let pairs: Vec<String> = selector(keyspace).into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(",")
}

fn labels(keyspace: &str) -> BTreeMap<String, String> {
    let mut labels = selector(keyspace);
    labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());
    labels.insert(KEYSPACE_LABEL.to_owned(), keyspace.to_owned());
    labels
}

fn meta(keyspace: &Keyspace, name: String) -> ObjectMeta {
    let owner = OwnerReference {
        api_version: Keyspace::api_version(&()).into_owned(),
        kind: Keyspace::kind(&()).into_owned(),
        name: keyspace.name().to_owned(),
        uid: keyspace.uid().to_owned(),
        controller: Some(true),
        // Unset, so that where owner references are guarded no right over finalizers is needed.
        block_owner_deletion: None,
    };
    ObjectMeta {
        name: Some(name),
        namespace: keyspace.namespace(),
        labels: Some(labels(keyspace.name())),
        owner_references: Some(vec![owner]),
        ..ObjectMeta::default()
    }
}

/// A hash that is the same in every version and on every machine.
pub(crate) fn hash<T: Serialize>(value: &T) -> String {
    let text = serde_json::to_string(value).unwrap_or_default();
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    hasher.write(text.as_bytes());
    format!("{:016x}", hasher.finish())
}

/// FNV-1a, 64 bits.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Whether this operator would give the pods another template than the one that they were given, for the
/// same wishes of the user.
pub(crate) fn is_outdated(keyspace: &Keyspace, site: &Site, image: &str, live: &StatefulSet) -> bool {
    let now = hash(&template(keyspace, site, image));
    inputs(keyspace, image) == live.annotations().get(INPUTS).map_or("", String::as_str)
        && live.annotations().get(TEMPLATE).is_some_and(|then| *then != now)
}

/// Everything that the keyspace is made of now. `live`: its StatefulSet as it is.
pub(crate) fn objects(keyspace: &Keyspace, site: &Site, wanted: &Wanted, live: Option<&StatefulSet>) -> Objects {
    Objects {
        account: account(keyspace),
        headless: headless(keyspace),
        client: client(keyspace),
        budget: budget(keyspace, site),
        stores: stores(keyspace, site, wanted, live),
    }
}

fn account(keyspace: &Keyspace) -> ServiceAccount {
    ServiceAccount {
        metadata: meta(keyspace, stores_name(keyspace.name())),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

fn port(name: &str, number: i32) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port: number,
        protocol: Some("TCP".to_owned()),
        target_port: Some(IntOrString::String(name.to_owned())),
        ..ServicePort::default()
    }
}

/// Stores need one another before clients need them: names resolve to pods that aren't ready as well.
fn headless(keyspace: &Keyspace) -> Service {
    Service {
        metadata: meta(keyspace, stores_name(keyspace.name())),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            publish_not_ready_addresses: Some(true),
            selector: Some(selector(keyspace.name())),
            ports: Some(vec![port("grpc", STORE_PORT), port("http", HTTP_PORT)]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn client(keyspace: &Keyspace) -> Service {
    Service {
        metadata: meta(keyspace, keyspace.name().to_owned()),
        spec: Some(ServiceSpec {
            selector: Some(selector(keyspace.name())),
            ports: Some(vec![port("grpc", STORE_PORT)]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// With one copy no pod may be evicted while it holds data; the operator moves that away from a node that
/// is drained, then deletes the pod itself.
fn budget(keyspace: &Keyspace, site: &Site) -> PodDisruptionBudget {
    // Who can't see a drain must not hold it up for ever.
    let most = i32::from(keyspace.spec.replication_factor > 1 || !site.sees_nodes);
    PodDisruptionBudget {
        metadata: meta(keyspace, stores_name(keyspace.name())),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(most)),
            selector: Some(LabelSelector { match_labels: Some(selector(keyspace.name())), ..LabelSelector::default() }),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

/// What the user says about pods.
fn inputs(keyspace: &Keyspace, image: &str) -> String {
    let spec = &keyspace.spec;
    hash(&(image, &spec.resources, &spec.scheduling, edit::restart(keyspace)))
}

fn stores(keyspace: &Keyspace, site: &Site, wanted: &Wanted, live: Option<&StatefulSet>) -> StatefulSet {
    let spec = &keyspace.spec;
    let mut metadata = meta(keyspace, stores_name(keyspace.name()));
    let inputs = inputs(keyspace, &wanted.image);
    let made = template(keyspace, site, &wanted.image);
    let live_annotation = |key: &str| live.and_then(|l| l.annotations().get(key).cloned());
    let live_spec = live.map(|l| &l.spec);
    let kept = live_spec.filter(|_| live_annotation(INPUTS).as_ref() == Some(&inputs));
    let (template, template_hash) = match kept {
        // A newer operator's template waits for a reason.
        Some(kept) => (kept.template.clone(), live_annotation(TEMPLATE).unwrap_or_default()),
        None => {
            let hash = hash(&made);
            (made, hash)
        }
    };
    let term = wanted.term.map(|t| t.to_string()).or_else(|| live_annotation(TERM));
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(INPUTS.to_owned(), inputs);
    annotations.insert(TEMPLATE.to_owned(), template_hash);
    annotations.extend(term.map(|term| (TERM.to_owned(), term)));
    let policy = |delete| if delete { "Delete" } else { "Retain" }.to_owned();
    StatefulSet {
        metadata,
        spec: StatefulSetSpec {
            replicas: Some(wanted.replicas as i32),
            service_name: Some(stores_name(keyspace.name())),
            pod_management_policy: Some("Parallel".to_owned()),
            // The operator restarts pods, one at a time.
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".to_owned()),
                ..StatefulSetUpdateStrategy::default()
            }),
            persistent_volume_claim_retention_policy: Some(StatefulSetPersistentVolumeClaimRetentionPolicy {
                when_deleted: Some(policy(spec.deletion_policy == DeletionPolicy::Delete)),
                // A hand on the StatefulSet's replicas must not cost a volume; the driver takes those away itself.
                when_scaled: Some("Retain".to_owned()),
            }),
            revision_history_limit: Some(3),
            selector: LabelSelector { match_labels: Some(selector(keyspace.name())), ..LabelSelector::default() },
            template,
            // It can't be changed; claims that are there already are enlarged by themselves.
            volume_claim_templates: Some(vec![
                live_spec
                    .and_then(|l| l.volume_claim_templates.as_ref()?.first().map(kept_claim))
                    .unwrap_or_else(|| claim(keyspace)),
            ]),
            ..StatefulSetSpec::default()
        },
        ..StatefulSet::default()
    }
}

/// A claim template as it was applied, without what the API server added.
fn kept_claim(live: &PersistentVolumeClaim) -> PersistentVolumeClaim {
    let (meta, spec) = (&live.metadata, live.spec.clone().unwrap_or_default());
    let (name, labels, annotations) = (meta.name.clone(), meta.labels.clone(), meta.annotations.clone());
    let metadata = ObjectMeta { name, labels, annotations, ..ObjectMeta::default() };
    let spec = PersistentVolumeClaimSpec {
        access_modes: spec.access_modes,
        resources: spec.resources,
        storage_class_name: spec.storage_class_name,
        ..PersistentVolumeClaimSpec::default()
    };
    PersistentVolumeClaim { metadata, spec: Some(spec), ..PersistentVolumeClaim::default() }
}

fn claim(keyspace: &Keyspace) -> PersistentVolumeClaim {
    let storage = &keyspace.spec.storage;
    let requests = BTreeMap::from([("storage".to_owned(), Quantity(storage.size.to_string()))]);
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(CLAIM.to_owned()),
            labels: Some(labels(keyspace.name())),
            annotations: Some(BTreeMap::from([(MADE_FOR.to_owned(), keyspace.uid().to_owned())])),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            resources: Some(VolumeResourceRequirements {
                requests: Some(requests),
                ..VolumeResourceRequirements::default()
            }),
            storage_class_name: storage.storage_class_name.clone(),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    }
}

/// The stores' pods.
fn template(keyspace: &Keyspace, site: &Site, image: &str) -> PodTemplateSpec {
    let (name, scheduling) = (keyspace.name(), &keyspace.spec.scheduling);
    let annotations =
        edit::restart(keyspace).map(|asked| BTreeMap::from([(edit::RESTART.to_owned(), asked.to_owned())]));
    let spread = |key: &str| TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.to_owned(),
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(LabelSelector { match_labels: Some(selector(name)), ..LabelSelector::default() }),
        ..TopologySpreadConstraint::default()
    };
    let spreads = match scheduling.topology_spread_constraints.as_slice() {
        [] => vec![spread("topology.kubernetes.io/zone"), spread("kubernetes.io/hostname")],
        own => own.to_vec(),
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels(name)), annotations, ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            service_account_name: Some(stores_name(name)),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(60),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(NOBODY),
                run_as_group: Some(NOBODY),
                fs_group: Some(NOBODY),
                fs_group_change_policy: Some("OnRootMismatch".to_owned()),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            node_selector: (!scheduling.node_selector.is_empty()).then(|| scheduling.node_selector.clone()),
            affinity: scheduling.affinity.clone(),
            tolerations: (!scheduling.tolerations.is_empty()).then(|| scheduling.tolerations.clone()),
            topology_spread_constraints: Some(spreads),
            priority_class_name: scheduling.priority_class_name.clone(),
            containers: vec![container(keyspace, site, image)],
            ..PodSpec::default()
        }),
    }
}

fn container(keyspace: &Keyspace, site: &Site, image: &str) -> Container {
    let (namespace, name) = (keyspace.namespace().unwrap_or_default(), keyspace.name());
    let args = [
        "store",
        "--pod=$(POD_NAME)",
        &format!("--keyspace={namespace}/{name}"),
        &format!("--uid={}", keyspace.uid()),
        "--data=/data",
        &format!("--listen=0.0.0.0:{STORE_PORT}"),
        &format!("--http=0.0.0.0:{HTTP_PORT}"),
        &format!("--operator={}", site.service),
    ]
    .map(str::to_owned);
    let port = |name: &str, number| ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let probe = |path: &str, period, failures| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("http".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Probe::default()
    };
    Container {
        name: "store".to_owned(),
        image: Some(image.to_owned()),
        args: Some(args.to_vec()),
        env: Some(vec![EnvVar {
            name: "POD_NAME".to_owned(),
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    field_path: "metadata.name".to_owned(),
                    ..ObjectFieldSelector::default()
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        }]),
        ports: Some(vec![port("grpc", STORE_PORT), port("http", HTTP_PORT)]),
        resources: Some(keyspace.spec.resources.clone()),
        // Opening many files after a crash takes its time.
        startup_probe: Some(probe("/livez", 2, 300)),
        liveness_probe: Some(probe("/livez", 10, 6)),
        readiness_probe: Some(probe("/readyz", 2, 3)),
        // Why a store did not start is shown in the status.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        // Whoever finds stores by the client Service is sent elsewhere first.
        lifecycle: Some(Lifecycle {
            pre_stop: Some(LifecycleHandler { sleep: Some(SleepAction { seconds: 2 }), ..LifecycleHandler::default() }),
            ..Lifecycle::default()
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Capabilities::default() }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(vec![VolumeMount {
            name: CLAIM.to_owned(),
            mount_path: "/data".to_owned(),
            ..VolumeMount::default()
        }]),
        ..Container::default()
    }
}
