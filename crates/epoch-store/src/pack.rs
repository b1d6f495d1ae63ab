//! Packing of pages: several of them together, into fewer blocks.
//!
//! A *cluster* is up to [`MOST`] pages in the order in which they came, whatever runs they are of, as one
//! compressed piece. It takes whole blocks of the log, and is only made where it takes clearly fewer of them
//! than its pages. A single page is read by reading and unpacking its cluster, 64 KiB at most.
//!
//! # Rules
//! - Whether it pays is found out by doing it: after a cluster that did not, pages are stored as they are for a
//!   while, each time for longer, so that data which cannot be packed costs next to nothing.
//! - What comes out of a medium is unpacked into a buffer of the known length: whatever the bytes say, nothing
//!   else is written, and no memory is taken for it.

use outlive_epoch::PAGE_SIZE;

/// Most pages of a cluster.
pub const MOST: u32 = 16;
/// The most pages that are stored as they are before packing is tried again.
const PATIENCE: u64 = 4096;
/// zstd's own measure of effort: its quickest proper level.
const ZSTD_LEVEL: i32 = 1;

/// How pages are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// LZ4 blocks: quick to unpack.
    Lz4,
    /// Zstandard frames: smaller, and slower to unpack.
    Zstd,
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Some other word than the name of a [`Codec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither lz4 nor zstd")]
pub struct UnknownCodec;

impl std::str::FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(name: &str) -> Result<Self, UnknownCodec> {
        match name {
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            _ => Err(UnknownCodec),
        }
    }
}

impl Codec {
    /// The number in the format.
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(crate) fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// What unpacking needs.
#[derive(Default)]
pub(crate) struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Unpacker {
    /// Unpacks into a buffer of exactly the length that it must have; whether that was so.
    pub fn unpack(&mut self, codec: Codec, packed: &[u8], into: &mut [u8]) -> bool {
        let len = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(packed, into).ok(),
            Codec::Zstd => {
                let zstd = self.zstd.get_or_insert_default();
                zstd.decompress_to_buffer(packed, into).ok()
            }
        };
        len == Some(into.len())
    }
}

/// The effort of packing, and what is known of whether it pays.
pub(crate) struct Packer {
    codec: Codec,
    out: Vec<u8>,
    /// LZ4's table, which is used again for each cluster.
    table: lz4_flex::block::CompressTable,
    /// What zstd needs; made when it is first used.
    zstd: Option<zstd::bulk::Compressor<'static>>,
    /// Pages that are stored as they are before it is tried again …
    rest: u64,
    /// … and how many that will be the next time.
    patience: u64,
}

impl Packer {
    pub fn new(codec: Codec) -> Self {
        Self {
            codec,
            out: Vec::new(),
            table: lz4_flex::block::CompressTable::default(),
            zstd: None,
            rest: 0,
            patience: u64::from(MOST),
        }
    }

    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Of so many pages that come next, how many are to be stored as they are.
    pub fn unpacked(&mut self, pages: u64) -> u64 {
        let now = pages.min(self.rest);
        self.rest -= now;
        now
    }

    /// Packs pages into at most so many blocks, with zeros behind; `None` where that is not possible, or does
    /// not pay. Gives the bytes, and how many of them count.
    pub fn pack(&mut self, pages: &[u8], most_blocks: u64) -> Option<(&[u8], u32)> {
        let count = pages.len() / PAGE_SIZE;
        // At least an eighth, and a whole block.
        let pays = count.saturating_sub((count / 8).max(1));
        let len = self.compress(pages)?;
        if len == 0 || len > pays * PAGE_SIZE {
            self.rest = self.patience;
            self.patience = (self.patience * 2).min(PATIENCE);
            return None;
        }
        self.patience = u64::from(MOST);
        let padded = len.next_multiple_of(PAGE_SIZE);
        if padded as u64 / PAGE_SIZE as u64 > most_blocks {
            return None;
        }
        self.out.resize(padded.max(self.out.len()), 0);
        self.out[len..padded].fill(0);
        Some((&self.out[..padded], u32::try_from(len).ok()?))
    }

    fn compress(&mut self, pages: &[u8]) -> Option<usize> {
        let room = lz4_flex::block::get_maximum_output_size(pages.len());
        let room = room.max(zstd::zstd_safe::compress_bound(pages.len()));
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        match self.codec {
            Codec::Lz4 => {
                let Self { table, out, .. } = self;
                lz4_flex::block::compress_into_with_table(pages, out, table).ok()
            }
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                let zstd = self.zstd.as_mut()?;
                zstd.compress_to_buffer(pages, &mut self.out[..]).ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CODECS: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    /// Pages with this much noise in each.
    fn pages(count: usize, noise: usize, seed: u64) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bytes = vec![7; count * PAGE_SIZE];
        for page in bytes.chunks_mut(PAGE_SIZE) {
            random.fill(&mut page[..noise]);
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn what_was_packed_comes_back(count in 1usize..=16, noise in 0usize..=PAGE_SIZE, seed: u64) {
            let pages = pages(count, noise, seed);
            for codec in CODECS {
                let mut packer = Packer::new(codec);
                let Some((blocks, len)) = packer.pack(&pages, u64::MAX) else {
                    // A page alone saves nothing, nor does much noise; none packs well.
                    prop_assert!(count == 1 || noise > 2000);
                    continue;
                };
                let blocks = blocks.to_vec();
                prop_assert_eq!(blocks.len(), (len as usize).next_multiple_of(PAGE_SIZE));
                prop_assert!(blocks.len() < pages.len());
                prop_assert!(blocks[len as usize..].iter().all(|byte| *byte == 0));
                let mut out = vec![0; pages.len()];
                let mut unpacker = Unpacker::default();
                prop_assert!(unpacker.unpack(codec, &blocks[..len as usize], &mut out));
                prop_assert!(out == pages);
                // Neither more nor less room than they need.
                let mut out = vec![0; pages.len() + PAGE_SIZE];
                prop_assert!(!unpacker.unpack(codec, &blocks[..len as usize], &mut out));
                let mut out = vec![0; pages.len() - 1];
                prop_assert!(!unpacker.unpack(codec, &blocks[..len as usize], &mut out));
                prop_assert!(packer.pack(&pages, blocks.len() as u64 / 4096 - 1).is_none());
            }
        }

        #[test]
        fn whatever_the_bytes_say_nothing_but_the_pages_is_written(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            for codec in CODECS {
                let mut packer = Packer::new(codec);
                let pages = pages(5, 100, 3);
                let (blocks, len) = packer.pack(&pages, 5).expect("it packs well");
                let mut changed = blocks[..len as usize].to_vec();
                for (at, byte) in &changes {
                    *at.get_mut(&mut changed) = *byte;
                }
                for bytes in [&bytes, &changed] {
                    let mut unpacker = Unpacker::default();
                    let mut out = vec![0xee; 7 * PAGE_SIZE];
                    let _ = unpacker.unpack(codec, bytes, &mut out[PAGE_SIZE..6 * PAGE_SIZE]);
                    let beside = out[..PAGE_SIZE].iter().chain(&out[6 * PAGE_SIZE..]);
                    prop_assert!(beside.clone().all(|byte| *byte == 0xee));
                    // What it needs is as good as new for the next ones.
                    let (blocks, len) = packer.pack(&pages, 5).expect("it packs well");
                    let mut out = vec![0; pages.len()];
                    prop_assert!(unpacker.unpack(codec, &blocks[..len as usize], &mut out));
                    prop_assert!(out == pages);
                }
            }
        }
    }

    #[test]
    fn what_does_not_pack_is_tried_ever_more_seldom() {
        let (noise, text) = (pages(16, PAGE_SIZE, 1), pages(16, 0, 1));
        let mut packer = Packer::new(Codec::Lz4);
        let (mut pages, mut tried) = (0u64, 0);
        while pages < 100_000 {
            let plain = packer.unpacked(16);
            if plain == 0 {
                assert!(packer.pack(&noise, 16).is_none());
                tried += 1;
            }
            pages += 16;
        }
        assert!((20..40).contains(&tried), "{tried}");
        while packer.unpacked(16) > 0 {}
        assert!(packer.pack(&text, 16).is_some());
        assert_eq!(packer.unpacked(16), 0, "it pays again");
    }
}
