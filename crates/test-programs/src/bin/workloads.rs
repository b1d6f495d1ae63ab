//! The workloads of `cargo xtask bench heap`: `workloads KIND FILE WORKLOAD THREADS CHANGES`.
//!
//! KIND is `each` (durable when a transaction returns), `epoch` (durable every 1000 transactions), both with
//! a suffix that says how: `-kernel` (`msync`) or `-processor` (flushes of cache lines); or `volatile` (the
//! collections of `std`, for comparison). Prints seconds for all changes, for all lookups (0 where there are
//! none), and the 99th percentile of single changes, of which every eighth is timed.
//!
//! `pmdk/workloads.c` does the same with libpmemobj.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement ends where something fails"
)]

use resilient_heap::{
    Durability, Error, FileMemory, Flush, Heap, Options, PBTreeMap, PHashMap, PVec, Persist, Tx,
};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, RwLock};
use std::time::Instant;

const RING: usize = 4096;
const STRINGS: usize = 10_000;
/// Every so many changes one is timed.
const SAMPLE: u64 = 8;
/// Transactions between two barriers.
const EPOCH: u64 = 1000;

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    hash: PHashMap<'h, u64, u64>,
    tree: PBTreeMap<'h, u64, u64>,
    head: u64,
    tail: u64,
    ring: PVec<'h, u64>,
    strings: PVec<'h, [u8; 64]>,
}

fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn pair(n: u64) -> (usize, usize) {
    let place = |n| (mix(n) % STRINGS as u64) as usize;
    (place(n), place(!n))
}

fn step<'h>(root: &mut Root<'h>, tx: &Tx<'h>, workload: &str, n: u64) -> Result<(), Error> {
    match workload {
        "hash" => root.hash.insert(tx, mix(n), n).map(drop),
        "tree" => root.tree.insert(tx, mix(n), n).map(drop),
        "queue" => {
            if root.tail - root.head < RING as u64 && n.is_multiple_of(2) {
                let place = root.tail as usize % RING;
                *root.ring.get_mut(tx, place)?.unwrap() = n;
                root.tail += 1;
            } else if root.tail != root.head {
                root.head += 1;
            }
            Ok(())
        }
        _ => {
            let (one, other) = pair(n);
            let kept = *root.strings.get(tx, one)?.unwrap();
            let moved = *root.strings.get(tx, other)?.unwrap();
            *root.strings.get_mut(tx, one)?.unwrap() = moved;
            *root.strings.get_mut(tx, other)?.unwrap() = kept;
            Ok(())
        }
    }
}

/// Strings that all differ, so that a swap changes something.
fn strings() -> Vec<[u8; 64]> {
    let string = |n: u64| -> [u8; 64] { std::array::from_fn(|i| (mix(n) >> (i % 8 * 8)) as u8) };
    (0..STRINGS as u64).map(string).collect()
}

/// Runs `body` in so many threads, each with its share of the numbers; seconds.
fn timed(threads: u64, changes: u64, body: impl Fn(u64) + Sync) -> f64 {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for first in 0..threads {
            let body = &body;
            scope.spawn(move || {
                for n in (first..changes).step_by(threads as usize) {
                    body(n);
                }
            });
        }
    });
    begun.elapsed().as_secs_f64()
}

/// The same, and the 99th percentile of single ones.
fn sampled(threads: u64, changes: u64, body: impl Fn(u64) + Sync) -> (f64, f64) {
    let samples = Mutex::new(Vec::with_capacity((changes / SAMPLE + threads) as usize));
    let all = timed(threads, changes, |n| {
        if !(n / threads).is_multiple_of(SAMPLE) {
            return body(n);
        }
        let begun = Instant::now();
        body(n);
        let took = begun.elapsed().as_secs_f64();
        samples.lock().unwrap().push(took);
    });
    let mut samples = samples.into_inner().unwrap();
    samples.sort_by(f64::total_cmp);
    let rank = (samples.len() * 99).div_ceil(100).saturating_sub(1);
    (all, samples.get(rank).copied().unwrap_or(0.0))
}

/// Seconds of changes and of lookups, and the percentile of changes.
type Times = (f64, f64, f64);

fn persistent(kind: &str, file: &str, workload: &str, threads: u64, changes: u64) -> Times {
    let (durability, flush) = kind.split_once('-').expect("each-kernel, for example");
    let durability = match durability {
        "each" => Durability::Each,
        _ => Durability::Barrier,
    };
    let flush = match flush {
        "kernel" => Flush::Kernel,
        _ => Flush::Processor,
    };
    let memory = FileMemory::with_flush(file, 1 << 30, flush).unwrap();
    let mut heap: Heap<Root<'static>> = Options::default()
        .log_pages(1024)
        .durability(durability)
        .open(memory, |tx| {
            let mut root = Root {
                hash: PHashMap::new(),
                tree: PBTreeMap::new(),
                head: 0,
                tail: 0,
                ring: PVec::new(),
                strings: PVec::new(),
            };
            if workload == "queue" {
                root.ring.extend_from_slice(tx, &[0; RING])?;
            }
            if workload == "swap" {
                root.strings.extend_from_slice(tx, &strings())?;
            }
            Ok(root)
        })
        .unwrap();
    heap.sync().unwrap();
    let reader = heap.reader();
    let heap = Mutex::new((heap, 0u64));
    let (changing, slow) = sampled(threads, changes, |n| {
        let mut guard = heap.lock().unwrap();
        let (heap, done) = &mut *guard;
        heap.write(|root, tx| step(root, tx, workload, n)).unwrap();
        *done += 1;
        if durability == Durability::Barrier && done.is_multiple_of(EPOCH) {
            heap.sync().unwrap();
        }
    });
    // What the last epoch still lacks belongs to the changes.
    let begun = Instant::now();
    heap.lock().unwrap().0.sync().unwrap();
    let changing = changing + begun.elapsed().as_secs_f64();
    let looking = match workload {
        "hash" => timed(threads, changes, |n| {
            let found = reader.read(|root, s| Ok(root.hash.get(s, &mix(n))?.copied()));
            assert_eq!(found, Ok(Some(n)));
        }),
        "tree" => timed(threads, changes, |n| {
            let found = reader.read(|root, s| Ok(root.tree.get(s, &mix(n))?.copied()));
            assert_eq!(found, Ok(Some(n)));
        }),
        _ => 0.0,
    };
    (changing, looking, slow)
}

fn volatile(workload: &str, threads: u64, changes: u64) -> Times {
    let both = |(changing, slow), looking| (changing, looking, slow);
    match workload {
        "hash" => {
            let map = RwLock::new(HashMap::new());
            both(
                sampled(threads, changes, |n| {
                    map.write().unwrap().insert(mix(n), n);
                }),
                timed(threads, changes, |n| {
                    assert_eq!(map.read().unwrap().get(&mix(n)), Some(&n));
                }),
            )
        }
        "tree" => {
            let map = RwLock::new(BTreeMap::new());
            both(
                sampled(threads, changes, |n| {
                    map.write().unwrap().insert(mix(n), n);
                }),
                timed(threads, changes, |n| {
                    assert_eq!(map.read().unwrap().get(&mix(n)), Some(&n));
                }),
            )
        }
        "queue" => {
            let queue = Mutex::new(VecDeque::with_capacity(RING));
            let step = |n: u64| {
                let mut queue = queue.lock().unwrap();
                if queue.len() < RING && n.is_multiple_of(2) {
                    queue.push_back(n);
                } else {
                    std::hint::black_box(queue.pop_front());
                }
            };
            both(sampled(threads, changes, step), 0.0)
        }
        _ => {
            let strings = Mutex::new(strings());
            let step = |n: u64| {
                let (one, other) = pair(n);
                std::hint::black_box(&mut *strings.lock().unwrap()).swap(one, other);
            };
            both(sampled(threads, changes, step), 0.0)
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [kind, file, workload, threads, changes] = words.as_slice() else {
        eprintln!("usage: workloads KIND FILE WORKLOAD THREADS CHANGES");
        std::process::exit(2);
    };
    let (threads, changes) = (threads.parse().unwrap(), changes.parse().unwrap());
    assert!(["hash", "tree", "queue", "swap"].contains(&workload.as_str()));
    let (changing, looking, slow) = match kind.as_str() {
        "volatile" => volatile(workload, threads, changes),
        kind => persistent(kind, file, workload, threads, changes),
    };
    println!("{changing:.9} {looking:.9} {slow:.9}");
}
