//! Making a program again from a committed epoch.
//!
//! # Sequence
//! 1. Everything that can be judged without doing anything is judged: the form of the image, the
//!    kernel, the mapped files, the process IDs, each descriptor. Every reason not to restore is
//!    collected before any harm.
//! 2. Descriptors are made in this process, which the new process inherits ([`stub`]).
//! 3. The address space ([`space`]), the process' attributes, its threads ([`threads`]).
//! 4. [`Ready::go`]: files are reconciled, working memory is removed, registers are set, and the
//!    threads run. Until then, whatever fails, the new process is killed.
//!
//! The caller becomes the parent of the restored process and has to wait for it.

mod space;
mod stub;
mod threads;

use crate::image::{self, SubjectState, ThreadsState, group, kinds};
use crate::laps::Laps;
use crate::resources::{attributes, descriptors, memory, signals};
use crate::target::{Stat, gone_or};
use crate::{ProcessError, Refusal, bootstrap};
use outlive_epoch::EpochReader;
use outlive_linux::clock::{TimeOffsets, now_ns};
use outlive_linux::maps;
use outlive_linux::remote::Batch;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::ClockId;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;
use stub::{Stub, step};

/// What to do with files that are not as they were at the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FilesPolicy {
    /// Files that grew are truncated back (their tail is kept aside); anything else is refused.
    #[default]
    Reconcile,
    /// Files are taken as they are.
    Keep,
}

/// How to restore.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// What to do with files that are not as they were.
    pub files: FilesPolicy,
}

/// A program that is restored but has not run yet; dropping it removes every trace of it.
pub struct Ready {
    stub: Stub,
    threads: ThreadsState,
    /// Results of interrupted calls that ended while they were entered again.
    ended: Vec<Option<u64>>,
    made: descriptors::Made,
    notices: Vec<String>,
    began: Instant,
    restore_us: u64,
}

/// A restored, running program: a child of this process, to be waited for by it.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Its process ID.
    pub pid: u32,
    /// From the call of [`restore`] until everything was in place, microseconds.
    pub restore_us: u64,
    /// From the call of [`restore`] until the first thread ran, microseconds.
    pub first_run_us: u64,
    /// Things the user should know: connections that were reset, file tails kept aside.
    pub notices: Vec<String>,
}

/// All trees of an epoch of one process.
struct Saved {
    subject: SubjectState,
    process: attributes::ProcessState,
    signals: signals::SignalsState,
    threads: ThreadsState,
    memory: memory::MemoryState,
    table: descriptors::FdTable,
}

impl Saved {
    fn read(reader: &dyn EpochReader) -> Result<Self, ProcessError> {
        let subject: SubjectState = image::get(reader, image::SUBJECT)?;
        let pid = subject.root_process;
        let saved = Self {
            process: image::get(reader, &group(kinds::ATTRIBUTES, pid))?,
            signals: image::get(reader, &group(kinds::SIGNALS, pid))?,
            threads: image::get(reader, &group(kinds::THREADS, pid))?,
            memory: image::get(reader, &group(kinds::MEMORY, pid))?,
            table: image::get(reader, &group(kinds::DESCRIPTORS, pid))?,
            subject,
        };
        saved.validate()?;
        Ok(saved)
    }

    fn validate(&self) -> Result<(), ProcessError> {
        let bad = |what: &str| Err(ProcessError::Image(what.into()));
        let pid = self.subject.root_process;
        if self.subject.processes != [pid] || self.process.pid != pid {
            return bad("it does not hold exactly one process");
        }
        if i32::try_from(pid).map_or(true, |p| p <= 0) {
            return bad("its process ID is out of range");
        }
        threads::validate(&self.threads.threads, pid)?;
        if self.process.limits.len() != 32 || self.process.interval_timers.len() != 12 {
            return bad("attributes of the process have a wrong length");
        }
        space::validate(&self.memory)
    }

    fn program(&self) -> String {
        let name = self
            .threads
            .threads
            .first()
            .map(|t| t.comm.as_slice())
            .unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }

    fn refusal(&self, what: impl Into<String>, remedy: &str) -> Refusal {
        Refusal {
            pid: self.subject.root_process,
            program: self.program(),
            place: String::new(),
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}

/// The refusal for a process ID that is in use.
pub(crate) fn pid_taken(pid: u32) -> Refusal {
    let holder = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Refusal {
        pid,
        program: holder.trim().to_owned(),
        place: String::new(),
        what: "the process ID that the restored program needs is taken by this process".into(),
        remedy: "end it, or restore with --new-pid-ns".into(),
    }
}

/// Files that were opened for the new process to inherit.
struct Opened {
    mapped: Vec<File>,
    executable: File,
    checked: descriptors::Checked,
}

/// Makes the program of this epoch again, stopped before its first instruction. Its standard
/// streams and terminal are those of the caller. On failure nothing half-restored is left.
pub fn restore(reader: &dyn EpochReader, options: &RestoreOptions) -> Result<Ready, ProcessError> {
    let began = Instant::now();
    let mut laps = Laps::new();
    let saved = Saved::read(reader)?;
    laps.lap("trees");
    let ours = maps::read(std::process::id()).map_err(|e| internal("reading own mappings", e))?;
    let opened = check(&saved, &ours, reader, options)?;
    raise_file_limit();
    let mut notices = opened.checked.notices().to_vec();
    // From here on the program's clocks run: before any timer is set that runs with them.
    let offsets = time_offsets(&saved.subject)?;
    let made = descriptors::recreate_table(&saved.table, opened.checked)?;
    laps.lap("check and descriptors");
    let hole = space::find_hole(&saved.memory, &ours, Stub::arena_length() + (8 << 20))?;
    let mut stub = Stub::new(
        saved.subject.root_process,
        offsets,
        hole,
    )?;
    laps.lap("process");

    space::clear(&mut stub, &saved.memory)?;
    laps.lap("clear");
    let populating = space::map(&mut stub, &saved.memory, &opened.mapped, reader)?;
    laps.lap("map");
    let populating = stub.begin(populating)?;
    let filled = space::fill(&stub.target, &saved.memory, reader);
    stub.finish(populating)?;
    filled?;
    laps.lap("fill");
    space::finish(&mut stub, &saved.memory)?;
    space::set_layout(&mut stub, &saved.memory, &opened.executable)?;
    drop(opened.mapped);
    attributes_of_process(&mut stub, &saved, &mut notices)?;
    install_descriptors(&mut stub, &saved.table, &made)?;
    limits(&mut stub, &saved)?;
    laps.lap("attributes");
    notices.extend(threads::recreate(
        &mut stub,
        &saved.threads.threads,
        &saved.signals,
    )?);
    late_attributes(&mut stub, &saved)?;
    let ended = threads::rearm(&mut stub, &saved.threads.threads)?;
    laps.lap("threads");
    laps.tell("restore");
    let restore_us = began.elapsed().as_micros() as u64;
    Ok(Ready {
        stub,
        threads: saved.threads,
        ended,
        made,
        notices,
        began,
        restore_us,
    })
}

/// Judges everything that can be judged beforehand.
fn check(
    saved: &Saved,
    ours: &[maps::Mapping],
    reader: &dyn EpochReader,
    options: &RestoreOptions,
) -> Result<Opened, ProcessError> {
    let taken = saved.threads.threads.iter().map(|t| t.tid);
    let mut taken = taken.filter(|tid| Path::new(&format!("/proc/{tid}")).exists());
    if let Some(tid) = taken.next() {
        // Whoever has the process ID probably has the ports and files too: one reason is enough.
        return Err(ProcessError::Refused(vec![pid_taken(tid)]));
    }
    let mut refusals = Vec::new();
    if let Err(what) = space::check_kernel(&saved.memory, ours) {
        refusals.push(saved.refusal(what, "restore it under that kernel"));
    }
    let remedy = "put the original file back, or restore with --files keep";
    let keep = options.files == FilesPolicy::Keep;
    let mapped = match space::open_files(&saved.memory.files, keep) {
        Ok(files) => files,
        Err(wrong) => {
            refusals.extend(wrong.into_iter().map(|what| saved.refusal(what, remedy)));
            Vec::new()
        }
    };
    let path = Path::new(std::ffi::OsStr::from_bytes(&saved.process.executable));
    let executable = File::open(path);
    if let Err(e) = &executable {
        let what = format!("the program {} cannot be opened: {e}", path.display());
        refusals.push(saved.refusal(what, remedy));
    }
    let program = saved.program();
    let around = descriptors::CheckRequest {
        pid: saved.subject.root_process,
        program: &program,
        epoch: reader.id().0,
        files: options.files,
    };
    match (descriptors::check_table(&saved.table, &around), executable) {
        (Ok(checked), Ok(executable)) if refusals.is_empty() => Ok(Opened {
            mapped,
            executable,
            checked,
        }),
        (Ok(_), _) => Err(ProcessError::Refused(refusals)),
        (Err(ProcessError::Refused(more)), _) => {
            refusals.extend(more);
            Err(ProcessError::Refused(refusals))
        }
        (Err(e), _) => Err(e),
    }
}

fn internal(what: &str, e: std::io::Error) -> ProcessError {
    gone_or(std::process::id(), what, e)
}

/// Descriptors are made beside each other before they get their numbers: as many as are allowed.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    );
}

/// Offsets with which the clocks go on from where they stood.
fn time_offsets(subject: &SubjectState) -> Result<TimeOffsets, ProcessError> {
    let ours = TimeOffsets::of(std::process::id()).map_err(|e| internal("reading clocks", e))?;
    let ahead = |saved: u64, clock, ours: i64| {
        let host = now_ns(clock).saturating_sub(ours);
        i64::try_from(saved)
            .unwrap_or(i64::MAX)
            .saturating_sub(host)
    };
    Ok(TimeOffsets {
        monotonic_ns: ahead(subject.monotonic_ns, ClockId::Monotonic, ours.monotonic_ns),
        boottime_ns: ahead(subject.boottime_ns, ClockId::Boottime, ours.boottime_ns),
    })
}

fn attributes_of_process(
    stub: &mut Stub,
    saved: &Saved,
    notices: &mut Vec<String>,
) -> Result<(), ProcessError> {
    let pid = stub.target.pid;
    let now = Stat::read(pid).map_err(|e| stub.target.kernel("reading its stat", e))?;
    let mut batch = Batch::new();
    let what = attributes::recreate(&saved.process, &now, &mut batch);
    stub.run_named(batch, &what)?;
    if saved.process.led_terminal_session {
        // A terminal belongs to one session, here the restorer's.
        notices
            .push("it led the session of a terminal and leads one without a terminal now".into());
    }
    let settings = [
        ("oom_score_adj", saved.process.oom_score_adj.to_string()),
        (
            "coredump_filter",
            format!("{:#x}", saved.process.coredump_filter),
        ),
    ];
    for (name, value) in settings {
        if let Err(e) = std::fs::write(format!("/proc/{pid}/{name}"), &value) {
            notices.push(format!("{name} {value} not restored: {e}"));
        }
    }
    Ok(())
}

/// Brings the descriptors, which the new process inherited under our numbers, to their own.
fn install_descriptors(
    stub: &mut Stub,
    table: &descriptors::FdTable,
    made: &descriptors::Made,
) -> Result<(), ProcessError> {
    let sources: Vec<u64> = made.installs().map(|i| i.fd.as_raw_fd() as u64).collect();
    let numbers = made
        .installs()
        .flat_map(|i| i.numbers.iter().map(|&(n, _)| u64::from(n)));
    let above = 1 + sources.iter().copied().chain(numbers).max().unwrap_or(2);
    let all = u64::from(u32::MAX);
    let cloexec = libc::O_CLOEXEC as u64;
    let what = "making room for descriptors (is the limit of open files high enough?)";
    let mut steps = Vec::new();
    for (i, &fd) in sources.iter().enumerate() {
        steps.push(step(libc::SYS_dup3, [fd, above + i as u64, cloexec], what));
    }
    let what = "closing inherited descriptors";
    steps.push(step(libc::SYS_close_range, [0, above - 1, 0], what));
    for (i, install) in made.installs().enumerate() {
        for &(number, closes) in install.numbers {
            let flags = if closes { cloexec } else { 0 };
            let args = [above + i as u64, u64::from(number), flags];
            steps.push(step(
                libc::SYS_dup3,
                args,
                format!("installing descriptor {number}"),
            ));
        }
    }
    steps.push(step(libc::SYS_close_range, [above, all, 0], what));
    stub.steps(steps)?;
    let finish = descriptors::finish_calls(table)
        .into_iter()
        .map(|c| stub::Step {
            number: c.number,
            args: c.args,
            what: c.what,
            tolerate: c.tolerate,
        });
    stub.steps(finish.collect()).map(drop)
}

fn limits(stub: &mut Stub, saved: &Saved) -> Result<(), ProcessError> {
    let now = stub.target.proc_file("limits")?;
    let mut batch = Batch::new();
    let names = attributes::recreate_limits(&saved.process, &now, &mut batch);
    let what: Vec<String> = names
        .iter()
        .map(|n| format!("setting the limit {n:?}"))
        .collect();
    stub.run_named(batch, &what)
}

fn late_attributes(stub: &mut Stub, saved: &Saved) -> Result<(), ProcessError> {
    let mut batch = Batch::new();
    let what = attributes::recreate_late(&saved.process, &mut batch);
    stub.run_named(batch, &what)
}

impl Ready {
    /// The process, which is our child.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.stub.target.pid
    }

    /// Things the user should know: connections that were reset, file tails kept aside.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Lets the program run.
    pub fn go(mut self) -> Result<Restored, ProcessError> {
        let pid = self.pid();
        let more = self.made.apply_files()?;
        self.notices.extend(more);
        threads::set_registers(&mut self.stub, &self.threads.threads, &self.ended)?;
        let range = self.stub.arena.range();
        let ours = bootstrap::mappings_without(&self.stub.target, Some(range))?;
        let syscall_at = bootstrap::find_syscall(pid, &ours).ok_or_else(|| {
            self.stub.target.kernel(
                "looking for a syscall instruction",
                std::io::Error::other("none"),
            )
        })?;
        bootstrap::remove_arena(
            &self.stub.target,
            &mut self.stub.threads[0],
            syscall_at,
            range,
        )?;
        self.stub.keep = true;
        let mut first_run_us = 0;
        for held in std::mem::take(&mut self.stub.threads) {
            let tid = held.tid;
            held.release()
                .map_err(|e| self.stub.target.kernel(format!("starting thread {tid}"), e))?;
            if first_run_us == 0 {
                first_run_us = self.began.elapsed().as_micros() as u64;
            }
        }
        self.made.keep();
        Ok(Restored {
            pid,
            restore_us: self.restore_us,
            first_run_us,
            notices: self.notices,
        })
    }
}
