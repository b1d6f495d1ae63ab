//! The keeper: the loop that keeps one subject.
//!
//! One thread waits for the program's end, for signals, for requests on the control socket and for
//! the instant at which the next epoch is due, and does one thing at a time. (Tracing belongs to
//! the thread that began it, so this is also the thread that takes epochs.)
//!
//! # Rules
//! - A failed epoch never ends the program or the keeper: it is counted, shown in the status, said
//!   once for each kind of failure, and tried again after a growing pause. After
//!   [`REATTACH_AFTER`] failures in a row tracking is begun anew.
//! - Signals that the kernel sent to the whole foreground group (Ctrl-C) reach a program of our
//!   group without us; all others are passed on to it.
//! - `SIGPWR` is a power event; see [`crate::power`].

use crate::KeeperError;
use crate::budget::keeping::{HoldUp, Watch, When};
use crate::budget::model::Model;
use crate::budget::pacing::Step;
pub use crate::companion::Companion;
use crate::companion::timespec;
use crate::control::{Control, Reply, Status, failed};
use crate::epoch::{self, EpochLog, Fate, Manner, Program, Taken};
use crate::plan::{Begin, Plan};
use crate::power::{self, Desk, Ears, Event, PowerReport, monotonic_ns};
use crate::procfs::Pids;
use crate::retention::Policy;
use crate::scrub::Scrub;
use crate::stats::Stops;
use crate::subject::Capture;
use crate::table::Table;
use crate::upkeep::{self, Upkeep};
use outlive_epoch::StoreError;
use outlive_epoch_store::{APART, Codec};
use outlive_linux::signals::SignalQueue;
use outlive_process::ProcessError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::process::Signal;
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod answers;
mod notes;
mod short;
mod strict;

/// Failures in a row after which tracking is begun anew.
pub const REATTACH_AFTER: u32 = 2;
/// Kinds of failure that are said; more are only counted.
const MOST_WARNINGS: usize = 32;

/// How long a program may take from its first failing to be captured until it is seen to have
/// ended, before the failure counts.
const ENDING: Duration = Duration::from_millis(50);

/// The signals a keeper takes: those it passes on, and `SIGPWR`.
pub const SIGNALS: [i32; 8] = [
    Signal::HUP.as_raw(),
    Signal::INT.as_raw(),
    Signal::QUIT.as_raw(),
    Signal::TERM.as_raw(),
    Signal::USR1.as_raw(),
    Signal::USR2.as_raw(),
    Signal::WINCH.as_raw(),
    Signal::POWER.as_raw(),
];

/// What is kept, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The process.
    pub pid: u32,
    /// Time between epochs.
    pub every: Duration,
    /// How memory is captured.
    pub capture: Capture,
    /// Whether the program is our child: its exit status is ours to collect and signals are passed
    /// on to it. Otherwise signals that would end us end the tracking.
    pub child: bool,
    /// The hold-up budget.
    pub hold_up: Option<HoldUp>,
    /// Most bytes that are to be written a day.
    pub max_wear: Option<u64>,
    /// How long the program may be stopped for an epoch.
    pub max_stop: Option<Duration>,
    /// What is to become of earlier epochs.
    pub policy: Policy,
    /// How pages are packed; not with a hold-up budget.
    pub pack: Option<Codec>,
    /// What is known of the medium.
    pub model: Model,
}

/// The least time for stopping all threads at an event, however little the budget leaves.
const LEAST_STOP: Duration = Duration::from_millis(1);

/// Space is written ahead where there is so much time, nanoseconds.
const READYING: u64 = 8_000_000;

/// How often threads are looked for that did not stop in time and must be let go when they come
/// back from the kernel.
const STRAGGLERS_POLL: Duration = Duration::from_millis(20);

/// How often it is looked for whether epochs may begin.
const AWAITED_POLL: Duration = Duration::from_millis(10);

/// Why the keeper is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The program ended of itself, with this exit status.
    Exited(u8),
    /// A signal ended the program.
    Killed(u8),
    /// The program is gone; it was not our child, so its status is not known.
    Gone,
    /// A planned end: this epoch is final, and the program was ended after it was durable.
    Planned(Taken),
    /// Tracking ended; the program runs on.
    Detached,
}

impl Ending {
    /// The exit status that a shell would show: the program's own, or 128 and the signal's number;
    /// 0 where the program did not end of itself.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Exited(code) => *code,
            Self::Killed(signal) => signal.saturating_add(128),
            Self::Gone | Self::Planned(_) | Self::Detached => 0,
        }
    }
}

/// The parts that the loop works with.
pub struct Keeper<'a, P: Program> {
    settings: Settings,
    log: &'a mut dyn EpochLog,
    attach: &'a mut dyn FnMut() -> Result<P, ProcessError>,
    tell: &'a mut dyn FnMut(&str),
    program: Option<P>,
    companion: Companion,
    plan: Plan,
    origin: Instant,
    stops: Stops,
    watch: Watch,
    /// Space for the epoch of an event may have to be written ahead.
    readying: bool,
    scrub: Scrub,
    upkeep: Upkeep,
    /// What the last epoch wrote, bytes.
    last_bytes: u64,
    /// The last epoch of this tracker was committed: what is written since is all that is unsaved.
    counts: bool,
    /// Nothing is due before this is readable.
    awaited: Option<OwnedFd>,
    /// Before this is readable, the program still comes from the newest epoch that there was.
    filling: Option<OwnedFd>,
    /// What is counted goes there, too.
    table: Option<Table>,
    /// Violations that the table was told of.
    noted: u64,
    status: Status,
    said: BTreeSet<String>,
}

impl<'a, P: Program> Keeper<'a, P> {
    /// A keeper of a running process. `attach` begins tracking, at once and again after repeated
    /// failures; `tell` shows a warning to the user.
    ///
    /// # Errors
    /// Where the process is not there.
    pub fn new(
        settings: Settings,
        log: &'a mut dyn EpochLog,
        attach: &'a mut dyn FnMut() -> Result<P, ProcessError>,
        tell: &'a mut dyn FnMut(&str),
    ) -> Result<Self, KeeperError> {
        let pid = settings.pid;
        let companion = Companion::of(pid, settings.child)?;
        let every_ns = u64::try_from(settings.every.as_nanos()).unwrap_or(u64::MAX);
        let status = Status {
            pids: Pids::of(pid),
            keeper_pid: std::process::id(),
            epoch: log.newest(),
            committed: 0,
            every_ns,
            since_ns: now_ns(),
            last_stop_us: None,
            median_stop_us: None,
            p99_stop_us: None,
            last_time_ns: None,
            failures: 0,
            abandoned: 0,
            last_failure: None,
            full: false,
            capture: settings.capture.clone(),
            tracking: "none yet".into(),
            log_bytes: 0,
            live_bytes: 0,
            store_bytes: 0,
            generations: 0,
            keep: settings.policy.keep,
            budget: None,
            model: settings.model.figures(),
            frozen: false,
            events: crate::budget::keeping::Events::default(),
            bytes_written: 0,
            bytes_per_day: None,
            max_wear: settings.max_wear,
            totals: None,
        };
        let upkeep = Upkeep::new(settings.policy);
        if let Some(store) = log.store() {
            store.keep_older(settings.policy.keep.is_some());
            store.pack(settings.pack.filter(|_| settings.hold_up.is_none()));
        }
        let (hold_up, model) = (settings.hold_up, settings.model.clone());
        if hold_up.is_some() {
            power::lock_memory();
        }
        let watch = Watch::new(hold_up, model, settings.max_wear, 0);
        Ok(Self {
            settings,
            watch,
            readying: false,
            scrub: Scrub::new(0, hold_up.is_none()),
            upkeep,
            last_bytes: 0,
            counts: false,
            awaited: None,
            filling: None,
            table: None,
            noted: 0,
            log,
            attach,
            tell,
            program: None,
            companion,
            plan: match hold_up {
                Some(_) => Plan::new(every_ns, 0).with_long_log(),
                None => Plan::new(every_ns, 0),
            },
            origin: Instant::now(),
            stops: Stops::default(),
            status,
            said: BTreeSet::new(),
        })
    }

    /// Uses a tracker that exists already, instead of beginning to track at the first epoch.
    #[must_use]
    pub fn with_program(mut self, program: P) -> Self {
        self.adopt(program);
        self
    }

    /// The same with a tracker that goes on from the newest epoch of the log, of which the program
    /// was restored: the next epoch holds only what changed since.
    #[must_use]
    pub fn going_on(mut self, program: P) -> Self {
        self.plan.goes_on();
        self.with_program(program)
    }

    /// No epoch is due before `ready` is readable. One that is asked for is taken all the same, as
    /// soon as tracking can begin.
    #[must_use]
    pub fn not_before(mut self, ready: OwnedFd) -> Self {
        self.status.tracking = "none until all its memory is there".into();
        self.awaited = Some(ready);
        self
    }

    /// Until `ready` is readable, pages of the program are still read from the store: epochs are added
    /// to it, and nothing else is done with it.
    #[must_use]
    pub fn filling(mut self, ready: OwnedFd) -> Self {
        self.filling = Some(ready);
        self
    }

    fn still_fills(&self) -> bool {
        self.filling.as_ref().is_some_and(|fd| !is_readable(fd))
    }

    /// Keeps the program until it ends, is ended, or tracking ends.
    ///
    /// # Errors
    /// Only what makes the loop itself impossible; failed epochs are no such thing.
    pub fn run(
        &mut self,
        signals: &mut SignalQueue,
        control: &mut Control,
    ) -> Result<Ending, KeeperError> {
        let inbox = VecDeque::new();
        let mut ears = Ears {
            signals,
            control,
            inbox,
        };
        let ending = self.keep(&mut ears);
        // What was counted after the last epoch.
        self.note();
        ending
    }

    fn keep(&mut self, ears: &mut Ears<'_>) -> Result<Ending, KeeperError> {
        loop {
            self.sleep(ears)?;
            ears.listen()?;
            while let Some(heard) = ears.inbox.pop_front() {
                if let Some(ending) = self.heard(heard, ears) {
                    return self.leave(ending);
                }
            }
            if let Some(ending) = self.companion.ended()? {
                return Ok(ending);
            }
            self.look();
            self.note_violations();
            let manner = match self.step() {
                Step::Wait(ns) => {
                    self.get_ready(ns);
                    self.keep_short(ns);
                    self.check_stored(ns);
                    continue;
                }
                Step::Epoch => Manner::Running,
                Step::Held => Manner::Held,
            };
            self.keep_up();
            if let Ok((taken, Fate::Ended)) = self.take(manner, None, ears) {
                return Ok(Ending::Planned(taken));
            }
        }
    }

    /// What the medium and the program turned out to be like.
    #[must_use]
    pub fn model(&self) -> &Model {
        self.watch.model()
    }

    /// Writes a piece of the space for the epoch of an event ahead, where there is time.
    fn get_ready(&mut self, wait: u64) {
        if !self.readying || wait < READYING {
            return;
        }
        self.readying = false;
        let Some(len) = self.watch.ready_bytes() else {
            return;
        };
        let room = len.saturating_mul(2 * APART);
        if self.log.free_bytes().is_some_and(|free| free < room) {
            return;
        }
        // Without it, the epoch of an event goes where any other would.
        if let Ok(ahead) = self.log.write_ahead(len) {
            self.watch.wrote_ahead(ahead.written);
            self.readying = ahead.more;
        }
    }

    /// Checks a piece of what is stored, if that is due and there is time.
    fn check_stored(&mut self, wait: u64) {
        let now = self.now();
        if self.scrub.wait(now, wait) == Some(0) {
            let checked = self.scrub.check(now, self.log);
            checked.warnings.iter().for_each(|text| self.say(text));
            if checked.lost {
                self.plan.begins_anew();
            }
        }
    }

    fn step(&self) -> Step {
        // After a failure whoever is held has to wait until the next try.
        let failing = self.plan.failures() > 0;
        if !failing && self.is_pressed() {
            return self.watch.pressed();
        }
        let now = self.now();
        if self.awaited.as_ref().is_some_and(|fd| !is_readable(fd)) {
            return Step::Wait(AWAITED_POLL.as_nanos() as u64);
        }
        self.watch.step(now, self.plan.wait(now), failing)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn sleep(&self, ears: &Ears<'_>) -> Result<(), KeeperError> {
        let mut wait = match self.step() {
            Step::Wait(ns) if self.readying && ns >= READYING => Duration::ZERO,
            Step::Wait(ns) if ears.inbox.is_empty() => {
                let now = self.now();
                let short = self
                    .upkeep
                    .wait(now, ns)
                    .filter(|_| self.has_room(upkeep::PIECE));
                let sooner = [self.scrub.wait(now, ns), short].into_iter().flatten();
                Duration::from_nanos(sooner.min().unwrap_or(ns))
            }
            _ => Duration::ZERO,
        };
        if outlive_process::release_stragglers() > 0 {
            wait = wait.min(STRAGGLERS_POLL);
        }
        let timeout = timespec(wait);
        let pressing = self.program.as_ref().filter(|_| self.plan.failures() == 0);
        let pressure = pressing.map(P::pressure).unwrap_or_default();
        let mut set = ears.control.poll_set();
        set.extend(pressure.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        set.push(PollFd::new(&*ears.signals, PollFlags::IN));
        set.push(PollFd::new(&self.companion.process, PollFlags::IN));
        match poll(&mut set, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(KeeperError::io("poll")(error)),
        }
    }

    /// Takes one epoch, for an event where there is one.
    fn take(
        &mut self,
        manner: Manner,
        event: Option<Event>,
        ears: &mut Ears<'_>,
    ) -> Result<(Taken, Fate), ProcessError> {
        let begun = self.now();
        let mut lost_track = false;
        let mut base = false;
        self.hush();
        self.status.totals = self.totals();
        let status = self.status.clone();
        let mut desk = Desk {
            ears,
            event,
            budget: self.watch.budget_ns(),
            longest_stop: self.settings.max_stop,
            patient: self.settings.hold_up.is_none(),
            status: &status,
            durable: None,
        };
        let done = self.attempt(manner, &mut lost_track, &mut base, &mut desk);
        let ended = self.now();
        let Desk { event, durable, .. } = desk;
        self.counts = done.is_ok();
        let ended_it = matches!(done, Ok((_, Fate::Ended)));
        if !ended_it {
            self.look();
        }
        match &done {
            Ok((taken, fate)) => {
                self.plan.committed(begun, ended);
                self.readying = self.settings.hold_up.is_some();
                if event.is_none() {
                    self.stops.add(taken.stop_us);
                }
                self.status.committed += 1;
                self.last_bytes = taken.bytes_written;
                self.status.full = false;
                self.status.last_time_ns = Some(taken.time_ns);
                let held = manner == Manner::Held || event.is_some();
                if *fate == Fate::RunsOn {
                    let exposed = self.exposed();
                    self.watch.taken(
                        taken,
                        When {
                            begun,
                            ended,
                            held,
                            base,
                            event: event.is_some(),
                        },
                        exposed,
                    );
                    self.say_unbounded(exposed);
                }
            }
            Err(error @ (ProcessError::TooLong { .. } | ProcessError::GivenBack { .. })) => {
                // Only a new generation has lost track: of everything else nothing is lost.
                self.plan.given_up(begun, ended, base);
                self.watch.failed(self.owed());
                self.status.abandoned += 1;
                self.say(&format!("no epoch: {error} (`ps --json` counts these)"));
            }
            Err(error) => {
                self.plan.failed(ended, lost_track);
                self.watch.failed(self.owed());
                self.failure(error);
            }
        }
        if !ended_it {
            self.limit();
        }
        if let Some(event) = event {
            self.conclude(event, durable, &done);
        }
        self.note();
        done
    }

    /// Says what came of an event.
    fn conclude(
        &mut self,
        event: Event,
        durable: Option<u64>,
        done: &Result<(Taken, Fate), ProcessError>,
    ) {
        let budget = self.watch.budget_ns();
        let took = |at: u64| durable.map(|d| d.saturating_sub(at));
        match done {
            Ok((taken, fate)) => {
                let event_ns = took(event.at).unwrap_or(0);
                self.watch.events.add(Some(event_ns), budget);
                let power = PowerReport {
                    event_us: event_ns / 1000,
                    budget_us: budget.map(|ns| ns / 1000),
                    went_on: *fate == Fate::RunsOn,
                    stood_us: taken.stop_us,
                };
                event.answer(&Reply::Taken {
                    epoch: taken.clone(),
                    pids: self.status.pids,
                    power: Some(power),
                });
            }
            Err(error) => {
                self.watch.events.add(None, budget);
                let last = self.log.newest();
                let text = format!(
                    "the power event took no epoch, and epoch {last} is what would come back: {error}"
                );
                self.say(&text);
                event.answer(&failed(text, 1));
            }
        }
    }

    fn attempt(
        &mut self,
        manner: Manner,
        lost_track: &mut bool,
        base: &mut bool,
        desk: &mut Desk<'_, '_>,
    ) -> Result<(Taken, Fate), ProcessError> {
        if self.program.is_none() {
            self.plan.begins_anew();
            let program = (self.attach)()?;
            self.adopt(program);
        }
        let (bytes, free) = (self.log.log_bytes(), self.log.free_bytes());
        let begin = match self.plan.begin(bytes, free, || self.log.live_bytes()) {
            Begin::Base if self.plan.is_full() => Begin::Base,
            Begin::Base if self.still_fills() => Begin::Next,
            // At an event there is no time to write what is on the medium already.
            Begin::Base if manner == Manner::Event => Begin::Next,
            Begin::Base
                if self.flattens() && self.log.store().is_some() && self.upkeep.shorten(bytes) =>
            {
                Begin::Next
            }
            begin => begin,
        };
        let patience = Self::patience(desk);
        let Some(program) = self.program.as_mut() else {
            return Err(ProcessError::Gone {
                pid: self.settings.pid,
                what: "not tracked".into(),
            });
        };
        *base = begin == Begin::Base;
        if let Some(store) = self.log.store().filter(|_| *base) {
            // What it would replace is replaced.
            store.abandon_beside();
        }
        let writer = match begin {
            Begin::Base if self.log.newest() > 0 => {
                *lost_track = true;
                program.forget_progress();
                self.log.begin_base()?
            }
            _ if manner == Manner::Event => self.log.begin_event()?,
            _ => self.log.begin()?,
        };
        let before = patience.map(|patience| program.stop_within(patience));
        let done = epoch::take(program, writer, manner, desk, lost_track);
        // Of a new generation nothing is there.
        *lost_track |= *base;
        if let Some(before) = before {
            program.stop_within(before);
        }
        let (mut taken, fate) = done?;
        let commit = self.log.last_commit();
        taken.steps.flush_us = commit.data_us;
        taken.steps.record_us = commit.record_us;
        Ok((taken, fate))
    }

    /// How long threads may take to stop at an event: until the budget has passed. (What is durable a
    /// little late may still be in time, what is not durable never is.)
    fn patience(desk: &Desk<'_, '_>) -> Option<Duration> {
        let (event, budget) = (desk.event.as_ref()?, desk.budget?);
        let gone = monotonic_ns().saturating_sub(event.at);
        let left = budget.saturating_sub(gone).max(budget / 4);
        Some(Duration::from_nanos(left).max(LEAST_STOP))
    }

    fn adopt(&mut self, program: P) {
        self.status.tracking = program.tracking().into();
        if let Some(reason) = program.full_copy_because() {
            self.say(&format!("every epoch copies everything: {reason}"));
            self.status.tracking = format!("full-copy: {reason}");
        }
        self.program = Some(program);
    }

    fn failure(&mut self, error: &ProcessError) {
        // A program that is just ending fails in many ways; its end is what counts then.
        if self.companion.gone_within(ENDING) {
            return;
        }
        let text = error.to_string();
        self.status.failures += 1;
        self.status.full = matches!(error, ProcessError::Store(StoreError::Full { .. }));
        if let Some(store) = self.log.store().filter(|_| self.status.full) {
            self.upkeep.give_up_space(store);
        }
        self.say(&format!("no epoch: {text}"));
        self.status.last_failure = Some(text);
        // Before all its memory is there no other tracker could begin.
        if self.plan.failures().is_multiple_of(REATTACH_AFTER) && !self.still_fills() {
            // Tracking is begun anew with the next epoch; what cannot be undone is dropped.
            if let Some(program) = self.program.take()
                && let Err(error) = program.detach()
            {
                self.say(&format!("tracking could not be ended cleanly: {error}"));
            }
        }
    }

    /// Shows a warning, once for each kind: two that differ in numbers only are of one kind.
    fn say(&mut self, text: &str) {
        let kind: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
        if self.said.len() < MOST_WARNINGS && self.said.insert(kind) {
            (self.tell)(text);
        }
    }
}

fn is_readable(fd: &OwnedFd) -> bool {
    let now = timespec(Duration::ZERO);
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
}

/// The time, nanoseconds since the Unix epoch.
#[must_use]
pub fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "keep_tests.rs"]
mod tests;
