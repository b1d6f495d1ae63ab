//! Changes a page of a running program.

use crate::support::comm;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// How often a change is tried.
const TRIES: u32 = 5;

/// Data that the judgement depends on.
pub struct Spot {
    /// The name (`comm`) of the process that has it.
    pub process: &'static str,
    /// What is recognised.
    pub text: &'static [u8],
    /// Whether the process has it in memory that it freed, too, so that nobody can tell from
    /// outside which page is in use: then all are changed, else the one that has most of it.
    pub copies: bool,
}

/// A page with the text.
struct Found {
    at: u64,
    /// Offsets in the page.
    hits: Vec<usize>,
}

/// Changes the lowest bit of every byte of every such text in a page, also in the copies of it
/// that processes inherited at the same address; returns what was changed.
pub fn spoil(members: &[u32], spot: &Spot) -> String {
    let these = members.iter().copied();
    let these: Vec<u32> = these.filter(|&pid| comm(pid) == spot.process).collect();
    let text = String::from_utf8_lossy(spot.text);
    // The program works, and may write to a page between its finding and its change.
    for _ in 0..TRIES {
        let told = try_once(&these, spot);
        if !told.is_empty() {
            return format!("{text:?}{told}");
        }
    }
    panic!("no {text:?} in {} {these:?}", spot.process);
}

fn try_once(these: &[u32], spot: &Spot) -> String {
    let found = these.iter().filter_map(|&pid| search(pid, spot.text));
    let mut found: Vec<Found> = found.flatten().collect();
    if !spot.copies {
        let most = found.into_iter().max_by_key(|found| found.hits.len());
        found = most.into_iter().collect();
    }
    let told = found.iter().map(|page| change(page, these, spot));
    told.filter(|told| !told.is_empty()).collect()
}

/// Changes a page in all processes that have it.
fn change(page: &Found, pids: &[u32], spot: &Spot) -> String {
    let changed: Vec<u8> = spot.text.iter().map(|byte| byte ^ 1).collect();
    let mut told = String::new();
    for &pid in pids {
        let Ok(memory) = memory(pid, true) else {
            continue;
        };
        if hits(&memory, page.at, spot.text) != page.hits {
            continue;
        }
        for hit in &page.hits {
            memory
                .write_all_at(&changed, page.at + *hit as u64)
                .unwrap();
        }
        let (times, at) = (page.hits.len(), page.at);
        write!(told, ", {times} times at {at:#x} of {} {pid}", spot.process).unwrap();
    }
    told
}

/// Where in a page the text is; nowhere if the page is gone.
fn hits(memory: &File, at: u64, text: &[u8]) -> Vec<usize> {
    let mut page = [0; PAGE];
    if memory.read_exact_at(&mut page, at).is_err() {
        return Vec::new();
    }
    let starts = page.windows(text.len()).enumerate();
    starts.filter(|(_, w)| *w == text).map(|(i, _)| i).collect()
}

fn memory(pid: u32, write: bool) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(write);
    options.open(format!("/proc/{pid}/mem"))
}

/// The pages of a process that have the text, among those that it can write.
fn search(pid: u32, text: &[u8]) -> Option<Vec<Found>> {
    let (memory, map) = (memory(pid, false).ok()?, pagemap(pid)?);
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut all = Vec::new();
    for line in maps.lines() {
        let mut parts = line.split_whitespace();
        let (range, rights) = (parts.next()?, parts.next()?);
        if !rights.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let (from, to) = (address(from)?, address(to)?);
        // Shared pages are there whether or not this process has looked at them.
        let pages = if rights.ends_with('s') {
            (from..to).step_by(PAGE).collect()
        } else {
            present(&map, from, to)
        };
        for at in pages {
            let hits = hits(&memory, at, text);
            if !hits.is_empty() {
                all.push(Found { at, hits });
            }
        }
    }
    Some(all)
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
