//! Heaps whose bytes somebody changed: the inputs that were found to matter, and as many again that dice
//! make of them. `cargo xtask fuzz heap` looks for more.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

#[path = "../fuzz/src/hostile.rs"]
mod hostile;

use hostile::stand;

/// Numbers that are the same each time.
struct Dice(u64);

impl Dice {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % below
    }
}

/// What is kept beside the fuzzer: an input a line, in hexadecimal digits.
fn corpus() -> Vec<Vec<u8>> {
    let byte = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).unwrap();
        u8::from_str_radix(digits, 16).unwrap()
    };
    let lines = include_str!("../fuzz/corpus.txt").lines();
    let inputs: Vec<Vec<u8>> = lines
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.as_bytes().chunks(2).map(byte).collect())
        .collect();
    assert!(inputs.len() > 100);
    inputs
}

#[test]
fn inputs_that_mattered_are_stood() {
    for input in corpus() {
        stand(&input);
    }
}

#[test]
fn inputs_like_those_are_stood() {
    let long = std::env::var_os("OUTLIVE_LONG").is_some();
    let corpus = corpus();
    let mut dice = Dice(20_261_121);
    for _ in 0..if long { 200_000 } else { 2000 } {
        let mut input = corpus[dice.next(corpus.len())].clone();
        for _ in 0..1 + dice.next(4) {
            let at = dice.next(input.len() + 1);
            match dice.next(3) {
                0 => input.insert(at, dice.next(256) as u8),
                1 if at < input.len() => input[at] = dice.next(256) as u8,
                _ => input.extend((0..8).map(|_| dice.next(256) as u8)),
            }
        }
        stand(&input);
    }
}
