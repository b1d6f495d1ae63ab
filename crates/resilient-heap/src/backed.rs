//! A heap whose memory is ordinary, and whose pages somebody else keeps: on a disk, in a part of a device,
//! wherever bytes cannot be mapped, or must not be.
//!
//! # Rules
//! - [`Keep`] gets whole pages, each once for a fence, and a fence returns when they are durable. It must
//!   never leave a page half of what it was and half of what it becomes: a heap corrects lines, not pages
//!   that a power cut tore. Who writes to a medium that may tear has to keep a journal.
//! - What was stored and not flushed is handed over only if its page was flushed for something else.
//!
//! # Safety
//! The bytes are those of a [`Volatile`], which stay where they are; copies of pages are made under the
//! lock that every `store` takes.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::layout::PAGE;
use crate::memory::{Memory, Volatile};
use core::ptr::NonNull;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::vec::Vec;

/// Who keeps the pages of a heap.
pub trait Keep: Send + Sync {
    /// Makes pages durable, by their numbers in ascending order: all that it gets, before it returns.
    /// After an error nobody knows which of them are.
    ///
    /// # Errors
    /// [`Error::Memory`], after which the heap takes no more changes.
    fn keep(&self, pages: &[(usize, Vec<u8>)]) -> Result<(), Error>;
}

/// Ordinary memory, of a fixed length, whose pages somebody keeps.
#[derive(Debug)]
pub struct Backed<K> {
    memory: Volatile,
    /// Pages flushed since the last fence; whoever stores or copies holds it.
    flushed: Mutex<BTreeSet<usize>>,
    keeper: K,
}

impl<K: Keep> Backed<K> {
    /// Memory with what `bytes` holds, in whole pages: zeros, or what was kept of a heap.
    ///
    /// # Errors
    /// [`Error::Full`]: there is not so much memory.
    pub fn new(bytes: &[u8], keeper: K) -> Result<Self, Error> {
        let len = bytes.len() / PAGE * PAGE;
        let memory = Volatile::new(len)?;
        memory.grow(len)?;
        // SAFETY: it was grown to `len`, which is not more than there is, and nobody knows it yet.
        unsafe { memory.store(0, &bytes[..len]) };
        Ok(Self {
            memory,
            flushed: Mutex::default(),
            keeper,
        })
    }
}

// SAFETY: base, length and stores are those of `Volatile`, whose capacity is used up by `new`.
unsafe impl<K: Keep> Memory for Backed<K> {
    fn base(&self) -> NonNull<u8> {
        self.memory.base()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn grow(&self, len: usize) -> Result<(), Error> {
        if len > self.len() {
            return Err(Error::Full { wanted: len });
        }
        Ok(())
    }

    unsafe fn store(&self, at: usize, bytes: &[u8]) {
        let _turn = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as the caller says.
        unsafe { self.memory.store(at, bytes) };
    }

    fn flush(&self, at: usize, len: usize) {
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        let end = at.saturating_add(len).min(self.len());
        flushed.extend(at / PAGE..end.div_ceil(PAGE));
    }

    fn fence(&self) -> Result<(), Error> {
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if flushed.is_empty() {
            return Ok(());
        }
        let copy = |page: usize| {
            // SAFETY: `flush` lets in pages below `len` only, which `Volatile` has; whoever would store
            // waits for `flushed`.
            let at = unsafe { self.base().as_ptr().add(page * PAGE) };
            // SAFETY: as above; the bytes were initialised, with zeros at first.
            unsafe { core::slice::from_raw_parts(at, PAGE) }.to_vec()
        };
        let pages: Vec<(usize, Vec<u8>)> =
            flushed.iter().map(|page| (*page, copy(*page))).collect();
        self.keeper.keep(&pages)?;
        flushed.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Options;
    use std::sync::Arc;

    /// Pages in ordinary memory; refuses when it is told to.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Keep for Kept {
        fn keep(&self, pages: &[(usize, Vec<u8>)]) -> Result<(), Error> {
            let mut kept = self.0.lock().unwrap();
            if kept.1 {
                let what = "a page could not be kept";
                return Err(Error::Memory { what, code: 5 });
            }
            for (page, bytes) in pages {
                kept.0[page * PAGE..][..PAGE].copy_from_slice(bytes);
            }
            Ok(())
        }
    }

    #[test]
    fn what_is_kept_is_the_heap_without_closing_it() {
        let kept = Kept::default();
        kept.0.lock().unwrap().0 = std::vec![0; 256 * PAGE];
        let open = || {
            let bytes = kept.0.lock().unwrap().0.clone();
            let memory = Backed::new(&bytes, kept.clone()).unwrap();
            let options = Options::default().zone_pages(16).log_pages(4);
            options.open::<u64>(memory, |_| Ok(0)).unwrap()
        };
        let add = |count: &mut u64| {
            *count += 1;
            Ok(*count)
        };
        for turn in 1..4 {
            let mut heap = open();
            assert_eq!(heap.opened().created, turn == 1);
            assert_eq!(heap.write(|count, _| add(count)), Ok(turn));
            // As if the process ended here.
            core::mem::forget(heap);
        }
        let mut heap = open();
        kept.0.lock().unwrap().1 = true;
        let refused = heap.write(|count, _| add(count));
        assert!(
            matches!(refused, Err(Error::Memory { code: 5, .. })),
            "{refused:?}"
        );
        assert_eq!(heap.write(|count, _| add(count)), Err(Error::Halted));
    }
}
