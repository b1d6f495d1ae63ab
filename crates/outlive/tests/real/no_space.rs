//! A medium that is full: the program runs on, the epochs before it count, and it goes on when
//! there is space again.

use crate::support::{Place, alone, end, finished, installed, lives, may_run, test_program, until};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A small file system, unmounted when it is dropped.
pub struct Small {
    at: String,
}

impl Small {
    pub fn mount(place: &Place, name: &str, size: &str) -> Self {
        let at = place.text(name);
        fs::create_dir(&at).unwrap();
        let mut mount = Command::new(installed("mount"));
        let options = format!("size={size},mode=700");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs", &at]);
        finished(mount.output().unwrap()).succeeds();
        Self { at }
    }

    /// The same on a disk: a file with an ext4 on it.
    fn disk(place: &Place, name: &str, size: &str) -> Self {
        let (at, file) = (place.text(name), place.text(&format!("{name}.disk")));
        fs::create_dir(&at).unwrap();
        for words in [
            &["truncate", "-s", size, &file][..],
            &["mkfs.ext4", "-q", &file],
            &["mount", "-o", "loop", &file, &at],
            &["chmod", "700", &at],
        ] {
            let mut command = Command::new(installed(words[0]));
            finished(command.args(&words[1..]).output().unwrap()).succeeds();
        }
        Self { at }
    }

    /// Takes all the space that is left.
    fn fill(&self) -> String {
        let ballast = format!("{}/ballast", self.at);
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&ballast)
            .unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        ballast
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let mut umount = Command::new(installed("umount"));
        let _ = umount.args(["-l", &self.at]).output();
    }
}

#[test]
fn an_image_that_does_not_fit_leaves_nothing_and_the_program_runs_on() {
    if !may_run("an_image_that_does_not_fit_leaves_nothing_and_the_program_runs_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let small = Small::mount(&place, "small", "1m");
    let ballast = small.fill();
    let counter = place.program(&test_program("counter"), &["numbers"]);
    let pid = counter.pid();
    let numbers = || fs::metadata(place.path("numbers")).map_or(0, |m| m.len());
    until("it counts", || numbers() > 100);
    let words = [
        "checkpoint",
        "--pid",
        &pid.to_string(),
        "--image",
        "small/image",
    ];
    let done = place.call(&words);
    done.fails(1, &["small", "space"]);
    assert!(!place.path("small/image").exists());
    let before = numbers();
    until("it counts on", || numbers() > before);
    fs::remove_file(&ballast).unwrap();
    assert!(lives(pid));
    place.call(&words).succeeds();
    drop(counter);
    let done = place.call(&["restore", "--image", "small/image", "--detach"]);
    done.succeeds();
    let before = numbers();
    until("it counts again", || numbers() > before);
    end(pid);
}

#[test]
fn a_full_store_costs_epochs_and_nothing_else() {
    if !may_run("a_full_store_costs_epochs_and_nothing_else") {
        return;
    }
    let _alone = alone();
    let place = Place::new();
    costs_epochs_and_nothing_else(&place, &Small::mount(&place, "store", "64m"));
    let place = Place::new();
    costs_epochs_and_nothing_else(&place, &Small::disk(&place, "store", "64M"));
}

fn costs_epochs_and_nothing_else(place: &Place, small: &Small) {
    let counter = test_program("counter");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", &counter, "numbers",
    ];
    let mut kept = place.start(&words);
    let pid_of = |place: &Place| u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    let first = place.epoch_after("a", 3);
    let pid = pid_of(place);
    assert_eq!(place.status("a")["state"], "running");
    let ballast = small.fill();
    let failures = || place.status("a")["failures"].as_u64().unwrap();
    until("epochs fail", || failures() >= 2);
    assert_eq!(place.status("a")["state"], "medium full");
    let told = place.status("a")["last_failure"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        told.contains("space") || told.contains("No space"),
        "{told}"
    );
    let said = place.said();
    assert!(
        said.contains("a: no epoch: ") && said.contains("space"),
        "{said}"
    );
    let numbers = || fs::metadata(place.path("numbers")).unwrap().len();
    let before = numbers();
    until("it counts on", || numbers() > before);
    let held = place.newest("a");
    assert!(held >= first, "what was committed is there");
    fs::remove_file(&ballast).unwrap();
    let newer = place.epoch_after("a", held);
    assert!(newer > held, "with space there are epochs again");
    until("it says so", || place.status("a")["state"] == "running");
    crate::support::signal(pid, rustix::process::Signal::KILL);
    assert_eq!(kept.code(), 137);
    place.call(&["restore", "a", "--detach"]).succeeds();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let before = numbers();
    until("it counts again", || numbers() > before);
    place.call(&["stop", "a"]).succeeds();
}

#[test]
fn what_a_full_store_holds_is_restored_while_it_is_full() {
    if !may_run("what_a_full_store_holds_is_restored_while_it_is_full") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let small = Small::mount(&place, "store", "64m");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", "sleep", "1000",
    ];
    let mut kept = place.start(&words);
    place.epoch_after("a", 3);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    small.fill();
    crate::support::signal(pid, rustix::process::Signal::KILL);
    assert_eq!(kept.code(), 137);
    place.call(&["restore", "a", "--detach"]).succeeds();
    assert!(lives(pid));
    end(pid);
}
