//! A program of our own that checks itself: vector registers, shared memory, timers.

use super::{Program, all_were_counted, words};
use crate::all_sorts::spoil::Spot;
use crate::support::test_program;

const PROGRAM: Program = Program {
    name: "a self-checking Rust program",
    load: "4 threads and a child: vector registers, a futex in shared memory, two timers",
    compared: "every register, turn, tick and cell with what it must be, all the time",
    prepare: |_| words([&test_program("orchestra"), "1"]),
    judge: all_were_counted,
    spot: Spot {
        process: "orchestra",
        text: b"cell 0001",
        copies: false,
    },
};

tests!(PROGRAM);
