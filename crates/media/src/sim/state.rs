//! The contents of a simulated disk, and what a power cut does to a change of them.

use super::bytes::Bytes;
use crate::{BLOCK, SECTOR};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes that reach mapped memory together.
const WORD: usize = 8;

/// A change that is not durable yet.
#[derive(Clone, Debug)]
pub enum Pending {
    /// Bytes written to the medium with this number.
    Write(u64, u64, Vec<u8>),
    /// A new length.
    Resize(u64, u64),
    /// A name that shall stand for this medium, or for none.
    Name(String, Option<u64>),
    /// A medium that changes its name.
    Rename(String, String),
}

/// What becomes of a pending change when the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is there.
    Keep,
    /// It is not there.
    Drop,
    /// Only the sectors whose bit is set are there (sector 64 as sector 0, and so on). For
    /// anything but a write: kept if bit 0 is set.
    Torn(u64),
    /// Of each word of eight bytes, this seed says whether it is there: what stores to mapped memory leave, which
    /// reach it in any order until a fence. For anything but a write: kept if bit 0 is set.
    Words(u64),
    /// The range holds bytes made from this seed. For anything but a write: dropped.
    Trash(u64),
    /// The range holds zeros. For anything but a write: dropped.
    Zero,
    /// The range holds what stands elsewhere on the disk, also in media that were removed; the
    /// number chooses where. For anything but a write: dropped.
    Stale(u64),
}

#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub media: BTreeMap<u64, Bytes>,
    pub names: BTreeMap<String, u64>,
    /// What space holds that was never written, by offset; zeros beyond.
    pub dirt: Arc<[u8]>,
}

impl State {
    /// Carries out a change, as far as its fate lets it.
    pub fn suffer(&mut self, pending: &Pending, fate: Fate) {
        let kept = match fate {
            Fate::Keep => true,
            Fate::Torn(mask) | Fate::Words(mask) => mask & 1 == 1,
            Fate::Drop | Fate::Trash(_) | Fate::Zero | Fate::Stale(_) => false,
        };
        match pending {
            Pending::Write(id, offset, bytes) => self.write(*id, *offset, bytes, fate),
            Pending::Resize(id, len) if kept => self.resize(*id, *len as usize),
            Pending::Name(name, Some(id)) if kept => {
                self.media.entry(*id).or_default();
                self.names.insert(name.clone(), *id);
            }
            Pending::Name(name, None) if kept => {
                self.names.remove(name);
            }
            Pending::Rename(from, to) if kept => {
                if let Some(id) = self.names.remove(from) {
                    self.names.insert(to.clone(), id);
                }
            }
            _ => {}
        }
    }

    /// Changes a length; what is new holds the dirt of its place.
    fn resize(&mut self, id: u64, len: usize) {
        let medium = self.media.entry(id).or_default();
        let from = medium.len();
        medium.resize(len);
        if from < len {
            let dirt = self.dirt.get(from..len.min(self.dirt.len()));
            medium.put(from, dirt.unwrap_or_default());
        }
    }

    fn put(&mut self, id: u64, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if self.media.get(&id).is_none_or(|medium| medium.len() < end) {
            self.resize(id, end);
        }
        if let Some(medium) = self.media.get_mut(&id) {
            medium.put(at, bytes);
        }
    }

    fn write(&mut self, id: u64, offset: u64, bytes: &[u8], fate: Fate) {
        let offset = offset as usize;
        match fate {
            Fate::Keep => self.put(id, offset, bytes),
            Fate::Drop => {}
            Fate::Torn(mask) => {
                for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                    if mask >> (i % 64) & 1 == 1 {
                        self.put(id, offset + i * SECTOR, sector);
                    }
                }
            }
            Fate::Words(seed) => {
                let mut found = self.before(id, offset as u64, bytes.len());
                let chosen = trash(seed, bytes.len().div_ceil(WORD));
                let words = found.chunks_mut(WORD).zip(bytes.chunks(WORD));
                for ((found, word), chosen) in words.zip(chosen) {
                    if chosen & 1 == 1 {
                        found.copy_from_slice(word);
                    }
                }
                self.put(id, offset, &found);
            }
            Fate::Trash(seed) => self.put(id, offset, &trash(seed, bytes.len())),
            Fate::Zero => self.put(id, offset, &vec![0; bytes.len()]),
            Fate::Stale(choice) => {
                let stale = self.stale(choice, offset, bytes.len());
                self.put(id, offset, &stale);
            }
        }
    }

    /// What was there before a write, as far as there was anything: what is found if it is lost.
    pub fn before(&self, id: u64, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        if let Some(medium) = self.media.get(&id) {
            let there = medium.len().saturating_sub(offset as usize).min(len);
            medium.read(offset as usize, &mut bytes[..there]);
        }
        bytes
    }

    /// Bytes from another place, or from the same place of another medium; repeated as needed.
    fn stale(&self, choice: u64, offset: usize, len: usize) -> Vec<u8> {
        let media: Vec<&Bytes> = self.media.values().filter(|m| m.len() >= BLOCK).collect();
        let chosen = choice.checked_rem(media.len() as u64);
        let Some(medium) = chosen.and_then(|i| media.get(i as usize)) else {
            return vec![0; len];
        };
        let blocks = medium.len() / BLOCK;
        let elsewhere = (choice >> 8) as usize % blocks * BLOCK;
        let same = choice & 0x80 == 0 && offset < blocks * BLOCK;
        let from = if same { offset } else { elsewhere };
        let mut bytes = vec![0; (medium.len() - from).min(len)];
        medium.read(from, &mut bytes);
        bytes.iter().cycle().take(len).copied().collect()
    }
}

/// Bytes from a linear congruential generator (Knuth's MMIX constants).
fn trash(mut seed: u64, len: usize) -> Vec<u8> {
    let mut next = || {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (seed >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}
