//! Advisory locks on files, as `fdinfo` lists them.
//!
//! Locks of an open file description (`flock`, `F_OFD_SETLK`) are taken again with the description
//! in hand; POSIX locks belong to the process, which must take them itself. Leases are refused.

use super::context::{About, RemoteCall};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_linux::remote::Arg;
use outlive_state_tree::{StateNode, StateValue};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};

/// To whom a lock belongs.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// `flock(2)`: the open file description, the whole file.
    Flock,
    /// `fcntl(F_SETLK)`: the process.
    Process,
    /// `fcntl(F_OFD_SETLK)`: the open file description.
    Description,
}

/// One lock.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,file-lock-v1")]
pub struct LockState {
    /// To whom it belongs.
    pub kind: LockKind,
    /// Whether it keeps readers out too.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Number of bytes, 0 for all up to the end of the file however far it grows.
    pub length: u64,
}

/// What a `lock:` line says.
#[derive(Debug, PartialEq)]
enum Line {
    Lock(LockState),
    Lease,
    Unknown,
}

fn parse(line: &str) -> Line {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, kind, _, access, _, _, start, end] = words[..] else {
        return if words.get(1) == Some(&"LEASE") {
            Line::Lease
        } else {
            Line::Unknown
        };
    };
    let kind = match kind {
        "FLOCK" => LockKind::Flock,
        "POSIX" => LockKind::Process,
        "OFDLCK" => LockKind::Description,
        "LEASE" | "DELEG" => return Line::Lease,
        _ => return Line::Unknown,
    };
    let exclusive = match access {
        "WRITE" => true,
        "READ" => false,
        _ => return Line::Unknown,
    };
    let Ok(start) = start.parse::<u64>() else {
        return Line::Unknown;
    };
    let length = match end {
        "EOF" => 0,
        end => match end
            .parse::<u64>()
            .ok()
            .and_then(|end| end.checked_sub(start))
        {
            Some(span) if span < u64::MAX => span + 1,
            _ => return Line::Unknown,
        },
    };
    Line::Lock(LockState {
        kind,
        exclusive,
        start,
        length,
    })
}

/// The locks that were taken through a descriptor.
pub(crate) fn collect(probe: &Probe<'_>) -> Result<Vec<LockState>, ProcessError> {
    let mut locks = Vec::new();
    for (_, line) in probe.info.lines().filter(|&(key, _)| key == "lock") {
        match parse(line) {
            Line::Lock(lock) => locks.push(lock),
            Line::Lease => {
                return Err(probe.refuse(
                    format!("file lease on {}", probe.shown()),
                    "have the program give the lease up (F_SETLEASE with F_UNLCK)",
                ));
            }
            Line::Unknown => {
                return Err(probe.refuse(
                    format!(
                        "file lock of an unknown kind (`{line}`) on {}",
                        probe.shown()
                    ),
                    "have the program release the lock",
                ));
            }
        }
    }
    Ok(locks)
}

/// Takes the locks that belong to the description itself.
pub(crate) fn take(
    pid: u32,
    about: &About,
    locks: &[LockState],
    file: &OwnedFd,
) -> Result<(), ProcessError> {
    for lock in locks {
        let taken = match lock.kind {
            LockKind::Process => continue,
            LockKind::Flock => rustix::fs::flock(
                file,
                if lock.exclusive {
                    FlockOperation::NonBlockingLockExclusive
                } else {
                    FlockOperation::NonBlockingLockShared
                },
            ),
            LockKind::Description => {
                let (start, length) = span(lock)?;
                outlive_linux::descriptors::lock_description(
                    file.as_fd(),
                    lock.exclusive,
                    start,
                    length,
                )
            }
        };
        taken.map_err(|errno| {
            let holder = if errno == Errno::AGAIN {
                ", which somebody else holds"
            } else {
                ""
            };
            failed(
                pid,
                format!("take the file lock of fd {}{holder}", about.number),
                errno,
            )
        })?;
    }
    Ok(())
}

fn span(lock: &LockState) -> Result<(i64, i64), ProcessError> {
    match (i64::try_from(lock.start), i64::try_from(lock.length)) {
        (Ok(start), Ok(length)) if start.checked_add(length).is_some() => Ok((start, length)),
        _ => Err(ProcessError::Image(
            "a file lock lies beyond every file".into(),
        )),
    }
}

/// Checks what [`take`] and [`finish`] rely on.
pub(crate) fn check(locks: &[LockState]) -> Result<(), ProcessError> {
    locks.iter().try_for_each(|lock| span(lock).map(|_| ()))
}

/// Adds the calls for locks that belong to the process.
pub(crate) fn finish(about: &About, locks: &[LockState], calls: &mut Vec<RemoteCall>) {
    for lock in locks.iter().filter(|lock| lock.kind == LockKind::Process) {
        let Ok((start, length)) = span(lock) else {
            continue;
        };
        let kind = if lock.exclusive {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        };
        // struct flock: l_type, l_whence, four bytes of padding, l_start, l_len, l_pid, padding.
        let mut bytes = Vec::with_capacity(32);
        bytes.extend_from_slice(&(kind as i16).to_ne_bytes());
        bytes.extend_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&start.to_ne_bytes());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        calls.push(RemoteCall {
            number: libc::SYS_fcntl,
            args: vec![
                Arg::Value(about.number.into()),
                Arg::Value(libc::F_SETLK as u64),
                Arg::In(bytes),
            ],
            what: format!("take the file lock of fd {}", about.number),
            tolerate: &[],
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sort_of_line_is_understood() {
        let lock = |kind, exclusive, start, length| {
            Line::Lock(LockState {
                kind,
                exclusive,
                start,
                length,
            })
        };
        let cases = [
            (
                "1: POSIX  ADVISORY  WRITE 12 00:1f:5 0 EOF",
                lock(LockKind::Process, true, 0, 0),
            ),
            (
                "1: POSIX  ADVISORY  READ  12 00:1f:5 10 19",
                lock(LockKind::Process, false, 10, 10),
            ),
            (
                "1: FLOCK  ADVISORY  WRITE 12 00:1f:5 0 EOF",
                lock(LockKind::Flock, true, 0, 0),
            ),
            (
                "1: OFDLCK ADVISORY  READ  -1 00:1f:5 7 7",
                lock(LockKind::Description, false, 7, 1),
            ),
            ("1: LEASE  ACTIVE    WRITE 12 00:1f:5 0 EOF", Line::Lease),
            ("1: POSIX  ADVISORY  WRITE 12 00:1f:5 9 3", Line::Unknown),
            (
                "1: POSIX  ADVISORY  WRITE 12 00:1f:5 0 18446744073709551615",
                Line::Unknown,
            ),
            ("", Line::Unknown),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_lock_beyond_every_file_is_an_error() {
        let lock = LockState {
            kind: LockKind::Process,
            exclusive: true,
            start: i64::MAX as u64,
            length: 1,
        };
        assert!(check(&[lock]).is_err());
    }
}
