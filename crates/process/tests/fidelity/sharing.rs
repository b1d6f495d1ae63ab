//! Processes that share memory, descriptors, directories or signal actions as a whole: at the attach
//! the list of kinds tries them; here are sharing that comes later, the end of the process that
//! stands for an address space, and lives after the first restore.

use crate::store::Store;
use crate::support;
use crate::support::{
    NoFiles, Program, adopt_orphans, alone, clean_up, epoch, may_run, prepare, prepare_apart,
};
use crate::trees::{last_epoch, look, must_equal};
use outlive_epoch::SpaceId;
use outlive_process::image::{self, group, kinds};
use outlive_process::resources::attributes::ProcessState;
use outlive_process::{
    ProcessError, Refusal, RestoreOptions, Strategy, TrackOptions, Tracked, restore,
};
use outlive_state_tree::to_fdt;
use rustix::process::{Pid, Signal, kill_process};

const KINDS: [&str; 13] = [
    "child-sharing-memory",
    "child-sharing-descriptors",
    "child-locking-by-shared-descriptors",
    "child-sharing-directory",
    "child-sharing-signals",
    "child-sharing-all-but-memory",
    "child-sharing-all",
    "grandchild-sharing-all",
    "grandchild-sharing-past-its-parent",
    "siblings-sharing-all",
    "siblings-sharing-descriptors",
    "orphan-sharing-all",
    "orphan-sharing-with-an-uncle",
];

fn options() -> TrackOptions {
    TrackOptions {
        strays: true,
        ..TrackOptions::default()
    }
}

fn track(program: &Program) -> Tracked {
    Tracked::attach(program.pid, options())
        .unwrap_or_else(|e| panic!("attaching: {e}; {}", program.story()))
}

fn take(tracked: &mut Tracked, store: &mut Store, what: &str) {
    if let Err(e) = epoch(tracked, store) {
        panic!("{what}: {e}");
    }
}

/// Ends the program at its last epoch, brings it back, and has it look at itself.
fn die_and_report(mut program: Program, tracked: Tracked, mut store: Store) {
    let seen = last_epoch(&mut program, tracked, &mut store);
    clean_up();
    let ready = prepare(store.newest());
    must_equal(&seen, &look(program.pid, store.newest()));
    ready.go().expect("letting it run");
    program.was_restored();
    program.must_report();
    clean_up();
}

#[test]
fn sharing_that_comes_later_is_kept() {
    let _alone = alone();
    if !may_run("sharing_that_comes_later_is_kept") {
        return;
    }
    adopt_orphans();
    for kind in KINDS {
        for epochs in 0..2 {
            let program = Program::start("kinds", &[kind, "later"]);
            let mut tracked = track(&program);
            let mut store = Store::default();
            take(&mut tracked, &mut store, kind);
            program.signal(libc::SIGUSR2);
            program.await_word("held");
            for _ in 0..epochs {
                take(&mut tracked, &mut store, kind);
            }
            die_and_report(program, tracked, store);
        }
    }
}

fn first_child(pid: u32) -> u32 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.expect("its children");
    let first = children.split_whitespace().next().expect("a child");
    first.parse().expect("a number")
}

/// Has the process that stands for an address space end, or begin another program.
fn leave(pid: u32, ends: bool) {
    let signal = if ends { Signal::KILL } else { Signal::USR2 };
    let raw = Pid::from_raw(pid.cast_signed()).expect("a process ID");
    kill_process(raw, signal).expect("a signal");
    let has_left = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        let stat = stat.expect("it is not reaped");
        stat.contains(if ends { ") Z " } else { "(sleep) S" })
    };
    while !has_left() {
        std::thread::yield_now();
    }
}

#[test]
fn an_address_space_outlives_the_process_that_stands_for_it() {
    let _alone = alone();
    if !may_run("an_address_space_outlives_the_process_that_stands_for_it") {
        return;
    }
    adopt_orphans();
    use Strategy::{Copy, Cow, Incremental, Redundant};
    for (epochs, ends, strategy) in [
        (0, true, Redundant),
        (0, false, Incremental),
        (1, true, Cow),
        (1, false, Redundant),
        (2, false, Cow),
        (1, true, Copy),
    ] {
        let program = Program::start("kinds", &["siblings-sharing-all"]);
        let options = TrackOptions {
            strategy,
            ..options()
        };
        let mut tracked = Tracked::attach(program.pid, options).expect("attaching");
        let mut store = Store::default();
        take(&mut tracked, &mut store, "before");
        leave(first_child(program.pid), ends);
        for _ in 0..epochs {
            take(&mut tracked, &mut store, "after");
        }
        die_and_report(program, tracked, store);
    }
}

/// Nobody can take the place of the process that stood for an address space: those that have it too
/// are saved with all of its memory nevertheless, by the next epoch that succeeds.
#[test]
fn an_address_space_without_an_heir_is_adopted_anew() {
    let _alone = alone();
    if !may_run("an_address_space_without_an_heir_is_adopted_anew") {
        return;
    }
    adopt_orphans();
    for (ends, strategy) in [(true, Strategy::Redundant), (false, Strategy::Cow)] {
        let program = Program::start("kinds", &["siblings-sharing-all"]);
        let options = TrackOptions {
            strategy,
            ..options()
        };
        let mut tracked = Tracked::attach(program.pid, options).expect("attaching");
        let mut store = Store::default();
        take(&mut tracked, &mut store, "before");
        leave(first_child(program.pid), ends);
        let mut writer = store.begin();
        let no_files = NoFiles::begin();
        // It has been noticed by then that the process is gone, whatever fails besides.
        let _ = tracked.precopy(&mut *writer, &mut || false);
        drop((no_files, writer));
        tracked.forget_progress();
        store.epochs.clear();
        die_and_report(program, tracked, store);
    }
}

/// What was done in the processes is gone when tracking ends, whoever has left meanwhile.
#[test]
fn tracking_of_an_address_space_leaves_no_trace() {
    let _alone = alone();
    if !may_run("tracking_of_an_address_space_leaves_no_trace") {
        return;
    }
    adopt_orphans();
    for ends in [None, Some(true), Some(false)] {
        let program = Program::start("kinds", &["siblings-sharing-all"]);
        let children = format!("/proc/{0}/task/{0}/children", program.pid);
        let children = std::fs::read_to_string(children).expect("its children");
        let last = children.split_whitespace().next_back().expect("a child");
        let maps = || std::fs::read_to_string(format!("/proc/{last}/maps")).expect("mappings");
        let before = maps();
        let mut tracked = track(&program);
        take(&mut tracked, &mut Store::default(), "before");
        assert_ne!(before, maps());
        if let Some(ends) = ends {
            leave(first_child(program.pid), ends);
        }
        drop(tracked);
        assert_eq!(before, maps());
        program.must_report();
        clean_up();
    }
}

#[test]
fn sharing_goes_on_in_namespaces() {
    let _alone = alone();
    if !may_run("sharing_goes_on_in_namespaces") {
        return;
    }
    adopt_orphans();
    for kind in KINDS {
        let mut program = Program::start("kinds", &[kind]);
        for _ in 0..2 {
            let mut store = Store::default();
            let mut tracked = track(&program);
            take(&mut tracked, &mut store, kind);
            let _ = support::last_epoch(&mut program, tracked, &mut store);
            clean_up();
            let ready = prepare_apart(store.newest());
            program.pid = ready.pid();
            ready.go().expect("letting it run");
            program.was_restored();
        }
        program.must_report();
        clean_up();
    }
}

#[test]
fn epochs_of_an_address_space_go_on_from_the_restored_one() {
    let _alone = alone();
    if !may_run("epochs_of_an_address_space_go_on_from_the_restored_one") {
        return;
    }
    adopt_orphans();
    for kind in ["child-sharing-all", "siblings-sharing-all"] {
        let mut program = Program::start("kinds", &[kind]);
        let mut store = Store::default();
        let tracked = track(&program);
        let mut seen = last_epoch(&mut program, tracked, &mut store);
        for _ in 0..3 {
            clean_up();
            let options = RestoreOptions {
                track: Some(options()),
                ..RestoreOptions::default()
            };
            let newest = store.newest();
            let ready = restore(newest, &options).expect("restoring it");
            must_equal(&seen, &look(program.pid, newest));
            let tracked = ready.launch().expect("letting it run").tracked;
            program.was_restored();
            let mut tracked = tracked.expect("it is tracked");
            let child = first_child(program.pid);
            take(&mut tracked, &mut store, kind);
            let holder = if kind == "child-sharing-all" {
                program.pid
            } else {
                child
            };
            let space = SpaceId(holder);
            let put = store.newest().put[&space];
            let all = store.newest().pages.keys().filter(|k| k.0 == space);
            let all = all.count();
            assert!(put < all / 2, "{put} of {all} pages were taken again");
            seen = last_epoch(&mut program, tracked, &mut store);
        }
        clean_up();
        let ready = prepare(store.newest());
        ready.go().expect("letting it run");
        program.was_restored();
        program.must_report();
        clean_up();
    }
}

/// Whether it is refused because of this process, and goes on unharmed.
fn must_be_refused(outcome: Result<(), ProcessError>, what: &str, other: u32) {
    let Err(ProcessError::Refused(list)) = outcome else {
        panic!("{what}: not refused: {:?}", outcome.err());
    };
    let named = format!("with process {other} (kinds), which is not of this program");
    let names = |r: &Refusal| r.what.contains(&named) && r.what.contains(what);
    assert!(list.iter().any(names), "{what}: {list:?}");
}

#[test]
fn what_is_shared_with_a_process_outside_is_refused_before_harm() {
    let _alone = alone();
    if !may_run("what_is_shared_with_a_process_outside_is_refused_before_harm") {
        return;
    }
    adopt_orphans();
    for (kind, what) in [
        ("child-sharing-memory", "its memory with"),
        ("child-sharing-descriptors", "its table of descriptors with"),
        ("child-sharing-directory", "its working directory with"),
        (
            "child-sharing-signals",
            "its memory and signal actions with",
        ),
    ] {
        let program = Program::start("kinds", &[kind]);
        let child = first_child(program.pid);
        let before = program.mappings();
        let tracked = Tracked::attach(child, TrackOptions::default());
        must_be_refused(tracked.map(drop), what, program.pid);
        assert_eq!(before, program.mappings());
        // The whole program is another matter.
        drop(track(&program));
        program.must_report();
        clean_up();
    }
    // Its parent has ended, and nobody says that it belongs to the program.
    let program = Program::start("kinds", &["orphan-sharing-all"]);
    let orphan = first_child(std::process::id());
    let tracked = Tracked::attach(program.pid, TrackOptions::default());
    must_be_refused(tracked.map(drop), "its memory and", orphan);
    program.must_report();
    clean_up();
}

/// A process that shares leaves the program while that is tracked: it is a new one, or one that was
/// of the program.
#[test]
fn what_comes_to_be_shared_with_a_process_outside_is_refused_by_the_next_epoch() {
    let _alone = alone();
    if !may_run("what_comes_to_be_shared_with_a_process_outside_is_refused_by_the_next_epoch") {
        return;
    }
    adopt_orphans();
    for later in [true, false] {
        let kind = ["grandchild-sharing-all", "orphan-sharing-all"][usize::from(later)];
        let manner: &[&str] = if later { &[kind, "later"] } else { &[kind] };
        let program = Program::start("kinds", manner);
        let options = TrackOptions::default();
        let mut tracked = Tracked::attach(program.pid, options).expect("attaching");
        let mut store = Store::default();
        take(&mut tracked, &mut store, kind);
        take(&mut tracked, &mut store, kind);
        if later {
            program.signal(libc::SIGUSR2);
            program.await_word("held");
        } else {
            leave(first_child(program.pid), true);
        }
        let orphan = || first_child(std::process::id());
        for _ in 0..2 {
            let taken = epoch(&mut tracked, &mut store).map(drop);
            must_be_refused(taken, "its memory and", orphan());
        }
        // Nothing is shared any more.
        support::end(orphan().cast_signed());
        take(&mut tracked, &mut store, kind);
        drop(tracked);
        program.must_be_well();
        drop(program);
        clean_up();
    }
}

/// What an image says of who shares is judged before anything is made.
#[test]
fn an_image_in_which_sharing_makes_no_sense_is_refused() {
    let _alone = alone();
    if !may_run("an_image_in_which_sharing_makes_no_sense_is_refused") {
        return;
    }
    adopt_orphans();
    let mut program = Program::start("kinds", &["grandchild-sharing-all"]);
    let tracked = track(&program);
    let mut store = Store::default();
    let _ = last_epoch(&mut program, tracked, &mut store);
    clean_up();
    let processes = image::describe(store.newest())
        .expect("the subject")
        .processes;
    let [root, child, grandchild] = processes[..] else {
        panic!("{processes:?}");
    };
    type Change = fn(&mut ProcessState, [u32; 3]);
    let changes: [(u32, Change, &str); 7] = [
        (child, |p, _| p.shares_memory_with = 1, "with nobody"),
        (child, |p, _| p.shares_memory_with = p.pid, "with nobody"),
        (child, |p, _| p.shares_memory_with = 0, "is missing"),
        (
            root,
            |p, [_, child, _]| p.shares_memory_with = child,
            "with nobody",
        ),
        (
            grandchild,
            |p, [_, child, _]| p.shares_directories_with = child,
            "with nobody",
        ),
        (
            root,
            |p, [_, child, _]| p.shares_directories_with = child,
            "with nobody",
        ),
        (
            grandchild,
            |p, _| p.shares_descriptors_with = u32::MAX,
            "with nobody",
        ),
    ];
    for (at, (pid, change, wrong)) in changes.into_iter().enumerate() {
        let mut epoch = store.newest().clone();
        let name = group(kinds::ATTRIBUTES, pid);
        let mut state: ProcessState = image::get(&epoch, &name).expect("a process");
        change(&mut state, [root, child, grandchild]);
        epoch.replace(&name, to_fdt(&state).expect("a tree"));
        match restore(&epoch, &RestoreOptions::default()) {
            Err(ProcessError::Image(what)) => assert!(what.contains(wrong), "{at}: {what}"),
            Err(e) => panic!("{at}: {e}"),
            Ok(_) => panic!("{at}: it is restored"),
        }
        assert!(!std::path::Path::new(&format!("/proc/{root}")).exists());
    }
    // The image as it is can be restored.
    drop(prepare(store.newest()));
}
