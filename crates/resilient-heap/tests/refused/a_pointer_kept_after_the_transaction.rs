//! A pointer kept after the transaction.

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
    let mut kept = None;
    heap()
        .write(|_, tx| {
            kept = Some(PBox::new(tx, 1)?);
            Ok(())
        })
        .unwrap();
}
