//! Two heaps in one type.

use resilient_heap::{PVec, Persist};

#[derive(Persist)]
#[repr(C)]
struct Stored<'a, 'b> {
    one: PVec<'a, u64>,
    other: PVec<'b, u64>,
}

fn main() {}
