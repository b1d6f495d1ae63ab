//! Named pipes whose reading and writing ends are both in the subject.
//!
//! The contents are saved as those of a pipe; at the restore the file is opened again and filled.
//!
//! # What it refuses
//! A named pipe of which somebody outside may hold the other end, one whose file was deleted, and,
//! at the restore, one in which something waits already.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file::{look_up, refuse_lost};
use super::pipe::save_contents;
use super::probe::{Probe, failed, show};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};

/// A descriptor of a named pipe.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-named-pipe-v1")]
pub struct FifoState {
    /// Its absolute path.
    pub path: Vec<u8>,
    /// The place of its contents in the list of pipes.
    pub pipe: u32,
}

impl Descriptor for FifoState {
    const NAME: &'static str = "named pipe";

    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError> {
        let has_both = around.both_ends(probe) && !probe.has(OFlags::PATH);
        Ok(has_both && probe.file_type()? == FileType::Fifo)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        refuse_lost(probe, cx.memory)?;
        Ok(Self {
            path: probe.link.clone(),
            pipe: save_contents(probe, cx)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let known = (self.pipe as usize) < cx.table.pipes.len();
        if !known || !self.path.starts_with(b"/") || self.path.contains(&0) {
            let what = format!("fd {} is a named pipe without one", about.number);
            return Err(ProcessError::Image(what));
        }
        match look_up(&self.path).ok().filter(is_fifo) {
            Some(held) => {
                cx.hold(about, held);
                Ok(())
            }
            None => Err(cx.refuse(
                about,
                format!("named pipe {} is gone", show(&self.path)),
                "make it again (mkfifo)",
            )),
        }
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let file = cx.take(about)?;
        let pid = cx.pid;
        let contents = cx.pipes.get_mut(self.pipe as usize);
        let open = |flags| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        };
        let make = || {
            // Open for both, nobody is waited for and nothing is lost.
            let both = open(OFlags::RDWR | OFlags::NONBLOCK)?;
            contents.ok_or(Errno::INVAL)?.pour(&both)?;
            let access = OFlags::from_bits_retain(about.flags) & OFlags::ACCMODE;
            let end = open(access | OFlags::NONBLOCK)?;
            let flags = rustix::fs::fcntl_getfl(&end)?;
            rustix::fs::fcntl_setfl(&end, flags - OFlags::NONBLOCK)?;
            Ok(end)
        };
        make().map_err(|errno: Errno| {
            let why = if errno == Errno::EXIST {
                ", in which something waits already"
            } else {
                ""
            };
            let path = show(&self.path);
            failed(pid, format!("open named pipe {path}{why}"), errno)
        })
    }
}

fn is_fifo(fd: &OwnedFd) -> bool {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Fifo)
}
