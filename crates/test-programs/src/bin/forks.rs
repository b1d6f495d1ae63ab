//! A parent with much memory, and children that have it from their parent and change a little of
//! it: `forks MEGABYTES CHILDREN FILE`. All look at what they should have until there is such a file,
//! and once more; ends with 7.
//!
//! # Safety
//! One mapping of the length that is said, which nobody unmaps but for the part that nobody looks at
//! again. Children make system calls, and print when something is wrong.
#![allow(unsafe_code)]

use outlive_test_programs::{check, expect, good, mix, say};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PAGE: usize = 4096;
/// Every so many pages one belongs to each of the processes.
const GROUP: usize = 64;
/// The parent's.
const PARENT: usize = GROUP - 1;
/// Pages given back by children.
const GIVEN_BACK: usize = GROUP - 2;

struct Memory {
    at: usize,
    pages: usize,
}

impl Memory {
    fn new(pages: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping at a place of the kernel's choice.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, flags, -1, 0) };
        let _ = good("mmap", at as i64);
        let at = at as usize;
        Self { at, pages }
    }

    fn word(&self, page: usize) -> *mut u64 {
        (self.at + page * PAGE) as *mut u64
    }

    fn put(&self, page: usize, value: u64) {
        // SAFETY: within the mapping; see the heading.
        unsafe { self.word(page).write_volatile(value) };
    }

    fn get(&self, page: usize) -> u64 {
        // SAFETY: within the mapping; see the heading.
        unsafe { self.word(page).read_volatile() }
    }

    fn of(&self, who: usize) -> impl Iterator<Item = usize> + use<> {
        (who..self.pages).step_by(GROUP)
    }

    /// What one process should have: `who` changed its own pages, and the child `who` gave some
    /// back.
    fn look(&self, who: usize) {
        for page in 0..self.pages {
            let expected = match page % GROUP {
                own if own == who => mix(page as u64) ^ who as u64,
                GIVEN_BACK if who != PARENT => 0,
                _ => mix(page as u64),
            };
            let found = self.get(page);
            check(found == expected, || {
                format!("process {who}, page {page}: {found:x}, not {expected:x}")
            });
        }
    }

    fn look_until(&self, who: usize, end: &Path) {
        while !end.exists() {
            self.look(who);
            std::thread::sleep(Duration::from_millis(10));
        }
        self.look(who);
    }
}

fn main() {
    let number = |n: usize| -> usize {
        let word = std::env::args().nth(n);
        word.and_then(|w| w.parse().ok()).unwrap_or(1)
    };
    let (megabytes, children) = (number(1), number(2));
    let end = PathBuf::from(std::env::args_os().nth(3).unwrap_or_default());
    let memory = Memory::new(megabytes << 8);
    for page in 0..memory.pages {
        memory.put(page, mix(page as u64));
    }
    let mut pids = Vec::new();
    for who in 0..children {
        // SAFETY: the child only looks at memory and makes system calls.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            be_child(&memory, who, &end);
        }
        pids.push(good("fork", pid.into()) as i32);
    }
    memory
        .of(PARENT)
        .for_each(|p| memory.put(p, mix(p as u64) ^ PARENT as u64));
    say("ready");
    memory.look_until(PARENT, &end);
    for pid in pids {
        let mut status = 0;
        // SAFETY: status is live.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        expect("waitpid", ended.into(), pid.into());
        expect("the status of a child", status.into(), 0);
    }
    std::process::exit(7);
}

fn be_child(memory: &Memory, who: usize, end: &Path) -> ! {
    memory
        .of(who)
        .for_each(|p| memory.put(p, mix(p as u64) ^ who as u64));
    for page in memory.of(GIVEN_BACK) {
        // SAFETY: one page of the mapping.
        let advised = unsafe { libc::madvise(memory.word(page).cast(), PAGE, libc::MADV_DONTNEED) };
        expect("madvise", advised.into(), 0);
    }
    memory.look_until(who, end);
    // SAFETY: does not return.
    unsafe { libc::_exit(0) }
}
