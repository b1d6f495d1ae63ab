//! The contents of changed pages: of a running program, as far as they are still there, and of a
//! stopped one.

use super::{Changes, PAGE, PageTracker, Span};
use crate::ProcessError;
use crate::residue::Residue;
use crate::target::Target;
use outlive_epoch::{PAGE_SIZE, PageSink, Run};
use outlive_linux::memory::{self, RANGES};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// Largest piece that is read and handed on at once, bytes.
const PIECE: usize = 4 << 20;

impl PageTracker {
    /// Copies changed pages of a running program into a sink. Pages that vanish meanwhile are left
    /// to the next pass, and what there is no time for any more is owed to it.
    pub fn copy(
        &mut self,
        changes: &Changes,
        sink: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<(), ProcessError> {
        for &span in &changes.absent {
            sink.absent(self.run(span)?)?;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.copy_written(changes, sink, (&mut buffer, hurry));
        self.buffer = buffer;
        result
    }

    fn copy_written(
        &mut self,
        changes: &Changes,
        sink: &mut dyn PageSink,
        (buffer, hurry): (&mut Vec<u8>, &mut dyn FnMut() -> bool),
    ) -> Result<(), ProcessError> {
        buffer.resize(PIECE, 0);
        let mut pieces = Pieces::of(&changes.written, PIECE as u64);
        let (mut group, mut ranges) = (Vec::new(), Vec::new());
        loop {
            if hurry() {
                let unreadable = changes.unreadable.iter().copied();
                let rest = pieces.rest().chain(unreadable);
                rest.for_each(|(s, e)| self.owed.insert(s / PAGE, e / PAGE));
                return Ok(());
            }
            if !pieces.next(&mut group, &mut ranges) {
                break;
            }
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
        // Of a running program a hole may have come up meanwhile, where that would wait for the guard.
        let holes = self.guards_holes() && !self.stopped;
        if !self.has_relatives && !holes {
            return memory::read(self.pid, ranges, out).unwrap_or(0);
        }
        let Ok(mem) = File::open(format!("/proc/{}/mem", self.pid)) else {
            return 0;
        };
        if holes {
            let mut done = 0;
            for &(start, len) in ranges {
                let read = mem.read_at(&mut out[done..done + len], start).unwrap_or(0);
                done += read;
                if read < len {
                    break;
                }
            }
            return done;
        }
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
        let total = changes.bytes_now() as usize;
        // Never shorter: what was written to once need not be faulted in at the next stop.
        if buffer.is_empty() {
            // Zeroed memory from the kernel, which is faulted in only where it is used.
            buffer = vec![0; total.next_multiple_of(PIECE)];
        } else if buffer.len() < total {
            buffer.resize(total.next_multiple_of(PIECE), 0);
        }
        let mut at = 0;
        let mut pieces = Pieces::of(&changes.written, 64 << 20);
        let (mut group, mut ranges) = (Vec::new(), Vec::new());
        while pieces.next(&mut group, &mut ranges) {
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
        for &span in &changes.behind {
            self.note_stored(span);
        }
        let behind = self.guard.as_ref().filter(|_| !changes.behind.is_empty());
        let runs_of = |spans: &[Span]| spans.iter().map(|&s| self.run(s)).collect();
        let absent: Result<Vec<Run>, _> = runs_of(&changes.absent);
        let behind_runs: Result<Vec<Run>, _> = runs_of(&changes.behind);
        Ok(Residue {
            runs,
            absent: absent?,
            buffer,
            took: began.elapsed(),
            behind_runs: behind_runs?,
            behind: behind.map(|g| g.behind(self.space, self.has_relatives)),
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

/// Spans, cut into groups of at most so many bytes and [`RANGES`] ranges.
struct Pieces<'a> {
    /// What is left, of which the first has been handed out up to here.
    spans: &'a [Span],
    from: u64,
    limit: u64,
}

impl<'a> Pieces<'a> {
    fn of(spans: &'a [Span], limit: u64) -> Self {
        let from = spans.first().map_or(0, |s| s.0);
        Self { spans, from, limit }
    }

    /// Puts the next group into these two; says whether there was one.
    fn next(&mut self, group: &mut Vec<Span>, ranges: &mut Vec<memory::Remote>) -> bool {
        group.clear();
        ranges.clear();
        let mut bytes = 0;
        while let Some(&(_, end)) = self.spans.first() {
            if bytes >= self.limit || group.len() == RANGES {
                break;
            }
            let upto = end.min(self.from.saturating_add(self.limit - bytes));
            if self.from < upto {
                group.push((self.from, upto));
                ranges.push((self.from, (upto - self.from) as usize));
                bytes += upto - self.from;
            }
            self.from = upto;
            if upto == end {
                self.spans = &self.spans[1..];
                self.from = self.spans.first().map_or(0, |s| s.0);
            }
        }
        !group.is_empty()
    }

    /// What was not handed out.
    fn rest(&self) -> impl Iterator<Item = Span> + '_ {
        let first = self.spans.first().map(|&(_, end)| (self.from, end));
        first.into_iter().chain(self.spans.iter().skip(1).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_cut_at_the_limit() {
        let spans = [(0, 10), (20, 25), (25, 25), (30, 31)];
        let mut pieces = Pieces::of(&spans, 6);
        let (mut group, mut ranges, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        let mut left = Vec::new();
        while pieces.next(&mut group, &mut ranges) {
            assert!(
                group
                    .iter()
                    .map(|(s, e)| (*s, (e - s) as usize))
                    .eq(ranges.iter().copied())
            );
            groups.push(group.clone());
            left.push(pieces.rest().map(|(s, e)| e - s).sum::<u64>());
        }
        assert_eq!(
            groups,
            [
                vec![(0, 6)],
                vec![(6, 10), (20, 22)],
                vec![(22, 25), (30, 31)]
            ]
        );
        assert_eq!(left, [10, 4, 0]);
        let many: Vec<Span> = (0..2 * RANGES as u64 + 1)
            .map(|n| (n * 2, n * 2 + 1))
            .collect();
        let mut pieces = Pieces::of(&many, u64::MAX);
        for count in [RANGES, RANGES, 1] {
            assert!(pieces.next(&mut group, &mut ranges) && group.len() == count);
        }
        assert!(!pieces.next(&mut group, &mut ranges));
    }
}
