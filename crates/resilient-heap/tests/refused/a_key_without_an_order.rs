//! A key without an order.

use resilient_heap::memory::Volatile;
use resilient_heap::{Heap, PBTreeMap, Persist};

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    map: PBTreeMap<'h, f64, u64>,
}

fn heap() -> Heap<Root<'static>> {
    Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { map: PBTreeMap::new() })).unwrap()
}

fn main() {
    heap().write(|root, tx| root.map.insert(tx, 0.5, 1)).unwrap();
}
