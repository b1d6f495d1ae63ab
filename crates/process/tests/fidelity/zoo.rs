//! One process with many kinds of state: everything that can be seen of it is the same after its
//! death.

use crate::stand;
use crate::store::Store;
use crate::support::{
    Program, alone, bring_back, bring_back_tracked, epoch, last_epoch, look, may_run, move_house,
    prepare, prepare_apart, stop_and_resume, times, track,
};
use outlive_epoch::SpaceId;
use outlive_process::{Strategy, TrackOptions, Tracked, Tracking};
use std::sync::Arc;
use std::time::Duration;

fn zoo() -> Program {
    Program::start("zoo", &["{dir}"])
}

#[test]
fn a_zoo_survives_death_again_and_again() {
    let _alone = alone();
    if !may_run("a_zoo_survives_death_again_and_again") {
        return;
    }
    let mut program = zoo();
    for round in 0..times(20, 500) {
        let mut store = Store::default();
        let mut tracked = track(&program);
        for _ in 0..round % 3 {
            epoch(&mut tracked, &mut store).expect("an epoch");
        }
        let seen = last_epoch(&mut program, tracked, &mut store);
        let (areas, pages, facts) = seen.extent();
        assert!(
            areas > 60 && pages > 300 && facts > 200,
            "{areas} {pages} {facts}"
        );
        bring_back(&mut program, store.newest(), &seen);
        std::thread::sleep(Duration::from_millis(round as u64 % 50));
        program.must_be_well();
    }
    program.must_report();
}

/// Epochs go on from the restored one: what was not written since is not taken again, and what was,
/// by the restore or by the program, is.
#[test]
fn epochs_go_on_from_the_restored_one() {
    let _alone = alone();
    if !may_run("epochs_go_on_from_the_restored_one") {
        return;
    }
    for words in [&["{dir}"][..], &["{dir}", "memory"]] {
        let mut program = Program::start("zoo", words);
        let mut store = Store::default();
        let tracked = track(&program);
        let mut seen = last_epoch(&mut program, tracked, &mut store);
        for round in 0..times(12, 300) {
            let mut tracked = bring_back_tracked(&mut program, store.newest(), &seen);
            let first = store.epochs.len();
            for _ in 0..round % 3 {
                std::thread::sleep(Duration::from_millis(round as u64 * 7 % 40));
                program.must_be_well();
                epoch(&mut tracked, &mut store).expect("an epoch");
            }
            seen = last_epoch(&mut program, tracked, &mut store);
            let space = SpaceId(program.pid);
            let put = store.epochs[first].put[&space];
            let all = store.newest().pages.keys().filter(|k| k.0 == space);
            let all = all.count();
            assert!(put < all / 2, "{put} of {all} pages were taken again");
        }
        bring_back(&mut program, store.newest(), &seen);
        program.must_report();
    }
}

/// As on a kernel that cannot tell which pages were written.
#[test]
fn without_tracking_everything_is_copied() {
    let _alone = alone();
    if !may_run("without_tracking_everything_is_copied") {
        return;
    }
    let mut program = zoo();
    let options = TrackOptions {
        strategy: Strategy::Copy,
        ..TrackOptions::default()
    };
    let mut tracked = Tracked::attach(program.pid, options).expect("attaching");
    assert_eq!(*tracked.tracking(), Tracking::Off);
    let mut store = Store::default();
    for _ in 0..2 {
        epoch(&mut tracked, &mut store).expect("an epoch");
    }
    let seen = last_epoch(&mut program, tracked, &mut store);
    bring_back(&mut program, store.newest(), &seen);
    program.must_report();
}

#[test]
fn a_zoo_does_not_notice_stops() {
    let _alone = alone();
    if !may_run("a_zoo_does_not_notice_stops") {
        return;
    }
    let program = zoo();
    let mut tracked = track(&program);
    for _ in 0..times(300, 10_000) {
        stop_and_resume(&program, &mut tracked);
    }
    tracked.detach().expect("detaching");
    program.must_report();
}

/// What the tests' own stop sees of threads that sleep in the same call before and after.
#[test]
fn sleeping_threads_keep_registers_and_masks() {
    let _alone = alone();
    if !may_run("sleeping_threads_keep_registers_and_masks") {
        return;
    }
    let mut program = zoo();
    // They have their names before they sleep, and are on their way there when they come back.
    let before = stand::look_asleep(&program, "parked", 4);
    let mut store = Store::default();
    let tracked = track(&program);
    let seen = last_epoch(&mut program, tracked, &mut store);
    bring_back(&mut program, store.newest(), &seen);
    program.must_be_well();
    let after = stand::look_asleep(&program, "parked", 4);
    for (tid, thread) in &before {
        assert_eq!(Some(thread), after.get(tid), "thread {tid}");
    }
    program.must_report();
}

/// The comparison itself: one bit of one page must be seen.
#[test]
fn a_spoilt_page_is_noticed() {
    let _alone = alone();
    if !may_run("a_spoilt_page_is_noticed") {
        return;
    }
    let mut program = zoo();
    let mut store = Store::default();
    let tracked = track(&program);
    let seen = last_epoch(&mut program, tracked, &mut store);
    let mut spoilt = store.newest().clone();
    let (&key, page) = spoilt
        .pages
        .iter_mut()
        .filter(|(_, page)| page.iter().any(|&b| b != 0))
        .nth(40)
        .expect("a page with contents");
    Arc::make_mut(page)[1234] ^= 1;
    let ready = prepare(&spoilt);
    let found = seen.differences(&look(&ready, &spoilt));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with(&format!("page {:x}", key.1 * 4096)),
        "{found:?}"
    );
    drop(ready);
    // Nothing of the spoilt one is left, and the true one still comes back.
    bring_back(&mut program, store.newest(), &seen);
    program.must_report();
}

/// Any epoch of a chain can be restored, and holds what was seen at its stop: pages that were
/// written, given back, moved and replaced in between.
#[test]
fn every_epoch_of_a_chain_is_what_it_was() {
    let _alone = alone();
    if !may_run("every_epoch_of_a_chain_is_what_it_was") {
        return;
    }
    let mut program = Program::start("zoo", &["{dir}", "memory"]);
    let mut tracked = track(&program);
    let mut store = Store::default();
    let mut seen = Vec::new();
    for n in 0..times(20, 100) {
        seen.push(epoch(&mut tracked, &mut store).expect("an epoch"));
        std::thread::sleep(Duration::from_millis(n as u64 * 7 % 40));
        program.must_be_well();
    }
    seen.push(last_epoch(&mut program, tracked, &mut store));
    let last = seen.len() - 1;
    for n in (0..last).step_by(3).chain([1, last]) {
        bring_back(&mut program, &store.epochs[n], &seen[n]);
        std::thread::sleep(Duration::from_millis(50));
        program.must_be_well();
        if n < last {
            program.kill();
        }
    }
    program.must_report();
}

/// All kinds of state once more, in one PID namespace after the other: what names processes and
/// threads is what the program sees.
#[test]
fn a_zoo_lives_on_in_namespaces_of_its_own() {
    let _alone = alone();
    if !may_run("a_zoo_lives_on_in_namespaces_of_its_own") {
        return;
    }
    let mut program = zoo();
    let id = program.pid;
    for round in 0..times(6, 100) {
        let mut store = Store::default();
        let mut tracked = track(&program);
        for _ in 0..round % 3 {
            epoch(&mut tracked, &mut store).expect("an epoch");
        }
        let seen = last_epoch(&mut program, tracked, &mut store);
        move_house(&mut program, store.newest(), &seen);
        assert_ne!(program.pid, id);
        std::thread::sleep(Duration::from_millis(50));
        program.must_be_well();
    }
    program.must_report();
}

/// What was made for a program that then does not run is gone with it: its processes and the
/// namespace's init.
#[test]
fn a_namespace_that_is_given_up_leaves_nothing() {
    let _alone = alone();
    if !may_run("a_namespace_that_is_given_up_leaves_nothing") {
        return;
    }
    let mut program = zoo();
    let mut store = Store::default();
    let tracked = track(&program);
    let seen = last_epoch(&mut program, tracked, &mut store);
    let inhabited = || {
        let ours = std::fs::read_link("/proc/self/ns/pid").expect("our namespace");
        let all = std::fs::read_dir("/proc").expect("processes").flatten();
        let namespaces = all.filter_map(|e| std::fs::read_link(e.path().join("ns/pid")).ok());
        namespaces.filter(|n| *n != ours).collect::<Vec<_>>()
    };
    let ready = prepare_apart(store.newest());
    let link = format!("/proc/{}/ns/pid", ready.pid());
    let namespace = std::fs::read_link(link).expect("its namespace");
    assert!(inhabited().iter().filter(|n| **n == namespace).count() > 1);
    drop(ready);
    assert!(!inhabited().contains(&namespace));
    bring_back(&mut program, store.newest(), &seen);
    program.must_report();
}
