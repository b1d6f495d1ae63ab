//! Unix sockets that were never bound or connected.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use crate::ProcessError;
use outlive_state_tree::{StateNode, StateValue};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, socket_with,
};
use std::os::fd::OwnedFd;

/// What sort of connection a unix socket makes.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UnixKind {
    /// `SOCK_STREAM`
    Stream,
    /// `SOCK_SEQPACKET`
    Seqpacket,
    /// `SOCK_DGRAM`
    Datagram,
}

impl UnixKind {
    pub(crate) fn of(probe: &Probe<'_>) -> Result<Option<Self>, ProcessError> {
        let Some(facts) = probe.socket()? else {
            return Ok(None);
        };
        Ok(match facts.kind {
            _ if facts.family != AddressFamily::UNIX => None,
            SocketType::STREAM => Some(Self::Stream),
            SocketType::SEQPACKET => Some(Self::Seqpacket),
            SocketType::DGRAM => Some(Self::Datagram),
            _ => None,
        })
    }

    pub(crate) fn required(probe: &Probe<'_>) -> Result<Self, ProcessError> {
        Self::of(probe)?.ok_or_else(|| probe.failed("tell the type of", Errno::SOCKTNOSUPPORT))
    }

    pub(crate) fn socket_type(self) -> SocketType {
        match self {
            Self::Stream => SocketType::STREAM,
            Self::Seqpacket => SocketType::SEQPACKET,
            Self::Datagram => SocketType::DGRAM,
        }
    }

    pub(crate) fn socket(self) -> Result<OwnedFd, Errno> {
        socket_with(
            AddressFamily::UNIX,
            self.socket_type(),
            SocketFlags::CLOEXEC,
            None,
        )
    }
}

/// The name that a unix socket is bound to: a path, or an abstract name.
pub(crate) fn name(probe: &Probe<'_>) -> Result<Option<SocketAddrUnix>, ProcessError> {
    let any = rustix::net::getsockname(probe.duplicate()?)
        .map_err(|errno| probe.failed("get the name of", errno))?;
    Ok(named(any))
}

/// The name of the socket that a unix socket is connected to.
pub(crate) fn peer_name(probe: &Probe<'_>) -> Result<Option<SocketAddrUnix>, ProcessError> {
    match rustix::net::getpeername(probe.duplicate()?) {
        Ok(any) => Ok(any.and_then(named)),
        Err(Errno::NOTCONN) => Ok(None),
        Err(errno) => Err(probe.failed("get the peer of", errno)),
    }
}

fn named(any: SocketAddrAny) -> Option<SocketAddrUnix> {
    let named = |name: &SocketAddrUnix| {
        let path = name.path_bytes().is_some_and(|path| !path.is_empty());
        path || name.abstract_name().is_some_and(|name| !name.is_empty())
    };
    SocketAddrUnix::try_from(any).ok().filter(named)
}

pub(crate) fn is_connected(probe: &Probe<'_>) -> Result<bool, ProcessError> {
    match rustix::net::getpeername(probe.duplicate()?) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        Err(errno) => Err(probe.failed("get the peer of", errno)),
    }
}

/// A unix socket that was not used yet.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-unix-fresh-v1")]
pub struct UnixFreshState {
    /// Its type.
    pub kind: UnixKind,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

impl Descriptor for UnixFreshState {
    const NAME: &'static str = "unconnected unix socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(UnixKind::of(probe)?.is_some()
            && probe.socket()?.is_some_and(|facts| !facts.listens)
            && !is_connected(probe)?
            && name(probe)?.is_none())
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        Ok(Self {
            kind: UnixKind::required(probe)?,
            options: SocketOptions::collect(probe, cx.memory)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let fail = |errno| {
            failed(
                cx.request.pid,
                format!("make unix socket fd {}", about.number),
                errno,
            )
        };
        let socket = self.kind.socket().map_err(fail)?;
        self.options
            .apply_before_bind(&socket)
            .map_err(|(name, errno)| {
                failed(
                    cx.request.pid,
                    format!("set {name} of fd {}", about.number),
                    errno,
                )
            })?;
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
