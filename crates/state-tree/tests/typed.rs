//! Rust types to blobs and back, and every refusal of a well-formed tree that says something else.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Description, Thread, Timer, full, schemas};
use outlive_state_tree::{
    Node, ReadError, SchemaSet, ShapeError, ShapeFault, StateNode, Tree, ValueFault, WriteFault,
    check, from_fdt, to_fdt,
};
use std::borrow::Cow;

#[test]
fn everything_comes_back() {
    for state in [full(), Thread::default()] {
        let blob = to_fdt(&state).unwrap();
        assert_eq!(from_fdt::<Thread>(&blob).unwrap(), state);
        assert_eq!(check(&Tree::parse(&blob).unwrap(), &schemas()), []);
    }
}

#[test]
fn the_same_state_gives_the_same_bytes_typed_or_not() {
    let blob = to_fdt(&full()).unwrap();
    assert_eq!(blob, to_fdt(&full()).unwrap());
    assert_eq!(blob, Tree::parse(&blob).unwrap().to_fdt().unwrap());
}

#[test]
fn fields_are_named_in_kebab_case() {
    let blob = to_fdt(&full()).unwrap();
    let root = Tree::parse(&blob).unwrap().root;
    assert_eq!(root.compatible, "outlive,test-thread-v2");
    assert_eq!(root.property("regs-saved"), Some(&[0, 0, 0, 1][..]));
    assert_eq!(root.property("type"), Some(&b"read-write\0"[..]));
    assert_eq!(root.property("other-mode"), Some(&b"w\0"[..]));
    assert_eq!(
        root.child("timers@1f").unwrap().property("id"),
        Some(&[0, 0, 0, 31][..])
    );
    assert!(root.child("timers@28").is_none());
    assert!(root.child("called").is_some());
}

#[test]
fn thousands_of_children_and_megabytes() {
    let many = Timer {
        id: 0,
        nested: (0..20_000).map(|id| Timer { id, nested: vec![] }).collect(),
    };
    assert_eq!(from_fdt::<Timer>(&to_fdt(&many).unwrap()).unwrap(), many);
    let large = Thread {
        xsave: vec![0xa5; (8 << 20) + 1],
        ranges: (0..1_000_000).collect(),
        ..Thread::default()
    };
    assert_eq!(from_fdt::<Thread>(&to_fdt(&large).unwrap()).unwrap(), large);
}

/// Changes the tree of the full state, and returns what reading and checking say of it. They must
/// agree.
fn refusal(change: impl FnOnce(&mut Node<'_>)) -> ShapeError {
    let blob = to_fdt(&full()).unwrap();
    let mut tree = Tree::parse(&blob).unwrap();
    change(&mut tree.root);
    let changed = tree.to_fdt().unwrap();
    let problems = check(&Tree::parse(&changed).unwrap(), &schemas());
    match from_fdt::<Thread>(&changed) {
        Err(ReadError::Shape(error)) => {
            assert!(
                problems.contains(&error),
                "{error} is not among {problems:?}"
            );
            error
        }
        other => panic!("{other:?}"),
    }
}

fn set(node: &mut Node<'_>, name: &str, value: &'static [u8]) {
    node.properties
        .iter_mut()
        .find(|p| p.name == name)
        .unwrap()
        .value = Cow::Borrowed(value);
}

#[test]
fn unknown_and_missing_properties_are_named() {
    let error = refusal(|root| root.properties.retain(|p| p.name != "port"));
    assert_eq!(
        error.to_string(),
        "state tree node /: property \"port\" is missing"
    );
    let error = refusal(|root| {
        let timer = root
            .children
            .iter_mut()
            .find(|c| c.name == "timers@2")
            .unwrap();
        *timer = timer.clone().with("colour", vec![]);
    });
    assert_eq!(error.path, "/timers@2");
    assert_eq!(error.fault, ShapeFault::UnknownProperty("colour".into()));
    let error = refusal(|root| {
        root.children[1].children.clear();
        root.children
            .iter_mut()
            .find(|c| c.name == "timers@3")
            .unwrap()
            .children[1]
            .properties
            .clear();
    });
    assert_eq!(error.path, "/timers@3/nested@1");
}

#[test]
fn wrong_values_are_named() {
    let value = |error: ShapeError| match error.fault {
        ShapeFault::Value { property, fault } => (property, fault),
        other => panic!("{other:?}"),
    };
    let (property, fault) = value(refusal(|root| set(root, "address", &[0; 4])));
    assert_eq!(
        (&*property, fault),
        (
            "address",
            ValueFault::Length {
                found: 4,
                expected: 8
            }
        )
    );
    let (property, fault) = value(refusal(|root| set(root, "regs-saved", &[0, 0, 0, 2])));
    assert_eq!(
        (&*property, fault),
        ("regs-saved", ValueFault::Range { found: 2, max: 1 })
    );
    let (property, _) = value(refusal(|root| set(root, "type", b"append\0")));
    assert_eq!(property, "type");
    let (property, fault) = value(refusal(|root| set(root, "exit-code", b"")));
    assert_eq!(
        (&*property, fault),
        (
            "exit-code",
            ValueFault::Length {
                found: 0,
                expected: 4
            }
        )
    );
}

#[test]
fn unknown_missing_and_misplaced_children_are_named() {
    let error = refusal(|root| root.children.retain(|c| c.name != "stack"));
    assert_eq!(error.fault, ShapeFault::MissingChild("stack".into()));
    let error = refusal(|root| {
        root.children
            .push(Node::new("ghost", "outlive,test-rseq-v1"));
    });
    assert_eq!(error.fault, ShapeFault::UnknownChild("ghost".into()));
    let error = refusal(|root| root.children.retain(|c| c.name != "timers@a"));
    let due = ShapeFault::ChildOrder {
        found: "timers@b".into(),
        expected: "timers@a".into(),
    };
    assert_eq!(error.fault, due);
    for wrong in ["timers@A", "timers@0a", "timers@+a", "timers@x"] {
        let error = refusal(|root| {
            let timer = root
                .children
                .iter_mut()
                .find(|c| c.name == "timers@a")
                .unwrap();
            timer.name = Cow::Borrowed(wrong);
        });
        let due = ShapeFault::ChildOrder {
            found: wrong.into(),
            expected: "timers@a".into(),
        };
        assert_eq!(error.fault, due);
    }
}

#[test]
fn other_kinds_and_newer_versions_are_refused() {
    let with = |compatible: &'static str| {
        refusal(|root| {
            root.children
                .iter_mut()
                .find(|c| c.name == "files@1")
                .unwrap()
                .compatible = Cow::Borrowed(compatible);
        })
    };
    let error = with("outlive,test-file-v4");
    assert_eq!(error.path, "/files@1");
    let newer = ShapeFault::NewerVersion {
        found: "outlive,test-file-v4".into(),
        supported: "outlive,test-file-v3".into(),
    };
    assert_eq!(error.fault, newer);
    // A version between two known ones was never released.
    for unknown in ["outlive,test-file-v2", "outlive,test-timer-v1", "strange"] {
        let error = with(unknown);
        assert_eq!(error.path, "/files@1");
        assert!(
            matches!(error.fault, ShapeFault::UnknownCompatible { .. }),
            "{error}"
        );
    }
    let blob = to_fdt(&full()).unwrap();
    let error = from_fdt::<Description>(&blob).unwrap_err().to_string();
    assert!(
        error.contains("unknown kind \"outlive,test-thread-v2\""),
        "{error}"
    );
    assert!(error.contains("outlive,test-pipe-v1 or "), "{error}");
}

#[test]
fn what_has_no_encoding_is_refused_by_name() {
    let mut state = full();
    state.comm = "a\0b".into();
    let error = to_fdt(&state).unwrap_err();
    let expected = WriteFault::Value {
        property: "comm".into(),
        fault: ValueFault::NulInside,
    };
    assert_eq!((&*error.path, error.fault), ("/", expected));
}

#[test]
fn schemas_are_collected_with_everything_below() {
    let set = schemas();
    let kinds: Vec<_> = set.iter().map(|k| k.compatible).collect();
    assert_eq!(
        kinds,
        [
            "outlive,test-alt-stack-v1",
            "outlive,test-file-v1",
            "outlive,test-file-v3",
            "outlive,test-pipe-v1",
            "outlive,test-rseq-v1",
            "outlive,test-thread-v2",
            "outlive,test-timer-v1",
        ]
    );
    let thread = set.get("outlive,test-thread-v2").unwrap();
    assert_eq!(thread.doc, "A thread of the example.\n\nSecond paragraph.");
    let text = set.to_markdown();
    for line in [
        "## `outlive,test-thread-v2`",
        "| `tid` | u32 (one cell) | Its number \\| with a bar. |",
        "| `exit-code` | u32 (one cell), optional |  |",
        "| `type` | one of: read, read-write, w |  |",
        "| `timers@N` | `outlive,test-timer-v1`, any number | Its timers. |",
        "| `rseq` | `outlive,test-rseq-v1`, optional |  |",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[test]
fn two_types_cannot_claim_one_kind() {
    #[derive(StateNode)]
    #[state(compatible = "outlive,test-pipe-v1")]
    struct Impostor {}
    let mut set: SchemaSet = schemas();
    let conflict = set.add::<Impostor>().unwrap_err();
    assert_eq!(conflict.compatible, "outlive,test-pipe-v1");
    assert!(conflict.first.ends_with("common::Pipe"), "{conflict}");
    assert!(conflict.second.ends_with("::Impostor"), "{conflict}");
}
