//! Landlock rules in force (`landlock_restrict_self(2)`), which cannot be read, and so are refused.
//!
//! Nothing lists them, but one of their effects can be asked for: who is restricted may not look at a
//! process that is not (`landlock(7)`, "Ptrace restrictions"). So each thread asks for the list of robust
//! futexes of such a process (`get_robust_list(2)`), which changes nothing, and which every kernel
//! answers. It must be one that it may look at but for such rules: this process, where users, groups
//! and capabilities let it; else a process of its own user and group without any capability, which is
//! made for that and kept ([`outlive_linux::witness`]). In a PID namespace of its own it sees neither:
//! there its init is looked at, or such a process that is made there, and is there as long as the
//! program is tracked.
//!
//! # Rules
//! - `EPERM` means rules in force. Modules that judge by labels (AppArmor, SELinux) say no in the same way:
//!   whom they keep from looking at a process of its own user is refused too, and the refusal says so.
//! - Who cannot be asked, as nobody is there to be looked at, is refused.
//! - A process that was made to be looked at is no part of a program ([`is_witness`]).
//! - One in a PID namespace is waited for all the time: the init of a namespace ends after everybody else
//!   was waited for.

use crate::target::{Status, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::keys::List;
use outlive_linux::pid_namespace::INIT_NAME;
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use outlive_linux::{Errno, witness};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, PidfdGetfdFlags, Signal, dumpable_behavior, pidfd_getfd,
    pidfd_open, pidfd_send_signal,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::fs::MetadataExt;
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;

/// Processes that are kept to be looked at, at most.
const KEPT: usize = 16;

/// A process that is there to be looked at. It ends when it is dropped.
#[derive(Debug)]
struct Witness {
    user: u32,
    group: u32,
    /// Device and inode of its PID namespace, if that is not ours.
    namespace: Option<(u64, u64)>,
    pid: u32,
    pidfd: OwnedFd,
    input: Option<ChildStdin>,
    /// Waits until it has ended.
    waits: Option<JoinHandle<()>>,
}

impl Witness {
    fn make(user: u32, group: u32) -> io::Result<Self> {
        Self::of(witness::start(user, group)?, user, group)
    }

    /// The same in the PID namespace of a process.
    fn make_beside(of: &File, user: u32, group: u32) -> io::Result<Self> {
        let make = || {
            let kind = Some(LinkNameSpaceType::ProcessID);
            move_into_link_name_space(of.as_fd(), kind)?;
            witness::start(user, group)
        };
        // Only processes that this thread makes are born there.
        let made = std::thread::scope(|scope| scope.spawn(make).join());
        let made = made.unwrap_or_else(|_| Err(io::Error::other("a thread has ended")));
        let mut made = Self::of(made?, user, group)?;
        made.namespace = Some(name(of)?);
        Ok(made)
    }

    fn of(mut child: Child, user: u32, group: u32) -> io::Result<Self> {
        let (pid, input) = (child.id(), child.stdin.take());
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        // Its input is closed if there is no thread to wait for it, and then it ends too.
        let wait = move || drop(child.wait());
        let waits = std::thread::Builder::new().stack_size(64 << 10).spawn(wait);
        Ok(Self {
            user,
            group,
            namespace: None,
            pid,
            pidfd: pidfd?,
            input,
            waits: Some(waits?),
        })
    }

    fn is(&self, user: u32, group: u32, namespace: Option<(u64, u64)>) -> bool {
        (self.user, self.group, self.namespace) == (user, group, namespace) && self.is_there()
    }

    fn is_there(&self) -> bool {
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut ended, Some(&Timespec::default())), Ok(0))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        drop(self.input.take());
        // Somebody may have stopped it.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = self.waits.take().map(JoinHandle::join);
    }
}

/// What names a namespace.
fn name(namespace: &File) -> io::Result<(u64, u64)> {
    namespace.metadata().map(|m| (m.st_dev(), m.st_ino()))
}

/// Processes in the PID namespace of a program that are there to be looked at, as long as this is.
#[derive(Debug, Default)]
pub struct Beside(Mutex<Vec<Arc<Witness>>>);

fn kept() -> MutexGuard<'static, Vec<Witness>> {
    static KEPT: Mutex<Vec<Witness>> = Mutex::new(Vec::new());
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those in other PID namespaces.
fn lent() -> MutexGuard<'static, Vec<Weak<Witness>>> {
    static LENT: Mutex<Vec<Weak<Witness>>> = Mutex::new(Vec::new());
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a child of this process is there to be looked at.
pub fn is_witness(pid: u32) -> bool {
    kept().iter().any(|witness| witness.pid == pid)
        || lent()
            .iter()
            .any(|w| w.upgrade().is_some_and(|w| w.pid == pid))
}

/// The process ID of one of this user and group, which is made if there is none yet.
fn witness(user: u32, group: u32) -> io::Result<u32> {
    let mut kept = kept();
    kept.retain(Witness::is_there);
    if let Some(it) = kept.iter().find(|w| w.is(user, group, None)) {
        return Ok(it.pid);
    }
    if kept.len() >= KEPT {
        kept.remove(0);
    }
    let made = Witness::make(user, group)?;
    let pid = made.pid;
    kept.push(made);
    Ok(pid)
}

/// The list of keys that a user may see, opened by a process of that user.
pub fn keys_seen_by(user: u32, group: u32) -> io::Result<List> {
    let pid = witness(user, group)?;
    let kept = kept();
    let it = kept.iter().find(|w| w.pid == pid);
    let it = it.ok_or_else(|| io::Error::other("it has ended"))?;
    let list = pidfd_getfd(&it.pidfd, witness::LIST_OF_KEYS, PidfdGetfdFlags::empty())?;
    List::of(File::from(list))
}

impl Beside {
    /// The process ID, as this process sees it, of one in the PID namespace of a process.
    fn witness(&self, pid: u32, user: u32, group: u32) -> io::Result<u32> {
        let mut own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        own.retain(|w| w.is_there());
        let of = File::open(format!("/proc/{pid}/ns/pid"))?;
        let namespace = Some(name(&of)?);
        if let Some(it) = own.iter().find(|w| w.is(user, group, namespace)) {
            return Ok(it.pid);
        }
        let mut lent = lent();
        lent.retain(|w| w.strong_count() > 0);
        let others = lent.iter().filter_map(Weak::upgrade);
        let other = { others }.find(|w| w.is(user, group, namespace));
        let it = match other {
            Some(other) => other,
            None => {
                let made = Arc::new(Witness::make_beside(&of, user, group)?);
                lent.push(Arc::downgrade(&made));
                made
            }
        };
        let pid = it.pid;
        own.push(it);
        Ok(pid)
    }
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

/// A question to a thread, if there is one to ask; or why nobody can ask it.
pub type Asked = Result<Option<CallId>, Refusal>;

/// Whom the threads of a process are asked about.
pub struct Question<'a> {
    target: &'a Target,
    ours: Option<&'static Status>,
    init: Option<Option<Status>>,
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
        }
    }

    /// Has everything ready for a thread with this status, which is refused where that cannot be.
    pub fn prepare(&mut self, tid: u32, status: &Status) -> Option<Refusal> {
        self.ready(tid, status).err()
    }

    /// Adds the question to a thread with this status.
    pub fn ask(&mut self, batch: &mut Batch, tid: u32, status: &Status) -> Asked {
        let whom = self.ready(tid, status)?;
        let ask = |whom: u32| {
            let args = [Arg::Value(whom.into()), Arg::Out(8), Arg::Out(8)];
            batch.push(libc::SYS_get_robust_list, args)
        };
        Ok(whom.map(ask))
    }

    fn ready(&mut self, tid: u32, status: &Status) -> Result<Option<u32>, Refusal> {
        if !is_there() {
            return Ok(None);
        }
        self.whom(status).map(Some).map_err(|e| {
            let what = format!("nobody can tell whether it has Landlock rules in force: {e}");
            let remedy = "let Outlive begin processes of its user: a program in memory \
                          (`vm.memfd_noexec`), or /bin/cat";
            self.target.refusal(format!("thread {tid}"), what, remedy)
        })
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
        let pid = self.target.beside.witness(self.target.pid, user, group)?;
        Status::read(pid, pid).map(|status| status.inner.pid)
    }
}

/// Refuses a thread that is restricted, or that could not be asked.
pub fn refusal(
    target: &Target,
    tid: u32,
    asked: &Asked,
    answers: &Results,
) -> Result<Option<Refusal>, ProcessError> {
    match asked {
        Ok(Some(id)) => judged(target, tid, answers.value(*id)),
        Ok(None) => Ok(None),
        Err(refusal) => Ok(Some(refusal.clone())),
    }
}

/// What an answer means.
fn judged(
    target: &Target,
    tid: u32,
    answer: Result<u64, Errno>,
) -> Result<Option<Refusal>, ProcessError> {
    match answer {
        Err(Errno::PERM) => {
            let place = format!("thread {tid}");
            let what = "Landlock rules in force";
            let remedy = "this cannot be saved yet; if it has none, another security module keeps it from \
                          looking at processes of its user: allow it that";
            Ok(Some(target.refusal(place, what, remedy)))
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
        let listed = std::fs::exists("/proc/keys").unwrap();
        assert_eq!(keys_seen_by(user, group).is_ok(), listed);
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
    fn who_is_made_beside_a_program_ends_with_the_last_that_was_lent_it() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED 1 test: who is made beside a program: it takes root");
            return;
        }
        let me = std::process::id();
        let (one, other) = (Beside::default(), Beside::default());
        let first = one.witness(me, 65534, 65533).unwrap();
        assert_eq!(one.witness(me, 65534, 65533).unwrap(), first);
        assert_eq!(other.witness(me, 65534, 65533).unwrap(), first);
        assert_ne!(other.witness(me, 65534, 65534).unwrap(), first);
        drop(one);
        assert!(is_witness(first) && !Status::tells_end(first, first));
        // Also one that stands still.
        rustix::process::kill_process(Pid::from_raw(first.cast_signed()).unwrap(), Signal::STOP)
            .unwrap();
        drop(other);
        assert!(!is_witness(first) && Status::tells_end(first, first));
    }

    #[test]
    fn who_cannot_be_asked_is_refused() {
        let target = Target::open(std::process::id()).unwrap();
        // No process can be of this user.
        let nobody = of(u32::MAX, 0);
        let refused = Question::new(&target).prepare(7, &nobody);
        if !is_there() {
            println!("SKIPPED 1 test: who cannot be asked: the kernel has no Landlock");
            return;
        }
        let refused = refused.unwrap();
        assert!(refused.what.contains("Landlock rules"), "{}", refused.what);
        assert_eq!(refused.place, "thread 7");
        let mut batch = Batch::new();
        assert!(Question::new(&target).ask(&mut batch, 7, &nobody).is_err());
        assert!(batch.is_empty());
    }

    #[test]
    fn answers_mean_rules_or_none_or_nothing() {
        let target = Target::open(std::process::id()).unwrap();
        let judged = |answer| judged(&target, target.pid, answer);
        assert!(matches!(judged(Ok(0)), Ok(None)));
        assert!(matches!(judged(Err(Errno::ACCESS)), Ok(None)));
        assert!(matches!(judged(Err(Errno::PERM)), Ok(Some(_))));
        assert!(judged(Err(Errno::SRCH)).is_err());
    }
}
