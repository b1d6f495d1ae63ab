//! A reference.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored<'h> {
    field: &'h u64,
}

fn main() {}
