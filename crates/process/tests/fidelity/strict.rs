//! A strict guard knows at every instant how much may be dirty, whatever the program does to its memory:
//! compared with all that differs between two looks at the program that stands still.

use crate::store::Store;
use crate::support::{
    Program, adopt_orphans, alone, bring_back, clean_up, epoch, last_epoch, may_run, times,
};
use crate::view::View;
use outlive_process::{Granularity, Strategy, TrackOptions, Tracked};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::Duration;

/// Pages that the capture itself may change: what is left of a sleep is written to the stack.
const OURS: u64 = 4;

pub fn begin(program: &Program, unit: u32) -> Tracked {
    let options = TrackOptions {
        strategy: Strategy::Cow,
        granularity: Granularity::new(unit).expect("a power of two"),
        strict: true,
        ..TrackOptions::default()
    };
    Tracked::attach(program.pid, options).unwrap_or_else(|e| panic!("{e}; {}", program.story()))
}

/// Pages that are not as they were: those are to be saved. (What is gone has no contents.)
fn different(before: &View, now: &View) -> u64 {
    let differs = |(at, page): &(&u64, &Vec<u8>)| before.pages.get(at) != Some(page);
    now.pages.iter().filter(differs).count() as u64
}

/// Takes epochs of a program that does this to its memory, with a limit; returns the most pages that
/// were different at once. At no stop there are more than the guard says.
fn audit(what: &[&str], limit: u64, rounds: usize) -> u64 {
    let program = Program::start("mapper", what);
    let mut tracked = begin(&program, 1);
    let mut store = Store::default();
    let failed = |e| -> ! { panic!("{what:?}: {e}; {}", program.story()) };
    let mut before = epoch(&mut tracked, &mut store).unwrap_or_else(|e| failed(e));
    let mut most = 0;
    for round in 0..rounds {
        tracked.limit_dirty(Some(limit));
        std::thread::sleep(Duration::from_micros(round as u64 % 8 * 1500));
        let now = epoch(&mut tracked, &mut store).unwrap_or_else(|e| failed(e));
        let (truth, said) = (different(&before, &now), tracked.most_dirty());
        assert!(
            truth <= said + OURS,
            "{what:?}, round {round}: {truth} pages differ, and the guard knows of {said}"
        );
        most = most.max(truth);
        before = now;
        store.epochs.drain(..store.epochs.len() - 1);
        program.must_be_well();
    }
    tracked.limit_dirty(None);
    tracked.detach().expect("detaching");
    program.must_report();
    most
}

#[test]
fn a_strict_guard_knows_of_all_that_is_dirty() {
    let _alone = alone();
    if !may_run("a_strict_guard_knows_of_all_that_is_dirty") {
        return;
    }
    const LIMIT: u64 = 20_000;
    let rounds = times(12, 1000);
    for what in ["maps", "brk", "holes", "file"] {
        let most = audit(&[what], LIMIT, rounds);
        // There was something to be known.
        assert!(most > 10, "{what}: {most}");
    }
    audit(&["maps", "brk", "holes", "file"], LIMIT, 2 * rounds);
}

/// What is there, and what is not, stands as it was.
#[test]
fn a_strict_guard_changes_nothing() {
    let _alone = alone();
    if !may_run("a_strict_guard_changes_nothing") {
        return;
    }
    adopt_orphans();
    for unit in [1, 16] {
        let mut program = Program::start("shifter", &[&unit.to_string()]);
        let mut store = Store::default();
        let mut tracked = begin(&program, unit);
        for round in 0..times(6, 200) {
            epoch(&mut tracked, &mut store)
                .unwrap_or_else(|e| panic!("unit {unit}: {e}; {}", program.story()));
            tracked.limit_dirty(Some(5000));
            std::thread::sleep(Duration::from_millis(round as u64 % 20));
            program.must_be_well();
        }
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        bring_back(&mut program, store.newest(), &seen);
        program.must_report();
    }
}

/// Whoever touches holes is held at the limit.
#[test]
fn who_touches_holes_is_held() {
    let _alone = alone();
    if !may_run("who_touches_holes_is_held") {
        return;
    }
    let program = Program::start("mapper", &["holes"]);
    let mut tracked = begin(&program, 1);
    let mut store = Store::default();
    epoch(&mut tracked, &mut store).expect("an epoch");
    tracked.expose();
    let limit = tracked.exposed_pages() + 100;
    tracked.limit_dirty(Some(limit));
    for _ in 0..4 {
        epoch(&mut tracked, &mut store).expect("an epoch");
        let held: Vec<_> = tracked.pressure().collect();
        let mut held: Vec<_> = held
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        let patience = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        assert!(poll(&mut held, Some(&patience)).is_ok_and(|n| n > 0));
        // Whoever is held does not go on by itself.
        std::thread::sleep(Duration::from_millis(30));
        let dirty = tracked.dirty_pages().expect("it is guarded");
        assert!(dirty <= limit, "{dirty} of {limit}");
    }
    tracked.limit_dirty(None);
    tracked.detach().expect("detaching");
    program.must_report();
}

/// A child that nobody guards yet counts with all its memory.
#[test]
fn a_new_child_counts_whole() {
    let _alone = alone();
    if !may_run("a_new_child_counts_whole") {
        return;
    }
    const CHILD: u64 = 3000;
    let program = Program::start("mapper", &["child"]);
    let mut tracked = begin(&program, 1);
    epoch(&mut tracked, &mut Store::default()).expect("an epoch");
    tracked.limit_dirty(Some(1_000_000));
    let began = std::time::Instant::now();
    while tracked.most_dirty() < CHILD {
        assert!(began.elapsed() < Duration::from_secs(30), "it is not seen");
        std::thread::sleep(Duration::from_millis(1));
    }
    tracked.limit_dirty(None);
    tracked.detach().expect("detaching");
    program.must_report();
}
