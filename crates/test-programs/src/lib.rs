//! What the test programs share: raw system calls, clocks, a loud end, the order to report.
//!
//! The programs are ordinary ones: nothing here knows who stops, kills or restores them. Each
//! prints a line that begins with `ready`, works and checks itself, says what is wrong on standard
//! error and exits with 1 as soon as anything is, and on SIGUSR1 prints what it did and exits
//! with 0 if all of it made progress.
//!
//! # Safety
//! System calls are made with numbers, and with pointers to live values of the type that the call
//! expects; the callers of [`sys`] vouch for that.
#![allow(unsafe_code)]

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Makes a system call as it is: no library restarts it, and errors are the negative numbers that
/// the kernel gives.
///
/// # Safety
/// Arguments that are pointers must point to live memory of the size that the call accesses.
pub unsafe fn sys(number: i64, args: [usize; 6]) -> i64 {
    let result: i64;
    // SAFETY: the caller vouches for the arguments; the kernel changes rcx and r11 only.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

static ENDING: AtomicBool = AtomicBool::new(false);

/// To be called before what threads wait for is taken away from them: nothing fails any more.
pub fn ending() {
    ENDING.store(true, Ordering::SeqCst);
}

/// Says what is wrong and ends the whole program.
pub fn fail(what: &str) -> ! {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
    let line = format!("WRONG: {what}\n");
    // SAFETY: the pointer and the length are those of a live string; _exit does not return.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len());
        libc::_exit(1)
    }
}

/// Fails unless the condition holds.
#[track_caller]
pub fn check(holds: bool, what: impl FnOnce() -> String) {
    if !holds {
        fail(&what());
    }
}

/// Fails unless a call gave what was expected.
pub fn expect(what: &str, got: i64, wanted: i64) {
    if got != wanted {
        fail(&format!("{what} returned {got}, not {wanted}"));
    }
}

/// A result that must not be negative.
#[must_use]
pub fn good(what: &str, got: i64) -> i64 {
    if got < 0 {
        fail(&format!("{what} returned {got}"));
    }
    got
}

/// A clock, nanoseconds.
#[must_use]
pub fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: t is live.
    if unsafe { libc::clock_gettime(clock, &raw mut t) } != 0 {
        fail("clock_gettime failed");
    }
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

/// CLOCK_MONOTONIC, nanoseconds.
#[must_use]
pub fn now() -> i64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds as the kernel takes them.
#[must_use]
pub fn timespec(ns: i64) -> libc::timespec {
    libc::timespec {
        tv_sec: ns / 1_000_000_000,
        tv_nsec: ns % 1_000_000_000,
    }
}

/// The set with these signals in it, in the kernel's form.
#[must_use]
pub fn signals(list: &[i32]) -> u64 {
    list.iter().fold(0, |set, s| set | 1 << (s - 1))
}

/// Blocks these signals in the calling thread, and in those that it makes.
pub fn block(list: &[i32]) {
    let set = signals(list);
    // SAFETY: set is live and 8 bytes long.
    let r = unsafe {
        sys(
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_BLOCK as usize,
                &raw const set as usize,
                0,
                8,
                0,
                0,
            ],
        )
    };
    expect("rt_sigprocmask", r, 0);
}

/// Lets these signals through in the calling thread again.
pub fn unblock(list: &[i32]) {
    let set = signals(list);
    // SAFETY: set is live and 8 bytes long.
    let r = unsafe {
        sys(
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_UNBLOCK as usize,
                &raw const set as usize,
                0,
                8,
                0,
                0,
            ],
        )
    };
    expect("rt_sigprocmask", r, 0);
}

/// Ends the current line on standard output, whatever it is connected to.
pub fn say(line: &str) {
    let mut out = std::io::stdout();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        fail("standard output is gone");
    }
}

/// Waits for SIGUSR1, which must be blocked in all threads. A wait that ends without it fails.
pub fn await_report_order() {
    await_signal(libc::SIGUSR1);
}

/// Waits for SIGUSR1 again and again, for tests in which a tracer is killed: what that one interrupted
/// stays interrupted.
pub fn await_report_order_patiently() {
    let set = signals(&[libc::SIGUSR1]);
    // SAFETY: set is live and 8 bytes long; neither information nor a limit is given.
    let wait = || unsafe {
        sys(
            libc::SYS_rt_sigtimedwait,
            [&raw const set as usize, 0, 0, 8, 0, 0],
        )
    };
    while wait() != i64::from(libc::SIGUSR1) {}
}

/// Waits for a signal, which must be blocked in all threads. A wait that ends without it fails.
pub fn await_signal(signal: i32) {
    let set = signals(&[signal]);
    // SAFETY: set is live and 8 bytes long; neither information nor a limit is given.
    let r = unsafe {
        sys(
            libc::SYS_rt_sigtimedwait,
            [&raw const set as usize, 0, 0, 8, 0, 0],
        )
    };
    expect("waiting for a signal", r, i64::from(signal));
}

/// Pseudo-random numbers (SplitMix64): the same seed gives the same numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }
}

/// Spreads the bits of a number (the last step of SplitMix64).
#[must_use]
pub fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_negative_numbers() {
        // SAFETY: no pointer is passed.
        let r = unsafe { sys(libc::SYS_close, [usize::MAX, 0, 0, 0, 0, 0]) };
        assert_eq!(r, -i64::from(libc::EBADF));
    }

    #[test]
    fn a_seed_gives_the_same_numbers() {
        let (mut a, mut b) = (Random::new(7), Random::new(7));
        let first: Vec<u64> = (0..50).map(|_| a.next_u64()).collect();
        assert!(first.iter().all(|&n| n == b.next_u64()));
        assert!(first.windows(2).all(|w| w[0] != w[1]));
    }

    #[test]
    fn signal_sets_have_the_bit_below_the_number() {
        assert_eq!(signals(&[1, 3]), 0b101);
    }
}
