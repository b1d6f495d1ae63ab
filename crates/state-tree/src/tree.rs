//! The model of a tree, without types: what a reader of unknown trees works with.
//!
//! Names and values are borrowed from the blob where the tree was parsed, and owned where it was
//! built. A tree that came from [`Tree::parse`] keeps every rule of [`crate::names`]; one that was
//! built by hand is held to them when it is written.

use crate::{FormatError, names::MAX_DEPTH};
use crate::{error::WriteError, reader, writer::Writer};
use std::{borrow::Cow, fmt};

/// A whole state tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree<'a> {
    /// The root, whose name is empty.
    pub root: Node<'a>,
}

/// One node. Properties come before children; both keep their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node<'a> {
    /// `name` or `name@unit-address`; empty for the root.
    pub name: Cow<'a, str>,
    /// What kind of state this is, and in which version: `outlive,fd-pipe-v1`.
    pub compatible: Cow<'a, str>,
    /// All other properties, by names which differ from each other.
    pub properties: Vec<Property<'a>>,
    /// Children, by names which differ from each other.
    pub children: Vec<Node<'a>>,
}

/// A property: a name and bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property<'a> {
    /// At most 31 bytes.
    pub name: Cow<'a, str>,
    /// The encoded value; see [`crate::ValueType`] for the encodings.
    pub value: Cow<'a, [u8]>,
}

impl<'a> Tree<'a> {
    /// Reads a blob, strictly. Nothing is copied; memory is proportional to the blob.
    ///
    /// # Errors
    /// When the bytes are not exactly one tree of the strict form.
    pub fn parse(blob: &'a [u8]) -> Result<Self, FormatError> {
        reader::parse(blob)
    }

    /// Writes the tree as a blob.
    ///
    /// # Errors
    /// When the tree breaks a rule of the format.
    pub fn to_fdt(&self) -> Result<Vec<u8>, WriteError> {
        let mut writer = Writer::new();
        write_node(&self.root, &mut writer)?;
        writer.finish()
    }
}

/// Recursion ends at [`MAX_DEPTH`], where the writer refuses to begin another node.
fn write_node(node: &Node<'_>, writer: &mut Writer) -> Result<(), WriteError> {
    writer.begin(&node.name, &node.compatible)?;
    for property in &node.properties {
        writer.bytes(&property.name, &property.value)?;
    }
    for child in &node.children {
        write_node(child, writer)?;
    }
    writer.end()
}

impl<'a> Node<'a> {
    /// A node without properties and children.
    pub fn new(name: impl Into<Cow<'a, str>>, compatible: impl Into<Cow<'a, str>>) -> Self {
        Self {
            name: name.into(),
            compatible: compatible.into(),
            properties: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Adds a property with these bytes.
    #[must_use]
    pub fn with(mut self, name: impl Into<Cow<'a, str>>, value: impl Into<Cow<'a, [u8]>>) -> Self {
        self.properties.push(Property {
            name: name.into(),
            value: value.into(),
        });
        self
    }

    /// Adds a child.
    #[must_use]
    pub fn with_child(mut self, child: Node<'a>) -> Self {
        self.children.push(child);
        self
    }

    /// The bytes of a property.
    #[must_use]
    pub fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties
            .iter()
            .find(|p| p.name == name)
            .map(|p| &*p.value)
    }

    /// A child by its full name.
    #[must_use]
    pub fn child(&self, name: &str) -> Option<&Node<'a>> {
        self.children.iter().find(|c| c.name == name)
    }
}

/// Where a node is: a path as a list on the stack, so that it costs nothing until an error is
/// told.
#[derive(Clone, Copy, Debug)]
pub struct Place<'p> {
    parent: Option<&'p Place<'p>>,
    name: &'p str,
    depth: usize,
}

impl<'p> Place<'p> {
    /// The root.
    #[must_use]
    pub fn root() -> Self {
        Self {
            parent: None,
            name: "",
            depth: 1,
        }
    }

    /// A child of this place.
    #[must_use]
    pub fn child(&'p self, name: &'p str) -> Place<'p> {
        Place {
            parent: Some(self),
            name,
            depth: self.depth + 1,
        }
    }

    /// Whether this place is deeper than a tree may be.
    #[must_use]
    pub fn too_deep(&self) -> bool {
        self.depth > MAX_DEPTH
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parent {
            None => f.write_str("/"),
            Some(parent) if parent.parent.is_none() => write!(f, "/{}", self.name),
            Some(parent) => write!(f, "{parent}/{}", self.name),
        }
    }
}
