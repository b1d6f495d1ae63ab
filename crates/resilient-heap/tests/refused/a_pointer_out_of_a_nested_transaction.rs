//! A pointer out of a nested transaction.

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
            let mut kept = None;
            outer.nested(|inner| {
                let (_, tx) = inner.parts()?;
                kept = Some(PBox::new(tx, 1)?);
                Ok(())
            })?;
            let (root, tx) = outer.parts()?;
            root.list.push(tx, kept.unwrap())
        })
        .unwrap();
}
