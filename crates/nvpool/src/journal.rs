//! The journal below the tables: pages of the heap reach the medium all at once or not at all.
//!
//! A heap corrects lines and survives lost stores, but not a page of which a power cut left half, or
//! anything: a medium may leave that of whatever was being written. So each set of pages is written to a
//! half of the journal first, in turns, as a record with a checksum, and then home.
//!
//! # Invariants
//! - Record `n` is in half `n % 2`. It is durable before any of its pages is written home.
//! - The flush that makes record `n` durable also makes the pages of record `n - 1` durable at home. So
//!   what overwrites record `n - 1`, record `n + 1`, overwrites nothing that is still needed.
//! - After a crash the newest whole record and the one before it, where that is whole, are brought home,
//!   in this order, before there is a new one.
//!
//! A record that is torn, stale or garbage does not fit its checksum, which covers identity and number of the
//! record; its pages were not begun to be written home then.

use crate::error::Error;
use crate::run::PAGE;
use crate::shape::Super;
use outlive_media::{BLOCK, Medium, MediumError};
use resilient_heap::Keep;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use xxhash_rust::xxh3::Xxh3;

const MAGIC: [u8; 8] = *b"OUTLJRNL";
/// Where the numbers of the pages stand in the first block of a record.
const NUMBERS: usize = 32;

/// Pages of the tables, by their numbers.
type Pages = Vec<(usize, Vec<u8>)>;

/// Keeps the pages of the tables on a medium.
pub(crate) struct Journal {
    medium: Arc<dyn Medium>,
    sb: Super,
    /// The number of the next record.
    next: Mutex<u64>,
    /// What the medium said, for whoever gets a heap's error.
    said: Arc<Mutex<Option<MediumError>>>,
    /// Whether nothing is to be written: what is kept is forgotten with the pool.
    only_read: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn checksum(sb: &Super, head: &[u8], pages: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&sb.id);
    hash.update(&head[..24]);
    hash.update(&head[NUMBERS..]);
    hash.update(pages);
    hash.digest()
}

fn encode(sb: &Super, number: u64, pages: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut record = vec![0; BLOCK * (1 + pages.len())];
    let (head, body) = record.split_at_mut(BLOCK);
    head[..8].copy_from_slice(&MAGIC);
    head[8..16].copy_from_slice(&number.to_le_bytes());
    head[16..24].copy_from_slice(&(pages.len() as u64).to_le_bytes());
    let slots = head[NUMBERS..]
        .chunks_exact_mut(4)
        .zip(body.chunks_exact_mut(BLOCK));
    for ((slot, to), (page, bytes)) in slots.zip(pages) {
        // A table has at most 2^16 pages.
        slot.copy_from_slice(&(*page as u32).to_le_bytes());
        to.copy_from_slice(bytes);
    }
    let sum = checksum(sb, head, body).to_le_bytes();
    head[24..32].copy_from_slice(&sum);
    record
}

/// The record in a half, if it is whole: its number and its pages.
fn decode(medium: &dyn Medium, sb: &Super, half: u64) -> Result<Option<(u64, Pages)>, MediumError> {
    let at = sb.shape.journal_at(half);
    let mut head = vec![0; BLOCK];
    medium.read(at, &mut head)?;
    let eight = |at: usize| {
        head[at..at + 8]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u64::from(*b))
    };
    let (number, count, sum) = (eight(8), eight(16), eight(24));
    let known = head.starts_with(&MAGIC) && number % 2 == half;
    if !known || count == 0 || count > u64::from(sb.shape.journal) {
        return Ok(None);
    }
    let count = count as usize;
    let mut body = vec![0; count * BLOCK];
    medium.read(at + PAGE, &mut body)?;
    let numbers = head[NUMBERS..].chunks_exact(4).take(count);
    let pages: Pages = numbers
        .map(|n| n.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b)))
        .zip(body.chunks_exact(BLOCK).map(<[u8]>::to_vec))
        .collect();
    let inside = pages
        .iter()
        .all(|(page, _)| *page < sb.shape.tables as usize);
    let whole = checksum(sb, &head, &body) == sum && inside;
    Ok(whole.then_some((number, pages)))
}

impl Journal {
    /// A journal that is empty, and tables that are zeros. Durable when this returns.
    pub fn format(medium: Arc<dyn Medium>, sb: Super) -> Result<(), Error> {
        for half in 0..2 {
            medium.write(sb.shape.journal_at(half), &[0; BLOCK])?;
        }
        let zeros = vec![0; 64 * BLOCK];
        let (mut at, mut left) = (sb.shape.tables_at(), sb.shape.tables as usize * BLOCK);
        while left > 0 {
            let part = left.min(zeros.len());
            medium.write(at, &zeros[..part])?;
            (at, left) = (at + part as u64, left - part);
        }
        medium.flush()?;
        Ok(())
    }

    /// The tables as the last durable record left them, and what keeps them from now on. With `only_read`
    /// the medium stays as it is.
    pub fn open(
        medium: Arc<dyn Medium>,
        sb: Super,
        only_read: bool,
    ) -> Result<(Vec<u8>, Self), Error> {
        let mut tables = vec![0; sb.shape.tables as usize * BLOCK];
        medium.read(sb.shape.tables_at(), &mut tables)?;
        let mut records = [decode(&*medium, &sb, 0)?, decode(&*medium, &sb, 1)?];
        records.sort_by_key(|record| record.as_ref().map_or(0, |(number, _)| *number));
        let newest = records[1].as_ref().map_or(0, |(number, _)| *number);
        let journal = Self {
            medium,
            sb,
            next: Mutex::new(newest + 1),
            said: Arc::default(),
            only_read,
        };
        let mut wrote = false;
        for (number, pages) in records.iter().flatten() {
            if number + 1 < newest {
                continue;
            }
            for (page, bytes) in pages {
                let home = &mut tables[page * BLOCK..][..BLOCK];
                wrote |= home != bytes;
                home.copy_from_slice(bytes);
            }
            if !only_read {
                journal.bring_home(pages)?;
            }
        }
        // Also where everything was home already: nobody knows whether that was durable.
        if !only_read && (wrote || newest > 0) {
            journal.medium.flush()?;
        }
        Ok((tables, journal))
    }

    /// Where the last error of the medium is left.
    pub fn said(&self) -> Arc<Mutex<Option<MediumError>>> {
        Arc::clone(&self.said)
    }

    fn bring_home(&self, pages: &[(usize, Vec<u8>)]) -> Result<(), MediumError> {
        for (page, bytes) in pages {
            let at = self.sb.shape.tables_at() + *page as u64 * PAGE;
            self.medium.write(at, bytes)?;
        }
        Ok(())
    }

    fn write(&self, pages: &[(usize, Vec<u8>)]) -> Result<(), MediumError> {
        let mut next = lock(&self.next);
        for part in pages.chunks(self.sb.shape.journal as usize) {
            let record = encode(&self.sb, *next, part);
            self.medium
                .write(self.sb.shape.journal_at(*next % 2), &record)?;
            self.medium.flush()?;
            self.bring_home(part)?;
            *next += 1;
        }
        Ok(())
    }
}

impl Keep for Journal {
    fn keep(&self, pages: &[(usize, Vec<u8>)]) -> Result<(), resilient_heap::Error> {
        if self.only_read {
            return Ok(());
        }
        self.write(pages).map_err(|error| {
            *lock(&self.said) = Some(error);
            let what = "the medium of the pool failed";
            resilient_heap::Error::Memory { what, code: 0 }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;
    use outlive_media::{Directory, SimDisk};

    /// Every bit of a record counts, and so does where it is.
    #[test]
    fn a_record_with_a_flipped_bit_or_in_the_other_half_is_none() {
        let disk = SimDisk::new();
        let medium = disk.directory().create("pool").unwrap();
        medium.reserve(8 << 20).unwrap();
        let sb = Super {
            id: [3; 16],
            shape: Shape::of(8 << 20),
        };
        let record = encode(&sb, 2, &[(5, vec![1; BLOCK]), (9, vec![2; BLOCK])]);
        let found = |record: &[u8], half: u64| {
            medium.write(sb.shape.journal_at(half), record).unwrap();
            decode(&*medium, &sb, half)
                .unwrap()
                .map(|(number, pages)| (number, pages.len()))
        };
        assert_eq!(found(&record, 0), Some((2, 2)));
        assert_eq!(found(&record, 1), None);
        for bit in (0..record.len() * 8).step_by(7) {
            let mut flipped = record.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(found(&flipped, 0), None, "bit {bit}");
        }
        let other = Super { id: [4; 16], ..sb };
        assert!(decode(&*medium, &other, 0).unwrap().is_none());
    }
}
