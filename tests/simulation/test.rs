//! The seeds that every test run simulates. `vasto-sim` runs as many as asked, and replays one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

fn simulate(args: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_vasto-sim")).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_was_promised_holds_whatever_goes_wrong_and_a_seed_leaves_the_same_trace_each_time() {
    simulate(&["--seeds", "200", "--twice"]);
}

/// tests/mutations/run shows that each is noticed; here only that none has gone stale.
#[test]
fn every_mistake_of_tests_mutations_still_applies() {
    let patches: Vec<_> = std::fs::read_dir("mutations")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "patch"))
        .collect();
    assert!(patches.len() >= 20, "{} patches", patches.len());
    for patch in patches {
        let mut git = Command::new("git");
        let output =
            git.args(["apply", "--check"]).arg(patch.canonicalize().unwrap()).current_dir("..").output().unwrap();
        assert!(output.status.success(), "{}: {}", patch.display(), String::from_utf8_lossy(&output.stderr));
    }
}
