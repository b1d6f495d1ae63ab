//! A file.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: std::fs::File,
}

fn main() {}
