//! Exclusive writer locks, and who holds them.
//!
//! The lock is a `flock(2)` on the open file or directory: it needs no file of its own, and it
//! ends with its holder, however that dies.

use crate::MediumError;
use rustix::fs::{FlockOperation, flock, fstat, major, minor};
use rustix::io::Errno;
use std::io::Read;
use std::os::fd::BorrowedFd;

/// How often the holder is looked for. The kernel writes `/proc/locks` a page at a time and goes
/// on by position: where another lock before it is given back between two pages, one lock is
/// left out of that reading.
const LOOKS: usize = 8;

/// Takes the lock, or says who has it.
pub(crate) fn exclusive(place: &str, fd: BorrowedFd<'_>) -> Result<(), MediumError> {
    for _ in 0..LOOKS {
        match flock(fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => {}
            Err(e) => return Err(MediumError::io(place, "lock", 0, 0, e)),
        }
        if let Some(holder) = holder(fd) {
            return Err(busy(place, holder));
        }
    }
    Err(busy(place, "another process".to_owned()))
}

fn busy(place: &str, holder: String) -> MediumError {
    let place = place.to_owned();
    MediumError::Busy { place, holder }
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
    let locks = locks().ok()?;
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

/// All of `/proc/locks`, asked for in large pieces: within one the list stands still.
fn locks() -> std::io::Result<String> {
    let mut file = std::fs::File::open("/proc/locks")?;
    let mut all = Vec::with_capacity(256 << 10);
    file.read_to_end(&mut all)?;
    Ok(String::from_utf8_lossy(&all).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn the_holder_is_found_while_other_locks_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("held");
        let first = File::create(&path).unwrap();
        let second = File::open(&path).unwrap();
        exclusive("held", first.as_fd()).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|threads| {
            for thread in 0..4 {
                let file = File::create(dir.path().join(format!("other-{thread}"))).unwrap();
                let over = &over;
                threads.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
                        flock(&file, FlockOperation::Unlock).unwrap();
                    }
                });
            }
            let unnamed = (0..2000)
                .filter(|_| match exclusive("held", second.as_fd()) {
                    Err(MediumError::Busy { holder, .. }) => holder == "another process",
                    other => panic!("{other:?}"),
                })
                .count();
            over.store(true, Ordering::Relaxed);
            assert_eq!(unnamed, 0);
        });
    }
}
