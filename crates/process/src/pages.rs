//! Which pages changed, and their contents.
//!
//! Private pages of a process are tracked by asynchronous write protection: `PAGEMAP_SCAN` reports
//! what was written and protects it again in one step. Pages in shared mappings of files belong to
//! the files. Older kernels have soft-dirty bits instead ([`soft_dirty`]).
//!
//! # What a pass reports
//! - *Written* pages that exist: their contents go into the epoch.
//! - Pages that the epochs so far hold and that exist no more (`MADV_DONTNEED`, or the mapping
//!   went away): they read as what lies below the mapping again, and must be said to be *absent*,
//!   or a restore would bring old data back. Above a file that takes a look of its own.
//! - A mapping that is not registered yet is *fresh*: all of it is absent first, then all its pages
//!   count as written. `mremap` and `munmap` + `mmap` at the same place end up here.
//!
//! # How it is scanned
//! The kernel looks at a page in about 1 ns if asked for nothing but *written*, and in about 30 ns
//! if asked for what sort of page it is. So in anonymous memory without large holes one quick scan
//! reports and protects in one step, holes included; what turns out to be a hole reads as zeros.
//! Everywhere else a quick scan finds where something was written, and only there the sort is
//! asked for, and only pages that exist are protected: protecting large holes would build page
//! tables for them (2 MiB a GiB). Areas that lie side by side are first asked together whether
//! anything in them needs a look ([`quiet`]).

mod below;
mod filling;
mod quiet;
mod reading;
mod scanning;
mod soft_dirty;

use crate::ProcessError;
use crate::guard::Guard;
use crate::interval::IntervalSet;
use crate::restore::lazy::at_once;
use crate::restore::lazy::filling::Filling;
use crate::strategy::Granularity;
use crate::target::Target;
use outlive_epoch::{PAGE_SIZE, Run, SpaceId};
use outlive_linux::Errno;
use outlive_linux::pagemap::{self, Pagemap, Query, Region};
use outlive_linux::userfault::WriteTracker;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

const PAGE: u64 = PAGE_SIZE as u64;

/// Written pages that are closer together than this are looked at in one go, bytes.
const CLUSTER: u64 = 16 * PAGE;
/// Holes in an area that the quick scan serves, bytes: they cost page tables of 1/512 of this.
const DENSE_HOLES: u64 = 64 << 20;
/// … and they may be at most this part of the area: the arena that the C library reserves for a
/// thread has 64 MiB, almost all of it holes.
const DENSE_SHARE: u64 = 8;
/// Holes of areas up to this are protected, bytes …
const SMALL_AREA: u64 = 4 << 20;
/// … and of those up to this, such as stacks of threads …
const MIDDLE_AREA: u64 = 16 << 20;
/// … of so many bytes in all: they cost page tables of 1/512 of this.
const MIDDLE_AREAS: u64 = 256 << 20;
/// Stops whose pages are not copied behind after the program gave back what was to be copied.
const MOST_REST: u32 = 63;
/// Stops at which nothing is left behind of a process that may end before it is copied.
const YOUNG: u32 = 3;
/// Less than this is taken at the stop, bytes.
const SMALL: u64 = 1 << 20;
/// Protected pages between written ones are protected once more if they are no more than this,
/// bytes: that is quicker than to ask the kernel twice.
const GAP: u64 = 64 * PAGE;
/// The only question that the kernel answers quickly.
const WRITTEN_ONLY: Query = Query {
    all_of: pagemap::WRITTEN,
    inverted: 0,
    any_of: 0,
    report: pagemap::WRITTEN,
    protect: false,
    registered_only: false,
};

/// A range of addresses, whole pages.
pub type Span = (u64, u64);

/// By which means the writes of a process are found.
#[derive(Debug)]
pub enum Means {
    /// Write protection.
    Protection(WriteTracker),
    /// Soft-dirty bits.
    SoftDirty,
}

/// A private mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrivateArea {
    /// Its addresses.
    pub span: Span,
    /// Whether it is readable at all (else only `/proc/PID/mem` can read it).
    pub readable: bool,
    /// Whether it has no file below.
    pub anonymous: bool,
    /// Whether it may be written to now.
    pub writable: bool,
    /// Whether no other mapping lies between it and the area before it.
    pub beside: bool,
}

/// What one pass found.
#[derive(Debug, Default)]
pub struct Changes {
    /// Pages whose contents are to be taken.
    pub written: Vec<Span>,
    /// The same in mappings that cannot be read, or not be guarded.
    pub unreadable: Vec<Span>,
    /// The same, to be copied behind the program.
    pub behind: Vec<Span>,
    /// Pages that the epochs so far hold and that are no more.
    pub absent: Vec<Span>,
    /// Guard regions.
    pub guards: Vec<Span>,
}

impl Changes {
    /// … of which so many at once, and not behind the program.
    #[must_use]
    pub fn bytes_now(&self) -> u64 {
        self.bytes() - self.bytes_behind()
    }

    fn bytes_behind(&self) -> u64 {
        self.behind.iter().map(|(s, e)| e - s).sum()
    }

    /// Where the written pages of an area are listed.
    fn list(&mut self, area: &PrivateArea) -> &mut Vec<Span> {
        if area.readable {
            &mut self.written
        } else {
            &mut self.unreadable
        }
    }

    /// Bytes to be taken.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.written
            .iter()
            .chain(&self.unreadable)
            .chain(&self.behind)
            .map(|(s, e)| e - s)
            .sum()
    }
}

/// Tracks the private pages of one address space.
#[derive(Debug)]
pub struct PageTracker {
    pid: u32,
    /// Where our foothold lies; 0 where nobody is guarded.
    foothold: u64,
    space: SpaceId,
    pagemap: Pagemap,
    tracker: Option<Arc<WriteTracker>>,
    /// Writes are found by soft-dirty bits.
    soft_dirty: bool,
    /// Where writers wait for us.
    guard: Option<Guard>,
    /// Mappings that cannot be guarded: all that exists in them is taken.
    unguarded: HashSet<Span>,
    /// Who serves missing pages, and the page indexes where memory may be registered with that instead of
    /// with the tracker.
    filling: Option<Filling>,
    served: IntervalSet,
    /// The next stop may take it over.
    takes_over: bool,
    /// Stops whose pages are not copied behind, and how many it was after the last loss.
    rest: (u32, u32),
    /// Stops so far.
    stops: u32,
    /// The process may end without the program, see [`PageTracker::leave_behind`].
    pub may_end: bool,
    /// Where it may, nothing of it is left behind at the next stop.
    pub hurries: bool,
    /// What this pass protected, and whether the program stands meanwhile.
    protected: Vec<Span>,
    stopped: bool,
    /// Holes of middle-sized areas are protected below this address.
    middle_end: u64,
    /// Page indexes whose contents the epochs so far (and the one being written) hold.
    stored: IntervalSet,
    /// Areas without large holes and guards, which the quick scan serves.
    dense: HashSet<Span>,
    /// Addresses of guards, which protecting hides from the scans for written pages: an area that
    /// holds one is asked for them. By address, since the kernel joins neighbouring areas.
    guarded: BTreeSet<u64>,
    /// Addresses that could not be read although they were reported as written.
    doubtful: Vec<u64>,
    /// Addresses in the area being looked at that cannot be read although the program stands still.
    beyond: Vec<u64>,
    spans: Vec<Span>,
    found: Vec<Region>,
    buffer: Vec<u8>,
    /// Some pages may be shared with other processes of the program, see [`PageTracker::read`].
    pub has_relatives: bool,
    /// A thread stands at an instruction that faulted, see [`below`].
    pub at_fault: bool,
    granularity: Granularity,
    /// Page indexes that are to be handed over by the next pass, written again or not …
    owed: IntervalSet,
    /// … and those that are to be said to be absent, before that.
    owed_absent: IntervalSet,
    /// The next pass has to begin with [`PageTracker::forget`].
    must_forget: bool,
}

/// Whether mappings may change under our hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    /// The program runs.
    Runs,
    /// It is stopped.
    Stopped,
}

impl PageTracker {
    /// Begins with nothing stored, in a process with a foothold at this address.
    pub fn new(
        target: &Target,
        (means, foothold): (Option<Means>, u64),
        granularity: Granularity,
    ) -> Result<Self, ProcessError> {
        let pagemap =
            Pagemap::open(target.pid).map_err(|e| target.kernel("opening its page map", e))?;
        let soft_dirty = matches!(means, Some(Means::SoftDirty));
        let tracker = match means {
            Some(Means::Protection(tracker)) => Some(Arc::new(tracker)),
            _ => None,
        };
        let guarding = tracker.as_ref().filter(|t| t.is_synchronous());
        let guard = guarding.map(|t| Guard::new((target.pid, foothold), t.clone(), granularity));
        let guard = guard
            .transpose()
            .map_err(|e| target.kernel("guarding its memory", e))?;
        Ok(Self {
            pid: target.pid,
            foothold,
            space: SpaceId(target.id),
            pagemap,
            tracker,
            soft_dirty,
            guard,
            unguarded: HashSet::new(),
            filling: None,
            served: IntervalSet::default(),
            takes_over: false,
            rest: (0, 0),
            stops: 0,
            may_end: false,
            hurries: false,
            protected: Vec::new(),
            stopped: false,
            middle_end: 0,
            stored: IntervalSet::default(),
            dense: HashSet::new(),
            guarded: BTreeSet::new(),
            doubtful: Vec::new(),
            beyond: Vec::new(),
            spans: Vec::new(),
            found: Vec::new(),
            buffer: Vec::new(),
            has_relatives: false,
            at_fault: false,
            granularity,
            owed: IntervalSet::default(),
            owed_absent: IntervalSet::default(),
            must_forget: false,
        })
    }

    /// Whether the epochs so far hold nothing of it.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.stored.is_empty() || self.must_forget
    }

    /// Begins in a process that holds what an epoch holds and has not run since: `held` are the
    /// pages whose contents are those of the epoch. They count as stored, and those that exist are
    /// protected; whatever else exists will be found to be written. What comes `later` is protected by
    /// who serves it.
    pub fn going_on(
        target: &Target,
        (means, granularity): (Means, Granularity),
        areas: &[PrivateArea],
        held: &[Span],
        (later, filling): (&[Span], Option<Filling>),
    ) -> Result<Self, ProcessError> {
        let failed = |e| target.kernel("going on with the tracking of its memory", e);
        let mut pages = Self::new(target, (None, 0), granularity)?;
        let tracker = match means {
            Means::Protection(tracker) => tracker,
            Means::SoftDirty if filling.is_some() => return Err(failed(Errno::NOTSUP)),
            Means::SoftDirty => {
                held.iter().for_each(|span| pages.note_stored(*span));
                outlive_linux::soft_dirty::clear(target.pid).map_err(failed)?;
                pages.soft_dirty = true;
                return Ok(pages);
            }
        };
        pages.set_filling(filling, later);
        for area in areas {
            if !pages.is_served_at(area.span) {
                tracker.register(area.span.0, area.span.1).map_err(failed)?;
            }
        }
        let there = Query {
            any_of: pagemap::PRESENT | pagemap::SWAPPED,
            report: pagemap::PRESENT,
            protect: true,
            ..Query::default()
        };
        held.iter().for_each(|span| pages.note_stored(*span));
        for (start, end) in at_once(held.to_vec(), later) {
            pages
                .pagemap
                .scan(start, end, there, |_| {})
                .map_err(failed)?;
        }
        pages.tracker = Some(Arc::new(tracker));
        Ok(pages)
    }

    /// Whether writes are found by soft-dirty bits.
    #[must_use]
    pub fn has_soft_dirty(&self) -> bool {
        self.soft_dirty
    }

    /// Who holds writers back, where somebody does.
    #[must_use]
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    /// All pages that the epochs so far hold: they are no more, and nobody tracks them further.
    #[must_use]
    pub fn retire(mut self) -> Vec<Run> {
        let owed = std::mem::take(&mut self.owed_absent);
        owed.iter().for_each(|(s, e)| self.stored.insert(s, e));
        let all = self.stored.remove(0, u64::MAX);
        all.into_iter()
            .filter_map(|(s, e)| Run::new(self.space, s, e - s))
            .collect()
    }

    /// Another process of the same address space stands for it from now on: everything is reported as
    /// written by the next pass, under its name. Returns what the epochs so far hold under the old
    /// one. `areas` are as for [`PageTracker::forget`].
    pub fn move_to(
        &mut self,
        target: &Target,
        areas: &[PrivateArea],
    ) -> Result<Vec<Run>, ProcessError> {
        let pagemap =
            Pagemap::open(target.pid).map_err(|e| target.kernel("opening its page map", e))?;
        let guarding = self.tracker.as_ref().filter(|_| self.guard.is_some());
        let guard =
            guarding.map(|t| Guard::new((target.pid, self.foothold), t.clone(), self.granularity));
        let guard = guard
            .transpose()
            .map_err(|e| target.kernel("guarding its memory", e))?;
        let owed = std::mem::take(&mut self.owed_absent);
        owed.iter().for_each(|(s, e)| self.stored.insert(s, e));
        let all = self.stored.remove(0, u64::MAX);
        let old = all
            .into_iter()
            .filter_map(|(s, e)| Run::new(self.space, s, e - s))
            .collect();
        (self.pid, self.space, self.pagemap) = (target.pid, SpaceId(target.id), pagemap);
        self.forget(areas);
        self.guard = guard;
        Ok(old)
    }

    /// The epochs so far do not count: everything is reported as written by the next pass.
    pub fn forget(&mut self, areas: &[PrivateArea]) {
        self.abandon();
        self.unguarded.clear();
        self.stored.clear();
        self.dense.clear();
        self.guarded.clear();
        self.doubtful.clear();
        self.owed.clear();
        self.owed_absent.clear();
        for area in areas {
            self.begin_afresh(area.span);
        }
        self.must_forget = false;
    }

    /// What was to be copied behind is not wanted any more. Says whether some of it was lost: then
    /// nothing is left behind for a while.
    pub fn abandon(&mut self) -> bool {
        let lost = self.guard.as_ref().is_some_and(Guard::abandon);
        if lost {
            let longer = (self.rest.1 * 2 + 1).min(MOST_REST);
            self.rest = (longer, longer);
        }
        lost
    }

    /// The same as [`PageTracker::forget`] where the mappings cannot be read now: the next pass does it.
    pub fn forget_later(&mut self) {
        self.must_forget = true;
    }

    /// What was handed over of this address space got into no epoch: the next pass does so again.
    pub fn owe(&mut self, pages: &[Run], absent: &[Run]) {
        if let Some(guard) = &self.guard {
            guard.abandon();
        }
        for run in pages {
            self.owed.insert(run.first(), run.end());
        }
        for run in absent {
            self.owed_absent.insert(run.first(), run.end());
        }
    }

    /// Pages that the next pass hands over whether they were written or not.
    #[must_use]
    pub fn owed_pages(&self) -> u64 {
        self.owed.count()
    }

    /// The same of what a pass found and what was not taken then.
    pub fn owe_changes(&mut self, changes: &Changes) {
        for &(start, end) in changes
            .written
            .iter()
            .chain(&changes.unreadable)
            .chain(&changes.behind)
        {
            self.owed.insert(start / PAGE, end / PAGE);
        }
        for &(start, end) in &changes.absent {
            self.owed_absent.insert(start / PAGE, end / PAGE);
        }
        if let Some(guard) = &self.guard {
            guard.abandon();
        }
    }

    /// Finds what changed since the last pass. `areas` are all private mappings, in order.
    pub fn pass(
        &mut self,
        target: &Target,
        areas: &[PrivateArea],
        world: World,
    ) -> Result<Changes, ProcessError> {
        if self.must_forget {
            self.forget(areas);
        }
        let shared = self.guard.as_ref().map(Guard::shared);
        // Writers wait meanwhile: no protection is lifted unseen.
        let mut guarding = shared.as_ref().map(|s| s.lock());
        self.protected.clear();
        self.stopped = world == World::Stopped;
        self.middle_end = middle_end(areas);
        self.begin_soft_dirty()
            .map_err(|e| target.kernel("clearing soft-dirty bits", e))?;
        let mut changes = Changes::default();
        let told_again = self.owed_absent.iter().map(|(s, e)| (s * PAGE, e * PAGE));
        changes.absent.extend(told_again);
        self.owed_absent.clear();
        self.follow_moves(&mut changes);
        let quiet = self.quiet(areas);
        let mut end_of_last = 0;
        let mut fixed = 0;
        for (area, quiet) in areas.iter().zip(quiet) {
            drop_stored(&mut self.stored, (end_of_last, area.span.0), &mut changes);
            end_of_last = area.span.1;
            if quiet {
                continue;
            }
            let list = changes.list(area);
            let before = list.len();
            let (first, end) = (area.span.0 / PAGE, area.span.1 / PAGE);
            let owes = self.owed.within(first, end).next().is_some();
            let found = self.scan(area, &mut changes);
            let found = found.and_then(|()| self.bring_in(area));
            let found = found.and_then(|()| self.bring_owed(area));
            let found = found.and_then(|()| self.scan_owed(area, &mut changes));
            let found = found.and_then(|()| self.drop_given_way(area, &mut changes));
            let list = changes.list(area);
            let mut written = list.split_off(before);
            if owes {
                written = each_once(&written);
            }
            if !area.writable && self.unguarded.contains(&area.span) {
                fixed += written.iter().map(|(s, e)| (e - s) / PAGE).sum::<u64>();
            }
            let granularity = match self.is_served_at(area.span) {
                // What is stored there may be missing.
                true => Granularity::default(),
                false => self.granularity,
            };
            list.extend(granularity.round(written, area.span, &self.stored));
            found.or_else(|e| match (world, e) {
                // The mapping went away while the program runs: the next pass sees that.
                (
                    World::Runs,
                    Errno::NOENT | Errno::INVAL | Errno::PERM | Errno::FAULT | Errno::NOMEM,
                ) => Ok(()),
                (_, e) => Err(target.kernel(
                    format!(
                        "looking for written pages at {:x}-{:x}",
                        area.span.0, area.span.1
                    ),
                    e,
                )),
            })?;
        }
        drop_stored(&mut self.stored, (end_of_last, !(PAGE - 1)), &mut changes);
        self.doubtful.clear();
        self.end_soft_dirty()
            .map_err(|e| target.kernel("clearing soft-dirty bits", e))?;
        if let Some(state) = &mut guarding {
            if self.stopped {
                state.all_clean(fixed);
                self.leave_behind(&mut changes);
                state.copy_behind(&changes.behind);
            } else {
                state.note_clean(&self.protected);
            }
        }
        Ok(changes)
    }

    /// Has written pages copied behind the program, where that is worth it. A process that ends before
    /// takes the epoch with it: nothing is left behind of one that came lately.
    fn leave_behind(&mut self, changes: &mut Changes) {
        let young = self.stops < YOUNG;
        self.stops = self.stops.saturating_add(1);
        let resting = self.rest.0 > 0 || self.may_end && (young || self.hurries);
        self.rest.0 = self.rest.0.saturating_sub(1);
        if !resting && changes.bytes() >= SMALL {
            changes.behind = std::mem::take(&mut changes.written);
        }
    }

    fn note_stored(&mut self, span: Span) {
        self.stored.insert(span.0 / PAGE, span.1 / PAGE);
    }

    fn run(&self, span: Span) -> Result<Run, ProcessError> {
        Run::new(self.space, span.0 / PAGE, (span.1 - span.0) / PAGE)
            .ok_or_else(|| ProcessError::Image(format!("pages {:x}-{:x}", span.0, span.1)))
    }
}

/// Up to which address holes of middle-sized areas are protected.
fn middle_end(areas: &[PrivateArea]) -> u64 {
    let mut left = MIDDLE_AREAS;
    let is_middle = |a: &&PrivateArea| {
        a.anonymous && (SMALL_AREA + 1..=MIDDLE_AREA).contains(&(a.span.1 - a.span.0))
    };
    let beyond = areas.iter().filter(is_middle).find(|a| {
        let taken = left.checked_sub(a.span.1 - a.span.0);
        left = taken.unwrap_or(0);
        taken.is_none()
    });
    beyond.map_or(u64::MAX, |a| a.span.0)
}

/// Pages of this span hold nothing of their own any more.
fn drop_stored(stored: &mut IntervalSet, span: Span, changes: &mut Changes) {
    let gone = stored.remove(span.0 / PAGE, span.1 / PAGE);
    changes
        .absent
        .extend(gone.into_iter().map(|(s, e)| (s * PAGE, e * PAGE)));
}

/// The same pages, each once, in order.
fn each_once(spans: &[Span]) -> Vec<Span> {
    let mut all = IntervalSet::default();
    spans
        .iter()
        .for_each(|(s, e)| all.insert(s / PAGE, e / PAGE));
    all.iter().map(|(s, e)| (s * PAGE, e * PAGE)).collect()
}

/// Adds a span, as one with the last if they touch.
fn push_span(list: &mut Vec<Span>, span: Span) {
    match list.last_mut() {
        Some(last) if last.1 == span.0 => last.1 = span.1,
        _ => list.push(span),
    }
}
