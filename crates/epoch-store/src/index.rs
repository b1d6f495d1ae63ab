//! The page index of an epoch: which pages it holds, and where their bytes stand.
//!
//! # Rules
//! - Pages whose bytes stand as they are and pages that are packed together take blocks of the log in the
//!   same way: checksums, stripes and parity are of blocks and know nothing of what is in them.
//! - An index is read as a whole, or not at all: every entry must stand where the entries before it end.

use crate::cipher::Tag;
use crate::format::{BLOCK_LEN, ENTRY_LEN, Take, put_numbers};
use crate::pack::{Codec, MOST};
use crate::planted::bug;
use crate::stripe::Layout;
use outlive_epoch::{Run, SpaceId};

/// Bytes of the description of one cluster.
pub const CLUSTER_LEN: usize = 12;

/// What an epoch says of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// Their bytes stand at this offset, one after the other.
    Data(u64),
    /// They are in this cluster of the epoch, behind so many other pages.
    Packed {
        cluster: u32,
        skip: u32,
    },
    Zero,
    Absent,
}

/// One entry of a page index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub run: Run,
    pub says: Says,
}

/// Pages that were packed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Where its first block stands.
    pub at: u64,
    /// Which block of the epoch that is.
    pub first: u64,
    /// Pages that are in it, from 2 to [`MOST`].
    pub pages: u32,
    /// Bytes of them as they are stored, without what fills the last block.
    pub len: u32,
    pub codec: Codec,
    /// The checksum of the pages before they were packed.
    pub crc: u32,
}

impl Cluster {
    /// Blocks that it takes.
    pub fn blocks(&self) -> u64 {
        u64::from(self.len).div_ceil(BLOCK_LEN)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&(self.pages as u16).to_le_bytes());
        out.extend_from_slice(&self.codec.number().to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
    }

    /// Reads the description of the cluster whose blocks begin with the `first`-th of the epoch; `None`
    /// where it does not fit there, or would not have been packed.
    fn decode(chunk: &[u8], first: u64, layout: &Layout) -> Option<Self> {
        let mut take = Take(chunk);
        let (len, pages) = (take.u32()?, u32::from(take.u16()?));
        let codec = Codec::from_number(take.u16()?)?;
        let left = layout.pages().checked_sub(first)?;
        let cluster = Self {
            at: layout.page_at(first),
            first,
            pages,
            len,
            codec,
            crc: take.u32()?,
        };
        let blocks = cluster.blocks();
        let fits = blocks <= left && blocks <= Layout::contiguous(first);
        (len > 0 && pages <= MOST && blocks < u64::from(pages) && fits).then_some(cluster)
    }
}

/// Pages that stand in blocks of their own: which blocks of the epoch, and which pages are in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub first: u64,
    pub blocks: u64,
    /// One run with a page in each block, or those of a cluster, in whose blocks all of them are.
    pub runs: Vec<Run>,
}

/// The page index of one epoch: entries in the order of writing (later ones win), and the
/// checksums of the blocks of all `Data` and `Packed` entries, in the same order, which is that of the
/// file.
///
/// The pages of the clusters, one cluster after the other, are those of the `Packed` entries: none of
/// these belongs to two clusters, and no `Data` entry stands between two of the same cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    pub entries: Vec<Entry>,
    pub crcs: Vec<u32>,
    /// The checksums of the parity blocks, in the order of the file.
    pub parity: Vec<u32>,
    /// In the order of the file.
    pub clusters: Vec<Cluster>,
    /// Of an encrypted epoch: the tags of the blocks, in the order of the file.
    pub tags: Vec<Tag>,
}

/// What a trailer says of an index.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub entries: u64,
    pub clusters: u64,
    /// Pages whose bytes are stored.
    pub pages: u64,
}

/// How far the decoding of an index is.
#[derive(Default)]
struct Progress {
    /// Blocks of the entries so far.
    stored: u64,
    /// Clusters of them, without the one that is open …
    clusters: usize,
    /// … and the pages of that.
    open: u32,
}

impl Index {
    /// Adds an entry, or makes the last one longer.
    pub fn push(&mut self, run: Run, says: Says) {
        if let Some(last) = self.entries.last_mut() {
            let follows = match (last.says, says) {
                (Says::Data(at), Says::Data(next)) => at + last.run.bytes() == next,
                (
                    Says::Packed { cluster: a, skip },
                    Says::Packed {
                        cluster: b,
                        skip: next,
                    },
                ) => a == b && u64::from(skip) + last.run.count() == u64::from(next),
                (a, b) => a == b,
            };
            let adjacent = last.run.space() == run.space() && last.run.end() == run.first();
            if (follows || bug("runs joined over a gap")) && adjacent {
                let count = last.run.count() + run.count();
                if let Some(joined) = Run::new(run.space(), last.run.first(), count) {
                    last.run = joined;
                    return;
                }
            }
        }
        self.entries.push(Entry { run, says });
    }

    /// Bytes of the encoded index of an epoch that is not encrypted.
    pub fn encoded_len(&self) -> usize {
        let crcs = (self.crcs.len() + self.parity.len()) * 4;
        self.entries.len() * ENTRY_LEN + crcs + self.clusters.len() * CLUSTER_LEN
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(self.encoded_len());
        self.encode_entries(out);
        self.encode_crcs(out);
        self.encode_clusters(out);
    }

    pub fn encode_entries(&self, out: &mut Vec<u8>) {
        for Entry { run, says } in &self.entries {
            let (kind, at) = match says {
                Says::Data(at) => (1u32, *at),
                Says::Zero => (2, 0),
                Says::Absent => (3, 0),
                Says::Packed { cluster, skip } => {
                    let at = self.clusters.get(*cluster as usize).map_or(0, |c| c.at);
                    (4, at + u64::from(*skip))
                }
            };
            put_numbers(out, &[run.first(), run.count(), at]);
            out.extend_from_slice(&run.space().0.to_le_bytes());
            out.extend_from_slice(&kind.to_le_bytes());
        }
    }

    pub fn encode_crcs(&self, out: &mut Vec<u8>) {
        self.crcs
            .iter()
            .chain(&self.parity)
            .for_each(|crc| out.extend_from_slice(&crc.to_le_bytes()));
    }

    pub fn encode_clusters(&self, out: &mut Vec<u8>) {
        self.clusters.iter().for_each(|cluster| cluster.encode(out));
    }

    /// The pages that are stored, by the blocks that they stand in.
    pub fn stored(&self) -> Vec<Stretch> {
        let mut stored: Vec<Stretch> = Vec::new();
        let mut next = 0;
        for Entry { run, says } in &self.entries {
            match *says {
                Says::Zero | Says::Absent => {}
                Says::Packed { skip: 1.., .. } => {
                    if let Some(last) = stored.last_mut() {
                        last.runs.push(*run);
                    }
                }
                Says::Data(_) | Says::Packed { .. } => {
                    let blocks = match *says {
                        Says::Packed { cluster, .. } => {
                            let cluster = self.clusters.get(cluster as usize);
                            cluster.map_or(0, Cluster::blocks)
                        }
                        _ => run.count(),
                    };
                    stored.push(Stretch {
                        first: next,
                        blocks,
                        runs: vec![*run],
                    });
                    next += blocks;
                }
            }
        }
        stored
    }

    /// Reads an index whose blocks have this layout; `None` where it is not in order.
    pub fn decode(bytes: &[u8], counts: Counts, layout: &Layout) -> Option<Self> {
        let entries_len = usize::try_from(counts.entries).ok()?;
        let entries_len = entries_len.checked_mul(ENTRY_LEN)?;
        let clusters_len = usize::try_from(counts.clusters).ok()?;
        let clusters_len = clusters_len.checked_mul(CLUSTER_LEN)?;
        let (head, tail) = bytes.split_at_checked(entries_len)?;
        let crcs_len = tail.len().checked_sub(clusters_len)?;
        let (tail, packed) = tail.split_at(crcs_len);
        let (crcs, rest) = tail.as_chunks::<4>();
        let blocks = usize::try_from(layout.pages()).ok()?;
        let (crcs, parity) = crcs.split_at_checked(blocks)?;
        let numbers = |crcs: &[[u8; 4]]| crcs.iter().map(|crc| u32::from_le_bytes(*crc)).collect();
        let mut index = Self {
            crcs: numbers(crcs),
            parity: numbers(parity),
            ..Self::default()
        };
        let mut progress = Progress::default();
        for chunk in head.as_chunks::<ENTRY_LEN>().0 {
            let entry = index.entry(chunk, &mut progress, (packed, layout))?;
            index.entries.push(entry);
        }
        let pages: u64 = index.stored_pages();
        let whole = progress.stored == layout.pages()
            && progress.open == 0
            && progress.clusters * CLUSTER_LEN == clusters_len
            && parity.len() as u64 == layout.parity_blocks()
            && pages == counts.pages
            && rest.is_empty();
        whole.then_some(index)
    }

    /// Blocks that packing saved.
    pub fn saved(&self) -> u64 {
        let saved = |cluster: &Cluster| u64::from(cluster.pages).saturating_sub(cluster.blocks());
        self.clusters.iter().map(saved).sum()
    }

    /// The pages of all entries that say where their bytes stand.
    fn stored_pages(&self) -> u64 {
        let stored = |entry: &&Entry| matches!(entry.says, Says::Data(_) | Says::Packed { .. });
        let counts = self.entries.iter().filter(stored).map(|e| e.run.count());
        // Each is bounded by the layout: the sum is far from its end.
        counts.sum()
    }

    /// `progress` counts what the entries before this one hold, which says where it stands; what is
    /// `packed` are the descriptions of the clusters.
    fn entry(
        &mut self,
        chunk: &[u8; ENTRY_LEN],
        progress: &mut Progress,
        (packed, layout): (&[u8], &Layout),
    ) -> Option<Entry> {
        let mut take = Take(chunk);
        let (first, count, at) = (take.u64()?, take.u64()?, take.u64()?);
        let (space, kind) = (take.u32()?, take.u32()?);
        let run = Run::new(SpaceId(space), first, count)?;
        let says = match kind {
            1 if progress.open == 0 => {
                let stored = progress.stored;
                let left = layout.pages().checked_sub(stored)?;
                let fits = count <= left && count <= Layout::contiguous(stored);
                let placed = fits && at == layout.page_at(stored);
                progress.stored += count;
                placed.then_some(Says::Data(at))?
            }
            2 => Says::Zero,
            3 => Says::Absent,
            4 => self.packed_entry(count, at, progress, (packed, layout))?,
            _ => return None,
        };
        Some(Entry { run, says })
    }

    /// An entry whose pages are the next ones of the open cluster, or the first ones of another.
    fn packed_entry(
        &mut self,
        count: u64,
        at: u64,
        progress: &mut Progress,
        (packed, layout): (&[u8], &Layout),
    ) -> Option<Says> {
        if progress.open == 0 {
            let chunk = packed.chunks_exact(CLUSTER_LEN).nth(progress.clusters)?;
            let cluster = Cluster::decode(chunk, progress.stored, layout)?;
            self.clusters.push(cluster);
        }
        let cluster = self.clusters.last()?;
        let skip = progress.open;
        let open = u32::try_from(count).ok()?.checked_add(skip)?;
        if open > cluster.pages || at != cluster.at + u64::from(skip) {
            return None;
        }
        let says = Says::Packed {
            cluster: u32::try_from(progress.clusters).ok()?,
            skip,
        };
        progress.open = open;
        if open == cluster.pages {
            progress.open = 0;
            progress.clusters += 1;
            progress.stored += cluster.blocks();
        }
        Some(says)
    }
}
