//! What of a file is in the page cache only (`cachestat(2)`, Linux 6.5).
//!
//! # Safety
//! The call gets pointers to live local values of the layout that the kernel documents.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::os::fd::{AsFd, AsRawFd};

/// The number of the call, which is the same on every architecture.
const CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`.
#[repr(C)]
struct Range {
    offset: u64,
    /// 0: to the end.
    length: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Pages of a file that were written and have not reached its medium.
///
/// # Errors
/// `ENOSYS` before Linux 6.5; `EOPNOTSUPP` for what has no page cache of that sort; `EPERM` for a
/// file that this process may not write.
pub fn unsynced_pages(file: impl AsFd) -> Result<u64, Errno> {
    let range = Range {
        offset: 0,
        length: 0,
    };
    let mut stat = Stat::default();
    // SAFETY: both structures are live, have the kernel's layout, and the flags must be 0.
    let r = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_fd().as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    if r < 0 {
        return Err(last_error());
    }
    Ok(stat.dirty.saturating_add(stat.writeback))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_written_counts_until_it_was_flushed() {
        let mut file = tempfile::tempfile().unwrap();
        match unsynced_pages(&file) {
            // Older kernels do not have the call: then that is what is said.
            Err(Errno::NOSYS) => return,
            other => assert_eq!(other, Ok(0)),
        }
        file.write_all(&[1; 10 * 4096]).unwrap();
        let written = unsynced_pages(&file).unwrap();
        file.sync_all().unwrap();
        assert_eq!(unsynced_pages(&file), Ok(0));
        // A temporary directory in memory has nothing to flush to.
        let kind = rustix::fs::fstatfs(&file).unwrap().f_type;
        if kind != 0x0102_1994 {
            assert_eq!(written, 10);
        }
    }
}
