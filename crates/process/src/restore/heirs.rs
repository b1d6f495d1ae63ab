//! Memory that a child has from its parent, copied only when one of them writes.
//!
//! After a `fork(2)` parent and child have the same pages, and a master with many workers needs
//! little more than one of them. An epoch holds the pages of each. At a restore a process from which
//! a child has much gets its memory first; the child is then made as a copy of it, and only what is
//! different in the child is changed: pages with other contents are written, pages that the child
//! has not are given back, mappings that it has not are removed. Contents decide: what is equal
//! becomes common, whether it was before or not.

use super::saved::Saved;
use super::space::{Runs, runs_of};
use crate::births::{Maker, Step};
use crate::interval::IntervalSet;
use crate::resources::attributes::ProcessState;
use crate::resources::memory::{Area, AreaKind, MemoryState};
use outlive_epoch::{EpochReader, PAGE_SIZE};
use outlive_linux::maps::VmFlags;
use std::collections::{BTreeMap, BTreeSet};

const PAGE: u64 = PAGE_SIZE as u64;
/// Bytes that parent and child must both have at the same addresses for it to be worth while.
const WORTH: u64 = 256 * 1024;

/// Flags that a mapping gets when it is made, and keeps.
const BORN_WITH: [VmFlags; 4] = [
    VmFlags::GROWS_DOWN,
    VmFlags::NO_RESERVE,
    VmFlags::HUGEPAGE,
    VmFlags::NO_HUGEPAGE,
];

/// What a child keeps of the mappings of its parent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Heritage {
    /// Addresses whose mappings it keeps, in order.
    pub kept: Vec<(u64, u64)>,
    /// Pages there that the parent has and the child has not.
    pub dropped: Vec<(u64, u64)>,
    /// Where the protection is another one, and which.
    pub protected: Vec<(u64, u64, u32)>,
}

impl Heritage {
    /// The parts of a range that are not kept.
    pub fn outside(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut rest = Vec::new();
        let mut from = start;
        let first = self.kept.partition_point(|k| k.1 <= start);
        for &(s, e) in self.kept[first..].iter().take_while(|k| k.0 < end) {
            if s > from {
                rest.push((from, s));
            }
            from = from.max(e);
        }
        if from < end {
            rest.push((from, end));
        }
        rest
    }
}

/// Who has memory from whom.
#[derive(Debug, Default)]
pub struct Heirs {
    heritages: BTreeMap<u32, Heritage>,
    givers: BTreeSet<u32>,
}

impl Heirs {
    /// Compares the processes of an epoch with their parents.
    pub fn find(saved: &Saved, reader: &dyn EpochReader) -> Self {
        let mut heirs = Self::default();
        let mut runs: BTreeMap<u32, Runs> = BTreeMap::new();
        let memories: BTreeMap<u32, &MemoryState> = saved
            .processes
            .iter()
            .map(|p| (p.process.pid, &p.memory))
            .collect();
        let copies = copies(saved);
        for process in &saved.processes {
            let (pid, parent) = (process.process.pid, process.process.parent);
            let Some(of_parent) = memories.get(&parent).filter(|_| copies.contains(&pid)) else {
                continue;
            };
            for (id, memory) in [(parent, *of_parent), (pid, &process.memory)] {
                runs.entry(id)
                    .or_insert_with(|| runs_of(id, memory, reader));
            }
            let given = (*of_parent, &runs[&parent][..]);
            let (heritage, common) = compare(given, (&process.memory, &runs[&pid]));
            if common >= WORTH {
                heirs.heritages.insert(pid, heritage);
                heirs.givers.insert(parent);
            }
        }
        heirs
    }

    /// What a process has of its parent's.
    pub fn of(&self, pid: u32) -> Option<&Heritage> {
        self.heritages.get(&pid)
    }

    /// Whether some child has memory of this process.
    pub fn gives(&self, pid: u32) -> bool {
        self.givers.contains(&pid)
    }
}

/// The processes that are made as copies of their parents, with memory that is theirs alone.
fn copies(saved: &Saved) -> BTreeSet<u32> {
    let shared = |p: &ProcessState| match p.shares_memory_with {
        0 => None,
        holder => Some([p.pid, holder]),
    };
    let processes = saved.processes.iter().map(|p| &p.process);
    let shared: BTreeSet<u32> = processes.filter_map(shared).flatten().collect();
    let copied = |step: &Step| match *step {
        Step::Make(child, Maker::Parent(parent), _) => {
            let pid = |at: usize| saved.processes[at].process.pid;
            let both = [pid(child), pid(parent)];
            (!both.iter().any(|p| shared.contains(p))).then_some(both[0])
        }
        _ => None,
    };
    saved.plan.iter().filter_map(copied).collect()
}

/// The protection with which an area is made: it can be written where contents are to come.
pub fn first_protection(area: &Area, runs: &[(u64, u64)]) -> u32 {
    let at = runs.partition_point(|r| r.1 <= area.start);
    if runs.get(at).is_some_and(|r| r.0 < area.end) {
        area.protection | 3
    } else {
        area.protection
    }
}

type Given<'a> = (&'a MemoryState, &'a [(u64, u64)]);

/// What a child keeps, and how many bytes both have there.
fn compare(parent: Given<'_>, child: Given<'_>) -> (Heritage, u64) {
    let mut heritage = Heritage::default();
    let mut theirs = parent.0.areas.iter().peekable();
    for area in &child.0.areas {
        while theirs.next_if(|p| p.end <= area.start).is_some() {}
        let mut rest = theirs.clone();
        while let Some(other) = rest.next_if(|p| p.start < area.end) {
            if !is_same_sort((parent.0, other), (child.0, area)) {
                continue;
            }
            let (start, end) = (area.start.max(other.start), area.end.min(other.end));
            heritage.kept.push((start, end));
            let wanted = first_protection(area, child.1);
            if first_protection(other, parent.1) != wanted {
                heritage.protected.push((start, end, wanted));
            }
        }
    }
    let mut only_theirs = IntervalSet::default();
    parent
        .1
        .iter()
        .for_each(|r| only_theirs.insert(r.0 / PAGE, r.1 / PAGE));
    let mut both = IntervalSet::default();
    for run in child.1 {
        for (start, end) in only_theirs.remove(run.0 / PAGE, run.1 / PAGE) {
            both.insert(start, end);
        }
    }
    let mut common = 0;
    for &(start, end) in &heritage.kept {
        let dropped = only_theirs.remove(start / PAGE, end / PAGE);
        let dropped = dropped.into_iter().map(|(s, e)| (s * PAGE, e * PAGE));
        heritage.dropped.extend(dropped);
        let kept = both.remove(start / PAGE, end / PAGE);
        common += kept.iter().map(|(s, e)| (e - s) * PAGE).sum::<u64>();
    }
    (heritage, common)
}

/// Whether what lies below two areas that overlap is the same there.
fn is_same_sort(a: (&MemoryState, &Area), b: (&MemoryState, &Area)) -> bool {
    let ((a_state, a), (b_state, b)) = (a, b);
    let (a_flags, b_flags) = (a.vm_flags(), b.vm_flags());
    if a.kind != b.kind || BORN_WITH.iter().any(|&f| a_flags.has(f) != b_flags.has(f)) {
        return false;
    }
    let base = |x: &Area| x.start.wrapping_sub(x.offset);
    let file = |state: &MemoryState, x: &Area| {
        let file = x.file.and_then(|f| state.files.get(f as usize));
        file.map(|f| (f.path.clone(), f.device, f.inode))
    };
    match a.kind {
        AreaKind::Anonymous => true,
        AreaKind::PrivateFile => base(a) == base(b) && file(a_state, a) == file(b_state, b),
        AreaKind::PrivateMemory => base(a) == base(b) && a.space == b.space,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start: u64, end: u64) -> Area {
        Area {
            start: start * PAGE,
            end: end * PAGE,
            protection: 3,
            kind: AreaKind::Anonymous,
            flags: Vec::new(),
            file: None,
            space: None,
            offset: 0,
            label: None,
        }
    }

    fn state(areas: Vec<Area>) -> MemoryState {
        MemoryState {
            layout: Vec::new(),
            brk: 0,
            auxiliary_vector: Vec::new(),
            lock_future: 0,
            guards: Vec::new(),
            files: Vec::new(),
            areas,
        }
    }

    fn pages(list: &[(u64, u64)]) -> Vec<(u64, u64)> {
        list.iter().map(|(s, e)| (s * PAGE, e * PAGE)).collect()
    }

    #[test]
    fn a_child_keeps_what_both_have_and_drops_what_it_has_not() {
        let parent = state(vec![area(10, 20), area(30, 40), area(50, 60)]);
        let mut read_only = area(35, 45);
        read_only.protection = 1;
        let mut grows = area(50, 60);
        grows.flags = vec!["gd".into()];
        let child = state(vec![area(12, 25), read_only, grows]);
        let parent_runs = pages(&[(10, 16), (30, 40), (50, 60)]);
        let child_runs = pages(&[(14, 24), (50, 60)]);
        let (heritage, common) = compare((&parent, &parent_runs), (&child, &child_runs));
        assert_eq!(heritage.kept, pages(&[(12, 20), (35, 40)]));
        assert_eq!(heritage.dropped, pages(&[(12, 14), (35, 40)]));
        assert_eq!(heritage.protected, [(35 * PAGE, 40 * PAGE, 1)]);
        assert_eq!(common, 2 * PAGE);
        assert_eq!(
            heritage.outside(10 * PAGE, 50 * PAGE),
            pages(&[(10, 12), (20, 35), (40, 50)])
        );
        assert_eq!(heritage.outside(13 * PAGE, 14 * PAGE), []);
        assert_eq!(heritage.outside(20 * PAGE, 35 * PAGE), pages(&[(20, 35)]));
    }

    #[test]
    fn one_area_may_have_parts_of_several() {
        let parent = state(vec![area(10, 20), area(20, 30)]);
        let child = state(vec![area(15, 18), area(18, 28), area(29, 40)]);
        let (heritage, _) = compare((&parent, &[]), (&child, &[]));
        assert_eq!(
            heritage.kept,
            pages(&[(15, 18), (18, 20), (20, 28), (29, 30)])
        );
    }

    #[test]
    fn other_files_and_places_in_files_are_not_kept() {
        let of = |offset: u64, space: u32| Area {
            kind: AreaKind::PrivateMemory,
            space: Some(space),
            offset: offset * PAGE,
            ..area(10, 20)
        };
        let same = |a: Area, b: Area| {
            let (a, b) = (state(vec![a]), state(vec![b]));
            !compare((&a, &[]), (&b, &[])).0.kept.is_empty()
        };
        assert!(same(of(3, 1), of(3, 1)));
        assert!(!same(of(3, 1), of(4, 1)));
        assert!(!same(of(3, 1), of(3, 2)));
        assert!(!same(of(3, 1), area(10, 20)));
    }
}
