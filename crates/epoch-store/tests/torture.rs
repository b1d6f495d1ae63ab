//! Lives drawn from seeds, with everything that can befall a store; `cargo xtask torture` does the
//! same for as long as one likes.
//!
//! Each test says how much it tried: it is worth something only if all of it took place.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::trials::{Tally, Trial};

/// The sum over some lives.
fn lead(trial: impl Fn(&mut Trial)) -> Tally {
    let mut tally = Tally::default();
    for seed in 0..10 {
        let mut life = Trial::new(seed, 24);
        trial(&mut life);
        tally.add(&life.tally);
    }
    println!("{} states: {tally:?}", tally.states());
    tally
}

#[test]
pub(crate) fn lives_survive_power_cuts() {
    let tally = lead(Trial::power_cuts);
    assert!(tally.cuts > 5_000 && tally.next_found > 50, "{tally:?}");
    assert!(tally.recoveries > 3_000, "{tally:?}");
}

#[test]
pub(crate) fn lives_survive_killed_writers() {
    let tally = lead(Trial::kills);
    assert!(tally.kills > 1_500, "{tally:?}");
}

#[test]
pub(crate) fn lives_survive_errors() {
    let tally = lead(Trial::errors);
    assert!(
        tally.errors > 500 && tally.after_errors > 1_000,
        "{tally:?}"
    );
}

#[test]
pub(crate) fn lives_under_a_lying_medium_are_true_or_damaged() {
    let tally = lead(Trial::lies);
    assert!(tally.lies > 200 && tally.named > 10, "{tally:?}");
}

#[test]
pub(crate) fn damage_is_made_up_for_or_named() {
    let tally = lead(Trial::flips);
    assert!(tally.flips > 500 && tally.named > 10, "{tally:?}");
}
