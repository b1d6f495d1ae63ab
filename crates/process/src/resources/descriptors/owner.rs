//! Who gets the signals of a descriptor: `F_SETOWN`, `F_SETSIG` and `O_ASYNC` of `fcntl(2)`.
//!
//! An owner is kept for everything that can send signals, also while it sends none: a socket tells
//! its owner of urgent data without `O_ASYNC`. A process that holds the descriptor sets the owner
//! again itself, once every process and thread is there: numbers are those that it sees. The kernel
//! notes on whose authority signals are sent; while it is set, that process is the user who set it
//! before.
//!
//! # What it refuses
//! An owner outside the subject, which would be another process after a restore, and `O_ASYNC` on
//! a stream that is re-attached: whoever restores shares that one.

use super::context::RemoteCall;
use super::probe::{Probe, Target};
use super::table::{FdTable, OpenDescription};
use super::{Description, Holder};
use crate::ProcessError;
use outlive_linux::descriptors::{self, OwnerKind};
use outlive_linux::remote::Arg;
use outlive_state_tree::{StateNode, StateValue};
use rustix::fs::{FileType, OFlags};
use std::collections::BTreeSet;

/// Signal-driven I/O is on.
pub(crate) const ASYNC: u32 = libc::O_ASYNC as u32;
/// The largest number of a signal.
const SIGNALS: u32 = 64;
/// "Leave this user as it is" (`setresuid(2)`).
const SAME: u32 = u32::MAX;

/// What an owner is.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerSort {
    /// Nobody; only a signal was chosen.
    Nobody,
    /// A thread.
    Thread,
    /// A process.
    Process,
    /// A process group.
    Group,
}

/// Who gets signals, and which.
#[derive(StateNode, Debug, Clone, PartialEq, Eq)]
#[state(compatible = "outlive,signal-owner-v1")]
pub struct OwnerState {
    /// What the owner is.
    pub sort: OwnerSort,
    /// Its ID; 0 for nobody.
    pub id: u32,
    /// The signal, 0 for the usual one (`F_SETSIG`).
    pub signal: u32,
    /// Real and effective user on whose authority it was set.
    pub users: Vec<u32>,
}

/// Whether this could send signals at all.
fn can_signal(probe: &Probe<'_>) -> Result<bool, ProcessError> {
    if probe.has(OFlags::PATH) {
        return Ok(false);
    }
    let start = |s: &str| probe.link.starts_with(s.as_bytes());
    if probe.info.flags & ASYNC != 0 || start("socket:[") || start("pipe:[") {
        return Ok(true);
    }
    if start("anon_inode:inotify") {
        return Ok(true);
    }
    let like_a_file = matches!(
        probe.has_path().then(|| probe.file_type()).transpose()?,
        None | Some(FileType::RegularFile | FileType::Directory)
    );
    Ok(!like_a_file)
}

/// Reads the owner of a descriptor, if it ever had one; `targets` are the processes of the subject.
pub(crate) fn collect(
    probe: &Probe<'_>,
    object: &Description,
    targets: &[&Target<'_>],
) -> Result<Option<OwnerState>, ProcessError> {
    if !can_signal(probe)? {
        return Ok(None);
    }
    if matches!(object, Description::Stream(_)) {
        if probe.info.flags & ASYNC == 0 {
            return Ok(None);
        }
        return Err(probe.refuse(
            format!("signal-driven I/O (O_ASYNC) on {}", probe.shown()),
            "have the program wait with poll or epoll instead",
        ));
    }
    let owner = descriptors::signal_owner(probe.duplicate()?)
        .map_err(|errno| probe.failed("ask for the owner of", errno))?;
    let sort = match (owner.id, owner.kind) {
        (0, _) => OwnerSort::Nobody,
        (_, OwnerKind::Thread) => OwnerSort::Thread,
        (_, OwnerKind::Process) => OwnerSort::Process,
        (_, OwnerKind::Group) => OwnerSort::Group,
    };
    if sort == OwnerSort::Nobody && owner.signal == 0 {
        return Ok(None);
    }
    let is_member = |id: u32| targets.iter().any(|target| target.pid == id);
    let is_thread = |id: u32| {
        let listed = |target: &&Target<'_>| {
            std::path::Path::new(&format!("/proc/{}/task/{id}", target.pid)).exists()
        };
        targets.iter().any(listed)
    };
    let inside = match sort {
        OwnerSort::Nobody => true,
        OwnerSort::Thread => is_thread(owner.id),
        OwnerSort::Process | OwnerSort::Group => is_member(owner.id),
    };
    if !inside {
        return Err(probe.refuse(
            format!(
                "signals of {} go to process or group {}, which is not of this program",
                probe.shown(),
                owner.id
            ),
            "have the program own its descriptors itself (F_SETOWN)",
        ));
    }
    Ok(Some(OwnerState {
        sort,
        id: owner.id,
        signal: owner.signal,
        users: owner.users.to_vec(),
    }))
}

/// An image is hostile: signals may go to what is restored only. `processes` are the processes,
/// `threads` all threads.
pub(crate) fn validate(
    table: &FdTable,
    processes: &BTreeSet<u32>,
    threads: &BTreeSet<u32>,
) -> Result<(), ProcessError> {
    for (about, description) in table.each() {
        let Some(owner) = &description.owner else {
            continue;
        };
        let known = match owner.sort {
            OwnerSort::Nobody => owner.id == 0,
            OwnerSort::Thread => threads.contains(&owner.id),
            OwnerSort::Process | OwnerSort::Group => processes.contains(&owner.id),
        };
        if !known || owner.signal > SIGNALS || owner.users.len() != 2 {
            return Err(ProcessError::Image(format!(
                "the owner of fd {} makes no sense",
                about.number
            )));
        }
    }
    Ok(())
}

/// Adds the calls that set the owner and switch signals on, for a process that holds it.
fn calls_for(description: &OpenDescription, holder: &Holder, calls: &mut Vec<RemoteCall>) {
    let mut call = |number, args: Vec<Arg>, what: &str| {
        calls.push(RemoteCall {
            process: holder.process,
            number,
            args,
            what: format!("{what} fd {}", holder.number),
            tolerate: &[],
        });
    };
    let value = |n: u32| Arg::Value(n.into());
    let fcntl = |command: i32, arg: Arg| vec![value(holder.number), value(command as u32), arg];
    if let Some(owner) = &description.owner {
        let (real, effective) = match owner.users[..] {
            [real, effective] => (real, effective),
            _ => (SAME, SAME),
        };
        // The saved user stays, so that there is a way back.
        let me = [rustix::process::getuid(), rustix::process::geteuid()].map(|u| u.as_raw());
        let other = [real, effective] != me && owner.sort != OwnerSort::Nobody;
        if other {
            let args = vec![value(real), value(effective), value(SAME)];
            call(libc::SYS_setresuid, args, "being the user who owns");
        }
        let kind = match owner.sort {
            OwnerSort::Nobody => None,
            OwnerSort::Thread => Some(OwnerKind::Thread),
            OwnerSort::Process => Some(OwnerKind::Process),
            OwnerSort::Group => Some(OwnerKind::Group),
        };
        if let Some(kind) = kind {
            let owner = descriptors::owner_argument(kind, owner.id);
            let args = fcntl(descriptors::F_SETOWN_EX, Arg::In(owner.to_vec()));
            call(libc::SYS_fcntl, args, "setting the owner of");
        }
        let args = fcntl(descriptors::F_SETSIG, value(owner.signal));
        call(libc::SYS_fcntl, args, "setting the signal of");
        if other {
            let args = vec![value(me[0]), value(me[1]), value(SAME)];
            call(libc::SYS_setresuid, args, "being the restorer again for");
        }
    }
    if description.flags & ASYNC != 0 {
        let args = fcntl(libc::F_SETFL, value(description.flags));
        call(libc::SYS_fcntl, args, "switching signals on for");
    }
}

/// What restored processes must call themselves once all processes and threads are there.
#[must_use]
pub fn owner_calls(table: &FdTable) -> Vec<RemoteCall> {
    let mut calls = Vec::new();
    for (_, description) in table.each() {
        // A stream is shared with whoever restores.
        if matches!(description.object, Description::Stream(_)) {
            continue;
        }
        if let Some(holder) = description.holders.first() {
            calls_for(description, holder, &mut calls);
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::super::signalfd::SignalFdState;
    use super::*;

    fn table(owner: OwnerState) -> FdTable {
        let holder = |process, number| Holder {
            process,
            number,
            close_on_exec: false,
        };
        let description = OpenDescription {
            holders: vec![holder(7, 5), holder(8, 6)],
            flags: ASYNC | 2,
            owner: Some(owner),
            locks: vec![],
            object: Description::SignalFd(SignalFdState { mask: 0 }),
        };
        FdTable {
            descriptions: vec![description],
            pipes: vec![],
        }
    }

    fn owner(sort: OwnerSort, id: u32) -> OwnerState {
        OwnerState {
            sort,
            id,
            signal: 40,
            users: vec![1, 2],
        }
    }

    #[test]
    fn signals_go_to_nobody_else() {
        let judge = |owner| {
            let (processes, threads) = ([7, 8].into(), [7, 8, 9].into());
            validate(&table(owner), &processes, &threads)
        };
        for (sort, id, good) in [
            (OwnerSort::Nobody, 0, true),
            (OwnerSort::Nobody, 7, false),
            (OwnerSort::Thread, 9, true),
            (OwnerSort::Process, 9, false),
            (OwnerSort::Process, 8, true),
            (OwnerSort::Group, 1, false),
            (OwnerSort::Thread, 0, false),
        ] {
            assert_eq!(judge(owner(sort, id)).is_ok(), good, "{sort:?} {id}");
        }
        let wrong = OwnerState {
            signal: 65,
            ..owner(OwnerSort::Process, 7)
        };
        assert!(judge(wrong).is_err());
        let wrong = OwnerState {
            users: vec![0; 3],
            ..owner(OwnerSort::Process, 7)
        };
        assert!(judge(wrong).is_err());
    }

    #[test]
    fn the_owner_is_set_by_the_user_who_did_and_before_signals_are_on() {
        let calls = owner_calls(&table(owner(OwnerSort::Group, 7)));
        let what: Vec<_> = calls
            .iter()
            .map(|call| (call.process, call.what.split(" fd").next().unwrap()))
            .collect();
        let expected = [
            "being the user who owns",
            "setting the owner of",
            "setting the signal of",
            "being the restorer again for",
            "switching signals on for",
        ];
        assert_eq!(what, expected.map(|text| (7, text)));
    }
}
