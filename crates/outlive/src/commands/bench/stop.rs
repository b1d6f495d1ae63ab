//! `bench stop`: what the time of a stop depends on, one thing varied at a time.
//!
//! Each epoch is asked for, after the program has written as many pages as it is told to: what is
//! found at the stop is what was found before it, and nothing more is written meanwhile.

use super::args::Effort;
use super::cache;
use super::figures::{Cell, Report, Samples, Table, Unit, float};
use super::peer;
use super::plot::{Axis, Plot, Series};
use super::session::{BY_REQUEST, Keeper, Load, Session};
use crate::out;
use outlive_keeper::KeeperError;

/// Pages written before each epoch, where not they are varied.
const WRITTEN: u64 = 256;
/// Memory, where not it is varied, bytes.
const MEMORY: u64 = 256 << 20;
/// Memory where something else than memory is varied, bytes.
const LITTLE: u64 = 16 << 20;
/// The strategies that take written pages at the stop, before it, and after it.
const EACH: &[&str] = &["incremental", "redundant", "cow"];
/// Where the strategy makes no difference.
const ONE: &[&str] = &["redundant"];
/// Epochs before those that count, besides the first.
const WARM_UP: usize = 3;

/// What is varied: a table, its first column, the values, and what the program is made of.
struct Varied {
    name: &'static str,
    heading: String,
    column: &'static str,
    label: &'static str,
    unit: Unit,
    values: Vec<u64>,
    strategies: &'static [&'static str],
    program: fn(u64) -> Made,
}

/// What a program is made of.
struct Made {
    memory: u64,
    more: Option<String>,
    written: u64,
}

/// What was measured of one program.
#[derive(Default)]
struct Found {
    first_us: u64,
    stop: Samples,
    durable: Samples,
    written: Samples,
}

/// Measures all of it.
///
/// # Errors
/// As its parts.
pub fn measure(session: &Session, effort: &Effort) -> Result<Report, KeeperError> {
    let mut report = Report::new("stop", "Stop time");
    report.notes.push(format!(
        "The program runs between epochs and writes its pages, spread evenly, before each; \
         {WRITTEN} pages where not they are varied. `first` is the stop of the first epoch, which \
         is the one in which everything is new."
    ));
    for varied in all(effort).into_iter().filter(|v| effort.wants(v.name)) {
        let (table, plot) = vary(session, effort, &varied)?;
        report.tables.push(table);
        report.plots.push((varied.name, plot));
    }
    if effort.wants("stop-redis") {
        report.tables.push(cache::measure(session, effort)?);
    }
    if let Some(criu) = effort.peer.as_ref().filter(|_| effort.wants("peer")) {
        report.tables.push(peer::stops(session, effort, criu)?);
    }
    Ok(report)
}

fn all(effort: &Effort) -> Vec<Varied> {
    let mut all = by_memory(effort);
    let tens = |most: u32| -> Vec<u64> {
        let powers = (0..=most).map(|n| 10u64.pow(n));
        [0].into_iter().chain(powers).collect()
    };
    let of = |name, heading: &str, column, label, values: &[u64], program| Varied {
        name,
        heading: heading.into(),
        column,
        label,
        unit: Unit::Count,
        values: effort.points(values, &[0, 10], u64::MAX),
        strategies: ONE,
        program,
    };
    all.push(of(
        "stop-threads",
        "Against threads",
        "further threads",
        "threads besides the first",
        &tens(3),
        |n| little(format!("threads {n}")),
    ));
    all.push(of(
        "stop-mappings",
        "Against mappings",
        "further mappings",
        "mappings besides those of the program itself",
        // Each is one mapping and a page that nobody may touch, which is another.
        &[0, 2, 20, 200, 2000, 20_000],
        |n| little(format!("mappings {}", n / 2)),
    ));
    all.push(of(
        "stop-descriptors",
        "Against descriptors",
        "further descriptors",
        "open descriptors besides the first four",
        &tens(4),
        |n| little(format!("descriptors {n}")),
    ));
    all
}

fn by_memory(effort: &Effort) -> Vec<Varied> {
    let most = effort.memory(4 << 30, 64 << 20);
    let sizes: Vec<u64> = (24..=34).step_by(2).map(|shift| 1u64 << shift).collect();
    let counts = [1, 16, 64, 256, 1024, 4096, 16_384, 65_536];
    let memory = Varied {
        name: "stop-memory",
        heading: "Against memory".into(),
        column: "memory",
        label: "memory",
        unit: Unit::Memory,
        values: effort.points(&sizes, &[16 << 20, 64 << 20], most),
        strategies: EACH,
        program: |memory| Made {
            memory,
            more: None,
            written: WRITTEN,
        },
    };
    let written = Varied {
        name: "stop-written",
        heading: "Against pages written since the last epoch".into(),
        column: "pages written",
        label: "pages written since the last epoch",
        unit: Unit::Count,
        values: effort.points(&counts, &[16, 1024], u64::MAX),
        strategies: EACH,
        program: |written| Made {
            memory: MEMORY,
            more: None,
            written,
        },
    };
    vec![memory, written]
}

fn little(more: String) -> Made {
    Made {
        memory: LITTLE,
        more: Some(more),
        written: WRITTEN,
    }
}

fn vary(session: &Session, effort: &Effort, v: &Varied) -> Result<(Table, Plot), KeeperError> {
    let columns = [
        v.column,
        "strategy",
        "stop: median / p99",
        "first",
        "durable: median / p99",
        "bytes an epoch",
    ];
    let mut table = Table::new(v.name, v.heading.clone(), &columns);
    let mut lines = Vec::new();
    for strategy in v.strategies {
        let mut points = Vec::new();
        for &value in &v.values {
            let shown = v.unit.show(float(value));
            out::say(&format!("stop: {} {shown}, {strategy}", v.column));
            let begin = vec![Cell::words(shown), Cell::words(*strategy)];
            let made = (v.program)(value);
            let found = match session.lacks(made.memory * 5 / 4, made.memory * 5 / 2) {
                Some(lack) => Err(format!("not measured: {lack}")),
                None => or_message(sample(session, effort, &made, strategy))?,
            };
            let found = match found {
                Ok(found) => found,
                Err(why) => {
                    table.row(begin.into_iter().chain([Cell::words(why)]).collect());
                    continue;
                }
            };
            let median = found.stop.median();
            points.extend(median.map(|m| (float(value), m, found.stop.percentile(99.0))));
            table.row(begin.into_iter().chain(found.cells()).collect());
        }
        let name = format!("{strategy}: median, with whiskers up to the 99th percentile");
        lines.push(Series { name, points });
    }
    let plot = Plot {
        title: format!("Stop time {}", lower_first(&v.heading)),
        x: Axis {
            label: v.label.into(),
            unit: v.unit,
            log: true,
        },
        y: Axis {
            label: "stop time".into(),
            unit: Unit::Time,
            log: true,
        },
        series: lines,
    };
    Ok((table, plot))
}

impl Found {
    fn cells(self) -> [Cell; 4] {
        [
            Cell::Many(Unit::Time, self.stop),
            Cell::whole(Unit::Time, self.first_us),
            Cell::Many(Unit::Time, self.durable),
            Cell::One(Unit::Bytes, self.written.median().unwrap_or(0.0)),
        ]
    }
}

/// A heading in the middle of a sentence.
fn lower_first(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(char::to_lowercase);
    first.into_iter().flatten().chain(letters).collect()
}

/// What a keeper refused, as a message; what ends the run stays an error.
fn or_message<T>(done: Result<T, KeeperError>) -> Result<Result<T, String>, KeeperError> {
    match done {
        Ok(value) => Ok(Ok(value)),
        Err(KeeperError::Told { message, exit }) if exit < 128 => Ok(Err(out::tame(&message))),
        Err(error) => Err(error),
    }
}

fn sample(
    session: &Session,
    effort: &Effort,
    made: &Made,
    strategy: &str,
) -> Result<Found, KeeperError> {
    let load = Load::start(session)?;
    load.ask(&format!("hold 1 {}", made.memory))?;
    if let Some(more) = &made.more {
        load.ask(more)?;
    }
    let flags = ["--strategy", strategy];
    let keeper = Keeper::attach(session, load.program.pid(), BY_REQUEST, &flags)?;
    let mut found = Found {
        first_us: keeper.epoch()?.stop_us,
        ..Found::default()
    };
    let warm_up = if effort.short { 1 } else { WARM_UP };
    for nth in 0..warm_up + effort.runs(200, 2) {
        load.ask(&format!("dirty {}", made.written))?;
        let taken = keeper.epoch()?;
        if nth >= warm_up {
            found.stop.add(float(taken.stop_us));
            found.durable.add(float(taken.durable_us));
            found.written.add(float(taken.bytes_written));
        }
    }
    Ok(found)
}
