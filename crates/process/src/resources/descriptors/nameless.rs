//! Files without a name: memory files (`memfd_create`), and files that were deleted while they were
//! open. What they contain is shared memory ([`crate::resources::shared`]), whether they are mapped
//! too or not.
//!
//! # What it refuses
//! What is refused there: those on huge pages, large deleted files, deleted files that have another
//! name left.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file::{self, FileState};
use super::probe::{Probe, failed};
use crate::ProcessError;
use crate::resources::shared::{self, Sort};
use outlive_state_tree::StateNode;
use rustix::fs::{FileType, OFlags};
use std::os::fd::OwnedFd;

/// An open file without a name.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-nameless-v1")]
pub struct NamelessState {
    /// The space of its contents, among the shared memories.
    pub space: u32,
    /// Where the next read or write takes place.
    pub position: u64,
}

fn sort(probe: &Probe<'_>) -> Option<Sort> {
    Sort::of_name(&probe.link).filter(|sort| matches!(sort, Sort::Memfd | Sort::Deleted))
}

impl Descriptor for NamelessState {
    const NAME: &'static str = "file without a name";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(sort(probe).is_some()
            && probe.file_type()? == FileType::RegularFile
            && probe.stat()?.stx_nlink == 0)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let sort = sort(probe).unwrap_or(Sort::Deleted);
        Ok(Self {
            space: cx.shared.space_of_descriptor(probe, sort)?,
            position: u64::try_from(probe.info.position).unwrap_or(0),
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        if cx.request.spaces.contains(&self.space) {
            return Ok(());
        }
        let what = format!("the contents of fd {} are missing", about.number);
        Err(ProcessError::Image(what))
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let memory = cx.memories.get(&self.space).ok_or_else(|| {
            ProcessError::Image(format!("the contents of fd {} are missing", about.number))
        })?;
        // `O_TMPFILE` has done its work.
        let flags = FileState::open_flags(about.flags) - OFlags::TMPFILE;
        let end = shared::reopen(&memory.file, flags).map_err(|errno| {
            failed(
                cx.pid,
                format!("open the file of fd {}", about.number),
                errno,
            )
        })?;
        file::seek(cx.pid, about, &end, self.position, false)?;
        Ok(end)
    }
}
