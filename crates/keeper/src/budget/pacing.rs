//! When the next epoch must be taken, so that what is not durable fits into the budget.
//!
//! Pure: instants are nanoseconds on any steady clock, given by the caller.
//!
//! # What is at stake
//! An event may come at any instant. Between epochs it costs one epoch: all that was written since
//! the last stop. While the program runs on and its epoch is on the way to the medium, the event
//! must wait for that epoch first, and what the program writes meanwhile comes on top:
//!
//! ```text
//! between epochs    event(dirty)
//! after the resume  transfer(epoch) + flushes + event(written meanwhile)
//! program held      event(epoch), and nothing is written meanwhile
//! ```
//!
//! When something was written between two looks is not known: all of it may have been written at
//! once. So the second line is taken with all that the next epoch found.
//!
//! # Rules
//! - An epoch is begun as soon as the dirty set that is expected reaches [`AIM`] of what the worst
//!   of these instants allows.
//! - Where one epoch after the other cannot keep up with the program, it is *held* until its epoch
//!   is durable (back-pressure), and then runs for as long as its writing allows: a duty cycle.
//! - Where not even nothing can be saved within the budget, neither haste nor holding would help:
//!   epochs come as they would without one, and each interval is a violation.
//! - After a first epoch that was long on its way the program is held during the second, since how
//!   much it writes is not known yet.
//! - What is expected is the highest rate among the last [`RATES`] epochs. A program that begins to
//!   write faster is found out at the next look: that is a *violation*, and each is counted.
//! - A violation is never taken back: an interval in which the budget may not have been kept at
//!   some instant, by what was found afterwards, counts one, and its time is added up. An epoch that
//!   itself took longer than the budget is one.

use super::model::{Figures, MIB};
use std::collections::VecDeque;

/// Part of what is allowed at which an epoch is begun, per cent.
pub const AIM: u64 = 80;
/// Epochs whose rate is remembered.
pub const RATES: usize = 8;
/// The shortest time that a held program runs between two epochs, nanoseconds.
pub const LEAST_RUN: u64 = 1_000_000;
/// A held program runs on again through its epochs once they would cost this part of the budget,
/// per cent.
const LOOSEN: u64 = 60;
/// Epochs until a held program may run on again.
const PATIENCE: u32 = 16;

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing, for so many nanoseconds.
    Wait(u64),
    /// An epoch, during which the program runs on once it was captured.
    Epoch,
    /// An epoch with the program held until it is durable.
    Held,
}

/// An epoch that was taken, as far as the budget is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// When it was begun, with copying while the program ran.
    pub begun: u64,
    /// When the program stood still.
    pub stopped: u64,
    /// When it was durable.
    pub durable: u64,
    /// When the program ran on: before it was durable, or after where it was held.
    pub resumed: u64,
    /// Bytes of it, and of the program's own files that were not durable yet.
    pub bytes: u64,
    /// Everything was copied, whether it had been written or not.
    pub base: bool,
    /// It was that of a power event: the program stood still because of that.
    pub event: bool,
}

/// Figures for the user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Intervals in which the budget was not kept at some instant.
    pub violations: u64,
    /// How long it was not kept, nanoseconds.
    pub violated: u64,
    /// How long the program was held until epochs were durable, nanoseconds.
    pub held: u64,
}

/// The pacing of one subject.
#[derive(Clone, Debug)]
pub struct Pacing {
    budget: u64,
    /// Bytes a second, one of each of the last epochs.
    rates: VecDeque<u64>,
    last: Option<Taken>,
    holding: bool,
    easy: u32,
    counts: Counts,
    /// An epoch failed since the last one.
    failed: bool,
    /// The interval counts as a violation already.
    counted: bool,
}

impl Pacing {
    /// A pacing for a budget in nanoseconds.
    #[must_use]
    pub fn new(budget: u64) -> Self {
        Self {
            budget,
            rates: VecDeque::new(),
            last: None,
            holding: false,
            easy: 0,
            counts: Counts::default(),
            failed: false,
            counted: false,
        }
    }

    /// The budget, nanoseconds.
    #[must_use]
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether the program is held during epochs.
    #[must_use]
    pub fn holding(&self) -> bool {
        self.holding
    }

    /// The rate that is expected, bytes a second.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or(0)
    }

    /// Bytes that are expected to be written and not durable at an instant.
    #[must_use]
    pub fn expected(&self, now: u64) -> u64 {
        let since = self
            .last
            .map_or(0, |last| last.stopped.max(last.held_until()));
        written(self.rate(), now.saturating_sub(since))
    }

    /// How long an event is expected to take that comes at an instant between epochs.
    #[must_use]
    pub fn cost(&self, now: u64, figures: &Figures) -> u64 {
        figures.cost(self.expected(now))
    }

    /// The most dirty bytes with which an epoch may be begun.
    #[must_use]
    pub fn allowed(&self, figures: &Figures) -> u64 {
        if self.holding {
            figures.allowed(self.budget).unwrap_or(0)
        } else {
            allowed_running(figures, self.budget)
        }
    }

    /// What to do at `now`, where the plan says that the next epoch is due in `due` nanoseconds.
    #[must_use]
    pub fn step(&self, now: u64, due: u64, figures: &Figures) -> Step {
        let Some(last) = self.last else {
            return if due == 0 {
                Step::Epoch
            } else {
                Step::Wait(due)
            };
        };
        if figures.floor() > self.budget {
            return match due {
                0 => Step::Epoch,
                due => Step::Wait(due),
            };
        }
        if self.rates.is_empty() && last.durable.saturating_sub(last.resumed) > self.budget {
            // How much was written during the long way of the first epoch, nobody knows; during
            // another such way it would be more yet.
            return Step::Held;
        }
        let epoch = if self.holding {
            Step::Held
        } else {
            Step::Epoch
        };
        let ran_from = last.stopped.max(last.held_until());
        let aim = self.allowed(figures) / 100 * AIM;
        let mut at = ran_from.saturating_add(time_for(aim, self.rate()));
        if self.holding {
            at = at.max(ran_from.saturating_add(LEAST_RUN));
        }
        match at.saturating_sub(now).min(due) {
            0 => epoch,
            wait => Step::Wait(wait),
        }
    }

    /// Judges the interval that an epoch ends, and learns from it.
    pub fn taken(&mut self, taken: Taken, figures: &Figures) {
        let last = self.last.replace(taken);
        let Some(last) = last else {
            return;
        };
        let ran_from = last.stopped.max(last.held_until());
        let ran = taken.stopped.saturating_sub(ran_from).max(1);
        let rate = per_second(taken.bytes, ran);
        if !taken.base {
            if self.rates.len() == RATES {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.judge(&last, &taken, ran_from, rate, figures);
        if taken.was_held() && !taken.event {
            self.counts.held += taken.resumed.saturating_sub(taken.stopped);
        }
        self.choose(figures);
    }

    /// An epoch failed: nothing became durable, and how much is at stake is not known until one
    /// succeeds. The interval counts as a violation.
    pub fn failed(&mut self) {
        self.failed |= self.last.is_some();
        self.exceeded();
    }

    /// More is at stake at this instant than the budget allows: the interval is a violation, whatever
    /// its epoch finds.
    pub fn exceeded(&mut self) {
        if self.last.is_some() && !std::mem::replace(&mut self.counted, true) {
            self.counts.violations += 1;
        }
    }

    /// The instants of the interval between two epochs at which an event would have cost most: its
    /// end, and the end of the first epoch's way to the medium.
    fn judge(&mut self, last: &Taken, taken: &Taken, ran_from: u64, rate: u64, figures: &Figures) {
        let on_the_way = last.durable.saturating_sub(last.resumed);
        // What an event had to wait for that came when the epoch was begun.
        let took = taken.durable.saturating_sub(taken.begun);
        let at_the_end = if taken.base {
            took
        } else {
            figures.cost(taken.bytes)
        };
        let mut violated = 0;
        if at_the_end.max(took) > self.budget {
            // The dirty set grew evenly, as far as anybody knows.
            let allowed = figures.allowed(self.budget).unwrap_or(0);
            let good = time_for(allowed, rate);
            let ran = taken.stopped.saturating_sub(ran_from);
            violated += ran.saturating_sub(good).saturating_add(took);
        }
        let while_written = on_the_way.saturating_add(at_the_end);
        if on_the_way > 0 && while_written > self.budget {
            violated += on_the_way.min(while_written - self.budget);
        }
        if std::mem::take(&mut self.failed) {
            violated = violated.max(taken.durable.saturating_sub(last.durable));
        }
        let counted = std::mem::take(&mut self.counted);
        self.counts.violations += u64::from(violated > 0 && !counted);
        self.counts.violated += violated;
    }

    /// Whether the program is to be held during the next epochs.
    fn choose(&mut self, figures: &Figures) {
        let aim = allowed_running(figures, self.budget) / 100 * AIM;
        // An epoch can be followed by the next one only when it is durable; by then so much is dirty.
        let way = figures.transfer(aim).saturating_add(figures.fixed());
        let next = written(self.rate(), way);
        if next > aim {
            self.holding = true;
            self.easy = 0;
        } else if next <= aim / 100 * LOOSEN {
            self.easy = self.easy.saturating_add(1);
            self.holding &= self.easy < PATIENCE;
        } else {
            self.easy = 0;
        }
    }
}

impl Taken {
    fn was_held(&self) -> bool {
        self.resumed >= self.durable
    }

    /// Until when the program was held, where it was.
    fn held_until(&self) -> u64 {
        if self.was_held() { self.resumed } else { 0 }
    }
}

/// Dirty bytes with which an epoch may be begun while the program runs on through it: as many may be
/// written again while the event waits for them.
fn allowed_running(figures: &Figures, budget: u64) -> u64 {
    let both = budget.checked_sub(
        figures
            .floor()
            .saturating_add(figures.transfer(0))
            .saturating_add(figures.commit()),
    );
    let bytes = u128::from(both.unwrap_or(0)) * u128::from(MIB) / u128::from(figures.mib_ns.max(1));
    u64::try_from(bytes / 2).unwrap_or(u64::MAX)
}

/// Bytes at a rate (bytes a second) in so many nanoseconds.
fn written(rate: u64, ns: u64) -> u64 {
    let bytes = u128::from(rate) * u128::from(ns) / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Nanoseconds until so many bytes are written at a rate.
fn time_for(bytes: u64, rate: u64) -> u64 {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// A rate, bytes a second.
fn per_second(bytes: u64, ns: u64) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / u128::from(ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}
