//! A writer that is killed, again and again, with real files.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{Model, Script, Step, read_back};
use outlive_epoch_store::{Access, Store};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Tells the test that it is the writer, and where to write.
const WRITER: &str = "OUTLIVE_TEST_WRITER";
const KILLS: u64 = 25;
/// The same in the long form of the tests.
const KILLS_LONG: u64 = 2000;

/// What epoch `id` holds: all pages are of its own making.
fn script(id: u64) -> Script {
    let seed = (id % 250) as u8 + 1;
    let steps = (0..8).map(|i| Step::Put(i, 100, vec![seed; 20])).collect();
    Script {
        base: id.is_multiple_of(5),
        steps,
        trees: vec![("id", id.to_le_bytes().to_vec())],
    }
}

/// Writes epochs until it is killed, and says which are acknowledged.
fn write_for_ever(path: &Path) {
    let mut store = Store::open_or_create(path).unwrap();
    let mut next = store.newest().map_or(1, |id| id.0 + 1);
    loop {
        let id = script(next).write(&mut store).unwrap();
        println!("\nacked {id}");
        std::io::stdout().flush().unwrap();
        next += 1;
    }
}

#[test]
fn a_killed_writer_loses_no_acknowledged_epoch() {
    if let Some(path) = std::env::var_os(WRITER) {
        return write_for_ever(Path::new(&path));
    }
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("store");
    let mut last = 0;
    let long = std::env::var_os("OUTLIVE_LONG").is_some();
    for kill in 0..if long { KILLS_LONG } else { KILLS } {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "a_killed_writer_loses_no_acknowledged_epoch",
                "--nocapture",
            ])
            .env(WRITER, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acked = lines.filter_map(|line| {
            line.unwrap()
                .strip_prefix("acked ")
                .map(|id| id.parse::<u64>().unwrap())
        });
        // The moment of the kill differs from round to round, by count and not by clock.
        let first = acked.next().unwrap();
        let heard = acked
            .by_ref()
            .take((kill * 7 % 11) as usize)
            .last()
            .unwrap_or(first);
        child.kill().unwrap();
        child.wait().unwrap();
        // Also what was said between the decision and the kill counts.
        let heard = acked.last().unwrap_or(heard);
        assert!(heard > last);
        let store = Store::open(&path, Access::Read).unwrap();
        let newest = store.newest().unwrap().0;
        assert!(
            newest == heard || newest == heard + 1,
            "{newest} found, {heard} acknowledged"
        );
        let found = read_back(&store.epoch(None).unwrap()).unwrap();
        assert_eq!(found, script(newest).apply(&Model::default()));
        assert!(!store.verify(&mut |_, _| {}).unwrap().is_lossy());
        last = newest;
    }
}
