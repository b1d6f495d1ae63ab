//! Descriptors of processes (`pidfd_open(2)`).
//!
//! One of a process of the subject, running or waiting to be asked for its exit status, is made
//! once that process is there, and then brought to its holders ([`Late`]); until then another
//! descriptor keeps its place. One of a process that is gone altogether becomes that of a child
//! which ended in the same way.
//!
//! # What differs afterwards
//! The inode numbers are new ones, and two descriptors of one process that is gone altogether are
//! of two.
//!
//! # What it refuses
//! A process that is not of the subject: after a restore its number may be that of another one. A
//! single thread (`PIDFD_THREAD`), unless it is the leading one.

use super::context::{About, Around, CollectContext, Late, RecreateContext};
use super::probe::{Probe, failed};
use super::table::FdTable;
use super::{Description, Descriptor};
use crate::ProcessError;
use crate::target::{Stat, Status};
use outlive_linux::spawn;
use outlive_state_tree::StateNode;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};

/// `PIDFD_THREAD`, as the kernel shows it among the flags.
pub(crate) const THREAD: u32 = libc::O_EXCL as u32;

/// A process that is looked at through a descriptor.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-pidfd-v1")]
pub struct PidfdState {
    /// The process; `None` when it is gone altogether.
    pub process: Option<u32>,
    /// For one that is gone: its exit status as `wait(2)` gives it, where the kernel tells.
    pub status: u32,
}

impl Descriptor for PidfdState {
    const NAME: &'static str = "pidfd";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link == b"anon_inode:[pidfd]" || probe.link.starts_with(b"pidfd:["))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let pid = probe.info.field("Pid").and_then(|t| t.parse::<i32>().ok());
        let gone = |status| Self {
            process: None,
            status,
        };
        if pid == Some(-1) {
            let status = outlive_linux::descriptors::pidfd_exit_status(probe.duplicate()?);
            return Ok(gone(status.unwrap_or(0)));
        }
        let pid = pid.and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        if cx.around.processes.contains(&pid) {
            return Ok(Self {
                process: Some(pid),
                status: 0,
            });
        }
        let shown = match Status::read(pid, pid) {
            Ok(status) if matches!(status.state, b'Z' | b'X') && status.tgid == pid => {
                if cx.around.processes.contains(&status.ppid) {
                    return Ok(Self {
                        process: Some(pid),
                        status: 0,
                    });
                }
                if status.ppid == std::process::id() {
                    // One whose parent has ended: whoever keeps the subject asks, and forgets it.
                    return Ok(gone(Stat::read(pid).map_or(0, |stat| stat.exit_status)));
                }
                format!("process {pid}, which has ended")
            }
            Ok(status) if status.tgid != pid => format!("thread {pid}"),
            Ok(status) => format!("process {pid} ({})", status.name),
            Err(_) => "a process that cannot be seen".into(),
        };
        let what = format!("pidfd of {shown}, which is not of this program");
        Err(probe.refuse(what, "have the program close its pidfds of other programs"))
    }

    fn rename(&mut self, name: &dyn Fn(u32) -> u32) {
        self.process = self.process.map(name);
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let fail = |errno| failed(cx.pid, format!("make pidfd {}", about.number), errno);
        let Some(process) = self.process else {
            let gone = spawn::ended_child(self.status).map_err(fail)?;
            return Ok(gone);
        };
        // It stays where it is: not among the standard streams.
        let place = eventfd(0, EventfdFlags::CLOEXEC).map_err(fail)?;
        let place = rustix::io::fcntl_dupfd_cloexec(place, 3).map_err(fail)?;
        cx.late.push(Late {
            index: about.index,
            place: place.as_raw_fd(),
            process,
            flags: about.flags & (THREAD | libc::O_NONBLOCK as u32),
        });
        Ok(place)
    }
}

/// An image is hostile: what is looked at must be restored. `processes` are those that run and
/// those that have ended.
pub(crate) fn validate(table: &FdTable, processes: &BTreeSet<u32>) -> Result<(), ProcessError> {
    for (about, description) in table.each() {
        let Description::Pidfd(state) = &description.object else {
            continue;
        };
        if state.process.is_some_and(|pid| !processes.contains(&pid)) {
            return Err(ProcessError::Image(format!(
                "pidfd {} is of a process that is not there",
                about.number
            )));
        }
    }
    Ok(())
}
