//! Aligned, locked memory for transfers that bypass the page cache.
//!
//! # Safety
//! A [`Buffer`] owns one private anonymous mapping, made by `new` and removed by `drop`, and
//! hands out its bytes only through borrows of itself; `len` never exceeds what was mapped. The
//! kernel fills anonymous memory with zeros, so every byte is initialised.
#![allow(unsafe_code)]

use crate::BLOCK;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment at which the kernel can use huge pages, in bytes.
const HUGE: usize = 2 << 20;

/// Zeroed memory, aligned to a block (to 2 MiB where it is that large), present in RAM, and
/// locked there where the limits of this process allow it.
#[derive(Debug)]
pub struct Buffer {
    map: NonNull<u8>,
    map_len: usize,
    at: usize,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone and has no ties to a thread.
unsafe impl Send for Buffer {}
// SAFETY: shared borrows only give `&[u8]`, through which nothing is written.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of at least `len` bytes, rounded up to whole blocks and at least one.
    ///
    /// # Errors
    /// What `mmap(2)` says, which is out of memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len
            .max(1)
            .checked_next_multiple_of(BLOCK)
            .filter(|len| *len <= isize::MAX as usize - HUGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let map_len = if len >= HUGE { len + HUGE } else { len };
        // SAFETY: a null hint without MAP_FIXED makes the kernel choose unused addresses, so no
        // existing memory changes.
        let map = unsafe {
            mm::mmap_anonymous(
                std::ptr::null_mut(),
                map_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let map = NonNull::new(map.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let address = map.as_ptr() as usize;
        let at = if len >= HUGE {
            address.next_multiple_of(HUGE) - address
        } else {
            0
        };
        let buffer = Self {
            map,
            map_len,
            at,
            len,
        };
        buffer.make_resident();
        Ok(buffer)
    }

    /// Asks for huge pages, fills in the memory and locks it; all of it is a matter of speed
    /// only, so refusals are not errors.
    fn make_resident(&self) {
        let start = self.start().cast();
        // SAFETY: `start..start + len` lies in the mapping that `self` owns (`at + len` is at
        // most `map_len` by the construction in `new`), and none of these calls changes contents.
        unsafe {
            let _ = mm::madvise(start, self.len, Advice::LinuxHugepage);
            if mm::mlock(start, self.len).is_err() {
                let _ = mm::madvise(start, self.len, Advice::LinuxPopulateWrite);
            }
        }
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `at` is less than `map_len`, see `new`, so the result stays in the mapping.
        unsafe { self.map.as_ptr().add(self.at) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped, readable and initialised for as long as `self` lives, and
        // writes need `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes this the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made, to which no borrow can be left.
        let _ = unsafe { mm::munmap(self.map.as_ptr().cast(), self.map_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_zeroed_and_writable() {
        for len in [1, BLOCK, HUGE - 1, HUGE, 4 << 20] {
            let mut buffer = Buffer::new(len).unwrap();
            assert!(buffer.len() >= len && buffer.len().is_multiple_of(BLOCK));
            let align = if buffer.len() >= HUGE { HUGE } else { BLOCK };
            assert!((buffer.as_ptr() as usize).is_multiple_of(align));
            assert!(buffer.iter().all(|b| *b == 0));
            buffer.fill(7);
            assert_eq!(buffer.last(), Some(&7));
        }
        assert!(Buffer::new(usize::MAX).is_err());
    }
}
