//! Nodes as Rust types: what `#[derive(StateNode)]` fulfils, and the parts its code is made of.
//!
//! # Rules
//! - A node is read only as the kind and version which its `compatible` states. A new version is
//!   a new type; an enum of both reads either, so that every released form stays readable.
//! - Nothing is skipped: what is not known is refused by name, because state that is not
//!   understood cannot be restored.

use crate::error::{ReadError, ShapeError, ShapeFault, ValueFault, WriteError};
use crate::names;
use crate::schema::{Arity, NodeSchema, Schema};
use crate::tree::{Node, Place, Tree};
use crate::value::{StateValue, ValueType};
use crate::writer::Writer;

/// A type whose values are nodes of a state tree. Derive it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a node of the state tree",
    label = "not a node",
    note = "`#[derive(StateNode)]` it and give it `#[state(compatible = \"outlive,…-v1\")]`"
)]
pub trait StateNode: Sized {
    /// What nodes of this type look like.
    fn schema() -> Schema;

    /// Whether nodes with this `compatible` are read by this type.
    fn accepts(compatible: &str) -> bool;

    /// Writes the node and everything below it under this name.
    ///
    /// # Errors
    /// When something has no encoding.
    fn encode(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError>;

    /// Reads the node and everything below it; `at` is where it stands, for errors.
    ///
    /// # Errors
    /// When the node is not exactly of this type.
    fn decode(node: &Node<'_>, at: &Place<'_>) -> Result<Self, ShapeError>;
}

/// Writes a value as a blob of its own, as the root node.
///
/// # Errors
/// When something in it has no encoding (a string with a NUL), or the blob would be too large.
pub fn to_fdt<T: StateNode>(state: &T) -> Result<Vec<u8>, WriteError> {
    let mut writer = Writer::new();
    state.encode(&mut writer, "")?;
    writer.finish()
}

/// Reads a value back from a blob that is not trusted.
///
/// # Errors
/// When the blob is not a strict tree, or not exactly of this type.
pub fn from_fdt<T: StateNode>(blob: &[u8]) -> Result<T, ReadError> {
    Ok(from_tree(&Tree::parse(blob)?)?)
}

/// Reads a value from a tree that was parsed before.
///
/// # Errors
/// When the tree is not exactly of this type.
pub fn from_tree<T: StateNode>(tree: &Tree<'_>) -> Result<T, ShapeError> {
    T::decode(&tree.root, &Place::root())
}

impl<T: StateNode> StateNode for Box<T> {
    fn schema() -> Schema {
        T::schema()
    }
    fn accepts(compatible: &str) -> bool {
        T::accepts(compatible)
    }
    fn encode(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError> {
        (**self).encode(writer, name)
    }
    fn decode(node: &Node<'_>, at: &Place<'_>) -> Result<Self, ShapeError> {
        T::decode(node, at).map(Box::new)
    }
}

/// A field that is a property: a [`StateValue`], or an `Option` of one. Not to be implemented.
pub trait PropertyField: Sized {
    /// Whether the property must be there.
    const REQUIRED: bool;
    /// The type of its value.
    fn value_type() -> ValueType;
    /// Writes it, if it is there.
    ///
    /// # Errors
    /// When the value has no encoding.
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError>;
    /// Reads it; `Ok(None)` where it must be there and is not.
    ///
    /// # Errors
    /// When the bytes are not a value of the type.
    fn take(found: Option<&[u8]>) -> Result<Option<Self>, ValueFault>;
}

impl<T: StateValue> PropertyField for T {
    const REQUIRED: bool = true;
    fn value_type() -> ValueType {
        T::value_type()
    }
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError> {
        writer.property(name, self)
    }
    fn take(found: Option<&[u8]>) -> Result<Option<Self>, ValueFault> {
        found.map(T::decode).transpose()
    }
}

impl<T: StateValue> PropertyField for Option<T> {
    const REQUIRED: bool = false;
    fn value_type() -> ValueType {
        T::value_type()
    }
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError> {
        self.as_ref()
            .map_or(Ok(()), |value| writer.property(name, value))
    }
    fn take(found: Option<&[u8]>) -> Result<Option<Self>, ValueFault> {
        found.map(T::decode).transpose().map(Some)
    }
}

/// A field that is a child: a [`StateNode`], or an `Option` of one. Not to be implemented.
pub trait ChildField: Sized {
    /// Whether the child must be there.
    const ARITY: Arity;
    /// What it looks like.
    fn schema() -> Schema;
    /// Writes it, if it is there.
    ///
    /// # Errors
    /// When something in it has no encoding.
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError>;
    /// Reads it; `Ok(None)` where it must be there and is not.
    ///
    /// # Errors
    /// When the node is not of the type.
    fn take(found: Option<&Node<'_>>, at: &Place<'_>) -> Result<Option<Self>, ShapeError>;
}

impl<T: StateNode> ChildField for T {
    const ARITY: Arity = Arity::One;
    fn schema() -> Schema {
        T::schema()
    }
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError> {
        self.encode(writer, name)
    }
    fn take(found: Option<&Node<'_>>, at: &Place<'_>) -> Result<Option<Self>, ShapeError> {
        found.map(|node| T::decode(node, at)).transpose()
    }
}

impl<T: StateNode> ChildField for Option<T> {
    const ARITY: Arity = Arity::Optional;
    fn schema() -> Schema {
        T::schema()
    }
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError> {
        self.as_ref()
            .map_or(Ok(()), |node| node.encode(writer, name))
    }
    fn take(found: Option<&Node<'_>>, at: &Place<'_>) -> Result<Option<Self>, ShapeError> {
        found.map(|node| T::decode(node, at)).transpose().map(Some)
    }
}

/// A field that is a list of children, `NAME@0`, `NAME@1`, … (hexadecimal): a `Vec` of
/// [`StateNode`]. Not to be implemented.
pub trait ChildrenField: Sized {
    /// What each of them looks like.
    fn schema() -> Schema;
    /// Writes them.
    ///
    /// # Errors
    /// When something in them has no encoding.
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError>;
    /// Adds the next one to the list.
    ///
    /// # Errors
    /// When the node is not of the type.
    fn take(&mut self, node: &Node<'_>, at: &Place<'_>) -> Result<(), ShapeError>;
    /// An empty list.
    fn none() -> Self;
}

impl<T: StateNode> ChildrenField for Vec<T> {
    fn schema() -> Schema {
        T::schema()
    }
    fn put(&self, writer: &mut Writer, name: &str) -> Result<(), WriteError> {
        use std::fmt::Write as _;
        let mut numbered = String::with_capacity(name.len() + 17);
        for (index, node) in self.iter().enumerate() {
            numbered.clear();
            // Writing into a string cannot fail.
            let _ = write!(numbered, "{name}@{index:x}");
            node.encode(writer, &numbered)?;
        }
        Ok(())
    }
    fn take(&mut self, node: &Node<'_>, at: &Place<'_>) -> Result<(), ShapeError> {
        self.push(T::decode(node, at)?);
        Ok(())
    }
    fn none() -> Self {
        Self::new()
    }
}

/// Whether `unit` is the unit address of the child number `index`, in its one legal form.
pub(crate) fn is_unit(unit: &str, index: usize) -> bool {
    let digits = unit.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let canonical = unit == "0" || !unit.starts_with('0');
    digits && canonical && usize::from_str_radix(unit, 16) == Ok(index)
}

/// Takes a node apart, field by field, and remembers whether something is left over.
#[derive(Debug)]
pub struct Fields<'n> {
    node: &'n Node<'n>,
    at: &'n Place<'n>,
    properties: usize,
    children: usize,
    /// Where the next property is if they are in the order in which they are asked for.
    next: usize,
}

impl<'n> Fields<'n> {
    /// Begins with a node that must be of this kind.
    ///
    /// # Errors
    /// When it is of another kind or version.
    pub fn open(
        node: &'n Node<'n>,
        at: &'n Place<'n>,
        compatible: &'static str,
    ) -> Result<Self, ShapeError> {
        if at.too_deep() {
            return Err(error(at, ShapeFault::TooDeep));
        }
        if node.compatible != compatible {
            return Err(wrong_kind(node, at, &[compatible]));
        }
        Ok(Self {
            node,
            at,
            properties: 0,
            children: 0,
            next: 0,
        })
    }

    /// Takes a property.
    ///
    /// # Errors
    /// When it is missing or its value is not of its type.
    pub fn property<T: PropertyField>(&mut self, name: &'static str) -> Result<T, ShapeError> {
        let all = &self.node.properties;
        let as_expected = all.get(self.next).is_some_and(|p| p.name == name);
        let found = if as_expected {
            Some(self.next)
        } else {
            all.iter().position(|p| p.name == name)
        };
        if let Some(index) = found {
            self.next = index + 1;
            self.properties += 1;
        }
        let value = found.and_then(|index| all.get(index)).map(|p| &*p.value);
        match T::take(value) {
            Ok(Some(value)) => Ok(value),
            Ok(None) => Err(error(self.at, ShapeFault::MissingProperty(name.to_owned()))),
            Err(fault) => Err(error(
                self.at,
                ShapeFault::Value {
                    property: name.to_owned(),
                    fault,
                },
            )),
        }
    }

    /// Takes a child.
    ///
    /// # Errors
    /// When it is missing or not of its type.
    pub fn child<T: ChildField>(&mut self, name: &'static str) -> Result<T, ShapeError> {
        let found = self.node.child(name);
        self.children += usize::from(found.is_some());
        T::take(found, &self.at.child(name))?
            .ok_or_else(|| error(self.at, ShapeFault::MissingChild(name.to_owned())))
    }

    /// Takes the children `NAME@0`, `NAME@1`, …
    ///
    /// # Errors
    /// When one is out of order or not of its type.
    pub fn children<T: ChildrenField>(&mut self, name: &'static str) -> Result<T, ShapeError> {
        let mut list = T::none();
        let mut due = 0;
        for node in &self.node.children {
            let Some(unit) = node
                .name
                .strip_prefix(name)
                .and_then(|u| u.strip_prefix('@'))
            else {
                continue;
            };
            if !is_unit(unit, due) {
                return Err(error(self.at, out_of_order(&node.name, name, due)));
            }
            list.take(node, &self.at.child(&node.name))?;
            due += 1;
        }
        self.children += due;
        Ok(list)
    }

    /// Ends; everything must have been taken.
    ///
    /// # Errors
    /// Names a property or child that was not.
    pub fn finish(self, schema: fn() -> Schema) -> Result<(), ShapeError> {
        let Node {
            properties,
            children,
            ..
        } = self.node;
        if self.properties == properties.len() && self.children == children.len() {
            return Ok(());
        }
        let Schema::Node(schema) = schema() else {
            return Ok(());
        };
        let unknown = schema.unknown(self.node).next();
        Err(error(self.at, unknown.unwrap_or(ShapeFault::More)))
    }
}

pub(crate) fn out_of_order(found: &str, name: &str, due: usize) -> ShapeFault {
    ShapeFault::ChildOrder {
        found: found.to_owned(),
        expected: format!("{name}@{due:x}"),
    }
}

pub(crate) fn error(at: &Place<'_>, fault: ShapeFault) -> ShapeError {
    ShapeError {
        path: at.to_string(),
        fault,
    }
}

/// The refusal of a node whose kind is none of `known`: a newer version of one, or unknown.
#[must_use]
pub fn wrong_kind(node: &Node<'_>, at: &Place<'_>, known: &[&str]) -> ShapeError {
    let found = node.compatible.to_string();
    let newest = names::split_version(&found).and_then(|(stem, version)| {
        let versions = known
            .iter()
            .filter_map(|k| Some((names::split_version(k)?, *k)));
        let same = versions.filter(|((s, _), _)| *s == stem);
        same.max_by_key(|((_, v), _)| *v)
            .filter(|((_, v), _)| *v < version)
    });
    error(
        at,
        match newest {
            Some((_, supported)) => ShapeFault::NewerVersion {
                found,
                supported: supported.to_owned(),
            },
            None => ShapeFault::UnknownCompatible {
                found,
                expected: expected(known),
            },
        },
    )
}

fn expected(known: &[&str]) -> String {
    const SHOWN: usize = 8;
    if known.is_empty() {
        return "none, because no kind is known".to_owned();
    }
    let mut text = known
        .iter()
        .take(SHOWN)
        .copied()
        .collect::<Vec<_>>()
        .join(" or ");
    if known.len() > SHOWN {
        text.push_str(" or others");
    }
    text
}

impl NodeSchema {
    /// What a node has that this schema does not know.
    pub(crate) fn unknown(&self, node: &Node<'_>) -> impl Iterator<Item = ShapeFault> {
        let properties = node
            .properties
            .iter()
            .filter(|p| !self.properties.iter().any(|known| known.name == p.name))
            .map(|p| ShapeFault::UnknownProperty(p.name.to_string()));
        let children = node
            .children
            .iter()
            .filter(|c| self.child(&c.name).is_none())
            .map(|c| ShapeFault::UnknownChild(c.name.to_string()));
        properties.chain(children)
    }
}
