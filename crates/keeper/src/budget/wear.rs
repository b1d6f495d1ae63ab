//! Bytes written to the medium, a day, and their cap.
//!
//! Pure: instants are nanoseconds on any steady clock, given by the caller.
//!
//! # Rules
//! - With a cap, after so many bytes no further epoch is due until the cap would have allowed them:
//!   on average over any time, no more than the cap is written, but for the first epoch and those
//!   that are asked for or that a hold-up budget needs.

/// One day, nanoseconds.
pub const DAY: u64 = 86_400_000_000_000;

/// What one subject's epochs wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wear {
    cap: Option<u64>,
    since: u64,
    bytes: u64,
    paid_until: u64,
    owed: u64,
    first: bool,
}

impl Wear {
    /// Counts from `now` on, with a cap in bytes a day.
    #[must_use]
    pub fn new(cap: Option<u64>, now: u64) -> Self {
        Self {
            cap,
            since: now,
            bytes: 0,
            paid_until: now,
            owed: 0,
            first: true,
        }
    }

    /// An epoch that was begun at `started` wrote so many bytes.
    pub fn add(&mut self, started: u64, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        let bytes = bytes.saturating_add(std::mem::take(&mut self.owed));
        if std::mem::take(&mut self.first) {
            return;
        }
        if let Some(cap) = self.cap {
            let ns = u128::from(bytes) * u128::from(DAY) / u128::from(cap.max(1));
            let ns = u64::try_from(ns).unwrap_or(u64::MAX);
            self.paid_until = self.paid_until.max(started).saturating_add(ns);
        }
    }

    /// Something else wrote so many bytes; they are counted, and the next epoch pays for them.
    pub fn also(&mut self, bytes: u64) {
        self.owed = self.owed.saturating_add(bytes);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Nanoseconds until the cap allows another epoch.
    #[must_use]
    pub fn wait(&self, now: u64) -> u64 {
        self.paid_until.saturating_sub(now)
    }

    /// Bytes written since counting began.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What that would be in a day; `None` in the first second.
    #[must_use]
    pub fn per_day(&self, now: u64) -> Option<u64> {
        let ns = now.saturating_sub(self.since);
        if ns < 1_000_000_000 {
            return None;
        }
        let day = u128::from(self.bytes) * u128::from(DAY) / u128::from(ns);
        Some(u64::try_from(day).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn the_cap_stretches_the_interval_and_is_not_exceeded() {
        let cap = 86_400 * 1000; // 1000 bytes a second
        let mut wear = Wear::new(Some(cap), 0);
        wear.add(0, 1_000_000_000);
        assert_eq!(wear.wait(0), 0, "the first is free");
        let (mut now, mut seed) = (SECOND, 1u64);
        let mut written = 0;
        for _ in 0..1000 {
            now += wear.wait(now).max(SECOND / 10);
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bytes = seed >> 52;
            wear.add(now, bytes);
            written += bytes;
        }
        now += wear.wait(now);
        assert!(written <= now / SECOND * 1000 + 1000, "{written} in {now}");
        assert!(
            written >= now / SECOND * 900,
            "the cap is used: {written} in {now}"
        );
        assert_eq!(wear.bytes(), written + 1_000_000_000);
    }

    #[test]
    fn without_a_cap_nothing_waits_and_a_day_is_extrapolated() {
        let mut wear = Wear::new(None, 0);
        wear.add(0, 5);
        wear.add(1, 5);
        assert_eq!(wear.wait(1), 0);
        assert_eq!(wear.per_day(SECOND / 2), None);
        assert_eq!(wear.per_day(10 * SECOND), Some(86_400));
        wear.add(2, u64::MAX);
        assert_eq!(wear.per_day(10 * SECOND), Some(u64::MAX));
    }
}
