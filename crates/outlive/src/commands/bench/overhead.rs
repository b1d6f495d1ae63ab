//! `bench overhead`: what keeping a program costs while nothing happens to it: memory of the keeper,
//! page tables of the program, bytes that go to the medium, and processor time.

use super::args::Effort;
use super::figures::{Cell, Report, Samples, Table, Unit, float};
use super::session::{Keeper, Load, Session};
use crate::out;
use outlive_keeper::KeeperError;
use std::time::{Duration, Instant};

/// Time between epochs.
const EVERY: &str = "100ms";
/// Seconds of a day.
const DAY: f64 = 86_400.0;

/// Measures all of it.
///
/// # Errors
/// As its parts.
pub fn measure(session: &Session, effort: &Effort) -> Result<Report, KeeperError> {
    let mut report = Report::new("overhead", "What keeping costs");
    report.notes.push(format!(
        "An epoch every {EVERY}. Bytes to the medium are those that the kernel counts for the keeper; \
         a day is what was counted, multiplied. Page tables are the program's `VmPTE`."
    ));
    let columns = [
        "memory",
        "pages written a second",
        "epochs a second",
        "stop: median / p99",
        "keeper: memory",
        "keeper: processor",
        "page tables before",
        "while kept",
        "bytes a second",
        "bytes a day",
    ];
    let mut table = Table::new(
        "overhead",
        "By memory and by what the program writes",
        &columns,
    );
    let most = effort.memory(1 << 30, 64 << 20);
    for memory in effort.points(&[16 << 20, 256 << 20, 1 << 30, 4 << 30], &[16 << 20], most) {
        for written in effort.points(&[0, 100, 1000, 10_000], &[0, 1000], u64::MAX) {
            let shown = Unit::Memory.show(float(memory));
            out::say(&format!(
                "overhead: {shown}, {written} pages written a second"
            ));
            if let Some(lack) = session.lacks(memory * 3 / 2, memory * 4 + (4 << 30)) {
                table.row(vec![
                    Cell::words(shown),
                    Cell::words(format!("not measured: {lack}")),
                ]);
                continue;
            }
            table.row(row(session, effort, memory, written)?);
        }
    }
    report.tables.push(table);
    Ok(report)
}

fn row(
    session: &Session,
    effort: &Effort,
    memory: u64,
    written: u64,
) -> Result<Vec<Cell>, KeeperError> {
    let load = Load::start(session)?;
    load.ask(&format!("hold 1 {memory}"))?;
    let pid = load.program.pid();
    let before = page_tables(pid);
    if written > 0 {
        load.ask(&format!("writes {written}"))?;
    }
    let mut keeper = Keeper::attach(session, pid, EVERY, &[])?;
    let first = keeper.committed(3)?;
    let own = keeper.program().pid();
    let (bytes, ticks, began) = (bytes_written(own), processor_ticks(own), Instant::now());
    let seconds = u64::try_from(effort.runs(30, 2)).unwrap_or(30);
    session.pause(Duration::from_secs(seconds))?;
    let took = began.elapsed().as_secs_f64();
    let last = keeper.status()?;
    let rate = float(bytes_written(own).saturating_sub(bytes)) / took;
    let ticks = float(processor_ticks(own).saturating_sub(ticks));
    let stops = Samples(
        [last.median_stop_us, last.p99_stop_us]
            .into_iter()
            .flatten()
            .map(float)
            .collect(),
    );
    let stop = match stops.0.as_slice() {
        [median, p99] => format!("{} / {}", Unit::Time.show(*median), Unit::Time.show(*p99)),
        _ => "–".into(),
    };
    Ok(vec![
        Cell::words(Unit::Memory.show(float(memory))),
        Cell::whole(Unit::Count, written),
        Cell::words(format!(
            "{:.1}",
            float(last.committed - first.committed) / took
        )),
        Cell::words(stop),
        Cell::whole(Unit::Bytes, keeper.resident()),
        Cell::words(format!("{:.1} %", 100.0 * ticks / 100.0 / took)),
        Cell::whole(Unit::Bytes, before),
        Cell::whole(Unit::Bytes, page_tables(pid)),
        Cell::One(Unit::Speed, rate),
        Cell::One(Unit::Bytes, rate * DAY),
    ])
}

/// `VmPTE` of a process, bytes; 0 where it is not known.
fn page_tables(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes = field(&text, "VmPTE:");
    kilobytes.unwrap_or(0) * 1024
}

/// What a process had written to media, bytes; 0 where it is not known.
fn bytes_written(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    field(&text, "write_bytes:").unwrap_or(0)
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Processor time of a process, in hundredths of a second; 0 where it is not known.
fn processor_ticks(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields = after.split_whitespace().skip(11).take(2);
    fields.filter_map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_figures_are_read() {
        let own = std::process::id();
        assert!(page_tables(own) > 0);
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(60) {
            std::hint::black_box(own);
        }
        assert!(processor_ticks(own) > 0);
        assert_eq!(
            field("read_bytes: 1\nwrite_bytes: 42\n", "write_bytes:"),
            Some(42)
        );
    }
}
