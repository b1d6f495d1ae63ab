//! Begins other programs all the time, the way in which the C library does it: `spawner FILE [PAGES]`.
//! A child has its parent's memory until it begins its program, and takes its time for that; the
//! parent stands in the kernel meanwhile. Before it writes to so many pages of its parent. Ends with 7 as soon as there is such a file.
//!
//! # Safety
//! The child runs on a stack of its own, makes system calls, adds to one counter, and writes to
//! memory that is there for nothing else, while the calling thread waits for it.
#![allow(unsafe_code)]

use outlive_test_programs::{Random, check, expect, good, say};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static BEGUN: AtomicU64 = AtomicU64::new(0);
/// What a child writes to.
static MEMORY: OnceLock<Vec<AtomicU64>> = OnceLock::new();
const WORDS_OF_A_PAGE: usize = 512;
/// The longest that a child takes, microseconds.
const LONGEST: u64 = 10_000;

extern "C" fn child(takes: *mut libc::c_void) -> libc::c_int {
    let begun = BEGUN.fetch_add(1, Ordering::SeqCst);
    let words = MEMORY.get().into_iter().flatten();
    for word in words.step_by(WORDS_OF_A_PAGE) {
        word.store(begun, Ordering::SeqCst);
    }
    // SAFETY: literals, and arguments that end with a null pointer.
    unsafe {
        libc::usleep(takes as libc::c_uint);
        libc::execl(
            c"/bin/true".as_ptr(),
            c"true".as_ptr(),
            std::ptr::null::<libc::c_char>(),
        );
        libc::_exit(1)
    }
}

fn main() {
    let end = PathBuf::from(std::env::args_os().nth(1).unwrap_or_default());
    let pages: usize = std::env::args()
        .nth(2)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    let words = (0..pages * WORDS_OF_A_PAGE).map(|_| AtomicU64::new(0));
    let _ = MEMORY.set(words.collect());
    let mut random = Random::new(5);
    let mut stack = vec![0u128; 4096];
    say("ready");
    for round in 0.. {
        if end.exists() {
            break;
        }
        let begun = BEGUN.load(Ordering::SeqCst);
        check(begun == round, || {
            format!("{begun} programs begun after {round} rounds")
        });
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let takes = random.below(LONGEST) as *mut libc::c_void;
        let mut status = 0;
        // SAFETY: see the heading; stack and status are live.
        let (pid, ended) = unsafe {
            let top = stack.as_mut_ptr_range().end;
            let pid = libc::clone(child, top.cast(), flags, takes);
            let _ = good("clone", pid.into());
            (pid, libc::waitpid(pid, &raw mut status, 0))
        };
        expect("waitpid", ended.into(), pid.into());
        expect("its exit status", status.into(), 0);
        std::thread::sleep(std::time::Duration::from_micros(random.below(2000)));
    }
    std::process::exit(7);
}
