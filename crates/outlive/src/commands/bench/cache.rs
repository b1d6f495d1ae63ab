//! The stop times of a Redis of known size, at ten epochs a second: idle, and under as many SET
//! requests as it can take; next to CRIU, where it is given.

use super::args::Effort;
use super::figures::{Cell, Samples, Table, Unit, float};
use super::peer;
use super::redis::{self, Server};
use super::session::{Keeper, Session};
use crate::out;
use outlive_keeper::KeeperError;
use outlive_keeper::images::Summary;
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Time between epochs.
const EVERY: &str = "100ms";
/// Bytes of a value.
const VALUE: u64 = 400;
/// How often the epochs in the store are looked at, before a new generation drops them.
const LOOK: Duration = Duration::from_millis(300);

/// Measures it.
///
/// # Errors
/// As its parts; not where Redis is not installed, which is a row.
pub fn measure(session: &Session, effort: &Effort) -> Result<Table, KeeperError> {
    let memory = effort.memory(1 << 30, 32 << 20);
    let shown = Unit::Memory.show(float(memory));
    let columns = [
        "what",
        "stop: median / p99",
        "first",
        "durable after the stop: median / p99",
        "bytes an epoch",
        "of idle",
    ];
    let heading = format!("A Redis of {shown}, an epoch every {EVERY}");
    let mut table = Table::new("stop-redis", heading, &columns);
    let lack = session.lacks(memory * 2, memory * 5 + (4 << 30));
    if let Some(lack) = redis::lacking().or(lack.map(|lack| format!("not measured: {lack}"))) {
        table.row(vec![Cell::words(lack)]);
        return Ok(table);
    }
    out::say(&format!("stop: a redis of {shown}"));
    let server = Server::start(session)?;
    let keys = server.fill(session, memory, VALUE)?;
    let seconds = u64::try_from(effort.runs(60, 2)).unwrap_or(60);
    let idle = kept(session, &server, seconds)?;
    let middle = idle.stop.median().unwrap_or(f64::NAN);
    table.row(idle.row("idle"));
    if let Some(criu) = &effort.peer {
        let (full, fails) = dumps(session, effort, &server, criu)?;
        let ratio = full
            .median()
            .map_or(Cell::Nothing, |us| Cell::One(Unit::Ratio, us / middle));
        let full = fails.map_or(Cell::Many(Unit::Time, full), Cell::Words);
        let begin = vec![Cell::words("idle: CRIU dump, frozen"), full];
        table.row(
            begin
                .into_iter()
                .chain([Cell::Nothing, Cell::Nothing, Cell::Nothing, ratio])
                .collect(),
        );
    }
    let (keys, value) = (keys.to_string(), VALUE.to_string());
    let words = ["-t", "set", "-n", "1000000000", "-r", &keys, "-d", &value];
    let mut command = server.benchmark(&words);
    let load = session.spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))?;
    table.row(kept(session, &server, seconds)?.row("under SET requests, 50 clients"));
    drop(load);
    Ok(table)
}

/// What the epochs were like.
struct Found {
    first_us: u64,
    stop: Samples,
    durable: Samples,
    written: Samples,
}

impl Found {
    fn row(self, what: &str) -> Vec<Cell> {
        vec![
            Cell::words(what),
            Cell::Many(Unit::Time, self.stop),
            Cell::whole(Unit::Time, self.first_us),
            Cell::Many(Unit::Time, self.durable),
            Cell::One(Unit::Bytes, self.written.median().unwrap_or(0.0)),
        ]
    }
}

/// Keeps the server for so long.
fn kept(session: &Session, server: &Server, seconds: u64) -> Result<Found, KeeperError> {
    let keeper = Keeper::attach(session, server.program.pid(), EVERY, &[])?;
    keeper.committed(1)?;
    let mut seen: BTreeMap<u64, Summary> = BTreeMap::new();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(seconds) {
        session.pause(LOOK)?;
        // Opened while it is written, a store may look damaged for a moment.
        let epochs = keeper.epochs().unwrap_or_default();
        seen.extend(epochs.into_iter().map(|epoch| (epoch.epoch, epoch)));
    }
    let first_us = seen.get(&1).map_or(0, |first| first.stop_us);
    let rest: Vec<&Summary> = seen.values().filter(|epoch| epoch.epoch > 1).collect();
    if rest.is_empty() {
        return Err(KeeperError::Other("no epoch was taken meanwhile".into()));
    }
    let samples = |value: &dyn Fn(&Summary) -> Option<u64>| {
        Samples(
            rest.iter()
                .filter_map(|epoch| value(epoch))
                .map(float)
                .collect(),
        )
    };
    Ok(Found {
        first_us,
        stop: samples(&|epoch| Some(epoch.stop_us)),
        durable: samples(&|epoch| epoch.durable_us),
        written: samples(&|epoch| Some(epoch.bytes_written)),
    })
}

fn dumps(
    session: &Session,
    effort: &Effort,
    server: &Server,
    criu: &std::path::Path,
) -> Result<(Samples, Option<String>), KeeperError> {
    let dir = session.dir().join("criu");
    let (mut found, mut fails) = (Samples::default(), None);
    for _ in 0..effort.runs(60, 2).div_ceil(6) {
        let dumped = peer::dump(session, criu, server.program.pid(), &dir, None);
        match peer::attempt(dumped, &mut fails)? {
            Some(dump) => found.add(dump.frozen_us),
            None => break,
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    Ok((found, fails))
}
