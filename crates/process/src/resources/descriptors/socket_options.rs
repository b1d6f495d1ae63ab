//! The options that a program set on a socket.
//!
//! An option is recorded when it differs from that of a new socket of the same kind, so that what
//! the program never touched follows the host it runs on. One list below says which options there
//! are; a further one is one line.

use super::collect::Memory;
use super::inet::tcp_state;
use super::probe::{Probe, SocketFacts};
use crate::ProcessError;
use outlive_linux::sockopt;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `SO_BUF_LOCK`: which buffer sizes were set by the program.
const SO_BUF_LOCK: i32 = 72;
const SEND_LOCKED: u32 = 1;
const RECEIVE_LOCKED: u32 = 2;

/// When an option must be set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    BeforeBind,
    Last,
}

macro_rules! options {
    ($($(#[$doc:meta])* $field:ident: $level:expr, $name:expr, $when:ident;)*) => {
        /// Options of a socket; absent ones are as on a new socket.
        #[derive(StateNode, Debug, Clone, PartialEq, Default)]
        #[state(compatible = "outlive,socket-options-v1")]
        pub struct SocketOptions {
            $($(#[$doc])* pub $field: Option<u32>,)*
            /// Size of the receive buffer, set by the program (`SO_RCVBUF`, as read).
            pub receive_buffer: Option<u32>,
            /// Size of the send buffer, set by the program (`SO_SNDBUF`, as read).
            pub send_buffer: Option<u32>,
            /// The interface that it is bound to (`SO_BINDTODEVICE`).
            pub device: Option<Vec<u8>>,
            /// The congestion control (`TCP_CONGESTION`).
            pub congestion: Option<Vec<u8>>,
            /// `SO_LINGER`, a `struct linger`.
            pub linger: Option<Vec<u8>>,
            /// `SO_RCVTIMEO`, a `struct timeval`.
            pub receive_timeout: Option<Vec<u8>>,
            /// `SO_SNDTIMEO`, a `struct timeval`.
            pub send_timeout: Option<Vec<u8>>,
        }

        impl SocketOptions {
            fn read_numbers(&mut self, socket: BorrowedFd<'_>, sort: Sort) -> Result<(), Errno> {
                $(if matters($level, $name, sort) {
                    self.$field = sockopt::get_u32(socket, $level, $name)?;
                })*
                Ok(())
            }

            fn forget_equal_numbers(&mut self, fresh: &Self) {
                $(if self.$field == fresh.$field { self.$field = None; })*
            }

            fn numbers(&self) -> Vec<(&'static str, i32, i32, When, u32)> {
                let mut list = Vec::new();
                $(if let Some(value) = self.$field {
                    list.push((stringify!($name), $level, $name, When::$when, value));
                })*
                list
            }
        }
    };
}

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET};

options! {
    /// `SO_REUSEADDR`
    reuse_address: SOL_SOCKET, libc::SO_REUSEADDR, Last;
    /// `SO_REUSEPORT`
    reuse_port: SOL_SOCKET, libc::SO_REUSEPORT, BeforeBind;
    /// `SO_KEEPALIVE`
    keep_alive: SOL_SOCKET, libc::SO_KEEPALIVE, Last;
    /// `SO_OOBINLINE`
    urgent_inline: SOL_SOCKET, libc::SO_OOBINLINE, Last;
    /// `SO_PRIORITY`
    priority: SOL_SOCKET, libc::SO_PRIORITY, Last;
    /// `SO_MARK`
    mark: SOL_SOCKET, libc::SO_MARK, BeforeBind;
    /// `SO_DONTROUTE`
    dont_route: SOL_SOCKET, libc::SO_DONTROUTE, Last;
    /// `SO_RCVLOWAT`
    low_water: SOL_SOCKET, libc::SO_RCVLOWAT, Last;
    /// `SO_BUSY_POLL`
    busy_poll: SOL_SOCKET, libc::SO_BUSY_POLL, Last;
    /// `SO_INCOMING_CPU`
    incoming_cpu: SOL_SOCKET, libc::SO_INCOMING_CPU, Last;
    /// `SO_TIMESTAMP`
    timestamp: SOL_SOCKET, libc::SO_TIMESTAMP, Last;
    /// `SO_BROADCAST`
    broadcast: SOL_SOCKET, libc::SO_BROADCAST, Last;
    /// `SO_PEEK_OFF`
    peek_offset: SOL_SOCKET, libc::SO_PEEK_OFF, Last;
    /// `SO_PASSCRED`
    pass_credentials: SOL_SOCKET, libc::SO_PASSCRED, Last;
    /// `SO_PASSSEC`
    pass_security: SOL_SOCKET, libc::SO_PASSSEC, Last;
    /// `SO_ZEROCOPY`
    zero_copy: SOL_SOCKET, libc::SO_ZEROCOPY, Last;
    /// `TCP_NODELAY`
    no_delay: IPPROTO_TCP, libc::TCP_NODELAY, Last;
    /// `TCP_CORK`
    cork: IPPROTO_TCP, libc::TCP_CORK, Last;
    /// `TCP_DEFER_ACCEPT`
    defer_accept: IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, Last;
    /// `TCP_KEEPIDLE`
    keep_idle: IPPROTO_TCP, libc::TCP_KEEPIDLE, Last;
    /// `TCP_KEEPINTVL`
    keep_interval: IPPROTO_TCP, libc::TCP_KEEPINTVL, Last;
    /// `TCP_KEEPCNT`
    keep_count: IPPROTO_TCP, libc::TCP_KEEPCNT, Last;
    /// `TCP_SYNCNT`
    syn_count: IPPROTO_TCP, libc::TCP_SYNCNT, Last;
    /// `TCP_USER_TIMEOUT`
    user_timeout: IPPROTO_TCP, libc::TCP_USER_TIMEOUT, Last;
    /// `TCP_NOTSENT_LOWAT`
    not_sent_low_water: IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, Last;
    /// `TCP_FASTOPEN`
    fast_open: IPPROTO_TCP, libc::TCP_FASTOPEN, Last;
    /// `TCP_LINGER2`
    fin_timeout: IPPROTO_TCP, libc::TCP_LINGER2, Last;
    /// `IP_TOS`
    tos: IPPROTO_IP, libc::IP_TOS, Last;
    /// `IP_TTL`
    ttl: IPPROTO_IP, libc::IP_TTL, Last;
    /// `IP_MTU_DISCOVER`
    mtu_discover: IPPROTO_IP, libc::IP_MTU_DISCOVER, Last;
    /// `IP_MULTICAST_TTL`
    multicast_ttl: IPPROTO_IP, libc::IP_MULTICAST_TTL, Last;
    /// `IP_MULTICAST_LOOP`
    multicast_loop: IPPROTO_IP, libc::IP_MULTICAST_LOOP, Last;
    /// `IP_PKTINFO`
    packet_info: IPPROTO_IP, libc::IP_PKTINFO, Last;
    /// `IP_RECVERR`
    receive_errors: IPPROTO_IP, libc::IP_RECVERR, Last;
    /// `IP_RECVTTL`
    receive_ttl: IPPROTO_IP, libc::IP_RECVTTL, Last;
    /// `IP_RECVTOS`
    receive_tos: IPPROTO_IP, libc::IP_RECVTOS, Last;
    /// `UDP_CORK`
    udp_cork: libc::IPPROTO_UDP, libc::UDP_CORK, Last;
    /// `UDP_SEGMENT`
    udp_segment: libc::IPPROTO_UDP, libc::UDP_SEGMENT, Last;
    /// `UDP_GRO`
    udp_receive_offload: libc::IPPROTO_UDP, libc::UDP_GRO, Last;
    /// `IP_FREEBIND`
    free_bind: IPPROTO_IP, libc::IP_FREEBIND, BeforeBind;
    /// `IP_TRANSPARENT`
    transparent: IPPROTO_IP, libc::IP_TRANSPARENT, BeforeBind;
    /// `IP_BIND_ADDRESS_NO_PORT`
    bind_without_port: IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, BeforeBind;
    /// `IP_MINTTL`
    least_ttl: IPPROTO_IP, libc::IP_MINTTL, Last;
    /// `TCP_SAVE_SYN`
    save_syn: IPPROTO_TCP, libc::TCP_SAVE_SYN, Last;
    /// `IPV6_V6ONLY`
    v6_only: IPPROTO_IPV6, libc::IPV6_V6ONLY, BeforeBind;
    /// `IPV6_TCLASS`
    traffic_class: IPPROTO_IPV6, libc::IPV6_TCLASS, Last;
    /// `IPV6_UNICAST_HOPS`
    hops: IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, Last;
    /// `IPV6_MULTICAST_HOPS`
    multicast_hops: IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, Last;
    /// `IPV6_MULTICAST_LOOP`
    multicast_loop_v6: IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, Last;
    /// `IPV6_RECVPKTINFO`
    packet_info_v6: IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, Last;
    /// `IPV6_RECVERR`
    receive_errors_v6: IPPROTO_IPV6, libc::IPV6_RECVERR, Last;
}

/// What decides which options a socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sort {
    /// `AF_…`
    family: u16,
    /// `SOCK_…`
    kind: u32,
    /// It is an end of a connection, for which options of a connection to be made mean nothing.
    connected: bool,
}

impl Sort {
    fn of(facts: &SocketFacts) -> Self {
        Self {
            family: facts.family.as_raw(),
            kind: facts.kind.as_raw(),
            connected: facts.tcp_state.is_some_and(tcp_state::is_connection),
        }
    }
}

/// Whether an option does anything on such a socket. Only to save time: each that is read costs
/// the program about half a microsecond of every stop.
fn matters(level: i32, name: i32, sort: Sort) -> bool {
    let v6 = sort.family == AddressFamily::INET6.as_raw();
    let inet = v6 || sort.family == AddressFamily::INET.as_raw();
    let stream = sort.kind == SocketType::STREAM.as_raw();
    let once = match level {
        SOL_SOCKET => name == libc::SO_INCOMING_CPU,
        IPPROTO_TCP => matches!(
            name,
            libc::TCP_DEFER_ACCEPT | libc::TCP_SYNCNT | libc::TCP_FASTOPEN
        ),
        _ => false,
    };
    if once && sort.connected {
        return false;
    }
    match (level, name) {
        (SOL_SOCKET, libc::SO_BROADCAST) => inet && !stream,
        (SOL_SOCKET, libc::SO_PASSCRED | libc::SO_PASSSEC) => !inet,
        (IPPROTO_TCP, _) => inet && stream,
        (libc::IPPROTO_UDP, _) => inet && !stream,
        (IPPROTO_IP, name) => {
            let of_datagrams = matches!(
                name,
                libc::IP_MULTICAST_TTL
                    | libc::IP_MULTICAST_LOOP
                    | libc::IP_PKTINFO
                    | libc::IP_RECVTTL
                    | libc::IP_RECVTOS
            );
            inet && !(stream && of_datagrams)
        }
        (IPPROTO_IPV6, name) => {
            let of_datagrams = matches!(
                name,
                libc::IPV6_MULTICAST_HOPS | libc::IPV6_MULTICAST_LOOP | libc::IPV6_RECVPKTINFO
            );
            v6 && !(stream && of_datagrams)
        }
        _ => true,
    }
}

/// Longest name of an interface or a congestion control.
const NAME_ROOM: usize = 16;

impl SocketOptions {
    /// Reads all of them.
    fn read(socket: BorrowedFd<'_>, sort: Sort) -> Result<Self, Errno> {
        let mut options = Self::default();
        options.read_numbers(socket, sort)?;
        let locked = sockopt::get_u32(socket, SOL_SOCKET, SO_BUF_LOCK)?.unwrap_or(0);
        if locked & RECEIVE_LOCKED != 0 {
            options.receive_buffer = sockopt::get_u32(socket, SOL_SOCKET, libc::SO_RCVBUF)?;
        }
        if locked & SEND_LOCKED != 0 {
            options.send_buffer = sockopt::get_u32(socket, SOL_SOCKET, libc::SO_SNDBUF)?;
        }
        let bytes = |level, name, room| sockopt::get(socket, level, name, room);
        let name = |level, name| {
            let found = bytes(level, name, NAME_ROOM)?;
            Ok::<_, Errno>(found.map(|mut text| {
                text.truncate(text.iter().position(|&b| b == 0).unwrap_or(text.len()));
                text
            }))
        };
        options.device = name(SOL_SOCKET, libc::SO_BINDTODEVICE)?.filter(|n| !n.is_empty());
        if matters(IPPROTO_TCP, libc::TCP_CONGESTION, sort) {
            options.congestion = name(IPPROTO_TCP, libc::TCP_CONGESTION)?;
        }
        options.linger = bytes(SOL_SOCKET, libc::SO_LINGER, 8)?;
        options.receive_timeout = bytes(SOL_SOCKET, libc::SO_RCVTIMEO, 16)?;
        options.send_timeout = bytes(SOL_SOCKET, libc::SO_SNDTIMEO, 16)?;
        Ok(options)
    }

    /// Reads them ahead, of a socket.
    pub(crate) fn look_ahead(probe: &Probe<'_>) {
        let _ = probe.socket().map(|facts| {
            let (socket, sort) = (probe.duplicate().ok()?, Sort::of(facts?));
            let options = Self::read(socket, sort).ok()?;
            probe.options.set(options).ok()
        });
    }

    fn forget_equal(&mut self, fresh: &Self) {
        self.forget_equal_numbers(fresh);
        let pairs = [
            (&mut self.congestion, &fresh.congestion),
            (&mut self.linger, &fresh.linger),
            (&mut self.receive_timeout, &fresh.receive_timeout),
            (&mut self.send_timeout, &fresh.send_timeout),
        ];
        for (mine, theirs) in pairs {
            if mine == theirs {
                *mine = None;
            }
        }
    }

    /// Reads what differs from a new socket.
    pub(crate) fn collect(probe: &Probe<'_>, memory: &mut Memory) -> Result<Self, ProcessError> {
        let fail = |errno| probe.failed("read options of", errno);
        let socket = probe.duplicate()?;
        let Some(facts) = probe.socket()? else {
            return Err(fail(Errno::NOTSOCK));
        };
        if sockopt::has_filter(socket).map_err(fail)? {
            return Err(probe.refuse(
                "socket with a packet filter (SO_ATTACH_FILTER)",
                "run the program without the filter",
            ));
        }
        let sort = Sort::of(facts);
        let inet = matches!(facts.family, AddressFamily::INET | AddressFamily::INET6);
        if inet && facts.kind == SocketType::STREAM && protocol_on_top(socket).map_err(fail)? {
            return Err(probe.refuse(
                "TCP socket encrypted by the kernel (TCP_ULP)",
                "have the program encrypt by itself",
            ));
        }
        let mut options = match probe.options.get() {
            Some(options) => options.clone(),
            None => Self::read(socket, sort).map_err(fail)?,
        };
        let fresh = match memory.fresh_sockets.entry(sort) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let socket = fresh_socket(facts.family, facts.kind).map_err(fail)?;
                unknown.insert(Self::read(socket.as_fd(), sort).map_err(fail)?)
            }
        };
        options.forget_equal(fresh);
        Ok(options)
    }

    /// Sets what must be set before the socket gets its address, and the buffer sizes.
    ///
    /// # Errors
    /// The option that could not be set, and why.
    pub(crate) fn apply_before_bind(&self, socket: &OwnedFd) -> Result<(), (&'static str, Errno)> {
        self.apply_numbers(socket, When::BeforeBind)?;
        let fd = socket.as_fd();
        if let Some(device) = &self.device {
            sockopt::set(fd, SOL_SOCKET, libc::SO_BINDTODEVICE, device)
                .map_err(|errno| ("SO_BINDTODEVICE", errno))?;
        }
        let sizes = [
            (
                self.receive_buffer,
                "SO_RCVBUF",
                libc::SO_RCVBUF,
                libc::SO_RCVBUFFORCE,
            ),
            (
                self.send_buffer,
                "SO_SNDBUF",
                libc::SO_SNDBUF,
                libc::SO_SNDBUFFORCE,
            ),
        ];
        for (size, name, plain, force) in sizes {
            // The kernel doubles what it is told.
            if let Some(size) = size.map(|size| size / 2)
                && sockopt::set_u32(fd, SOL_SOCKET, force, size).is_err()
            {
                sockopt::set_u32(fd, SOL_SOCKET, plain, size).map_err(|errno| (name, errno))?;
            }
        }
        Ok(())
    }

    /// Sets the rest, once the socket listens or stays as it is.
    ///
    /// # Errors
    /// The option that could not be set, and why.
    pub(crate) fn apply_last(&self, socket: &OwnedFd) -> Result<(), (&'static str, Errno)> {
        let fd = socket.as_fd();
        if self.reuse_address.is_none() {
            // It was set for the sake of the bind.
            sockopt::set_u32(fd, SOL_SOCKET, libc::SO_REUSEADDR, 0)
                .map_err(|errno| ("SO_REUSEADDR", errno))?;
        }
        self.apply_numbers(socket, When::Last)?;
        let bytes = [
            (
                &self.congestion,
                "TCP_CONGESTION",
                IPPROTO_TCP,
                libc::TCP_CONGESTION,
            ),
            (&self.linger, "SO_LINGER", SOL_SOCKET, libc::SO_LINGER),
            (
                &self.receive_timeout,
                "SO_RCVTIMEO",
                SOL_SOCKET,
                libc::SO_RCVTIMEO,
            ),
            (
                &self.send_timeout,
                "SO_SNDTIMEO",
                SOL_SOCKET,
                libc::SO_SNDTIMEO,
            ),
        ];
        for (value, shown, level, name) in bytes {
            if let Some(value) = value {
                sockopt::set(fd, level, name, value).map_err(|errno| (shown, errno))?;
            }
        }
        Ok(())
    }

    fn apply_numbers(&self, socket: &OwnedFd, when: When) -> Result<(), (&'static str, Errno)> {
        for (shown, level, name, stage, value) in self.numbers() {
            if stage == when {
                sockopt::set_u32(socket.as_fd(), level, name, value)
                    .map_err(|errno| (shown.trim_start_matches("libc::"), errno))?;
            }
        }
        Ok(())
    }
}

/// Whether a TCP socket has a protocol on top, such as kernel TLS (`TCP_ULP`).
fn protocol_on_top(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    let name = sockopt::get(socket, IPPROTO_TCP, libc::TCP_ULP, NAME_ROOM)?;
    Ok(name.is_some_and(|name| name.iter().any(|&b| b != 0)))
}

fn fresh_socket(family: AddressFamily, kind: SocketType) -> Result<OwnedFd, Errno> {
    socket_with(family, kind, SocketFlags::CLOEXEC, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_set_is_recorded_and_it_is_set_again() {
        let make = || fresh_socket(AddressFamily::INET, SocketType::STREAM).unwrap();
        let sort = Sort {
            family: AddressFamily::INET.as_raw(),
            kind: SocketType::STREAM.as_raw(),
            connected: false,
        };
        let read = |socket: &OwnedFd| SocketOptions::read(socket.as_fd(), sort).unwrap();
        let fresh = read(&make());
        let socket = make();
        let set = |level, name, value| {
            sockopt::set_u32(socket.as_fd(), level, name, value).unwrap();
        };
        set(SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        set(SOL_SOCKET, libc::SO_RCVBUF, 65536);
        set(IPPROTO_TCP, libc::TCP_NODELAY, 1);
        set(IPPROTO_TCP, libc::TCP_KEEPIDLE, 77);
        set(IPPROTO_IP, libc::IP_TOS, 0x10);
        let mut options = read(&socket);
        options.forget_equal(&fresh);
        assert_eq!(options.keep_idle, Some(77));
        assert_eq!(options.receive_buffer, Some(131_072));
        assert_eq!((options.send_buffer, options.linger.clone()), (None, None));

        let again = make();
        options.apply_before_bind(&again).unwrap();
        options.apply_last(&again).unwrap();
        let mut after = read(&again);
        after.forget_equal(&fresh);
        assert_eq!(after, options);
    }
}
