//! TCP sockets that listen.
//!
//! The address is bound again during the checks, so that a port which is taken is found before
//! anything else is made. Connections that waited to be accepted are lost; their peers see a reset.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, Transport, tcp_state};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// A listening TCP socket.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-tcp-listen-v1")]
pub struct TcpListenState {
    /// IP version of the socket, 4 or 6.
    pub version: u32,
    /// How many connections may wait to be accepted.
    pub backlog: u32,
    /// Where it listens.
    #[state(child)]
    pub address: InetAddress,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

impl Descriptor for TcpListenState {
    const NAME: &'static str = "listening TCP socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(inet::tcp_state_of(probe)? == Some(tcp_state::LISTEN))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let info = outlive_linux::sockopt::tcp_info(probe.duplicate()?)
            .map_err(|errno| probe.failed("read TCP_INFO of", errno))?;
        let address = inet::local(probe)?
            .ok_or_else(|| probe.failed("get the address of", Errno::ADDRNOTAVAIL))?;
        Ok(Self {
            version: inet::version(probe)?,
            backlog: info.map_or(0, |info| info.backlog),
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
        self.options.apply_last(&socket).map_err(|(name, errno)| {
            failed(cx.pid, format!("set {name} of fd {}", about.number), errno)
        })?;
        Ok(socket)
    }
}
