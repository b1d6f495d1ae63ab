//! The tables of one epoch: both copies are read, and compared with what they must be.
//!
//! What they must be is put together from whichever copy of each section has its checksum. Padding is
//! zeros. Where neither copy of a section has its checksum, it is lost, and both are left as they are.

use crate::damage::{Damage, Outcome, Part, Trouble};
use crate::format::{BLOCK_LEN, Kind, Section, Trailer};
use crate::generation::Generation;
use crate::groups::TreePlace;
use crate::stored::read_blocks;
use outlive_epoch::PAGE_SIZE;
use std::ops::Range;

/// A block that must be written to make damage good.
pub(crate) struct Fix {
    pub at: u64,
    pub bytes: Vec<u8>,
}

/// What was found, and what would make it good.
#[derive(Default)]
pub(crate) struct Found {
    pub damages: Vec<Damage>,
    pub fixes: Vec<Fix>,
}

/// Both copies of the tables of an epoch, and what each must be.
struct Tables<'a> {
    generation: &'a Generation,
    trailer: &'a Trailer,
    /// Where the first copy begins.
    at: u64,
    apart: u64,
    /// As they were read.
    read: [Vec<u8>; 2],
    /// As they must be, as far as that is known.
    right: [Vec<u8>; 2],
    /// What is where, for reports.
    parts: Vec<(Range<usize>, Part)>,
    found: Found,
}

/// Checks the tables of the epoch whose trailer, which is intact, has its first copy at `at`.
pub(crate) fn examine(
    generation: &Generation,
    at: u64,
    trailer: &Trailer,
) -> Result<Found, Trouble> {
    let tables_at = trailer.tables_at();
    let apart = trailer.apart(at);
    let len = at + BLOCK_LEN - tables_at;
    let end = generation
        .medium
        .geometry()
        .map_err(crate::damage::medium)?
        .len;
    // The file may have been cut, but not by more than what can be made up for.
    if at + BLOCK_LEN > end {
        let what = "the file ends before its tables";
        let damage = generation.damaged(end, Some(trailer.epoch), Part::End, what);
        return Err(damage.into());
    }
    let read = [tables_at, tables_at + apart].map(|from| {
        let mut bytes = vec![0; len as usize];
        read_blocks(&*generation.medium, from, &mut bytes);
        bytes
    });
    let mut tables = Tables {
        generation,
        trailer,
        at: tables_at,
        apart,
        right: read.clone(),
        read,
        parts: Vec::new(),
        found: Found::default(),
    };
    tables.all(at);
    Ok(tables.found)
}

impl Tables<'_> {
    fn all(&mut self, trailer_at: u64) {
        let Trailer { groups, index, .. } = *self.trailer;
        let block = self.trailer.encode(self.generation.key, trailer_at);
        let from = (trailer_at - self.at) as usize;
        self.must_be(from, &block, Part::Trailer);
        let padding = (index.at + index.len - self.at) as usize..from;
        let zeros = vec![0; padding.len()];
        self.must_be(padding.start, &zeros, Part::Padding);
        self.section(Kind::Index, &index, Part::Index);
        let whole = self.section(Kind::Groups, &groups, Part::Groups);
        let listed = self.generation.groups(trailer_at, self.trailer);
        if let (Err(Trouble::Damage(damage)), true) = (&listed, whole) {
            self.found.damages.push((**damage).clone());
        }
        if let Ok(listed) = listed {
            for (name, place) in listed {
                let Section { at, len, .. } = place.section;
                let own = place.epoch == self.trailer.epoch
                    && at >= self.at
                    && at + len <= groups.at
                    && place.copy_at == at + self.apart;
                if own {
                    let part = Part::Tree(name.clone());
                    let whole = self.section(Kind::Tree, &place.section, part);
                    if whole && !self.generation.is_locked() {
                        self.open_tree(&name, &place);
                    }
                }
            }
        }
        self.parts
            .sort_unstable_by_key(|(range, _)| (range.start, range.end));
        for copy in 0..2 {
            self.compare(copy);
        }
    }

    fn must_be(&mut self, from: usize, bytes: &[u8], part: Part) {
        for right in &mut self.right {
            right[from..][..bytes.len()].copy_from_slice(bytes);
        }
        self.parts.push((from..from + bytes.len(), part));
    }

    /// Lists a tree that has its checksum and not its tag.
    fn open_tree(&mut self, name: &str, place: &TreePlace) {
        if self.generation.cipher.is_some()
            && let Err(Trouble::Damage(damage)) = self.generation.tree(name, place)
        {
            self.found.damages.push(*damage);
        }
    }

    /// Finds the copy of a section that is whole; whether there is one.
    fn section(&mut self, kind: Kind, section: &Section, part: Part) -> bool {
        let from = (section.at - self.at) as usize;
        let range = from..from + section.len as usize;
        let seed = self.generation.key.of(kind, self.trailer.epoch);
        let is_good = |bytes: &&[u8]| seed.crc(section.at, bytes) == section.crc;
        let good = self
            .read
            .iter()
            .map(|copy| &copy[range.clone()])
            .find(is_good);
        match good.map(<[u8]>::to_vec) {
            Some(bytes) => {
                self.must_be(from, &bytes, part);
                true
            }
            None => {
                let what = "neither copy has its checksum";
                let epoch = Some(self.trailer.epoch);
                let damage = self.generation.damaged(section.at, epoch, part, what);
                self.found.damages.push(damage);
                false
            }
        }
    }

    /// Lists the blocks of one copy that are not what they must be. A block that is harmed in both
    /// copies is not written again: if that were cut short, what is good in one of them would go.
    fn compare(&mut self, copy: usize) {
        let base = self.at + copy as u64 * self.apart;
        let blocks = (self.read[copy].chunks(PAGE_SIZE)).zip(self.right[copy].chunks(PAGE_SIZE));
        let other =
            (self.read[1 - copy].chunks(PAGE_SIZE)).zip(self.right[1 - copy].chunks(PAGE_SIZE));
        for (i, ((read, right), (other_read, other_right))) in blocks.zip(other).enumerate() {
            if read == right {
                continue;
            }
            let first = read.iter().zip(right).position(|(a, b)| a != b);
            let at = base + i as u64 * BLOCK_LEN;
            let byte = i * PAGE_SIZE + first.unwrap_or(0);
            // They do not overlap.
            let behind = self.parts.partition_point(|(range, _)| range.start <= byte);
            let named = self.parts[..behind]
                .last()
                .filter(|(range, _)| range.contains(&byte));
            let part = named.map_or(Part::Padding, |(_, part)| part.clone());
            let what = match copy {
                0 => "its first copy is not what it must be",
                _ => "its second copy is not what it must be",
            };
            let damage = self
                .generation
                .damaged(at, Some(self.trailer.epoch), part, what);
            self.found.damages.push(damage.with(Outcome::Repairable));
            if other_read == other_right {
                self.found.fixes.push(Fix {
                    at,
                    bytes: right.to_vec(),
                });
            }
        }
    }
}
