//! What the program in the lab writes down of itself: one line every half second,
//! `tick N mono A boot B real C worked D`, times in nanoseconds.

use anyhow::{Context, Result, ensure};

/// A record that was found right, and what goes with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Its lines.
    pub lines: usize,
    /// How often the program had gone through its memory.
    pub worked: u64,
    /// The newest epoch that was committed when it was read.
    pub epoch: u64,
    /// How often the program had been restored.
    pub restores: usize,
}

impl Record {
    /// Judges a record: no line is missing or there twice, and no clock ran backwards.
    pub fn judge(text: &str) -> Result<Self> {
        let mut last: Option<[u64; 5]> = None;
        let mut lines = 0;
        // The last line may be written just now.
        let whole = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
        for line in whole.lines().filter(|line| *line != "ready") {
            let now = parse(line).with_context(|| format!("a strange line: {line:?}"))?;
            let wanted = last.map_or(0, |l| l[0] + 1);
            ensure!(
                now[0] == wanted,
                "line {} where {wanted} was to come",
                now[0]
            );
            if let Some(last) = last {
                let names = [
                    "",
                    "CLOCK_MONOTONIC",
                    "CLOCK_BOOTTIME",
                    "CLOCK_REALTIME",
                    "work",
                ];
                for (i, name) in names.iter().enumerate().skip(1) {
                    ensure!(
                        now[i] >= last[i],
                        "{name} went from {} back to {} at line {wanted}",
                        last[i],
                        now[i]
                    );
                }
            }
            last = Some(now);
            lines += 1;
        }
        Ok(Self {
            lines,
            worked: last.map_or(0, |l| l[4]),
            ..Self::default()
        })
    }
}

fn parse(line: &str) -> Option<[u64; 5]> {
    let words: Vec<&str> = line.split(' ').collect();
    let (names, numbers): (Vec<_>, Vec<_>) = words.chunks_exact(2).map(|w| (w[0], w[1])).unzip();
    if names != ["tick", "mono", "boot", "real", "worked"] || words.len() != 10 {
        return None;
    }
    let numbers: Option<Vec<u64>> = numbers.iter().map(|n| n.parse().ok()).collect();
    numbers?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: u64, mono: u64, boot: u64, real: u64, worked: u64) -> String {
        format!("tick {n} mono {mono} boot {boot} real {real} worked {worked}\n")
    }

    #[test]
    fn a_right_record_is_counted() {
        let text = format!(
            "ready\n{}{}tick 2 mo",
            line(0, 5, 6, 7, 1),
            line(1, 6, 6, 8, 4)
        );
        let record = Record::judge(&text).unwrap();
        assert_eq!((record.lines, record.worked), (2, 4));
        assert_eq!(Record::judge("").unwrap(), Record::default());
    }

    #[test]
    fn gaps_repetitions_and_clocks_that_run_backwards_are_found() {
        let first = line(0, 5, 6, 7, 1);
        for second in [
            line(2, 6, 7, 8, 1),
            line(0, 6, 7, 8, 1),
            line(1, 4, 7, 8, 1),
            line(1, 6, 5, 8, 1),
            line(1, 6, 7, 6, 1),
            line(1, 6, 7, 8, 0),
            "tick 1 mono 6 boot 7 real 8\n".into(),
            "tick x mono 6 boot 7 real 8 worked 9\n".into(),
        ] {
            assert!(
                Record::judge(&format!("{first}{second}")).is_err(),
                "{second}"
            );
        }
    }
}
