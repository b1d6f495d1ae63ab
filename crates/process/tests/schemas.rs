//! The published description of the state trees is the one that the code has.

use std::path::Path;

#[test]
fn the_published_schemas_are_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/state-tree.md");
    let schemas = outlive_process::image::schemas().unwrap();
    let text = format!("{HEADING}\n{}", schemas.to_markdown());
    if std::env::var_os("OUTLIVE_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let published = std::fs::read_to_string(&path).unwrap();
    assert!(
        published == text,
        "docs/state-tree.md is out of date: run this test with OUTLIVE_UPDATE_DOCS=1"
    );
}

const HEADING: &str = "# State trees

What an epoch says of a program besides the contents of its pages. An epoch holds one flattened
device tree (DTB version 17) for each group: `subject`, `machine`, `descriptors`, `shared-memory` and
`system-v` for the program as a whole, and for each of its processes
`process-PID/…` with `attributes`, `signals`, `threads` and, but for a process with the address space
of another one, `memory`.
`outlive inspect IMAGE --dts` prints them, `outlive inspect IMAGE --check` holds them against what follows.

This page is generated from the types that read and write the trees. A kind never changes once it
has been released: a change is a new version under a new `compatible`, and what is not described
here is refused by name.
";
