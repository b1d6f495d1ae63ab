//! Whatever goes wrong, the program goes on as before, and nothing stays attached to it.

use crate::store::{Nowhere, Store};
use crate::support::{Program, alone, descriptors, epoch, may_run, times, track};
use crate::view::tids;
use outlive_process::{ProcessError, Tracked};
use std::sync::atomic::{AtomicBool, Ordering};

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

/// A thread that is told to continue while it stands does so in another stop, whatever it was to do.
#[test]
fn being_told_to_continue_changes_nothing() {
    let _alone = alone();
    if !may_run("being_told_to_continue_changes_nothing") {
        return;
    }
    for words in [&["registers", "patient"][..], &["kinds", "nothing"]] {
        is_told_to_continue(Program::start(words[0], &words[1..]));
    }
}

fn is_told_to_continue(program: Program) {
    let mut tracked = track(&program);
    let done = AtomicBool::new(false);
    let failed = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                program.signal(libc::SIGCONT);
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        });
        let stop = |_| stop_of(&mut tracked).err();
        let failed = (0..times(60, 3000)).find_map(stop);
        done.store(true, Ordering::SeqCst);
        failed
    });
    assert!(failed.is_none(), "{failed:?}; {}", program.story());
    drop(tracked);
    must_be_free(&program);
    program.must_report();
}

fn stop_of(tracked: &mut Tracked) -> Result<(), ProcessError> {
    let (stopped, _) = tracked.stop(&mut Nowhere, None)?;
    stopped.resume().map(drop)
}
