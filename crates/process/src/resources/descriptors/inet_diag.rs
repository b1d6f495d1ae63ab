//! What the kernel keeps of TCP connections that are in nobody's hands any more: those that wait
//! for their end, or for late segments. It can be told to forget them.

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, sendto,
    socket_with, sockopt,
};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const TCP: u8 = 6;
/// Bytes of a request, and where the inode lies in an answer.
const REQUEST: u32 = 72;
const INODE: usize = 84;

fn request(order: u16, flags: u16, local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let mut bytes = Vec::with_capacity(REQUEST as usize);
    bytes.extend_from_slice(&REQUEST.to_ne_bytes());
    bytes.extend_from_slice(&order.to_ne_bytes());
    bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family as u8, TCP, 0, 0]);
    // All states; ports, addresses, any interface, no cookie.
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    for address in [local, peer] {
        bytes.extend_from_slice(&address.port().to_be_bytes());
    }
    for address in [local, peer] {
        let mut ip = match address.ip() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        ip.resize(16, 0);
        bytes.extend_from_slice(&ip);
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&[0xff; 8]);
    bytes
}

fn ask(socket: &OwnedFd, request: &[u8]) -> Result<Vec<u8>, Errno> {
    let to = SocketAddrNetlink::new(0, 0);
    sendto(socket, request, SendFlags::empty(), &to)?;
    let mut answer = vec![0; 4096];
    let (length, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
    answer.truncate(length);
    Ok(answer)
}

/// Has the kernel forget a connection if no process has it open. Best effort: what stays makes the
/// connection that is to be made in its place fail.
pub(crate) fn forget_if_orphan(local: SocketAddr, peer: SocketAddr) {
    let forget = || {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::DGRAM);
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(family, kind, flags, Some(netlink::SOCK_DIAG))?;
        let patience = Some(Duration::from_secs(1));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, patience)?;
        let answer = ask(&socket, &request(SOCK_DIAG_BY_FAMILY, 0, local, peer))?;
        let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
        if kind == Some(SOCK_DIAG_BY_FAMILY) && answer.get(INODE..INODE + 4) == Some(&[0; 4]) {
            ask(&socket, &request(SOCK_DESTROY, NLM_F_ACK, local, peer))?;
        }
        Ok::<(), Errno>(())
    };
    if let Err(errno) = forget() {
        tracing::debug!("what is left of a connection could not be forgotten: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    /// Whether the kernel knows a connection, and who has it open.
    fn known(local: SocketAddr, peer: SocketAddr) -> Option<bool> {
        let text = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let port = |n: u16| format!(":{n:04X}");
        text.lines().skip(1).find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let fits =
                words[1].ends_with(&port(local.port())) && words[2].ends_with(&port(peer.port()));
            fits.then(|| words[9] != "0")
        })
    }

    #[test]
    fn orphans_are_forgotten_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, peer) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let (server, _) = listener.accept().unwrap();
        forget_if_orphan(local, peer);
        assert_eq!(known(local, peer), Some(true), "it is in use");
        drop(client);
        assert_eq!(known(local, peer), Some(false), "the other end is open");
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root may have the kernel forget connections");
            return;
        }
        forget_if_orphan(local, peer);
        assert_eq!(known(local, peer), None);
        drop(server);
    }
}
