//! A parent whose children write to all of their memory at SIGUSR1: `brood CHILDREN`. Child 2 says
//! `2:5` when it has done so five times.
//!
//! # Safety
//! One mapping in each child, which nobody unmaps.
#![allow(unsafe_code)]

use outlive_test_programs::{await_report_order, await_signal, block, good, say};

const LENGTH: usize = 2 << 20;

fn be_child(who: usize) -> ! {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping at a place of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), LENGTH, protection, flags, -1, 0) };
    let _ = good("mmap", at as i64);
    for times in 0u64.. {
        // SAFETY: all of it lies in the mapping.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), times as u8 + 1, LENGTH) };
        say(&format!("{who}:{times}"));
        await_signal(libc::SIGUSR1);
    }
    unreachable!("it is ended before")
}

fn main() {
    let children = std::env::args().nth(1).and_then(|w| w.parse().ok());
    block(&[libc::SIGUSR1]);
    for who in 0..children.unwrap_or(1) {
        // SAFETY: there is no other thread.
        if good("fork", unsafe { libc::fork() }.into()) == 0 {
            be_child(who);
        }
    }
    say("ready");
    await_report_order();
}
