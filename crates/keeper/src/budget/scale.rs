//! `docs/scale.md`: what the policy would do on machines that are not there.
//!
//! `OUTLIVE_UPDATE_DOCS=1 cargo test -p outlive-keeper scale` writes it; without that, the test says
//! whether it is current.

use super::model::{FLUSHES, Figures, MIB};
use super::simulation::{Disk, Load, MS, Outcome, SECOND, Scene, Simulation};
use std::fmt::Write;
use std::path::Path;

const GIB: u64 = 1024 * MIB;

/// Scanning page tables of clean memory, nanoseconds a GiB (measured, one thread).
const SCAN: u64 = 300_000;
/// Copying out of a program, nanoseconds a MiB (measured, one thread).
const COPY: u64 = 150_000;

/// A machine and what is asked of it.
#[derive(Clone, Copy)]
struct Machine {
    memory: u64,
    /// Bytes a second that the program writes.
    writes: u64,
    /// Bytes a second that all drives take.
    drives: u64,
    /// One flush.
    flush: u64,
    /// Threads that scan and copy.
    threads: u64,
    budget: u64,
}

/// Small ones like those of the measurements, and large ones.
fn machines() -> Vec<Machine> {
    let today = Machine {
        memory: GIB,
        writes: 100 * MIB,
        drives: 2700 * MIB,
        flush: MS / 5,
        threads: 1,
        budget: 100 * MS,
    };
    let drives = |n: u64| n * 6 * GIB;
    let middle = Machine {
        memory: 64 * GIB,
        writes: 2 * GIB,
        drives: drives(1),
        flush: MS / 10,
        threads: 4,
        ..today
    };
    let large = Machine {
        memory: 1024 * GIB,
        writes: 10 * GIB,
        drives: drives(8),
        threads: 32,
        ..middle
    };
    vec![
        today,
        Machine {
            budget: 10 * MS,
            ..today
        },
        Machine {
            writes: 4 * GIB,
            ..today
        },
        middle,
        Machine {
            budget: 20 * MS,
            ..middle
        },
        Machine {
            threads: 1,
            ..middle
        },
        Machine {
            threads: 1,
            budget: SECOND,
            ..large
        },
        large,
        Machine {
            writes: 100 * GIB,
            ..large
        },
        Machine {
            writes: 100 * GIB,
            budget: SECOND,
            ..large
        },
        Machine {
            writes: 100 * GIB,
            drives: drives(1),
            budget: SECOND,
            ..large
        },
        Machine {
            budget: 20 * MS,
            threads: 128,
            ..large
        },
    ]
}

fn scene(machine: &Machine) -> Scene {
    let per_mib = |rate: u64| MIB * SECOND / rate.max(1);
    let write = per_mib(machine.drives);
    Scene {
        load: Load {
            working_set: machine.memory,
            exposed: 0,
            maps: (0, 0),
            phases: vec![(machine.writes, u64::MAX)],
            freeze: MS / 2,
            scan: MS / 2 + machine.memory / GIB * SCAN / machine.threads,
        },
        disk: Disk {
            flush: machine.flush,
            stall_one_in: 2000,
            stall: 2 * MS,
            mib: write + COPY / machine.threads,
        },
        budget: machine.budget,
        interval: 100 * MS,
        strict: false,
        fails_one_in: 0,
        length: 60 * SECOND,
        tick: MS / 2,
        looks: true,
        believes: FLUSHES,
    }
}

fn bytes(n: u64) -> String {
    match n {
        0..MIB => format!("{} KiB", n >> 10),
        MIB..GIB => format!("{} MiB", n / MIB),
        _ => format!("{:.1} GiB", n as f64 / GIB as f64),
    }
}

fn row(out: &mut String, machine: &Machine, o: &Outcome) {
    let ms = |ns: u64| format!("{:.1} ms", ns as f64 / MS as f64);
    let possible = o.floor <= machine.budget;
    let runs = o.ran * 100 / o.observed.max(1);
    let per_second =
        u128::from(o.bytes_written) * u128::from(SECOND) / u128::from(o.observed.max(1));
    let per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
    let (unsaved, runs, events) = if possible {
        (
            bytes(o.allowed),
            format!("{runs} %"),
            format!("{} of {}", o.late, o.cuts),
        )
    } else {
        ("not possible".into(), "-".into(), "-".into())
    };
    let _ = writeln!(
        out,
        "| {} | {}/s | {}/s | {} | {} | {} | {unsaved} | {runs} | {}/s | {events} |",
        bytes(machine.memory),
        bytes(machine.writes),
        bytes(machine.drives),
        machine.threads,
        ms(machine.budget),
        ms(o.floor),
        bytes(if possible { per_second } else { 0 }),
    );
}

fn page() -> String {
    let mut out = String::from(INTRODUCTION);
    for machine in machines() {
        let outcome = Simulation::new(scene(&machine), 1).run();
        assert!(outcome.hidden.is_empty(), "a violation was hidden");
        row(&mut out, &machine, &outcome);
    }
    out.push_str(CONCLUSION);
    out
}

const INTRODUCTION: &str = "\
# Machines that are not here

The policy of the hold-up budget (`crates/keeper/src/budget`) on simulated machines, written by
`OUTLIVE_UPDATE_DOCS=1 cargo test -p outlive-keeper scale`. **Nothing below was measured on such a
machine**: it is arithmetic on figures that were measured on a small one, and says what limits what.

Taken from measurements: 0.3 ms to scan the page tables of a GiB, 0.15 ms to copy a MiB out of a program,
both by one thread and divided by the number of threads here (which is optimistic). Assumed: drives that
take 6 GiB a second each, flushes of 0.1 ms (0.2 ms for the first three rows), of which one in 2000
stalls for 2 ms, threads stopped after 0.5 ms. Programs write evenly, anywhere in their memory. 60
simulated seconds each, with power cuts at random instants, counted from the end of the first epoch.

| memory | written | drives take | threads | budget | floor | may be unsaved | program runs | to the drives | events late |
|---|---|---|---|---|---|---|---|---|---|
";

const CONCLUSION: &str = "
*floor*: an event with nothing to save; no budget below it can be kept. *program runs*: the rest of the
time it is stopped by captures, or held because the drives do not keep up (the duty cycle of the
throttle). *late*: events that took longer than the budget in truth; all of them are counted as
violations, or were stalls of the drive beyond what was measured before.

What follows:

- At a TiB the scan decides: with one thread it alone takes 0.3 s, whatever the drives do. Scans by
  many threads are what a budget of 100 ms needs there.
- What may be unsaved is what the drives and the copying take in the time that is left. A program that
  writes faster runs for that share of the time, and no policy changes that: a budget for 100 GiB a
  second needs either drives for it, or a program that rests.
- What goes to the drives in a day follows from the last but one column; `--max-wear` caps it, where no
  budget asks for more.
";

#[test]
fn the_page_of_scale_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/scale.md");
    let page = page();
    if std::env::var_os("OUTLIVE_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let how =
        "docs/scale.md is not current: OUTLIVE_UPDATE_DOCS=1 cargo test -p outlive-keeper scale";
    assert!(there == page, "{how}");
}

#[test]
fn with_one_thread_a_tebibyte_cannot_be_scanned_within_a_tenth_of_a_second() {
    let figures = Figures {
        scan_ns: 1024 * SCAN,
        ..Figures::default()
    };
    assert_eq!(figures.allowed(100 * MS), None);
}
