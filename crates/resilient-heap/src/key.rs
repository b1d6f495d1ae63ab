//! What the keys of maps are: how they are looked up, compared and hashed.
//!
//! The hash is SipHash-1-3 of the bytes that [`Hashed`] feeds, with a key made of the heap's identity.
//! It is a part of the format: it never depends on the compiler, nor on the machine. The identity is random
//! (see [`Options::identity`](crate::Options::identity)), so that somebody who chooses keys but cannot read the
//! file cannot choose them to collide.
//!
//! Nothing here is trusted: an order or a hash that contradicts itself makes keys that are not found, and
//! harms nothing else.

use crate::block::Access;
use crate::error::Error;
use crate::persist::Persist;
use crate::text::PString;
use core::hash::Hasher;
use siphasher::sip::SipHasher13;

/// Keys of [`PHashMap`](crate::PHashMap) and [`PBTreeMap`](crate::PBTreeMap).
///
/// A type of one's own becomes a key so:
/// ```
/// use resilient_heap::{Access, Error, Hashed, Key, KeyHasher, Persist};
///
/// #[derive(Persist, PartialEq, Eq, PartialOrd, Ord)]
/// #[repr(C)]
/// struct Seat {
///     row: u32,
///     number: u32,
/// }
///
/// impl<'h> Key<'h> for Seat {
///     type Query = Seat;
///     fn query<'a>(&'a self, _: &'a impl Access<'h>) -> Result<&'a Seat, Error> {
///         Ok(self)
///     }
/// }
///
/// impl Hashed for Seat {
///     fn feed(&self, hasher: &mut KeyHasher) {
///         self.row.feed(hasher);
///         self.number.feed(hasher);
///     }
/// }
/// ```
pub trait Key<'h>: Persist<'h> {
    /// By what a key is looked up, compared and hashed: itself, or for [`PString`] its text.
    type Query: ?Sized + Ord;

    /// What the key is looked up by.
    ///
    /// # Errors
    /// [`Error::Lost`]
    fn query<'a>(&'a self, access: &'a impl Access<'h>) -> Result<&'a Self::Query, Error>;
}

/// Values that can be hashed in the same way for ever.
pub trait Hashed {
    /// Feeds what makes the value what it is; equal values feed equal bytes.
    fn feed(&self, hasher: &mut KeyHasher);
}

/// Takes what a key feeds.
#[derive(Debug)]
pub struct KeyHasher(SipHasher13);

impl KeyHasher {
    /// Takes bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }
}

/// The second half of the hash's key, beside the heap's identity: "hash map".
const OTHER: u64 = u64::from_le_bytes(*b"hash map");

/// The hash of a key in a heap.
pub(crate) fn hash<Q: Hashed + ?Sized>(heap: u64, query: &Q) -> u64 {
    let mut hasher = KeyHasher(SipHasher13::new_with_keys(heap, OTHER));
    query.feed(&mut hasher);
    hasher.0.finish()
}

macro_rules! keys {
    ($($t:ident)*) => {$(
        impl<'h> Key<'h> for $t {
            type Query = $t;
            fn query<'a>(&'a self, _: &'a impl Access<'h>) -> Result<&'a $t, Error> {
                Ok(self)
            }
        }
    )*};
}

keys!(u8 u16 u32 u64 u128 i8 i16 i32 i64 i128 bool char);

macro_rules! numbers {
    ($($t:ident)*) => {$(
        impl Hashed for $t {
            fn feed(&self, hasher: &mut KeyHasher) {
                hasher.bytes(&self.to_le_bytes());
            }
        }
    )*};
}

numbers!(u8 u16 u32 u64 u128 i8 i16 i32 i64 i128);

impl Hashed for bool {
    fn feed(&self, hasher: &mut KeyHasher) {
        hasher.bytes(&[u8::from(*self)]);
    }
}

impl Hashed for char {
    fn feed(&self, hasher: &mut KeyHasher) {
        u32::from(*self).feed(hasher);
    }
}

impl Hashed for str {
    fn feed(&self, hasher: &mut KeyHasher) {
        hasher.bytes(self.as_bytes());
        // A byte that no text has, so that two texts one after another are not one.
        hasher.bytes(&[0xff]);
    }
}

impl<T: Hashed, const N: usize> Hashed for [T; N] {
    fn feed(&self, hasher: &mut KeyHasher) {
        self.iter().for_each(|one| one.feed(hasher));
    }
}

impl<'h, T: Persist<'h> + Ord, const N: usize> Key<'h> for [T; N] {
    type Query = [T; N];
    fn query<'a>(&'a self, _: &'a impl Access<'h>) -> Result<&'a [T; N], Error> {
        Ok(self)
    }
}

impl<'h> Key<'h> for PString<'h> {
    type Query = str;
    fn query<'a>(&'a self, access: &'a impl Access<'h>) -> Result<&'a str, Error> {
        self.as_str(access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format: whoever changes these numbers breaks every stored map.
    #[test]
    fn hashes_stay_what_they_are() {
        let hashes = [
            hash(1, &7u64),
            hash(2, &7u64),
            hash(1, "seven"),
            hash(1, &[1u8, 2, 3]),
            hash(1, &'x'),
        ];
        assert_eq!(hashes, HASHES);
    }

    const HASHES: [u64; 5] = [
        16_008_968_236_301_484_702,
        6_316_563_380_106_473_493,
        2_679_399_895_145_426_964,
        14_951_322_020_579_012_240,
        806_843_309_757_404_778,
    ];
}
