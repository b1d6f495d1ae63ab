//! Bugs on purpose: the tests have to catch each of them (`tests/planted.rs`).
//!
//! The code asks [`bug`] at the places where it could be wrong. Without the feature `planted` the
//! answer is a constant, and nothing of it is left. With it, one bug at a time is switched on,
//! for one thread, so that tests can run beside each other.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

thread_local! {
    static PLANTED: Cell<&'static str> = const { Cell::new("") };
    static MET: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// Plants a bug in what this thread does from now on; an empty name plants none.
pub fn plant(bug: &'static str) {
    PLANTED.set(bug);
}

/// All places that this thread has come by, planted or not.
#[must_use]
pub fn met() -> BTreeSet<String> {
    MET.with_borrow(BTreeSet::clone)
}

pub(crate) fn bug(name: &str) -> bool {
    MET.with_borrow_mut(|met| {
        if !met.contains(name) {
            met.insert(name.to_owned());
        }
    });
    PLANTED.get() == name
}
