//! A subject that is kept for long on a small medium: its log is made short while epochs keep coming,
//! what retention wants stays, the rest is given back when it is asked for, and every epoch that is
//! listed can be restored.

use crate::no_space::Small;
use crate::support::{Kept, Place, alone, lives, may_run, signal, test_program, until};
use rustix::process::Signal;
use serde_json::Value;

/// Keeps a counter with many epochs; returns when the store was made short at least so often.
fn kept_until_short(place: &Place, more: &[&str], often: usize) -> Kept {
    let counter = test_program("counter");
    let start = ["run", "--name", "a", "--every", "5ms"];
    let program = ["--", &counter, "numbers"];
    let kept = place.start(&[&start[..], more, &program].concat());
    let (mut seen, mut newest) = (0, 0);
    until("its log is made short", || {
        let last = history(place)
            .last()
            .map(|epoch| epoch["generation"].as_u64());
        if let Some(Some(generation)) = last
            && generation != newest
        {
            (newest, seen) = (generation, seen + 1);
        }
        seen > often
    });
    kept
}

fn history(place: &Place) -> Vec<Value> {
    let done = place.call(&["history", "a", "--json"]);
    done.json().as_array().cloned().unwrap_or_default()
}

fn numbers(place: &Place) -> Vec<u64> {
    let number = |epoch: &Value| epoch["epoch"].as_u64().unwrap();
    history(place).iter().map(number).collect()
}

fn bytes(place: &Place) -> u64 {
    place.status("a")["store_bytes"].as_u64().unwrap()
}

fn pid_of(place: &Place) -> u32 {
    u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap()
}

#[test]
fn a_log_is_made_short_again_and_again_and_no_epoch_fails() {
    if !may_run("a_log_is_made_short_again_and_again_and_no_epoch_fails") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let _small = Small::mount(&place, "store", "24m");
    let mut kept = kept_until_short(&place, &[], 2);
    let status = place.status("a");
    assert_eq!(status["failures"], 0, "{status}");
    assert_eq!(status["state"], "running");
    let pid = pid_of(&place);
    let newest = place.newest("a");
    assert!(numbers(&place)[0] > 1, "what came before is gone");
    place.epoch_after("a", newest);
    place.call(&["verify", "a"]).succeeds();
    signal(pid, Signal::KILL);
    assert_eq!(kept.code(), 137);
    place.call(&["restore", "a", "--detach"]).succeeds();
    assert!(lives(pid));
    place.call(&["stop", "a"]).succeeds();
}

#[test]
fn what_is_to_be_kept_stays_and_the_rest_goes_when_asked() {
    if !may_run("what_is_to_be_kept_stays_and_the_rest_goes_when_asked") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let _small = Small::mount(&place, "store", "24m");
    let mut kept = kept_until_short(&place, &["--keep", "daily=2,last=4"], 1);
    let pid = pid_of(&place);
    let before = bytes(&place);
    let plan = place.call(&["prune", "a", "--keep", "last=3", "--dry-run", "--json"]);
    assert_eq!(plan.json()["would_stay"].as_array().unwrap().len(), 3);
    // While it runs.
    let done = place.call(&["prune", "a", "--keep", "last=3", "--json"]);
    let pruned = done.json();
    assert!(pruned["removed"].as_u64().unwrap() > 10, "{pruned}");
    assert!(pruned["bytes"].as_u64().unwrap() < before, "{pruned}");
    assert!(lives(pid));
    place.epoch_after("a", place.newest("a"));
    // And while nobody keeps it; what it was kept with counts then.
    signal(pid, Signal::KILL);
    assert_eq!(kept.code(), 137);
    let newest = place.newest("a");
    place.call(&["prune", "a"]).succeeds();
    let left = numbers(&place);
    assert_eq!(left.len(), 4, "{left:?}");
    assert_eq!(left.last(), Some(&newest));
    place.call(&["verify", "a"]).succeeds();
    place
        .call(&["inspect", "a", "--epoch", &left[0].to_string(), "--check"])
        .succeeds();
    // An earlier one is restored, as it was.
    let words = ["restore", "a", "--detach", "--files", "keep", "--epoch"];
    place
        .call(&[&words[..], &[&left[1].to_string()]].concat())
        .succeeds();
    assert!(lives(pid));
    place.epoch_after("a", newest);
    place.call(&["stop", "a"]).succeeds();
    let nothing = place.call(&["prune", "b"]);
    nothing.fails(1, &["no subject named b"]);
}

#[test]
fn nothing_goes_that_nobody_spoke_of() {
    if !may_run("nothing_goes_that_nobody_spoke_of") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", "sleep", "1000",
    ];
    let _kept = place.start(&words);
    place.epoch_after("a", 3);
    place.call(&["prune", "a"]).fails(2, &["--keep last=1"]);
    assert_eq!(numbers(&place)[0], 1);
    place.call(&["stop", "a"]).succeeds();
    place.call(&["prune", "a", "--keep", "last=2"]).succeeds();
    assert_eq!(numbers(&place).len(), 2);
}
