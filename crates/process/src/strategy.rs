//! The strategies by which memory is captured: what is copied while the program runs, what at the
//! stop, and how written pages are known. Pure: no system call is made here.
//!
//! # Rules
//! - Whatever the strategy, an epoch holds exactly the same: only the way there differs.
//! - Rounding to blocks ([`Granularity`]) takes pages that the epochs so far hold, and no others:
//!   it brings no page into being, and none back that is no more.

use crate::interval::IntervalSet;
use crate::pages::Span;
use outlive_epoch::PAGE_SIZE;
use std::fmt;
use std::str::FromStr;

const PAGE: u64 = PAGE_SIZE as u64;

/// How memory is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Everything is copied at every stop; writes are not tracked.
    Copy,
    /// What was written since the last epoch is copied at the stop. A process whose memory is in
    /// no epoch yet is copied while it runs, but for what it writes meanwhile.
    Incremental,
    /// A replica is kept up to date while the program runs, in passes; the stop takes the rest.
    #[default]
    Redundant,
    /// What was written since the last epoch is protected at the stop, and copied while the program
    /// runs again: a write to what is not copied yet waits. Takes privilege.
    Cow,
}

impl Strategy {
    /// Whether writes are tracked between epochs.
    #[must_use]
    pub fn tracks(self) -> bool {
        self != Self::Copy
    }

    /// Whether writers wait for a guard.
    #[must_use]
    pub fn guards(self) -> bool {
        self == Self::Cow
    }

    /// Most passes over the memory of a process before a stop; it may be `fresh`, so that no epoch
    /// holds anything of it yet.
    #[must_use]
    pub fn passes(self, fresh: bool) -> u32 {
        /// Passes of which each finds what was written during the one before.
        const MOST: u32 = 8;
        match self {
            Self::Copy => 0,
            Self::Incremental | Self::Cow => u32::from(fresh),
            Self::Redundant => MOST,
        }
    }
}

/// Names of strategies, as the command line and the subject's card have them.
const NAMES: [(Strategy, &str); 4] = [
    (Strategy::Copy, "copy"),
    (Strategy::Incremental, "incremental"),
    (Strategy::Redundant, "redundant"),
    (Strategy::Cow, "cow"),
];

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(s, _)| s == self).map_or("", |n| n.1);
        f.pad(name)
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = NAMES.iter().find(|(_, name)| *name == text);
        known
            .map(|(s, _)| *s)
            .ok_or_else(|| format!("{text:?} is no strategy"))
    }
}

/// Whether a further pass would make the stop shorter: one that found `found` bytes, after one that
/// found `before`.
#[must_use]
pub fn is_worth_another(found: u64, before: u64) -> bool {
    /// Less than this is quicker taken at the stop, bytes.
    const SMALL: u64 = 1 << 20;
    found >= SMALL && found <= before / 4 * 3
}

/// The unit in which written pages are taken, in pages: a power of two, 1 to 1024. Larger units
/// make fewer and longer ranges, and more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granularity(u64);

impl Granularity {
    /// Largest unit, pages.
    pub const LARGEST: u32 = 1024;

    /// A unit of so many pages, where that is allowed.
    #[must_use]
    pub fn new(pages: u32) -> Option<Self> {
        let fits = pages.is_power_of_two() && pages <= Self::LARGEST;
        fits.then_some(Self(pages.into()))
    }

    /// Pages in a unit.
    #[must_use]
    pub fn pages(self) -> u32 {
        self.0 as u32
    }

    /// Rounds `written` ranges of one mapping (`area`) out to whole units, cut at the mapping's
    /// ends; of what is added, only pages that are in `stored` are taken (page indexes there).
    /// The result is in order, disjoint and holds everything that was given.
    #[must_use]
    pub fn round(self, written: Vec<Span>, area: Span, stored: &IntervalSet) -> Vec<Span> {
        if self.0 == 1 || written.is_empty() {
            return written;
        }
        let unit = self.0 * PAGE;
        let mut all = IntervalSet::default();
        for &(start, end) in &written {
            all.insert(start / PAGE, end / PAGE);
            let from = (start / unit * unit).max(area.0);
            let to = end.checked_next_multiple_of(unit).unwrap_or(area.1);
            for (s, e) in stored.within(from / PAGE, to.min(area.1) / PAGE) {
                all.insert(s, e);
            }
        }
        all.iter().map(|(s, e)| (s * PAGE, e * PAGE)).collect()
    }
}

impl Default for Granularity {
    /// Single pages.
    fn default() -> Self {
        Self(1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Granularity, IntervalSet, NAMES, PAGE, Strategy, is_worth_another};
    use proptest::{collection::vec, prop_assert_eq, proptest};
    use std::collections::BTreeSet;

    #[test]
    fn names_come_back_as_they_were_written() {
        for (strategy, name) in NAMES {
            assert_eq!(strategy.to_string(), name);
            assert_eq!(name.parse(), Ok(strategy));
        }
        assert!("".parse::<Strategy>().is_err());
    }

    #[test]
    fn units_are_powers_of_two() {
        let allowed = (0..=2048).filter(|n| Granularity::new(*n).is_some());
        let expected: Vec<u32> = (0..=10).map(|n| 1 << n).collect();
        assert_eq!(allowed.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn passes_end_when_they_bring_nothing() {
        assert!(is_worth_another(100 << 20, u64::MAX));
        assert!(is_worth_another(50 << 20, 100 << 20));
        assert!(!is_worth_another(90 << 20, 100 << 20));
        assert!(!is_worth_another(1 << 19, u64::MAX));
    }

    proptest! {
        /// Against a model that decides page by page.
        #[test]
        fn rounding_takes_the_pages_of_a_unit_that_exist(
            exponent in 0u32..=10,
            area in (0u64..3000, 1u64..3000),
            written in vec((0u64..3000, 1u64..40), 0..12),
            stored in vec((0u64..6000, 1u64..200), 0..20),
        ) {
            let unit = 1 << exponent;
            let (first, end) = (area.0, area.0 + area.1);
            let written: BTreeSet<u64> = written
                .into_iter()
                .flat_map(|(at, len)| first + at..first + at + len)
                .filter(|page| *page < end)
                .collect();
            let mut set = IntervalSet::default();
            stored.iter().for_each(|&(at, len)| set.insert(at, at + len));
            let holds = |page: u64| stored.iter().any(|&(at, len)| (at..at + len).contains(&page));

            let spans = written.iter().map(|p| (p * PAGE, (p + 1) * PAGE)).collect();
            let granularity = Granularity::new(unit).unwrap();
            let rounded = granularity.round(spans, (first * PAGE, end * PAGE), &set);

            let units: BTreeSet<u64> = written.iter().map(|p| p / u64::from(unit)).collect();
            let expected: Vec<u64> = (first..end)
                .filter(|p| written.contains(p) || holds(*p) && units.contains(&(p / u64::from(unit))))
                .collect();
            let got: Vec<u64> = rounded.iter().flat_map(|(s, e)| s / PAGE..e / PAGE).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
