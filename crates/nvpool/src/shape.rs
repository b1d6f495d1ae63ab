//! The superblock: where the parts of a pool lie. Numbers are little-endian.
//!
//! ```text
//! block 0   1     2                    2 + 2(1 + J)         + T
//!     +-----+-----+----------+---------+--------------------+-----------------
//!     | A   | B   | journal, half 0, 1 | tables (a heap)    | pages given away
//!     +-----+-----+----------+---------+--------------------+-----------------
//! ```
//! Pages are counted from the beginning of the medium, so that a page which is aligned there is aligned
//! in the pool. The superblock is written once, last of all, when the pool is made, in two copies.

use crate::error::Error;
use crate::ledger::MAX_PIECES;
use crate::refused::Refused;
use crate::run::{PAGE, Run};
use outlive_media::{BLOCK, Medium, MediumError};

const MAGIC: [u8; 8] = *b"OUTLPOOL";
const VERSION: u32 = 1;
/// Bytes of a superblock before its checksum.
const LEN: usize = 56;

/// Sizes of the parts of a pool, in pages of 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of the medium.
    pub pages: u64,
    /// Pages that one record of the journal holds, at most 1000.
    pub journal: u32,
    /// Of the tables.
    pub tables: u32,
    /// Of a zone of the heap that the tables are.
    pub zone: u32,
    /// Of each half of that heap's log.
    pub log: u32,
}

impl Shape {
    /// What suits a medium of `len` bytes: 1/64 of it for the tables, between 1 and 64 MiB.
    #[must_use]
    pub fn of(len: u64) -> Self {
        let pages = len / PAGE;
        let tables = u32::try_from(pages / 64)
            .unwrap_or(u32::MAX)
            .clamp(256, 16_384);
        // A heap's zone of 1024 pages and more survives the loss of any one page.
        let (zone, log) = if tables < 4096 { (64, 16) } else { (1024, 64) };
        Self {
            pages,
            journal: 128,
            tables,
            zone,
            log,
        }
    }

    /// Pages before the tables.
    fn front(&self) -> u64 {
        2 + 2 * (1 + u64::from(self.journal))
    }

    /// Where a half of the journal begins, in bytes.
    pub(crate) fn journal_at(&self, half: u64) -> u64 {
        (2 + half * (1 + u64::from(self.journal))) * PAGE
    }

    /// Where the tables begin, in bytes.
    pub(crate) fn tables_at(&self) -> u64 {
        self.front() * PAGE
    }

    /// The pages that can be given away.
    ///
    /// # Errors
    /// [`Refused::TooSmall`]
    pub fn space(&self) -> Result<Run, Refused> {
        let start = self.front() + u64::from(self.tables);
        let len = self.pages.checked_sub(start).filter(|len| *len > 0);
        len.map(|len| Run::new(start, len))
            .ok_or(Refused::TooSmall {
                len: self.pages.saturating_mul(PAGE),
                least: (start + 1) * PAGE,
            })
    }

    /// Most pieces of an owner: of the 53 lines that a transaction may change for each page of the log, a piece
    /// takes about two at worst.
    pub(crate) fn most_pieces(&self) -> usize {
        MAX_PIECES.min(self.log as usize * 16)
    }

    /// Whether a page of the tables is one of the heap's log.
    pub(crate) fn is_log(&self, page: usize) -> bool {
        // Before it are two superblocks and two schemas of two pages.
        (6..6 + 2 * self.log as usize).contains(&page)
    }

    fn sound(&self) -> bool {
        (1..=1000).contains(&self.journal)
            && (16..=1 << 16).contains(&self.tables)
            && (16..=4096).contains(&self.zone)
            && (1..=1024).contains(&self.log)
            && self.pages <= i64::MAX as u64 / PAGE
            && self.space().is_ok()
    }
}

/// A pool's identity and shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Super {
    pub id: [u8; 16],
    pub shape: Shape,
}

impl Super {
    fn to_block(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            block[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&self.shape.journal.to_le_bytes());
        put(&self.id);
        put(&self.shape.pages.to_le_bytes());
        put(&self.shape.tables.to_le_bytes());
        put(&self.shape.zone.to_le_bytes());
        put(&self.shape.log.to_le_bytes());
        put(&[0; 4]);
        let sum = crc32c::crc32c(&block[..LEN]);
        block[LEN..LEN + 4].copy_from_slice(&sum.to_le_bytes());
        block
    }

    /// What a block says; `None` where it is no superblock, or a damaged one.
    fn from_block(block: &[u8]) -> Option<Self> {
        let four = |at: usize| {
            block
                .get(at..at + 4)?
                .try_into()
                .ok()
                .map(u32::from_le_bytes)
        };
        let whole = block.starts_with(&MAGIC) && four(LEN)? == crc32c::crc32c(block.get(..LEN)?);
        let shape = Shape {
            journal: four(12)?,
            pages: u64::from_le_bytes(block.get(32..40)?.try_into().ok()?),
            tables: four(40)?,
            zone: four(44)?,
            log: four(48)?,
        };
        let id = block.get(16..32)?.try_into().ok()?;
        (whole && four(8)? == VERSION && shape.sound()).then_some(Self { id, shape })
    }

    /// Writes both copies, one after the other; durable when this returns.
    pub fn write(self, medium: &dyn Medium) -> Result<(), Error> {
        for copy in 0..2 {
            medium.write(copy * PAGE, &self.to_block())?;
            medium.flush()?;
        }
        Ok(())
    }

    /// Makes a medium one without a pool.
    pub fn erase(medium: &dyn Medium) -> Result<(), Error> {
        medium.write(0, &[0; 2 * BLOCK])?;
        medium.flush()?;
        Ok(())
    }

    /// The pool on a medium, and whether both copies say so.
    pub fn find(medium: &dyn Medium) -> Result<(Self, bool), Error> {
        let place = medium.place();
        let len = medium.geometry()?.len;
        let no = |what| Error::NoPool {
            place: place.clone(),
            what,
        };
        if len < 2 * PAGE {
            return Err(no("it is too small"));
        }
        let mut bytes = vec![0; 2 * BLOCK];
        let mut unreadable = None;
        for (at, block) in [0, PAGE].into_iter().zip(bytes.chunks_exact_mut(BLOCK)) {
            match medium.read(at, block) {
                Err(error @ MediumError::Io { .. }) => {
                    block.fill(0);
                    unreadable = Some(error);
                }
                done => done?,
            }
        }
        let (a, b) = bytes.split_at(BLOCK);
        let found = match (Self::from_block(a), Self::from_block(b), unreadable) {
            (Some(found), other, _) => (found, other == Some(found)),
            (None, Some(found), _) => (found, false),
            (None, None, Some(error)) => return Err(error.into()),
            (None, None, None) if a.starts_with(&MAGIC) || b.starts_with(&MAGIC) => {
                let what = "its superblock, in both copies, or it is of another version".to_owned();
                return Err(Error::Damaged { place, what });
            }
            (None, None, None) => return Err(no("`outlive pool create` makes one")),
        };
        if found.0.shape.pages > len / PAGE {
            let what = format!("it had {} bytes and has {len}", found.0.shape.pages * PAGE);
            return Err(Error::Damaged { place, what });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outlive_media::SimDisk;

    #[test]
    fn one_copy_is_enough_and_no_flipped_bit_is_believed() {
        let disk = SimDisk::new();
        let medium = outlive_media::Directory::create(&disk.directory(), "pool").unwrap();
        medium.reserve(8 << 20).unwrap();
        let shape = Shape::of(8 << 20);
        let made = Super { id: [7; 16], shape };
        made.write(&*medium).unwrap();
        assert_eq!(Super::find(&*medium).unwrap(), (made, true));
        let whole = made.to_block();
        for bit in 0..(LEN + 4) * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Super::from_block(&flipped), None, "bit {bit}");
            medium.write(0, &flipped).unwrap();
            assert_eq!(Super::find(&*medium).unwrap(), (made, false));
        }
        medium.write(PAGE, &[0; BLOCK]).unwrap();
        assert!(matches!(Super::find(&*medium), Err(Error::Damaged { .. })));
        Super::erase(&*medium).unwrap();
        assert!(matches!(Super::find(&*medium), Err(Error::NoPool { .. })));
        made.write(&*medium).unwrap();
        medium.truncate(4 << 20).unwrap();
        assert!(matches!(Super::find(&*medium), Err(Error::Damaged { .. })));
    }

    #[test]
    fn shapes_fit_their_media() {
        for len in [4 << 20, 64 << 20, 1 << 30, 1 << 40] {
            let shape = Shape::of(len);
            assert!(shape.sound(), "{shape:?}");
            assert!(len < 64 << 20 || shape.space().unwrap().start * PAGE < len / 16);
        }
        assert!(matches!(
            Shape::of(1 << 20).space(),
            Err(Refused::TooSmall { .. })
        ));
    }
}
