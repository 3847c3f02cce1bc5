//! What people may do to a Keyspace: apply, scale, replace, delete. Pure: the old
//! resource and a wish in, the new resource or a refusal out.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use vasto_client::v1::{Assignment, Topology, View};
use vasto_crds::{Keyspace, KeyspaceStatus, Phase, StoreState, check, time};

/// What was last applied, so that a file is applied again only when it has changed.
const LAST_APPLIED: &str = "vasto.io/last-applied";
/// The replace that is asked for.
pub(crate) const REPLACE: &str = "vasto.io/replace";
/// The restart that is asked for.
pub(crate) const RESTART: &str = "vasto.io/restart";
/// The resource was lost and made anew from what stores knew; nobody has changed it since.
const RECOVERED: &str = "vasto.io/recovered";

/// What someone wants.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Create it, or make it like this.
    Apply(Box<Keyspace>),
    /// The same for a document of a followed file: only if it differs from what was last applied.
    Follow(Box<Keyspace>),
    Scale {
        name: String,
        shards: u32,
        replication_factor: Option<u32>,
    },
    Replace {
        name: String,
        store: String,
        accept_data_loss: bool,
    },
    Delete {
        name: String,
    },
}

impl Change {
    /// The keyspace that it is about.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Apply(keyspace) | Self::Follow(keyspace) => keyspace.name(),
            Self::Scale { name, .. } | Self::Replace { name, .. } | Self::Delete { name } => name,
        }
    }

    /// Whether it makes a keyspace that isn't there.
    pub(crate) fn creates(&self) -> bool {
        matches!(self, Self::Apply(_) | Self::Follow(_))
    }
}

/// Why a change was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such keyspace.
    #[error("keyspace {name:?} does not exist; {}", listed(existing))]
    Missing {
        /// The name.
        name: String,
        /// Those that exist.
        existing: Vec<String>,
    },
    /// In the rules' own words.
    #[error("{0}")]
    Invalid(String),
    /// Not as things stand.
    #[error("{0}")]
    Conflict(String),
    /// Not yet.
    #[error("{0}")]
    Unavailable(String),
}

fn listed(existing: &[String]) -> String {
    if existing.is_empty() {
        "there are none yet: make one with `vasto keyspace apply -f FILE`".to_owned()
    } else {
        format!("these do: {}", existing.join(", "))
    }
}

/// A replace that is asked for, as an annotation keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Replacement {
    pub(crate) store: String,
    pub(crate) request: String,
    #[serde(default)]
    pub(crate) accept_data_loss: bool,
}

/// What a change is judged by, beside the resource.
pub(crate) struct Standing<'a> {
    pub(crate) topology: Option<&'a Topology>,
    pub(crate) living: &'a BTreeSet<String>,
    pub(crate) now_ms: u64,
    /// A fresh random id for what is made.
    pub(crate) fresh: String,
}

/// The resource after the change; `None` if it needs no change.
pub(crate) fn change(old: Option<&Keyspace>, change: &Change, by: &Standing<'_>) -> Result<Option<Keyspace>, Refusal> {
    let new = match (change, old) {
        (Change::Apply(wanted), None) | (Change::Follow(wanted), None) => create(wanted, by)?,
        (Change::Apply(wanted), Some(old)) => apply(wanted, old)?,
        (Change::Follow(wanted), Some(old)) => follow(wanted, old)?,
        // The caller has looked it up.
        (_, None) => return Err(Refusal::Missing { name: change.name().to_owned(), existing: Vec::new() }),
        (Change::Scale { shards, replication_factor, .. }, Some(old)) => {
            let mut new = old.clone();
            new.spec.shards = *shards;
            new.spec.replication_factor = replication_factor.unwrap_or(old.spec.replication_factor);
            not_deleting(old)?;
            checked(&new, Some(old))?;
            changed(new, old)
        }
        (Change::Replace { store, accept_data_loss, .. }, Some(old)) => replace(old, store, *accept_data_loss, by)?,
        (Change::Delete { .. }, Some(old)) => {
            let mut new = old.clone();
            new.metadata.deletion_timestamp.get_or_insert_with(|| time(by.now_ms));
            new
        }
    };
    Ok((Some(&new) != old).then_some(new))
}

fn checked(new: &Keyspace, old: Option<&Keyspace>) -> Result<(), Refusal> {
    check(new, old).map_err(|e| Refusal::Invalid(e.to_string()))
}

fn not_deleting(old: &Keyspace) -> Result<(), Refusal> {
    if old.metadata.deletion_timestamp.is_none() {
        return Ok(());
    }
    Err(Refusal::Conflict(format!("keyspace {} is being deleted: wait until it is gone", old.name())))
}

/// Counts a generation, if the spec has changed.
fn changed(mut new: Keyspace, old: &Keyspace) -> Keyspace {
    if new.spec != old.spec {
        new.metadata.generation = Some(old.metadata.generation.unwrap_or(0) + 1);
        annotations(&mut new).remove(RECOVERED);
    }
    new
}

fn annotations(keyspace: &mut Keyspace) -> &mut BTreeMap<String, String> {
    keyspace.metadata.annotations.get_or_insert_default()
}

fn annotation<'a>(keyspace: &'a Keyspace, key: &str) -> Option<&'a str> {
    keyspace.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// What people say of a keyspace.
fn said(wanted: &Keyspace) -> Keyspace {
    let mut said = Keyspace::new(wanted.name(), wanted.spec.clone());
    said.metadata.labels.clone_from(&wanted.metadata.labels);
    said.metadata.annotations.clone_from(&wanted.metadata.annotations);
    // What a resource that came from here says of itself is not theirs.
    annotations(&mut said).retain(|key, _| ![LAST_APPLIED, REPLACE, RECOVERED].contains(&key.as_str()));
    said
}

fn create(wanted: &Keyspace, by: &Standing<'_>) -> Result<Keyspace, Refusal> {
    checked(wanted, None)?;
    let mut new = Keyspace::new(wanted.name(), wanted.spec.clone());
    new.metadata.labels.clone_from(&wanted.metadata.labels);
    new.metadata.annotations.clone_from(&wanted.metadata.annotations);
    new.metadata.uid = Some(by.fresh.clone());
    new.metadata.generation = Some(1);
    new.metadata.creation_timestamp = Some(time(by.now_ms));
    let said = said(wanted);
    annotations(&mut new).retain(|key, _| ![REPLACE, RECOVERED].contains(&key.as_str()));
    annotations(&mut new).insert(LAST_APPLIED.to_owned(), said.to_json());
    new.status = Some(KeyspaceStatus { phase: Some(Phase::Pending), ..KeyspaceStatus::default() });
    Ok(new)
}

fn apply(wanted: &Keyspace, old: &Keyspace) -> Result<Keyspace, Refusal> {
    not_deleting(old)?;
    if !wanted.uid().is_empty() && wanted.uid() != old.uid() {
        return Err(Refusal::Conflict(format!(
            "metadata.uid is {}, and the keyspace {} that exists has {}: what you have was deleted since, and another \
             made; leave metadata.uid out to change the one that exists",
            wanted.uid(),
            old.name(),
            old.uid()
        )));
    }
    checked(wanted, Some(old))?;
    let mut new = old.clone();
    new.spec = wanted.spec.clone();
    new.metadata.labels.clone_from(&wanted.metadata.labels);
    let own = annotation(old, REPLACE).map(str::to_owned);
    new.metadata.annotations.clone_from(&wanted.metadata.annotations);
    annotations(&mut new).retain(|key, _| ![REPLACE, RECOVERED].contains(&key.as_str()));
    annotations(&mut new).extend(own.map(|text| (REPLACE.to_owned(), text)));
    annotations(&mut new).insert(LAST_APPLIED.to_owned(), said(wanted).to_json());
    Ok(changed(new, old))
}

fn follow(wanted: &Keyspace, old: &Keyspace) -> Result<Keyspace, Refusal> {
    // Compared as Keyspaces: another version may write the same in other words.
    let applied = annotation(old, LAST_APPLIED).and_then(|text| Keyspace::from_json(text).ok());
    if applied == Some(said(wanted)) {
        return Ok(old.clone());
    }
    if annotation(old, RECOVERED).is_none() {
        return apply(wanted, old);
    }
    // What was applied last is not known any more, but what the keyspace had become is: it stays
    // so. The file counts again from its next edit on.
    if wanted.spec != old.spec {
        tracing::warn!(
            keyspace = old.name(),
            "the file says something else than what the stores knew when the operator had lost its files; what the \
             stores knew stays until the file is edited"
        );
    }
    let mut new = old.clone();
    annotations(&mut new).insert(LAST_APPLIED.to_owned(), said(wanted).to_json());
    annotations(&mut new).remove(RECOVERED);
    Ok(new)
}

/// The replace that a resource asks for.
pub(crate) fn replacement(keyspace: &Keyspace) -> Option<Replacement> {
    let text = annotation(keyspace, REPLACE).filter(|text| text.starts_with('{'))?;
    serde_json::from_str(text)
        .inspect_err(
            |error| tracing::warn!(keyspace = keyspace.name(), %error, "the annotation {REPLACE} can't be read"),
        )
        .ok()
}

/// On Kubernetes: the annotation (key and text) that asks for a store to be emptied and filled anew; refused where
/// that can't work as things stand by the keyspace's status. `fresh` names the request.
pub fn replace_annotation(
    keyspace: &Keyspace,
    store: &str,
    accept_data_loss: bool,
    fresh: String,
) -> Result<(&'static str, String), Refusal> {
    let status = keyspace.status.clone().unwrap_or_default();
    let topology = status.topology.as_deref().map(crate::status::from_text).transpose().map_err(Refusal::Conflict)?;
    let living = status.stores.iter().filter(|s| matches!(s.state, Some(StoreState::Ready | StoreState::Leaving)));
    let living = living.map(|s| s.name.clone()).collect();
    let by = Standing { topology: topology.as_ref(), living: &living, now_ms: 0, fresh };
    let asked = replace(keyspace, store, accept_data_loss, &by)?;
    Ok((REPLACE, annotation(&asked, REPLACE).unwrap_or_default().to_owned()))
}

/// On Kubernetes: the annotation (key and text) that asks for the stores to be restarted, one at a time.
pub fn restart_annotation(fresh: String) -> (&'static str, String) {
    (RESTART, fresh)
}

/// The restart that a resource asks for last.
pub(crate) fn restart(keyspace: &Keyspace) -> Option<&str> {
    annotation(keyspace, RESTART)
}

/// Takes away a replace that is through.
pub(crate) fn without_replacement(keyspace: &mut Keyspace) {
    annotations(keyspace).remove(REPLACE);
}

fn ask(keyspace: &mut Keyspace, wanted: &Replacement) -> Result<(), Refusal> {
    let text = serde_json::to_string(wanted).map_err(|e| Refusal::Invalid(e.to_string()))?;
    annotations(keyspace).insert(REPLACE.to_owned(), text);
    Ok(())
}

fn replace(old: &Keyspace, store: &str, accept_data_loss: bool, by: &Standing<'_>) -> Result<Keyspace, Refusal> {
    let name = old.name();
    not_deleting(old)?;
    let Some(topology) = by.topology.filter(|t| t.size() > 0) else {
        return Err(Refusal::Conflict(format!("keyspace {name} is being made: no store of it can be replaced yet")));
    };
    let standing = topology.replace.as_ref().filter(|r| r.request != topology.replaced);
    let under_way = replacement(old).filter(|r| r.request != topology.replaced);
    if let Some(other) = under_way.as_ref().map(|r| &r.store).or(standing.map(|r| &r.store)).filter(|s| *s != store) {
        return Err(Refusal::Conflict(format!(
            "{other} of keyspace {name} is being replaced: one store at a time; `vasto keyspace describe -w {name}` shows \
             how far it is"
        )));
    }
    let stores: BTreeSet<&str> =
        topology.current.iter().flat_map(View::places).map(|p| p.assignment.store.as_str()).collect();
    if under_way.is_none() && !stores.contains(store) {
        let stores: Vec<&str> = stores.into_iter().collect();
        return Err(Refusal::Conflict(format!(
            "keyspace {name} has no replica on a store named {store:?}; it has them on {}",
            stores.join(", ")
        )));
    }
    if old.spec.paused {
        return Err(Refusal::Conflict(format!(
            "keyspace {name} is paused: nothing is changed until spec.paused is false"
        )));
    }
    if !accept_data_loss && !by.living.contains(store) {
        let only = topology.current.iter().flat_map(|v| v.shards.iter().enumerate()).filter(|(_, shard)| {
            let here = |a: &&Assignment| a.store == store && a.replica != 0;
            let elsewhere =
                |a: &Assignment| a.store != store && a.replica != 0 && a.serving && by.living.contains(&a.store);
            shard.replicas.iter().any(|a| here(&a)) && !shard.replicas.iter().any(elsewhere)
        });
        let only: Vec<String> = only.map(|(shard, _)| shard.to_string()).collect();
        if !only.is_empty() {
            return Err(Refusal::Conflict(format!(
                "{store} is away and no other living store has shard {}: bring {store} back, or accept that the data is \
                 lost with --accept-data-loss",
                only.join(", ")
            )));
        }
    }
    let mut new = old.clone();
    let mut wanted = under_way.unwrap_or_else(|| Replacement {
        store: store.to_owned(),
        request: by.fresh.clone(),
        accept_data_loss,
    });
    wanted.accept_data_loss |= accept_data_loss;
    ask(&mut new, &wanted)?;
    Ok(new)
}

/// The resource made anew from a topology that stores have reported.
pub(crate) fn recover(topology: &Topology, now_ms: u64) -> Result<Keyspace, String> {
    let mut keyspace = Keyspace::new(&topology.name, spec_of(topology)?);
    keyspace.metadata.uid = Some(topology.uid.clone());
    keyspace.metadata.generation = Some(1);
    keyspace.metadata.creation_timestamp = Some(time(now_ms));
    annotations(&mut keyspace).insert(RECOVERED.to_owned(), "true".to_owned());
    take_over(&mut keyspace, topology, now_ms)?;
    Ok(keyspace)
}

/// Takes over what else a reported topology says, if the resource is only known from such ones.
pub(crate) fn take_over(keyspace: &mut Keyspace, topology: &Topology, now_ms: u64) -> Result<(), String> {
    if annotation(keyspace, RECOVERED).is_none() {
        return Ok(());
    }
    keyspace.spec = spec_of(topology)?;
    if let Some(replace) = &topology.replace {
        let (store, request) = (replace.store.clone(), replace.request.clone());
        ask(keyspace, &Replacement { store, request, accept_data_loss: false }).map_err(|e| e.to_string())?;
    }
    if topology.phase() == vasto_client::v1::Phase::Deleting {
        keyspace.metadata.deletion_timestamp.get_or_insert_with(|| time(now_ms));
    }
    Ok(())
}

fn spec_of(topology: &Topology) -> Result<vasto_crds::KeyspaceSpec, String> {
    vasto_crds::KeyspaceSpec::from_json(&topology.spec).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vasto_client::v1::{Replace, Shard};
    use vasto_crds::KeyspaceSpec;

    fn by<'a>(topology: Option<&'a Topology>, living: &'a BTreeSet<String>) -> Standing<'a> {
        Standing { topology, living, now_ms: 1_000, fresh: "fresh".to_owned() }
    }

    fn wanted(shards: u32, copies: u32) -> Box<Keyspace> {
        Box::new(Keyspace::new("packages", KeyspaceSpec::new(shards, copies)))
    }

    fn made() -> Keyspace {
        change(None, &Change::Apply(wanted(3, 1)), &by(None, &BTreeSet::new())).unwrap().unwrap()
    }

    fn topology(stores: &[&str]) -> Topology {
        let shard = |(i, store): (usize, &&str)| {
            let replica = Assignment { store: (*store).to_owned(), replica: i as u64 + 1, serving: true };
            Shard { replicas: vec![replica] }
        };
        let view = View { shards: stores.iter().enumerate().map(shard).collect() };
        let spec = KeyspaceSpec::new(stores.len() as u32, 1).to_json();
        Topology { name: "packages".to_owned(), uid: "u".to_owned(), current: Some(view), spec, ..Topology::default() }
    }

    #[test]
    fn apply_creates_then_changes() {
        let nobody = BTreeSet::new();
        let first = made();
        assert_eq!((first.uid(), first.metadata.generation), ("fresh", Some(1)));
        assert_eq!(change(Some(&first), &Change::Apply(wanted(3, 1)), &by(None, &nobody)), Ok(None));
        let second = change(Some(&first), &Change::Apply(wanted(5, 2)), &by(None, &nobody)).unwrap().unwrap();
        assert_eq!((second.spec.shards, second.metadata.generation, second.uid()), (5, Some(2), "fresh"));
        assert_eq!(second.metadata.creation_timestamp, first.metadata.creation_timestamp);

        let refused = change(None, &Change::Apply(wanted(2, 3)), &by(None, &nobody)).unwrap_err();
        assert!(refused.to_string().contains("must not be more than shards"), "{refused}");
        let mut old = wanted(5, 2);
        old.metadata.uid = Some("other".to_owned());
        let refused = change(Some(&first), &Change::Apply(old), &by(None, &nobody)).unwrap_err();
        assert!(refused.to_string().contains("leave metadata.uid out"), "{refused}");
        let gone =
            change(Some(&first), &Change::Delete { name: "packages".to_owned() }, &by(None, &nobody)).unwrap().unwrap();
        let refused = change(Some(&gone), &Change::Apply(wanted(5, 2)), &by(None, &nobody)).unwrap_err();
        assert!(refused.to_string().contains("wait until it is gone"), "{refused}");
    }

    #[test]
    fn a_scale_outlives_an_unchanged_file() {
        let nobody = BTreeSet::new();
        let scale =
            |shards, replication_factor| Change::Scale { name: "packages".to_owned(), shards, replication_factor };
        let scaled = change(Some(&made()), &scale(5, None), &by(None, &nobody)).unwrap().unwrap();
        assert_eq!((scaled.spec.shards, scaled.spec.replication_factor, scaled.metadata.generation), (5, 1, Some(2)));
        assert_eq!(change(Some(&scaled), &Change::Follow(wanted(3, 1)), &by(None, &nobody)), Ok(None));
        let edited = change(Some(&scaled), &Change::Follow(wanted(4, 1)), &by(None, &nobody)).unwrap().unwrap();
        assert_eq!(edited.spec.shards, 4);
        for (shards, copies, words) in [(0, None, "from 1 to 1024"), (2, Some(3), "must not be more than shards")] {
            let refused = change(Some(&scaled), &scale(shards, copies), &by(None, &nobody)).unwrap_err();
            assert!(matches!(&refused, Refusal::Invalid(text) if text.contains(words)), "{refused}");
        }
    }

    #[test]
    fn what_was_recovered_outlives_the_file_too() {
        let nobody = BTreeSet::new();
        let recovered = recover(&topology(&["a", "b"]), 0).unwrap();
        assert_eq!((recovered.uid(), recovered.spec.shards), ("u", 2));
        let noted = change(Some(&recovered), &Change::Follow(wanted(3, 1)), &by(None, &nobody)).unwrap().unwrap();
        assert_eq!(noted.spec.shards, 2);
        assert_eq!(change(Some(&noted), &Change::Follow(wanted(3, 1)), &by(None, &nobody)), Ok(None));
        let edited = change(Some(&noted), &Change::Follow(wanted(4, 1)), &by(None, &nobody)).unwrap().unwrap();
        assert_eq!(edited.spec.shards, 4);

        let replace = Some(Replace { store: "a".to_owned(), request: "r".to_owned(), emptied: true });
        let recovered = recover(&Topology { replace, ..topology(&["a", "b"]) }, 0).unwrap();
        assert_eq!(replacement(&recovered).unwrap().request, "r");
    }

    #[test]
    fn a_replace_is_refused_with_what_would_be_right() {
        let (t, old) = (topology(&["store-0", "store-1"]), made());
        let living = BTreeSet::from(["store-0".to_owned()]);
        let ask = |old: &Keyspace, t: &Topology, store: &str, accept_data_loss| {
            let wish = Change::Replace { name: "packages".to_owned(), store: store.to_owned(), accept_data_loss };
            change(Some(old), &wish, &by(Some(t), &living))
        };
        for (store, words) in [
            ("store-7", "it has them on store-0, store-1"),
            ("store-1", "no other living store has shard 1: bring store-1 back, or accept"),
        ] {
            let refused = ask(&old, &t, store, false).unwrap_err();
            assert!(matches!(&refused, Refusal::Conflict(text) if text.contains(words)), "{refused}");
        }
        let asked = ask(&old, &t, "store-0", false).unwrap().unwrap();
        assert_eq!(replacement(&asked).unwrap().store, "store-0");
        assert_eq!(ask(&asked, &t, "store-0", false), Ok(None), "a repetition changes nothing");
        let refused = ask(&asked, &t, "store-1", true).unwrap_err();
        assert!(refused.to_string().contains("store-0 of keyspace packages is being replaced"), "{refused}");
        let through = Topology { replaced: "fresh".to_owned(), ..t.clone() };
        assert!(ask(&asked, &through, "store-1", true).unwrap().is_some());
        assert!(replacement(&ask(&old, &t, "store-1", true).unwrap().unwrap()).unwrap().accept_data_loss);
    }
}
