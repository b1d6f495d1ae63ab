//! Who belongs to a subject: a process and everything that descends from it.

use crate::procfs;
use crate::resources::landlock::is_witness;
use crate::target::Status;
use outlive_linux::kcmp;
use std::time::{Duration, Instant};

/// A member of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kin {
    /// Its process ID.
    pub pid: u32,
    /// Its parent; 0 for the root, and for a process whose parent has ended.
    pub parent: u32,
    /// It has ended and waits for its parent to ask for its exit status.
    pub zombie: bool,
}

/// All members as they are now, the root first and parents before their children. A tree that is not frozen may
/// change meanwhile. All other children of the adopters belong to it too, and what descends from
/// them: processes whose parents have ended. Helpers of this process do not.
pub fn list(root: u32, adopters: &[u32]) -> Vec<Kin> {
    list_by(root, adopters, &mut children)
}

/// The same by somebody who knows how to list the children of a process.
pub fn list_by(root: u32, adopters: &[u32], children: &mut dyn FnMut(u32) -> Vec<u32>) -> Vec<Kin> {
    let mut all = vec![Kin {
        pid: root,
        parent: 0,
        zombie: false,
    }];
    let mut at = 0;
    loop {
        while at < all.len() {
            let Kin { pid, zombie, .. } = all[at];
            at += 1;
            if !zombie {
                all.extend(children(pid).into_iter().map(|child| Kin {
                    pid: child,
                    parent: pid,
                    zombie: has_ended(child),
                }));
            }
        }
        // Last, and again: whoever loses his parent while that one's children are listed is here by then.
        for &adopter in adopters {
            let is_other =
                |p: &u32| *p == root || adopters.contains(p) || is_witness(*p) || is_ours(*p);
            let known: Vec<u32> = all.iter().map(|kin| kin.pid).collect();
            let adopted = children(adopter).into_iter();
            let strays = adopted.filter(|p| !known.contains(p) && !is_other(p) && !has_ended(*p));
            all.extend(strays.map(|pid| Kin {
                pid,
                parent: 0,
                zombie: false,
            }));
        }
        if at == all.len() {
            return all;
        }
    }
}

/// Whether a process is a helper of this one, with which it has all its descriptors in common.
fn is_ours(pid: u32) -> bool {
    kcmp::same(std::process::id(), pid, kcmp::Kind::Files) == Ok(true)
}

/// Whether a process has ended, and perhaps waits for its parent to ask for its exit status. One
/// whose leading thread alone has ended has not.
pub fn has_ended(pid: u32) -> bool {
    let alone = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(true, |t| t.count() < 2);
    Status::tells_end(pid, pid) && alone()
}

/// The child of a process that sees itself with this ID.
pub fn child_with_id(parent: u32, id: u32) -> Option<u32> {
    let is = |pid: &u32| Status::read(*pid, *pid).is_ok_and(|s| s.inner.pid == id);
    children(parent).into_iter().find(is)
}

/// Whether a process has ended, or will have in a moment: its memory goes before it is seen to have
/// ended, and its leading thread may go before the others.
pub fn is_ending(pid: u32) -> bool {
    const MOMENT: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + MOMENT;
    while !has_ended(pid) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(MOMENT / 100);
    }
    true
}

/// All children, those that wait to be reaped as well.
pub fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for task in tasks.flatten() {
        let tid = task.file_name();
        let path = format!("/proc/{pid}/task/{}/children", tid.to_string_lossy());
        let text = procfs::read_short(&path).unwrap_or_default();
        all.extend(procfs::children_in(&String::from_utf8_lossy(&text)));
    }
    all.sort_unstable();
    all
}

/// Whether a process is about to begin a program of its own, and has its parent's memory until then
/// (`vfork(2)`, `posix_spawn(3)`): so long a thread of the parent waits for it where nothing stops
/// it. It is nothing that could be saved, and over soon.
pub fn is_spawning(kin: &Kin) -> bool {
    !kin.zombie && shares_memory(kin) && waits_for_child(kin.parent)
}

/// Whether a process has the memory of its parent.
fn shares_memory(kin: &Kin) -> bool {
    kin.parent != 0 && kcmp::same(kin.pid, kin.parent, kcmp::Kind::Memory).unwrap_or(false)
}

/// Whether some thread stands in a call that makes processes, and cannot be interrupted there.
fn waits_for_child(pid: u32) -> bool {
    const CALLS: [libc::c_long; 3] = [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    tasks.into_iter().flatten().flatten().any(|task| {
        let call = std::fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
        let number = call.split(' ').next().and_then(|n| n.parse().ok());
        number.is_some_and(|n| CALLS.contains(&n))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A parent ends, and is reaped, after the adopter was asked for the first time.
    #[test]
    fn who_is_adopted_meanwhile_is_found() {
        const ROOT: u32 = 0x7fff_fffe;
        const ADOPTER: u32 = 0x7fff_ffff;
        let mut stray = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let id = stray.id();
        let mut reaped = false;
        let found = list_by(ROOT, &[ADOPTER], &mut |pid| match pid {
            ROOT => {
                reaped = true;
                Vec::new()
            }
            ADOPTER if reaped => vec![ROOT, id],
            _ => Vec::new(),
        });
        stray.kill().unwrap();
        stray.wait().unwrap();
        let found: Vec<_> = found.iter().map(|kin| (kin.pid, kin.parent)).collect();
        assert_eq!(found, [(ROOT, 0), (id, 0)]);
    }

    #[test]
    fn children_are_found_and_zombies_told() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let found = |pid| {
            list(std::process::id(), &[])
                .into_iter()
                .find(|k| k.pid == pid)
                .unwrap()
        };
        assert!(!found(child.id()).zombie);
        assert_eq!(found(child.id()).parent, std::process::id());
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !found(child.id()).zombie && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(found(child.id()).zombie);
        child.wait().unwrap();
    }
}
