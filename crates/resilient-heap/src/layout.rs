//! Where everything lies, and the superblock.
//!
//! ```text
//! page 0       1       2..4      4..6      6 ..            6 + log
//!      +-------+-------+---------+---------+-------+-------+--------+--------+---
//!      | super | super | schema  | schema  | log   | log   | zone 0 | zone 1 | ...
//!      | A     | B     | A       | B       | half 0| half 1|        |        |
//!      +-------+-------+---------+---------+-------+-------+--------+--------+---
//! zone +--------------------------------------+-----------+-------------+
//!      | D pages of data                      | D/16 pages| D/64 pages  |
//!      |                                      | of words  | of parity   |
//!      +--------------------------------------+-----------+-------------+
//! ```
//! The line `l` of data page `p` has its word at index `64 p + l` of the words, and is summed into line
//! `l` of parity page `p mod P`, where `P` is the number of parity pages. With 1024 data pages or more,
//! 16 neighbouring pages belong to 16 different columns, so that a lost page of words is survived, too.
//!
//! All of it is hostile until [`Super::decode`] and [`Geometry::new`] let it through.

use crate::code::{self, LINE, Line};
use crate::error::Error;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Lines of a page.
pub const LINES: usize = PAGE / LINE;

/// The pages of one copy of the schema.
pub const SCHEMA_PAGES: usize = 2;

/// Bytes that a line of the superblock, the schema or the log carries beside its word.
pub const CARRIED: usize = LINE - 4;

/// The first page of the log.
const LOG: usize = 2 + 2 * SCHEMA_PAGES;

const MAGIC: [u8; 8] = *b"resheap\x01";

/// The sizes of a heap's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Data pages of a zone: a power of two from 16 to 2^19.
    zone: usize,
    /// Pages of one half of the log.
    log: usize,
    /// Where the first zone begins, and bytes of a zone with all that belongs to it: asked for with every
    /// look at a value.
    begin: usize,
    zone_len: usize,
}

impl Geometry {
    /// Checks the sizes.
    #[must_use]
    pub fn new(zone: u64, log: u64) -> Option<Self> {
        let fits = zone.is_power_of_two()
            && (16..=1 << 19).contains(&zone)
            && (1..=1 << 19).contains(&log);
        if !fits {
            return None;
        }
        let (zone, log) = (zone as usize, log as usize);
        let parities = (zone / 64).max(1);
        Some(Self {
            zone,
            log,
            begin: (LOG + 2 * log) * PAGE,
            zone_len: (zone + zone / 16 + parities) * PAGE,
        })
    }

    /// Pages of one half of the log.
    #[must_use]
    pub fn log_pages(&self) -> usize {
        self.log
    }

    /// Bytes of data of a zone.
    #[must_use]
    pub fn zone_data(&self) -> usize {
        self.zone * PAGE
    }

    fn words(&self) -> usize {
        self.zone / 16
    }

    /// Parity pages of a zone.
    #[must_use]
    pub fn parities(&self) -> usize {
        (self.zone / 64).max(1)
    }

    /// Bytes of a zone with all that belongs to it.
    #[must_use]
    pub fn zone_len(&self) -> usize {
        self.zone_len
    }

    /// Where a half of the log begins.
    #[must_use]
    pub fn log_at(&self, half: usize) -> usize {
        (LOG + half * self.log) * PAGE
    }

    /// Lines of a half of the log.
    #[must_use]
    pub fn log_lines(&self) -> usize {
        self.log * LINES
    }

    /// Where a zone begins.
    #[must_use]
    pub fn zone_at(&self, zone: usize) -> usize {
        self.begin + zone * self.zone_len
    }

    /// Bytes of a heap with so many zones.
    #[must_use]
    pub fn len(&self, zones: usize) -> usize {
        self.zone_at(zones)
    }

    /// Zone and place in the zone's data, of a place in the heap; nothing where no data is.
    #[must_use]
    #[inline]
    pub fn data(&self, at: usize) -> Option<(usize, usize)> {
        let at = at.checked_sub(self.begin)?;
        let len = self.zone_len;
        // Dividing takes longer than all else here.
        let (zone, within) = if at < len {
            (0, at)
        } else {
            (at / len, at % len)
        };
        (within < self.zone_data()).then_some((zone, within))
    }

    /// Where the word of a line is stored; the line is given by zone and place in its data.
    #[must_use]
    pub fn word_at(&self, zone: usize, within: usize) -> usize {
        self.zone_at(zone) + self.zone_data() + within / LINE * 4
    }

    /// The column of a line: its number.
    #[must_use]
    pub fn column(&self, zone: usize, within: usize) -> Column {
        Column {
            zone,
            group: within / PAGE % self.parities(),
            line: within % PAGE / LINE,
        }
    }

    /// Where the parity line of a column is stored.
    #[must_use]
    pub fn parity_at(&self, column: Column) -> usize {
        let page = self.zone + self.words() + column.group;
        self.zone_at(column.zone) + page * PAGE + column.line * LINE
    }

    /// The members of a column, as places in the zone's data.
    pub fn members(&self, column: Column) -> impl Iterator<Item = usize> {
        (column.group..self.zone)
            .step_by(self.parities())
            .map(move |page| page * PAGE + column.line * LINE)
    }

    /// All columns of a zone.
    pub fn columns(&self, zone: usize) -> impl Iterator<Item = Column> {
        (0..self.parities())
            .flat_map(move |group| (0..LINES).map(move |line| Column { zone, group, line }))
    }

    /// What the bytes at a place are, for reports.
    #[must_use]
    pub fn what(&self, at: usize) -> &'static str {
        match at / PAGE {
            0 | 1 => "superblock",
            page if page < LOG => "schema",
            _ if at < self.zone_at(0) => "log",
            _ => {
                let page = (at - self.zone_at(0)) % self.zone_len() / PAGE;
                if page < self.zone {
                    "data"
                } else if page < self.zone + self.words() {
                    "words"
                } else {
                    "parity"
                }
            }
        }
    }
}

/// The lines that share a parity line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Column {
    /// Which zone.
    pub zone: usize,
    /// Which parity page.
    pub group: usize,
    /// Which line of it.
    pub line: usize,
}

/// Where a copy of the superblock is.
#[must_use]
pub fn super_at(copy: usize) -> usize {
    copy * PAGE
}

/// Where a copy of the schema begins.
#[must_use]
pub fn schema_at(copy: usize) -> usize {
    (2 + copy * SCHEMA_PAGES) * PAGE
}

/// The most bytes of a schema.
pub const SCHEMA_LEN: usize = SCHEMA_PAGES * LINES * CARRIED;

/// A line that carries its own word.
#[must_use]
pub fn seal(carried: &[u8], seed: u32) -> Line {
    let mut line = [0; LINE];
    let take = carried.len().min(CARRIED);
    line[..take].copy_from_slice(&carried[..take]);
    let word = code::line_crc(&line) ^ seed;
    line[CARRIED..].copy_from_slice(&word.to_le_bytes());
    line
}

/// What a line carries, corrected where a bit or two flipped, and how many did.
#[must_use]
pub fn unseal(line: &Line, seed: u32) -> Option<([u8; CARRIED], u32)> {
    let mut bare = [0; LINE];
    bare[..CARRIED].copy_from_slice(&line[..CARRIED]);
    let word = u32::from_le_bytes([line[60], line[61], line[62], line[63]]) ^ seed;
    let fix = code::correct(&bare, word)?;
    // The place of the word is empty in what the code covers: a flip found there never was.
    if fix.line[CARRIED..] != [0; 4] {
        return None;
    }
    let mut carried = [0; CARRIED];
    carried.copy_from_slice(&fix.line[..CARRIED]);
    Some((carried, fix.bits))
}

/// What a superblock says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Super {
    /// The heap's identity.
    pub id: u64,
    /// Grows with each change of the superblock.
    pub version: u64,
    /// Sizes.
    pub geometry: Geometry,
    /// Zones that are in use.
    pub zones: usize,
    /// Bytes of the schema.
    pub schema: usize,
    /// The fingerprint of the root's layout.
    pub fingerprint: u64,
}

/// The seed of a superblock: it cannot depend on an identity that is not known yet.
fn super_seed(copy: usize) -> u32 {
    code::seed(u64::from_le_bytes(MAGIC), copy as u64)
}

impl Super {
    /// The line of a copy.
    #[must_use]
    pub fn encode(&self, copy: usize) -> Line {
        let mut bytes = [0; CARRIED];
        let fields = [
            u64::from_le_bytes(MAGIC),
            self.id,
            self.version,
            (self.geometry.zone as u64) | (self.geometry.log as u64) << 32,
            (self.zones as u64) | (self.schema as u64) << 32,
            self.fingerprint,
        ];
        for (field, chunk) in fields.iter().zip(bytes.chunks_exact_mut(8)) {
            chunk.copy_from_slice(&field.to_le_bytes());
        }
        seal(&bytes, super_seed(copy))
    }

    /// What a copy says, and how many bits of it had flipped.
    ///
    /// # Errors
    /// [`Error::NotAHeap`], [`Error::Damaged`].
    pub fn decode(line: &Line, copy: usize) -> Result<(Self, u32), Error> {
        let (bytes, bits) = unseal(line, super_seed(copy)).ok_or(Error::NotAHeap)?;
        let word = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[i * 8..][..8]);
            u64::from_le_bytes(word)
        };
        if word(0) != u64::from_le_bytes(MAGIC) {
            return Err(Error::NotAHeap);
        }
        let damaged = Error::Damaged {
            what: "superblock",
            at: super_at(copy),
        };
        let low = |word: u64| word & u64::from(u32::MAX);
        let geometry = Geometry::new(low(word(3)), word(3) >> 32).ok_or(damaged.clone())?;
        let (zones, schema) = (low(word(4)) as usize, (word(4) >> 32) as usize);
        let addressable = zones
            .checked_mul(geometry.zone_len())
            .is_some_and(|len| len < isize::MAX as usize / 2);
        if zones == 0 || schema > SCHEMA_LEN || !addressable {
            return Err(damaged);
        }
        let found = Self {
            id: word(1),
            version: word(2),
            geometry,
            zones,
            schema,
            fingerprint: word(5),
        };
        Ok((found, bits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    #[test]
    fn every_line_has_its_own_word_and_every_column_its_own_parity() {
        for (zone, log) in [(16, 1), (128, 3)] {
            let geometry = Geometry::new(zone, log).unwrap();
            let mut places = BTreeSet::new();
            let mut lines = BTreeSet::new();
            for column in geometry.columns(1) {
                assert!(places.insert(geometry.parity_at(column)));
                assert_eq!(geometry.what(geometry.parity_at(column)), "parity");
                for within in geometry.members(column) {
                    assert_eq!(geometry.column(1, within), column);
                    assert_eq!(
                        geometry.data(geometry.zone_at(1) + within),
                        Some((1, within))
                    );
                    assert!(lines.insert(within));
                    let word = geometry.word_at(1, within);
                    assert_eq!(geometry.what(word), "words");
                    assert!(places.insert(word));
                }
            }
            assert_eq!(lines.len() * LINE, geometry.zone_data());
            assert!(places.iter().all(|at| geometry.data(*at).is_none()));
            assert!(places.last().unwrap() + LINE <= geometry.zone_at(2));
        }
    }

    #[test]
    fn with_the_usual_size_a_page_of_words_covers_each_column_once() {
        let geometry = Geometry::new(1024, 64).unwrap();
        let columns: BTreeSet<_> = (0..16 * PAGE)
            .step_by(LINE)
            .map(|within| geometry.column(0, within))
            .collect();
        assert_eq!(columns.len(), 16 * LINES);
    }

    proptest! {
        #[test]
        fn a_superblock_says_what_was_written(id: u64, version: u64, zones in 1..1000usize, fingerprint: u64) {
            let geometry = Geometry::new(64, 4).unwrap();
            let written = Super { id, version, geometry, zones, schema: 7, fingerprint };
            let line = written.encode(1);
            prop_assert_eq!(Super::decode(&line, 1), Ok((written, 0)));
            prop_assert_eq!(Super::decode(&line, 0), Err(Error::NotAHeap));
        }

        #[test]
        fn whatever_a_superblock_says_is_judged(bytes: Vec<u8>) {
            // With a fitting word: what then passes is sane.
            if let Ok((found, _)) = Super::decode(&seal(&bytes, super_seed(0)), 0) {
                prop_assert!(found.zones > 0);
            }
            let mut carried = [0; CARRIED];
            carried[..8].copy_from_slice(&MAGIC);
            for (to, from) in carried[24..].iter_mut().zip(&bytes) {
                *to = *from;
            }
            if let Ok((found, _)) = Super::decode(&seal(&carried, super_seed(0)), 0) {
                prop_assert!(found.geometry.len(found.zones) < isize::MAX as usize);
            }
        }
    }

    #[test]
    fn every_flip_of_a_sealed_line_is_corrected() {
        let line = seal(b"what is carried", 77);
        let good = unseal(&line, 77).unwrap().0;
        for bit in 0..512 {
            let mut bad = line;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unseal(&bad, 77), Some((good, 1)));
        }
        assert_eq!(unseal(&line, 78).filter(|(_, bits)| *bits == 0), None);
    }
}
