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
