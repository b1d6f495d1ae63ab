//! Many readers or one writer, without an operating system.
//!
//! A writer that waits lets no new reader in, and waits for those inside. Waiting spins, and yields the
//! processor where there is `std`.

use core::sync::atomic::{AtomicU32, Ordering};

/// Set while a writer waits or writes.
const WRITER: u32 = 1 << 31;

/// What a lock is made of. In a test, something that tries every order in which threads may run.
pub trait Word {
    /// As of an atomic number.
    fn load(&self, order: Ordering) -> u32;
    /// As of an atomic number; whether it was `old`.
    fn exchange(&self, old: u32, new: u32) -> bool;
    /// As of an atomic number.
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32;
    /// As of an atomic number.
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32;
    /// As of an atomic number.
    fn fetch_sub(&self, less: u32, order: Ordering) -> u32;
    /// Lets others go first.
    fn pause();
}

macro_rules! word {
    ($atomic:ty, $pause:expr) => {
        impl Word for $atomic {
            fn load(&self, order: Ordering) -> u32 {
                self.load(order)
            }
            fn exchange(&self, old: u32, new: u32) -> bool {
                self.compare_exchange_weak(old, new, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            }
            fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
                self.fetch_or(bits, order)
            }
            fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
                self.fetch_and(bits, order)
            }
            fn fetch_sub(&self, less: u32, order: Ordering) -> u32 {
                self.fetch_sub(less, order)
            }
            fn pause() {
                $pause()
            }
        }
    };
}

#[cfg(feature = "std")]
word!(AtomicU32, std::thread::yield_now);
#[cfg(not(feature = "std"))]
word!(AtomicU32, core::hint::spin_loop);

/// The lock. The lower bits count readers.
#[derive(Debug, Default)]
pub struct Lock<W: Word = AtomicU32>(W);

/// A reader is inside.
#[derive(Debug)]
pub struct Shared<'a, W: Word = AtomicU32>(&'a Lock<W>);

/// The writer is inside, alone.
#[derive(Debug)]
pub struct Exclusive<'a, W: Word = AtomicU32>(&'a Lock<W>);

impl<W: Word> Lock<W> {
    /// A reader goes in, unless a writer is inside or waits.
    fn try_shared(&self) -> Option<Shared<'_, W>> {
        let now = self.0.load(Ordering::Relaxed);
        // A count that could reach the writer's bit waits, too.
        if now < WRITER - 1 && self.0.exchange(now, now + 1) {
            Some(Shared(self))
        } else {
            None
        }
    }

    /// The next writer is the one who is told `true`; no more readers go in.
    fn claim(&self) -> bool {
        self.0.fetch_or(WRITER, Ordering::Acquire) & WRITER == 0
    }

    /// Whether all readers are gone, for the writer whose claim was heard.
    fn alone(&self) -> bool {
        self.0.load(Ordering::Acquire) == WRITER
    }

    /// Waits until no writer is inside.
    pub fn shared(&self) -> Shared<'_, W> {
        loop {
            if let Some(inside) = self.try_shared() {
                return inside;
            }
            W::pause();
        }
    }

    /// Waits until nobody is inside.
    pub fn exclusive(&self) -> Exclusive<'_, W> {
        while !self.claim() {
            W::pause();
        }
        let claimed = Exclusive(self);
        while !self.alone() {
            W::pause();
        }
        claimed
    }
}

impl<W: Word> Drop for Shared<'_, W> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

impl<W: Word> Drop for Exclusive<'_, W> {
    fn drop(&mut self) {
        self.0.0.fetch_and(!WRITER, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    word!(loom::sync::atomic::AtomicU32, || ());

    type Model = (
        Lock<loom::sync::atomic::AtomicU32>,
        loom::cell::UnsafeCell<u64>,
    );

    fn read(all: &Model) {
        if let Some(_inside) = all.0.try_shared() {
            // The model notices every access to the cell beside a writing one.
            let _: *const u64 = all.1.with(|at| at);
        }
    }

    fn write(all: &Model) {
        if all.0.claim() {
            let _claimed = Exclusive(&all.0);
            if all.0.alone() {
                let _: *mut u64 = all.1.with_mut(|at| at);
            }
        }
    }

    /// Every order in which the steps of a writer and of others may happen, with what a processor may
    /// reorder. Where the real ones wait, these give up, so that the orders are finitely many; no thread is
    /// held up by others more often than `preemptions` says.
    fn try_all(others: &'static [fn(&Model)], preemptions: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let lock = Lock(loom::sync::atomic::AtomicU32::new(0));
            let all = loom::sync::Arc::new((lock, loom::cell::UnsafeCell::new(0)));
            let threads: std::vec::Vec<_> = others
                .iter()
                .map(|other| {
                    let all = all.clone();
                    loom::thread::spawn(move || other(&all))
                })
                .collect();
            write(&all);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn no_order_lets_a_reader_and_a_writer_meet() {
        try_all(&[read], 3);
    }

    #[test]
    fn no_order_lets_two_writers_meet() {
        try_all(&[write], 3);
    }

    #[test]
    fn no_order_lets_two_readers_and_a_writer_meet() {
        try_all(&[read, read], 1);
    }

    #[test]
    fn nobody_reads_while_one_writes() {
        let lock: Lock = Lock::default();
        let (a, b) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _inside = lock.exclusive();
                        a.fetch_add(1, Ordering::Relaxed);
                        b.fetch_add(1, Ordering::Relaxed);
                    }
                });
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _inside = lock.shared();
                        let seen = b.load(Ordering::Relaxed);
                        assert_eq!(a.load(Ordering::Relaxed), seen);
                    }
                });
            }
        });
        assert_eq!(a.into_inner(), 4000);
    }
}
