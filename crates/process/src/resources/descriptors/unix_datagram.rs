//! Unix datagram sockets with a name, or connected to one: log sockets, mostly.
//!
//! What the socket is bound to is bound again, what it was connected to is connected again once
//! all sockets have their names. Where nobody is there any more, the socket stays unconnected and a
//! notice says so: a program sees what it would see had its log daemon been restarted.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, Reconnect, RecreateContext};
use super::probe::{Probe, failed, show};
use super::socket_options::SocketOptions;
use super::unix_diag::{RECEIVE_SHUT, SEND_SHUT};
use super::unix_fresh::{UnixKind, name, peer_name};
use super::unix_name::UnixName;
use super::unix_pair::shut_down;
use super::unix_queue::UnixQueue;
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, connect};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

/// What a socket is connected to: one of both.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,unix-peer-v1")]
pub struct UnixPeer {
    /// An abstract name.
    pub abstract_name: Option<Vec<u8>>,
    /// An absolute path.
    pub path: Option<Vec<u8>>,
}

impl UnixPeer {
    fn of(address: &SocketAddrUnix, pid: u32) -> Self {
        let path = address.path_bytes().map(|path| {
            let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let path = std::ffi::OsStr::from_bytes(path);
            directory.join(path).as_os_str().as_bytes().to_vec()
        });
        Self {
            abstract_name: address.abstract_name().map(<[u8]>::to_vec),
            path,
        }
    }

    fn address(&self) -> Result<SocketAddrUnix, ProcessError> {
        let made = match (&self.abstract_name, &self.path) {
            (Some(name), None) => SocketAddrUnix::new_abstract_name(name),
            (None, Some(path)) => SocketAddrUnix::new(&path[..]),
            _ => Err(Errno::INVAL),
        };
        made.map_err(|_| ProcessError::Image("a unix socket has no usable peer".into()))
    }

    fn shown(&self) -> String {
        match (&self.abstract_name, &self.path) {
            (Some(name), _) => format!("@{}", show(name)),
            (None, path) => show(path.as_deref().unwrap_or_default()),
        }
    }
}

/// A datagram socket.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-unix-datagram-v1")]
pub struct UnixDatagramState {
    /// Nothing more can be received (`SHUT_RD`).
    pub receive_shut: bool,
    /// Nothing more can be sent (`SHUT_WR`).
    pub send_shut: bool,
    /// Its own name, if it has one.
    #[state(child)]
    pub bound: Option<UnixName>,
    /// To what it is connected, if it is.
    #[state(child)]
    pub peer: Option<UnixPeer>,
    /// What waits to be read.
    #[state(child)]
    pub queue: UnixQueue,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

const KIND: UnixKind = UnixKind::Datagram;

impl Descriptor for UnixDatagramState {
    const NAME: &'static str = "unix datagram socket";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(UnixKind::of(probe)? == Some(KIND)
            && (peer_name(probe)?.is_some() || name(probe)?.is_some()))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let shut = cx.around.unix(probe)?.map_or(0, |facts| facts.shutdown);
        let peer = peer_name(probe)?;
        Ok(Self {
            receive_shut: shut & RECEIVE_SHUT != 0,
            send_shut: shut & SEND_SHUT != 0,
            bound: UnixName::collect(probe)?,
            peer: peer.map(|address| UnixPeer::of(&address, probe.target.pid)),
            options: SocketOptions::collect(probe, cx.memory)?,
            queue: UnixQueue::collect(probe, KIND, cx.stopped)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let pid = cx.request.pid;
        let what = || format!("make unix socket fd {}", about.number);
        self.queue.validate(KIND)?;
        if let Some(peer) = &self.peer {
            peer.address()?;
        }
        let socket = KIND.socket().map_err(|e| failed(pid, what(), e))?;
        self.options
            .apply_before_bind(&socket)
            .map_err(|(name, e)| failed(pid, format!("set {name} of fd {}", about.number), e))?;
        if let Some(name) = &self.bound {
            if name.is_taken(KIND)? {
                return Err(cx.refuse(
                    about,
                    format!(
                        "somebody else has unix socket {}{}",
                        name.shown(),
                        name.holder()
                    ),
                    "end the program that has it, then restore again",
                ));
            }
            if name.file.is_none() {
                // An abstract name leaves nothing on disk: it is taken right now.
                name.bind(&socket, &mut Vec::new())?;
            }
        }
        cx.hold(about, socket);
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let socket = cx.take(about)?;
        let fail = |what: &str, errno| {
            failed(
                cx.pid,
                format!("{what} unix socket fd {}", about.number),
                errno,
            )
        };
        if let Some(name) = &self.bound {
            if name.file.is_some() {
                name.bind(&socket, &mut cx.created)?;
            }
            let fill = || {
                let sender = KIND.socket()?;
                connect(&sender, &name.address().map_err(|_| Errno::INVAL)?)?;
                self.queue.send_through(&sender, KIND)
            };
            if !self.queue.lengths.is_empty()
                && let Err(errno) = fill()
            {
                cx.notices.push(format!(
                    "datagrams that waited at unix socket {} are lost: {errno}",
                    name.shown()
                ));
            }
        }
        self.options
            .apply_last(&socket)
            .map_err(|(name, errno)| fail(&format!("set {name} of"), errno))?;
        shut_down(&socket, self.receive_shut, self.send_shut).map_err(|e| fail("shut down", e))?;
        if let Some(peer) = &self.peer {
            let socket = socket.try_clone().map_err(|e| ProcessError::Kernel {
                pid: cx.pid,
                what: format!("duplicate fd {}", about.number),
                source: e,
            })?;
            cx.reconnects.push(Reconnect {
                socket,
                address: peer.address()?,
                what: format!(
                    "unix socket fd {} of pid {} could not be connected to {} again",
                    about.number,
                    about.process,
                    peer.shown()
                ),
            });
        }
        Ok(socket)
    }
}
