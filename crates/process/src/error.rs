//! Errors of capture and restore: each says who is to blame and what to do.

use outlive_epoch::StoreError;
use std::{fmt, io};

/// One piece of state that cannot be saved or restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The process that has it.
    pub pid: u32,
    /// Its name (`comm`).
    pub program: String,
    /// Where it is: `fd 7`, `address 7f00…`, `thread 123`, or empty for the whole process.
    pub place: String,
    /// What it is, by its usual name: `established unix socket`, `inotify`.
    pub what: String,
    /// What the user can do.
    pub remedy: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.program)?;
        if !self.place.is_empty() {
            write!(f, ", {}", self.place)?;
        }
        write!(f, ": {}; {}", self.what, self.remedy)
    }
}

/// Why a capture or a restore did not happen. The target runs on as before in every case.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// State that cannot be saved or restored; all of it that was found is listed.
    #[error("refused: {}", list(.0))]
    Refused(Vec<Refusal>),
    /// The kernel does not let us do that to this process.
    #[error("not permitted: {what} (pid {pid}); {remedy}")]
    NotPermitted {
        /// The process.
        pid: u32,
        /// What was tried.
        what: String,
        /// What the user can do.
        remedy: String,
    },
    /// The process is not there, or ended meanwhile.
    #[error("pid {pid}: {what}")]
    Gone {
        /// The process.
        pid: u32,
        /// What was seen.
        what: String,
    },
    /// A thread did not stop in time; the program runs on.
    #[error("pid {pid}: thread {tid} did not stop within {waited_ms} ms; the program runs on")]
    NotStopped {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// How long it was waited for, milliseconds.
        waited_ms: u64,
    },
    /// The program would have been stopped for longer than is allowed; it runs on, and nothing is
    /// lost: what was found is taken by the next epoch.
    #[error("the stop would have taken longer than {limit_us} us; the program runs on")]
    TooLong {
        /// The longest that a stop may take, microseconds.
        limit_us: u64,
    },
    /// The program gave memory back that was to be copied behind it: there is no such epoch. The
    /// program runs on, and nothing else is lost where it is handed over again
    /// ([`crate::Tracked::owe_captured`]).
    #[error("pid {pid}: copying behind the program: it gave back the page at {address:x} before")]
    GivenBack {
        /// The process.
        pid: u32,
        /// The page's address.
        address: u64,
    },
    /// The kernel answered with an error where none was expected.
    #[error("pid {pid}: {what}: {source}")]
    Kernel {
        /// The process.
        pid: u32,
        /// The operation, with its address or descriptor.
        what: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The image does not make sense, although its checksums are right.
    #[error("the image is damaged or hostile: {0}")]
    Image(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn list(refusals: &[Refusal]) -> String {
    let lines: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    lines.join("\n  ")
}
