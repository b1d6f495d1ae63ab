//! Descriptors of kinds that `rustix` does not make: `signalfd4(2)`, expirations of a
//! `timerfd`, locks that belong to an open file description.
//!
//! # Safety
//! Pointers go to live locals whose size the kernel knows or is told.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `_IOW('T', 0, __u64)`.
const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;

/// Bytes in the kernel's signal set.
const SIGSET_SIZE: usize = 8;

/// A descriptor that delivers these signals (bit 0 is signal 1), close-on-exec.
///
/// # Errors
/// What `signalfd4(2)` says.
pub fn signalfd(mask: u64) -> Result<OwnedFd, Errno> {
    // SAFETY: mask is a live local of SIGSET_SIZE bytes, which the kernel only reads.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1 as libc::c_long,
            &raw const mask,
            SIGSET_SIZE,
            libc::SFD_CLOEXEC as libc::c_long,
        )
    };
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: fd was just made by the kernel for us and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the number of expirations that a read of a timer descriptor will give; at least 1.
///
/// # Errors
/// `ENOTTY` on a kernel without checkpoint support, `EINVAL` for 0.
pub fn timerfd_set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads the eight bytes of the live local ticks.
    let answer = unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    if answer < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

/// Takes a lock that belongs to the open file description (`F_OFD_SETLK`), without waiting:
/// `length` bytes from `start` on, 0 for all.
///
/// # Errors
/// `EAGAIN` when somebody else holds it.
pub fn lock_description(
    file: BorrowedFd<'_>,
    write: bool,
    start: i64,
    length: i64,
) -> Result<(), Errno> {
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: lock is a live local, which the kernel only reads for this command.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if answer < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn expirations_that_were_set_are_read() {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).unwrap();
        timerfd_set_ticks(timer.as_fd(), 3).unwrap();
        let mut bytes = [0; 8];
        rustix::io::read(&timer, &mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 3);
        assert_eq!(timerfd_set_ticks(timer.as_fd(), 0), Err(Errno::INVAL));
    }

    #[test]
    fn a_lock_of_one_description_keeps_another_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let open = || {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .unwrap()
        };
        let (a, b) = (open(), open());
        lock_description(a.as_fd(), true, 0, 10).unwrap();
        assert_eq!(lock_description(b.as_fd(), true, 5, 1), Err(Errno::AGAIN));
        lock_description(b.as_fd(), true, 10, 1).unwrap();
    }
}
