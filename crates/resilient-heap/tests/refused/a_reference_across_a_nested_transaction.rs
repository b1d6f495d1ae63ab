//! A reference across a nested transaction.

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
    heap()
        .transaction(|outer| {
            let (root, tx) = outer.parts()?;
            let list = root.list.as_mut_slice(tx)?;
            outer.nested(|inner| inner.parts().map(drop))?;
            list.reverse();
            Ok(())
        })
        .unwrap();
}
