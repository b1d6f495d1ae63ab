//! Whatever goes wrong, the program goes on as before, and nothing stays attached to it.

use crate::store::Store;
use crate::support::{Program, alone, descriptors, epoch, may_run, track};
use crate::view::tids;
use outlive_process::{ProcessError, TrackOptions, Tracked};

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

const KINDS: [(&str, &str); 4] = [
    ("timer-of-some-thread", "timer"),
    ("netlink", "netlink"),
    ("io-uring", "io_uring"),
    ("seccomp", "seccomp"),
];

/// The refusal must name the process and the kind.
fn must_name(e: &ProcessError, program: &Program, word: &str) {
    let ProcessError::Refused(list) = e else {
        panic!("not a refusal: {e}")
    };
    let named = list.iter().any(|r| {
        r.pid == program.pid
            && r.program == "refused"
            && r.what.to_lowercase().contains(&word.to_lowercase())
            && !r.remedy.is_empty()
    });
    assert!(named, "{word} is not named: {e}");
}

#[test]
fn what_cannot_be_saved_is_refused_at_the_attach() {
    let _alone = alone();
    if !may_run("what_cannot_be_saved_is_refused_at_the_attach") {
        return;
    }
    for (kind, word) in KINDS {
        let program = Program::start("refused", &[kind]);
        let (maps, fds) = (program.mappings(), descriptors(program.pid));
        match Tracked::attach(program.pid, TrackOptions::default()) {
            Err(e) => must_name(&e, &program, word),
            Ok(_) => panic!("{kind} was not refused"),
        }
        must_be_free(&program);
        assert_eq!((maps, fds), (program.mappings(), descriptors(program.pid)));
        program.must_report();
    }
}

#[test]
fn what_cannot_be_saved_is_refused_at_the_stop() {
    let _alone = alone();
    if !may_run("what_cannot_be_saved_is_refused_at_the_stop") {
        return;
    }
    for (kind, word) in KINDS {
        let program = Program::start("refused", &[kind, "later"]);
        let mut tracked = track(&program);
        let mut store = Store::default();
        epoch(&mut tracked, &mut store).expect("an epoch before");
        program.signal(libc::SIGUSR2);
        program.await_word("held");
        match epoch(&mut tracked, &mut store) {
            Err(e) => must_name(&e, &program, word),
            Ok(_) => panic!("{kind} was not refused"),
        }
        must_be_free(&program);
        drop(tracked);
        must_be_free(&program);
        program.must_report();
    }
}

/// A process that shares what only threads should, whether it was there before or comes later.
#[test]
fn what_only_threads_should_share_is_refused() {
    let _alone = alone();
    if !may_run("what_only_threads_should_share_is_refused") {
        return;
    }
    let must_say = |e: &ProcessError, word: &str| {
        let refused = matches!(e, ProcessError::Refused(_));
        assert!(refused && e.to_string().contains(word), "{word}: {e}");
    };
    for (kind, word) in [
        ("shared-descriptors", "its table of descriptors is shared"),
        ("shared-directory", "its working directory is shared"),
        ("shared-memory", "its memory is shared"),
    ] {
        let program = Program::start("refused", &[kind]);
        match Tracked::attach(program.pid, TrackOptions::default()) {
            Err(e) => must_say(&e, word),
            Ok(_) => panic!("{kind} was not refused"),
        }
        must_be_free(&program);
        program.must_report();
        let program = Program::start("refused", &[kind, "later"]);
        let mut tracked = track(&program);
        let mut store = Store::default();
        epoch(&mut tracked, &mut store).expect("an epoch before");
        program.signal(libc::SIGUSR2);
        program.await_word("held");
        for _ in 0..2 {
            match epoch(&mut tracked, &mut store) {
                Err(e) => must_say(&e, word),
                Ok(_) => panic!("{kind} was not refused"),
            }
            must_be_free(&program);
        }
        drop(tracked);
        program.must_report();
    }
}

#[test]
fn tracking_leaves_no_trace() {
    let _alone = alone();
    if !may_run("tracking_leaves_no_trace") {
        return;
    }
    for kind in ["nothing"] {
        let program = Program::start("refused", &[kind]);
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
}

#[test]
fn a_dropped_stop_lets_the_program_go_on() {
    let _alone = alone();
    if !may_run("a_dropped_stop_lets_the_program_go_on") {
        return;
    }
    let program = Program::start("refused", &["nothing"]);
    let mut tracked = track(&program);
    for _ in 0..20 {
        drop(tracked.stop().expect("the stop"));
        must_be_free(&program);
    }
    drop(tracked);
    must_be_free(&program);
    program.must_report();
}
