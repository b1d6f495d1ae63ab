//! `cargo xtask lab kernel`: the restartable kernel (`examples/restartable-kernel`) loses its machine.
//!
//! It boots in QEMU with an imitated NVDIMM, which the host keeps in a file. At random moments the machine
//! is switched off (QEMU is killed) or reset; while it is off, bits of the file flip; and a task of the
//! kernel flips bits itself, in the middle of commits. What the kernel says on its serial line is judged
//! ([`judge`]).
//!
//! # What it does not show
//! The imitated memory forgets nothing that was stored, flushed or not. That flushes and fences are where
//! they must be, the crash tests of `resilient-heap` show.

mod flips;
mod judge;
mod switch;

use crate::{cleanup, tools, workspace};
use anyhow::{Context, Result, ensure};
use clap::Args;
use judge::Judge;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use switch::{MEMORY, Switched};

/// What the kernel's part of the lab can be asked for.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How often the machine is reset or switched off.
    #[arg(long, default_value_t = LONG)]
    resets: u32,
    /// Where the dice begin; without it, anywhere. It is printed.
    #[arg(long)]
    seed: Option<u64>,
}

/// How many resets the short lab makes, and the long one.
const SHORT: u32 = 8;
const LONG: u32 = 60;
/// How many bits flip while the machine is off.
const FLIPS: usize = 4;
/// How much every task must have done at last, in lines.
const WORK: usize = 10;
/// How long that may take; imitated machines are slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs it as part of the short lab.
pub fn short(seed: Option<u64>) -> Result<()> {
    let options = Options {
        resets: SHORT,
        seed,
    };
    run(&options)
}

/// Runs it as part of the long lab.
pub fn long(seed: Option<u64>) -> Result<()> {
    let options = Options { resets: LONG, seed };
    run(&options)
}

/// Runs it.
pub fn run(options: &Options) -> Result<()> {
    tools::ensure(&["qemu-system-x86_64"])?;
    let seed = options.seed.unwrap_or_else(|| u64::from(fastrand::u32(..)));
    println!(
        "lab: the restartable kernel, {} resets, seed {seed}",
        options.resets
    );
    let folder = cleanup::folder(&workspace::scratch()?)?;
    let memory = folder.join("survives");
    fs::File::create(&memory)?.set_len(MEMORY)?;
    let mut lab = Lab {
        kernel: build()?,
        folder,
        memory,
        dice: fastrand::Rng::with_seed(seed),
        judge: Judge::default(),
    };
    lab.resets(options.resets)?;
    lab.works_at_last()?;
    println!("lab:   {}", lab.judge.summary());
    Ok(())
}

/// Builds the kernel, which is a workspace of its own, with flags of its own.
pub fn build() -> Result<PathBuf> {
    println!("building the restartable kernel…");
    let target = workspace::target().join("restartable-kernel");
    let status = cargo(&target).arg("build").status();
    let status = status.context("cannot start cargo")?;
    ensure!(status.success(), "the kernel does not build: {status}");
    Ok(target.join("x86_64-unknown-linux-gnu/debug/restartable-kernel"))
}

/// `cargo` in the kernel's folder, whose configuration it thereby reads.
fn cargo(target: &Path) -> Command {
    let mut cargo = workspace::cargo();
    cargo
        .current_dir(workspace::root().join("examples/restartable-kernel"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", target);
    cargo
}

/// The end of a text, for reports.
fn last_of(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

struct Lab {
    kernel: PathBuf,
    folder: PathBuf,
    /// The file with the memory that survives.
    memory: PathBuf,
    dice: fastrand::Rng,
    judge: Judge,
}

impl Lab {
    fn switch_on(&self, number: u32) -> Result<Switched> {
        let said = self.folder.join(format!("said-{number}"));
        Switched::on(&self.kernel, &self.memory, said)
    }

    /// Resets at random moments: one of four while the machine comes up, the others while it works.
    fn resets(&mut self, resets: u32) -> Result<()> {
        let mut machine = self.switch_on(0)?;
        for number in 1..=resets {
            if self.dice.u32(..4) > 0 || number == 1 {
                machine.wait_until_up(PATIENCE)?;
            }
            std::thread::sleep(Duration::from_millis(self.dice.u64(..700)));
            if self.dice.bool() {
                machine.reset()?;
                continue;
            }
            self.switch_off(machine)?;
            let flips = flips::flip(&self.memory, &mut self.dice, self.judge.archive(), FLIPS)?;
            self.judge.flipped(&flips);
            machine = self.switch_on(number)?;
        }
        self.switch_off(machine)
    }

    fn switch_off(&mut self, machine: Switched) -> Result<()> {
        if machine.reset_early {
            self.judge.may_have_been_reported();
        }
        let said = machine.off()?;
        let heard = self.judge.hear(&said);
        heard.with_context(|| format!("it said, at last:\n{}", last_of(&said)))
    }

    /// At last every task goes on for a while.
    fn works_at_last(&mut self) -> Result<()> {
        let machine = self.switch_on(u32::MAX)?;
        let begun = Instant::now();
        while !judge::works(&machine.said()?, WORK) {
            std::thread::sleep(Duration::from_millis(200));
            ensure!(
                begun.elapsed() < PATIENCE,
                "in {} s not every task went on; the kernel said:\n{}",
                PATIENCE.as_secs(),
                last_of(&machine.said()?)
            );
        }
        self.switch_off(machine)
    }
}
