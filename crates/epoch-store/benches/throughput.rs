//! How fast a full epoch becomes durable, beside the same bytes written to the same place past the
//! page cache with nothing around them.
//!
//! `cargo bench -p outlive-epoch-store -- [DIRECTORY] [MIB]`. Raw and store take turns; the medians of
//! five rounds are shown.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement")]

use outlive_epoch::{EpochFacts, EpochWriter, PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_epoch_store::Store;
use outlive_media::{Buffer, TRANSFER};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

const ROUNDS: usize = 5;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if !words.iter().any(|word| word == "--bench") {
        println!("nothing is measured but by `cargo bench`");
        return;
    }
    let mut words = words.iter().filter(|word| !word.starts_with("--"));
    let parent = words.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let mib: usize = words.next().map_or(1024, |n| n.parse().unwrap());
    let dir = tempfile::tempdir_in(parent).unwrap();
    let mut pages = Buffer::new(TRANSFER).unwrap();
    fastrand::Rng::with_seed(1).fill(&mut pages);
    let times = mib * (1 << 20) / TRANSFER;
    let (mut raw, mut stored) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        raw.push(write_raw(dir.path(), &pages, times));
        stored.push(write_epoch(dir.path(), &pages, times));
    }
    let (raw, stored) = (median(raw), median(stored));
    println!("{mib} MiB of pages, durable, medians of {ROUNDS}");
    println!("written past the page cache: {:.2} GB/s", raw / 1e9);
    println!(
        "as an epoch, with checksums and parity: {:.2} GB/s",
        stored / 1e9
    );
    println!("{:.0} %", stored / raw * 100.0);
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Bytes a second.
fn write_raw(dir: &Path, pages: &Buffer, times: usize) -> f64 {
    use rustix::fs::{Mode, OFlags};
    let path = dir.join("raw");
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).unwrap();
    let file = File::from(fd);
    let began = Instant::now();
    for i in 0..times {
        file.write_all_at(pages, (i * TRANSFER) as u64).unwrap();
    }
    file.sync_data().unwrap();
    let took = began.elapsed().as_secs_f64();
    std::fs::remove_file(path).unwrap();
    (times * TRANSFER) as f64 / took
}

/// Bytes of pages a second.
fn write_epoch(dir: &Path, pages: &Buffer, times: usize) -> f64 {
    let path = dir.join("store");
    let mut store = Store::create(&path).unwrap();
    let count = (TRANSFER / PAGE_SIZE) as u64;
    let began = Instant::now();
    let mut writer = store.begin().unwrap();
    for i in 0..times as u64 {
        let run = Run::new(SpaceId(1), i * count, count).unwrap();
        writer.put(run, pages).unwrap();
    }
    writer.commit(EpochFacts::default()).unwrap();
    let took = began.elapsed().as_secs_f64();
    drop(store);
    std::fs::remove_dir_all(path).unwrap();
    (times * TRANSFER) as f64 / took
}
