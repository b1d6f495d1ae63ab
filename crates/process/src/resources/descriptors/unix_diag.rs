//! What the kernel's socket diagnosis tells of unix sockets: the peer, and the backlog.

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, sendto,
    socket_with, sockopt,
};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::time::Duration;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
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
/// Room for a part of a long answer: the kernel makes none longer.
const ANSWERS: usize = 64 * 1024;
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

    /// Asks about all sockets at once, as far as they are these: the kernel looks for a single one
    /// among all that there are. What is not told this way is asked for when it is needed.
    pub(crate) fn ask_all(&mut self, these: &HashSet<u64>) {
        if self.dump(these).is_err() {
            // More of the answer may be on its way.
            self.socket = None;
        }
    }

    fn dump(&mut self, these: &HashSet<u64>) -> Result<(), Errno> {
        let socket = self.socket()?;
        let ask = request(Which::All, SHOW_PEER | SHOW_QUEUES | SHOW_WAITING);
        sendto(
            socket,
            &ask,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = vec![0_u8; ANSWERS];
        loop {
            let (length, whole) = recv(self.socket()?, &mut answer, RecvFlags::TRUNC)?;
            if whole > length {
                return Err(Errno::MSGSIZE);
            }
            if parse_all(&answer[..length], these, &mut self.known)? {
                return Ok(());
            }
        }
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
            &request(Which::One(inode), show),
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = [0_u8; ANSWER];
        let (length, _) = recv(socket, &mut answer, RecvFlags::empty())?;
        parse(&answer[..length], inode)
    }
}

/// Which sockets a request is about.
enum Which {
    One(u32),
    All,
}

fn request(which: Which, show: u32) -> Vec<u8> {
    let (flags, inode) = match which {
        Which::One(inode) => (NLM_F_REQUEST, inode),
        Which::All => (NLM_F_REQUEST | NLM_F_DUMP, 0),
    };
    let mut bytes = Vec::with_capacity(40);
    bytes.extend_from_slice(&40_u32.to_ne_bytes());
    bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[AF_UNIX, 0, 0, 0]);
    // All states; the inode; what to show; no cookie.
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    bytes.extend_from_slice(&inode.to_ne_bytes());
    bytes.extend_from_slice(&show.to_ne_bytes());
    bytes.extend_from_slice(&[0xff; 8]);
    bytes
}

/// Takes note of what a part of a long answer tells of these sockets; whether it was the last part.
fn parse_all(
    answer: &[u8],
    these: &HashSet<u64>,
    known: &mut HashMap<u64, Option<UnixFacts>>,
) -> Result<bool, Errno> {
    let mut rest = answer;
    while !rest.is_empty() {
        let length = word(rest, 0).ok_or(Errno::PROTO)? as usize;
        let message = rest.get(..length).filter(|m| m.len() >= HEADER);
        let message = message.ok_or(Errno::PROTO)?;
        match half(message, 4) {
            Some(NLMSG_DONE) => return Ok(true),
            Some(SOCK_DIAG_BY_FAMILY) => {
                let inode = word(message, HEADER + 4).ok_or(Errno::PROTO)?;
                if these.contains(&inode.into()) {
                    known.insert(inode.into(), parse(message, inode)?);
                }
            }
            _ => return Err(Errno::PROTO),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
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
    fn all_at_once_are_told_as_one_by_one() {
        let pairs: Vec<_> = (0..500).map(|_| UnixStream::pair().unwrap()).collect();
        pairs[7].0.shutdown(std::net::Shutdown::Read).unwrap();
        let both = pairs.iter().flat_map(|(a, b)| [inode(a), inode(b)]);
        let these: HashSet<u64> = both.collect();
        let (mut diag, mut single) = (UnixDiag::default(), UnixDiag::default());
        diag.ask_all(&these);
        assert_eq!(diag.known.len(), these.len());
        assert!(diag.known.keys().all(|inode| these.contains(inode)));
        for &inode in &these {
            assert_eq!(diag.known[&inode], single.ask(inode).unwrap());
        }
    }

    #[test]
    fn rubbish_is_an_error() {
        assert!(parse(&[], 1).is_err());
        assert!(parse(&[0; 16], 1).is_err());
        let mut endless = vec![0; 36];
        endless[4] = 20;
        endless[20] = 1;
        assert_eq!(parse(&endless, 1), Ok(Some(UnixFacts::default())));
        let (these, mut known) = ([1].into(), HashMap::new());
        for bad in [&[0; 3][..], &[0; 16], &[17, 0, 0, 0, 3, 0], &endless] {
            assert!(parse_all(bad, &these, &mut known).is_err());
        }
        assert_eq!(parse_all(&[], &these, &mut known), Ok(false));
    }
}
