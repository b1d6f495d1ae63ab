//! A pipeline: bash, a second bash, gzip; the compressed file is compared byte by byte.

use super::{Program, file, same_undisturbed, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};

const PROGRAM: Program = Program {
    name: "bash and gzip",
    load: "lines through a pipeline of two shells and gzip into a file",
    compared: "the compressed file, byte by byte, with that of an undisturbed pipeline",
    prepare: |place| line(place, "0", "0.002"),
    judge: |place| {
        same_undisturbed(
            place,
            |rounds| line(place, rounds, "0"),
            &["packed", "result"],
        )
    },
    spot: Spot {
        process: "bash",
        text: b"cell 0001",
        copies: false,
    },
};

fn line(place: &Place, rounds: &str, pace: &str) -> Vec<String> {
    let script = file(place, "pipeline.sh", include_str!("loads/pipeline.sh"));
    words([&installed("bash"), &script, rounds, pace])
}

tests!(PROGRAM);
