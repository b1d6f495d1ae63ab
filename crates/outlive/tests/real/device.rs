//! Epochs on a block device of their own, which is a loop device here.

use crate::support::{
    Place, alone, end, family, finished, installed, lives, may_run, test_program, until,
};
use std::fs;
use std::process::Command;

/// A device of a file, which is let go when it is dropped.
struct Loop {
    path: String,
}

impl Loop {
    fn new(place: &Place, name: &str, holds: u8) -> Self {
        let file = place.text(name);
        fs::write(&file, vec![holds; 48 << 20]).unwrap();
        let mut command = Command::new(installed("losetup"));
        let made = finished(command.args(["--find", "--show", &file]).output().unwrap());
        made.succeeds();
        Self {
            path: made.out.trim().to_owned(),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let mut command = Command::new(installed("losetup"));
        let _ = command.args(["--detach", &self.path]).output();
    }
}

#[test]
fn a_program_lives_on_a_block_device() {
    if !may_run("a_program_lives_on_a_block_device") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let device = Loop::new(&place, "disk", 7);
    let begin = |name: &'static str, more: &[&'static str]| {
        let start = [
            "run",
            "--name",
            name,
            "--every",
            "50ms",
            "--medium",
            &device.path,
        ];
        let crowd = test_program("crowd");
        let program = ["--", &crowd, "--memory", "8"];
        let words: Vec<String> = [&start[..], more, &program]
            .concat()
            .iter()
            .map(|w| (*w).to_owned())
            .collect();
        words
    };
    let call = |words: &[String]| place.call(&words.iter().map(String::as_str).collect::<Vec<_>>());
    // Not without being asked, and only a device.
    call(&begin("a", &[])).fails(3, &["holds something else", "--format"]);
    assert!(
        fs::read(place.path("disk"))
            .unwrap()
            .iter()
            .all(|byte| *byte == 7)
    );
    let here = place.text(".");
    place
        .call(&["run", "--name", "a", "--medium", &here, "--", "true"])
        .fails(2, &["neither a block device nor a file"]);

    let words = begin("a", &["--format"]);
    let mut kept = place.start(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(kept.line().starts_with("ready"));
    place.epoch_after("a", place.epoch_after("a", 0));
    // Whoever else wants it is told who has it.
    let other = call(&begin("b", &["--format"]));
    assert!(other.code != 0 && other.err.contains("in use"), "{other:?}");
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);

    let epoch = place.newest("a");
    place.call(&["verify", "a"]).succeeds();
    let mut kept = place.start(&["restore", "a"]);
    place.epoch_after("a", epoch);
    let program = family(kept.pid())[1];
    assert!(lives(program));
    place.call(&["stop", "a"]).succeeds();
    kept.code();
    call(&begin("b", &[])).fails(3, &["holds epochs of a program"]);
    place.call(&["forget", "a"]).succeeds();

    // The volume is there still, and empty.
    let words = begin("b", &[]);
    let mut kept = place.start(&words.iter().map(String::as_str).collect::<Vec<_>>());
    place.epoch_after("b", 0);
    place.call(&["stop", "b"]).succeeds();
    kept.code();
    until("the keeper lets it go", || {
        place.call(&["verify", "b"]).code == 0
    });
}

/// As on persistent memory; where the kernel gives no such mapping, `msync(2)` is what makes it durable.
#[test]
fn a_program_lives_in_a_mapped_file() {
    if !may_run("a_program_lives_in_a_mapped_file") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let file = place.text("memory");
    fs::write(&file, vec![0; 48 << 20]).unwrap();
    let start = ["run", "--name", "a", "--every", "50ms", "--medium", &file];
    let crowd = test_program("crowd");
    let mut kept = place.start(&[&start[..], &["--", &crowd, "--memory", "8"]].concat());
    assert!(kept.line().starts_with("ready"));
    place.epoch_after("a", place.epoch_after("a", 0));
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);
    let epoch = place.newest("a");
    place.call(&["verify", "a"]).succeeds();
    let mut kept = place.start(&["restore", "a"]);
    place.epoch_after("a", epoch);
    assert!(lives(family(kept.pid())[1]));
    place.call(&["stop", "a"]).succeeds();
    kept.code();
    place.call(&["forget", "a"]).succeeds();
}
