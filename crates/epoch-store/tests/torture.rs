//! Lives drawn from seeds, with everything that can befall a store; `cargo xtask torture` does the
//! same for as long as one likes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::trials::{Tally, Trial};

#[test]
fn lives_survive_cuts_errors_lies_and_flips() {
    let mut tally = Tally::default();
    for seed in 0..10 {
        tally.add(&Trial::new(seed, 24).all());
    }
    println!("{} states: {tally:?}", tally.states());
    assert!(tally.states() > 10_000, "{tally:?}");
    // It is worth something only if all of it took place.
    assert!(tally.cuts > 3_000 && tally.next_found > 50, "{tally:?}");
    assert!(tally.recoveries > 1_000 && tally.errors > 300, "{tally:?}");
    assert!(
        tally.lies > 200 && tally.flips > 500 && tally.named > 80,
        "{tally:?}"
    );
}
