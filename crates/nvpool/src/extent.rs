//! An extent as a medium: of a fixed length, like a device. Pages that it was only promised read as zeros
//! and come when they are written.

use crate::error::Error;
use crate::pool::{Inner, Pool};
use crate::refused::Refused;
use crate::run::{PAGE, Run};
use outlive_media::{BLOCK, Geometry, Medium, MediumError};
use std::sync::MutexGuard;

/// An extent of a pool.
#[derive(Clone)]
pub struct ExtentMedium {
    pool: Pool,
    id: u64,
}

impl Pool {
    /// An extent as a medium.
    ///
    /// # Errors
    /// [`Refused::NoExtent`]
    pub fn extent(&self, id: u64) -> Result<ExtentMedium, Error> {
        self.lock().ledger.extent(id)?;
        let pool = self.clone();
        Ok(ExtentMedium { pool, id })
    }
}

impl ExtentMedium {
    /// A range of the extent gives its pages back to the pool, and reads as zeros. Both ends are multiples of
    /// [`BLOCK`]. Durable when this returns.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Medium`]
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            let what = "whole blocks of 4096 bytes can be given back";
            return Err(MediumError::Misuse {
                place: self.place(),
                what,
            }
            .into());
        }
        let mut inner = self.pool.lock();
        let plan = inner
            .ledger
            .discard(self.id, Run::new(offset / PAGE, len / PAGE))?;
        inner.commit(plan)
    }

    fn fail(&self, error: Error) -> MediumError {
        let place = self.place();
        match error {
            Error::Medium(error) => error,
            Error::Refused(Refused::NoRoom { wanted: needed, .. }) => {
                MediumError::Full { place, needed }
            }
            other => MediumError::Io {
                place,
                op: "use the pool",
                offset: 0,
                source: std::io::Error::other(other.to_string()),
            },
        }
    }

    /// Sees to it that a range has all its pages.
    fn populate(&self, inner: &mut Inner, range: Run) -> Result<(), MediumError> {
        let mut next = || -> Result<bool, Error> {
            match inner.ledger.populate(self.id, range)? {
                Some(plan) => inner.commit(plan).map(|()| true),
                None => Ok(false),
            }
        };
        while next().map_err(|error| self.fail(error))? {}
        Ok(())
    }

    /// The extent's length in pages.
    fn pages(&self) -> Result<u64, MediumError> {
        self.open().map(|(pages, _inner)| pages)
    }

    /// The extent's length in pages, and the pool.
    fn open(&self) -> Result<(u64, MutexGuard<'_, Inner>), MediumError> {
        let inner = self.pool.lock();
        inner.known().map_err(|error| self.fail(error))?;
        let extent = inner.ledger.in_pool(self.id, Run::new(0, 0));
        let pages = extent.map_err(|error| self.fail(error.into()))?.pages;
        Ok((pages, inner))
    }
}

impl Medium for ExtentMedium {
    fn place(&self) -> String {
        // Not of the pool's lock: this is called while it is held.
        format!("extent {} of a pool", self.id)
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        let (len, block) = (self.pages()? * PAGE, BLOCK as u32);
        Ok(Geometry { len, block })
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let (pages, inner) = self.open()?;
        let end = offset.saturating_add(into.len() as u64);
        if end > pages * PAGE {
            return Err(MediumError::Short {
                place: self.place(),
                end,
            });
        }
        let extent = inner
            .ledger
            .extent(self.id)
            .map_err(|e| self.fail(e.into()))?;
        let (mut at, mut rest) = (offset, into);
        while !rest.is_empty() {
            let first = at / PAGE;
            let wanted = Run::new(first, (at + rest.len() as u64).div_ceil(PAGE) - first);
            let (len, place) = extent.next(wanted);
            let bytes = ((first + len) * PAGE - at).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(bytes as usize);
            match place {
                Some(run) => inner.medium.read(run.start * PAGE + at % PAGE, now)?,
                None => now.fill(0),
            }
            (at, rest) = (at + bytes, later);
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        let (pages, mut inner) = self.open()?;
        let len = bytes.len() as u64;
        if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            let what = "a write must start at, and consist of, whole blocks of 4096 bytes";
            return Err(MediumError::Misuse {
                place: self.place(),
                what,
            });
        }
        let range = Run::new(offset / PAGE, len / PAGE);
        if range
            .start
            .checked_add(range.len)
            .is_none_or(|end| end > pages)
        {
            return Err(MediumError::Full {
                place: self.place(),
                needed: len,
            });
        }
        self.populate(&mut inner, range)?;
        let extent = inner
            .ledger
            .extent(self.id)
            .map_err(|e| self.fail(e.into()))?;
        let (mut at, mut rest) = (range.start, bytes);
        while !rest.is_empty() {
            let (len, place) = extent.next(Run::new(at, range.end() - at));
            let (now, later) = rest.split_at((len * PAGE) as usize);
            if let Some(run) = place {
                inner.medium.write(run.start * PAGE, now)?;
            }
            (at, rest) = (at + len, later);
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), MediumError> {
        let (_, mut inner) = self.open()?;
        inner.flush()
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        let (pages, mut inner) = self.open()?;
        if len > pages * PAGE {
            let (place, needed) = (self.place(), len - pages * PAGE);
            return Err(MediumError::Full { place, needed });
        }
        self.populate(&mut inner, Run::new(0, len.div_ceil(PAGE)))
    }

    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        let pages = self.pages()?;
        let keep = len.div_ceil(PAGE).min(pages);
        self.discard(keep * PAGE, (pages - keep) * PAGE)
            .map_err(|error| self.fail(error))
    }
}
