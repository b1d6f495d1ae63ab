//! Time to persist, against memory: from a power event until everything is durable, of a program
//! that is kept; and an image of everything of one that is not.

use super::super::args::Effort;
use super::super::figures::{Cell, Report, Samples, Table, Unit, float};
use super::super::peer;
use super::super::plot::{Axis, Plot, Series};
use super::super::session::{Keeper, Load, Session};
use super::EVERY;
use crate::out;
use outlive_keeper::KeeperError;
use serde_json::Value;

/// A program under a power event.
struct Kept {
    /// Pages a second that it writes, one after the other.
    rate: u64,
    /// How it is kept, besides the time between epochs.
    flags: &'static [&'static str],
}

const KEPT: [Kept; 5] = [
    Kept {
        rate: 0,
        flags: &[],
    },
    Kept {
        rate: 1000,
        flags: &[],
    },
    Kept {
        rate: 10_000,
        flags: &[],
    },
    Kept {
        rate: 10_000,
        flags: &["--hold-up", "100ms"],
    },
    Kept {
        rate: 10_000,
        flags: &["--hold-up", "100ms", "--strict"],
    },
];

impl Kept {
    fn name(&self) -> String {
        let flags = match self.flags {
            [] => String::new(),
            flags => format!(", {}", flags.join(" ")),
        };
        match self.rate {
            0 => format!("kept, an epoch every {EVERY}, idle{flags}"),
            rate => format!("kept{flags}, writes {} pages a second", out::count(rate)),
        }
    }
}

/// Measures it.
///
/// # Errors
/// As its parts.
pub fn measure(session: &Session, effort: &Effort, report: &mut Report) -> Result<(), KeeperError> {
    let columns = [
        "memory",
        "what",
        "event to program ended",
        "stop to durable",
        "bytes written",
    ];
    let mut table = Table::new("wpp-persist", "Time to persist", &columns);
    let mut lines: Vec<Series> = KEPT
        .iter()
        .map(|kept| Series {
            name: kept.name(),
            points: Vec::new(),
        })
        .collect();
    lines.push(Series {
        name: "not kept: an image of everything".into(),
        points: Vec::new(),
    });
    let sizes = [16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30, 8 << 30];
    let most = effort.memory(8 << 30, 64 << 20);
    for memory in effort.points(&sizes, &[16 << 20], most) {
        out::say(&format!(
            "wpp: persist {}",
            Unit::Memory.show(float(memory))
        ));
        let size = Cell::whole(Unit::Memory, memory);
        if let Some(lack) = session.lacks(memory * 5 / 4, memory * 5 / 2 + (2 << 30)) {
            table.row(vec![size, Cell::words(format!("not measured: {lack}"))]);
            continue;
        }
        for (nth, kept) in KEPT.iter().enumerate() {
            let what = Cell::words(kept.name());
            let found = match events(session, effort, memory, kept) {
                Err(KeeperError::Told {
                    exit: 2 | 3,
                    message,
                }) => {
                    table.row(vec![size.clone(), what, Cell::words(out::tame(&message))]);
                    continue;
                }
                other => other?,
            };
            let median = found.event.median();
            lines[nth]
                .points
                .extend(median.map(|m| (float(memory), m, found.event.percentile(99.0))));
            table.row(vec![
                size.clone(),
                what,
                Cell::Many(Unit::Time, found.event),
                Cell::Many(Unit::Time, found.durable),
                Cell::One(Unit::Bytes, found.written.median().unwrap_or(0.0)),
            ]);
        }
        let durable = images(session, effort, memory)?;
        let median = durable.median();
        lines[KEPT.len()]
            .points
            .extend(median.map(|m| (float(memory), m, durable.percentile(99.0))));
        table.row(vec![
            size,
            Cell::words("not kept: an image of everything"),
            Cell::Nothing,
            Cell::Many(Unit::Time, durable),
            Cell::Nothing,
        ]);
    }
    report.notes.push(
        "Time to persist: the source document's own prototype took 160 ms and 1.3 GiB/s on its \
         machine, with nothing written before the event."
            .into(),
    );
    report.tables.push(table);
    let plot = Plot {
        title: "From a power event until everything is durable".into(),
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
    report.plots.push(("wpp-persist", plot));
    Ok(())
}

#[derive(Default)]
struct Found {
    event: Samples,
    durable: Samples,
    written: Samples,
}

/// Power events, each of a program of its own.
fn events(
    session: &Session,
    effort: &Effort,
    memory: u64,
    kept: &Kept,
) -> Result<Found, KeeperError> {
    let mut found = Found::default();
    for _ in 0..effort.runs(10, 1) {
        let mut load = Load::start(session)?;
        load.ask(&format!("hold 1 {memory}"))?;
        if kept.rate > 0 {
            load.ask(&format!("writes {}", kept.rate))?;
        }
        let keeper = Keeper::attach(session, load.program.pid(), EVERY, kept.flags)?;
        keeper.committed(5)?;
        let mut command = session.outlive(&["power", "simulate", keeper.name()])?;
        let printed = session.run_beside(&mut command, &mut [&mut load.program])?;
        let value: Value = serde_json::from_str(&printed).unwrap_or_default();
        let figure = |name: &str| value[name].as_f64();
        found.event.0.extend(figure("event_us"));
        found.durable.0.extend(figure("durable_us"));
        found.written.0.extend(figure("bytes_written"));
    }
    Ok(found)
}

/// Durable times of images of everything.
fn images(session: &Session, effort: &Effort, memory: u64) -> Result<Samples, KeeperError> {
    let load = Load::start(session)?;
    load.ask(&format!("hold 1 {memory}"))?;
    let dir = session.dir().join("image");
    let mut durable = Samples::default();
    for _ in 0..effort.runs(10, 1) {
        let (_, us) = peer::image(session, load.program.pid(), &dir)?;
        durable.add(us);
    }
    Ok(durable)
}
