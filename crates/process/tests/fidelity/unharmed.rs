//! Whatever goes wrong, the program goes on as before, and nothing stays attached to it.

use crate::store::{Nowhere, Store};
use crate::support::{Program, alone, descriptors, epoch, may_run, track};
use crate::view::tids;

/// Fails if any thread is still traced or stopped.
pub fn must_be_free(program: &Program) {
    for tid in tids(program.pid) {
        let path = format!("/proc/{}/task/{tid}/status", program.pid);
        let status = std::fs::read_to_string(path).expect("its status");
        assert!(
            status.contains("TracerPid:\t0\n"),
            "thread {tid} is traced:\n{status}"
        );
        assert!(
            !status.contains("State:\tt"),
            "thread {tid} stands:\n{status}"
        );
    }
}

#[test]
fn tracking_leaves_no_trace() {
    let _alone = alone();
    if !may_run("tracking_leaves_no_trace") {
        return;
    }
    let program = Program::start("kinds", &["nothing"]);
    let (maps, fds) = (program.mappings(), descriptors(program.pid));
    for _ in 0..10 {
        let mut tracked = track(&program);
        let mut store = Store::default();
        for _ in 0..3 {
            epoch(&mut tracked, &mut store).expect("an epoch");
            must_be_free(&program);
        }
        tracked.detach().expect("detaching");
        must_be_free(&program);
        assert_eq!(maps, program.mappings());
        assert_eq!(fds, descriptors(program.pid));
    }
    program.must_report();
}

#[test]
fn a_dropped_stop_lets_the_program_go_on() {
    let _alone = alone();
    if !may_run("a_dropped_stop_lets_the_program_go_on") {
        return;
    }
    let program = Program::start("kinds", &["nothing"]);
    let mut tracked = track(&program);
    for _ in 0..20 {
        drop(tracked.stop(&mut Nowhere, None).expect("the stop"));
        must_be_free(&program);
    }
    drop(tracked);
    must_be_free(&program);
    program.must_report();
}
