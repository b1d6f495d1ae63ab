//! Which pages an epoch holds, after all epochs before it are taken into account.

use crate::format::BLOCK_LEN;
use crate::index::{Index, Says};
use crate::planted::bug;
use outlive_epoch::{PAGE_SIZE, Run, SpaceId};
use std::collections::BTreeMap;

/// Where the contents of a run of pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    Zero,
    Data {
        /// Offset of the first page in the file.
        at: u64,
        /// Which epoch of the chain stored it (a position in the chain).
        epoch: usize,
        /// Position of the first checksum among those of that epoch.
        crc: usize,
    },
    /// Packed, together with others.
    Packed {
        /// Which epoch of the chain stored it (a position in the chain).
        epoch: usize,
        /// Position of the cluster among those of that epoch.
        cluster: usize,
        /// Pages before the first one in it.
        skip: usize,
        /// Bytes that a page of it takes, by and large.
        share: u32,
    },
}

impl Where {
    fn skip(self, pages: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data { at, epoch, crc } => Self::Data {
                at: at + pages * BLOCK_LEN,
                epoch,
                crc: crc + pages as usize,
            },
            Self::Packed {
                epoch,
                cluster,
                skip,
                share,
            } => Self::Packed {
                epoch,
                cluster,
                skip: skip + pages as usize,
                share,
            },
        }
    }

    /// Bytes of the log that a page takes.
    fn share(self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Data { .. } => PAGE_SIZE as u64,
            Self::Packed { share, .. } => u64::from(share),
        }
    }
}

/// Pages by space and index, as runs that do not overlap.
#[derive(Clone, Debug, Default)]
pub struct PageMap {
    /// By space and first page: the page after the last one, and where they are.
    pieces: BTreeMap<(u32, u64), (u64, Where)>,
    /// Pages whose bytes are stored, and bytes of the log that they take.
    stored: (u64, u64),
}

impl PageMap {
    /// Lays an epoch over what is there.
    pub fn apply(&mut self, index: &Index, epoch: usize) {
        let mut crc = 0;
        for entry in &index.entries {
            let run = entry.run;
            self.clear(run);
            let place = match entry.says {
                Says::Absent => continue,
                Says::Zero => Where::Zero,
                Says::Data(at) => {
                    let place = Where::Data { at, epoch, crc };
                    crc += run.count() as usize * usize::from(!bug("checksums of the first run"));
                    place
                }
                Says::Packed { cluster, skip } => {
                    let Some(packed) = index.clusters.get(cluster as usize) else {
                        continue;
                    };
                    if skip == 0 {
                        crc += packed.blocks() as usize;
                    }
                    Where::Packed {
                        epoch,
                        cluster: cluster as usize,
                        skip: skip as usize,
                        share: packed.len.div_ceil(packed.pages.max(1)),
                    }
                }
            };
            self.insert(run.space().0, run.first(), run.end(), place);
        }
    }

    /// Pages whose bytes are stored.
    pub fn stored(&self) -> u64 {
        self.stored.0
    }

    /// Bytes of the log that they take, by and large.
    pub fn bytes(&self) -> u64 {
        self.stored.1
    }

    /// All runs, in order.
    pub fn pieces(&self) -> impl Iterator<Item = (Run, Where)> + '_ {
        self.pieces
            .iter()
            .filter_map(|(&(space, first), &(end, place))| {
                Some((Run::new(SpaceId(space), first, end - first)?, place))
            })
    }

    /// The parts of a run that are held, in order.
    pub fn within(&self, run: Run) -> impl Iterator<Item = (Run, Where)> + '_ {
        let space = run.space();
        let (first, end) = (run.first(), run.end());
        let before = self
            .pieces
            .range((space.0, 0)..(space.0, first))
            .next_back();
        let rest = self.pieces.range((space.0, first)..(space.0, end));
        before
            .into_iter()
            .chain(rest)
            .filter_map(move |(&(_, from), &(to, place))| {
                let (start, stop) = (from.max(first), to.min(end));
                let part = Run::new(space, start, stop.checked_sub(start)?)?;
                Some((part, place.skip(start - from)))
            })
    }

    /// The runs without what they hold, as long as they can be.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (run, _) in self.pieces() {
            let joined = runs.last().and_then(|last| {
                let adjacent = last.space() == run.space() && last.end() == run.first();
                let joined = Run::new(run.space(), last.first(), last.count() + run.count());
                joined.filter(|_| adjacent)
            });
            if let Some(joined) = joined {
                runs.pop();
                runs.push(joined);
            } else {
                runs.push(run);
            }
        }
        runs
    }

    fn insert(&mut self, space: u32, first: u64, end: u64, place: Where) {
        if place != Where::Zero {
            self.stored.0 += end - first;
            self.stored.1 += (end - first) * place.share();
        }
        self.pieces.insert((space, first), (end, place));
    }

    fn remove(&mut self, space: u32, first: u64) -> Option<(u64, Where)> {
        let (end, place) = self.pieces.remove(&(space, first))?;
        if place != Where::Zero {
            self.stored.0 -= end - first;
            self.stored.1 -= (end - first) * place.share();
        }
        Some((end, place))
    }

    /// Makes room for a run: nothing of it remains.
    fn clear(&mut self, run: Run) {
        let (space, first, end) = (run.space().0, run.first(), run.end());
        let before = self.pieces.range((space, 0)..(space, first)).next_back();
        if let Some((&(_, start), _)) = before.filter(|(_, (stop, _))| *stop > first)
            && let Some((stop, place)) = self.remove(space, start)
        {
            self.insert(space, start, first, place);
            if stop > end {
                self.insert(
                    space,
                    end,
                    stop,
                    place.skip(if bug("split run not advanced") {
                        0
                    } else {
                        end - start
                    }),
                );
            }
        }
        while let Some((&(_, start), _)) = self.pieces.range((space, first)..(space, end)).next() {
            if let Some((stop, place)) = self.remove(space, start)
                && stop > end
            {
                self.insert(space, end, stop, place.skip(end - start));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Cluster;
    use crate::pack::Codec;
    use proptest::prelude::*;

    proptest! {
        /// Compares with a plain map of single pages.
        #[test]
        fn later_entries_win(ops in prop::collection::vec((0u32..2, 0u64..40, 1u64..16, 0u8..4), 0..60)) {
            let (mut map, mut model) = (PageMap::default(), BTreeMap::new());
            for (epoch, (space, first, count, kind)) in ops.into_iter().enumerate() {
                let run = Run::new(SpaceId(space), first, count).unwrap();
                let at = (epoch as u64 + 100) * BLOCK_LEN * 64;
                let packed = Says::Packed { cluster: 0, skip: 0 };
                let says = [Says::Data(at), Says::Zero, Says::Absent, packed][usize::from(kind)];
                let mut index = Index::default();
                index.clusters.push(Cluster { at, first: 0, pages: 16, len: 16 * 100, codec: Codec::Lz4, crc: 0 });
                index.push(run, says);
                map.apply(&index, epoch);
                for i in 0..count {
                    let key = (space, first + i);
                    match says {
                        Says::Absent => { model.remove(&key); }
                        Says::Packed { .. } => {
                            let place = Where::Packed { epoch, cluster: 0, skip: i as usize, share: 100 };
                            model.insert(key, place);
                        }
                        Says::Zero => { model.insert(key, Where::Zero); }
                        Says::Data(_) => { model.insert(key, Where::Data { at, epoch, crc: 0 }.skip(i)); }
                    }
                }
            }
            let mut flat = BTreeMap::new();
            for (run, place) in map.pieces() {
                for i in 0..run.count() {
                    let old = flat.insert((run.space().0, run.first() + i), place.skip(i));
                    prop_assert!(old.is_none());
                }
            }
            let stored = model.values().filter(|w| **w != Where::Zero);
            prop_assert_eq!(map.stored(), stored.clone().count() as u64);
            prop_assert_eq!(map.bytes(), stored.map(|w| w.share()).sum::<u64>());
            for (space, first, count) in [(0, 3, 9), (1, 0, 60), (0, 17, 1)] {
                let wanted = Run::new(SpaceId(space), first, count).unwrap();
                let mut part = BTreeMap::new();
                for (run, place) in map.within(wanted) {
                    for i in 0..run.count() {
                        part.insert((space, run.first() + i), place.skip(i));
                    }
                }
                let expected: BTreeMap<_, _> = model
                    .range((space, first)..(space, first + count))
                    .map(|(&k, &w)| (k, w))
                    .collect();
                prop_assert_eq!(part, expected);
            }
            let in_runs: u64 = map.runs().iter().map(Run::count).sum();
            prop_assert_eq!(in_runs, model.len() as u64);
            prop_assert_eq!(flat, model);
        }
    }
}
