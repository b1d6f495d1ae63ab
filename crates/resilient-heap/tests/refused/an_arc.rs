//! An arc.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: std::sync::Arc<u64>,
}

fn main() {}
