//! Memory that is written, given back, moved, replaced and inherited all the time, and looked at:
//! `shifter SEED [patient|humble]`. Some of it has a file of zeros below, some a memfd. Ends at SIGUSR1,
//! after one more look; a humble one has given up all its capabilities.
//!
//! # Safety
//! Each region is a mapping that one thread owns; what it is replaced by lies at the same place or is
//! noted. Children look and write there, and make system calls.
#![allow(unsafe_code)]

use outlive_test_programs::{
    Random, await_report_order, await_report_order_patiently, block, check, ending, expect, good,
    mix, say,
};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: usize = 4096;
const REGIONS: usize = 6;
/// Pages in a region at most.
const MOST: usize = 600;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

static END: AtomicBool = AtomicBool::new(false);

/// What lies below a region: nothing, or zeros of a file.
type Below<'a> = Option<&'a File>;

struct Region {
    at: usize,
    /// What each page holds; 0 where it holds nothing.
    pages: Vec<u64>,
}

fn map(at: usize, pages: usize, below: Below) -> usize {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED };
    let (how, fd) = match below {
        Some(file) => (libc::MAP_PRIVATE, file.as_raw_fd()),
        None => (ANONYMOUS, -1),
    };
    // SAFETY: a place of the kernel's choice, or one that belongs to the region.
    let mapped = unsafe { libc::mmap(at as *mut _, pages * PAGE, RW, how | fixed, fd, 0) };
    good("mmap", mapped as i64) as usize
}

/// A file and a memfd, of zeros, as long as any region.
fn files() -> [File; 2] {
    let mut how = OpenOptions::new();
    let file = how.read(true).write(true).create(true).truncate(false);
    let file = file.open("below").unwrap_or_else(|e| panic!("{e}"));
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"below".as_ptr(), libc::MFD_CLOEXEC) };
    let fd = good("memfd_create", fd.into()) as i32;
    // SAFETY: it was just made, and belongs to nobody else.
    let files = [file, unsafe { File::from_raw_fd(fd) }];
    for file in &files {
        let long = file.set_len((MOST * PAGE) as u64);
        check(long.is_ok(), || format!("set_len: {long:?}"));
    }
    files
}

impl Region {
    fn new(pages: usize, below: Below) -> Self {
        Self {
            at: map(0, pages, below),
            pages: vec![0; pages],
        }
    }

    /// The first or last word of a page.
    fn word(&self, page: usize, last: bool) -> *mut u64 {
        (self.at + page * PAGE + if last { PAGE - 8 } else { 0 }) as *mut u64
    }

    fn write(&mut self, page: usize, value: u64) {
        // A stop may come between these: then it is this thread that goes on.
        // SAFETY: both lie in the region, see the heading.
        unsafe {
            self.word(page, false).write_volatile(value);
            self.word(page, true).write_volatile(mix(value));
        }
        self.pages[page] = value;
    }

    fn look(&self) {
        for (page, &value) in self.pages.iter().enumerate() {
            // SAFETY: both lie in the region, see the heading.
            let found = unsafe {
                let last = self.word(page, true).read_volatile();
                (self.word(page, false).read_volatile(), last)
            };
            let expected = (value, if value == 0 { 0 } else { mix(value) });
            check(found == expected, || {
                format!(
                    "page {page} at {:x}: {found:x?}, not {expected:x?}",
                    self.at
                )
            });
        }
    }

    fn give_back(&mut self, from: usize, upto: usize) {
        let at = self.word(from, false).cast();
        // SAFETY: whole pages of the region.
        let advised = unsafe { libc::madvise(at, (upto - from) * PAGE, libc::MADV_DONTNEED) };
        expect("madvise", advised.into(), 0);
        self.pages[from..upto].fill(0);
    }

    fn replace(&mut self, from: usize, upto: usize) {
        map(self.word(from, false) as usize, upto - from, None);
        self.pages[from..upto].fill(0);
    }

    /// Moves it elsewhere, and makes it as long as is said. The kernel does not do so where parts
    /// that were replaced are mappings of their own: then nothing happens. (Where the length stays, it
    /// does since Linux 6.17, one after the other, and stops in the middle at one whose writes are
    /// tracked. What was moved by then is lost to who takes that for a failure, so it always changes.)
    fn shift(&mut self, pages: usize) {
        let pages = if pages == self.pages.len() {
            pages % MOST + 1
        } else {
            pages
        };
        let to = map(0, pages, None);
        let (old, new) = (self.pages.len() * PAGE, pages * PAGE);
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the region as it is, to a place that was just mapped for it.
        let moved = unsafe { libc::mremap(self.at as *mut _, old, new, how, to as *mut u8) };
        if moved == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error().raw_os_error();
            check(error == Some(libc::EFAULT), || format!("mremap: {error:?}"));
            // SAFETY: this was just mapped, and is used by nobody.
            let gone = unsafe { libc::munmap(to as *mut _, new) };
            return expect("munmap", gone.into(), 0);
        }
        self.at = to;
        self.pages.resize(pages, 0);
    }

    fn remove(self) {
        // SAFETY: the region is used no more.
        let gone = unsafe { libc::munmap(self.at as *mut _, self.pages.len() * PAGE) };
        expect("munmap", gone.into(), 0);
    }
}

/// Gives up all capabilities.
fn be_humble() {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let (header, none) = ([VERSION, 0], [0u32; 6]);
    // SAFETY: both are live and of the size that this version has.
    let done = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    expect("capset", done, 0);
}

/// A child looks at everything, writes some of it, and ends.
fn inherit(regions: &mut [Region], random: &mut Random) {
    // SAFETY: the child has this thread only, and neither allocates nor locks.
    let child = unsafe { libc::fork() };
    if child == 0 {
        regions.iter().for_each(Region::look);
        for region in regions.iter_mut() {
            let page = random.below(region.pages.len() as u64) as usize;
            region.write(page, 5);
            region.look();
        }
        // SAFETY: does not return.
        unsafe { libc::_exit(0) }
    }
    let child = good("fork", child.into()) as i32;
    let mut status = 0;
    // SAFETY: status is live.
    let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
    expect("waitpid", ended.into(), child.into());
    expect("the status of a child", status.into(), 0);
}

fn shift(seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let length = |random: &mut Random| 1 + random.below(MOST as u64) as usize;
    let files = files();
    // None, the file, the memfd, none, …
    let below = |which: usize| files.get((which + 2) % 3);
    let mut regions: Vec<Region> = (0..REGIONS)
        .map(|which| Region::new(length(&mut random), below(which)))
        .collect();
    let mut steps = 0;
    while !END.load(Ordering::Relaxed) {
        let which = random.below(REGIONS as u64) as usize;
        let region = &mut regions[which];
        let pages = region.pages.len() as u64;
        let from = random.below(pages);
        let upto = from + 1 + random.below((pages - from).min(40));
        let (from, upto) = (from as usize, upto as usize);
        match random.below(1000) {
            0..3 => inherit(&mut regions, &mut random),
            3..10 => region.shift(length(&mut random)),
            10..20 => {
                let new = Region::new(length(&mut random), below(which));
                std::mem::replace(region, new).remove();
            }
            20..80 => region.give_back(from, upto),
            80..110 => region.replace(from, upto),
            110..130 => region.look(),
            130..500 => (from..upto).for_each(|page| region.write(page, random.next_u64() | 1)),
            _ => region.write(from, random.next_u64() | 1),
        }
        steps += 1;
        if steps % 64 == 0 {
            std::thread::sleep(std::time::Duration::from_micros(300));
        }
    }
    regions.iter().for_each(Region::look);
    steps
}

fn main() {
    let seed = std::env::args().nth(1).and_then(|w| w.parse().ok());
    // While somebody traces it, a signal that nobody wants ends a wait, too.
    block(&[libc::SIGUSR1, libc::SIGCHLD]);
    let manner = std::env::args().nth(2);
    if manner.as_deref() == Some("humble") {
        be_humble();
    }
    let worker = std::thread::spawn(move || shift(seed.unwrap_or(1)));
    say("ready");
    if manner.as_deref() == Some("patient") {
        await_report_order_patiently();
    } else {
        await_report_order();
    }
    ending();
    END.store(true, Ordering::Relaxed);
    match worker.join() {
        Ok(steps) => say(&format!("steps {steps}")),
        Err(_) => std::process::exit(1),
    }
}
