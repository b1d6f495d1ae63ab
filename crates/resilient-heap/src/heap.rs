//! The heap: opening, reading, writing.
//!
//! # Safety
//! The one reference made here is to the root, which the walk checked when the heap was opened.
#![allow(unsafe_code)]

use crate::block::{self, Access, Sealed};
use crate::error::Error;
use crate::front::Front;
use crate::home::{Aligned, Health, Home, Scrubbed, View};
use crate::layout::{Geometry, SCHEMA_LEN, Super};
use crate::memory::Memory;
use crate::persist::{Family, Of, Schema};
use crate::reading::Reading;
use crate::transaction::{Brand, Transaction, Tx, Writer, make_root, run};
use crate::{log, superblock, walk};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::marker::PhantomData;

/// When a transaction becomes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// Before [`Heap::write`] returns.
    #[default]
    Each,
    /// Together with others, when so many wait, or at [`Heap::sync`]. A crash takes back those that
    /// wait: all of them, or none. Readers do not see them before.
    Group(u32),
    /// At [`Heap::sync`] only, which the caller makes part of its own epochs.
    Barrier,
}

/// How a heap is made, and used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    zone: u64,
    log: u64,
    id: u64,
    durability: Durability,
    turn: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            zone: 1024,
            log: 64,
            id: 0,
            durability: Durability::Each,
            turn: log::ENOUGH,
        }
    }
}

impl Options {
    /// Data pages (of 4096 bytes) of a zone of a new heap: a power of two from 16 on; 1024 where this is
    /// not called. One value, or one vector, fits into a zone. From 1024 on, the loss of any one page is
    /// survived.
    #[must_use]
    pub fn zone_pages(mut self, pages: u64) -> Self {
        self.zone = pages;
        self
    }

    /// Pages of each half of the log of a new heap; 64 where this is not called. A page holds 53 lines
    /// of 64 bytes; this is the most that one transaction changes.
    #[must_use]
    pub fn log_pages(mut self, pages: u64) -> Self {
        self.log = pages;
        self
    }

    /// Lines of the log after which its other half is begun, and what the commits of this one changed is
    /// flushed: 1024 where this is not called. More of them save flushes of lines that change often; after a crash,
    /// up to twice as many are written again.
    #[must_use]
    pub fn turn_after(mut self, lines: usize) -> Self {
        self.turn = lines;
        self
    }

    /// The identity of a new heap, by which its lines are told from those of others; should be random.
    /// With `std` it is, where this is not called.
    #[must_use]
    pub fn identity(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// When transactions become durable.
    #[must_use]
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Opens the heap in `memory`; where there is none yet, makes one, whose root is what `init` says.
    ///
    /// # Errors
    /// [`Error::NotAHeap`], [`Error::Layout`]: nothing was changed. [`Error::Damaged`], [`Error::Lost`],
    /// [`Error::Invalid`], [`Error::Memory`], [`Error::Full`]; and those of `init`.
    pub fn open<R: Family>(
        self,
        memory: impl Memory + 'static,
        init: impl for<'h> FnOnce(&Tx<'h>) -> Result<R::At<'h>, Error>,
    ) -> Result<Heap<R>, Error> {
        let (home, superblock, opened) = self.bring_home::<R>(Box::new(memory))?;
        let mut space = walk::empty_space(&home.geometry, superblock.zones);
        let fresh = !walk::has_root(&home)?;
        if !fresh {
            walk::walk(&home, Of::<R::At<'_>>::KIND, &mut space)?;
        }
        let mut front = Front::new(home.geometry);
        for _ in 0..superblock.zones {
            front.add_zone()?;
        }
        let writer = RefCell::new(Writer::new(
            front,
            space,
            superblock,
            (log::Log::new(self.turn), opened.next),
            self.durability,
        ));
        if fresh {
            make_root::<R>(&home, &writer, init)?;
            // What a heap begins with may be large: it does not stay in the log.
            writer.borrow_mut().retire(&home)?;
        }
        Ok(Heap {
            home: Arc::new(home),
            writer,
            opened: Opened {
                created: fresh,
                replayed: opened.replayed,
                discarded: opened.discarded,
            },
            root: PhantomData,
        })
    }

    fn bring_home<R: Family>(
        &self,
        memory: Box<dyn Memory>,
    ) -> Result<(Home, Super, log::Recovered), Error> {
        let geometry = Geometry::new(self.zone, self.log).ok_or(Error::Invalid {
            what: "a zone has a power of two of pages, 16 at least, and a log one page at least",
            at: 0,
        })?;
        let schema = Schema::of::<R::At<'_>>();
        let mut home = Home::new(memory, geometry, 0, 0);
        let superblock = match superblock::find(&mut home, geometry)? {
            Some(found) => {
                let stored = superblock::schema(&home, &found);
                if found.fingerprint != schema.fingerprint() {
                    let wanted = schema.text().to_string();
                    return Err(Error::Layout { stored, wanted });
                }
                superblock::mend(&home, &found)?;
                found
            }
            None => {
                let wanted = Super {
                    id: if self.id == 0 { random() } else { self.id },
                    version: 0,
                    geometry,
                    zones: 1,
                    schema: SCHEMA_LEN,
                    fingerprint: schema.fingerprint(),
                };
                superblock::format(&mut home, wanted, schema.text())?
            }
        };
        let recovered = log::recover(&home)?;
        Ok((home, superblock, recovered))
    }
}

#[cfg(feature = "std")]
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(1) | 1
}

#[cfg(not(feature = "std"))]
fn random() -> u64 {
    1
}

/// What opening found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// There was no heap, or one without a root; now there is.
    pub created: bool,
    /// Commits that a crash had left half-way at home, and that were completed.
    pub replayed: u32,
    /// A commit was found incomplete and was discarded: the crash came before it was acknowledged, or
    /// the log was damaged beyond correction.
    pub discarded: bool,
}

/// Data that survives. `R` is the type of its root.
pub struct Heap<R> {
    home: Arc<Home>,
    writer: RefCell<Writer>,
    opened: Opened,
    root: PhantomData<fn() -> R>,
}

impl<R: Family> Heap<R> {
    /// Opens the heap in `memory` with the usual [`Options`].
    ///
    /// # Errors
    /// See [`Options::open`].
    pub fn open(
        memory: impl Memory + 'static,
        init: impl for<'h> FnOnce(&Tx<'h>) -> Result<R::At<'h>, Error>,
    ) -> Result<Self, Error> {
        Options::default().open(memory, init)
    }

    /// What opening found.
    #[must_use]
    pub fn opened(&self) -> Opened {
        self.opened
    }

    /// Shows `f` the root as the last durable transaction left it.
    ///
    /// # Errors
    /// Those of `f`; [`Error::Lost`].
    pub fn read<O>(
        &self,
        f: impl for<'h, 'a> FnOnce(&'a R::At<'h>, &'a Snapshot<'h>) -> Result<O, Error>,
    ) -> Result<O, Error> {
        read::<R, O>(&self.home, f)
    }

    /// A way to read from other threads, also while this one writes. The writer waits with the end of
    /// its commit until those are done that read then; so a thread that would write from within its own
    /// reading is refused with [`Error::WithinReading`] (without `std` it would wait for ever).
    #[must_use]
    pub fn reader(&self) -> Reader<R> {
        Reader {
            home: Arc::clone(&self.home),
            root: PhantomData,
        }
    }

    /// Lets `f` change what the root reaches. If it fails or panics, nothing was changed.
    ///
    /// # Errors
    /// Those of `f`; [`Error::TransactionTooLarge`], [`Error::Halted`], [`Error::Memory`].
    pub fn write<O>(
        &mut self,
        f: impl for<'h, 'a> FnOnce(&'a mut R::At<'h>, &'a Tx<'h>) -> Result<O, Error>,
    ) -> Result<O, Error> {
        self.transaction(|transaction| {
            let (root, tx) = transaction.parts()?;
            f(root, tx)
        })
    }

    /// As [`Heap::write`], for transactions that have others within them.
    ///
    /// # Errors
    /// See [`Heap::write`].
    pub fn transaction<O>(
        &mut self,
        f: impl for<'h> FnOnce(&mut Transaction<'h, R>) -> Result<O, Error>,
    ) -> Result<O, Error> {
        run::<R, O>(&self.home, &self.writer, f)
    }

    /// From now on as these options say.
    #[cfg(feature = "std")]
    pub(crate) fn set_durability(&mut self, options: Options) {
        self.writer.get_mut().durability = options.durability;
    }

    /// Makes durable what [`Durability`] lets wait.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Halted`]
    pub fn sync(&mut self) -> Result<(), Error> {
        self.writer.get_mut().sync(&self.home)
    }

    /// Reads everything, repairs what can be repaired, and says what was found.
    ///
    /// # Errors
    /// [`Error::Memory`]
    pub fn scrub(&mut self) -> Result<Scrubbed, Error> {
        if Reading::here(&self.home) {
            return Err(Error::WithinReading);
        }
        let _alone = self.home.lock.exclusive();
        self.home.scrub(true)
    }

    /// Damage that was met since the heap was opened.
    #[must_use]
    pub fn health(&self) -> Health {
        self.home.health()
    }

    /// Bytes that nothing occupies, in the zones that there are.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.writer.borrow().space.free_bytes()
    }

    /// Makes everything durable and leaves nothing to recover.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Halted`]
    pub fn close(self) -> Result<(), Error> {
        self.retire()
    }
}

impl<R> Heap<R> {
    fn retire(&self) -> Result<(), Error> {
        let mut writer = self.writer.borrow_mut();
        writer.retire(&self.home)?;
        // Whatever comes after this object, it begins with a log that is empty.
        writer.halted = true;
        Ok(())
    }
}

impl<R> Drop for Heap<R> {
    fn drop(&mut self) {
        // An error here leaves a log to recover from, as a crash does.
        let _ = self.retire();
    }
}

/// Reads a heap from another thread.
pub struct Reader<R> {
    home: Arc<Home>,
    root: PhantomData<fn() -> R>,
}

impl<R> Clone for Reader<R> {
    fn clone(&self) -> Self {
        Self {
            home: Arc::clone(&self.home),
            root: PhantomData,
        }
    }
}

impl<R: Family> Reader<R> {
    /// As [`Heap::read`].
    ///
    /// # Errors
    /// See [`Heap::read`].
    pub fn read<O>(
        &self,
        f: impl for<'h, 'a> FnOnce(&'a R::At<'h>, &'a Snapshot<'h>) -> Result<O, Error>,
    ) -> Result<O, Error> {
        read::<R, O>(&self.home, f)
    }
}

/// One moment of a heap, to be read.
pub struct Snapshot<'h> {
    home: &'h Home,
    /// Corrected copies that references lead to.
    kept: RefCell<Vec<Box<[Aligned]>>>,
    brand: Brand<'h>,
}

impl Sealed for Snapshot<'_> {}

impl<'h> Access<'h> for Snapshot<'h> {
    fn heap_id(&self) -> u64 {
        self.home.id
    }

    fn view(&self, at: usize, len: usize) -> Result<*const u8, Error> {
        match self.home.view(at, len)? {
            View::Place(place) => Ok(place),
            View::Copy(lines) => {
                let begin = lines.as_ptr().cast::<u8>();
                // The box stays where it is while the vector grows.
                self.kept.borrow_mut().push(lines);
                Ok(begin.wrapping_add(at % crate::code::LINE))
            }
        }
    }
}

fn read<R: Family, O>(
    home: &Home,
    f: impl for<'h, 'a> FnOnce(&'a R::At<'h>, &'a Snapshot<'h>) -> Result<O, Error>,
) -> Result<O, Error> {
    let _reading = Reading::begin(home);
    let _inside = home.lock.shared();
    let snapshot = Snapshot {
        home,
        kept: RefCell::new(Vec::new()),
        brand: PhantomData,
    };
    let at = home.geometry.zone_at(0);
    // SAFETY: the root block has one value of this type: made by `make_root`, or checked by `walk` when
    // the heap was opened. Commits wait for `_inside`.
    match unsafe { block::values::<R::At<'_>>(&snapshot, at, 0, 1)? } {
        [root] => f(root, &snapshot),
        _ => Err(Error::NotAHeap),
    }
}
