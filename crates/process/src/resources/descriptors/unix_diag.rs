//! What the kernel's socket diagnosis tells of unix sockets: the peer, and the backlog.

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, sendto,
    socket_with, sockopt,
};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const AF_UNIX: u8 = 1;
const SHOW_PEER: u32 = 4;
const SHOW_WAITING: u32 = 8;
const SHOW_QUEUES: u32 = 16;
const PEER: u16 = 2;
const WAITING: u16 = 3;
const QUEUES: u16 = 4;
const SHUTDOWN: u16 = 6;
/// In [`UnixFacts::shutdown`]: nothing more is received.
pub(crate) const RECEIVE_SHUT: u8 = 1;
/// In [`UnixFacts::shutdown`]: nothing more is sent.
pub(crate) const SEND_SHUT: u8 = 2;
/// Room for an answer: the kernel adds at most a page to the fixed part.
const ANSWER: usize = 8192;
/// Bytes of the netlink header, and of what follows it before the attributes.
const HEADER: usize = 16;
const MESSAGE: usize = 16;

/// What is known of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct UnixFacts {
    /// Inode of the socket at the other end. None also of an end that is closed, or that was not
    /// accepted yet.
    pub(crate) peer: Option<u64>,
    /// [`RECEIVE_SHUT`], [`SEND_SHUT`].
    pub(crate) shutdown: u8,
    /// Of a listening socket: inodes of those who wait to be accepted.
    pub(crate) waiting: Vec<u64>,
    /// Of a listening socket: how many connections may wait.
    pub(crate) backlog: u32,
}

/// Asks about unix sockets of our network namespace. Opened when first needed.
#[derive(Debug, Default)]
pub struct UnixDiag {
    socket: Option<OwnedFd>,
    /// Answers so far: an instance is used for one collection, during which nothing changes.
    known: HashMap<u64, Option<UnixFacts>>,
}

impl UnixDiag {
    fn socket(&mut self) -> Result<&OwnedFd, Errno> {
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => {
                let socket = socket_with(
                    AddressFamily::NETLINK,
                    SocketType::DGRAM,
                    SocketFlags::CLOEXEC,
                    Some(netlink::SOCK_DIAG),
                )?;
                let patience = Some(Duration::from_secs(1));
                sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, patience)?;
                socket
            }
        };
        Ok(self.socket.insert(socket))
    }

    /// What is known of the socket with this inode; `None` when there is none here.
    pub(crate) fn ask(&mut self, inode: u64) -> Result<Option<UnixFacts>, Errno> {
        if let Some(facts) = self.known.get(&inode) {
            return Ok(facts.clone());
        }
        let Ok(short) = u32::try_from(inode) else {
            return Ok(None);
        };
        // A long list of those who wait may be more than the kernel answers.
        let facts = self
            .ask_for(short, SHOW_PEER | SHOW_QUEUES | SHOW_WAITING)
            .or_else(|_| self.ask_for(short, SHOW_PEER | SHOW_QUEUES))?;
        self.known.insert(inode, facts.clone());
        Ok(facts)
    }

    fn ask_for(&mut self, inode: u32, show: u32) -> Result<Option<UnixFacts>, Errno> {
        let socket = self.socket()?;
        sendto(
            socket,
            &request(inode, show),
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = [0_u8; ANSWER];
        let (length, _) = recv(socket, &mut answer, RecvFlags::empty())?;
        parse(&answer[..length], inode)
    }
}

fn request(inode: u32, show: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    bytes.extend_from_slice(&40_u32.to_ne_bytes());
    bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[AF_UNIX, 0, 0, 0]);
    // All states; the inode; what to show; no cookie.
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    bytes.extend_from_slice(&inode.to_ne_bytes());
    bytes.extend_from_slice(&show.to_ne_bytes());
    bytes.extend_from_slice(&[0xff; 8]);
    bytes
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

fn parse(answer: &[u8], inode: u32) -> Result<Option<UnixFacts>, Errno> {
    let kind = half(answer, 4).ok_or(Errno::PROTO)?;
    if kind == NLMSG_ERROR {
        let errno = word(answer, HEADER).ok_or(Errno::PROTO)? as i32;
        return match Errno::from_raw_os_error(errno.saturating_neg()) {
            Errno::NOENT => Ok(None),
            errno => Err(errno),
        };
    }
    if kind != SOCK_DIAG_BY_FAMILY || word(answer, HEADER + 4) != Some(inode) {
        return Err(Errno::PROTO);
    }
    let mut facts = UnixFacts::default();
    let mut at = HEADER + MESSAGE;
    while let (Some(length), Some(kind)) = (half(answer, at), half(answer, at + 2)) {
        let value = at + 4;
        match kind {
            PEER => facts.peer = word(answer, value).filter(|&n| n != 0).map(u64::from),
            SHUTDOWN => facts.shutdown = answer.get(value).copied().unwrap_or(0),
            WAITING => {
                let words = usize::from(length).saturating_sub(4) / 4;
                let inode = |n| word(answer, value + 4 * n).map(u64::from);
                facts.waiting = (0..words).filter_map(inode).collect();
            }
            QUEUES => facts.backlog = word(answer, value + 4).unwrap_or(0),
            _ => {}
        }
        if length < 4 {
            break;
        }
        at += usize::from(length).next_multiple_of(4);
    }
    Ok(Some(facts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn inode(fd: &impl AsRawFd) -> u64 {
        std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .unwrap()
            .ino()
    }

    #[test]
    fn peers_and_backlogs_are_told() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut diag = UnixDiag::default();
        let facts = diag.ask(inode(&a)).unwrap().unwrap();
        assert_eq!(facts.peer, Some(inode(&b)));
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        rustix::net::listen(&listener, 33).unwrap();
        let waiting = UnixStream::connect(dir.path().join("s")).unwrap();
        let facts = diag.ask(inode(&listener)).unwrap().unwrap();
        let expected = UnixFacts {
            waiting: vec![inode(&waiting)],
            backlog: 33,
            ..UnixFacts::default()
        };
        assert_eq!(facts, expected);
        let gone = inode(&a);
        drop(a);
        let mut diag = UnixDiag::default();
        assert_eq!(diag.ask(gone).unwrap(), None);
        let left = diag.ask(inode(&b)).unwrap().unwrap();
        assert_eq!((left.peer, left.shutdown), (None, RECEIVE_SHUT | SEND_SHUT));
    }

    #[test]
    fn rubbish_is_an_error() {
        assert!(parse(&[], 1).is_err());
        assert!(parse(&[0; 16], 1).is_err());
        let mut endless = vec![0; 36];
        endless[4] = 20;
        endless[20] = 1;
        assert_eq!(parse(&endless, 1), Ok(Some(UnixFacts::default())));
    }
}
