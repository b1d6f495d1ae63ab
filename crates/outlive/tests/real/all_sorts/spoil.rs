//! Changes one page of a running program.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

/// Data that the judgement depends on: the page that has most of it is what is changed.
pub struct Spot {
    /// The name (`comm`) of the process that has it.
    pub process: &'static str,
    /// What is recognised.
    pub text: &'static [u8],
}

struct Found {
    pid: u32,
    at: u64,
    /// Offsets in the page.
    hits: Vec<usize>,
}

/// Changes the lowest bit of every byte of every such text in one page; returns what was changed.
pub fn spoil(members: &[u32], spot: &Spot) -> String {
    let these = members.iter().copied();
    let these = these.filter(|&pid| crate::support::comm(pid) == spot.process);
    let found = these.filter_map(|pid| search(pid, spot.text));
    let most = found.max_by_key(|found| found.hits.len());
    let text = String::from_utf8_lossy(spot.text);
    let Some(found) = most else {
        panic!("no {text:?} in any {} of {members:?}", spot.process);
    };
    let memory = memory(found.pid, true).unwrap();
    let changed: Vec<u8> = spot.text.iter().map(|byte| byte ^ 1).collect();
    for hit in &found.hits {
        memory
            .write_all_at(&changed, found.at + *hit as u64)
            .unwrap();
    }
    let mut told = String::new();
    write!(
        told,
        "{} times {text:?} in the page at {:#x} of process {} ({})",
        found.hits.len(),
        found.at,
        found.pid,
        spot.process
    )
    .unwrap();
    told
}

fn memory(pid: u32, write: bool) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(write);
    options.open(format!("/proc/{pid}/mem"))
}

/// The page of a process that has most of the text, among those that it can write.
fn search(pid: u32, text: &[u8]) -> Option<Found> {
    let (memory, map) = (memory(pid, false).ok()?, pagemap(pid)?);
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut best: Option<Found> = None;
    for line in maps.lines() {
        let mut parts = line.split_whitespace();
        let (range, rights) = (parts.next()?, parts.next()?);
        if !rights.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let (from, to) = (address(from)?, address(to)?);
        for at in present(&map, from, to) {
            let mut page = [0; PAGE];
            // A page may go away while it is read.
            if memory.read_exact_at(&mut page, at).is_err() {
                continue;
            }
            let starts = page.windows(text.len()).enumerate();
            let hits: Vec<usize> = starts.filter(|(_, w)| *w == text).map(|(i, _)| i).collect();
            if hits.len() > best.as_ref().map_or(0, |found| found.hits.len()) {
                best = Some(Found { pid, at, hits });
            }
        }
    }
    best
}

fn pagemap(pid: u32) -> Option<File> {
    File::open(format!("/proc/{pid}/pagemap")).ok()
}

/// Addresses of the pages that hold something, in memory or swapped out.
fn present(map: &File, from: u64, to: u64) -> Vec<u64> {
    let (first, last) = (from / PAGE as u64, to / PAGE as u64);
    let mut all = Vec::new();
    for begin in (first..last).step_by(1 << 16) {
        let count = (last - begin).min(1 << 16) as usize;
        let mut entries = vec![0; count * 8];
        if map.read_exact_at(&mut entries, begin * 8).is_err() {
            continue;
        }
        let words = entries.as_chunks::<8>().0.iter();
        let words = words.map(|bytes| u64::from_ne_bytes(*bytes)).enumerate();
        let there = words.filter(|(_, word)| word >> 62 != 0);
        all.extend(there.map(|(i, _)| (begin + i as u64) * PAGE as u64));
    }
    all
}
