//! A column: lines that share one parity line, and what to do when some of them are damaged.
//!
//! Pure. Each member has its own word (see `code`), which finds damage and proposes a correction; the
//! parity line is the sum (exclusive or) of all members, proposes the contents of one member, and
//! confirms corrections. A correction counts if
//! - the parity proposes it, and the word agrees; or
//! - the word proposes it, and afterwards the parity agrees but for at most two bits; or
//! - the word proposes the flip of a single bit (one in 7.9 million lines with random contents would
//!   be taken for such a one).
//!
//! Where contents and parity agree and a single member's word does not, the word was damaged. With
//! more than one such member that conclusion would be unsafe: two lines damaged in the same way cancel
//! each other in the parity. What cannot be corrected is *lost*, and stays as it is.

use crate::code::{self, LINE, Line};
use alloc::vec::Vec;

/// A line of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// What is stored.
    pub line: Line,
    /// The word that is stored, without its seed.
    pub word: u32,
}

impl Member {
    /// Whether the word fits.
    #[must_use]
    pub fn fits(&self) -> bool {
        code::line_crc(&self.line) == self.word
    }
}

/// What became of a column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Members that were corrected in place, by position.
    pub corrected: Vec<usize>,
    /// Members that could not be.
    pub lost: Vec<usize>,
    /// The parity line as it should be, if it is not; only where nothing is lost.
    pub parity: Option<Line>,
}

/// The sum of lines.
#[must_use]
pub fn sum<'a>(lines: impl Iterator<Item = &'a Line>) -> Line {
    lines.fold([0; LINE], |sum, line| add(&sum, line))
}

/// The sum of two lines.
#[must_use]
pub fn add(a: &Line, b: &Line) -> Line {
    core::array::from_fn(|i| a[i] ^ b[i])
}

/// Whether two lines differ in at most two bits.
fn near(a: &Line, b: &Line) -> bool {
    let bits: u32 = a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum();
    bits <= 2
}

/// Corrects what can be corrected of `members`, in place.
#[must_use]
pub fn heal(members: &mut [Member], parity: &Line) -> Outcome {
    let bad: Vec<usize> = (0..members.len()).filter(|i| !members[*i].fits()).collect();
    let mut outcome = match bad.as_slice() {
        [] => Outcome::default(),
        [one] => heal_one(members, *one, parity),
        many => heal_many(members, many, parity),
    };
    let total = sum(members.iter().map(|m| &m.line));
    if outcome.lost.is_empty() && total != *parity {
        outcome.parity = Some(total);
    }
    outcome
}

fn corrected(members: Vec<usize>) -> Outcome {
    Outcome {
        corrected: members,
        ..Outcome::default()
    }
}

fn lost(members: Vec<usize>) -> Outcome {
    Outcome {
        lost: members,
        ..Outcome::default()
    }
}

fn heal_one(members: &mut [Member], at: usize, parity: &Line) -> Outcome {
    let others = members.iter().enumerate().filter(|(i, _)| *i != at);
    let by_parity = add(&sum(others.map(|(_, m)| &m.line)), parity);
    let member = &mut members[at];
    if by_parity == member.line {
        member.word = code::crc(&member.line);
        return corrected([at].into());
    }
    if code::crc(&by_parity) == member.word {
        member.line = by_parity;
        return corrected([at].into());
    }
    // The parity line itself is damaged, or the word is, too.
    match code::correct(&member.line, member.word) {
        Some(fix) if fix.bits == 1 || near(&fix.line, &by_parity) => {
            (member.line, member.word) = (fix.line, fix.word);
            corrected([at].into())
        }
        _ => lost([at].into()),
    }
}

fn heal_many(members: &mut [Member], bad: &[usize], parity: &Line) -> Outcome {
    let mut trial = members.to_vec();
    let mut beyond = Vec::new();
    let mut single = Vec::new();
    for at in bad {
        match code::correct(&trial[*at].line, trial[*at].word) {
            Some(fix) => {
                (trial[*at].line, trial[*at].word) = (fix.line, fix.word);
                if fix.bits == 1 {
                    single.push(*at);
                }
            }
            None => beyond.push(*at),
        }
    }
    let agreed = match beyond.as_slice() {
        [] => near(&sum(trial.iter().map(|m| &m.line)), parity),
        [one] => {
            let others = trial.iter().enumerate().filter(|(i, _)| i != one);
            trial[*one].line = add(&sum(others.map(|(_, m)| &m.line)), parity);
            trial[*one].fits()
        }
        _ => false,
    };
    if agreed {
        members.clone_from_slice(&trial);
        return corrected(bad.to_vec());
    }
    // No agreement: only single flips count.
    let mut outcome = Outcome::default();
    for at in bad {
        if single.contains(at) {
            members[*at] = trial[*at].clone();
            outcome.corrected.push(*at);
        } else {
            outcome.lost.push(*at);
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    fn column(n: usize) -> (Vec<Member>, Line) {
        let members: Vec<Member> = (0..n)
            .map(|i| {
                let line: Line = core::array::from_fn(|k| (i * 31 + k * 7 + 1) as u8);
                let word = code::crc(&line);
                Member { line, word }
            })
            .collect();
        let parity = sum(members.iter().map(|m| &m.line));
        (members, parity)
    }

    #[test]
    fn a_trashed_line_comes_back_from_the_parity() {
        let (good, parity) = column(8);
        for at in 0..8 {
            let mut members = good.clone();
            members[at].line = [0xa5; LINE];
            let outcome = heal(&mut members, &parity);
            assert_eq!(outcome, corrected(vec![at]));
            assert_eq!(members, good);
        }
    }

    #[test]
    fn a_trashed_word_is_made_again() {
        let (good, parity) = column(8);
        let mut members = good.clone();
        members[3].word ^= 0xdead_beef;
        assert_eq!(heal(&mut members, &parity), corrected(vec![3]));
        assert_eq!(members, good);
    }

    #[test]
    fn a_trashed_parity_is_made_again() {
        let (mut members, parity) = column(8);
        let outcome = heal(&mut members, &[9; LINE]);
        assert_eq!(outcome.parity, Some(parity));
        assert!(outcome.corrected.is_empty() && outcome.lost.is_empty());
    }

    #[test]
    fn a_line_beyond_correction_comes_back_beside_one_that_corrects_itself() {
        let (good, parity) = column(8);
        let mut members = good.clone();
        members[2].line = [1; LINE];
        members[5].line[7] ^= 0x81;
        let outcome = heal(&mut members, &parity);
        assert_eq!(outcome, corrected(vec![2, 5]));
        assert_eq!(members, good);
    }

    #[test]
    fn two_trashed_lines_are_lost_even_if_they_cancel_each_other() {
        let (mut members, _) = column(8);
        members[1] = members[0].clone();
        let parity = sum(members.iter().map(|m| &m.line));
        members[0].line = [0; LINE];
        members[1].line = [0; LINE];
        assert_eq!(heal(&mut members, &parity), lost(vec![0, 1]));
    }

    #[test]
    fn a_trashed_line_with_a_trashed_parity_is_lost() {
        let (mut members, _) = column(8);
        members[1].line = [0x3c; LINE];
        assert_eq!(heal(&mut members, &[0x77; LINE]), lost(vec![1]));
    }

    proptest! {
        /// Whatever happens to up to three places of a column: what is called healthy or corrected
        /// is right, and what is not right is called lost.
        #[test]
        fn nothing_is_silently_wrong(
            damage in prop::collection::vec((0..10usize, 0..68usize, 1..=255u8, any::<bool>()), 0..4),
        ) {
            let (good, parity) = column(9);
            let (mut members, mut bad_parity) = (good.clone(), parity);
            for (which, byte, flip, all) in damage {
                let Some(member) = members.get_mut(which) else {
                    bad_parity[byte % LINE] ^= flip;
                    continue;
                };
                if all {
                    member.line = core::array::from_fn(|i| (i as u8).wrapping_mul(flip) ^ 0x5a);
                } else if byte < LINE {
                    member.line[byte] ^= flip;
                } else {
                    member.word ^= u32::from(flip) << (8 * (byte - LINE));
                }
            }
            let outcome = heal(&mut members, &bad_parity);
            for (i, member) in members.iter().enumerate() {
                prop_assert!(*member == good[i] || outcome.lost.contains(&i));
            }
            if outcome.lost.is_empty() {
                prop_assert_eq!(outcome.parity.unwrap_or(bad_parity), parity);
            }
        }
    }
}
