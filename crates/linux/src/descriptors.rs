//! Descriptors of kinds that `rustix` does not make: `signalfd4(2)`, expirations of a
//! `timerfd`, locks that belong to an open file description, who gets a descriptor's signals, how a process ended.
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

/// `_IOWR(0xFF, 11, struct pidfd_info)`, whose first version has 64 bytes.
const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b_u32 as libc::Ioctl;
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// The exit status, as `wait(2)` gives it, of a process that is gone; `None` where the kernel does
/// not tell.
#[must_use]
pub fn pidfd_exit_status(pidfd: BorrowedFd<'_>) -> Option<u32> {
    // mask, control group, eleven numbers, exit status.
    let mut info = [0u32; 16];
    info[0] = PIDFD_INFO_EXIT as u32;
    // SAFETY: info is live and has the 64 bytes that the command's number names.
    let answer = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) };
    (answer >= 0 && u64::from(info[0]) & PIDFD_INFO_EXIT != 0).then_some(info[15])
}

/// `fcntl(2)`: sets who gets signals, by a [`owner_argument`].
pub const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
/// `fcntl(2)`: sets which signal is sent.
pub const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
/// Needs a kernel with checkpoint support.
const F_GETOWNER_UIDS: i32 = 17;

/// What gets signals of a descriptor (`F_OWNER_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerKind {
    /// A thread.
    Thread,
    /// A process.
    Process,
    /// A process group.
    Group,
}

/// Who gets signals of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalOwner {
    /// What it is.
    pub kind: OwnerKind,
    /// Its ID as this process sees it; 0 where there is none, or not any more.
    pub id: u32,
    /// The signal, 0 for the usual one.
    pub signal: u32,
    /// Real and effective user on whose authority signals are sent.
    pub users: [u32; 2],
}

/// `struct f_owner_ex` for [`F_SETOWN_EX`].
#[must_use]
pub fn owner_argument(kind: OwnerKind, id: u32) -> [u8; 8] {
    let kind: u32 = match kind {
        OwnerKind::Thread => 0,
        OwnerKind::Process => 1,
        OwnerKind::Group => 2,
    };
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&kind.to_ne_bytes());
    bytes[4..].copy_from_slice(&id.to_ne_bytes());
    bytes
}

/// Asks who gets the signals of a descriptor.
///
/// # Errors
/// What `fcntl(2)` says; `EINVAL` on a kernel without checkpoint support.
pub fn signal_owner(fd: BorrowedFd<'_>) -> Result<SignalOwner, Errno> {
    let (mut owner, mut users) = ([0u32; 2], [0u32; 2]);
    // SAFETY: both commands write eight bytes to live locals of that size, the third takes a
    // number.
    let (told, signal) = unsafe {
        let fd = fd.as_raw_fd();
        let told = libc::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr());
        let users = match owner[1] {
            0 => 0,
            _ => libc::fcntl(fd, F_GETOWNER_UIDS, users.as_mut_ptr()),
        };
        (told.min(users), libc::fcntl(fd, F_GETSIG, 0))
    };
    if told < 0 || signal < 0 {
        return Err(last_error());
    }
    Ok(SignalOwner {
        kind: match owner[0] {
            0 => OwnerKind::Thread,
            2 => OwnerKind::Group,
            _ => OwnerKind::Process,
        },
        id: owner[1],
        signal: signal as u32,
        users,
    })
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
    fn the_owner_that_was_set_is_told() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let nobody = signal_owner(socket.as_fd()).unwrap();
        assert_eq!((nobody.id, nobody.signal), (0, 0));
        let argument = owner_argument(OwnerKind::Process, std::process::id());
        // SAFETY: the argument is live and eight bytes long; the second takes a number.
        unsafe {
            let fd = socket.as_raw_fd();
            assert_eq!(libc::fcntl(fd, F_SETOWN_EX, argument.as_ptr()), 0);
            assert_eq!(libc::fcntl(fd, F_SETSIG, libc::SIGUSR2), 0);
        }
        let owner = signal_owner(socket.as_fd()).unwrap();
        let expected = SignalOwner {
            kind: OwnerKind::Process,
            id: std::process::id(),
            signal: libc::SIGUSR2 as u32,
            users: [rustix::process::getuid(), rustix::process::geteuid()].map(|u| u.as_raw()),
        };
        assert_eq!(owner, expected);
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
