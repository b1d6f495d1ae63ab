//! Landlock rules in force (`landlock_restrict_self(2)`), which cannot be read, and so are refused.
//!
//! Nothing lists them, but one of their effects can be asked for: who is restricted may not look at a
//! process that is not (`landlock(7)`, "Ptrace restrictions"). So the program compares this process
//! with itself (`kcmp(2)`), which changes nothing. Where all else allows that, and the answer is
//! `EPERM`, it is restricted.
//!
//! # Limits
//! Else can forbid it too: another user, fewer capabilities, another label of a security module. Of
//! such a program nobody knows, and of one in a PID namespace in which this process has no number.

use crate::target::{Status, Target};
use outlive_linux::Errno;
use outlive_linux::remote::{Arg, Batch, CallId};
use rustix::process::{DumpableBehavior, dumpable_behavior};

/// Compares tables of descriptors.
const KCMP_FILES: u64 = 2;

/// Adds the question.
pub fn ask(batch: &mut Batch) -> CallId {
    let me = u64::from(std::process::id());
    let args = [me, me, KCMP_FILES, 0, 0].map(Arg::Value);
    batch.push(libc::SYS_kcmp, args)
}

/// Whether the answer says that the process is restricted.
pub fn is_in_force(target: &Target, status: &Status, answer: Result<u64, Errno>) -> bool {
    let me = std::process::id();
    if answer != Err(Errno::PERM) || target.id != target.pid {
        return false;
    }
    let label = |pid: u32| std::fs::read(format!("/proc/{pid}/attr/current")).unwrap_or_default();
    let can_be_looked_at = dumpable_behavior() == Ok(DumpableBehavior::Dumpable);
    let ours = Status::read(me, me);
    can_be_looked_at
        && label(me) == label(target.pid)
        && ours.is_ok_and(|ours| may_look(status, &ours))
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

    #[test]
    fn users_and_capabilities_decide_who_may_look() {
        let of = |uid, caps| Status {
            uid: [uid; 4],
            caps: [0, caps, 0, 0, 0],
            ..Status::default()
        };
        assert!(may_look(&of(7, 0), &of(7, 0)));
        assert!(may_look(&of(0, 3), &of(0, 1)));
        assert!(!may_look(&of(0, 1), &of(0, 3)), "it has fewer capabilities");
        assert!(!may_look(&of(7, 0), &of(8, 0)), "it is another user");
        let mut setuid = of(7, 0);
        setuid.uid[2] = 0;
        assert!(!may_look(&of(7, 0), &setuid));
    }

    #[test]
    fn who_is_free_may_look_at_this_process() {
        let me = std::process::id();
        let (target, status) = (Target::open(me).unwrap(), Status::read(me, me).unwrap());
        assert!(!is_in_force(&target, &status, Ok(0)));
        assert!(is_in_force(&target, &status, Err(Errno::PERM)));
    }
}
