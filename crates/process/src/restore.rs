//! Making a program again from a committed epoch.

use crate::ProcessError;
use outlive_epoch::EpochReader;

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
pub struct Ready {}

impl Ready {
    /// The process, which is our child.
    pub fn pid(&self) -> u32 {
        0
    }

    /// Things the user should know: connections that were reset, file tails kept aside.
    pub fn notices(&self) -> &[String] {
        &[]
    }

    /// Lets the program run.
    pub fn go(self) -> Result<Restored, ProcessError> {
        Ok(Restored { pid: 0, restore_us: 0, first_run_us: 0, notices: Vec::new() })
    }
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

/// Makes the program of this epoch again, stopped before its first instruction. Its standard
/// streams and terminal are those of the caller. On failure nothing half-restored is left.
pub fn restore(reader: &dyn EpochReader, options: &RestoreOptions) -> Result<Ready, ProcessError> {
    let _ = (reader, options);
    Err(ProcessError::Image("empty".into()))
}
