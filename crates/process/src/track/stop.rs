//! The stop: the program stands still, everything that is left is taken, and it runs on.
//!
//! # Rules
//! - All processes are frozen before anything is taken of any of them: what is captured is one
//!   moment of the whole tree.
//! - A process that is found for the first time at the stop is adopted while the program runs on,
//!   and the stop is tried again: to adopt it, and to copy all its memory, would take long. Only
//!   where new ones appear at every try they are adopted at the stop.
//! - Whatever fails, all of them go on as before.

use super::limit::{Limit, Notes};
use super::{Tracked, Tracking, cause};
use crate::captured::{Captured, ClockZones, Clocks, FilesToSync, StopTimes};
use crate::family::{self, Kin};
use crate::freeze::{Held, freeze};
use crate::image::ZombieState;
use crate::laps::Laps;
use crate::member::{self, Member, MemberState, NotAdopted, Seen};
use crate::procfs::ThreadFiles;
use crate::reentry::{Sleepers, WaitBook};
use crate::residue::Residue;
use crate::resources::semaphore_undo::UndoState;
use crate::resources::system_v::SemaphoresState;
use crate::resources::{descriptors, system_v};
use crate::restore::lazy::filling::Filling;
use crate::sharing::Shares;
use crate::target::{Status, Target};
use crate::{ProcessError, preflight};
use outlive_epoch::{EpochFacts, PageSink, Run};
use outlive_linux::kcmp;
use outlive_linux::thread::Urgent;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How often a stop is tried again because of a call that goes by no name …
const NAMING_TRIES: u32 = 5;
/// … and how long the program runs in between.
const A_MOMENT: Duration = Duration::from_millis(2);

/// How often a stop is tried again because of processes that appeared right before it …
const STRANGER_TRIES: u32 = 3;
/// … and for how long: who makes processes all the time would get no epoch.
const STRANGER_PATIENCE: Duration = Duration::from_millis(50);
/// How often a stop is tried again because a thread was reading a clock in the code that the kernel
/// gives to programs: under another kernel it could not go on there.
const CLOCK_TRIES: u32 = 3;

/// How often a stop is tried again because of a descriptor that cannot be saved: a program may have
/// one for a moment (Redis reads files of `/proc` about itself). Nothing of memory was taken by then.
const DESCRIPTOR_TRIES: u32 = 3;

/// How often a stop that would have taken too long is tried again in one epoch, each time after
/// more copying.
const LONG_TRIES: u32 = 2;

/// How long a program that was killed may take to be gone, at least.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// A process that stands still.
struct Frozen {
    kin: Kin,
    threads: Vec<Held>,
    seen: Vec<Seen>,
    /// A thread was in a call that goes by no name, so that it could not be made again.
    nameless: bool,
    /// A thread was reading a clock in the kernel's own code.
    reads_clock: bool,
    /// For a process that is no member yet.
    stranger: Option<(Target, WaitBook)>,
}

/// All processes that stand, and until when they may.
struct Standing {
    limit: Limit,
    frozen: Vec<Frozen>,
    zombies: Vec<Kin>,
    /// Descriptors are being looked at, and nothing of memory was.
    at_descriptors: bool,
    zones: ClockZones,
}

/// Why a try came to nothing.
enum NoStop {
    /// A descriptor that cannot be saved: perhaps one that is open for a moment only.
    Descriptor(ProcessError),
    /// There was a process that is no member.
    Strange,
    /// A thread was in a call that goes by no name.
    Nameless,
    /// A thread was reading a clock.
    Clock,
    Failed(ProcessError),
}

/// How often a stop was tried.
struct Tries {
    began: Instant,
    strange: u32,
    nameless: u32,
    clock: u32,
    long: u32,
    descriptor: u32,
}

impl Tries {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            strange: 0,
            nameless: 0,
            clock: 0,
            long: 0,
            descriptor: 0,
        }
    }

    /// Whether to go on with these processes.
    fn accept(&self, frozen: &[Frozen]) -> Result<(), NoStop> {
        let patient = self.strange < STRANGER_TRIES && self.began.elapsed() < STRANGER_PATIENCE;
        if patient && frozen.iter().any(|p| p.stranger.is_some()) {
            Err(NoStop::Strange)
        } else if self.nameless < NAMING_TRIES && frozen.iter().any(|p| p.nameless) {
            Err(NoStop::Nameless)
        } else if self.clock < CLOCK_TRIES && frozen.iter().any(|p| p.reads_clock) {
            Err(NoStop::Clock)
        } else {
            Ok(())
        }
    }

    /// For how long the program runs until the next try, if there is one.
    fn after(&mut self, why: NoStop) -> Result<Duration, ProcessError> {
        match why {
            NoStop::Strange => self.strange += 1,
            NoStop::Clock => self.clock += 1,
            NoStop::Nameless => {
                // It had not fallen asleep yet when it was looked at: by now it will have.
                self.nameless += 1;
                return Ok(A_MOMENT);
            }
            NoStop::Descriptor(_) if self.descriptor < DESCRIPTOR_TRIES => {
                self.descriptor += 1;
                return Ok(A_MOMENT);
            }
            NoStop::Descriptor(e) => return Err(e),
            NoStop::Failed(ProcessError::TooLong { .. }) if self.long < LONG_TRIES => {
                self.long += 1;
            }
            NoStop::Failed(e) => return Err(e),
        }
        tracing::debug!(self.strange, self.long, "another try");
        Ok(Duration::ZERO)
    }
}

impl Tracked {
    /// Freezes the program and takes everything that is left into memory. What is found while it
    /// still runs is copied into `sink`. On failure the program runs on as before.
    ///
    /// With a `limit` the stop is given up rather than longer; after a few tries it is
    /// [`ProcessError::TooLong`], and nothing of what `sink` was given counts: it is handed over
    /// again. After any other failure [`Tracked::forget_progress`] must be called.
    pub fn stop(
        &mut self,
        sink: &mut dyn PageSink,
        limit: Option<Duration>,
    ) -> Result<(Stopped<'_>, Captured), ProcessError> {
        let urgent = Urgent::begin();
        let mut tries = Tries::begin();
        loop {
            let (mut standing, done) =
                self.noting(sink, |tracked, sink| tracked.try_stop(sink, limit, &tries))?;
            match done {
                Ok(mut captured) => {
                    captured.notes = std::mem::take(&mut self.notes);
                    let stopped = Stopped {
                        tracked: self,
                        frozen: standing.frozen,
                        began: standing.limit.began(),
                        _urgent: urgent,
                    };
                    return Ok((stopped, captured));
                }
                Err(why) => {
                    self.let_go(std::mem::take(&mut standing.frozen))?;
                    match tries.after(why) {
                        Ok(pause) => std::thread::sleep(pause),
                        Err(e) => return Err(self.given_up(e)),
                    }
                }
            }
        }
    }

    fn given_up(&mut self, error: ProcessError) -> ProcessError {
        if let ProcessError::TooLong { .. } = error {
            self.experience.given_up();
            self.owe_all();
        }
        let explained = |e, member: &Member| cause(e, &member.target, self.root);
        self.members.values().fold(error, explained)
    }

    /// One try. Whoever stands afterwards is to be let go.
    fn try_stop(
        &mut self,
        sink: &mut dyn PageSink,
        limit: Option<Duration>,
        tries: &Tries,
    ) -> Result<(Standing, Result<Captured, NoStop>), ProcessError> {
        self.let_spawn()?;
        self.take_on_new(sink)?;
        if tries.long > 0 && self.tracking == Tracking::WriteProtect {
            let all: Vec<u32> = self.members.keys().copied().collect();
            for _ in 0..=tries.long {
                self.copy_ahead(&all, sink, &mut || false)?;
            }
        }
        let mut sleepers = self.before_stop()?;
        let known = self.all_known();
        let zones = ClockZones::of(&self.member(self.root)?.target)?;
        let mut standing = Standing {
            limit: Limit::begin(limit, self.experience),
            frozen: Vec::new(),
            zombies: Vec::new(),
            at_descriptors: false,
            zones,
        };
        let frozen = self.freeze_all(known, &mut sleepers, &mut standing);
        let done = frozen.map_err(NoStop::Failed).and_then(|()| {
            tries.accept(&standing.frozen)?;
            let captured = self.capture(&mut standing);
            captured.map_err(|e| match e {
                ProcessError::Refused(_) if standing.at_descriptors => NoStop::Descriptor(e),
                e => NoStop::Failed(e),
            })
        });
        Ok((standing, done))
    }

    /// Who belongs to the program, if all of them are members that are still there: what is listed
    /// before the stop need not be listed at its begin.
    fn all_known(&self) -> Option<Vec<Kin>> {
        let kin = family::list(self.root, &self.adopters);
        let there = |k: &Kin| {
            self.members
                .get(&k.pid)
                .is_some_and(|m| !m.target.has_ended())
        };
        let known = kin.iter().all(|k| k.zombie || there(k));
        known.then_some(kin)
    }

    /// Who belongs to the program, of which most stand and were looked at.
    fn list_standing(&mut self, done: &BTreeSet<u32>) -> Vec<Kin> {
        let members = &mut self.members;
        family::list_by(
            self.root,
            &self.adopters,
            &mut |pid| match members.get_mut(&pid) {
                Some(member) if done.contains(&pid) => member.children(),
                _ => family::children(pid),
            },
        )
    }

    fn before_stop(&mut self) -> Result<BTreeMap<u32, Sleepers>, ProcessError> {
        let mut sleepers = BTreeMap::new();
        let helpers = self.options.threads.saturating_sub(1);
        self.descriptors.helpers = helpers;
        for (pid, member) in &mut self.members {
            member.set_helpers(helpers);
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
        mut known: Option<Vec<Kin>>,
        sleepers: &mut BTreeMap<u32, Sleepers>,
        standing: &mut Standing,
    ) -> Result<(), ProcessError> {
        let mut done = BTreeSet::new();
        loop {
            let kin = known.take().unwrap_or_else(|| self.list_standing(&done));
            let new = |k: &Kin| !k.zombie && !done.contains(&k.pid);
            let new: Vec<Kin> = kin.iter().copied().filter(new).collect();
            if new.is_empty() {
                standing.zombies = kin.into_iter().filter(|k| k.zombie).collect();
                return Ok(());
            }
            for kin in new {
                let sleepers = sleepers.remove(&kin.pid).unwrap_or_default();
                standing.limit.check()?;
                let timeout = standing.limit.left().unwrap_or(Duration::MAX);
                let timeout = timeout.min(self.options.stop_timeout);
                match self.freeze_one(kin, sleepers, timeout) {
                    Ok(process) => {
                        done.insert(kin.pid);
                        standing.frozen.push(process);
                    }
                    Err(ProcessError::NotStopped { .. }) if timeout < self.options.stop_timeout => {
                        return Err(standing.limit.exceeded());
                    }
                    // A child may end at any time.
                    Err(_) if kin.pid != self.root && family::is_ending(kin.pid) => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }

    fn freeze_one(
        &mut self,
        kin: Kin,
        sleepers: Sleepers,
        timeout: Duration,
    ) -> Result<Frozen, ProcessError> {
        if let Some(member) = self.members.get_mut(&kin.pid) {
            let mut threads = member.freeze(timeout, &sleepers)?;
            if !member.is_intact() {
                // It began another program since it was looked at.
                member.give_back(threads, &sleepers)?;
                self.drop_member(kin.pid);
                return self.freeze_one(kin, Sleepers::default(), timeout);
            }
            let nameless = member.has_nameless(&threads, &sleepers);
            let reads_clock = member.reads_clock(&threads);
            return match member.look(&mut threads, &sleepers) {
                Ok(seen) => Ok(Frozen {
                    kin,
                    threads,
                    seen,
                    nameless,
                    reads_clock,
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
        let files = &mut ThreadFiles::new(kin.pid, 0);
        match member::look(&target, &mut waits, &mut threads, &sleepers, files) {
            Ok(seen) => Ok(Frozen {
                kin,
                threads,
                seen,
                nameless,
                reads_clock: false,
                stranger: Some((target, waits)),
            }),
            Err(e) => {
                member::let_go(&target, &mut waits, threads, files)?;
                Err(e)
            }
        }
    }

    fn let_go(&mut self, frozen: Vec<Frozen>) -> Result<(), ProcessError> {
        let mut failed = Ok(());
        for process in frozen {
            let files = &mut ThreadFiles::new(process.kin.pid, 0);
            let gone = match (process.stranger, self.members.get_mut(&process.kin.pid)) {
                (Some((target, mut waits)), _) => {
                    member::let_go(&target, &mut waits, process.threads, files)
                }
                (None, Some(member)) => member.let_go(process.threads),
                // One without a foothold by now: its threads go on as they were prepared to.
                (None, None) => Target::open(process.kin.pid).and_then(|target| {
                    member::let_go(&target, &mut WaitBook::default(), process.threads, files)
                }),
            };
            failed = failed.and(match gone {
                // A child may be killed at any time, also while it stands.
                Err(ProcessError::Gone { .. }) if process.kin.pid != self.root => Ok(()),
                gone => gone,
            });
        }
        failed
    }

    /// Takes everything; what was taken of memory before something failed is owed.
    fn capture(&mut self, standing: &mut Standing) -> Result<Captured, ProcessError> {
        let freeze = standing.limit.began().elapsed();
        tracing::debug!(us = ?freeze.as_micros(), "frozen");
        let mut states = Vec::with_capacity(standing.frozen.len());
        let captured = self.capture_all(standing, &mut states);
        let captured = captured.and_then(|c| match standing.limit.check() {
            Ok(()) => Ok(c),
            Err(e) => {
                self.owe_residue(&c.shared_residue);
                self.retired.extend(&c.retired);
                Err(e)
            }
        });
        let mut captured = match captured {
            Ok(captured) => captured,
            Err(e) => {
                states.iter().for_each(|s| self.owe_residue(&s.residue));
                return Err(e);
            }
        };
        let runs = states.iter().flat_map(|s| &s.residue.runs);
        let bytes = runs.map(Run::bytes).sum();
        let copy = states.iter().map(|s| s.residue.took).sum();
        self.experience.copied(bytes, copy);
        captured.states = states;
        let rest = standing.limit.began().elapsed().saturating_sub(freeze);
        captured.times = StopTimes {
            freeze,
            scan: rest.saturating_sub(copy),
            copy,
        };
        Ok(captured)
    }

    /// Call when what a stop took did not become an epoch because of [`ProcessError::GivenBack`]:
    /// all of it is handed over again by the next one, with all that was found before that stop.
    pub fn owe_captured(&mut self, captured: &mut Captured) {
        self.abandon_all();
        for (space, pages, absent) in captured.notes.take() {
            self.owe(space, &pages, &absent);
        }
        for state in &captured.states {
            self.owe_residue(&state.residue);
        }
        self.owe_residue(&captured.shared_residue);
        self.retired.extend(&captured.retired);
    }

    fn owe_residue(&mut self, residue: &Residue) {
        for run in residue.runs.iter().chain(&residue.behind_runs) {
            self.owe(run.space(), &[*run], &[]);
        }
        for run in &residue.absent {
            self.owe(run.space(), &[], &[*run]);
        }
    }

    fn capture_all(
        &mut self,
        standing: &mut Standing,
        states: &mut Vec<MemberState>,
    ) -> Result<Captured, ProcessError> {
        let Standing {
            limit,
            frozen,
            zombies,
            at_descriptors,
            zones,
        } = standing;
        let mut laps = Laps::new();
        self.adopt_strangers(frozen, limit)?;
        laps.lap("adopting");
        let mut refusals = Vec::new();
        for process in frozen.iter() {
            let member = self.members.get_mut(&process.kin.pid);
            let member = member.ok_or_else(|| gone(process.kin.pid))?;
            for (held, (sight, _)) in process.threads.iter().zip(&process.seen) {
                let target = &member.target;
                refusals.extend(preflight::of_thread(target, held.tid, &sight.status));
            }
            refusals.extend(member.refuse_apart(process.threads.iter().map(|t| t.tid)));
        }
        if !refusals.is_empty() {
            return Err(ProcessError::Refused(refusals));
        }
        laps.lap("preflight");
        self.shared.begin();
        let pids: Vec<u32> = frozen.iter().map(|p| p.kin.pid).collect();
        let shares = self.sharing.find(&pids)?;
        let fellows = self.fellows(&pids);
        *at_descriptors = true;
        let collected = self.collect_descriptors(frozen, &shares)?;
        *at_descriptors = false;
        laps.lap("descriptors");
        limit.check()?;
        let many = frozen.len() > 1;
        let at_fault = frozen
            .iter()
            .any(|p| p.threads.iter().any(Held::is_at_fault));
        for process in frozen.iter_mut() {
            let parent = self.id_of(process.kin.parent);
            let member = self
                .members
                .get_mut(&process.kin.pid)
                .ok_or_else(|| gone(process.kin.pid))?;
            member.spare = self.spare.clone();
            member.set_relatives(many);
            member.set_at_fault(at_fault);
            member.set_fleeting(process.kin.pid != self.root, self.options.lessons.hurries());
            member.has_fellows = fellows.contains(&member.holder());
            let seen = std::mem::take(&mut process.seen);
            let mut state = member.capture(&mut process.threads, seen, &mut self.shared, limit)?;
            state.process.parent = parent;
            self.note_shares((process.kin.pid, &pids), &shares, &mut state)?;
            states.push(state);
            limit.check()?;
        }
        self.options.lessons.stopped();
        self.refuse_shares(states)?;
        let zombies = zombies
            .iter()
            .map(|kin| ZombieState::of(*kin, self.id_of(kin.parent)))
            .collect::<Result<_, _>>()?;
        // After everything that has time left: a timer may fire late by the clocks, never early.
        let clocks = Clocks::now(zones);
        let threads = states.iter().map(|s| s.threads.threads.len() as u32).sum();
        let subject = clocks.subject(states, zombies, threads);
        laps.lap("processes");
        let mut users = system_v::Users::default();
        for process in frozen.iter() {
            let id = self.id_of(process.kin.pid);
            for thread in &process.threads {
                users.add(thread.tid, id, &thread.registers);
            }
        }
        let segments = self.system_v.begin(&users)?;
        let unmapped = self.system_v.unmapped(&segments, &users);
        self.shared.add_segments(&unmapped)?;
        let root = &self
            .members
            .get(&self.root)
            .ok_or_else(|| gone(self.root))?;
        let root = &root.target;
        let mut system_v = self.system_v.collect(root, &users)?;
        if !system_v.semaphores.is_empty() {
            system_v.undo = undo(&self.members, frozen, &system_v.semaphores)?;
        }
        limit.check()?;
        // Last: what it finds is not found again.
        let (shared, shared_residue) = self.shared.take(&segments, root, &users.members)?;
        laps.lap("shared memory");
        laps.tell("stop");
        let files = FilesToSync::new(collected.files, states);
        let others = self.members.keys().copied().filter(|pid| *pid != self.root);
        let pids = std::iter::once(self.root).chain(others).collect();
        Ok(Captured {
            processes: states.len() as u32,
            threads,
            times: StopTimes::default(),
            facts: EpochFacts {
                taken_at_ns: clocks.realtime_ns,
                stop_us: 0,
            },
            subject,
            machine: self.machine.clone(),
            states: Vec::new(),
            table: collected.table,
            shared,
            shared_residue,
            system_v,
            retired: std::mem::take(&mut self.retired),
            files,
            closed: self.closed.clone(),
            pids,
            spare: self.spare.clone(),
            notes: Notes::default(),
        })
    }

    /// The ID under which a member is saved; 0 of none.
    pub(super) fn id_of(&self, pid: u32) -> u32 {
        self.members.get(&pid).map_or(0, |m| m.target.id)
    }

    fn member(&self, pid: u32) -> Result<&Member, ProcessError> {
        self.members.get(&pid).ok_or_else(|| gone(pid))
    }

    /// Processes that appeared since the last look become members while they stand still. What they miss
    /// where memory comes later is read before, if there is the time for it.
    fn adopt_strangers(
        &mut self,
        frozen: &mut [Frozen],
        limit: &Limit,
    ) -> Result<(), ProcessError> {
        let filling = self.members.values().find_map(Member::filling);
        let missing = filling.map_or(0, Filling::missing_of_children);
        for process in frozen {
            if process.stranger.is_some() && missing > 0 {
                limit.check_copy(missing)?;
            }
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
}

/// What is to be undone in semaphores when processes end.
fn undo(
    members: &BTreeMap<u32, Member>,
    frozen: &mut [Frozen],
    sets: &[SemaphoresState],
) -> Result<Vec<UndoState>, ProcessError> {
    let (mut all, mut with): (Vec<UndoState>, Vec<u32>) = Default::default();
    for process in frozen {
        let pid = process.kin.pid;
        let member = members.get(&pid).ok_or_else(|| gone(pid))?;
        let found = member.undo(&mut process.threads, sets)?;
        if found.is_empty() {
            continue;
        }
        let same = |other: &u32| kcmp::same(*other, pid, kcmp::Kind::SemaphoreUndo) == Ok(true);
        if let Some(other) = with.iter().copied().find(same) {
            let what = format!("what it is to undo in semaphores is shared with process {other}");
            let remedy = "have it undo by itself (no CLONE_SYSVSEM)";
            let refusal = member.target.refusal("", what, remedy);
            return Err(ProcessError::Refused(vec![refusal]));
        }
        with.push(pid);
        all.extend(found);
    }
    Ok(all)
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
        let began = Instant::now();
        self.tracked.let_go(frozen)?;
        self.tracked.experience.released(began.elapsed());
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

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(nameless: bool, reads_clock: bool) -> [Frozen; 1] {
        let kin = Kin {
            pid: 1,
            parent: 0,
            zombie: false,
        };
        [Frozen {
            kin,
            threads: Vec::new(),
            seen: Vec::new(),
            nameless,
            reads_clock,
            stranger: None,
        }]
    }

    #[test]
    fn what_stands_badly_is_tried_again_a_few_times_and_then_taken() {
        let tried = |standing: &[Frozen]| {
            let mut tries = Tries::begin();
            let mut count = 0;
            while let Err(why) = tries.accept(standing) {
                assert!(tries.after(why).is_ok(), "there is a next try");
                count += 1;
            }
            count
        };
        assert_eq!(tried(&standing(false, false)), 0);
        assert_eq!(tried(&standing(true, false)), NAMING_TRIES);
        assert_eq!(tried(&standing(false, true)), CLOCK_TRIES);
        assert_eq!(tried(&standing(true, true)), NAMING_TRIES + CLOCK_TRIES);
    }

    #[test]
    fn a_stop_that_is_too_long_is_tried_again_and_then_given_up() {
        let mut tries = Tries::begin();
        let long = || NoStop::Failed(ProcessError::TooLong { limit_us: 1 });
        for _ in 0..LONG_TRIES {
            assert!(tries.after(long()).is_ok(), "there is a next try");
        }
        assert!(matches!(
            tries.after(long()),
            Err(ProcessError::TooLong { limit_us: 1 })
        ));
        let other = NoStop::Failed(ProcessError::Image(String::new()));
        assert!(Tries::begin().after(other).is_err());
    }

    #[test]
    fn a_descriptor_that_is_refused_is_looked_at_again_before_it_counts() {
        let mut tries = Tries::begin();
        let refused = || NoStop::Descriptor(ProcessError::Refused(Vec::new()));
        for _ in 0..DESCRIPTOR_TRIES {
            assert_eq!(tries.after(refused()).ok(), Some(A_MOMENT));
        }
        assert!(matches!(
            tries.after(refused()),
            Err(ProcessError::Refused(_))
        ));
        let later = NoStop::Failed(ProcessError::Refused(Vec::new()));
        assert!(Tries::begin().after(later).is_err(), "memory may be lost");
    }
}
