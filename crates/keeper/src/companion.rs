//! The process that a keeper goes along with: its end, and signals for it.

use crate::KeeperError;
use crate::keep::Ending;
use crate::procfs;
use outlive_linux::signals::{Received, SignalQueue};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid,
};
use rustix::time::Timespec;
use std::time::Duration;

/// A running program that this process accompanies: it learns of its end and passes signals on.
#[derive(Debug)]
pub struct Companion {
    pid: u32,
    child: bool,
    pub(crate) process: OwnedFd,
}

impl Companion {
    /// Accompanies process `pid`, which is our `child` or not.
    ///
    /// # Errors
    /// Where the process is not there.
    pub fn of(pid: u32, child: bool) -> Result<Self, KeeperError> {
        let process = open_process(pid)?;
        Ok(Self {
            pid,
            child,
            process,
        })
    }

    /// Passes signals on until the program ends; takes no epochs.
    ///
    /// # Errors
    /// What the operating system says of waiting.
    pub fn run(self, signals: &mut SignalQueue) -> Result<Ending, KeeperError> {
        loop {
            let mut set = [
                PollFd::new(signals, PollFlags::IN),
                PollFd::new(&self.process, PollFlags::IN),
            ];
            match poll(&mut set, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(KeeperError::io("poll")(error)),
            }
            while let Some(signal) = signals
                .take()
                .map_err(KeeperError::io("read the signal queue"))?
            {
                self.pass_on(signal);
            }
            if let Some(ending) = self.ended()? {
                return Ok(ending);
            }
        }
    }

    fn gone(&self) -> bool {
        self.gone_within(Duration::ZERO)
    }

    pub(crate) fn gone_within(&self, wait: Duration) -> bool {
        let mut set = [PollFd::new(&self.process, PollFlags::IN)];
        matches!(poll(&mut set, Some(&timespec(wait))), Ok(n) if n > 0)
    }

    /// How the program ended, where it did.
    pub(crate) fn ended(&self) -> Result<Option<Ending>, KeeperError> {
        if self.child {
            reap_strays(self.pid);
        }
        if !self.gone() {
            return Ok(None);
        }
        if !self.child {
            return Ok(Some(Ending::Gone));
        }
        let pid = Pid::from_raw(i32::try_from(self.pid).unwrap_or(0));
        match waitpid(pid, WaitOptions::NOHANG) {
            Ok(Some((_, status))) => {
                let byte = |n: i32| u8::try_from(n & 0xff).unwrap_or(u8::MAX);
                let exited = status.exit_status().map(|n| Ending::Exited(byte(n)));
                let killed = status.terminating_signal().map(|n| Ending::Killed(byte(n)));
                Ok(exited.or(killed))
            }
            Ok(None) => Ok(None),
            Err(rustix::io::Errno::CHILD) => Ok(Some(Ending::Gone)),
            Err(error) => Err(KeeperError::io("wait for the program")(error)),
        }
    }

    pub(crate) fn pass_on(&self, received: Received) {
        if received.from_kernel && self.same_group() {
            return;
        }
        if let Some(signal) = Signal::from_named_raw(received.signal) {
            // A program that is just gone is noticed by whoever waits for it.
            let _ = pidfd_send_signal(&self.process, signal);
        }
    }

    fn same_group(&self) -> bool {
        let group = procfs::group(self.pid);
        group.is_some() && group == procfs::group(std::process::id())
    }
}

/// Reaps children of ours that are not the program itself: processes of it whose parents ended, and
/// which have ended too. Only a process that adopted strays on purpose does so: elsewhere a child may
/// be somebody else's, who waits for it.
fn reap_strays(program: u32) {
    if !matches!(rustix::process::child_subreaper(), Ok(Some(_))) {
        return;
    }
    for child in procfs::children() {
        if child != program
            && let Some(pid) = i32::try_from(child).ok().and_then(Pid::from_raw)
        {
            // One that lives is left alone by this.
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

pub(crate) fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    }
}

fn open_process(pid: u32) -> Result<OwnedFd, KeeperError> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let gone = || KeeperError::Other(format!("there is no process {pid}"));
    pidfd_open(raw.ok_or_else(gone)?, PidfdFlags::empty()).map_err(|error| {
        if error == rustix::io::Errno::SRCH {
            gone()
        } else {
            KeeperError::io(format!("open process {pid}"))(error)
        }
    })
}
