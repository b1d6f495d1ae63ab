//! Restoring without reading everything first: the program runs at once, and its pages come when
//! they are touched, the others behind them.
//!
//! # What waits
//! Private anonymous memory, in areas of which the epoch holds [`WORTH`] or more. Everything else
//! is in place before the program runs: memory that a child has from its parent, shared memory,
//! what lies over a file, locked and sealed memory, stacks that grow, memory that a child must not
//! get (`MADV_WIPEONFORK`), and all of a process that uses guard pages (the kernel tells nobody when
//! they are laid over contents), locks all its memory, shares its descriptors, or continues under another
//! kernel.
//!
//! # Rules
//! - A page that was not served is never seen as zeros. If the server ends, so does the program: a
//!   guard ([`outlive_linux::demand`]) holds on to the missing pages and kills it. If that is killed,
//!   too, whoever touches a missing page waits ([`holder`]). A page that is
//!   damaged on the medium ends the program, too; another epoch may be restored.
//! - What the program does to its mappings while pages are missing is followed: `fork`, `mremap`,
//!   `munmap`, `madvise`. A child that is made then gets missing pages of its own, so that these
//!   are not common with its parent's.
//! - The server's threads begin when all threads of the program are there: they must not take the
//!   IDs that those need.
//! - Where epochs are to go on from this one, and writes are found by asynchronous write protection, the
//!   program is tracked from its first instruction, see [`filling`]. Else epochs begin when nothing is
//!   missing any more; the first one is full.

pub(crate) mod filling;
mod holder;
mod pending;
mod serve;

use super::heirs::Heirs;
use super::saved::{Saved, SavedProcess};
use super::space::runs_of;
use super::stub::Stub;
use crate::resources::memory::{Area, AreaKind};
use crate::{ProcessError, bootstrap};
use filling::Filling;
use holder::Holder;
use outlive_epoch::{EpochReader, Run, SpaceId};
use outlive_linux::Errno;
use outlive_linux::demand::{FLAGS, Guard, PageServer};
use outlive_linux::maps::VmFlags;
use pending::{Part, Pending};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use serve::{Common, Server, Space};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that an epoch must hold of an area for it to be worth while.
const WORTH: u64 = 256 * 1024;

/// Areas with these flags are in place before the program runs.
const EAGER: [VmFlags; 4] = [
    VmFlags::LOCKED,
    VmFlags::GROWS_DOWN,
    VmFlags::WIPE_ON_FORK,
    VmFlags::SEALED,
];

/// The epoch from which pages are served while the program runs.
#[derive(Clone)]
pub struct Source(pub Arc<dyn EpochReader + Send + Sync>);

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.0.id()).finish()
    }
}

/// What came of serving pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// From the call of [`super::restore`] until everything was there, microseconds.
    pub resident_us: u64,
    /// How often the program waited for a page.
    pub waits: u64,
    /// Bytes that it waited for, with their neighbours.
    pub on_demand: u64,
    /// All bytes that were served.
    pub bytes: u64,
}

/// Ranges of addresses whose pages come later, by the number of the process.
pub type Later = BTreeMap<u32, Vec<(u64, u64)>>;

/// Which memory can wait.
pub fn choose(saved: &Saved, heirs: &Heirs, reader: &dyn EpochReader) -> Later {
    let mut later = Later::new();
    let lends = |id| {
        let mut all = saved.processes.iter();
        all.any(|p| p.process.shares_descriptors_with == id)
    };
    for process in saved.processes.iter().filter(|p| can_wait(p, heirs)) {
        let id = process.process.pid;
        if process.process.shares_descriptors_with != 0 || lends(id) {
            continue;
        }
        let runs = runs_of(id, &process.memory, reader);
        let areas = process.memory.areas.iter().filter(|a| is_plain(a));
        let chosen = areas.filter(|a| held(a, &runs) >= WORTH);
        later.insert(id, chosen.map(|a| (a.start, a.end)).collect());
    }
    later
}

fn can_wait(process: &SavedProcess, heirs: &Heirs) -> bool {
    let (id, memory) = (process.process.pid, &process.memory);
    let alone = heirs.of(id).is_none() && !heirs.gives(id);
    let simple = process.old_code.is_none() && memory.guards.is_empty() && memory.lock_future == 0;
    process.has_memory() && alone && simple
}

fn is_plain(area: &Area) -> bool {
    let flags = area.vm_flags();
    area.kind == AreaKind::Anonymous && EAGER.iter().all(|f| !flags.has(*f))
}

/// Bytes that an epoch holds of an area.
fn held(area: &Area, runs: &[(u64, u64)]) -> u64 {
    let first = runs.partition_point(|r| r.1 <= area.start);
    let within = runs[first..].iter().take_while(|r| r.0 < area.end);
    within
        .map(|r| r.1.min(area.end) - r.0.max(area.start))
        .sum()
}

/// The parts of ranges that do not come later. Both are in order and disjoint.
pub fn at_once(runs: Vec<(u64, u64)>, later: &[(u64, u64)]) -> Vec<(u64, u64)> {
    if later.is_empty() {
        return runs;
    }
    let mut rest = Vec::new();
    for (mut start, end) in runs {
        let first = later.partition_point(|l| l.1 <= start);
        for &(s, e) in later[first..].iter().take_while(|l| l.0 < end) {
            if s > start {
                rest.push((start, s));
            }
            start = start.max(e);
        }
        if start < end {
            rest.push((start, end));
        }
    }
    rest
}

/// Missing pages of processes that are being restored.
pub struct Missing {
    common: Arc<Common>,
    wanted: Vec<Run>,
    bytes: u64,
    tracks: bool,
    began: Instant,
}

impl Missing {
    /// From here on whoever touches the memory that comes later waits for it. With `tracking` it can be
    /// tracked meanwhile, where the kernel can.
    pub fn begin(
        stubs: &mut [Stub],
        saved: &Saved,
        later: &Later,
        (source, tracking, began): (&Source, bool, Instant),
    ) -> Result<Self, ProcessError> {
        let reader = &*source.0;
        let mut spaces = Vec::new();
        let mut tracks = true;
        for (stub, process) in stubs.iter_mut().zip(&saved.processes) {
            let id = stub.target.id;
            let Some(areas) = later.get(&id).filter(|areas| !areas.is_empty()) else {
                continue;
            };
            let server = server_of(stub, tracking)?;
            tracks &= server.tracks();
            let mut pending = Pending::default();
            let runs = runs_of(id, &process.memory, reader);
            for &(start, end) in areas {
                let registered = server.register(start, end);
                registered.map_err(|e| refused(stub, &format!("{start:x}-{end:x}: {e}")))?;
                let first = runs.partition_point(|r| r.1 <= start);
                for r in runs[first..].iter().take_while(|r| r.0 < end) {
                    let (start, end) = (r.0.max(start), r.1.min(end));
                    let origin = start;
                    pending.insert(Part { start, end, origin });
                    if server.tracks() {
                        let protected = server.protect(start, end);
                        protected.map_err(|e| refused(stub, &format!("{start:x}-{end:x}: {e}")))?;
                    }
                }
            }
            spaces.push(Space::new(server, SpaceId(id), stub.target.pid, pending));
        }
        let (wanted, bytes) = (
            spaces.iter().flat_map(Space::runs).collect(),
            spaces.iter().map(Space::bytes).sum(),
        );
        let common = Common::new(spaces, source.clone());
        let common = common.map_err(|e| super::internal("preparing to serve pages", e.into()))?;
        Ok(Self {
            common,
            wanted,
            bytes,
            tracks,
            began,
        })
    }

    /// Bytes that come later.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether all that comes later can be tracked.
    #[must_use]
    pub fn tracks(&self) -> bool {
        self.tracks
    }

    /// For the tracker of a process of which something comes later.
    #[must_use]
    pub fn filling(&self, id: u32) -> Option<Filling> {
        Filling::of(&self.common, id)
    }

    /// Begins to serve who waits; all threads of the program are there.
    pub fn serve(self, stubs: &[Stub]) -> Result<Serving, ProcessError> {
        let failed = |e: Errno| super::internal("preparing to serve pages", e.into());
        let program: Result<Vec<OwnedFd>, _> =
            stubs.iter().map(|s| s.target.pidfd.try_clone()).collect();
        let program = program.map_err(|e| super::internal("preparing to serve pages", e))?;
        let root = stubs.first().map_or(0, |s| s.target.pid);
        let server = Server::begin(self.common, (root, program)).map_err(failed)?;
        Ok(Serving {
            server,
            wanted: self.wanted,
            began: self.began,
            holders: Vec::new(),
        })
    }
}

/// Pages are served to who waits.
pub struct Serving {
    server: Server,
    wanted: Vec<Run>,
    began: Instant,
    holders: Vec<Holder>,
}

impl Serving {
    /// From here on no page can become zeros, whoever is killed; the processes have all else.
    pub fn hold(mut self, stubs: &mut [Stub]) -> Result<Self, ProcessError> {
        for (at, stub) in stubs.iter_mut().enumerate() {
            let lodger = self.server.lodger(stub.target.id);
            self.holders.extend(Holder::make(stub, at == 0, lodger)?);
        }
        Ok(self)
    }

    /// Makes the guard, without which the program must not run, and brings all other pages.
    pub fn bring_all(mut self) -> Result<Lazy, ProcessError> {
        let failed = |e: Errno| super::internal("making a guard", e.into());
        let program: Vec<i32> = self
            .server
            .program()
            .iter()
            .map(AsRawFd::as_raw_fd)
            .collect();
        let guard = Guard::new(&program).map_err(failed)?;
        let kept = (guard, self.holders);
        let done = self.server.bring(self.wanted, kept, self.began);
        let done = done.map_err(|e| super::internal("serving pages", e))?;
        Ok(Lazy {
            server: self.server,
            done,
        })
    }
}

/// A program that runs while not all its memory is there. Dropping this waits until it is.
pub struct Lazy {
    server: Server,
    done: OwnedFd,
}

impl Lazy {
    /// Waits until everything is there. Fails where the program had to be ended.
    pub fn finish(&mut self) -> Result<Served, ProcessError> {
        self.server.join().map_err(ProcessError::Image)
    }

    /// How long it took, once everything is there.
    #[must_use]
    pub fn elapsed(&self) -> Option<Duration> {
        self.server.elapsed()
    }
}

/// Readable when everything is there.
impl AsFd for Lazy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

fn server_of(stub: &mut Stub, tracking: bool) -> Result<PageServer, ProcessError> {
    let made = bootstrap::make_userfault(&stub.target, &mut stub.threads[0], &stub.arena, FLAGS)?;
    let made = made.map(|(fd, number)| {
        stub.missing = Some(number);
        fd
    });
    let made = made.and_then(|fd| PageServer::new(fd, tracking));
    made.map_err(|e| match e {
        Errno::PERM => refused(stub, "this needs root (CAP_SYS_PTRACE)"),
        Errno::INVAL | Errno::NOSYS => refused(stub, "this needs Linux 6.6"),
        e => refused(stub, &format!("userfaultfd: {e}")),
    })
}

fn refused(stub: &Stub, why: &str) -> ProcessError {
    let what = format!("its memory cannot be served on demand: {why}");
    let refusal = stub.target.refusal("", what, "restore without --lazy");
    ProcessError::Refused(vec![refusal])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_later_is_left_out() {
        let runs = vec![(1, 5), (6, 7), (10, 30), (40, 50)];
        let later = [(2, 3), (6, 8), (12, 14), (20, 45)];
        let now = vec![(1, 2), (3, 5), (10, 12), (14, 20), (45, 50)];
        assert_eq!(at_once(runs.clone(), &later), now);
        assert_eq!(at_once(runs.clone(), &[]), runs);
        assert_eq!(at_once(runs, &[(0, 60)]), []);
    }
}
