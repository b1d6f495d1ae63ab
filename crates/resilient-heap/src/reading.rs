//! Which heaps this thread reads right now.
//!
//! A commit waits until those are done that read; a thread that waits for itself waits for ever. So a heap
//! refuses to be written to by a thread that is reading it. Without `std` nobody knows what a thread is: there
//! it waits.

use crate::home::Home;

#[cfg(feature = "std")]
mod kept {
    use std::cell::RefCell;
    use std::vec::Vec;

    std::thread_local! {
        /// Addresses of the homes that this thread is inside of.
        static INSIDE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    }

    pub fn enter(home: usize) {
        let _ = INSIDE.try_with(|inside| inside.borrow_mut().push(home));
    }

    pub fn leave(home: usize) {
        let _ = INSIDE.try_with(|inside| {
            let mut inside = inside.borrow_mut();
            if let Some(last) = inside.iter().rposition(|one| *one == home) {
                inside.remove(last);
            }
        });
    }

    pub fn here(home: usize) -> bool {
        let found = INSIDE.try_with(|inside| inside.borrow().contains(&home));
        found.unwrap_or(false)
    }
}

#[cfg(not(feature = "std"))]
mod kept {
    pub fn enter(_: usize) {}
    pub fn leave(_: usize) {}
    pub fn here(_: usize) -> bool {
        false
    }
}

/// This thread reads a heap as long as this lives; it stays in the thread.
pub struct Reading(usize, core::marker::PhantomData<*const ()>);

impl Reading {
    /// Begins.
    pub fn begin(home: &Home) -> Self {
        let home = core::ptr::from_ref(home).addr();
        kept::enter(home);
        Self(home, core::marker::PhantomData)
    }

    /// Whether this thread reads this heap.
    pub fn here(home: &Home) -> bool {
        kept::here(core::ptr::from_ref(home).addr())
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        kept::leave(self.0);
    }
}
