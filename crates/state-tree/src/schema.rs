//! Schemas: what nodes look like, as data.
//!
//! Every [`StateNode`] type describes itself. Collected in a [`SchemaSet`], the descriptions let a
//! program judge a tree of any kind without the types that wrote it ([`check`]), and are published
//! as text ([`SchemaSet::to_markdown`]).
//!
//! A tree passes [`check`] exactly if the types whose schemas are in the set can read it.

use crate::error::{ShapeError, ShapeFault};
use crate::node::{StateNode, error, is_unit, out_of_order, wrong_kind};
use crate::tree::{Node, Place, Tree};
use crate::value::ValueType;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What can stand at one place.
#[derive(Clone, Debug)]
pub enum Schema {
    /// A node of one kind.
    Node(NodeSchema),
    /// A node of one of several kinds.
    OneOf(Vec<Schema>),
}

/// A kind of node.
#[derive(Clone, Debug)]
pub struct NodeSchema {
    /// Path of the Rust type.
    pub type_name: &'static str,
    /// The kind with its version, `outlive,thread-v1`.
    pub compatible: &'static str,
    /// What it describes.
    pub doc: &'static str,
    /// Its properties other than `compatible`.
    pub properties: Vec<PropertySchema>,
    /// Its children.
    pub children: Vec<ChildSchema>,
}

/// A property of a kind of node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PropertySchema {
    /// Its name in the tree.
    pub name: &'static str,
    /// What it says.
    pub doc: &'static str,
    /// How its bytes are read.
    pub value_type: ValueType,
    /// Whether it must be there.
    pub required: bool,
}

/// How often a child can be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Exactly once.
    One,
    /// Once or not at all.
    Optional,
    /// Any number of times, as `NAME@0`, `NAME@1`, … in this order (hexadecimal).
    Many,
}

/// A child of a kind of node.
#[derive(Clone, Copy, Debug)]
pub struct ChildSchema {
    /// Its name in the tree, for many the part before the `@`.
    pub name: &'static str,
    /// What it is.
    pub doc: &'static str,
    /// How often it can be there.
    pub arity: Arity,
    /// What it looks like; a function, because kinds can contain themselves.
    pub schema: fn() -> Schema,
}

impl Schema {
    /// The kinds of node that can stand here.
    #[must_use]
    pub fn compatibles(&self) -> Vec<&'static str> {
        match self {
            Self::Node(node) => vec![node.compatible],
            Self::OneOf(kinds) => kinds.iter().flat_map(Schema::compatibles).collect(),
        }
    }
}

impl NodeSchema {
    /// The child that a node of this name would be.
    #[must_use]
    pub fn child(&self, name: &str) -> Option<&ChildSchema> {
        self.children.iter().find(|child| match child.arity {
            Arity::One | Arity::Optional => child.name == name,
            Arity::Many => name
                .strip_prefix(child.name)
                .is_some_and(|rest| rest.starts_with('@')),
        })
    }

    /// A property of this name.
    #[must_use]
    pub fn property(&self, name: &str) -> Option<&PropertySchema> {
        self.properties.iter().find(|p| p.name == name)
    }
}

/// Two types claim one `compatible`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{first} and {second} both describe nodes of the kind {compatible:?}")]
pub struct SchemaConflict {
    /// What they both claim.
    pub compatible: &'static str,
    /// A Rust type.
    pub first: &'static str,
    /// Another Rust type.
    pub second: &'static str,
}

/// All kinds of node that are known, by their `compatible`.
#[derive(Clone, Debug, Default)]
pub struct SchemaSet {
    kinds: BTreeMap<&'static str, NodeSchema>,
}

impl SchemaSet {
    /// A set that knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a type and everything that its nodes can contain.
    ///
    /// # Errors
    /// When two types claim one `compatible`.
    pub fn add<T: StateNode>(&mut self) -> Result<&mut Self, SchemaConflict> {
        let mut pending = vec![T::schema()];
        while let Some(schema) = pending.pop() {
            match schema {
                Schema::OneOf(kinds) => pending.extend(kinds),
                Schema::Node(node) => {
                    if let Some(known) = self.kinds.get(node.compatible) {
                        if known.type_name != node.type_name {
                            return Err(SchemaConflict {
                                compatible: node.compatible,
                                first: known.type_name,
                                second: node.type_name,
                            });
                        }
                        continue;
                    }
                    pending.extend(node.children.iter().map(|child| (child.schema)()));
                    self.kinds.insert(node.compatible, node);
                }
            }
        }
        Ok(self)
    }

    /// The kind of this `compatible`.
    #[must_use]
    pub fn get(&self, compatible: &str) -> Option<&NodeSchema> {
        self.kinds.get(compatible)
    }

    /// All kinds, in the order of their `compatible`.
    pub fn iter(&self) -> impl Iterator<Item = &NodeSchema> {
        self.kinds.values()
    }

    /// The kinds as a chapter of Markdown, for publication.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        for kind in self.iter() {
            kind.markdown(&mut text);
        }
        text
    }
}

impl NodeSchema {
    /// Adds a section. Writing into a string cannot fail, so results are dropped.
    fn markdown(&self, text: &mut String) {
        if !text.is_empty() {
            text.push('\n');
        }
        let _ = writeln!(text, "## `{}`", self.compatible);
        if !self.doc.is_empty() {
            let _ = writeln!(text, "\n{}", self.doc);
        }
        if !self.properties.is_empty() {
            text.push_str("\n| property | type | meaning |\n|---|---|---|\n");
        }
        for p in &self.properties {
            let optional = if p.required { "" } else { ", optional" };
            let doc = cell(p.doc);
            let _ = writeln!(
                text,
                "| `{}` | {}{optional} | {doc} |",
                p.name, p.value_type
            );
        }
        if !self.children.is_empty() {
            text.push_str("\n| child | kind | meaning |\n|---|---|---|\n");
        }
        for child in &self.children {
            let (unit, often) = match child.arity {
                Arity::One => ("", ""),
                Arity::Optional => ("", ", optional"),
                Arity::Many => ("@N", ", any number"),
            };
            let kinds: Vec<_> = (child.schema)()
                .compatibles()
                .iter()
                .map(|c| format!("`{c}`"))
                .collect();
            let (kinds, doc) = (kinds.join(" or "), cell(child.doc));
            let _ = writeln!(text, "| `{}{unit}` | {kinds}{often} | {doc} |", child.name);
        }
    }
}

/// Text that can stand in a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}

/// Most problems that [`check`] lists; what follows is summed up as [`ShapeFault::More`].
pub const MAX_PROBLEMS: usize = 100;

/// Judges a tree by the schemas of a set: everything that is wrong with it, in the order of the
/// tree. Empty means that the types of the set can read it. The root can be of any kind.
#[must_use]
pub fn check(tree: &Tree<'_>, set: &SchemaSet) -> Vec<ShapeError> {
    let mut check = Check {
        set,
        problems: Vec::new(),
    };
    check.node(&tree.root, &Place::root(), None);
    check.problems
}

struct Check<'s> {
    set: &'s SchemaSet,
    problems: Vec<ShapeError>,
}

impl Check<'_> {
    fn add(&mut self, at: &Place<'_>, fault: ShapeFault) {
        match self.problems.len() {
            0..MAX_PROBLEMS => self.problems.push(error(at, fault)),
            MAX_PROBLEMS => self.problems.push(error(at, ShapeFault::More)),
            _ => {}
        }
    }

    fn full(&self) -> bool {
        self.problems.len() > MAX_PROBLEMS
    }

    /// Recursion ends where a place is too deep.
    fn node(&mut self, node: &Node<'_>, at: &Place<'_>, allowed: Option<&[&'static str]>) {
        if self.full() {
            return;
        }
        if at.too_deep() {
            return self.add(at, ShapeFault::TooDeep);
        }
        let set = self.set;
        let allowed_here = allowed.is_none_or(|a| a.contains(&&*node.compatible));
        match set.get(&node.compatible) {
            Some(schema) if allowed_here => self.known(node, at, schema),
            _ => {
                let all: Vec<_> = set.kinds.keys().copied().collect();
                self.add(at, wrong_kind(node, at, allowed.unwrap_or(&all)).fault);
                for child in &node.children {
                    self.node(child, &at.child(&child.name), None);
                }
            }
        }
    }

    fn known(&mut self, node: &Node<'_>, at: &Place<'_>, schema: &NodeSchema) {
        for property in &schema.properties {
            match node
                .property(property.name)
                .map(|value| property.value_type.check(value))
            {
                Some(Err(fault)) => {
                    let property = property.name.to_owned();
                    self.add(at, ShapeFault::Value { property, fault });
                }
                None if property.required => {
                    self.add(at, ShapeFault::MissingProperty(property.name.to_owned()));
                }
                _ => {}
            }
        }
        for fault in schema.unknown(node) {
            self.add(at, fault);
            if self.full() {
                return;
            }
        }
        for child in &schema.children {
            self.children(node, at, child);
        }
    }

    fn children(&mut self, node: &Node<'_>, at: &Place<'_>, schema: &ChildSchema) {
        let allowed = (schema.schema)().compatibles();
        if schema.arity != Arity::Many {
            match node.child(schema.name) {
                Some(child) => self.node(child, &at.child(schema.name), Some(&allowed)),
                None if schema.arity == Arity::One => {
                    self.add(at, ShapeFault::MissingChild(schema.name.to_owned()));
                }
                None => {}
            }
            return;
        }
        let mut due = 0;
        for child in &node.children {
            let prefix = child.name.strip_prefix(schema.name);
            let Some(unit) = prefix.and_then(|u| u.strip_prefix('@')) else {
                continue;
            };
            if !is_unit(unit, due) {
                self.add(at, out_of_order(&child.name, schema.name, due));
            }
            self.node(child, &at.child(&child.name), Some(&allowed));
            due += 1;
        }
    }
}
