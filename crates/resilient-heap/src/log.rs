//! The log: what commits are about to write, durable before they write.
//!
//! Two halves take turns. Each holds the records of commits that follow each other, one after another without
//! gaps in lines of 60 bytes and a word:
//!
//! ```text
//! record | number: 8 | bytes of the entries: 4 | checksum of the entries: 4 | entries ... | zeros |
//! entry  | place / 64: 7 bytes, and which of its words: 1 | the whole line: 64, or those words: 8 each |
//! ```
//! A record begins with a line of its own. The seed of that line's word has its place in it, the seed of the others
//! also the commit's number. No bytes of entries: a half that is *empty*, or, with the number of the record before it,
//! the *end* of the records, which the next one is written over.
//!
//! # Rules
//! - A record is stored in any order, flushed, and then *one* fence makes the commit durable: words and checksum tell
//!   a complete record from one that is not.
//! - What commits write at home is not flushed: the log has it. When the half is full (after [`ENOUGH`] lines),
//!   all of it is flushed, each line once, and fenced together with the first record in the other half. So a half
//!   is overwritten only when its commits are durable at home.
//! - The first entry of a line in a half is the whole line, so that a half needs nothing from home; later ones are
//!   the words that changed.
//! - An empty half says that all commits up to its number are at home: the other one is not written again.
//! - Recovery writes the commits of both halves again, the older half first. A half that is being overwritten still
//!   has the end or the beginning of what it held: the older half is written again only if its commits reach up to
//!   those of the newer one, and otherwise they are at home.
//! - Behind a record is its end, or the next record. Anything else, and a record that is not complete, is
//!   reported as discarded: the crash came before its commit was acknowledged, or something was damaged, and then
//!   what would follow is discarded with it.

use crate::code::{self, LINE, Line};
use crate::error::Error;
use crate::home::{Change, Home};
use crate::layout::{self, CARRIED};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Bytes of an entry that has the whole line.
const ENTRY: usize = 8 + LINE;
/// Bytes before the entries of a record.
const HEAD: usize = 16;
/// Lines of a half after which the other one is begun, if nothing else is said and a half has as many. More of them
/// would let lines be flushed less often; fewer leave less to be recovered, and fewer columns whose parity a crash
/// leaves behind.
pub const ENOUGH: usize = 1024;

/// What recovery found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Commits that were written again.
    pub replayed: u32,
    /// A record was incomplete, and was discarded.
    pub discarded: bool,
    /// The number of the next commit.
    pub next: u64,
}

/// The writing side of the log.
#[derive(Debug)]
pub struct Log {
    /// The half that is written now, and its lines that are used.
    half: usize,
    used: usize,
    /// The other half is not empty.
    turned: bool,
    /// Used lines after which the other half is begun.
    enough: usize,
    /// How often a half was begun; and, for each line of data, when it was last logged as a whole.
    turn: u32,
    whole: Vec<u32>,
    /// The lines that the commits of this half changed: places at home.
    changed: Vec<usize>,
    /// What a record is made of; kept, so that it need not be allocated each time.
    stream: Vec<u8>,
    lines: Vec<u8>,
    flushes: Vec<usize>,
}

/// What a half holds.
#[derive(Debug)]
enum Half {
    /// Nothing to do.
    Empty { number: u64 },
    /// Complete commits, and whether something that is not complete follows.
    Complete {
        first: u64,
        last: u64,
        lines: BTreeMap<usize, Line>,
        broken: bool,
    },
    /// Neither.
    Broken { number: u64 },
}

/// The most lines that a commit may change.
pub fn capacity(home: &Home) -> usize {
    (home.geometry.log_lines() * CARRIED - HEAD) / ENTRY
}

fn head_seed(home: &Home, at: usize) -> u32 {
    code::seed(home.id, at as u64)
}

fn line_seed(home: &Home, at: usize, number: u64) -> u32 {
    code::seed(code::mix(home.id, number), at as u64)
}

/// The first line of a record.
fn head(home: &Home, at: usize, number: u64, stream: &[u8]) -> Line {
    let mut bytes = [0; CARRIED];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..12].copy_from_slice(&(stream.len() as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&code::crc(stream).to_le_bytes());
    let begin = stream.len().min(CARRIED - HEAD);
    bytes[HEAD..HEAD + begin].copy_from_slice(&stream[..begin]);
    layout::seal(&bytes, head_seed(home, at))
}

/// Which words of a line differ.
fn words(old: &Line, new: &Line) -> u8 {
    let (old, new) = (old.as_chunks::<8>().0, new.as_chunks::<8>().0);
    let differ = old.iter().zip(new).enumerate();
    differ.fold(0, |mask, (i, (old, new))| mask | u8::from(old != new) << i)
}

impl Log {
    /// After recovery: both halves are empty.
    pub fn new(enough: usize) -> Self {
        Self {
            half: 0,
            used: 0,
            turned: false,
            enough,
            turn: 1,
            whole: Vec::new(),
            changed: Vec::new(),
            stream: Vec::new(),
            lines: Vec::new(),
            flushes: Vec::new(),
        }
    }

    /// Makes a commit durable, but for its place at home.
    pub fn write(&mut self, home: &Home, number: u64, changes: &[Change<'_>]) -> Result<(), Error> {
        let lines = home.zones() * home.geometry.zone_data() / LINE;
        if self.whole.len() < lines {
            self.whole.resize(lines, 0);
        }
        self.collect(home, changes);
        if self.used > 0
            && self.used + self.record_lines() > home.geometry.log_lines().min(self.enough)
        {
            self.turn(home);
            self.collect(home, changes);
        }
        let at = home.geometry.log_at(self.half) + self.used * LINE;
        self.lines.clear();
        self.lines
            .extend_from_slice(&head(home, at, number, &self.stream));
        let rest = self.stream.get(CARRIED - HEAD..).unwrap_or_default();
        for carried in rest.chunks(CARRIED) {
            let seed = line_seed(home, at + self.lines.len(), number);
            self.lines.extend_from_slice(&layout::seal(carried, seed));
        }
        self.used += self.lines.len() / LINE;
        if self.used < home.geometry.log_lines() {
            let end = head(home, at + self.lines.len(), number, &[]);
            self.lines.extend_from_slice(&end);
        }
        home.store(at, &self.lines);
        home.flush(at, self.lines.len());
        home.fence()?;
        for change in changes {
            if let Some(whole) = index(home, change.at).and_then(|i| self.whole.get_mut(i))
                && core::mem::replace(whole, self.turn) != self.turn
            {
                self.changed.push(change.at);
            }
        }
        Ok(())
    }

    fn record_lines(&self) -> usize {
        (HEAD + self.stream.len()).div_ceil(CARRIED)
    }

    /// The entries of a commit.
    fn collect(&mut self, home: &Home, changes: &[Change<'_>]) {
        self.stream.clear();
        for change in changes {
            let logged = index(home, change.at).and_then(|i| self.whole.get(i)) == Some(&self.turn);
            let mask = match change.old.filter(|_| logged) {
                Some(old) => words(old, change.new),
                None => u8::MAX,
            };
            let mask = if mask == u8::MAX { 0 } else { mask };
            let place = (change.at / LINE) as u64;
            self.stream
                .extend_from_slice(&(place << 8 | u64::from(mask)).to_le_bytes());
            if mask == 0 {
                self.stream.extend_from_slice(change.new);
                continue;
            }
            for (i, word) in change.new.as_chunks::<8>().0.iter().enumerate() {
                if mask >> i & 1 == 1 {
                    self.stream.extend_from_slice(word);
                }
            }
        }
    }

    /// Goes on in the other half, whose commits are durable at home. Those of this one are by the next fence.
    fn turn(&mut self, home: &Home) {
        self.flush(home);
        self.begin(1 - self.half);
        self.turned = true;
    }

    fn begin(&mut self, half: usize) {
        (self.half, self.used) = (half, 0);
        self.turn = self.turn.checked_add(1).unwrap_or_else(|| {
            self.whole.fill(0);
            1
        });
    }

    /// Begins to make durable at home what the commits of this half wrote.
    fn flush(&mut self, home: &Home) {
        for at in self.changed.drain(..) {
            home.places(at, &mut self.flushes);
        }
        self.flushes.sort_unstable();
        self.flushes.dedup();
        for at in self.flushes.drain(..) {
            home.flush(at, LINE);
        }
    }

    /// Makes all commits durable at home, and leaves nothing to recover. Later commits have larger numbers.
    pub fn retire(&mut self, home: &Home, number: u64) -> Result<(), Error> {
        self.flush(home);
        retire(home, number, self.half, self.turned)?;
        self.begin(self.half);
        self.turned = false;
        Ok(())
    }
}

/// The number of a line among all lines of data.
fn index(home: &Home, at: usize) -> Option<usize> {
    let (zone, within) = home.data(at)?;
    Some((zone * home.geometry.zone_data() + within) / LINE)
}

/// Says that everything is at home, as `number`. What was flushed there is made durable first. Then the older half
/// is emptied, if it is not, and only when that is durable the newer one, which thereby need not be: a newer half that is torn
/// beside an older one that is whole would look like commits that never were, and the older ones would be
/// written over the newer ones.
fn retire(home: &Home, number: u64, newer: usize, both: bool) -> Result<(), Error> {
    home.fence()?;
    if both {
        clear(home, 1 - newer, number);
        home.fence()?;
    }
    clear(home, newer, number);
    Ok(())
}

/// Makes a half empty. Flushed, not fenced.
pub fn clear(home: &Home, half: usize, number: u64) {
    let at = home.geometry.log_at(half);
    home.store(at, &head(home, at, number, &[]));
    home.flush(at, LINE);
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    if let Some(found) = bytes.get(at..at + 8) {
        word.copy_from_slice(found);
    }
    u64::from_le_bytes(word)
}

/// The first line of a record.
struct Found {
    number: u64,
    len: usize,
    checksum: [u8; 4],
    begin: [u8; CARRIED - HEAD],
    /// How many bits of the line were corrected.
    bits: u32,
}

impl Found {
    fn at(home: &Home, at: usize) -> Option<Self> {
        let (bytes, bits) = layout::unseal(&home.line(at), head_seed(home, at))?;
        let [.., a, b, c, d] = *bytes.first_chunk::<HEAD>()?;
        let mut begin = [0; CARRIED - HEAD];
        begin.copy_from_slice(&bytes[HEAD..]);
        Some(Self {
            number: number(&bytes, 0),
            len: (number(&bytes, 8) & u64::from(u32::MAX)) as usize,
            checksum: [a, b, c, d],
            begin,
            bits,
        })
    }

    /// The entries, and lines of the record; nothing if it is not complete.
    fn entries(&self, home: &Home, at: usize, room: usize) -> Option<(Vec<u8>, usize)> {
        let lines = self.len.checked_add(HEAD)?.div_ceil(CARRIED);
        if self.len == 0 || lines > room {
            return None;
        }
        let mut stream = Vec::with_capacity(lines * CARRIED);
        stream.extend_from_slice(&self.begin);
        for i in 1..lines {
            let at = at + i * LINE;
            let seed = line_seed(home, at, self.number);
            let (carried, bits) = layout::unseal(&home.line(at), seed)?;
            home.note_corrected(u64::from(bits));
            stream.extend_from_slice(&carried);
        }
        stream.truncate(self.len);
        (code::crc(&stream).to_le_bytes() == self.checksum).then_some((stream, lines))
    }
}

/// Adds the entries of a commit to what those before it say of lines; nothing if they make no sense.
fn add(home: &Home, stream: &[u8], lines: &mut BTreeMap<usize, Line>) -> Option<()> {
    let mut rest = stream;
    while !rest.is_empty() {
        let (head, after) = rest.split_first_chunk::<8>()?;
        let head = u64::from_le_bytes(*head);
        let at = usize::try_from(head >> 8).ok()?.checked_mul(LINE)?;
        home.data(at)?;
        rest = match head as u8 {
            0 => {
                let (line, after) = after.split_first_chunk::<LINE>()?;
                lines.insert(at, *line);
                after
            }
            mask => {
                let line = lines.get_mut(&at)?;
                let mut after = after;
                for (i, word) in line.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    if mask >> i & 1 == 1 {
                        (*word, after) = after.split_first_chunk::<8>().map(|(w, a)| (*w, a))?;
                    }
                }
                after
            }
        };
    }
    Some(())
}

fn read(home: &Home, half: usize) -> Half {
    let begin = home.geometry.log_at(half);
    let all = home.geometry.log_lines();
    let mut lines = BTreeMap::new();
    let (mut used, mut reached, mut number) = (0, None, 0);
    let mut broken = false;
    while used < all {
        let at = begin + used * LINE;
        let last = reached.map(|(_, last): (u64, u64)| last);
        let found = Found::at(home, at).filter(|found| match last {
            None => true,
            Some(last) => found.number == last + u64::from(found.len > 0),
        });
        broken = true;
        let Some(found) = found else {
            break;
        };
        home.note_corrected(u64::from(found.bits));
        number = found.number;
        if found.len == 0 {
            broken = false;
            break;
        }
        // There is none after the largest.
        let complete = found.entries(home, at, all - used);
        let complete = complete
            .filter(|(stream, _)| number < u64::MAX && add(home, stream, &mut lines).is_some());
        let Some((_, more)) = complete else {
            break;
        };
        reached = Some((reached.map_or(number, |(first, _)| first), number));
        used += more;
        broken = false;
    }
    match reached {
        Some((first, last)) => Half::Complete {
            first,
            last,
            lines,
            broken,
        },
        None if broken => Half::Broken { number },
        None => Half::Empty { number },
    }
}

/// Whether both halves say that everything is at home.
pub fn is_retired(home: &Home) -> bool {
    (0..2).all(|half| matches!(read(home, half), Half::Empty { .. }))
}

/// Brings everything home after whatever happened.
pub fn recover(home: &Home) -> Result<Recovered, Error> {
    let mut found = Recovered::default();
    let mut complete = Vec::new();
    let (mut last, mut settled, mut empty) = (0, 0, 0);
    for half in 0..2 {
        match read(home, half) {
            Half::Empty { number } => {
                last = last.max(number);
                settled = settled.max(number);
                empty += 1;
            }
            Half::Complete {
                first,
                last: reached,
                lines,
                broken,
            } => {
                last = last.max(reached.saturating_add(u64::from(broken)));
                found.discarded |= broken;
                complete.push((first, reached, half, lines));
            }
            Half::Broken { number } => {
                found.discarded = true;
                last = last.max(number);
            }
        }
    }
    complete.sort_unstable_by_key(|(first, ..)| *first);
    if let [(_, reached, ..), (first, ..)] = complete[..]
        && reached.checked_add(1) != Some(first)
    {
        // The older half is being overwritten.
        found.discarded = true;
        complete.remove(0);
    }
    for (first, reached, _, lines) in &complete {
        if *reached > settled {
            home.replay(lines);
            let commits = (reached - first).saturating_add(1);
            let commits = u32::try_from(commits).unwrap_or(u32::MAX);
            found.replayed = found.replayed.saturating_add(commits);
        }
    }
    if empty < 2 {
        retire(
            home,
            last,
            complete.last().map_or(0, |newest| newest.2),
            true,
        )?;
    }
    // A number that an interrupted commit may have begun with is never used again.
    found.next = last.checked_add(3).ok_or(Error::Damaged {
        what: "log",
        at: home.geometry.log_at(0),
    })?;
    Ok(found)
}
