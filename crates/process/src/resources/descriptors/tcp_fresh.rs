//! TCP sockets that were never connected and do not listen, bound or not.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, Transport, tcp_state};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::OwnedFd;

/// A TCP socket that was not used yet.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-tcp-fresh-v1")]
pub struct TcpFreshState {
    /// IP version of the socket, 4 or 6.
    pub version: u32,
    /// Where it is bound, if it is.
    #[state(child)]
    pub address: Option<InetAddress>,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

/// Whether a closed socket was connected before: both directions are shut down then.
fn was_connected(probe: &Probe<'_>) -> Result<bool, ProcessError> {
    let fd = probe.duplicate()?;
    let mut fds = [PollFd::new(&fd, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).map_err(|e| probe.failed("poll", e))?;
    Ok(fds[0]
        .revents()
        .intersects(PollFlags::RDHUP | PollFlags::ERR))
}

impl Descriptor for TcpFreshState {
    const NAME: &'static str = "unconnected TCP socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(inet::tcp_state_of(probe)? == Some(tcp_state::CLOSED) && !was_connected(probe)?)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        Ok(Self {
            version: inet::version(probe)?,
            address: inet::local(probe)?,
            options: SocketOptions::collect(probe, cx.memory)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let address = self.address.as_ref();
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
        self.options.apply_last(&socket).map_err(|(name, errno)| {
            failed(cx.pid, format!("set {name} of fd {}", about.number), errno)
        })?;
        Ok(socket)
    }
}
