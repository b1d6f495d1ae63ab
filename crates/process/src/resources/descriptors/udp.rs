//! UDP sockets, bound or connected or neither.
//!
//! Datagrams that wait to be read are delivered again ([`super::udp_queue`]). Those that arrive until
//! the restore are lost, as datagrams may be.
//!
//! Multicast groups are joined again; the kernel does not list the groups of a socket, but says for
//! a given one whether the socket is in it ([`super::multicast`]).
//!
//! # What it refuses
//! A socket that holds back what was written until it is uncorked (`UDP_CORK`): it cannot be read.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, Transport};
use super::multicast::{self, GroupState};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use super::udp_queue::{self, Datagram};
use crate::ProcessError;
use outlive_linux::sockopt;
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
    /// The multicast groups that it is in.
    #[state(children)]
    pub groups: Vec<GroupState>,
    /// What waits to be read.
    #[state(children)]
    pub queue: Vec<Datagram>,
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
        let options = SocketOptions::collect(probe, cx.memory)?;
        let corked = options.udp_cork.is_some();
        let unsent = || {
            sockopt::unsent(probe.duplicate()?)
                .map_err(|e| probe.failed("ask for what waits in", e))
        };
        if corked && unsent()? != 0 {
            return Err(probe.refuse(
                "UDP socket that holds back a datagram (UDP_CORK)",
                "try again when the program has sent it",
            ));
        }
        let local = inet::local(probe)?;
        Ok(Self {
            version: inet::version(probe)?,
            queue: udp_queue::collect(probe, local.as_ref(), cx.stopped)?,
            local,
            peer: inet::peer(probe)?,
            groups: multicast::collect(probe)?,
            options,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        if let Some(peer) = &self.peer {
            peer.socket_address()?;
        }
        for group in &self.groups {
            group.check(about)?;
        }
        for datagram in &self.queue {
            datagram.validate()?;
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
        cx.hold(about, socket);
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let socket = cx.take(about)?;
        let options = &self.options;
        let reuses = options.reuse_port.is_some() || options.reuse_address.is_some();
        // Not to be connected for a while is to be bound to no interface any more.
        let any_interface =
            options.device.is_none() && self.local.as_ref().is_none_or(|local| local.scope == 0);
        let shares_port = reuses && any_interface;
        if let Some((lost, why)) = udp_queue::deliver(&socket, &self.queue, shares_port) {
            cx.notices.push(format!(
                "{lost} datagrams that waited in UDP socket fd {} of pid {} are lost: {why}",
                about.number, about.process
            ));
        }
        self.options.apply_last(&socket).map_err(|(name, errno)| {
            failed(cx.pid, format!("set {name} of fd {}", about.number), errno)
        })?;
        for group in &self.groups {
            if let Err(why) = group.join(&socket) {
                cx.notices.push(format!(
                    "UDP socket fd {} of pid {} is not in multicast group {} any more: {why}",
                    about.number,
                    about.process,
                    group.shown()
                ));
            }
        }
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
