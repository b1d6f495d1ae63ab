//! What the types refuse: each example must not compile. The first one must: it is what the others
//! break.
//!
//! Compiled by `cargo test --doc` only.

/// What is right.
///
/// ```
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap().write(|root, tx| root.list.push(tx, PBox::new(tx, 1)?)).unwrap();
/// }
/// ```
pub struct WhatIsRight;

/// A box.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: Box<u64>,
/// }
///
/// fn main() {}
/// ```
pub struct ABox;

/// A cell.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: std::cell::Cell<u64>,
/// }
///
/// fn main() {}
/// ```
pub struct ACell;

/// A change through a readers reference.
///
/// ```compile_fail,E0594
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap()
///         .read(|root, _| {
///             root.list = PVec::new();
///             Ok(())
///         })
///         .unwrap();
/// }
/// ```
pub struct AChangeThroughAReadersReference;

/// A change while reading.
///
/// ```compile_fail,E0308
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap().read(|root, snapshot| root.list.push(snapshot, PBox::new(snapshot, 1)?)).unwrap();
/// }
/// ```
pub struct AChangeWhileReading;

/// A destructor.
///
/// ```compile_fail,E0080
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: u64,
/// }
///
/// impl Drop for Stored {
///     fn drop(&mut self) {}
/// }
///
/// fn main() {}
/// ```
pub struct ADestructor;

/// A file.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: std::fs::File,
/// }
///
/// fn main() {}
/// ```
pub struct AFile;

/// A function.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: fn(),
/// }
///
/// fn main() {}
/// ```
pub struct AFunction;

/// A pointer kept after the transaction.
///
/// ```compile_fail,E0521
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     let mut kept = None;
///     heap()
///         .write(|_, tx| {
///             kept = Some(PBox::new(tx, 1)?);
///             Ok(())
///         })
///         .unwrap();
/// }
/// ```
pub struct APointerKeptAfterTheTransaction;

/// A pointer of another heap.
///
/// ```compile_fail,E0521
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     let (mut one, mut other) = (heap(), heap());
///     one.write(|one, tx| {
///         let pointer = PBox::new(tx, 1)?;
///         other.write(|other, tx| other.list.push(tx, pointer))?;
///         one.list.pop(tx).map(drop)
///     })
///     .unwrap();
/// }
/// ```
pub struct APointerOfAnotherHeap;

/// A pointer out of a nested transaction.
///
/// ```compile_fail,E0521
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap()
///         .transaction(|outer| {
///             let mut kept = None;
///             outer.nested(|inner| {
///                 let (_, tx) = inner.parts()?;
///                 kept = Some(PBox::new(tx, 1)?);
///                 Ok(())
///             })?;
///             let (root, tx) = outer.parts()?;
///             root.list.push(tx, kept.unwrap())
///         })
///         .unwrap();
/// }
/// ```
pub struct APointerOutOfANestedTransaction;

/// A pointer returned.
///
/// ```compile_fail
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     let pointer = heap().write(|root, tx| root.list.pop(tx)).unwrap();
/// }
/// ```
pub struct APointerReturned;

/// A raw pointer.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: *const u64,
/// }
///
/// fn main() {}
/// ```
pub struct ARawPointer;

/// A reference.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored<'h> {
///     field: &'h u64,
/// }
///
/// fn main() {}
/// ```
pub struct AReference;

/// A reference across a nested transaction.
///
/// ```compile_fail,E0499
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap()
///         .transaction(|outer| {
///             let (root, tx) = outer.parts()?;
///             let list = root.list.as_mut_slice(tx)?;
///             outer.nested(|inner| inner.parts().map(drop))?;
///             list.reverse();
///             Ok(())
///         })
///         .unwrap();
/// }
/// ```
pub struct AReferenceAcrossANestedTransaction;

/// A reference that leaves.
///
/// ```compile_fail
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     let heap = heap();
///     let root = heap.read(|root, _| Ok(root)).unwrap();
/// }
/// ```
pub struct AReferenceThatLeaves;

/// A root that leaves.
///
/// ```compile_fail
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     let root = heap().write(|root, _| Ok(std::mem::replace(root, Root { list: PVec::new() })));
/// }
/// ```
pub struct ARootThatLeaves;

/// A second pointer to an owned value.
///
/// ```compile_fail,E0382
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap()
///         .write(|root, tx| {
///             let pointer = PBox::new(tx, 1)?;
///             root.list.push(tx, pointer)?;
///             root.list.push(tx, pointer)
///         })
///         .unwrap();
/// }
/// ```
pub struct ASecondPointerToAnOwnedValue;

/// A string.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: String,
/// }
///
/// fn main() {}
/// ```
pub struct AString;

/// A transaction in another thread.
///
/// ```compile_fail,E0277
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap()
///         .write(|_, tx| {
///             std::thread::scope(|scope| {
///                 scope.spawn(|| PBox::new(tx, 1).map(drop));
///             });
///             Ok(())
///         })
///         .unwrap();
/// }
/// ```
pub struct ATransactionInAnotherThread;

/// A transaction within another of the same heap.
///
/// ```compile_fail,E0499
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     let mut heap = heap();
///     heap.write(|_, _| heap.write(|_, _| Ok(()))).unwrap();
/// }
/// ```
pub struct ATransactionWithinAnotherOfTheSameHeap;

/// A usize.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: usize,
/// }
///
/// fn main() {}
/// ```
pub struct AUsize;

/// A vec.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: Vec<u64>,
/// }
///
/// fn main() {}
/// ```
pub struct AVec;

/// An arc.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: std::sync::Arc<u64>,
/// }
///
/// fn main() {}
/// ```
pub struct AnArc;

/// An atomic.
///
/// ```compile_fail,E0277
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     field: std::sync::atomic::AtomicU64,
/// }
///
/// fn main() {}
/// ```
pub struct AnAtomic;

/// An enum with fields.
///
/// ```compile_fail
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(u8)]
/// enum Stored {
///     Nothing,
///     Something(u64),
/// }
///
/// fn main() {}
/// ```
pub struct AnEnumWithFields;

/// No representation.
///
/// ```compile_fail
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// struct Stored {
///     field: u64,
/// }
///
/// fn main() {}
/// ```
pub struct NoRepresentation;

/// Packed.
///
/// ```compile_fail
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C, packed)]
/// struct Stored {
///     small: u8,
///     large: u64,
/// }
///
/// fn main() {}
/// ```
pub struct Packed;

/// Padding.
///
/// ```compile_fail,E0080
/// use resilient_heap::Persist;
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored {
///     small: u8,
///     large: u64,
/// }
///
/// fn main() {}
/// ```
pub struct Padding;

/// Two heaps in one type.
///
/// ```compile_fail
/// use resilient_heap::{PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Stored<'a, 'b> {
///     one: PVec<'a, u64>,
///     other: PVec<'b, u64>,
/// }
///
/// fn main() {}
/// ```
pub struct TwoHeapsInOneType;

/// Two references for changing.
///
/// ```compile_fail,E0499
/// use resilient_heap::memory::Volatile;
/// use resilient_heap::{Heap, PBox, PVec, Persist};
///
/// #[derive(Persist)]
/// #[repr(C)]
/// struct Root<'h> {
///     list: PVec<'h, PBox<'h, u64>>,
/// }
///
/// fn heap() -> Heap<Root<'static>> {
///     Heap::open(Volatile::new(1 << 24).unwrap(), |_| Ok(Root { list: PVec::new() })).unwrap()
/// }
///
/// fn main() {
///     heap()
///         .write(|root, tx| {
///             let one = root.list.get_mut(tx, 0)?;
///             let other = root.list.get_mut(tx, 0)?;
///             drop((one, other));
///             Ok(())
///         })
///         .unwrap();
/// }
/// ```
pub struct TwoReferencesForChanging;
