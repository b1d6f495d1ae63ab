//! `bench restore`: what a restore takes, against the memory of the program.
//!
//! A program with known memory is ended by `checkpoint --image` and restored again and again:
//! the first answer that it gives over a socket, and the sum of all its pages, show that it is
//! there, and that it is right.

use super::args::Effort;
use super::figures::{Cell, Report, Samples, Table, Unit, float};
use super::peer;
use super::plot::{Axis, Plot, Series};
use super::session::{Load, Restored, Session, request};
use crate::out;
use outlive_keeper::KeeperError;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// How an image is restored: the name of it, the flags, and whether its files are in memory.
struct How {
    name: &'static str,
    flags: &'static [&'static str],
    warm: bool,
}

const WAYS: [How; 4] = [
    How {
        name: "eager, image in the page cache",
        flags: &[],
        warm: true,
    },
    How {
        name: "eager, image on the medium",
        flags: &[],
        warm: false,
    },
    How {
        name: "lazy, image in the page cache",
        flags: &["--lazy"],
        warm: true,
    },
    How {
        name: "lazy, image on the medium",
        flags: &["--lazy"],
        warm: false,
    },
];

/// What was measured.
#[derive(Default)]
struct Found {
    placed: Samples,
    first_run: Samples,
    answer: Samples,
    all: Samples,
}

/// Measures all of it.
///
/// # Errors
/// As its parts.
pub fn measure(session: &Session, effort: &Effort) -> Result<Report, KeeperError> {
    let mut report = Report::new("restore", "Time of a restore");
    report.notes.push(
        "Times are from the start of the command: until the first answer over a socket, and until \
         the program has read all its pages and given their sum, which must be right. `in place` \
         and `first run` are what the command tells of itself."
            .into(),
    );
    if effort.wants("restore-memory") {
        against_memory(session, effort, &mut report)?;
    }
    if let Some(criu) = effort.peer.as_ref().filter(|_| effort.wants("peer")) {
        report.tables.push(against_criu(session, effort, criu)?);
    }
    Ok(report)
}

fn sizes(effort: &Effort, most: u64) -> Vec<u64> {
    let most = effort.memory(most, 64 << 20);
    effort.points(
        &[16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30],
        &[32 << 20],
        most,
    )
}

fn against_memory(
    session: &Session,
    effort: &Effort,
    report: &mut Report,
) -> Result<(), KeeperError> {
    let columns = [
        "memory",
        "how",
        "first answer",
        "all read",
        "in place",
        "first run",
        "memory by all read",
    ];
    let mut table = Table::new("restore-memory", "Against memory", &columns);
    let mut lines = Vec::new();
    for how in &WAYS {
        for what in ["first answer", "all pages read"] {
            let name = format!("{}: {what}", how.name);
            lines.push(Series {
                name,
                points: Vec::new(),
            });
        }
    }
    let dir = session.dir().join("image");
    for memory in sizes(effort, 4 << 30) {
        let size = Cell::whole(Unit::Memory, memory);
        if let Some(lack) = session.lacks(memory * 2, memory * 2) {
            table.row(vec![size, Cell::words(format!("not measured: {lack}"))]);
            continue;
        }
        out::say(&format!("restore: {}", Unit::Memory.show(float(memory))));
        let (port, sum) = image(session, memory, &dir)?;
        for (nth, how) in WAYS.iter().enumerate() {
            let found = match repeated(session, effort, how, &dir, port, sum) {
                Err(KeeperError::Told {
                    exit: 2 | 3,
                    message,
                }) => {
                    let why = format!("not offered by this version: {}", out::tame(&message));
                    table.row(vec![size.clone(), Cell::words(how.name), Cell::words(why)]);
                    continue;
                }
                other => other?,
            };
            let point = |s: &Samples| s.median().map(|m| (float(memory), m, s.percentile(99.0)));
            lines[2 * nth].points.extend(point(&found.answer));
            lines[2 * nth + 1].points.extend(point(&found.all));
            let speed = found
                .all
                .median()
                .map_or(0.0, |us| float(memory) * 1e6 / us.max(1.0));
            table.row(vec![
                size.clone(),
                Cell::words(how.name),
                Cell::Many(Unit::Time, found.answer),
                Cell::Many(Unit::Time, found.all),
                Cell::Many(Unit::Time, found.placed),
                Cell::Many(Unit::Time, found.first_run),
                Cell::One(Unit::Speed, speed),
            ]);
        }
        let _ = std::fs::remove_dir_all(&dir);
    }
    report.tables.push(table);
    lines.retain(|line| !line.points.is_empty());
    let plot = Plot {
        title: "From the command to the program".into(),
        x: Axis {
            label: "memory of the program".into(),
            unit: Unit::Memory,
            log: true,
        },
        y: Axis {
            label: "time".into(),
            unit: Unit::Time,
            log: true,
        },
        series: lines,
    };
    report.plots.push(("restore-memory", plot));
    Ok(())
}

/// A program that holds so much is saved and ended; gives its port and the sum of its pages.
fn image(session: &Session, memory: u64, dir: &Path) -> Result<(u16, u64), KeeperError> {
    let mut load = Load::start(session)?;
    load.ask(&format!("hold 1 {memory}"))?;
    let sum = load.ask("sum")?;
    let pid = load.program.pid().to_string();
    let mut command = session.outlive(&["checkpoint", "--pid", &pid, "--image"])?;
    session.run_beside(command.arg(dir), &mut [&mut load.program])?;
    Ok((load.port(), sum))
}

fn repeated(
    session: &Session,
    effort: &Effort,
    how: &How,
    dir: &Path,
    port: u16,
    sum: u64,
) -> Result<Found, KeeperError> {
    let mut found = Found::default();
    for nth in 0..=effort.runs(10, 2) {
        if !how.warm {
            out_of_cache(dir)?;
        }
        let mut command = session.outlive(&["restore", "--detach", "--image"])?;
        command.arg(dir).args(how.flags);
        let (began, printed) = (Instant::now(), session.run(&mut command)?);
        let value: Value = serde_json::from_str(&printed).unwrap_or_default();
        let pid = value["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok());
        let _restored = Restored(pid.ok_or_else(|| {
            KeeperError::Other(format!("outlive restore told no pid: {printed}"))
        })?);
        let (answer, all) = answers(session, began, port, sum)?;
        if nth == 0 {
            continue;
        }
        found.answer.add(answer);
        found.all.add(all);
        found.placed.0.extend(value["restore_us"].as_f64());
        found.first_run.0.extend(value["first_run_us"].as_f64());
    }
    Ok(found)
}

/// When the restored program gives its first answer, and when the sum of its pages; microseconds
/// since then.
fn answers(
    session: &Session,
    began: Instant,
    port: u16,
    sum: u64,
) -> Result<(f64, f64), KeeperError> {
    session.wait("an answer of the restored program", || {
        Ok(request(port, "hello").ok())
    })?;
    let answer = began.elapsed().as_secs_f64() * 1e6;
    let now = request(port, "sum").map_err(KeeperError::io("ask for the sum of all pages"))?;
    let all = began.elapsed().as_secs_f64() * 1e6;
    if now != sum {
        return Err(KeeperError::Other(format!(
            "the restored program does not hold what it held: the sum was {sum} and is {now}"
        )));
    }
    Ok((answer, all))
}

/// Drops what the page cache has of the image.
fn out_of_cache(dir: &Path) -> Result<(), KeeperError> {
    let wrap = |error| KeeperError::io::<std::io::Error>(format!("read {}", dir.display()))(error);
    for entry in std::fs::read_dir(dir).map_err(wrap)? {
        let file = std::fs::File::open(entry.map_err(wrap)?.path()).map_err(wrap)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|error| wrap(error.into()))?;
    }
    Ok(())
}

/// CRIU's restore of its own image of the same program, in alternation.
fn against_criu(session: &Session, effort: &Effort, criu: &Path) -> Result<Table, KeeperError> {
    let columns = [
        "memory",
        "outlive: first answer",
        "CRIU: first answer",
        "CRIU / outlive",
    ];
    let heading = "Against CRIU, in alternation: eager, images in the page cache";
    let mut table = Table::new("peer-restore", heading, &columns);
    let (ours, theirs) = (session.dir().join("image"), session.dir().join("criu"));
    for memory in sizes(effort, 1 << 30) {
        let size = Cell::whole(Unit::Memory, memory);
        if let Some(lack) = session.lacks(memory * 2, memory * 4) {
            table.row(vec![size, Cell::words(format!("not measured: {lack}"))]);
            continue;
        }
        out::say(&format!(
            "restore: against CRIU with {}",
            Unit::Memory.show(float(memory))
        ));
        let (mut outlive, mut peer, mut ratio) = Default::default();
        let mut fails = None;
        for _ in 0..effort.runs(10, 2) {
            let turn = alternate(session, effort, criu, memory, (&ours, &theirs), &mut fails)?;
            note(turn, &mut outlive, &mut peer, &mut ratio);
        }
        let peer = fails.map_or(Cell::Many(Unit::Time, peer), Cell::Words);
        let outlive = Cell::Many(Unit::Time, outlive);
        table.row(vec![size, outlive, peer, Cell::Range(Unit::Ratio, ratio)]);
    }
    Ok(table)
}

fn note(turn: (f64, Option<f64>), ours: &mut Samples, theirs: &mut Samples, ratio: &mut Samples) {
    ours.add(turn.0);
    if let Some(their) = turn.1 {
        theirs.add(their);
        ratio.add(their / turn.0.max(1.0));
    }
}

/// Both save, and then both restore, one program; the times until its first answers.
fn alternate(
    session: &Session,
    effort: &Effort,
    criu: &Path,
    memory: u64,
    (ours, theirs): (&Path, &Path),
    fails: &mut Option<String>,
) -> Result<(f64, Option<f64>), KeeperError> {
    let mut load = Load::start(session)?;
    load.ask(&format!("hold 1 {memory}"))?;
    let (pid, port, sum) = (load.program.pid(), load.port(), load.ask("sum")?);
    let dumped = peer::attempt(peer::dump(session, criu, pid, theirs, None), fails)?;
    let pid_text = pid.to_string();
    let mut command = session.outlive(&["checkpoint", "--pid", &pid_text, "--image"])?;
    session.run_beside(command.arg(ours), &mut [&mut load.program])?;
    let found = repeated(session, &effort.once(), &WAYS[0], ours, port, sum)?;
    let _ = std::fs::remove_dir_all(ours);
    let answer = found.answer.median().unwrap_or(f64::NAN);
    let Some(_) = dumped else {
        return Ok((answer, None));
    };
    let mut command = Command::new(criu);
    command
        .args([
            "restore",
            "-v1",
            "--shell-job",
            "--restore-detached",
            "--images-dir",
        ])
        .arg(theirs);
    let began = Instant::now();
    let restored = peer::attempt(session.run(&mut command), fails)?;
    let their = match restored {
        None => None,
        Some(_) => {
            let _restored = Restored(pid);
            Some(answers(session, began, port, sum)?.0)
        }
    };
    let _ = std::fs::remove_dir_all(theirs);
    Ok((answer, their))
}
