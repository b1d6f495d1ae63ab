//! The state tree: saved state as a flattened device tree, and Rust types that are its nodes.
//!
//! A state tree says everything about a subject but the contents of its pages: which threads it
//! has, what stands in their registers, which files are open. It is a flattened device tree (DTB
//! version 17), so that the tools of that world read it: `dtc -I dtb -O dts`.
//!
//! ```
//! use outlive_state_tree::{StateNode, StateValue, from_fdt, to_fdt};
//!
//! /// One end of a pipe.
//! #[derive(StateNode, Debug, PartialEq)]
//! #[state(compatible = "outlive,example-pipe-v1")]
//! struct PipeEnd {
//!     /// Names the pipe within the epoch.
//!     pipe_id: u64,
//!     /// What can be done with this end.
//!     mode: Mode,
//! }
//!
//! #[derive(StateValue, Debug, PartialEq)]
//! enum Mode {
//!     Read,
//!     Write,
//! }
//!
//! let end = PipeEnd { pipe_id: 7, mode: Mode::Read };
//! let blob = to_fdt(&end)?;
//! assert_eq!(from_fdt::<PipeEnd>(&blob)?, end);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it is made
//! ```text
//! types      node     StateNode: derive; field by field, nothing skipped
//!            value    StateValue: what a property can be, one encoding each
//!            schema   the types as data: check any tree, publish the formats
//! bytes      writer   one pass, deterministic          tree  the model without types
//!            reader   trusts nothing                   dts   prints trees as source
//!            names    rules and limits which both keep
//! ```
//!
//! # Rules
//! - Pure: no system call, no file, no clock.
//! - Every node begins with `compatible`, which names its kind and version
//!   (`outlive,thread-v1`). A kind never changes once released: a change is a new version, a new
//!   Rust type, and an enum of both types reads either.
//! - Bytes are hostile. No panic, no overflow, no unbounded recursion, memory proportional to the
//!   blob. What is not known is refused by name and path, never skipped.
//! - The same state gives the same bytes, so that an unchanged group can be told by comparing.
//!
//! # What it refuses to do
//! - Page contents do not belong here; a tree refers to them as ranges. A blob is at most
//!   [`MAX_BLOB`].
//! - No phandles, no overlays, no memory reservations, no NOP tokens: trees are data, not a
//!   description of hardware.
//! - No defaults for what is missing: an `Option` says that absence means something.

mod dts;
mod error;
mod names;
mod node;
mod reader;
mod schema;
mod tree;
mod value;
mod writer;

pub use dts::{to_dts, to_dts_with};
pub use error::{
    FormatError, FormatFault, ReadError, ShapeError, ShapeFault, ValueFault, WriteError, WriteFault,
};
pub use names::{
    COMPATIBLE, MAX_BLOB, MAX_COMPATIBLE, MAX_DEPTH, MAX_NODE_NAME, MAX_PROPERTIES,
    MAX_PROPERTY_NAME, MAX_UNIT_ADDRESS, NameFault, split_version,
};
pub use node::{
    ChildField, ChildrenField, Fields, PropertyField, StateNode, from_fdt, from_tree, to_fdt,
    wrong_kind,
};
pub use outlive_state_tree_derive::{StateNode, StateValue};
pub use schema::{
    Arity, ChildSchema, MAX_PROBLEMS, NodeSchema, PropertySchema, Schema, SchemaConflict,
    SchemaSet, check,
};
pub use tree::{Node, Place, Property, Tree};
pub use value::{Sink, StateValue, ValueType, choice};
pub use writer::Writer;
