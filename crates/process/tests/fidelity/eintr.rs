//! Blocking calls go on as if nobody had stopped them, with the time that was left.

use crate::store::Store;
use crate::support::{
    Program, alone, bring_back, epoch, last_epoch, may_run, stop_and_resume, times, track,
};
use outlive_process::{ProcessError, TrackOptions, Tracked};
use std::time::Duration;

/// How long the program runs between two stops.
const PAUSE: Duration = Duration::from_millis(5);

#[test]
fn calls_do_not_notice_stops() {
    let _alone = alone();
    if !may_run("calls_do_not_notice_stops") {
        return;
    }
    let program = Program::start("eintr", &[]);
    let mut tracked = track(&program);
    for _ in 0..times(1000, 10_000) {
        stop_and_resume(&program, &mut tracked);
        std::thread::sleep(PAUSE);
    }
    tracked.detach().expect("detaching");
    program.must_report();
}

/// A stop that is given up, because not all threads stood in time, is not noticed either.
#[test]
fn calls_do_not_notice_stops_that_fail() {
    let _alone = alone();
    if !may_run("calls_do_not_notice_stops_that_fail") {
        return;
    }
    let program = Program::start("eintr", &[]);
    let mut failed = 0;
    for round in 0..times(200, 5_000) {
        let options = TrackOptions {
            stop_timeout: Duration::from_micros(round as u64 * 13 % 400),
            ..TrackOptions::default()
        };
        match Tracked::attach(program.pid, options) {
            Err(ProcessError::NotStopped { .. }) => failed += 1,
            Err(e) => panic!("attaching: {e}; {}", program.story()),
            Ok(tracked) => drop(tracked),
        }
        program.must_be_well();
        std::thread::sleep(PAUSE);
    }
    assert!(failed > 10, "{failed}");
    // What could not be removed in time is removed by whoever has more of it.
    track(&program).detach().expect("detaching");
    // Each new tracer gives a socket's call its whole time again: let it have that once.
    std::thread::sleep(Duration::from_secs(1));
    program.must_report();
}

#[test]
fn calls_go_on_after_death() {
    let _alone = alone();
    if !may_run("calls_go_on_after_death") {
        return;
    }
    let mut program = Program::start("eintr", &[]);
    for round in 0..times(20, 500) {
        let mut store = Store::default();
        let mut tracked = track(&program);
        // Some stops before the last one: what is left of a limit is carried over several.
        for _ in 0..round % 4 {
            epoch(&mut tracked, &mut store).expect("an epoch");
            std::thread::sleep(PAUSE);
        }
        let seen = last_epoch(&mut program, tracked, &mut store);
        bring_back(&mut program, store.newest(), &seen);
        std::thread::sleep(PAUSE * (round as u32 % 20));
        program.must_be_well();
    }
    program.must_report();
}
