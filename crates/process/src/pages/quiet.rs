//! Areas in which a pass has nothing to do.
//!
//! A program has a hundred mappings and more, most of them parts of libraries that nobody writes to. To
//! ask the kernel about each takes 2 µs a question, and three questions. So those between which nothing
//! else is mapped are asked about together: whether anything was written since it was protected, and
//! whether anything that the epochs hold above a file gave way to it ([`super::below`]).
//!
//! # Rules
//! - An area is quiet only if all of it is registered; where the kernel says that something in a group is
//!   not, each half of the group is asked about, and so on.
//! - An area with anything owed, in doubt, or guarded is not quiet.
//! - The second question comes after the first: what is protected by then stays so.

use super::below::UNWRITTEN;
use super::{CLUSTER, MIDDLE_AREA, PAGE, PageTracker, PrivateArea, Span, WRITTEN_ONLY};
use outlive_linux::Errno;
use outlive_linux::pagemap::{self, Query};

impl PageTracker {
    /// Which of the areas need no look of their own.
    pub(super) fn quiet(&mut self, areas: &[PrivateArea]) -> Vec<bool> {
        let mut quiet = vec![false; areas.len()];
        if self.stored.is_empty() {
            // Nothing is registered, or next to nothing.
            return quiet;
        }
        let asynchronous = self.tracker.as_ref().is_some_and(|t| !t.is_synchronous());
        let mut at = 0;
        while asynchronous && at < areas.len() {
            let rest = areas.get(at..).unwrap_or_default();
            let group = rest.get(..self.group(rest)).unwrap_or_default();
            let answers = quiet.get_mut(at..at + group.len()).unwrap_or_default();
            self.ask_halves(group, answers);
            at += group.len().max(1);
        }
        quiet
    }

    /// How many areas from the first on have nothing else between them and may be quiet.
    fn group(&self, areas: &[PrivateArea]) -> usize {
        let mut first = true;
        let together = areas.iter().take_while(|area| {
            (std::mem::take(&mut first) || area.beside) && self.may_be_quiet(area)
        });
        together.count()
    }

    /// Asks about a group; where that fails, about each half of it.
    fn ask_halves(&mut self, group: &[PrivateArea], quiet: &mut [bool]) {
        if self.ask_together(group, quiet).is_ok() {
            return;
        }
        quiet.fill(false);
        if group.len() > 1 {
            let (left, right) = group.split_at(group.len() / 2);
            let (left_quiet, right_quiet) = quiet.split_at_mut(left.len());
            self.ask_halves(left, left_quiet);
            self.ask_halves(right, right_quiet);
        }
    }

    fn may_be_quiet(&self, area: &PrivateArea) -> bool {
        let (start, end) = area.span;
        // Scanned once, and not asked about before.
        let large = end - start > MIDDLE_AREA && self.dense.contains(&area.span);
        let owed = self.owed.within(start / PAGE, end / PAGE).next().is_some();
        let doubtful = self.doubtful.iter().any(|at| (start..end).contains(at));
        // What is half made must be looked for.
        let half_made = self.stopped && self.at_fault && !area.anonymous;
        !large && !owed && !doubtful && !half_made && !self.is_guarded(area.span)
    }

    fn ask_together(&mut self, group: &[PrivateArea], quiet: &mut [bool]) -> Result<(), Errno> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            return Ok(());
        };
        quiet.fill(true);
        let written = Query {
            registered_only: true,
            ..WRITTEN_ONLY
        };
        let all = (first.span.0, last.span.1);
        self.pagemap.scan(all.0, all.1, written, |r| {
            wake(group, quiet, (r.start, r.end));
        })?;
        let gave_way = Query {
            any_of: pagemap::FILE | pagemap::SWAPPED,
            ..UNWRITTEN
        };
        let mut spans: Vec<Span> = Vec::new();
        for (area, _) in group.iter().zip(&*quiet).filter(|(_, quiet)| **quiet) {
            for span in self.held_above_a_file(area) {
                match spans.last_mut() {
                    Some(last) if span.0 - last.1 <= CLUSTER => last.1 = span.1,
                    _ => spans.push(span),
                }
            }
        }
        for span in spans {
            let stored = &self.stored;
            self.pagemap.scan(span.0, span.1, gave_way, |r| {
                for (s, e) in stored.within(r.start / PAGE, r.end / PAGE) {
                    wake(group, quiet, (s * PAGE, e * PAGE));
                }
            })?;
        }
        Ok(())
    }
}

/// The areas that a span touches need a look.
fn wake(group: &[PrivateArea], quiet: &mut [bool], (start, end): Span) {
    let from = group.partition_point(|area| area.span.1 <= start);
    for (area, quiet) in group.iter().zip(quiet).skip(from) {
        if area.span.0 >= end {
            break;
        }
        *quiet = false;
    }
}
