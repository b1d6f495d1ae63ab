//! What a stop took, on its way into an epoch while the program runs on.

use crate::ProcessError;
use crate::closed::Closed;
use crate::image::{self, SubjectState, ZombieState, group, kinds};
use crate::member::MemberState;
use crate::residue::Residue;
use crate::resources::machine::MachineState;
use crate::resources::shared::SharedState;
use crate::resources::system_v::SystemVState;
use crate::resources::{descriptors, memory};
use crate::target::Target;
use crate::track::Notes;
use outlive_epoch::{EpochFacts, EpochWriter, PAGE_SIZE, Run};
use outlive_linux::Errno;
use outlive_linux::cachestat;
use outlive_linux::clock::{TimeOffsets, host_clocks, realtime_ns};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Buffers of earlier stops, to be used again: fresh memory is faulted in at the stop.
#[derive(Clone, Debug, Default)]
pub struct Spare(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spare {
    /// How many are kept.
    const MOST: usize = 64;

    /// The smallest that has room for so many bytes, or else the largest; an empty one where there
    /// is none.
    pub(crate) fn take(&self, bytes: usize) -> Vec<u8> {
        let Ok(mut all) = self.0.lock() else {
            return Vec::new();
        };
        let fits = all.partition_point(|b| b.len() < bytes);
        if fits < all.len() {
            all.remove(fits)
        } else {
            all.pop().unwrap_or_default()
        }
    }

    /// Keeps buffers for later, the largest if there are too many.
    pub(crate) fn give_back(&self, buffers: impl Iterator<Item = Vec<u8>>) {
        if let Ok(mut all) = self.0.lock() {
            all.extend(buffers.filter(|b| !b.is_empty()));
            all.sort_unstable_by_key(Vec::len);
            let surplus = all.len().saturating_sub(Self::MOST);
            all.drain(..surplus);
        }
    }
}

/// By how much clocks are shifted for a program and for us (`time_namespaces(7)`). Who goes to another
/// namespace is refused before a stop, so that this is read before it, too.
pub(crate) struct ClockZones {
    theirs: TimeOffsets,
    ours: TimeOffsets,
}

impl ClockZones {
    pub(crate) fn of(target: &Target) -> Result<Self, ProcessError> {
        let offsets =
            |pid| TimeOffsets::of(pid).map_err(|e| target.kernel("reading its clocks", e));
        Ok(Self {
            theirs: offsets(target.pid)?,
            ours: offsets(std::process::id())?,
        })
    }
}

/// The time of a stop.
pub(crate) struct Clocks {
    pub(crate) realtime_ns: u64,
    monotonic_ns: u64,
    boottime_ns: u64,
}

impl Clocks {
    /// What they show now.
    pub(crate) fn now(zones: &ClockZones) -> Self {
        let ClockZones { theirs, ours } = zones;
        let host = host_clocks(ours);
        let seen = |host: i64, theirs: i64| u64::try_from(host.saturating_add(theirs)).unwrap_or(0);
        Self {
            realtime_ns: realtime_ns(),
            monotonic_ns: seen(host.monotonic_ns, theirs.monotonic_ns),
            boottime_ns: seen(host.boottime_ns, theirs.boottime_ns),
        }
    }

    pub(crate) fn subject(
        &self,
        states: &[MemberState],
        zombies: Vec<ZombieState>,
        threads: u32,
    ) -> SubjectState {
        let (kernel, boot_id) = kernel_and_boot();
        let processes: Vec<u32> = states.iter().map(|s| s.process.pid).collect();
        SubjectState {
            root_process: processes.first().copied().unwrap_or(0),
            processes,
            threads,
            command_line: states
                .first()
                .map(|s| s.process.command_line.clone())
                .unwrap_or_default(),
            realtime_ns: self.realtime_ns,
            monotonic_ns: self.monotonic_ns,
            boottime_ns: self.boottime_ns,
            kernel,
            boot_id,
            zombies,
        }
    }
}

/// Release of the kernel and identity of the boot, which are the same as long as this process is there.
fn kernel_and_boot() -> (String, String) {
    static KNOWN: OnceLock<(String, String)> = OnceLock::new();
    let text = |path: &str| {
        std::fs::read_to_string(path)
            .map(|t| t.trim().to_owned())
            .unwrap_or_default()
    };
    let read = || {
        (
            text("/proc/sys/kernel/osrelease"),
            text("/proc/sys/kernel/random/boot_id"),
        )
    };
    KNOWN.get_or_init(read).clone()
}

/// What the time of a stop went to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopTimes {
    /// Until all threads stood still.
    pub freeze: Duration,
    /// Looking for written pages, and reading all other state.
    pub scan: Duration,
    /// Copying pages.
    pub copy: Duration,
}

/// What the stop took: state trees and the pages that had not been copied before.
pub struct Captured {
    /// Number of processes.
    pub processes: u32,
    /// Number of threads.
    pub threads: u32,
    /// Time of the stop; `stop_us` is for the caller to fill in after the resume.
    pub facts: EpochFacts,
    /// What the time until now went to.
    pub times: StopTimes,
    pub(crate) subject: SubjectState,
    pub(crate) machine: Arc<MachineState>,
    pub(crate) states: Vec<MemberState>,
    pub(crate) table: descriptors::FdTable,
    pub(crate) shared: SharedState,
    pub(crate) shared_residue: Residue,
    pub(crate) system_v: SystemVState,
    pub(crate) retired: Vec<Run>,
    pub(crate) files: FilesToSync,
    pub(crate) closed: Closed,
    /// Its processes, by the numbers that they have for us.
    pub(crate) pids: Vec<u32>,
    pub(crate) spare: Spare,
    /// What was handed over before the stop.
    pub(crate) notes: Notes,
}

impl Captured {
    /// Writes trees and pages into the epoch.
    pub fn write(&self, writer: &mut dyn EpochWriter) -> Result<(), ProcessError> {
        image::put(writer, image::SUBJECT, &self.subject)?;
        image::put(writer, image::MACHINE, &*self.machine)?;
        image::put(writer, image::DESCRIPTORS, &self.table)?;
        image::put(writer, image::SHARED, &self.shared)?;
        image::put(writer, image::SYSTEM_V, &self.system_v)?;
        for &run in &self.retired {
            writer.absent(run)?;
        }
        self.shared_residue.write(writer)?;
        for s in &self.states {
            let pid = s.process.pid;
            s.residue.write(writer)?;
            image::put(writer, &group(kinds::ATTRIBUTES, pid), &s.process)?;
            image::put(writer, &group(kinds::SIGNALS, pid), &s.signals)?;
            image::put(writer, &group(kinds::THREADS, pid), &s.threads)?;
            if s.process.shares_memory_with == 0 {
                image::put(writer, &group(kinds::MEMORY, pid), &s.memory)?;
            }
        }
        Ok(())
    }

    /// Makes what the program had written by the stop to files that it has open durable (`fsync`), with
    /// the names beside them. Must have succeeded before the epoch is committed.
    pub fn sync_files(&self) -> Result<(), ProcessError> {
        let pid = self.subject.root_process;
        let known = self.files.unsynced_bytes();
        self.closed.look(self.pids.iter().copied(), known);
        self.files.sync(pid)?;
        let open = self.files.open.files.values();
        self.closed.sync_names(pid, open.map(|(_, file)| file))
    }

    /// Makes what it had written to files that it closed durable, after [`Captured::sync_files`]: where
    /// there is such a file, by flushing its file systems, with all that others wrote there. Nothing that
    /// must be done within a given time.
    pub fn sync_closed_files(&self) -> Result<(), ProcessError> {
        self.closed.sync(self.pids.first().copied().unwrap_or(0))
    }

    /// Bytes that the program had written to its files and that [`Captured::sync_files`] has still to
    /// bring to the medium; `None` where the kernel does not tell (before Linux 6.5).
    #[must_use]
    pub fn unsynced_bytes(&self) -> Option<u64> {
        self.files.unsynced_bytes()
    }

    /// Number of pages that were taken at the stop itself.
    #[must_use]
    pub fn residue_pages(&self) -> u64 {
        self.states.iter().map(|s| s.residue.pages()).sum::<u64>() + self.shared_residue.pages()
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        let states = self.states.iter_mut();
        let buffers = states.map(|s| std::mem::take(&mut s.residue.buffer));
        self.spare.give_back(buffers);
    }
}

/// Files whose contents must be durable before the epoch is: those open for writing, and those
/// mapped shared and writable.
pub(crate) struct FilesToSync {
    open: descriptors::FilesToSync,
    mapped: BTreeSet<Vec<u8>>,
}

impl FilesToSync {
    pub(crate) fn new(open: descriptors::FilesToSync, states: &[MemberState]) -> Self {
        let files = |memory: &memory::MemoryState| memory.files.clone();
        let mapped: BTreeSet<Vec<u8>> = states
            .iter()
            .flat_map(|s| files(&s.memory))
            .filter(|f| f.writable)
            .map(|f| f.path)
            .collect();
        Self { open, mapped }
    }

    fn unsynced_bytes(&self) -> Option<u64> {
        use std::os::unix::ffi::OsStrExt;
        let mut pages = 0u64;
        let mut add = |told: Result<u64, Errno>| match told {
            Err(Errno::NOSYS) => None,
            // What has no page cache, or may not be asked, is told by how long its flush takes.
            told => {
                pages = pages.saturating_add(told.unwrap_or(0));
                Some(())
            }
        };
        for (_, file) in self.open.files.values() {
            add(cachestat::unsynced_pages(file))?;
        }
        for path in &self.mapped {
            if let Ok(file) = std::fs::File::open(std::ffi::OsStr::from_bytes(path)) {
                add(cachestat::unsynced_pages(&file))?;
            }
        }
        Some(pages.saturating_mul(PAGE_SIZE as u64))
    }

    fn sync(&self, pid: u32) -> Result<(), ProcessError> {
        use std::os::unix::ffi::OsStrExt;
        self.open.sync(pid)?;
        for path in &self.mapped {
            let shown = std::path::Path::new(std::ffi::OsStr::from_bytes(path));
            let what = || format!("writing back {}", shown.display());
            std::fs::File::open(shown)
                .and_then(|file| file.sync_all())
                .map_err(|e| ProcessError::Kernel {
                    pid,
                    what: what(),
                    source: e,
                })?;
        }
        Ok(())
    }
}
