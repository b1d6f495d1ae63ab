//! Open directories, by path.
//!
//! The position is the file system's own cookie; it is set again as it was, so that a program in
//! the middle of a listing goes on, as far as the directory is still the same.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file::{Seen, look_up, refuse_lost, seek};
use super::probe::{Probe, failed, show};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// An open directory.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-directory-v1")]
pub struct DirectoryState {
    /// Its absolute path.
    pub path: Vec<u8>,
    /// Where the listing goes on, as the file system counts.
    pub position: u64,
}

impl Descriptor for DirectoryState {
    const NAME: &'static str = "directory";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.has_path() && probe.file_type()? == FileType::Directory)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        refuse_lost(probe, cx.memory)?;
        if !probe.has(OFlags::PATH) {
            refuse_watched(probe)?;
        }
        Ok(Self {
            path: probe.link.clone(),
            position: u64::try_from(probe.info.position).unwrap_or(0),
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let path = show(&self.path);
        if !self.path.starts_with(b"/") || self.path.contains(&0) {
            return Err(ProcessError::Image(format!(
                "the path of fd {} is none",
                about.number
            )));
        }
        let held = look_up(&self.path).ok().filter(|fd| {
            Seen::of_fd(fd.as_fd()).is_ok_and(|(_, found)| found == FileType::Directory)
        });
        match held {
            Some(fd) => {
                cx.hold(about, fd);
                Ok(())
            }
            None => {
                let what = format!("directory {path} is gone");
                Err(cx.refuse(about, what, "make the directory again"))
            }
        }
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let held = cx.take(about)?;
        let lost = OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC;
        let flags = (OFlags::from_bits_retain(about.flags) - lost) | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", held.as_raw_fd());
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| {
            failed(
                cx.pid,
                format!("open {} for fd {}", show(&self.path), about.number),
                errno,
            )
        })?;
        seek(cx.pid, about, &fd, self.position, false)?;
        Ok(fd)
    }
}

/// Refuses a directory that is watched by `F_NOTIFY` (fcntl(2)). The kernel does not tell so, but
/// whoever watches becomes the owner of the descriptor, and nothing else gives a directory one.
fn refuse_watched(probe: &Probe<'_>) -> Result<(), ProcessError> {
    let owner = outlive_linux::descriptors::signal_owner(probe.duplicate()?)
        .map_err(|errno| probe.failed("ask for the owner of", errno))?;
    if owner.id == 0 {
        return Ok(());
    }
    Err(probe.refuse(
        format!("directory watched by F_NOTIFY ({})", probe.shown()),
        "have the program use inotify",
    ))
}
