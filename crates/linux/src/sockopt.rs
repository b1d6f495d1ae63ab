//! Socket options by number, for copying the ones a program set onto another socket.
//!
//! # Rules
//! - "The protocol has no such option" (`ENOPROTOOPT`, `EOPNOTSUPP`) is `None`, not an error.
//! - `TCP_ZEROCOPY_RECEIVE` is refused: it is the one option whose reading maps memory.
//!
//! # Safety
//! Every buffer is a live slice whose length is told to the kernel.
#![allow(unsafe_code)]

use crate::{Errno, last_error};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const SIOCUNIXFILE: libc::Ioctl = 0x89e0;
const TCP_ZEROCOPY_RECEIVE: i32 = 35;

/// Reads an option of at most `room` bytes; `None` where the socket knows no such option.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn get(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    room: usize,
) -> Result<Option<Vec<u8>>, Errno> {
    if level == libc::IPPROTO_TCP && name == TCP_ZEROCOPY_RECEIVE {
        return Err(Errno::INVAL);
    }
    let mut bytes = vec![0; room];
    let mut len = room as libc::socklen_t;
    // SAFETY: bytes is exclusively borrowed and len is its length; the kernel writes no more.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            bytes.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if answer == 0 {
        bytes.truncate(len as usize);
        return Ok(Some(bytes));
    }
    match last_error() {
        Errno::NOPROTOOPT | Errno::OPNOTSUPP => Ok(None),
        error => Err(error),
    }
}

/// Reads an option that is a number.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn get_u32(socket: BorrowedFd<'_>, level: i32, name: i32) -> Result<Option<u32>, Errno> {
    if level == libc::IPPROTO_TCP && name == TCP_ZEROCOPY_RECEIVE {
        return Err(Errno::INVAL);
    }
    let mut value: u32 = 0;
    let mut len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: value is a live local and len is its size; the kernel writes no more.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if answer == 0 {
        return Ok(Some(value));
    }
    match last_error() {
        Errno::NOPROTOOPT | Errno::OPNOTSUPP => Ok(None),
        error => Err(error),
    }
}

/// Sets an option.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn set(socket: BorrowedFd<'_>, level: i32, name: i32, bytes: &[u8]) -> Result<(), Errno> {
    let len = libc::socklen_t::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    // SAFETY: bytes is a live slice of len bytes, which the kernel only reads.
    let answer =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, bytes.as_ptr().cast(), len) };
    if answer == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}

/// Sets an option that is a number.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn set_u32(socket: BorrowedFd<'_>, level: i32, name: i32, value: u32) -> Result<(), Errno> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// Whether a socket has a packet filter (`SO_GET_FILTER`), classic or eBPF.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn has_filter(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    const SO_GET_FILTER: i32 = 26;
    let mut len: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel tells how many instructions there are, and writes none.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut len,
        )
    };
    match answer {
        0 => Ok(len != 0),
        _ => match last_error() {
            // An eBPF program cannot be read like this.
            Errno::ACCESS => Ok(true),
            Errno::NOPROTOOPT | Errno::OPNOTSUPP => Ok(false),
            error => Err(error),
        },
    }
}

/// Bytes that wait in a socket to be sent (`SO_MEMINFO`), with what the kernel needs to keep them.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn unsent(socket: BorrowedFd<'_>) -> Result<u32, Errno> {
    memory(socket, 2)
}

/// Bytes that wait in a socket to be read (`SO_MEMINFO`), with what the kernel needs to keep them: more
/// than none for an empty datagram, too.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn unread(socket: BorrowedFd<'_>) -> Result<u32, Errno> {
    memory(socket, 0)
}

fn memory(socket: BorrowedFd<'_>, which: usize) -> Result<u32, Errno> {
    const SO_MEMINFO: i32 = 55;
    let words = get(socket, libc::SOL_SOCKET, SO_MEMINFO, 36)?.unwrap_or_default();
    let (words, _) = words.as_chunks::<4>();
    Ok(words.get(which).map_or(0, |w| u32::from_ne_bytes(*w)))
}

/// How a socket belongs to a multicast group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It does not.
    None,
    /// Everything that is sent to the group is received.
    Whole,
    /// By a list of senders.
    Filtered,
}

/// `struct group_filter` up to its list of senders, bytes.
const GROUP_FILTER: usize = 144;
/// `struct sockaddr_storage`, bytes.
const STORAGE: usize = 128;

fn group_request(interface: u32, group: std::net::IpAddr) -> [u8; 8 + STORAGE] {
    let mut request = [0; 8 + STORAGE];
    request[..4].copy_from_slice(&interface.to_ne_bytes());
    let mut put =
        |at: usize, bytes: &[u8]| request[8 + at..8 + at + bytes.len()].copy_from_slice(bytes);
    match group {
        std::net::IpAddr::V4(group) => {
            put(0, &(libc::AF_INET as u16).to_ne_bytes());
            put(4, &group.octets());
        }
        std::net::IpAddr::V6(group) => {
            put(0, &(libc::AF_INET6 as u16).to_ne_bytes());
            put(8, &group.octets());
        }
    }
    request
}

fn level_of(group: std::net::IpAddr) -> i32 {
    if group.is_ipv4() {
        libc::IPPROTO_IP
    } else {
        libc::IPPROTO_IPV6
    }
}

/// Whether a socket is in a multicast group on the interface with this number
/// (`MCAST_MSFILTER`, ip(7)).
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn membership(
    socket: BorrowedFd<'_>,
    interface: u32,
    group: std::net::IpAddr,
) -> Result<Membership, Errno> {
    const MCAST_MSFILTER: i32 = 48;
    const EXCLUDE: u32 = 0;
    let mut filter = [0u8; GROUP_FILTER];
    filter[..8 + STORAGE].copy_from_slice(&group_request(interface, group));
    let mut len = GROUP_FILTER as libc::socklen_t;
    // SAFETY: filter is a live array of len bytes, and asks for no senders; the kernel writes no
    // more than that.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level_of(group),
            MCAST_MSFILTER,
            filter.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if answer != 0 {
        return match last_error() {
            Errno::ADDRNOTAVAIL
            | Errno::NODEV
            | Errno::NOPROTOOPT
            | Errno::OPNOTSUPP
            | Errno::INVAL => Ok(Membership::None),
            error => Err(error),
        };
    }
    let word = |at: usize| {
        u32::from_ne_bytes([filter[at], filter[at + 1], filter[at + 2], filter[at + 3]])
    };
    let (mode, senders) = (word(8 + STORAGE), word(12 + STORAGE));
    Ok(if mode == EXCLUDE && senders == 0 {
        Membership::Whole
    } else {
        Membership::Filtered
    })
}

/// Joins a multicast group on the interface with this number (`MCAST_JOIN_GROUP`, ip(7)).
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn join(socket: BorrowedFd<'_>, interface: u32, group: std::net::IpAddr) -> Result<(), Errno> {
    const MCAST_JOIN_GROUP: i32 = 42;
    set(
        socket,
        level_of(group),
        MCAST_JOIN_GROUP,
        &group_request(interface, group),
    )
}

/// What a TCP socket tells of itself (`TCP_INFO`), as far as it is needed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// The state: 1 established, 7 closed, 10 listening.
    pub state: u8,
    /// When listening: connections waiting to be accepted.
    pub waiting: u32,
    /// When listening: how many may wait (the backlog).
    pub backlog: u32,
    /// The largest segment that the other end may send, bytes.
    pub advertised: u32,
}

/// Reads `TCP_INFO`; `None` where this is no TCP socket.
///
/// # Errors
/// What `getsockopt(2)` says.
pub fn tcp_info(socket: BorrowedFd<'_>) -> Result<Option<TcpInfo>, Errno> {
    // struct tcp_info: eight bytes (the state is the first), then u32s: rto, ato, snd_mss,
    // rcv_mss, unacked, sacked, lost, retrans, fackets, four times, pmtu, rcv_ssthresh, rtt, rttvar,
    // snd_ssthresh, snd_cwnd, advmss.
    let Some(bytes) = get(socket, libc::IPPROTO_TCP, libc::TCP_INFO, 88)? else {
        return Ok(None);
    };
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    Ok(Some(TcpInfo {
        state: bytes.first().copied().unwrap_or(0),
        waiting: word(24),
        backlog: word(28),
        advertised: word(84),
    }))
}

/// The socket file that a unix socket is bound to, as an `O_PATH` descriptor.
///
/// # Errors
/// `ENOENT` when it is bound to none, `EPERM` without `CAP_NET_ADMIN`.
pub fn unix_file(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: SIOCUNIXFILE takes no argument.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) };
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: fd was just made by the kernel for us and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_listener_tells_its_state_and_backlog() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 77).unwrap();
        let info = tcp_info(listener.as_fd()).unwrap().unwrap();
        assert_eq!((info.state, info.waiting, info.backlog), (10, 0, 77));
    }

    #[test]
    fn options_that_a_protocol_lacks_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let unix = UnixListener::bind(&path).unwrap();
        assert_eq!(
            get_u32(unix.as_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY),
            Ok(None)
        );
        assert_eq!(tcp_info(unix.as_fd()), Ok(None));
    }

    #[test]
    fn an_option_that_is_set_is_read_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (level, name) = (libc::SOL_SOCKET, libc::SO_PRIORITY);
        set_u32(listener.as_fd(), level, name, 5).unwrap();
        assert_eq!(get_u32(listener.as_fd(), level, name), Ok(Some(5)));
    }
}
