//! A pool on a medium: each operation is one transaction of the tables, and what it gives away is zeros.
//!
//! # Rules
//! - The order of every change: zero what is given (durable), then the transaction (durable), then the
//!   ledger in memory. A crash before the transaction leaves what was; the pages are as dirty as before.
//! - Everything goes through one lock, reads of extents too: so nobody reads a page that has just become
//!   somebody else's.
//! - A change whose record is on its way, or a flush, can fail so that nobody knows what is durable. The ledger
//!   in memory may not be the one that counts then: nothing is read, written or changed until the pool was
//!   opened again.
//!
//! # What it refuses
//! To make a pool of a medium that holds anything, unless told to. To open what is damaged, or inconsistent (a page of two owners, rows beyond the pool): nothing is
//! changed then.

use crate::error::Error;
use crate::journal::Journal;
use crate::ledger::{Change, Holder, Ledger, Plan, Request, State};
use crate::refused::Refused;
use crate::run::{PAGE, Run};
use crate::shape::{Shape, Super};
use crate::tables::Root;
use outlive_media::{Access, BLOCK, Medium, MediumError, is_blank};
use resilient_heap::{Backed, Heap, Options, Scrubbed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages that are read or zeroed at a time.
pub(crate) const STEP: u64 = 256;

/// Runs that are zeroed in one transaction, at most.
const SCRUB_RUNS: usize = 64;

/// Pages that are zeroed at most before others get a turn: 256 MiB.
const SCRUB_PAGES: u64 = 1 << 16;

/// What the medium said last, where a heap's error has no room for it.
type Said = Arc<Mutex<Option<MediumError>>>;

/// A pool. Clones are the same pool.
#[derive(Clone)]
pub struct Pool(Arc<Mutex<Inner>>);

pub(crate) struct Inner {
    pub medium: Arc<dyn Medium>,
    heap: Heap<Root<'static>>,
    pub ledger: Ledger,
    said: Said,
    pub sb: Super,
    access: Access,
    mended: bool,
    /// A change or a flush failed, and what is durable is not known.
    unknown: bool,
}

/// What reading all of a pool's own data found.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What the heap of the tables says.
    pub tables: Scrubbed,
    /// A copy of the superblock was damaged; in a pool opened for writing it is right again.
    pub mended: bool,
    /// Free pages that were read.
    pub read: u64,
    /// Free pages that are thought to be zeros and are not.
    pub unscrubbed: Vec<Run>,
}

fn heap_error(
    place: &str,
    said: &Mutex<Option<MediumError>>,
    error: resilient_heap::Error,
) -> Error {
    use resilient_heap::Error as Heap;
    let medium = said.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (medium, error) {
        (Some(medium), _) => Error::Medium(medium),
        (None, error @ (Heap::NotAHeap | Heap::Layout { .. } | Heap::Damaged { .. }))
        | (None, error @ (Heap::Lost { .. } | Heap::Invalid { .. })) => Error::Damaged {
            place: place.to_owned(),
            what: format!("its tables: {error}"),
        },
        (None, error) => Error::Tables(error),
    }
}

/// Opens the heap of the tables; makes it as `first` says where it is missing, or refuses.
fn open_tables(
    medium: &Arc<dyn Medium>,
    sb: Super,
    access: Access,
    first: Option<&Ledger>,
) -> Result<(Heap<Root<'static>>, Said), Error> {
    let (bytes, journal, unreadable) =
        Journal::open(Arc::clone(medium), sb, access == Access::Read)?;
    let said = journal.said();
    let fail = |error| heap_error(&medium.place(), &said, error);
    let mend = unreadable > 0 && access == Access::Write;
    if mend {
        // What opening writes over a page that cannot be read must be what was there.
        let (mut heap, _) = open_tables(medium, sb, Access::Read, None)?;
        let lost = heap.scrub().map_err(fail)?.lost.len();
        if lost > 0 {
            let place = medium.place();
            let what = format!(
                "{unreadable} pages of its tables cannot be read, {lost} lines of them are lost"
            );
            return Err(Error::Damaged { place, what });
        }
    }
    let memory = Backed::new(&bytes, journal).map_err(fail)?;
    let id = sb
        .id
        .iter()
        .fold(1, |id: u64, byte| id.rotate_left(7) ^ u64::from(*byte));
    // A pool whose tables are gone must never become an empty one: every page would be given out again.
    let first = first.ok_or(resilient_heap::Error::NotAHeap);
    let options = Options::default()
        .zone_pages(u64::from(sb.shape.zone))
        .log_pages(u64::from(sb.shape.log))
        .identity(id.max(1));
    let mut heap = options
        .open(memory, |tx| Root::new(tx, first?))
        .map_err(fail)?;
    if mend {
        // What the heap knows of these pages is written over them.
        heap.scrub().map_err(fail)?;
    }
    Ok((heap, said))
}

impl Pool {
    /// Makes a pool, whose identity is `id`, which should be random. `blank` says that the medium is known
    /// to be zeros; else every page is zeroed before somebody gets it. A medium of which the first or last MiB
    /// has anything but zeros is refused; with `force` whatever is there is lost. Durable when this returns;
    /// a crash before leaves no pool.
    ///
    /// # Errors
    /// [`Refused::Taken`], [`Refused::TooSmall`], [`Error::Medium`].
    pub fn create(
        medium: Arc<dyn Medium>,
        shape: Shape,
        id: [u8; 16],
        blank: bool,
        force: bool,
    ) -> Result<Self, Error> {
        let mut ledger = Ledger::new(shape.space()?);
        ledger.most = shape.most_pieces();
        if !force && !is_blank(&*medium)? {
            return Err(Refused::Taken(medium.place()).into());
        }
        if blank {
            ledger.dirty.remove(ledger.space());
        }
        let sb = Super { id, shape };
        Super::erase(&*medium)?;
        Journal::format(Arc::clone(&medium), sb)?;
        let (heap, said) = open_tables(&medium, sb, Access::Write, Some(&ledger))?;
        sb.write(&*medium)?;
        let (access, mended, unknown) = (Access::Write, false, false);
        let inner = Inner {
            medium,
            heap,
            ledger,
            said,
            sb,
            access,
            mended,
            unknown,
        };
        Ok(Self(Arc::new(Mutex::new(inner))))
    }

    /// Opens a pool. With [`Access::Read`] the medium stays as it is, whatever a crash left.
    ///
    /// # Errors
    /// [`Error::NoPool`], [`Error::Damaged`], [`Error::Medium`].
    pub fn open(medium: Arc<dyn Medium>, access: Access) -> Result<Self, Error> {
        let (sb, both) = Super::find(&*medium)?;
        let space = sb.shape.space()?;
        let (heap, said) = open_tables(&medium, sb, access, None)?;
        let damaged = |what| Error::Damaged {
            place: medium.place(),
            what,
        };
        let rows = heap.read(|root, snapshot| root.rows(snapshot));
        let rows = rows.map_err(|error| heap_error(&medium.place(), &said, error))?;
        let mut ledger = Ledger::load(space, rows).map_err(damaged)?;
        ledger.most = sb.shape.most_pieces();
        if !both && access == Access::Write {
            sb.write(&*medium)?;
        }
        let (mended, unknown) = (!both, false);
        let inner = Inner {
            medium,
            heap,
            ledger,
            said,
            sb,
            access,
            mended,
            unknown,
        };
        Ok(Self(Arc::new(Mutex::new(inner))))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic leaves the ledger behind the tables at worst, never the tables half-changed; who goes on
        // with such a pool gets an error of the heap, or plans that do not fit.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of the pool, now.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.lock().ledger.clone()
    }

    /// The identity of the pool.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.lock().sb.id
    }

    /// The sizes of its parts.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.lock().sb.shape
    }

    /// A new extent, all zeros; its number. Durable when this returns, as are all the others.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Medium`]
    pub fn allocate(&self, request: &Request) -> Result<u64, Error> {
        let mut inner = self.lock();
        let (id, plan) = inner.ledger.allocate(request)?;
        inner.commit(plan)?;
        Ok(id)
    }

    /// An extent comes back. Its pages are zeroed before somebody else gets them, or by [`Pool::scrub`].
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Medium`]
    pub fn release(&self, id: u64) -> Result<(), Error> {
        let mut inner = self.lock();
        let plan = inner.ledger.release(id)?;
        inner.commit(plan)
    }

    /// All extents of an owner come back, one after the other, and then the owner goes; how many they were.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Medium`]: some may have come back.
    pub fn release_owner(&self, name: &str) -> Result<u64, Error> {
        let mut inner = self.lock();
        let mut count = 0;
        loop {
            let (plan, extent) = inner.ledger.release_owner(name)?;
            inner.commit(plan)?;
            match extent {
                Some(_) => count += 1,
                None => return Ok(count),
            }
        }
    }

    /// Zeroes all free pages that are not zeros yet; how many they were. It is many transactions, and others
    /// get their turns between them.
    ///
    /// # Errors
    /// [`Error::Medium`]: some may be zeroed.
    pub fn scrub(&self) -> Result<u64, Error> {
        let (mut pages, mut from) = (0, 0);
        loop {
            let mut inner = self.lock();
            inner.known()?;
            let end = inner.ledger.space().end();
            let rest = Run::new(from, end - from);
            let mut left = SCRUB_PAGES;
            let mut runs = inner.ledger.dirty().within(rest);
            runs.truncate(SCRUB_RUNS);
            for run in &mut runs {
                run.len = run.len.min(left);
                left -= run.len;
            }
            runs.retain(|run| run.len > 0);
            // What becomes dirty behind this is left to the next who scrubs: so there is an end.
            let Some(last) = runs.last() else {
                return Ok(pages);
            };
            from = last.end();
            pages += SCRUB_PAGES - left;
            inner.commit(Plan::zeroing(runs))?;
        }
    }

    /// Notes who uses an owner's contents from now on; `None` says that nobody does.
    ///
    /// # Errors
    /// [`Refused::Running`], [`Refused::PagedOut`], [`Error::Medium`]
    pub fn hold(&self, name: &str, holder: Option<Holder>) -> Result<(), Error> {
        let mut inner = self.lock();
        let plan = inner.ledger.hold(name, holder)?;
        inner.commit(plan)
    }

    /// Owners that are in use by somebody who, as `alive` says, is gone.
    pub fn orphans(&self, alive: impl Fn(&Holder) -> bool) -> Vec<String> {
        let inner = self.lock();
        let owners = inner.ledger.owners();
        let gone = owners.filter(|(_, owner)| match &owner.state {
            State::Running(holder) => !alive(holder),
            State::Stopped | State::PagedOut => false,
        });
        gone.map(|(name, _)| name.to_owned()).collect()
    }

    /// Reads the tables and checks every line; with `free`, all free pages too. What can be repaired is, in
    /// a pool opened for writing.
    ///
    /// # Errors
    /// [`Error::Medium`]
    pub fn verify(&self, free: bool) -> Result<Verified, Error> {
        let mut inner = self.lock();
        inner.known()?;
        let tables = inner.heap.scrub();
        let tables = tables.map_err(|error| inner.fail(error))?;
        let (mut read, mut unscrubbed) = (0, Vec::new());
        let runs = if free {
            inner.ledger.free().runs()
        } else {
            Vec::new()
        };
        let mut bytes = vec![0; (STEP * PAGE) as usize];
        for run in runs {
            for start in (run.start..run.end()).step_by(STEP as usize) {
                let part = Run::new(start, STEP.min(run.end() - start));
                let bytes = &mut bytes[..(part.len * PAGE) as usize];
                inner.medium.read(part.start * PAGE, bytes)?;
                read += part.len;
                let pages = (part.start..).zip(bytes.chunks_exact(BLOCK));
                let other = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
                let other = other.map(|(page, _)| Run::new(page, 1));
                unscrubbed
                    .extend(other.filter(|page| inner.ledger.dirty().within(*page).is_empty()));
            }
        }
        let unscrubbed = crate::run::merged(unscrubbed);
        Ok(Verified {
            tables,
            mended: inner.mended,
            read,
            unscrubbed,
        })
    }
}

impl Inner {
    fn fail(&self, error: resilient_heap::Error) -> Error {
        heap_error(&self.medium.place(), &self.said, error)
    }

    /// Refuses where what is durable is not known.
    pub fn known(&self) -> Result<(), Error> {
        if self.unknown {
            let place = self.medium.place();
            return Err(Error::Unknown { place });
        }
        Ok(())
    }

    /// Makes all that was written durable. If it fails, writes of anybody may be lost, and a flush after it would
    /// say nothing of that.
    pub fn flush(&mut self) -> Result<(), MediumError> {
        let done = self.medium.flush();
        self.unknown |= done.is_err();
        done
    }

    /// Zeroes what a plan gives away, makes it durable, and takes it over.
    pub fn commit(&mut self, mut plan: Plan) -> Result<(), Error> {
        if plan.changes.iter().any(|c| matches!(c, Change::Dirty(_))) {
            self.tidy()?;
        }
        // What is free and zeros may be noted as such at any time, so not all of it need be in one transaction.
        while plan.scrub.len() > SCRUB_RUNS {
            let part = plan.scrub.split_off(plan.scrub.len() - SCRUB_RUNS);
            plan.changes
                .retain(|change| !matches!(change, Change::Clean(run) if part.contains(run)));
            self.carry_out(Plan::zeroing(part))?;
        }
        self.carry_out(plan)
    }

    /// Zeroes the shortest runs of dirty pages where there are so many that a transaction could not change all of
    /// them. No more than it must: somebody waits.
    fn tidy(&mut self) -> Result<(), Error> {
        let mut runs: Vec<Run> = self.ledger.dirty().runs().collect();
        let few = self.ledger.most / 2;
        if runs.len() > few {
            runs.sort_by_key(|run| run.len);
            runs.truncate(runs.len() - few + few / 16);
            for part in runs.chunks(SCRUB_RUNS) {
                self.carry_out(Plan::zeroing(part.to_vec()))?;
            }
        }
        Ok(())
    }

    /// A plan that fits into one transaction.
    fn carry_out(&mut self, plan: Plan) -> Result<(), Error> {
        self.known()?;
        if self.access == Access::Read {
            let (place, what) = (self.medium.place(), "the pool was opened for reading only");
            return Err(MediumError::Misuse { place, what }.into());
        }
        if !plan.scrub.is_empty() {
            let zeros = vec![0; (STEP * PAGE) as usize];
            for run in &plan.scrub {
                for start in (run.start..run.end()).step_by(STEP as usize) {
                    let len = STEP.min(run.end() - start);
                    self.medium
                        .write(start * PAGE, &zeros[..(len * PAGE) as usize])?;
                }
            }
            self.flush()?;
        }
        if plan.changes.is_empty() {
            return Ok(());
        }
        let dirty = &self.ledger.dirty;
        let done = self
            .heap
            .write(|root, tx| root.apply(tx, &plan.changes, dirty));
        if let Err(error) = done {
            use resilient_heap::Error as Heap;
            // Anything else is said before the heap begins to write.
            self.unknown = matches!(error, Heap::Memory { .. } | Heap::Halted);
            return Err(self.fail(error));
        }
        if self.ledger.apply(plan.changes) {
            return Ok(());
        }
        self.unknown = true;
        Err(Error::Damaged {
            place: self.medium.place(),
            what: "a page was about to get a second owner".to_owned(),
        })
    }
}
