//! Registers survive: those that nobody looks at too.

use crate::store::Store;
use crate::support::{
    Program, alone, bring_back, epoch, last_epoch, may_run, stop_and_resume, times, track,
};

#[test]
fn registers_survive_stops() {
    let _alone = alone();
    if !may_run("registers_survive_stops") {
        return;
    }
    let program = Program::start("registers", &[]);
    let mut tracked = track(&program);
    for _ in 0..times(200, 5000) {
        stop_and_resume(&program, &mut tracked);
    }
    tracked.detach().expect("detaching");
    program.must_report();
}

#[test]
fn registers_survive_death() {
    let _alone = alone();
    if !may_run("registers_survive_death") {
        return;
    }
    let mut program = Program::start("registers", &[]);
    for _ in 0..times(10, 200) {
        let mut store = Store::default();
        let tracked = track(&program);
        let seen = last_epoch(&mut program, tracked, &mut store);
        bring_back(&mut program, store.newest(), &seen);
    }
    program.must_report();
}

/// Memory that was never touched is neither copied nor brought into being: the C library reserves
/// 64 MiB for every thread that allocates.
#[test]
fn reserved_memory_costs_nothing() {
    let _alone = alone();
    if !may_run("reserved_memory_costs_nothing") {
        return;
    }
    let program = Program::start("registers", &[]);
    let mut tracked = track(&program);
    let mut store = Store::default();
    for _ in 0..3 {
        epoch(&mut tracked, &mut store).expect("an epoch");
        let (held, resident) = (store.newest().pages.len(), program.resident_pages());
        assert!(
            held as u64 <= resident,
            "{held} pages are held, {resident} are resident"
        );
    }
    drop(tracked);
    program.must_report();
}
