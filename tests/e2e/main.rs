//! The e2e tier: Vasto as people install it, on a real Kubernetes of four nodes, under
//! a load that never stops and knows what it wrote. `./dev e2e` builds what this needs.
//!
//! A step is a function; the list below is all of them, in order. Each finds the
//! keyspace `packages` settled with three shards of two copies, and leaves it so; what
//! a step that failed left behind is put right before the next one, or that one fails.

mod base;
mod cluster;
mod deletion;
mod evidence;
mod gateway;
mod install;
mod kube;
mod load;
mod loss;
mod operator;
mod process;
mod refused;
mod resize;
mod rollout;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::base::Run;
use crate::kube::Kube;

const USAGE: &str = "\
./dev e2e [SETTINGS]
  --only WORD   only the steps whose names contain it; may be given several times
  --list        print the steps and end
  --keep        leave the cluster for a look at it, or for --reuse
  --reuse       use the cluster that --keep left; make it where there is none
What a failed step leaves (logs, events, descriptions) is in $VASTO_E2E_DIR, or the target folder's e2e-failure.";

/// A thing that happens to people's clusters.
struct Step {
    name: &'static str,
    run: fn(&mut Run) -> anyhow::Result<()>,
    /// Whether what goes before and comes after is the same for it: the cluster as it should be, then its check.
    under_load: bool,
}

/// A step of setting up, before there is a load.
const fn setup(name: &'static str, run: fn(&mut Run) -> anyhow::Result<()>) -> Step {
    Step { name, run, under_load: false }
}

/// A step under constant load.
const fn step(name: &'static str, run: fn(&mut Run) -> anyhow::Result<()>) -> Step {
    Step { name, run, under_load: true }
}

const STEPS: &[Step] = &[
    setup("helm install", install::install),
    setup("kubectl apply of the example", install::apply_the_example),
    setup("load the Debian package index from a pod", install::load_the_index),
    step("scale from 3 to 5 and back", resize::grow_and_shrink),
    step("change of mind in Prepare", resize::change_of_mind_before_switch),
    step("change of mind after Switch", resize::change_of_mind_after_switch),
    step("change of mind while shrinking", resize::change_of_mind_while_shrinking),
    step("delete a pod", loss::delete_a_pod),
    step("delete a pod with its volume", loss::delete_a_pod_with_its_volume),
    step("metrics are true", operator::metrics_are_true),
    step("gateways and the console", gateway::serves),
    step("replace a store", loss::replace_a_store),
    step("drain a node", loss::drain_a_node),
    step("drain a node with the only copy", loss::drain_a_node_with_the_only_copy),
    step("roll a new image", rollout::image),
    step("restart the stores", rollout::restart),
    step("upgrade the operator", rollout::upgrade_the_operator),
    step("downgrade the operator", rollout::downgrade_the_operator),
    step("kill the leading operator", operator::kill_the_leader),
    step("freeze the leading operator", operator::freeze_the_leader),
    step("a pod's death while the operator is away", operator::death_in_its_absence),
    step("apply each bad YAML", refused::each_bad_yaml),
    step("delete with both policies", deletion::both_policies),
    step("delete a namespace while the operator is away", deletion::a_namespace),
    step("helm uninstall, then install again", install::uninstall_and_return),
    step("lose a node for good", loss::lose_a_node),
    step("restart every node at once", loss::restart_every_node),
    setup("the load's last words", Run::end_load),
];

#[derive(Default)]
struct Args {
    only: Vec<String>,
    list: bool,
    keep: bool,
    reuse: bool,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut args = Args::default();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--only" => args.only.push(words.next().ok_or("--only needs a word")?),
            "--list" => args.list = true,
            "--keep" => args.keep = true,
            "--reuse" => args.reuse = true,
            other => return Err(format!("{other}: no such setting")),
        }
    }
    if let Some(word) = args.only.iter().find(|word| !STEPS.iter().any(|step| step.name.contains(*word))) {
        return Err(format!("no step's name contains {word:?}; --list shows them"));
    }
    Ok(args)
}

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("{message}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let wanted = |step: &&Step| args.only.is_empty() || args.only.iter().any(|word| step.name.contains(word));
    let steps: Vec<&Step> = STEPS.iter().filter(wanted).collect();
    if args.list {
        steps.iter().for_each(|step| println!("{}", step.name));
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    let begun = base::folder().and_then(|folder| {
        let kube = Kube { folder };
        if !args.keep {
            end_on_signals(kube.clone());
        }
        Run::begin(kube, args.reuse)
    });
    let mut run = match begun {
        Ok(run) => run,
        Err(error) => {
            unless_ended();
            println!("FAILED  {:6.1} s  a cluster to run on: {error:#}", start.elapsed().as_secs_f64());
            println!("0 passed, 1 failed");
            return ExitCode::FAILURE;
        }
    };
    println!("ok      {:6.1} s  a cluster to run on", start.elapsed().as_secs_f64());
    let (mut passed, mut failed, mut left) = (0, 0, steps.len());
    let mut hopeless = 0;
    for step in steps {
        let start = Instant::now();
        let stands = if step.under_load { run.as_it_should_be() } else { Ok(()) };
        hopeless = if stands.is_err() { hopeless + 1 } else { 0 };
        let done = stands.and_then(|()| pass(&mut run, step));
        left -= 1;
        let seconds = start.elapsed().as_secs_f64();
        unless_ended();
        match done {
            Ok(said) => {
                passed += 1;
                println!("ok      {seconds:6.1} s  {}{said}", step.name);
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {seconds:6.1} s  {}: {error:#}", step.name);
                let folder = evidence::collect(&run, step.name, &format!("{error:#}"));
                println!("        what there was is in {}", folder.display());
                run.said();
                run.give_up_the_load();
            }
        }
        // What can't be put right twice won't be the third time.
        if hopeless == 2 {
            println!("the cluster can't be put right: {left} steps are not run");
            break;
        }
    }
    if !args.keep {
        run.end();
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Set once a signal has come: nothing that fails from then on is news.
static ENDED: AtomicBool = AtomicBool::new(false);

/// Waits for the end, where it is under way.
fn unless_ended() {
    while ENDED.load(Ordering::Relaxed) {
        std::thread::park();
    }
}

/// Whoever ends this early finds no cluster left behind either.
fn end_on_signals(kube: Kube) {
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        let signalled = async {
            let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
            tokio::select! {
                _ = term.recv() => Ok::<(), std::io::Error>(()),
                interrupted = tokio::signal::ctrl_c() => interrupted,
            }
        };
        if runtime.block_on(signalled).is_ok() {
            ENDED.store(true, Ordering::Relaxed);
            println!("ended early");
            if let Err(error) = cluster::delete(&kube) {
                println!("the cluster is left: {error:#}");
            }
            std::process::exit(1);
        }
    });
}

/// Runs a step; what there is to say of it.
fn pass(run: &mut Run, step: &Step) -> anyhow::Result<String> {
    if step.under_load {
        run.load()?.mark()?;
    }
    (step.run)(run)?;
    let whole = if step.under_load { run.is_whole()? } else { String::new() };
    Ok(run.said() + &whole)
}
