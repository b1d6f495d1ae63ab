//! The keeper, the program, or both are killed at random moments, again and again; what comes back
//! is checked by what the program computes and by what it wrote.

use crate::support::{
    Kept, Place, alone, comm, end, installed, lives, may_run, reap, signal, times, until,
};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// Counts rounds. In each, every page of a large piece of memory is brought from the last round to
/// this one, and checked both before and after, so that a page of another epoch is found; then the
/// round is appended to a file.
const PROGRAM: &str = r#"
import os, sys
pages = 800
memory = bytearray(pages * 4096)
out = os.open("rounds", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
def fail(what):
    os.write(os.open("wrong", os.O_WRONLY | os.O_CREAT, 0o600), what.encode())
    os._exit(1)
n = 0
while True:
    n += 1
    for page in range(pages):
        at = page * 4096
        if int.from_bytes(memory[at:at + 8], "little") != n - 1:
            fail("page %d is not of round %d" % (page, n - 1))
        memory[at:at + 8] = n.to_bytes(8, "little")
    for page in range(pages):
        at = page * 4096
        if int.from_bytes(memory[at:at + 8], "little") != n:
            fail("page %d is not of round %d" % (page, n))
    os.write(out, b"%d\n" % n)
"#;

/// The numbers in the file, which are checked: each once, in their order.
fn rounds(place: &Place, seed: u64) -> u64 {
    let wrong = fs::read_to_string(place.path("wrong"));
    assert!(wrong.is_err(), "seed {seed}: {wrong:?}");
    let text = fs::read_to_string(place.path("rounds")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut last = 0;
    for line in whole.lines() {
        let round: u64 = line.parse().unwrap();
        assert_eq!(round, last + 1, "seed {seed}: a round is missing or twice");
        last = round;
    }
    last
}

fn goes_on(place: &Place, seed: u64) {
    let before = rounds(place, seed);
    until("it counts on", || rounds(place, seed) > before);
}

/// Ends the program with the test, whoever keeps it.
struct Ended(u32);

impl Drop for Ended {
    fn drop(&mut self) {
        if comm(self.0) == "python3" {
            end(self.0);
        }
    }
}

/// What was ever shown of what keepers counted never goes back, whoever is killed; and it is still there when
/// nobody keeps the program.
fn never_back(place: &Place, before: &mut Value, told: &str) {
    let status = place.status("a");
    let totals = &status["totals"];
    if totals.is_null() {
        // A keeper that has only begun shows nothing yet.
        let begins = before.is_null() || !status["keeper_pid"].is_null();
        assert!(begins, "{told}: {before} was shown, {status} is now");
        return;
    }
    for count in [
        "keepers",
        "epochs",
        "bytes_written",
        "failures",
        "abandoned",
    ] {
        let [was, is] = [&*before, totals].map(|shown| shown[count].as_u64());
        assert!(is.is_some() && is >= was, "{told}: {before}, then {totals}");
    }
    if !before.is_null() {
        assert_eq!(
            totals["since"], before["since"],
            "{told}: it was begun anew"
        );
    }
    *before = totals.clone();
}

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Program,
    Keeper,
    Both,
}

#[test]
fn compressed_epochs_come_back_after_a_kill() {
    if !may_run("compressed_epochs_come_back_after_a_kill") {
        return;
    }
    let _alone = alone();
    let python = installed("python3");
    for (codec, how) in [("lz4", "--lazy"), ("zstd", "--detach")] {
        let place = Place::new();
        let begin = ["run", "--name", "a", "--every", "20ms", "--compress", codec];
        let program = ["--", &python, "-I", "-S", "-c", PROGRAM];
        let mut kept = place.start(&[&begin[..], &program].concat());
        place.epoch_after("a", 2);
        // Epochs that were taken before it filled its memory have little to save.
        goes_on(&place, 0);
        let compressed = |after: u64| {
            let list = place.call(&["history", "a", "--json"]).json();
            let list = list.as_array().unwrap().iter();
            let number = |epoch: &Value, what: &str| epoch[what].as_u64().unwrap();
            let mut list = list.map(|e| (number(e, "epoch"), number(e, "saved_bytes")));
            list.find(|(epoch, saved)| *epoch > after && *saved > 0)
        };
        let mut status = Value::Null;
        // Most of its memory is zeros with a few numbers.
        until("most of what is stored is saved", || {
            status = place.status("a");
            status["saved_bytes"].as_u64() > status["store_bytes"].as_u64()
        });
        assert_eq!(status["compress"], codec);
        let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
        let _ended = Ended(pid);
        signal(pid, Signal::KILL);
        assert_eq!(kept.code(), 137);
        place.call(&["verify", "a"]).succeeds();
        // The first ones are not there any more where a new generation was begun.
        let (epoch, saved) = compressed(0).expect("a compressed epoch");
        let number = epoch.to_string();
        let inspected = place.call(&["inspect", "a", "--epoch", &number, "--json"]);
        inspected.succeeds();
        assert_eq!(inspected.json()["saved_bytes"], saved, "{inspected:?}");
        let mut words = vec!["restore", "a", "--detach"];
        words.extend(Some(how).filter(|how| *how != "--detach"));
        place.call(&words).succeeds();
        goes_on(&place, 0);
        // What it was kept with counts on.
        let newest = place.newest("a");
        until("another compressed epoch", || compressed(newest).is_some());
        place.call(&["stop", "a"]).succeeds();
        place
            .call(&["restore", "a", "--hold-up", "1s", "--compress", "lz4"])
            .fails(2, &["cannot be used with"]);
    }
}

/// Makes a file that only its owner can use.
fn private(place: &Place, name: &str, bytes: &[u8]) -> String {
    let path = place.path(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path.display().to_string()
}

/// Whether any file of the store holds these bytes.
fn is_in_store(place: &Place, bytes: &[u8]) -> bool {
    let files = fs::read_dir(place.store().join("a/epochs")).unwrap();
    let mut held = files.map(|file| fs::read(file.unwrap().path()).unwrap());
    held.any(|file| file.windows(bytes.len()).any(|part| part == bytes))
}

#[test]
fn encrypted_epochs_come_back_after_a_kill_with_their_key() {
    if !may_run("encrypted_epochs_come_back_after_a_kill_with_their_key") {
        return;
    }
    let _alone = alone();
    let place = Place::new();
    let python = installed("python3");
    let key: Vec<u8> = (1..33).collect();
    let (right, wrong) = (
        private(&place, "right", &key),
        private(&place, "wrong-key", &[b'7', 0].repeat(16)),
    );
    let begin = [
        "run",
        "--name",
        "a",
        "--every",
        "20ms",
        "--key-file",
        &right,
    ];
    // A word of its text, which is in its memory as well.
    let (word, text) = ("brought from the last round", format!("# {PROGRAM}"));
    let program = text.replacen('#', "note = 'brought from the last ' + 'round'\n#", 1);
    let mut kept =
        place.start(&[&begin[..], &["--", &python, "-I", "-S", "-c", &program]].concat());
    place.epoch_after("a", 2);
    let status = place.status("a");
    assert_eq!(status["key"].as_str().map(str::len), Some(16), "{status}");
    let pid = u32::try_from(status["pid"].as_u64().unwrap()).unwrap();
    let _ended = Ended(pid);
    signal(pid, Signal::KILL);
    assert_eq!(kept.code(), 137);
    assert!(!is_in_store(&place, word.as_bytes()));
    let card = fs::read(place.store().join("a/subject.json")).unwrap();
    assert!(
        !card.windows(32).any(|part| part == key),
        "the card has the key"
    );
    // The card says where the key is.
    let verified = place.call(&["verify", "a", "--json"]);
    verified.succeeds();
    assert_eq!(verified.json()["authenticated"], true);
    place.call(&["inspect", "a"]).succeeds();
    let fingerprint = status["key"].as_str().unwrap();
    place
        .call(&["restore", "a", "--key-file", &wrong])
        .fails(3, &[fingerprint, "was given"]);
    place
        .call(&["export", "a", "-o", "out"])
        .fails(3, &["is encrypted", "checkpoint a --image"]);
    assert!(!place.path("out").exists());
    let shelf = place.path("shelf").display().to_string();
    place
        .call(&["push", "a", &shelf])
        .fails(3, &["is encrypted", fingerprint]);
    // Elsewhere from now on.
    let moved = place.path("moved").display().to_string();
    fs::rename(&right, &moved).unwrap();
    place
        .call(&["restore", "a", "--detach"])
        .fails(1, &["the key in", "right"]);
    place
        .call(&["verify", "a"])
        .fails(1, &["the key in", "right", "--checksums-only"]);
    let verified = place.call(&["verify", "a", "--checksums-only", "--json"]);
    verified.succeeds();
    assert_eq!(verified.json()["authenticated"], false);
    place
        .call(&["verify", "a", "--checksums-only", "--key-file", &moved])
        .fails(2, &["cannot be used with"]);
    let command = format!("cat '{moved}'");
    place
        .call(&["restore", "a", "--detach", "--key-command", &command])
        .succeeds();
    goes_on(&place, 0);
    place.epoch_after("a", place.newest("a") + 1);
    // Before it would be ended for that.
    place
        .call(&["checkpoint", "a", "--image", "copy", "--key-file", &wrong])
        .fails(3, &[fingerprint, "was given"]);
    goes_on(&place, 0);
    place
        .call(&["checkpoint", "a", "--image", "copy", "--leave-running"])
        .succeeds();
    place
        .call(&["inspect", "./copy"])
        .fails(3, &["no key was given", fingerprint]);
    place
        .call(&["inspect", "./copy", "--key-file", &moved])
        .succeeds();
    place.call(&["stop", "a"]).succeeds();
    place
        .call(&["restore", "a", "--hold-up", "1s"])
        .fails(3, &["no time for encryption"]);
}

#[test]
fn whoever_dies_at_any_moment_the_newest_epoch_comes_back() {
    if !may_run("whoever_dies_at_any_moment_the_newest_epoch_comes_back") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let seed = std::env::var("OUTLIVE_SEED").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |text| text.parse().unwrap());
    println!("OUTLIVE_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let python = installed("python3");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", &python, "-I", "-S", "-c", PROGRAM,
    ];
    let mut kept = place.start(&words);
    let mut child = true;
    place.epoch_after("a", 0);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    let _ended = Ended(pid);
    let mut totals = Value::Null;
    for round in 0..times(20, 200) {
        let held = place.newest("a");
        goes_on(&place, seed);
        never_back(&place, &mut totals, &format!("seed {seed}, round {round}"));
        std::thread::sleep(std::time::Duration::from_micros(random.u64(..150_000)));
        let victim = [Victim::Program, Victim::Keeper, Victim::Both][random.usize(..3)];
        let told = format!("seed {seed}, round {round}, {victim:?}");
        if victim == Victim::Program {
            signal(pid, Signal::KILL);
            assert_eq!(kept.code(), if child { 137 } else { 0 }, "{told}");
        } else {
            kept.kill();
        }
        never_back(&place, &mut totals, &told);
        if victim == Victim::Both {
            // A moment of its own, so that the program may change what is no longer captured.
            std::thread::sleep(std::time::Duration::from_micros(random.u64(..20_000)));
        }
        if victim == Victim::Keeper {
            assert!(lives(pid), "{told}");
            goes_on(&place, seed);
            // The program is still in the group of its first keeper, which is not to be ended.
            std::mem::forget(std::mem::replace(&mut kept, attach(&place, pid, &told)));
            child = false;
            assert!(place.newest("a") >= held, "{told}: epochs are gone");
            let before = place.newest("a");
            until("another epoch", || {
                assert!(lives(pid), "{told}: the program died: {:?}", reap(pid));
                place.newest("a") > before
            });
            continue;
        }
        end(pid);
        let newest = place.newest("a");
        assert!(newest >= held, "{told}: {held} was there, {newest} is now");
        let epochs = place.epochs("a");
        let earlier = if random.u8(..4) == 0 { 2 } else { 1 };
        let wanted = epochs[epochs.len().saturating_sub(earlier)];
        kept = restore(&place, pid, wanted, &told);
        child = true;
        goes_on(&place, seed);
        place.epoch_after("a", newest);
        // Epochs go on from the newest one; any other is the end of those after it.
        let kept_all = place.epochs("a").contains(&wanted);
        assert_eq!(kept_all, wanted == newest, "{told}: epoch {wanted}");
    }
    place.call(&["stop", "a"]).succeeds();
    kept.code();
    rounds(&place, seed);
    never_back(&place, &mut totals, &format!("seed {seed}, at the end"));
    assert!(totals["keepers"].as_u64() > Some(1), "{totals}");
    assert!(totals["epochs"].as_u64() > Some(0), "{totals}");
}

#[test]
fn without_its_table_a_subject_is_shown_kept_and_restored() {
    if !may_run("without_its_table_a_subject_is_shown_kept_and_restored") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let python = installed("python3");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", &python, "-I", "-S", "-c", PROGRAM,
    ];
    let mut kept = place.start(&words);
    place.epoch_after("a", 2);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    let _ended = Ended(pid);
    let table = place.store().join("a/table.heap");
    let gone = || {
        // A keeper that was killed may not have made it again.
        let _ = fs::remove_file(&table);
    };
    let rubbish = || fs::write(&table, [0x5au8; 50_000]).unwrap();
    let cut = || fs::write(&table, b"").unwrap();
    let harms: [(&str, &dyn Fn()); 3] = [("gone", &gone), ("rubbish", &rubbish), ("cut", &cut)];
    for (how, harm) in harms {
        until("there are totals", || {
            !place.status("a")["totals"].is_null()
        });
        harm();
        place.epoch_after("a", place.newest("a"));
        kept.kill();
        end(pid);
        harm();
        let (status, newest) = (place.status("a"), place.newest("a"));
        assert!(status["totals"].is_null(), "{how}: {status}");
        assert_eq!(status["epoch"], newest, "{how}: {status}");
        kept = restore(&place, pid, newest, how);
        goes_on(&place, 0);
        place.epoch_after("a", newest);
    }
    until("there are totals", || {
        !place.status("a")["totals"].is_null()
    });
    let totals = place.status("a")["totals"].clone();
    assert_eq!(totals["keepers"], 1, "it was begun anew: {totals}");
    place.call(&["stop", "a"]).succeeds();
    kept.code();
    rounds(&place, 0);
}

fn attach(place: &Place, pid: u32, told: &str) -> Kept {
    let number = pid.to_string();
    let words = ["attach", "--pid", &number, "--name", "a", "--every", "20ms"];
    let mut kept = place.start(&words);
    until("it is kept again", || {
        let ended = kept.keeper.try_wait().unwrap();
        let said = place.said();
        assert!(ended.is_none(), "{told}: {said:?}");
        place.status("a")["state"] == "running"
    });
    kept
}

fn restore(place: &Place, pid: u32, epoch: u64, told: &str) -> Kept {
    let number = epoch.to_string();
    let mut kept = place.start(&["restore", "a", "--json", "--epoch", &number]);
    let line = kept.line();
    let said = place.said();
    let report: serde_json::Value = serde_json::from_str(&line)
        .unwrap_or_else(|error| panic!("{told}: {error}: {line:?} {said:?}"));
    assert_eq!(report["pid"], pid, "{told}: {line} {said:?}");
    assert_eq!(report["epoch"], epoch, "{told}: {line} {said:?}");
    kept
}
