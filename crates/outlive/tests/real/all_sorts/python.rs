//! CPython: threads, an SQLite database in memory, a child that is asked over pipes.

use super::{Program, file, same_undisturbed, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};

const PROGRAM: Program = Program {
    name: "CPython with SQLite",
    load: "3 threads take turns with a database in memory; a child answers over pipes",
    compared: "all tables and all answers, with an undisturbed run of as many rounds",
    prepare: |place| line(place, "0", "0.002"),
    judge: |place| same_undisturbed(place, |rounds| line(place, rounds, "0"), &["result"]),
    spot: Spot {
        process: "python3",
        text: b"cell 0001",
        copies: false,
    },
};

fn line(place: &Place, rounds: &str, pace: &str) -> Vec<String> {
    let script = file(place, "ledger.py", include_str!("loads/ledger.py"));
    words([&installed("python3"), "-I", &script, rounds, pace])
}

tests!(PROGRAM);
