//! What an epoch holds, read and judged before anything is done.

use super::system_v::Objects;
use super::vdso::OldCode;
use super::written::{self, Written};
use super::{FilesPolicy, RestoreOptions, machine, pid_taken, space, threads};
use crate::births;
use crate::image::{self, SubjectState, ThreadsState, group, kinds};
use crate::resources::machine::MachineState;
use crate::resources::shared::SharedState;
use crate::resources::system_v::SystemVState;
use crate::resources::{attributes, descriptors, memory, signals, timers};
use crate::{ProcessError, Refusal, sharing};
use outlive_epoch::EpochReader;
use outlive_linux::maps::Mapping;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Processes in one epoch, at most: far more than any machine runs.
const MAX_PROCESSES: usize = 1 << 16;

/// All trees of one process.
pub struct SavedProcess {
    /// Attributes.
    pub process: attributes::ProcessState,
    /// Signals.
    pub signals: signals::SignalsState,
    /// Threads.
    pub threads: ThreadsState,
    /// Address space.
    pub memory: memory::MemoryState,
    /// Code of another kernel that lies in it as ordinary memory.
    pub old_code: Option<OldCode>,
}

/// All trees of an epoch.
pub struct Saved {
    /// The subject as a whole.
    pub subject: SubjectState,
    /// Its processes, parents before their children.
    pub processes: Vec<SavedProcess>,
    /// How these are made.
    pub plan: Vec<births::Step>,
    /// Descriptors of all processes.
    pub table: descriptors::FdTable,
    /// Memory that processes share.
    pub shared: SharedState,
    /// What the program found in its machine.
    pub machine: MachineState,
    /// System V semaphores and message queues.
    pub system_v: SystemVState,
}

/// Files that were made because they were gone. They go again with the restore, unless it succeeds.
#[derive(Debug, Default)]
pub struct MadeFiles(pub Vec<PathBuf>);

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            // Best effort on a path that leads to an error already.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Files that were opened for one new process to inherit.
pub struct Files {
    /// The files that it maps.
    pub mapped: Vec<File>,
    /// Its program.
    pub executable: File,
}

/// What a check opened, made and bound.
type Judged = (
    Vec<Files>,
    MadeFiles,
    descriptors::Checked,
    Objects,
    Vec<Written>,
);

impl SavedProcess {
    fn read(reader: &dyn EpochReader, pid: u32) -> Result<Self, ProcessError> {
        let process: attributes::ProcessState = image::get(reader, &group(kinds::ATTRIBUTES, pid))?;
        let memory = match process.shares_memory_with {
            0 => image::get(reader, &group(kinds::MEMORY, pid))?,
            _ => memory::MemoryState::of_another(),
        };
        Ok(Self {
            process,
            signals: image::get(reader, &group(kinds::SIGNALS, pid))?,
            threads: image::get(reader, &group(kinds::THREADS, pid))?,
            memory,
            old_code: None,
        })
    }

    fn validate(&self, pid: u32) -> Result<(), ProcessError> {
        let bad = |what: &str| Err(ProcessError::Image(format!("process {pid}: {what}")));
        if self.process.pid != pid || i32::try_from(pid).map_or(true, |p| p <= 0) {
            return bad("its process ID is out of range");
        }
        if self.process.limits.len() != 32 || self.process.interval_timers.len() != 12 {
            return bad("attributes have a wrong length");
        }
        threads::validate(&self.threads.threads, pid)?;
        space::validate(&self.memory)
    }

    /// Whether its address space is its own, or it is the one that stands for all who share it.
    pub fn has_memory(&self) -> bool {
        self.process.shares_memory_with == 0
    }

    /// Its name.
    pub fn program(&self) -> String {
        let name = self
            .threads
            .threads
            .first()
            .map(|t| t.comm.as_slice())
            .unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }

    pub fn refusal(&self, what: impl Into<String>, remedy: &str) -> Refusal {
        Refusal {
            pid: self.process.pid,
            program: self.program(),
            place: String::new(),
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    /// Opens its files; every one that is missing or not the right one is a refusal.
    fn open(&self, keep: bool, made: &mut MadeFiles, refusals: &mut Vec<Refusal>) -> Option<Files> {
        let remedy = "put the original file back, or restore with --files keep";
        let mapped = space::open_files(&self.memory.files, keep, &mut made.0);
        let path = Path::new(std::ffi::OsStr::from_bytes(&self.process.executable));
        let executable = File::open(path);
        if let Err(wrong) = &mapped {
            refusals.extend(wrong.iter().map(|what| self.refusal(what, remedy)));
        }
        if let Err(e) = &executable {
            let what = format!("the program {} cannot be opened: {e}", path.display());
            refusals.push(self.refusal(what, remedy));
        }
        Some(Files {
            mapped: mapped.ok()?,
            executable: executable.ok()?,
        })
    }
}

impl Saved {
    /// Reads and validates all trees.
    pub fn read(reader: &dyn EpochReader) -> Result<Self, ProcessError> {
        let subject: SubjectState = image::get(reader, image::SUBJECT)?;
        if subject.processes.len() > MAX_PROCESSES {
            return Err(ProcessError::Image("it names too many processes".into()));
        }
        let mut processes = Vec::new();
        for &pid in &subject.processes {
            processes.push(SavedProcess::read(reader, pid)?);
        }
        let table = image::get(reader, image::DESCRIPTORS)?;
        let shared = image::get(reader, image::SHARED)?;
        let machine = image::get(reader, image::MACHINE)?;
        let system_v = image::get(reader, image::SYSTEM_V)?;
        let mut saved = Self {
            subject,
            processes,
            plan: Vec::new(),
            table,
            shared,
            machine,
            system_v,
        };
        saved.validate()?;
        let processes: Vec<_> = saved.processes.iter().map(|p| &p.process).collect();
        saved.plan = sharing::plan(&processes).map_err(|missing| {
            let which = missing.first().map_or(0, |p| p.pid);
            ProcessError::Image(format!(
                "process {which} shares with one that cannot make it"
            ))
        })?;
        Ok(saved)
    }

    /// An image is hostile: the root first, parents before children, every ID once.
    fn validate(&self) -> Result<(), ProcessError> {
        let bad = |what: String| Err(ProcessError::Image(what));
        let root = self.subject.root_process;
        if self.subject.processes.first() != Some(&root) {
            return bad("the root process is missing".into());
        }
        let (mut pids, mut ids) = (BTreeSet::new(), BTreeSet::new());
        for (pid, saved) in self.subject.processes.iter().zip(&self.processes) {
            saved.validate(*pid)?;
            let parent = saved.process.parent;
            if parent != 0 && (*pid == root || !pids.contains(&parent)) {
                return bad(format!("process {pid} has no parent"));
            }
            pids.insert(*pid);
            if let Some(twice) = saved.threads.threads.iter().find(|t| !ids.insert(t.tid)) {
                return bad(format!("ID {} is there twice", twice.tid));
            }
        }
        for zombie in &self.subject.zombies {
            let in_range = i32::try_from(zombie.pid).is_ok_and(|p| p > 0);
            let died = is_of_a_death(zombie.status);
            if !in_range || !died || !ids.insert(zombie.pid) || !pids.contains(&zombie.parent) {
                return bad(format!("the ended process {} makes no sense", zombie.pid));
            }
        }
        let shares: Vec<_> = self
            .processes
            .iter()
            .map(|p| (&p.process, &p.signals))
            .collect();
        let holders = self.table.descriptions.iter().flat_map(|d| &d.holders);
        sharing::validate(&shares, &holders.map(|h| h.process).collect())?;
        let by_pid: BTreeMap<u32, &attributes::ProcessState> =
            shares.iter().map(|(p, _)| (p.pid, *p)).collect();
        let holder_of = |pid| by_pid.get(&pid).map(|p| p.shares_descriptors_with);
        descriptors::validate_takers(&self.table, &holder_of)?;
        for saved in &self.processes {
            let threads = saved.threads.threads.iter().map(|t| t.tid).collect();
            timers::validate(&saved.signals.timers, &pids, &threads)?;
        }
        let ended = self.subject.zombies.iter().map(|z| z.pid).collect();
        descriptors::validate_ids(&self.table, &pids, &ended, &ids)
    }

    /// The IDs of all threads and ended processes.
    fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        let threads = self
            .processes
            .iter()
            .flat_map(|p| &p.threads.threads)
            .map(|t| t.tid);
        threads.chain(self.subject.zombies.iter().map(|z| z.pid))
    }

    /// A refusal that names the root process.
    pub fn refusal(&self, what: String, remedy: &str) -> Refusal {
        let program = self.processes.first().map(SavedProcess::program);
        Refusal {
            pid: self.subject.root_process,
            program: program.unwrap_or_default(),
            place: String::new(),
            what,
            remedy: remedy.into(),
        }
    }

    /// An ID that none of them has, and no init.
    pub fn unused_id(&self) -> u32 {
        self.unused_from(2, &|_| false)
    }

    /// The same from this number on, and not taken by anybody else.
    pub fn unused_from(&self, first: u32, is_taken: &dyn Fn(u32) -> bool) -> u32 {
        let used: BTreeSet<u32> = self.ids().collect();
        let is_free = |id: &u32| !used.contains(id) && !is_taken(*id);
        (first..).find(is_free).unwrap_or(first)
    }

    /// The place of the process whose address space a process has; its own where it is that.
    pub fn holder_of_memory(&self, at: usize) -> usize {
        match self.processes[at].process.shares_memory_with {
            0 => at,
            holder => {
                let is = |p: &SavedProcess| p.process.pid == holder;
                self.processes.iter().position(is).unwrap_or(at)
            }
        }
    }

    /// Judges everything that can be judged beforehand, and opens what is needed.
    pub fn check(
        &mut self,
        ours: &[Mapping],
        reader: &dyn EpochReader,
        options: &RestoreOptions,
    ) -> Result<Judged, ProcessError> {
        let taken = |id: &u32| match options.new_pid_ns {
            true => *id == 1,
            false => Path::new(&format!("/proc/{id}")).exists(),
        };
        match self.ids().find(taken) {
            Some(id) if options.new_pid_ns => {
                return Err(ProcessError::Refused(vec![self.processes[0].refusal(
                    format!("it needs the process ID {id}, which its namespace's init has"),
                    "restore without --new-pid-ns where that is free",
                )]));
            }
            // Whoever has the process ID probably has the ports and files too: one reason is
            // enough.
            Some(id) => return Err(ProcessError::Refused(vec![pid_taken(id)])),
            None => {}
        }
        let mut refusals = machine::adapt(self, ours)?;
        let mut files = Vec::with_capacity(self.processes.len());
        let mut made = MadeFiles::default();
        for saved in &self.processes {
            files.extend(saved.open(options.files == FilesPolicy::Keep, &mut made, &mut refusals));
        }
        let named = |p: &SavedProcess| (p.process.pid, p.program());
        let programs: Vec<_> = self.processes.iter().map(named).collect();
        let mapped = self.processes.iter().flat_map(|p| &p.memory.files);
        let contents: Vec<Vec<u8>> = mapped
            .filter(|f| f.contents.is_some())
            .map(|f| f.path.clone())
            .collect();
        let objects = Objects::check(self, &mut refusals)?;
        let written = match options.files {
            FilesPolicy::Reconcile => written::open(self, reader.id().0, &mut made, &mut refusals)?,
            FilesPolicy::Keep => Vec::new(),
        };
        let (written, opened): (Vec<_>, Vec<_>) = written.into_iter().unzip();
        let spaces: Vec<u32> = self.shared.memories.iter().map(|m| m.space).collect();
        let request = descriptors::CheckRequest {
            spaces: &spaces,
            contents: &contents,
            written: &opened,
            pid: self.subject.root_process,
            programs: &programs,
            epoch: reader.id().0,
            files: options.files,
        };
        match descriptors::check_table(&self.table, &request) {
            Ok(checked) if refusals.is_empty() => {
                return Ok((files, made, checked, objects, written));
            }
            Ok(_) => {}
            Err(ProcessError::Refused(more)) => refusals.extend(more),
            Err(e) => return Err(e),
        }
        Err(ProcessError::Refused(refusals))
    }
}

/// Whether a status as `wait(2)` gives it can be that of a process that has ended: an exit status,
/// or a signal that ends processes (signal(7)).
fn is_of_a_death(status: u32) -> bool {
    const IGNORED_OR_STOPPING: [u32; 8] = [17, 18, 19, 20, 21, 22, 23, 28];
    let (code, core, signal) = (status >> 8, status & 0x80, status & 0x7f);
    match signal {
        0 => code <= 0xff && core == 0,
        1..=64 => code == 0 && !IGNORED_OR_STOPPING.contains(&signal),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::is_of_a_death;

    #[test]
    fn a_status_is_that_of_a_death() {
        for good in [0, 7 << 8, 0xff00, 9, 11 | 0x80, 64] {
            assert!(is_of_a_death(good), "{good:#x}");
        }
        for bad in [
            17,
            19,
            23,
            28,
            65,
            0x7f,
            0x80,
            0x1_0000,
            9 | 7 << 8,
            u32::MAX,
        ] {
            assert!(!is_of_a_death(bad), "{bad:#x}");
        }
    }
}
