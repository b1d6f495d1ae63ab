//! The loop, with a real child process and a stand-in for its tracker.

use super::*;
use crate::budget::model::Figures;
use crate::control::{Request, ask};
use crate::epoch::Hooks;
use crate::fake::{FakeLog, FakeProgram};
use crate::power::Heard;
use crate::table::Counts;
use outlive_linux::signals::Received;
use rustix::process::Pid;
use std::cell::RefCell;
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
    /// What the table says when the keeper is gone.
    totals: Option<crate::table::Totals>,
}

/// Runs a keeper over a child while `script` talks to it from another thread.
fn keep<T: Send + 'static>(
    child: Child,
    every: Duration,
    fail: Option<&'static str>,
    script: impl FnOnce(&Path) -> T + Send + 'static,
) -> (Outcome, T) {
    keep_with(child, every, None, fail, script)
}

fn keep_with<T: Send + 'static>(
    child: Child,
    every: Duration,
    hold_up: Option<HoldUp>,
    fail: Option<&'static str>,
    script: impl FnOnce(&Path) -> T + Send + 'static,
) -> (Outcome, T) {
    keep_log(child, every, hold_up, fail, FakeLog::default(), script)
}

/// The same over a log; one that holds an epoch is gone on from.
fn keep_log<T: Send + 'static>(
    child: Child,
    every: Duration,
    hold_up: Option<HoldUp>,
    fail: Option<&'static str>,
    mut log: FakeLog,
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
            presses: if hold_up.is_some_and(|h| h.strict) {
                3
            } else {
                0
            },
            pressed: None,
            most: Rc::new(RefCell::new(u64::from(fail == Some("wild")) << 40)),
        })
    };
    let restored = (log.committed > 0).then(|| attach().expect("a tracker"));
    let mut warnings = Vec::new();
    let mut tell = |text: &str| warnings.push(text.to_owned());
    let settings = Settings {
        every,
        hold_up,
        ..settings(pid)
    };
    let mut keeper = Keeper::new(settings, &mut log, &mut attach, &mut tell)
        .unwrap()
        .with_table(Table::open_at(dir.path().join("table.heap")));
    if let Some(program) = restored {
        keeper = keeper.going_on(program);
    }
    let ending = keeper.run(&mut signals, &mut control).unwrap();
    drop(keeper);
    drop(control);
    let answer = talk.join().unwrap();
    let trace = trace.borrow().clone();
    (
        Outcome {
            ending,
            warnings,
            log,
            trace,
            totals: crate::table::read(dir.path()),
        },
        answer,
    )
}

fn settings(pid: u32) -> Settings {
    Settings {
        capture: crate::subject::Capture::default(),
        pid,
        every: NEVER,
        child: true,
        hold_up: None,
        max_wear: None,
        max_stop: None,
        policy: Policy::default(),
        pack: None,
        model: Model::new(Figures::default()),
    }
}

const NEVER: Duration = Duration::from_secs(3600);

fn status(dir: &Path) -> Status {
    match ask(dir, Request::Status, None).unwrap() {
        Some(Reply::Status(status)) => *status,
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
    let Some(Reply::Taken { epoch, pids, .. }) = reply else {
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
    let totals = outcome.totals.unwrap();
    assert_eq!((totals.keepers, totals.counts.failures), (1, 5));
    assert!(totals.last_failure.unwrap().contains("planted in write"));
}

#[test]
fn memory_given_back_costs_an_epoch_but_not_who_asks_for_one() {
    for (how, abandoned, committed) in [("behind once", 1, 1), ("behind", 2, 0)] {
        let script = move |dir: &Path| {
            let first = ask(dir, Request::Checkpoint, None).unwrap();
            let status = status(dir);
            let pid = Pid::from_raw(i32::try_from(status.pids.pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
            (first, status)
        };
        let (outcome, (first, status)) = keep(child("exec sleep 1000"), NEVER, Some(how), script);
        match first {
            Some(Reply::Taken { .. }) => assert_eq!(committed, 1, "{how}"),
            Some(Reply::Failed { .. }) => assert_eq!(committed, 0, "{how}"),
            other => panic!("{how}: {other:?}"),
        }
        assert_eq!((status.abandoned, status.failures), (abandoned, 0), "{how}");
        assert_eq!(outcome.log.committed, committed, "{how}");
        assert!(!outcome.trace.contains(&"forget"), "{how}: nothing is lost");
    }
}

#[test]
fn a_tracker_that_takes_the_place_of_another_begins_with_everything() {
    for (failures, bases) in [(1, 0), (REATTACH_AFTER, 1)] {
        let script = move |dir: &Path| {
            for _ in 0..=failures {
                ask(dir, Request::Checkpoint, None).unwrap();
            }
            ask(dir, Request::Stop, None).unwrap();
        };
        let log = FakeLog {
            committed: 5,
            fail_begin: failures,
            ..FakeLog::default()
        };
        let sleep = child("exec sleep 1000");
        let (outcome, ()) = keep_log(sleep, NEVER, None, None, log, script);
        assert_eq!((outcome.log.committed, outcome.log.bases), (7, bases));
    }
}

fn hold_up(ms: u64) -> Option<HoldUp> {
    Some(HoldUp {
        budget_ns: ms * 1_000_000,
        strict: false,
    })
}

#[test]
fn the_mains_come_back_and_the_program_goes_on() {
    let script = |dir: &Path| {
        let soon = Request::Power {
            mains_back_after_us: Some(20_000),
            at_ns: None,
        };
        let first = ask(dir, soon, None).unwrap();
        let before = status(dir);
        // Nobody says after how long: then somebody says that it is so.
        let there = dir.to_path_buf();
        let event = std::thread::spawn(move || ask(&there, Request::POWER, None).unwrap());
        while status(dir).epoch == before.epoch {
            std::thread::sleep(Duration::from_millis(1));
        }
        let heard = ask(dir, Request::PowerBack, None).unwrap();
        let second = event.join().unwrap();
        let after = status(dir);
        ask(dir, Request::Stop, None).unwrap();
        (first, before, heard, second, after)
    };
    let sleep = child("exec sleep 1000");
    let (outcome, (first, before, heard, second, after)) =
        keep_with(sleep, NEVER, hold_up(60_000), None, script);
    let went_on = |reply: &Option<Reply>| match reply {
        Some(Reply::Taken { power, epoch, .. }) => {
            let power = power.unwrap();
            assert_eq!(power.budget_us, Some(60_000_000));
            assert!(power.event_us < 60_000_000 && epoch.stop_us > 0);
            power.went_on
        }
        other => panic!("{other:?}"),
    };
    assert!(went_on(&first) && went_on(&second));
    assert_eq!(heard, Some(Reply::Heard));
    assert_eq!((before.events.count, after.events.count), (1, 2));
    assert_eq!(after.events.late, 0);
    let totals = outcome.totals.unwrap();
    let wanted = Counts {
        epochs: outcome.log.committed,
        events: 2,
        event_longest_ns: after.events.longest_ns,
        ..totals.counts
    };
    assert_eq!(totals.counts, wanted);
    assert_eq!(outcome.trace[..4], ["stop", "write", "sync", "resume"]);
    assert_eq!(outcome.trace.last(), Some(&"end"));
}

#[test]
fn when_the_hold_up_has_passed_the_program_is_ended_and_without_one_at_once() {
    for budget in [hold_up(10), None] {
        let script = |dir: &Path| ask(dir, Request::POWER, None).unwrap();
        let sleep = child("exec sleep 1000");
        let (outcome, reply) = keep_with(sleep, NEVER, budget, None, script);
        let Some(Reply::Taken { power, epoch, .. }) = reply else {
            panic!("{reply:?}")
        };
        assert!(!power.unwrap().went_on);
        assert_eq!(outcome.ending, Ending::Planned(epoch));
        assert_eq!(outcome.trace, ["stop", "write", "sync", "end"]);
    }
    // Later than the machine can have lived.
    let script = |dir: &Path| {
        let late = Request::Power {
            mains_back_after_us: Some(1 << 40),
            at_ns: None,
        };
        ask(dir, late, None).unwrap()
    };
    let sleep = child("exec sleep 1000");
    let (outcome, _) = keep_with(sleep, NEVER, hold_up(10), None, script);
    assert!(matches!(outcome.ending, Ending::Planned(_)));
}

#[test]
fn an_event_that_fails_says_which_epoch_counts() {
    let script = |dir: &Path| {
        let reply = ask(dir, Request::POWER, None).unwrap();
        let status = status(dir);
        let pid = Pid::from_raw(i32::try_from(status.pids.pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        (reply, status)
    };
    let sleep = child("exec sleep 1000");
    let (_, (reply, status)) = keep_with(sleep, NEVER, hold_up(10), Some("stop"), script);
    let Some(Reply::Failed { error, exit: 1 }) = reply else {
        panic!("{reply:?}")
    };
    assert!(error.contains("epoch 0 is what would come back"), "{error}");
    assert_eq!((status.events.count, status.events.late), (1, 1));
}

#[test]
fn strictly_the_first_epoch_is_held_and_whoever_is_at_the_limit_gets_an_epoch() {
    let strict = Some(HoldUp {
        budget_ns: 600_000_000_000,
        strict: true,
    });
    let script = |dir: &Path| {
        // Far apart: only the limit asks for more than the first.
        let before = status(dir).budget.unwrap();
        ask(dir, Request::Checkpoint, None).unwrap();
        while status(dir).committed < 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let status = status(dir);
        ask(dir, Request::Stop, None).unwrap();
        assert_eq!(before.dirty_bytes, None, "all of it is unsaved");
        status
    };
    let sleep = child("exec sleep 1000");
    let (outcome, status) = keep_with(sleep, NEVER, strict, None, script);
    let first = ["precopy", "stop", "write", "sync", "resume", "limit"];
    assert_eq!(outcome.trace[..6], first, "held until it was durable");
    let second = ["precopy", "stop", "resume", "write", "sync", "limit"];
    assert_eq!(outcome.trace[6..12], second);
    let budget = status.budget.unwrap();
    assert_eq!(budget.dirty_bytes, Some(7 * 4096));
    assert!(budget.expected_bytes >= 7 * 4096);
    assert!(budget.limit_bytes.unwrap() > 0);
}

#[test]
fn violations_after_the_last_epoch_are_in_the_table_too() {
    let strict = Some(HoldUp {
        budget_ns: 600_000_000_000,
        strict: true,
    });
    let script = |dir: &Path| {
        ask(dir, Request::Checkpoint, None).unwrap();
        while status(dir).committed < 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Once more than it takes to look after the last one.
        let [last, .., after] = [0; 3].map(|_| status(dir));
        let pid = Pid::from_raw(i32::try_from(after.pids.pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        assert_eq!((last.committed, after.committed), (4, 4));
        after.budget.unwrap().violations
    };
    let sleep = child("exec sleep 1000");
    let (outcome, violations) = keep_with(sleep, NEVER, strict, Some("wild"), script);
    assert!(violations > 1, "{violations}");
    assert_eq!(outcome.totals.unwrap().counts.violations, violations);
}

#[test]
fn strictly_nobody_is_held_before_there_is_an_epoch() {
    let strict = Some(HoldUp {
        budget_ns: 600_000_000_000,
        strict: true,
    });
    let script = |dir: &Path| {
        ask(dir, Request::Checkpoint, None).unwrap();
        let status = status(dir);
        let pid = Pid::from_raw(i32::try_from(status.pids.pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        let budget = status.budget.unwrap();
        assert_eq!(budget.dirty_bytes, None, "what the epoch took is unsaved");
        assert!(budget.expected_bytes >= 7 * 4096);
    };
    let sleep = child("exec sleep 1000");
    let (outcome, ()) = keep_with(sleep, NEVER, strict, Some("write"), script);
    assert!(outcome.trace.contains(&"no limit"), "{:?}", outcome.trace);
    assert!(!outcome.trace.contains(&"limit"), "{:?}", outcome.trace);
}

/// What a keeper says of itself that has done nothing yet.
fn idle_status() -> Status {
    let (mut log, mut tell) = (FakeLog::default(), |_: &str| ());
    let mut attach = || Ok(FakeProgram::new(None));
    let settings = Settings {
        child: false,
        ..settings(std::process::id())
    };
    let keeper = Keeper::new(settings, &mut log, &mut attach, &mut tell);
    keeper.unwrap().status()
}

/// What becomes of a power event when all is durable, with a budget of so many milliseconds and with
/// these requests in the inbox, in this order. The event is one of them, or came before them by a
/// signal. Says what each is answered, if it is, and how many are left to the loop.
fn decided(
    budget_ms: u64,
    by_signal: bool,
    requests: &[Request],
) -> (Fate, Vec<Option<Reply>>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut signals = SignalQueue::open(&[]).unwrap();
    let mut control = Control::open(dir.path()).unwrap();
    let (mut inbox, mut clients) = (VecDeque::new(), Vec::new());
    for &request in requests {
        let path = dir.path().to_path_buf();
        clients.push(std::thread::spawn(move || ask(&path, request, None)));
        let before = inbox.len();
        while inbox.len() == before {
            let heard = control.requests().into_iter();
            inbox.extend(heard.map(|(request, asker)| Heard::Request(request, asker)));
        }
    }
    let signal = Heard::Signal(Received {
        signal: Signal::POWER.as_raw(),
        from_kernel: false,
        sender: 0,
    });
    let mut ears = Ears {
        signals: &mut signals,
        control: &mut control,
        inbox,
    };
    let status = idle_status();
    let mut desk = Desk {
        ears: &mut ears,
        event: by_signal.then(|| Event::of(signal).unwrap()),
        budget: Some(budget_ms * 1_000_000),
        longest_stop: None,
        patient: true,
        status: &status,
        durable: None,
    };
    assert!(desk.urgent());
    let taken = Taken {
        epoch: 1,
        time_ns: 1,
        processes: 1,
        threads: 1,
        stop_us: 1,
        durable_us: 1,
        pages: 1,
        bytes_written: 1,
        saved_bytes: 0,
        steps: crate::epoch::Steps::default(),
    };
    let fate = desk.decide(&taken);
    let answer = Reply::Taken {
        epoch: taken,
        pids: status.pids,
        power: None,
    };
    desk.event.take().unwrap().answer(&answer);
    let left = ears.inbox.len();
    drop(ears);
    drop(control);
    let answers = clients
        .into_iter()
        .map(|c| c.join().unwrap().ok().flatten());
    (fate, answers.collect(), left)
}

#[test]
fn an_outage_of_which_two_tell_is_one_event() {
    let taken = |reply: &Option<Reply>| matches!(reply, Some(Reply::Taken { .. }));
    let (power, back) = (Request::POWER, Request::PowerBack);
    for by_signal in [true, false] {
        let (fate, answers, left) = decided(60_000, by_signal, &[power, power, back]);
        assert_eq!((fate, left), (Fate::RunsOn, 0));
        assert!(taken(&answers[0]) && taken(&answers[1]), "{answers:?}");
        assert_eq!(answers[2], Some(Reply::Heard));
    }
    // Whoever knows that it is no simulation is believed.
    let simulated = Request::Power {
        mains_back_after_us: Some(0),
        at_ns: None,
    };
    let (fate, answers, _) = decided(10, false, &[simulated, power]);
    assert_eq!(fate, Fate::Ended);
    assert!(answers.iter().all(taken), "{answers:?}");
    // The next outage is another event.
    let (fate, answers, left) = decided(60_000, false, &[power, back, power]);
    assert_eq!((fate, left), (Fate::RunsOn, 1));
    assert!(taken(&answers[0]) && answers[2].is_none(), "{answers:?}");
}

#[test]
fn what_was_said_of_the_mains_before_an_event_is_no_news() {
    let (power, back) = (Request::POWER, Request::PowerBack);
    let (fate, answers, left) = decided(10, false, &[back, power]);
    assert_eq!((fate, left), (Fate::Ended, 0));
    assert_eq!(answers[0], Some(Reply::Heard));
    let (fate, ..) = decided(60_000, true, &[back]);
    assert_eq!(fate, Fate::RunsOn, "it was said while the epoch was taken");
}
