//! Namespaces in which a program may live.
//!
//! # Rules
//! - All of a program lives in the same namespaces, and these are ours, but for one case: a PID
//!   namespace below ours, as `restore --new-pid-ns` makes it, with a mount namespace for the sake
//!   of its `/proc`.
//! - Such a mount namespace must not show other files than ours: what is saved of files are their
//!   paths.
//! - PID 1 of a namespace is not saved: a restored program is not init. Where the init is one that
//!   a restore made, the namespace was made for the program, and all children of that init belong
//!   to it.

use crate::family;
use crate::target::{Status, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::pid_namespace::INIT_NAME;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

/// Namespaces that must be those of the restorer.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// What names a namespace of a process.
fn id(who: &str, name: &str) -> std::io::Result<u64> {
    std::fs::metadata(format!("/proc/{who}/ns/{name}")).map(|m| m.ino())
}

fn is_ours(pid: u32, name: &str) -> bool {
    id(&pid.to_string(), name).ok() == id("self", name).ok()
}

/// Refusals that concern the namespaces of a process, of a program with this root.
pub fn refusals(target: &Target, root: u32) -> Result<Vec<Refusal>, ProcessError> {
    let mut found = Vec::new();
    let is_root = target.pid == root;
    let apart = is_root && !is_ours(root, "pid");
    for name in NAMESPACES {
        let theirs = id(&target.pid.to_string(), name)
            .map_err(|e| target.kernel(format!("reading its {name} namespace"), e))?;
        let expected = if is_root {
            id("self", name)
        } else {
            id(&root.to_string(), name)
        };
        if expected.ok() == Some(theirs) {
            continue;
        }
        let refusal = match name {
            "pid" if is_root => first_of_its_namespace(target),
            "mnt" if apart => other_mounts(target)?,
            _ if is_root => Some(target.refusal(
                "",
                format!("it lives in another {name} namespace"),
                "run outlive inside that namespace",
            )),
            _ => Some(target.refusal(
                "",
                format!("it lives in another {name} namespace than process {root} of the program"),
                "have the program make no namespaces of its own",
            )),
        };
        found.extend(refusal);
    }
    found.extend(of_children(target));
    Ok(found)
}

/// Refuses a process whose children will live elsewhere. (Where that comes about between this look
/// and the stop, the next look refuses.)
fn of_children(target: &Target) -> Vec<Refusal> {
    let pid = target.pid.to_string();
    // One that is not there yet cannot be read, and is another one.
    let apart =
        |(name, children, _): &(&str, &str, &str)| id(&pid, children).ok() != id(&pid, name).ok();
    let refusal = |(_, _, what): (&str, &str, &str)| {
        let what = format!("its children will live in another {what} namespace (unshare)");
        target.refusal("", what, "this cannot be saved yet")
    };
    let kinds = [
        ("pid", "pid_for_children", "PID"),
        ("time", "time_for_children", "time"),
    ];
    kinds.into_iter().filter(apart).map(refusal).collect()
}

fn first_of_its_namespace(target: &Target) -> Option<Refusal> {
    (target.id == 1).then(|| {
        target.refusal(
            "",
            "it is the first process (PID 1) of its PID namespace, which a restored program \
             cannot be",
            "start the program below an init in that namespace, and save it from there on",
        )
    })
}

/// Refuses a mount namespace that has a mount which we do not have.
fn other_mounts(target: &Target) -> Result<Option<Refusal>, ProcessError> {
    let theirs = target.proc_file("mountinfo")?;
    let ours = std::fs::read("/proc/self/mountinfo")
        .map_err(|e| target.kernel("reading our own mounts", e))?;
    Ok(foreign_mount(&theirs, &ours).map(|place| {
        target.refusal(
            "",
            format!("it lives in a mount namespace of its own, with another {place}"),
            "run outlive inside that namespace, or have the program live without that mount",
        )
    }))
}

/// The first mount point of `theirs` that `ours` does not have in the same way, but for `/proc`.
fn foreign_mount(theirs: &[u8], ours: &[u8]) -> Option<String> {
    let (theirs, ours) = (
        String::from_utf8_lossy(theirs),
        String::from_utf8_lossy(ours),
    );
    let ours: BTreeSet<_> = ours.lines().filter_map(mount).collect();
    let mut foreign = theirs
        .lines()
        .filter_map(mount)
        .filter(|m| !ours.contains(m));
    foreign
        .find(|(_, _, place, kind)| (*place, *kind) != ("/proc", "proc"))
        .map(|(_, _, place, _)| place.to_owned())
}

/// Device, root in it, mount point and type of file system (`proc_pid_mountinfo(5)`).
fn mount(line: &str) -> Option<(&str, &str, &str, &str)> {
    let (about, rest) = line.split_once(" - ")?;
    let mut words = about.split(' ').skip(2);
    let kind = rest.split(' ').next()?;
    Some((words.next()?, words.next()?, words.next()?, kind))
}

/// The init of the PID namespace that a restore made for the program with this root.
pub fn init_of(root: u32) -> Option<u32> {
    if is_ours(root, "pid") {
        return None;
    }
    let namespace = id(&root.to_string(), "pid").ok()?;
    let is_init = |pid: &u32| {
        id(&pid.to_string(), "pid").is_ok_and(|ns| ns == namespace)
            && Status::read(*pid, *pid).is_ok_and(|s| s.inner.pid == 1 && s.name == INIT_NAME)
    };
    // Who made the namespace is the parent of both as long as it lives.
    let parent = Status::read(root, root).ok()?.ppid;
    let mut siblings = family::children(parent).into_iter();
    siblings.find(is_init).or_else(|| {
        let all = std::fs::read_dir("/proc").ok()?;
        let mut pids = all.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        pids.find(is_init)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &[u8] =
        b"27 1 254:0 / / rw - ext4 /dev/vda rw\n22 27 0:21 / /proc rw - proc proc rw\n";

    #[test]
    fn a_second_proc_is_no_foreign_mount_and_anything_else_is() {
        let with = |line: &str| [OURS, line.as_bytes()].concat();
        assert_eq!(foreign_mount(OURS, OURS), None);
        assert_eq!(foreign_mount(b"", OURS), None);
        let proc = with("90 80 0:77 / /proc rw shared:1 - proc proc rw\n");
        assert_eq!(foreign_mount(&proc, OURS), None);
        for (line, place) in [
            ("90 80 0:77 / /tmp rw - tmpfs tmpfs rw\n", "/tmp"),
            ("90 80 0:77 / /proc rw - tmpfs tmpfs rw\n", "/proc"),
            ("90 80 254:0 /else / rw - ext4 /dev/vda rw\n", "/"),
        ] {
            assert_eq!(foreign_mount(&with(line), OURS).as_deref(), Some(place));
        }
    }

    #[test]
    fn we_live_in_our_own_namespaces() {
        let me = Target::open(std::process::id()).unwrap();
        assert_eq!(refusals(&me, me.pid).unwrap(), []);
        assert_eq!(init_of(me.pid), None);
    }
}
