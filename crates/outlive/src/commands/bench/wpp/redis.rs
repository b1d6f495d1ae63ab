//! Redis, untracked and tracked: SET, LPUSH and LRANGE with payloads of four sizes, 50 clients.

use super::super::args::Effort;
use super::super::figures::{Cell, Report, Table, Unit};
use super::super::redis::{self, Server};
use super::super::session::Session;
use super::{EVERY, turns};
use crate::out;
use outlive_keeper::KeeperError;

/// What `redis-benchmark` is asked for, and what begins its line for it.
const TESTS: [(&str, &str); 5] = [
    ("set", "SET"),
    ("lpush", "LPUSH\""),
    ("lrange_100", "LRANGE_100"),
    ("lrange_300", "LRANGE_300"),
    ("lrange_600", "LRANGE_600"),
];
/// Sizes of the payload, bytes; the document does not name its four.
const PAYLOADS: [u64; 4] = [16, 64, 256, 1024];

/// Measures all of it.
///
/// # Errors
/// As its parts; not where Redis is not installed, which is a row.
pub fn measure(session: &Session, effort: &Effort, report: &mut Report) -> Result<(), KeeperError> {
    let requests = if effort.short { 2_000 } else { 100_000 };
    let columns = [
        "payload",
        "command",
        "untracked, 1/s",
        "tracked, 1/s",
        "tracked / untracked",
        "again",
    ];
    let heading = format!("Redis, 50 clients, {requests} requests: requests a second");
    let mut table = Table::new("wpp-redis", heading, &columns);
    if let Some(lack) = redis::lacking() {
        table.row(vec![Cell::words(lack)]);
        report.tables.push(table);
        return Ok(());
    }
    for payload in effort.points(&PAYLOADS, &[64], u64::MAX) {
        out::say(&format!("wpp: redis, {payload} bytes"));
        let server = Server::start(session)?;
        let count = effort.runs(5, 1);
        let found = turns(session, server.program.pid(), count, EVERY, || {
            benchmark(&server, session, payload, requests)
        })?;
        for ((name, _), turns) in TESTS.iter().zip(found) {
            table.row(vec![
                Cell::whole(Unit::Bytes, payload),
                Cell::words(name.to_uppercase()),
                Cell::Range(Unit::Count, turns.plain),
                Cell::Range(Unit::Count, turns.tracked),
                Cell::Range(Unit::Ratio, turns.ratio),
                Cell::Range(Unit::Ratio, turns.again),
            ]);
        }
    }
    report.notes.push(
        "Redis: the server is emptied before each measurement; `redis-benchmark` and, while \
         tracked, the keeper want processor time besides the server."
            .into(),
    );
    report.tables.push(table);
    Ok(())
}

/// Requests a second of each test, with an empty server.
fn benchmark(
    server: &Server,
    session: &Session,
    payload: u64,
    requests: u32,
) -> Result<Vec<f64>, KeeperError> {
    server.ask("FLUSHALL")?;
    let (payload, requests) = (payload.to_string(), requests.to_string());
    let tests = TESTS.map(|(name, _)| name).join(",");
    let words = ["-t", &tests, "-c", "50", "-n", &requests, "-d", &payload];
    let text = session.run(&mut server.benchmark(&words))?;
    results(&text)
        .ok_or_else(|| KeeperError::Other(format!("redis-benchmark printed no results:\n{text}")))
}

/// Requests a second of all tests in the output of `redis-benchmark --csv`.
fn results(text: &str) -> Option<Vec<f64>> {
    let value = |begin: &str| -> Option<f64> {
        let line = text.lines().find(|line| {
            line.strip_prefix('"')
                .is_some_and(|rest| rest.starts_with(begin))
        })?;
        line.split("\",\"").nth(1)?.trim_matches('"').parse().ok()
    };
    TESTS.iter().map(|(_, begin)| value(begin)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_redis_benchmark_are_read() {
        let text = "\"test\",\"rps\"\n\"SET\",\"1.5\",\"9\"\n\
            \"LPUSH (needed to benchmark LRANGE)\",\"7\"\n\"LPUSH\",\"2.5\"\n\
            \"LRANGE_100 (first 100 elements)\",\"3.5\"\n\"LRANGE_300 (first 300 elements)\",\"4\"\n\
            \"LRANGE_600 (first 600 elements)\",\"5\",\"x\"\n";
        assert_eq!(results(text), Some(vec![1.5, 2.5, 3.5, 4.0, 5.0]));
        assert_eq!(results("\"SET\",\"1\"\n"), None);
    }
}
