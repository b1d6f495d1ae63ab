//! Property values: how each Rust type is encoded, and read back strictly.
//!
//! # Encodings
//! Numbers are big-endian cells of 32 bits, as everywhere in device trees: one cell for 8, 16 and
//! 32 bits and for `bool` (0 or 1), two cells for 64 bits; arrays are their elements one after the
//! other. Strings end in NUL and a list of strings is one after the other. `Vec<u8>` and `[u8; N]`
//! are the bytes themselves: paths, register areas. An absent `Option` is an absent property.
//!
//! Each value has exactly one encoding, and reading refuses every other.

use crate::error::ValueFault;
use std::fmt;

/// The type of a property, for schemas: says how the bytes are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// One cell, 0 or 1.
    Bool,
    /// One cell.
    U8,
    /// One cell.
    U16,
    /// One cell.
    U32,
    /// Two cells.
    U64,
    /// One cell, two's complement.
    I32,
    /// Two cells, two's complement.
    I64,
    /// UTF-8, terminated by NUL.
    String,
    /// Strings, one after the other.
    Strings,
    /// Any number of bytes.
    Bytes,
    /// This number of bytes.
    ByteArray(usize),
    /// Any number of single cells.
    U32s,
    /// Any number of double cells.
    U64s,
    /// This number of double cells.
    U64Array(usize),
    /// A string that is one of these words.
    Choice(&'static [&'static str]),
}

impl ValueType {
    /// Whether these bytes are a value of this type.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self, bytes: &[u8]) -> Result<(), ValueFault> {
        match *self {
            Self::Bool => bool::decode(bytes).map(drop),
            Self::U8 => u8::decode(bytes).map(drop),
            Self::U16 => u16::decode(bytes).map(drop),
            Self::U32 | Self::I32 => length(bytes, 4),
            Self::U64 | Self::I64 => length(bytes, 8),
            Self::String => string(bytes).map(drop),
            Self::Strings => strings(bytes).try_for_each(|s| s.map(drop)),
            Self::Bytes => Ok(()),
            Self::ByteArray(n) => length(bytes, n),
            Self::U32s => multiple(bytes, 4),
            Self::U64s => multiple(bytes, 8),
            Self::U64Array(n) => length(bytes, n.saturating_mul(8)),
            Self::Choice(words) => choice(bytes, words).map(drop),
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("bool (one cell)"),
            Self::U8 => f.write_str("u8 (one cell)"),
            Self::U16 => f.write_str("u16 (one cell)"),
            Self::U32 => f.write_str("u32 (one cell)"),
            Self::U64 => f.write_str("u64 (two cells)"),
            Self::I32 => f.write_str("i32 (one cell)"),
            Self::I64 => f.write_str("i64 (two cells)"),
            Self::String => f.write_str("string"),
            Self::Strings => f.write_str("list of strings"),
            Self::Bytes => f.write_str("bytes"),
            Self::ByteArray(n) => write!(f, "{n} bytes"),
            Self::U32s => f.write_str("list of u32 (one cell each)"),
            Self::U64s => f.write_str("list of u64 (two cells each)"),
            Self::U64Array(n) => write!(f, "{n} × u64 (two cells each)"),
            Self::Choice(words) => write!(f, "one of: {}", words.join(", ")),
        }
    }
}

/// Takes the encoding of one value.
#[derive(Debug)]
pub struct Sink<'w>(&'w mut Vec<u8>);

impl<'w> Sink<'w> {
    pub(crate) fn new(out: &'w mut Vec<u8>) -> Self {
        Self(out)
    }

    /// Adds bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Adds a string with its terminating NUL.
    ///
    /// # Errors
    /// When it contains a NUL.
    pub fn string(&mut self, text: &str) -> Result<(), ValueFault> {
        if text.as_bytes().contains(&0) {
            return Err(ValueFault::NulInside);
        }
        self.bytes(text.as_bytes());
        self.bytes(&[0]);
        Ok(())
    }

    fn reserve(&mut self, bytes: usize) {
        self.0.reserve(bytes);
    }
}

/// A type that can be the value of a property. For enums without fields there is a derive macro.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the value of a property",
    label = "not a property value",
    note = "nodes need `#[state(child)]`, lists of nodes `#[state(children)]`; enums without fields `#[derive(StateValue)]`"
)]
pub trait StateValue: Sized {
    /// The type, for schemas.
    fn value_type() -> ValueType;
    /// Encodes the value.
    ///
    /// # Errors
    /// When the value has no encoding: a string with a NUL in it.
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault>;
    /// Reads the value back from bytes that are not trusted.
    ///
    /// # Errors
    /// When the bytes are not exactly one encoding of a value.
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault>;
}

fn length(bytes: &[u8], expected: usize) -> Result<(), ValueFault> {
    if bytes.len() == expected {
        Ok(())
    } else {
        Err(ValueFault::Length {
            found: bytes.len(),
            expected,
        })
    }
}

fn multiple(bytes: &[u8], element: usize) -> Result<(), ValueFault> {
    if bytes.len().is_multiple_of(element) {
        Ok(())
    } else {
        Err(ValueFault::Multiple {
            found: bytes.len(),
            element,
        })
    }
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], ValueFault> {
    let wrong = ValueFault::Length {
        found: bytes.len(),
        expected: N,
    };
    bytes.try_into().map_err(|_| wrong)
}

fn string(bytes: &[u8]) -> Result<&str, ValueFault> {
    let text = bytes.strip_suffix(&[0]).ok_or(ValueFault::NotTerminated)?;
    if text.contains(&0) {
        return Err(ValueFault::NulInside);
    }
    std::str::from_utf8(text).map_err(|_| ValueFault::NotUtf8)
}

fn strings(bytes: &[u8]) -> impl Iterator<Item = Result<&str, ValueFault>> {
    bytes.split_inclusive(|&b| b == 0).map(string)
}

/// Which of these words the bytes are; for the derived code of enums.
///
/// # Errors
/// When they are none of them.
pub fn choice(bytes: &[u8], words: &'static [&'static str]) -> Result<usize, ValueFault> {
    let found = string(bytes)?;
    words
        .iter()
        .position(|w| *w == found)
        .ok_or_else(|| ValueFault::NotOneOf {
            found: found.chars().take(40).collect(),
            expected: words.join(", "),
        })
}

impl StateValue for bool {
    fn value_type() -> ValueType {
        ValueType::Bool
    }
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
        u32::from(*self).encode(out)
    }
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
        match u32::decode(bytes)? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(ValueFault::Range { found, max: 1 }),
        }
    }
}

macro_rules! small {
    ($($type:ty => $name:ident),*) => {$(
        impl StateValue for $type {
            fn value_type() -> ValueType {
                ValueType::$name
            }
            fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
                u32::from(*self).encode(out)
            }
            fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
                let found = u32::decode(bytes)?;
                let wrong = ValueFault::Range { found, max: u32::from(<$type>::MAX) };
                <$type>::try_from(found).map_err(|_| wrong)
            }
        }
    )*};
}
small!(u8 => U8, u16 => U16);

macro_rules! cells {
    ($($type:ty => $name:ident),*) => {$(
        impl StateValue for $type {
            fn value_type() -> ValueType {
                ValueType::$name
            }
            fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
                out.bytes(&self.to_be_bytes());
                Ok(())
            }
            fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
                array(bytes).map(<$type>::from_be_bytes)
            }
        }
    )*};
}
cells!(u32 => U32, u64 => U64, i32 => I32, i64 => I64);

macro_rules! lists {
    ($($type:ty, $size:literal => $name:ident),*) => {$(
        impl StateValue for Vec<$type> {
            fn value_type() -> ValueType {
                ValueType::$name
            }
            fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
                out.reserve(self.len() * $size);
                self.iter().for_each(|n| out.bytes(&n.to_be_bytes()));
                Ok(())
            }
            fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
                multiple(bytes, $size)?;
                let (cells, _) = bytes.as_chunks::<$size>();
                Ok(cells.iter().map(|cell| <$type>::from_be_bytes(*cell)).collect())
            }
        }
    )*};
}
lists!(u32, 4 => U32s, u64, 8 => U64s);

impl<const N: usize> StateValue for [u64; N] {
    fn value_type() -> ValueType {
        ValueType::U64Array(N)
    }
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
        self.iter().for_each(|n| out.bytes(&n.to_be_bytes()));
        Ok(())
    }
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
        length(bytes, N.saturating_mul(8))?;
        let mut numbers = [0; N];
        for (number, cell) in numbers.iter_mut().zip(bytes.as_chunks().0) {
            *number = u64::from_be_bytes(*cell);
        }
        Ok(numbers)
    }
}

impl<const N: usize> StateValue for [u8; N] {
    fn value_type() -> ValueType {
        ValueType::ByteArray(N)
    }
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
        out.bytes(self);
        Ok(())
    }
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
        array(bytes)
    }
}

impl StateValue for Vec<u8> {
    fn value_type() -> ValueType {
        ValueType::Bytes
    }
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
        out.bytes(self);
        Ok(())
    }
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
        Ok(bytes.to_vec())
    }
}

impl StateValue for String {
    fn value_type() -> ValueType {
        ValueType::String
    }
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
        out.string(self)
    }
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
        string(bytes).map(str::to_owned)
    }
}

impl StateValue for Vec<String> {
    fn value_type() -> ValueType {
        ValueType::Strings
    }
    fn encode(&self, out: &mut Sink<'_>) -> Result<(), ValueFault> {
        self.iter().try_for_each(|text| out.string(text))
    }
    fn decode(bytes: &[u8]) -> Result<Self, ValueFault> {
        strings(bytes).map(|text| text.map(str::to_owned)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(value: &impl StateValue) -> Vec<u8> {
        let mut out = Vec::new();
        value.encode(&mut Sink::new(&mut out)).unwrap();
        out
    }

    #[test]
    fn numbers_are_big_endian_cells() {
        assert_eq!(encoded(&7u8), [0, 0, 0, 7]);
        assert_eq!(encoded(&0x1234u16), [0, 0, 0x12, 0x34]);
        assert_eq!(encoded(&true), [0, 0, 0, 1]);
        assert_eq!(encoded(&-2i32), [0xff, 0xff, 0xff, 0xfe]);
        assert_eq!(encoded(&0x0102_0304_0506_0708u64), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(
            encoded(&[1u64, 2]),
            [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]
        );
        assert_eq!(encoded(&vec![1u32, 2]), [0, 0, 0, 1, 0, 0, 0, 2]);
        assert_eq!(encoded(&[9u8, 8]), [9, 8]);
    }

    #[test]
    fn other_encodings_are_refused() {
        assert_eq!(
            bool::decode(&[0, 0, 0, 2]),
            Err(ValueFault::Range { found: 2, max: 1 })
        );
        assert_eq!(
            u8::decode(&[0, 0, 1, 0]),
            Err(ValueFault::Range {
                found: 256,
                max: 255
            })
        );
        assert_eq!(
            u16::decode(&[0, 1, 0, 0]),
            Err(ValueFault::Range {
                found: 65536,
                max: 65535
            })
        );
        assert_eq!(
            u8::decode(&[1]),
            Err(ValueFault::Length {
                found: 1,
                expected: 4
            })
        );
        assert_eq!(
            u64::decode(&[0; 4]),
            Err(ValueFault::Length {
                found: 4,
                expected: 8
            })
        );
        assert_eq!(
            Vec::<u64>::decode(&[0; 12]),
            Err(ValueFault::Multiple {
                found: 12,
                element: 8
            })
        );
        assert_eq!(
            <[u64; 2]>::decode(&[0; 8]),
            Err(ValueFault::Length {
                found: 8,
                expected: 16
            })
        );
    }

    #[test]
    fn strings_end_once() {
        assert_eq!(encoded(&String::from("ab")), b"ab\0");
        assert_eq!(String::decode(b"ab"), Err(ValueFault::NotTerminated));
        assert_eq!(String::decode(b""), Err(ValueFault::NotTerminated));
        assert_eq!(String::decode(b"a\0b\0"), Err(ValueFault::NulInside));
        assert_eq!(String::decode(b"\xff\0"), Err(ValueFault::NotUtf8));
        let list = vec![String::new(), "a".into(), String::new()];
        assert_eq!(encoded(&list), b"\0a\0\0");
        assert_eq!(Vec::<String>::decode(b"\0a\0\0"), Ok(list));
        assert_eq!(Vec::<String>::decode(b""), Ok(vec![]));
        assert_eq!(
            Vec::<String>::decode(b"a\0b"),
            Err(ValueFault::NotTerminated)
        );
        let mut out = Vec::new();
        let fault = String::from("a\0").encode(&mut Sink::new(&mut out));
        assert_eq!(fault, Err(ValueFault::NulInside));
    }
}
