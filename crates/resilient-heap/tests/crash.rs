//! Crashes at every fence of making a heap, of commits, of growth and of recovery, in every state that
//! caches may leave; and bugs planted in each flush and each fence, each of which must be noticed.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

mod common;

use common::{STEPS, SimMemory, contents, expected, occupied, open, options, step, volatile};
use outlive_media::{Crashes, LineMemory};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// What is wrong with a heap found after a crash, if anything: `acknowledged` steps must be there, and one
/// more may be.
fn judge(bytes: &[u8], acknowledged: Option<u64>, states: &[(String, usize)]) -> Option<String> {
    let mut heap = match open(options(), volatile(bytes)) {
        Ok(heap) => heap,
        Err(error) => return Some(format!("cannot be opened: {error}")),
    };
    let (created, first) = (heap.opened().created, acknowledged.unwrap_or(0) as usize);
    if created && acknowledged.is_some() {
        return Some("the heap vanished".to_owned());
    }
    let found = match contents(&heap) {
        Ok(found) => found,
        Err(error) => return Some(format!("cannot be read: {error}")),
    };
    let next = (first + 1).min(states.len() - 1);
    let last = if acknowledged.is_none() { 0 } else { next };
    let Some((_, bytes)) = states[first..=last].iter().find(|(text, _)| *text == found) else {
        return Some(format!("after {first} steps there is: {found}"));
    };
    if occupied(&heap) != *bytes {
        return Some(format!("{} bytes leaked", occupied(&heap).abs_diff(*bytes)));
    }
    match heap.scrub() {
        Ok(found) if found.corrected.is_empty() && found.lost.is_empty() => None,
        other => Some(format!("the scrub says: {other:?}")),
    }
}

/// How thoroughly: in the long run, all subsets of up to 16 pieces.
fn how(seed: u64) -> Crashes {
    let long = std::env::var_os("OUTLIVE_LONG").is_some();
    Crashes {
        all: if long { 16 } else { 7 },
        pairs: if long { 1000 } else { 30 },
        seeded: if long { 1000 } else { 140 },
        seed,
    }
}

/// What a run with crashes found.
struct Found {
    crashes: u64,
    fences: u64,
    wrong: Option<String>,
}

/// Runs all steps and looks at every crash, until the first that leaves something wrong.
fn run(
    without_flush: Option<&'static str>,
    without_fence: Option<u64>,
    states: &Arc<Vec<(String, usize)>>,
) -> Found {
    let acknowledged = Arc::new(Mutex::new(None));
    let wrong = Arc::new(Mutex::new(None));
    let crashes = Arc::new(AtomicU64::new(0));
    let look = {
        let (states, wrong) = (Arc::clone(states), Arc::clone(&wrong));
        let (acknowledged, crashes) = (Arc::clone(&acknowledged), Arc::clone(&crashes));
        move |memory: &LineMemory| {
            let done: Option<u64> = *acknowledged.lock().unwrap();
            let mut wrong = wrong.lock().unwrap();
            if wrong.is_some() {
                return;
            }
            let shown = memory.crash_states(how(done.unwrap_or(99)), &mut |bytes| {
                *wrong = judge(&bytes, done, &states);
                wrong.is_none()
            });
            crashes.fetch_add(shown as u64, Ordering::Relaxed);
        }
    };
    let memory = SimMemory::new(&[], without_flush, without_fence, Some(Box::new(look)));
    let mut heap = open(options(), memory.clone()).unwrap();
    for n in 0..STEPS {
        *acknowledged.lock().unwrap() = Some(n);
        step(&mut heap, n).unwrap();
    }
    *acknowledged.lock().unwrap() = Some(STEPS);
    heap.close().unwrap();
    memory.look();
    Found {
        crashes: crashes.load(Ordering::Relaxed),
        fences: memory.fences(),
        wrong: wrong.lock().unwrap().take(),
    }
}

#[test]
fn every_crash_leaves_the_step_before_or_after_and_nothing_leaked() {
    let found = run(None, None, &Arc::new(expected()));
    assert_eq!(found.wrong, None);
    println!("{} crashes at {} fences", found.crashes, found.fences);
    assert!(found.crashes > 1000 && found.fences > STEPS);
}

fn planted_flush(place: &'static str) {
    let found = run(Some(place), None, &Arc::new(expected()));
    assert!(
        found.wrong.is_some(),
        "nobody noticed missing flushes of {place}"
    );
}

#[test]
fn planted_without_flush_of_the_first_superblock() {
    planted_flush("superblock A");
}

#[test]
fn planted_without_flush_of_the_second_superblock() {
    planted_flush("superblock B");
}

#[test]
fn planted_without_flush_of_the_head_of_the_log() {
    planted_flush("head of the log");
}

#[test]
fn planted_without_flush_of_the_entries_of_the_log() {
    planted_flush("entries of the log");
}

#[test]
fn planted_without_flush_of_data() {
    planted_flush("data");
}

#[test]
fn planted_without_flush_of_words() {
    planted_flush("words");
}

#[test]
fn planted_without_flush_of_parity() {
    planted_flush("parity");
}

#[test]
fn planted_without_any_one_fence() {
    let states = Arc::new(expected());
    let fences = run(None, None, &states).fences;
    for fence in 1..=fences {
        let found = run(None, Some(fence), &states);
        assert!(
            found.wrong.is_some(),
            "nobody noticed that fence {fence} of {fences} is missing"
        );
    }
}

#[test]
fn crashes_in_recovery_change_nothing() {
    // The memory right before the fence that follows each commit: its log durable, its home open.
    let states = Arc::new(expected());
    let found = Arc::new(Mutex::new(Vec::new()));
    let acknowledged = Arc::new(Mutex::new(0));
    let look = {
        let (found, acknowledged) = (Arc::clone(&found), Arc::clone(&acknowledged));
        move |memory: &LineMemory| {
            let done: u64 = *acknowledged.lock().unwrap();
            let mut taken = 0;
            memory.crash_states(how(7), &mut |bytes| {
                taken += 1;
                if taken % 5 == 1 {
                    found.lock().unwrap().push((done, bytes));
                }
                taken < 16
            });
        }
    };
    let base = SimMemory::new(&[], None, None, None);
    open(options(), base.clone()).unwrap().close().unwrap();
    let memory = SimMemory::new(&bytes_of(&base), None, None, Some(Box::new(look)));
    let mut heap = open(options(), memory).unwrap();
    for n in 0..STEPS {
        *acknowledged.lock().unwrap() = n;
        step(&mut heap, n).unwrap();
    }
    drop(heap);
    let mut again = 0;
    let found = std::mem::take(&mut *found.lock().unwrap());
    for (done, bytes) in found {
        let wrong = Arc::new(Mutex::new(None));
        let look = {
            let (wrong, states) = (Arc::clone(&wrong), Arc::clone(&states));
            move |memory: &LineMemory| {
                let mut left = 40;
                memory.crash_states(how(done), &mut |bytes| {
                    left -= 1;
                    let mut wrong = wrong.lock().unwrap();
                    *wrong = wrong.take().or_else(|| judge(&bytes, Some(done), &states));
                    wrong.is_none() && left > 0
                });
            }
        };
        let memory = SimMemory::new(&bytes, None, None, Some(Box::new(look)));
        drop(open(options(), memory.clone()).unwrap());
        again += memory.fences();
        assert_eq!(*wrong.lock().unwrap(), None);
    }
    assert!(again > 20, "{again} fences in recoveries");
}

fn bytes_of(memory: &SimMemory) -> Vec<u8> {
    use resilient_heap::memory::Memory;
    // SAFETY: the memory is readable as long as it is, and nobody writes now.
    #[allow(unsafe_code)]
    unsafe { std::slice::from_raw_parts(memory.base().as_ptr(), memory.len()) }.to_vec()
}
