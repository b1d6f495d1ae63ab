//! The description of one pushed epoch: what it consists of, by the hashes of its pieces.
//!
//! # Invariants
//! - Equal epochs that were pushed after the same one have equal descriptions, byte for byte.
//! - A description that was decoded is in order: windows ascend and each is as long as its pages,
//!   runs are runs, and nothing is larger than its bound.

use outlive_epoch::{EpochFacts, PAGE_SIZE, Run, SpaceId};
use std::fmt;

/// Most bytes of a description.
pub const LARGEST_MANIFEST: u64 = 512 << 20;
/// Pages of one window: what is hashed together, and travels together.
pub const WINDOW: u64 = 256;
/// Most bytes of a chunk.
pub const LARGEST_CHUNK: u64 = WINDOW * PAGE_SIZE as u64;

const MAGIC: &[u8; 8] = b"OUTLIVEm";
/// Version that is written, and the newest that is read.
pub const VERSION: u32 = 1;
/// Most bytes of the trees of an epoch.
const TREES: u64 = 1 << 30;

/// The BLAKE3 hash of some bytes; names them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The hash that was written as 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        let lower = digits
            .iter()
            .all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f'));
        if digits.len() != 64 || !lower {
            return None;
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(hash))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Bytes that are stored under their hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub hash: Hash,
    pub len: u32,
}

/// The pages with contents in one window of a space, one after the other in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub space: SpaceId,
    /// The first page divided by [`WINDOW`].
    pub index: u64,
    /// Which pages of the window have contents, a bit each.
    pub pages: [u8; WINDOW as usize / 8],
    pub hash: Hash,
}

impl Window {
    /// Number of pages with contents.
    pub fn count(&self) -> u64 {
        let ones = self.pages.iter().map(|byte| u64::from(byte.count_ones()));
        ones.sum()
    }

    pub fn piece(&self) -> Piece {
        let len = self.count() * PAGE_SIZE as u64;
        Piece {
            hash: self.hash,
            len: len as u32,
        }
    }

    /// The runs of its pages, in order.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let first = self.index * WINDOW;
        for bit in (0..WINDOW).filter(|bit| self.has(*bit)) {
            let page = Run::new(self.space, first + bit, 1);
            let joined = runs.last().filter(|last| last.end() == first + bit);
            let joined =
                joined.and_then(|last| Run::new(self.space, last.first(), last.count() + 1));
            if joined.is_some() {
                runs.pop();
            }
            runs.extend(joined.or(page));
        }
        runs
    }

    pub fn has(&self, bit: u64) -> bool {
        self.pages[(bit / 8) as usize] & (1 << (bit % 8)) != 0
    }

    pub fn mark(&mut self, bit: u64) {
        self.pages[(bit / 8) as usize] |= 1 << (bit % 8);
    }
}

/// One pushed epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    pub epoch: u64,
    pub facts: EpochFacts,
    /// What is known of the subject besides its epochs.
    pub about: Vec<u8>,
    /// Names of groups, sorted, and the pieces of their trees.
    pub groups: Vec<(String, Vec<Piece>)>,
    pub zero: Vec<Run>,
    /// In the order of space and index.
    pub windows: Vec<Window>,
}

impl Manifest {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        let numbers = [self.epoch, self.facts.taken_at_ns, self.facts.stop_us];
        numbers.iter().for_each(|n| put(&mut out, *n));
        put(&mut out, self.about.len() as u64);
        out.extend_from_slice(&self.about);
        put(&mut out, self.groups.len() as u64);
        for (name, pieces) in &self.groups {
            put(&mut out, name.len() as u64);
            out.extend_from_slice(name.as_bytes());
            put(&mut out, pieces.len() as u64);
            for piece in pieces {
                out.extend_from_slice(&piece.hash.0);
                out.extend_from_slice(&piece.len.to_le_bytes());
            }
        }
        put(&mut out, self.zero.len() as u64);
        for run in &self.zero {
            put(&mut out, run.first());
            put(&mut out, run.count());
            out.extend_from_slice(&run.space().0.to_le_bytes());
        }
        put(&mut out, self.windows.len() as u64);
        for window in &self.windows {
            out.extend_from_slice(&window.space.0.to_le_bytes());
            put(&mut out, window.index);
            out.extend_from_slice(&window.pages);
            out.extend_from_slice(&window.hash.0);
        }
        out
    }

    /// Reads one.
    ///
    /// # Errors
    /// The version, where it is a newer one; `None` where it is not in order.
    pub fn decode(bytes: &[u8]) -> Result<Self, Option<u32>> {
        let mut take = Take(bytes);
        if take.bytes(8).ok_or(None)? != MAGIC {
            return Err(None);
        }
        match take.u32().ok_or(None)? {
            VERSION => {}
            found if found > VERSION => return Err(Some(found)),
            _ => return Err(None),
        }
        let manifest = Self::fields(&mut take).ok_or(None)?;
        if !take.0.is_empty() || !manifest.is_sane() {
            return Err(None);
        }
        Ok(manifest)
    }

    fn fields(take: &mut Take<'_>) -> Option<Self> {
        let (epoch, taken_at_ns, stop_us) = (take.u64()?, take.u64()?, take.u64()?);
        let about = take.counted(1)?;
        let about = take.bytes(about)?.to_vec();
        let mut groups = Vec::new();
        for _ in 0..take.counted(16)? {
            let len = take.counted(1)?;
            let name = std::str::from_utf8(take.bytes(len)?).ok()?.to_owned();
            let mut pieces = Vec::new();
            for _ in 0..take.counted(36)? {
                let (hash, len) = (Hash(take.array()?), take.u32()?);
                pieces.push(Piece { hash, len });
            }
            groups.push((name, pieces));
        }
        let mut zero = Vec::new();
        for _ in 0..take.counted(20)? {
            let (first, count, space) = (take.u64()?, take.u64()?, take.u32()?);
            zero.push(Run::new(SpaceId(space), first, count)?);
        }
        let mut windows = Vec::new();
        for _ in 0..take.counted(76)? {
            windows.push(Window {
                space: SpaceId(take.u32()?),
                index: take.u64()?,
                pages: take.array()?,
                hash: Hash(take.array()?),
            });
        }
        let facts = EpochFacts {
            taken_at_ns,
            stop_us,
        };
        Some(Self {
            epoch,
            facts,
            about,
            groups,
            zero,
            windows,
        })
    }

    fn is_sane(&self) -> bool {
        let numbered = self.epoch > 0 && self.epoch < u64::MAX;
        let sorted = self.groups.is_sorted_by(|a, b| a.0 < b.0);
        let pieces = self.groups.iter().flat_map(|(_, pieces)| pieces);
        let lens = pieces.map(|piece| u64::from(piece.len));
        let bounded = lens.clone().all(|len| len <= LARGEST_CHUNK) && lens.sum::<u64>() <= TREES;
        let key = |window: &Window| (window.space, window.index);
        let windows = &self.windows;
        let ascend = windows.is_sorted_by(|a, b| key(a) < key(b));
        let inside = |window: &Window| {
            let first = window.index.checked_mul(WINDOW);
            let run = first.and_then(|first| Run::new(window.space, first, WINDOW));
            run.is_some() && window.count() > 0
        };
        numbered && sorted && bounded && ascend && windows.iter().all(inside)
    }

    /// All pieces that it consists of.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let trees = self.groups.iter().flat_map(|(_, pieces)| pieces.iter());
        let windows = self.windows.iter().map(Window::piece);
        trees.copied().chain(windows)
    }
}

fn put(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

struct Take<'a>(&'a [u8]);

impl<'a> Take<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things of at least so many bytes each, for which there is room.
    fn counted(&mut self, each: usize) -> Option<usize> {
        let count = usize::try_from(self.u64()?).ok()?;
        (count.checked_mul(each)? <= self.0.len()).then_some(count)
    }
}
