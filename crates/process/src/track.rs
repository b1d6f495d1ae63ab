//! A running program (a process and all that descends from it) under tracking: who belongs to it,
//! and what is copied while it runs. The stop itself is in [`stop`].

mod fellows;
mod limit;
mod stop;

pub use limit::Limit;
pub use stop::Stopped;

use crate::captured::Spare;
use crate::closed::Closed;
use crate::family::{self, Kin};
use crate::freeze::{Held, freeze};
use crate::guard::{Exposure, Guard};
use crate::member::{self, Member, NotAdopted};
use crate::procfs::ThreadFiles;
use crate::reentry::WaitBook;
use crate::resources::descriptors;
use crate::resources::machine::MachineState;
use crate::resources::shared::SharedObjects;
use crate::resources::system_v::SystemV;
use crate::sharing::Sharing;
use crate::sharing::outside::Outside;
use crate::strategy::{self, Granularity, Strategy};
use crate::target::Target;
use crate::{ProcessError, namespaces, preflight};
pub(crate) use limit::Notes;
use limit::{Experience, Noting};
use outlive_epoch::{PageSink, Run, SpaceId};
use rustix::fd::BorrowedFd;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How a program is tracked.
#[derive(Clone, Debug)]
pub struct TrackOptions {
    /// How long a thread may take to stop before the epoch is given up.
    pub stop_timeout: Duration,
    /// How memory is captured (an epoch taken once can do with [`Strategy::Copy`]).
    pub strategy: Strategy,
    /// The unit in which written pages are taken.
    pub granularity: Granularity,
    /// Files of up to so many bytes that the program has open for writing are kept in the epochs.
    pub files_limit: u64,
    /// Whether all children of the calling process belong to the program: then a process whose
    /// parent has ended belongs to it too, if the caller is a subreaper (`PR_SET_CHILD_SUBREAPER`).
    /// In a PID namespace that a restore made, such processes belong to it in any case.
    pub strays: bool,
    /// How many threads read, at a stop, what there is much of, where a processor is there for each:
    /// the caller is one of them.
    pub threads: usize,
    /// Whether writes are to be found by soft-dirty bits, also where the kernel has better.
    pub soft_dirty: bool,
    /// With [`Strategy::Cow`]: everything counts that may be dirty, at every instant. Whoever touches
    /// memory for the first time waits for the guard as well, and what is mapped anew is looked for
    /// while the program runs.
    pub strict: bool,
    /// What is learnt of the program: give the same to whoever tracks it again.
    pub lessons: Lessons,
}

/// What outlives the tracking of a program that is begun anew.
#[derive(Clone, Debug, Default)]
pub struct Lessons {
    /// Stops at which nothing but the root is left to be copied behind, because processes ended before
    /// they were copied, and how many it was after the last such loss.
    hurry: Arc<Mutex<(u32, u32)>>,
}

impl Lessons {
    fn hurry(&self) -> MutexGuard<'_, (u32, u32)> {
        self.hurry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing but the root is to be left behind at this stop.
    fn hurries(&self) -> bool {
        self.hurry().0 > 0
    }

    /// A stop is over.
    fn stopped(&self) {
        let mut hurry = self.hurry();
        hurry.0 = hurry.0.saturating_sub(1);
    }

    /// A process ended before it was copied.
    fn lost(&self) {
        let mut hurry = self.hurry();
        let longer = (hurry.1 * 2 + 1).min(MOST_HURRY);
        *hurry = (longer, longer);
    }
}

/// Most threads that read at a stop, where nobody says how many.
const THREADS: usize = 4;

impl Default for TrackOptions {
    fn default() -> Self {
        Self {
            stop_timeout: Duration::from_secs(5),
            strategy: Strategy::default(),
            granularity: Granularity::default(),
            files_limit: FILES_LIMIT,
            strays: false,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)),
            soft_dirty: false,
            strict: false,
            lessons: Lessons::default(),
        }
    }
}

/// [`TrackOptions::files_limit`], where nothing else is asked for, bytes.
pub const FILES_LIMIT: u64 = 16 << 20;

/// By which means written pages are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// `PAGEMAP_SCAN` with asynchronous write protection.
    WriteProtect,
    /// Soft-dirty bits.
    SoftDirty,
    /// Not at all: the strategy copies everything.
    Off,
    /// Every epoch copies everything, because of what is said here.
    FullCopy(String),
}

impl Tracking {
    /// Its name, as `ps` has it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::WriteProtect => "write-protect",
            Self::SoftDirty => "soft-dirty",
            Self::Off => "off",
            Self::FullCopy(_) => "full-copy",
        }
    }

    fn finds_writes(&self) -> bool {
        matches!(self, Self::WriteProtect | Self::SoftDirty)
    }
}

/// Stops without copies behind after processes ended before they were copied, at most.
const MOST_HURRY: u32 = 63;
/// How often it is looked for whether pages are still missing.
const MISSING_POLL: Duration = Duration::from_millis(2);
/// How often it is looked for new processes right before a stop, until there are none.
const LOOKS: u32 = 4;

/// A running program under tracking. Between epochs nothing is attached to it.
pub struct Tracked {
    root: u32,
    /// Processes whose children all belong to the program.
    adopters: Vec<u32>,
    options: TrackOptions,
    tracking: Tracking,
    members: BTreeMap<u32, Member>,
    descriptors: descriptors::Memory,
    shared: SharedObjects,
    sharing: Sharing,
    outside: Outside,
    machine: Arc<MachineState>,
    system_v: SystemV,
    /// Pages of members that are no more, which the epochs so far hold.
    retired: Vec<Run>,
    spare: Spare,
    closed: Closed,
    /// What was handed over since the last stop.
    notes: Notes,
    experience: Experience,
    /// Pages that were exposed when the limit was set.
    exposed: u64,
    detached: bool,
}

impl Tracked {
    /// Begins to track process `pid` and what descends from it. Refuses, before any harm, state
    /// that could not be restored.
    pub fn attach(pid: u32, options: TrackOptions) -> Result<Self, ProcessError> {
        let mut tracked = Self::of(pid, options)?;
        let patience = tracked.options.stop_timeout;
        preflight::of_program(pid, &tracked.adopters, patience, &mut tracked.outside)?;
        tracked.adopt_all()?;
        Ok(tracked)
    }

    /// Goes on with a program that was restored and has not run yet. `members` are its processes
    /// with what the restored epoch holds of their pages; `retired` are all other pages of it,
    /// which will be taken anew.
    pub(crate) fn going_on(
        pid: u32,
        options: TrackOptions,
        members: Vec<Member>,
        retired: Vec<Run>,
    ) -> Result<Self, ProcessError> {
        let mut tracked = Self::of(pid, options)?;
        if members.iter().any(Member::has_soft_dirty) {
            tracked.tracking = Tracking::SoftDirty;
        }
        let members = members.into_iter().map(|m| (m.target.pid, m));
        tracked.members = members.collect();
        tracked.retired = retired;
        Ok(tracked)
    }

    /// Without any member.
    fn of(pid: u32, options: TrackOptions) -> Result<Self, ProcessError> {
        let mut adopters: Vec<u32> = namespaces::init_of(pid).into_iter().collect();
        if options.strays {
            adopters.push(std::process::id());
        }
        let shared = SharedObjects::with_files(options.files_limit);
        let tracking = if options.strategy.tracks() {
            // Until a process turns out to be tracked otherwise.
            Tracking::WriteProtect
        } else {
            Tracking::Off
        };
        Ok(Self {
            root: pid,
            adopters,
            options,
            tracking,
            members: BTreeMap::new(),
            descriptors: descriptors::Memory::default(),
            shared,
            sharing: Sharing::default(),
            outside: Outside::default(),
            machine: Arc::new(MachineState::here()?),
            system_v: SystemV::default(),
            retired: Vec::new(),
            spare: Spare::default(),
            closed: Closed::default(),
            notes: Notes::default(),
            experience: Experience::default(),
            exposed: 0,
            detached: false,
        })
    }

    /// The root process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.root
    }

    /// By which means written pages are found.
    #[must_use]
    pub fn tracking(&self) -> &Tracking {
        &self.tracking
    }

    /// Pages that may have been written since they were last protected, as of now; `None` where
    /// the strategy has no guard. Memory mapped since the last stop is not among them, unless the
    /// guard is strict: then all of [`Tracked::exposed_pages`] is, too.
    #[must_use]
    pub fn dirty_pages(&self) -> Option<u64> {
        let dirty: u64 = self.guards().map(Guard::dirty).sum();
        let all = dirty + self.exposed_pages();
        self.options.strategy.guards().then_some(all)
    }

    /// Holds writers beyond so many dirty pages (see [`Tracked::dirty_pages`]), each process to its
    /// equal part of what is not exposed, until the next stop; `None`: never.
    pub fn limit_dirty(&mut self, pages: Option<u64>) {
        if pages.is_some() {
            self.expose();
        }
        self.exposed = self.exposed_pages();
        let rest = pages.map(|p| p.saturating_sub(self.exposed));
        let each = rest.map(|p| p / self.guards().count().max(1) as u64);
        let members = self.members.keys().copied().collect();
        self.guards().for_each(|guard| {
            guard.set_limit(each, &members);
            guard.open(false);
        });
    }

    /// Pages that may be written at any time and that nobody can guard: private mappings of files,
    /// shared memory, processes that came since the last stop. 0 unless the guard is strict.
    #[must_use]
    pub fn exposed_pages(&self) -> u64 {
        let mut all = Exposure::default();
        self.guards().for_each(|guard| all.add(&guard.exposure()));
        all.pages()
    }

    /// The most of [`Tracked::dirty_pages`] that there may have been at any instant since this was
    /// asked, or since the limit was set last. 0 unless the guard is strict.
    #[must_use]
    pub fn most_dirty(&self) -> u64 {
        if !self.options.strict {
            return 0;
        }
        self.exposed + self.guards().map(Guard::most_dirty).sum::<u64>()
    }

    /// Finds out what [`Tracked::exposed_pages`] says, where the guard is strict.
    pub fn expose(&self) {
        self.guards().for_each(Guard::expose);
    }

    /// Pages that the next epoch takes because the last one failed.
    #[must_use]
    pub fn owed_pages(&self) -> u64 {
        self.members.values().map(Member::owed_pages).sum()
    }

    fn guards(&self) -> impl Iterator<Item = &Guard> {
        self.members.values().filter_map(Member::guard)
    }

    /// Descriptors of which one is readable while writers are held: an epoch is wanted.
    pub fn pressure(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.guards().map(Guard::pressure)
    }

    /// Gains a foothold in every process that is not a member yet, one after the other; returns
    /// those that became members.
    fn adopt_all(&mut self) -> Result<Vec<u32>, ProcessError> {
        self.drop_ended();
        let all = family::list(self.root, &self.adopters);
        let again = || family::list(self.root, &self.adopters);
        let refusals = self.outside.refusals(&all, again);
        if !refusals.is_empty() {
            return Err(ProcessError::Refused(refusals));
        }
        let mut adopted = Vec::new();
        for kin in all {
            // What is about to begin a program of its own is nobody's member.
            if kin.zombie || self.members.contains_key(&kin.pid) || family::is_spawning(&kin) {
                continue;
            }
            match self.adopt_running(kin) {
                // A child may end at any time.
                Err(_) if kin.pid != self.root && family::is_ending(kin.pid) => {}
                r => adopted.extend(r?.then_some(kin.pid)),
            }
        }
        Ok(adopted)
    }

    /// Whether it became a member.
    fn adopt_running(&mut self, kin: Kin) -> Result<bool, ProcessError> {
        let target = Target::open(kin.pid)?;
        let mut waits = WaitBook::default();
        let Some(target) = self.join(target, &mut waits) else {
            return Ok(true);
        };
        let sleepers = waits.look(&target);
        let mut threads = freeze(&target, self.options.stop_timeout, &mut |held| {
            member::prepare(&target, &mut waits, held, &sleepers);
        })?;
        let files = &mut ThreadFiles::new(target.pid, 0);
        if let Err(e) = member::look(&target, &mut waits, &mut threads, &sleepers, files) {
            member::let_go(&target, &mut waits, threads, files)?;
            return Err(e);
        }
        match self.adopt(target, waits, &mut threads) {
            Ok(pid) => match self.members.get_mut(&pid) {
                Some(member) => member.let_go(threads).map(|()| true),
                None => Ok(false),
            },
            Err(not) => {
                let NotAdopted {
                    target,
                    mut waits,
                    error,
                } = *not;
                member::let_go(&target, &mut waits, threads, files)?;
                Err(error)
            }
        }
    }

    fn adopt(
        &mut self,
        target: Target,
        waits: WaitBook,
        threads: &mut [Held],
    ) -> Result<u32, Box<NotAdopted>> {
        let pid = target.pid;
        if let Some(filling) = self.members.values().find_map(Member::filling) {
            // It may have been made by one of which pages are missing.
            filling.settle_children();
        }
        let (member, tracking) = Member::adopt(target, waits, threads, &self.options)?;
        // What is to be said of one that is not tracked is said of all.
        if self.tracking.finds_writes() {
            self.tracking = tracking;
        }
        self.members.insert(pid, member);
        Ok(pid)
    }

    /// Forgets members that have ended, lest another process gets their number, and those that
    /// began another program, in which we have no foothold.
    fn drop_ended(&mut self) {
        let over = |m: &Member| m.target.has_ended() || !m.is_intact();
        let gone: Vec<u32> = self
            .members
            .iter()
            .filter(|(_, m)| over(m))
            .map(|(pid, _)| *pid)
            .collect();
        gone.into_iter().for_each(|pid| self.drop_member(pid));
    }

    /// Copies what was written since the last pass into `sink` while the program runs, as far as
    /// the strategy has it: of processes in no epoch yet, or of all, until a further pass would not
    /// make the stop shorter. Does nothing where writes are not tracked: all of it would have to
    /// be copied again. Ends early when `hurry` says so: what was not copied is left to the stop.
    pub fn precopy(
        &mut self,
        sink: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<(), ProcessError> {
        if !self.tracking.finds_writes() {
            return Ok(());
        }
        self.let_spawn()?;
        self.adopt_all()?;
        self.await_missing(hurry);
        self.noting(sink, |this, sink| this.copy_all(sink, hurry))
    }

    /// Where all of a process is to be taken anew of which pages are missing, these come first. At the
    /// stop, memory may be taken over from who serves it.
    fn await_missing(&mut self, hurry: &mut dyn FnMut() -> bool) {
        let missing = |m: &Member| m.is_fresh() && m.filling().is_some_and(|f| !f.is_over());
        while self.members.values().any(missing) && !hurry() {
            std::thread::sleep(MISSING_POLL);
        }
        self.members.values_mut().for_each(Member::may_take_over);
    }

    /// Waits for processes that are about to begin a program of their own. Nobody is held meanwhile:
    /// they would not come to it where they are, in the memory of their parents.
    fn let_spawn(&self) -> Result<(), ProcessError> {
        let open = |open| {
            self.guards().for_each(|guard| guard.open(open));
        };
        let patience = self.options.stop_timeout;
        let done = preflight::let_spawn(self.root, &self.adopters, patience, || open(true));
        open(false);
        done
    }

    /// Does something with a sink that takes notes.
    fn noting<T>(
        &mut self,
        sink: &mut dyn PageSink,
        work: impl FnOnce(&mut Self, &mut dyn PageSink) -> T,
    ) -> T {
        let mut notes = std::mem::take(&mut self.notes);
        let mut noting = Noting {
            sink,
            notes: &mut notes,
        };
        let done = work(self, &mut noting);
        self.notes = notes;
        done
    }

    fn copy_all(
        &mut self,
        sink: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<(), ProcessError> {
        self.tell_retired(sink)?;
        let strategy = self.options.strategy;
        let all = self.members.iter();
        let all: Vec<(u32, bool)> = all.map(|(pid, m)| (*pid, m.is_fresh())).collect();
        let mut before = u64::MAX;
        for pass in 0.. {
            // Soft-dirty bits stay until the stop: further passes would find the same again.
            let passes = |fresh| match self.tracking {
                Tracking::SoftDirty => strategy.passes(fresh).min(u32::from(fresh)),
                _ => strategy.passes(fresh),
            };
            let due = all.iter().filter(|(_, fresh)| pass < passes(*fresh));
            let due: Vec<u32> = due.map(|(pid, _)| *pid).collect();
            let bytes = self.copy_ahead(&due, sink, hurry)?;
            if hurry() {
                break;
            }
            if pass == 0 {
                self.shared.copy(sink, |fresh| strategy.passes(fresh) > 0)?;
            }
            if !strategy::is_worth_another(bytes, before) {
                break;
            }
            before = bytes;
        }
        Ok(())
    }

    /// One pass over these members while the program runs; returns the bytes that were copied.
    fn copy_ahead(
        &mut self,
        pids: &[u32],
        sink: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<u64, ProcessError> {
        // It may have made a child by now.
        self.members
            .values_mut()
            .for_each(|m| m.set_relatives(true));
        let mut bytes = 0;
        for pid in pids {
            if hurry() {
                break;
            }
            let Some(member) = self.members.get_mut(pid) else {
                continue;
            };
            match member.precopy(sink, &mut self.shared, hurry) {
                Ok(copied) => bytes += copied,
                // It has begun another program.
                Err(_) if !member.is_intact() => {}
                // A child may end at any time.
                Err(_) if *pid != self.root && family::is_ending(*pid) => {}
                Err(e) => return Err(cause(e, &member.target, self.root)),
            }
        }
        Ok(bytes)
    }

    fn tell_retired(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        for run in self.retired.drain(..) {
            sink.absent(run)?;
        }
        Ok(())
    }

    /// Adopts processes that appeared since the last look, and copies what they have, while the
    /// program runs.
    fn take_on_new(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        for _ in 0..LOOKS {
            let new = self.adopt_all()?;
            // Before what is copied: a process that began another program keeps its number.
            self.tell_retired(sink)?;
            if new.is_empty() {
                break;
            }
            if self.tracking.finds_writes() {
                self.copy_ahead(&new, sink, &mut || false)?;
            }
        }
        Ok(())
    }

    /// From now on a thread may take so long to stop before an epoch is given up.
    pub fn set_stop_timeout(&mut self, timeout: Duration) {
        self.options.stop_timeout = timeout;
    }

    /// How long a thread may take to stop.
    #[must_use]
    pub fn stop_timeout(&self) -> Duration {
        self.options.stop_timeout
    }

    /// Call when an epoch was not committed: what it took as saved is not; the next one is full.
    pub fn forget_progress(&mut self) {
        self.abandon_all();
        self.members.values_mut().for_each(Member::forget_progress);
        self.shared.forget();
        self.notes.clear();
    }

    /// What was to be copied behind is not wanted any more.
    fn abandon_all(&mut self) {
        // Whoever has ended meanwhile is not asked again: others would do the same.
        let mut ended = false;
        for member in self.members.values_mut() {
            let over = member.target.has_ended() || !member.is_intact();
            ended |= member.abandon() && over;
        }
        if ended {
            self.options.lessons.lost();
        }
    }

    /// What was handed over since the last stop gets into no epoch: it is handed over again.
    fn owe_all(&mut self) {
        let mut notes = std::mem::take(&mut self.notes);
        for (space, pages, absent) in notes.take() {
            self.owe(space, &pages, &absent);
        }
    }

    fn owe(&mut self, space: SpaceId, pages: &[Run], absent: &[Run]) {
        let mut members = self.members.values_mut();
        let holds = |m: &&mut Member| m.target.id == space.0 && m.holder() == m.target.pid;
        if let Some(member) = members.find(holds) {
            member.owe(pages, absent);
        } else {
            self.shared.owe(pages);
            self.retired.extend(absent);
        }
    }

    /// Ends tracking; no trace stays in the program.
    pub fn detach(mut self) -> Result<(), ProcessError> {
        self.remove_trace()
    }

    fn remove_trace(&mut self) -> Result<(), ProcessError> {
        self.detached = true;
        self.drop_ended();
        let mut failed = Ok(());
        while let Some(pid) = self.any_holder() {
            let timeout = self.options.stop_timeout;
            let removed = self.members.get_mut(&pid).map(|m| remove_from(m, timeout));
            let gone = matches!(removed, Some(Err(ProcessError::Gone { .. })));
            if !gone || pid == self.root {
                failed = failed.and(removed.unwrap_or(Ok(())));
            }
            if gone {
                // If others have its address space, that is another one's now.
                self.drop_member(pid);
            } else {
                self.members.remove(&pid);
            }
        }
        self.members.clear();
        failed
    }
}

/// What made a call fail: memory of a sort that cannot be tracked is refused by its name.
fn cause(error: ProcessError, target: &Target, root: u32) -> ProcessError {
    match (error, member::refusals(target, root)) {
        (ProcessError::Kernel { .. }, Ok(found)) if !found.is_empty() => {
            ProcessError::Refused(found)
        }
        (error, _) => error,
    }
}

fn remove_from(member: &mut Member, timeout: Duration) -> Result<(), ProcessError> {
    let sleepers = member.before_stop()?;
    let mut threads = member.freeze(timeout, &sleepers)?;
    let seen = member.look(&mut threads, &sleepers);
    let removed = seen.and_then(|_| member.remove_foothold(&mut threads));
    member.let_go(threads)?;
    removed
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.detached {
            // A process that ended needs nothing removed.
            let _ = self.remove_trace();
        }
    }
}
