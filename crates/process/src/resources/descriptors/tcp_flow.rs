//! What is under way in a TCP connection of which both ends are at hand.
//!
//! The program stands still, but the kernel goes on delivering what was sent. A byte that was
//! written is in one of two places: the other end has received it, or the end that wrote it still
//! keeps it; or in both, until it is acknowledged.
//!
//! Mostly everything was received, and the only thing to be waited for is an acknowledgement, which
//! the other end is told to send at once. Else sequence numbers tell what the other end lacks; for
//! that, both ends are in repair mode for a moment.

use outlive_linux::tcp::{self, Queue, Repair};
use rustix::io::Errno;
use std::os::fd::BorrowedFd;

/// How often it is looked again because more was delivered meanwhile.
const LOOKS: usize = 8;

/// One end, as seen by the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End<'a> {
    /// The socket.
    pub(crate) socket: BorrowedFd<'a>,
    /// Its state (`TCP_INFO`).
    pub(crate) state: u8,
}

impl End<'_> {
    /// Whether it has ended its stream (`SHUT_WR`): FIN-WAIT-1 and -2, CLOSING, LAST-ACK.
    pub(crate) fn has_shut(self) -> bool {
        matches!(self.state, 4 | 5 | 9 | 11)
    }

    /// Whether it has received the end of the other's stream: CLOSE-WAIT, LAST-ACK, CLOSING.
    pub(crate) fn is_at_end(self) -> bool {
        matches!(self.state, 8 | 9 | 11)
    }
}

/// One direction.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Flow {
    /// What was received and not read.
    pub(crate) received: Vec<u8>,
    /// What was written and not received.
    pub(crate) under_way: Vec<u8>,
}

impl Flow {
    /// Reads what is under way from one end to the other; leaves both as they are.
    ///
    /// # Errors
    /// `EPERM` when something is under way and repair is not permitted; `EMSGSIZE` when the
    /// numbers make no sense.
    pub(crate) fn read(from: End<'_>, to: End<'_>) -> Result<Self, Errno> {
        for asked in [false, true] {
            if tcp::unacknowledged(from.socket)? == 0 {
                return Ok(Self {
                    received: tcp::waiting(to.socket)?,
                    under_way: Vec::new(),
                });
            }
            if !asked {
                tcp::acknowledge(to.socket)?;
            }
        }
        let count = tcp::unacknowledged(from.socket)?;
        let (sender, receiver) = (Repair::begin(from.socket)?, Repair::begin(to.socket)?);
        for _ in 0..LOOKS {
            let before = receiver.sequence(Queue::Received)?;
            let received = tcp::waiting(to.socket)?;
            let written = sender.sequence(Queue::Sent)?;
            let kept = sender.peek_sent(count)?;
            if receiver.sequence(Queue::Received)? == before {
                let end = u32::from(from.has_shut());
                // The end counts as received, too, even where it came after the states were read.
                let lacks = if to.is_at_end() || before == written {
                    0
                } else {
                    written.wrapping_sub(end).wrapping_sub(before) as usize
                };
                let from = kept.len().checked_sub(lacks).ok_or(Errno::MSGSIZE)?;
                return Ok(Self {
                    received,
                    under_way: kept[from..].to_vec(),
                });
            }
        }
        Err(Errno::MSGSIZE)
    }
}
