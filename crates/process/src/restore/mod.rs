//! Making a program again from a committed epoch.
//!
//! # Sequence
//! 1. Everything that can be judged without doing anything is judged: the form of the image, the
//!    kernel, the mapped files, the process IDs, each descriptor. Every reason not to restore is
//!    collected before any harm.
//! 2. Descriptors are made in this process; the new processes ([`tree`]) inherit them.
//! 3. For each process: the address space ([`space`]), attributes, descriptors at their numbers,
//!    threads ([`threads`]).
//! 4. [`Ready::go`]: files are reconciled, working memory is removed, registers are set, and the
//!    threads run. Until then, whatever fails, the new processes are killed.
//!
//! The caller becomes the parent of the restored process and has to wait for it. With
//! [`RestoreOptions::new_pid_ns`] all processes are made in a PID namespace of their own
//! ([`outlive_linux::pid_namespace`]), where every ID is free; the caller is the parent all the same.

mod going_on;
mod heirs;
mod late;
pub mod lazy;
mod leave;
mod machine;
mod memory;
mod saved;
mod space;
mod stub;
mod system_v;
mod threads;
mod tree;
mod vdso;
mod written;

use crate::image::{SubjectState, ThreadsState};
use crate::laps::Laps;
use crate::resources::shared::{self, FileContents, Origin};
use crate::resources::timers::{self, TimerState};
use crate::resources::{attributes, descriptors};
use crate::target::gone_or;
use crate::track::{TrackOptions, Tracked};
use crate::{ProcessError, Refusal};
use going_on::GoingOn;
use heirs::Heirs;
use lazy::{Later, Lazy, Missing, Serving};
use memory::Contents;
use outlive_epoch::EpochReader;
use outlive_linux::Errno;
use outlive_linux::clock::{TimeOffsets, host_clocks};
use outlive_linux::maps;
use outlive_linux::mounts::Away;
use outlive_linux::pid_namespace::PidNamespace;
use outlive_linux::remote::Batch;
use outlive_linux::spawn::SpawnError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use saved::{Files, MadeFiles, Saved, SavedProcess};
use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Instant;
pub(crate) use stub::spawn_failed;
use stub::{Stub, step};
use system_v::Objects;
use tree::Place;
use written::Written;

/// What to do with files that are not as they were at the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FilesPolicy {
    /// Files whose contents the epoch holds get them back, others that grew are truncated back (what
    /// they were is kept aside); anything else is refused.
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
    /// Whether to make a PID namespace for the program, where its process IDs are free.
    pub new_pid_ns: bool,
    /// How its memory is to be tracked from its first instruction on, see [`Launched::tracked`].
    pub track: Option<TrackOptions>,
    /// Whether the program is to run before all its memory is there, which is served from here. Then it
    /// is tracked only where writes are found by asynchronous write protection.
    pub lazy: Option<lazy::Source>,
}

/// Results of interrupted calls that ended while they were entered again, by process and thread.
type Ended = Vec<Vec<Option<u64>>>;

/// A program that is restored but has not run yet; dropping it removes every trace of it.
pub struct Ready {
    /// The processes, parents before their children.
    stubs: Vec<Stub>,
    /// Dropped after the processes in it.
    namespace: Option<PidNamespace>,
    threads: Vec<ThreadsState>,
    /// Which of them have memory of their own.
    with_memory: Vec<bool>,
    ended: Ended,
    made: descriptors::Made,
    made_files: MadeFiles,
    objects: Objects,
    contents: HashMap<u32, FileContents>,
    written: Vec<Written>,
    /// Where its memory is tracked.
    tracking: Option<GoingOn>,
    /// Where pages come later, and how many bytes.
    serving: Option<Serving>,
    later_bytes: u64,
    notices: Vec<String>,
    began: Instant,
    restore_us: u64,
}

/// A restored, running program: a child of this process, to be waited for by it.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Its process ID.
    pub pid: u32,
    /// Its process ID as it sees itself: another one in a PID namespace of its own.
    pub ns_pid: u32,
    /// From the call of [`restore`] until everything was in place, microseconds.
    pub restore_us: u64,
    /// From the call of [`restore`] until the first thread ran, microseconds.
    pub first_run_us: u64,
    /// Bytes of memory that were not there yet when it ran.
    pub later_bytes: u64,
    /// Things the user should know: connections that were reset, file tails kept aside.
    pub notices: Vec<String>,
}

/// A restored, running program, and what goes on with it.
pub struct Launched {
    /// The program.
    pub restored: Restored,
    /// Tracking that began with [`RestoreOptions::track`]: the next epoch after the one restored has
    /// to hold only what changed since. Without a tracker that cannot be, and tracking has to begin
    /// anew.
    pub tracked: Option<Tracked>,
    /// What brings its pages ([`RestoreOptions::lazy`]).
    pub lazy: Option<Lazy>,
}

/// The refusal for a process ID that is in use.
pub(crate) fn pid_taken(pid: u32) -> Refusal {
    let holder = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Refusal {
        pid,
        program: holder.trim().to_owned(),
        place: String::new(),
        what: "the process ID that the restored program needs is taken by this process".into(),
        remedy: "end it and restore again, or restore with --new-pid-ns, into a PID namespace of \
                 its own"
            .into(),
    }
}

/// Makes the program of this epoch again, stopped before its first instruction. Its standard
/// streams and terminal are those of the caller. On failure nothing half-restored is left.
pub fn restore(reader: &dyn EpochReader, options: &RestoreOptions) -> Result<Ready, ProcessError> {
    let began = Instant::now();
    let mut laps = Laps::new();
    let mut saved = Saved::read(reader)?;
    laps.lap("trees");
    let ours = maps::read(std::process::id()).map_err(|e| internal("reading own mappings", e))?;
    // A program with mounts of its own has its files through these.
    let away = options.new_pid_ns.then(Away::begin).transpose();
    let away = away.map_err(|e| no_mounts(&saved, e))?;
    let (files, made_files, mut checked, mut objects, written) =
        saved.check(&ours, reader, options)?;
    raise_file_limit();
    let mut notices = checked.notices().to_vec();
    // From here on the program's clocks run: before any timer is set that runs with them.
    let offsets = time_offsets(&saved.subject)?;
    let mut shared = Rc::new(shared::recreate(&saved.shared, &|what, remedy| {
        saved.refusal(what, remedy)
    })?);
    checked.set_memories(shared.clone());
    let mut made = descriptors::recreate_table(&saved.table, checked)?;
    laps.lap("check and descriptors");
    let mut contents = match options.files {
        FilesPolicy::Reconcile => contents(&saved, &files, &written)?,
        FilesPolicy::Keep => HashMap::new(),
    };
    let namespace = away
        .map(|away| namespace(&saved, away, offsets, &mut made))
        .transpose()?;
    let place = namespace.as_ref().map_or(Place::Here(offsets), Place::In);
    let heirs = &Heirs::find(&saved, reader);
    let later = match options.lazy {
        Some(_) => lazy::choose(&saved, heirs, reader),
        None => Later::new(),
    };
    let from = Contents {
        reader,
        heirs,
        later: &later,
    };
    let mut stubs = tree::make(&saved, &ours, place, &mut |at, stub| {
        memory::give(stub, &saved.processes[at], &files[at], &shared, &from)
    })?;
    late::bring(&mut stubs, &saved, &made)?;
    let memories = Rc::get_mut(&mut shared).ok_or_else(shared_is_held)?;
    objects.make(&saved, &mut stubs, memories)?;
    laps.lap("processes");
    memory::make(
        &mut stubs,
        &saved,
        &files,
        (&shared, &mut contents),
        (&objects, &from),
    )?;
    // Whatever is written from here on differs from the epoch.
    let (tracking, missing) = begin_tracking(&mut stubs, &saved, &later, (reader, options, began))?;
    memory::finish(&mut stubs, &mut saved, &files, &shared)?;
    objects.finish(&saved)?;
    drop((files, shared));
    laps.lap("memory");
    attributes_and_descriptors(&mut stubs, &saved, &made, &mut notices)?;
    laps.lap("attributes");
    let later_bytes = missing.as_ref().map_or(0, Missing::bytes);
    let (ended, serving) = threads_of_all(&mut stubs, &saved, &mut notices, missing)?;
    laps.lap("threads");
    laps.tell("restore");
    let restore_us = began.elapsed().as_micros() as u64;
    Ok(Ready {
        stubs,
        namespace,
        with_memory: saved
            .processes
            .iter()
            .map(SavedProcess::has_memory)
            .collect(),
        threads: saved.processes.into_iter().map(|p| p.threads).collect(),
        ended,
        made,
        made_files,
        objects,
        contents,
        written,
        tracking,
        serving,
        later_bytes,
        notices,
        began,
        restore_us,
    })
}

/// Begins to track memory whose contents are in place, where that is asked for, and to hold back who
/// touches what comes later.
fn begin_tracking(
    stubs: &mut [Stub],
    saved: &Saved,
    later: &Later,
    (reader, options, began): (&dyn EpochReader, &RestoreOptions, Instant),
) -> Result<(Option<GoingOn>, Option<Missing>), ProcessError> {
    let wanted = options.track.as_ref().filter(|how| GoingOn::can_be(how));
    let source = options.lazy.as_ref();
    let missing = source.map(|source| {
        let tracking = wanted.is_some_and(|how| !how.soft_dirty);
        Missing::begin(stubs, saved, later, (source, tracking, began))
    });
    let missing = missing.transpose()?;
    let missing = missing.filter(|m| m.bytes() > 0);
    let wanted = wanted.filter(|_| missing.as_ref().is_none_or(Missing::tracks));
    let tracking =
        wanted.and_then(|how| GoingOn::begin(stubs, saved, (reader, later), (how, &missing)));
    Ok((tracking, missing))
}

/// Gives all processes their attributes, and their descriptors.
fn attributes_and_descriptors(
    stubs: &mut [Stub],
    saved: &Saved,
    made: &descriptors::Made,
    notices: &mut Vec<String>,
) -> Result<(), ProcessError> {
    for (stub, process) in stubs.iter_mut().zip(&saved.processes) {
        let process = &process.process;
        attributes_of_process(stub, process, notices)?;
        if process.led_terminal_session && !descriptors::controls(&saved.table, process.pid) {
            // A terminal belongs to one session, here the restorer's.
            let what = "it led the session of a terminal and leads one without a terminal now";
            notices.push(what.into());
        }
        if process.shares_descriptors_with == 0 {
            install_descriptors(stub, made)?;
        }
    }
    call(stubs, descriptors::finish_calls(&saved.table))
}

/// Makes all threads with their states; returns results of interrupted calls that ended. What is
/// done to their memory may need missing pages, which are served from when all IDs are taken.
fn threads_of_all(
    stubs: &mut [Stub],
    saved: &Saved,
    notices: &mut Vec<String>,
    missing: Option<Missing>,
) -> Result<(Ended, Option<Serving>), ProcessError> {
    for (stub, saved) in stubs.iter_mut().zip(&saved.processes) {
        limits(stub, &saved.process)?;
        threads::make(stub, &saved.threads.threads)?;
    }
    let serving = missing.map(|missing| missing.serve(stubs));
    let serving = serving.transpose()?;
    call(stubs, descriptors::owner_calls(&saved.table))?;
    let mut ended = Vec::with_capacity(stubs.len());
    for (stub, saved) in stubs.iter_mut().zip(&saved.processes) {
        let threads = &saved.threads.threads;
        let has_actions = saved.process.shares_signals_with == 0;
        let signals = (&saved.signals, has_actions);
        notices.extend(threads::recreate(stub, threads, signals)?);
        timers(stub, &saved.threads, &saved.signals.timers)?;
        late_attributes(stub, &saved.process)?;
        ended.push(threads::rearm(stub, threads)?);
    }
    let serving = match serving {
        Some(serving) => Some(serving.hold(stubs)?),
        None => None,
    };
    Ok((ended, serving))
}

fn no_mounts(saved: &Saved, source: Errno) -> ProcessError {
    let what = "with mounts of its own";
    let failed = SpawnError::PidNamespace { what, source };
    spawn_failed(saved.subject.root_process, failed)
}

/// Comes home, makes the PID namespace, and brings to it what belongs there.
fn namespace(
    saved: &Saved,
    away: Away,
    time: TimeOffsets,
    made: &mut descriptors::Made,
) -> Result<PidNamespace, ProcessError> {
    let root = saved.subject.root_process;
    let mounts = away.end().map_err(|e| no_mounts(saved, e))?;
    let namespace = PidNamespace::create(time, &mounts).map_err(|e| spawn_failed(root, e))?;
    made.move_to(&namespace, &saved.table, saved.unused_id())?;
    Ok(namespace)
}

/// The files whose contents the epoch holds, by their spaces.
fn contents(
    saved: &Saved,
    files: &[Files],
    written: &[Written],
) -> Result<HashMap<u32, FileContents>, ProcessError> {
    let failed = |e| internal("duplicating a descriptor", e);
    let mut all = HashMap::new();
    for file in written {
        all.insert(file.space, file.contents()?);
    }
    for (process, files) in saved.processes.iter().zip(files) {
        for (file, opened) in process.memory.files.iter().zip(&files.mapped) {
            if let Some(space) = file.contents {
                let memory = saved
                    .shared
                    .memories
                    .iter()
                    .find(|m| m.space == space && matches!(m.origin, Origin::MappedFile(_)));
                let size = memory.map(|m| m.size).ok_or_else(|| {
                    ProcessError::Image(format!("the contents {space:x} of a file are missing"))
                })?;
                let opened = opened.try_clone().map_err(failed)?;
                all.insert(space, FileContents::new(opened, size)?);
            }
        }
    }
    Ok(all)
}

fn shared_is_held() -> ProcessError {
    let held = std::io::Error::other("it is still held");
    internal("adding shared memory", held)
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
    let host = host_clocks(&ours);
    let ahead = |saved: u64, host: i64| {
        i64::try_from(saved)
            .unwrap_or(i64::MAX)
            .saturating_sub(host)
    };
    Ok(TimeOffsets {
        monotonic_ns: ahead(subject.monotonic_ns, host.monotonic_ns),
        boottime_ns: ahead(subject.boottime_ns, host.boottime_ns),
    })
}

fn attributes_of_process(
    stub: &mut Stub,
    saved: &attributes::ProcessState,
    notices: &mut Vec<String>,
) -> Result<(), ProcessError> {
    let pid = stub.target.pid;
    let mut batch = Batch::new();
    let what = attributes::recreate(saved, &mut batch);
    stub.run_named(0, batch, &what)?;
    let settings = [
        ("oom_score_adj", saved.oom_score_adj.to_string()),
        ("coredump_filter", format!("{:#x}", saved.coredump_filter)),
        ("autogroup", saved.session_nice.to_string()),
    ];
    let as_is = |name| name == "autogroup" && saved.session_nice == 0;
    for (name, value) in settings.into_iter().filter(|(name, _)| !as_is(*name)) {
        if let Err(e) = std::fs::write(format!("/proc/{pid}/{name}"), &value) {
            notices.push(format!("{name} {value} not restored: {e}"));
        }
    }
    Ok(())
}

/// Brings the descriptors, which the new process inherited under our numbers, to their own.
fn install_descriptors(stub: &mut Stub, made: &descriptors::Made) -> Result<(), ProcessError> {
    let id = stub.target.id;
    let mut wanted = Vec::new();
    let mut highest = 2;
    for install in made.installs() {
        let source = install.fd.as_raw_fd() as u64;
        let holders: Vec<_> = install.holders.iter().filter(|h| h.process == id).collect();
        highest = holders
            .iter()
            .map(|h| u64::from(h.number))
            .fold(highest.max(source), u64::max);
        if !holders.is_empty() {
            wanted.push((source, holders));
        }
    }
    if let Some(number) = stub.missing {
        highest = highest.max(number);
    }
    let above = highest + 1;
    let all = u64::from(u32::MAX);
    let cloexec = libc::O_CLOEXEC as u64;
    let what = "making room for descriptors (is the limit of open files high enough?)";
    let mut steps = Vec::new();
    for (i, (source, _)) in wanted.iter().enumerate() {
        steps.push(step(
            libc::SYS_dup3,
            [*source, above + i as u64, cloexec],
            what,
        ));
    }
    // It stays where it is no descriptor of the program's.
    let kept = above + wanted.len() as u64;
    let missing = stub.missing;
    if let Some(number) = missing {
        stub.missing = Some(kept);
        steps.push(step(libc::SYS_dup3, [number, kept, cloexec], what));
    }
    let what = "closing inherited descriptors";
    steps.push(step(libc::SYS_close_range, [0, above - 1, 0], what));
    for (i, (_, holders)) in wanted.iter().enumerate() {
        for holder in holders {
            let flags = if holder.close_on_exec { cloexec } else { 0 };
            let args = [above + i as u64, u64::from(holder.number), flags];
            let what = format!("installing descriptor {}", holder.number);
            steps.push(step(libc::SYS_dup3, args, what));
        }
    }
    let ranges = match missing {
        Some(_) => vec![[above, kept.max(above + 1) - 1, 0], [kept + 1, all, 0]],
        None => vec![[above, all, 0]],
    };
    for range in ranges {
        steps.push(step(libc::SYS_close_range, range, what));
    }
    stub.steps(steps).map(drop)
}

/// What needs the processes themselves.
fn call(stubs: &mut [Stub], calls: Vec<descriptors::RemoteCall>) -> Result<(), ProcessError> {
    for call in calls {
        let stub = stubs.iter_mut().find(|s| s.target.id == call.process);
        let stub = stub.ok_or_else(|| {
            ProcessError::Image(format!("descriptors refer to process {}", call.process))
        })?;
        stub.steps(vec![stub::Step {
            number: call.number,
            args: call.args,
            what: call.what,
            tolerate: call.tolerate,
        }])?;
    }
    Ok(())
}

fn limits(stub: &mut Stub, saved: &attributes::ProcessState) -> Result<(), ProcessError> {
    let now = stub.target.proc_file("limits")?;
    let mut batch = Batch::new();
    let names = attributes::recreate_limits(saved, &now, &mut batch);
    let what: Vec<String> = names
        .iter()
        .map(|n| format!("setting the limit {n:?}"))
        .collect();
    stub.run_named(0, batch, &what)
}

/// How many timers' calls fit into the working memory.
const TIMERS_AT_ONCE: usize = 1000;

/// Makes the timers of a process, by the threads that have to.
fn timers(
    stub: &mut Stub,
    threads: &ThreadsState,
    saved: &[TimerState],
) -> Result<(), ProcessError> {
    let leader = stub.target.id;
    if saved.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    timers::ask_for_choice(&mut batch);
    let choice = stub.run(0, batch)?.first_error().is_none();
    // Where IDs come in order, all are made at once.
    let group = if choice { TIMERS_AT_ONCE } else { saved.len() };
    for group in saved.chunks(group) {
        for tid in timers::makers(group, leader) {
            let mut batch = Batch::new();
            let what = timers::recreate(group, (leader, tid), choice, &mut batch)?;
            let thread = threads.threads.iter().position(|t| t.tid == tid);
            stub.run_named(thread.unwrap_or(0), batch, &what)?;
        }
    }
    if timers::are_there(&stub.target, saved)? {
        return Ok(());
    }
    let other = std::io::Error::other("the kernel lists other ones");
    Err(stub.target.kernel("making its timers", other))
}

fn late_attributes(stub: &mut Stub, saved: &attributes::ProcessState) -> Result<(), ProcessError> {
    let mut batch = Batch::new();
    let what = attributes::recreate_late(saved, &mut batch);
    stub.run_named(0, batch, &what)
}

impl Ready {
    /// The root process, which is our child.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.stubs.first().map_or(0, |s| s.target.pid)
    }

    /// The same as it sees itself.
    #[must_use]
    pub fn ns_pid(&self) -> u32 {
        self.stubs.first().map_or(0, |s| s.target.id)
    }

    /// Working memory that lies in each process until it runs: process, address, length.
    #[must_use]
    pub fn working_memory(&self) -> Vec<(u32, u64, u64)> {
        let range = |s: &Stub| (s.target.pid, s.arena.range().0, s.arena.range().1);
        self.stubs.iter().map(range).collect()
    }

    /// Things the user should know: connections that were reset, file tails kept aside.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Lets the program run, without tracking; returns when all its memory is there.
    pub fn go(mut self) -> Result<Restored, ProcessError> {
        self.tracking = None;
        let launched = self.launch()?;
        if let Some(mut lazy) = launched.lazy {
            lazy.finish()?;
        }
        Ok(launched.restored)
    }

    /// Lets the program run, tracked and lazily where that was asked for.
    pub fn launch(mut self) -> Result<Launched, ProcessError> {
        let (pid, ns_pid) = (self.pid(), self.ns_pid());
        for file in &self.written {
            if let Some(contents) = self.contents.remove(&file.space) {
                self.notices.extend(file.put_back(contents, pid)?);
            }
        }
        for contents in self.contents.values_mut() {
            contents
                .apply()
                .map_err(|e| internal("putting the contents of a file back", e))?;
        }
        let more = self.made.apply_files(pid)?;
        self.notices.extend(more);
        for ((stub, threads), ended) in self.stubs.iter_mut().zip(&self.threads).zip(&self.ended) {
            threads::set_registers(stub, &threads.threads, ended)?;
        }
        for (stub, _) in self
            .stubs
            .iter_mut()
            .zip(&self.with_memory)
            .filter(|(_, has)| **has)
        {
            stub.remove_arena()?;
        }
        let tracking = self.tracking.take();
        let tracked = tracking.and_then(|t| t.finish(&mut self.stubs));
        if let Some(namespace) = &mut self.namespace {
            let kept = namespace.keep(ns_pid);
            kept.map_err(|e| spawn_failed(pid, e))?;
        }
        let lazy = self.serving.take().map(Serving::bring_all).transpose()?;
        let mut first_run_us = 0;
        let mut stubs = std::mem::take(&mut self.stubs);
        stubs.iter_mut().for_each(|s| s.keep = true);
        for stub in &mut stubs {
            for held in std::mem::take(&mut stub.threads) {
                let tid = held.tid;
                held.release()
                    .map_err(|e| stub.target.kernel(format!("starting thread {tid}"), e))?;
                if first_run_us == 0 {
                    first_run_us = self.began.elapsed().as_micros() as u64;
                }
            }
        }
        self.made.keep();
        self.made_files.0.clear();
        self.objects.keep();
        let restored = Restored {
            pid,
            ns_pid,
            restore_us: self.restore_us,
            first_run_us,
            later_bytes: self.later_bytes,
            notices: self.notices,
        };
        Ok(Launched {
            restored,
            tracked,
            lazy,
        })
    }
}
