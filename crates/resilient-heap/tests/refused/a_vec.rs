//! A vec.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: Vec<u64>,
}

fn main() {}
