//! UDP sockets, bound or connected or neither.
//!
//! Datagrams may be lost, and are: those which wait to be read, and those which arrive until the
//! restore. A notice says so.
//!
//! # What else is lost
//! Multicast groups that were joined: the kernel does not tell which socket is in which group.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, Transport};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::net::{AddressFamily, SocketType, connect};
use std::os::fd::OwnedFd;

/// `IPPROTO_UDP`
const UDP: u32 = 17;

/// A UDP socket.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-udp-v1")]
pub struct UdpState {
    /// IP version of the socket, 4 or 6.
    pub version: u32,
    /// Where it is bound, if it is.
    #[state(child)]
    pub local: Option<InetAddress>,
    /// To what it is connected, if it is.
    #[state(child)]
    pub peer: Option<InetAddress>,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

impl Descriptor for UdpState {
    const NAME: &'static str = "UDP socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.socket()?.is_some_and(|facts| {
            matches!(facts.family, AddressFamily::INET | AddressFamily::INET6)
                && facts.kind == SocketType::DGRAM
                && facts.protocol == UDP
        }))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        Ok(Self {
            version: inet::version(probe)?,
            local: inet::local(probe)?,
            peer: inet::peer(probe)?,
            options: SocketOptions::collect(probe, cx.memory)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        if let Some(peer) = &self.peer {
            peer.socket_address()?;
        }
        let make = |address| {
            inet::bound_socket(
                about,
                cx,
                Transport::Udp,
                self.version,
                address,
                &self.options,
            )
        };
        let socket = match make(self.local.as_ref()) {
            // Who sends to one peer only can do so from another port.
            Err(ProcessError::Refused(_)) if self.peer.is_some() => {
                let socket = make(None)?;
                let (number, process) = (about.number, about.process);
                let was = self
                    .local
                    .as_ref()
                    .map_or(String::new(), ToString::to_string);
                cx.notices.push(format!(
                    "UDP socket fd {number} of pid {process} sends from another address than {was}"
                ));
                socket
            }
            made => made?,
        };
        cx.datagram_sockets += 1;
        cx.hold(about, socket);
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let socket = cx.take(about)?;
        self.options.apply_last(&socket).map_err(|(name, errno)| {
            failed(cx.pid, format!("set {name} of fd {}", about.number), errno)
        })?;
        if let Some(peer) = &self.peer
            && let Err(errno) = connect(&socket, &peer.socket_address()?)
        {
            cx.notices.push(format!(
                "UDP socket fd {} of pid {} is not connected to {peer} any more: {errno}",
                about.number, about.process
            ));
        }
        Ok(socket)
    }
}
