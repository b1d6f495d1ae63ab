//! Counting pointers at a commit: what nothing points to any more is freed, and nothing else is.
//!
//! No value has a destructor, and none is needed. For each block that may have changed, the pointers
//! that its values held before and hold now are compared; what was overwritten, dropped, forgotten or
//! never put anywhere has then lost its last pointer, however that came about. Pointers are no numbers
//! that one could copy: only [`PRc::share`](crate::PRc::share) makes a second one to the same block.
//!
//! Values of shared blocks never change, so they point to older blocks only: there are no cycles, and
//! counting finds everything.
//!
//! # Safety
//! Values are shown to their own `edges`, at addresses aligned to 64 or within a block of the working
//! copy.
#![allow(unsafe_code)]

use crate::block::{HEAD, Head, block_len};
use crate::code::LINE;
use crate::error::Error;
use crate::front::Before;
use crate::home::{Aligned, Home};
use crate::persist::{Edge, Kind};
use crate::transaction::Writer;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Changes of the count of a block.
type Delta = (i64, &'static Kind);

/// Changes of counts: first a list, then by block.
#[derive(Default)]
struct Deltas {
    listed: Vec<(usize, Delta)>,
    by_block: BTreeMap<usize, Delta>,
}

impl Deltas {
    fn list(&mut self, edge: Edge, sign: i64) {
        self.listed.push((edge.at as usize, (sign, edge.kind)));
    }

    /// Forgets two parts of the list if they are the same pointers: then none of them changed.
    fn drop_equal(&mut self, first: usize, half: usize) {
        let (old, new) = (&self.listed[first..half], &self.listed[half..]);
        if old.len() == new.len() && old.iter().zip(new).all(|(old, new)| old.0 == new.0) {
            self.listed.truncate(first);
        }
    }

    fn add(&mut self, edge: Edge, sign: i64) {
        let entry = self.by_block.entry(edge.at as usize);
        entry.or_insert((0, edge.kind)).0 += sign;
    }

    /// From the list to the blocks. What comes to nothing is left out: pointers that only moved.
    fn sort(&mut self, born: &BTreeMap<usize, (usize, &'static Kind)>) {
        for (at, (_, kind)) in born {
            self.by_block.insert(*at, (0, *kind));
        }
        self.listed.sort_unstable_by_key(|(at, _)| *at);
        for same in self.listed.chunk_by(|a, b| a.0 == b.0) {
            let sum = same.iter().map(|(_, (sign, _))| sign).sum();
            if let [(at, (_, kind)), ..] = same
                && (sum != 0 || born.contains_key(at))
            {
                self.by_block.insert(*at, (sum, *kind));
            }
        }
    }
}

/// The root is held from outside: it is neither new nor ever without a pointer.
pub fn adopt_root(writer: &mut Writer, at: usize) {
    if let Some((_, kind)) = writer.born.remove(&at) {
        writer.touched.add(at, kind);
    }
}

/// Brings all counts up to date, and returns the blocks that nothing points to: places and lengths.
pub fn settle(writer: &mut Writer, home: &Home) -> Result<Vec<(usize, usize)>, Error> {
    let mut deltas = Deltas::default();
    let before = writer.front.take_before();
    let compared = compare_all(writer, home, &before, &mut deltas);
    writer.front.give_before(before);
    compared?;
    deltas.sort(&writer.born);
    if deltas.by_block.is_empty() {
        return Ok(Vec::new());
    }
    let dead = bury(writer, home, &mut deltas)?;
    for (at, (delta, _)) in &deltas.by_block {
        if *delta != 0 && !dead.contains_key(at) {
            let mut head = head(writer, home, *at)?;
            head.refs = refs(&head, *delta, *at)?;
            let to = writer.front.change(home, *at, HEAD)?;
            // SAFETY: `change` gave the bytes of a head; no reference is ever made to one.
            unsafe { core::ptr::copy_nonoverlapping(head.encode().as_ptr(), to, HEAD) };
        }
    }
    Ok(dead.into_iter().collect())
}

fn refs(head: &Head, delta: i64, at: usize) -> Result<u32, Error> {
    let refs = i64::from(head.refs) + delta;
    u32::try_from(refs).map_err(|_| Error::Invalid {
        what: "a block has an impossible number of pointers to it",
        at,
    })
}

fn head(writer: &mut Writer, home: &Home, at: usize) -> Result<Head, Error> {
    let from = writer.front.look(home, at, HEAD)?;
    let mut bytes = [0; HEAD];
    // SAFETY: `look` gave this many bytes.
    unsafe { core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), HEAD) };
    Ok(Head::decode(&bytes))
}

fn compare_all(
    writer: &mut Writer,
    home: &Home,
    before: &[Before],
    deltas: &mut Deltas,
) -> Result<(), Error> {
    let mut past = Past {
        before,
        image: core::mem::take(&mut writer.image),
    };
    let touched = writer.touched.take();
    let compared = touched
        .iter()
        .try_for_each(|block| compare(writer, home, &mut past, *block, deltas));
    writer.touched.give(touched);
    writer.image = past.image;
    compared
}

/// Counts the pointers of a block's values before and now, where they may differ.
fn compare(
    writer: &mut Writer,
    home: &Home,
    past: &mut Past<'_>,
    (at, kind): (usize, &'static Kind),
    deltas: &mut Deltas,
) -> Result<(), Error> {
    let new_len = head(writer, home, at)?.len as usize;
    // A block that was born has no past, and neither has a new root (its head was all zeros).
    let old_len = if writer.born.contains_key(&at) {
        0
    } else {
        let mut bytes = [0; HEAD];
        let old = past.show(writer, home, at, HEAD)?;
        // SAFETY: `show` gave this many bytes.
        unsafe { core::ptr::copy_nonoverlapping(old, bytes.as_mut_ptr(), HEAD) };
        Head::decode(&bytes).len as usize
    };
    let (begin, common) = (at + HEAD, old_len.min(new_len));
    // Values that are there before and now, in lines that changed.
    let end = begin + kind.size * common;
    let mut next = 0;
    for line in past.lines(begin, end) {
        let first = line.at.saturating_sub(begin) / kind.size;
        let last = (line.at + LINE - 1).saturating_sub(begin) / kind.size;
        for i in next.max(first)..(last + 1).min(common) {
            let place = begin + kind.size * i;
            let old = past.show(writer, home, place, kind.size)?;
            let new = writer.front.look(home, place, kind.size)?.cast_const();
            // SAFETY: both have the bytes of a value, all of which are initialized.
            let bytes = |from| unsafe { core::slice::from_raw_parts(from, kind.size) };
            let (old_bytes, new_bytes): (&[u8], &[u8]) = (bytes(old), bytes(new));
            if old_bytes != new_bytes {
                let first = deltas.listed.len();
                // SAFETY: a committed value, at an address as aligned as its place is.
                unsafe { (kind.edges)(old, &mut |edge| deltas.list(edge, -1)) };
                let half = deltas.listed.len();
                // SAFETY: a value of this kind: its index is below the block's number of values.
                unsafe { (kind.edges)(new, &mut |edge| deltas.list(edge, 1)) };
                deltas.drop_equal(first, half);
            }
        }
        next = next.max(last + 1);
    }
    for i in common..old_len {
        let old = past.show(writer, home, begin + kind.size * i, kind.size)?;
        // SAFETY: a committed value, as before.
        unsafe { (kind.edges)(old, &mut |edge| deltas.list(edge, -1)) };
    }
    for i in common..new_len {
        let place = begin + kind.size * i;
        edges_now(writer, home, place, kind, |edge| deltas.list(edge, 1))?;
    }
    Ok(())
}

fn edges_now(
    writer: &mut Writer,
    home: &Home,
    place: usize,
    kind: &'static Kind,
    mut visit: impl FnMut(Edge),
) -> Result<(), Error> {
    let value = writer.front.look(home, place, kind.size)?;
    // SAFETY: a value of this kind is there: its index is below the block's number of values.
    unsafe { (kind.edges)(value, &mut visit) };
    Ok(())
}

/// The heap before the transaction.
struct Past<'a> {
    /// In order of their places.
    before: &'a [Before],
    image: Vec<Aligned>,
}

impl<'a> Past<'a> {
    /// The changed lines that touch a range.
    fn lines(&self, begin: usize, end: usize) -> &'a [Before] {
        let first = self.before.partition_point(|line| line.at + LINE <= begin);
        let rest = &self.before[first..];
        &rest[..rest.partition_point(|line| line.at < end)]
    }

    /// The bytes of a range, at an address as aligned as the place is; until the next call.
    fn show(
        &mut self,
        writer: &mut Writer,
        home: &Home,
        at: usize,
        len: usize,
    ) -> Result<*const u8, Error> {
        let now = writer.front.look(home, at, len)?.cast_const();
        let changed = self.lines(at, at + len);
        if changed.is_empty() {
            return Ok(now);
        }
        let first = at / LINE * LINE;
        self.image.clear();
        self.image
            .resize((at + len - first).div_ceil(LINE), Aligned([0; LINE]));
        let place = self.image.as_mut_ptr().cast::<u8>();
        let place = place.wrapping_add(at - first);
        // SAFETY: `look` gave these bytes, and the image has as many from there on.
        unsafe { core::ptr::copy_nonoverlapping(now, place, len) };
        for line in changed {
            if let Some(part) = self.image.get_mut((line.at - first) / LINE) {
                part.0 = line.line;
            }
        }
        Ok(self.image.as_ptr().cast::<u8>().wrapping_add(at - first))
    }
}

/// Finds blocks without pointers, and with them those that only they pointed to.
fn bury(
    writer: &mut Writer,
    home: &Home,
    deltas: &mut Deltas,
) -> Result<BTreeMap<usize, usize>, Error> {
    let mut dead = BTreeMap::new();
    let mut queue: Vec<usize> = deltas.by_block.keys().copied().collect();
    while let Some(at) = queue.pop() {
        let Some((delta, kind)) = deltas.by_block.get(&at).copied() else {
            continue;
        };
        let head = head(writer, home, at)?;
        if dead.contains_key(&at) || refs(&head, delta, at).is_ok_and(|refs| refs > 0) {
            continue;
        }
        let len = block_len(kind.size, head.room as usize);
        dead.insert(at, len.ok_or(Error::Full { wanted: usize::MAX })?);
        if kind.pointers {
            for i in 0..head.len as usize {
                let place = at + HEAD + kind.size * i;
                edges_now(writer, home, place, kind, |edge| {
                    queue.push(edge.at as usize);
                    deltas.add(edge, -1);
                })?;
            }
        }
    }
    Ok(dead)
}
