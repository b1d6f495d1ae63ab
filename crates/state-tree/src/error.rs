//! What can be wrong with a tree, and where.
//!
//! Three kinds, by who is to blame: a [`FormatError`] means that the bytes are no device tree of
//! the strict form (the medium or its author), a [`ShapeError`] that the tree is well-formed but
//! does not say what was expected (another version, or its author), a [`WriteError`] that the
//! state in memory cannot be written (our caller).

use crate::names::{MAX_BLOB, MAX_DEPTH, MAX_PROPERTIES, NameFault};

/// The bytes are not a state tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid state tree: {path}, byte {offset:#x}: {fault}")]
pub struct FormatError {
    /// Path of the node that was being read, `/` for the root or the header.
    pub path: String,
    /// Offset into the blob, bytes.
    pub offset: usize,
    /// What is wrong there.
    pub fault: FormatFault,
}

/// What is wrong with the bytes of a tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatFault {
    /// Shorter than a header, or the part ends in the middle of an item.
    #[error("it ends too early")]
    Truncated,
    /// Larger than [`MAX_BLOB`].
    #[error("{0} bytes are more than the largest tree ({MAX_BLOB} bytes)")]
    TooLarge(usize),
    /// The first four bytes are not those of a device tree.
    #[error("the magic number is {0:#010x}, not 0xd00dfeed")]
    Magic(u32),
    /// Another version of the device tree format.
    #[error(
        "device tree format version {version} (compatible down to {last_compatible}); versions 17 and 16 are read"
    )]
    Version {
        /// The stated version.
        version: u32,
        /// The oldest version that it claims to be compatible with.
        last_compatible: u32,
    },
    /// A field of the header is not what the layout demands.
    #[error("the header's {field} is {found:#x}, not {expected:#x}")]
    Header {
        /// The field, by its name in the Devicetree Specification (5.2).
        field: &'static str,
        /// The value found.
        found: u32,
        /// The only legal value.
        expected: usize,
    },
    /// The memory reservation map is not empty.
    #[error("the memory reservation map is not empty")]
    Reservations,
    /// A token that is unknown or not allowed here.
    #[error("token {0:#x} is not allowed here")]
    Token(u32),
    /// A name that is not terminated within its limit, or not legal.
    #[error("illegal name {name:?}: {fault}")]
    Name {
        /// The name, shortened.
        name: String,
        /// What is wrong with it.
        fault: NameFault,
    },
    /// A name without its terminating NUL within the longest legal length.
    #[error("a name is not terminated")]
    NameEnd,
    /// The root has a name.
    #[error("the root has the name {0:?}")]
    RootName(String),
    /// Bytes between items are not zero.
    #[error("padding is not zero")]
    Padding,
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("nested deeper than {MAX_DEPTH} nodes")]
    TooDeep,
    /// More properties than [`MAX_PROPERTIES`].
    #[error("more than {MAX_PROPERTIES} properties in one node")]
    TooManyProperties,
    /// Two properties of one node with one name.
    #[error("two properties are called {0:?}")]
    DuplicateProperty(String),
    /// Two children of one node with one name.
    #[error("two children are called {0:?}")]
    DuplicateChild(String),
    /// The first property of a node is not `compatible`.
    #[error("the node does not begin with the property `compatible`")]
    NoCompatible,
    /// The value of `compatible` is not one legal string.
    #[error("the value of `compatible` is not one legal string")]
    Compatible,
    /// The name of a property lies outside the strings block.
    #[error("the name of a property lies outside the strings block (offset {0:#x})")]
    StringOffset(u32),
    /// Bytes which nothing refers to, after the end of the tree or of the last string.
    #[error("{0} unused bytes at the end")]
    Trailing(usize),
}

/// A well-formed tree does not say what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("state tree node {path}: {fault}")]
pub struct ShapeError {
    /// Path of the node.
    pub path: String,
    /// What is wrong with it.
    pub fault: ShapeFault,
}

/// What is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeFault {
    /// Its kind is not known, or not one that can stand here.
    #[error("unknown kind {found:?}; expected {expected}")]
    UnknownCompatible {
        /// The `compatible` found.
        found: String,
        /// What could stand here, in words.
        expected: String,
    },
    /// The kind is known, but this version of it was written by a newer version of Outlive.
    #[error(
        "{found:?} is a newer version than {supported:?}, the newest known here: use a newer outlive"
    )]
    NewerVersion {
        /// The `compatible` found.
        found: String,
        /// The newest version known of it.
        supported: String,
    },
    /// A property that must be there is not.
    #[error("property {0:?} is missing")]
    MissingProperty(String),
    /// A property that this kind of node does not have.
    #[error("unknown property {0:?}")]
    UnknownProperty(String),
    /// The value of a property is not of its type.
    #[error("property {property:?}: {fault}")]
    Value {
        /// Name of the property.
        property: String,
        /// What is wrong with the value.
        fault: ValueFault,
    },
    /// A child that must be there is not.
    #[error("child {0:?} is missing")]
    MissingChild(String),
    /// A child that this kind of node does not have.
    #[error("unknown child {0:?}")]
    UnknownChild(String),
    /// Numbered children are not numbered from 0 on, in order and without gaps.
    #[error("child {found:?} stands where {expected:?} is due")]
    ChildOrder {
        /// The child found.
        found: String,
        /// The child that is due.
        expected: String,
    },
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("nested deeper than {MAX_DEPTH} nodes")]
    TooDeep,
    /// More was wrong than is listed.
    #[error("more problems follow, which are not listed")]
    More,
}

/// What is wrong with the value of a property.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueFault {
    /// Not as long as its type.
    #[error("{found} bytes instead of {expected}")]
    Length {
        /// The length found, bytes.
        found: usize,
        /// The length of the type, bytes.
        expected: usize,
    },
    /// Not a whole number of elements.
    #[error("{found} bytes are not a multiple of {element}")]
    Multiple {
        /// The length found, bytes.
        found: usize,
        /// Length of one element, bytes.
        element: usize,
    },
    /// A number that its type cannot hold.
    #[error("{found:#x} is more than {max:#x}")]
    Range {
        /// The number found.
        found: u32,
        /// The largest number of the type.
        max: u32,
    },
    /// A string without its terminating NUL.
    #[error("the string is not terminated")]
    NotTerminated,
    /// A string with a NUL in it.
    #[error("the string contains a NUL byte")]
    NulInside,
    /// A string that is not UTF-8.
    #[error("the string is not UTF-8")]
    NotUtf8,
    /// None of the words that can stand here.
    #[error("{found:?} is none of {expected}")]
    NotOneOf {
        /// The word found, shortened.
        found: String,
        /// The words that can stand here.
        expected: String,
    },
}

/// A tree cannot be read: its bytes or its contents are to blame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The bytes are not a state tree.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The tree does not say what was expected.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

/// State in memory cannot be written as a tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot write the state tree, node {path}: {fault}")]
pub struct WriteError {
    /// Path of the node that was being written.
    pub path: String,
    /// What is wrong.
    pub fault: WriteFault,
}

/// Why a tree cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteFault {
    /// A name of a node, a property or a kind that is not legal.
    #[error("illegal name {name:?}: {fault}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        fault: NameFault,
    },
    /// The root cannot have a name.
    #[error("the root has the name {0:?}")]
    RootName(String),
    /// A value that has no encoding.
    #[error("property {property:?}: {fault}")]
    Value {
        /// Name of the property.
        property: String,
        /// What is wrong with the value.
        fault: ValueFault,
    },
    /// Two properties of one node with one name.
    #[error("two properties are called {0:?}")]
    DuplicateProperty(String),
    /// Two children of one node with one name.
    #[error("two children are called {0:?}")]
    DuplicateChild(String),
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("nested deeper than {MAX_DEPTH} nodes")]
    TooDeep,
    /// More properties than [`MAX_PROPERTIES`].
    #[error("more than {MAX_PROPERTIES} properties in one node")]
    TooManyProperties,
    /// Larger than [`MAX_BLOB`].
    #[error("the tree is larger than {MAX_BLOB} bytes")]
    TooLarge,
    /// The calls of the writer did not nest.
    #[error("misuse of the tree writer: {0}")]
    Misuse(&'static str),
}
