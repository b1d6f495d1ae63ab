//! Which epochs stay, and what is to be done about the files of a store so that only they stay.
//!
//! Pure: times are nanoseconds since the Unix epoch, as the epochs have them.
//!
//! # Rules
//! - The newest epoch stays in any case. Of every hour, day or week (UTC; weeks begin on Monday) that has
//!   epochs, the last one stands for it; what is counted are hours, days and weeks with epochs, the
//!   latest first. An epoch stays if any rule wants it.
//! - The generation that epochs are added to is left as it is, unless somebody asks for order now: it is
//!   made short by flattening, and what retention wants of it stays then.
//! - An older generation is removed when nothing of it is wanted that a newer one does not have, and
//!   written again, without the rest, when half of its epochs or fewer are wanted.
//! - Where all files together are larger than they may be, the oldest older generation goes, with
//!   whatever is in it.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// How many epochs stay, by rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    /// The newest ones.
    #[serde(default)]
    pub last: u32,
    /// Hours with the last epoch of each.
    #[serde(default)]
    pub hourly: u32,
    /// Days.
    #[serde(default)]
    pub daily: u32,
    /// Weeks.
    #[serde(default)]
    pub weekly: u32,
}

const NS: u64 = 1_000_000_000;
const HOUR: u64 = 3600 * NS;
const DAY: u64 = 24 * HOUR;

/// An epoch: its number and its time.
pub type Moment = (u64, u64);

impl Keep {
    fn rules(&self) -> [(&'static str, u32); 4] {
        [
            ("last", self.last),
            ("hourly", self.hourly),
            ("daily", self.daily),
            ("weekly", self.weekly),
        ]
    }

    fn rule(&mut self, name: &str) -> Option<&mut u32> {
        match name {
            "last" => Some(&mut self.last),
            "hourly" => Some(&mut self.hourly),
            "daily" => Some(&mut self.daily),
            "weekly" => Some(&mut self.weekly),
            _ => None,
        }
    }

    /// The epochs that stay.
    #[must_use]
    pub fn wanted(&self, epochs: &[Moment]) -> BTreeSet<u64> {
        let epochs: BTreeMap<u64, u64> = epochs.iter().copied().collect();
        // The first of January 1970 was a Thursday.
        let week = |time: u64| (time / DAY + 3) / 7;
        let mut wanted: BTreeSet<u64> = epochs.keys().rev().take(1).copied().collect();
        wanted.extend(epochs.keys().rev().take(self.last as usize));
        wanted.extend(latest(&epochs, self.hourly, |time| time / HOUR));
        wanted.extend(latest(&epochs, self.daily, |time| time / DAY));
        wanted.extend(latest(&epochs, self.weekly, week));
        wanted
    }
}

/// The last epoch of each of so many spans, the latest spans first.
fn latest(
    epochs: &BTreeMap<u64, u64>,
    count: u32,
    span: impl Fn(u64) -> u64,
) -> impl Iterator<Item = u64> {
    let mut spans = BTreeMap::new();
    for (number, time) in epochs {
        spans.insert(span(*time), *number);
    }
    spans.into_values().rev().take(count as usize)
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.rules();
        let said = rules.iter().filter(|(_, count)| *count > 0);
        let said: Vec<String> = said
            .map(|(name, count)| format!("{name}={count}"))
            .collect();
        f.write_str(&said.join(","))
    }
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut keep = Self::default();
        for word in text.split(',') {
            let wrong = || {
                format!(
                    "{word:?} says nothing about what stays; write last=N, hourly=N, daily=N or \
                     weekly=N, several of them with commas"
                )
            };
            let (name, count) = word.split_once('=').ok_or_else(wrong)?;
            let rule = keep.rule(name).ok_or_else(wrong)?;
            let plain = count.bytes().all(|b| b.is_ascii_digit());
            let count: u32 = count.parse().ok().filter(|_| plain).ok_or_else(wrong)?;
            if count == 0 {
                return Err(format!("{word:?}: leave it out instead"));
            }
            if *rule > 0 {
                return Err(format!("{name} is said twice"));
            }
            *rule = count;
        }
        Ok(keep)
    }
}

/// A file of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its number.
    pub number: u64,
    /// Its size.
    pub bytes: u64,
    /// Epochs are added to it.
    pub newest: bool,
    /// Its epochs, oldest first.
    pub epochs: Vec<Moment>,
}

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The epochs that stay; without it the newest generation, and nothing older.
    pub keep: Option<Keep>,
    /// Most bytes of all files, while there is an older one to remove.
    pub max_size: Option<u64>,
    /// Whatever is not wanted goes, also what is of little weight.
    pub thorough: bool,
}

/// Something to be done about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Remove it.
    Remove(u64),
    /// Write it again with these epochs only.
    Thin(u64, Vec<u64>),
}

/// What is to be done next, the oldest files first; `None` where all is as it should be.
#[must_use]
pub fn next(policy: Policy, files: &[Generation]) -> Option<Action> {
    let moments: Vec<Moment> = files.iter().flat_map(|file| file.epochs.clone()).collect();
    let wanted = policy.keep.map(|keep| keep.wanted(&moments));
    // Of each file what no newer one has.
    let mut left = wanted.unwrap_or_default();
    let mut wanted: Vec<Vec<u64>> = Vec::new();
    for file in files.iter().rev() {
        let ids = file.epochs.iter().map(|(id, _)| *id);
        wanted.push(ids.filter(|id| left.remove(id)).collect());
    }
    for (file, own) in files.iter().zip(wanted.into_iter().rev()) {
        let unwanted = file.epochs.len() - own.len();
        let heavy = unwanted > 0 && own.len() <= unwanted;
        match (file.newest, own.is_empty()) {
            (false, true) => return Some(Action::Remove(file.number)),
            (false, false) if heavy || (policy.thorough && unwanted > 0) => {
                return Some(Action::Thin(file.number, own));
            }
            (true, _) if policy.thorough && policy.keep.is_some() && unwanted > 0 => {
                return Some(Action::Thin(file.number, own));
            }
            _ => {}
        }
    }
    let all = files
        .iter()
        .fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
    let oldest = files.iter().find(|file| !file.newest);
    let over = policy.max_size.is_some_and(|most| all > most);
    oldest
        .filter(|_| over)
        .map(|file| Action::Remove(file.number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keep(text: &str) -> Keep {
        text.parse().unwrap()
    }

    #[test]
    fn rules_are_read_and_written_and_rubbish_is_named() {
        let all = Keep {
            last: 5,
            hourly: 24,
            daily: 7,
            weekly: 4,
        };
        assert_eq!(keep("weekly=4,last=5,daily=7,hourly=24"), all);
        assert_eq!(all.to_string(), "last=5,hourly=24,daily=7,weekly=4");
        for bad in [
            "",
            "last",
            "last=",
            "last=0",
            "last=-1",
            "last=+1",
            "last=1.5",
            "yearly=1",
            "last=1,",
            "last=1,last=2",
            "last=4294967296",
            " last=1",
        ] {
            let said = bad.parse::<Keep>().unwrap_err();
            assert!(!said.is_empty(), "{bad}");
        }
    }

    #[test]
    fn the_last_epoch_of_an_hour_a_day_a_week_stands_for_it() {
        // Monday, the fifth of January 1970.
        let monday = 4 * DAY;
        let epochs = [
            (1, monday - HOUR),
            (2, monday + 5),
            (3, monday + HOUR - 1),
            (4, monday + HOUR),
            (5, monday + DAY),
            (6, monday + DAY + 1),
        ];
        let of = |text| keep(text).wanted(&epochs).into_iter().collect::<Vec<_>>();
        assert_eq!(of("last=1"), [6]);
        assert_eq!(of("last=2"), [5, 6]);
        assert_eq!(of("hourly=2"), [4, 6]);
        assert_eq!(of("hourly=3"), [3, 4, 6]);
        assert_eq!(of("daily=9"), [1, 4, 6]);
        assert_eq!(of("weekly=2"), [1, 6]);
        assert_eq!(of("weekly=1,hourly=2,last=2"), [4, 5, 6]);
        assert_eq!(
            Keep::default().wanted(&epochs).len(),
            1,
            "the newest always"
        );
    }

    fn some_keep() -> impl Strategy<Value = Keep> {
        let few = 0u32..4;
        (few.clone(), few.clone(), few.clone(), few).prop_map(|(last, hourly, daily, weekly)| {
            Keep {
                last,
                hourly,
                daily,
                weekly,
            }
        })
    }

    fn some_epochs() -> impl Strategy<Value = Vec<Moment>> {
        let step = (1u64..4, prop_oneof![0..HOUR, 0..DAY, 0..20 * DAY]);
        prop::collection::vec(step, 1..40).prop_map(|steps| {
            let add = |at: &mut Moment, (number, time): (u64, u64)| {
                *at = (at.0 + number, at.1 + time);
                Some(*at)
            };
            steps.into_iter().scan((0, 0), add).collect()
        })
    }

    /// What the rules say, epoch by epoch, in as plain words as can be.
    fn stays(keep: Keep, epochs: &[Moment], this: Moment) -> bool {
        let newer = epochs.iter().filter(|e| e.0 > this.0).count();
        let by = |count: u32, span: &dyn Fn(u64) -> u64| {
            let mine = span(this.1);
            let last = !epochs.iter().any(|e| e.0 > this.0 && span(e.1) == mine);
            let later: BTreeSet<u64> = epochs.iter().map(|e| span(e.1)).collect();
            last && later.into_iter().filter(|s| *s > mine).count() < count as usize
        };
        newer < (keep.last as usize).max(1)
            || by(keep.hourly, &|t| t / HOUR)
            || by(keep.daily, &|t| t / DAY)
            || by(keep.weekly, &|t| (t / DAY + 3) / 7)
    }

    /// The files that an epoch after the other would leave, split at random.
    fn files(epochs: &[Moment], cuts: &[bool]) -> Vec<Generation> {
        let mut files: Vec<Generation> = Vec::new();
        for (i, epoch) in epochs.iter().enumerate() {
            if i == 0 || cuts.get(i).copied().unwrap_or(false) {
                files.push(Generation {
                    number: files.len() as u64 + 1,
                    bytes: 0,
                    newest: false,
                    // As a flattening leaves it: its base is the newest epoch of the one before.
                    epochs: if i > 0 { vec![epochs[i - 1]] } else { vec![] },
                });
            }
            let file = files.last_mut().unwrap();
            file.epochs.push(*epoch);
            file.bytes += 10;
        }
        files.last_mut().unwrap().newest = true;
        files
    }

    fn act(files: &mut Vec<Generation>, action: Action) {
        match action {
            Action::Remove(number) => files.retain(|f| f.number != number),
            Action::Thin(number, ids) => {
                let file = files.iter_mut().find(|f| f.number == number).unwrap();
                let newest = file.epochs.last().unwrap().0;
                let stays = |id: u64| ids.contains(&id) || (file.newest && id == newest);
                file.epochs.retain(|(id, _)| stays(*id));
                assert!(!file.epochs.is_empty());
            }
        }
    }

    proptest! {
        #[test]
        fn words_come_back(keep in some_keep()) {
            if keep != Keep::default() {
                prop_assert_eq!(keep.to_string().parse::<Keep>().unwrap(), keep);
            }
        }

        #[test]
        fn what_stays_is_what_the_rules_say(keep in some_keep(), epochs in some_epochs()) {
            let wanted = keep.wanted(&epochs);
            for epoch in &epochs {
                prop_assert_eq!(wanted.contains(&epoch.0), stays(keep, &epochs, *epoch), "{:?}", epoch);
            }
        }

        #[test]
        fn keeping_order_step_by_step_keeps_what_is_wanted(
            keep in some_keep(), epochs in some_epochs(),
            cuts in prop::collection::vec(prop::bool::weighted(0.3), 40), thorough: bool,
        ) {
            let mut files = files(&epochs, &cuts);
            let wanted = keep.wanted(&epochs);
            let policy = Policy { keep: Some(keep), max_size: None, thorough };
            let mut steps = 0;
            while let Some(action) = next(policy, &files) {
                act(&mut files, action);
                steps += 1;
                prop_assert!(steps < 100);
                let there: BTreeSet<u64> = files.iter().flat_map(|f| f.epochs.iter().map(|e| e.0)).collect();
                prop_assert!(wanted.is_subset(&there));
            }
            let there: BTreeSet<u64> = files.iter().flat_map(|f| f.epochs.iter().map(|e| e.0)).collect();
            if thorough {
                prop_assert_eq!(&there, &wanted);
            }
            for file in files.iter().filter(|f| !f.newest) {
                let own = file.epochs.iter().filter(|e| wanted.contains(&e.0)).count();
                prop_assert!(2 * own > file.epochs.len());
            }
        }

        #[test]
        fn a_limit_takes_the_oldest_files_and_never_the_newest(
            keep in some_keep(), epochs in some_epochs(), most in 0u64..400,
            cuts in prop::collection::vec(prop::bool::weighted(0.3), 40),
        ) {
            let mut files = files(&epochs, &cuts);
            let policy = Policy { keep: Some(keep), max_size: Some(most), thorough: false };
            while let Some(action) = next(policy, &files) {
                act(&mut files, action);
            }
            let all: u64 = files.iter().map(|f| f.bytes).sum();
            prop_assert!(all <= most || files.len() == 1);
            prop_assert!(files.last().is_some_and(|f| f.newest));
        }
    }

    #[test]
    fn without_rules_nothing_older_stays() {
        let epochs: Vec<Moment> = (1..9).map(|n| (n, n)).collect();
        let mut all = files(&epochs, &[false, false, true, false, true]);
        assert_eq!(all.len(), 3);
        while let Some(action) = next(Policy::default(), &all) {
            assert!(matches!(action, Action::Remove(_)));
            act(&mut all, action);
        }
        assert_eq!(all.len(), 1);
    }
}
