//! What a strict guard knows of memory that nobody guards yet: mappings that the program made since the
//! last stop, and what can never be guarded.
//!
//! Nobody tells of a new mapping. But whatever is written for the first time costs a fault, which the
//! kernel counts. So the faults are read every [`LOOK`]; where there were more than the guard knows of,
//! the mappings are read, what is new is registered at once, and what was written in it by then counts
//! as dirty.
//!
//! # Rules
//! - Between two looks each fault that the guard does not know of counts as one dirty page: at no instant
//!   more pages were dirty than those that counted at the look before and these. So what was mapped,
//!   written and given back in between is counted, too. It knows of a fault where it let a writer go on,
//!   and of those that are to come in pages that count as dirty because of that; never of more.
//! - What cannot be guarded counts with all that may be written of it: private mappings of files, and
//!   memory that the program shares, whole.
//! - A process that nobody guards (a child since the last stop, a program that was begun in this
//!   process) counts with all its memory.
//! - A look takes a fifth of the time at most: where there are thousands of mappings, looks are further
//!   apart.
//!
//! # What it does not count
//! Huge pages that are mapped, written and given back between two looks count as one page each.

use super::{PAGE, Shared, State, signal};
use crate::family;
use outlive_linux::maps::{self, Mapping};
use outlive_linux::pagemap::{self, Query};
use outlive_linux::remote::Arena;
use outlive_linux::{Errno, kcmp};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How often the faults of the program are read.
pub const LOOK: Duration = Duration::from_millis(1);
/// Of the time, looks take one part in so many at most.
const PART: u32 = 5;
/// What exists, and whether it has contents of its own.
const EXISTS: Query = Query {
    all_of: 0,
    inverted: 0,
    any_of: pagemap::PRESENT | pagemap::SWAPPED,
    report: pagemap::FILE | pagemap::ZERO | pagemap::GUARD,
    protect: false,
    registered_only: false,
};

/// Memory that may be written at any time without a fault that anybody takes, pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposure {
    /// Private mappings of files, and processes that are not guarded.
    pub private: u64,
    /// Objects that may be shared: device and inode, and how far they are mapped.
    pub shared: BTreeMap<((u32, u32), u64), u64>,
}

impl Exposure {
    /// All of it.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.shared.values().sum::<u64>() + self.private
    }

    /// What another process adds; an object that both have counts once.
    pub fn add(&mut self, other: &Self) {
        self.private += other.private;
        for (object, pages) in &other.shared {
            let mine = self.shared.entry(*object).or_default();
            *mine = (*mine).max(*pages);
        }
    }
}

#[derive(Debug)]
pub(super) struct Watch {
    stat: File,
    /// Faults at the last look.
    seen: u64,
    /// Faults that are to come and whose pages count as dirty already.
    known: u64,
    next: Instant,
    exposure: Exposure,
    /// Pages that every stop takes although they cannot be written: above files.
    pub(super) fixed: u64,
    /// The exposure when the limit was set.
    at_limit: u64,
    /// Children that are guarded, or were there before there was a limit.
    relatives: BTreeSet<u32>,
    /// There are others, whose faults nobody reads.
    strangers: bool,
    /// The most that may have been dirty at once since somebody asked.
    peak: u64,
}

impl Watch {
    pub(super) fn new(pid: u32) -> Result<Self, Errno> {
        let stat = File::open(format!("/proc/{pid}/stat"));
        let stat = stat.map_err(|e| {
            e.raw_os_error()
                .map_or(Errno::SRCH, Errno::from_raw_os_error)
        })?;
        let mut watch = Self {
            stat,
            seen: 0,
            known: 0,
            next: Instant::now(),
            exposure: Exposure::default(),
            fixed: 0,
            at_limit: 0,
            relatives: BTreeSet::new(),
            strangers: false,
            peak: 0,
        };
        watch.seen = watch.faults();
        Ok(watch)
    }

    /// Faults of the process so far; as many as before where it is gone.
    fn faults(&self) -> u64 {
        let mut text = [0; 1024];
        let read = self.stat.read_at(&mut text, 0).unwrap_or(0);
        faults_of(&text[..read]).unwrap_or(self.seen)
    }

    /// The faults since the last look that the guard does not know of.
    fn unknown(&mut self) -> u64 {
        let now = self.faults();
        let new = now.saturating_sub(self.seen);
        self.seen = now;
        let unknown = new.saturating_sub(self.known);
        self.known = self.known.saturating_sub(new);
        unknown
    }

    /// So many faults are to come, or were, of pages that count as dirty.
    pub(super) fn expect(&mut self, faults: u64) {
        self.known = self.known.saturating_add(faults);
    }

    fn exposed(&self) -> u64 {
        self.exposure.pages() + self.fixed
    }

    /// What is exposed beyond what was when the limit was set.
    pub(super) fn grown(&self) -> u64 {
        self.exposed().saturating_sub(self.at_limit)
    }
}

/// Faults in the text of `/proc/PID/stat` (`proc_pid_stat(5)`): minor ones and major ones, of all
/// threads.
fn faults_of(text: &[u8]) -> Option<u64> {
    let name_ends = text.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(text.get(name_ends + 1..)?).ok()?;
    let mut words = rest.split_ascii_whitespace();
    let minor: u64 = words.nth(7)?.parse().ok()?;
    let major: u64 = words.nth(1)?.parse().ok()?;
    minor.checked_add(major)
}

/// Pages of its own that a process has, in memory and in swap.
fn own_pages(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |line: &str| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
    let own = |line: &&str| line.starts_with("RssAnon:") || line.starts_with("VmSwap:");
    let sum: u64 = text.lines().filter(own).filter_map(kib).sum();
    sum / (PAGE >> 10)
}

impl State {
    /// The program stands still, and what is dirty is about to be taken.
    pub(super) fn watch_ends(&mut self) {
        let dirty = self.dirty_count;
        if let Some(watch) = &mut self.watch {
            let most = dirty + watch.grown() + watch.unknown();
            watch.peak = watch.peak.max(most);
            watch.known = 0;
        }
    }

    /// The most pages that may have been dirty at once since this was asked, without what was exposed
    /// when the limit was set.
    pub(super) fn take_peak(&mut self) -> u64 {
        let dirty = self.dirty_count;
        let watch = self.watch.as_mut();
        let peak = watch.map_or(0, |w| std::mem::take(&mut w.peak));
        peak.max(dirty + self.watch.as_ref().map_or(0, Watch::grown))
    }

    pub(super) fn exposure(&self) -> Exposure {
        let watch = self.watch.as_ref();
        watch.map_or_else(Exposure::default, |w| Exposure {
            private: w.exposure.private + w.fixed,
            shared: w.exposure.shared.clone(),
        })
    }

    /// A limit is in force from now on, or none; these processes are guarded.
    pub(super) fn watch_begins(&mut self, relatives: &BTreeSet<u32>) {
        if let Some(watch) = &mut self.watch {
            watch.at_limit = watch.exposed();
            watch.relatives.clone_from(relatives);
            watch.peak = 0;
        }
    }
}

impl Shared {
    /// How long it is until the next look, where there is to be one.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let state = self.lock();
        let watch = state.watch.as_ref().filter(|_| state.limit.is_some())?;
        Some(watch.next.saturating_duration_since(Instant::now()))
    }

    /// Looks whether something is dirty that nobody guards.
    pub(super) fn look(&self, state: &mut State) {
        let began = Instant::now();
        let dirty = state.dirty_count;
        let Some(watch) = state.watch.as_mut().filter(|w| began >= w.next) else {
            return;
        };
        let unknown = watch.unknown();
        watch.peak = watch.peak.max(dirty + watch.grown() + unknown);
        if unknown > 0 || watch.strangers {
            self.look_closely(state);
        }
        let (dirty, limit) = (state.dirty_count, state.limit);
        let Some(watch) = &mut state.watch else {
            return;
        };
        let now = dirty + watch.grown();
        watch.peak = watch.peak.max(now);
        watch.next = Instant::now() + LOOK.max(began.elapsed() * (PART - 1));
        if limit.is_some_and(|limit| now > limit) {
            signal(&self.pressure);
        }
    }

    /// Registers mappings that are new, and counts what is dirty in them; and what cannot be guarded.
    pub(super) fn look_closely(&self, state: &mut State) {
        let mut exposure = Exposure::default();
        if Arena::is_stamped(self.pid, self.foothold) {
            let Ok(mappings) = maps::read(self.pid) else {
                return;
            };
            for m in mappings.iter().filter(|m| m.prot & 2 != 0) {
                let pages = m.len() / PAGE;
                if m.shared {
                    let extent = m.offset / PAGE + pages;
                    let object = exposure.shared.entry((m.device, m.inode)).or_default();
                    *object = (*object).max(extent);
                } else if m.inode != 0 || !self.take_in(state, m) {
                    exposure.private += pages;
                }
            }
            let arena = |m: &&Mapping| (m.start..m.end).contains(&self.foothold);
            if let Some(ours) = mappings.iter().find(arena) {
                exposure.shared.remove(&(ours.device, ours.inode));
            }
        } else {
            exposure.private += own_pages(self.pid);
        }
        let Some(watch) = &mut state.watch else {
            return;
        };
        watch.strangers = false;
        let mut children = family::children(self.pid);
        while let Some(child) = children.pop() {
            if !watch.relatives.contains(&child) {
                // One that is about to begin a program has the memory of its parent meanwhile.
                watch.strangers = true;
                if kcmp::same(child, self.pid, kcmp::Kind::Memory) == Ok(false) {
                    exposure.private += own_pages(child);
                }
                children.extend(family::children(child));
            }
        }
        watch.exposure = exposure;
    }

    /// Sees to it that a mapping is guarded; says whether it can be.
    fn take_in(&self, state: &mut State, m: &Mapping) -> bool {
        let first = (m.start, m.start + PAGE);
        match self.tracker.fill(first) {
            // It is registered.
            Ok(0) => return true,
            Ok(_) => {
                state.note_dirty((first.0 / PAGE, first.1 / PAGE));
                return true;
            }
            Err(Errno::NOENT) => {}
            Err(e) => return e != Errno::INVAL,
        }
        let span = (m.start, m.end);
        let register = || self.tracker.register(span.0, span.1);
        // Twice: what the kernel moved here may have brought its protection along.
        let registered = register()
            .and_then(|()| self.tracker.unregister(span.0, span.1))
            .and_then(|()| register());
        if registered.is_err() {
            return registered != Err(Errno::INVAL);
        }
        let mut there = Vec::new();
        let scanned = state.pagemap.scan(span.0, span.1, EXISTS, |r| {
            if r.categories == 0 {
                there.push((r.start / PAGE, r.end / PAGE));
            }
        });
        for span in there {
            state.note_dirty(span);
        }
        // It went away meanwhile, then.
        let _ = scanned;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_behind_any_name() {
        let text = b"1234 (a) b (c) S 1 1234 1234 0 -1 4194304 17 1000 5 2000 3 4 0 0 20 0 1";
        assert_eq!(faults_of(text), Some(22));
        assert_eq!(faults_of(b"1234 (a"), None);
        assert_eq!(faults_of(b"1234 (a) S 1 2"), None);
    }

    #[test]
    fn one_s_own_pages_are_known() {
        let own = own_pages(std::process::id());
        assert!(own > 10 && own < 1 << 24, "{own}");
        assert_eq!(own_pages(u32::MAX), 0);
    }

    #[test]
    fn what_two_share_counts_once() {
        let of = |private, shared: &[(u64, u64)]| Exposure {
            private,
            shared: shared
                .iter()
                .map(|(inode, pages)| (((0, 1), *inode), *pages))
                .collect(),
        };
        let mut all = of(5, &[(1, 10), (2, 20)]);
        all.add(&of(7, &[(1, 15), (3, 1)]));
        assert_eq!(all, of(12, &[(1, 15), (2, 20), (3, 1)]));
        assert_eq!(all.pages(), 48);
    }
}
