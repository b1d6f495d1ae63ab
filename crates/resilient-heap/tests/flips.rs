//! Flipped bits and trashed lines, all over a small heap: corrected or reported, never silent.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

mod common;

use common::{STEPS, contents, expected, open, options, step, volatile};
use resilient_heap::memory::Memory;
use resilient_heap::memory::Volatile;
use resilient_heap::{Error, examine};

/// The bytes of a heap after all steps, closed or as a crash leaves it.
fn bytes(closed: bool) -> Vec<u8> {
    let memory = std::sync::Arc::new(Volatile::new(1 << 20).unwrap());
    let shared = Shared(std::sync::Arc::clone(&memory));
    let mut heap = open(options(), shared).unwrap();
    for n in 0..STEPS {
        step(&mut heap, n).unwrap();
    }
    let copy = || {
        // SAFETY: the memory is readable as long as it is, and nobody writes now.
        #[allow(unsafe_code)]
        unsafe { std::slice::from_raw_parts(memory.base().as_ptr(), memory.len()) }.to_vec()
    };
    if closed {
        heap.close().unwrap();
        return copy();
    }
    let bytes = copy();
    drop(heap);
    bytes
}

struct Shared(std::sync::Arc<Volatile>);

// SAFETY: all is left to `Volatile`.
#[allow(unsafe_code)]
unsafe impl Memory for Shared {
    fn base(&self) -> std::ptr::NonNull<u8> {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn grow(&self, len: usize) -> Result<(), Error> {
        self.0.grow(len)
    }
    fn flush(&self, _: usize, _: usize) {}
    fn fence(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Opens damaged bytes: the contents must be right, or an error must say that they are not. Returns
/// whether they were right and whether the damage was noticed.
fn look(damaged: &[u8], right: &str) -> (bool, bool) {
    let heap = match open(options(), volatile(damaged)) {
        Ok(heap) => heap,
        Err(_) => return (false, true),
    };
    assert!(!heap.opened().created, "a damaged heap was made anew");
    match contents(&heap) {
        Ok(found) => assert_eq!(found, right, "silently wrong"),
        Err(Error::Lost { .. }) => return (false, true),
        Err(other) => panic!("{other}"),
    }
    let mut heap = heap;
    let opened = heap.opened();
    let noticed = heap.health().corrected > 0 || opened.discarded;
    let scrubbed = heap.scrub().unwrap();
    assert_eq!(scrubbed.lost, []);
    (true, noticed || !scrubbed.corrected.is_empty())
}

/// Every bit of superblocks, schema, heads of the log and data; of what is empty or alike (words, parity,
/// entries of the log), one in many.
#[test]
fn every_flipped_bit_is_corrected() {
    let states = expected();
    let right = &states[STEPS as usize].0;
    for closed in [true, false] {
        let good = bytes(closed);
        let mut flips = 0;
        let mut unnoticed = Vec::new();
        for at in 0..good.len() {
            let zeros = good[at / 64 * 64..][..64].iter().all(|b| *b == 0);
            if zeros && !(at + at / 64).is_multiple_of(1021) {
                continue;
            }
            // The log is read when it holds something; each of its lines is covered alike.
            let bits = if at > 6 * 4096 && zeros { 1 } else { 8 };
            for bit in 0..bits {
                // Words and parity of empty space: all alike.
                let common = ["words", "parity", "entries of the log"].contains(&common::class(at));
                if common && (at * 8 + bit) % 61 != 0 {
                    continue;
                }
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let (fine, noticed) = look(&bad, right);
                assert!(fine, "the flip of bit {bit} of byte {at} was not corrected");
                flips += 1;
                if !noticed {
                    unnoticed.push(common::class(at));
                }
            }
        }
        // Nobody reads what the log held before. What it holds of commits that are not at home is written
        // over what flipped there.
        unnoticed.sort_unstable();
        unnoticed.dedup();
        let unread = [
            "entries of the log",
            "schema",
            "superblock A",
            "superblock B",
        ];
        assert!(
            !closed || unnoticed.iter().all(|class| unread.contains(class)),
            "{unnoticed:?}"
        );
        println!("{flips} flips");
        assert!(flips > 5000);
    }
}

#[test]
fn every_trashed_line_is_repaired_or_lost_and_two_flips_are_corrected() {
    let states = expected();
    let right = &states[STEPS as usize].0;
    let good = bytes(true);
    let (mut fine, mut lost) = (0, 0);
    for at in (0..good.len()).step_by(64) {
        let zeros = good[at..][..64].iter().all(|b| *b == 0);
        if zeros && !(at / 64).is_multiple_of(37) {
            continue;
        }
        let mut bad = good.clone();
        bad[at..at + 64].copy_from_slice(&std::array::from_fn::<u8, 64, _>(|i| {
            (i * 89 + at / 64) as u8
        }));
        if look(&bad, right).0 {
            fine += 1;
        } else {
            lost += 1;
        }
        let mut bad = good.clone();
        bad[at + 1] ^= 4;
        bad[at + 57] ^= 64;
        assert!(look(&bad, right).0, "two flips in the line at {at}");
    }
    // A small zone has too few columns for its line of words; all else comes back.
    println!("{fine} trashed lines repaired, {lost} reported");
    assert!(fine > 200 && lost <= 2, "{fine} {lost}");
}

/// Whatever line of the log is lost after a crash: all is right, or it is said that something is not.
#[test]
fn a_lost_line_of_the_log_is_never_silent() {
    let states = expected();
    for steps in 1..=STEPS {
        let good = bytes_after(steps);
        let right = &states[steps as usize].0;
        let (mut fine, mut said) = (0, 0);
        for at in (6 * 4096..(6 + 2 * common::LOG) * 4096).step_by(64) {
            if good[at..at + 64].iter().all(|b| *b == 0) {
                continue;
            }
            let mut bad = good.clone();
            bad[at..at + 64].fill(0x5a);
            let heap = match open(options(), volatile(&bad)) {
                Ok(heap) if !heap.opened().discarded => heap,
                _ => {
                    said += 1;
                    continue;
                }
            };
            assert_eq!(contents(&heap).as_ref(), Ok(right), "line {at}, silently");
            fine += 1;
        }
        println!("{steps} steps: {fine} lines that nobody needs, {said} reported");
        assert!(said > 0, "after {steps} steps");
    }
}

/// A commit takes what a line was from the writer's working copy. What flipped at home meanwhile, in the line,
/// its word or its parity, is written over or can be corrected afterwards; it never gets into what is right.
#[test]
fn flips_under_an_open_heap_are_written_over_or_corrected() {
    let states = expected();
    let mut flips = 0;
    for (before, seed) in [(3, 5), (6, 0), (8, 3)] {
        let good = bytes_after(before);
        for at in (0..good.len()).step_by(64) {
            let zeros = good[at..][..64].iter().all(|b| *b == 0);
            if at < 6 * 4096 || (zeros && !(at / 64).is_multiple_of(53)) {
                continue;
            }
            let memory = std::sync::Arc::new(Volatile::new(1 << 20).unwrap());
            let mut heap = open(options(), Shared(std::sync::Arc::clone(&memory))).unwrap();
            for n in 0..before {
                step(&mut heap, n).unwrap();
            }
            let place = at + (at / 64 + seed) % 64;
            // SAFETY: in bounds, and nobody refers to it now.
            #[allow(unsafe_code)]
            unsafe {
                let byte = *memory.base().as_ptr().add(place);
                memory.store(place, &[byte ^ 1 << (place % 8)]);
            }
            for n in before..STEPS {
                step(&mut heap, n).unwrap();
            }
            assert_eq!(
                contents(&heap).unwrap(),
                states[STEPS as usize].0,
                "{place}"
            );
            assert_eq!(heap.scrub().unwrap().lost, [], "{place}");
            assert_eq!(heap.scrub().unwrap().corrected, [], "{place}");
            assert_eq!(
                contents(&heap).unwrap(),
                states[STEPS as usize].0,
                "{place}"
            );
            flips += 1;
        }
    }
    println!("{flips} flips");
    assert!(flips > 300, "{flips}");
}

/// The bytes while a heap is open, after so many steps.
fn bytes_after(steps: u64) -> Vec<u8> {
    let memory = std::sync::Arc::new(Volatile::new(1 << 20).unwrap());
    let mut heap = open(options(), Shared(std::sync::Arc::clone(&memory))).unwrap();
    for n in 0..steps {
        step(&mut heap, n).unwrap();
    }
    // SAFETY: the memory is readable as long as it is, and nobody writes now.
    #[allow(unsafe_code)]
    unsafe { std::slice::from_raw_parts(memory.base().as_ptr(), memory.len()) }.to_vec()
}

#[test]
fn a_line_beyond_repair_is_named_and_nothing_else_is_lost() {
    let good = bytes(true);
    let zone = (6 + 2 * common::LOG) * 4096;
    let mut bad = good.clone();
    // Two lines of one column: nothing can bring them back.
    for page in [3, 7] {
        bad[zone + page * 4096..][..64].fill(0x5a);
    }
    let report = examine(volatile(&bad)).unwrap();
    assert_eq!(report.scrubbed.lost, [zone + 3 * 4096, zone + 7 * 4096]);
    assert!(report.scrubbed.corrected.is_empty());
    assert!(
        report
            .schema
            .starts_with("root Root 88\nstruct Root 88: steps@0 u64")
    );
    let report = examine(volatile(&good)).unwrap();
    assert_eq!((report.scrubbed.lost, report.unfinished), (vec![], false));
    assert_eq!(report.zones, 3);
    assert!(examine(volatile(&bytes(false))).unwrap().unfinished);
}
