//! `cargo xtask bench programs`: what keeping programs of all sorts costs.
//!
//! # How it is measured
//! - By the tests themselves (`all_sorts` in the tests of `outlive`, built in release mode): each
//!   program is killed and restored under its load, observed for a while, and judged by what it
//!   computed. A program that is found wrong fails the run: there are no figures without a right
//!   result.
//! - What is asked for is an epoch every 100 ms, the default. How many are committed a second shows
//!   what that program and this machine sustain.
//! - The tables of `docs/programs.md` are written by `--update`, never by hand.

use super::machine;
use crate::{cleanup, stats, tools, workspace};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::{fmt::Write, fs, path::Path};

/// Where the tables go.
const DOCUMENT: &str = "docs/programs.md";
const BEGIN: &str = "<!-- figures: written by `cargo xtask bench programs --update` -->";
const END: &str = "<!-- end of figures -->";

/// What can be chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Only programs whose tests' name begins so.
    #[arg(default_value = "")]
    only: String,
    /// Write the tables into docs/programs.md.
    #[arg(long, conflicts_with = "only")]
    update: bool,
}

/// What a test tells of its program.
#[derive(Debug, Deserialize)]
struct Program {
    name: String,
    load: String,
    compared: String,
    ended: String,
    restore_us: Vec<f64>,
    stop_us: Vec<f64>,
    bytes_written: Vec<f64>,
    epochs: u64,
    seconds: f64,
    processes: u64,
    threads: u64,
    memory_bytes: u64,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !tools::is_root() {
        bail!("a process gets its old PID back only by a privileged restorer: run this as root");
    }
    tools::ensure_all()?;
    let scratch = workspace::scratch()?;
    let folder = cleanup::folder(&scratch)?;
    let path = folder.join("figures");
    let filter = format!("all_sorts::{}", options.only);
    let other_work = load_average();
    let status = workspace::cargo()
        .args(["test", "--release", "-p", "outlive", "--test", "real"])
        .args([
            "--",
            &filter,
            "--skip",
            "a_changed_page",
            "--test-threads",
            "1",
        ])
        .env("OUTLIVE_FIGURES", &path)
        .env("TMPDIR", &scratch)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "a program did not come back as it was");
    let text = fs::read_to_string(&path).context("no test told any figures")?;
    let programs: Result<Vec<Program>, _> = text.lines().map(serde_json::from_str).collect();
    let programs = programs.context("the tests told what is not understood")?;
    let tables = tables(&programs, &other_work)?;
    println!("\n{tables}");
    if options.update {
        update(&workspace::root().join(DOCUMENT), &tables)?;
    }
    Ok(())
}

fn tables(programs: &[Program], other_work: &str) -> Result<String> {
    let mut out = String::new();
    writeln!(
        out,
        "| program | its load | what is compared |\n|---|---|---|"
    )?;
    for p in programs {
        writeln!(out, "| {} | {} | {} |", p.name, p.load, p.compared)?;
    }
    writeln!(
        out,
        "\n| program | restored after | processes, threads | memory | epochs/s | stop: median / p99 / max \
         | bytes an epoch, median | restore, median |\n|---|---|---|---|---|---|---|---|"
    )?;
    for p in programs {
        ensure!(p.epochs > 0 && p.seconds > 0.0, "{} had no epochs", p.name);
        writeln!(
            out,
            "| {} | {} {} | {}, {} | {} | {:.1} | {} | {} | {} |",
            p.name,
            p.restore_us.len(),
            p.ended,
            p.processes,
            p.threads,
            stats::bytes(p.memory_bytes),
            p.epochs as f64 / p.seconds,
            stats::times(&p.stop_us),
            stats::bytes(stats::median(&p.bytes_written).unwrap_or(0.0) as u64),
            stats::time(stats::median(&p.restore_us)),
        )?;
    }
    let machine = machine();
    writeln!(
        out,
        "\n{machine}; load average before the run: {other_work}."
    )?;
    Ok(out)
}

/// Of the last minute.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("not known").to_owned()
}

/// Puts the tables between their marks.
fn update(path: &Path, tables: &str) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("no {}", path.display()))?;
    let new = replaced(&text, tables)
        .with_context(|| format!("{} has no place for figures", path.display()))?;
    fs::write(path, new).with_context(|| format!("cannot write {}", path.display()))
}

fn replaced(text: &str, tables: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{tables}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_go_between_their_marks() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&text, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert_eq!(replaced(&new, "new\n").unwrap(), new);
        assert_eq!(replaced("nothing", "new"), None);
    }

    #[test]
    fn the_document_has_a_place_for_them() {
        let text = fs::read_to_string(workspace::root().join(DOCUMENT)).unwrap();
        assert!(replaced(&text, "").is_some());
    }

    #[test]
    fn what_a_test_tells_becomes_a_row() {
        let line = r#"{"name":"x","load":"l","compared":"c","ended":"kills","restore_us":[2000.0],
            "stop_us":[500,700],"durable_us":[1],"bytes_written":[4096],"epochs":30,"seconds":15.0,
            "processes":2,"threads":5,"memory_bytes":1000000}"#;
        let program: Program = serde_json::from_str(line).unwrap();
        let tables = tables(&[program], "0.1").unwrap();
        let row =
            "| x | 1 kills | 2, 5 | 1.0 MB | 2.0 | 600 µs / 700 µs / 700 µs | 4.1 kB | 2.00 ms |";
        assert!(tables.contains(row), "{tables}");
    }
}
