//! Bits that flip in the memory while the machine is off, and what of the heap they are in.

use anyhow::{Context, Result};
use std::{collections::BTreeSet, fs::File, ops::Range, os::unix::fs::FileExt, path::Path};

const PAGE: usize = 4096;
const LINE: usize = 64;
/// The parts of the kernel's heap, as `docs/heap.md` draws them: with 64 pages for each half of its log,
/// and one zone of 256 pages of data.
const ZONE: usize = (6 + 2 * 64) * PAGE;
const WORDS: usize = ZONE + 256 * PAGE;
const PARITY: usize = WORDS + 16 * PAGE;
const END: usize = PARITY + 4 * PAGE;

/// What a bit is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A copy of the superblock.
    Superblock(usize),
    /// A line of a zone, given by its place; its word counts as part of it.
    Line(usize),
    /// Anything else: the schema, the log.
    Other,
}

/// A bit that flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// Where it is.
    pub part: Part,
    /// The kernel must report it: nothing can have overwritten the place before it looked.
    pub must: bool,
}

/// What the byte at `at` is part of.
pub fn part(at: usize) -> Part {
    match at {
        0..64 => Part::Superblock(0),
        PAGE..4160 => Part::Superblock(1),
        WORDS..PARITY => Part::Line(ZONE + (at - WORDS) / 4 * LINE),
        ZONE..END => Part::Line(at / LINE * LINE),
        _ => Part::Other,
    }
}

/// Where the parity of a line is.
pub fn parity_of(line: usize) -> usize {
    match line {
        ZONE..WORDS => PARITY + (line - ZONE) % (END - PARITY),
        _ => line,
    }
}

/// The byte of the line's word.
fn word_of(line: usize) -> usize {
    WORDS + (line - ZONE) / LINE * 4
}

/// Flips bits: half of them in the archive, whose place the kernel told, in its words, or in the superblock;
/// the others anywhere. At most one in each line.
pub fn flip(
    memory: &Path,
    dice: &mut fastrand::Rng,
    archive: Option<Range<usize>>,
    count: usize,
) -> Result<Vec<Flip>> {
    let file = File::options().read(true).write(true).open(memory);
    let file = file.with_context(|| format!("opening {}", memory.display()))?;
    let (mut hit, mut flips) = (BTreeSet::new(), Vec::new());
    // Until the kernel has made a heap, there is nothing to hit.
    let Some(archive) = archive else {
        return Ok(flips);
    };
    for n in 0..count {
        let line = dice.usize(archive.clone()) / LINE * LINE;
        let (at, must) = match (n % 2, dice.u32(..8)) {
            (1, _) => (dice.usize(..END), false),
            (_, 0) => (dice.usize(..2) * PAGE + dice.usize(..LINE), true),
            (_, 1..4) => (word_of(line) + dice.usize(..4), true),
            // The first line may have other data in it, too.
            _ => (dice.usize(archive.clone()), archive.start <= line),
        };
        let part = part(at);
        if part != Part::Other && !hit.insert(part) {
            continue;
        }
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64)?;
        byte[0] ^= 1 << dice.u32(..8);
        file.write_all_at(&byte, at as u64)?;
        flips.push(Flip { part, must });
    }
    Ok(flips)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_part_of_what_the_document_says() {
        assert_eq!(part(0), Part::Superblock(0));
        assert_eq!(part(PAGE + 63), Part::Superblock(1));
        assert_eq!(part(PAGE + 64), Part::Other);
        assert_eq!(part(ZONE - 1), Part::Other);
        assert_eq!(part(ZONE + 65), Part::Line(ZONE + 64));
        assert_eq!(part(word_of(ZONE + 640) + 3), Part::Line(ZONE + 640));
        assert_eq!(part(PARITY + 1), Part::Line(PARITY));
        assert_eq!(parity_of(ZONE + 4 * PAGE + 64), PARITY + 64);
        assert_eq!(part(END), Part::Other);
    }

    #[test]
    fn as_many_bits_flip_as_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        std::fs::write(&path, vec![0; END]).unwrap();
        let archive = ZONE + 4096..ZONE + 40_000;
        let mut dice = fastrand::Rng::with_seed(1);
        assert!(flip(&path, &mut dice, None, 20).unwrap().is_empty());
        let flips = flip(&path, &mut dice, Some(archive), 20).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let found: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(found as usize, flips.len());
        let must = flips.iter().filter(|flip| flip.must).count();
        assert!(must > 0 && must < flips.len());
    }
}
