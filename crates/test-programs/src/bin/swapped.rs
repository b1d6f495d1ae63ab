//! Has its memory, private and shared, in swap most of the time: `swapped FILE`. Says `ready` as soon
//! as there is something, looks after all of it, and ends with 7 as soon as there is such a file.
//!
//! # Safety
//! Two mappings of the length that is said, which nobody unmaps.
#![allow(unsafe_code)]

use outlive_test_programs::{Random, check, expect, good, mix, say};
use std::path::PathBuf;
use std::time::Duration;

const PAGE: usize = 4096;
/// Pages of each mapping.
const PAGES: usize = 2048;
/// Pages that are changed each round.
const CHANGES: usize = 8;

struct Pages {
    at: usize,
    written: Vec<u64>,
}

impl Pages {
    fn new(flags: i32) -> Self {
        let (length, protection) = (PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a fresh mapping at a place of the kernel's choice.
        let at = unsafe {
            let flags = flags | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0)
        };
        let _ = good("mmap", at as i64);
        let mut made = Self {
            at: at as usize,
            written: vec![0; PAGES],
        };
        (0..PAGES).for_each(|page| made.put(page, mix(page as u64)));
        made
    }

    fn word(&self, page: usize) -> *mut u64 {
        (self.at + page * PAGE + 8 * (page % 500)) as *mut u64
    }

    fn put(&mut self, page: usize, value: u64) {
        // SAFETY: within the mapping; see the heading.
        unsafe { self.word(page).write_volatile(value) };
        self.written[page] = value;
    }

    fn look(&self, page: usize) {
        // SAFETY: within the mapping; see the heading.
        let found = unsafe { self.word(page).read_volatile() };
        let expected = self.written[page];
        check(found == expected, || {
            format!("page {page}: {found:x}, not {expected:x}")
        });
    }

    fn page_out(&self) {
        // SAFETY: the whole mapping.
        let done = unsafe { libc::madvise(self.at as *mut _, PAGES * PAGE, libc::MADV_PAGEOUT) };
        expect("madvise", done.into(), 0);
    }
}

/// Kilobytes of ours that are in swap.
fn in_swap() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmSwap:"));
    let words = line.unwrap_or_default().split_whitespace().next();
    words.and_then(|w| w.parse().ok()).unwrap_or(0)
}

fn main() {
    let end = PathBuf::from(std::env::args_os().nth(1).unwrap_or_default());
    let mut all = [Pages::new(libc::MAP_PRIVATE), Pages::new(libc::MAP_SHARED)];
    while in_swap() < (PAGES * PAGE) as u64 / 2048 {
        all.iter().for_each(Pages::page_out);
        std::thread::sleep(Duration::from_millis(1));
    }
    say("ready");
    let mut random = Random::new(9);
    while !end.exists() {
        for pages in &mut all {
            for _ in 0..CHANGES {
                let page = random.below(PAGES as u64) as usize;
                pages.look(page);
                pages.put(page, random.next_u64());
            }
            pages.page_out();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    for pages in &all {
        (0..PAGES).for_each(|page| pages.look(page));
    }
    std::process::exit(7);
}
