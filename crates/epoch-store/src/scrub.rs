//! Checking what is stored, piece by piece, between epochs.
//!
//! # Rules
//! - A call reads [`PIECE`] bytes, or one stripe or the tables of one epoch where that is more, so that nobody waits for it for
//!   long; when which piece is due is up to the caller.
//! - What is harmed is written again at once, and flushed.
//! - A pass goes over the header, and over the tables and pages of all epochs, oldest first; those that
//!   are committed meanwhile are part of it. A new base begins another pass.
//! - What the header must be is known to the writer, so that it is mended whatever is left of it.

use crate::damage::{self, Damage, Outcome, Trouble};
use crate::format::{BLOCK_LEN, LOG_AT};
use crate::generation::Generation;
use crate::repair;
use crate::store::Store;
use crate::tables::{self, Found};
use crate::verify::Pages;
use outlive_epoch::StoreError;
use outlive_media::{Access, Buffer};

/// Bytes that are read at a time.
pub const PIECE: u64 = 1 << 20;
/// What reading a part costs besides its bytes, as bytes.
const SEEK: u64 = 64 << 10;

/// What was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes that were read, with a share for each access.
    pub bytes: u64,
    /// What was found.
    pub damages: Vec<Damage>,
    /// All that is committed was checked; the next call begins anew.
    pub finished: bool,
}

/// Where a pass stands.
#[derive(Default)]
pub(crate) struct Cursor {
    generation: u64,
    /// The epoch that is being checked; its tables are next, unless `pages` are there.
    epoch: u64,
    /// Its pages, and which stripe is next.
    pages: Option<(Pages, u64)>,
    spare: Option<Buffer>,
}

impl Store {
    /// Checks the next piece of what is committed, and writes again what is harmed. Does nothing
    /// before the first epoch, or for a store that is only read.
    ///
    /// # Errors
    /// [`StoreError::Medium`] where what is harmed could not be written again, or no memory is there.
    pub fn scrub(&mut self) -> Result<Scrubbed, StoreError> {
        let mut done = Scrubbed::default();
        while done.bytes < PIECE && !done.finished {
            self.scrub_part(&mut done)?;
        }
        Ok(done)
    }

    fn scrub_part(&mut self, done: &mut Scrubbed) -> Result<(), StoreError> {
        let mut cursor = std::mem::take(&mut self.scrubbing);
        let writes = self.access() == Access::Write && self.is_settled();
        let Some(live) = self.current.as_mut().filter(|_| writes) else {
            done.finished = true;
            return Ok(());
        };
        if cursor.generation != live.generation.number {
            self.scrubbing = Cursor {
                generation: live.generation.number,
                epoch: live.generation.superblock.first_epoch,
                pages: None,
                spare: cursor.spare,
            };
            done.bytes += LOG_AT + SEEK;
            done.damages.append(&mut live.mend_header()?);
            return Ok(());
        }
        let generation = &live.generation;
        let of_epoch = live.chain.iter().find(|(_, t)| t.epoch >= cursor.epoch);
        let Some((at, trailer)) = of_epoch else {
            done.finished = true;
            return Ok(());
        };
        cursor.epoch = trailer.epoch;
        let found = match cursor.pages.take() {
            None => {
                // Where the index is lost, the tables say so.
                let pages = Pages::of(generation, *at, trailer).ok();
                cursor.pages = pages.map(|pages| (pages, 0));
                done.bytes += 2 * (at + BLOCK_LEN - trailer.tables_at()) + 2 * SEEK;
                tables::examine(generation, *at, trailer).or_else(listed)?
            }
            Some((pages, stripe)) => {
                let blocks = pages.stored.layout.stripe(stripe).blocks();
                done.bytes += blocks * BLOCK_LEN + 2 * SEEK;
                let found = pages.examine(generation, stripe, &mut cursor.spare)?;
                cursor.pages = Some((pages, stripe + 1));
                found
            }
        };
        let stripes = |(pages, next): &(Pages, u64)| *next < pages.stored.layout.stripes();
        if !cursor.pages.as_ref().is_some_and(stripes) {
            cursor.pages = None;
            cursor.epoch = cursor.epoch.saturating_add(1);
        }
        mend(generation, found, done)?;
        self.scrubbing = cursor;
        Ok(())
    }
}

/// Tables that are not there at all.
fn listed(trouble: Trouble) -> Result<Found, StoreError> {
    match trouble {
        Trouble::Damage(damage) => Ok(Found {
            damages: vec![*damage],
            fixes: Vec::new(),
        }),
        Trouble::Store(error) => Err(error),
    }
}

fn mend(generation: &Generation, found: Found, done: &mut Scrubbed) -> Result<(), StoreError> {
    if !found.fixes.is_empty() {
        repair::write(generation, &found.fixes).map_err(damage::medium)?;
        generation.medium.flush().map_err(damage::medium)?;
    }
    for damage in found.damages {
        let fixed = found.fixes.iter().any(|fix| fix.at == damage.offset);
        let outcome = match damage.outcome {
            Outcome::Repairable if fixed => Outcome::Repaired,
            other => other,
        };
        done.damages.push(damage.with(outcome));
    }
    Ok(())
}
