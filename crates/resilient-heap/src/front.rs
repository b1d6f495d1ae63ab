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
//!
//! # Safety
//! Pointers are made in [`Front::at`] alone, which checks the bounds of the zone.
#![allow(unsafe_code)]

use crate::code::{LINE, Line};
use crate::error::Error;
use crate::home::Home;
use crate::layout::{Geometry, PAGE};
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
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
struct Before {
    at: usize,
    state: u8,
    line: Line,
}

struct Zone {
    base: NonNull<u8>,
    layout: Layout,
    state: Vec<u8>,
}

/// See the module.
pub struct Front {
    geometry: Geometry,
    zones: Vec<Zone>,
    levels: Vec<Vec<Before>>,
    /// Lines that committed transactions changed, and that are not durable yet.
    pending: BTreeSet<usize>,
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
            pending: BTreeSet::new(),
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
        });
        Ok(())
    }

    /// How many zones there is room for.
    pub fn zones(&self) -> usize {
        self.zones.len()
    }

    /// The zone and the lines of a range, or an error if it is not within one zone.
    fn lines(&self, at: usize, len: usize) -> Result<(usize, core::ops::Range<usize>), Error> {
        let inside = self.geometry.data(at).filter(|(zone, within)| {
            let end = within.checked_add(len);
            *zone < self.zones.len() && end.is_some_and(|end| end <= self.geometry.zone_data())
        });
        let (zone, within) = inside.ok_or(Error::Invalid {
            what: "a pointer leads out of the data",
            at,
        })?;
        Ok((zone, within / LINE..(within + len).div_ceil(LINE)))
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
    pub fn look(&mut self, home: &Home, at: usize, len: usize) -> Result<*mut u8, Error> {
        let (zone, lines) = self.lines(at, len)?;
        for line in lines {
            if self.zones[zone].state[line] == ABSENT {
                let (bytes, corrected) = if zone < home.zones() {
                    home.read(zone, line * LINE)?
                } else {
                    ([0; LINE], false)
                };
                self.put(zone, line, &bytes);
                self.zones[zone].state[line] = HERE;
                if corrected {
                    // Written back with the next commit.
                    self.pending
                        .insert(self.geometry.zone_at(zone) + line * LINE);
                }
            }
        }
        Ok(self.at(zone, at - self.geometry.zone_at(zone)))
    }

    /// Makes a range writable; where it is.
    pub fn change(&mut self, home: &Home, at: usize, len: usize) -> Result<*mut u8, Error> {
        let place = self.look(home, at, len)?;
        let (zone, lines) = self.lines(at, len)?;
        let level = self.levels.len().saturating_sub(1);
        let changed = CHANGED + level as u8;
        for line in lines {
            let state = self.zones[zone].state[line];
            if state != changed {
                self.note(zone, line, state, changed);
            }
        }
        Ok(place)
    }

    fn note(&mut self, zone: usize, line: usize, state: u8, changed: u8) {
        let before = Before {
            at: self.geometry.zone_at(zone) + line * LINE,
            state,
            line: self.get(zone, line),
        };
        if let Some(level) = self.levels.last_mut() {
            level.push(before);
        }
        self.zones[zone].state[line] = changed;
    }

    /// Makes a range writable whose contents nobody needs: lines that lie wholly in it are not read
    /// from home, so that they may be lost there.
    pub fn renew(&mut self, home: &Home, at: usize, len: usize) -> Result<*mut u8, Error> {
        let (zone, lines) = self.lines(at, len)?;
        let within = at - self.geometry.zone_at(zone);
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
        self.levels.push(Vec::new());
        Ok(())
    }

    fn place(&self, at: usize) -> Option<(usize, usize)> {
        let (zone, within) = self.geometry.data(at)?;
        (zone < self.zones.len()).then_some((zone, within / LINE))
    }

    /// Takes back what the innermost level changed, and ends it.
    pub fn abort(&mut self) {
        for before in self.levels.pop().unwrap_or_default().into_iter().rev() {
            if let Some((zone, line)) = self.place(before.at) {
                self.put(zone, line, &before.line);
                self.zones[zone].state[line] = before.state;
            }
        }
    }

    /// Ends the innermost level and leaves its changes to the one around it, or, if there is none, to
    /// the next time that changes are made durable.
    pub fn merge(&mut self) {
        let inner = self.levels.pop().unwrap_or_default();
        let outer = self.levels.len().checked_sub(1);
        for before in inner {
            let Some((zone, line)) = self.place(before.at) else {
                continue;
            };
            match outer {
                None => {
                    self.pending.insert(before.at);
                    self.zones[zone].state[line] = HERE;
                }
                Some(level) => {
                    let changed = CHANGED + level as u8;
                    self.zones[zone].state[line] = changed;
                    if before.state != changed
                        && let Some(outer) = self.levels.last_mut()
                    {
                        outer.push(before);
                    }
                }
            }
        }
    }

    /// The lines that the outermost level changed, as they were before. Only while no other level is
    /// open.
    pub fn before(&self) -> BTreeMap<usize, Line> {
        let level = self.levels.first().into_iter().flatten();
        level.map(|before| (before.at, before.line)).collect()
    }

    /// Lines that would be made durable now: places.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// How many lines would be pending if the outermost level were merged.
    pub fn would_be_pending(&self) -> usize {
        let level = self.levels.first().into_iter().flatten();
        let more = level.filter(|before| !self.pending.contains(&before.at));
        self.pending.len() + more.count()
    }

    /// Lines to be made durable, with their contents, where they differ from home.
    pub fn changes(&self, home: &Home) -> BTreeMap<usize, Line> {
        let mut changes = BTreeMap::new();
        for at in &self.pending {
            if let Some((zone, line)) = self.place(*at) {
                let bytes = self.get(zone, line);
                let same = match home.data(*at) {
                    Some((zone, within)) => {
                        matches!(home.read(zone, within), Ok((old, false)) if old == bytes)
                    }
                    // A zone that is taken into use by this very commit begins with zeros.
                    None => bytes == [0; LINE],
                };
                if !same {
                    changes.insert(*at, bytes);
                }
            }
        }
        changes
    }

    /// Everything that was pending is at home.
    pub fn settled(&mut self) {
        self.pending.clear();
    }
}
