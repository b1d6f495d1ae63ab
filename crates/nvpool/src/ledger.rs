//! What the pool has given out, to whom, and what it would answer. Pure: no medium, no clock.
//!
//! A change is planned against the ledger ([`Plan`]), made durable by the caller, and only then applied.
//!
//! # Invariants
//! - A page is free, or belongs to one piece of one extent. What is free is not written down: it is what
//!   no extent has, so that nothing can leak.
//! - A page that may hold what somebody wrote and that belongs to nobody is in `dirty`. A plan that gives
//!   pages names those of them that are dirty ([`Plan::scrub`]): they are zeroed, durably, before it counts.
//! - The sum of what the extents of an owner promise is within its quota.
//! - An owner whose contents are in its file has no pages.
//! - What an owner has is so few rows that one transaction can change all of them: it can be paged out, and
//!   back in.

mod load;
mod pieces;

pub use load::Rows;
pub use pieces::{EXTENT_ROWS, Extent, MAX_PIECES, Piece};

use crate::buddy::Buddy;
use crate::refused::Refused;
use crate::run::{PAGE, Pages, Run};
use pieces::{joined, place};
use std::collections::BTreeMap;

/// Most pages of an extent, and of an owner's together.
const MAX_PAGES: u64 = i64::MAX as u64 / PAGE;

/// Extents get more than they ask for at a time, where there is more, so that large pages can be used: 2 MiB.
const UNIT: u64 = 512;

/// Who uses the pages of an owner right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The boot during which it was started.
    pub boot: [u8; 16],
    /// When it was started, in the clock's ticks since that boot.
    pub started: u64,
    /// Its process.
    pub pid: u32,
}

/// Where the contents of an owner are, and whether they are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the pool, and nobody uses them.
    Stopped,
    /// In the pool, and in use.
    Running(Holder),
    /// In the owner's file.
    PagedOut,
}

/// Somebody who may have extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Most pages that all its extents may promise.
    pub quota: Option<u64>,
    /// See [`State`].
    pub state: State,
    /// Where its contents go; empty where that was not said.
    pub file: String,
    /// The number of the last file that was begun: what is in the file counts only with this number.
    pub generation: u64,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// For whom; an owner that is not known yet becomes one.
    pub owner: String,
    /// How many pages.
    pub pages: u64,
    /// Promised now, and given when they are written.
    pub thin: bool,
    /// All pages must lie before this page of the medium.
    pub below: Option<u64>,
    /// From now on the owner's quota, in pages.
    pub quota: Option<u64>,
    /// From now on where the owner's contents go when it is paged out.
    pub file: Option<String>,
}

/// One row that changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An owner, new or changed.
    Owner(String, Owner),
    /// An owner that goes.
    NoOwner(String),
    /// An extent, new or changed.
    Extent(Extent),
    /// An extent that goes.
    NoExtent(u64),
    /// Free pages that may hold anything.
    Dirty(Run),
    /// Pages that are zeros, or somebody's.
    Clean(Run),
    /// The number of the next new extent.
    Next(u64),
}

/// Changes that count together, once all of `scrub` is zeros on the medium.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The changes, in order.
    pub changes: Vec<Change>,
    /// Pages to be zeroed before.
    pub scrub: Vec<Run>,
}

impl Plan {
    /// Zeroes free pages, and notes it.
    pub(crate) fn zeroing(scrub: Vec<Run>) -> Self {
        let changes = scrub.iter().map(|run| Change::Clean(*run)).collect();
        Self { changes, scrub }
    }
}

/// The state of a pool.
#[derive(Clone, Debug)]
pub struct Ledger {
    space: Run,
    /// By name.
    pub(crate) owners: BTreeMap<String, Owner>,
    /// By number.
    pub(crate) extents: BTreeMap<u64, Extent>,
    pub(crate) dirty: Pages,
    buddy: Buddy,
    next: u64,
    /// Most pieces of an owner; see [`MAX_PIECES`].
    pub(crate) most: usize,
}

impl Ledger {
    /// A pool of these pages, all free. What is in them is not known.
    #[must_use]
    pub fn new(space: Run) -> Self {
        let mut ledger = Self {
            space,
            owners: BTreeMap::new(),
            extents: BTreeMap::new(),
            dirty: Pages::default(),
            buddy: Buddy::default(),
            next: 1,
            most: MAX_PIECES,
        };
        ledger.buddy.give(space);
        ledger.dirty.add(space);
        ledger
    }

    /// All pages that the pool may give out.
    #[must_use]
    pub fn space(&self) -> Run {
        self.space
    }

    /// What is free.
    #[must_use]
    pub fn free(&self) -> &Buddy {
        &self.buddy
    }

    /// Free pages that have to be zeroed before somebody gets them.
    #[must_use]
    pub fn dirty(&self) -> &Pages {
        &self.dirty
    }

    /// All owners, by name.
    pub fn owners(&self) -> impl Iterator<Item = (&str, &Owner)> {
        self.owners
            .iter()
            .map(|(name, owner)| (name.as_str(), owner))
    }

    /// All extents, by number.
    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.extents.values()
    }

    /// The extents of an owner.
    pub fn extents_of<'a>(&'a self, owner: &'a str) -> impl Iterator<Item = &'a Extent> {
        self.extents().filter(move |extent| extent.owner == owner)
    }

    /// Pages that the extents of an owner promise.
    #[must_use]
    pub fn promised(&self, owner: &str) -> u64 {
        self.extents_of(owner).map(|extent| extent.pages).sum()
    }

    /// An owner.
    ///
    /// # Errors
    /// [`Refused::NoOwner`]
    pub fn owner(&self, name: &str) -> Result<&Owner, Refused> {
        let owner = self.owners.get(name);
        owner.ok_or_else(|| Refused::NoOwner(name.to_owned()))
    }

    /// An extent.
    ///
    /// # Errors
    /// [`Refused::NoExtent`]
    pub fn extent(&self, id: u64) -> Result<&Extent, Refused> {
        self.extents.get(&id).ok_or(Refused::NoExtent(id))
    }

    fn no_room(&self, wanted: u64, below: u64) -> Refused {
        let zone = Run::new(0, below);
        let runs = self.buddy.runs().into_iter();
        Refused::NoRoom {
            wanted: wanted.saturating_mul(PAGE),
            free: runs
                .filter_map(|run| run.common(zone))
                .map(|run| run.len)
                .sum::<u64>()
                * PAGE,
            limited: below < self.space.end(),
        }
    }

    /// What of these pages has to be zeroed, and the rows that say that it was.
    fn giving(&self, runs: &[Run]) -> Plan {
        let scrub = runs.iter().flat_map(|run| self.dirty.within(*run));
        Plan::zeroing(scrub.collect())
    }

    fn too_many(&self, owner: &str) -> Refused {
        let (owner, most) = (owner.to_owned(), self.most);
        Refused::Pieces { owner, most }
    }

    /// Refuses an extent that takes more than before, and too much, in place of what it is now.
    fn check_rows(&self, extent: &Extent) -> Result<(), Refused> {
        let others = self.extents_of(&extent.owner);
        let others = others.filter(|other| other.id != extent.id);
        let all = others.map(Extent::rows).sum::<usize>() + extent.rows();
        let before = self.extents.get(&extent.id).map_or(0, Extent::rows);
        if extent.rows() > before && all > self.most {
            return Err(self.too_many(&extent.owner));
        }
        Ok(())
    }

    /// Refuses a file that another owner has, or that is written on the way to one.
    fn check_file(&self, owner: &str, file: &str) -> Result<(), Refused> {
        let beside = |a: &str, b: &str| {
            let rest = a.strip_prefix(b);
            rest.is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".new"))
        };
        let mut others = self.owners().filter(|(name, _)| *name != owner);
        let taken = others.find(|(_, other)| {
            let other = other.file.as_str();
            !other.is_empty() && (other == file || beside(other, file) || beside(file, other))
        });
        taken.map_or(Ok(()), |(other, _)| {
            let (file, owner) = (file.to_owned(), other.to_owned());
            Err(Refused::FileTaken { file, owner })
        })
    }

    /// A new extent.
    ///
    /// # Errors
    /// [`Refused`]: no room, beyond the quota, a bad name, an owner whose contents are in its file, a file that
    /// another owner has.
    pub fn allocate(&self, request: &Request) -> Result<(u64, Plan), Refused> {
        check_name(&request.owner)?;
        let mut owner = match self.owners.get(&request.owner) {
            Some(Owner {
                state: State::PagedOut,
                ..
            }) => {
                return Err(Refused::PagedOut(request.owner.clone()));
            }
            Some(owner) => owner.clone(),
            None => Owner {
                quota: None,
                state: State::Stopped,
                file: String::new(),
                generation: 0,
            },
        };
        if let Some(file) = &request.file {
            self.check_file(&request.owner, file)?;
        }
        owner.quota = request.quota.or(owner.quota);
        owner.file = request.file.clone().unwrap_or(owner.file);
        let (promised, wanted) = (self.promised(&request.owner), request.pages);
        let all = promised.checked_add(wanted).filter(|all| *all <= MAX_PAGES);
        if wanted == 0 || all.is_none() || owner.quota.is_some_and(|quota| quota > MAX_PAGES) {
            return Err(Refused::Size);
        }
        if let Some(quota) = owner.quota.filter(|quota| promised + wanted > *quota) {
            return Err(Refused::Quota {
                owner: request.owner.clone(),
                quota: quota * PAGE,
                promised: promised * PAGE,
                wanted: wanted * PAGE,
            });
        }
        let mut extent = Extent {
            id: self.next,
            owner: request.owner.clone(),
            pages: wanted,
            below: request.below.unwrap_or(u64::MAX),
            pieces: Vec::new(),
        };
        let mut plan = Plan::default();
        if !request.thin {
            let found = self.buddy.find(wanted, extent.below);
            let runs = found.ok_or_else(|| self.no_room(wanted, extent.below))?;
            plan = self.giving(&runs);
            place(&mut extent, 0, &runs);
        }
        self.check_rows(&extent)?;
        plan.changes
            .push(Change::Owner(request.owner.clone(), owner));
        plan.changes
            .push(Change::Next(self.next.checked_add(1).ok_or(Refused::Size)?));
        plan.changes.push(Change::Extent(extent));
        Ok((self.next, plan))
    }

    /// Pages for the first part of `wanted` (a range of the extent) that has none; `None` where all has.
    ///
    /// # Errors
    /// [`Refused`]: no room, beyond the extent, contents in the owner's file.
    pub fn populate(&self, id: u64, wanted: Run) -> Result<Option<Plan>, Refused> {
        let extent = self.in_pool(id, wanted)?;
        let mut at = wanted.start;
        let gap = loop {
            if at >= wanted.end() {
                return Ok(None);
            }
            match extent.next(Run::new(at, wanted.end() - at)) {
                (len, None) => break Run::new(at, len),
                (len, Some(_)) => at += len,
            }
        };
        // The whole unit around it, where it has nothing yet; else what is missing.
        let unit = Run::new(gap.start / UNIT * UNIT, UNIT);
        let unit = unit.common(Run::new(0, extent.pages)).unwrap_or(gap);
        let large = match extent.next(unit) {
            (len, None) if len == unit.len && gap.end() <= unit.end() => self
                .buddy
                .find(unit.len, extent.below)
                .map(|runs| (unit, runs)),
            _ => None,
        };
        let exact = || {
            let runs = self.buddy.find(gap.len, extent.below);
            runs.map(|runs| (gap, runs))
        };
        let (range, runs) = large
            .filter(|(_, runs)| runs.len() == 1)
            .or_else(exact)
            .ok_or_else(|| self.no_room(gap.len, extent.below))?;
        let mut plan = self.giving(&runs);
        let mut extent = extent.clone();
        place(&mut extent, range.start, &runs);
        self.check_rows(&extent)?;
        plan.changes.push(Change::Extent(extent));
        Ok(Some(plan))
    }

    /// An extent whose contents are in the pool, and which has this range.
    pub(crate) fn in_pool(&self, id: u64, range: Run) -> Result<&Extent, Refused> {
        let extent = self.extent(id)?;
        if self.owner(&extent.owner)?.state == State::PagedOut {
            return Err(Refused::PagedOut(extent.owner.clone()));
        }
        let end = range.start.checked_add(range.len);
        match end.filter(|end| *end <= extent.pages) {
            Some(_) => Ok(extent),
            None => Err(Refused::Beyond {
                extent: id,
                bytes: extent.pages * PAGE,
            }),
        }
    }

    /// A range of an extent gives its pages back, and reads as zeros.
    ///
    /// # Errors
    /// [`Refused`]: beyond the extent, in too many pieces, contents in the owner's file.
    pub fn discard(&self, id: u64, range: Run) -> Result<Plan, Refused> {
        let mut extent = self.in_pool(id, range)?.clone();
        let gone = extent.cut(range);
        self.check_rows(&extent)?;
        let mut plan = Plan::default();
        if !gone.is_empty() {
            plan.changes.push(Change::Extent(extent));
            plan.changes.extend(gone.into_iter().map(Change::Dirty));
        }
        Ok(plan)
    }

    fn idle(&self, name: &str) -> Result<&Owner, Refused> {
        let owner = self.owner(name)?;
        match owner.state {
            State::Running(holder) => Err(Refused::Running(name.to_owned(), holder.pid)),
            State::Stopped | State::PagedOut => Ok(owner),
        }
    }

    /// An extent comes back, with all its pages.
    ///
    /// # Errors
    /// [`Refused`]: it is not there, or in use, or what it held is in the owner's file.
    pub fn release(&self, id: u64) -> Result<Plan, Refused> {
        let extent = self.extent(id)?;
        if self.idle(&extent.owner)?.state == State::PagedOut {
            return Err(Refused::PagedOut(extent.owner.clone()));
        }
        let mut changes = vec![Change::NoExtent(id)];
        changes.extend(extent.pieces.iter().map(|piece| Change::Dirty(piece.run)));
        let scrub = Vec::new();
        Ok(Plan { changes, scrub })
    }

    /// The oldest extent of an owner comes back, or, where it has none, the owner goes: `None`.
    ///
    /// # Errors
    /// [`Refused`]: it is not there, or in use.
    pub fn release_owner(&self, name: &str) -> Result<(Plan, Option<u64>), Refused> {
        self.idle(name)?;
        let Some(extent) = self.extents_of(name).next() else {
            let changes = vec![Change::NoOwner(name.to_owned())];
            return Ok((
                Plan {
                    changes,
                    scrub: Vec::new(),
                },
                None,
            ));
        };
        let mut changes = vec![Change::NoExtent(extent.id)];
        changes.extend(extent.pieces.iter().map(|piece| Change::Dirty(piece.run)));
        Ok((
            Plan {
                changes,
                scrub: Vec::new(),
            },
            Some(extent.id),
        ))
    }

    /// An owner that may be paged out. With `orphan` the caller knows that whoever used its contents is gone.
    fn leaving(&self, name: &str, orphan: bool) -> Result<Owner, Refused> {
        let owner = match orphan {
            true => self.owner(name)?,
            false => self.idle(name)?,
        };
        if owner.state == State::PagedOut {
            return Err(Refused::PagedOut(name.to_owned()));
        }
        Ok(owner.clone())
    }

    /// The number of the next file of an owner. The plan notes it, and counts before the file has it: so no two
    /// files ever have the same one, whatever became of the first. `orphan` as for [`Ledger::page_out`].
    ///
    /// # Errors
    /// [`Refused`]: its contents are in use, in the file already, or in more pieces than a transaction moves.
    pub fn number_file(&self, name: &str, orphan: bool) -> Result<(u64, Plan), Refused> {
        let mut owner = self.leaving(name, orphan)?;
        if self.extents_of(name).map(Extent::rows).sum::<usize>() > self.most {
            return Err(self.too_many(name));
        }
        owner.generation = owner.generation.checked_add(1).ok_or(Refused::Size)?;
        let generation = owner.generation;
        let changes = vec![Change::Owner(name.to_owned(), owner)];
        let scrub = Vec::new();
        Ok((generation, Plan { changes, scrub }))
    }

    /// The owner's contents are in its file now: its pages come back. With `orphan` the caller knows that
    /// whoever used them is gone.
    ///
    /// # Errors
    /// [`Refused`]: they are in use, or in the file already.
    pub fn page_out(&self, name: &str, orphan: bool) -> Result<Plan, Refused> {
        let mut owner = self.leaving(name, orphan)?;
        owner.state = State::PagedOut;
        let mut changes = vec![Change::Owner(name.to_owned(), owner)];
        for extent in self.extents_of(name) {
            let dirty = extent.pieces.iter().map(|piece| Change::Dirty(piece.run));
            changes.extend(dirty);
            let mut empty = extent.clone();
            empty.pieces.clear();
            changes.push(Change::Extent(empty));
        }
        Ok(Plan {
            changes,
            scrub: Vec::new(),
        })
    }

    /// Where the contents of an owner go that come back from its file: `ranges` of its extents. The first plan
    /// says that anything may be in these pages, and counts before they are written; the second one makes
    /// them the owner's.
    ///
    /// # Errors
    /// [`Refused`]: no room, or only in too many pieces; they are in the pool already; a range that is not the
    /// owner's.
    pub fn page_in(&self, name: &str, ranges: &[(u64, Run)]) -> Result<(Plan, Plan), Refused> {
        let mut owner = self.owner(name)?.clone();
        if owner.state != State::PagedOut {
            return Err(Refused::InPool(name.to_owned()));
        }
        owner.state = State::Stopped;
        let (mut before, mut after) = (Plan::default(), Plan::default());
        after.changes.push(Change::Owner(name.to_owned(), owner));
        let mut buddy = self.buddy.clone();
        let mut extents: BTreeMap<u64, Extent> = BTreeMap::new();
        for (id, range) in &joined(ranges) {
            let known = self.extent(*id)?;
            let inside = range.start.checked_add(range.len);
            if known.owner != name || inside.is_none_or(|end| end > known.pages) {
                return Err(Refused::NoExtent(*id));
            }
            let extent = extents.entry(*id).or_insert_with(|| known.clone());
            if range.len == 0 || extent.next(*range) != (range.len, None) {
                return Err(Refused::NoExtent(*id));
            }
            let found = buddy.find(range.len, extent.below);
            let runs = found.ok_or_else(|| self.no_room(range.len, extent.below))?;
            for run in &runs {
                buddy.take(*run);
                before.changes.push(Change::Dirty(*run));
                after.changes.push(Change::Clean(*run));
            }
            place(extent, range.start, &runs);
        }
        let same = self
            .extents_of(name)
            .filter(|e| !extents.contains_key(&e.id));
        if same
            .chain(extents.values())
            .map(Extent::rows)
            .sum::<usize>()
            > self.most
        {
            return Err(self.too_many(name));
        }
        after
            .changes
            .extend(extents.into_values().map(Change::Extent));
        Ok((before, after))
    }

    /// An owner's contents are in use from now on, or no longer.
    ///
    /// # Errors
    /// [`Refused`]: they are in use by somebody else, or in the owner's file.
    pub fn hold(&self, name: &str, holder: Option<Holder>) -> Result<Plan, Refused> {
        let mut owner = self.owner(name)?.clone();
        owner.state = match (owner.state, holder) {
            (State::PagedOut, _) => return Err(Refused::PagedOut(name.to_owned())),
            (State::Running(other), Some(holder)) if other != holder => {
                return Err(Refused::Running(name.to_owned(), other.pid));
            }
            (_, Some(holder)) => State::Running(holder),
            (_, None) => State::Stopped,
        };
        let changes = vec![Change::Owner(name.to_owned(), owner)];
        Ok(Plan {
            changes,
            scrub: Vec::new(),
        })
    }

    /// Takes over what is durable. `false` where a page would have two owners: then the plan was not
    /// made for this state.
    #[must_use]
    pub fn apply(&mut self, changes: Vec<Change>) -> bool {
        let mut sound = true;
        for change in changes {
            match change {
                Change::Owner(name, owner) => drop(self.owners.insert(name, owner)),
                Change::NoOwner(name) => drop(self.owners.remove(&name)),
                Change::Extent(extent) => {
                    self.take_back(extent.id);
                    let mut pieces = extent.pieces.iter();
                    sound &= pieces.all(|piece| self.buddy.take(piece.run));
                    self.extents.insert(extent.id, extent);
                }
                Change::NoExtent(id) => self.take_back(id),
                Change::Dirty(run) => self.dirty.add(run),
                Change::Clean(run) => self.dirty.remove(run),
                Change::Next(next) => self.next = next,
            }
        }
        sound
    }

    fn take_back(&mut self, id: u64) {
        for piece in self
            .extents
            .remove(&id)
            .into_iter()
            .flat_map(|old| old.pieces)
        {
            self.buddy.give(piece.run);
        }
    }
}

/// A name is shown, and stands in files: it must be harmless there.
fn check_name(name: &str) -> Result<(), Refused> {
    let fits = (1..=64).contains(&name.len());
    let plain = |c: char| c.is_alphanumeric() || "-_.:@".contains(c);
    if fits && name.chars().all(plain) {
        return Ok(());
    }
    Err(Refused::Name(name.to_owned()))
}

#[cfg(test)]
mod tests;
