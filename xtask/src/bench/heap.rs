//! `cargo xtask bench heap`: the resilient heap beside libpmemobj and the collections of `std`.
//!
//! # How it is measured
//! - The same keys in the same order, one transaction for each change, one lock around each structure:
//!   `workloads` among the test programs, and `pmdk/workloads.c` beside them, which is compiled here.
//! - The same medium and the same durability: in memory (`/dev/shm`) both flush lines by instructions of
//!   the processor, libpmemobj by `PMEM_IS_PMEM_FORCE=1`; on a disk both call `msync(2)`,
//!   `PMEM_IS_PMEM_FORCE=0`.
//! - All kinds take turns, as often as there are runs; the medians count, and the spread is shown. The 99th
//!   percentile is of single changes (every eighth is timed) within a run; the median of the runs is shown.

use crate::{cleanup, stats, tools, workspace};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What is done.
const WORKLOADS: [(&str, &str); 4] = [
    ("hash", "hash map, insert"),
    ("tree", "B-tree, insert"),
    ("queue", "queue, push and pop in turn"),
    ("swap", "array of strings, swap"),
];

/// What can be chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Changes of a run in memory.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=2_000_000))]
    changes: u64,
    /// Changes of a run on a disk; 0 leaves it out. Fewer than 1000 make one epoch.
    #[arg(long, default_value_t = 100)]
    disk_changes: u64,
    /// How often everything is run.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
}

/// Where, and how it becomes durable.
struct Medium {
    title: &'static str,
    folder: PathBuf,
    changes: u64,
    /// The suffix of the heap's kinds, and `PMEM_IS_PMEM_FORCE`.
    flush: &'static str,
    force: &'static str,
}

/// What takes turns.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Pmdk,
    Each,
    Epoch,
    Volatile,
}

const KINDS: [Kind; 4] = [Kind::Pmdk, Kind::Each, Kind::Epoch, Kind::Volatile];

/// Changes and lookups a second, and the 99th percentile of single changes in microseconds, of each run.
#[derive(Clone, Default)]
struct Rates {
    changes: Vec<f64>,
    lookups: Vec<f64>,
    slow: Vec<f64>,
}

struct Bench {
    pmdk: PathBuf,
    workloads: PathBuf,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    tools::ensure(&["cc"])?;
    tools::ensure_header("libpmemobj.h", "libpmemobj-dev")?;
    let disk = workspace::scratch()?;
    let shm = Path::new("/dev/shm");
    ensure!(shm.is_dir(), "there is no /dev/shm here");
    workspace::need_space(shm, 600_000_000)?;
    workspace::need_space(&disk, 600_000_000)?;
    let (in_memory, on_disk) = (cleanup::folder(shm)?, cleanup::folder(&disk)?);
    let bench = Bench::build(&on_disk)?;
    let mut media = vec![Medium {
        title: "In memory (tmpfs), lines flushed by the processor (PMEM_IS_PMEM_FORCE=1)",
        folder: in_memory,
        changes: options.changes,
        flush: "processor",
        force: "1",
    }];
    if options.disk_changes > 0 {
        media.push(Medium {
            title: "On a disk, msync (PMEM_IS_PMEM_FORCE=0)",
            folder: on_disk,
            changes: options.disk_changes,
            flush: "kernel",
            force: "0",
        });
    }
    for medium in &media {
        bench.medium(medium, options.runs)?;
    }
    println!(
        "\nMedian of {} runs (lowest to highest; 99th percentile of single changes). {}",
        options.runs,
        super::machine()
    );
    Ok(())
}

impl Bench {
    fn build(folder: &Path) -> Result<Self> {
        let built = workspace::cargo()
            .args(["build", "--release", "-p", "outlive-test-programs"])
            .args(["--bin", "workloads"])
            .status()
            .context("cannot start cargo")?;
        ensure!(built.success(), "the workloads do not build: {built}");
        let pmdk = folder.join("pmdk");
        let source = workspace::root().join("crates/test-programs/pmdk/workloads.c");
        let built = Command::new("cc")
            .args(["-O2", "-march=native", "-Wall", "-Werror", "-o"])
            .arg(&pmdk)
            .arg(source)
            .args(["-lpmemobj", "-lpthread"])
            .status()
            .context("cannot start cc")?;
        ensure!(built.success(), "workloads.c does not compile: {built}");
        let workloads = workspace::target().join("release/workloads");
        Ok(Self { pmdk, workloads })
    }

    /// Measures and prints everything on one medium.
    fn medium(&self, medium: &Medium, runs: u64) -> Result<()> {
        println!(
            "\n### {}; {} changes a run\n",
            medium.title,
            stats::count(medium.changes)
        );
        println!(
            "| changes a second | threads | libpmemobj | heap, each durable | ratio | \
             heap, epochs of 1000 | ratio | volatile `std` |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        let mut lookups = Vec::new();
        for (workload, title) in WORKLOADS {
            for threads in [1, 2] {
                let rates = self.turns(medium, workload, threads, runs)?;
                println!("| {title} | {threads} {}", row(&rates));
                // What was just written is looked up in memory on either medium.
                if medium.flush == "processor"
                    && rates.iter().all(|rates| !rates.lookups.is_empty())
                {
                    let found = rates.map(|rates| Rates {
                        changes: rates.lookups,
                        ..Rates::default()
                    });
                    let title = title.replace("insert", "look up");
                    lookups.push(format!("| {title} | {threads} {}", row(&found)));
                }
            }
        }
        for line in lookups {
            println!("{line}");
        }
        Ok(())
    }

    /// All kinds in turn, as often as there are runs.
    fn turns(
        &self,
        medium: &Medium,
        workload: &str,
        threads: u64,
        runs: u64,
    ) -> Result<[Rates; 4]> {
        let mut rates: [Rates; 4] = std::array::from_fn(|_| Rates::default());
        for _ in 0..runs {
            for (kind, rates) in KINDS.into_iter().zip(&mut rates) {
                let [changing, looking, slow] = self.once(medium, kind, workload, threads)?;
                let changes = medium.changes as f64;
                rates.changes.push(changes / changing);
                rates.slow.push(slow * 1e6);
                if looking > 0.0 {
                    rates.lookups.push(changes / looking);
                }
            }
        }
        Ok(rates)
    }

    /// One run: seconds of changes, of lookups, and of the change at the 99th percentile.
    fn once(&self, medium: &Medium, kind: Kind, workload: &str, threads: u64) -> Result<[f64; 3]> {
        let file = medium.folder.join("data");
        let mut command = match kind {
            Kind::Pmdk => Command::new(&self.pmdk),
            _ => Command::new(&self.workloads),
        };
        command.env("PMEM_IS_PMEM_FORCE", medium.force);
        match kind {
            Kind::Pmdk => {}
            Kind::Each => drop(command.arg(format!("each-{}", medium.flush))),
            Kind::Epoch => drop(command.arg(format!("epoch-{}", medium.flush))),
            Kind::Volatile => drop(command.arg("volatile")),
        }
        let output = command
            .arg(&file)
            .args([workload, &threads.to_string(), &medium.changes.to_string()])
            .output()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        if file.exists() {
            fs::remove_file(&file).context("cannot remove the file of a run")?;
        }
        if !output.status.success() {
            bail!(
                "{workload}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let seconds: Result<Vec<f64>, _> = text.split_whitespace().map(str::parse).collect();
        seconds
            .ok()
            .and_then(|seconds| seconds.try_into().ok())
            .with_context(|| format!("{workload}: not understood: {text}"))
    }
}

/// The cells of a row behind the first two.
fn row([pmdk, each, epoch, volatile]: &[Rates; 4]) -> String {
    let middle = |rates: &Rates| stats::median(&rates.changes).unwrap_or(0.0);
    let ratio = |rates: &Rates| format!("{:.2}", middle(rates) / middle(pmdk));
    format!(
        "| {} | {} | {} | {} | {} | {} |",
        spread(pmdk),
        spread(each),
        ratio(each),
        spread(epoch),
        ratio(epoch),
        spread(volatile)
    )
}

/// The median, from where to where the runs went, and the percentile where there is one.
fn spread(rates: &Rates) -> String {
    let low = rates.changes.iter().copied().fold(f64::INFINITY, f64::min);
    let high = rates.changes.iter().copied().fold(0.0, f64::max);
    let middle = stats::median(&rates.changes).unwrap_or(0.0);
    let slow = match stats::median(&rates.slow) {
        Some(micros) if micros < 100.0 => format!("; {micros:.2} µs"),
        Some(micros) => format!("; {}", stats::time(Some(micros))),
        None => String::new(),
    };
    format!(
        "{} ({} to {}{slow})",
        short(middle),
        short(low),
        short(high)
    )
}

/// `12.3 k`, `1.23 M`.
fn short(rate: f64) -> String {
    if rate < 1e3 {
        format!("{rate:.0}")
    } else if rate < 1e6 {
        format!("{:.1} k", rate / 1e3)
    } else {
        format!("{:.2} M", rate / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_medians_and_ratios() {
        let of = |changes: &[f64], slow: &[f64]| Rates {
            changes: changes.to_vec(),
            slow: slow.to_vec(),
            ..Rates::default()
        };
        let pmdk = of(&[1e3, 2e3, 3e3], &[1.0, 2.5, 3.0]);
        let text = row(&[pmdk, of(&[4e3], &[]), of(&[4e4], &[]), of(&[5e6], &[])]);
        assert_eq!(
            text,
            "| 2.0 k (1.0 k to 3.0 k; 2.50 µs) | 4.0 k (4.0 k to 4.0 k) | 2.00 | \
             40.0 k (40.0 k to 40.0 k) | 20.00 | 5.00 M (5.00 M to 5.00 M) |"
        );
    }
}
