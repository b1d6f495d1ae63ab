//! TCP connections with both ends in the subject.
//!
//! Each end is saved with what it has received and what it wrote that the other end has not
//! received yet. Both are made again, connected to each other without a handshake, under the same
//! addresses. An end whose other end has been closed is kept too, as what it has to read goes on
//! to be there; then the other end is made and closed.
//!
//! # What differs afterwards
//! Sequence numbers, congestion control and `TCP_INFO` begin anew. `SHUT_RD` is forgotten.
//!
//! # What is lost
//! A connection that could not be looked at without `CAP_NET_ADMIN`, or cannot be made again: its ends
//! are found reset, and the restore says so.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::inet::{self, InetAddress, tcp_state};
use super::probe::{Probe, SocketSort};
use super::socket_options::SocketOptions;
use super::table::FdTable;
use super::tcp_flow::{End, Flow};
use super::tcp_reset::TcpResetState;
use super::unix_pair::PairSide;
use super::{Description, inet_diag};
use crate::ProcessError;
use outlive_linux::sockopt;
use outlive_linux::tcp::{self, Queue, Repair, Windows};
use outlive_state_tree::StateNode;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, bind, connect, send, shutdown};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

/// `SO_BUF_LOCK`
const BUF_LOCK: i32 = 72;
/// More than this does not wait in one direction of a connection, bytes.
const MOST: usize = 64 << 20;
/// What a buffer needs beyond the bytes in it.
const SPARE: u32 = 256 * 1024;
/// Scale of windows, as the kernel chooses it for its usual buffer sizes.
const SCALE: u32 = 7;
/// The largest window with that scale.
const LARGEST_WINDOW: u32 = 65535 << SCALE;

/// One end of a connection within the subject.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-tcp-pair-end-v1")]
pub struct TcpPairEndState {
    /// IP version of the socket, 4 or 6.
    pub version: u32,
    /// Names the connection within the table.
    pub pair: u32,
    /// Which end of it.
    pub side: PairSide,
    /// This end.
    #[state(child)]
    pub local: InetAddress,
    /// The other end.
    #[state(child)]
    pub peer: InetAddress,
    /// The other end is in nobody's hands any more.
    pub peer_closed: bool,
    /// It has ended its stream (`SHUT_WR`).
    pub send_shut: bool,
    /// What it has received and not read.
    pub received: Vec<u8>,
    /// What it has written and the other end has not received.
    pub under_way: Vec<u8>,
    /// Sizes of the buffers for receiving and for sending, as they are now.
    pub buffers: Vec<u32>,
    /// What was set on it.
    #[state(child)]
    pub options: SocketOptions,
}

/// What was found of one end before descriptions are collected one by one.
#[derive(Debug)]
pub(crate) struct Found {
    pair: u32,
    side: PairSide,
    local: InetAddress,
    peer: InetAddress,
    peer_closed: bool,
    send_shut: bool,
    received: Vec<u8>,
    under_way: Vec<u8>,
}

/// A socket in a connection, with its addresses.
struct Socket<'a> {
    probe: &'a Probe<'a>,
    state: u8,
    /// As the socket tells them, and as another one names them.
    told: [InetAddress; 2],
    local: SocketAddr,
    peer: SocketAddr,
}

impl Socket<'_> {
    fn end(&self) -> Result<End<'_>, ProcessError> {
        Ok(End {
            socket: self.probe.duplicate()?,
            state: self.state,
        })
    }

    /// Whether the other end can only be on this host.
    fn is_local(&self) -> bool {
        self.peer.ip().is_loopback() || self.peer.ip() == self.local.ip()
    }
}

/// The address as its peer names it: a socket of version 6 may speak version 4.
fn canonical(address: &InetAddress) -> Result<SocketAddr, ProcessError> {
    let address = address.socket_address()?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

fn connected<'a>(probe: &'a Probe<'a>) -> Result<Option<Socket<'a>>, ProcessError> {
    let Some(state) = inet::tcp_state_of(probe)? else {
        return Ok(None);
    };
    if !tcp_state::is_connection(state) {
        return Ok(None);
    }
    let (Some(local), Some(peer)) = (inet::local(probe)?, inet::peer(probe)?) else {
        return Ok(None);
    };
    Ok(Some(Socket {
        probe,
        state,
        local: canonical(&local)?,
        peer: canonical(&peer)?,
        told: [local, peer],
    }))
}

/// Finds the connections of which both ends are among these, or the other end was closed, and if
/// the subject is `stopped` what is under way in them. By inode. And the peers, on this host, of those
/// that have no other end in the subject.
pub(crate) fn find<'a>(
    probes: impl Iterator<Item = &'a Probe<'a>>,
    stopped: bool,
    known: &HashMap<u64, SocketSort>,
) -> Result<(HashMap<u64, Found>, HashSet<SocketAddr>), ProcessError> {
    let mut sockets = Vec::new();
    for probe in probes {
        sockets.extend(connected(probe)?);
    }
    let places: HashMap<_, _> = sockets.iter().map(|s| ((s.local, s.peer), s)).collect();
    let (mut found, mut lone) = (HashMap::new(), HashSet::new());
    for socket in &sockets {
        let pair = found.len() as u32;
        match places.get(&(socket.peer, socket.local)) {
            Some(other) if socket.probe.info.inode < other.probe.info.inode => {
                for end in [socket, other] {
                    if stopped && !known.contains_key(&end.probe.info.inode) {
                        tcp::end_repair_of_the_dead(end.probe.duplicate()?);
                    }
                }
                if let Some([there, back]) = flows(socket, other, stopped)? {
                    let place = (pair, PairSide::First, false);
                    let one = note(socket, place, back.received, there.under_way)?;
                    let place = (pair, PairSide::Second, false);
                    let two = note(other, place, there.received, back.under_way)?;
                    found.insert(socket.probe.info.inode, one);
                    found.insert(other.probe.info.inode, two);
                }
            }
            None if socket.state == 8 && socket.is_local() => {
                let received = if stopped {
                    tcp::waiting(socket.probe.duplicate()?).ok()
                } else {
                    Some(Vec::new())
                };
                if let Some(received) = received {
                    let place = (pair, PairSide::First, true);
                    let state = note(socket, place, received, Vec::new())?;
                    found.insert(socket.probe.info.inode, state);
                }
            }
            None if socket.is_local() => drop(lone.insert(socket.peer)),
            _ => {}
        }
    }
    Ok((found, lone))
}

/// What is under way from the first to the second, and back; `None` where it cannot be read, or is
/// too much.
fn flows(
    one: &Socket<'_>,
    two: &Socket<'_>,
    stopped: bool,
) -> Result<Option<[Flow; 2]>, ProcessError> {
    if !stopped {
        return Ok(Some([Flow::default(), Flow::default()]));
    }
    let (one, two) = (one.end()?, two.end()?);
    let flows = Flow::read(one, two).and_then(|there| Ok([there, Flow::read(two, one)?]));
    let fits = |flow: &Flow| flow.received.len() <= MOST && flow.under_way.len() <= MOST;
    Ok(flows
        .inspect_err(|errno| tracing::debug!("a TCP connection cannot be looked at: {errno}"))
        .ok()
        .filter(|flows| flows.iter().all(fits)))
}

fn note(
    socket: &Socket<'_>,
    (pair, side, peer_closed): (u32, PairSide, bool),
    received: Vec<u8>,
    under_way: Vec<u8>,
) -> Result<Found, ProcessError> {
    let [local, peer] = socket.told.clone();
    Ok(Found {
        pair,
        side,
        local,
        peer,
        peer_closed,
        send_shut: socket.end()?.has_shut(),
        received,
        under_way,
    })
}

impl Descriptor for TcpPairEndState {
    const NAME: &'static str = "TCP connection within the program";

    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError> {
        Ok(around.tcp.borrow().contains_key(&probe.info.inode))
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let found = cx.around.tcp.borrow_mut().remove(&probe.info.inode);
        let found = found.ok_or_else(|| probe.failed("find the peer of", Errno::NOTCONN))?;
        let mut options = SocketOptions::collect(probe, cx.memory)?;
        // These are of the moment, or cannot be set once there is a connection.
        (options.incoming_cpu, options.fast_open) = (None, None);
        (options.multicast_ttl, options.multicast_hops) = (None, None);
        let socket = probe.duplicate()?;
        let size = |name| {
            let size = sockopt::get_u32(socket, libc::SOL_SOCKET, name);
            size.map_err(|errno| probe.failed("read options of", errno))
        };
        let buffers = [size(libc::SO_RCVBUF)?, size(libc::SO_SNDBUF)?];
        Ok(Self {
            version: inet::version(probe)?,
            pair: found.pair,
            side: found.side,
            local: found.local,
            peer: found.peer,
            peer_closed: found.peer_closed,
            send_shut: found.send_shut,
            received: found.received,
            under_way: found.under_way,
            buffers: buffers.map(|size| size.unwrap_or(0)).to_vec(),
            options,
        })
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        match cx.tcp.remove(&(self.pair, self.side)) {
            Some(fd) => Ok(fd),
            None => {
                let lost = TcpResetState {
                    version: self.version,
                    local: Some(self.local.clone()),
                    peer: Some(self.peer.clone()),
                };
                lost.recreate(about, cx)
            }
        }
    }

    fn check(&self, _: &About, _: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        Ok(())
    }
}

fn ends(table: &FdTable) -> impl Iterator<Item = &TcpPairEndState> {
    table.descriptions.iter().filter_map(|d| match &d.object {
        Description::TcpPairEnd(end) => Some(end),
        _ => None,
    })
}

/// An image is hostile: every end has one other end that is connected to it, or none where that
/// was closed, and what waits is not without bounds.
pub(crate) fn validate(table: &FdTable) -> Result<(), ProcessError> {
    let bad = |end: &TcpPairEndState, what: &str| {
        let text = format!("TCP connection {} {what}", end.pair);
        Err(ProcessError::Image(text))
    };
    let mut all: HashMap<(u32, PairSide), &TcpPairEndState> = HashMap::new();
    for end in ends(table) {
        if all.insert((end.pair, end.side), end).is_some() {
            return bad(end, "has an end twice");
        }
        if end.received.len() > MOST || end.under_way.len() > MOST || end.buffers.len() != 2 {
            return bad(end, "has queues or buffers that cannot be");
        }
    }
    for end in all.values() {
        let (local, peer) = (canonical(&end.local)?, canonical(&end.peer)?);
        let other = all.get(&(end.pair, end.side.other()));
        let fits = match other {
            None => end.peer_closed && end.under_way.is_empty(),
            Some(other) => {
                let theirs = (canonical(&other.peer)?, canonical(&other.local)?);
                !end.peer_closed && (local, peer) == theirs
            }
        };
        let versions = matches!(end.version, 4 | 6) && (end.version == 6 || local.is_ipv4());
        if !fits || !versions || local.is_ipv4() != peer.is_ipv4() {
            return bad(end, "does not have two ends that fit");
        }
    }
    Ok(())
}

/// Has the kernel forget what it still keeps of these connections from the program's earlier life,
/// and nobody has open: it would be in the way of sockets that are to listen on their ports.
pub(crate) fn forget_earlier_life(table: &FdTable) {
    for end in ends(table) {
        if let (Ok(local), Ok(peer)) = (canonical(&end.local), canonical(&end.peer)) {
            inet_diag::forget_if_orphan(local, peer);
            inet_diag::forget_if_orphan(peer, local);
        }
    }
}

/// Makes all connections of a table, by number and end. One that cannot be made is left out, and
/// told of.
pub(crate) fn make(
    table: &FdTable,
    notices: &mut Vec<String>,
) -> HashMap<(u32, PairSide), OwnedFd> {
    let by_end: HashMap<_, _> = ends(table).map(|end| ((end.pair, end.side), end)).collect();
    let (mut made, mut done) = (HashMap::new(), HashSet::new());
    let mut failed: HashMap<String, u32> = HashMap::new();
    for end in ends(table) {
        if !done.insert(end.pair) {
            continue;
        }
        let closed = closed_end(end);
        let other = by_end.get(&(end.pair, end.side.other()));
        match join(end, other.copied().unwrap_or(&closed)) {
            Ok([one, two]) => {
                made.insert((end.pair, end.side), one);
                if other.is_some() {
                    made.insert((end.pair, end.side.other()), two);
                }
            }
            Err((what, errno)) => {
                *failed.entry(format!("{what}: {errno}")).or_default() += 1;
            }
        }
    }
    notices.extend(failed.into_iter().map(|(why, count)| {
        format!("TCP connections within the program that were reset: {count} ({why})")
    }));
    made
}

/// The other end of one whose other end was closed.
fn closed_end(end: &TcpPairEndState) -> TcpPairEndState {
    TcpPairEndState {
        local: end.peer.clone(),
        peer: end.local.clone(),
        side: end.side.other(),
        peer_closed: false,
        send_shut: true,
        received: Vec::new(),
        under_way: Vec::new(),
        options: SocketOptions::default(),
        ..end.clone()
    }
}

type Failed = (&'static str, Errno);

fn size(length: usize) -> u32 {
    // At most four times MOST.
    (length as u32).saturating_mul(4).saturating_add(SPARE)
}

/// Sets the size of a buffer as it is read; the kernel doubles what it is told.
fn set_buffer(socket: &OwnedFd, names: [i32; 2], size: u32) -> Result<(), Failed> {
    let half = (size / 2).min(i32::MAX as u32 / 2);
    let set = |name| sockopt::set_u32(socket.as_fd(), libc::SOL_SOCKET, name, half);
    set(names[0])
        .or_else(|_| set(names[1]))
        .map_err(|errno| ("setting the size of a buffer", errno))
}

const RECEIVE: [i32; 2] = [libc::SO_RCVBUFFORCE, libc::SO_RCVBUF];
const SEND: [i32; 2] = [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF];

impl TcpPairEndState {
    fn buffer(&self, which: usize) -> u32 {
        self.buffers.get(which).copied().unwrap_or(0)
    }

    /// How much the other end may send at first.
    fn window(&self) -> u32 {
        let used = self.received.len() as u32;
        (self.buffer(0) / 2)
            .saturating_sub(used)
            .min(LARGEST_WINDOW)
    }

    /// A socket with this end's address, and sequence numbers of its streams in and out.
    fn socket(&self, numbers: [u32; 2]) -> Result<OwnedFd, Failed> {
        let socket = inet::tcp_socket(self.version).map_err(|e| ("making a socket", e))?;
        self.options.apply_before_bind(&socket)?;
        set_buffer(
            &socket,
            RECEIVE,
            self.buffer(0).max(size(self.received.len())),
        )?;
        set_buffer(
            &socket,
            SEND,
            self.buffer(1).max(size(self.under_way.len())),
        )?;
        let [local, peer] = [&self.local, &self.peer].map(InetAddress::socket_address);
        let (Ok(local), Ok(peer)) = (local, peer) else {
            return Err(("understanding an address", Errno::INVAL));
        };
        let connect = || {
            let repair = Repair::begin(socket.as_fd())?;
            bind(&socket, &local)?;
            repair.set_sequence(Queue::Received, numbers[0])?;
            repair.set_sequence(Queue::Sent, numbers[1])?;
            connect(&socket, &peer)
        };
        connect().map_err(|errno| match errno {
            Errno::PERM => ("it needs CAP_NET_ADMIN", errno),
            errno => ("connecting without a handshake", errno),
        })?;
        Ok(socket)
    }

    /// Puts its queue in, and agrees with the other end as a handshake would have.
    fn fill(&self, socket: &OwnedFd, other: (&Self, &OwnedFd)) -> Result<(), Errno> {
        let repair = Repair::begin(socket.as_fd())?;
        let segment = sockopt::tcp_info(other.1.as_fd())?.map_or(0, |info| info.advertised);
        repair.agree(segment, SCALE)?;
        repair.receive(&self.received)?;
        let at = repair.sequence(Queue::Received)?;
        repair.set_windows(Windows {
            told_by: at,
            send: other.0.window(),
            receive: self.window(),
            told_at: at,
        })
    }

    /// Sends what was under way, ends the stream if it was, and sets what is left to be set.
    fn finish(&self, socket: &OwnedFd) -> Result<(), Failed> {
        let mut rest = &self.under_way[..];
        while !rest.is_empty() {
            let sent = send(socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                .map_err(|errno| ("sending what was under way", errno))?;
            rest = &rest[sent..];
        }
        if self.send_shut {
            shutdown(socket, Shutdown::Write).map_err(|errno| ("ending a stream", errno))?;
        }
        set_buffer(socket, RECEIVE, self.buffer(0))?;
        set_buffer(socket, SEND, self.buffer(1))?;
        let locked = |size: Option<u32>, bit| if size.is_some() { bit } else { 0 };
        let options = &self.options;
        let locks = locked(options.send_buffer, 1) | locked(options.receive_buffer, 2);
        sockopt::set_u32(socket.as_fd(), libc::SOL_SOCKET, BUF_LOCK, locks)
            .map_err(|errno| ("SO_BUF_LOCK", errno))?;
        options.apply_last(socket)
    }
}

/// Makes both ends of a connection.
fn join(one: &TcpPairEndState, two: &TcpPairEndState) -> Result<[OwnedFd; 2], Failed> {
    let random = RandomState::new().hash_one(one.pair);
    let numbers = [random as u32, (random >> 32) as u32];
    let behind =
        |number: u32, end: &TcpPairEndState| number.wrapping_add(end.received.len() as u32);
    let first = one.socket([numbers[0], behind(numbers[1], two)])?;
    let second = two.socket([numbers[1], behind(numbers[0], one)])?;
    let fill = || {
        one.fill(&first, (two, &second))?;
        two.fill(&second, (one, &first))
    };
    fill().map_err(|errno| ("putting its queues in", errno))?;
    one.finish(&first)?;
    two.finish(&second)?;
    let state = sockopt::tcp_info(first.as_fd()).map_err(|errno| ("TCP_INFO", errno))?;
    if state.is_some_and(|info| info.state == tcp_state::CLOSED)
        && !(one.send_shut && two.send_shut)
    {
        return Err(("the new connection broke", Errno::CONNRESET));
    }
    Ok([first, second])
}
