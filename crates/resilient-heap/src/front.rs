//! The writer's working copy: the lines that transactions looked at or changed, in ordinary memory.
//!
//! A transaction changes values here, in place and with ordinary references; the home stays as it is
//! until the commit. Lines are copied from home, verified, when they are first asked for.
//!
//! # Rules
//! - The bytes of a zone never move, so that references stay good while the heap grows.
//! - A line is read or written by this module only when no reference for changing lies in it: on the
//!   first look (it is not valid yet, so nobody has a reference), on the first change within a level (so
//!   nobody has a reference for changing yet: nested levels end all of them), and at the end of a level.
//! - A line that waits to be made durable is remembered with what is right at home, unless it was corrected
//!   there or never read: then the commit reads it.
//!
//! # Safety
//! Pointers are made in [`Front::at`] alone, which checks the bounds of the zone.
#![allow(unsafe_code)]

use crate::code::{LINE, Line};
use crate::error::Error;
use crate::home::{Change, Home};
use crate::layout::{Geometry, PAGE};
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;

/// The line is not here.
const ABSENT: u8 = 0;
/// The line is here.
const HERE: u8 = 1;
/// The line was changed in level 0; one more for each further level.
const CHANGED: u8 = 2;

/// The most levels of nesting.
const LEVELS: usize = 200;

/// A line before a level changed it.
#[derive(Clone, Debug)]
pub struct Before {
    /// Its place.
    pub at: usize,
    /// What it was.
    pub line: Line,
    state: u8,
    zone: usize,
    index: usize,
}

struct Zone {
    base: NonNull<u8>,
    layout: Layout,
    state: Vec<u8>,
    /// Whether the line waits.
    waits: Vec<bool>,
}

/// See the module.
pub struct Front {
    geometry: Geometry,
    zones: Vec<Zone>,
    levels: Vec<Vec<Before>>,
    /// Lists of levels that ended, to be used again.
    spare: Vec<Vec<Before>>,
    /// Lines that committed transactions changed, and that are not durable yet; each once, as it is at
    /// home if it is known (not [`ABSENT`]).
    pending: Vec<Before>,
}

// SAFETY: the pointers are owned; nobody else has them.
unsafe impl Send for Front {}

impl Drop for Zone {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by `Front::add_zone`.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl Front {
    /// Nothing is here yet.
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            zones: Vec::new(),
            levels: Vec::new(),
            spare: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// Adds room for a zone.
    pub fn add_zone(&mut self) -> Result<(), Error> {
        let len = self.geometry.zone_data();
        let full = Error::Full { wanted: len };
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| full.clone())?;
        // SAFETY: a zone has at least 16 pages.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(full)?;
        self.zones.push(Zone {
            base,
            layout,
            state: vec![ABSENT; len / LINE],
            waits: vec![false; len / LINE],
        });
        Ok(())
    }

    /// How many zones there is room for.
    pub fn zones(&self) -> usize {
        self.zones.len()
    }

    /// The zone of a range, its place there, and its lines; or an error if it is not within one zone.
    #[inline]
    fn lines(&self, at: usize, len: usize) -> Result<(usize, usize, Range<usize>), Error> {
        let inside = self.geometry.data(at).filter(|(zone, within)| {
            let end = within.checked_add(len);
            *zone < self.zones.len() && end.is_some_and(|end| end <= self.geometry.zone_data())
        });
        let (zone, within) = inside.ok_or(Error::Invalid {
            what: "a pointer leads out of the data",
            at,
        })?;
        Ok((zone, within, within / LINE..(within + len).div_ceil(LINE)))
    }

    /// Where the working copy of a place is; the line may be absent.
    fn at(&self, zone: usize, within: usize) -> *mut u8 {
        let within = within.min(self.geometry.zone_data());
        // SAFETY: at most one past the zone's allocation.
        unsafe { self.zones[zone].base.as_ptr().add(within) }
    }

    fn get(&self, zone: usize, line: usize) -> Line {
        let mut copy = [0; LINE];
        // SAFETY: `line` is below the number of lines of the zone, or `at` would be one past; all
        // callers take it from `lines` or from a recorded place.
        unsafe {
            core::ptr::copy_nonoverlapping(self.at(zone, line * LINE), copy.as_mut_ptr(), LINE)
        };
        copy
    }

    fn put(&mut self, zone: usize, line: usize, bytes: &Line) {
        // SAFETY: as for `get`; and `&mut self`, with the module's second rule, makes this the only use.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(zone, line * LINE), LINE) };
    }

    /// Makes a range readable; where it is.
    #[inline]
    pub fn look(&mut self, home: &Home, at: usize, len: usize) -> Result<*mut u8, Error> {
        let (zone, within, lines) = self.lines(at, len)?;
        self.bring(home, zone, lines)?;
        Ok(self.at(zone, within))
    }

    /// Brings those lines here that are not.
    #[inline]
    fn bring(&mut self, home: &Home, zone: usize, lines: Range<usize>) -> Result<(), Error> {
        for index in lines {
            if self.zones[zone].state[index] == ABSENT {
                self.fetch(home, zone, index)?;
            }
        }
        Ok(())
    }

    #[cold]
    fn fetch(&mut self, home: &Home, zone: usize, index: usize) -> Result<(), Error> {
        let (bytes, corrected) = if zone < home.zones() {
            home.read(zone, index * LINE)?
        } else {
            ([0; LINE], false)
        };
        self.put(zone, index, &bytes);
        self.zones[zone].state[index] = HERE;
        if corrected && !core::mem::replace(&mut self.zones[zone].waits[index], true) {
            // Written back with the next commit.
            let before = self.before(zone, index, ABSENT);
            self.pending.push(before);
        }
        Ok(())
    }

    /// A line as it is now.
    #[inline]
    fn before(&self, zone: usize, index: usize, state: u8) -> Before {
        Before {
            at: self.geometry.zone_at(zone) + index * LINE,
            line: self.get(zone, index),
            state,
            zone,
            index,
        }
    }

    /// Makes a range writable; where it is.
    pub fn change(&mut self, home: &Home, at: usize, len: usize) -> Result<*mut u8, Error> {
        let (zone, within, lines) = self.lines(at, len)?;
        self.bring(home, zone, lines.clone())?;
        let level = self.levels.len().saturating_sub(1);
        let changed = CHANGED + level as u8;
        for index in lines {
            let state = self.zones[zone].state[index];
            if state != changed {
                self.note(zone, index, state, changed);
            }
        }
        Ok(self.at(zone, within))
    }

    fn note(&mut self, zone: usize, index: usize, state: u8, changed: u8) {
        let before = self.before(zone, index, state);
        if let Some(level) = self.levels.last_mut() {
            level.push(before);
        }
        self.zones[zone].state[index] = changed;
    }

    /// Makes a range writable whose contents nobody needs: lines that lie wholly in it are not read
    /// from home, so that they may be lost there.
    pub fn renew(&mut self, home: &Home, at: usize, len: usize) -> Result<*mut u8, Error> {
        let (zone, within, lines) = self.lines(at, len)?;
        for line in lines {
            let whole = line * LINE >= within && (line + 1) * LINE <= within + len;
            if whole && self.zones[zone].state[line] == ABSENT {
                let level = self.levels.len().saturating_sub(1);
                self.put(zone, line, &[0; LINE]);
                self.note(zone, line, ABSENT, CHANGED + level as u8);
            }
        }
        self.change(home, at, len)
    }

    /// Begins a level.
    pub fn begin(&mut self) -> Result<(), Error> {
        if self.levels.len() >= LEVELS {
            return Err(Error::TooDeep);
        }
        self.levels.push(self.spare.pop().unwrap_or_default());
        Ok(())
    }

    fn end(&mut self) -> Vec<Before> {
        self.levels.pop().unwrap_or_default()
    }

    /// Takes back what the innermost level changed, and ends it.
    pub fn abort(&mut self) {
        let mut level = self.end();
        for before in level.drain(..) {
            self.put(before.zone, before.index, &before.line);
            self.zones[before.zone].state[before.index] = before.state;
        }
        self.spare.push(level);
    }

    /// Ends the innermost level and leaves its changes to the one around it, or, if there is none, to
    /// the next time that changes are made durable.
    pub fn merge(&mut self) {
        let mut inner = self.end();
        match self.levels.len().checked_sub(1) {
            None => self.merge_outermost(&mut inner),
            Some(level) => {
                let changed = CHANGED + level as u8;
                for before in inner.drain(..) {
                    self.zones[before.zone].state[before.index] = changed;
                    if before.state != changed
                        && let Some(outer) = self.levels.last_mut()
                    {
                        outer.push(before);
                    }
                }
            }
        }
        self.spare.push(inner);
    }

    fn merge_outermost(&mut self, level: &mut Vec<Before>) {
        if self.pending.is_empty() {
            core::mem::swap(&mut self.pending, level);
            for before in &self.pending {
                self.zones[before.zone].state[before.index] = HERE;
                self.zones[before.zone].waits[before.index] = true;
            }
            return;
        }
        for before in level.drain(..) {
            let zone = &mut self.zones[before.zone];
            zone.state[before.index] = HERE;
            if !core::mem::replace(&mut zone.waits[before.index], true) {
                self.pending.push(before);
            }
        }
    }

    /// The lines that the outermost level changed, as they were before, in order; to be given back. Only
    /// while no other level is open, and nothing may be changed meanwhile.
    pub fn take_before(&mut self) -> Vec<Before> {
        let level = self.levels.first_mut();
        let mut before = level.map(core::mem::take).unwrap_or_default();
        before.sort_unstable_by_key(|before| before.at);
        before
    }

    /// See [`Front::take_before`].
    pub fn give_before(&mut self, before: Vec<Before>) {
        if let Some(level) = self.levels.first_mut() {
            *level = before;
        }
    }

    /// How many lines would be made durable now.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// How many lines would be pending if the outermost level were merged.
    pub fn would_be_pending(&self) -> usize {
        let level = self.levels.first().into_iter().flatten();
        let more = level.filter(|before| !self.zones[before.zone].waits[before.index]);
        self.pending.len() + more.count()
    }

    /// Lines to be made durable, with their contents, where they differ from home; in order.
    pub fn changes(&mut self, home: &Home) -> Vec<Change<'_>> {
        self.pending.sort_unstable_by_key(|before| before.at);
        for before in &mut self.pending {
            if before.state != ABSENT {
                continue;
            }
            // A zone that is taken into use by this very commit begins with zeros.
            let found = if before.zone >= home.zones() {
                Ok(([0; LINE], false))
            } else {
                home.read(before.zone, before.index * LINE)
            };
            if let Ok((line, false)) = found {
                (before.line, before.state) = (line, HERE);
            }
        }
        let mut changes = Vec::with_capacity(self.pending.len());
        for before in &self.pending {
            let new = self.now(before.zone, before.index);
            let old = (before.state != ABSENT).then_some(&before.line);
            if old != Some(new) {
                let at = before.at;
                changes.push(Change { at, old, new });
            }
        }
        changes
    }

    /// A line where it is. Only while no level is open: nobody has a reference for changing.
    fn now(&self, zone: usize, index: usize) -> &Line {
        // SAFETY: `index` is that of a line of the zone, recorded by `before`; `&self` excludes changes by this
        // module, and no level is open, as the caller says.
        unsafe { &*self.at(zone, index * LINE).cast::<Line>() }
    }

    /// Everything that was pending is at home.
    pub fn settled(&mut self) {
        for waiting in self.pending.drain(..) {
            self.zones[waiting.zone].waits[waiting.index] = false;
        }
    }
}
