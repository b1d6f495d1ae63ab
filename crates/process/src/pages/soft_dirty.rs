//! Written pages by soft-dirty bits ([`outlive_linux::soft_dirty`]), for kernels that have no
//! asynchronous write protection (before Linux 6.7).
//!
//! # Rules
//! - The bits are cleared at a stop, after all were read: nothing is written in between. While the
//!   program runs they are cleared only before the first copy of a process, which takes all that
//!   exists in any case. So a further pass over a running program finds again what the one before
//!   found, and nothing is gained by it.
//! - A page is taken if it carries the bit; if the epochs so far do not hold it, or are owed it; or if
//!   it is in memory and not mapped here alone. The last is for the zero page, which comes into the
//!   place of a page that was given back and then read, does not carry the bit, and looks like a page
//!   that is shared with a child.
//! - All entries of the page map are read: about 20 ns a page, holes too, where asynchronous write
//!   protection takes 1 ns.

use super::{Changes, PAGE, PageTracker, PrivateArea, drop_stored, push_span};
use outlive_linux::pagemap::{ALONE, FILE, GUARD, PRESENT, Query, Region, SOFT_DIRTY, SWAPPED};
use outlive_linux::{Errno, soft_dirty};

const EVERYTHING: Query = Query {
    all_of: 0,
    inverted: 0,
    any_of: 0,
    report: PRESENT | SWAPPED | FILE | GUARD | ALONE | SOFT_DIRTY,
    protect: false,
    registered_only: false,
};

/// What becomes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lot {
    /// It has no contents of its own.
    None,
    /// It is a guard.
    Guard,
    /// It is taken.
    Taken,
    /// It is taken where the epochs so far do not hold it.
    Kept,
}

fn lot(categories: u64) -> Lot {
    let has = |category| categories & category != 0;
    if has(GUARD) {
        Lot::Guard
    } else if !has(PRESENT | SWAPPED) || has(FILE) {
        Lot::None
    } else if has(SOFT_DIRTY) || has(PRESENT) && !has(ALONE) {
        Lot::Taken
    } else {
        Lot::Kept
    }
}

impl PageTracker {
    /// Before a pass over a program that may run.
    pub(super) fn begin_soft_dirty(&self) -> Result<(), Errno> {
        if self.soft_dirty && !self.stopped && self.is_fresh() {
            soft_dirty::clear(self.pid)?;
        }
        Ok(())
    }

    /// After a pass.
    pub(super) fn end_soft_dirty(&self) -> Result<(), Errno> {
        if self.soft_dirty && self.stopped {
            soft_dirty::clear(self.pid)?;
        }
        Ok(())
    }

    pub(super) fn scan_soft_dirty(
        &mut self,
        area: &PrivateArea,
        changes: &mut Changes,
    ) -> Result<(), Errno> {
        let (first, end) = (area.span.0 / PAGE, area.span.1 / PAGE);
        let mut held = self.stored.clone_within(first, end);
        for (s, e) in self.owed.remove(first, end) {
            held.remove(s, e);
        }
        let Self {
            pagemap,
            stored,
            guarded,
            ..
        } = self;
        pagemap.entries(area.span.0, area.span.1, EVERYTHING, |r: Region| {
            let span = (r.start, r.end);
            match lot(r.categories) {
                Lot::Guard => {
                    drop_stored(stored, span, changes);
                    guarded.insert(r.start);
                }
                Lot::None => drop_stored(stored, span, changes),
                Lot::Taken => push_span(changes.list(area), span),
                Lot::Kept => {
                    let mut at = r.start;
                    for (s, e) in held.within(r.start / PAGE, r.end / PAGE) {
                        if at < s * PAGE {
                            push_span(changes.list(area), (at, s * PAGE));
                        }
                        at = e * PAGE;
                    }
                    if at < r.end {
                        push_span(changes.list(area), (at, r.end));
                    }
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_are_surely_unwritten_are_kept() {
        assert_eq!(lot(0), Lot::None);
        assert_eq!(lot(SOFT_DIRTY), Lot::None, "a hole in a new mapping");
        assert_eq!(lot(PRESENT | FILE | ALONE), Lot::None);
        assert_eq!(lot(PRESENT | FILE | SOFT_DIRTY), Lot::None);
        assert_eq!(lot(GUARD), Lot::Guard);
        assert_eq!(lot(PRESENT | ALONE | SOFT_DIRTY), Lot::Taken);
        assert_eq!(lot(PRESENT), Lot::Taken, "the zero page, or a shared one");
        assert_eq!(lot(SWAPPED | SOFT_DIRTY), Lot::Taken);
        assert_eq!(lot(PRESENT | ALONE), Lot::Kept);
        assert_eq!(lot(SWAPPED), Lot::Kept);
    }
}
