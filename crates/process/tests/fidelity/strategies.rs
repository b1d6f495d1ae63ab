//! Every strategy brings back exactly what stood, of programs whose memory changes in all ways.

use crate::store::Store;
use crate::support::{
    NoFiles, Program, adopt_orphans, alone, bring_back, clean_up, epoch, last_epoch, look, may_run,
    moving, prepare, times,
};
use crate::unharmed::must_be_free;
use crate::view::View;
use outlive_epoch::{EpochWriter, SpaceId};
use outlive_process::{
    Captured, Granularity, ProcessError, Strategy, TrackOptions, Tracked, Tracking,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// What is tried: strategies and units.
const ALL: [(Strategy, u32); 8] = [
    (Strategy::Copy, 1),
    (Strategy::Incremental, 1),
    (Strategy::Incremental, 8),
    (Strategy::Incremental, 1024),
    (Strategy::Redundant, 1),
    (Strategy::Redundant, 64),
    (Strategy::Cow, 1),
    (Strategy::Cow, 16),
];

pub fn begin(program: &Program, (strategy, pages): (Strategy, u32)) -> Tracked {
    let options = TrackOptions {
        strategy,
        granularity: Granularity::new(pages).expect("a power of two"),
        ..TrackOptions::default()
    };
    Tracked::attach(program.pid, options)
        .unwrap_or_else(|e| panic!("{strategy}: {e}; {}", program.story()))
}

#[test]
fn every_strategy_brings_back_what_stood() {
    let _alone = alone();
    if !may_run("every_strategy_brings_back_what_stood") {
        return;
    }
    adopt_orphans();
    for seed in 0..times(2, 60) {
        for how in ALL {
            let mut program = Program::start("shifter", &[&seed.to_string()]);
            let mut store = Store::default();
            for life in 0..2 - seed.min(1) {
                let mut tracked = begin(&program, how);
                for _ in 0..4 {
                    epoch(&mut tracked, &mut store)
                        .unwrap_or_else(|e| panic!("{how:?}: {e}; {}", program.story()));
                    std::thread::sleep(Duration::from_millis(seed as u64 % 20));
                    program.must_be_well();
                }
                assert_eq!(
                    *tracked.tracking() == Tracking::Off,
                    how.0 == Strategy::Copy
                );
                println!("{how:?}, seed {seed}, life {life}");
                let seen = last_epoch(&mut program, tracked, &mut store);
                clean_up();
                if life == 0 {
                    a_spoilt_page_is_seen(&program, &store, &seen);
                }
                bring_back(&mut program, store.newest(), &seen);
                store.epochs.clear();
            }
            program.must_report();
        }
    }
}

/// The comparison would find a page that is not as it was.
fn a_spoilt_page_is_seen(program: &Program, store: &Store, seen: &crate::view::View) {
    let mut spoilt = store.newest().clone();
    let own = |space: SpaceId| space.0 == program.pid;
    // The lowest is of the program's own data; the highest would be of its stack, some of which
    // moves, and some of which is its command line.
    let mut pages = spoilt.pages.iter_mut();
    let lowest = pages.find(|((space, _), _)| own(*space));
    let page = Arc::make_mut(lowest.expect("a page of its own").1);
    page[100] ^= 1;
    let ready = prepare(&spoilt);
    let found = seen.differences(&look(&ready, &spoilt));
    drop(ready);
    clean_up();
    assert_eq!(found.len(), 1, "{found:?}");
}

/// Takes an epoch that is written when the program runs again; what stood at the stop.
fn behind(tracked: &mut Tracked, store: &mut Store) -> Result<View, ProcessError> {
    let pid = tracked.pid();
    let mut writer = store.begin();
    tracked.precopy(&mut *writer, &mut || false)?;
    let (stopped, mut captured) = tracked.stop(&mut *writer, None)?;
    let mut seen = View::take(pid, &[]);
    stopped.resume()?;
    // It gets a head start.
    std::thread::sleep(Duration::from_micros(200));
    write_behind(tracked, &mut captured, &mut *writer)?;
    captured.sync_files()?;
    seen.blank(&moving(&writer.epoch));
    writer.commit(captured.facts)?;
    Ok(seen)
}

/// What the program gave back before it was copied is handed over again by the next epoch.
fn write_behind(
    tracked: &mut Tracked,
    captured: &mut Captured,
    writer: &mut dyn EpochWriter,
) -> Result<(), ProcessError> {
    let written = captured.write(writer);
    if let Err(ProcessError::GivenBack { .. }) = written {
        tracked.owe_captured(captured);
    }
    written
}

#[test]
fn what_is_copied_behind_a_program_is_what_stood() {
    let _alone = alone();
    if !may_run("what_is_copied_behind_a_program_is_what_stood") {
        return;
    }
    adopt_orphans();
    let mut good = 0;
    for seed in 0..times(6, 200) {
        let how = (Strategy::Cow, [1, 4, 64][seed % 3]);
        let mut program = Program::start("shifter", &[&seed.to_string()]);
        let mut tracked = begin(&program, how);
        let mut store = Store::default();
        let mut last = None;
        for _ in 0..12 {
            match behind(&mut tracked, &mut store) {
                Ok(seen) => last = Some(seen),
                // Memory was given back before it was copied: that is no epoch, and the next one is
                // no full one.
                Err(ProcessError::GivenBack { .. }) => {
                    last = None;
                    continue;
                }
                Err(e) => panic!("{how:?}: {e}; {}", program.story()),
            }
            good += 1;
            program.must_be_well();
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(tracked);
        program.kill();
        clean_up();
        if let Some(seen) = last {
            bring_back(&mut program, store.newest(), &seen);
            program.must_report();
        }
    }
    assert!(good > 20, "{good} epochs");
}

/// That an epoch was not committed is not forgotten where the mappings cannot be read just then: the
/// next epoch holds everything.
#[test]
fn an_epoch_that_failed_is_made_good_also_where_nothing_could_be_read() {
    let _alone = alone();
    if !may_run("an_epoch_that_failed_is_made_good_also_where_nothing_could_be_read") {
        return;
    }
    adopt_orphans();
    for strategy in [Strategy::Incremental, Strategy::Redundant, Strategy::Cow] {
        let mut program = Program::start("shifter", &["1"]);
        let mut tracked = begin(&program, (strategy, 1));
        let mut store = Store::default();
        epoch(&mut tracked, &mut store).expect("an epoch");
        let no_files = NoFiles::begin();
        tracked.forget_progress();
        drop(no_files);
        store.epochs.clear();
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        bring_back(&mut program, store.newest(), &seen);
        program.must_report();
    }
}

/// What an epoch had taken that a full store did not is in the next one, which is no full one: all that
/// was written by then, before its stop and at it, and nothing of what was given back since.
#[test]
fn what_a_full_store_did_not_take_is_in_the_next_epoch() {
    let _alone = alone();
    if !may_run("what_a_full_store_did_not_take_is_in_the_next_epoch") {
        return;
    }
    adopt_orphans();
    for strategy in [Strategy::Incremental, Strategy::Redundant, Strategy::Cow] {
        let mut program = Program::start("shifter", &["4"]);
        let mut tracked = begin(&program, (strategy, 1));
        let mut store = Store::default();
        epoch(&mut tracked, &mut store).expect("an epoch");
        for _ in 0..times(3, 50) {
            let mut writer = store.begin();
            tracked
                .precopy(&mut *writer, &mut || false)
                .expect("copying ahead");
            let (stopped, mut captured) = tracked.stop(&mut *writer, None).expect("the stop");
            stopped.resume().expect("it runs on");
            // The writer is dropped, and all of it with that.
            drop(writer);
            tracked.owe_captured(&mut captured);
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(tracked.owed_pages() > 0, "{strategy}: nothing was taken");
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        bring_back(&mut program, store.newest(), &seen);
        program.must_report();
    }
}

/// Another program at the same addresses is not taken for the one that stood, though the address space
/// of that lives on.
/// Takes an epoch and compares what it holds of a mapping with what stands there.
fn exact_epoch(tracked: &mut Tracked, store: &mut Store, (start, end): (u64, u64)) {
    let pid = tracked.pid();
    let mut writer = store.begin();
    let (stopped, captured) = tracked.stop(&mut *writer, None).expect("the stop");
    captured.write(&mut *writer).expect("writing");
    let mem = std::fs::File::open(format!("/proc/{pid}/mem")).expect("its memory");
    let mut compared = 0;
    for (&(_, index), held) in &writer.epoch.pages {
        let mut page = [0; 4096];
        if (start..end).contains(&(index * 4096)) {
            mem.read_exact_at(&mut page, index * 4096)
                .expect("a page that is held");
            assert!(page == **held, "the page at {:x} differs", index * 4096);
            compared += 1;
        }
    }
    assert!(compared > 0, "the epoch holds nothing of it");
    stopped.resume().expect("it runs on");
    writer.commit(captured.facts).expect("the commit");
}

/// The first write to a page that was given back, above a file, faults twice, and many stops come in
/// between.
#[test]
fn a_page_that_is_half_made_is_not_the_one_that_was_given_back() {
    let _alone = alone();
    if !may_run("a_page_that_is_half_made_is_not_the_one_that_was_given_back") {
        return;
    }
    for strategy in [Strategy::Incremental, Strategy::Redundant] {
        let program = Program::start("returned", &[]);
        program.await_word("ready");
        let below = || {
            let mappings = program.mappings();
            let line = mappings.lines().find(|line| line.ends_with("/below"))?;
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let address = |text| u64::from_str_radix(text, 16).ok();
            Some((address(start)?, address(end)?))
        };
        let mut tracked = begin(&program, (strategy, 1));
        let span = below().expect("its mapping");
        let mut store = Store::default();
        for round in 0..times(60, 1000) {
            std::thread::sleep(Duration::from_micros(round as u64 % 8 * 300));
            exact_epoch(&mut tracked, &mut store, span);
            program.must_be_well();
            let before = store.epochs.len() - 1;
            store.epochs.drain(..before);
        }
        drop(tracked);
        program.must_report();
    }
}

#[test]
fn what_is_copied_behind_is_not_of_the_program_that_came_after() {
    let _alone = alone();
    if !may_run("what_is_copied_behind_is_not_of_the_program_that_came_after") {
        return;
    }
    adopt_orphans();
    let program = Program::start("successor", &[]);
    let mut tracked = begin(&program, (Strategy::Cow, 1));
    let mut store = Store::default();
    for _ in 0..4 {
        epoch(&mut tracked, &mut store).expect("an epoch");
    }
    program.signal(libc::SIGUSR1);
    program.await_word("written");
    let mut writer = store.begin();
    let taken = tracked.stop(&mut *writer, None);
    let (stopped, captured) = taken.expect("a stop");
    stopped.resume().expect("it runs on");
    program.signal(libc::SIGUSR2);
    program.await_word("succeeded");
    match captured.write(&mut *writer) {
        Err(ProcessError::GivenBack { .. }) => {}
        other => panic!("{other:?}"),
    }
    drop((captured, tracked, program));
    clean_up();
}

/// Has a child write to its memory, and end between the stop and the copy behind it.
fn lose_behind(
    (program, who, word): (&Program, usize, &str),
    tracked: &mut Tracked,
    store: &mut Store,
) -> Result<(), ProcessError> {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", program.pid));
    let children = children.expect("its children");
    let pid = children.split_whitespace().nth(who).expect("a child");
    let signal = |signal| {
        let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("a process ID"), signal).expect("a signal");
    };
    let mut writer = store.begin();
    tracked.precopy(&mut *writer, &mut || false)?;
    signal(rustix::process::Signal::USR1);
    program.await_word(word);
    let (stopped, mut captured) = tracked.stop(&mut *writer, None)?;
    stopped.resume()?;
    signal(rustix::process::Signal::KILL);
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is not reaped");
    while !stat().contains(") Z ") {
        std::thread::yield_now();
    }
    write_behind(tracked, &mut captured, &mut *writer)?;
    writer.commit(captured.facts).expect("the commit");
    Ok(())
}

/// A child that came lately costs no epoch when it ends; an older one costs one, and the next none.
#[test]
fn children_that_end_cost_few_epochs() {
    let _alone = alone();
    if !may_run("children_that_end_cost_few_epochs") {
        return;
    }
    adopt_orphans();
    let program = Program::start("brood", &["3"]);
    (0..3).for_each(|who| program.await_word(&format!("{who}:0")));
    let mut tracked = begin(&program, (Strategy::Cow, 1));
    let mut store = Store::default();
    epoch(&mut tracked, &mut store).expect("an epoch");
    lose_behind((&program, 0, "0:1"), &mut tracked, &mut store).expect("a young child");
    for _ in 0..4 {
        epoch(&mut tracked, &mut store).expect("an epoch");
    }
    match lose_behind((&program, 1, "1:1"), &mut tracked, &mut store) {
        Err(ProcessError::GivenBack { .. }) => {}
        other => panic!("{other:?}"),
    }
    lose_behind((&program, 2, "2:1"), &mut tracked, &mut store).expect("the next child");
    drop((tracked, program));
    clean_up();
}

/// The process that the guard of [`a_dead_guard_holds_nobody`] guards.
const GUARDED: &str = "OUTLIVE_TEST_GUARDED";

/// No test: the keeper that is killed by the next one, which runs it in a process of its own.
#[test]
#[ignore = "run by a_dead_guard_holds_nobody"]
fn keeper() {
    let Some(pid) = std::env::var(GUARDED).ok().and_then(|v| v.parse().ok()) else {
        return;
    };
    let options = TrackOptions {
        strategy: Strategy::Cow,
        ..TrackOptions::default()
    };
    let mut tracked = loop {
        match Tracked::attach(pid, options.clone()) {
            Ok(tracked) => break tracked,
            // A thread is still helping itself after an earlier one died.
            Err(ProcessError::Refused(_)) => std::thread::sleep(Duration::from_millis(50)),
            Err(e) => panic!("attaching: {e}"),
        }
    };
    let mut store = Store::default();
    loop {
        if behind(&mut tracked, &mut store).is_err() {
            tracked.forget_progress();
        }
        store.epochs.clear();
        // Writers are held most of the time.
        tracked.limit_dirty(Some(100));
        std::thread::sleep(Duration::from_millis(3));
    }
}

#[test]
fn a_dead_guard_holds_nobody() {
    let _alone = alone();
    if !may_run("a_dead_guard_holds_nobody") {
        return;
    }
    let program = Program::start("shifter", &["3", "patient"]);
    for round in 0..times(8, 300) {
        let mut keeper = Command::new(std::env::current_exe().expect("this test has a path"))
            .args(["--exact", "strategies::keeper", "--ignored"])
            .env(GUARDED, program.pid.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the keeper starts");
        std::thread::sleep(Duration::from_micros(80_000 + round as u64 * 7919 % 90_000));
        assert!(
            keeper.try_wait().expect("its state").is_none(),
            "the keeper ended of itself"
        );
        keeper.kill().expect("killing the keeper");
        keeper.wait().expect("the keeper's end");
        must_be_free(&program);
        program.must_be_well();
    }
    let said = program.must_report();
    assert!(said.contains("steps"), "{said}");
}

/// A program that may not be guarded is refused, with what to do, and unharmed.
#[test]
fn a_program_without_privilege_is_not_guarded() {
    const NAME: &str = "a_program_without_privilege_is_not_guarded";
    let _alone = alone();
    if !may_run(NAME) {
        return;
    }
    let free = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if free.is_ok_and(|text| text.trim() == "1") {
        println!("SKIPPED 1 test: {NAME}: vm.unprivileged_userfaultfd is 1");
        return;
    }
    let program = Program::start("shifter", &["2", "humble"]);
    let before = program.mappings().lines().count();
    let options = TrackOptions {
        strategy: Strategy::Cow,
        ..TrackOptions::default()
    };
    match Tracked::attach(program.pid, options) {
        Err(ProcessError::Refused(all)) => {
            let [refusal] = &all[..] else {
                panic!("{all:?}");
            };
            assert_eq!(refusal.pid, program.pid);
            let remedies = [
                "--strategy",
                "CAP_SYS_PTRACE",
                "vm.unprivileged_userfaultfd=1",
            ];
            for remedy in remedies {
                assert!(refusal.remedy.contains(remedy), "{refusal:?}");
            }
        }
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("it was not refused"),
    }
    let ours = "/dev/zero";
    assert!(
        before > 0 && !program.mappings().contains(ours),
        "{}",
        program.mappings()
    );
    // The others need no privilege.
    let mut tracked = begin(&program, (Strategy::Redundant, 1));
    epoch(&mut tracked, &mut Store::default()).expect("an epoch");
    tracked.detach().expect("detaching");
    program.must_report();
}

/// Waits until somebody is held at the limit.
fn await_pressure(tracked: &Tracked) {
    let pressure = tracked.pressure();
    let mut held: Vec<_> = pressure
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let patience = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    let set = poll(&mut held, Some(&patience));
    assert!(set.is_ok_and(|n| n > 0), "nobody is held");
}

/// The guard knows how many pages may have been written, and holds writers at the limit until the
/// next stop.
#[test]
fn a_guard_holds_writers_at_the_limit() {
    let _alone = alone();
    if !may_run("a_guard_holds_writers_at_the_limit") {
        return;
    }
    const LIMIT: u64 = 100;
    let program = Program::start("crowd", &["--memory", "32", "--dirty-rate", "20"]);
    let mut tracked = begin(&program, (Strategy::Cow, 1));
    let mut store = Store::default();
    tracked.limit_dirty(Some(LIMIT));
    for _ in 0..4 {
        epoch(&mut tracked, &mut store).expect("an epoch");
        await_pressure(&tracked);
        // Whoever is held does not go on by itself.
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(tracked.dirty_pages(), Some(LIMIT));
    }
    tracked.limit_dirty(None);
    tracked.detach().expect("detaching");
    program.must_report();
}

/// A process that is about to begin a program of its own, in the memory of its parent, is not left at
/// the limit: nobody could stop its parent then.
#[test]
fn who_begins_a_program_is_not_held_at_a_stop() {
    let _alone = alone();
    if !may_run("who_begins_a_program_is_not_held_at_a_stop") {
        return;
    }
    let mut program = Program::start("spawner", &["", "200"]);
    let mut tracked = begin(&program, (Strategy::Cow, 1));
    let mut store = Store::default();
    tracked.limit_dirty(Some(100));
    for _ in 0..4 {
        epoch(&mut tracked, &mut store).expect("an epoch");
        await_pressure(&tracked);
    }
    tracked.limit_dirty(None);
    tracked.detach().expect("detaching");
    program.kill();
}

/// Kilobytes of page tables of a program.
fn page_tables(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid));
    let status = status.expect("its status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmPTE:"));
    let number = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok());
    number.expect("the size of its page tables")
}

/// Holes are not protected, which would make page tables for them: 2 GiB for these.
#[test]
fn a_tebibyte_of_holes_costs_less_than_a_mebibyte() {
    let _alone = alone();
    if !may_run("a_tebibyte_of_holes_costs_less_than_a_mebibyte") {
        return;
    }
    let plain = [Strategy::Incremental, Strategy::Redundant, Strategy::Cow];
    let plain = plain.map(|strategy| (strategy, false));
    for (strategy, strict) in plain.into_iter().chain([(Strategy::Cow, true)]) {
        let mut program = Program::start("vast", &[]);
        std::thread::sleep(Duration::from_millis(20));
        let before = page_tables(&program);
        let mut tracked = match strict {
            true => crate::strict::begin(&program, 1),
            false => begin(&program, (strategy, 1)),
        };
        let mut store = Store::default();
        // Nobody looks at the program from outside: that would take minutes.
        for _ in 0..5 {
            let failed = |e: ProcessError| -> ! { panic!("{strategy}: {e}; {}", program.story()) };
            let mut writer = store.begin();
            tracked
                .precopy(&mut *writer, &mut || false)
                .unwrap_or_else(|e| failed(e));
            let (stopped, captured) = tracked
                .stop(&mut *writer, None)
                .unwrap_or_else(|e| failed(e));
            stopped.resume().expect("resuming");
            captured.write(&mut *writer).unwrap_or_else(|e| failed(e));
            writer.commit(captured.facts).expect("the commit");
            if strict {
                tracked.limit_dirty(Some(1_000_000));
                std::thread::sleep(Duration::from_millis(30));
            }
            let grown = page_tables(&program).saturating_sub(before);
            assert!(grown < 1024, "{strategy}: {before} kB grew by {grown} kB");
        }
        drop(tracked);
        program.kill();
        prepare(store.newest()).go().expect("letting it run");
        program.was_restored();
        program.must_report();
    }
}

/// Nothing of a program is registered anywhere where everything is copied.
#[test]
fn copying_everything_registers_nothing() {
    let _alone = alone();
    if !may_run("copying_everything_registers_nothing") {
        return;
    }
    let tracked_mappings = |how| {
        let program = Program::start("shifter", &["1"]);
        let mut tracked = begin(&program, how);
        epoch(&mut tracked, &mut Store::default()).expect("an epoch");
        let maps = outlive_linux::maps::read_with_flags(program.pid).expect("its mappings");
        let registered = maps
            .iter()
            .filter(|(_, flags)| flags.has(outlive_linux::maps::VmFlags::WRITE_PROTECT));
        registered.count()
    };
    assert_eq!(tracked_mappings((Strategy::Copy, 1)), 0);
    assert_ne!(tracked_mappings((Strategy::Incremental, 1)), 0);
}
