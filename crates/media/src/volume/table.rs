//! What a [`Volume`](super::Volume) knows of itself: names, and which blocks belong to each. Bytes and
//! space; pure.
//!
//! One record of 4096 bytes, numbers little-endian:
//! ```text
//!  0  "OUTLVOLM"         8  version u32 = 1      12  block size u32 = 4096
//! 16  uuid 16 bytes     32  sequence u64         40  blocks of the volume u64
//! 48  next identity u64 56  number of names u32  60  zeros
//! 64  for each name: identity u64, pieces u32, length of the name u32, name, then for each piece:
//!     first block u64, blocks u64
//! 4092  crc32c of where the record stands (u64) and of bytes 0..4092
//! ```

use crate::{BLOCK, MediumError};
use std::collections::BTreeMap;

const MAGIC: &[u8; 8] = b"OUTLVOLM";
const VERSION: u32 = 1;
const CRC_AT: usize = BLOCK - 4;
const ENTRIES_AT: usize = 64;
/// Bytes of an entry, without its name and its pieces.
const ENTRY: usize = 16;
/// Bytes of a piece.
const PIECE: usize = 16;
/// The most bytes of a name.
const NAME: usize = 64;

/// Blocks that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub first: u64,
    pub count: u64,
}

impl Piece {
    pub fn end(self) -> u64 {
        self.first + self.count
    }
}

/// A name's medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub identity: u64,
    pub pieces: Vec<Piece>,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub uuid: [u8; 16],
    pub sequence: u64,
    pub blocks: u64,
    pub next: u64,
    pub names: BTreeMap<String, Entry>,
}

/// What a place for a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A record.
    Table(Table),
    /// A record of a newer version.
    Newer(u32),
    /// Zeros.
    Empty,
    /// Anything else: another owner's bytes, or a record that is torn.
    Foreign,
}

fn sum(at: u64, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&at.to_le_bytes()), bytes)
}

/// Reads numbers one after the other, within bounds.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

impl Table {
    /// The record, to stand at `at`; `None` where it does not fit.
    pub fn encode(&self, at: u64) -> Option<[u8; BLOCK]> {
        let mut bytes = Vec::with_capacity(BLOCK);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(BLOCK as u32).to_le_bytes());
        bytes.extend_from_slice(&self.uuid);
        for number in [self.sequence, self.blocks, self.next] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&(self.names.len() as u32).to_le_bytes());
        bytes.resize(ENTRIES_AT, 0);
        for (name, entry) in &self.names {
            bytes.extend_from_slice(&entry.identity.to_le_bytes());
            bytes.extend_from_slice(&(entry.pieces.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
            bytes.extend_from_slice(name.as_bytes());
            for piece in &entry.pieces {
                bytes.extend_from_slice(&piece.first.to_le_bytes());
                bytes.extend_from_slice(&piece.count.to_le_bytes());
            }
        }
        if bytes.len() > CRC_AT {
            return None;
        }
        bytes.resize(CRC_AT, 0);
        bytes.extend_from_slice(&sum(at, &bytes).to_le_bytes());
        bytes.try_into().ok()
    }

    /// Whether it fits into a record, with so many more pieces.
    pub fn fits(&self, more: usize) -> bool {
        let entry =
            |(name, entry): (&String, &Entry)| ENTRY + name.len() + entry.pieces.len() * PIECE;
        let used: usize = self.names.iter().map(entry).sum();
        ENTRIES_AT + used + more * PIECE <= CRC_AT
    }

    /// Judges what stands at `at`; blocks below `reserved` can belong to nobody.
    pub fn decode(bytes: &[u8; BLOCK], at: u64, reserved: u64) -> Found {
        if bytes.iter().all(|b| *b == 0) {
            return Found::Empty;
        }
        let (body, crc) = bytes.split_at(CRC_AT);
        if crc != sum(at, body).to_le_bytes() || !body.starts_with(MAGIC) {
            return Found::Foreign;
        }
        let mut fields = Fields(&body[MAGIC.len()..]);
        match fields.u32() {
            Some(VERSION) => {}
            Some(newer) if newer > VERSION => return Found::Newer(newer),
            _ => return Found::Foreign,
        }
        match Self::fields(fields).filter(|table| table.is_sound(reserved)) {
            Some(table) => Found::Table(table),
            None => Found::Foreign,
        }
    }

    fn fields(mut fields: Fields<'_>) -> Option<Self> {
        if fields.u32()? != BLOCK as u32 {
            return None;
        }
        let uuid = fields.take(16)?.try_into().ok()?;
        let [sequence, blocks, next] = [fields.u64()?, fields.u64()?, fields.u64()?];
        let count = fields.u32()?;
        fields.take(4)?;
        let mut names = BTreeMap::new();
        for _ in 0..count {
            let identity = fields.u64()?;
            let (pieces, length) = (fields.u32()? as usize, fields.u32()? as usize);
            let name = std::str::from_utf8(fields.take(length)?).ok()?;
            let mut places = Fields(fields.take(pieces.checked_mul(PIECE)?)?);
            let mut piece = || {
                Some(Piece {
                    first: places.u64()?,
                    count: places.u64()?,
                })
            };
            let pieces = (0..pieces).map(|_| piece()).collect::<Option<_>>()?;
            let entry = Entry { identity, pieces };
            if !is_name(name) || names.insert(name.to_owned(), entry).is_some() {
                return None;
            }
        }
        Some(Self {
            uuid,
            sequence,
            blocks,
            next,
            names,
        })
    }

    /// Whether every block belongs to one medium at most and lies in the volume, and every identity
    /// is one medium's.
    fn is_sound(&self, reserved: u64) -> bool {
        let mut taken = Vec::new();
        let mut identities = Vec::new();
        for entry in self.names.values() {
            identities.push(entry.identity);
            for piece in &entry.pieces {
                let end = piece.first.checked_add(piece.count);
                let inside = end.is_some_and(|end| end <= self.blocks) && piece.first >= reserved;
                if piece.count == 0 || !inside {
                    return false;
                }
                taken.push((piece.first, piece.end()));
            }
        }
        taken.sort_unstable();
        identities.sort_unstable();
        self.blocks <= u64::MAX / BLOCK as u64
            && identities.iter().all(|identity| *identity < self.next)
            && identities.windows(2).all(|two| two[0] != two[1])
            && taken.windows(2).all(|two| two[0].1 <= two[1].0)
    }

    /// What belongs to nobody: first blocks, and how many.
    pub fn unused(&self, reserved: u64) -> BTreeMap<u64, u64> {
        let entries = self.names.values();
        let mut taken: Vec<Piece> = entries.flat_map(|e| e.pieces.iter().copied()).collect();
        taken.sort_unstable_by_key(|piece| piece.first);
        let (mut unused, mut at) = (BTreeMap::new(), reserved);
        for piece in taken {
            if piece.first > at {
                unused.insert(at, piece.first - at);
            }
            at = piece.end();
        }
        if self.blocks > at {
            unused.insert(at, self.blocks - at);
        }
        unused
    }
}

/// Whether a medium can be called so.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME && !name.contains(['/', '\0'])
}

/// Refuses what cannot be the name of a medium.
pub(super) fn check_name(place: &str, name: &str) -> Result<(), MediumError> {
    if is_name(name) {
        return Ok(());
    }
    Err(MediumError::Misuse {
        place: place.to_owned(),
        what: "a name in a volume has 1 to 64 bytes, and no slash",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESERVED: u64 = 64;

    fn piece(first: u64, count: u64) -> Piece {
        Piece { first, count }
    }

    fn table() -> Table {
        let entry = |identity, pieces: &[Piece]| Entry {
            identity,
            pieces: pieces.to_vec(),
        };
        let names = [
            ("a".to_owned(), entry(1, &[piece(70, 10), piece(64, 2)])),
            ("b".to_owned(), entry(3, &[])),
            ("c".to_owned(), entry(2, &[piece(80, 20)])),
        ];
        Table {
            uuid: [9; 16],
            sequence: 5,
            blocks: 110,
            next: 4,
            names: names.into(),
        }
    }

    #[test]
    fn a_record_comes_back_and_only_where_it_belongs() {
        let bytes = table().encode(4096).unwrap();
        assert_eq!(Table::decode(&bytes, 4096, RESERVED), Found::Table(table()));
        assert_eq!(Table::decode(&bytes, 0, RESERVED), Found::Foreign);
        assert_eq!(Table::decode(&[0; BLOCK], 0, RESERVED), Found::Empty);
        for at in (0..BLOCK).step_by(7) {
            let mut harmed = bytes;
            harmed[at] ^= 1;
            assert_eq!(
                Table::decode(&harmed, 4096, RESERVED),
                Found::Foreign,
                "byte {at}"
            );
        }
        assert_eq!(table().unused(RESERVED), [(66, 4), (100, 10)].into());
    }

    #[test]
    fn a_newer_version_is_known_by_its_number() {
        let mut bytes = table().encode(0).unwrap();
        bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
        let crc = sum(0, &bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Table::decode(&bytes, 0, RESERVED), Found::Newer(7));
    }

    /// With a right checksum.
    #[test]
    fn a_record_that_makes_no_sense_is_none() {
        type Harm = fn(&mut Table);
        let harms: [Harm; 6] = [
            |t| t.blocks = 99,
            |t| t.blocks = u64::MAX,
            |t| t.next = 3,
            |t| t.names.get_mut("b").unwrap().identity = 1,
            |t| t.names.get_mut("b").unwrap().pieces.push(piece(79, 1)),
            |t| t.names.get_mut("b").unwrap().pieces.push(piece(63, 1)),
        ];
        for (n, harm) in harms.into_iter().enumerate() {
            let mut table = table();
            harm(&mut table);
            let bytes = table.encode(0).unwrap();
            assert_eq!(
                Table::decode(&bytes, 0, RESERVED),
                Found::Foreign,
                "harm {n}"
            );
        }
        let mut bytes = table().encode(0).unwrap();
        bytes[ENTRIES_AT + 8..ENTRIES_AT + 12].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = sum(0, &bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Table::decode(&bytes, 0, RESERVED), Found::Foreign);
    }

    #[test]
    fn what_does_not_fit_is_known_before_it_is_written() {
        let mut table = table();
        table.blocks = u64::MAX / BLOCK as u64;
        let mut at = 1000;
        while table.fits(1) {
            table.names.get_mut("b").unwrap().pieces.push(piece(at, 1));
            assert!(table.encode(0).is_some());
            at += 2;
        }
        table.names.get_mut("b").unwrap().pieces.push(piece(at, 1));
        assert!(table.encode(0).is_none());
    }
}
