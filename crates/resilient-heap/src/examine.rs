//! Looking at a heap without its program.

use crate::error::Error;
use crate::home::{Home, Scrubbed};
use crate::layout::{Geometry, PAGE};
use crate::memory::Memory;
use crate::{log, superblock};
use alloc::boxed::Box;
use alloc::string::String;

/// What a heap is, and how it fares.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its identity.
    pub id: u64,
    /// Bytes of the memory that it takes.
    pub bytes: usize,
    /// Bytes of data that there is room for in the zones in use.
    pub data_bytes: usize,
    /// Zones in use.
    pub zones: usize,
    /// Data pages of a zone, of 4096 bytes.
    pub zone_pages: usize,
    /// Pages of each half of the log.
    pub log_pages: usize,
    /// The fingerprint of the root's layout.
    pub fingerprint: u64,
    /// The types that the root is made of.
    pub schema: String,
    /// It was not closed: commits were still on their way home.
    pub unfinished: bool,
    /// Commits that were brought home.
    pub replayed: u32,
    /// An incomplete commit was discarded.
    pub discarded: bool,
    /// Damage of superblock, schema or log that was corrected.
    pub corrected_elsewhere: u64,
    /// What a scrub found.
    pub scrubbed: Scrubbed,
}

/// Brings unfinished commits home, reads everything and repairs what can be repaired, as opening and
/// scrubbing do, but without knowing the types: values and pointers are not judged. To leave a heap
/// untouched, give a copy (`FileMemory::copy`).
///
/// # Errors
/// [`Error::NotAHeap`], [`Error::Damaged`]: nothing was changed. [`Error::Memory`].
pub fn examine(memory: impl Memory + 'static) -> Result<Report, Error> {
    // Where there is no superblock there is nothing to examine, whatever sizes one would have chosen.
    let any = Geometry::new(16, 1).ok_or(Error::NotAHeap)?;
    let mut home = Home::new(Box::new(memory), any, 0, 0);
    let found = superblock::find(&mut home, any)?.ok_or(Error::NotAHeap)?;
    superblock::mend(&home, &found)?;
    let unfinished = !log::is_retired(&home);
    let recovered = log::recover(&home)?;
    let corrected_elsewhere = home.health().corrected;
    let scrubbed = home.scrub(true)?;
    let geometry = home.geometry;
    Ok(Report {
        id: found.id,
        bytes: geometry.len(found.zones),
        data_bytes: geometry.zone_data() * found.zones,
        zones: found.zones,
        zone_pages: geometry.zone_data() / PAGE,
        log_pages: geometry.log_pages(),
        fingerprint: found.fingerprint,
        schema: superblock::schema(&home, &found),
        unfinished,
        replayed: recovered.replayed,
        discarded: recovered.discarded,
        corrected_elsewhere,
        scrubbed,
    })
}

/// What the bytes at a place of this heap are: `superblock`, `schema`, `log`, `data`, `words` (of the
/// code) or `parity`.
#[must_use]
pub fn what_is_at(report: &Report, at: usize) -> &'static str {
    let sizes = Geometry::new(report.zone_pages as u64, report.log_pages as u64);
    sizes.map_or("unknown", |geometry| geometry.what(at))
}
