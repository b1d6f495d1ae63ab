//! Rust data that survives restarts and power cuts, corrects flipped bits, and cannot dangle.
//!
//! ```
//! use resilient_heap::{FileMemory, Heap, PString, PVec, Persist};
//!
//! #[derive(Persist)]
//! #[repr(C)]
//! struct Guests<'h> {
//!     visits: u64,
//!     names: PVec<'h, PString<'h>>,
//! }
//!
//! # fn main() -> Result<(), resilient_heap::Error> {
//! # let dir = tempfile::tempdir().unwrap();
//! # let path = dir.path().join("guests.heap");
//! # for _ in 0..2 {
//! let memory = FileMemory::open(&path)?;
//! let mut heap = Heap::<Guests>::open(memory, |_| Ok(Guests { visits: 0, names: PVec::new() }))?;
//! let visits = heap.write(|guests, tx| {
//!     guests.visits += 1;
//!     guests.names.push(tx, PString::new(tx, "somebody")?)?;
//!     Ok(guests.visits)
//! })?;
//! println!("visit {visits}"); // one more each time the program is run
//! # }
//! # Ok(())
//! # }
//! ```
//!
//! When [`Heap::write`] returned, what its closure did is durable; if the program, the kernel or the power
//! ended before, none of it is. `docs/heap.md` tells how, byte by byte, and which tests show it.
//!
//! # What the types rule out
//! - Storing what means nothing after a restart: [`Persist`] is for numbers, `bool`, `char`, arrays,
//!   structs and plain enums of them, and the pointers of this crate.
//! - Changing anything outside a transaction: readers get shared references only.
//! - Pointers into another heap, or kept from an earlier transaction: each closure has a lifetime `'h` of
//!   its own, which all pointers carry, and which nothing that leaves the closure can have.
//! - Dangling: a pointer has one owner ([`PBox`], [`PVec`], [`PString`], [`PHashMap`],
//!   [`PBTreeMap`]) or its target is counted and never
//!   changes ([`PRc`]). Nobody frees; a commit frees what lost its last pointer. Opening checks every
//!   pointer and every value before the first reference is made.
//!
//! # What is there
//! Transactions (nested, abortable), readers in other threads while one writes, correction of flipped bits
//! and of lost lines with a scrub, growth, maps by hash and by order ([`PHashMap`], [`PBTreeMap`]), upgrades from
//! older types ([`Upgrades`]), open files that a restart opens again ([`PFile`]), output that appears in a file
//! exactly once ([`POutput`]), heaps in files ([`FileMemory`] and, without a mapping, [`WrittenFile`], with the feature
//! `std`), on whatever keeps pages ([`Backed`], too) or in any [`memory::Memory`]. Without `std` the crate needs `core` and `alloc`.
//!
//! # What is not there yet
//! Values that change behind a shared pointer, pointers that do not keep their target alive, vectors larger
//! than a zone, transactions larger than the log.

#![no_std]

#[doc(hidden)]
pub extern crate alloc;
#[cfg(any(feature = "std", test))]
extern crate std;

#[cfg(target_endian = "big")]
compile_error!("values are stored as little-endian machines have them");

#[cfg(feature = "std")]
mod backed;
mod block;
mod boxed;
mod btree_map;
mod code;
mod column;
mod count;
#[cfg(feature = "std")]
mod descriptor;
mod error;
mod examine;
#[cfg(feature = "std")]
mod file;
mod flush;
mod front;
mod hash_map;
mod heap;
mod home;
mod key;
mod layout;
mod lock;
mod log;
pub mod memory;
#[cfg(feature = "std")]
mod output;
mod persist;
mod rc;
mod reading;
mod rows;
mod space;
mod superblock;
mod text;
mod transaction;
#[cfg(feature = "std")]
mod upgrade;
mod vector;
mod walk;
#[cfg(feature = "std")]
mod written;

#[cfg(feature = "std")]
pub use backed::{Backed, Keep};
pub use block::Access;
pub use boxed::PBox;
pub use btree_map::{PBTreeMap, TreeIter};
#[cfg(feature = "std")]
pub use descriptor::PFile;
pub use error::Error;
pub use examine::{Report, examine, what_is_at};
#[cfg(feature = "std")]
pub use file::{FileMemory, Flush};
pub use hash_map::{HashIter, PHashMap};
pub use heap::{Durability, Heap, Opened, Options, Reader, Snapshot};
pub use home::{Health, Scrubbed};
pub use key::{Hashed, Key, KeyHasher};
#[cfg(feature = "std")]
pub use output::{POutput, Sink};
pub use persist::{Edge, Family, Kind, Persist, Schema};
pub use rc::PRc;
pub use resilient_heap_derive::Persist;
pub use text::PString;
pub use transaction::{Transaction, Tx};
#[cfg(feature = "std")]
pub use upgrade::Upgrades;
pub use vector::PVec;
#[cfg(feature = "std")]
pub use written::WrittenFile;
