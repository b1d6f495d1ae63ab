//! A block: the unit that is allocated. A head of 16 bytes, then values of one type, one after another.
//!
//! ```text
//! | kind: 4 | references: 4 | values: 4 | room for values: 4 | values ... |
//! ```
//! *Kind* is a number made of the type's name and size. *References* counts the pointers to the block
//! that committed values hold. All of them are in the byte order of the machine (little-endian).
//!
//! # Safety
//! References to values are made here, from pointers that [`Access::view`] or [`Tx::change`] gave for
//! the whole range, of bytes that were written as values of that type: by this program through typed
//! references, or before it opened the heap and then checked by `walk`.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::persist::{Kind, Of, Persist};
use crate::space::GRAIN;
use crate::transaction::Tx;

/// Bytes of a head.
pub const HEAD: usize = 16;

/// The head of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Head {
    /// See [`Kind`].
    pub kind: u32,
    /// Pointers that lead here.
    pub refs: u32,
    /// Values.
    pub len: u32,
    /// Values that there is room for.
    pub room: u32,
}

impl Head {
    /// From its bytes.
    pub fn decode(bytes: &[u8; HEAD]) -> Self {
        let word =
            |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Self {
            kind: word(0),
            refs: word(4),
            len: word(8),
            room: word(12),
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        let fields = [self.kind, self.refs, self.len, self.room];
        for (field, chunk) in fields.iter().zip(bytes.chunks_exact_mut(4)) {
            chunk.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}

/// Bytes of a block with room for so many values.
pub fn block_len(size: usize, room: usize) -> Option<usize> {
    size.checked_mul(room)?
        .checked_add(HEAD)?
        .checked_next_multiple_of(GRAIN)
}

/// Ways into a heap: a transaction or a snapshot. Only this crate has such ways.
pub trait Access<'h>: Sealed {
    /// Verified bytes, which stay as they are while `self` is borrowed, but for what is changed through
    /// references that stem from `&mut` values.
    #[doc(hidden)]
    fn view(&self, at: usize, len: usize) -> Result<*const u8, Error>;

    /// The heap's identity, with which keys are hashed.
    #[doc(hidden)]
    fn heap_id(&self) -> u64;
}

/// Keeps [`Access`] to this crate.
pub trait Sealed {}

fn invalid(what: &'static str, at: usize) -> Error {
    Error::Invalid { what, at }
}

/// A pointer's place as an address of this machine.
pub fn place(at: u64) -> Result<usize, Error> {
    match usize::try_from(at) {
        Ok(place) if place.is_multiple_of(GRAIN) => Ok(place),
        _ => Err(invalid("a pointer is not aligned", 0)),
    }
}

/// Reads the head of a block.
pub fn head<'h>(access: &impl Access<'h>, at: usize) -> Result<Head, Error> {
    let from = access.view(at, HEAD)?;
    let mut bytes = [0; HEAD];
    // SAFETY: `view` gave this many bytes.
    unsafe { core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), HEAD) };
    Ok(Head::decode(&bytes))
}

/// Where values of a block lie: place and bytes.
pub fn span(at: usize, first: usize, count: usize, size: usize) -> Result<(usize, usize), Error> {
    let span = || {
        let begin = size
            .checked_mul(first)?
            .checked_add(at)?
            .checked_add(HEAD)?;
        Some((begin, size.checked_mul(count)?))
    };
    span().ok_or_else(|| invalid("a block is larger than memory", at))
}

/// Values of a block.
///
/// # Safety
/// `first + count` is at most the block's `len`, whose values are of type `T`; nobody changes them while
/// the result lives.
pub unsafe fn values<'a, 'h, T: Persist<'h>>(
    access: &'a impl Access<'h>,
    at: usize,
    first: usize,
    count: usize,
) -> Result<&'a [T], Error> {
    let (begin, len) = span(at, first, count, Of::<T>::KIND.size)?;
    let from = access.view(begin, len.max(1))?;
    // SAFETY: `view` gave all the bytes; blocks are aligned to 16, which every kind is content with;
    // type and length are what the caller says.
    Ok(unsafe { core::slice::from_raw_parts(from.cast::<T>(), count) })
}

/// Values of a block, to be changed. The transaction counts their pointers anew when it commits.
///
/// # Safety
/// As for [`values`], and nobody else looks at them.
#[allow(
    clippy::mut_from_ref,
    reason = "the caller holds the one owner of the block mutably"
)]
pub unsafe fn values_mut<'a, 'h, T: Persist<'h>>(
    tx: &'a Tx<'h>,
    at: usize,
    first: usize,
    count: usize,
) -> Result<&'a mut [T], Error> {
    let (begin, len) = span(at, first, count, Of::<T>::KIND.size)?;
    let to = tx.change(begin, len.max(1))?;
    tx.touch(at, Of::<T>::KIND);
    // SAFETY: as for `values`.
    Ok(unsafe { core::slice::from_raw_parts_mut(to.cast::<T>(), count) })
}

/// Writes a value behind the last one, or over one that is no longer counted.
///
/// # Safety
/// `index` is below the block's room, and no value is there. The block's values are of type `T`.
pub unsafe fn put<'h, T: Persist<'h>>(
    tx: &Tx<'h>,
    at: usize,
    index: usize,
    value: T,
) -> Result<(), Error> {
    let (begin, len) = span(at, index, 1, Of::<T>::KIND.size)?;
    let to = tx.change(begin, len)?;
    tx.touch(at, Of::<T>::KIND);
    // SAFETY: `change` gave all the bytes, aligned; nobody looks at them.
    unsafe { to.cast::<T>().write(value) };
    Ok(())
}

/// Reads a value out of its block.
///
/// # Safety
/// The value is there, and the caller sees to it that it is no longer counted.
pub unsafe fn take<'h, T: Persist<'h>>(tx: &Tx<'h>, at: usize, index: usize) -> Result<T, Error> {
    let (begin, len) = span(at, index, 1, Of::<T>::KIND.size)?;
    let from = tx.view(begin, len)?;
    tx.touch(at, Of::<T>::KIND);
    // SAFETY: `view` gave all the bytes, aligned, and a value is there.
    Ok(unsafe { from.cast::<T>().read() })
}

/// Sets how many values a block has.
pub fn set_len(tx: &Tx<'_>, at: usize, len: usize, kind: &'static Kind) -> Result<(), Error> {
    let len = u32::try_from(len).map_err(|_| invalid("more than 2^32 values", at))?;
    let to = tx.change(at + 8, 4)?;
    tx.touch(at, kind);
    // SAFETY: `change` gave four bytes, aligned to four; no reference is ever made to a head.
    unsafe { to.cast::<u32>().write(len) };
    Ok(())
}

/// A new block without values.
pub fn allocate<'h, T: Persist<'h>>(tx: &Tx<'h>, room: usize) -> Result<usize, Error> {
    let kind = Of::<T>::KIND;
    let len = block_len(kind.size, room).filter(|_| u32::try_from(room).is_ok());
    let len = len.ok_or(Error::Full { wanted: usize::MAX })?;
    let at = tx.allocate(len, kind)?;
    let head = Head {
        kind: kind.id,
        refs: 0,
        len: 0,
        room: room as u32,
    };
    tx.write_head(at, &head)?;
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_what_was_written() {
        let head = Head {
            kind: 1,
            refs: 2,
            len: 3,
            room: u32::MAX,
        };
        assert_eq!(Head::decode(&head.encode()), head);
        assert_eq!(block_len(8, 3), Some(48));
        assert_eq!(block_len(usize::MAX, 2), None);
    }
}
