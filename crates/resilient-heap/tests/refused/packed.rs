//! Packed.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C, packed)]
struct Stored {
    small: u8,
    large: u64,
}

fn main() {}
