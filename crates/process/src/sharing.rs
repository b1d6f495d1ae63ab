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
//! - What could not be made again ([`births`]) is refused.
//!
//! # Limits
//! POSIX locks belong to a table of descriptors. After a restore those of a shared one were taken by
//! the process that stands for it, and `F_GETLK` names that.

use crate::births::{self, KINDS, Kind, Unborn};
use crate::resources::attributes::ProcessState;
use crate::resources::signals::SignalsState;
use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_linux::kcmp;
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
    let shares = |p: &&ProcessState| KINDS.iter().any(|kind| p.shares_with(*kind) != 0);
    if !processes.iter().any(shares) {
        return Ok(());
    }
    let Err(missing) = plan(processes) else {
        return Ok(());
    };
    // Those that share; others cannot be made only because of them.
    let sharing: Vec<_> = missing.iter().filter(|p| shares(p)).collect();
    let refusals = sharing.into_iter().filter_map(|p| {
        let kinds = KINDS.into_iter().filter(|k| p.shares_with(*k) != 0);
        let what: Vec<String> = kinds
            .map(|kind| format!("its {} with process {}", name(kind), p.shares_with(kind)))
            .collect();
        let what = format!(
            "it shares {}, which is neither its parent nor a child of the same parent",
            what.join(" and ")
        );
        target_of(p.pid).map(|refuse| refuse(what))
    });
    let refusals: Vec<Refusal> = refusals.collect();
    if refusals.is_empty() {
        let what = "the sessions of processes that share something cannot be made again";
        return Err(ProcessError::Image(what.into()));
    }
    Err(ProcessError::Refused(refusals))
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
