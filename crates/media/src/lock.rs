//! Exclusive writer locks, and who holds them.
//!
//! The lock is a `flock(2)` on the open file or directory: it needs no file of its own, and it
//! ends with its holder, however that dies.

use crate::MediumError;
use rustix::fs::{FlockOperation, flock, fstat, major, minor};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;

/// Takes the lock, or says who has it.
pub(crate) fn exclusive(place: &str, fd: BorrowedFd<'_>) -> Result<(), MediumError> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            let holder = holder(fd).unwrap_or_else(|| "another process".to_owned());
            Err(MediumError::Busy {
                place: place.to_owned(),
                holder,
            })
        }
        Err(e) => Err(MediumError::io(place, "lock", 0, 0, e)),
    }
}

/// Finds the holder in `/proc/locks` (see `proc_locks(5)`), by device and inode.
fn holder(fd: BorrowedFd<'_>) -> Option<String> {
    let stat = fstat(fd).ok()?;
    let id = format!(
        "{:02x}:{:02x}:{}",
        major(stat.st_dev),
        minor(stat.st_dev),
        stat.st_ino
    );
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != "FLOCK");
        let pid = words.nth(3)?;
        (words.next()? == id).then_some(pid)
    })?;
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(comm) => Some(format!("pid {pid} ({})", comm.trim_end())),
        Err(_) => Some(format!("pid {pid}")),
    }
}
