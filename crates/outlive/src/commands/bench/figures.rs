//! Figures: samples and what is told of them, tables of them, and a report of tables and plots.

use super::plot::Plot;
use crate::out;
use outlive_keeper::KeeperError;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;

/// Values of one kind that were measured under the same conditions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    /// The value that `percent` of them do not exceed (nearest rank); `None` of none.
    pub fn percentile(&self, percent: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank is a small number and not negative"
        )]
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
    }

    /// The middle one, or the mean of both; `None` of none.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let upper = *sorted.get(sorted.len() / 2)?;
        if sorted.len() % 2 == 1 {
            return Some(upper);
        }
        Some(f64::midpoint(*sorted.get(sorted.len() / 2 - 1)?, upper))
    }

    /// Adds one.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The least and the most.
    pub fn range(&self) -> Option<(f64, f64)> {
        let least = self.0.iter().copied().reduce(f64::min)?;
        Some((least, self.0.iter().copied().reduce(f64::max)?))
    }
}

/// What a figure is, and so how it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Microseconds.
    Time,
    /// Bytes.
    Bytes,
    /// Bytes of a size that was chosen: whole MiB.
    Memory,
    /// Bytes a second.
    Speed,
    /// A number of things.
    Count,
    /// So many times as much.
    Ratio,
}

impl Unit {
    /// A value as people read it.
    pub fn show(self, value: f64) -> String {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a conversion of a float ends at the least and the most"
        )]
        let whole = value.round() as u64;
        match self {
            Self::Time => out::time_us(whole),
            Self::Bytes => out::bytes(whole),
            Self::Memory if whole >= 1 << 30 && whole.trailing_zeros() >= 29 => {
                format!("{} GiB", value / float(1 << 30))
            }
            Self::Memory => format!("{} MiB", whole >> 20),
            Self::Speed => format!("{}/s", out::bytes(whole)),
            Self::Count => out::count(whole),
            Self::Ratio => format!("{value:.3}"),
        }
    }
}

/// One field of a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Words.
    Words(String),
    /// One value.
    One(Unit, f64),
    /// Samples: median and 99th percentile, and how many.
    Many(Unit, Samples),
    /// Samples: median, least and most, and how many.
    Range(Unit, Samples),
    /// Was not measured.
    Nothing,
}

impl Cell {
    /// Words.
    pub fn words(text: impl Into<String>) -> Self {
        Self::Words(text.into())
    }

    /// A whole number of things or bytes.
    pub fn whole(unit: Unit, value: u64) -> Self {
        Self::One(unit, float(value))
    }

    fn show(&self) -> String {
        let two = |unit: &Unit, samples: &Samples, a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) if samples.0.len() > 1 => {
                format!("{} / {} ({})", unit.show(a), unit.show(b), samples.0.len())
            }
            (Some(a), _) => unit.show(a),
            _ => "–".into(),
        };
        match self {
            Self::Words(text) => text.replace('|', "\\|"),
            Self::One(unit, value) => unit.show(*value),
            Self::Many(unit, samples) => {
                two(unit, samples, samples.median(), samples.percentile(99.0))
            }
            Self::Range(unit, samples) => match (samples.median(), samples.range()) {
                (Some(middle), Some((least, most))) => format!(
                    "{} ({} to {}; {})",
                    unit.show(middle),
                    unit.show(least),
                    unit.show(most),
                    samples.0.len()
                ),
                _ => "–".into(),
            },
            Self::Nothing => "–".into(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Words(text) => json!(text),
            Self::One(_, value) => json!(value),
            Self::Many(_, samples) | Self::Range(_, samples) => json!({
                "median": samples.median(),
                "p99": samples.percentile(99.0),
                "min": samples.range().map(|r| r.0),
                "max": samples.range().map(|r| r.1),
                "n": samples.0.len(),
            }),
            Self::Nothing => Value::Null,
        }
    }
}

/// A whole number as a figure.
pub fn float(value: u64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "figures have three digits that count"
    )]
    let value = value as f64;
    value
}

/// A table: a name (of JSON), a heading, columns, rows.
#[derive(Clone, Debug)]
pub struct Table {
    name: &'static str,
    heading: String,
    columns: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// An empty one.
    pub fn new(name: &'static str, heading: impl Into<String>, columns: &[&'static str]) -> Self {
        Self {
            name,
            heading: heading.into(),
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; what is missing at its end was not measured.
    pub fn row(&mut self, mut cells: Vec<Cell>) {
        cells.resize(self.columns.len(), Cell::Nothing);
        self.rows.push(cells);
    }

    fn markdown(&self) -> String {
        let shown: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| row.iter().map(Cell::show).collect())
            .collect();
        let mut text = format!(
            "### {}\n\n| {} |\n|",
            self.heading,
            self.columns.join(" | ")
        );
        text.push_str(&"---|".repeat(self.columns.len()));
        for row in shown {
            let _ = write!(text, "\n| {} |", row.join(" | "));
        }
        text.push('\n');
        text
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let fields = self.columns.iter().zip(row);
            fields
                .map(|(name, cell)| ((*name).to_owned(), cell.json()))
                .collect::<Value>()
        });
        json!({ "name": self.name, "rows": rows.collect::<Vec<Value>>() })
    }
}

/// All that one sub-command found.
#[derive(Debug)]
pub struct Report {
    /// Its name.
    pub name: &'static str,
    /// What it is about.
    pub title: &'static str,
    /// The command that gives it.
    pub command: String,
    /// How it was measured, and what was not.
    pub notes: Vec<String>,
    /// Tables.
    pub tables: Vec<Table>,
    /// Plots with the names of their files.
    pub plots: Vec<(&'static str, Plot)>,
}

impl Report {
    /// An empty one.
    pub fn new(name: &'static str, title: &'static str) -> Self {
        Self {
            name,
            title,
            command: String::new(),
            notes: Vec::new(),
            tables: Vec::new(),
            plots: Vec::new(),
        }
    }

    /// As a page, with or without its plots.
    pub fn markdown(&self, plots: bool) -> String {
        let mut text = format!("## {}\n\n`{}`\n", self.title, self.command);
        for note in &self.notes {
            let _ = write!(text, "\n- {note}");
        }
        text.push('\n');
        for table in &self.tables {
            let _ = write!(text, "\n{}", table.markdown());
        }
        for (stem, plot) in self.plots.iter().filter(|_| plots) {
            let _ = write!(text, "\n![{}]({stem}.svg)\n", plot.title);
        }
        text
    }

    /// As JSON.
    pub fn json(&self) -> Value {
        json!({
            "bench": self.name,
            "command": self.command,
            "notes": self.notes,
            "tables": self.tables.iter().map(Table::json).collect::<Vec<Value>>(),
        })
    }

    /// Writes the page and its plots into a directory.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn write(&self, dir: &Path) -> Result<(), KeeperError> {
        let put = |name: String, text: String| {
            let path = dir.join(name);
            std::fs::write(&path, text)
                .map_err(KeeperError::io(format!("write {}", path.display())))
        };
        std::fs::create_dir_all(dir).map_err(KeeperError::io(format!("make {}", dir.display())))?;
        for (stem, plot) in &self.plots {
            put(format!("{stem}.svg"), plot.svg())?;
        }
        put(
            format!("{}.md", self.name),
            self.markdown(true).replacen("##", "#", 1),
        )
    }
}

/// The machine, in one line; with what else it has to do.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (cpus, kernel) = (read("/proc/cpuinfo"), read("/proc/sys/kernel/osrelease"));
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let load = read("/proc/loadavg");
    let version: Vec<&str> = kernel.trim().split('.').take(2).collect();
    format!(
        "{cores} × {}, Linux {}, load average before {}",
        model.map_or("unknown processor", |(_, name)| name.trim()),
        version.join("."),
        load.split(' ').next().unwrap_or("not known"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_told_by_median_and_percentile() {
        let samples = Samples((1..=200).rev().map(float).collect());
        assert_eq!(samples.median(), Some(100.5));
        assert_eq!(samples.percentile(99.0), Some(198.0));
        assert_eq!(samples.percentile(0.0), Some(1.0));
        assert_eq!(samples.range(), Some((1.0, 200.0)));
        assert_eq!(Samples::default().median(), None);
        assert_eq!(Samples::default().percentile(99.0), None);
        assert_eq!(Samples(vec![7.0]).percentile(99.0), Some(7.0));
    }

    #[test]
    fn tables_are_markdown_and_json() {
        let mut table = Table::new("t", "Times", &["what", "time", "ratio", "more"]);
        let samples = Samples(vec![1000.0, 3000.0]);
        table.row(vec![
            Cell::words("a|b"),
            Cell::Many(Unit::Time, samples.clone()),
            Cell::Range(Unit::Ratio, Samples(vec![1.0, 1.5, 2.0])),
        ]);
        table.row(vec![
            Cell::whole(Unit::Bytes, 4096),
            Cell::Many(Unit::Time, Samples(vec![5.0])),
        ]);
        let text = table.markdown();
        assert!(
            text.contains("| what | time | ratio | more |\n|---|---|---|---|\n"),
            "{text}"
        );
        assert!(
            text.contains("| a\\|b | 2.00 ms / 3.00 ms (2) | 1.500 (1.000 to 2.000; 3) | – |"),
            "{text}"
        );
        assert!(text.contains("| 4.10 kB | 5 µs | – | – |"), "{text}");
        let json = table.json();
        assert_eq!(json["rows"][0]["time"]["median"], 2000.0);
        assert_eq!(json["rows"][0]["more"], Value::Null);
        assert_eq!(json["rows"][1]["what"], 4096.0);
    }
}
