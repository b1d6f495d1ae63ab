//! Pipes whose ends are all in the subject.
//!
//! The contents are read without taking them out (`tee(2)` through a duplicate of the reading
//! end). A pipe is saved once; its ends refer to it. An end whose other end is closed everywhere
//! is such a pipe too.
//!
//! # What it refuses
//! A pipe to a process outside which is no standard stream, pipes opened for reading and writing at
//! once.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::{StateNode, StateValue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{
    PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice, tee,
};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The largest capacity that a kernel can be told to allow (`F_SETPIPE_SZ`).
const LARGEST: u32 = 1 << 31;

/// A pipe with what is in it.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,pipe-v1")]
pub struct PipeState {
    /// How many bytes it can hold.
    pub capacity: u32,
    /// What was written and not read yet.
    pub data: Vec<u8>,
    /// In packet mode the length of each packet in `data`; otherwise empty.
    pub packets: Vec<u32>,
}

impl PipeState {
    /// Whether the contents fit into the pipe.
    pub(crate) fn validate(&self) -> Result<(), ProcessError> {
        let bad = |what: &str| Err(ProcessError::Image(format!("a pipe {what}")));
        if self.capacity > LARGEST || self.data.len() as u64 > u64::from(self.capacity) {
            return bad("holds more than fits into it");
        }
        let sum: u64 = self.packets.iter().map(|&n| u64::from(n)).sum();
        if !self.packets.is_empty() && sum != self.data.len() as u64 {
            return bad("has packets of other lengths than its contents");
        }
        if self.packets.contains(&0) {
            return bad("has an empty packet");
        }
        Ok(())
    }

    /// Makes it, with its contents.
    pub(crate) fn make(&self, pid: u32) -> Result<PipeEnds, ProcessError> {
        let make = || {
            let mut flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
            if !self.packets.is_empty() {
                flags |= PipeFlags::DIRECT;
            }
            let (read, write) = pipe_with(flags)?;
            if fcntl_getpipe_size(&write)? != self.capacity as usize {
                fcntl_setpipe_size(&write, self.capacity as usize)?;
            }
            let mut rest = &self.data[..];
            let mut packets = self.packets.iter();
            while !rest.is_empty() {
                let length = packets
                    .next()
                    .map_or(rest.len(), |&n| n as usize)
                    .min(rest.len());
                let written = rustix::io::write(&write, &rest[..length])?;
                rest = &rest[written..];
            }
            for end in [&read, &write] {
                let flags = rustix::fs::fcntl_getfl(end)?;
                rustix::fs::fcntl_setfl(end, flags - (OFlags::NONBLOCK | OFlags::DIRECT))?;
            }
            Ok(PipeEnds {
                read,
                write,
                read_taken: false,
                write_taken: false,
                capacity: self.capacity as usize,
                poured: false,
            })
        };
        make().map_err(|errno: Errno| {
            let capacity = self.capacity;
            failed(
                pid,
                format!("make a pipe that holds {capacity} bytes"),
                errno,
            )
        })
    }
}

/// A pipe that was made.
#[derive(Debug)]
pub struct PipeEnds {
    read: OwnedFd,
    write: OwnedFd,
    read_taken: bool,
    write_taken: bool,
    capacity: usize,
    poured: bool,
}

impl PipeEnds {
    /// Gives a named pipe the capacity and the contents of this one, the first time.
    ///
    /// # Errors
    /// `EEXIST` when there is something in it already.
    pub(crate) fn pour(&mut self, target: &OwnedFd) -> Result<(), Errno> {
        if std::mem::replace(&mut self.poured, true) {
            return Ok(());
        }
        if rustix::io::ioctl_fionread(target)? != 0 {
            return Err(Errno::EXIST);
        }
        if fcntl_getpipe_size(target)? != self.capacity {
            fcntl_setpipe_size(target, self.capacity)?;
        }
        while rustix::io::ioctl_fionread(&self.read)? != 0 {
            let flags = SpliceFlags::NONBLOCK;
            splice(&self.read, None, target, None, self.capacity, flags)?;
        }
        Ok(())
    }
}

/// Which end.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipeSide {
    /// For reading.
    Read,
    /// For writing.
    Write,
}

/// One end of a pipe.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-pipe-end-v1")]
pub struct PipeEndState {
    /// The place of the pipe in the list of pipes.
    pub pipe: u32,
    /// Which end of it.
    pub side: PipeSide,
}

/// Whether the other end of a pipe is closed everywhere.
pub(crate) fn is_abandoned(probe: &Probe<'_>) -> Result<bool, ProcessError> {
    let fd = probe.duplicate()?;
    let mut fds = [PollFd::new(&fd, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).map_err(|e| probe.failed("poll", e))?;
    Ok(fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

impl Descriptor for PipeEndState {
    const NAME: &'static str = "pipe";

    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError> {
        if !probe.link.starts_with(b"pipe:[") || probe.access() == OFlags::RDWR.bits() {
            return Ok(false);
        }
        Ok(around.both_ends(probe) || is_abandoned(probe)?)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let side = if probe.access() == OFlags::RDONLY.bits() {
            PipeSide::Read
        } else {
            PipeSide::Write
        };
        let pipe = save_contents(probe, cx)?;
        Ok(Self { pipe, side })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let access = OFlags::from_bits_retain(about.flags) & OFlags::ACCMODE;
        let right = match self.side {
            PipeSide::Read => access == OFlags::RDONLY,
            PipeSide::Write => access == OFlags::WRONLY,
        };
        if right && (self.pipe as usize) < cx.table.pipes.len() {
            return Ok(());
        }
        Err(ProcessError::Image(format!(
            "fd {} is an end of no pipe",
            about.number
        )))
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let missing = || ProcessError::Image(format!("fd {} is an end of no pipe", about.number));
        let pid = cx.pid;
        let ends = cx.pipes.get_mut(self.pipe as usize).ok_or_else(missing)?;
        let (end, taken) = match self.side {
            PipeSide::Read => (&ends.read, &mut ends.read_taken),
            PipeSide::Write => (&ends.write, &mut ends.write_taken),
        };
        let fail = |errno| failed(pid, format!("open the pipe of fd {}", about.number), errno);
        // The first description of an end is the one that came with the pipe; a further one must
        // be opened.
        if !std::mem::replace(taken, true) {
            return rustix::io::fcntl_dupfd_cloexec(end, 3).map_err(fail);
        }
        let path = format!("/proc/self/fd/{}", end.as_raw_fd());
        let access = OFlags::from_bits_retain(about.flags) & OFlags::ACCMODE;
        rustix::fs::open(path, access | OFlags::CLOEXEC, rustix::fs::Mode::empty()).map_err(fail)
    }
}

/// Saves a pipe, or a named pipe, once; its place in the list of pipes.
pub(crate) fn save_contents(
    probe: &Probe<'_>,
    cx: &mut CollectContext<'_>,
) -> Result<u32, ProcessError> {
    let key = (probe.info.mount, probe.info.inode);
    let pipe = match cx.pipe_places.get(&key) {
        Some(&place) => place,
        None => {
            let place = cx.pipes.len() as u32;
            let capacity = capacity(probe)?;
            cx.pipes.push(PipeState {
                capacity,
                data: Vec::new(),
                packets: Vec::new(),
            });
            cx.pipe_places.insert(key, place);
            place
        }
    };
    let state = &mut cx.pipes[pipe as usize];
    if probe.access() != OFlags::WRONLY.bits() && state.data.is_empty() {
        let packets = contents(probe.duplicate()?, state.capacity)
            .map_err(|errno| probe.failed("read without taking from", errno))?;
        state.data = packets.concat();
        if packets.len() > 1 || probe.has(OFlags::DIRECT) {
            state.packets = packets.iter().map(|packet| packet.len() as u32).collect();
        }
    }
    Ok(pipe)
}

fn capacity(probe: &Probe<'_>) -> Result<u32, ProcessError> {
    fcntl_getpipe_size(probe.duplicate()?)
        .map(|size| size as u32)
        .map_err(|errno| probe.failed("get the capacity of", errno))
}

/// What is in a pipe, read by read: one per packet in packet mode, else one.
fn contents(reading_end: BorrowedFd<'_>, capacity: u32) -> Result<Vec<Vec<u8>>, Errno> {
    if rustix::io::ioctl_fionread(reading_end)? == 0 {
        return Ok(Vec::new());
    }
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    if fcntl_getpipe_size(&write)? < capacity as usize {
        fcntl_setpipe_size(&write, capacity as usize)?;
    }
    match tee(
        reading_end,
        &write,
        capacity as usize,
        SpliceFlags::NONBLOCK,
    ) {
        Ok(_) => {}
        Err(Errno::AGAIN) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    }
    drop(write);
    let mut parts = Vec::new();
    let mut buffer = vec![0; capacity as usize];
    loop {
        match rustix::io::read(&read, &mut buffer) {
            Ok(0) => return Ok(parts),
            Ok(n) => parts.push(buffer[..n].to_vec()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_must_fit() {
        let pipe = |capacity, data: &[u8], packets: &[u32]| PipeState {
            capacity,
            data: data.to_vec(),
            packets: packets.to_vec(),
        };
        assert!(pipe(4096, b"abc", &[]).validate().is_ok());
        assert!(pipe(4096, b"abc", &[1, 2]).validate().is_ok());
        for bad in [
            pipe(2, b"abc", &[]),
            pipe(u32::MAX, b"abc", &[]),
            pipe(4096, b"abc", &[1]),
            pipe(4096, b"abc", &[3, 0]),
            pipe(4096, b"abc", &[u32::MAX, u32::MAX]),
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn packets_come_back_as_packets_and_stay_in_the_original() {
        let original = PipeState {
            capacity: 8192,
            data: b"abcde".to_vec(),
            packets: vec![2, 3],
        };
        let ends = original.make(0).unwrap();
        for _ in 0..2 {
            let parts = contents(std::os::fd::AsFd::as_fd(&ends.read), 8192).unwrap();
            assert_eq!(parts, [b"ab".to_vec(), b"cde".to_vec()]);
        }
    }
}
