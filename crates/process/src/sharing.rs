//! What processes of a program share as a whole: address space, table of descriptors, directories,
//! signal actions (`clone(2)` without `CLONE_THREAD`).
//!
//! # Rules
//! - What is shared is saved once, with one of those who share it; the others name that one
//!   ([`ProcessState`]). Nobody names one that itself names another.
//! - An address space is the holder's of its foothold. For everything else the first in the order of
//!   the tree stands.
//! - Two processes that share nothing never will: so those found alone are not compared again until
//!   there is a new one.
//! - What could not be made again ([`births`]) is refused, and what is shared with a process that is
//!   not of the program ([`outside`]).
//!
//! # Threads
//! A thread can leave the descriptors and directories of its process (`unshare(2)`). Such a process is
//! refused. All threads are compared while the program runs, before each stop, and those that were
//! found apart again at the stop: one that leaves in between is found by the next epoch.

pub mod outside;

use crate::births::{self, KINDS, Kind, Unborn};
use crate::bootstrap;
use crate::family::Kin;
use crate::resources::attributes::ProcessState;
use crate::resources::signals::SignalsState;
use crate::target::{Stat, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::kcmp;
use outlive_linux::maps::{self, Mapping};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

/// What each process shares: the process that stands for it; 0 where that is itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// The table of descriptors.
    pub descriptors: u32,
    /// The directories.
    pub directories: u32,
    /// Signal actions.
    pub signals: u32,
}

/// What is known of who shares what, from stop to stop.
#[derive(Debug, Default)]
pub struct Sharing {
    /// Processes that share none of this with any other of them.
    alone: BTreeSet<u32>,
}

impl Sharing {
    /// A process of this number may be another one by now.
    pub fn forget(&mut self, pid: u32) {
        self.alone.remove(&pid);
    }

    /// Compares stopped processes, given in the order of the tree.
    pub fn find(&mut self, pids: &[u32]) -> Result<BTreeMap<u32, Shares>, ProcessError> {
        let mut found: BTreeMap<u32, Shares> = BTreeMap::new();
        if pids.len() < 2 || pids.iter().all(|pid| self.alone.contains(pid)) {
            return Ok(found);
        }
        let groups = [
            first_of_each(pids, kcmp::Kind::Files)?,
            first_of_each(pids, kcmp::Kind::Filesystem)?,
            first_of_each(pids, kcmp::Kind::Signals)?,
        ];
        let named: BTreeSet<u32> = groups.iter().flat_map(BTreeMap::values).copied().collect();
        for &pid in pids {
            let [descriptors, directories, signals] =
                [0, 1, 2].map(|kind: usize| groups[kind].get(&pid).copied().unwrap_or(0));
            let shares = Shares {
                descriptors,
                directories,
                signals,
            };
            if shares != Shares::default() {
                found.insert(pid, shares);
            } else if !named.contains(&pid) {
                self.alone.insert(pid);
            }
        }
        Ok(found)
    }
}

/// For each process that has the same as an earlier one, the first that has it.
fn first_of_each(pids: &[u32], kind: kcmp::Kind) -> Result<BTreeMap<u32, u32>, ProcessError> {
    // In the order of what they have, one for each.
    let mut distinct: Vec<u32> = Vec::with_capacity(pids.len());
    let mut same = BTreeMap::new();
    for &pid in pids {
        match search(&distinct, pid, kind)? {
            Ok(first) => drop(same.insert(pid, first)),
            Err(at) => distinct.insert(at, pid),
        }
    }
    Ok(same)
}

fn search(
    distinct: &[u32],
    pid: u32,
    kind: kcmp::Kind,
) -> Result<Result<u32, usize>, ProcessError> {
    let (mut low, mut high) = (0, distinct.len());
    while low < high {
        let middle = low.midpoint(high);
        let other = distinct[middle];
        let order = kcmp::compare(other, pid, kind).map_err(|e| {
            let what = format!("comparing it with process {other}");
            crate::target::gone_or(pid, &what, e.into())
        })?;
        match order {
            Ordering::Equal => return Ok(Ok(other)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

/// Threads that do not have the descriptors or the directories of their process. One that is about to
/// end has none.
pub fn apart(target: &Target, tids: impl IntoIterator<Item = u32>) -> Vec<(u32, Kind)> {
    let kinds = [
        (kcmp::Kind::Files, Kind::Descriptors),
        (kcmp::Kind::Filesystem, Kind::Directories),
    ];
    let others = tids.into_iter().filter(|tid| *tid != target.pid);
    let differing = |tid: u32| {
        let differs = move |kind| kcmp::same(target.pid, tid, kind) == Ok(false);
        kinds
            .into_iter()
            .filter(move |(kind, _)| differs(*kind))
            .map(move |(_, kind)| (tid, kind))
    };
    others.flat_map(differing).collect()
}

/// The refusal of a thread that is apart.
pub fn refuse_apart(target: &Target, (tid, kind): (u32, Kind)) -> Refusal {
    let what = format!(
        "a {} of its own, not that of its process (unshare)",
        name(kind)
    );
    target.refusal(format!("thread {tid}"), what, "this cannot be saved yet")
}

/// Whether two processes have one address space.
pub fn same_memory(a: u32, b: u32) -> bool {
    kcmp::same(a, b, kcmp::Kind::Memory).unwrap_or(false)
}

/// In which order these processes are made; or those for which there is none.
pub fn plan<'a>(
    processes: &[&'a ProcessState],
) -> Result<Vec<births::Step>, Vec<&'a ProcessState>> {
    let tree: Vec<Unborn> = processes.iter().map(|p| Unborn::of(p)).collect();
    births::plan(&tree).map_err(|missing| missing.into_iter().map(|at| processes[at]).collect())
}

/// Refuses what could not be made again.
pub fn refuse<'a>(
    processes: &[&ProcessState],
    target_of: &dyn Fn(u32) -> Option<Refusing<'a>>,
) -> Result<(), ProcessError> {
    let tree: Vec<Unborn> = processes.iter().map(|p| Unborn::of(p)).collect();
    let refusals = refusals(&tree, target_of);
    if refusals.is_empty() {
        Ok(())
    } else {
        Err(ProcessError::Refused(refusals))
    }
}

fn refusals<'a>(tree: &[Unborn], target_of: &dyn Fn(u32) -> Option<Refusing<'a>>) -> Vec<Refusal> {
    let with = |p: &Unborn| {
        let groups = KINDS.into_iter().zip(p.groups);
        groups.filter(|(_, g)| *g != p.pid).collect::<Vec<_>>()
    };
    if tree.iter().all(|p| with(p).is_empty()) {
        return Vec::new();
    }
    // Others cannot be made only because of those that share.
    let missing = births::plan(tree).err().unwrap_or_default().into_iter();
    let missing = missing.map(|at| &tree[at]).filter(|p| !with(p).is_empty());
    let refusal = |p: &Unborn| {
        let what: Vec<String> = with(p)
            .into_iter()
            .map(|(kind, other)| format!("its {} with process {other}", name(kind)))
            .collect();
        let what = format!(
            "it shares {}, which is neither its parent nor a child of the same parent",
            what.join(" and ")
        );
        target_of(p.pid).map(|refuse| refuse(what))
    };
    missing.filter_map(refusal).collect()
}

/// What would be refused later of processes that run: what they share could not be made again, or
/// one of those who share an address space still uses the working memory that another outlive left
/// there.
pub fn preflight(processes: &[(Kin, Target)]) -> Vec<Refusal> {
    let pids: Vec<u32> = processes.iter().map(|(_, target)| target.pid).collect();
    let kinds = [
        kcmp::Kind::Memory,
        kcmp::Kind::Files,
        kcmp::Kind::Filesystem,
        kcmp::Kind::Signals,
    ];
    // Where one ends meanwhile, that is found out soon enough.
    let same = kinds.map(|kind| first_of_each(&pids, kind).unwrap_or_default());
    if same.iter().all(BTreeMap::is_empty) {
        return Vec::new();
    }
    let unborn = |(kin, target): &(Kin, Target)| {
        let stat = Stat::read(target.pid).ok()?;
        Some(Unborn {
            pid: target.pid,
            parent: kin.parent,
            sid: stat.sid,
            exit_signal: stat.exit_signal,
            groups: [0, 1, 2, 3].map(|kind: usize| {
                let holder = same[kind].get(&target.pid);
                holder.copied().unwrap_or(target.pid)
            }),
        })
    };
    let Some(tree) = processes.iter().map(unborn).collect::<Option<Vec<_>>>() else {
        return Vec::new();
    };
    let target = |pid| {
        let mut targets = processes.iter().map(|(_, target)| target);
        targets.find(|t| t.pid == pid)
    };
    let mut found = refusals(&tree, &|pid| target(pid).map(refusing));
    for (&pid, &holder) in &same[0] {
        let both = [target(pid), target(holder)];
        let busy = both.into_iter().flatten().find(|t| helps_itself(t));
        found.extend(busy.map(bootstrap::still_helping_itself));
    }
    found
}

/// Where a thread goes on is not told while it runs. It is in our working memory for no longer than a
/// few calls without a wait: so often it is asked again, a millisecond apart.
const RUNNING_TRIES: u32 = 30;

/// Whether some thread waits in working memory that an outlive left which died.
fn helps_itself(target: &Target) -> bool {
    let mappings = maps::read(target.pid).unwrap_or_default();
    let left = |m: &&Mapping| bootstrap::is_left_behind(target.pid, m);
    let arenas: Vec<&Mapping> = mappings.iter().filter(left).collect();
    let call_of = |tid: &u32| {
        let call = target.proc_file(&format!("task/{tid}/syscall"));
        String::from_utf8_lossy(&call.unwrap_or_default()).into_owned()
    };
    let waits_there = |tid: &u32| {
        let mut call = call_of(tid);
        for _ in 0..RUNNING_TRIES {
            if !call.starts_with("running") {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            call = call_of(tid);
        }
        // Its last word is where the thread goes on.
        let at = call.split_whitespace().next_back();
        let at = at.and_then(|w| u64::from_str_radix(w.trim_start_matches("0x"), 16).ok());
        at.is_some_and(|at| arenas.iter().any(|m| (m.start..m.end).contains(&at)))
    };
    !arenas.is_empty() && target.threads().unwrap_or_default().iter().any(waits_there)
}

/// Makes a refusal that names a process.
pub type Refusing<'a> = Box<dyn Fn(String) -> Refusal + 'a>;

/// A refusal of what cannot be made again.
pub fn refusing(target: &Target) -> Refusing<'_> {
    Box::new(|what| target.refusal("", what, "have it share with its parent only"))
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Memory => "memory",
        Kind::Descriptors => "table of descriptors",
        Kind::Directories => "working directory",
        Kind::Signals => "signal actions",
    }
}

/// An image is hostile: who shares names one that has it, and has nothing of its own; signal actions
/// are shared by those only that share memory. `holders` are the processes that have descriptors.
pub fn validate(
    processes: &[(&ProcessState, &SignalsState)],
    holders: &BTreeSet<u32>,
) -> Result<(), ProcessError> {
    let by_pid: BTreeMap<u32, &ProcessState> = processes.iter().map(|(p, _)| (p.pid, *p)).collect();
    for (process, signals) in processes {
        let pid = process.pid;
        let bad = |what: &str| Err(ProcessError::Image(format!("process {pid}: {what}")));
        for kind in KINDS {
            let with = process.shares_with(kind);
            let holder = by_pid.get(&with);
            if with == 0 {
                continue;
            }
            if with == pid || holder.is_none_or(|h| h.shares_with(kind) != 0) {
                return bad(&format!("it shares its {} with nobody", name(kind)));
            }
            let memory = |p: &ProcessState| match p.shares_memory_with {
                0 => p.pid,
                holder => holder,
            };
            if kind == Kind::Signals && holder.map(|h| memory(h)) != Some(memory(process)) {
                return bad("it shares signal actions, but not memory");
            }
        }
        if process.shares_descriptors_with != 0 && holders.contains(&pid) {
            return bad("it has descriptors beside those that it shares");
        }
        if process.shares_signals_with != 0 && !signals.actions.is_empty() {
            return bad("it has signal actions beside those that it shares");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
