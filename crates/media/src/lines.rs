//! A simulated persistent memory: stores, flushes of cache lines, and fences.
//!
//! A store is visible at once and durable some time later. It is durable *for certain* only after its
//! cache line was flushed and a fence followed the flush (`clwb`, `sfence`). Until then the line may
//! reach the medium at any moment, because the processor evicts it, or not at all.
//!
//! # Rules
//! - A store is cut at the borders of cache lines; each piece may be durable or not by itself,
//!   whatever was stored before or after it. This is more hostile than a processor, which keeps the
//!   order of stores to one line.
//! - In a torn state a piece is there in some of its aligned words of 8 bytes only.
//! - [`LineMemory::crash_states`] shows what may be found after a crash right now: every subset of the
//!   pieces that are not durable for certain, as long as these are few ([`Crashes::all`]); beyond that
//!   none, all, each alone, each missing alone, pairs, and subsets chosen and torn by a seed.
//! - Looking right before each fence is enough: at an earlier moment fewer pieces are open, so each
//!   state then is one of the subsets.
//!
//! Pure: no clock, no system call, nothing of `std` beyond collections; the same calls give the same
//! states.

use std::collections::BTreeSet;

/// The unit of flushing, in bytes.
pub const LINE: usize = 64;

/// How thoroughly crashes are looked at.
#[derive(Clone, Copy, Debug)]
pub struct Crashes {
    /// Up to so many open pieces all subsets are shown; 16 at most.
    pub all: usize,
    /// How many pairs are shown beyond that: there alone, and missing alone.
    pub pairs: usize,
    /// How many states are chosen, and every other one torn, by the seed.
    pub seeded: usize,
    /// The seed.
    pub seed: u64,
}

/// A piece of a store, within one line, that is not durable for certain.
#[derive(Clone, Debug)]
struct Piece {
    at: usize,
    bytes: Vec<u8>,
    /// A flush of its line followed; the next fence makes it durable.
    flushed: bool,
}

/// A persistent memory behind caches.
#[derive(Clone, Debug, Default)]
pub struct LineMemory {
    durable: Vec<u8>,
    open: Vec<Piece>,
    fences: u64,
    flushes: u64,
}

impl LineMemory {
    /// A memory that holds these bytes, durably.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            durable: bytes,
            ..Self::default()
        }
    }

    /// Makes it longer, with zeros, durably.
    pub fn grow(&mut self, len: usize) {
        let len = len.max(self.durable.len());
        self.durable.resize(len, 0);
    }

    /// Takes a store of `bytes` at `at`. What lies beyond the end is cut off.
    pub fn store(&mut self, at: usize, bytes: &[u8]) {
        let mut at = at;
        let end = self.durable.len();
        let mut rest = bytes;
        while !rest.is_empty() && at < end {
            let border = (at / LINE + 1) * LINE;
            let take = rest.len().min(border - at).min(end - at);
            self.open.push(Piece {
                at,
                bytes: rest[..take].to_vec(),
                flushed: false,
            });
            at += take;
            rest = &rest[take..];
        }
    }

    /// Flushes all lines that hold a byte of the range.
    pub fn flush(&mut self, at: usize, len: usize) {
        self.flushes += 1;
        if len == 0 {
            return;
        }
        let lines = at / LINE..=(at + len - 1) / LINE;
        for piece in &mut self.open {
            piece.flushed |= lines.contains(&(piece.at / LINE));
        }
    }

    /// Makes all that was flushed durable.
    pub fn fence(&mut self) {
        self.fences += 1;
        let mut open = Vec::new();
        // A line that was flushed went out as it was then: pieces before the flush are durable, in
        // the order of the stores.
        for piece in self.open.drain(..) {
            if piece.flushed {
                self.durable[piece.at..][..piece.bytes.len()].copy_from_slice(&piece.bytes);
            } else {
                open.push(piece);
            }
        }
        self.open = open;
    }

    /// Fences so far.
    #[must_use]
    pub fn fences(&self) -> u64 {
        self.fences
    }

    /// Calls of [`LineMemory::flush`] so far.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Pieces that are not durable for certain.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// The bytes as a program sees them.
    #[must_use]
    pub fn now(&self) -> Vec<u8> {
        self.with(|_| u64::MAX)
    }

    /// The bytes after a crash in which of each piece, by position, the aligned words whose bit is
    /// set are there.
    fn with(&self, mut words: impl FnMut(usize) -> u64) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for (i, piece) in self.open.iter().enumerate() {
            let words = words(i);
            for (k, byte) in piece.bytes.iter().enumerate() {
                let word = (piece.at + k) % LINE / 8;
                if words >> word & 1 == 1 {
                    bytes[piece.at + k] = *byte;
                }
            }
        }
        bytes
    }

    /// Shows `look` what may be found after a crash now, each state once, until it says `false`.
    /// Returns how many were shown.
    pub fn crash_states(&self, how: Crashes, look: &mut dyn FnMut(Vec<u8>) -> bool) -> usize {
        let mut shown = Shown {
            open: &self.open,
            seen: BTreeSet::new(),
            look,
            stopped: false,
        };
        let n = self.open.len();
        if n <= how.all.min(16) {
            for subset in 0..1u32 << n {
                shown.show(self.with(|i| whole(subset >> i & 1 == 1)));
            }
        } else {
            shown.show(self.with(|_| 0));
            shown.show(self.with(|_| u64::MAX));
            for one in 0..n {
                shown.show(self.with(|i| whole(i == one)));
                shown.show(self.with(|i| whole(i != one)));
            }
            self.pairs(how.pairs, &mut shown);
        }
        let mut random = how.seed | 1;
        for round in 0..if n == 0 { 0 } else { how.seeded } {
            let torn = round % 2 == 1;
            shown.show(self.with(|_| {
                let choice = next(&mut random);
                if torn { choice } else { whole(choice & 1 == 1) }
            }));
        }
        shown.seen.len()
    }

    /// Pairs that are there alone, and pairs that are missing alone, evenly spread.
    fn pairs(&self, count: usize, shown: &mut Shown<'_>) {
        let n = self.open.len();
        let all = n * (n - 1) / 2;
        let step = all.div_ceil(count.max(1)).max(1);
        let pairs = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b)));
        for (a, b) in pairs.step_by(step) {
            shown.show(self.with(|i| whole(i == a || i == b)));
            shown.show(self.with(|i| whole(i != a && i != b)));
        }
    }
}

/// Shows states, none twice.
struct Shown<'a> {
    open: &'a [Piece],
    seen: BTreeSet<[u64; 2]>,
    look: &'a mut dyn FnMut(Vec<u8>) -> bool,
    stopped: bool,
}

impl Shown<'_> {
    fn show(&mut self, state: Vec<u8>) {
        // States differ in the open pieces only.
        let pieces = self.open.iter();
        let parts = pieces.map(|piece| &state[piece.at..][..piece.bytes.len()]);
        if !self.stopped && self.seen.insert(digest(parts)) {
            self.stopped = !(self.look)(state);
        }
    }
}

fn whole(there: bool) -> u64 {
    if there { u64::MAX } else { 0 }
}

/// Tells states apart; not against anybody who tries to make two alike.
fn digest<'a>(parts: impl Iterator<Item = &'a [u8]>) -> [u64; 2] {
    let mut two = [0x9e37_79b9_7f4a_7c15u64, 0xc2b2_ae3d_27d4_eb4f];
    for chunk in parts.flat_map(|part| part.chunks(8)) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let word = u64::from_le_bytes(word);
        two[0] = (two[0] ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        two[0] ^= two[0] >> 29;
        two[1] = (two[1].rotate_left(23) ^ word).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        two[1] ^= two[1] >> 31;
    }
    two
}

/// A pseudo-random number (xorshift, multiplied).
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOW: Crashes = Crashes {
        all: 16,
        pairs: 120,
        seeded: 0,
        seed: 3,
    };

    fn states(memory: &LineMemory) -> BTreeSet<Vec<u8>> {
        let mut states = BTreeSet::new();
        memory.crash_states(HOW, &mut |state| states.insert(state));
        states
    }

    #[test]
    fn a_store_is_durable_for_certain_only_after_flush_and_fence() {
        let mut memory = LineMemory::new(vec![0; 128]);
        memory.store(0, &[1]);
        assert_eq!(states(&memory).len(), 2);
        memory.fence();
        assert_eq!(states(&memory).len(), 2, "a fence without a flush");
        memory.flush(0, 1);
        assert_eq!(states(&memory).len(), 2, "a flush without a fence");
        memory.fence();
        let states = states(&memory);
        assert_eq!(states.len(), 1);
        assert_eq!(states.first().map(|s| s[0]), Some(1));
    }

    #[test]
    fn a_store_after_the_flush_of_its_line_stays_open() {
        let mut memory = LineMemory::new(vec![0; 64]);
        memory.store(0, &[1]);
        memory.flush(0, 1);
        memory.store(8, &[2]);
        memory.fence();
        assert_eq!(memory.open(), 1);
        assert!(states(&memory).iter().all(|s| s[0] == 1));
        assert_eq!(memory.now()[8], 2);
    }

    #[test]
    fn pieces_are_lines_and_every_subset_is_shown() {
        let mut memory = LineMemory::new(vec![0; 256]);
        memory.store(60, &[7; 8]);
        memory.store(130, &[8; 4]);
        assert_eq!(memory.open(), 3);
        assert_eq!(states(&memory).len(), 8);
    }

    #[test]
    fn many_pieces_are_shown_alone_missing_in_pairs_and_torn() {
        let mut memory = LineMemory::new(vec![0; 64 * 40]);
        for line in 0..40 {
            memory.store(line * 64, &[1; 64]);
        }
        let mut torn = 0;
        let mut missing = 0;
        let shown = memory.crash_states(Crashes { seeded: 50, ..HOW }, &mut |state| {
            let there = state.iter().filter(|b| **b == 1).count();
            torn += usize::from(!there.is_multiple_of(64));
            missing += usize::from(there == 39 * 64);
            true
        });
        assert_eq!(missing, 40);
        assert!(torn > 10 && shown > 2 + 80 + 200);
    }

    #[test]
    fn what_lies_beyond_the_end_is_cut_off_until_it_grows() {
        let mut memory = LineMemory::new(vec![0; 10]);
        memory.store(8, &[1; 4]);
        assert_eq!(memory.now(), [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        memory.grow(12);
        memory.store(10, &[2; 2]);
        assert_eq!(memory.now()[8..], [1, 1, 2, 2]);
        assert_eq!(memory.fences() + memory.flushes(), 0);
    }
}
