//! `cargo xtask torture`: the epoch store under everything that can befall it, for so many minutes.
//!
//! The trials stand beside the tests of the store (`crates/epoch-store/tests/common`) and run on a
//! simulated disk, with optimisation. A violation is printed with what leads to it again.

use crate::workspace;
use anyhow::{Context, Result, bail};

/// What is asked for.
#[derive(clap::Args)]
pub struct Options {
    /// How long, in minutes.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Where the dice begin; without it, anywhere. It is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Leads only this life of the seed, as a violation names it.
    #[arg(long, requires = "seed")]
    life: Option<u64>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let seed = options.seed.unwrap_or_else(|| u64::from(fastrand::u32(..)));
    let mut cargo = workspace::cargo();
    cargo.args([
        "run",
        "--release",
        "-q",
        "-p",
        "outlive-epoch-store",
        "--example",
        "torture",
        "--",
    ]);
    cargo.arg(options.minutes.to_string()).arg(seed.to_string());
    if let Some(life) = options.life {
        cargo.arg(life.to_string());
    }
    let status = cargo.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the store did not stand it (seed {seed})");
    }
    Ok(())
}
