//! An atomic.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: std::sync::atomic::AtomicU64,
}

fn main() {}
