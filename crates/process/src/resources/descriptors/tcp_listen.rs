//! TCP sockets that listen.
//!
//! The address is bound again during the checks, so that a port which is taken is found before
//! anything else is made. Connections from outside that waited to be accepted are lost as all others
//! are: their peers see a reset, and the program has never heard of them.
//!
//! # What it refuses
//! Connections that wait to be accepted, and whose other end is in the program: they, too, can be
//! read by nobody but who accepts them.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, Transport, tcp_state};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use crate::ProcessError;
use outlive_linux::sockopt;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

/// What `TCP_MAXSEG` says where nothing was set (`TCP_MSS_DEFAULT`).
const DEFAULT_SEGMENT: u32 = 536;

/// A listening TCP socket.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-tcp-listen-v1")]
pub struct TcpListenState {
    /// IP version of the socket, 4 or 6.
    pub version: u32,
    /// How many connections may wait to be accepted.
    pub backlog: u32,
    /// The largest window of connections (`TCP_WINDOW_CLAMP`), where one was set.
    pub window_clamp: Option<u32>,
    /// The largest segment of connections, bytes (`TCP_MAXSEG`), where one was set.
    pub max_segment: Option<u32>,
    /// Where it listens.
    #[state(child)]
    pub address: InetAddress,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

/// Whether who connects to `peer` may get to what listens at `address`.
fn leads_to(address: &InetAddress, peer: SocketAddr) -> bool {
    let listens = address
        .socket_address()
        .map(|a| (a.ip().to_canonical(), a.port()));
    listens.is_ok_and(|(ip, port)| port == peer.port() && (ip == peer.ip() || ip.is_unspecified()))
}

impl Descriptor for TcpListenState {
    const NAME: &'static str = "listening TCP socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(inet::tcp_state_of(probe)? == Some(tcp_state::LISTEN))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let info = sockopt::tcp_info(probe.duplicate()?)
            .map_err(|errno| probe.failed("read TCP_INFO of", errno))?;
        let option = |name| {
            sockopt::get_u32(probe.duplicate()?, libc::IPPROTO_TCP, name)
                .map_err(|errno| probe.failed("read options of", errno))
        };
        let window_clamp = option(libc::TCP_WINDOW_CLAMP)?;
        let max_segment = option(libc::TCP_MAXSEG)?;
        let address = inet::local(probe)?
            .ok_or_else(|| probe.failed("get the address of", Errno::ADDRNOTAVAIL))?;
        let waiting = cx.stopped && info.is_some_and(|info| info.waiting != 0);
        let mut peers = cx.around.tcp_peers.iter();
        if waiting && peers.any(|peer| leads_to(&address, *peer)) {
            return Err(probe.refuse(
                "TCP connection within the program that was not accepted yet",
                "try again when the program has accepted it",
            ));
        }
        Ok(Self {
            version: inet::version(probe)?,
            backlog: info.map_or(0, |info| info.backlog),
            window_clamp: window_clamp.filter(|&clamp| clamp != 0),
            max_segment: max_segment.filter(|&bytes| bytes != DEFAULT_SEGMENT),
            address,
            options: SocketOptions::collect(probe, cx.memory)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let address = Some(&self.address);
        let socket = inet::bound_socket(
            about,
            cx,
            Transport::Tcp,
            self.version,
            address,
            &self.options,
        )?;
        cx.hold(about, socket);
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let socket = cx.take(about)?;
        let backlog = i32::try_from(self.backlog).unwrap_or(i32::MAX);
        rustix::net::listen(&socket, backlog)
            .map_err(|errno| failed(cx.pid, format!("listen on {}", self.address), errno))?;
        let numbers = [
            (
                self.window_clamp,
                "TCP_WINDOW_CLAMP",
                libc::TCP_WINDOW_CLAMP,
            ),
            (self.max_segment, "TCP_MAXSEG", libc::TCP_MAXSEG),
        ];
        let mut set = numbers.into_iter().filter_map(|(value, shown, name)| {
            let set = sockopt::set_u32(socket.as_fd(), libc::IPPROTO_TCP, name, value?);
            Some(set.map_err(|errno| (shown, errno)))
        });
        set.try_for_each(|set| set)
            .and_then(|()| self.options.apply_last(&socket))
            .map_err(|(name, errno)| {
                failed(cx.pid, format!("set {name} of fd {}", about.number), errno)
            })?;
        Ok(socket)
    }
}
