//! Unix connections to somebody outside: the restored program finds them closed by the peer.
//!
//! A read gives the end of the stream, a write fails with `EPIPE`, as it would had the peer gone.
//! What was received and not read yet is lost with the connection. Pairs with both ends in the
//! program are refused for now.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use super::unix_fresh::{UnixKind, is_connected};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::net::{AddressFamily, SocketFlags, socketpair};
use std::os::fd::OwnedFd;

/// A connection whose peer is not saved with it.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-unix-orphan-v1")]
pub struct UnixOrphanState {
    /// Its type.
    pub kind: UnixKind,
}

impl Descriptor for UnixOrphanState {
    const NAME: &'static str = "unix connection";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(UnixKind::of(probe)?.is_some()
            && probe.socket()?.is_some_and(|facts| !facts.listens)
            && is_connected(probe)?)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let facts = cx
            .unix
            .ask(probe.info.inode)
            .map_err(|errno| probe.failed("ask the kernel about", errno))?;
        let peer = facts.and_then(|facts| facts.peer);
        if peer.is_some_and(|peer| cx.around.sockets.contains(&peer)) {
            return Err(probe.refuse(
                "unix socket pair within the program",
                "run the program without it (pipes are saved)",
            ));
        }
        Ok(Self {
            kind: UnixKind::required(probe)?,
        })
    }

    fn check(&self, _: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        cx.resets += 1;
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let kind = self.kind.socket_type();
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .map(|(mine, _closed)| mine)
            .map_err(|errno| {
                failed(
                    cx.pid,
                    format!("make unix socket fd {}", about.number),
                    errno,
                )
            })
    }
}
