//! The binary with real programs, as a user has it: what is refused and how, what dies and comes
//! back, what passes through. All of it needs root, and says so where that is missing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "all of this is test code"
)]

mod all_sorts;
mod bad_images;
mod bench;
mod device;
mod elsewhere;
mod files;
mod garage;
mod kills;
mod lazy;
mod long_life;
mod no_space;
mod objects;
mod owners;
mod pid_namespace;
mod power;
mod programs;
mod refusals;
mod servers;
mod support;
mod terminal;
mod trees;
