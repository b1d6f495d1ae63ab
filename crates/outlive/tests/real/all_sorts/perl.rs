//! Perl: hashes, regular expressions, and a forked child that is asked over pipes.

use super::{Program, file, same_undisturbed, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};

const PROGRAM: Program = Program {
    name: "Perl",
    load: "sums of a hash; a forked child answers over pipes",
    compared: "all sums and all answers, with an undisturbed run of as many rounds",
    prepare: |place| line(place, "0", "0.002"),
    judge: |place| same_undisturbed(place, |rounds| line(place, rounds, "0"), &["result"]),
    spot: Spot {
        process: "perl",
        text: b"cell 0001",
        copies: false,
    },
};

fn line(place: &Place, rounds: &str, pace: &str) -> Vec<String> {
    let script = file(place, "ledger.pl", include_str!("loads/ledger.pl"));
    words([&installed("perl"), &script, rounds, pace])
}

tests!(PROGRAM);
