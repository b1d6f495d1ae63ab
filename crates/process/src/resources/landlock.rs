//! Landlock rules in force (`landlock_restrict_self(2)`), which cannot be read, and so are refused.
//!
//! Nothing lists them, but one of their effects can be asked for: who is restricted may not look at a
//! process that is not (`landlock(7)`, "Ptrace restrictions"). So each thread compares such a process
//! with itself (`kcmp(2)`), which changes nothing. It must be one that it may look at but for such
//! rules: this process, where users, groups and capabilities let it; else a process of its own user
//! and group without any capability, which is made for that and kept ([`outlive_linux::witness`]).
//! In a PID namespace of its own it sees neither: there its init is looked at, or such a process that
//! is made there for the moment.
//!
//! # Rules
//! - The kernel asks Landlock before modules that judge by labels (AppArmor, SELinux), and these say no
//!   in another way (`EACCES`). So `EPERM` means rules in force.
//! - A process that was made to be looked at is no part of a program ([`is_witness`]).
//!
//! # Limits
//! Where the kernel was told to ask another module before Landlock (`lsm=`), and that says no, or has no
//! `kcmp(2)`, nobody knows.

use crate::target::{Status, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::pid_namespace::INIT_NAME;
use outlive_linux::remote::{Arg, Batch, CallId};
use outlive_linux::{Errno, witness};
use rustix::process::{DumpableBehavior, dumpable_behavior};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::process::Child;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Compares tables of descriptors.
const KCMP_FILES: u64 = 2;
/// Processes that are kept to be looked at, at most.
const KEPT: usize = 16;

/// A process that is there to be looked at. It ends when it is dropped.
struct Witness {
    user: u32,
    group: u32,
    child: Child,
}

impl Witness {
    fn make(user: u32, group: u32) -> io::Result<Self> {
        let child = witness::start(user, group)?;
        Ok(Self { user, group, child })
    }

    /// The same in the PID namespace of a process.
    fn make_beside(pid: u32, user: u32, group: u32) -> io::Result<Self> {
        let namespace = File::open(format!("/proc/{pid}/ns/pid"))?;
        let make = || {
            let kind = Some(LinkNameSpaceType::ProcessID);
            move_into_link_name_space(namespace.as_fd(), kind)?;
            Self::make(user, group)
        };
        // Only processes that this thread makes are born there.
        let made = std::thread::scope(|scope| scope.spawn(make).join());
        made.unwrap_or_else(|_| Err(io::Error::other("a thread has ended")))
    }

    fn is_there(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn kept() -> MutexGuard<'static, Vec<Witness>> {
    static KEPT: Mutex<Vec<Witness>> = Mutex::new(Vec::new());
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a child of this process is there to be looked at.
pub fn is_witness(pid: u32) -> bool {
    kept().iter().any(|witness| witness.child.id() == pid)
}

/// The process ID of one of this user and group, which is made if there is none yet.
fn witness(user: u32, group: u32) -> io::Result<u32> {
    let mut kept = kept();
    let is_it = |w: &Witness| (w.user, w.group) == (user, group);
    if let Some(at) = kept.iter().position(is_it) {
        if kept[at].is_there() {
            return Ok(kept[at].child.id());
        }
        kept.remove(at);
    }
    if kept.len() >= KEPT {
        kept.remove(0);
    }
    let made = Witness::make(user, group)?;
    let pid = made.child.id();
    kept.push(made);
    Ok(pid)
}

/// The init of the PID namespace of a process, where a restore made both.
fn init_of(pid: u32) -> Option<Status> {
    let init = Status::of_init(pid).ok();
    init.filter(|s| s.inner.pid == 1 && s.name == INIT_NAME)
}

/// Whether the kernel has Landlock.
fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(witness::has_landlock)
}

/// Whom the threads of a process are asked about. What was made for that lives as long as this.
pub struct Question<'a> {
    target: &'a Target,
    ours: Option<&'static Status>,
    init: Option<Option<Status>>,
    beside: Vec<Witness>,
}

impl<'a> Question<'a> {
    /// About nobody yet.
    pub fn new(target: &'a Target) -> Self {
        static OURS: OnceLock<Option<Status>> = OnceLock::new();
        let me = std::process::id();
        let ours = OURS.get_or_init(|| Status::read(me, me).ok()).as_ref();
        let ours = ours.filter(|_| dumpable_behavior() == Ok(DumpableBehavior::Dumpable));
        Self {
            target,
            ours,
            init: None,
            beside: Vec::new(),
        }
    }

    /// Has everything ready for a thread with this status.
    pub fn prepare(&mut self, status: &Status) {
        if is_there() && self.target.id == self.target.pid {
            let _ = self.whom(status);
        }
    }

    /// Adds the question to a thread with this status. `None` where there is nothing to ask.
    pub fn ask(&mut self, batch: &mut Batch, status: &Status) -> Option<CallId> {
        if !is_there() {
            return None;
        }
        let whom = self.whom(status);
        if let Err(error) = &whom {
            tracing::warn!(%error, "nobody is there to ask about Landlock rules");
        }
        let whom = u64::from(whom.ok()?);
        let args = [whom, whom, KCMP_FILES, 0, 0].map(Arg::Value);
        Some(batch.push(libc::SYS_kcmp, args))
    }

    /// Whom the thread may look at unless it is restricted, by the ID that it sees.
    fn whom(&mut self, status: &Status) -> io::Result<u32> {
        let (user, group) = (status.uid[0], status.gid[0]);
        if self.target.id == self.target.pid {
            return match self.ours {
                Some(ours) if may_look(status, ours) => Ok(std::process::id()),
                _ => witness(user, group),
            };
        }
        let init = self.init.get_or_insert_with(|| init_of(self.target.pid));
        if init.as_ref().is_some_and(|init| may_look(status, init)) {
            return Ok(1);
        }
        let is_it = |w: &&Witness| (w.user, w.group) == (user, group);
        if self.beside.iter().find(is_it).is_none() {
            let made = Witness::make_beside(self.target.pid, user, group)?;
            self.beside.push(made);
        }
        let pid = self.beside.iter().find(is_it).map_or(0, |w| w.child.id());
        Status::read(pid, pid).map(|status| status.inner.pid)
    }
}

/// Refuses a thread whose answer says that it is restricted.
pub fn refusal(
    target: &Target,
    tid: u32,
    answer: Result<u64, Errno>,
) -> Result<Option<Refusal>, ProcessError> {
    match answer {
        Err(Errno::PERM) => {
            let place = format!("thread {tid}");
            let what = "Landlock rules in force";
            Ok(Some(target.refusal(
                place,
                what,
                "this cannot be saved yet",
            )))
        }
        // Who was asked about is gone.
        Err(Errno::SRCH) => {
            let gone = std::io::Error::other("whom it was asked about has ended");
            Err(ProcessError::Kernel {
                pid: target.pid,
                what: format!("asking thread {tid} for Landlock rules"),
                source: gone,
            })
        }
        _ => Ok(None),
    }
}

/// Whether users, groups and capabilities let one process look at another one (`ptrace(2)`).
fn may_look(who: &Status, at: &Status) -> bool {
    let [_, permitted, ..] = who.caps;
    at.uid[..3].iter().all(|uid| *uid == who.uid[0])
        && at.gid[..3].iter().all(|gid| *gid == who.gid[0])
        && at.caps[1] & !permitted == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(uid: u32, caps: u64) -> Status {
        Status {
            uid: [uid; 4],
            caps: [0, caps, 0, 0, 0],
            ..Status::default()
        }
    }

    #[test]
    fn users_and_capabilities_decide_who_may_look() {
        assert!(may_look(&of(7, 0), &of(7, 0)));
        assert!(may_look(&of(0, 3), &of(0, 1)));
        assert!(!may_look(&of(0, 1), &of(0, 3)), "it has fewer capabilities");
        assert!(!may_look(&of(7, 0), &of(8, 0)), "it is another user");
        let mut setuid = of(7, 0);
        setuid.uid[2] = 0;
        assert!(!may_look(&of(7, 0), &setuid));
    }

    #[test]
    fn who_is_made_to_be_looked_at_is_kept_and_made_again_once_gone() {
        let me = std::process::id();
        let ours = Status::read(me, me).unwrap();
        let (user, group) = (ours.uid[0], ours.gid[0]);
        let first = witness(user, group).unwrap();
        assert_eq!(witness(user, group).unwrap(), first);
        assert!(is_witness(first) && !is_witness(me));
        assert!(may_look(
            &of(user, 0),
            &Status {
                gid: [0; 4],
                ..Status::read(first, first).unwrap()
            }
        ));
        let ended = rustix::process::Pid::from_raw(first.cast_signed()).unwrap();
        rustix::process::kill_process(ended, rustix::process::Signal::KILL).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !Status::tells_end(first, first) && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        let second = witness(user, group).unwrap();
        assert!(is_witness(second) && !Status::tells_end(second, second));
    }

    #[test]
    fn answers_mean_rules_or_none_or_nothing() {
        let target = Target::open(std::process::id()).unwrap();
        let judged = |answer| refusal(&target, target.pid, answer);
        assert!(matches!(judged(Ok(0)), Ok(None)));
        assert!(matches!(judged(Err(Errno::ACCESS)), Ok(None)));
        assert!(matches!(judged(Err(Errno::PERM)), Ok(Some(_))));
        assert!(judged(Err(Errno::SRCH)).is_err());
    }
}
