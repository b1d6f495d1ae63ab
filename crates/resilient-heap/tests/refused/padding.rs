//! Padding.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    small: u8,
    large: u64,
}

fn main() {}
