//! Private pages that gave way to the file below.
//!
//! Where a mapping has a file (or a memfd) below, the kernel keeps the protection of a page that was
//! given back (`MADV_DONTNEED`): the page map calls it swapped and not written, and once it was read
//! a page of the file that was not written. So what the epochs hold there is asked for once more, by
//! sort, which takes about 30 ns a page.
//!
//! # Rules
//! - What is called swapped is brought in first: only then it shows whether it is a page of the
//!   program's own or one of the file. What was in swap in truth is in memory then.
//! - What cannot be brought in though the program stands still lies beyond the end of its file: there
//!   is no page any more. (A running program may be hidden from us: that is left to the stop.)
//! - Who writes to a page that was given back faults twice: first the kernel makes a copy of the page
//!   of the file, *which is protected as the old one was*, then it lifts the protection. A thread that
//!   is stopped in between leaves a page of the program's own that looks unwritten and is not what
//!   the epochs hold. So where one stands at an instruction that faulted, all that the epochs hold
//!   above files is taken anew. (Where a signal came in between, its handler runs first, and a stop
//!   within that is not told apart: what the page held before it was given back comes back.)

use super::{CLUSTER, Changes, PAGE, PageTracker, PrivateArea, Span, drop_stored, push_span};
use outlive_linux::Errno;
use outlive_linux::pagemap::{self, Query};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Pages that were not written since they were protected.
pub(super) const UNWRITTEN: Query = Query {
    all_of: pagemap::WRITTEN,
    inverted: pagemap::WRITTEN,
    any_of: 0,
    report: 0,
    protect: false,
    registered_only: false,
};

impl PageTracker {
    /// Where the epochs hold, or are owed, pages of an area that may give way to a file.
    pub(super) fn held_above_a_file(&self, area: &PrivateArea) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        if area.anonymous || self.tracker.is_none() || self.unguarded.contains(&area.span) {
            return spans;
        }
        let (first, end) = (area.span.0 / PAGE, area.span.1 / PAGE);
        let mut held = self.stored.clone_within(first, end);
        for (s, e) in self.owed.within(first, end) {
            held.insert(s, e);
        }
        for (s, e) in held.iter().map(|(s, e)| (s * PAGE, e * PAGE)) {
            match spans.last_mut() {
                Some(last) if s - last.1 <= CLUSTER => last.1 = e,
                _ => spans.push((s, e)),
            }
        }
        spans
    }

    /// Brings in what the page map calls swapped. This comes after the scan that protects, which may
    /// protect what was given back before: then it is called swapped, too.
    pub(super) fn bring_in(&mut self, area: &PrivateArea) -> Result<(), Errno> {
        self.beyond.clear();
        let swapped = Query {
            any_of: pagemap::SWAPPED,
            ..UNWRITTEN
        };
        let mut found = Vec::new();
        for (start, end) in self.held_above_a_file(area) {
            self.pagemap
                .scan(start, end, swapped, |r| found.push((r.start, r.end)))?;
        }
        if found.is_empty() {
            return Ok(());
        }
        let Ok(mem) = File::open(format!("/proc/{}/mem", self.pid)) else {
            return if self.stopped {
                Err(Errno::ACCESS)
            } else {
                Ok(())
            };
        };
        for at in found
            .iter()
            .flat_map(|&(s, e)| (s..e).step_by(PAGE as usize))
        {
            if mem.read_exact_at(&mut [0], at).is_err() && self.stopped {
                self.beyond.push(at);
            }
        }
        Ok(())
    }

    /// What the epochs hold and what is a page of the file now is absent.
    pub(super) fn drop_given_way(
        &mut self,
        area: &PrivateArea,
        changes: &mut Changes,
    ) -> Result<(), Errno> {
        let given_way = Query {
            any_of: pagemap::FILE | pagemap::SWAPPED,
            report: pagemap::FILE,
            ..UNWRITTEN
        };
        for at in std::mem::take(&mut self.beyond) {
            drop_stored(&mut self.stored, (at, at + PAGE), changes);
        }
        for (start, end) in self.held_above_a_file(area) {
            let Self {
                pagemap,
                stored,
                stopped,
                ..
            } = self;
            pagemap.scan(start, end, given_way, |r| {
                if r.categories & pagemap::FILE != 0 {
                    drop_stored(stored, (r.start, r.end), changes);
                } else if *stopped {
                    // Swapped again at once: whatever it is, it is what the program would read, and
                    // cannot be left to be copied behind.
                    for (s, e) in stored.within(r.start / PAGE, r.end / PAGE) {
                        push_span(&mut changes.unreadable, (s * PAGE, e * PAGE));
                    }
                }
            })?;
        }
        self.take_half_made(area, changes)
    }

    /// Pages of the program's own that look unwritten, where one of them may be a new one.
    fn take_half_made(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        if !self.stopped || !self.at_fault {
            return Ok(());
        }
        let own = Query {
            all_of: pagemap::WRITTEN | pagemap::FILE | pagemap::PRESENT,
            inverted: pagemap::WRITTEN | pagemap::FILE,
            ..UNWRITTEN
        };
        for (start, end) in self.held_above_a_file(area) {
            let Self {
                pagemap, stored, ..
            } = self;
            pagemap.scan(start, end, own, |r| {
                for (s, e) in stored.within(r.start / PAGE, r.end / PAGE) {
                    push_span(changes.list(area), (s * PAGE, e * PAGE));
                }
            })?;
        }
        Ok(())
    }
}
