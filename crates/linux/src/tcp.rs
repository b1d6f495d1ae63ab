//! TCP connections from the inside: queues, sequence numbers, and connections that are made without
//! a handshake (`TCP_REPAIR`).
//!
//! # Rules
//! A connection that somebody uses is put into repair mode for moments only, by a [`Repair`] that
//! ends it, and what it changes of the socket is put back. Nothing is sent on the way out.
//!
//! # Safety
//! One `ioctl` is given a pointer to a live number.
#![allow(unsafe_code)]

use crate::{Errno, last_error, sockopt};
use rustix::net::{RecvFlags, recv};
use std::os::fd::{AsRawFd, BorrowedFd};

const TCP: i32 = libc::IPPROTO_TCP;
const QUICKACK: i32 = 12;
const REPAIR: i32 = 19;
const REPAIR_QUEUE: i32 = 20;
const QUEUE_SEQ: i32 = 21;
const REPAIR_OPTIONS: i32 = 22;
const REPAIR_WINDOW: i32 = 29;
const ON: u32 = 1;
/// Off, without asking the other end for its window.
const OFF_SILENTLY: u32 = u32::MAX;
/// What [`Repair::peek`] reads beyond what it is asked for: the head of the queue may have been
/// acknowledged in part.
const MARGIN: usize = 256 * 1024;
/// Codes of `TCP_REPAIR_OPTIONS`: those of the TCP header.
const SEGMENT: u32 = 2;
const WINDOW_SCALE: u32 = 3;
const SELECTIVE: u32 = 4;
const TIMESTAMPS: u32 = 8;

/// Bytes that were written and not acknowledged by the other end, sent or not; an end of the
/// stream counts as one (`SIOCOUTQ`).
///
/// # Errors
/// What `ioctl(2)` says.
pub fn unacknowledged(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut count: i32 = 0;
    // SAFETY: count is live and of the size that the call writes.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if answer < 0 {
        return Err(last_error());
    }
    usize::try_from(count).map_err(|_| Errno::OVERFLOW)
}

/// Has an acknowledgement that is due sent now. How eagerly the socket acknowledges stays as it is.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn acknowledge(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // An even number other than 0 does the same, and leaves the socket in its leisurely mode.
    let quick = sockopt::get_u32(socket, TCP, QUICKACK)? == Some(1);
    sockopt::set_u32(socket, TCP, QUICKACK, if quick { 1 } else { 2 })
}

/// Everything that waits to be read, left where it is.
///
/// # Errors
/// What `recv(2)` says; `EMSGSIZE` when it is not what the kernel counts, because of urgent data
/// or an offset for looking.
pub fn waiting(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let count = rustix::io::ioctl_fionread(socket)? as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    let data = peek(socket, count)?;
    if data.len() == count {
        Ok(data)
    } else {
        Err(Errno::MSGSIZE)
    }
}

fn peek(socket: BorrowedFd<'_>, room: usize) -> Result<Vec<u8>, Errno> {
    let mut data = vec![0; room];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let length = match recv(socket, &mut data[..], flags) {
        Ok((length, _)) => length,
        Err(Errno::AGAIN) => 0,
        Err(errno) => return Err(errno),
    };
    data.truncate(length);
    Ok(data)
}

/// One of the two queues of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// What was received and not read.
    Received,
    /// What was written and not acknowledged.
    Sent,
}

/// The windows of a connection (`struct tcp_repair_window`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// The sequence number of the segment that told the window for sending.
    pub told_by: u32,
    /// How much may be sent.
    pub send: u32,
    /// How much may be received.
    pub receive: u32,
    /// Up to where it was received when that was told.
    pub told_at: u32,
}

/// A socket in repair mode, until this is dropped.
#[derive(Debug)]
pub struct Repair<'a> {
    socket: BorrowedFd<'a>,
    reuse: u32,
}

impl<'a> Repair<'a> {
    /// Begins it.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn begin(socket: BorrowedFd<'a>) -> Result<Self, Errno> {
        let reuse = sockopt::get_u32(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        sockopt::set_u32(socket, TCP, REPAIR, ON)?;
        Ok(Self {
            socket,
            reuse: reuse.unwrap_or(0),
        })
    }

    fn choose(&self, queue: Queue) -> Result<(), Errno> {
        let queue = match queue {
            Queue::Received => 1,
            Queue::Sent => 2,
        };
        sockopt::set_u32(self.socket, TCP, REPAIR_QUEUE, queue)
    }

    /// The sequence number behind the last byte of a queue.
    ///
    /// # Errors
    /// What `getsockopt(2)` says.
    pub fn sequence(&self, queue: Queue) -> Result<u32, Errno> {
        self.choose(queue)?;
        sockopt::get_u32(self.socket, TCP, QUEUE_SEQ)?.ok_or(Errno::NOPROTOOPT)
    }

    /// Sets it, on a socket that is not connected yet.
    ///
    /// # Errors
    /// What `setsockopt(2)` says.
    pub fn set_sequence(&self, queue: Queue, number: u32) -> Result<(), Errno> {
        self.choose(queue)?;
        sockopt::set_u32(self.socket, TCP, QUEUE_SEQ, number)
    }

    /// What was written and not acknowledged: at least the last `count` bytes of it.
    ///
    /// # Errors
    /// What `recv(2)` says.
    pub fn peek_sent(&self, count: usize) -> Result<Vec<u8>, Errno> {
        self.choose(Queue::Sent)?;
        let room = count.saturating_add(MARGIN);
        let data = peek(self.socket, room)?;
        if data.len() == room {
            return Err(Errno::MSGSIZE);
        }
        Ok(data)
    }

    /// Puts bytes into the queue of what was received.
    ///
    /// # Errors
    /// `ENOMEM` when the receive buffer is too small.
    pub fn receive(&self, data: &[u8]) -> Result<(), Errno> {
        self.choose(Queue::Received)?;
        let mut rest = data;
        while !rest.is_empty() {
            let piece = &rest[..rest.len().min(64 * 1024)];
            let taken = rustix::net::send(self.socket, piece, rustix::net::SendFlags::NOSIGNAL)?;
            if taken == 0 || taken > piece.len() {
                return Err(Errno::IO);
            }
            rest = &rest[taken..];
        }
        Ok(())
    }

    /// What both ends would have agreed upon: the size of segments for sending, the scale of both
    /// windows, selective acknowledgements and timestamps.
    ///
    /// # Errors
    /// What `setsockopt(2)` says.
    pub fn agree(&self, segment: u32, scale: u32) -> Result<(), Errno> {
        let options = [
            [SEGMENT, segment],
            [WINDOW_SCALE, scale | scale << 16],
            [SELECTIVE, 0],
            [TIMESTAMPS, 0],
        ];
        let raw: Vec<u8> = options
            .iter()
            .flatten()
            .flat_map(|n| n.to_ne_bytes())
            .collect();
        sockopt::set(self.socket, TCP, REPAIR_OPTIONS, &raw)
    }

    /// Sets the windows.
    ///
    /// # Errors
    /// `EINVAL` for windows that do not fit the sequence numbers.
    pub fn set_windows(&self, w: Windows) -> Result<(), Errno> {
        // The third is the largest window so far.
        let words = [w.told_by, w.send, w.send, w.receive, w.told_at];
        let raw: Vec<u8> = words.iter().flat_map(|n| n.to_ne_bytes()).collect();
        sockopt::set(self.socket, TCP, REPAIR_WINDOW, &raw)
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        end_repair(self.socket, self.reuse);
    }
}

/// Ends a repair that was begun by somebody who died.
pub fn end_repair_of_the_dead(socket: BorrowedFd<'_>) {
    if sockopt::get_u32(socket, TCP, REPAIR) == Ok(Some(ON)) {
        end_repair(socket, 1);
    }
}

fn end_repair(socket: BorrowedFd<'_>, reuse: u32) {
    // Neither can fail on a socket that could be put into repair mode.
    let _ = sockopt::set_u32(socket, TCP, REPAIR, OFF_SILENTLY);
    let _ = sockopt::set_u32(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse);
}
