//! Images that are damaged, cut short, newer, or no images: each is refused with its place, or
//! restored because nothing was lost, and nothing half-restored stays.

use crate::support::{Place, alone, comm, end, is_free, may_run};
use std::fs;
use std::path::{Path, PathBuf};

/// The one file of an image, with its bytes.
fn file_of(image: &Path) -> (PathBuf, Vec<u8>) {
    let mut entries = fs::read_dir(image).unwrap();
    let path = entries.next().unwrap().unwrap().path();
    assert!(entries.next().is_none());
    let bytes = fs::read(&path).unwrap();
    (path, bytes)
}

/// Restores; `true` where the program runs again, which it then does no longer.
fn comes_back(place: &Place, pid: u32, told: &str) -> bool {
    let done = place.call(&["restore", "--image", "image", "--detach"]);
    if done.code == 0 {
        assert_eq!(comm(pid), "sleep", "{told}");
        end(pid);
        return true;
    }
    done.fails(4, &["damaged"]);
    assert!(done.err.contains("image/epochs."), "{told}: {done:?}");
    assert!(is_free(pid), "{told}: {done:?}");
    false
}

/// Where the log begins: behind both parts of the header.
const LOG: usize = 24 * 4096;

#[test]
fn a_run_of_damage_costs_nothing_and_can_be_repaired() {
    if !may_run("a_run_of_damage_costs_nothing_and_can_be_repaired") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let (path, good) = file_of(&place.path("image"));
    // All of the header but its second part, and then all over the log.
    let places = (LOG..good.len()).step_by(good.len() / 5);
    for (i, at) in [0].into_iter().chain(places).enumerate() {
        let mut bad = good.clone();
        let to = good.len().min(at + (64 << 10));
        bad[at..to].fill(0x5a);
        fs::write(&path, &bad).unwrap();
        let verified = place.call(&["verify", "./image"]);
        verified.succeeds();
        assert!(verified.err.contains("it can be repaired"), "{verified:?}");
        if i % 2 == 0 {
            assert!(comes_back(&place, pid, &format!("damage at {at}")));
        } else {
            let repaired = place.call(&["repair", "./image"]);
            repaired.succeeds();
            assert!(repaired.err.contains("; repaired"), "{repaired:?}");
            let verified = place.call(&["verify", "./image"]);
            assert!(verified.out.contains("no damage"), "{verified:?}");
        }
    }
    fs::write(&path, &good).unwrap();
    assert!(comes_back(&place, pid, "the good image"));
    assert_eq!(place.names("image").len(), 1, "nothing was added");
}

#[test]
fn what_is_lost_is_named_with_its_place() {
    if !may_run("what_is_lost_is_named_with_its_place") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let (path, good) = file_of(&place.path("image"));
    let mut bad = good.clone();
    bad[LOG..].fill(0x5a);
    fs::write(&path, &bad).unwrap();
    assert!(!comes_back(&place, pid, "all of the log"));
    for command in ["verify", "repair"] {
        let done = place.call(&[command, "./image"]);
        done.fails(4, &["epochs.", "offset", "; lost"]);
    }
    // Pages with others of their classes, but neither trees nor tables: it is told whose they were.
    let mut bad = good.clone();
    bad[LOG..][..20 * 4096].fill(0x5a);
    fs::write(&path, &bad).unwrap();
    let whose = format!("(it is of process {pid} (sleep) at 0x");
    let done = place.call(&["verify", "./image"]);
    done.fails(4, &[&whose, "; lost"]);
    let done = place.call(&["verify", "./image", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&done.out).unwrap();
    let of = &found["damages"][0]["processes"][0];
    assert_eq!((&of["pid"], &of["program"]), (&pid.into(), &"sleep".into()));
    assert!(of["address"].as_u64().is_some_and(|at| at > 0), "{of}");
    // A warning tells whoever restores it of what was made up for.
    let mut bad = good;
    bad[LOG..][..4096].fill(0);
    fs::write(&path, &bad).unwrap();
    let done = place.call(&["restore", "--image", "image", "--detach"]);
    done.succeeds();
    assert!(done.err.contains("outlive repair"), "{done:?}");
    end(pid);
}

#[test]
fn an_image_cut_short_is_damaged() {
    if !may_run("an_image_cut_short_is_damaged") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let (path, good) = file_of(&place.path("image"));
    for len in [0, 1, 4096, LOG, good.len() / 2, good.len() - 4096] {
        fs::write(&path, &good[..len]).unwrap();
        let done = place.call(&["restore", "--image", "image", "--detach"]);
        if done.code == 0 {
            assert!(len > good.len() / 2, "cut to {len}, and it runs");
            end(pid);
            continue;
        }
        done.fails(4, &["image/epochs."]);
        assert!(is_free(pid));
    }
}

/// The checksum of the format's records.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

#[test]
fn no_images_at_all_are_told_as_that() {
    if !may_run("no_images_at_all_are_told_as_that") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let restore = |image: &str| place.call(&["restore", "--image", image, "--detach"]);
    restore("missing").fails(1, &["missing"]);
    fs::create_dir(place.path("empty")).unwrap();
    restore("empty").fails(1, &["empty", "no committed epoch"]);
    fs::create_dir(place.path("other")).unwrap();
    fs::write(place.path("other/notes.txt"), "hello").unwrap();
    restore("other").fails(1, &["other"]);
    assert_eq!(place.names("other"), ["notes.txt"]);
    fs::create_dir(place.path("rubbish")).unwrap();
    fs::write(place.path("rubbish/epochs.1"), vec![0x5a; 100_000]).unwrap();
    restore("rubbish").fails(4, &["rubbish/epochs.1"]);
    fs::write(place.path("file"), "x").unwrap();
    let done = restore("file");
    assert!(done.code != 0 && done.err.contains("file"), "{done:?}");
    let done = place.call(&["restore", "nobody"]);
    done.fails(1, &["nobody"]);
    let done = place.call(&["restore", "nobody", "--detach"]);
    done.fails(1, &["nobody"]);
    assert!(!place.path("store/nobody").exists());
}

#[test]
fn an_image_of_a_newer_version_says_which() {
    if !may_run("an_image_of_a_newer_version_says_which") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let (path, mut bytes) = file_of(&place.path("image"));
    // Two superblocks: the version stands at 8, the checksum (of the magic, the offset and the
    // block) in the last four bytes.
    for at in [0usize, 20 * 4096] {
        bytes[at + 8..at + 12].copy_from_slice(&77u32.to_le_bytes());
        let mut sealed = b"OUTLIVES".to_vec();
        sealed.extend((at as u64).to_le_bytes());
        sealed.extend(&bytes[at..at + 4092]);
        let crc = crc32c(&sealed).to_le_bytes();
        bytes[at + 4092..at + 4096].copy_from_slice(&crc);
    }
    fs::write(&path, &bytes).unwrap();
    let done = place.call(&["restore", "--image", "image", "--detach"]);
    done.fails(3, &["version 77", "newer outlive"]);
    assert!(is_free(pid));
}

#[test]
fn an_image_runs_once_at_a_time() {
    if !may_run("an_image_runs_once_at_a_time") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let restore = ["restore", "--image", "image", "--detach"];
    place.call(&restore).succeeds();
    let done = place.call(&restore);
    done.fails(3, &[&pid.to_string(), "sleep"]);
    assert_eq!(comm(pid), "sleep", "the first one runs on");
    end(pid);
    place.call(&restore).succeeds();
    end(pid);
    let done = place.call(&["restore", "--image", "image", "--epoch", "7", "--detach"]);
    done.fails(1, &["no epoch 7"]);
}
