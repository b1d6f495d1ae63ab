//! Guarantee 8: an image of somebody else is not restored.

use crate::support::{Place, alone, comm, end, is_free, may_run};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

#[test]
fn only_ones_own_images_are_restored() {
    if !may_run("only_ones_own_images_are_restored") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let image = place.path("image");
    let restore = || place.call(&["restore", "--image", "image", "--detach"]);
    let file = fs::read_dir(&image)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    for theirs in [&image, &file] {
        chown(theirs, Some(65534), None).unwrap();
        restore().fails(3, &["uid 65534", "uid 0", "chown -R 0 image"]);
        assert!(is_free(pid));
        chown(theirs, Some(0), None).unwrap();
    }
    fs::set_permissions(&image, fs::Permissions::from_mode(0o777)).unwrap();
    restore().fails(3, &["written by others", "chmod go-w image"]);
    // That others may read is its owner's business.
    fs::set_permissions(&image, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    restore().succeeds();
    assert_eq!(comm(pid), "sleep");
    end(pid);
}

#[test]
fn a_subject_of_somebody_else_is_not_restored() {
    if !may_run("a_subject_of_somebody_else_is_not_restored") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let mut kept = place.start(&["run", "--name", "a", "--", "sleep", "1000"]);
    place.epoch_after("a", 0);
    let pid = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    place.call(&["stop", "a"]).succeeds();
    assert_eq!(kept.code(), 0);
    for part in ["store/a", "store/a/epochs"] {
        chown(place.path(part), Some(65534), None).unwrap();
        let done = place.call(&["restore", "a", "--detach"]);
        done.fails(3, &["uid 65534", part]);
        assert!(is_free(pid));
        chown(place.path(part), Some(0), None).unwrap();
    }
    place.call(&["restore", "a", "--detach"]).succeeds();
    assert_eq!(comm(pid), "sleep");
    place.call(&["stop", "a"]).succeeds();
}
