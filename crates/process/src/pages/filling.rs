//! Pages of an address space that comes bit by bit ([`crate::restore::lazy::filling`]).
//!
//! # Rules
//! - Nothing is copied while the program runs as long as memory is registered with who serves it: the stop
//!   finds everything. What is missing then is what the epochs hold, and is not touched.
//! - Whatever has to be taken anew there (a mapping was moved, an epoch failed) is brought first.
//! - A registration of who serves is never ended by the tracker's own descriptor.
//! - Once nothing of a mapping is missing, the tracker takes it over as a whole, at a stop: to divide it
//!   would show to a program that moves it. It takes some milliseconds a GiB, so no more than
//!   [`AT_A_STOP`] at a time, none at a power event, and none that the stop may be too short for.

use super::{Changes, PAGE, PageTracker, PrivateArea, Span, drop_stored};
use crate::restore::lazy::filling::Filling;
use crate::target::Target;
use crate::track::Limit;
use outlive_linux::Errno;
use outlive_linux::pagemap::{self, Query};
use std::time::Duration;

/// How much is taken over at a stop, at most, unless it is one mapping, bytes.
const AT_A_STOP: u64 = 512 << 20;
/// What it may take, nanoseconds a page.
const A_PAGE_NS: u64 = 50;

impl PageTracker {
    /// Memory in these ranges is served, and tracked, by somebody else.
    pub(super) fn set_filling(&mut self, filling: Option<Filling>, later: &[Span]) {
        self.filling = filling;
        for span in later.iter().filter(|_| self.filling.is_some()) {
            self.served.insert(span.0 / PAGE, span.1 / PAGE);
        }
    }

    /// Who serves missing pages, as long as it matters.
    #[must_use]
    pub fn filling(&self) -> Option<&Filling> {
        self.filling.as_ref()
    }

    /// Whether memory may be registered with who serves it.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.filling.is_some() && !self.served.is_empty()
    }

    /// Where all of it is to be taken anew, and nothing is missing any more, the tracker begins as in any
    /// other process: what is large is copied while the program runs.
    pub fn let_go_served(&mut self) {
        if self.is_fresh() && self.filling.as_ref().is_some_and(Filling::is_over) {
            self.served.clear();
            self.filling = None;
        }
    }

    /// The next stop may be longer because memory is taken over.
    pub fn may_take_over(&mut self) {
        self.takes_over = true;
    }

    pub(super) fn is_served_at(&self, (start, end): Span) -> bool {
        self.served
            .within(start / PAGE, end / PAGE)
            .next()
            .is_some()
    }

    /// Where mappings were moved to, nothing is as the epochs have it.
    pub(super) fn follow_moves(&mut self, changes: &mut Changes) {
        let moved = self.filling.as_ref().map(Filling::moved);
        for (first, end) in moved.unwrap_or_default() {
            drop_stored(&mut self.stored, (first * PAGE, end * PAGE), changes);
            self.owed.insert(first, end);
            self.served.insert(first, end);
        }
    }

    /// Everything in an area counts as written.
    pub(super) fn begin_afresh(&mut self, (start, end): Span) {
        if self.is_served_at((start, end)) {
            self.owed.insert(start / PAGE, end / PAGE);
        } else if let Some(tracker) = &self.tracker {
            // An area that was never registered, or is gone: fresh in any case.
            let _ = tracker.unregister(start, end);
        }
    }

    /// Brings what is missing of what is owed in an area.
    pub(super) fn bring_owed(&mut self, area: &PrivateArea) -> Result<(), Errno> {
        if !self.is_served_at(area.span) {
            return Ok(());
        }
        // A marked hole looks like a page in swap.
        let marked = Query {
            any_of: pagemap::SWAPPED,
            ..super::below::UNWRITTEN
        };
        let (first, end) = (area.span.0 / PAGE, area.span.1 / PAGE);
        let owed: Vec<Span> = self.owed.within(first, end).collect();
        for (first, end) in owed {
            let (start, end) = (first * PAGE, end * PAGE);
            let Some(filling) = &self.filling else { break };
            filling.bring(start, end).map_err(|_| Errno::IO)?;
            let mut holes = Vec::new();
            self.pagemap
                .scan(start, end, marked, |r| holes.push((r.start, r.end)))?;
            holes
                .into_iter()
                .for_each(|(start, end)| filling.fill_holes(start, end));
        }
        Ok(())
    }

    /// Takes over what is not missing any more, after a pass over a program that stands still.
    pub fn take_over_served(&mut self, target: &Target, areas: &[PrivateArea], limit: &Limit) {
        let (Some(filling), Some(tracker)) = (&self.filling, &self.tracker) else {
            return;
        };
        let wanted = std::mem::take(&mut self.takes_over);
        let mut taken = 0;
        let (mut left, mut end_of_last) = (false, 0);
        for area in areas {
            let (start, end) = area.span;
            // What lies between mappings is nobody's any more.
            self.served.remove(end_of_last / PAGE, start / PAGE);
            end_of_last = end;
            if self
                .served
                .within(start / PAGE, end / PAGE)
                .next()
                .is_none()
            {
                continue;
            }
            let fits = taken == 0 || taken + (end - start) <= AT_A_STOP;
            let time = Duration::from_nanos((end - start) / PAGE * A_PAGE_NS);
            if !wanted || !fits || limit.left().is_some_and(|left| left < time) {
                left = true;
                continue;
            }
            match filling.release(start, end) {
                Ok(false) => {
                    left = true;
                    continue;
                }
                // It is registered with the tracker already.
                Err(_) => drop(self.served.remove(start / PAGE, end / PAGE)),
                Ok(true) => {
                    self.served.remove(start / PAGE, end / PAGE);
                    taken += end - start;
                    let mut done = tracker.register(start, end);
                    for (s, e) in self.stored.within(start / PAGE, end / PAGE) {
                        let span = (s * PAGE, e * PAGE);
                        done = done.and_then(|()| tracker.protect(span, true));
                    }
                    if let Err(e) = done {
                        tracing::debug!(target.pid, "{start:x}-{end:x} is not taken over: {e}");
                        let _ = tracker.unregister(start, end);
                    }
                }
            }
        }
        if !left {
            self.served.clear();
        }
        if self.served.is_empty() && filling.is_over() {
            self.filling = None;
        }
    }
}
