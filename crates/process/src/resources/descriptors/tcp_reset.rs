//! TCP connections, which do not survive a crash: the restored program finds them reset.
//!
//! What it gets is a socket that was connected over the loopback and reset by the other end: poll
//! reports an error and a hang-up, the next read or write fails with `ECONNRESET` or `EPIPE`, as
//! it would had the peer died. Where there is no loopback, it gets a socket that is not connected.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, tcp_state};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_linux::sockopt;
use outlive_state_tree::StateNode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, bind, connect, getsockname, listen};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// How long the reset may take over the loopback.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// A connection that is lost.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-tcp-reset-v1")]
pub struct TcpResetState {
    /// IP version of the socket, 4 or 6.
    pub version: u32,
    /// This end.
    #[state(child)]
    pub local: Option<InetAddress>,
    /// The other end.
    #[state(child)]
    pub peer: Option<InetAddress>,
}

impl Descriptor for TcpResetState {
    const NAME: &'static str = "TCP connection";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        // What listens or is fresh has been claimed before.
        Ok(inet::tcp_state_of(probe)?.is_some_and(|state| state != tcp_state::LISTEN))
    }

    fn collect(probe: &Probe<'_>, _: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        Ok(Self {
            version: inet::version(probe)?,
            local: inet::local(probe)?,
            peer: inet::peer(probe)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        if !matches!(self.version, 4 | 6) {
            return Err(ProcessError::Image(format!(
                "fd {} has no IP version",
                about.number
            )));
        }
        cx.resets += 1;
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let socket = inet::tcp_socket(self.version)
            .map_err(|e| failed(cx.pid, format!("make TCP socket fd {}", about.number), e))?;
        let loopbacks: &[IpAddr] = if self.version == 4 {
            &[IpAddr::V4(Ipv4Addr::LOCALHOST)]
        } else {
            // A socket of version 6 reaches version 4 through a mapped address.
            &[
                IpAddr::V6(Ipv6Addr::LOCALHOST),
                IpAddr::V4(Ipv4Addr::LOCALHOST),
            ]
        };
        for &loopback in loopbacks {
            if reset(&socket, self.version, loopback).is_ok() {
                break;
            }
        }
        Ok(socket)
    }
}

/// Connects `socket` and has the other end reset the connection.
fn reset(socket: &OwnedFd, version: u32, loopback: IpAddr) -> Result<(), Errno> {
    let listener = inet::tcp_socket(if loopback.is_ipv4() { 4 } else { 6 })?;
    bind(&listener, &SocketAddr::new(loopback, 0))?;
    listen(&listener, 1)?;
    let mut address = SocketAddr::try_from(getsockname(&listener)?)?;
    if let (6, IpAddr::V4(v4)) = (version, address.ip()) {
        address.set_ip(v4.to_ipv6_mapped().into());
    }
    connect(socket, &address)?;
    // Whoever else connected in between is turned away.
    let mine = SocketAddr::try_from(getsockname(socket)?)?.port();
    loop {
        let other = accept_with(&listener, SocketFlags::CLOEXEC)?;
        let peer = rustix::net::getpeername(&other)?.ok_or(Errno::NOTCONN)?;
        let found = SocketAddr::try_from(peer)?.port() == mine;
        rustix::net::sockopt::set_socket_linger(&other, Some(Duration::ZERO))?;
        drop(other);
        if found {
            break;
        }
    }
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut fds, Some(&PATIENCE))?;
    // The socket must not look as if it had been bound on purpose.
    let info = sockopt::tcp_info(socket.as_fd())?;
    if info.is_some_and(|info| info.state == tcp_state::CLOSED) {
        Ok(())
    } else {
        Err(Errno::IO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_socket_reports_an_error_and_then_the_end() {
        for (version, loopback) in [
            (4, IpAddr::V4(Ipv4Addr::LOCALHOST)),
            (6, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        ] {
            let socket = inet::tcp_socket(version).unwrap();
            reset(&socket, version, loopback).unwrap();
            let mut fds = [PollFd::new(&socket, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec::default())).unwrap();
            let seen = fds[0].revents();
            assert!(
                seen.contains(PollFlags::ERR | PollFlags::HUP | PollFlags::IN),
                "{seen:?}"
            );
            let mut byte = [0];
            assert_eq!(rustix::io::read(&socket, &mut byte), Err(Errno::CONNRESET));
            assert_eq!(rustix::io::read(&socket, &mut byte), Ok(0));
        }
    }
}
