//! A map changed while it is iterated.

use resilient_heap::memory::Volatile;
use resilient_heap::{Heap, PHashMap, Persist};

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    map: PHashMap<'h, u64, u64>,
}

fn heap() -> Heap<Root<'static>> {
    Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { map: PHashMap::new() })).unwrap()
}

fn main() {
    heap()
        .write(|root, tx| {
            for row in root.map.iter(tx) {
                root.map.insert(tx, *row?.0, 1)?;
            }
            Ok(())
        })
        .unwrap();
}
