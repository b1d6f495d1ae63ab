//! Files that go with the memory: a program that writes to the middle of its files is killed with
//! its keeper at random moments, and finds in them what it remembers.

use crate::support::{Kept, Place, alone, end, family, installed, may_run, times};
use std::time::Duration;

/// Starts the writer, whose files lie in the place.
fn write(place: &Place, journal: &str, more: &[&str]) -> Kept {
    let script = place.text("writer.py");
    std::fs::write(&script, include_str!("files/writer.py")).unwrap();
    let python = installed("python3");
    let start = ["run", "--name", "a", "--every", "20ms"];
    let program = ["--", &python, "-I", "-S", &script, journal];
    place.start(&[&start, more, &program].concat())
}

/// Kills the keeper and all of the program at once, so long after an epoch.
fn die(place: &Place, mut kept: Kept, after: Duration) {
    for _ in 0..2 {
        place.epoch_after("a", place.newest("a"));
    }
    std::thread::sleep(after);
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);
}

fn in_step(journal: &str) {
    let (_alone, place) = (alone(), Place::new());
    let seed = std::env::var("OUTLIVE_SEED").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |text| text.parse().unwrap());
    println!("OUTLIVE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kept = write(&place, journal, &[]);
    let mut put_back = 0;
    for _ in 0..times(5, 50) {
        die(&place, kept, Duration::from_micros(random.u64(..60_000)));
        kept = place.start(&["restore", "a"]);
        place.epoch_after("a", place.newest("a"));
        put_back += u32::from(place.said().contains("put back"));
    }
    std::fs::write(place.path("enough"), "").unwrap();
    let code = kept.code();
    let wrong = std::fs::read_to_string(place.path("wrong")).unwrap_or_default();
    assert_eq!(code, 0, "seed {seed}: {wrong} {}", place.said());
    assert!(
        put_back > 0,
        "seed {seed}: nothing was written after an epoch"
    );
}

#[test]
fn a_database_with_a_rollback_journal_stays_in_step() {
    if may_run("a_database_with_a_rollback_journal_stays_in_step") {
        in_step("delete");
    }
}

#[test]
fn a_database_with_a_write_ahead_log_stays_in_step() {
    if may_run("a_database_with_a_write_ahead_log_stays_in_step") {
        in_step("wal");
    }
}

/// The same program finds its files ahead of it where they are kept as they are, and is not
/// restored where their contents are in no epoch. (Its journal stays: one that is gone cannot be kept.)
#[test]
fn what_is_not_put_back_is_noticed() {
    if !may_run("what_is_not_put_back_is_noticed") {
        return;
    }
    let _alone = alone();
    let place = Place::new();
    let kept = write(&place, "truncate", &["--files-limit", "0"]);
    die(&place, kept, Duration::from_millis(50));
    place.call(&["restore", "a"]).fails(3, &["--files keep"]);
    let place = Place::new();
    let kept = write(&place, "truncate", &[]);
    die(&place, kept, Duration::from_millis(50));
    let mut kept = place.start(&["restore", "a", "--files", "keep"]);
    assert_eq!(kept.code(), 1, "{}", place.said());
    // By itself, or because the database does not hold together.
    let said = |name| std::fs::read_to_string(place.path(name)).unwrap_or_default();
    let (wrong, traceback) = (said("wrong"), said("errors-1"));
    assert!(
        wrong.contains("another time") || traceback.contains("sqlite3."),
        "{wrong} {traceback}"
    );
}
