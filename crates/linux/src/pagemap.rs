//! Which pages of a process exist and which were written: the `PAGEMAP_SCAN` ioctl (Linux 6.7,
//! kernel documentation `admin-guide/mm/pagemap.rst`).
//!
//! # Safety
//! The ioctl reads one argument struct and writes to a vector whose address and length come from
//! one live `Vec`.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};

/// The page was written since it was last protected (or is not protected).
pub const WRITTEN: u64 = 1 << 1;
/// The page belongs to a file or to shared memory.
pub const FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PRESENT: u64 = 1 << 3;
/// The page is in swap.
pub const SWAPPED: u64 = 1 << 4;
/// The page is the shared zero page.
pub const ZERO: u64 = 1 << 5;
/// The page is a guard: any access faults (`MADV_GUARD_INSTALL`).
pub const GUARD: u64 = 1 << 8;

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const BATCH: usize = 4096;

#[repr(C)]
#[derive(Default)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Neighbouring pages with the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Address of the first page.
    pub start: u64,
    /// Address one past the last page.
    pub end: u64,
    /// The categories that were asked to be returned.
    pub categories: u64,
}

/// What to look for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// All of these must be there …
    pub all_of: u64,
    /// … where a bit set here means that the category must *not* be there …
    pub inverted: u64,
    /// … and at least one of these, unless it is 0.
    pub any_of: u64,
    /// Which categories to report.
    pub report: u64,
    /// Protect the matching pages again in the same step. Fails with [`Errno::PERM`] on a
    /// mapping that is not registered for asynchronous write protection.
    pub protect: bool,
}

/// The page map of one process, with room for what a scan finds.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
    found: Box<[Region]>,
}

impl Pagemap {
    /// Opens the page map of a process.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        let path = format!("/proc/{pid}/pagemap");
        let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            file,
            found: vec![Region::default(); BATCH].into(),
        })
    }

    /// Hands out the regions of `start..end` that match, in order. A region may come in several
    /// parts.
    pub fn scan(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        mut visit: impl FnMut(Region),
    ) -> Result<(), Errno> {
        let mut from = start;
        while from < end {
            let mut arg = Argument {
                size: size_of::<Argument>() as u64,
                flags: if query.protect {
                    WP_MATCHING | CHECK_WPASYNC
                } else {
                    0
                },
                start: from,
                end,
                vec: self.found.as_mut_ptr() as u64,
                vec_len: self.found.len() as u64,
                category_inverted: query.inverted,
                category_mask: query.all_of,
                category_anyof_mask: query.any_of,
                return_mask: query.report,
                ..Argument::default()
            };
            // SAFETY: arg is live; vec and vec_len describe the exclusively borrowed found.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            if n < 0 {
                return Err(last_error());
            }
            self.found.iter().take(n as usize).for_each(|r| visit(*r));
            if arg.walk_end <= from {
                break;
            }
            from = arg.walk_end;
        }
        Ok(())
    }
}
