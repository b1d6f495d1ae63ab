//! An extent: which of its pages it has, and where they are. Pure.

use crate::run::Run;

/// Most pieces that all extents of an owner may be in, with [`EXTENT_ROWS`] for each extent. A pool with a
/// small log has fewer.
pub const MAX_PIECES: usize = 1024;

/// What an extent takes of a transaction, in pieces, beside its pieces.
pub const EXTENT_ROWS: usize = 4;

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

    /// What it takes of a transaction, in pieces.
    pub(super) fn rows(&self) -> usize {
        self.pieces.len().saturating_add(EXTENT_ROWS)
    }

    /// Puts a piece in where there is none; pieces that continue each other become one.
    pub(super) fn insert(&mut self, piece: Piece) {
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
    pub(super) fn cut(&mut self, range: Run) -> Vec<Run> {
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

/// Puts pages into an extent, from `at` on.
pub(super) fn place(extent: &mut Extent, mut at: u64, runs: &[Run]) {
    for run in runs {
        extent.insert(Piece { at, run: *run });
        at += run.len;
    }
}

/// Ranges of extents, where those that continue each other are one: it may find one place.
pub(super) fn joined(ranges: &[(u64, Run)]) -> Vec<(u64, Run)> {
    let mut all: Vec<(u64, Run)> = Vec::new();
    for (id, range) in ranges {
        let whole = all.last_mut().filter(|(last, _)| last == id);
        let whole = whole.filter(|(_, run)| run.start.checked_add(run.len) == Some(range.start));
        match whole.and_then(|(_, run)| Some((run.len.checked_add(range.len)?, run))) {
            Some((len, run)) => run.len = len,
            None => all.push((*id, *range)),
        }
    }
    all
}
