//! TCP connections within the program, at full speed: no byte is lost or doubled.

use crate::store::Store;
use crate::support::{
    Program, alone, bring_back, last_epoch, may_run, stop_and_resume, times, track,
};
use std::time::Duration;

#[test]
fn streams_do_not_notice_stops() {
    let _alone = alone();
    if !may_run("streams_do_not_notice_stops") {
        return;
    }
    let program = Program::start("streams", &[]);
    let mut tracked = track(&program);
    for n in 0..times(100, 5000) {
        stop_and_resume(&program, &mut tracked);
        std::thread::sleep(Duration::from_millis(n as u64 % 5));
    }
    tracked.detach().expect("detaching");
    program.must_report();
}

#[test]
fn streams_survive_death() {
    let _alone = alone();
    if !may_run("streams_survive_death") {
        return;
    }
    let mut program = Program::start("streams", &[]);
    for n in 0..times(20, 500) {
        let mut store = Store::default();
        let tracked = track(&program);
        let seen = last_epoch(&mut program, tracked, &mut store);
        bring_back(&mut program, store.newest(), &seen);
        std::thread::sleep(Duration::from_millis(n as u64 * 7 % 50));
        program.must_be_well();
    }
    program.must_report();
}
