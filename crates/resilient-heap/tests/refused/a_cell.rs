//! A cell.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: std::cell::Cell<u64>,
}

fn main() {}
