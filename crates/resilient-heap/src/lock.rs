//! Many readers or one writer, without an operating system.
//!
//! A writer that waits lets no new reader in, and waits for those inside. Waiting spins, and yields the
//! processor where there is `std`.

use core::sync::atomic::{AtomicU32, Ordering};

/// Set while a writer waits or writes.
const WRITER: u32 = 1 << 31;

/// The lock. The lower bits count readers.
#[derive(Debug, Default)]
pub struct Lock(AtomicU32);

/// A reader is inside.
#[derive(Debug)]
pub struct Shared<'a>(&'a Lock);

/// The writer is inside, alone.
#[derive(Debug)]
pub struct Exclusive<'a>(&'a Lock);

impl Lock {
    /// Waits until no writer is inside.
    pub fn shared(&self) -> Shared<'_> {
        loop {
            let now = self.0.load(Ordering::Relaxed);
            // A count that could reach the writer's bit waits, too.
            if now < WRITER - 1
                && self
                    .0
                    .compare_exchange_weak(now, now + 1, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                return Shared(self);
            }
            pause();
        }
    }

    /// Waits until nobody is inside.
    pub fn exclusive(&self) -> Exclusive<'_> {
        while self.0.fetch_or(WRITER, Ordering::Acquire) & WRITER != 0 {
            pause();
        }
        while self.0.load(Ordering::Acquire) != WRITER {
            pause();
        }
        Exclusive(self)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_and(!WRITER, Ordering::Release);
    }
}

fn pause() {
    #[cfg(feature = "std")]
    std::thread::yield_now();
    #[cfg(not(feature = "std"))]
    core::hint::spin_loop();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn nobody_reads_while_one_writes() {
        let lock = Lock::default();
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
