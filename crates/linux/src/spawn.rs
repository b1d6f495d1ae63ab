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
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
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
    /// The PID namespace could not be made or joined.
    #[error("creating a PID namespace: {what}: {source}")]
    PidNamespace {
        /// What was done.
        what: &'static str,
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
    reap(&pidfd)?;
    Ok(pidfd)
}

/// Makes a child that has all descriptors in common with this process, and of whose end nobody is
/// told; it ends after `life`.
///
/// # Safety
/// `life` obeys the rule in the module heading: system calls only.
pub(crate) unsafe fn fork_with_files(life: impl FnOnce()) -> Result<OwnedFd, Errno> {
    let mut pidfd: i32 = -1;
    let args = CloneArgs {
        flags: (libc::CLONE_PIDFD | libc::CLONE_FILES) as u64 | CLEAR_SIGHAND,
        pidfd: &raw mut pidfd as u64,
        ..CloneArgs::default()
    };
    // SAFETY: args and pidfd are live; the child only runs `life`, which obeys the rule by the
    // contract of this function, and ends.
    let child = unsafe {
        let r = libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>());
        if r == 0 {
            life();
            libc::_exit(0);
        }
        r
    };
    if child < 0 || pidfd < 0 {
        return Err(last_error());
    }
    // SAFETY: pidfd was just made by the kernel for us and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Waits until a child ends, and forgets it.
pub(crate) fn reap(pidfd: &OwnedFd) -> Result<(), Errno> {
    let options = libc::WEXITED | libc::__WALL;
    loop {
        // SAFETY: a null pointer means that nothing is written.
        let r = unsafe {
            let (kind, id) = (libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t);
            libc::waitid(kind, id, std::ptr::null_mut(), options)
        };
        match r {
            0 => return Ok(()),
            _ if last_error() == Errno::INTR => {}
            _ => return Err(last_error()),
        }
    }
}

/// In a midwife: makes a sibling of itself with this process ID, which ends with this status once
/// nobody can write to the pipe any more.
pub(crate) fn ending_sibling(pid: u32, status: u32, pipe: RawFd) -> Report {
    match clone_with(libc::CLONE_PARENT, 0, Some(pid)) {
        Err(e) => Report::failed(Step::Clone, e),
        Ok(0) => {
            let mut byte = 0u8;
            // SAFETY: byte is live and as long as the call is told.
            while unsafe { libc::read(pipe, (&raw mut byte).cast(), 1) } > 0 {}
            end(status)
        }
        Ok(made) => Report {
            step: Step::Clone,
            errno: 0,
            pid: made,
        },
    }
}

/// Ends this process with this status.
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
            // What its maker ignored is ignored here too.
            libc::signal(signal, libc::SIG_DFL);
            libc::kill(libc::getpid(), signal);
        }
        libc::_exit((status >> 8 & 0xff) as i32)
    }
}

/// How far a midwife came, and what came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    step: Step,
    errno: i32,
    /// The process that was made, as the midwife sees it.
    pid: u32,
}

/// What a midwife does, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    /// Making a time namespace.
    Unshare,
    /// Setting the offsets of its clocks.
    Offsets,
    /// Making a PID namespace.
    Contain,
    /// Joining namespaces.
    Join,
    /// Making the process.
    Clone,
}

const STEPS: [Step; 5] = [
    Step::Unshare,
    Step::Offsets,
    Step::Contain,
    Step::Join,
    Step::Clone,
];

impl Report {
    const LENGTH: usize = 9;

    pub(crate) fn failed(step: Step, errno: Errno) -> Self {
        let errno = errno.raw_os_error();
        Self {
            step,
            errno,
            pid: 0,
        }
    }

    fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut raw = [0; Self::LENGTH];
        raw[0] = self.step as u8;
        raw[1..5].copy_from_slice(&self.errno.to_ne_bytes());
        raw[5..].copy_from_slice(&self.pid.to_ne_bytes());
        raw
    }

    fn from_bytes(raw: [u8; Self::LENGTH]) -> Option<Self> {
        let [step, e0, e1, e2, e3, p0, p1, p2, p3] = raw;
        Some(Self {
            step: *STEPS.get(usize::from(step))?,
            errno: i32::from_ne_bytes([e0, e1, e2, e3]),
            pid: u32::from_ne_bytes([p0, p1, p2, p3]),
        })
    }

    /// The process that was made for `wanted`.
    pub(crate) fn made(self, wanted: u32) -> Result<u32, SpawnError> {
        if self.errno == 0 {
            return Ok(self.pid);
        }
        let source = Errno::from_raw_os_error(self.errno);
        match self.step {
            Step::Unshare | Step::Offsets => Err(SpawnError::TimeNamespace(source)),
            Step::Contain => Err(SpawnError::PidNamespace {
                what: "a new one",
                source,
            }),
            Step::Join => Err(SpawnError::PidNamespace {
                what: "joining it",
                source,
            }),
            Step::Clone => Err(SpawnError::Clone {
                pid: wanted,
                source,
            }),
        }
    }
}

/// Runs `work` in a child of this process that ends then: a midwife, which changes its own
/// namespaces and makes a process that becomes our child.
///
/// # Safety
/// `work` obeys the rule in the module heading: system calls only.
pub(crate) unsafe fn by_midwife(work: impl FnOnce() -> Report) -> Result<Report, SpawnError> {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(SpawnError::Other)?;
    // SAFETY: the child only runs `work`, which obeys the rule by the contract of this function.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let report = work().to_bytes();
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
    report.map_err(SpawnError::Other)
}

fn read_report(reader: OwnedFd) -> Result<Report, Errno> {
    let mut raw = [0u8; Report::LENGTH];
    File::from(reader)
        .read_exact(&mut raw)
        .map_err(|_| Errno::CHILD)?;
    Report::from_bytes(raw).ok_or(Errno::PROTO)
}

/// Creates the waiting process. With `time`, in a new time namespace with these offsets.
pub fn waiting_process(pid: u32, time: Option<TimeOffsets>) -> Result<(), SpawnError> {
    let offsets = time.map(|t| t.render());
    let offsets = offsets.as_deref().map(str::as_bytes);
    let maker = itself()?;
    // SAFETY: only system calls are made, on memory that is there already.
    let report = unsafe {
        by_midwife(|| match offsets.map(enter_time) {
            Some(Err(report)) => report,
            _ => waiting_sibling(pid, maker.as_raw_fd()),
        })
    };
    report?.made(pid).map(drop)
}

/// In a midwife: makes the time namespace of its children.
pub(crate) fn enter_time(offsets: &[u8]) -> Result<(), Report> {
    // SAFETY: only numbers and pointers to live memory are passed.
    unsafe {
        if libc::unshare(libc::CLONE_NEWTIME) < 0 {
            return Err(Report::failed(Step::Unshare, last_error()));
        }
        let fd = libc::open(
            c"/proc/self/timens_offsets".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if fd < 0
            || libc::write(fd, offsets.as_ptr().cast(), offsets.len()) != offsets.len() as isize
        {
            return Err(Report::failed(Step::Offsets, last_error()));
        }
        libc::close(fd);
    }
    Ok(())
}

/// A descriptor of this process.
pub(crate) fn itself() -> Result<OwnedFd, SpawnError> {
    let flags = rustix::process::PidfdFlags::empty();
    rustix::process::pidfd_open(rustix::process::getpid(), flags).map_err(SpawnError::Other)
}

/// In a midwife: makes a sibling of itself that waits, with this process ID in its namespace, and
/// ends with their common parent, of which this is a descriptor.
pub(crate) fn waiting_sibling(pid: u32, parent: RawFd) -> Report {
    // The exit signal of a sibling is that of its maker: SIGCHLD, from the fork.
    match clone_with(libc::CLONE_PARENT, 0, Some(pid)) {
        Err(e) => Report::failed(Step::Clone, e),
        Ok(0) => {
            let mut ended = libc::pollfd {
                fd: parent,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: numbers, and one live structure.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // It may have ended before it was asked to take this one with it.
                if libc::poll(&raw mut ended, 1, 0) != 0 {
                    libc::_exit(1);
                }
            }
            wait_for_ever()
        }
        Ok(made) => Report {
            step: Step::Clone,
            errno: 0,
            pid: made,
        },
    }
}

/// In a midwife: makes a process that waits, with this process ID in the namespace that was joined.
/// Its parent, which has the process ID `by`, ends at once, so that it becomes a child of the
/// namespace's init, and ends with that.
pub(crate) fn waiting_orphan(pid: u32, by: u32) -> Report {
    let parent = match clone_with(0, libc::SIGCHLD, Some(by)) {
        Err(e) => return Report::failed(Step::Clone, e),
        Ok(0) => {
            let error = match clone_with(0, libc::SIGCHLD, Some(pid)) {
                Ok(0) => wait_for_ever(),
                Ok(_) => 0,
                Err(e) => e.raw_os_error(),
            };
            // SAFETY: only a number is passed.
            unsafe { libc::_exit(error) }
        }
        Ok(parent) => parent.cast_signed(),
    };
    let mut status = 0;
    // SAFETY: status is live; the process is a child of this one and about to exit.
    while unsafe { libc::waitpid(parent, &raw mut status, 0) } < 0 && last_error() == Errno::INTR {}
    Report {
        step: Step::Clone,
        // Error numbers are small enough for an exit status.
        errno: status >> 8 & 0xff,
        pid,
    }
}

/// In a new process: waits until it is changed from outside.
fn wait_for_ever() -> ! {
    loop {
        // SAFETY: nothing is passed.
        unsafe { libc::pause() };
    }
}

/// Makes a process in a copy of this one's memory; `Ok(0)` in the new one.
fn clone_with(
    flags: libc::c_int,
    exit_signal: libc::c_int,
    pid: Option<u32>,
) -> Result<u32, Errno> {
    let set_tid = [pid.unwrap_or(0) as i32];
    let args = CloneArgs {
        flags: flags as u64,
        exit_signal: exit_signal as u64,
        set_tid: pid.map_or(0, |_| set_tid.as_ptr() as u64),
        set_tid_size: u64::from(pid.is_some()),
        ..CloneArgs::default()
    };
    // SAFETY: args and set_tid are live; without CLONE_VM the new process has its own copy.
    let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    u32::try_from(made).map_err(|_| last_error())
}

/// In a midwife: makes the PID namespace of its children, and joins a mount namespace.
pub(crate) fn contain(mounts: RawFd) -> Result<(), Report> {
    // SAFETY: only numbers are passed.
    unsafe {
        if libc::unshare(libc::CLONE_NEWPID) < 0 {
            return Err(Report::failed(Step::Contain, last_error()));
        }
        if libc::setns(mounts, libc::CLONE_NEWNS) < 0 {
            return Err(Report::failed(Step::Join, last_error()));
        }
    }
    Ok(())
}

/// In a midwife: joins the PID, mount and time namespaces of a process.
pub(crate) fn join(pidfd: RawFd) -> Result<(), Report> {
    let all = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWTIME;
    // SAFETY: only numbers are passed.
    if unsafe { libc::setns(pidfd, all) } < 0 {
        return Err(Report::failed(Step::Join, last_error()));
    }
    Ok(())
}

/// In a midwife: a sibling of itself that runs this, which must obey the module's rule.
pub(crate) fn running_sibling(run: impl FnOnce()) -> Report {
    match clone_with(libc::CLONE_PARENT, 0, None) {
        Err(e) => Report::failed(Step::Clone, e),
        Ok(0) => {
            run();
            // SAFETY: only a number is passed.
            unsafe { libc::_exit(0) }
        }
        Ok(made) => Report {
            step: Step::Clone,
            errno: 0,
            pid: made,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_child_that_ended_tells_how_and_is_gone() {
        for status in [0, 7 << 8, 9, 6, 13] {
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
