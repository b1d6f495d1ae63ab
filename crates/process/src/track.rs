//! A running program under tracking, and the stop.

use crate::ProcessError;
use outlive_epoch::{EpochFacts, EpochWriter, PageSink};
use std::time::Duration;

/// How a program is tracked.
#[derive(Clone, Debug)]
pub struct TrackOptions {
    /// How long a thread may take to stop before the epoch is given up.
    pub stop_timeout: Duration,
    /// Whether to track written pages between epochs (an epoch taken once does not need it).
    pub incremental: bool,
}

/// By which means written pages are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// `PAGEMAP_SCAN` with asynchronous write protection.
    WriteProtect,
    /// Every epoch copies everything, because of what is said here.
    FullCopy(String),
}

/// A running program under tracking. Between epochs nothing is attached to it.
pub struct Tracked {}

impl Tracked {
    /// Begins to track process `pid`. Refuses, before any harm, state that could not be restored.
    pub fn attach(pid: u32, options: TrackOptions) -> Result<Self, ProcessError> {
        let _ = options;
        Err(ProcessError::Gone { pid, what: "not there".into() })
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        0
    }

    /// By which means written pages are found.
    pub fn tracking(&self) -> &Tracking {
        &Tracking::WriteProtect
    }

    /// Copies what was written since the last pass into `sink` while the program runs, until a
    /// further pass would not make the stop shorter.
    pub fn precopy(&mut self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        let _ = sink;
        Ok(())
    }

    /// Freezes the program and takes everything that is left into memory. On failure the program
    /// runs on as before.
    pub fn stop(&mut self) -> Result<(Stopped<'_>, Captured), ProcessError> {
        Err(ProcessError::Gone { pid: 0, what: "not there".into() })
    }

    /// Call when an epoch was not committed: what it took as saved is not; the next one is full.
    pub fn forget_progress(&mut self) {}

    /// Ends tracking; no trace stays in the program.
    pub fn detach(self) -> Result<(), ProcessError> {
        Ok(())
    }
}

/// A frozen program. Dropping it lets the program run on.
pub struct Stopped<'a> {
    _tracked: &'a mut Tracked,
}

impl Stopped<'_> {
    /// Lets the program run on; the time from the first thread frozen to the last one resumed.
    pub fn resume(self) -> Result<Duration, ProcessError> {
        Ok(Duration::ZERO)
    }

    /// Ends the program (SIGKILL) and waits until it is gone, which includes reaping it if it is
    /// our own child. For planned events, after the epoch is durable.
    pub fn end(self) -> Result<(), ProcessError> {
        Ok(())
    }
}

/// What the stop took: state trees and the pages that had not been copied before.
pub struct Captured {
    /// Number of processes.
    pub processes: u32,
    /// Number of threads.
    pub threads: u32,
    /// Time of the stop; `stop_us` is for the caller to fill in after the resume.
    pub facts: EpochFacts,
}

impl Captured {
    /// Writes trees and pages into the epoch.
    pub fn write(&self, writer: &mut dyn EpochWriter) -> Result<(), ProcessError> {
        let _ = writer;
        Ok(())
    }

    /// Makes what the program had written to its files by the stop durable (`fdatasync`). Must
    /// have succeeded before the epoch is committed.
    pub fn sync_files(&self) -> Result<(), ProcessError> {
        Ok(())
    }
}
