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

mod load;

pub use load::Rows;

use crate::buddy::Buddy;
use crate::refused::Refused;
use crate::run::{PAGE, Pages, Run};
use std::collections::BTreeMap;

/// Most pieces that an extent may be in, so that a change of it fits into one transaction.
pub const MAX_PIECES: usize = 1024;

/// Most pages of an extent.
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
    /// How often they went there.
    pub generation: u64,
}

/// Pages of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// Which page of the extent the first is.
    pub at: u64,
    /// Where they are.
    pub run: Run,
}

/// A piece of the pool that was promised to an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its number, which no other extent of the pool has or had.
    pub id: u64,
    /// Whose it is.
    pub owner: String,
    /// How many pages it may have.
    pub pages: u64,
    /// All its pages lie before this page of the medium.
    pub below: u64,
    /// The pages that it has, by where they are in it.
    pub pieces: Vec<Piece>,
}

impl Extent {
    /// How many pages it has.
    #[must_use]
    pub fn populated(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.run.len).sum()
    }

    /// The first pages of `wanted` (a range of the extent), up to where it changes whether there are any:
    /// how many, and where they are.
    #[must_use]
    pub fn next(&self, wanted: Run) -> (u64, Option<Run>) {
        let after = self
            .pieces
            .partition_point(|piece| piece.at <= wanted.start);
        if let Some(piece) = after.checked_sub(1).and_then(|i| self.pieces.get(i))
            && wanted.start - piece.at < piece.run.len
        {
            let skipped = wanted.start - piece.at;
            let len = (piece.run.len - skipped).min(wanted.len);
            return (len, Some(Run::new(piece.run.start + skipped, len)));
        }
        let gap = self.pieces.get(after).map(|next| next.at - wanted.start);
        (gap.unwrap_or(wanted.len).min(wanted.len), None)
    }

    /// Puts a piece in where there is none; pieces that continue each other become one.
    fn insert(&mut self, piece: Piece) {
        self.pieces.push(piece);
        self.pieces.sort_unstable();
        let mut joined: Vec<Piece> = Vec::new();
        for piece in self.pieces.drain(..) {
            match joined.last_mut() {
                Some(last)
                    if last.at + last.run.len == piece.at && last.run.end() == piece.run.start =>
                {
                    last.run.len += piece.run.len;
                }
                _ => joined.push(piece),
            }
        }
        self.pieces = joined;
    }

    /// Takes a range of the extent out; gives where its pages were.
    fn cut(&mut self, range: Run) -> Vec<Run> {
        let (mut kept, mut gone) = (Vec::new(), Vec::new());
        for piece in self.pieces.drain(..) {
            let whole = Run::new(piece.at, piece.run.len);
            let Some(part) = whole.common(range) else {
                kept.push(piece);
                continue;
            };
            let place = |at: u64| piece.run.start + (at - piece.at);
            gone.push(Run::new(place(part.start), part.len));
            for rest in [
                Run::new(piece.at, part.start - piece.at),
                Run::new(part.end(), whole.end() - part.end()),
            ] {
                if rest.len > 0 {
                    let run = Run::new(place(rest.start), rest.len);
                    kept.push(Piece {
                        at: rest.start,
                        run,
                    });
                }
            }
        }
        self.pieces = kept;
        gone
    }
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
        let scrub: Vec<Run> = runs
            .iter()
            .flat_map(|run| self.dirty.within(*run))
            .collect();
        let changes = scrub.iter().map(|run| Change::Clean(*run)).collect();
        Plan { changes, scrub }
    }

    /// A new extent.
    ///
    /// # Errors
    /// [`Refused`]: no room, beyond the quota, a bad name, an owner whose contents are in its file.
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
        owner.quota = request.quota.or(owner.quota);
        owner.file = request.file.clone().unwrap_or(owner.file);
        let (promised, wanted) = (self.promised(&request.owner), request.pages);
        if wanted == 0 || wanted > MAX_PAGES - promised.min(MAX_PAGES) {
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
            place(&mut extent, 0, &runs)?;
        }
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
        place(&mut extent, range.start, &runs)?;
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
        if extent.pieces.len() > MAX_PIECES {
            return Err(Refused::Pieces);
        }
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

    /// The owner's contents are in its file now: its pages come back. With `orphan` the caller knows that
    /// whoever used them is gone.
    ///
    /// # Errors
    /// [`Refused`]: they are in use, or in the file already.
    pub fn page_out(&self, name: &str, generation: u64, orphan: bool) -> Result<Plan, Refused> {
        let owner = if orphan {
            self.owner(name)?
        } else {
            self.idle(name)?
        };
        let mut owner = owner.clone();
        if owner.state == State::PagedOut {
            return Err(Refused::PagedOut(name.to_owned()));
        }
        (owner.state, owner.generation) = (State::PagedOut, generation);
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
    /// [`Refused`]: no room; they are in the pool already; a range that is not the owner's.
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
        for (id, range) in ranges {
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
            place(extent, range.start, &runs)?;
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

/// Puts pages into an extent, from `at` on.
fn place(extent: &mut Extent, mut at: u64, runs: &[Run]) -> Result<(), Refused> {
    for run in runs {
        extent.insert(Piece { at, run: *run });
        at += run.len;
    }
    if extent.pieces.len() > MAX_PIECES {
        return Err(Refused::Pieces);
    }
    Ok(())
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
