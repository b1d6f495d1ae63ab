//! Transactions: what changes in a heap, all of it or nothing.
//!
//! # Rules
//! - One transaction at a time; nested ones are levels of it. A level that ends with an error or a panic
//!   takes back what it changed.
//! - Values are changed in the working copy (`front`), through ordinary references. Only the commit of
//!   the outermost level reaches the medium.
//! - Nobody frees anything: the commit counts which pointers vanished and which are new (`count`).
//! - A nested level has a heap lifetime of its own, so that nothing made in it can be kept outside but
//!   through the root, and what was made outside and is not in the root cannot be touched.
//!
//! # Safety
//! The one reference made here is to the root, in [`Transaction::parts`], which borrows the transaction
//! mutably: there is no second one while it lives.
#![allow(unsafe_code)]

use crate::block::{self, Access, HEAD, Head, Sealed};
use crate::count;
use crate::error::Error;
use crate::front::Front;
use crate::home::{Aligned, Home};
use crate::layout::Super;
use crate::persist::{Family, Kind, Of};
use crate::reading::Reading;
use crate::space::Space;
use crate::{Durability, log, superblock};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::marker::PhantomData;

/// Ties a value to one heap: neither longer nor shorter lifetimes fit.
pub(crate) type Brand<'h> = PhantomData<fn(&'h ()) -> &'h ()>;

/// What the writing side of a heap holds.
pub(crate) struct Writer {
    pub front: Front,
    pub space: Space,
    pub superblock: Super,
    /// The number of the next commit.
    pub next: u64,
    pub durability: Durability,
    /// Transactions that are not durable yet.
    pub waiting: u32,
    /// A commit failed half-way.
    pub halted: bool,
    /// A change of the innermost level failed half-way.
    spoiled: bool,
    /// Blocks made in this transaction, with their lengths.
    pub born: BTreeMap<usize, (usize, &'static Kind)>,
    /// The same in order, and how many there were when each level began.
    order: Vec<usize>,
    marks: Vec<usize>,
    /// Blocks whose values, or the number of them, may have changed.
    pub touched: Touched,
    /// The log.
    pub log: log::Log,
    pub image: Vec<Aligned>,
}

/// Blocks by place, with the kind of their values.
#[derive(Default)]
pub(crate) struct Touched {
    /// May have a block several times, up to where it was last put in order.
    blocks: Vec<(usize, &'static Kind)>,
    ordered: usize,
}

impl Touched {
    /// Notes a block.
    pub fn add(&mut self, at: usize, kind: &'static Kind) {
        if self.blocks.last().is_some_and(|(last, _)| *last == at) {
            return;
        }
        if self.blocks.len() >= 64.max(2 * self.ordered) {
            self.order();
        }
        self.blocks.push((at, kind));
    }

    fn order(&mut self) {
        self.blocks.sort_unstable_by_key(|(at, _)| *at);
        self.blocks.dedup_by_key(|(at, _)| *at);
        self.ordered = self.blocks.len();
    }

    /// Forgets blocks that are no more; their places in order.
    fn remove(&mut self, gone: &[usize]) {
        if !gone.is_empty() {
            self.blocks
                .retain(|(at, _)| gone.binary_search(at).is_err());
        }
    }

    fn clear(&mut self) {
        self.blocks.clear();
        self.ordered = 0;
    }

    /// All of them, each once and in order; to be given back.
    pub fn take(&mut self) -> Vec<(usize, &'static Kind)> {
        self.order();
        core::mem::take(&mut self.blocks)
    }

    /// See [`Touched::take`].
    pub fn give(&mut self, blocks: Vec<(usize, &'static Kind)>) {
        self.blocks = blocks;
    }
}

impl Writer {
    pub fn new(
        front: Front,
        space: Space,
        superblock: Super,
        log: (log::Log, u64),
        d: Durability,
    ) -> Self {
        let (log, next) = log;
        Self {
            front,
            space,
            superblock,
            next,
            durability: d,
            waiting: 0,
            halted: false,
            spoiled: false,
            born: BTreeMap::new(),
            order: Vec::new(),
            marks: Vec::new(),
            touched: Touched::default(),
            log,
            image: Vec::new(),
        }
    }

    fn begin(&mut self, home: &Home) -> Result<(), Error> {
        if self.halted {
            return Err(Error::Halted);
        }
        if Reading::here(home) {
            return Err(Error::WithinReading);
        }
        if self.marks.is_empty() && self.front.pending() > log::capacity(home) / 2 {
            self.sync(home)?;
        }
        self.front.begin()?;
        self.marks.push(self.order.len());
        Ok(())
    }

    fn abort(&mut self) {
        self.front.abort();
        self.spoiled = false;
        let mark = self.marks.pop().unwrap_or(0);
        let mut gone = self.order.split_off(mark.min(self.order.len()));
        for at in &gone {
            if let Some((len, _)) = self.born.remove(at) {
                self.space.give(*at, len);
            }
        }
        gone.sort_unstable();
        self.touched.remove(&gone);
        if self.marks.is_empty() {
            self.touched.clear();
        }
    }

    fn commit(&mut self, home: &Home) -> Result<(), Error> {
        if self.spoiled {
            return Err(Error::Aborted("a change of a map failed half-way"));
        }
        if self.marks.len() > 1 {
            self.marks.pop();
            self.front.merge();
            return Ok(());
        }
        let dead = count::settle(self, home)?;
        let (lines, most) = (self.front.would_be_pending(), log::capacity(home));
        if lines > most {
            return Err(Error::TransactionTooLarge { lines, most });
        }
        self.marks.clear();
        self.order.clear();
        self.born.clear();
        self.touched.clear();
        self.front.merge();
        for (at, len) in dead {
            self.space.give(at, len);
        }
        self.waiting = self.waiting.saturating_add(1);
        let due = match self.durability {
            Durability::Each => true,
            Durability::Group(count) => self.waiting >= count,
            Durability::Barrier => false,
        };
        if due { self.sync(home) } else { Ok(()) }
    }

    /// Makes all committed transactions durable.
    pub fn sync(&mut self, home: &Home) -> Result<(), Error> {
        if self.halted {
            return Err(Error::Halted);
        }
        if Reading::here(home) {
            return Err(Error::WithinReading);
        }
        let zones = self.front.zones();
        let changes = self.front.changes(home);
        if !changes.is_empty() {
            self.halted = true;
            superblock::extend(home, &mut self.superblock, zones)?;
            self.log.write(home, self.next, &changes)?;
            self.next += 1;
            let _alone = home.lock.exclusive();
            home.apply(&changes);
            self.halted = false;
        }
        self.front.settled();
        self.waiting = 0;
        Ok(())
    }

    /// Makes all committed transactions durable at home, and leaves nothing to recover.
    pub fn retire(&mut self, home: &Home) -> Result<(), Error> {
        self.sync(home)?;
        self.halted = true;
        self.log.retire(home, self.next)?;
        self.next += 1;
        self.halted = false;
        Ok(())
    }

    fn allocate(&mut self, home: &Home, len: usize, kind: &'static Kind) -> Result<usize, Error> {
        let most = home.geometry.zone_data();
        if len > most {
            return Err(Error::TooLarge { wanted: len, most });
        }
        let at = match self.space.take(len) {
            Some(at) => at,
            None => {
                let zone = self.front.zones();
                home.grow(home.geometry.len(zone + 1))?;
                self.front.add_zone()?;
                self.space.add_zone(home.geometry.zone_at(zone), most);
                self.space.take(len).ok_or(Error::Full { wanted: len })?
            }
        };
        self.born.insert(at, (len, kind));
        self.order.push(at);
        self.front.renew(home, at, len)?;
        Ok(at)
    }
}

/// A transaction, as the containers know it: what they read and change the heap through.
pub struct Tx<'h> {
    home: &'h Home,
    writer: &'h RefCell<Writer>,
    brand: Brand<'h>,
}

impl Sealed for Tx<'_> {}

impl<'h> Access<'h> for Tx<'h> {
    fn heap_id(&self) -> u64 {
        self.home.id
    }

    fn view(&self, at: usize, len: usize) -> Result<*const u8, Error> {
        let mut writer = self.writer.borrow_mut();
        Ok(writer.front.look(self.home, at, len)?.cast_const())
    }
}

impl Tx<'_> {
    /// Gives the transaction up: `return tx.abort("why")`.
    ///
    /// # Errors
    /// Always [`Error::Aborted`].
    pub fn abort<O>(&self, why: &'static str) -> Result<O, Error> {
        Err(Error::Aborted(why))
    }

    /// Notes that a change which takes several steps failed, maybe half-way: this level cannot be
    /// committed any more.
    pub(crate) fn spoil<O>(&self, done: Result<O, Error>) -> Result<O, Error> {
        if done.is_err() {
            self.writer.borrow_mut().spoiled = true;
        }
        done
    }

    pub(crate) fn change(&self, at: usize, len: usize) -> Result<*mut u8, Error> {
        self.writer.borrow_mut().front.change(self.home, at, len)
    }

    pub(crate) fn touch(&self, at: usize, kind: &'static Kind) {
        if kind.pointers {
            self.writer.borrow_mut().touched.add(at, kind);
        }
    }

    pub(crate) fn allocate(&self, len: usize, kind: &'static Kind) -> Result<usize, Error> {
        self.writer.borrow_mut().allocate(self.home, len, kind)
    }

    pub(crate) fn write_head(&self, at: usize, head: &Head) -> Result<(), Error> {
        let to = self.change(at, HEAD)?;
        // SAFETY: `change` gave the bytes of a head; no reference is ever made to one.
        unsafe { core::ptr::copy_nonoverlapping(head.encode().as_ptr(), to, HEAD) };
        Ok(())
    }
}

/// Takes a level back unless it is told that all went well; also while a panic passes.
struct Level<'h> {
    home: &'h Home,
    writer: &'h RefCell<Writer>,
    open: bool,
}

impl<'h> Level<'h> {
    fn begin(home: &'h Home, writer: &'h RefCell<Writer>) -> Result<Self, Error> {
        writer.borrow_mut().begin(home)?;
        Ok(Self {
            home,
            writer,
            open: true,
        })
    }

    fn commit(mut self) -> Result<(), Error> {
        let mut writer = self.writer.borrow_mut();
        let done = writer.commit(self.home);
        // An error after the level ended leaves the heap halted; before, it is taken back.
        self.open = done.is_err() && !writer.marks.is_empty();
        drop(writer);
        done
    }
}

impl Drop for Level<'_> {
    fn drop(&mut self) {
        if self.open
            && let Ok(mut writer) = self.writer.try_borrow_mut()
        {
            writer.abort();
        }
    }
}

/// A transaction that can have others within it.
pub struct Transaction<'h, R> {
    tx: Tx<'h>,
    root: PhantomData<fn() -> R>,
}

impl<'h, R: Family> Transaction<'h, R> {
    /// The root, and what the containers want to be given.
    ///
    /// # Errors
    /// [`Error::Lost`]
    pub fn parts(&mut self) -> Result<(&mut R::At<'h>, &Tx<'h>), Error> {
        let tx = &self.tx;
        let at = tx.home.geometry.zone_at(0);
        // SAFETY: the root block has one value of this type: made by `make_root` or checked by `walk`
        // when the heap was opened. `self` is borrowed mutably as long as the reference lives.
        let values = unsafe { block::values_mut::<R::At<'h>>(tx, at, 0, 1)? };
        match values {
            [root] => Ok((root, tx)),
            _ => Err(Error::NotAHeap),
        }
    }

    /// A transaction within this one: if `f` fails or panics, what *it* changed is taken back, and this
    /// one can go on.
    ///
    /// # Errors
    /// Those of `f`; [`Error::TooDeep`].
    pub fn nested<O>(
        &mut self,
        f: impl for<'n> FnOnce(&mut Transaction<'n, R>) -> Result<O, Error>,
    ) -> Result<O, Error> {
        run(self.tx.home, self.tx.writer, f)
    }
}

/// Runs a level.
pub(crate) fn run<'x, R: Family, O>(
    home: &'x Home,
    writer: &'x RefCell<Writer>,
    f: impl for<'h> FnOnce(&mut Transaction<'h, R>) -> Result<O, Error>,
) -> Result<O, Error> {
    let level = Level::begin(home, writer)?;
    let mut transaction = Transaction {
        tx: Tx {
            home,
            writer,
            brand: PhantomData,
        },
        root: PhantomData,
    };
    let result = f(&mut transaction)?;
    level.commit()?;
    Ok(result)
}

/// Makes the root of a new heap, as its first block.
pub(crate) fn make_root<R: Family>(
    home: &Home,
    writer: &RefCell<Writer>,
    init: impl for<'h> FnOnce(&Tx<'h>) -> Result<R::At<'h>, Error>,
) -> Result<(), Error> {
    fn make<'h, R: Family>(
        tx: &Tx<'h>,
        init: impl FnOnce(&Tx<'h>) -> Result<R::At<'h>, Error>,
    ) -> Result<(), Error> {
        let kind = Of::<R::At<'h>>::KIND;
        let at = block::allocate::<R::At<'h>>(tx, 1)?;
        if at != tx.home.geometry.zone_at(0) {
            return Err(Error::NotAHeap);
        }
        let value = init(tx)?;
        // SAFETY: the block is new and has room for one.
        unsafe { block::put(tx, at, 0, value)? };
        let head = Head {
            kind: kind.id,
            refs: 1,
            len: 1,
            room: 1,
        };
        tx.write_head(at, &head)
    }
    run::<R, ()>(home, writer, |transaction| {
        // The root block is counted from outside: it is not born but has always been.
        make::<R>(&transaction.tx, init)?;
        let mut writer = transaction.tx.writer.borrow_mut();
        count::adopt_root(&mut writer, home.geometry.zone_at(0));
        Ok(())
    })
}
