//! Programs that continue from another store than the one in which they were kept.

use crate::support::{Place, alone, end, lives, may_run, signal, test_program, until};
use serde_json::Value;
use std::fs;
use std::process::Stdio;

#[test]
fn a_kept_program_is_exported_through_a_pipe_and_continues_from_another_store() {
    if !may_run("a_kept_program_is_exported_through_a_pipe_and_continues_from_another_store") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let counter = test_program("counter");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", &counter, "numbers",
    ];
    let mut kept = place.start(&words);
    place.epoch_after("a", 3);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    // Through a pipe, while it is kept.
    let mut export = place.command(&["export", "a"]);
    let errors = place.new_errors();
    let mut export = export
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .unwrap();
    let words = ["import", "-", "--name", "b", "--store", "second"];
    let mut import = place.command(&words);
    import.stdin(export.stdout.take().unwrap());
    let imported = import.output().unwrap();
    assert!(export.wait().unwrap().success(), "{}", place.said());
    assert!(imported.status.success(), "{imported:?}");
    place.call(&["verify", "b", "--store", "second"]).succeeds();
    signal(pid, rustix::process::Signal::KILL);
    assert_eq!(kept.code(), 137);
    let newest = place.newest("a");
    let whole = place.call(&["export", "a", "-o", "all", "--json"]).json();
    assert_eq!(whole["epoch"], newest);
    let words = ["import", "all", "--name", "c", "--store", "third"];
    place.call(&words).succeeds();
    let history = |words: &[&str]| {
        let list = place.call(words).json();
        let list = list.as_array().unwrap().iter();
        let line = |e: &Value| [&e["epoch"], &e["time"], &e["stop_us"]].map(Value::to_string);
        list.map(line).collect::<Vec<_>>()
    };
    let (first, third) = (
        history(&["history", "a", "--json"]),
        history(&["history", "c", "--json", "--store", "third"]),
    );
    assert!(first.len() > 2);
    assert_eq!(first, third);
    let ps = place.call(&["ps", "--json", "--store", "third"]).json();
    assert_eq!(ps[0]["state"], "imported");
    assert_eq!(ps[0]["every_us"], 20_000);
    // One epoch alone, and the program from it.
    let k = newest.to_string();
    let words = ["export", "a", "-o", "one", "--epoch", &k, "--json"];
    let one = place.call(&words).json();
    assert_eq!(
        (&one["epoch"], &one["first_epoch"]),
        (&newest.into(), &newest.into())
    );
    assert_eq!(one["bytes"], fs::metadata(place.path("one")).unwrap().len());
    let words = ["import", "one", "--name", "d", "--store", "third"];
    place.call(&words).succeeds();
    let numbers = || fs::metadata(place.path("numbers")).unwrap().len();
    let words = ["restore", "d", "--detach", "--store", "third"];
    place.call(&words).succeeds();
    assert!(lives(pid));
    let before = numbers();
    until("it counts on", || numbers() > before);
    place.call(&["stop", "d", "--store", "third"]).succeeds();
}

#[test]
fn what_is_cut_off_or_spoilt_on_its_way_leaves_nothing() {
    if !may_run("what_is_cut_off_or_spoilt_on_its_way_leaves_nothing") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    place.call(&["export", "./image", "-o", "whole"]).succeeds();
    let again = place.call(&["export", "./image", "-o", "whole"]);
    again.fails(3, &["whole is there already"]);
    place
        .call(&["export", "./image", "--json"])
        .fails(2, &["-o"]);
    let whole = fs::read(place.path("whole")).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    fs::write(place.path("flipped"), flipped).unwrap();
    fs::write(place.path("cut"), &whole[..whole.len() - 1]).unwrap();
    for (file, word) in [("flipped", "checksum"), ("cut", "ends after")] {
        let done = place.call(&["import", file, "--name", "s"]);
        done.fails(4, &[file, "at offset", word]);
        assert!(
            place.names("store").is_empty(),
            "{:?}",
            place.names("store")
        );
    }
    place.call(&["import", "whole"]).fails(2, &["--name"]);
    place
        .call(&["import", "image/..", "--name", "s"])
        .fails(1, &["image/.."]);
    assert!(place.names("store").is_empty());
    place.call(&["import", "whole", "--name", "s"]).succeeds();
    assert_eq!(place.names("store"), ["s"]);
    place
        .call(&["import", "whole", "--name", "s"])
        .fails(3, &["already"]);
    place.call(&["restore", "s", "--detach"]).succeeds();
    assert!(lives(pid));
    place.call(&["stop", "s"]).succeeds();
    end(pid);
}

#[test]
fn what_one_host_pushes_another_pulls_continues_and_pushes_again() {
    if !may_run("what_one_host_pushes_another_pulls_continues_and_pushes_again") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let counter = test_program("counter");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", &counter, "numbers",
    ];
    let mut kept = place.start(&words);
    place.epoch_after("a", 3);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    // While it is kept.
    let first = place.call(&["push", "a", "shelf", "--json"]).json();
    assert_eq!(first["pieces"], first["new_pieces"]);
    place.epoch_after("a", first["epoch"].as_u64().unwrap());
    signal(pid, rustix::process::Signal::KILL);
    assert_eq!(kept.code(), 137);
    let second = place.call(&["push", "a", "shelf", "--json"]).json();
    assert_eq!(second["epoch"], place.newest("a"));
    let count = |what: &str| second[what].as_u64().unwrap();
    assert!(count("new_pieces") < count("pieces"), "{second}");
    let again = place.call(&["push", "a", "shelf"]);
    assert!(again.out.contains("already"), "{again:?}");
    // The other host knows the shelf by its URL.
    let url = format!("file://{}", place.text("shelf"));
    let other = |words: &[&str]| {
        let words = [words, &["--store", "second"]].concat();
        place.call(&words)
    };
    let pulled = other(&["pull", "a", &url, "--json"]).json();
    assert_eq!(
        (&pulled["epoch"], &pulled["hash"]),
        (&second["epoch"], &second["hash"])
    );
    assert_eq!(place.names("second"), ["a"]);
    other(&["verify", "a"]).succeeds();
    other(&["pull", "a", &url]).fails(3, &["a already", "--name"]);
    other(&["restore", "a", "--detach"]).succeeds();
    assert!(lives(pid));
    let numbers = || fs::metadata(place.path("numbers")).unwrap().len();
    let before = numbers();
    until("it counts on", || numbers() > before);
    other(&["stop", "a"]).succeeds();
    let third = other(&["push", "a", &url, "--json"]).json();
    assert!(third["epoch"].as_u64() > second["epoch"].as_u64());
    // The first host has gone another way, and takes nothing from the second.
    let late = place.call(&["push", "a", "shelf"]);
    late.fails(3, &["nothing was pushed", "--as"]);
    place.call(&["push", "a", "shelf", "--as", "b"]).succeeds();
    other(&["pull", "a", &url, "--name", "c"]).succeeds();
    other(&["push", "a", "ftp://host/x"]).fails(2, &["there is no ftp"]);
    other(&["pull", "nobody", &url]).fails(1, &["nobody"]);
    // Without its pieces an epoch is not taken, and nothing of it stays.
    fs::remove_dir_all(place.path("shelf/chunks")).unwrap();
    other(&["pull", "a", &url, "--name", "d"]).fails(4, &["chunks", "missing"]);
    let mut names = place.names("second");
    names.sort();
    assert_eq!(names, ["a", "c"]);
}
