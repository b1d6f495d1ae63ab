//! The space for the epoch of a power event: where it lies, and that its blocks were written.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::{create, history, models, open, read_back};
use outlive_epoch::{EpochFacts, EpochWriter, PAGE_SIZE, PageSink};
use outlive_epoch_store::{Access, Store};
use outlive_media::SimDisk;
use std::process::Command;

const LEN: u64 = 64 << 10;

#[test]
fn an_event_goes_to_the_ready_piece_and_later_epochs_behind_it() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    let scripts: Vec<_> = history().into_iter().take_while(|s| !s.base).collect();
    let scripts = if scripts.is_empty() {
        history()
    } else {
        scripts
    };
    let expected = models(&scripts);
    assert!(
        !store.write_ahead(LEN).unwrap().more,
        "there is no epoch yet"
    );
    scripts[0].write(&mut store).unwrap();
    let before = store.log_bytes();
    while store.write_ahead(LEN).unwrap().more {}
    assert_eq!(store.log_bytes(), before, "it is no part of the log");
    scripts[1].write_event(&mut store).unwrap();
    assert!(
        store.log_bytes() > before + 8 * 3 * PAGE_SIZE as u64,
        "there is a gap"
    );
    for script in &scripts[2..] {
        script.write(&mut store).unwrap();
    }
    store.close().unwrap();
    let store = open(&disk, Access::Read).unwrap();
    for (summary, model) in store.epochs().iter().zip(&expected) {
        let reader = store.epoch(Some(summary.id)).unwrap();
        assert_eq!(read_back(&reader).unwrap(), *model);
    }
    let report = store.verify(&mut |_, _| {}).unwrap();
    assert!(report.damages.is_empty(), "{report:?}");
}

#[test]
fn ordinary_epochs_use_the_ready_piece_up_and_another_is_made() {
    let disk = SimDisk::new();
    let mut store = create(&disk).unwrap();
    for n in 0..200u64 {
        let mut writer = store.begin().unwrap();
        let page = vec![n as u8 | 1; PAGE_SIZE];
        writer.put(common::run(1, n % 7, 1), &page).unwrap();
        writer.commit(EpochFacts::default()).unwrap();
        while store.write_ahead(8 * PAGE_SIZE as u64).unwrap().more {}
        if n % 50 == 49 {
            let end = store.log_bytes();
            let mut writer = store.begin_event().unwrap();
            writer.put(common::run(1, 9, 1), &page).unwrap();
            writer.commit(EpochFacts::default()).unwrap();
            assert!(store.log_bytes() > end + 4 * PAGE_SIZE as u64);
        }
    }
    let report = store.verify(&mut |_, _| {}).unwrap();
    assert!(report.damages.is_empty(), "{report:?}");
}

/// Blocks (of 4096 bytes) of a file that were taken and never written.
fn unwritten(path: &std::path::Path) -> Option<Vec<(u64, u64)>> {
    let listing = Command::new("filefrag")
        .args(["-v", "-b4096"])
        .arg(path)
        .output()
        .ok()?;
    if !listing.status.success() {
        return None;
    }
    let text = String::from_utf8(listing.stdout).unwrap();
    let lines = text.lines().filter(|line| line.contains("unwritten"));
    let range = |line: &str| {
        let mut parts = line.split(':').nth(1).unwrap().split("..");
        let mut number = || parts.next().unwrap().trim().parse::<u64>().unwrap();
        (number(), number())
    };
    Some(lines.map(range).collect())
}

#[test]
fn no_block_of_the_ready_piece_is_left_to_be_initialised_by_the_event() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path().join("a")).unwrap();
    let write = |store: &mut Store, event: bool| {
        let mut writer = if event {
            store.begin_event().unwrap()
        } else {
            store.begin().unwrap()
        };
        let pages = vec![7; 16 * PAGE_SIZE];
        writer.put(common::run(1, 0, 16), &pages).unwrap();
        writer.commit(EpochFacts::default()).unwrap();
    };
    write(&mut store, false);
    while store.write_ahead(1 << 20).unwrap().more {}
    // This one's flush makes the zeros durable.
    write(&mut store, false);
    let path = dir.path().join("a/epochs.1");
    let Some(before) = unwritten(&path) else {
        println!("SKIPPED 1 test: no filefrag, or a file system without extents");
        return;
    };
    if before.is_empty() {
        println!("SKIPPED 1 test: this file system takes no space ahead");
        return;
    }
    write(&mut store, true);
    let end = store.log_bytes() / PAGE_SIZE as u64;
    // Sixteen pages, the tables, the trailer.
    let event = end - 18..end;
    let touched = before
        .iter()
        .any(|(from, to)| *from < event.end && *to >= event.start);
    assert!(
        !touched,
        "blocks {event:?} were not initialised: {before:?}"
    );
    assert!(
        before.iter().any(|(_, to)| *to < event.start),
        "the gap: {before:?}"
    );
    assert_eq!(unwritten(&path), Some(before), "nothing changed but data");
}
