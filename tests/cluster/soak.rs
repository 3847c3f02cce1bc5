//! A short soak, so that the long one (`vasto-soak`) is known to work: see `vasto_tests::soak`.

use vasto_tests::soak::{Settings, run};

#[tokio::test(flavor = "multi_thread")]
async fn a_few_cycles_of_kills_and_changes_lose_nothing() {
    let report = Box::pin(run(&Settings { seed: 7, cycles: Some(6), time: None }, |line| println!("{line}"))).await;
    let report = report.unwrap();
    println!("{report}");
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.cycles, 6);
    assert!(report.tally.acknowledged > 1_000 && report.pinned_reads > 100, "{report}");
}
