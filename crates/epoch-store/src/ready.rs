//! Space for the epoch of a power event, written ahead.
//!
//! Space that was only taken is given to a file's data at the first write, and a file system notes
//! that in its journal, which the flush must then write too. So a piece of the log is kept ready
//! whose blocks were written (with zeros) and flushed before: an epoch that goes there changes data
//! and nothing else.
//!
//! # Rules
//! - The ready piece lies beyond the end of the log, so nothing there is ever looked at. It lies
//!   [`APART`] of its lengths away from the end, because ordinary epochs use it up when they come to
//!   it: so being ready costs one byte for every [`APART`] that are written.
//! - It is written in pieces of [`PIECE`] bytes, one a call, so that nobody waits for it for long; the
//!   flush of the next commit makes it durable.
//! - An epoch that uses it leaves a gap in the log, which is free space until the next base.

use crate::damage;
use crate::store::Store;
use crate::stripe::{REPAIRABLE, STRIPE, WIDTH};
use crate::writer::Writer;
use outlive_epoch::{EpochWriter, StoreError};
use outlive_media::BLOCK;

/// Bytes of zeros that are written at a time.
pub const PIECE: u64 = 4 << 20;
/// How many of its lengths the ready piece lies beyond the end of the log.
pub const APART: u64 = 8;

/// What was done ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Bytes that were written.
    pub written: u64,
    /// Whether there is more to do.
    pub more: bool,
}

/// A piece of the log that is being, or was, written ahead.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    generation: u64,
    from: u64,
    /// Zeros were written up to here …
    done: u64,
    /// … and are to be up to here.
    to: u64,
}

impl Ready {
    fn is_whole(&self) -> bool {
        self.done == self.to
    }
}

/// What an epoch takes in the log that holds so many bytes: with parity, and with tables that stand
/// twice, which are taken to be small.
fn with_redundancy(len: u64) -> u64 {
    let parity = (len / (STRIPE * BLOCK as u64) + 1) * WIDTH * BLOCK as u64;
    len.saturating_add(parity).saturating_add(REPAIRABLE)
}

impl Store {
    /// Writes a piece of the space for an event's epoch of `len` bytes ahead. Does nothing before the
    /// first epoch.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Medium`]; epochs can be written all the same.
    pub fn write_ahead(&mut self, len: u64) -> Result<Ahead, StoreError> {
        let Some(live) = self.current.as_ref().filter(|_| self.is_settled()) else {
            return Ok(Ahead::default());
        };
        let (number, end) = (live.generation.number, live.record.log_end());
        let block = BLOCK as u64;
        let len = with_redundancy(len)
            .max(block)
            .checked_next_multiple_of(block);
        let from = len.and_then(|len| end.checked_add(len.checked_mul(APART)?));
        let (Some(len), Some(from)) = (len, from) else {
            return Ok(Ahead::default());
        };
        let usable = self
            .ready
            .filter(|r| r.generation == number && r.from >= end && r.to - r.from >= len / 2);
        let mut ready = usable.unwrap_or(Ready {
            generation: number,
            from,
            done: from,
            to: from.saturating_add(len),
        });
        let piece = PIECE.min(ready.to - ready.done);
        let zeros = vec![0; usize::try_from(piece).unwrap_or(0)];
        if piece > 0 {
            live.generation
                .medium
                .write(ready.done, &zeros)
                .map_err(damage::medium)?;
            ready.done += piece;
        }
        self.ready = Some(ready);
        Ok(Ahead {
            written: piece,
            more: !ready.is_whole(),
        })
    }

    /// Begins the epoch of a power event: as [`Store::begin`], in space that was written ahead, where
    /// there is some, and with pages as they are.
    ///
    /// # Errors
    /// As for [`Store::begin`].
    pub fn begin_event(&mut self) -> Result<Box<Writer<'_>>, StoreError> {
        let ready = self.ready;
        let mut writer = self.begin()?;
        writer.hurry();
        if let Some(ready) = ready.filter(Ready::is_whole) {
            writer.start_at(ready.generation, ready.from);
        }
        Ok(writer)
    }
}
