//! What keeping a program costs, measured in the same run in which it is judged.
//!
//! Only where `OUTLIVE_FIGURES` names a file, to which one line of JSON a program is added:
//! `cargo xtask bench programs` does that, and makes the table of `docs/programs.md` of it.

use super::{Life, Program};
use crate::support::times;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a program is observed.
const OBSERVED: Duration = Duration::from_secs(15);

fn wanted() -> Option<PathBuf> {
    std::env::var_os("OUTLIVE_FIGURES").map(PathBuf::from)
}

/// The interval of epochs: the default of the product where figures are wanted, else one that
/// makes more of them.
pub fn every() -> &'static str {
    if wanted().is_none() { "50ms" } else { "100ms" }
}

/// How often a program ends and comes back.
pub fn rounds() -> usize {
    if wanted().is_some() { 10 } else { times(2, 25) }
}

/// The figures of one run.
#[derive(Default)]
pub struct Figures {
    restore_us: Vec<u64>,
    stop_us: Vec<u64>,
    durable_us: Vec<u64>,
    bytes: Vec<u64>,
    epochs: u64,
    seconds: f64,
    processes: usize,
    threads: usize,
    memory: u64,
}

impl Figures {
    /// Notes what a restore told.
    pub fn restored(&mut self, told: &Value) {
        self.restore_us.extend(told["first_run_us"].as_u64());
    }

    /// Watches the program for a while.
    pub fn observe(&mut self, life: &mut Life) {
        if wanted().is_none() {
            return;
        }
        let (first, place) = (life.epoch(), life.place);
        let (begun, mut seen) = (Instant::now(), BTreeMap::new());
        while begun.elapsed() < OBSERVED {
            // The history is short where a store has begun anew.
            let list = place.call(&["history", "a", "--json"]);
            list.succeeds();
            for epoch in list.json().as_array().unwrap() {
                seen.insert(epoch["epoch"].as_u64().unwrap(), epoch.clone());
            }
            let members = life.members();
            self.processes = self.processes.max(members.len());
            self.threads = self
                .threads
                .max(members.iter().map(|&pid| threads(pid)).sum());
            self.memory = self
                .memory
                .max(members.iter().map(|&pid| memory(pid)).sum());
            std::thread::sleep(Duration::from_millis(250));
        }
        self.seconds = begun.elapsed().as_secs_f64();
        self.epochs = place.newest("a") - first;
        let seen = seen.split_off(&(first + 1));
        let of = |what| seen.values().filter_map(move |e: &Value| e[what].as_u64());
        self.stop_us.extend(of("stop_us"));
        self.durable_us.extend(of("durable_us"));
        self.bytes.extend(of("bytes_written"));
    }

    /// Adds a line to the file.
    pub fn tell(&self, program: &Program) {
        let Some(path) = wanted() else {
            return;
        };
        let line = json!({
            "name": program.name, "load": program.load, "compared": program.compared,
            "ended": "kills",
            "restore_us": self.restore_us, "stop_us": self.stop_us,
            "durable_us": self.durable_us, "bytes_written": self.bytes,
            "epochs": self.epochs, "seconds": self.seconds,
            "processes": self.processes, "threads": self.threads, "memory_bytes": self.memory,
        });
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        writeln!(file, "{line}").unwrap();
    }
}

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// Bytes of memory, what is shared counted in parts.
fn memory(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
