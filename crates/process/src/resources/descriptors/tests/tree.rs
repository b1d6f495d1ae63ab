//! Subjects of two processes: this one, with some descriptors of the test, and a child.

use super::super::finish_calls;
use super::streams::Waiting;
use super::*;
use outlive_linux::remote::Arg;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{FlockOperation, SeekFrom, fcntl_lock, seek};
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;

/// Collects descriptors of this process and of a child, as if there were no others.
fn collect_both(mine: &[u32], child: &Waiting, theirs: &[u32]) -> Result<FdTable, ProcessError> {
    let open = |pid: u32| pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty());
    let pidfds = [open(me()).unwrap(), open(child.pid()).unwrap()];
    let target = |pid, index: usize| Target {
        pid,
        program: "test",
        pidfd: pidfds[index].as_fd(),
        ignore: &[],
    };
    let targets = [target(me(), 0), target(child.pid(), 1)];
    let views: Vec<View<'_>> = targets
        .iter()
        .zip([mine, theirs])
        .map(|(target, numbers)| View {
            target,
            dirs: ProcDirs::open(target.pid).unwrap(),
            numbers: numbers.to_vec(),
        })
        .collect();
    let table = collect_views(
        &views,
        &mut Memory::default(),
        &mut SharedObjects::default(),
        true,
    )?
    .table;
    let back: FdTable = from_fdt(&to_fdt(&table).unwrap()).unwrap();
    assert_eq!(back, table);
    Ok(back)
}

/// A duplicate of what was made for a number of a process.
fn made_in(made: &Made, process: u32, number: u32) -> OwnedFd {
    let is = |h: &Holder| (h.process, h.number) == (process, number);
    let install = made.installs().find(|i| i.holders.iter().any(is));
    install.unwrap().fd.try_clone_to_owned().unwrap()
}

fn places(table: &FdTable) -> Vec<Vec<(u32, u32, bool)>> {
    let place = |h: &Holder| (h.process, h.number, h.close_on_exec);
    let each = table.descriptions.iter();
    each.map(|d| d.holders.iter().map(place).collect())
        .collect()
}

#[test]
fn what_a_fork_shares_is_one_description_with_its_flags_for_each_holder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    std::fs::write(&path, [7; 5000]).unwrap();
    let shared = File::open(&path).unwrap();
    let other = File::open(&path).unwrap();
    let child = Waiting::inheriting(&[&shared]);
    let _quiet = no_child_starts();
    seek(&shared, SeekFrom::Start(1234)).unwrap();
    let (s, o) = (number(&shared), number(&other));
    let mut mine = [s, o];
    mine.sort_unstable();
    let table = collect_both(&mine, &child, &[s]).unwrap();
    let mut found = places(&table);
    found.sort();
    let mut expected = vec![
        vec![(me(), s, true), (child.pid(), s, false)],
        vec![(me(), o, true)],
    ];
    expected.sort();
    assert_eq!(found, expected);
    let made = recreate(&table);
    let (a, b) = (made_in(&made, me(), s), made_in(&made, child.pid(), s));
    assert_eq!(info(&b).position, 1234);
    seek(&a, SeekFrom::Start(3)).unwrap();
    assert_eq!(info(&b).position, 3);
    assert_eq!(info(&made_in(&made, me(), o)).position, 0);
}

#[test]
fn a_pipe_between_two_processes_is_inside() {
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let child = Waiting::inheriting(&[&w]);
    let _quiet = no_child_starts();
    rustix::io::write(&w, b"on its way").unwrap();
    let (rn, wn) = (number(&r), number(&w));
    let table = collect_both(&[rn], &child, &[wn]).unwrap();
    assert_eq!((table.pipes.len(), table.descriptions.len()), (1, 2));
    let made = recreate(&table);
    let (r, w) = (made_in(&made, me(), rn), made_in(&made, child.pid(), wn));
    let mut out = [0; 64];
    assert_eq!(rustix::io::read(&r, &mut out), Ok(10));
    rustix::io::write(&w, b"more").unwrap();
    assert_eq!(rustix::io::read(&r, &mut out), Ok(4));
    drop((made, w));
    assert_eq!(rustix::io::read(&r, &mut out), Ok(0));
}

#[test]
fn a_socket_pair_between_two_processes_keeps_what_waits() {
    let (mut mine, theirs) = UnixStream::pair().unwrap();
    let child = Waiting::inheriting(&[&theirs]);
    let _quiet = no_child_starts();
    mine.write_all(b"to the child").unwrap();
    (&theirs).write_all(b"to the parent").unwrap();
    let (m, t) = (number(&mine), number(&theirs));
    let table = collect_both(&[m], &child, &[t]).unwrap();
    let made = recreate(&table);
    let (a, b) = (made_in(&made, me(), m), made_in(&made, child.pid(), t));
    let mut out = [0; 64];
    assert_eq!(rustix::io::read(&a, &mut out), Ok(13));
    assert_eq!(rustix::io::read(&b, &mut out), Ok(12));
}

#[test]
fn each_process_watches_its_own_numbers() {
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let counters: Vec<_> = (0..2)
        .map(|n| eventfd(n, EventfdFlags::CLOEXEC).unwrap())
        .collect();
    for (n, counter) in counters.iter().enumerate() {
        let data = epoll::EventData::new_u64(n as u64);
        epoll::add(&poller, counter, data, epoll::EventFlags::IN).unwrap();
    }
    let child = Waiting::inheriting(&[&poller, &counters[1]]);
    let _quiet = no_child_starts();
    let (p, first, second) = (number(&poller), number(&counters[0]), number(&counters[1]));
    // The parent has closed the second one since, and the child never had the first one.
    let table = collect_both(&[p, first], &child, &[p, second]).unwrap();
    let mut calls: Vec<_> = finish_calls(&table)
        .into_iter()
        .map(|call| match call.args[..] {
            [Arg::Value(instance), _, Arg::Value(target), _] => {
                (call.process, instance as u32, target as u32)
            }
            _ => panic!("{call:?}"),
        })
        .collect();
    calls.sort_unstable();
    let mut expected = vec![(me(), p, first), (child.pid(), p, second)];
    expected.sort_unstable();
    assert_eq!(calls, expected);
    let refusals = match collect_both(&[p], &child, &[p, second]) {
        Err(ProcessError::Refused(refusals)) => refusals,
        other => panic!("{other:?}"),
    };
    assert!(
        refusals[0]
            .what
            .contains(&format!("still watches fd {first}"))
    );
}

#[test]
fn a_lock_of_a_process_stays_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let file = File::create(&path).unwrap();
    let child = Waiting::inheriting(&[&file]);
    let _quiet = no_child_starts();
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let n = number(&file);
    for (mine, theirs, owners) in [(&[n][..], &[n][..], vec![me()]), (&[], &[n], vec![])] {
        let table = collect_both(mine, &child, theirs).unwrap();
        let calls = finish_calls(&table);
        let found: Vec<u32> = calls.iter().map(|call| call.process).collect();
        assert_eq!(found, owners);
    }
}

#[test]
fn a_stream_to_the_outside_is_the_one_of_the_root_only() {
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let child = Waiting::inheriting(&[&r]);
    let _quiet = no_child_starts();
    let refusals = match collect_both(&[], &child, &[number(&r)]) {
        Err(ProcessError::Refused(refusals)) => refusals,
        other => panic!("{other:?}"),
    };
    assert_eq!(refusals[0].pid, child.pid());
    assert!(refusals[0].what.starts_with("pipe to another process"));
    drop(w);
}
