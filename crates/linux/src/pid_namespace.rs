//! A PID namespace for a restored program, and the small process that is PID 1 in it.
//!
//! That process (*init*, [`INIT_NAME`]) is a fork of the caller without any of its descriptors. It
//! mounts `/proc` for the namespace, and then only reaps processes whose parents have ended, which
//! the kernel gives to it. It ends by itself once the process that it was told of has ended and
//! nothing else is left; should it end before, the kernel ends everything in the namespace.
//!
//! # Rules
//! - Whoever makes the namespace is the parent of init, and of the processes that
//!   [`PidNamespace::child`] makes: their exit statuses, signals and terminals are as without a
//!   namespace. Inside, the parent of such a process has the number 0.
//! - Until [`PidNamespace::keep`], init and with it the namespace ends when the caller does; from
//!   then on it needs nobody.
//! - The only mount is that of `/proc`, in a mount namespace which the caller gives.
//!
//! # Safety
//! Between `fork` and `_exit`, in init too, only system calls are made, on memory prepared before
//! the fork or on the stack.
#![allow(unsafe_code)]

use crate::clock::TimeOffsets;
use crate::spawn::{
    Report, SpawnError, by_midwife, contain, ending_sibling, enter_time, itself, join,
    reap as reap_child, running_sibling, waiting_orphan, waiting_sibling,
};
use crate::{Errno, last_error};
use rustix::fd::{AsRawFd, OwnedFd, RawFd};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use std::time::{Duration, Instant};

/// The name of init, as `/proc/PID/comm` tells it.
pub const INIT_NAME: &str = "outlive-init";

/// How long init may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of what init says, once `/proc` is there and once it is told a process ID: an error number
/// or 0.
const SAYING: usize = 4;

/// A PID namespace that is being filled. Dropping it ends all that is in it.
#[derive(Debug)]
pub struct PidNamespace {
    init: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
    kept: bool,
}

impl PidNamespace {
    /// Makes the namespace, with these mounts, together with a time namespace with these offsets.
    ///
    /// # Errors
    /// Which of it was not permitted, or failed.
    pub fn create(time: TimeOffsets, mounts: &OwnedFd) -> Result<Self, SpawnError> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(SpawnError::Other)?;
        let offsets = time.render();
        let (socket, mounts) = (theirs.as_raw_fd(), mounts.as_raw_fd());
        // SAFETY: only system calls are made, on memory that is there already.
        let report = unsafe {
            by_midwife(
                || match enter_time(offsets.as_bytes()).and_then(|()| contain(mounts)) {
                    Err(report) => report,
                    Ok(()) => running_sibling(|| init(socket)),
                },
            )
        };
        let init = report?.made(1)?;
        drop(theirs);
        let init = i32::try_from(init).ok().and_then(Pid::from_raw);
        let init = init.ok_or(SpawnError::Other(Errno::CHILD))?;
        let pidfd = rustix::process::pidfd_open(init, PidfdFlags::empty());
        let namespace = Self {
            init,
            pidfd: pidfd.map_err(SpawnError::Other)?,
            socket: ours,
            kept: false,
        };
        match namespace.hear().map_err(SpawnError::Other)? {
            0 => Ok(namespace),
            e => Err(SpawnError::PidNamespace {
                what: "mounting its /proc",
                source: Errno::from_raw_os_error(e),
            }),
        }
    }

    /// Its PID 1, as this process sees it.
    #[must_use]
    pub fn init(&self) -> u32 {
        self.init.as_raw_nonzero().get().cast_unsigned()
    }

    /// Makes a process that waits, with this process ID in the namespace, as a child of the
    /// caller; returns the process ID that the caller sees.
    ///
    /// # Errors
    /// [`SpawnError::Clone`] with [`Errno::EXIST`] where the number is taken in the namespace.
    pub fn child(&self, pid: u32) -> Result<u32, SpawnError> {
        let maker = itself()?;
        self.by_midwife_inside(|| waiting_sibling(pid, maker.as_raw_fd()))?
            .made(pid)
    }

    /// Makes a process that waits, with this process ID in the namespace, as a child of init. The
    /// process ID `by` must be free there too: one that makes it has that for a moment.
    ///
    /// # Errors
    /// As [`PidNamespace::child`].
    pub fn child_of_init(&self, pid: u32, by: u32) -> Result<(), SpawnError> {
        self.by_midwife_inside(|| waiting_orphan(pid, by))?
            .made(pid)
            .map(drop)
    }

    /// A descriptor of a process of the namespace that ended with this status (as `wait(2)` gives
    /// it) and is gone. It had the process ID `by`, which must be free there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ended_child(&self, by: u32, status: u32) -> Result<OwnedFd, SpawnError> {
        let (reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(SpawnError::Other)?;
        let (read, write) = (reader.as_raw_fd(), writer.as_raw_fd());
        let made = self.by_midwife_inside(|| {
            // SAFETY: only a number is passed; this copy of the process uses it no more.
            unsafe { libc::close(write) };
            ending_sibling(by, status, read)
        })?;
        let pid = Pid::from_raw(made.made(by)?.cast_signed());
        let pid = pid.ok_or(SpawnError::Other(Errno::CHILD))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        drop(writer);
        let pidfd = pidfd.map_err(SpawnError::Other)?;
        reap_child(&pidfd).map_err(SpawnError::Other)?;
        Ok(pidfd)
    }

    /// `make` obeys the module's rule.
    fn by_midwife_inside(&self, make: impl FnOnce() -> Report) -> Result<Report, SpawnError> {
        let (init, socket) = (self.pidfd.as_raw_fd(), self.socket.as_raw_fd());
        // SAFETY: only system calls are made, on memory that is there already.
        unsafe {
            by_midwife(|| {
                // Nobody but the caller keeps init waiting.
                libc::close(socket);
                match join(init) {
                    Err(report) => report,
                    Ok(()) => make(),
                }
            })
        }
    }

    /// The namespace is complete: from now on it lives as long as the process with this ID in it,
    /// and whatever else is left in it then.
    ///
    /// # Errors
    /// Where that process is gone already.
    pub fn keep(&mut self, root: u32) -> Result<(), SpawnError> {
        let failed = |source| SpawnError::PidNamespace {
            what: "telling its init what it is for",
            source,
        };
        rustix::net::send(&self.socket, &root.to_ne_bytes(), SendFlags::NOSIGNAL)
            .map_err(failed)?;
        match self.hear().map_err(failed)? {
            0 => self.kept = true,
            e => return Err(failed(Errno::from_raw_os_error(e))),
        }
        Ok(())
    }

    /// What init says.
    fn hear(&self) -> Result<i32, Errno> {
        let mut raw = [0u8; SAYING];
        loop {
            match rustix::net::recv(&self.socket, &mut raw[..], RecvFlags::empty()) {
                Ok((SAYING, _)) => return Ok(i32::from_ne_bytes(raw)),
                Ok(_) => return Err(Errno::CHILD),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Drop for PidNamespace {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let began = Instant::now();
        // It is gone once everything in the namespace is.
        while let Ok(None) = rustix::process::waitpid(Some(self.init), WaitOptions::NOHANG) {
            if began.elapsed() > PATIENCE {
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// The whole life of PID 1.
fn init(socket: RawFd) {
    prepare(socket);
    let errno = mount_proc().map_or_else(Errno::raw_os_error, |()| 0);
    if !say(socket, errno) || errno != 0 {
        return;
    }
    let Some(root) = told(socket) else {
        return;
    };
    match open_process(root) {
        Err(e) => drop(say(socket, e.raw_os_error())),
        Ok(root) => {
            if say(socket, 0) {
                // SAFETY: only a number is passed; nothing uses the descriptor from here on.
                unsafe { libc::close(socket) };
                reap(root);
            }
        }
    }
}

/// Nothing of the caller stays: no descriptor, no directory, no session, no name.
fn prepare(socket: RawFd) {
    // SAFETY: only numbers and pointers to live memory are passed.
    unsafe {
        let fd = socket.cast_unsigned();
        if fd > 0 {
            libc::syscall(libc::SYS_close_range, 0, fd - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, fd + 1, u32::MAX, 0);
        libc::prctl(libc::PR_SET_NAME, c"outlive-init".as_ptr());
        libc::setsid();
        libc::chdir(c"/".as_ptr());
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let child = child_signal();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const child, std::ptr::null_mut());
    }
}

fn child_signal() -> libc::sigset_t {
    // SAFETY: an all-zero set is a valid one, which the calls then fill in.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        set
    }
}

fn mount_proc() -> Result<(), Errno> {
    let (proc, flags) = (
        c"proc".as_ptr(),
        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
    );
    // SAFETY: the strings that are passed live for ever.
    let mounted = unsafe { libc::mount(proc, c"/proc".as_ptr(), proc, flags, std::ptr::null()) };
    if mounted < 0 {
        Err(last_error())
    } else {
        Ok(())
    }
}

fn say(socket: RawFd, errno: i32) -> bool {
    let raw = errno.to_ne_bytes();
    // SAFETY: raw is live and as long as the call is told.
    let sent = unsafe { libc::send(socket, raw.as_ptr().cast(), SAYING, libc::MSG_NOSIGNAL) };
    sent == SAYING as isize
}

/// The process that it is for; `None` once the caller is gone.
fn told(socket: RawFd) -> Option<u32> {
    let mut raw = [0u8; 4];
    loop {
        // SAFETY: raw is live and as long as the call is told.
        let got = unsafe { libc::recv(socket, raw.as_mut_ptr().cast(), raw.len(), 0) };
        if got == raw.len() as isize {
            return Some(u32::from_ne_bytes(raw));
        }
        if got >= 0 || last_error() != Errno::INTR {
            return None;
        }
    }
}

fn open_process(pid: u32) -> Result<RawFd, Errno> {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    RawFd::try_from(fd)
        .ok()
        .filter(|&fd| fd >= 0)
        .ok_or_else(last_error)
}

/// Reaps whatever ends, until the root process has ended and nothing is left.
fn reap(root: RawFd) {
    let child = child_signal();
    // SAFETY: child is live.
    let signals = unsafe { libc::signalfd(-1, &raw const child, libc::SFD_NONBLOCK) };
    let watched = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut set = [watched(root), watched(signals)];
    loop {
        // SAFETY: set is live and as long as the call is told.
        let ready = unsafe { libc::poll(set.as_mut_ptr(), set.len() as libc::nfds_t, -1) };
        if ready < 0 && last_error() != Errno::INTR {
            return;
        }
        if ready > 0 && set[0].revents != 0 {
            // A descriptor below 0 is not looked at any more.
            set[0].fd = -1;
        }
        let mut info = [0u8; 128];
        // SAFETY: info is live and as long as the call is told.
        while unsafe { libc::read(signals, info.as_mut_ptr().cast(), info.len()) } > 0 {}
        // SAFETY: no status is asked for.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
        // SAFETY: as above; there are children left unless this says so.
        let more = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        if set[0].fd < 0 && more < 0 && last_error() == Errno::CHILD {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::Away;
    use std::os::fd::AsFd;

    fn status(pid: u32) -> String {
        std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
    }

    fn ids(pid: u32) -> Vec<u32> {
        let text = status(pid);
        let line = text.lines().find_map(|l| l.strip_prefix("NSpid:"));
        let words = line.unwrap().split_whitespace();
        words.map(|w| w.parse().unwrap()).collect()
    }

    #[test]
    fn processes_have_the_asked_numbers_inside_and_end_with_the_namespace() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED 1 test: namespaces need root");
            return;
        }
        let mounts = Away::begin().unwrap().end().unwrap();
        let namespace = PidNamespace::create(TimeOffsets::default(), &mounts).unwrap();
        let init = namespace.init();
        assert_eq!(ids(init), [init, 1]);
        assert!(status(init).starts_with("Name:\toutlive-init\n"));
        let open = std::fs::read_dir(format!("/proc/{init}/fd")).unwrap();
        assert_eq!(
            open.count(),
            1,
            "the socket, until it is told what it is for"
        );
        let child = namespace.child(4242).unwrap();
        assert_eq!(ids(child), [child, 4242]);
        // Also one that a new process would get by itself.
        namespace.child_of_init(2, 4243).unwrap();
        let children = format!("/proc/{init}/task/{init}/children");
        let other: u32 = std::fs::read_to_string(children)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        assert_eq!(ids(other), [other, 2]);
        for taken in [
            namespace.child(2).map(drop),
            namespace.child_of_init(4242, 4243),
        ] {
            let taken = taken.unwrap_err();
            assert!(
                matches!(
                    taken,
                    SpawnError::Clone {
                        source: Errno::EXIST,
                        ..
                    }
                ),
                "{taken}"
            );
        }
        for status in [7 << 8, 9] {
            let gone = namespace.ended_child(4244, status).unwrap();
            let told = crate::descriptors::pidfd_exit_status(gone.as_fd());
            // Linux before 6.15 does not tell.
            assert!(told.is_none_or(|told| told == status), "{told:?} {status}");
        }
        let id = |pid: u32| Pid::from_raw(pid.cast_signed());
        rustix::process::kill_process(id(child).unwrap(), Signal::KILL).unwrap();
        rustix::process::waitpid(id(child), WaitOptions::empty()).unwrap();
        drop(namespace);
        for pid in [init, other] {
            assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
    }
}
