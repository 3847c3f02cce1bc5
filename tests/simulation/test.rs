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
fn what_was_promised_holds_whatever_goes_wrong() {
    simulate(&["--seeds", "200"]);
}

#[test]
fn a_seed_leaves_the_same_trace_each_time() {
    simulate(&["--seeds", "20", "--from", "1000000", "--twice"]);
}
