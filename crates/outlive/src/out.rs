//! How things are shown: units, moments, tables. Nothing here knows what it shows.

use std::fmt::Write as _;
use std::io::{self, Write as _};

/// Writes a line to standard output; a reader that went away is no error of ours.
pub fn line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Writes a JSON value as one line to standard output.
pub fn json(value: &serde_json::Value) {
    line(&value.to_string());
}

/// Says something to the user on standard error.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "outlive: {text}");
}

/// Microseconds with the unit that fits.
pub fn time_us(us: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = us as f64;
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", three(value / 1e3)),
        1_000_000..100_000_000 => format!("{} s", three(value / 1e6)),
        _ => format!("{:.0} s", value / 1e6),
    }
}

/// Bytes with the SI unit that fits.
pub fn bytes(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = count as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB", "PB"].iter();
    let mut unit = units.next();
    while value >= 999.5 {
        let Some(next) = units.next() else { break };
        value /= 1000.0;
        unit = Some(next);
    }
    let unit = unit.unwrap_or(&"");
    if count < 1000 {
        format!("{count} B")
    } else {
        format!("{} {unit}", three(value))
    }
}

/// Three digits that count.
fn three(value: f64) -> String {
    if value >= 99.95 {
        format!("{value:.0}")
    } else if value >= 9.995 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A count with thin groups: 1 234 567.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// `1 thread`, `2 threads`.
pub fn plural(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(n), if n == 1 { one } else { many })
}

/// A moment as RFC 3339 in UTC with nanoseconds, from nanoseconds since the Unix epoch.
pub fn moment(ns: u64) -> String {
    let (date, clock, fraction) = calendar(ns);
    format!("{date}T{clock}.{fraction:09}Z")
}

/// A moment for a table: to the millisecond, UTC.
pub fn short_moment(ns: u64) -> String {
    let (date, clock, fraction) = calendar(ns);
    format!("{date} {clock}.{:03}", fraction / 1_000_000)
}

fn calendar(ns: u64) -> (String, String, u64) {
    let (seconds, fraction) = (ns / 1_000_000_000, ns % 1_000_000_000);
    let (days, clock) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    (
        format!("{year:04}-{month:02}-{day:02}"),
        format!("{hour:02}:{minute:02}:{second:02}"),
        fraction,
    )
}

/// The date of the Gregorian calendar `days` after 1 January 1970. Years are counted from March,
/// so that a leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, date)
}

/// How a column stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// Words.
    Left,
    /// Figures.
    Right,
}

/// Rows under headings, aligned; the last column is never padded.
pub fn table(columns: &[(&str, Column)], rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(at))
            .map(|cell| cell.chars().count());
        cells
            .chain([columns[at].0.chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let heading: Vec<String> = columns.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let mut words = String::new();
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let gap = if at == 0 { "" } else { "  " };
            let _ = match columns[at].1 {
                Column::Left => write!(words, "{gap}{cell:<width$}"),
                Column::Right => write!(words, "{gap}{cell:>width$}"),
            };
        }
        text.push_str(words.trim_end());
        text.push('\n');
    }
    text.pop();
    text
}

/// The text without control characters, which could command the terminal.
pub fn tame(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_an_si_unit() {
        assert_eq!(time_us(0), "0 µs");
        assert_eq!(time_us(999), "999 µs");
        assert_eq!(time_us(1_500), "1.50 ms");
        assert_eq!(time_us(42_123), "42.1 ms");
        assert_eq!(time_us(123_456), "123 ms");
        assert_eq!(time_us(2_000_000), "2.00 s");
        assert_eq!(time_us(u64::MAX), "18446744073710 s");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.00 kB");
        assert_eq!(bytes(999_999), "1.00 MB");
        assert_eq!(bytes(640_000_000), "640 MB");
        assert_eq!(bytes(u64::MAX), "18447 PB");
        assert_eq!(count(1), "1");
        assert_eq!(count(1234567), "1 234 567");
        assert_eq!(plural(1, "page", "pages"), "1 page");
        assert_eq!(plural(2, "page", "pages"), "2 pages");
    }

    #[test]
    fn moments_are_rfc_3339() {
        assert_eq!(moment(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            moment(951_782_400_000_000_000),
            "2000-02-29T00:00:00.000000000Z"
        );
        assert_eq!(
            moment(1_795_248_998_000_000_001),
            "2026-11-21T08:16:38.000000001Z"
        );
        assert_eq!(
            moment(4_107_542_399_999_999_999),
            "2100-02-28T23:59:59.999999999Z"
        );
        assert_eq!(
            moment(4_107_542_400_000_000_000),
            "2100-03-01T00:00:00.000000000Z"
        );
        assert_eq!(
            short_moment(1_795_248_998_007_000_001),
            "2026-11-21 08:16:38.007"
        );
        assert!(moment(u64::MAX).starts_with("2554-"));
    }

    #[test]
    fn tables_line_up() {
        let columns = [
            ("NAME", Column::Left),
            ("N", Column::Right),
            ("WHAT", Column::Left),
        ];
        let rows = [
            vec!["a".into(), "1".into(), "x y".into()],
            vec!["long-µ-name".into(), "1000".into(), String::new()],
        ];
        let text = table(&columns, &rows);
        assert_eq!(
            text,
            "NAME            N  WHAT\na               1  x y\nlong-µ-name  1000"
        );
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(tame("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
