//! What was measured, as a table.

use crate::{
    outlive::{Epoch, PowerEvent},
    stats::{bytes, count, median, time, times},
};
use std::collections::BTreeMap;

/// One restore.
#[derive(Clone, Copy, Debug)]
pub struct Restore {
    /// Until everything was in place, microseconds.
    pub restore_us: f64,
    /// Until the first thread ran, microseconds.
    pub first_run_us: f64,
    /// From the start of the command until Redis had answered, microseconds.
    pub first_answer_us: f64,
}

/// One kill.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// The restore after it.
    pub restore: Restore,
    /// Acknowledged writes after the last epoch.
    pub lost: usize,
    /// From the newest write that came back to the kill, milliseconds; 0 where none was lost.
    pub lost_ms: f64,
}

/// The planned event.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    /// The restore after it.
    pub restore: Restore,
    /// Acknowledged writes that are missing.
    pub lost: usize,
    /// What the command said.
    pub event: PowerEvent,
}

/// Everything measured.
#[derive(Debug, Default)]
pub struct Report {
    /// Keys at the end.
    pub keys: u64,
    /// Writes a second while filling.
    pub fill_rate: f64,
    /// Writes a second of each act.
    pub write_rates: Vec<f64>,
    /// The kills.
    pub kills: Vec<Kill>,
    /// The planned event.
    pub planned: Option<Planned>,
    epochs: BTreeMap<u64, Epoch>,
}

impl Report {
    /// Takes epochs in; those that are known already are counted once.
    pub fn note_epochs(&mut self, epochs: Vec<Epoch>) {
        self.epochs
            .extend(epochs.into_iter().map(|epoch| (epoch.epoch, epoch)));
    }

    /// Prints the table.
    pub fn print(&self, seed: u64) {
        println!(
            "\nEvery key was right after every restore. Measured on this machine, seed {seed}:\n"
        );
        let rows = self.rows();
        let width = rows
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        for (name, value) in rows {
            println!("  {name:width$}  {value}");
        }
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let value_bytes = self.keys * crate::model::VALUE_LENGTH as u64;
        let lost: usize = self.kills.iter().map(|kill| kill.lost).sum();
        let lost_ms: Vec<f64> = self.kills.iter().map(|kill| kill.lost_ms).collect();
        let worst_ms = lost_ms.iter().copied().fold(0.0, f64::max);
        let mut rows = vec![
            (
                "keys at the end",
                format!("{} ({} of values)", count(self.keys), bytes(value_bytes)),
            ),
            ("writes/s while filling", rate(Some(self.fill_rate))),
            ("writes/s while tracked", rate(median(&self.write_rates))),
        ];
        rows.extend(self.epoch_rows());
        rows.extend([
            ("kills (SIGKILL)", count(self.kills.len() as u64)),
            (
                "acknowledged, but after the last epoch",
                format!(
                    "{} writes in all; at most {worst_ms:.0} ms",
                    count(lost as u64)
                ),
            ),
        ]);
        if let Some(planned) = self.planned {
            let lost = count(planned.lost as u64);
            let known = |us: Option<u64>| time(us.map(|us| us as f64));
            let (durable, ended) = (planned.event.durable_us, planned.event.event_us);
            rows.extend([
                ("acknowledged writes lost, planned event", lost),
                ("planned event, durable time", known(durable)),
                ("planned event, until the program had ended", known(ended)),
            ]);
        }
        let restores = self.kills.iter().map(|kill| kill.restore);
        let restores: Vec<Restore> = restores
            .chain(self.planned.map(|planned| planned.restore))
            .collect();
        let of = |what: fn(&Restore) -> f64| restores.iter().map(what).collect::<Vec<f64>>();
        rows.extend([
            (
                "restore, all in place: median / p99 / max",
                times(&of(|r| r.restore_us)),
            ),
            (
                "restore, first thread runs: median / p99 / max",
                times(&of(|r| r.first_run_us)),
            ),
            (
                "restore, first answer: median / p99 / max",
                times(&of(|r| r.first_answer_us)),
            ),
        ]);
        rows
    }

    fn epoch_rows(&self) -> Vec<(&'static str, String)> {
        let later: Vec<&Epoch> = self.epochs.values().skip(1).collect();
        let known = |what: fn(&Epoch) -> Option<u64>| {
            let values = later.iter().filter_map(|epoch| what(epoch));
            values
                .filter(|&us| us > 0)
                .map(|us| us as f64)
                .collect::<Vec<f64>>()
        };
        let written: u64 = self.epochs.values().map(|epoch| epoch.bytes_written).sum();
        let pages: u64 = self.epochs.values().map(|epoch| epoch.pages).sum();
        let newest = self.epochs.keys().next_back().copied().unwrap_or(0);
        let first = self.epochs.values().next().and_then(|epoch| epoch.stop_us);
        vec![
            ("epochs committed", count(newest)),
            (
                "of these seen in the history",
                count(self.epochs.len() as u64),
            ),
            ("stop time, first epoch", time(first.map(|us| us as f64))),
            (
                "their stop time: median / p99 / max",
                times(&known(|epoch| epoch.stop_us)),
            ),
            (
                "their durable time: median / p99 / max",
                times(&known(|epoch| epoch.durable_us)),
            ),
            (
                "their bytes on the medium",
                format!("{} ({} pages)", bytes(written), count(pages)),
            ),
        ]
    }
}

fn rate(value: Option<f64>) -> String {
    value.map_or_else(|| "not known".into(), |rate| count(rate as u64))
}
