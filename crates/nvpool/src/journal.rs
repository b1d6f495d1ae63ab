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
//! # What cannot be read
//! - A page of the tables that a record has is written again anyway; of any other the heap gets zeros, which are
//!   damage to it and are corrected or named. Pages of its log are an error: without them it could take an
//!   older state for the newest.
//! - A record whose head says that it is older than the other one, all of whose pages are home: the other one is
//!   durable then, and with it what this one brought home. Else it may be the newest, and is an error.
//!
//! A record that is torn, stale or garbage does not fit its checksum, which covers identity and number of the
//! record; its pages were not begun to be written home then.

use crate::error::Error;
use crate::run::PAGE;
use crate::shape::Super;
use outlive_media::{BLOCK, Medium, MediumError};
use resilient_heap::Keep;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use xxhash_rust::xxh3::Xxh3;

const MAGIC: [u8; 8] = *b"OUTLJRNL";
/// Where the numbers of the pages stand in the first block of a record.
const NUMBERS: usize = 32;
/// The last number of a record: nobody counts so far.
const MOST: u64 = i64::MAX as u64;

/// Pages of the tables, by their numbers.
type Pages = Vec<(usize, Vec<u8>)>;

/// A record that cannot be read: the number that its head has, if that can be read, and why.
type Unreadable = (Option<u64>, MediumError);

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
fn decode(medium: &dyn Medium, sb: &Super, half: u64) -> Result<Option<(u64, Pages)>, Unreadable> {
    let at = sb.shape.journal_at(half);
    let mut head = vec![0; BLOCK];
    medium.read(at, &mut head).map_err(|error| (None, error))?;
    let eight = |at: usize| {
        head[at..at + 8]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u64::from(*b))
    };
    let (number, count, sum) = (eight(8), eight(16), eight(24));
    let known = head.starts_with(&MAGIC) && number % 2 == half && number <= MOST;
    if !known || count == 0 || count > u64::from(sb.shape.journal) {
        return Ok(None);
    }
    let count = count as usize;
    let mut body = vec![0; count * BLOCK];
    let read = medium.read(at + PAGE, &mut body);
    read.map_err(|error| (Some(number), error))?;
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

/// The tables as they are at home, and their pages that cannot be read, which are zeros then.
fn read_tables(
    medium: &dyn Medium,
    sb: &Super,
) -> Result<(Vec<u8>, BTreeMap<usize, MediumError>), MediumError> {
    let mut tables = vec![0; sb.shape.tables as usize * BLOCK];
    let mut unreadable = BTreeMap::new();
    match medium.read(sb.shape.tables_at(), &mut tables) {
        Err(MediumError::Io { .. }) => {}
        done => return done.map(|()| (tables, unreadable)),
    }
    for (page, bytes) in tables.chunks_exact_mut(BLOCK).enumerate() {
        match medium.read(sb.shape.tables_at() + page as u64 * PAGE, bytes) {
            Err(error @ MediumError::Io { .. }) => {
                bytes.fill(0);
                unreadable.insert(page, error);
            }
            done => done?,
        }
    }
    Ok((tables, unreadable))
}

/// The records that there are, the older one first; `tables` is what is at home.
fn records(
    medium: &dyn Medium,
    sb: &Super,
    tables: &[u8],
) -> Result<[Option<(u64, Pages)>; 2], MediumError> {
    let at_home = |pages: &Pages| {
        let mut pages = pages.iter();
        pages.all(|(page, bytes)| tables[page * BLOCK..][..BLOCK] == bytes[..])
    };
    let mut records = match [decode(medium, sb, 0), decode(medium, sb, 1)] {
        [Ok(one), Ok(other)] => [one, other],
        [Ok(Some((number, pages))), Err((Some(older), _))]
        | [Err((Some(older), _)), Ok(Some((number, pages)))]
            if older < number && at_home(&pages) =>
        {
            [None, Some((number, pages))]
        }
        [Err((_, error)), _] | [_, Err((_, error))] => return Err(error),
    };
    records.sort_by_key(|record| record.as_ref().map_or(0, |(number, _)| *number));
    Ok(records)
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

    /// The tables as the last durable record left them, what keeps them from now on, and how many of their
    /// pages are zeros because they cannot be read. With `only_read` the medium stays as it is.
    pub fn open(
        medium: Arc<dyn Medium>,
        sb: Super,
        only_read: bool,
    ) -> Result<(Vec<u8>, Self, usize), Error> {
        let (mut tables, mut unreadable) = read_tables(&*medium, &sb)?;
        let records = records(&*medium, &sb, &tables)?;
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
                unreadable.remove(page);
            }
            if !only_read {
                journal.bring_home(pages)?;
            }
        }
        let count = unreadable.len();
        if let Some((_, error)) = unreadable
            .into_iter()
            .find(|(page, _)| sb.shape.is_log(*page))
        {
            return Err(error.into());
        }
        // Also where everything was home already: nobody knows whether that was durable.
        if !only_read && (wrote || newest > 0) {
            journal.medium.flush()?;
        }
        Ok((tables, journal, count))
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

    /// A medium of which one block cannot be read.
    struct Spoiled(Arc<dyn Medium>, u64);

    impl Medium for Spoiled {
        fn place(&self) -> String {
            self.0.place()
        }
        fn geometry(&self) -> Result<outlive_media::Geometry, MediumError> {
            self.0.geometry()
        }
        fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
            if (offset..offset + into.len() as u64).contains(&self.1) {
                let (place, op, source) = (self.place(), "read", std::io::Error::other("spoiled"));
                return Err(MediumError::Io {
                    place,
                    op,
                    offset,
                    source,
                });
            }
            self.0.read(offset, into)
        }
        fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
            self.0.write(offset, bytes)
        }
        fn flush(&self) -> Result<(), MediumError> {
            self.0.flush()
        }
        fn reserve(&self, len: u64) -> Result<(), MediumError> {
            self.0.reserve(len)
        }
        fn truncate(&self, len: u64) -> Result<(), MediumError> {
            self.0.truncate(len)
        }
    }

    /// Without the older record all is there, if the newer one is home; without the newer one nobody knows.
    #[test]
    fn a_record_that_cannot_be_read_is_done_without_only_where_it_is_older() {
        let disk = SimDisk::new();
        let medium: Arc<dyn Medium> = disk.directory().create("pool").unwrap();
        medium.reserve(8 << 20).unwrap();
        let sb = Super {
            id: [3; 16],
            shape: Shape::of(8 << 20),
        };
        Journal::format(Arc::clone(&medium), sb).unwrap();
        let (_, journal, _) = Journal::open(Arc::clone(&medium), sb, false).unwrap();
        for n in 1..4 {
            journal.write(&[(100, vec![n; BLOCK])]).unwrap();
        }
        let page = |at: u64| {
            let spoiled = Arc::new(Spoiled(Arc::clone(&medium), at));
            let opened = Journal::open(spoiled, sb, true);
            opened.map(|(tables, _, lost)| (tables[100 * BLOCK], lost))
        };
        let (older, newer) = (sb.shape.journal_at(0), sb.shape.journal_at(1));
        assert_eq!(page(older + PAGE).unwrap(), (3, 0));
        for at in [newer, newer + PAGE, older] {
            assert!(matches!(page(at), Err(Error::Medium(_))), "byte {at}");
        }
        let home = sb.shape.tables_at();
        assert_eq!(page(home + 100 * PAGE).unwrap(), (3, 0));
        assert_eq!(page(home + 101 * PAGE).unwrap(), (3, 1));
        assert!(matches!(page(home + 7 * PAGE), Err(Error::Medium(_))));
        // As after a crash before the pages of the newest record were home.
        medium.write(home + 100 * PAGE, &[2; BLOCK]).unwrap();
        assert_eq!(page(0).unwrap(), (3, 0));
        assert!(matches!(page(older + PAGE), Err(Error::Medium(_))));
    }

    /// A forged number leaves room for the next one.
    #[test]
    fn a_record_of_an_impossible_number_is_none() {
        let disk = SimDisk::new();
        let medium = disk.directory().create("pool").unwrap();
        medium.reserve(8 << 20).unwrap();
        let sb = Super {
            id: [3; 16],
            shape: Shape::of(8 << 20),
        };
        for (number, known) in [(u64::MAX, false), (MOST + 2, false), (MOST, true)] {
            let record = encode(&sb, number, &[(5, vec![1; BLOCK])]);
            medium.write(sb.shape.journal_at(1), &record).unwrap();
            assert_eq!(decode(&*medium, &sb, 1).unwrap().is_some(), known);
        }
    }

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
