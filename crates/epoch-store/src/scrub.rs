//! Checking what is stored, piece by piece, between epochs.
//!
//! # Rules
//! - A call reads [`PIECE`] bytes, or one stripe or the tables of one epoch where that is more, so that nobody waits for it for
//!   long; when which piece is due is up to the caller.
//! - What is harmed is written again at once, and flushed.
//! - A pass goes over the header, and over the tables and pages of all epochs, oldest first; those that
//!   are committed meanwhile are part of it. Then come the older generations, the newest of them first. A new base begins
//!   another pass.
//! - An older generation that was removed, or replaced by one that leaves epochs out, is not written any more.
//! - Nor is one whose newest epoch is in doubt: settling on an epoch is up to a repair, which says so.
//! - One that cannot be read or mended does not keep those behind it from being checked.
//! - What the header must be is known to the writer, so that it is mended whatever is left of it.

use crate::damage::{self, Damage, Outcome, Trouble};
use crate::format::{BLOCK_LEN, LOG_AT};
use crate::generation::{Generation, OpenError};
use crate::older;
use crate::repair;
use crate::store::{Live, Store};
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
    /// What was found of the newest generation.
    pub damages: Vec<Damage>,
    /// What was found of older ones, which the next epoch does not rest on.
    pub older: Vec<Damage>,
    /// All that is committed was checked; the next call begins anew.
    pub finished: bool,
}

/// Where a pass stands.
#[derive(Default)]
pub(crate) struct Cursor {
    /// The newest generation when it began.
    newest: u64,
    /// The one that is being checked, if that is an older one.
    older: Option<Box<Live>>,
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
        if cursor.newest != live.generation.number {
            self.scrubbing = Cursor {
                newest: live.generation.number,
                older: None,
                epoch: live.generation.superblock.first_epoch,
                pages: None,
                spare: cursor.spare,
            };
            done.bytes += LOG_AT + SEEK;
            done.damages.append(&mut live.mend_header()?);
            return Ok(());
        }
        let is_it = |older: &Live| {
            let of = |live: &Live| live.generation.superblock;
            self.older.iter().any(|live| of(live) == of(older))
        };
        let gone = cursor.older.as_ref().is_some_and(|older| !is_it(older));
        let live = cursor.older.as_deref().or(self.current.as_ref());
        let due = live
            .filter(|_| !gone)
            .is_some_and(|live| is_due(live, cursor.epoch));
        if !due {
            return self.scrub_next(cursor, done);
        }
        if let Some(live) = live {
            let mut found = Scrubbed::default();
            let step = (cursor.epoch, cursor.pages.take(), &mut cursor.spare);
            match piece(live, step, &mut found) {
                Ok(next) => (cursor.epoch, cursor.pages) = next,
                Err(error) if cursor.older.is_some() => {
                    // The next call goes on behind it.
                    cursor.epoch = u64::MAX;
                    self.scrubbing = cursor;
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
            done.bytes += found.bytes;
            match cursor.older {
                None => done.damages.append(&mut found.damages),
                Some(_) => done.older.append(&mut found.damages),
            }
        }
        self.scrubbing = cursor;
        Ok(())
    }

    /// Goes on with the next older generation, if there is one.
    fn scrub_next(&mut self, cursor: Cursor, done: &mut Scrubbed) -> Result<(), StoreError> {
        let number = |live: &Live| live.generation.number;
        let below = cursor.older.as_deref().map_or(cursor.newest, number);
        let numbers = self.older.iter().map(number).filter(|n| *n < below);
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        while let Some(number) = numbers.pop() {
            done.bytes += LOG_AT + SEEK;
            let mut older = match self.open_to_mend(number) {
                Ok(older) => older,
                Err(error) => {
                    let mut report = older::unreadable(&*self.dir, number, error);
                    done.older.append(&mut report.damages);
                    continue;
                }
            };
            match older.mend_header() {
                Ok(mut mended) => done.older.append(&mut mended),
                Err(error) => {
                    let place = &older.generation.place;
                    done.older.push(older::at_begin(place, &error));
                    continue;
                }
            }
            self.scrubbing = Cursor {
                epoch: older.generation.superblock.first_epoch,
                older: Some(Box::new(older)),
                pages: None,
                ..cursor
            };
            return Ok(());
        }
        done.finished = true;
        Ok(())
    }

    fn open_to_mend(&self, number: u64) -> Result<Live, OpenError> {
        let secret = self.secret.as_ref();
        let (generation, head) = Generation::open(&*self.dir, number, Access::Write, secret)?;
        if let Some(doubt) = head.doubt {
            return Err(OpenError::Trouble(doubt.into()));
        }
        let chain = generation.chain(&head.record)?;
        let mut older = Live::new(generation, head.record, chain);
        older.sealed = head.sealed;
        Ok(older)
    }
}

/// Whether there is anything of this epoch, or one behind it.
fn is_due(live: &Live, epoch: u64) -> bool {
    live.chain
        .last()
        .is_some_and(|(_, last)| last.epoch >= epoch)
}

/// The epoch whose tables or pages are next, with these.
type Step = (u64, Option<(Pages, u64)>);

/// Checks the tables of an epoch, or the next stripe of its pages, and says what comes then.
fn piece(
    live: &Live,
    (epoch, pages, spare): (u64, Option<(Pages, u64)>, &mut Option<Buffer>),
    done: &mut Scrubbed,
) -> Result<Step, StoreError> {
    let generation = &live.generation;
    let of_epoch = live.chain.iter().find(|(_, t)| t.epoch >= epoch);
    let Some((at, trailer)) = of_epoch else {
        return Ok((epoch, None));
    };
    let (next, found) = match pages {
        None => {
            // Where the index is lost, the tables say so.
            let pages = Pages::of(generation, *at, trailer).ok();
            done.bytes += 2 * (at + BLOCK_LEN - trailer.tables_at()) + 2 * SEEK;
            let found = tables::examine(generation, *at, trailer).or_else(listed)?;
            (pages.map(|pages| (pages, 0)), found)
        }
        Some((pages, stripe)) => {
            let blocks = pages.stored.layout.stripe(stripe).blocks();
            done.bytes += blocks * BLOCK_LEN + 2 * SEEK;
            let found = pages.examine(generation, stripe, spare)?;
            (Some((pages, stripe + 1)), found)
        }
    };
    mend(generation, found, done)?;
    let more = next.filter(|(pages, stripe)| *stripe < pages.stored.layout.stripes());
    Ok(match more {
        None => (trailer.epoch.saturating_add(1), None),
        more => (trailer.epoch, more),
    })
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
