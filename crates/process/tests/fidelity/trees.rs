//! A tree of processes with many kinds of state dies again and again, and each of its processes is
//! compared with what it was.

use crate::store::{Epoch, Store};
use crate::support::{
    Program, adopt_orphans, alone, clean_up, epoch, look_at, may_run, prepare, times, track,
};
use crate::view::View;
use outlive_epoch::EpochWriter;
use outlive_process::Tracked;
use std::collections::BTreeMap;

/// What each process holds. The first is the root; the others are its children.
const LISTS: [&str; 4] = [
    "anonymous,child-zombie,child-waiting,epoll-nested,file-appended,memory-file-shared,\
     signals-queued,tcp-listening,posix-timer-signal,policy-of-thread,siblings-sharing-all",
    "anonymous-shared,eventfd-semaphore,fifo-with-contents,file-locked-description,guard-pages,\
     pipe-full,timerfd-once,unix-stream-queued,session-of-its-own",
    "break-moved,epoll-ready,file-private-changed,inotify,locked,no-access-with-contents,\
     signal-handlers,tcp-connected-within,udp-connected,system-v-memory-removed",
    "file-deleted,interval-timer-real,memory-file-sealed,pidfd-child,sealed,terminal-pair,\
     unix-datagram-pair,alternate-stack,nice,limits",
];

/// The processes of a program, the root first.
fn members(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        let children = format!("/proc/{0}/task/{0}/children", all[at]);
        let children = std::fs::read_to_string(children).unwrap_or_default();
        all.extend(
            children
                .split_whitespace()
                .filter_map(|w| w.parse::<u32>().ok()),
        );
        at += 1;
    }
    all
}

/// What is seen of every process that has not ended.
pub fn look(root: u32, epoch: &Epoch) -> BTreeMap<u32, View> {
    let alive = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.contains(") Z ")
    };
    let members = members(root).into_iter().filter(alive);
    members.map(|pid| (pid, look_at(pid, epoch))).collect()
}

/// Takes the last epoch, and ends the program.
pub fn last_epoch(
    program: &mut Program,
    mut tracked: Tracked,
    store: &mut Store,
) -> BTreeMap<u32, View> {
    let mut writer = store.begin();
    tracked
        .precopy(&mut *writer, &mut || false)
        .expect("copying ahead");
    let (stopped, captured) = tracked.stop(&mut *writer, None).expect("the stop");
    captured.write(&mut *writer).expect("writing the epoch");
    let seen = look(program.pid, &writer.epoch);
    captured.sync_files().expect("syncing files");
    writer.commit(captured.facts).expect("the commit");
    stopped.end().expect("the end");
    program.was_ended();
    seen
}

/// Fails the test with what differs of the first process that does.
pub fn must_equal(seen: &BTreeMap<u32, View>, again: &BTreeMap<u32, View>) {
    assert!(
        seen.keys().eq(again.keys()),
        "{:?} {:?}",
        seen.keys(),
        again.keys()
    );
    for (pid, view) in seen {
        let found = view.differences(&again[pid]);
        let shown = found.iter().take(20).cloned().collect::<Vec<_>>();
        assert!(found.is_empty(), "process {pid}:\n{}", shown.join("\n"));
    }
}

#[test]
fn a_tree_with_many_kinds_dies_again_and_again() {
    let _alone = alone();
    if !may_run("a_tree_with_many_kinds_dies_again_and_again") {
        return;
    }
    adopt_orphans();
    let words: Vec<&str> = ["--tree"].into_iter().chain(LISTS).collect();
    let mut program = Program::start("kinds", &words);
    for round in 0..times(20, 100) {
        let mut store = Store::default();
        let mut tracked = track(&program);
        for _ in 0..round % 3 {
            epoch(&mut tracked, &mut store).expect("an epoch");
        }
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        assert!(seen.len() > LISTS.len(), "{:?}", seen.keys());
        let ready = prepare(store.newest());
        must_equal(&seen, &look(program.pid, store.newest()));
        ready.go().expect("letting it run");
        program.was_restored();
        program.must_be_well();
    }
    program.must_report();
    clean_up();
}
