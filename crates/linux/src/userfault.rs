//! `userfaultfd(2)` with asynchronous write protection: the kernel notes that a page was written
//! and lifts its protection itself, no handler runs (Linux 6.7).
//!
//! # Safety
//! Each ioctl gets a pointer to one live local struct of the size encoded in its number.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use rustix::fd::{AsRawFd, OwnedFd};

const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFD_API: u64 = 0xAA;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;

/// Flags for the `userfaultfd` call: close on exec, do not block, faults of user mode only (which
/// unprivileged callers may ask for, and which is all that write protection needs).
pub const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// A userfaultfd that tracks the writes of the process in which it was created.
#[derive(Debug)]
pub struct WriteTracker {
    fd: OwnedFd,
}

impl WriteTracker {
    /// Agrees with the kernel on asynchronous write protection. [`Errno::INVAL`] where it is
    /// too old for that.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let wanted = FEATURE_PAGEFAULT_FLAG_WP
            | FEATURE_WP_HUGETLBFS_SHMEM
            | FEATURE_WP_UNPOPULATED
            | FEATURE_WP_ASYNC;
        let mut api = Api {
            api: UFFD_API,
            features: wanted,
            ioctls: 0,
        };
        ioctl(&fd, UFFDIO_API, &raw mut api as usize)?;
        Ok(Self { fd })
    }

    /// Begins to track a mapping; everything in it counts as written.
    pub fn register(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = Register {
            start,
            len: end - start,
            mode: REGISTER_MODE_WP,
            ioctls: 0,
        };
        ioctl(&self.fd, UFFDIO_REGISTER, &raw mut arg as usize)
    }

    /// Ends the tracking of a mapping.
    pub fn unregister(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = Range {
            start,
            len: end - start,
        };
        ioctl(&self.fd, UFFDIO_UNREGISTER, &raw mut arg as usize)
    }
}

fn ioctl(fd: &OwnedFd, number: libc::c_ulong, arg: usize) -> Result<(), Errno> {
    // SAFETY: arg is the address of a live struct of the size that number encodes (callers above).
    if unsafe { libc::ioctl(fd.as_raw_fd(), number, arg) } < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}
