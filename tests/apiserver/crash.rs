//! The operator dies at every single write, before it is sent and after it was done; then another
//! takes over. Whatever the moment, the end is the one of an undisturbed life, and no key was lost on
//! the way. The same with a conflict at each write, and with watches that are cut all the time.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use serde_json::{Map, Value};

use crate::bench::{Bench, Operator, settled};
use crate::normal;
use crate::tap::{Moment, Strike, Write};

/// Lives that are lived at once.
const AT_ONCE: usize = 8;
/// Nothing is written for so long: it is over.
const QUIET: Duration = Duration::from_millis(1_500);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Leg {
    Create,
    Grow,
    Replace,
    Shrink,
    Delete,
}

const LEGS: [Leg; 5] = [Leg::Create, Leg::Grow, Leg::Replace, Leg::Shrink, Leg::Delete];

impl Leg {
    async fn begin(self, bench: &Bench) {
        match self {
            Self::Create => drop(bench.create(2, 2).await),
            Self::Grow => drop(bench.scale(4, None).await),
            Self::Replace => bench.replace("store-1").await,
            Self::Shrink => drop(bench.scale(2, None).await),
            Self::Delete => bench.delete().await,
        }
    }

    fn shards(self) -> u32 {
        match self {
            Self::Create | Self::Shrink => 2,
            Self::Grow | Self::Replace => 4,
            Self::Delete => 0,
        }
    }

    async fn ended(self, bench: &Bench) {
        match self {
            Self::Delete => {
                bench
                    .wait("everything is gone", async || {
                        normal::objects(bench).await.is_empty()
                            && bench.keyspaces().get_opt("packages").await.unwrap().is_none()
                    })
                    .await;
            }
            Self::Replace => {
                // An old replace must not be taken for this one.
                let done = |k: &vasto_crds::Keyspace| {
                    settled(k, self.shards(), 2) && !crate::bench::topology(k).replaced.is_empty()
                };
                bench.until("the store is replaced", done).await;
            }
            _ => drop(bench.settled(self.shards(), 2).await),
        }
        bench.until_claims(0..self.shards()).await;
    }
}

/// All there is: the objects, and the keyspace's own state.
async fn snapshot(bench: &Bench) -> Map<String, Value> {
    let mut all = normal::objects(bench).await;
    if let Some(keyspace) = bench.keyspaces().get_opt("packages").await.unwrap() {
        all.insert("Keyspace packages".to_owned(), normal::keyspace(&keyspace));
    }
    all
}

/// How each leg ends when nothing disturbs it, and what was written.
type Reference = BTreeMap<Leg, (Map<String, Value>, Vec<Write>)>;

async fn undisturbed() -> Reference {
    let bench = Bench::new("undisturbed").await;
    let operator = bench.operator();
    let mut reference = Reference::new();
    for leg in LEGS {
        operator.tap.reset(Strike::Never);
        leg.begin(&bench).await;
        leg.ended(&bench).await;
        let mut count = 0;
        while operator.tap.writes().len() != count {
            count = operator.tap.writes().len();
            tokio::time::sleep(QUIET).await;
        }
        data(&bench, leg).await;
        reference.insert(leg, (snapshot(&bench).await, operator.tap.writes()));
    }
    operator.tap.clean();
    reference
}

/// The data is in place; after the first leg there is some.
async fn data(bench: &Bench, leg: Leg) {
    match leg {
        Leg::Create => {
            let uid = bench.keyspaces().get("packages").await.unwrap().uid().to_owned();
            bench.fleet.write(&uid, 40);
        }
        Leg::Delete => bench.fleet.clean(),
        _ => {
            let uid = bench.keyspaces().get("packages").await.unwrap().uid().to_owned();
            bench.fleet.at_rest(&uid).await;
        }
    }
}

/// What goes wrong in a life.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// In each leg the operator dies before what was the n-th write of an undisturbed life (from 0 on).
    Before(usize),
    /// Likewise after it.
    After(usize),
    Conflicts,
}

impl Trouble {
    fn strike(self, writes: &[Write]) -> Strike {
        let moment = |number: usize| {
            let kind = writes.get(number)?.kind();
            let n = writes[..=number].iter().filter(|write| write.kind() == kind).count();
            Some(Moment { kind, n })
        };
        match self {
            Self::Before(number) => moment(number).map_or(Strike::Never, Strike::Before),
            Self::After(number) => moment(number).map_or(Strike::Never, Strike::After),
            Self::Conflicts => Strike::Conflicts,
        }
    }
}

/// A whole life with this trouble in each leg: when the operator died.
async fn life(label: String, trouble: Trouble, reference: Arc<Reference>) -> Vec<(Leg, Moment)> {
    let bench = Bench::new(&label).await;
    let mut operator = bench.operator_named("operator-0", Strike::Never);
    let mut deaths = Vec::new();
    for (number, leg) in LEGS.into_iter().enumerate() {
        operator.tap.reset(trouble.strike(&reference[&leg].1));
        leg.begin(&bench).await;
        let over = async {
            leg.ended(&bench).await;
            same(&bench, leg, &reference, &operator).await;
        };
        let died = tokio::select! {
            () = over => false,
            () = operator.tap.died() => true,
        };
        // What comes yet is of no leg.
        operator.tap.reset(Strike::Never);
        if died || operator.tap.is_dead() {
            deaths.extend(operator.tap.struck().map(|moment| (leg, moment)));
            operator = successor(&bench, operator, trouble, number);
            leg.ended(&bench).await;
            same(&bench, leg, &reference, &operator).await;
        }
        data(&bench, leg).await;
        operator.tap.clean();
    }
    deaths
}

/// The next operator: after a death before a write the same pod with a new process, else another pod.
fn successor(bench: &Bench, dead: Operator, trouble: Trouble, number: usize) -> Operator {
    dead.tap.clean();
    dead.kill();
    match trouble {
        Trouble::Before(_) => bench.operator_named("operator-0", Strike::Never),
        _ => bench.operator_named(&format!("operator-{}", number + 1), Strike::Never),
    }
}

/// Waits until all is as in the undisturbed life.
async fn same(bench: &Bench, leg: Leg, reference: &Reference, operator: &Operator) {
    let wanted = &reference[&leg].0;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found = snapshot(bench).await;
        if found == *wanted {
            return;
        }
        if Instant::now() > deadline {
            let writes: Vec<String> = operator.tap.writes().iter().map(Write::brief).collect();
            panic!(
                "{leg:?} ends otherwise than undisturbed:\n{}\nwritten last: {writes:#?}\n{}",
                difference(wanted, &found),
                bench.describe(None).await
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn difference(wanted: &Map<String, Value>, found: &Map<String, Value>) -> String {
    let mut text = String::new();
    let keys: std::collections::BTreeSet<&String> = wanted.keys().chain(found.keys()).collect();
    for key in keys {
        let lines =
            |all: &Map<String, Value>| all.get(key).map(|v| serde_yaml::to_string(v).unwrap()).unwrap_or_default();
        let (wanted, found) = (lines(wanted), lines(found));
        if wanted != found {
            text += &format!("{key}\n");
            let missing = wanted.lines().filter(|l| !found.lines().any(|f| f == *l)).map(|l| format!("  - {l}\n"));
            let more = found.lines().filter(|l| !wanted.lines().any(|w| w == *l)).map(|l| format!("  + {l}\n"));
            text += &missing.chain(more).collect::<String>();
        }
    }
    text
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned())).unwrap_or_default()
}

/// Lives all these lives; says which failed and why, and when an operator died before or after a write.
async fn live(troubles: Vec<(String, Trouble)>, reference: Arc<Reference>) -> BTreeSet<(Leg, Moment, bool)> {
    let began = Instant::now();
    let count = troubles.len();
    let lives = troubles.into_iter().map(|(label, trouble)| {
        let reference = reference.clone();
        async move {
            let lived = AssertUnwindSafe(life(label.clone(), trouble, reference)).catch_unwind().await;
            let early = matches!(trouble, Trouble::Before(_));
            let lived = lived.map(|deaths| deaths.into_iter().map(|(leg, at)| (leg, at, early)).collect::<Vec<_>>());
            lived.map_err(|panic| (label, words(&*panic)))
        }
    });
    let (mut deaths, mut failed) = (Vec::new(), Vec::new());
    let mut lives = futures::stream::iter(lives).buffer_unordered(AT_ONCE);
    while let Some(lived) = lives.next().await {
        match lived {
            Ok(more) => deaths.extend(more),
            Err(why) => failed.push(why),
        }
    }
    println!("{count} lives with {} deaths in {:.0} s", deaths.len(), began.elapsed().as_secs_f64());
    for (label, why) in failed.iter().take(5) {
        println!("FAILED {label}: {why}");
    }
    let names: Vec<&String> = failed.iter().map(|(label, _)| label).collect();
    assert!(failed.is_empty(), "{} of {count} lives went wrong: {names:?}", failed.len());
    deaths.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_single_write() {
    let reference = Arc::new(undisturbed().await);
    let most = reference.values().map(|(_, writes)| writes.len()).max().unwrap();
    let troubles = (0..most)
        .flat_map(|n| [(format!("before-{n}"), Trouble::Before(n)), (format!("after-{n}"), Trouble::After(n))])
        .collect();
    let deaths = live(troubles, reference.clone()).await;
    // How often a kind is written, time decides; once it always is.
    let kinds = reference.iter().flat_map(|(leg, (_, writes))| writes.iter().map(|write| (*leg, write.kind())));
    let firsts = kinds.map(|(leg, kind)| (leg, Moment { kind, n: 1 }));
    let both = firsts.flat_map(|(leg, moment)| [(leg, moment.clone(), true), (leg, moment, false)]);
    let spared: BTreeSet<_> = both.filter(|death| !deaths.contains(death)).collect();
    assert!(spared.is_empty(), "nobody died before (true) or after (false) these writes: {spared:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_at_each_write() {
    let reference = Arc::new(undisturbed().await);
    live(vec![("conflicts".to_owned(), Trouble::Conflicts)], reference).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_that_are_cut_all_the_time() {
    let bench = Bench::new("cuts").await;
    let operator = bench.operator();
    let reference = undisturbed().await;
    let tap = operator.tap.clone();
    let cutting = tokio::spawn(async move {
        loop {
            tap.cut_watches();
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    });
    for leg in LEGS {
        leg.begin(&bench).await;
        leg.ended(&bench).await;
        same(&bench, leg, &reference, &operator).await;
        data(&bench, leg).await;
    }
    cutting.abort();
    operator.tap.clean();
    assert!(bench.names::<PersistentVolumeClaim>().await.is_empty());
}
