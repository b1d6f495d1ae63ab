//! The heap's bytes at home, in the memory that survives: verified when read, changed by commits only.
//!
//! # Rules
//! - Data lines, their words and parity lines change only in [`Home::apply`] (a commit), in
//!   [`Home::replay`] (recovery) and when damage is repaired; in all three nobody else is inside.
//! - A reader holds [`Home::lock`] shared, or is the one writer.
//! - The writer keeps what it read, verified, in its working copy; what a commit writes over is taken from
//!   there and not read again. What flipped at home meanwhile is written over with the line and its word, and
//!   the parity changes by what differs between two lines that were right: it stays the sum of what is right.
//! - Nothing is shown that does not fit its word. A reader that meets a flipped bit gets a corrected
//!   copy; the place itself is repaired by the next commit that writes there, or by a scrub.
//!
//! # Safety
//! Reads through the memory's pointer are bounded by its length, in [`Home::bytes`] and
//! [`Home::view`]; stores, in [`Home::store`].
#![allow(unsafe_code)]

use crate::code::{self, LINE, Line};
use crate::column::{self, Member, Outcome};
use crate::error::Error;
use crate::layout::{Column, Geometry};
use crate::lock::Lock;
use crate::memory::Memory;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// The bytes of a line, at an address that fits any value.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Aligned(pub Line);

/// What a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Lines that were read.
    pub lines: u64,
    /// Places of lines (data or its word, or parity) that were damaged and are right again.
    pub corrected: Vec<usize>,
    /// Places of lines that are lost.
    pub lost: Vec<usize>,
}

/// Counts since the heap was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// How often damage was met and corrected.
    pub corrected: u64,
    /// How often something was found lost.
    pub lost: u64,
}

/// The bytes of a read: where they are, or a corrected copy of their lines.
pub enum View {
    /// In place.
    Place(*const u8),
    /// All lines that the range touches.
    Copy(Box<[Aligned]>),
}

/// A line that a commit writes.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Its place.
    pub at: usize,
    /// What is right at home, if that is known: it was read, and needed no correction.
    pub old: Option<&'a Line>,
    /// What shall be there.
    pub new: &'a Line,
}

/// See the module.
pub struct Home {
    memory: Box<dyn Memory>,
    /// Where the memory is, and how long; asked for again whenever it grew.
    base: AtomicPtr<u8>,
    len: AtomicUsize,
    /// How long the memory was before this run.
    found: usize,
    /// Sizes.
    pub geometry: Geometry,
    /// The heap's identity.
    pub id: u64,
    /// Who is inside.
    pub lock: Lock,
    zones: AtomicUsize,
    corrected: AtomicU64,
    lost: AtomicU64,
}

impl Home {
    /// A home whose superblock said so.
    pub fn new(memory: Box<dyn Memory>, geometry: Geometry, id: u64, zones: usize) -> Self {
        Self {
            base: AtomicPtr::new(memory.base().as_ptr()),
            len: AtomicUsize::new(memory.len()),
            found: memory.len(),
            memory,
            geometry,
            id,
            lock: Lock::default(),
            zones: AtomicUsize::new(zones),
            corrected: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    /// How many zones are in use.
    pub fn zones(&self) -> usize {
        self.zones.load(Ordering::Acquire)
    }

    /// Takes further zones into use.
    pub fn set_zones(&self, zones: usize) {
        self.zones.store(zones, Ordering::Release);
    }

    /// Counts since the heap was opened.
    pub fn health(&self) -> Health {
        Health {
            corrected: self.corrected.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    /// Notes damage that was corrected elsewhere.
    pub fn note_corrected(&self, times: u64) {
        self.corrected.fetch_add(times, Ordering::Relaxed);
    }

    /// Bytes of the memory.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Makes the memory longer.
    pub fn grow(&self, len: usize) -> Result<(), Error> {
        let grown = self.memory.grow(len);
        self.base
            .store(self.memory.base().as_ptr(), Ordering::Release);
        self.len.store(self.memory.len(), Ordering::Release);
        grown
    }

    /// The bytes at a place, as they are; zeros beyond the end.
    #[inline]
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if at.checked_add(N).is_some_and(|end| end <= self.len()) {
            // SAFETY: the range was found to be inside; readers exclude the writer by the lock.
            unsafe {
                let from = self.base.load(Ordering::Acquire).add(at);
                core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), N);
            }
        }
        bytes
    }

    /// A line as it is; zeros beyond the end.
    pub fn line(&self, at: usize) -> Line {
        self.bytes(at)
    }

    /// Stores bytes; beyond the end nothing happens. Nobody may hold a reference to them.
    pub fn store(&self, at: usize, bytes: &[u8]) {
        if at
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.len())
        {
            // SAFETY: the range was found to be inside. References into a heap exist under the shared
            // lock only; whoever stores what readers look at holds it exclusively.
            unsafe { self.memory.store(at, bytes) }
        }
    }

    /// Begins to make a range durable.
    pub fn flush(&self, at: usize, len: usize) {
        self.memory.flush(at, len);
    }

    /// Waits until all that was flushed is durable.
    pub fn fence(&self) -> Result<(), Error> {
        self.memory.fence()
    }

    /// Zone and place in its data, of a place that is in use.
    pub fn data(&self, at: usize) -> Option<(usize, usize)> {
        self.geometry
            .data(at)
            .filter(|(zone, _)| *zone < self.zones())
    }

    /// The word of a line, without its seed.
    fn word(&self, zone: usize, within: usize) -> u32 {
        let at = self.geometry.word_at(zone, within);
        u32::from_le_bytes(self.bytes(at)) ^ self.seed(zone, within)
    }

    fn seed(&self, zone: usize, within: usize) -> u32 {
        code::seed(self.id, (self.geometry.zone_at(zone) + within) as u64)
    }

    fn store_word(&self, zone: usize, within: usize, word: u32) {
        let stored = word ^ self.seed(zone, within);
        self.store(self.geometry.word_at(zone, within), &stored.to_le_bytes());
    }

    fn member(&self, zone: usize, within: usize) -> Member {
        Member {
            line: self.line(self.geometry.zone_at(zone) + within),
            word: self.word(zone, within),
        }
    }

    fn members(&self, column: Column) -> Vec<Member> {
        let places = self.geometry.members(column);
        places
            .map(|within| self.member(column.zone, within))
            .collect()
    }

    /// A data line, verified, corrected if it must be; and whether it was.
    pub fn read(&self, zone: usize, within: usize) -> Result<(Line, bool), Error> {
        let member = self.member(zone, within);
        if member.fits() {
            return Ok((member.line, false));
        }
        let column = self.geometry.column(zone, within);
        let mut members = self.members(column);
        let outcome = column::heal(&mut members, &self.line(self.geometry.parity_at(column)));
        let own = self.geometry.members(column).position(|w| w == within);
        match own.filter(|own| outcome.corrected.contains(own)) {
            Some(own) => {
                self.corrected.fetch_add(1, Ordering::Relaxed);
                Ok((members[own].line, true))
            }
            None => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                let at = self.geometry.zone_at(zone) + within;
                Err(Error::Lost { at })
            }
        }
    }

    /// Whether all lines of a range of a zone in use fit their words.
    fn fit(&self, zone: usize, first: usize, end: usize) -> bool {
        let at = self.geometry.zone_at(zone) + first;
        let word_at = self.geometry.word_at(zone, first);
        let count = (end - first).div_ceil(LINE);
        // The words of a zone lie behind its lines.
        if word_at + 4 * count > self.len() {
            return false;
        }
        let base = self.base.load(Ordering::Acquire);
        // SAFETY: both ranges were found to be inside; readers exclude the writer by the lock, so that nobody
        // changes them meanwhile.
        let (lines, words) = unsafe {
            (
                core::slice::from_raw_parts(base.add(at).cast::<Line>(), count),
                core::slice::from_raw_parts(base.add(word_at).cast::<[u8; 4]>(), count),
            )
        };
        lines
            .iter()
            .zip(words)
            .enumerate()
            .all(|(i, (line, word))| {
                let seed = code::seed(self.id, (at + i * LINE) as u64);
                code::line_crc(line) ^ seed == u32::from_le_bytes(*word)
            })
    }

    /// The bytes of a range, all verified. The caller holds the lock, or is the writer.
    pub fn view(&self, at: usize, len: usize) -> Result<View, Error> {
        let outside = Error::Invalid {
            what: "a pointer leads out of the data",
            at,
        };
        let (zone, within) = self.data(at).ok_or(outside.clone())?;
        let end = within.checked_add(len);
        let end = end
            .filter(|end| *end <= self.geometry.zone_data())
            .ok_or(outside)?;
        let first = within / LINE * LINE;
        let lines = (first..end).step_by(LINE);
        if self.fit(zone, first, end) {
            let base = self.base.load(Ordering::Acquire);
            // SAFETY: `at` lies in a zone in use, which the memory's length contains.
            return Ok(View::Place(unsafe { base.add(at) }));
        }
        let copy: Result<Vec<Aligned>, Error> = lines
            .map(|within| Ok(Aligned(self.read(zone, within)?.0)))
            .collect();
        Ok(View::Copy(copy?.into_boxed_slice()))
    }

    /// Makes a new zone of zeros readable: words and parity. Nobody looks at it yet. Where the memory grew in
    /// this run, its zeros are durable already; elsewhere an earlier run may have cleared what was there, and
    /// ended before that was durable.
    pub fn prepare_zone(&self, zone: usize) {
        let begin = self.geometry.zone_at(zone);
        let (data, end) = (self.geometry.zone_data(), begin + self.geometry.zone_len());
        let clear = |at: usize| {
            if self.line(at) != [0; LINE] {
                self.store(at, &[0; LINE]);
                self.flush(at, LINE);
            }
        };
        for first in (0..data).step_by(LINE * 16) {
            let mut words = [0; LINE];
            for (i, word) in words.chunks_exact_mut(4).enumerate() {
                let within = first + i * LINE;
                clear(begin + within);
                let stored = code::line_crc(&[0; LINE]) ^ self.seed(zone, within);
                word.copy_from_slice(&stored.to_le_bytes());
            }
            let at = self.geometry.word_at(zone, first);
            self.store(at, &words);
            self.flush(at, LINE);
        }
        // Each column is the sum of zeros.
        (begin + data + data / 16..end)
            .step_by(LINE)
            .for_each(clear);
        if begin < self.found {
            self.flush(begin, end - begin);
        }
    }

    /// The lines at home that change with a line of data: it, its word and its parity.
    pub fn places(&self, at: usize, places: &mut Vec<usize>) {
        if let Some((zone, within)) = self.data(at) {
            let column = self.geometry.column(zone, within);
            let word_at = self.geometry.word_at(zone, within) / LINE * LINE;
            places.extend([at, word_at, self.geometry.parity_at(column)]);
        }
    }

    /// Writes the lines of a commit whose log is durable: data, words and parity. Nobody else is
    /// inside. Not flushed.
    pub fn apply(&self, changes: &[Change<'_>]) {
        for change in changes {
            let Some((zone, within)) = self.data(change.at) else {
                continue;
            };
            let column = self.geometry.column(zone, within);
            let parity_at = self.geometry.parity_at(column);
            let old = change.old.copied().or_else(|| {
                // Never read, or not right then: what is there is repaired first.
                if !self.member(zone, within).fits() {
                    self.repair(column, &mut Scrubbed::default());
                }
                let member = self.member(zone, within);
                member.fits().then_some(member.line)
            });
            self.store(change.at, change.new);
            self.store_word(zone, within, code::line_crc(change.new));
            let parity = match old {
                Some(old) => column::add(&self.line(parity_at), &column::add(&old, change.new)),
                None => column::sum(self.members(column).iter().map(|m| &m.line)),
            };
            self.store(parity_at, &parity);
        }
    }

    /// Writes the lines of a log again, however far an earlier writing came. Flushed, not fenced.
    pub fn replay(&self, lines: &BTreeMap<usize, Line>) {
        let mut columns = BTreeSet::new();
        for (at, line) in lines {
            if let Some((zone, within)) = self.data(*at) {
                self.store(*at, line);
                self.store_word(zone, within, code::crc(line));
                self.flush(*at, LINE);
                self.flush(self.geometry.word_at(zone, within), 4);
                columns.insert(self.geometry.column(zone, within));
            }
        }
        for column in columns {
            self.renew_parity(column);
        }
    }

    /// Makes the parity line of a column anew, after what its own words correct. If a member is lost,
    /// the parity stays as it is.
    fn renew_parity(&self, column: Column) {
        let mut members = self.members(column);
        for (within, member) in self.geometry.members(column).zip(&mut members) {
            if let Some(fix) = code::correct(&member.line, member.word) {
                if fix.bits > 0 {
                    (member.line, member.word) = (fix.line, fix.word);
                    self.put(column.zone, within, member);
                    self.note_corrected(1);
                }
            } else {
                return;
            }
        }
        let sum = column::sum(members.iter().map(|m| &m.line));
        let at = self.geometry.parity_at(column);
        if sum != self.line(at) {
            self.store(at, &sum);
        }
        self.flush(at, LINE);
    }

    fn put(&self, zone: usize, within: usize, member: &Member) {
        let at = self.geometry.zone_at(zone) + within;
        self.store(at, &member.line);
        self.store_word(zone, within, member.word);
        self.flush(at, LINE);
        self.flush(self.geometry.word_at(zone, within), 4);
    }

    /// Repairs what can be repaired of a column, in place. A crash meanwhile leaves damage that can be
    /// repaired as before: each store only takes flipped bits back.
    fn repair(&self, column: Column, found: &mut Scrubbed) {
        let (outcome, members) = self.examine(column, found);
        for (i, within) in self.geometry.members(column).enumerate() {
            if outcome.corrected.contains(&i) {
                self.put(column.zone, within, &members[i]);
            }
        }
        if let Some(parity) = outcome.parity {
            let at = self.geometry.parity_at(column);
            self.store(at, &parity);
            self.flush(at, LINE);
        }
    }

    fn examine(&self, column: Column, found: &mut Scrubbed) -> (Outcome, Vec<Member>) {
        let mut members = self.members(column);
        let parity_at = self.geometry.parity_at(column);
        let outcome = column::heal(&mut members, &self.line(parity_at));
        found.lines += members.len() as u64 + 1;
        for (i, within) in self.geometry.members(column).enumerate() {
            let at = self.geometry.zone_at(column.zone) + within;
            if outcome.corrected.contains(&i) {
                found.corrected.push(at);
            } else if outcome.lost.contains(&i) {
                found.lost.push(at);
            }
        }
        if outcome.parity.is_some() {
            found.corrected.push(parity_at);
        }
        (outcome, members)
    }

    /// Reads everything; repairs what can be, if asked to. For repairs nobody else may be inside.
    pub fn scrub(&self, repair: bool) -> Result<Scrubbed, Error> {
        let mut found = Scrubbed::default();
        for zone in 0..self.zones() {
            for column in self.geometry.columns(zone) {
                if repair {
                    self.repair(column, &mut found);
                } else {
                    self.examine(column, &mut found);
                }
            }
        }
        self.note_corrected(found.corrected.len() as u64);
        self.lost
            .fetch_add(found.lost.len() as u64, Ordering::Relaxed);
        if repair {
            self.fence()?;
        }
        Ok(found)
    }
}
