//! `cargo xtask bench`: measurements side by side with what they are compared to, in one run.

mod heap;
mod power;
mod programs;
mod redis;
mod strategies;

use anyhow::Result;
use std::fs;

/// What can be measured.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Durable image, restore, stop times and throughput of a Redis of about 500 MB.
    Redis(redis::Options),
    /// Stop times, epochs a second and restores of programs of all sorts.
    Programs(programs::Options),
    /// The resilient heap beside libpmemobj and the collections of `std`.
    Heap(heap::Options),
    /// Power events of a Redis under write load, against its hold-up budget.
    Power(power::Options),
    /// Stops, traffic and throughput of every strategy, on a writer and a Redis.
    Strategies(strategies::Options),
}

/// Runs the command.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Redis(options) => redis::run(options),
        Command::Programs(options) => programs::run(options),
        Command::Heap(options) => heap::run(options),
        Command::Power(options) => power::run(options),
        Command::Strategies(options) => strategies::run(options),
    }
}

/// One line about the machine.
fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, name)| name);
    let cores = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let version: Vec<&str> = kernel.trim().split('.').take(2).collect();
    format!("Machine: {cores} x {model}, Linux {}", version.join("."))
}
