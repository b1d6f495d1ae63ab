//! Tracking by soft-dirty bits, under a kernel that has nothing better.
//!
//! # What must hold
//! - The tracking is called what it is, and an epoch of a program that wrote next to nothing holds next
//!   to nothing of its memory; also the first one after a restore.
//! - A program that does all that can be done to memory, and knows what each page must hold, goes on
//!   from any epoch: power cuts come whenever they come.

use super::kernels::Kernel;
use super::machine::{Lab, Machine};
use super::{FULL, PATIENCE, boot};
use anyhow::{Context, Result, ensure};

/// Memory of the idle program, MiB, and pages of that.
const IDLE: u64 = 16;
const IDLE_PAGES: u64 = IDLE << 20 >> 12;
/// Pages that it may write between two epochs, with all that its C library does.
const FEW: u64 = 64;
/// Numbers that the busy program notes before the power is cut.
const ROUNDS: u64 = 3;

/// Runs all of it under one kernel.
pub fn run(lab: &Lab, kernel: &Kernel) -> Result<()> {
    lab.new_disk()?;
    let machine = boot(lab, kernel, FULL)?;
    machine.must("echo 3000 >/proc/sys/kernel/ns_last_pid; : >/disk/rounds.forks")?;
    unchanged_pages_stay(&machine)?;
    machine.must(
        "outlive run --name paging --every 200ms -- paging 4 /disk/rounds /disk/end \
         >>/disk/said 2>>/disk/errors </dev/null & keeper=$!",
    )?;
    let mut last = progress(&machine, 0)?;
    machine.cut()?;
    for life in 0..2 {
        let machine = boot(lab, kernel, FULL)?;
        machine.must(": >/tmp/said")?;
        machine
            .must("outlive restore paging >>/disk/said 2>>/disk/errors </dev/null & keeper=$!")?;
        last = progress(&machine, last)?;
        if life == 1 {
            machine.must(": >/disk/end")?;
            let (status, _) = machine.ask("wait $keeper")?;
            let said = machine.must("cat /disk/said /disk/errors")?;
            ensure!(status == 7, "the program ended with {status}: {said}");
        }
        machine.cut()?;
    }
    println!("lab:   soft-dirty bits: a program goes on, {last} rounds");
    Ok(())
}

/// An idle program: what it does not write is not written again, before a restore and after it.
fn unchanged_pages_stay(machine: &Machine) -> Result<()> {
    let crowd = format!("crowd --memory {IDLE}");
    machine.must(&format!(
        "outlive run --name idle --every 1h -- {crowd} >>/disk/idle 2>/tmp/said </dev/null & \
         keeper=$!"
    ))?;
    machine.wait_for("the program to begin", PATIENCE, || {
        let ready = machine.ask("grep -q ready /disk/idle")?.0 == 0;
        let kept = ready && machine.ask("outlive checkpoint idle")?.0 == 0;
        Ok(kept.then_some(()))
    })?;
    machine.must("outlive checkpoint idle")?;
    machine.must("outlive checkpoint idle")?;
    let state = machine.must("outlive ps --json")?;
    ensure!(
        state.contains("\"tracking\":\"soft-dirty\""),
        "another tracking: {state}"
    );
    let before = pages(machine)?;
    ensure!(
        before.first().is_some_and(|n| *n >= IDLE_PAGES),
        "the first epoch is no full one: {before:?}"
    );
    machine.must("kill -9 $keeper; sleep 1; kill -9 $(pidof crowd); sleep 1")?;
    machine.must("outlive restore idle >>/disk/idle 2>/tmp/said </dev/null & keeper=$!")?;
    machine.wait_for("the restore", PATIENCE, || {
        Ok((machine.ask("outlive checkpoint idle")?.0 == 0).then_some(()))
    })?;
    let after = pages(machine)?;
    machine.must("outlive stop idle")?;
    let (last, first) = (before.last(), after.get(before.len()));
    ensure!(
        last.is_some_and(|n| *n <= FEW),
        "an idle program wrote pages: {before:?}"
    );
    ensure!(
        first.is_some_and(|n| *n <= FEW),
        "the epoch after a restore is a full one: {after:?}"
    );
    println!("lab:   soft-dirty bits: pages of an idle program's epochs {after:?}");
    Ok(())
}

/// Pages of each epoch of the idle program.
fn pages(machine: &Machine) -> Result<Vec<u64>> {
    let (status, text) = machine.ask("outlive history idle --json")?;
    if status != 0 {
        return Ok(Vec::new());
    }
    let history: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("no history: {text}"))?;
    let epochs = history.as_array().context("the history is no list")?;
    Ok(epochs.iter().filter_map(|e| e["pages"].as_u64()).collect())
}

/// Waits until the busy program has noted some more numbers, and two more epochs were committed.
fn progress(machine: &Machine, before: u64) -> Result<u64> {
    let mut first = None;
    machine.wait_for("the program to work", PATIENCE, || {
        let said = machine.must("cat /disk/said /disk/errors")?;
        ensure!(!said.contains("WRONG"), "the program found: {said}");
        let over = machine.ask("[ -d /proc/$keeper ]")?.0 != 0;
        ensure!(!over, "it ended: {said}");
        let noted = machine.ask("tail -n 1 /disk/rounds | tr -d '\\0'; echo")?.1;
        let noted: u64 = noted.trim().parse().unwrap_or(0);
        let epoch = super::newest_epoch(machine, "paging")?;
        let first = *first.get_or_insert(epoch);
        Ok((noted >= before + ROUNDS && epoch >= first + 2).then_some(noted))
    })
}
