//! Superblock and schema: making a heap, finding one, taking zones into use.
//!
//! Both are there twice. The copies of the superblock are written one after the other, with a fence
//! between, so that one of them is always whole; the newer one counts. The schema is written once, before
//! the superblock.

use crate::error::Error;
use crate::home::Home;
use crate::layout::{self, CARRIED, Geometry, LINES, SCHEMA_LEN, SCHEMA_PAGES, Super};
use crate::{code, code::LINE, log};
use alloc::string::String;
use alloc::vec::Vec;

/// From one version to the next. Many bits change, so that a torn copy is not taken for a whole one with
/// a flipped bit or two, whichever parts of it are there.
const VERSIONS: u64 = 0x01_0101_0101;

fn schema_seed(id: u64, at: usize) -> u32 {
    code::seed(id, at as u64)
}

/// Writes both copies. When this returns, the first is durable; the second is by the next fence, which
/// comes before the first is written again.
fn write_both(home: &Home, superblock: &Super) -> Result<(), Error> {
    home.store(layout::super_at(0), &superblock.encode(0));
    home.flush(layout::super_at(0), LINE);
    home.fence()?;
    home.store(layout::super_at(1), &superblock.encode(1));
    home.flush(layout::super_at(1), LINE);
    Ok(())
}

/// Makes an empty heap of one zone. What the memory held is gone.
pub fn format(home: &mut Home, wanted: Super, schema: &str) -> Result<Super, Error> {
    let superblock = Super {
        version: 1,
        zones: 1,
        schema: schema.len().min(SCHEMA_LEN),
        ..wanted
    };
    (home.geometry, home.id) = (superblock.geometry, superblock.id);
    home.grow(home.geometry.len(1))?;
    for copy in 0..2 {
        let begin = layout::schema_at(copy);
        for (i, carried) in schema.as_bytes()[..superblock.schema]
            .chunks(CARRIED)
            .enumerate()
        {
            let at = begin + i * LINE;
            home.store(at, &layout::seal(carried, schema_seed(home.id, at)));
        }
        home.flush(begin, SCHEMA_PAGES * LINES * LINE);
    }
    home.prepare_zone(0);
    for half in 0..2 {
        log::clear(home, half, 1);
    }
    home.fence()?;
    write_both(home, &superblock)?;
    home.set_zones(1);
    Ok(superblock)
}

/// Finds the superblock; `None` where there never was a heap. Nothing is changed.
pub fn find(home: &mut Home, fresh: Geometry) -> Result<Option<Super>, Error> {
    let lines = [0, 1].map(|copy| home.line(layout::super_at(copy)));
    let mut found: Option<Super> = None;
    let mut error = Error::NotAHeap;
    for (copy, line) in lines.iter().enumerate() {
        match Super::decode(line, copy) {
            Ok((one, _)) if found.is_none_or(|best| best.version < one.version) => {
                found = Some(one)
            }
            Ok(_) | Err(Error::NotAHeap) => {}
            Err(other) => error = other,
        }
    }
    let Some(superblock) = found else {
        // An interrupted beginning: the second copy is written after the first is durable, and nothing
        // can be lost where there never was a root.
        let empty = lines[1] == [0; LINE]
            && (lines[0] == [0; LINE] || home.line(fresh.zone_at(0)) == [0; LINE]);
        return if empty { Ok(None) } else { Err(error) };
    };
    if home.len() < superblock.geometry.len(superblock.zones) {
        return Err(Error::Damaged {
            what: "memory (it is shorter than the heap in it)",
            at: home.len(),
        });
    }
    (home.geometry, home.id) = (superblock.geometry, superblock.id);
    home.set_zones(superblock.zones);
    Ok(Some(superblock))
}

/// Writes copies that are missing, damaged or old again.
pub fn mend(home: &Home, superblock: &Super) -> Result<(), Error> {
    for copy in 0..2 {
        let (at, line) = (layout::super_at(copy), superblock.encode(copy));
        if home.line(at) != line {
            home.note_corrected(1);
            home.store(at, &line);
            home.flush(at, LINE);
            home.fence()?;
        }
    }
    for copy in 0..2 {
        for i in 0..superblock.schema.div_ceil(CARRIED) {
            let at = layout::schema_at(copy) + i * LINE;
            if let Some(carried) = schema_line(home, i)
                && home.line(at) != layout::seal(&carried, schema_seed(home.id, at))
            {
                home.note_corrected(1);
                home.store(at, &layout::seal(&carried, schema_seed(home.id, at)));
                home.flush(at, LINE);
            }
        }
    }
    Ok(())
}

/// A line of the schema, from the copy with fewer flipped bits.
fn schema_line(home: &Home, i: usize) -> Option<[u8; CARRIED]> {
    let found = [0, 1].into_iter().filter_map(|copy| {
        let at = layout::schema_at(copy) + i * LINE;
        layout::unseal(&home.line(at), schema_seed(home.id, at))
    });
    found
        .min_by_key(|(_, bits)| *bits)
        .map(|(carried, _)| carried)
}

/// The schema as it was written; lost lines are shown as such.
pub fn schema(home: &Home, superblock: &Super) -> String {
    let mut bytes = Vec::new();
    for i in 0..superblock.schema.div_ceil(CARRIED) {
        match schema_line(home, i) {
            Some(carried) => bytes.extend_from_slice(&carried),
            None => bytes.extend_from_slice(b"(lost)"),
        }
    }
    bytes.truncate(superblock.schema);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Takes zones into use, up to `zones`; the memory is long enough.
pub fn extend(home: &Home, superblock: &mut Super, zones: usize) -> Result<(), Error> {
    if zones <= home.zones() {
        return Ok(());
    }
    for zone in home.zones()..zones {
        home.prepare_zone(zone);
    }
    home.fence()?;
    superblock.zones = zones;
    superblock.version = superblock.version.wrapping_add(VERSIONS);
    write_both(home, superblock)?;
    home.set_zones(zones);
    Ok(())
}
