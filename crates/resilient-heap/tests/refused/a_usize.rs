//! A usize.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: usize,
}

fn main() {}
