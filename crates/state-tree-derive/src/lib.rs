//! Derive macros of the state tree; use them through `outlive_state_tree`, which re-exports them.
//!
//! # `StateNode`
//! - On a struct with `#[state(compatible = "outlive,thread-v1")]`: a node. Fields are properties;
//!   `#[state(child)]` makes one a child node (or an optional one, if it is an `Option`),
//!   `#[state(children)]` a `Vec` of numbered child nodes.
//! - On an enum whose variants each hold one node: whichever of them the `compatible` says.
//!
//! # `StateValue`
//! On an enum without fields: a string property, one word for each variant.
//!
//! # Names
//! `snake_case` and `CamelCase` become `kebab-case`; `#[state(rename = "…")]` on a field or variant
//! says otherwise. Doc comments become descriptions in the schema.
//!
//! # What is refused at compile time
//! Names which a device tree cannot hold (properties and nodes: at most 31 bytes; `name` and
//! `phandle`, which device tree tools use for themselves), two of one name, a `compatible` without
//! a version, generic types.

mod attributes;
mod node;
mod value;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Makes a struct a node of the state tree, or an enum a choice of nodes.
#[proc_macro_derive(StateNode, attributes(state))]
pub fn state_node(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    node::derive(&input)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Makes an enum without fields the value of a property.
#[proc_macro_derive(StateValue, attributes(state))]
pub fn state_value(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    value::derive(&input)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
