//! Programs that run before all their memory is there.

use crate::support::{
    Kept, Place, alone, comm, end, family, lives, may_run, signal, test_program, times, until,
};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// An image of a program that does whatever can be done to memory, and checks it.
fn image(place: &Place, megabytes: &str) -> u32 {
    let (program, rounds) = (test_program("paging"), place.text("rounds"));
    let end = place.text("end");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "1h", "--", &program, megabytes, &rounds, &end,
    ]);
    until("it has begun", || round(place) > 0);
    let done = place.call(&["checkpoint", "a", "--image", "one", "--json"]);
    done.succeeds();
    assert_eq!(kept.code(), 0, "{}", place.said());
    fs::write(place.path("rounds.forks"), "").unwrap();
    u32::try_from(done.json()["pid"].as_u64().unwrap()).unwrap()
}

fn round(place: &Place) -> u64 {
    let text = fs::read_to_string(place.path("rounds")).unwrap_or_default();
    text.lines()
        .last()
        .and_then(|l| l.parse().ok())
        .unwrap_or(0)
}

/// Begins a restore; what it says when the program runs.
fn begin(place: &Place, words: &[&str]) -> (Kept, Value) {
    let mut all = vec!["restore", "--lazy", "--json"];
    all.extend(words);
    let mut kept = place.start(&all);
    let line = kept.line();
    let report = serde_json::from_str(&line);
    let report = report.unwrap_or_else(|e| panic!("{e}: {line:?} {}", place.said()));
    (kept, report)
}

/// What the program said, to whichever file its errors went when it began.
fn found_wrong(place: &Place) -> Option<String> {
    let files = fs::read_dir(&place.dir).unwrap().flatten();
    let said = files.filter(|f| f.file_name().to_string_lossy().starts_with("errors-"));
    let mut said = said.filter_map(|f| fs::read_to_string(f.path()).ok());
    said.find(|text| text.contains("WRONG"))
}

fn must_be_right(place: &Place) {
    assert_eq!(found_wrong(place), None);
}

/// The program, with the children that it has at this moment: all come to us, to be reaped.
fn end_all(root: u32) {
    end(root);
    let is_one = |pid: &u32| comm(*pid) == "paging";
    until("all are gone", || {
        let all = family(std::process::id());
        let rest: Vec<u32> = all.into_iter().filter(is_one).collect();
        rest.iter().for_each(|pid| end(*pid));
        rest.is_empty()
    });
}

#[test]
fn pages_come_when_they_are_touched() {
    if !may_run("pages_come_when_they_are_touched") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = image(&place, "96");
    for n in 0..times(4, 100) {
        let (mut kept, report) = begin(&place, &["--image", "one"]);
        assert_eq!(report["pid"], pid);
        // Of its 96 MiB some are holes at any moment.
        assert!(
            report["later_bytes"].as_u64().unwrap() > 48 << 20,
            "{report}"
        );
        let rest: Value = serde_json::from_str(&kept.line()).unwrap_or_else(|e| {
            panic!("{e}: {}", place.said());
        });
        assert!(rest["waits"].as_u64().unwrap() > 0, "{rest}");
        let first = report["first_run_us"].as_u64().unwrap();
        assert!(rest["resident_us"].as_u64().unwrap() > first, "{rest}");
        let before = round(&place);
        until("it goes on", || {
            must_be_right(&place);
            round(&place) > before + n as u64
        });
        end_all(pid);
        assert_eq!(kept.code(), 137, "{}", place.said());
        must_be_right(&place);
    }
    // All pages, at the end.
    let (mut kept, _) = begin(&place, &["--image", "one"]);
    fs::write(place.path("end"), "").unwrap();
    kept.line();
    assert_eq!(kept.code(), 7, "{}", place.said());
    fs::remove_file(place.path("end")).unwrap();
    // The check itself: a word of its memory is changed.
    let (mut kept, _) = begin(&place, &["--image", "one"]);
    spoil(pid);
    assert_eq!(kept.code(), 1, "{}", place.said());
    assert!(found_wrong(&place).is_some(), "{}", place.said());
}

/// What is written to memory that moves all the time is in the epoch, wherever it came to lie.
#[test]
fn memory_that_moves_all_the_time_is_captured() {
    if !may_run("memory_that_moves_all_the_time_is_captured") {
        return;
    }
    let _alone = alone();
    for _ in 0..times(6, 100) {
        let place = Place::new();
        image(&place, "48");
        fs::write(place.path("end"), "").unwrap();
        let mut kept = place.start(&["restore", "--image", "one"]);
        assert_eq!(kept.code(), 7, "{:?} {}", found_wrong(&place), place.said());
    }
}

/// Changes all pages of a mapping, in their middle.
fn spoil(pid: u32) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let ranges = maps
        .lines()
        .filter(|l| l.contains(" rw-p 00000000 00:00 0"));
    let ranges = ranges.map(|l| {
        let (start, rest) = l.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        (number(start), number(end))
    });
    let (start, end) = ranges.max_by_key(|(s, e)| e - s).unwrap();
    let path = format!("/proc/{pid}/mem");
    let memory = OpenOptions::new().write(true).open(path).unwrap();
    for page in (start..end).step_by(4096) {
        // It may just be moved.
        let _ = memory.write_all_at(&[1], page + 2048);
    }
}

/// Whoever serves its memory is killed at any moment: the program is dead then, or has all of it.
#[test]
fn without_its_server_a_program_is_dead_and_never_wrong() {
    if !may_run("without_its_server_a_program_is_dead_and_never_wrong") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = image(&place, "160");
    let mut died = 0;
    for n in 0..times(8, 300) {
        let (mut kept, _) = begin(&place, &["--image", "one"]);
        std::thread::sleep(Duration::from_millis(3 * n as u64 % 50));
        // So that it cannot come to its end while it is killed.
        signal(kept.keeper.id(), Signal::STOP);
        kept.kill();
        // Where all was there already, it goes on, and checks all it touches.
        let before = round(&place);
        until("it is dead, or goes on", || {
            !lives(pid) || round(&place) > before + 2
        });
        died += u32::from(!lives(pid));
        end_all(pid);
        must_be_right(&place);
    }
    assert!(died > 0, "it was always complete");
}

/// The same where the guard is killed at the same moment: nobody is left who could end the program.
#[test]
fn without_server_and_guard_a_program_is_dead_and_never_wrong() {
    if !may_run("without_server_and_guard_a_program_is_dead_and_never_wrong") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = image(&place, "160");
    // What a child has that is made meanwhile is held by server and guard only.
    fs::remove_file(place.path("rounds.forks")).unwrap();
    let mut both = 0;
    for n in 0..times(8, 300) {
        let (mut kept, _) = begin(&place, &["--image", "one"]);
        std::thread::sleep(Duration::from_millis(3 * n as u64 % 30));
        let is_guard = |pid: &u32| comm(*pid) == "outlive-guard";
        let mut all = family(kept.keeper.id()).into_iter();
        let guard = all.find(is_guard);
        for signal_of_all in [Signal::STOP, Signal::KILL] {
            for one in guard.into_iter().chain([kept.keeper.id()]) {
                signal(one, signal_of_all);
            }
        }
        kept.kill();
        let before = round(&place);
        until("it is dead, or goes on", || {
            !lives(pid) || round(&place) > before + 2
        });
        both += u32::from(guard.is_some() && !lives(pid));
        end_all(pid);
        must_be_right(&place);
    }
    assert!(both > 0, "it was always complete");
}

/// Damage on the medium ends the program, with its reason; no other contents are served.
#[test]
fn a_damaged_page_ends_the_program() {
    if !may_run("a_damaged_page_ends_the_program") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = image(&place, "32");
    let epochs = fs::read_dir(place.path("one")).unwrap().flatten();
    let epochs = epochs
        .map(|e| e.path())
        .max_by_key(|p| fs::metadata(p).unwrap().len());
    let epochs = epochs.unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(&epochs)
        .unwrap();
    let at = fs::metadata(&epochs).unwrap().len() / 2;
    // More than can be made up for.
    let mut bytes = vec![0; 1 << 20];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 1);
    file.write_all_at(&bytes, at).unwrap();
    let (mut kept, _) = begin(&place, &["--image", "one"]);
    assert_eq!(kept.code(), 4, "{}", place.said());
    let said = place.said();
    assert!(said.contains("a page of it cannot be read"), "{said}");
    must_be_right(&place);
    until("it is dead", || !lives(pid));
    // The same before it ran, where everything is read first.
    let done = place.call(&["restore", "--image", "one"]);
    done.fails(4, &["damaged"]);
}

/// Epochs come while not all is there, or are asked for; the program is killed again meanwhile.
#[test]
fn a_subject_is_restored_lazily_again_and_again() {
    if !may_run("a_subject_is_restored_lazily_again_and_again") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let (program, rounds) = (test_program("paging"), place.text("rounds"));
    let end_file = place.text("end");
    let words = [
        "run", "--name", "a", "--every", "100ms", "--", &program, "64", &rounds, &end_file,
    ];
    let mut kept = place.start(&words);
    until("it has begun", || round(&place) > 0);
    let mut newest = place.epoch_after("a", 0);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    for n in 0..times(8, 100) {
        kept.kill();
        // It may be without its server now; it is never wrong.
        let before = round(&place);
        until("it is dead, or goes on", || {
            !lives(pid) || round(&place) > before + 2
        });
        must_be_right(&place);
        end_all(pid);
        if n == 4 {
            // From now on it makes children, too.
            fs::write(place.path("rounds.forks"), "").unwrap();
        }
        newest = place.newest("a").max(newest);
        let (again, report) = begin(&place, &["a"]);
        kept = again;
        assert_eq!(report["epoch"], newest, "{report}");
        match n % 4 {
            // While not all is there …
            0 => std::thread::sleep(Duration::from_millis(n as u64)),
            // … or when an epoch was asked for …
            1 => {
                let done = place.call(&["checkpoint", "a"]);
                assert_eq!(done.code, 0, "{done:?} {}", place.said());
            }
            // … or came by itself …
            2 => drop(place.epoch_after("a", newest)),
            // … or it was ended, and continued.
            _ => {
                place.call(&["stop", "a"]).succeeds();
                kept.code();
            }
        }
        must_be_right(&place);
    }
    let before = round(&place);
    if !lives(pid) {
        kept = begin(&place, &["a"]).0;
    }
    until("it goes on", || round(&place) > before);
    fs::write(place.path("end"), "").unwrap();
    // The report that all is there may come before or after.
    until("it ends", || kept.keeper.try_wait().unwrap().is_some());
    assert_eq!(kept.code(), 7, "{}", place.said());
    must_be_right(&place);
}
