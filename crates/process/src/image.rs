//! The groups of state trees that make up an epoch of a process tree.

use crate::ProcessError;
use crate::family::Kin;
use outlive_epoch::{EpochReader, EpochWriter};
use outlive_state_tree::{SchemaConflict, SchemaSet, StateNode, from_fdt, to_fdt};

/// The root group: what is saved here and when.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,subject-v1")]
pub struct SubjectState {
    /// The process from which all others descend.
    pub root_process: u32,
    /// All processes, parents before their children.
    pub processes: Vec<u32>,
    /// Number of threads in all.
    pub threads: u32,
    /// Command line of the root process, arguments ended by zero bytes.
    pub command_line: Vec<u8>,
    /// CLOCK_REALTIME at the stop, nanoseconds.
    pub realtime_ns: u64,
    /// CLOCK_MONOTONIC as the program saw it at the stop, nanoseconds.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME as the program saw it at the stop, nanoseconds.
    pub boottime_ns: u64,
    /// Release of the kernel (`uname -r`).
    pub kernel: String,
    /// Identity of the boot.
    pub boot_id: String,
    /// Processes that had ended and waited for their parents to ask.
    #[state(children)]
    pub zombies: Vec<ZombieState>,
}

/// A process that has ended and whose parent has not asked for its exit status yet.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,zombie-v1")]
pub struct ZombieState {
    /// Its process ID.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// Its exit status as `wait(2)` gives it.
    pub status: u32,
}

impl ZombieState {
    /// Reads the exit status of a zombie whose parent sees itself with the ID `parent`.
    pub fn of(kin: Kin, parent: u32) -> Result<Self, ProcessError> {
        let failed = |e| crate::target::gone_or(kin.pid, "reading its exit status", e);
        let status = crate::target::Stat::read(kin.pid).map_err(failed)?;
        let seen = crate::target::Status::read(kin.pid, kin.pid).map_err(failed)?;
        Ok(Self {
            pid: seen.inner.pid,
            parent,
            status: status.exit_status,
        })
    }
}

/// Name of the root group.
pub const SUBJECT: &str = "subject";

/// Name of the group with the descriptors of all processes.
pub const DESCRIPTORS: &str = "descriptors";

/// Name of the group with the memory that processes share.
pub const SHARED: &str = "shared-memory";

/// Name of the group with what a program found in its machine.
pub const MACHINE: &str = "machine";

/// Name of the group with System V semaphores and message queues.
pub const SYSTEM_V: &str = "system-v";

/// The group of one kind of state of one process.
#[must_use]
pub fn group(kind: &str, pid: u32) -> String {
    format!("process-{pid}/{kind}")
}

/// Kinds of groups of a process.
pub mod kinds {
    /// Attributes of the process.
    pub const ATTRIBUTES: &str = "attributes";
    /// Signals.
    pub const SIGNALS: &str = "signals";
    /// Threads.
    pub const THREADS: &str = "threads";
    /// Address space.
    pub const MEMORY: &str = "memory";
}

/// The threads of a process.
#[derive(StateNode, Clone, Debug, PartialEq)]
#[state(compatible = "outlive,threads-v1")]
pub struct ThreadsState {
    /// The threads, the leading one first.
    #[state(children)]
    pub threads: Vec<crate::resources::thread::ThreadState>,
}

/// Writes the tree of a group.
pub fn put<T: StateNode>(
    writer: &mut dyn EpochWriter,
    name: &str,
    state: &T,
) -> Result<(), ProcessError> {
    let fdt = to_fdt(state).map_err(|e| ProcessError::Image(format!("{name}: {e}")))?;
    Ok(writer.tree(name, &fdt)?)
}

/// Reads the tree of a group.
pub fn get<T: StateNode>(reader: &dyn EpochReader, name: &str) -> Result<T, ProcessError> {
    let fdt = reader.tree(name)?;
    let fdt = fdt.ok_or_else(|| ProcessError::Image(format!("the group {name} is missing")))?;
    from_fdt(&fdt).map_err(|e| ProcessError::Image(format!("group {name}: {e}")))
}

/// What an epoch holds, without restoring it.
pub fn describe(reader: &dyn EpochReader) -> Result<SubjectState, ProcessError> {
    get(reader, SUBJECT)
}

/// The published schemas of all groups.
pub fn schemas() -> Result<SchemaSet, SchemaConflict> {
    use crate::resources::{attributes, descriptors, machine, memory, shared, signals, system_v};
    let mut set = SchemaSet::new();
    set.add::<SubjectState>()?;
    set.add::<attributes::ProcessState>()?;
    set.add::<signals::SignalsState>()?;
    set.add::<ThreadsState>()?;
    set.add::<memory::MemoryState>()?;
    set.add::<descriptors::FdTable>()?;
    set.add::<shared::SharedState>()?;
    set.add::<machine::MachineState>()?;
    set.add::<system_v::SystemVState>()?;
    Ok(set)
}
