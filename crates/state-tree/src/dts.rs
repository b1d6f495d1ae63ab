//! Prints trees as device tree source, which `dtc` turns back into the same tree.
//!
//! Bytes have no types in a tree. Where a [`SchemaSet`] knows the node, its properties are printed
//! by their types; elsewhere by what they look like: printable strings, cells, bytes.

use crate::schema::SchemaSet;
use crate::tree::{Node, Tree};
use crate::value::ValueType;
use std::fmt::Write as _;

/// Numbers on one line of a long list.
const CELLS_PER_LINE: usize = 8;
/// Bytes on one line of a long list.
const BYTES_PER_LINE: usize = 32;

/// Prints a tree by what its values look like.
#[must_use]
pub fn to_dts(tree: &Tree<'_>) -> String {
    to_dts_with(tree, &SchemaSet::new())
}

/// Prints a tree by the types which a set of schemas gives its values.
#[must_use]
pub fn to_dts_with(tree: &Tree<'_>, schemas: &SchemaSet) -> String {
    let mut printer = Printer {
        out: String::from("/dts-v1/;\n\n"),
        schemas,
    };
    printer.node(&tree.root, 0);
    printer.out
}

struct Printer<'s> {
    out: String,
    schemas: &'s SchemaSet,
}

impl Printer<'_> {
    fn node(&mut self, node: &Node<'_>, depth: usize) {
        let name = if depth == 0 { "/" } else { &node.name };
        self.indent(depth);
        let _ = writeln!(self.out, "{name} {{");
        self.indent(depth + 1);
        let _ = writeln!(self.out, "compatible = \"{}\";", node.compatible);
        let schema = self.schemas.get(&node.compatible);
        for property in &node.properties {
            let known = schema
                .and_then(|s| s.property(&property.name))
                .map(|p| p.value_type);
            let known = known.filter(|t| t.check(&property.value).is_ok());
            self.indent(depth + 1);
            self.out.push_str(&property.name);
            if !property.value.is_empty() {
                self.out.push_str(" = ");
                let continued = "\t".repeat(depth + 2);
                value(&mut self.out, &property.value, known, &continued);
            }
            self.out.push(';');
            self.comment(&property.value, known);
            self.out.push('\n');
        }
        for child in &node.children {
            self.out.push('\n');
            self.node(child, depth + 1);
        }
        self.indent(depth);
        self.out.push_str("};\n");
    }

    /// Paths are bytes, without the NUL that would make them strings: says what they spell.
    fn comment(&mut self, bytes: &[u8], known: Option<ValueType>) {
        if !matches!(form(bytes, known), Form::Bytes) || !printable(bytes) {
            return;
        }
        let text = String::from_utf8_lossy(bytes);
        if !text.contains("*/") {
            let _ = write!(self.out, " /* {text} */");
        }
    }

    fn indent(&mut self, depth: usize) {
        self.out.extend(std::iter::repeat_n('\t', depth));
    }
}

/// How bytes are printed.
enum Form {
    Text,
    Decimal,
    Signed,
    Cells,
    DoubleCells,
    Bytes,
}

fn form(bytes: &[u8], known: Option<ValueType>) -> Form {
    use ValueType as T;
    match known {
        Some(T::String | T::Strings | T::Choice(_)) => Form::Text,
        Some(T::Bool | T::U8 | T::U16 | T::U32 | T::U32s) => Form::Decimal,
        Some(T::I32) => Form::Signed,
        Some(T::U64 | T::I64 | T::U64s | T::U64Array(_)) => Form::DoubleCells,
        Some(T::Bytes | T::ByteArray(_)) if !looks_like_text(bytes) => Form::Bytes,
        _ if looks_like_text(bytes) => Form::Text,
        _ if bytes.len().is_multiple_of(4) => Form::Cells,
        _ => Form::Bytes,
    }
}

fn looks_like_text(bytes: &[u8]) -> bool {
    let words = |text: &[u8]| text.split(|&b| b == 0).all(printable);
    bytes.strip_suffix(&[0]).is_some_and(words)
}

fn printable(word: &[u8]) -> bool {
    !word.is_empty() && word.iter().all(|b| matches!(b, b' '..=b'~'))
}

/// Prints a value that is not empty.
fn value(out: &mut String, bytes: &[u8], known: Option<ValueType>, continued: &str) {
    match form(bytes, known) {
        Form::Text => texts(out, bytes),
        Form::Decimal => list(
            out,
            "<",
            bytes.as_chunks::<4>().0,
            ">",
            continued,
            |out, cell| {
                let _ = write!(out, "{}", u32::from_be_bytes(*cell));
            },
        ),
        Form::Signed => list(
            out,
            "<",
            bytes.as_chunks::<4>().0,
            ">",
            continued,
            |out, cell| {
                let _ = write!(out, "({})", i32::from_be_bytes(*cell));
            },
        ),
        Form::Cells => list(
            out,
            "<",
            bytes.as_chunks::<4>().0,
            ">",
            continued,
            |out, cell| {
                let _ = write!(out, "{:#x}", u32::from_be_bytes(*cell));
            },
        ),
        Form::DoubleCells => {
            list(
                out,
                "/bits/ 64 <",
                bytes.as_chunks::<8>().0,
                ">",
                continued,
                |out, cell| {
                    let _ = write!(out, "{:#x}", u64::from_be_bytes(*cell));
                },
            );
        }
        Form::Bytes => list(out, "[", bytes, "]", continued, |out, byte| {
            let _ = write!(out, "{byte:02x}");
        }),
    }
}

/// Prints elements between brackets, on several lines where they do not fit on one.
fn list<T>(
    out: &mut String,
    open: &str,
    elements: &[T],
    close: &str,
    continued: &str,
    print: impl Fn(&mut String, &T),
) {
    let per_line = if size_of::<T>() == 1 {
        BYTES_PER_LINE
    } else {
        CELLS_PER_LINE
    };
    out.push_str(open);
    for (index, element) in elements.iter().enumerate() {
        if index > 0 && index % per_line == 0 {
            out.push('\n');
            out.push_str(continued);
        } else if index > 0 {
            out.push(' ');
        }
        print(out, element);
    }
    out.push_str(close);
}

/// Prints strings, each of which ends in NUL.
fn texts(out: &mut String, bytes: &[u8]) {
    let words = bytes.strip_suffix(&[0]).unwrap_or(bytes).split(|&b| b == 0);
    for (index, word) in words.enumerate() {
        out.push_str(if index > 0 { ", \"" } else { "\"" });
        for &byte in word {
            match byte {
                b'"' | b'\\' => out.extend(['\\', char::from(byte)]),
                b' '..=b'~' => out.push(char::from(byte)),
                _ => {
                    let _ = write!(out, "\\x{byte:02x}");
                }
            }
        }
        out.push('"');
    }
}
