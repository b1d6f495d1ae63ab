//! What may be stored in a heap.
//!
//! # Safety
//! [`Persist`] is an unsafe trait with one way to implement it from outside: `#[derive(Persist)]`, which
//! checks its rules at compile time. The implementations here are for numbers and arrays, whose every
//! rule is plain, and for `bool` and `char`, whose bytes are checked.
#![allow(unsafe_code)]

use alloc::string::String;
use alloc::vec::Vec;
use core::any::type_name;
use core::fmt::Write;
use core::marker::PhantomData;

/// Values that mean the same after a restart.
///
/// `'h` is the heap: a value with pointers in it belongs to one heap, for the time of one transaction or
/// one reading, and the compiler keeps those of different heaps apart.
///
/// # Safety
/// - All bytes of a value are always initialized: no padding.
/// - Its layout does not depend on the compiler (`repr(C)`, `repr(u8)`, `repr(transparent)`).
/// - Its size is not zero, its alignment at most 16.
/// - It refers to nothing outside its heap: no reference, raw pointer, function pointer, handle.
/// - Nothing in it changes through a shared reference.
/// - It has no destructor.
/// - `check` tells whether bytes are a value; `edges` shows all pointers into the heap.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be stored in a resilient heap",
    note = "references, raw pointers, functions, boxes, files and cells mean nothing after a restart, and `usize` differs between machines",
    note = "use numbers of a fixed size, `PBox`, `PVec`, `PString`, `PRc`, `PHashMap`, or `#[derive(Persist)]`"
)]
pub unsafe trait Persist<'h>: Sized {
    /// The type's own name.
    const NAME: &'static str;

    /// Whether values can hold pointers into the heap.
    const POINTERS: bool;

    /// Writes the name with its parameters.
    fn name(out: &mut String) {
        out.push_str(Self::NAME);
    }

    /// Adds the types that this one is made of.
    fn describe(schema: &mut Schema) {
        let _ = schema;
    }

    /// Whether the bytes at `at` are a value.
    ///
    /// # Safety
    /// `at` points to `size_of::<Self>()` initialized bytes. It need not be aligned.
    #[doc(hidden)]
    unsafe fn check(at: *const u8) -> bool;

    /// Shows all pointers into the heap.
    #[doc(hidden)]
    fn edges(&self, visit: &mut dyn FnMut(Edge)) {
        let _ = visit;
    }
}

/// The root type of a heap, without its lifetime.
pub trait Family {
    /// The root in the heap `'h`.
    type At<'h>: Persist<'h>;
}

/// A pointer into the heap.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Edge {
    pub(crate) at: u64,
    /// Others may point there, too.
    pub(crate) shared: bool,
    /// Exactly one value is there.
    pub(crate) single: bool,
    pub(crate) kind: &'static Kind,
}

/// A type as the heap knows it at run time.
#[doc(hidden)]
#[derive(Debug)]
pub struct Kind {
    pub(crate) name: &'static str,
    pub(crate) id: u32,
    pub(crate) size: usize,
    pub(crate) pointers: bool,
    pub(crate) check: unsafe fn(*const u8) -> bool,
    pub(crate) edges: unsafe fn(*const u8, &mut dyn FnMut(Edge)),
}

/// Gives the [`Kind`] of a type.
pub(crate) struct Of<'h, T>(PhantomData<(&'h (), T)>);

impl<'h, T: Persist<'h>> Of<'h, T> {
    pub const KIND: &'static Kind = &Kind {
        name: T::NAME,
        id: kind_id(T::NAME, size_of::<T>()),
        size: {
            assert!(size_of::<T>() > 0, "an empty type cannot be stored");
            assert!(
                align_of::<T>() <= 16,
                "an alignment above 16 cannot be kept"
            );
            size_of::<T>()
        },
        pointers: T::POINTERS,
        check: T::check,
        edges: edges_of::<T>,
    };
}

/// # Safety
/// `at` points to a value of `T`, aligned.
unsafe fn edges_of<'h, T: Persist<'h>>(at: *const u8, visit: &mut dyn FnMut(Edge)) {
    // SAFETY: as the caller says.
    unsafe { &*at.cast::<T>() }.edges(visit);
}

/// A number for a type; never zero.
const fn kind_id(name: &str, size: usize) -> u32 {
    let bytes = name.as_bytes();
    let mut hash = 0x811c_9dc5u32 ^ size as u32;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u32).wrapping_mul(0x0100_0193);
        i += 1;
    }
    hash | 1
}

/// The types that a root is made of, as text: one line for each, with its fields, their types and
/// places. Two programs understand the same heap if their texts are equal.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    text: String,
    seen: Vec<&'static str>,
}

impl Schema {
    /// The schema of a root.
    #[must_use]
    pub fn of<'h, T: Persist<'h>>() -> Self {
        let mut schema = Self::default();
        schema.text.push_str("root ");
        T::name(&mut schema.text);
        let _ = writeln!(schema.text, " {}", size_of::<T>());
        T::describe(&mut schema);
        schema
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A number that differs where the text does.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let start = 0xcbf2_9ce4_8422_2325u64;
        self.text.bytes().fold(start, |hash, byte| {
            crate::code::mix(hash, u64::from(byte) + 1)
        })
    }

    /// Whether this type is described for the first time.
    #[doc(hidden)]
    pub fn enter<T>(&mut self) -> bool {
        let name = type_name::<T>();
        let new = !self.seen.contains(&name);
        if new {
            self.seen.push(name);
        }
        new
    }

    /// Begins the description of a type.
    #[doc(hidden)]
    pub fn begin<'h, T: Persist<'h>>(&mut self, word: &str) {
        self.text.push_str(word);
        self.text.push(' ');
        T::name(&mut self.text);
        let _ = write!(self.text, " {}:", size_of::<T>());
    }

    /// Adds a field.
    #[doc(hidden)]
    pub fn field<'h, T: Persist<'h>>(&mut self, name: &str, offset: usize) {
        let _ = write!(self.text, " {name}@{offset} ");
        T::name(&mut self.text);
    }

    /// Adds a variant.
    #[doc(hidden)]
    pub fn variant(&mut self, name: &str, value: u8) {
        let _ = write!(self.text, " {name}={value}");
    }

    /// Ends the description of a type.
    #[doc(hidden)]
    pub fn end(&mut self) {
        self.text.push('\n');
    }
}

macro_rules! numbers {
    ($($t:ident)*) => {$(
        // SAFETY: a number of a fixed size; every combination of bytes is a value.
        unsafe impl Persist<'_> for $t {
            const NAME: &'static str = stringify!($t);
            const POINTERS: bool = false;
            unsafe fn check(_: *const u8) -> bool {
                true
            }
        }

        impl Family for $t {
            type At<'h> = $t;
        }
    )*};
}

numbers!(u8 u16 u32 u64 u128 i8 i16 i32 i64 i128 f32 f64);

// SAFETY: one byte, of which two values are checked for.
unsafe impl Persist<'_> for bool {
    const NAME: &'static str = "bool";
    const POINTERS: bool = false;
    unsafe fn check(at: *const u8) -> bool {
        // SAFETY: the caller gives one initialized byte.
        unsafe { at.read() < 2 }
    }
}

// SAFETY: four bytes, which are checked to be a character.
unsafe impl Persist<'_> for char {
    const NAME: &'static str = "char";
    const POINTERS: bool = false;
    unsafe fn check(at: *const u8) -> bool {
        // SAFETY: the caller gives four initialized bytes.
        char::from_u32(unsafe { at.cast::<u32>().read_unaligned() }).is_some()
    }
}

// SAFETY: values of `T` without gaps; one of no length is refused by `Of::KIND` and by the derive.
unsafe impl<'h, T: Persist<'h>, const N: usize> Persist<'h> for [T; N] {
    const NAME: &'static str = "array";
    const POINTERS: bool = T::POINTERS;
    fn name(out: &mut String) {
        out.push('[');
        T::name(out);
        let _ = write!(out, "; {N}]");
    }
    fn describe(schema: &mut Schema) {
        T::describe(schema);
    }
    unsafe fn check(at: *const u8) -> bool {
        // SAFETY: the caller gives the bytes of all elements.
        (0..N).all(|i| unsafe { T::check(at.add(i * size_of::<T>())) })
    }
    fn edges(&self, visit: &mut dyn FnMut(Edge)) {
        if T::POINTERS {
            self.iter().for_each(|one| one.edges(visit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_value_are_told() {
        // SAFETY: one byte is there.
        let check = |byte: u8| unsafe { bool::check(&raw const byte) };
        assert!(check(0) && check(1) && !check(2));
        // SAFETY: four bytes are there.
        let check = |n: u32| unsafe { char::check((&raw const n).cast()) };
        assert!(check(0x41) && !check(0xd800) && !check(0x11_0000));
        let bytes = [1u8, 0, 3];
        // SAFETY: three bytes are there.
        let array = unsafe { <[bool; 3]>::check(bytes.as_ptr()) };
        assert!(!array);
    }

    #[test]
    fn schemas_differ_where_types_do() {
        let (a, b) = (Schema::of::<[u64; 3]>(), Schema::of::<[u64; 4]>());
        assert_eq!(a.text(), "root [u64; 3] 24\n");
        assert_ne!(a.fingerprint(), b.fingerprint());
    }
}
