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
use crate::code::{LINE, Line};
use crate::error::Error;
use crate::home::{Aligned, Home};
use crate::persist::{Edge, Kind};
use crate::transaction::Writer;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

/// Changes of counts, by block.
struct Deltas(BTreeMap<usize, (i64, &'static Kind)>);

impl Deltas {
    fn add(&mut self, edges: Vec<Edge>, sign: i64) {
        for edge in edges {
            let at = edge.at as usize;
            self.0.entry(at).or_insert((0, edge.kind)).0 += sign;
        }
    }
}

/// The root is held from outside: it is neither new nor ever without a pointer.
pub fn adopt_root(writer: &mut Writer, at: usize) {
    if let Some((_, kind)) = writer.born.remove(&at) {
        writer.touched.insert(at, kind);
    }
}

/// Brings all counts up to date, and returns the blocks that nothing points to: places and lengths.
pub fn settle(writer: &mut Writer, home: &Home) -> Result<Vec<(usize, usize)>, Error> {
    let before = writer.front.before();
    let mut deltas = Deltas(BTreeMap::new());
    for (at, (_, kind)) in &writer.born {
        deltas.0.insert(*at, (0, *kind));
    }
    let touched: Vec<_> = writer
        .touched
        .iter()
        .map(|(at, kind)| (*at, *kind))
        .collect();
    for (at, kind) in touched {
        compare(writer, home, &before, (at, kind), &mut deltas)?;
    }
    let dead = bury(writer, home, &mut deltas)?;
    for (at, (delta, _)) in &deltas.0 {
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

/// Counts the pointers of a block's values before and now, where they may differ.
fn compare(
    writer: &mut Writer,
    home: &Home,
    before: &BTreeMap<usize, Line>,
    (at, kind): (usize, &'static Kind),
    deltas: &mut Deltas,
) -> Result<(), Error> {
    let new = head(writer, home, at)?;
    // A block that was born has no past, and neither has a new root (its head was all zeros).
    let old_len = if writer.born.contains_key(&at) {
        0
    } else {
        let mut bytes = [0; HEAD];
        let image = old_bytes(writer, home, before, at, HEAD)?;
        bytes.copy_from_slice(&image[0].0[at % LINE..][..HEAD]);
        Head::decode(&bytes).len
    };
    let (old_len, new_len) = (old_len as usize, new.len as usize);
    let mut indices: BTreeSet<usize> = (old_len.min(new_len)..old_len.max(new_len)).collect();
    let begin = at + HEAD;
    let end = begin + kind.size * old_len.max(new_len);
    for line in before
        .range(begin.saturating_sub(LINE - 1)..end)
        .map(|(line, _)| *line)
    {
        let first = line.saturating_sub(begin) / kind.size;
        let last = (line + LINE - 1).saturating_sub(begin) / kind.size;
        indices.extend(first..=last.min(old_len.max(new_len).saturating_sub(1)));
    }
    for i in indices {
        let place = begin + kind.size * i;
        if i < old_len {
            let image = old_bytes(writer, home, before, place, kind.size)?;
            let mut edges = Vec::new();
            let value = image.as_ptr().cast::<u8>().wrapping_add(place % LINE);
            // SAFETY: the bytes of a committed value, at an address as aligned as its place is.
            unsafe { (kind.edges)(value, &mut |edge| edges.push(edge)) };
            deltas.add(edges, -1);
        }
        if i < new_len {
            deltas.add(edges_now(writer, home, place, kind)?, 1);
        }
    }
    Ok(())
}

fn edges_now(
    writer: &mut Writer,
    home: &Home,
    place: usize,
    kind: &'static Kind,
) -> Result<Vec<Edge>, Error> {
    let value = writer.front.look(home, place, kind.size)?;
    let mut edges = Vec::new();
    // SAFETY: a value of this kind is there: its index is below the block's number of values.
    unsafe { (kind.edges)(value, &mut |edge| edges.push(edge)) };
    Ok(edges)
}

/// The lines around a range as they were before the transaction.
fn old_bytes(
    writer: &mut Writer,
    home: &Home,
    before: &BTreeMap<usize, Line>,
    at: usize,
    len: usize,
) -> Result<Vec<Aligned>, Error> {
    let first = at / LINE * LINE;
    let mut image = vec![Aligned([0; LINE]); (at + len - first).div_ceil(LINE)];
    for (i, part) in image.iter_mut().enumerate() {
        let line = first + i * LINE;
        match before.get(&line) {
            Some(bytes) => part.0 = *bytes,
            None => {
                let from = writer.front.look(home, line, LINE)?;
                // SAFETY: `look` gave a whole line.
                unsafe { core::ptr::copy_nonoverlapping(from, part.0.as_mut_ptr(), LINE) };
            }
        }
    }
    Ok(image)
}

/// Finds blocks without pointers, and with them those that only they pointed to.
fn bury(
    writer: &mut Writer,
    home: &Home,
    deltas: &mut Deltas,
) -> Result<BTreeMap<usize, usize>, Error> {
    let mut dead = BTreeMap::new();
    let mut queue: Vec<usize> = deltas.0.keys().copied().collect();
    while let Some(at) = queue.pop() {
        let Some((delta, kind)) = deltas.0.get(&at).copied() else {
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
                let edges = edges_now(writer, home, at + HEAD + kind.size * i, kind)?;
                queue.extend(edges.iter().map(|edge| edge.at as usize));
                deltas.add(edges, -1);
            }
        }
    }
    Ok(dead)
}
