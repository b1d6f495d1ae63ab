//! Private memory with a file of zeros below, of which every page is given back, written to and filled
//! again, over and over: `returned`. Ends at SIGUSR1.
//!
//! # Safety
//! One mapping, which nobody unmaps and one thread uses.
#![allow(unsafe_code)]

use outlive_test_programs::{await_report_order, block, check, ending, expect, good, say};
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

const PAGE: usize = 4096;
const PAGES: usize = 64;

fn work() {
    let mut how = OpenOptions::new();
    let file = how.read(true).write(true).create(true).truncate(false);
    let file = file.open("below").unwrap_or_else(|e| panic!("{e}"));
    let long = file.set_len((PAGES * PAGE) as u64);
    check(long.is_ok(), || format!("set_len: {long:?}"));
    let (rw, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    let (nowhere, length) = (std::ptr::null_mut(), PAGES * PAGE);
    // SAFETY: a fresh mapping at a place of the kernel's choice.
    let at = unsafe { libc::mmap(nowhere, length, rw, libc::MAP_PRIVATE, fd, 0) };
    let at = good("mmap", at as i64) as usize;
    for page in (0..PAGES).cycle() {
        let first = (at + page * PAGE) as *mut u64;
        // SAFETY: a page of the mapping, and its first and last word.
        let (advised, last) = unsafe {
            let last = first.byte_add(PAGE - 8);
            let advised = libc::madvise(first.cast(), PAGE, libc::MADV_DONTNEED);
            first.write_volatile(1);
            let found = last.read_volatile();
            last.write_volatile(2);
            (advised, found)
        };
        expect("madvise", advised.into(), 0);
        check(last == 0, || format!("page {page}: {last:x}, not 0"));
    }
}

fn main() {
    block(&[libc::SIGUSR1]);
    let _ = std::thread::spawn(work);
    say("ready");
    await_report_order();
    ending();
    std::process::exit(0);
}
