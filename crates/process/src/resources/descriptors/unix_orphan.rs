//! Unix connections to somebody outside: the restored program finds them closed by the peer.
//!
//! What was received and not read yet can still be read; then a read gives the end of the stream,
//! and a write fails with `EPIPE`, as it would had the peer gone. A connection whose peer had gone
//! before is such a one too.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use super::unix_diag::{RECEIVE_SHUT, SEND_SHUT};
use super::unix_fresh::{UnixKind, is_connected};
use super::unix_queue::{UnixQueue, has_error};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, send, socketpair};
use std::os::fd::OwnedFd;

/// A connection whose peer is not saved with it.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-unix-orphan-v1")]
pub struct UnixOrphanState {
    /// Its type.
    pub kind: UnixKind,
    /// The peer had closed its end already.
    pub closed: bool,
    /// The peer did so without reading everything (`ECONNRESET`).
    pub reset: bool,
    /// What waits to be read.
    #[state(child)]
    pub queue: UnixQueue,
}

impl Descriptor for UnixOrphanState {
    const NAME: &'static str = "unix connection";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(UnixKind::of(probe)?.is_some()
            && probe.socket()?.is_some_and(|facts| !facts.listens)
            && is_connected(probe)?)
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let facts = cx.around.unix(probe)?.ok_or_else(|| {
            probe.refuse(
                "unix socket of another network namespace",
                "run outlive in the network namespace of the program",
            )
        })?;
        let kind = UnixKind::required(probe)?;
        let error = has_error(probe.duplicate()?).map_err(|errno| probe.failed("poll", errno))?;
        Ok(Self {
            kind,
            closed: facts.peer.is_none() && facts.shutdown == RECEIVE_SHUT | SEND_SHUT,
            reset: error && kind != UnixKind::Datagram,
            queue: UnixQueue::collect(probe, kind, cx.stopped)?,
        })
    }

    fn check(&self, _: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        cx.resets += usize::from(!self.closed);
        self.queue.validate(self.kind)
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let kind = self.kind.socket_type();
        let fail = |errno| {
            let what = format!("make unix socket fd {}", about.number);
            failed(cx.pid, what, errno)
        };
        let (mine, other) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).map_err(fail)?;
        self.queue
            .restore(&other, self.kind, cx.pid, about.number)?;
        if self.reset {
            // What the other end closes over without reading it is a reset.
            send(&mine, &[0], SendFlags::NOSIGNAL).map_err(fail)?;
        }
        Ok(mine)
    }
}
