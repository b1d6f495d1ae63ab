//! Node.js: timers, promises, worker threads, memory that they share, compiled JavaScript.

use super::{Program, file, same_undisturbed, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};

const PROGRAM: Program = Program {
    name: "Node.js",
    load: "timers and 2 worker threads with shared memory; compiling and collecting garbage",
    compared: "all answers of the workers, with an undisturbed run of as many rounds",
    prepare: |place| line(place, "0", "2"),
    judge: |place| same_undisturbed(place, |rounds| line(place, rounds, "0"), &["result"]),
    spot: Spot {
        process: "node",
        text: b"cell 0001",
        copies: false,
    },
};

fn line(place: &Place, rounds: &str, pace: &str) -> Vec<String> {
    let script = file(place, "ledger.js", include_str!("loads/ledger.js"));
    words([&installed("node"), &script, rounds, pace])
}

tests!(PROGRAM);
