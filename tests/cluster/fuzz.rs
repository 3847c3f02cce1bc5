//! A few seconds of fuzzing for each target: see `vasto_tests::fuzz`.

use std::process::Command;

#[test]
fn no_mutation_of_the_corpus_panics_or_reads_as_something_else() {
    let output = Command::new(env!("CARGO_BIN_EXE_vasto-fuzz")).args(["--seconds", "3"]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    assert!(output.status.success(), "{}: {out}{err}", output.status);
}
