//! `cargo xtask lab`: machines that lose power, and come back with another kernel or processor.
//!
//! Machines of QEMU, without hardware virtualisation, boot kernels of Debian ([`kernels`]) with a
//! few programs ([`initramfs`]) and one disk. A program that checks itself runs under `outlive run`;
//! the machine's power is cut (QEMU is killed); another machine boots with the same disk, and
//! `outlive restore` must bring the program back.
//!
//! # What must hold after each restore
//! - The epoch is not older than the newest that was committed before the cut.
//! - The program's record of itself, one line every half second, has no gap and no line twice, and
//!   no clock in it ran backwards.
//! - The program goes on, and at last reports that everything it does made progress; any wrong word
//!   in its memory, or a clock that ran backwards between two readings, would have ended it.
//! - On a processor that lacks a feature the restore is refused, the feature is named, and the
//!   program is unharmed.
//! - A disk that loses what was not flushed ([`cuts`]) takes nothing of an acknowledged epoch, nor of
//!   the files that go with it.
//! - The restartable kernel of the examples goes on after each reset ([`restartable`]).
//! - Under the oldest kernel, writes are found by soft-dirty bits ([`soft_dirty`]).

mod cuts;
mod initramfs;
mod kernels;
mod lossy;
mod machine;
mod nbd;
mod peer;
mod pmem;
mod record;
mod restartable;
mod soft_dirty;

use crate::{cleanup, tools, workspace};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use kernels::Kernel;
use machine::{Lab, Machine};
use record::Record;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The processor of most machines: everything that QEMU can imitate, but for page tables of five
/// levels and CMPXCHG16B, which old versions of it imitate so that kernels crash.
const FULL: &str = "max,la57=off,cx16=off";
/// The same without one thing that C libraries use.
const LESS: &str = "max,la57=off,cx16=off,avx2=off";
/// Nothing beyond the first x86-64 processors.
const LEAST: &str = "qemu64,cx16=off";

/// How long the program needs for what is waited for; imitated machines are slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the lab can be asked for.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    only: Option<Only>,
    /// Two kernels, there and back, and one refusal, instead of three kernels.
    #[arg(long)]
    short: bool,
    /// Only the tracking by soft-dirty bits, under the oldest kernel.
    #[arg(long, conflicts_with = "short")]
    soft_dirty: bool,
    /// Only power cuts of a disk that loses what was not flushed: so many, on each file system.
    #[arg(long, conflicts_with_all = ["short", "soft_dirty"])]
    cuts: Option<u32>,
    /// Only epochs in persistent memory.
    #[arg(long, conflicts_with_all = ["short", "soft_dirty", "cuts"])]
    memory: bool,
    /// Where the dice begin that say what the disk loses; without it, anywhere. It is printed.
    #[arg(long)]
    seed: Option<u64>,
}

/// Parts of the lab that stand alone.
#[derive(Subcommand, Clone, Debug)]
enum Only {
    /// Only the restartable kernel, an example of the resilient heap: resets, power cuts, flipped bits.
    Kernel(restartable::Options),
    /// Only stops beside those of CRIU, with soft-dirty bits; not part of the whole.
    Peer(peer::Options),
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let begun = Instant::now();
    if let Some(Only::Kernel(only)) = &options.only {
        restartable::run(only)?;
        println!("lab: all is well after {} s", begun.elapsed().as_secs());
        return Ok(());
    }
    if let Some(Only::Peer(only)) = &options.only {
        let programs = peer::programs(only)?;
        let folder = cleanup::folder(&workspace::scratch()?)?;
        let kernels = kernels::fetch(&["trixie"])?;
        let lab = Lab::new(folder, &kernels, &programs)?;
        return peer::run(&lab, &kernels[0], only);
    }
    tools::ensure(&["qemu-system-x86_64", "xz", "busybox", "strip", "sqlite3"])?;
    tools::ensure(&["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"])?;
    let folder = cleanup::folder(&workspace::scratch()?)?;
    workspace::need_space(&folder, 1_000_000_000)?;
    let wanted: &[&str] = if options.soft_dirty {
        &["bookworm"]
    } else if options.cuts.is_some() || options.memory {
        &["trixie"]
    } else if options.short {
        &["trixie", "trixie-backports"]
    } else {
        &["bookworm", "trixie", "trixie-backports"]
    };
    let kernels = kernels::fetch(wanted)?;
    let lab = Lab::new(folder, &kernels, &programs()?)?;
    let find = |suite: &str| {
        let found = kernels.iter().find(|k| k.suite == suite);
        found.with_context(|| format!("no kernel of {suite}"))
    };
    if options.soft_dirty {
        soft_dirty::run(&lab, find("bookworm")?)?;
        println!("lab: all is well after {} s", begun.elapsed().as_secs());
        return Ok(());
    }
    let new = find("trixie")?;
    let plan = |kind, cuts, disks| cuts::Plan {
        kind,
        cuts,
        disks,
        seed: options.seed.unwrap_or_else(|| u64::from(fastrand::u32(..))),
    };
    if let Some(cuts) = options.cuts {
        for kind in ["ext4", "xfs", "btrfs"] {
            cuts::run(&lab, new, plan(kind, cuts, 4))?;
        }
        println!("lab: all is well after {} s", begun.elapsed().as_secs());
        return Ok(());
    }
    if options.memory {
        pmem::run(&lab, new)?;
        println!("lab: all is well after {} s", begun.elapsed().as_secs());
        return Ok(());
    }
    let newest = find("trixie-backports")?;
    if options.short {
        power_cuts(&lab, &[new, newest, new])?;
        cuts::run(&lab, new, plan("ext4", 1, 1))?;
        restartable::short(options.seed)?;
    } else {
        restartable::long(options.seed)?;
        for kind in ["ext4", "xfs", "btrfs"] {
            cuts::run(&lab, new, plan(kind, 3, 2))?;
        }
        let old = find("bookworm")?;
        power_cuts(&lab, &[new, newest, new, old, newest, old])?;
        power_cuts(&lab, &[old, new])?;
        soft_dirty::run(&lab, old)?;
        pmem::run(&lab, new)?;
        least_processor(&lab, new)?;
    }
    println!("lab: all is well after {} s", begun.elapsed().as_secs());
    Ok(())
}

/// What most machines have: Outlive, programs that check themselves, a data base, what makes a disk.
fn programs() -> Result<Vec<PathBuf>> {
    let sqlite = tools::find("sqlite3").context("there is no sqlite3")?;
    let mkfs = tools::find("mkfs.ext4").context("there is no mkfs.ext4")?;
    let built = workspace::build_for_lab()?;
    Ok(built.into_iter().chain([sqlite, mkfs]).collect())
}

/// A program begins under the first kernel, and goes on under each further one after a power cut.
fn power_cuts(lab: &Lab, kernels: &[&Kernel]) -> Result<()> {
    let (first, rest) = kernels.split_first().context("no kernel")?;
    lab.new_disk()?;
    let machine = boot(lab, first, FULL)?;
    begin(&machine)?;
    let mut last = work(&machine, &Record::default())?;
    machine.cut()?;
    let machine = boot(lab, first, LESS)?;
    refused(&machine, &["avx2"])?;
    machine.cut()?;
    let mut before = first;
    for (n, kernel) in rest.iter().enumerate() {
        let machine = goes_on(lab, before, kernel, &mut last)?;
        if n + 1 == rest.len() && last.restores >= rest.len() {
            report(&machine)?;
        }
        machine.cut()?;
        before = kernel;
    }
    Ok(())
}

/// The program goes on under another kernel. If a thread read a clock in the old kernel's code just
/// when the newest epoch was taken, that epoch wants the old kernel: there the program goes on, and
/// loses its power again.
fn goes_on(lab: &Lab, before: &Kernel, kernel: &Kernel, last: &mut Record) -> Result<Machine> {
    const TRIES: u32 = 4;
    for _ in 0..TRIES {
        let machine = boot(lab, kernel, FULL)?;
        if restored_and_works(&machine, last)? {
            return Ok(machine);
        }
        println!("lab:   a clock was being read: once more under the kernel before");
        machine.cut()?;
        let machine = boot(lab, before, FULL)?;
        ensure!(
            restored_and_works(&machine, last)?,
            "refused under its own kernel"
        );
        machine.cut()?;
    }
    bail!("a clock was being read in all of {TRIES} epochs")
}

fn restored_and_works(machine: &Machine, last: &mut Record) -> Result<bool> {
    let Some(epoch) = restore(machine)? else {
        return Ok(false);
    };
    ensure!(
        epoch >= last.epoch,
        "epoch {epoch} was restored, but epoch {} was committed before the power cut",
        last.epoch
    );
    *last = work(machine, last)?;
    Ok(true)
}

fn boot<'a>(lab: &'a Lab, kernel: &'a Kernel, processor: &str) -> Result<Machine> {
    let begun = Instant::now();
    let machine = lab.boot(kernel, processor)?;
    println!(
        "lab: Linux {} on {processor}, up after {:.1} s",
        kernel.release,
        begun.elapsed().as_secs_f64()
    );
    Ok(machine)
}

/// The program's errors go to a file of its own; what Outlive says goes to another.
fn begin(machine: &Machine) -> Result<()> {
    begin_on(machine, "")
}

/// The same, with more to say about how it is kept.
fn begin_on(machine: &Machine, how: &str) -> Result<()> {
    // Two processes: the shell waits for it.
    let program = "exec 2>>/disk/wrong; clocks realtime; exit $?";
    machine.must(": >/disk/record; : >/disk/wrong")?;
    // So high that no process of a machine that has just booted has the number.
    machine.must("echo 3000 >/proc/sys/kernel/ns_last_pid")?;
    machine.must(&format!(
        "outlive run --name clocks --every 200ms {how} -- /bin/sh -c '{program}' \
         >>/disk/record 2>/tmp/said </dev/null & keeper=$!"
    ))?;
    Ok(())
}

/// Restores the program, and returns the epoch; `None` where the epoch wants its own kernel.
fn restore(machine: &Machine) -> Result<Option<u64>> {
    const READING: &str = "it was reading a clock inside the vDSO";
    machine.must(
        ": >/tmp/said; outlive restore clocks >>/disk/record 2>/tmp/said </dev/null & keeper=$!",
    )?;
    let said = machine.wait_for("the restore", PATIENCE, || {
        let said = machine.must("cat /tmp/said")?;
        let over = machine.ask("[ -d /proc/$keeper ]")?.0 != 0;
        let reading = over && said.contains(READING);
        ensure!(!over || reading, "the restore failed: {said}");
        Ok((reading || said.contains("runs again from epoch")).then_some(said))
    })?;
    if said.contains(READING) {
        return Ok(None);
    }
    let epoch = epoch_in(&said)?;
    println!("lab:   restored from epoch {epoch}");
    Ok(Some(epoch))
}

/// The epoch of which a restore says that the program runs again from it.
fn epoch_in(said: &str) -> Result<u64> {
    let epoch = said
        .split_once("runs again from epoch ")
        .and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next())
        .and_then(|number| number.parse().ok());
    epoch.with_context(|| format!("no epoch is named: {said}"))
}

/// Lets the program work for a while, and judges its record of itself.
fn work(machine: &Machine, before: &Record) -> Result<Record> {
    const LINES: usize = 6;
    const EPOCHS: u64 = 4;
    let mut first: Option<Record> = None;
    machine.wait_for("the program to work", PATIENCE, || {
        let text = machine.must("cat /disk/record")?;
        let wrong = machine.must("cat /disk/wrong")?;
        ensure!(wrong.trim().is_empty(), "the program found: {wrong}");
        let over = machine.ask("[ -d /proc/$keeper ]")?.0 != 0;
        ensure!(!over, "it ended: {}", machine.must("cat /tmp/said")?);
        let record = Record::judge(&text)?;
        let epoch = newest_epoch(machine, "clocks")?;
        let Some(first) = &first else {
            first = Some(Record { epoch, ..record });
            return Ok(None);
        };
        let worked = record.lines >= first.lines.max(before.lines) + LINES;
        let kept = epoch >= first.epoch + EPOCHS;
        if !(worked && kept && record.worked > first.worked) {
            return Ok(None);
        }
        println!(
            "lab:   {} lines in its record, {} generations of its memory, epoch {epoch}",
            record.lines, record.worked
        );
        let restores = before.restores + usize::from(before.lines > 0);
        Ok(Some(Record {
            epoch,
            restores,
            ..record
        }))
    })
}

/// The newest committed epoch; 0 where there is none yet.
fn newest_epoch(machine: &Machine, name: &str) -> Result<u64> {
    let (status, text) = machine.ask(&format!("outlive history {name} --json"))?;
    if status != 0 {
        return Ok(0);
    }
    let history: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("no history: {text}"))?;
    let epochs = history.as_array().context("the history is no list")?;
    Ok(epochs
        .iter()
        .filter_map(|e| e["epoch"].as_u64())
        .max()
        .unwrap_or(0))
}

/// Here the program must not be restored, for lack of exactly these features.
fn refused(machine: &Machine, features: &[&str]) -> Result<()> {
    let (status, said) = machine.ask("outlive restore clocks 2>&1 </dev/null")?;
    ensure!(status == 3, "exit status {status}, not 3: {said}");
    let named = said
        .split_once("lacks features that the program may use: ")
        .and_then(|(_, rest)| rest.split(';').next())
        .with_context(|| format!("no feature is named: {said}"))?;
    ensure!(
        named.split(", ").eq(features.iter().copied()),
        "{named} are named, not {features:?}"
    );
    println!("lab:   refused, {named} is named");
    Ok(())
}

/// The program reports what it did, and ends well.
fn report(machine: &Machine) -> Result<()> {
    machine.must("kill -USR1 $(pidof clocks)")?;
    machine.must("wait $keeper")?;
    let record = machine.must("tail -n 7 /disk/record")?;
    for what in ["read", "coarse", "looked up", "slept", "rang", "worked"] {
        let found = record.lines().any(|line| line.starts_with(what));
        ensure!(found, "the report lacks {what:?}: {record}");
    }
    println!("lab:   the program reports and ends well");
    Ok(())
}

/// A processor without `XSAVE` is refused at once, by name.
fn least_processor(lab: &Lab, kernel: &Kernel) -> Result<()> {
    lab.new_disk()?;
    let machine = boot(lab, kernel, LEAST)?;
    machine.must("clocks >/disk/record 2>&1 </dev/null & sleep 1")?;
    let save = "outlive checkpoint --pid $(pidof clocks) --image /disk/image 2>&1";
    let (status, said) = machine.ask(save)?;
    if status != 3 || !said.contains("XSAVE") {
        bail!("exit status {status}: {said}");
    }
    machine.must("kill -USR1 $(pidof clocks)")?;
    println!("lab:   refused, XSAVE is named");
    machine.cut()
}
