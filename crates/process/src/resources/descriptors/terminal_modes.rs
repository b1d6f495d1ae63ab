//! The modes of a terminal that is re-attached: an editor goes on with a terminal that gives it
//! every key, wherever it is restored.
//!
//! They are set last, and only where the restorer or the program is in the foreground: the modes of
//! a terminal in which somebody else works are left alone. Should the restore fail after that, they
//! become again what they were. Whoever restores brings them back after the program.

use outlive_linux::signals::SignalQueue;
use outlive_linux::terminal::{self, MODES};
use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Reads them, of what may be no terminal any more.
pub(crate) fn read(fd: BorrowedFd<'_>) -> Option<Vec<u8>> {
    terminal::modes(fd).ok().map(|modes| modes.to_vec())
}

/// A terminal that will have other modes.
#[derive(Debug)]
pub(crate) struct Change {
    terminal: OwnedFd,
    wanted: [u8; MODES],
    before: [u8; MODES],
    set: bool,
}

impl Change {
    /// Prepares it; `None` where there is no terminal, or nothing to change.
    pub(crate) fn prepare(fd: BorrowedFd<'_>, wanted: &[u8]) -> Option<Self> {
        let wanted = wanted.try_into().ok()?;
        let before = terminal::modes(fd).ok()?;
        let terminal = rustix::io::fcntl_dupfd_cloexec(fd, 3).ok()?;
        (before != wanted).then_some(Self {
            terminal,
            wanted,
            before,
            set: false,
        })
    }

    /// Sets the modes, if the process group in the foreground is ours or that of `program`.
    pub(crate) fn make(&mut self, program: u32) -> Result<(), Errno> {
        // A terminal that is not our session's has no group that concerns us.
        let Ok(group) = tcgetpgrp(&self.terminal) else {
            return Ok(());
        };
        let theirs = rustix::process::Pid::from_raw(program as i32);
        let theirs = rustix::process::getpgid(theirs).ok();
        if group != getpgrp() && Some(group) != theirs {
            return Ok(());
        }
        self.put(&self.wanted)?;
        self.set = true;
        Ok(())
    }

    /// They stay.
    pub(crate) fn keep(&mut self) {
        self.set = false;
    }

    fn put(&self, modes: &[u8; MODES]) -> Result<(), Errno> {
        // Who is not in the foreground is stopped for setting them, unless the signal is blocked.
        let _blocked = SignalQueue::open(&[libc::SIGTTOU])?;
        terminal::set_modes(self.terminal.as_fd(), modes)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if self.set {
            // Best effort on a path that leads to an error already.
            let _ = self.put(&self.before);
        }
    }
}
