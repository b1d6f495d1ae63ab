//! By whom, and in which order, the processes of a tree are made again. Pure.
//!
//! A process can share its address space, its table of descriptors, its directories and its signal
//! actions with the one that makes it (`clone(2)`), and with no other. It becomes a child of its
//! maker, or of its maker's parent (`CLONE_PARENT`), or of whoever adopts it when its maker ends.
//! What it shares it keeps, but for descriptors and directories, which it can leave (`unshare(2)`)
//! for some of its own. It is in the session of its maker until it begins one.
//!
//! # What can be made
//! - A process that shares with its parent, with a child of the same parent, or, if it has no parent
//!   any more, with anybody.
//! - Descriptors and directories also past parents that have some of their own: each such parent
//!   has those of the others until its children are made, and leaves them then.
//!
//! Everything else is told, so that it can be refused before harm.

use crate::resources::attributes::ProcessState;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What is shared as a whole.
pub const KINDS: [Kind; 4] = [
    Kind::Memory,
    Kind::Descriptors,
    Kind::Directories,
    Kind::Signals,
];

/// One thing that processes can share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The address space.
    Memory,
    /// The table of descriptors.
    Descriptors,
    /// Working directory, root directory and file mode mask.
    Directories,
    /// Signal actions.
    Signals,
}

impl Kind {
    /// The flag of `clone(2)` and `unshare(2)`.
    #[must_use]
    pub fn flag(self) -> u64 {
        (match self {
            Self::Memory => libc::CLONE_VM,
            Self::Descriptors => libc::CLONE_FILES,
            Self::Directories => libc::CLONE_FS,
            Self::Signals => libc::CLONE_SIGHAND,
        }) as u64
    }

    /// Whether a process can leave what it shares.
    fn can_be_left(self) -> bool {
        matches!(self, Self::Descriptors | Self::Directories)
    }
}

/// A process that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unborn {
    /// Its process ID.
    pub pid: u32,
    /// Its parent; 0 where that is not in the tree.
    pub parent: u32,
    /// Its session.
    pub sid: u32,
    /// The signal by which its parent is told of its end.
    pub exit_signal: u32,
    /// For each of [`KINDS`], the process that stands for all that share it.
    pub groups: [u32; 4],
}

impl Unborn {
    /// As it is saved.
    #[must_use]
    pub fn of(state: &ProcessState) -> Self {
        Self {
            pid: state.pid,
            parent: state.parent,
            sid: state.sid,
            exit_signal: state.exit_signal,
            groups: KINDS.map(|kind| match state.shares_with(kind) {
                0 => state.pid,
                holder => holder,
            }),
        }
    }

    fn leads_session(&self) -> bool {
        self.sid == self.pid
    }
}

/// Who makes a process; places in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// Who restores; it shares nothing with any.
    Us,
    /// Its parent.
    Parent(usize),
    /// Another child of its parent.
    Sibling(usize),
    /// A child of this one that ends at once, so that the process has lost its parent.
    Through(usize),
}

/// One step of making a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A process is made, by whom, and shares these with its maker: flags of `clone(2)`.
    Make(usize, Maker, u64),
    /// It begins a session.
    BeginSession(usize),
    /// It leaves what it shares: flags of `unshare(2)`.
    Leave(usize, u64),
}

/// In which order the processes of a list are made. The first is the root; parents stand before
/// their children.
///
/// # Errors
/// Places of those that cannot be made so.
pub fn plan(tree: &[Unborn]) -> Result<Vec<Step>, Vec<usize>> {
    // Mostly nobody has to carry anything. Who carries one thing cannot carry another, so that it
    // is better not to where siblings could do it.
    let first = attempt(Planner::new(tree));
    let carrying = |siblings| {
        let mut planner = Planner::new(tree);
        planner.find_carriers(siblings);
        attempt(planner)
    };
    match first {
        Err(missing) => carrying(false)
            .or_else(|_| carrying(true))
            .map_err(|_| missing),
        done => done,
    }
}

fn attempt(mut planner: Planner<'_>) -> Result<Vec<Step>, Vec<usize>> {
    planner.make_parentless(|p, at| at == 0 || p.is_alone(at));
    loop {
        while planner.pass(true) {}
        // Somebody waits in vain for a sibling.
        if planner.pass(false) {
            continue;
        }
        if !planner.make_parentless_one() {
            break;
        }
    }
    let missing = planner.missing();
    if missing.is_empty() {
        Ok(planner.steps)
    } else {
        Err(missing)
    }
}

#[derive(Clone, Debug)]
struct Made {
    groups: [u32; 4],
    session: u32,
}

struct Planner<'a> {
    tree: &'a [Unborn],
    places: BTreeMap<u32, usize>,
    children: Vec<Vec<usize>>,
    /// Those that share something, by what.
    sharing: BTreeMap<(Kind, u32), Vec<usize>>,
    /// What each has at first: its own, or what it carries to its children.
    first: Vec<[u32; 4]>,
    /// The session that each must be born into; `None` for any.
    born_in: Vec<Option<u32>>,
    made: Vec<Option<Made>>,
    /// What some process has by now, or will have once it leaves what it carries: it cannot begin
    /// with another one.
    begun: BTreeSet<(Kind, u32)>,
    steps: Vec<Step>,
}

impl<'a> Planner<'a> {
    fn new(tree: &'a [Unborn]) -> Self {
        let places: BTreeMap<u32, usize> =
            tree.iter().enumerate().map(|(i, p)| (p.pid, i)).collect();
        let mut children = vec![Vec::new(); tree.len()];
        let mut sharing: BTreeMap<(Kind, u32), Vec<usize>> = BTreeMap::new();
        for (at, process) in tree.iter().enumerate() {
            if let Some(&parent) = places.get(&process.parent) {
                children[parent].push(at);
            }
            for (kind, group) in KINDS.into_iter().zip(process.groups) {
                sharing.entry((kind, group)).or_default().push(at);
            }
        }
        sharing.retain(|_, members| members.len() > 1);
        let mut planner = Self {
            tree,
            places,
            children,
            sharing,
            first: tree.iter().map(|p| p.groups).collect(),
            born_in: vec![None; tree.len()],
            made: vec![None; tree.len()],
            begun: BTreeSet::new(),
            steps: Vec::new(),
        };
        for (at, process) in tree.iter().enumerate().rev() {
            // Children that stay where it was before it began a session.
            let before = |c: &usize| planner.born_in[*c].filter(|&sid| sid != process.pid);
            planner.born_in[at] = if process.leads_session() {
                planner.children[at].iter().find_map(before)
            } else {
                Some(process.sid)
            };
        }
        planner
    }

    /// Finds the processes that stand between others which share descriptors or directories, and
    /// have some of their own; also between `siblings` that share them among themselves.
    fn find_carriers(&mut self, siblings: bool) {
        /// Steps up the tree; no real program comes near it.
        const BUDGET: usize = 1 << 22;
        let mut budget = BUDGET;
        let mut below: BTreeMap<(Kind, u32), BTreeMap<usize, usize>> = BTreeMap::new();
        for (&(kind, group), members) in &self.sharing {
            let parent = self.tree[members[0]].parent;
            if !siblings && members.iter().all(|&m| self.tree[m].parent == parent) {
                continue;
            }
            let counts = below.entry((kind, group)).or_default();
            for &member in members.iter().filter(|_| kind.can_be_left()) {
                let mut at = Some(member);
                while let Some(place) = at {
                    *counts.entry(place).or_default() += 1;
                    at = self.places.get(&self.tree[place].parent).copied();
                    budget -= 1;
                    if budget == 0 {
                        return;
                    }
                }
            }
        }
        for (&(kind, group), counts) in &below {
            for (&place, &count) in counts {
                let own = (kind, self.tree[place].groups[kind as usize]);
                let carried = self.first[place][kind as usize] != own.1;
                let all = self.sharing.get(&own).map_or(1, Vec::len);
                let keeps = below.get(&own).and_then(|c| c.get(&place));
                let own_below = keeps.copied().unwrap_or(1) == all;
                if own.1 != group && !carried && own_below && self.is_between(place, count, counts)
                {
                    self.first[place][kind as usize] = group;
                    self.begun.insert(own);
                }
            }
        }
    }

    /// Whether members of a group are on several sides of a process; `counts` are the members at and
    /// below each.
    fn is_between(&self, place: usize, count: usize, counts: &BTreeMap<usize, usize>) -> bool {
        let of = |p: &usize| counts.get(p).copied().unwrap_or(0);
        let parted = !self.children[place].iter().any(|c| of(c) == count);
        let mut top = place;
        while let Some(&above) = self.places.get(&self.tree[top].parent) {
            top = above;
        }
        parted || count < of(&top)
    }

    fn is_alone(&self, at: usize) -> bool {
        let groups = KINDS.into_iter().zip(self.first[at]);
        groups
            .into_iter()
            .all(|group| !self.sharing.contains_key(&group))
    }

    /// What a process made by this one shares with it, if that is what it needs.
    fn shared(&self, at: usize, maker: Option<usize>) -> Option<u64> {
        let maker = maker.and_then(|m| self.made[m].as_ref());
        let mut flags = 0;
        for (kind, group) in KINDS.into_iter().zip(self.first[at]) {
            if maker.is_some_and(|m| m.groups[kind as usize] == group) {
                flags |= kind.flag();
            } else if self.begun.contains(&(kind, group)) {
                return None;
            }
        }
        let signals_alone = flags & Kind::Signals.flag() != 0 && flags & Kind::Memory.flag() == 0;
        (!signals_alone).then_some(flags)
    }

    fn make(&mut self, at: usize, maker: Maker, flags: u64) {
        let session = match maker {
            Maker::Us => 0,
            Maker::Parent(m) | Maker::Sibling(m) | Maker::Through(m) => {
                self.made[m].as_ref().map_or(0, |m| m.session)
            }
        };
        let groups = self.first[at];
        self.begun.extend(KINDS.into_iter().zip(groups));
        self.made[at] = Some(Made { groups, session });
        self.steps.push(Step::Make(at, maker, flags));
    }

    fn make_parentless(&mut self, wanted: impl Fn(&Self, usize) -> bool) -> bool {
        let mut any = false;
        for at in 0..self.tree.len() {
            let is_one = self.tree[at].parent == 0 && self.made[at].is_none();
            if is_one
                && wanted(self, at)
                && let Some(flags) = self.shared(at, None)
            {
                self.make(at, Maker::Us, flags);
                any = true;
            }
        }
        any
    }

    /// Makes one that shares, but with nobody who could make it.
    fn make_parentless_one(&mut self) -> bool {
        let of = |at: usize| self.tree[at].parent == 0 && self.made[at].is_none();
        let first = (0..self.tree.len()).find(|&at| of(at) && self.shared(at, None).is_some());
        first.is_some_and(|first| self.make_parentless(|_, at| at == first))
    }

    /// Lets everyone who is made do what it can; whether any could. Children of those made in
    /// passing are made in the same pass.
    fn pass(&mut self, patient: bool) -> bool {
        let is_made = |at: &usize| self.made[*at].is_some();
        let mut queue: VecDeque<usize> = (0..self.tree.len()).filter(is_made).collect();
        let mut any = false;
        while let Some(at) = queue.pop_front() {
            loop {
                let before = self.steps.len();
                self.make_children(at);
                self.make_siblings(at);
                let new = self.steps[before..].iter();
                queue.extend(new.filter_map(|step| match step {
                    Step::Make(made, ..) => Some(*made),
                    _ => None,
                }));
                self.change(at, patient);
                if self.steps.len() == before {
                    break;
                }
                any = true;
            }
        }
        any
    }

    fn make_children(&mut self, at: usize) {
        let children = std::mem::take(&mut self.children[at]);
        for &child in &children {
            if self.made[child].is_none()
                && self.session_fits(child, at)
                && let Some(flags) = self.shared(child, Some(at))
            {
                self.make(child, Maker::Parent(at), flags);
            }
        }
        self.children[at] = children;
    }

    /// Those beside this one that share something with it.
    fn mates(&self, at: usize) -> Vec<usize> {
        let groups = KINDS.into_iter().zip(self.tree[at].groups);
        let mates = groups
            .filter_map(|group| self.sharing.get(&group))
            .flatten();
        let parent = self.tree[at].parent;
        let beside = |m: &&usize| {
            let mate = &self.tree[**m];
            self.made[**m].is_none() && (mate.parent == 0 || mate.parent == parent)
        };
        let mates: BTreeSet<usize> = mates.filter(beside).copied().collect();
        mates.into_iter().collect()
    }

    fn make_siblings(&mut self, at: usize) {
        for mate in self.mates(at) {
            let (other, this) = (&self.tree[mate], &self.tree[at]);
            let maker = match other.parent {
                0 => Maker::Through(at),
                // It has the exit signal of its maker.
                _ if other.exit_signal == this.exit_signal => Maker::Sibling(at),
                _ => continue,
            };
            let session = self.made[at].as_ref().map_or(0, |m| m.session);
            let known = |sid: &u32| {
                let leader = self.places.get(sid);
                leader.is_some_and(|&l| self.tree[l].leads_session())
            };
            let fits = |sid| session == Some(sid).filter(known).unwrap_or(0);
            if self.born_in[mate].is_none_or(fits)
                && let Some(flags) = self.shared(mate, Some(at))
            {
                self.make(mate, maker, flags);
            }
        }
    }

    /// Whether a child is in its session when its parent makes it now. One of another session than
    /// its parent's stays where that was before.
    fn session_fits(&self, child: usize, parent: usize) -> bool {
        let parent_is = &self.tree[parent];
        let fits = |sid| self.has_begun(parent) == (sid == parent_is.pid);
        !parent_is.leads_session() || self.born_in[child].is_none_or(fits)
    }

    fn has_begun(&self, at: usize) -> bool {
        let made = self.made[at].as_ref();
        made.is_some_and(|m| m.session == self.tree[at].pid)
    }

    /// Begins the session of a process, or leaves what it shares, once nobody needs it otherwise.
    fn change(&mut self, at: usize, patient: bool) {
        let Some(now) = self.made[at].clone() else {
            return;
        };
        let process = &self.tree[at];
        let unmade = |c: &&usize| self.made[**c].is_none();
        let children: Vec<usize> = self.children[at].iter().filter(unmade).copied().collect();
        let mates = if patient { self.mates(at) } else { Vec::new() };
        let stays = |other: &usize| self.born_in[*other].is_some_and(|sid| sid != process.pid);
        if process.leads_session()
            && !self.has_begun(at)
            && !children.iter().chain(&mates).any(stays)
        {
            self.steps.push(Step::BeginSession(at));
            if let Some(made) = &mut self.made[at] {
                made.session = process.pid;
            }
        }
        let mut flags = 0;
        for kind in KINDS {
            let (has, own) = (now.groups[kind as usize], process.groups[kind as usize]);
            let needed = |c: &usize| self.first[*c][kind as usize] == has;
            if has != own && !children.iter().any(needed) {
                flags |= kind.flag();
                if let Some(made) = &mut self.made[at] {
                    made.groups[kind as usize] = own;
                }
            }
        }
        if flags != 0 {
            self.steps.push(Step::Leave(at, flags));
        }
    }

    /// Those that are not made, or are not what they are to be.
    fn missing(&self) -> Vec<usize> {
        let wrong = |at: &usize| {
            let process = &self.tree[*at];
            let sessions = !process.leads_session() || self.has_begun(*at);
            let made = self.made[*at].as_ref();
            !sessions || made.is_none_or(|m| m.groups != process.groups)
        };
        (0..self.tree.len()).filter(wrong).collect()
    }
}

#[cfg(test)]
mod tests;
