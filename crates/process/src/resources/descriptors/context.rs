//! What the kinds are given while they collect, check and recreate.

use super::collect::{FilesToSync, Memory};
use super::file_action::FileAction;
use super::inotify::InotifyState;
use super::pipe::{PipeEnds, PipeState};
use super::probe::Probe;
use super::restore::CheckRequest;
use super::table::{FdTable, Holder};
use super::terminal_modes::Change;
use super::unix_diag::{UnixDiag, UnixFacts};
use super::unix_pair::PairSide;
use super::{pty, tcp_pair};
use crate::error::{ProcessError, Refusal};
use crate::resources::shared::{Memories, SharedObjects};
use outlive_linux::remote::Arg;
use rustix::fs::OFlags;
use rustix::net::SocketAddrUnix;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;

/// So many sockets are asked about at once.
const MANY_SOCKETS: usize = 32;

/// Everything that one descriptor may need to know of the others.
#[derive(Debug, Default)]
pub struct Around {
    /// The process whose standard streams may be re-attached.
    pub root: u32,
    /// Of everything that may be a pipe or a named one, by mount and inode: whether the subject
    /// holds a reading and a writing end.
    pub pipes: HashMap<(u64, u64), (bool, bool)>,
    /// Of descriptors 0 to 2 of the root process: the link and the access mode.
    pub streams: [Option<(Vec<u8>, u32)>; 3],
    /// By process and descriptor number: the inode, and whether it shares it with strangers.
    pub inodes: HashMap<(u32, u32), (u64, bool)>,
    /// The processes of the subject.
    pub processes: HashSet<u32>,
    /// Numbers of the pseudo-terminals whose masters are in the subject.
    pub ptys: HashSet<u32>,
    /// Inodes of files that somebody can write to other than by appending. Their file systems are
    /// not told apart.
    pub overwriters: HashSet<u64>,
    /// Inodes of all sockets.
    pub sockets: HashSet<u64>,
    /// By inode: TCP connections within the subject.
    pub(crate) tcp: RefCell<HashMap<u64, tcp_pair::Found>>,
    /// The other ends of TCP connections on this host that the subject has one end of.
    pub(crate) tcp_peers: HashSet<SocketAddr>,
    unix: RefCell<UnixDiag>,
}

impl Around {
    /// Of a subject with this root process.
    pub(crate) fn new(root: u32, processes: HashSet<u32>) -> Self {
        Self {
            root,
            processes,
            ..Self::default()
        }
    }

    /// Adds one descriptor.
    pub(crate) fn add(&mut self, probe: &Probe<'_>) {
        self.ptys.extend(pty::number_of_master(probe));
        let anonymous = probe.link.starts_with(b"anon_inode:");
        self.inodes
            .insert(probe.place(), (probe.info.inode, anonymous));
        if probe.target.pid == self.root
            && let Some(stream) = self.streams.get_mut(probe.number as usize)
        {
            *stream = Some((probe.link.clone(), probe.access()));
        }
        if probe.link.starts_with(b"pipe:[") || probe.has_path() && !probe.has(OFlags::PATH) {
            let key = (probe.info.mount, probe.info.inode);
            let ends = self.pipes.entry(key).or_default();
            let writes = probe.access() != OFlags::RDONLY.bits();
            ends.0 |= probe.access() != OFlags::WRONLY.bits();
            ends.1 |= writes;
            if writes && !probe.has(OFlags::APPEND) {
                self.overwriters.insert(probe.info.inode);
            }
        } else if probe.link.starts_with(b"socket:[") {
            self.sockets.insert(probe.info.inode);
        }
    }

    /// Call when all are added: of many unix sockets it is asked at once.
    pub(crate) fn complete(&mut self) {
        if self.sockets.len() >= MANY_SOCKETS {
            self.unix.get_mut().ask_all(&self.sockets);
        }
    }

    /// Whether both ends of a pipe are in the subject.
    pub(crate) fn both_ends(&self, probe: &Probe<'_>) -> bool {
        let key = (probe.info.mount, probe.info.inode);
        self.pipes.get(&key) == Some(&(true, true))
    }

    /// What the kernel knows of a unix socket; `None` of one in another network namespace.
    pub(crate) fn unix(&self, probe: &Probe<'_>) -> Result<Option<UnixFacts>, ProcessError> {
        self.unix_of(probe, probe.info.inode)
    }

    /// The same of another socket, for the sake of this one.
    pub(crate) fn unix_of(
        &self,
        probe: &Probe<'_>,
        inode: u64,
    ) -> Result<Option<UnixFacts>, ProcessError> {
        let answer = self.unix.borrow_mut().ask(inode);
        answer.map_err(|errno| probe.failed("ask the kernel about", errno))
    }

    /// The standard stream that is the same object opened the same way.
    pub(crate) fn same_stream(&self, probe: &Probe<'_>) -> Option<u32> {
        if probe.target.pid == self.root && probe.number < 3 {
            return Some(probe.number);
        }
        let same = |stream: &Option<(Vec<u8>, u32)>| {
            stream
                .as_ref()
                .is_some_and(|(link, access)| *link == probe.link && *access == probe.access())
        };
        // Output first: who keeps a copy of a terminal mostly wants to write to it.
        [1, 2, 0]
            .into_iter()
            .find(|&n| same(&self.streams[n]))
            .map(|n| n as u32)
    }
}

/// What a kind may use while it collects.
pub struct CollectContext<'a> {
    /// The other descriptors.
    pub around: &'a Around,
    /// Whether the subject is stopped: only then may contents be read in ways that it could
    /// notice while it runs.
    pub stopped: bool,
    /// Who holds the description that is being collected.
    pub holders: Vec<Holder>,
    /// Pipes found so far.
    pub pipes: Vec<PipeState>,
    /// By mount and inode: the place of a pipe in `pipes`.
    pub pipe_places: HashMap<(u64, u64), u32>,
    /// Memory that may be shared with mappings.
    pub shared: &'a mut SharedObjects,
    /// Files whose contents must be durable before the epoch is.
    pub files: FilesToSync,
    /// What was learned at earlier epochs.
    pub memory: &'a mut Memory,
    /// By the lower inode: the number of a connection between two unix sockets.
    pub pairs: HashMap<u64, u32>,
}

impl CollectContext<'_> {
    /// The processes that hold the description which is being collected.
    pub(crate) fn processes(&self) -> HashSet<u32> {
        self.holders.iter().map(|holder| holder.process).collect()
    }
}

/// Which open file description is meant.
#[derive(Clone, Debug)]
pub struct About {
    /// Its place in the table.
    pub index: usize,
    /// The first process that holds it.
    pub process: u32,
    /// Its lowest number there.
    pub number: u32,
    /// Its status flags (`O_…`).
    pub flags: u32,
}

/// What a kind may use while it checks.
pub struct CheckContext<'a> {
    /// What is restored.
    pub request: &'a CheckRequest<'a>,
    /// All descriptions.
    pub table: &'a FdTable,
    /// All descriptors, as process and number.
    pub numbers: HashSet<(u32, u32)>,
    /// What was opened or bound on the way, by place in the table.
    pub held: HashMap<usize, OwnedFd>,
    /// What must be done to files, by device and inode.
    pub actions: HashMap<(u64, u64), FileAction>,
    /// How many connections are reset.
    pub resets: usize,
    /// What the user should know.
    pub notices: Vec<String>,
}

impl CheckContext<'_> {
    /// A refusal that names a descriptor.
    pub(crate) fn refuse(
        &self,
        about: &About,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> ProcessError {
        let mut programs = self.request.programs.iter();
        let program = programs.find(|(pid, _)| *pid == about.process);
        ProcessError::Refused(vec![Refusal {
            pid: about.process,
            program: program.map_or_else(String::new, |(_, name)| name.clone()),
            place: format!("fd {}", about.number),
            what: what.into(),
            remedy: remedy.into(),
        }])
    }

    /// Keeps a descriptor for the recreation of this description.
    pub fn hold(&mut self, about: &About, fd: OwnedFd) {
        self.held.insert(about.index, fd);
    }
}

/// A datagram socket that was connected to a name.
pub struct Reconnect {
    /// A duplicate of it.
    pub socket: OwnedFd,
    /// The name.
    pub address: SocketAddrUnix,
    /// What to say if nobody is there.
    pub what: String,
}

/// An inotify instance whose watches are added last.
#[derive(Debug)]
pub struct Rewatch {
    /// A duplicate of it.
    pub instance: OwnedFd,
    /// Its watches.
    pub state: InotifyState,
}

/// A descriptor of a process that is restored, which can be made once that process is there.
#[derive(Debug)]
pub struct Late {
    /// Its description's place in the table.
    pub index: usize,
    /// The number, in this process, of what keeps its place.
    pub place: RawFd,
    /// The process.
    pub process: u32,
    /// How it is opened (`PIDFD_…`).
    pub flags: u32,
}

/// Two ends of a socket, both of which new processes inherit, to send them what is made late.
#[derive(Debug)]
pub struct Channel {
    /// Where this process sends.
    pub ours: OwnedFd,
    /// Where they receive.
    pub theirs: OwnedFd,
}

/// What a kind may use while it recreates.
pub struct RecreateContext {
    /// The process that is restored.
    pub pid: u32,
    /// What the checks kept, by place in the table.
    pub held: HashMap<usize, OwnedFd>,
    /// The shared memories by their spaces.
    pub memories: Rc<Memories>,
    /// The pipes.
    pub pipes: Vec<PipeEnds>,
    /// The ends of connections within the subject.
    pub pairs: HashMap<(u32, PairSide), OwnedFd>,
    /// The terminals of the subject, by their numbers of old: masters, and numbers of now.
    pub ptys: HashMap<u32, (OwnedFd, u32)>,
    /// The ends of TCP connections within the subject that could be made.
    pub tcp: HashMap<(u32, PairSide), OwnedFd>,
    /// Inotify instances whose watches are added last.
    pub rewatches: Vec<Rewatch>,
    /// The terminal that will have other modes.
    pub(crate) modes: Option<Change>,
    /// What can be made once the processes are there.
    pub late: Vec<Late>,
    /// What is connected once all sockets have their names.
    pub reconnects: Vec<Reconnect>,
    /// What the user should know.
    pub notices: Vec<String>,
    /// Socket files that were made, to be removed again should the restore fail.
    pub created: Vec<PathBuf>,
}

impl RecreateContext {
    /// Takes what the check kept.
    pub(crate) fn take(&mut self, about: &About) -> Result<OwnedFd, ProcessError> {
        self.held.remove(&about.index).ok_or_else(|| {
            ProcessError::Image(format!(
                "fd {} was recreated without its check",
                about.number
            ))
        })
    }
}

/// A system call that a restored process must make itself.
#[derive(Clone, Debug)]
pub struct RemoteCall {
    /// The process which must make it.
    pub process: u32,
    /// `SYS_…`.
    pub number: i64,
    /// Its arguments, at most six.
    pub args: Vec<Arg>,
    /// What it is for, for messages.
    pub what: String,
    /// Error numbers that do not matter.
    pub tolerate: &'static [i32],
}
