//! Small memory files (`memfd_create`) that are used as files: with name, contents and seals.
//!
//! # What it refuses
//! Memory files of more than 1 MiB: their contents would have to be pages of the epoch. Those on
//! huge pages, and those that were opened a second time. Who maps one is told so where memory is
//! described.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file::seek;
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::fs::{
    FileType, MemfdFlags, Mode, OFlags, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};

/// The largest that is kept, bytes.
const LARGEST: u64 = 1 << 20;

/// How the link of one begins and ends.
const LINK: (&[u8], &[u8]) = (b"/memfd:", b" (deleted)");

/// The longest name, bytes.
const LONGEST_NAME: usize = 249;

/// A memory file.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-memfd-v1")]
pub struct MemfdState {
    /// Its name, which is for people only.
    pub title: Vec<u8>,
    /// Where the next read or write takes place.
    pub position: u64,
    /// Its permissions.
    pub mode: u32,
    /// Its seals (`F_SEAL_…`).
    pub seals: u32,
    /// Its size, bytes.
    pub size: u64,
    /// Its contents up to the last byte that is not zero.
    pub data: Vec<u8>,
}

fn title<'p>(probe: &'p Probe<'_>) -> Option<&'p [u8]> {
    probe.link.strip_prefix(LINK.0)?.strip_suffix(LINK.1)
}

impl Descriptor for MemfdState {
    const NAME: &'static str = "memfd";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(title(probe).is_some()
            && probe.file_type()? == FileType::RegularFile
            && probe.stat()?.stx_nlink == 0)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let stat = probe.stat()?;
        let size = stat.stx_size;
        let remedy = "run the program without memory files";
        if size > LARGEST {
            let what = format!("memfd of {size} bytes ({})", probe.shown());
            return Err(probe.refuse(what, remedy));
        }
        if probe.has(OFlags::PATH) || u64::from(stat.stx_blksize) > LARGEST {
            return Err(probe.refuse(
                format!("memfd of a special kind ({})", probe.shown()),
                remedy,
            ));
        }
        if !cx.memfds.insert(stat.stx_ino) {
            let what = format!("memfd that was opened again ({})", probe.shown());
            return Err(probe.refuse(what, remedy));
        }
        let seals = fcntl_get_seals(probe.duplicate()?)
            .map_err(|errno| probe.failed("get the seals of", errno))?;
        let mut data = probe
            .reopen(OFlags::RDONLY)
            .and_then(|file| contents(&file, size as usize))
            .map_err(|errno| probe.failed("read", errno))?;
        data.truncate(
            data.iter()
                .rposition(|&b| b != 0)
                .map_or(0, |last| last + 1),
        );
        Ok(Self {
            title: title(probe).unwrap_or_default().to_vec(),
            position: u64::try_from(probe.info.position).unwrap_or(0),
            mode: u32::from(stat.stx_mode) & 0o777,
            seals: seals.bits(),
            size,
            data,
        })
    }

    fn check(&self, about: &About, _: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let fits = self.size <= LARGEST && self.data.len() as u64 <= self.size;
        let named = self.title.len() <= LONGEST_NAME && !self.title.contains(&0);
        if fits && named {
            return Ok(());
        }
        let what = format!("the memfd of fd {} has impossible contents", about.number);
        Err(ProcessError::Image(what))
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let make = || {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = memfd_create(&self.title[..], flags)?;
            ftruncate(&file, self.size)?;
            let mut written = 0;
            while written < self.data.len() {
                written += rustix::io::pwrite(&file, &self.data[written..], written as u64)?;
            }
            fchmod(&file, Mode::from_raw_mode(self.mode & 0o777))?;
            let access = OFlags::from_bits_retain(about.flags) & OFlags::ACCMODE;
            let end = if access == OFlags::RDWR {
                rustix::io::fcntl_dupfd_cloexec(&file, 3)?
            } else {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty())?
            };
            // Through the first descriptor: sealing needs one that may write.
            let seals = SealFlags::from_bits_retain(self.seals);
            if !seals.is_empty() {
                fcntl_add_seals(&file, seals)?;
            }
            Ok(end)
        };
        let fail = |errno: Errno| failed(cx.pid, format!("make memfd {}", about.number), errno);
        let file = make().map_err(fail)?;
        seek(cx.pid, about, &file, self.position, false)?;
        Ok(file)
    }
}

fn contents(file: &OwnedFd, size: usize) -> Result<Vec<u8>, Errno> {
    let mut data = vec![0; size];
    let mut filled = 0;
    while filled < size {
        match rustix::io::pread(file, &mut data[filled..], filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(data)
}
