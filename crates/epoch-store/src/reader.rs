//! Reading of one epoch.
//!
//! The page indexes of the chain are laid over each other when the reader is made. Pages are
//! delivered in the order of the file (or against it, latest first), with large reads that a second thread makes ahead, and
//! checked before they are handed out. One that is harmed is made again from the parity of its
//! stripe; that is noted, and the reader's user does not notice.

use crate::damage::{Damage, Outcome, Part, Trouble};
use crate::format::{BLOCK_LEN, Trailer};
use crate::generation::{Generation, NOT_ITS_TAG};
use crate::groups::TreePlace;
use crate::map::{PageMap, Where};
use crate::stored::{Loaded, NOT_ITS_PAGES, State, Stored, Unpacked};
use crate::stripe::STRIPE;
use outlive_epoch::{Content, EpochId, EpochReader, Order, PAGE_SIZE, Run, StoreError, VisitError};
use outlive_media::{Buffer, TRANSFER};
use std::collections::BTreeMap;
use std::sync::mpsc;

/// Unwanted bytes that are read to make one large read of two.
const GAP: u64 = 128 << 10;
/// Reads under way or waiting to be visited.
const AHEAD: usize = 3;

/// Reads one committed epoch. Independent of the store that it came from.
pub struct Reader {
    generation: Generation,
    id: u64,
    groups: BTreeMap<String, TreePlace>,
    map: PageMap,
    /// By position in the chain: the checksums.
    stored: Vec<Stored>,
}

/// Pages that stand one after the other in the file and in their space, or in a cluster.
#[derive(Clone, Copy, Debug)]
struct Piece {
    run: Run,
    at: u64,
    /// Blocks that must be read for it.
    blocks: u64,
    epoch: usize,
    crc: usize,
    /// The cluster that they are in, and how many pages are before them there.
    packed: Option<(usize, usize)>,
}

impl Piece {
    fn len(&self) -> u64 {
        self.blocks * BLOCK_LEN
    }
}

/// Pieces that are read together.
#[derive(Debug)]
struct Chunk {
    at: u64,
    len: u64,
    pieces: Vec<Piece>,
}

impl Reader {
    pub(crate) fn new(generation: &Generation, chain: &[(u64, Trailer)]) -> Result<Self, Trouble> {
        generation.must_be_open()?;
        let (mut map, mut stored) = (PageMap::default(), Vec::new());
        let mut newest = (0, BTreeMap::new());
        for (position, (at, trailer)) in chain.iter().enumerate() {
            let index = generation.index(*at, trailer)?;
            map.apply(&index, position);
            if let Some(layout) = trailer.layout() {
                let pages = Stored::new(generation, trailer, layout, index);
                stored.push(pages);
            }
            if position + 1 == chain.len() {
                newest = (trailer.epoch, generation.groups(*at, trailer)?);
            }
        }
        let (id, groups) = newest;
        Ok(Self {
            generation: generation.clone(),
            id,
            groups,
            map,
            stored,
        })
    }

    /// A reader of which the parts were read before: the pages and the checksums that they need, by
    /// position, and the groups of the epoch.
    pub(crate) fn of(
        generation: &Generation,
        id: u64,
        groups: BTreeMap<String, TreePlace>,
        map: PageMap,
        stored: Vec<Stored>,
    ) -> Self {
        Self {
            generation: generation.clone(),
            id,
            groups,
            map,
            stored,
        }
    }

    /// Bytes of pages that this epoch holds, zero pages not counted, however they are stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.map.stored() * PAGE_SIZE as u64
    }

    /// Damage that was met and made up for while reading this image.
    #[must_use]
    pub fn met(&self) -> Vec<Damage> {
        self.generation.met.all()
    }

    /// The epoch that stored the tree of a group: an earlier one where it has not changed since.
    #[must_use]
    pub fn tree_origin(&self, group: &str) -> Option<EpochId> {
        self.groups.get(group).map(|place| EpochId(place.epoch))
    }

    /// The runs whose bytes are stored, and those that are zero; both in order, and they do not
    /// overlap.
    #[must_use]
    pub fn parts(&self) -> (Vec<Run>, Vec<Run>) {
        let (mut stored, mut zero) = (Vec::new(), Vec::new());
        for (run, place) in self.map.pieces() {
            match place {
                Where::Zero => zero.push(run),
                Where::Data { .. } | Where::Packed { .. } => stored.push(run),
            }
        }
        (stored, zero)
    }

    /// All pieces of the wanted runs, cut to the size of one transfer and gathered into reads, in
    /// file order.
    fn plan(&self, wanted: &[Run]) -> Vec<Chunk> {
        let limit = TRANSFER as u64;
        let mut pieces: Vec<Piece> = Vec::new();
        for (run, place) in wanted.iter().flat_map(|run| self.map.within(*run)) {
            let (at, epoch, crc) = match place {
                Where::Zero => continue,
                Where::Packed {
                    epoch,
                    cluster,
                    skip,
                    ..
                } => {
                    pieces.extend(self.packed(run, epoch, (cluster, skip)));
                    continue;
                }
                Where::Data { at, epoch, crc } => (at, epoch, crc),
            };
            let per_transfer = limit / BLOCK_LEN;
            for from in (0..run.count()).step_by(per_transfer as usize) {
                let count = per_transfer.min(run.count() - from);
                if let Some(run) = Run::new(run.space(), run.first() + from, count) {
                    let at = at + from * BLOCK_LEN;
                    pieces.push(Piece {
                        run,
                        at,
                        blocks: count,
                        epoch,
                        crc: crc + from as usize,
                        packed: None,
                    });
                }
            }
        }
        pieces.sort_unstable_by_key(|piece| (piece.at, piece.run.space(), piece.run.first()));
        let mut chunks: Vec<Chunk> = Vec::new();
        for piece in pieces {
            let end = piece.at + piece.len();
            match chunks.last_mut() {
                Some(chunk)
                    if end - chunk.at <= limit && piece.at <= chunk.at + chunk.len + GAP =>
                {
                    chunk.len = chunk.len.max(end - chunk.at);
                    chunk.pieces.push(piece);
                }
                _ => {
                    let (at, len) = (piece.at, piece.len());
                    chunks.push(Chunk {
                        at,
                        len,
                        pieces: vec![piece],
                    });
                }
            }
        }
        chunks
    }

    /// Pages that are in a cluster.
    fn packed(&self, run: Run, epoch: usize, (n, skip): (usize, usize)) -> Option<Piece> {
        let cluster = self.stored.get(epoch)?.clusters.get(n)?;
        Some(Piece {
            run,
            at: cluster.at,
            blocks: cluster.blocks(),
            epoch,
            crc: cluster.first as usize,
            packed: Some((n, skip)),
        })
    }

    /// Reads a chunk; checks, and decrypts, every block that is wanted of it, once.
    fn fetch(&self, chunk: &Chunk, buffer: &mut Buffer) -> Result<(), StoreError> {
        let bytes = &mut buffer[..chunk.len as usize];
        let failed = self.generation.medium.read(chunk.at, bytes).err();
        let (mut mended, mut done) = (None, 0);
        for piece in &chunk.pieces {
            let from = (piece.at - chunk.at) as usize;
            let pages = bytes[from..][..piece.len() as usize].chunks_exact_mut(PAGE_SIZE);
            for (i, page) in pages.enumerate() {
                let at = piece.at + i as u64 * BLOCK_LEN;
                // Pieces come in the order of the file, and those of a cluster have the same blocks.
                if at < done {
                    continue;
                }
                done = at + BLOCK_LEN;
                let stored = &self.stored[piece.epoch];
                if failed.is_some() || !stored.is_page(piece.crc + i, at, page) {
                    self.mend(piece, i, page, &mut mended)?;
                }
                if !stored.decrypt(piece.crc + i, at, page) {
                    let (epoch, part) = (Some(stored.epoch), Part::Pages(piece.run));
                    let damage = self.generation.damaged(at, epoch, part, NOT_ITS_TAG);
                    return Err(Trouble::from(damage).into());
                }
            }
        }
        Ok(())
    }

    /// Makes one page of a piece again; `last` is the stripe that was read for it, or for one before.
    fn mend(
        &self,
        piece: &Piece,
        i: usize,
        into: &mut [u8],
        last: &mut Option<(usize, Loaded)>,
    ) -> Result<(), StoreError> {
        let (stored, page) = (&self.stored[piece.epoch], (piece.crc + i) as u64);
        let known = last.take().filter(|(epoch, loaded)| {
            *epoch == piece.epoch && loaded.stripe.first == page / STRIPE * STRIPE
        });
        let (epoch, loaded) = match known {
            Some(known) => known,
            None => {
                let medium = &*self.generation.medium;
                (piece.epoch, stored.load(medium, page / STRIPE, None)?)
            }
        };
        let block = page % STRIPE;
        let run = match piece.packed {
            None => Run::new(piece.run.space(), piece.run.first() + i as u64, 1),
            Some(_) => Some(piece.run),
        };
        let damage = || {
            let (at, part) = (loaded.stripe.block_at(block), run.unwrap_or(piece.run));
            let what = "its bytes do not have their checksum";
            self.generation
                .damaged(at, Some(stored.epoch), Part::Pages(part), what)
        };
        match loaded.states[block as usize] {
            State::Good => {}
            State::Mended => self.generation.met.note(damage().with(Outcome::Repairable)),
            State::Lost => return Err(Trouble::from(damage()).into()),
        }
        into.copy_from_slice(loaded.block(block));
        *last = Some((epoch, loaded));
        Ok(())
    }

    /// Hands out what was read with a chunk.
    fn visit_chunk(
        &self,
        chunk: &Chunk,
        bytes: &[u8],
        unpacked: &mut Unpacked,
        visit: Visit<'_>,
    ) -> Result<(), VisitError> {
        for piece in &chunk.pieces {
            let from = (piece.at - chunk.at) as usize;
            let blocks = &bytes[from..][..piece.len() as usize];
            let Some((n, skip)) = piece.packed else {
                visit(piece.run, Content::Bytes(blocks))?;
                continue;
            };
            let stored = &self.stored[piece.epoch];
            let pages = unpacked.pages(piece.epoch, stored, n, blocks);
            let end = skip * PAGE_SIZE + piece.run.bytes() as usize;
            let Some(pages) = pages.and_then(|pages| pages.get(skip * PAGE_SIZE..end)) else {
                let part = Part::Pages(piece.run);
                let damage =
                    self.generation
                        .damaged(piece.at, Some(stored.epoch), part, NOT_ITS_PAGES);
                return Err(StoreError::from(Trouble::from(damage)).into());
            };
            visit(piece.run, Content::Bytes(pages))?;
        }
        Ok(())
    }

    fn visit_zeros(&self, wanted: &[Run], visit: Visit<'_>) -> Result<(), VisitError> {
        let parts = wanted.iter().flat_map(|run| self.map.within(*run));
        for (run, _) in parts.filter(|(_, place)| *place == Where::Zero) {
            visit(run, Content::Zero)?;
        }
        Ok(())
    }
}

type Visit<'a> = &'a mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>;

/// A buffer for the largest of these reads.
pub(crate) fn new_buffer(lens: impl Iterator<Item = u64>) -> Result<Buffer, StoreError> {
    let place = "buffer for reading".to_owned();
    let len = lens.max().unwrap_or(0).min(2 * TRANSFER as u64);
    Buffer::new(len as usize).map_err(|source| StoreError::Medium { place, source })
}

impl EpochReader for Reader {
    fn id(&self) -> EpochId {
        EpochId(self.id)
    }

    fn groups(&self) -> Vec<String> {
        self.groups.keys().cloned().collect()
    }

    fn tree(&self, group: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let tree = |place| self.generation.tree(group, place).map_err(StoreError::from);
        self.groups.get(group).map(tree).transpose()
    }

    fn runs(&self) -> Vec<Run> {
        self.map.runs()
    }

    fn pages_in(&self, wanted: &[Run], order: Order, visit: Visit<'_>) -> Result<(), VisitError> {
        self.visit_zeros(wanted, visit)?;
        let mut chunks = self.plan(wanted);
        if order == Order::LatestFirst {
            // Later epochs stand behind earlier ones.
            chunks.reverse();
        }
        let lens = chunks.iter().map(|chunk| chunk.len);
        let mut unpacked = Unpacked::default();
        if let [chunk] = &chunks[..] {
            let mut buffer = new_buffer(lens)?;
            self.fetch(chunk, &mut buffer)?;
            return self.visit_chunk(chunk, &buffer, &mut unpacked, visit);
        }
        std::thread::scope(|scope| {
            let (full, visited) = mpsc::channel();
            let (empty, spare) = mpsc::channel();
            for _ in 0..AHEAD.min(chunks.len()) {
                // Neither end is gone yet.
                let _ = empty.send(new_buffer(lens.clone())?);
            }
            let chunks = &chunks;
            // Ends when all is read, or when the visitor has gone and hands back no buffers.
            scope.spawn(move || {
                for (chunk, mut buffer) in chunks.iter().zip(spare) {
                    let result = self.fetch(chunk, &mut buffer);
                    let stop = result.is_err();
                    if full.send((chunk, result.map(|()| buffer))).is_err() || stop {
                        break;
                    }
                }
            });
            for (chunk, buffer) in visited {
                let buffer = buffer?;
                self.visit_chunk(chunk, &buffer, &mut unpacked, visit)?;
                let _ = empty.send(buffer);
            }
            Ok(())
        })
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = &self.generation.place;
        f.debug_struct("Reader")
            .field("place", place)
            .field("epoch", &self.id)
            .finish()
    }
}
