//! The tables as they lie in the resilient heap, and what a change does to them.
//!
//! Rows are hostile until `Ledger::load` judged them.

use crate::ledger::{Change, Extent, Holder, Ledger, Owner, Piece, Rows, State};
use crate::run::{Pages, Run};
use resilient_heap::{Access, Error, PBTreeMap, PString, PVec, Persist, Snapshot, Tx};

/// The root of the tables.
#[derive(Persist)]
#[repr(C)]
pub(crate) struct Root<'h> {
    next: u64,
    owners: PBTreeMap<'h, PString<'h>, OwnerRow<'h>>,
    extents: PBTreeMap<'h, u64, ExtentRow<'h>>,
    dirty: PBTreeMap<'h, u64, u64>,
}

#[derive(Persist)]
#[repr(C)]
pub(crate) struct OwnerRow<'h> {
    /// In pages; `u64::MAX` for none.
    quota: u64,
    generation: u64,
    boot: [u8; 16],
    started: u64,
    pid: u32,
    /// 0 stopped, 1 running, 2 in the file.
    state: u32,
    file: PString<'h>,
}

#[derive(Persist)]
#[repr(C)]
pub(crate) struct ExtentRow<'h> {
    owner: PString<'h>,
    pages: u64,
    below: u64,
    pieces: PVec<'h, PieceRow>,
}

#[derive(Clone, Copy, Persist)]
#[repr(C)]
pub(crate) struct PieceRow {
    at: u64,
    start: u64,
    len: u64,
}

impl<'h> Root<'h> {
    /// Tables of a pool in which nothing was given away, and nothing is known to be zeros but `blank`.
    pub fn new(tx: &Tx<'h>, ledger: &Ledger) -> Result<Self, Error> {
        let mut dirty = PBTreeMap::new();
        for run in ledger.dirty().runs() {
            dirty.insert(tx, run.start, run.len)?;
        }
        Ok(Self {
            next: 1,
            owners: PBTreeMap::new(),
            extents: PBTreeMap::new(),
            dirty,
        })
    }

    /// All rows.
    pub fn rows(&self, s: &Snapshot<'h>) -> Result<Rows, Error> {
        let mut rows = Rows {
            next: self.next,
            ..Rows::default()
        };
        for row in self.owners.iter(s) {
            let (name, owner) = row?;
            rows.owners
                .push((name.as_str(s)?.to_owned(), owner.to_owner(s)?));
        }
        for row in self.extents.iter(s) {
            let (id, extent) = row?;
            let pieces = extent.pieces.as_slice(s)?.iter();
            rows.extents.push(Extent {
                id: *id,
                owner: extent.owner.as_str(s)?.to_owned(),
                pages: extent.pages,
                below: extent.below,
                pieces: pieces.map(|piece| piece.to_piece()).collect(),
            });
        }
        for row in self.dirty.iter(s) {
            let (start, len) = row?;
            rows.dirty.push(Run::new(*start, *len));
        }
        Ok(rows)
    }

    /// Does in the tables what `Ledger::apply` does; `dirty` is what is dirty before.
    pub fn apply(&mut self, tx: &Tx<'h>, changes: &[Change], dirty: &Pages) -> Result<(), Error> {
        let mut after = dirty.clone();
        for change in changes {
            match change {
                Change::Owner(name, owner) => {
                    let row = OwnerRow::new(tx, owner)?;
                    self.owners.insert(tx, PString::new(tx, name)?, row)?;
                }
                Change::NoOwner(name) => {
                    self.owners.remove(tx, name.as_str())?;
                }
                Change::Extent(extent) => {
                    let row = ExtentRow::new(tx, extent)?;
                    self.extents.insert(tx, extent.id, row)?;
                }
                Change::NoExtent(id) => {
                    self.extents.remove(tx, id)?;
                }
                Change::Dirty(run) => after.add(*run),
                Change::Clean(run) => after.remove(*run),
                Change::Next(next) => self.next = *next,
            }
        }
        for (start, len) in after.rows_from(dirty) {
            match len {
                Some(len) => self.dirty.insert(tx, start, len)?,
                None => self.dirty.remove(tx, &start)?,
            };
        }
        Ok(())
    }
}

impl<'h> OwnerRow<'h> {
    fn new(tx: &Tx<'h>, owner: &Owner) -> Result<Self, Error> {
        let nobody = Holder {
            boot: [0; 16],
            started: 0,
            pid: 0,
        };
        let (state, holder) = match owner.state {
            State::Stopped => (0, nobody),
            State::Running(holder) => (1, holder),
            State::PagedOut => (2, nobody),
        };
        Ok(Self {
            quota: owner.quota.unwrap_or(u64::MAX),
            generation: owner.generation,
            boot: holder.boot,
            started: holder.started,
            pid: holder.pid,
            state,
            file: PString::new(tx, &owner.file)?,
        })
    }

    fn to_owner(&self, access: &impl Access<'h>) -> Result<Owner, Error> {
        let (boot, started, pid) = (self.boot, self.started, self.pid);
        let state = match self.state {
            0 => State::Stopped,
            1 => State::Running(Holder { boot, started, pid }),
            2 => State::PagedOut,
            _ => {
                let what = "an owner of the pool is in a state that there is not";
                return Err(Error::Invalid { what, at: 0 });
            }
        };
        Ok(Owner {
            quota: Some(self.quota).filter(|quota| *quota != u64::MAX),
            state,
            file: self.file.as_str(access)?.to_owned(),
            generation: self.generation,
        })
    }
}

impl<'h> ExtentRow<'h> {
    fn new(tx: &Tx<'h>, extent: &Extent) -> Result<Self, Error> {
        let row = |piece: &Piece| PieceRow {
            at: piece.at,
            start: piece.run.start,
            len: piece.run.len,
        };
        let rows: Vec<PieceRow> = extent.pieces.iter().map(row).collect();
        let mut pieces = PVec::new();
        pieces.extend_from_slice(tx, &rows)?;
        Ok(Self {
            owner: PString::new(tx, &extent.owner)?,
            pages: extent.pages,
            below: extent.below,
            pieces,
        })
    }
}

impl PieceRow {
    fn to_piece(self) -> Piece {
        Piece {
            at: self.at,
            run: Run::new(self.start, self.len),
        }
    }
}
