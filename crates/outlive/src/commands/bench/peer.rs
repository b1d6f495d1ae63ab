//! CRIU, where it is given: the same work, in alternation.
//!
//! # Rules
//! - It is run as its manual says, leaving the program running, without options that make it slow.
//! - Its figures are its own: the frozen time that it prints with `--display-stats`.
//! - Where it fails, its message is what is shown.

use super::args::Effort;
use super::figures::{Cell, Samples, Table, Unit, float};
use super::session::{BY_REQUEST, Keeper, Load, Session};
use crate::out;
use outlive_keeper::KeeperError;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Pages that the program writes before each capture.
const WRITTEN: u64 = 256;

/// One dump.
pub struct Dump {
    /// How long the program was frozen, microseconds.
    pub frozen_us: f64,
    /// How long the command took, microseconds.
    pub wall_us: f64,
}

/// A dump of a running program into a directory that is made for it.
///
/// # Errors
/// Told, with its last error, where it fails.
pub fn dump(
    session: &Session,
    criu: &Path,
    pid: u32,
    dir: &Path,
    previous: Option<&Path>,
) -> Result<Dump, KeeperError> {
    let mut command = call(criu, "dump", pid, dir)?;
    command.args(["--leave-running", "--display-stats"]);
    if previous.is_some() {
        command.args(["--track-mem", "--prev-images-dir", "../before"]);
    }
    let began = Instant::now();
    let printed = session.run(&mut command)?;
    let wall_us = began.elapsed().as_secs_f64() * 1e6;
    let frozen_us = frozen(&printed)
        .ok_or_else(|| KeeperError::Other(format!("criu printed no frozen time:\n{printed}")))?;
    Ok(Dump { frozen_us, wall_us })
}

fn pre_dump(session: &Session, criu: &Path, pid: u32, dir: &Path) -> Result<(), KeeperError> {
    let mut command = call(criu, "pre-dump", pid, dir)?;
    command.arg("--track-mem");
    session.run(&mut command).map(|_| ())
}

fn call(criu: &Path, verb: &str, pid: u32, dir: &Path) -> Result<Command, KeeperError> {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir(dir).map_err(KeeperError::io(format!("make {}", dir.display())))?;
    let mut command = Command::new(criu);
    command
        .args([
            verb,
            "-v1",
            "--shell-job",
            "--tree",
            &pid.to_string(),
            "--images-dir",
        ])
        .arg(dir);
    Ok(command)
}

/// `Frozen time: 1234 us` in what `--display-stats` prints.
fn frozen(printed: &str) -> Option<f64> {
    let line = printed
        .lines()
        .find_map(|line| line.trim().strip_prefix("Frozen time:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// An image of everything, as `outlive checkpoint` takes it.
///
/// # Errors
/// What it says.
pub fn image(session: &Session, pid: u32, dir: &Path) -> Result<(f64, f64), KeeperError> {
    let pid = pid.to_string();
    let mut command =
        session.outlive(&["checkpoint", "--leave-running", "--pid", &pid, "--image"])?;
    let printed = session.run(command.arg(dir))?;
    let value: Value = serde_json::from_str(&printed).unwrap_or_default();
    let figure = |name: &str| value[name].as_f64().unwrap_or(f64::NAN);
    std::fs::remove_dir_all(dir).map_err(KeeperError::io(format!("remove {}", dir.display())))?;
    Ok((figure("stop_us"), figure("durable_us")))
}

#[derive(Default)]
struct Compared {
    epoch: Samples,
    image: Samples,
    durable: Samples,
    full: Samples,
    wall: Samples,
    incremental: Samples,
    of_full: Samples,
    of_incremental: Samples,
    full_fails: Option<String>,
    incremental_fails: Option<String>,
}

/// How long the program stands still, against memory.
///
/// # Errors
/// As its parts; not where CRIU fails.
pub fn stops(session: &Session, effort: &Effort, criu: &Path) -> Result<Table, KeeperError> {
    let columns = [
        "memory",
        "outlive epoch: stop",
        "outlive image: stop",
        "image durable",
        "CRIU dump: frozen",
        "CRIU dump: all",
        "CRIU after pre-dump: frozen",
        "CRIU dump / epoch",
        "CRIU after pre-dump / epoch",
    ];
    let heading = "Against CRIU, in alternation: the same program, written to before each capture";
    let mut table = Table::new("peer-stop", heading, &columns);
    let most = effort.memory(1 << 30, 64 << 20);
    for memory in effort.points(&[16 << 20, 64 << 20, 256 << 20, 1 << 30], &[64 << 20], most) {
        out::say(&format!(
            "stop: against CRIU with {}",
            Unit::Memory.show(float(memory))
        ));
        let shown = Cell::whole(Unit::Memory, memory);
        if let Some(lack) = session.lacks(memory * 2, memory * 6) {
            table.row(vec![shown, Cell::words(format!("not measured: {lack}"))]);
            continue;
        }
        let found = compare(session, effort, criu, memory)?;
        let or = |samples: Samples, fails: &Option<String>| match fails {
            Some(why) => Cell::words(why.clone()),
            None => Cell::Many(Unit::Time, samples),
        };
        table.row(vec![
            shown,
            Cell::Many(Unit::Time, found.epoch),
            Cell::Many(Unit::Time, found.image),
            Cell::Many(Unit::Time, found.durable),
            or(found.full, &found.full_fails),
            Cell::Many(Unit::Time, found.wall),
            or(found.incremental, &found.incremental_fails),
            Cell::Range(Unit::Ratio, found.of_full),
            Cell::Range(Unit::Ratio, found.of_incremental),
        ]);
    }
    Ok(table)
}

fn compare(
    session: &Session,
    effort: &Effort,
    criu: &Path,
    memory: u64,
) -> Result<Compared, KeeperError> {
    let dirs: Vec<PathBuf> = ["image", "before", "after"]
        .iter()
        .map(|name| session.dir().join(name))
        .collect();
    let mut found = Compared::default();
    let load = Load::start(session)?;
    let pid = load.program.pid();
    load.ask(&format!("hold 1 {memory}"))?;
    for nth in 0..=effort.runs(20, 2) {
        let write = || load.ask(&format!("dirty {WRITTEN}"));
        let epoch = {
            let keeper = Keeper::attach(session, pid, BY_REQUEST, &[])?;
            keeper.epoch()?;
            write()?;
            keeper.epoch()?;
            write()?;
            float(keeper.epoch()?.stop_us)
        };
        write()?;
        let (image, durable) = image(session, pid, &dirs[0])?;
        write()?;
        let full = attempt(
            dump(session, criu, pid, &dirs[1], None),
            &mut found.full_fails,
        )?;
        let before = pre_dump(session, criu, pid, &dirs[1]);
        write()?;
        let after = before.and_then(|()| dump(session, criu, pid, &dirs[2], Some(&dirs[1])));
        let after = attempt(after, &mut found.incremental_fails)?;
        if nth == 0 {
            continue;
        }
        found.epoch.add(epoch);
        found.image.add(image);
        found.durable.add(durable);
        if let Some(full) = full {
            found.full.add(full.frozen_us);
            found.wall.add(full.wall_us);
            found.of_full.add(full.frozen_us / epoch.max(1.0));
        }
        if let Some(after) = after {
            found.incremental.add(after.frozen_us);
            found.of_incremental.add(after.frozen_us / epoch.max(1.0));
        }
    }
    for dir in &dirs {
        let _ = std::fs::remove_dir_all(dir);
    }
    Ok(found)
}

/// What it gave; where it failed, its message is kept.
///
/// # Errors
/// Only an interruption.
pub fn attempt<T>(
    done: Result<T, KeeperError>,
    fails: &mut Option<String>,
) -> Result<Option<T>, KeeperError> {
    match done {
        Ok(value) => Ok(Some(value)),
        Err(KeeperError::Told { exit, message }) if exit >= 128 => {
            Err(KeeperError::Told { exit, message })
        }
        Err(error) => {
            *fails = Some(out::tame(&error.to_string()));
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frozen_time_is_read() {
        let printed = "Displaying dump stats:\nFreezing time: 11 us\nFrozen time: 4567 us\n";
        assert_eq!(frozen(printed), Some(4567.0));
        assert_eq!(frozen("no"), None);
    }
}
