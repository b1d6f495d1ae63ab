//! The stored pages of one epoch with their parity: read, checked, made again.

use crate::cipher::{Cipher, Tag};
use crate::damage::{Damage, Outcome, Part};
use crate::format::{BLOCK_LEN, Kind, Seed, Trailer};
use crate::generation::{Generation, NOT_ITS_TAG};
use crate::index::{Cluster, Index, Stretch};
use crate::map::{PageMap, Where};
use crate::pack::{MOST, Unpacker};
use crate::planted::bug;
use crate::reader::new_buffer;
use crate::stripe::{Layout, Stripe};
use outlive_epoch::{PAGE_SIZE, Run, StoreError};
use outlive_media::{Buffer, Medium};
use std::borrow::Cow;
use std::sync::Arc;

/// What the checksums of an epoch's pages and parity blocks must be.
pub(crate) struct Stored {
    pub epoch: u64,
    pub layout: Layout,
    page_seed: Seed,
    parity_seed: Seed,
    contents_seed: Seed,
    pub crcs: Vec<u32>,
    parity: Vec<u32>,
    pub clusters: Vec<Cluster>,
    tags: Vec<Tag>,
    cipher: Option<Arc<Cipher>>,
}

/// Pages as they were before they were packed.
#[derive(Default)]
pub(crate) struct Unpacked {
    unpacker: Unpacker,
    /// Epoch, as its position in a chain, and cluster.
    of: Option<(usize, usize)>,
    bytes: Vec<u8>,
}

impl Unpacked {
    /// The pages of a cluster of the `epoch`-th of a chain, whose blocks are these; `None` where they do not
    /// have their checksum.
    pub fn pages(
        &mut self,
        epoch: usize,
        stored: &Stored,
        n: usize,
        blocks: &[u8],
    ) -> Option<&[u8]> {
        let cluster = stored.clusters.get(n)?;
        let len = cluster.pages.min(MOST) as usize * PAGE_SIZE;
        let known = self.of.filter(|of| {
            *of == (epoch, n) || (of.1 == n && bug("clusters of epochs not told apart"))
        });
        if known.is_none() {
            self.of = None;
            self.bytes.resize(MOST as usize * PAGE_SIZE, 0);
            if !stored.unpack(cluster, blocks, &mut self.bytes[..len], &mut self.unpacker) {
                return None;
            }
            self.of = Some((epoch, n));
        }
        Some(&self.bytes[..len])
    }
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
    pub fn new(generation: &Generation, trailer: &Trailer, layout: Layout, index: Index) -> Self {
        let (key, epoch) = (generation.key, trailer.epoch);
        Self {
            epoch,
            layout,
            page_seed: key.of(Kind::Page, epoch),
            parity_seed: key.of(Kind::Parity, epoch),
            contents_seed: key.of(Kind::Contents, epoch),
            crcs: index.crcs,
            parity: index.parity,
            clusters: index.clusters,
            tags: index.tags,
            cipher: generation.cipher_of(trailer),
        }
    }

    /// Decrypts the `i`-th block, which was read at `at` and has its checksum, if it is encrypted and the key is
    /// known; whether it has its tag.
    pub fn decrypt(&self, i: usize, at: u64, block: &mut [u8]) -> bool {
        let Some(cipher) = &self.cipher else {
            return true;
        };
        let tag = self.tags.get(i);
        tag.is_some_and(|tag| cipher.decrypt(Kind::Page, at, &[], tag, block))
            || bug("tags of pages not checked")
    }

    /// Unpacks the pages of a cluster, whose blocks have their checksums.
    fn unpack(&self, cluster: &Cluster, blocks: &[u8], into: &mut [u8], by: &mut Unpacker) -> bool {
        let packed = blocks.get(..cluster.len as usize);
        let whole = packed.is_some_and(|packed| by.unpack(cluster.codec, packed, into));
        whole && self.contents_seed.crc(cluster.at, into) == cluster.crc
    }

    /// Whether these bytes, read at `at`, are the `i`-th block.
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

    /// The blocks with pages as they were before they were encrypted, and which of them do not have their tags
    /// although they have their checksums.
    pub fn decrypted(&self, stored: &Stored) -> (Cow<'_, [u8]>, Vec<u64>) {
        let pages = &self.bytes[..self.stripe.pages as usize * PAGE_SIZE];
        if stored.cipher.is_none() {
            return (Cow::Borrowed(pages), Vec::new());
        }
        let (mut pages, mut refused) = (pages.to_vec(), Vec::new());
        for (block, bytes) in (0..).zip(pages.chunks_exact_mut(PAGE_SIZE)) {
            let (i, at) = (self.stripe.first + block, self.stripe.block_at(block));
            let there = self.states[block as usize] != State::Lost;
            if there && !stored.decrypt(i as usize, at, bytes) {
                refused.push(block);
            }
        }
        (Cow::Owned(pages), refused)
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
            let what = "its bytes do not have their checksum";
            let at = self.stripe.block_at(block);
            let damage = |part| generation.damaged(at, Some(epoch), part, what);
            let runs = page.map_or_else(Vec::new, |page| places().runs_of(page));
            damages.extend(match (state, &runs[..], page) {
                // Which pages they hold, and whether they are needed, is not known without the key.
                (State::Lost, [], Some(_)) if generation.is_locked() => {
                    vec![damage(Part::Block)]
                }
                (_, [], Some(_)) if generation.is_locked() => {
                    vec![damage(Part::Block).with(Outcome::Repairable)]
                }
                (State::Lost, [_, ..], Some(page)) => places().of_lost(&runs, page, &damage),
                // The pages are there, or are listed as lost themselves.
                (State::Lost, ..) => vec![damage(Part::Parity).with(Outcome::Unneeded)],
                (_, [run, ..], _) => vec![damage(Part::Pages(*run)).with(Outcome::Repairable)],
                _ => vec![damage(Part::Parity).with(Outcome::Repairable)],
            });
        }
        damages
    }

    /// Decrypts the blocks and unpacks the clusters of the stripe that are whole; those that do not hold what they
    /// were made from are lost.
    pub fn unpack<'a>(
        &self,
        generation: &Generation,
        stored: &Stored,
        places: &dyn Fn() -> &'a Places,
    ) -> Vec<Damage> {
        let (first, end) = (self.stripe.first, self.stripe.first + self.stripe.pages);
        let (mut unpacked, mut damages) = (Unpacked::default(), Vec::new());
        let (bytes, refused) = self.decrypted(stored);
        for block in &refused {
            let at = self.stripe.block_at(*block);
            let damage = |part| generation.damaged(at, Some(stored.epoch), part, NOT_ITS_TAG);
            let runs = places().runs_of(first + block);
            damages.extend(places().of_lost(&runs, first + block, &damage));
        }
        let from = stored.clusters.partition_point(|c| c.first < first);
        for (n, cluster) in stored.clusters.iter().enumerate().skip(from) {
            if cluster.first >= end {
                break;
            }
            let block = (cluster.first - first) as usize;
            let count = cluster.blocks() as usize;
            let there = &self.states[block..block + count];
            let blocks = block..block + count;
            let is_in = |refused: &u64| blocks.contains(&(*refused as usize));
            if there.contains(&State::Lost) || refused.iter().any(is_in) {
                continue;
            }
            let bytes = &bytes[block * PAGE_SIZE..(block + count) * PAGE_SIZE];
            if unpacked.pages(0, stored, n, bytes).is_none() {
                let damage =
                    |part| generation.damaged(cluster.at, Some(stored.epoch), part, NOT_ITS_PAGES);
                let runs = places().runs_of(cluster.first);
                damages.extend(places().of_lost(&runs, cluster.first, &damage));
            }
        }
        damages
    }
}

/// Which pages the stored ones of an epoch are.
pub(crate) struct Places {
    stored: Vec<Stretch>,
    clusters: Vec<Cluster>,
    map: PageMap,
}

/// What is said of a cluster whose blocks are whole and do not unpack to its pages.
pub(crate) const NOT_ITS_PAGES: &str = "what is packed in it is not what was stored";

impl Places {
    pub fn of(index: &Index) -> Self {
        let mut map = PageMap::default();
        map.apply(index, 0);
        Self {
            stored: index.stored(),
            clusters: index.clusters.clone(),
            map,
        }
    }

    /// Which pages stand in the `i`-th block: one, or those of a cluster.
    fn runs_of(&self, i: u64) -> Vec<Run> {
        let behind = self.stored.partition_point(|stretch| stretch.first <= i);
        let stretch = behind.checked_sub(1).and_then(|at| self.stored.get(at));
        let Some(stretch) = stretch.filter(|stretch| i - stretch.first < stretch.blocks) else {
            return Vec::new();
        };
        if self.cluster_of(i).is_some() {
            return stretch.runs.clone();
        }
        let page = |run: &Run| Run::new(run.space(), run.first() + i - stretch.first, 1);
        stretch.runs.iter().filter_map(page).collect()
    }

    /// The cluster that the `i`-th block is of.
    fn cluster_of(&self, i: u64) -> Option<usize> {
        let behind = self.clusters.partition_point(|c| c.first <= i);
        let at = behind.checked_sub(1)?;
        let cluster = self.clusters.get(at)?;
        (i - cluster.first < cluster.blocks()).then_some(at)
    }

    /// What is to be said of a lost block with these pages. A page that the same epoch stores once more is
    /// needed by nobody.
    fn of_lost(&self, runs: &[Run], i: u64, damage: &dyn Fn(Part) -> Damage) -> Vec<Damage> {
        let of_cluster = self.cluster_of(i);
        let is_it = |place: Where| match place {
            Where::Data { crc, .. } => crc as u64 == i,
            Where::Packed { cluster, .. } => Some(cluster) == of_cluster,
            Where::Zero => false,
        };
        let needed = runs.iter().flat_map(|run| self.map.within(*run));
        let needed = needed.filter(|(_, place)| is_it(*place));
        let lost: Vec<Damage> = needed
            .map(|(run, _)| damage(Part::Pages(run)).with(Outcome::Lost))
            .collect();
        match (&lost[..], runs.first()) {
            ([], Some(run)) => vec![damage(Part::Pages(*run)).with(Outcome::Unneeded)],
            _ => lost,
        }
    }
}
