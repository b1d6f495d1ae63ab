//! When the next epoch is due, and whether it begins a new generation of the store.
//!
//! Pure: instants are nanoseconds on any steady clock, given by the caller.
//!
//! # Rules
//! - Epochs start `interval` apart, measured from start to start; what was missed is not caught
//!   up. An epoch that took longer than the interval is followed by a pause of a tenth of the
//!   interval, so that the program is never under capture without a break.
//! - After the n-th failure in a row the next attempt waits `interval * 2^n`, at most
//!   [`LONGEST_WAIT`] (or the interval, where that is longer).
//! - An epoch that was given up is no failure: the next one is due as ever.
//! - A *full* epoch always begins a new generation, because what older epochs say of pages that
//!   are no longer there must not shine through: the first epoch of a tracker (but not of one that
//!   goes on from the newest epoch, after a restore), also where it takes the place of another, and
//!   the one after a failure that lost track.
//! - The log is *long* when it has grown beyond four times what is live in it and
//!   beyond [`SMALL_LOG`], or a quarter of what it could have where that is less; and, while there
//!   is room for a new generation, before there is none: the old one takes space until the new one is
//!   complete. A long log is flattened ([`crate::upkeep`]); where that cannot be, a full epoch begins a
//!   new generation.

/// Longest wait after repeated failures, nanoseconds.
pub const LONGEST_WAIT: u64 = 30_000_000_000;

/// A log up to this size, in bytes, is left to grow.
pub const SMALL_LOG: u64 = 1 << 30;

/// The same for a program with a hold-up budget.
pub const LONG_LOG: u64 = 16 << 30;

/// How the next epoch is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Appended to the log; only what changed is written.
    Next,
    /// Everything is copied, into a new generation that replaces the old one.
    Base,
}

/// The plan of one subject.
#[derive(Clone, Debug)]
pub struct Plan {
    interval: u64,
    due: u64,
    failures: u32,
    full: bool,
    small: u64,
}

impl Plan {
    /// A plan whose first epoch is due one `interval` (nanoseconds) after `now`. An interval of
    /// zero is taken as one nanosecond.
    #[must_use]
    pub fn new(interval: u64, now: u64) -> Self {
        let interval = interval.max(1);
        Self {
            interval,
            due: now.saturating_add(interval),
            failures: 0,
            full: true,
            small: SMALL_LOG,
        }
    }

    /// The same for a program with a hold-up budget, which a full epoch exceeds: its log may grow up to
    /// [`LONG_LOG`] before it counts as long.
    #[must_use]
    pub fn with_long_log(mut self) -> Self {
        self.small = LONG_LOG;
        self
    }

    /// The tracker goes on from the newest epoch of the log: the first one after it need not be
    /// full.
    pub fn goes_on(&mut self) {
        self.full = false;
    }

    /// Another tracker takes over, which knows nothing of the epochs so far.
    pub fn begins_anew(&mut self) {
        self.full = true;
    }

    /// Nanoseconds until the next epoch is due; 0 where it is due now.
    #[must_use]
    pub fn wait(&self, now: u64) -> u64 {
        self.due.saturating_sub(now)
    }

    /// Failures since the last epoch that was committed.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether the next epoch must copy everything.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// How the next epoch is to be written, given the length of the log, how much is free where it is
    /// (`None` where nobody tells) and, asked for only where it matters, how much of the log the
    /// newest epoch needs (all in bytes).
    pub fn begin(
        &self,
        log_bytes: u64,
        free: Option<u64>,
        live_bytes: impl FnOnce() -> u64,
    ) -> Begin {
        let free = free.unwrap_or(u64::MAX);
        let small = self.small.min(log_bytes.saturating_add(free) / 4);
        let grown = || {
            if log_bytes <= small && free > log_bytes.saturating_mul(2) {
                return false;
            }
            let live = live_bytes();
            let long = log_bytes > small && log_bytes > live.saturating_mul(4);
            // A new one needs as much as is live, and is of use where a quarter comes free.
            let fits = free > live.saturating_add(live / 8);
            let tight = free < live.saturating_mul(2) && log_bytes > live.saturating_add(live / 4);
            fits && (long || tight)
        };
        if self.full || grown() {
            Begin::Base
        } else {
            Begin::Next
        }
    }

    /// An epoch that started and ended at these instants was committed.
    pub fn committed(&mut self, started: u64, ended: u64) {
        self.failures = 0;
        self.full = false;
        let breather = ended.saturating_add(self.interval / 10);
        self.due = started.saturating_add(self.interval).max(breather);
    }

    /// An epoch was given up because the program would have been stopped for too long; `lost_track`
    /// as in [`Plan::failed`]. The next one is due as if it had been committed.
    pub fn given_up(&mut self, started: u64, ended: u64, lost_track: bool) {
        let full = self.full | lost_track;
        self.committed(started, ended);
        self.full = full;
    }

    /// An epoch failed at `ended`; `lost_track` where the tracker has forgotten its progress.
    pub fn failed(&mut self, ended: u64, lost_track: bool) {
        self.failures = self.failures.saturating_add(1);
        self.full |= lost_track;
        let factor = 1u64 << self.failures.min(32);
        let longest = LONGEST_WAIT.max(self.interval);
        self.due = ended.saturating_add(self.interval.saturating_mul(factor).min(longest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Runs the plan for `span` with epochs that take `cost`; returns the instants of their starts.
    fn simulate(plan: &mut Plan, span: u64, cost: u64, fails: impl Fn(usize) -> bool) -> Vec<u64> {
        let mut now = 0;
        let mut starts = Vec::new();
        loop {
            now += plan.wait(now);
            if now >= span {
                return starts;
            }
            let failed = fails(starts.len());
            starts.push(now);
            let started = now;
            now += cost;
            if failed {
                plan.failed(now, true);
            } else {
                plan.committed(started, now);
            }
        }
    }

    #[test]
    fn quick_epochs_come_ten_a_second() {
        let mut plan = Plan::new(100 * MS, 0);
        let starts = simulate(&mut plan, 10_000 * MS, 3 * MS, |_| false);
        assert_eq!(starts.len(), 99);
        assert!(starts.windows(2).all(|w| w[1] - w[0] == 100 * MS));
        assert_eq!(starts[0], 100 * MS);
    }

    #[test]
    fn slow_epochs_leave_a_break_and_are_not_caught_up() {
        let mut plan = Plan::new(100 * MS, 0);
        let starts = simulate(&mut plan, 10_000 * MS, 250 * MS, |_| false);
        assert!(starts.windows(2).all(|w| w[1] - w[0] == 260 * MS));
        let mut plan = Plan::new(100 * MS, 0);
        plan.committed(0, 5_000 * MS);
        plan.committed(5_010 * MS, 5_011 * MS);
        assert_eq!(plan.wait(5_011 * MS), 99 * MS, "one epoch, not fifty");
    }

    #[test]
    fn failures_back_off_to_a_bound_and_one_success_ends_it() {
        let mut plan = Plan::new(100 * MS, 0);
        let starts = simulate(&mut plan, 300_000 * MS, 0, |n| n < 14);
        let gaps: Vec<u64> = starts.windows(2).map(|w| (w[1] - w[0]) / MS).collect();
        assert_eq!(
            &gaps[..9],
            &[200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000]
        );
        assert!(gaps[9..14].iter().all(|g| *g == 30_000));
        assert!(gaps[14..].iter().all(|g| *g == 100), "{gaps:?}");
        assert_eq!(plan.failures(), 0);
    }

    #[test]
    fn an_interval_longer_than_the_longest_wait_is_kept() {
        let hour = 3_600_000 * MS;
        let mut plan = Plan::new(hour, 0);
        plan.failed(0, false);
        assert_eq!(plan.wait(0), hour);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut plan = Plan::new(u64::MAX, u64::MAX);
        for _ in 0..100 {
            plan.failed(u64::MAX, true);
        }
        plan.committed(u64::MAX, u64::MAX);
        assert_eq!(plan.wait(0), u64::MAX);
        assert_eq!(Plan::new(0, 0).wait(0), 1);
    }

    #[test]
    fn full_epochs_begin_a_generation_and_so_does_a_log_grown_too_long() {
        let mut plan = Plan::new(MS, 0);
        assert_eq!(
            plan.begin(0, None, || 0),
            Begin::Base,
            "the first of a tracker"
        );
        let mut restored = plan.clone();
        restored.goes_on();
        assert_eq!(restored.begin(0, None, || 0), Begin::Next);
        restored.failed(1, true);
        assert_eq!(restored.begin(0, None, || 0), Begin::Base);
        plan.committed(0, 1);
        assert_eq!(plan.begin(SMALL_LOG, None, || 0), Begin::Next);
        assert_eq!(plan.begin(SMALL_LOG + 1, None, || 0), Begin::Base);
        assert_eq!(plan.begin(SMALL_LOG + 1, None, || SMALL_LOG), Begin::Next);
        assert_eq!(
            plan.begin(4 * SMALL_LOG + 1, None, || SMALL_LOG),
            Begin::Base
        );
        assert_eq!(plan.begin(u64::MAX, None, || u64::MAX), Begin::Next);
        plan.failed(2, false);
        assert_eq!(
            plan.begin(0, None, || 0),
            Begin::Next,
            "nothing was taken, nothing is lost"
        );
        let long = plan.clone().with_long_log();
        assert_eq!(long.begin(LONG_LOG, None, || 0), Begin::Next);
        assert_eq!(long.begin(LONG_LOG + 1, None, || 0), Begin::Base);
        plan.failed(3, true);
        assert_eq!(plan.begin(0, None, || 0), Begin::Base);
    }

    #[test]
    fn a_small_medium_gets_its_new_generation_while_there_is_room_for_it() {
        const MIB: u64 = 1 << 20;
        let mut plan = Plan::new(MS, 0);
        plan.committed(0, 1);
        let begin =
            |log: u64, free: u64, live: u64| plan.begin(log * MIB, Some(free * MIB), || live * MIB);
        assert_eq!(begin(100, 10_000, 10), Begin::Next, "there is plenty");
        assert_eq!(
            begin(100, 200, 10),
            Begin::Base,
            "a quarter of all is taken"
        );
        assert_eq!(begin(70, 230, 30), Begin::Next);
        assert_eq!(begin(200, 100, 80), Begin::Base, "soon it would not fit");
        assert_eq!(begin(200, 85, 80), Begin::Next, "it does not fit any more");
        assert_eq!(begin(85, 100, 80), Begin::Next, "it would bring nothing");
    }
}
