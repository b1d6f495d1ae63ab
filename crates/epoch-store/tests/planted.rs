//! Bugs on purpose, each caught by a test with a name.
//!
//! Every place of the code that asks for a bug has its line here; a bug that no test catches fails
//! this test, and so does a place without a line. The tests named here are those of the other
//! files, word for word; that they pass without a bug is shown where they stand. So this is run
//! alone, by `cargo xtask mutants`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]
#![allow(clippy::duplicate_mod, reason = "each file of tests has its helpers")]

#[path = "beside.rs"]
mod beside;
#[path = "crash.rs"]
mod crash;
#[path = "damage.rs"]
mod damage;
#[path = "encrypted.rs"]
mod encrypted;
#[path = "golden.rs"]
mod golden;
#[path = "model.rs"]
mod model;
#[path = "packed.rs"]
mod packed;
#[path = "torture.rs"]
mod torture;

use outlive_epoch_store::planted::{met, plant};
use std::collections::BTreeSet;
use std::panic::catch_unwind;
use std::sync::Mutex;

/// A bug, and the test that catches it.
struct Planted {
    bug: &'static str,
    name: &'static str,
    test: fn(),
}

macro_rules! planted {
    ($($bug:literal: $test:path,)*) => {
        &[$(Planted { bug: $bug, name: stringify!($test), test: $test },)*]
    };
}

const PLANTED: &[Planted] = planted![
    // The order of writes, flushes and names.
    "data not flushed": crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch,
    "record not flushed": crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch,
    "rename not synced": crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch,
    "old file removed first": crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch,
    "oldest file counts": crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch,
    "one slot for all epochs": golden::the_present_version_writes_its_golden_image,
    "older record counts": crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch,
    // Recovery.
    "found but not synced": torture::lives_survive_killed_writers,
    "unpublished file kept": torture::lives_survive_killed_writers,
    "slot mended before it is sealed": crash::a_power_cut_in_recovery_loses_nothing_that_was_found,
    "what may follow is left to the seal": crash::a_power_cut_in_recovery_loses_nothing_that_was_found,
    "slot mended before the seal is durable": crash::a_power_cut_in_recovery_loses_nothing_that_was_found,
    "superblock not mended": damage::a_writer_mends_the_header,
    "numbers begin again": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    // Failures and what follows them.
    "failed record taken for done": torture::lives_survive_errors,
    "repeated rename fails": crash::any_operation_may_fail_once_and_the_next_attempt_succeeds,
    "open commit forgotten": crash::an_attempt_after_a_failed_one_harms_neither,
    "open commit taken back": crash::any_operation_may_fail_once_and_the_next_attempt_succeeds,
    "old error kept": crash::an_error_of_an_abandoned_epoch_does_not_hit_the_next,
    "abandoning not noted": crash::an_error_of_an_abandoned_epoch_does_not_hit_the_next,
    "incomplete epoch committed": crash::an_epoch_that_lacks_a_page_cannot_be_committed,
    // Closing.
    "closed too short": torture::lives_survive_killed_writers,
    "closed without a seal": golden::the_present_version_writes_its_golden_image,
    // Generations that are written beside others.
    "gap not noted": beside::what_is_left_out_leaves_the_others_as_they_were,
    "what is gone is not carried": beside::a_flattened_store_holds_what_it_held,
    "switched before all is carried": beside::a_power_cut_anywhere_in_growth_leaves_the_last_or_the_next_epoch,
    "durable time of the copy": beside::a_flattened_store_holds_what_it_held,
    "older files removed at opening": beside::what_is_left_out_leaves_the_others_as_they_were,
    "replaced although it is kept": beside::a_power_cut_anywhere_in_growth_leaves_the_last_or_the_next_epoch,
    // What an epoch holds.
    "zero by its second byte": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    "absent pages stay": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    "trees compared by length": torture::lives_survive_power_cuts,
    "trees of another file": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    "base rests on others": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    "chain forgotten": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    "split run not advanced": torture::lives_survive_killed_writers,
    "checksums of the first run": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    "runs joined over a gap": crash::a_full_medium_keeps_what_is_there_and_works_again_when_there_is_space,
    // What is packed together.
    "place in the cluster not advanced": packed::what_was_packed_comes_back,
    "said before what came before": packed::what_was_packed_comes_back,
    "cluster over the end of a stripe": packed::what_was_packed_comes_back,
    "last cluster forgotten": packed::all_pages_of_a_lost_cluster_are_named,
    "clusters of epochs not told apart": packed::clusters_of_two_epochs_are_two,
    // What keys and tags are for.
    "attempts have the same key": encrypted::what_is_written_again_has_other_bytes,
    "one nonce for all places": encrypted::equal_pages_have_different_bytes,
    "tags not compared": encrypted::changed_numbers_of_a_trailer_are_found,
    "renamed file read": encrypted::a_file_with_another_name_is_refused,
    "slots not told apart": encrypted::the_record_of_an_epoch_does_not_stand_in_for_the_next,
    "tags of pages not checked": encrypted::changes_that_no_checksum_sees_are_found,
    "plain file read with a key": encrypted::a_plain_store_in_the_place_of_an_encrypted_one_is_refused,
    // What checksums and copies are for.
    "files not told apart": damage::a_block_of_another_image_is_found,
    "places not told apart": damage::blocks_in_wrong_places_are_found,
    "records not checked": damage::every_changed_byte_is_reported,
    "trailers not told apart": crash::a_trailer_of_a_failed_attempt_is_not_taken_for_that_of_the_next,
    "doubt not seen": damage::whatever_is_left_of_the_header_the_newest_epoch_is_found_or_missed_by_name,
    "newer version read": damage::a_newer_version_is_refused_by_name,
    "one superblock": damage::a_writer_mends_the_header,
];

#[test]
fn every_planted_bug_is_caught() {
    let mut seen = BTreeSet::new();
    plant("");
    crash::a_power_cut_anywhere_leaves_the_last_or_the_next_epoch();
    damage::a_newer_version_is_refused_by_name();
    seen.extend(met());
    std::panic::set_hook(Box::new(|_| {}));
    let (left, missed) = (Mutex::new(PLANTED.iter()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let next = left.lock().unwrap().next();
            let Some(Planted { bug, name, test }) = next else {
                return met();
            };
            plant(bug);
            let caught = catch_unwind(test).is_err();
            plant("");
            println!(
                "{}: {bug}: {name}",
                if caught { "caught" } else { "MISSED" }
            );
            if !caught || !met().contains(*bug) {
                missed.lock().unwrap().push((bug, name));
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .for_each(|thread| seen.extend(thread.join().unwrap()));
    });
    drop(std::panic::take_hook());
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "not caught: {missed:?}");
    let listed: BTreeSet<String> = PLANTED.iter().map(|p| p.bug.to_owned()).collect();
    assert_eq!(seen, listed, "places that ask, and bugs that are listed");
    println!("{} planted bugs, all caught", PLANTED.len());
    assert!(PLANTED.len() >= 30);
}
