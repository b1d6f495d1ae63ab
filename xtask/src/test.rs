//! `cargo xtask test`: one call that leaves no excuse.
//!
//! Installs what is missing, builds everything, runs every test of the workspace (documentation
//! tests too, which `cargo test` includes), plants bugs in the store ([`mutants`]), and closes with
//! counts.
//!
//! # Skipped tests are counted
//! A test that cannot run here prints one line `skipped: REASON` to standard output and returns.
//! These lines, and tests that are `#[ignore]`d, are listed with their reasons at the end, so that
//! nobody takes a skipped test for a passed one.

use crate::{garage, mutants, tools, workspace};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::Path,
    process::Stdio,
    time::Instant,
};

/// Runs the command; `long` as the tests understand it (`OUTLIVE_LONG`).
pub fn run(long: bool) -> Result<()> {
    let begun = Instant::now();
    tools::ensure_all()?;
    let garage = garage::ensure()?;
    build()?;
    let (summary, passed) = test(long, &garage)?;
    let mutants = mutants::run();
    summary.print(begun.elapsed().as_secs());
    mutants?;
    if !passed {
        bail!("tests failed");
    }
    Ok(())
}

/// As `cargo test` builds: `cargo build` would make most crates a second time, since it builds the
/// procedural macros below them in another way.
fn build() -> Result<()> {
    let status = workspace::cargo()
        .args(["test", "--workspace", "--no-run"])
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the workspace does not build");
    }
    Ok(())
}

fn test(long: bool, garage: &Path) -> Result<(Summary, bool)> {
    let mut cargo = workspace::cargo();
    cargo.env("OUTLIVE_GARAGE", garage);
    if long {
        cargo.env("OUTLIVE_LONG", "1");
    }
    let mut child = cargo
        .args([
            "test",
            "--workspace",
            "--no-fail-fast",
            "--",
            "--show-output",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child
        .stdout
        .take()
        .context("cargo has no standard output")?;
    let mut summary = Summary::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read what cargo prints")?;
        let line = String::from_utf8_lossy(&line);
        if summary.take(&line) {
            println!("{line}");
        }
    }
    let status = child.wait().context("cannot wait for cargo")?;
    Ok((summary, status.success()))
}

/// What the lines of `cargo test -- --show-output` add up to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Binaries with tests.
    suites: u64,
    /// Tests that did not run, by their reason.
    skipped: BTreeMap<String, Vec<String>>,
    /// The test whose output follows.
    current: Option<String>,
    /// Within the output of tests that passed, which is not shown again.
    quiet: bool,
}

impl Summary {
    /// Takes one line in; `true` where it is to be shown.
    fn take(&mut self, line: &str) -> bool {
        if line.starts_with("test result:") {
            self.add_result(line);
            self.quiet = false;
            return true;
        }
        if line == "successes:" {
            self.quiet = true;
        } else if line == "failures:" {
            self.quiet = false;
        } else if let Some(name) = line.strip_prefix("---- ").and_then(section) {
            self.current = Some(name.to_owned());
        } else if let Some(reason) = line.strip_prefix("skipped: ") {
            let name = self.current.clone().unwrap_or_else(|| "a test".into());
            self.skipped
                .entry(reason.to_owned())
                .or_default()
                .push(name);
        } else if let Some((name, reason)) = ignored(line) {
            self.skipped.entry(reason).or_default().push(name);
        }
        !self.quiet
    }

    /// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
    fn add_result(&mut self, line: &str) {
        self.suites += 1;
        let counts = line
            .split(['.', ';'])
            .filter_map(|part| part.trim().split_once(' '));
        for (number, word) in counts {
            let Ok(number) = number.parse::<u64>() else {
                continue;
            };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    fn print(&self, seconds: u64) {
        let said: usize = self.skipped.values().map(Vec::len).sum();
        println!(
            "\n== {} suites in {} min {} s ==",
            self.suites,
            seconds / 60,
            seconds % 60
        );
        // A test that says that it skipped is among those that the test harness calls passed.
        let skipped_by_word = (said as u64).saturating_sub(self.ignored);
        let passed = self.passed.saturating_sub(skipped_by_word);
        println!(
            "{passed} passed, {} failed, {} skipped",
            self.failed, said as u64
        );
        for (reason, names) in &self.skipped {
            println!("  {} skipped: {reason}", names.len());
            for name in names {
                println!("      {name}");
            }
        }
    }
}

/// The name in `NAME stdout ----`.
fn section(rest: &str) -> Option<&str> {
    rest.strip_suffix(" stdout ----")
        .or_else(|| rest.strip_suffix(" ----"))
}

/// Name and reason in `test NAME ... ignored, REASON`.
fn ignored(line: &str) -> Option<(String, String)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    let reason = rest.trim_start_matches([',', ' ']);
    let reason = if reason.is_empty() {
        "ignored without a reason"
    } else {
        reason
    };
    Some((name.to_owned(), reason.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_reasons_add_up() {
        let output = "
running 4 tests
test a ... ok
test b ... ignored, needs two machines
test c ... ok
test d ... FAILED

successes:

---- c stdout ----
skipped: no /dev/kvm
noise

successes:
    a
    c

failures:

---- d stdout ----
assertion failed

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        let mut summary = Summary::default();
        let shown: Vec<&str> = output.lines().filter(|line| summary.take(line)).collect();
        assert!(shown.contains(&"assertion failed"));
        assert!(!shown.contains(&"noise"));
        assert_eq!((summary.passed, summary.failed, summary.ignored), (7, 1, 1));
        assert_eq!(summary.suites, 2);
        let skipped: Vec<_> = summary.skipped.iter().collect();
        assert_eq!(
            skipped[0],
            (&"needs two machines".to_owned(), &vec!["b".to_owned()])
        );
        assert_eq!(
            skipped[1],
            (&"no /dev/kvm".to_owned(), &vec!["c".to_owned()])
        );
    }
}
