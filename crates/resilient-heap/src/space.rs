//! Which parts of the data are free. Kept in ordinary memory only, and found anew whenever the heap is
//! opened: what the root does not reach is free. So a crash cannot leak anything, and there is nothing
//! on the medium that could be damaged or disagree.
//!
//! Best fit, neighbours joined; a piece never crosses the border of a zone. Pure.

use alloc::collections::{BTreeMap, BTreeSet};

/// Sizes and places are multiples of this many bytes.
pub const GRAIN: usize = 16;

/// Free pieces: by place, and by length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    by_place: BTreeMap<usize, usize>,
    by_len: BTreeSet<(usize, usize)>,
    free: usize,
}

impl Space {
    /// Adds a zone's data, all of it free. Zones are never neighbours.
    pub fn add_zone(&mut self, at: usize, len: usize) {
        self.insert(at, len);
    }

    /// Free bytes.
    pub fn free_bytes(&self) -> usize {
        self.free
    }

    fn insert(&mut self, at: usize, len: usize) {
        if len > 0 {
            self.by_place.insert(at, len);
            self.by_len.insert((len, at));
            self.free += len;
        }
    }

    fn remove(&mut self, at: usize, len: usize) {
        self.by_place.remove(&at);
        self.by_len.remove(&(len, at));
        self.free -= len;
    }

    /// A piece of `len` bytes, from the smallest free piece that has as many.
    pub fn take(&mut self, len: usize) -> Option<usize> {
        let (found, at) = *self.by_len.range((len, 0)..).next()?;
        self.remove(at, found);
        self.insert(at + len, found - len);
        Some(at)
    }

    /// Takes this very piece; `false` if not all of it is free.
    pub fn take_at(&mut self, at: usize, len: usize) -> bool {
        let Some((begin, found)) = self
            .by_place
            .range(..=at)
            .next_back()
            .map(|(a, l)| (*a, *l))
        else {
            return false;
        };
        let Some(end) = at.checked_add(len).filter(|end| *end <= begin + found) else {
            return false;
        };
        self.remove(begin, found);
        self.insert(begin, at - begin);
        self.insert(end, begin + found - end);
        true
    }

    /// Gives a piece back.
    pub fn give(&mut self, at: usize, len: usize) {
        let (mut begin, mut end) = (at, at + len);
        if let Some((a, l)) = self.by_place.range(..at).next_back().map(|(a, l)| (*a, *l))
            && a + l == at
        {
            self.remove(a, l);
            begin = a;
        }
        if let Some(l) = self.by_place.get(&end).copied() {
            self.remove(end, l);
            end += l;
        }
        self.insert(begin, end - begin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    proptest! {
        /// Pieces never overlap, and giving all back makes one zone again.
        #[test]
        fn pieces_are_apart_and_come_back(steps in prop::collection::vec((1..40usize, any::<bool>(), any::<prop::sample::Index>()), 0..200)) {
            let mut space = Space::default();
            space.add_zone(4096, 8192);
            let fresh = space.clone();
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for (grains, give, which) in steps {
                if give && !taken.is_empty() {
                    let (at, len) = taken.swap_remove(which.index(taken.len()));
                    space.give(at, len);
                } else if let Some(at) = space.take(grains * GRAIN) {
                    let len = grains * GRAIN;
                    prop_assert!(at >= 4096 && at + len <= 4096 + 8192);
                    prop_assert!(taken.iter().all(|(a, l)| a + l <= at || at + len <= *a));
                    prop_assert!(!space.clone().take_at(at, len));
                    taken.push((at, len));
                }
                let used: usize = taken.iter().map(|(_, l)| l).sum();
                prop_assert_eq!(space.free_bytes(), 8192 - used);
            }
            let mut found = fresh.clone();
            for (at, len) in &taken {
                prop_assert!(found.take_at(*at, *len));
            }
            prop_assert_eq!(&found, &space);
            for (at, len) in taken {
                space.give(at, len);
            }
            prop_assert_eq!(space, fresh);
        }
    }
}
