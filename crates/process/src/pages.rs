//! Which pages changed, and their contents.
//!
//! Private pages of a process are tracked by asynchronous write protection: `PAGEMAP_SCAN` reports
//! what was written and protects it again in one step. Pages in shared mappings of files belong to
//! the files.
//!
//! # What a pass reports
//! - *Written* pages that exist: their contents go into the epoch.
//! - Pages that the epochs so far hold and that exist no more (`MADV_DONTNEED`, or the mapping
//!   went away): they read as what lies below the mapping again, and must be said to be *absent*,
//!   or a restore would bring old data back.
//! - A mapping that is not registered yet is *fresh*: all of it is absent first, then all its pages
//!   count as written. `mremap` and `munmap` + `mmap` at the same place end up here.
//!
//!
//! # How it is scanned
//! The kernel looks at a page in about 1 ns if asked for nothing but *written*, and in about 30 ns
//! if asked for what sort of page it is. So in anonymous memory without large holes one quick scan
//! reports and protects in one step, holes included; what turns out to be a hole reads as zeros.
//! Everywhere else a quick scan finds where something was written, and only there the sort is
//! asked for, and only pages that exist are protected: protecting large holes would build page
//! tables for them (2 MiB a GiB).

use crate::ProcessError;
use crate::interval::IntervalSet;
use crate::strategy::Granularity;
use crate::target::Target;
use outlive_epoch::{PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_linux::Errno;
use outlive_linux::memory::{self, RANGES};
use outlive_linux::pagemap::{self, Pagemap, Query};
use outlive_linux::userfault::WriteTracker;
use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Largest piece that is read and handed on at once, bytes.
const PIECE: usize = 4 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

/// Written pages that are closer together than this are looked at in one go, bytes.
const CLUSTER: u64 = 16 * PAGE;
/// Holes in an area that the quick scan serves, bytes: they cost page tables of 1/512 of this.
const DENSE_HOLES: u64 = 64 << 20;
/// … and they may be at most this part of the area: the arena that the C library reserves for a
/// thread has 64 MiB, almost all of it holes.
const DENSE_SHARE: u64 = 8;
/// The only question that the kernel answers quickly.
const WRITTEN_ONLY: Query = Query {
    all_of: pagemap::WRITTEN,
    inverted: 0,
    any_of: 0,
    report: pagemap::WRITTEN,
    protect: false,
};

/// A range of addresses, whole pages.
pub type Span = (u64, u64);

/// A private mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrivateArea {
    /// Its addresses.
    pub span: Span,
    /// Whether it is readable at all (else only `/proc/PID/mem` can read it).
    pub readable: bool,
    /// Whether it has no file below.
    pub anonymous: bool,
}

/// What one pass found.
#[derive(Debug, Default)]
pub struct Changes {
    /// Pages whose contents are to be taken.
    pub written: Vec<Span>,
    /// Of these, the ones in mappings that cannot be read.
    pub unreadable: Vec<Span>,
    /// Pages that the epochs so far hold and that are no more.
    pub absent: Vec<Span>,
    /// Guard regions.
    pub guards: Vec<Span>,
}

impl Changes {
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
            .map(|(s, e)| e - s)
            .sum()
    }
}

/// Tracks the private pages of one address space.
#[derive(Debug)]
pub struct PageTracker {
    pid: u32,
    space: SpaceId,
    pagemap: Pagemap,
    tracker: Option<WriteTracker>,
    /// Page indexes whose contents the epochs so far (and the one being written) hold.
    stored: IntervalSet,
    /// Areas without large holes and guards, which the quick scan serves.
    dense: HashSet<Span>,
    /// Addresses of guards, which protecting hides from the scans for written pages: an area that
    /// holds one is asked for them. By address, since the kernel joins neighbouring areas.
    guarded: BTreeSet<u64>,
    /// Addresses that could not be read although they were reported as written.
    doubtful: Vec<u64>,
    spans: Vec<Span>,
    buffer: Vec<u8>,
    /// Some pages may be shared with other processes of the program, see [`PageTracker::read`].
    pub has_relatives: bool,
    granularity: Granularity,
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
    /// Begins with nothing stored.
    pub fn new(
        target: &Target,
        tracker: Option<WriteTracker>,
        granularity: Granularity,
    ) -> Result<Self, ProcessError> {
        let pagemap =
            Pagemap::open(target.pid).map_err(|e| target.kernel("opening its page map", e))?;
        Ok(Self {
            pid: target.pid,
            space: SpaceId(target.id),
            pagemap,
            tracker,
            stored: IntervalSet::default(),
            dense: HashSet::new(),
            guarded: BTreeSet::new(),
            doubtful: Vec::new(),
            spans: Vec::new(),
            buffer: Vec::new(),
            has_relatives: false,
            granularity,
        })
    }

    /// Whether the epochs so far hold nothing of it.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.stored.is_empty()
    }

    /// Begins in a process that holds what an epoch holds and has not run since: `held` are the
    /// pages whose contents are those of the epoch. They count as stored, and those that exist are
    /// protected; whatever else exists will be found to be written.
    pub fn going_on(
        target: &Target,
        (tracker, granularity): (WriteTracker, Granularity),
        areas: &[PrivateArea],
        held: &[Span],
    ) -> Result<Self, ProcessError> {
        let failed = |e| target.kernel("going on with the tracking of its memory", e);
        let mut pages = Self::new(target, None, granularity)?;
        for area in areas {
            tracker.register(area.span.0, area.span.1).map_err(failed)?;
        }
        let there = Query {
            any_of: pagemap::PRESENT | pagemap::SWAPPED,
            report: pagemap::PRESENT,
            protect: true,
            ..Query::default()
        };
        for &(start, end) in held {
            pages
                .pagemap
                .scan(start, end, there, |_| {})
                .map_err(failed)?;
            pages.note_stored((start, end));
        }
        pages.tracker = Some(tracker);
        Ok(pages)
    }

    /// All pages that the epochs so far hold: they are no more, and nobody tracks them further.
    #[must_use]
    pub fn retire(mut self) -> Vec<Run> {
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
        let all = self.stored.remove(0, u64::MAX);
        let old = all
            .into_iter()
            .filter_map(|(s, e)| Run::new(self.space, s, e - s))
            .collect();
        (self.pid, self.space, self.pagemap) = (target.pid, SpaceId(target.id), pagemap);
        self.forget(areas);
        Ok(old)
    }

    /// The epochs so far do not count: everything is reported as written by the next pass.
    pub fn forget(&mut self, areas: &[PrivateArea]) {
        if let Some(tracker) = &self.tracker {
            for area in areas {
                // An area that was never registered, or is gone: fresh in any case.
                let _ = tracker.unregister(area.span.0, area.span.1);
            }
        }
        self.stored.clear();
        self.dense.clear();
        self.guarded.clear();
        self.doubtful.clear();
    }

    /// Finds what changed since the last pass. `areas` are all private mappings, in order.
    pub fn pass(
        &mut self,
        target: &Target,
        areas: &[PrivateArea],
        world: World,
    ) -> Result<Changes, ProcessError> {
        let mut changes = Changes::default();
        let mut end_of_last = 0;
        for area in areas {
            drop_stored(&mut self.stored, (end_of_last, area.span.0), &mut changes);
            end_of_last = area.span.1;
            let list = changes.list(area);
            let before = list.len();
            let found = self.scan(area, &mut changes);
            let list = changes.list(area);
            let written = list.split_off(before);
            list.extend(self.granularity.round(written, area.span, &self.stored));
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
        Ok(changes)
    }

    fn scan(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let (start, end) = area.span;
        self.resolve_doubts(area.span)?;
        if self.tracker.is_none() {
            self.scan_sorts(area.span, area, changes)?;
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
        let Some(tracker) = self.tracker.as_ref().filter(|_| !doubtful.is_empty()) else {
            return Ok(());
        };
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
                // If it was not registered, it is fresh in any case.
                let _ = tracker.unregister(start, end);
                break;
            }
        }
        self.guarded.extend(doubtful);
        Ok(())
    }

    fn is_guarded(&self, (start, end): Span) -> bool {
        self.guarded.range(start..end).next().is_some()
    }

    fn scan_tracked(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let known = if self.dense.contains(&area.span) && !self.is_guarded(area.span) {
            self.scan_dense(area, changes)
        } else {
            self.scan_sparse(area, changes)
        };
        match (known, &self.tracker) {
            // Not registered: fresh, also where another mapping lay at the same place before.
            (Err(Errno::PERM), Some(tracker)) => {
                // Where only a part is not registered (it was replaced since the mappings were
                // read), what the other part had to tell has been asked for and is lost: all of
                // it must count as written.
                let _ = tracker.unregister(area.span.0, area.span.1);
                let registered = tracker.register(area.span.0, area.span.1);
                self.dense.remove(&area.span);
                registered?;
                drop_stored(&mut self.stored, area.span, changes);
                self.scan_sparse(area, changes)
            }
            (known, _) => known,
        }
    }

    /// One quick scan, which protects holes too.
    fn scan_dense(&mut self, area: &PrivateArea, changes: &mut Changes) -> Result<(), Errno> {
        let (start, end) = area.span;
        let list = changes.list(area);
        self.pagemap.scan(
            start,
            end,
            Query {
                protect: true,
                ..WRITTEN_ONLY
            },
            |r| {
                push_span(list, (r.start, r.end));
            },
        )
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
                holes += self.scan_sorts(span, area, changes)?;
            }
            Ok(())
        });
        self.spans = spans;
        scanned?;
        // Holes are copied as zeros once: few of them, and none that only a slow read can reach.
        let length = area.span.1 - area.span.0;
        let few = holes <= DENSE_HOLES && holes <= length / DENSE_SHARE;
        if area.anonymous && area.readable && few {
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
    ) -> Result<u64, Errno> {
        let written = if self.tracker.is_some() {
            pagemap::WRITTEN
        } else {
            0
        };
        let Self {
            pagemap,
            stored,
            guarded,
            ..
        } = self;
        let exists = Query {
            all_of: written,
            any_of: pagemap::PRESENT | pagemap::SWAPPED | pagemap::GUARD,
            report: pagemap::FILE | pagemap::ZERO | pagemap::GUARD,
            protect: written != 0,
            ..Query::default()
        };
        pagemap.scan(span.0, span.1, exists, |r| {
            let span = (r.start, r.end);
            if r.categories != 0 {
                // A guard, a page of the file below, the zero page: no contents of its own.
                drop_stored(stored, span, changes);
                if r.categories & pagemap::GUARD != 0 {
                    guarded.insert(r.start);
                }
            } else {
                push_span(changes.list(area), span);
            }
        })?;
        let holes = Query {
            all_of: pagemap::PRESENT | pagemap::SWAPPED | written,
            inverted: pagemap::PRESENT | pagemap::SWAPPED,
            ..Query::default()
        };
        let mut bytes = 0;
        pagemap.scan(span.0, span.1, holes, |r| {
            bytes += r.end - r.start;
            drop_stored(stored, (r.start, r.end), changes);
        })?;
        Ok(bytes)
    }

    fn note_stored(&mut self, span: Span) {
        self.stored.insert(span.0 / PAGE, span.1 / PAGE);
    }

    fn run(&self, span: Span) -> Result<Run, ProcessError> {
        Run::new(self.space, span.0 / PAGE, (span.1 - span.0) / PAGE)
            .ok_or_else(|| ProcessError::Image(format!("pages {:x}-{:x}", span.0, span.1)))
    }

    /// Copies changed pages of a running program into a sink. Pages that vanish meanwhile are left
    /// to the next pass.
    pub fn copy(&mut self, changes: &Changes, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        for &span in &changes.absent {
            sink.absent(self.run(span)?)?;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.copy_written(changes, sink, &mut buffer);
        self.buffer = buffer;
        result
    }

    fn copy_written(
        &mut self,
        changes: &Changes,
        sink: &mut dyn PageSink,
        buffer: &mut Vec<u8>,
    ) -> Result<(), ProcessError> {
        buffer.resize(PIECE, 0);
        for group in pieces(&changes.written, PIECE as u64) {
            let ranges: Vec<_> = group.iter().map(|&(s, e)| (s, (e - s) as usize)).collect();
            let total: usize = ranges.iter().map(|r| r.1).sum();
            let read = self.read(&ranges, &mut buffer[..total]);
            let mut at = 0;
            for &(start, end) in &group {
                let len = (end - start) as usize;
                if at + len > read {
                    // Unmapped or protected meanwhile: singly, as far as they go.
                    self.copy_one_by_one((start, end), sink)?;
                } else {
                    sink.put(self.run((start, end))?, &buffer[at..at + len])?;
                    self.note_stored((start, end));
                }
                at += len;
            }
        }
        for &span in &changes.unreadable {
            self.copy_one_by_one(span, sink)?;
        }
        Ok(())
    }

    /// Reads ranges one after the other; returns how many bytes could be read before one was not
    /// there.
    ///
    /// A page that is shared copy-on-write must stay shared. The kernel pins what
    /// `process_vm_readv(2)` reads, and copies such a page before it pins it (Linux 5.19): to read
    /// all workers of a server once would give each of them all of their master's memory. So these
    /// pages are read through `/proc/PID/mem`, which is slower.
    fn read(&self, ranges: &[memory::Remote], out: &mut [u8]) -> usize {
        if !self.has_relatives {
            return memory::read(self.pid, ranges, out).unwrap_or(0);
        }
        let Ok(mem) = File::open(format!("/proc/{}/mem", self.pid)) else {
            return 0;
        };
        let mut parts: Vec<(u64, u64, bool)> = Vec::new();
        for &(start, len) in ranges {
            let listed = self
                .pagemap
                .exclusive(start, start + len as u64, |s, e, alone| {
                    parts.push((s, e, alone));
                });
            if listed.is_err() {
                return 0;
            }
        }
        let mut done = 0;
        for group in parts.chunk_by(|a, b| a.2 && b.2) {
            for group in group.chunks(RANGES) {
                let ranges: Vec<_> = group.iter().map(|p| (p.0, (p.1 - p.0) as usize)).collect();
                let want: usize = ranges.iter().map(|r| r.1).sum();
                let out = &mut out[done..done + want];
                let read = match group {
                    [(start, _, false)] => mem.read_at(out, *start).unwrap_or(0),
                    _ => memory::read(self.pid, &ranges, out).unwrap_or(0),
                };
                done += read;
                if read < want {
                    return done;
                }
            }
        }
        done
    }

    fn copy_one_by_one(&mut self, span: Span, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        let Ok(mem) = File::open(format!("/proc/{}/mem", self.pid)) else {
            return Ok(());
        };
        let mut page = [0u8; PAGE_SIZE];
        for start in (span.0..span.1).step_by(PAGE_SIZE) {
            if mem.read_exact_at(&mut page, start).is_ok() {
                sink.put(self.run((start, start + PAGE))?, &page)?;
                self.note_stored((start, start + PAGE));
            } else {
                self.doubtful.push(start);
            }
        }
        Ok(())
    }

    /// Takes changed pages of a stopped program into memory; every one must be readable.
    pub fn take(
        &mut self,
        target: &Target,
        changes: Changes,
        mut buffer: Vec<u8>,
    ) -> Result<Residue, ProcessError> {
        let began = Instant::now();
        let total = changes.bytes() as usize;
        // Never shorter: what was written to once need not be faulted in at the next stop.
        if buffer.is_empty() {
            // Zeroed memory from the kernel, which is faulted in only where it is used.
            buffer = vec![0; total.next_multiple_of(PIECE)];
        } else if buffer.len() < total {
            buffer.resize(total.next_multiple_of(PIECE), 0);
        }
        let mut at = 0;
        for group in pieces(&changes.written, 64 << 20) {
            let ranges: Vec<_> = group.iter().map(|&(s, e)| (s, (e - s) as usize)).collect();
            let want: usize = ranges.iter().map(|r| r.1).sum();
            let out = &mut buffer[at..at + want];
            let read = self.read(&ranges, out);
            if read < want {
                let mut from = 0;
                for &span in &group {
                    let len = (span.1 - span.0) as usize;
                    read_forced(target, span, &mut out[from..from + len])?;
                    from += len;
                }
            }
            at += want;
        }
        for &span in &changes.unreadable {
            let len = (span.1 - span.0) as usize;
            read_forced(target, span, &mut buffer[at..at + len])?;
            at += len;
        }
        let mut runs = Vec::with_capacity(changes.written.len() + changes.unreadable.len());
        for &span in changes.written.iter().chain(&changes.unreadable) {
            runs.push(self.run(span)?);
            self.note_stored(span);
        }
        let absent: Result<Vec<Run>, _> = changes.absent.iter().map(|&s| self.run(s)).collect();
        Ok(Residue {
            runs,
            absent: absent?,
            buffer,
            took: began.elapsed(),
        })
    }
}

fn read_forced(target: &Target, span: Span, out: &mut [u8]) -> Result<(), ProcessError> {
    let what = || format!("reading memory at {:x}-{:x}", span.0, span.1);
    let mem =
        File::open(format!("/proc/{}/mem", target.pid)).map_err(|e| target.kernel(what(), e))?;
    mem.read_exact_at(out, span.0)
        .map_err(|e| target.kernel(what(), e))
}

/// Pages of this span hold nothing of their own any more.
fn drop_stored(stored: &mut IntervalSet, span: Span, changes: &mut Changes) {
    let gone = stored.remove(span.0 / PAGE, span.1 / PAGE);
    changes
        .absent
        .extend(gone.into_iter().map(|(s, e)| (s * PAGE, e * PAGE)));
}

/// Adds a span, as one with the last if they touch.
fn push_span(list: &mut Vec<Span>, span: Span) {
    match list.last_mut() {
        Some(last) if last.1 == span.0 => last.1 = span.1,
        _ => list.push(span),
    }
}

/// Cuts spans into groups of at most `limit` bytes and [`RANGES`] ranges.
fn pieces(spans: &[Span], limit: u64) -> Vec<Vec<Span>> {
    let mut groups = Vec::new();
    let (mut group, mut bytes) = (Vec::new(), 0);
    for &(mut start, end) in spans {
        while start < end {
            let upto = end.min(start + (limit - bytes));
            group.push((start, upto));
            bytes += upto - start;
            start = upto;
            if bytes >= limit || group.len() == RANGES {
                groups.push(std::mem::take(&mut group));
                bytes = 0;
            }
        }
    }
    if !group.is_empty() {
        groups.push(group);
    }
    groups
}

/// Pages that were taken at the stop.
#[derive(Debug, Default)]
pub struct Residue {
    /// Where the pages in the buffer belong, one after the other.
    pub runs: Vec<Run>,
    /// Pages that are no more.
    pub absent: Vec<Run>,
    /// The contents, and perhaps rubbish behind them.
    pub buffer: Vec<u8>,
    /// How long their copying took.
    pub took: Duration,
}

impl Residue {
    /// Hands everything to a sink.
    pub fn write(&self, sink: &mut dyn PageSink) -> Result<(), ProcessError> {
        for &run in &self.absent {
            sink.absent(run)?;
        }
        let mut at = 0;
        for &run in &self.runs {
            let len = run.bytes() as usize;
            sink.put(run, &self.buffer[at..at + len])?;
            at += len;
        }
        Ok(())
    }

    /// Number of pages with contents.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(Run::count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_cut_at_the_limit() {
        let groups = pieces(&[(0, 10), (20, 25), (30, 31)], 6);
        assert_eq!(
            groups,
            vec![
                vec![(0, 6)],
                vec![(6, 10), (20, 22)],
                vec![(22, 25), (30, 31)]
            ]
        );
    }
}
