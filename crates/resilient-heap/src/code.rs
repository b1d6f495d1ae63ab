//! The code of a line: finds what changed, and corrects up to two flipped bits.
//!
//! 64 bytes and their 32-bit word of CRC-32C form a code word of 544 bits. The polynomial has
//! Hamming distance 6 at this length (a test checks it): every change of up to five bits is found, up
//! to two are corrected, and a burst of up to 32 bits is found. Anything else passes with a chance of
//! 2^-32.
//!
//! A *correction* is less certain than finding: of lines with random contents, one in 29 000 is by
//! chance within two bits of a code word, and one in 7.9 million within one bit. Whoever corrects must
//! have it confirmed (see `column`) or live with these odds.
//!
//! The word is mixed with a *seed* made of the heap's identity and the place of the line, so that a line
//! that was written to a wrong place or stems from another heap does not pass.
//!
//! # Safety
//! One use of an instruction that not every processor has; it is reached only after `cpuid` said that
//! this one does.
#![allow(unsafe_code)]

/// Bytes of a line.
pub const LINE: usize = 64;

/// The contents of a line.
pub type Line = [u8; LINE];

/// CRC-32C, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        tables[0][i] = crc;
        i += 1;
    }
    let mut k = 1;
    while k < 8 {
        let mut i = 0;
        while i < 256 {
            let before = tables[k - 1][i];
            tables[k][i] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            i += 1;
        }
        k += 1;
    }
    tables
}

/// CRC-32C without the usual inversions, so that it is linear: the word of a difference is the
/// difference of the words.
#[must_use]
pub fn crc(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if hardware::offered() {
        // SAFETY: `offered` asked the processor for SSE 4.2.
        return unsafe { hardware::crc(bytes) };
    }
    portable(bytes)
}

/// The same of a line.
#[must_use]
#[inline]
pub fn line_crc(line: &Line) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if hardware::offered() {
        // SAFETY: `offered` asked the processor for SSE 4.2.
        return unsafe { hardware::line_crc(line) };
    }
    portable(line)
}

/// The same on any processor, eight bytes at a time.
fn portable(bytes: &[u8]) -> u32 {
    let mut crc = 0u32;
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let x = u64::from_le_bytes(*word) ^ u64::from(crc);
        crc = (0..8).fold(0, |sum, k| {
            sum ^ TABLES[7 - k][(x >> (8 * k) & 0xff) as usize]
        });
    }
    rest.iter().fold(crc, |crc, byte| {
        crc >> 8 ^ TABLES[0][((crc ^ u32::from(*byte)) & 0xff) as usize]
    })
}

#[cfg(target_arch = "x86_64")]
mod hardware {
    use core::arch::x86_64::{__cpuid, _mm_crc32_u8, _mm_crc32_u64};
    use core::sync::atomic::{AtomicU8, Ordering};

    /// 0: not asked yet, 1: no, 2: yes.
    static ASKED: AtomicU8 = AtomicU8::new(0);

    /// Whether the processor has SSE 4.2.
    #[inline]
    pub fn offered() -> bool {
        match ASKED.load(Ordering::Relaxed) {
            0 => ask(),
            answer => answer == 2,
        }
    }

    #[cold]
    fn ask() -> bool {
        #[allow(unused_unsafe, reason = "safe in newer compilers")]
        // SAFETY: every x86-64 processor has `cpuid`, and leaf 1.
        let yes = unsafe { __cpuid(1) }.ecx >> 20 & 1 == 1;
        ASKED.store(1 + u8::from(yes), Ordering::Relaxed);
        yes
    }

    /// # Safety
    /// The processor must have SSE 4.2.
    #[target_feature(enable = "sse4.2")]
    pub unsafe fn line_crc(line: &super::Line) -> u32 {
        let (words, _) = line.as_chunks::<8>();
        words
            .iter()
            .fold(0, |crc, word| _mm_crc32_u64(crc, u64::from_le_bytes(*word))) as u32
    }

    /// # Safety
    /// The processor must have SSE 4.2.
    #[target_feature(enable = "sse4.2")]
    pub unsafe fn crc(bytes: &[u8]) -> u32 {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut crc = 0u64;
        for word in words {
            crc = _mm_crc32_u64(crc, u64::from_le_bytes(*word));
        }
        rest.iter()
            .fold(crc as u32, |crc, byte| _mm_crc32_u8(crc, *byte))
    }
}

/// A number that depends on all bits of both.
#[must_use]
#[inline]
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for factor in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ x >> 30).wrapping_mul(factor);
    }
    x ^ x >> 31
}

/// The seed of a line: which heap, which place.
#[must_use]
pub fn seed(heap: u64, place: u64) -> u32 {
    (mix(heap, place) >> 16) as u32
}

/// What flipped in a code word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    /// The line as it was.
    pub line: Line,
    /// The word as it was.
    pub word: u32,
    /// How many bits flipped.
    pub bits: u32,
}

/// Finds the code word within two flipped bits of this one, if there is one.
#[must_use]
pub fn correct(line: &Line, word: u32) -> Option<Correction> {
    let syndrome = crc(line) ^ word;
    if syndrome == 0 {
        return Some(Correction {
            line: *line,
            word,
            bits: 0,
        });
    }
    let table = syndromes();
    let find = |wanted: u32| {
        let at = table.binary_search_by_key(&wanted, |(s, _)| *s).ok()?;
        table.get(at).map(|(_, bit)| *bit)
    };
    let flip = |bits: &[u16]| {
        let mut fixed = Correction {
            line: *line,
            word,
            bits: bits.len() as u32,
        };
        for bit in bits {
            match usize::from(*bit).checked_sub(LINE * 8) {
                Some(bit) => fixed.word ^= 1 << bit,
                None => fixed.line[usize::from(*bit) / 8] ^= 1 << (bit % 8),
            }
        }
        fixed
    };
    if let Some(bit) = find(syndrome) {
        return Some(flip(&[bit]));
    }
    table
        .iter()
        .find_map(|(one, bit)| find(syndrome ^ one).map(|other| flip(&[*bit, other])))
}

/// Each bit of a code word with the syndrome of its flip, sorted by syndrome.
fn syndromes() -> [(u32, u16); LINE * 8 + 32] {
    let mut table = [(0, 0); LINE * 8 + 32];
    for (bit, entry) in table.iter_mut().enumerate() {
        let syndrome = match bit.checked_sub(LINE * 8) {
            Some(bit) => 1 << bit,
            None => {
                let mut line = [0; LINE];
                line[bit / 8] = 1 << (bit % 8);
                crc(&line)
            }
        };
        *entry = (syndrome, bit as u16);
    }
    table.sort_unstable();
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    fn sample() -> Line {
        core::array::from_fn(|i| (i * 37 + 11) as u8)
    }

    #[test]
    fn both_ways_to_compute_agree_and_are_crc_32c() {
        for len in 0..100 {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + 3) as u8).collect();
            assert_eq!(crc(&bytes), portable(&bytes));
            if let Some(line) = bytes.first_chunk() {
                assert_eq!(line_crc(line), portable(line));
            }
        }
        // The published check value of CRC-32C for "123456789" is 0xe3069283, with inversions: those
        // amount to a different first state, that is, to a change of the first four bytes.
        let mut bytes = *b"123456789";
        bytes[..4].iter_mut().for_each(|b| *b ^= 0xff);
        assert_eq!(!crc(&bytes), 0xe306_9283);
    }

    /// No change of up to five bits is a code word: single and double flips all have different
    /// syndromes (no code word of weight 4 or less), and the polynomial has the factor x+1, so that
    /// none has weight 5.
    #[test]
    fn the_distance_is_six() {
        let table = syndromes();
        let mut seen = BTreeSet::new();
        for (i, (one, _)) in table.iter().enumerate() {
            assert!(*one != 0 && seen.insert(*one));
            for (other, _) in &table[i + 1..] {
                assert!(seen.insert(one ^ other));
            }
        }
        // With x+1 as a factor every code word has even weight, and so the bits of a syndrome have
        // the parity of the number of flips, under one fixed mask.
        let odd = |syndrome: u32, mask: u32| (syndrome & mask).count_ones() % 2 == 1;
        let mask = u32::MAX;
        assert!(table.iter().all(|(syndrome, _)| odd(*syndrome, mask)));
    }

    #[test]
    fn every_single_and_every_double_flip_is_corrected() {
        let line = sample();
        let word = crc(&line);
        let flip = |line: &mut Line, word: &mut u32, bit: usize| {
            if bit < 512 {
                line[bit / 8] ^= 1 << (bit % 8);
            } else {
                *word ^= 1 << (bit - 512);
            }
        };
        for a in 0..544 {
            let (mut bad, mut bad_word) = (line, word);
            flip(&mut bad, &mut bad_word, a);
            let fixed = correct(&bad, bad_word).unwrap();
            assert_eq!((fixed.line, fixed.word, fixed.bits), (line, word, 1));
            for b in (a + 1..544).step_by(97) {
                let (mut bad, mut bad_word) = (bad, bad_word);
                flip(&mut bad, &mut bad_word, b);
                let fixed = correct(&bad, bad_word).unwrap();
                assert_eq!((fixed.line, fixed.word, fixed.bits), (line, word, 2));
            }
        }
    }

    #[test]
    fn three_flips_are_found_and_not_corrected() {
        let line = sample();
        let word = crc(&line);
        for a in 0..200 {
            let mut bad = line;
            for bit in [a, a + 101, a + 202] {
                bad[bit / 8] ^= 1 << (bit % 8);
            }
            assert_eq!(correct(&bad, word), None);
        }
    }
}
