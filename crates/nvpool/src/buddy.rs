//! Which pages are free, as a buddy allocator keeps them. Pure.
//!
//! # Invariants
//! - A free block of order `k` has `2^k` pages and begins at a multiple of that, counted from the
//!   beginning of the medium: so a block of 512 pages is one that a 2 MiB mapping can have.
//! - Two buddies (the halves of a block of the next order) are never free as two blocks.
//!
//! # What is chosen
//! One run of the wanted length wherever there is one ([`Buddy::find`]), from the smallest block that
//! has it, at the highest place below the limit: low places stay for those who ask for them. A *zone* is
//! what lies below such a limit. Only where no run is long enough the pages come in pieces, largest first,
//! so that each piece stands in the extent, too, at a multiple of its size.

use crate::run::{Run, merged};
use std::collections::BTreeSet;

/// The largest order: 2^18 pages are 1 GiB.
pub const MAX_ORDER: u32 = 18;

/// Free pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buddy {
    /// The first pages of free blocks, by order.
    free: [BTreeSet<u64>; MAX_ORDER as usize + 1],
    pages: u64,
}

/// The blocks that a run consists of, each as large as its place allows.
fn blocks(run: Run) -> impl Iterator<Item = (u32, u64)> {
    let mut at = run.start;
    std::iter::from_fn(move || {
        let left = run.end().checked_sub(at).filter(|left| *left > 0)?;
        let order = at.trailing_zeros().min(left.ilog2()).min(MAX_ORDER);
        let block = (order, at);
        at += 1 << order;
        Some(block)
    })
}

impl Buddy {
    /// How many pages are free.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many blocks of each order are free, the smallest first.
    #[must_use]
    pub fn blocks(&self) -> Vec<usize> {
        self.free.iter().map(BTreeSet::len).collect()
    }

    fn order_at(&self, block: u32) -> &BTreeSet<u64> {
        &self.free[block as usize]
    }

    /// Makes pages free, none of which is.
    pub fn give(&mut self, run: Run) {
        for (mut order, mut at) in blocks(run) {
            self.pages += 1 << order;
            while order < MAX_ORDER && self.free[order as usize].remove(&(at ^ (1 << order))) {
                at &= !(1 << order);
                order += 1;
            }
            self.free[order as usize].insert(at);
        }
    }

    /// The free block that has a page.
    fn around(&self, page: u64) -> Option<(u32, u64)> {
        (0..=MAX_ORDER)
            .map(|order| (order, page >> order << order))
            .find(|(order, at)| self.order_at(*order).contains(at))
    }

    /// Whether all of these pages are free.
    #[must_use]
    pub fn has(&self, run: Run) -> bool {
        let mut at = run.start;
        while at < run.end() {
            match self.around(at) {
                Some((order, block)) => at = block + (1 << order),
                None => return false,
            }
        }
        true
    }

    /// Takes pages; `false`, and nothing changed, where one of them is not free.
    pub fn take(&mut self, run: Run) -> bool {
        if !self.has(run) {
            return false;
        }
        let mut at = run.start;
        while at < run.end() {
            let Some((order, block)) = self.around(at) else {
                return false;
            };
            let end = block + (1 << order);
            self.free[order as usize].remove(&block);
            self.pages -= 1 << order;
            if block < at {
                self.give(Run::new(block, at - block));
            }
            if run.end() < end {
                self.give(Run::new(run.end(), end - run.end()));
            }
            at = end;
        }
        true
    }

    /// All free runs, in order.
    #[must_use]
    pub fn runs(&self) -> Vec<Run> {
        let mut all: Vec<Run> = Vec::new();
        for (order, blocks) in (0..).zip(&self.free) {
            all.extend(blocks.iter().map(|at| Run::new(*at, 1u64 << order)));
        }
        all.sort_unstable();
        merged(all)
    }

    /// The length of the longest free run that ends at or before `below`.
    #[must_use]
    pub fn longest(&self, below: u64) -> u64 {
        let zone = Run::new(0, below);
        let runs = self.runs().into_iter();
        runs.filter_map(|run| run.common(zone))
            .map(|run| run.len)
            .max()
            .unwrap_or(0)
    }

    /// Which pages to take for `pages` of them before page `below`; `None` where so many are not free.
    /// Nothing changes.
    #[must_use]
    pub fn find(&self, pages: u64, below: u64) -> Option<Vec<Run>> {
        if pages == 0 || pages > self.pages.min(below) {
            return None;
        }
        self.in_a_block(pages, below)
            .or_else(|| self.in_a_run(pages, below))
            .map(|run| vec![run])
            .or_else(|| self.in_pieces(pages, below))
    }

    /// One run within one block.
    fn in_a_block(&self, pages: u64, below: u64) -> Option<Run> {
        let wanted = pages.checked_next_power_of_two()?.ilog2();
        (wanted..=MAX_ORDER).find_map(|order| {
            let last = below - pages;
            let at = *self.order_at(order).range(..=last).next_back()?;
            let end = (at + (1 << order) - (1 << wanted)).min(last);
            Some(Run::new((end >> wanted << wanted).max(at), pages))
        })
    }

    /// One run over several blocks: at a multiple of the largest block that fits into it, if possible.
    fn in_a_run(&self, pages: u64, below: u64) -> Option<Run> {
        let unit = 1u64 << pages.ilog2().min(MAX_ORDER);
        let runs = self.runs();
        let zone = Run::new(0, below);
        let fits = |unit: u64| {
            let parts = runs.iter().filter_map(|run| run.common(zone));
            let places = parts.filter_map(|run| {
                let at = run.end().checked_sub(pages)? / unit * unit;
                (at >= run.start).then_some((run.len, Run::new(at, pages)))
            });
            places.min_by_key(|(len, run)| (*len, std::cmp::Reverse(run.start)))
        };
        fits(unit).or_else(|| fits(1)).map(|(_, run)| run)
    }

    /// Whole blocks, largest first; a part of the smallest that has what is missing then.
    fn in_pieces(&self, pages: u64, below: u64) -> Option<Vec<Run>> {
        let mut by_order: [Vec<u64>; MAX_ORDER as usize + 1] = Default::default();
        for (order, set) in (0..=MAX_ORDER).zip(&self.free) {
            for at in set.range(..below).rev() {
                let whole = Run::new(*at, 1 << order);
                let part = whole.common(Run::new(0, below))?;
                blocks(part).for_each(|(order, at)| by_order[order as usize].push(at));
            }
        }
        let (mut left, mut taken) = (pages, Vec::new());
        for order in (0..=MAX_ORDER).rev() {
            let stock = &mut by_order[order as usize];
            let count = usize::try_from(left >> order).map_or(stock.len(), |n| n.min(stock.len()));
            for at in stock.drain(..count) {
                taken.push(Run::new(at, 1 << order));
                left -= 1 << order;
            }
        }
        if left > 0 {
            let at = by_order.iter().find_map(|stock| stock.first())?;
            taken.push(Run::new(*at, left));
        }
        Some(merged(taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << MAX_ORDER;

    fn of(runs: &[Run]) -> Buddy {
        let mut buddy = Buddy::default();
        runs.iter().for_each(|run| buddy.give(*run));
        buddy
    }

    #[test]
    fn a_gibibyte_is_given_as_one_block_and_comes_back_as_one() {
        let mut buddy = of(&[Run::new(3, 3 * GIB)]);
        let one = buddy.find(GIB, u64::MAX).unwrap();
        assert_eq!(one, [Run::new(2 * GIB, GIB)]);
        assert!(buddy.take(one[0]));
        assert!(!buddy.take(one[0]) && !buddy.has(Run::new(2 * GIB - 1, 2)));
        let small = buddy.find(1, u64::MAX).unwrap();
        assert!(
            small[0].start < GIB || small[0].start >= 3 * GIB,
            "{small:?}"
        );
        assert!(buddy.take(small[0]));
        buddy.give(one[0]);
        buddy.give(small[0]);
        assert_eq!(buddy, of(&[Run::new(3, 3 * GIB)]));
        assert_eq!(buddy.blocks()[MAX_ORDER as usize], 2);
    }

    #[test]
    fn the_zone_below_a_limit_is_left_to_those_who_ask_for_it() {
        let mut buddy = of(&[Run::new(0, 64)]);
        let high = buddy.find(8, u64::MAX).unwrap();
        assert_eq!(high, [Run::new(56, 8)]);
        assert!(buddy.take(high[0]));
        assert_eq!(buddy.find(8, 20).unwrap(), [Run::new(8, 8)]);
        assert_eq!(buddy.find(20, 20).unwrap(), [Run::new(0, 20)]);
        assert_eq!(buddy.find(21, 20), None);
        assert_eq!(buddy.longest(20), 20);
    }

    #[test]
    fn pieces_are_the_largest_there_are() {
        let buddy = of(&[
            Run::new(0, 8),
            Run::new(16, 4),
            Run::new(30, 1),
            Run::new(40, 1),
        ]);
        assert_eq!(
            buddy.find(13, u64::MAX).unwrap(),
            [Run::new(0, 8), Run::new(16, 4), Run::new(40, 1)]
        );
        assert_eq!(
            buddy.find(9, u64::MAX).unwrap(),
            [Run::new(0, 8), Run::new(40, 1)]
        );
        // Of the last block only a part is wanted.
        let two = of(&[Run::new(0, 8), Run::new(16, 8)]);
        let found = two.find(13, u64::MAX).unwrap();
        assert_eq!(found, [Run::new(16, 8), Run::new(0, 5)]);
    }

    fn free_pages() -> impl Strategy<Value = Vec<bool>> {
        proptest::collection::vec(proptest::bool::weighted(0.7), 1..200)
    }

    fn from_bits(bits: &[bool]) -> Buddy {
        let pages = (0..).zip(bits).filter(|(_, free)| **free);
        of(&pages.map(|(at, _)| Run::new(at, 1)).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn what_is_found_is_free_disjoint_enough_and_one_run_where_there_is_one(
            bits in free_pages(), pages in 1u64..100, below in 1u64..220,
        ) {
            let buddy = from_bits(&bits);
            let free = (0..).zip(&bits).filter(|(at, free)| **free && *at < below).count() as u64;
            let found = buddy.find(pages, below);
            prop_assert_eq!(found.is_some(), free >= pages, "{} free", free);
            let Some(found) = found else { return Ok(()) };
            prop_assert_eq!(found.iter().map(|run| run.len).sum::<u64>(), pages);
            prop_assert!(found.iter().all(|run| run.end() <= below));
            prop_assert_eq!(found.len() == 1, buddy.longest(below) >= pages, "{:?}", found);
            // Taking them one by one shows that they are free and overlap nowhere.
            let mut left = buddy.clone();
            prop_assert!(found.iter().all(|run| left.take(*run)));
            prop_assert_eq!(left.pages() + pages, buddy.pages());
            // All come back, and coalesce to what was there.
            found.iter().for_each(|run| left.give(*run));
            prop_assert_eq!(left, buddy);
        }

        #[test]
        fn blocks_are_aligned_coalesced_and_as_many_as_the_pages_say(bits in free_pages()) {
            let buddy = from_bits(&bits);
            let mut seen = vec![false; bits.len()];
            for (order, blocks) in (0..).zip(&buddy.free) {
                for at in blocks {
                    prop_assert!(at.is_multiple_of(1 << order));
                    let pair = at ^ (1u64 << order);
                    prop_assert!(order == MAX_ORDER || !blocks.contains(&pair));
                    for page in *at..at + (1 << order) {
                        prop_assert!(!std::mem::replace(&mut seen[page as usize], true));
                    }
                }
            }
            prop_assert_eq!(&seen, &bits);
        }

        #[test]
        fn any_history_coalesces_back_to_the_whole(
            steps in proptest::collection::vec((any::<bool>(), 1u64..70, 0usize..8), 1..80),
        ) {
            let whole = of(&[Run::new(5, 1000)]);
            let (mut buddy, mut held) = (whole.clone(), Vec::<Vec<Run>>::new());
            for (take, pages, which) in steps {
                if take || held.is_empty() {
                    if let Some(runs) = buddy.find(pages, u64::MAX) {
                        prop_assert!(runs.iter().all(|run| buddy.take(*run)));
                        held.push(runs);
                    }
                } else {
                    let runs = held.swap_remove(which % held.len());
                    runs.iter().for_each(|run| buddy.give(*run));
                }
                let out: u64 = held.iter().flatten().map(|run| run.len).sum();
                prop_assert_eq!(buddy.pages() + out, 1000);
            }
            held.iter().flatten().for_each(|run| buddy.give(*run));
            prop_assert_eq!(buddy, whole);
        }
    }
}
