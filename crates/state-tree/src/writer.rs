//! Writes a tree as a flattened device tree, in one pass.
//!
//! # Layout (Devicetree Specification v0.4, chapter 5; all numbers big-endian)
//! ```text
//! 0    header, 40 bytes: magic, total size, offsets, version 17, last compatible version 16
//! 40   memory reservation map: one empty entry of 16 bytes
//! 56   structure block: BEGIN_NODE name, PROP length name-offset value, END_NODE …, END
//!      strings block: the names of the properties, each once, in the order of their first use
//! ```
//! # Rules
//! - The same calls give the same bytes: a store can tell by comparing whether state changed.
//! - What this writer accepts, the reader accepts: names, uniqueness, depth and sizes are checked
//!   here, with the same functions.
//! - Cost is linear in the output; values are encoded in place.

use crate::error::{WriteError, WriteFault};
use crate::names::{self, COMPATIBLE, MAX_BLOB, MAX_DEPTH, MAX_PROPERTIES, NameFault};
use crate::value::{Sink, StateValue};
use std::collections::HashMap;

pub(crate) const MAGIC: u32 = 0xd00d_feed;
pub(crate) const VERSION: u32 = 17;
pub(crate) const LAST_COMPATIBLE: u32 = 16;
pub(crate) const HEADER: usize = 40;
pub(crate) const RESERVATIONS: usize = 16;
/// Where the structure block begins.
pub(crate) const STRUCTURE: usize = HEADER + RESERVATIONS;

pub(crate) const BEGIN_NODE: u32 = 1;
pub(crate) const END_NODE: u32 = 2;
pub(crate) const PROP: u32 = 3;
pub(crate) const END: u32 = 9;

/// A node that was begun and not ended.
#[derive(Debug)]
struct Open {
    /// Its name.
    name: NameAt,
    /// Index in `Writer::siblings` from which on the names of its children stand.
    children: usize,
}

/// The place of a node's name in the output.
#[derive(Clone, Copy, Debug)]
struct NameAt {
    start: u32,
    len: u32,
}

/// Writes one tree. Begin the root (with an empty name) first; a node's properties come before
/// its children.
#[derive(Debug)]
pub struct Writer {
    /// The blob up to and with the structure block so far.
    out: Vec<u8>,
    strings: Vec<u8>,
    interned: HashMap<Box<str>, u32>,
    open: Vec<Open>,
    /// Names of the children so far of all open nodes, outermost first.
    siblings: Vec<NameAt>,
    /// Name offsets of the properties so far of the innermost node.
    properties: Vec<u32>,
    /// Whether the innermost node can take properties: no child has been begun yet.
    takes_properties: bool,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// A writer that has written nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            out: vec![0; STRUCTURE],
            strings: Vec::new(),
            interned: HashMap::new(),
            open: Vec::new(),
            siblings: Vec::new(),
            properties: Vec::new(),
            takes_properties: false,
        }
    }

    /// Begins a node and writes its `compatible`.
    ///
    /// # Errors
    /// An illegal name, too deep, or a second root.
    pub fn begin(&mut self, name: &str, compatible: &str) -> Result<(), WriteError> {
        let legal = match (self.open.is_empty(), name.is_empty()) {
            (true, true) if self.out.len() == STRUCTURE => Ok(()),
            (true, true) => return Err(self.misuse("a second root")),
            (true, false) => return Err(self.error(WriteFault::RootName(name.to_owned()))),
            (false, _) => names::check_node_name(name),
        };
        legal.map_err(|fault| self.bad_name(name, fault))?;
        names::check_compatible(compatible).map_err(|fault| self.bad_name(compatible, fault))?;
        if self.open.len() == MAX_DEPTH {
            return Err(self.error(WriteFault::TooDeep));
        }
        self.token(BEGIN_NODE);
        let at = NameAt {
            start: self.position()?,
            len: name.len() as u32,
        };
        self.out.extend_from_slice(name.as_bytes());
        self.out.push(0);
        self.pad();
        if !self.open.is_empty() {
            self.siblings.push(at);
        }
        self.open.push(Open {
            name: at,
            children: self.siblings.len(),
        });
        self.properties.clear();
        self.takes_properties = true;
        self.put(COMPATIBLE, |out| {
            out.bytes(compatible.as_bytes());
            out.bytes(&[0]);
            Ok(())
        })
    }

    /// Adds a property to the innermost open node.
    ///
    /// # Errors
    /// An illegal or repeated name, a value without encoding, or a tree that grew too large.
    pub fn property(&mut self, name: &str, value: &impl StateValue) -> Result<(), WriteError> {
        names::check_property_name(name).map_err(|fault| self.bad_name(name, fault))?;
        self.put(name, |out| value.encode(out))
    }

    /// Adds a property whose value is these bytes.
    ///
    /// # Errors
    /// As for [`Writer::property`].
    pub fn bytes(&mut self, name: &str, value: &[u8]) -> Result<(), WriteError> {
        names::check_property_name(name).map_err(|fault| self.bad_name(name, fault))?;
        self.put(name, |out| {
            out.bytes(value);
            Ok(())
        })
    }

    /// Ends the innermost open node.
    ///
    /// # Errors
    /// When two of its children have one name, or no node is open.
    pub fn end(&mut self) -> Result<(), WriteError> {
        let Some(children) = self.open.last().map(|open| open.children) else {
            return Err(self.misuse("a node is ended that was not begun"));
        };
        let mut siblings = self.siblings.split_off(children);
        siblings.sort_unstable_by_key(|&at| (at.len, self.text(at)));
        if let Some(pair) = siblings
            .windows(2)
            .find(|p| self.text(p[0]) == self.text(p[1]))
        {
            let name = String::from_utf8_lossy(self.text(pair[0])).into_owned();
            return Err(self.error(WriteFault::DuplicateChild(name)));
        }
        self.open.pop();
        self.takes_properties = false;
        self.token(END_NODE);
        Ok(())
    }

    /// The finished blob.
    ///
    /// # Errors
    /// When a node is still open, none was written, or the tree is too large.
    pub fn finish(mut self) -> Result<Vec<u8>, WriteError> {
        if !self.open.is_empty() || self.out.len() == STRUCTURE {
            return Err(self.misuse("finished without a complete root"));
        }
        self.token(END);
        let strings_at = self.position()?;
        let structure_len = strings_at - STRUCTURE as u32;
        let strings_len = self.strings.len() as u32;
        self.out.append(&mut self.strings);
        let total = self.position()?;
        let header = [
            MAGIC,
            total,
            STRUCTURE as u32,
            strings_at,
            HEADER as u32,
            VERSION,
            LAST_COMPATIBLE,
            0,
            strings_len,
            structure_len,
        ];
        for (field, value) in self.out.chunks_exact_mut(4).zip(header) {
            field.copy_from_slice(&value.to_be_bytes());
        }
        Ok(self.out)
    }

    fn put(
        &mut self,
        name: &str,
        encode: impl FnOnce(&mut Sink<'_>) -> Result<(), crate::ValueFault>,
    ) -> Result<(), WriteError> {
        if !self.takes_properties {
            return Err(self.misuse("a property outside a node or after a child"));
        }
        let name_offset = self.intern(name);
        if self.properties.contains(&name_offset) {
            return Err(self.error(WriteFault::DuplicateProperty(name.to_owned())));
        }
        if self.properties.len() == MAX_PROPERTIES {
            return Err(self.error(WriteFault::TooManyProperties));
        }
        self.properties.push(name_offset);
        self.token(PROP);
        let length_at = self.out.len();
        self.token(0);
        self.token(name_offset);
        let value_at = self.out.len();
        encode(&mut Sink::new(&mut self.out)).map_err(|fault| {
            self.error(WriteFault::Value {
                property: name.to_owned(),
                fault,
            })
        })?;
        let length = self.position()? - value_at as u32;
        self.out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
        self.pad();
        Ok(())
    }

    /// Offset of a property name in the strings block.
    fn intern(&mut self, name: &str) -> u32 {
        if let Some(&offset) = self.interned.get(name) {
            return offset;
        }
        let offset = self.strings.len() as u32;
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        self.interned.insert(name.into(), offset);
        offset
    }

    fn token(&mut self, token: u32) {
        self.out.extend_from_slice(&token.to_be_bytes());
    }

    /// Fills up to the next multiple of four; the structure block begins at one.
    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }

    /// Length of the output, which is checked to be within [`MAX_BLOB`] and so within 32 bits.
    fn position(&self) -> Result<u32, WriteError> {
        let len = self.out.len();
        if len + self.strings.len() > MAX_BLOB {
            return Err(self.error(WriteFault::TooLarge));
        }
        Ok(len as u32)
    }

    fn text(&self, at: NameAt) -> &[u8] {
        &self.out[at.start as usize..][..at.len as usize]
    }

    fn path(&self) -> String {
        let names: Vec<_> = self
            .open
            .iter()
            .skip(1)
            .map(|o| String::from_utf8_lossy(self.text(o.name)))
            .collect();
        format!("/{}", names.join("/"))
    }

    fn error(&self, fault: WriteFault) -> WriteError {
        WriteError {
            path: self.path(),
            fault,
        }
    }

    fn misuse(&self, what: &'static str) -> WriteError {
        self.error(WriteFault::Misuse(what))
    }

    fn bad_name(&self, name: &str, fault: NameFault) -> WriteError {
        self.error(WriteFault::Name {
            name: name.to_owned(),
            fault,
        })
    }
}
