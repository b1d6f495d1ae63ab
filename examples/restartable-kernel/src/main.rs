//! A kernel whose processes go on after a hard reset.
//!
//! All that counts is in a resilient heap in memory that survives: the list of processes, a counter for
//! each, and all memory and registers of two programs that know nothing of it. What is in ordinary memory
//! is a copy, and is made anew when the machine comes up. See `README.md`.
//!
//! # Safety
//! Files that talk to the processor open `unsafe` themselves and say why it is right.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod basics;
mod mixer;
mod primes;
mod processor;
mod report;
mod schedule;
mod serial;
mod state;
mod survivor;
mod user;

use alloc::string::String;
use serial::say;

/// Everything, once `boot.s` has the processor in 64 bits. `info` is what the machine says about itself.
fn run(info: u32) -> Result<(), String> {
    basics::give_out_memory();
    processor::prepare();
    let (at, len) = acpi::find_memory_that_survives(info)?;
    let memory = survivor::Survivor::map(at, len)?;
    schedule::Schedule::begin(memory)?.run_for_ever()
}
