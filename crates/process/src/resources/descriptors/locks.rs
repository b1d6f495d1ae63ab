//! Advisory locks on files, as `fdinfo` lists them.
//!
//! Locks of an open file description (`flock`, `F_OFD_SETLK`) are taken again with the description
//! in hand; POSIX locks belong to a table of descriptors and tell which process took them: that one
//! must take them itself. Where it has ended, the process that has the table does. Leases are refused.

use super::context::{About, RemoteCall};
use super::probe::{Probe, failed};
use super::table::{FdTable, OpenDescription};
use crate::ProcessError;
use outlive_linux::kcmp;
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
    /// The process that owns it, where a process does.
    pub process: Option<u32>,
    /// The process that took it, where that is another one with the same table of descriptors;
    /// else 0.
    pub taken_by: u32,
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

fn parse(line: &str, process: u32) -> Line {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, kind, _, access, taker, _, start, end] = words[..] else {
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
    let taken_by = taker.parse().unwrap_or(0);
    let by_another = kind == LockKind::Process && taken_by != process;
    Line::Lock(LockState {
        kind,
        process: (kind == LockKind::Process).then_some(process),
        taken_by: if by_another { taken_by } else { 0 },
        exclusive,
        start,
        length,
    })
}

/// The locks that were taken through a description; `probes` are one view of it for each process
/// that holds it, as each of them is told of its own locks only.
pub(crate) fn collect_all<'a>(
    probes: impl Iterator<Item = &'a Probe<'a>>,
) -> Result<Vec<LockState>, ProcessError> {
    let mut all: Vec<LockState> = Vec::new();
    for (index, probe) in probes.enumerate() {
        let locks = collect(probe)?.into_iter();
        // What belongs to the description is told to everyone.
        all.extend(locks.filter(|lock| index == 0 || lock.kind == LockKind::Process));
    }
    Ok(all)
}

fn collect(probe: &Probe<'_>) -> Result<Vec<LockState>, ProcessError> {
    let mut locks = Vec::new();
    for (_, line) in probe.info.lines().filter(|&(key, _)| key == "lock") {
        match parse(line, probe.target.pid) {
            Line::Lock(lock) => locks.push(taken_by_a_sharer(probe.target.pid, lock)),
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

/// One that has ended is no taker any more, and its number may be another one's.
fn taken_by_a_sharer(process: u32, lock: LockState) -> LockState {
    let shares = |taker| kcmp::same(process, taker, kcmp::Kind::Files) == Ok(true);
    let taken_by = Some(lock.taken_by).filter(|&t| t != 0 && shares(t));
    LockState {
        taken_by: taken_by.unwrap_or(0),
        ..lock
    }
}

/// An image is hostile: who took a lock has the owner's table of descriptors. `holder_of` gives the
/// process whose table a process has; 0 where that is its own, `None` where there is no such process.
pub(crate) fn validate(
    table: &FdTable,
    holder_of: &dyn Fn(u32) -> Option<u32>,
) -> Result<(), ProcessError> {
    let locks = table.descriptions.iter().flat_map(|d| &d.locks);
    for lock in locks.filter(|l| l.taken_by != 0) {
        if lock.kind != LockKind::Process || holder_of(lock.taken_by) != lock.process {
            let what = format!(
                "a file lock was taken by process {}, which does not share the descriptors",
                lock.taken_by
            );
            return Err(ProcessError::Image(what));
        }
    }
    Ok(())
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
pub(crate) fn check(description: &OpenDescription) -> Result<(), ProcessError> {
    for lock in &description.locks {
        span(lock)?;
        if lock.kind == LockKind::Process && taker(description, lock).is_none() {
            return Err(ProcessError::Image(
                "a file lock belongs to a process that does not have the file open".into(),
            ));
        }
    }
    Ok(())
}

/// The process which owns a lock, and its number for the file.
fn taker(description: &OpenDescription, lock: &LockState) -> Option<(u32, u32)> {
    let process = lock.process?;
    Some((process, description.number_in(process)?))
}

/// Adds the calls for locks that belong to processes.
pub(crate) fn finish(description: &OpenDescription, calls: &mut Vec<RemoteCall>) {
    let locks = description.locks.iter();
    for lock in locks.filter(|lock| lock.kind == LockKind::Process) {
        let (Ok((start, length)), Some((process, number))) = (span(lock), taker(description, lock))
        else {
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
            process: match lock.taken_by {
                0 => process,
                taker => taker,
            },
            number: libc::SYS_fcntl,
            args: vec![
                Arg::Value(number.into()),
                Arg::Value(libc::F_SETLK as u64),
                Arg::In(bytes),
            ],
            what: format!("take the file lock of fd {number}"),
            tolerate: &[],
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Description, Holder, signalfd::SignalFdState};
    use super::*;

    #[test]
    fn each_sort_of_line_is_understood() {
        let lock = |kind, exclusive, start, length| {
            Line::Lock(LockState {
                kind,
                process: (kind == LockKind::Process).then_some(77),
                taken_by: if kind == LockKind::Process { 12 } else { 0 },
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
            assert_eq!(parse(text, 77), expected, "{text}");
        }
    }

    #[test]
    fn a_lock_beyond_every_file_or_of_a_stranger_is_an_error() {
        let with = |start, process| {
            let mut description = sample();
            description.locks = vec![LockState {
                kind: LockKind::Process,
                process,
                taken_by: 0,
                exclusive: true,
                start,
                length: 1,
            }];
            description
        };
        assert!(check(&with(0, Some(2))).is_ok());
        assert!(check(&with(i64::MAX as u64, Some(2))).is_err());
        assert!(check(&with(0, Some(3))).is_err());
        assert!(check(&with(0, None)).is_err());
    }

    #[test]
    fn the_taker_of_a_lock_shares_the_descriptors_of_its_owner() {
        let mut description = sample();
        description.locks = vec![LockState {
            kind: LockKind::Process,
            process: Some(2),
            taken_by: 3,
            exclusive: false,
            start: 0,
            length: 0,
        }];
        let table = FdTable {
            descriptions: vec![description],
            pipes: Vec::new(),
        };
        for (holder, valid) in [
            (Some(2), true),
            (Some(0), false),
            (Some(1), false),
            (None, false),
        ] {
            let of = |process| holder.filter(|_| process == 3);
            assert_eq!(validate(&table, &of).is_ok(), valid, "{holder:?}");
        }
    }

    #[test]
    fn the_owner_takes_its_lock_by_its_own_number() {
        let mut description = sample();
        description.locks = [1, 2]
            .map(|process| LockState {
                kind: LockKind::Process,
                process: Some(process),
                taken_by: if process == 2 { 3 } else { 0 },
                exclusive: false,
                start: 0,
                length: 0,
            })
            .to_vec();
        let mut calls = Vec::new();
        finish(&description, &mut calls);
        let takers: Vec<_> = calls
            .iter()
            .map(|call| match call.args[0] {
                Arg::Value(number) => (call.process, number),
                _ => panic!("{call:?}"),
            })
            .collect();
        assert_eq!(takers, [(1, 5), (3, 8)]);
    }

    /// Held by process 1 as 5, by process 2 as 8.
    fn sample() -> OpenDescription {
        let holder = |process, number| Holder {
            process,
            number,
            close_on_exec: false,
        };
        OpenDescription {
            holders: vec![holder(1, 5), holder(2, 8)],
            flags: 2,
            owner: None,
            locks: Vec::new(),
            object: Description::SignalFd(SignalFdState { mask: 0 }),
        }
    }
}
