//! The log: what a commit is about to write, durable before it writes.
//!
//! Two halves take turns, by the number of the commit. A half is a head line and entries:
//!
//! ```text
//! head   | number: 8 | entries: 8 | checksum of the entries: 4 | 0: 40 | word: 4 |
//! entry  | place: 8  | the line as it shall be: 64 |
//! ```
//! Entries follow each other without gaps in lines of 60 bytes and a word. The seed of the head's word
//! has the half in it, the seed of an entry line also its position and the commit's number.
//!
//! # Rules
//! - Head and entries are stored in any order, flushed, and then *one* fence makes the commit durable:
//!   the checksums tell a complete log from one that is not.
//! - What commit `k` writes at home is flushed at once, and fenced by commit `k + 1`, whose log goes to
//!   the other half. So a half is overwritten only when its commit is durable at home.
//! - An empty half says that all commits up to its number are at home: the other one is not written again.
//! - Recovery writes all complete halves again that are newer, older first. A half that is neither complete nor empty
//!   is reported as discarded: the crash came before its commit was acknowledged, or it was damaged.

use crate::code::{self, LINE, Line};
use crate::error::Error;
use crate::home::{Change, Home};
use crate::layout::{self, CARRIED};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Bytes of an entry.
const ENTRY: usize = 8 + LINE;

/// What recovery found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Commits that were written again.
    pub replayed: u32,
    /// A half of the log was incomplete, and was discarded.
    pub discarded: bool,
    /// The number of the next commit.
    pub next: u64,
}

/// What a commit is written from; kept, so that it need not be allocated each time.
#[derive(Debug, Default)]
pub struct Buffers {
    stream: Vec<u8>,
    lines: Vec<u8>,
}

/// A half of the log.
#[derive(Debug)]
enum Half {
    /// Nothing to do.
    Empty { number: u64 },
    /// A complete commit.
    Complete {
        number: u64,
        lines: BTreeMap<usize, Line>,
    },
    /// Neither.
    Broken { number: u64 },
}

/// The most lines that a commit may change.
pub fn capacity(home: &Home) -> usize {
    (home.geometry.log_lines() - 1) * CARRIED / ENTRY
}

fn head_seed(home: &Home, half: usize) -> u32 {
    code::seed(home.id, home.geometry.log_at(half) as u64)
}

fn line_seed(home: &Home, at: usize, number: u64) -> u32 {
    code::seed(code::mix(home.id, number), at as u64)
}

fn head(home: &Home, half: usize, number: u64, entries: usize, checksum: u32) -> Line {
    let mut bytes = [0; CARRIED];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..16].copy_from_slice(&(entries as u64).to_le_bytes());
    bytes[16..20].copy_from_slice(&checksum.to_le_bytes());
    layout::seal(&bytes, head_seed(home, half))
}

/// Makes a commit durable, but for its place at home.
pub fn write(
    home: &Home,
    number: u64,
    changes: &[Change<'_>],
    buffers: &mut Buffers,
) -> Result<(), Error> {
    let half = (number % 2) as usize;
    let begin = home.geometry.log_at(half);
    let Buffers { stream, lines } = buffers;
    stream.clear();
    lines.clear();
    for change in changes {
        stream.extend_from_slice(&(change.at as u64).to_le_bytes());
        stream.extend_from_slice(change.new);
    }
    let checksum = code::crc(stream);
    lines.extend_from_slice(&head(home, half, number, changes.len(), checksum));
    for carried in stream.chunks(CARRIED) {
        let seed = line_seed(home, begin + lines.len(), number);
        lines.extend_from_slice(&layout::seal(carried, seed));
    }
    home.store(begin, lines);
    home.flush(begin, lines.len());
    home.fence()
}

/// Says that everything up to the commit `newest` is at home, as `number`. What was written there is made
/// durable first. Then the older half is emptied, and only when that is durable the newer one, which
/// thereby need not be: a newer half that is torn beside an older one that is whole would look like a
/// commit that never was, and the older commit would be written over the newer one.
pub fn retire(home: &Home, number: u64, newest: u64) -> Result<(), Error> {
    home.fence()?;
    let newer = (newest % 2) as usize;
    clear(home, 1 - newer, number);
    home.fence()?;
    clear(home, newer, number);
    Ok(())
}

/// Makes a half empty. Flushed, not fenced.
pub fn clear(home: &Home, half: usize, number: u64) {
    let at = home.geometry.log_at(half);
    home.store(at, &head(home, half, number, 0, 0));
    home.flush(at, LINE);
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    if let Some(found) = bytes.get(at..at + 8) {
        word.copy_from_slice(found);
    }
    u64::from_le_bytes(word)
}

fn read(home: &Home, half: usize) -> Half {
    let begin = home.geometry.log_at(half);
    let Some((bytes, bits)) = layout::unseal(&home.line(begin), head_seed(home, half)) else {
        return Half::Broken { number: 0 };
    };
    home.note_corrected(u64::from(bits));
    let (number_of_commit, entries) = (number(&bytes, 0), number(&bytes, 8));
    if entries == 0 {
        return Half::Empty {
            number: number_of_commit,
        };
    }
    match read_lines(home, begin, number_of_commit, entries, &bytes[16..20]) {
        Some(lines) => Half::Complete {
            number: number_of_commit,
            lines,
        },
        None => Half::Broken {
            number: number_of_commit,
        },
    }
}

fn read_lines(
    home: &Home,
    begin: usize,
    number_of_commit: u64,
    entries: u64,
    checksum: &[u8],
) -> Option<BTreeMap<usize, Line>> {
    let entries = usize::try_from(entries).ok()?;
    if entries > capacity(home) {
        return None;
    }
    let mut stream = Vec::with_capacity(entries * ENTRY + CARRIED);
    while stream.len() < entries * ENTRY {
        let at = begin + LINE + stream.len() / CARRIED * LINE;
        let seed = line_seed(home, at, number_of_commit);
        let (carried, bits) = layout::unseal(&home.line(at), seed)?;
        home.note_corrected(u64::from(bits));
        stream.extend_from_slice(&carried);
    }
    stream.truncate(entries * ENTRY);
    if code::crc(&stream).to_le_bytes() != checksum {
        return None;
    }
    let mut lines = BTreeMap::new();
    for entry in stream.chunks_exact(ENTRY) {
        let at = usize::try_from(number(entry, 0)).ok()?;
        let place = home.data(at)?;
        if !place.1.is_multiple_of(LINE) {
            return None;
        }
        let mut line = [0; LINE];
        line.copy_from_slice(&entry[8..]);
        lines.insert(at, line);
    }
    Some(lines)
}

/// Whether both halves say that everything is at home.
pub fn is_retired(home: &Home) -> bool {
    (0..2).all(|half| matches!(read(home, half), Half::Empty { .. }))
}

/// Brings everything home after whatever happened.
pub fn recover(home: &Home) -> Result<Recovered, Error> {
    let mut found = Recovered::default();
    let mut complete = BTreeMap::new();
    let mut last = 0;
    let mut settled = 0;
    for half in 0..2 {
        match read(home, half) {
            Half::Empty { number } => {
                last = last.max(number);
                settled = settled.max(number);
            }
            Half::Complete { number, lines } => {
                last = last.max(number);
                complete.insert(number, lines);
            }
            Half::Broken { number } => {
                found.discarded = true;
                last = last.max(number);
            }
        }
    }
    let newest = complete.keys().next_back().copied().unwrap_or(last);
    for (number, lines) in &complete {
        if *number > settled {
            home.replay(lines);
            found.replayed += 1;
        }
    }
    if found.replayed > 0 || found.discarded {
        retire(home, last, newest)?;
    }
    // A number that an interrupted commit may have begun with is never used again.
    found.next = last.checked_add(3).ok_or(Error::Damaged {
        what: "log",
        at: home.geometry.log_at(0),
    })?;
    Ok(found)
}
