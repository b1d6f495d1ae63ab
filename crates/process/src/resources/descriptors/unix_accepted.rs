//! Connections of which one end was accepted, and so has the name of the socket that listened.
//!
//! Two sockets cannot be bound to one name, so such a connection is made again as it was made
//! first: by listening, connecting and accepting.
//!
//! # Rules
//! - An abstract name is that of a listening socket of the subject, which has it already: it
//!   listens early, and whoever else connects before our end does is turned away. Where several ends
//!   have the name of a socket that is there no more, the one that stands for it meanwhile listens.
//! - A path is bound, as it was given, in a root directory of our own ([`in_private_root`]): the
//!   file that is there outside is not touched, and a path of an image leads nowhere else.
//! - A path whose file is gone, or somebody else's now, is given to a connecting end the same way.
//! - What does not work leaves the connection to be a pair without that name, and a notice says so.

use super::context::About;
use super::probe::show;
use super::table::FdTable;
use super::unix_fresh::UnixKind;
use super::unix_name::UnixName;
use super::unix_pair::{Listening, PairSide, UnixPairEndState, ends, listening};
use outlive_linux::private_root::{PrivateRoot, in_private_root};
use rustix::fs::{Mode, OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, SocketFlags, accept_with, bind, connect, listen};
use std::collections::HashMap;
use std::os::fd::OwnedFd;

/// So many who connect before our own end are turned away.
const STRANGERS: usize = 64;

type Key = (u32, PairSide);

/// How one connection is made.
struct Plan<'a> {
    accepted: Key,
    kind: UnixKind,
    /// For messages.
    number: u32,
    name: Name<'a>,
    /// The path of the connecting end, if it is not bound outside.
    connecting: Option<&'a [u8]>,
}

enum Name<'a> {
    /// Of this socket, which has it.
    Abstract(&'a [u8], &'a OwnedFd),
    Path(&'a [u8]),
}

impl Plan<'_> {
    fn needs_root(&self) -> bool {
        self.connecting.is_some() || matches!(self.name, Name::Path(_))
    }

    fn notice(&self, errno: Errno) -> String {
        let name = match self.name {
            Name::Abstract(name, _) => format!("@{}", show(name)),
            Name::Path(path) => show(path),
        };
        let number = self.number;
        format!("unix connection fd {number} has lost its name {name}: {errno}")
    }

    /// The accepted and the connecting end. Of those that need one, in an empty root directory.
    fn make(&self) -> Result<(OwnedFd, OwnedFd), Errno> {
        let connecting = self.kind.socket()?;
        if let Some(path) = self.connecting {
            bind_privately(&connecting, path)?;
        }
        match self.name {
            Name::Abstract(name, listener) => {
                let address = SocketAddrUnix::new_abstract_name(name)?;
                Ok((connected(listener, &connecting, &address)?, connecting))
            }
            Name::Path(path) => {
                let listener = self.kind.socket()?;
                let address = bind_privately(&listener, path)?;
                let accepted = connected(&listener, &connecting, &address)?;
                // Without its file, nobody takes it for the one outside.
                rustix::fs::unlink(path)?;
                Ok((accepted, connecting))
            }
        }
    }
}

/// Binds a socket to a path, whose directories are made.
fn bind_privately(socket: &OwnedFd, path: &[u8]) -> Result<SocketAddrUnix, Errno> {
    let address = SocketAddrUnix::new(path)?;
    for (at, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
        match rustix::fs::mkdir(&path[..at], Mode::RWXU) {
            // What is before the first slash of an absolute path is no name.
            Ok(()) | Err(Errno::EXIST | Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    bind(socket, &address)?;
    Ok(address)
}

/// Connects to a bound socket and accepts that. The queue has room for one connection: it is ours
/// if there was room.
fn connected(
    listener: &OwnedFd,
    connecting: &OwnedFd,
    address: &SocketAddrUnix,
) -> Result<OwnedFd, Errno> {
    listen(listener, 0)?;
    let accept = || accept_with(listener, SocketFlags::CLOEXEC);
    let attempt = || {
        for _ in 0..STRANGERS {
            match connect(connecting, address) {
                Ok(()) => return accept(),
                Err(Errno::AGAIN) => drop(accept()?),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::AGAIN)
    };
    fcntl_setfl(listener, OFlags::NONBLOCK)?;
    fcntl_setfl(connecting, OFlags::NONBLOCK)?;
    let made = attempt();
    fcntl_setfl(listener, OFlags::empty())?;
    fcntl_setfl(connecting, OFlags::empty())?;
    made
}

/// What was made.
#[derive(Default)]
pub(crate) struct Named {
    /// The ends, by connection.
    pub ends: HashMap<Key, OwnedFd>,
    /// Whose names were settled: they are bound nowhere.
    pub settled: Vec<Key>,
}

impl Named {
    fn add(&mut self, plan: &Plan<'_>, made: Result<(OwnedFd, OwnedFd), Errno>) -> Option<String> {
        let (accepted, connecting) = match made {
            Ok(ends) => ends,
            Err(errno) => return Some(plan.notice(errno)),
        };
        let (pair, side) = plan.accepted;
        self.ends.insert((pair, side), accepted);
        self.ends.insert((pair, side.other()), connecting);
        self.settled.push((pair, side));
        if plan.connecting.is_some() {
            self.settled.push((pair, side.other()));
        }
        None
    }
}

/// Makes the connections of a table of which an end was accepted. `held` are its sockets that are
/// bound to abstract names.
pub(crate) fn make(
    table: &FdTable,
    held: &HashMap<usize, OwnedFd>,
    notices: &mut Vec<String>,
) -> Named {
    let plans = plans(table, held);
    let mut named = Named::default();
    let (private, open): (Vec<_>, Vec<_>) = plans.iter().partition(|plan| plan.needs_root());
    for plan in open {
        notices.extend(named.add(plan, plan.make()));
    }
    if private.is_empty() {
        return named;
    }
    let work = |root: &mut PrivateRoot| {
        let make = |plan: &&Plan<'_>| root.renew().and_then(|()| plan.make());
        private.iter().map(make).collect::<Vec<_>>()
    };
    match in_private_root(work) {
        Ok(made) => {
            for (plan, made) in private.iter().zip(made) {
                notices.extend(named.add(plan, made));
            }
        }
        Err(errno) => notices.extend(private.iter().map(|plan| plan.notice(errno))),
    }
    named
}

/// Abstract names that several streams of one kind have, of which no socket of the table listens on
/// them: all but one at most were accepted. With the place of the first.
fn orphaned(table: &FdTable, listening: &Listening) -> HashMap<(UnixKind, Vec<u8>), usize> {
    let mut found: HashMap<(UnixKind, Vec<u8>), (usize, usize)> = HashMap::new();
    for (about, end) in ends(table).filter(|(_, end)| end.kind != UnixKind::Datagram) {
        if let Some(name) = end.lone_name(listening) {
            let first = found.entry((end.kind, name.key().1));
            first.or_insert((about.index, 0)).1 += 1;
        }
    }
    let several = found.into_iter().filter(|(_, (_, count))| *count > 1);
    several.map(|(name, (first, _))| (name, first)).collect()
}

fn plans<'a>(table: &'a FdTable, held: &'a HashMap<usize, OwnedFd>) -> Vec<Plan<'a>> {
    let listening = listening(table);
    let orphaned = orphaned(table, &listening);
    let orphaned = |end: &UnixPairEndState, name: &UnixName| {
        orphaned
            .get(&(end.kind, name.key().1))
            .filter(|_| name.abstract_name.is_some())
    };
    // Whether it surely was accepted, or has a path that cannot be bound outside.
    let rank = |end: &UnixPairEndState| match &end.bound {
        Some(name) if listening.contains_key(&name.key()) => 2,
        Some(name) if orphaned(end, name).is_some() => 2,
        Some(name) if name.is_taken(end.kind).is_ok_and(|taken| !taken) => 0,
        _ => u8::from(end.path.is_some()),
    };
    let of_streams = |end: &UnixPairEndState| end.kind != UnixKind::Datagram;
    let mut firsts: HashMap<u32, (About, &UnixPairEndState, u8)> = HashMap::new();
    let mut plans = Vec::new();
    for (about, end) in ends(table).filter(|(_, end)| of_streams(end)) {
        let this = (about, end, rank(end));
        let Some(that) = firsts.remove(&end.pair) else {
            firsts.insert(end.pair, this);
            continue;
        };
        let (accepted, connecting) = if this.2 > that.2 {
            (this, that)
        } else {
            (that, this)
        };
        let (about, end, rank) = accepted;
        let abstract_name = end.bound.as_ref().and_then(|b| b.abstract_name.as_deref());
        let name = match (abstract_name, &end.path) {
            _ if rank == 0 => continue,
            (Some(name), _) => {
                let own = end.bound.as_ref();
                let listener = listening.get(&(true, name.to_vec()));
                let listener = listener.or_else(|| orphaned(end, own?));
                let Some(socket) = listener.and_then(|index| held.get(index)) else {
                    continue;
                };
                Name::Abstract(name, socket)
            }
            (None, Some(path)) => Name::Path(path),
            (None, None) => continue,
        };
        plans.push(Plan {
            accepted: (end.pair, end.side),
            kind: end.kind,
            number: about.number,
            name,
            connecting: connecting.1.path.as_deref().filter(|_| connecting.2 > 0),
        });
    }
    plans
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::{read, write};

    #[test]
    fn whoever_connects_before_us_is_turned_away() {
        for kind in [UnixKind::Stream, UnixKind::Seqpacket] {
            let listener = kind.socket().unwrap();
            let name = format!("outlive-test-stranger-{}", std::process::id());
            let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
            bind(&listener, &address).unwrap();
            listen(&listener, 0).unwrap();
            let (stranger, ours) = (kind.socket().unwrap(), kind.socket().unwrap());
            connect(&stranger, &address).unwrap();
            let accepted = connected(&listener, &ours, &address).unwrap();
            write(&ours, b"to ourselves").unwrap();
            assert_eq!(read(&accepted, &mut [0; 64]), Ok(12));
            assert_eq!(read(&stranger, &mut [0; 64]), Ok(0));
        }
    }
}
