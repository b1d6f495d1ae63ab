//! The terminal of a restored program.
//!
//! A program with a process group of its own (a shell with job control) may read from its terminal
//! only while its group is the one in the foreground. At a restore that is ours; so where we have
//! the terminal, it is lent to the program, and taken back when that has ended.
//!
//! # Rules
//! - Only a terminal whose foreground is ours is lent; a program restored by a background job
//!   stays in the background.
//! - Where a program is ended from outside, the modes of the terminal become again what they were
//!   before it.
//! - After a restore the program is told that its window changed (`SIGWINCH`, which nobody heeds
//!   who does not draw): it draws itself on a screen that shows something else.

use outlive_keeper::keep::Ending;
use outlive_keeper::procfs;
use outlive_linux::signals::SignalQueue;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr, tcsetpgrp};
use std::os::fd::OwnedFd;

/// The controlling terminal while a program has it.
pub struct Lent {
    terminal: OwnedFd,
}

impl Lent {
    /// Gives the terminal to a program with a group of its own; `None` where there is nothing to
    /// give, or no need to.
    pub fn to(pid: u32) -> Option<Self> {
        let group = group_of(pid)?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open("/dev/tty", flags, Mode::empty()).ok()?;
        let ours = group_of(std::process::id())?;
        if group == ours || tcgetpgrp(&terminal).ok()? != ours {
            return None;
        }
        tcsetpgrp(&terminal, group).ok()?;
        Some(Self { terminal })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Who is not in the foreground is stopped for taking it, unless the signal is blocked.
        let Ok(_blocked) = SignalQueue::open(&[Signal::TTOU.as_raw()]) else {
            return;
        };
        if let Some(ours) = group_of(std::process::id()) {
            // The terminal may be gone, which is no harm.
            let _ = tcsetpgrp(&self.terminal, ours);
        }
    }
}

/// The process group of a process; `None` also where it is of an outer PID namespace.
fn group_of(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(procfs::group(pid)?).ok()?)
}

/// The modes of the terminal on standard input before a program had it.
pub struct Modes {
    terminal: OwnedFd,
    before: Termios,
}

impl Modes {
    /// Notes them; `None` where standard input is no terminal.
    pub fn note() -> Option<Self> {
        let before = tcgetattr(rustix::stdio::stdin()).ok()?;
        let terminal = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).ok()?;
        Some(Self { terminal, before })
    }

    /// Brings them back after a program that was ended and could not do so itself. One that ended
    /// of itself leaves them as it wanted them.
    pub fn after(self, ending: &Ending) {
        if !matches!(ending, Ending::Killed(_) | Ending::Planned(_)) {
            return;
        }
        // Who is not in the foreground is stopped for setting them, unless the signal is blocked.
        let Ok(_blocked) = SignalQueue::open(&[Signal::TTOU.as_raw()]) else {
            return;
        };
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

/// Has a program draw itself again, where it was restored on a terminal.
pub fn redraw(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    if let (Some(pid), true) = (pid, rustix::termios::isatty(rustix::stdio::stdin())) {
        let _ = rustix::process::kill_process(pid, Signal::WINCH);
    }
}
