//! `bench wpp`: the experiments of the evaluation of Whole Process Persistence: a program that maps,
//! fills and unmaps memory; Redis; another program on the same machine; and the time to persist.
//!
//! What is tracked is the same process that is measured without: a keeper is attached to it and
//! leaves again, so that nothing else differs.

mod neighbour;
mod persist;
mod redis;
mod turns;

use super::args::Effort;
use super::figures::{Cell, Report, Samples, Table, Unit, float};
use super::plot::{Axis, Plot, Series};
use super::session::{Load, Session, load_command, taken_from};
use crate::out;
use outlive_keeper::KeeperError;
use std::process::{Command, Stdio};
use std::time::Instant;
use turns::turns;

/// Time between the epochs of what is tracked.
const EVERY: &str = "100ms";
/// How often memory is mapped, filled and unmapped in one pass.
const TIMES: u64 = 10;
/// Most passes in one turn …
const PASSES: usize = 10;
/// … and least turns, where there are so many passes.
const TURNS: usize = 5;

/// Measures all of it.
///
/// # Errors
/// As its parts.
pub fn measure(session: &Session, effort: &Effort) -> Result<Report, KeeperError> {
    let mut report = Report::new("wpp", "Programs while they are tracked");
    report.notes.push(format!(
        "Tracked: an epoch every {EVERY}. Each turn measures untracked, tracked, untracked: the \
         ratio is of the middle one to the mean of the others, and `again` is the last to the first, \
         which is what the machine varies by without any tracking. Ratios are median (least to \
         most; number of turns)."
    ));
    if effort.wants("wpp-start") {
        report.tables.push(start(session, effort)?);
    }
    if effort.wants("wpp-cycle") {
        cycle(session, effort, &mut report)?;
    }
    if effort.wants("wpp-redis") {
        redis::measure(session, effort, &mut report)?;
    }
    if effort.wants("wpp-neighbour") {
        report.tables.push(neighbour::measure(session, effort)?);
    }
    if effort.wants("wpp-persist") {
        persist::measure(session, effort, &mut report)?;
    }
    Ok(report)
}

/// What `outlive run` adds to the start of a program.
fn start(session: &Session, effort: &Effort) -> Result<Table, KeeperError> {
    out::say("wpp: start of a program");
    let (mut plain, mut kept, mut more) =
        (Samples::default(), Samples::default(), Samples::default());
    for nth in 0..=effort.runs(500, 5) {
        let place = session.dir().join("hello");
        let mut direct = load_command(session, &place)?;
        let without = until_hello(session, direct.arg("--hello"))?;
        let mut words = vec!["run".to_owned(), "--name".to_owned()];
        words.extend([format!("hello-{nth}"), "--".to_owned()]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = session.outlive(&words)?;
        let inner = load_command(session, &place)?;
        command
            .arg(inner.get_program())
            .args(inner.get_args())
            .arg("--hello");
        let with = until_hello(session, &mut command)?;
        if nth > 0 {
            plain.add(without);
            kept.add(with);
            more.add(with - without);
        }
    }
    let columns = ["what", "time"];
    let mut table = Table::new(
        "wpp-start",
        "Until a program has said its first word",
        &columns,
    );
    table.row(vec![
        Cell::words("by itself"),
        Cell::Many(Unit::Time, plain),
    ]);
    table.row(vec![
        Cell::words("under `outlive run`"),
        Cell::Many(Unit::Time, kept),
    ]);
    table.row(vec![
        Cell::words("difference"),
        Cell::Many(Unit::Time, more),
    ]);
    Ok(table)
}

fn until_hello(session: &Session, command: &mut Command) -> Result<f64, KeeperError> {
    let place = session.dir().join("hello");
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir(session.dir());
    let began = Instant::now();
    let mut program = session.spawn(command)?;
    let mut took = None;
    session.wait("the end of a program", || {
        if took.is_none() && place.exists() {
            took = Some(began.elapsed().as_secs_f64() * 1e6);
        }
        program.ended()
    })?;
    let said = taken_from(&place);
    let took = took.or_else(|| Some(began.elapsed().as_secs_f64() * 1e6));
    match (said, took) {
        (Some(_), Some(took)) => Ok(took),
        _ => Err(KeeperError::Other("a program ended without a word".into())),
    }
}

/// A program that maps, fills and unmaps memory, by the size of the mapping.
fn cycle(session: &Session, effort: &Effort, report: &mut Report) -> Result<(), KeeperError> {
    let columns = [
        "mapping, MiB",
        "untracked",
        "tracked",
        "tracked / untracked",
        "again",
    ];
    let heading = format!("Map, fill, unmap, {TIMES} times: time of a pass");
    let mut table = Table::new("wpp-cycle", heading, &columns);
    let names = ["untracked", "tracked"];
    let mut lines = names.map(|name| Series {
        name: name.into(),
        points: Vec::new(),
    });
    let most = effort.memory(500 << 20, 10 << 20) >> 20;
    let sizes = effort.points(
        &[1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500],
        &[1, 10],
        most,
    );
    let runs = effort.runs(500, 2);
    let passes = (runs / TURNS).clamp(1, PASSES);
    let count = runs.div_ceil(passes);
    for size in sizes {
        out::say(&format!("wpp: map, fill, unmap {size} MiB"));
        let shown = Cell::whole(Unit::Count, size);
        if let Some(lack) = session.lacks(size << 22, (size << 22) + (2 << 30)) {
            table.row(vec![shown, Cell::words(format!("not measured: {lack}"))]);
            continue;
        }
        let mut load = Load::start(session)?;
        let pid = load.program.pid();
        let found = turns(session, pid, count, EVERY, || {
            let times = load.cycle(size << 20, TIMES, passes as u64)?;
            Ok(Samples(times).median().into_iter().collect())
        })?;
        let Some(found) = found.into_iter().next() else {
            return Err(KeeperError::Other("the load gave no times".into()));
        };
        for (line, samples) in lines.iter_mut().zip([&found.plain, &found.tracked]) {
            let median = samples.median();
            line.points
                .extend(median.map(|m| (float(size), m, samples.percentile(99.0))));
        }
        table.row(vec![
            shown,
            Cell::Many(Unit::Time, found.plain),
            Cell::Many(Unit::Time, found.tracked),
            Cell::Range(Unit::Ratio, found.ratio),
            Cell::Range(Unit::Ratio, found.again),
        ]);
    }
    report.notes.push(format!(
        "Map, fill, unmap: medians of {passes} passes in each turn; {count} turns."
    ));
    report.tables.push(table);
    let plot = Plot {
        title: format!("Map, fill, unmap, {TIMES} times"),
        x: Axis {
            label: "mapping, MiB".into(),
            unit: Unit::Count,
            log: true,
        },
        y: Axis {
            label: "time of a pass".into(),
            unit: Unit::Time,
            log: true,
        },
        series: lines.into(),
    };
    report.plots.push(("wpp-cycle", plot));
    Ok(())
}
