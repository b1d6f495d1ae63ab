//! What a program shares with processes that are not of it: memory, table of descriptors,
//! directories, signal actions (`clone(2)` again). After a restore it would have all of that for
//! itself, and the other one would not notice: so it is refused.
//!
//! # How it is found
//! The kernel lists nowhere who shares what, it compares two given processes (`kcmp(2)`). So all
//! processes of the machine are compared with those of the program, while it runs, when tracking
//! begins. Later only two sorts can share: those that are new (nobody else can begin to), whose IDs
//! the kernel gives out in ascending order, and those that were of the program and are not any more,
//! because the parent ended. Now and then all are compared again nevertheless: somebody may have chosen
//! an ID (`clone3(2)` with `set_tid`).
//!
//! # Limits
//! Compared is what is seen here and may be looked at: without privilege, processes of the same user;
//! in a container, those in it. A process that comes between the look and the stop is found before
//! the next stop.

use super::{name, search};
use crate::Refusal;
use crate::births::KINDS;
use crate::family::Kin;
use crate::target::{Stat, Status, Target};
use outlive_linux::kcmp;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// After so long all processes are looked at again …
const ALL_AGAIN: Duration = Duration::from_secs(60);
/// … and where nobody has looked for so long, or so many IDs were given out since: they may have
/// gone all the way round, or to look at everybody takes no longer.
const UNSEEN: (Duration, u32) = (Duration::from_secs(3), 8192);

/// A kernel thread (`PF_KTHREAD`), which has no memory to share.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// A thread that ends (`PF_EXITING`).
const EXITING: u64 = 4;

/// What was compared so far.
#[derive(Debug, Default)]
pub struct Outside {
    /// When all processes were looked at, and when somebody looked last.
    all: Option<(Instant, Instant)>,
    /// The ID that had been given out last at the last look, and at the one before: one may be given
    /// out before its process can be seen.
    newest: [u32; 2],
    /// Who was of the program at the last look.
    inside: BTreeSet<u32>,
}

impl Outside {
    /// Refusals of what is shared with a process outside. `kin` is the program as it is now, and
    /// `again` lists it once more: it may grow meanwhile.
    pub fn refusals(&mut self, kin: &[Kin], again: impl FnOnce() -> Vec<Kin>) -> Vec<Refusal> {
        let inside: BTreeSet<u32> = kin.iter().map(|k| k.pid).collect();
        let others = self.candidates(&inside);
        let living: Vec<u32> = kin.iter().filter(|k| !k.zombie).map(|k| k.pid).collect();
        let mut found = BTreeSet::new();
        // Who shares signal actions shares memory.
        for kind in [
            kcmp::Kind::Memory,
            kcmp::Kind::Files,
            kcmp::Kind::Filesystem,
        ] {
            found.extend(meet(&living, &others, kind));
        }
        if found.is_empty() {
            self.inside = inside;
            return Vec::new();
        }
        let now: BTreeSet<u32> = again().iter().map(|k| k.pid).collect();
        let mut strangers = BTreeMap::new();
        for (member, other) in found {
            if let Some(process) = process_of(other).filter(|p| !descends(*p, &now)) {
                strangers.entry((member, process)).or_insert(other);
            }
        }
        let refusals = strangers
            .into_iter()
            .filter_map(refusal)
            .collect::<Vec<_>>();
        if refusals.is_empty() {
            self.inside = inside;
        } else {
            // It is refused as long as it is so.
            self.all = None;
        }
        refusals
    }

    /// Threads and processes that may share something with the program without being of it. Those
    /// that have come may be its own.
    fn candidates(&mut self, inside: &BTreeSet<u32>) -> Vec<u32> {
        let now = Instant::now();
        let newest = newest();
        let [since, before] = self.newest;
        let few = newest.filter(|&newest| {
            before != 0 && before <= since && since <= newest && newest - before < UNSEEN.1
        });
        let recent = self.all.filter(|&(all, last)| {
            now.duration_since(all) < ALL_AGAIN && now.duration_since(last) < UNSEEN.0
        });
        let others: Vec<u32> = match few.zip(recent) {
            Some((newest, (all, _))) => {
                self.all = Some((all, now));
                let left = self.inside.difference(inside).copied();
                (before + 1..=newest).chain(left).collect()
            }
            None => {
                self.all = Some((now, now));
                everybody(inside)
            }
        };
        let newest = newest.unwrap_or(0);
        self.newest = [newest, if since == 0 { newest } else { since }];
        others.into_iter().filter(|n| !inside.contains(n)).collect()
    }
}

/// The process or thread ID that was given out last.
fn newest() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next_back()?.parse().ok()
}

/// All other processes, and all threads of those that have several: each may have descriptors and
/// directories of its own.
fn everybody(inside: &BTreeSet<u32>) -> Vec<u32> {
    let numbers = |path: &str| {
        let listed = std::fs::read_dir(path).into_iter().flatten().flatten();
        let numbers = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        numbers.collect::<Vec<u32>>()
    };
    let mut all = Vec::new();
    for pid in numbers("/proc").into_iter().filter(|p| !inside.contains(p)) {
        let tasks = format!("/proc/{pid}/task");
        // Two links of its own, and one for each thread.
        match std::fs::metadata(&tasks) {
            Ok(m) if m.nlink() > 3 => all.extend(numbers(&tasks)),
            _ => all.push(pid),
        }
    }
    all
}

/// Pairs of a member and another one that have the same; what has ended, or may not be looked at, is
/// left out.
fn meet(inside: &[u32], others: &[u32], kind: kcmp::Kind) -> Vec<(u32, u32)> {
    let members_are_few = inside.len() <= others.len();
    let (few, many) = if members_are_few {
        (inside, others)
    } else {
        (others, inside)
    };
    let mut distinct: Vec<u32> = Vec::with_capacity(few.len());
    let mut same: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    // One of which nothing can be asked would be in everybody's way.
    let can_be_asked = |one: &u32| kcmp::same(*one, *one, kind).is_ok();
    for one in few.iter().copied().filter(can_be_asked) {
        match search(&distinct, one, kind) {
            Ok(Ok(first)) => same.entry(first).or_default().push(one),
            Ok(Err(at)) => distinct.insert(at, one),
            Err(_) => {}
        }
    }
    let mut pairs = Vec::new();
    for &one in many {
        let hit = match search(&distinct, one, kind) {
            Ok(hit) => hit.ok(),
            Err(_) if !can_be_asked(&one) => None,
            // One of the others has just ended.
            Err(_) => distinct
                .iter()
                .copied()
                .find(|&other| kcmp::same(other, one, kind) == Ok(true)),
        };
        let Some(first) = hit else { continue };
        let all = std::iter::once(first).chain(same.get(&first).into_iter().flatten().copied());
        pairs.extend(all.map(|other| {
            if members_are_few {
                (other, one)
            } else {
                (one, other)
            }
        }));
    }
    pairs
}

/// The process of a thread.
fn process_of(tid: u32) -> Option<u32> {
    Status::read(tid, tid).ok().map(|s| s.tgid)
}

/// Whether a process is one of these or descends from one. A list of them that was made while they
/// ran may lack some.
fn descends(process: u32, from: &BTreeSet<u32>) -> bool {
    let parent = |pid: &u32| Status::read(*pid, *pid).ok().map(|s| s.ppid);
    std::iter::successors(Some(process), parent)
        .take_while(|pid| *pid != 0)
        .any(|pid| from.contains(&pid))
}

/// Whether a thread is on its way out, and so may have nothing left that could be compared.
fn exits(tid: u32) -> bool {
    Stat::read(tid).map_or(true, |stat| stat.flags & EXITING != 0)
}

/// The refusal of what a member shares with a thread of another process, if it still does.
fn refusal(((member, process), other): ((u32, u32), u32)) -> Option<Refusal> {
    let target = Target::open(member).ok()?;
    let stat = Stat::read(process).ok()?;
    let kinds = [
        kcmp::Kind::Memory,
        kcmp::Kind::Files,
        kcmp::Kind::Filesystem,
        kcmp::Kind::Signals,
    ];
    let shared = KINDS.into_iter().zip(kinds);
    let shared = shared.filter(|(_, kind)| kcmp::same(member, other, *kind) == Ok(true));
    let what: Vec<&str> = shared.map(|(kind, _)| name(kind)).collect();
    // Who ends has nothing at last, as all others who do; the kernel says so before it takes anything.
    let over = exits(member) || exits(other);
    if what.is_empty() || over || stat.flags & KERNEL_THREAD != 0 {
        return None;
    }
    let program = Status::read(process, process).map_or_else(|_| String::new(), |s| s.name);
    let what = format!(
        "it shares its {} with process {process} ({program}), which is not of this program",
        what.join(" and ")
    );
    let remedy = "name a process from which both descend, or end the other one";
    Some(target.refusal("", what, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> Child {
        Command::new("sleep").arg("100").spawn().unwrap()
    }

    fn kin(pid: u32) -> Kin {
        Kin {
            pid,
            parent: 0,
            zombie: false,
        }
    }

    #[test]
    fn everybody_is_looked_at_first_and_then_who_is_new_or_has_left() {
        let (mut first, me) = (sleeper(), std::process::id());
        let mut outside = Outside::default();
        let inside = |pids: &[u32]| pids.iter().copied().collect::<BTreeSet<_>>();
        let all = outside.candidates(&inside(&[first.id()]));
        assert!(all.contains(&me) && !all.contains(&first.id()));
        outside.inside = inside(&[first.id(), me]);
        let mut second = sleeper();
        let next = outside.candidates(&inside(&[first.id()]));
        assert!(next.contains(&second.id()), "{next:?}");
        assert!(next.contains(&me), "it has left: {next:?}");
        assert!(!next.contains(&first.id()), "{next:?}");
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn threads_meet_by_what_they_share_and_processes_do_not() {
        let (tell, told) = std::sync::mpsc::channel();
        let (finish, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(
                rustix::thread::gettid()
                    .as_raw_nonzero()
                    .get()
                    .cast_unsigned(),
            )
            .unwrap();
            let _ = wait.recv();
        });
        let (me, tid, mut child) = (std::process::id(), told.recv().unwrap(), sleeper());
        for kind in [kcmp::Kind::Memory, kcmp::Kind::Files] {
            let gone = u32::MAX >> 1;
            assert_eq!(meet(&[me], &[child.id(), gone, tid], kind), [(me, tid)]);
            assert_eq!(meet(&[gone, me, child.id()], &[tid], kind), [(me, tid)]);
            assert_eq!(meet(&[me], &[child.id()], kind), []);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        drop(finish);
        thread.join().unwrap();
    }

    /// Two that have ended have the same memory: none.
    #[test]
    fn those_that_end_share_nothing() {
        let mut children = [sleeper(), sleeper()];
        let [a, b] = [children[0].id(), children[1].id()];
        assert!(descends(a, &BTreeSet::from([std::process::id()])));
        assert!(!descends(a, &BTreeSet::from([b])) && !exits(a));
        for child in &mut children {
            child.kill().unwrap();
        }
        while ![a, b].into_iter().all(|pid| Status::tells_end(pid, pid)) {
            std::thread::yield_now();
        }
        assert_eq!(kcmp::same(a, b, kcmp::Kind::Memory), Ok(true));
        assert!(exits(a) && exits(b) && refusal(((a, b), b)).is_none());
        for child in &mut children {
            child.wait().unwrap();
        }
    }

    #[test]
    fn a_thread_of_the_program_is_none_outside() {
        let me = std::process::id();
        let mut outside = Outside::default();
        let all = move || vec![kin(me)];
        let _ = outside.candidates(&BTreeSet::from([me]));
        let found = std::thread::spawn(move || outside.refusals(&all(), all))
            .join()
            .unwrap();
        assert_eq!(
            found.iter().map(|r| r.what.clone()).collect::<Vec<_>>(),
            [""; 0]
        );
    }
}
