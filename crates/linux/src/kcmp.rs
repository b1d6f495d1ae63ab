//! Whether two descriptors are one open file description, and what processes share as a whole:
//! `kcmp(2)`.
//!
//! # Safety
//! The only pointer handed to the kernel is to a local structure which it reads.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::cmp::Ordering;

const KCMP_FILE: libc::c_long = 0;
/// What two processes can share as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The address space.
    Memory = 1,
    /// The table of descriptors.
    Files = 2,
    /// Working directory, root and file mode mask.
    Filesystem = 3,
    /// Signal dispositions.
    Signals = 4,
    /// What is to be undone in System V semaphores at the end.
    SemaphoreUndo = 6,
}

/// Whether two processes share something as a whole.
///
/// # Errors
/// `ESRCH` when one of them has ended, `EPERM` without the right to trace them.
pub fn same(a: u32, b: u32, kind: Kind) -> Result<bool, Errno> {
    compare(a, b, kind).map(Ordering::is_eq)
}

/// The same with an order of those that do not, which is arbitrary but the same for all calls until
/// the next boot. It is an order of objects: once one of them is gone, a new one may have its place.
///
/// # Errors
/// As [`same`].
pub fn compare(a: u32, b: u32, kind: Kind) -> Result<Ordering, Errno> {
    // SAFETY: these kinds take numbers only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::c_long::from(a as i32),
            libc::c_long::from(b as i32),
            kind as libc::c_long,
            0,
            0,
        )
    };
    ordering(answer)
}

fn ordering(answer: libc::c_long) -> Result<Ordering, Errno> {
    match answer {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        n if n < 0 => Err(last_error()),
        _ => Err(Errno::NOTSUP),
    }
}

const KCMP_EPOLL_TFD: libc::c_long = 7;

#[repr(C)]
struct EpollSlot {
    epoll: u32,
    target: u32,
    offset: u32,
}

/// Compares the open file descriptions behind two descriptors, each given as process and number:
/// equal when they are one, otherwise in an order which is arbitrary but the same for all calls
/// until the next boot.
///
/// # Errors
/// `EBADF` when a descriptor is not open, `EPERM` without the right to trace both processes.
pub fn compare_files(a: (u32, u32), b: (u32, u32)) -> Result<Ordering, Errno> {
    // SAFETY: KCMP_FILE takes numbers only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::c_long::from(a.0 as i32),
            libc::c_long::from(b.0 as i32),
            KCMP_FILE,
            u64::from(a.1),
            u64::from(b.1),
        )
    };
    ordering(answer)
}

/// Whether descriptor `number` of a process is still the file that its epoll instance `epoll`
/// watches under the number `target` (the `offset`-th such entry, from 0).
///
/// # Errors
/// `ENOENT` when there is no such entry, `EBADF` when `number` is not open.
pub fn is_epoll_target(
    pid: u32,
    number: u32,
    epoll: u32,
    target: u32,
    offset: u32,
) -> Result<bool, Errno> {
    let slot = EpollSlot {
        epoll,
        target,
        offset,
    };
    // SAFETY: slot is a live local with the layout of `struct kcmp_epoll_slot`; it is only read.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::c_long::from(pid as i32),
            libc::c_long::from(pid as i32),
            KCMP_EPOLL_TFD,
            u64::from(number),
            &raw const slot,
        )
    };
    if answer < 0 {
        Err(last_error())
    } else {
        Ok(answer == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_child_shares_nothing_with_its_parent_and_one_with_itself_everything() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let (me, other) = (std::process::id(), child.id());
        let all = [Kind::Memory, Kind::Files, Kind::Filesystem, Kind::Signals];
        for kind in all {
            assert_eq!(same(me, me, kind), Ok(true));
            assert_eq!(same(me, other, kind), Ok(false));
            let order = compare(me, other, kind).unwrap();
            assert_eq!(compare(other, me, kind), Ok(order.reverse()));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_duplicate_is_the_same_description_and_a_second_open_is_not() {
        let me = std::process::id();
        let a = File::open("/dev/null").unwrap();
        let b = a.try_clone().unwrap();
        let c = File::open("/dev/null").unwrap();
        let number = |f: &File| (me, f.as_raw_fd() as u32);
        assert_eq!(compare_files(number(&a), number(&b)), Ok(Ordering::Equal));
        let order = compare_files(number(&a), number(&c)).unwrap();
        assert_ne!(order, Ordering::Equal);
        assert_eq!(compare_files(number(&c), number(&a)), Ok(order.reverse()));
        assert_eq!(compare_files(number(&a), (me, 1 << 20)), Err(Errno::BADF));
    }
}
