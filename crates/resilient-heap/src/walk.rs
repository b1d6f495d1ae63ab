//! The walk at opening: everything that the root reaches is checked to be what its types say.
//!
//! After it, bytes that fit their words *are* values: pointers lead to blocks of the right kind, a block
//! has one owner or as many sharers as it counts, blocks do not overlap, every `bool` is one. What the
//! walk does not meet is free. It uses no recursion, and memory in proportion to what it meets.
//!
//! # Safety
//! Bytes are shown to `check` before they are taken for a value by `edges`.
#![allow(unsafe_code)]

use crate::block::{HEAD, Head, block_len};
use crate::error::Error;
use crate::home::{Home, View};
use crate::layout::Geometry;
use crate::persist::{Edge, Kind};
use crate::space::{GRAIN, Space};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// A block that was met.
struct Met {
    refs: u32,
    seen: u32,
    shared: bool,
    kind: &'static Kind,
}

/// All data of all zones, free.
pub fn empty_space(geometry: &Geometry, zones: usize) -> Space {
    let mut space = Space::default();
    for zone in 0..zones {
        space.add_zone(geometry.zone_at(zone), geometry.zone_data());
    }
    space
}

fn invalid(what: &'static str, at: usize) -> Error {
    Error::Invalid { what, at }
}

/// Shows the verified bytes of a range.
fn with<O>(
    home: &Home,
    at: usize,
    len: usize,
    f: impl FnOnce(*const u8) -> Result<O, Error>,
) -> Result<O, Error> {
    match home.view(at, len)? {
        View::Place(bytes) => f(bytes),
        View::Copy(lines) => f(lines
            .as_ptr()
            .cast::<u8>()
            .wrapping_add(at % crate::code::LINE)),
    }
}

fn head(home: &Home, at: usize) -> Result<Head, Error> {
    with(home, at, HEAD, |from| {
        let mut bytes = [0; HEAD];
        // SAFETY: `view` gave this many bytes.
        unsafe { core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), HEAD) };
        Ok(Head::decode(&bytes))
    })
}

/// Whether a root was ever made.
pub fn has_root(home: &Home) -> Result<bool, Error> {
    Ok(head(home, home.geometry.zone_at(0))?.kind != 0)
}

/// Walks from the root. `space` is what is free then.
pub fn walk(home: &Home, root: &'static Kind, space: &mut Space) -> Result<(), Error> {
    let mut met: BTreeMap<usize, Met> = BTreeMap::new();
    let mut queue = Vec::from([Edge {
        at: home.geometry.zone_at(0) as u64,
        shared: false,
        single: true,
        kind: root,
    }]);
    while let Some(edge) = queue.pop() {
        let at = usize::try_from(edge.at).unwrap_or(usize::MAX);
        if let Some(before) = met.get_mut(&at) {
            if !edge.shared || !before.shared {
                return Err(invalid("a block has two owners", at));
            }
            if before.kind.name != edge.kind.name || before.kind.size != edge.kind.size {
                return Err(invalid("a block is shared under two types", at));
            }
            before.seen = before.seen.saturating_add(1);
            continue;
        }
        let refs = enter(home, &edge, at, space, &mut queue)?;
        let seen = Met {
            refs,
            seen: 1,
            shared: edge.shared,
            kind: edge.kind,
        };
        met.insert(at, seen);
    }
    match met.iter().find(|(_, block)| block.refs != block.seen) {
        Some((at, _)) => Err(invalid("a block counts its pointers wrongly", *at)),
        None => Ok(()),
    }
}

/// Checks a block that is met for the first time; returns how many pointers it says it has.
fn enter(
    home: &Home,
    edge: &Edge,
    at: usize,
    space: &mut Space,
    queue: &mut Vec<Edge>,
) -> Result<u32, Error> {
    let kind = edge.kind;
    if !at.is_multiple_of(GRAIN) {
        return Err(invalid("a pointer is not aligned", at));
    }
    let head = head(home, at)?;
    if head.kind != kind.id {
        return Err(invalid("a block is of another kind than its pointer", at));
    }
    if head.len > head.room || (edge.single && head.len != 1) {
        return Err(invalid("a block has an impossible number of values", at));
    }
    let len = block_len(kind.size, head.room as usize);
    if !len.is_some_and(|len| space.take_at(at, len)) {
        return Err(invalid("a block overlaps another, or the border", at));
    }
    let count = head.len as usize;
    if count == 0 {
        return Ok(head.refs);
    }
    with(home, at + HEAD, count * kind.size, |bytes| {
        for i in 0..count {
            // SAFETY: `view` gave the bytes of all values.
            let value = unsafe { bytes.add(i * kind.size) };
            // SAFETY: as before; all of them are initialized.
            if !unsafe { (kind.check)(value) } {
                return Err(invalid("bytes are no value of their type", at));
            }
            if kind.pointers {
                // SAFETY: they were just found to be a value; blocks and copies are aligned to 16.
                unsafe { (kind.edges)(value, &mut |edge| queue.push(edge)) };
            }
        }
        Ok(head.refs)
    })
}
