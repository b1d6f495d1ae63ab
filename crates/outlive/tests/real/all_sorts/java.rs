//! A Java virtual machine: garbage collection and compilation while threads work.

use super::{Program, file, same_undisturbed, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};
use std::process::Command;

const PROGRAM: Program = Program {
    name: "Java (HotSpot)",
    load: "2 threads make garbage and hot loops in a heap of 64 MB; G1 and the compilers at work",
    compared: "all sums and the heap's tables, with an undisturbed run of as many rounds",
    prepare: |place| {
        let source = file(place, "Ledger.java", include_str!("loads/Ledger.java"));
        let mut compiler = Command::new(installed("javac"));
        let compiled = compiler.args(["-d", &place.text("."), &source]).status();
        assert!(compiled.unwrap().success());
        line(place, "0", "2")
    },
    judge: |place| same_undisturbed(place, |rounds| line(place, rounds, "0"), &["result"]),
    spot: Spot {
        process: "java",
        text: b"cell 0001",
        copies: false,
    },
};

fn line(place: &Place, rounds: &str, pace: &str) -> Vec<String> {
    let (java, classes) = (installed("java"), place.text("."));
    words([
        &java,
        "-XX:+UseG1GC",
        "-Xmx64m",
        "-cp",
        &classes,
        "Ledger",
        rounds,
        pace,
    ])
}

tests!(PROGRAM);
