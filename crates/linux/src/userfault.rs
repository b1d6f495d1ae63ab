//! `userfaultfd(2)` with write protection. *Asynchronous*: the kernel notes that a page was written
//! and lifts its protection itself, no handler runs (Linux 6.7). *Synchronous*: a thread that
//! writes to a protected page waits until a handler lifts the protection. On request, whoever touches
//! a hole waits as well, until a handler fills it.
//!
//! # Safety
//! Each ioctl gets a pointer to one live local struct of the size encoded in its number; events are
//! read into an array of structs that any bytes are valid for.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;
const UFFD_API: u64 = 0xAA;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xC020_AA04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xC018_AA06;
const WRITEPROTECT_MODE_WP: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WP: u64 = 2;

/// Flags for the `userfaultfd` call: close on exec, do not block, faults of user mode only (which
/// unprivileged callers may ask for, and which is all that write protection needs).
pub const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

/// The same for a guard: faults of the kernel's own writes are handled, too, which takes
/// `CAP_SYS_PTRACE`, or the sysctl `vm.unprivileged_userfaultfd`.
pub const GUARD_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

/// Faults that are read at once.
pub const FAULTS: usize = 64;

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

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    feature: u64,
}

/// A thread that waits for a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address that it touched.
    pub at: u64,
    /// There was no page; else there is one, which is protected.
    pub missing: bool,
}

/// A userfaultfd that tracks the writes of the process in which it was created.
#[derive(Debug)]
pub struct WriteTracker {
    fd: OwnedFd,
    synchronous: bool,
    /// Who touches a hole waits, too.
    holes: bool,
}

impl WriteTracker {
    /// Agrees with the kernel on asynchronous write protection. [`Errno::INVAL`] where it is
    /// too old for that.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let wanted = FEATURE_PAGEFAULT_FLAG_WP
            | FEATURE_WP_HUGETLBFS_SHMEM
            | FEATURE_WP_UNPOPULATED
            | FEATURE_WP_ASYNC;
        Self::agree(fd, wanted, (false, false))
    }

    /// Agrees on synchronous write protection: somebody must take [`WriteTracker::faults`]. With
    /// `holes` whoever touches a page that is not there waits as well.
    pub fn guarding(fd: OwnedFd, holes: bool) -> Result<Self, Errno> {
        let wanted = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_UNPOPULATED;
        Self::agree(fd, wanted, (true, holes))
    }

    fn agree(
        fd: OwnedFd,
        features: u64,
        (synchronous, holes): (bool, bool),
    ) -> Result<Self, Errno> {
        let mut api = Api {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        ioctl(&fd, UFFDIO_API, &raw mut api as usize)?;
        Ok(Self {
            fd,
            synchronous,
            holes,
        })
    }

    /// Whether writers wait for a handler.
    #[must_use]
    pub fn is_synchronous(&self) -> bool {
        self.synchronous
    }

    /// Whether whoever touches a hole waits for a handler.
    #[must_use]
    pub fn guards_holes(&self) -> bool {
        self.holes
    }

    /// Puts the page of zeros wherever no page is, from the first one on until one is there, and wakes
    /// who waits for those. Returns the bytes: none where the first page is there already.
    /// [`Errno::NOENT`] where the range is not registered.
    pub fn fill(&self, (start, end): (u64, u64)) -> Result<u64, Errno> {
        let mut arg = ZeroPage {
            range: Range {
                start,
                len: end - start,
            },
            mode: 0,
            zeroed: 0,
        };
        match ioctl(&self.fd, UFFDIO_ZEROPAGE, &raw mut arg as usize) {
            Ok(()) => Ok(end - start),
            Err(Errno::AGAIN) => Ok(u64::try_from(arg.zeroed).unwrap_or(0)),
            Err(Errno::EXIST) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Protects pages, or lifts their protection and wakes who waits for it.
    /// [`Errno::NOENT`] where the range is not registered.
    pub fn protect(&self, (start, end): (u64, u64), on: bool) -> Result<(), Errno> {
        let mut arg = WriteProtect {
            range: Range {
                start,
                len: end - start,
            },
            mode: if on { WRITEPROTECT_MODE_WP } else { 0 },
        };
        ioctl(&self.fd, UFFDIO_WRITEPROTECT, &raw mut arg as usize)
    }

    /// Wakes who waits for pages that are not registered any more: it tries again.
    pub fn wake(&self, (start, end): (u64, u64)) -> Result<(), Errno> {
        let mut arg = Range {
            start,
            len: end - start,
        };
        ioctl(&self.fd, UFFDIO_WAKE, &raw mut arg as usize)
    }

    /// Who waits, at most [`FAULTS`]; none where nobody does.
    pub fn faults(&self) -> Result<Vec<Fault>, Errno> {
        let mut messages = [Message::default(); FAULTS];
        let size = size_of_val(&messages);
        // SAFETY: the buffer is live, of the size that is said, and any bytes are a Message.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size) };
        let n = match usize::try_from(n).map_err(|_| last_error()) {
            Ok(n) => n / size_of::<Message>(),
            Err(Errno::AGAIN) => 0,
            Err(e) => return Err(e),
        };
        let faults = messages[..n].iter();
        let faults = faults.filter(|m| m.event == EVENT_PAGEFAULT);
        let fault = |m: &Message| Fault {
            at: m.address,
            missing: m.flags & PAGEFAULT_FLAG_WP == 0,
        };
        Ok(faults.map(fault).collect())
    }

    /// Begins to track a mapping; everything in it counts as written.
    pub fn register(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = Register {
            start,
            len: end - start,
            mode: if self.holes {
                REGISTER_MODE_WP | REGISTER_MODE_MISSING
            } else {
                REGISTER_MODE_WP
            },
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

impl AsFd for WriteTracker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
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
