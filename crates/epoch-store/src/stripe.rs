//! Where the pages of an epoch and their parity stand, and how damaged ones are made again.
//!
//! The pages that an epoch stores are counted from 0 and stand in *stripes* of up to [`STRIPE`]
//! pages. Each block of a stripe has a *class*: its distance from the beginning of the stripe, in
//! blocks, modulo [`WIDTH`]. For each class that has a page there is one parity block, of the same
//! class, such that the exclusive or of all blocks of a class is zero.
//!
//! # Invariants
//! - [`WIDTH`] blocks in a row have different classes, parity blocks included. So whatever harms no
//!   more than [`WIDTH`] neighbouring blocks, which is what [`REPAIRABLE`] bytes touch at most, harms
//!   each class once, and each harmed block is the exclusive or of the others of its class.
//! - Which blocks are harmed is told by their checksums, and what was made again must have its
//!   checksum as well: a stripe with more damage gives no wrong pages, it gives fewer pages.

use crate::format::BLOCK_LEN;
use outlive_epoch::PAGE_SIZE;

/// Most pages of a stripe.
pub const STRIPE: u64 = 1024;
/// Parity blocks of a stripe that has as many pages, or more; otherwise there is one for each page.
pub const WIDTH: u64 = 17;
/// Any so many bytes in a row, wherever they begin, can be lost and are made up for.
pub const REPAIRABLE: u64 = (WIDTH - 1) * BLOCK_LEN;

/// The place of the pages of one epoch, and of their parity.
///
/// Made by [`Layout::new`], which checks that all of it lies within 63 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    start: u64,
    pages: u64,
    /// Where the parity of the last stripe begins, if that is not full.
    parity_at: u64,
}

/// One stripe of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// Which page of the epoch is its first one.
    pub first: u64,
    /// How many pages it has, at least 1.
    pub pages: u64,
    /// Where the pages begin …
    pub at: u64,
    /// … and its parity blocks.
    pub parity_at: u64,
    /// Which parity block of the epoch is its first one.
    pub first_parity: u64,
}

impl Layout {
    /// `None` where the numbers do not fit each other: the parity of a last stripe of fewer than
    /// [`WIDTH`] pages must begin at the class of its first page.
    pub fn new(start: u64, pages: u64, parity_at: u64) -> Option<Self> {
        let end = pages
            .checked_add((pages / STRIPE).checked_mul(WIDTH)?)?
            .checked_mul(BLOCK_LEN)?
            .checked_add(start)?;
        let layout = Self {
            start,
            pages,
            parity_at,
        };
        let rest = pages % STRIPE;
        let last = layout.page_at(pages - rest);
        let placed = rest == 0
            || (parity_at >= end
                && (parity_at - last).is_multiple_of(BLOCK_LEN)
                && (rest >= WIDTH || (parity_at - last).is_multiple_of(WIDTH * BLOCK_LEN))
                && parity_at < 1 << 62);
        (placed && end < 1 << 62).then_some(layout)
    }

    /// Where the parity of the last stripe is put, if nothing else stands before `free`.
    pub fn place_parity(start: u64, pages: u64, free: u64) -> u64 {
        let rest = pages % STRIPE;
        let last = start + (pages - rest + pages / STRIPE * WIDTH) * BLOCK_LEN;
        match rest {
            0 => free,
            1..WIDTH => last + (free - last).next_multiple_of(WIDTH * BLOCK_LEN),
            _ => free,
        }
    }

    /// Pages that are stored.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Where the `i`-th page stands.
    pub fn page_at(&self, i: u64) -> u64 {
        self.start + (i + i / STRIPE * WIDTH) * BLOCK_LEN
    }

    /// How many pages stand one after the other from the `i`-th one on, at most.
    pub fn contiguous(i: u64) -> u64 {
        STRIPE - i % STRIPE
    }

    /// One past the pages, and the parity between them.
    pub fn pages_end(&self) -> u64 {
        self.page_at(self.pages)
    }

    /// One past the parity of the last stripe; `None` where that is full or there is none.
    pub fn parity_end(&self) -> Option<u64> {
        let rest = self.pages % STRIPE;
        (rest > 0).then(|| self.parity_at + rest.min(WIDTH) * BLOCK_LEN)
    }

    /// Parity blocks of all stripes.
    pub fn parity_blocks(&self) -> u64 {
        self.pages / STRIPE * WIDTH + (self.pages % STRIPE).min(WIDTH)
    }

    /// How many stripes there are.
    pub fn stripes(&self) -> u64 {
        self.pages.div_ceil(STRIPE)
    }

    /// One of them.
    pub fn stripe(&self, number: u64) -> Stripe {
        let first = number * STRIPE;
        let pages = STRIPE.min(self.pages - first);
        let at = self.page_at(first);
        let inline = at + STRIPE * BLOCK_LEN;
        Stripe {
            first,
            pages,
            at,
            parity_at: if pages == STRIPE {
                inline
            } else {
                self.parity_at
            },
            first_parity: number * WIDTH,
        }
    }
}

impl Stripe {
    /// How many parity blocks it has.
    pub fn parity(&self) -> u64 {
        self.pages.min(WIDTH)
    }

    /// Blocks of pages and parity.
    pub fn blocks(&self) -> u64 {
        self.pages + self.parity()
    }

    /// Where a block stands: first the pages, then the parity blocks.
    pub fn block_at(&self, block: u64) -> u64 {
        match block.checked_sub(self.pages) {
            None => self.at + block * BLOCK_LEN,
            Some(parity) => self.parity_at + parity * BLOCK_LEN,
        }
    }

    /// The class of a block.
    pub fn class(&self, block: u64) -> u64 {
        (self.block_at(block) - self.at) / BLOCK_LEN % WIDTH
    }

    /// Makes harmed blocks again, where they are the only one of their class. `bytes` are the pages,
    /// then the parity blocks; `good` says of each whether it has its checksum, `check` whether a
    /// block that was made again has. Gives the blocks that were made again.
    pub fn mend(
        &self,
        bytes: &mut [u8],
        good: &[bool],
        check: &dyn Fn(u64, &[u8]) -> bool,
    ) -> Vec<u64> {
        let mut mended = Vec::new();
        let bad = |class: u64| {
            let of_class = (0..self.blocks()).filter(move |b| self.class(*b) == class);
            of_class.filter(|b| !good[*b as usize])
        };
        for class in 0..WIDTH {
            let mut harmed = bad(class);
            let (Some(block), None) = (harmed.next(), harmed.next()) else {
                continue;
            };
            let mut made = [0; PAGE_SIZE];
            for other in (0..self.blocks()).filter(|b| self.class(*b) == class && *b != block) {
                xor(&mut made, &bytes[other as usize * PAGE_SIZE..][..PAGE_SIZE]);
            }
            if check(block, &made) {
                bytes[block as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&made);
                mended.push(block);
            }
        }
        mended
    }
}

/// Adds a block to another one.
fn xor(into: &mut [u8], bytes: &[u8]) {
    let (into, _) = into.as_chunks_mut::<8>();
    for (a, b) in into.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *a = (u64::from_ne_bytes(*a) ^ u64::from_ne_bytes(*b)).to_ne_bytes();
    }
}

/// The parity of the stripe that is being written.
pub struct Parity {
    /// By class.
    sums: Vec<u8>,
    pages: u64,
}

impl Parity {
    /// Of no pages.
    pub fn new() -> Self {
        Self {
            sums: vec![0; WIDTH as usize * PAGE_SIZE],
            pages: 0,
        }
    }

    /// Adds the next page.
    pub fn add(&mut self, page: &[u8]) {
        let class = (self.pages % WIDTH) as usize;
        let sum = &mut self.sums[class * PAGE_SIZE..][..PAGE_SIZE];
        if self.pages < WIDTH {
            sum.copy_from_slice(page);
        } else {
            xor(sum, page);
        }
        self.pages += 1;
    }

    /// Pages that were added.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Gives the blocks as they stand in the file, of which the first has the class of `distance`
    /// blocks, and begins anew.
    pub fn take(&mut self, distance: u64) -> Vec<u8> {
        let count = self.pages.min(WIDTH);
        let mut out = Vec::with_capacity(count as usize * PAGE_SIZE);
        for i in 0..count {
            let class = ((distance + i) % WIDTH) as usize;
            out.extend_from_slice(&self.sums[class * PAGE_SIZE..][..PAGE_SIZE]);
        }
        self.pages = 0;
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stripe(pages: u64, between: u64) -> Stripe {
        let end = LOG + pages * BLOCK_LEN;
        let at = Layout::place_parity(LOG, pages, end + between * BLOCK_LEN);
        Layout::new(LOG, pages, at).unwrap().stripe(0)
    }

    const LOG: u64 = 24 * BLOCK_LEN;

    /// The blocks of a stripe of random pages.
    fn fill(stripe: &Stripe, seed: u64) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bytes = vec![0; stripe.pages as usize * PAGE_SIZE];
        random.fill(&mut bytes);
        let mut parity = Parity::new();
        bytes.chunks(PAGE_SIZE).for_each(|page| parity.add(page));
        bytes.append(&mut parity.take((stripe.parity_at - stripe.at) / BLOCK_LEN));
        bytes
    }

    fn page_counts() -> impl Strategy<Value = u64> {
        prop_oneof![30 => 1u64..60, 1 => Just(STRIPE - 1), 1 => Just(STRIPE)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn any_run_of_the_published_length_is_made_again(pages in page_counts(), between in 0u64..40, seed: u64) {
            let stripe = stripe(pages, if pages == STRIPE { 0 } else { between });
            let whole = fill(&stripe, seed);
            let last = stripe.block_at(stripe.blocks() - 1);
            // Every place where a run can begin; in a large stripe, some of them.
            let step = 1 + stripe.blocks() / 80;
            for from in (0..=(last - stripe.at) / BLOCK_LEN).step_by(step as usize) {
                let run = stripe.at + from * BLOCK_LEN..stripe.at + (from + WIDTH) * BLOCK_LEN;
                let good: Vec<bool> = (0..stripe.blocks()).map(|b| !run.contains(&stripe.block_at(b))).collect();
                let mut bytes = whole.clone();
                for (b, _) in good.iter().enumerate().filter(|(_, good)| !**good) {
                    bytes[b * PAGE_SIZE..][..PAGE_SIZE].fill(0xa5);
                }
                let mended = stripe.mend(&mut bytes, &good, &|b, made| made == &whole[b as usize * PAGE_SIZE..][..PAGE_SIZE]);
                prop_assert_eq!(mended.len(), good.iter().filter(|good| !**good).count());
                prop_assert!(bytes == whole, "run at block {}", from);
            }
        }
    }

    #[test]
    fn what_does_not_have_its_checksum_is_not_given() {
        let stripe = stripe(40, 3);
        let mut bytes = fill(&stripe, 1);
        let mut good = vec![true; 57];
        good[3] = false;
        assert_eq!(stripe.mend(&mut bytes, &good, &|_, _| false), []);
        // Two of a class.
        good[3 + 17] = false;
        assert_eq!(stripe.mend(&mut bytes, &good, &|_, _| true), []);
    }

    #[test]
    fn a_layout_out_of_bounds_is_none() {
        assert_eq!(Layout::new(LOG, u64::MAX, 0), None);
        assert_eq!(Layout::new(LOG, 1 << 60, 0), None);
        assert_eq!(Layout::new(u64::MAX - 4095, 1, 0), None);
        assert_eq!(Layout::new(LOG, 3, LOG + 2 * BLOCK_LEN), None);
        assert_eq!(Layout::new(LOG, 3, LOG + 16 * BLOCK_LEN), None);
        assert_eq!(Layout::new(LOG, 30, u64::MAX - 4095), None);
        let layout = Layout::new(LOG, 3, LOG + 17 * BLOCK_LEN).unwrap();
        assert_eq!(layout.parity_end(), Some(LOG + 20 * BLOCK_LEN));
        let full = Layout::new(LOG, 2 * STRIPE, 0).unwrap();
        assert_eq!((full.stripes(), full.parity_blocks()), (2, 34));
        assert_eq!(full.pages_end(), LOG + (2 * STRIPE + 34) * BLOCK_LEN);
    }
}
