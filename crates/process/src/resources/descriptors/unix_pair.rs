//! Unix connections with both ends in the subject, however they were made: `socketpair`, or
//! `connect` and `accept` between its processes.
//!
//! Each end is saved with what waits to be read from it. Both are made again as a socket pair, or,
//! for the sake of their names, by accepting one ([`super::unix_accepted`]).
//!
//! # What differs afterwards
//! `SO_PEERCRED` tells of the restorer.
//!
//! # What it refuses
//! An abstract name whose listening socket is not in the subject, at a restore where somebody else has
//! it ([`super::unix_name`]).

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use super::socket_options::SocketOptions;
use super::table::FdTable;
use super::unix_accepted::Named;
use super::unix_fresh::{UnixKind, is_connected, name};
use super::unix_name::UnixName;
use super::unix_queue::UnixQueue;
use super::{Description, unix_diag};
use crate::ProcessError;
use outlive_state_tree::{StateNode, StateValue};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, shutdown, socketpair};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Which end.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PairSide {
    /// One of them.
    First,
    /// The other.
    Second,
}

impl PairSide {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// One end of a connection within the subject.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-unix-pair-end-v1")]
pub struct UnixPairEndState {
    /// Its type.
    pub kind: UnixKind,
    /// Names the connection within the table.
    pub pair: u32,
    /// Which end of it.
    pub side: PairSide,
    /// Nothing more can be received (`SHUT_RD`).
    pub receive_shut: bool,
    /// Nothing more can be sent (`SHUT_WR`).
    pub send_shut: bool,
    /// The path that it, or the socket which accepted it, was bound to, as that was given.
    pub path: Option<Vec<u8>>,
    /// Its own name, if it has one.
    #[state(child)]
    pub bound: Option<UnixName>,
    /// What waits to be read from it.
    #[state(child)]
    pub queue: UnixQueue,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

impl Descriptor for UnixPairEndState {
    const NAME: &'static str = "unix connection within the program";

    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError> {
        Ok(UnixKind::of(probe)?.is_some()
            && probe.socket()?.is_some_and(|facts| !facts.listens)
            && is_connected(probe)?
            && partner(probe, around)?.is_some())
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let inode = probe.info.inode;
        let peer = partner(probe, cx.around)?
            .ok_or_else(|| probe.failed("find the peer of", Errno::NOTCONN))?;
        let next = cx.pairs.len() as u32;
        let pair = *cx.pairs.entry(inode.min(peer)).or_insert(next);
        let shut = cx.around.unix(probe)?.map_or(0, |facts| facts.shutdown);
        let kind = UnixKind::required(probe)?;
        Ok(Self {
            kind,
            pair,
            side: if inode < peer {
                PairSide::First
            } else {
                PairSide::Second
            },
            receive_shut: shut & unix_diag::RECEIVE_SHUT != 0,
            send_shut: shut & unix_diag::SEND_SHUT != 0,
            path: given_path(probe)?,
            bound: UnixName::if_found(probe)?,
            options: SocketOptions::collect(probe, cx.memory)?,
            queue: UnixQueue::collect(probe, kind, cx.stopped)?,
        })
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        if let Some(name) = self.lone_name(&listening(cx.table))
            && first_of(cx.table, self.kind, name) == Some(about.index)
        {
            name.reserve(about, self.kind, cx)?;
        }
        if let Some(path) = &self.path
            && (path.is_empty() || SocketAddrUnix::new(&path[..]).is_err())
        {
            let what = format!("fd {} has an impossible name", about.number);
            return Err(ProcessError::Image(what));
        }
        self.queue.validate(self.kind)
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        cx.pairs.remove(&(self.pair, self.side)).ok_or_else(|| {
            ProcessError::Image(format!("fd {} is an end of no connection", about.number))
        })
    }
}

impl UnixPairEndState {
    /// Its abstract name, if no socket of the subject listens on that.
    pub(crate) fn lone_name(&self, listening: &Listening) -> Option<&UnixName> {
        let name = self.bound.as_ref().filter(|n| n.abstract_name.is_some())?;
        (!listening.contains_key(&name.key())).then_some(name)
    }
}

/// The place of the first end of this kind that has a name.
fn first_of(table: &FdTable, kind: UnixKind, name: &UnixName) -> Option<usize> {
    let has = |end: &UnixPairEndState| end.kind == kind && end.bound.as_ref() == Some(name);
    let mut ends = ends(table);
    ends.find(|(_, end)| has(end)).map(|(about, _)| about.index)
}

/// The path that a socket is bound to, if it can be bound to it again.
fn given_path(probe: &Probe<'_>) -> Result<Option<Vec<u8>>, ProcessError> {
    let path = name(probe)?.and_then(|name| name.path_bytes().map(<[u8]>::to_vec));
    Ok(path.filter(|path| SocketAddrUnix::new(&path[..]).is_ok()))
}

/// The socket at the other end, if it is inside and its peer is this one.
fn partner(probe: &Probe<'_>, around: &Around) -> Result<Option<u64>, ProcessError> {
    let inode = probe.info.inode;
    let Some(peer) = around.unix(probe)?.and_then(|facts| facts.peer) else {
        return Ok(None);
    };
    if peer == inode || !around.sockets.contains(&peer) {
        return Ok(None);
    }
    // Datagram sockets may be connected one way only.
    let back = around.unix_of(probe, peer)?.and_then(|facts| facts.peer);
    Ok((back == Some(inode)).then_some(peer))
}

pub(crate) fn ends(table: &FdTable) -> impl Iterator<Item = (About, &UnixPairEndState)> {
    table.each().filter_map(|(about, d)| match &d.object {
        Description::UnixPairEnd(end) => Some((about, end)),
        _ => None,
    })
}

/// Whether every end has its other end.
pub(crate) fn validate(table: &FdTable) -> Result<(), ProcessError> {
    let bad = |pair: u32| {
        Err(ProcessError::Image(format!(
            "connection {pair} does not have two ends that fit"
        )))
    };
    let mut kinds = HashMap::new();
    for (_, end) in ends(table) {
        if kinds.insert((end.pair, end.side), end.kind).is_some() {
            return bad(end.pair);
        }
    }
    for (&(pair, side), kind) in &kinds {
        if kinds.get(&(pair, side.other())) != Some(kind) {
            return bad(pair);
        }
    }
    Ok(())
}

/// Makes all connections of a table, by number and end; some of them are made and named already.
/// `held` are sockets that were bound to names.
pub(crate) fn make(
    table: &FdTable,
    pid: u32,
    named: Named,
    held: &mut HashMap<usize, OwnedFd>,
    created: &mut Vec<PathBuf>,
) -> Result<HashMap<(u32, PairSide), OwnedFd>, ProcessError> {
    let mut made = named.ends;
    for (about, end) in ends(table) {
        if made.contains_key(&(end.pair, end.side)) {
            continue;
        }
        let kind = end.kind.socket_type();
        let (one, two) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .map_err(|e| failed(pid, format!("make unix socket fd {}", about.number), e))?;
        made.insert((end.pair, end.side), one);
        made.insert((end.pair, end.side.other()), two);
    }
    let listening = listening(table);
    for (about, _) in ends(table) {
        // It stood for this name until now.
        held.remove(&about.index);
    }
    for (about, end) in ends(table) {
        let fd = made_end(&made, end.pair, end.side)?;
        let set = end.options.apply_before_bind(fd);
        set.and_then(|()| end.options.apply_last(fd))
            .map_err(|(name, e)| failed(pid, format!("set {name} of fd {}", about.number), e))?;
        if let Some(name) = &end.bound
            && !listening.contains_key(&name.key())
            && !named.settled.contains(&(end.pair, end.side))
        {
            match name.abstract_name {
                Some(_) => name.bind(fd, created)?,
                None => name.bind_if_free(fd, end.kind, created),
            }
        }
    }
    for (about, end) in ends(table) {
        let other = made_end(&made, end.pair, end.side.other())?;
        end.queue.restore(other, end.kind, pid, about.number)?;
    }
    for (about, end) in ends(table) {
        let fd = made_end(&made, end.pair, end.side)?;
        shut_down(fd, end.receive_shut, end.send_shut)
            .map_err(|e| failed(pid, format!("shut fd {} down", about.number), e))?;
    }
    Ok(made)
}

pub(crate) fn shut_down(fd: &OwnedFd, receive: bool, send: bool) -> Result<(), Errno> {
    for (shut, how) in [(receive, Shutdown::Read), (send, Shutdown::Write)] {
        if shut {
            shutdown(fd, how)?;
        }
    }
    Ok(())
}

fn made_end(
    made: &HashMap<(u32, PairSide), OwnedFd>,
    pair: u32,
    side: PairSide,
) -> Result<&OwnedFd, ProcessError> {
    made.get(&(pair, side))
        .ok_or_else(|| ProcessError::Image(format!("connection {pair} lacks an end")))
}

/// The names of listening sockets, and the places of these in the table.
pub(crate) type Listening = HashMap<(bool, Vec<u8>), usize>;

/// See [`Listening`].
pub(crate) fn listening(table: &FdTable) -> Listening {
    let named = |(index, d)| Some((listens_as(d)?, index));
    table
        .descriptions
        .iter()
        .enumerate()
        .filter_map(named)
        .collect()
}

/// The name of a listening socket: an end that it accepted has the same one.
fn listens_as(description: &super::OpenDescription) -> Option<(bool, Vec<u8>)> {
    match &description.object {
        Description::UnixListen(state) => Some(match (&state.abstract_name, &state.file) {
            (Some(name), _) => (true, name.clone()),
            (None, Some(file)) => (false, file.path.clone()),
            (None, None) => return None,
        }),
        _ => None,
    }
}
