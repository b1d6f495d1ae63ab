//! Another program on the machine: the LZMA benchmark of 7-Zip, with one thread, next to a process
//! that holds much memory, and next to one that allocates as much, untracked and tracked.

use super::super::args::Effort;
use super::super::figures::{Cell, Table, Unit, float};
use super::super::redis::installed;
use super::super::session::{Load, Session};
use super::{EVERY, turns};
use crate::out;
use outlive_keeper::KeeperError;
use std::process::Command;

/// Bytes a second that the other process writes or allocates.
const RATE: u64 = 32 << 20;
/// The names under which 7-Zip is installed.
const NAMES: [&str; 4] = ["7zr", "7z", "7za", "7zz"];

/// Measures it.
///
/// # Errors
/// As its parts; not where 7-Zip is not installed, which is a row.
pub fn measure(session: &Session, effort: &Effort) -> Result<Table, KeeperError> {
    let memory = effort.memory(10 << 30, 32 << 20);
    let heading = format!(
        "A neighbour: `7z b` with one thread next to a process of {}, KiB/s",
        Unit::Memory.show(float(memory))
    );
    let columns = [
        "the process",
        "dictionary",
        "what",
        "untracked",
        "tracked",
        "tracked / untracked",
        "again",
    ];
    let mut table = Table::new("wpp-neighbour", heading, &columns);
    let Some(program) = NAMES.into_iter().find(|name| installed(name)) else {
        table.row(vec![Cell::words("not measured: 7-Zip is not installed")]);
        return Ok(table);
    };
    if let Some(lack) = session.lacks(memory * 5 / 4 + (1 << 30), memory * 3 / 2 + (4 << 30)) {
        table.row(vec![Cell::words(format!("not measured: {lack}"))]);
        return Ok(table);
    }
    let rate = out::bytes(RATE);
    let kinds = [
        (format!("holds its memory and writes {rate}/s to it"), true),
        (
            format!("allocates {rate}/s, up to its memory, and gives it back"),
            false,
        ),
    ];
    let kinds = kinds.into_iter().take(if effort.short { 1 } else { 2 });
    for (kind, holds) in kinds {
        out::say(&format!("wpp: a neighbour of a process that {kind}"));
        let load = Load::start(session)?;
        if holds {
            load.ask(&format!("hold 1 {memory}"))?;
            load.ask(&format!("writes {}", RATE / 4096))?;
        } else {
            load.ask(&format!("allocates {RATE} {memory}"))?;
        }
        let mut names = Vec::new();
        let pid = load.program.pid();
        let found = turns(session, pid, effort.runs(5, 1), EVERY, || {
            let lines = seven_zip(session, program, effort.short)?;
            names = lines.iter().map(|(name, _)| name.clone()).collect();
            Ok(lines.into_iter().flat_map(|(_, speeds)| speeds).collect())
        })?;
        let whats = ["compressing", "decompressing"];
        let labels = names
            .iter()
            .flat_map(|name| whats.map(|what| (name.clone(), what)));
        for ((dictionary, what), turns) in labels.zip(found) {
            table.row(vec![
                Cell::words(kind.clone()),
                Cell::words(dictionary),
                Cell::words(what),
                Cell::Range(Unit::Count, turns.plain),
                Cell::Range(Unit::Count, turns.tracked),
                Cell::Range(Unit::Ratio, turns.ratio),
                Cell::Range(Unit::Ratio, turns.again),
            ]);
        }
    }
    Ok(table)
}

/// For each dictionary, its size and the speed of compressing and decompressing, KiB/s.
fn seven_zip(
    session: &Session,
    program: &str,
    short: bool,
) -> Result<Vec<(String, [f64; 2])>, KeeperError> {
    let mut command = Command::new(program);
    command.args(["b", "1", "-mmt=1"]);
    // A dictionary smaller than any that is of interest, for no longer than it takes to see a speed.
    command.args(if short {
        &["-md=18", "-mtime=1"][..]
    } else {
        &["-md=25"]
    });
    let text = session.run(&mut command)?;
    let lines: Vec<_> = text.lines().filter_map(speeds).collect();
    if lines.is_empty() {
        return Err(KeeperError::Other(format!(
            "{program} b printed no speeds:\n{text}"
        )));
    }
    Ok(lines)
}

/// `22:  5434  100  5302  5287  |  57187  99  4913  4883`
fn speeds(line: &str) -> Option<(String, [f64; 2])> {
    let (dictionary, rest) = line.trim().split_once(':')?;
    let shift: u32 = dictionary.parse().ok().filter(|shift| *shift < 40)?;
    let (one, two) = rest.split_once('|')?;
    let first = |text: &str| text.split_whitespace().next()?.parse().ok();
    let name = match shift {
        20.. => format!("{} MiB", 1u64 << (shift - 20)),
        _ => format!("{} KiB", (1u64 << shift) >> 10),
    };
    Some((name, [first(one)?, first(two)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speeds_of_seven_zip_are_read() {
        let line = "22:       5434   100   5302   5287  |      57187    99   4913   4883";
        assert_eq!(speeds(line), Some(("4 MiB".into(), [5434.0, 57187.0])));
        assert_eq!(speeds("Avr:  1 2 3 4 | 5 6 7 8"), None);
        assert_eq!(
            speeds("RAM usage:     57 MB (LP),  # Benchmark threads:      1"),
            None
        );
    }
}
