//! Blobs that nobody should trust: each fault by name, and mutations of legal blobs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Thread, arbitrary, full, schemas};
use outlive_state_tree::{
    FormatError, FormatFault as Fault, MAX_DEPTH, MAX_PROPERTIES, NameFault, Node, StateNode, Tree,
    WriteFault, Writer, check, from_fdt, to_dts, to_dts_with, to_fdt,
};
use proptest::prelude::*;

/// A structure block, put together by hand.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn cell(mut self, cell: u32) -> Self {
        self.0.extend(cell.to_be_bytes());
        self
    }
    fn text(mut self, text: &[u8]) -> Self {
        self.0.extend(text);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
    /// A node with a `compatible` whose name is at offset 0 of [`STRINGS`].
    fn begin(self, name: &[u8]) -> Self {
        self.cell(1).text(name).prop(0, b"x,y-v1\0")
    }
    fn prop(self, name: u32, value: &[u8]) -> Self {
        self.cell(3).cell(value.len() as u32).cell(name).text(value)
    }
    fn end(self) -> Self {
        self.cell(2)
    }
    fn blob(self) -> Vec<u8> {
        self.cell(9).blob_with(STRINGS)
    }
    fn blob_with(self, strings: &[u8]) -> Vec<u8> {
        let strings_at = 56 + self.0.len();
        let total = strings_at + strings.len();
        let numbers = [
            0xd00d_feed,
            total,
            56,
            strings_at,
            40,
            17,
            16,
            0,
            strings.len(),
            self.0.len(),
        ];
        let mut blob: Vec<u8> = numbers
            .iter()
            .flat_map(|n| (*n as u32).to_be_bytes())
            .collect();
        blob.extend([0; 16]);
        blob.extend(self.0);
        blob.extend(strings);
        blob
    }
}

/// `compatible` at 0, `a` at 11, which every legal blob here uses last.
const STRINGS: &[u8] = b"compatible\0a\0";

fn root() -> Raw {
    Raw::default().begin(b"\0").prop(11, &[1])
}

fn error(blob: &[u8]) -> FormatError {
    Tree::parse(blob).unwrap_err()
}

#[test]
fn the_hand_made_blob_is_legal() {
    let blob = root().begin(b"kid@0\0").end().end().blob();
    let tree = Tree::parse(&blob).unwrap();
    assert_eq!(tree.root.property("a"), Some(&[1][..]));
    assert_eq!(tree.to_fdt().unwrap(), blob);
}

#[test]
fn header_faults() {
    let legal = root().end().blob();
    let with = |field: usize, value: u32| {
        let mut blob = legal.clone();
        blob[field * 4..][..4].copy_from_slice(&value.to_be_bytes());
        error(&blob)
    };
    assert_eq!(with(0, 1).fault, Fault::Magic(1));
    assert_eq!(
        with(5, 18).fault,
        Fault::Version {
            version: 18,
            last_compatible: 16
        }
    );
    assert_eq!(
        with(6, 17).fault,
        Fault::Version {
            version: 17,
            last_compatible: 17
        }
    );
    for field in [1, 2, 3, 4, 7, 8, 9] {
        for value in [1, 57, u32::MAX, u32::MAX - 55] {
            assert!(
                matches!(with(field, value).fault, Fault::Header { .. }),
                "field {field} = {value}"
            );
        }
    }
    assert_eq!(with(10, 1).fault, Fault::Reservations);
    for length in 0..legal.len() {
        assert_eq!(error(&legal[..length]).path, "/", "{length} bytes");
    }
    let mut longer = legal.clone();
    longer.push(0);
    let fault = error(&longer).fault;
    assert!(
        matches!(
            fault,
            Fault::Header {
                field: "totalsize",
                ..
            }
        ),
        "{fault}"
    );
}

#[test]
fn structure_faults_name_the_node_and_the_offset() {
    let kid = || root().begin(b"kid\0");
    let cases: Vec<(Raw, &str, Fault)> = vec![
        (Raw::default(), "/", Fault::Token(9)),
        (root(), "/", Fault::Token(9)),
        (root().cell(4).end(), "/", Fault::Token(4)),
        (root().end().cell(2), "/", Fault::Token(2)),
        (root().end().begin(b"\0").end(), "/", Fault::Token(1)),
        (
            Raw::default().begin(b"r\0").end(),
            "/",
            Fault::RootName("r".into()),
        ),
        (kid().end().prop(11, b"").end(), "/", Fault::Token(3)),
        (
            kid().prop(11, b"").prop(11, b"").end(),
            "/kid",
            Fault::DuplicateProperty("a".into()),
        ),
        (
            kid().prop(0, b"x\0").end(),
            "/kid",
            Fault::DuplicateProperty("compatible".into()),
        ),
        (
            kid().prop(12, b"").end(),
            "/kid",
            name("", NameFault::Empty),
        ),
        (kid().prop(13, b"").end(), "/kid", Fault::NameEnd),
        (kid().prop(14, b"").end(), "/kid", Fault::StringOffset(14)),
        (
            kid().prop(u32::MAX, b"").end(),
            "/kid",
            Fault::StringOffset(u32::MAX),
        ),
        (
            kid().cell(3).cell(u32::MAX).cell(11).end(),
            "/kid",
            Fault::Truncated,
        ),
        (
            kid().cell(3).cell(1).cell(11).text(b"xyz").end(),
            "/kid",
            Fault::Padding,
        ),
        (
            kid().end().begin(b"kid\0").end().end(),
            "/",
            Fault::DuplicateChild("kid".into()),
        ),
        (
            root().cell(1).text(b"kid\0").end().end(),
            "/kid",
            Fault::NoCompatible,
        ),
        (
            root().cell(1).text(b"kid\0").prop(11, b"").end(),
            "/kid",
            Fault::NoCompatible,
        ),
        (
            root().cell(1).text(b"kid\0").prop(0, b"x y\0"),
            "/kid",
            Fault::Compatible,
        ),
        (
            root().cell(1).text(b"kid\0").prop(0, b"x\0y\0"),
            "/kid",
            Fault::Compatible,
        ),
        (
            root().cell(1).text(b"kid\0").prop(0, b"xy"),
            "/kid",
            Fault::Compatible,
        ),
        (
            root().cell(1).text(b"\0").end(),
            "/",
            name("", NameFault::Empty),
        ),
        (
            root().cell(1).text(b"a/b\0").end(),
            "/",
            name("a/b", NameFault::Byte(b'/')),
        ),
        (root().cell(1).text(&[b'n'; 64]).end(), "/", Fault::NameEnd),
        (
            root().cell(1).text(b"\xff\0").end(),
            "/",
            name("\u{fffd}", NameFault::Byte(0xff)),
        ),
    ];
    for (raw, path, fault) in cases {
        let found = error(&raw.blob());
        assert_eq!((&*found.path, &found.fault), (path, &fault), "{found}");
        assert!(found.offset >= 56, "{found}");
    }
}

fn name(name: &str, fault: NameFault) -> Fault {
    Fault::Name {
        name: name.into(),
        fault,
    }
}

#[test]
fn nothing_follows_the_end() {
    let blob = root().end().cell(9).cell(0).blob_with(STRINGS);
    // The END token that `blob` would add comes first here, and a cell follows it.
    assert_eq!(error(&blob).fault, Fault::Trailing(4));
    let blob = root().end().cell(9).blob_with(b"compatible\0a\0rubbish\0");
    assert_eq!(error(&blob).fault, Fault::Trailing(8));
    let blob = root().end().cell(9).blob_with(b"compatible\0a");
    assert_eq!(error(&blob).fault, Fault::NameEnd);
}

#[test]
fn reserved_names_are_refused() {
    let blob = root()
        .prop(11, b"")
        .end()
        .cell(9)
        .blob_with(b"compatible\0name\0");
    assert_eq!(error(&blob).fault, name("name", NameFault::Reserved));
}

#[test]
fn depth_is_limited_on_both_sides() {
    let nested = |depth: usize| {
        let begun = (1..depth).fold(root(), |raw, _| raw.begin(b"n\0"));
        (0..depth).fold(begun, |raw, _| raw.end()).blob()
    };
    let deepest = nested(MAX_DEPTH);
    let tree = Tree::parse(&deepest).unwrap();
    assert_eq!(tree.to_fdt().unwrap(), deepest);
    assert!(to_dts(&tree).len() > MAX_DEPTH);
    assert_eq!(error(&nested(MAX_DEPTH + 1)).fault, Fault::TooDeep);
    assert_eq!(error(&nested(100_000)).fault, Fault::TooDeep);
    let mut writer = Writer::new();
    writer.begin("", "x,y-v1").unwrap();
    for _ in 1..MAX_DEPTH {
        writer.begin("n", "x,y-v1").unwrap();
    }
    assert_eq!(
        writer.begin("n", "x,y-v1").unwrap_err().fault,
        WriteFault::TooDeep
    );
}

#[test]
fn the_number_of_properties_is_limited_on_both_sides() {
    let wide = |count: usize| {
        (1..count).fold(Node::new("", "x,y-v1"), |node, n| {
            node.with(format!("p{n}"), vec![])
        })
    };
    let widest = Tree {
        root: wide(MAX_PROPERTIES),
    };
    let blob = widest.to_fdt().unwrap();
    assert_eq!(Tree::parse(&blob).unwrap(), widest);
    let error = Tree {
        root: wide(MAX_PROPERTIES + 1),
    }
    .to_fdt()
    .unwrap_err();
    assert_eq!(error.fault, WriteFault::TooManyProperties);
    let mut strings = b"compatible\0".to_vec();
    let mut raw = Raw::default().begin(b"\0");
    for n in 0..=MAX_PROPERTIES {
        raw = raw.prop(strings.len() as u32, b"");
        strings.extend(format!("p{n}\0").bytes());
    }
    let found = Tree::parse(&raw.end().cell(9).blob_with(&strings))
        .unwrap_err()
        .fault;
    assert_eq!(found, Fault::TooManyProperties);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let fault = |root: Node<'static>| Tree { root }.to_fdt().unwrap_err();
    let root = || Node::new("", "x,y-v1");
    let kid = || Node::new("kid", "x,y-v1");
    let error = fault(root().with_child(kid().with("a", vec![]).with("a", vec![])));
    assert_eq!(
        (&*error.path, error.fault),
        ("/kid", WriteFault::DuplicateProperty("a".into()))
    );
    let error = fault(root().with_child(kid()).with_child(kid()));
    assert_eq!(
        (&*error.path, error.fault),
        ("/", WriteFault::DuplicateChild("kid".into()))
    );
    let error = fault(kid());
    assert_eq!(error.fault, WriteFault::RootName("kid".into()));
    let error = fault(root().with("compatible", vec![]));
    assert_eq!(
        error.fault,
        WriteFault::DuplicateProperty("compatible".into())
    );
    for (node, wrong) in [
        (root().with("phandle", vec![]), NameFault::Reserved),
        (root().with_child(Node::new("", "x,y-v1")), NameFault::Empty),
        (Node::new("", ""), NameFault::Empty),
    ] {
        let error = fault(node);
        assert!(
            matches!(error.fault, WriteFault::Name { fault, .. } if fault == wrong),
            "{error}"
        );
    }
    let mut writer = Writer::new();
    assert!(matches!(
        writer.end().unwrap_err().fault,
        WriteFault::Misuse(_)
    ));
    assert!(matches!(
        writer.bytes("a", &[]).unwrap_err().fault,
        WriteFault::Misuse(_)
    ));
    writer.begin("", "x,y-v1").unwrap();
    assert!(matches!(
        writer.finish().unwrap_err().fault,
        WriteFault::Misuse(_)
    ));
}

/// Whatever the bytes are: no panic, and all parts agree on them.
fn judge(blob: &[u8]) {
    let typed = from_fdt::<Thread>(blob);
    let Ok(tree) = Tree::parse(blob) else {
        assert!(typed.is_err());
        return;
    };
    let written = tree.to_fdt().unwrap();
    assert_eq!(
        Tree::parse(&written).unwrap(),
        tree,
        "what is read can be written"
    );
    let problems = check(&tree, &schemas());
    let as_expected = problems.is_empty() && Thread::accepts(&tree.root.compatible);
    assert_eq!(
        typed.is_ok(),
        as_expected,
        "reading says {typed:?}, checking {problems:?}"
    );
    if let Ok(state) = typed {
        assert_eq!(from_fdt::<Thread>(&to_fdt(&state).unwrap()).unwrap(), state);
    }
    assert!(to_dts_with(&tree, &schemas()).starts_with("/dts-v1/;"));
}

#[test]
fn every_byte_of_a_small_blob_can_change() {
    let small = Thread {
        words: vec!["x".into()],
        rseq: Some(common::Rseq),
        ..Thread::default()
    };
    let legal = to_fdt(&small).unwrap();
    for at in 0..legal.len() {
        for flip in [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xff] {
            let mut blob = legal.clone();
            blob[at] ^= flip;
            judge(&blob);
        }
        judge(&legal[..at]);
    }
}

/// Rewrites cells of a blob; the values are those at which the format changes its mind.
fn mutate(blob: &mut [u8], changes: &[(usize, u32, bool)]) {
    for &(at, value, whole) in changes {
        if whole {
            let at = at % (blob.len() / 4) * 4;
            blob[at..at + 4].copy_from_slice(&value.to_be_bytes());
        } else {
            let at = at % blob.len();
            blob[at] = value as u8;
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<(usize, u32, bool)>> {
    let value = prop_oneof![
        0u32..16,
        any::<u32>(),
        (0u32..64).prop_map(|n| u32::MAX - n),
        0u32..600
    ];
    proptest::collection::vec((any::<usize>(), value, any::<bool>()), 1..6)
}

proptest! {
    #[test]
    fn arbitrary_trees_come_back(tree in arbitrary::tree()) {
        let blob = tree.to_fdt().unwrap();
        prop_assert_eq!(Tree::parse(&blob).unwrap(), tree);
    }

    #[test]
    fn mutated_trees_do_no_harm(tree in arbitrary::tree(), changes in changes()) {
        let mut blob = tree.to_fdt().unwrap();
        mutate(&mut blob, &changes);
        judge(&blob);
    }

    #[test]
    fn mutated_states_do_no_harm(changes in changes()) {
        let mut blob = to_fdt(&full()).unwrap();
        mutate(&mut blob, &changes);
        judge(&blob);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(structure in proptest::collection::vec(any::<u8>(), 0..200)) {
        judge(&structure);
        judge(&Raw::default().text(&structure).blob());
        judge(&Raw::default().begin(b"\0").text(&structure).blob());
    }

    #[test]
    fn arbitrary_tokens_do_no_harm(tokens in proptest::collection::vec(0u32..12, 0..60)) {
        let raw = tokens.into_iter().fold(root(), Raw::cell);
        judge(&raw.blob());
    }
}
