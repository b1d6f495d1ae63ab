//! Contents of an owner that does not run, in a file; its pages go back to the pool.
//!
//! ```text
//! block 0    1                                  + T
//!     +------+----------------------------------+-----------------------------
//!     | head | ranges, then a word for each page | pages, in the order of the ranges
//!     +------+----------------------------------+-----------------------------
//! ```
//! A range is three numbers of 8 bytes (extent, first page of it, pages); a word is the CRC-32C of a page.
//! The head names the pool, the owner and how often it was paged out, and has a checksum over itself and
//! the table.
//!
//! # Order
//! - Out: a transaction notes the number of the file, so that no later one has it, whatever becomes of this one.
//!   The file is written under another name, made durable, and named; only then a second transaction says that
//!   it counts. A crash before leaves the contents in the pool.
//! - In: a transaction says that the pages to be filled may hold anything; they are filled and made durable;
//!   a second transaction makes them the owner's. A crash between leaves them to be zeroed. Then the file
//!   goes; one that a crash left has an old number and is never read.
//!
//! # What it refuses
//! A file of another pool, owner or time, one that is damaged, ranges that the owner's extents do not have:
//! the owner stays where it is. To replace a file that it did not write for this owner. The other name has the
//! pool's identity in it, so that what a crash left there, even half-written, is known to be its own.

use crate::error::Error;
use crate::pool::{Inner, Pool, STEP};
use crate::refused::Refused;
use crate::run::{PAGE, Run};
use outlive_media::{Access, BLOCK, Directory, Medium};
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: [u8; 8] = *b"OUTLPAGE";
const VERSION: u64 = 1;
/// Bytes of a range in the table.
const RANGE: usize = 24;

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Head {
    pool: [u8; 16],
    owner: String,
    generation: u64,
    ranges: u64,
    pages: u64,
}

impl Head {
    /// Bytes of the table, in whole blocks; `None` where no table has so many.
    fn table_len(&self) -> Option<u64> {
        let ranges = self.ranges.checked_mul(RANGE as u64)?;
        let len = self.pages.checked_mul(4)?.checked_add(ranges)?;
        len.checked_next_multiple_of(PAGE)
    }

    fn encode(&self, table: &[u8]) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK);
        block.extend(MAGIC);
        block.extend(VERSION.to_le_bytes());
        block.extend(self.pool);
        for number in [
            self.generation,
            self.ranges,
            self.pages,
            self.owner.len() as u64,
        ] {
            block.extend(number.to_le_bytes());
        }
        block.extend(self.owner.as_bytes());
        block.resize(BLOCK - 16, 0);
        block.extend(xxh3_64(table).to_le_bytes());
        block.extend(xxh3_64(&block).to_le_bytes());
        block
    }

    /// The head in a block, and the checksum of its table.
    fn decode(block: &[u8]) -> Option<(Self, u64)> {
        let eight = |at: usize| {
            let bytes = block.get(at..at + 8)?;
            bytes.try_into().ok().map(u64::from_le_bytes)
        };
        if !block.starts_with(&MAGIC) || eight(BLOCK - 8)? != xxh3_64(&block[..BLOCK - 8]) {
            return None;
        }
        let len = usize::try_from(eight(56)?).ok().filter(|len| *len <= 64)?;
        let head = Self {
            pool: block.get(16..32)?.try_into().ok()?,
            generation: eight(32)?,
            ranges: eight(40)?,
            pages: eight(48)?,
            owner: String::from_utf8(block.get(64..64 + len)?.to_vec()).ok()?,
        };
        (eight(8)? == VERSION).then_some((head, eight(BLOCK - 16)?))
    }
}

impl Pool {
    /// The contents of an owner go to `name` in `files`, and its pages back to the pool. With `orphan` the
    /// caller knows that whoever used them is gone. Durable when this returns.
    ///
    /// # Errors
    /// [`Refused::Running`], [`Refused::PagedOut`], [`Refused::Pieces`], [`Refused::InTheWay`]: nothing was
    /// changed. [`Error::Medium`]: the contents are in the pool; if it was the pool's medium, it may be that the
    /// file counts already, and the pool takes no more changes until it was opened again and says which.
    pub fn page_out(
        &self,
        owner: &str,
        files: &dyn Directory,
        name: &str,
        orphan: bool,
    ) -> Result<(), Error> {
        let mut inner = self.lock();
        inner.known()?;
        let (generation, plan) = inner.ledger.number_file(owner, orphan)?;
        inner.is_there(owner, files, name, false)?;
        let id = u128::from_be_bytes(inner.sb.id);
        let new = format!("{name}.{id:032x}.new");
        let left = inner.is_there(owner, files, &new, true)?;
        inner.commit(plan)?;
        if left {
            files.remove(&new)?;
        }
        let file = files.create(&new)?;
        inner.write_file(owner, generation, &*file)?;
        files.rename(&new, name)?;
        files.sync()?;
        let plan = inner.ledger.page_out(owner, orphan)?;
        inner.commit(plan)
    }

    /// The contents of an owner come back from `name` in `files`, which goes then. Durable when this returns.
    ///
    /// # Errors
    /// [`Error::File`]: it is not what was left there; [`Refused`]: no room, or they are in the pool
    /// already; [`Error::Medium`]: they are in the file; if it was the pool's medium, it may be that they are in
    /// the pool, which takes no more changes until it was opened again and says which.
    pub fn page_in(&self, owner: &str, files: &dyn Directory, name: &str) -> Result<(), Error> {
        let mut inner = self.lock();
        inner.known()?;
        if inner.ledger.owner(owner)?.state != crate::State::PagedOut {
            return Err(Refused::InPool(owner.to_owned()).into());
        }
        let file = files.open(name, Access::Read)?;
        let (head, table) = inner.read_head(owner, &*file)?;
        let (ranges, sums) = table.split_at(head.ranges as usize * RANGE);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        let ranges: Vec<(u64, Run)> = ranges
            .chunks_exact(RANGE)
            .map(|row| {
                let run = Run::new(number(&row[8..16]), number(&row[16..24]));
                (number(&row[..8]), run)
            })
            .collect();
        let wrong = |what: &str| wrong(&*file, what);
        let sum = ranges
            .iter()
            .try_fold(0u64, |sum, (_, run)| sum.checked_add(run.len));
        if sum != Some(head.pages) {
            return Err(wrong("its ranges are not as many pages as it has"));
        }
        let (before, after) = inner.ledger.page_in(owner, &ranges)?;
        let places: Vec<Run> = before
            .changes
            .iter()
            .filter_map(|change| match change {
                crate::Change::Dirty(run) => Some(*run),
                _ => None,
            })
            .collect();
        inner.commit(before)?;
        let sums: Vec<u32> = sums.chunks_exact(4).map(|sum| number(sum) as u32).collect();
        let first = PAGE + table.len() as u64;
        inner.fill(&*file, first, &places, &sums)?;
        inner.commit(after)?;
        // The contents count in the pool. A file that stays has a number that is never read again.
        if files.remove(name).is_ok() {
            let _ = files.sync();
        }
        Ok(())
    }
}

fn wrong(file: &dyn Medium, what: &str) -> Error {
    let (place, what) = (file.place(), what.to_owned());
    Error::File { place, what }
}

impl Inner {
    /// Whether there is a file of this name. One that this pool did not write for this owner is refused; where
    /// the name says that it did, one that is not finished is as good.
    fn is_there(
        &self,
        owner: &str,
        files: &dyn Directory,
        name: &str,
        unfinished: bool,
    ) -> Result<bool, Error> {
        let file = match files.open(name, Access::Read) {
            Err(error) if error.is_not_found() => return Ok(false),
            file => file?,
        };
        let mut block = vec![0; BLOCK];
        let head = match file.geometry()?.len {
            ..PAGE => None,
            PAGE.. => {
                file.read(0, &mut block)?;
                Head::decode(&block)
            }
        };
        match head {
            Some((head, _)) if head.pool == self.sb.id && head.owner == owner => Ok(true),
            None if unfinished => Ok(true),
            _ => {
                let (file, owner) = (file.place(), owner.to_owned());
                Err(Refused::InTheWay { file, owner }.into())
            }
        }
    }

    /// Writes all that an owner has; durable when this returns.
    fn write_file(&self, owner: &str, generation: u64, file: &dyn Medium) -> Result<(), Error> {
        let extents = || self.ledger.extents_of(owner);
        let pieces =
            || extents().flat_map(|extent| extent.pieces.iter().map(move |p| (extent.id, p)));
        let head = Head {
            pool: self.sb.id,
            owner: owner.to_owned(),
            generation,
            ranges: pieces().count() as u64,
            pages: extents().map(crate::Extent::populated).sum(),
        };
        let len = head.table_len().ok_or(Refused::Size)?;
        let mut table = Vec::with_capacity(len as usize);
        for (id, piece) in pieces() {
            for number in [id, piece.at, piece.run.len] {
                table.extend(number.to_le_bytes());
            }
        }
        let mut at = PAGE + len;
        let mut bytes = vec![0; (STEP * PAGE) as usize];
        for (_, piece) in pieces() {
            for start in (piece.run.start..piece.run.end()).step_by(STEP as usize) {
                let part = STEP.min(piece.run.end() - start) * PAGE;
                let bytes = &mut bytes[..part as usize];
                self.medium.read(start * PAGE, bytes)?;
                for page in bytes.chunks_exact(BLOCK) {
                    table.extend(crc32c::crc32c(page).to_le_bytes());
                }
                file.write(at, bytes)?;
                at += part;
            }
        }
        table.resize(len as usize, 0);
        if !table.is_empty() {
            file.write(PAGE, &table)?;
        }
        file.write(0, &head.encode(&table))?;
        // Media take space ahead of what is written.
        file.truncate(at)?;
        file.flush()?;
        Ok(())
    }

    /// The head of an owner's file, and its table: what this pool wrote there last.
    fn read_head(&self, owner: &str, file: &dyn Medium) -> Result<(Head, Vec<u8>), Error> {
        let len = file.geometry()?.len;
        let mut block = vec![0; BLOCK];
        if len < PAGE {
            return Err(wrong(file, "it ends before its first block does"));
        }
        file.read(0, &mut block)?;
        let found = Head::decode(&block);
        let (head, sum) =
            found.ok_or_else(|| wrong(file, "it has no contents of an owner, or is damaged"))?;
        let expected = self.ledger.owner(owner)?.generation;
        if head.pool != self.sb.id || head.owner != owner {
            return Err(wrong(file, "it belongs to another pool or another owner"));
        }
        if head.generation != expected {
            let (found, what) = (head.generation, "it is of paging out number");
            return Err(wrong(
                file,
                &format!("{what} {found}; number {expected} counts"),
            ));
        }
        let table = head.table_len().filter(|table| {
            let pages = head.pages.checked_mul(PAGE);
            let all = pages.and_then(|pages| pages.checked_add(PAGE + table));
            // The file is as long as all of it, so what is read is not more than somebody stored.
            all.is_some_and(|all| all <= len)
        });
        let table = table.ok_or_else(|| wrong(file, "it is too short"))?;
        let mut bytes = vec![0; table as usize];
        file.read(PAGE, &mut bytes)?;
        if xxh3_64(&bytes) != sum {
            return Err(wrong(file, "its table is damaged"));
        }
        Ok((head, bytes))
    }

    /// Fills pages of the pool from a file, from byte `at` of it on; durable when this returns.
    fn fill(
        &mut self,
        file: &dyn Medium,
        mut at: u64,
        places: &[Run],
        sums: &[u32],
    ) -> Result<(), Error> {
        let mut sums = sums.iter();
        let mut bytes = vec![0; (STEP * PAGE) as usize];
        for run in places {
            for start in (run.start..run.end()).step_by(STEP as usize) {
                let part = STEP.min(run.end() - start) * PAGE;
                let bytes = &mut bytes[..part as usize];
                file.read(at, bytes)?;
                for (n, page) in (0..).zip(bytes.chunks_exact(BLOCK)) {
                    if sums.next() != Some(&crc32c::crc32c(page)) {
                        let what = format!("the page at byte {} is damaged", at + n * PAGE);
                        return Err(wrong(file, &what));
                    }
                }
                self.medium.write(start * PAGE, bytes)?;
                at += part;
            }
        }
        self.flush()?;
        Ok(())
    }
}
