//! A reference that leaves.

use resilient_heap::memory::Volatile;
use resilient_heap::{Heap, PBox, PVec, Persist};

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    list: PVec<'h, PBox<'h, u64>>,
}

fn heap() -> Heap<Root<'static>> {
    Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
}

fn main() {
    let heap = heap();
    let root = heap.read(|root, _| Ok(root)).unwrap();
}
