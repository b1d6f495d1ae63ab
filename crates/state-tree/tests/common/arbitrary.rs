//! Arbitrary legal trees.

use outlive_state_tree::{Node, Tree};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

fn property_name() -> impl Strategy<Value = String> {
    let any = prop_oneof![4 => "[a-z0-9,._+?#A-Z-]{1,31}", 1 => "[abc]", 1 => "[a-c]{31}"];
    any.prop_filter("reserved", |name| {
        !["name", "phandle", "linux,phandle", "compatible"].contains(&name.as_str())
    })
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        vec(any::<u8>(), 0..40),
        "[ -~]{1,20}\0".prop_map(String::into_bytes),
        "[ -~]{1,9}\0[ -~]{1,9}\0".prop_map(String::into_bytes),
        vec(any::<u32>(), 0..12).prop_map(|n| n.iter().flat_map(|n| n.to_be_bytes()).collect()),
        vec(0u8..2, 0..300),
    ]
}

fn node_name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zA-Z0-9,._+-]{1,31}",
        "[a-zA-Z0-9,._+-]{1,31}@[0-9a-f]{1,16}",
        "[ab]@[01]"
    ]
}

/// Any legal tree of moderate size.
pub fn tree() -> impl Strategy<Value = Tree<'static>> {
    let parts = || {
        (
            "[a-z0-9,.-]{1,63}",
            btree_map(property_name(), value(), 0..6),
        )
    };
    let leaf = parts().prop_map(|(compatible, properties)| node(compatible, properties));
    let inner = leaf.prop_recursive(4, 40, 6, move |child| {
        (parts(), btree_map(node_name(), child, 0..6)).prop_map(
            |((compatible, properties), children)| {
                let mut node = node(compatible, properties);
                node.children
                    .extend(children.into_iter().map(|(name, mut child)| {
                        child.name = name.into();
                        child
                    }));
                node
            },
        )
    });
    inner.prop_map(|root| Tree { root })
}

fn node(
    compatible: String,
    properties: std::collections::BTreeMap<String, Vec<u8>>,
) -> Node<'static> {
    properties
        .into_iter()
        .fold(Node::new("", compatible), |node, (name, v)| {
            node.with(name, v)
        })
}
