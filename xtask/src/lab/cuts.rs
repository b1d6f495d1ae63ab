//! Power cuts of a disk that loses what was not flushed ([`super::lossy`]).
//!
//! A program that writes to files in all the ways there are, and never asks for any of it to be made
//! durable, is kept by Outlive; its files and the store lie in one file system on that disk. QEMU is killed
//! at a random moment, the disk loses what it likes, and the next machine restores.
//!
//! # What must hold after each cut
//! - The file system is well, since an honest disk is all that it needs.
//! - The epoch that is restored is not older than the newest that was acknowledged.
//! - Every file is what the program remembers: it compares all of them, in every round. Its record
//!   (`round N`, a line each) has no gap and no line twice.
//! - At last it ends as it wants to, and a program that knows nothing but the files finds the databases whole.
//!
//! # What must not
//! A disk that acknowledges flushes and forgets them ([`Disk::lie`]) loses acknowledged epochs, whatever
//! anybody does: that is found out here, or this test finds nothing.

use super::kernels::Kernel;
use super::lossy::{Disk, Fate, SECTOR};
use super::machine::{Lab, Machine};
use super::nbd::Server;
use super::{FULL, PATIENCE, newest_epoch};
use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use std::{
    fs::{self, File},
    io::Read,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Bytes of the disk.
const LEN: u64 = 512 << 20;
/// How the program is called.
const NAME: &str = "scribe";
/// Rounds that the program is let work, at least, before a cut.
const ROUNDS: u64 = 3;
/// Epochs that are committed meanwhile, at least.
const EPOCHS: u64 = 2;

/// What is done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The file system.
    pub kind: &'static str,
    /// How often the power is cut.
    pub cuts: u32,
    /// How many disks are made of each cut.
    pub disks: u32,
    /// Where the dice begin.
    pub seed: u64,
}

/// A machine and its disk.
struct Running {
    machine: Machine,
    server: Server,
}

/// What is known of the program.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// The newest epoch that is acknowledged.
    epoch: u64,
    /// The newest round in its record.
    round: u64,
}

/// Cuts the power as often as planned, and shows that a lying disk is found out.
pub fn run(lab: &Lab, kernel: &Kernel, plan: Plan) -> Result<()> {
    println!(
        "lab: {} on a disk with a cache, seed {}",
        plan.kind, plan.seed
    );
    let mut dice = Rng::with_seed(plan.seed);
    let running = boot(lab, kernel, &fresh(lab, plan.kind)?)?;
    begin(&running.machine)?;
    let mut known = work(&running.machine, Known::default())?;
    let mut cut = off(running, &mut dice)?;
    let mut fates = Fate::ALL.into_iter().cycle();
    // Not all seeds are to begin with the same.
    for _ in 0..dice.usize(..4) {
        fates.next();
    }
    for nth in 1..=plan.cuts {
        let mut goes_on = None;
        for _ in 0..plan.disks {
            if let Some((running, _)) = goes_on.take() {
                let Running { machine, server } = running;
                machine.cut()?;
                server.end()?;
            }
            let fate = fates.next().context("no fate")?;
            println!(
                "lab:   cut {nth}: {fate:?} of {} sectors, after {} flushes",
                cut.at_risk(),
                cut.flushes()
            );
            let disk = cut.after_cut(fate, &mut dice);
            let found = again(lab, kernel, &disk, known);
            goes_on = Some(found.with_context(|| {
                format!("{}, seed {}, cut {nth}, {fate:?}", plan.kind, plan.seed)
            })?);
        }
        let (running, now) = goes_on.context("no disk was made of a cut")?;
        known = now;
        if nth < plan.cuts {
            cut = off(running, &mut dice)?;
        } else {
            let disk = lie(running, known)?;
            found_out(lab, kernel, &disk, known)?;
        }
    }
    let running = boot(lab, kernel, &cut.after_cut(Fate::Torn, &mut dice))?;
    ends_well(running)
}

/// An empty disk.
fn fresh(lab: &Lab, kind: &str) -> Result<Disk> {
    let path = lab.folder().join("lossy");
    File::create(&path)?.set_len(LEN)?;
    let program = format!("mkfs.{kind}");
    let force = if kind == "ext4" { "-F" } else { "-f" };
    let made = Command::new(&program)
        .args(["-q", force])
        .arg(&path)
        .status();
    let made = made.with_context(|| format!("cannot start {program}"))?;
    ensure!(made.success(), "{program} failed");
    let (mut file, mut sectors) = (File::open(&path)?, Vec::new());
    let mut piece = vec![0; 1 << 20];
    for at in 0..LEN / piece.len() as u64 {
        file.read_exact(&mut piece)?;
        let first = at * (piece.len() / SECTOR) as u64;
        let (chunks, _) = piece.as_chunks::<SECTOR>();
        let written = (first..)
            .zip(chunks)
            .filter(|(_, bytes)| **bytes != [0; SECTOR]);
        sectors.extend(written.map(|(at, bytes)| (at, *bytes)));
    }
    fs::remove_file(&path)?;
    Ok(Disk::new(LEN, sectors))
}

/// Boots with a disk; what is done to it is not done to the one that is given.
fn boot(lab: &Lab, kernel: &Kernel, disk: &Disk) -> Result<Running> {
    let begun = Instant::now();
    let once = || -> Result<Running> {
        let socket = lab.folder().join("socket");
        let server = Server::start(disk.clone(), &socket)?;
        let machine = lab.boot_from(kernel, FULL, &socket)?;
        Ok(Running { machine, server })
    };
    let running = once().or_else(|error| {
        println!("lab:   the machine did not come up, once more: {error:#}");
        once()
    })?;
    let mounted = running.machine.ask("grep -q ' /disk ' /proc/mounts")?;
    ensure!(mounted.0 == 0, "the file system is harmed");
    println!("lab:   up after {:.1} s", begun.elapsed().as_secs_f64());
    Ok(running)
}

fn begin(machine: &Machine) -> Result<()> {
    machine.must("mkdir /disk/files; : >/disk/record; : >/disk/wrong")?;
    // So high that no process of a machine that has just booted has the number.
    machine.must("echo 3000 >/proc/sys/kernel/ns_last_pid")?;
    // The program's errors go to a file of its own.
    let program = "exec 2>>/disk/wrong; exec scribe /disk/files";
    machine.must(&format!(
        "outlive run --name {NAME} --every 200ms -- /bin/sh -c '{program}' \
         >>/disk/record 2>/tmp/said </dev/null & keeper=$!"
    ))?;
    Ok(())
}

/// A machine comes up with this disk, the program is restored and works.
fn again(lab: &Lab, kernel: &Kernel, disk: &Disk, known: Known) -> Result<(Running, Known)> {
    let running = boot(lab, kernel, disk)?;
    let epoch = restore(&running.machine)?;
    ensure!(
        epoch >= known.epoch,
        "epoch {epoch} was restored, but epoch {} was acknowledged before the power cut",
        known.epoch
    );
    let now = work(&running.machine, known)?;
    Ok((running, now))
}

/// Restores the program; returns the epoch.
fn restore(machine: &Machine) -> Result<u64> {
    machine.must(&format!(
        ": >/tmp/said; outlive restore {NAME} >>/disk/record 2>/tmp/said </dev/null & keeper=$!"
    ))?;
    let said = machine.wait_for("the restore", PATIENCE, || {
        let said = machine.must("cat /tmp/said")?;
        let over = machine.ask("[ -d /proc/$keeper ]")?.0 != 0;
        let wrong = machine.must("cat /disk/wrong")?;
        ensure!(!over, "the restore failed: {said}{wrong}");
        Ok(said.contains("runs again from epoch").then_some(said))
    })?;
    let done = said
        .lines()
        .filter(|line| line.contains("/disk/files/"))
        .count();
    let epoch = super::epoch_in(&said)?;
    println!("lab:   restored from epoch {epoch}, {done} files were not as they were");
    Ok(epoch)
}

/// Lets the program work, and judges its record; what is known then.
fn work(machine: &Machine, before: Known) -> Result<Known> {
    let mut first = None;
    machine.wait_for("the program to work", PATIENCE, || {
        // In this order: a round that is seen was there when the epoch is asked for.
        let record = machine.must("cat /disk/record")?;
        let wrong = machine.must("cat /disk/wrong")?;
        ensure!(wrong.trim().is_empty(), "the program found: {wrong}");
        let over = machine.ask("[ -d /proc/$keeper ]")?.0 != 0;
        ensure!(!over, "it ended: {record}");
        let round = judge(&record)?;
        let epoch = newest_epoch(machine, NAME)?;
        let first = *first.get_or_insert(Known { epoch, round });
        let worked = round >= first.round.max(before.round) + ROUNDS;
        let kept = epoch >= first.epoch.max(before.epoch) + EPOCHS;
        Ok((worked && kept).then_some(Known { epoch, round }))
    })
}

/// The last round of a record without a gap.
fn judge(record: &str) -> Result<u64> {
    // The last line may be written just now.
    let whole = &record[..record.rfind('\n').map_or(0, |at| at + 1)];
    let mut next = 0;
    for line in whole.lines().filter(|line| *line != "ready") {
        let wanted = format!("round {next}");
        ensure!(line == wanted, "{line:?} where {wanted:?} was to come");
        next += 1;
    }
    Ok(next)
}

/// Cuts the power after a moment; the disk with its cache, in which there is something, as a rule.
fn off(running: Running, dice: &mut Rng) -> Result<Disk> {
    const AT_RISK: Duration = Duration::from_secs(10);
    thread::sleep(Duration::from_millis(dice.u64(..1500)));
    let (begun, sectors) = (Instant::now(), dice.usize(1..60));
    let disk = loop {
        let disk = running.server.disk();
        if disk.at_risk() >= sectors || begun.elapsed() > AT_RISK {
            break disk.clone();
        }
        drop(disk);
        thread::sleep(Duration::from_micros(200));
    };
    // What it does until it is off is of no account.
    running.machine.cut()?;
    running.server.end()?;
    Ok(disk)
}

/// Lets the disk lie for some epochs; the disk with all that it should have flushed.
fn lie(running: Running, known: Known) -> Result<Disk> {
    running.server.disk().lie();
    work(&running.machine, known)?;
    running.machine.cut()?;
    running.server.end()
}

/// After a disk lied, something of what must hold does not.
fn found_out(lab: &Lab, kernel: &Kernel, disk: &Disk, known: Known) -> Result<()> {
    let mut dice = Rng::with_seed(0);
    let promised = Known {
        epoch: known.epoch + EPOCHS,
        ..known
    };
    let wrong = match again(
        lab,
        kernel,
        &disk.after_cut(Fate::Nothing, &mut dice),
        promised,
    ) {
        Err(error) => error,
        Ok(_) => anyhow::bail!("a disk that forgot what it had flushed was not found out"),
    };
    println!("lab:   a disk that forgets what it flushed is found out: {wrong}");
    Ok(())
}

/// The program goes on, ends as it wants to, and leaves whole files.
fn ends_well(running: Running) -> Result<()> {
    let machine = &running.machine;
    restore(machine)?;
    machine.must(": >/disk/files/end")?;
    let (status, _) = machine.ask("wait $keeper")?;
    let wrong = machine.must("cat /disk/wrong /tmp/said")?;
    ensure!(status == 7, "it ended with {status}: {wrong}");
    for name in ["journal", "wal"] {
        let whole = machine.must(&format!(
            "sqlite3 /disk/files/{name}.db 'pragma integrity_check'"
        ))?;
        ensure!(whole == "ok\n", "{name}.db: {whole}");
    }
    println!("lab:   the program ends well, its databases are whole");
    let Running { machine, server } = running;
    machine.cut()?;
    server.end().map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_with_a_gap_or_a_repetition_is_found() {
        assert_eq!(judge("ready\nround 0\nround 1\nrou").unwrap(), 2);
        assert_eq!(judge("").unwrap(), 0);
        for wrong in [
            "round 1\n",
            "round 0\nround 2\n",
            "round 0\nround 0\n",
            "\0\0\n",
        ] {
            assert!(judge(wrong).is_err(), "{wrong:?}");
        }
    }
}
