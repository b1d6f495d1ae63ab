//! Stops that are given up because they would have taken too long: nothing is lost with them.

use crate::store::{Nowhere, Store};
use crate::strategies::begin;
use crate::support::{
    Program, adopt_orphans, alone, bring_back, clean_up, last_epoch, may_run, times,
};
use crate::unharmed::must_be_free;
use outlive_epoch::EpochWriter;
use outlive_process::{ProcessError, Strategy, Tracked};
use std::time::Duration;

/// Begins an epoch that may stop the program for so long. Says whether it was committed. Only of a
/// program that gives memory back the copies made behind it may be lost.
fn try_epoch(
    program: &Program,
    tracked: &mut Tracked,
    store: &mut Store,
    limit: Duration,
    gives_back: bool,
) -> bool {
    let mut writer = store.begin();
    tracked
        .precopy(&mut *writer, &mut || false)
        .unwrap_or_else(|e| panic!("copying ahead: {e}; {}", program.story()));
    let (stopped, mut captured) = match tracked.stop(&mut *writer, Some(limit)) {
        Ok(taken) => taken,
        Err(ProcessError::TooLong { limit_us }) => {
            assert_eq!(u128::from(limit_us), limit.as_micros());
            return false;
        }
        Err(e) => panic!("{e}; {}", program.story()),
    };
    stopped.resume().expect("it runs on");
    match captured.write(&mut *writer) {
        Ok(()) => {}
        // Copied behind the program, and given back by it before.
        Err(ProcessError::GivenBack { .. }) if gives_back => {
            // The next one has all of it.
            tracked.owe_captured(&mut captured);
            return false;
        }
        Err(e) => panic!("{e}; {}", program.story()),
    }
    captured.sync_files().expect("syncing files");
    writer.commit(captured.facts).expect("the commit");
    true
}

/// Limits of all sizes, so that stops are given up at every point: before anything was scanned,
/// between processes, before and after pages were copied.
#[test]
fn what_a_stop_that_was_given_up_had_found_is_in_the_next_epoch() {
    let _alone = alone();
    if !may_run("what_a_stop_that_was_given_up_had_found_is_in_the_next_epoch") {
        return;
    }
    adopt_orphans();
    let strategies = [Strategy::Incremental, Strategy::Redundant, Strategy::Cow];
    let mut given_up = 0;
    for seed in 0..times(6, 60) {
        let strategy = strategies[seed % strategies.len()];
        let mut program = Program::start("shifter", &[&seed.to_string()]);
        let mut store = Store::default();
        let mut tracked = begin(&program, (strategy, 1));
        for round in 0..24 {
            let limit = match round % 4 {
                0 => Duration::from_micros(1),
                n => Duration::from_micros(150 * (round + n * seed) as u64),
            };
            given_up += usize::from(!try_epoch(&program, &mut tracked, &mut store, limit, true));
            program.must_be_well();
        }
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        bring_back(&mut program, store.newest(), &seen);
        program.must_report();
    }
    println!("{given_up} stops were given up");
    assert!(
        given_up >= times(6, 60) * 6,
        "{given_up} stops were given up"
    );
}

/// What was handed over before includes memory that cannot be guarded: private mappings of files.
#[test]
fn the_epoch_after_one_that_was_given_up_is_copied_behind() {
    let _alone = alone();
    if !may_run("the_epoch_after_one_that_was_given_up_is_copied_behind") {
        return;
    }
    let program = Program::start("crowd", &["--memory", "16", "--dirty-rate", "200"]);
    let mut tracked = begin(&program, (Strategy::Cow, 1));
    let mut store = Store::default();
    for _ in 0..3 {
        let none = Duration::from_nanos(1);
        assert!(!try_epoch(&program, &mut tracked, &mut store, none, false));
        let enough = Duration::from_secs(60);
        assert!(try_epoch(&program, &mut tracked, &mut store, enough, false));
        program.must_be_well();
    }
    tracked.detach().expect("detaching");
    program.must_report();
}

#[test]
fn a_stop_that_may_take_no_time_harms_nobody() {
    let _alone = alone();
    if !may_run("a_stop_that_may_take_no_time_harms_nobody") {
        return;
    }
    for list in ["nothing", "eintr"] {
        let program = match list {
            "eintr" => Program::start("eintr", &[]),
            other => Program::start("kinds", &[other]),
        };
        let mut tracked = begin(&program, (Strategy::Redundant, 1));
        for _ in 0..times(12, 300) {
            let given_up = tracked.stop(&mut Nowhere, Some(Duration::from_nanos(1)));
            assert!(matches!(given_up, Err(ProcessError::TooLong { .. })));
            must_be_free(&program);
            program.must_be_well();
        }
        drop(tracked);
        program.must_report();
    }
}
