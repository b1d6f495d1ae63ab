//! Reads a flattened device tree from bytes that are not trusted.
//!
//! # Rules
//! - Every offset is checked before use; no arithmetic on numbers from the blob can overflow.
//! - Time is linear in the blob but for the sorting of sibling names; memory is at most about
//!   eight times its length. Nothing is copied and nothing is recursive.
//! - Strict: the one layout that [`crate::writer`] describes, one root, no NOP tokens, legal and
//!   unique names, `compatible` as the first property of every node, zero padding, no byte at the
//!   end that nothing refers to. Strings may share their ends, as `dtc` lets them.

use crate::error::{FormatError, FormatFault as Fault};
use crate::names::{
    self, COMPATIBLE, MAX_BLOB, MAX_DEPTH, MAX_NODE_NAME, MAX_PROPERTIES, MAX_PROPERTY_NAME,
    MAX_UNIT_ADDRESS, NameFault,
};
use crate::tree::{Node, Property, Tree};
use crate::writer::{
    BEGIN_NODE, END, END_NODE, HEADER, LAST_COMPATIBLE, MAGIC, PROP, RESERVATIONS, STRUCTURE,
    VERSION,
};
use std::borrow::Cow;

/// See [`Tree::parse`].
pub(crate) fn parse(blob: &[u8]) -> Result<Tree<'_>, FormatError> {
    let blocks = header(blob).map_err(|(offset, fault)| FormatError {
        path: "/".to_owned(),
        offset,
        fault,
    })?;
    let mut reader = Reader {
        blocks,
        position: 0,
        strings_used: 0,
        open: Vec::new(),
    };
    reader.tree().map_err(|(offset, fault)| FormatError {
        path: reader.path(),
        offset,
        fault,
    })
}

/// An offset into the blob and what is wrong there.
type Located<T> = Result<T, (usize, Fault)>;

struct Blocks<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
}

fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    let cell = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_be_bytes(cell.try_into().ok()?))
}

/// Checks the header, which can have one form only once the length of the structure block is
/// known, and cuts the blob into its blocks.
fn header(blob: &[u8]) -> Located<Blocks<'_>> {
    if blob.len() > MAX_BLOB {
        return Err((0, Fault::TooLarge(blob.len())));
    }
    let field = |index: usize| number(blob, index * 4).ok_or((blob.len(), Fault::Truncated));
    if field(0)? != MAGIC {
        return Err((0, Fault::Magic(field(0)?)));
    }
    let (version, last_compatible) = (field(5)?, field(6)?);
    if (version, last_compatible) != (VERSION, LAST_COMPATIBLE) {
        return Err((
            20,
            Fault::Version {
                version,
                last_compatible,
            },
        ));
    }
    let structure_len = field(9)? as usize;
    let strings_at = structure_len.saturating_add(STRUCTURE);
    let must_be = [
        (1, "totalsize", blob.len()),
        (2, "off_dt_struct", STRUCTURE),
        (3, "off_dt_strings", strings_at),
        (4, "off_mem_rsvmap", HEADER),
        (7, "boot_cpuid_phys", 0),
        (8, "size_dt_strings", blob.len().saturating_sub(strings_at)),
    ];
    for (index, name, expected) in must_be {
        let found = field(index)?;
        if found as usize != expected {
            return Err((
                index * 4,
                Fault::Header {
                    field: name,
                    found,
                    expected,
                },
            ));
        }
    }
    let reservations = blob
        .get(HEADER..HEADER + RESERVATIONS)
        .ok_or((HEADER, Fault::Truncated))?;
    if reservations.iter().any(|&b| b != 0) {
        return Err((HEADER, Fault::Reservations));
    }
    let structure = blob
        .get(STRUCTURE..strings_at)
        .ok_or((STRUCTURE, Fault::Truncated))?;
    let strings = blob
        .get(strings_at..)
        .ok_or((strings_at, Fault::Truncated))?;
    Ok(Blocks { structure, strings })
}

struct Reader<'a> {
    blocks: Blocks<'a>,
    /// Into the structure block; always a multiple of four between items.
    position: usize,
    /// One past the last byte of the strings block that a property refers to.
    strings_used: usize,
    /// Nodes begun and not ended, outermost first.
    open: Vec<Node<'a>>,
}

impl<'a> Reader<'a> {
    fn tree(&mut self) -> Located<Tree<'a>> {
        let root = loop {
            let at = self.here();
            match self.cell()? {
                BEGIN_NODE => self.begin()?,
                PROP if self.open.last().is_some_and(|n| n.children.is_empty()) => {
                    self.property(at)?;
                }
                END_NODE => {
                    if let Some(root) = self.end(at)? {
                        break root;
                    }
                }
                other => return Err((at, Fault::Token(other))),
            }
        };
        let at = self.here();
        match self.cell()? {
            END => {}
            other => return Err((at, Fault::Token(other))),
        }
        let left = self.blocks.structure.len() - self.position;
        if left > 0 {
            return Err((self.here(), Fault::Trailing(left)));
        }
        let unused = self.blocks.strings.len() - self.strings_used;
        if unused > 0 {
            return Err((self.here() + self.strings_used, Fault::Trailing(unused)));
        }
        Ok(Tree { root })
    }

    fn begin(&mut self) -> Located<()> {
        let at = self.here();
        let name = self.node_name()?;
        if self.open.len() == MAX_DEPTH {
            return Err((at, Fault::TooDeep));
        }
        if self.open.is_empty() {
            if !name.is_empty() {
                return Err((at, Fault::RootName(name.to_owned())));
            }
        } else {
            names::check_node_name(name).map_err(|fault| illegal(at, name, fault))?;
        }
        self.open.push(Node::new(name, ""));
        let compatible = self.compatible()?;
        if let Some(node) = self.open.last_mut() {
            node.compatible = Cow::Borrowed(compatible);
        }
        Ok(())
    }

    /// The property that must come first.
    fn compatible(&mut self) -> Located<&'a str> {
        let at = self.here();
        if self.cell()? != PROP {
            return Err((at, Fault::NoCompatible));
        }
        let (name, value) = self.name_and_value()?;
        if name != COMPATIBLE {
            return Err((at, Fault::NoCompatible));
        }
        let text = value
            .strip_suffix(&[0])
            .and_then(|v| std::str::from_utf8(v).ok());
        text.filter(|t| names::check_compatible(t).is_ok())
            .ok_or((at, Fault::Compatible))
    }

    fn property(&mut self, at: usize) -> Located<()> {
        let (name, value) = self.name_and_value()?;
        let Some(node) = self.open.last_mut() else {
            return Err((at, Fault::Token(PROP)));
        };
        // One of them is `compatible`, which is not in the list.
        if node.properties.len() + 1 == MAX_PROPERTIES {
            return Err((at, Fault::TooManyProperties));
        }
        if name == COMPATIBLE || node.properties.iter().any(|p| p.name == name) {
            return Err((at, Fault::DuplicateProperty(name.to_owned())));
        }
        node.properties.push(Property {
            name: Cow::Borrowed(name),
            value: Cow::Borrowed(value),
        });
        Ok(())
    }

    /// Ends the innermost node; the root is handed out.
    fn end(&mut self, at: usize) -> Located<Option<Node<'a>>> {
        let Some(node) = self.open.last() else {
            return Err((at, Fault::Token(END_NODE)));
        };
        if let Some(name) = duplicate(&node.children) {
            return Err((at, Fault::DuplicateChild(name)));
        }
        let node = self.open.pop();
        match (node, self.open.last_mut()) {
            (Some(node), Some(parent)) => {
                parent.children.push(node);
                Ok(None)
            }
            (node, _) => Ok(node),
        }
    }

    /// What follows the PROP token.
    fn name_and_value(&mut self) -> Located<(&'a str, &'a [u8])> {
        let length = self.cell()? as usize;
        let at = self.here();
        let offset = self.cell()?;
        let name = self.property_name(at, offset)?;
        let value_at = self.position;
        let end = value_at
            .checked_add(length)
            .ok_or((self.here(), Fault::Truncated))?;
        let structure = self.blocks.structure;
        let value = structure
            .get(value_at..end)
            .ok_or((self.here(), Fault::Truncated))?;
        self.position = end;
        self.skip_padding()?;
        Ok((name, value))
    }

    fn property_name(&mut self, at: usize, offset: u32) -> Located<&'a str> {
        let start = offset as usize;
        let rest = self
            .blocks
            .strings
            .get(start..)
            .ok_or((at, Fault::StringOffset(offset)))?;
        let name = until_nul(rest, MAX_PROPERTY_NAME).ok_or((at, Fault::NameEnd))?;
        let name = utf8(at, name)?;
        if name != COMPATIBLE {
            names::check_property_name(name).map_err(|fault| illegal(at, name, fault))?;
        }
        self.strings_used = self.strings_used.max(start + name.len() + 1);
        Ok(name)
    }

    fn node_name(&mut self) -> Located<&'a str> {
        let at = self.here();
        let structure = self.blocks.structure;
        let rest = structure
            .get(self.position..)
            .ok_or((at, Fault::Truncated))?;
        let longest = MAX_NODE_NAME + 1 + MAX_UNIT_ADDRESS;
        let name = until_nul(rest, longest).ok_or((at, Fault::NameEnd))?;
        self.position += name.len() + 1;
        self.skip_padding()?;
        utf8(at, name)
    }

    fn cell(&mut self) -> Located<u32> {
        let cell = number(self.blocks.structure, self.position);
        let cell = cell.ok_or((self.here(), Fault::Truncated))?;
        self.position += 4;
        Ok(cell)
    }

    fn skip_padding(&mut self) -> Located<()> {
        let end = self.position.next_multiple_of(4);
        let padding = self.blocks.structure.get(self.position..end);
        if padding
            .ok_or((self.here(), Fault::Truncated))?
            .iter()
            .any(|&b| b != 0)
        {
            return Err((self.here(), Fault::Padding));
        }
        self.position = end;
        Ok(())
    }

    /// The position as an offset into the blob.
    fn here(&self) -> usize {
        STRUCTURE + self.position
    }

    fn path(&self) -> String {
        let names: Vec<&str> = self.open.iter().skip(1).map(|n| &*n.name).collect();
        format!("/{}", names.join("/"))
    }
}

/// The bytes before the first NUL, which must come within `max` bytes.
fn until_nul(bytes: &[u8], max: usize) -> Option<&[u8]> {
    let end = bytes.iter().take(max + 1).position(|&b| b == 0)?;
    bytes.get(..end)
}

fn utf8(at: usize, name: &[u8]) -> Located<&str> {
    std::str::from_utf8(name).map_err(|_| {
        let byte = name.iter().copied().find(|b| !b.is_ascii()).unwrap_or(0);
        illegal(at, &String::from_utf8_lossy(name), NameFault::Byte(byte))
    })
}

fn illegal(at: usize, name: &str, fault: NameFault) -> (usize, Fault) {
    (
        at,
        Fault::Name {
            name: name.to_owned(),
            fault,
        },
    )
}

/// A name that two of these nodes have.
fn duplicate(nodes: &[Node<'_>]) -> Option<String> {
    let mut names: Vec<&str> = nodes.iter().map(|n| &*n.name).collect();
    // By length first: the order in which numbered children are, so that this is linear for them.
    names.sort_unstable_by_key(|name| (name.len(), *name));
    names
        .windows(2)
        .find(|pair| pair[0] == pair[1])
        .map(|pair| pair[0].to_owned())
}
