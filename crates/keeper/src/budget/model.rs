//! How long an event takes, from what was measured.
//!
//! An *event* is what happens when the mains fails: the program is frozen, written pages are looked
//! for, what is left is copied and written, and the commit flushes the medium [`FLUSHES`] times.
//!
//! ```text
//! event = (freeze + scan + files) + (residue + tables) * transfer + FLUSHES * flush
//! ```
//!
//! Pure: durations are nanoseconds, given by the caller.
//!
//! # Rules
//! - Each term is the 99.9th percentile (of the transfer: the 99th) of the last [`WINDOW`] samples;
//!   of fewer than a thousand it is the largest one: nothing is known of what is rarer than that.
//! - Freezing, scan and files are one term, as they follow each other in one epoch. On a machine that
//!   stalls now and then a stall hits one of them; the sum of their percentiles would count with one in
//!   each, at once.
//! - Nothing is extrapolated downwards: a term without a sample has its pessimistic default.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Samples that are remembered of each term.
pub const WINDOW: usize = 4096;

/// Flushes of one commit: the data, then the commit record.
pub const FLUSHES: u64 = 2;

/// One MiB.
pub const MIB: u64 = 1 << 20;

/// Transfers below this many bytes say nothing about bandwidth.
pub const LEAST_TRANSFER: u64 = MIB;

/// The last samples of a quantity, with their quantiles.
#[derive(Clone, Debug)]
pub struct Window {
    ring: VecDeque<u64>,
    sorted: Vec<u64>,
    most: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self::of(WINDOW)
    }
}

impl Window {
    /// A window of at most so many samples, at least one.
    #[must_use]
    pub fn of(most: usize) -> Self {
        Self {
            ring: VecDeque::new(),
            sorted: Vec::new(),
            most: most.max(1),
        }
    }

    /// Adds a sample; the oldest goes where there are too many.
    pub fn add(&mut self, value: u64) {
        if self.ring.len() == self.most
            && let Some(old) = self.ring.pop_front()
            && let Ok(at) = self.sorted.binary_search(&old)
        {
            self.sorted.remove(at);
        }
        self.ring.push_back(value);
        let at = self.sorted.partition_point(|v| *v < value);
        self.sorted.insert(at, value);
    }

    /// The smallest sample that at least `permille` of all do not exceed (nearest rank); `None` of
    /// none.
    #[must_use]
    pub fn quantile(&self, permille: usize) -> Option<u64> {
        let rank = (self.sorted.len() * permille.min(1000)).div_ceil(1000);
        self.sorted.get(rank.max(1) - 1).copied()
    }

    /// The largest sample.
    #[must_use]
    pub fn largest(&self) -> Option<u64> {
        self.sorted.last().copied()
    }

    /// Number of samples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }
}

/// What one epoch took, as far as it was measured. Durations in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Until all threads stood still.
    pub freeze: u64,
    /// The rest of the stop, without the copying of pages.
    pub scan: u64,
    /// Making the program's own files durable.
    pub files: u64,
    /// Copying pages at the stop, and writing pages and tables until they had reached the medium,
    /// but for the flush itself.
    pub transfer: u64,
    /// Bytes of that.
    pub bytes: u64,
    /// Bytes of trees and tables among them.
    pub tables: u64,
    /// A flush with next to nothing before it; 0 where it was not measured alone.
    pub flush: u64,
}

/// Measured terms, as they are.
#[derive(Clone, Debug)]
pub struct Model {
    freeze: Window,
    scan: Window,
    files: Window,
    /// All three.
    together: Window,
    flush: Window,
    transfer: Window,
    tables: Window,
    /// Assumed until the first stop.
    assumed: Figures,
}

/// The terms of the formula at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Until all threads stand still, nanoseconds.
    pub freeze_ns: u64,
    /// The rest of the stop without the copying of pages, nanoseconds.
    pub scan_ns: u64,
    /// Making the program's own files durable, nanoseconds.
    pub files_ns: u64,
    /// These three in one and the same epoch, nanoseconds; `None` before there was one.
    #[serde(default)]
    pub together_ns: Option<u64>,
    /// One flush, nanoseconds.
    pub flush_ns: u64,
    /// Flushes of one commit.
    pub flushes: u64,
    /// Copying and writing of one MiB, nanoseconds.
    pub mib_ns: u64,
    /// Trees and tables of an epoch, bytes.
    pub tables: u64,
}

impl Default for Figures {
    /// A slow disk and a program of a few threads; used only until something was measured.
    fn default() -> Self {
        Self {
            freeze_ns: 500_000,
            scan_ns: 2_000_000,
            files_ns: 0,
            together_ns: None,
            flush_ns: 20_000_000,
            flushes: FLUSHES,
            mib_ns: 10_000_000,
            tables: 64 << 10,
        }
    }
}

impl Figures {
    /// How long an event with so many bytes of residue takes, nanoseconds.
    #[must_use]
    pub fn cost(&self, residue: u64) -> u64 {
        self.fixed().saturating_add(self.transfer(residue))
    }

    /// The same with no page at all: no budget below it can be kept.
    #[must_use]
    pub fn floor(&self) -> u64 {
        self.cost(0)
    }

    /// Copying and writing of so many bytes and the tables, nanoseconds.
    #[must_use]
    pub fn transfer(&self, residue: u64) -> u64 {
        let bytes = u128::from(residue) + u128::from(self.tables);
        let ns = (bytes * u128::from(self.mib_ns)).div_ceil(u128::from(MIB));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// What does not depend on bytes, nanoseconds.
    #[must_use]
    pub fn fixed(&self) -> u64 {
        let parts = self.freeze_ns.saturating_add(self.scan_ns);
        let parts = parts.saturating_add(self.files_ns);
        self.commit()
            .saturating_add(self.together_ns.unwrap_or(parts).min(parts))
    }

    /// The flushes of one commit, nanoseconds.
    #[must_use]
    pub fn commit(&self) -> u64 {
        self.flush_ns.saturating_mul(self.flushes)
    }

    /// The largest residue, in bytes, whose event is within the budget (nanoseconds); `None` where
    /// not even an empty one is.
    #[must_use]
    pub fn allowed(&self, budget: u64) -> Option<u64> {
        let left = budget.checked_sub(self.floor())?;
        let bytes = u128::from(left) * u128::from(MIB) / u128::from(self.mib_ns.max(1));
        Some(u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

impl Model {
    /// A model that assumes these figures until others were measured.
    #[must_use]
    pub fn new(assumed: Figures) -> Self {
        Self {
            freeze: Window::default(),
            scan: Window::default(),
            files: Window::default(),
            together: Window::default(),
            flush: Window::default(),
            transfer: Window::default(),
            tables: Window::default(),
            assumed,
        }
    }

    /// Adds what a calibration of the medium found: flushes in nanoseconds, and nanoseconds a MiB.
    pub fn calibrate(&mut self, flushes: &[u64], mib: &[u64]) {
        flushes.iter().for_each(|ns| self.flush.add(*ns));
        mib.iter().for_each(|ns| self.transfer.add(*ns));
    }

    /// Adds what an epoch took.
    pub fn add(&mut self, sample: &Sample) {
        self.freeze.add(sample.freeze);
        self.scan.add(sample.scan);
        self.files.add(sample.files);
        let together = sample.freeze.saturating_add(sample.scan);
        self.together.add(together.saturating_add(sample.files));
        if sample.flush > 0 {
            self.flush.add(sample.flush);
        }
        self.tables.add(sample.tables);
        if sample.bytes >= LEAST_TRANSFER {
            let ns = u128::from(sample.transfer) * u128::from(MIB) / u128::from(sample.bytes);
            self.transfer.add(u64::try_from(ns).unwrap_or(u64::MAX));
        }
    }

    /// The terms now.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let high = |window: &Window, assumed| window.quantile(999).unwrap_or(assumed);
        Figures {
            freeze_ns: high(&self.freeze, self.assumed.freeze_ns),
            scan_ns: high(&self.scan, self.assumed.scan_ns),
            files_ns: high(&self.files, self.assumed.files_ns),
            together_ns: self.together.quantile(999),
            flush_ns: high(&self.flush, self.assumed.flush_ns),
            flushes: self.assumed.flushes,
            mib_ns: self.transfer.quantile(990).unwrap_or(self.assumed.mib_ns),
            tables: high(&self.tables, self.assumed.tables),
        }
    }

    /// Flushes and nanoseconds a MiB, as they were measured: quantiles in even steps, at most 64 of
    /// each.
    #[must_use]
    pub fn medium(&self) -> (Vec<u64>, Vec<u64>) {
        let steps = |window: &Window| -> Vec<u64> {
            let n = window.len().min(64);
            let at = |i: usize| window.quantile(1000 * i / n);
            (1..=n).filter_map(at).collect()
        };
        (steps(&self.flush), steps(&self.transfer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    fn figures() -> Figures {
        Figures {
            freeze_ns: MS,
            scan_ns: 2 * MS,
            files_ns: 3 * MS,
            together_ns: None,
            flush_ns: 4 * MS,
            flushes: 2,
            mib_ns: MS / 2,
            tables: 2 * MIB,
        }
    }

    #[test]
    fn the_formula_is_the_one_above() {
        let f = figures();
        assert_eq!(f.floor(), (1 + 2 + 3 + 2 * 4 + 1) * MS);
        assert_eq!(f.cost(10 * MIB), f.floor() + 5 * MS);
        assert_eq!(f.allowed(f.floor()), Some(0));
        assert_eq!(f.allowed(f.floor() - 1), None, "below the floor");
        assert_eq!(f.allowed(f.floor() + 5 * MS), Some(10 * MIB));
    }

    proptest! {
        #[test]
        fn what_is_allowed_fits_and_one_mib_more_does_not(
            budget in 0u64..10_000 * MS, flush in 0u64..50 * MS, mib in 1u64..20 * MS, tables in 0u64..64 * MIB,
        ) {
            let f = Figures { flush_ns: flush, mib_ns: mib, tables, ..figures() };
            match f.allowed(budget) {
                Some(bytes) => {
                    prop_assert!(f.cost(bytes) <= budget + 1);
                    prop_assert!(f.cost(bytes + MIB + 1) > budget);
                }
                None => prop_assert!(f.floor() > budget),
            }
        }

        #[test]
        fn a_window_forgets_and_ranks_as_sorting_does(
            values in prop::collection::vec(0u64..50, 1..60), most in 1usize..20, permille in 0usize..=1000,
        ) {
            let mut window = Window::of(most);
            values.iter().for_each(|v| window.add(*v));
            let from = values.len().saturating_sub(most);
            let mut kept = values[from..].to_vec();
            kept.sort_unstable();
            let rank = (kept.len() * permille).div_ceil(1000).max(1);
            prop_assert_eq!(window.quantile(permille), Some(kept[rank - 1]));
            prop_assert_eq!(window.largest(), kept.last().copied());
            prop_assert_eq!(window.len(), kept.len());
        }
    }

    #[test]
    fn one_stall_in_few_samples_counts_and_extremes_do_not_overflow() {
        let mut model = Model::new(Figures::default());
        assert_eq!(model.figures(), Figures::default());
        for _ in 0..100 {
            model.add(&Sample {
                flush: MS,
                ..Sample::default()
            });
        }
        model.add(&Sample {
            flush: 70 * MS,
            ..Sample::default()
        });
        assert_eq!(model.figures().flush_ns, 70 * MS);
        assert_eq!(
            model.figures().mib_ns,
            Figures::default().mib_ns,
            "small transfers say nothing of bandwidth"
        );
        let huge = u64::MAX;
        model.add(&Sample {
            freeze: huge,
            scan: huge,
            files: huge,
            transfer: huge,
            bytes: huge,
            tables: huge,
            flush: huge,
        });
        assert_eq!(model.figures().cost(huge), huge);
        assert_eq!(model.figures().allowed(huge), Some(0));
    }

    /// A machine on which a stall hits one part of an epoch now and then: events are within the figures
    /// as often as the percentiles say, and these do not count with a stall in each part.
    #[test]
    fn stalls_that_hit_one_part_at_a_time_are_not_added_up() {
        let mut random = crate::budget::simulation::Random(7);
        let mut epoch = || {
            let mut parts = [0; 3].map(|_: u64| MS + random.below(MS / 4));
            if random.below(200) == 0 {
                parts[random.below(3) as usize] += 20 * MS + random.below(20 * MS);
            }
            Sample {
                freeze: parts[0],
                scan: parts[1],
                files: parts[2],
                flush: MS,
                ..Sample::default()
            }
        };
        let mut model = Model::new(Figures::default());
        for _ in 0..2 * WINDOW {
            model.add(&epoch());
        }
        let figures = model.figures();
        let sum = figures.freeze_ns + figures.scan_ns + figures.files_ns;
        let floor = figures.fixed() - figures.commit();
        assert!(floor < 45 * MS && sum > floor * 3 / 2, "{figures:?}");
        let events = 100_000;
        let late = (0..events)
            .map(|_| epoch())
            .filter(|e| e.freeze + e.scan + e.files > floor);
        let late = late.count();
        assert!(late < events * 3 / 1000, "{late} of {events}");
    }

    #[test]
    fn one_stall_is_forgotten_once_it_is_rarer_than_what_counts() {
        let mut model = Model::new(Figures::default());
        let stall = 100 * MS;
        let of = |scan| Sample {
            scan,
            ..Sample::default()
        };
        model.add(&of(stall));
        for _ in 1..1000 {
            assert_eq!(model.figures().together_ns, Some(stall));
            model.add(&of(MS));
        }
        assert_eq!(model.figures().together_ns, Some(MS), "one of a thousand");
        // Two in so many are not, and one of them is of the past in the end.
        model.add(&of(stall));
        assert_eq!(model.figures().together_ns, Some(stall));
        for _ in 0..WINDOW {
            model.add(&of(MS));
        }
        assert_eq!(model.figures().together_ns, Some(MS));
    }

    #[test]
    fn what_is_kept_of_a_medium_gives_the_same_terms_again() {
        let mut model = Model::new(Figures::default());
        for n in 1..=5000 {
            model.add(&Sample {
                flush: n,
                transfer: 2 * n,
                bytes: MIB,
                ..Sample::default()
            });
        }
        let (flushes, mib) = model.medium();
        assert_eq!((flushes.len(), mib.len()), (64, 64));
        let mut again = Model::new(Figures::default());
        again.calibrate(&flushes, &mib);
        assert!(again.figures().flush_ns >= model.figures().flush_ns);
        assert!(again.figures().mib_ns >= model.figures().mib_ns);
    }
}
