//! The bytes of a generation file: layout, checksums, and the conversion of each record.
//!
//! # Rules
//! - All numbers are little-endian. `docs/epoch-store.md` draws every record.
//! - Every record and every page has a CRC32C that starts from the identity of the file, the kind
//!   of the record, its epoch and its offset: what was copied to another place, or is left over
//!   from another file or epoch, does not pass.
//! - Decoding trusts nothing: a record that passes its checksum may still be made by an enemy,
//!   so every number is checked against the bounds that hold at its place, and nothing is
//!   allocated beyond the bytes that are there.

use crate::cipher::{Attempt, FileCipher, Fingerprint, Tag, same};
use crate::index::Counts;
use crate::pack::MOST;
use crate::planted::bug;
use crate::stripe::{Layout, WIDTH};
use outlive_epoch::EpochFacts;
use outlive_media::{BLOCK, SECTOR};

/// The newest version of the format that this code reads, and the one that it writes.
pub const VERSION: u32 = 1;
/// A block, as a file offset.
pub const BLOCK_LEN: u64 = BLOCK as u64;
/// Where the second part of the header begins: so far away that no damage of a repairable length
/// harms both.
const SECOND: u64 = 20 * BLOCK_LEN;
/// Where the two copies of the superblock stand.
pub const SUPERBLOCK_AT: [u64; 2] = [0, SECOND];
/// Where the two commit slots stand, each twice; epoch `e` uses the slot `e % 2`.
pub const SLOT_AT: [[u64; 2]; 2] = [
    [BLOCK_LEN, SECOND + BLOCK_LEN],
    [2 * BLOCK_LEN, SECOND + 2 * BLOCK_LEN],
];
/// Where the two copies of the seal stand: what is acknowledged, and which commit may follow.
pub const SEAL_AT: [u64; 2] = [3 * BLOCK_LEN, SECOND + 3 * BLOCK_LEN];
/// Where the log begins.
pub const LOG_AT: u64 = SECOND + 4 * BLOCK_LEN;
/// The longest name of a group, in bytes.
pub const NAME_MAX: usize = 1024;

const SUPERBLOCK_MAGIC: &[u8; 8] = b"OUTLIVES";
const STAMP_MAGIC: &[u8; 8] = b"OLCOMMIT";
const TRAILER_MAGIC: &[u8; 8] = b"OLTRAILR";
/// Bytes of one index entry.
pub const ENTRY_LEN: usize = 32;

/// What a checksum belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Page = 1,
    Tree = 2,
    Groups = 3,
    Index = 4,
    Trailer = 5,
    Stamp = 6,
    Parity = 7,
    /// The pages that a cluster holds, as they were before they were packed.
    Contents = 8,
}

/// The identity of a file, from which all its checksums start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u32);

impl Key {
    /// The start of the checksums of one kind in one epoch.
    pub fn of(self, kind: Kind, epoch: u64) -> Seed {
        let crc = crc32c::crc32c_append(self.0, &[kind as u8]);
        Seed(crc32c::crc32c_append(crc, &epoch.to_le_bytes()))
    }
}

/// The start of the checksums of one kind in one epoch.
#[derive(Clone, Copy, Debug)]
pub struct Seed(u32);

impl Seed {
    /// The checksum of `bytes` that stand at `offset`.
    pub fn crc(self, offset: u64, bytes: &[u8]) -> u32 {
        let offset = if bug("places not told apart") {
            0
        } else {
            offset
        };
        crc32c::crc32c_append(crc32c::crc32c_append(self.0, &offset.to_le_bytes()), bytes)
    }

    /// Puts the checksum of all but the last four bytes into the last four.
    fn seal(self, offset: u64, bytes: &mut [u8]) {
        if let Some((body, crc)) = bytes.split_last_chunk_mut::<4>() {
            *crc = self.crc(offset, body).to_le_bytes();
        }
    }

    fn is_sealed(self, offset: u64, bytes: &[u8]) -> bool {
        let split = bytes.split_last_chunk::<4>();
        split.is_some_and(|(body, crc)| {
            *crc == self.crc(offset, body).to_le_bytes() || bug("records not checked")
        })
    }
}

/// Takes numbers off the front of bytes; `None` where there are too few.
pub struct Take<'a>(pub &'a [u8]);

impl<'a> Take<'a> {
    pub fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

pub fn put_numbers(out: &mut Vec<u8>, numbers: &[u64]) {
    numbers
        .iter()
        .for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
}

/// What a superblock says, or why it says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuperblockRead {
    Good(Superblock),
    Newer(u32),
    Bad,
}

/// Names a generation file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub uuid: [u8; 16],
    pub generation: u64,
    /// The epoch on which all others of this file rest.
    pub first_epoch: u64,
    /// What the file is encrypted with, if it is.
    pub lock: Option<FileLock>,
}

/// What an encrypted file says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLock {
    /// That of the user's key.
    pub fingerprint: Fingerprint,
    /// At random: no two files have the same keys.
    pub salt: [u8; 32],
    /// Over all that the superblock says.
    pub tag: Tag,
}

/// The number of AES-256-GCM with keys derived by BLAKE3.
const AES_256_GCM: u32 = 1;
/// Where the tag of a superblock stands, behind what it covers.
const SUPERBLOCK_TAG_AT: usize = 96;

impl Superblock {
    pub fn key(&self) -> Key {
        let uuid = if bug("files not told apart") {
            [0; 16]
        } else {
            self.uuid
        };
        let crc = crc32c::crc32c(&uuid);
        Key(crc32c::crc32c_append(crc, &self.generation.to_le_bytes()))
    }

    fn seed() -> Seed {
        Seed(crc32c::crc32c(SUPERBLOCK_MAGIC))
    }

    pub fn encode(&self, offset: u64) -> Vec<u8> {
        let mut out = SUPERBLOCK_MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(BLOCK as u32).to_le_bytes());
        out.extend_from_slice(&self.uuid);
        put_numbers(&mut out, &[self.generation, self.first_epoch]);
        if let Some(lock) = &self.lock {
            out.extend_from_slice(&AES_256_GCM.to_le_bytes());
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&lock.fingerprint.0);
            out.extend_from_slice(&lock.salt);
            out.extend_from_slice(&lock.tag);
        }
        out.resize(BLOCK, 0);
        Self::seed().seal(offset, &mut out);
        out
    }

    /// The tag that an encrypted file must have, with these keys.
    pub fn tag(&self, cipher: &FileCipher) -> Tag {
        cipher.superblock_tag(&self.encode(0)[..SUPERBLOCK_TAG_AT])
    }

    /// The place of the checksum and of the version stay the same in every version.
    pub fn decode(offset: u64, block: &[u8]) -> SuperblockRead {
        if !Self::seed().is_sealed(offset, block) {
            return SuperblockRead::Bad;
        }
        Self::fields(block).unwrap_or(SuperblockRead::Bad)
    }

    fn fields(block: &[u8]) -> Option<SuperblockRead> {
        let mut take = Take(block);
        if take.bytes(8)? != SUPERBLOCK_MAGIC {
            return None;
        }
        let version = take.u32()?;
        if version > VERSION && !bug("newer version read") {
            return Some(SuperblockRead::Newer(version));
        }
        let block_len = take.u32()?;
        let uuid = take.array()?;
        let (generation, first_epoch) = (take.u64()?, take.u64()?);
        let (cipher, _) = (take.u32()?, take.u32()?);
        let lock = FileLock {
            fingerprint: Fingerprint(take.array()?),
            salt: take.array()?,
            tag: take.array()?,
        };
        let known = cipher == 0 || cipher == AES_256_GCM;
        let good = version == VERSION && block_len as usize == BLOCK && first_epoch > 0 && known;
        good.then_some(SuperblockRead::Good(Self {
            uuid,
            generation,
            first_epoch,
            lock: (cipher == AES_256_GCM).then_some(lock),
        }))
    }
}

/// The commit record: an epoch, and where its trailer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub epoch: u64,
    pub trailer: Twice,
    /// From the beginning of the epoch to its acknowledgement; 0 where not known (always in a
    /// slot, which is written before).
    pub durable_us: u64,
}

impl Record {
    /// One past the last byte of the epoch.
    pub fn log_end(&self) -> u64 {
        self.trailer.copy_at.saturating_add(BLOCK_LEN)
    }

    /// Nothing where the numbers are those of no epoch; `None` where they are in no order.
    fn take(take: &mut Take<'_>) -> Option<Option<Self>> {
        let record = Self {
            epoch: take.u64()?,
            trailer: Twice::take(take)?,
            durable_us: take.u64()?,
        };
        let nothing = record.epoch == 0 && record.trailer == Twice::NONE;
        match record.epoch > 0 && record.trailer.is_placed() {
            true => Some(Some(record)),
            false => nothing.then_some(None),
        }
    }

    fn numbers(record: Option<Self>) -> [u64; 5] {
        let none = Self {
            epoch: 0,
            trailer: Twice::NONE,
            durable_us: 0,
        };
        let record = record.unwrap_or(none);
        let [at, copy_at, crc] = record.trailer.numbers();
        [record.epoch, at, copy_at, crc, record.durable_us]
    }
}

/// What a block of the header says of epochs: that of a slot names the newest one, or none before
/// its first use; that of the seal also names the one whose commit may follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    pub newest: Option<Record>,
    pub coming: Option<Record>,
}

/// Which slot a block is of, or 2 for the seal. What one of them says is not to be said by another: the newest epoch
/// could be made forgotten by putting what its neighbour says into its slot.
fn whose(offset: u64) -> u64 {
    let slot = |n: usize| SLOT_AT[n].contains(&offset);
    match (slot(0), slot(1)) {
        _ if bug("slots not told apart") => 0,
        (true, _) => 0,
        (_, true) => 1,
        _ => 2,
    }
}

/// Where the tag of a stamp stands in its sector, behind what it covers.
const STAMP_TAG_AT: usize = 120;

/// Copies of a stamp in its block: one in each sector.
pub const STAMP_COPIES: usize = BLOCK / SECTOR;

impl Stamp {
    /// No epoch above this one was committed while this was what the seal said.
    pub fn limit(&self) -> u64 {
        let epoch = |record: Option<Record>| record.map_or(0, |record| record.epoch);
        epoch(self.newest).max(epoch(self.coming))
    }

    /// A block that holds the stamp once in each sector, each bound to its place; of an encrypted file with a
    /// tag.
    pub fn encode(&self, key: Key, cipher: Option<&FileCipher>, offset: u64) -> Vec<u8> {
        let trailer_tag = |record: Option<Record>| record.map_or([0; 16], |r| r.trailer.tag);
        let mut out = Vec::with_capacity(BLOCK);
        for i in 0..STAMP_COPIES {
            let mut sector = STAMP_MAGIC.to_vec();
            put_numbers(&mut sector, &Record::numbers(self.newest));
            put_numbers(&mut sector, &Record::numbers(self.coming));
            sector.extend_from_slice(&trailer_tag(self.newest));
            sector.extend_from_slice(&trailer_tag(self.coming));
            if let Some(cipher) = cipher {
                let tag = cipher.stamp_tag(whose(offset), &sector);
                sector.extend_from_slice(&tag);
            }
            sector.resize(SECTOR, 0);
            key.of(Kind::Stamp, 0)
                .seal(offset + (i * SECTOR) as u64, &mut sector);
            out.append(&mut sector);
        }
        out
    }

    /// All that the good sectors of a block say, one for each. With the keys of an encrypted file, a sector without
    /// its tag is not good.
    pub fn decode(key: Key, cipher: Option<&FileCipher>, offset: u64, block: &[u8]) -> Vec<Self> {
        let seed = key.of(Kind::Stamp, 0);
        let tagged = |sector: &[u8]| {
            let split = sector.split_at_checked(STAMP_TAG_AT);
            let split = split.and_then(|(said, rest)| Some((said, rest.first_chunk()?)));
            cipher.is_none_or(|cipher| {
                split.is_some_and(|(said, tag)| same(&cipher.stamp_tag(whose(offset), said), tag))
            })
        };
        let good = block.chunks(SECTOR).enumerate().filter_map(|(i, sector)| {
            let intact = seed.is_sealed(offset + (i * SECTOR) as u64, sector) && tagged(sector);
            intact.then(|| Self::fields(sector)).flatten()
        });
        good.collect()
    }

    fn fields(sector: &[u8]) -> Option<Self> {
        let mut take = Take(sector);
        if take.bytes(8)? != STAMP_MAGIC {
            return None;
        }
        let mut stamp = Self {
            newest: Record::take(&mut take)?,
            coming: Record::take(&mut take)?,
        };
        for record in [&mut stamp.newest, &mut stamp.coming] {
            let tag = take.array()?;
            if let Some(record) = record {
                record.trailer.tag = tag;
            }
        }
        let follows = |next: Record| stamp.newest.is_none_or(|newest| newest.epoch < next.epoch);
        stamp.coming.is_none_or(follows).then_some(stamp)
    }
}

/// The two places of a trailer, where the bytes are the same, and the checksum and tag that it must have: so
/// what leads to a trailer leads to exactly this one, and not to that of another attempt which stood
/// at the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Twice {
    pub at: u64,
    pub copy_at: u64,
    pub crc: u32,
    /// Zeros in a file that is not encrypted.
    pub tag: Tag,
}

impl Twice {
    /// Of the epoch before the first one.
    pub const NONE: Self = Self {
        at: 0,
        copy_at: 0,
        crc: 0,
        tag: [0; 16],
    };

    /// In the log, the copy so far behind that no damage of a repairable length harms both.
    fn is_placed(self) -> bool {
        let apart = self.copy_at.checked_sub(self.at);
        self.at >= LOG_AT
            && self.at.is_multiple_of(BLOCK_LEN)
            && self.copy_at.is_multiple_of(BLOCK_LEN)
            && self.copy_at < 1 << 62
            && apart.is_some_and(|apart| apart >= WIDTH * BLOCK_LEN)
    }

    fn numbers(self) -> [u64; 3] {
        [self.at, self.copy_at, u64::from(self.crc)]
    }

    fn take(take: &mut Take<'_>) -> Option<Self> {
        Some(Self {
            at: take.u64()?,
            copy_at: take.u64()?,
            crc: u32::try_from(take.u64()?).ok()?,
            tag: [0; 16],
        })
    }
}

/// A piece of the log with its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    pub at: u64,
    pub len: u64,
    pub crc: u32,
}

/// The last block of an epoch: what it consists of, and which epoch is before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub epoch: u64,
    /// Where the trailer of the epoch before stands; nowhere for the first of the file.
    pub previous: Twice,
    /// Where the second copy of this trailer stands.
    pub copy_at: u64,
    /// Where the bytes of this epoch begin.
    pub start: u64,
    /// Where the parity of the last stripe of pages begins; 0 where that has its own.
    pub parity_at: u64,
    pub groups: Section,
    pub index: Section,
    /// Entries in the index; the rest of it are checksums of pages and of their parity.
    pub entries: u64,
    pub facts: EpochFacts,
    /// Pages stored.
    pub pages: u64,
    /// Blocks that packing the pages saved: so many fewer than pages stand in the log.
    pub saved: u64,
    /// Clusters of packed pages.
    pub clusters: u64,
    pub bytes_written: u64,
    /// What the epoch before took until it was acknowledged; 0 where not known.
    pub previous_durable_us: u64,
    /// How many numbers lie between the epoch before and this one: of epochs that were left out when
    /// this file was written from another one.
    pub skipped: u64,
    /// Zeros in a file that is not encrypted.
    pub lock: EpochLock,
}

/// What the trailer of an encrypted epoch says of its keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EpochLock {
    /// At random: leads to the keys of this attempt to write the epoch.
    pub attempt: Attempt,
    /// Over the page index.
    pub index: Tag,
    /// Over all that the trailer says.
    pub own: Tag,
}

/// Where the tag of a trailer stands, behind what it covers.
const TRAILER_TAG_AT: usize = 232;

impl Trailer {
    pub fn encode(&self, key: Key, at: u64) -> Vec<u8> {
        let mut out = TRAILER_MAGIC.to_vec();
        let section = |s: &Section| [s.at, s.len, u64::from(s.crc)];
        put_numbers(&mut out, &[self.epoch]);
        put_numbers(&mut out, &self.previous.numbers());
        put_numbers(&mut out, &[self.copy_at, self.start, self.parity_at]);
        put_numbers(&mut out, &section(&self.groups));
        put_numbers(&mut out, &section(&self.index));
        put_numbers(
            &mut out,
            &[self.entries, self.facts.taken_at_ns, self.facts.stop_us],
        );
        put_numbers(
            &mut out,
            &[self.pages, self.bytes_written, self.previous_durable_us],
        );
        put_numbers(&mut out, &[self.skipped, self.saved, self.clusters]);
        out.extend_from_slice(&self.lock.attempt);
        out.extend_from_slice(&self.lock.index);
        out.extend_from_slice(&self.previous.tag);
        out.extend_from_slice(&self.lock.own);
        out.resize(BLOCK, 0);
        key.of(Kind::Trailer, self.epoch).seal(at, &mut out);
        out
    }

    /// What the tag of an encoded trailer covers.
    pub fn said(block: &[u8]) -> &[u8] {
        block.get(..TRAILER_TAG_AT).unwrap_or_default()
    }

    /// The checksum of an encoded trailer. It covers those of the tables and of the trailer before, and
    /// so all that the epoch consists of.
    pub fn crc(block: &[u8]) -> Option<u32> {
        let (_, crc) = block.split_last_chunk()?;
        Some(u32::from_le_bytes(*crc))
    }

    /// `epoch` and the checksum are those that the reference to this trailer names.
    pub fn decode(key: Key, epoch: u64, place: Twice, block: &[u8]) -> Option<Self> {
        let at = place.at;
        let this_one = Self::crc(block) == Some(place.crc) || bug("trailers not told apart");
        if !this_one || !key.of(Kind::Trailer, epoch).is_sealed(at, block) {
            return None;
        }
        let mut take = Take(block);
        if take.bytes(8)? != TRAILER_MAGIC {
            return None;
        }
        let section = |take: &mut Take<'_>| {
            let (at, len, crc) = (take.u64()?, take.u64()?, take.u64()?);
            Some(Section {
                at,
                len,
                crc: u32::try_from(crc).ok()?,
            })
        };
        let mut trailer = Self {
            epoch: take.u64()?,
            previous: Twice::take(&mut take)?,
            copy_at: take.u64()?,
            start: take.u64()?,
            parity_at: take.u64()?,
            groups: section(&mut take)?,
            index: section(&mut take)?,
            entries: take.u64()?,
            facts: EpochFacts {
                taken_at_ns: take.u64()?,
                stop_us: take.u64()?,
            },
            pages: take.u64()?,
            bytes_written: take.u64()?,
            previous_durable_us: take.u64()?,
            skipped: take.u64()?,
            saved: take.u64()?,
            clusters: take.u64()?,
            lock: EpochLock {
                attempt: take.array()?,
                index: take.array()?,
                own: [0; 16],
            },
        };
        trailer.previous.tag = take.array()?;
        trailer.lock.own = take.array()?;
        let this_one = same(&trailer.lock.own, &place.tag) || bug("trailers not told apart");
        let named = trailer.epoch == epoch && trailer.copy_at == place.copy_at && this_one;
        (named && trailer.is_sane(at)).then_some(trailer)
    }

    /// The number of the epoch before it in this file; `None` for the first one.
    pub fn previous_epoch(&self) -> Option<u64> {
        let before = self.epoch.checked_sub(1)?.checked_sub(self.skipped)?;
        (self.previous != Twice::NONE).then_some(before)
    }

    /// How far behind its first copy, which stands at `at`, the second one stands; that is so for all
    /// tables of the epoch.
    pub fn apart(&self, at: u64) -> u64 {
        self.copy_at.saturating_sub(at)
    }

    /// Blocks of the log that hold its pages; `None` where the numbers are in no order.
    pub fn blocks(&self) -> Option<u64> {
        self.pages.checked_sub(self.saved)
    }

    /// What its index holds.
    pub fn counts(&self) -> Counts {
        Counts {
            entries: self.entries,
            clusters: self.clusters,
            pages: self.pages,
        }
    }

    /// Where the blocks with the pages of this epoch stand.
    pub fn layout(&self) -> Option<Layout> {
        Layout::new(self.start, self.blocks()?, self.parity_at)
    }

    /// Where the tables begin, of which this trailer is the end: behind the pages.
    pub fn tables_at(&self) -> u64 {
        self.layout()
            .map_or(self.start, |layout| layout.pages_end())
    }

    /// Everything lies in order: previous trailer, start, pages, groups, index, this trailer,
    /// parity, copy of the tables.
    fn is_sane(&self, at: u64) -> bool {
        let twice = Twice {
            at,
            copy_at: self.copy_at,
            crc: 0,
            tag: [0; 16],
        };
        let previous_end = match self.previous {
            Twice::NONE => Some(LOG_AT),
            previous if previous.is_placed() => previous.at.checked_add(BLOCK_LEN),
            _ => None,
        };
        let Some(layout) = self.layout() else {
            return false;
        };
        let groups_end = self.groups.at.checked_add(self.groups.len);
        let index_end = self.index.at.checked_add(self.index.len);
        let entries_len = self.entries.checked_mul(ENTRY_LEN as u64);
        let tables_at = layout.pages_end();
        let parity_end = layout.parity_end();
        // A cluster is no larger than this.
        let most = layout.pages() * u64::from(MOST - 1);
        let numbered = match self.previous {
            Twice::NONE => self.skipped == 0,
            _ => self.previous_epoch().is_some_and(|before| before > 0),
        };
        numbered
            && self.saved <= most
            && previous_end.is_some_and(|end| end <= self.start)
            && twice.is_placed()
            && self.start.is_multiple_of(BLOCK_LEN)
            && tables_at <= self.groups.at
            && groups_end == Some(self.index.at)
            && index_end.and_then(|end| end.checked_next_multiple_of(BLOCK_LEN)) == Some(at)
            && entries_len.is_some_and(|len| len <= self.index.len)
            && parity_end.is_none_or(|_| self.parity_at > at)
            && parity_end.unwrap_or(at + BLOCK_LEN) <= tables_at + self.apart(at)
    }
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
