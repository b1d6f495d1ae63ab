//! A destructor.

use resilient_heap::Persist;

#[derive(Persist)]
#[repr(C)]
struct Stored {
    field: u64,
}

impl Drop for Stored {
    fn drop(&mut self) {}
}

fn main() {}
