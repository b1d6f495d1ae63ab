//! Files without a name, mapped and open at once: what is written through one is seen through all
//! others.
//!
//! # Safety
//! Mappings are made by this file and never unmapped; every access stays within the first
//! [`LENGTH`] bytes, which the file below has, and obeys the protection.
#![allow(unsafe_code)]

use crate::{Check, check};
use outlive_test_programs::{fail, good, mix};
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

const PAGE: usize = 4096;
/// Bytes of each file: more than were ever saved with a descriptor.
const LENGTH: usize = 3 << 20;
/// Looked at so many bytes apart.
const STEP: usize = 100 * PAGE;

/// All of them.
pub(crate) fn all(dir: &Path) -> Vec<Check> {
    let in_memory = Path::new("/dev/shm");
    vec![
        both_ways("mapped memfd", memfd(c"zoo", 0)),
        both_ways("deleted file", deleted(dir)),
        both_ways("shm_unlink", deleted(in_memory)),
        mapping_alone(),
        sealed(),
        over_it(),
        copy_of_deleted(dir),
    ]
}

fn memfd(name: &CStr, flags: u32) -> File {
    // SAFETY: a literal and a number are passed; the descriptor is ours.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), flags);
        File::from_raw_fd(good("memfd_create", fd.into()) as i32)
    };
    fill(&file);
    file
}

fn deleted(dir: &Path) -> File {
    let path = dir.join(format!("zoo-{}", std::process::id()));
    let made = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    let Ok(file) = made else { fail("no file") };
    fill(&file);
    if std::fs::remove_file(&path).is_err() {
        fail("a file cannot be deleted");
    }
    file
}

fn fill(file: &File) {
    let text: Vec<u8> = (0..LENGTH as u64 / 8)
        .flat_map(|i| mix(i).to_ne_bytes())
        .collect();
    if file.write_all_at(&text, 0).is_err() {
        fail("a file cannot be filled");
    }
}

fn map(file: &File, protection: i32, flags: i32) -> *mut u64 {
    // SAFETY: a fresh mapping of a file of this length.
    let at = unsafe {
        let fd = file.as_raw_fd();
        libc::mmap(std::ptr::null_mut(), LENGTH, protection, flags, fd, 0)
    };
    let _ = good("mmap of a file", at as i64);
    at.cast()
}

fn through_mapping(at: *mut u64, offset: usize) -> u64 {
    // SAFETY: the offset is below LENGTH, and a multiple of 8.
    unsafe { at.add(offset / 8).read_volatile() }
}

fn through_descriptor(file: &File, offset: usize) -> u64 {
    let mut word = [0; 8];
    if file.read_exact_at(&mut word, offset as u64).is_err() {
        fail("a file cannot be read");
    }
    u64::from_ne_bytes(word)
}

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Written in turns through a mapping and through a descriptor; a second mapping is for reading.
fn both_ways(name: &'static str, file: File) -> Check {
    let at = map(&file, RW, libc::MAP_SHARED) as usize;
    let second = map(&file, libc::PROT_READ, libc::MAP_SHARED) as usize;
    let mut expected: Vec<u64> = (0..LENGTH / STEP)
        .map(|i| mix((i * STEP / 8) as u64))
        .collect();
    check(name, move |round| {
        for (i, &word) in expected.iter().enumerate() {
            let seen = [
                through_mapping(at as *mut u64, i * STEP),
                through_mapping(second as *mut u64, i * STEP),
                through_descriptor(&file, i * STEP),
            ];
            if seen != [word; 3] {
                fail(&format!("{name}: {seen:x?} instead of {word:x} at {i}"));
            }
        }
        let i = round as usize % expected.len();
        expected[i] = mix(round);
        if round % 2 == 0 {
            // SAFETY: within the mapping, which can be written.
            unsafe {
                (at as *mut u64)
                    .add(i * STEP / 8)
                    .write_volatile(mix(round))
            };
        } else if file
            .write_all_at(&mix(round).to_ne_bytes(), (i * STEP) as u64)
            .is_err()
        {
            fail("a file cannot be written");
        }
    })
}

/// Of one memory file nothing is left but two mappings.
fn mapping_alone() -> Check {
    let file = memfd(c"", libc::MFD_CLOEXEC);
    let (one, two) = (
        map(&file, RW, libc::MAP_SHARED) as usize,
        map(&file, RW, libc::MAP_SHARED) as usize,
    );
    drop(file);
    check("two mappings of a memfd", move |round| {
        let (last, other) = if round % 2 == 0 {
            (one, two)
        } else {
            (two, one)
        };
        if round > 0 && through_mapping(last as *mut u64, 5 * STEP) != round {
            fail("two mappings of a memfd are two");
        }
        // SAFETY: within the mapping, which can be written.
        unsafe {
            (other as *mut u64)
                .add(5 * STEP / 8)
                .write_volatile(round + 1)
        };
    })
}

/// Mapped for reading, and sealed against writing and growing.
fn sealed() -> Check {
    let file = memfd(c"sealed", libc::MFD_ALLOW_SEALING);
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: only numbers are passed.
    let _ = good("sealing", unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals).into()
    });
    let at = map(&file, libc::PROT_READ, libc::MAP_SHARED) as usize;
    check("sealed memfd", move |_| {
        // SAFETY: only numbers are passed.
        let now = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if now != seals || file.write_at(b"x", 0).is_ok() {
            fail("a seal is broken");
        }
        if through_mapping(at as *mut u64, 7 * STEP) != mix((7 * STEP / 8) as u64) {
            fail("a sealed file changed");
        }
    })
}

/// Private pages over a memory file.
fn over_it() -> Check {
    let file = memfd(c"below", libc::MFD_CLOEXEC);
    let at = map(&file, RW, libc::MAP_PRIVATE) as usize;
    check("private mapping of a memfd", move |round| {
        if round > 0 && through_mapping(at as *mut u64, STEP) != round {
            fail("a page of our own over a memfd changed");
        }
        // SAFETY: within the mapping, which can be written.
        unsafe { (at as *mut u64).add(STEP / 8).write_volatile(round + 1) };
        if through_descriptor(&file, STEP) != mix((STEP / 8) as u64)
            || through_mapping(at as *mut u64, 3 * STEP) != mix((3 * STEP / 8) as u64)
        {
            fail("a memfd below a private mapping changed");
        }
    })
}

/// A deleted file that is mapped private only, as a library which was replaced.
fn copy_of_deleted(dir: &Path) -> Check {
    let at = map(&deleted(dir), libc::PROT_READ, libc::MAP_PRIVATE) as usize;
    check("mapping of a deleted file", move |_| {
        if through_mapping(at as *mut u64, 2 * STEP) != mix((2 * STEP / 8) as u64) {
            fail("a deleted file changed");
        }
    })
}
