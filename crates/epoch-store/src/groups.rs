//! Where the state trees of an epoch stand: the bytes of a group table that is not encrypted.
//!
//! # Rules
//! - As for all of [`crate::format`]: what is read is trusted only as far as it was checked here.
//! - No byte belongs to two trees.

use crate::cipher::{Attempt, Tag};
use crate::format::{LOG_AT, NAME_MAX, Section, Take, put_numbers};

/// Where the state tree of a group stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreePlace {
    /// The epoch that stored it.
    pub epoch: u64,
    pub section: Section,
    /// Where its second copy stands.
    pub copy_at: u64,
    /// Zeros in a file that is not encrypted.
    pub lock: TreeLock,
}

/// What leads to the key of a tree, which may be that of an earlier epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeLock {
    /// That of the epoch which stored the tree.
    pub attempt: Attempt,
    pub tag: Tag,
}

/// Bytes of one group in a group table.
pub fn group_len(name: &str) -> usize {
    2 + name.len() + 4 * 8 + 4
}

/// Appends one group to a group table.
pub fn encode_group(out: &mut Vec<u8>, name: &str, place: &TreePlace) {
    out.extend_from_slice(&(name.len() as u16).to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    let section = place.section;
    put_numbers(out, &[place.epoch, section.at, place.copy_at, section.len]);
    out.extend_from_slice(&place.section.crc.to_le_bytes());
}

/// Reads a group table whose trees, with their copies, lie before `end`; `None` where it is not in order.
/// No byte belongs to two trees: so all of them together are no longer than the file.
pub fn decode_groups(bytes: &[u8], epoch: u64, end: u64) -> Option<Vec<(String, TreePlace)>> {
    let mut take = Take(bytes);
    let mut groups: Vec<(String, TreePlace)> = Vec::new();
    while !take.0.is_empty() {
        let len = take.u16()?;
        let name = std::str::from_utf8(take.bytes(usize::from(len))?)
            .ok()?
            .to_owned();
        let origin = take.u64()?;
        let (at, copy_at) = (take.u64()?, take.u64()?);
        let section = Section {
            at,
            len: take.u64()?,
            crc: take.u32()?,
        };
        let sorted = groups.last().is_none_or(|(last, _)| *last < name);
        let inside =
            section.at >= LOG_AT && at < copy_at && copy_at.checked_add(section.len)? <= end;
        if !sorted || !inside || origin > epoch || name.len() > NAME_MAX {
            return None;
        }
        groups.push((
            name,
            TreePlace {
                epoch: origin,
                section,
                copy_at,
                lock: TreeLock::default(),
            },
        ));
    }
    is_apart(groups.iter().map(|(_, place)| place.section)).then_some(groups)
}

/// Whether no two of these overlap.
fn is_apart(sections: impl Iterator<Item = Section>) -> bool {
    let mut ranges: Vec<_> = sections
        .map(|s| (s.at, s.at.saturating_add(s.len)))
        .collect();
    ranges.sort_unstable();
    ranges.is_sorted_by(|before, next| before.1 <= next.0)
}
