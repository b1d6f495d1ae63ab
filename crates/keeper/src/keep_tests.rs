//! The loop, with a real child process and a stand-in for its tracker.

use super::*;
use crate::control::ask;
use crate::fake::{FakeLog, FakeProgram};
use std::path::Path;
use std::process::{Child, Command};
use std::rc::Rc;

fn child(script: &str) -> Child {
    Command::new("/bin/sh")
        .args(["-c", script])
        .spawn()
        .unwrap()
}

struct Outcome {
    ending: Ending,
    warnings: Vec<String>,
    log: FakeLog,
    trace: Vec<&'static str>,
}

/// Runs a keeper over a child while `script` talks to it from another thread.
fn keep<T: Send + 'static>(
    child: Child,
    every: Duration,
    fail: Option<&'static str>,
    script: impl FnOnce(&Path) -> T + Send + 'static,
) -> (Outcome, T) {
    let dir = tempfile::tempdir().unwrap();
    let mut signals = SignalQueue::open(&[]).unwrap();
    let mut control = Control::open(dir.path()).unwrap();
    let path = dir.path().to_path_buf();
    let talk = std::thread::spawn(move || script(&path));
    let pid = child.id();
    let fake = FakeProgram::new(fail);
    let (trace, fails) = (fake.trace.clone(), fake.fail.clone());
    let process = Rc::new(std::cell::RefCell::new(Some(child)));
    let mut attach = || {
        Ok(FakeProgram {
            trace: trace.clone(),
            fail: fails.clone(),
            process: process.clone(),
        })
    };
    let mut log = FakeLog::default();
    let mut warnings = Vec::new();
    let mut tell = |text: &str| warnings.push(text.to_owned());
    let settings = Settings {
        capture: crate::subject::Capture::default(),
        pid,
        every,
        child: true,
    };
    let keeper = Keeper::new(settings, &mut log, &mut attach, &mut tell).unwrap();
    let ending = keeper.run(&mut signals, &mut control).unwrap();
    drop(control);
    let answer = talk.join().unwrap();
    let trace = trace.borrow().clone();
    (
        Outcome {
            ending,
            warnings,
            log,
            trace,
        },
        answer,
    )
}

const NEVER: Duration = Duration::from_secs(3600);

fn status(dir: &Path) -> Status {
    match ask(dir, Request::Status, None).unwrap() {
        Some(Reply::Status(status)) => status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_exit_status_and_the_signal_come_through() {
    let (outcome, ()) = keep(child("exit 7"), NEVER, None, |_| ());
    assert_eq!(outcome.ending, Ending::Exited(7));
    let (outcome, ()) = keep(child("kill -TERM $$"), NEVER, None, |_| ());
    assert_eq!(outcome.ending, Ending::Killed(15));
    assert!(outcome.warnings.is_empty());
    assert_eq!(outcome.log.committed, 0);
}

#[test]
fn epochs_are_taken_until_the_planned_end_and_the_first_is_no_base() {
    let script = |dir: &Path| {
        while status(dir).committed < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = status(dir);
        let reply = ask(dir, Request::Stop, None).unwrap();
        (before, reply)
    };
    let every = Duration::from_millis(2);
    let (outcome, (before, reply)) = keep(child("exec sleep 1000"), every, None, script);
    assert_eq!(before.failures, 0);
    assert_eq!(before.tracking, "write-protect");
    assert_eq!(before.median_stop_us, Some(500));
    let Some(Reply::Taken { epoch, pids }) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(pids, before.pids);
    assert_eq!(outcome.ending, Ending::Planned(epoch.clone()));
    assert_eq!(epoch.epoch, outcome.log.committed);
    assert!(epoch.epoch > before.epoch);
    assert_eq!(outcome.log.bases, 0);
    assert_eq!(outcome.trace.last(), Some(&"end"));
    assert_eq!(
        crate::procfs::start_time(pids.pid),
        None,
        "the program is gone"
    );
}

#[test]
fn failures_are_counted_said_once_and_never_end_the_program() {
    let script = |dir: &Path| {
        let first = ask(dir, Request::Checkpoint, None).unwrap();
        for _ in 0..4 {
            ask(dir, Request::Checkpoint, None).unwrap();
        }
        let status = status(dir);
        let signal = Signal::KILL;
        let pid = Pid::from_raw(i32::try_from(status.pids.pid).unwrap()).unwrap();
        let alive = crate::procfs::start_time(status.pids.pid).is_some();
        rustix::process::kill_process(pid, signal).unwrap();
        (first, status, alive)
    };
    let (outcome, (first, status, alive)) =
        keep(child("exec sleep 1000"), NEVER, Some("write"), script);
    assert!(
        matches!(first, Some(Reply::Failed { exit: 4, .. })),
        "{first:?}"
    );
    assert_eq!(status.failures, 5);
    assert!(status.last_failure.unwrap().contains("planted in write"));
    assert!(alive);
    assert_eq!(outcome.ending, Ending::Killed(9));
    assert_eq!(outcome.warnings.len(), 1, "{:?}", outcome.warnings);
    let detached = outcome.trace.iter().filter(|s| **s == "detach").count();
    assert_eq!(
        detached, 2,
        "tracking is begun anew after every second failure"
    );
    assert_eq!(outcome.log.committed, 0);
}
