//! The ledger from rows that were read. They may be anybody's: all that `ledger` promises is checked.

use super::{Extent, Ledger, MAX_PAGES, Owner, State, check_name};
use crate::run::{PAGE, Pages, Run};

/// The last number that a file of an owner may have: nobody counts so far.
const MOST_FILES: u64 = i64::MAX as u64;

/// Rows as they were found on a medium, which may be anybody's.
#[derive(Debug, Default)]
pub struct Rows {
    /// By name.
    pub owners: Vec<(String, Owner)>,
    /// By number.
    pub extents: Vec<Extent>,
    /// Sorted by where they begin.
    pub dirty: Vec<Run>,
    /// The number of the next new extent.
    pub next: u64,
}

impl Ledger {
    /// The state that rows stand for, if they keep all that this file promises; else what is wrong.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn load(space: Run, rows: Rows) -> Result<Self, String> {
        let mut ledger = Self::new(space);
        ledger.dirty = Pages::default();
        let inside = |run: Run| {
            let end = run.start.checked_add(run.len);
            run.len > 0 && run.start >= space.start && end.is_some_and(|end| end <= space.end())
        };
        for (name, owner) in rows.owners {
            check_name(&name).map_err(|e| e.to_string())?;
            if owner.quota.is_some_and(|quota| quota > MAX_PAGES) || owner.generation > MOST_FILES {
                return Err(format!(
                    "{name} has a quota or a file of a number that there is not"
                ));
            }
            ledger.owners.insert(name, owner);
        }
        for extent in rows.extents {
            let id = extent.id;
            let wrong = |what: &str| Err(format!("extent {id} {what}"));
            let Some(owner) = ledger.owners.get(&extent.owner) else {
                return wrong("has an owner that is not there");
            };
            if id >= rows.next || extent.pages == 0 || extent.pages > MAX_PAGES {
                return wrong("has a number or a size that no extent has");
            }
            if owner.state == State::PagedOut && !extent.pieces.is_empty() {
                return wrong("has pages though its owner's contents are in a file");
            }
            let mut at = 0;
            for piece in &extent.pieces {
                let end = piece.at.checked_add(piece.run.len);
                if piece.at < at || end.is_none_or(|end| end > extent.pages) || !inside(piece.run) {
                    return wrong("has a piece out of order, or beyond its end or the pool's");
                }
                at = piece.at + piece.run.len;
                if piece.run.end() > extent.below {
                    return wrong("has a page above its limit");
                }
                if !ledger.buddy.take(piece.run) {
                    let place = piece.run.start * PAGE;
                    return wrong(&format!("has a page twice given, at or after byte {place}"));
                }
            }
            ledger.extents.insert(id, extent);
        }
        let mut end = 0;
        for run in rows.dirty {
            if !inside(run) || (end > 0 && run.start <= end) || !ledger.buddy.has(run) {
                let place = run.start.saturating_mul(PAGE);
                return Err(format!(
                    "what waits to be scrubbed at byte {place} is not free"
                ));
            }
            end = run.end();
            ledger.dirty.add(run);
        }
        for (name, owner) in &ledger.owners {
            let mut extents = ledger.extents_of(name).map(|extent| extent.pages);
            let sum = extents.try_fold(0u64, |sum, pages| sum.checked_add(pages));
            if sum.is_none_or(|sum| sum > owner.quota.unwrap_or(MAX_PAGES)) {
                return Err(format!("{name} was promised more than its quota"));
            }
        }
        ledger.next = rows.next;
        Ok(ledger)
    }
}
