//! `cargo xtask mutants`: bugs on purpose in the epoch store, each caught by a test with a name.
//!
//! The bugs are hooks in the code of the store, which are there only with the feature `planted`; the
//! list of them, with their tests, is `crates/epoch-store/tests/planted.rs`.

use crate::workspace;
use anyhow::{Context, Result, bail};

/// Runs the command.
pub fn run() -> Result<()> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "-q", "-p", "outlive-epoch-store"]);
    cargo.args(["--features", "planted", "--test", "planted", "--"]);
    cargo.args(["--exact", "every_planted_bug_is_caught", "--nocapture"]);
    let status = cargo.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("a planted bug was not caught");
    }
    Ok(())
}
