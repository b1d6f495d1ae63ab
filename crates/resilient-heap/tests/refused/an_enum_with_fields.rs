//! An enum with fields.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(u8)]
enum Stored {
    Nothing,
    Something(u64),
}

fn main() {}
