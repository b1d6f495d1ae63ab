//! One mapping of a tebibyte, of which few pages are used: `vast`. They are written again and again,
//! and looked at. Ends at SIGUSR1, after one more look.
//!
//! # Safety
//! One mapping of the length that is said, which nobody unmaps.
#![allow(unsafe_code)]

use outlive_test_programs::{await_report_order, block, check, ending, good, mix, say};
use std::sync::atomic::{AtomicBool, Ordering};

const LENGTH: usize = 1 << 40;
/// Pages that are used: they lie far apart, but for every eighth, which has its fellows behind it.
const PAGES: usize = 64;
const APART: usize = LENGTH / PAGES;

static END: AtomicBool = AtomicBool::new(false);

fn word(at: usize, page: usize) -> *mut u64 {
    (at + page / 8 * 8 * APART + page % 8 * 4096) as *mut u64
}

fn use_it(at: usize) {
    for round in 0u64.. {
        for page in 0..PAGES {
            let value = |round: u64| mix(page as u64) ^ round;
            // SAFETY: within the mapping, see the heading.
            let found = unsafe { word(at, page).read_volatile() };
            let expected = if round == 0 { 0 } else { value(round - 1) };
            check(found == expected, || {
                format!("page {page}: {found:x}, not {expected:x}")
            });
            // SAFETY: the same.
            unsafe { word(at, page).write_volatile(value(round)) };
        }
        if END.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn main() {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at a place of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), LENGTH, protection, flags, -1, 0) };
    let at = good("mmap", at as i64) as usize;
    block(&[libc::SIGUSR1]);
    let worker = std::thread::spawn(move || use_it(at));
    say("ready");
    await_report_order();
    ending();
    END.store(true, Ordering::Relaxed);
    if worker.join().is_err() {
        std::process::exit(1);
    }
}
