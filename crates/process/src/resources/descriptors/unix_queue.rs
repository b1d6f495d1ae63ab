//! What waits to be read from a unix socket, read without taking it out.
//!
//! A duplicate peeks, message by message. For that the socket's peek offset, which is the
//! program's too, is moved and put back, so this is done only while the program is stopped.
//!
//! # What it refuses
//! Descriptors on their way (`SCM_RIGHTS`), urgent data, messages behind an error that waits.
//!
//! # What is lost
//! Who sent a message: it comes from the restorer. An empty message at the end of a connection, and
//! one that an earlier epoch has seen already.

use super::probe::{Probe, failed};
use super::unix_fresh::UnixKind;
use crate::ProcessError;
use outlive_linux::sockopt;
use outlive_state_tree::StateNode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

/// Room for what accompanies a message: credentials, a label, some descriptors.
const CONTROL: usize = 512;

/// Messages, or a stream of bytes.
#[derive(StateNode, Debug, Clone, PartialEq, Default)]
#[state(compatible = "outlive,unix-queue-v1")]
pub struct UnixQueue {
    /// All messages one after the other.
    pub data: Vec<u8>,
    /// The length of each; empty for a stream.
    pub lengths: Vec<u32>,
}

/// Why a queue cannot be read.
enum Fault {
    Errno(Errno),
    Refused(&'static str, &'static str),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl UnixQueue {
    /// Reads the queue of a socket, if the program is stopped.
    pub(crate) fn collect(
        probe: &Probe<'_>,
        kind: UnixKind,
        stopped: bool,
    ) -> Result<Self, ProcessError> {
        if !stopped {
            return Ok(Self::default());
        }
        read(probe.duplicate()?, kind).map_err(|fault| match fault {
            Fault::Errno(errno) => probe.failed("read without taking from", errno),
            Fault::Refused(what, remedy) => probe.refuse(what, remedy),
        })
    }

    /// Whether the lengths are those of the data.
    pub(crate) fn validate(&self, kind: UnixKind) -> Result<(), ProcessError> {
        let sum: u64 = self.lengths.iter().map(|&n| u64::from(n)).sum();
        let fits = match kind {
            UnixKind::Stream => self.lengths.is_empty(),
            UnixKind::Seqpacket | UnixKind::Datagram => sum == self.data.len() as u64,
        };
        if fits {
            return Ok(());
        }
        Err(ProcessError::Image(
            "messages of a unix socket have other lengths than their contents".into(),
        ))
    }

    /// Sends everything again, through the other end.
    pub(crate) fn send_through(&self, end: impl AsFd, kind: UnixKind) -> Result<(), Errno> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let end = end.as_fd();
        let mut rest = &self.data[..];
        if kind == UnixKind::Stream {
            while !rest.is_empty() {
                let sent = send(end, rest, flags)?;
                rest = &rest[sent..];
            }
            return Ok(());
        }
        for &length in &self.lengths {
            let (message, more) = rest
                .split_at_checked(length as usize)
                .ok_or(Errno::MSGSIZE)?;
            send(end, message, flags)?;
            rest = more;
        }
        Ok(())
    }

    /// [`UnixQueue::send_through`], with an error that names the descriptor.
    pub(crate) fn restore(
        &self,
        end: impl AsFd,
        kind: UnixKind,
        pid: u32,
        number: u32,
    ) -> Result<(), ProcessError> {
        self.send_through(end, kind).map_err(|errno| {
            failed(
                pid,
                format!("put data back into unix socket {number}"),
                errno,
            )
        })
    }
}

/// Whether an error waits to be told. Asking does not take it out.
pub(crate) fn has_error(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    shows(socket, PollFlags::ERR)
}

fn shows(socket: BorrowedFd<'_>, what: PollFlags) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(&socket, what)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents().contains(what))
}

/// Puts the peek offset back.
pub(crate) struct PeekOffset<'a> {
    socket: BorrowedFd<'a>,
    was: u32,
}

impl<'a> PeekOffset<'a> {
    /// Looks from the start.
    pub(crate) fn at_start(socket: BorrowedFd<'a>) -> Result<Self, Errno> {
        let was = sockopt::get_u32(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        let was = was.ok_or(Errno::OPNOTSUPP)?;
        sockopt::set_u32(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
        Ok(Self { socket, was })
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        // It was this number a moment ago, so it cannot be refused.
        let _ = sockopt::set_u32(self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, self.was);
    }
}

fn read(socket: BorrowedFd<'_>, kind: UnixKind) -> Result<UnixQueue, Fault> {
    let mut queue = UnixQueue::default();
    let waiting = rustix::io::ioctl_fionread(socket)?;
    let connection = kind != UnixKind::Datagram;
    if connection && waiting == 0 {
        return Ok(queue);
    }
    // Looking at messages, unlike at a stream, would take the error out.
    if kind != UnixKind::Stream && has_error(socket)? {
        return Err(Fault::Refused(
            "unix socket with messages behind an error that was not read yet",
            "have the program read from the socket",
        ));
    }
    if shows(socket, PollFlags::PRI)? {
        return Err(Fault::Refused(
            "unix connection with urgent data (MSG_OOB)",
            "have the program read it first",
        ));
    }
    let _offset = PeekOffset::at_start(socket)?;
    while !connection || (queue.data.len() as u64) < waiting {
        let room = match kind {
            UnixKind::Stream => waiting - queue.data.len() as u64,
            _ => match peek(socket, &mut [])? {
                Some(length) => length as u64,
                None => break,
            },
        };
        if room == 0 {
            // Seen once, an empty message is not seen again: there is nothing more to read of it.
            queue.lengths.push(0);
            continue;
        }
        let from = queue.data.len();
        queue.data.resize(from + room as usize, 0);
        let got = peek(socket, &mut queue.data[from..])?
            .unwrap_or(0)
            .min(room as usize);
        queue.data.truncate(from + got);
        if kind != UnixKind::Stream {
            queue.lengths.push(got as u32);
        } else if got == 0 {
            break;
        }
    }
    if connection && queue.data.len() as u64 != waiting {
        return Err(Errno::PROTO.into());
    }
    Ok(queue)
}

/// Looks at what follows the peek offset and moves that by what fits into the buffer. The whole
/// length of a message; `None` when there is nothing.
fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<usize>, Fault> {
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let seen = match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
        Ok(seen) => seen,
        Err(Errno::AGAIN) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let mut descriptors = seen.flags.contains(ReturnFlags::CTRUNC);
    for message in control.drain() {
        descriptors |= matches!(message, RecvAncillaryMessage::ScmRights(_));
    }
    if descriptors {
        return Err(Fault::Refused(
            "descriptors on their way through a unix socket (SCM_RIGHTS)",
            "try again when the program has received them",
        ));
    }
    Ok(Some(seen.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, recv, socketpair};
    use std::os::fd::OwnedFd;

    const KINDS: [UnixKind; 3] = [UnixKind::Stream, UnixKind::Seqpacket, UnixKind::Datagram];

    fn pair(kind: UnixKind) -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, kind.socket_type(), flags, None).unwrap()
    }

    fn look(socket: &OwnedFd, kind: UnixKind) -> UnixQueue {
        match read(socket.as_fd(), kind) {
            Ok(queue) => queue,
            Err(Fault::Errno(errno)) => panic!("{errno}"),
            Err(Fault::Refused(what, _)) => panic!("{what}"),
        }
    }

    #[test]
    fn what_waits_is_seen_again_and_again_and_stays() {
        for kind in KINDS {
            let (a, b) = pair(kind);
            assert_eq!(look(&a, kind), UnixQueue::default());
            let long = vec![7; 50_000];
            for message in [&b"one"[..], &long, b"three"] {
                send(&b, message, SendFlags::empty()).unwrap();
            }
            let queue = look(&a, kind);
            assert_eq!(look(&a, kind), queue);
            assert_eq!(queue.data, [&b"one"[..], &long, b"three"].concat());
            let lengths: &[u32] = if kind == UnixKind::Stream {
                &[]
            } else {
                &[3, 50_000, 5]
            };
            assert_eq!(queue.lengths, lengths);
            queue.validate(kind).unwrap();

            let (c, d) = pair(kind);
            queue.send_through(&d, kind).unwrap();
            assert_eq!(look(&c, kind), queue);
            let mut first = [0; 3];
            assert_eq!(recv(&a, &mut first, RecvFlags::empty()).unwrap(), (3, 3));
            assert_eq!(&first, b"one", "nothing was taken out");
        }
    }

    #[test]
    fn the_peek_offset_of_the_program_is_left_as_it_was() {
        let (a, b) = pair(UnixKind::Stream);
        send(&b, b"abcdef", SendFlags::empty()).unwrap();
        let option = (libc::SOL_SOCKET, libc::SO_PEEK_OFF);
        for offset in [u32::MAX, 2] {
            sockopt::set_u32(a.as_fd(), option.0, option.1, offset).unwrap();
            assert_eq!(look(&a, UnixKind::Stream).data, b"abcdef");
            let now = sockopt::get_u32(a.as_fd(), option.0, option.1).unwrap();
            assert_eq!(now, Some(offset));
        }
    }

    #[test]
    fn an_empty_message_is_a_message() {
        let (a, b) = pair(UnixKind::Datagram);
        for message in [&b"x"[..], b"", b"y"] {
            send(&b, message, SendFlags::empty()).unwrap();
        }
        assert_eq!(look(&a, UnixKind::Datagram).lengths, [1, 0, 1]);
    }

    #[test]
    fn a_waiting_reset_is_not_taken_out() {
        for kind in [UnixKind::Stream, UnixKind::Seqpacket] {
            let (a, b) = pair(kind);
            send(&a, b"never read", SendFlags::empty()).unwrap();
            send(&b, b"last words", SendFlags::empty()).unwrap();
            drop(b);
            assert!(has_error(a.as_fd()).unwrap());
            match read(a.as_fd(), kind) {
                Ok(queue) => assert_eq!(
                    (kind, &queue.data[..]),
                    (UnixKind::Stream, &b"last words"[..])
                ),
                Err(Fault::Refused(what, _)) => assert!(what.contains("behind an error"), "{what}"),
                Err(Fault::Errno(errno)) => panic!("{errno}"),
            }
            assert!(has_error(a.as_fd()).unwrap());
        }
    }

    #[test]
    fn descriptors_on_their_way_and_urgent_data_are_refused() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
        for kind in KINDS {
            let (a, b) = pair(kind);
            let mut space = [MaybeUninit::uninit(); 64];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let mine = [a.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&mine)));
            let data = [std::io::IoSlice::new(b"x")];
            sendmsg(&b, &data, &mut control, SendFlags::empty()).unwrap();
            let fault = read(a.as_fd(), kind).err();
            assert!(matches!(fault, Some(Fault::Refused(what, _)) if what.contains("SCM_RIGHTS")));
        }
        let (a, b) = pair(UnixKind::Stream);
        send(&b, b"plain", SendFlags::empty()).unwrap();
        if send(&b, b"!", SendFlags::OOB).is_ok() {
            let fault = read(a.as_fd(), UnixKind::Stream).err();
            assert!(matches!(fault, Some(Fault::Refused(what, _)) if what.contains("urgent")));
        }
    }
}
