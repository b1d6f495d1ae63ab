//! The order of one epoch.
//!
//! # Rules
//! - Begin, precopy, stop, resume, write, sync the program's files, commit. The program is stopped
//!   for as short as its tracker can make it; everything slow happens while it runs.
//! - A *planned end* keeps the program stopped until the epoch is durable, and only then ends it.
//!   If anything fails before, the program runs on.
//! - After any failure from precopy on, the tracker is told to forget its progress: what it handed
//!   over never became an epoch.
//! - The mechanisms are reached through traits, so that the order is tested without a program.

use outlive_epoch::{EpochFacts, EpochWriter, PageSink, StoreError};
use outlive_process::{Captured, ProcessError, Stopped, Tracked, Tracking};
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

    /// Copies what changed while the program runs.
    fn precopy(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError>;
    /// Freezes the program and takes what is left into memory.
    fn stop(&mut self) -> Result<(Self::Frozen<'_>, Self::Snapshot), ProcessError>;
    /// What was taken since the last epoch did not become one.
    fn forget_progress(&mut self);
    /// Ends tracking; the program runs on.
    fn detach(self) -> Result<(), ProcessError>;
    /// Why every epoch copies everything, where that is so although the strategy is another.
    fn full_copy_because(&self) -> Option<String>;
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
}

/// Where epochs go.
pub trait EpochLog {
    /// Begins an epoch after the last one.
    fn begin(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError>;
    /// Begins a full epoch that replaces all earlier ones at its commit.
    fn begin_base(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError>;
    /// Number of the newest committed epoch; 0 where there is none.
    fn newest(&self) -> u64;
    /// Bytes of the log.
    fn log_bytes(&self) -> u64;
    /// Bytes of it that the newest epoch needs; 0 where that cannot be found out.
    fn live_bytes(&mut self) -> u64;
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
}

/// Takes one epoch of a program that runs on.
///
/// # Errors
/// What the tracker or the store said; the program runs on, and its tracker has forgotten its
/// progress.
pub fn take<P: Program>(
    program: &mut P,
    writer: Box<dyn EpochWriter + '_>,
) -> Result<Taken, ProcessError> {
    let done = running(program, writer);
    if done.is_err() {
        program.forget_progress();
    }
    done
}

/// Takes the final epoch of a program and ends it, stopped from the capture on.
///
/// # Errors
/// As [`take`]; the program runs on unless the error came from ending it after the commit.
pub fn take_and_end<P: Program>(
    program: &mut P,
    writer: Box<dyn EpochWriter + '_>,
) -> Result<Taken, ProcessError> {
    let done = ending(program, writer);
    if done.is_err() {
        program.forget_progress();
    }
    done
}

fn running<P: Program>(
    program: &mut P,
    mut writer: Box<dyn EpochWriter + '_>,
) -> Result<Taken, ProcessError> {
    program.precopy(&mut *writer)?;
    let stopping = Instant::now();
    let (frozen, snapshot) = program.stop()?;
    let stopped = frozen.resume()?;
    snapshot.write(&mut *writer)?;
    snapshot.sync_files()?;
    commit(&snapshot, writer, micros(stopped), stopping)
}

fn ending<P: Program>(
    program: &mut P,
    mut writer: Box<dyn EpochWriter + '_>,
) -> Result<Taken, ProcessError> {
    program.precopy(&mut *writer)?;
    let stopping = Instant::now();
    // An early return drops `frozen`, which lets the program run on.
    let (frozen, snapshot) = program.stop()?;
    snapshot.write(&mut *writer)?;
    snapshot.sync_files()?;
    let taken = commit(&snapshot, writer, micros(stopping.elapsed()), stopping)?;
    frozen.end()?;
    Ok(taken)
}

fn commit<S: Snapshot>(
    snapshot: &S,
    writer: Box<dyn EpochWriter + '_>,
    stop_us: u64,
    stopping: Instant,
) -> Result<Taken, ProcessError> {
    let facts = EpochFacts {
        stop_us,
        ..snapshot.facts()
    };
    let acked = writer.commit(facts)?;
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

    fn precopy(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        Tracked::precopy(self, sink)
    }

    fn stop(&mut self) -> Result<(Stopped<'_>, Captured), ProcessError> {
        Tracked::stop(self)
    }

    fn forget_progress(&mut self) {
        Tracked::forget_progress(self);
    }

    fn detach(self) -> Result<(), ProcessError> {
        Tracked::detach(self)
    }

    fn full_copy_because(&self) -> Option<String> {
        match self.tracking() {
            Tracking::WriteProtect | Tracking::Off => None,
            Tracking::FullCopy(reason) => Some(reason.clone()),
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeLog, FakeProgram};

    fn steps(fail: Option<&'static str>, end: bool) -> (Vec<&'static str>, bool, u64) {
        let mut program = FakeProgram::new(fail);
        let mut log = FakeLog {
            fail_commit: fail == Some("commit"),
            ..FakeLog::default()
        };
        let writer = log.begin().unwrap();
        let done = if end {
            take_and_end(&mut program, writer)
        } else {
            take(&mut program, writer)
        };
        let trace = program.trace.borrow().clone();
        (trace, done.is_ok(), log.newest())
    }

    #[test]
    fn an_epoch_is_written_while_the_program_runs() {
        let (trace, done, newest) = steps(None, false);
        assert_eq!(trace, ["precopy", "stop", "resume", "write", "sync"]);
        assert!(done);
        assert_eq!(newest, 1);
    }

    #[test]
    fn a_planned_end_ends_the_program_only_after_the_commit() {
        let (trace, done, newest) = steps(None, true);
        assert_eq!(trace, ["precopy", "stop", "write", "sync", "end"]);
        assert!(done);
        assert_eq!(newest, 1);
    }

    #[test]
    fn after_any_failure_the_program_runs_and_progress_is_forgotten() {
        for end in [false, true] {
            for fail in ["precopy", "stop", "resume", "write", "sync", "commit"] {
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
