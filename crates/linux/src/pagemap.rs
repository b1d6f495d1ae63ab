//! Which pages of a process exist and which were written: the `PAGEMAP_SCAN` ioctl (Linux 6.7,
//! kernel documentation `admin-guide/mm/pagemap.rst`). On older kernels the entries of the page
//! map are read one by one, which tells what exists but not what was written. Kernels that have
//! the ioctl but do not show guard pages (before 6.15) refuse to be asked for these.
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
/// The page was written since its soft-dirty bit was cleared ([`crate::soft_dirty`]).
pub const SOFT_DIRTY: u64 = 1 << 7;
/// The page is in memory and mapped in one process only, once ([`Pagemap::entries`] alone tells).
pub const ALONE: u64 = 1 << 63;
/// The page is a guard: any access faults (`MADV_GUARD_INSTALL`).
pub const GUARD: u64 = 1 << 8;

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const BATCH: usize = 4096;
const PAGE: u64 = 4096;

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
    /// Fails so without protecting anything.
    pub registered_only: bool,
}

/// The page map of one process, with room for what a scan finds.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
    found: Box<[Region]>,
    /// The kernel has no `PAGEMAP_SCAN`.
    plain: bool,
    /// Categories that the kernel does not know, so that no page has them.
    unknown: u64,
}

impl Pagemap {
    /// Opens the page map of a process.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        let path = format!("/proc/{pid}/pagemap");
        let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut map = Self {
            file,
            found: vec![Region::default(); BATCH].into(),
            plain: false,
            unknown: 0,
        };
        let mut nothing = Argument {
            size: size_of::<Argument>() as u64,
            category_mask: GUARD,
            return_mask: GUARD,
            ..Argument::default()
        };
        match map.ask(&mut nothing) {
            Err(Errno::INVAL) => map.unknown = GUARD,
            Err(Errno::NOTTY) => map.plain = true,
            _ => {}
        }
        Ok(map)
    }

    /// Makes the ioctl, which fills [`Self::found`]; returns how many regions it found. `vec_len` is
    /// the most that can be found, for which the kernel allocates memory.
    fn ask(&mut self, arg: &mut Argument) -> Result<usize, Errno> {
        arg.vec = self.found.as_mut_ptr() as u64;
        arg.vec_len = arg.vec_len.clamp(1, self.found.len() as u64);
        // SAFETY: arg is live; vec and vec_len describe the exclusively borrowed found.
        let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut *arg) };
        usize::try_from(n).map_err(|_| last_error())
    }

    /// Hands out the regions of `start..end` that match, in order and each once. A region may come
    /// in several parts.
    pub fn scan(
        &mut self,
        start: u64,
        end: u64,
        query: Query,
        mut visit: impl FnMut(Region),
    ) -> Result<(), Errno> {
        if self.plain {
            if (query.all_of | query.any_of | query.report) & WRITTEN != 0 || query.protect {
                return Err(Errno::NOTTY);
            }
            return self.entries(start, end, query, visit);
        }
        let Some(query) = query.without(self.unknown) else {
            return Ok(());
        };
        let mut from = start;
        while from < end {
            let mut arg = Argument {
                size: size_of::<Argument>() as u64,
                flags: match (query.protect, query.registered_only) {
                    (true, _) => WP_MATCHING | CHECK_WPASYNC,
                    (false, true) => CHECK_WPASYNC,
                    (false, false) => 0,
                },
                start: from,
                end,
                category_inverted: query.inverted,
                category_mask: query.all_of,
                category_anyof_mask: query.any_of,
                return_mask: query.report,
                ..Argument::default()
            };
            arg.vec_len = (end - from).div_ceil(PAGE);
            let n = self.ask(&mut arg)?;
            let found = &self.found[..n];
            // The kernel says where it stopped first, also where it went on afterwards: what it
            // reported last may lie further on.
            let reached = found.last().map_or(0, |r| r.end);
            found.iter().for_each(|r| visit(*r));
            let reached = reached.max(arg.walk_end);
            if reached <= from {
                break;
            }
            from = reached;
        }
        Ok(())
    }

    /// Hands out whether pages are mapped here alone, as runs that cover the range in order. Holes
    /// count as mapped here alone; of pages in swap nobody knows.
    pub fn exclusive(
        &self,
        start: u64,
        end: u64,
        mut visit: impl FnMut(u64, u64, bool),
    ) -> Result<(), Errno> {
        /// The page is in memory, or in swap.
        const THERE: u64 = 1 << 63 | 1 << 62;
        /// It is in memory and mapped here alone.
        const ALONE: u64 = 1 << 56;
        let mut raw = [0u8; 8 * 512];
        let mut run = (start, true);
        let mut at = start;
        while at < end {
            let wanted = raw.len().min(((end - at) / PAGE * 8) as usize);
            let n = rustix::io::pread(&self.file, &mut raw[..wanted], at / PAGE * 8)?;
            let (entries, _) = raw[..n].as_chunks::<8>();
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                let entry = u64::from_ne_bytes(*entry);
                let alone = entry & THERE == 0 || entry & ALONE != 0;
                if alone != run.1 {
                    if at > run.0 {
                        visit(run.0, at, run.1);
                    }
                    run = (at, alone);
                }
                at += PAGE;
            }
        }
        if end > run.0 {
            visit(run.0, end, run.1);
        }
        Ok(())
    }

    /// [`Pagemap::scan`] by reading the entries of all pages, which every kernel allows. Nothing is
    /// protected; nobody knows what is [`WRITTEN`], and the zero page is not told from others.
    pub fn entries(
        &self,
        start: u64,
        end: u64,
        query: Query,
        mut visit: impl FnMut(Region),
    ) -> Result<(), Errno> {
        let mut raw = [0u8; 8 * 512];
        let mut open: Option<Region> = None;
        let mut at = start;
        while at < end {
            let wanted = raw.len().min(((end - at) / PAGE * 8) as usize);
            let n = rustix::io::pread(&self.file, &mut raw[..wanted], at / PAGE * 8)?;
            let (entries, _) = raw[..n].as_chunks::<8>();
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                let categories = categories_of(u64::from_ne_bytes(*entry));
                let hit = query
                    .matches(categories)
                    .then_some(categories & query.report);
                match (&mut open, hit) {
                    (Some(r), Some(c)) if r.categories == c => r.end = at + PAGE,
                    (_, hit) => {
                        if let Some(r) = open.take() {
                            visit(r);
                        }
                        open = hit.map(|categories| Region {
                            start: at,
                            end: at + PAGE,
                            categories,
                        });
                    }
                }
                at += PAGE;
            }
        }
        if let Some(r) = open {
            visit(r);
        }
        Ok(())
    }
}

/// The categories of a page by its entry in the page map.
fn categories_of(entry: u64) -> u64 {
    let bit = |n: u32, category: u64| if entry >> n & 1 == 1 { category } else { 0 };
    bit(63, PRESENT)
        | bit(62, SWAPPED)
        | bit(61, FILE)
        | bit(58, GUARD)
        | bit(56, ALONE)
        | bit(55, SOFT_DIRTY)
}

impl Query {
    /// The same question where no page has these categories; `None` where nothing can match.
    fn without(self, none: u64) -> Option<Self> {
        let missed = none & !self.inverted;
        let any_of = if self.any_of & none & self.inverted != 0 {
            0
        } else {
            self.any_of & !none
        };
        let never = self.all_of & missed != 0 || self.any_of != 0 && self.any_of & !missed == 0;
        (!never).then_some(Self {
            all_of: self.all_of & !none,
            inverted: self.inverted & !none,
            any_of,
            report: self.report & !none,
            protect: self.protect,
            registered_only: self.registered_only,
        })
    }

    /// Whether a page with these categories is looked for.
    fn matches(&self, categories: u64) -> bool {
        let seen = categories ^ self.inverted;
        seen & self.all_of == self.all_of && (self.any_of == 0 || seen & self.any_of != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(map: &mut Pagemap, start: u64, end: u64, query: Query) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        map.scan(start, end, query, |r| match all.last_mut() {
            Some(last) if last.1 == r.start => last.1 = r.end,
            _ => all.push((r.start, r.end)),
        })
        .unwrap();
        all
    }

    #[test]
    fn pages_that_a_fork_shares_are_not_mapped_here_alone() {
        let length = 8 * PAGE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping, written within its length; the child only waits to be killed.
        let (at, child) = unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                length as usize,
                protection,
                flags,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            for page in 0..6 {
                at.byte_add(page * 4096).cast::<u8>().write_volatile(1);
            }
            let child = libc::fork();
            if child == 0 {
                loop {
                    libc::pause();
                }
            }
            at.byte_add(3 * 4096).cast::<u8>().write_volatile(2);
            (at as u64, child)
        };
        let map = Pagemap::open(std::process::id()).unwrap();
        let mut runs = Vec::new();
        let visit = |s, e, alone| runs.push(((s - at) / PAGE, (e - at) / PAGE, alone));
        map.exclusive(at, at + length, visit).unwrap();
        // SAFETY: numbers only; the child is ours.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        let expected = [(0, 3, false), (3, 4, true), (4, 6, false), (6, 8, true)];
        assert_eq!(runs, expected);
    }

    /// More regions than the kernel hands on at once come in order, and each once.
    #[test]
    fn many_regions_come_in_order_and_once() {
        let mut memory = vec![0u8; 16 << 20];
        for page in (0..memory.len()).step_by(2 * 4096) {
            memory[page] = 1;
        }
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let end = start + (15 << 20);
        let exists = Query {
            any_of: PRESENT | SWAPPED,
            ..Query::default()
        };
        let mut map = Pagemap::open(std::process::id()).unwrap();
        let mut reached = start;
        let mut pages = 0;
        map.scan(start, end, exists, |r| {
            let (from, to) = (r.start, r.end);
            assert!(from >= reached, "{from:x}-{to:x} after {reached:x}");
            reached = to;
            pages += (to - from) / PAGE;
        })
        .unwrap();
        assert!(pages >= (15 << 20) / PAGE / 2 - 1, "{pages}");
    }

    #[test]
    fn questions_for_what_no_page_has_mean_the_same_without_it() {
        for bits in 0..1u64 << 10 {
            let part = |n: u32| ((bits >> n & 1) * GUARD) | ((bits >> (n + 1) & 1) * FILE);
            let query = Query {
                all_of: part(0),
                inverted: part(2),
                any_of: part(4),
                report: part(6),
                protect: false,
                registered_only: false,
            };
            for page in [0, FILE] {
                let less = query.without(GUARD);
                let matches = less.is_some_and(|q| q.matches(page));
                assert_eq!(matches, query.matches(page), "{query:?} {page:x}");
                assert!(less.is_none_or(|q| (q.all_of | q.any_of | q.report) & GUARD == 0));
            }
        }
    }

    #[test]
    fn both_ways_find_the_same_pages() {
        let pid = std::process::id();
        // Large enough to be a mapping of its own, with every third page touched.
        let mut memory = vec![0u8; 4 << 20];
        for page in (0..memory.len()).step_by(3 * 4096) {
            memory[page] = 1;
        }
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let end = start + (2 << 20);
        let exists = Query {
            any_of: PRESENT | SWAPPED,
            ..Query::default()
        };
        let holes = Query {
            all_of: PRESENT | SWAPPED,
            inverted: PRESENT | SWAPPED,
            ..Query::default()
        };
        let mut by_ioctl = Pagemap::open(pid).unwrap();
        let mut by_reading = Pagemap {
            plain: true,
            ..Pagemap::open(pid).unwrap()
        };
        for query in [exists, holes] {
            let plain = regions(&mut by_reading, start, end, query);
            assert!(plain.len() > 100, "{}", plain.len());
            assert_eq!(regions(&mut by_ioctl, start, end, query), plain);
        }
        by_ioctl.unknown = GUARD;
        let guarded = |any_of| Query {
            any_of,
            ..Query::default()
        };
        assert_eq!(regions(&mut by_ioctl, start, end, guarded(GUARD)), []);
        let both = regions(&mut by_ioctl, start, end, guarded(GUARD | PRESENT));
        assert_eq!(both, regions(&mut by_reading, start, end, guarded(PRESENT)));
        let written = Query {
            all_of: WRITTEN,
            ..Query::default()
        };
        let refused = by_reading.scan(start, end, written, |_| {});
        assert_eq!(refused, Err(Errno::NOTTY));
        assert_eq!(memory[0], 1);
    }
}
