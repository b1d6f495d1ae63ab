//! A raw pointer.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: *const u64,
}

fn main() {}
