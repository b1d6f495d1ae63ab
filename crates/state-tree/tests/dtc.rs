//! The device tree compiler agrees: it reads what is written here, and its output is read back.
//!
//! Needs `dtc` (Debian: device-tree-compiler). Where it is not installed, each test says on
//! standard error that it was skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Thread, arbitrary, full, schemas};
use outlive_state_tree::{Node, Tree, to_dts, to_dts_with, to_fdt};
use proptest::prelude::*;
use std::io::Write as _;
use std::process::{Command, Stdio};

/// Runs `dtc` from one format to another; its output. Panics with its complaint if it fails.
fn dtc(from: &str, to: &str, input: &[u8]) -> Vec<u8> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(input).unwrap();
    let output = Command::new("dtc")
        .args(["-q", "-q", "-I", from, "-O", to, "-o", "-"])
        .arg(file.path())
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "dtc: {complaint}\n{}",
        String::from_utf8_lossy(input)
    );
    output.stdout
}

/// Whether `dtc` is there; says so if not, past the test harness's capture.
fn skipped(test: &str) -> bool {
    let version = Command::new("dtc")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if version.is_ok_and(|status| status.success()) {
        return false;
    }
    let notice = format!("SKIPPED 1 test: {test}: dtc is not installed\n");
    std::io::stderr().write_all(notice.as_bytes()).unwrap();
    true
}

/// `dtc` reads the blob, and reads the same tree from both forms of its source.
fn agrees(tree: &Tree<'_>) {
    let blob = tree.to_fdt().unwrap();
    let again = dtc("dtb", "dtb", &blob);
    assert_eq!(&Tree::parse(&again).unwrap(), tree);
    for source in [to_dts(tree), to_dts_with(tree, &schemas())] {
        let compiled = dtc("dts", "dtb", source.as_bytes());
        assert_eq!(&Tree::parse(&compiled).unwrap(), tree, "{source}");
    }
}

#[test]
fn states_survive_the_journey_through_source() {
    if skipped("states_survive_the_journey_through_source") {
        return;
    }
    for state in [full(), Thread::default()] {
        let blob = to_fdt(&state).unwrap();
        agrees(&Tree::parse(&blob).unwrap());
        let source = dtc("dtb", "dts", &blob);
        assert!(source.starts_with(b"/dts-v1/;"));
    }
}

#[test]
fn source_shows_types_where_they_are_known() {
    let blob = to_fdt(&full()).unwrap();
    let source = to_dts_with(&Tree::parse(&blob).unwrap(), &schemas());
    for line in [
        "\tcompatible = \"outlive,test-thread-v2\";",
        "\ttid = <4711>;",
        "\tnice = <(-20)>;",
        "\taddress = /bits/ 64 <0x7ffffffff000>;",
        "\tcomm = \"redis-\\\"server\\\\\";",
        "\twords = \"a\", \"\", \"gr\\xc3\\xb6\\xc3\\x9fe\\x0a\";",
        "\tmask = [01 02 03 04 05];",
        "\t\tpath = [2f 78]; /* /x */",
        "\ttimers@1f {",
        "\t\tid = <31>;",
    ] {
        assert!(
            source.lines().any(|l| l == line),
            "{line} is not in\n{source}"
        );
    }
}

#[test]
fn values_without_a_known_type_are_shown_by_their_looks() {
    let root = Node::new("", "x,y-v1")
        .with("zero", vec![0; 8])
        .with("text", &b"abc\0de\0"[..])
        .with("odd", vec![0xff; 3])
        .with("path", &b"/x"[..])
        .with("trap", &b"a*/b;"[..])
        .with("flag", vec![]);
    let tree = Tree { root };
    let source = to_dts(&tree);
    for line in [
        "\tzero = <0x0 0x0>;",
        "\ttext = \"abc\", \"de\";",
        "\todd = [ff ff ff];",
        "\tpath = [2f 78]; /* /x */",
        "\ttrap = [61 2a 2f 62 3b];",
        "\tflag;",
    ] {
        assert!(
            source.lines().any(|l| l == line),
            "{line} is not in\n{source}"
        );
    }
    if !skipped("values_without_a_known_type_are_shown_by_their_looks") {
        agrees(&tree);
    }
}

#[test]
fn arbitrary_trees_survive_the_journey_through_source() {
    if skipped("arbitrary_trees_survive_the_journey_through_source") {
        return;
    }
    let config = ProptestConfig {
        cases: 64,
        ..ProptestConfig::default()
    };
    proptest!(config, |(tree in arbitrary::tree())| agrees(&tree));
}
