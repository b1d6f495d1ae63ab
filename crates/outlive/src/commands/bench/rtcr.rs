//! `bench rtcr`: the three experiments of RTCR's evaluation (real-time checkpoint/restore for
//! Genode): one area of memory by size, areas of 1 MB by number, and the granularity of incremental
//! checkpoints; each with every strategy of capture.
//!
//! The first checkpoint takes everything, the second what was written since. RTCR stops its program
//! for all of a checkpoint; here stop and durable time are two figures.

use super::args::Effort;
use super::figures::{Cell, Report, Samples, Table, Unit, float};
use super::plot::{Axis, Plot, Series};
use super::session::{BY_REQUEST, Keeper, Load, Session};
use crate::out;
use outlive_keeper::KeeperError;
use outlive_keeper::epoch::Taken;

/// The strategies of the contract.
const STRATEGIES: [&str; 4] = ["copy", "incremental", "redundant", "cow"];
/// A megabyte, as an area.
const MB: u64 = 1 << 20;
/// The part of the memory that is written between the first and the second checkpoint.
const PART: u64 = 10;
/// The area of the third experiment, bytes.
const GRAINY: u64 = 64 << 20;

/// What is varied.
struct Varied {
    name: &'static str,
    heading: &'static str,
    title: &'static str,
    /// Files of the plots, and which checkpoint each shows.
    plots: [(&'static str, &'static str); 2],
    column: &'static str,
    /// Number of areas and bytes of each, of a value.
    areas: fn(u64) -> (u64, u64),
}

/// What was measured under one strategy.
#[derive(Default)]
struct Found {
    first_stop: Samples,
    first_durable: Samples,
    stop: Samples,
    durable: Samples,
    pages: Samples,
    written: Samples,
}

/// Measures all of it.
///
/// # Errors
/// As its parts.
pub fn measure(session: &Session, effort: &Effort) -> Result<Report, KeeperError> {
    let mut report = Report::new("rtcr", "Areas of memory: size, number, granularity");
    report.notes.push(format!(
        "First checkpoint: everything, of a program that is not tracked yet. Second: a part of 1/{PART} \
         of all pages was written since, spread evenly, while nothing was captured."
    ));
    let size = Varied {
        name: "rtcr-size",
        heading: "One area",
        title: "one area by its size",
        plots: [("rtcr-size-first", "first"), ("rtcr-size-second", "second")],
        column: "area, MB",
        areas: |n| (1, n * MB),
    };
    let number = Varied {
        name: "rtcr-number",
        heading: "Areas of 1 MB",
        title: "areas of 1 MB by their number",
        plots: [
            ("rtcr-number-first", "first"),
            ("rtcr-number-second", "second"),
        ],
        column: "areas",
        areas: |n| (n, MB),
    };
    for varied in [size, number] {
        if effort.wants(varied.name) {
            vary(session, effort, &varied, &mut report)?;
        }
    }
    if effort.wants("rtcr-granularity") {
        granularity(session, effort, &mut report)?;
    }
    Ok(report)
}

fn vary(
    session: &Session,
    effort: &Effort,
    v: &Varied,
    report: &mut Report,
) -> Result<(), KeeperError> {
    let columns = [
        v.column,
        "strategy",
        "first: stop",
        "first: durable",
        "second: stop",
        "second: durable",
        "second: pages",
    ];
    let mut table = Table::new(v.name, v.heading, &columns);
    let mut lines: [Vec<Series>; 2] = Default::default();
    let most = effort.memory(200 * MB, 20 * MB) / MB;
    let values = effort.points(&[1, 2, 5, 10, 20, 50, 100, 150, 200], &[10], most);
    for strategy in STRATEGIES {
        let mut line: [Vec<_>; 2] = Default::default();
        for &value in &values {
            out::say(&format!("rtcr: {} {value}, {strategy}", v.column));
            let (areas, bytes) = (v.areas)(value);
            let flags = ["--strategy", strategy];
            let found = repeated(session, effort, areas, bytes, &flags);
            let found = match found {
                Ok(found) => found,
                Err(error) => {
                    let why = left_out(error)?;
                    table.row(vec![
                        Cell::words("all"),
                        Cell::words(strategy),
                        Cell::words(why),
                    ]);
                    break;
                }
            };
            let point = |samples: &Samples| {
                samples
                    .median()
                    .map(|m| (float(value), m, samples.percentile(99.0)))
            };
            line[0].extend(point(&found.first_stop));
            line[1].extend(point(&found.stop));
            table.row(vec![
                Cell::whole(Unit::Count, value),
                Cell::words(strategy),
                Cell::Many(Unit::Time, found.first_stop),
                Cell::Many(Unit::Time, found.first_durable),
                Cell::Many(Unit::Time, found.stop),
                Cell::Many(Unit::Time, found.durable),
                Cell::One(Unit::Count, found.pages.median().unwrap_or(0.0)),
            ]);
        }
        for (lines, points) in lines.iter_mut().zip(line) {
            let name = strategy.into();
            lines.extend((!points.is_empty()).then_some(Series { name, points }));
        }
    }
    report.tables.push(table);
    for ((file, which), series) in v.plots.into_iter().zip(lines) {
        let title = format!("Stop time of the {which} checkpoint: {}", v.title);
        report.plots.push((file, plot(title, v.column, series)));
    }
    Ok(())
}

fn plot(title: String, x: &str, series: Vec<Series>) -> Plot {
    let axis = |label: &str, unit| Axis {
        label: label.into(),
        unit,
        log: true,
    };
    Plot {
        title,
        x: axis(x, Unit::Count),
        y: axis("stop time", Unit::Time),
        series,
    }
}

/// Both checkpoints, again and again, each time of a program that is not tracked yet.
fn repeated(
    session: &Session,
    effort: &Effort,
    areas: u64,
    bytes: u64,
    flags: &[&str],
) -> Result<Found, KeeperError> {
    let load = Load::start(session)?;
    let pages = load.ask(&format!("hold {areas} {bytes}"))?;
    let mut found = Found::default();
    for nth in 0..=effort.runs(20, 1) {
        let (first, second) = both(session, &load, pages.div_ceil(PART), flags)?;
        if nth == 0 {
            continue;
        }
        found.first_stop.add(float(first.stop_us));
        found.first_durable.add(float(first.durable_us));
        found.note(&second);
    }
    Ok(found)
}

fn both(
    session: &Session,
    load: &Load<'_>,
    written: u64,
    flags: &[&str],
) -> Result<(Taken, Taken), KeeperError> {
    let keeper = Keeper::attach(session, load.program.pid(), BY_REQUEST, flags)?;
    let first = keeper.epoch()?;
    load.ask(&format!("dirty {written}"))?;
    Ok((first, keeper.epoch()?))
}

impl Found {
    fn note(&mut self, taken: &Taken) {
        self.stop.add(float(taken.stop_us));
        self.durable.add(float(taken.durable_us));
        self.pages.add(float(taken.pages));
        self.written.add(float(taken.bytes_written));
    }
}

/// Why something could not be measured; what ends the run goes on as an error.
fn left_out(error: KeeperError) -> Result<String, KeeperError> {
    match error {
        KeeperError::Told {
            exit: 2 | 3,
            message,
        } => Ok(format!(
            "not offered by this version: {}",
            out::tame(&message)
        )),
        other => Err(other),
    }
}

/// The second checkpoint by granularity, for few and for many written pages.
fn granularity(session: &Session, effort: &Effort, report: &mut Report) -> Result<(), KeeperError> {
    let columns = [
        "pages written",
        "where",
        "granularity, pages",
        "stop",
        "durable",
        "pages taken",
        "bytes written",
    ];
    let heading = "Granularity: one area of 64 MB, second checkpoint, strategy incremental";
    let mut table = Table::new("rtcr-granularity", heading, &columns);
    let mut lines = Vec::new();
    let grains = effort.points(&[1, 32, 64, 128, 256, 512, 1024], &[1, 64], u64::MAX);
    let patterns = [
        ("dirty", "evenly spread"),
        ("fragment", "every second page of a zone"),
    ];
    let counts = effort.points(&[16, 256, 4096], &[256], u64::MAX);
    for (written, (verb, place)) in counts.iter().flat_map(|n| patterns.map(|p| (*n, p))) {
        let name = format!("{written} pages written, {place}");
        let mut line = Series {
            name,
            points: Vec::new(),
        };
        for &grain in &grains {
            out::say(&format!(
                "rtcr: {written} pages written, {place}, granularity {grain}"
            ));
            let grain_text = grain.to_string();
            let flags = ["--strategy", "incremental", "--granularity", &grain_text];
            let begin = [
                Cell::whole(Unit::Count, written),
                Cell::words(place),
                Cell::whole(Unit::Count, grain),
            ];
            let found = match second_only(session, effort, &format!("{verb} {written}"), &flags) {
                Ok(found) => found,
                Err(error) => {
                    let why = Cell::words(left_out(error)?);
                    table.row(begin.into_iter().chain([why]).collect());
                    break;
                }
            };
            let median = found.stop.median();
            line.points
                .extend(median.map(|m| (float(grain), m, found.stop.percentile(99.0))));
            let figures = [
                Cell::Many(Unit::Time, found.stop),
                Cell::Many(Unit::Time, found.durable),
                Cell::One(Unit::Count, found.pages.median().unwrap_or(0.0)),
                Cell::One(Unit::Bytes, found.written.median().unwrap_or(0.0)),
            ];
            table.row(begin.into_iter().chain(figures).collect());
        }
        lines.push(line);
    }
    lines.retain(|line| !line.points.is_empty());
    report.tables.push(table);
    let title = "Stop time by granularity".into();
    let plot = plot(title, "granularity, pages", lines);
    report.plots.push(("rtcr-granularity", plot));
    Ok(())
}

fn second_only(
    session: &Session,
    effort: &Effort,
    write: &str,
    flags: &[&str],
) -> Result<Found, KeeperError> {
    let load = Load::start(session)?;
    load.ask(&format!("hold 1 {GRAINY}"))?;
    let keeper = Keeper::attach(session, load.program.pid(), BY_REQUEST, flags)?;
    keeper.epoch()?;
    let mut found = Found::default();
    for nth in 0..=effort.runs(100, 3) {
        load.ask(write)?;
        let taken = keeper.epoch()?;
        if nth > 0 {
            found.note(&taken);
        }
    }
    Ok(found)
}
