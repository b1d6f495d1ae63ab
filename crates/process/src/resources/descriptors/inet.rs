//! Internet addresses, and sockets bound to them: what the kinds of TCP and UDP socket share.

use super::context::{About, CheckContext};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt,
};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;

/// States of a TCP socket in `TCP_INFO`.
pub(crate) mod tcp_state {
    pub(crate) const CLOSED: u8 = 7;
    pub(crate) const LISTEN: u8 = 10;

    /// ESTABLISHED, FIN-WAIT-1, FIN-WAIT-2, CLOSE-WAIT, LAST-ACK, CLOSING.
    pub(crate) fn is_connection(state: u8) -> bool {
        matches!(state, 1 | 4 | 5 | 8 | 9 | 11)
    }
}

/// An address and a port.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,inet-address-v1")]
pub struct InetAddress {
    /// 4 or 16 bytes.
    pub ip: Vec<u8>,
    /// The port.
    pub port: u16,
    /// The interface of a link-local address, else 0.
    pub scope: u32,
}

impl InetAddress {
    pub(crate) fn of(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(v4) => Self {
                ip: v4.ip().octets().to_vec(),
                port: v4.port(),
                scope: 0,
            },
            SocketAddr::V6(v6) => Self {
                ip: v6.ip().octets().to_vec(),
                port: v6.port(),
                scope: v6.scope_id(),
            },
        }
    }

    pub(crate) fn socket_address(&self) -> Result<SocketAddr, ProcessError> {
        if let Ok(ip) = <[u8; 4]>::try_from(&self.ip[..]) {
            return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(ip)), self.port));
        }
        let ip = <[u8; 16]>::try_from(&self.ip[..]).map_err(|_| {
            ProcessError::Image(format!("an address of {} bytes is none", self.ip.len()))
        })?;
        Ok(SocketAddrV6::new(Ipv6Addr::from(ip), self.port, 0, self.scope).into())
    }
}

impl fmt::Display for InetAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket_address() {
            Ok(address) => write!(f, "{address}"),
            Err(_) => write!(f, "?"),
        }
    }
}

/// The address a socket is bound to, if it is.
pub(crate) fn local(probe: &Probe<'_>) -> Result<Option<InetAddress>, ProcessError> {
    let name = rustix::net::getsockname(probe.duplicate()?)
        .map_err(|errno| probe.failed("get the address of", errno))?;
    Ok(inet(name).filter(|address| address.port != 0))
}

/// The address at the other end, if there is one.
pub(crate) fn peer(probe: &Probe<'_>) -> Result<Option<InetAddress>, ProcessError> {
    Ok(rustix::net::getpeername(probe.duplicate()?)
        .ok()
        .flatten()
        .and_then(inet))
}

fn inet(any: SocketAddrAny) -> Option<InetAddress> {
    SocketAddr::try_from(any).ok().map(InetAddress::of)
}

/// Whether this is a TCP socket, and in which state it is.
pub(crate) fn tcp_state_of(probe: &Probe<'_>) -> Result<Option<u8>, ProcessError> {
    Ok(probe.socket()?.and_then(|facts| facts.tcp_state))
}

/// The family as it is saved: 4 or 6.
pub(crate) fn version(probe: &Probe<'_>) -> Result<u32, ProcessError> {
    let v6 = probe
        .socket()?
        .is_some_and(|facts| facts.family == AddressFamily::INET6);
    Ok(if v6 { 6 } else { 4 })
}

/// What is above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    fn socket(self, version: u32) -> Result<OwnedFd, Errno> {
        let family = match version {
            4 => AddressFamily::INET,
            6 => AddressFamily::INET6,
            _ => return Err(Errno::AFNOSUPPORT),
        };
        let (kind, protocol) = match self {
            Self::Tcp => (SocketType::STREAM, ipproto::TCP),
            Self::Udp => (SocketType::DGRAM, ipproto::UDP),
        };
        socket_with(family, kind, SocketFlags::CLOEXEC, Some(protocol))
    }

    /// Where the kernel lists sockets of this kind.
    fn tables(self) -> [&'static str; 2] {
        match self {
            Self::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
            Self::Udp => ["/proc/net/udp", "/proc/net/udp6"],
        }
    }

    /// What lists their holders.
    fn lister(self) -> &'static str {
        match self {
            Self::Tcp => "ss -ltnp",
            Self::Udp => "ss -lunp",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// A new TCP socket of IP version 4 or 6.
pub(crate) fn tcp_socket(version: u32) -> Result<OwnedFd, Errno> {
    Transport::Tcp.socket(version)
}

/// Makes a socket with its options and binds it; what the program of another user holds, or
/// holds already, is refused by name.
pub(crate) fn bound_socket(
    about: &About,
    cx: &CheckContext<'_>,
    transport: Transport,
    version: u32,
    address: Option<&InetAddress>,
    options: &SocketOptions,
) -> Result<OwnedFd, ProcessError> {
    let shown = address.map_or_else(|| "no address".to_owned(), ToString::to_string);
    let fail = |errno| {
        failed(
            cx.request.pid,
            format!("make {transport} socket fd {} for {shown}", about.number),
            errno,
        )
    };
    let socket = transport.socket(version).map_err(fail)?;
    options
        .apply_before_bind(&socket)
        .map_err(|(name, errno)| {
            failed(
                cx.request.pid,
                format!("set {name} of fd {}", about.number),
                errno,
            )
        })?;
    let Some(address) = address else {
        return Ok(socket);
    };
    let target = address.socket_address()?;
    if target.is_ipv4() != (version == 4) {
        return Err(ProcessError::Image(format!(
            "fd {} mixes IP versions",
            about.number
        )));
    }
    // Connections of the program's earlier life may still be closing; they must not be in the way.
    if transport == Transport::Tcp || options.reuse_address.is_some() {
        sockopt::set_socket_reuseaddr(&socket, true).map_err(fail)?;
    }
    match bind(&socket, &target) {
        Ok(()) => Ok(socket),
        Err(Errno::ADDRINUSE) => Err(refuse_busy(about, cx, transport, address)),
        Err(Errno::ADDRNOTAVAIL) => Err(cx.refuse(
            about,
            format!("{transport} socket on {shown}, an address that this host does not have"),
            "give the address to an interface of this host first",
        )),
        Err(errno) => Err(fail(errno)),
    }
}

/// The refusal for a port that somebody else has.
pub(crate) fn refuse_busy(
    about: &About,
    cx: &CheckContext<'_>,
    transport: Transport,
    address: &InetAddress,
) -> ProcessError {
    let (holder, remedy) = match holder_of(transport, address.port) {
        Some((pid, name)) => (
            format!(" by pid {pid} ({name})"),
            format!("end pid {pid}, then restore again"),
        ),
        None => (
            String::new(),
            format!("find who listens there ({}) and end it", transport.lister()),
        ),
    };
    cx.refuse(
        about,
        format!("{transport} port {address} is taken{holder}"),
        remedy,
    )
}

/// Who holds a port, as far as it can be found. A process that holds a port which is not listened on
/// is not listed.
fn holder_of(transport: Transport, port: u16) -> Option<(u32, String)> {
    let mut inodes = Vec::new();
    for table in transport.tables() {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        inodes.extend(
            text.lines()
                .skip(1)
                .filter_map(|line| socket_on(line, port)),
        );
    }
    holder_of_sockets(&inodes)
}

/// The first process that has one of these sockets open, and its name.
pub(crate) fn holder_of_sockets(inodes: &[u64]) -> Option<(u32, String)> {
    if inodes.is_empty() {
        return None;
    }
    let links: Vec<String> = inodes
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(descriptors) = std::fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            let link = std::fs::read_link(descriptor.path()).unwrap_or_default();
            if link
                .to_str()
                .is_some_and(|link| links.iter().any(|l| l == link))
            {
                let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                return Some((pid, name.trim().to_owned()));
            }
        }
    }
    None
}

/// The inode of the socket in a line of `/proc/net/tcp`, if its local port is this one.
fn socket_on(line: &str, port: u16) -> Option<u64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (_, local) = words.get(1)?.rsplit_once(':')?;
    (u16::from_str_radix(local, 16).ok()? == port).then_some(())?;
    words.get(9)?.parse().ok().filter(|&inode| inode != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive() {
        for text in ["127.0.0.1:80", "[::1]:65535", "0.0.0.0:1"] {
            let address: SocketAddr = text.parse().unwrap();
            let saved = InetAddress::of(address);
            assert_eq!(saved.socket_address().unwrap(), address);
            assert_eq!(saved.to_string(), text);
        }
        let bad = InetAddress {
            ip: vec![1, 2, 3],
            port: 1,
            scope: 0,
        };
        assert!(bad.socket_address().is_err());
    }

    #[test]
    fn the_holder_of_a_port_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(
            holder_of(Transport::Tcp, port).map(|(pid, _)| pid),
            Some(std::process::id())
        );
        drop(listener);
    }
}
