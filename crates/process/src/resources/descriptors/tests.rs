//! Every kind is made for real, collected, made again from its bytes, and compared.
//!
//! The target is this process itself, seen through its own pidfd, with the descriptors of the
//! test as if there were no others.

mod connections;
mod datagrams;
mod files;
mod refusals;
mod simple;
mod sockets;
mod streams;
mod table;
mod tree;

use super::collect::{View, collect_views};
use super::probe::ProcDirs;
use super::{
    CheckRequest, Collected, FdInfo, FdTable, Holder, Made, Memory, Target, check_table,
    recreate_table,
};
use crate::error::{ProcessError, Refusal};
use crate::resources::shared::SharedObjects;
use crate::restore::FilesPolicy;
use outlive_state_tree::{from_fdt, to_fdt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// A child inherits whatever is open until its own program runs. Who starts one holds this for
/// writing, who relies on closing the last copy of something holds it for reading.
static STARTING: RwLock<()> = RwLock::new(());

fn no_child_starts() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

/// The number of a descriptor.
fn number(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd() as u32
}

/// Collects these descriptors of this process.
fn collect_result(numbers: &[u32]) -> Result<Collected, ProcessError> {
    let pid = std::process::id();
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let target = Target {
        pid,
        program: "test",
        pidfd: pidfd.as_fd(),
        ignore: &[],
    };
    collect_numbers(&target, numbers, &mut Memory::default())
}

/// Collects these descriptors of this process, with what files without a name contain.
fn collect_shared(numbers: &[u32], shared: &mut SharedObjects) -> Result<Collected, ProcessError> {
    let pid = std::process::id();
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let target = Target {
        pid,
        program: "test",
        pidfd: pidfd.as_fd(),
        ignore: &[],
    };
    let view = View {
        target: &target,
        dirs: ProcDirs::open(pid).unwrap(),
        numbers: numbers.to_vec(),
    };
    collect_views(&[view], &mut Memory::default(), shared, true)
}

/// Collects these descriptors of one process, as if there were no others.
fn collect_numbers(
    target: &Target<'_>,
    numbers: &[u32],
    memory: &mut Memory,
) -> Result<Collected, ProcessError> {
    let view = View {
        target,
        dirs: ProcDirs::open(target.pid).unwrap(),
        numbers: numbers.to_vec(),
    };
    collect_views(&[view], memory, &mut SharedObjects::default(), true)
}

/// This process.
fn me() -> u32 {
    std::process::id()
}

/// Collects these descriptors; the table has been through its bytes.
fn collect(numbers: &[u32]) -> FdTable {
    let table = collect_result(numbers).unwrap().table;
    let back: FdTable = from_fdt(&to_fdt(&table).unwrap()).unwrap();
    assert_eq!(back, table);
    back
}

/// The refusals when these descriptors are collected.
fn refused(numbers: &[u32]) -> Vec<Refusal> {
    match collect_result(numbers) {
        Err(ProcessError::Refused(refusals)) => refusals,
        other => panic!("not refused: {other:?}"),
    }
}

fn request(files: FilesPolicy) -> CheckRequest<'static> {
    CheckRequest {
        pid: std::process::id(),
        programs: &[],
        epoch: 9,
        files,
        spaces: &[],
        contents: &[],
        written: &[],
    }
}

/// The refusals when the table is checked for a restore.
fn check_refused(table: &FdTable) -> Vec<Refusal> {
    match check_table(table, &request(FilesPolicy::Reconcile)) {
        Err(ProcessError::Refused(refusals)) => refusals,
        other => panic!("not refused: {other:?}"),
    }
}

/// Makes a table again.
fn recreate(table: &FdTable) -> Made {
    let checked = check_table(table, &request(FilesPolicy::Reconcile)).unwrap();
    recreate_table(table, checked).unwrap()
}

/// A duplicate of what was made for a number.
fn made_for(made: &Made, number: u32) -> OwnedFd {
    let install = made
        .installs()
        .find(|i| i.holders.iter().any(|h| h.number == number))
        .unwrap();
    install.fd.try_clone_to_owned().unwrap()
}

/// What the kernel says of one of our own descriptors.
fn info(fd: &impl AsRawFd) -> FdInfo {
    let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
    FdInfo::parse(&text).unwrap()
}

/// Whether both have the same position and status flags, and the same lines but for those that
/// number objects.
fn assert_same(original: &impl AsRawFd, made: &impl AsRawFd) {
    let (a, b) = (info(original), info(made));
    assert_eq!(
        (a.position, a.status()),
        (b.position, b.status()),
        "{:o} {:o}",
        a.flags,
        b.flags
    );
    let lines = |info: &FdInfo| -> Vec<String> {
        let numbered = |line: &&str| !line.starts_with("eventfd-id");
        info.rest
            .lines()
            .filter(numbered)
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(lines(&a), lines(&b));
}
