//! `cargo xtask fuzz`: looks for bytes that a format cannot stand, by libFuzzer, for so many minutes.
//!
//! The harness is a workspace of its own (`crates/resilient-heap/fuzz`), built with flags that let libFuzzer see
//! which code an input reaches; a stable compiler has them. What is found stands in a file; put it into
//! `fuzz/corpus.txt`, as a line of hexadecimal digits, and the tests go through it from then on. Before that, those
//! that are there already run under valgrind, which sees reads and writes outside of allocations and decisions
//! that depend on bytes which nobody wrote.

use crate::{tools, workspace};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::{fs, path::Path, process::Command};

/// What the compiler adds for libFuzzer.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";
/// The target is named, so that the flags are not for what builds it.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What is asked for.
#[derive(clap::Args)]
pub struct Options {
    /// Whose format.
    what: What,
    /// How long, in minutes.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Where the dice begin; without it, anywhere. It is printed.
    #[arg(long)]
    seed: Option<u32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Files of the resilient heap.
    Heap,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let What::Heap = options.what;
    tools::ensure(&["c++", "valgrind"])?;
    memcheck()?;
    let harness = workspace::root().join("crates/resilient-heap/fuzz");
    let target = workspace::target().join("fuzz");
    let status = workspace::cargo()
        .current_dir(&harness)
        .args(["build", "--release", "--target", TARGET])
        .env("RUSTFLAGS", FLAGS)
        .env("CARGO_TARGET_DIR", &target)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the fuzzer does not build: {status}");
    }
    let known = target.join("known-heap");
    unpack(&harness.join("corpus.txt"), &known)?;
    // What it learns stays for the next time; the first of two folders is the one that it adds to.
    let learnt = target.join("learnt-heap");
    fs::create_dir_all(&learnt)?;
    let seed = options.seed.unwrap_or_else(|| fastrand::u32(1..));
    let status = Command::new(target.join(TARGET).join("release/heap"))
        .arg(format!("-max_total_time={}", options.minutes * 60))
        .arg(format!("-seed={seed}"))
        .arg(format!("-artifact_prefix={}/found-", target.display()))
        .args(["-max_len=256", "-timeout=20", "-rss_limit_mb=1024"])
        .args(["-print_final_stats=1", "-verbosity=1"])
        .arg(&learnt)
        .arg(&known)
        .status()
        .context("cannot start the fuzzer")?;
    if !status.success() {
        bail!("the heap did not stand it (seed {seed}); the input is named above");
    }
    println!("fuzz: the heap stood it (seed {seed})");
    Ok(())
}

/// The known inputs, under valgrind.
fn memcheck() -> Result<()> {
    let runner = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
    let status = workspace::cargo()
        .args(["test", "-q", "-p", "resilient-heap", "--test", "hostile"])
        .args(["--", "inputs_that_mattered_are_stood"])
        .env(runner, "valgrind -q --error-exitcode=9")
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("a known input, or what it does to memory, is wrong");
    }
    Ok(())
}

/// Makes a file of each line.
fn unpack(corpus: &Path, folder: &Path) -> Result<()> {
    let text =
        fs::read_to_string(corpus).with_context(|| format!("cannot read {}", corpus.display()))?;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    for (n, line) in text.lines().enumerate() {
        if !line.starts_with('#') {
            let input = bytes(line).with_context(|| {
                format!("line {} of {} is not hexadecimal", n + 1, corpus.display())
            })?;
            fs::write(folder.join(format!("{n:04}")), input)?;
        }
    }
    Ok(())
}

/// The bytes that hexadecimal digits stand for.
fn bytes(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2).map(|pair| {
        let [high, low] = <[u8; 2]>::try_from(pair).ok()?;
        let value = |digit: u8| char::from(digit).to_digit(16);
        u8::try_from(value(high)? << 4 | value(low)?).ok()
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_become_bytes_or_nothing() {
        assert_eq!(bytes("00fFa1"), Some(vec![0, 255, 161]));
        assert_eq!(bytes(""), Some(vec![]));
        assert_eq!(bytes("123"), None);
        assert_eq!(bytes("1g"), None);
    }

    #[test]
    fn every_line_becomes_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let (corpus, folder) = (dir.path().join("corpus.txt"), dir.path().join("known"));
        fs::write(&corpus, "# what it is\n0102\nff\n").unwrap();
        for _ in 0..2 {
            unpack(&corpus, &folder).unwrap();
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
        }
        assert_eq!(fs::read(folder.join("0001")).unwrap(), [1, 2]);
        fs::write(&corpus, "01\nxx\n").unwrap();
        let error = unpack(&corpus, &folder).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
