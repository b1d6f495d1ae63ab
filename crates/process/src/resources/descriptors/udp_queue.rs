//! Datagrams that wait in a UDP socket, read without taking them out, and delivered again.
//!
//! # Rules
//! - They are read while the program is stopped, as those of unix sockets are ([`super::unix_queue`]).
//! - They are delivered by the kernel, over the loopback, as packets that name their old senders
//!   (raw sockets, which needs `CAP_NET_RAW`). One that does not arrive is lost, as datagrams may be,
//!   with those behind it; a notice says so.
//! - Where others may have the port too, the socket is connected to the sender meanwhile: then the
//!   packet is for no other.
//!
//! # What it refuses
//! Datagrams behind an error that waits (looking would take that out), those that the kernel has put
//! together (`UDP_GRO`), those of a socket that is bound to a multicast or broadcast address.
//!
//! # What is lost
//! What accompanies them: interface, time of arrival, time to live are those of the restore. An empty
//! one that an earlier epoch has seen already.

use super::inet::InetAddress;
use super::probe::Probe;
use super::unix_queue::{PeekOffset, has_error};
use crate::ProcessError;
use outlive_linux::sockopt;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendFlags, SocketFlags, SocketType, connect,
    connect_unspec, getsockname, ipproto, recvmsg, sendto, socket_with,
};
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The longest datagram, bytes.
const LONGEST: usize = 65535;
/// `IPPROTO_UDP`
const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const UDP_GRO: i32 = 104;

/// How long a datagram may take over the loopback.
const PATIENCE: Duration = Duration::from_millis(500);

/// A datagram.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,udp-datagram-v1")]
pub struct Datagram {
    /// Who sent it.
    #[state(child)]
    pub sender: InetAddress,
    /// What it says.
    pub data: Vec<u8>,
}

impl Datagram {
    /// An image is hostile.
    pub(crate) fn validate(&self) -> Result<(), ProcessError> {
        self.sender.socket_address()?;
        if self.data.len() > LONGEST - UDP_HEADER {
            return Err(ProcessError::Image(
                "a datagram is longer than any can be".into(),
            ));
        }
        Ok(())
    }
}

/// Reads what waits in a socket that is bound to `local`, if the program is stopped.
pub(crate) fn collect(
    probe: &Probe<'_>,
    local: Option<&InetAddress>,
    stopped: bool,
) -> Result<Vec<Datagram>, ProcessError> {
    let socket = probe.duplicate()?;
    let failed = |errno| probe.failed("read without taking from", errno);
    if !stopped || sockopt::unread(socket).map_err(failed)? == 0 {
        return Ok(Vec::new());
    }
    let gathers = sockopt::get_u32(socket, UDP.into(), UDP_GRO).map_err(failed)?;
    let unicast = local.map(InetAddress::socket_address).transpose()?;
    let refused = if has_error(socket).map_err(failed)? {
        Some("an error that was not read yet")
    } else if gathers.is_some_and(|on| on != 0) {
        Some("the kernel putting them together (UDP_GRO)")
    } else if unicast.is_some_and(|a| !can_be_reached(a.ip())) {
        Some("a multicast or broadcast address")
    } else {
        None
    };
    if let Some(what) = refused {
        return Err(probe.refuse(
            format!("UDP socket with datagrams that were not read yet, and {what}"),
            "try again when the program has read them",
        ));
    }
    read(socket).map_err(failed)
}

fn can_be_reached(ip: IpAddr) -> bool {
    !ip.is_multicast() && ip.to_canonical() != IpAddr::V4(Ipv4Addr::BROADCAST)
}

fn read(socket: BorrowedFd<'_>) -> Result<Vec<Datagram>, Errno> {
    let _offset = PeekOffset::at_start(socket)?;
    let mut buffer = vec![0; LONGEST];
    let mut queue = Vec::new();
    loop {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let mut nothing = RecvAncillaryBuffer::default();
        let seen = match recvmsg(socket, &mut parts, &mut nothing, flags) {
            Ok(seen) => seen,
            Err(Errno::AGAIN) => return Ok(queue),
            Err(errno) => return Err(errno),
        };
        let sender = seen.address.ok_or(Errno::PROTO)?;
        queue.push(Datagram {
            sender: InetAddress::of(SocketAddr::try_from(sender)?),
            data: buffer[..seen.bytes].to_vec(),
        });
    }
}

/// Delivers datagrams to a socket that is bound, to a port by its number, and not connected, in their
/// order. How many were
/// lost, and why.
pub(crate) fn deliver(
    socket: &OwnedFd,
    queue: &[Datagram],
    shares_port: bool,
) -> Option<(usize, Errno)> {
    let lost = queue.iter().enumerate().find_map(|(at, datagram)| {
        let delivered = deliver_one(socket, datagram, shares_port);
        delivered.err().map(|errno| (queue.len() - at, errno))
    });
    if shares_port && !queue.is_empty() {
        // It stays bound to what it was bound to.
        let _ = connect_unspec(socket);
    }
    lost
}

fn deliver_one(socket: &OwnedFd, datagram: &Datagram, shares_port: bool) -> Result<(), Errno> {
    let sender = datagram.sender.socket_address().map_err(|_| Errno::INVAL)?;
    if shares_port {
        connect(socket, &sender)?;
    }
    let mut to = SocketAddr::try_from(getsockname(socket)?)?;
    let from = SocketAddr::new(sender.ip().to_canonical(), sender.port());
    to.set_ip(match (to.ip().to_canonical(), from.ip()) {
        (ip, IpAddr::V4(_)) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        (ip, IpAddr::V6(_)) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        (ip, _) => ip,
    });
    if to.port() == 0 || !can_be_reached(to.ip()) {
        return Err(Errno::ADDRNOTAVAIL);
    }
    let before = sockopt::unread(socket.as_fd())?;
    let packet = packet(from, to, &datagram.data).ok_or(Errno::MSGSIZE)?;
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let raw = socket_with(
        family,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(ipproto::RAW),
    )?;
    sendto(
        &raw,
        &packet,
        SendFlags::empty(),
        &SocketAddr::new(to.ip(), 0),
    )?;
    let deadline = Instant::now() + PATIENCE;
    while sockopt::unread(socket.as_fd())? <= before {
        if Instant::now() > deadline {
            return Err(Errno::TIMEDOUT);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// An IP packet with a datagram; `None` where it would be too long, or mixes IP versions.
fn packet(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + data.len()).ok()?;
    let (mut packet, addresses) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // Version and length; total length, ID and checksum are filled in by the kernel.
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0];
            let addresses = [from.octets(), to.octets()].concat();
            header.extend_from_slice(&addresses);
            (header, addresses)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // Version; length of the payload, what it is, hop limit.
            let mut header = vec![0x60, 0, 0, 0];
            header.extend_from_slice(&length.to_be_bytes());
            header.extend_from_slice(&[UDP, 64]);
            let addresses = [from.octets(), to.octets()].concat();
            header.extend_from_slice(&addresses);
            (header, addresses)
        }
        _ => return None,
    };
    let mut udp = Vec::with_capacity(length.into());
    udp.extend_from_slice(&from.port().to_be_bytes());
    udp.extend_from_slice(&to.port().to_be_bytes());
    udp.extend_from_slice(&length.to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(data);
    // What is summed up before it: addresses, protocol, length (RFC 768, RFC 8200).
    let before = u32::from(UDP) + u32::from(length) + sum(&addresses);
    let sum = fold(before + sum(&udp));
    udp[6..8].copy_from_slice(&(if sum == u16::MAX { sum } else { !sum }).to_be_bytes());
    packet.extend_from_slice(&udp);
    Some(packet)
}

/// The sum of 16-bit words; of no more than a packet, so it cannot overflow.
fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    bytes.chunks(2).map(word).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > u32::from(u16::MAX) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    fn look(socket: &UdpSocket) -> Vec<(SocketAddr, Vec<u8>)> {
        let queue = read(socket.as_fd()).unwrap();
        let pair = |d: Datagram| (d.sender.socket_address().unwrap(), d.data);
        queue.into_iter().map(pair).collect()
    }

    #[test]
    fn what_waits_is_seen_again_and_again_and_stays() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let to = b.local_addr().unwrap();
        assert_eq!(sockopt::unread(b.as_fd()), Ok(0));
        let long = vec![7; 50_000];
        for data in [&b"one"[..], &long, b"", b"four"] {
            a.send_to(data, to).unwrap();
        }
        let from = a.local_addr().unwrap();
        assert!(sockopt::unread(b.as_fd()).unwrap() > 50_000);
        let seen = look(&b);
        let all = [
            (from, b"one".to_vec()),
            (from, long),
            (from, Vec::new()),
            (from, b"four".to_vec()),
        ];
        assert_eq!(seen, all);
        // An empty one is seen once.
        assert_eq!(look(&b).len(), 3);
        assert_eq!(b.recv(&mut [0; 9]).unwrap(), 3);
        assert_eq!(look(&b).len(), 2);
    }

    /// Delivers to a fresh socket that is bound to `to`; whether it gets just that.
    fn try_one(to: &str, from: &str, shares_port: bool) {
        // Bound to a port by its number, as at a restore.
        let at = UdpSocket::bind(to).unwrap().local_addr().unwrap();
        let socket = UdpSocket::bind(at).unwrap();
        let (before, from) = (
            socket.local_addr().unwrap(),
            from.parse::<SocketAddr>().unwrap(),
        );
        let long = vec![9; 60_000];
        let data = [&b"odd"[..], b"", &long, b"even"];
        let queue = data.map(|data| Datagram {
            sender: InetAddress::of(from),
            data: data.to_vec(),
        });
        let fd = OwnedFd::from(socket);
        let lost = deliver(&fd, &queue, shares_port);
        let socket = UdpSocket::from(fd);
        assert_eq!(lost, None, "{to} from {from}");
        assert_eq!(socket.local_addr().unwrap(), before);
        assert!(socket.peer_addr().is_err(), "it is not connected");
        let mut buffer = vec![0; LONGEST];
        for data in data {
            let (length, sender) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], sender), (data, from));
        }
    }

    #[test]
    fn datagrams_arrive_from_whoever_sent_them() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED 1 test: only root may send packets in the name of others");
            return;
        }
        // The sender's port is in use, or its address is nobody's here.
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let used = sender.local_addr().unwrap().to_string();
        try_one("127.0.0.1:0", &used, false);
        try_one("127.0.0.1:0", &used, true);
        try_one("0.0.0.0:0", "192.0.2.7:1234", false);
        if UdpSocket::bind("[::1]:0").is_ok() {
            try_one("[::1]:0", "[::1]:1234", false);
            try_one("[::1]:0", "[::1]:1234", true);
            try_one("[::]:0", "[2001:db8::7]:1234", false);
            try_one(
                "[::]:0",
                &used.replace("127.0.0.1", "[::ffff:127.0.0.1]"),
                true,
            );
        }
        sender.set_nonblocking(true).unwrap();
        assert!(
            sender.recv(&mut [0; 9]).is_err(),
            "nobody else gets anything"
        );
    }

    #[test]
    fn what_cannot_be_delivered_is_counted() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let datagram = |sender: &str| Datagram {
            sender: InetAddress::of(sender.parse().unwrap()),
            data: vec![1],
        };
        let queue = ["[::1]:1", "127.0.0.1:1"].map(datagram);
        let lost = deliver(&socket.into(), &queue, false);
        assert_eq!(lost, Some((2, Errno::MSGSIZE)));
    }

    #[test]
    fn sums_are_those_of_the_standard() {
        // RFC 1071, section 3.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)), 0xddf2);
        assert_eq!(sum(&[1]), 0x100);
    }
}
