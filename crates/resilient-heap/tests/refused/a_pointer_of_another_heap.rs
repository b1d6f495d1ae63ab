//! A pointer of another heap.

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
    let (mut one, mut other) = (heap(), heap());
    one.write(|one, tx| {
        let pointer = PBox::new(tx, 1)?;
        other.write(|other, tx| other.list.push(tx, pointer))?;
        one.list.pop(tx).map(drop)
    })
    .unwrap();
}
