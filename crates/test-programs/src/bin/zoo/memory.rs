//! Memory of every sort that a program has.
//!
//! # Safety
//! Mappings are made by this file and never unmapped while a check uses them; every access stays
//! within the length that was mapped and obeys its protection.
#![allow(unsafe_code)]

use crate::{Check, check};
use outlive_test_programs::{Random, fail, good, mix};
use std::os::fd::AsRawFd;
use std::path::Path;

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Pages of a mapping of ours.
#[derive(Clone, Copy)]
struct Pages {
    at: usize,
    count: usize,
}

impl Pages {
    fn map(count: usize, protection: i32, flags: i32) -> Self {
        // SAFETY: a fresh mapping at a place of the kernel's choice.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), count * PAGE, protection, flags, -1, 0) };
        let _ = good("mmap", at as i64);
        Self {
            at: at as usize,
            count,
        }
    }

    fn words(self, page: usize) -> &'static mut [u64; PAGE / 8] {
        assert!(page < self.count, "page {page} of {}", self.count);
        // SAFETY: in bounds of a live mapping; the checks run one after the other in one thread.
        unsafe { &mut *((self.at + page * PAGE) as *mut [u64; PAGE / 8]) }
    }

    fn fill(self, page: usize, seed: u64) {
        for (i, word) in self.words(page).iter_mut().enumerate() {
            *word = mix(seed ^ (i as u64) << 32);
        }
    }

    fn must_hold(self, page: usize, seed: u64, what: &str) {
        for (i, word) in self.words(page).iter().enumerate() {
            if *word != mix(seed ^ (i as u64) << 32) {
                fail(&format!("{what}: page {page} lost word {i}: {word:x}"));
            }
        }
    }

    fn must_be_zero(self, page: usize, what: &str) {
        if self.words(page).iter().any(|&w| w != 0) {
            fail(&format!("{what}: page {page} is not zero"));
        }
    }

    fn advise(self, page: usize, count: usize, advice: i32) {
        // SAFETY: in bounds of a live mapping.
        let r = unsafe { libc::madvise((self.at + page * PAGE) as *mut _, count * PAGE, advice) };
        let _ = good("madvise", r.into());
    }

    fn protect(self, protection: i32) {
        // SAFETY: a live mapping of ours.
        let r = unsafe { libc::mprotect(self.at as *mut _, self.count * PAGE, protection) };
        let _ = good("mprotect", r.into());
    }
}

/// Everything that lies over no file.
pub(crate) fn private() -> Vec<Check> {
    vec![
        hidden(),
        locked(),
        advised(),
        huge(),
        churning(),
        forgotten(),
        replaced(),
        moved(),
        heap(),
        sparse(),
        guarded(),
        deep(),
    ]
}

/// Mappings of files.
pub(crate) fn of_files(dir: &Path) -> Vec<Check> {
    vec![private_file(dir), shared_file(dir)]
}

/// Data behind PROT_NONE, looked at now and then.
fn hidden() -> Check {
    let pages = Pages::map(8, RW, PRIVATE);
    (0..8).for_each(|p| pages.fill(p, 100 + p as u64));
    pages.protect(libc::PROT_NONE);
    check("hidden", move |round| {
        if round % 8 == 7 {
            pages.protect(libc::PROT_READ);
            (0..8).for_each(|p| pages.must_hold(p, 100 + p as u64, "PROT_NONE"));
            pages.protect(libc::PROT_NONE);
        }
    })
}

fn locked() -> Check {
    let pages = Pages::map(4, RW, PRIVATE);
    // SAFETY: a live mapping of ours.
    let _ = good(
        "mlock",
        unsafe { libc::mlock(pages.at as *const _, 4 * PAGE) }.into(),
    );
    pages.fill(1, 7);
    check("mlock", move |_| {
        pages.must_hold(1, 7, "mlock");
        pages.must_be_zero(2, "mlock");
    })
}

fn advised() -> Check {
    let advice = [
        libc::MADV_DONTFORK,
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
    ];
    let more = [
        libc::MADV_DONTDUMP,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_WIPEONFORK,
    ];
    let list: Vec<Pages> = advice
        .into_iter()
        .chain(more)
        .map(|advice| {
            let pages = Pages::map(2, RW, PRIVATE);
            pages.advise(0, 2, advice);
            pages.fill(0, 9);
            pages
        })
        .collect();
    check("madvise", move |_| {
        list.iter().for_each(|p| p.must_hold(0, 9, "madvise"))
    })
}

/// Two huge pages, of which one is written all the time.
fn huge() -> Check {
    const HUGE: usize = 512;
    let room = Pages::map(3 * HUGE, RW, PRIVATE);
    let at = room.at.next_multiple_of(HUGE * PAGE);
    let pages = Pages {
        at,
        count: 2 * HUGE,
    };
    pages.advise(0, 2 * HUGE, libc::MADV_HUGEPAGE);
    pages.fill(3, 11);
    pages.fill(HUGE + 5, 12);
    check("huge pages", move |round| {
        pages.must_hold(3, 11, "a huge page");
        pages.must_hold(
            HUGE + 5,
            if round == 0 { 12 } else { round - 1 },
            "a huge page",
        );
        pages.fill(HUGE + 5, round);
        pages.must_be_zero(HUGE + 6, "a huge page");
    })
}

/// Pages that change at random, each checked against what was written to it last.
fn churning() -> Check {
    let pages = Pages::map(64, RW, PRIVATE);
    let mut random = Random::new(3);
    let mut written = [None; 64];
    check("changing pages", move |round| {
        for _ in 0..4 {
            let page = random.below(64) as usize;
            match written[page] {
                Some(seed) => pages.must_hold(page, seed, "changing pages"),
                None => pages.must_be_zero(page, "changing pages"),
            }
            if random.below(5) == 0 {
                pages.advise(page, 1, libc::MADV_DONTNEED);
                written[page] = None;
            } else {
                pages.fill(page, round << 8 | page as u64);
                written[page] = Some(round << 8 | page as u64);
            }
        }
    })
}

/// Written once, then given back: must read zero for ever.
fn forgotten() -> Check {
    let pages = Pages::map(16, RW, PRIVATE);
    (0..16).for_each(|p| pages.fill(p, 1));
    check("MADV_DONTNEED", move |round| {
        // Only every so often: to read makes a page.
        if round == 2 {
            pages.advise(0, 16, libc::MADV_DONTNEED);
        }
        if round > 2 && round % 16 == 0 {
            (0..16).for_each(|p| pages.must_be_zero(p, "MADV_DONTNEED"));
        }
        if round % 64 == 63 {
            (0..16).for_each(|p| pages.fill(p, round));
            pages.advise(0, 16, libc::MADV_DONTNEED);
        }
    })
}

/// Unmapped and mapped again at the same place, all the time.
fn replaced() -> Check {
    let pages = Pages::map(8, RW, PRIVATE);
    pages.fill(2, u64::MAX);
    check("munmap and mmap", move |round| {
        if round > 0 {
            pages.must_hold(round as usize % 8, round - 1, "a mapping at an old place");
            pages.must_be_zero((round as usize + 1) % 8, "a mapping at an old place");
        }
        // SAFETY: our own mapping is replaced by a fresh one of the same length.
        unsafe {
            let _ = good("munmap", libc::munmap(pages.at as *mut _, 8 * PAGE).into());
            let flags = PRIVATE | libc::MAP_FIXED_NOREPLACE;
            let at = libc::mmap(pages.at as *mut _, 8 * PAGE, RW, flags, -1, 0);
            let _ = good("mmap", at as i64);
        }
        pages.fill((round as usize + 1) % 8, round);
    })
}

/// Moves between two places.
fn moved() -> Check {
    let room = Pages::map(64, libc::PROT_NONE, PRIVATE);
    let mut pages = Pages::map(8, RW, PRIVATE);
    (0..8).for_each(|p| pages.fill(p, 50 + p as u64));
    check("mremap", move |round| {
        (0..8).for_each(|p| pages.must_hold(p, 50 + p as u64, "a moved mapping"));
        let to = room.at + (round as usize % 4) * 16 * PAGE;
        if to == pages.at {
            return;
        }
        let (from, len) = (pages.at, 8 * PAGE);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the target lies in the room that is reserved for it; what is left behind there
        // is reserved again.
        unsafe {
            let at = libc::mremap(from as *mut _, len, len, flags, to as *mut libc::c_void);
            let _ = good("mremap", at as i64);
            if (room.at..room.at + 64 * PAGE).contains(&from) {
                let flags = PRIVATE | libc::MAP_FIXED;
                let at = libc::mmap(from as *mut _, len, libc::PROT_NONE, flags, -1, 0);
                let _ = good("mmap", at as i64);
            }
        }
        pages = Pages { at: to, count: 8 };
    })
}

fn file(dir: &Path, name: &str) -> std::fs::File {
    let bytes: Vec<u8> = (0..8 * PAGE).map(|i| mix(i as u64 / 8) as u8).collect();
    let path = dir.join(name);
    let opened = std::fs::write(&path, bytes).and_then(|()| {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
    });
    let Ok(file) = opened else { fail("no file") };
    file
}

fn map_file(file: &std::fs::File, flags: i32) -> Pages {
    // SAFETY: a fresh mapping of a file that has 8 pages.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            8 * PAGE,
            RW,
            flags,
            file.as_raw_fd(),
            0,
        )
    };
    let _ = good("mmap of a file", at as i64);
    Pages {
        at: at as usize,
        count: 8,
    }
}

/// One page of our own over a file, the others the file's.
fn private_file(dir: &Path) -> Check {
    let pages = map_file(&file(dir, "private"), libc::MAP_PRIVATE);
    pages.fill(3, 77);
    let below = *pages.words(4);
    check("private file mapping", move |round| {
        pages.must_hold(3, 77, "a page of our own over a file");
        if *pages.words(4) != below {
            fail("a page of a mapped file changed");
        }
        if round % 32 == 31 {
            pages.fill(5, round);
            pages.advise(5, 1, libc::MADV_DONTNEED);
        }
    })
}

fn shared_file(dir: &Path) -> Check {
    let pages = map_file(&file(dir, "shared"), libc::MAP_SHARED);
    check("shared file mapping", move |round| {
        if round > 0 {
            pages.must_hold(2, round - 1, "a shared mapping");
        }
        pages.fill(2, round);
    })
}

/// The program's own break, which the allocator uses too, grows at times.
fn heap() -> Check {
    let mut blocks: Vec<Vec<u64>> = Vec::new();
    check("heap", move |round| {
        for (n, block) in blocks.iter().enumerate() {
            if block.iter().any(|&w| w != mix(n as u64)) {
                fail("a block of the heap changed");
            }
        }
        if round % 16 == 0 && blocks.len() < 200 {
            blocks.push(vec![mix(blocks.len() as u64); 1500]);
        }
    })
}

/// A gigabyte of which almost nothing exists.
fn sparse() -> Check {
    let pages = Pages::map(262_144, RW, PRIVATE | libc::MAP_NORESERVE);
    pages.fill(100_000, 5);
    check("sparse", move |_| {
        pages.must_hold(100_000, 5, "a sparse mapping")
    })
}

/// Guards in the midst of memory (`MADV_GUARD_INSTALL`), where the kernel has them.
fn guarded() -> Check {
    const GUARD_INSTALL: i32 = 102;
    let pages = Pages::map(8, RW, PRIVATE);
    (0..8).for_each(|p| pages.fill(p, 30));
    // SAFETY: a live mapping of ours; the guarded page is not touched any more, but by a read
    // through the kernel, which must fail.
    let has = unsafe { libc::madvise((pages.at + 3 * PAGE) as *mut _, PAGE, GUARD_INSTALL) } == 0;
    // SAFETY: only numbers are passed.
    let sink = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    // SAFETY: ends has room for two.
    let ends = unsafe {
        let mut ends = [0; 2];
        let _ = good(
            "pipe2",
            libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK).into(),
        );
        ends
    };
    let _ = good("open", sink.into());
    check("guard", move |_| {
        pages.must_hold(2, 30, "beside a guard");
        pages.must_hold(4, 30, "beside a guard");
        // SAFETY: the kernel checks the address; it is to be refused.
        let r = unsafe { libc::write(ends[1], (pages.at + 3 * PAGE) as *const _, 1) };
        if has && r != -1 {
            fail("a guard page can be read");
        }
    })
}

/// A stack that grows, and is shallow again.
fn deep() -> Check {
    fn down(n: u64) -> u64 {
        let room = std::hint::black_box([n; 64]);
        if n == 0 {
            room[0]
        } else {
            down(n - 1) + u64::from(room[63] == n)
        }
    }
    check("stack", |round| {
        let depth = 10 + round * 4 % 600;
        if down(depth) != depth {
            fail("the stack was changed");
        }
    })
}
