//! The steps of a restore: check everything, make everything, change files last.

use super::Description;
use super::context::{About, Channel, CheckContext, Late, RecreateContext, RemoteCall, Rewatch};
use super::file::{WrittenFile, seek};
use super::file_action::FileAction;
use super::locks;
use super::probe::failed;
use super::table::{FdTable, Holder, OpenDescription};
use super::terminal_modes::Change;
use super::{pty, tcp_pair, unix_accepted, unix_pair};
use crate::error::{ProcessError, Refusal};
use crate::resources::shared::Memories;
use crate::restore::{FilesPolicy, spawn_failed};
use outlive_linux::pid_namespace::PidNamespace;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socketpair};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

/// Flags that only matter to a file that is not there yet.
const MAKING: OFlags = OFlags::CREATE.union(OFlags::EXCL).union(OFlags::TRUNC);

/// The flags that `F_SETFL` can set.
const SETTABLE: OFlags = OFlags::APPEND
    .union(OFlags::NONBLOCK)
    .union(OFlags::DIRECT)
    .union(OFlags::NOATIME);

/// Descriptors that this process needs beside those which it makes.
const SPARE: u64 = 128;

/// For what a table is checked.
#[derive(Clone, Copy, Debug)]
pub struct CheckRequest<'a> {
    /// The root process that is restored.
    pub pid: u32,
    /// Each process and its name (`comm`), for messages.
    pub programs: &'a [(u32, String)],
    /// The epoch that is restored.
    pub epoch: u64,
    /// What to do with files that are not as they were.
    pub files: FilesPolicy,
    /// Spaces of shared memories.
    pub spaces: &'a [u32],
    /// Paths of files whose contents the epoch holds, so that they may look like anything.
    pub contents: &'a [Vec<u8>],
    /// Files whose contents the epoch holds because they were open for writing.
    pub written: &'a [WrittenFile],
}

/// A table that can be restored here, with what was opened and bound to find that out.
#[derive(Debug)]
pub struct Checked {
    pid: u32,
    notices: Vec<String>,
    held: HashMap<usize, OwnedFd>,
    actions: Vec<FileAction>,
    memories: Rc<Memories>,
}

impl Checked {
    /// Gives it the shared memories, by now made.
    pub fn set_memories(&mut self, memories: Rc<Memories>) {
        self.memories = memories;
    }

    /// What the user should know.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }
}

/// Finds every reason why the descriptors cannot be restored here. Changes nothing on disk; ports
/// and abstract names are taken until the result is dropped.
///
/// # Errors
/// [`ProcessError::Refused`] with all reasons; [`ProcessError::Image`] when the table makes no
/// sense.
pub fn check_table(table: &FdTable, request: &CheckRequest<'_>) -> Result<Checked, ProcessError> {
    table.validate()?;
    tcp_pair::forget_earlier_life(table);
    allow_descriptors(table.descriptions.len() as u64);
    let mut cx = CheckContext {
        request,
        table,
        numbers: table
            .descriptions
            .iter()
            .flat_map(|d| d.holders.iter().map(|h| (h.process, h.number)))
            .collect(),
        held: HashMap::new(),
        actions: HashMap::new(),
        resets: 0,
        notices: Vec::new(),
    };
    let mut refusals: Vec<Refusal> = Vec::new();
    for (about, description) in table.each() {
        locks::check(description)?;
        match description.object.check(&about, &mut cx) {
            Ok(()) => {}
            Err(ProcessError::Refused(more)) => refusals.extend(more),
            Err(error) => return Err(error),
        }
    }
    if !refusals.is_empty() {
        return Err(ProcessError::Refused(refusals));
    }
    let mut notices = cx.notices;
    match cx.resets {
        0 => {}
        n => notices.push(format!(
            "connections that were reset, to outside peers or not accepted yet: {n}"
        )),
    }
    let actions = cx.actions.into_values().collect();
    Ok(Checked {
        pid: request.pid,
        notices,
        held: cx.held,
        actions,
        memories: Rc::default(),
    })
}

/// Raises the limit of open descriptors of this process as far as needed and permitted.
fn allow_descriptors(count: u64) {
    let needed = count.saturating_mul(2).saturating_add(SPARE);
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < needed) {
        limit.current = limit
            .maximum
            .map_or(Some(needed), |maximum| Some(needed.min(maximum)));
        // Where it is not permitted, opening fails and says so.
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

/// A descriptor that was made, and where it belongs.
#[derive(Clone, Copy, Debug)]
pub struct Install<'a> {
    /// The descriptor, in this process.
    pub fd: BorrowedFd<'a>,
    /// Its numbers in the restored processes.
    pub holders: &'a [Holder],
}

/// The descriptors of a program, made in this process. Dropping it without [`Made::keep`] removes
/// the socket files that were made.
#[derive(Debug)]
pub struct Made {
    pid: u32,
    /// All close-on-exec, none below 3.
    descriptors: Vec<(OwnedFd, Vec<Holder>)>,
    actions: Vec<FileAction>,
    notices: Vec<String>,
    rewatches: Vec<Rewatch>,
    late: Vec<Late>,
    channel: Option<Channel>,
    modes: Option<Change>,
    created: Vec<PathBuf>,
}

impl Made {
    /// What was made, one per open file description.
    pub fn installs(&self) -> impl Iterator<Item = Install<'_>> {
        self.descriptors.iter().map(|(fd, holders)| Install {
            fd: fd.as_fd(),
            holders,
        })
    }

    /// Makes again what belongs to a PID namespace, in this one: files of `/proc`, and descriptors of
    /// processes that are gone. `unused` is a process ID that is free there.
    ///
    /// # Errors
    /// The first one that could not be made.
    pub fn move_to(
        &mut self,
        namespace: &PidNamespace,
        table: &FdTable,
        unused: u32,
    ) -> Result<(), ProcessError> {
        let pid = self.pid;
        for ((about, description), (fd, _)) in table.each().zip(&mut self.descriptors) {
            let (new, position) = match &description.object {
                Description::File(f) if is_proc(&f.path) => {
                    (open_in(namespace, pid, &about, &f.path)?, f.position)
                }
                Description::Directory(d) if is_proc(&d.path) => {
                    (open_in(namespace, pid, &about, &d.path)?, d.position)
                }
                Description::Pidfd(gone) if gone.process.is_none() => {
                    let made = namespace.ended_child(unused, gone.status);
                    (made.map_err(|e| spawn_failed(pid, e))?, 0)
                }
                _ => continue,
            };
            rustix::io::dup3(&new, fd, rustix::io::DupFlags::CLOEXEC)
                .map_err(|errno| failed(pid, "move a descriptor", errno))?;
            set_flags(pid, &about, &description.object, fd)?;
            seek(pid, &about, fd, position, true)?;
        }
        Ok(())
    }

    /// What is still to be made, once the processes are there.
    #[must_use]
    pub fn late(&self) -> &[Late] {
        &self.late
    }

    /// The way to send it to them, where there is any.
    #[must_use]
    pub fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    /// Cuts files that grew since the epoch back, watches files again, and sets the modes of the
    /// terminal for `process`, the root. Says so, and what else the user should know of what was
    /// made. The last step that may fail before the program runs.
    ///
    /// # Errors
    /// The first file that could not be cut back; those before it were.
    pub fn apply_files(&mut self, process: u32) -> Result<Vec<String>, ProcessError> {
        let mut notices = std::mem::take(&mut self.notices);
        for action in self.actions.drain(..) {
            notices.push(action.apply(self.pid)?);
        }
        for rewatch in self.rewatches.drain(..) {
            rewatch.state.watch(&rewatch.instance, self.pid)?;
        }
        if let Some(Err(errno)) = self.modes.as_mut().map(|change| change.make(process)) {
            notices.push(format!("modes of the terminal not restored: {errno}"));
        }
        Ok(notices)
    }

    /// The program runs: what was made for it stays.
    pub fn keep(mut self) {
        self.created.clear();
        if let Some(change) = &mut self.modes {
            change.keep();
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.created {
            // Best effort on a path that leads to an error already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn is_proc(path: &[u8]) -> bool {
    path == b"/proc" || path.starts_with(b"/proc/")
}

/// Opens a file of the `/proc` that a namespace has.
fn open_in(
    namespace: &PidNamespace,
    pid: u32,
    about: &About,
    path: &[u8],
) -> Result<OwnedFd, ProcessError> {
    let root = format!("/proc/{}/root", namespace.init());
    let flags = OFlags::from_bits_retain(about.flags) | OFlags::CLOEXEC;
    let there = [root.as_bytes(), path].concat();
    rustix::fs::open(there, flags - MAKING, Mode::empty()).map_err(|errno| {
        let path = String::from_utf8_lossy(path);
        failed(pid, format!("open {path} of its namespace"), errno)
    })
}

/// Makes one descriptor per open file description, in this process.
///
/// # Errors
/// The first one that could not be made; nothing stays of the others.
pub fn recreate_table(table: &FdTable, mut checked: Checked) -> Result<Made, ProcessError> {
    let pid = checked.pid;
    let mut made = Made {
        pid,
        descriptors: Vec::new(),
        actions: checked.actions,
        notices: Vec::new(),
        rewatches: Vec::new(),
        late: Vec::new(),
        channel: None,
        modes: None,
        created: Vec::new(),
    };
    let mut pipes = Vec::with_capacity(table.pipes.len());
    for pipe in &table.pipes {
        pipes.push(pipe.make(pid)?);
    }
    let mut notices = Vec::new();
    let named = unix_accepted::make(table, &checked.held, &mut notices);
    let pairs = unix_pair::make(table, pid, named, &mut checked.held, &mut made.created)?;
    let ptys = pty::make(table, pid, &mut notices)?;
    let mut cx = RecreateContext {
        pid,
        held: checked.held,
        memories: checked.memories,
        pipes,
        pairs,
        tcp: HashMap::new(),
        ptys,
        modes: None,
        late: Vec::new(),
        reconnects: Vec::new(),
        rewatches: Vec::new(),
        notices,
        created: Vec::new(),
    };
    let mut fds: Vec<Option<OwnedFd>> = Vec::new();
    fds.resize_with(table.descriptions.len(), || None);
    // A socket can begin to listen only while no connection has its port.
    for connections in [false, true] {
        if connections {
            cx.tcp = tcp_pair::make(table, &mut cx.notices);
        }
        let is_one = |d: &OpenDescription| matches!(d.object, Description::TcpPairEnd(_));
        for (about, description) in table.each().filter(|(_, d)| is_one(d) == connections) {
            let result = description.object.recreate(&about, &mut cx);
            made.created.append(&mut cx.created);
            let fd = above_streams(pid, result?)?;
            if description.object.sets_flags() {
                set_flags(pid, &about, &description.object, &fd)?;
            }
            locks::take(pid, &about, &description.locks, &fd)?;
            fds[about.index] = Some(fd);
        }
    }
    pty::lock(table, &cx.ptys, pid)?;
    let described = fds.into_iter().zip(&table.descriptions);
    made.descriptors = described
        .filter_map(|(fd, description)| Some((fd?, description.holders.clone())))
        .collect();
    made.notices = cx.notices;
    made.rewatches = cx.rewatches;
    made.late = cx.late;
    made.modes = cx.modes;
    if !made.late.is_empty() {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| failed(pid, "make a socket for descriptors", e))?;
        made.channel = Some(Channel { ours, theirs });
    }
    for reconnect in cx.reconnects {
        if let Err(errno) = connect(&reconnect.socket, &reconnect.address) {
            made.notices.push(format!("{}: {errno}", reconnect.what));
        }
    }
    Ok(made)
}

/// Moves a descriptor away from 0 to 2, should these be free in this process.
fn above_streams(pid: u32, fd: OwnedFd) -> Result<OwnedFd, ProcessError> {
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    rustix::io::fcntl_dupfd_cloexec(&fd, 3).map_err(|e| failed(pid, "move a descriptor", e))
}

fn set_flags(
    pid: u32,
    about: &super::About,
    object: &Description,
    fd: &OwnedFd,
) -> Result<(), ProcessError> {
    let fail = |errno| {
        let what = format!("set the flags of fd {} ({})", about.number, object.name());
        failed(pid, what, errno)
    };
    let wanted = OFlags::from_bits_retain(about.flags);
    if wanted.contains(OFlags::PATH) {
        return Ok(());
    }
    let now = rustix::fs::fcntl_getfl(fd).map_err(fail)?;
    if now & SETTABLE == wanted & SETTABLE {
        return Ok(());
    }
    rustix::fs::fcntl_setfl(fd, (now - SETTABLE) | (wanted & SETTABLE)).map_err(fail)
}

/// What the restored processes must call themselves, in this order, once every number is in place
/// in all of them.
#[must_use]
pub fn finish_calls(table: &FdTable) -> Vec<RemoteCall> {
    let mut calls = Vec::new();
    for (about, description) in table.each() {
        description.object.finish(&about, table, &mut calls);
        locks::finish(description, &mut calls);
    }
    calls
}
