//! A strict guard knows at every instant how much may be dirty, whatever the program does to its memory:
//! compared with all that differs between two looks at the program that stands still.

use crate::store::Store;
use crate::support::{
    Program, adopt_orphans, alone, bring_back, clean_up, epoch, last_epoch, may_run, prepare, times,
};
use crate::trees;
use crate::view::View;
use outlive_epoch::EpochWriter;
use outlive_process::{Granularity, Strategy, TrackOptions, Tracked};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

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

/// What is mapped, and written at once, is not guarded yet: it goes beyond the limit, and that is counted,
/// at every instant.
#[test]
fn what_is_written_before_it_is_found_is_counted() {
    let _alone = alone();
    if !may_run("what_is_written_before_it_is_found_is_counted") {
        return;
    }
    /// Above what cannot be guarded.
    const ROOM: u64 = 40;
    let program = Program::start("mapper", &["burst"]);
    let mut tracked = begin(&program, 1);
    let mut store = Store::default();
    let failed = |e| -> ! { panic!("{e}; {}", program.story()) };
    let mut before = epoch(&mut tracked, &mut store).unwrap_or_else(|e| failed(e));
    let patient = Instant::now() + Duration::from_secs(120);
    let (mut rounds, mut beyond, mut most) = (0, 0, 0);
    while rounds < times(20, 1000) || beyond == 0 {
        assert!(Instant::now() < patient, "{rounds} rounds, none beyond");
        tracked.expose();
        let limit = tracked.exposed_pages() + ROOM;
        tracked.limit_dirty(Some(limit));
        std::thread::sleep(Duration::from_micros(rounds as u64 % 8 * 1500));
        let now = epoch(&mut tracked, &mut store).unwrap_or_else(|e| failed(e));
        let (truth, said) = (different(&before, &now), tracked.most_dirty());
        assert!(
            truth <= said + OURS,
            "round {rounds}: {truth} pages differ, and the guard knows of {said}"
        );
        beyond += usize::from(truth > limit + OURS);
        most = most.max(truth.saturating_sub(limit));
        before = now;
        store.epochs.drain(..store.epochs.len() - 1);
        program.must_be_well();
        rounds += 1;
    }
    println!("{beyond} of {rounds} times beyond the limit, by {most} pages at most");
    tracked.limit_dirty(None);
    tracked.detach().expect("detaching");
    program.must_report();
}

/// A power event in a program of two processes that both write: what it has to save is no more than was
/// known, and it is what comes back.
#[test]
fn a_power_event_saves_no_more_of_a_tree_than_was_known() {
    let _alone = alone();
    if !may_run("a_power_event_saves_no_more_of_a_tree_than_was_known") {
        return;
    }
    adopt_orphans();
    let what = ["twin", "maps", "brk", "holes", "file"];
    let mut program = Program::start("mapper", &what);
    let mut tracked = begin(&program, 1);
    let mut store = Store::default();
    let failed = |e| -> ! { panic!("{e}; {}", program.story()) };
    epoch(&mut tracked, &mut store).unwrap_or_else(|e| failed(e));
    let mut before: Option<BTreeMap<u32, View>> = None;
    let mut written: BTreeMap<u32, u64> = BTreeMap::new();
    let rounds = times(12, 400);
    for round in 0..=rounds {
        tracked.limit_dirty(Some(20_000));
        std::thread::sleep(Duration::from_micros(round as u64 % 8 * 1500));
        let mut writer = store.begin();
        let stopped = tracked.stop(&mut *writer, None);
        let (stopped, captured) = stopped.unwrap_or_else(|e| failed(e));
        captured.write(&mut *writer).expect("writing the epoch");
        let now = trees::look(program.pid, &writer.epoch);
        captured.sync_files().expect("syncing files");
        writer.commit(captured.facts).expect("the commit");
        if round == rounds {
            stopped.end().expect("the end");
            program.was_ended();
            before = Some(now);
            break;
        }
        // The mains are back.
        stopped.resume().expect("it runs on");
        let said = tracked.most_dirty();
        if let Some(before) = &before {
            assert!(now.len() == 2 && now.keys().eq(before.keys()));
            let mut truth = 0;
            for (pid, view) in &now {
                let pages = different(&before[pid], view);
                *written.entry(*pid).or_default() += pages;
                truth += pages;
            }
            assert!(
                truth <= said + 2 * OURS,
                "round {round}: {truth} pages differ, and the guards know of {said}"
            );
        }
        before = Some(now);
        store.epochs.drain(..store.epochs.len() - 1);
        program.must_be_well();
    }
    assert!(written.values().all(|pages| *pages > 10), "{written:?}");
    drop(tracked);
    clean_up();
    let ready = prepare(store.newest());
    let again = trees::look(program.pid, store.newest());
    // At an event nobody reads the flags of what was mapped since the epoch before: contents are compared.
    let contents = |seen: BTreeMap<u32, View>| -> BTreeMap<u32, _> {
        seen.into_iter().map(|(pid, v)| (pid, v.pages)).collect()
    };
    let (before, again) = (contents(before.expect("it was seen")), contents(again));
    assert!(
        before == again,
        "other contents: {:?} {:?}",
        before.keys(),
        again.keys()
    );
    ready.go().expect("letting it run");
    program.was_restored();
    program.must_report();
    clean_up();
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
