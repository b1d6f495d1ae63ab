//! A program that has another process in its address space, and at SIGUSR2 begins itself anew with
//! other contents at the same addresses, which are not chosen at random: `successor`. At SIGUSR1 it writes to all of its memory.
//!
//! # Safety
//! One mapping at an address of its own, which nobody unmaps. The child runs on a stack that is never
//! given back, and makes one system call again and again.
#![allow(unsafe_code)]

use outlive_test_programs::{await_signal, block, fail, good, say};
use std::ffi::CStr;

/// Where nothing else lies.
const AT: usize = 0x1234_0000_0000;
const LENGTH: usize = 4 << 20;

fn map() {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a place where nothing lies, or the call fails.
    let at = unsafe { libc::mmap(AT as *mut _, LENGTH, protection, flags, -1, 0) };
    let _ = good("mmap", at as i64);
}

fn fill(with: u8) {
    // SAFETY: all of it lies in the mapping.
    unsafe { std::ptr::write_bytes(AT as *mut u8, with, LENGTH) };
}

extern "C" fn child(_: *mut libc::c_void) -> libc::c_int {
    loop {
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
    }
}

/// Begins this program anew.
fn begin(how: &CStr) -> ! {
    let arguments = [c"successor".as_ptr(), how.as_ptr(), std::ptr::null()];
    // SAFETY: strings that end with a zero, and a list that ends with a null pointer.
    unsafe { libc::execv(c"/proc/self/exe".as_ptr(), arguments.as_ptr()) };
    fail("execv returned");
}

fn main() {
    let how = std::env::args().nth(1);
    if how.is_none() {
        // SAFETY: takes a number.
        let before = unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
        let _ = good("personality", before.into());
        begin(c"first");
    }
    map();
    if how.as_deref() == Some("again") {
        fill(9);
        say("succeeded");
        child(std::ptr::null_mut());
    }
    fill(1);
    block(&[libc::SIGUSR1, libc::SIGUSR2]);
    let stack = Box::leak(vec![0u128; 4096].into_boxed_slice());
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: see the heading.
    let pid = unsafe { libc::clone(child, top.cast(), flags, std::ptr::null_mut()) };
    let _ = good("clone", pid.into());
    say("ready");
    await_signal(libc::SIGUSR1);
    fill(2);
    say("written");
    await_signal(libc::SIGUSR2);
    begin(c"again");
}
