//! No representation.

use resilient_heap::Persist;

#[derive(Persist)]
struct Stored {
    field: u64,
}

fn main() {}
