//! A box.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: Box<u64>,
}

fn main() {}
