//! Somebody dies in the middle: the program, or whoever traces it.

use crate::store::{Nowhere, Store};
use crate::support::{Program, alone, may_run, times, track, unseen_epoch};
use crate::unharmed::must_be_free;
use outlive_process::{ProcessError, TrackOptions, Tracked};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The process that the tracer of [`a_dead_tracer_leaves_the_program_running`] traces.
const VICTIM: &str = "OUTLIVE_TEST_VICTIM";

#[test]
fn a_program_that_is_killed_is_gone() {
    let _alone = alone();
    if !may_run("a_program_that_is_killed_is_gone") {
        return;
    }
    for round in 0..times(20, 500) {
        let mut program = Program::start("zoo", &["{dir}", "memory"]);
        let mut tracked = track(&program);
        let mut store = Store::default();
        let pid = program.pid;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(round as u64 * 997 % 40_000));
            outlive_linux::thread::kill(pid)
        });
        let error = loop {
            if let Err(e) = unseen_epoch(&mut tracked, &mut store) {
                break e;
            }
            store.epochs.clear();
        };
        assert!(
            matches!(error, ProcessError::Gone { .. }),
            "round {round}: {error:?}"
        );
        killer.join().expect("the killer").expect("the kill");
        drop(tracked);
        // No thread of it is left as a zombie that only its tracer could reap.
        program.kill();
    }
}

/// No test: the tracer that is killed by the next one, which runs it in a process of its own.
#[test]
#[ignore = "run by a_dead_tracer_leaves_the_program_running"]
fn tracer() {
    let Some(pid) = std::env::var(VICTIM).ok().and_then(|v| v.parse().ok()) else {
        return;
    };
    loop {
        match Tracked::attach(pid, TrackOptions::default()) {
            Ok(mut tracked) => {
                for _ in 0..5 {
                    let (stopped, _) = tracked.stop(&mut Nowhere, None).expect("the stop");
                    stopped.resume().expect("resuming");
                }
            }
            // An earlier tracer's thread is still helping itself.
            Err(ProcessError::Refused(_)) => std::thread::sleep(Duration::from_millis(50)),
            Err(e) => panic!("attaching: {e}"),
        }
    }
}

#[test]
fn a_dead_tracer_leaves_the_program_running() {
    let _alone = alone();
    if !may_run("a_dead_tracer_leaves_the_program_running") {
        return;
    }
    let program = Program::start("registers", &["patient"]);
    let said = outlives_tracers(program, times(12, 300));
    let words = |line: &str| line.rsplit_once(' ')?.1.parse::<u64>().ok();
    assert!(said.lines().filter_map(words).all(|n| n > 0), "{said}");
    // Here threads of several processes use one working memory.
    let program = Program::start("kinds", &["grandchild-sharing-all", "patient"]);
    outlives_tracers(program, times(6, 100));
}

/// Kills one tracer after the other; what the program reports then.
fn outlives_tracers(program: Program, tracers: usize) -> String {
    let maps = program.settled_mappings();
    for round in 0..tracers {
        let mut tracer = Command::new(std::env::current_exe().expect("this test has a path"))
            .args(["--exact", "deaths::tracer", "--ignored"])
            .env(VICTIM, program.pid.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the tracer starts");
        std::thread::sleep(Duration::from_micros(60_000 + round as u64 * 7919 % 90_000));
        assert!(
            tracer.try_wait().expect("its state").is_none(),
            "the tracer ended of itself"
        );
        tracer.kill().expect("killing the tracer");
        tracer.wait().expect("the tracer's end");
        must_be_free(&program);
        program.must_be_well();
    }
    // A successor removes what was left, as soon as all threads have helped themselves.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Tracked::attach(program.pid, TrackOptions::default()) {
            Ok(tracked) => break tracked.detach().expect("detaching"),
            Err(ProcessError::Refused(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(e) => panic!("attaching: {e}; {}", program.story()),
        }
    }
    assert_eq!(maps, program.mappings());
    program.must_report()
}
