//! Upkeep of real stores in small directories.

use super::*;
use crate::retention::Keep;
use outlive_epoch::{EpochFacts, EpochReader, EpochWriter, PAGE_SIZE, PageSink, Run, SpaceId};
use std::os::unix::net::UnixStream;

const HOUR: u64 = 3600 * 1_000_000_000;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("s")).unwrap();
    (dir, store)
}

/// An epoch of that time, one page of 50 of which differs from the one before.
fn epoch(store: &mut Store, time: u64) -> u64 {
    let mut writer = store.begin().unwrap();
    let number = writer.id().0;
    let pages = if number == 1 {
        0..50
    } else {
        number % 50..number % 50 + 1
    };
    for page in pages {
        let run = Run::new(SpaceId(1), page, 1).unwrap();
        writer.put(run, &[number as u8; PAGE_SIZE]).unwrap();
    }
    writer.tree("a", b"tree").unwrap();
    let facts = EpochFacts {
        taken_at_ns: time,
        stop_us: 1,
    };
    writer.commit(facts).unwrap();
    number
}

fn numbers(store: &Store) -> Vec<u64> {
    store.epochs().iter().map(|epoch| epoch.id.0).collect()
}

/// Works until there is nothing to do; gives how many pieces that took.
fn all(upkeep: &mut Upkeep, store: &mut Store, between: &mut dyn FnMut(&mut Store)) -> u64 {
    let (mut now, mut pieces) = (0, 0);
    while let Some(until) = upkeep.wait(now, LOOK) {
        now += until;
        let done = upkeep.piece(now, 16 << 10, store);
        assert_eq!(done.warning, None);
        pieces += 1;
        between(store);
    }
    pieces
}

fn policy(text: &str) -> Policy {
    Policy {
        keep: Some(text.parse::<Keep>().unwrap()),
        ..Policy::default()
    }
}

#[test]
fn a_long_log_is_flattened_in_pieces_while_epochs_come() {
    let (_dir, mut store) = store();
    for _ in 0..30 {
        epoch(&mut store, 0);
    }
    let long = store.log_bytes();
    let mut upkeep = Upkeep::new(Policy::default());
    all(&mut upkeep, &mut store, &mut |_| {});
    assert_eq!(numbers(&store).len(), 30, "nobody asked for anything");
    assert!(upkeep.shorten(1 << 20));
    let mut come = 0;
    let pieces = all(&mut upkeep, &mut store, &mut |store| {
        if come < 6 {
            epoch(store, 0);
            come += 1;
        }
    });
    assert!(pieces > 10, "{pieces}");
    assert!(store.log_bytes() * 2 < long);
    assert_eq!(store.newest().unwrap().0, 36);
    assert_eq!(store.generations().len(), 1, "the old one is gone");
    let mut seen = 0;
    let reader = store.epoch(None).unwrap();
    reader
        .pages(&mut |run, _| {
            seen += run.count();
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, 50);
}

#[test]
fn what_retention_wants_stays_and_the_rest_is_given_back() {
    let (_dir, mut store) = store();
    store.keep_older(true);
    for hour in 0..12 {
        for _ in 0..4 {
            epoch(&mut store, hour * HOUR);
        }
        if hour % 5 == 4 {
            store.begin_flattening().unwrap();
            store.switch().unwrap();
        }
    }
    let before = store.generations();
    assert_eq!(before.len(), 3);
    let mut upkeep = Upkeep::new(policy("hourly=6"));
    all(&mut upkeep, &mut store, &mut |_| {});
    // The first generation had nothing of the last six hours; of the third, which epochs are added to,
    // nothing goes.
    assert_eq!(
        numbers(&store),
        [28, 32, 36, 40, 41, 42, 43, 44, 45, 46, 47, 48]
    );
    let after = store.generations();
    assert_eq!(after.len(), 2);
    assert!(after[0].bytes < before[1].bytes);
    let thorough = Policy {
        thorough: true,
        ..policy("hourly=2")
    };
    let pruned = prune(&mut store, thorough).unwrap();
    assert_eq!(numbers(&store), [44, 48]);
    assert_eq!((pruned.removed, pruned.left), (10, 2));
    assert!(pruned.bytes < pruned.bytes_before);
}

#[test]
fn who_asks_is_answered_when_it_is_done() {
    let (_dir, mut store) = store();
    for _ in 0..9 {
        epoch(&mut store, 0);
    }
    let mut upkeep = Upkeep::new(Policy::default());
    let (asker, mut answer) = Asker::pair();
    let thorough = Policy {
        thorough: true,
        ..policy("last=2")
    };
    upkeep.ask(thorough, asker, &store);
    let (second, mut refused) = Asker::pair();
    upkeep.ask(thorough, second, &store);
    assert!(matches!(hear(&mut refused), Reply::Failed { exit: 1, .. }));
    let mut come = 0;
    all(&mut upkeep, &mut store, &mut |store| {
        if come < 3 {
            epoch(store, 0);
            come += 1;
        }
    });
    let Reply::Pruned(pruned) = hear(&mut answer) else {
        panic!("it is done");
    };
    assert!(pruned.removed > 0 && pruned.bytes_before > 0);
    let left = numbers(&store);
    assert_eq!(&left[..2], [8, 9], "{left:?}");
    assert_eq!(left.last(), Some(&12));
    assert_eq!(pruned.left, left.len() as u64);
}

fn hear(stream: &mut UnixStream) -> Reply {
    let mut text = String::new();
    std::io::Read::read_to_string(stream, &mut text).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_log_that_outgrows_the_work_gets_it_before_each_epoch() {
    let (_dir, mut store) = store();
    epoch(&mut store, 0);
    let mut upkeep = Upkeep::new(Policy::default());
    assert_eq!(upkeep.late(u64::MAX, 5), None, "nothing is being copied");
    assert!(upkeep.shorten(1 << 20));
    let log = 1 << 20;
    assert_eq!(
        upkeep.late(log + log / 2 + 1, 5),
        Some(PIECE),
        "also before it begins"
    );
    upkeep.piece(0, PIECE, &mut store);
    assert_eq!(upkeep.late(log + log / 2, 5), None);
    assert_eq!(upkeep.late(log * 2, 5), Some(PIECE));
    assert_eq!(upkeep.late(log * 2, PIECE), Some(2 * PIECE));
}

#[test]
fn a_full_medium_takes_back_what_nobody_wants() {
    let (dir, mut store) = store();
    store.keep_older(true);
    for _ in 0..3 {
        epoch(&mut store, 0);
    }
    store.begin_flattening().unwrap();
    store.switch().unwrap();
    store.begin_flattening().unwrap();
    for _ in 0..3 {
        store.work(PIECE).unwrap();
    }
    let files = || std::fs::read_dir(dir.path().join("s")).unwrap().count();
    assert_eq!(files(), 3);
    let mut keeps = Upkeep::new(policy("last=2"));
    keeps.give_up_space(&mut store);
    assert_eq!(files(), 2, "what is wanted stays");
    let mut upkeep = Upkeep::new(Policy::default());
    upkeep.give_up_space(&mut store);
    assert_eq!(files(), 1);
    assert_eq!(numbers(&store), [3]);
}

#[test]
fn what_is_lost_is_said_and_asks_for_a_full_epoch() {
    let (dir, mut store) = store();
    for _ in 0..3 {
        epoch(&mut store, 0);
    }
    store.close().unwrap();
    let file = dir.path().join("s/epochs.1");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[24 * 4096..70 * 4096].fill(7);
    std::fs::write(&file, bytes).unwrap();
    let mut store = Store::open(dir.path().join("s"), outlive_epoch_store::Access::Write).unwrap();
    let mut upkeep = Upkeep::new(Policy::default());
    assert!(upkeep.shorten(1 << 20));
    let mut lost = false;
    for _ in 0..10 {
        let done = upkeep.piece(0, PIECE, &mut store);
        if done.lost {
            assert!(done.warning.unwrap().contains("epochs.1"));
            lost = true;
            break;
        }
    }
    assert!(lost && !store.is_working());
    assert!(upkeep.shorten(4 << 20), "there is hope");
    assert!(!upkeep.shorten((4 << 20) + 1));
    assert_eq!(upkeep.wait(1, u64::MAX), Some(PAUSE - 1), "not at once");
}
