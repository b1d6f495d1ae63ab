//! What an image holds, as other tools read it.

use crate::support::{Place, alone, finished, may_run};
use std::fs;
use std::process::Command;

#[test]
fn all_trees_of_an_epoch_are_one_source_for_dtc() {
    if !may_run("all_trees_of_an_epoch_are_one_source_for_dtc") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    place.image_of_sleep("image");
    let shown = place.call(&["inspect", "./image", "--dts"]);
    shown.succeeds();
    assert_eq!(shown.out.matches("/dts-v1/;").count(), 1);
    assert_eq!(shown.out.matches("\n/ {").count(), 1);
    let checked = place.call(&["inspect", "./image", "--check"]);
    checked.succeeds();
    fs::write(place.path("all.dts"), &shown.out).unwrap();
    let mut dtc = Command::new("dtc");
    dtc.args(["-q", "-I", "dts", "-O", "dtb", "-o", "all.dtb", "all.dts"]);
    match dtc.current_dir(place.dir.path()).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: dtc is not installed");
        }
        other => {
            finished(other.unwrap()).succeeds();
            assert!(place.path("all.dtb").exists());
        }
    }
}

#[test]
fn a_subject_is_copied_into_an_image_running_or_not() {
    if !may_run("a_subject_is_copied_into_an_image_running_or_not") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let mut kept = place.start(&["run", "--name", "a", "--", "sleep", "1000"]);
    place.epoch_after("a", 1);
    let running = [
        "checkpoint",
        "a",
        "--image",
        "one",
        "--leave-running",
        "--json",
    ];
    let done = place.call(&running);
    done.succeeds();
    assert_eq!(done.json()["epoch"], 1, "an image of its own begins anew");
    let pid = u32::try_from(done.json()["pid"].as_u64().unwrap()).unwrap();
    assert_eq!(place.status("a")["pid"], pid, "it runs on");
    let newest = place.newest("a");
    place
        .call(&["checkpoint", "a", "--image", "two"])
        .succeeds();
    assert_eq!(kept.code(), 0, "without --leave-running it is ended");
    assert!(place.newest("a") > newest);
    place
        .call(&["checkpoint", "a", "--image", "three"])
        .succeeds();
    place
        .call(&["checkpoint", "a", "--image", "three"])
        .fails(3, &["three is not empty"]);
    for image in ["one", "two", "three"] {
        place.call(&["verify", &format!("./{image}")]).succeeds();
        let restore = ["restore", "--image", image, "--detach", "--json"];
        let done = place.call(&restore);
        done.succeeds();
        assert_eq!(done.json()["pid"], pid);
        assert_eq!(crate::support::comm(pid), "sleep");
        crate::support::end(pid);
    }
    place
        .call(&["checkpoint", "nobody", "--image", "four"])
        .fails(1, &["nobody"]);
    assert!(!place.path("four").exists());
}
