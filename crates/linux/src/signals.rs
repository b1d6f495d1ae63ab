//! Signals of this process as a queue that can be polled, with who sent each.
//!
//! While a [`SignalQueue`] lives, the signals it names are blocked in the thread that opened it
//! (and in threads started by it later), so that none of them ends or interrupts the process;
//! they are read from the queue instead. Dropping the queue unblocks them.
//!
//! # Rules
//! - Open the queue before other threads are started: a thread that does not block a signal
//!   takes it in the ordinary way.
//! - Children inherit the mask: a program is started with [`SignalQueue::release_in`], so that it
//!   begins with the mask that was there before the queue.
//!
//! # Safety
//! `sigprocmask(2)` and `signalfd(2)` get pointers to signal sets that live on the stack for the
//! whole call and were initialised by `sigemptyset`; between fork and exec only `sigprocmask` is
//! called, which is async-signal-safe; the descriptor that `signalfd` returns is
//! checked and owned by nobody else.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use rustix::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Size of the kernel's `signalfd_siginfo`, bytes.
const RECORD: usize = 128;

/// `si_code` of a signal that the kernel made itself, such as the terminal's Ctrl-C.
const SI_KERNEL: i32 = 0x80;

/// One received signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The signal's number.
    pub signal: i32,
    /// Whether the kernel sent it (the terminal's keys, a hang-up), which then reached every
    /// process of the foreground group, and not a process by `kill(2)`.
    pub from_kernel: bool,
    /// The process that sent it; 0 where the kernel did.
    pub sender: u32,
}

/// A queue of signals; see the module's text.
#[derive(Debug)]
pub struct SignalQueue {
    fd: OwnedFd,
    before: libc::sigset_t,
}

impl SignalQueue {
    /// Blocks `signals` in the calling thread and opens a queue of them.
    ///
    /// # Errors
    /// `EINVAL` for a number that is no signal; what `signalfd(2)` says otherwise.
    pub fn open(signals: &[i32]) -> Result<Self, Errno> {
        let set = set_of(signals)?;
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both pointers are valid for the call; `set` was initialised by `set_of`.
        if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, before.as_mut_ptr()) } != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the successful call above wrote the old mask.
        let before = unsafe { before.assume_init() };
        // SAFETY: `set` is initialised and lives for the call.
        let raw = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if raw < 0 {
            let error = last_error();
            restore_mask(&before);
            return Err(error);
        }
        // SAFETY: `raw` was checked to be a descriptor and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd, before })
    }

    /// Has the program that `command` will start begin with the mask that was there before this
    /// queue.
    pub fn release_in<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        let before = self.before;
        let release = move || {
            restore_mask(&before);
            Ok(())
        };
        // SAFETY: `release` allocates nothing, takes no lock, and calls only sigprocmask, which
        // may be called between fork and exec.
        unsafe { command.pre_exec(release) }
    }

    /// Takes the next signal from the queue; `None` where it is empty.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn take(&mut self) -> Result<Option<Received>, Errno> {
        let mut record = [0u8; RECORD];
        match rustix::io::read(&self.fd, &mut record) {
            Ok(RECORD) => Ok(Some(parse(&record))),
            Ok(_) | Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Number of the descriptor, for messages.
    #[must_use]
    pub fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

impl AsFd for SignalQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SignalQueue {
    fn drop(&mut self) {
        restore_mask(&self.before);
    }
}

fn set_of(signals: &[i32]) -> Result<libc::sigset_t, Errno> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is valid; sigemptyset initialises the set.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for &signal in signals {
        // SAFETY: `set` is initialised; a bad number is answered with an error.
        if unsafe { libc::sigaddset(&mut set, signal) } != 0 {
            return Err(Errno::INVAL);
        }
    }
    Ok(set)
}

fn restore_mask(mask: &libc::sigset_t) {
    // SAFETY: `mask` is a set that the kernel gave us; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}

/// Fields of `signalfd_siginfo`: ssi_signo at 0, ssi_code at 8, ssi_pid at 12.
fn parse(record: &[u8; RECORD]) -> Received {
    let word = |at: usize| {
        i32::from_ne_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]])
    };
    let from_kernel = word(8) == SI_KERNEL;
    let sender = if from_kernel {
        0
    } else {
        u32::try_from(word(12)).unwrap_or(0)
    };
    Received {
        signal: word(0),
        from_kernel,
        sender,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_sent_to_this_thread_arrives_with_its_sender() {
        let mut queue = SignalQueue::open(&[libc::SIGUSR2]).unwrap();
        assert_eq!(queue.take().unwrap(), None);
        // SAFETY: sends a signal that this thread blocks to this thread.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
        let got = queue.take().unwrap().unwrap();
        assert_eq!(got.signal, libc::SIGUSR2);
        assert!(!got.from_kernel);
        assert_eq!(got.sender, std::process::id());
        assert_eq!(queue.take().unwrap(), None);
    }

    #[test]
    fn a_program_begins_with_the_mask_from_before_the_queue() {
        let queue = SignalQueue::open(&[libc::SIGUSR1]).unwrap();
        let mask = |command: &mut Command| {
            let out = command
                .args(["SigBlk", "/proc/self/status"])
                .output()
                .unwrap();
            let text = String::from_utf8(out.stdout).unwrap();
            let digits = text.trim_start_matches("SigBlk:").trim();
            u64::from_str_radix(digits, 16).unwrap()
        };
        let bit = 1 << (libc::SIGUSR1 - 1);
        assert_ne!(
            mask(&mut Command::new("grep")) & bit,
            0,
            "this is why it is needed"
        );
        assert_eq!(mask(queue.release_in(&mut Command::new("grep"))) & bit, 0);
    }

    #[test]
    fn a_number_that_is_no_signal_is_refused() {
        assert_eq!(SignalQueue::open(&[4096]).unwrap_err(), Errno::INVAL);
    }
}
