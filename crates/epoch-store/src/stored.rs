//! The stored pages of one epoch with their parity: read, checked, made again.

use crate::damage::{Damage, Outcome, Part};
use crate::format::{BLOCK_LEN, Index, Key, Kind, Seed};
use crate::generation::Generation;
use crate::map::{PageMap, Where};
use crate::reader::new_buffer;
use crate::stripe::{Layout, Stripe};
use outlive_epoch::{PAGE_SIZE, Run, StoreError};
use outlive_media::{Buffer, Medium};

/// What the checksums of an epoch's pages and parity blocks must be.
pub(crate) struct Stored {
    pub epoch: u64,
    pub layout: Layout,
    page_seed: Seed,
    parity_seed: Seed,
    pub crcs: Vec<u32>,
    parity: Vec<u32>,
}

/// What a block is found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Good,
    /// It was harmed, and made again.
    Mended,
    Lost,
}

/// The blocks of one stripe: its pages, then its parity.
pub(crate) struct Loaded {
    pub stripe: Stripe,
    pub states: Vec<State>,
    bytes: Buffer,
}

impl Stored {
    /// The index has passed its checks with this layout: there is a checksum for each block.
    pub fn new(key: Key, epoch: u64, layout: Layout, index: Index) -> Self {
        Self {
            epoch,
            layout,
            page_seed: key.of(Kind::Page, epoch),
            parity_seed: key.of(Kind::Parity, epoch),
            crcs: index.crcs,
            parity: index.parity,
        }
    }

    /// Whether these bytes, read at `at`, are the `i`-th page.
    pub fn is_page(&self, i: usize, at: u64, bytes: &[u8]) -> bool {
        self.crcs.get(i) == Some(&self.page_seed.crc(at, bytes))
    }

    fn is_block(&self, stripe: &Stripe, block: u64, bytes: &[u8]) -> bool {
        let at = stripe.block_at(block);
        match block.checked_sub(stripe.pages) {
            None => self.is_page((stripe.first + block) as usize, at, bytes),
            Some(parity) => {
                let crc = self.parity.get((stripe.first_parity + parity) as usize);
                crc == Some(&self.parity_seed.crc(at, bytes))
            }
        }
    }

    /// Reads a stripe, and makes again what is harmed in it, as far as that goes.
    /// `spare` is used for it, if it is large enough.
    pub fn load(
        &self,
        medium: &dyn Medium,
        number: u64,
        spare: Option<Buffer>,
    ) -> Result<Loaded, StoreError> {
        let stripe = self.layout.stripe(number);
        let pages = stripe.pages as usize * PAGE_SIZE;
        let len = stripe.blocks() * BLOCK_LEN;
        let mut buffer = match spare.filter(|spare| spare.len() as u64 >= len) {
            Some(buffer) => buffer,
            None => new_buffer(std::iter::once(len))?,
        };
        let bytes = &mut buffer[..len as usize];
        let (page_bytes, parity_bytes) = bytes.split_at_mut(pages);
        read_blocks(medium, stripe.at, page_bytes);
        read_blocks(medium, stripe.parity_at, parity_bytes);
        let good: Vec<bool> = (0..)
            .zip(bytes.chunks_exact(PAGE_SIZE))
            .map(|(block, bytes)| self.is_block(&stripe, block, bytes))
            .collect();
        let state = |good: &bool| if *good { State::Good } else { State::Lost };
        let mut states: Vec<State> = good.iter().map(state).collect();
        if good.contains(&false) {
            let check = |block, made: &[u8]| self.is_block(&stripe, block, made);
            for block in stripe.mend(bytes, &good, &check) {
                states[block as usize] = State::Mended;
            }
        }
        Ok(Loaded {
            stripe,
            states,
            bytes: buffer,
        })
    }
}

/// Reads blocks; those that the medium does not give are left as they are, and do not have their
/// checksum (or happen to be right).
pub(crate) fn read_blocks(medium: &dyn Medium, at: u64, into: &mut [u8]) {
    if medium.read(at, into).is_err() {
        for (i, block) in into.chunks_mut(PAGE_SIZE).enumerate() {
            if medium.read(at + i as u64 * BLOCK_LEN, block).is_err() {
                block.fill(0);
            }
        }
    }
}

impl Loaded {
    /// Gives the memory back.
    pub fn into_buffer(self) -> Buffer {
        self.bytes
    }

    /// The bytes of a block.
    pub fn block(&self, block: u64) -> &[u8] {
        &self.bytes[block as usize * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// What is harmed in it; `places` are those of its epoch.
    pub fn damages<'a>(
        &self,
        generation: &Generation,
        epoch: u64,
        places: &dyn Fn() -> &'a Places,
    ) -> Vec<Damage> {
        let mut damages = Vec::new();
        let harmed = (0..).zip(&self.states).filter(|(_, s)| **s != State::Good);
        for (block, state) in harmed {
            let page = (block < self.stripe.pages).then_some(self.stripe.first + block);
            let run = page.and_then(|page| places().run_of(page));
            let part = run.map_or(Part::Parity, Part::Pages);
            let what = "its bytes do not have their checksum";
            let at = self.stripe.block_at(block);
            let damage = generation.damaged(at, Some(epoch), part, what);
            let outcome = match (state, run, page) {
                (State::Lost, Some(run), Some(page)) => places().lost_or_unneeded(run, page),
                // The pages are there, or are listed as lost themselves.
                (State::Lost, ..) => Outcome::Unneeded,
                _ => Outcome::Repairable,
            };
            damages.push(damage.with(outcome));
        }
        damages
    }
}

/// Which pages the stored ones of an epoch are.
pub(crate) struct Places {
    stored: Vec<(u64, Run)>,
    map: PageMap,
}

impl Places {
    pub fn of(index: &Index) -> Self {
        let mut map = PageMap::default();
        map.apply(index, 0);
        let stored = index.stored();
        Self { stored, map }
    }

    /// Which page of a space is the `i`-th one that is stored.
    fn run_of(&self, i: u64) -> Option<Run> {
        let behind = self.stored.partition_point(|(before, _)| *before <= i);
        let (before, run) = self.stored.get(behind.checked_sub(1)?)?;
        let within = (i - before < run.count()).then_some(i - before)?;
        Run::new(run.space(), run.first() + within, 1)
    }

    /// A page that the same epoch stores once more is needed by nobody.
    fn lost_or_unneeded(&self, run: Run, page: u64) -> Outcome {
        let is_it = |(_, place)| matches!(place, Where::Data { crc, .. } if crc as u64 == page);
        match self.map.within(run).any(is_it) {
            true => Outcome::Lost,
            false => Outcome::Unneeded,
        }
    }
}
