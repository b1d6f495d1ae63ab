//! Making the empty process into which a program is restored, and processes that have ended.
//!
//! The process is born with the PID and in the time namespace that are asked for, as a child of
//! the caller, and does nothing but wait: everything else is done to it from outside.
//!
//! # Safety
//! Between `fork` and `_exit` only system calls are made, on memory prepared before the fork, so
//! that locks which other threads of the caller hold do not matter.
#![allow(unsafe_code)]

use crate::clock::TimeOffsets;
use crate::{Errno, last_error};
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::fs::File;
use std::io::Read;

/// What could not be done.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The time namespace could not be made.
    #[error("creating a time namespace: {0}")]
    TimeNamespace(Errno),
    /// The process could not be made with its process ID: [`Errno::EXIST`] where it is taken.
    #[error("creating process {pid}: {source}")]
    Clone {
        /// The process ID.
        pid: u32,
        /// What the kernel said.
        source: Errno,
    },
    /// Anything else.
    #[error("preparing to create a process: {0}")]
    Other(Errno),
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Length of `struct clone_args`, bytes.
pub const CLONE_ARGS_SIZE: usize = size_of::<CloneArgs>();

/// `struct clone_args` for a thread or process with a given ID (which lies at `set_tid_at`), in
/// the form that the kernel reads.
#[must_use]
pub fn clone_args(flags: u64, exit_signal: u64, set_tid_at: u64) -> [u8; CLONE_ARGS_SIZE] {
    let mut raw = [0u8; CLONE_ARGS_SIZE];
    let mut put = |field: usize, value: u64| {
        raw[field * 8..field * 8 + 8].copy_from_slice(&value.to_ne_bytes());
    };
    put(0, flags);
    put(4, exit_signal);
    put(8, set_tid_at);
    put(9, 1);
    raw
}

/// `CLONE_CLEAR_SIGHAND`
const CLEAR_SIGHAND: u64 = 1 << 32;
/// Signals that stop a process instead of ending it.
const STOPPING: std::ops::RangeInclusive<i32> = libc::SIGSTOP..=libc::SIGTTOU;

/// A descriptor of a child that ended with this status (as `wait(2)` gives it) and is gone.
///
/// # Errors
/// What `clone3(2)` or `waitid(2)` says.
pub fn ended_child(status: u32) -> Result<OwnedFd, Errno> {
    let mut pidfd: i32 = -1;
    let args = CloneArgs {
        // Without an exit signal nobody is told of its end.
        flags: libc::CLONE_PIDFD as u64 | CLEAR_SIGHAND,
        pidfd: &raw mut pidfd as u64,
        ..CloneArgs::default()
    };
    // SAFETY: args and pidfd are live; the child only makes system calls with numbers, on its own
    // copy of this memory, and ends.
    let child = unsafe {
        let r = libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>());
        if r == 0 {
            end(status);
        }
        r
    };
    if child < 0 || pidfd < 0 {
        return Err(last_error());
    }
    // SAFETY: pidfd was just made by the kernel for us and is nobody else's.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let options = libc::WEXITED | libc::__WALL;
    loop {
        // SAFETY: a null pointer means that nothing is written.
        let r = unsafe {
            let (kind, id) = (libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t);
            libc::waitid(kind, id, std::ptr::null_mut(), options)
        };
        match r {
            0 => return Ok(pidfd),
            _ if last_error() == Errno::INTR => {}
            _ => return Err(last_error()),
        }
    }
}

/// Ends this process, a child of [`ended_child`].
fn end(status: u32) -> ! {
    let signal = (status & 0x7f) as i32;
    // SAFETY: live locals of the sizes that the calls take, and numbers.
    unsafe {
        if signal != 0 && !STOPPING.contains(&signal) {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            let open = 0u64;
            let no_set = std::ptr::null_mut::<u64>();
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const open,
                no_set,
                8,
            );
            libc::kill(libc::getpid(), signal);
        }
        libc::_exit((status >> 8 & 0xff) as i32)
    }
}

const STEP_UNSHARE: u8 = 1;
const STEP_OFFSETS: u8 = 2;
const STEP_CLONE: u8 = 3;

/// Creates the waiting process. With `time`, in a new time namespace with these offsets.
pub fn waiting_process(pid: u32, time: Option<TimeOffsets>) -> Result<(), SpawnError> {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(SpawnError::Other)?;
    let offsets = time.map(|t| t.render());
    // SAFETY: the child only runs `midwife`, which obeys the rule in the module heading.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let report = midwife(pid, offsets.as_deref().map(str::as_bytes));
        // SAFETY: report is live; _exit does not return.
        unsafe {
            libc::write(writer.as_raw_fd(), report.as_ptr().cast(), report.len());
            libc::_exit(0);
        }
    }
    if child < 0 {
        return Err(SpawnError::Other(last_error()));
    }
    drop(writer);
    let report = read_report(reader);
    let mut status = 0;
    // SAFETY: status is live; the child is ours and about to exit.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 && last_error() == Errno::INTR {}
    let (step, errno) = report.map_err(SpawnError::Other)?;
    match (step, errno) {
        (_, 0) => Ok(()),
        (STEP_UNSHARE | STEP_OFFSETS, e) => {
            Err(SpawnError::TimeNamespace(Errno::from_raw_os_error(e)))
        }
        (_, e) => Err(SpawnError::Clone {
            pid,
            source: Errno::from_raw_os_error(e),
        }),
    }
}

fn read_report(reader: OwnedFd) -> Result<(u8, i32), Errno> {
    let mut raw = [0u8; 5];
    File::from(reader)
        .read_exact(&mut raw)
        .map_err(|_| Errno::CHILD)?;
    Ok((raw[0], i32::from_ne_bytes([raw[1], raw[2], raw[3], raw[4]])))
}

/// Runs in the child: makes the namespace, then the process as a sibling of itself.
fn midwife(pid: u32, offsets: Option<&[u8]>) -> [u8; 5] {
    let report = |step: u8, errno: Errno| {
        let e = errno.raw_os_error().to_ne_bytes();
        [step, e[0], e[1], e[2], e[3]]
    };
    if let Some(text) = offsets {
        // SAFETY: only numbers and pointers to live memory are passed.
        unsafe {
            if libc::unshare(libc::CLONE_NEWTIME) < 0 {
                return report(STEP_UNSHARE, last_error());
            }
            let fd = libc::open(
                c"/proc/self/timens_offsets".as_ptr(),
                libc::O_WRONLY | libc::O_CLOEXEC,
            );
            if fd < 0 || libc::write(fd, text.as_ptr().cast(), text.len()) != text.len() as isize {
                return report(STEP_OFFSETS, last_error());
            }
            libc::close(fd);
        }
    }
    let set_tid = [pid as i32];
    let args = CloneArgs {
        // The exit signal of a sibling is that of its maker: SIGCHLD, from the fork.
        flags: libc::CLONE_PARENT as u64,
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: args and set_tid are live; the new process only waits and dies with its parent.
    unsafe {
        let r = libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>());
        if r == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
        if r < 0 {
            report(STEP_CLONE, last_error())
        } else {
            [STEP_CLONE, 0, 0, 0, 0]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_child_that_ended_tells_how_and_is_gone() {
        for status in [0, 7 << 8, 9, 6] {
            let pidfd = ended_child(status).unwrap();
            let info = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
            let info = std::fs::read_to_string(info).unwrap();
            assert!(info.contains("Pid:\t-1\n"), "{info}");
            let told = crate::descriptors::pidfd_exit_status(pidfd.as_fd());
            // Linux before 6.15 does not tell.
            assert!(told.is_none_or(|told| told == status), "{told:?} {status}");
        }
    }
}
