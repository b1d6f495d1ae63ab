//! Why a command could not be done, and the exit code that says so.
//!
//! The codes are a contract with scripts: 1 anything else, 2 usage, 3 refused, 4 image damaged
//! beyond repair, 5 not permitted.

use outlive_epoch::StoreError;
use outlive_process::ProcessError;
use std::io;
use std::path::Path;

/// A failure of a command.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Capture or restore failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system answered with an error.
    #[error("{what}: {source}")]
    Io {
        /// The operation and the path.
        what: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The command line does not make sense or asks for what is not offered.
    #[error("{0}")]
    Usage(String),
    /// The wish is understood and not granted; the text names the remedy.
    #[error("{0}")]
    Refused(String),
    /// Another keeper answered with this failure.
    #[error("{message}")]
    Told {
        /// Its words.
        message: String,
        /// Its exit code.
        exit: u8,
    },
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl KeeperError {
    /// Wraps an error of the operating system, for `map_err`.
    pub fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }

    /// The same failure, with a directory in it called by another name: one that was opened through
    /// a descriptor is called as the user calls it.
    #[must_use]
    pub fn renamed(self, from: &Path, to: &Path) -> Self {
        match self {
            Self::Store(error) => Self::Store(renamed(error, from, to)),
            Self::Process(ProcessError::Store(error)) => {
                Self::Process(ProcessError::Store(renamed(error, from, to)))
            }
            other => other,
        }
    }

    /// The exit code of the contract.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Process(error) => process_code(error),
            Self::Store(error) => store_code(error),
            Self::Io { source, .. } => io_code(source),
            Self::Usage(_) => 2,
            Self::Refused(_) => 3,
            Self::Told { exit, .. } => *exit,
            Self::Other(_) => 1,
        }
    }
}

fn renamed(mut error: StoreError, from: &Path, to: &Path) -> StoreError {
    let place = match &mut error {
        StoreError::Medium { place, .. }
        | StoreError::Full { place, .. }
        | StoreError::Damaged { place, .. }
        | StoreError::Newer { place, .. }
        | StoreError::Missing { place, .. }
        | StoreError::Locked { place, .. }
        | StoreError::Busy { place, .. } => place,
        StoreError::Misuse(_) => return error,
    };
    if let Some(rest) = place.strip_prefix(&*from.to_string_lossy()) {
        *place = format!("{}{rest}", to.display());
    }
    error
}

fn process_code(error: &ProcessError) -> u8 {
    match error {
        ProcessError::Refused(_) => 3,
        ProcessError::NotPermitted { .. } => 5,
        ProcessError::Image(_) => 4,
        ProcessError::Store(error) => store_code(error),
        ProcessError::Kernel { source, .. } => io_code(source),
        ProcessError::Gone { .. }
        | ProcessError::NotStopped { .. }
        | ProcessError::TooLong { .. }
        | ProcessError::GivenBack { .. } => 1,
    }
}

fn store_code(error: &StoreError) -> u8 {
    match error {
        StoreError::Damaged { .. } => 4,
        StoreError::Newer { .. } | StoreError::Busy { .. } | StoreError::Locked { .. } => 3,
        StoreError::Medium { source, .. } => io_code(source),
        StoreError::Full { .. } | StoreError::Missing { .. } | StoreError::Misuse(_) => 1,
    }
}

fn io_code(source: &io::Error) -> u8 {
    if source.kind() == io::ErrorKind::PermissionDenied {
        5
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_opened_by_descriptor_is_called_by_its_name() {
        let damaged = || StoreError::Damaged {
            place: "/proc/self/fd/7/epochs.1 at 4096".into(),
            what: "page".into(),
        };
        let (from, to) = (Path::new("/proc/self/fd/7"), Path::new("/i"));
        for error in [
            KeeperError::Store(damaged()),
            ProcessError::Store(damaged()).into(),
        ] {
            let text = error.renamed(from, to).to_string();
            assert!(text.starts_with("/i/epochs.1 at 4096 "), "{text}");
        }
    }

    #[test]
    fn exit_codes_are_those_of_the_contract() {
        let damaged = StoreError::Damaged {
            place: "epochs.1 at 4096".into(),
            what: "page".into(),
        };
        assert_eq!(KeeperError::from(damaged).exit_code(), 4);
        let busy = StoreError::Busy {
            place: "x".into(),
            holder: "pid 7".into(),
        };
        assert_eq!(KeeperError::from(ProcessError::Store(busy)).exit_code(), 3);
        assert_eq!(
            KeeperError::from(ProcessError::Refused(Vec::new())).exit_code(),
            3
        );
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(
            KeeperError::io::<io::Error>("open /x")(denied).exit_code(),
            5
        );
        let lost = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(KeeperError::io::<io::Error>("open /x")(lost).exit_code(), 1);
        assert_eq!(KeeperError::Usage(String::new()).exit_code(), 2);
        assert_eq!(
            KeeperError::Told {
                message: String::new(),
                exit: 5
            }
            .exit_code(),
            5
        );
    }
}
