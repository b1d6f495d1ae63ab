//! The developer's one door: `cargo xtask test`, `demo`, `bench`, `lab`, `torture`, `mutants`.
//!
//! # Rules
//! - One file (or folder) per command; what two commands need stands in a module of its own.
//! - Outlive is used as a user uses it: through its command line, JSON output and exit codes,
//!   never through its crates, so that what is shown here holds for everybody.
//! - Whatever happens (success, failure, Ctrl-C), every process and every file that was made here
//!   is gone afterwards; see [`cleanup`].

mod bench;
mod cleanup;
mod demo;
mod fuzz;
mod garage;
mod inherited;
mod lab;
mod model;
mod mutants;
mod outlive;
mod redis;
mod resp;
mod stats;
mod test;
mod tools;
mod torture;
mod workspace;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The developer's one door.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what the tests need, builds everything, runs every test, counts what was skipped.
    Test {
        /// The long form: 10,000 stops, 500 deaths, 200 random kills.
        #[arg(long)]
        long: bool,
    },
    /// Kills a real Redis at random moments, restores it, and compares every key.
    Demo(demo::Options),
    /// Boots imitated machines, cuts their power, and restores under other kernels and processors.
    Lab(lab::Options),
    /// Plants bugs in the epoch store, one at a time, and shows the test that catches each.
    Mutants,
    /// Puts the epoch store through power cuts, errors, lies and damage, and counts.
    Torture(torture::Options),
    /// Looks for bytes that a format cannot stand.
    Fuzz(fuzz::Options),
    /// Measures, side by side with what it is compared to.
    #[command(subcommand)]
    Bench(bench::Command),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = run(cli);
    cleanup::everything();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    inherited::close()?;
    cleanup::install()?;
    match cli.command {
        Command::Test { long } => test::run(long),
        Command::Demo(options) => demo::run(&options),
        Command::Lab(options) => lab::run(&options),
        Command::Mutants => mutants::run(),
        Command::Torture(options) => torture::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Bench(command) => bench::run(&command),
    }
}
