//! The state trees of an epoch as one device tree source.
//!
//! A group `process-7/memory` becomes the node `/process-7/memory`. What the trees hold is printed
//! as it is; only names of groups that could not be names of nodes are changed, and trees that
//! cannot be parsed are left out.

use outlive_epoch::EpochReader;
use outlive_keeper::KeeperError;
use outlive_state_tree::{MAX_NODE_NAME, Node, SchemaSet, Tree};
use std::borrow::Cow;

/// What the root says of itself.
const ROOT: &str = "outlive,epoch-v1";
/// What a node says that stands for the first part of a group's name.
const GROUPS: &str = "outlive,groups-v1";

/// The source, which `dtc` takes as a whole.
pub fn source(reader: &dyn EpochReader, schemas: &SchemaSet) -> Result<String, KeeperError> {
    let mut blobs = Vec::new();
    for name in reader.groups() {
        let blob = reader.tree(&name)?.unwrap_or_default();
        blobs.push((name, blob));
    }
    Ok(outlive_state_tree::to_dts_with(&whole(&blobs), schemas))
}

fn whole(blobs: &[(String, Vec<u8>)]) -> Tree<'_> {
    let mut root = empty(String::new(), ROOT);
    for (name, blob) in blobs {
        let Ok(tree) = Tree::parse(blob) else {
            continue;
        };
        let (parent, leaf) = match name.split_once('/') {
            Some((first, rest)) => (child(&mut root, first), rest),
            None => (&mut root, name.as_str()),
        };
        let name = Cow::Owned(free(parent, leaf));
        parent.children.push(Node { name, ..tree.root });
    }
    Tree { root }
}

/// The node for the first part of a name, made where it is missing.
fn child<'n, 'a>(root: &'n mut Node<'a>, name: &str) -> &'n mut Node<'a> {
    let legal = legal(name);
    let known = root
        .children
        .iter()
        .position(|node| node.name == legal && node.compatible == GROUPS);
    let at = known.unwrap_or_else(|| {
        let name = free(root, name);
        root.children.push(empty(name, GROUPS));
        root.children.len() - 1
    });
    &mut root.children[at]
}

fn empty<'a>(name: String, compatible: &'static str) -> Node<'a> {
    Node {
        name: name.into(),
        compatible: compatible.into(),
        properties: Vec::new(),
        children: Vec::new(),
    }
}

/// A name for a further child: that of the group where it can be.
fn free(parent: &Node<'_>, name: &str) -> String {
    let taken = |name: &str| parent.children.iter().any(|node| node.name == name);
    let name = legal(name);
    if !taken(&name) {
        return name;
    }
    let short: String = name.chars().take(MAX_NODE_NAME - 8).collect();
    let mut numbered = (2u32..).map(|n| format!("{short}-{n}"));
    numbered.find(|name| !taken(name)).unwrap_or(name)
}

/// The name with what cannot stand in a node's name replaced.
fn legal(name: &str) -> String {
    let mut legal: String = name
        .chars()
        .map(|c| {
            let stands = c.is_ascii_alphanumeric() || ",._+-".contains(c);
            if stands { c } else { '-' }
        })
        .take(MAX_NODE_NAME)
        .collect();
    if !legal.starts_with(|c: char| c.is_ascii_alphabetic()) {
        legal = format!("g{legal}").chars().take(MAX_NODE_NAME).collect();
    }
    legal
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(compatible: &'static str) -> Vec<u8> {
        let root = empty(String::new(), compatible);
        Tree { root }.to_fdt().unwrap()
    }

    #[test]
    fn groups_are_nodes_below_one_root_whatever_they_are_called() {
        let hostile = "x".repeat(100);
        let names = [
            "subject",
            "process-1/memory",
            "process-1/threads",
            "process-1/a/b",
            "process-1/a-b",
            "a b\n}; /dts-v1/;",
            "",
            "1",
            &hostile,
        ];
        let blobs: Vec<_> = names
            .iter()
            .map(|name| ((*name).to_owned(), blob("outlive,x-v1")))
            .collect();
        let tree = whole(&blobs);
        // The writer accepts legal names only, each once among its siblings.
        let bytes = tree.to_fdt().unwrap();
        let back = Tree::parse(&bytes).unwrap();
        let names = |node: &Node<'_>| -> Vec<String> {
            node.children.iter().map(|c| c.name.to_string()).collect()
        };
        assert_eq!(names(&back.root)[..2], ["subject", "process-1"]);
        let process = names(&back.root.children[1]);
        assert_eq!(process, ["memory", "threads", "a-b", "a-b-2"]);
        assert_eq!(
            outlive_state_tree::to_dts(&tree)
                .matches("/dts-v1/")
                .count(),
            1
        );
    }

    #[test]
    fn trees_that_cannot_be_parsed_are_left_out() {
        let blobs = [("a".to_owned(), b"rubbish".to_vec())];
        assert!(whole(&blobs).root.children.is_empty());
    }
}
