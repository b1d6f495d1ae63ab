//! A running program (a process and all that descends from it) under tracking, and the stop.
//!
//! # Rules
//! - All processes are frozen before anything is taken of any of them: what is captured is one
//!   moment of the whole tree.
//! - A process that is found for the first time at the stop is adopted there.
//! - Whatever fails, all of them go on as before.

use crate::captured::{Captured, Clocks, FilesToSync, Spare, StopTimes};
use crate::family::{self, Kin};
use crate::freeze::{Held, freeze};
use crate::image::ZombieState;
use crate::laps::Laps;
use crate::member::{self, Member, NotAdopted, Seen};
use crate::reentry::{Sleepers, WaitBook};
use crate::resources::descriptors;
use crate::resources::machine::MachineState;
use crate::resources::shared::SharedObjects;
use crate::resources::system_v::{self, SystemV};
use crate::sharing::{Shares, Sharing};
use crate::strategy::{self, Granularity, Strategy};
use crate::target::{Status, Target};
use crate::{ProcessError, namespaces, preflight};
use outlive_epoch::{EpochFacts, PageSink, Run};
use outlive_linux::thread::Urgent;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod fellows;

/// How a program is tracked.
#[derive(Clone, Debug)]
pub struct TrackOptions {
    /// How long a thread may take to stop before the epoch is given up.
    pub stop_timeout: Duration,
    /// How memory is captured (an epoch taken once can do with [`Strategy::Copy`]).
    pub strategy: Strategy,
    /// The unit in which written pages are taken.
    pub granularity: Granularity,
    /// Whether all children of the calling process belong to the program: then a process whose
    /// parent has ended belongs to it too, if the caller is a subreaper (`PR_SET_CHILD_SUBREAPER`).
    /// In a PID namespace that a restore made, such processes belong to it in any case.
    pub strays: bool,
}

impl Default for TrackOptions {
    fn default() -> Self {
        Self {
            stop_timeout: Duration::from_secs(5),
            strategy: Strategy::default(),
            granularity: Granularity::default(),
            strays: false,
        }
    }
}

/// By which means written pages are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// `PAGEMAP_SCAN` with asynchronous write protection.
    WriteProtect,
    /// Not at all: the strategy copies everything.
    Off,
    /// Every epoch copies everything, because of what is said here.
    FullCopy(String),
}

/// How often a stop is tried again because of a call that goes by no name …
const NAMING_TRIES: u32 = 5;
/// … and how long the program runs in between.
const A_MOMENT: Duration = Duration::from_millis(2);

/// How long a program that was killed may take to be gone, at least.
const GONE_WITHIN: Duration = Duration::from_secs(5);

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
    machine: Arc<MachineState>,
    system_v: SystemV,
    /// Pages of members that are no more, which the epochs so far hold.
    retired: Vec<Run>,
    spare: Spare,
    detached: bool,
}

/// A process that stands still.
struct Frozen {
    kin: Kin,
    threads: Vec<Held>,
    seen: Vec<Seen>,
    /// A thread was in a call that goes by no name, so that it could not be made again.
    nameless: bool,
    /// For a process that is no member yet.
    stranger: Option<(Target, WaitBook)>,
}

impl Tracked {
    /// Begins to track process `pid` and what descends from it. Refuses, before any harm, state
    /// that could not be restored.
    pub fn attach(pid: u32, options: TrackOptions) -> Result<Self, ProcessError> {
        let mut tracked = Self::of(pid, options)?;
        preflight::of_program(pid, &tracked.adopters, tracked.options.stop_timeout)?;
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
        let tracking = if options.strategy.tracks() {
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
            shared: SharedObjects::default(),
            sharing: Sharing::default(),
            machine: Arc::new(MachineState::here()?),
            system_v: SystemV::default(),
            retired: Vec::new(),
            spare: Spare::default(),
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

    /// Gains a foothold in every process that is not a member yet, one after the other.
    fn adopt_all(&mut self) -> Result<(), ProcessError> {
        self.drop_ended();
        for kin in family::list(self.root, &self.adopters) {
            // What is about to begin a program of its own is nobody's member.
            if kin.zombie || self.members.contains_key(&kin.pid) || family::is_spawning(&kin) {
                continue;
            }
            match self.adopt_running(kin) {
                // A child may end at any time.
                Err(_) if kin.pid != self.root && family::is_ending(kin.pid) => {}
                r => r?,
            }
        }
        Ok(())
    }

    fn adopt_running(&mut self, kin: Kin) -> Result<(), ProcessError> {
        let target = Target::open(kin.pid)?;
        let mut waits = WaitBook::default();
        let Some(target) = self.join(target, &mut waits) else {
            return Ok(());
        };
        let sleepers = waits.look(&target);
        let mut threads = freeze(&target, self.options.stop_timeout, &mut |held| {
            member::prepare(&target, &mut waits, held, &sleepers);
        })?;
        if let Err(e) = member::look(&target, &mut waits, &mut threads, &sleepers) {
            member::let_go(&target, &mut waits, threads)?;
            return Err(e);
        }
        match self.adopt(target, waits, &mut threads) {
            Ok(pid) => match self.members.get_mut(&pid) {
                Some(member) => member.let_go(threads),
                None => Ok(()),
            },
            Err(not) => {
                let NotAdopted {
                    target,
                    mut waits,
                    error,
                } = *not;
                member::let_go(&target, &mut waits, threads)?;
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
        let how = (self.options.strategy, self.options.granularity);
        let (member, tracking) = Member::adopt(target, waits, threads, how)?;
        if let (Err(why), true) = (tracking, self.options.strategy.tracks()) {
            self.tracking = Tracking::FullCopy(why);
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
    /// be copied again.
    pub fn precopy(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        if self.tracking != Tracking::WriteProtect {
            return Ok(());
        }
        preflight::let_spawn(self.root, &self.adopters, self.options.stop_timeout)?;
        self.adopt_all()?;
        for run in self.retired.drain(..) {
            sink.absent(run)?;
        }
        let many = self.members.len() > 1;
        self.members
            .values_mut()
            .for_each(|m| m.set_relatives(many));
        let mut before = u64::MAX;
        let strategy = self.options.strategy;
        let fresh = |m: &Member| m.is_fresh();
        let fresh: BTreeSet<u32> = self
            .members
            .iter()
            .filter(|(_, m)| fresh(m))
            .map(|m| *m.0)
            .collect();
        for pass in 0.. {
            let mut bytes = 0;
            let due = |pid: &u32| pass < strategy.passes(fresh.contains(pid));
            let due = self.members.iter_mut().filter(|(pid, _)| due(pid));
            for (pid, member) in due {
                match member.precopy(sink, &mut self.shared) {
                    Ok(copied) => bytes += copied,
                    // It has begun another program.
                    Err(_) if !member.is_intact() => {}
                    // A child may end at any time.
                    Err(_) if *pid != self.root && family::is_ending(*pid) => {}
                    Err(e) => return Err(cause(e, &member.target, self.root)),
                }
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

    /// From now on a thread may take so long to stop before an epoch is given up.
    pub fn set_stop_timeout(&mut self, timeout: Duration) {
        self.options.stop_timeout = timeout;
    }

    /// How long a thread may take to stop.
    #[must_use]
    pub fn stop_timeout(&self) -> Duration {
        self.options.stop_timeout
    }

    /// Freezes the program and takes everything that is left into memory. On failure the program
    /// runs on as before.
    pub fn stop(&mut self) -> Result<(Stopped<'_>, Captured), ProcessError> {
        preflight::let_spawn(self.root, &self.adopters, self.options.stop_timeout)?;
        let urgent = Urgent::begin();
        let mut tries = 0;
        let (began, mut frozen, zombies) = loop {
            self.drop_ended();
            let mut sleepers = self.before_stop()?;
            let began = Instant::now();
            let mut frozen = Vec::new();
            let zombies = self.freeze_all(&mut sleepers, &mut frozen);
            let named = frozen.iter().all(|p| !p.nameless) || tries == NAMING_TRIES;
            match zombies {
                Ok(zombies) if named => break (began, frozen, zombies),
                // It had not fallen asleep yet when it was looked at: by now it will have.
                Ok(_) => self.let_go(frozen)?,
                Err(e) => {
                    self.let_go(frozen)?;
                    return Err(e);
                }
            }
            tries += 1;
            std::thread::sleep(A_MOMENT);
        };
        let freeze = began.elapsed();
        match self.capture(&mut frozen, zombies) {
            Ok(mut captured) => {
                captured.times.freeze = freeze;
                let rest = began.elapsed().saturating_sub(freeze);
                captured.times.scan = rest.saturating_sub(captured.times.copy);
                let stopped = Stopped {
                    tracked: self,
                    frozen,
                    began,
                    _urgent: urgent,
                };
                Ok((stopped, captured))
            }
            Err(e) => {
                self.let_go(frozen)?;
                let explained = |e, member: &Member| cause(e, &member.target, self.root);
                Err(self.members.values().fold(e, explained))
            }
        }
    }

    fn before_stop(&mut self) -> Result<BTreeMap<u32, Sleepers>, ProcessError> {
        let mut sleepers = BTreeMap::new();
        for (pid, member) in &mut self.members {
            match member
                .refuse_moved(self.root)
                .and_then(|()| member.before_stop())
            {
                Ok(found) => drop(sleepers.insert(*pid, found)),
                Err(_) if *pid != self.root && family::is_ending(*pid) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(sleepers)
    }

    /// Stops processes, parents before their children, until a listing shows no new one: then none
    /// can be made. Threads are looked at, and prepared to go on, at once.
    fn freeze_all(
        &mut self,
        sleepers: &mut BTreeMap<u32, Sleepers>,
        frozen: &mut Vec<Frozen>,
    ) -> Result<Vec<Kin>, ProcessError> {
        let mut done = BTreeSet::new();
        loop {
            let kin = family::list(self.root, &self.adopters);
            let new: Vec<Kin> = kin
                .iter()
                .copied()
                .filter(|k| !k.zombie && !done.contains(&k.pid))
                .collect();
            if new.is_empty() {
                return Ok(kin.into_iter().filter(|k| k.zombie).collect());
            }
            for kin in new {
                match self.freeze_one(kin, sleepers.remove(&kin.pid).unwrap_or_default()) {
                    Ok(process) => {
                        done.insert(kin.pid);
                        frozen.push(process);
                    }
                    // A child may end at any time.
                    Err(_) if kin.pid != self.root && family::is_ending(kin.pid) => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }

    fn freeze_one(&mut self, kin: Kin, sleepers: Sleepers) -> Result<Frozen, ProcessError> {
        let timeout = self.options.stop_timeout;
        if let Some(member) = self.members.get_mut(&kin.pid) {
            let mut threads = member.freeze(timeout, &sleepers)?;
            if !member.is_intact() {
                // It began another program since it was looked at.
                member.give_back(threads, &sleepers)?;
                self.drop_member(kin.pid);
                return self.freeze_one(kin, Sleepers::default());
            }
            let nameless = member.has_nameless(&threads, &sleepers);
            return match member.look(&mut threads, &sleepers) {
                Ok(seen) => Ok(Frozen {
                    kin,
                    threads,
                    seen,
                    nameless,
                    stranger: None,
                }),
                Err(e) => {
                    member.let_go(threads)?;
                    Err(e)
                }
            };
        }
        let target = Target::open(kin.pid)?;
        let mut waits = WaitBook::default();
        let mut threads = freeze(&target, timeout, &mut |held| {
            member::prepare(&target, &mut waits, held, &sleepers);
        })?;
        let nameless = threads.iter().any(|t| waits.is_nameless(t, &sleepers));
        match member::look(&target, &mut waits, &mut threads, &sleepers) {
            Ok(seen) => Ok(Frozen {
                kin,
                threads,
                seen,
                nameless,
                stranger: Some((target, waits)),
            }),
            Err(e) => {
                member::let_go(&target, &mut waits, threads)?;
                Err(e)
            }
        }
    }

    fn let_go(&mut self, frozen: Vec<Frozen>) -> Result<(), ProcessError> {
        let mut failed = Ok(());
        for process in frozen {
            let gone = match (process.stranger, self.members.get_mut(&process.kin.pid)) {
                (Some((target, mut waits)), _) => {
                    member::let_go(&target, &mut waits, process.threads)
                }
                (None, Some(member)) => member.let_go(process.threads),
                (None, None) => Ok(()),
            };
            failed = failed.and(gone);
        }
        failed
    }

    fn capture(
        &mut self,
        frozen: &mut [Frozen],
        zombies: Vec<Kin>,
    ) -> Result<Captured, ProcessError> {
        let mut laps = Laps::new();
        self.adopt_strangers(frozen)?;
        let mut refusals = Vec::new();
        for process in frozen.iter() {
            let target = &self.member(process.kin.pid)?.target;
            for (held, (sight, _)) in process.threads.iter().zip(&process.seen) {
                refusals.extend(preflight::of_thread(target, held.tid, &sight.status));
            }
        }
        if !refusals.is_empty() {
            return Err(ProcessError::Refused(refusals));
        }
        laps.lap("preflight");
        self.shared.begin();
        let pids: Vec<u32> = frozen.iter().map(|p| p.kin.pid).collect();
        let shares = self.sharing.find(&pids)?;
        let fellows = self.fellows(&pids);
        let collected = self.collect_descriptors(frozen, &shares)?;
        laps.lap("descriptors");
        let many = frozen.len() > 1;
        let mut states = Vec::with_capacity(frozen.len());
        for process in frozen.iter_mut() {
            let parent = self.id_of(process.kin.parent);
            let member = self
                .members
                .get_mut(&process.kin.pid)
                .ok_or_else(|| gone(process.kin.pid))?;
            let spare = self.spare.lock().ok();
            let spare = spare.and_then(|mut s| s.remove(&member.target.id));
            member.spare = spare.unwrap_or_default();
            member.set_relatives(many);
            member.has_fellows = fellows.contains(&member.holder());
            let seen = std::mem::take(&mut process.seen);
            let mut state = member.capture(&mut process.threads, seen, &mut self.shared)?;
            state.process.parent = parent;
            self.note_shares(process.kin.pid, &shares, &mut state);
            states.push(state);
        }
        self.refuse_shares(&states)?;
        let zombies = zombies
            .into_iter()
            .map(|kin| ZombieState::of(kin, self.id_of(kin.parent)))
            .collect::<Result<_, _>>()?;
        // After everything that has time left: a timer may fire late by the clocks, never early.
        let clocks = Clocks::of(&self.member(self.root)?.target)?;
        let threads = states.iter().map(|s| s.threads.threads.len() as u32).sum();
        let subject = clocks.subject(&states, zombies, threads);
        laps.lap("processes");
        let mut members = system_v::Members::new();
        for process in frozen.iter() {
            let id = self.id_of(process.kin.pid);
            members.extend(process.threads.iter().map(|t| (t.tid, id)));
        }
        let segments = self.system_v.segments()?;
        self.shared.add_segments(&segments, &members)?;
        let root = &self
            .members
            .get(&self.root)
            .ok_or_else(|| gone(self.root))?
            .target;
        let (shared, shared_residue) = self.shared.take(&segments, root, &members)?;
        let system_v = self.system_v.collect(root, &members)?;
        laps.lap("shared memory");
        laps.tell("stop");
        let files = FilesToSync::new(collected.files, &states);
        Ok(Captured {
            processes: states.len() as u32,
            threads,
            times: StopTimes {
                copy: states.iter().map(|s| s.residue.took).sum(),
                ..StopTimes::default()
            },
            facts: EpochFacts {
                taken_at_ns: clocks.realtime_ns,
                stop_us: 0,
            },
            subject,
            machine: self.machine.clone(),
            states,
            table: collected.table,
            shared,
            shared_residue,
            system_v,
            retired: std::mem::take(&mut self.retired),
            files,
            spare: self.spare.clone(),
        })
    }

    /// The ID under which a member is saved; 0 of none.
    fn id_of(&self, pid: u32) -> u32 {
        self.members.get(&pid).map_or(0, |m| m.target.id)
    }

    fn member(&self, pid: u32) -> Result<&Member, ProcessError> {
        self.members.get(&pid).ok_or_else(|| gone(pid))
    }

    /// Processes that appeared since the last look become members while they stand still.
    fn adopt_strangers(&mut self, frozen: &mut [Frozen]) -> Result<(), ProcessError> {
        for process in frozen {
            let Some((target, waits)) = process.stranger.take() else {
                continue;
            };
            let refusals = member::refusals(&target, self.root)?;
            let adopted = if refusals.is_empty() {
                let mut waits = waits;
                match self.join(target, &mut waits) {
                    Some(target) => self.adopt(target, waits, &mut process.threads),
                    None => continue,
                }
            } else {
                Err(NotAdopted::boxed(
                    target,
                    waits,
                    ProcessError::Refused(refusals),
                ))
            };
            if let Err(not) = adopted {
                process.stranger = Some((not.target, not.waits));
                return Err(not.error);
            }
        }
        Ok(())
    }

    fn collect_descriptors(
        &mut self,
        frozen: &[Frozen],
        shares: &BTreeMap<u32, Shares>,
    ) -> Result<descriptors::Collected, ProcessError> {
        let targets: Vec<descriptors::Target<'_>> = frozen
            .iter()
            .filter_map(|p| self.members.get(&p.kin.pid))
            .map(|m| m.target.view())
            .collect();
        let has_none = |(_, s): &(&u32, &Shares)| s.descriptors != 0;
        let without = shares
            .iter()
            .filter(has_none)
            .map(|(pid, _)| *pid)
            .collect();
        let mut collected = descriptors::collect_table(
            &targets,
            &without,
            &mut self.descriptors,
            &mut self.shared,
        )?;
        let root = &self.member(self.root)?.target;
        if root.id != root.pid {
            let ids = ids_inside(frozen);
            collected.table.rename(&|here| inside(here, &ids));
        }
        Ok(collected)
    }

    /// Call when an epoch was not committed: what it took as saved is not; the next one is full.
    pub fn forget_progress(&mut self) {
        self.members.values_mut().for_each(Member::forget_progress);
        self.shared.forget();
    }

    /// Ends tracking; no trace stays in the program.
    pub fn detach(mut self) -> Result<(), ProcessError> {
        self.remove_trace()
    }

    fn remove_trace(&mut self) -> Result<(), ProcessError> {
        self.detached = true;
        self.drop_ended();
        let mut failed = Ok(());
        for (pid, mut member) in std::mem::take(&mut self.members) {
            let removed = remove_from(&mut member, self.options.stop_timeout);
            failed = failed.and(match removed {
                Err(ProcessError::Gone { .. }) if pid != self.root => Ok(()),
                r => r,
            });
        }
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
    if member.holder() != member.target.pid {
        return Ok(());
    }
    let sleepers = member.before_stop()?;
    let mut threads = member.freeze(timeout, &sleepers)?;
    let seen = member.look(&mut threads, &sleepers);
    let removed = seen.and_then(|_| member.remove_foothold(&mut threads));
    member.let_go(threads)?;
    removed
}

/// The IDs that threads see themselves, by those that they have here.
fn ids_inside(frozen: &[Frozen]) -> BTreeMap<u32, u32> {
    let of = |p: &Frozen| {
        let seen = p.threads.iter().zip(&p.seen);
        let ids = seen.map(|(held, (sight, _))| (held.tid, sight.status.inner.tid));
        ids.collect::<Vec<_>>()
    };
    frozen.iter().flat_map(of).collect()
}

/// The same of a thread or of a process that has ended; 0 of what is gone.
fn inside(here: u32, ids: &BTreeMap<u32, u32>) -> u32 {
    let ended = || Status::read(here, here).map_or(0, |s| s.inner.pid);
    ids.get(&here).copied().unwrap_or_else(ended)
}

fn gone(pid: u32) -> ProcessError {
    ProcessError::Gone {
        pid,
        what: "ended meanwhile".into(),
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

/// A frozen program. Dropping it lets the program run on.
pub struct Stopped<'a> {
    tracked: &'a mut Tracked,
    frozen: Vec<Frozen>,
    began: Instant,
    _urgent: Urgent,
}

impl Stopped<'_> {
    /// Lets the program run on; the time from the first thread frozen to the last one resumed.
    pub fn resume(mut self) -> Result<Duration, ProcessError> {
        let frozen = std::mem::take(&mut self.frozen);
        self.tracked.let_go(frozen)?;
        Ok(self.began.elapsed())
    }

    /// Ends the program (SIGKILL) and waits until it is gone, which includes reaping it if it is
    /// our own child. For planned events, after the epoch is durable.
    pub fn end(mut self) -> Result<(), ProcessError> {
        let frozen = std::mem::take(&mut self.frozen);
        for process in &frozen {
            let pid = process.kin.pid;
            match outlive_linux::thread::kill(pid) {
                Ok(()) | Err(outlive_linux::Errno::SRCH) => {}
                Err(e) => return Err(crate::target::gone_or(pid, "ending it", e.into())),
            }
        }
        let deadline = Instant::now() + self.tracked.options.stop_timeout.max(GONE_WITHIN);
        // Children before their parents, and the leading thread after all others.
        for process in frozen.into_iter().rev() {
            for halted in process
                .threads
                .into_iter()
                .rev()
                .filter_map(Held::into_halted)
            {
                let tid = halted.tid();
                halted
                    .await_end(deadline)
                    .map_err(|e| ProcessError::Kernel {
                        pid: process.kin.pid,
                        what: format!("waiting for thread {tid} to end: {e}"),
                        source: std::io::Error::other("stuck"),
                    })?;
            }
        }
        self.tracked.detached = true;
        let root = self.tracked.member(self.tracked.root)?;
        if root.target.own_child
            && let Some(pid) = i32::try_from(root.target.pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
        {
            let options = rustix::process::WaitOptions::empty();
            rustix::process::waitpid(Some(pid), options)
                .map_err(|e| root.target.kernel("reaping it", e))?;
        }
        Ok(())
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        let _ = self.tracked.let_go(frozen);
    }
}
