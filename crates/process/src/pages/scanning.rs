//! How a pass looks at one area: the quick way where it is safe, the sorts of pages where they matter.
//!
//! # Rules
//! - A scan that fails may have protected pages that it did not report: all of its area is fresh at the next pass.
//! - What is owed is looked at anew, but for whether it was written.
//! - Only pages that exist are protected, but for the holes of areas that have page tables in any case.

use super::{
    CLUSTER, Changes, DENSE_HOLES, DENSE_SHARE, GAP, MIDDLE_AREA, PAGE, PageTracker, PrivateArea,
    SMALL_AREA, Span, WRITTEN_ONLY, drop_stored, push_span,
};
use outlive_linux::Errno;
use outlive_linux::pagemap::{self, Query, Region};

impl PageTracker {
    pub(super) fn scan(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let (start, end) = area.span;
        self.resolve_doubts(area.span)?;
        if self.soft_dirty {
            self.scan_soft_dirty(area, changes)?;
        } else if self.tracker.is_none() {
            self.scan_sorts(area.span, area, changes, false)?;
        } else if self.unguarded.contains(&area.span) {
            self.scan_unguarded(area, changes)?;
        } else {
            self.scan_tracked(area, changes)?;
        }
        if !self.is_guarded(area.span) {
            return Ok(());
        }
        let guards = Query {
            all_of: pagemap::GUARD,
            report: pagemap::GUARD,
            ..Query::default()
        };
        let Self {
            pagemap,
            stored,
            guarded,
            ..
        } = self;
        guarded.retain(|at| !(start..end).contains(at));
        pagemap.scan(start, end, guards, |r| {
            drop_stored(stored, (r.start, r.end), changes);
            guarded.insert(r.start);
            push_span(&mut changes.guards, (r.start, r.end));
        })?;
        Ok(())
    }

    /// What was reported as written and could not be read is a guard, or was unmapped meanwhile, or
    /// is protected and the kernel shows it only to who traces the program (which is nobody while it
    /// runs). If it is still there, it was said to be written once and will not be again: the whole
    /// area begins afresh.
    fn resolve_doubts(&mut self, (start, end): Span) -> Result<(), Errno> {
        let within = self.doubtful.iter().filter(|&at| (start..end).contains(at));
        let doubtful: Vec<u64> = within.copied().collect();
        if self.tracker.is_none() || doubtful.is_empty() {
            return Ok(());
        }
        let exists = Query {
            all_of: pagemap::GUARD,
            inverted: pagemap::GUARD,
            any_of: pagemap::PRESENT | pagemap::SWAPPED,
            ..Query::default()
        };
        let mut found = false;
        for &at in &doubtful {
            self.pagemap.scan(at, at + PAGE, exists, |_| found = true)?;
            if found {
                self.begin_afresh((start, end));
                break;
            }
        }
        self.guarded.extend(doubtful);
        Ok(())
    }

    /// What is owed in an area is looked at anew, but for whether it was written: that was asked for
    /// before. What does not exist any more is absent.
    pub(super) fn scan_owed(
        &mut self,
        area: &PrivateArea,
        changes: &mut Changes,
    ) -> Result<(), Errno> {
        let exists = Query {
            any_of: pagemap::PRESENT | pagemap::SWAPPED | pagemap::GUARD,
            report: pagemap::FILE | pagemap::ZERO | pagemap::GUARD,
            ..Query::default()
        };
        let owed = self.owed.remove(area.span.0 / PAGE, area.span.1 / PAGE);
        if self.tracker.is_none() || self.unguarded.contains(&area.span) {
            // All that exists there is taken in any case.
            return Ok(());
        }
        for (i, &(first, end)) in owed.iter().enumerate() {
            let Self {
                pagemap, stored, ..
            } = self;
            let (first, end) = (first * PAGE, end * PAGE);
            let mut at = first;
            let found = pagemap.scan(first, end, exists, |r| {
                if r.categories == 0 {
                    drop_stored(stored, (at, r.start), changes);
                    push_span(changes.list(area), (r.start, r.end));
                    at = r.end;
                }
            });
            if let Err(e) = found {
                let rest = owed.get(i..).unwrap_or_default();
                rest.iter().for_each(|&(s, e)| self.owed.insert(s, e));
                return Err(e);
            }
            drop_stored(stored, (at, end), changes);
        }
        Ok(())
    }

    /// Whether who touches a hole waits: then none may be read, and none need be protected.
    pub(super) fn guards_holes(&self) -> bool {
        self.tracker.as_ref().is_some_and(|t| t.guards_holes())
    }

    pub(super) fn is_guarded(&self, (start, end): Span) -> bool {
        self.guarded.range(start..end).next().is_some()
    }

    /// A scan that fails may have protected pages that it did not report, because a mapping was
    /// replaced under it, again and again perhaps: all of the area is fresh at the next pass then.
    fn scan_tracked(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let scanned = self.scan_registered(area, changes);
        if scanned.is_err() {
            self.begin_afresh(area.span);
        }
        scanned
    }

    fn scan_registered(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let dense = self.dense.contains(&area.span) && !self.is_guarded(area.span);
        let known = self.must_be_registered(area).and_then(|()| {
            if dense {
                self.scan_dense(area, changes)
            } else {
                self.scan_sparse(area, changes)
            }
        });
        match (known, &self.tracker) {
            // Not registered: fresh, also where another mapping lay at the same place before.
            (Err(Errno::PERM), Some(tracker)) => {
                // Where only a part is not registered (it was replaced since the mappings were
                // read), what the other part had to tell has been asked for and is lost: all of
                // it must count as written.
                let _ = tracker.unregister(area.span.0, area.span.1);
                let registered = tracker.register(area.span.0, area.span.1);
                self.served.remove(area.span.0 / PAGE, area.span.1 / PAGE);
                self.dense.remove(&area.span);
                if registered == Err(Errno::INVAL) && tracker.is_synchronous() {
                    self.unguarded.insert(area.span);
                    return self.scan_unguarded(area, changes);
                }
                registered?;
                // A mapping that the kernel moved beside a registered one (`mremap`) takes the
                // registration from that, and leaves its pages protected: they would count as
                // clean. To end the registration lifts the protection of all of them.
                tracker.unregister(area.span.0, area.span.1)?;
                tracker.register(area.span.0, area.span.1)?;
                drop_stored(&mut self.stored, area.span, changes);
                self.scan_sparse(area, changes)
            }
            (known, _) => known,
        }
    }

    /// A scan that protects says that an area is not registered; where protecting is a call of its own,
    /// it says so only of pages that are there. So the first page is asked for: it counts as written
    /// from then on.
    fn must_be_registered(&self, area: &PrivateArea) -> Result<(), Errno> {
        let Some(tracker) = self.tracker.as_ref().filter(|t| t.is_synchronous()) else {
            return Ok(());
        };
        let first = (area.span.0, area.span.0 + PAGE);
        match tracker.protect(first, false) {
            Err(Errno::NOENT) => Err(Errno::PERM),
            other => other,
        }
    }

    /// All that exists in a mapping of a file, which cannot be guarded.
    fn scan_unguarded(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let listed_apart = PrivateArea {
            readable: false,
            ..*area
        };
        self.scan_sorts(area.span, &listed_apart, changes, false)
            .map(drop)
    }

    /// [`Pagemap::scan`], which protects what it finds.
    fn scan_protecting(
        &mut self,
        (start, end): Span,
        query: Query,
        mut visit: impl FnMut(&mut Self, Region),
    ) -> Result<(), Errno> {
        let synchronous = self.tracker.as_ref().filter(|t| t.is_synchronous());
        let synchronous = synchronous.filter(|_| query.protect).cloned();
        let protect = query.protect && synchronous.is_none();
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        let scanned = self
            .pagemap
            .scan(start, end, Query { protect, ..query }, |r| found.push(r));
        found.iter().for_each(|r| visit(self, *r));
        let gap = if self.stopped { GAP } else { 0 };
        let mut protected: Vec<Span> = Vec::new();
        for r in synchronous.iter().flat_map(|_| &found) {
            match protected.last_mut() {
                Some(last) if r.start - last.1 <= gap => last.1 = r.end,
                _ => protected.push((r.start, r.end)),
            }
        }
        self.found = found;
        scanned?;
        for span in protected {
            if let Some(tracker) = &synchronous {
                // Not registered: as the kernel says it of asynchronous protection.
                let unregistered = |e| if e == Errno::NOENT { Errno::PERM } else { e };
                tracker.protect(span, true).map_err(unregistered)?;
            }
            self.protected.push(span);
        }
        Ok(())
    }

    /// One quick scan, which protects holes too.
    fn scan_dense(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let list = changes.list(area);
        let query = Query {
            protect: true,
            ..WRITTEN_ONLY
        };
        self.scan_protecting(area.span, query, |_, r| {
            push_span(list, (r.start, r.end));
        })
    }

    /// A quick scan for where something was written, then the sorts of pages there.
    fn scan_sparse(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let mut spans = std::mem::take(&mut self.spans);
        spans.clear();
        let found = self
            .pagemap
            .scan(area.span.0, area.span.1, WRITTEN_ONLY, |r| {
                match spans.last_mut() {
                    Some(last) if r.start - last.1 <= CLUSTER => last.1 = r.end,
                    _ => spans.push((r.start, r.end)),
                }
            });
        let mut holes = 0;
        let scanned = found.and_then(|()| {
            // An area that is not registered must be noticed even where nothing was written.
            if spans.is_empty() {
                spans.push((area.span.0, area.span.0 + PAGE));
            }
            for &span in &spans {
                holes += self.scan_sorts(span, area, changes, true)?;
            }
            Ok(())
        });
        self.spans = spans;
        scanned?;
        // Holes are copied as zeros once: few of them, and none that only a slow read can reach.
        let length = area.span.1 - area.span.0;
        let few = holes <= DENSE_HOLES && holes <= length / DENSE_SHARE;
        let waits = self.guards_holes() || self.is_served_at(area.span);
        if area.anonymous && area.readable && few && !waits {
            self.dense.insert(area.span);
        }
        Ok(())
    }

    /// What sort each written page is; protects those that exist. Returns the bytes of holes.
    fn scan_sorts(
        &mut self,
        span: Span,
        area: &PrivateArea,
        changes: &mut Changes,
        tracked: bool,
    ) -> Result<u64, Errno> {
        if tracked && self.protects_holes(area) {
            return self.scan_sorts_at_once(span, area, changes);
        }
        let written = if tracked { pagemap::WRITTEN } else { 0 };
        // Before any of them is protected, which may reach across a hole.
        let holes = Query {
            all_of: pagemap::PRESENT | pagemap::SWAPPED | written,
            inverted: pagemap::PRESENT | pagemap::SWAPPED,
            ..Query::default()
        };
        let mut bytes = 0;
        let Self {
            pagemap, stored, ..
        } = self;
        pagemap.scan(span.0, span.1, holes, |r| {
            bytes += r.end - r.start;
            drop_stored(stored, (r.start, r.end), changes);
        })?;
        let exists = Query {
            all_of: written,
            any_of: pagemap::PRESENT | pagemap::SWAPPED | pagemap::GUARD,
            report: pagemap::FILE | pagemap::ZERO | pagemap::GUARD,
            protect: tracked,
            ..Query::default()
        };
        self.scan_protecting(span, exists, |this, r| {
            let span = (r.start, r.end);
            if r.categories != 0 {
                // A guard, a page of the file below, the zero page: no contents of its own.
                drop_stored(&mut this.stored, span, changes);
                if r.categories & pagemap::GUARD != 0 {
                    this.guarded.insert(r.start);
                }
            } else {
                push_span(changes.list(area), span);
            }
        })?;
        Ok(bytes)
    }

    /// The same where holes are protected too, so that the quick scan does not find them again and again;
    /// only at a stop, since the kernel looks at a large hole first and protects what is there then.
    fn scan_sorts_at_once(
        &mut self,
        span: Span,
        area: &PrivateArea,
        changes: &mut Changes,
    ) -> Result<u64, Errno> {
        let all = Query {
            all_of: pagemap::WRITTEN,
            report: pagemap::PRESENT
                | pagemap::SWAPPED
                | pagemap::FILE
                | pagemap::ZERO
                | pagemap::GUARD,
            protect: true,
            ..Query::default()
        };
        let mut holes = 0;
        self.scan_protecting(span, all, |this, r| {
            let span = (r.start, r.end);
            let is = |sort| r.categories & sort != 0;
            if is(pagemap::GUARD) {
                this.guarded.insert(r.start);
            } else if !is(pagemap::PRESENT | pagemap::SWAPPED) {
                holes += r.end - r.start;
            }
            let own = is(pagemap::PRESENT | pagemap::SWAPPED)
                && !is(pagemap::FILE | pagemap::ZERO | pagemap::GUARD);
            if own {
                push_span(changes.list(area), span);
            } else {
                // A hole, a guard, a page of the file below, the zero page: no contents of its own.
                drop_stored(&mut this.stored, span, changes);
            }
        })?;
        Ok(holes)
    }

    /// Protected holes cost page tables; a small area has them in any case.
    fn protects_holes(&self, area: &PrivateArea) -> bool {
        let asynchronous = self.tracker.as_ref().is_some_and(|t| !t.is_synchronous());
        let most = match area.anonymous {
            true if area.span.1 <= self.middle_end => MIDDLE_AREA,
            true => SMALL_AREA,
            false => DENSE_HOLES,
        };
        self.stopped && asynchronous && area.span.1 - area.span.0 <= most
    }
}
