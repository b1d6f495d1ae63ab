//! `heap`: a resilient heap without its program.

use crate::cli::HeapCommand;
use crate::out;
use outlive_keeper::KeeperError;
use resilient_heap::{Error, FileMemory, Report, examine, what_is_at};
use serde_json::{Value, json};
use std::path::Path;

/// `outlive heap`
pub fn heap(command: &HeapCommand, json: bool) -> Result<u8, KeeperError> {
    match command {
        HeapCommand::Inspect { file } => {
            let report = of_copy(file)?;
            if json {
                out::json(&as_json(&report));
            } else {
                print(&report);
            }
            Ok(0)
        }
        HeapCommand::Verify { file } => {
            let report = of_copy(file)?;
            tell(file, &report, "can be repaired", json);
            Ok(code(&report))
        }
        HeapCommand::Repair { file } => {
            // Opening for writing would make a file that is not there.
            of_copy(file)?;
            let memory = FileMemory::open(file).map_err(|error| failed(file, &error))?;
            let report = examine(memory).map_err(|error| failed(file, &error))?;
            tell(file, &report, "repaired", json);
            Ok(code(&report))
        }
    }
}

/// Looks at a copy in memory, so that the file stays as it is.
fn of_copy(file: &Path) -> Result<Report, KeeperError> {
    let copy = FileMemory::copy(file).map_err(|error| failed(file, &error))?;
    examine(copy).map_err(|error| failed(file, &error))
}

fn failed(file: &Path, error: &Error) -> KeeperError {
    let exit = match error {
        Error::Damaged { .. } => 4,
        _ => 1,
    };
    let message = match error {
        Error::Memory { what, code } if *code != 0 => {
            format!("{what}: {}", std::io::Error::from_raw_os_error(*code))
        }
        other => other.to_string(),
    };
    KeeperError::Told {
        message: format!("{}: {message}", file.display()),
        exit,
    }
}

fn code(report: &Report) -> u8 {
    if report.scrubbed.lost.is_empty() {
        0
    } else {
        4
    }
}

fn as_json(report: &Report) -> Value {
    let places = |places: &[usize]| -> Vec<Value> {
        let place = |at: &usize| json!({ "at": at, "what": what_is_at(report, *at) });
        places.iter().map(place).collect()
    };
    json!({
        "id": format!("{:016x}", report.id),
        "bytes": report.bytes,
        "data_bytes": report.data_bytes,
        "zones": report.zones,
        "zone_pages": report.zone_pages,
        "log_pages": report.log_pages,
        "fingerprint": format!("{:016x}", report.fingerprint),
        "schema": report.schema,
        "unfinished": report.unfinished,
        "replayed": report.replayed,
        "discarded": report.discarded,
        "corrected_elsewhere": report.corrected_elsewhere,
        "lines": report.scrubbed.lines,
        "corrected": places(&report.scrubbed.corrected),
        "lost": places(&report.scrubbed.lost),
    })
}

fn print(report: &Report) {
    out::line(&format!("id           {:016x}", report.id));
    out::line(&format!(
        "size         {} in {}, {} of data",
        out::bytes(report.bytes as u64),
        out::plural(report.zones as u64, "zone", "zones"),
        out::bytes(report.data_bytes as u64)
    ));
    let state = match (report.unfinished, report.replayed) {
        (false, _) => "closed".to_owned(),
        (true, n) => format!(
            "not closed; {} to bring home at the next opening",
            out::plural(u64::from(n), "commit", "commits")
        ),
    };
    out::line(&format!("state        {state}"));
    out::line(&format!("layout       {:016x}", report.fingerprint));
    for line in report.schema.lines() {
        out::line(&format!("             {}", out::tame(line)));
    }
}

/// Says what was found; `done` is what became of the damage.
fn tell(file: &Path, report: &Report, done: &str, json: bool) {
    if json {
        out::json(&as_json(report));
    }
    let place = |at: usize| {
        format!(
            "{} at byte {at} ({})",
            file.display(),
            what_is_at(report, at)
        )
    };
    for at in &report.scrubbed.corrected {
        out::say(&format!("warning, {done}: {}", place(*at)));
    }
    if report.corrected_elsewhere > 0 {
        out::say(&format!("warning, {done}: superblock, schema or log"));
    }
    if report.discarded {
        out::say("warning: an incomplete commit in the log does not count");
    }
    for at in &report.scrubbed.lost {
        out::say(&format!("lost: {}", place(*at)));
    }
    if !json {
        out::line(&format!(
            "{} checked, {} damaged, {} lost",
            out::plural(report.scrubbed.lines, "line", "lines"),
            out::count(report.scrubbed.corrected.len() as u64),
            out::count(report.scrubbed.lost.len() as u64)
        ));
    }
}
