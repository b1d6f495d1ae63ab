//! A running program under tracking, and the stop.

use crate::bootstrap::{self, Plan};
use crate::flags::FlagsCache;
use crate::freeze::{Held, freeze, remote_failed, run_all};
use crate::image::{self, SubjectState, ThreadsState, group, kinds};
use crate::laps::Laps;
use crate::pages::{Changes, PageTracker, PrivateArea, Residue, World};
use crate::reentry::{Sleepers, WaitBook};
use crate::resources::{attributes, descriptors, memory, signals, thread};
use crate::target::{Status, Target};
use crate::{ProcessError, Refusal, preflight};
use outlive_epoch::{EpochFacts, EpochWriter, PageSink};
use outlive_linux::clock::{TimeOffsets, now_ns, realtime_ns};
use outlive_linux::maps::{self, Mapping, VmFlags};
use outlive_linux::remote::{Arena, Batch, Results};
use outlive_linux::thread::Urgent;
use rustix::fd::AsFd;
use rustix::time::ClockId;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How a program is tracked.
#[derive(Clone, Debug)]
pub struct TrackOptions {
    /// How long a thread may take to stop before the epoch is given up.
    pub stop_timeout: Duration,
    /// Whether to track written pages between epochs (an epoch taken once can do without).
    pub incremental: bool,
}

impl Default for TrackOptions {
    fn default() -> Self {
        Self {
            stop_timeout: Duration::from_secs(5),
            incremental: true,
        }
    }
}

/// By which means written pages are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// `PAGEMAP_SCAN` with asynchronous write protection.
    WriteProtect,
    /// Every epoch copies everything, because of what is said here.
    FullCopy(String),
}

/// How often a stop is tried again because of a call that goes by no name …
const NAMING_TRIES: u32 = 5;
/// … and how long the program runs in between.
const A_MOMENT: Duration = Duration::from_millis(2);

/// Pre-copying ends when a pass finds less than this, bytes …
const SMALL_PASS: u64 = 1 << 20;
/// … or after so many passes.
const MAX_PASSES: u32 = 4;

/// Buffers of earlier stops, to be used again: fresh memory would be faulted in at the stop.
type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

/// A running program under tracking. Between epochs nothing is attached to it.
pub struct Tracked {
    target: Target,
    options: TrackOptions,
    tracking: Tracking,
    arena: Arena,
    syscall_at: u64,
    pages: PageTracker,
    waits: WaitBook,
    descriptors: descriptors::Memory,
    build_ids: memory::BuildIds,
    flags: FlagsCache,
    spare: Spare,
    /// The arena was removed again.
    detached: bool,
}

impl Tracked {
    /// Begins to track process `pid`. Refuses, before any harm, state that could not be restored.
    pub fn attach(pid: u32, options: TrackOptions) -> Result<Self, ProcessError> {
        let target = Target::open(pid)?;
        refuse_early(&target)?;
        let mut waits = WaitBook::default();
        let sleepers = waits.look(&target);
        let mut threads = freeze(&target, options.stop_timeout)?;
        for held in &mut threads {
            prepare(&target, &mut waits, held, &sleepers)?;
        }
        let foothold = Self::gain_foothold(&target, &mut threads, &options);
        let_go(&target, &mut waits, threads)?;
        let (arena, syscall_at, tracker) = foothold?;
        let (tracker, tracking) = match tracker {
            Ok(tracker) => (Some(tracker), Tracking::WriteProtect),
            Err(why) => (None, Tracking::FullCopy(why)),
        };
        let pages = PageTracker::new(&target, tracker)?;
        Ok(Self {
            target,
            options,
            tracking,
            arena,
            syscall_at,
            pages,
            waits,
            descriptors: descriptors::Memory::default(),
            build_ids: memory::BuildIds::default(),
            flags: FlagsCache::default(),
            spare: Spare::default(),
            detached: false,
        })
    }

    fn gain_foothold(
        target: &Target,
        threads: &mut [Held],
        options: &TrackOptions,
    ) -> Result<
        (
            Arena,
            u64,
            Result<outlive_linux::userfault::WriteTracker, String>,
        ),
        ProcessError,
    > {
        let mappings = bootstrap::mappings_without(target, None)?;
        let syscall_at = bootstrap::find_syscall(target.pid, &mappings).ok_or_else(|| {
            let r = target.refusal(
                "",
                "no syscall instruction was found in its code",
                "report this",
            );
            ProcessError::Refused(vec![r])
        })?;
        bootstrap::remove_leftovers(target, threads, syscall_at, &mappings)?;
        let leader = &mut threads[0];
        let arena = bootstrap::make_arena(target, leader, syscall_at, Plan::CAPTURE)?;
        let rest = bootstrap::hide_arena(target, leader, &arena).and_then(|()| {
            if options.incremental {
                bootstrap::make_tracker(target, leader, &arena)
            } else {
                Ok(Err("not asked for".into()))
            }
        });
        match rest {
            Ok(tracker) => Ok((arena, syscall_at, tracker)),
            Err(e) => {
                let _ = bootstrap::remove_arena(target, leader, syscall_at, arena.range());
                Err(e)
            }
        }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.target.pid
    }

    /// By which means written pages are found.
    #[must_use]
    pub fn tracking(&self) -> &Tracking {
        &self.tracking
    }

    /// Copies what was written since the last pass into `sink` while the program runs, until a
    /// further pass would not make the stop shorter. Does nothing where writes are not tracked:
    /// all of it would have to be copied again.
    pub fn precopy(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        if !self.pages.is_incremental() {
            return Ok(());
        }
        let mut before = u64::MAX;
        for _ in 0..MAX_PASSES {
            let mappings = bootstrap::mappings_without(&self.target, Some(self.arena.range()))?;
            let areas = private_areas(&mappings);
            let changes = self.pages.pass(&self.target, &areas, World::Runs)?;
            let bytes = changes.bytes();
            self.pages.copy(&changes, sink)?;
            if bytes < SMALL_PASS || bytes > before / 2 {
                break;
            }
            before = bytes;
        }
        Ok(())
    }

    /// Freezes the program and takes everything that is left into memory. On failure the program
    /// runs on as before.
    pub fn stop(&mut self) -> Result<(Stopped<'_>, Captured), ProcessError> {
        self.flags.refresh(&self.target)?;
        let mut sleepers = self.waits.look(&self.target);
        let urgent = Urgent::begin();
        let mut began = Instant::now();
        let mut threads = freeze(&self.target, self.options.stop_timeout)?;
        for _ in 0..NAMING_TRIES {
            if !threads.iter().any(|t| self.waits.is_nameless(t, &sleepers)) {
                break;
            }
            // It had not fallen asleep yet when it was looked at: by now it will have.
            self.go_on_for_a_moment(threads, &sleepers)?;
            sleepers = self.waits.look(&self.target);
            began = Instant::now();
            threads = freeze(&self.target, self.options.stop_timeout)?;
        }
        let captured = self.capture(&mut threads, &sleepers);
        match captured {
            Ok(captured) => Ok((
                Stopped {
                    tracked: self,
                    threads,
                    began,
                    _urgent: urgent,
                },
                captured,
            )),
            Err(e) => {
                let_go(&self.target, &mut self.waits, threads)?;
                Err(e)
            }
        }
    }

    fn go_on_for_a_moment(
        &mut self,
        mut threads: Vec<Held>,
        sleepers: &Sleepers,
    ) -> Result<(), ProcessError> {
        for held in &mut threads {
            prepare(&self.target, &mut self.waits, held, sleepers)?;
        }
        let_go(&self.target, &mut self.waits, threads)?;
        std::thread::sleep(A_MOMENT);
        Ok(())
    }

    /// Call when an epoch was not committed: what it took as saved is not; the next one is full.
    pub fn forget_progress(&mut self) {
        if let Ok(mappings) = bootstrap::mappings_without(&self.target, Some(self.arena.range())) {
            self.pages.forget(&private_areas(&mappings));
        }
    }

    /// Ends tracking; no trace stays in the program.
    pub fn detach(mut self) -> Result<(), ProcessError> {
        self.remove_trace()
    }

    fn remove_trace(&mut self) -> Result<(), ProcessError> {
        self.detached = true;
        let sleepers = self.waits.look(&self.target);
        let mut threads = freeze(&self.target, self.options.stop_timeout)?;
        let prepared = threads
            .iter_mut()
            .try_for_each(|held| prepare(&self.target, &mut self.waits, held, &sleepers).map(drop));
        let range = self.arena.range();
        let removed = prepared.and_then(|()| {
            bootstrap::remove_arena(&self.target, &mut threads[0], self.syscall_at, range)
        });
        let_go(&self.target, &mut self.waits, threads)?;
        removed
    }

    fn capture(
        &mut self,
        threads: &mut [Held],
        sleepers: &Sleepers,
    ) -> Result<Captured, ProcessError> {
        let mut laps = Laps::new();
        let mut sights = Vec::with_capacity(threads.len());
        for held in threads.iter_mut() {
            let sight = thread::look(&self.target, held)?;
            let left = self
                .waits
                .prepare(&self.target, held, &sight.status, sleepers);
            sights.push((sight, left));
        }
        laps.lap("threads");
        // Only now: a program that is refused goes on too, with its interrupted calls.
        let refusals = preflight::of_threads(&self.target)?;
        laps.lap("preflight");
        if !refusals.is_empty() {
            return Err(ProcessError::Refused(refusals));
        }
        let leader_status = sights[0].0.status.clone();
        let (asked, answers) = self.ask(threads)?;
        laps.lap("remote");
        let collected = {
            let ignore: &[u32] = &[];
            let target = descriptors::Target {
                pid: self.target.pid,
                program: &self.target.program,
                pidfd: self.target.pidfd.as_fd(),
                ignore,
            };
            descriptors::collect_table(&target, &mut self.descriptors)?
        };
        laps.lap("descriptors");
        let mappings = self.mappings_at_stop()?;
        laps.lap("mappings");
        let plain: Vec<Mapping> = mappings.iter().map(|(m, _)| m.clone()).collect();
        let changes = self
            .pages
            .pass(&self.target, &private_areas(&plain), World::Stopped)?;
        let guards = changes.guards.clone();
        laps.lap("scan");
        let residue = self.take(changes)?;
        laps.lap("copy");
        let process =
            attributes::collect(&self.target, &leader_status, &asked.process, &answers[0])?;
        let signals = signals::collect(&self.target, &threads[0], &asked.signals, &answers[0])?;
        let memory = memory::collect(
            &self.target,
            &mappings,
            &guards,
            &mut self.build_ids,
            asked.memory,
            &answers[0],
        )?;
        laps.lap("describe");
        let mut states = Vec::with_capacity(threads.len());
        for (((held, (sight, left)), asked), answers) in
            threads.iter().zip(sights).zip(&asked.threads).zip(&answers)
        {
            states.push(thread::collect(
                &self.target,
                held,
                sight,
                *asked,
                answers,
                left,
            )?);
        }
        // After everything that has time left: a timer may fire late by the clocks, never early.
        let clocks = Clocks::of(&self.target)?;
        let subject = clocks.subject(&self.target, &process.command_line, threads.len() as u32);
        laps.lap("threads again");
        laps.tell("stop");
        let files = FilesToSync::new(collected.files, &memory);
        Ok(Captured {
            processes: 1,
            threads: threads.len() as u32,
            facts: EpochFacts {
                taken_at_ns: clocks.realtime_ns,
                stop_us: 0,
            },
            state: States {
                subject,
                process,
                signals,
                threads: ThreadsState { threads: states },
                memory,
                table: collected.table,
            },
            residue,
            files,
            spare: self.spare.clone(),
        })
    }

    fn take(&mut self, changes: Changes) -> Result<Residue, ProcessError> {
        let spare = self.spare.lock().map(|mut s| s.pop()).unwrap_or_default();
        self.pages
            .take(&self.target, changes, spare.unwrap_or_default())
    }

    /// Has every thread answer its own questions, the leading one also those for the process.
    fn ask(&self, threads: &mut [Held]) -> Result<(Asked, Vec<Results>), ProcessError> {
        let mut asked = Vec::with_capacity(threads.len());
        let mut of_leader = None;
        let answers = run_all(&self.arena, threads, |held| {
            let mut batch = Batch::new();
            asked.push(thread::ask(&mut batch));
            if held.tid == self.target.pid {
                of_leader = Some((
                    attributes::ask(&mut batch),
                    signals::ask(&mut batch),
                    memory::ask(&mut batch),
                ));
            }
            batch
        });
        let answers = answers.map_err(|e| remote_failed(&self.target, e))?;
        let (process, signals, memory) = of_leader.ok_or_else(|| ProcessError::Gone {
            pid: self.target.pid,
            what: "its leading thread has ended".into(),
        })?;
        Ok((
            Asked {
                threads: asked,
                process,
                signals,
                memory,
            },
            answers,
        ))
    }

    /// The mappings with their flags, without our own.
    fn mappings_at_stop(&mut self) -> Result<Vec<(Mapping, VmFlags)>, ProcessError> {
        let now = bootstrap::mappings_without(&self.target, Some(self.arena.range()))?;
        Ok(self.flags.assign(now))
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.detached {
            // A process that ended needs nothing removed.
            let _ = self.remove_trace();
        }
    }
}

struct Asked {
    threads: Vec<thread::Asked>,
    process: attributes::Asked,
    signals: Vec<outlive_linux::remote::CallId>,
    memory: outlive_linux::remote::CallId,
}

fn refuse_early(target: &Target) -> Result<(), ProcessError> {
    let mut refusals: Vec<Refusal> = preflight::of_process(target)?;
    let mappings =
        maps::read_with_flags(target.pid).map_err(|e| target.kernel("reading its mappings", e))?;
    for (at, (m, flags)) in mappings.iter().enumerate() {
        let stamped = |m: &Mapping| {
            m.shared && m.name.starts_with(b"/dev/zero") && Arena::is_stamped(target.pid, m.start)
        };
        // What an outlive that died left behind is removed at the first stop.
        let leftover = stamped(m) || (at > 0 && m.shared && stamped(&mappings[at - 1].0));
        if flags.has(VmFlags::WRITE_PROTECT) {
            let what = "memory that a userfaultfd tracks";
            refusals.push(memory::refusal(target, m, what));
        } else if !leftover && let Err(what) = memory::kind_of(m, *flags) {
            refusals.push(memory::refusal(target, m, what));
        }
    }
    let view = descriptors::Target {
        pid: target.pid,
        program: &target.program,
        pidfd: target.pidfd.as_fd(),
        ignore: &[],
    };
    match descriptors::preflight(&view) {
        Ok(()) => {}
        Err(ProcessError::Refused(more)) => refusals.extend(more),
        Err(e) => return Err(e),
    }
    if refusals.is_empty() {
        Ok(())
    } else {
        Err(ProcessError::Refused(refusals))
    }
}

fn prepare(
    target: &Target,
    waits: &mut WaitBook,
    held: &mut Held,
    sleepers: &Sleepers,
) -> Result<Option<u64>, ProcessError> {
    let status = Status::read(target.pid, held.tid)
        .map_err(|e| target.kernel(format!("reading the status of thread {}", held.tid), e))?;
    Ok(waits.prepare(target, held, &status, sleepers))
}

/// Lets all threads go on. All are let go even if one cannot be.
fn let_go(target: &Target, waits: &mut WaitBook, threads: Vec<Held>) -> Result<(), ProcessError> {
    let mut failed = None;
    for held in threads {
        let tid = held.tid;
        waits.going_on(target, tid);
        if let Err(e) = held.release() {
            failed = failed.or(Some(target.kernel(format!("resuming thread {tid}"), e)));
        }
    }
    failed.map_or(Ok(()), Err)
}

/// The private mappings, whose pages belong into epochs.
fn private_areas(mappings: &[Mapping]) -> Vec<PrivateArea> {
    mappings
        .iter()
        .filter(|m| !m.shared && !m.name.starts_with(b"[v"))
        .map(|m| PrivateArea {
            span: (m.start, m.end),
            readable: m.prot & 1 != 0,
            anonymous: m.inode == 0,
        })
        .collect()
}

/// The time of a stop.
struct Clocks {
    realtime_ns: u64,
    monotonic_ns: u64,
    boottime_ns: u64,
}

impl Clocks {
    fn of(target: &Target) -> Result<Self, ProcessError> {
        let offsets =
            |pid| TimeOffsets::of(pid).map_err(|e| target.kernel("reading its clocks", e));
        let (theirs, ours) = (offsets(target.pid)?, offsets(std::process::id())?);
        let seen = |clock, theirs: i64, ours: i64| {
            u64::try_from(now_ns(clock).saturating_add(theirs).saturating_sub(ours)).unwrap_or(0)
        };
        Ok(Self {
            realtime_ns: realtime_ns(),
            monotonic_ns: seen(ClockId::Monotonic, theirs.monotonic_ns, ours.monotonic_ns),
            boottime_ns: seen(ClockId::Boottime, theirs.boottime_ns, ours.boottime_ns),
        })
    }

    fn subject(&self, target: &Target, command_line: &[u8], threads: u32) -> SubjectState {
        let text = |path: &str| {
            std::fs::read_to_string(path)
                .map(|t| t.trim().to_owned())
                .unwrap_or_default()
        };
        SubjectState {
            root_process: target.pid,
            processes: vec![target.pid],
            threads,
            command_line: command_line.to_vec(),
            realtime_ns: self.realtime_ns,
            monotonic_ns: self.monotonic_ns,
            boottime_ns: self.boottime_ns,
            kernel: text("/proc/sys/kernel/osrelease"),
            boot_id: text("/proc/sys/kernel/random/boot_id"),
        }
    }
}

/// A frozen program. Dropping it lets the program run on.
pub struct Stopped<'a> {
    tracked: &'a mut Tracked,
    threads: Vec<Held>,
    began: Instant,
    _urgent: Urgent,
}

impl Stopped<'_> {
    /// Lets the program run on; the time from the first thread frozen to the last one resumed.
    pub fn resume(mut self) -> Result<Duration, ProcessError> {
        let threads = std::mem::take(&mut self.threads);
        let_go(&self.tracked.target, &mut self.tracked.waits, threads)?;
        Ok(self.began.elapsed())
    }

    /// Ends the program (SIGKILL) and waits until it is gone, which includes reaping it if it is
    /// our own child. For planned events, after the epoch is durable.
    pub fn end(mut self) -> Result<(), ProcessError> {
        let target = &self.tracked.target;
        outlive_linux::thread::kill(target.pid).map_err(|e| target.kernel("ending it", e))?;
        let deadline = Instant::now() + self.tracked.options.stop_timeout;
        let threads = std::mem::take(&mut self.threads);
        // The leading thread is gone only after all others.
        for halted in threads.into_iter().rev().filter_map(Held::into_halted) {
            let tid = halted.tid();
            halted.await_end(deadline).map_err(|e| {
                target.kernel(
                    format!("waiting for thread {tid} to end: {e}"),
                    std::io::Error::other("stuck"),
                )
            })?;
        }
        self.tracked.detached = true;
        if target.own_child
            && let Some(pid) = i32::try_from(target.pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
        {
            let options = rustix::process::WaitOptions::empty();
            rustix::process::waitpid(Some(pid), options)
                .map_err(|e| target.kernel("reaping it", e))?;
        }
        Ok(())
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let threads = std::mem::take(&mut self.threads);
        let _ = let_go(&self.tracked.target, &mut self.tracked.waits, threads);
    }
}

/// Everything but pages.
struct States {
    subject: SubjectState,
    process: attributes::ProcessState,
    signals: signals::SignalsState,
    threads: ThreadsState,
    memory: memory::MemoryState,
    table: descriptors::FdTable,
}

/// What the stop took: state trees and the pages that had not been copied before.
pub struct Captured {
    /// Number of processes.
    pub processes: u32,
    /// Number of threads.
    pub threads: u32,
    /// Time of the stop; `stop_us` is for the caller to fill in after the resume.
    pub facts: EpochFacts,
    state: States,
    residue: Residue,
    files: FilesToSync,
    spare: Spare,
}

impl Captured {
    /// Writes trees and pages into the epoch.
    pub fn write(&self, writer: &mut dyn EpochWriter) -> Result<(), ProcessError> {
        self.residue.write(writer)?;
        let s = &self.state;
        let pid = s.subject.root_process;
        image::put(writer, image::SUBJECT, &s.subject)?;
        image::put(writer, &group(kinds::ATTRIBUTES, pid), &s.process)?;
        image::put(writer, &group(kinds::SIGNALS, pid), &s.signals)?;
        image::put(writer, &group(kinds::THREADS, pid), &s.threads)?;
        image::put(writer, &group(kinds::MEMORY, pid), &s.memory)?;
        image::put(writer, &group(kinds::DESCRIPTORS, pid), &s.table)
    }

    /// Makes what the program had written to its files by the stop durable (`fsync`). Must have
    /// succeeded before the epoch is committed.
    pub fn sync_files(&self) -> Result<(), ProcessError> {
        self.files.sync(self.state.subject.root_process)
    }

    /// Number of pages that were taken at the stop itself.
    #[must_use]
    pub fn residue_pages(&self) -> u64 {
        self.residue.pages()
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        if let Ok(mut spare) = self.spare.lock()
            && spare.len() < 2
        {
            spare.push(std::mem::take(&mut self.residue.buffer));
        }
    }
}

/// Files whose contents must be durable before the epoch is: those open for writing, and those
/// mapped shared and writable.
struct FilesToSync {
    open: descriptors::FilesToSync,
    mapped: Vec<Vec<u8>>,
}

impl FilesToSync {
    fn new(open: descriptors::FilesToSync, memory: &memory::MemoryState) -> Self {
        let mapped = memory
            .files
            .iter()
            .filter(|f| f.writable)
            .map(|f| f.path.clone())
            .collect();
        Self { open, mapped }
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
