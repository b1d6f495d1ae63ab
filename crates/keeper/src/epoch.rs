//! The order of one epoch.
//!
//! # Rules
//! - Begin, precopy, stop, resume, write, sync the program's files, commit. The program is stopped
//!   for as short as its tracker can make it; everything slow happens while it runs.
//! - Nothing is packed while the program stands still and waits for it, nor once there is a power event.
//! - A *planned end* keeps the program stopped until the epoch is durable, and only then ends it.
//!   If anything fails before, the program runs on.
//! - A *held* epoch keeps the program stopped until it is durable, and then lets it run on. At a
//!   *power event* nothing comes before the stop, and what becomes of the program is decided once
//!   the epoch is durable. An event that is noticed before a running epoch lets the program run on
//!   makes that epoch its own.
//! - Copying while the program runs ends when an event is heard of: the rest is taken at the stop.
//! - A stop that would take longer than it may is given up, and with it the epoch. The tracker hands
//!   all of it over again then.
//! - Memory that the program gives back before it was copied behind costs the epoch, and so does a
//!   store that is full: the next one has all of it.
//! - Files that the program has closed are made durable before the commit, too; but not with a hold-up
//!   budget, at an event, or while the program stands still and is to run on: how long that takes, others
//!   decide who write to the same file system. The next epoch makes up for it.
//! - After any other failure from precopy on, the tracker is told to forget its progress: what it handed
//!   over never became an epoch.
//! - The mechanisms are reached through traits, so that the order is tested without a program.

use outlive_epoch::{EpochFacts, EpochWriter, PageSink, StoreError};
use outlive_epoch_store::{Ahead, CommitTimes, Scrubbed, Store};
use outlive_linux::thread::Urgent;
use outlive_process::{Captured, ProcessError, StopTimes, Stopped, Tracked, Tracking};
use rustix::fd::BorrowedFd;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// A program under tracking.
pub trait Program {
    /// The program while it is frozen; dropping it lets the program run on.
    type Frozen<'a>: Frozen
    where
        Self: 'a;
    /// What a stop took.
    type Snapshot: Snapshot;

    /// Copies what changed while the program runs, until it is done or `hurry` says that there is no
    /// time: then the rest is left to the stop.
    fn precopy(
        &mut self,
        sink: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<(), ProcessError>;
    /// Freezes the program and takes what is left into memory; what is found right before, while
    /// it still runs, goes into `sink`. A stop that would last longer than `limit` is given up:
    /// [`ProcessError::TooLong`] says so, and then nothing of its progress is lost.
    fn stop(
        &mut self,
        sink: &mut dyn PageSink,
        limit: Option<Duration>,
    ) -> Result<(Self::Frozen<'_>, Self::Snapshot), ProcessError>;
    /// What was taken since the last epoch did not become one.
    fn forget_progress(&mut self);
    /// The same of what this stop took, because of [`ProcessError::GivenBack`] or a full store: nothing
    /// else is lost, and the next epoch takes all of it.
    fn owe(&mut self, snapshot: &mut Self::Snapshot);
    /// Pages that the next epoch takes because of that.
    fn owed_pages(&self) -> u64;
    /// Ends tracking; the program runs on.
    fn detach(self) -> Result<(), ProcessError>;
    /// Why every epoch copies everything, where that is so although the strategy is another.
    fn full_copy_because(&self) -> Option<String>;
    /// How written pages are found, by its name.
    fn tracking(&self) -> &'static str;
    /// Gives threads so long to stop from now on; returns how long they had.
    fn stop_within(&mut self, timeout: Duration) -> Duration;
    /// Pages that may have been written since the last stop, as of now; `None` where nobody guards
    /// them.
    fn dirty_pages(&self) -> Option<u64>;
    /// The most of them that there may have been at any instant since this was asked, or since a limit
    /// was set last; 0 where only [`Program::dirty_pages`] is known.
    fn most_dirty(&self) -> u64;
    /// Those of them that nobody can guard.
    fn exposed_pages(&self) -> u64;
    /// Finds those out.
    fn expose(&self);
    /// Holds writers beyond so many of them, until the next stop; `None`: never.
    fn limit_dirty(&mut self, pages: Option<u64>);
    /// Descriptors of which one is readable while writers are held.
    fn pressure(&self) -> Vec<BorrowedFd<'_>>;
}

/// A frozen program.
pub trait Frozen {
    /// Lets it run on; returns how long it was stopped.
    fn resume(self) -> Result<Duration, ProcessError>;
    /// Ends it and waits until it is gone.
    fn end(self) -> Result<(), ProcessError>;
}

/// What a stop took.
pub trait Snapshot {
    /// Time of the stop.
    fn facts(&self) -> EpochFacts;
    /// Number of processes and of threads.
    fn counts(&self) -> (u32, u32);
    /// Writes it into the epoch.
    fn write(&self, writer: &mut dyn EpochWriter) -> Result<(), ProcessError>;
    /// Makes the program's own file writes durable.
    fn sync_files(&self) -> Result<(), ProcessError>;
    /// The same for files that it has closed, after [`Snapshot::sync_files`]; takes as long as it takes.
    fn sync_closed_files(&self) -> Result<(), ProcessError>;
    /// What the time of the stop went to.
    fn times(&self) -> StopTimes;
    /// Bytes that [`Snapshot::sync_files`] has to make durable; `None` where nobody tells.
    fn unsynced_bytes(&self) -> Option<u64>;
}

/// Where epochs go.
pub trait EpochLog {
    /// Begins an epoch after the last one.
    fn begin(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError>;
    /// Begins the epoch of a power event, in space that was written ahead where there is some.
    fn begin_event(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError>;
    /// Writes a piece of the space for such an epoch of so many bytes ahead.
    fn write_ahead(&mut self, len: u64) -> Result<Ahead, StoreError>;
    /// Checks a piece of what is stored, and writes again what is harmed.
    fn scrub(&mut self) -> Result<Scrubbed, StoreError>;
    /// Begins a full epoch that replaces all earlier ones at its commit.
    fn begin_base(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError>;
    /// Number of the newest committed epoch; 0 where there is none.
    fn newest(&self) -> u64;
    /// Bytes of the log.
    fn log_bytes(&self) -> u64;
    /// Bytes of it that the newest epoch needs; 0 where that cannot be found out.
    fn live_bytes(&mut self) -> u64;
    /// What the newest commit took.
    fn last_commit(&self) -> CommitTimes;
    /// Bytes that are free where the log is; `None` where nobody tells.
    fn free_bytes(&self) -> Option<u64>;
    /// The store that it is in, whose files can be made shorter.
    fn store(&mut self) -> Option<&mut Store> {
        None
    }
}

/// One committed epoch, with its figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Its number.
    pub epoch: u64,
    /// When the program was stopped, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Number of processes.
    pub processes: u32,
    /// Number of threads.
    pub threads: u32,
    /// How long the program was stopped, microseconds; at a planned end until the epoch was
    /// ready to be committed.
    pub stop_us: u64,
    /// From the beginning of the stop until the epoch survived a power cut, microseconds.
    pub durable_us: u64,
    /// Pages stored.
    pub pages: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes that packing the pages saved.
    #[serde(default)]
    pub saved_bytes: u64,
    /// What the time went to.
    #[serde(default)]
    pub steps: Steps,
}

/// What the time from the stop until an epoch was durable went to, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Before the stop: copying while the program ran.
    pub precopy_us: u64,
    /// Until all threads stood still.
    pub freeze_us: u64,
    /// Looking for written pages, and reading all other state.
    pub scan_us: u64,
    /// Copying pages.
    pub copy_us: u64,
    /// Handing pages and trees to the medium.
    pub write_us: u64,
    /// Making the program's own files durable.
    pub files_us: u64,
    /// Bytes of those that were not durable before; `None` where nobody tells.
    pub files_bytes: Option<u64>,
    /// Tables, and waiting for all of it to reach the medium: the first flush.
    pub flush_us: u64,
    /// The commit record: the second flush.
    pub record_us: u64,
}

/// How an epoch is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// The program runs on as soon as it was captured.
    Running,
    /// It is held until the epoch is durable.
    Held,
    /// It is ended when the epoch is durable.
    Ending,
    /// A power event: at once, held, and then decided.
    Event,
}

/// What becomes of a program whose epoch is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs on.
    RunsOn,
    /// It is ended.
    Ended,
}

/// Who is asked while an epoch is taken.
pub trait Hooks {
    /// How long a program that runs on may be stopped; `None` for as long as it takes.
    fn longest_stop(&self) -> Option<Duration> {
        None
    }
    /// Whether an epoch may wait for something of which nobody knows how long it takes.
    fn patient(&self) -> bool {
        true
    }
    /// Whether there is a power event, so that the program must not run on now.
    fn urgent(&mut self) -> bool;
    /// An event's epoch is durable and the program stands still: what is to become of it? May take
    /// its time.
    fn decide(&mut self, taken: &Taken) -> Fate;
}

/// Nobody who could be asked: there are no events, and what is decided is the end.
#[derive(Clone, Copy, Debug)]
pub struct Nobody;

impl Hooks for Nobody {
    fn urgent(&mut self) -> bool {
        false
    }

    fn decide(&mut self, _: &Taken) -> Fate {
        Fate::Ended
    }
}

/// Takes one epoch. Where it fails, `lost` says whether the next one must be a full one.
///
/// # Errors
/// What the tracker or the store said; the program runs on, unless the error came from ending it
/// after the commit, and its tracker has forgotten its progress, or owes what this one had taken.
pub fn take<P: Program>(
    program: &mut P,
    writer: Box<dyn EpochWriter + '_>,
    manner: Manner,
    hooks: &mut dyn Hooks,
    lost: &mut bool,
) -> Result<(Taken, Fate), ProcessError> {
    let mut owed = false;
    let done = steps(program, writer, manner, (hooks, &mut owed));
    if let Err(error) = &done {
        *lost = !owed && !matches!(error, ProcessError::TooLong { .. });
        if *lost {
            program.forget_progress();
        }
    }
    done
}

/// Whether what the epoch had taken is good for the next one of the same log.
fn may_be_owed(error: &ProcessError) -> bool {
    matches!(
        error,
        ProcessError::GivenBack { .. } | ProcessError::Store(StoreError::Full { .. })
    )
}

fn steps<P: Program>(
    program: &mut P,
    mut writer: Box<dyn EpochWriter + '_>,
    manner: Manner,
    (hooks, owed): (&mut dyn Hooks, &mut bool),
) -> Result<(Taken, Fate), ProcessError> {
    let began = Instant::now();
    if manner != Manner::Event {
        // A planned end is decided already.
        let mut hurry = || manner != Manner::Ending && hooks.urgent();
        program.precopy(&mut *writer, &mut hurry)?;
    }
    if hooks.urgent() {
        writer.hurry();
    }
    let precopy_us = micros(began.elapsed());
    let stopping = Instant::now();
    // An early return drops `frozen`, which lets the program run on.
    let limited = manner == Manner::Running && !hooks.urgent();
    let limit = hooks.longest_stop().filter(|_| limited);
    let (frozen, mut snapshot) = program.stop(&mut *writer, limit)?;
    let runs_on = manner == Manner::Running && !hooks.urgent();
    let (frozen, stopped) = match runs_on {
        true => (None, Some(frozen.resume()?)),
        false => {
            writer.hurry();
            (Some(frozen), None)
        }
    };
    let written = write(&snapshot, &mut *writer, precopy_us);
    let done = written.and_then(|steps| {
        if manner == Manner::Ending || runs_on && hooks.patient() && !hooks.urgent() {
            snapshot.sync_closed_files()?;
        }
        let stop_us = micros(stopped.unwrap_or_else(|| stopping.elapsed()));
        commit(&snapshot, writer, stop_us, stopping, steps)
    });
    let mut taken = match done {
        Ok(taken) => taken,
        Err(error) => {
            drop(frozen);
            if may_be_owed(&error) {
                program.owe(&mut snapshot);
                *owed = true;
            }
            return Err(error);
        }
    };
    let Some(frozen) = frozen else {
        return Ok((taken, Fate::RunsOn));
    };
    let fate = match manner {
        Manner::Held if !hooks.urgent() => Fate::RunsOn,
        Manner::Ending => Fate::Ended,
        // Whoever heard of an event, even while copying ahead, decides what becomes of the program.
        Manner::Running | Manner::Held | Manner::Event => hooks.decide(&taken),
    };
    match fate {
        Fate::RunsOn => taken.stop_us = micros(frozen.resume()?),
        Fate::Ended => frozen.end()?,
    }
    Ok((taken, fate))
}

fn write<S: Snapshot>(
    snapshot: &S,
    writer: &mut dyn EpochWriter,
    precopy_us: u64,
) -> Result<Steps, ProcessError> {
    let began = Instant::now();
    snapshot.write(writer)?;
    let written = Instant::now();
    let files_bytes = snapshot.unsynced_bytes();
    snapshot.sync_files()?;
    let times = snapshot.times();
    Ok(Steps {
        precopy_us,
        freeze_us: micros(times.freeze),
        scan_us: micros(times.scan),
        copy_us: micros(times.copy),
        write_us: micros(written - began),
        files_us: micros(written.elapsed()),
        files_bytes,
        ..Steps::default()
    })
}

fn commit<S: Snapshot>(
    snapshot: &S,
    writer: Box<dyn EpochWriter + '_>,
    stop_us: u64,
    stopping: Instant,
    steps: Steps,
) -> Result<Taken, ProcessError> {
    let facts = EpochFacts {
        stop_us,
        ..snapshot.facts()
    };
    // Mostly a wait for the medium: what comes of it is not to wait for a processor as well.
    let urgent = Urgent::begin();
    let acked = writer.commit(facts)?;
    drop(urgent);
    let (processes, threads) = snapshot.counts();
    Ok(Taken {
        epoch: acked.epoch.0,
        time_ns: facts.taken_at_ns,
        processes,
        threads,
        stop_us,
        durable_us: micros(stopping.elapsed()),
        pages: acked.pages,
        bytes_written: acked.bytes_written,
        saved_bytes: acked.saved_bytes,
        steps,
    })
}

/// Whole microseconds of a duration.
#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Program for Tracked {
    type Frozen<'a> = Stopped<'a>;
    type Snapshot = Captured;

    fn precopy(
        &mut self,
        sink: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<(), ProcessError> {
        Tracked::precopy(self, sink, hurry)
    }

    fn stop(
        &mut self,
        sink: &mut dyn PageSink,
        limit: Option<Duration>,
    ) -> Result<(Stopped<'_>, Captured), ProcessError> {
        Tracked::stop(self, sink, limit)
    }

    fn forget_progress(&mut self) {
        Tracked::forget_progress(self);
    }

    fn owe(&mut self, snapshot: &mut Captured) {
        self.owe_captured(snapshot);
    }

    fn owed_pages(&self) -> u64 {
        Tracked::owed_pages(self)
    }

    fn detach(self) -> Result<(), ProcessError> {
        Tracked::detach(self)
    }

    fn full_copy_because(&self) -> Option<String> {
        match self.tracking() {
            Tracking::WriteProtect | Tracking::SoftDirty | Tracking::Off => None,
            Tracking::FullCopy(reason) => Some(reason.clone()),
        }
    }

    fn tracking(&self) -> &'static str {
        Tracked::tracking(self).name()
    }

    fn stop_within(&mut self, timeout: Duration) -> Duration {
        let before = self.stop_timeout();
        self.set_stop_timeout(timeout);
        before
    }

    fn dirty_pages(&self) -> Option<u64> {
        Tracked::dirty_pages(self)
    }

    fn most_dirty(&self) -> u64 {
        Tracked::most_dirty(self)
    }

    fn exposed_pages(&self) -> u64 {
        Tracked::exposed_pages(self)
    }

    fn expose(&self) {
        Tracked::expose(self);
    }

    fn limit_dirty(&mut self, pages: Option<u64>) {
        Tracked::limit_dirty(self, pages);
    }

    fn pressure(&self) -> Vec<BorrowedFd<'_>> {
        Tracked::pressure(self).collect()
    }
}

impl Frozen for Stopped<'_> {
    fn resume(self) -> Result<Duration, ProcessError> {
        Stopped::resume(self)
    }

    fn end(self) -> Result<(), ProcessError> {
        Stopped::end(self)
    }
}

impl Snapshot for Captured {
    fn facts(&self) -> EpochFacts {
        self.facts
    }

    fn counts(&self) -> (u32, u32) {
        (self.processes, self.threads)
    }

    fn write(&self, writer: &mut dyn EpochWriter) -> Result<(), ProcessError> {
        Captured::write(self, writer)
    }

    fn sync_files(&self) -> Result<(), ProcessError> {
        Captured::sync_files(self)
    }

    fn sync_closed_files(&self) -> Result<(), ProcessError> {
        Captured::sync_closed_files(self)
    }

    fn times(&self) -> StopTimes {
        self.times
    }

    fn unsynced_bytes(&self) -> Option<u64> {
        Captured::unsynced_bytes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeLog, FakeProgram};

    /// Says what it was told to.
    struct Says(bool, Fate);

    impl Hooks for Says {
        fn urgent(&mut self) -> bool {
            self.0
        }

        fn decide(&mut self, _: &Taken) -> Fate {
            self.1
        }
    }

    fn run(
        fail: Option<&'static str>,
        manner: Manner,
        mut says: Says,
    ) -> (Vec<&'static str>, bool, u64) {
        let mut program = FakeProgram::new(fail);
        let mut log = FakeLog {
            fail_commit: fail == Some("commit"),
            ..FakeLog::default()
        };
        let writer = log.begin().unwrap();
        let done = take(&mut program, writer, manner, &mut says, &mut false);
        let trace = program.trace.borrow().clone();
        (trace, done.is_ok(), log.newest())
    }

    fn steps(fail: Option<&'static str>, end: bool) -> (Vec<&'static str>, bool, u64) {
        let manner = if end { Manner::Ending } else { Manner::Running };
        run(fail, manner, Says(false, Fate::Ended))
    }

    #[test]
    fn a_held_epoch_is_durable_before_the_program_runs_on() {
        let (trace, done, newest) = run(None, Manner::Held, Says(false, Fate::Ended));
        assert_eq!(trace, ["precopy", "stop", "write", "sync", "resume"]);
        assert!(done && newest == 1);
    }

    #[test]
    fn an_event_stops_at_once_and_its_fate_is_decided_when_it_is_durable() {
        let (trace, ..) = run(None, Manner::Event, Says(true, Fate::Ended));
        assert_eq!(trace, ["stop", "write", "sync", "end"]);
        let (trace, ..) = run(None, Manner::Event, Says(true, Fate::RunsOn));
        assert_eq!(trace, ["stop", "write", "sync", "resume"]);
        let (trace, ..) = run(None, Manner::Running, Says(true, Fate::Ended));
        assert_eq!(
            trace,
            ["hurried", "precopy", "stop", "write", "sync", "end"],
            "an event in the middle of an epoch"
        );
        let (trace, ..) = run(None, Manner::Held, Says(true, Fate::Ended));
        assert_eq!(
            trace,
            ["hurried", "precopy", "stop", "write", "sync", "end"],
            "an event while it is held for an epoch"
        );
        for fail in ["stop", "write", "sync", "commit"] {
            let (trace, done, newest) = run(Some(fail), Manner::Event, Says(true, Fate::Ended));
            assert!(!done && newest == 0 && !trace.contains(&"end"), "{fail}");
        }
    }

    #[test]
    fn an_epoch_is_written_while_the_program_runs() {
        let (trace, done, newest) = steps(None, false);
        let all = ["precopy", "stop", "resume", "write", "sync", "closed"];
        assert_eq!(trace, all);
        assert!(done);
        assert_eq!(newest, 1);
    }

    #[test]
    fn memory_that_is_given_back_before_it_is_copied_costs_one_epoch() {
        let (trace, done, newest) = steps(Some("behind"), false);
        assert_eq!(trace, ["precopy", "stop", "resume", "write", "owe"]);
        assert!(!done && newest == 0);
        let (trace, done, _) = run(Some("behind"), Manner::Held, Says(false, Fate::Ended));
        assert_eq!(trace, ["precopy", "stop", "write", "dropped", "owe"]);
        assert!(!done);
    }

    #[test]
    fn what_a_full_store_did_not_take_is_owed() {
        for (manner, before) in [(Manner::Running, "closed"), (Manner::Held, "dropped")] {
            let (trace, done, _) = run(Some("commit"), manner, Says(false, Fate::Ended));
            assert!(trace.ends_with(&[before, "owe"]), "{trace:?}");
            assert!(!done);
        }
    }

    #[test]
    fn a_planned_end_ends_the_program_only_after_the_commit() {
        let (trace, done, newest) = steps(None, true);
        assert_eq!(trace, ["precopy", "stop", "write", "sync", "closed", "end"]);
        assert!(done);
        assert_eq!(newest, 1);
    }

    #[test]
    fn after_any_failure_the_program_runs_and_progress_is_forgotten() {
        for end in [false, true] {
            for fail in ["precopy", "stop", "resume", "write", "sync", "closed"] {
                if end && fail == "resume" {
                    continue;
                }
                let (trace, done, newest) = steps(Some(fail), end);
                assert!(!done, "{fail}");
                assert_eq!(newest, 0, "{fail}: nothing is committed");
                assert_eq!(trace.last(), Some(&"forget"), "{fail}");
                assert!(!trace.contains(&"end"), "{fail}: the program lives");
                if trace.contains(&"stop") && fail != "stop" {
                    let runs = trace.iter().any(|s| *s == "resume" || *s == "dropped");
                    assert!(runs, "{fail}: {trace:?}");
                }
            }
        }
    }
}
