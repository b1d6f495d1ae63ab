//! How fast a full epoch becomes durable, beside the same bytes written to the same place past the
//! page cache with nothing around them.
//!
//! `cargo bench -p outlive-epoch-store -- [DIRECTORY] [MIB]`. Raw and store take turns; the medians of
//! five rounds are shown. The same then for pages that are packed, of three kinds of data: noise, numbers as a
//! heap has them, and text; with the time that it takes to read all of it back, checked. And each of them encrypted.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement")]

use outlive_epoch::{EpochFacts, EpochReader, EpochWriter, PAGE_SIZE, PageSink, Run, SpaceId};
use outlive_epoch_store::{Codec, Secret, Store};
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
        stored.push(write_epoch(dir.path(), &pages, times, (None, None)).written);
    }
    let (raw, stored) = (median(raw), median(stored));
    println!("{mib} MiB of pages, durable, medians of {ROUNDS}");
    println!("written past the page cache: {:.2} GB/s", raw / 1e9);
    println!(
        "as an epoch, with checksums and parity: {:.2} GB/s",
        stored / 1e9
    );
    println!("{:.0} %", stored / raw * 100.0);
    for (kind, fill) in KINDS {
        fill(&mut pages);
        let codecs = [None, Some(Codec::Lz4), Some(Codec::Zstd)];
        for (codec, encrypted) in codecs.into_iter().flat_map(|c| [(c, false), (c, true)]) {
            let key = || encrypted.then(secret);
            let rounds =
                (0..ROUNDS).map(|_| write_epoch(dir.path(), &pages, times, (codec, key())));
            let rounds: Vec<Figures> = rounds.collect();
            let codec = codec.map_or("as they are".to_owned(), |codec| codec.to_string());
            let encrypted = if encrypted { ", encrypted" } else { "" };
            println!(
                "{kind}, {codec}{encrypted}: written {:.2} GB/s, read {:.2} GB/s, {:.0} % of the space",
                median(rounds.iter().map(|f| f.written).collect()) / 1e9,
                median(rounds.iter().map(|f| f.read).collect()) / 1e9,
                rounds[0].space * 100.0,
            );
        }
    }
}

/// Fills memory with data of a kind.
type Fill = fn(&mut [u8]);

/// Kinds of data, by name.
const KINDS: [(&str, Fill); 3] = [
    ("noise", |bytes| fastrand::Rng::with_seed(1).fill(bytes)),
    ("numbers", |bytes| {
        let mut random = fastrand::Rng::with_seed(2);
        for word in bytes.as_chunks_mut::<8>().0 {
            // Addresses, small numbers, and nothing.
            *word = match random.u8(..4) {
                0 => 0x7f3a_0000_0000 | u64::from(random.u32(..1 << 24) & !7),
                1 => random.u64(..1000),
                2 => random.u64(..1 << 40),
                _ => 0,
            }
            .to_le_bytes();
        }
    }),
    ("text", |bytes| {
        let mut random = fastrand::Rng::with_seed(3);
        let mut word = || -> String {
            let letters = random.usize(2..9);
            (0..letters).map(|_| random.lowercase()).collect()
        };
        let words: Vec<String> = (0..2000).map(|_| word()).collect();
        let mut at = 0;
        while at < bytes.len() {
            // Some words are more frequent than others.
            let most = 1 + random.usize(..words.len());
            let word = &words[random.usize(..most)];
            let len = word.len().min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&word.as_bytes()[..len]);
            if let Some(space) = bytes.get_mut(at + len) {
                *space = b' ';
            }
            at += len + 1;
        }
    }),
];

/// Bytes of pages a second, and the part of their space that the log takes.
struct Figures {
    written: f64,
    read: f64,
    space: f64,
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

fn secret() -> Secret {
    Secret::parse(&(0..32).collect::<Vec<u8>>()).unwrap()
}

fn write_epoch(
    dir: &Path,
    pages: &Buffer,
    times: usize,
    (codec, key): (Option<Codec>, Option<Secret>),
) -> Figures {
    let path = dir.join("store");
    let mut store = Store::create_with(&path, key).unwrap();
    store.pack(codec);
    let count = (TRANSFER / PAGE_SIZE) as u64;
    let began = Instant::now();
    let mut writer = store.begin().unwrap();
    for i in 0..times as u64 {
        let run = Run::new(SpaceId(1), i * count, count).unwrap();
        writer.put(run, pages).unwrap();
    }
    writer.commit(EpochFacts::default()).unwrap();
    let took = began.elapsed().as_secs_f64();
    let all = (times * TRANSFER) as f64;
    let space = store.log_bytes() as f64 / all;
    let (began, mut bytes) = (Instant::now(), 0);
    let reader = store.epoch(None).unwrap();
    let walked = reader.pages(&mut |run, _| {
        bytes += run.bytes();
        Ok(())
    });
    walked.unwrap();
    assert_eq!(bytes, (times * TRANSFER) as u64);
    let read = all / began.elapsed().as_secs_f64();
    drop(store);
    std::fs::remove_dir_all(path).unwrap();
    Figures {
        written: all / took,
        read,
        space,
    }
}
