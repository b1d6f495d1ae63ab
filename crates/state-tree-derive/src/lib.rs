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

#[cfg(test)]
mod tests {
    use crate::{node, value};
    use syn::parse_quote as input;

    /// The refusal of a derive, as the compiler would print it.
    fn of_node(input: syn::DeriveInput) -> String {
        node::derive(&input).map_or_else(|e| e.to_string(), |_| "accepted".to_owned())
    }

    fn of_value(input: syn::DeriveInput) -> String {
        value::derive(&input).map_or_else(|e| e.to_string(), |_| "accepted".to_owned())
    }

    fn check(found: &str, expected: &str) {
        assert!(
            found.contains(expected),
            "{found:?} instead of {expected:?}"
        );
    }

    #[test]
    fn nodes_that_are_refused() {
        let cases: Vec<(syn::DeriveInput, &str)> = vec![
            (
                input!(
                    struct S {
                        a: u32,
                    }
                ),
                "needs #[state(compatible",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s")]
                    struct S {}
                ),
                "not of the form",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S(u32);
                ),
                "need names",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S<T> {
                        a: T,
                    }
                ),
                "generic",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S {
                        name: String,
                    }
                ),
                "meaning of their own",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S {
                        a_name_which_is_longer_than_thirty_one: u32,
                    }
                ),
                "names in a device tree have 1 to 31",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S {
                        a: u32,
                        #[state(child, rename = "a")]
                        b: T,
                    }
                ),
                "two fields are called `a`",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S {
                        #[state(child, children)]
                        b: T,
                    }
                ),
                "not both",
            ),
            (
                input!(
                    #[state(compatible = "outlive,s-v1")]
                    struct S {
                        #[state(kid)]
                        b: T,
                    }
                ),
                "unknown key `kid`; expected child, children, rename",
            ),
            (input!(union U { a: u32 }), "a union cannot be a node"),
            (
                input!(
                    enum E {
                        A(Pipe),
                        B,
                    }
                ),
                "exactly one node",
            ),
            (
                input!(
                    enum E {
                        A(Pipe, File),
                    }
                ),
                "exactly one node",
            ),
            (
                input!(
                    enum E {}
                ),
                "no choice",
            ),
            (
                input!(
                    #[state(compatible = "outlive,e-v1")]
                    enum E {
                        A(Pipe),
                    }
                ),
                "nothing can stand",
            ),
        ];
        for (input, expected) in cases {
            check(&of_node(input), expected);
        }
    }

    #[test]
    fn values_that_are_refused() {
        check(
            &of_value(input!(
                struct S;
            )),
            "only an enum without fields",
        );
        check(
            &of_value(input!(
                enum E {
                    A(u32),
                }
            )),
            "cannot have fields",
        );
        check(
            &of_value(input!(
                enum E {}
            )),
            "without variants",
        );
        let twice = input!(
            enum E {
                A,
                #[state(rename = "a")]
                B,
            }
        );
        check(&of_value(twice), "two variants are called `a`");
        check(
            &of_value(input!(
                enum E<T> {
                    A,
                }
            )),
            "generic",
        );
    }

    #[test]
    fn what_is_legal_is_accepted() {
        let node = input!(
            #[state(compatible = "outlive,s-v1")]
            struct S {
                exactly_thirty_one_bytes_longxx: u32,
                #[state(children)]
                kids: Vec<S>,
            }
        );
        check(&of_node(node), "accepted");
        check(
            &of_node(input!(
                enum E {
                    A(Pipe),
                }
            )),
            "accepted",
        );
        check(
            &of_value(input!(
                enum E {
                    A,
                    B,
                }
            )),
            "accepted",
        );
    }
}
